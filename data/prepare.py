"""Prepare text for pretraining: clean it, remove duplicates and evaluation texts, mix, split, tokenize. Data quality is half of what makes a model.

Three passes. Killed at any moment, the same command goes on where it was and ends in the same bytes.

1. scan     Each document is judged by itself: by the rules of data/clean.py, and by whether it shares 13 words in a row with an evaluation file. What
            the next pass must know of it is a record of 127 bytes in work/scan.bin: source, verdict, size, hash, MinHash signature.
2. decide   All records together: exact and near duplicates (clean.py), mixture weights, the train/val split.
3. write    The chosen documents are read again and tokenized: `eot document eot document ... eot` in shards of uint16 (uint32 for more ids).

Sources: .jsonl with a string "text" in each row; .txt; hf:NAME[configuration,split,rows], copied into the work folder first (needs the extra `data`).
A .txt file is divided into documents at lines `<|endoftext|>`, before lines that match --heading, and, once a document has --cut characters, at
the next blank line (at twice that, the next line end): blank lines alone divide nothing, and a book becomes documents of some pages.

Weights are shares of the text written: with a:0.7,b:0.3, 70 % of the training bytes come from a. The source that is shortest of its share is used
--epochs times, the others e times in proportion: a document is written floor(e) times and, with probability e - floor(e), once more. Without
weights, each is written once. Sources are interleaved evenly. Whether a document is held out depends on its text alone, not on order, seed or
other documents.

Left out: a global shuffle (pretrain.py shuffles).

    python -m data.prepare --data=book.txt --tokenizer=out/tok --out=out/data/book --val_fraction=0.1
    python -m data.prepare --data=web.jsonl:0.8,books.jsonl:0.2 --decontaminate=gsm8k_test.jsonl --tokenizer=out/tok --out=out/data/mix --workers=8
"""
import collections, concurrent.futures.process, hashlib, itertools, json, math, multiprocessing, os, re, reprlib, shutil, signal, sys, threading, time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, clock_time, launch, lock
from data import tokenizer
from data.clean import BANDS, RULES, contains, empty, exact_duplicates, find_words, near_duplicates, ngrams, signatures, stir, text_key
from data.read import hub_rows, inside, parse_mixture, read_json, read_jsonl, read_lines, read_text


@dataclass
class Config:
    data: str  # sources with or without weights: a.txt:0.7,b.jsonl:0.3,hf:HuggingFaceFW/fineweb-edu[sample-10BT,train,100000]
    tokenizer: str  # directory with tokenizer.json, or whatever else data/tokenizer.py loads
    out: str  # directory to write
    decontaminate: str = ""  # evaluation files (.jsonl: every string; .txt: all of it): what shares 13 words in a row with them is removed
    val_fraction: float = 0.01  # share of the documents held out for validation, one at least
    epochs: float = 1.0  # with weights: how often the source that is shortest of its share is used
    heading: str = ""  # .txt: a line that this regular expression matches whole begins a document (WikiText: ' = [^=].* = ')
    cut: int = 16384  # .txt: characters after which a document ends at the next blank line
    clean: bool = True  # apply the rules of data/clean.py
    min_words: int = 10  # a document has at least so many (Gopher: 50, for web pages; exercises and dialogue are shorter)
    max_words: int = 100_000  # and at most so many (Gopher)
    language: str = ""  # en: remove what is not English
    dedup: str = "near"  # none, exact, or near (exact and near)
    shard_bytes: int = 2**27  # text in a shard
    seed: int = 0  # which documents of an over-full source are used
    skip_bad: bool = False  # count bad JSONL lines and go on
    workers: int = 1  # processes
    overwrite: bool = False  # replace what an earlier run wrote to --out


SHARED = 13  # words in a row that give an evaluation text away (GPT-3, appendix C)
BATCH = 2**18  # characters computed on at once: few enough for the processor's cache
VERDICTS = ("kept", "bad_line", *(rule.__name__ for rule in RULES), "contaminated", "exact_duplicate", "near_duplicate", "over_weight")
RECORD = np.dtype([("source", "<u2"), ("verdict", "u1"), ("bytes", "<u4"), ("key", "<u8"), ("bands", "<u8", BANDS)])  # of one document

# ---------------------------------------------------------------------------------------------------------------------------------
# Sources


class Source(NamedTuple):
    name: str  # as the user wrote it
    path: Path  # the file to read; of hf:NAME, the copy in the work folder
    weight: float  # 0 where no weights are given


def parse_sources(text, work):
    """`--data` -> list of Sources. UserError names the piece that does not parse."""
    sources = []
    for name, weight in parse_mixture(text):
        hub = name.startswith("hf:")
        if not hub and not name.endswith((".txt", ".jsonl")):
            raise UserError(f"--data: {name!r}: expected FILE.txt, FILE.jsonl or hf:NAME, each with or without :WEIGHT")
        sources.append(Source(name, work / f"hf_{len(sources)}.jsonl" if hub else Path(name), weight))
    return sources


def download(name, path):
    """Copy hf:NAME[configuration,split,rows] (left out: the default one, train, all) from Hugging Face into a JSONL file, row by row."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        for row in hub_rows(name):
            if not isinstance(row.get("text"), str):
                raise UserError(f'{name}: its rows have no string "text" but {", ".join(row)}')
            file.write(json.dumps({"text": row["text"]}) + "\n")
    os.replace(f"{path}.tmp", path)


def text_documents(path, heading, cut):
    """Yield the documents of a .txt file, divided as the head of this file says."""
    lines, size = [], 0
    for _, line in read_lines(path):
        marker = line.strip() == "<|endoftext|>"
        if lines and (marker or heading and re.fullmatch(heading, line.rstrip("\r\n"))):
            yield "".join(lines)
            lines, size = [], 0
        if not marker:
            lines.append(line)
            size += len(line)
        if size >= cut and (not line.strip() or size >= 2 * cut):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def documents(path, config):
    """Yield the texts of a source; None for a bad line under --skip_bad."""
    if path.suffix == ".txt":
        yield from text_documents(path, config.heading, config.cut)
        return
    for number, row in read_jsonl(path, config.skip_bad):
        text = row.get("text") if row else None
        if not isinstance(text, str) and not config.skip_bad:
            raise UserError(f'{path}:{number}: no string "text" in this row; mend the line, or leave bad lines out with --skip_bad=True')
        yield text if isinstance(text, str) else None


def file_hash(path):
    """The sha256 of a file, in hex. UserError names a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def strings(value):
    """Yield every string in a JSON value, however deep."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            values += value.values() if isinstance(value, dict) else value


def evaluation_grams(paths):
    """The 13-grams of evaluation files, uint64 [G], sorted. Texts of fewer than 13 words have none: their like stands in many innocent documents."""
    grams, short, count = [np.zeros(0, np.uint64)], 0, 0
    for path in paths:
        texts = iter([read_text(path)]) if path.suffix == ".txt" else (text for _, row in read_jsonl(path) for text in strings(row))
        for batch in batches(texts, len):
            words = find_words(batch)
            grams.append(ngrams(words, SHARED)[0])
            short, count = short + int((words.count < SHARED).sum()), count + len(batch)
    if short:
        print(f"--decontaminate: {short:,} of {count:,} texts have fewer than {SHARED} words and are not looked for")
    return np.unique(np.concatenate(grams))


# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Scan


def scanner(grams, config):
    """Build a worker's function: a batch of (source number, text or None) -> RECORDs [D]."""

    def scan(batch):
        texts = [text or "" for _, text in batch]
        words = find_words(texts)
        records = np.zeros(len(batch), RECORD)
        records["source"] = [source for source, _ in batch]
        records["bytes"] = [len(text.encode()) for text in texts]
        records["key"] = [text_key(text) for text in texts]
        records["bands"] = signatures(words).view("<u8")
        if len(grams):
            hashes, at = ngrams(words, SHARED)
            records["verdict"][at[contains(grams, hashes)]] = VERDICTS.index("contaminated")
        for rule in reversed(RULES if config.clean else [empty]):
            records["verdict"][rule(texts, words, config)] = VERDICTS.index(rule.__name__)
        records["verdict"][[text is None for _, text in batch]] = VERDICTS.index("bad_line")
        return records

    return scan


def scan_sources(sources, grams, path, config):
    """Append the RECORDs of all documents to a file, from where it ends: any whole number of records is a state to go on from."""
    with open(path, "ab") as file:
        known = file.tell() // RECORD.itemsize
        file.truncate(known * RECORD.itemsize)
        done = int(np.fromfile(path, RECORD)["bytes"].sum(dtype=np.int64))
        progress = Progress("scan", done, sum(source.path.stat().st_size for source in sources))
        everything = ((i, text) for i, source in enumerate(sources) for text in documents(source.path, config))
        unknown = itertools.islice(everything, known, None)
        for records in in_order(scanner, (grams, config), batches(unknown, lambda item: len(item[1] or "")), config.workers):
            file.write(records.tobytes())
            file.flush()
            done += int(records["bytes"].sum(dtype=np.int64))
            progress.show(done)
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. Decide


def uniform(keys, salt):
    """float64 [D] in [0, 1): a random number that belongs to each key."""
    return stir(keys ^ stir(np.array([salt], np.uint64))) / 2.0**64


def decide(records, sources, config):
    """Choose among the scanned documents -> (verdict uint8 [D], copies to write int64 [D], held out bool [D], epochs of each source)."""
    verdict, keys = records["verdict"].copy(), records["key"].copy()
    if config.dedup != "none":
        alive = np.flatnonzero(verdict == 0)
        verdict[alive[exact_duplicates(keys[alive])]] = VERDICTS.index("exact_duplicate")
    if config.dedup == "near":
        alive = np.flatnonzero(verdict == 0)
        verdict[alive[near_duplicates(records["bands"], alive)]] = VERDICTS.index("near_duplicate")

    kept = np.bincount(records["source"], records["bytes"] * (verdict == 0), len(sources))  # bytes of each source
    if not kept.any() or sources[0].weight and not kept.all():
        gone = verdict[records["source"] == kept.argmin()]
        raise UserError(f"{sources[kept.argmin()].name}: no document is left of {len(gone)}; removed: {listed(removed(gone))}")
    epochs = np.ones(len(sources))
    if sources[0].weight:
        epochs = np.array([source.weight for source in sources]) / kept
        epochs *= config.epochs / epochs.max()
    copies = np.floor(epochs[records["source"]] + uniform(keys, config.seed + 1)).astype(np.int64) * (verdict == 0)
    verdict[(verdict == 0) & (copies == 0)] = VERDICTS.index("over_weight")

    chance = uniform(keys, 0)
    held_out = chance < config.val_fraction
    if config.val_fraction and not held_out[copies > 0].any():
        held_out = chance == chance[copies > 0].min()
    copies[held_out] = copies[held_out].clip(max=1)
    if not copies[~held_out].any():
        raise UserError(f"no document is left to train on, {copies.sum()} held out; lower --val_fraction (0: no validation), or --cut texts finer")
    return verdict, copies, held_out, epochs


def removed(verdict):
    """{verdict: number of documents} of what is not kept."""
    return dict(zip(VERDICTS[1:], np.bincount(verdict, minlength=len(VERDICTS)).tolist()[1:]))


def listed(rules):
    return ", ".join(f"{n:,} {rule}" for rule, n in rules.items() if n) or "none"


def writing_order(records, copies, held_out, shard_bytes):
    """Which document is written when, and to which shard of its split -> (document int64 [n], shard int64 [n]).

    When a tenth of the output is written, so is a tenth of each source; a source used twice is gone through twice. A shard takes shard_bytes of text.
    """
    document, share = [], []
    for source in np.unique(records["source"][copies > 0]):
        mine = np.flatnonzero((records["source"] == source) & (copies > 0))
        document.append(np.concatenate([mine[copies[mine] > n] for n in range(copies[mine].max())]))
        share.append(np.cumsum(records["bytes"][document[-1]], dtype=np.float64))
        share[-1] /= share[-1][-1]
    document, share = np.concatenate(document), np.concatenate(share)
    document = document[np.argsort(share, kind="stable")]
    shard = np.zeros(len(document), np.int64)
    for split in (False, True):
        mine = np.flatnonzero(held_out[document] == split)
        size = records["bytes"][document[mine]].astype(np.int64)
        shard[mine] = np.cumsum(np.diff((np.cumsum(size) - size) // shard_bytes, prepend=0) > 0)  # a text larger than a shard leaves no number out
    return document, shard


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Write


def read_numbered(path, numbers, config):
    """Yield the texts of a source's documents by number; where the numbers fall, the source is read from its head again."""
    texts, at = iter(()), math.inf
    for number in numbers:
        if number < at:
            texts, at = documents(path, config), 0
        yield next(itertools.islice(texts, number - at, None))
        at = number + 1


def encoder(where, dtype):
    """Build a worker's function: a batch of (split, shard, text) -> {(split, shard): (tokens, documents, bytes)}, in order."""
    tok = tokenizer.load(where)

    def encode(batch):
        pieces = {}
        for split, shard, text in batch:
            piece = pieces.setdefault((split, shard), [[], 0, 0])
            piece[0] += [tok.eot, *tok.encode_ordinary(text)]
            piece[1] += 1
            piece[2] += len(text.encode())
        return {key: (np.array(tokens, dtype), count, size) for key, (tokens, count, size) in pieces.items()}

    return encode


def write_splits(sources, records, copies, held_out, eot, dtype, config):
    """Tokenize the chosen documents to shards, all but those that are there -> {split: [manifest entry]}."""
    out, splits = Path(config.out), ("train", "val")
    done = json.loads((out / "work" / "shards.json").read_bytes())
    document, shard = writing_order(records, copies, held_out, config.shard_bytes)
    todo = shard >= np.array([len(done[split]) for split in splits])[held_out[document].astype(int)]
    document, shard = document[todo], shard[todo]
    source, first = records["source"][document], np.searchsorted(records["source"], np.arange(len(sources)))
    texts = [read_numbered(s.path, document[source == i] - first[i], config) for i, s in enumerate(sources)]
    items = ((splits[int(held_out[d])], n, next(texts[i])) for d, n, i in zip(document, shard, source))

    written, progress = 0, Progress("write", 0, int(records["bytes"][document].sum(dtype=np.int64)))
    parts = {split: [] for split in splits}
    for pieces in in_order(encoder, (config.tokenizer, dtype), batches(items, lambda item: len(item[2])), config.workers):
        for (split, number), part in pieces.items():
            if number > len(done[split]):
                finish_shard(out, split, parts[split], eot, done)
            parts[split].append(part)
            written += part[2]
        progress.show(written)
    for split in splits:
        if parts[split]:
            finish_shard(out, split, parts[split], eot, done)
    return done


def finish_shard(out, split, parts, eot, done):
    """Write one shard from its parts (tokens, documents, bytes) and enter it in `done` {split: [manifest entry]}, here and on disk."""
    tokens = np.concatenate([*(tokens for tokens, _, _ in parts), np.array([eot], parts[0][0].dtype)])
    name = f"{split}_{len(done[split]):05d}.bin"
    write_atomic(out / name, tokens)
    entry = {"file": name, "tokens": len(tokens), "documents": sum(count for _, count, _ in parts), "bytes": sum(size for _, _, size in parts)}
    done[split].append(entry | {"sha256": hashlib.sha256(tokens).hexdigest()})
    write_json(out / "work" / "shards.json", done)
    parts.clear()


# ---------------------------------------------------------------------------------------------------------------------------------
# Files, processes, progress


def write_atomic(path, data):
    """Write a file whole or not at all: under another name, to the disk for certain, then renamed."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_json(path, value):
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def batches(items, size):
    """Group items into lists of about BATCH characters, of which an item has size(item)."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item) + 100  # short documents have their price too
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def begin_worker(build, arguments):
    """First thing in each new process: make the function that `apply` applies."""
    global function
    function = build(*arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # a killed parent would leave its workers waiting for ever


def apply(item):
    return function(item)


def in_order(build, arguments, items, workers):
    """Yield build(*arguments)(item) of every item, in order, from `workers` processes, with at most two items each under way: memory is bounded."""
    if workers == 1:
        yield from map(build(*arguments), items)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=begin_worker, initargs=(build, arguments)) as pool:
        waiting = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(apply, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process died, perhaps for lack of memory; run the same command again, with fewer --workers") from None


class Progress:
    """Every ten seconds a line with the time to go, judged by the speed since `first`, where this run began."""

    def __init__(self, label, first, total):
        self.label, self.first, self.total, self.began, self.shown = label, first, total, time.monotonic(), time.monotonic()

    def show(self, done):
        now = time.monotonic()
        if now - self.shown > 10 and done > self.first:
            self.shown = now
            left = (now - self.began) / (done - self.first) * (self.total - done)
            print(f"{self.label} {done / self.total:4.0%} | eta {clock_time(left)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# The folder


def load_manifest(folder):
    """The manifest of prepared data whose shards are there and have their sizes; contents are not read. UserError names what is missing or wrong."""
    path, again = Path(folder) / "manifest.json", "prepare the data again (--overwrite=True)"
    if not path.exists():
        raise UserError(f"{folder}: no manifest.json: not prepared data, or not prepared to the end (then the same command goes on)")
    manifest = read_json(path)
    try:
        if manifest["format"] != 1:
            raise UserError(f"{path}: format {reprlib.repr(manifest['format'])}, not 1; {again}")
        if manifest["dtype"] not in ("uint16", "uint32") or not manifest["splits"]["train"]:
            raise ValueError("dtype is neither uint16 nor uint32, or there is nothing to train on")
        for entry in manifest["splits"]["train"] + manifest["splits"]["val"]:
            shard, size = inside(path, entry["file"]), entry["tokens"] * np.dtype(manifest["dtype"]).itemsize
            if not shard.exists():
                raise UserError(f"{shard}: missing; {again}")
            if shard.stat().st_size != size or not size:
                raise UserError(f"{shard}: {shard.stat().st_size} bytes, not {reprlib.repr(size)}: truncated or changed; {again}")
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(f"{path}: broken ({e!r}); {again}") from None
    return manifest


def check(folder, tok):
    """`load_manifest`, and besides: the data was made by this tokenizer, and every shard, read once, has its hash and is a stream of the tokenizer's ids."""
    manifest = load_manifest(folder)
    if manifest.get("tokenizer") != tokenizer.fingerprint(tok):
        raise UserError(f"{folder}: prepared with another tokenizer; use the one in this folder, or prepare the data again")
    for entry in manifest["splits"]["train"] + manifest["splits"]["val"]:
        if file_hash(Path(folder) / entry["file"]) != entry.get("sha256"):
            raise UserError(f"{folder}/{entry['file']}: its contents are not what was written; prepare the data again (--overwrite=True)")
        tokens = np.memmap(Path(folder) / entry["file"], manifest["dtype"], "r")
        if tokens.max() >= tok.n_vocab or not tokens[0] == tokens[-1] == tok.eot or len(tokens) < 2:
            raise UserError(f"{folder}/{entry['file']}: has ids that the tokenizer has not, or does not begin and end with the end of a document; prepare the data again (--overwrite=True)")
    return manifest


def begin(out, recipe, overwrite):
    """Make `out` ready: empty, or as an interrupted run of the same recipe left it. Returns True where such a run is complete already."""
    complete, begun = (out / "manifest.json").exists(), (out / "work" / "recipe.json").exists()
    if complete and not overwrite or begun and not complete:
        old = load_manifest(out) if complete else read_json(out / "work" / "recipe.json")
        changed = [key for part in recipe for key, value in recipe[part].items() if old.get(part, {}).get(key) != value]
        if not changed:
            return complete
        if not overwrite and (complete or old["config"] != recipe["config"]):
            raise UserError(f"{out}: made with another {' and '.join(changed)}; --overwrite=True replaces it")
        print(f"{out}: begun with another {' and '.join(changed)}, beginning again")
    elif not overwrite and {path.name for path in out.iterdir()} - {".lock", "work", "tokenizer.json", "tokenizer_config.json"}:
        raise UserError(f"{out}: holds other files; choose another --out")
    for path in [out / "manifest.json", *out.glob("train_?????.bin*"), *out.glob("val_?????.bin*")]:  # first what says the rest is whole
        path.unlink(missing_ok=True)
    shutil.rmtree(out / "work", ignore_errors=True)
    (out / "work").mkdir()
    write_json(out / "work" / "recipe.json", recipe)
    return False


def report(manifest):
    """Print what became of the documents."""
    print(f"{manifest['documents_in']:,} documents read; removed: {listed(manifest['rules'])}")
    for s in manifest["sources"]:
        print(f"{s['path']}: {s['bytes'] / 1e6:,.1f} MB read, {s['bytes_written'] / 1e6:,.1f} MB written, {s['epochs']:.3g} epochs of what is kept")
    for split, shards in manifest["splits"].items():
        count, size, tokens = (sum(shard[key] for shard in shards) for key in ("documents", "bytes", "tokens"))
        print(f"{split}: {count:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens in {len(shards)} shards")


def main(config):
    for name, good, expected in (
        ("language", config.language in ("", "en"), "en, or nothing"),
        ("dedup", config.dedup in ("none", "exact", "near"), "none, exact or near"),
        ("val_fraction", 0 <= config.val_fraction < 1, "0 or more, less than 1"),
        ("epochs", 0 < config.epochs <= 1000, "more than 0, at most 1000"),
        ("seed", 0 <= config.seed < 2**32, "0 or more, less than 2^32"),
        *((name, vars(config)[name] > 0, "1 or more") for name in ("cut", "shard_bytes", "workers")),
    ):
        if not good:
            raise UserError(f"--{name}={vars(config)[name]}: expected {expected}")
    try:
        re.compile(config.heading)
    except re.error as e:
        raise UserError(f"--heading={config.heading}: not a regular expression: {e}") from None

    # What the result depends on. A folder that depends on something else is refused.
    tok, out, work = tokenizer.load(config.tokenizer), Path(config.out), Path(config.out) / "work"
    sources = parse_sources(config.data, work)
    evaluation = [Path(name) for name in config.decontaminate.split(",") if name]
    if other := [path for path in evaluation if path.suffix not in (".txt", ".jsonl")]:
        raise UserError(f"--decontaminate: {other[0]}: expected .txt or .jsonl")
    known = {path: file_hash(path) for path in [*evaluation, *(s.path for s in sources if not s.name.startswith("hf:"))]}
    settings = {name: value for name, value in vars(config).items() if name not in ("out", "workers", "overwrite")}
    inputs = {config.tokenizer: tokenizer.fingerprint(tok)} | {str(path): digest for path, digest in known.items()}
    recipe = {"config": settings, "inputs": inputs}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: {e.strerror}") from None
    lock(out / ".lock", out)
    if begin(out, recipe, config.overwrite):
        shutil.rmtree(work, ignore_errors=True)
        print(f"{out}: complete, nothing to do")
        return
    for source in sources:
        if source.path not in known:
            if not source.path.exists():
                download(source.name, source.path)
            known[source.path] = file_hash(source.path)

    # The three passes
    if not (work / "shards.json").exists():
        scan_sources(sources, evaluation_grams(evaluation), work / "scan.bin", config)
        write_json(work / "shards.json", {"train": [], "val": []})
    if not (work / "scan.bin").stat().st_size:
        raise UserError(f"--data={config.data}: no document in it")
    records = np.memmap(work / "scan.bin", RECORD, "r")
    verdict, copies, held_out, epochs = decide(records, sources, config)
    dtype = "uint16" if tok.n_vocab <= 65536 else "uint32"
    splits = write_splits(sources, records, copies, held_out, tok.eot, dtype, config)

    amounts = None, records["bytes"], copies * records["bytes"]
    count, read, wrote = (np.bincount(records["source"], amount, len(sources)).astype(int).tolist() for amount in amounts)
    manifest = {
        "format": 1, "tokenizer": tokenizer.fingerprint(tok), "n_vocab": tok.n_vocab, "dtype": dtype, "eot": tok.eot, "splits": splits,
        "sources": [
            {"path": s.name, "sha256": known[s.path], "weight": s.weight, "documents": n, "bytes": r, "bytes_written": w, "epochs": float(e)}
            for s, n, r, w, e in zip(sources, count, read, wrote, epochs)
        ],
        "rules": removed(verdict), "repeated": int((copies - 1).clip(min=0).sum()),
        "documents_in": len(records), "documents_out": int(copies.sum()), **recipe,
    }  # fmt: skip
    tokenizer.save(tok, out)
    write_json(out / "manifest.json", manifest)  # last: it says that the rest is whole
    shutil.rmtree(work, ignore_errors=True)
    report(manifest)


if __name__ == "__main__":
    launch(main, Config)
