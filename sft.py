"""Refine: supervised fine-tuning, from a model that goes on with text to one that answers.

    minimise  -1/M sum over the M learnt tokens of log p(token | everything before it in its conversation)

Learnt are the assistant's words and the end-of-turn token after each answer (data/chat.py): without the latter the model would never stop. The loss is
pretraining's; only the data and what is learnt of them differ. Left out: adapters (LoRA), which are for models too large for their GPU.

    python sft.py --init=out/base --data=chat.jsonl --out=out/sft
    python sft.py --init=out/base --data=chat.jsonl:0.8,gsm8k.jsonl:0.2 --problems=gsm8k_test.jsonl --replay=out/data/world --epochs=3 --out=out/sft
    torchrun --nproc_per_node=8 sft.py --init=out/base --data=chat.jsonl --out=out/sft
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint, memory
from common import UserError, check, describe, launch, rank, reduce_sum, world_size
from data import chat, corpus, tokenizer
from data.chat import Chat, before_learnt, pack_chats
from data.pack import share, split
from evaluate import exact_match
from kernels.head import linear_cross_entropy
from optim import Optimizer, wsd
from rollout import answers, rooms
from shard import keep_company, shard, unsharded


@dataclass
class Config:
    init: str  # checkpoint to start from: a run of pretrain.py, or a downloaded Llama/Qwen2/Qwen3 directory
    data: str  # conversations: .jsonl, .parquet or hf:NAME, comma-separated, with or without :WEIGHT (data/chat.py lists the formats)
    out: str  # directory of the run
    val: str = ""  # conversations to validate on; "": hold some of --data out
    val_fraction: float = 0.05  # how many to hold out
    problems: str = ""  # {"prompt", "answer"} to solve greedily at every validation; the number after the last "####" counts
    replay: str = ""  # text to go on learning, so that it is not forgotten: files, or a directory written by data/prepare.py
    replay_share: float = 0.1  # of the tokens of a batch
    epochs: float = 1.0  # times each conversation is seen
    steps: int = 0  # optimizer steps; 0: as many as --epochs takes
    batch_tokens: int = 0  # tokens an optimizer step, over all ranks; 0: 256 x layers^2
    micro_tokens: int = 16384  # tokens a rank holds at once: memory, not the result, depends on it
    checkpoint_activations: bool = False  # keep each block's input only, and compute the block again in the backward: less memory, more time, the same result
    context: int = 0  # longest conversation, in tokens; a longer one is cut after its last answer that fits; 0: the model's
    lr: float = 0.0  # peak rate of AdamW; 0: 1e-3 (128 / width)^1.5
    warmup: float = 0.05  # first share of the steps, over which the rate rises; after that it falls to 0
    weight_decay: float = 0.0  # of the matrices
    clip: float = 1.0  # largest gradient norm let through; 0: any
    skip_bad: bool = False  # leave bad lines of the data out, and count them
    max_new: int = 256  # longest answer to a problem or in samples.txt
    seed: int = 0  # of the order of the data and of what is held out
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    compile: bool = False  # torch.compile the model
    shard: str = ""  # fsdp: divide parameters, gradients and optimizer state over torchrun's ranks; "": each rank has them all
    print_every: int = 1  # steps between lines on the terminal; log.jsonl has every step
    eval_every: int = 100  # steps between validations (there is one at the end); 0: none between
    save_every: int = 500  # steps between checkpoints (there is one at the end); 0: none between
    keep_last: int = 2  # checkpoints kept, besides the best
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out


FREE = {"out", "resume", "overwrite", "device", "compile", "shard", "micro_tokens", "checkpoint_activations", "print_every", "eval_every", "save_every", "keep_last", "max_new", "problems"}


def check_flags(config):
    """UserError for a value that has the right type and no meaning."""
    good = {"val_fraction": 0 < config.val_fraction < 1, "replay_share": 0 < config.replay_share < 1, "epochs": 0 < config.epochs < float("inf"),
            "lr": 0 <= config.lr < float("inf"), "warmup": 0 <= config.warmup <= 1, "weight_decay": 0 <= config.weight_decay < float("inf"),
            "clip": 0 <= config.clip < float("inf"), "keep_last": config.keep_last > 0, "print_every": config.print_every > 0, "max_new": config.max_new > 0, "shard": config.shard in ("", "fsdp"),
            }  # fmt: skip
    check(config, good)


@torch.no_grad()
def add_chat_tokens(model, tok):
    """(model, tok) that know the tokens of a conversation, as every model of pretrain.py does; one from elsewhere gets rows for them, each the mean of all rows."""
    tok = tokenizer.with_turns(tok)
    missing = tok.n_vocab - model.config.vocab_size
    if missing > 0:
        for name in ("embed", "untied_head"):
            old = dict(model.named_parameters()).get(name)
            if old is not None:
                setattr(model, name, torch.nn.Parameter(torch.cat([old, old.mean(0, keepdim=True).expand(missing, -1)])))
        model.config.vocab_size = tok.n_vocab
        if rank() == 0:
            print(f"{missing} tokens of a conversation are new to this model: rows of the mean embedding were added for them")
    return model, tok


def fit(chats, limit, end, what):
    """The conversations, cut to `limit` tokens after the last answer that fits. Says how many were cut or dropped; UserError where none is left."""
    kept = [c for c in (chat.whole_turns(c, limit, end) for c in chats) if c is not None]
    cut, dropped = sum(len(c.ids) > limit for c in chats) - (len(chats) - len(kept)), len(chats) - len(kept)
    if rank() == 0 and cut + dropped:
        print(f"{what}: of {len(chats):,} conversations {cut} were cut after their last answer that ends within {limit} tokens, {dropped} dropped, none of whose answers does")
    if not kept:
        raise UserError(f"{what}: no conversation has an answer that ends within {limit} tokens; give a larger --context if the model reaches further")
    return kept


def read_replay(config, tok):
    """The token streams of --replay; [] where there is none."""
    if Path(config.replay).is_dir() and config.replay:
        return corpus.read_prepared(config.replay, tok)[0]
    return [corpus.encode(tok, [d for file in config.replay.split(",") for d in corpus.read_documents(file)])] if config.replay else []


def text_chats(streams, pieces):
    """Pieces [n, 3] of pretraining text as conversations of which every token but the first is learnt."""
    return [Chat(ids, np.arange(len(ids)) > 0) for ids in (np.asarray(streams[s][a : b + 1]) for s, a, b in pieces)]


def train_step(model, chats, micro_tokens):
    """Add up the gradient of the mean loss over all learnt tokens of `chats`, the whole batch, of which this rank takes its share. Returns its share of the loss."""
    model.train()
    lengths, learnt = [len(c.ids) for c in chats], sum(int(c.learnt.sum()) for c in chats)
    begin, end = share(lengths, rank(), world_size())
    loss = torch.zeros((), device=model.embed.device)
    for first, last in split(lengths[begin:end], micro_tokens):
        part = nats(model, chats[begin + first : begin + last]) / learnt  # the batch's count, so that no split changes the gradient
        part.backward()
        loss += part.detach()
    keep_company(model, lengths, micro_tokens)
    return loss


def nats(model, chats):
    """The sum over the learnt tokens of -log p(token), a scalar."""
    hidden, targets = before_learnt(model, chats)
    return linear_cross_entropy(hidden, model.head, targets)


@torch.no_grad()
def validation_loss(model, chats, micro_tokens):
    """Nats per learnt token over `chats`, which the ranks share."""
    model.eval()
    lengths, total = [len(c.ids) for c in chats], 0.0
    begin, end = share(lengths, rank(), world_size())
    for first, last in split(lengths[begin:end], micro_tokens):
        total += nats(model, chats[begin + first : begin + last]).item()
    keep_company(model, lengths, micro_tokens)
    return reduce_sum(total)[0] / sum(int(c.learnt.sum()) for c in chats)


def main(config):
    check_flags(config)
    run = checkpoint.Run("sft", config, FREE)
    device = run.device

    # 1. Model and conversations
    model, tok, _ = checkpoint.read(run.folder)
    if model.config.scalar_head:
        raise UserError(f"--init={config.init}: a reward model, which has no output head; start from the model it was trained from")
    model, tok = add_chat_tokens(model, tok)
    model = shard(model, device) if config.shard else model.to(device)
    model.checkpoint_activations = config.checkpoint_activations
    train_rows, val_rows, data = chat.read_split(config, chat.conversation)
    problems, _ = chat.read(config.problems, chat.problem, config.skip_bad) if config.problems else ([], {})
    context = run.context(model)
    end = chat.end_of_turn(tok)
    train = fit([chat.encode(tok, messages) for messages in train_rows], context, end, config.data)
    val = fit([chat.encode(tok, messages) for messages in val_rows], context, end, config.val or "held out of it")
    chat.audit(tok, train, config.data)
    rooms(model, [chat.encode_prompt(tok, messages) for messages, _ in problems], config.max_new)  # now, not at the first validation
    shown = next(messages for messages in val_rows if chat.whole_turns(chat.encode(tok, messages), context, end))
    shown = shown[: [m["role"] for m in shown].index("assistant")]  # a first question, answered in samples.txt
    streams = read_replay(config, tok)
    data |= {name: checkpoint.sha256(Path(name) / "manifest.json" if Path(name).is_dir() else name) for name in config.replay.split(",") if name}

    # 2. Optimizer and order of the data, and on a resume all their state
    lengths = np.array([len(c.ids) for c in train])
    batch_tokens = config.batch_tokens or 256 * model.config.layers**2
    replayed = int(config.replay_share * batch_tokens) if streams else 0
    steps = config.steps or max(1, round(config.epochs * int(lengths.sum()) / (batch_tokens - replayed)))
    lr = config.lr or 1e-3 * (128 / model.config.width) ** 1.5
    optimizer = Optimizer(model, lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    order = corpus.Order(lambda random: (np.arange(len(train)), lengths), config.seed)
    replay = corpus.text_order(streams, tok.eot, context - 1, config.seed) if streams else None
    if config.compile:
        model.compile()
    if rank() == 0:
        print(f"{steps} steps of {batch_tokens:,} tokens, {replayed:,} of them replayed text; peak rate {lr:.3g}; on {describe(device)['hardware']}")
    asked = [len(chat.encode_prompt(tok, messages)) for messages in (shown, *(messages for messages, _ in problems))]
    walked = dict(learnt=float(np.mean([c.learnt.mean() for c in train])), read_tokens=sum(len(c.ids) for c in val), samples=(min(128, len(asked)), max(asked) + config.max_new, max(asked)), shards=world_size() if config.shard else 1)
    memory.check(config, device, lambda c: memory.plan(c, device, [model.config], lengths, batch_tokens, loss="cross_entropy", **walked), or_else="" if config.shard else memory.SHARD)
    if run.resumed:
        run.check_same(data)
    counters = run.begin(steps, {"": optimizer}, data, sum(p.numel() for p in model.parameters()))
    if run.resumed:
        order.begin(counters["epoch"], counters["index"])
        if replay:
            replay.begin(counters["replay_epoch"], counters["replay_index"])
    flops = model.flops_per_token(int(lengths.mean()))

    # 3. Train
    for step in range(run.start + 1, steps + 1):
        rate = wsd(step - 1, steps, int(config.warmup * steps), steps)
        chats = [train[i] for i in order.batch(batch_tokens - replayed)]
        if replay:
            chats += text_chats(streams, replay.batch(replayed))
        loss = train_step(model, chats, config.micro_tokens)
        norm = optimizer.step(rate, config.clip)
        (loss,) = reduce_sum(loss)
        if not norm.isfinite():
            pack, targets = pack_chats(chats)
            checkpoint.refuse_nonfinite(run.path, step, loss, {"tokens": pack.tokens, "cu": pack.cu, "targets": targets})
        run.log.step(step, sum(len(c.ids) for c in chats), flops, device, loss=loss, lr=lr * rate, grad_norm=norm.item())

        # 4. Validate, sample, save
        leaving, metrics = run.stop.agreed(), {}
        if run.due(step, config.eval_every) or run.due(step, config.save_every):
            metrics = {"val_loss": validation_loss(model, val, config.micro_tokens)}
            text = f"{metrics['val_loss']:.4f} nats a learnt token"
            writer = unsharded(model, device, keep=bool(problems) or rank() == 0)
            if problems:
                metrics["exact_match"] = float(np.mean(exact_match(writer, tok, problems, config.max_new)))
                text += f", {metrics['exact_match']:.1%} of {len(problems)} problems right"
            run.validated(step, metrics, text)
            if rank() == 0:
                _, _, texts = answers(writer, tok, [shown], max_new=config.max_new, seed=config.seed)
                run.log.sample(step, f"{shown[-1]['content']}\n--- answers:\n{texts[0]}")
            del writer  # of a sharded model a whole copy
        if run.due(step, config.save_every) or leaving:
            counters = {"epoch": order.epoch, "index": order.index} | ({"replay_epoch": replay.epoch, "replay_index": replay.index} if replay else {})
            run.save(step, model, tok, optimizer.state(), counters, metrics)
        if leaving and step < steps:
            run.stop.leave(step)
        run.log.skip_time()


if __name__ == "__main__":
    launch(main, Config)
