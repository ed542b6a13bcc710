"""Prepare text for pretraining: clean, drop duplicates and evaluation texts, mix, split, tokenize.

Three passes:

1. scan     Each document is judged by itself: by the rules of data/clean.py, and by whether it
            shares 13 words in a row with an evaluation file. What the next pass must know of it is
            a record of 127 bytes: source, verdict, size, hash, MinHash signature.
2. decide   All records together: exact and near duplicates (data/clean.py), mixture weights, the
            train/val split.
3. write    The chosen documents are read again and tokenized: `eot document eot document ... eot`
            in shards of uint16 (uint32 for more ids).

After a kill, rerun the same command: it repeats the pass that was interrupted, but no finished one,
and ends in the same bytes.

Sources: .jsonl or .parquet with a string "text" in each row (formats: data/read.py); text;
hf:NAME[configuration,split,rows], copied to the work folder first (needs the extra `data`). A text
file is divided into documents at lines
`<|endoftext|>`, before lines that match --heading, and, once a document has --cut characters, at
the next blank line (at twice that, the next line end). Blank lines alone divide nothing, and a book
becomes documents of some pages.

Weights are shares of the text written: with a:0.7,b:0.3, 70 % of the training bytes come from a.
The source that is shortest of its share is used --epochs times, the others e times in proportion: a
document is written floor(e) times and, with probability e - floor(e), once more. Without weights,
each is written once. Sources are interleaved evenly. Whether a document is held out depends on its
text alone, not on order, seed or other documents. There is no global shuffle: pretrain.py shuffles.

    python -m data.prepare --data=book.txt --tokenizer=out/tok --out=out/book --val_fraction=0.1
    python -m data.prepare --data=web.jsonl:0.8,books.jsonl:0.2 --tokenizer=out/tok --out=out/mix
"""

import itertools
import json
import math
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import clean, tokenizer
from data.read import (
    Document,
    file_kind,
    named,
    parse_mixture,
    read_json,
    read_lines,
    read_rows,
    read_text,
    read_texts,
)
from data.shards import load_manifest
from data.workers import batches, in_order
from runtime.cli import check_ranges, launch, refuse_unread
from runtime.errors import UserError
from runtime.files import append, lock_file, replace_file, sha256, write_json


@dataclass
class Config:
    # -- What you will set --
    # sources, with or without weights: a.txt:0.7,b.jsonl:0.2,hf:NAME[configuration,split,rows]:0.1
    data: str
    # directory with tokenizer.json, or anything else that data/tokenizer.py loads
    tokenizer: str
    # directory to write
    out: str

    # evaluation files (every string of the rows, all of a text): what shares 13 words in a row with
    # them is removed
    decontaminate: str = ""
    # share of the documents held out for validation, at least one; 0: none [>= 0; < 1]
    val_fraction: float = 0.01
    # with weights: how often the source that is shortest of its share is used [> 0; <= 1000]
    epochs: float = 1.0

    # -- What you may set --
    # text: a document begins with a line that this regular expression matches as a whole (WikiText:
    # ' = [^=].* = ')
    heading: str = ""
    # text: characters after which a document ends at the next blank line [>= 1]
    cut: int = 16384
    # apply the rules of data/clean.py
    clean: bool = True
    # fewest words of a document (Gopher: 50, for web pages; exercises and dialogue are shorter)
    min_words: int = 10
    # most words of a document (Gopher)
    max_words: int = 100_000
    # language to keep; "": any [one of en]
    language: str = ""
    # duplicates to remove; near: exact ones too [one of none, exact, near]
    dedup: str = "near"
    # bytes of text in a shard [>= 1]
    shard_bytes: int = 2**27
    # which documents of a source that exceeds its share are used
    seed: int = 0
    # leave bad lines, and documents that cannot be tokenized, out and count them
    skip_bad: bool = False
    # worker processes; the result does not depend on them [>= 1]
    workers: int = 1
    # replace what an earlier run wrote to --out
    overwrite: bool = False


SHARED = 13  # words in a row that give an evaluation text away (GPT-3, appendix C)
BATCH = 2**18  # characters computed on at once: few enough for the processor's cache
OTHER_FILES = {".lock", "work", "tokenizer.json", "tokenizer_config.json"}  # of --out, besides shards and manifest
WORK_FILES = r"recipe\.json|scan\.bin|hf_[0-9]+\.jsonl|\..*\.tmp"  # of --out/work, which is deleted at the end
VERDICTS = ["kept", "bad_line", *(rule.__name__ for rule in clean.RULES)]
VERDICTS += ["contaminated", "exact_duplicate", "near_duplicate", "over_weight"]
RECORD = np.dtype(  # of one document
    [("source", "<u2"), ("verdict", "u1"), ("bytes", "<u4"), ("key", "<u8"), ("bands", "<u8", clean.BANDS)]
)

# -------------------------------------------------------------------------------------------------
# Sources


class Source(NamedTuple):
    name: str  # as the user wrote it
    path: Path  # the file to read; for hf:NAME, the copy in the work folder
    weight: float  # 0 if no weights are given


def parse_sources(text, work):
    """`--data` -> [Source, ...]; raises UserError naming the piece that does not parse."""
    sources = []
    for name, weight in parse_mixture(text):
        path = Path(name)
        if name.startswith("hf:"):
            path = work / f"hf_{len(sources)}.jsonl"
        sources.append(Source(name, path, weight))
    return sources


def download(name, path, skip_bad=False):
    """Copy hf:NAME[configuration,split,rows] from Hugging Face into a JSONL file, row by row."""
    with replace_file(path) as file:
        for text in read_texts(name, skip_bad):  # None stays null, a bad line of the copy
            file.write(json.dumps({"text": text}).encode() + b"\n")


def text_documents(path, heading, cut):
    """Yield the documents of a text file, divided as the head of this file says."""
    text, first = "", 1  # first: the number of the first line of a document
    for number, line in read_lines(path):
        marker = line.strip() == "<|endoftext|>"
        if text and (marker or heading and re.fullmatch(heading, line.rstrip("\r\n"))):
            yield Document(text, f"{path}:{first}")
            text = ""
        if not marker:
            first = first if text else number
            text += line
        if len(text) >= cut and (not line.strip() or len(text) >= 2 * cut):
            yield Document(text, f"{path}:{first}")
            text = ""
    if text:
        yield Document(text, f"{path}:{first}")


def documents(path, config):
    """Yield the texts of a source; None for a bad line under --skip_bad."""
    if file_kind(path) == "text":
        yield from text_documents(path, config.heading, config.cut)
    else:
        yield from read_texts(str(path), config.skip_bad)


def strings(value):
    """Yield every string in a JSON value, however deep."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value


def evaluation_grams(paths, skip_bad=False):
    """The 13-grams of evaluation files, uint64 [G], sorted.

    Texts of fewer than 13 words have none: their like occurs in many innocent documents.
    """
    grams, short, count = [np.zeros(0, np.uint64)], 0, 0
    for path in paths:
        if file_kind(path) == "text":
            texts = [read_text(path)]
        else:
            texts = (text for _, row in read_rows(str(path), skip_bad) for text in strings(row))
        for batch in batches(texts, BATCH):
            words = clean.find_words(batch)
            grams.append(clean.ngrams(words, SHARED)[0])
            short += int((words.count < SHARED).sum())
            count += len(batch)
    if short:
        print(f"--decontaminate: {short:,} of {count:,} texts have fewer than {SHARED} words and are not searched for")
    return np.unique(np.concatenate(grams))


# -------------------------------------------------------------------------------------------------
# 1. Scan


def scan(grams, config, batch):
    """A batch of (source number, text or None) -> RECORDs [D]."""
    texts = [text or "" for _, text in batch]
    words = clean.find_words(texts)
    records = np.zeros(len(batch), RECORD)
    records["source"] = [source for source, _ in batch]
    records["bytes"] = [len(text.encode()) for text in texts]
    records["key"] = [clean.text_key(text) for text in texts]
    records["bands"] = clean.signatures(words).view("<u8")
    if len(grams):
        hashes, text = clean.ngrams(words, SHARED)
        records["verdict"][text[clean.contains(grams, hashes)]] = VERDICTS.index("contaminated")
    for rule in reversed(clean.RULES if config.clean else [clean.empty]):  # the first one counts
        records["verdict"][rule(texts, words, config)] = VERDICTS.index(rule.__name__)
    records["verdict"][[text is None for _, text in batch]] = VERDICTS.index("bad_line")
    return records


def scan_sources(sources, grams, path, config):
    """Write the RECORDs of all documents to a file, which gets its name when it is whole."""
    items = ((i, text) for i, source in enumerate(sources) for text in documents(source.path, config))
    items = progress("scan", items, sum(source.path.stat().st_size for source in sources))
    with replace_file(path) as file:
        for records in in_order(scan, (grams, config), batches(items, BATCH, batch_size), config.workers):
            file.write(records)


# -------------------------------------------------------------------------------------------------
# 2. Decide


def uniform(keys, salt):
    """float64 [D] in [0, 1): a random number that belongs to each key."""
    return clean.splitmix64(keys ^ clean.splitmix64(np.array([salt], np.uint64))) / 2.0**64


def decide(records, sources, config):
    """Choose among the scanned documents.

    Returns (verdict uint8 [D], copies to write int64 [D], held out bool [D], epochs of each
    source).
    """
    verdict, keys = records["verdict"].copy(), records["key"].copy()
    if config.dedup != "none":
        alive = np.flatnonzero(verdict == 0)
        verdict[alive[clean.exact_duplicates(keys[alive])]] = VERDICTS.index("exact_duplicate")
    if config.dedup == "near":
        alive = np.flatnonzero(verdict == 0)
        verdict[alive[clean.near_duplicates(records["bands"], alive)]] = VERDICTS.index("near_duplicate")

    kept = np.bincount(records["source"], records["bytes"] * (verdict == 0), len(sources))  # bytes
    weights = np.array([source.weight for source in sources])
    if not kept.any() or weights[0] and not kept.all():
        gone = verdict[records["source"] == kept.argmin()]
        name = sources[kept.argmin()].name
        raise UserError(f"{name}: no document is left of {len(gone)}; removed: {listed(removed(gone))}")
    epochs = np.ones(len(sources))
    if weights[0]:
        epochs = weights / kept
        epochs *= config.epochs / epochs.max()
    copies = np.floor(epochs[records["source"]] + uniform(keys, config.seed + 1)).astype(np.int64) * (verdict == 0)
    verdict[(verdict == 0) & (copies == 0)] = VERDICTS.index("over_weight")

    chance = uniform(keys, 0)
    least = chance[copies > 0].min(initial=1)  # one document at least
    held_out = (config.val_fraction > 0) & ((chance < config.val_fraction) | (chance == least))
    copies[held_out] = copies[held_out].clip(max=1)
    if not copies[~held_out].any():
        raise UserError(
            f"no document is left to train on, {copies.sum()} held out; "
            "lower --val_fraction (0: no validation), or --cut texts finer"
        )
    return verdict, copies, held_out, epochs


def removed(verdict):
    """{verdict: number of documents} of what is not kept."""
    counts = np.bincount(verdict, minlength=len(VERDICTS)).tolist()
    return dict(zip(VERDICTS[1:], counts[1:]))


def listed(counts):
    return ", ".join(f"{n:,} {rule}" for rule, n in counts.items() if n) or "none"


def writing_order(records, copies, held_out, shard_bytes):
    """The order of writing, and the shard of each document in its split.

    Returns (document int64 [n], shard int64 [n]). When a tenth of the output is written, so is a
    tenth of each source; a source used twice is read twice. A shard takes shard_bytes of text.
    """
    document, share = [], []
    for source in np.unique(records["source"][copies > 0]):
        mine = np.flatnonzero((records["source"] == source) & (copies > 0))
        mine = np.concatenate([mine[copies[mine] > n] for n in range(copies[mine].max())])
        document.append(mine)
        share.append(np.cumsum(records["bytes"][mine], dtype=np.float64))
        share[-1] /= share[-1][-1]
    document, share = np.concatenate(document), np.concatenate(share)
    document = document[np.argsort(share, kind="stable")]

    shard = np.zeros(len(document), np.int64)
    for split in (False, True):
        mine = np.flatnonzero(held_out[document] == split)
        size = records["bytes"][document[mine]].astype(np.int64)
        full = (np.cumsum(size) - size) // shard_bytes  # shards' worth of text before each document
        shard[mine] = np.cumsum(np.diff(full, prepend=0) > 0)  # a large text must not skip a number
    return document, shard


# -------------------------------------------------------------------------------------------------
# 3. Write


def read_numbered(path, numbers, config):
    """Yield the texts of a source's documents by number; starts over if the numbers fall."""
    texts, at = iter(()), math.inf
    for number in numbers:
        if number < at:
            texts, at = documents(path, config), 0
        yield next(itertools.islice(texts, number - at, None))
        at = number + 1


def encode(tok, dtype, skip_bad, batch):
    """Tokenize (shard's name, text)s.

    Returns ({shard's name: tokens}, in order, and why each text could not be tokenized, "" if it
    could). Raises UserError for one that could not, unless `skip_bad`.
    """
    tokens, errors = {}, []
    for name, text in batch:
        try:
            ids = [tok.eot, *tok.encode_ordinary(text)]
        except UserError as e:
            if not skip_bad:
                raise UserError(f"{named(text, e)}; --skip_bad=True leaves such documents out") from None
            errors.append(named(text, e))
        else:
            tokens.setdefault(name, []).extend(ids)
            errors.append("")
    return {name: np.array(ids, dtype) for name, ids in tokens.items()}, errors


def write_splits(sources, records, copies, held_out, tok, dtype, config):
    """Tokenize the chosen documents to shards.

    Returns ({split: [manifest entry, ...]}, numbers of the documents that could not be tokenized).
    """
    document, shard = writing_order(records, copies, held_out, config.shard_bytes)
    source, first = records["source"][document], np.searchsorted(records["source"], np.arange(len(sources)))
    texts = [read_numbered(s.path, document[source == i] - first[i], config) for i, s in enumerate(sources)]
    sizes, held_out, out = records["bytes"][document], held_out[document], Path(config.out)
    names = (shard_name("val" if held else "train", number) for held, number in zip(held_out, shard))
    items = progress("write", zip(names, (next(texts[i]) for i in source)), sizes.sum())

    for path in [p for split in ("train", "val") for p in out.glob(f"{split}_{'[0-9]' * 5}.bin")]:  # of an earlier run
        path.unlink()
    shared, good = (tok, dtype, config.skip_bad), []  # good: whether each document could be tokenized
    for pieces, errors in in_order(encode, shared, batches(items, BATCH, batch_size), config.workers):
        good += [not error for error in errors]
        for error in filter(None, errors):
            print(f"{error}; left out")
        for name, tokens in pieces.items():
            append(out / name, tokens, sync=False)
    good, entries = np.array(good), {"train": [], "val": []}
    for split, chosen in (("train", good & ~held_out), ("val", good & held_out)):
        counts, text_bytes = np.bincount(shard[chosen]), np.bincount(shard[chosen], sizes[chosen])
        for number in np.flatnonzero(counts):
            path = out / shard_name(split, number)
            size = append(path, np.array([tok.eot], dtype))  # ends with eot, as it begins
            entries[split].append(
                {
                    "file": path.name,
                    "tokens": size // np.dtype(dtype).itemsize,
                    "documents": int(counts[number]),
                    "bytes": int(text_bytes[number]),
                    "sha256": sha256(path),
                }
            )
    if not entries["train"]:
        raise UserError(f"--data={config.data}: no document to train on could be tokenized")
    return entries, document[~good]


def shard_name(split, number):
    return f"{split}_{number:05d}.bin"


def batch_size(item):
    """What an item counts in a batch, in characters; its last part is the text."""
    return len(item[-1] or "") + 100  # a short document has its cost, too


def progress(label, items, total):
    """Yield items that end in a text; print the share of `total` bytes done, every ten seconds."""
    done, shown = 0, time.monotonic()
    for item in items:
        yield item
        done += len((item[-1] or "").encode())
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            share = min(1.0, done / total)  # a packed file has more text than bytes
            print(f"{label} {share:.0%}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------
# The folder


def begin(out, recipe, overwrite):
    """Lock `out` and make it ready: empty, or as an interrupted run of the same recipe left it.

    Returns True if such a run is complete already. Raises UserError if `out` holds anything else
    and `overwrite` does not allow to replace it.
    """
    lock_file(out / ".lock", out)
    work = out / "work"
    for path in work.glob("*"):
        if not re.fullmatch(WORK_FILES, path.name):
            raise UserError(f"{path}: is not ours, and {work} is deleted at the end; choose another --out")
    complete, begun = (out / "manifest.json").exists(), (work / "recipe.json").exists()
    if complete and not overwrite:
        check_same(out, load_manifest(out), recipe)
        shutil.rmtree(work, ignore_errors=True)
        return True
    if begun and not complete:
        old = read_json(work / "recipe.json")
        if old == recipe:
            return False
        # an input may change before the run is complete: a bad line that the user corrects
        if not overwrite and old["config"] != recipe["config"]:
            check_same(out, old, recipe)
    elif not overwrite and {path.name for path in out.iterdir()} - OTHER_FILES:
        raise UserError(f"{out}: holds other files; choose another --out")
    (out / "manifest.json").unlink(missing_ok=True)  # first, for it says that the rest is whole
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_json(work / "recipe.json", recipe)
    return False


def check_same(out, old, recipe):
    """Raises UserError if what is in `out` was made by another recipe than this."""
    changed = [key for part in recipe for key, value in recipe[part].items() if old.get(part, {}).get(key) != value]
    if changed:
        raise UserError(f"{out}: made with another {' and '.join(changed)}; --overwrite=True replaces it")


def source_entries(sources, hashes, records, copies, epochs):
    """The manifest's entries of the sources."""
    entries = []
    for i, source in enumerate(sources):
        mine = records["source"] == i
        size = records["bytes"][mine]
        entries.append(
            {
                "path": source.name,
                "sha256": hashes[source.path],
                "weight": source.weight,
                "documents": len(size),
                "bytes": int(size.sum()),
                "bytes_written": int((size * copies[mine]).sum()),
                "epochs": float(epochs[i]),
            }
        )
    return entries


def report(manifest):
    """Print what became of the documents."""
    print(f"{manifest['documents_in']:,} documents read; removed: {listed(manifest['rules'])}")
    for s in manifest["sources"]:
        read, written = s["bytes"] / 1e6, s["bytes_written"] / 1e6
        print(f"{s['path']}: {read:,.1f} MB read, {written:,.1f} MB written, {s['epochs']:.3g} epochs of what is kept")
    for split, shards in manifest["splits"].items():
        count, size, tokens = (sum(shard[key] for shard in shards) for key in ("documents", "bytes", "tokens"))
        print(f"{split}: {count:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens in {len(shards)} shards")


def main(config):
    check_ranges(config)
    if not config.clean:
        refuse_unread(config, dict.fromkeys(("min_words", "max_words", "language"), "only --clean reads it"))
    try:
        re.compile(config.heading)
    except re.error as e:
        raise UserError(f"--heading={config.heading}: not a regular expression: {e}") from None

    # What the result depends on. A folder that depends on something else is refused.
    tok, out = tokenizer.load(config.tokenizer), Path(config.out)
    work = out / "work"
    sources = parse_sources(config.data, work)
    evaluation = [Path(name) for name in config.decontaminate.split(",") if name]
    local = [source.path for source in sources if not source.name.startswith("hf:")]
    for name in [*map(str, evaluation), *[source.name for source in sources]]:
        file_kind(name)  # raises UserError for what is no data file
    hashes = {path: sha256(path) for path in [*evaluation, *local]}
    inputs = {config.tokenizer: tokenizer.fingerprint(tok)} | {str(path): digest for path, digest in hashes.items()}
    settings = {name: value for name, value in vars(config).items() if name not in ("out", "workers", "overwrite")}
    recipe = {"config": settings, "inputs": inputs}
    if begin(out, recipe, config.overwrite):
        print(f"{out}: complete, nothing to do")
        return
    for source in sources:
        if source.path not in hashes:
            if not source.path.exists():
                download(source.name, source.path, config.skip_bad)
            hashes[source.path] = sha256(source.path)

    # The three passes
    scan = work / "scan.bin"
    if not scan.exists():
        scan_sources(sources, evaluation_grams(evaluation, config.skip_bad), scan, config)
    if not scan.stat().st_size:
        raise UserError(f"--data={config.data}: no document in it")
    records = np.memmap(scan, RECORD, "r")
    verdict, copies, held_out, epochs = decide(records, sources, config)
    dtype = "uint16" if tok.n_vocab <= 65536 else "uint32"
    splits, bad = write_splits(sources, records, copies, held_out, tok, dtype, config)
    verdict[bad], copies[bad] = VERDICTS.index("bad_line"), 0

    manifest = {
        "format": 1,
        "tokenizer": tokenizer.fingerprint(tok),
        "n_vocab": tok.n_vocab,
        "dtype": dtype,
        "eot": tok.eot,
        "splits": splits,
        "sources": source_entries(sources, hashes, records, copies, epochs),
        "rules": removed(verdict),
        "repeated": int((copies - 1).clip(min=0).sum()),
        "documents_in": len(records),
        "documents_out": int(copies.sum()),
        **recipe,
    }
    tokenizer.save(tok, out)
    write_json(out / "manifest.json", manifest)  # last, for it says that the rest is whole
    shutil.rmtree(work, ignore_errors=True)
    report(manifest)
    print(f"next: python pretrain.py --data={out} --out=out/base")


if __name__ == "__main__":
    launch(main, Config)
