"""Preparing text: what is kept, what is removed, and that a killed run ends in the same bytes."""

import hashlib
import importlib.util
import json
import random
import re
import shutil
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data import clean, prepare, shards, tokenizer
from data.read import read_jsonl, read_lines, read_text
from runtime import files as runtime_files
from runtime.errors import UserError
from runtime.files import LOCKS, lock_file

REAL = Path(__file__).parents[2] / "shared/realdata"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no real corpora here")
TEXT = "The lobster is a large animal of the sea, and it was known to the people who live by that coast "
TEXT += "long before our time."


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    tokenizer.save(tokenizer.byte_level(), folder)
    return folder


@pytest.fixture(scope="module")
def paragraphs():
    """Different paragraphs of WikiText, of 20 words and more."""
    text = (REAL / "wikitext2_valid.txt").read_text(encoding="utf-8")
    return list(dict.fromkeys(line for line in text.split("\n") if len(line.split()) >= 20))


def run(tok, out, data, **flags):
    """Prepare in this process; returns the manifest."""
    try:
        prepare.main(prepare.Config(data=str(data), tokenizer=str(tok), out=str(out), **flags))
    finally:
        while LOCKS:  # a process holds its lock until it ends; here many runs share one
            LOCKS.pop().close()
    return shards.load_manifest(out)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def stored(out, split, tok):
    """The documents of a split, decoded from its shards."""
    tok, manifest, found = tokenizer.load(tok), shards.load_manifest(out), []
    for entry in manifest["splits"][split]:
        tokens = np.fromfile(Path(out) / entry["file"], manifest["dtype"])
        ends = np.flatnonzero(tokens == tok.eot)
        assert ends[0] == 0 and ends[-1] == len(tokens) - 1
        found += [tok.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]
    return found


def files(out):
    return {p.name: p.read_bytes() for p in Path(out).iterdir() if p.is_file() and p.name != ".lock"}


def sentences(count, seed=0, words=30):
    """Texts that have nothing in common but common words."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(("the", "of", "and")) + f" w{rng.randrange(10**6)}" for _ in range(words // 2))
        for _ in range(count)
    ]


# -------------------------------------------------------------------------------------------------
# Reading


def test_read_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "\\u2028 \\ud83d\\ude00"}\n{"n": 1e5}')
    assert list(read_jsonl(path)) == [(1, {"text": "one"}), (4, {"text": "\u2028 \U0001f600"}), (5, {"n": 1e5})]
    (tmp_path / "raw.jsonl").write_bytes('{"text": "a\u2028b"}\n'.encode())
    # U+2028 is text, only \n ends a line
    assert list(read_jsonl(tmp_path / "raw.jsonl")) == [(1, {"text": "a\u2028b"})]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a"', "delimiter"),
        (b"[1, 2]", "object was expected, not list"),
        (b"17", "not int"),
        (b'{"x": NaN}', "NaN"),
        (b'{"x": -Infinity}', "Infinity"),
        (b'{"text": "\xff"}', "utf-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"x": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
    ],
)
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
    cut = texts_of(path, cut=10)  # at a blank line, or at the line end past 2 * cut
    assert cut == ["12345678\n12\n\n", "next\n\nlast\n" + "x" * 9 + "\n", "y" * 11 + "\nend"]
    assert "".join(cut) == path.read_text()


# -------------------------------------------------------------------------------------------------
# Words and rules


def test_words():
    texts = [
        "Don't STOP, na\u00efve r2d2!",
        "",
        "don\nt--stop",
        "\u6771\u4eac2020 \u0939\u093f\u0928\u094d\u0926\u0940",
    ]
    words = clean.find_words([*texts, "...", "\u0130x stop"])
    assert words.count.tolist() == [5, 0, 3, 4, 0, 2]
    by_text = [words.hashes[a:b].tolist() for a, b in pairwise(words.bounds)]
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
    assert one_to_one(flat, words.hashes.tolist())
    grams, text = clean.ngrams(words, 5)
    expected = [(tuple(p[i : i + 5]), d) for d, p in enumerate(plain) for i in range(len(p) - 4)]
    assert text.tolist() == [d for _, d in expected]
    assert one_to_one([gram for gram, _ in expected], grams.tolist())


def one_to_one(a, b):
    return len(set(zip(a, b))) == len(set(a)) == len(set(b))


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
    assert broken("#sea #sun " + TEXT + " #fun") == ["many_marks"]
    assert broken("### The sea\n" + TEXT + " ...") == []
    assert broken("Home and about us\n" * 3 + TEXT) == ["repeated_lines"]
    assert broken("JOHN:\nYes.\n\n" + TEXT + "\n\nJOHN:\nIt was, by and large, so.") == []
    assert broken("buy cheap shoes now " * 12) == ["repeated_phrase"]
    assert broken(TEXT + " one of the many, one of the few, one of the best.") == []


@pytest.mark.parametrize(
    "text",
    [
        "Der Hummer ist ein großes Tier des Meeres, und die Menschen an der Küste kannten ihn lange vor unserer Zeit.",
        "Le homard est un grand animal de la mer, et les gens de cette côte le connaissaient bien avant notre époque.",
        "La langosta es un animal grande del mar, y la gente que vive en esa costa la conocía mucho antes.",
        "龙虾是一种大型海洋动物，早在我们的时代之前，住在那个海岸的人们就已经知道它了。",
    ],
)
def test_other_languages(text):
    assert broken(text, language="en") == ["not_english"] and broken(text) == []


@needs_real
def test_the_rules_leave_good_text_alone(paragraphs):
    questions = [row["question"] + "\n" + row["answer"] for _, row in read_jsonl(REAL / "gsm8k_train.jsonl")][:2000]
    play = texts_of(REAL / "shakespeare.txt", cut=4000)
    # a list of rare names, all of them written <unk>, is a repeated phrase, which it was not
    named = [p for p in paragraphs if "<unk> <unk>" not in p]
    for texts, language, allowed in (
        (named, "", 0.001),
        (paragraphs, "", 0.003),
        (questions, "", 0.002),
        (play, "en", 0.0),
        (paragraphs, "en", 0.01),
    ):
        words, config = clean.find_words(texts), prepare.Config(data="", tokenizer="", out="", language=language)
        gone = np.any([rule(texts, words, config) for rule in clean.RULES], axis=0)
        assert gone.mean() <= allowed, [texts[i] for i in np.flatnonzero(gone)][:5]


# -------------------------------------------------------------------------------------------------
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
    """`count` pairs of texts of `length` words of Shakespeare, whose Jaccard similarity is 0.85.

    The second of a pair has `changed` of its words replaced.
    """
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
    texts, exact = [], []
    for i in range(200):
        a = words[97 * i : 97 * i + length]
        b = replace_words(a, i % max(2, length // 12), i)
        texts += [" ".join(a), " ".join(b)]
        exact.append(jaccard(a, b))
    signatures = clean.signatures(clean.find_words(texts))
    errors = (signatures[::2] == signatures[1::2]).mean(1) - exact
    # 112 independent bins would give a standard deviation of up to 0.047
    assert abs(np.mean(errors)) < 0.01 and np.sqrt(np.mean(np.square(errors))) < 0.05


def test_signatures_of_the_very_short():
    five = "one two three four five"
    texts = ["one two", "One, two!", "one three", "", five, five, "one two three four six"]
    words = clean.find_words(texts)
    s = clean.signatures(words)
    assert (s[0] == s[1]).all() and (s[4] == s[5]).all()
    assert (s[0] == s[2]).mean() < 0.1 and (s[0] == s[4]).mean() < 0.1 and (s[4] == s[6]).mean() < 0.1


@needs_real
def test_planted_duplicates_are_found_and_nothing_else(tmp_path, tok, paragraphs):
    paragraphs = paragraphs[:700]
    exact = [p.upper().replace(" ", "\n ") for p in paragraphs[:100]]
    near = pairs_like_this(189, 3, 120)  # (185 - 15) / (185 + 15) = 0.85
    path = write_jsonl(tmp_path / "a.jsonl", exact + paragraphs + [a for a, _ in near] + [b for _, b in near])
    rules = run(tok, tmp_path / "out", path, clean=False, val_fraction=0.0)["rules"]
    kept = set(stored(tmp_path / "out", "train", tok))
    assert rules["exact_duplicate"] == 100
    assert set(exact) <= kept and not kept & set(paragraphs[:100])  # of equals the first stays
    assert len(set(paragraphs[100:]) - kept) <= 1
    assert {a for a, _ in near} <= kept
    assert sum(b not in kept for _, b in near) >= 0.95 * len(near)


@needs_real
@pytest.mark.parametrize("length, changed", [(189, 3), (374, 6)])
def test_recall_at_85_percent(length, changed):
    pairs = pairs_like_this(length, changed, 400)
    signatures = clean.signatures(clean.find_words([text for pair in pairs for text in pair]))
    found = clean.near_duplicates(signatures.view("<u8"), np.arange(800))
    assert found[1::2].mean() >= 0.95 and not found[::2].any()


def test_which_texts_are_compared():
    texts = [TEXT, "quite another text of some words here", TEXT + " So", "a third one, not like these at all"]
    signatures = clean.signatures(clean.find_words(texts)).view("<u8")
    assert clean.near_duplicates(signatures, np.array([0, 1, 2, 3])).tolist() == [False, False, True, False]
    assert clean.near_duplicates(signatures, np.array([1, 2, 3])).tolist() == [False, False, False]
    # Three texts share one band only; two of them agree in seven of the eight minima of each other
    # band: 99 of 112
    alike, other = np.zeros((2, clean.BINS), np.uint8), np.full(clean.BINS, 9, np.uint8)
    alike[1, 8::8], other[:8] = 7, 0
    for order in ((alike[0], other, alike[1]), (other, alike[0], alike[1])):
        found = clean.near_duplicates(np.stack(order).view("<u8"), np.arange(3))
        assert found.tolist() == [False, False, True]
    assert clean.exact_duplicates(np.array([5, 3, 5, 3, 4], np.uint64)).tolist() == [False, False, True, True, False]


def test_exact_means_exact(tmp_path, tok):
    texts = [TEXT, TEXT + " Indeed so.", "  " + TEXT.lower().replace(" ", "\t"), TEXT.replace("sea,", "sea")]
    texts += sentences(5)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for dedup, exact, near in (("none", 0, 0), ("exact", 1, 0), ("near", 1, 2)):
        rules = run(tok, tmp_path / dedup, path, dedup=dedup, val_fraction=0.0)["rules"]
        assert (rules["exact_duplicate"], rules["near_duplicate"]) == (exact, near)


SPELLINGS = {  # of a question that ends with "?"
    "capitals": str.upper,
    "decomposed": lambda q: unicodedata.normalize("NFD", q),
    "full width": lambda q: q.replace("?", "\uff1f"),
    "ordinal for degree": lambda q: q.replace("\u00b0", "\u00ba"),
    "numero sign": lambda q: q.replace("n\u00b0", "\u2116"),
    "no mark": lambda q: q.rstrip("?"),
    "a space before it": lambda q: q.replace("?", "\u202f?"),
    "two marks": lambda q: q + "!",
    "zero width": lambda q: q[:5] + "\u200b" + q[5:],
    "byte order mark": lambda q: "\ufeff" + q,
    "quoted": lambda q: f"\u00ab {q} \u00bb",
    "curly": lambda q: "\u201c" + q.replace("'", "\u2019") + "\u201d",
    "white space": lambda q: "  " + q.replace(" ", "\u00a0\n"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_question_in_another_spelling_is_the_same(spelling):
    questions = [f"Où est l'hôtel n\u00b0 {i}, \u03b0?" for i in range(12)]
    other = [clean.folded(SPELLINGS[spelling](q)) for q in questions]
    assert other == [clean.folded(q) for q in questions] and len(set(other)) == 12


def test_french_and_spanish_marks_are_those_of_others():
    assert clean.folded("Réponds : combien ? Oui !") == clean.folded("réponds: combien? oui.")
    assert clean.folded("\u00bfQué hora es?") == clean.folded("Qué hora es")
    assert [clean.folded(text) for text in ("\u5224 5\u3002", "\u0643\u0645\u061f")] == ["\u5224 5", "\u0643\u0645"]
    assert clean.folded('"Stop!" he said...') == clean.folded("stop he said")
    assert clean.folded("?") == "?" and clean.folded(" \n") == ""


def test_a_long_line_of_marks_takes_no_time():
    began = time.process_time()
    clean.folded("Chapter " + "." * 20_000 + "5")
    assert time.process_time() - began < 2


def test_sums_that_differ_by_a_sign_stay_apart():
    sums = "2+3|2-3|23|2.3|2\u00b3|2^3 x|1.5|15|.5|5|5!|5'|5\"|5 + 3 ?|5 - 3 ?|5! + 3|x > 3|x < 3|6 : 3 = 2|6 . 3 = 2"
    sums += "|6 3 = 2|y' + y = 0|y + y = 0|(n - 1)! + n|(n - 1) + n|n! + 1|n + 1|-5|10\u207b\u00b2|10-2|102"
    sums += "|1/2|1\u00bd|12|a, b|a b c"
    sums = sums.split("|")
    found = Counter(clean.folded(f"What is {some}{mark}") for some in sums for mark in ("", "?", ".", " ?"))
    assert len(found) == len(sums) and set(found.values()) == {4}


def test_a_text_in_composed_and_decomposed_letters_is_one(tmp_path, tok):
    """Kept twice, it may be in both splits, or stay in spite of --decontaminate."""
    text = "Le café où il est né, à côté de la forêt, a été fermé près de l'hôtel où l'été arrive."
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    path, test = write_jsonl(tmp_path / "a.jsonl", [*forms, TEXT]), write_jsonl(tmp_path / "b.jsonl", forms[1:])
    rules = run(tok, tmp_path / "twice", path, dedup="exact", val_fraction=0.0)["rules"]
    assert rules["exact_duplicate"] == 1
    rules = run(tok, tmp_path / "test", path, dedup="none", val_fraction=0.0, decontaminate=str(test))["rules"]
    assert rules["contaminated"] == 2
    expected = hashlib.blake2b(b"a \xc3\xa9!", digest_size=8).digest()  # the keys choose what is held out
    assert [clean.text_key(f"A\n {e}!") for e in ("é", "E\u0301")] == [int.from_bytes(expected, "little")] * 2


def test_memory_per_document(tmp_path):
    """Deciding on many documents takes at most 200 bytes for each, their records included."""
    count = 120_000
    rng = np.random.default_rng(0)
    records = np.zeros(count, prepare.RECORD)
    records["bytes"], records["key"] = 100, rng.integers(0, 2**63, count)
    records["bands"] = rng.integers(0, 2**63, (count, clean.BANDS))
    records["bands"][count // 2 :: 3] = records["bands"][: count // 2 : 3]  # a sixth are duplicates
    config = prepare.Config(data="", tokenizer="", out="")
    tracemalloc.start()
    verdict, copies, held_out, _ = prepare.decide(records, [prepare.Source("a", Path("a"), 0.0)], config)
    prepare.writing_order(records, copies, held_out, 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdict.tolist().count(prepare.VERDICTS.index("near_duplicate")) == pytest.approx(count / 6, rel=0.01)
    assert records.itemsize + peak / count < 200


# -------------------------------------------------------------------------------------------------
# Evaluation files


def test_decontamination(tmp_path, tok, capsys):
    first, *around = (sentences(1, seed)[0] for seed in range(9, 0, -1))
    thirteen = " ".join(first.split()[:13])
    question = "Janet's ducks lay sixteen eggs per day; she eats three for breakfast every morning."
    turns = [{"content": "too short to find"}, {"content": thirteen}]
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question, "turns": turns}))
    (tmp_path / "test.txt").write_text(
        "An evaluation may be plain text, which is searched for as a whole, at any length."
    )
    shouted = "JANET'S ducks - lay sixteen\neggs per day, She eats 'three' for breakfast every morning"
    planted = [
        f"{around[0]} {shouted} {around[1]}",
        f"{around[2]} {thirteen} {around[3]}",
        around[4] + " may be plain text, which is searched for as a whole, at any length",
    ]
    innocent = [
        f"{around[5]} {thirteen.rsplit(' ', 1)[0]} {around[6]}",
        around[7] + " too short to find",
        TEXT,
    ]
    path = write_jsonl(tmp_path / "a.jsonl", planted + innocent)
    files = f"{tmp_path}/test.jsonl,{tmp_path}/test.txt"
    manifest = run(tok, tmp_path / "out", path, decontaminate=files, val_fraction=0.0)
    assert manifest["rules"]["contaminated"] == 3 and stored(tmp_path / "out", "train", tok) == innocent
    assert "1 of 4 texts have fewer than 13 words" in capsys.readouterr().out


@needs_real
def test_planted_evaluation_text_is_found(tmp_path, tok, paragraphs):
    questions = [row["question"] for _, row in read_jsonl(REAL / "gsm8k_test.jsonl")][:300]
    paragraphs = paragraphs[:300]
    pairs = zip(paragraphs, questions)
    planted = [f"{p} {q} {p[::-1]}" for p, q in pairs if len(q.split()) > 13]
    path = write_jsonl(tmp_path / "a.jsonl", planted + paragraphs)
    flags = dict(decontaminate=str(REAL / "gsm8k_test.jsonl"), clean=False, dedup="none", val_fraction=0.0)
    manifest = run(tok, tmp_path / "out", path, **flags)
    assert manifest["rules"]["contaminated"] == len(planted)
    assert stored(tmp_path / "out", "train", tok) == paragraphs


# -------------------------------------------------------------------------------------------------
# Weights, split, shards


def test_kept_documents_come_back(tmp_path, tok):
    good = [f"{s} \u00e4\u00f6\u00fc \U0001f980 <|endoftext|> tail\n" for s in sentences(300)]
    texts = [*good, "short", "", "!!!", "short"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run(tok, tmp_path / "out", path, shard_bytes=10_000, val_fraction=0.2)
    train, val = stored(tmp_path / "out", "train", tok), stored(tmp_path / "out", "val", tok)
    assert sorted(train + val) == sorted(good)
    assert train == [t for t in texts if t in set(train)]  # one source keeps its order
    assert (manifest["documents_in"], manifest["documents_out"]) == (304, 300)
    assert manifest["rules"] == dict.fromkeys(prepare.VERDICTS[1:], 0) | {"empty": 2, "too_short": 2}
    (source,) = manifest["sources"]
    assert source["documents"] == 304 and source["bytes"] == len("".join(texts).encode())
    for split, documents in (("train", train), ("val", val)):
        entries = manifest["splits"][split]
        assert sum(e["documents"] for e in entries) == len(documents)
        assert sum(e["bytes"] for e in entries) == len("".join(documents).encode())
        assert len(entries) > 1 and all(e["bytes"] < 10_000 + max(map(len, texts)) * 2 for e in entries)
    for folder in (tok, tmp_path / "out"):
        assert tokenizer.fingerprint(tokenizer.load(folder)) == manifest["tokenizer"]
    assert not (tmp_path / "out" / "work").exists()


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    specials = {s: 70_000 + i for i, s in enumerate(tokenizer.SPECIALS)}
    tokenizer.save(tokenizer.Tokenizer("big", tokenizer.PATTERN, ranks, specials), tmp_path / "tok")
    path = write_jsonl(tmp_path / "a.jsonl", sentences(20))
    assert run(tmp_path / "tok", tmp_path / "out", path, val_fraction=0.0)["dtype"] == "uint32"
    assert stored(tmp_path / "out", "train", tmp_path / "tok") == sentences(20)


def test_the_split_depends_on_the_text_alone(tmp_path, tok):
    texts = sentences(400)
    run(tok, tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", texts), val_fraction=0.1)
    val = set(stored(tmp_path / "a", "val", tok))
    assert 20 <= len(val) <= 62
    more = texts[::-1] + sentences(100, seed=1)
    run(tok, tmp_path / "b", write_jsonl(tmp_path / "b.jsonl", more), val_fraction=0.1, seed=7)
    assert set(stored(tmp_path / "b", "val", tok)) & set(texts) == val
    # Duplicates never straddle, even if they are kept
    path = write_jsonl(tmp_path / "c.jsonl", texts + [t.upper() for t in texts])
    run(tok, tmp_path / "c", path, val_fraction=0.1, dedup="none")
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
    assert sum(from_a) == 400  # a is the one that is short, so all of it is used once
    assert np.mean(from_a) == pytest.approx(0.7, abs=0.03)
    assert manifest["rules"]["over_weight"] == 2000 - len(train) and len(set(train)) == len(train)
    tenths = [np.mean(part) for part in np.array_split(from_a, 10)]
    assert min(tenths) > 0.6 and max(tenths) < 0.8  # evenly interleaved
    # Another seed chooses other documents of b; the same seed the same
    run(tok, tmp_path / "2", data, val_fraction=0.0, seed=1)
    other = stored(tmp_path / "2", "train", tok)
    assert set(other) & set(a) == set(a) and len(set(other) & set(train) & set(b)) < 0.25 * len(b)
    # Two and a half epochs of a
    manifest = run(tok, tmp_path / "3", data, val_fraction=0.1, epochs=2.5)
    counts = Counter(stored(tmp_path / "3", "train", tok))
    of_a = [counts[t] for t in a if t in counts]
    assert set(of_a) == {2, 3} and np.mean(of_a) == pytest.approx(2.5, abs=0.1)
    val = stored(tmp_path / "3", "val", tok)
    assert len(val) == len(set(val)) and not set(val) & set(counts)
    written = manifest["documents_in"] - sum(manifest["rules"].values()) + manifest["repeated"]
    assert written == manifest["documents_out"] == len(val) + counts.total()


def test_workers_change_nothing(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(1500, words=60))
    for workers in (1, 2):
        run(tok, tmp_path / str(workers), path, workers=workers, shard_bytes=200_000)
    assert files(tmp_path / "1") == files(tmp_path / "2") and len(files(tmp_path / "1")) >= 5


def test_an_error_in_a_worker_reaches_the_user(tmp_path, tok):
    path, letters = write_jsonl(tmp_path / "a.jsonl", sentences(50)), tmp_path / "letters"
    tokenizer.save(tokenizer.characters("abcdefghijklmnopqrstuvwxyz "), letters)
    with pytest.raises(UserError, match="not in the vocabulary"):
        run(letters, tmp_path / "out", path, workers=2)


def test_bad_lines_are_counted(tmp_path, tok):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": t}) for t in sentences(20)]
    path.write_text("\n".join([*good, "{broken", '{"text": 5}', '{"other": "x"}', ""]))
    with pytest.raises(UserError, match=r"a.jsonl:21: "):
        run(tok, tmp_path / "out", path)
    manifest = run(tok, tmp_path / "skip", path, skip_bad=True)
    assert manifest["rules"]["bad_line"] == 3 and manifest["documents_out"] == 20 and manifest["documents_in"] == 23
    path.write_text("\n".join([*good, '{"text": 5}']))
    with pytest.raises(UserError, match=r'a.jsonl:21: no string "text"'):
        run(tok, tmp_path / "out", path, overwrite=True)


# -------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "data, says",
    [
        ("{d}/a.jsonl:much", "a.jsonl:much.*weight 'much'"),
        ("{d}/a.jsonl:0", "weight '0'"),
        ("{d}/a.jsonl:-1", "weight '-1'"),
        ("{d}/a.jsonl:", "weight ''"),
        ("{d}/a.jsonl:nan", "weight 'nan'"),
        ("{d}/a.jsonl:1e999", "weight '1e999'"),
        ("{d}/a.jsonl:1,{d}/b.jsonl", "b.jsonl has no weight"),
        ("{d}/a.jsonl,{d}/a.jsonl", "a.jsonl is named twice"),
        ("{d}/a.csv", "a.csv.*expected FILE.txt"),
        ("", "expected FILE.txt"),
        ("{d}/a.jsonl,", "''"),
        ("{d}/missing.jsonl", "missing.jsonl: No such file"),
        ("{d}/empty.jsonl", "no document in it"),
        ("{d}/short.jsonl", "short.jsonl: no document is left of 1.*1 too_short"),
        ("{d}/a.jsonl:1,{d}/short.jsonl:1", "short.jsonl: no document is left"),
        ("{d}/latin1.txt", "latin1.txt:2: byte 6 "),
        ("{d}/one.jsonl", "no document is left to train on"),
    ],
)
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
    bad = dict(language="de", dedup="fuzzy", val_fraction=1.0, epochs=0.0, workers=0, cut=0, seed=-1, heading="(")
    for name, value in bad.items():
        with pytest.raises(UserError, match=re.escape(f"--{name}={value}: ")):
            run(tok, tmp_path / "out", path, **{name: value})
    with pytest.raises(UserError, match="--min_words=3: only --clean reads it"):
        run(tok, tmp_path / "out", path, clean=False, min_words=3)
    with pytest.raises(UserError, match="'x.csv': expected FILE.txt, FILE.jsonl"):
        run(tok, tmp_path / "out", path, decontaminate="x.csv")
    with pytest.raises(UserError, match="x.txt: No such file"):
        run(tok, tmp_path / "out", path, decontaminate="x.txt")
    with pytest.raises(UserError, match="a.jsonl: "):
        run(tok, path, path)
    assert not (tmp_path / "out").exists()


def test_hugging_face_names(tmp_path):
    sources = prepare.parse_sources("hf:org/name[sample-10BT,train,5]:0.5,a.txt:.5", tmp_path)
    assert sources == [
        ("hf:org/name[sample-10BT,train,5]", tmp_path / "hf_0.jsonl", 0.5),
        ("a.txt", Path("a.txt"), 0.5),
    ]
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(UserError, match=r"hf:org/name: needs the package `datasets`: pip install -e '.\[data\]'"):
            prepare.download("hf:org/name", tmp_path / "x.jsonl")


def test_rows_of_the_hub_are_copied_once(tmp_path, tok, monkeypatch):
    def rows(name):
        downloads.append(name)
        yield from ({"text": text} for text in sentences(20))

    downloads = []
    monkeypatch.setattr("data.read.hub_rows", rows)
    manifest = run(tok, tmp_path / "out", "hf:org/name[,train,20]", val_fraction=0.0)
    assert downloads == ["hf:org/name[,train,20]"] and stored(tmp_path / "out", "train", tok) == sentences(20)
    assert manifest["sources"][0]["path"] == "hf:org/name[,train,20]" and len(manifest["sources"][0]["sha256"]) == 64
    monkeypatch.setattr("data.read.hub_rows", lambda name: [{"text": sentences(1)[0]}, {"txt": 1}])
    with pytest.raises(UserError, match='hf:org/name:2: no string "text".*--skip_bad'):
        run(tok, tmp_path / "two", "hf:org/name", val_fraction=0.0)
    manifest = run(tok, tmp_path / "three", "hf:org/name", val_fraction=0.0, skip_bad=True)
    assert (manifest["rules"]["bad_line"], manifest["documents_out"]) == (1, 1)


# -------------------------------------------------------------------------------------------------
# Interrupted, repeated, damaged


class Crash(BaseException):
    pass


def test_a_killed_run_restarted_ends_in_the_same_bytes(tmp_path, tok, monkeypatch):
    """Die at each file in turn before the disk holds it, half of it written."""
    path = write_jsonl(tmp_path / "a.jsonl", sentences(200))
    flags = dict(shard_bytes=10_000, val_fraction=0.2)
    run(tok, tmp_path / "once", path, **flags)
    flush = runtime_files.flush

    def dying(file):
        nonlocal left
        left -= file.is_file()
        if left < 0:
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2])
            raise Crash
        flush(file)

    monkeypatch.setattr(runtime_files, "flush", dying)
    for survived in range(100):
        out, left = tmp_path / f"out{survived}", survived
        try:
            run(tok, out, path, **flags)
            break
        except Crash:
            assert not (out / "manifest.json").exists()
        left = 10**6
        run(tok, out, path, **flags)
        assert files(out) == files(tmp_path / "once"), survived
    assert survived >= 7  # recipe, records, shards and manifest


def test_a_finished_pass_is_not_repeated(tmp_path, tok, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(50))
    scan_sources, write_splits = prepare.scan_sources, prepare.write_splits

    def dying(*args):
        raise Crash

    monkeypatch.setattr(prepare, "write_splits", dying)
    with pytest.raises(Crash):
        run(tok, tmp_path / "out", path)
    monkeypatch.setattr(prepare, "write_splits", write_splits)
    monkeypatch.setattr(prepare, "scan_sources", dying)
    assert run(tok, tmp_path / "out", path)["documents_in"] == 50
    monkeypatch.setattr(prepare, "scan_sources", scan_sources)
    run(tok, tmp_path / "once", path)
    assert files(tmp_path / "out") == files(tmp_path / "once")


@needs_real
@pytest.mark.skipif(sys.platform != "linux", reason="looks for workers in /proc")
def test_kill_9_and_restart(tmp_path, tok, paragraphs, fork):
    rng = random.Random(0)
    path = write_jsonl(tmp_path / "a.jsonl", [p + f" {rng.random()} {rng.random()}" for p in paragraphs * 2])
    out = tmp_path / "out"
    flags = dict(dedup="exact", shard_bytes=100_000, workers=2)
    config = prepare.Config(data=str(path), tokenizer=str(tok), out=str(out), **flags)

    def half_scanned():
        try:
            return any(scan.stat().st_size > 100_000 for scan in out.glob("work/.scan.bin.*"))
        except FileNotFoundError:  # it is whole, and has its name
            return True

    for reached in (
        half_scanned,
        lambda: (out / "train_00003.bin").exists(),
    ):
        child = fork(prepare.main, config)
        while not reached():
            assert not child.ended(), child.output()
            time.sleep(0.002)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(workers) == 2
        child.send(9)
        child.wait()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers):  # a killed parent leaves none behind
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (out / "manifest.json").exists()
    assert run(tok, out, path, **flags) == run(tok, tmp_path / "once", path, **flags)
    assert files(out) == files(tmp_path / "once")


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
    assert run(tok, out, path)["documents_in"] == 50  # the line was corrected, as the error asked
    path.write_text(good + "{broken\n")
    assert run(tok, out, path, skip_bad=True, overwrite=True)["rules"]["bad_line"] == 1


def test_other_files_are_left_alone(tmp_path, tok):
    path, out = write_jsonl(tmp_path / "a.jsonl", sentences(50)), tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    (out / "notes" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="out: holds other files"):
        run(tok, out, path)
    run(tok, out, path, overwrite=True)
    run(tok, out, path, overwrite=True)
    assert (out / "notes" / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_called_work_that_is_not_ours_is_left_alone(tmp_path, tok, overwrite):
    """Its files may be the very input."""
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    path = write_jsonl(out / "work" / "book.jsonl", sentences(50))
    before = path.read_text()
    with pytest.raises(UserError, match=f"{path}: is not ours, and {out / 'work'} is deleted at the end"):
        run(tok, out, path, overwrite=overwrite)
    assert path.read_text() == before


def test_shards_of_an_earlier_run_are_replaced_and_files_with_such_names_are_not(tmp_path, tok):
    path, out = write_jsonl(tmp_path / "a.jsonl", sentences(50)), tmp_path / "out"
    out.mkdir()
    (out / "train_notes.bin").write_text("mine")
    run(tok, out, path, overwrite=True)
    assert (out / "train_notes.bin").read_text() == "mine"


def test_two_processes_do_not_share_a_folder(tmp_path, tok):
    path = write_jsonl(tmp_path / "a.jsonl", sentences(50))
    (tmp_path / "out").mkdir()
    lock_file(tmp_path / "out/.lock", tmp_path / "out")
    with pytest.raises(UserError, match="another process"):
        run(tok, tmp_path / "out", path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tok):
    """A folder of prepared data with several shards."""
    folder = tmp_path_factory.mktemp("prepared")
    run(tok, folder / "out", write_jsonl(folder / "a.jsonl", sentences(100)), shard_bytes=10_000, val_fraction=0.1)
    return folder / "out"


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda out: (out / "train_00001.bin").unlink(), "train_00001.bin: missing"),
        (lambda out: cut(out / "train_00001.bin"), r"train_00001.bin: \d+ bytes, not \d+: truncated"),
        (lambda out: flip(out / "train_00001.bin"), "train_00001.bin: its contents are not what was written"),
        (lambda out: flip(out / "val_00000.bin"), "val_00000.bin: its contents are not what was written"),
        (lambda out: (out / "manifest.json").unlink(), "no manifest.json"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json: not valid JSON"),
        (lambda out: (out / "manifest.json").write_text("[]"), "manifest.json: a JSON object was expected"),
        (lambda out: edit(out, format=2), "manifest.json: format 2, not 1"),
        (lambda out: edit(out, splits={"train": [{}], "val": []}), "manifest.json: broken"),
        (lambda out: edit(out, dtype="no such"), "manifest.json: broken"),
        (lambda out: edit(out, tokenizer="0" * 64), "prepared with another tokenizer"),
    ],
)
def test_damage_is_noticed(tmp_path, prepared, damage, says):
    out = shutil.copytree(prepared, tmp_path / "out")
    tok = tokenizer.byte_level()
    assert len(shards.read_prepared(out, tok)[0]) > 1
    damage(out)
    with pytest.raises(UserError, match=says):
        shards.read_prepared(out, tok)


def test_streams_are_read_as_they_were_written(prepared):
    tok = tokenizer.byte_level()
    train, val = shards.read_prepared(prepared, tok)
    assert len(train) == len(list(prepared.glob("train_*.bin"))) > 1 and len(val) == 1
    text = "".join(tok.decode(stream.tolist()) for stream in [*train, *val])
    assert sorted(filter(None, text.split("<|endoftext|>"))) == sorted(sentences(100))


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(out, **values):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | values))


def test_another_tokenizer_is_refused(prepared):
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        shards.read_prepared(prepared, tokenizer.characters("abc"))
