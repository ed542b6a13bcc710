"""Whether the memory plan is true: every training script, at sizes from 500 MB on, and what its process came to hold beside what it had said it would.

Measured is the growth of the process's resident memory (VmHWM of /proc/self/status) over what it had after its imports: once with the machine's memory, where
what is freed is kept for speed (common.setup), and once with little more than planned (ulimit -v), where freed tensors are given back: there the plan must be
right. The models are made up (bench/rl.py), the text is random words. Exit status 1 where a plan is off by more than 15 %. Linux only: elsewhere, and on CUDA,
nothing of this kind can be read (tests/test_cuda.py compares with torch.cuda.max_memory_allocated).

    python -m bench.memory
    python -m bench.memory --only="dpo; dpo, checkpointed"
"""
import json, os, re, subprocess, sys, tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bench.rl import made_up
from common import UserError, describe, launch
from quickstart import table


@dataclass
class Config:
    # stages, separated by semicolons, by their names in the table; "": all
    only: str = ""
    # of each run
    steps: int = 2


CHILD = """
import importlib, re, resource, sys
from common import launch
script, room = importlib.import_module(sys.argv.pop(1)), int(sys.argv.pop(1))
status = lambda name: int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = status("VmRSS")
if room:
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room, resource.RLIM_INFINITY))
try:
    launch(script.main, script.Config)
finally:
    print("measured:", status("VmHWM") - before)
"""
MODEL = dict(depth=4, width=256, vocab=2048, answers=64, prompt=64, max_new=128)  # of bench/rl.py
FLAGS = {
    "pretrain": dict(depth=4, width=256, context=512, batch_tokens=16384, micro_tokens=8192, eval_tokens=4000, tokenizer="byte", sample_every=0, data="words.txt"),
    "sft": dict(init="policy", data="chats.jsonl", batch_tokens=8192, micro_tokens=8192, max_new=8),
    "reward": dict(init="policy", data="pairs.jsonl", batch=48, micro_tokens=8192, center_samples=8, max_new=32),
    "dpo": dict(init="policy", data="pairs.jsonl", batch=48, micro_tokens=8192),
    "ppo": dict(init="policy", data="data.jsonl", val="data.jsonl", reward="rm", batch=64, max_new=128, micro_tokens=8192, epochs=1, minibatches=1, eval_prompts=4, unfinished_penalty=0.0),
    "grpo": dict(init="policy", data="data.jsonl", val="data.jsonl", reward="data/rewards.py:brief", prompts=8, group=8, max_new=128, micro_tokens=8192, eval_prompts=4),
}
RUNS = {name: (name, {}) for name in FLAGS}
MORE = {"pretrain": dict(batch_tokens=20000), "dpo": dict(batch=96), "ppo": dict(batch=96)}  # checkpointed, larger packs fill 500 MB
RUNS |= {f"{name}, checkpointed": (name, {"checkpoint_activations": True, "micro_tokens": 20000} | more) for name, more in MORE.items()}
RUNS["pretrain, most of it the optimizer"] = "pretrain", dict(depth=2, width=1024, micro_tokens=512, batch_tokens=1024, context=128)


def measure(script, flags, folder, room=0):
    """(planned, measured) bytes of a run; with `room`, of one that may not have more bytes than so many."""
    here = lambda value: str(folder / value) if isinstance(value, str) and (folder / value).exists() else value  # noqa: E731
    argv = [f"--{name}={here(value)}" for name, value in flags.items()]
    done = subprocess.run([sys.executable, "-c", CHILD, script, str(room), *argv, f"--out={folder}/out", "--overwrite", "--device=cpu"], capture_output=True, text=True, env=os.environ)
    said = re.search(r"memory: ([\d,.]+) (MB|GB)", done.stdout)
    if done.returncode or not said:
        raise UserError(f"{script}.py {' '.join(argv)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    print(re.search("memory: .*", done.stdout)[0], flush=True)
    return float(said[1].replace(",", "")) * {"MB": 1e6, "GB": 1e9}[said[2]], int(re.search(r"measured: (\d+)", done.stdout)[1])


def texts(folder):
    """Random words as a corpus, as conversations and as preferences."""
    rng, words = np.random.default_rng(0), "the cat sat on a mat and looked at its own tail while nobody was there".split()
    some = lambda low, high: " ".join(rng.choice(words, rng.integers(low, high)))  # noqa: E731
    (folder / "words.txt").write_text("\n".join(some(20, 300) for _ in range(400)))
    rows = [{"prompt": some(10, 40), "chosen": some(20, 80), "rejected": some(20, 80)} for _ in range(300)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]}) + "\n" for r in rows))


def main(config):
    print(f"{describe(torch.device('cpu'))}\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        texts(folder)
        made_up(folder, SimpleNamespace(**MODEL))
        for name in [n.strip() for n in config.only.split(";") if n] or RUNS:
            script, change = RUNS[name]
            flags = FLAGS[script] | {"steps": config.steps} | change
            planned, ample = measure(script, flags, folder)
            planned, measured = measure(script, flags, folder, int(1.3 * planned + 2e8))
            rows.append([name, f"{planned / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{planned / measured:.2f}", f"{ample / 1e6:,.0f}"])
            print(rows[-1], flush=True)
    print("\n" + table([["stage", "planned MB", "measured MB", "planned / measured", "measured where memory is ample, MB"], *rows]))
    wrong = [row[0] for row in rows if not 0.85 <= float(row[3]) <= 1.15]
    if wrong:
        raise UserError(f"off by more than 15 %: {', '.join(wrong)}")


if __name__ == "__main__":
    launch(main, Config)
