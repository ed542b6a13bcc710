"""Write a checkpoint as GGUF, the file of llama.cpp, Ollama and LM Studio.

    python export.py --model=out/grpo --gguf=model.gguf
    llama-cli -m model.gguf
    ollama create mine -f Modelfile        with the line: FROM ./model.gguf

The file has the weights, the tokenizer with its merges and special tokens, the chat template, and
the end of a turn as the token to stop at. Of the text's split into pieces, GGUF has only a name:
llama.cpp knows some patterns by heart (src/llama-vocab.cpp). A tokenizer with another pattern is
refused, for llama.cpp would give other ids. bench/llamacpp.py compares ids and texts with llama.cpp
itself.

Left out: quantisation below 16 bits, which llama.cpp's own llama-quantize does; sliding windows and
reward models, which llama.cpp does not have for these families.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from data import chat
from data.tokenizer import DIGITS_PATTERN, GPT2_PATTERN, PATTERN, merge_of_each, printable
from model import rotary_tables
from runtime import checkpoint
from runtime.cli import check_ranges, launch
from runtime.errors import UserError
from runtime.files import replace_file
from runtime.hub import config_to_hf, to_hf


@dataclass
class Config:
    # -- What you will set --
    # a run, a checkpoint, or a downloaded Llama/Qwen2/Qwen3 directory
    model: str
    # the file to write
    gguf: str

    # -- What you may set --
    # type of the matrices; norms and biases are always f32 [one of f16, bf16, f32]
    dtype: str = "f16"
    # replace the file if it exists
    overwrite: bool = False


ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Patterns and the names of theirs that make the same pieces (llama.cpp, src/llama-vocab.cpp and
# src/unicode.cpp)
LLAMA_CPP_NAMES = {
    PATTERN: "qwen35",
    GPT2_PATTERN: "gpt-2",
    DIGITS_PATTERN: "smollm",
    ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    ENDINGS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
}
WHOLE_PIECES = "llama-bpe"  # the one where a piece that is a token needs no merging, as with tiktoken


# --------------------------------------------------------------------------------------------------
# The tokenizer


def split_name(tok):
    """llama.cpp's name of the tokenizer's split, tokenizer.ggml.pre. Raises UserError if it has
    none, or would not reach a token that tiktoken finds."""
    name = LLAMA_CPP_NAMES.get(tok._pat_str)
    if name is None:
        raise UserError(
            f"--model: llama.cpp does not know this tokenizer's split {tok._pat_str[:80]!r}, and would give other ids; "
            "only a model whose tokenizer has one of its splits can be exported, as those of data/tokenizer.py have "
            "(kind bpe or byte)"
        )
    merged = merge_of_each(tok._mergeable_ranks)
    unmade = [token for token in tok._mergeable_ranks if len(token) > 1 and token not in merged]
    if unmade and name != WHOLE_PIECES:
        raise UserError(f"--model: no merge makes the token {unmade[0]}, which llama.cpp therefore would never find")
    if len(tok._mergeable_ranks) < 256 or tok.missing_bytes:
        raise UserError("--model: the vocabulary lacks some bytes, and llama.cpp would leave them out of a text")
    if tok.nfc:
        print("note: this tokenizer normalises a text to NFC; llama.cpp does not, so send it NFC")
    return name


def vocabulary(tok, size):
    """([text], [gguf.TokenType]) of each id of the model's vocabulary.

    Text never yields a special token (CONTROL); one with special=false is text (USER_DEFINED)."""
    from gguf import TokenType

    texts, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in tok._mergeable_ranks.items():
        texts[i], types[i] = printable(token), TokenType.NORMAL
    for text, i in tok._special_tokens.items():
        texts[i], types[i] = text, TokenType.CONTROL if i in tok.special_ids else TokenType.USER_DEFINED
    if len(set(texts)) < size:
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UserError(f"--model: two tokens are written {twice!r}, and llama.cpp could not tell them apart")
    return texts, types


def stop_ids(tok, info):
    """The ids that end what the model writes, the end of a chat model's turn first."""
    ends = [*tok.eos_ids, tok.eot]
    if chat.is_chat_model(tok, info):
        ends.insert(0, chat.end_of_turn(tok))
    return list(dict.fromkeys(ends))


def adds_bos(tok, info):
    """Whether llama.cpp should put bos before a text: as the model's tokenizer does, and before
    that of a base model of ours, where documents began with it; but not if the template writes it.
    """
    if tok.template:
        return tok.bos != tok.eot and tok.decode([tok.bos]) not in chat.example(tok)
    return tok.bos != tok.eot or bool(info)


def add_tokenizer(writer, tok, info, size):
    """Write all that makes ids of a text, and what a turn looks like."""
    stops = stop_ids(tok, info)
    texts, types = vocabulary(tok, size)
    merges = merge_of_each(tok._mergeable_ranks).values()
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(split_name(tok))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    # llama.cpp asks for at least one merge; this one never comes up, for a text has no such parts.
    writer.add_token_merges([f"{printable(a)} {printable(b)}" for a, b in merges] or [f"{texts[tok.eot]} {texts[0]}"])
    writer.add_bos_token_id(tok.bos)
    writer.add_eos_token_id(stops[0])
    if len(stops) > 1:
        writer.add_eot_token_id(stops[1])
    if len(stops) > 2:
        print(f"note: GGUF has two stops, {texts[stops[0]]} and {texts[stops[1]]}; this model has {len(stops)}")
    writer.add_pad_token_id(tok.pad)
    writer.add_add_bos_token(adds_bos(tok, info))
    if tok.template:
        writer.add_chat_template(tok.template.source)


# --------------------------------------------------------------------------------------------------
# The weights


def check_exportable(c):
    """Raises UserError naming what this family of llama.cpp cannot do."""
    family = config_to_hf(c)["model_type"]
    refused = {
        "a reward model, which gives one number per token": c.scalar_head,
        f"sliding windows, which llama.cpp does not have for {family}": bool(c.window),
        f"Llama 3's rotary scaling, which llama.cpp does not have for {family}": bool(c.rope_scaling)
        and family != "llama",
        "heads that are not as wide as the model together, which llama.cpp wants of qwen2": (
            family == "qwen2" and c.heads * c.head_dim != c.width
        ),
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"--model: has {what}; it cannot be exported")
    return family


def interleaved(weight, heads):
    """Rows of queries or keys in the order that llama.cpp rotates for the family llama: the two
    halves of a head are interleaved (its convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = weight.view(heads, 2, len(weight) // heads // 2, -1)  # [H, 2, Dh/2, C]
    return halves.transpose(1, 2).reshape(weight.shape)


def rope_factors(c):
    """fp32 [Dh/2]: what Llama 3's scaling divides each rotary frequency by."""
    plain = dataclasses.replace(c, rope_scaling=(), context=2)
    angles = []  # of position 1: the frequencies, none of which is above 1
    for config in (plain, dataclasses.replace(c, context=2)):
        cos, sin = rotary_tables(config)
        angles.append(torch.atan2(sin[1], cos[1]))
    return angles[0] / angles[1]


def add_tensors(writer, model, family, dtype):
    """Write all weights under llama.cpp's names: matrices in `dtype`, the rest in f32."""
    import gguf

    c = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, c.layers)
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    if c.rope_scaling:
        writer.add_tensor("rope_freqs.weight", rope_factors(c).numpy())
    for hf_name, weight in to_hf(model).items():
        if family == "llama" and ".q_proj." in hf_name:
            weight = interleaved(weight, c.heads)
        elif family == "llama" and ".k_proj." in hf_name:
            weight = interleaved(weight, c.kv_heads)
        name, array = names.get_name(hf_name, try_suffixes=(".weight", ".bias")), weight.float().numpy()
        if not name:
            raise UserError(
                f"the tensor {hf_name} has no name in llama.cpp's {family}, which therefore cannot run this model"
            )
        if weight.dim() == 1 or dtype == "f32":
            writer.add_tensor(name, array)
            continue
        if dtype == "f16" and abs(array).max() > 65504:
            raise UserError(f"--dtype=f16: the tensor {hf_name} has numbers that f16 cannot hold; use --dtype=bf16")
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


def add_shape(writer, c):
    """Write what config.json says of the model's shape."""
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)


def main(config):
    check_ranges(config)
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf: the package gguf is needed: pip install gguf") from None
    target = Path(config.gguf)
    is_gguf = target.is_file() and target.suffix == ".gguf"  # and not weights, or another file of the model
    if target.exists() and not (config.overwrite and is_gguf):
        advice = "--overwrite replaces it" if is_gguf else "no file that ends in .gguf; name another"
        raise UserError(f"--gguf={target}: exists; {advice}")
    folder = checkpoint.find(config.model)
    model, tok, info = checkpoint.read(folder)
    family = check_exportable(model.config)
    with replace_file(target) as file:
        writer = gguf.GGUFWriter(file.name, family)
        writer.add_name(info.get("stage") or folder.resolve().name)
        writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(config.dtype, f"MOSTLY_{config.dtype.upper()}")])
        add_shape(writer, model.config)
        add_tokenizer(writer, tok, info, model.config.vocab_size)
        add_tensors(writer, model, family, config.dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    print(f"{target}: {family}, {config.dtype}, {target.stat().st_size:,} bytes; for Ollama, a Modelfile's line is")
    print(f"FROM {target.resolve()}")


if __name__ == "__main__":
    launch(main, Config)
