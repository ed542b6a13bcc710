"""What the tests of the stages share: tiny checkpoints, whole runs in forked children, what their
logs say, and whether two runs are the same."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
import torch.distributed as dist

import rollout
from bench.child import run_script
from data import tokenizer
from data.read import read_json
from runtime import checkpoint
from runtime.files import LOCKS

SMALL = {"vocab_size": 260, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 24}
SMALL |= {"context": 96}


# --------------------------------------------------------------------------------------------------
# Inputs


def null_device(folder):
    """The path of a device that swallows what is written.

    For root one of its own: a fault in what is tested would replace the machine's /dev/null.
    """
    own = folder / "null_device"
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # some containers forbid it
            os.mknod(own, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            own.write_text("nothing")  # where a file system has no devices, neither
            return own
    return Path(os.devnull)


def write_wanderer(path, function):
    """Write a reward's file whose thread changes the working directory all the time."""
    (path.parent / "elsewhere").mkdir()
    path.write_text(
        "import os, threading, time\n\ndef wander():\n    while True:\n"
        "        os.chdir(os.path.dirname(__file__) + '/elsewhere')\n        time.sleep(0.0001)\n\n"
        "threading.Thread(target=wander, daemon=True).start()\ntime.sleep(0.1)\n" + function
    )


def write_rows(path, rows):
    """Write rows as JSON Lines and return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def save(make_model, run, stage, seed=0, tok=None, **shape):
    """Save a tiny model with random weights under a byte-level tokenizer; returns the directory of
    the checkpoint."""
    tok = tok or tokenizer.byte_level()
    model = make_model(seed, **(SMALL | {"vocab_size": tok.n_vocab} | shape))
    return checkpoint.save(run, model, tok, {"stage": stage, "step": 1, "config": {}, "data": {}, "lineage": []})


# --------------------------------------------------------------------------------------------------
# Runs


def start(fork, script, environment=None, **flags):
    """A Child that runs `script` with these flags."""
    return fork(run_script, script, [f"--{name}={value}" for name, value in flags.items()], **(environment or {}))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def pair(fork, script, differ=({}, {}), **flags):
    """Run two processes under gloo that share one run; returns what they print.

    differ: flags of each rank alone.
    """
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children = []
    for rank, own_flags in enumerate(differ):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(start(fork, script, environment, **(flags | own_flags)))
    return [succeeds(child) for child in children]


def meetings(fork, script, **flags):
    """What happens, in order, in each of two processes under gloo, one letter per event: b and e,
    a rollout begins and ends; m, it meets the other process."""

    module = script if "sample_completions" in vars(script) else rollout

    def main(config):
        all_reduce, sample_completions = dist.all_reduce, module.sample_completions

        def recorded_all_reduce(*args, **kwargs):
            print("@m")
            return all_reduce(*args, **kwargs)

        def recorded_rollout(*args, **kwargs):
            print("@b")
            found = sample_completions(*args, **kwargs)
            print("@e")
            return found

        dist.all_reduce, module.sample_completions = recorded_all_reduce, recorded_rollout
        script.main(config)

    recorded = SimpleNamespace(main=main, Config=script.Config, __file__=script.__file__)
    return ["".join(re.findall("@([bem])", output)) for output in pair(fork, recorded, **flags)]


def here(main, config):
    """Call main(config) in this process, and give up its locks and signal handlers afterwards, as a
    process that ends does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(config)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        while LOCKS:
            LOCKS.pop().close()


def succeeds(child):
    """What a child prints that must end with status 0."""
    status, output = child.wait()
    assert status == 0, output
    return output


def refused(child):
    """The one line that a run which must fail says about it."""
    status, output = child.wait()
    assert status == 1 and "Traceback" not in output, output
    (line,) = [x for x in output.splitlines() if x.startswith("error: ")]
    return line


def wait_until(true, child, seconds=60):
    """Wait until true() holds while `child` runs."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and not child.ended(), child.output()
        time.sleep(0.001)


def kill(child, number=signal.SIGKILL):
    child.send(number)
    return child.wait()


# --------------------------------------------------------------------------------------------------
# Completions


def completions_of(chats, samples, **per_token):
    """[Completion] of these samples; per_token: {name: [M]}, of the trained tokens of all."""
    pairs = enumerate(zip(chats, samples, strict=True))
    completions = [rollout.Completion(i, ([], {}), c, sample, "", parts={}) for i, (c, sample) in pairs]
    rollout.set_per_token(completions, **per_token)
    return completions


def check_sampler(model, chats, samples, logp, ref_logp, temperature, micro_batch_tokens, repeat):
    """rollout.check_sampler_matches_trainer on samples without prompts of their own."""
    config = SimpleNamespace(temperature=temperature, micro_batch_tokens=micro_batch_tokens, max_new_tokens=32)
    completions = completions_of(chats, samples)
    return rollout.check_sampler_matches_trainer(model, completions, logp, config, ref_logp, repeat)


# --------------------------------------------------------------------------------------------------
# What runs leave


def records(run):
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def results(run):
    """The log without its events and without how long things took."""
    timing = {"seconds", "tokens_per_s", "mfu"}
    return [{k: v for k, v in r.items() if k not in timing} for r in records(run) if "event" not in r]


def train_steps(run):
    """The numbers of the steps in the log."""
    return [r["step"] for r in records(run) if "loss" in r]


def losses(run):
    return [r["loss"] for r in results(run) if "loss" in r]


def logged(run, step):
    """Whether the log has this step already."""
    return (run / "log.jsonl").exists() and f'"step": {step},' in (run / "log.jsonl").read_text()


def assert_same_run(a, b, steps):
    """Weights, optimizer, random state, place in the data, records (but for flags), log and samples
    are equal bit for bit."""
    for step in (f"step_{s:06d}" for s in steps):
        for name in ("model.safetensors", "train_state.safetensors"):
            first, second = (safetensors.torch.load_file(run / step / name) for run in (a, b))
            assert first.keys() == second.keys()
            assert not [k for k in first if not torch.equal(first[k], second[k])], (step, name)
        assert (a / step / "train_state.json").read_text() == (b / step / "train_state.json").read_text()
        first, second = (read_json(run / step / "feinschliff.json") for run in (a, b))
        assert all(first[k] == second[k] for k in first if k not in ("config", "started")), step
    assert results(a) == results(b)
    if (a / "samples.txt").exists() or (b / "samples.txt").exists():
        assert (a / "samples.txt").read_bytes() == (b / "samples.txt").read_bytes()
