"""export.py: the same model in `transformers`; tokenizer, stops and template in the file; and what
llama.cpp could not do. bench/llamacpp.py compares with llama.cpp itself."""

import json

import numpy as np
import pytest
import torch
from runs import SMALL, null_device, refused, save, start

import export
from bench.realmodel import from_gguf
from data import chat, tokenizer
from data.pack import pack
from runtime import checkpoint
from runtime.errors import UserError

gguf = pytest.importorskip("gguf")
TRAINED = tokenizer.train(["the old map, the red door; 12 + 30 = 42. Das ist ein Bäumchen! " * 5], 256 + 4 + 30)
# transformers takes the width of Qwen3's heads to be 128 when it reads GGUF
SHAPES = {
    "qwen3": {"head_dim": 128},
    "qwen3 tied": {"head_dim": 128, "tied": True},
    "llama": {"qk_norm": False, "rope_theta": 300.0, "norm_eps": 1e-5},
    "llama wide heads": {"qk_norm": False, "head_dim": 12, "tied": True},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
}


def exported(folder, tmp_path, dtype="f32"):
    """The fields and tensors of the file that export.py writes: {key: value}, {name: array}."""
    path = tmp_path / "model.gguf"
    export.main(export.Config(model=str(folder), gguf=str(path), dtype=dtype, overwrite=True))
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def test_a_link_leads_to_the_file_and_its_mode_stays(make_model, tmp_path):
    folder, real = save(make_model, tmp_path / "run", "sft"), tmp_path / "real.gguf"
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "model.gguf").symlink_to("real.gguf")
    exported(folder, tmp_path)
    assert (tmp_path / "model.gguf").is_symlink() and real.read_bytes()[:4] == b"GGUF"
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_the_file(make_model, tmp_path, shape):
    pytest.importorskip("transformers")
    folder = save(make_model, tmp_path / "run", "sft", tok=TRAINED, **SHAPES[shape])
    model, tok, _ = checkpoint.load(folder)
    for dtype, bound in (("f32", 1e-3), ("bf16", 0.5)) if shape == "llama" else (("f32", 1e-3),):
        exported(folder, tmp_path, dtype)
        other = from_gguf(tmp_path / "model.gguf")
        assert type(other).__name__.lower().startswith(shape.split()[0])
        ids = tok.encode_ordinary("the old map: 30, ein Baum") + [tok.eot, 5, 9]
        with torch.no_grad():
            found, expected = other(torch.tensor([ids])).logits[0], model(pack([ids])) @ model.head.T
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_the_tokenizer_the_end_of_a_turn_and_the_template_are_in_the_file(make_model, tmp_path):
    for stage, end, begins_with_bos in (("pretrain", TRAINED.eot, True), ("sft", chat.end_of_turn(TRAINED), False)):
        folder = save(make_model, tmp_path / stage, stage, tok=TRAINED)
        fields, _ = exported(folder, tmp_path)
        assert fields["tokenizer.ggml.pre"] == "qwen35" and fields["tokenizer.ggml.model"] == "gpt2"
        assert fields["tokenizer.ggml.eos_token_id"] == end and fields["tokenizer.ggml.bos_token_id"] == TRAINED.eot
        assert fields["tokenizer.ggml.add_bos_token"] is begins_with_bos
        assert fields.get("tokenizer.chat_template") == (chat.TEMPLATE if stage == "sft" else None)
        texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        assert len(texts) == len(set(texts)) == TRAINED.n_vocab
        assert [texts[i] for i in range(TRAINED.n_vocab - 4, TRAINED.n_vocab)] == list(tokenizer.SPECIALS)
        assert types[-4:] == [gguf.TokenType.CONTROL] * 4 and set(types[:-4]) == {gguf.TokenType.NORMAL}
        merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
        assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges] and len(merges) == 30


def theirs(make_model, folder, config=None, template="", spec=None):
    """A directory of someone else's, with visible tokens, a padded vocabulary, and what `config`
    and `spec` say in tokenizer_config.json and tokenizer.json."""
    ranks, specials = TRAINED._mergeable_ranks, {"<|bos|>": 300, "<|endoftext|>": 301, "<|eot|>": 302, "<think>": 303}
    added = ({"content": "<think>", "id": 303, "special": False},)
    tok = tokenizer.Tokenizer(
        "theirs",
        export_pattern("llama-bpe"),
        ranks,
        specials,
        pad="<|eot|>",
        added=added,
    )
    folder = save(make_model, folder, "pretrain", tok=tok, vocab_size=320, qk_norm=False)
    for name in ("manifest.json", "feinschliff.json"):
        (folder / name).unlink()
    edit(folder / "tokenizer_config.json", **(config or {}))
    edit(folder / "tokenizer.json", **(spec or {}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def export_pattern(name):
    return next(pattern for pattern, known in export.LLAMA_CPP_NAMES.items() if known == name)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_downloaded_models_conventions_are_kept(make_model, tmp_path):
    begins = tokenizer.before_every_text("<|bos|>", 300)
    turn = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|eot|>' }}{% endfor %}"
    turn += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    named = {"bos_token": "<|bos|>", "eos_token": "<|eot|>"}
    for i, (template, processor, adds) in enumerate(
        (
            (turn, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, begins]}, True),
            ("{{ bos_token }}" + turn, begins, False),  # the template writes it
            ("<|bos|>" + turn, begins, False),
            ("{# bos_token is the tokenizer's #}{% set b = bos_token %}" + turn, begins, True),
            (turn, None, False),
            ("", begins, True),
            ("", None, False),
        )
    ):
        folder = theirs(make_model, tmp_path / str(i), named, template, {"post_processor": processor})
        edit(folder / "config.json", eos_token_id=302)
        (folder / "generation_config.json").write_text('{"eos_token_id": [302, 301]}')
        fields, _ = exported(folder, tmp_path)
        assert fields["tokenizer.ggml.add_bos_token"] is adds, i
        assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (302, 301)
        assert not adds or fields["tokenizer.ggml.bos_token_id"] == 300
        assert fields.get("tokenizer.chat_template", "") == template
        assert fields["tokenizer.ggml.pre"] == "llama-bpe"
        texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        assert texts[303:306] == ["<think>", "[PAD304]", "[PAD305]"] and len(texts) == 320
        assert types[302:305] == [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED]


def test_weights_are_stored_in_the_dtype_asked_for(make_model, tmp_path):
    folder = save(make_model, tmp_path / "run", "sft", tok=TRAINED)
    model = checkpoint.load(folder)[0]
    for dtype, kind in (("f16", np.float16), ("f32", np.float32)):
        fields, tensors = exported(folder, tmp_path, dtype)
        embed = model.embed.detach().numpy()
        np.testing.assert_array_equal(tensors["token_embd.weight"], embed.astype(kind).astype(np.float32))
        np.testing.assert_array_equal(tensors["output_norm.weight"], model.norm.detach().numpy())
    bf16 = exported(folder, tmp_path, "bf16")[1]["token_embd.weight"]
    np.testing.assert_array_equal(bf16, model.embed.detach().bfloat16().float().numpy())
    with torch.no_grad():
        model.embed[3, 2] = 70_000.0
    folder = checkpoint.save(tmp_path / "large", model, TRAINED, {"stage": "sft", "step": 1})
    with pytest.raises(UserError, match="--dtype=f16: the tensor model.embed_tokens.weight.*bf16"):
        exported(folder, tmp_path, "f16")
    exported(folder, tmp_path, "bf16")


def test_llama_3s_scaling_is_what_each_frequency_is_divided_by(make_model, tmp_path):
    """By its definition (Llama 3.1's rope_scaling), at the ends and between."""
    scaling = (8.0, 1.0, 4.0, 64.0)
    model = make_model(qk_norm=False, head_dim=16, rope_theta=10000.0, rope_scaling=scaling)
    factor, low, high, original = scaling
    expected = []
    for i in range(8):
        wavelength = 2 * np.pi * 10000.0 ** (2 * i / 16)
        smooth = (original / wavelength - low) / (high - low)
        expected.append(1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else 1.0 if smooth >= 1 else factor)
    assert expected[0] == 1 and expected[-1] == 8 and 1 < expected[2] < 8
    np.testing.assert_allclose(export.rope_factors(model.config).numpy(), expected, rtol=1e-5)
    folder = save(make_model, tmp_path / "run", "sft", tok=TRAINED, qk_norm=False, head_dim=16, rope_scaling=scaling)
    np.testing.assert_allclose(exported(folder, tmp_path)[1]["rope_freqs.weight"], expected, rtol=1e-5)


def test_a_vocabulary_of_bytes_has_one_merge_that_never_comes_up(make_model, tmp_path):
    fields, _ = exported(save(make_model, tmp_path / "run", "sft"), tmp_path)
    (merge,) = fields["tokenizer.ggml.merges"]
    assert merge.split(" ")[0] == "<|endoftext|>"


def test_what_llama_cpp_could_not_do_is_refused(make_model, tmp_path, fork):
    ranks, eot = (
        TRAINED._mergeable_ranks,
        {"<|endoftext|>": 300, "<|im_end|>": 301, "<|im_start|>": 302, "<|pad|>": 303},
    )
    characters = tokenizer.characters("the old map")
    split = tokenizer.Tokenizer("x", r"\p{L}+|\P{L}", ranks, eot)
    unmade = tokenizer.Tokenizer("x", tokenizer.PATTERN, ranks | {b"qqqq": 304}, eot)
    good = save(make_model, tmp_path / "good", "sft")
    (tmp_path / "there.gguf").write_text("mine")
    device = null_device(tmp_path)
    for flags, message in [
        ({"model": save(make_model, tmp_path / "rm", "reward", scalar_head=True)}, "a reward model"),
        ({"model": save(make_model, tmp_path / "windows", "sft", window=8)}, "sliding windows"),
        ({"model": save(make_model, tmp_path / "scaled", "sft", rope_scaling=(4.0, 1.0, 4.0, 16.0))}, "rotary scaling"),
        ({"model": save(make_model, tmp_path / "w", "sft", qk_norm=False, qkv_bias=True, head_dim=12)}, "of qwen2"),
        (
            {"model": save(make_model, tmp_path / "c", "pretrain", tok=characters)},
            "does not know this tokenizer's split",
        ),
        ({"model": save(make_model, tmp_path / "s", "pretrain", tok=split)}, "does not know this tokenizer's split"),
        ({"model": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"dtype": "q4_0"}, "--dtype=q4_0"),
        ({"gguf": tmp_path / "there.gguf"}, "there.gguf: exists; --overwrite"),
        ({"gguf": device, "overwrite": True}, f"--gguf={device}: exists; no file"),
        ({"gguf": good / "model.safetensors", "overwrite": True}, "model.safetensors: exists; no file that ends in"),
        ({"gguf": good / "config.json/where.gguf"}, "where.gguf: "),
    ]:
        line = refused(start(fork, export, **({"model": good, "gguf": tmp_path / "new.gguf"} | flags)))
        assert message in line, (flags, line)
    with pytest.raises(UserError, match="no merge makes the token b'qqqq'"):
        export.split_name(unmade)
    assert (tmp_path / "there.gguf").read_text() == "mine" and not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "new.gguf").exists() and SMALL["vocab_size"] == 260
