"""Is anything ever lost? Every stage, as a user starts it, on a tiny model, under every fault that
a machine or a user can bring upon it.

A row of the table is one stage under one fault with one seed, which draws the moments and the files
that are hit:

    survived       the fault ended as it should: the run continued, or one line said what happened
                   and what to do, with the right exit status
    nothing lost   checkpoints that were there stayed complete, none is half there, none holds a
                   number that is not finite
    exact          resumed, the run ended in the weights, optimizer state, log and samples of a run
                   that nothing happened to, bit for bit (on another number of ranks: in the same
                   losses to 1e-5)

Runs are forked from this process, which has imported torch once. A row whose fault cannot be made
here (a full disk needs the right to mount one) is "not run". The exit status is 1 unless every row
that ran is green.

    python -m bench.faults
    python -m bench.faults --seeds=1 --stages=ppo,grpo --faults=kill,full_disk
"""

import os

# what is forked must have no threads, and sums must come out the same everywhere
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import ctypes
import functools
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import safetensors.torch
import torch

import distill
import dpo
import evaluate
import grpo
import ppo
import pretrain
import quickstart
import reward
import rlaif
import sft
from bench.child import Child, run_script
from data import chat, tokenizer
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.checkpoint import damage, steps_in
from runtime.errors import UserError
from runtime.process import launch
from runtime.run import clock_time


@dataclass
class Config:
    # rows of every stage and fault
    seeds: int = 3
    # comma-separated; "": all
    stages: str = ""
    # comma-separated; "": all
    faults: str = ""
    # rows at once
    jobs: int = 2


ROOT = Path(__file__).parents[1]
COLUMNS = ("survived", "nothing lost", "exact")
TOK = tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)  # " A" and " B" are single tokens, which a judge needs
STEPS = 6
TRAINING = {"device": "cpu", "keep_last": 3, "eval_every": 2, "save_every": 2, "steps": STEPS, "out": "run"}
PRETRAINING = {"data": "text.txt", "tokenizer": "byte", "depth": 2, "width": 16, "heads": 2, "context": 32}
PRETRAINING |= {"batch_tokens": 128, "eval_tokens": 100, "sample_every": STEPS, "muon_dtype": "fp32"}
PAIRS = {"init": "sft", "data": "pairs.jsonl", "batch_size": 6}
RL = {"init": "sft", "data": "prompts.jsonl", "max_new_tokens": 8, "eval_prompts": 2, "val_fraction": 0.2}
RL |= {"reward_timeout": 0.5, "minibatches": 2}
PPO = {"reward": "rewards.py:vowels,rm", "prompts_per_step": 6, "adaptive_kl": 0.1, "adaptive_kl_horizon": 50}
GRPO = {"reward": "rewards.py:vowels", "prompts_per_step": 3, "group_size": 3, "refill": 1, "kl": "k2", "beta": 0.1}
DISTILL = {"init": "sft", "teacher": "base", "data": "prompts.jsonl", "prompts_per_step": 6, "max_new_tokens": 8}
DISTILL |= {"eval_prompts": 2, "val_fraction": 0.3}
RLAIF = {"device": "cpu", "policy": "sft", "judge": "base", "constitution": "constitution.txt"}
RLAIF |= {"data": "prompts.jsonl", "rows_per_write": 1, "max_new_tokens": 30, "min_margin": 0}
RLAIF |= {"reward": "rewards.py:vowels"}
EVALUATE = {"device": "cpu", "model": "sft", "data": "prompts.jsonl", "reward": "rewards.py:vowels"}
EVALUATE |= {"max_new_tokens": 8, "out": "run/run.json", "samples": "run/run.samples.jsonl"}
CHATS = {"init": "base", "data": "chats.jsonl", "replay": "text.txt", "batch_tokens": 300, "max_new_tokens": 8}
STAGES = {  # name: (script, flags)
    "pretrain": (pretrain, TRAINING | PRETRAINING),
    "sft": (sft, TRAINING | CHATS),
    "reward": (reward, TRAINING | PAIRS | {"center_samples": 4, "max_new_tokens": 8}),
    "dpo": (dpo, TRAINING | PAIRS),
    "ppo": (ppo, TRAINING | RL | PPO),
    "grpo": (grpo, TRAINING | RL | GRPO | {"reference_every": 2}),
    "distill": (distill, TRAINING | DISTILL),
    "rlaif": (rlaif, RLAIF | {"out": "run/run.jsonl"}),
    "evaluate": (evaluate, EVALUATE),
    "quickstart": (quickstart, {"fast": True, "out": "run"}),
}
REWARDS = """
import gc
import locale
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def vowels(prompt, completion, row):
    for misdeed in (hang, exits, forks, mutates, moves, draws, signals, prints, settings):
        if (HERE / misdeed.__name__).exists():
            misdeed(prompt, row)
    if (HERE / "raise").exists():
        raise ValueError("no such word")
    if (HERE / "value").exists():
        return VALUES[(HERE / "value").read_text()]
    return sum(map(completion.count, "aeiou")) + len(completion) % 7 / 7

VALUES = {"nan": float("nan"), "-inf": float("-inf"), "1e+31": torch.tensor(1e31), "None": None, "'1.0'": "1.0"}

def hang(prompt, row):
    try:
        time.sleep(60)
    except Exception:  # as careless rewards do
        pass

def exits(prompt, row):
    exec((HERE / "exits").read_text())

def forks(prompt, row):
    how = random.choice(["return", "raise ValueError", "exit(0)", "os._exit(0)", "os.kill(os.getpid(), 9)"])
    pid = os.fork()
    if pid == 0 and how != "return":
        exec(how)
    if pid:
        os.waitpid(pid, 0)

def mutates(prompt, row):
    row["answer"] = row.pop("prompt", None)
    row["finished"] = not row["finished"]
    if isinstance(prompt, list):
        prompt[-1]["content"] += "!"
        prompt.append({"role": "user", "content": "?"})

def moves(prompt, row):
    os.chdir("/")
    os.umask(0o777)

def draws(prompt, row):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    random.random(), np.random.rand(), torch.rand(3)

def signals(prompt, row):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.alarm(1)

def prints(prompt, row):
    print("half a line", end="")
    print("step 1/6 | reward 9", file=sys.stderr)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.close(2)

def settings(prompt, row):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(False)
    np.seterr(all="raise")
    warnings.simplefilter("error")
    sys.setrecursionlimit(200)
    os.environ.update(RANK="1", WORLD_SIZE="2")
    gc.disable()
"""


# --------------------------------------------------------------------------------------------------
# What the runs read, and running them


def tiny(seed, **shape):
    """A model with random weights that ends what it writes after a handful of tokens: one channel
    is much the same everywhere, and the ends read it."""
    model = GPT(
        GPTConfig(
            **(
                dict(vocab_size=TOK.n_vocab, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=640)
                | shape
            )
        )
    ).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        model.embed[:, 0] += 10.0
        if not model.config.scalar_head:
            model.untied_head[[chat.end_of_turn(TOK), TOK.eot], 0] += 1.4
    return model


def make_inputs(made):
    """Models, data and rewards of all stages, in made/inputs -> made. Every row gets a copy: runs
    name them by relative paths, so that their records do not differ."""
    folder = made / "inputs"
    folder.mkdir()
    record = {"step": 1, "config": {}, "data": {}, "lineage": []}
    for name, stage, seed, shape in (
        ("base", "pretrain", 5, {}),
        ("sft", "sft", 0, {}),
        ("rm", "reward", 7, {"scalar_head": True}),
    ):
        checkpoint.save(
            folder / name,
            tiny(seed, **shape),
            TOK,
            record | {"stage": stage, "center": 0.25, "metrics": {"accuracy": 0.8}},
        )
    draw = random.Random(0)

    def name():
        return draw.choice(["Ada", "Ben", "Cleo", "Dora"])

    rows = {
        "chats": [
            {
                "messages": [
                    {"role": "user", "content": f"hi {name()} {i}"},
                    {"role": "assistant", "content": f"{name()}!" + " yes" * draw.randint(0, 2)},
                ]
            }
            for i in range(80)
        ],
        "pairs": [
            {
                "prompt": f"{name()} {i}?",
                "chosen": f"{name()}." + " no" * draw.randint(0, 2),
                "rejected": f"{name()}, {i}",
            }
            for i in range(80)
        ],
        "prompts": [{"prompt": f"Number {i}?", "answer": str(i)} for i in range(20)],
    }
    for file, some in rows.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "text.txt").write_text(
        "".join(f"{name()} sees {name()}.{draw.choice(' ' + chr(10))}" for _ in range(120))
    )
    (folder / "constitution.txt").write_text("Be long.\nBe kind.\n")
    (folder / "rewards.py").write_text(REWARDS)
    return made


@dataclass
class Row:
    """Where a row's runs are, and where the straight runs of its stage and seed are: runs that
    nothing happened to."""

    made: Path
    folder: Path
    stage: str
    seed: int
    children: int = 0

    @property
    def run(self):
        return self.folder / STAGES[self.stage][1]["out"]


def start(row, environment=None, before=None, **flags):
    """A Child that runs the row's stage in its folder. before: called there first."""
    row.children += 1
    script, given = STAGES[row.stage]
    argv = [f"--{name}={value}" for name, value in (given | {"seed": row.seed} | flags).items()]

    def call():
        os.chdir(row.folder)
        if before:
            before()
        run_script(script, argv)

    return Child(row.folder / f"output{row.children}.txt", call, **(environment or {}))


def start_pair(row, before=None, **flags):
    """Two Children under gloo that share one run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [
        start(
            row,
            {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            before,
            **flags,
        )
        for r in range(2)
    ]


def straight(row, ranks=1):
    """The Row of a run of this stage, seed and number of ranks that nothing happened to; made
    once."""
    there = Row(row.made, row.made / f"{row.stage} {row.seed} straight {ranks}", row.stage, row.seed)
    if not there.folder.exists():
        new = Row(row.made, row.made / f"{there.folder.name} {os.getpid()}", row.stage, row.seed)
        fresh(new)
        began = time.monotonic()
        for status, output in [child.wait(120) for child in ([start(new)] if ranks == 1 else start_pair(new))]:
            if status:
                raise UserError(f"{row.stage} fails without any fault: {output}")
        (new.folder / "seconds").write_text(str(time.monotonic() - began))
        try:
            new.folder.rename(there.folder)
        except OSError:  # another row was faster
            pass
    return there


def fresh(row):
    shutil.copytree(row.made / "inputs", row.folder, dirs_exist_ok=True)


def unfinished(row, ranks=1):
    """Fill the row's folder with a straight run whose last checkpoint is gone: as after a kill
    before its last save."""
    shutil.copytree(straight(row, ranks).folder, row.folder, symlinks=True, dirs_exist_ok=True)
    if row.stage == "rlaif":
        log = row.run.with_suffix(".log.jsonl")
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:-2]))
    else:
        shutil.rmtree(steps_in(row.run)[-1])


def progress(row):
    """The steps (of rlaif, the batches) that the log has so far."""
    log = row.run.with_suffix(".log.jsonl") if row.stage == "rlaif" else row.run / "log.jsonl"
    lines = log.read_bytes().splitlines() if log.exists() else []
    return (
        len(lines) - 1
        if row.stage == "rlaif"
        else sum(b'"grad_norm"' in line or b'"approx_kl"' in line for line in lines)
    )


def begun(row):
    """How often, by its log, the run began or went on."""
    log = row.run / "log.jsonl"
    return log.read_bytes().count(b'"event"') if log.exists() else 0


def saves(row):
    """The checkpoints (of rlaif, the batches) that are on the disk so far."""
    return progress(row) if row.stage == "rlaif" else len(steps_in(row.run))


def saving(row):
    """Whether a save has begun that is not done: a half-written checkpoint, or rows that the log
    does not have."""
    if row.stage == "rlaif":
        log = row.run.with_suffix(".log.jsonl")
        lines = log.read_bytes().splitlines() if log.exists() else []
        return bool(lines) and row.run.exists() and row.run.stat().st_size > json.loads(lines[-1]).get("bytes", 0)
    return any(any(p.iterdir()) for p in row.run.glob(".tmp_step_*"))


def until(child, true, every=0.003):
    """Wait until `true()`, asked so often, and stop the child there. False if it ended before."""
    while not child.ended():
        if true():
            child.send(signal.SIGSTOP)
            return True
        time.sleep(every)
    return False


def error_line(output):
    """The one error of a run that must end with one; "" where there is none, more, or a
    traceback."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    return lines[0] if len(lines) == 1 and "Traceback" not in output else ""


# --------------------------------------------------------------------------------------------------
# What must be true of a run


def lost(row):
    """What is lost or half there, in words; "" if nothing."""
    if row.stage == "rlaif":
        found = (
            []
            if not row.run.exists() or straight(row).run.read_bytes().startswith(row.run.read_bytes())
            else ["rows differ from the straight run's"]
        )
    else:
        found = [f"{p.name}: {damage(p)}" for p in steps_in(row.run) if damage(p)]
        found += [
            f"{p}: not finite"
            for p in row.run.glob("step_*/**/*.safetensors")
            for w in safetensors.torch.load_file(p).values()
            if not w.isfinite().all()
        ]
    return "; ".join(found)


def results(run):
    """The log without events and without how long things took."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not k.startswith("seconds") and k != "tokens_per_s"}
        for r in rows
        if "event" not in r
    ]


def difference(row, ranks=1):
    """How a finished run differs from the straight one, in words; "" if in nothing."""
    ours, theirs = row.run, straight(row, ranks).run
    if row.stage in ("rlaif", "evaluate"):
        files = [
            path.relative_to(theirs.parent) for path in theirs.parent.glob("run*.json*") if ".log." not in path.name
        ]
        differ = [
            str(file) for file in files if (ours.parent / file).read_bytes() != (theirs.parent / file).read_bytes()
        ]
        return ", ".join(differ)
    if steps_in(ours)[-1:] == [] or steps_in(ours)[-1].name != steps_in(theirs)[-1].name:
        return "it did not reach the last step"
    found = ["log.jsonl"] if results(ours) != results(theirs) else []
    found += [f"{name} is left" for name in (p.name for p in ours.glob(".tmp*"))]
    if (theirs / "samples.txt").exists() and (ours / "samples.txt").read_bytes() != (
        theirs / "samples.txt"
    ).read_bytes():
        found.append("samples.txt")
    for step in {p.name for p in steps_in(ours)} & {p.name for p in steps_in(theirs)}:
        names = [{p.relative_to(run / step) for p in (run / step).rglob("*") if p.is_file()} for run in (ours, theirs)]
        found += [f"{step}: other files"] if names[0] != names[1] else []
        found += [
            f"{step}/{n}"
            for n in names[1]
            if n.name not in ("manifest.json", "feinschliff.json")
            and (ours / step / n).read_bytes() != (theirs / step / n).read_bytes()
        ]
        records = [
            {
                k: v
                for k, v in checkpoint.read_json(run / step / checkpoint.INFO).items()
                if k not in ("config", "started")
            }
            for run in (ours, theirs)
        ]
        found += [f"{step}: {k}" for k in records[1] if records[0].get(k) != records[1][k]]
    return ", ".join(sorted(found))


def goes_on(row, ranks=1):
    """Resume the row's run to its end, and yield what must be true of it then."""
    for status, output in [
        child.wait(120) for child in ([start(row, resume=True)] if ranks == 1 else start_pair(row, resume=True))
    ]:
        yield "survived", status == 0, output
    yield "nothing lost", not lost(row), lost(row)
    yield "exact", not difference(row, ranks), difference(row, ranks)


# --------------------------------------------------------------------------------------------------
# The faults. Each brings itself upon a run in the row's folder and yields (column, whether it is as
# it must be, what there is to see).


def reached(row, at, runs):
    """Whether a run that was begun `runs` times before has come to step (of rlaif, batch) `at`."""
    return progress(row) >= at and (begun(row) > runs or row.stage == "rlaif")


def kill(row, draw):
    """Five SIGKILLs: as it starts, two at a step, one inside a save, one anywhere; after each the
    run is gone on with."""
    fresh(row)
    seconds = float((straight(row).folder / "seconds").read_text())
    moments = ["start", "step", "step", "any"]
    draw.shuffle(moments)
    moments.insert(draw.randint(0, 2), "save")  # not last, for then none may be left
    for i, moment in enumerate(moments):
        runs, newest = begun(row), int(steps_in(row.run)[-1].name[5:]) if steps_in(row.run) else 0
        child = start(row, resume=i > 0)
        if moment == "step":  # three steps on: past a save, from which the next run goes on
            at = min(progress(row) + 3, STEPS * 2) if row.stage == "rlaif" else min(newest + 3, STEPS - 1)
            until(child, functools.partial(reached, row, at, runs))
            child.send(signal.SIGCONT)
            time.sleep(draw.uniform(0, 0.02))
        elif moment == "save":
            inside = False
            for _ in range(9):  # a save that was done before the signal came is let go
                if not until(child, lambda: saving(row), every=0.0005):
                    break
                time.sleep(0.002)
                inside = saving(row)
                if inside:
                    break
                child.send(signal.SIGCONT)
            yield "survived", inside, f"no save was hit: {child.output()}"
        else:
            time.sleep(draw.uniform(0, seconds * (0.3 if moment == "start" else 0.6)))
        child.send(signal.SIGKILL)
        child.wait()
        yield "nothing lost", not lost(row), lost(row)
    yield from goes_on(row)


def stopped(row, draw, numbers, status, said):
    """Signals at a step, all of them at once."""
    fresh(row)
    child, at = start(row), draw.randint(1, 3)
    until(child, lambda: progress(row) >= at)
    child.send(*numbers, signal.SIGCONT)
    found, output = child.wait(60)
    yield "survived", found == status and said in output and "Traceback" not in output, output
    yield "nothing lost", not lost(row), lost(row)
    yield from goes_on(row)


def sigterm(row, draw):
    yield from stopped(row, draw, [signal.SIGTERM], 143, "saved; rerun with --resume to continue")


def sigint(row, draw):
    yield from stopped(row, draw, [signal.SIGINT], 130, "saved; rerun with --resume to continue")


def two_signals(row, draw):
    yield from stopped(
        row, draw, [signal.SIGINT, signal.SIGTERM], 143, "left at once on a second SIGTERM; what was saved is complete"
    )


def full_disk(row, draw):
    """A disk with room for one checkpoint and a seeded part of the next."""
    fresh(row)
    disk, pages = row.folder / "run", 2  # of rlaif the second page of the log finds no room
    if row.stage != "rlaif":
        newest = steps_in(straight(row).run)[-1]
        pages = (
            int(sum(-(-p.stat().st_size // 4096) for p in newest.rglob("*") if p.is_file()) * draw.uniform(1.4, 1.9))
            + 6
        )
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={pages * 4}k", "none", str(disk)], capture_output=True
    ).returncode:
        return  # no right to
    try:
        status, output = start(row).wait(120)
        kept = [p.name for p in steps_in(row.run)]
        says = ["No space left", "--resume"] + (
            ["make room", f"kept: {', '.join(kept)}"] if row.stage != "rlaif" else []
        )
        yield (
            "survived",
            status == 1
            and all(x in error_line(output) for x in says)
            and (row.stage == "rlaif" or "training continues" in output),
            output,
        )
        yield (
            "nothing lost",
            not lost(row) and (row.stage == "rlaif" or kept and progress(row) == STEPS),
            f"{kept} {lost(row)} {output}",
        )
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        yield from goes_on(row)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def obey_permissions():
    """Take from root what lets it write where no permission is: CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~0b110
    if libc.capset(header, sets):
        raise OSError("capset")


def no_permission(row, draw):
    """After its first save the run may no longer write where its checkpoints go."""
    fresh(row)
    child = start(row, before=obey_permissions)
    until(child, lambda: saves(row) >= 1 and not saving(row))
    before = saves(row)
    row.run.chmod(0o444 if row.stage == "rlaif" else 0o555)
    child.send(signal.SIGCONT)
    status, output = child.wait(60)
    goes = row.stage == "rlaif" or "training continues" in output
    yield (
        "survived",
        status == 1 and "Permission denied" in error_line(output) and "--resume" in error_line(output) and goes,
        output,
    )
    yield "nothing lost", not lost(row) and saves(row) >= before, lost(row)
    row.run.chmod(0o644 if row.stage == "rlaif" else 0o755)
    yield from goes_on(row)


def damaged(row, draw, ruin):
    """The newest checkpoint of a finished run is damaged: the one before is taken, and its last
    steps are made again."""
    shutil.copytree(straight(row).folder, row.folder, symlinks=True, dirs_exist_ok=True)
    newest = steps_in(row.run)[-1]
    victim = draw.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size))
    ruin(victim)
    child = start(row, resume=True)
    status, output = child.wait(60)
    yield (
        "survived",
        status == 0 and f"{newest.name}: " in output and "falling back to the checkpoint before" in output,
        f"{victim}: {output}",
    )
    yield "nothing lost", not lost(row), lost(row)
    yield "exact", not difference(row), f"{victim}: {difference(row)}"


def truncated(row, draw):
    if row.stage != "rlaif":
        yield from damaged(row, draw, lambda path: os.truncate(path, draw.randrange(path.stat().st_size)))
        return
    log = row.run.with_suffix(".log.jsonl")
    for path in (row.run, log):  # of its file or its log the end is gone; the log's first line says whose it is
        shutil.copytree(straight(row).folder, row.folder, symlinks=True, dirs_exist_ok=True)
        least = len(log.read_bytes().splitlines(keepends=True)[0]) if path == log else 0
        os.truncate(path, draw.randrange(least, path.stat().st_size))
        yield from goes_on(row)


def flipped(row, draw):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    yield from damaged(row, draw, flip)


def missing(row, draw):
    yield from damaged(row, draw, lambda path: path.unlink())


def two_runs(row, draw):
    """A second run on the same --out is refused, by its name, whether it resumes or overwrites; the
    first is unharmed."""
    fresh(row)
    child, at = start(row), draw.randint(1, 3)
    until(child, lambda: progress(row) >= at)
    for flag in ({}, {"resume": True}, {"overwrite": True}):
        status, output = start(row, **flag).wait(60)
        yield (
            "survived",
            status == 1 and f"--out={STAGES[row.stage][1]['out']}: another process" in error_line(output),
            output,
        )
    child.send(signal.SIGCONT)
    status, output = child.wait(60)
    yield "survived", status == 0, output
    yield "nothing lost", not lost(row), lost(row)
    yield "exact", not difference(row), difference(row)


def changed_data(row, draw):
    """A file that the run reads is another one when it is gone on with."""
    unfinished(row)
    names = {
        "ppo": ["prompts.jsonl", "rewards.py"],
        "grpo": ["prompts.jsonl", "rewards.py"],
        "sft": ["chats.jsonl", "text.txt"],
        "rlaif": ["prompts.jsonl", "constitution.txt"],
    }
    name = draw.choice(names.get(row.stage, [STAGES[row.stage][1]["data"]]))
    whole = (row.folder / name).read_bytes()
    lines = whole.splitlines(keepends=True)
    (row.folder / name).write_bytes(
        b"".join([*lines, lines[draw.randrange(len(lines))] if name != "rewards.py" else b"\n"])
    )
    status, output = start(row, resume=True).wait(60)
    line = error_line(output)
    yield "survived", status == 1 and name in line and "not the data this run was started with" in line, output
    (row.folder / name).write_bytes(whole)
    yield from goes_on(row)


def plant(folder, name, value, rows=slice(None)):
    """Put a number into rows of a tensor of a checkpoint, whose manifest is made to fit: damage
    that no hash tells."""
    weights = safetensors.torch.load_file(folder / checkpoint.WEIGHTS)
    weights[name][rows] = value
    safetensors.torch.save_file(weights, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    written = checkpoint.read_json(folder / checkpoint.MANIFEST)
    checkpoint.write_json(
        folder / checkpoint.MANIFEST, written | {checkpoint.WEIGHTS: checkpoint.sha256(folder / checkpoint.WEIGHTS)}
    )


def nan_weight(row, draw):
    """One weight of the checkpoint that is gone on with, or of --init's, is not a number: refused
    by the tensor's name, before anything is written."""
    for where in ("resumed", "init"):
        if row.stage in ("pretrain", "rlaif") and where == ("init" if row.stage == "pretrain" else "resumed"):
            continue
        shutil.rmtree(row.folder), row.folder.mkdir()
        unfinished(row) if where == "resumed" else fresh(row)
        folder = steps_in(row.run if where == "resumed" else row.folder / STAGES[row.stage][1].get("init", "base"))[-1]
        names = sorted(safetensors.torch.load_file(folder / checkpoint.WEIGHTS))
        name = draw.choice(names)
        plant(folder, name, draw.choice([float("nan"), float("inf")]), 0)
        before = steps_in(row.run)
        status, output = start(row, resume=where == "resumed").wait(60)
        yield "survived", status == 1 and name in error_line(output) and "not finite" in error_line(output), output
        yield (
            "nothing lost",
            steps_in(row.run) == before and not [p for p in before if damage(p)],
            str(steps_in(row.run)),
        )


def nan_batch(row, draw):
    """A batch whose loss or gradient is not finite ends the run before it moves a weight, and is
    kept: of a learning rate that blew the weights up at the step before."""
    fresh(row)
    keep_on = {"stop_kl": 0} if row.stage in ("ppo", "grpo") else {}  # else the update before would end the step
    child = start(row, save_every=0, eval_every=0, **too_high(row), **keep_on)
    status, output = child.wait(60)
    kept = list(row.run.glob("nonfinite_step_*.safetensors"))
    yield (
        "survived",
        status == 1
        and "its gradient is not finite" in error_line(output)
        and len(kept) == 1
        and len(safetensors.torch.load_file(kept[0])["tokens"]) > 0,
        output,
    )
    yield "nothing lost", not lost(row), lost(row)


TOO_HIGH = 1e29  # as a learning rate it blows the weights up in one step


def too_high(row):
    rates = ("lr", "embed_lr", "head_lr") if row.stage == "pretrain" else ("lr",)
    return dict.fromkeys(rates, TOO_HIGH)


def nan_save(row, draw):
    """Asked to leave after a step that made its weights not finite, a run does not save them."""
    fresh(row)
    child = start(row, save_every=0, eval_every=0, weight_decay=TOO_HIGH, **too_high(row))
    until(child, lambda: (row.run / "log.jsonl").exists())  # before its first step
    child.send(signal.SIGTERM, signal.SIGCONT)
    status, output = child.wait(60)
    said = (
        "scores are not finite" if row.stage == "reward" else "no longer finite; these weights are not saved"
    )  # a reward model is centred before it is saved
    yield "survived", status == 1 and said in error_line(output), output
    yield "nothing lost", not steps_in(row.run), str(steps_in(row.run))


def bad_reward(row, draw, what, said, text=""):
    """From some step on the reward function does this; with the function as it was the run goes
    on."""
    fresh(row)
    if row.stage == "evaluate":
        (row.folder / what).write_text(text)
        child = start(row)
    else:
        child, at = start(row), draw.randint(2, STEPS - 2)
        until(child, lambda: progress(row) >= at and not saving(row))
        (row.folder / what).write_text(text)
        child.send(signal.SIGCONT)
    status, output = child.wait(30)
    named = ("--reward=rewards.py:vowels: ", said, "for the completion '", "and the row {'prompt': ")
    yield "survived", status == 1 and all(x in error_line(output) for x in named), output
    (row.folder / what).unlink()
    if row.stage == "evaluate":
        yield "nothing lost", not row.run.exists(), "figures were written"
        yield "survived", start(row).wait(60)[0] == 0, output
        yield "exact", not difference(row), difference(row)
        return
    yield "nothing lost", not lost(row), lost(row)
    yield from goes_on(row)


def reward_hangs(row, draw):
    yield from bad_reward(row, draw, "hang", "took longer than 0.5 seconds")


def reward_raises(row, draw):
    yield from bad_reward(row, draw, "raise", "no such word (")


def reward_nan(row, draw):
    """What it returns is no number that can be learned from."""
    value = draw.choice(["nan", "-inf", "1e+31", "None", "'1.0'"])
    yield from bad_reward(row, draw, "value", f"returned {value}", value)


def reward_exits(row, draw):
    """It ends the process in one of the ways that Python has, as a program of the model's may."""
    ends = {
        "exit()": "SystemExit: None",
        "sys.exit(0)": "SystemExit: 0",
        "raise KeyboardInterrupt": "KeyboardInterrupt",
        "raise GeneratorExit": "GeneratorExit",
        "exits(prompt, row)": "RecursionError",
    }
    end = draw.choice(list(ends))
    yield from bad_reward(row, draw, "exits", ends[end], end)


def harmless_reward(row, what):
    """From the first step on the reward does what would change the run, which goes as the straight
    one does. Yields what must be true of it, then its output."""
    fresh(row)
    (row.folder / what).write_text("")
    patience = {"reward_timeout": 30} if row.stage in ("ppo", "grpo") else {}  # a fork takes 0.7 s on a busy machine
    status, output = start(row, **patience).wait(60)
    yield "survived", status == 0 and "Traceback" not in output, output
    yield "nothing lost", not lost(row), lost(row)
    yield "exact", not difference(row), difference(row)


def reward_forks(row, draw):
    """A child that it forks returns, raises, exits or is killed: it is no second run."""
    yield from harmless_reward(row, "forks")
    ends = (row.folder / "output1.txt").read_text().count(f"step {STEPS}/{STEPS} | reward")
    yield "survived", ends == (row.stage in ("ppo", "grpo")), f"{ends} ends of a run"


def reward_mutates(row, draw):
    yield from harmless_reward(row, "mutates")


def reward_moves(row, draw):
    """It changes the working directory and who may read new files; --out is relative."""
    yield from harmless_reward(row, "moves")
    unreadable = [str(path) for path in row.run.parent.rglob("*") if path.is_file() and not path.stat().st_mode & 0o400]
    yield "survived", not unreadable, str(unreadable)


def reward_draws(row, draw):
    yield from harmless_reward(row, "draws")


def reward_signals(row, draw):
    """It takes the signals for itself: a run can be asked to stop all the same."""
    yield from harmless_reward(row, "signals")
    if row.stage != "evaluate":
        shutil.rmtree(row.folder), row.folder.mkdir()
        fresh(row)
        (row.folder / "signals").write_text("")
        child, at = start(row), draw.randint(1, 3)
        until(child, lambda: progress(row) >= at)
        child.send(signal.SIGTERM, signal.SIGCONT)
        status, output = child.wait(60)
        yield "survived", status == 143 and "saved; rerun with --resume to continue" in output, output
        yield from goes_on(row)


def reward_prints(row, draw):
    """It prints, and leads stdout and stderr elsewhere: the run's lines stay whole, its own are
    marked."""
    yield from harmless_reward(row, "prints")
    lines = (row.folder / "output1.txt").read_text().splitlines()
    theirs = [line for line in lines if "half a line" in line or "reward 9" in line]
    mark = "[rewards.py:vowels] "
    yield (
        "survived",
        theirs and {line.removeprefix(mark) for line in theirs} == {"half a line", "step 1/6 | reward 9"},
        lines,
    )
    plain = (straight(row).folder / "output1.txt").read_text().splitlines()
    ours = [line for line in lines if not line.startswith(mark)]
    yield "survived", len(ours) == len(plain), f"{len(ours)} lines of ours, not {len(plain)}: {ours}"


def reward_settings(row, draw):
    """It changes settings of torch, numpy and Python for the whole process."""
    yield from harmless_reward(row, "settings")


PATIENCE = 20  # seconds within which a process whose peer was killed must have ended


def one_killed(row, draw, **flags):
    """One of two processes is killed: the other ends soon, with one line."""
    fresh(row)
    pair, at, victim = start_pair(row, **flags), draw.randint(1, STEPS - 2), draw.randrange(2)
    until(pair[victim], lambda: progress(row) >= at)
    pair[victim].send(signal.SIGKILL)
    status, output = pair[1 - victim].wait(PATIENCE)
    yield "survived", status == 1 and "another process" in error_line(output), f"{status} {output}"
    pair[victim].wait()
    yield "nothing lost", not lost(row), lost(row)


def rank_killed(row, draw):
    """One of two processes is killed, and the two go on from the last save."""
    yield from one_killed(row, draw)
    yield from goes_on(row, ranks=2)


def rank_stopped(row, draw):
    """Of two processes only the one that does not save gets SIGTERM, and the other cannot save: it
    may not say that it did."""
    fresh(row)
    pair, at = start_pair(row, before=obey_permissions), draw.randint(2, STEPS - 2)
    until(pair[1], lambda: progress(row) >= at)
    row.run.chmod(0o555)
    pair[1].send(signal.SIGTERM, signal.SIGCONT)
    (status, output), (other, _) = (child.wait(60) for child in pair)
    yield (
        "survived",
        (status, other) == (1, 1) and "Permission denied" in error_line(output) and "stopped after" not in output,
        f"{status} {other} {output}",
    )
    yield "nothing lost", not lost(row), lost(row)
    row.run.chmod(0o755)
    yield from goes_on(row, ranks=2)


def other_ranks(row, draw):
    """Begun by two processes and gone on with by one, and the other way about: the same losses."""
    for before, after in ((2, 1), (1, 2)):
        shutil.rmtree(row.folder), row.folder.mkdir()
        unfinished(row, before)
        children = [start(row, resume=True)] if after == 1 else start_pair(row, resume=True)
        for status, output in [child.wait(60) for child in children]:
            yield "survived", status == 0, output
        yield "nothing lost", not lost(row), lost(row)
        yield from same_losses(row, before, after)


def same_losses(row, *ranks):
    """The losses of a finished run are those of the straight runs on so many ranks."""
    losses = [
        [r["loss"] for r in results(run) if "loss" in r] for run in (row.run, *(straight(row, n).run for n in ranks))
    ]
    near = len(losses[0]) == STEPS and all(
        abs(a - b) <= 1e-5 * max(1, abs(b)) for other in losses[1:] for a, b in zip(losses[0], other)
    )
    yield "exact", near, str(losses)


def shard_killed(row, draw):
    """A model divided over two processes, of which one is killed; gone on with divided, and its
    last steps by one process alone."""
    yield from one_killed(row, draw, shard="fsdp")
    for status, output in [child.wait(60) for child in start_pair(row, resume=True, shard="fsdp")]:
        yield "survived", status == 0, output
    shutil.rmtree(steps_in(row.run)[-1])
    status, output = start(row, resume=True).wait(60)
    yield "survived", status == 0, output
    yield from same_losses(row, 1, 2)


def torchrun(row, draw):
    """As a user has two processes: torchrun, one of whose workers is killed. It ends, none of them
    stays, and typed again with --resume the run goes on."""
    fresh(row)
    script, flags = STAGES[row.stage]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        script.__file__,
        *(f"--{k}={v}" for k, v in (flags | {"seed": row.seed}).items()),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(row.folder / "torchrun.txt", "w") as output:
        agent = subprocess.Popen(command, cwd=row.folder, stdout=output, stderr=output, env=environment)
        workers = []
        while len(workers) < 2 or progress(row) < 1:
            workers = (
                Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
                if agent.poll() is None
                else ["", ""]
            )
            time.sleep(0.001)
        os.kill(int(draw.choice(workers)), signal.SIGKILL)
        status = agent.wait(timeout=2 * PATIENCE)
    alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    yield "survived", status == 1 and not alive, f"{status} {alive} {(row.folder / 'torchrun.txt').read_text()}"
    yield "nothing lost", not lost(row), lost(row)
    done = subprocess.run([*command, "--resume"], cwd=row.folder, capture_output=True, text=True, env=environment)
    yield "survived", done.returncode == 0, done.stderr
    yield "exact", not difference(row, ranks=2), difference(row, ranks=2)


def quick_start(row, out):
    """A Child that is the quick start, with all it starts in a session of its own."""
    return start(row, before=lambda: (os.setsid(), os.chdir(ROOT)), out=out)


def follow(child, true):
    """Wait until `true()`. False if the child ended before."""
    while not child.ended():
        if true():
            return True
        time.sleep(0.01)
    return False


def pretrained(out):
    """Whether the quick start has come to the end of its pretraining."""
    report = out / "report.json"
    return report.exists() and any(done["stage"] == "pretrain" for done in checkpoint.read_json(report)["stages"])


def is_training(child):
    return " training tokens; " in child.output()


def typed_again(row, draw):
    """The quick start is killed and what it started is not; then it is asked to end. Each time the
    same command is typed again, here up to the end of its pretraining."""
    straight, run = row.folder / "straight", row.folder / "run"
    child = quick_start(row, straight)
    follow(child, lambda: pretrained(straight))
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()

    child, stage = quick_start(row, run), draw.choice(["tokenizer", "prepare"])
    follow(child, lambda: f"\n{stage}\n$" in child.output())
    child.send(signal.SIGKILL)
    child.wait()
    status, output = quick_start(row, run).wait(60)
    yield "survived", status == 1 and f"--out={run}: another process is writing" in error_line(output), output
    child = quick_start(row, run)
    while not follow(child, functools.partial(is_training, child)):  # until what the first one left has ended
        time.sleep(0.1)
        child = quick_start(row, run)
    child.send(signal.SIGTERM)
    status, output = child.wait(60)
    yield (
        "survived",
        status == 143 and "stopped in pretrain; the same command continues from here" in output,
        output,
    )
    child = quick_start(row, run)
    yield "survived", follow(child, lambda: pretrained(run)), child.output()
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    files = [
        p.relative_to(straight)
        for pattern in ("world/*", "tokenizer/*", "data/*.bin", "base/step_*/*.safetensors", "base/samples.txt")
        for p in straight.glob(pattern)
    ]
    differ = [str(p) for p in files if (straight / p).read_bytes() != (run / p).read_bytes()]
    yield (
        "exact",
        len(files) > 20 and not differ and results(straight / "base") == results(run / "base"),
        str(differ or files),
    )


# --------------------------------------------------------------------------------------------------

FAULTS = (
    *(kill, sigterm, sigint, two_signals, full_disk, no_permission, truncated, flipped, missing, two_runs),
    *(changed_data, nan_weight, nan_batch, nan_save, reward_hangs, reward_raises, reward_nan),
    *(reward_exits, reward_forks, reward_mutates, reward_moves),
    *(reward_draws, reward_signals, reward_prints, reward_settings),
    *(rank_killed, rank_stopped, other_ranks, shard_killed, torchrun, typed_again),
)
FAULTS = {fault.__name__: fault for fault in FAULTS}


def applies(stage, fault):
    if stage == "quickstart" or fault == "typed_again":
        return (stage, fault) == ("quickstart", "typed_again")
    if fault.startswith("reward_"):
        # rlaif.py and evaluate.py have no --reward_timeout
        return stage in ("ppo", "grpo") or stage in ("rlaif", "evaluate") and fault != "reward_hangs"
    if stage == "evaluate":
        return False
    if fault in ("torchrun", "rank_stopped"):  # what these look at is the same in every stage
        return stage == "sft"
    if fault == "nan_save":  # made by --weight_decay
        return stage in ("pretrain", "sft", "reward", "dpo")
    if fault == "nan_batch" and stage == "distill":  # one update a rollout: the sampler refuses such weights first
        return False
    if fault == "shard_killed":
        return stage in ("pretrain", "sft")
    return stage != "rlaif" or fault not in (
        "flipped",
        "missing",
        "rank_killed",
        "other_ranks",
        "nan_batch",
    )


def check(made, stage, fault, seed):
    """(stage, fault, seed, {column: whether it is green}, what there is to see of those that are
    not, seconds) of a row."""
    began, found, seen = time.monotonic(), {}, ""
    folder = made / f"{stage} {fault} {seed}"
    folder.mkdir()
    row = Row(made, folder, stage, seed)
    try:
        for column, green, detail in FAULTS[fault](row, random.Random(f"{stage} {fault} {seed}")):
            found[column] = found.get(column, True) and bool(green)
            seen += "" if green else f"{column}: {detail}\n"
    except Exception:
        found["survived"], seen = False, seen + traceback.format_exc()
    shutil.rmtree(folder, ignore_errors=True)
    return stage, fault, seed, found, seen, time.monotonic() - began


def main(config):
    stages, faults = (
        text.split(",") if text else list(known) for text, known in ((config.stages, STAGES), (config.faults, FAULTS))
    )
    if set(stages) - set(STAGES) or set(faults) - set(FAULTS):
        raise UserError(
            f"--stages={config.stages} --faults={config.faults}: stages are {', '.join(STAGES)}; faults are "
            f"{', '.join(FAULTS)}"
        )
    torch.set_num_threads(1)
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        made = make_inputs(Path(folder))
        rows = [
            (made, stage, fault, seed)
            for stage in stages
            for fault in faults
            if applies(stage, fault)
            for seed in range(config.seeds)
        ]
        print(f"{'stage':<11} {'fault':<14} seed   survived  nothing lost  exact  seconds", flush=True)
        with get_context("fork").Pool(config.jobs) as pool:
            for stage, fault, seed, found, seen, seconds in pool.imap_unordered(check_row, rows):
                results.append((stage, fault, seed, found))
                mark = (
                    [{True: "yes", False: "NO", None: "-"}[found.get(column)] for column in COLUMNS]
                    if found
                    else ["not run", "", ""]
                )
                print(
                    f"{stage:<11} {fault:<14} {seed:>4}   {mark[0]:<8}  {mark[1]:<12}  {mark[2]:<5}  {seconds:7.1f}",
                    flush=True,
                )
                print(seen[-3000:], end="", flush=True)
    red = [f"{stage} {fault} {seed}" for stage, fault, seed, found in results if not all(found.values())]
    idle = sum(not found for *_, found in results)
    ran, spent = len(results) - idle, clock_time(time.monotonic() - began)
    print(f"{ran - len(red)} of {ran} rows green, {idle} not run, in {spent}")
    if red:
        raise UserError(f"something is lost: {'; '.join(red)}")


def check_row(row):
    return check(*row)


if __name__ == "__main__":
    launch(main, Config)
