"""Sharpen: the reward model, which learns from pairs of answers how much people would like one.

    minimise  -mean log sigmoid(r(x, chosen) - r(x, rejected))          (Bradley & Terry 1952; Stiennon et al. 2020, arXiv 2009.01325, eq. 1)

The trunk is the fine-tuned model's, its output head replaced by one number a token, read at the end-of-turn token that closes an answer: there the whole
answer has been seen, and that it has ended. Only differences of scores are learnt, so the scores are centred afterwards: answers of the model it starts from
score 0 on average ("center" in feinschliff.json, to be subtracted), which gives a penalty or a reward of 1 its meaning in PPO. A second epoch over
noisy labels overfits at real size; one is the default. Left out: rankings of more than two answers (write them as pairs), ensembles.

    python reward.py --init=out/sft --data=pairs.jsonl --out=out/rm
    torchrun --nproc_per_node=8 reward.py --init=out/sft --data=pairs.jsonl --out=out/rm
"""
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint, memory
from common import UserError, check, describe, launch, rank, reduce_sum, world_size
from data import chat, corpus
from data.chat import Chat
from data.pack import pack, share, split
from evaluate import pair_documents, preference_figures, show
from model import GPT, score
from optim import Optimizer, wsd
from rollout import answers, scores


@dataclass
class Config:
    init: str  # checkpoint to start from: a run of sft.py
    data: str  # preferences {"prompt", "chosen", "rejected"}: .jsonl, .parquet or hf:NAME, comma-separated, with or without :WEIGHT (see data/chat.py)
    out: str  # directory of the run
    val: str = ""  # preferences to validate on; "": hold some of --data out
    val_fraction: float = 0.05  # how many to hold out
    epochs: float = 1.0  # times each pair is seen
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    batch: int = 64  # pairs an optimizer step, over all ranks
    micro_tokens: int = 16384  # tokens a rank holds at once: memory, not the result, depends on it
    checkpoint_activations: bool = False  # keep each block's input only, and compute the block again in the backward: less memory, more time, the same result
    context: int = 0  # longest prompt and answer, in tokens; pairs with a longer one are left out and counted; 0: the model's
    lr: float = 0.0  # peak rate of AdamW; 0: 1e-3 (128 / width)^1.5
    warmup: float = 0.05  # first share of the steps, over which the rate rises; after that it falls to 0
    weight_decay: float = 0.01  # of the matrices
    clip: float = 1.0  # largest gradient norm let through; 0: any
    margin: float = 0.0  # by how much the chosen answer's score is to lead (Llama 2, arXiv 2307.09288, eq. 2)
    smoothing: float = 0.0  # how many of the labels to take for wrong
    center_samples: int = 256  # answers of --init, to prompts of the data, whose mean score is to be 0
    max_new: int = 256  # longest of these answers, in tokens
    skip_bad: bool = False  # leave bad lines of the data out, and count them
    seed: int = 0  # of the new head, the order of the data and what is held out
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    compile: bool = False  # torch.compile the model
    print_every: int = 1  # steps between lines on the terminal; log.jsonl has every step
    eval_every: int = 50  # steps between validations (there is one at the end); 0: none between
    save_every: int = 500  # steps between checkpoints (there is one at the end); 0: none between
    keep_last: int = 2  # checkpoints kept, besides the best
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out


FREE = {"out", "resume", "overwrite", "device", "compile", "micro_tokens", "checkpoint_activations", "print_every", "eval_every", "save_every", "keep_last"}


def check_flags(config):
    """UserError for a value that has the right type and no meaning."""
    good = {"val_fraction": 0 < config.val_fraction < 1, "epochs": 0 < config.epochs < float("inf"), "batch": config.batch > 0, "lr": 0 <= config.lr < float("inf"),
            "warmup": 0 <= config.warmup <= 1, "weight_decay": 0 <= config.weight_decay < float("inf"), "clip": 0 <= config.clip < float("inf"),
            "margin": 0 <= config.margin < float("inf"), "smoothing": 0 <= config.smoothing < 0.5, "center_samples": config.center_samples > 0,
            "keep_last": config.keep_last > 0, "print_every": config.print_every > 0, "max_new": config.max_new > 0,
            }  # fmt: skip
    check(config, good)


def preference_loss(lead, probability, margin=0.0, smoothing=0.0):
    """-log of the probability that Bradley and Terry's model gives the label, fp32 [P].

    lead [P]: score of the chosen less that of the rejected; probability [P]: that the label is right, 1 for a plain one. A label that may be wrong counts for
    both orders, each with its probability.
    """
    p = probability * (1 - smoothing) + (1 - probability) * smoothing
    return -p * F.logsigmoid(lead - margin) - (1 - p) * F.logsigmoid(-lead - margin)


def with_scalar_head(model, seed):
    """The model's trunk under a fresh scalar head, drawn from N(0, 1/(C+1)); a reward model as it is."""
    if model.config.scalar_head:
        return model
    new = GPT(dataclasses.replace(model.config, scalar_head=True)).init_weights(seed)
    new.load_state_dict({name: p for name, p in model.state_dict().items() if name != "untied_head"}, strict=False)
    return new


def leads(model, documents, pairs):
    """fp32 [P]: score of the chosen less that of the rejected answer, for `pairs`: indices into documents = (chosen, rejected). Both go through in one pack."""
    chosen, rejected = documents
    found = score(model, pack([side[i] for i in pairs for side in (chosen, rejected)]).to(model.embed.device))
    return found[::2] - found[1::2]


def train_step(model, documents, probability, batch, config):
    """Add up the gradient of the mean loss over the pairs `batch`, of which this rank takes its share. Returns its share of (loss, pairs ordered right)."""
    model.train()
    lengths = [len(documents[0][i]) + len(documents[1][i]) for i in batch]
    begin, end = share(lengths, rank(), world_size())
    total = torch.zeros(2, device=model.embed.device)
    for first, last in split(lengths[begin:end], config.micro_tokens):
        pairs = batch[begin + first : begin + last]
        lead = leads(model, documents, pairs)
        loss = preference_loss(lead, probability[pairs].to(lead), config.margin, config.smoothing).sum() / len(batch)
        loss.backward()
        total += torch.stack([loss.detach(), (lead.detach() > 0).sum() / len(batch)])
    return total


@torch.no_grad()
def all_leads(model, documents, micro_tokens):
    """float64 [P]: `leads` of all pairs, in evaluation. Every rank measures all of them: there are few."""
    model.eval()
    lengths = [len(c) + len(r) for c, r in zip(*documents)]
    return torch.cat([leads(model, documents, range(first, last)) for first, last in split(lengths, micro_tokens)]).cpu().double()


def fit(pairs, documents, limit, what):
    """(pairs, documents) of which both sides have at most `limit` tokens: a cut answer would have lost its end. Says how many were left out."""
    kept = [i for i, (c, r) in enumerate(zip(*documents)) if max(len(c), len(r)) <= limit]
    if rank() == 0 and len(kept) < len(pairs):
        print(f"{what}: {len(pairs) - len(kept)} of {len(pairs)} pairs left out, a side of which is longer than {limit} tokens")
    if not kept:
        raise UserError(f"{what}: no pair fits into {limit} tokens; give a larger --context if the model reaches further")
    return [pairs[i] for i in kept], tuple([side[i] for i in kept] for side in documents)


def main(config):
    check_flags(config)
    run = checkpoint.Run("reward", config, FREE)
    device = run.device

    # 1. Pairs, and the model: the fine-tuned one under a new head
    language_model, tok, info = checkpoint.read(run.origin())
    train_rows, val_rows, data = chat.read_split(config, chat.preference)
    context = run.context(language_model)
    train_rows, train = fit(train_rows, pair_documents(tok, train_rows), context, config.data)
    val_rows, val = fit(val_rows, pair_documents(tok, val_rows), context, config.val or "held out of it")
    probability, val_probability = (torch.tensor([p.probability for p in some]) for some in (train_rows, val_rows))
    read_at = [Chat(np.array(ids, dtype=np.int32), np.arange(len(ids)) == len(ids) - 1) for ids in train[0]]
    chat.audit(tok, read_at, f"{config.data}, the chosen sides", "read for the score")
    prompts = [p.prompt for p in train_rows if len(chat.encode_prompt(tok, p.prompt)) < context][: config.center_samples]
    pairs = [len(c) + len(r) for c, r in zip(*train)]
    asked = [len(chat.encode_prompt(tok, messages)) for messages in prompts]
    walked = dict(longest=max(pairs), read_tokens=sum(len(d) for side in val for d in side), samples=(min(128, len(asked)), max(asked, default=0) + config.max_new, max(asked, default=0)))
    shape = dataclasses.replace(language_model.config, scalar_head=True)
    memory.check(config, device, lambda c: memory.plan(c, device, [shape], [len(d) for side in train for d in side], memory.drawn(pairs, c.batch), **walked), smaller="batch")
    if language_model.config.scalar_head:
        typical, center = None, info.get("center", 0.0)  # goes on from a reward model, which writes no answers
    else:
        starts, samples, _ = answers(language_model.to(device), tok, prompts, max_new=config.max_new, seed=config.seed)
        typical = [starts[s.prompt_index] + s.tokens for s in samples]
    model = checkpoint.read(run.resumed)[0] if run.resumed else with_scalar_head(language_model, config.seed)
    model = model.to(device)
    del language_model  # as much memory as the reward model
    model.checkpoint_activations = config.checkpoint_activations

    # 2. Optimizer and order of the data, and on a resume all their state
    steps = config.steps or max(1, round(config.epochs * len(train_rows) / config.batch))
    lr = config.lr or 1e-3 * (128 / model.config.width) ** 1.5
    optimizer = Optimizer(model, lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    order = corpus.Order(lambda random: (np.arange(len(train_rows)), np.ones(len(train_rows))), config.seed)
    if config.compile:
        model.compile()
    if rank() == 0:
        print(f"{len(train_rows):,} pairs; {steps} steps of {config.batch}; peak rate {lr:.3g}; on {describe(device)['hardware']}")
    if run.resumed:
        run.check_same(data)
    counters = run.begin(steps, {"": optimizer}, data, sum(p.numel() for p in model.parameters()))
    if run.resumed:
        order.begin(counters["epoch"], counters["index"])
    flops = model.flops_per_token(int(np.mean([len(d) for side in train for d in side])))

    # 3. Train
    for step in range(run.start + 1, steps + 1):
        rate = wsd(step - 1, steps, int(config.warmup * steps), steps)
        batch = order.batch(config.batch)
        loss, right = train_step(model, train, probability, batch, config)
        norm = optimizer.step(rate, config.clip)
        loss, right = reduce_sum(loss, right)
        if not norm.isfinite():
            p = pack([side[i] for i in batch for side in train])
            checkpoint.refuse_nonfinite(run.path, step, loss, {"tokens": p.tokens, "cu": p.cu})
        run.log.step(step, sum(len(side[i]) for i in batch for side in train), flops, device, loss=loss, accuracy=right, lr=lr * rate, grad_norm=norm.item())

        # 4. Validate, centre, save
        leaving, metrics = run.stop.agreed(), {}
        if run.due(step, config.eval_every) or run.due(step, config.save_every):
            lead = all_leads(model, val, config.micro_tokens)
            loss = preference_loss(lead, val_probability.double()).mean().item()
            metrics = {"val_loss": loss, "accuracy": (lead > 0).double().mean().item()}
            run.validated(step, metrics, f"{loss:.4f} nats a pair, {metrics['accuracy']:.1%} of {len(val_rows)} pairs ordered as labelled")
        if step == steps and rank() == 0:
            starts = [len(chat.encode_prompt(tok, p.prompt)) for p in val_rows]
            figures = preference_figures(val_rows, lead, [(len(c) - s, len(r) - s) for c, r, s in zip(*val, starts)], config.seed)
            metrics["figures"] = figures
            print(f"\nheld-out pairs, with 95 % intervals\n{show(figures)}\n")
        if run.due(step, config.save_every) or leaving:
            if typical:
                model.eval()
                center = float(scores(model, typical, config.micro_tokens).mean())
            run.save(step, model, tok, optimizer.state(), {"epoch": order.epoch, "index": order.index}, metrics, center=center)
        if leaving and step < steps:
            run.stop.leave(step)
        run.log.skip_time()


if __name__ == "__main__":
    launch(main, Config)
