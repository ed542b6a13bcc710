"""Checkpoints: Hugging Face directories, written so that nothing is ever lost, and what exact
resume needs.

    out/NAME/log.jsonl, samples.txt, latest -> step_000200, best -> step_000150
    out/NAME/step_000200/
        config.json, model.safetensors, tokenizer.json, tokenizer_config.json: any Hugging Face tool
        feinschliff.json: stage, step, flags, versions, hashes of data and code, lineage
        train_state.safetensors, .json: optimizer, random states, place in the data
        manifest.json: SHA-256 of every other file; loading verifies it

A checkpoint is written under a temporary name, flushed to the disk, then renamed: if a run is
killed, a directory called step_* is still complete. No pickle anywhere."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import safetensors.torch

from data import chat, tokenizer
from data.read import inside, read_json
from runtime.cli import print0, read_flags
from runtime.errors import UserError
from runtime.files import flush, sha256, write_json
from runtime.hub import (
    ADAPTER_CONFIG,
    WEIGHTS,
    config_from_hf,
    config_to_hf,
    model_from_hf,
    open_tensors,
    to_hf,
    weight_files,
)

INFO, MANIFEST = "feinschliff.json", "manifest.json"
STATE, COUNTERS = "train_state.safetensors", "train_state.json"
# Of a generation_config.json; temperature, top_k and top_p are flags
NOT_FOLLOWED = "repetition_penalty no_repeat_ngram_size suppress_tokens begin_suppress_tokens bad_words_ids".split()
NOT_FOLLOWED += "forced_bos_token_id forced_eos_token_id min_length min_new_tokens sequence_bias min_p".split()
NOT_FOLLOWED += ["num_beams", "penalty_alpha", "stop_strings"]
ADVICE = (
    "A lower learning rate or --max_grad_norm=1 may help: start another run, from scratch or with "
    "--init=STEP_DIRECTORY; --resume would only repeat this one"
)


# --------------------------------------------------------------------------------------------------
# Reading


def find(where):
    """The checkpoint directory meant by `where`: a Hugging Face directory, one of our checkpoints,
    or a run, of which it is the newest undamaged checkpoint.

    What we wrote is verified against its manifest.
    """
    where = Path(where)
    if (where / "config.json").is_file():
        is_ours = (where / MANIFEST).exists() or (where / INFO).exists()
        if is_ours and (wrong := damage(where)):
            raise UserError(f"{where}: {wrong}; take another checkpoint of the run ({where.resolve().parent})")
        return where
    for folder in reversed(steps_in(where)):
        if not (wrong := damage(folder)):
            return folder
        print0(f"warning: {folder}: {wrong}; falling back to the checkpoint before", file=sys.stderr)
    but = ", but a file" if where.is_file() else ", but an adapter" if (where / ADAPTER_CONFIG).exists() else ""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(where)) and not where.parent.exists()
    download = f"; if it is a model of Hugging Face: hf download {where} --local-dir DIR" if is_name else ""
    raise UserError(
        f"{where}: no checkpoint here{but} (expected a directory with config.json and {WEIGHTS}, or a run's directory "
        f"with an undamaged step_*){download}"
    )


def steps_in(run):
    """The checkpoints of a run directory, oldest first."""
    folders = [p for p in Path(run).glob("step_*") if re.fullmatch("[0-9]+", p.name[5:])]
    return sorted(folders, key=lambda p: int(p.name[5:]))


def newest_finished(folder):
    """The last checkpoint of the newest finished run below `folder` that can chat; None: no such.

    A run in mid-training has fewer steps behind it than its total.
    """
    finished = []
    for run in {path.parent.parent for path in Path(folder).glob("**/step_*/manifest.json")}:
        with contextlib.suppress(UserError, OSError, IndexError):  # being written, or deleted, right now
            last = steps_in(run)[-1]
            info = read_info(last)
            chats = info.get("stage") not in (None, "pretrain", "reward")
            if chats and info["step"] == info.get("total_steps"):
                finished.append(((last / MANIFEST).stat().st_mtime, last))
    return max(finished, default=(0, None))[1]


def damage(folder):
    """What is wrong with a checkpoint of ours, in words; "" if every file is as it was written."""
    try:
        manifest = read_json(folder / MANIFEST)
        if WEIGHTS not in manifest:
            return f"{MANIFEST} does not name {WEIGHTS}"
        for name, digest in manifest.items():
            path = inside(folder / MANIFEST, name)
            if not path.is_file():
                return f"{name} is missing"
            if sha256(path) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
    except (UserError, OSError) as e:
        return str(e)
    return ""


def load(where, device="cpu"):
    """(model, tokenizer, info) of a checkpoint, a run or a Hugging Face directory.

    info is the content of feinschliff.json, {} if there is none.
    """
    return read(find(where), device)


def read(folder, device="cpu"):
    """`load` of a directory that `find` has verified already."""
    model = model_from_hf(config_from_hf(folder / "config.json"), folder)
    tok = tokenizer.load(folder)
    if tok.n_vocab > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tok.n_vocab} ids, the model {model.config.vocab_size}: take the one that it "
            "came with, or enlarge the model by resize_token_embeddings of transformers"
        )
    model.config.padding = model.config.vocab_size - tok.n_vocab
    say_what_is_not_followed(folder / "generation_config.json")
    return model.to(device), tok, read_info(folder)


def say_what_is_not_followed(path):
    """Print what a generation_config.json asks of sampling that is not done here."""
    config = read_json(path) if path.is_file() else {}
    found = [name for name in NOT_FOLLOWED if config.get(name) not in (None, False, 0, 1, [], {})]
    if found:
        print0(f"{path}: not followed: {', '.join(found)}; transformers' generate, which does, writes other texts")


def read_info(folder):
    """The feinschliff.json of a checkpoint, {} if it is not one of ours.

    Raises UserError if a field that others rely on is not what `save` writes.
    """
    path = folder / INFO
    if not path.exists():
        return {}
    info = {"config": {}, "data": {}, "lineage": []} | read_json(path)
    centers = [info.get("center", 0.0), info.get("critic_center", 0.0)]
    if (
        has_kinds(info, {"stage": str, "step": int, "config": dict, "data": dict, "lineage": list})
        and all(has_kinds(parent, {"path": str, "weights": str}) for parent in info["lineage"])
        and all(isinstance(center, int | float) and abs(center) < 1e30 for center in centers)
    ):
        return info
    raise UserError(f"{path}: damaged: a field is missing or not what it should be; take another checkpoint")


def has_kinds(value, kinds):
    """Whether a JSON value is an object with these fields, each of its kind."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def load_matching(where, model, tok, flag, scalar_head=False):
    """The model of another checkpoint, on the same device, that reads the same tokens as `model`.

    Raises UserError naming `flag` if its tokenizer differs, its context is shorter, or it is a
    reward model where one that writes is wanted, or (with `scalar_head`) the reverse."""
    other, other_tok, _ = load(where, model.embed.device)
    if other.config.scalar_head != scalar_head:
        wrong = "not a reward model (it has no scalar head)"
        raise UserError(f"{flag}: {wrong if scalar_head else 'a reward model, which gives no probabilities'}")
    if tokenizer.fingerprint(other_tok) != tokenizer.fingerprint(tok):
        raise UserError(f"{flag}: it has another tokenizer, so what the two say of the same tokens cannot be compared")
    if other.config.context < model.config.context:
        raise UserError(
            f"{flag}: its context of {other.config.context} tokens is shorter than the "
            f"{model.config.context} of the model it goes with"
        )
    return other


def load_state(folder):
    """(tensors, counters) that `save` was given as `state`. Raises UserError naming a damaged
    file."""
    counters = read_json(folder / COUNTERS)
    if "NaN" in (folder / COUNTERS).read_text():
        raise UserError(f"{folder / COUNTERS}: damaged: a number is NaN; take another checkpoint")
    with open_tensors(folder / STATE) as f:
        return {name: f.get_tensor(name) for name in f.keys()}, counters


# --------------------------------------------------------------------------------------------------
# What a checkpoint was made from


def weights_hash(folder):
    """Hex SHA-256 of the weights, "sharded" for a downloaded model in several files."""
    return sha256(folder / WEIGHTS) if (folder / WEIGHTS).exists() else "sharded"


def fingerprint(folder):
    """Hex SHA-256 of what a checkpoint computes: its configuration and its weights."""
    files = sorted({folder / "config.json", *weight_files(folder).values()})
    return hashlib.sha256(json.dumps({file.name: sha256(file) for file in files}).encode()).hexdigest()


def fingerprints(*names):
    """{name: fingerprint} of the checkpoints, runs or directories that flags name; empty names are
    left out."""
    return {name: fingerprint(find(name)) for name in names if name}


def parent_record(folder, info):
    """What a run keeps of the checkpoint it starts from, at the end of that one's lineage."""
    kept = {k: info[k] for k in ("stage", "step", "config", "data", "code") if k in info}
    return {"path": str(folder), "weights": weights_hash(folder), **kept}


def code_hash():
    """SHA-256 of the product's sources: two runs with the same hash ran the same code."""
    root = Path(__file__).parents[1]
    files = sorted(p for where in ("", "kernels", "data", "runtime") for p in (root / where).glob("*.py"))
    return hashlib.sha256(b"".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()


def check_same_run(info, stage, config):
    """Raises UserError unless `info` is of a run of this stage with the same flags.

    Only flags whose comment says "may change on resume" may differ: with another learning rate it
    would be another run."""
    if info["stage"] != stage:
        raise UserError(
            f"--out={config.out}: the run there is one of {info['stage']}.py, not of {stage}.py; choose another --out"
        )
    flags = read_flags(type(config))
    for name, value in vars(config).items():
        before = info["config"].get(name, value)
        if before != value and not flags[name].may_change_on_resume:
            raise UserError(
                f"--{name}={value}: this run was started with --{name}={before}; resume with that, or start another in "
                "a new --out"
            )


def check_same_data(info, data):
    """Raises UserError if what a run reads, {name: SHA-256}, is not what it began with."""
    for name, digest in data.items():
        if info["data"].get(name) != digest:
            raise UserError(
                f"{name}: not the data this run was started with (its SHA-256 differs); bring that back, or start "
                "another run in a new --out"
            )


# --------------------------------------------------------------------------------------------------
# Writing


def save(run, model, tok, info, state=None, keep_last=2, best=False, models=None):
    """Write run/step_<info["step"]>, then drop all but the `keep_last` newest and the best. Returns
    its path.

    info: at least {"stage", "step"}; state: (tensors, counters) to resume from; best: make this the
    run's best; models: {name: model} of the same tokenizer, each written to a directory of that
    name within. Raises UserError if a write fails: nothing half-written is left, and no older
    checkpoint is touched."""
    run, step = Path(run), info["step"]
    final, temporary = run / f"step_{step:06d}", run / f".tmp_step_{step:06d}"
    try:
        if final.exists() and damage(final):
            shutil.rmtree(final)
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
        if not final.exists():
            write_checkpoint(temporary, model, tok, info, state, models or {})
            os.replace(temporary, final)
            flush(run)
        link(run, "latest", final.name)
        if best:
            link(run, "best", final.name)
    except (OSError, UserError, safetensors.SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = ", ".join(p.name for p in steps_in(run)) or "none"
        raise UserError(
            f"{final}: not saved ({e}); make room or give the directory back, then rerun with --resume to continue. "
            f"Checkpoints kept: {kept}"
        ) from None
    delete_old(run, step, keep_last, temporary)
    return final


def write_checkpoint(folder, model, tok, info, state, models):
    """Write all files of a checkpoint into a new directory, and have the disk hold them."""
    for name, each in {"": model, **models}.items():
        (folder / name).mkdir(parents=True)
        write_model(folder / name, each, tok, info["stage"])
    write_json(folder / INFO, info)
    if state:
        tensors, counters = state
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        safetensors.torch.save_file(tensors, folder / STATE)
        write_json(folder / COUNTERS, counters)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    write_json(folder / MANIFEST, {p.relative_to(folder).as_posix(): sha256(p) for p in files})
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def write_model(folder, model, tok, stage):
    """Write weights, config.json and tokenizer. From fine-tuning on a checkpoint knows turns, and
    ends them."""
    safetensors.torch.save_file(to_hf(model), folder / WEIGHTS, metadata={"format": "pt"})
    eos_ids, source = [tok.eot], ""
    if stage != "pretrain":  # the end of a turn comes first
        eos_ids = sorted(chat.stop_ids(tok), key=[chat.end_of_turn(tok), *tok.eos_ids].index)
        source = tok.template.source_under(tok.decode(eos_ids[:1])) if tok.template else chat.TEMPLATE
    elif tok.template:  # of a downloaded model that reads more text
        eos_ids, source = list(tok.eos_ids or eos_ids), tok.template.source
    config = config_to_hf(model.config, bos=tok.bos, eos=eos_ids[0], pad=tok.pad)
    generation = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
    generation["eos_token_id"] = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    tokenizer.save(tok, folder, source, eos_ids[0])


def delete_old(run, step, keep_last, temporary):
    """Delete all checkpoints up to `step` but the `keep_last` newest and the best.

    One with a higher number is damaged, or this run would have continued from there: it must not
    push out a good one."""
    keep = [p.name for p in steps_in(run) if int(p.name[5:]) <= step][-keep_last:]
    keep.append((run / "best").resolve().name)  # "best" itself if there is none
    for old in steps_in(run):
        if old.name not in keep:
            os.replace(old, temporary)  # first the name, so that a step_* is never half there
            shutil.rmtree(temporary, ignore_errors=True)


def link(run, name, target):
    """Make the symbolic link run/name -> target, atomically.

    Links are a convenience (`find` does not need them); Windows may forbid them.
    """
    if os.name != "posix":
        return
    temporary = run / f".{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if (run / name).is_dir() and not (run / name).is_symlink():
        shutil.rmtree(run / name)  # the run was copied by a tool that follows links
    os.replace(temporary, run / name)
