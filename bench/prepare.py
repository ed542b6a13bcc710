"""How fast data/prepare.py is on one core, what memory it needs, and how much it finds.

The corpus is made from WikiText-2, Shakespeare and GSM8K: passages in which a tenth of the words is
exchanged, until there is enough. Times are CPU seconds (other processes on the machine do not
count), and end to end they include starting Python. Duplicates at a Jaccard similarity of 0.85 are
windows of 189 words with 3 replaced: (185 - 15) / (185 + 15) of their 5-grams agree. The last line
of the output is JSON.

    python -m bench.prepare --texts=../shared/realdata
"""

import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import clean, prepare, tokenizer
from data.read import read_jsonl, read_text
from data.shards import load_manifest
from data.workers import batches
from runtime.cli import check_ranges, launch


@dataclass
class Config:
    # -- What you will set --
    # folder with wikitext2_valid.txt, shakespeare.txt, gsm8k_train.jsonl, gsm8k_test.jsonl
    texts: str

    # -- What you may set --
    # size of the corpus that is timed [>= 1]
    megabytes: int = 24
    # documents of the corpus that memory is measured on, about 40 words each [>= 4]
    documents: int = 200_000


def paragraphs_of(folder):
    """WikiText's paragraphs of 20 words and more."""
    return [line for line in read_text(f"{folder}/wikitext2_valid.txt").split("\n") if len(line.split()) >= 20]


def passages(folder):
    """Real texts: WikiText's paragraphs, Shakespeare's speeches by the dozen, GSM8K's problems."""
    speeches = read_text(f"{folder}/shakespeare.txt").split("\n\n")
    found = paragraphs_of(folder)
    found += ["\n\n".join(speeches[i : i + 12]) for i in range(0, len(speeches), 12)]
    return found + [f"{row['question']}\n{row['answer']}" for _, row in read_jsonl(f"{folder}/gsm8k_train.jsonl")]


def vary(text, vocabulary, rng):
    """The text with a tenth of its words exchanged for others."""
    return " ".join(rng.choice(vocabulary) if rng.random() < 0.1 else word for word in text.split(" "))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(data, tok, out, *flags):
    """Prepare in a process of its own: (manifest, CPU seconds, peak memory in bytes)."""
    command = [sys.executable, "-m", "data.prepare", f"--data={data}", f"--tokenizer={tok}", f"--out={out}", *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return load_manifest(out), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def kept(out, tok):
    """The documents in the shards of a prepared folder, as text."""
    texts = set()
    for entries in load_manifest(out)["splits"].values():
        for entry in entries:
            tokens = np.fromfile(out / entry["file"], "<u2")
            texts |= set(tok.decode(tokens.tolist()).split("<|endoftext|>"))
    return texts


def parts(path, folder, tok):
    """{part of the work: CPU seconds} for the corpus at `path`, in this process."""
    config = prepare.Config(data="", tokenizer="", out="")
    clock, seconds = time.process_time, {}

    def timed(name, function, *columns):
        begin = clock()
        result = [function(*row) for row in zip(*columns)]
        seconds[name] = seconds.get(name, 0) + clock() - begin
        return result

    begin = clock()
    texts = list(batches(prepare.documents(path, config), prepare.BATCH))
    seconds["reading, twice"] = 2 * (clock() - begin)
    grams = prepare.evaluation_grams([folder / "gsm8k_test.jsonl"])
    clean.character_kinds()
    words = timed("words", clean.find_words, texts)
    timed("rules", lambda batch, w: [rule(batch, w, config) for rule in clean.RULES], texts, words)
    keys = timed("exact duplicates", lambda batch: [clean.text_key(text) for text in batch], texts)
    signatures = timed("near duplicates", clean.signatures, words)
    timed("evaluation texts", lambda w: clean.contains(grams, clean.ngrams(w, prepare.SHARED)[0]), words)
    timed("exact duplicates", clean.exact_duplicates, [np.concatenate([np.array(k, np.uint64) for k in keys])])
    bands = np.concatenate(signatures).view("<u8")
    timed("near duplicates", clean.near_duplicates, [bands], [np.arange(len(bands))])
    timed("tokens", lambda batch: prepare.encode(tok, "uint16", [("train", 0, text) for text in batch]), texts)
    return seconds


def jaccard(a, b):
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(a & b) / len(a | b)


def twins(folder):
    """(texts, texts) of Shakespeare, pairs of a Jaccard similarity of 0.85."""
    words = re.findall(r"\w+", read_text(folder / "shakespeare.txt").lower())
    windows, changed = [], []
    for begin in range(0, len(words) - 189, 189):
        a = words[begin : begin + 189]
        b = [f"new{begin}x{i}" if i in (5, 70, 140) else word for i, word in enumerate(a)]
        if jaccard(a, b) == 0.85:
            windows.append(" ".join(a))
            changed.append(" ".join(b))
    return windows, changed


def measure_speed(path, folder, work, evaluation):
    """Prints and returns how fast everything together and each part is."""
    size = sum(len(row["text"].encode()) for _, row in read_jsonl(path))
    manifest, seconds, _ = run(path, work / "tok", work / "speed", evaluation, "--language=en")
    shares = parts(path, folder, tokenizer.load(work / "tok"))
    speed, total = size / 1e6 / seconds, sum(shares.values())
    print(f"{size / 1e6:.1f} MB: {seconds:.1f} CPU s end to end, {speed:.2f} MB/s per core; of {total:.1f} s:")
    for name, part in shares.items():
        print(f"    {name:<18} {part / total:4.0%}  {part / size * 1e9:5.1f} ns/byte")
    result = {"megabytes": size / 1e6, "cpu_seconds": seconds, "mb_per_cpu_second": speed}
    return result | {"stages": shares, "rules": manifest["rules"]}


def measure_memory(documents, vocabulary, rng, work, evaluation):
    """Prints and returns the bytes that a document adds, from a quarter of them to all."""
    peaks = []
    for count in (documents // 4, documents):
        texts = (" ".join(rng.choices(vocabulary, k=40)) for _ in range(count))
        path = write(work / f"short_{count}.jsonl", texts)
        peaks.append(run(path, work / "tok", work / f"short_{count}", evaluation, "--shard_bytes=1000000")[2])
        print(f"memory: {peaks[-1] / 1e6:.0f} MB with {count:,} documents")
    each = (peaks[1] - peaks[0]) / (documents * 3 / 4)
    print(f"memory: {each:.0f} bytes per document")
    return {"bytes_per_document": each}


def measure_findings(folder, vocabulary, rng, work, evaluation):
    """Prints and returns what is found of planted texts, and what is lost of good ones."""
    paragraphs = list(dict.fromkeys(paragraphs_of(folder)))
    windows, changed = twins(folder)
    questions = [row["question"] for _, row in read_jsonl(folder / "gsm8k_test.jsonl")]
    planted = [
        f"{rng.choice(vocabulary)} {question.upper()} {rng.choice(paragraphs)[::-1]}"
        for question in questions
        if len(question.split()) > 15
    ]
    shouted = [p.upper().replace(" ", "  ") for p in paragraphs]
    path = write(work / "found.jsonl", [*paragraphs, *shouted, *windows, *changed, *planted])
    rules = run(path, work / "tok", work / "found", evaluation)[0]["rules"]
    left = kept(work / "found", tokenizer.load(work / "tok"))
    path = write(work / "wiki.jsonl", paragraphs)
    alone = run(path, work / "tok", work / "wiki", evaluation, "--clean=False")[0]["rules"]
    result = {
        "exact_duplicates_found": 1 - len(left & set(shouted)) / len(shouted),
        "near_duplicates_found": 1 - len(left & set(changed)) / len(changed),
        "evaluation_texts_found": 1 - len(left & set(planted)) / len(planted),
        "wikitext_removed_by_rules": sum(rules[name] for name in prepare.RULES) / 2 / len(paragraphs),
        "wikitext_removed_as_duplicates": (alone["exact_duplicate"] + alone["near_duplicate"]) / len(paragraphs),
    }
    print(f"{len(paragraphs):,} paragraphs, {len(changed):,} twins, {len(planted):,} evaluation texts")
    for name, share in result.items():
        print(f"{name}: {share:.2%}")
    return result


def main(config):
    check_ranges(config)
    rng, folder, work = random.Random(0), Path(config.texts), Path(tempfile.mkdtemp())
    found = passages(folder)
    vocabulary = " ".join(found).split()
    tokenizer.save(tokenizer.train(found, 4096), work / "tok")
    evaluation = f"--decontaminate={folder / 'gsm8k_test.jsonl'}"

    texts, size = [], 0
    while size < config.megabytes * 1e6:
        texts.append(vary(rng.choice(found), vocabulary, rng))
        size += len(texts[-1].encode())
    result = measure_speed(write(work / "speed.jsonl", texts), folder, work, evaluation)
    result |= measure_memory(config.documents, vocabulary, rng, work, evaluation)
    result |= measure_findings(folder, vocabulary, rng, work, evaluation)
    print(json.dumps(result))


if __name__ == "__main__":
    launch(main, Config)
