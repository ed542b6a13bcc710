"""Whether the memory plan is true: every training script, at sizes from 500 MB on, and what its
process came to hold next to what it had said it would.

Measured is the growth of the process's resident memory (VmHWM of /proc/self/status) over what it
had after its imports: once with the machine's memory, where glibc keeps much of what is freed, and
once with little more than planned (ulimit -v), where freed tensors are given back: there the plan
must be right. The models are made up (bench/rl.py), the text is random words. Exit status 1 if a
plan is off by more than 15 %. Linux only; tests/test_cuda.py compares with CUDA's own count.

    python -m bench.memory
    python -m bench.memory --only="dpo; dpo, checkpointed"
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bench.rl import made_up
from quickstart import table
from runtime.errors import UserError
from runtime.process import describe, launch


@dataclass
class Config:
    # stages, separated by semicolons, by their names in the table; "": all
    only: str = ""
    # of each run
    steps: int = 2


CHILD = """
import importlib, re, resource, sys
from runtime.process import launch

def status(name):
    return int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

script, more = importlib.import_module(sys.argv.pop(1)), int(sys.argv.pop(1))
before = status("VmRSS")
if more:
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + more, resource.RLIM_INFINITY))
try:
    launch(script.main, script.Config)
finally:
    print("measured:", status("VmHWM") - before)
"""
MODEL = {"depth": 4, "width": 256, "vocab": 2048, "answers": 64, "prompt": 64, "max_new_tokens": 128}  # of bench/rl.py
ROLLOUT = {"init": "policy", "data": "data.jsonl", "val": "data.jsonl", "max_new_tokens": 128, "eval_prompts": 4}
FLAGS = {
    "pretrain": {
        "data": "words.txt",
        "tokenizer": "byte",
        "depth": 4,
        "width": 256,
        "context": 512,
        "batch_tokens": 16384,
        "eval_tokens": 4000,
        "sample_every": 0,
    },
    "sft": {"init": "policy", "data": "chats.jsonl", "batch_tokens": 8192, "max_new_tokens": 8},
    "reward": {
        "init": "policy",
        "data": "pairs.jsonl",
        "batch_size": 48,
        "center_samples": 8,
        "max_new_tokens": 32,
    },
    "dpo": {"init": "policy", "data": "pairs.jsonl", "batch_size": 48},
    "ppo": {
        **ROLLOUT,
        "reward": "rm",
        "prompts_per_step": 64,
        "epochs": 1,
        "minibatches": 1,
        "unfinished_penalty": 0.0,
    },
    "grpo": {**ROLLOUT, "reward": "data/rules.py:brief", "prompts_per_step": 8, "group_size": 8},
}
CHECKPOINTED = {"checkpoint_activations": True, "micro_batch_tokens": 20000}
RUNS = {  # {row of the table: (script, flags that differ)}
    **{name: (name, {}) for name in FLAGS},
    # checkpointed, larger packs fill 500 MB
    "pretrain, checkpointed": ("pretrain", CHECKPOINTED | {"batch_tokens": 20000}),
    "dpo, checkpointed": ("dpo", CHECKPOINTED | {"batch_size": 96}),
    "ppo, checkpointed": ("ppo", CHECKPOINTED | {"prompts_per_step": 96}),
    "pretrain, most of it the optimizer": (
        "pretrain",
        {"depth": 2, "width": 1024, "micro_batch_tokens": 512, "batch_tokens": 1024, "context": 128},
    ),
}


def measure(script, flags, folder, more=0):
    """(planned, measured) bytes of a run, which may have `more` bytes than after its imports; 0: as
    many as there are."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, str) and (folder / value).exists():
            value = folder / value
        argv.append(f"--{name}={value}")
    command = [sys.executable, "-c", CHILD, script, str(more), *argv]
    command += [f"--out={folder}/out", "--overwrite", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    plan = re.search(r"memory: ([\d,.]+) (MB|GB)", done.stdout)
    if done.returncode or not plan:
        raise UserError(f"{script}.py {' '.join(argv)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    print(re.search("memory: .*", done.stdout)[0], flush=True)
    planned = float(plan[1].replace(",", "")) * {"MB": 1e6, "GB": 1e9}[plan[2]]
    return planned, int(re.search(r"measured: (\d+)", done.stdout)[1])


def random_words(rng, low, high):
    words = "the cat sat on a mat and looked at its own tail while nobody was there".split()
    return " ".join(rng.choice(words, rng.integers(low, high)))


def write_texts(folder):
    """Random words as a corpus, as preferences and as conversations."""
    rng = np.random.default_rng(0)
    (folder / "words.txt").write_text("\n".join(random_words(rng, 20, 300) for _ in range(400)))
    pairs, chats = [], []
    for _ in range(300):
        prompt, chosen, rejected = (random_words(rng, *span) for span in ((10, 40), (20, 80), (20, 80)))
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        chats.append({"prompt": prompt, "completion": chosen})
    for name, rows in (("pairs", pairs), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(config):
    print(f"{describe(torch.device('cpu'))}\n")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_texts(folder)
        made_up(folder, SimpleNamespace(**MODEL))
        for name in [n.strip() for n in config.only.split(";") if n] or RUNS:
            script, change = RUNS[name]
            flags = {"micro_batch_tokens": 8192, "steps": config.steps} | FLAGS[script] | change
            planned, with_ample_memory = measure(script, flags, folder)
            planned, measured = measure(script, flags, folder, int(1.3 * planned + 2e8))
            sizes = [f"{size / 1e6:,.0f}" for size in (planned, measured, with_ample_memory)]
            lines.append([name, *sizes[:2], f"{planned / measured:.2f}", sizes[2]])
            print(lines[-1], flush=True)
    heads = ["stage", "planned MB", "measured MB", "planned / measured", "measured if memory is ample, MB"]
    print("\n" + table([heads, *lines]))
    wrong = [line[0] for line in lines if not 0.85 <= float(line[3]) <= 1.15]
    if wrong:
        raise UserError(f"off by more than 15 %: {', '.join(wrong)}")


if __name__ == "__main__":
    launch(main, Config)
