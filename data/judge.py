"""What a judge or a reward reads, a comparison of two replies as text, and the rows of AI feedback.
Pure functions."""

import math
import re

import numpy as np

from data import rows


def judge_prompt(prompt, reply_a, reply_b, principle):
    """The text after which a judge says " A" or " B", whichever reply is better."""
    return f"Question:\n{prompt}\nReply A:\n{reply_a}\nReply B:\n{reply_b}\n{principle} Better:"


def random_principles(n, principles, seed, first):
    """int64 [n]: indices of principles for n rows, each by the seed and the row's number alone."""
    return np.array([np.random.default_rng([seed, first + i]).integers(principles) for i in range(n)])


def question(messages):
    """What a reward function gets as the prompt: the text of a single message, or the messages."""
    return messages[-1]["content"] if len(messages) == 1 else messages


def transcript(messages):
    """A conversation as one text: that of a single message, else "role: content" lines."""
    if len(messages) == 1:
        return messages[-1]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


# Fields that a written row has in other words
REPLACED = rows.FIELDS | set("reply_a reply_b better probability principle verdicts original critique".split())


def reply_pair(row):
    """A preference, or {"prompt", "reply_a", "reply_b"} and perhaps "better": "A" or "B" -> Pair.

    Reply A is the chosen one; the probability is nan if the row does not say which is better.
    """
    if "reply_a" not in row and "reply_b" not in row:
        if "chosen" not in rows.normalise(row):
            raise ValueError(f"no pair of replies in the fields {rows.names(row)}; --policy=CHECKPOINT samples them")
        return rows.preference(row)
    rows.check_whole(rows.normalise(row))
    a, b = (rows.column_text(row, name) for name in ("reply_a", "reply_b"))
    label = {"A": 1.0, "B": 0.0}.get(str(row.get("better")), math.nan)
    return rows.Pair(rows.prompt(row), a, b, label, row)


# A word in the name of a field that speaks of an answer
OF_ANSWERS = rows.RATINGS | {"chosen", "rejected", "finished", "label", "margin", "instead"}


def other_fields(row, new_answers=False):
    """What a row has besides its question and its replies: the "answer" of a problem, say.

    new_answers: without what it says of the answers that stood there, for others are written.
    """
    replaced = {*REPLACED, *rows.system_columns(row), *rows.earlier_columns(row)}
    others = {name: value for name, value in rows.small_letters(row).items() if name not in replaced}
    return {name: value for name, value in others.items() if not (new_answers and speaks_of_answers(name, value))}


def speaks_of_answers(name, value):
    """Whether a field says of the answers in its row how good they are, that they were cut or are
    not to be trained; also by a score under a reward's name, "mine.py:score", as of evaluate.py."""
    words = OF_ANSWERS | (rows.GOOD | rows.BAD | rows.WHOLE if str(value).lower() in ("true", "false") else set())
    if words.intersection(rows.words_of(name)) or re.search("[/:]", name) or name == "text":  # all in a template
        return True
    try:  # what sft.py and dpo.py would refuse beside the new answers
        fields = rows.normalise({name: value})
        for check in (rows.check_whole, rows.check_good, rows.check_order):
            check(fields)
        rows.check_read(fields, rows.RATIONALE, ())
    except ValueError:
        return True
    return False


def swap_sides(row):
    """What a row says of its two sides, "gold_chosen" for example, said of the other one."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {re.sub("chosen|rejected", lambda side: other[side[0]], name): value for name, value in row.items()}
