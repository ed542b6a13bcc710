"""Every stage in order on the embedded world, then one report: no download, no GPU, minutes on a laptop.

Each row is a command a user would type: it is printed and run, and what it made is measured on text that training never saw. Interrupted, the same
command goes on where it stopped. Ends in out/quickstart/report.json and a table.

    python quickstart.py
"""
import json, math, os, shlex, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import torch

import report
from checkpoint import INFO, code_hash, find, read_json
from common import LOCKS, UserError, clock_time, describe, launch, lock, replace_text


@dataclass
class Config:
    out: str = "out/quickstart"  # directory of everything
    seed: int = 0  # of the world, the weights and the samples
    fast: bool = False  # a tiny run of every row, for tests: it shows that all works, not that it learns
    report_only: bool = False  # run nothing: make DIR/report.html of whatever runs and evaluations lie in --out


def rows(config):
    """[(stage, its command as words)]."""
    out, seed = config.out, f"--seed={config.seed}"
    world = ["--stories=600", "--notes=200", "--chats=200", "--pairs=100", "--problems=50", "--tests=40"] if config.fast else []
    steps = ["--steps=20", "--batch_tokens=1024"] if config.fast else ["--steps=600", "--batch_tokens=3072"]
    small = "--micro_tokens=4096"  # a quick start is to fit into 4 GB
    tuning = ["--epochs=1", "--print_every=25", "--eval_every=50", small, seed]
    pairs = [f"--data={out}/world/pairs.jsonl", f"--val={out}/world/pairs_val.jsonl"]
    measure = [f"--data={out}/world/prompts_test.jsonl", "--max_new=64", seed]
    against = [f"--problems={out}/world/problems_test.jsonl", *measure, f"--reward=data/world.py:gold,data/world.py:rudeness,data/rewards.py:final_number,{out}/rm"]
    said = lambda name: [f"--samples={out}/{name}_answers.jsonl", f"--out={out}/{name}.json"]  # noqa: E731
    rl = ["--monitor=data/world.py:gold", "--max_new=64", "--print_every=10", seed]
    rounds = lambda n: [f"--steps={2 if config.fast else n}"]  # noqa: E731
    judged = [f"--policy={out}/sft", f"--data={out}/world/prompts.jsonl", "--n=3", "--limit=1000", "--min_margin=0.3", "--max_new=64"]
    if config.fast:  # what has learnt next to nothing ends no answer and judges none
        judged = [f"--data={out}/world/pairs.jsonl", "--min_margin=0"]
    many = ["--best_of=2", "--limit=10"] if config.fast else ["--best_of=32", "--limit=100"]
    return [
        ("world", ["-m", "data.world", f"--out={out}/world", seed, *world]),
        ("tokenizer", ["-m", "data.tokenizer", f"--data={out}/world/pretrain.jsonl", "--vocab_size=672", f"--out={out}/tokenizer"]),
        # Stories are short and differ in a few words: neither the rules for web text nor the removal of near-duplicates suit them.
        ("prepare", ["-m", "data.prepare", f"--data={out}/world/pretrain.jsonl", f"--tokenizer={out}/tokenizer", "--clean=False", "--dedup=exact", f"--out={out}/data"]),
        ("pretrain", ["pretrain.py", f"--data={out}/data", "--depth=4", "--width=128", "--context=512", *steps, seed,
                      "--save_every=200", "--print_every=50", "--prompt=Mia went to the", f"--out={out}/base"]),
        ("sample", ["sample.py", f"--model={out}/base", "--prompt=Mia went to the", "--max_new=80", seed]),
        ("evaluate base", ["evaluate.py", f"--model={out}/base", f"--text={out}/world/stories_val.jsonl", f"--complete={out}/world/sums_test.jsonl",
                           f"--judge={out}/world/judge_test.jsonl", *measure, "--reward=data/world.py:gold", *said("base")]),
        ("sft", ["sft.py", f"--init={out}/base", f"--data={out}/world/chat.jsonl", f"--val={out}/world/chat_val.jsonl", *tuning, f"--out={out}/sft"]),
        ("reward", ["reward.py", f"--init={out}/sft", *pairs, "--lr=1.5e-3", "--max_new=64", *tuning, f"--out={out}/rm"]),
        ("dpo", ["dpo.py", f"--init={out}/sft", *pairs, "--nll=0.2", *tuning, f"--out={out}/dpo"]),
        ("ppo", ["ppo.py", f"--init={out}/sft", f"--reward={out}/rm", f"--data={out}/world/prompts.jsonl", *rl, *rounds(24),
                 *(["--min_accuracy=0"] if config.fast else []), f"--out={out}/ppo"]),
        ("grpo", ["grpo.py", f"--init={out}/ppo", f"--reward=data/rewards.py:final_number,{out}/rm*0.3", "--kl=k2", "--beta=0.02", f"--data={out}/world/problems.jsonl", *rl,
                  *rounds(40), f"--out={out}/grpo"]),
        ("rlaif", ["rlaif.py", *judged, f"--judge={out}/base", "--constitution=data/constitution.txt", "--principles=vote", "--reward=data/world.py:gold", seed,
                   f"--out={out}/ai_pairs.jsonl"]),
        ("dpo of rlaif's", ["dpo.py", f"--init={out}/sft", f"--data={out}/ai_pairs.jsonl", "--nll=0.4", "--print_every=25", small, seed, *rounds(60), f"--out={out}/ai_dpo"]),
        ("weak reward", ["reward.py", f"--init={out}/sft", f"--data={out}/world/pairs_few.jsonl", pairs[1], "--lr=1.5e-3", "--max_new=64", "--epochs=30", "--print_every=25", seed,
                         f"--out={out}/weak_rm"]),
        ("best of n", ["evaluate.py", f"--model={out}/sft", *measure, f"--reward={out}/rm,data/world.py:gold", *many, f"--out={out}/best.json"]),
        ("best of n, weak", ["evaluate.py", f"--model={out}/sft", *measure, f"--reward={out}/weak_rm,data/world.py:gold", *many, f"--out={out}/best_weak.json"]),
        ("evaluate sft", ["evaluate.py", f"--model={out}/sft", *against, *said("sft")]),
        *[(f"evaluate {name}", ["evaluate.py", f"--model={out}/{name}", *against, f"--reference={out}/sft", *said(name)]) for name in ("ppo", "grpo", "dpo", "ai_dpo")],
    ]  # fmt: skip


def begun(words):
    """The flag that goes on from what an interrupted command left behind; [] where there is nothing."""
    out = next((Path(word.removeprefix("--out=")) for word in words if word.startswith("--out=")), None)
    if words[0] == "rlaif.py":
        return ["--resume"] if out.exists() else []
    if not out or not out.is_dir() or words[1] == "data.prepare":  # data/prepare.py resumes by itself
        return []
    return ["--overwrite"] if words[0] == "-m" else ["--resume"]


def run(stage, words):
    """Print and run one command -> its record {"stage", "command", "seconds"}. UserError where it fails; where a signal stopped it the process ends as it did."""
    command = shlex.join(["python", *words])
    print(f"\n{stage}\n$ {command}", flush=True)
    begin = time.perf_counter()
    # PASSIVE: on a laptop that is doing other things as well, threads that spin while they wait make training many times slower.
    # It holds our lock too: where we are killed and it is not, the next quick start is refused until it ends.
    process = subprocess.Popen([sys.executable, *words, *begun(words)], env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ, pass_fds=[handle.fileno() for handle in LOCKS])
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the command got it too: it finishes its step and saves
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    number = -status if status < 0 else status - 128
    if number in (signal.SIGINT, signal.SIGTERM):
        print(f"stopped in {stage}; the same command as before goes on from here", file=sys.stderr)
        sys.exit(128 + number)
    if status:
        raise UserError(f"{stage} ended with status {status}; the same command as before goes on from here")
    return {"stage": stage, "command": command, "seconds": round(time.perf_counter() - begin, 1)}


def figures(out):
    """What the rows reached on text that training never saw: [{"stage", "figure", "before", "after", "bound", "improved"}], before and after as {"value", "low", "high"}.

    improved: whether the change is sure, its 95 % interval excluding none; None where nothing is asked.
    """
    world, manifest = read_json(out / "world/world.json"), read_json(out / "data/manifest.json")
    base, sft, dpo, ppo, grpo, ai_dpo = (read_json(out / f"{name}.json")["figures"] for name in ("base", "sft", "dpo", "ppo", "grpo", "ai_dpo"))
    rm = read_json(find(out / "rm") / INFO)["metrics"]["figures"]
    n_tokens, n_bytes = (sum(shard[key] for part in manifest["splits"].values() for shard in part) for key in ("tokens", "bytes"))
    exact = lambda value: {"value": value, "low": None, "high": None}  # noqa: E731
    gold, right, kl, rude = "reward data/world.py:gold", "reward data/rewards.py:final_number", "KL to the reference, nats an answer", "reward data/world.py:rudeness"
    chance, found = exact(0.5), []

    def row(stage, figure, before, after, bound="", sign=0):
        """sign: 1 where it must rise, -1 where it must fall, 0 where nothing is asked."""
        start = before and (before["high"] if sign > 0 else before["low"])
        start = before["value"] if before and start is None else start
        improved = (after["low"] > start if sign > 0 else after["high"] < start) if sign else None
        found.append({"stage": stage, "figure": figure, "before": before, "after": after, "bound": bound, "improved": improved})

    row("tokenizer", "bytes a token", exact(1.0), exact(n_bytes / n_tokens))
    row("pretrain", "story loss, nats a token", exact(math.log(manifest["n_vocab"])), base["nats/token"], f"{world['story_floor'] / base['tokens/document']['value']:.4f}, the entropy", -1)
    row("pretrain", "held-out sums right", exact(0.0), base["completions right"], "1", 1)
    for name, f in base.items():
        if name.startswith("judge") and name.endswith("both orders"):
            row("pretrain", name, chance, f, "1")
    row("sft", "answers finished", base["answers finished"], sft["answers finished"], "1", 1)
    row("sft", "gold reward", base[gold], sft[gold], "1.9", 1)
    row("reward", "held-out pairs ordered as labelled", chance, rm["accuracy"], f"{rm['accuracy that noise allows (Bayes)']['value']:.3f}, the labels' noise", 1)
    row("reward", "held-out pairs ordered as gold's", chance, rm["order as gold's"], "1", 1)
    for stage, start, end, parent in (("ppo", sft, ppo, "SFT"), ("grpo, after ppo", ppo, grpo, "PPO"), ("dpo", sft, dpo, "SFT"), ("rlaif + dpo", sft, ai_dpo, "SFT")):
        row(stage, f"gold reward, {parent}'s before", start[gold], end[gold], "1.9", 0 if stage == "rlaif + dpo" else 1)
        row(stage, "sampled sums right", start[right], end[right], "1", 1 if end is grpo else 0)
        row(stage, "rude phrases an answer", start[rude], end[rude], "0", -1 if end is ai_dpo else 0)
        row(stage, "win rate against SFT, by gold", chance if start is sft else start["win rate by data/world.py:gold"], end["win rate by data/world.py:gold"], "1")
        row(stage, "KL to SFT, nats an answer", exact(0.0) if start is sft else start[kl], end[kl])
    return found


def table(lines):
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main(config):
    if Path.cwd() != Path(__file__).parent:
        raise UserError(f"run it from the repository's directory: cd {Path(__file__).parent}")
    out = Path(config.out)
    report_file = out / "report.json"
    if config.report_only:
        print(report.make(out, read_json(report_file) if report_file.exists() else {}))
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: {e.strerror}") from None
    lock(out / ".lock", config.out)
    record = read_json(report_file) if report_file.exists() else {"stages": []}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for stage, words in rows(config):
        command = shlex.join(["python", *words])
        if any(done["command"] == command for done in record["stages"]):
            print(f"\n{stage}: done already ($ {command})")
            continue
        if any(done["stage"] == stage for done in record["stages"]):
            raise UserError(f"{report_file}: {stage} was run by another command there; give another --out, or remove that directory")
        record["stages"].append(run(stage, words))
        replace_text(report_file, json.dumps(record, indent=1) + "\n")
    record["figures"] = figures(out)
    record |= {"code": code_hash(), **describe(device)}
    replace_text(report_file, json.dumps(record, indent=1) + "\n")
    page = report.make(out, record)
    mark = {True: "sure", False: "NOT sure", None: ""}
    print("\n" + table([("stage", "figure", "before", "after [95 %]", "bound", "better"),
                        *((f["stage"], f["figure"], report.show(f["before"]), report.show(f["after"]), f["bound"], mark[f["improved"]]) for f in record["figures"])]))  # fmt: skip
    print(f"\n{clock_time(sum(s['seconds'] for s in record['stages']))} in all; report: {page}; talk to it: python sample.py --model={out}/grpo")
    failed = [f"{f['stage']}: {f['figure']}" for f in record["figures"] if f["improved"] is False]
    if failed and not config.fast:
        raise UserError(f"no sure improvement, by its 95 % interval, of {'; '.join(failed)}")


if __name__ == "__main__":
    launch(main, Config)
