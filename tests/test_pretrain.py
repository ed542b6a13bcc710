"""Real runs of pretrain.py and sample.py on a tiny text: exact resume, the same result however the work is split, and what bad input gets to hear.

Each run is a forked child (see conftest.Child) that goes through the command line, as a user's would.
"""
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import pretrain
import sample
from bench.child import run_script
from checkpoint import damage, find, load, steps_in
from data import corpus

ROOT = Path(__file__).parents[1]
TINY = dict(depth=2, width=32, heads=2, context=32, batch_tokens=256, eval_every=10, eval_tokens=600, sample_every=20, save_every=20, keep_last=9, device="cpu")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """About 6,000 characters of sentences that a model can learn something of."""
    draw = random.Random(5)
    names, verbs, things = ["Ada", "Ben", "Cleo", "Dora"], ["sees", "finds", "keeps", "paints"], ["a red door", "the old map", "two bells", "a grüne Uhr"]
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}.{draw.choice([' ', chr(10)])}" for _ in range(260)))
    return path


@pytest.fixture
def train(fork, book):
    """A function: flags -> Child that runs `pretrain.py` with them on the tiny text."""

    def start(out, environment={}, **flags):
        shape = () if "init" not in flags else ("depth", "width", "heads")  # which a parent brings
        common = {name: value for name, value in TINY.items() if name not in shape}
        argv = [f"--{name}={value}" for name, value in (common | {"data": book, "out": out} | flags).items()]
        return fork(run_script, pretrain, argv, **environment)

    return start


def succeeds(child):
    status, output = child.wait()
    assert status == 0, output
    return output


def records(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def results(run):
    """The log without the events and without how long things took."""
    timing = {"seconds", "tokens_per_s"}
    return [{k: v for k, v in r.items() if k not in timing} for r in records(run) if "event" not in r]


def train_steps(run):
    return [r["step"] for r in records(run) if "loss" in r]


def assert_same_run(a, b, steps):
    """Weights, optimizer, random state, cursor, log and samples equal bit for bit."""
    for step in steps:
        for name in ("model.safetensors", "train_state.safetensors"):
            ours, theirs = (safetensors.torch.load_file(run / f"step_{step:06d}" / name) for run in (a, b))
            assert ours.keys() == theirs.keys()
            assert not [k for k in ours if not torch.equal(ours[k], theirs[k])], (step, name)
        assert (a / f"step_{step:06d}/train_state.json").read_text() == (b / f"step_{step:06d}/train_state.json").read_text()
    assert results(a) == results(b)
    assert (a / "samples.txt").read_bytes() == (b / "samples.txt").read_bytes()


def wait_until(true, child, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and not child.ended(), child.output()
        time.sleep(0.001)


def kill(child, number=signal.SIGKILL):
    child.send(number)
    return child.wait()


def logged(run, step):
    return (run / "log.jsonl").exists() and f'"step": {step},' in (run / "log.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


def test_a_killed_run_goes_on_as_if_nothing_had_been(train, tmp_path, dropout=0.1):
    """60 steps at once; and 60 steps with kill -9 between saves, kill -9 during a save, and a newest checkpoint that is damaged."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    succeeds(train(straight, steps=60, dropout=dropout))
    child = train(killed, steps=60, dropout=dropout)
    wait_until(lambda: logged(killed, 25), child)
    assert kill(child)[0] == -9
    child = train(killed, steps=60, dropout=dropout, resume=True)
    wait_until(lambda: (killed / ".tmp_step_000040").exists() or (killed / "step_000040").exists(), child)
    kill(child)
    assert not [damage(p) for p in steps_in(killed) if damage(p)]
    goes_on = int(find(killed).name[5:])
    output = succeeds(train(killed, steps=60, dropout=dropout, resume=True))
    assert f"going on after step {goes_on}" in output
    assert train_steps(killed) == list(range(1, 61))
    assert [r["event"] for r in records(killed) if "event" in r] == ["start", "resume", "resume"]
    assert_same_run(straight, killed, [20, 40, 60])
    assert not list(killed.glob(".tmp*"))

    with open(killed / "step_000060/model.safetensors", "r+b") as f:
        f.seek(-5, 2), f.write(b"\x01")
    (killed / "step_000040/train_state.safetensors").write_bytes(b"short")
    output = succeeds(train(killed, steps=60, dropout=dropout, resume=True))
    assert "step_000060" in output and "step_000040" in output and output.count("falling back to the checkpoint before") == 2
    assert_same_run(straight, killed, [20, 40, 60])


def test_dropout_drops_all_along(train, tmp_path):
    """Also after a sample or a validation, which switch it off: a run that takes none has the same losses."""
    quiet, busy = tmp_path / "quiet", tmp_path / "busy"
    succeeds(train(quiet, steps=12, dropout=0.3, sample_every=0, eval_every=0))
    succeeds(train(busy, steps=12, dropout=0.3, sample_every=3, eval_every=4))
    losses = [[r["loss"] for r in results(run) if "loss" in r] for run in (quiet, busy)]
    assert losses[0] == losses[1]


def test_a_finished_run_resumed_changes_nothing(train, tmp_path):
    run = tmp_path / "run"
    succeeds(train(run, steps=20))
    before = results(run)
    output = succeeds(train(run, steps=20, resume=True))
    assert results(run) == before and [p.name for p in steps_in(run)] == ["step_000020"]
    assert "nothing is left to do" in output


def test_only_the_same_run_is_resumed(train, tmp_path, book):
    run, other = tmp_path / "run", tmp_path / "other.txt"
    text = tmp_path / "book.txt"
    text.write_text(book.read_text())
    succeeds(train(run, data=text, steps=20))
    before = (run / "log.jsonl").read_bytes()
    other.write_text(book.read_text()[::-1])
    for flags, named in [
        ({"lr": 0.01}, "--lr=0.01: this run was started with --lr=0.02"),
        ({"depth": 3}, "--depth=3: this run was started with --depth=2"),
        ({"seed": 1}, "--seed=1: this run was started with --seed=0"),
        ({"data": other}, "--data="),
    ]:
        status, output = train(run, **({"data": text, "steps": 40, "resume": True} | flags)).wait()
        assert status == 1 and named in output and "Traceback" not in output, output
    text.write_text(book.read_text() + "Ω")  # a character that the run's vocabulary lacks: the file's change is what matters
    status, output = train(run, data=text, steps=40, resume=True).wait()
    assert status == 1 and f"{text}: not the data this run was started with" in output
    assert (run / "log.jsonl").read_bytes() == before
    text.write_text(book.read_text())
    succeeds(train(run, data=text, steps=40, resume=True, eval_every=7, micro_tokens=64, keep_last=1))  # what may differ
    assert train_steps(run) == list(range(1, 41)) and [p.name for p in steps_in(run)] in (["step_000040"], ["step_000020", "step_000040"])


# ---------------------------------------------------------------------------------------------------------------------------------
# However the work is split


def test_one_process_micro_batches_and_two_processes_agree(train, tmp_path):
    """1 x 8 == 8 x 1 == 2 processes: losses and gradient norms over 10 steps. And checkpoints do not know how many processes wrote them."""
    how = dict(polar="fp32", batch_tokens=512, eval_every=5, sample_every=0, save_every=5)

    def pair(out, **flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for r in range(2)]
        children = [train(out, environment=r, **(how | flags)) for r in ranks]
        return [succeeds(c) for c in children]

    succeeds(train(tmp_path / "whole", steps=10, **how))
    succeeds(train(tmp_path / "micro", steps=10, **(how | {"micro_tokens": 64})))
    outputs = pair(tmp_path / "pair", steps=10)
    assert "step 10/10" in outputs[0] and "step" not in outputs[1]  # one of them speaks
    states = safetensors.torch.load_file(tmp_path / "pair/step_000010/train_state.safetensors")["random/cpu"]
    assert len(states) == 2 and not torch.equal(*states)  # they drop out different units
    pair(tmp_path / "sharded", steps=10, shard="fsdp", micro_tokens=64, sample_every=10)  # one rank often has fewer micro-batches than the other
    assert (tmp_path / "sharded/samples.txt").exists()
    for begun, name in (("pair", "two then one"), ("whole", "one then two"), ("sharded", "sharded then one"), ("whole", "one then sharded")):
        shutil.copytree(tmp_path / begun, tmp_path / name, symlinks=True)  # a run may be moved
        shutil.rmtree(tmp_path / name / "step_000010")
    for name in ("two then one", "sharded then one"):
        succeeds(train(tmp_path / name, steps=10, resume=True, **how))
    pair(tmp_path / "one then two", steps=10, resume=True)
    pair(tmp_path / "one then sharded", steps=10, resume=True, shard="fsdp")
    truth = results(tmp_path / "whole")
    weights = load(tmp_path / "whole")[0].state_dict()
    for name in ("micro", "pair", "two then one", "one then two", "sharded", "sharded then one", "one then sharded"):
        found = results(tmp_path / name)
        assert [r.keys() for r in found] == [r.keys() for r in truth], name
        for ours, theirs in zip(found, truth):
            for key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (name, theirs["step"], key)
        for key, p in load(tmp_path / name)[0].state_dict().items():
            torch.testing.assert_close(p, weights[key], rtol=0, atol=1e-3)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_gives_the_same_losses(train, tmp_path):
    how = dict(steps=4, depth=1, sample_every=0, eval_every=0, eval_tokens=100)
    succeeds(train(tmp_path / "plain", **how))
    succeeds(train(tmp_path / "compiled", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}, compile=True, **how))
    for ours, theirs in zip(results(tmp_path / "compiled"), results(tmp_path / "plain")):
        assert ours == pytest.approx(theirs, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------------------
# What a user gets wrong, and what the disk does


def test_bad_flags_and_files_are_one_clear_line_and_cost_nothing(train, tmp_path, book):
    files = {"empty.txt": b"", "latin.txt": "Grüße\n".encode("latin-1") * 99, "short.txt": b"too short", "broken.jsonl": b'{"text": "a"}\n{"text": "b"\n'}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "nothing").mkdir()
    run = tmp_path / "old"
    succeeds(train(run, steps=2))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for flags, named in [
        ({"data": tmp_path / "absent.txt"}, "absent.txt: No such file"),
        ({"data": tmp_path / "empty.txt"}, "empty.txt: there is no text in it"),
        ({"data": tmp_path / "latin.txt"}, "latin.txt:1: byte 2 of the file is not UTF-8"),
        ({"data": tmp_path / "short.txt"}, "short.txt: 10 training tokens, fewer than one batch of 256; lower --batch_tokens or bring more text"),
        ({"data": tmp_path / "broken.jsonl"}, "broken.jsonl:2:"),
        ({"data": f"{book},{tmp_path / 'absent.txt'}"}, "absent.txt: No such file"),
        ({"data": tmp_path / "nothing"}, "nothing: no manifest.json: not prepared data"),
        ({"data": tmp_path / "nothing", "val": book}, "--val"),  # prepared data bring their own
        ({"val": tmp_path / "absent.txt"}, "absent.txt: No such file"),
        ({"depth": "abc"}, "--depth=abc: expected int"),
        ({"deepness": 4}, "--deepness: no such flag"),
        ({"depth": 0}, "--depth"),
        ({"heads": 6}, "--heads=6"),
        ({"kv_heads": 3}, "heads"),
        ({"context": 0}, "--context"),
        ({"batch_tokens": -1}, "--batch_tokens"),
        ({"micro_tokens": -1}, "--micro_tokens"),
        ({"steps": -1}, "--steps"),
        ({"seed": -1}, "--seed"),
        ({"seed": 10**20}, "--seed"),
        ({"lr": 0}, "--lr"),
        ({"lr": "inf"}, "--lr"),
        ({"keep_last": 0}, "--keep_last"),
        ({"val_fraction": 1.5}, "--val_fraction"),
        ({"dropout": 1.0}, "--dropout"),
        ({"decay": -0.1}, "--decay"),
        ({"polar": "fp8"}, "--polar=fp8"),
        ({"prompt": "Ω"}, "U+03A9"),
        ({"tokenizer": "nonsense"}, "nonsense"),
        ({"init": tmp_path / "nothing"}, "no checkpoint here"),
        ({"init": tmp_path / "nothing", "depth": 3}, "--depth=3: the shape and the tokenizer come from --init"),
        ({"device": "abacus"}, "--device=abacus"),
    ]:
        status, output = train(run, overwrite=True, **flags).wait()
        assert status == 1 and "Traceback" not in output, (flags, output)
        (line,) = [x for x in output.splitlines() if x.startswith("error: ")]
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags  # not even by --overwrite
    status, output = train(run, steps=2).wait()
    assert status == 1 and "a run is here already" in output and "--resume" in output and "--overwrite" in output
    succeeds(train(run, steps=3, overwrite=True))
    assert train_steps(run) == [1, 2, 3] and [p.name for p in steps_in(run)] == ["step_000003"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(train, tmp_path):
    run = tmp_path / "run"
    status, output = train(run, steps=30, save_every=2, embed_lr=1e30, head_lr=1e30, decay=0).wait()
    assert status == 1 and "Traceback" not in output, output
    (kept,) = run.glob("nonfinite_step_*.safetensors")
    batch, step = safetensors.torch.load_file(kept), int(kept.stem[-6:])
    assert f"step {step}: the loss is" in output and str(kept) in output and "--clip" in output
    assert batch["cu"][-1] == len(batch["tokens"]) == len(batch["targets"]) <= 256 and batch["targets"].min() >= 0
    assert train_steps(run) == list(range(1, step)) and not [damage(p) for p in steps_in(run) if damage(p)]
    for p in steps_in(run):
        assert all(w.isfinite().all() for w in load(p)[0].state_dict().values())


# ---------------------------------------------------------------------------------------------------------------------------------
# What comes out


def test_a_run_learns_and_its_children_and_samples_come_from_it(train, tmp_path, book, fork):
    run = tmp_path / "run"
    output = succeeds(train(run, steps=150, save_every=50, eval_every=50, eval_tokens=10**6, keep_last=1))
    text = book.read_text()
    unigram = -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())
    losses = [r["val_loss"] for r in records(run) if "val_loss" in r]
    assert losses[-1] < 0.45 * unigram and losses[-1] < losses[0]  # half of what letter frequencies alone would give
    assert re.search(r"[\d,]+ parameters: 2 layers, width 32, 2 heads of 16, vocabulary \d+; on ", output) and "training tokens; 150 steps of 256" in output
    model, tok, info = load(run)
    assert info["stage"] == "pretrain" and info["step"] == 150 and info["metrics"]["val_loss"] == losses[-1] and info["lineage"] == []
    assert info["config"]["batch_tokens"] == 256 and list(info["data"]) == [str(book)] and len(info["code"]) == 64 and info["torch"] == torch.__version__
    first = [r for r in records(run) if r.get("event") == "start"][0]
    assert first["config"]["depth"] == 2 and first["parameters"] == sum(p.numel() for p in model.parameters())
    assert os.readlink(run / "best") == min(zip([r["val_loss"] for r in records(run) if r.get("val_loss")], ["step_000050", "step_000100", "step_000150"]))[1]

    child = tmp_path / "child"
    output = succeeds(train(child, init=run, steps=3, lr=1e-4, embed_lr=1e-6, head_lr=1e-6, gain_lr=1e-6))
    assert [r["loss"] for r in records(child) if "loss" in r][0] < 1.3 * losses[-1]  # it begins where its parent ended
    (parent,) = load(child)[2]["lineage"]
    assert parent["path"] == str(find(run)) and parent["step"] == 150 and parent["config"]["data"] == str(book)

    def talk(**flags):
        return succeeds(fork(run_script, sample, [f"--model={run}", "--device=cpu", "--max_new=80", *(f"--{k}={v}" for k, v in flags.items())]))

    once = talk(prompt="Ada sees", seed=1)
    assert once == talk(prompt="Ada sees", seed=1) != talk(prompt="Ada sees", seed=2)
    assert once.startswith("Ada sees") and len(once) == len("Ada sees") + 80 + 1 and "<|" not in once
    assert talk(temperature=0, seed=1) == talk(temperature=0, seed=2) == talk(top_k=1, seed=3)
    for argv, named in [([f"--model={tmp_path / 'absent'}"], "no checkpoint here"), ([f"--model={run}", "--prompt=Ω"], "U+03A9")]:
        status, output = fork(run_script, sample, argv).wait()
        assert status == 1 and named in output and "Traceback" not in output


def test_the_scripts_run_as_a_user_types_them(tmp_path, book):
    """From another directory, in a fresh process: help, an error's exit status, and a sample whose reader leaves early."""
    run = lambda *argv: subprocess.run([sys.executable, *map(str, argv)], cwd=tmp_path, capture_output=True, text=True)  # noqa: E731
    done = run(ROOT / "pretrain.py", f"--data={book}", "--out=run", "--steps=2", *(f"--{k}={v}" for k, v in TINY.items()))
    assert done.returncode == 0 and (tmp_path / "run/step_000002").is_dir(), done.stderr
    done = run(ROOT / "pretrain.py", "--data=absent.txt", "--out=other")
    assert (done.returncode, done.stderr) == (1, "error: absent.txt: No such file or directory\n")
    line = f"{sys.executable} {ROOT}/sample.py --model=run --device=cpu --max_new=2000 | head -c 20"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert len(done.stdout) >= 15 and "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr


def test_every_text_file_gives_its_own_end_to_validation(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)
    (tmp_path / "c.txt").write_text("c" * 180 + "d" * 20)
    (tmp_path / "e.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "eeeeeeeeef"))
    files = ",".join(str(tmp_path / name) for name in ("a.txt", "c.txt", "e.jsonl"))
    tok, (train,), (val,) = pretrain.read_data(pretrain.Config(data=files, out=""), None)
    texts = [tok.decode([t for t in stream.tolist() if t != tok.eot]) for stream in (train, val)]
    assert texts == ["a" * 90 + "c" * 180 + "e" * 9, "b" * 10 + "d" * 20 + "f"]


def test_packs_of_one_size_are_as_few_as_they_can_be():
    assert [pretrain.even_part(tokens, 32768) for tokens in (1, 18432, 32768, 32769, 40000)] == [1, 18432, 32768, 16385, 20000]


def test_packs_of_one_shape_give_the_same_loss_and_gradients(make_model):
    """What --compile needs on a GPU: every pack filled up to the same shape, by documents that no loss sees."""
    generator = np.random.default_rng(0)
    stream = generator.integers(1, 61, 400).astype(np.int32)
    stream[np.sort(generator.choice(np.arange(1, 399), 30, replace=False))] = 0
    stream[[0, -1]] = 0
    cut = corpus.pieces([stream], 0, 32)
    found = []
    for static in (False, True):
        model = make_model()
        loss = pretrain.train_step(model, [stream], cut, 90, static)
        found.append([loss, *(p.grad for p in model.parameters())])
    for plain, filled in zip(*found):
        torch.testing.assert_close(filled, plain, rtol=1e-5, atol=1e-6)
    for lengths in ([5, 3], [1], [30, 30, 30]):
        pack, targets = corpus.pack_pieces([stream], np.array([(0, 0, n) for n in lengths]))
        pack, targets = pretrain.one_shape(pack, targets, 90)
        assert len(pack.tokens) == len(pack.positions) == len(targets) == 90 == pack.cu[-1]
        assert (len(pack.cu) - 1).bit_count() == 1
