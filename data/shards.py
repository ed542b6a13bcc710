"""Prepared data as training reads it: the memory-mapped shards that data/prepare.py writes."""

import reprlib
from pathlib import Path

import numpy as np

from data import tokenizer
from data.read import file_kind, inside, read_json, source_names
from runtime.errors import UserError
from runtime.files import sha256

AGAIN = "prepare the data again (--overwrite=True)"


def load_manifest(folder):
    """The manifest of prepared data, as a dict. Reads no shard, but checks that each has its size.

    Raises UserError naming what is missing or wrong.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(
            f"{folder}: no manifest.json: not prepared data, or not prepared to the end (then rerun data.prepare)"
        )
    manifest = read_json(path)
    try:
        if manifest["format"] != 1:
            raise UserError(f"{path}: format {reprlib.repr(manifest['format'])}, not 1; {AGAIN}")
        if manifest["dtype"] not in ("uint16", "uint32") or not manifest["splits"]["train"]:
            raise ValueError("dtype is neither uint16 nor uint32, or there is nothing to train on")
        for entry in manifest["splits"]["train"] + manifest["splits"]["val"]:
            shard = inside(path, entry["file"])
            size = entry["tokens"] * np.dtype(manifest["dtype"]).itemsize
            if not shard.exists():
                raise UserError(f"{shard}: missing; {AGAIN}")
            found = shard.stat().st_size
            if found != size or not size:
                raise UserError(f"{shard}: {found} bytes, not {reprlib.repr(size)}: truncated or changed; {AGAIN}")
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(f"{path}: broken ({e!r}); {AGAIN}") from None
    return manifest


def text_hashes(sources, flag):
    """{source: SHA-256} of text files, comma-separated, or of prepared data: that of the manifest.

    Raises UserError if they are not there.
    """
    if sources and Path(sources).is_dir():
        load_manifest(sources)
        return {sources: sha256(Path(sources) / "manifest.json")}
    on_disk = [name for name in source_names(sources, flag) if file_kind(name) != "hub"]
    return {name: sha256(name) for name in on_disk}


def read_prepared(folder, tok):
    """[train streams, val streams] of a folder that data/prepare.py wrote, as memory maps. Reads
    every shard once.

    Raises UserError if another tokenizer made the data, or a shard lacks its hash or is no stream
    of the tokenizer's ids.
    """
    manifest = load_manifest(folder)
    if manifest.get("tokenizer") != tokenizer.fingerprint(tok):
        raise UserError(f"{folder}: prepared with another tokenizer; use the one in this folder, or {AGAIN}")
    return [
        [read_shard(Path(folder), entry, manifest["dtype"], tok) for entry in manifest["splits"][split]]
        for split in ("train", "val")
    ]


def read_shard(folder, entry, dtype, tok):
    path = folder / entry["file"]
    if sha256(path) != entry.get("sha256"):
        raise UserError(f"{path}: its contents are not what was written; {AGAIN}")
    tokens = np.memmap(path, dtype, "r")
    if tokens.max() >= tok.n_vocab or not tokens[0] == tokens[-1] == tok.eot or len(tokens) < 2:
        raise UserError(
            f"{path}: has ids that the tokenizer lacks, or does not begin and end with the end of a document; {AGAIN}"
        )
    return tokens
