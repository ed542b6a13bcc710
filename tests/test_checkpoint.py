"""Checkpoints: never half there, in whatever way the disk or the process fails; and none that is
damaged is loaded."""

import json
import os
import shutil
import subprocess
import time

import pytest
import torch

from data import tokenizer
from runtime.checkpoint import (
    damage,
    find,
    fingerprints,
    load,
    load_matching,
    load_state,
    parent_record,
    save,
    steps_in,
)
from runtime.errors import UserError
from runtime.files import sha256

BYTES = tokenizer.byte_level()
INFO = {"stage": "pretrain", "config": {"lr": 0.1}, "data": {"book.txt": "ab12"}, "code": "cd34", "lineage": []}


def make(make_model, seed=0, **shape):
    return make_model(seed, vocab_size=BYTES.n_vocab, **shape)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "optimizer/exp_avg/embed": torch.randn(30, 7, generator=generator),
        "optimizer/step/embed": torch.tensor(3.0),
        "random/cpu": torch.randint(0, 256, (1, 99), generator=generator, dtype=torch.uint8),
    }


def write(run, model, step, **options):
    state = tensors(step), {"order": {"epoch": 0, "index": step}}
    return save(run, model, BYTES, INFO | {"step": step}, state, **options)


def complete(run):
    """The steps saved; every one of them undamaged, and nothing half-written next to them."""
    assert not list(run.glob(".tmp*")) and not [damage(p) for p in steps_in(run) if damage(p)]
    return [int(p.name[5:]) for p in steps_in(run)]


# --------------------------------------------------------------------------------------------------
# What is damaged


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut_the_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_the_learning_rate(path):
    path.write_text(path.read_text().replace("0.1", "0.2"))


@pytest.mark.parametrize(
    "name, ruin",
    [
        ("model.safetensors", cut_the_last_byte),
        ("model.safetensors", flip_a_bit),
        ("model.safetensors", None),
        ("train_state.safetensors", flip_a_bit),
        ("config.json", None),
        ("config.json", b""),
        ("feinschliff.json", change_the_learning_rate),
        ("manifest.json", None),
        ("manifest.json", cut_in_half),
        ("manifest.json", b"{}"),
        ("manifest.json", bytes(100)),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(make_model, tmp_path, capsys, name, ruin):
    models = [make(make_model, seed) for seed in (1, 2)]
    first, second = (write(tmp_path, model, step) for step, model in enumerate(models, 1))
    assert find(tmp_path) == second and damage(second) == ""

    def spoil(folder):
        if ruin is None:
            (folder / name).unlink()
        elif isinstance(ruin, bytes):
            (folder / name).write_bytes(ruin)
        else:
            ruin(folder / name)

    spoil(second)
    assert find(tmp_path) == first
    warning = capsys.readouterr().err
    assert str(second) in warning and name in warning and "the checkpoint before" in warning
    assert torch.equal(load(tmp_path)[0].embed, models[0].embed)
    with pytest.raises(UserError) as e:  # named itself, it has nothing to fall back to
        find(second)
    assert str(second) in str(e.value)
    spoil(first)
    with pytest.raises(UserError, match="no checkpoint here"):
        find(tmp_path)


def test_where_a_checkpoint_is_looked_for(make_model, tmp_path):
    run = tmp_path / "run"
    for step in (9, 10, 100):
        write(run, make(make_model, step), step, keep_last=3, best=step == 10)
    assert find(run) == find(str(run)) == run / "step_000100"
    assert find(run / "step_000009") == run / "step_000009"
    assert find(run / "latest").resolve() == run / "step_000100" and find(run / "best").resolve() == run / "step_000010"
    for step in (999_999, 1_000_000):
        write(run, make(make_model), step, keep_last=9)
    assert find(run) == run / "step_1000000"  # by number, not by name
    for nothing in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="no checkpoint here .expected a directory"):
            find(nothing)
    with pytest.raises(UserError, match="if it is a model of Hugging Face: hf download Qwen/Qwen3 --local-dir DIR"):
        find("Qwen/Qwen3")
    (tmp_path / "chat.jsonl").write_text("{}")
    for file in (tmp_path / "chat.jsonl", run / "step_000009" / "config.json"):
        with pytest.raises(UserError, match="no checkpoint here, but a file"):
            find(file)


# --------------------------------------------------------------------------------------------------
# A second model for the first one


@pytest.mark.parametrize(
    "shape, scalar_head, message",
    [
        ({"scalar_head": True}, False, "a reward model, which gives no probabilities"),
        ({}, True, "not a reward model"),
        ({"context": 32}, False, "its context of 32 tokens is shorter than the 64 of the model"),
    ],
)
def test_a_model_that_does_not_match_is_refused(make_model, tmp_path, shape, scalar_head, message):
    model = make(make_model)
    other = write(tmp_path, make(make_model, **shape), 1)
    with pytest.raises(UserError, match=f"--reference=x: {message}"):
        load_matching(other, model, BYTES, "--reference=x", scalar_head)
    reads_otherwise = tokenizer.characters("abc")
    with pytest.raises(UserError, match="--reference=x: (it has another tokenizer|.*reward model)"):
        load_matching(other, model, reads_otherwise, "--reference=x", scalar_head)


def test_a_model_that_matches_is_loaded_and_known_by_what_it_computes(make_model, tmp_path):
    write(tmp_path / "a", make(make_model, 1), 1)
    found = load_matching(tmp_path / "a", make(make_model), BYTES, "--reference=a")
    assert torch.equal(found.embed, make(make_model, 1).embed)
    write(tmp_path / "b", found, 7)
    write(tmp_path / "c", make(make_model), 1)
    names = [str(tmp_path / name) for name in "abc"]
    hashes = fingerprints(names[0], "", *names[1:])
    assert list(hashes) == names and hashes[names[0]] == hashes[names[1]] != hashes[names[2]]


# --------------------------------------------------------------------------------------------------
# Saving


def test_state_comes_back_bit_for_bit(make_model, tmp_path):
    folder = write(tmp_path, make(make_model), 7, models={"critic": make(make_model, scalar_head=True)})
    found, counters = load_state(folder)
    assert counters == {"order": {"epoch": 0, "index": 7}} and found.keys() == tensors(7).keys()
    assert all(torch.equal(t, found[k]) and t.dtype == found[k].dtype for k, t in tensors(7).items())
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    model_files |= {"tokenizer.json", "tokenizer_config.json"}
    run_files = {"feinschliff.json", "train_state.safetensors", "train_state.json"}
    assert {p.name for p in folder.iterdir()} == model_files | run_files | {"manifest.json", "critic"}
    assert {p.name for p in (folder / "critic").iterdir()} == model_files
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == model_files | run_files | {f"critic/{name}" for name in model_files}
    assert load(folder / "critic")[0].config.scalar_head


def test_retention_keeps_the_newest_and_the_best(make_model, tmp_path):
    model = make(make_model)
    for step in range(10, 70, 10):
        write(tmp_path, model, step, keep_last=2, best=step in (10, 30))
        assert os.readlink(tmp_path / "latest") == f"step_{step:06d}"
    assert complete(tmp_path) == [30, 50, 60] and os.readlink(tmp_path / "best") == "step_000030"
    assert {p.name for p in tmp_path.iterdir()} == {"step_000030", "step_000050", "step_000060", "latest", "best"}
    write(tmp_path, model, 70, keep_last=1)
    assert complete(tmp_path) == [30, 70]


def test_a_run_resumed_behind_damaged_checkpoints_keeps_what_it_saves(make_model, tmp_path):
    """The damaged ones have higher numbers, and must not count as the newest."""
    model = make(make_model)
    for step in (10, 20, 30):
        write(tmp_path, model, step, keep_last=9)
    for step in (20, 30):
        flip_a_bit(tmp_path / f"step_0000{step}/model.safetensors")
    assert find(tmp_path).name == "step_000010"
    assert write(tmp_path, model, 15, keep_last=1).exists()
    assert find(tmp_path).name == "step_000015" and damage(find(tmp_path)) == ""
    assert write(tmp_path, model, 20, keep_last=1).exists()
    assert find(tmp_path).name == "step_000020" and complete(tmp_path) == [20]


def test_leftovers_of_a_killed_save_are_no_obstacle(make_model, tmp_path):
    (tmp_path / ".tmp_step_000005/deep").mkdir(parents=True)
    (tmp_path / ".tmp_step_000005/model.safetensors").write_bytes(b"half")
    (tmp_path / ".latest").symlink_to("nowhere")
    (tmp_path / "step_notes").mkdir()  # not ours
    folder = write(tmp_path, make(make_model), 5)
    assert damage(folder) == "" and {p.name for p in tmp_path.iterdir()} == {"step_000005", "latest", "step_notes"}


def test_a_run_copied_by_a_tool_that_follows_links_continues(make_model, tmp_path):
    """As scp -r does: latest and best are directories then."""
    write(tmp_path / "run", make(make_model), 1, best=True)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, symlinks=False)
    assert not (copy / "latest").is_symlink() and find(copy).name == "step_000001"
    write(copy, make(make_model), 2, best=True)
    assert os.readlink(copy / "latest") == os.readlink(copy / "best") == "step_000002" and complete(copy) == [1, 2]


def test_a_full_disk_leaves_older_checkpoints_whole(make_model, small_disk):
    """Whichever file it fills up at."""
    run, model = small_disk(1024), make(make_model)
    write(run, model, 1, best=True)
    size = sum(p.stat().st_size for p in (run / "step_000001").iterdir()) // 1024
    for left in range(0, size, size // 8):
        free = os.statvfs(run).f_bavail * os.statvfs(run).f_bsize // 1024
        (run / "filler").write_bytes(bytes((free - left) * 1024))
        with pytest.raises(UserError, match="not saved.*Checkpoints kept: step_000001"):
            write(run, model, 2)
        assert complete(run) == [1] and os.readlink(run / "latest") == "step_000001"
        (run / "filler").unlink()
    write(run, model, 2)
    assert complete(run) == [1, 2]


def test_an_unwritable_directory_leaves_older_checkpoints_whole(make_model, small_disk):
    run, model = small_disk(1024), make(make_model)
    write(run, model, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
    with pytest.raises(UserError, match="not saved.*(R|r)ead-only"):
        write(run, model, 2)
    assert complete(run) == [1]


def test_kill_9_during_saves_never_leaves_a_damaged_checkpoint(make_model, tmp_path, fork):
    """A process saves again and again; it is killed at moments spread over a save and the removal
    of an old one."""

    def save_forever(run, step):
        model = make(make_model)
        while True:
            step += 1
            write(run, model, step, keep_last=2, best=step % 3 == 0)

    run, step, during_a_save = tmp_path / "run", 0, 0
    for trial in range(24):
        child = fork(save_forever, run, step)
        deadline = time.monotonic() + 5
        while not (run / f"step_{step + 3:06d}").exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(trial * 0.0009)
        os.kill(child.pid, 9)
        assert child.wait()[0] == -9
        found = steps_in(run)
        assert not [damage(p) for p in found if damage(p)], trial
        during_a_save += bool(list(run.glob(".tmp*")))
        step = int(found[-1].name[5:])
        assert len(found) >= 2 and find(run) == found[-1]
        assert load_state(found[-1])[1]["order"]["index"] == step
    assert during_a_save > 3


def test_saving_the_same_step_again_repairs_it_only_if_it_is_damaged(make_model, tmp_path):
    folder = write(tmp_path, make(make_model, 1), 1)
    before = sha256(folder / "manifest.json")
    write(tmp_path, make(make_model, 2), 1)
    assert sha256(folder / "manifest.json") == before
    flip_a_bit(folder / "model.safetensors")
    write(tmp_path, make(make_model, 2), 1)
    assert damage(folder) == "" and torch.equal(load(folder)[0].embed, make(make_model, 2).embed)


def test_lineage_leads_back_to_the_corpus(make_model, tmp_path):
    """Three generations, each naming the checkpoint it came from, its weights' hash, and what made
    it."""
    lineage = []
    for i, stage in enumerate(["pretrain", "sft", "dpo"]):
        info = INFO | {"stage": stage, "step": i + 1, "lineage": lineage}
        folder = save(tmp_path / stage, make(make_model, i), BYTES, info)
        _, _, found = load(tmp_path / stage)
        assert found["lineage"] == lineage
        lineage = lineage + [parent_record(find(tmp_path / stage), found)]
        expected = {"path": str(folder), "weights": sha256(folder / "model.safetensors")}
        assert lineage[-1] == expected | {key: info[key] for key in ("stage", "step", "config", "data", "code")}
    assert [p["stage"] for p in lineage] == ["pretrain", "sft", "dpo"] and len({p["weights"] for p in lineage}) == 3
