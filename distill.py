"""Sharpen: on-policy distillation: a student writes, and a teacher says of every token what it
would have written there.

    minimise  mean_t KL(pi(. | x, y_<t) || teacher(. | x, y_<t)),   y ~ pi(. | x)

The divergence is exact, over the whole vocabulary: each token teaches as much as there are tokens
to choose from, where a reward says one number per completion. The samples are the student's own, so
it learns to continue from where it really gets to, not from where the teacher would have been
(Agarwal et al. 2024, GKD, arXiv 2306.13649, eq. 4; Gu et al. 2024, MiniLLM, 2306.08543). The
gradient does not run through the sampling, as in GKD. --direction=forward is KL(teacher || pi).

Several teachers, each the expert of its rows, go into one student: --teacher=DIR,DIR and a row's
{"teacher": 1} names one by its place in the list, from 0 (so DeepSeek-V4 is made, 2606.19348).

--offline=FILE takes conversations that are there instead of the student's samples. To fine-tune on
the teacher's kept answers as text alone (R1's distillation, 2501.12948) is sft.py.

    python distill.py --init=out/small --teacher=out/grpo --data=prompts.jsonl --out=out/distilled
"""

import dataclasses
from dataclasses import dataclass

import torch

from data import chat, rows
from data.pack import rank_span, token_slices
from kernels.kl import linear_kl
from model import hidden_before_targets, logprobs_no_grad
from optim import Optimizer, wsd
from rollout import check_sampler_matches_trainer, complete_rows
from runtime import memory
from runtime.batches import index_order
from runtime.checkpoint import fingerprints, load_matching
from runtime.cli import print0, refuse_unread
from runtime.errors import UserError
from runtime.process import launch, rank, reduce_sum, world_size
from runtime.run import Run, RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    # -- What you will set --
    # checkpoint of the student: a run of sft.py, or of a stage after it
    init: str
    # checkpoint of the teacher; several, comma-separated, if rows say whose they are
    teacher: str
    # prompts {"prompt", ...}, problems {"prompt", "answer"}, or conversations, whose last answer is
    # left out
    data: str = ""
    # in place of --data: conversations whose answers the student learns from, unsampled
    offline: str = ""
    # reverse: KL(student || teacher), the student keeps to what the teacher prefers; forward:
    # KL(teacher || student), it covers all that the teacher might say [one of reverse, forward]
    direction: str = "reverse"
    # -- What you may set --
    # optimizer steps [>= 1]
    steps: int = 100
    # prompts (--offline: conversations) per step, over all ranks [>= 1; <= 1000000]
    prompts_per_step: int = 64
    # completions of each prompt [>= 1; <= 1000000]
    group_size: int = 1
    # longest completion, in tokens [>= 1]
    max_new_tokens: int = 256
    # temperature of sampling and of both distributions [> 0]
    temperature: float = 1.0
    # peak learning rate of AdamW; 0: 1e-3 (128 / width)^1.5, fitted on the embedded world
    # at width 128 and extrapolated to others [>= 0]
    lr: float = 0.0
    # prompts (or conversations) to validate on; "": hold out some
    val: str = ""
    # share to hold out [> 0; < 1]
    val_fraction: float = 0.05
    # held-out prompts to complete at a validation [>= 1]
    eval_prompts: int = 128
    # drop bad lines of the data, and count them
    skip_bad: bool = False
    # -- What you will rarely set --
    # share of the steps over which the learning rate rises [>= 0; <= 1]
    warmup: float = 0.05
    # share of the steps, at the end, over which it falls to 0 [>= 0; <= 1]
    decay: float = 0.5
    save_every: int = 50


# --------------------------------------------------------------------------------------------------
# The algorithm


def distill_loss(model, teacher, chats, direction, temperature):
    """The KL of student and teacher before each trained token of `chats`, summed: fp32 scalar.

    direction: reverse, KL(student || teacher), or forward. The teacher has no gradient.
    """
    hidden, _ = hidden_before_targets(model, chats)  # [M, C]
    with torch.no_grad():
        teacher_hidden, _ = hidden_before_targets(teacher, chats)  # [M, C of the teacher]
    heads = hidden, model.head, teacher_hidden, teacher.head.detach()
    return linear_kl(*heads, reverse=direction == "reverse", temperature=temperature)


def run_batch(model, teachers, items, n_tokens, config):
    """The KL per token of this rank's items [(Chat, number of its teacher)], as its part of the
    mean over the `n_tokens` trained tokens of all ranks. With gradients enabled, adds up the
    gradient."""
    total = torch.zeros((), device=model.embed.device)
    for number, teacher in enumerate(teachers):
        chats = [item for item, its_teacher in items if its_teacher == number]
        for part in token_slices([len(c.ids) for c in chats], config.micro_batch_tokens):
            loss = distill_loss(model, teacher, chats[part], config.direction, config.temperature) / n_tokens
            if torch.is_grad_enabled():
                loss.backward()
            total += loss.detach()
    return total


# --------------------------------------------------------------------------------------------------
# Teachers and data


def teacher_names(config):
    """The checkpoints of --teacher."""
    return [name for name in config.teacher.split(",") if name]


def load_teachers(config, model, tok):
    """The frozen teachers of --teacher. Raises UserError if one reads other tokens than the
    student."""
    teachers = [load_matching(name, model, tok, f"--teacher={name}") for name in teacher_names(config)]
    return [teacher.eval().requires_grad_(False) for teacher in teachers]


def teacher_number(row, n_teachers):
    """Which of --teacher a row belongs to: its field "teacher", which one teacher does not need."""
    number = row.get("teacher", 0 if n_teachers == 1 else None)
    if type(number) is not int or not 0 <= number < n_teachers:
        raise ValueError(
            f'"teacher" is {number!r}: expected the place of one of the {n_teachers} of --teacher, from 0 to '
            f"{n_teachers - 1}"
        )
    return number


def read_data(config, tok, context):
    """(train, val, hashes) of --data, as [(messages, row)], or of --offline, as [(Chat,
    number)]."""
    n_teachers = len(teacher_names(config))

    def prompt_length(tok, row):
        teacher_number(row[1], n_teachers)  # ValueError for a row that is no teacher's
        return chat.prompt_length(tok, row)

    if not config.offline:
        return chat.read_prompts(config, tok, context, prompt_length)

    def parse(row):
        return rows.conversation(row), row

    def encode(tok, row):
        return chat.encode(tok, row[0]), teacher_number(row[1], n_teachers)

    def fit(found, what):
        items, why = [item for _, item in found], f"which exceed the model's context of {context} tokens"
        advice = f"fits into the model's context of {context} tokens; bring shorter ones"
        kept = chat.fitting([len(c.ids) for c, _ in items], context, what, "conversation", why, advice)
        return [items[i] for i in kept], [found[i] for i in kept]

    data = dataclasses.replace(config, data=config.offline)
    return rows.read_split(data, parse, chat.encoder(tok, encode), fit)


def with_teachers(completions, config):
    """[(Chat, number of its teacher)] of the student's completions."""
    n_teachers = len(teacher_names(config))
    return [(c.chat, teacher_number(c.row[1], n_teachers)) for c in completions]


def endings(completions):
    """How many of the student's completions end, after how many tokens, over all ranks."""
    samples = [c.sample for c in completions]
    finished, tokens = sum(s.finished for s in samples), sum(len(s.tokens) for s in samples)
    finished, tokens, n = reduce_sum(finished, tokens, len(samples))
    return {"finished": finished / n, "completion_tokens": tokens / n}


def validate(run, step, model, teachers, tok, val):
    """Log the KL per token on held-out prompts, always drawn with the same random numbers, and
    write a completion to samples.txt; with --offline on held-out conversations."""
    config, metrics, text = run.config, {}, ""
    if config.offline:
        begin, end = rank_span([1] * len(val), rank(), world_size())
        items = val[begin:end]
    else:
        completions = complete_rows(model, tok, val, 0, config)
        items, metrics = with_teachers(completions, config), endings(completions)
        text = f"{completions[0].row[0][-1]['content']}\n--- completion:\n{completions[0].text}" if completions else ""
    model.eval()
    with torch.no_grad():
        n_tokens = reduce_sum(count_trained(items))[0]
        kl = reduce_sum(run_batch(model, teachers, items, n_tokens, config))[0]
    run.validated(step, {"val_loss": kl, **metrics}, text)


def count_trained(items):
    return sum(int(item.loss_mask.sum()) for item, _ in items)


def check_flags(config):
    """Raises UserError for flags that do not go together."""
    if not teacher_names(config):
        raise UserError("--teacher: name the checkpoint to learn from")
    if bool(config.data) == bool(config.offline):
        raise UserError("--data and --offline: give prompts to sample from, or conversations to learn from")
    if config.offline:
        refuse_unread(config, dict.fromkeys(["group_size", "max_new_tokens"], "with --offline nothing is sampled"))
    if config.prompts_per_step < world_size():
        raise UserError(f"--prompts_per_step={config.prompts_per_step}: fewer than there are ranks ({world_size()})")


def main(config):
    run = Run("distill", config)
    check_flags(config)

    # Student, teachers, prompts
    model, tok = run.load()
    teachers = load_teachers(config, model, tok)
    train, val, hashes = read_data(config, tok, model.config.context)

    # bookkeeping: optimizer, memory, what is saved and resumed
    steps, lr = config.steps, config.lr or 1e-3 * (128 / model.config.width) ** 1.5
    optimizer = Optimizer(model, lr)
    order = index_order(len(train), config.seed)
    check_memory(run, model, optimizer, teachers, tok, train)
    passes = steps * config.prompts_per_step / len(train)
    print0(f"{len(train):,} rows, {len(teachers)} teachers; {steps} steps: {passes:.3g} passes; peak lr {lr:.3g}")
    hashes |= fingerprints(*teacher_names(config))
    run.begin(steps, model, data=hashes, saved={"optimizer": optimizer, "order": order})

    for step in run.steps():
        # 1. The student writes; or conversations that are there
        batch, completions, metrics = [train[i] for i in order.batch(config.prompts_per_step)], [], {}
        if config.offline:
            begin, end = rank_span([1] * len(batch), rank(), world_size())
            items = batch[begin:end]
        else:
            completions = complete_rows(model, tok, batch, step, config)
            items, metrics = with_teachers(completions, config), endings(completions)
            run.warn_of_cut(metrics["finished"])
            run.time_phase("rollout")
        chats = [item for item, _ in items]
        if not config.offline and step == run.start + 1:  # what is sampled from is what is differentiated
            logp = logprobs_no_grad(model, chats, config.temperature, config.micro_batch_tokens)
            check_sampler_matches_trainer(model, completions, logp, config, repeat=True)

        # 2. The teachers say how every token is distributed; the student moves towards it
        model.train()
        n_tokens = reduce_sum(count_trained(items))[0]
        loss = run_batch(model, teachers, items, n_tokens, config)
        lr_scale = wsd(step - 1, steps, warmup=int(config.warmup * steps), decay=int(config.decay * steps))
        grad_norm = optimizer.step(lr_scale, config.max_grad_norm)
        (loss,) = reduce_sum(loss)
        run.require_finite(step, loss, [grad_norm], chats)
        run.time_phase("update")

        # 3. Log, validate, save
        metrics |= {"lr": lr * lr_scale, "grad_norm": grad_norm.item()}
        text = "the student says what its teacher says (loss and gradient are 0); name another --teacher or --init"
        run.warn_if_it_lasts("zero_loss", abs(loss) < 1e-6 and metrics["grad_norm"] < 1e-8, text)
        tokens, n = reduce_sum(sum(len(c.ids) for c in chats), len(chats))
        run.log(step, model, [tokens / n] * int(n), loss=loss, **metrics)
        if run.eval_due(step):
            validate(run, step, model, teachers, tok, rows.random_rows(val, config.eval_prompts, config.seed))
        run.end_step(step, model, tok)


def check_memory(run, model, optimizer, teachers, tok, train):
    """The memory plan; see runtime/memory.py. A teacher of the student's own shape stands in for
    the teachers' passes, whose parameters count as they are."""
    config = run.config

    def loss(model, chats):
        return distill_loss(model, model, chats, config.direction, config.temperature)

    frozen = {f"teacher {number}": teacher.config for number, teacher in enumerate(teachers)}
    trained = [(model, optimizer, loss)]
    if config.offline:
        chats = [item for item, _ in train]
        lengths = [len(c.ids) for c in chats]
        step_tokens = memory.likely_tokens(lengths, config.prompts_per_step)
        memory.check(run, trained, chats, lengths, step_tokens, frozen=frozen, batch_flag="prompts_per_step")
    else:
        n = config.prompts_per_step * config.group_size
        memory.check_rollout(run, trained, tok, train, n, n, frozen)


if __name__ == "__main__":
    launch(main, Config)
