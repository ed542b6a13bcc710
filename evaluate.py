"""Measure any checkpoint: each figure with its 95 % interval, as a table and as JSON.

    text        nats a token, bits a byte and nats a document of held-out documents
    complete    greedy continuations that begin with the right answer
    judge       verdicts " A" or " B" between two replies that agree with the label, each pair asked in both orders

Intervals are bootstrap percentiles over documents, problems or pairs (Efron 1979). Chats, reward models and references come with their stages.

    python evaluate.py --model=out/base --text=out/world/stories_val.jsonl --complete=out/world/sums_test.jsonl --judge=out/world/judge_test.jsonl
"""
import json, math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
from common import UserError, launch, replace_text, setup
from data import corpus, tokenizer
from data.pack import pack, split
from data.read import read_jsonl
from data.world import judge_prompt
from kernels.head import linear_logprob
from rollout import rollout


@dataclass
class Config:
    model: str  # a run, a checkpoint, or a downloaded Llama/Qwen2/Qwen3 directory
    text: str = ""  # text to predict, comma-separated: .txt (one document) or .jsonl {"text"}
    complete: str = ""  # .jsonl {"prompt", "answer"}: text, and how it must go on
    judge: str = ""  # .jsonl {"prompt", "reply_a", "reply_b", "principle", "better"}, as data/world.py writes it
    out: str = ""  # JSON file to write; "": only the table
    micro_tokens: int = 16384  # tokens at once: memory, not the result, depends on it
    seed: int = 0  # of the bootstrap
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


def packs(documents, micro_tokens):
    """Packs of at most `micro_tokens` tokens of the given token lists, in order."""
    for first, last in split([len(d) for d in documents], micro_tokens):
        yield pack(documents[first:last])


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
        logp = linear_logprob(model(p.to(device)), model.head, targets.to(device)).double().cpu().numpy()
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


@torch.no_grad()
def prefer_first(model, tok, prompts, micro_tokens):
    """float64 [n]: the probability of " A" against " B" after each judge prompt."""
    labels = [tok.encode_ordinary(text) for text in (" A", " B")]
    if any(len(ids) != 1 for ids in labels):
        raise UserError('" A" and " B" are not single tokens of this tokenizer, so it cannot be a judge')
    head = model.head[[ids[0] for ids in labels]].float()
    documents = [[tok.eot, *tok.encode_ordinary(text)] for text in prompts]
    longest = max(map(len, documents))
    if longest > model.config.context:
        raise UserError(f"a judge prompt of {longest} tokens exceeds the model's context of {model.config.context}")
    hidden = torch.cat([model(p.to(model.embed.device))[p.cu[1:].long() - 1] for p in packs(documents, micro_tokens)])
    return torch.softmax(hidden.float() @ head.T, dim=-1)[:, 0].double().cpu().numpy()


def judge(model, tok, rows, seed, micro_tokens):
    """Agreement with the labels by principle: both orders averaged, one order alone; and how often " A" is said where both orders are asked."""
    ask = lambda row, first, second: judge_prompt(row["prompt"], row[first], row[second], row["principle"])  # noqa: E731
    forward = prefer_first(model, tok, [ask(r, "reply_a", "reply_b") for r in rows], micro_tokens)
    backward = prefer_first(model, tok, [ask(r, "reply_b", "reply_a") for r in rows], micro_tokens)
    a_is_better = np.array([r["better"] == "A" for r in rows])
    both, one = ((forward + 1 - backward) / 2 > 0.5) == a_is_better, (forward > 0.5) == a_is_better
    found = {"position bias": mean_interval((forward + backward) / 2, seed)}
    for principle in dict.fromkeys(r["principle"] for r in rows):
        mine = [r["principle"] == principle for r in rows]
        name = principle.partition(":")[0].strip(".").lower()
        found |= {f"{name}, both orders": mean_interval(both[mine], seed), f"{name}, one order": mean_interval(one[mine], seed)}
    return found


def main(config):
    device = setup(config.device, config.seed)
    model, tok, info = checkpoint.load(config.model, device)
    model.eval()
    figures = {}
    if config.out:  # before the work, not after it
        try:
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            open(config.out, "a").close()
        except OSError as e:
            raise UserError(f"--out={config.out}: {e.strerror}") from None
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
    if not figures:
        raise UserError("nothing to measure: give --text, --complete or --judge")
    for name, f in figures.items():
        print(f"{name:<32} {f['value']:8.4f}   " + ("one row: no interval" if f["low"] is None else f"[{f['low']:.4f}, {f['high']:.4f}]"))
    if config.out:
        result = {"model": config.model, "stage": info.get("stage", ""), "step": info.get("step", 0), "figures": figures}
        replace_text(Path(config.out), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    launch(main, Config)
