"""Real runs of pretrain.py on a tiny text: exact resume, the same result however the work is split,
and what is said about bad input.

Each run is a forked child (bench/child.py) that goes through the command line, as a user's would.
"""

import functools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import (
    assert_same_run,
    here,
    kill,
    logged,
    losses,
    pair,
    records,
    refused,
    results,
    start,
    succeeds,
    train_steps,
    wait_until,
)

import pretrain
import sample
from data import corpus, tokenizer
from model import GPT, config_for
from runtime.checkpoint import damage, find, load, steps_in
from runtime.cli import check_ranges
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = {"depth": 2, "width": 32, "heads": 2, "context": 32, "batch_tokens": 256, "device": "cpu"}
TINY |= {"eval_every": 10, "eval_tokens": 600, "save_every": 20, "keep_last": 9}
TINY |= {"sample_every": 20, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """About 6,000 characters of sentences that a model can learn something of."""
    draw = random.Random(5)
    names, verbs = ["Ada", "Ben", "Cleo", "Dora"], ["sees", "finds", "keeps", "paints"]
    things = ["a red door", "the old map", "two bells", "a grüne Uhr"]
    text = ""
    for _ in range(260):
        text += f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}.{draw.choice([' ', chr(10)])}"
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="module", autouse=True)
def warm_caches(book, tmp_path_factory):
    """One run in this process: forked children inherit the caches that it fills, and start in half
    the time."""
    out = tmp_path_factory.mktemp("warm") / "run"
    here(pretrain.main, pretrain.Config(**TINY, data=str(book), out=str(out), steps=1))


@pytest.fixture
def flags_for(book):
    """A function: (out, flags) -> the flags of a run on the tiny text."""

    def add(out, **flags):
        shape = ("depth", "width", "heads") if "init" in flags else ()  # a parent brings its own
        common = {name: value for name, value in TINY.items() if name not in shape}
        return common | {"data": book, "out": out} | flags

    return add


@pytest.fixture
def train(fork, flags_for):
    """A function: (out, flags) -> Child that runs pretrain.py with them on the tiny text."""

    def run(out, environment=None, **flags):
        return start(fork, pretrain, environment, **flags_for(out, **flags))

    return run


def rewound(run, copy, step):
    """A copy of a run without the checkpoint of `step`, to be resumed; a run may be moved."""
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / f"step_{step:06d}")
    return copy


# --------------------------------------------------------------------------------------------------
# Stopped and resumed


def test_a_killed_run_continues_as_if_nothing_had_happened(train, tmp_path):
    """One run of 40 steps; and one with kill -9 between saves, kill -9 during a save, and a newest
    checkpoint that is damaged."""
    straight, killed, flags = tmp_path / "straight", tmp_path / "killed", {"steps": 40, "dropout": 0.1}
    flags |= {"save_every": 15, "sample_every": 15}
    succeeds(train(straight, **flags))
    child = train(killed, **flags)
    wait_until(lambda: logged(killed, 17), child)
    assert kill(child)[0] == -9
    child = train(killed, resume=True, **flags)
    wait_until(lambda: (killed / ".tmp_step_000030").exists() or (killed / "step_000030").exists(), child)
    kill(child)
    assert not [damage(p) for p in steps_in(killed) if damage(p)]
    newest = int(find(killed).name[5:])
    output = succeeds(train(killed, resume=True, **flags))
    assert f"continuing after step {newest}" in output
    assert train_steps(killed) == list(range(1, 41))
    assert [r["event"] for r in records(killed) if "event" in r] == ["start", "resume", "resume"]
    assert_same_run(straight, killed, [15, 30, 40])
    assert not list(killed.glob(".tmp*"))

    with open(killed / "step_000040/model.safetensors", "r+b") as f:
        f.seek(-5, 2)
        f.write(b"\x01")
    (killed / "step_000030/train_state.safetensors").write_bytes(b"short")
    output = succeeds(train(killed, resume=True, **flags))
    assert "step_000040" in output and "step_000030" in output
    assert output.count("falling back to the checkpoint before") == 2
    assert_same_run(straight, killed, [15, 30, 40])


def test_dropout_stays_on(train, tmp_path):
    """A sample and a validation switch it off; a run that takes none has the same losses."""
    plain, busy = tmp_path / "plain", tmp_path / "busy"
    succeeds(train(plain, steps=6, dropout=0.3, sample_every=0, eval_every=0))
    succeeds(train(busy, steps=6, dropout=0.3, sample_every=2, eval_every=3))
    assert losses(plain) == losses(busy)


def test_only_the_same_run_is_resumed(train, tmp_path, book):
    run, other, text = tmp_path / "run", tmp_path / "other.txt", tmp_path / "book.txt"
    text.write_text(book.read_text())
    succeeds(train(run, data=text, steps=20))
    before = (run / "log.jsonl").read_bytes()
    other.write_text(book.read_text()[::-1])
    for flags, named in [
        ({"lr": 0.01}, "--lr=0.01: this run was started with --lr=0.02"),
        ({"depth": 3}, "--depth=3: this run was started with --depth=2"),
        ({"seed": 1}, "--seed=1: this run was started with --seed=0"),
        ({"window": 4}, "--window=4: this run was started with --window=0"),
        ({"data": other}, "--data="),
    ]:
        assert named in refused(train(run, **({"data": text, "steps": 40, "resume": True} | flags)))
    # A character that the run's vocabulary lacks: the change of the file is what matters.
    text.write_text(book.read_text() + "Ω")
    line = refused(train(run, data=text, steps=40, resume=True))
    assert f"{text}: not the data this run was started with" in line
    assert (run / "log.jsonl").read_bytes() == before
    text.write_text(book.read_text())

    finished = results(run)
    output = succeeds(train(run, data=text, steps=20, resume=True))
    assert "nothing is left to do; a larger --steps continues" in output
    assert results(run) == finished and [p.name for p in steps_in(run)] == ["step_000020"]
    may_differ = {"eval_every": 7, "micro_batch_tokens": 64, "keep_last": 1, "checkpoint_activations": True}
    succeeds(train(run, data=text, steps=40, resume=True, **may_differ))
    assert train_steps(run) == list(range(1, 41))
    assert [p.name for p in steps_in(run)] in (["step_000040"], ["step_000020", "step_000040"])


def test_a_run_resumed_for_longer_says_what_its_learning_rate_does(train, tmp_path):
    flags = {"sample_every": 0, "eval_every": 0, "save_every": 0}
    succeeds(train(tmp_path / "run", steps=10, **flags))
    output = succeeds(train(tmp_path / "run", steps=15, resume=True, **flags))
    lr = {r["step"]: r["lr"] / 0.02 for r in records(tmp_path / "run") if "loss" in r}
    assert lr[11] > lr[10]
    said = f"--steps was 10 and is 15: the learning rate goes from {lr[10]:.0%} of its peak at step 10 to {lr[11]:.0%}"
    assert output.count(f"warning: {said}") == 1
    flags["save_every"] = 5
    succeeds(train(tmp_path / "same", steps=15, **flags))
    output = succeeds(train(rewound(tmp_path / "same", tmp_path / "again", 15), steps=15, resume=True, **flags))
    assert "continuing after step 10" in output and "--steps was" not in output


def test_the_printed_epochs_are_those_that_are_trained(train, tmp_path):
    """Documents rarely fill a batch, so as many tokens are not as many epochs."""
    documents = [{"text": "the old map and the red door " * k} for k in (5, 6, 7) * 20]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in documents))
    flags = {"data": path, "context": 250, "batch_tokens": 300, "sample_every": 0, "eval_every": 0, "tokenizer": "byte"}
    output = succeeds(train(tmp_path / "run", steps=60, **flags))
    tokens, epochs = re.search(r"([\d,]+) training tokens; 60 steps of 300: ([\d.]+) epochs", output).groups()
    seen = sum(r["tokens"] for r in records(tmp_path / "run") if "loss" in r) / int(tokens.replace(",", ""))
    assert float(epochs) == pytest.approx(seen, rel=0.03) and seen < 60 * 300 / int(tokens.replace(",", "")) * 0.9


def test_too_few_tokens_to_validate_on_are_refused(train, tmp_path, book):
    (tmp_path / "few.txt").write_text("too short to say anything")
    line = refused(train(tmp_path / "run", val=tmp_path / "few.txt"))
    assert "few.txt: 27 tokens to validate on say nothing; hold out more" in line
    line = refused(train(tmp_path / "run", val_fraction=0.003))
    assert "book.txt: 2" in line and "tokens to validate on say nothing" in line


def test_a_windowed_run_trains_resumes_exactly_and_samples(train, tmp_path):
    flags = {"steps": 12, "depth": 3, "window": 4, "window_every": 2, "save_every": 6, "sample_every": 6}
    straight = tmp_path / "straight"
    succeeds(train(straight, **flags))
    resumed = rewound(straight, tmp_path / "resumed", 12)
    succeeds(train(resumed, resume=True, checkpoint_activations=True, **flags))
    assert_same_run(straight, resumed, [6, 12])
    assert load(straight)[0].config.windows == [4, 0, 4]
    assert losses(straight)[-1] < losses(straight)[0] - 0.5
    assert (straight / "samples.txt").read_text().count("=== step") == 2
    succeeds(train(tmp_path / "full", **(flags | {"window": 0, "window_every": 1, "steps": 3})))
    assert losses(tmp_path / "full")[0] == losses(straight)[0]  # output projections begin at zero
    assert losses(tmp_path / "full")[2] != losses(straight)[2]


# --------------------------------------------------------------------------------------------------
# However the work is split


def test_one_process_micro_batches_and_two_processes_agree(train, fork, flags_for, tmp_path):
    """1 x 8 == 8 x 1 == 2 processes: losses and gradient norms over 6 steps. Checkpoints do not
    depend on how many processes wrote them."""
    flags = {"muon_dtype": "fp32", "batch_tokens": 512, "steps": 6, "eval_every": 3, "save_every": 3}

    def run_pair(out, **more):
        return pair(fork, pretrain, **flags_for(out, **(flags | {"sample_every": 0} | more)))

    one, two, sharded = (tmp_path / name for name in ("one", "two", "sharded"))
    succeeds(train(one, sample_every=0, **flags))
    succeeds(train(tmp_path / "micro", sample_every=0, micro_batch_tokens=64, **flags))
    outputs = run_pair(two)
    assert "step 6/6" in outputs[0] and "step" not in outputs[1]  # only one of them prints
    states = safetensors.torch.load_file(two / "step_000006/train_state.safetensors")["random/cpu"]
    assert len(states) == 2 and not torch.equal(*states)  # they drop out different units
    # One rank often has fewer micro-batches than the other.
    run_pair(sharded, shard="fsdp", micro_batch_tokens=64, sample_every=6)
    assert (sharded / "samples.txt").exists()

    succeeds(train(rewound(two, tmp_path / "two then one", 6), resume=True, sample_every=0, **flags))
    run_pair(rewound(one, tmp_path / "one then two", 6), resume=True)
    shards = rewound(sharded, tmp_path / "sharded then one", 6)
    succeeds(train(shards, resume=True, **(flags | {"sample_every": 0})))
    run_pair(rewound(one, tmp_path / "one then sharded", 6), resume=True, shard="fsdp")
    expected, weights = results(one), load(one)[0].state_dict()
    resumed = ["two then one", "one then two", "sharded then one", "one then sharded"]
    for name in ["micro", "two", "sharded", *resumed]:
        for ours, theirs in zip(results(tmp_path / name), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
        for key, p in load(tmp_path / name)[0].state_dict().items():
            torch.testing.assert_close(p, weights[key], rtol=0, atol=1e-3)


def test_compiled_training_gives_the_same_losses(train, monkeypatch, tmp_path):
    """Compiled to PyTorch's own operations: a minute of the C++ compiler's would test PyTorch."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # The first step trains the head alone, since the head begins at zero; the second trains all.
    flags = {"steps": 2, "depth": 1, "sample_every": 0, "eval_every": 0, "eval_tokens": 100}
    succeeds(train(tmp_path / "plain", **flags))
    output = succeeds(train(tmp_path / "compiled", compile=True, **flags))
    assert "warning: on a CPU --compile" in output
    for ours, theirs in zip(results(tmp_path / "compiled"), results(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# What a user gets wrong, and what is not finite


@pytest.mark.parametrize(
    "flag, value",
    [
        *[("depth", 0), ("context", 0), ("batch_tokens", -1), ("micro_batch_tokens", -1)],
        *[("steps", -1), ("seed", -1), ("seed", 10**20), ("width", -1), ("window", -1), ("window_every", 0)],
        *[("lr", 0.0), ("lr", math.inf), ("embed_lr", -1.0), ("head_lr", math.inf), ("norm_lr", -0.1)],
        *[("weight_decay", -0.1), ("max_grad_norm", -1.0), ("max_grad_norm", math.inf), ("momentum", 1.0)],
        *[("val_fraction", 1.5), ("val_fraction", 0.0), ("dropout", 1.0), ("decay", -0.1), ("warmup", -1)],
        *[("keep_last", 0), ("print_every", 0), ("max_new_tokens", 0), ("muon_dtype", "fp8"), ("shard", "ddp")],
    ],
)
def test_a_value_outside_its_range_is_refused(flag, value):
    with pytest.raises(UserError, match=f"--{flag}="):
        check_ranges(pretrain.Config(**({"data": "book.txt", "out": "run"} | {flag: value})))


def test_bad_flags_and_files_are_one_clear_line_and_cost_nothing(train, tmp_path, book):
    files = {"empty.txt": b"", "latin.txt": "Grüße\n".encode("latin-1") * 99, "short.txt": b"too short"}
    files["broken.jsonl"] = b'{"text": "a"}\n{"text": "b"\n'
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    run = tmp_path / "old"
    succeeds(train(run, steps=2))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    few = "10 training tokens, fewer than one batch of 256; lower --batch_tokens or bring more text"
    for flags, named in [
        ({"data": tmp_path / "absent.txt"}, "absent.txt: No such file"),
        ({"data": tmp_path / "empty.txt"}, "empty.txt: there is no text in it"),
        ({"data": tmp_path / "latin.txt"}, "latin.txt:1: byte 2 of the file is not UTF-8"),
        ({"data": tmp_path / "short.txt"}, f"short.txt: {few}"),
        ({"data": tmp_path / "broken.jsonl"}, "broken.jsonl:2:"),
        ({"data": f"{book},{tmp_path / 'absent.txt'}"}, "absent.txt: No such file"),
        ({"data": nothing}, "nothing: no manifest.json: not prepared data"),
        ({"data": nothing, "val": book}, f"--val={book}: prepared data have decided it"),
        ({"val": tmp_path / "absent.txt"}, "absent.txt: No such file"),
        ({"depth": "abc"}, "--depth=abc: expected int"),
        ({"deepness": 4}, "--deepness: no such flag"),
        ({"lr": 0}, "--lr=0.0: must be > 0"),
        ({"heads": 6}, "--heads=6"),
        ({"kv_heads": 3}, "heads"),
        ({"window_every": 2}, "--window_every=2: no layer is windowed without --window"),
        ({"prompt": "Ω"}, "U+03A9"),
        ({"tokenizer": "nonsense"}, "nonsense"),
        ({"init": nothing}, "no checkpoint here"),
        ({"init": nothing, "depth": 3}, "--depth=3: the shape and the tokenizer come from --init"),
        ({"init": nothing, "window": 8}, "--window=8: the shape and the tokenizer come from --init"),
        ({"init": run, "context": 33}, "--context=33: the model of --init="),
        ({"device": "abacus"}, "--device=abacus"),
        ({"shard": "fsdp"}, "--shard=fsdp: there are no ranks to divide over; start with torchrun"),
    ]:
        out = {"out": tmp_path / "new"} if flags.get("init") == run else {"overwrite": True}
        line = refused(train(**({"out": run} | out | flags)))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags  # not even by --overwrite
    line = refused(train(run, steps=2))
    assert "a run is here already" in line and "--resume" in line and "--overwrite" in line
    succeeds(train(run, steps=3, overwrite=True))
    assert train_steps(run) == [1, 2, 3] and [p.name for p in steps_in(run)] == ["step_000003"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(train, tmp_path):
    run = tmp_path / "run"
    line = refused(train(run, steps=30, save_every=2, embed_lr=1e30, head_lr=1e30, decay=0))
    (kept,) = run.glob("nonfinite_step_*.safetensors")
    batch, step = safetensors.torch.load_file(kept), int(kept.stem[-6:])
    assert f"step {step}: the loss is" in line and str(kept) in line and "--max_grad_norm" in line
    cu_seqlens, targets = batch["cu_seqlens"], batch["targets"]
    assert cu_seqlens[-1] == len(batch["tokens"]) == len(targets)
    assert (targets >= 0).sum() == len(targets) - len(cu_seqlens) + 1 <= 256  # all but the last of a document
    assert train_steps(run) == list(range(1, step)) and not [damage(p) for p in steps_in(run) if damage(p)]
    for p in steps_in(run):
        assert all(w.isfinite().all() for w in load(p)[0].state_dict().values())


# --------------------------------------------------------------------------------------------------
# What comes out


def test_a_run_learns_and_its_children_and_samples_come_from_it(train, tmp_path, book, fork):
    run = tmp_path / "run"
    output = succeeds(train(run, steps=150, save_every=50, eval_every=50, eval_tokens=10**6, keep_last=1))
    text = book.read_text()
    unigram = -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())
    val_losses = [r["val_loss"] for r in records(run) if "val_loss" in r]
    assert val_losses[-1] < 0.45 * unigram  # half of what letter frequencies alone would give
    assert val_losses[-1] < val_losses[0]
    assert re.search(r"[\d,]+ parameters: 2 layers, width 32, 2 heads of 16, vocabulary \d+; on ", output)
    assert "training tokens; 150 steps of 256" in output
    model, tok, info = load(run)
    assert info["stage"] == "pretrain" and info["step"] == 150 and info["lineage"] == []
    assert info["metrics"]["val_loss"] == val_losses[-1]
    assert info["config"]["batch_tokens"] == 256 and list(info["data"]) == [str(book)]
    assert len(info["code"]) == 64 and info["torch"] == torch.__version__
    first = [r for r in records(run) if r.get("event") == "start"][0]
    assert first["config"]["depth"] == 2 and first["parameters"] == sum(p.numel() for p in model.parameters())
    assert os.readlink(run / "best") == f"step_{50 * (1 + np.argmin(val_losses)):06d}"

    child = tmp_path / "child"
    succeeds(train(child, init=run, steps=3, lr=1e-4, embed_lr=1e-6, head_lr=1e-6, norm_lr=1e-6))
    assert losses(child)[0] < 1.3 * val_losses[-1]  # it begins where its parent ended
    (parent,) = load(child)[2]["lineage"]
    assert parent["path"] == str(find(run)) and parent["step"] == 150 and parent["config"]["data"] == str(book)

    def talk(**flags):
        return succeeds(start(fork, sample, **({"model": run, "device": "cpu", "max_new_tokens": 80} | flags)))

    once = talk(prompt="Ada sees", seed=1)
    assert once == talk(prompt="Ada sees", seed=1) != talk(prompt="Ada sees", seed=2)
    assert once.startswith("Ada sees") and len(once) == len("Ada sees") + 80 + 1 and "<|" not in once
    assert talk(temperature=0, seed=1) == talk(temperature=0, seed=2) == talk(top_k=1, seed=3)
    assert "no checkpoint here" in refused(start(fork, sample, model=tmp_path / "absent"))
    assert "U+03A9" in refused(start(fork, sample, model=run, prompt="Ω"))


def test_the_scripts_run_as_a_user_types_them(tmp_path, book):
    """From another directory, in a fresh process: help, an error's exit status, and a sample whose
    reader leaves early."""

    def run(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    flags = [f"--{name}={value}" for name, value in TINY.items()]
    done = run(ROOT / "pretrain.py", f"--data={book}", "--out=run", "--steps=2", *flags)
    assert done.returncode == 0 and (tmp_path / "run/step_000002").is_dir(), done.stderr
    done = run(ROOT / "pretrain.py", "--data=absent.txt", "--out=other")
    assert (done.returncode, done.stderr) == (1, "error: absent.txt: No such file or directory\n")
    line = f"{sys.executable} {ROOT}/sample.py --model=run --device=cpu --max_new_tokens=2000 | head -c 20"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert len(done.stdout) >= 15 and "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr


def test_every_text_file_gives_its_own_end_to_validation(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)
    (tmp_path / "c.txt").write_text("c" * 180 + "d" * 20)
    (tmp_path / "e.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "eeeeeeeeef"))
    a, c, e = (str(tmp_path / name) for name in ("a.txt", "c.txt", "e.jsonl"))

    def texts(**flags):
        tok, (train,), (val,) = pretrain.read_data(pretrain.Config(out="", **flags), None)
        return [tok.decode([t for t in stream.tolist() if t != tok.eot]) for stream in (train, val)]

    assert texts(data=f"{a},{c},{e}") == ["a" * 90 + "c" * 180 + "e" * 9, "b" * 10 + "d" * 20 + "f"]
    assert texts(data=f"{a},{e}", val=c) == ["a" * 90 + "b" * 10 + "e" * 9 + "f", "c" * 180 + "d" * 20]


def test_documents_that_are_trained_on_and_validated_on_are_said(tmp_path, capsys):
    def said(train, val=()):
        for name, texts in (("train", train), ("val", val)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        flags = {"val": str(tmp_path / "val.jsonl")} if val else {"val_fraction": 0.3}
        pretrain.read_data(pretrain.Config(out="", data=str(tmp_path / "train.jsonl"), **flags), None)
        return capsys.readouterr().out

    assert "2 of the 3 documents to validate on are trained on" in said(
        ["one two", "three"], ["One\n two", "four", "three"]
    )
    assert "1 of the 3 documents" in said([*"abcdefg", "a", "h", "i"])  # held out: the last three
    assert said(["one", "two", ""], ["three", "", "on e"]) == said([*"abcdefghij"]) == ""


# --------------------------------------------------------------------------------------------------
# The loss


def some_text(n=400, documents=30):
    """A stream of random ids, cut into documents by id 0, and its pieces."""
    generator = np.random.default_rng(0)
    stream = generator.integers(1, 61, n).astype(np.int32)
    stream[generator.choice(np.arange(1, n - 1), documents, replace=False)] = 0
    stream[[0, -1]] = 0
    return stream, corpus.pieces([stream], 0, 32)


def loss_and_gradients(model, micro_batch_tokens, one_size=False):
    """[loss, gradients ...] of one step on `some_text`."""
    stream, pieces = some_text()
    loss = pretrain.mean_nll(model.train(), [stream], pieces, micro_batch_tokens, one_size)
    return [torch.tensor(loss), *(p.grad for p in model.parameters())]


def test_packs_of_one_size_are_as_few_as_they_can_be():
    tokens = (1, 18432, 32768, 32769, 40000)
    sizes = [pretrain.even_pack_tokens(n, 0, 32768) for n in tokens]
    assert sizes == [1, 18432, 32768, 16385, 20000]
    assert pretrain.even_pack_tokens(18432, 1024, 32768) == 19456
    assert pretrain.even_pack_tokens(32768, 1024, 32768) == 32768


def test_packs_of_one_shape_give_the_same_loss_and_gradients(make_model):
    """What --compile needs on a GPU: every pack filled up to the same shape, by documents that no
    loss sees."""
    plain, filled = loss_and_gradients(make_model(), 90), loss_and_gradients(make_model(), 90, one_size=True)
    for a, b in zip(filled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    stream, _ = some_text()
    for lengths in ([5, 3], [1], [30, 30, 30]):
        pack, targets = corpus.pack_pieces([stream], np.array([(0, 0, n) for n in lengths]))
        pack, targets = pretrain.one_shape(pack, targets, 90)
        assert len(pack.tokens) == len(pack.positions) == len(targets) == 90 == pack.cu_seqlens[-1]
        assert (len(pack.cu_seqlens) - 1).bit_count() == 1


def test_checkpointed_activations_give_the_gradients_of_windows_by_layer(make_model):
    """A block that is computed again in the backward must have its own window, not the last
    layer's."""
    found = {}
    for window, checkpointed in ((4, False), (4, True), (0, False)):
        model = make_model(layers=3, window=window, window_every=2)
        model.checkpoint_activations = checkpointed
        found[window, checkpointed] = loss_and_gradients(model, 90)
    for a, b in zip(found[4, True], found[4, False], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.allclose(found[4, False][0], found[0, False][0])  # the window matters


def test_bits_per_byte_of_a_uniform_model_by_hand():
    """Each token costs log2 V bits, an end of document too, but that holds no bytes; and the split
    into micro-batches does not matter."""
    documents = ["häßlich", "abc", "", "😀!"]
    n_bytes = sum(len(d.encode()) for d in documents)
    characters = tokenizer.characters("".join(documents))
    for tok, n_tokens in [(tokenizer.byte_level(), n_bytes + 4), (characters, 7 + 3 + 2 + 4)]:
        model = GPT(config_for(1, tok.n_vocab, width=32, context=5)).init_weights(0)
        streams = [corpus.encode(tok, documents[:2]), corpus.encode(tok, documents[2:])]
        pieces = corpus.some_pieces(streams, tok.eot, 5, 10**9)
        for micro_batch_tokens in (1, 7, 10**6):
            sizes = tokenizer.token_bytes(tok)
            nats, bits = pretrain.evaluate(model, streams, pieces, sizes, micro_batch_tokens)
            assert nats == pytest.approx(math.log(tok.n_vocab), rel=1e-6)
            assert bits == pytest.approx(n_tokens * math.log2(tok.n_vocab) / n_bytes, rel=1e-6)


def test_evaluation_drops_nothing_out(make_model):
    tok = tokenizer.byte_level()
    model = make_model(vocab_size=tok.n_vocab).train()
    model.dropout = 0.5
    streams = [corpus.encode(tok, ["some text to read"])]
    pieces, sizes = corpus.pieces(streams, tok.eot, 8), tokenizer.token_bytes(tok)
    first, second = (pretrain.evaluate(model, streams, pieces, sizes, 100) for _ in range(2))
    assert first == second
