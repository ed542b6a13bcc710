"""data/prepare.py, data/clean.py and data/read.py: what they keep, what they remove, and that a killed run ends in the same bytes."""
import json, os, random, re, subprocess, sys, time, tracemalloc
from pathlib import Path

import numpy as np
import pytest

import common
from common import UserError
from data import clean, prepare, tokenizer
from data.read import read_jsonl, read_lines, read_text

REAL = Path(__file__).parents[2] / "shared/realdata"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no real corpora here")
TEXT = "The lobster is a large animal of the sea, and it was known to the people who live by that coast long before our time."


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    tokenizer.save(tokenizer.byte_level(), folder)
    return folder


@pytest.fixture(scope="module")
def paragraphs():
    """Different paragraphs of WikiText of 20 words and more."""
    text = (REAL / "wikitext2_valid.txt").read_text(encoding="utf-8")
    return list(dict.fromkeys(line for line in text.split("\n") if len(line.split()) >= 20))


def run(tok, out, data, **flags):
    """Prepare in this process; returns the manifest."""
    try:
        prepare.main(prepare.Config(data=str(data), tokenizer=str(tok), out=str(out), **flags))
    finally:
        while common.LOCKS:  # a process holds its lock until it ends; here many runs share one
            common.LOCKS.pop().close()
    return prepare.load_manifest(out)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def stored(out, split, tok):
    """The documents of a split, decoded from its shards."""
    tok, manifest, found = tokenizer.load(tok), prepare.load_manifest(out), []
    for entry in manifest["splits"][split]:
        tokens = np.fromfile(Path(out) / entry["file"], manifest["dtype"])
        ends = np.flatnonzero(tokens == tok.eot)
        assert ends[0] == 0 and ends[-1] == len(tokens) - 1
        found += [tok.decode(tokens[a + 1 : b].tolist()) for a, b in zip(ends[:-1], ends[1:])]
    return found


def files(out):
    return {p.name: p.read_bytes() for p in Path(out).iterdir() if p.is_file() and p.name != ".lock"}


def sentences(count, seed=0, words=30):
    """Texts that have nothing in common but common words."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(("the", "of", "and")) + f" w{rng.randrange(10**6)}" for _ in range(words // 2)) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading


def test_read_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "\\u2028 \\ud83d\\ude00"}\n{"n": 1e5}')
    assert list(read_jsonl(path)) == [(1, {"text": "one"}), (4, {"text": "\u2028 \U0001f600"}), (5, {"n": 1e5})]
    (tmp_path / "raw.jsonl").write_bytes('{"text": "a\u2028b"}\n'.encode())
    assert list(read_jsonl(tmp_path / "raw.jsonl")) == [(1, {"text": "a\u2028b"})]  # U+2028 is text, only \n ends a line


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "a"', "delimiter"), (b"[1, 2]", "object was expected, not list"), (b"17", "not int"), (b'{"x": NaN}', "NaN"), (b'{"x": -Infinity}', "Infinity"),
    (b'{"text": "\xff"}', "utf-8"), (b'{"text": "\\ud800"}', "surrogate"), (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"x": ' + b"1" * 5000 + b"}", "digits"), (b'{"a": 1} {"b": 2}', "Extra data"),
])
def test_bad_lines(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:3: ") + f".*{reason}.*--skip_bad"):
        list(read_jsonl(path))
    assert list(read_jsonl(path, skip_bad=True)) == [(1, {"text": "a"}), (3, None), (4, {"text": "b"})]


def test_read_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntw\xc3\xb6")
    assert read_text(path) == "one\r\ntw\u00f6"
    assert list(read_lines(path)) == [(1, "one\r\n"), (2, "tw\u00f6")]
    path.write_bytes(b"\xef\xbb\xbfone\nabc\xffdef\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:2: byte 10 ")):
        read_text(path)
    with pytest.raises(UserError, match="none.txt: No such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="Is a directory|Permission"):
        read_text(tmp_path)


def texts_of(path, heading="", cut=10**6):
    return list(prepare.text_documents(path, heading, cut))


def test_a_text_file_becomes_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n<|endoftext|>\nfour")
    assert texts_of(path) == ["one\n\ntwo\n", "three\n", "four"]  # blank lines divide nothing
    path.write_text("intro\n = A = \nx\n = = a = = \ny\n = B = \nz\n")
    assert texts_of(path, heading=" = [^=].* = ") == ["intro\n", " = A = \nx\n = = a = = \ny\n", " = B = \nz\n"]
    path.write_text("12345678\n12\n\nnext\n\nlast\n" + "x" * 9 + "\n" + "y" * 11 + "\nend")
    cut = texts_of(path, cut=10)
    assert cut == ["12345678\n12\n\n", "next\n\nlast\n" + "x" * 9 + "\n", "y" * 11 + "\nend"]  # a blank line, else the line end past 2 * cut
    assert "".join(cut) == path.read_text()


# ---------------------------------------------------------------------------------------------------------------------------------
# Words and rules


def test_words():
    words = clean.find_words(["Don't STOP, na\u00efve r2d2!", "", "don\nt--stop", "\u6771\u4eac2020 \u0939\u093f\u0928\u094d\u0926\u0940", "...", "\u0130x stop"])
    assert words.count.tolist() == [5, 0, 3, 4, 0, 2]
    by_text = [words.hashes[a:b].tolist() for a, b in zip(words.bounds, words.bounds[1:])]
    assert by_text[0][:3] == by_text[2]  # don, t, stop: case and punctuation do not matter
    assert by_text[5][1] == by_text[0][2] and len(set(words.hashes.tolist())) == 10
    assert clean.find_words(["ab1 !?"]).letters == pytest.approx([2 / 5])


@needs_real
def test_word_hashes_are_those_of_a_plain_loop(paragraphs):
    texts = paragraphs[:200]
    words = clean.find_words(texts)
    plain = [re.findall(r"[^\W_]+", t.lower()) for t in texts]
    assert words.count.tolist() == [len(p) for p in plain]
    flat = [w for p in plain for w in p]
    assert len(set(zip(flat, words.hashes.tolist()))) == len(set(flat)) == len(set(words.hashes.tolist()))  # one hash a word, one word a hash
    grams, text = clean.ngrams(words, 5)
    expected = [(tuple(p[i : i + 5]), d) for d, p in enumerate(plain) for i in range(len(p) - 4)]
    assert text.tolist() == [d for _, d in expected]
    assert len(set(zip((g for g, _ in expected), grams.tolist()))) == len({g for g, _ in expected}) == len(set(grams.tolist()))


def broken(text, **flags):
    config = prepare.Config(data="", tokenizer="", out="", **flags)
    words = clean.find_words([text])
    return [rule.__name__ for rule in clean.RULES if rule([text], words, config)[0]]


def test_rules():
    assert broken(TEXT, language="en") == []
    assert broken("--- !!!", min_words=0) == ["empty", "few_letters"]
    assert broken("one two three") == ["too_short"] and broken("one two three", min_words=3) == []
    assert broken(TEXT, max_words=10) == ["too_long"]
    assert broken("| 12.50 | 13.75 | 14.00 | ab | 19.99 | 20.01 | 17.20") == ["few_letters"]
    assert broken("#sea #sun " + TEXT + " #fun") == ["many_marks"] and broken("### The sea\n" + TEXT + " ...") == []
    assert broken("Home and about us\n" * 3 + TEXT) == ["repeated_lines"] and broken("JOHN:\nYes.\n\n" + TEXT + "\n\nJOHN:\nIt was, by and large, so.") == []
    assert broken("buy cheap shoes now " * 12) == ["repeated_phrase"] and broken(TEXT + " one of the many, one of the few, one of the best.") == []


@pytest.mark.parametrize("text", [
    "Der Hummer ist ein großes Tier des Meeres, und die Menschen an der Küste kannten ihn lange vor unserer Zeit, denn er war in aller Munde.",
    "Le homard est un grand animal de la mer, et les gens qui vivent sur cette côte le connaissaient bien avant notre époque, on le sait.",
    "La langosta es un animal grande del mar, y la gente que vive en esa costa la conocía mucho antes de nuestro tiempo, a su manera.",
    "龙虾是一种大型海洋动物，早在我们的时代之前，住在那个海岸的人们就已经知道它了。",
])
def test_other_languages(text):
    assert broken(text, language="en") == ["not_english"] and broken(text) == []


@needs_real
def test_the_rules_leave_good_text_alone(paragraphs):
    questions = [row["question"] + "\n" + row["answer"] for _, row in read_jsonl(REAL / "gsm8k_train.jsonl")][:2000]
    play = texts_of(REAL / "shakespeare.txt", cut=4000)
    named = [p for p in paragraphs if "<unk> <unk>" not in p]  # a list of rare names, all of them written <unk>, is a repeated phrase, which it was not
    for texts, language, allowed in ((named, "", 0.001), (paragraphs, "", 0.003), (questions, "", 0.002), (play, "en", 0.0), (paragraphs, "en", 0.01)):
        words, config = clean.find_words(texts), prepare.Config(data="", tokenizer="", out="", language=language)
        gone = np.any([rule(texts, words, config) for rule in clean.RULES], axis=0)
        assert gone.mean() <= allowed, [texts[i] for i in np.flatnonzero(gone)][:5]


# ---------------------------------------------------------------------------------------------------------------------------------
# Duplicates


def grams(words):
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(a, b):
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def replace_words(words, count, seed):
    """Replace `count` words, spread over a text, by new ones: each changes five 5-grams."""
    words, step = list(words), (len(words) - 10) // max(count, 1)
    for i in range(count):
        words[5 + i * step] = f"new{seed}x{i}"
    return words


def pairs_like_this(length, changed, count):
    """`count` pairs of texts of `length` words of Shakespeare, `changed` of them replaced, whose Jaccard similarity is exactly 0.85."""
    words, pairs = re.findall(r"\w+", (REAL / "shakespeare.txt").read_text().lower()), []
    for start in range(0, len(words) - length, length):
        a = words[start : start + length]
        b = replace_words(a, changed, start)
        if jaccard(a, b) == 0.85:
            pairs.append((" ".join(a), " ".join(b)))
    assert len(pairs) >= count
    return pairs[:count]


@needs_real
@pytest.mark.parametrize("length", [25, 60, 200, 800])
def test_minhash_estimates_jaccard(paragraphs, length):
    words = re.findall(r"\w+", " ".join(paragraphs).lower())
    errors = []
    for start in range(0, 400 * 97, 97):
        a = words[start : start + length]
        b = replace_words(a, start // 97 % max(2, length // 12), start)
        s = clean.signatures(clean.find_words([" ".join(a), " ".join(b)]))
        errors.append((s[0] == s[1]).mean() - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.01 and np.sqrt(np.mean(np.square(errors))) < 0.05  # 112 independent bins would give up to 0.047


def test_signatures_of_the_very_short():
    words = clean.find_words(["one two", "One, two!", "one three", "", "one two three four five", "one two three four five", "one two three four six"])
    s = clean.signatures(words)
    assert (s[0] == s[1]).all() and (s[4] == s[5]).all()
    assert (s[0] == s[2]).mean() < 0.1 and (s[0] == s[4]).mean() < 0.1 and (s[4] == s[6]).mean() < 0.1


@needs_real
def test_planted_duplicates_are_found_and_nothing_else(tmp_path, tok, paragraphs):
    exact = [p.upper().replace(" ", "\n ") for p in paragraphs[:100]]
    near = pairs_like_this(189, 3, 300)  # (185 - 15) / (185 + 15) = 0.85
    path = write_jsonl(tmp_path / "a.jsonl", exact + paragraphs + [a for a, _ in near] + [b for _, b in near])
    rules = run(tok, tmp_path / "out", path, clean=False, val_fraction=0.0)["rules"]
    kept = set(stored(tmp_path / "out", "train", tok))
    assert rules["exact_duplicate"] == 100 and set(exact) <= kept and not kept & set(paragraphs[:100])  # of equals the first stays
    assert len(set(paragraphs[100:]) - kept) <= 0.001 * len(paragraphs)
    assert {a for a, _ in near} <= kept
    assert sum(b not in kept for _, b in near) >= 0.95 * len(near)


@needs_real
@pytest.mark.parametrize("length, changed", [(189, 3), (374, 6)])
def test_recall_at_85_percent(length, changed):
    pairs = pairs_like_this(length, changed, 400)
    signatures = clean.signatures(clean.find_words([text for pair in pairs for text in pair])).view("<u8")
    found = clean.near_duplicates(signatures, np.arange(800))
    assert found[1::2].mean() >= 0.95 and not found[::2].any()


def test_which_texts_are_compared():
    signatures = clean.signatures(clean.find_words([TEXT, "quite another text of some words here", TEXT + " So", "a third one, not like these at all"])).view("<u8")
    assert clean.near_duplicates(signatures, np.array([0, 1, 2, 3])).tolist() == [False, False, True, False]
    assert clean.near_duplicates(signatures, np.array([1, 2, 3])).tolist() == [False, False, False]
    # Three texts share one band only; two of them agree in seven of the eight minima of each other band: 99 of 112
    alike, other = np.zeros((2, clean.BINS), np.uint8), np.full(clean.BINS, 9, np.uint8)
    alike[1, 8::8], other[:8] = 7, 0
    for order, found in (((alike[0], other, alike[1]), [False, False, True]), ((other, alike[0], alike[1]), [False, False, True])):
        assert clean.near_duplicates(np.stack(order).view("<u8"), np.arange(3)).tolist() == found
    assert clean.exact_duplicates(np.array([5, 3, 5, 3, 4], np.uint64)).tolist() == [False, False, True, True, False]


def test_exact_means_exact(tmp_path, tok):
    texts = [TEXT, TEXT + " Indeed so.", "  " + TEXT.lower().replace(" ", "\t"), TEXT.replace("sea,", "sea"), *sentences(5)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    rules = [run(tok, tmp_path / dedup, path, dedup=dedup, val_fraction=0.0)["rules"] for dedup in ("none", "exact", "near")]
    assert [(r["exact_duplicate"], r["near_duplicate"]) for r in rules] == [(0, 0), (1, 0), (1, 2)]


def test_memory_per_document(tmp_path):
    """Deciding on 200,000 documents takes at most 200 bytes for each, their records included."""
    count = 200_000
    rng = np.random.default_rng(0)
    records = np.zeros(count, prepare.RECORD)
    records["bytes"], records["key"] = 100, rng.integers(0, 2**63, count)
    records["bands"] = rng.integers(0, 2**63, (count, clean.BANDS))
    records["bands"][count // 2 :: 3] = records["bands"][: count // 2 : 3][: len(records["bands"][count // 2 :: 3])]  # a sixth are duplicates
    config = prepare.Config(data="", tokenizer="", out="")
    tracemalloc.start()
    verdict, copies, held_out, _ = prepare.decide(records, [prepare.Source("a", Path("a"), 0.0)], config)
    prepare.writing_order(records, copies, held_out, 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdict.tolist().count(prepare.VERDICTS.index("near_duplicate")) == pytest.approx(count / 6, rel=0.01)
    assert records.itemsize + peak / count < 200


# ---------------------------------------------------------------------------------------------------------------------------------
# Evaluation files


def test_decontamination(tmp_path, tok, capsys):
    question = "Janet's ducks lay sixteen eggs per day; she eats three for breakfast every morning and bakes muffins with four."
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question, "turns": [{"content": "too short to find"}, {"content": " ".join(sentences(1, 9)[0].split()[:13])}]}))
    (tmp_path / "test.txt").write_text("An evaluation may be a plain text too, which is looked for as a whole, whatever its length.")
    thirteen = " ".join(sentences(1, 9)[0].split()[:13])
    planted = [
        f"{sentences(1, 1)[0]} JANET'S ducks - lay sixteen\neggs per day, She eats 'three' for breakfast every morning {sentences(1, 2)[0]}",
        f"{sentences(1, 3)[0]} {thirteen} {sentences(1, 4)[0]}",
        sentences(1, 5)[0] + " plain text too, which is looked for as a whole, whatever its length",
    ]
    innocent = [f"{sentences(1, 6)[0]} {thirteen.rsplit(' ', 1)[0]} {sentences(1, 7)[0]}", sentences(1, 8)[0] + " too short to find", TEXT]
    path = write_jsonl(tmp_path / "a.jsonl", planted + innocent)
    manifest = run(tok, tmp_path / "out", path, decontaminate=f"{tmp_path}/test.jsonl,{tmp_path}/test.txt", val_fraction=0.0)
    assert manifest["rules"]["contaminated"] == 3 and stored(tmp_path / "out", "train", tok) == innocent
    assert "1 of 4 texts have fewer than 13 words" in capsys.readouterr().out


@needs_real
def test_planted_evaluation_text_is_found(tmp_path, tok, paragraphs):
    questions = [row["question"] for _, row in read_jsonl(REAL / "gsm8k_test.jsonl")][:300]
    planted = [f"{p} {q} {p[::-1]}" for p, q in zip(paragraphs, questions) if len(q.split()) > 13]
    path = write_jsonl(tmp_path / "a.jsonl", planted + paragraphs)
    manifest = run(tok, tmp_path / "out", path, decontaminate=str(REAL / "gsm8k_test.jsonl"), clean=False, dedup="none", val_fraction=0.0)
    assert manifest["rules"]["contaminated"] == len(planted)
    assert stored(tmp_path / "out", "train", tok) == paragraphs


# ---------------------------------------------------------------------------------------------------------------------------------
# Weights, split, shards


def test_kept_documents_come_back(tmp_path, tok):
    texts = [f"{s} \u00e4\u00f6\u00fc \U0001f980 <|endoftext|> tail\n" for s in sentences(300)] + ["short", "", "!!!", "short"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run(tok, tmp_path / "out", path, shard_bytes=10_000, val_fraction=0.2)
    train, val = stored(tmp_path / "out", "train", tok), stored(tmp_path / "out", "val", tok)
    assert sorted(train + val) == sorted(texts[:300]) and train == [t for t in texts if t in set(train)]  # one source: its order
    assert len(manifest["splits"]["train"]) > 3 and (manifest["documents_in"], manifest["documents_out"]) == (304, 300)
    assert manifest["rules"] == {v: {"empty": 2, "too_short": 2}.get(v, 0) for v in prepare.VERDICTS[1:]}
    assert manifest["sources"][0]["documents"] == 304 and manifest["sources"][0]["bytes"] == len("".join(texts).encode())
    for split, documents in (("train", train), ("val", val)):
        assert sum(e["documents"] for e in manifest["splits"][split]) == len(documents)
        assert sum(e["bytes"] for e in manifest["splits"][split]) == len("".join(documents).encode())
    assert all(e["bytes"] < 10_000 + max(len(t.encode()) for t in texts) for e in manifest["splits"]["train"])
    assert tokenizer.fingerprint(tokenizer.load(tmp_path / "out")) == manifest["tokenizer"] == tokenizer.fingerprint(tokenizer.load(tok))
    assert not (tmp_path / "out" / "work").exists()


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    big = tokenizer.Tokenizer("big", tokenizer.PATTERN, {bytes([b]): b for b in range(256)}, {s: 70_000 + i for i, s in enumerate(tokenizer.SPECIALS)})
    tokenizer.save(big, tmp_path / "tok")
    manifest = run(tmp_path / "tok", tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", sentences(20)), val_fraction=0.0)
    assert manifest["dtype"] == "uint32" and stored(tmp_path / "out", "train", tmp_path / "tok") == sentences(20)


def test_the_split_depends_on_the_text_alone(tmp_path, tok):
    texts = sentences(400)
    run(tok, tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", texts), val_fraction=0.1)
    val = set(stored(tmp_path / "a", "val", tok))
    assert 20 <= len(val) <= 62
    more = texts[::-1] + sentences(100, seed=1)
    run(tok, tmp_path / "b", write_jsonl(tmp_path / "b.jsonl", more), val_fraction=0.1, seed=7)
    assert set(stored(tmp_path / "b", "val", tok)) & set(texts) == val
    # Duplicates never straddle, even where they are kept
    run(tok, tmp_path / "c", write_jsonl(tmp_path / "c.jsonl", texts + [t.upper() for t in texts]), val_fraction=0.1, dedup="none")
    both = stored(tmp_path / "c", "val", tok)
    assert set(both) == val | {t.upper() for t in val} and len(both) == 2 * len(val)


def test_one_document_at_least_is_held_out(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(5))
    assert run(tok, tmp_path / "one", path, val_fraction=0.001)["splits"]["val"][0]["documents"] == 1
    assert run(tok, tmp_path / "none", path, val_fraction=0.0)["splits"]["val"] == []


def test_weights_are_shares_of_the_text(tmp_path, tok):
    a, b = sentences(400, seed=1), sentences(1600, seed=2)
    for name, texts in (("a", a), ("b", b)):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    data = f"{tmp_path}/a.jsonl:0.7,{tmp_path}/b.jsonl:.3"
    manifest = run(tok, tmp_path / "1", data, val_fraction=0.0)
    train = stored(tmp_path / "1", "train", tok)
    from_a = [t in set(a) for t in train]
    assert sum(from_a) == 400 and np.mean(from_a) == pytest.approx(0.7, abs=0.03)  # a is the one that is short, so it is used once, whole
    assert manifest["rules"]["over_weight"] == 2000 - len(train) and len(set(train)) == len(train)
    tenths = [np.mean(part) for part in np.array_split(from_a, 10)]
    assert min(tenths) > 0.6 and max(tenths) < 0.8  # evenly interleaved
    # Another seed chooses other documents of b; the same seed the same
    run(tok, tmp_path / "2", data, val_fraction=0.0, seed=1)
    other = stored(tmp_path / "2", "train", tok)
    assert set(other) & set(a) == set(a) and len(set(other) & set(train) & set(b)) < 0.25 * len(b)
    # Two and a half epochs of a
    manifest = run(tok, tmp_path / "3", data, val_fraction=0.1, epochs=2.5)
    counts = {t: stored_count for t, stored_count in zip(*np.unique(stored(tmp_path / "3", "train", tok), return_counts=True))}
    of_a = [counts.get(t, 0) for t in a if t in counts]
    assert set(of_a) == {2, 3} and np.mean(of_a) == pytest.approx(2.5, abs=0.1)
    val = stored(tmp_path / "3", "val", tok)
    assert len(val) == len(set(val)) and not set(val) & set(counts)
    assert manifest["documents_in"] - sum(manifest["rules"].values()) + manifest["repeated"] == manifest["documents_out"] == len(val) + sum(counts.values())


def test_workers_change_nothing(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(3000, words=60))
    for workers in (1, 2):
        run(tok, tmp_path / str(workers), path, workers=workers, shard_bytes=400_000)
    assert files(tmp_path / "1") == files(tmp_path / "2") and len(files(tmp_path / "1")) >= 5


def test_an_error_in_a_worker_reaches_the_user(tmp_path, tok):
    path, letters = write_jsonl(tmp_path / "a.jsonl", sentences(50)), tmp_path / "letters"
    tokenizer.save(tokenizer.characters("abcdefghijklmnopqrstuvwxyz "), letters)
    with pytest.raises(UserError, match="not in the vocabulary"):
        run(letters, tmp_path / "out", path, workers=2)


def test_bad_lines_are_counted(tmp_path, tok):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": t}) for t in sentences(20)] + ["{broken", '{"text": 5}', '{"other": "x"}', ""]))
    with pytest.raises(UserError, match=r"a.jsonl:21: "):
        run(tok, tmp_path / "out", path)
    manifest = run(tok, tmp_path / "skip", path, skip_bad=True)
    assert manifest["rules"]["bad_line"] == 3 and manifest["documents_out"] == 20 and manifest["documents_in"] == 23
    path.write_text("\n".join([json.dumps({"text": t}) for t in sentences(20)] + ['{"text": 5}']))
    with pytest.raises(UserError, match=r'a.jsonl:21: no string "text"'):
        run(tok, tmp_path / "out", path, overwrite=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# What the user can mend


@pytest.mark.parametrize("data, says", [
    ("{d}/a.jsonl:much", "a.jsonl:much.*weight 'much'"), ("{d}/a.jsonl:0", "weight '0'"), ("{d}/a.jsonl:-1", "weight '-1'"), ("{d}/a.jsonl:", "weight ''"),
    ("{d}/a.jsonl:nan", "weight 'nan'"), ("{d}/a.jsonl:1e999", "weight '1e999'"), ("{d}/a.jsonl:1,{d}/b.jsonl", "b.jsonl has no weight"),
    ("{d}/a.jsonl,{d}/a.jsonl", "a.jsonl is named twice"), ("{d}/a.csv", "a.csv.*expected FILE.txt"), ("", "expected FILE.txt"), ("{d}/a.jsonl,", "''"),
    ("{d}/missing.jsonl", "missing.jsonl: No such file"), ("{d}/empty.jsonl", "no document in it"), ("{d}/short.jsonl", "short.jsonl: no document is left of 1.*1 too_short"),
    ("{d}/a.jsonl:1,{d}/short.jsonl:1", "short.jsonl: no document is left"), ("{d}/latin1.txt", "latin1.txt:2: byte 6 "), ("{d}/one.jsonl", "no document is left to train on"),
])
def test_data_errors(tmp_path, tok, data, says):
    write_jsonl(tmp_path / "a.jsonl", sentences(5))
    write_jsonl(tmp_path / "b.jsonl", sentences(5, 1))
    write_jsonl(tmp_path / "short.jsonl", ["too short"])
    write_jsonl(tmp_path / "one.jsonl", [TEXT])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin1.txt").write_bytes("one\nab\xfc\n".encode("latin-1"))
    with pytest.raises(UserError, match=says):
        run(tok, tmp_path / "out", data.format(d=tmp_path))


def test_flag_errors(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(5))
    for flags in (dict(language="de"), dict(dedup="fuzzy"), dict(val_fraction=1.0), dict(epochs=0.0), dict(workers=0), dict(cut=0), dict(seed=-1), dict(heading="(")):
        (name, value), = flags.items()
        with pytest.raises(UserError, match=re.escape(f"--{name}={value}: ")):
            run(tok, tmp_path / "out", path, **flags)
    with pytest.raises(UserError, match="x.csv: expected .txt or .jsonl"):
        run(tok, tmp_path / "out", path, decontaminate="x.csv")
    with pytest.raises(UserError, match="x.txt: No such file"):
        run(tok, tmp_path / "out", path, decontaminate="x.txt")
    with pytest.raises(UserError, match="a.jsonl: "):
        run(tok, path, path)
    assert not (tmp_path / "out").exists()


def test_hugging_face_names(tmp_path):
    sources = prepare.parse_sources("hf:org/name[sample-10BT,train,5]:0.5,a.txt:.5", tmp_path)
    assert sources == [("hf:org/name[sample-10BT,train,5]", tmp_path / "hf_0.jsonl", 0.5), ("a.txt", Path("a.txt"), 0.5)]
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"hf:org/name: needs the package `datasets`: pip install -e '.\[data\]'"):
            prepare.download("hf:org/name", tmp_path / "x.jsonl")


# ---------------------------------------------------------------------------------------------------------------------------------
# Interrupted, repeated, damaged


class Crash(BaseException):
    pass


def test_a_run_may_die_before_any_rename(tmp_path, tok, monkeypatch):
    """Every state that a kill can leave differs from another by one rename, or by where scan.bin ends: die before each rename in turn."""
    path = write_jsonl(tmp_path / "a.jsonl", sentences(200))
    flags = dict(shard_bytes=10_000, val_fraction=0.2)
    run(tok, tmp_path / "whole", path, **flags)
    replace, monkey = os.replace, {"left": 0}

    def dying(a, b):
        monkey["left"] -= 1
        if monkey["left"] < 0:
            raise Crash
        replace(a, b)

    monkeypatch.setattr(os, "replace", dying)
    for survived in range(100):
        out, monkey["left"] = tmp_path / f"out{survived}", survived
        try:
            run(tok, out, path, **flags)
            break
        except Crash:
            pass
        if (out / "work" / "scan.bin").exists():
            with open(out / "work" / "scan.bin", "rb+") as f:  # as if it had died in the middle of a record
                f.truncate((out / "work" / "scan.bin").stat().st_size if (out / "work" / "shards.json").exists() else 12_345)
        monkey["left"] = 10**6
        run(tok, out, path, **flags)
        assert files(out) == files(tmp_path / "whole"), survived
    assert survived > 8  # recipe, shards.json, and two a shard


@needs_real
@pytest.mark.skipif(sys.platform != "linux", reason="looks for workers in /proc")
def test_kill_9_and_go_on(tmp_path, tok, paragraphs):
    rng = random.Random(0)
    path = write_jsonl(tmp_path / "a.jsonl", [p + f" {rng.random()} {rng.random()}" for p in paragraphs * 4])
    flags = [f"--data={path}", f"--tokenizer={tok}", f"--out={tmp_path}/out", "--dedup=exact", "--shard_bytes=100000", "--workers=2"]
    out, scan = tmp_path / "out", tmp_path / "out" / "work" / "scan.bin"

    def start():
        return subprocess.Popen([sys.executable, "-m", "data.prepare", *flags], cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)

    for reached in (lambda: scan.exists() and scan.stat().st_size > 200_000, lambda: (out / "train_00007.bin").exists()):
        process = start()
        while not reached():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers):  # a killed parent leaves none behind
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (out / "manifest.json").exists()
    assert start().wait() == 0
    run(tok, tmp_path / "whole", path, dedup="exact", shard_bytes=100_000)
    assert files(out) == files(tmp_path / "whole")


def test_another_recipe_is_refused(tmp_path, tok):
    path, out = write_jsonl(tmp_path / "a.jsonl", sentences(50)), tmp_path / "out"
    first = run(tok, out, path)
    assert run(tok, out, path, workers=2) == first  # complete: nothing to do
    with pytest.raises(UserError, match=f"{out}: made with another seed; --overwrite=True"):
        run(tok, out, path, seed=1)
    with pytest.raises(UserError, match="another epochs and min_words"):
        run(tok, out, path, epochs=2.0, min_words=3)
    write_jsonl(path, sentences(51))
    with pytest.raises(UserError, match=f"another {re.escape(str(path))}; --overwrite"):
        run(tok, out, path)
    other = tmp_path / "tok"
    tokenizer.save(tokenizer.characters("abcdefghijklmnopqrstuvwxyz0123456789 "), other)
    write_jsonl(path, sentences(50))
    (out / "train_00007.bin").write_bytes(b"of a larger run before")
    replaced = run(other, out, path, overwrite=True)
    assert replaced["tokenizer"] != first["tokenizer"] and not (out / "train_00007.bin").exists()
    run(other, tmp_path / "fresh", path)
    assert files(out) == files(tmp_path / "fresh")


def test_an_interrupted_run_of_another_recipe(tmp_path, tok):
    path, out = write_jsonl(tmp_path / "a.jsonl", sentences(50)), tmp_path / "out"
    good = path.read_text()
    path.write_text(good + "{broken\n")
    with pytest.raises(UserError, match=":51: "):
        run(tok, out, path)
    with pytest.raises(UserError, match="made with another skip_bad"):
        run(tok, out, path, skip_bad=True)
    path.write_text(good)
    assert run(tok, out, path)["documents_in"] == 50  # the line was mended, as the error asked: the same command begins again
    path.write_text(good + "{broken\n")
    assert run(tok, out, path, skip_bad=True, overwrite=True)["rules"]["bad_line"] == 1


def test_a_strangers_folder_is_left_alone(tmp_path, tok):
    path, out = write_jsonl(tmp_path / "a.jsonl", sentences(50)), tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    (out / "notes" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="out: holds other files"):
        run(tok, out, path)
    run(tok, out, path, overwrite=True)
    run(tok, out, path, overwrite=True)
    assert (out / "notes" / "thesis.txt").read_text() == "ten years of work"


def test_two_processes_do_not_share_a_folder(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(50))
    (tmp_path / "out").mkdir()
    common.lock(tmp_path / "out/.lock", tmp_path / "out")
    with pytest.raises(UserError, match="another process"):
        run(tok, tmp_path / "out", path)


@pytest.mark.parametrize("damage, says", [
    (lambda out: (out / "train_00001.bin").unlink(), "train_00001.bin: missing"),
    (lambda out: (out / "train_00001.bin").write_bytes((out / "train_00001.bin").read_bytes()[:-2]), r"train_00001.bin: \d+ bytes, not \d+: truncated"),
    (lambda out: flip(out / "train_00001.bin"), "train_00001.bin: its contents are not what was written"),
    (lambda out: flip(out / "val_00000.bin"), "val_00000.bin: its contents are not what was written"),
    (lambda out: (out / "manifest.json").unlink(), "no manifest.json"),
    (lambda out: (out / "manifest.json").write_text("{"), "manifest.json: not valid JSON"),
    (lambda out: (out / "manifest.json").write_text("[]"), "manifest.json: a JSON object was expected"),
    (lambda out: edit(out, format=2), "manifest.json: format 2, not 1"),
    (lambda out: edit(out, splits={"train": [{}], "val": []}), "manifest.json: broken"),
    (lambda out: edit(out, dtype="no such"), "manifest.json: broken"),
    (lambda out: edit(out, tokenizer="0" * 64), "prepared with another tokenizer"),
])
def test_damage_is_noticed(tmp_path, tok, damage, says):
    out = tmp_path / "out"
    manifest = run(tok, out, write_jsonl(tmp_path / "a.jsonl", sentences(100)), shard_bytes=10_000, val_fraction=0.1)
    assert prepare.check(out, tokenizer.load(tok)) == manifest
    damage(out)
    with pytest.raises(UserError, match=says):
        prepare.check(out, tokenizer.load(tok))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(out, **values):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | values))


def test_check_refuses_another_tokenizer(tmp_path, tok):
    run(tok, tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", sentences(20)))
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        prepare.check(tmp_path / "out", tokenizer.characters("abc"))
