"""What is nearly right: rows, flags, tokenizers, checkpoints and logs, each with a few things
changed. They are read as before or refused as documented."""

import copy
import dataclasses
import importlib
import json
import os
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import HealthCheck, given, settings, strategies as st
from runs import save

import evaluate
import figures
import rlaif
from data import chat, corpus, prepare, rows, shards, tokenizer
from data.judge import reply_pair
from data.read import read_jsonl, read_texts
from runtime.checkpoint import find, load, load_state
from runtime.cli import check_ranges, parse_cli, read_flags
from runtime.errors import UserError
from runtime.files import LOCKS, sha256
from runtime.output import open_output

TIMES = float(os.environ.get("FUZZ", 1))  # FUZZ=100 searches a hundred times as long
BYTES = tokenizer.byte_level()


def few(n):
    return settings(
        max_examples=max(1, int(n * TIMES)),
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = [0, 1, -1, 2, 7, 0.5, -2.5, 1e308, 1e-320, 10**12, -(10**12), 2**31, 2**63, 2**64, 10**400]
NUMBERS = st.sampled_from([*NUMBERS, float("inf"), float("nan"), True, False])
WORDS = ["", " ", "\n", "a", "user", "assistant", "system", "tool", "0", "1.5", "none", "#### 4", "\ud800", "\0"]
WORDS += ["\x1b[31m", "é", "../x", "/dev/zero", "<|im_end|>", "x" * 5000, "\n\nHuman: a\n\nAssistant: b"]
WORDS = st.sampled_from([*WORDS, "default", "llama3", "A", "hello there"])
DEPTHS = st.sampled_from([1, 3, 100, 300, 450, 480, 900, 960, 980, 990, 995, 2000])
SCALARS = st.one_of(st.none(), NUMBERS, WORDS)
JSON = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(WORDS, SCALARS, max_size=3),
    DEPTHS.map(lambda n: f"@deep{n}@"),
    st.just([{"role": "user", "content": "a"}]),
    st.just([{"role": "assistant", "content": "b"}]),
)


def places(value, at=()):
    """Every (path of keys) in a JSON value."""
    yield at
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def look_up(value, at):
    for key in at:
        value = value[key]
    return value


@st.composite
def changed(draw, good):
    """A JSON object with one to three things in it dropped, replaced, renamed, doubled or taken
    from elsewhere."""
    value = copy.deepcopy(draw(good))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(value))))
        if not at:
            continue
        parent, key = look_up(value, at[:-1]), at[-1]
        change = draw(st.sampled_from(["replace", "replace", "replace", "drop", "copy", "rename", "double"]))
        if change == "replace":
            parent[key] = copy.deepcopy(draw(JSON))  # what a strategy gives it may give again
        elif change == "drop":
            del parent[key]
        elif change == "copy":
            parent[key] = copy.deepcopy(look_up(value, draw(st.sampled_from(list(places(value))))))
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[draw(WORDS)] = parent.pop(key) if change == "rename" else copy.deepcopy(parent[key])
    return value


def as_json(value):
    """Its text; "@deep300@" stands for lists nested that deep, which json.dumps could not always
    write."""
    return re.sub(r'"@deep(\d+)@"(?!:)', lambda m: "[" * int(m[1]) + "]" * int(m[1]), json.dumps(value))


SPOILERS = [b"", b'"', b"{", b"}", b"[", b",", b":", b"\\", b"\\ud800", b"\xff", b"\0", b"\n", b"-", b"1e999", b"NaN"]
SPOILERS += [b"9", b"null"]


@st.composite
def spoilt(draw, text):
    """The bytes of a text with some flipped, cut out or put in."""
    data = bytearray(draw(text).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(0, len(data) - 1)))
        data[i : i + draw(st.integers(0, 3))] = draw(st.sampled_from(SPOILERS))
    return bytes(data)


def some_json(good):
    """Bytes of a file that is nearly the JSON object `good`."""
    good = st.just(good) if isinstance(good, dict) else good
    return st.one_of(
        changed(good).map(lambda v: as_json(v).encode("utf-8", "surrogatepass")), spoilt(good.map(json.dumps))
    )


def allowed(names, read, *args):
    """What read(*args) gives, or None if it is refused as documented: by a UserError of one line
    that names what it is about."""
    try:
        return read(*args)
    except UserError as e:
        message = str(e)
        assert message.isprintable() and len(message) < 8000, message
        assert any(str(name) in message for name in names), message
        return None


# --------------------------------------------------------------------------------------------------
# Rows

SYSTEM, QUESTION = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}
ANSWER, OTHER = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
GRADED = {
    "prompt": "Hi",
    "chosen": "Ho",
    "rejected": "Ha",
    "probability": 0.7,
    "gold_chosen": 1.5,
    "gold_rejected": 0.5,
}
REPLIES = {"prompt": "Hi", "reply_a": "Ho", "reply_b": "Ha", "principle": "Be kind.", "better": "A"}
ROWS = [
    {"messages": [SYSTEM, QUESTION, ANSWER]},
    {"messages": [QUESTION, ANSWER] * 2},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"prompt": "Hi", "completion": "Ho"},
    {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
    {"instruction": "Add.", "input": "2 2", "output": "4"},
    {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    GRADED,
    {"prompt": [SYSTEM, QUESTION], "chosen": [SYSTEM, QUESTION, ANSWER], "rejected": [SYSTEM, QUESTION, OTHER]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: Ha"},
    {"prompt": "Hi", "completion": "Ho", "label": True},
    {"text": "Once upon a time."},
    {"messages": [QUESTION, ANSWER | {"weight": 0, "name": "x"}, QUESTION, ANSWER], "tools": None, "history": []},
    {"system": "Be brief.", "query": "Hi", "response": "Ho", "history": [["Yo", "No"]], "context": ""},
    {"system_prompt": "", "question": "Hi", "chosen_response": "Ho", "rejected_response": "Ha"},
    {"input": {"messages": [QUESTION]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": ANSWER, "rejected": OTHER},
    {"conversation": [{"human": "Hi", "assistant": "Ho"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, "Ho"]}, ANSWER]},
    REPLIES,
    {"prompt": "2 + 2 =", "answer": "4"},
]
PARSERS = [rows.conversation, rows.problem, rows.prompt_only, rows.preference, rows.judged, reply_pair]


def check_messages(messages):
    """What a parser lets through can be made tokens, of which those of a completion are trained."""
    assert messages and all(m.keys() - {"train"} == {"role", "content"} for m in messages)
    encoded = chat.encode(BYTES, messages)
    assert encoded.loss_mask.any() == any(m["role"] == "assistant" and "train" not in m for m in messages)
    assert json.loads(json.dumps(messages, ensure_ascii=False).encode()) == messages


def use(parse, parsed):
    """What the stages do first with a row."""
    if parse is rows.conversation:
        check_messages(parsed)
    elif parse in (rows.problem, rows.prompt_only):
        check_messages(parsed[0])
        assert parsed[0][-1]["role"] == "user"
    elif parse is rows.judged:
        for messages, completion, label in parsed:
            check_messages([*messages, {"role": "assistant", "content": completion}])
            assert type(label) is bool
    else:
        check_messages(parsed.prompt)
        figures.label_margins([parsed])
        if parse is rows.preference:
            figures.preference_figures([parsed] * 3, np.ones(3), np.ones((3, 2)), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def fine(parse, row):
    try:
        return parse(row) is not None
    except ValueError:
        return False


@few(150)
@given(st.sampled_from(PARSERS), some_json(st.sampled_from(ROWS)))
def test_rows_of_conversations(folder, parse, line):
    path = folder / "rows.jsonl"
    good = next(json.dumps(row).encode() for row in ROWS if fine(parse, row))
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    found = allowed([f"{path}:"], rows.read, str(path), parse)
    kept = rows.read(str(path), parse, skip_bad=True)
    for row in kept[0]:
        use(parse, row)
    assert found is None or (repr(found[0]) == repr(kept[0]) and found[1] == kept[1])
    assert repr(kept[0][0]) == repr(kept[0][-1]) == repr(parse(json.loads(good)))  # its neighbours are what they were


@pytest.mark.parametrize("gold", ["x", None, [1], 10**400, float("nan"), {}])
def test_what_the_search_found_in_preferences(gold):
    """Gold that is no number, the same gold for both sides of every pair, and a verdict that no
    dictionary could look up."""
    pair = rows.preference(GRADED | {"gold_chosen": gold})
    assert np.isnan(rows.gold_margin(pair.row)) and rows.gold_margin(GRADED) == 1
    use(rows.preference, pair)
    use(rows.preference, rows.preference(GRADED | {"gold_chosen": 0.5}))
    assert np.isnan(reply_pair(REPLIES | {"better": gold}).probability)
    assert reply_pair(REPLIES).probability == 1


@few(120)
@given(some_json(st.sampled_from(ROWS)))
def test_rows_of_text_and_of_measurements(folder, line):
    path = folder / "texts.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b"\n")
    names = [f"{path}:1", f"{path}:2", f"{path}:3", path]
    for read in (corpus.read_documents, read_texts):
        documents = allowed(names, lambda read=read: list(read(str(path))))
        if documents is not None:
            tokens = corpus.encode(BYTES, documents)
            assert tokenizer.token_bytes(BYTES)[tokens].sum() == sum(len(d.encode()) for d in documents)
    skipping = prepare.Config("", "", "", skip_bad=True)
    texts = list(prepare.documents(path, skipping))
    records = prepare.scan(np.zeros(0, np.uint64), skipping, [(0, text) for text in texts])
    assert texts[0] == "one" and len(records) == len(texts)
    allowed(names, lambda: list(prepare.documents(path, prepare.Config("", "", ""))))
    allowed(names, prepare.evaluation_grams, [path])
    allowed(names, evaluate.read_strings, str(path), ("prompt", "answer"))
    assert all(isinstance(row, dict) for _, row in read_jsonl(path, skip_bad=True) if row is not None)


# --------------------------------------------------------------------------------------------------
# Flags

SCRIPTS = ["pretrain", "sft", "reward", "ppo", "dpo", "grpo", "rlaif", "sample", "evaluate", "quickstart"]
SCRIPTS = [importlib.import_module(name) for name in (*SCRIPTS, "data.tokenizer", "data.prepare", "data.world")]
VALUES = ["a.jsonl:0.5,b.jsonl:0.5", "9" * 5000, "١٢", "1_0", "--", "x.py:f*2", "judge:x", "hf:x[a,b,c]"]
VALUES = st.one_of(
    NUMBERS.map(str),
    WORDS.filter(lambda s: "\0" not in s and "\ud800" not in s),
    st.text("0123456789.-+_eExXinfaTrue,:=/ ", max_size=12),
    st.sampled_from(VALUES),
)


@st.composite
def flags(draw):
    """(script, argv): each flag known or nearly, its value right or nearly."""
    script, argv = draw(st.sampled_from(SCRIPTS)), []
    fields = dataclasses.fields(script.Config)
    required = [f for f in fields if f.default is dataclasses.MISSING]
    for f in [f for f in required if draw(st.integers(0, 9))] + draw(st.lists(st.sampled_from(fields), max_size=4)):
        spellings = [f.name.replace("_", "-"), f.name[:-1], f.name.upper(), f.name + " "]
        name = draw(st.sampled_from([f.name] * 8 + spellings))
        default = "" if f.default is dataclasses.MISSING else str(f.default)
        value = draw(st.one_of(st.just(default), VALUES))
        forms = [[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [f"-{name}={value}"], [value]]
        argv += draw(st.sampled_from([forms[0], *forms]))
    return script, argv


@few(300)
@given(flags())
def test_flags_of_every_script(script_and_argv):
    script, argv = script_and_argv
    if {"-h", "--help"} & set(argv):
        return
    config = allowed(["--", "a flag was expected"], parse_cli, script.Config, argv)
    if config is None:
        return
    fields, ranges = dataclasses.fields(script.Config), read_flags(script.Config)
    assert all(type(getattr(config, f.name)) is f.type for f in fields)
    values = {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}
    if not any(value != value for value in values.values()):  # nan is no value
        assert parse_cli(script.Config, [f"--{name}={value}" for name, value in values.items()]) == config
    if allowed(["--"], lambda: check_ranges(config) or True):
        for f in fields:
            value, flag = getattr(config, f.name), ranges[f.name]
            assert value == f.default or f.type is not int or value >= 0
            assert value == f.default or f.type is not float or abs(value) < float("inf")
            assert value == f.default or not flag.choices or value in flag.choices


# --------------------------------------------------------------------------------------------------
# Tokenizers and checkpoints


@pytest.fixture(scope="module")
def trained(folder):
    tok = tokenizer.train(["the cat sat on the mat, the cat sat on the hat"] * 3, 270)
    tokenizer.save(tok, folder / "tok")
    return tok


SAMPLE = "The cat's 12 hats:\n\n  naïve \U0001f600<|im_end|>"


@few(120)
@given(st.data())
def test_tokenizer_files(folder, trained, data):
    spec = json.loads((folder / "tok/tokenizer.json").read_text())
    good = (folder / "tok/tokenizer_config.json").read_bytes()
    where = folder / "near"
    where.mkdir(exist_ok=True)
    # vocabulary and merges are large: they are changed apart from the rest
    vocab, merges = spec["model"].pop("vocab"), spec["model"].pop("merges")
    kind = data.draw(st.sampled_from(["rest", "vocabulary", "merges", "bytes", "config"]))
    if kind == "rest":
        spec = data.draw(changed(st.just(spec)))
    if kind == "vocabulary":
        last = dict(list(vocab.items())[254:])
        vocab = dict(list(vocab.items())[:254]) | data.draw(changed(st.just(last)))
    if kind == "merges":
        merges = data.draw(changed(st.just({"merges": merges}))).get("merges")
    if isinstance(spec.get("model"), dict):
        spec["model"] |= {"vocab": vocab, "merges": merges}
    text = as_json(spec).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        text = data.draw(spoilt(st.just(text.decode("utf-8", "surrogatepass"))))
    (where / "tokenizer.json").write_bytes(text)
    config = data.draw(some_json(json.loads(good))) if kind == "config" else good
    (where / "tokenizer_config.json").write_bytes(config)
    tok = allowed([where], tokenizer.load, where)
    ids = tok and allowed(["U+", "tiktoken gave up"], tok.encode_ordinary, SAMPLE)
    if ids:
        assert max(ids) < tok.n_vocab and tok.eot not in ids
        assert tok.decode(ids) == SAMPLE or tok.nfc
        tokenizer.token_bytes(tok)
        tokenizer.save(tok, folder / "again")
        assert tokenizer.fingerprint(tokenizer.load(folder / "again")) == tokenizer.fingerprint(tok)


@pytest.fixture(scope="module")
def ours(folder):
    made = save(random_model, folder / "run", "sft")
    counters = {"best": 1.5, "warnings": ["chosen"], "order": {"epoch": 0, "index": 7}, "beta": {"value": 0.1}}
    (made / "train_state.json").write_text(json.dumps(counters))
    shutil.copy(made / "model.safetensors", made / "train_state.safetensors")
    return made


FILES = ["config.json", "feinschliff.json", "manifest.json", "model.safetensors", "model.safetensors.index.json"]
FILES += ["train_state.json", "tokenizer_config.json"]
INDEX = {"weight_map": {"model.norm.weight": "whole.safetensors", "x": "whole.safetensors"}}


def sign(where):
    """Write a manifest that agrees with what is there now."""
    hashes = {p.name: sha256(p) for p in where.iterdir() if p.name != "manifest.json"}
    (where / "manifest.json").write_text(json.dumps(hashes))


@few(200)
@given(st.data())
def test_files_of_checkpoints(folder, ours, data):
    """With a manifest of ours that agrees, or as an untrusted directory."""
    where = folder / "changed"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(ours, where)
    name, untrusted = data.draw(st.sampled_from(FILES)), data.draw(st.booleans())
    if name == "model.safetensors":
        whole = (where / name).read_bytes()
        n = struct.unpack("<Q", whole[:8])[0]
        head = data.draw(some_json(json.loads(whole[8 : 8 + n])))
        length = data.draw(st.sampled_from([len(head)] * 5 + [n, 2**62]))
        (where / name).write_bytes(struct.pack("<Q", length) + head + whole[8 + n :])
    else:
        good = INDEX if "index" in name else json.loads((where / name).read_text())
        if "index" in name:  # which is read only where there is no model.safetensors
            (where / "model.safetensors").rename(where / "whole.safetensors")
        (where / name).write_bytes(data.draw(some_json(good)))
    if untrusted and name not in ("feinschliff.json", "manifest.json"):
        (where / "feinschliff.json").unlink()
        (where / "manifest.json").unlink()
    elif name != "manifest.json":
        sign(where)
    if name == "train_state.json":
        found = allowed([where], load_state, where)
        assert found is None or isinstance(found[1], dict)
        return
    found = allowed([where], load, where)
    if found:
        model, _, info = found
        weights = load(ours)[0].state_dict()
        if name != "model.safetensors":
            for key, w in model.state_dict().items():
                assert key in ("cos", "sin") or key not in weights or torch.equal(w, weights[key])
        assert find(where) == where and (not info or info["step"] >= 0 or name == "feinschliff.json")


MANIFEST = {"format": 1, "tokenizer": tokenizer.fingerprint(BYTES), "n_vocab": 260, "dtype": "uint16", "eot": 256}


@few(100)
@given(st.data())
def test_manifests_of_prepared_data(folder, data):
    where = folder / "prepared"
    where.mkdir(exist_ok=True)
    np.array([256, 104, 105, 256], dtype=np.uint16).tofile(where / "a.bin")
    entry = {"file": "a.bin", "tokens": 4, "sha256": sha256(where / "a.bin")}
    good = MANIFEST | {"splits": {"train": [entry], "val": [entry]}}
    (where / "manifest.json").write_bytes(data.draw(some_json(good)))
    streams = allowed([where], shards.read_prepared, where, BYTES)
    if streams:
        assert all(stream.tolist() == [256, 104, 105, 256] for part in streams for stream in part) and streams[0]


# --------------------------------------------------------------------------------------------------
# The log of a file that is written batch by batch


@few(150)
@given(st.data())
def test_logs_of_ai_feedback(folder, data):
    out = folder / "ai.jsonl"
    config = rlaif.Config("c.txt", "d.jsonl", str(out), resume=True)
    head = {"stage": "rlaif", "config": dataclasses.asdict(config), "data": {"d.jsonl": "ab"}}
    record = {"rows": 4, "bytes": 10, "seconds": 1.5, "counts": {"prompts": 4}, "figures": {"confidence": [3.5, 4]}}
    record |= {"squares": {"confidence": [3.25, 3.5, 4.0]}}
    lines = [head, record, record | {"rows": 8, "bytes": 20}]
    texts = [json.dumps(line).encode() for line in lines]
    i = data.draw(st.integers(0, 2))
    texts[i] = data.draw(some_json(lines[i]))
    out.write_bytes(b"x" * 25)
    out.with_suffix(".log.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
    last = allowed(["--", "d.jsonl", out], open_output, config, head)
    while LOCKS:
        LOCKS.pop().close()
    if last is not None:
        assert out.stat().st_size == last["bytes"] <= 25 and last["rows"] >= 0
        figures.show_record(last)
