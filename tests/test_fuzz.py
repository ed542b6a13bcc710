"""What is nearly right: rows, flags, tokenizers, checkpoints and logs, each with a few things changed. They are read as before or refused as documented."""
import copy
import dataclasses
import importlib
import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import save

import evaluate
import rlaif
from checkpoint import find, load, load_state, sha256
from common import UserError, parse_cli
from data import chat, corpus, prepare, tokenizer
from data.read import read_jsonl

TIMES = float(os.environ.get("FUZZ", 1))  # FUZZ=100 searches a hundred times as long
BYTES = tokenizer.byte_level()


def few(n):
    return settings(max_examples=max(1, int(n * TIMES)), derandomize=TIMES == 1, deadline=20_000, database=None, suppress_health_check=list(HealthCheck))


NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 0.5, -2.5, 1e308, 1e-320, 10**12, -(10**12), 2**31, 2**63, 2**64, 10**400, float("inf"), float("nan"), True, False])
WORDS = st.sampled_from(["", " ", "\n", "a", "user", "assistant", "system", "tool", "0", "1.5", "none", "#### 4", "\ud800", "\0", "\x1b[31m", "é", "../x", "/dev/zero", "<|im_end|>", "x" * 5000,
                         "\n\nHuman: a\n\nAssistant: b", "default", "llama3", "A", "hello there"])  # fmt: skip
DEPTHS = st.sampled_from([1, 3, 100, 300, 450, 480, 900, 960, 980, 990, 995, 2000])


SCALARS = st.one_of(st.none(), NUMBERS, WORDS)
JSON = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(WORDS, SCALARS, max_size=3), DEPTHS.map(lambda n: f"@deep{n}@"), st.just([{"role": "user", "content": "a"}]), st.just([{"role": "assistant", "content": "b"}]))


def places(value, at=()):
    """Every (path of keys) in a JSON value."""
    yield at
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


@st.composite
def changed(draw, good):
    """A JSON object with one to three things in it dropped, replaced, renamed, doubled or taken from elsewhere."""
    value = copy.deepcopy(draw(good))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(value))))
        if not at:
            continue
        place = value
        for key in at[:-1]:
            place = place[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "copy", "rename", "double"]))
        if how == "replace":
            place[at[-1]] = copy.deepcopy(draw(JSON))  # what a strategy gives it may give again
        elif how == "drop":
            del place[at[-1]]
        elif how == "copy":
            other = value
            for key in draw(st.sampled_from(list(places(value)))):
                other = other[key]
            place[at[-1]] = copy.deepcopy(other)
        elif isinstance(place, list):
            place.insert(at[-1], copy.deepcopy(place[at[-1]]))
        else:
            place[draw(WORDS)] = place.pop(at[-1]) if how == "rename" else copy.deepcopy(place[at[-1]])
    return value


def as_json(value):
    """Its text; "@deep300@" stands for lists nested that deep, which json.dumps could not always write."""
    return re.sub(r'"@deep(\d+)@"(?!:)', lambda m: "[" * int(m[1]) + "]" * int(m[1]), json.dumps(value))


@st.composite
def spoilt(draw, text):
    """The bytes of a text with some flipped, cut out or put in."""
    data = bytearray(draw(text).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(0, len(data) - 1)))
        data[i : i + draw(st.integers(0, 3))] = draw(st.sampled_from([b"", b'"', b"{", b"}", b"[", b",", b":", b"\\", b"\\ud800", b"\xff", b"\0", b"\n", b"-", b"1e999", b"NaN", b"9", b"null"]))
    return bytes(data)


def some_json(good):
    """Bytes of a file that is nearly the JSON object `good`."""
    good = st.just(good) if isinstance(good, dict) else good
    return st.one_of(changed(good).map(lambda v: as_json(v).encode("utf-8", "surrogatepass")), spoilt(good.map(json.dumps)))


def allowed(read, *names):
    """What `read()` gives, or None where it is refused as documented: a UserError of one line that names what it is about."""
    try:
        return read()
    except UserError as e:
        said = str(e)
        assert said.isprintable() and len(said) < 8000 and any(str(name) in said for name in names), said
        return None


# ---------------------------------------------------------------------------------------------------------------------------------
# Rows

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ROWS = [
    {"messages": TURNS}, {"messages": TURNS[1:] * 2}, {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, {"prompt": "Hi", "completion": "Ho"},
    {"prompt": TURNS[:2], "completion": TURNS[2:]}, {"instruction": "Add.", "input": "2 2", "output": "4"}, {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"prompt": "Hi", "chosen": "Ho", "rejected": "Ha", "probability": 0.7, "gold_chosen": 1.5, "gold_rejected": 0.5}, {"prompt": TURNS[:2], "chosen": TURNS, "rejected": [*TURNS[:2], {"role": "assistant", "content": "5"}]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: Ha"}, {"prompt": "Hi", "completion": "Ho", "label": True}, {"text": "Once upon a time."},
    {"prompt": "Hi", "reply_a": "Ho", "reply_b": "Ha", "principle": "Be kind.", "better": "A"}, {"prompt": "2 + 2 =", "answer": "4"},
]  # fmt: skip
PARSERS = {"conversation": chat.conversation, "problem": chat.problem, "prompt": chat.prompt_only, "preference": chat.preference, "judged": chat.judged, "two answers": rlaif.two_answers}


def check_messages(messages):
    """What a parser lets through can be made tokens, of which those of an answer are learnt."""
    assert messages and all(m.keys() == {"role", "content"} for m in messages)
    encoded = chat.encode(BYTES, messages)
    assert encoded.learnt.any() == any(m["role"] == "assistant" for m in messages)
    assert json.loads(json.dumps(messages, ensure_ascii=False).encode()) == messages


def use(name, parsed):
    """What the stages do first with a row."""
    if name == "conversation":
        check_messages(parsed)
    elif name in ("problem", "prompt"):
        check_messages(parsed[0])
        assert parsed[0][-1]["role"] == "user"
    elif name == "preference":
        check_messages(parsed.prompt)
        evaluate.preference_figures([parsed] * 3, np.ones(3), np.ones((3, 2)), 0)
    elif name == "judged":
        for messages, completion, label in parsed:
            check_messages([*messages, {"role": "assistant", "content": completion}])
            assert type(label) is bool
    else:
        check_messages(parsed[0])
        rlaif.leads([], [parsed], [(0, *parsed[2])], True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@few(150)
@given(st.sampled_from(list(PARSERS)), some_json(st.sampled_from(ROWS)))
def test_rows_of_conversations(folder, name, line):
    parse, path = PARSERS[name], folder / "rows.jsonl"
    good = next(json.dumps(row).encode() for row in ROWS if fine(parse, row))
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    found = allowed(lambda: chat.read(str(path), parse), f"{path}:")
    kept = chat.read(str(path), parse, skip_bad=True)
    for row in kept[0]:
        use(name, row)
    assert found is None or repr(found[0]) == repr(kept[0]) and found[1] == kept[1]
    assert repr(kept[0][0]) == repr(kept[0][-1]) == repr(parse(json.loads(good)))  # its neighbours are what they were


def fine(parse, row):
    try:
        return parse(row) is not None
    except ValueError:
        return False


@pytest.mark.parametrize("gold", ["x", None, [1], 10**400, float("nan"), {}])
def test_what_the_search_found_in_preferences(gold):
    """Gold that is no number, the same gold for both sides of every pair, and a verdict that no dictionary could look up."""
    pair = chat.preference(ROWS[7] | {"gold_chosen": gold})
    assert np.isnan(chat.gold_lead(pair.row)) and chat.gold_lead(ROWS[7]) == 1
    use("preference", pair)
    use("preference", chat.preference(ROWS[7] | {"gold_chosen": 0.5}))
    assert np.isnan(rlaif.two_answers(ROWS[12] | {"better": gold})[3]) and rlaif.two_answers(ROWS[12])[3] == 1


@few(120)
@given(some_json(st.sampled_from(ROWS)))
def test_rows_of_text_and_of_measurements(folder, line):
    path = folder / "texts.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b"\n")
    names = (f"{path}:1", f"{path}:2", f"{path}:3", path)
    for documents in (allowed(lambda: corpus.read_documents(str(path)), *names), allowed(lambda: list(tokenizer.read_documents([str(path)])), *names)):
        assert documents is None or tokenizer.token_bytes(BYTES)[corpus.encode(BYTES, documents)].sum() == sum(len(d.encode()) for d in documents)
    skipping = prepare.Config("", "", "", skip_bad=True)
    texts = list(prepare.documents(path, skipping))
    records = prepare.scanner(np.zeros(0, np.uint64), skipping)([(0, text) for text in texts])
    assert texts[0] == "one" and len(records) == len(texts)
    allowed(lambda: list(prepare.documents(path, prepare.Config("", "", ""))), *names)
    allowed(lambda: prepare.evaluation_grams([path]), *names)
    allowed(lambda: evaluate.required(str(path), ("prompt", "answer")), *names)
    assert all(isinstance(row, dict) for _, row in read_jsonl(path, skip_bad=True) if row is not None)


# ---------------------------------------------------------------------------------------------------------------------------------
# Flags

SCRIPTS = [importlib.import_module(name) for name in ("pretrain", "sft", "reward", "ppo", "dpo", "grpo", "rlaif", "sample", "evaluate", "quickstart", "data.tokenizer", "data.prepare", "data.world")]
VALUES = st.one_of(
    NUMBERS.map(str), WORDS.filter(lambda s: "\0" not in s and "\ud800" not in s), st.text("0123456789.-+_eExXinfaTrue,:=/ ", max_size=12), st.sampled_from(["a.jsonl:0.5,b.jsonl:0.5", "9" * 5000, "١٢", "1_0", "--", "x.py:f*2", "judge:x", "hf:x[a,b,c]"])
)


@st.composite
def flags(draw):
    """(script, argv): each flag known or nearly, its value right or nearly."""
    script, argv = draw(st.sampled_from(SCRIPTS)), []
    fields = dataclasses.fields(script.Config)
    some = [f for f in fields if f.default is dataclasses.MISSING and draw(st.integers(0, 9))] + draw(st.lists(st.sampled_from(fields), max_size=4))
    for f in some:
        name = draw(st.sampled_from([f.name] * 8 + [f.name.replace("_", "-"), f.name[:-1], f.name.upper(), f.name + " "]))
        default = "" if f.default is dataclasses.MISSING else str(f.default)
        value = draw(st.one_of(st.just(default), VALUES))
        argv += draw(st.sampled_from([[f"--{name}={value}"], [f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [f"-{name}={value}"], [value]]))
    return script, argv


@few(300)
@given(flags())
def test_flags_of_every_script(given_):
    script, argv = given_
    if {"-h", "--help"} & set(argv):
        return
    config = allowed(lambda: parse_cli(script.Config, argv), "--", "a flag was expected")
    if config is None:
        return
    for f in dataclasses.fields(script.Config):
        value = getattr(config, f.name)
        assert type(value) is f.type and (f.type is not int or value >= 0 or value == f.default) and value == value
    again = [f"--{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(script.Config) if getattr(config, f.name) != f.default]
    assert parse_cli(script.Config, again) == config
    if "check_flags" in vars(script):
        try:
            allowed(lambda: script.check_flags(config), "--")
        except OSError as e:  # `launch` says it: see test_security.py
            assert e.filename is not None


# ---------------------------------------------------------------------------------------------------------------------------------
# Tokenizers and checkpoints

@pytest.fixture(scope="module")
def trained(folder):
    tok = tokenizer.train(["the cat sat on the mat, the cat sat on the hat"] * 3, 270)
    tokenizer.save(tok, folder / "tok")
    return tok


def small_spec(folder):
    return json.loads((folder / "tok/tokenizer.json").read_text())


SAMPLE = "The cat's 12 hats:\n\n  naïve \U0001f600<|im_end|>"


@few(120)
@given(st.data())
def test_tokenizer_files(folder, trained, data):
    spec = small_spec(folder)
    where = folder / "near"
    where.mkdir(exist_ok=True)
    good = (folder / "tok/tokenizer_config.json").read_bytes()
    vocab, merges = spec["model"].pop("vocab"), spec["model"].pop("merges")  # large: they are changed apart from the rest
    kind = data.draw(st.sampled_from(["rest", "vocabulary", "merges", "bytes", "config"]))
    if kind == "rest":
        spec = data.draw(changed(st.just(spec)))
    last = dict(list(vocab.items())[254:])
    last = data.draw(changed(st.just(last))) if kind == "vocabulary" else last
    if isinstance(spec.get("model"), dict):
        spec["model"] |= {"vocab": dict(list(vocab.items())[:254]) | last, "merges": data.draw(changed(st.just({"m": merges}))).get("m") if kind == "merges" else merges}
    text = as_json(spec).encode("utf-8", "surrogatepass")
    (where / "tokenizer.json").write_bytes(data.draw(spoilt(st.just(text.decode("utf-8", "surrogatepass")))) if kind == "bytes" else text)
    (where / "tokenizer_config.json").write_bytes(data.draw(some_json(json.loads(good))) if kind == "config" else good)
    tok = allowed(lambda: tokenizer.load(where), where)
    ids = tok and allowed(lambda: tok.encode_ordinary(SAMPLE), "U+", "tiktoken gave up")
    if ids:
        assert max(ids) < tok.n_vocab and tok.eot not in ids
        assert tok.decode(ids) == SAMPLE or tok.nfc
        tokenizer.fingerprint(tok), tokenizer.token_bytes(tok)
        tokenizer.save(tok, folder / "again")
        assert tokenizer.fingerprint(tokenizer.load(folder / "again")) == tokenizer.fingerprint(tok)


@pytest.fixture(scope="module")
def ours(folder):
    made = save(random_model, folder / "run", "sft")
    (made / "train_state.json").write_text('{"epoch": 0, "index": 7, "best": 1.5, "beta": 0.1, "usual": [0.5, 20.0]}')
    shutil.copy(made / "model.safetensors", made / "train_state.safetensors")
    return made


FILES = ["config.json", "feinschliff.json", "manifest.json", "model.safetensors", "model.safetensors.index.json", "train_state.json", "tokenizer_config.json"]


@few(200)
@given(st.data())
def test_files_of_checkpoints(folder, ours, data):
    """With a manifest of ours that agrees, or as a stranger's."""
    where = folder / "changed"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(ours, where)
    name, stranger = data.draw(st.sampled_from(FILES)), data.draw(st.booleans())
    if name == "model.safetensors":
        whole = (where / name).read_bytes()
        n = struct.unpack("<Q", whole[:8])[0]
        head = data.draw(some_json(json.loads(whole[8 : 8 + n])))
        (where / name).write_bytes(struct.pack("<Q", data.draw(st.sampled_from([len(head)] * 5 + [n, 2**62]))) + head + whole[8 + n :])
    else:
        good = {"weight_map": {"model.norm.weight": "model.safetensors", "x": "model.safetensors"}} if "index" in name else json.loads((where / name).read_text())
        (where / name).write_bytes(data.draw(some_json(good)))
    if stranger and name not in ("feinschliff.json", "manifest.json"):
        (where / "feinschliff.json").unlink(), (where / "manifest.json").unlink()
    elif name != "manifest.json":
        (where / "manifest.json").write_text(json.dumps({p.name: sha256(p) for p in where.iterdir() if p.name != "manifest.json"}))
    if name == "train_state.json":
        found = allowed(lambda: load_state(where), where)
        assert found is None or found[1]["epoch"] >= 0 <= found[1]["index"]
        return
    found = allowed(lambda: load(where), where)
    if found:
        model, _, info = found
        weights = load(ours)[0].state_dict()
        assert all(torch.equal(w, weights[k]) for k, w in model.state_dict().items() if k in weights and k not in ("cos", "sin") and name != "model.safetensors")
        assert find(where) == where and (not info or info["step"] >= 0 or name == "feinschliff.json")


MANIFEST = {"format": 1, "tokenizer": tokenizer.fingerprint(BYTES), "n_vocab": 260, "dtype": "uint16", "eot": 256}


@few(100)
@given(st.data())
def test_manifests_of_prepared_data(folder, data):
    where = folder / "prepared"
    where.mkdir(exist_ok=True)
    np.array([256, 104, 105, 256], dtype=np.uint16).tofile(where / "a.bin")
    entry = {"file": "a.bin", "tokens": 4, "sha256": sha256(where / "a.bin")}
    (where / "manifest.json").write_bytes(data.draw(some_json(MANIFEST | {"splits": {"train": [entry], "val": [entry]}})))
    streams = allowed(lambda: corpus.read_prepared(where, BYTES), where)
    if streams:
        assert all(stream.tolist() == [256, 104, 105, 256] for part in streams for stream in part) and streams[0]


# ---------------------------------------------------------------------------------------------------------------------------------
# The log of rlaif.py


@few(150)
@given(st.data())
def test_logs_of_ai_feedback(folder, data):
    out = folder / "ai.jsonl"
    config = rlaif.Config("c.txt", "d.jsonl", str(out), resume=True)
    head = {"stage": "rlaif", "config": dataclasses.asdict(config), "data": {"d.jsonl": "ab"}}
    record = {"rows": 4, "bytes": 10, "seconds": 1.5, "counts": {"prompts": 4}, "figures": {"confidence": [3.5, 4]}}
    lines = [head, record, record | {"rows": 8, "bytes": 20}]
    texts = [json.dumps(line).encode() for line in lines]
    i = data.draw(st.integers(0, 2))
    texts[i] = data.draw(some_json(lines[i]))
    out.write_bytes(b"x" * 25)
    out.with_suffix(".log.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
    last = allowed(lambda: rlaif.begin(config, head), "--", "d.jsonl", out)
    if last is not None:
        assert out.stat().st_size == last.get("bytes", 0) <= 25
        if last:
            rlaif.show(last)
            assert last["rows"] >= 0
