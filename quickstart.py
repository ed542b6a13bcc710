"""Every stage in order on the embedded world, then one report: no download, no GPU, minutes on a
laptop.

Each row is a command a user would type: it is printed and run, and what it made is measured on text
that training never saw. If it is interrupted, the same command continues where it stopped. It ends
in out/quickstart/report.json and a table.

    python quickstart.py
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import report
from data.read import read_json
from runtime import checkpoint
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.files import LOCKS, lock_file, replace_text
from runtime.process import describe, launch
from runtime.run import clock_time

# For commands on a CPU. Threads that spin while they wait make training many times slower on a
# laptop that does other things as well; and glibc is told to keep what is freed, which saves an
# eighth of the time of a step and costs memory in holes between tensors of many sizes.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


@dataclass
class Config:
    # directory of everything
    out: str = "out/quickstart"
    # of the world, the weights and the samples
    seed: int = 0
    # a tiny run of every row, for tests: it shows that everything works, not that it learns
    fast: bool = False
    # run nothing: make DIR/report.html of the runs and evaluations in --out
    report_only: bool = False
    # when all is done, serve the result, to be talked to and voted on
    serve: bool = False


def command_lines(config):
    """{stage: its command}, in order."""
    out, seed = shlex.quote(config.out), f"--seed={config.seed}"
    world = f"{out}/world"
    few = "--stories=600 --notes=200 --chats=200 --pairs=100 --problems=50 --tests=40" if config.fast else ""
    steps = "--steps=20 --batch_tokens=1024" if config.fast else "--steps=600 --batch_tokens=3072"
    small = "--micro_batch_tokens=4096"  # a quick start must fit into 4 GB
    tuning = f"--epochs=1 --print_every=25 --eval_every=50 {small} {seed}"
    pairs = f"--data={world}/pairs.jsonl --val={world}/pairs_val.jsonl"
    measure = f"--data={world}/prompts_test.jsonl --max_new_tokens=64 {seed}"
    gold = "data/world.py:gold"
    rewards = f"{gold},data/world.py:rudeness,data/rules.py:final_number,{out}/rm"
    against = f"--problems={world}/problems_test.jsonl {measure} --reward={rewards}"
    rl = f"--monitor={gold} --max_new_tokens=64 --print_every=10 {seed}"
    weak_pairs = f"--data={world}/pairs_few.jsonl --val={world}/pairs_val.jsonl"
    ppo_steps, grpo_steps, ai_steps = ("--steps=2",) * 3 if config.fast else ("--steps=24", "--steps=40", "--steps=60")
    judged = f"--policy={out}/sft --data={world}/prompts.jsonl --group_size=3 --limit=1000 --min_margin=0.3"
    judged += " --max_new_tokens=64"
    best_of, min_accuracy = "--best_of=32 --limit=100", ""
    if config.fast:  # a model that has hardly been trained ends no completion and judges none
        judged = f"--data={world}/pairs.jsonl --min_margin=0"
        best_of, min_accuracy = "--best_of=2 --limit=10", "--min_accuracy=0"
    commands = {
        "world": f"-m data.world --out={world} {seed} {few}",
        "tokenizer": f"-m data.tokenizer --data={world}/pretrain.jsonl --vocab_size=672 --out={out}/tokenizer",
        # Stories are short and differ in a few words: neither the rules for web text nor the
        # removal of near-duplicates suit them.
        "prepare": f"-m data.prepare --data={world}/pretrain.jsonl --tokenizer={out}/tokenizer --clean=False "
        f"--dedup=exact --out={out}/data",
        "pretrain": f"pretrain.py --data={out}/data --depth=4 --width=128 --context=512 {steps} {seed} "
        f"--save_every=200 --print_every=50 --prompt='Mia went to the' --out={out}/base",
        "sample": f"sample.py --model={out}/base --prompt='Mia went to the' --max_new_tokens=80 {seed}",
        "evaluate base": f"evaluate.py --model={out}/base --text={world}/stories_val.jsonl "
        f"--complete={world}/sums_test.jsonl --judge={world}/judge_test.jsonl {measure} --reward={gold} "
        f"--samples={out}/base_answers.jsonl --out={out}/base.json",
        "sft": f"sft.py --init={out}/base --data={world}/chat.jsonl --val={world}/chat_val.jsonl {tuning} "
        f"--out={out}/sft",
        "reward": f"reward.py --init={out}/sft {pairs} --lr=1.5e-3 --max_new_tokens=64 {tuning} --out={out}/rm",
        "dpo": f"dpo.py --init={out}/sft {pairs} --nll=0.2 {tuning} --out={out}/dpo",
        "ppo": f"ppo.py --init={out}/sft --reward={out}/rm --data={world}/prompts.jsonl {rl} {ppo_steps} "
        f"{min_accuracy} --out={out}/ppo",
        "grpo": f"grpo.py --init={out}/ppo --reward=data/rules.py:final_number,{out}/rm*0.3 --kl=k2 --beta=0.02 "
        f"--data={world}/problems.jsonl {rl} {grpo_steps} --out={out}/grpo",
        "rlaif": f"rlaif.py {judged} --judge={out}/base --constitution=data/constitution.txt --principles=vote "
        f"--reward={gold} {seed} --out={out}/ai_pairs.jsonl",
        "dpo of rlaif's": f"dpo.py --init={out}/sft --data={out}/ai_pairs.jsonl --nll=0.4 --print_every=25 {small} "
        f"{seed} {ai_steps} --out={out}/ai_dpo",
        "weak reward": f"reward.py --init={out}/sft {weak_pairs} --lr=1.5e-3 --max_new_tokens=64 --epochs=30 "
        f"--print_every=25 {seed} --out={out}/weak_rm",
    }
    for name, model in {"best of n": "rm", "best of n, weak": "weak_rm"}.items():
        file = "best" if model == "rm" else "best_weak"
        commands[name] = (
            f"evaluate.py --model={out}/sft {measure} --reward={out}/{model},{gold} {best_of} --out={out}/{file}.json"
        )
    for name in ("sft", "ppo", "grpo", "dpo", "ai_dpo"):
        reference = "" if name == "sft" else f"--reference={out}/sft"
        files = f"--samples={out}/{name}_answers.jsonl --out={out}/{name}.json"
        commands[f"evaluate {name}"] = f"evaluate.py --model={out}/{name} {against} {reference} {files}"
    return commands


def continue_flags(words):
    """The flag with which a command continues what an interrupted one left; [] if there is
    nothing."""
    outs = [Path(word.removeprefix("--out=")) for word in words if word.startswith("--out=")]
    if not outs or not outs[0].exists() or words[0] == "evaluate.py" or words[1] == "data.prepare":
        return []  # data/prepare.py continues by itself
    return ["--overwrite"] if words[0] == "-m" else ["--resume"]


def run(stage, words):
    """Print and run one command -> its record {"stage", "command", "seconds"}.

    Raises UserError if it fails; if a signal stopped it, this process ends as it did.
    """
    command = shlex.join(["python", *words])
    print(f"\n{stage}\n$ {command}", flush=True)
    begin = time.perf_counter()
    # It holds our lock too: if we are killed and it is not, the next quick start is refused until
    # it ends.
    process = subprocess.Popen(
        [sys.executable, *words, *continue_flags(words)],
        env=ENVIRONMENT | os.environ,
        pass_fds=[lock.fileno() for lock in LOCKS],
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the command got it too: it finishes its step and saves
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    number = -status if status < 0 else status - 128
    if number in (signal.SIGINT, signal.SIGTERM):
        print(f"stopped in {stage}; the same command continues from here", file=sys.stderr)
        sys.exit(128 + number)
    if status:
        raise UserError(f"{stage} ended with status {status}; the same command continues from here")
    return {"stage": stage, "command": command, "seconds": round(time.perf_counter() - begin, 1)}


# --------------------------------------------------------------------------------------------------
# What came of it


def exact(value):
    """A figure without an interval."""
    return {"value": value, "low": None, "high": None}


def row(stage, figure, before, after, bound="", direction=0):
    """{"stage", "figure", "before", "after", "bound", "improved"} of the table.

    direction: 1 if it must rise, -1 if it must fall, 0 if nothing is asked. improved: whether the
    change is sure, its 95 % interval excluding none; None if nothing is asked."""
    improved = None
    if direction:
        worst, edge = ("low", "high") if direction > 0 else ("high", "low")
        start = before["value"] if before[edge] is None else before[edge]
        improved = direction * (after[worst] - start) > 0
    found = {"stage": stage, "figure": figure, "before": before, "after": after}
    return found | {"bound": bound, "improved": improved}


def figures(out):
    """The rows of the table: what the stages reached on text that training never saw."""
    evaluations = {
        name: read_json(out / f"{name}.json")["figures"] for name in ("base", "sft", "dpo", "ppo", "grpo", "ai_dpo")
    }
    base, sft = evaluations["base"], evaluations["sft"]
    rm = checkpoint.read_info(checkpoint.find(out / "rm"))["metrics"]["figures"]
    gold, chance = "reward data/world.py:gold", exact(0.5)
    rows = pretraining_rows(out, base)
    rows += [
        row("sft", "completions finished", base["completions finished"], sft["completions finished"], "1", 1),
        row("sft", "gold reward", base[gold], sft[gold], "1.9", 1),
    ]
    noise = f"{rm['accuracy that noise allows (Bayes)']['value']:.3f}, the labels' noise"
    rows += [
        row("reward", "held-out pairs ordered as labelled", chance, rm["accuracy"], noise, 1),
        row("reward", "held-out pairs ordered as gold's", chance, rm["order as gold's"], "1", 1),
    ]
    for stage, name, parent in (
        ("ppo", "ppo", "sft"),
        ("grpo, after ppo", "grpo", "ppo"),
        ("dpo", "dpo", "sft"),
        ("rlaif + dpo", "ai_dpo", "sft"),
    ):
        rows += policy_rows(stage, name, evaluations[parent], evaluations[name], parent)
    return rows


def pretraining_rows(out, base):
    """The rows of tokenizer and pretraining."""
    world, manifest = read_json(out / "world/world.json"), read_json(out / "data/manifest.json")
    shards = [shard for shards in manifest["splits"].values() for shard in shards]
    bytes_per_token = sum(shard["bytes"] for shard in shards) / sum(shard["tokens"] for shard in shards)
    floor = f"{world['story_floor'] / base['tokens/document']['value']:.4f}, the entropy"
    uniform = exact(math.log(manifest["n_vocab"]))
    rows = [
        row("tokenizer", "bytes per token", exact(1.0), exact(bytes_per_token)),
        row("pretrain", "story loss, nats per token", uniform, base["nats/token"], floor, -1),
        row("pretrain", "held-out sums right", exact(0.0), base["completions right"], "1", 1),
    ]
    judged = [name for name in base if name.startswith("judge") and name.endswith("both orders")]
    return rows + [row("pretrain", name, exact(0.5), base[name], "1") for name in judged]


def policy_rows(stage, name, start, end, parent):
    """The rows of a stage that sharpens the model with the figures `start` into that with `end`."""
    gold, right = "reward data/world.py:gold", "reward data/rules.py:final_number"
    rude, wins = "reward data/world.py:rudeness", "win rate by data/world.py:gold"
    kl = "KL to the reference, nats per completion"
    must = {gold: name != "ai_dpo", right: name == "grpo", rude: -(name == "ai_dpo")}
    return [
        row(stage, f"gold reward, {parent.upper()}'s before", start[gold], end[gold], "1.9", must[gold]),
        row(stage, "sampled sums right", start[right], end[right], "1", must[right]),
        row(stage, "rude phrases per completion", start[rude], end[rude], "0", must[rude]),
        row(stage, "win rate against SFT, by gold", start.get(wins, exact(0.5)), end[wins], "1"),
        row(stage, "KL to SFT, nats per completion", start.get(kl, exact(0.0)), end[kl]),
    ]


def table(lines):
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def table_line(f):
    """A row of `figures` as text."""
    better = {True: "sure", False: "NOT sure", None: ""}[f["improved"]]
    return f["stage"], f["figure"], report.show(f["before"]), report.show(f["after"]), f["bound"], better


def main(config):
    check_ranges(config)
    here = Path(__file__).parent
    if Path.cwd() != here:
        raise UserError(f"run it from the repository's directory: cd {here}")
    out = Path(config.out)
    file = out / "report.json"
    if config.report_only:
        print(report.make(out, read_json(file) if file.exists() else {}))
        return

    # 1. Run what has not run yet
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: {e.strerror}") from None
    lock_file(out / ".lock", config.out)
    record = read_json(file) if file.exists() else {"stages": []}
    for stage, line in command_lines(config).items():
        words = shlex.split(line)
        command = shlex.join(["python", *words])
        done = {ran["stage"]: ran["command"] for ran in record["stages"]}
        if done.get(stage) == command:
            print(f"\n{stage}: done already ($ {command})")
            continue
        if stage in done:
            raise UserError(f"{file}: {stage} was run by another command there; remove that directory or name another")
        record["stages"].append(run(stage, words))
        replace_text(file, json.dumps(record, indent=1) + "\n")

    # 2. Measure, and write the report
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record |= {"figures": figures(out), "code": checkpoint.code_hash(), **describe(device)}
    replace_text(file, json.dumps(record, indent=1) + "\n")
    page = report.make(out, record)
    head = ("stage", "figure", "before", "after [95 %]", "bound", "better")
    print("\n" + table([head, *map(table_line, record["figures"])]))
    seconds = sum(s["seconds"] for s in record["stages"])
    print(f"\n{clock_time(seconds)} in all; report: {page}; talk to it: python sample.py --model={out}/grpo")
    failed = [f"{f['stage']}: {f['figure']}" for f in record["figures"] if f["improved"] is False]
    if failed and not config.fast:
        raise UserError(f"no sure improvement, by its 95 % interval, of {'; '.join(failed)}")
    if config.serve:
        serve(config.out)


def serve(out):
    """Serve the DPO model beside the SFT model until Ctrl-C; says how its votes sharpen it."""
    votes = [f"--feedback={out}/feedback"]
    models = [f"--model={out}/dpo", f"--compare={out}/sft", f"--follow={out}/rounds"]
    sharpen = shlex.join(["python", "sharpen.py", f"--init={out}/dpo", *votes, f"--rounds={out}/rounds"])
    print(f"\nwhen people have voted, in another terminal: {sharpen}", flush=True)
    os.execv(sys.executable, [sys.executable, "serve.py", *models, *votes])


if __name__ == "__main__":
    launch(main, Config)
