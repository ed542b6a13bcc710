"""Checkpoints: the same model in `transformers`, whole whatever happens to the disk or the process, and refusing what is damaged or unknown."""
import json
import os
import random
import shutil
import subprocess
import time

import pytest
import torch

import checkpoint
from checkpoint import damage, find, load, load_state, parent_record, save, steps_in
from common import UserError
from data import chat, tokenizer
from data.pack import pack
from model import score

BYTES = tokenizer.byte_level()
INFO = {"stage": "pretrain", "config": {"lr": 0.1}, "data": {"book.txt": "ab12"}, "code": "cd34", "lineage": []}

SHAPES = {
    "qwen3": {},
    "qwen3 tied": {"tied": True},
    "qwen3 one kv head, wide heads": {"kv_heads": 1, "head_dim": 16},
    "llama": {"qk_norm": False, "kv_heads": 4, "norm_eps": 1e-5, "rope_theta": 300.0},
    "llama 3": {"qk_norm": False, "tied": True, "rope_theta": 500.0, "rope_scaling": (4.0, 1.0, 4.0, 16.0)},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "tied": True},
}


def make(make_model, seed=0, **shape):
    return make_model(seed, vocab_size=BYTES.n_vocab, **shape)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"exp_avg/embed": torch.randn(30, 7, generator=generator), "step/embed": torch.tensor(3.0), "random/cpu": torch.randint(0, 256, (1, 99), generator=generator, dtype=torch.uint8)}


def write(run, model, step, **how):
    return save(run, model, BYTES, INFO | {"step": step}, (tensors(step), {"epoch": 0, "index": step}), **how)


def logits_of(model, ids):
    with torch.no_grad():
        return model(pack([ids])) @ model.head.T


def random_ids(n, seed=0, vocab=BYTES.n_vocab):
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---------------------------------------------------------------------------------------------------------------------------------
# The same model in transformers


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_we_write(make_model, tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    model = make(make_model, **SHAPES[shape])
    folder = write(tmp_path, model, 1)
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__.lower().startswith(shape.split()[0]) and not any(notes.values())
    ids = random_ids(60)
    with torch.no_grad():
        found = theirs(torch.tensor([ids])).logits[0]
    assert found.std() > 0.5
    torch.testing.assert_close(found, logits_of(model, ids), rtol=0, atol=1e-4)
    again, tok, info = load(folder)
    assert again.config == model.config and info["step"] == 1 and tokenizer.fingerprint(tok) == tokenizer.fingerprint(BYTES)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_we_read_what_transformers_writes(tmp_path, family):
    """Whole, in shards and in bf16, tied and untied; with config.json as transformers 5 writes it and as 4 did."""
    transformers = pytest.importorskip("transformers")
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    small = dict(vocab_size=BYTES.n_vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    for tied, rope in [(False, {"rope_type": "default"}), (True, llama3 if family == "Llama" else {"rope_type": "default"})]:
        torch.manual_seed(len(family) + tied)
        config = getattr(transformers, family + "Config")(**small, tie_word_embeddings=tied, rope_parameters={"rope_theta": 700.0, **rope})
        theirs = getattr(transformers, family + "ForCausalLM")(config).eval()
        with torch.no_grad():
            for p in theirs.parameters():  # as initialised all gains are 1 and all biases 0
                p.add_(torch.randn_like(p) * 0.2)
        whole, sharded, half, old = (tmp_path / f"{name}{tied}" for name in ("whole", "sharded", "half", "old"))
        theirs.save_pretrained(whole)
        theirs.save_pretrained(sharded, max_shard_size="20KB")
        assert not (sharded / "model.safetensors").exists() and len(list(sharded.glob("*.safetensors"))) > 2
        theirs.save_pretrained(old)
        edit(old, rope_parameters=None, rope_theta=700.0, rope_scaling=None if rope["rope_type"] == "default" else rope)
        ids = random_ids(60)
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
            theirs.to(torch.bfloat16).save_pretrained(half)
            rounded = transformers.AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)(torch.tensor([ids])).logits[0]
        for folder, truth in [(whole, expected), (sharded, expected), (old, expected), (half, rounded)]:
            tokenizer.save(BYTES, folder)
            model, _, info = load(folder)
            assert info == {} and model.config.rope_theta == 700 and model.embed.dtype == torch.float32
            torch.testing.assert_close(logits_of(model, ids), truth, rtol=0, atol=1e-4)


def test_a_reward_model_is_a_sequence_classifier(make_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    critic = make(make_model, scalar_head=True)
    folder = write(tmp_path, critic, 1)
    theirs, notes = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "Qwen3ForSequenceClassification" and not any(notes.values())
    a, b = random_ids(20, 1, 256), random_ids(9, 2, 256)
    with torch.no_grad():
        alone = torch.cat([theirs(torch.tensor([ids])).logits[:, 0] for ids in (a, b)])
        padded = torch.tensor([a, b + [BYTES.pad] * 11])  # what our reserved pad id is for
        together = theirs(padded, attention_mask=torch.tensor([[1] * 20, [1] * 9 + [0] * 11])).logits[:, 0]
        ours = score(critic, pack([a, b]))
    assert ours.std() > 0.1
    torch.testing.assert_close(alone, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(together, ours, rtol=0, atol=1e-4)
    assert load(folder)[0].config == critic.config


def test_from_fine_tuning_on_a_checkpoint_ends_with_a_turn_and_knows_the_template(make_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    for stage, end, talks in (("pretrain", BYTES.eot, False), ("sft", chat.end_of_turn(BYTES), True), ("dpo", chat.end_of_turn(BYTES), True)):
        folder = save(tmp_path / stage, make(make_model), BYTES, INFO | {"stage": stage, "step": 1})
        config = json.loads((folder / "config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (end, BYTES.eot, BYTES.pad)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert theirs.generation_config.eos_token_id == end  # where their `generate` stops
        assert (transformers.AutoTokenizer.from_pretrained(folder).chat_template == chat.TEMPLATE) == talks
        model, tok, info = load(folder)
        assert model.config == make(make_model).config and info["stage"] == stage and tokenizer.fingerprint(tok) == tokenizer.fingerprint(BYTES)


def test_autotokenizer_gives_the_same_ids(make_model, tmp_path, realdata):
    """Thousands of strings of every kind; the checkpoint's tokenizer in transformers, and loaded back here."""
    transformers = pytest.importorskip("transformers")
    draw = random.Random(0)
    source = open(__file__, encoding="utf-8").read()
    kinds = [
        lambda: chr(draw.choice([i for i in (draw.randrange(0x20, 0x3000), draw.randrange(0x3000, 0x11000)) if not 0xD800 <= i < 0xE000] or [65])),
        lambda: draw.choice(["😀", "👩‍👩‍👧", "🇩🇪", "é", "e\u0301", "ß", "日本", "ﷺ", "\u200d", "\ufeff", "\x00"]),
        lambda: draw.choice([" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", " \n "]),
        lambda: draw.choice(["don't", "I'LL", "12345", "3.14", "x_1", "HTTPServer", "<|", "|>", "--", "...", "    return"]),
        lambda: source[(i := draw.randrange(len(source) - 20)) : i + draw.randrange(20)],
        lambda: draw.choice("abcdefghijklmnop ABCDEF"),
    ]
    strings = [""] + ["".join(draw.choice(kinds)() for _ in range(draw.randrange(1, 12))) for _ in range(3000)]
    trained = tokenizer.train([source], 500)
    for tok in (trained, tokenizer.gpt2(realdata("gpt2"))):
        folder = save(tmp_path / tok.name, make_model(vocab_size=tok.n_vocab), tok, INFO | {"step": 1})
        theirs, back = transformers.AutoTokenizer.from_pretrained(folder), load(folder)[1]
        assert theirs.eos_token_id == tok.eot and theirs.pad_token_id == tok.pad and len(theirs) == tok.n_vocab
        for s in strings:
            ids = tok.encode_ordinary(s)
            assert theirs.encode(s, add_special_tokens=False) == ids == back.encode_ordinary(s), repr(s)
            assert tok.decode(ids) == s


# ---------------------------------------------------------------------------------------------------------------------------------
# What is refused


def edit(folder, **changes):
    """Change config.json; a checkpoint of ours then is a stranger's."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("manifest.json", "feinschliff.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gemma3"}, "gemma3"),
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}, "rope_theta"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"num_hidden_layers": -2}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_configs_this_gpt_cannot_be_are_named(make_model, tmp_path, change, named):
    folder = write(tmp_path, make(make_model), 1)
    edit(folder, **change)
    with pytest.raises(UserError, match=named) as e:
        load(folder)
    assert str(folder / "config.json") in str(e.value)


def test_nulls_ask_for_the_default(make_model, tmp_path):
    """As in the config.json of many a Llama."""
    folder = write(tmp_path, make(make_model, qk_norm=False, kv_heads=4), 1)
    edit(folder, head_dim=None, rope_scaling=None, num_key_value_heads=None, layer_types=None)
    assert load(folder)[0].config.head_dim == 8


def test_weights_that_do_not_fit_are_named(make_model, tmp_path):
    model = make(make_model)
    for change, named in [({"hidden_size": 64}, "embed_tokens"), ({"num_hidden_layers": 3}, "layers.2"), ({"vocab_size": 999}, r"embed_tokens.*999")]:
        folder = write(tmp_path / named[-5:], model, 1)
        edit(folder, **change)
        with pytest.raises(UserError, match=named):
            load(folder)
    smaller = save(tmp_path / "smaller", make_model(vocab_size=100), BYTES, INFO | {"step": 1})
    with pytest.raises(UserError, match="260 ids, the model 100"):
        load(smaller)


def test_a_strangers_directory_that_is_broken_is_named(make_model, tmp_path):
    for name, ruin in [
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-100])),
        ("model.safetensors", lambda p: p.write_bytes(b"")),
        ("model.safetensors", lambda p: p.unlink()),
        ("config.json", lambda p: p.write_text(p.read_text()[:50])),
        ("config.json", lambda p: p.write_text("[1]")),
        ("config.json", lambda p: p.write_bytes(b'{"\xff": 1}')),
        ("tokenizer.json", lambda p: p.unlink()),
        ("tokenizer.json", lambda p: p.write_text("{")),
    ]:
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        folder = write(run, make(make_model), 1)
        edit(folder)
        ruin(folder / name)
        with pytest.raises(UserError) as e:
            load(folder)
        assert str(folder) in str(e.value), name
    index = tmp_path / "escape"
    write(index, make(make_model), 1)
    (index / "step_000001/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    edit(index / "step_000001")
    with pytest.raises(UserError, match="passwd"):
        load(index / "step_000001")


# ---------------------------------------------------------------------------------------------------------------------------------
# What is damaged


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


RUINS = {
    "truncated weights": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1])),
    "a flipped bit in the weights": ("model.safetensors", flip_a_bit),
    "a flipped bit in the state": ("train_state.safetensors", flip_a_bit),
    "no weights": ("model.safetensors", lambda p: p.unlink()),
    "no config": ("config.json", lambda p: p.unlink()),
    "an empty config": ("config.json", lambda p: p.write_text("")),
    "another learning rate": ("feinschliff.json", lambda p: p.write_text(p.read_text().replace("0.1", "0.2"))),
    "no manifest": ("manifest.json", lambda p: p.unlink()),
    "half a manifest": ("manifest.json", lambda p: p.write_text(p.read_text()[:99])),
    "an empty manifest": ("manifest.json", lambda p: p.write_text("{}")),
    "a manifest of zeros": ("manifest.json", lambda p: p.write_bytes(bytes(100))),
}


@pytest.mark.parametrize("ruin", RUINS)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(make_model, tmp_path, capsys, ruin):
    models = [make(make_model, seed) for seed in (1, 2)]
    first, second = (write(tmp_path, m, step) for step, m in zip((1, 2), models))
    assert find(tmp_path) == second and damage(second) == ""
    name, spoil = RUINS[ruin]
    spoil(second / name)
    assert find(tmp_path) == first
    warning = capsys.readouterr().err
    assert str(second) in warning and name in warning and "the checkpoint before" in warning
    assert torch.equal(load(tmp_path)[0].embed, models[0].embed)
    with pytest.raises(UserError) as e:  # asked for by name there is nothing to fall back to
        find(second)
    assert str(second) in str(e.value)
    spoil(first / name)
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
    (tmp_path / "chat.jsonl").write_text("{}")
    for file in (tmp_path / "chat.jsonl", run / "step_000009" / "config.json"):
        with pytest.raises(UserError, match="no checkpoint here, but a file"):
            find(file)


# ---------------------------------------------------------------------------------------------------------------------------------
# Saving


def test_state_comes_back_bit_for_bit(make_model, tmp_path):
    folder = write(tmp_path, make(make_model), 7)
    found, counters = load_state(folder)
    assert counters == {"epoch": 0, "index": 7} and found.keys() == tensors(7).keys()
    assert all(torch.equal(t, found[k]) and t.dtype == found[k].dtype for k, t in tensors(7).items())
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "feinschliff.json", "train_state.safetensors", "train_state.json", "manifest.json",
    }  # fmt: skip
    assert set(json.loads((folder / "manifest.json").read_text())) == {p.name for p in folder.iterdir()} - {"manifest.json"}


def test_retention_keeps_the_newest_and_the_best(make_model, tmp_path):
    model = make(make_model)
    for step in range(10, 70, 10):
        write(tmp_path, model, step, keep_last=2, best=step in (10, 30))
        assert os.readlink(tmp_path / "latest") == f"step_{step:06d}"
    assert [p.name for p in steps_in(tmp_path)] == ["step_000030", "step_000050", "step_000060"]
    assert os.readlink(tmp_path / "best") == "step_000030"
    assert {p.name for p in tmp_path.iterdir()} == {"step_000030", "step_000050", "step_000060", "latest", "best"}
    write(tmp_path, model, 70, keep_last=1)
    assert [p.name for p in steps_in(tmp_path)] == ["step_000030", "step_000070"]


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
    assert find(tmp_path).name == "step_000020" and [p.name for p in steps_in(tmp_path)] == ["step_000020"]


def test_leftovers_of_a_killed_save_are_no_obstacle(make_model, tmp_path):
    (tmp_path / ".tmp_step_000005/deep").mkdir(parents=True)
    (tmp_path / ".tmp_step_000005/model.safetensors").write_bytes(b"half")
    (tmp_path / ".latest").symlink_to("nowhere")
    (tmp_path / "step_notes").mkdir()  # a stranger's
    folder = write(tmp_path, make(make_model), 5)
    assert damage(folder) == "" and {p.name for p in tmp_path.iterdir()} == {"step_000005", "latest", "step_notes"}


def test_a_run_copied_by_a_tool_that_follows_links_goes_on(make_model, tmp_path):
    """As scp -r does: latest and best are directories then."""
    write(tmp_path / "run", make(make_model), 1, best=True)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, symlinks=False)
    assert not (copy / "latest").is_symlink() and find(copy).name == "step_000001"
    write(copy, make(make_model), 2, best=True)
    assert os.readlink(copy / "latest") == os.readlink(copy / "best") == "step_000002" and whole(copy) == [1, 2]


def whole(run):
    """The steps saved; every one of them undamaged, and no half-written directory beside them."""
    assert not list(run.glob(".tmp*")) and not [damage(p) for p in steps_in(run) if damage(p)]
    return [int(p.name[5:]) for p in steps_in(run)]


def test_a_full_disk_leaves_older_checkpoints_whole(make_model, small_disk):
    """At whatever file it fills up."""
    run, model = small_disk(1024), make(make_model)
    write(run, model, 1, best=True)
    size = sum(p.stat().st_size for p in (run / "step_000001").iterdir()) // 1024
    free = lambda: os.statvfs(run).f_bavail * os.statvfs(run).f_bsize // 1024  # noqa: E731
    for left in range(0, size, size // 8):
        (run / "filler").write_bytes(bytes((free() - left) * 1024))
        with pytest.raises(UserError, match="not saved.*Checkpoints kept: step_000001"):
            write(run, model, 2)
        assert whole(run) == [1] and os.readlink(run / "latest") == "step_000001"
        (run / "filler").unlink()
    write(run, model, 2)
    assert whole(run) == [1, 2]


def test_an_unwritable_directory_leaves_older_checkpoints_whole(make_model, small_disk):
    run, model = small_disk(1024), make(make_model)
    write(run, model, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
    with pytest.raises(UserError, match="not saved.*(R|r)ead-only"):
        write(run, model, 2)
    assert whole(run) == [1]


def test_kill_9_during_saves_never_leaves_a_damaged_checkpoint(make_model, tmp_path, fork):
    """A process saves again and again; it is killed at moments spread over a save and the removal of an old one."""

    def forever(run, step):
        model = make(make_model)
        while True:
            step += 1
            write(run, model, step, keep_last=2, best=step % 3 == 0)

    run, step, during = tmp_path / "run", 0, 0
    for trial in range(30):
        child = fork(forever, run, step)
        deadline = time.monotonic() + 5
        while not (run / f"step_{step + 3:06d}").exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(trial * 0.0007)
        os.kill(child.pid, 9)
        assert child.wait()[0] == -9
        found = steps_in(run)
        assert not [damage(p) for p in found if damage(p)], trial
        during += bool(list(run.glob(".tmp*")))
        step = int(found[-1].name[5:])
        assert len(found) >= 2 and find(run) == found[-1] and load_state(found[-1])[1]["index"] == step
    assert during > 3  # enough of them did hit a save


def test_saving_the_same_step_again_mends_it_only_if_it_is_damaged(make_model, tmp_path):
    folder = write(tmp_path, make(make_model, 1), 1)
    before = checkpoint.sha256(folder / "manifest.json")
    write(tmp_path, make(make_model, 2), 1)
    assert checkpoint.sha256(folder / "manifest.json") == before
    flip_a_bit(folder / "model.safetensors")
    write(tmp_path, make(make_model, 2), 1)
    assert damage(folder) == "" and torch.equal(load(folder)[0].embed, make(make_model, 2).embed)


def test_lineage_leads_back_to_the_corpus(make_model, tmp_path):
    """Three generations, each naming the checkpoint it came from, its weights' hash, and what made it."""
    lineage = []
    for i, stage in enumerate(["pretrain", "sft", "dpo"]):
        folder = save(tmp_path / stage, make(make_model, i), BYTES, INFO | {"stage": stage, "step": i + 1, "lineage": lineage})
        _, _, info = load(tmp_path / stage)
        assert info["lineage"] == lineage
        lineage = info["lineage"] + [parent_record(find(tmp_path / stage), info)]
        assert lineage[-1] == {"path": str(folder), "weights": checkpoint.sha256(folder / "model.safetensors"), "stage": stage, "step": i + 1,
                               "config": INFO["config"], "data": INFO["data"], "code": INFO["code"]}  # fmt: skip
    assert [p["stage"] for p in lineage] == ["pretrain", "sft", "dpo"] and len({p["weights"] for p in lineage}) == 3
