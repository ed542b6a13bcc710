"""Sharpen: AI feedback. A model judges answers, or improves them, by the principles of a constitution; what comes out is data for the other stages.

    p(a better than b) = mean over principles and both orders of  P(" A") / (P(" A") + P(" B"))  after "Question ... Reply A ... Reply B ... principle Better:"

--mode=judge   compares two answers and writes preferences {"prompt", "chosen", "rejected", "probability"}. reward.py and dpo.py take the probability as it is:
               a soft label (Lee et al. 2023, arXiv 2309.00267). Both orders are asked, for a judge favours one place: the mean takes that out. The answers
               are sampled from --policy, or pairs that --data has already ("chosen"/"rejected" or "reply_a"/"reply_b"); then agreement with its labels is told.
--mode=revise  has answers of --policy criticised by a random principle and written anew, as chats for sft.py: the supervised half of constitutional AI
               (Bai et al. 2022, arXiv 2212.08073).

--principles=vote counts the principles that prefer an answer, however sure of it they are: by mean, one of which the judge is very sure decides alone, and a
small judge is often surest of the least. With three principles, --min_margin=0.3 then keeps the pairs on which they all agree.

A pretrained model often judges better than a fine-tuned one, which has forgotten some of what it read; it must not be the policy that learns from it. A model
of a million parameters can judge, if it has read judgements; it cannot write a critique that means anything. --out is written batch by batch, and with
--resume goes on where it stopped, to the same bytes. FILE.log.jsonl beside it has the figures. The judge as a reward, without pairs: --reward=judge:DIR of
ppo.py, grpo.py, evaluate.py.

    python rlaif.py --policy=out/sft --judge=out/base --constitution=data/constitution.txt --data=prompts.jsonl --out=out/ai_pairs.jsonl
    python rlaif.py --judge=out/base --constitution=data/constitution.txt --data=pairs.jsonl --out=out/ai_pairs.jsonl
    python rlaif.py --mode=revise --policy=out/sft --constitution=data/constitution.txt --data=prompts.jsonl --out=out/revised.jsonl
"""
import dataclasses, json, math, os, time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

import checkpoint
from common import Stop, UserError, check, clock_time, describe, launch, lock, replace_text, setup, world_size
from data import chat
from data.world import judge_prompt
from rollout import Sample, answers, judge_score, load_rewards, question, read_constitution, reward_answers, reward_hashes, rollout, transcript


@dataclass
class Config:
    constitution: str  # text file of principles, one a line
    data: str  # prompts {"prompt"}, or without --policy pairs: .jsonl, .parquet or hf:NAME, comma-separated, with or without :WEIGHT (see data/chat.py)
    out: str  # .jsonl file to write
    mode: str = "judge"  # judge: write preferences; revise: write chats whose answers were criticised and revised
    policy: str = ""  # checkpoint that answers the prompts, a run of sft.py or later; "": --data has pairs of answers
    judge: str = ""  # checkpoint that judges or criticises: any run, or a downloaded Llama/Qwen2/Qwen3 directory; to revise "" means --policy
    principles: str = "mean"  # how they make one probability: mean of theirs; vote, the share of them that prefer it; or random, one for each prompt
    n: int = 2  # answers sampled to a prompt; every two of them are a pair
    temperature: float = 1.0  # at which answers, critiques and revisions are sampled
    max_new: int = 256  # longest of them, in tokens; an answer or a revision that was cut is left out
    min_margin: float = 0.05  # drop a pair whose probability is nearer to 1/2 than this
    ask: str = "auto"  # how a critique is asked for: as chat, as text to continue, or auto: chat where the judge is a run of sft.py or later
    reward: str = ""  # compare the judge's order with that of this reward, as evaluate.py takes it: data/world.py:gold
    batch: int = 256  # rows of --data between two writes: what a kill can cost
    limit: int = 0  # of --data at most so many rows; 0: all
    skip_bad: bool = False  # leave bad lines of the data out, and count them
    micro_tokens: int = 16384  # tokens a judge reads at once: memory depends on it
    seed: int = 0  # of the answers and the random principles
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    resume: bool = False  # go on with the file in --out
    overwrite: bool = False  # replace it


FREE = {"out", "resume", "overwrite", "device"}
CRITIQUE = "Think of this principle: {principle}\nIn which ways does your last answer go against it?"
REVISION = "Now write that answer anew, so that it keeps to the principle: {principle}\nWrite the new answer and nothing else."
SOURCES = {"prompt", "question", "messages", "conversations", "instruction", "input", "output", "completion", "chosen", "rejected", "reply_a", "reply_b", "better",
           "probability", "principle", "verdicts", "original", "critique"}  # fmt: skip  # what a row written here has in other words


def check_flags(config):
    """UserError for a value that has the right type and no meaning, and for flags that do not go together."""
    good = {"mode": config.mode in ("judge", "revise"), "principles": config.principles in ("mean", "vote", "random"), "n": config.n > 1, "batch": config.batch > 0,
            "temperature": 0 <= config.temperature < math.inf, "max_new": config.max_new > 0, "min_margin": 0 <= config.min_margin < 0.5,
            "ask": config.ask in ("auto", "chat", "text"), "out": config.out.endswith(".jsonl"),
            }  # fmt: skip
    check(config, good)
    if config.resume and config.overwrite:
        raise UserError("--resume and --overwrite: choose one")
    if config.mode == "judge" and not config.judge:
        raise UserError("--judge: name the checkpoint that judges; the pretrained model is a good one")
    if config.mode == "revise" and not config.policy:
        raise UserError("--policy: name the checkpoint whose answers are to be revised")
    if config.mode == "revise" and config.reward:
        raise UserError("--reward: only --mode=judge has an order to compare with; evaluate.py measures answers")
    if world_size() > 1:
        raise UserError("rlaif.py is one process; for several GPUs start it several times, each with its own part of --data and its own --out")


# ---------------------------------------------------------------------------------------------------------------------------------
# Judge


def others(row):
    """The fields of a row that are neither its question nor its answers: "answer" of a problem, say."""
    return {name: value for name, value in row.items() if name not in SOURCES}


def two_answers(row):
    """A preference, or {"prompt", "reply_a", "reply_b"} with or without "better": "A" or "B" -> (messages, row, (answer, answer), probability that the first is better or nan)."""
    if "reply_a" in row or "reply_b" in row:
        label = 1.0 if row.get("better") == "A" else 0.0 if row.get("better") == "B" else math.nan
        return chat.prompt(row), row, tuple(chat.text_of(row.get(name), name).strip() for name in ("reply_a", "reply_b")), label
    if "chosen" not in row:
        raise ValueError(f'no pair of answers in the fields {", ".join(row) or "(none)"}, neither "chosen" and "rejected" nor "reply_a" and "reply_b"; --policy=CHECKPOINT samples them')
    pair = chat.preference(row)
    return pair.prompt, row, (pair.chosen, pair.rejected), pair.probability


def sampled_pairs(config, policy, rows, first):
    """Every two different answers of the policy to each row's prompt: ([(index of the row, answer, answer)], counts). first: how many rows came before."""
    model, tok = policy
    fits = [i for i, (messages, _) in enumerate(rows) if len(chat.encode_prompt(tok, messages)) < model.config.context]
    how = dict(max_new=config.max_new, temperature=config.temperature, n=config.n, seed=config.seed)
    _, samples, texts = answers(model, tok, [rows[i][0] for i in fits], first=first * config.n, **how) if fits else ([], [], [])
    pairs, counts = [], Counter({"prompts too long": len(rows) - len(fits)})
    for k, i in enumerate(fits):
        own = [texts[j] for j in range(k * config.n, (k + 1) * config.n) if samples[j].finished and texts[j]]
        found = list(combinations(dict.fromkeys(own), 2))
        pairs += [(i, a, b) for a, b in found]
        counts.update({"answers cut or empty": config.n - len(own), "ties (twice the same answer)": math.comb(len(own), 2) - len(found)})
    return pairs, counts


def verdicts(model, tok, triples, principles, which, micro_tokens):
    """float64 [n, k, 2]: the probability that the first answer is better, in this order and in the other, by each of the k principles which[i] (indices [n, k])."""
    p = np.zeros((*which.shape, 2))
    for j, principle in enumerate(principles):
        asked, column = np.nonzero(which == j)
        if len(asked):
            p[asked, column] = judge_score(model, tok, [triples[i] for i in asked], principle, micro_tokens)
    return p


def random_principles(n, principles, seed, first):
    """The index of a principle for each of n rows, of which `first` came before: it depends on the seed and the row alone."""
    return np.array([np.random.default_rng([seed, first + i]).integers(len(principles)) for i in range(n)], dtype=np.int64)


def judge_batch(config, policy, judge, principles, rewards, rows, first):
    """Some rows, of which `first` came before -> (rows to write, counts, {figure: values})."""
    model, tok, _ = judge
    if policy:
        pairs, counts = sampled_pairs(config, policy[:2], rows, first)
    else:
        pairs = [(i, *texts) for i, (_, _, texts, _) in enumerate(rows) if texts[0] != texts[1]]
        counts = Counter({"ties (twice the same answer)": len(rows) - len(pairs)})
    longest = max(principles, key=lambda text: len(tok.encode_ordinary(text)))
    fits = [(i, a, b) for i, a, b in pairs if len(tok.encode_ordinary(judge_prompt(transcript(rows[i][0]), a, b, longest))) < model.config.context]
    counts.update({"prompts": len(rows), "pairs too long for the judge": len(pairs) - len(fits), "pairs judged": len(fits), "pairs kept": 0})
    if not fits:
        return [], counts, {}

    owner = np.array([i for i, _, _ in fits])
    which = np.tile(np.arange(len(principles)), (len(fits), 1))
    if config.principles == "random":
        which = random_principles(len(rows), principles, config.seed, first)[owner][:, None]
    p = verdicts(model, tok, [(transcript(rows[i][0]), a, b) for i, a, b in fits], principles, which, config.micro_tokens)
    each = np.round(p.mean(2) - 0.5, 6)  # the principles' own leads, both orders averaged: [n, k]; rounded, for a judge of mere position bias leaves 1e-17
    probability = 0.5 + (np.sign(each) / 2 if config.principles == "vote" else each).mean(1)
    margin = np.abs(probability - 0.5)
    kept = (margin >= config.min_margin) & (margin > 0)
    counts.update({"pairs kept": int(kept.sum()), "pairs dropped, too near to 1/2": int((~kept).sum())})

    figures = {"confidence, all pairs": 0.5 + margin, "confidence, kept pairs": 0.5 + margin[kept]} | order_figures(p.reshape(-1, 2))
    for name, lead in leads(rewards, rows, fits, labelled=not policy).items():
        apart, agrees = np.isfinite(lead) & (lead != 0), (probability > 0.5) == (lead > 0)
        figures |= {f"agrees with {name}, all pairs": agrees[apart], f"agrees with {name}, kept pairs": agrees[apart & kept]}
        figures |= {f"agrees with {name}, by: {text}": ((each > 0) == (lead > 0)[:, None])[apart[:, None] & (which == j)] for j, text in enumerate(principles)}
    figures |= {f"{name}, by: {text}": values for j, text in enumerate(principles) for name, values in order_figures(p[which == j]).items()}
    written = []
    for k in np.flatnonzero(kept):
        i, a, b = fits[k]
        row, turned = others(rows[i][1]), probability[k] < 0.5
        if turned:  # what the row knows of its two sides, "gold_chosen" say, changes sides with them
            row = {name.replace("chosen", "\0").replace("rejected", "chosen").replace("\0", "rejected"): value for name, value in row.items()}
        mine = {"prompt": question(rows[i][0]), "chosen": b if turned else a, "rejected": a if turned else b, "probability": round(0.5 + margin[k], 6)}
        mine["verdicts"] = np.round(1 - p[k, :, ::-1] if turned else p[k], 4).tolist()  # by each principle: chosen is better, when it stands first and when second
        written.append(mine | ({"principle": principles[which[k, 0]]} if which.shape[1] == 1 else {}) | row)
    return written, counts, figures


def order_figures(p):
    """What the two orders of the same question say of the judge. p [n, 2]: that the first answer is better, when it stands first and when it stands second."""
    return {'position bias (how much " A" is said)': (p[:, 0] + 1 - p[:, 1]) / 2, "the two orders contradict each other": (p[:, 0] > 0.5) != (p[:, 1] > 0.5)}


def leads(rewards, rows, pairs, labelled):
    """{what knows an order: by how much the first answer of each pair leads; nan where it does not know}: a --reward, the rows' own gold and labels."""
    found = {}
    if labelled:
        found["the labels"] = np.array([rows[i][3] - 0.5 for i, _, _ in pairs])
        found["gold"] = np.array([chat.gold_lead(rows[i][1]) for i, _, _ in pairs])
    if rewards:
        samples = [Sample(i, [], [], True) for i, _, _ in pairs for _ in range(2)]
        total, _ = reward_answers(rewards, [row[:2] for row in rows], samples, [text for _, *texts in pairs for text in texts])
        found["the reward"] = total[::2] - total[1::2]
    return {name: lead for name, lead in found.items() if np.isfinite(lead).any()}


# ---------------------------------------------------------------------------------------------------------------------------------
# Revise


def ask(config, model, tok, as_chat, conversations, seed, first):
    """What the model says to each conversation: [(text, finished)], ("", False) where that is None or leaves no room.

    A model that has learnt no turns goes on with text, up to an empty line.
    """
    said = [("", False)] * len(conversations)
    as_text = lambda messages: "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages) + "Assistant:"  # noqa: E731
    prompts = [m and (chat.encode_prompt(tok, m) if as_chat else [tok.eot, *tok.encode_ordinary(as_text(m))]) for m in conversations]
    fits = [i for i, ids in enumerate(prompts) if ids and len(ids) < model.config.context]
    if fits:
        stop = {chat.end_of_turn(tok)} if as_chat else {tok.eot}
        for i, s in zip(fits, rollout(model, [prompts[i] for i in fits], max_new=config.max_new, temperature=config.temperature, stop=stop, seed=seed, first=first)):
            text = chat.decode_answer(tok, s.tokens)
            said[i] = (text, s.finished) if as_chat else (text.partition("\n\n")[0].strip(), s.finished or "\n\n" in text)
    return said


def revise_batch(config, policy, judge, principles, rows, first):
    """Some rows, of which `first` came before -> (rows to write, counts, {figure: values})."""
    (model, tok, _), (critic, their_tok, info) = policy, judge
    as_chat = config.ask == "chat" or (config.ask == "auto" and info.get("stage", "pretrain") != "pretrain")
    mine = [principles[j] for j in random_principles(len(rows), principles, config.seed, first)]
    whole = lambda said: [text if finished else "" for text, finished in said]  # noqa: E731
    go_on = lambda talk, texts, request: [  # the conversations with the model's words and the next request; None where it said nothing  # noqa: E731
        [*m, {"role": "assistant", "content": text}, {"role": "user", "content": request.format(principle=p)}] if text else None for m, text, p in zip(talk, texts, mine)
    ]
    talk = [messages for messages, _ in rows]
    originals = whole(ask(config, model, tok, True, talk, config.seed, first))
    talk = go_on(talk, originals, CRITIQUE)
    critiques = [text for text, _ in ask(config, critic, their_tok, as_chat, talk, config.seed + 1, first)]  # one that was cut still says something
    talk = go_on(talk, critiques, REVISION)
    revisions = whole(ask(config, critic, their_tok, as_chat, talk, config.seed + 2, first))
    written = [
        {"messages": [*messages, {"role": "assistant", "content": revised}], "original": original, "critique": critique, "principle": principle} | others(row)
        for (messages, row), original, critique, revised, principle in zip(rows, originals, critiques, revisions, mine) if revised
    ]  # fmt: skip
    counts = {"prompts": len(rows), "answers revised": len(written), "left out: an answer, critique or revision was cut or empty": len(rows) - len(written)}
    return written, counts, {"revisions that change nothing": [r["messages"][-1]["content"] == r["original"] for r in written]}


# ---------------------------------------------------------------------------------------------------------------------------------
# The file, and beside it the log: a first line that says what it is made of, and one a batch: {"rows", "bytes": how far both have come, and the figures so far}


def begin(config, head):
    """The log's record of the last batch that is whole in --out, {} for none; both files end there afterwards. UserError where another run's file is there."""
    out, log = Path(config.out), Path(config.out).with_suffix(".log.jsonl")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock(out.with_name(f".{out.name}.lock"), config.out)
        if out.exists() and not (config.resume or config.overwrite):
            raise UserError(f"--out={out}: is here already; --resume goes on with it, --overwrite replaces it")
        lines = []
        if out.exists() and config.resume:
            lines = [json.loads(line) for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if log.exists() else []
            if not lines:
                raise UserError(f"--resume: there is no {log}, which would say how far {out} got; --overwrite begins anew")
            checkpoint.check_same_run(lines[0], "rlaif", head["config"], head["data"], FREE)
        whole = [r for r in lines[1:] if r["bytes"] <= out.stat().st_size]
        if not all(map(is_record, whole)):
            raise ValueError
        last = whole[-1] if whole else {}
        with open(out, "ab") as f:
            f.truncate(last.get("bytes", 0))
        replace_text(log, "".join(json.dumps(r) + "\n" for r in [*(lines[:1] or [head]), *whole]))
        return last
    except OSError as e:
        raise UserError(f"--out={out}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--resume: {log} is damaged, or not of rlaif.py; --overwrite begins anew") from None


def is_record(r):
    """False where a line of the log is not what `main` writes. TypeError, KeyError or AttributeError where it is still less."""
    numbers = [r["seconds"], *r["counts"].values(), *(x for total, n in r["figures"].values() for x in (total, n))]
    return r["counts"] and type(r["rows"]) is type(r["bytes"]) is int and min(r["rows"], r["bytes"]) >= 0 and all(type(x) in (int, float) for x in numbers)


def append(path, text):
    """Add text to the end of a file; the disk has it when this returns -> the size of the file."""
    try:
        with open(path, "ab") as f:
            f.write(text.encode("utf-8", "replace"))
            f.flush()
            os.fsync(f.fileno())
            return f.tell()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; --resume goes on from the last batch that was written") from None


def show(record):
    """Counts, and means with their 95 % intervals, as lines of text. The intervals take every pair for independent, and values for 0 or 1: at most too wide."""
    lines = [(name, f"{n:,}", "") for name, n in record["counts"].items()]
    for name, (total, n) in record["figures"].items():
        if n:
            lines.append((name, f"{total / n:.4f}", f"± {1.96 * math.sqrt(max(0.0, total / n * (1 - total / n)) / n):.4f}"))
    width = max(len(name) for name, *_ in lines)
    return "\n".join(f"{name:<{width}}  {value:>9}  {error}".rstrip() for name, value, error in lines)


def main(config):
    device = setup(config.device, config.seed)
    check_flags(config)

    # 1. Principles, rows and models
    principles = read_constitution(config.constitution)
    rows, data = chat.read(config.data, chat.prompt_only if config.policy else two_answers, config.skip_bad, config.seed)
    rows = rows[: config.limit or None]
    loaded = {}
    for flag in ("policy", "judge"):
        where = vars(config)[flag]
        if where and where not in loaded:
            folder = checkpoint.find(where)
            loaded[where] = checkpoint.read(folder, device)
            data[where] = checkpoint.fingerprint(folder)
            if loaded[where][0].config.scalar_head:
                raise UserError(f"--{flag}={where}: a reward model, which writes nothing")
            loaded[where][0].eval()
    policy, judge = loaded.get(config.policy), loaded[config.judge or config.policy]
    data |= reward_hashes(config.reward, config.constitution)
    rewards = load_rewards(config.reward, device, config.micro_tokens, config.constitution)
    if policy:
        chat.end_of_turn(policy[1])  # UserError where it knows no turns
    if Path(config.out).resolve() in [Path(name).resolve() for name in data]:
        raise UserError(f"--out={config.out}: is what is read; write to another file")
    if config.mode == "judge":
        verdicts(*judge[:2], [("?", "a", "b")], principles[:1], np.array([[0]]), config.micro_tokens)  # UserError where it cannot be a judge
        work = lambda some, first: judge_batch(config, policy, judge, principles, rewards, some, first)  # noqa: E731
    else:
        work = lambda some, first: revise_batch(config, policy, judge, principles, some, first)  # noqa: E731

    # 2. Batch by batch
    record = begin(config, {"stage": "rlaif", "config": dataclasses.asdict(config), "data": data, **describe(device)}) or {"rows": 0, "bytes": 0, "seconds": 0.0, "counts": {}, "figures": {}}
    print(f"{len(rows):,} rows, {len(principles)} principles, on {describe(device)['hardware']}" + (f"; going on after row {record['rows']:,}" if record["rows"] else ""), flush=True)
    stop = Stop()
    start, began, spent = record["rows"], time.perf_counter(), record["seconds"]
    for first in range(start, len(rows), config.batch):
        written, counts, figures = work(rows[first : first + config.batch], first)
        record["bytes"] = append(config.out, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in written))
        record["rows"] = min(first + config.batch, len(rows))
        record["counts"] = {name: record["counts"].get(name, 0) + counts.get(name, 0) for name in {**record["counts"], **counts}}
        for name, values in figures.items():
            total, n = record["figures"].get(name, (0.0, 0))
            record["figures"][name] = (total + float(np.sum(values)), n + len(values))
        seconds = time.perf_counter() - began
        record["seconds"] = round(spent + seconds, 3)
        append(Path(config.out).with_suffix(".log.jsonl"), json.dumps(record) + "\n")
        left = seconds / (record["rows"] - start) * (len(rows) - record["rows"])
        print(f"row {record['rows']:,}/{len(rows):,} | {' | '.join(f'{name} {n:,}' for name, n in counts.items() if n)} | eta {clock_time(left)}", flush=True)
        if stop.agreed() and record["rows"] < len(rows):
            stop.leave(record["rows"], "row")

    # 3. What came of it
    done = record["counts"].get("pairs kept", record["counts"].get("answers revised", 0))
    print(f"\n{show(record)}\n\n{config.out}: {done:,} rows, {record['rows'] / max(record['seconds'], 1e-9):,.1f} prompts a second")
    if not done:
        print("warning: not one row came of it" + ("; a lower --min_margin keeps more" if config.mode == "judge" else "; a larger --max_new may help"))


if __name__ == "__main__":
    launch(main, Config)
