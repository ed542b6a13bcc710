"""Hugging Face directories: the same model in `transformers`, both ways; and what this GPT cannot
be is named."""

import json
import random

import pytest
import safetensors.torch
import torch
from conftest import random_model

from data import chat, tokenizer
from data.pack import make_completion, pack
from model import completion_logprobs, logprobs_no_grad, score
from rollout import Sampler, rollout
from runtime.checkpoint import load, save
from runtime.errors import UserError
from runtime.hub import check_parameters

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
        ({"is_causal": False}, "is_causal"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),  # what other families compute by
        ({"alibi": True}, "alibi"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"rotary_pct": 0.25}, "rotary_pct"),
        ({"num_experts": 8}, "num_experts"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
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
        # Two keys that contradict each other, of which tools read different ones
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, r"rope_scaling.type is 'linear'.*'default'"),
        ({"rope_scaling": {"factor": 8.0}}, "factor=8.0"),
        ({"rope_theta": 500.0}, r"rope_theta is 500.0.*10000.0"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}}, "rope_scaling.rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "yarn"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "default"}}}, FULL),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries"),
        ({"layer_types": [FULL] * 3}, "layer_types has 3 entries"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architectures"),
        ({"model_type": "llama"}, "architectures"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": 8}, "sliding_window"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq.*quantised"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8.*quantised"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized.*quantised"),
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
    edit(folder, head_dim=None, rope_scaling=None, num_key_value_heads=None, layer_types=None, hidden_act="swish")
    edit(folder, is_causal=True, logit_scale=1.0, attn_logit_softcapping=None, rope_interleaved=False, num_experts=0)
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


def rewrite(folder, change):
    """Let `change` edit the tensors of an untrusted directory, a dict."""
    edit(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


Q, EMBED, HEAD = "model.layers.1.self_attn.q_proj", "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "name, dtype, named",
    [
        # An adapter that nobody merged
        (f"{Q}.lora_A.weight", torch.float32, "LoRA.*merge"),
        (f"base_model.model.{Q}.lora_B.default.weight", torch.bfloat16, "LoRA.*merge"),
        (f"{Q}.base_layer.weight", torch.float32, "LoRA.*merge"),
        ("base_model.model.lm_head.modules_to_save.weight", torch.float32, "LoRA.*merge"),
        ("base_model.prompt_encoder.default.embedding.weight", torch.float32, "adapter.*merge"),
        (f"{Q}.ia3_l.default", torch.float32, "adapter.*merge"),
        (f"{Q}.oft_r", torch.float32, "adapter.*merge"),
        ("ema.model.norm.weight", torch.float32, "is model.norm.weight once more"),
        (f"base_model.model.{Q}.weight", torch.float32, f"is {Q}.weight once more"),
        # GPTQ and AWQ, bitsandbytes (8 and 4 bits), fp8, compressed-tensors
        (f"{Q}.qweight", torch.int32, "quantised"),
        (f"{Q}.scales", torch.float16, "quantised"),
        (f"{Q}.g_idx", torch.int32, "quantised"),
        (f"{Q}.SCB", torch.float32, "quantised"),
        (f"{Q}.weight.absmax", torch.uint8, "quantised"),
        (f"{Q}.weight.quant_state.bitsandbytes__nf4", torch.uint8, "quantised"),
        (f"{Q}.weight_scale_inv", torch.float32, "quantised"),
        (f"{Q}.weight_packed", torch.int32, "quantised"),
        (f"{Q}.k_scale", torch.float32, "quantised"),
        # What the trunk has no place for
        ("model.layers.2.self_attn.q_proj.weight", torch.float32, r"layers\.2.*2 layers"),
        ("model.layers.7.mlp.up_proj.weight", torch.float32, r"layers\.7.*2 layers"),
        (f"{Q}.bias", torch.float32, "q_proj.bias"),
        ("model.layers.0.self_attn.o_proj.bias", torch.float32, "o_proj.bias"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", torch.float32, "experts"),
        ("lm_head.bias", torch.float32, "lm_head.bias"),
    ],
)
def test_a_tensor_left_over_that_would_make_another_model_is_named(untrusted, name, dtype, named):
    rewrite(untrusted, lambda tensors: tensors.update({name: torch.ones(2, 3).to(dtype)}))
    with pytest.raises(UserError, match=named) as e:
        load(untrusted)
    assert str(untrusted / "model.safetensors") in str(e.value) and name in str(e.value)


def test_other_tensors_left_over_are_said_and_a_derived_table_is_not(untrusted, capsys):
    def add(tensors):
        tensors |= {"v_head.summary.weight": torch.ones(3), "mtp.fc.weight": torch.ones(3)}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    expected = load(untrusted)[0]
    rewrite(untrusted, add)
    capsys.readouterr()
    model, _, _ = load(untrusted)
    said = capsys.readouterr().out
    assert "2 tensors are not used: " in said and "v_head.summary.weight" in said and "inv_freq" not in said
    assert torch.equal(model.embed, expected.embed)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_a_weight_of_a_quantised_type_is_named(untrusted, dtype):
    """Before its shape, which packing changes as well."""
    rewrite(untrusted, lambda tensors: tensors.update({f"{Q}.weight": torch.ones(16, 4).to(dtype)}))
    with pytest.raises(UserError, match=r"q_proj.weight is of .*quantised"):
        load(untrusted)


def test_a_tensor_that_is_missing_says_where_it_may_be(untrusted):
    def prefix(tensors):
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    rewrite(untrusted, prefix)
    with pytest.raises(UserError, match=r"embed_tokens.weight is missing, but _orig_mod.*; take _orig_mod. off"):
        load(untrusted)


@pytest.mark.parametrize("prefix", ["", "model.language_model."])
def test_a_tensor_that_is_there_under_another_name_is_named(untrusted, prefix):
    """AutoModel writes none of the prefix, a model that sees a longer one."""

    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    rewrite(untrusted, rename)
    with pytest.raises(UserError, match=f"{EMBED} is missing, but {prefix}embed_tokens.weight is there; rename it"):
        load(untrusted)


def test_a_head_of_its_own_contradicts_tied_embeddings(make_model, tmp_path, untrusted):
    folder = write(tmp_path / "tied", make(make_model, tied=True))
    ids = random_ids(20)
    expected = logits_of(load(folder)[0], ids)

    def copied(tensors):
        tensors[HEAD] = tensors[EMBED].clone()

    def tuned(tensors):
        tensors[HEAD][7, 3] += 0.01

    def shorter(tensors):
        tensors[HEAD] = tensors[HEAD][:-1].clone()

    rewrite(folder, copied)
    torch.testing.assert_close(logits_of(load(folder)[0], ids), expected, rtol=0, atol=0)
    rewrite(folder, tuned)
    edit(folder, tie_word_embeddings=False)
    assert (logits_of(load(folder)[0], ids) - expected).abs().max() > 1e-3
    for change in (tuned, shorter):
        rewrite(folder, change)
        edit(folder, tie_word_embeddings=True)
        with pytest.raises(UserError, match="lm_head.weight is not the embedding.*tie_word_embeddings"):
            load(folder)
    rewrite(untrusted, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(UserError, match="lm_head.weight is missing; if .* tie_word_embeddings: true"):
        load(untrusted)


def test_of_a_tied_model_the_head_alone_may_be_stored(make_model, tmp_path):
    """safetensors' save_model keeps the first name in the alphabet; transformers reads it."""
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "tied", make(make_model, tied=True))
    ids = random_ids(20)
    expected = logits_of(load(folder)[0], ids)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBED)}))
    torch.testing.assert_close(logits_of(load(folder)[0], ids), expected, rtol=0, atol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], expected, rtol=0, atol=1e-4)
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"tensor {EMBED} is missing"):
        load(folder)


def test_what_generation_config_asks_and_is_not_done_is_said(untrusted, capsys):
    path = untrusted / "generation_config.json"
    for asked, said in (
        ({"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20}, "not followed: repetition_penalty; "),
        ({"repetition_penalty": 1.0, "num_beams": 1, "min_length": 0, "suppress_tokens": None}, ""),
        ({"suppress_tokens": [7], "stop_strings": ["###"]}, "not followed: suppress_tokens, stop_strings; "),
    ):
        edit(untrusted)
        path.write_text(json.dumps(asked))
        load(untrusted)
        out = capsys.readouterr().out
        assert (f"{path}: {said}" in out) if said else not out


def shard(folder, parts, weight_map=None):
    """Replace model.safetensors by files {name: {tensor name: tensor}} and their index."""
    edit(folder)
    for file, tensors in parts.items():
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = weight_map or {name: file for file, tensors in parts.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_single_file_comes_before_the_index_as_in_transformers(untrusted, make_model):
    transformers = pytest.importorskip("transformers")
    stale = safetensors.torch.load_file(untrusted / "model.safetensors")
    stale[EMBED] = stale[EMBED] + 1
    shard(untrusted, {"a.safetensors": stale})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(untrusted)
    assert torch.equal(load(untrusted)[0].embed, theirs.model.embed_tokens.weight)
    (untrusted / "model.safetensors").unlink()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(untrusted)
    assert torch.equal(load(untrusted)[0].embed, theirs.model.embed_tokens.weight)
    assert torch.equal(load(untrusted)[0].embed, stale[EMBED])


def test_an_index_that_its_shards_contradict_is_named(untrusted):
    tensors = safetensors.torch.load_file(untrusted / "model.safetensors")
    (untrusted / "model.safetensors").unlink()
    first, second = ({name: tensors[name] for name in sorted(tensors)[i::2]} for i in (0, 1))
    moved, value = next(iter(first.items()))
    where = {name: "a.safetensors" for name in first} | {name: "b.safetensors" for name in second}
    for parts, weight_map, named in (
        ({"a.safetensors": first, "b.safetensors": second | {moved: value + 1}}, where, "is in a.safetensors as well"),
        ({"a.safetensors": first, "b.safetensors": second}, where | {moved: "b.safetensors"}, f"{moved}.*not in .*b.s"),
        ({"a.safetensors": first, "b.safetensors": second}, where | {"x": "b.safetensors"}, "'x' is not in"),
    ):
        shard(untrusted, parts, weight_map)
        with pytest.raises(UserError, match=named):
            load(untrusted)
    shard(untrusted, {"a.safetensors": first, "b.safetensors": second}, where)
    load(untrusted)


def test_adapters_and_pickles_are_named(untrusted, tmp_path):
    edit(untrusted)
    (untrusted / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config.json: an adapter .* merge"):
        load(untrusted)
    (untrusted / "adapter_config.json").rename(untrusted / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter_model.safetensors: an adapter .* merge"):
        load(untrusted)
    (untrusted / "adapter_model.safetensors").unlink()
    (untrusted / "model.safetensors").rename(untrusted / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: a pickle"):
        load(untrusted)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint here, but an adapter"):
        load(tmp_path)


# --------------------------------------------------------------------------------------------------
# A vocabulary that is padded beyond the tokenizer's


@pytest.mark.parametrize("tied", [False, True])
def test_ids_without_a_token_are_never_drawn_and_have_no_probability(make_model, tmp_path, tied):
    """By the sampler and by the trainer alike, or ratio == 1 would break."""
    vocab = BYTES.n_vocab + 60
    folder = write(tmp_path, make_model(vocab_size=vocab, tied=tied), "sft")
    before = safetensors.torch.load_file(folder / "model.safetensors")
    model, tok, _ = load(folder)
    assert (model.config.vocab_size, model.config.padding, len(model.head)) == (vocab, 60, BYTES.n_vocab)
    prompts = [[5, 6, 7], [8, 9]]
    samples = []
    for sampling in ({"n": 40}, {"n": 1, "temperature": 0}, {"n": 20, "top_k": vocab}, {"n": 4, "top_p": 0.99}):
        found = rollout(model, prompts, max_new_tokens=12, **sampling)
        assert max(token for s in found for token in s.tokens) < BYTES.n_vocab
        samples += found if sampling == {"n": 40} else []
    chats = [make_completion(prompts[s.prompt_index], s.tokens) for s in samples]
    logp = logprobs_no_grad(model, chats, 1.0, 4096)
    sampled = torch.tensor([x for s in samples for x in s.logprobs])
    torch.testing.assert_close(sampled, logp, rtol=0, atol=1e-5)
    chat_ids = [*prompts[0], *samples[0].tokens]
    full = logits_of(model, chat_ids)[2:-1, : BYTES.n_vocab].log_softmax(-1)  # over the ids with a token
    expected = full.gather(1, torch.tensor(samples[0].tokens)[:, None])[:, 0]
    torch.testing.assert_close(logp[: len(expected)], expected, rtol=0, atol=1e-5)
    # A later token of mixed settings: top_k per request
    sampler = Sampler(model, 4, 32)
    sampler.add(prompts, max_new_tokens=6, top_k=vocab)
    sampler.add(prompts, max_new_tokens=6, top_k=3)
    while sampler.busy:
        assert all(max(s.tokens) < BYTES.n_vocab for s in sampler.step())
    # Training leaves the padding as it is, and a checkpoint keeps its size
    completion_logprobs(model, chats[:4]).mean().neg().backward()
    grad = (model.embed if tied else model.untied_head).grad
    assert grad.abs().sum() > 0 and not grad[BYTES.n_vocab :].any()
    again = safetensors.torch.load_file(write(tmp_path / "again", model, "sft") / "model.safetensors")
    assert all(torch.equal(t, before[name]) for name, t in again.items()) and again.keys() == before.keys()
    check_parameters(model)


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
    if "index" in name:  # which is read only where there is no model.safetensors
        (untrusted / "model.safetensors").unlink()
    if content is None:
        (untrusted / name).unlink()
    elif isinstance(content, bytes):
        (untrusted / name).write_bytes(content)
    else:
        content(untrusted / name)
    with pytest.raises(UserError) as e:
        load(untrusted)
    assert str(untrusted) in str(e.value) and ("passwd" in str(e.value) or "index" not in name)
