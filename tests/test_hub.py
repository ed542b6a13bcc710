"""Hugging Face directories: the same model in `transformers`, both ways; and what this GPT cannot
be is named."""

import json
import random

import pytest
import torch
from conftest import random_model

from data import chat, tokenizer
from data.pack import pack
from model import score
from runtime.checkpoint import load, save
from runtime.errors import UserError

BYTES = tokenizer.byte_level()
SHAPES = {
    "qwen3": {},
    "qwen3 tied": {"tied": True},
    "qwen3 one kv head, wide heads": {"kv_heads": 1, "head_dim": 16},
    "qwen3 windows": {"window": 7},
    "qwen3 windows in every second layer": {"window": 7, "window_every": 2, "layers": 3},
    "qwen3 a window in the first layer": {"window": 7, "window_every": 3, "layers": 3},
    "llama": {"qk_norm": False, "kv_heads": 4, "norm_eps": 1e-5, "rope_theta": 300.0},
    "llama 3": {"qk_norm": False, "tied": True, "rope_theta": 500.0, "rope_scaling": (4.0, 1.0, 4.0, 16.0)},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "tied": True},
    "qwen2 windows": {"qk_norm": False, "qkv_bias": True, "window": 5, "window_every": 2},
}


def make(make_model, **shape):
    return make_model(vocab_size=BYTES.n_vocab, **shape)


def write(folder, model, stage="pretrain", tok=BYTES):
    return save(folder, model, tok, {"stage": stage, "step": 1})


def logits_of(model, ids):
    with torch.no_grad():
        return model(pack([ids])) @ model.head.T


def random_ids(n, seed=0, vocab=BYTES.n_vocab):
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def edit(folder, **changes):
    """Change config.json; a checkpoint of ours then is an untrusted one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("manifest.json", "feinschliff.json"):
        (folder / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# The same model in transformers


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_we_write(make_model, tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    model = make(make_model, **SHAPES[shape])
    folder = write(tmp_path, model)
    other, notes = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(other).__name__.lower().startswith(shape.split()[0]) and not any(notes.values())
    ids = random_ids(60)
    with torch.no_grad():
        found = other(torch.tensor([ids])).logits[0]
    assert found.std() > 0.5
    torch.testing.assert_close(found, logits_of(model, ids), rtol=0, atol=1e-4)
    if model.config.window:  # and without its windows it would be another model
        assert (found - logits_of(make(make_model, **(SHAPES[shape] | {"window": 0})), ids)).abs().max() > 0.1
    again, tok, info = load(folder)
    assert again.config == model.config and info["step"] == 1
    assert tokenizer.fingerprint(tok) == tokenizer.fingerprint(BYTES)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_we_read_what_transformers_writes(tmp_path, family):
    """Whole, in shards and in bf16, tied and untied, with windows; with config.json as transformers
    5 writes it and as 4 did."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": BYTES.n_vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 16
    windows = {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
    for tied in (False, True):
        torch.manual_seed(len(family) + tied)
        rope = llama3 if family == "Llama" and tied else {"rope_type": "default"}
        options = windows if family != "Llama" and tied else {}
        config = getattr(transformers, family + "Config")(
            **small, tie_word_embeddings=tied, rope_parameters={"rope_theta": 700.0, **rope}, **options
        )
        other = getattr(transformers, family + "ForCausalLM")(config).eval()
        with torch.no_grad():
            for p in other.parameters():  # as initialised all gains are 1 and all biases 0
                p.add_(torch.randn_like(p) * 0.2)
        whole, sharded, half, old = (tmp_path / f"{name}{tied}" for name in ("whole", "sharded", "half", "old"))
        other.save_pretrained(whole)
        other.save_pretrained(sharded, max_shard_size="20KB")
        assert not (sharded / "model.safetensors").exists() and len(list(sharded.glob("*.safetensors"))) > 2
        other.save_pretrained(old)
        scaling = None if rope["rope_type"] == "default" else rope
        edit(old, rope_parameters=None, rope_theta=700.0, rope_scaling=scaling)
        ids = torch.tensor([random_ids(60)])
        with torch.no_grad():
            expected = other(ids).logits[0]
            other.to(torch.bfloat16).save_pretrained(half)
            rounded = transformers.AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)(ids).logits[0]
        for folder, truth in [(whole, expected), (sharded, expected), (old, expected), (half, rounded)]:
            tokenizer.save(BYTES, folder)
            model, _, info = load(folder)
            assert info == {} and model.config.rope_theta == 700 and model.embed.dtype == torch.float32
            assert model.config.windows == ([9, 0] if options else [0, 0])
            torch.testing.assert_close(logits_of(model, ids[0].tolist()), truth, rtol=0, atol=1e-4)


def test_a_reward_model_is_a_sequence_classifier(make_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    critic = make(make_model, scalar_head=True)
    folder = write(tmp_path, critic)
    other, notes = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert type(other).__name__ == "Qwen3ForSequenceClassification" and not any(notes.values())
    a, b = random_ids(20, 1, 256), random_ids(9, 2, 256)
    padded = torch.tensor([a, b + [BYTES.pad] * 11])  # what our reserved pad id is for
    mask = torch.tensor([[1] * 20, [1] * 9 + [0] * 11])
    with torch.no_grad():
        alone = torch.cat([other(torch.tensor([ids])).logits[:, 0] for ids in (a, b)])
        together = other(padded, attention_mask=mask).logits[:, 0]
        expected = score(critic, pack([a, b]))
    assert expected.std() > 0.1
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)
    assert load(folder)[0].config == critic.config


def test_from_fine_tuning_on_a_checkpoint_ends_with_a_turn_and_knows_the_template(make_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    end_of_turn = chat.end_of_turn(BYTES)
    for stage, end, has_turns in (
        ("pretrain", BYTES.eot, False),
        ("sft", end_of_turn, True),
        ("dpo", end_of_turn, True),
    ):
        folder = write(tmp_path / stage, make(make_model), stage)
        config = json.loads((folder / "config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (end, BYTES.eot, BYTES.pad)
        other = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert other.generation_config.eos_token_id == end  # where its `generate` stops
        template = transformers.AutoTokenizer.from_pretrained(folder).chat_template
        assert (template == chat.TEMPLATE) == has_turns
        model, tok, info = load(folder)
        assert model.config == make(make_model).config and info["stage"] == stage
        assert tokenizer.fingerprint(tok) == tokenizer.fingerprint(BYTES)


def test_autotokenizer_gives_the_same_ids(make_model, tmp_path, realdata):
    """Thousands of strings of every kind; the checkpoint's tokenizer in transformers, and loaded
    back here."""
    transformers = pytest.importorskip("transformers")
    draw = random.Random(0)
    source = open(__file__, encoding="utf-8").read()
    pieces = ["😀", "👩‍👩‍👧", "🇩🇪", "é", "e\u0301", "ß", "日本", "ﷺ", "\u200d", "\ufeff", "\x00"]
    pieces += [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", " \n "]
    pieces += ["don't", "I'LL", "12345", "3.14", "x_1", "HTTPServer", "<|", "|>", "--", "...", "    return"]
    pieces += list("abcdefghijklmnop ABCDEF")

    def some_text():
        kind = draw.randrange(4)
        if kind == 0:
            return chr(draw.choice([draw.randrange(0x20, 0xD800), draw.randrange(0xE000, 0x11000)]))
        if kind == 1:
            begin = draw.randrange(len(source) - 20)
            return source[begin : begin + draw.randrange(20)]
        return draw.choice(pieces)

    strings = [""] + ["".join(some_text() for _ in range(draw.randrange(1, 12))) for _ in range(3000)]
    for tok in (tokenizer.train([source], 500), tokenizer.gpt2(realdata("gpt2"))):
        folder = write(tmp_path / tok.name, make_model(vocab_size=tok.n_vocab), tok=tok)
        other, back = transformers.AutoTokenizer.from_pretrained(folder), load(folder)[1]
        assert other.eos_token_id == tok.eot and other.pad_token_id == tok.pad and len(other) == tok.n_vocab
        for s in strings:
            ids = tok.encode_ordinary(s)
            assert other.encode(s, add_special_tokens=False) == ids == back.encode_ordinary(s), repr(s)
            assert tok.decode(ids) == s


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint with two layers, to be changed."""
    return write(tmp_path_factory.mktemp("good"), make(random_model))


@pytest.fixture
def untrusted(good, tmp_path):
    """A copy of it, of which only the configuration is the test's."""
    folder = tmp_path / "untrusted"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


FULL, SLIDING = "full_attention", "sliding_attention"


def windows(*layer_types, sliding_window=8):
    return {"use_sliding_window": True, "sliding_window": sliding_window, "layer_types": list(layer_types)}


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
        ({"use_sliding_window": True}, "layer_types"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types"),
        ({"layer_types": [SLIDING, FULL]}, "layer_types"),  # without use_sliding_window
        ({"layer_types": ["chunked_attention", FULL]}, "layer_types"),
        (windows(FULL, SLIDING), "layer_types"),  # not from the first
        (windows(SLIDING), "layer_types"),  # too few
        (windows(SLIDING, FULL, SLIDING), "layer_types"),
        (windows(FULL, FULL), "layer_types"),
        (windows(SLIDING, "chunked_attention"), "layer_types"),
        (windows(SLIDING, [SLIDING]), "layer_types"),
        (windows(SLIDING, SLIDING, sliding_window=None), "sliding_window"),
        (windows(SLIDING, SLIDING, sliding_window=-1), "sliding_window"),
        (windows(SLIDING, SLIDING) | {"model_type": "llama"}, "use_sliding_window"),
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
def test_configs_this_gpt_cannot_be_are_named(untrusted, change, named):
    edit(untrusted, **change)
    with pytest.raises(UserError, match=named) as e:
        load(untrusted)
    assert str(untrusted / "config.json") in str(e.value)


def test_layer_types_that_are_a_pattern_of_ours_are_read(make_model, tmp_path):
    for i, (types, every) in enumerate([([SLIDING, FULL, FULL], 3), ([SLIDING, FULL, SLIDING], 2), ([SLIDING] * 3, 1)]):
        folder = write(tmp_path / str(i), make(make_model, layers=3))
        edit(folder, **windows(*types))
        config = load(folder)[0].config
        assert (config.window, config.window_every) == (8, every)
        assert [FULL if w == 0 else SLIDING for w in config.windows] == types


def test_nulls_ask_for_the_default(make_model, tmp_path):
    """As in the config.json of many a Llama."""
    folder = write(tmp_path, make(make_model, qk_norm=False, kv_heads=4))
    edit(folder, head_dim=None, rope_scaling=None, num_key_value_heads=None, layer_types=None)
    assert load(folder)[0].config.head_dim == 8


def test_weights_that_do_not_fit_are_named(untrusted, make_model, tmp_path):
    for change, named in [
        ({"hidden_size": 64}, "embed_tokens"),
        ({"hidden_size": 32, "num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 2, "vocab_size": 999}, r"embed_tokens.*999"),
    ]:
        edit(untrusted, **change)
        with pytest.raises(UserError, match=named):
            load(untrusted)
    smaller = write(tmp_path / "smaller", make_model(vocab_size=100))
    with pytest.raises(UserError, match="260 ids, the model 100"):
        load(smaller)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", cut),
        ("model.safetensors", b""),
        ("model.safetensors", None),
        ("config.json", cut),
        ("config.json", b"[1]"),
        ("config.json", b'{"\xff": 1}'),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "../../etc/passwd"}}'),
    ],
)
def test_an_untrusted_directory_that_is_broken_is_named(untrusted, name, content):
    edit(untrusted)
    if content is None:
        (untrusted / name).unlink()
    elif isinstance(content, bytes):
        (untrusted / name).write_bytes(content)
    else:
        content(untrusted / name)
    with pytest.raises(UserError) as e:
        load(untrusted)
    assert str(untrusted) in str(e.value) and ("passwd" in str(e.value) or "index" not in name)
