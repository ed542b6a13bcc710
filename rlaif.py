"""Sharpen: AI feedback. A model judges replies, or revises them, by a constitution's principles.

    p(a better than b) = mean over principles and both orders of P(" A") / (P(" A") + P(" B"))
                         after "Question ... Reply A ... Reply B ... principle Better:"

--mode=judge writes preferences {"prompt", "chosen", "rejected", "probability"}, soft labels for
reward.py and dpo.py (Lee et al. 2023, arXiv 2309.00267). A judge favours one place, so both orders
are asked. The replies are sampled from --policy, or --data has them ("chosen"/"rejected" or
"reply_a"/"reply_b"), and the judge is compared with their labels. --mode=revise has answers of
--policy criticised by a random principle and rewritten, as chats for sft.py: the supervised half of
constitutional AI (Bai et al. 2022, arXiv 2212.08073).

In the mean of three principles, one of which the judge is sure gives 2/3 if the others do not care
and 1/2 if another is as sure of the opposite: --min_margin=0.12 keeps the former, and
--principles=vote with --min_margin=0.3 only what all three agree on. A pretrained model often
judges better than a fine-tuned one, which has forgotten what it read, but it must not be the policy
that is trained. The judge as a reward, without pairs: --reward=judge:DIR.

    python rlaif.py --policy=out/sft --judge=out/base --constitution=data/constitution.txt \\
        --data=prompts.jsonl --out=out/ai_pairs.jsonl
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from data import chat, rows
from data.judge import (
    judge_prompt,
    other_fields,
    question,
    random_principles,
    reply_pair,
    speaks_of_answers,
    swap_sides,
    transcript,
)
from figures import label_margins, prompt_numbers, show_record, sure_margins, verdict_values
from rollout import Sample, rollout, sample_completions
from runtime import checkpoint
from runtime.cli import check_ranges, print0, refuse_unread
from runtime.errors import UserError
from runtime.output import open_output, write_batch
from runtime.process import Stop, describe, launch, setup, world_size
from runtime.run import clock_time
from scoring import judge_score, load_rewards, prefer_first, read_constitution, reward_hashes, score_completions


@dataclass
class Config:
    # -- What you will set --
    # text file of principles, one per line
    constitution: str
    # prompts {"prompt"}, or without --policy pairs of replies: files or hf:NAME, comma-separated
    data: str
    # .jsonl file to write [may change on resume]
    out: str
    # judge: write preferences; revise: write chats with revised answers [one of judge, revise]
    mode: str = "judge"
    # checkpoint that answers the prompts, of sft.py or later; "": --data has pairs of replies
    policy: str = ""
    # checkpoint that judges or criticises, any that writes; to revise, "" means --policy
    judge: str = ""
    # -- What you may set --
    # mean of the principles, their vote, or a random one per prompt [one of mean, vote, random]
    principles: str = "mean"
    # completions sampled to a prompt; every two of them are a pair [>= 2; <= 1000]
    group_size: int = 2
    # at which answers, critiques and revisions are sampled [>= 0]
    temperature: float = 1.0
    # longest of them, in tokens; an answer or a revision that was cut is left out [>= 1]
    max_new_tokens: int = 256
    # drop a pair whose probability is nearer to 1/2 than this [>= 0; < 0.5]
    min_margin: float = 0.05
    # critiques: in turns, as text, or auto: as the judge was trained [one of chat, text, auto]
    ask: str = "auto"
    # compare the judge's order with that of this reward, as evaluate.py takes it
    reward: str = ""
    # seconds that a FUNCTION may take over one completion [> 0; may change on resume]
    reward_timeout: float = 60.0
    # rows of --data, at most; 0: all
    limit: int = 0
    # leave out bad lines of the data, and count them
    skip_bad: bool = False
    # seed of the completions and of the random principles
    seed: int = 0
    # continue the file in --out, to the same bytes [may change on resume]
    resume: bool = False
    # replace it [may change on resume]
    overwrite: bool = False
    # -- What you will rarely set --
    # rows of --data between two writes: what a kill can cost [>= 1]
    rows_per_write: int = 256
    # tokens a judge reads at once: memory depends on it [>= 1]
    micro_batch_tokens: int = 16384
    # auto, cpu, cuda, cuda:1, mps [may change on resume]
    device: str = "auto"


CRITIQUE = "Think of this principle: {principle}\nIn which ways does your last answer go against it?"
REVISION = """Now rewrite that answer so that it follows the principle: {principle}
Write the new answer and nothing else."""


def sampled_pairs(config, model, tok, batch, first):
    """Every two different completions that the policy samples to each prompt.

    batch: [(messages, row)]. Returns ([(index in the batch, Pair)], counts).
    """
    n, context = config.group_size, model.config.context
    fitting = [i for i, (messages, _) in enumerate(batch) if len(chat.encode_prompt(tok, messages)) < context]
    prompts = [batch[i][0] for i in fitting]
    _, samples, texts = sample_completions(model, tok, prompts, n=n, first=first * n, **sampling(config, config.seed))
    finished = [[] for _ in fitting]
    for sample, text in zip(samples, texts, strict=True):
        if sample.finished and text.strip():
            finished[sample.prompt_index].append(text)
    pairs, counts = [], Counter({"prompts too long": len(batch) - len(fitting)})
    for i, group in zip(fitting, finished, strict=True):
        messages, row = batch[i]
        different = list(combinations(dict.fromkeys(group), 2))
        pairs += [(i, rows.Pair(messages, a, b, math.nan, row)) for a, b in different]
        counts["completions cut or empty"] += n - len(group)
        counts["ties (twice the same text)"] += math.comb(len(group), 2) - len(different)
    return pairs, counts


def sampling(config, seed):
    return {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "seed": seed}


def verdicts(model, tok, triples, principles, asked, micro_batch_tokens):
    """float64 [n, k, 2]: p(first reply is better), asked in this order and in the other.

    triples: [(prompt, reply, reply)]; asked: bool [n, k], by which of k principles; nan by others.
    """
    p = np.full((*asked.shape, 2), np.nan)
    for j, principle in enumerate(principles):
        mine = np.flatnonzero(asked[:, j])
        if len(mine):
            p[mine, j] = judge_score(model, tok, [triples[i] for i in mine], principle, micro_batch_tokens)
    return p


def judge_batch(config, policy, judge, principles, rewards, batch, first):
    """Judge a batch, [Pair] or with a policy [(messages, row)], that comes after `first` rows.

    Returns (rows to write, counts, {figure: its values}, the pairs' `prompt_numbers`).
    """
    # 1. Pairs of replies that the judge can read
    model, tok, _ = judge
    if policy:
        pairs, counts = sampled_pairs(config, *policy[:2], batch, first)
    else:
        pairs = [(i, pair) for i, pair in enumerate(batch) if pair.chosen != pair.rejected]
        counts = Counter({"ties (twice the same text)": len(batch) - len(pairs)})
    longest = max(principles, key=lambda principle: len(tok.encode_ordinary(principle)))
    kept, triples = [], []
    for i, pair in pairs:
        triple = transcript(pair.prompt), pair.chosen, pair.rejected
        if len(tok.encode_ordinary(judge_prompt(*triple, longest))) < model.config.context:
            kept.append((i, pair))
            triples.append(triple)
    counts["prompts"], counts["pairs judged"] = len(batch), len(kept)
    counts["pairs too long for the judge"] = len(pairs) - len(kept)
    if not kept:
        return [], counts, {}, []
    row_of, pairs = zip(*kept, strict=True)

    # 2. The judge's verdicts, by all principles or by a random one of each row
    asked = np.ones((len(pairs), len(principles)), dtype=bool)
    if config.principles == "random":
        drawn = random_principles(len(batch), len(principles), config.seed, first)
        asked = drawn[list(row_of), None] == np.arange(len(principles))
    p = verdicts(model, tok, triples, principles, asked, config.micro_batch_tokens)

    # 3. What else knows an order: {name: [n], the first reply's probability to be better, less 1/2}
    known = {} if policy else label_margins(pairs)
    if rewards:
        samples = [Sample(i, [], [], True) for i in range(len(pairs)) for _ in range(2)]
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        total, _ = score_completions(rewards, [(pair.prompt, pair.row) for pair in pairs], samples, texts)
        known["the reward"] = sure_margins(total[::2] - total[1::2])

    written, kept_counts, values = preferences(config, pairs, p, principles, known)
    return written, {**counts, **kept_counts}, values, prompt_numbers(pairs)


def preferences(config, pairs, p, principles, known):
    """Preferences from verdicts p [n, k, 2] -> (rows to write, counts, {figure: its values})."""
    margins = np.round(p.mean(2) - 0.5, 6)  # [n, k]; rounded: mere position bias would leave 1e-17
    votes = np.sign(margins) / 2 if config.principles == "vote" else margins
    margin = np.nanmean(votes, axis=1)  # [n]
    probability = 0.5 + margin  # that the first reply is better
    certainty = np.abs(margin).round(9)  # three votes of five are at --min_margin=0.1, not below it
    kept = (certainty >= config.min_margin) & (certainty > 0)
    counts = {"pairs kept": int(kept.sum()), "pairs dropped, too near to 1/2": int((~kept).sum())}
    written = []
    for i in np.flatnonzero(kept):
        by = np.flatnonzero(np.isfinite(margins[i]))  # the principles that were asked
        pair, verdict, row = pairs[i], p[i, by], other_fields(pairs[i].row, new_answers=bool(config.policy))
        if probability[i] < 0.5:
            pair = pair._replace(chosen=pair.rejected, rejected=pair.chosen)
            verdict, row = 1 - verdict[:, ::-1], swap_sides(row)
        preference = {
            "prompt": question(pair.prompt),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "probability": round(0.5 + certainty[i], 6),
            "verdicts": np.round(verdict, 4).tolist(),  # that chosen is better: as first, as second
        }
        if len(by) == 1:
            preference["principle"] = principles[by[0]]
        written.append(preference | row)
    return written, counts, verdict_values(p, margins, probability, kept, known, principles)


def reply(config, model, tok, as_chat, talks, seed, first, keep_cut=False):
    """A sampled reply {i: text} to each conversation {i: messages}, if it is not cut or empty.

    as_chat: in turns; else as a text, which the model continues up to an empty line.
    """
    prompts = {}
    for i, messages in talks.items():
        if as_chat:
            ids = chat.encode_prompt(tok, messages)
        else:
            text = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages)
            ids = [tok.bos, *tok.encode_ordinary(text + "Assistant:")]
        if len(ids) < model.config.context:
            prompts[i] = ids
    stop = chat.stop_ids(tok) if as_chat else chat.text_stop_ids(tok)
    samples = rollout(model, list(prompts.values()), stop=stop, first=first, **sampling(config, seed))
    replies = {}
    for i, sample in zip(prompts, samples, strict=True):
        text, empty_line = chat.decode_completion(tok, sample.tokens), ""
        if not as_chat:
            text, empty_line, _ = text.partition("\n\n")
            text = text.strip()
        if text.strip() and (sample.finished or empty_line or keep_cut):
            replies[i] = text
    return replies


def ask(talks, replies, request, drawn):
    """The conversations that have a reply, {i: messages}, each with that and a request by the
    principle drawn for it."""
    return {
        i: [*talks[i], rows.message("assistant", text), rows.message("user", request.format(principle=drawn[i]))]
        for i, text in replies.items()
    }


def revise_batch(config, policy, judge, principles, batch, first):
    """Answer the prompts of a batch [(messages, row)] after `first` rows, and revise the answers.

    Returns (rows to write, counts, {figure: its values}, the revisions' `prompt_numbers`).
    """
    (model, tok, _), (critic, critic_tok, info) = policy, judge
    as_chat = config.ask == "chat" or (config.ask == "auto" and chat.is_chat_model(critic_tok, info))
    drawn = [principles[j] for j in random_principles(len(batch), len(principles), config.seed, first)]

    # 1. Answer, 2. criticise (what was cut still says something), 3. revise
    talks = {i: messages for i, (messages, _) in enumerate(batch)}
    answers = reply(config, model, tok, True, talks, config.seed, first)
    talks = ask(talks, answers, CRITIQUE, drawn)
    critiques = reply(config, critic, critic_tok, as_chat, talks, config.seed + 1, first, keep_cut=True)
    talks = ask(talks, critiques, REVISION, drawn)
    revisions = reply(config, critic, critic_tok, as_chat, talks, config.seed + 2, first)

    written = []
    for i, text in revisions.items():
        messages, row = batch[i]
        revised = {"messages": [*messages, rows.message("assistant", text)], "original": answers[i]}
        revised |= {"critique": critiques[i], "principle": drawn[i]}
        written.append(revised | other_fields(row, new_answers=True))
    counts = {"prompts": len(batch), "answers revised": len(written)}
    counts["left out: an answer, critique or revision was cut or empty"] = len(batch) - len(written)
    same = np.array([text == answers[i] for i, text in revisions.items()], dtype=np.float64)
    return written, counts, {"revisions that change nothing": same}, prompt_numbers([batch[i] for i in revisions])


def check_flags(config):
    """Raises UserError for flags that do not go together."""
    if world_size() > 1:
        raise UserError("rlaif.py is one process; for several GPUs start several, each with its own --data and --out")
    if config.mode == "judge" and not config.judge:
        raise UserError("--judge: name the checkpoint that judges; the pretrained model is a good one")
    if config.mode == "revise" and not config.policy:
        raise UserError("--policy: name the checkpoint whose answers are to be revised")
    unread = {"ask": "only --mode=revise reads it"}
    if config.mode == "revise":
        flags = ["principles", "group_size", "min_margin", "micro_batch_tokens", "reward", "reward_timeout"]
        unread = dict.fromkeys(flags, "only --mode=judge reads it")
    elif not config.policy:
        unread |= dict.fromkeys(["group_size", "temperature", "max_new_tokens"], "without --policy nothing is sampled")
    refuse_unread(config, unread)


def show_left_out(config, some):
    """Name the fields of the rows that say something of the answers that stand there."""
    names = {name for row in some for name, value in other_fields(row).items() if speaks_of_answers(name, value)}
    if names:
        listed = ", ".join(f'"{name}"' for name in sorted(names))
        print0(f"{config.data}: fields that speak of other answers than those of --policy are left out: {listed}")


def main(config):
    check_ranges(config)
    device = setup(config.device, config.seed)
    check_flags(config)
    config.out = str(Path(config.out).absolute())  # a reward may have a thread that changes the directory

    # 1. Principles, rows and models
    principles = read_constitution(config.constitution)
    parse = rows.prompt_only if config.policy else reply_pair
    models = {name: checkpoint.load(name, device) for name in dict.fromkeys((config.policy, config.judge)) if name}
    for name, (model, _, _) in models.items():
        if model.config.scalar_head:
            raise UserError(f"{name}: a reward model, which writes nothing")
        model.eval()
    encode = chat.encoder(models[config.policy][1], chat.prompt_length) if config.policy else None
    examples, data = rows.read(config.data, parse, config.skip_bad, config.seed, encode)
    examples = [row.row if encode else row for row in examples[: config.limit or None]]
    # those of one prompt one after the other, mostly in one batch: see figures.py:show_record
    examples = [examples[i] for i in np.argsort(prompt_numbers(examples), kind="stable")]
    if config.policy:
        show_left_out(config, [row for _, row in examples])
    policy, judge = models.get(config.policy), models[config.judge or config.policy]
    data |= checkpoint.fingerprints(*models) | reward_hashes(config.reward, config.constitution)
    rewards = load_rewards(config.reward, device, config.micro_batch_tokens, config.constitution, config.reward_timeout)
    if policy:
        chat.end_of_turn(policy[1])  # UserError if it knows no turns
    if config.mode == "judge":
        prefer_first(*judge[:2], ["?"], config.micro_batch_tokens)  # UserError if it cannot judge

    # 2. Batch by batch
    machine, total = describe(device), len(examples)
    record = open_output(config, {"stage": "rlaif", "config": vars(config), "data": data, **machine})
    print0(f"{total:,} rows from {record['rows']:,}, {len(principles)} principles, on {machine['hardware']}")
    stop, began = Stop(), time.perf_counter() - record["seconds"]
    for first in range(record["rows"], total, config.rows_per_write):
        batch = examples[first : first + config.rows_per_write]
        if config.mode == "judge":
            found = judge_batch(config, policy, judge, principles, rewards, batch, first)
        else:
            found = revise_batch(config, policy, judge, principles, batch, first)
        written, counts, values, prompts = found
        record["seconds"] = seconds = round(time.perf_counter() - began, 3)
        write_batch(config.out, record, written, len(batch), counts, values, prompts)
        done, counted = record["rows"], " | ".join(f"{name} {n:,}" for name, n in counts.items() if n)
        print0(f"row {done:,}/{total:,} | {counted} | eta {clock_time(seconds / done * (total - done))}")
        if stop.agreed() and done < total:
            stop.leave(done, "row")

    # 3. What came of it
    print0(f"\n{show_record(record)}\n\n{config.out}: {record['bytes']:,} bytes in {clock_time(record['seconds'])}")
    script = "sft.py" if config.mode == "revise" else "dpo.py"
    print0(f"next: python {script} --init={config.policy or 'out/sft'} --data={config.out} --out=out/ai")
    if not record["bytes"]:
        print0("warning: no row was written; a lower --min_margin or a larger --max_new_tokens keeps more")


if __name__ == "__main__":
    launch(main, Config)
