"""Rows of chat files: the formats people have, weights, what is held out, what a bad row yields."""

import hashlib
import json
import math
import re
import unicodedata

import numpy as np
import pytest

import distill
import sft
from data import chat, judge, kto, rows, tokenizer
from runtime.errors import UserError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN = [Q, A]
BYTES = tokenizer.byte_level()


def turns(*contents, system=""):
    """Messages of user and assistant in turn, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


def reply(content):
    return [{"role": "assistant", "content": content}]


def write(path, some_rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some_rows), encoding="utf-8")
    return str(path)


def reading(**flags):
    """The config of a stage that reads rows."""
    return sft.Config(init="", out="", **flags)


# -------------------------------------------------------------------------------------------------
# The formats people have

CONVERSATIONS = {
    "messages": ({"messages": turns("a", "b", "c", "d", system="s")}, turns("a", "b", "c", "d", system="s")),
    "messages with more in them": (
        {"messages": [m | {"name": "x", "weight": 1} for m in turns("a", "b")], "id": 7},
        turns("a", "b"),
    ),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, turns("a", "b")),
    "prompt messages, completion string": (
        {"prompt": turns("a", system="s"), "completion": "b"},
        turns("a", "b", system="s"),
    ),
    "prompt and completion messages": (
        {"prompt": turns("a", "b", "c"), "completion": reply("d")},
        turns("a", "b", "c", "d"),
    ),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, turns("a", "b")),
    "Alpaca without the field": (
        {"instruction": "a", "output": "b", "text": "### Task: a\n\n### Answer: b"},
        turns("a", "b"),
    ),
    "Alpaca with input": ({"instruction": "a", "input": "x", "output": "b"}, turns("a\n\nx", "b")),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        turns("a", "b", system="s"),
    ),
    "ShareGPT by role": ({"conversations": turns("a", "b")}, turns("a", "b")),
    "GSM8K": (
        {"question": "a", "answer": "48/2 = <<48/2=24>>24 clips\n#### 24"},
        turns("a", "48/2 = 24 clips\n#### 24"),
    ),
    "MATH-500": (
        {"problem": "a", "solution": "2 + 2 = \\boxed{4}", "answer": "4", "level": 1, "unique_id": "x"},
        turns("a", "2 + 2 = \\boxed{4}"),
    ),
    "MATH": ({"problem": "a", "solution": "b", "type": "Algebra"}, turns("a", "b")),
    "a problem's number apart": (
        {"question": "a", "answer": 4, "solution": "2 + 2 = <<2+2=4>>4"},
        turns("a", "2 + 2 = 4"),
    ),
    "a solution that is a number": ({"question": "a", "answer": "2 + 2 = 4", "solution": "4"}, turns("a", "2 + 2 = 4")),
    "a solution beside messages": (
        {"problem": "a", "solution": "x", "answer": "4", "messages": turns("a", "b")},
        turns("a", "b"),
    ),
    "a solution beside a completion": ({"prompt": "a", "solution": "4", "completion": "b"}, turns("a", "b")),
    "a problem": ({"prompt": "a", "answer": "b"}, turns("a", "b")),
    "an indented answer": (
        {"prompt": "def f():", "completion": "    return 1\n"},
        turns("def f():", "    return 1\n"),
    ),
    "OpenOrca": ({"system_prompt": "s", "question": "a", "response": "b", "id": "x"}, turns("a", "b", system="s")),
    "HelpSteer": ({"prompt": "a", "response": "b", "helpfulness": 4}, turns("a", "b")),
    "Dolly": ({"instruction": "a", "context": "x", "response": "b", "category": "qa"}, turns("a\n\nx", "b")),
    "a query": ({"query": "a", "response": "b"}, turns("a", "b")),
    "an input": ({"input": "a", "output": "b"}, turns("a", "b")),
    "Magpie": (
        {"instruction": "a", "response": "b"}
        | {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        turns("a", "b"),
    ),
    "a system column of ShareGPT": (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": ""},
        turns("a", "b", system="s"),
    ),
    "a system column that repeats the message": (
        {"system": "s", "messages": turns("a", "b", system="s")},
        turns("a", "b", system="s"),
    ),
    "a system message in the column of an API": (
        {"systemInstruction": "s", "System": "s", "system_fingerprint": "fp_1", "prompt": "a", "completion": "b"},
        turns("a", "b", system="s"),
    ),
    "text as the content": (
        {"messages": [{"role": "prompter", "text": "a"}, {"role": "assistant", "text": "b", "type": "message"}]},
        turns("a", "b"),
    ),
    "a content under one of its names": (
        {
            "messages": [
                {"role": "user", "content": "a", "value": ""},
                {"role": "assistant", "content": " ", "text": "b", "value": []},
            ]
        },
        turns("a", "b"),
    ),
    "an empty system message": (
        {"messages": [{"role": "system", "content": ""}, *turns("a", "b")]},
        turns("a", "b"),
    ),
    "Alpaca with history": (
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"},
        turns("a", "b", "c", "d", system="s"),
    ),
    "history as messages": ({"query": "c", "response": "d", "history": turns("a", "b")}, turns("a", "b", "c", "d")),
    "messages of the prompt, a completion": ({"messages": turns("a"), "completion": "b"}, turns("a", "b")),
    "an input that says nothing": ({"instruction": "a", "input": "<noinput>", "output": "b"}, turns("a", "b")),
    "columns that pandas filled": (
        {"instruction": "a", "input": "nan", "output": "None", "context": "None", "system": "null"},
        turns("a", "None"),
    ),
    "a problem of a benchmark": ({"problem": "a", "answer": "b", "is_correct": True}, turns("a", "b")),
    "HTML": ({"prompt": "<s>a</s>", "completion": "<s>b</s>"}, turns("<s>a</s>", "<s>b</s>")),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "c", "image_url": None}]},
            ]
        },
        turns("a b", "c"),
    ),
    "a developer, and other names": (
        {
            "conversation": [
                {"role": "developer", "content": "s"},
                {"from": "Human", "content": "a"},
                {"role": "ASSISTANT", "value": "b"},
            ]
        },
        turns("a", "b", system="s"),
    ),
    "turns": (
        {"conversation": [{"human": "a", "assistant": "b"}, {"input": "c", "output": "d"}]},
        turns("a", "b", "c", "d"),
    ),
    "nulls at every depth": (
        {
            "messages": [m | {"tool_calls": None, "images": [None]} for m in turns("a", "b")],
            "tools": None,
            "prompt": None,
        }
        | {"system": None, "history": [], "functions": [{"name": None}], "images": []},
        turns("a", "b"),
    ),
    "remarks": (
        {"messages": turns("a", "b"), "reasoning_model": "x", "num_thoughts": 4, "image_id": "y", "has_tools": False}
        | {"reasoning_tokens": 12, "source": "z", "tools": "[]"},
        turns("a", "b"),
    ),
    "OpenR1-Math": (
        {"problem": "a", "messages": turns("a", "b"), "is_reasoning_complete": [True, False]},
        turns("a", "b"),
    ),
    "Llama-Nemotron": (
        {"input": turns("a"), "output": "b", "reasoning": "off", "system_prompt": "s", "used_in_training": ["Ultra"]},
        turns("a", "b", system="s"),
    ),
    "an answer with << and >>": ({"question": "a", "answer": "<<EOF>>, <<i>>"}, turns("a", "<<EOF>>, <<i>>")),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_in_every_format(tmp_path, name):
    row, wanted = CONVERSATIONS[name]
    found, digests = rows.read(write(tmp_path / "rows.jsonl", [row] * 3), rows.conversation)
    assert found == [wanted] * 3 and [len(d) for d in digests.values()] == [64]
    assert rows.prompt(row) == wanted[:-1]  # the same row as something to answer


PAIRS = {
    "strings": ({"prompt": "a", "chosen": "b", "rejected": "c"}, turns("a")),
    "prompt messages, strings": (
        {"prompt": turns("x", "y", "a", system="s"), "chosen": "b", "rejected": "c"},
        turns("x", "y", "a", system="s"),
    ),
    "all messages": ({"prompt": turns("a"), "chosen": reply("b"), "rejected": reply("c")}, turns("a")),
    "prompt inside both": (
        {"chosen": turns("x", "y", "a", "b"), "rejected": turns("x", "y", "a", "c")},
        turns("x", "y", "a"),
    ),
    "UltraFeedback": (
        {
            "prompt": "a",
            "prompt_id": "7",
            "messages": turns("a", "b"),
            "chosen": turns("a", "b"),
            "rejected": turns("a", "c"),
            "score_chosen": 8.0,
        },
        turns("a"),
    ),
    "a prompt that differs in white space": (
        {"prompt": " a\nx ", "chosen": turns("a x", "b"), "rejected": turns("a x", "c"), "tie": "False"},
        turns("a x"),
    ),
    "no tie": ({"prompt": "a", "chosen": "b", "rejected": "c", "tie": "0.0"}, turns("a")),
    "prompt and a system message inside": (
        {"prompt": "a", "chosen": turns("a", "b", system="s"), "rejected": turns("a", "c", system="s")},
        turns("a", system="s"),
    ),
    "HH": (
        {
            "chosen": "\n\nHuman: x\n\nAssistant: y\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: x\n\nAssistant: y\n\nHuman: a\n\nAssistant: c",
        },
        turns("x", "y", "a"),
    ),
    "HH with its prompt apart": (
        {"prompt": "\n\nHuman: x\n\nAssistant: y\n\nHuman: a\n\nAssistant:", "chosen": "b", "rejected": "c"},
        turns("x", "y", "a"),
    ),
    "HH twice": (
        {"prompt": "\n\nHuman: a\n\nAssistant:", "response": "b"}
        | {side: f"\n\nHuman: a\n\nAssistant: {text}" for side, text in (("chosen", "b"), ("rejected", "c"))},
        turns("a"),
    ),
    "Orca": ({"system": "", "question": "a", "chosen": "b", "rejected": "c"}, turns("a")),
    "Orca with a system message": (
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c", "score": 1},
        turns("a", system="s"),
    ),
    "Alpaca": (
        {"instruction": "a", "input": "x", "chosen": "b", "rejected": "c", "system": None},
        turns("a\n\nx"),
    ),
    "Argilla": ({"instruction": "a", "chosen_response": "b", "rejected_response": "c"}, turns("a")),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
            "system": "s",
        },
        turns("a", system="s"),
    ),
    "OpenAI": (
        {
            "input": {"messages": turns("a", system="s"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": reply("b"),
            "non_preferred_output": reply("c"),
        },
        turns("a", system="s"),
    ),
    "ms-swift": (
        {"query": "a", "response": "b", "rejected_response": "c", "history": [["x", "y"]], "system": "s"},
        turns("x", "y", "a", system="s"),
    ),
    "ms-swift's messages": ({"messages": turns("x", "y", "a", "b"), "rejected_response": "c"}, turns("x", "y", "a")),
    "nulls at every depth": (
        {"prompt": None, "chosen": [m | {"tool_calls": None} for m in turns("a", "b")], "tools": [None]}
        | {"rejected": [m | {"images": [{"url": None}], "name": None} for m in turns("a", "c")]},
        turns("a"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_in_every_format(tmp_path, name):
    row, prompt = PAIRS[name]
    path = write(tmp_path / "rows.jsonl", [row])
    assert rows.read(path, rows.preference)[0] == [(prompt, "b", "c", 1.0, row)]
    assert rows.read(path, rows.judged)[0] == [[(prompt, "b", True), (prompt, "c", False)]]


def test_a_soft_label_is_kept():
    assert rows.preference({"prompt": "a", "chosen": "b", "rejected": "c", "probability": 0.25}).probability == 0.25


def test_judged_answers():
    assert rows.judged({"prompt": "a", "completion": " b ", "label": False}) == [(turns("a"), " b ", False)]
    assert rows.judged({"instruction": "a", "output": "b", "kto_tag": False}) == [(turns("a"), "b", False)]
    weighted = [m | {"weight": 0} for m in turns("a", "b")] + turns("c", "d")
    assert rows.judged({"messages": weighted, "label": True}) == [(turns("a", "b", "c"), "d", True)]
    assert rows.judged({"prompt": turns("a"), "completion": reply("b"), "label": True}) == [(turns("a"), "b", True)]
    assert rows.judged({"messages": turns("a", "b", "c", "d"), "label": True}) == [(turns("a", "b", "c"), "d", True)]


@pytest.mark.parametrize("probability, better", [(1, True), (0.51, True), (0.49, False), (0, False), (None, True)])
def test_the_better_answer_of_a_pair_is_that_of_its_probability(probability, better):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "probability": probability}
    assert rows.judged(pair) == [(turns("a"), "b", better), (turns("a"), "c", not better)]
    with pytest.raises(rows.Unread, match='"probability" is 0.5, so neither answer is the better one'):
        rows.judged(pair | {"probability": 0.5})
    assert rows.preference(pair | {"probability": 0.5}).probability == 0.5


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": turns("a", "b")},
        {"messages": turns("a")},
        {"messages": turns("a", "b")},
        {"instruction": "a"},
        {"question": "a"},
    ],
)
def test_prompts_with_or_without_an_answer_to_leave_out(row):
    assert rows.prompt_only(row) == (turns("a"), row)


def test_parquet_is_read_as_jsonl_is(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = pyarrow.string()
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    names = ("prompt", "completion", "instruction", "input", "output", "chosen")
    schema = pyarrow.schema([*((name, text) for name in names), ("messages", messages)])
    alike = [{"messages": turns("a", "b")}, {"messages": turns("Grüße", "日本", system="s")}]
    mixed = [CONVERSATIONS[name][0] for name in ("prompt and completion", "Alpaca with input", "Alpaca")] + alike
    path = tmp_path / "rows.parquet"
    for some_rows, their_schema in ((alike, None), (mixed, schema)):  # a row has nulls for the columns that it lacks
        parquet.write_table(pyarrow.Table.from_pylist(some_rows, schema=their_schema), path)
        expected = rows.read(write(tmp_path / "rows.jsonl", some_rows), rows.conversation)[0]
        assert rows.read(str(path), rows.conversation)[0] == expected
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="rows.parquet: cannot be read as Parquet"):
        rows.read(str(path), rows.conversation)


def test_gold_margin_is_the_difference_or_nan():
    assert rows.gold_margin({"gold_chosen": 1, "gold_rejected": 0.25}) == 0.75
    for gold in (None, "x", [], 1e300):
        assert math.isnan(rows.gold_margin({"gold_chosen": gold, "gold_rejected": 0}))


def questions(found):
    return [messages[0]["content"] for messages in found]


def test_weights_are_shares_of_the_rows(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "x"} for i in range(60)])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "completion": "x"} for i in range(60)])
    found, hashes = rows.read(f"{a}:0.75,{b}:0.25", rows.conversation, seed=1)
    of_b = [text for text in questions(found) if text[0] == "b"]
    assert len(found) == 80 and len(set(of_b)) == 20 and list(hashes) == [a, b]
    assert "20 of 60 rows, for its share of 0.25" in capsys.readouterr().out
    again, other = (rows.read(f"{a}:0.75,{b}:0.25", rows.conversation, seed=seed)[0] for seed in (1, 2))
    assert again == found != other
    assert len(rows.read(f"{a},{b}", rows.conversation)[0]) == 120
    with pytest.raises(UserError, match="b.jsonl has no weight"):
        rows.read(f"{a}:0.5,{b}", rows.conversation)


def test_a_hash_depends_on_the_rows_alone(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    (tmp_path / "b.jsonl").write_text('\n{"completion":"a",   "prompt":"q"}\n')
    c = write(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "b"}])
    hashes = [rows.read(str(path), rows.conversation)[1][str(path)] for path in (a, tmp_path / "b.jsonl", c)]
    assert hashes[0] == hashes[1] != hashes[2]
    expected = hashlib.sha256(b'{"completion": "a", "prompt": "q"}').hexdigest()
    assert hashes[0] == expected


def prompts(names):
    """Rows as rows.prompt_only gives them, numbered."""
    return [(turns(name), {"n": i}) for i, name in enumerate(names)]


@pytest.mark.parametrize("n, fraction", [(2, 0.001), (2, 0.999), (10, 0.3), (100, 0.05)])
def test_held_out_rows_are_some_and_never_all(n, fraction):
    found = prompts(map(str, range(n)))
    train, val = rows.split_off(found, fraction, seed=3)
    assert sorted(row["n"] for _, row in train + val) == list(range(n)) and train
    assert len(val) == max(1, min(n - 1, int(n * fraction)))


def test_held_out_rows_are_random():
    found = prompts(map(str, range(100)))
    held_out = [tuple(row["n"] for _, row in rows.split_off(found, 0.3, seed)[1]) for seed in (3, 3, 4)]
    assert held_out[0] == held_out[1] and len({*held_out, tuple(range(30))}) == 3
    with pytest.raises(UserError, match="one.jsonl: one prompt only"):
        rows.split_off(prompts(["a"] * 5), 0.5, seed=0, name="one.jsonl")


def offline(row):
    """As distill.py --offline has it."""
    return rows.conversation(row), row


def encoded(row):
    """As every stage that has a tokenizer has it."""
    return rows.Encoded(rows.conversation(row), "its tokens")


SHARED = [  # the same question in a row of every kind, told apart by `answer`
    (rows.conversation, lambda q, answer: {"prompt": q, "completion": answer}),
    (rows.conversation, lambda q, answer: {"messages": [*turns(q, answer), *turns("then?", answer)]}),
    (rows.preference, lambda q, answer: {"prompt": q, "chosen": answer, "rejected": "no"}),
    (rows.judged, lambda q, answer: {"prompt": q, "completion": answer, "label": True}),
    (rows.judged, lambda q, answer: {"prompt": q, "chosen": answer, "rejected": "no"}),
    (rows.prompt_only, lambda q, answer: {"prompt": q, "answer": answer}),
    (rows.problem, lambda q, answer: {"prompt": q, "answer": answer.removeprefix("a")}),
    (offline, lambda q, answer: {"prompt": q, "completion": answer}),
    (offline, lambda q, answer: {"messages": [*turns(q, answer), *turns("then?", answer)]}),
    (encoded, lambda q, answer: {"prompt": q, "completion": answer}),
]


@pytest.mark.parametrize("parse, make", SHARED)
@pytest.mark.parametrize("sizes", [[6] * 20, [1, 2, 3, 40, 5, 4, 7], [50, 49]])
def test_all_rows_of_a_prompt_are_held_out_or_none(parse, make, sizes):
    """The same question in another row is not new: the figures would measure memory."""
    found = [parse(make(f"q{q}", f"a{i}")) for q, size in enumerate(sizes) for i in range(size)]
    assert len({rows.prompt_of(row) for row in found}) == len(sizes)
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    for fraction in (0.01, 0.1, 0.5):
        train, val = rows.split_off(found, fraction, seed=1)
        assert not {rows.prompt_of(row) for row in train} & {rows.prompt_of(row) for row in val}
        assert len(train) + len(val) == len(found) and train and val
        assert len(val) <= max(fraction * len(found), min(sizes))


SURROUNDINGS = {  # of a question that ends with its number
    "white space and case": lambda q: turns(f" {q.upper()}\n"),
    "a mark and letters decomposed": lambda q: turns(unicodedata.normalize("NFD", q) + " ?"),
    "a system message": lambda q: turns(q, system="Be brief."),
    "later turns": lambda q: turns(q, "It is.", "Sure?"),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("parse", [rows.conversation, rows.preference, rows.judged, rows.prompt_only, offline])
def test_a_question_is_held_out_with_whatever_surrounds_it(parse, surrounding, tmp_path, capsys):
    answers = {"completion": "yes"} if parse is not rows.preference else {"chosen": "yes", "rejected": "no"}
    answers |= {"label": True} if parse is rows.judged else {}
    prompts = [make(f"est-ce né {i}") for i in range(40) for make in (turns, SURROUNDINGS[surrounding])]
    data = write(tmp_path / "a.jsonl", [{"prompt": prompt} | answers for prompt in prompts])
    train, val, _ = rows.read_split(reading(data=data, val_fraction=0.4), parse)
    numbers = [set(re.findall(r"\d+", repr(list(map(rows.prompt_of, some))))) for some in (train, val)]
    assert not numbers[0] & numbers[1] and len(val) == 32 and "trained on" not in capsys.readouterr().out
    halves = {"data": prompts[::2], "val": prompts[1::2]}
    files = {name: write(tmp_path / name, [{"prompt": x} | answers for x in half]) for name, half in halves.items()}
    rows.read_split(reading(**files), parse)
    found = re.search("of 40 rows to validate on, ([0-9]+) have .*, ([0-9]+) one that", capsys.readouterr().out)
    assert sum(map(int, found.groups())) == 40


@pytest.mark.parametrize("followed", [True, False])
def test_a_question_asked_under_twelve_system_messages_is_one_question(followed):
    """Or followed by twelve others."""

    def surrounded(question, i):
        return turns(question, "7.", f"And {i}?") if followed else turns(question, system=f"You are {i}.")

    found = [(surrounded(f"What is {n} + 1?", i), {"n": n}) for n in range(30) for i in range(12)]
    for n_rows, fraction, held_out in ((360, 0.1, 36), (96, 0.05, 12)):  # few are held out at least
        train, val = rows.split_off(found[:n_rows], fraction, seed=0)
        assert not {row["n"] for _, row in train} & {row["n"] for _, row in val} and len(val) == held_out


@pytest.mark.parametrize("openings", [1, 9])
def test_an_opening_with_more_rows_than_are_held_out_is_no_question(openings):
    found = [(turns(f"Hello {i % openings}!", "Hello!", f"What is {i} + 5?"), {}) for i in range(900)]
    train, val = rows.split_off(found, 0.05, seed=0)
    assert len(val) == 45


def test_prompts_that_begin_with_an_example_are_told_apart_by_what_follows():
    shown = [turns("What is 1 + 1?", "2", f"What is {i} + 5?") for i in range(100)]
    found = [(messages, {}) for messages in shown] + [(turns("How are you?"), {})]
    train, val = rows.split_off(found, 0.2, seed=0)
    assert len(val) == 20


def test_prompts_that_begin_alike_are_told_apart_by_their_system_message():
    found = [(turns("Go on.", system=f"You are {i}."), {}) for i in range(10)]
    train, val = rows.split_off(found, 0.2, seed=0)
    assert (len(train), len(val)) == (8, 2)


@pytest.mark.parametrize("parse, make", SHARED)
def test_prompts_that_data_and_val_share_are_said(parse, make, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [make(q, f"a{i}") for i, q in enumerate(["How are you?", "b", "c"])])
    shared = ["how  ARE you?", "How are you?", "d", "e", "f"]
    val = write(tmp_path / "b.jsonl", [make(q, f"a{i}") for i, q in enumerate(shared)])
    rows.read_split(reading(data=data, val=val), parse)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "trained on" in x]
    assert "of 5 rows to validate on, 1 have a prompt that is trained on" in line and "1 one that asks the same" in line
    val = write(tmp_path / "c.jsonl", [make(q, f"a{i}") for i, q in enumerate("defg")])
    rows.read_split(reading(data=data, val=val), parse)
    assert "trained on" not in capsys.readouterr().out


def shared(train, val, capsys):
    """(rows with the same prompt, rows that ask the same) of `val`, of which a warning tells."""
    rows.warn_of_shared_prompts(train, val, "val")
    found = re.search("validate on, ([0-9]+) have .*, ([0-9]+) one that", capsys.readouterr().out)
    return tuple(map(int, found.groups())) if found else (0, 0)


@pytest.mark.parametrize("form", [lambda row: row, lambda row: rows.Encoded(row, "its tokens"), lambda row: (row, {})])
def test_a_question_that_is_trained_as_a_later_turn_is_said(form, capsys):
    alone = [form(turns(f"What is {i}?", "X.")) for i in range(5)]
    later = [form(turns(f"Hello {i * i + 50}", "Hi", f"what is {i}", "X.")) for i in range(5)]
    assert shared(later, alone, capsys) == shared(alone, later, capsys) == (0, 5)
    masked = [form([*turns(f"Hello {i}", "Hi", f"what is {i}"), reply("X.")[0] | {"train": False}]) for i in range(5)]
    assert shared(masked, alone, capsys) == (0, 0)
    more = [form(turns(f"Tell me {i}", "X.", f"what is {i}", "X.")) for i in range(5)]
    assert shared(later, more, capsys) == (0, 0)  # both follow something else, as "Why?" does


def test_a_prompt_asks_with_its_last_turn_only(capsys):
    def pairs(*contents):
        return [rows.Pair(turns(*(text.format(i) for text in contents)), "a", "b", 1.0, {}) for i in range(5)]

    later = pairs("Hello {}", "Hi", "What is {}?")
    assert shared(later, pairs("what is {}"), capsys) == (0, 5)
    assert shared(later, [(pair.prompt, {}) for pair in pairs("what is {}")], capsys) == (0, 5)
    assert shared([[(pair.prompt, "a", True)] for pair in later], pairs("what is {}"), capsys) == (0, 5)
    assert shared(pairs("Hello {}", "Hi", "What is {}?", "X.", "Sure {}?"), pairs("what is {}"), capsys) == (0, 0)


def test_what_many_rows_say_in_a_later_turn_is_no_question(capsys):
    train = [turns(f"What is {i}?", "X.", "Hi", "Hello") for i in range(40)]
    assert shared(train, [turns("Hi", "Hello", f"Why {i}?", "X.") for i in range(5)], capsys) == (0, 0)


def test_validation_rows_come_from_their_file_or_are_held_out(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}"} for i in range(20)])
    b = write(tmp_path / "b.jsonl", [{"prompt": q} for q in "bcde"])
    train, val, hashes = rows.read_split(reading(data=a, val_fraction=0.2), rows.prompt)
    assert (len(train), len(val), list(hashes)) == (16, 4, [a])
    train, val, hashes = rows.read_split(reading(data=a, val=b), rows.prompt)
    assert (len(train), val, list(hashes)) == (20, [turns(q) for q in "bcde"], [a, b])
    with pytest.raises(UserError, match="--val_fraction=0.2: --val=.*b.jsonl is what is validated on; leave it out"):
        rows.read_split(reading(data=a, val=b, val_fraction=0.2), rows.prompt)


def test_too_few_prompts_to_validate_on_are_refused(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "c"} for i in range(20)])
    b = write(tmp_path / "b.jsonl", [{"prompt": "b", "completion": f"c{i}"} for i in range(9)])
    with pytest.raises(UserError, match="held out of /.*one prompt only.*raise --val_fraction, or give --val"):
        rows.read_split(reading(data=a), rows.conversation)
    assert len(rows.read_split(reading(data=a), rows.prompt_only)[1]) == 1  # what is sampled to it is new each time
    with pytest.raises(UserError, match="--val=.*b.jsonl: rows of one prompt only.*bring more"):
        rows.read_split(reading(data=a, val=b), rows.conversation)


def test_one_prompt_only_names_the_file_that_was_read(tmp_path):
    """distill.py reads --offline; --data may not be given."""
    one = write(tmp_path / "one.jsonl", [{"prompt": "b", "completion": f"c{i}"} for i in range(9)])
    with pytest.raises(UserError, match="^[^ ]*one.jsonl: one prompt only") as error:
        rows.read_split(reading(data=one), rows.conversation)
    assert "--data" not in str(error.value)


def test_a_question_to_validate_on_in_many_spellings_is_one(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "c"} for i in range(20)])

    def read(prompts, data=a):
        val = write(tmp_path / "b.jsonl", [{"prompt": prompt, "completion": "c"} for prompt in prompts])
        rows.read_split(reading(data=data, val=val), rows.conversation)
        return capsys.readouterr().out

    with pytest.raises(UserError, match="b.jsonl: rows of one prompt only"):
        read(["Tell me" + " " * i + " a story" + "." * (i % 3) for i in range(12)])
    assert "b.jsonl: 1 prompts to validate on" in read([turns("Go on.", system=f"You are {i}.") for i in range(12)])
    assert "b.jsonl: 9 prompts to validate on" in read([f"story {i % 9}" + "?" * (i % 2) for i in range(36)])
    assert "mostly chance" not in read([f"story {i}" for i in range(10)])
    # where all rows ask the same, the system message is what tells them apart
    told = [{"prompt": turns("Go on.", system=f"Be {i}."), "completion": "c"} for i in range(20)]
    told = write(tmp_path / "c.jsonl", told)
    assert "mostly chance" not in read([turns("Go on.", system=f"You are {i}.") for i in range(12)], told)


def test_rows_that_do_not_fit_are_no_rows_to_validate_on(tmp_path, capsys):
    """Of twelve, one is short enough: a figure would be of that one."""
    answers = ["c", *["c" * 300] * 11]
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "chosen": "c", "rejected": "d"} for i in range(20)])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "chosen": c, "rejected": "d"} for i, c in enumerate(answers)])
    with pytest.raises(UserError, match="--val=.*b.jsonl: rows of one prompt only.*bring more"):
        chat.read_pairs(reading(data=a, val=b), BYTES, 100)
    answers[1] = "c"
    write(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "chosen": c, "rejected": "d"} for i, c in enumerate(answers)])
    chat.read_pairs(reading(data=a, val=b), BYTES, 100)
    assert "b.jsonl: 2 prompts to validate on, so its figures are mostly chance" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["chat", "kto", "prompts"])
def test_what_is_left_is_what_is_counted_for_every_kind_of_rows(tmp_path, capsys, kind):
    said = [{"completion": "c"} | ({"label": i % 2 == 0} if kind == "kto" else {}) for i in range(20)]
    short = [{"prompt": f"a{i}"} | answer for i, answer in enumerate(said)]
    long = [{"prompt": f"b{i}" + "x" * 300 * (i > 2)} | answer for i, answer in enumerate(said)]
    a, b = write(tmp_path / "a.jsonl", short), write(tmp_path / "b.jsonl", long)
    config = reading(data=a, val=b, max_new_tokens=8)
    read = {"chat": sft.read_chats, "kto": kto.read_items, "prompts": chat.read_prompts}[kind]
    read(config, BYTES, 100)
    assert "b.jsonl: 3 prompts to validate on" in capsys.readouterr().out


def test_random_rows_are_of_every_source_and_in_their_order():
    some = [rows.random_rows(list(range(100)), 40, seed) for seed in range(5)]
    assert all(chosen == sorted(set(chosen)) and len(chosen) == 40 for chosen in some)
    assert all(10 < sum(i >= 50 for i in chosen) < 30 for chosen in some) and some[0] != some[1]
    assert rows.random_rows([3, 1, 2], 9, 0) == [3, 1, 2]


@pytest.mark.parametrize("n, warned", [(2, True), (9, True), (10, False)])
def test_few_prompts_to_validate_on_are_warned_of(tmp_path, capsys, n, warned):
    a, b = (write(tmp_path / f"{q}.jsonl", [{"prompt": f"{q}{i}", "completion": "c"} for i in range(n)]) for q in "ab")
    rows.read_split(reading(data=a, val=b), rows.conversation)
    assert (f"b.jsonl: {n} prompts to validate on, so its figures are" in capsys.readouterr().out) == warned


def test_an_answer_that_was_cut_is_no_fine_tuning_data(tmp_path):
    """As evaluate.py --samples writes it; trained on, it would teach to end in the middle."""
    samples = [{"prompt": "q", "completion": "It is 4", "finished": finished} for finished in (True, False, True)]
    path = write(tmp_path / "samples.jsonl", samples)
    with pytest.raises(UserError, match=r'samples.jsonl:2: "finished" is false.*--skip_bad=True'):
        rows.read(path, rows.conversation)
    assert len(rows.read(path, rows.conversation, skip_bad=True)[0]) == 2
    assert len(rows.read(path, rows.prompt)[0]) == 3  # as a question it is as good as any


@pytest.mark.parametrize(
    "said",
    [{"finished": 0}, {"end_turn": False}, {"truncated": True}]
    + [{name: value} for name in ("finish_reason", "stop_reason") for value in ("length", "max_tokens")]
    + [{"finishReason": "MAX_TOKENS"}, {"done_reason": "length"}, {"is_truncated": True}]
    + [{"is_complete": False}, {"completed": False}, {"status": "incomplete"}, {"finish_reason": "content_filter"}]
    + [{"finish_reason": {"type": "length", "length": 64}}, {"stop_reason": ["length"]}, {"truncated": "True"}]
    + [{name: True} for name in ("incomplete", "unfinished", "cut_off", "hit_max_tokens", "maxTokensReached")]
    + [{"stopped_limit": True}, {"finished": "no"}, {"is_truncated": "yes"}, {"finish_reasons": ["length"]}]
    + [{"finish_reason": "model_length"}, {"stop_type": "limit"}, {"incomplete_details": {"reason": "max_tokens"}}],
)
def test_whatever_says_that_an_answer_was_cut_is_read(said):
    (name,) = said
    (value,) = said.values()
    whole = {name: not value if isinstance(value, bool | int) else "stop"}
    pair = {"prompt": "q", "chosen": "It is 4", "rejected": "b"}
    both = {"prompt": "q", "reply_a": "It is 4", "reply_b": "b"}
    for row in ({"prompt": "q", "completion": "It is 4"} | said, {"messages": [Q, A | said]}):
        with pytest.raises(ValueError, match=f'"{name}" is .*: the answer was cut'):
            rows.conversation(row)
        assert rows.prompt(row) == turns("q")
    assert rows.conversation({"messages": [Q, A | whole]} | whole) == PLAIN
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):  # it would be given an end
        with pytest.raises(ValueError, match=f'"{name}" is .*: the answer was cut'):
            rows.preference({"prompt": [Q], side: [A | said], other: "b"})
    for parse, row in (
        (rows.preference, pair),
        (rows.judged, pair),
        (judge.reply_pair, pair),
        (judge.reply_pair, both),
    ):
        for named in (name, f"chosen_{name}", f"{name}_rejected"):
            with pytest.raises(ValueError, match=f'"{named}" is .*: the answer was cut'):
                parse(row | {named: value})
            assert parse(row | {named: whole[name]})


@pytest.mark.parametrize(
    "remark",
    [{"limit": True}, {"knowledge_cutoff": "2023"}, {"untruncated": True}, {"reached_eos": True}, {"max_tokens": 1}]
    + [{"reason": "It is shorter."}, {"type": "limit"}, {"details": ["some"]}, {"hit": 1}, {"completeness": 0}],
)
def test_not_every_remark_on_an_end_says_that_it_was_cut(remark):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for parse, row in ((rows.conversation, {"messages": PLAIN}), (rows.preference, pair)):
        assert parse(row | remark)


# -------------------------------------------------------------------------------------------------
# What a bad row yields: an error that names the file, the line and the field

BAD_CONVERSATIONS = [
    ({"messages": [A, Q]}, "\"messages\"[0]: a message of 'assistant', but one of 'user' is due"),
    ({"messages": [Q, Q, A]}, "\"messages\"[1]: a message of 'user', but one of 'assistant' is due"),
    ({"messages": [Q, A, A]}, '"messages"[2]'),
    ({"messages": [Q, {"role": "system", "content": "s"}, A]}, "\"messages\"[1]: a message of 'system'"),
    ({"messages": [Q, {"role": "tool", "content": "s"}]}, "the role 'tool'"),
    ({"messages": [Q]}, "\"messages\" ends with a message of 'user'"),
    ({"messages": [{"role": "system", "content": "s"}]}, "\"messages\" ends with a message of 'system'"),
    ({"messages": []}, '"messages" is not a list of messages'),
    ({"messages": "hello"}, '"messages" is not a list of messages'),
    ({"messages": ["q", "a"]}, '"messages"[0]'),
    ({"messages": [{"content": "q"}, A]}, '"messages"[0]'),
    ({"messages": [Q, {"role": "assistant"}]}, '"messages[1].content" is missing'),
    ({"messages": [Q, {"role": "assistant", "content": None}]}, '"messages[1].content" is missing'),
    ({"messages": [Q, {"role": "assistant", "content": []}]}, '"messages[1].content" is list'),
    (
        {"messages": [Q, {"role": "assistant", "content": [{"type": "text"}]}]},
        "\"messages[1]\" has content of type 'text'",
    ),
    ({"messages": [Q, A | {"value": "b"}]}, '"messages[1]" has a "content" and another "value"'),
    ({"messages": [Q, A | {"from": "human"}]}, '"messages[1]" has a "role" and another "from"'),
    ({"messages": [Q, {"role": "assistant", "content": " \n"}]}, '"messages[1].content" is empty'),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "a"}]}, '"conversations"[1]'),
    ({"prompt": "q", "completion": ""}, '"completion" is empty'),
    ({"prompt": "", "completion": "a"}, '"prompt" is empty'),
    ({"prompt": 5, "completion": "a"}, '"prompt"'),
    ({"completion": "a"}, 'no "prompt" in the fields completion'),
    ({"prompt": "q", "completion": [Q]}, '"completion": one message of the assistant'),
    ({"prompt": "q", "completion": PLAIN}, '"completion": one message of the assistant'),
    ({"instruction": "q", "output": ""}, '"output" is empty'),
    ({"instruction": "q"}, '"output" is missing'),
    ({"instruction": "q", "input": ["x"], "output": "a"}, '"input"'),
    ({"question": "q", "answer": 5}, '"answer" is int'),
    ({"prompt": "q"}, "no conversation in the fields prompt"),
    ({"system": "x", "messages": turns("q", "a", system="y")}, '"system" is another system message'),
    (
        {"system": "x", "system_prompt": "y", "prompt": "q", "completion": "a"},
        '"system_prompt" is another system message',
    ),
    ({"messages": [{"role": "system", "content": ""}]}, '"messages" has no message that is not empty'),
    ({"prompt": turns(system="s"), "completion": "a"}, '"prompt" has no question of a user'),
    (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "\n\nHuman: q\n\nAssistant: a"},
        '"completion" begins with the "prompt"',
    ),
    ({"messages": PLAIN, "extra": json.loads("[" * 700 + "]" * 700)}, "nested too deeply"),
    ({"prompt": "q", "question": "z", "completion": "a"}, '"question" says something that is not read'),
    ({"prompt": "q", "completion": "a", "output": "b"}, '"output" says something that is not read'),
    ({"messages": PLAIN, "conversations": turns("q", "b")}, '"conversations" says something that is not read'),
    ({"messages": PLAIN, "response": "b"}, '"response" says something that is not read'),
    ({"messages": turns("a", "b", "c", "d"), "history": [["x", "y"]]}, '"history" says something that is not read'),
    ({"query": "q", "response": "a", "history": [["x"]]}, '"history"[0] is not {"role", "content"}'),
    ({"query": "q", "response": "a", "history": [["x", ""]]}, '"history[1].content" is empty'),
    ({"prompt": "q" + " " * 500_001, "completion": "a"}, '"prompt" has more than 500000 white-space characters'),
    ({"text": "once upon a time"}, '"text" is what pretraining reads'),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "a preference (chosen, rejected), not a conversation; reward.py and dpo.py read it",
    ),
    ({}, "no conversation in the fields (none)"),
]
UNREAD_MESSAGES = {  # of the assistant: a field, what it may hold; each with a field of the same kind that is empty
    "tool_calls": [{"type": "function", "function": {"name": "f"}}],
    "toolCalls": [{"name": "f"}],
    "function_call": {"name": "f", "arguments": "{}"},
    "tool_call_id": None,
    "reasoning_content": "so",
    "reasoning": "so",
    "reasoning_details": [{"type": "text", "text": "so"}],
    "thinking": "so",
    "thought": "so",
    "Complex_CoT": "so",
    "analysis": "so",
    "images": ["a.png"],
    "image_url": {"url": "a.png"},
    "audio": {"id": "a"},
    "video": "a.mp4",
    "documents": [{"text": "so"}],
    "refusal": "no",
    "scratchpad": "so",
    "attachments": ["a.pdf"],
    "skip": True,
    "prefix": True,
    "mask": 1,
    "ignore_loss": True,
    "isMasked": True,
    "mask_loss": True,
    "do_not_train": True,
    "noTrain": 1,
    "exclude_from_training": "true",
    "untrained": True,
    "loss_spans": [[0, 4]],
    "train_detail": [{"begin_offset": 0}],
}
UNREAD_ROWS = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_list": '[{"name": "f"}]',
    "functions": [{"name": "f"}],
    "images": ["a.png"],
    "image": "a.png",
    "audios": [{"bytes": b"x"}],
    "reasoning_content": "so",
    "thinking_trajectories": ["so"],
    "documents": ["so"],
    "media": ["a.mp3"],
    "img": "a.png",
    "attachments": ["a.pdf"],
    "ctxs": [{"id": 1, "text": "so"}],
    "passage": "so",
    "starter_code": "so",
    "paragraph": "so",
    "story": "so",
    "endings": ["so"],
    "answer_choices": ["so"],
    "opb": "so",
    "choice2": "so",
    "B": "so",
    "option_c": "so",
    "tie": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "history": "q a",
    "context": "so",
    "weight": 0.5,
    "sample_weight": 0,
    "train": False,
    "is_train": False,
    "assistant_prefix": "Sure",
    "prefill": "Sure",
    "suffix": "return x",
    "mask": [0, 1],
    "loss_mask": [False, True],
    "weights": [0.0, 1.0],
    "mask_history": True,
    "only_last_turn_loss": True,
    "mask_loss": True,
    "do_not_train": True,
    "exclude_from_training": 1,
    "include_in_loss": False,
    "use_for_training": 0,
}


def variants(content):
    """A row of each kind whose last message has more in it."""
    messages = [Q, A | content]
    return [
        (rows.conversation, {"messages": messages}),
        (rows.conversation, {"conversations": messages}),
        (rows.conversation, {"prompt": "q", "completion": messages[1:]}),
        (rows.preference, {"chosen": messages, "rejected": turns("q", "b")}),
        (rows.preference, {"prompt": [Q], "chosen": reply("b"), "rejected": messages[1:]}),
        (rows.judged, {"messages": messages, "label": True}),
        (rows.prompt, {"messages": [*messages, Q]}),
    ]


@pytest.mark.parametrize("field", UNREAD_MESSAGES)
def test_no_field_of_a_message_that_says_something_is_ignored(field):
    value = UNREAD_MESSAGES[field]
    for parse, row in variants({field: value}):
        if value is not None:
            with pytest.raises(rows.Unread, match=f'"[a-z]+\\[[01]\\].{field}" says something that is not read'):
                parse(row)
    for empty in (None, "", [], {}, [None], [{"name": None}], False):
        for parse, row in variants({field: empty}):
            assert parse(row)


@pytest.mark.parametrize("field", UNREAD_ROWS)
def test_no_column_that_says_something_is_ignored(field):
    value, pair = UNREAD_ROWS[field], {"chosen": "a", "rejected": "b"}
    talks = [{"messages": PLAIN}, {"prompt": "q", "completion": "a"}, {"question": "q", "answer": "5"}]
    cases = [(rows.conversation, row) for row in talks]
    cases += [
        (rows.judged, {"prompt": "q", "completion": "a", "label": True}),
        (rows.preference, {"query": "q"} | pair),
    ]
    of_training = (rows.MASKS | rows.TRAINED).intersection(rows.words_of(field))
    if field not in ("reasoning_content", "thinking_trajectories") and not of_training:
        cases += [(rows.prompt, row) for row in talks] + [(rows.problem, {"question": "q", "answer": "5"})]
    for parse, row in cases:
        with pytest.raises(rows.Unread, match=f'"{field}" says something that is not read'):
            parse(row | {field: value})
        for empty in (None, "", [], {}):
            assert parse(row | {field: empty})


def test_what_is_left_out_is_counted_by_field_once_a_file(tmp_path, capsys):
    called = {"messages": [Q, A | {"tool_calls": [{"name": "f"}]}]}
    listed = {"messages": PLAIN, "tools": [{"name": "f"}]}
    path = write(tmp_path / "a.jsonl", [called, {"messages": PLAIN}, listed, called, {"messages": []}])
    with pytest.raises(UserError, match=r'a.jsonl:1: "messages\[1\].tool_calls" says something that is not read'):
        rows.read(path, rows.conversation)
    assert rows.read(path, rows.conversation, skip_bad=True)[0] == [PLAIN]
    out = capsys.readouterr().out
    assert out == f'{path}: 4 bad lines left out, 1 read; 2 for "tool_calls", 1 for "tools", which is not read\n'


def test_fields_of_messages_that_nobody_knows_are_said_once_a_file(tmp_path, capsys):
    row = {"messages": [Q | {"country": "x"}, A | {"header": {"a": "b"}, "toxic": False, "turn": None}]}
    assert rows.read(write(tmp_path / "a.jsonl", [row] * 9), rows.conversation)[0] == [PLAIN] * 9
    out = capsys.readouterr().out
    assert out == f'{tmp_path}/a.jsonl: fields of messages that are not read: "country", "header", "toxic"\n'


def test_columns_with_text_that_nobody_knows_are_said_once_a_file(tmp_path, capsys):
    remark = {"persona": "You are a pirate.", "category": "open qa", "source_id": "one two three", "score": 4}
    pair = {"chosen": "b", "rejected": "c"}
    for i, (parse, row) in enumerate([(rows.conversation, {"messages": PLAIN}), (rows.preference, pair)]):
        path = write(tmp_path / f"{i}.jsonl", [row | remark | ({"prompt": "a"} if i else {})] * 9)
        assert len(rows.read(path, parse)[0]) == 9
        assert capsys.readouterr().out == f'{path}: columns that are not read: "persona"\n'
        rows.read(path, rows.prompt_only)  # a reward reads what it likes
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("letters", [str.title, str.upper, str.capitalize])
def test_capital_names_are_the_same_fields(letters):
    def capital(row):
        return {letters(name): value for name, value in row.items()}

    for wanted, row in ((rows.conversation, CONVERSATIONS), (rows.preference, PAIRS)):
        for example, _ in row.values():
            if not {"systemInstruction", "images"} & example.keys():
                assert wanted(capital(example))[:-1] == wanted(example)[:-1]
    asked = {"question": "q", "answer": "#### 5"}
    for row in (asked, asked | {"answer": 5}):
        found, read = rows.problem(capital(row))
        assert found == turns("q") and rows.right_number(read) == 5
    assert rows.right_number(rows.prompt_only(capital(asked))[1]) == 5
    assert rows.prompt_only(capital(asked))[1][letters("answer")] == "#### 5"  # a reward's own name for it
    assert judge.other_fields(capital(asked | {"context": "so"})) == {"answer": "#### 5"}
    for field in ("context", "options", "passage", "optiona", "opa", "choice1", "text"):
        for parse in (rows.conversation, rows.prompt, rows.problem):
            with pytest.raises(rows.Unread, match=f'"{field}" says something that is not read'):
                parse(capital(asked | {field: "so it is"}))


def test_a_text_beside_a_prompt_is_a_copy_of_it_or_unread():
    for row in (
        {"question": "When was she born?", "answer": "1815"},
        {"messages": turns("When was she born?", "1815")},
    ):
        for parse in (rows.prompt, *([rows.problem] if "answer" in row else [])):
            with pytest.raises(rows.Unread, match='"text" says something that is not read'):
                parse(row | {"text": "Ada wrote the first program."})
            assert parse(row | {"text": "Q: When was she born?\nA: 1815"})


def test_a_text_beside_a_conversation_is_a_copy_of_it_or_unread():
    copy, passage = "<s>[INST] Who? \n In which year? [/INST] Ada </s>", "Ada was born in 1815."
    rows_with_text = [
        (rows.conversation, {"messages": turns("Who?\nIn which year?", "Ada")}),
        (rows.conversation, {"instruction": "Who?", "input": "In which year?", "output": "Ada\n\nOf course."}),
        (rows.preference, {"prompt": "Who?", "chosen": "Ada", "rejected": "Bob"}),
        (rows.judged, {"prompt": "Who?", "completion": "Ada", "label": True}),
    ]
    for parse, row in rows_with_text:
        assert parse(row | {"text": copy})
        with pytest.raises(rows.Unread, match='"text" says something that is not read'):
            parse(row | {"text": passage.replace("Ada", "She")})


def test_the_reason_for_an_answer_is_unread_and_that_of_a_judge_is_not():
    with pytest.raises(rows.Unread, match='"rationale" says something'):
        rows.conversation({"prompt": "a", "completion": "b", "rationale": "so"})
    assert rows.preference({"prompt": "a", "chosen": "b", "rejected": "c", "rationale": "so"})


@pytest.mark.parametrize("kind", ["tool_call", "function_call", "reasoning", "image", "code"])
def test_a_message_of_another_type_is_unread(kind):
    with pytest.raises(rows.Unread, match=f"is of type '{kind}', which is not read"):
        rows.conversation({"messages": [Q, A | {"type": kind}]})


def test_a_dialogue_is_no_answer():
    text = "\n\nHuman: q\n\nAssistant: a"
    with pytest.raises(ValueError, match='"completion" begins with the "prompt"'):
        rows.conversation({"prompt": "q", "completion": text})


def test_a_name_counts_if_it_tells_speakers_apart():
    named = [m | {"name": name} for m, name in zip(turns("a", "b", "c", "d"), ("x", "y", "x", "y"))]
    assert rows.conversation({"messages": named}) == turns("a", "b", "c", "d")
    named[2]["name"] = "z"
    with pytest.raises(rows.Unread, match=r'"messages\[2\].name" says something'):
        rows.conversation({"messages": named})


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"weight": 0, "train": False}]
    + [{name: False} for name in ("trainable", "training", "train_on_turn", "loss_mask", "lossWeight", "is_train")]
    + [{name: 0} for name in ("learn", "should_train", "compute_loss", "calculate_loss", "use_loss")]
    + [{name: False} for name in ("include_in_loss", "has_loss", "applyLoss", "contributes_to_loss", "to_train")]
    + [{name: False} for name in ("use_for_training", "used_for_training")],
)
def test_a_message_may_be_read_and_not_trained(flag):
    messages = [turns("a", "b")[0], turns("a", "b")[1] | flag, *turns("c", "d")]
    untrained = turns("a", "b", "c", "d")
    untrained[1]["train"] = False
    assert rows.conversation({"messages": messages}) == untrained
    assert rows.conversation({"messages": turns("a", "b", "c", "d")[:3], "completion": "d"}) == turns(
        "a", "b", "c", "d"
    )
    marked = chat.marked(BYTES, chat.encode(BYTES, untrained))
    assert marked.count("«") == 1 and marked.endswith(
        "\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«d<|im_end|>»"
    )
    assert rows.prompt({"messages": messages}) == turns("a", "b", "c")  # nothing of a prompt is trained
    with pytest.raises(ValueError, match="no message of the assistant that is to be trained"):
        rows.conversation({"messages": messages[:2]})
    with pytest.raises(ValueError, match="ends with a message that is not to be trained"):
        rows.preference({"chosen": messages[:2], "rejected": turns("a", "c")})
    for wrong in ({"weight": 0.5}, {"train": "false"}, {"weight": 1, "train": False}, {"loss_scale": 0.1}):
        with pytest.raises(ValueError, match='"messages\\[1\\]'):
            rows.conversation({"messages": [Q, A | wrong]})
    for name in ("train", "loss", "training"):
        with pytest.raises(ValueError, match="only messages of the assistant are trained"):
            rows.conversation({"messages": [Q | {name: True}, A]})


@pytest.mark.parametrize("name", ["mask_loss", "do_not_train", "no_train", "excludeFromTraining"])
def test_what_is_not_kept_from_training_is_trained(name):
    assert rows.conversation({"messages": [Q, A | {name: False}], name: False, "eval_loss": 0.0}) == PLAIN
    assert rows.conversation({"messages": [Q, A | {"include_in_loss": True, "eval_loss": 0.0}]}) == PLAIN


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"train": False}, {"label": False}, {"loss": "0"}, {"weight": 0.5}, {"label": 0}]
    + [{"mask": True}, {"ignore_loss": 1}, {"do_not_train": True}, {"loss_mask": [0, 1]}],
)
def test_a_part_of_a_message_is_trained_or_refused(mark):
    """Parts are joined, so none can be left out of the loss."""
    (name,) = mark
    for messages in ([Q, A], turns("x", "y", "q", "a")):
        for i in range(len(messages)):
            parts = [{"type": "text", "text": messages[i]["content"]}, {"type": "text", "text": " more"} | mark]
            marked = [*messages[:i], messages[i] | {"content": parts}, *messages[i + 1 :]]
            with pytest.raises(rows.Unread, match=rf'"messages\[{i}\].content.{name}" says something'):
                rows.conversation({"messages": marked})
    for kept in ({"weight": 1}, {"train": True}, {"label": True}, {"label": "so"}, {"loss": "1"}, {"mask": False}):
        part = {"type": "text", "text": "a"} | kept
        assert rows.conversation({"messages": [Q, A | {"content": [part]}]}) == PLAIN


@pytest.mark.parametrize(
    "mark",
    [{"weight": value} for value in ("0", "0.0", 0.0, "0.5", 0, "2")]
    + [{"train": value} for value in ("false", "False", False, "0", [0, 1])]
    + [{"sample_weight": "0"}, {"is_train": "false"}, {"loss": [0, 1]}, {"mask_loss": "true"}],
)
def test_a_row_that_is_not_trained_fully_is_refused_in_quotes_too(mark):
    (name,) = mark
    for parse, row in variants({}):
        if parse is not rows.prompt:
            with pytest.raises(rows.Unread, match=f'"{name}" says something that is not read'):
                parse(row | mark)
            for kept in (1, "1", "1.0", "", None, *(["true", True] if name != "mask_loss" else [])):
                assert parse(row | {name: kept if name != "mask_loss" else False})
    for remark in ({"loss": "0"}, {"loss": 0.0}, {"weight": "light"}, {"train": "ICE 5"}):
        assert rows.conversation({"messages": PLAIN} | remark) == PLAIN


REPEATED = [
    ("Name a colour.", " Red", True),
    ("2+2?", " 4", True),
    ("Hello", " there", False),
    ("Good morning", "! How are you?", False),
]


@pytest.mark.parametrize("prompt, more, refused", REPEATED)
def test_an_answer_that_repeats_its_prompt_is_refused(prompt, more, refused):
    text = prompt.replace(" ", "\n") + more
    cases = [
        (rows.conversation, {"prompt": prompt, "completion": text}),
        (rows.conversation, {"question": prompt, "response": text}),
        (rows.conversation, {"prompt": turns(prompt), "completion": reply(text)}),
        (rows.conversation, {"messages": turns("x", "y", prompt), "completion": text}),
        (rows.judged, {"prompt": prompt, "completion": text, "label": True}),
        (rows.preference, {"prompt": prompt, "chosen": text, "rejected": text + " no"}),
        (rows.preference, {"instruction": prompt, "chosen": reply(text), "rejected": reply(text + " no")}),
    ]
    for parse, row in cases:
        if refused:
            with pytest.raises(ValueError, match="only what follows it is the answer"):
                parse(row)
        else:
            assert parse(row)
    assert rows.preference({"prompt": prompt, "chosen": text, "rejected": "no"}).chosen == text  # it may quote it
    assert rows.conversation({"messages": turns(prompt, text)})


def test_a_prompt_that_ends_with_its_answer_is_refused():
    """python_code_instructions_18k_alpaca has the whole text for training in "prompt"."""
    row = {"instruction": "Add them", "output": "a + b"}
    whole = row | {"prompt": "### Instruction:\nAdd them\n\n### Output:\na + b\n"}
    for parse in (rows.conversation, rows.prompt):
        with pytest.raises(ValueError, match='"prompt" ends with the "output", its answer'):
            parse(whole)
    assert rows.conversation(row | {"prompt": "Add them. Output:"}) == turns("Add them. Output:", "a + b")
    assert rows.conversation({"prompt": "Repeat: a + b", "output": "a + b"})
    assert rows.conversation({"instruction": "Is it good or bad", "input": "I hate it", "output": "bad"})


def test_the_beginning_of_an_answer_in_a_prompt_is_refused():
    begun = turns("a", "To be")
    pair = {"chosen": "x", "rejected": "y"}
    cases = [(rows.conversation, {name: begun, "completion": "x"}) for name in ("prompt", "question", "input")]
    cases += [
        (rows.conversation, {"prompt": begun, "completion": reply("x")}),
        (rows.preference, {"prompt": begun} | pair),
    ]
    cases += [(rows.preference, {"conversations": begun, "chosen": reply("x")[0], "rejected": reply("y")[0]})]
    cases += [(rows.prompt, {"prompt": begun, "answer": "5"}), (rows.problem, {"prompt": begun, "answer": "5"})]
    cases += [(rows.judged, {"prompt": begun, "completion": "x", "label": True})]
    cases += [(rows.preference, {"prompt": "\n\nHuman: a\n\nAssistant: To be"} | pair)]
    for parse, row in cases:
        with pytest.raises(ValueError, match="the beginning of an answer, which is not read"):
            parse(row)


def test_a_bad_answer_is_no_conversation():
    row = {"prompt": "q", "completion": "a", "label": False}
    with pytest.raises(ValueError, match="a bad answer, which dpo.py --loss=kto reads"):
        rows.conversation(row)
    for label, said in ((0, "0"), (0.0, "0.0"), (-1, "-1"), ("0", '"0"'), ("False", '"False"')):
        with pytest.raises(ValueError, match=f'"label" is {said}: a bad answer'):
            rows.conversation(row | {"label": label})
        assert rows.judged(row | {"label": label}) == [(turns("q"), "a", False)]  # as the error advises
    for flag in ("is_correct", "correct", "accepted", "tests_passed"):
        with pytest.raises(ValueError, match=f'"{flag}" is false: a bad answer'):
            rows.conversation({"messages": PLAIN, flag: False})
        assert rows.conversation({"messages": PLAIN, flag: 0.0}) == PLAIN  # a measurement
    for label in (1, 1.0, "1", "true"):
        assert rows.judged(row | {"label": label}) == [(turns("q"), "a", True)]
    assert rows.conversation(row | {"label": "positive"}) == turns("q", "a")
    assert rows.conversation(row | {"label": True}) == turns("q", "a")
    assert rows.judged(row) == [(turns("q"), "a", False)] and rows.prompt(row) == turns("q")


@pytest.mark.parametrize(
    "mark",
    [{"is_correct": value} for value in ("False", "false", "FALSE", False)]
    + [{"label": value} for value in ("bad", "undesirable", "false", False, 0)]
    + [{"incorrect": True}, {"isWrong": "true"}, {"deleted": True}, {"tests_passed": "False"}],
)
def test_whatever_calls_an_answer_bad_is_read(mark):
    (name,) = mark
    rows_of_bad = [{"messages": PLAIN} | mark, {"messages": [Q, A | mark]}, {"prompt": "q", "completion": [A | mark]}]
    rows_of_bad += [{"prompt": "q", "completion": A | mark}, {"conversations": [*turns("x", "y"), Q, A | mark]}]
    for row in rows_of_bad:
        with pytest.raises(ValueError, match=f'"{name}" is .*: a bad answer'):
            rows.conversation(row)
        assert rows.prompt(row)
    corrected = [*turns("x"), {"role": "assistant", "content": "y", "weight": 0} | mark, Q, A]
    assert len(rows.conversation({"messages": corrected})) == 4  # it is read and not trained
    assert rows.judged({"messages": [Q, A | mark], "label": False}) == [([Q], "a", False)]
    assert rows.preference({"prompt": "q", "chosen": [A], "rejected": [A | {"content": "b"} | mark]}).rejected == "b"


@pytest.mark.parametrize(
    "remark",
    [{"is_correct": value} for value in (True, "True", 0.0, "0.2", [False], "unknown")]
    + [{"label": "positive"}, {"label": "good"}, {"incorrect": False}, {"deleted": "false"}, {"wrong": 0}]
    + [{"incorrect_answers": ["b"]}, {"correct_answer": "a"}, {"verified": False}],
)
def test_other_verdicts_are_remarks(remark):
    assert rows.conversation({"messages": [Q, A | remark]} | remark) == PLAIN


def test_the_system_message_of_a_conversation_goes_with_its_prompt():
    row = {"prompt": "a", "messages": turns("a", "b", "c", "d", system="s")}
    assert rows.prompt(row) == turns("a", system="s")
    assert rows.prompt({"messages": turns("a", "b"), "system": "s"}) == turns("a", system="s")
    assert rows.prompt({"question": "a", "history": [["x", "y"]], "system_prompt": "s"}) == turns(
        "x", "y", "a", system="s"
    )


EARLIER = ("chat_history", "conversation_history", "dialogueHistory", "previous_messages", "past", "History")
SYSTEMS = ("sys_prompt", "sys", "system_role", "prompt_system", "developer_message", "System Prompt")


@pytest.mark.parametrize("history", ["history", *EARLIER])
@pytest.mark.parametrize("system", SYSTEMS)
def test_earlier_turns_and_system_messages_have_many_names(history, system):
    row = {"prompt": "c", history: turns("a", "b"), system: "s"}
    whole = turns("a", "b", "c", "d", system="s")
    assert rows.conversation(row | {"completion": "d"}) == whole
    assert rows.judged(row | {"completion": "d", "label": True}) == [(whole[:-1], "d", True)]
    assert rows.preference(row | {"chosen": "d", "rejected": "e"}).prompt == rows.prompt(row) == whole[:-1]
    assert rows.prompt(row | {history: [["a", "b"]]}) == whole[:-1]
    assert judge.other_fields(row | {"answer": "5"}) == {"answer": "5"}
    assert rows.prompt(row | {history: [], system: ""}) == turns("c")
    with pytest.raises(ValueError, match=f'(?i)"{history}"'):
        rows.prompt(row | {history: ["a", "b"]})
    with pytest.raises(ValueError, match=f'"{system}" is another system message'):
        rows.prompt(row | {"prompt": turns("c", system="t")})


@pytest.mark.parametrize(
    "remark",
    [
        {"system_fingerprint": "fp_1"},
        {"operating_system": "Linux"},
        {"developer": "Valve"},
        {"developer_id": "x"},
        {"sys_version": "3.11"},
    ]
    + [{"past": "went"}, {"history_id": 7}, {"purchase_history": ["a vase"]}, {"previous_score": [1]}],
)
def test_what_is_named_alike_is_a_remark(remark):
    assert rows.conversation({"prompt": "q", "completion": "a"} | remark) == PLAIN
    assert judge.other_fields(remark) == remark


@pytest.mark.parametrize("field", rows.CONVERSATIONS)
def test_earlier_turns_beside_a_prompt_are_not_dropped(field):
    pair, then = {"chosen": "Red.", "rejected": "Green."}, {"prompt": "And at dusk?"}
    for row in (then, {"question": "And at dusk?"}, {"prompt": turns("And at dusk?", system="s")}):
        for earlier in (turns("What colour?", "Blue."), turns("What colour?", "Blue.", "And at dusk?", "Red.")):
            for parse, answers in ((rows.preference, pair), (rows.judged, pair), (rows.prompt, {})):
                with pytest.raises(rows.Unread, match=f'"{field}" begins with another question than the prompt'):
                    parse(row | answers | {field: earlier})
    sides = {side: turns("And at dusk?", text) for side, text in pair.items()}
    with pytest.raises(rows.Unread, match=f'"{field}" begins with another question'):
        rows.preference(sides | {field: turns("What colour?", "Blue.")})
    copies = [turns("And  at dusk?", "Red."), turns("And at dusk?", "Red.", "Why?", "Dust."), turns("And at dusk?")]
    copies += [turns("Answer briefly: And at dusk?", "Red."), turns("And at dusk?", "Red.", system="Be brief.")]
    for copy in copies:
        system = copy[:1] if len(copy) == 3 else []
        wanted = [*system, *turns("And at dusk?")]
        assert rows.preference(then | pair | {field: copy}).prompt == rows.prompt(then | {field: copy}) == wanted
    later = {"prompt": turns("What colour?", "Blue.", "And at dusk?"), field: turns("What colour?", "Blue.")}
    assert rows.preference(later | pair).prompt == rows.prompt(later) == later["prompt"]


IM, INST = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<s>[INST] hi [/INST]"
WRITTEN = [  # in a chat template already
    (rows.conversation, {"prompt": IM, "completion": "yes"}),
    (rows.conversation, {"instruction": INST, "output": " yes"}),
    (rows.conversation, {"prompt": "hi", "completion": "yes<|im_end|>"}),
    (rows.conversation, {"question": "hi", "answer": "yes </s>"}),
    (rows.conversation, {"messages": turns("a", "b<|eot_id|>", "c", "d")}),
    (rows.conversation, {"prompt": "hi", "completion": reply("yes<end_of_turn>\n")}),
    (rows.judged, {"prompt": "hi", "completion": "yes<|endoftext|>", "label": True}),
    (rows.prompt, {"prompt": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"}),
    (rows.problem, {"problem": INST, "answer": "5"}),
    (rows.preference, {"prompt": IM, "chosen": "yes", "rejected": "no"}),
    (rows.preference, {"prompt": "hi", "chosen": "yes", "rejected": "no<|im_end|>\n"}),
    (rows.preference, {"prompt": "hi", "chosen": reply("yes</s>"), "rejected": reply("no")}),
    (rows.preference, {"chosen": turns("hi", "yes</s>"), "rejected": turns("hi", "no</s>")}),
]


BEGINS = ["<|header_start|>user<|header_end|>\n\n", "<\uff5cUser\uff5c>", "<|start|>user<|message|>", "<|user_start|>"]
BEGINS += ["<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>", "<|bos|><|user_start|>", "<|prompter|>"]
BEGINS += ["<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|start_of_role|>user", "[gMASK]<sop><|user|>\n"]
ENDS = ["<|eot|>", "<|eom_id|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>", "<|return|>", "<end_of_utterance>"]
ENDS += ["<|END_OF_TURN_TOKEN|>", "<|assistant_end|>"]
WRITTEN += [(rows.conversation, {"prompt": mark + "hi", "completion": "yes"}) for mark in BEGINS]
WRITTEN += [(rows.preference, {"prompt": mark + "hi", "chosen": "yes", "rejected": "no"}) for mark in BEGINS]
WRITTEN += [(rows.conversation, {"messages": turns("hi", "yes" + mark)}) for mark in ENDS]
WRITTEN += [(rows.judged, {"prompt": "hi", "completion": f"yes {mark}\n", "label": False}) for mark in ENDS]


@pytest.mark.parametrize("mark", [*BEGINS, *ENDS, "<|end_of_solution|>", "<|begin_of_thought|>", "<user>", "<start>"])
def test_a_mark_of_a_template_elsewhere_is_text(mark):
    talk = turns(f"What is {mark}?", f"{mark} is a mark.")
    assert rows.conversation({"prompt": talk[0]["content"], "completion": talk[1]["content"]}) == talk
    assert rows.conversation({"messages": talk}) == talk
    if mark not in (*BEGINS, *ENDS):  # OpenThoughts' answers end so
        assert rows.conversation({"prompt": mark + "a", "completion": "b" + mark}) == turns(mark + "a", "b" + mark)


@pytest.mark.parametrize("parse, row", WRITTEN, ids=range(len(WRITTEN)))
def test_what_is_written_in_a_template_already_is_refused(parse, row):
    """It would be in a template twice, and an answer would have its end twice, once spelled."""
    with pytest.raises(ValueError, match="so it is written in a chat template already"):
        parse(row)


@pytest.mark.parametrize(
    "parse, row",
    [
        (rows.conversation, {"prompt": "q", "completion": "<think>\nhm"}),
        (rows.conversation, {"messages": turns("q", " <think>hm", "c", "d")}),
        (rows.judged, {"prompt": "q", "completion": "<think>hm", "label": True}),
        (rows.preference, {"prompt": "q", "chosen": "a", "rejected": "<think>hm"}),
    ],
)
def test_an_answer_cut_in_its_thought_is_refused(parse, row):
    with pytest.raises(ValueError, match="begins a thought with <think> and does not end it"):
        parse(row)
    whole = json.loads(json.dumps(row).replace("hm", "hm</think>a"))
    assert parse(whole) and parse(json.loads(json.dumps(row).replace("<think>", "The tag <think> is one.")))


@pytest.mark.parametrize("spell", [json.dumps, repr, lambda messages: json.dumps(messages, indent=1), np.array])
def test_messages_written_as_a_string_are_refused(spell):
    asked, answered = turns("q"), reply("a")
    shares = [[{"from": "human", "value": "q"}], [{"content": "q", "role": "user"}], turns("q", "a", "c", system="s")]
    pair, both = {"chosen": "a", "rejected": "b"}, {"reply_a": "a", "reply_b": "b"}
    cases = [(rows.conversation, {name: x, "completion": "a"}) for name in rows.PROMPTS for x in (asked, *shares)]
    cases += [(rows.conversation, {"prompt": "q", name: answered}) for name in rows.COMPLETIONS]
    cases += [(rows.prompt, {"prompt": asked}), (rows.judged, {"prompt": asked, "completion": "a", "label": True})]
    cases += [(rows.preference, {"prompt": "q"} | pair | {side: answered}) for side in pair]
    cases += [(rows.preference, {"prompt": asked} | pair), (rows.preference, pair | {"chosen": turns("q", "a")})]
    cases += [(judge.reply_pair, {"prompt": "q"} | both | {side: answered}) for side in both]
    for parse, row in cases:
        for name in row:
            if isinstance(row[name], list):
                with pytest.raises(ValueError, match=f'"{name}" is a list of messages written as a string'):
                    parse(row | {name: str(spell(row[name]))})


@pytest.mark.parametrize(
    "text",
    ['[{"from": "Berlin", "to": "Paris"}]', '[{"role": "baker"}]', "[1, 2]", '{"role": "user"}', "[{x}]"]
    + ['[{"role": "user"}] is a list of messages?', 'What is [{"role": "user", "content": "hi"}]'],
)
def test_other_lists_are_text(text):
    assert rows.conversation({"prompt": text, "completion": "a " + text}) == turns(text, "a " + text)
    assert rows.preference({"prompt": "q", "chosen": text, "rejected": "b"}).chosen == text
    talk = turns(json.dumps(PLAIN), json.dumps(PLAIN))  # said in a message: an exercise in JSON
    assert rows.conversation({"messages": talk}) == talk


def test_a_user_may_speak_of_special_tokens():
    talk = turns("<|im_start|>", "It begins a turn; <|im_end|> ends it.", "and </s>?", "That too.")
    assert rows.conversation({"messages": talk}) == talk


def test_nan_of_a_table_is_null():
    nan = math.nan
    assert rows.conversation({"prompt": "q", "completion": "a", "system": nan, "history": nan, "input": nan}) == PLAIN
    assert rows.conversation({"messages": [Q | {"name": nan}, A | {"weight": nan, "tool_calls": nan}]}) == PLAIN
    assert rows.preference({"prompt": "q", "chosen": "a", "rejected": "b", "margin": nan, "probability": nan})


def test_a_problem_is_compared_with_its_answer_and_not_its_solution():
    row = {"problem": "q", "solution": "5 = 2 + 3, so 5", "answer": "5"}
    assert rows.right_number(rows.problem(row)[1]) == 5 and rows.problem(row)[0] == rows.prompt(row) == turns("q")
    with pytest.raises(ValueError, match='"answer" is missing'):
        rows.problem({"problem": "q", "solution": "5"})
    with pytest.raises(ValueError, match='"solution" begins with the "problem"'):
        rows.conversation({"problem": "Is it 5?", "solution": "Is it 5? Yes."})


def test_an_answer_to_a_problem_may_be_a_number():
    for answer, right in ((5, 5), (-2.5, -2.5), ("5", 5)):
        assert rows.right_number(rows.problem({"prompt": "q", "answer": answer})[1]) == right
    for answer in (True, 1e-7, "1 000", "5:30", [5]):
        with pytest.raises(ValueError, match='"answer"'):
            rows.problem({"prompt": "q", "answer": answer})


TALK, TOLD = turns("q", "a"), turns("q", "a€")
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
STAGES = {  # how it reads --data, a row of which € cannot be encoded, one that can be
    "sft": (sft.read_chats, {"messages": TOLD}, {"messages": TALK}),
    "dpo": (chat.read_pairs, PAIR | {"rejected": "b€"}, PAIR),
    "grpo": (chat.read_prompts, {"prompt": "q€"}, {"prompt": "q"}),
    "kto": (kto.read_items, {"messages": TOLD, "label": True}, {"messages": TALK, "label": True}),
    "distill": (distill.read_data, {"messages": TOLD}, {"messages": TALK}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_row_that_cannot_be_encoded_costs_itself(tmp_path, capsys, stage):
    """It is named or left out; that a tokenizer has no turns is no fault of a line."""
    read_data, bad, good = STAGES[stage]
    numbered = [json.loads(json.dumps(good).replace('"q"', f'"q{i}"')) for i in range(9)]
    path = write(tmp_path / "a.jsonl", [*numbered[:4], bad, *numbered[4:]])
    config = distill.Config(init="", teacher="t", out="", data=path, val_fraction=0.4, max_new_tokens=8)
    config.offline, config.problems = path if stage == "distill" else "", ""
    tok = tokenizer.characters("".join(map(chr, range(32, 127))) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl:5: '€' \(U\+20AC\) is not in the vocabulary.*--skip_bad"):
        read_data(config, tok, 300)
    config.skip_bad = True
    read_data(config, tok, 300)
    assert "1 bad lines left out, 9 read" in capsys.readouterr().out
    ranks = {bytes([b]): b for b in range(256)}
    base = tokenizer.Tokenizer("x", tokenizer.PATTERN, ranks, {"<|endoftext|>": 256}, pad="<|endoftext|>")
    with pytest.raises(UserError, match="^this tokenizer has no <.im_start.>; run sft.py first"):
        read_data(config, base, 300)


BAD_PAIRS = [
    ({"messages": PLAIN}, 'no "chosen"; this is a conversation, which sft.py reads'),
    ({"prompt": "q", "completion": "a"}, 'no "chosen" in the fields prompt, completion'),
    ({"prompt": "q", "chosen": "a"}, 'no "rejected"'),
    ({"text": "once"}, 'no "chosen" in the fields text'),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, '"chosen" and "rejected" are the same text'),
    ({"prompt": "q", "chosen": "a ", "rejected": "\na"}, '"chosen" and "rejected" are the same text'),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, '"chosen" is empty'),
    ({"prompt": "q", "chosen": "a", "rejected": None}, 'no "rejected" in the fields prompt, chosen'),
    ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, '"chosen": one message of the assistant'),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, '"prompt" is empty'),
    ({"prompt": [A], "chosen": "a", "rejected": "b"}, '"prompt"[0]'),
    ({"chosen": "a", "rejected": "b"}, '"chosen" is a string without'),
    ({"chosen": [A], "rejected": [A]}, '"chosen"[0]'),
    ({"chosen": [Q], "rejected": [Q]}, "\"chosen\" ends with a message of 'user'"),
    ({"chosen": turns("a", "b"), "rejected": turns("x", "c")}, '"chosen" and "rejected" answer different prompts'),
    (
        {"prompt": "z", "chosen": turns("a", "b"), "rejected": turns("a", "c")},
        '"chosen" begins with messages that are not the "prompt"',
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "tie": "True"}, '"tie" says something that is not read'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "probability": 1.5}, '"probability" is 1.5'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2.5}, '"margin" says something that is not read'),
    ({"prompt": "q", "chosen": "a", "chosen_response": "x", "rejected": "b"}, '"chosen_response" and "chosen" differ'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "probability": True}, '"probability" is True'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "status": "tie"}, '"status" says something that is not read'),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 9},
        '"score_chosen" is 1.0, less than that of the rejected side, 9',
    ),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 2, "rejected-rating": 3},
        '"chosen-rating" is 2, less',
    ),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": "-2.5", "rejected_reward": "0.5"},
        '"chosen_reward" is -2.5, less than that of the rejected side, 0.5',
    ),
]
BAD_JUDGED = [
    ({"prompt": "q", "completion": "a", "label": 2}, '"label" is 2; true or false'),
    ({"prompt": "q", "completion": "a", "label": "good"}, "\"label\" is 'good'; true or false"),
    ({"prompt": "q", "completion": "a", "label": ""}, "\"label\" is ''; true or false"),
    ({"prompt": "q", "label": True}, "no conversation in the fields prompt, label"),
    ({"prompt": "q", "completion": "a"}, 'no "label" (nor "chosen"'),
    ({"prompt": "q", "completion": "a", "label": None}, 'no "label" (nor "chosen"'),
    ({"messages": PLAIN, "score": 1}, 'no "label" (nor "chosen"'),
]
BAD_PROBLEMS = [
    ({"prompt": "q"}, '"answer" is missing'),
    ({"answer": "#### 5"}, 'no "prompt"'),
    ({"prompt": "q", "answer": ""}, '"answer" is empty'),
    ({"prompt": "q", "answer": "five"}, '"answer" has no number'),
]
BAD = (
    [(rows.conversation, *b) for b in BAD_CONVERSATIONS]
    + [(rows.preference, *b) for b in BAD_PAIRS]
    + [(rows.judged, *b) for b in BAD_JUDGED]
    + [(rows.problem, *b) for b in BAD_PROBLEMS]
)


@pytest.mark.parametrize("parse, row, named", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_or_counted(tmp_path, capsys, parse, row, named):
    good = {"prompt": "q", "answer": "#### 5", "chosen": "a", "rejected": "b"}
    if parse in (rows.conversation, rows.judged):
        good = {"messages": PLAIN, "prompt": "q", "completion": "a", "label": True}
    path = write(tmp_path / "rows.jsonl", [good, row, good, row])
    with pytest.raises(UserError) as e:
        rows.read(path, parse)
    assert str(e.value).startswith(f"{path}:2: ") and named in str(e.value) and "--skip_bad" in str(e.value)
    assert len(rows.read(path, parse, skip_bad=True)[0]) == 2
    assert f"{path}: 2 bad lines left out, 2 read" in capsys.readouterr().out
    only = write(tmp_path / "only.jsonl", [row])
    with pytest.raises(UserError, match="nothing in it but 1 bad lines"):
        rows.read(only, parse, skip_bad=True)


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"messages": ', "line 1"),
        (b'["a"]', "not list"),
        (b'{"a": NaN}', "NaN"),
        (b'\xff{"a": 1}', "utf-8"),
        (b"hello", "Expecting"),
    ],
)
def test_a_line_that_is_no_object_is_named_or_counted(tmp_path, capsys, line, reason):
    good = json.dumps({"messages": PLAIN}).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, b"", good, line, good, b""]))
    with pytest.raises(UserError, match=reason) as e:
        rows.read(str(path), rows.conversation)
    assert str(e.value).startswith(f"{path}:4: ")
    assert len(rows.read(str(path), rows.conversation, skip_bad=True)[0]) == 3
    assert "1 bad lines left out, 3 read" in capsys.readouterr().out


def test_what_is_no_data_file_is_called_what_it_is(tmp_path):
    (tmp_path / "run/step_000001").mkdir(parents=True)
    (tmp_path / "run/step_000001/config.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "book.txt").write_text("once upon a time")
    for name, message in [
        ("run/step_000001", "a checkpoint, but a .jsonl"),
        ("run", "a checkpoint, but a .jsonl"),
        (".", "a directory, but a .jsonl"),
        ("empty.jsonl", "there is nothing in it"),
        ("book.txt", "expected FILE.jsonl"),
        ("absent.jsonl", "No such file"),
    ]:
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
            rows.read(path, rows.conversation)
