"""What several test files share.

One core per process: the tests then spread over cores with `pytest -n`, and sums come out the same
everywhere.
"""

import importlib
import os
import signal
import subprocess
from pathlib import Path

# The interpreter's small products are ten times slower with more threads. Set before torch loads.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: tests that ask for `kernels_run` then run the
    # kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("interpreter")

import ppo
from bench.child import Child
from kernels import _lib
from model import GPT, GPTConfig

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
REALDATA = ROOT.parent / "shared/realdata"


@pytest.fixture
def realdata():
    """A function: name -> path of a real corpus; skips the test if the corpora are not here."""

    def path(name):
        if not (REALDATA / name).exists():
            pytest.skip(f"{REALDATA / name} is not here")
        return REALDATA / name

    return path


def random_model(seed=0, noise=0.2, **shape):
    """A tiny GPT, all of whose weights are random: freshly initialised, its output projections and
    head are zero, and nothing could go wrong."""
    small = {"vocab_size": 61, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2}
    small |= {"head_dim": 8, "ffn": 48, "context": 64}
    model = GPT(GPTConfig(**(small | shape))).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * noise)
    return model


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture
def kernels_run(monkeypatch):
    """The device on which the kernels run in this test: the GPU, or the CPU through Triton's
    interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setattr(_lib, "MODE", "interpret")
    return torch.device("cpu")


@pytest.fixture
def small_disk(tmp_path):
    """A function: size in KiB -> an empty directory on a file system of that size; skips if this
    process may not mount one."""
    mounted = []

    def disk(kib):
        where = tmp_path / f"disk{len(mounted)}"
        where.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(where)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here")
        mounted.append(where)
        return where

    yield disk
    for where in mounted:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """One step of PPO in this process. What PyTorch loads and remembers in its first run, two
    seconds of work, is then there in every forked child."""
    from runs import save, write_rows

    folder = tmp_path_factory.mktemp("warm")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"{i}?"} for i in range(20)])
    flags = {"init": str(save(random_model, folder / "sft", "sft")), "data": str(prompts), "device": "cpu"}
    sizes = {"steps": 1, "prompts_per_step": 2, "eval_prompts": 2, "max_new_tokens": 2, "val_fraction": 0.2}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ppo.main(ppo.Config(reward="data/rules.py:brief", out=str(folder / "run"), **flags, **sizes))
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fork(tmp_path, warm):
    """A function: (call, *args, ENVIRONMENT=...) -> bench.child.Child. Children still alive at the
    end of the test are killed."""
    children = []

    def start(call, *args, **environment):
        children.append(Child(tmp_path / f"output{len(children)}.txt", call, *args, **environment))
        return children[-1]

    yield start
    for child in children:
        if not child.ended():
            child.send(9)
            child.wait()
