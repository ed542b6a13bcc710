"""Every stage in order on the embedded world, then one report: no download, no GPU, minutes on a laptop.

Each row is a command a user would type: it is printed and run, and what it made is measured on text that training never saw. Interrupted, the same
command goes on where it stopped. Ends in out/quickstart/report.json and a table.

    python quickstart.py
"""
import json, math, os, shlex, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import code_hash, read_json
from common import UserError, clock_time, describe, launch, replace_text


@dataclass
class Config:
    out: str = "out/quickstart"  # directory of everything
    seed: int = 0  # of the world, the weights and the samples
    fast: bool = False  # a tiny run of every row, for tests: it shows that all works, not that it learns


def rows(config):
    """[(stage, its command as words)]."""
    out, seed = config.out, f"--seed={config.seed}"
    world = ["--stories=600", "--notes=200", "--chats=50", "--pairs=50", "--problems=50", "--tests=40"] if config.fast else []
    steps = ["--steps=20", "--batch_tokens=1024"] if config.fast else ["--steps=600", "--batch_tokens=3072"]
    return [
        ("world", ["-m", "data.world", f"--out={out}/world", seed, *world]),
        ("tokenizer", ["-m", "data.tokenizer", f"--data={out}/world/pretrain.jsonl", "--vocab_size=672", f"--out={out}/tokenizer"]),
        # Stories are short and differ in a few words: neither the rules for web text nor the removal of near-duplicates suit them.
        ("prepare", ["-m", "data.prepare", f"--data={out}/world/pretrain.jsonl", f"--tokenizer={out}/tokenizer", "--clean=False", "--dedup=exact", f"--out={out}/data"]),
        ("pretrain", ["pretrain.py", f"--data={out}/data", "--depth=4", "--width=128", "--context=512", *steps, seed,
                      "--save_every=200", "--print_every=50", "--prompt=Mia went to the", f"--out={out}/base"]),
        ("evaluate", ["evaluate.py", f"--model={out}/base", f"--text={out}/world/stories_val.jsonl", f"--complete={out}/world/sums_test.jsonl",
                      f"--judge={out}/world/judge_test.jsonl", f"--out={out}/base.json"]),
        ("sample", ["sample.py", f"--model={out}/base", "--prompt=Mia went to the", "--max_new=80", seed]),
    ]  # fmt: skip


def begun(stage, out):
    """The flag that goes on from what an interrupted run of this stage left behind; [] where there is nothing."""
    if stage == "pretrain" and (out / "base").exists():
        return ["--resume"]
    left = {"world": out / "world", "tokenizer": out / "tokenizer"}.get(stage)
    return ["--overwrite"] if left and left.exists() else []  # data/prepare.py resumes by itself


def run(stage, words, out):
    """Print and run one command -> its record {"stage", "command", "seconds"}. UserError where it fails."""
    command = shlex.join(["python", *words])
    print(f"\n{stage}\n$ {command}", flush=True)
    begin = time.perf_counter()
    # PASSIVE: on a laptop that is doing other things as well, threads that spin while they wait make training many times slower.
    process = subprocess.Popen([sys.executable, *words, *begun(stage, out)], env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the command got it too: it finishes its step and saves
        status = process.wait()
    if status:
        raise UserError(f"{stage} ended with status {status}; the same command as before goes on from here")
    return {"stage": stage, "command": command, "seconds": round(time.perf_counter() - begin, 1)}


def figures(out):
    """What the rows reached: [(stage, what, before, after, bound)], before and after as text."""
    world, manifest, base = read_json(out / "world/world.json"), read_json(out / "data/manifest.json"), read_json(out / "base.json")["figures"]
    n_tokens, n_bytes = (sum(shard[key] for part in manifest["splits"].values() for shard in part) for key in ("tokens", "bytes"))
    between = lambda f: f"{f['value']:.4g} [{f['low']:.4g}, {f['high']:.4g}]"  # noqa: E731
    floor = world["story_floor"] / base["tokens/document"]["value"]
    found = [
        ("tokenizer", "bytes a token", "1", f"{n_bytes / n_tokens:.2f}", ""),
        ("prepare", "documents", f"{manifest['documents_in']:,}", f"{manifest['documents_out']:,}", ""),
        ("pretrain", "story loss, nats a token", f"{math.log(manifest['n_vocab']):.4g}", between(base["nats/token"]), f"floor {floor:.4f}"),
        ("pretrain", "held-out sums right", "", between(base["completions right"]), "1"),
    ]
    return found + [("pretrain", name, "0.5", between(f), "") for name, f in base.items() if name.startswith("judge") and name.endswith("both orders")]


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
        report["stages"].append(run(stage, words, out))
        replace_text(report_file, json.dumps(report, indent=1) + "\n")
    report["figures"] = [dict(zip(("stage", "figure", "before", "after", "bound"), line)) for line in figures(out)]
    report |= {"code": code_hash(), **describe(device)}
    replace_text(report_file, json.dumps(report, indent=1) + "\n")
    spent = {done["stage"]: done["seconds"] for done in report["stages"]}
    print("\n" + table([("stage", "seconds", "figure", "before", "after [95 %]", "bound"), *((s, f"{spent[s]:.0f}", *rest) for s, *rest in figures(out))]))
    print(f"\n{clock_time(sum(spent.values()))} in all; {report_file}; talk to it: python sample.py --model={out}/base")


if __name__ == "__main__":
    launch(main, Config)
