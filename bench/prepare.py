"""How fast data/prepare.py is on one core with everything on, what it needs of memory, and how much of what it should find it finds.

The corpus is made from WikiText-2, Shakespeare and GSM8K: passages in which a tenth of the words is exchanged, until there is enough. Times are CPU seconds
(other people's processes on the machine do not count), and end to end include starting Python. Duplicates at a Jaccard similarity of 0.85 are windows of
189 words with 3 replaced: (185 - 15) / (185 + 15) of their 5-grams agree. Last line of output: JSON.

    python -m bench.prepare --texts=../shared/realdata
"""
import json, random, re, resource, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import launch
from data import clean, prepare, tokenizer
from data.read import read_jsonl, read_text


@dataclass
class Config:
    texts: str  # folder with wikitext2_valid.txt, shakespeare.txt, gsm8k_train.jsonl, gsm8k_test.jsonl
    megabytes: int = 24  # of the corpus that is timed
    documents: int = 200_000  # of the corpus that memory is measured on, about 40 words each


def passages(folder):
    """Real texts: WikiText's paragraphs, Shakespeare's speeches by the dozen, GSM8K's problems with their answers."""
    speeches = read_text(f"{folder}/shakespeare.txt").split("\n\n")
    found = [line for line in read_text(f"{folder}/wikitext2_valid.txt").split("\n") if len(line.split()) >= 20]
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
    return prepare.load_manifest(out), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def kept(out, tok):
    """The documents in the shards of a prepared folder, as text."""
    texts = set()
    for entries in prepare.load_manifest(out)["splits"].values():
        for entry in entries:
            tokens = np.fromfile(out / entry["file"], "<u2")
            texts |= set(tok.decode(tokens.tolist()).split("<|endoftext|>"))
    return texts


def stages(path, folder, where):
    """{stage: CPU seconds} of the corpus at `path`, each by itself, in this process."""
    config = prepare.Config(data="", tokenizer="", out="")
    clock, seconds = time.process_time, {}

    def timed(name, function, *columns):
        begin = clock()
        result = [function(*row) for row in zip(*columns)]
        seconds[name] = seconds.get(name, 0) + clock() - begin
        return result

    begin = clock()
    batches = list(prepare.batches(prepare.documents(path, config), len))
    seconds["reading, twice"] = 2 * (clock() - begin)
    grams = prepare.evaluation_grams([folder / "gsm8k_test.jsonl"])
    clean.character_kinds()
    words = timed("words", clean.find_words, batches)
    for rule in clean.RULES:
        timed("rules", lambda texts, w: rule(texts, w, config), batches, words)
    keys = timed("exact duplicates", lambda texts: [clean.text_key(text) for text in texts], batches)
    signatures = timed("near duplicates", clean.signatures, words)
    timed("evaluation texts", lambda w: clean.contains(grams, clean.ngrams(w, prepare.SHARED)[0]), words)
    timed("exact duplicates", clean.exact_duplicates, [np.concatenate([np.array(k, np.uint64) for k in keys])])
    bands = np.concatenate(signatures).view("<u8")
    timed("near duplicates", clean.near_duplicates, [bands], [np.arange(len(bands))])
    encode = prepare.encoder(where, "uint16")
    timed("tokens", lambda texts: encode([("train", 0, text) for text in texts]), batches)
    return seconds


def main(config):
    rng, folder, work = random.Random(0), Path(config.texts), Path(tempfile.mkdtemp())
    found = passages(folder)
    vocabulary = " ".join(found).split()
    where = work / "tok"
    tokenizer.save(tokenizer.train(found, 4096), where)
    tok = tokenizer.load(where)
    evaluation = f"--decontaminate={folder / 'gsm8k_test.jsonl'}"

    # Speed, everything on
    texts, size = [], 0
    while size < config.megabytes * 1e6:
        texts.append(vary(rng.choice(found), vocabulary, rng))
        size += len(texts[-1].encode())
    path = write(work / "speed.jsonl", texts)
    manifest, seconds, _ = run(path, where, work / "speed", evaluation, "--language=en")
    shares = stages(path, folder, where)
    result = {"megabytes": size / 1e6, "cpu_seconds": seconds, "mb_per_cpu_second": size / 1e6 / seconds}
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB: {seconds:.1f} CPU s end to end, {size / 1e6 / seconds:.2f} MB/s a core; of {sum(shares.values()):.1f} s:")
    for name, part in shares.items():
        print(f"    {name:<18} {part / sum(shares.values()):4.0%}  {part / size * 1e9:5.1f} ns/byte")
    result |= {"stages": shares, "rules": manifest["rules"]}

    # Memory: what documents add, from a quarter of them to all
    peaks = []
    for count in (config.documents // 4, config.documents):
        short = write(work / f"short_{count}.jsonl", (" ".join(rng.choices(vocabulary, k=40)) for _ in range(count)))
        peaks.append(run(short, where, work / f"short_{count}", evaluation, "--shard_bytes=1000000")[2])
    result["bytes_per_document"] = (peaks[1] - peaks[0]) / (config.documents * 3 / 4)
    print(f"memory: {peaks[0] / 1e6:.0f} MB with {config.documents // 4:,} documents, {peaks[1] / 1e6:.0f} MB with {config.documents:,}: {result['bytes_per_document']:.0f} bytes each")

    # What is found: planted duplicates, planted evaluation texts; and what is lost of WikiText's paragraphs
    paragraphs = list(dict.fromkeys(line for line in read_text(folder / "wikitext2_valid.txt").split("\n") if len(line.split()) >= 20))
    words = re.findall(r"\w+", read_text(folder / "shakespeare.txt").lower())
    windows = [words[i : i + 189] for i in range(0, len(words) - 189, 189)]
    twins = [[f"new{i}x{j}" if j in (5, 70, 140) else word for j, word in enumerate(window)] for i, window in enumerate(windows)]
    windows, twins = zip(*((" ".join(a), " ".join(b)) for a, b in zip(windows, twins) if jaccard(a, b) == 0.85))
    questions = [row["question"] for _, row in read_jsonl(folder / "gsm8k_test.jsonl") if len(row["question"].split()) > 15]
    planted = [f"{rng.choice(vocabulary)} {question.upper()} {rng.choice(paragraphs)[::-1]}" for question in questions]
    shouted = [p.upper().replace(" ", "  ") for p in paragraphs]
    path = write(work / "found.jsonl", [*paragraphs, *shouted, *windows, *twins, *planted])
    manifest, _, _ = run(path, where, work / "found", evaluation)
    left = kept(work / "found", tok)
    for name, share in (
        ("exact_duplicates_found", 1 - len(left & set(shouted)) / len(shouted)),
        ("near_duplicates_found", 1 - len(left & set(twins)) / len(twins)),
        ("evaluation_texts_found", 1 - len(left & set(planted)) / len(planted)),
        ("wikitext_removed_by_rules", sum(manifest["rules"][rule.__name__] for rule in clean.RULES) / 2 / len(paragraphs)),
    ):
        result[name] = share
        print(f"{name}: {share:.2%}")
    manifest, _, _ = run(write(work / "wiki.jsonl", paragraphs), where, work / "wiki", evaluation, "--clean=False")
    result["wikitext_removed_as_duplicates"] = (manifest["rules"]["exact_duplicate"] + manifest["rules"]["near_duplicate"]) / len(paragraphs)
    print(f"wikitext_removed_as_duplicates: {result['wikitext_removed_as_duplicates']:.2%} of {len(paragraphs):,}, {len(twins):,} twins, {len(planted):,} evaluation texts")
    print(json.dumps(result))


def jaccard(a, b):
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(a & b) / len(a | b)


if __name__ == "__main__":
    launch(main, Config)
