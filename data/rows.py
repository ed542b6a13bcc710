"""Rows of chat files, in the formats people have, as messages and preferences.

Read, besides {"messages"}: {"prompt", "completion"}, Alpaca ({"instruction", "input", "output"}),
ShareGPT ({"conversations"}), problems ({"prompt" or "question", "answer"}), KTO's {"prompt",
"completion", "label"}; preferences {"chosen", "rejected"} whose sides are strings or messages, with
the prompt apart, inside both sides, or both (UltraFeedback, HH). Left out: tools and images.

A function of one row raises ValueError saying what is wrong; `read` adds the file and the line.
"""

import hashlib
import itertools
import json
import math
import re
from typing import NamedTuple

import numpy as np

from data.read import parse_mixture, read_rows
from data.rules import right_number
from runtime.cli import print0
from runtime.errors import UserError

FEW_PROMPTS = 10  # to validate on: with fewer, what is found is mostly chance
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # ShareGPT's


class Pair(NamedTuple):
    prompt: list  # messages
    chosen: str
    rejected: str
    probability: float  # that people (or a judge) prefer `chosen`; 1 if the data do not say
    row: dict  # as it stood in the file


# -------------------------------------------------------------------------------------------------
# Messages


def text_of(value, field):
    """The value itself; raises ValueError unless it is a string that is not blank."""
    if not isinstance(value, str):
        found = "missing" if value is None else type(value).__name__
        raise ValueError(f'"{field}" is {found}; a string was expected')
    if not value.strip():
        raise ValueError(f'"{field}" is empty')
    return value


def names(row):
    """The fields of a row, for a message."""
    return ", ".join(row) or "(none)"


def message(role, content):
    return {"role": role, "content": content}


def check_messages(messages, field="messages"):
    """The same messages, role and content only.

    Raises ValueError unless they are system (at most one, first), then user and assistant in turn.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{field}" is not a list of messages')
    checked = []
    for i, m in enumerate(messages):
        role = m.get("role", m.get("from")) if isinstance(m, dict) else None
        if not isinstance(role, str):
            raise ValueError(f'"{field}"[{i}] is not {{"role", "content"}}')
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f'"{field}"[{i}] has the role {role!r}; system, user and assistant are known')
        due = "assistant" if checked and checked[-1]["role"] == "user" else "user"
        if role != due and not (role == "system" and i == 0):
            raise ValueError(f'"{field}"[{i}]: a message of {role!r}, but one of {due!r} is due')
        checked.append(message(role, text_of(m.get("content", m.get("value")), f"{field}[{i}].content")))
    return checked


def ends_with(messages, role, field):
    """The messages themselves; raises ValueError unless the last one is of `role`."""
    last = messages[-1]["role"]
    if last != role:
        raise ValueError(f'"{field}" ends with a message of {last!r}; the last one must be of {role!r}')
    return messages


def single_reply(messages, field):
    """The content of a list that holds one message of the assistant."""
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != "assistant":
        raise ValueError(f'"{field}": one message of the assistant was expected')
    return text_of(messages[0].get("content"), f"{field}[0].content")


def instruction(row):
    """Alpaca's "instruction" and "input" as the user's message."""
    text, more = text_of(row["instruction"], "instruction"), row.get("input") or ""
    if isinstance(more, str) and not more.strip():
        return message("user", text)
    return message("user", f"{text}\n\n{text_of(more, 'input')}")


def solution(row):
    """The "answer" of a problem, without GSM8K's <<48/2=24>> annotations."""
    return re.sub(r"<<[^<>]*>>", "", text_of(row.get("answer"), "answer"))


# -------------------------------------------------------------------------------------------------
# A row as a conversation, a prompt or a problem


def conversation(row):
    """A row of any chat format -> messages that end with the assistant's."""
    if row.get("finished") is False:  # as evaluate.py --samples writes it
        raise ValueError('"finished" is false: the answer was cut, and a model trained on it would learn to end there')
    if "chosen" in row and "rejected" in row:
        raise ValueError("this is a preference (chosen, rejected), not a conversation; reward.py and dpo.py read it")
    for field in ("messages", "conversations"):
        if field in row:
            return ends_with(check_messages(row[field], field), "assistant", field)
    if "instruction" in row:  # Alpaca
        return [instruction(row), message("assistant", text_of(row.get("output"), "output"))]
    if "completion" in row:
        value = row["completion"]
        text = single_reply(value, "completion") if isinstance(value, list) else text_of(value, "completion")
        return [*prompt(row), message("assistant", text)]
    if "answer" in row:
        return [*prompt(row), message("assistant", solution(row))]
    if "text" in row:
        raise ValueError(
            '"text" is what pretraining reads; a conversation has "messages", or "prompt" and "completion"'
        )
    raise ValueError(
        f'no conversation in the fields {names(row)}; "messages", or "prompt" and "completion", were expected'
    )


def prompt(row):
    """What the assistant is to answer -> messages.

    "prompt" or "question" (a string or messages), or a conversation without its last answer.
    """
    fields = [name for name in ("prompt", "question", "messages", "conversations", "instruction") if name in row]
    if not fields:
        raise ValueError(f'no "prompt" in the fields {names(row)}')
    field = fields[0]
    if field == "instruction":
        messages = [instruction(row)]
    elif isinstance(row[field], str):
        messages = [message("user", text_of(row[field], field))]
    else:
        messages = check_messages(row[field], field)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f'"{field}" has no question of a user')
    return messages


def prompt_only(row):
    """Any row with a prompt -> (messages, row)."""
    return prompt(row), row


def problem(row):
    """{"prompt" or "question", "answer" with a number to compare with} -> (messages, row)."""
    row = row | {"answer": solution(row)}
    if right_number(row) is None:
        raise ValueError('"answer" has no number to compare with: neither "#### 72" at its end nor a number by itself')
    return prompt(row), row


# -------------------------------------------------------------------------------------------------
# A row as a preference


def dialogue(text, field):
    """Anthropic's HH: a string of "\\n\\nHuman: ...\\n\\nAssistant: ..." turns -> messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 5 or parts[0].strip():
        raise ValueError(
            f'"{field}" is a string without "\\n\\nHuman: ... \\n\\nAssistant: ..." turns, and there is no "prompt"'
        )
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[1::2]]
    return check_messages([message(*turn) for turn in zip(roles, parts[2::2])], field)


def preference_side(row, field):
    """The "chosen" or "rejected" of a row -> messages that end with the assistant's."""
    if field not in row:
        hint = "; this is a conversation, which sft.py reads" if "messages" in row else f" in the fields {names(row)}"
        raise ValueError(f'no "{field}"{hint}')
    side = row[field]
    if isinstance(side, list) and not (len(side) == 1 and "prompt" in row):
        return ends_with(check_messages(side, field), "assistant", field)
    if isinstance(side, list):
        return [message("assistant", single_reply(side, field))]
    if "prompt" in row:
        return [message("assistant", text_of(side, field))]
    return ends_with(dialogue(text_of(side, field), field), "assistant", field)


def preference(row):
    """{"chosen", "rejected"} and "prompt", apart or as the beginning of both sides -> Pair.

    Optional: "probability" that the chosen one is preferred.
    """
    chosen, rejected = preference_side(row, "chosen"), preference_side(row, "rejected")
    messages = chosen[:-1]
    if messages != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" answer different prompts: all but the last message must be the same')
    if "prompt" in row:
        stated = prompt(row)  # UltraFeedback repeats it in both sides; HH may add a system message
        if messages and messages[-len(stated) :] != stated:
            raise ValueError('"chosen" begins with messages that are not the "prompt"')
        messages = messages or stated
    if not messages:
        raise ValueError("there is no prompt: neither a field of that name nor messages before the answers")
    chosen, rejected = chosen[-1]["content"].strip(), rejected[-1]["content"].strip()
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same text')
    probability = row.get("probability", 1.0)
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
        raise ValueError(f'"probability" is {probability!r}; a number from 0 to 1 was expected')
    return Pair(messages, chosen, rejected, float(probability), row)


def judged(row):
    """KTO's {"prompt", "completion", "label"} -> [(messages, completion, label)].

    A preference gives two of them.
    """
    if "label" not in row:
        pair = preference(row)
        return [(pair.prompt, pair.chosen, True), (pair.prompt, pair.rejected, False)]
    if not isinstance(row["label"], bool):
        raise ValueError(f'"label" is {row["label"]!r}; true or false was expected')
    messages = conversation(row)
    return [(messages[:-1], messages[-1]["content"].strip(), row["label"])]


def gold_margin(row):
    """How much better "chosen" truly is, by "gold_chosen" and "gold_rejected"; nan without them."""
    gold = [row.get(name) for name in ("gold_chosen", "gold_rejected")]
    known = all(isinstance(g, (int, float)) and abs(g) < 1e100 for g in gold)
    return float(gold[0] - gold[1]) if known else math.nan


# -------------------------------------------------------------------------------------------------
# Files


def read_source(name, parse, skip_bad):
    """(rows, SHA-256 of the file's rows) of one source, each row through `parse`."""
    rows, bad, digest = [], 0, hashlib.sha256()
    for line, row in read_rows(name, skip_bad):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        if row is None:
            bad += 1
            continue
        try:
            rows.append(parse(row))
        except ValueError as e:
            if not skip_bad:
                raise UserError(
                    f"{name}:{line}: {e}; correct the line, or leave bad lines out with --skip_bad=True"
                ) from None
            bad += 1
    if bad:
        print0(f"{name}: {bad} bad lines left out, {len(rows)} read")
    if not rows:
        raise UserError(f"{name}: there is nothing in it" + (f" but {bad} bad lines" if bad else ""))
    return rows, digest.hexdigest()


def read(sources, parse, skip_bad=False, seed=0):
    """The rows of --data, each through `parse` -> (list, {source: SHA-256 of its rows}).

    sources: a.jsonl,b.parquet,hf:NAME[configuration,split,rows]. Weights, as in
    a.jsonl:0.7,b.jsonl:0.3, are shares of the rows: every row is used of the source that is
    shortest of its share, a random choice of the others. Raises UserError naming the file, the
    line, the field and what is wrong.
    """
    mixture = parse_mixture(sources)
    found, hashes = [], {}
    for name, _ in mixture:
        rows, hashes[name] = read_source(name, parse, skip_bad)
        found.append(rows)
    if mixture[0][1]:
        scale = min(len(rows) / weight for rows, (_, weight) in zip(found, mixture))
        for i, (name, weight) in enumerate(mixture):
            rows, n = found[i], max(1, round(scale * weight))
            used = np.sort(np.random.default_rng([seed, i]).permutation(len(rows))[:n])
            print0(f"{name}: {len(used)} of {len(rows)} rows, for its share of {weight:g}")
            found[i] = [rows[j] for j in used]
    return [row for rows in found for row in rows], hashes


def prompt_of(row):
    """The prompt of a row as `read` gives it: ((role, content), ...), all before the first
    answer."""
    if isinstance(row, tuple):  # a Pair, or (messages, row)
        messages = row[0]
    elif isinstance(row[0], tuple):  # of `judged`
        messages = row[0][0]
    else:
        messages = itertools.takewhile(lambda m: m["role"] != "assistant", row)
    return tuple((m["role"], m["content"]) for m in messages)


def split_off(rows, fraction, seed):
    """(train, held out): a random `fraction` of the rows is held out, and of each prompt all rows
    or none.

    Raises UserError if all have the same prompt.
    """
    by_prompt = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(prompt_of(row), []).append(i)
    if len(by_prompt) < 2:
        raise UserError("--data: one prompt only; at least two are needed, one to train on and one to hold out")
    groups = list(by_prompt.values())
    shuffled = [groups[g] for g in np.random.default_rng(seed).permutation(len(groups))]
    limit, held_out = max(1, int(fraction * len(rows))), []
    for group in shuffled:
        if len(held_out) + len(group) <= min(limit, len(rows) - 1):
            held_out += group
    held_out = held_out or min(shuffled, key=len)
    train = sorted(set(range(len(rows))) - set(held_out))
    return [rows[i] for i in train], [rows[i] for i in sorted(held_out)]


def warn_of_shared_prompts(train, val, what):
    """Warn if validation rows have a prompt that is trained on, or one that differs from it in case
    and white space only."""
    trained = {prompt_of(row) for row in train}
    trained_words = {normalised(prompt) for prompt in trained}
    prompts = [prompt_of(row) for row in val]
    exact = sum(prompt in trained for prompt in prompts)
    similar = sum(normalised(prompt) in trained_words for prompt in prompts) - exact
    if exact + similar:
        print0(
            f"warning: {what}: of {len(val)} rows to validate on, {exact} have a prompt that is trained on as well, "
            f"{similar} one that differs from it in case or white space only; on these the figures measure memory: "
            "leave them out of one side"
        )


def normalised(prompt):
    """A prompt of `prompt_of` in lower case, its white space single spaces."""
    return tuple((role, " ".join(content.casefold().split())) for role, content in prompt)


def read_split(config, parse):
    """(train rows, validation rows, {source: SHA-256}) of --data and --val.

    Without --val, --val_fraction of --data is held out. Raises UserError if the answers to validate
    on are all to one prompt; a single prompt that is to be answered may do.
    """
    rows, hashes = read(config.data, parse, config.skip_bad, config.seed)
    if config.val:
        what, more = f"--val={config.val}", "bring more"
        train, (val, val_hashes) = rows, read(config.val, parse, config.skip_bad)
        hashes |= val_hashes
    else:
        what, more = f"held out of --data={config.data}", "raise --val_fraction, or give --val"
        train, val = split_off(rows, config.val_fraction, config.seed)
    prompts = len({prompt_of(row) for row in val})
    if prompts < 2 and parse is not prompt_only:
        raise UserError(f"{what}: rows of one prompt only to validate on, which say nothing of others; {more}")
    if prompts < FEW_PROMPTS:
        print0(f"warning: {what}: {prompts} prompts to validate on, so its figures are mostly chance; {more}")
    warn_of_shared_prompts(train, val, what)
    return train, val, hashes
