"""Refine: supervised fine-tuning, from a model that continues text to one that answers.

    minimise  -1/M sum over the M trained tokens of log p(token | all before it in its conversation)

Trained are the assistant's words and the end-of-turn token after each answer (data/chat.py):
without the latter the model would never stop. The loss is pretraining's; only the data and what is
trained of them differ. Left out: adapters (LoRA), for models too large for their GPU.

    python sft.py --init=out/base --data=chat.jsonl --out=out/sft
    python sft.py --init=out/base --data=chat.jsonl:0.8,gsm8k.jsonl:0.2 \\
        --problems=gsm8k_test.jsonl --replay=out/data/world --epochs=3 --out=out/sft
    torchrun --nproc_per_node=8 sft.py --init=out/base --data=chat.jsonl --out=out/sft
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import chat, corpus, rows, tokenizer
from data.read import source_names
from data.shards import read_prepared, text_hashes
from kernels.head import linear_cross_entropy
from model import hidden_before_targets
from optim import Optimizer, wsd
from rollout import sample_completions, token_budgets
from runtime import memory
from runtime.batches import index_order, micro_batches, text_order
from runtime.cli import print0, refuse_unread
from runtime.errors import UserError
from runtime.process import launch, rank, reduce_sum, world_size
from runtime.run import Run, RunConfig
from runtime.shard import shard, unsharded
from scoring import exact_match


@dataclass(kw_only=True)
class Config(RunConfig):
    # -- What you will set --
    # checkpoint to start from: a run of pretrain.py, or a downloaded Llama, Qwen2 or Qwen3
    # directory
    init: str
    # conversations: .jsonl, .parquet or hf:NAME, comma-separated, with or without :WEIGHT (formats:
    # data/rows.py)
    data: str
    # how often each conversation is seen [> 0; <= 10000]
    epochs: float = 1.0
    # -- What you may set --
    # conversations to validate on; "": hold out some of --data
    val: str = ""
    # share of --data to hold out [> 0; < 1]
    val_fraction: float = 0.05
    # {"prompt", "answer"} to solve greedily at every validation; the number after the last "####"
    # counts [may change on resume]
    problems: str = ""
    # text to train on as well, so that it is not forgotten: files, or a directory written by
    # data/prepare.py
    replay: str = ""
    # share of the replayed text in the tokens of a batch [> 0; < 1]
    replay_share: float = 0.1
    # optimizer steps; 0: as many as --epochs takes [<= 1000000]
    steps: int = 0
    # tokens per optimizer step, over all ranks; 0: 256 x layers^2
    batch_tokens: int = 0
    # longest conversation, in tokens; a longer one is cut after its last answer that fits; 0: the
    # model's
    context: int = 0
    # peak learning rate of AdamW; 0: 1e-3 (128 / width)^1.5, fitted on the embedded world
    # at width 128 and extrapolated to others [>= 0]
    lr: float = 0.0
    # drop bad lines of the data, and count them
    skip_bad: bool = False
    # longest completion of a problem or in samples.txt, in tokens [>= 1; may change on resume]
    max_new_tokens: int = 256
    # torch.compile the model [may change on resume]
    compile: bool = False
    # fsdp: divide parameters, gradients and optimizer state over torchrun's ranks; "": each rank
    # has them all [one of fsdp; may change on resume]
    shard: str = ""
    # -- What you will rarely set --
    # share of the steps over which the learning rate rises; after that it falls to 0 [>= 0; <= 1]
    warmup: float = 0.05
    # weight decay of the matrices [>= 0]
    weight_decay: float = 0.0
    eval_every: int = 100


# --------------------------------------------------------------------------------------------------
# Model and conversations


@torch.no_grad()
def add_chat_tokens(model, tok):
    """(model, tok) that know the tokens of a conversation, as all of pretrain.py do.

    In the model of another source they take the rows that pad its vocabulary, as they are; beyond
    these it gets rows for them, each the mean of all."""
    tok = tokenizer.with_turns(tok)
    missing = tok.n_vocab - model.config.vocab_size
    model.config.padding = max(0, -missing)
    if missing > 0:
        for name, matrix in list(model.named_parameters(recurse=False)):
            if name in ("embed", "untied_head"):
                new = matrix.mean(0, keepdim=True).expand(missing, -1)
                setattr(model, name, torch.nn.Parameter(torch.cat([matrix, new])))
        model.config.vocab_size = tok.n_vocab
        print0(f"{missing} tokens of a conversation are new to this model: each gets the mean row of the embedding")
    return model, tok


def read_chats(config, tok, context):
    """(train Chats, validation Chats, a first question of the latter as messages, the problems of
    --problems, {source: SHA-256})."""
    encode, end = chat.encoder(tok, chat.encode_turns), chat.end_of_turn(tok)

    def fit(found, what):
        chats = chat.drop_too_long([item for _, items in found for item in items], context, end, what)
        kept = [row for row, items in found if any(chat.whole_turns(c, context, end) for c in items)]
        return (chats, kept), kept

    (train, train_rows), (val, val_rows), hashes = rows.read_split(config, rows.conversation, encode, fit)
    chat.audit(tok, train, config.data)
    first_answer = [message["role"] for message in val_rows[0]].index("assistant")
    return train, val, val_rows[0][:first_answer], read_problems(config, tok, train_rows), hashes


def read_problems(config, tok, train_rows):
    """The problems of --problems, (messages, row) each; warns of those that are trained on."""
    if not config.problems:
        return []
    encoded, _ = rows.read(config.problems, rows.problem, config.skip_bad, encode=chat.encoder(tok, chat.prompt_length))
    problems = [problem for problem, _ in encoded]
    rows.warn_of_shared_prompts(train_rows, problems, f"--problems={config.problems}")
    return problems


def read_replay(config, tok):
    """The token streams of --replay; none if it is not given."""
    if not config.replay:
        return []
    if Path(config.replay).is_dir():
        return read_prepared(config.replay, tok)[0]
    files = source_names(config.replay, "replay")
    documents = [document for file in files for document in corpus.read_documents(file, config.skip_bad)]
    return [corpus.encode(tok, documents, config.skip_bad)]


# --------------------------------------------------------------------------------------------------
# The loss


def nll_sum(model, chats):
    """Sum over the trained tokens of -log p(token), a scalar in nats."""
    hidden, targets = hidden_before_targets(model, chats)
    return linear_cross_entropy(hidden, model.head, targets)


def mean_nll(model, chats, micro_batch_tokens):
    """Nats per trained token of `chats`, which the ranks share. With gradients enabled, adds up the
    gradient of this rank's part."""
    loss, n_trained = torch.zeros((), device=model.embed.device), sum(int(c.loss_mask.sum()) for c in chats)
    for part in micro_batches(model, [len(c.ids) for c in chats], micro_batch_tokens):
        part_loss = nll_sum(model, chats[part]) / n_trained  # of the batch, so that no split changes the gradient
        if torch.is_grad_enabled():
            part_loss.backward()
        loss += part_loss.detach()
    return reduce_sum(loss)[0]


def main(config):
    if not config.replay:
        refuse_unread(config, {"replay_share": "only --replay reads it"})
    if config.steps:
        refuse_unread(config, {"epochs": f"--steps={config.steps} says how long to train"})
    run = Run("sft", config)

    # 1. Model and conversations
    model, tok = add_chat_tokens(*run.load("cpu"))
    model = shard(model, run.device) if config.shard else model.to(run.device)
    context = run.context(model)
    train, val, question, problems, hashes = read_chats(config, tok, context)
    prompts = [chat.encode_prompt(tok, messages) for messages in [question, *(messages for messages, _ in problems)]]
    token_budgets(model, prompts, config.max_new_tokens)  # so that one too long is refused now
    streams = read_replay(config, tok)
    hashes |= text_hashes(config.replay, "replay")

    batch_tokens = config.batch_tokens or 256 * model.config.layers**2
    replayed = int(config.replay_share * batch_tokens) if streams else 0
    if streams and not replayed:
        raise UserError(f"--replay_share={config.replay_share}: no token of a batch of {batch_tokens}; raise it")
    order = index_order(len(train), config.seed, [len(c.ids) for c in train])
    steps, epochs = order.plan(batch_tokens - replayed, config.epochs, config.steps)
    lr = config.lr or 1e-3 * (128 / model.config.width) ** 1.5
    optimizer = Optimizer(model, lr, weight_decay=config.weight_decay)
    saved = {"optimizer": optimizer, "order": order}
    if streams:
        replay = saved["replay"] = text_order(streams, tok.eot, min(context - 1, replayed), config.seed)
    check_memory(run, model, optimizer, train, batch_tokens, [len(p) for p in prompts])

    # bookkeeping: what is printed, saved and resumed
    if config.compile:
        model.compile()
    print0(
        f"{steps} steps of {batch_tokens:,} tokens, {replayed:,} of them replayed text: {epochs:.2f} epochs; "
        f"peak lr {lr:.3g}"
    )
    run.begin(steps, model, data=hashes, saved=saved)

    for step in run.steps():
        # 2. Learn from a batch of conversations, and of text
        chats = [train[i] for i in order.epoch_batch(batch_tokens - replayed)]
        if streams:
            chats += corpus.piece_chats(streams, replay.batch(replayed))
        model.train()
        loss = mean_nll(model, chats, config.micro_batch_tokens)
        lr_scale = wsd(step - 1, steps, warmup=int(config.warmup * steps), decay=steps)
        grad_norm = optimizer.step(lr_scale, config.max_grad_norm)
        run.require_finite(step, loss, [grad_norm], chats)
        rates = {"lr": lr * lr_scale, "grad_norm": grad_norm.item()}
        run.log(step, model, [len(c.ids) for c in chats], loss=loss, **rates)

        # 3. Validate, save
        if run.eval_due(step):
            validate(run, step, model, tok, val, question, problems)
        run.end_step(step, model, tok)


@torch.no_grad()
def validate(run, step, model, tok, val, question, problems):
    """Log the loss of held-out conversations and the share of the problems solved, and write an
    answer to `question` to samples.txt."""
    config = run.config
    model.eval()
    metrics = {"val_loss": mean_nll(model, val, config.micro_batch_tokens)}
    text = f"{metrics['val_loss']:.4f} nats per trained token"
    model = unsharded(model, run.device, keep=bool(problems) or rank() == 0)
    if problems:
        right, finished = exact_match(model, tok, problems, config.max_new_tokens)
        metrics["exact_match"] = float(np.mean(right))
        text += f", {metrics['exact_match']:.1%} of {len(problems)} problems right"
        if step == run.total_steps:  # before that it may not have learned to end
            run.warn_of_cut(np.mean(finished))
    run.validated(step, metrics, text=text)
    if rank() == 0:
        sampling = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
        _, _, texts = sample_completions(model, tok, [question], **sampling)
        run.sample(step, f"{question[-1]['content']}\n--- answers:\n{texts[0]}")


def check_memory(run, model, optimizer, train, batch_tokens, prompt_lengths):
    """The memory plan of a step and of the problems, all of which every rank solves; see
    runtime/memory.py."""
    lengths = [len(c.ids) for c in train]
    completions = len(prompt_lengths) * world_size()
    plan = [(model, optimizer, nll_sum)], train, lengths, batch_tokens
    memory.check(run, *plan, prompt_lengths=prompt_lengths, completions=completions)


if __name__ == "__main__":
    launch(main, Config)
