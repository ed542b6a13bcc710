"""data/puzzles.py: every family's steps and results against Python's own arithmetic, the checkers
on right and wrong answers, what is held out, and the files."""

import json
import random
import re

import pytest
from runs import here

from data import puzzles
from data.puzzles import FAMILIES, right, steps_right, value, worked_out


def by_python(expression):
    """The value of sums and products of whole numbers, with the usual precedence."""
    total = 0
    for sign, term in re.findall(r"([+-]?) ?(\d+(?: x \d+)*)", expression):
        factor = 1
        for number in term.split(" x "):
            factor *= int(number)
        total += -factor if sign == "-" else factor
    return total


def all_levels():
    return [(name, level) for name, (_, _, hardest) in FAMILIES.items() for level in range(1, hardest + 1)]


@pytest.mark.parametrize("family, level", all_levels())
def test_steps_and_result_of_every_family_are_true(family, level):
    rng = random.Random(f"{family} {level}")
    for _ in range(100):
        question, steps, result = FAMILIES[family][0](rng, level)
        row = {"prompt": question, "answer": f"#### {result}", "family": family, "level": level, "steps": steps}
        for step in steps:
            expression, number = step.split(" = ")
            assert by_python(expression) == int(number) >= 0, step
        for every in (0, 1, 2):
            assert right(question, worked_out(row, every), row) == 1
        assert steps_right(question, worked_out(row), row) == 1 and steps_right(question, worked_out(row, 0), row) == 0
        if family == "countdown":
            target, *numbers = map(int, re.findall(r"\d+", question))
            assert by_python(result) == target and sorted(map(int, re.findall(r"\d+", result))) == sorted(numbers)
        else:
            assert steps[-1].endswith(f"= {result}") and len(worked_out(row, 2)) <= len(worked_out(row, 1))


def test_value_reads_expressions_and_nothing_else():
    rng = random.Random(0)
    for _ in range(300):
        words = [str(rng.randint(0, 99))]
        for _ in range(rng.randint(0, 6)):
            words += [rng.choice("+-x"), str(rng.randint(0, 99))]
        assert value(" ".join(words)) == by_python(" ".join(words))
    for text in ("", "1 +", "+ 1", "1 ** 9", "__import__('os')", "1e9", "1 x" * 30, "1" * 10, "1 + 1 +" * 99, "a"):
        assert value(text) is None, text


def test_wrong_answers_are_told_from_right_ones():
    row = {"prompt": "Make 16 from 5, 9 and 20.", "answer": "#### 5 - 9 + 20", "family": "countdown", "level": 2}
    for text, reward in {
        "#### 20 - 9 + 5": 1.0,  # another way that is right
        "20 - 9 = 11. #### 5 + 20 - 9.": 1.0,
        "#### 16": 0.0,
        "#### 16 + 0": 0.0,
        "#### 20 - 9 - 5": 0.0,
        "#### 20 - 9 + 5 + 5 - 5": 0.0,
        "#### 25 - 9": 0.0,
        "20 - 9 + 5": 0.0,
        "": 0.0,
    }.items():
        assert right(row["prompt"], text, row) == reward, text
    assert right("", "#### 20 - 9 + 5", row | {"finished": False}) == 0
    total = {"prompt": "I pay 3 and 4. How much is that?", "answer": "#### 7", "family": "list", "level": 1}
    assert [right("", text, total) for text in ("#### 7", "#### 7.", "#### 17", "#### 7 8", "7")] == [1, 1, 0, 0, 0]
    assert steps_right("", "3 + 4 = 8. #### 7", total) == 0 and steps_right("", "3 + 4 = 7. #### 9", total) == 1
    for hostile in ("1 + " * 10**5, "9" * 10**5, "#### " * 10**4, "1 x 1 = " * 10**4):
        assert right("", hostile, total) == 0 and steps_right("", hostile, total) in (0, 1)


def test_no_training_row_is_held_out_or_of_the_hardest_level(tmp_path):
    config = puzzles.Config(out=str(tmp_path / "world"), texts=300, answers=50, chains=50, problems=300, tests=60)
    here(puzzles.main, config)
    rows = {
        path.name: [json.loads(x) for x in path.read_text().splitlines()] for path in (tmp_path / "world").iterdir()
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "pretrain.jsonl": 300,
        "answers.jsonl": 50,
        "chains.jsonl": 50,
        "problems.jsonl": 300,
        "problems_test.jsonl": 60,
        "beyond_test.jsonl": 60,
    }
    texts = " ".join(row["text"] for row in rows["pretrain.jsonl"])
    trained = {row["prompt"] for row in rows["problems.jsonl"]}
    trained |= {row["messages"][0]["content"] for name in ("answers", "chains") for row in rows[f"{name}.jsonl"]}
    for row in rows["problems_test.jsonl"]:
        assert row["prompt"] not in trained and row["prompt"] not in texts
    assert {row["family"] for row in rows["problems.jsonl"]} == set(FAMILIES)
    assert all(
        row["level"] <= FAMILIES[row["family"]][1] for row in rows["problems.jsonl"] + rows["problems_test.jsonl"]
    )
    assert all(row["level"] == FAMILIES[row["family"]][2] for row in rows["beyond_test.jsonl"])
    assert "next" not in {row["family"] for row in rows["beyond_test.jsonl"]}  # the control has one level
    wrong = sum("####" in row["text"] and not is_right(row["text"]) for row in rows["pretrain.jsonl"])
    assert 15 < wrong < 60  # one in eight

    with pytest.raises(puzzles.UserError, match="--overwrite"):
        puzzles.main(config)
    before = (tmp_path / "world/chains.jsonl").read_bytes()
    config.overwrite = True
    puzzles.main(config)
    assert (tmp_path / "world/chains.jsonl").read_bytes() == before


def is_right(text):
    """Whether the answer in a text is the one that its question asks for, by brute force."""
    question, _, rest = text.rpartition("####")
    numbers = [int(n) for n in re.findall(r"\d+", re.split(r"[?.](?=\s)", question, maxsplit=1)[0])]
    if question.startswith("Make"):
        target, *used = numbers
        return value(rest.strip()) == target and sorted(used) == sorted(map(int, re.findall(r"\d+", rest)))
    if question.startswith("What comes"):
        return rest == f" {numbers[0] + 1}"
    if question.startswith("How much"):
        return rest == f" {numbers[0] * numbers[1]}"
    if question.startswith("I pay"):
        return rest == f" {sum(numbers)}"
    words = re.split(r"How many\?", text)[0]
    total = int(re.search(r"has (\d+)", words)[1])
    for change in re.findall(r"put in \d+|take out \d+|double it", words):
        n = int(change.split()[-1]) if change != "double it" else total
        total += -n if change.startswith("take") else n
    return rest == f" {total}"
