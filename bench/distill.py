"""distill.py on finished quick starts: how much of its teacher's gold a student reaches.

The student is the SFT model, the teacher GRPO's, of the same quick start: of each directory of
--starts, a quick start with its own seed. It learns from its own answers to the world's prompts,
64 a step, then 500 held-out ones are measured. Each part is a command that a user would type, and
what is done is not done again. Last line of output: JSON.

    python -m bench.distill --starts=out/world/seed-0,out/world/seed-1-1-thread
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.read import read_json
from figures import mean_interval
from runtime.checkpoint import newest_finished
from runtime.errors import UserError
from runtime.process import describe, launch

GOLD = "data/world.py:gold"


@dataclass
class Config:
    # finished quick starts, comma-separated; the n-th is trained and measured with seed n
    starts: str
    # directory of everything
    out: str = "out/bench_distill"
    # comma-separated: reverse, forward
    directions: str = "reverse,forward"
    # optimizer steps
    steps: int = 60


def run(*words):
    print(f"$ {shlex.join(['python', *words])}", flush=True)
    status = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL).returncode
    if status:
        raise UserError(f"{shlex.join(words)} ended with status {status}")


def gold_after(config, start, seed, direction):
    """Gold of answers to held-out prompts, sampled from what distill.py makes of the SFT model."""
    out = Path(config.out) / f"{seed}-{direction}"
    world, measured = Path(start) / "world", Path(f"{out}.json")
    if not newest_finished(out):
        models = [f"--init={start}/sft", f"--teacher={start}/grpo", f"--direction={direction}", f"--out={out}"]
        flags = [f"--data={world}/prompts.jsonl", "--max_new_tokens=64", "--micro_batch_tokens=4096", f"--seed={seed}"]
        again = ["--resume"] if out.exists() else []
        run("distill.py", *models, *flags, f"--steps={config.steps}", "--eval_every=0", *again)
    if not measured.exists():
        flags = [f"--data={world}/prompts_test.jsonl", "--max_new_tokens=64", f"--reward={GOLD}", f"--seed={seed}"]
        run("evaluate.py", f"--model={out}", *flags, f"--out={measured}")
    return gold_in(measured)


def gold_in(path):
    return read_json(path)["figures"][f"reward {GOLD}"]["value"]


def main(config):
    Path(config.out).mkdir(parents=True, exist_ok=True)
    directions = config.directions.split(",")
    found = {}
    for seed, start in enumerate(config.starts.split(",")):
        golds = {name: gold_in(f"{start}/{name}.json") for name in ("sft", "grpo")}
        for direction in directions:
            golds[direction] = gold_after(config, start, seed, direction)
        print(f"{start}: " + ", ".join(f"{name} {gold:.3f}" for name, gold in golds.items()), flush=True)
        for name, gold in golds.items():
            found.setdefault(name, []).append(gold)
    for name, golds in found.items():
        mean = mean_interval(golds, seed=0)
        print(f"{name:<8} gold {mean['value']:.3f}, of {len(golds)} seeds {min(golds):.3f} to {max(golds):.3f}")
    print(json.dumps({"steps": config.steps, **describe(torch.device("cpu")), **found}))


if __name__ == "__main__":
    launch(main, Config)
