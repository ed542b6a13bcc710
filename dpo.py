"""Sharpen: learning from preferences without a reward model or sampling (DPO), and its siblings.

    minimise  -mean log sigmoid(beta [logratio(chosen) - logratio(rejected)])
    with      logratio(y) = log pi(y | x) - log pi_ref(y | x)

The reference is the model at the start, or --reference, frozen; its log-probabilities are computed
once. log pi sums over a completion's tokens, its end of turn included. --loss chooses among

    dpo       as above                               (Rafailov et al. 2023, arXiv 2305.18290)
    dpo_norm  logratios per token                    (Tulu 3: Lambert et al. 2024, 2411.15124)
    cdpo      labels may be wrong                    (Mitchell 2023)
    ipo       differences are pulled to 1/(2 beta)   (arXiv 2310.12036)
    simpo     no reference, mean log pi per token    (arXiv 2405.14734)
    orpo      no reference, with its own NLL         (arXiv 2403.07691)
    kto       single completions, good or bad        (arXiv 2402.01306)

A new loss: a function, a row of LOSSES, a field of Config for each flag. Left out: online variants.

    python dpo.py --init=out/sft --data=pairs.jsonl --loss=dpo --out=out/dpo
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import chat, kto
from data.pack import item_lengths, to_device
from figures import agreement
from model import completion_logprob_sums
from optim import Optimizer, wsd
from runtime import memory
from runtime.batches import index_order, micro_batches
from runtime.checkpoint import fingerprints
from runtime.cli import print0, refuse_unread
from runtime.errors import UserError
from runtime.process import launch, reduce_sum
from runtime.run import Run, RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    # -- What you will set --
    # checkpoint to start from: a run of sft.py
    init: str
    # preferences {"prompt", "chosen", "rejected"}; kto also takes {"prompt", "completion", "label"}
    data: str
    # what to minimise: dpo, dpo_norm, cdpo, ipo, simpo, orpo or kto
    loss: str = "dpo"
    # -- What you may set --
    # how closely the policy is held to the reference (simpo, orpo: the scale); 0: the loss's
    # default, 5 for dpo_norm, 2 for simpo, 0.1 for the others [>= 0]
    beta: float = 0.0
    # checkpoint that the policy is held to; "": --init
    reference: str = ""
    # cdpo: assumed share of wrong labels [>= 0; <= 0.5]
    smoothing: float = 0.1
    # simpo: the margin to reach [>= 0]
    gamma: float = 0.0
    # kto: weight of good completions [>= 0]
    desirable: float = 1.0
    # kto: weight of bad completions [>= 0]
    undesirable: float = 1.0
    # weight of -log pi(chosen) per token, added to dpo, dpo_norm, cdpo, ipo or simpo [>= 0]
    nll: float = 0.0
    # preferences to validate on; "": hold out some of --data
    val: str = ""
    # share of --data to hold out [> 0; < 1]
    val_fraction: float = 0.05
    # passes over the pairs [> 0; <= 10000]
    epochs: float = 1.0
    # optimizer steps; 0: as many as --epochs takes [<= 1000000]
    steps: int = 0
    # pairs (kto: completions) per optimizer step, over all ranks [>= 1]
    batch_size: int = 64
    # peak learning rate of AdamW; 0: 2e-4 (128 / width)^2, fitted on the quick start's
    # world at width 128 and extrapolated to others [>= 0]
    lr: float = 0.0
    # longest prompt with completion, in tokens; longer pairs are dropped; 0: the model's
    context: int = 0
    # drop bad lines of the data, and count them
    skip_bad: bool = False
    # -- What you will rarely set --
    # share of the steps over which the learning rate rises; after that it falls to 0 [>= 0; <= 1]
    warmup: float = 0.1
    # weight decay, of matrices only [>= 0]
    weight_decay: float = 0.0
    # torch.compile the model [may change on resume]
    compile: bool = False


# --------------------------------------------------------------------------------------------------
# The losses, fp32 [P], one value per pair. chosen, rejected [P]: what the loss compares, see
# LOSSES. label_probs: how probably the label is right, a row's "probability"; 1 for a plain label.


def dpo_loss(chosen, rejected, beta, label_probs=1.0):
    """-p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h), h the difference of the logratios:
    arXiv 2305.18290, eq. 7, if p = 1."""
    h = beta * (chosen - rejected)
    return -label_probs * F.logsigmoid(h) - (1 - label_probs) * F.logsigmoid(-h)


def cdpo_loss(chosen, rejected, beta, label_probs=1.0, smoothing=0.1):
    """Conservative DPO: a label is wrong with probability `smoothing` (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, eq. 3)."""
    label_probs = label_probs * (1 - smoothing) + (1 - label_probs) * smoothing
    return dpo_loss(chosen, rejected, beta, label_probs)


def ipo_loss(chosen, rejected, beta, label_probs=1.0):
    """(h - (p - 1/2) / beta)^2, h the difference of the logratios *per token* (as its authors do
    in TRL): arXiv 2310.12036, eq. 17; with p = 1 the target is 1/(2 beta)."""
    return (chosen - rejected - (label_probs - 0.5) / beta) ** 2


def simpo_loss(chosen, rejected, beta, label_probs=1.0, gamma=0.0):
    """-log sigmoid(beta (mean logp of the chosen - that of the rejected) - gamma): arXiv
    2405.14734, eq. 6. An uncertain label weights both orders."""
    h = beta * (chosen - rejected)
    return -label_probs * F.logsigmoid(h - gamma) - (1 - label_probs) * F.logsigmoid(-h - gamma)


def orpo_loss(chosen, rejected, beta, label_probs=1.0):
    """-mean logp(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = P/(1 -
    P) and log P the mean logp: arXiv 2403.07691, eq. 6 and 7."""
    mean_logps = torch.stack([chosen, rejected])
    log_odds = mean_logps - torch.log(-torch.expm1(mean_logps.clamp(max=-1e-6)))  # clamped: finite where P is near 1
    return -chosen + beta * dpo_loss(*log_odds, 1.0, label_probs)


def kto_loss(logratio, is_good, kl, beta, desirable=1.0, undesirable=1.0):
    """w (1 - sigmoid(beta (logratio - z))) of a good completion, w (1 - sigmoid(beta (z -
    logratio))) of a bad one: arXiv 2402.01306, eq. 8. is_good: bool [P]; kl: z, an estimate of
    KL(policy || reference) without a gradient (`measure_kl`)."""
    value = torch.sigmoid(beta * torch.where(is_good, logratio - kl, kl - logratio))
    return torch.where(is_good, desirable, undesirable) * (1 - value)


class Loss(NamedTuple):
    function: Callable  # of (chosen, rejected, beta, label_probs, and the flags below); kto's: see kto_loss
    beta: float  # default of --beta
    compares: str  # logratio, or logp, which needs no reference; mean_logratio, mean_logp: per token
    flags: tuple = ()  # flags that only this loss reads
    instead_of_nll: str = ""  # a loss that --nll is not added to: what else keeps chosen completions likely


LOSSES = {
    "dpo": Loss(dpo_loss, 0.1, "logratio"),
    "dpo_norm": Loss(dpo_loss, 5.0, "mean_logratio"),
    "cdpo": Loss(cdpo_loss, 0.1, "logratio", ("smoothing",)),
    "ipo": Loss(ipo_loss, 0.1, "mean_logratio"),
    "simpo": Loss(simpo_loss, 2.0, "mean_logp", ("gamma",)),
    "orpo": Loss(orpo_loss, 0.1, "mean_logp", instead_of_nll="a smaller --beta"),
    "kto": Loss(kto_loss, 0.1, "logratio", ("desirable", "undesirable"), "a larger --desirable or --beta"),
}


def check_flags(config):
    """Raises UserError for a flag that the chosen loss, or a run of --steps, does not read."""
    if config.loss not in LOSSES:
        raise UserError(f"--loss={config.loss}: expected one of {', '.join(LOSSES)}")
    row = LOSSES[config.loss]
    read = {*row.flags, "" if row.instead_of_nll else "nll", "reference" if "ratio" in row.compares else ""}
    unread = {"nll", "reference", *(flag for row in LOSSES.values() for flag in row.flags)} - read
    refuse_unread(config, dict.fromkeys(sorted(unread), f"--loss={config.loss} does not read it"))
    if config.steps:
        refuse_unread(config, {"epochs": f"--steps={config.steps} says how long to train"})


# --------------------------------------------------------------------------------------------------
# Items: (Chat, Chat), the chosen and the rejected completion to a prompt. For kto: the completion
# that was judged, and the same prompt with another prompt's completion, used only to estimate z.


def completion_lengths(items):
    """fp32 [n, 2]: the tokens of both completions."""
    return torch.tensor([[side.loss_mask.sum() for side in sides] for sides in items], dtype=torch.float32)


def item_logps(model, items):
    """fp32 [P, 2]: log pi of both completions, end of turn included, given their prompts."""
    return completion_logprob_sums(model, [side for item in items for side in item]).view(-1, 2)


@torch.no_grad()
def all_logps(model, items, micro_batch_tokens):
    """fp32 [n, 2] on the CPU: `item_logps` without gradients. Each rank reads its share."""
    logps = torch.zeros(len(items), 2, device=model.embed.device)  # 0 where another rank reads
    for part in micro_batches(model, item_lengths(items), micro_batch_tokens):
        logps[part] = item_logps(model, items[part])
    return torch.tensor(reduce_sum(*logps.flatten().tolist())).view(-1, 2)


# --------------------------------------------------------------------------------------------------
# One step


def item_losses(model, items, label_probs, ref_logps, kl, config):
    """(losses [P], compared [P, 2], differences [P]) of some items: what the loss compares of the
    two sides, and by how much the first exceeds the second.

    label_probs [P]; ref_logps [P, 2], of both sides; kl: kto's z, None for the other losses."""
    row, device = LOSSES[config.loss], model.embed.device
    label_probs, ref_logps = to_device(label_probs, device), to_device(ref_logps, device)
    if config.loss == "kto":
        return kto_item_losses(model, items, label_probs > 0.5, ref_logps[:, 0], kl, config)
    lengths = to_device(completion_lengths(items), device)
    logps = item_logps(model, items)  # [P, 2]
    compared = logps - ref_logps if "ratio" in row.compares else logps
    if row.compares.startswith("mean"):
        compared = compared / lengths
    chosen, rejected = compared.unbind(1)
    flags = {flag: vars(config)[flag] for flag in row.flags}
    losses = row.function(chosen, rejected, config.beta, label_probs, **flags)
    losses = losses - config.nll * (logps[:, 0] / lengths[:, 0])
    return losses, compared.detach(), (chosen - rejected).detach()


def kto_item_losses(model, items, is_good, ref_logps, kl, config):
    """The same for kto. compared: the logratio, in column 0 if good and 1 if bad, else 0."""
    logratio = completion_logprob_sums(model, [completion for completion, _ in items]) - ref_logps
    losses = kto_loss(logratio, is_good, kl, config.beta, config.desirable, config.undesirable)
    compared = logratio.detach()[:, None] * torch.stack([is_good, ~is_good], dim=1)
    return losses, compared, logratio.detach() - kl


@torch.no_grad()
def measure_kl(model, items, ref_logps, micro_batch_tokens):
    """kto's z: max(0, mean logratio of the batch's completions to other prompts), section 4.1."""
    total = 0.0
    for part in micro_batches(model, item_lengths(items), micro_batch_tokens):
        logps = completion_logprob_sums(model, [other for _, other in items[part]])
        total += (logps - ref_logps[part, 1].to(logps.device)).sum()
    return max(0.0, reduce_sum(total)[0] / len(items))


def run_batch(model, items, label_probs, ref_logps, config):
    """Means over a batch on all ranks: {"loss", "chosen_...", "rejected_...": what the loss
    compares, of the sides that the batch has, "accuracy"}. Adds up the gradient if enabled."""
    kl = measure_kl(model, items, ref_logps, config.micro_batch_tokens) if config.loss == "kto" else None
    sums = torch.zeros(3, device=model.embed.device)  # of the losses and of both sides
    differences = torch.zeros(len(items), device=model.embed.device)
    for part in micro_batches(model, item_lengths(items), config.micro_batch_tokens):
        some, some_labels, some_ref_logps = items[part], label_probs[part], ref_logps[part]
        losses, compared, differences[part] = item_losses(model, some, some_labels, some_ref_logps, kl, config)
        loss = losses.sum() / len(items)  # the batch's count, so that no split changes the gradient
        if torch.is_grad_enabled():
            loss.backward()
        sums += torch.stack([loss.detach(), *compared.sum(0)])
    loss, chosen, rejected, *differences = reduce_sum(*sums.tolist(), *differences.tolist())
    n_chosen = n_rejected = len(items)
    if config.loss == "kto":  # an item is on one side only
        n_chosen, n_rejected = (label_probs > 0.5).sum().item(), (label_probs <= 0.5).sum().item()
    sides = {"chosen": (chosen, n_chosen), "rejected": (rejected, n_rejected)}
    means = {f"{side}_{LOSSES[config.loss].compares}": total / n for side, (total, n) in sides.items() if n}
    return {"loss": loss, **means, "accuracy": agreement(np.array(differences), label_probs).mean()}


def main(config):
    check_flags(config)
    row = LOSSES[config.loss]
    config.beta = config.beta or row.beta
    run = Run("dpo", config)

    # 1. Policy and pairs
    model, tok = run.load()
    read_items = kto.read_items if config.loss == "kto" else chat.read_items
    train, label_probs, val, val_label_probs, hashes = read_items(config, tok, run.context(model))
    chat.audit(tok, [first for first, _ in train], config.data)
    order = index_order(len(train), config.seed)
    steps, epochs = order.plan(config.batch_size, config.epochs, config.steps)
    lr = config.lr or 2e-4 * (128 / model.config.width) ** 2
    optimizer = Optimizer(model, lr, weight_decay=config.weight_decay)
    # 2. The reference's log-probabilities, once: it never changes
    ref_logps, val_ref_logps = torch.zeros(len(train), 2), torch.zeros(len(val), 2)
    if "ratio" in row.compares:
        reference = run.load_reference(model, tok)
        used = order.first_items(steps * config.batch_size)
        ref_logps[used] = all_logps(reference, [train[i] for i in used], config.micro_batch_tokens)
        val_ref_logps = all_logps(reference, val, config.micro_batch_tokens)
        del reference

    # bookkeeping: memory, what is saved and resumed
    check_memory(run, model, optimizer, train)
    if config.compile:
        model.compile()
    if config.loss != "kto":
        chosen, rejected = completion_lengths(train).unbind(1)
        longer = (chosen - rejected).mean()
        print0(f"{len(train):,} pairs, chosen completions {longer:+.1f} tokens longer")
    print0(f"{steps} steps of {config.batch_size}: {epochs:.2f} epochs; peak lr {lr:.3g}")
    data = hashes | fingerprints(config.reference)
    run.begin(steps, model, data=data, saved={"optimizer": optimizer, "order": order})
    if "ratio" not in row.compares and not run.resumed:
        validate(run, 0, model, val, val_label_probs, val_ref_logps)

    for step in run.steps():
        # 3. Learn from a batch of pairs
        model.train()
        batch = order.epoch_batch(config.batch_size)
        items = [train[i] for i in batch]
        means = run_batch(model, items, label_probs[batch], ref_logps[batch], config)
        lr_scale = wsd(step - 1, steps, warmup=int(config.warmup * steps), decay=steps)
        grad_norm = optimizer.step(lr_scale, config.max_grad_norm)
        sides = [side for item in items for side in item]
        run.require_finite(step, means["loss"], [grad_norm], sides)
        there = [side for side in ("chosen", "rejected") if f"{side}_{row.compares}" in means]
        rewards = {f"{side}_reward": config.beta * means[f"{side}_{row.compares}"] for side in there}
        if len(there) == 2:  # a batch of kto may lack a side
            rewards["margin"] = rewards["chosen_reward"] - rewards["rejected_reward"]
        rates = {"accuracy": means["accuracy"], "lr": lr * lr_scale, "grad_norm": grad_norm.item()}
        run.log(step, model, [len(side.ids) for side in sides], loss=means["loss"], **rewards, **rates)

        # 4. Validate, save
        if run.eval_due(step):
            validate(run, step, model, val, val_label_probs, val_ref_logps)
        run.end_step(step, model, tok)


@torch.no_grad()
def validate(run, step, model, *val):
    """Log the held-out means, but not at step 0; warn, once, if chosen ones became less likely."""
    row, config = LOSSES[run.config.loss], run.config
    means = run_batch(model.eval(), *val, config)
    if step:
        run.validated(step, {"val_loss": means.pop("loss"), **means})
    now, has_reference = means.get(f"chosen_{row.compares}", 0.0), "ratio" in row.compares
    if now < run.first_step_stats.setdefault("chosen", 0.0 if has_reference else now):
        before = "in the reference" if has_reference else "before the first step"
        remedy = row.instead_of_nll or f"--nll={config.nll + 1:g}"
        run.warn_once("chosen", f"chosen completions are less likely than {before}; {remedy} keeps them up")


def check_memory(run, model, optimizer, items):
    """The memory plan of a step; see runtime/memory.py."""
    config, lengths = run.config, item_lengths(items)

    def loss(model, items):
        return item_losses(model, items, torch.ones(len(items)), torch.zeros(len(items), 2), 0.0, config)[0].sum()

    step_tokens = memory.likely_tokens(lengths, config.batch_size)
    memory.check(run, [(model, optimizer, loss)], items, lengths, step_tokens, batch_flag="batch_size")


if __name__ == "__main__":
    launch(main, Config)
