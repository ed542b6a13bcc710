"""The one reader of data files: what a file is, its rows with their lines, paths with colons."""

import gzip
import itertools
import json
import os
import pickle
import re
import sys
import threading
import tracemalloc
from functools import partial
from types import SimpleNamespace

import pytest
from runs import here

import evaluate
import pretrain
import sft
from data import corpus, prepare, rows, shards, tokenizer
from data.read import Document, file_kind, parse_mixture, read_jsonl, read_rows, read_texts, spans_lines
from runtime.errors import UserError

TEXTS = ["the first text", "the second, ünd\nits end", "the third"]
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FORMS = {
    "an object a line": LINES,
    "an object a line, under a mark": "\ufeff" + LINES,
    "lines that end in CR LF": LINES.replace("\n", "\r\n"),
    "one array": json.dumps(ROWS),
    "one array over many lines": json.dumps(ROWS, indent=2),
    "one array, a row a line": "[" + ",\n".join(map(json.dumps, ROWS)) + "]\n",
    "objects over many lines": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "an array a line": "".join(json.dumps([row]) + "\n" for row in ROWS),
}
NAMES = ["a.jsonl", "a.json", "a.ndjson", "A.JSONL", "a.Json", "a.jsonl.gz", "a.JSON.GZ", "a.txt", "a"]


def write(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix.lower() == ".gz" else data)
    return str(path)


def every_reader(path):
    """What each script takes from a file of texts: pretrain.py, data.tokenizer, data.prepare."""
    config = prepare.Config("", "", "")
    return [corpus.read_documents(path), list(tokenizer.read_documents([path])), list(prepare.documents(path, config))]


@pytest.mark.parametrize("form", FORMS)
def test_every_script_reads_every_form_under_every_name(tmp_path, form):
    for name in NAMES:
        path = write(tmp_path / name, FORMS[form])
        assert every_reader(path) == [TEXTS] * 3, name
        assert [row for _, row in read_rows(path)] == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "a.TXT.gz", "a.txt.gz"])
@pytest.mark.parametrize(
    "text", ["once\n\n{}\n", "[1] a note\n", "[]\nx", "{not JSON}\n", '"a string"\n', "7\n", "{\n"]
)
def test_other_text_stays_text(tmp_path, name, text):
    path = write(tmp_path / name, text)
    assert every_reader(path) == [[text]] * 3
    with pytest.raises(UserError, match="expected FILE.jsonl, FILE.parquet or hf:NAME, but this is text"):
        rows.read(path, rows.conversation)


def test_parquet_is_read_by_every_script_under_any_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a.parquet", "a.PARQUET", "a.pq", "a"):
        path = str(tmp_path / name)
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        assert every_reader(path) == [TEXTS] * 3


def test_parquet_that_would_lose_a_column_or_cannot_be_converted_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    year_148108 = pyarrow.table({"text": ["a"], "at": pyarrow.array([2**62], pyarrow.timestamp("us"))})
    for table, reason in ((twice, "'text' is the name of several columns"), (year_148108, "OverflowError")):
        parquet.write_table(table, path)
        with pytest.raises(UserError, match=f"a.parquet: cannot be read as Parquet .*{reason}"):
            list(read_texts(path))


def test_whatever_a_hub_reader_raises_is_one_line(monkeypatch):
    """A data set that is made by a script: `datasets` has stopped reading these."""

    def load_dataset(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported,\nbut found a.py")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as e:
        list(read_texts("hf:org/name"))
    assert str(e.value) == "hf:org/name: RuntimeError: Dataset scripts are no longer supported, but found a.py"


def test_rows_have_the_numbers_of_their_lines(tmp_path):
    lines = {
        "an object a line": [1, 2, 3],
        "one array": [1, 1, 1],
        "one array over many lines": [2, 5, 8],
        "one array, a row a line": [1, 2, 3],
        "objects over many lines": [1, 4, 7],
    }
    for form, numbers in lines.items():
        path = write(tmp_path / "a.json", FORMS[form])
        assert [number for number, _ in read_jsonl(path)] == numbers
        texts = list(read_texts(path))
        assert [text.place for text in texts] == [f"{path}:{number}" for number in numbers]


def test_a_conversation_may_be_an_array_of_messages(tmp_path):
    """nanochat writes one a line; one file of one conversation is another."""
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x"}] for i in range(3)]
    sharegpt = [[{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "x"}] for i in range(3)]
    for some in (talks, sharegpt):
        for text in ("".join(json.dumps(talk) + "\n" for talk in some), json.dumps(some), json.dumps(some, indent=1)):
            path = write(tmp_path / "a.jsonl", text)
            assert rows.read(path, rows.conversation)[0] == talks
        path = write(tmp_path / "a.json", json.dumps(some[0], indent=1))
        assert rows.read(path, rows.conversation)[0] == talks[:1]


def test_rows_of_an_array_may_have_a_role_or_a_sender(tmp_path):
    mails = [{"from": "a", "to": "b", "text": "x"}, {"from": "b", "role": "c", "text": "y"}]
    for text in (json.dumps(mails), json.dumps(mails, indent=1)):
        assert [row for _, row in read_jsonl(write(tmp_path / "a.json", text))] == mails


@pytest.mark.parametrize(
    "text, says",
    [
        ('[{"text": "a"},\n {"text": "b"},\n {"text": \n', ":4: Expecting value"),
        ('[\n {"text": "a"}\n {"text": "b"}\n]', ":3: Expecting ',' delimiter"),
        ('{\n "text": "a"\n}\n{\n "text" "b"\n}', ":5: Expecting ':' delimiter"),
        ('[\n {"text": NaN}\n]', "NaN is not JSON"),
        ('[\n {"text": "a", "score": -1e400}\n]', "-1e400 is too large a number"),
        ('[\n {"text": "a"},\n {"text": "\\ud800"}\n]', ":3: .*surrogates"),
        ("[\n" + "[\n" * 50_000, "nested too deeply"),
    ],
)
def test_a_fault_in_values_that_span_lines_is_an_error_always(tmp_path, text, says):
    path = write(tmp_path / "a.json", text)
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=re.escape(path) + f":.*{says[1:] if says[0] == ':' else says}") as e:
            list(read_jsonl(path, skip_bad))
        assert says[0] != ":" or f"{path}{says.split(' ')[0]}" in str(e.value)


def test_a_row_of_an_array_that_is_none_can_be_left_out(tmp_path):
    path = write(tmp_path / "a.json", '[\n {"text": "a"},\n 7,\n {"text": "b"}\n]')
    with pytest.raises(UserError, match="a.json:3: a JSON object was expected, not int.*--skip_bad"):
        list(read_jsonl(path))
    assert list(read_jsonl(path, skip_bad=True)) == [(2, {"text": "a"}), (3, None), (4, {"text": "b"})]


@pytest.mark.parametrize("bad", ["{broken", "[1, 2", "null", "[]", '["a"]', '{"text": "b"'])
def test_a_bad_line_costs_itself_wherever_it_stands(tmp_path, bad):
    good = json.dumps({"text": "a"})
    for at in range(3):
        lines = [good, good]
        lines.insert(at, bad)
        path = write(tmp_path / "a.jsonl", "\n".join(lines))
        with pytest.raises(UserError, match=re.escape(f"{path}:{at + 1}: ") + ".*--skip_bad"):
            list(read_jsonl(path))
        assert [row for _, row in read_jsonl(path, skip_bad=True)].count({"text": "a"}) == 2
        assert [text for text in read_texts(path, skip_bad=True)].count(None) == 1


REFUSED = {  # lines that follow JSON's grammar, but not ours
    "not a number": '{"text": "a", "x": NaN}',
    "too large a number": '{"text": "a", "x": 1e400}',
    "too long a number": '{"text": "a", "x": %s}' % (5000 * "1"),
    "a key twice": '{"text": "a", "text": "b"}',
    "half a character": '{"text": "\\ud800"}',
    "nested too deeply": '{"text": "a", "x": %s%s}' % (100_000 * "[", 100_000 * "]"),
    "not UTF-8": '{"text": "\udcff"}',
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_are_refused_are_bad_rows_however_many_begin_a_file(tmp_path, kind):
    """They are JSON, a row a line; nothing spans lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join([6 * f"{REFUSED[kind]}\n", LINES]).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(f"{path}:1: ") + ".*--skip_bad=True"):
        list(read_jsonl(path))
    assert [row for _, row in read_jsonl(path, skip_bad=True)] == [None] * 6 + ROWS


LONG = "".join(f"line {i} of a long text\n" for i in range(200_000))  # 5 MB


@pytest.mark.parametrize(
    "name, head, kind",
    [
        ("a.txt", "[Chapter 1]", "text"),
        ("a.txt", "{", "text"),
        ("a", '[{"a": 1},', "text"),
        ("a.jsonl", "{broken", "json"),
    ],
)
def test_what_a_file_is_follows_from_its_head(tmp_path, name, head, kind):
    """A corpus that begins with a bracket need not fit into memory."""
    path = write(tmp_path / name, f"{head}\n" + json.dumps(ROWS[0]) + "\n" + LONG)
    tracemalloc.start()
    try:
        assert file_kind(path) == kind
        assert kind == "text" or not spans_lines(path)
        assert tracemalloc.get_traced_memory()[1] < len(LONG) / 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rows", [ROWS[:2], [*ROWS, {"text": 100_000 * "long "}], 3000 * ROWS])
@pytest.mark.parametrize(
    "form", [lambda rows: "[" + ",\n".join(map(json.dumps, rows)) + "\n]", lambda rows: json.dumps(rows, indent=1)]
)
def test_a_value_that_spans_lines_is_found_whatever_its_length(tmp_path, rows, form):
    for name in ("a.jsonl", "a.txt"):
        path = write(tmp_path / name, form(rows))
        assert [row for _, row in read_rows(path)] == rows
    path = write(tmp_path / "a.txt", form(rows)[:-1])  # it never ends
    assert file_kind(path) == "text"


def test_bad_lines_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", LINES + '{"txt": 1}\n{"text": null}\nx\n')
    for read in (corpus.read_documents, lambda path, skip_bad: list(tokenizer.read_documents([path], skip_bad))):
        with pytest.raises(UserError, match=r'a.jsonl:4: no string "text" in this row; its fields: txt.*--skip_bad'):
            read(path, False)
        assert read(path, True) == TEXTS
        assert f"{path}: 3 bad lines left out" in capsys.readouterr().out
    path = write(tmp_path / "chat.jsonl", '{"messages": []}\n')
    with pytest.raises(UserError, match="its fields: messages; sft.py reads conversations"):
        corpus.read_documents(path)


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.csv", b"text\nx\n", "expected FILE.txt, FILE.jsonl"),
        ("a.TSV.gz", b"text\nx\n", "expected FILE.txt, FILE.jsonl"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\0\0", "packed by zstd, which is not read; unpack it"),
        ("a.jsonl", b"BZh91AY", "packed by bzip2"),
        ("a.txt", b"PK\x03\x04\0", "packed by zip"),
        ("a.jsonl.gz", gzip.compress(b"x" * 10_000, mtime=0)[:-12], "damaged gzip data"),
        ("a.txt", gzip.compress(os.urandom(9000).hex().encode())[:5000], "damaged gzip data"),
        ("a.txt.gz", gzip.compress("ok\nü".encode("latin-1")), "a.txt.gz:2: byte 3 of the file is not UTF-8"),
        ("a.jsonl", LINES.encode("utf-16"), "in UTF-16 .*convert the file to UTF-8"),
        ("a.txt", LINES.encode("utf-16-be").join([b"\xfe\xff", b""]), "in UTF-16 "),
        ("a.db", b"SQLite format 3\0", "holds bytes of value 0, so it is no text"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        ("a.txt", b"\n \n", "there is no text in it"),
        ("a.jsonl", b'{"text": "  "}', "there is no text in it"),
        ("a.tgz", gzip.compress(b"a.txt\0\0ustar", mtime=0), "holds bytes of value 0"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', 'a.jsonl:1: "text" is in an object twice'),
        ("a.json", b'[{"text": "a",\n"n": {"x": 1, "x": 1}}]', '"x" is in an object twice'),
    ],
    ids=["csv", "tsv", "zstd", "bzip2", "zip", "cut", "cut text", "latin-1"]
    + [
        "utf-16",
        "utf-16 text",
        "database",
        "pointer",
        "pointer under another name",
        "blank",
        "blank rows",
        "tar",
        "a key twice",
        "a key twice, spanning lines",
    ],  # xdist's workers must agree on them
)
def test_what_is_no_data_file_is_named(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says):
        corpus.read_documents(str(tmp_path / name))


def test_a_pipe_is_read_once(tmp_path):
    """Its first lines must not be lost to a look at what it is."""
    for name, text in (("rows.jsonl", LINES), ("text", "one\ntwo\n")):
        path = tmp_path / name
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_text, args=(text,))
        writer.start()
        assert corpus.read_documents(str(path)) == (TEXTS if name == "rows.jsonl" else [text])
        writer.join()


def test_a_document_knows_its_place_wherever_it_goes(tmp_path):
    text = Document("abc", "a.jsonl:3")
    assert pickle.loads(pickle.dumps(text)).place == text.place == "a.jsonl:3"
    assert text == "abc" and json.dumps([text]) == '["abc"]'
    (head,), (tail,) = corpus.hold_out([text], 0.5)
    assert (head + tail, head.place, tail.place) == ("abc", "a.jsonl:3", "a.jsonl:3")
    (tmp_path / "book.txt").write_text("a\n\nb\n<|endoftext|>\nc\n")
    assert [text.place[-2:] for text in prepare.text_documents(tmp_path / "book.txt", "", 99)] == [":1", ":5"]


def test_a_document_that_cannot_be_tokenized_is_named_or_left_out(tmp_path, capsys):
    letters = tokenizer.characters("the first cond,\n")
    path = write(tmp_path / "a.jsonl", LINES)
    documents = corpus.read_documents(path)
    with pytest.raises(UserError, match=re.escape(f"{path}:1: 'x' (U+0078) is not in the vocabulary")):
        corpus.encode(letters, documents)
    assert len(corpus.encode(letters, [documents[2]])) == 11
    stream = corpus.encode(letters, documents, skip_bad=True)
    assert letters.decode(stream[1:-1].tolist()) == "the third"
    assert f"{path}:1: 'x' (U+0078) is not in the vocabulary" in capsys.readouterr().out


def test_a_document_that_cannot_be_tokenized_costs_a_preparation_itself(tmp_path, capsys):
    """It is named with its line, or left out and counted: in a split, and in a shard of its own."""
    tokenizer.save(tokenizer.characters("abcdefgh "), tmp_path / "tok")
    texts = [f"{a} {b} {c}" for a in "abcdefgh" for b in "abcdefgh" for c in "abc"]
    bad = [3, 4, 5, 100, 191]
    for i in bad:
        texts[i] += " ünd"
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = prepare.Config(path, str(tmp_path / "tok"), str(tmp_path / "out"))
    config.clean, config.dedup, config.val_fraction, config.shard_bytes = False, "none", 0.1, 16
    with pytest.raises(UserError, match=r"a.jsonl:\d+: '.' .* is not in the vocabulary.*; --skip_bad=True leaves"):
        here(prepare.main, config)
    config.skip_bad = config.overwrite = True
    here(prepare.main, config)
    lines = {int(line) for line in re.findall(rf"{path}:(\d+): .*; left out", capsys.readouterr().out)}
    assert lines == {i + 1 for i in bad}
    manifest = shards.load_manifest(config.out)
    assert manifest["rules"]["bad_line"] == 5 and manifest["documents_out"] == len(texts) - 5
    tok, found = tokenizer.load(config.out), []
    for split in ("train", "val"):
        for stream in shards.read_prepared(config.out, tok)[split == "val"]:
            ends = (stream == tok.eot).nonzero()[0]
            found += [tok.decode(stream[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]
    assert sorted(found) == sorted(text for i, text in enumerate(texts) if i not in bad)
    write(tmp_path / "a.jsonl", json.dumps({"text": "ü b c"}) + "\n")
    config.val_fraction = 0.0
    with pytest.raises(UserError, match="no document to train on could be tokenized"):
        here(prepare.main, config)


# -------------------------------------------------------------------------------------------------
# Names and weights


@pytest.mark.parametrize(
    "text, sources",
    [
        ("a.jsonl", [("a.jsonl", 0)]),
        ("a.jsonl:0.7,b.parquet:.3", [("a.jsonl", 0.7), ("b.parquet", 0.3)]),
        ("a.jsonl:7e-1,b:3", [("a.jsonl", 0.7), ("b", 3)]),
        (r"C:\data\chat.jsonl", [(r"C:\data\chat.jsonl", 0)]),
        (r"C:\data\chat.jsonl:2,D:\b.txt:1", [(r"C:\data\chat.jsonl", 2), (r"D:\b.txt", 1)]),
        ("C:/data/chat.jsonl", [("C:/data/chat.jsonl", 0)]),
        ("out/12:30:05/a.jsonl", [("out/12:30:05/a.jsonl", 0)]),
        ("out/12:30/a.jsonl:0.5", [("out/12:30/a.jsonl", 0.5)]),
        ("v1.txt:2/a.jsonl", [("v1.txt:2/a.jsonl", 0)]),
        ("a.jsonl, C:/b.jsonl", [("a.jsonl", 0), ("C:/b.jsonl", 0)]),
        ("a.jsonl: 0.5, b c.txt:1 ", [("a.jsonl", 0.5), ("b c.txt", 1)]),
        ("hf:a/b", [("hf:a/b", 0)]),
        ("hf:a/b:0.5", [("hf:a/b", 0.5)]),
        ("hf:a/b[x,train,5]:0.5,c:1", [("hf:a/b[x,train,5]", 0.5), ("c", 1)]),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_weight(text, sources):
    assert parse_mixture(text) == sources


@pytest.mark.parametrize("weight", ["much", "0", "-1", "", "nan", "1e999", "٣"])
@pytest.mark.parametrize("name", ["a.jsonl", r"C:\a.parquet", "A.JSONL.GZ", "hf:a/b[x]"])
def test_what_follows_a_data_file_must_be_a_weight(name, weight):
    with pytest.raises(UserError, match=re.escape(f"the weight {weight!r} is not a positive number")):
        parse_mixture(f"{name}:{weight}")


@pytest.mark.parametrize(
    "name", ["data/*.jsonl", "s3://bucket/a.jsonl", "https://a.b/c.txt", "owner/name", "a.jsonl;b"]
)
def test_what_is_no_file_here_says_what_is_read(name):
    hashes = partial(shards.text_hashes, flag="data")
    for read in (corpus.read_documents, hashes, lambda path: rows.read(path, rows.conversation)):
        with pytest.raises(UserError, match=re.escape(f"{name}: No such file") + ".*hf:NAME.*separated by commas"):
            read(name)


def test_a_list_of_texts_is_read_as_any_other_list(tmp_path, monkeypatch):
    """Commas within hf:NAME[...] part nothing; a weight, which would do nothing, is refused."""
    monkeypatch.setattr("data.read.hub_rows", lambda name: [{"text": name}])
    path, hub, tok = write(tmp_path / "a.txt", "the text"), "hf:a/b[c,train,5]", tokenizer.byte_level()
    config = pretrain.Config(data=f"{hub},{path}", val=f"{path}, {hub}", out="", tokenizer="byte")
    (train,), (val,) = pretrain.read_data(config, None)[1:]
    assert tok.decode(train.tolist()) == f"<|endoftext|>{hub}<|endoftext|>the text<|endoftext|>"
    assert tok.decode(val.tolist()) == f"<|endoftext|>the text<|endoftext|>{hub}<|endoftext|>"
    replayed = sft.read_replay(SimpleNamespace(replay=config.data, skip_bad=False), tok)
    assert [stream.tolist() for stream in replayed] == [train.tolist()]
    assert list(shards.text_hashes(config.data, "data")) == [path]
    with pytest.raises(UserError, match=re.escape(f"--data: {path} has the weight 0.5, but all of it is read")):
        pretrain.read_data(pretrain.Config(data=f"{path}:0.5", out=""), None)
    with pytest.raises(UserError, match="--text: .*has the weight 2"):
        evaluate.text_figures(SimpleNamespace(text=f"{path}:2", skip_bad=False), None, tok)


def test_a_file_with_a_number_at_its_end_is_that_file(tmp_path):
    path = write(tmp_path / "a.jsonl:2", LINES)
    assert parse_mixture(path) == [(path, 0)] and parse_mixture(f"{path}:0.5") == [(path, 0.5)]
    assert file_kind(path) == "json"
