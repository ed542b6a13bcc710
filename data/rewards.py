"""Rewards that a rule can give: reward(prompt, completion, row) -> float, for any string whatever. Text is read, never evaluated.

prompt: what was asked, text; completion: the answer, text; row: the data's row, with "answer", and of a sampled completion "finished": whether it ended
by itself. A file of your own with such functions works as this one does: --reward=my_rewards.py:brief. It runs as your own code, with all your rights.
"""
import re
from decimal import Decimal

NUMBER = re.compile(  # bounded and without a way back, so that no completion can make it slow
    r"-?\$?\d{1,40}+(?:,\d{3}){0,20}+(?:\.\d{1,40})?+"
    r"(?![.,]?\d|[eE][-+]?\d| {0,2}[-+*/^×÷]{1,2} {0,2}[\d(])"  # not the beginning of something else: a longer number, 2e5, 2**5, 1/2
)


def number_after(text, mark="####"):
    """The number after the last `mark` (GSM8K's), as a Decimal: commas, a dollar sign and a minus are understood. None where there is none."""
    _, found, rest = text.rpartition(mark)
    match = NUMBER.match(rest.lstrip()[:200]) if found else None
    return Decimal(match[0].replace(",", "").replace("$", "")) if match else None


def right_number(row):
    """The number of a row's "answer": after its last "####", or a number by itself. None where there is neither."""
    answer = str(row["answer"])  # a JSON number is one as well
    marked = number_after(answer)
    return number_after("####" + answer) if marked is None else marked


def final_number(prompt, completion, row):
    """1.0 if the number after the last "####" of a finished completion is the answer's, else 0.0."""
    answer = right_number(row)
    return float(answer is not None and number_after(completion) == answer and row.get("finished", True))


THINK = re.compile(r"<think>(?:(?!</?think>|</?answer>).)++</think>\s{0,20}+<answer>(?:(?!</?think>|</?answer>).)*+</answer>", re.DOTALL)


def one_final_number(prompt, completion, row):
    """1.0 if a finished completion has one "####", and after it a number and nothing else: the form, whatever the number."""
    _, _, rest = completion.partition("####")
    match = NUMBER.match(rest.strip()[:200])
    return float(bool(match) and match[0] == rest.strip() and row.get("finished", True))


def thinks_first(prompt, completion, row):
    """1.0 if a finished completion is <think>...</think> <answer>...</answer> and nothing else (DeepSeek-R1, arXiv 2501.12948, table 1)."""
    return float(bool(THINK.fullmatch(completion.strip())) and row.get("finished", True))


def brief(prompt, completion, row):
    """1.0 for no word at all, falling evenly to 0.0 at 100 words and more: with a small weight, the shorter of two right answers."""
    return max(0.0, 1 - len(completion.split()) / 100)
