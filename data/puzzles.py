"""Puzzles: problems that a small model cannot answer in one step, but can work out in written ones.

    list       "I pay 8, 7 and 5. How much is that?"            sums of several steps
    product    "How much is 34 x 7?"                            by partial products
    count      "A jar has 5. Put in 3, take out 2, double it."  a number carried from step to step
    countdown  "Make 7 from 3, 5 and 9."                        search: each number once, + or -
    next       "What comes after 46?"                           the control: no steps are needed

Every puzzle has a level, which is how many steps it takes. An answer is steps, if any, and "####"
with the result: "8 + 7 = 15. 15 + 5 = 20. #### 20". Results and steps are both checked, so that a
right result by wrong steps shows. A tenth of the puzzles is held out by hash, and of each family of
several levels the hardest altogether: no training text has it.

    pretrain.jsonl        text: questions and answers, one in three with steps, one in eight wrong
    answers.jsonl         chats with such answers: they teach whose turn it is, and nothing else
    chains.jsonl          chats whose answers have every step: R1's cold start
    problems.jsonl        {"prompt", "answer", "family", "level"} to train on by reward
    problems_test.jsonl   the same, held out; beyond_test.jsonl: the hardest levels

    python -m data.puzzles --out=out/puzzles
    python grpo.py --init=out/sft --data=out/puzzles/problems.jsonl --reward=data/puzzles.py:right
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import check_ranges, launch
from runtime.errors import UserError
from runtime.files import json_lines, replace_text


@dataclass
class Config:
    # -- What you will set --
    # directory to write
    out: str

    # -- What you may set --
    # the same seed writes the same bytes
    seed: int = 0
    # rows of pretrain.jsonl [>= 1]
    texts: int = 40_000
    # rows of answers.jsonl [>= 1]
    answers: int = 2_000
    # rows of chains.jsonl [>= 1]
    chains: int = 300
    # rows of problems.jsonl [>= 1]
    problems: int = 4_000
    # rows of each *_test file [>= 1]
    tests: int = 500
    # replace the puzzles in --out
    overwrite: bool = False


# -------------------------------------------------------------------------------------------------
# The families. Each is a function (rng, level) -> (question, steps, result): steps are equations
# "a + b = c", the last of which has the result.


def running_total(start, changes):
    """The equations of a total that changes step by step; changes: [(operator, number)]."""
    total, steps = start, []
    for operator, number in changes:
        expression = f"{total} {operator} {number}"
        total = value(expression)
        steps.append(f"{expression} = {total}")
    return steps, total


def shopping_list(rng, level):
    prices = [rng.randint(1, 9) for _ in range(level + 1)]
    steps, total = running_total(prices[0], [("+", price) for price in prices[1:]])
    listed = ", ".join(map(str, prices[:-1]))
    return f"I pay {listed} and {prices[-1]}. How much is that?", steps, total


def product(rng, level):
    """level 1: below 100; 2: two digits times one, above it; 3: two digits times two."""
    if level == 3:
        a, b = rng.randint(12, 99), rng.randint(12, 99)
        parts = [(a, b // 10 * 10), (a, b % 10)]
    else:
        a = rng.randint(12, 49 if level == 1 else 99)
        b = rng.choice([b for b in range(2, 10) if (a * b > 100) == (level == 2)])
        parts = [(a // 10 * 10, b), (a % 10, b)]
    steps = [f"{x} x {y} = {x * y}" for x, y in parts]
    first, second = (x * y for x, y in parts)
    return f"How much is {a} x {b}?", [*steps, f"{first} + {second} = {a * b}"], a * b


def count(rng, level):
    total = start = rng.randint(2, 9)
    changes, told = [], []
    for _ in range(level + 1):
        kind = rng.choice(["in", "out", "double"] if 2 < total <= 10 else ["in", "out"] if total > 2 else ["in"])
        number = 2 if kind == "double" else rng.randint(1, 9 if kind == "in" else min(9, total - 1))
        changes.append({"in": ("+", number), "out": ("-", number), "double": ("x", 2)}[kind])
        told.append({"in": f"put in {number}", "out": f"take out {number}", "double": "double it"}[kind])
        total = value(f"{total} {changes[-1][0]} {number}")
    steps, total = running_total(start, changes)
    return f"A jar has {start}. Then {', '.join(told)}. How many?", steps, total


def countdown(rng, level):
    """level + 1 numbers; the steps are tries, the last of which succeeds."""
    numbers = rng.sample(range(1, 10), level + 1)
    tries = expressions(numbers)
    right = rng.choice(tries)
    wrong = [expression for expression in tries if value(expression) != value(right)]
    tried = [*wrong[:level], right]
    listed = ", ".join(map(str, numbers[:-1]))
    steps = [f"{expression} = {value(expression)}" for expression in tried]
    return f"Make {value(right)} from {listed} and {numbers[-1]}.", steps, right


def successor(rng, level):
    n = rng.randint(1, 999)
    return f"What comes after {n}?", [f"{n} + 1 = {n + 1}"], n + 1


FAMILIES = {  # name: (function, hardest level that is trained on, hardest level)
    "list": (shopping_list, 3, 4),
    "product": (product, 2, 3),
    "count": (count, 3, 4),
    "countdown": (countdown, 2, 3),
    "next": (successor, 1, 1),
}


def expressions(numbers):
    """One "a + b - c" for every number >= 0 that can be made by using each number once, in an order
    that is always the same."""
    found = {}
    for signs in itertools.product("+-", repeat=len(numbers) - 1):
        for order in itertools.permutations(numbers):
            expression = str(order[0]) + "".join(f" {sign} {n}" for sign, n in zip(signs, order[1:]))
            found.setdefault(value(expression), expression)
    return [expression for number, expression in found.items() if number >= 0]


def is_held_out(question):
    """Whether no training text may have this question: one in ten, chosen by hash."""
    return hashlib.sha256(question.encode()).digest()[0] < 26


def puzzle(rng, held_out=False, beyond=False):
    """A row {"prompt", "answer", "family", "level", "steps"}; beyond: of the hardest level, which
    is not trained on."""
    families = [name for name, (_, trained, hardest) in FAMILIES.items() if not beyond or hardest > trained]
    while True:
        family = rng.choice(families)
        make, trained, hardest = FAMILIES[family]
        level = hardest if beyond else rng.randint(1, trained)
        question, steps, result = make(rng, level)
        if beyond or is_held_out(question) == held_out:
            break
    return {"prompt": question, "answer": f"#### {result}", "family": family, "level": level, "steps": steps}


# -------------------------------------------------------------------------------------------------
# The teacher, and the rewards: reward(prompt, completion, row), for any text, read and not
# evaluated


def worked_out(row, every=1):
    """The answer with every `every`-th step written, the last one always; 0: the result alone."""
    steps = row["steps"][::-1][::every][::-1] if every else []
    return " ".join([*(f"{step}." for step in steps), row["answer"]])


def value(expression):
    """The integer that "2 x 3 + 4 - 1" is; None if it is no such expression of at most 20
    numbers."""
    words = expression.split()
    if not re.fullmatch(r"\d{1,9}( [-+x] \d{1,9}){0,19}", " ".join(words)):
        return None
    total, sign, factor = 0, 1, int(words[0])
    for operator, number in zip(words[1::2], words[2::2]):
        if operator == "x":
            factor *= int(number)
        else:
            total += sign * factor
            sign, factor = (1 if operator == "+" else -1), int(number)
    return total + sign * factor


def result(completion):
    """What stands behind the last "####", with spaces normalised; "" if nothing does."""
    _, mark, rest = completion.rpartition("####")
    return " ".join(rest.strip().rstrip(".").split()) if mark else ""


def right(prompt, completion, row):
    """1.0 if a finished completion's result is right: the number, or for countdown any expression
    that has the target and uses each number once."""
    found = result(completion)
    if not row.get("finished", True):
        return 0.0
    if row["family"] != "countdown":
        return float(found == result(row["answer"]))
    target, *numbers = re.findall(r"\d+", row["prompt"])
    used = re.findall(r"\d+", found)
    plain = "x" not in found and value(found) == int(target)
    return float(plain and sorted(used) == sorted(numbers))


def equations(completion):
    """[(expression, number)] of a completion's steps "expression = number"."""
    return re.findall(r"(\d{1,9}(?: [-+x] \d{1,9}){1,19}) = (\d{1,9})", completion[:4000])


def steps_right(prompt, completion, row):
    """1.0 if a completion has steps and all of them are true. For measuring: nothing rewards it."""
    steps = equations(completion)
    return float(bool(steps) and all(value(expression) == int(number) for expression, number in steps))


# -------------------------------------------------------------------------------------------------
# The files


def text(rng):
    """What the web has: a question, and an answer on the next line, where a chat has it too."""
    question, answer = web_answer(rng)
    return {"text": f"{question}\n{answer}"}


def web_answer(rng):
    """A question and what the web answers: one in three with steps; one in eight answers another
    question, steps or not, so that being wrong is no reason to write steps or to leave them out."""
    row = puzzle(rng)
    answered = puzzle(rng) if rng.random() < 1 / 8 else row
    return row["prompt"], worked_out(answered, every=int(rng.random() < 1 / 3))


def web_chat(rng):
    return conversation(*web_answer(rng))


def chain(rng):
    row = puzzle(rng)
    return conversation(row["prompt"], worked_out(row))


def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def problem(rng, held_out=False, beyond=False):
    row = puzzle(rng, held_out, beyond)
    return {name: row[name] for name in ("prompt", "answer", "family", "level")}


def make_rows(config):
    """{file name: rows}. A file has its own random numbers, so that the size of one changes no
    other."""
    files = {
        "pretrain.jsonl": (config.texts, text, {}),
        "answers.jsonl": (config.answers, web_chat, {}),
        "chains.jsonl": (config.chains, chain, {}),
        "problems.jsonl": (config.problems, problem, {}),
        "problems_test.jsonl": (config.tests, problem, {"held_out": True}),
        "beyond_test.jsonl": (config.tests, problem, {"beyond": True}),
    }
    rows = {}
    for name, (n, make, options) in files.items():
        rng = random.Random(f"{config.seed} {name}")
        rows[name] = [make(rng, **options) for _ in range(n)]
    return rows


def main(config):
    check_ranges(config)
    out = Path(config.out)
    present = sorted(out.glob("*.jsonl"))
    if present and not config.overwrite:
        raise UserError(f"--out={out}: {present[0].name} exists; --overwrite replaces it, or choose another directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, rows in make_rows(config).items():
            replace_text(out / name, json_lines(rows))
            print(f"{out / name}: {len(rows):,} rows")
    except OSError as e:
        raise UserError(f"--out={out}: {e.strerror}") from None


if __name__ == "__main__":
    launch(main, Config)
