"""Whether this code is as fast as another checkout, stage by stage: pairs of processes, A B B A ...

Both sides train the same small model from the same checkpoint on the CPU with two threads; seconds
per step are those of log.jsonl without the first steps. Sampling is measured alone as well, as
seconds per token on 32 slots. A pair's ratio, new speed / old speed, is the median over its steps,
as both sides do the same work in each. Every pair starts new processes, forked for each stage. A
stage passes if the 95 % interval of its mean ratio reaches 0.97: it fails if it is slower for sure.

    python -m bench.same_losses --make_golden --old=/tmp/base --checkpoints=/tmp/golden
    python -m bench.speed --old=/tmp/base

The new side has the environment that run.sh sets for glibc's allocator; the old code set the same
itself. Other work on the machine makes intervals wide; the medians tell how much it did.
"""

import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.same_losses import PAIRS, PREPARED, ROOT, Runner, command, hardware
from runtime.cli import launch
from runtime.errors import UserError

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
LIMIT = 0.97
# Student's 97.5 % quantiles for 1, 2, ... 19 degrees of freedom
STUDENT = [
    *[12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131],
    *[2.120, 2.110, 2.101, 2.093],
]


@dataclass
class Config:
    # checkout to compare with
    old: str
    # checkout that is measured; "": this one
    new: str = ""
    # directory written by bench.same_losses --make_golden
    checkpoints: str = "/tmp/golden"
    # pairs of processes per stage
    pairs: int = 15
    # stages, comma-separated; "": all
    only: str = ""


TRAIN = ["--device=cpu", "--print_every=1000", "--eval_every=0", "--save_every=0", "--val_fraction=0.1"]
RL = [*TRAIN, "--init=G/sft", "--reward=data/world.py:gold", "--max_new_tokens=40", "--eval_prompts=4", "--lr=1e-4"]
STAGES = {  # commands with the new flags; G is the directory of checkpoints
    "pretrain": [
        *["pretrain.py", "--init=G/base", *PREPARED, "--device=cpu", "--print_every=1000", "--eval_every=0"],
        *["--save_every=0", "--steps=15"],
    ],
    "sft": [
        *["sft.py", "--init=G/base", "--data=G/world/chat.jsonl", "--batch_tokens=1024", *TRAIN, "--steps=15"],
    ],
    "reward": ["reward.py", "--init=G/rm", *PAIRS, *TRAIN, "--steps=12"],
    "dpo": ["dpo.py", "--init=G/sft", *PAIRS, *TRAIN, "--steps=12"],
    "ppo": ["ppo.py", "--data=G/world/prompts.jsonl", "--prompts_per_step=16", *RL, "--steps=5"],
    "grpo": [
        *["grpo.py", "--data=G/world/problems.jsonl", "--prompts_per_step=4", "--group_size=4", *RL, "--steps=7"],
    ],
    "rlaif": [
        *["rlaif.py", "--policy=G/sft", "--judge=G/base", "--constitution=G/world/constitution.txt"],
        *["--data=G/world/prompts.jsonl", "--limit=64", "--rows_per_write=16", "--max_new_tokens=40", "--device=cpu"],
    ],
    "rollout": [],
}
FIRST_STEPS = {"pretrain": 3, "sft": 3, "reward": 2, "dpo": 2}  # not measured; of the others one


def time_rollout(folder, prompts_path, out):
    """Write the seconds per token of some rollouts. Runs alone, in a process of either code."""
    import inspect
    import json
    import time

    try:
        from runtime.checkpoint import load
        from runtime.process import setup
    except ImportError:
        from checkpoint import load
        from common import setup
    from rollout import rollout

    model = load(folder, setup("cpu", 0))[0]
    with open(prompts_path) as f:
        given = json.load(f)
    parameters = inspect.signature(rollout).parameters
    sizes = {"n": 16, "group_size": 16, "max_new": 40, "max_new_tokens": 40}
    sizes = {name: size for name, size in sizes.items() if name in parameters}
    seconds_per_token = []
    for seed in range(5):
        begin = time.perf_counter()
        samples = rollout(model, given["prompts"], stop=set(given["stop"]), seed=seed, slots=32, **sizes)
        seconds_per_token.append((time.perf_counter() - begin) / sum(len(s.tokens) for s in samples))
    with open(out, "w") as f:
        json.dump(seconds_per_token, f)


def step_seconds(runner, stage, checkpoints):
    """The seconds of each step of a stage (rlaif: batch; rollout: token), without the first."""
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/out.jsonl" if stage == "rlaif" else f"{scratch}/out"
        log = f"{scratch}/out.log.jsonl" if stage == "rlaif" else f"{out}/log.jsonl"
        if stage == "rollout":
            runner.call(time_rollout, f"{checkpoints}/sft", f"{checkpoints}/prompts.json", out)
            return json.loads(Path(out).read_text())[1:]
        runner.run(command(runner.checkout, STAGES[stage], checkpoints, out))
        records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    seconds = [record["seconds"] for record in records if "seconds" in record]
    if stage == "rlaif":  # its log adds them up
        seconds = [b - a for a, b in zip([0.0, *seconds], seconds, strict=False)]
    return seconds[FIRST_STEPS.get(stage, 1) :]


def speed_ratio(old, new):
    """Speed of new / old, from the seconds of each step of both."""
    return statistics.median(a / b for a, b in zip(old, new, strict=True))


def interval(ratios):
    """(geometric mean, low, high) of ratios: Student's 95 % interval of the mean of their logs."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, half = statistics.mean(logs), math.inf
    if len(logs) > 1:
        t = STUDENT[min(len(logs) - 2, len(STUDENT) - 1)]
        half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def measure(config, stages):
    """{stage: [(old, new seconds of each step), ...]} over all pairs, without stages that fail."""
    new = config.new or ROOT
    times = {stage: [] for stage in stages}
    for pair in range(config.pairs):
        runners = {"old": Runner(config.old), "new": Runner(new, MALLOC)}
        for runner in runners.values():
            runner.run(["-c", "pass"])  # the imports are over when this returns
        for stage in list(times):
            order = ["old", "new"] if pair % 2 == 0 else ["new", "old"]
            try:
                found = {side: step_seconds(runners[side], stage, config.checkpoints) for side in order}
                times[stage].append((found["old"], found["new"]))
            except UserError as e:
                print(f"{stage} failed: {e.args[0]}")
                del times[stage]
        for runner in runners.values():
            runner.close()
        ratios = [f"{stage} {speed_ratio(*pairs[-1]):.3f}" for stage, pairs in times.items()]
        print(f"pair {pair + 1}/{config.pairs}: {', '.join(ratios)}", flush=True)
    return times


def main(config):
    stages = [name for name in config.only.split(",") if name] or list(STAGES)
    for name in stages:
        if name not in STAGES:
            raise UserError(f"--only={config.only}: the stages are {', '.join(STAGES)}")
    if not Path(config.checkpoints, "prompts.json").exists():
        raise UserError(
            f"--checkpoints={config.checkpoints}: nothing is there; bench.same_losses --make_golden writes it"
        )
    config.checkpoints = str(Path(config.checkpoints).resolve())  # the runs have directories of their own
    begin = time.perf_counter()
    times = measure(config, stages)

    print(f"\n{hardware()}; {config.pairs} pairs in {time.perf_counter() - begin:.0f} s; speed of new / old")
    print("stage       mean  [95 %]            median   old and new, median ms per step (token, batch)")
    slower = [stage for stage in stages if stage not in times]
    for stage, pairs in times.items():
        ratios = [speed_ratio(old, new) for old, new in pairs]
        mean, low, high = interval(ratios)
        old, new = (1000 * statistics.median(sum(side, [])) for side in zip(*pairs, strict=True))
        verdict = "ok" if high >= LIMIT else "SLOWER"
        median = statistics.median(ratios)
        print(f"{stage:<9} {mean:6.3f}  [{low:.3f}, {high:.3f}]  {median:8.3f}   {old:9.3f} {new:9.3f}   {verdict}")
        if high < LIMIT:
            slower.append(stage)
    if slower:
        raise UserError(f"FAIL: failed, or slower than {LIMIT} of the old speed for sure: {', '.join(slower)}")
    print(f"PASS: no stage is slower than {LIMIT} of the old speed for sure")


if __name__ == "__main__":
    launch(main, Config)
