"""What the tests of fine-tuning and of preferences share: tiny checkpoints, whole runs in forked children, and the same run found twice."""
import json
import re
import signal
import socket
from types import SimpleNamespace

import safetensors.torch
import torch
import torch.distributed as dist
from test_pretrain import results, succeeds

import checkpoint
import common
from bench.child import run_script
from data import tokenizer

SMALL = dict(vocab_size=260, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=96)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def save(make_model, run, stage, seed=0, tok=None, **shape):
    """A checkpoint of a tiny model with random weights, under a byte-level tokenizer -> its directory."""
    tok = tok or tokenizer.byte_level()
    model = make_model(seed, **(SMALL | {"vocab_size": tok.n_vocab} | shape))
    return checkpoint.save(run, model, tok, {"stage": stage, "step": 1, "config": {}, "data": {}, "lineage": []})


def start(fork, script, environment={}, **flags):
    """A Child that runs `script` with these flags."""
    return fork(run_script, script, [f"--{name}={value}" for name, value in flags.items()], **environment)


def pair(fork, script, differ=({}, {}), **flags):
    """Two processes under gloo that share one run -> what they print. differ: flags of each rank alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for r in range(2)]
    return [succeeds(child) for child in [start(fork, script, r, **(flags | own)) for r, own in zip(ranks, differ)]]


def meetings(fork, script, **flags):
    """Two processes under gloo -> of each what happened, in order, a letter each: b and e, a rollout begins and ends; m, it meets the other."""

    def main(config):
        all_reduce, answers = dist.all_reduce, script.answers

        def met(*args, **kwargs):
            print("@m")
            return all_reduce(*args, **kwargs)

        def asked(*args, **kwargs):
            print("@b")
            found = answers(*args, **kwargs)
            print("@e")
            return found

        dist.all_reduce, script.answers = met, asked
        script.main(config)

    outputs = pair(fork, SimpleNamespace(main=main, Config=script.Config, __file__=script.__file__), **flags)
    return ["".join(re.findall("@([bem])", output)) for output in outputs]


def here(main, config):
    """main(config) in this process, which gives up its locks and signals afterwards, as one that ends does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(config)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        while common.LOCKS:
            common.LOCKS.pop().close()


def refused(child):
    """The one line that a run which must fail says about it."""
    status, output = child.wait()
    assert status == 1 and "Traceback" not in output, output
    (line,) = [x for x in output.splitlines() if x.startswith("error: ")]
    return line


def losses(run):
    return [r["loss"] for r in results(run) if "loss" in r]


def assert_same_run(a, b, steps):
    """Weights, optimizer, cursor, records (but for how they came about) and log equal bit for bit."""
    for step in (f"step_{s:06d}" for s in steps):
        for name in ("model.safetensors", "train_state.safetensors"):
            ours, theirs = (safetensors.torch.load_file(run / step / name) for run in (a, b))
            assert ours.keys() == theirs.keys() and not [k for k in ours if not torch.equal(ours[k], theirs[k])], (step, name)
        assert (a / step / "train_state.json").read_text() == (b / step / "train_state.json").read_text()
        ours, theirs = (checkpoint.read_json(run / step / "feinschliff.json") for run in (a, b))
        assert all(ours[k] == theirs[k] for k in ours if k != "config"), step
    assert results(a) == results(b)
