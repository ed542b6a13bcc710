"""A checkpoint as Hugging Face tools read it: their names for our parameters, config.json, and
weight files, which may be untrusted.

Reads Llama, Qwen2 and Qwen3; writes whichever of them the model is.
"""

import contextlib
import dataclasses
import functools
import re
import reprlib

import safetensors
import torch

from data.read import inside, read_json
from model import GPT, GPTConfig, parameter_table, rotary_tables
from runtime.cli import print0
from runtime.errors import UserError

WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What an untrusted file may claim. Beyond these, a few bytes would cost gigabytes or minutes.
LARGEST_HEADER = 2**23  # bytes of a safetensors header: some hundred thousand tensors
LARGEST_TABLE = 2**25  # numbers of the rotary tables: 262,144 positions with heads of 128, Qwen3's largest

# How the tensors end that GPTQ, AWQ, bitsandbytes, fp8 and compressed-tensors write beside or
# instead of a weight
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight_format|absmax|quant_map|nested_\w+|quant_state\.\S+|"
    r"(weight|input|output|k|v)_(scale(_\w+)?|zero_point|packed|shape|g_idx))$"
)
ADAPTER = re.compile(  # PEFT's names
    r"lora_|lokr_|hada_|ia3_|oft_|vera_|boft_|\.base_layer\.|modules_to_save|prompt_(encoder|embeddings)"
)
ADAPTER_CONFIG = "adapter_config.json"
# Keys of other architectures; the families read here compute nothing by them
FOREIGN = re.compile(
    r"softcap|_multiplier$|logits?_scal|clip_qkv|scale_(emb|depth)|pre_attn_scalar|rotary_(dim|pct)|rope_interleaved|"
    r"num_(local_)?experts$|n_routed_experts|no_rope_layer|alibi"
)
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # old Llamas keep a table that config.json gives as well
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def to_hf(model):
    """The weights as {Hugging Face name: tensor on the CPU}."""
    table, weights = parameter_table(model.config), {}
    for name, p in model.named_parameters():
        parts = p.detach().cpu().split(table[name].rows)
        for hf_name, part in zip(table[name].hf_names, parts, strict=True):
            weights[hf_name] = part.contiguous()
    return weights


def check_parameters(model):
    """Raises UserError, before the first step, if this model could not be saved and read again.

    Every parameter must be in parameter_table, with its shape, and the config must survive
    config.json."""
    table = parameter_table(model.config)
    for name, p in model.named_parameters():
        if name not in table:
            raise UserError(f"parameter {name} has no Hugging Face name: add a row to model.parameter_table")
        if sum(table[name].rows) != p.shape[0] or len(table[name].rows) != len(table[name].hf_names):
            raise UserError(
                f"parameter {name} has {p.shape[0]} rows; model.parameter_table says {table[name].rows} for "
                f"{len(table[name].hf_names)} Hugging Face names"
            )
    missing = table.keys() - dict(model.named_parameters()).keys()
    if missing:
        raise UserError(f"model.parameter_table has a row for {sorted(missing)[0]}, which this model does not have")
    again = parse_config(config_to_hf(model.config), "config.json")
    again.padding = model.config.padding  # this one the tokenizer tells
    for field in dataclasses.fields(GPTConfig):
        written, read = vars(model.config)[field.name], vars(again)[field.name]
        if written != read:
            raise UserError(
                f"GPTConfig.{field.name}={written} would be read back as {read}: add it to hub.config_to_hf and "
                "hub.parse_config"
            )


def config_to_hf(c, bos=None, eos=None, pad=None):
    """The content of config.json for `transformers`, vLLM and llama.cpp. bos, eos, pad: token
    ids."""
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
        factor, low, high, original = c.rope_scaling
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        rope["original_max_position_embeddings"] = original
    config = {
        "model_type": family,
        "architectures": [family.capitalize() + ("ForSequenceClassification" if c.scalar_head else "ForCausalLM")],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": c.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_sliding_window": c.window > 0,
        "rope_theta": c.rope_theta,  # transformers 4 reads this one, 5 the next
        "rope_parameters": rope,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if c.window:
        config["sliding_window"] = c.window
        config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in c.windows]
    if c.rope_scaling:
        config["rope_scaling"] = rope
    if c.scalar_head:
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    return config


def config_from_hf(path):
    """The GPTConfig of a config.json (Llama, Qwen2, Qwen3). Raises UserError naming what this model
    cannot do."""
    return parse_config(read_json(path), path)


def parse_config(h, path):
    """The GPTConfig of the JSON object `h`, read from `path`."""
    family = h.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        raise UserError(
            f"{path}: model_type {reprlib.repr(family)} is not one this GPT can be; it reads llama, qwen2 and qwen3"
        )
    rope = rope_settings(h, path)
    rope_type = rope.get("rope_type", "default")
    refuse_unsupported(h, path, family)
    size = functools.partial(number, h, kind=int, path=path)
    heads, width = size("num_attention_heads"), size("hidden_size")
    # What an absent key means is what transformers takes it to mean.
    qwen = family != "llama"
    c = GPTConfig(
        vocab_size=size("vocab_size"),
        layers=size("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=128 if family == "qwen3" else width // heads),
        ffn=size("intermediate_size"),
        context=size("max_position_embeddings", default=32768 if qwen else 2048),
        norm_eps=number(h, "rms_norm_eps", float, path, default=1e-6),
        tied=bool(h.get("tie_word_embeddings", False)),
        rope_theta=number(rope, "rope_theta", float, path, default=10000.0),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        scalar_head=f"{family.capitalize()}ForSequenceClassification" in listed(h, "architectures"),
    )
    if rope_type == "llama3":
        c.rope_scaling = llama3_scaling(rope, path)
    if h.get("use_sliding_window"):
        c.window, c.window_every = window_pattern(h, c.layers, path)
    if c.heads % c.kv_heads or c.head_dim % 2:
        raise UserError(
            f"{path}: {c.heads} heads of {c.head_dim} with {c.kv_heads} key-value heads: heads must divide evenly, "
            "head_dim must be even"
        )
    if c.context * c.head_dim > LARGEST_TABLE:
        raise UserError(
            f"{path}: max_position_embeddings is {c.context}, heads have {c.head_dim}: the rotary tables would hold "
            f"more than {LARGEST_TABLE} numbers; lower the first"
        )
    return c


def number(section, key, kind, path, default=None):
    """A positive number of a config; a null asks for the default."""
    value = default if section.get(key) is None else section[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**63:
        raise UserError(f"{path}: {key} is {reprlib.repr(value)}; a positive {kind.__name__} was expected")
    return kind(value)


def listed(h, key):
    return h[key] if isinstance(h.get(key), list) else []


def rope_settings(h, path):
    """{"rope_type", "rope_theta", ...} of a config.json, which may say them in three places:
    rope_parameters (transformers 5), rope_scaling and rope_theta (4).

    Raises UserError if two places contradict each other, since tools differ in which they read, or
    if there is a setting that this GPT does not have."""
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        section = {} if h.get(key) is None else h[key]
        if not isinstance(section, dict):
            raise UserError(f"{path}: {key} is not a JSON object")
        for name, value in section.items():
            if value is not None:
                merge_setting(found, "rope_type" if name == "type" else name, value, f"{key}.{name}", path)
    if h.get("rope_theta") is not None:
        merge_setting(found, "rope_theta", h["rope_theta"], "rope_theta", path)
    rope_type = found.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{path}: rope_type={reprlib.repr(rope_type)} is not supported by this GPT")
    read = {"rope_type", "rope_theta", *(LLAMA3_ROPE if rope_type == "llama3" else ())}
    for name, value in found.items():
        if name not in read and value != 1:  # a factor of 1 changes nothing
            raise UserError(
                f"{path}: the rotary setting {name}={reprlib.repr(value)} means nothing with rope_type={rope_type!r}, "
                "the only one this GPT has besides llama3's; take it out, or take another model"
            )
    return found


def merge_setting(found, name, value, where, path):
    """Set found[name]; raises UserError if another place in the file gave it another value."""
    if found.setdefault(name, value) != value:
        raise UserError(
            f"{path}: {where} is {reprlib.repr(value)}, but elsewhere in the file it is {reprlib.repr(found[name])}; "
            "tools differ in which they read: keep the one that this model was trained with"
        )


def refuse_unsupported(h, path, family):
    """Raises UserError naming the first setting that this GPT does not have, or that another
    contradicts."""
    name = family.capitalize()
    known = ([], [f"{name}ForCausalLM"], [f"{name}ForSequenceClassification"])
    types, windows = listed(h, "layer_types"), bool(h.get("use_sliding_window"))
    refused = {  # whether a key says what this GPT cannot do
        "quantization_config": bool(h.get("quantization_config")),
        "compression_config": bool(h.get("compression_config")),
        "hidden_act": h.get("hidden_act", "silu") not in ("silu", "swish"),
        "is_causal": not h.get("is_causal", True),
        "mlp_bias": bool(h.get("mlp_bias")),
        "use_sliding_window": windows and family == "llama",
        "sliding_window": h.get("sliding_window") is not None and family == "llama",
        "attention_bias": bool(h.get("attention_bias")) and family != "qwen2",
        "layer_types": not windows and h.get("layer_types") not in (None, ["full_attention"] * len(types)),
        "tie_word_embeddings": h.get("tie_word_embeddings") not in (None, True, False),
        "partial_rotary_factor": h.get("partial_rotary_factor") not in (None, 1),
        "architectures": (h.get("architectures") or []) not in known,
    }
    for key in filter(FOREIGN.search, h):  # a factor of 1 changes nothing, but True is a switch
        refused[key] = h[key] is True or h[key] not in (None, False, 1, [])
    for key, is_refused in refused.items():
        if is_refused:
            quantised = "; quantised weights are not read: take the model without it" if "_config" in key else ""
            raise UserError(f"{path}: {key}={reprlib.repr(h[key])} is not supported by this GPT{quantised}")
    if len(types) not in (0, h.get("num_hidden_layers")):
        raise UserError(f"{path}: layer_types has {len(types)} entries, num_hidden_layers says otherwise")


def llama3_scaling(rope, path):
    """GPTConfig.rope_scaling of Llama 3's rope parameters."""
    factor, low, high, original = (number(rope, name, float, path) for name in LLAMA3_ROPE)
    if low >= high:
        raise UserError(f"{path}: low_freq_factor is {low}, not less than the high_freq_factor of {high}")
    return factor, low, high, original


def window_pattern(h, layers, path):
    """(window, window_every) of layer_types; raises UserError if they are not every n-th layer,
    from the first."""
    types = listed(h, "layer_types")
    sliding = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    every = sliding[1] if len(sliding) > 1 else layers
    pattern = ["full_attention" if i % every else "sliding_attention" for i in range(len(types))]
    if len(types) != layers or types != pattern:
        raise UserError(
            f"{path}: layer_types is {reprlib.repr(types)}; this GPT has sliding windows in every n-th layer, from "
            "the first"
        )
    return number(h, "sliding_window", int, path), every


# --------------------------------------------------------------------------------------------------
# Weight files


def weight_files(folder):
    """{tensor name: file that holds it} of model.safetensors, or else of the shards that
    model.safetensors.index.json names. transformers looks in this order too.

    Raises UserError if a tensor is in two shards, or not where the index says."""
    index = folder / (WEIGHTS + ".index.json")
    if (folder / WEIGHTS).exists() or not index.exists():
        names, files = {}, [folder / WEIGHTS]
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles and not files[0].exists():
            raise UserError(
                f"{folder / pickles[0]}: a pickle, which is not read, for it could run any code; write safetensors "
                "of it with save_pretrained of transformers"
            )
    else:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index}: no weight_map, which says what file holds a tensor; download it again")
        files = sorted({inside(index, name) for name in names.values()})
    where = {}
    for file in files:
        with open_tensors(file) as f:
            for name in f.keys():
                if name in where:
                    raise UserError(f"{file}: tensor {name} is in {where[name].name} as well; download both again")
                where[name] = file
    for name, file in names.items():
        if where.get(name) != inside(index, file):
            raise UserError(f"{index}: tensor {reprlib.repr(name)} is not in {file}; download both again")
    return where


def check_tensors(folder, where, c):
    """Account for every tensor of a checkpoint before any is read.

    Raises UserError if one is missing, or if one is left over with which the model would compute
    something else: quantised, of an adapter, of a further layer, a bias. Names the others, which
    belong to heads and towers besides this GPT."""
    for path in (folder / ADAPTER_CONFIG, *folder.glob("adapter_model*")):
        if path.exists():
            raise UserError(
                f"{path}: an adapter is next to the weights, and is not read; merge it (merge_and_unload of PEFT) and "
                "save the model again"
            )
    for name, file in where.items():
        if QUANTISED.search(name):
            raise UserError(f"{file}: tensor {name}: quantised weights are not read; take the model without it")
        if ADAPTER.search(name):
            raise UserError(
                f"{file}: tensor {name} is of an adapter (LoRA or another) that nobody merged; without it the model "
                "would be another one: merge it (merge_and_unload of PEFT) and save the model again"
            )
    expected = [stored_name(name, where, c) for row in parameter_table(c).values() for name in row.hf_names]
    for name in expected:
        if name not in where:
            raise UserError(f"{folder}: tensor {name} is missing{elsewhere(name, where)}")
    used = {*expected, HEAD} if c.tied and not c.scalar_head else set(expected)
    left_over = [name for name in where if name not in used and not DERIVED.search(name)]
    for name in left_over:
        for other in used.intersection(where):
            if name.endswith(f".{other}"):
                raise UserError(
                    f"{where[name]}: tensor {name} is {other} once more; only one of them is this model's: take the "
                    "other out"
                )
        if name.startswith("model.") or name.endswith(".bias"):
            raise UserError(
                f"{where[name]}: tensor {name} is not used by a model with this config.json ({c.layers} layers); "
                "without it the model would be another one: correct config.json, or take the tensor out"
            )
    if left_over:
        more = ", ..." if len(left_over) > 5 else ""
        print0(f"{folder}: {len(left_over)} tensors are not used: {', '.join(left_over[:5])}{more}")


def elsewhere(name, where):
    """What may help if a tensor is missing: a prefix under which it is there, or tying the head."""
    for other in where:
        if other.endswith(f".{name}"):
            return f", but {other} is there; take {other.removesuffix(name)} off the names"
        if f".{other}".endswith(f".{name.removeprefix('model.')}"):  # as AutoModel writes them, or under a tower
            return f", but {other} is there; rename it and all others in this way"
    tied = "; if embedding and head are one matrix, config.json must say tie_word_embeddings: true"
    return tied if name == HEAD else ""


def stored_name(name, where, c):
    """The name under which a tensor is stored: of the two of a tied model, safetensors' save_model
    keeps the head's."""
    return HEAD if name == EMBEDDING and name not in where and c.tied else name


def check_tied(where):
    """Raises UserError if a head of its own differs from the embedding that config.json ties it
    to."""
    names = (EMBEDDING, HEAD)
    if where.keys() >= set(names):
        embedding, head = (read_tensor(where[name], name) for name in names)
        if embedding.shape != head.shape or not torch.equal(embedding.float(), head.float()):
            raise UserError(
                f"{where[names[1]]}: tensor lm_head.weight is not the embedding, yet config.json says "
                "tie_word_embeddings: true; if the head was trained by itself, it must say false, else take it out"
            )


@contextlib.contextmanager
def open_tensors(path):
    """safetensors.safe_open whose errors, also those of reading a tensor, are UserErrors naming the
    file."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with open(path, "rb") as f:
            if int.from_bytes(f.read(8), "little") > LARGEST_HEADER:
                raise OSError(f"its header claims more than {LARGEST_HEADER} bytes")
        with safetensors.safe_open(path, framework="pt") as f:
            yield f
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as safetensors ({e}); copy or download it again") from None


@torch.no_grad()
def model_from_hf(c, folder):
    """The GPT of a Hugging Face directory, in fp32. Raises UserError naming a tensor that is
    missing, not finite, or not what config.json says.

    A config.json can claim any size: memory is taken for a tensor only once the file is seen to
    hold it."""
    where = weight_files(folder)
    held = sum(file.stat().st_size for file in set(where.values()))
    claimed = (c.vocab_size + c.layers * (sum(c.qkv_rows) + 3 * c.ffn)) * c.width
    if claimed > held or c.layers > len(where):
        raise UserError(
            f"{folder}: config.json says {c.layers} layers and at least {claimed} weights; {len(where)} tensors in "
            f"{held} bytes cannot hold them"
        )
    check_tensors(folder, where, c)
    if c.tied and not c.scalar_head:
        check_tied(where)
    with torch.device("meta"):
        model = GPT(c)
    weights = {}
    for name, row in parameter_table(c).items():
        targets = model.get_parameter(name).split(row.rows)
        parts = []
        for hf_name, target in zip(row.hf_names, targets, strict=True):
            hf_name = stored_name(hf_name, where, c)
            parts.append(read_tensor(where[hf_name], hf_name, list(target.shape)))
        weights[name] = torch.cat(parts).float()  # a copy: what safetensors gives may lie in the file
    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = rotary_tables(c)
    return model


def read_tensor(file, name, shape=None):
    """A tensor of a safetensors file; raises UserError if its type or its shape (by default any) is
    wrong or it is not finite."""
    with open_tensors(file) as f:
        found, dtype = f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"{file}: tensor {name} is of {dtype}, where F32, F16 or BF16 was expected; quantised weights are "
                "not read"
            )
        if shape is not None and found != shape:
            raise UserError(f"{file}: tensor {name} is {found}, config.json says {shape}")
        tensor = f.get_tensor(name)
    if not tensor.isfinite().all():
        raise UserError(
            f"{file}: tensor {name} holds numbers that are not finite; these weights are damaged, take another "
            "checkpoint"
        )
    return tensor
