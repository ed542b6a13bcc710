"""Every stage in order on the embedded world, then one report: no download, no GPU, minutes on a laptop.

Each row is a command a user would type: it is printed and run, and what it made is measured on text that training never saw. Interrupted, the same
command goes on where it stopped. Ends in out/quickstart/report.json and a table.

    python quickstart.py
"""
import json, math, os, shlex, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import INFO, code_hash, find, read_json
from common import UserError, clock_time, describe, launch, replace_text


@dataclass
class Config:
    out: str = "out/quickstart"  # directory of everything
    seed: int = 0  # of the world, the weights and the samples
    fast: bool = False  # a tiny run of every row, for tests: it shows that all works, not that it learns


def rows(config):
    """[(stage, its command as words)]."""
    out, seed = config.out, f"--seed={config.seed}"
    world = ["--stories=600", "--notes=200", "--chats=200", "--pairs=100", "--problems=50", "--tests=40"] if config.fast else []
    steps = ["--steps=20", "--batch_tokens=1024"] if config.fast else ["--steps=600", "--batch_tokens=3072"]
    tuning = ["--epochs=1", "--print_every=25", "--eval_every=50", seed]
    pairs = [f"--data={out}/world/pairs.jsonl", f"--val={out}/world/pairs_val.jsonl"]
    measure = [f"--data={out}/world/prompts_test.jsonl", "--max_new=64", seed]
    return [
        ("world", ["-m", "data.world", f"--out={out}/world", seed, *world]),
        ("tokenizer", ["-m", "data.tokenizer", f"--data={out}/world/pretrain.jsonl", "--vocab_size=672", f"--out={out}/tokenizer"]),
        # Stories are short and differ in a few words: neither the rules for web text nor the removal of near-duplicates suit them.
        ("prepare", ["-m", "data.prepare", f"--data={out}/world/pretrain.jsonl", f"--tokenizer={out}/tokenizer", "--clean=False", "--dedup=exact", f"--out={out}/data"]),
        ("pretrain", ["pretrain.py", f"--data={out}/data", "--depth=4", "--width=128", "--context=512", *steps, seed,
                      "--save_every=200", "--print_every=50", "--prompt=Mia went to the", f"--out={out}/base"]),
        ("sample", ["sample.py", f"--model={out}/base", "--prompt=Mia went to the", "--max_new=80", seed]),
        ("evaluate base", ["evaluate.py", f"--model={out}/base", f"--text={out}/world/stories_val.jsonl", f"--complete={out}/world/sums_test.jsonl",
                           f"--judge={out}/world/judge_test.jsonl", *measure, "--reward=data/world.py:gold", f"--out={out}/base.json"]),
        ("sft", ["sft.py", f"--init={out}/base", f"--data={out}/world/chat.jsonl", f"--val={out}/world/chat_val.jsonl", *tuning, f"--out={out}/sft"]),
        ("reward", ["reward.py", f"--init={out}/sft", *pairs, "--lr=1.5e-3", "--max_new=64", *tuning, f"--out={out}/rm"]),
        ("dpo", ["dpo.py", f"--init={out}/sft", *pairs, *tuning, f"--out={out}/dpo"]),
        ("evaluate sft", ["evaluate.py", f"--model={out}/sft", f"--problems={out}/world/problems_test.jsonl", *measure,
                          f"--reward=data/world.py:gold,{out}/rm", f"--out={out}/sft.json"]),
        ("evaluate dpo", ["evaluate.py", f"--model={out}/dpo", f"--problems={out}/world/problems_test.jsonl", *measure,
                          f"--reward=data/world.py:gold,{out}/rm", f"--reference={out}/sft", f"--out={out}/dpo.json"]),
    ]  # fmt: skip


def begun(words):
    """The flag that goes on from what an interrupted command left behind; [] where there is nothing."""
    out = next((Path(word.removeprefix("--out=")) for word in words if word.startswith("--out=")), None)
    if not out or not out.is_dir() or words[1] == "data.prepare":  # data/prepare.py resumes by itself
        return []
    return ["--overwrite"] if words[0] == "-m" else ["--resume"]


def run(stage, words):
    """Print and run one command -> its record {"stage", "command", "seconds"}. UserError where it fails."""
    command = shlex.join(["python", *words])
    print(f"\n{stage}\n$ {command}", flush=True)
    begin = time.perf_counter()
    # PASSIVE: on a laptop that is doing other things as well, threads that spin while they wait make training many times slower.
    process = subprocess.Popen([sys.executable, *words, *begun(words)], env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the command got it too: it finishes its step and saves
        status = process.wait()
    if status:
        raise UserError(f"{stage} ended with status {status}; the same command as before goes on from here")
    return {"stage": stage, "command": command, "seconds": round(time.perf_counter() - begin, 1)}


def figures(out):
    """What the rows reached on text that training never saw: [(stage, what, before, after, bound)], before and after as text."""
    world, manifest = read_json(out / "world/world.json"), read_json(out / "data/manifest.json")
    base, sft, dpo = (read_json(out / f"{name}.json")["figures"] for name in ("base", "sft", "dpo"))
    rm = read_json(find(out / "rm") / INFO)["metrics"]["figures"]
    n_tokens, n_bytes = (sum(shard[key] for part in manifest["splits"].values() for shard in part) for key in ("tokens", "bytes"))
    between = lambda f: f"{f['value']:.4g} [{f['low']:.4g}, {f['high']:.4g}]"  # noqa: E731
    change = lambda stage, name, before, after, bound, label="": (stage, label or name, between(before[name]), between(after[name]), bound)  # noqa: E731
    floor = world["story_floor"] / base["tokens/document"]["value"]
    gold, bayes = "reward data/world.py:gold", rm["accuracy that noise allows (Bayes)"]["value"]
    return [
        ("tokenizer", "bytes a token", "1", f"{n_bytes / n_tokens:.2f}", ""),
        ("prepare", "documents", f"{manifest['documents_in']:,}", f"{manifest['documents_out']:,}", ""),
        ("pretrain", "story loss, nats a token", f"{math.log(manifest['n_vocab']):.4g}", between(base["nats/token"]), f"floor {floor:.4f}"),
        ("pretrain", "held-out sums right", "", between(base["completions right"]), "1"),
        *[("pretrain", name, "0.5", between(f), "1") for name, f in base.items() if name.startswith("judge") and name.endswith("both orders")],
        change("sft", "answers finished", base, sft, "1"),
        ("sft", "problems right, greedy", "", between(sft["problems right, greedy"]), "1"),
        change("sft", gold, base, sft, "1.9", "gold reward"),
        ("reward", "pairs ordered as labelled", "0.5", between(rm["accuracy"]), f"noise {bayes:.3f}"),
        ("reward", "pairs ordered as gold's", "0.5", between(rm["order as gold's"]), "1"),
        change("dpo", gold, sft, dpo, "1.9", "gold reward"),
        ("dpo", "win rate against SFT, by gold", "0.5", between(dpo["win rate by data/world.py:gold"]), "1"),
        ("dpo", "KL to SFT, nats an answer", "0", between(dpo["KL to the reference, nats an answer"]), ""),
        change("dpo", "problems right, greedy", sft, dpo, "1"),
        change("dpo", "answer tokens", sft, dpo, ""),
    ]


def table(lines):
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main(config):
    if Path.cwd() != Path(__file__).parent:
        raise UserError(f"run it from the repository's directory: cd {Path(__file__).parent}")
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: {e.strerror}") from None
    report_file = out / "report.json"
    report = read_json(report_file) if report_file.exists() else {"stages": []}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for stage, words in rows(config):
        command = shlex.join(["python", *words])
        if any(done["command"] == command for done in report["stages"]):
            print(f"\n{stage}: done already ($ {command})")
            continue
        if any(done["stage"] == stage for done in report["stages"]):
            raise UserError(f"{report_file}: {stage} was run by another command there; give another --out, or remove that directory")
        report["stages"].append(run(stage, words))
        replace_text(report_file, json.dumps(report, indent=1) + "\n")
    report["figures"] = [dict(zip(("stage", "figure", "before", "after", "bound"), line)) for line in figures(out)]
    report |= {"code": code_hash(), **describe(device)}
    replace_text(report_file, json.dumps(report, indent=1) + "\n")
    spent = {done["stage"]: done["seconds"] for done in report["stages"]}
    print("\n" + table([("stage", "seconds", "figure", "before", "after [95 %]", "bound"), *((s, f"{spent[s]:.0f}", *rest) for s, *rest in figures(out))]))
    print(f"\n{clock_time(sum(spent.values()))} in all; {report_file}; talk to it: python sample.py --model={out}/dpo")


if __name__ == "__main__":
    launch(main, Config)
