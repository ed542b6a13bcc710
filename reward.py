"""Sharpen: the reward model, which learns from pairs of completions how much people would like one.

    minimise  -mean log sigmoid(r(x, chosen) - r(x, rejected))

(Bradley & Terry 1952; Stiennon et al. 2020, arXiv 2009.01325, eq. 1). The trunk is the fine-tuned
model's. A scalar head takes the place of its output head and is read at the end-of-turn token that
closes a completion: there the model has seen the whole completion, and that it has ended.

The loss fixes only differences of scores, so the scores are centred afterwards: completions of the
model it starts from score 0 on average. feinschliff.json has their mean as "center", which is to be
subtracted; this gives a penalty or a reward of 1 its meaning in PPO. A second epoch over noisy
labels overfits at real size, so one is the default. Left out: rankings of more than two completions
(write them as pairs), ensembles.

    python reward.py --init=out/sft --data=pairs.jsonl --out=out/rm
    torchrun --nproc_per_node=8 reward.py --init=out/sft --data=pairs.jsonl --out=out/rm
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import chat, rows
from data.pack import Chat, item_lengths, pack, to_device
from figures import agreement, preference_figures, table
from model import GPT, score
from optim import Optimizer, wsd
from rollout import sample_completions
from runtime import checkpoint, memory
from runtime.batches import index_order, micro_batches
from runtime.cli import print0, refuse_unread
from runtime.process import launch, reduce_sum, world_size
from runtime.run import Run, RunConfig
from scoring import reward_scores


@dataclass(kw_only=True)
class Config(RunConfig):
    # -- What you will set --
    # checkpoint to start from: a run of sft.py, or a reward model to train further
    init: str
    # preferences {"prompt", "chosen", "rejected"}: .jsonl, .parquet or hf:NAME, comma-separated,
    # with or without :WEIGHT (formats: data/rows.py)
    data: str
    # -- What you may set --
    # preferences to validate on; "": hold out some of --data
    val: str = ""
    # share of --data to hold out [> 0; < 1]
    val_fraction: float = 0.05
    # how often each pair is seen [> 0; <= 10000]
    epochs: float = 1.0
    # optimizer steps; 0: as many as --epochs takes [<= 1000000]
    steps: int = 0
    # pairs per optimizer step, over all ranks [>= 1]
    batch_size: int = 64
    # peak learning rate of AdamW; 0: 1e-3 (128 / width)^1.5, fitted on the embedded world
    # at width 128 and extrapolated to others [>= 0]
    lr: float = 0.0
    # by how much the chosen completion's score is to lead (Llama 2, arXiv 2307.09288, eq. 2) [>= 0]
    margin: float = 0.0
    # share of the labels to take for wrong [>= 0; < 0.5]
    smoothing: float = 0.0
    # longest prompt with completion in tokens, longer pairs are dropped; 0: the model's
    context: int = 0
    # drop bad lines of the data, and count them
    skip_bad: bool = False
    # -- What you will rarely set --
    # completions of --init, to prompts of the data, whose mean score is to be 0 [>= 1]
    center_samples: int = 256
    # longest of these completions, in tokens [>= 1]
    max_new_tokens: int = 256
    # share of the steps over which the learning rate rises; after that it falls to 0 [>= 0; <= 1]
    warmup: float = 0.05
    # decay of the matrices [>= 0]
    weight_decay: float = 0.01
    # torch.compile the model [may change on resume]
    compile: bool = False


# --------------------------------------------------------------------------------------------------
# The algorithm. Items are pairs (chosen Chat, rejected Chat), P of them.


def preference_loss(margins, label_probs, margin=0.0, smoothing=0.0):
    """-log of the probability that Bradley and Terry's model gives the label, fp32 [P].

    margins [P]: score of the chosen minus score of the rejected completion. label_probs [P]: the
    probability that the label is right, 1 for a plain label. A label that may be wrong counts for
    both orders, each with its probability.
    """
    label_probs = label_probs * (1 - smoothing) + (1 - label_probs) * smoothing
    return -label_probs * F.logsigmoid(margins - margin) - (1 - label_probs) * F.logsigmoid(-margins - margin)


def with_scalar_head(model, seed):
    """The model's trunk under a fresh scalar head, drawn from N(0, 1/(C+1)); a reward model as it
    is."""
    if model.config.scalar_head:
        return model
    reward_model = GPT(dataclasses.replace(model.config, scalar_head=True)).init_weights(seed)
    trunk = {name: p for name, p in model.state_dict().items() if name != "untied_head"}
    reward_model.load_state_dict(trunk, strict=False)
    return reward_model.to(model.embed.device)


def score_margins(model, items):
    """fp32 [P]: score of the chosen minus score of the rejected completion, both in one pack."""
    p = pack([side.ids for item in items for side in item])
    scores = score(model, p.to(model.embed.device))  # [2P]
    return scores[::2] - scores[1::2]


def run_batch(model, items, label_probs, micro_batch_tokens, margin=0.0, smoothing=0.0):
    """(mean loss, margins float64 [P] on the CPU) of a batch, which the ranks share. With gradients
    enabled, adds up the gradient of this rank's part."""
    total, found = torch.zeros((), device=model.embed.device), torch.zeros(len(items), device=model.embed.device)
    label_probs = to_device(label_probs, model.embed.device)
    for part in micro_batches(model, item_lengths(items), micro_batch_tokens):
        margins = score_margins(model, items[part])
        losses = preference_loss(margins, label_probs[part].to(margins), margin, smoothing)
        loss = losses.sum() / len(items)  # the batch's count, so that no split changes the gradient
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
        found[part] = margins.detach()
    loss, *margins = reduce_sum(total, *found.tolist())
    return loss, np.array(margins)


def main(config):
    if config.steps:
        refuse_unread(config, {"epochs": f"--steps={config.steps} says how long to train"})
    run = Run("reward", config)

    # 1. Pairs, and the fine-tuned model
    init_model, tok, _ = checkpoint.read(run.init_checkpoint, run.device)
    train_pairs, train, val_pairs, val, hashes = chat.read_pairs(config, tok, run.context(init_model))
    label_probs = torch.tensor([pair.probability for pair in train_pairs])
    read_at = [Chat(side.ids, np.arange(len(side.ids)) == len(side.ids) - 1) for side, _ in train]
    chat.audit(tok, read_at, f"{config.data}, the chosen sides", "read for the score")

    # 2. The reward model: its trunk under a new head
    model = checkpoint.read(run.resumed, run.device)[0] if run.resumed else with_scalar_head(init_model, config.seed)
    model.checkpoint_activations = config.checkpoint_activations
    lr = config.lr or 1e-3 * (128 / model.config.width) ** 1.5
    optimizer = Optimizer(model, lr, weight_decay=config.weight_decay)
    conversations = [pair.prompt for pair in rows.random_rows(train_pairs, config.center_samples, config.seed)]
    if init_model.config.scalar_head:
        conversations = []  # a reward model writes nothing
    check_memory(run, model, optimizer, train, [len(chat.encode_prompt(tok, c)) for c in conversations])

    # 3. Completions that are to score 0 on average; without them the center stays
    center = run.info.get("center", 0.0)
    options = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    prompts, samples, _ = sample_completions(init_model, tok, conversations, **options)
    typical = [prompts[s.prompt_index] + s.tokens for s in samples]
    del init_model  # as large as the reward model

    # bookkeeping: what is saved and resumed
    if config.compile:
        model.compile()
    order = index_order(len(train), config.seed)
    steps, epochs = order.plan(config.batch_size, config.epochs, config.steps)
    print0(f"{len(train):,} pairs; {steps} steps of {config.batch_size}: {epochs:.2f} epochs; peak lr {lr:.3g}")
    run.begin(steps, model, data=hashes, saved={"optimizer": optimizer, "order": order})
    if samples:
        run.warn_of_cut(sum(s.finished for s in samples) / len(samples))

    for step in run.steps():
        # 4. Learn from a batch of pairs
        model.train()
        batch = order.epoch_batch(config.batch_size)
        items, regularisers = [train[i] for i in batch], (config.margin, config.smoothing)
        loss, margins = run_batch(model, items, label_probs[batch], config.micro_batch_tokens, *regularisers)
        lr_scale = wsd(step - 1, steps, warmup=int(config.warmup * steps), decay=steps)
        grad_norm = optimizer.step(lr_scale, config.max_grad_norm)
        sides = [side for item in items for side in item]
        run.require_finite(step, loss, [grad_norm], sides)
        rates = {"lr": lr * lr_scale, "grad_norm": grad_norm.item()}
        rates["accuracy"] = agreement(margins, label_probs[batch].numpy()).mean()
        run.log(step, model, [len(side.ids) for side in sides], loss=loss, **rates)

        # 5. Validate, centre, save
        if run.eval_due(step):
            validate(run, step, model, val_pairs, val)
        if typical and run.save_due(step):
            model.eval()
            center = float(reward_scores(model, typical, config.micro_batch_tokens).mean())
        run.end_step(step, model, tok, center=center)


@torch.no_grad()
def validate(run, step, model, pairs, items):
    """Log the loss and accuracy on held-out pairs; at the last step print figures with intervals as
    well."""
    model.eval()
    config, label_probs = run.config, torch.tensor([pair.probability for pair in pairs])
    loss, margins = run_batch(model, items, label_probs, config.micro_batch_tokens, config.margin, config.smoothing)
    accuracy = agreement(margins, label_probs.numpy()).mean()
    text = f"{loss:.4f} per pair, {accuracy:.1%} of {len(items)} pairs ordered as labelled"
    run.validated(step, {"val_loss": loss, "accuracy": accuracy}, text=text)
    if step == run.total_steps:
        lengths = [[side.loss_mask.sum() for side in item] for item in items]
        figures = preference_figures(pairs, margins, lengths, config.seed)
        run.metrics["figures"] = figures  # saved, not logged
        print0(f"\nheld-out pairs, with 95 % intervals\n{table(figures)}\n")


def check_memory(run, model, optimizer, items, prompt_lengths):
    """The memory plan of a step, and of sampling, which every rank does alone; see
    runtime/memory.py."""
    config, lengths = run.config, item_lengths(items)

    def loss(model, items):
        return preference_loss(score_margins(model, items), 1.0).sum()

    step_tokens = memory.likely_tokens(lengths, config.batch_size)
    sampled = {"prompt_lengths": prompt_lengths, "completions": len(prompt_lengths) * world_size()}
    memory.check(run, [(model, optimizer, loss)], items, lengths, step_tokens, **sampled)


if __name__ == "__main__":
    launch(main, Config)
