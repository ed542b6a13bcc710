"""Sharpen: learning from preferences without a reward model or sampling (DPO), and its siblings.

    minimise  -mean log sigmoid(beta [(log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))])

The reference is the model at the start, frozen; its log-probabilities are constants, so they are computed once and kept (`--ref_cache`). log p sums over an
answer's tokens, its end of turn included. --loss chooses among

    dpo    as above (Rafailov et al. 2023, arXiv 2305.18290)         cdpo   labels may be wrong                   (Mitchell 2023)
    ipo    margins are led to 1/(2 beta), no further (2310.12036)    simpo  no reference, by mean log p           (2405.14734)
    orpo   no reference, with its own NLL            (2403.07691)    kto    single answers, good or bad           (2402.01306)

DPO often makes chosen answers *less* likely, rejected ones only more so: the log shows both, a warning says so, --nll holds them up (2404.19733).
Left out: online variants; sample from the model, label with rlaif.py or a reward model, and run this again.

    python dpo.py --init=out/sft --data=pairs.jsonl --loss=dpo --out=out/dpo
    torchrun --nproc_per_node=8 dpo.py --init=out/sft --data=pairs.jsonl --out=out/dpo
"""
import hashlib, json, os, sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

import checkpoint, memory
from common import UserError, check, describe, launch, rank, reduce_sum, world_size
from data import chat, corpus, tokenizer
from data.chat import learnt_logprobs, pack_chats
from data.pack import share, split
from optim import Optimizer, wsd


@dataclass
class Config:
    init: str  # checkpoint to start from: a run of sft.py
    data: str  # preferences {"prompt", "chosen", "rejected"}; for kto also {"prompt", "completion", "label"}: .jsonl, .parquet or hf:NAME (see data/chat.py)
    out: str  # directory of the run
    loss: str = "dpo"  # dpo, cdpo, ipo, simpo, orpo or kto
    val: str = ""  # preferences to validate on; "": hold some of --data out
    val_fraction: float = 0.05  # how many to hold out
    reference: str = ""  # checkpoint that the policy is held to; "": --init
    ref_cache: str = ""  # directory that keeps the reference's log-probabilities, for other runs too; "": the run's own
    beta: float = 0.0  # how closely it is held, or simpo's and orpo's scale; 0: 0.1, simpo 2, orpo 0.1
    smoothing: float = 0.0  # cdpo: how many of the labels to take for wrong; 0: 0.1
    gamma: float = 0.0  # simpo: by how much the chosen side is to lead
    desirable: float = 1.0  # kto: weight of good answers
    undesirable: float = 1.0  # kto: weight of bad ones
    nll: float = 0.0  # weight of -log p(chosen) per token, added to dpo, cdpo, ipo or simpo
    epochs: float = 1.0  # times each pair is seen
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    batch: int = 64  # pairs (kto: answers) an optimizer step, over all ranks
    micro_tokens: int = 16384  # tokens a rank holds at once: memory, not the result, depends on it
    checkpoint_activations: bool = False  # keep each block's input only, and compute the block again in the backward: less memory, more time, the same result
    context: int = 0  # longest prompt and answer, in tokens; pairs with a longer one are left out and counted; 0: the model's
    lr: float = 0.0  # peak rate of AdamW; 0: 2e-4 (128 / width)^2
    warmup: float = 0.1  # first share of the steps, over which the rate rises; after that it falls to 0
    weight_decay: float = 0.0  # of the matrices
    clip: float = 1.0  # largest gradient norm let through; 0: any
    skip_bad: bool = False  # leave bad lines of the data out, and count them
    seed: int = 0  # of the order of the data and what is held out
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    compile: bool = False  # torch.compile the model
    print_every: int = 1  # steps between lines on the terminal; log.jsonl has every step
    eval_every: int = 50  # steps between validations (there is one at the end); 0: none between
    save_every: int = 500  # steps between checkpoints (there is one at the end); 0: none between
    keep_last: int = 2  # checkpoints kept, besides the best
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out


FREE = {"out", "resume", "overwrite", "device", "compile", "micro_tokens", "checkpoint_activations", "print_every", "eval_every", "save_every", "keep_last", "ref_cache"}
BETA = {"dpo": 0.1, "cdpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
ONLY_FOR = {"smoothing": {"cdpo"}, "gamma": {"simpo"}, "desirable": {"kto"}, "undesirable": {"kto"}, "nll": {"dpo", "cdpo", "ipo", "simpo"},
            "reference": {"dpo", "cdpo", "ipo", "kto"}, "ref_cache": {"dpo", "cdpo", "ipo", "kto"}}  # fmt: skip


def check_flags(config):
    """UserError for a value that has the right type and no meaning, and for a flag that the chosen loss does not have."""
    if config.loss not in BETA:
        raise UserError(f"--loss={config.loss}: expected one of {', '.join(BETA)}")
    for name, losses in ONLY_FOR.items():
        if vars(config)[name] != getattr(Config, name) and config.loss not in losses:
            raise UserError(f"--{name}: --loss={config.loss} does not have it, only {', '.join(sorted(losses))}")
    finite = {name: 0 <= vars(config)[name] < float("inf") for name in ("beta", "gamma", "desirable", "undesirable", "nll", "lr", "weight_decay", "clip")}
    good = {**finite, "val_fraction": 0 < config.val_fraction < 1, "smoothing": 0 <= config.smoothing <= 0.5, "epochs": 0 < config.epochs < float("inf"),
            "batch": config.batch > 0, "warmup": 0 <= config.warmup <= 1, "keep_last": config.keep_last > 0, "print_every": config.print_every > 0,
            }  # fmt: skip
    check(config, good)


# ---------------------------------------------------------------------------------------------------------------------------------
# The losses, one value a pair: fp32 [P]. logp: an answer's log-probability; a ratio: logp less the reference's; probability: that the label is right.


def dpo_loss(ratio_chosen, ratio_rejected, beta, probability=1.0):
    """-p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h) with h the difference of the ratios: arXiv 2305.18290, eq. 7, where p = 1."""
    h = beta * (ratio_chosen - ratio_rejected)
    return -probability * F.logsigmoid(h) - (1 - probability) * F.logsigmoid(-h)


def cdpo_loss(ratio_chosen, ratio_rejected, beta, smoothing, probability=1.0):
    """Conservative DPO: a label is wrong with probability `smoothing` (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3)."""
    return dpo_loss(ratio_chosen, ratio_rejected, beta, probability * (1 - smoothing) + (1 - probability) * smoothing)


def ipo_loss(ratio_chosen, ratio_rejected, beta, probability=1.0):
    """(h - (p - 1/2) / beta)^2, of ratios *per token* (so its authors, in TRL): arXiv 2310.12036, eq. 17, where p = 1 and the aim is 1/(2 beta)."""
    return (ratio_chosen - ratio_rejected - (probability - 0.5) / beta) ** 2


def simpo_loss(mean_chosen, mean_rejected, beta, gamma, probability=1.0):
    """-log sigmoid(beta (mean logp of the chosen - that of the rejected) - gamma): arXiv 2405.14734, eq. 6. A doubtful label counts for both orders."""
    h = beta * (mean_chosen - mean_rejected)
    return -probability * F.logsigmoid(h - gamma) - (1 - probability) * F.logsigmoid(-h - gamma)


def orpo_loss(mean_chosen, mean_rejected, beta, probability=1.0):
    """-mean logp(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = P/(1 - P), log P the mean logp: arXiv 2403.07691, eq. 6 and 7."""
    log_odds = lambda mean: mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6)))  # noqa: E731  log(1 - e^mean), where mean is near 0 as well
    return -mean_chosen + beta * dpo_loss(log_odds(mean_chosen), log_odds(mean_rejected), 1.0, probability)


def kto_loss(ratio, label, baseline, beta, desirable=1.0, undesirable=1.0):
    """w (1 - sigmoid(beta (ratio - z))) of a good answer, w (1 - sigmoid(beta (z - ratio))) of a bad one: arXiv 2402.01306, eq. 8.

    label [P]: True for good; baseline: z, an estimate of KL(policy || reference), no gradient (`kto_baseline`).
    """
    value = torch.sigmoid(beta * torch.where(label, ratio - baseline, baseline - ratio))
    return torch.where(label, desirable, undesirable) * (1 - value)


def kto_baseline(mismatched_ratio_sum, n):
    """z = max(0, mean ratio of answers to other prompts) over the whole optimizer batch of n: arXiv 2402.01306, section 4.1."""
    return max(0.0, mismatched_ratio_sum / n)


def pair_loss(config, logp, ref_logp, lengths, probability):
    """fp32 [P]: the --loss of pairs. logp, ref_logp [P, 2]: of the chosen and the rejected answer; lengths [P, 2]: their tokens."""
    ratio, mean = logp - ref_logp, logp / lengths
    loss = {
        "dpo": lambda: dpo_loss(*ratio.unbind(1), config.beta, probability),
        "cdpo": lambda: cdpo_loss(*ratio.unbind(1), config.beta, config.smoothing, probability),
        "ipo": lambda: ipo_loss(*(ratio / lengths).unbind(1), config.beta, probability),
        "simpo": lambda: simpo_loss(*mean.unbind(1), config.beta, config.gamma, probability),
        "orpo": lambda: orpo_loss(*mean.unbind(1), config.beta, probability),
    }[config.loss]()
    return loss - config.nll * mean[:, 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# Log-probabilities of answers


def answer_logps(model, chats):
    """fp32 [D]: the log-probability of each conversation's learnt tokens, the answer and its end of turn, given what comes before."""
    ends = torch.tensor(np.cumsum([0, *(c.learnt.sum() for c in chats)]), device=model.embed.device)
    return torch.segment_reduce(learnt_logprobs(model, chats), "sum", offsets=ends)


@torch.no_grad()
def all_logps(model, items, micro_tokens):
    """fp32 [n, 2] on the CPU: `answer_logps` of both sides of each item, in evaluation; the ranks share the work."""
    model.eval()
    lengths = [len(a.ids) + len(b.ids) for a, b in items]
    begin, end = share(lengths, rank(), world_size())
    found = torch.zeros(len(items), 2)
    for first, last in split(lengths[begin:end], micro_tokens):
        part = slice(begin + first, begin + last)
        found[part] = answer_logps(model, [side for item in items[part] for side in item]).view(-1, 2).cpu()
    if world_size() > 1:
        found = torch.tensor(reduce_sum(*found.flatten())).view(-1, 2).float()
    return found


def digest(found):
    """uint8 [32]: the SHA-256 of {split: log-probabilities}."""
    return torch.tensor(list(hashlib.sha256(b"".join(found[name].numpy().tobytes() for name in sorted(found))).digest()), dtype=torch.uint8)


def kept_logps(cache, splits):
    """{split: fp32 [n, 2]} that `reference_logps` left in this file; None where there is none or, with a warning, where it is damaged."""
    if not cache.exists():
        return None
    try:
        with checkpoint.open_tensors(cache) as f:
            found, written = {name: f.get_tensor(name) for name in splits}, f.get_tensor("sha256")
        if torch.equal(digest(found), written):
            return found
        wrong = f"{cache}: not what was written (its SHA-256 differs)"
    except UserError as e:
        wrong = e
    if rank() == 0:
        print(f"warning: {wrong}; the reference is asked again", file=sys.stderr)
    return None


def reference_logps(config, run, tok, data, splits, device):
    """{split: fp32 [n, 2]}: the reference's `all_logps`, from the cache where it has those of this reference for these tokens, else computed and kept there."""
    folder = checkpoint.find(config.reference) if config.reference else run.origin()
    weights = checkpoint.fingerprint(folder)
    if config.reference:
        data[config.reference] = weights  # a run goes on with the reference it began with
    items = hashlib.sha256(b"".join(side.ids.tobytes() + side.learnt.tobytes() for split_items in splits.values() for item in split_items for side in item))
    sizes = {name: len(split_items) for name, split_items in splits.items()}
    key = hashlib.sha256(json.dumps([weights, sizes, items.hexdigest(), device.type], sort_keys=True).encode()).hexdigest()  # a GPU counts in another precision
    cache = Path(config.ref_cache or run.path) / f"reference_{key[:16]}.safetensors"
    found = kept_logps(cache, splits)
    if not reduce_sum(found is None)[0]:  # all ranks or none: another run may have written it between the looks of two
        if rank() == 0:
            print(f"the reference's log-probabilities are those of {cache}")
        return found
    model, their_tok, _ = checkpoint.read(folder, device)
    if model.config.scalar_head:
        raise UserError(f"--reference={config.reference}: a reward model, which gives no probabilities")
    if tokenizer.fingerprint(their_tok) != tokenizer.fingerprint(tok):
        raise UserError(f"--reference={config.reference}: it has another tokenizer than --init, so their probabilities cannot be compared")
    found = {name: all_logps(model, split_items, config.micro_tokens) for name, split_items in splits.items()}
    if rank() == 0:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}")  # two runs may share a cache
            safetensors.torch.save_file(found | {"sha256": digest(found)}, temporary)
            temporary.replace(cache)
        except (OSError, safetensors.SafetensorError) as e:
            raise UserError(f"{cache}: {e}; --ref_cache names another directory for it") from None
    return found


# ---------------------------------------------------------------------------------------------------------------------------------
# Items: two conversations each. Of a preference, the chosen and the rejected answer; for kto, an answer to its prompt and to another row's.


def answered(tok, messages, text):
    """The conversation with this answer, of which the answer is learnt and no earlier one."""
    return chat.answered(chat.encode_prompt(tok, messages), chat.encode_answer(tok, text))


def read_items(tok, rows, kto):
    """[(Chat, Chat), ...] and what is known of each: float64 [n], the probability that the chosen one is preferred, or kto's label as 1 or 0."""
    if not kto:
        return [(answered(tok, r.prompt, r.chosen), answered(tok, r.prompt, r.rejected)) for r in rows], [r.probability for r in rows]
    single = [one for row in rows for one in row]
    other = single[2:] + single[:2]  # two on, for the neighbours of a preference share their prompt
    return [(answered(tok, m, text), answered(tok, m, other_text)) for (m, text, _), (_, other_text, _) in zip(single, other)], [float(label) for *_, label in single]


def fit(items, known, limit, what):
    """(items, known as a tensor) of at most `limit` tokens: a cut answer would have lost its end. Says how many were left out."""
    kept = [i for i, sides in enumerate(items) if max(len(side.ids) for side in sides) <= limit]
    if rank() == 0 and len(kept) < len(items):
        print(f"{what}: {len(items) - len(kept)} of {len(items)} pairs left out, a side of which is longer than {limit} tokens")
    if not kept:
        raise UserError(f"{what}: no pair fits into {limit} tokens; give a larger --context if the model reaches further")
    return [items[i] for i in kept], torch.tensor([known[i] for i in kept], dtype=torch.float32)


def answer_lengths(items):
    """fp32 [n, 2]: the learnt tokens of both sides."""
    return torch.tensor([[side.learnt.sum() for side in sides] for sides in items], dtype=torch.float32)


def train_step(model, items, known, ref_logps, config):
    """Add up the gradient of the mean loss over a batch of items, of which this rank takes its share.

    known [P] and ref_logps [P, 2] belong to the items. Returns this rank's share of (loss, mean logp - reference's of the first and of the second side,
    how often the first leads).
    """
    model.train()
    device, lengths = model.embed.device, [len(a.ids) + len(b.ids) for a, b in items]
    begin, end = share(lengths, rank(), world_size())
    parts = [slice(begin + first, begin + last) for first, last in split(lengths[begin:end], config.micro_tokens)]
    total, baseline = torch.zeros(4, device=device), 0.0
    if config.loss == "kto":  # the baseline is one number for the whole batch, so it comes first
        with torch.no_grad():
            ratios = [(answer_logps(model, [other for _, other in items[part]]) - ref_logps[part, 1].to(device)).sum() for part in parts]
        baseline = kto_baseline(reduce_sum(sum(ratios))[0], len(items))
    for part in parts:
        label, ref_logp = known[part].to(device), ref_logps[part].to(device)
        if config.loss == "kto":
            ratio = answer_logps(model, [answer for answer, _ in items[part]]) - ref_logp[:, 0]
            losses = kto_loss(ratio, label > 0.5, baseline, config.beta, config.desirable, config.undesirable)
            good = label > 0.5
            shown = [(ratio * good).sum() * 2, (ratio * ~good).sum() * 2, ((ratio > baseline) == good).sum()]  # twice: about half are good
        else:
            logp = answer_logps(model, [side for item in items[part] for side in item]).view(-1, 2)  # [P, 2]
            losses = pair_loss(config, logp, ref_logp, answer_lengths(items[part]).to(device), label)
            ratio = logp - ref_logp
            lead = ratio if config.loss in ("dpo", "cdpo", "ipo") else logp / answer_lengths(items[part]).to(device)
            shown = [ratio[:, 0].sum(), ratio[:, 1].sum(), (lead[:, 0] > lead[:, 1]).sum()]
        loss = losses.sum() / len(items)
        loss.backward()
        total += torch.stack([loss.detach(), *(s.detach() / len(items) for s in shown)])
    return total


def validate(model, items, known, ref_logps, config):
    """{"val_loss", "chosen_ratio", "rejected_ratio", "accuracy"} over held-out items; ratios in nats an answer, against the model at the start."""
    logp = all_logps(model, items, config.micro_tokens)
    ratio, lengths = logp - ref_logps, answer_lengths(items)
    if config.loss == "kto":
        good = known > 0.5
        baseline = kto_baseline(ratio[:, 1].sum().item(), len(items))
        losses = kto_loss(ratio[:, 0], good, baseline, config.beta, config.desirable, config.undesirable)
        mean = lambda which: ratio[which, 0].sum() / which.sum().clamp(min=1)  # noqa: E731  0 where there are none
        chosen, rejected, right = mean(good), mean(~good), ((ratio[:, 0] > baseline) == good).float().mean()
    else:
        losses = pair_loss(config, logp, ref_logps, lengths, known)
        lead = ratio if config.loss in ("dpo", "cdpo", "ipo") else logp / lengths
        chosen, rejected, right = ratio[:, 0].mean(), ratio[:, 1].mean(), (lead[:, 0] > lead[:, 1]).float().mean()
    return {"val_loss": losses.mean().item(), "chosen_ratio": chosen.item(), "rejected_ratio": rejected.item(), "accuracy": right.item()}


def main(config):
    check_flags(config)
    config.beta = config.beta or BETA[config.loss]
    config.smoothing = config.smoothing or (0.1 if config.loss == "cdpo" else 0.0)
    run = checkpoint.Run("dpo", config, FREE)
    device, kto = run.device, config.loss == "kto"

    # 1. Model, pairs, and what the reference says of them
    model, tok, _ = checkpoint.read(run.folder, device)
    if model.config.scalar_head:
        raise UserError(f"--init={config.init}: a reward model, which has no output head; start from the model it was trained from")
    model.checkpoint_activations = config.checkpoint_activations
    parse = chat.judged if kto else chat.preference
    train_rows, val_rows, data = chat.read_split(config, parse)
    context = run.context(model)
    train, known = fit(*read_items(tok, train_rows, kto), context, config.data)
    val, val_known = fit(*read_items(tok, val_rows, kto), context, config.val or "held out of it")
    chat.audit(tok, [first for first, _ in train], config.data)
    lengths, pairs = ([len(side.ids) for item in train for side in item], [len(a.ids) + len(b.ids) for a, b in train])
    walked = dict(longest=max(pairs), learnt=float(np.mean([side.learnt.mean() for item in train for side in item])), read_tokens=sum(pairs))
    memory.check(config, device, lambda c: memory.plan(c, device, [model.config], lengths, memory.drawn(pairs, c.batch), **walked), smaller="batch")
    start_logps = reference_logps(config, run, tok, data, {"train": train, "val": val}, device)

    # 2. Optimizer and order of the data, and on a resume all their state
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch))
    lr = config.lr or 2e-4 * (128 / model.config.width) ** 2
    optimizer = Optimizer(model, lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    order = corpus.Order(lambda random: (np.arange(len(train)), np.ones(len(train))), config.seed)
    if config.compile:
        model.compile()
    if rank() == 0:
        gap = (answer_lengths(train)[:, 0] - answer_lengths(train)[:, 1]).mean().item()
        print(f"{len(train):,} pairs; {steps} steps of {config.batch}; peak rate {lr:.3g}; " + ("" if kto else f"chosen answers are {gap:+.1f} tokens longer; ") + f"on {describe(device)['hardware']}")
    if run.resumed:
        run.check_same(data)
    counters = run.begin(steps, {"": optimizer}, data, sum(p.numel() for p in model.parameters()))
    warned = counters.get("warned", False)
    if run.resumed:
        order.begin(counters["epoch"], counters["index"])
    flops = model.flops_per_token(int(np.mean([len(side.ids) for item in train for side in item])))

    # 3. Train
    for step in range(run.start + 1, steps + 1):
        rate = wsd(step - 1, steps, int(config.warmup * steps), steps)
        batch = order.batch(config.batch)
        items = [train[i] for i in batch]
        totals = train_step(model, items, known[batch], start_logps["train"][batch], config)
        norm = optimizer.step(rate, config.clip)
        loss, chosen, rejected, accuracy = reduce_sum(*totals)
        if not norm.isfinite():
            p, targets = pack_chats([side for item in items for side in item])
            checkpoint.refuse_nonfinite(run.path, step, loss, {"tokens": p.tokens, "cu": p.cu, "targets": targets})
        rewards = {"chosen_reward": config.beta * chosen, "rejected_reward": config.beta * rejected, "margin": config.beta * (chosen - rejected)}
        run.log.step(step, sum(len(side.ids) for item in items for side in item), flops, device, loss=loss, **rewards, accuracy=accuracy, lr=lr * rate, grad_norm=norm.item())

        # 4. Validate, save
        leaving, metrics = run.stop.agreed(), {}
        if run.due(step, config.eval_every) or run.due(step, config.save_every):
            metrics = validate(model, val, val_known, start_logps["val"], config)
            text = f"{metrics['val_loss']:.4f}, {metrics['accuracy']:.1%} of {len(val)} right; log p less that at the start: chosen {metrics['chosen_ratio']:+.2f}, rejected {metrics['rejected_ratio']:+.2f} nats"
            run.validated(step, metrics, text)
            if metrics["chosen_ratio"] < 0 and not warned and rank() == 0:
                warned = True
                print(f"warning: chosen answers have become {-metrics['chosen_ratio']:.2f} nats less likely than they were; so it often goes, --nll=1, a larger --beta or a lower --lr hold them up")
        if run.due(step, config.save_every) or leaving:
            run.save(step, model, tok, optimizer.state(), {"epoch": order.epoch, "index": order.index, "warned": warned}, metrics)
        if leaving and step < steps:
            run.stop.leave(step)
        run.log.skip_time()


if __name__ == "__main__":
    launch(main, Config)
