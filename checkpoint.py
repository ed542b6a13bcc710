"""Checkpoints: Hugging Face directories, written so that nothing is ever lost, plus what exact resume needs.

    out/NAME/log.jsonl, samples.txt, latest -> step_000200, best -> step_000150
    out/NAME/step_000200/config.json, model.safetensors, tokenizer.json, tokenizer_config.json    what any Hugging Face tool reads
                         feinschliff.json                        stage, step, run config, versions, hashes of data and code, metrics, lineage
                         train_state.safetensors, .json          optimizer, random states, data cursor
                         manifest.json                           SHA-256 of every other file; loading verifies it

A checkpoint is written beside its final name, flushed to the disk, then renamed: whenever a run is killed, a directory called step_* is whole.
No pickle anywhere.
"""
import contextlib, dataclasses, hashlib, json, math, os, re, reprlib, shutil, sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from common import Log, Stop, UserError, clear_run, describe, open_run, random_state, rank, reduce_sum, set_random_state, setup, world_size
from data import chat, tokenizer
from data.read import inside, read_json
from model import GPT, GPTConfig, rotary_tables
from shard import unsharded, whole

WEIGHTS, INFO, MANIFEST = "model.safetensors", "feinschliff.json", "manifest.json"
STATE, COUNTERS = "train_state.safetensors", "train_state.json"
# What a stranger's file may claim. Beyond them a few bytes would cost gigabytes or minutes before anything is found out.
LARGEST_HEADER = 2**23  # bytes of a safetensors file's header: some hundred thousand tensors
LARGEST_TABLE = 2**25  # numbers of the rotary tables: 262,144 positions for heads of 128, Qwen3's largest


# ---------------------------------------------------------------------------------------------------------------------------------
# Our parameters under Hugging Face's names


def hf_names(c):
    """{our parameter: Hugging Face's names}; several names where ours is a fused matrix, its rows in that order."""
    names = {"embed": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]}
    if c.scalar_head:
        names["score"] = ["score.weight"]
    elif not c.tied:
        names["untied_head"] = ["lm_head.weight"]
    for i in range(c.layers):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        names[ours + "attn_norm"] = [theirs + "input_layernorm.weight"]
        names[ours + "qkv"] = [theirs + f"self_attn.{x}_proj.weight" for x in "qkv"]
        if c.qkv_bias:
            names[ours + "qkv_bias"] = [theirs + f"self_attn.{x}_proj.bias" for x in "qkv"]
        if c.qk_norm:
            names[ours + "q_norm"], names[ours + "k_norm"] = [theirs + "self_attn.q_norm.weight"], [theirs + "self_attn.k_norm.weight"]
        names[ours + "out"] = [theirs + "self_attn.o_proj.weight"]
        names[ours + "mlp_norm"] = [theirs + "post_attention_layernorm.weight"]
        names[ours + "gate_up"] = [theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"]
        names[ours + "down"] = [theirs + "mlp.down_proj.weight"]
    return names


def split_fused(c, names, tensor):
    """The rows of our tensor, one part for each Hugging Face name."""
    return tensor.split({1: [len(tensor)], 2: [c.ffn, c.ffn], 3: c.qkv_rows}[len(names)])


def to_hf(model):
    """The weights as {Hugging Face name: tensor on the CPU}."""
    named = hf_names(model.config)
    parts = [(named[n], split_fused(model.config, named[n], p.detach().cpu())) for n, p in model.named_parameters()]
    return {name: part.contiguous() for names, tensors in parts for name, part in zip(names, tensors)}


def config_to_hf(c, tok):
    """config.json for `transformers`, vLLM and llama.cpp."""
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = {"rope_type": "llama3", "rope_theta": c.rope_theta, **dict(zip(names, c.rope_scaling))}
    config = {
        "model_type": family,
        "architectures": [family.capitalize() + ("ForSequenceClassification" if c.scalar_head else "ForCausalLM")],
        "vocab_size": c.vocab_size, "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied, "hidden_act": "silu",
        "attention_bias": c.qkv_bias, "attention_dropout": 0.0, "mlp_bias": False, "use_sliding_window": False,
        "rope_theta": c.rope_theta, "rope_parameters": rope,  # transformers 4 reads the first, 5 the second
        "bos_token_id": tok.eot, "eos_token_id": tok.eot, "pad_token_id": tok.pad, "dtype": "float32", "torch_dtype": "float32",
    }  # fmt: skip
    if c.rope_scaling:
        config["rope_scaling"] = rope
    if c.scalar_head:
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    return config


def config_from_hf(path):
    """GPTConfig of a config.json (Llama, Qwen2, Qwen3). UserError names what this model cannot do."""
    h = read_json(path)

    def number(key, kind, default=None, section=h):
        value = default if section.get(key) is None else section[key]  # a null asks for the default
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**63:
            raise UserError(f"{path}: {key} is {reprlib.repr(value)}; a positive {kind.__name__} was expected")
        return kind(value)

    def listed(key):
        return h[key] if isinstance(h.get(key), list) else []

    family = h.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path}: model_type {reprlib.repr(family)} is not one this GPT can be; it reads llama, qwen2 and qwen3")
    rope = h.get("rope_parameters") or h.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters or rope_scaling is no JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {"hidden_act": h.get("hidden_act", "silu") != "silu", "mlp_bias": h.get("mlp_bias", False), "use_sliding_window": h.get("use_sliding_window", False),
               "attention_bias": h.get("attention_bias", False) and family != "qwen2", "rope_type": kind not in ("default", "llama3"), "layer_types": "sliding_attention" in listed("layer_types"), "tie_word_embeddings": h.get("tie_word_embeddings") not in (None, True, False)}  # fmt: skip
    for key, found in refused.items():
        if found:
            raise UserError(f"{path}: {key}={reprlib.repr(kind if key == 'rope_type' else h[key])} is not supported by this GPT")
    heads, width = number("num_attention_heads", int), number("hidden_size", int)
    c = GPTConfig(
        vocab_size=number("vocab_size", int), layers=number("num_hidden_layers", int), width=width, heads=heads,
        kv_heads=number("num_key_value_heads", int, heads), head_dim=number("head_dim", int, width // heads), ffn=number("intermediate_size", int),
        context=number("max_position_embeddings", int, 2048), norm_eps=number("rms_norm_eps", float, 1e-6), tied=bool(h.get("tie_word_embeddings", False)),
        rope_theta=number("rope_theta", float, number("rope_theta", float, 10000.0), rope),
        qk_norm=family == "qwen3", qkv_bias=family == "qwen2", scalar_head=any(isinstance(a, str) and "ForSequenceClassification" in a for a in listed("architectures")),
    )  # fmt: skip
    if kind == "llama3":
        c.rope_scaling = tuple(number(k, float, None, rope) for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        if c.rope_scaling[1] >= c.rope_scaling[2]:
            raise UserError(f"{path}: low_freq_factor is {c.rope_scaling[1]}, not less than the high_freq_factor of {c.rope_scaling[2]}")
    if c.heads % c.kv_heads or c.head_dim % 2:
        raise UserError(f"{path}: {c.heads} heads of {c.head_dim} with {c.kv_heads} key-value heads: heads must divide evenly, head_dim must be even")
    if c.context * c.head_dim > LARGEST_TABLE:
        raise UserError(f"{path}: max_position_embeddings is {c.context}, heads have {c.head_dim}: rotary tables would hold more than {LARGEST_TABLE} numbers; lower the first")
    return c


def weight_files(folder):
    """{tensor name: file that holds it} of a directory with model.safetensors or its sharded form."""
    index = folder / (WEIGHTS + ".index.json")
    names = read_json(index).get("weight_map") if index.exists() else {"": WEIGHTS}
    if not isinstance(names, dict):
        raise UserError(f"{index}: no weight_map, which would say what file holds a tensor; download it again")
    where = {}
    for file in sorted({inside(index, name) for name in names.values()}):
        with open_tensors(file) as f:
            where.update({name: file for name in f.keys()})
    return where


@contextlib.contextmanager
def open_tensors(path):
    """safetensors.safe_open, its errors, and those of reading a tensor, naming the file."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a plain file")
        with open(path, "rb") as f:
            if int.from_bytes(f.read(8), "little") > LARGEST_HEADER:
                raise OSError(f"its header is said to have more than {LARGEST_HEADER} bytes")
        with safetensors.safe_open(path, framework="pt") as f:
            yield f
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as safetensors ({e}); copy or download it again") from None


@torch.no_grad()
def model_from_hf(c, folder):
    """The GPT of a Hugging Face directory, floats of any kind there. UserError names a tensor that is missing, not finite or not what the configuration says.

    A config.json can claim any size: memory is taken for a tensor only once the file is seen to hold it.
    """
    where = weight_files(folder)
    held, claimed = sum(file.stat().st_size for file in set(where.values())), (c.vocab_size + c.layers * (sum(c.qkv_rows) + 3 * c.ffn)) * c.width
    if claimed > held or c.layers > len(where):
        raise UserError(f"{folder}: config.json says {c.layers} layers and at least {claimed} weights; {len(where)} tensors in {held} bytes cannot hold them")
    with torch.device("meta"):
        model = GPT(c)
    parameters, found = dict(model.named_parameters()), {}
    for name, theirs in hf_names(c).items():
        parts = []
        for target, hf_name in zip(split_fused(c, theirs, parameters[name]), theirs):
            if hf_name not in where:
                raise UserError(f"{folder}: tensor {hf_name} is missing")
            with open_tensors(where[hf_name]) as f:
                shape, dtype = f.get_slice(hf_name).get_shape(), f.get_slice(hf_name).get_dtype()
                if shape != list(target.shape):
                    raise UserError(f"{where[hf_name]}: tensor {hf_name} is {shape}, config.json says {list(target.shape)}")
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(f"{where[hf_name]}: tensor {hf_name} is of {dtype}, where F32, F16 or BF16 was expected; quantised weights are not read")
                tensor = f.get_tensor(hf_name)
                if not tensor.isfinite().all():
                    raise UserError(f"{where[hf_name]}: tensor {hf_name} holds numbers that are not finite; these weights are damaged, take another checkpoint")
                parts.append(tensor)
        found[name] = torch.cat(parts).float()  # a copy: what safetensors gives may lie in the file
    model.load_state_dict(found, assign=True)
    model.cos, model.sin = rotary_tables(c)
    return model


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading


def sha256(path):
    """Hex SHA-256 of a file; UserError where it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def fingerprint(folder):
    """Hex SHA-256 over what a checkpoint computes: its configuration and its weights."""
    named = {file.name: sha256(file) for file in sorted({folder / "config.json", *weight_files(folder).values()})}
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def damage(folder):
    """What is wrong with a checkpoint of ours, in words; "" if every file is as it was written."""
    try:
        written = read_json(folder / MANIFEST)
        if WEIGHTS not in written:
            return f"{MANIFEST} does not name {WEIGHTS}"
        for name, digest in written.items():
            path = inside(folder / MANIFEST, name)
            if not path.is_file():
                return f"{name} is missing"
            if sha256(path) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
    except (UserError, OSError) as e:
        return str(e)
    return ""


def steps_in(run):
    """The checkpoints of a run directory, oldest first."""
    return sorted((p for p in Path(run).glob("step_*") if re.fullmatch("[0-9]+", p.name[5:])), key=lambda p: int(p.name[5:]))


def find(where):
    """The checkpoint directory meant by `where`: a Hugging Face directory, one of our checkpoints, or a run (its newest undamaged checkpoint).

    What we wrote is verified against its manifest. A damaged newest checkpoint of a run is passed over with a warning.
    """
    where = Path(where)
    if (where / "config.json").is_file():
        ours = (where / MANIFEST).exists() or (where / INFO).exists()
        wrong = damage(where) if ours else ""
        if wrong:
            raise UserError(f"{where}: {wrong}; take another checkpoint of the run ({where.resolve().parent})")
        return where
    for folder in reversed(steps_in(where)):
        wrong = damage(folder)
        if not wrong:
            return folder
        if rank() == 0:
            print(f"warning: {folder}: {wrong}; falling back to the checkpoint before", file=sys.stderr)
    raise UserError(f"{where}: no checkpoint here{', but a file' if where.is_file() else ''} (expected a directory with config.json and {WEIGHTS}, or a run's directory with an undamaged step_*)")


def load(where, device="cpu"):
    """(model, tokenizer, info) of a checkpoint, a run or a Hugging Face directory; info is its feinschliff.json, {} for a stranger's."""
    return read(find(where), device)


def read(folder, device="cpu"):
    """`load` of a directory that `find` has verified already."""
    model = model_from_hf(config_from_hf(folder / "config.json"), folder)
    tok = tokenizer.load(folder)
    if tok.n_vocab > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tok.n_vocab} ids, the model {model.config.vocab_size}")
    return model.to(device), tok, read_info(folder)


def read_info(folder):
    """The feinschliff.json of a checkpoint, {} for a stranger's. UserError where a field that others rely on is not what `save` writes."""
    path = folder / INFO
    if not path.exists():
        return {}
    info = {"config": {}, "data": {}, "lineage": []} | read_json(path)
    kinds = {"stage": str, "step": int, "config": dict, "data": dict, "lineage": list}
    centers = [info[name] for name in ("center", "critic_center") if name in info]
    if not (
        all(isinstance(info.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(p, dict) and isinstance(p.get("path"), str) and isinstance(p.get("weights"), str) for p in info["lineage"])
        and all(isinstance(center, (int, float)) and abs(center) < 1e30 for center in centers)
    ):
        raise UserError(f"{path}: damaged: one of {', '.join(kinds)}, center is not of its kind; take another checkpoint")
    return info


def companion(folder, model, tok, flag, scalar=False):
    """The model of another checkpoint, on the same device, that is to read what `model` reads: one that writes, or with `scalar` a reward model.

    UserError that names `flag` where it is the other, its tokenizer another, or its context shorter.
    """
    other, their_tok, _ = read(folder, model.embed.device)
    if other.config.scalar_head != scalar:
        raise UserError(f"{flag}: " + ("not a reward model (it has no scalar head)" if scalar else "a reward model, which gives no probabilities"))
    if tokenizer.fingerprint(their_tok) != tokenizer.fingerprint(tok):
        raise UserError(f"{flag}: it has another tokenizer than --init, so what the two say of the same tokens cannot be compared")
    if other.config.context < model.config.context:
        raise UserError(f"{flag}: its context of {other.config.context} tokens is shorter than the {model.config.context} of --init")
    return other


def load_state(folder):
    """(tensors, counters) that `save` was given as `state`. UserError names the file that is damaged."""
    counters = read_json(folder / COUNTERS)
    numbers = [n for value in counters.values() for n in (value if isinstance(value, list) else [value]) if n is not None]
    places = [counters.get("epoch"), counters.get("index"), *(value for name, value in counters.items() if name.endswith(("epoch", "index")))]
    if not all(type(n) in (int, float, bool) and n == n for n in numbers) or not all(type(n) is int and 0 <= n < 2**63 for n in places):
        raise UserError(f"{folder / COUNTERS}: damaged: counts of epochs and of items, and further numbers, were expected; take another checkpoint")
    with open_tensors(folder / STATE) as f:
        return {name: f.get_tensor(name) for name in f.keys()}, counters


def check_same_run(info, stage, config, data, free):
    """UserError unless a run resumed from a checkpoint (its `info`) is the run that was stopped.

    stage: the script's name for itself; config: the flags as a dict, those in `free` may differ; data: {name: SHA-256} of what it reads. With
    another learning rate or other text it would be another run.
    """
    if info["stage"] != stage:
        raise UserError(f"--out={config['out']}: the run there is one of {info['stage']}.py, not of {stage}.py; choose another --out")
    for name, value in config.items():
        if name not in free and info["config"].get(name, value) != value:
            raise UserError(f"--{name}={value}: this run was started with --{name}={info['config'][name]}; resume with that, or start another in a new --out")
    for name, digest in data.items():
        if info["data"].get(name) != digest:
            raise UserError(f"{name}: not the data this run was started with (its SHA-256 is another); bring that back, or start another run in a new --out")


# ---------------------------------------------------------------------------------------------------------------------------------
# Writing


def code_hash():
    """SHA-256 over the product's sources: two runs with the same hash ran the same code."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *here.glob("kernels/*.py"), *here.glob("data/*.py")])
    return hashlib.sha256(b"".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()


def parent_record(folder, info):
    """What a child keeps of the checkpoint it starts from, to be appended to that one's lineage."""
    kept = {k: info[k] for k in ("stage", "step", "config", "data", "code") if k in info}
    return {"path": str(folder), "weights": sha256(folder / WEIGHTS) if (folder / WEIGHTS).exists() else "sharded", **kept}


ADVICE = "A lower learning rate or --clip=1 may help: start another run, from scratch or with --init=STEP_DIRECTORY; --resume would only repeat this one"


def refuse_nonfinite(run, step, loss, batch):
    """Keep the batch {name: tensor} whose loss or gradient is not finite, and end the run. The weights are those of the step before."""
    path = Path(run) / f"nonfinite_step_{step:06d}.safetensors"
    where = f"the batch is in {path}"
    if rank() == 0:
        try:
            safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in batch.items()}, path)
        except (OSError, safetensors.SafetensorError) as e:
            where = f"the batch could not be saved ({e})"
    raise UserError(f"step {step}: the loss is {loss:.4g} and its gradient is not finite; {where}. {ADVICE}")


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def flush(path):
    """Have the disk, not just the operating system, hold this file or directory."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows cannot open a directory
    handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(run, model, tok, info, state=None, keep_last=2, best=False, beside=None):
    """Write run/step_<info["step"]>, then drop all but the `keep_last` newest and the best. Returns its path.

    info: at least {"stage", "step"}; state: (tensors, counters) to resume from. `best=True` makes this the run's best. beside: {name: model}, further
    models of the same tokenizer (PPO's critic), each in a directory of that name within.
    UserError where the disk refuses: nothing half-written stays behind, and no older checkpoint is touched.
    """
    run, step = Path(run), info["step"]
    final, temporary = run / f"step_{step:06d}", run / f".tmp_step_{step:06d}"
    try:
        if final.exists() and damage(final):
            shutil.rmtree(final)
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
        if not final.exists():
            temporary.mkdir(parents=True)
            talks = info["stage"] != "pretrain"  # from fine-tuning on a checkpoint knows turns, and ends them
            for folder, each in [(temporary, model), *((temporary / name, other) for name, other in (beside or {}).items())]:
                folder.mkdir(exist_ok=True)
                safetensors.torch.save_file(to_hf(each), folder / WEIGHTS, metadata={"format": "pt"})
                write_json(folder / "config.json", config_to_hf(each.config, tok) | ({"eos_token_id": chat.end_of_turn(tok)} if talks else {}))
                tokenizer.save(tok, folder, chat.TEMPLATE if talks else "")
            write_json(temporary / INFO, info)
            if state:
                safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in state[0].items()}, temporary / STATE)
                write_json(temporary / COUNTERS, state[1])
            write_json(temporary / MANIFEST, {p.relative_to(temporary).as_posix(): sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()})
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            os.replace(temporary, final)
            flush(run)
        point(run, "latest", final.name)
        if best:
            point(run, "best", final.name)
    except (OSError, safetensors.SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = [p.name for p in steps_in(run)]
        raise UserError(f"{final}: not saved ({e}); make room or give the directory back, then go on with --resume. Checkpoints kept: {', '.join(kept) or 'none'}") from None
    # What has a higher number is damaged, or this run would have gone on from there: it must not push out what is whole.
    past = [p.name for p in steps_in(run) if int(p.name[5:]) <= step]
    keep = {*past[-keep_last:]} | ({os.readlink(run / "best")} if (run / "best").is_symlink() else set())
    for old in steps_in(run):
        if old.name not in keep:
            os.replace(old, temporary)  # first the name, so that a step_* is never half there
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def point(run, name, target):
    """Make the symbolic link run/name -> target, atomically. Links are a convenience (`find` does not need them); Windows may forbid them."""
    if os.name == "posix":
        link = run / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        if (run / name).is_dir() and not (run / name).is_symlink():
            shutil.rmtree(run / name)  # the run was copied by a tool that follows links
        os.replace(link, run / name)


# ---------------------------------------------------------------------------------------------------------------------------------
# A run


class Run:
    """A training run on disk: where it starts from, its log, its checkpoints. The same for every stage, so that every stage resumes exactly.

    stage: the script's name for itself. config: its flags, of which out, init, resume, overwrite, seed, device, print_every, save_every and keep_last
    are read here. free: the flags that may differ when it is resumed.
    """

    def __init__(self, stage, config, free):
        self.stage, self.config, self.free = stage, config, free
        if stage != "pretrain" and not config.init:
            raise UserError("--init: name the checkpoint to start from")
        self.device = setup(config.device, config.seed)
        self.path = open_run(config.out, config.resume, config.overwrite)
        self.stop = Stop()
        self.resumed = find(self.path) if config.resume and steps_in(self.path) else None
        self.folder = self.resumed or (find(config.init) if config.init else None)  # what weights and tokenizer come from; None: from nothing
        self.info = read_info(self.folder) if self.folder else {}
        self.start, self.best = 0, float("inf")

    def origin(self):
        """The checkpoint this run began from. Not always what --init finds: that may be a run which has gone on since."""
        if not self.resumed:
            return self.folder
        parent = self.info["lineage"][-1]
        folder = find(parent["path"])
        if parent["weights"] not in ("sharded", sha256(folder / WEIGHTS)):
            raise UserError(f"{folder}: not the weights this run began from (their SHA-256 is another); bring those back, or start another run in a new --out")
        return folder

    def context(self, model):
        """The longest document in tokens: --context, or where that is 0 all that the model reaches. UserError where it asks for more."""
        if self.config.context > model.config.context:
            raise UserError(f"--context={self.config.context}: the model of --init={self.config.init} reaches {model.config.context} tokens")
        return self.config.context or model.config.context

    def check_same(self, data):
        """UserError unless this is the run that was stopped. data: {what is read: its SHA-256}."""
        check_same_run(self.info, self.stage, dataclasses.asdict(self.config), data, self.free)

    def begin(self, steps, optimizers, data, n_parameters):
        """Take back the state of the run that was stopped, open the log -> the counters given to the last `save`, {} for a fresh run.

        optimizers: {prefix of their tensors' names in what was saved: Optimizer}.
        """
        counters = {}
        if self.resumed:
            tensors, counters = load_state(self.resumed)
            try:
                for prefix, optimizer in optimizers.items():
                    optimizer.load_state({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
                set_random_state(tensors, self.device)
                self.start, self.best, self.lineage = self.info["step"], counters["best"], self.info["lineage"]
            except (KeyError, RuntimeError, TypeError, ValueError) as e:
                raise UserError(f"{self.resumed}: its train_state is damaged, or not of this model ({e}); take another checkpoint with --init") from None
        else:
            self.lineage = self.info.get("lineage", []) + [parent_record(self.folder, self.info)] if self.folder else []
        if reduce_sum(self.start)[0] != self.start * world_size():
            raise UserError(f"--out={self.path}: the processes of this run find different checkpoints there; on several machines it must be a directory that they share")
        self.steps, self.data = steps, data
        clear_run(self.path, self.config.overwrite)
        self.log = Log(self.path, steps, self.start, self.config.print_every)
        event = {"event": "resume" if self.resumed else "start", "config": dataclasses.asdict(self.config)}
        self.log.write(event | {"parameters": n_parameters, **describe(self.device)})
        if rank() == 0:
            if self.config.resume and not self.resumed:
                print("no checkpoint is here yet: beginning anew")
            if self.resumed:
                print(f"going on after step {self.start}")
            if self.start >= steps:
                print("nothing is left to do" + ("; a larger --steps goes on" if "steps" in self.free else ""))
        return counters

    def due(self, step, every):
        """True at every `every`-th step (0: none) and at the last."""
        return step == self.steps or bool(every and step % every == 0)

    def validated(self, step, metrics, text):
        """Log and print what a validation found, `metrics` with "val_loss" -> metrics. UserError where that is not finite."""
        if not math.isfinite(metrics["val_loss"]):
            raise UserError(f"step {step}: the validation loss is {metrics['val_loss']}; these weights are not saved. " + ADVICE)
        self.log.write({"step": step, **metrics})
        if rank() == 0:
            print(f"step {step}/{self.steps} | validation {text}", flush=True)
        return metrics

    def save(self, step, model, tok, state, counters, metrics, beside=None, **more):
        """Save after `step`; the best so far by metrics["val_loss"] is kept beside the newest.

        state: tensors that the next step depends on, the optimizer's; beside: {name: model} to save within; more: further fields of feinschliff.json.

        A disk that refuses costs this save, not the run, unless it is the last one.
        """
        for name, p in [pair for each in (model, *(beside or {}).values()) for pair in each.named_parameters()]:
            if not whole(p.isfinite().all()):
                raise UserError(f"step {step}: {name} is no longer finite; these weights are not saved. " + ADVICE)
        before, self.best = self.best, min(self.best, metrics.get("val_loss", self.best))
        tensors, model = {}, unsharded(model, "cpu", keep=rank() == 0)
        for name, tensor in state.items():
            gathered = whole(tensor)  # one at a time: sharded state need not fit whole on a GPU
            if rank() == 0:
                tensors[name] = gathered.cpu()
        tensors |= random_state(self.device)
        failed = ""
        if rank() == 0:
            record = {"stage": self.stage, "step": step, "config": dataclasses.asdict(self.config), "data": self.data, "metrics": metrics, **more}
            record |= {"lineage": self.lineage, "code": code_hash(), **describe(self.device)}
            try:
                self.log.sync()
                save(self.path, model, tok, record, (tensors, {"best": self.best, **counters}), self.config.keep_last, self.best < before, beside)
            except UserError as e:
                failed = str(e)
        if reduce_sum(bool(failed))[0]:  # all ranks wait here: none may end, and have torchrun end the others, while rank 0 writes
            self.best = before
            if step == self.steps or self.stop.leaving:
                raise UserError(failed or "rank 0 could not save")
            if failed:
                print(f"warning: {failed}\nwarning: training goes on; the next save may fare better", file=sys.stderr, flush=True)
