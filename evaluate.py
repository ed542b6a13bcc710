"""Measure any checkpoint: each figure with its 95 % interval, as a table and as JSON.

    text        nats a token, bits a byte and nats a document of held-out documents
    complete    greedy continuations that begin with the right answer
    judge       verdicts " A" or " B" between two replies that agree with the label, each pair asked in both orders
    problems    greedy answers whose final number is right
    data        sampled answers to prompts: length, how many ended by themselves, variety, their rewards; beside a --reference the win rate (ties count
                half) on the same prompts and KL(model || reference), estimated by the mean over answers of the sum of log p - log p_ref
    pairs       a reward model on preferences: accuracy, also of pairs alike in length, beside "the longer wins" and what noise allows; calibration

A reward is FILE.py:FUNCTION, reward(prompt, completion, row) -> float (your own code, run with your rights), a reward model's directory, or judge:DIR.
--best_of=N answers each prompt N times and keeps the best: the plainest way to follow a reward. With --samples=FILE these answers are data for sft.py:
rejection-sampling fine-tuning (Llama 2, arXiv 2307.09288, section 3.2.3).
Intervals are bootstrap percentiles over documents, problems, prompts or pairs (Efron 1979).

    python evaluate.py --model=out/base --text=out/world/stories_val.jsonl --complete=out/world/sums_test.jsonl --judge=out/world/judge_test.jsonl
    python evaluate.py --model=out/dpo --reference=out/sft --data=out/world/prompts_test.jsonl --reward=data/world.py:gold,out/rm
    python evaluate.py --model=out/sft --data=out/world/prompts.jsonl --reward=out/rm --best_of=8 --samples=best.jsonl
    python evaluate.py --model=out/rm --pairs=out/world/pairs_val.jsonl
"""
import json, math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
from common import UserError, launch, replace_text, setup
from data import chat, corpus, tokenizer
from data.pack import pack, split
from data.read import read_jsonl
from data.rewards import final_number
from kernels.head import linear_logprob
from model import logprobs
from rollout import answers, judge_score, load_rewards, question, reward_answers, reward_names, rollout, scores


@dataclass
class Config:
    model: str  # a run, a checkpoint, or a downloaded Llama/Qwen2/Qwen3 directory
    text: str = ""  # text to predict, comma-separated: .txt (one document) or .jsonl {"text"}
    complete: str = ""  # .jsonl {"prompt", "answer"}: text, and how it must go on
    judge: str = ""  # .jsonl {"prompt", "reply_a", "reply_b", "principle", "better"}, as data/world.py writes it
    problems: str = ""  # {"prompt" or "question", "answer"}: the number after the answer's last "####" is compared
    data: str = ""  # prompts to answer: {"prompt"} as text or messages, or whole conversations, whose last answer is left out
    pairs: str = ""  # preferences {"prompt", "chosen", "rejected"} for a reward model
    reward: str = ""  # what to score the answers to --data with, comma-separated: FILE.py:FUNCTION, a reward model's directory or judge:DIR
    constitution: str = ""  # for the reward judge:DIR: a file of principles, one a line
    best_of: int = 1  # sample so many answers to each prompt of --data and keep the one that the first --reward likes best
    reference: str = ""  # checkpoint to compare the answers to --data with
    temperature: float = 1.0  # at which --data is answered
    max_new: int = 256  # longest answer, in tokens
    limit: int = 0  # of --data, --problems and --pairs, at most so many rows; 0: all
    out: str = ""  # JSON file to write; "": only the table
    samples: str = ""  # .jsonl file to write the answers to --data to, with their rewards; "": none
    micro_tokens: int = 16384  # tokens at once: memory, not the result, depends on it
    seed: int = 0  # of the answers and of the bootstrap
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def interval(statistic, rows, seed, draws=1000):
    """{"value", "low", "high"}: statistic(rows) and its 95 % bootstrap interval. rows: float64 [n, k], resampled n at a time; statistic: [..., n, k] sums -> number."""
    rows = np.asarray(rows, dtype=np.float64)
    if len(rows) == 1:
        return {"value": float(statistic(rows[0])), "low": None, "high": None}  # nothing can be said from one row
    picks = np.random.default_rng(seed).integers(0, len(rows), (draws, len(rows)))
    low, high = np.percentile([statistic(rows[p].sum(0)) for p in picks], [2.5, 97.5])
    return {"value": float(statistic(rows.sum(0))), "low": float(low), "high": float(high)}


def mean_interval(values, seed):
    """The mean of some numbers, with its interval."""
    return interval(lambda sums: sums[0] / sums[1], [(v, 1) for v in values], seed)


@torch.no_grad()
def document_nats(model, tok, documents, micro_tokens):
    """float64 [D, 3] of (nats, tokens, bytes) of each document; its end counts as a token. Documents longer than the context are read in windows."""
    device, sizes = model.embed.device, tokenizer.token_bytes(tok)
    stream = corpus.encode(tok, documents)
    cut = corpus.pieces([stream], tok.eot, model.config.context)
    owner = np.cumsum(stream == tok.eot)[cut[:, 1]] - 1  # the document of each piece
    totals = np.zeros((len(documents), 3))
    for first, last in split((cut[:, 2] - cut[:, 1]).tolist(), micro_tokens):
        p, targets = corpus.pack_pieces([stream], cut[first:last])
        logp = linear_logprob(model(p.to(device)), model.head, targets.to(device)).cpu().double().numpy()
        documents_of = np.repeat(owner[first:last], np.diff(p.cu.numpy()))
        np.add.at(totals, documents_of, np.stack([-logp, np.ones(len(logp)), sizes[targets.numpy()]], axis=1))
    return totals


def required(path, names):
    """The rows of a JSONL file, each with the given string fields. UserError names the file, line and field where one is missing, and an empty file."""
    rows = list(read_jsonl(path))
    for line, row in rows:
        for name in names:
            if not isinstance(row.get(name), str):
                raise UserError(f'{path}:{line}: no "{name}" string')
    if not rows:
        raise UserError(f"{path}: there is nothing in it")
    return [row for _, row in rows]


def completions_right(model, tok, rows):
    """1 or 0 for each row: does the greedy continuation of its prompt begin with its answer, and not go on inside the same word or number?"""
    prompts = [[tok.eot, *tok.encode_ordinary(row["prompt"])] for row in rows]
    answers = [row["answer"].strip() for row in rows]
    longest = max(len(tok.encode_ordinary(f" {a}")) for a in answers)
    texts = [tok.decode([t for t in s.tokens if t != tok.eot]).strip() for s in rollout(model, prompts, max_new=longest + 1, temperature=0, stop={tok.eot})]
    return [int(t.startswith(a) and not t[len(a) :][:1].isalnum()) for t, a in zip(texts, answers)]


def judge(model, tok, rows, seed, micro_tokens):
    """Agreement with the labels by principle: both orders averaged, one order alone; and how often " A" is said where both orders are asked."""
    found, bias = {}, []
    for principle in dict.fromkeys(r["principle"] for r in rows):
        mine = [r for r in rows if r["principle"] == principle]
        p = judge_score(model, tok, [(r["prompt"], r["reply_a"], r["reply_b"]) for r in mine], principle, micro_tokens)  # that reply A is better, [n, 2]
        a_is_better = np.array([r["better"] == "A" for r in mine])
        name = principle.partition(":")[0].strip(".").lower()
        found[f"{name}, both orders"] = mean_interval((p.mean(1) > 0.5) == a_is_better, seed)
        found[f"{name}, one order"] = mean_interval((p[:, 0] > 0.5) == a_is_better, seed)
        bias.extend((p[:, 0] + 1 - p[:, 1]) / 2)  # how much " A" is said
    found["position bias"] = mean_interval(bias, seed)
    return found


# ---------------------------------------------------------------------------------------------------------------------------------
# Answers


def exact_match(model, tok, problems, max_new):
    """1.0 or 0.0 for each problem (messages, row): does the greedy answer end with the right number?"""
    _, samples, texts = answers(model, tok, [messages for messages, _ in problems], max_new=max_new, temperature=0)
    return [final_number(messages[-1]["content"], text, row | {"finished": s.finished}) for (messages, row), s, text in zip(problems, samples, texts)]


@torch.no_grad()
def answer_logps(model, prompts, samples, temperature, micro_tokens):
    """float64 [n]: the log-probability of each sampled answer, summed over its tokens, at `temperature`."""
    documents, found = [prompts[s.prompt_index] + s.tokens for s in samples], []
    for first, last in split([len(d) for d in documents], micro_tokens):
        logp = logprobs(model, pack(documents[first:last]).to(model.embed.device), temperature).cpu().double()  # Apple's GPUs have no float64
        parts = logp.split([len(d) for d in documents[first:last]])
        found += [part[len(part) - len(s.tokens) :].sum().item() for part, s in zip(parts, samples[first:last])]
    return np.array(found)


def distinct(texts, n):
    """Of the n-grams of words in all texts together, the share that is different (Li et al. 2016, arXiv 1510.03055): 1 never repeats, 0 always does."""
    grams = Counter(tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1))
    return len(grams) / max(1, sum(grams.values()))


def answer_figures(config, model, tok, rows, device):
    """Figures of sampled answers to the prompts of --data, and rows {"prompt", "answer", rewards} of what was said."""
    conversations = [messages for messages, _ in rows]
    rewards = load_rewards(config.reward, device, config.micro_tokens, config.constitution)
    how = dict(max_new=config.max_new, temperature=config.temperature, seed=config.seed)
    prompts, samples, texts = answers(model, tok, conversations, n=config.best_of, **how)
    mean = lambda values: mean_interval(values, config.seed)  # noqa: E731
    (_, found), figures = reward_answers(rewards, rows, samples, texts), {}
    n = 1
    while config.best_of > 1:  # of n answers to each prompt the one that the first reward likes best, a finished one where there is any: n = 1, 2, 4, ...
        value = np.where([s.finished for s in samples], found[rewards[0][0]], -np.inf).reshape(-1, config.best_of)
        choice = value[:, :n].argmax(1) + np.arange(0, len(samples), config.best_of)
        figures |= {f"best of {n}: {name}": mean(v[choice]) for name, v in found.items()}
        bound = math.log(n) - (n - 1) / n  # exact where no two answers are worth the same (Beirami et al. 2024, arXiv 2401.01879)
        figures[f"best of {n}: KL to one answer, at most, nats"] = {"value": bound, "low": None, "high": None}
        if n == config.best_of:
            samples, texts, found = [samples[i] for i in choice], [texts[i] for i in choice], {name: v[choice] for name, v in found.items()}
            break
        n = min(2 * n, config.best_of)
    figures |= {"answer tokens": mean([len(s.tokens) for s in samples]), "answers finished": mean([s.finished for s in samples])}
    figures |= {f"distinct-{n}": {"value": distinct(texts, n), "low": None, "high": None} for n in (1, 2)}
    figures |= {f"reward {name}": mean(values) for name, values in found.items()}
    said = [{"prompt": question(m), "completion": t, "finished": s.finished} | {name: float(v[i]) for name, v in found.items()} for i, (m, t, s) in enumerate(zip(conversations, texts, samples))]
    if config.reference:
        reference, their_tok, _ = checkpoint.load(config.reference, device)
        if reference.config.scalar_head:
            raise UserError(f"--reference={config.reference}: a reward model, which gives no probabilities")
        if tokenizer.fingerprint(their_tok) != tokenizer.fingerprint(tok):
            raise UserError(f"--reference={config.reference}: it has another tokenizer than --model, so their probabilities cannot be compared")
        reference.eval()
        if config.temperature and config.best_of == 1:  # else these are no fair draws, and the mean would not be a KL
            logp, ref_logp = (answer_logps(m, prompts, samples, config.temperature, config.micro_tokens) for m in (model, reference))
            figures["KL to the reference, nats an answer"] = mean(logp - ref_logp)
        _, theirs, their_texts = answers(reference, tok, conversations, **how)
        for name, other in reward_answers(rewards, rows, theirs, their_texts)[1].items():
            figures[f"reference's reward {name}"] = mean(other)
            figures[f"win rate by {name}"] = mean((found[name] > other) + 0.5 * (found[name] == other))
    return figures, said


# ---------------------------------------------------------------------------------------------------------------------------------
# Preferences


def pair_documents(tok, pairs):
    """(chosen, rejected): the token ids of each pair's two conversations."""
    prompts = [chat.encode_prompt(tok, p.prompt) for p in pairs]
    return tuple([ids + chat.encode_answer(tok, text) for ids, text in zip(prompts, side)] for side in ([p.chosen for p in pairs], [p.rejected for p in pairs]))


def preference_figures(pairs, margins, lengths, seed):
    """What a reward model's margins say: {figure: interval}.

    margins float64 [n]: score of the chosen less that of the rejected; lengths [n, 2]: tokens of the two answers. Where the rows know the truth
    ("gold_chosen", "gold_rejected") the agreement with it is told as well, and the accuracy that the noise of the labels allows.
    """
    margins, lengths = np.asarray(margins, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    label = np.array([p.probability for p in pairs])
    right = np.where(margins == 0, 0.5, np.where(margins > 0, label, 1 - label))
    gap = lengths[:, 0] - lengths[:, 1]
    longer = np.where(gap == 0, 0.5, np.where(gap > 0, label, 1 - label))
    alike = np.abs(gap) <= 0.1 * lengths.max(1)
    figures = {"accuracy": mean_interval(right, seed), "accuracy of 'the longer wins'": mean_interval(longer, seed), "accuracy less that of 'the longer wins'": mean_interval(right - longer, seed)}
    if alike.any():
        figures[f"accuracy, {alike.sum()} pairs within 10 % in length"] = mean_interval(right[alike], seed)
    figures["correlation of margin and length gap"] = interval(correlation, np.stack([np.ones(len(gap)), margins, gap, margins**2, gap**2, margins * gap], 1), seed)
    predicted = 1 / (1 + np.exp(-np.abs(margins).clip(max=700)))  # that the side it prefers is the preferred one
    agrees = np.where(margins >= 0, label, 1 - label)
    figures["calibration error"] = {"value": calibration_error(predicted, agrees), "low": None, "high": None}
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        here = (predicted >= low) & (predicted < low + 0.1 + (low == 0.9))
        if here.any():
            figures[f"right where it says {predicted[here].mean():.2f} ({here.sum()} pairs)"] = mean_interval(agrees[here], seed)
    gold = np.array([chat.gold_lead(p.row) for p in pairs])
    if np.isfinite(gold).all():
        apart = gold != 0
        if apart.any():
            figures["order as gold's"] = mean_interval((margins > 0)[apart] == (gold > 0)[apart], seed)
        figures["accuracy that noise allows (Bayes)"] = mean_interval((1 + np.tanh(2 * np.abs(gold))) / 2, seed)  # sigmoid(4 |gold|)
    return figures


def correlation(sums):
    """Pearson's, from the sums of (1, x, y, x^2, y^2, x y)."""
    n, x, y, xx, yy, xy = sums
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


def calibration_error(predicted, agrees, bins=10):
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3): mean |accuracy - confidence| over bins of confidence, by their size."""
    which = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    return float(sum(abs((predicted - agrees)[which == b].sum()) for b in range(bins)) / len(predicted))


def pair_figures(model, tok, pairs, micro_tokens, seed):
    """`preference_figures` of a reward model on some pairs."""
    chosen, rejected = pair_documents(tok, pairs)
    kept = [i for i, sides in enumerate(zip(chosen, rejected)) if max(map(len, sides)) <= model.config.context]
    if len(kept) < len(pairs):
        print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs left out, a side of which is longer than the {model.config.context} tokens of the model's context")
    if not kept:
        raise UserError(f"--pairs: no pair fits into the {model.config.context} tokens of the model's context")
    pairs, chosen, rejected = ([some[i] for i in kept] for some in (pairs, chosen, rejected))
    found = scores(model, chosen + rejected, micro_tokens)
    starts = [len(chat.encode_prompt(tok, p.prompt)) for p in pairs]
    lengths = [(len(c) - s, len(r) - s) for c, r, s in zip(chosen, rejected, starts)]
    return preference_figures(pairs, found[: len(pairs)] - found[len(pairs) :], lengths, seed)


# ---------------------------------------------------------------------------------------------------------------------------------


def show(figures):
    """The figures as lines of text."""
    interval_of = lambda f: "" if f["low"] is None else f"[{f['low']:.4f}, {f['high']:.4f}]"  # noqa: E731
    return "\n".join(f"{name:<48} {f['value']:9.4f}   {interval_of(f)}".rstrip() for name, f in figures.items())


def writable(path, flag):
    """UserError where a file cannot be written: before the work, not after it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
    except OSError as e:
        raise UserError(f"--{flag}={path}: {e.strerror}") from None


def rows_of(source, parse, limit):
    """The rows of a --data-like flag, the first `limit` of them (0: all)."""
    rows, _ = chat.read(source, parse)
    return rows[: limit or None]


def main(config):
    if config.temperature < 0 or config.max_new < 1:
        raise UserError("--temperature and --max_new: at least 0, and at least 1")
    if config.best_of < 1 or (config.best_of > 1 and not config.reward):
        raise UserError("--best_of: at least 1, and for more than 1 it needs a --reward to choose by")
    rewards = reward_names(config.reward)
    if any(weight != 1 for _, weight in rewards):
        raise UserError(f"--reward={config.reward}: a weight says nothing here, every reward is shown by itself; name the one that --best_of is to choose by first")
    if any(name.startswith("judge:") for name, _ in rewards) and (config.best_of < 2 or config.reference):
        raise UserError("--reward=judge:...: it compares the answers to one prompt with each other: --best_of must be 2 or more, and there can be no --reference")
    for flag in ("reward", "reference", "samples"):
        if vars(config)[flag] and not config.data:
            raise UserError(f"--{flag}: needs --data, the prompts to answer")
    device = setup(config.device, config.seed)
    model, tok, info = checkpoint.load(config.model, device)
    model.eval()
    if model.config.scalar_head and any((config.text, config.complete, config.judge, config.problems, config.data)):
        raise UserError(f"--model={config.model}: a reward model writes nothing; it is measured with --pairs, or as the --reward of another model")
    if config.pairs and not model.config.scalar_head:
        raise UserError(f"--pairs: {config.model} is no reward model; reward.py trains one")
    figures, said = {}, []
    for flag in ("out", "samples"):
        if vars(config)[flag]:
            writable(vars(config)[flag], flag)
    if config.text:
        documents = [d for file in config.text.split(",") for d in corpus.read_documents(file)]
        rows = document_nats(model, tok, documents, config.micro_tokens)
        figures["nats/token"] = interval(lambda s: s[0] / s[1], rows, config.seed)
        figures["bits/byte"] = interval(lambda s: s[0] / math.log(2) / s[2], rows, config.seed)
        figures["nats/document"] = mean_interval(rows[:, 0], config.seed)
        figures["tokens/document"] = mean_interval(rows[:, 1], config.seed)
    if config.complete:
        figures["completions right"] = mean_interval(completions_right(model, tok, required(config.complete, ("prompt", "answer"))), config.seed)
    if config.judge:
        rows = required(config.judge, ("prompt", "reply_a", "reply_b", "principle", "better"))
        figures |= {f"judge: {name}": v for name, v in judge(model, tok, rows, config.seed, config.micro_tokens).items()}
    if config.problems:
        figures["problems right, greedy"] = mean_interval(exact_match(model, tok, rows_of(config.problems, chat.problem, config.limit), config.max_new), config.seed)
    if config.data:
        found, said = answer_figures(config, model, tok, rows_of(config.data, chat.prompt_only, config.limit), device)
        figures |= found
    if config.pairs:
        figures |= pair_figures(model, tok, rows_of(config.pairs, chat.preference, config.limit), config.micro_tokens, config.seed)
    if not figures:
        raise UserError("nothing to measure: give --text, --complete, --judge, --problems, --data or --pairs")
    print(show(figures))
    if config.samples:
        if config.best_of > 1:
            said, all_said = [row for row in said if row["finished"]], said  # sft.py would teach the others to end where they were cut
            if len(said) < len(all_said):
                print(f"{config.samples}: {len(all_said) - len(said)} of {len(all_said)} prompts left out, to which no answer came to its end")
        replace_text(Path(config.samples), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in said))
    if config.out:
        result = {"model": config.model, "stage": info.get("stage", ""), "step": info.get("step", 0), "figures": figures}
        replace_text(Path(config.out), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    launch(main, Config)
