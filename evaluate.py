"""Measure any checkpoint: each figure with its 95 % interval, as a table and as JSON.

    text        nats per token, bits per byte and nats per document of held-out documents
    complete    greedy continuations that begin with the right answer
    choices     the choice of the highest log-probability is the right one, raw and per byte; two
                choices are a minimal pair
    judge       verdicts " A" or " B" between two replies that agree with the label, in both orders
    problems    greedy answers whose final number is right, or that --checker finds right; with
                --samples_per_problem=n also pass@k: the probability that one of k samples is
    data        completions sampled to prompts: length, share that ended, variety, rewards. With a
                --reference also the win rate on the same prompts (a tie counts half) and
                KL(model || reference): the mean over completions of sum log p - log p_ref
    pairs       a reward model on preferences: accuracy, also of pairs similar in length, compared
                with "the longer wins" and with what the labels' noise allows; calibration

A reward is FILE.py:FUNCTION, reward(prompt, completion, row) -> float (your own code, run with your
rights), a reward model's directory, or judge:DIR. --best_of=N samples N completions to each prompt
and keeps the best: the plainest way to follow a reward. With --samples=FILE they are data for
sft.py: rejection-sampling fine-tuning (Llama 2, arXiv 2307.09288, section 3.2.3). --kept=FILE keeps
several right answers to a prompt, and none if none is right (R1, 2501.12948, section 2.3.3).

    python evaluate.py --model=out/base --text=stories.jsonl --judge=comparisons.jsonl
    python evaluate.py --model=out/dpo --reference=out/sft --data=prompts.jsonl --reward=out/rm
    python evaluate.py --model=out/sft --data=prompts.jsonl --reward=out/rm --best_of=8
    python evaluate.py --model=out/rl --data=problems.jsonl --reward=data/rules.py:final_number \\
        --best_of=8 --kept=chats.jsonl --by=level
    python evaluate.py --model=out/rm --pairs=pairs.jsonl
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import chat, corpus, rows, tokenizer
from data.judge import question
from data.pack import make_completion, token_slices
from data.read import source_names, split_weight
from figures import (
    agreement,
    distinct,
    interval,
    mean_intervals,
    pass_at_k,
    point_estimate,
    position_bias,
    preference_figures,
    table,
)
from kernels.head import linear_logprob
from model import logprobs_no_grad
from rollout import rollout, sample_completions
from runtime import checkpoint
from runtime.cli import check_ranges, print0
from runtime.errors import UserError
from runtime.files import check_apart, check_writable, json_lines, replace_text, write_json
from runtime.process import launch, setup
from scoring import judge_score, load_rewards, reward_names, reward_scores, score_completions

READ = ("text", "complete", "choices", "judge", "problems", "data", "pairs", "constitution")  # flags that name files
WRITTEN = ("out", "samples", "kept")
FINAL_NUMBER = f"{Path(__file__).parent}/data/rules.py:final_number"


@dataclass
class Config:
    # -- What you will set --
    # a run, a checkpoint, or a downloaded Llama/Qwen2/Qwen3 directory
    model: str
    # text to predict, comma-separated: .txt (one document) or .jsonl {"text"}
    text: str = ""
    # .jsonl {"prompt", "answer"}: text, and how it must continue
    complete: str = ""
    # .jsonl {"prefix" (text) or "question" (to a chat model; also "system"), "choices": [text,
    # ...], "answer": the right one or its index from 0}
    choices: str = ""
    # .jsonl {"prompt", "reply_a", "reply_b", "principle", "better"}, as data/world.py writes it
    judge: str = ""
    # {"prompt" or "question", "answer"}: the number after the answer's last "####" is compared
    problems: str = ""
    # FILE.py:FUNCTION that says in its place whether an answer to --problems is right (more than
    # 0); others after a comma are averaged
    checker: str = ""
    # prompts to complete: {"prompt"} as text or messages, or conversations less their last answer
    data: str = ""
    # preferences {"prompt", "chosen", "rejected"} for a reward model
    pairs: str = ""
    # what scores the completions to --data, comma-separated: FILE.py:FUNCTION, a reward model,
    # judge:DIR
    reward: str = ""
    # checkpoint to compare the completions to --data with
    reference: str = ""
    # JSON file to write; "": only the table
    out: str = ""

    # -- What you may set --
    # for the reward judge:DIR: a file of principles, one per line
    constitution: str = ""
    # completions to each prompt of --data, of which the best by the first --reward is kept [>= 1;
    # <= 1000000]
    best_of: int = 1
    # answers drawn to each of --problems, for pass@k; 0: only the greedy one [<= 1000000]
    samples_per_problem: int = 0
    # .jsonl file for the right ones among --best_of, {"messages"} for sft.py: they ended, the first
    # --reward is more than 0, and no two to a prompt are the same; "": none
    kept: str = ""
    # right ones to keep of each prompt, at most [>= 1]
    keep_per_prompt: int = 4
    # fields of the rows, comma-separated: figures of --problems and counts of --kept also by the
    # first of them, by the first two, ...
    by: str = ""
    # at which --data is completed and --samples_per_problem are drawn [>= 0]
    temperature: float = 1.0
    # longest completion, in tokens [>= 1]
    max_new_tokens: int = 256
    # leave out bad lines, and count them
    skip_bad: bool = False
    # rows of --data, --choices, --problems and --pairs, at most; 0: all
    limit: int = 0
    # .jsonl file for the completions to --data, with their rewards; "": none
    samples: str = ""
    # seconds that a FUNCTION may take over one completion [> 0]
    reward_timeout: float = 60.0
    # seed of the completions and of the bootstrap
    seed: int = 0

    # -- What you will rarely set --
    # tokens at once: memory, not the result, depends on it [>= 1]
    micro_batch_tokens: int = 16384
    # auto, cpu, cuda, cuda:1, mps
    device: str = "auto"


@torch.no_grad()
def document_nats(model, tok, documents, micro_batch_tokens, skip_bad=False):
    """float64 [D, 3]: nats, tokens and bytes of each document, whose end counts as a token.

    A document longer than the model's context is read in windows. Raises UserError for one that
    cannot be tokenized; with `skip_bad`, it is left out with a line that says so.
    """
    device, sizes = model.embed.device, tokenizer.token_bytes(tok)
    stream = corpus.encode(tok, documents, skip_bad)
    n = np.count_nonzero(stream == tok.eot) - (tok.bos == tok.eot)
    if not n:
        raise UserError("--text: the model's tokenizer can read none of its documents")
    cut = corpus.pieces([stream], tok.eot, model.config.context)  # [P, 3]: stream, begin, end
    document = np.cumsum(stream == tok.eot)[cut[:, 1]] - (tok.bos == tok.eot)  # [P], of each piece
    totals = np.zeros((n, 3))
    for part in token_slices((cut[:, 2] - cut[:, 1]).tolist(), micro_batch_tokens):
        pack, targets = corpus.pack_pieces([stream], cut[part])
        logp = linear_logprob(model(pack.to(device)), model.head, targets.to(device)).cpu().double().numpy()  # [N]
        per_token = np.stack([-logp, np.ones(len(logp)), sizes[targets.numpy()]], axis=1)  # [N, 3]
        np.add.at(totals, document[part].repeat(np.diff(pack.cu_seqlens)), per_token)
    return totals


# --------------------------------------------------------------------------------------------------
# What is measured. Each *_figures returns {figure: its values, one per document, problem, ...},
# whose mean is shown; or the figure itself, where it is no mean.


def text_figures(config, model, tok):
    documents = []
    for file in source_names(config.text, "text"):
        documents += corpus.read_documents(file, config.skip_bad)
    written = [document for document in documents if document.strip()]
    if blank := len(documents) - len(written):
        print0(f"--text={config.text}: {blank:,} blank documents are left out")
    totals = document_nats(model, tok, written, config.micro_batch_tokens, config.skip_bad)
    return {
        "nats/token": interval(lambda sums: sums[0] / sums[1], totals, config.seed),
        "bits/byte": interval(lambda sums: sums[0] / math.log(2) / sums[2], totals, config.seed),
        "nats/document": totals[:, 0],
        "tokens/document": totals[:, 1],
    }


def read_strings(path, fields, skip_bad=False):
    """The rows of a file that have these fields, all strings; raises UserError for other rows."""

    def parse(row):
        for field in fields:
            rows.text_of(row.get(field), field)
        if "better" in fields and row["better"] not in ("A", "B"):
            raise ValueError(f'"better" is {row["better"]!r}; "A" or "B" was expected')
        return row

    return rows.read(path, parse, skip_bad)[0]


def read_prompts(path, parse, model, tok, skip_bad):
    """[(messages, row)] of a file; raises UserError naming the line of a prompt that is too
    long."""
    context = model.config.context

    def check(tok, row):
        n = chat.prompt_length(tok, row)
        if n >= context:
            raise UserError(f"a prompt of {n} tokens: the model's context of {context} leaves no room for an answer")

    return [row for row, _ in rows.read(path, parse, skip_bad, encode=chat.encoder(tok, check))[0]]


def completions_right(model, tok, examples):
    """[bool]: whether the greedy continuation of each "prompt" begins with its "answer".

    It must not continue within the same word or number.
    """
    prompts = [[tok.bos, *tok.encode_ordinary(row["prompt"])] for row in examples]
    answers = [row["answer"].strip() for row in examples]
    longest = max(len(tok.encode_ordinary(f" {answer}")) for answer in answers)
    stop = chat.text_stop_ids(tok)
    samples = rollout(model, prompts, max_new_tokens=longest + 1, temperature=0, stop=stop)
    right = []
    for sample, answer in zip(samples, answers, strict=True):
        text = tok.decode([token for token in sample.tokens if token not in stop]).strip()
        following = text[len(answer) : len(answer) + 1]
        right.append(text.startswith(answer) and not following.isalnum())
    return right


def multiple_choice(row):
    """{"prefix" or "question", "choices", "answer"} -> (row, index of the right choice).

    Raises ValueError saying what is wrong with it.
    """
    before_choices(row)
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError('"choices" must be a list of two or more strings, none of them empty')
    if len(set(choices)) < len(choices):
        raise ValueError('two of the "choices" are the same')
    if isinstance(answer, str) and answer in choices:
        return row, choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return row, answer
    raise ValueError(f'"answer" is {answer!r}; one of the "choices" or its index from 0 was expected')


def before_choices(row):
    """The "prefix" of a row, a text, or its question as messages, with system message and all.

    Raises ValueError for anything else that is said and is no part of it.
    """
    rest = {name: value for name, value in row.items() if name not in ("prefix", "choices", "answer")}
    if isinstance(row.get("prefix"), str):
        rest, text = rows.normalise(rest, answered=False), [rows.message("user", row["prefix"])]
        rows.check_repeated(rest, [*rows.FIELDS, *rows.system_columns(rest)], text)
        return row["prefix"]
    if not rows.first_stated(rest, (*rows.PROMPTS, *rows.CONVERSATIONS)):
        fields = rows.names(row)
        raise ValueError(f'"prefix" (a text) or "question" (to a chat model) was expected; the fields are {fields}')
    return rows.prompt(rest)


def choice_chats(tok, row):
    """[Chat]: each choice after the row's beginning, its own tokens marked as trained.

    A choice's tokens are those of the whole text after the first place where the tokens of some
    choice part from those of the beginning alone: a token may span the two ("A: " + "yes").
    """
    before = before_choices(row)
    if not isinstance(before, str):
        ids = chat.encode_prompt(tok, before)
        return [make_completion(ids, tok.encode_ordinary(choice)) for choice in row["choices"]]
    alone = [tok.bos, *tok.encode_ordinary(before)]
    whole = [[tok.bos, *tok.encode_ordinary(before + choice)] for choice in row["choices"]]
    shared = min(len(os.path.commonprefix([alone, ids])) for ids in whole)
    return [make_completion(ids[:shared], ids[shared:]) for ids in whole]


def choice_figures(config, model, tok, examples):
    """How often the right choice has the highest log-probability, raw and per byte of its text."""
    chats = [choice for row, _ in examples for choice in choice_chats(tok, row)]
    longest = max(len(choice.ids) for choice in chats)
    if longest > model.config.context:
        raise UserError(
            f"--choices={config.choices}: a choice and what comes before it have {longest} tokens, the model's context "
            f"{model.config.context}; shorten it"
        )
    logp = logprobs_no_grad(model, chats, 1.0, config.micro_batch_tokens).cpu().double()  # [M]
    sums = [part.sum().item() for part in logp.split([int(choice.loss_mask.sum()) for choice in chats])]
    raw, per_byte, share = [], [], []
    for row, answer in examples:
        scores, sums = np.array(sums[: len(row["choices"])]), sums[len(row["choices"]) :]
        sizes = np.array([len(choice.encode()) for choice in row["choices"]])
        raw.append(right_share(scores, answer))
        per_byte.append(right_share(scores / sizes, answer))
        share.append(np.exp(scores[answer] - np.logaddexp.reduce(scores)))
    return {
        "choices right": raw,
        "choices right, per byte": per_byte,
        "probability of the right one among the choices": share,
    }


def right_share(scores, answer):
    """Whether choice number `answer` scores highest; of several that do, one is taken by chance."""
    best = scores == scores.max()
    return best[answer] / best.sum()


def group_rows(examples, by):
    """{label: [index]} of the rows [(messages, row)], "" for all: by the first of the fields `by`,
    by the first two, ..., in order.

    Raises UserError if a row has no such field.
    """
    found = {}
    for i, (_, row) in enumerate(examples):
        label = ""
        for field in filter(None, by.split(",")):
            if field not in row:
                raise UserError(f"--by={by}: row {i + 1} has no field {field!r}; its fields: {', '.join(row)}")
            label += f", {field} {row[field]}"
            found.setdefault(label, []).append(i)
    return {"": [*range(len(examples))], **dict(sorted(found.items()))}


def problem_figures(config, model, tok, problems, device):
    """Greedy answers that are right, and of --samples_per_problem pass@k for k = 1, 2, 4, ...,
    their length, and the mean of every --checker after the first; all of it also --by fields."""
    names, limits = config.checker or FINAL_NUMBER, {"timeout": config.reward_timeout}
    checkers = load_rewards(names, device, config.micro_batch_tokens, **limits, flag="checker")
    first, *others = [name for name, _, _ in checkers]
    groups = group_rows(problems, config.by)
    _, samples, _, scores = sample_and_score(config, model, tok, problems, checkers, temperature=0)
    cut = np.mean([not sample.finished for sample in samples])
    if cut > 0.5:
        print0(f"warning: --max_new_tokens={config.max_new_tokens} cuts {cut:.0%} of the greedy answers; raise it")
    values = {"problems right, greedy": scores[first] > 0}
    n = config.samples_per_problem
    if n:
        _, samples, _, scores = sample_and_score(config, model, tok, problems, checkers, n, config.temperature)
        counts = (scores[first] > 0).reshape(-1, n).sum(1)
        k = 1
        while k <= n:
            values[f"problems right, pass@{k} of {n} samples"] = [pass_at_k(n, int(count), k) for count in counts]
            k *= 2
        values["tokens per sample"] = np.reshape([len(sample.tokens) for sample in samples], (-1, n)).mean(1)
        values |= {f"samples: {name}": scores[name].reshape(-1, n).mean(1) for name in others}
    return {name + label: np.take(each, mine) for label, mine in groups.items() for name, each in values.items()}


def judge_figures(config, model, tok, examples):
    """Agreement with the labels by principle, and the position bias.

    The bias is how much the judge says " A" if both orders are asked: 1/2 is none.
    """
    values, bias = {}, []
    for principle in dict.fromkeys(row["principle"] for row in examples):
        mine = [row for row in examples if row["principle"] == principle]
        triples = [(row["prompt"], row["reply_a"], row["reply_b"]) for row in mine]
        p = judge_score(model, tok, triples, principle, config.micro_batch_tokens)  # [n, 2]: A is better
        a_is_better = np.array([row["better"] == "A" for row in mine])
        name = principle.partition(":")[0].strip(".").lower()
        margins = np.round(p.mean(1) - 0.5, 12)  # orders that cancel are a tie, whatever their last bit
        values[f"judge: {name}, both orders"] = agreement(margins, a_is_better)
        values[f"judge: {name}, one order"] = agreement(p[:, 0] - 0.5, a_is_better)
        bias.extend(position_bias(p))
    return values | {"judge: position bias": bias}


def sample_and_score(config, model, tok, examples, rewards, n=1, temperature=1.0):
    """Sample n completions to each prompt -> (prompts, samples, texts, {reward: float64 [n]})."""
    conversations = [messages for messages, _ in examples]
    sampling = {"max_new_tokens": config.max_new_tokens, "temperature": temperature, "seed": config.seed}
    prompts, samples, texts = sample_completions(model, tok, conversations, n=n, **sampling)
    _, scores = score_completions(rewards, examples, samples, texts)
    return prompts, samples, texts, scores


def best_of_n(config, samples, scores, first_reward):
    """The best of the first n completions to each prompt, for n = 1, 2, 4, ..., --best_of.

    That is the one the first reward scores highest, of those that finished if any did. Returns
    their values, and int64 [prompts]: the best of all --best_of.
    """
    largest = config.best_of
    finished = [sample.finished for sample in samples]
    order = np.unique(scores[first_reward], return_inverse=True)[1]  # from 0; ties have one place
    ranking = np.where(finished, order, order - len(samples)).reshape(-1, largest)  # [prompts, n]
    values, sizes = {}, [1]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    for n in sizes:
        best = ranking[:, :n].argmax(1) + np.arange(0, len(samples), largest)
        values |= {f"best of {n}: {name}": score[best] for name, score in scores.items()}
        # exact if no two completions score the same (Beirami et al. 2024, arXiv 2401.01879)
        bound = math.log(n) - (n - 1) / n
        values[f"best of {n}: KL to one completion, at most, nats"] = point_estimate(bound)
    return values, best


def sequence_logprobs(config, model, prompts, samples):
    """float64 [n]: the log-probability of each sampled completion, summed over its tokens."""
    chats = [make_completion(prompts[sample.prompt_index], sample.tokens) for sample in samples]
    logp = logprobs_no_grad(model, chats, config.temperature, config.micro_batch_tokens)  # [M]
    lengths = [len(sample.tokens) for sample in samples]
    return np.array([part.sum().item() for part in logp.cpu().double().split(lengths)])


def completion_figures(config, model, tok, examples, device):
    """Figures of completions sampled to prompts, and what was sampled.

    examples: [(messages, row)]. Returns ({figure: its values}, [{"prompt", "completion",
    "finished", reward: value}], [the texts kept of each prompt for --kept]).
    """
    reference = None
    if config.reference:
        reference = checkpoint.load_matching(config.reference, model, tok, f"--reference={config.reference}")
    rewards = load_rewards(config.reward, device, config.micro_batch_tokens, config.constitution, config.reward_timeout)
    draws = config.best_of, config.temperature
    prompts, samples, texts, scores = sample_and_score(config, model, tok, examples, rewards, *draws)
    values, kept = {}, []
    if config.kept:
        kept = right_answers(config, len(examples), samples, texts, scores[rewards[0][0]] > 0)
    if config.best_of > 1:
        values, best = best_of_n(config, samples, scores, rewards[0][0])
        samples, texts = [samples[i] for i in best], [texts[i] for i in best]
        scores = {name: score[best] for name, score in scores.items()}
    values["completion tokens"] = [len(sample.tokens) for sample in samples]
    values["completions finished"] = [sample.finished for sample in samples]
    variety = {f"distinct-{n}": distinct(texts, n) for n in (1, 2)}
    values |= {name: point_estimate(share) for name, share in variety.items() if share is not None}
    values |= {f"reward {name}": score for name, score in scores.items()}

    if reference:
        if config.temperature and config.best_of == 1:  # else these are not fair draws, and the mean is no KL
            logp = sequence_logprobs(config, model, prompts, samples)
            ref_logp = sequence_logprobs(config, reference, prompts, samples)
            values["KL to the reference, nats per completion"] = logp - ref_logp
        once = 1, config.temperature
        _, refs, ref_texts, ref_scores = sample_and_score(config, reference, tok, examples, rewards, *once)
        own = [(text, sample.finished) for text, sample in zip(texts, samples, strict=True)]
        others = [(text, sample.finished) for text, sample in zip(ref_texts, refs, strict=True)]
        # the same answer is a tie, though a reward model may round differently in another batch
        differ = [mine != other for mine, other in zip(own, others, strict=True)]
        for name, ref_score in ref_scores.items():
            values[f"reference's reward {name}"] = ref_score
            values[f"win rate by {name}"] = agreement(np.where(differ, scores[name] - ref_score, 0.0), 1.0)

    sampled = []
    for i, (messages, _) in enumerate(examples):
        row = {"prompt": question(messages), "completion": texts[i], "finished": samples[i].finished}
        # a reward model may lie in a directory called prompt
        sampled.append(row | {f"./{name}" if name in row else name: float(score[i]) for name, score in scores.items()})
    return values, sampled, kept


def pair_figures(config, model, tok, pairs):
    """`preference_figures` of a reward model on the pairs whose sides fit into its context."""
    encoded = [chat.encode_pair(tok, pair) for pair in pairs]
    kept = chat.fitting_pairs(encoded, model.config.context, "--pairs")
    chosen, rejected = zip(*[encoded[i] for i in kept], strict=True)
    scores = reward_scores(model, [side.ids for side in chosen + rejected], config.micro_batch_tokens)
    margins = scores[: len(kept)] - scores[len(kept) :]
    lengths = [(c.loss_mask.sum(), r.loss_mask.sum()) for c, r in zip(chosen, rejected, strict=True)]
    return preference_figures([pairs[i] for i in kept], margins, lengths, config.seed)


def right_answers(config, prompts, samples, texts, right):
    """[[text]] of each prompt: the right completions that ended, at most --keep_per_prompt
    different ones. right: bool [samples]."""
    kept = [[] for _ in range(prompts)]
    for sample, text, is_right in zip(samples, texts, right, strict=True):
        mine = kept[sample.prompt_index]
        if is_right and sample.finished and text not in mine and len(mine) < config.keep_per_prompt:
            mine.append(text)
    return kept


def write_kept(config, examples, kept):
    """Write the `right_answers` to --kept, for sft.py. A file that is there stays if there are
    none."""
    chats = []
    for (messages, _), some in zip(examples, kept, strict=True):
        chats += [{"messages": [*messages, rows.message("assistant", text)]} for text in some]
    if chats:
        replace_text(config.kept, json_lines(chats))
    return ""


def show_kept(config, groups, kept):
    """Print how many answers to how many prompts of each group were kept. groups: of `group_rows`;
    kept: `right_answers`. Raises UserError if there is none."""
    for label, mine in groups.items():
        n, solved = sum(len(kept[i]) for i in mine), sum(bool(kept[i]) for i in mine)
        print0(f"{config.kept}{label}: {n:,} right answers to {solved:,} of {len(mine):,} prompts")
    if not any(kept):
        raise UserError(
            f"--kept={config.kept}: not written, for no completion is right and ended; raise --best_of or "
            "--max_new_tokens, or give easier prompts"
        )


def write_samples(config, sampled):
    """Write the completions to --samples, of the best of n only those that finished -> what there
    is to say of it, a line or ""."""
    written = sampled
    if config.best_of > 1:  # data for sft.py, which would teach a model to end where the others were cut
        written = [row for row in sampled if row["finished"]]
    replace_text(config.samples, json_lines(written))
    left_out, n = len(sampled) - len(written), len(sampled)
    return f"{config.samples}: {left_out} of {n} prompts left out: no completion finished\n" if left_out else ""


def write_figures(config, info, figures):
    """Write all figures to --out -> the line that says so."""
    result = {"model": config.model, "stage": info.get("stage", ""), "step": info.get("step", 0)}
    write_json(config.out, result | {"figures": figures})
    return f"\n{config.out}: these figures as JSON\n"


def write_files(config, info, figures, examples, sampled, kept):
    """Write --kept, --samples and --out, each also if another cannot be written -> (what there is
    to say of them, the first UserError or None)."""
    writers, said, failed = [], "", None
    if config.kept:
        writers.append(partial(write_kept, config, examples, kept))
    if config.samples:
        writers.append(partial(write_samples, config, sampled))
    if config.out:
        writers.append(partial(write_figures, config, info, figures))
    for write in writers:
        try:
            said += write()
        except UserError as e:
            failed = failed or e
    return said, failed


def check_flags(config):
    """Raises UserError for flags that are out of range, or that need another one."""
    check_ranges(config)
    for flag in ("reward", "reference", "samples", "kept"):
        if vars(config)[flag] and not config.data:
            raise UserError(f"--{flag}: needs --data, the prompts to complete")
    for flag in ("samples_per_problem", "checker"):
        if vars(config)[flag] and not config.problems:
            raise UserError(f"--{flag}: needs --problems")
    if config.kept and not config.reward:
        raise UserError("--kept: needs a --reward, which is more than 0 for the right answers")
    if config.by and not (config.problems or config.kept):
        raise UserError("--by: needs --problems or --kept, which are told apart by it")
    for name, weight in reward_names(config.checker, "checker"):
        if weight != 1:
            raise UserError(f"--checker={config.checker}: a weight means nothing here; the first says what is right")
        if name.startswith("judge:"):
            raise UserError(f"--checker={name}: a judge compares; name a function or a reward model")
    if config.best_of > 1 and not config.reward:
        raise UserError("--best_of: more than 1 needs a --reward to choose by")
    for name, weight in reward_names(config.reward):
        if weight != 1:
            raise UserError(f"--reward={config.reward}: a weight means nothing here; --best_of chooses by the first")
        if name.startswith("judge:") and (config.best_of < 2 or config.reference):
            raise UserError(f"--reward={name}: a judge compares: --best_of must be 2 or more, without --reference")


def check_outputs(config):
    """Make the paths of the files to write absolute: a reward may have a thread that changes the
    directory. Raises UserError for one that cannot be written, or is read or written besides."""
    files = {flag: vars(config)[flag] for flag in (*READ, *WRITTEN)}
    for flag in WRITTEN:
        if files[flag]:
            check_writable(flag, files[flag])
            others = ",".join(names for other, names in files.items() if other != flag)
            check_apart(flag, files[flag], [split_weight(name)[0] for name in others.split(",")])
            setattr(config, flag, str(Path(files[flag]).absolute()))


def main(config):
    # 1. The flags and the model
    check_flags(config)
    device = setup(config.device, config.seed)
    model, tok, info = checkpoint.load(config.model, device)
    model.eval()
    writes = not model.config.scalar_head
    if not writes and any((config.text, config.complete, config.choices, config.judge, config.problems, config.data)):
        raise UserError(f"--model={config.model}: a reward model writes nothing; it is measured with --pairs")
    if config.pairs and writes:
        raise UserError(f"--pairs: {config.model} is not a reward model; reward.py trains one")
    check_outputs(config)

    # 2. Measure
    values, limit = {}, config.limit or None
    examples, sampled, kept = [], [], []
    if config.text:
        values |= text_figures(config, model, tok)
    if config.complete:
        examples = read_strings(config.complete, ("prompt", "answer"), config.skip_bad)
        values["completions right"] = completions_right(model, tok, examples)
    if config.choices:
        examples = rows.read(config.choices, multiple_choice, config.skip_bad)[0][:limit]
        values |= choice_figures(config, model, tok, examples)
    if config.judge:
        fields = ("prompt", "reply_a", "reply_b", "principle", "better")
        examples = read_strings(config.judge, fields, config.skip_bad)
        values |= judge_figures(config, model, tok, examples)
    if config.problems:
        parse = rows.prompt_only if config.checker else rows.problem
        problems = read_prompts(config.problems, parse, model, tok, config.skip_bad)[:limit]
        values |= problem_figures(config, model, tok, problems, device)
    if config.data:
        examples = read_prompts(config.data, rows.prompt_only, model, tok, config.skip_bad)[:limit]
        groups = group_rows(examples, config.by) if config.kept else {}
        found, sampled, kept = completion_figures(config, model, tok, examples, device)
        values |= found
    if config.pairs:
        pairs = rows.read(config.pairs, rows.preference, config.skip_bad)[0][:limit]
        values |= pair_figures(config, model, tok, pairs)
    if not values:
        raise UserError(
            "nothing to measure: give --text, --complete, --choices, --judge, --problems, --data or --pairs"
        )

    # 3. Write, then show: what was sampled is not lost to a reader who has left, or a full disk
    figures = mean_intervals(values, config.seed)
    remarks, failed = write_files(config, info, figures, examples, sampled, kept)
    print0(f"{table(figures)}\n{remarks}", end="")
    if failed:
        raise failed
    if config.kept:
        show_kept(config, groups, kept)


if __name__ == "__main__":
    launch(main, Config)
