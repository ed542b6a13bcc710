"""Rewards that a rule can give: reward(prompt, completion, row) -> float, for any text.

prompt: text, or messages; completion: text; row: the row of the data, with "answer" and, for a
sampled completion, "finished": whether it ended by itself. Text is read, never evaluated.
A file of your own works the same: --reward=my_rewards.py:brief. It runs with all your rights, on
copies of prompt and row. It may return a bool (0 or 1) or any finite number up to 1e15 in size, a
tensor's or an array's only element too; not None, not text.
"""

import re
from decimal import Decimal

# Bounded and without backtracking, so that no completion can make it slow. What follows must not
# make it a part of 2e5, 2**5, 1/2, 5:30 or 1 000, of a list (2, 3), or of LaTeX and algebra, as
# 10,\!080, 2\pi and 3x^2 are; a unit may follow (5\text{ cm}, 90^\circ).
NUMBER = re.compile(
    r"-?\$?\d{1,40}+(?:,\d{3}){0,20}+(?:\.\d{1,40})?+"
    r"(?![.,:'_xXeE \u00a0\u2009\u202f]?\d|, \d|[eE][-+]\d|[²³¼½¾π√]| {0,2}[-+*/^×÷]{1,2} {0,2}[\d(])"
    r"(?![ ,]{0,2}\\(?!text|mathrm|[%$)\]]))(?![ixynk]\b|[A-Za-z]{1,2} ?[-+*/^] ?[\d({])"
)
# A number after another: of 2 hours 30 minutes, of 5-7, of 45°30'; not within a unit, cm^2 or m2
ANOTHER = re.compile(r"(?<![A-Za-z0-9^])(?<!\^\{)(?<!\^-)\d")
THINK = re.compile(
    r"<think>(?:(?!</?think>|</?answer>).)++</think>\s{0,20}+<answer>(?:(?!</?think>|</?answer>).)*+</answer>",
    re.DOTALL,
)


def number_after(text):
    """The Decimal after the last "####" (GSM8K's), or None. It may have commas, "$" and a minus."""
    _, found, rest = text.rpartition("####")
    match = NUMBER.match(rest.lstrip()[:200]) if found else None
    return Decimal(match[0].replace(",", "").replace("$", "")) if match else None


def right_number(row):
    """The number of a row's "answer", in the line of its last "####" or by itself.

    None if there is none, or another one after it.
    """
    _, marked, said = str(row["answer"]).rpartition("####")  # may be a JSON number
    said = said.strip().split("\n")[0] if marked else said.strip()
    match = NUMBER.match(said[:200])
    return number_after("####" + said) if match and not ANOTHER.search(said, match.end()) else None


def final_number(prompt, completion, row):
    """1.0 if the number after the last "####" of a finished completion is right, else 0.0."""
    answer = right_number(row)
    return float(answer is not None and number_after(completion) == answer and row.get("finished", True))


def one_final_number(prompt, completion, row):
    """1.0 if a finished completion has one "####" and then one number only: the form is right."""
    _, _, rest = completion.partition("####")
    return float(bool(NUMBER.fullmatch(rest.strip()[:200])) and row.get("finished", True))


def thinks_first(prompt, completion, row):
    """1.0 if a finished completion is <think>...</think> <answer>...</answer> and nothing else.

    The format of DeepSeek-R1 (arXiv 2501.12948, table 1).
    """
    return float(bool(THINK.fullmatch(completion.strip())) and row.get("finished", True))


def brief(prompt, completion, row):
    """1.0 for no words, falling evenly to 0.0 at 100; give it a small weight to prefer brevity."""
    return max(0.0, 1 - len(completion.split()) / 100)
