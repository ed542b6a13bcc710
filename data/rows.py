"""Rows of chat files, in the formats people have, as messages and preferences.

    conversations  {"messages"} (OpenAI, TRL), {"conversations"} (ShareGPT, LLaMA-Factory),
                   {"prompt", "completion"}, Alpaca's {"instruction", "input", "output"}, and any
                   other name of PROMPTS with one of COMPLETIONS; problems {"question", "answer"},
                   {"problem", "solution", "answer"}
    preferences    {"chosen", "rejected"}, strings or messages; the prompt apart, inside both, or
                   both (TRL, UltraFeedback, Intel's Orca, LLaMA-Factory, HH's strings)
    judgements     KTO's {"prompt", "completion", "label"}

Also read: a system message in a column of its own, earlier turns in "history", under other names
too (`system_columns`, `earlier_columns`), names in capitals, content as a list of text parts, and
"weight", "train" or "loss" of a message (0 or false: it stays in the conversation, as {"role",
"content", "train": False}, and out of the loss). Nulls count as absent. Text stays as it is, white
space too. A field that changes what is said or trained and is not read (tool calls,
reasoning, images, a list that masks turns) makes its row a bad one, and so does a prompt that ends
with the assistant, a text that is in a chat template already, an answer that repeats its prompt or
was cut, and ratings by which the rejected side is the better one. Columns and fields with text that
nobody knows are named once per file.

A function of one row raises ValueError saying what is wrong; `read` adds the file and the line.
"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from data.clean import folded
from data.read import LONG_SPACE, bad_row, is_null, parse_mixture, read_rows, reason
from data.rules import right_number
from runtime.cli import print0, refuse_unread
from runtime.errors import UserError

FEW_PROMPTS = 10  # to validate on: with fewer, what is found is mostly chance
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem")  # of several, the first is the prompt
COMPLETIONS = ("completion", "output", "response")
ANSWERS = ("answer", "solution")  # else the longer of these: the other may be a problem's number only
# Which a prompt must hold: Dolly's and exams' columns, retrieved text, code that is to be completed
MATERIAL = ("context", "contexts", "ctxs", "passage", "passages", "article", "document", "paragraph", "story")
MATERIAL += ("choices", "options", "answer_choices", "endings", "starter_code", *"ABCDE")
MATERIAL += tuple(f"{option}{letter}" for option in ("op", "option", "option_") for letter in "abcde")
MATERIAL += tuple(f"{choice}{i}" for choice in ("choice", "choice_", "ending") for i in range(6))
SYSTEM = {"system", "sys", "developer"}  # a word in the name of a column with a system message; the others:
SYSTEM_WORDS = SYSTEM | {"prompt", "message", "instruction", "instructions", "content", "text", "role"}
EARLIER = {"history", "previous", "past", "earlier", "prior"}  # the same for earlier turns
EARLIER_WORDS = EARLIER | set("chat conversation dialogue dialog message messages turn turns".split())
ALIASES = {  # a field's other names
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "preferred_output": "chosen",  # OpenAI's
    "non_preferred_output": "rejected",
    "kto_tag": "label",  # LLaMA-Factory's
}
# The fields that say what was asked and answered; of a problem ANSWERS too
FIELDS = {*CONVERSATIONS, *PROMPTS, *COMPLETIONS, *ALIASES, *ALIASES.values(), *MATERIAL, "history"}
FIELDS |= {"system", "system_prompt", "system_message"}

ROLES = {"human": "user", "prompter": "user", "developer": "system"}
ROLES |= dict.fromkeys(("gpt", "model", "bot", "chatgpt", "chatbot", "ai"), "assistant")
TURN = {"input": "user", "output": "assistant"}  # in {"input": text, "output": text}: a message and its answer

# Words in the names of fields whose content is part of what was said, and is not read
UNREAD = set("tool tools function functions apis plugins image images img imgs audio audios video videos".split())
UNREAD |= set("media picture pictures photo photos pixel screenshot screenshots attachments documents files".split())
UNREAD |= {"prefix", "prefill", "suffix"}  # of an answer
REASONING = set("reasoning thinking thought thoughts think cot scratchpad".split())
NO_CONTENT = ("[]", "{}", "null", "None", "on", "off")  # Nemotron's "reasoning": "off"
RATIONALE = {"rationale", "rationales"}  # of an answer; beside a preference it is the judge's
ABOUT = set("id ids name count tokens length model score source type language quality".split())  # reasoning_model
# Fields of messages, in full
CONTENTS = ("content", "value", "text")  # of a message, the same thing
MESSAGE_READ = {"role", "from", "name", "type", *CONTENTS}
MESSAGE_UNREAD = set("analysis channel context partial prefix refusal".split())
MESSAGE_UNREAD |= {"train_detail", "training_detail"}
TRAINED = {"train", "trained", "training", "trainable", "loss", "weight", "learn"}  # a word in the name of a flag
FLAG = TRAINED | set("mask scale turn on is in sample should use compute calculate".split())  # all: train_on_turn
FLAG |= set("include included has apply contribute contributes to for used".split())  # include_in_loss
NOT = set("not dont no never exclude excluded".split())  # with one of TRAINED it masks: do_not_train
MASKS = set("mask masks masked skip ignore loss weight weights untrained".split())  # what else masks
GOOD = {"correct", "accepted", "approved", "passed"}  # a word in the name of a flag; false: a bad answer
BAD = {"incorrect", "wrong", "deleted"}  # true: one
BAD_LABELS = {"bad", "undesirable"}
LABELS = {"true": True, "1": True, "false": False, "0": False, "-1": False}
PREFERRED = {"chat_template_kwargs", "tie"}  # of a row, beside those with a word of UNREAD
RATINGS = {"score", "scores", "rating", "ratings", "reward", "rewards"}
# What says that an answer was cut: ours, and what APIs and servers write
WHOLE = {"finished", "complete", "completed"}  # and end_turn
CUT_FLAG = re.compile(  # in the words of a name
    r"\b(?:truncated|interrupted|incomplete|unfinished|cut ?off|stopped limit"
    r"|(?:hit|reached|exceeded) .*(?:max|limit)|(?:max|limit).* (?:hit|reached|exceeded))\b"
)
STOP_REASON = re.compile(r"\b(?:reasons?|status|details|stop type)$")
CUT = {"length", "max_tokens", "max_length", "max_output_tokens", "max_new_tokens", "model_length", "limit"}
CUT |= {"incomplete", "interrupted", "content_filter"}

OWN = {"critique", "original", "instead_of", "principle"}  # remarks of rlaif.py and serve.py

# How a column that says nothing is filled, by pandas, or by hand (Alpaca's <noinput>)
ABSENT = {"nan", "none", "null", "n/a", "<noinput>", "no input"}
# How a prompt begins, and an answer ends, that is written in a model's chat template already.
# DeepSeek's has wide bars, \uff5c.
BEGUN = re.compile(
    r"\s*(?:<s>|<\|begin_of_text\|>|<\uff5cbegin.of.sentence\uff5c>|<bos>|<\|bos\|>|<BOS_TOKEN>|\[gMASK\]<sop>)?\s*"
    r"(<\|im_start\|>|<\|(?:start_header_id|header_start)\|>|<start_of_turn>|<\|START_OF_TURN_TOKEN\|>|<\|start\|>"
    r"|<\|start_of_role\|>|<\|(?:user|system|prompter|user_start)\|>|<\uff5cUser\uff5c>|\[INST\])"
)
ENDED = re.compile(
    r"(<\|(?:im_end|eot_id|eot|eom_id|end_of_text|endoftext|end|return|END_OF_TURN_TOKEN|assistant_end)\|>"
    r"|<\uff5cend.of.sentence\uff5c>|<(?:end_of_turn|end_of_utterance|eos|/s)>)\s*$"
)
# How messages begin that a table without lists holds as a string, in JSON or as Python prints them
LISTED = re.compile(
    r"\s*\[\s*\{(?=.*?['\"](?:role|from)['\"]\s*:\s*['\"](?:system|developer|user|human|assistant|gpt)['\"])", re.DOTALL
)


class Pair(NamedTuple):
    prompt: list  # messages
    chosen: str
    rejected: str
    probability: float  # that people (or a judge) prefer `chosen`; 1 if the data do not say
    row: dict  # as it stood in the file


class Encoded(NamedTuple):
    row: object  # as parsed
    encoding: object


class Unread(ValueError):
    """A field has a meaning that is not read.

    where: what it belongs to, "messages[1]." for example; what: the same in other words.
    """

    def __init__(self, field, where="", what=""):
        what = what or f'"{where}{field}" says something that is not read'
        super().__init__(f"{what}; take it or the row out")
        self.field = field


# -------------------------------------------------------------------------------------------------
# Values


def without_nulls(value):
    """A JSON value without nulls at any depth: in Parquet a row has all columns of all rows."""
    if isinstance(value, dict):
        return {name: without_nulls(v) for name, v in value.items() if not is_null(v)}
    if isinstance(value, list):
        return [without_nulls(v) for v in value if not is_null(v)]
    return value


def is_empty(value):
    """Whether a value holds nothing: no text that is not blank, no number, at any depth."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        value = list(value.values())
    return value is None or isinstance(value, list) and all(map(is_empty, value))


def text_of(value, field):
    """The value itself; raises ValueError unless it is a string that is not blank."""
    if not isinstance(value, str):
        found = "missing" if value is None else type(value).__name__
        raise ValueError(f'"{field}" is {found}; a string was expected')
    if not value.strip():
        raise ValueError(f'"{field}" is empty')
    if len(value) > LONG_SPACE and re.search(r"\s{%d}" % (LONG_SPACE + 1), value):
        raise ValueError(f'"{field}" has more than {LONG_SPACE} white-space characters in a row; shorten them')
    return value


def number_of(value):
    """The number that a value is or spells; nan if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def squeezed(text):
    """A text with every run of white space as one space, to compare it."""
    return " ".join(text.split())


def names(row):
    """The fields of a row, for a message."""
    return ", ".join(row) or "(none)"


def first_stated(row, fields):
    """The first of these fields that a row has and that is not empty; None if there is none."""
    return next((name for name in fields if not is_empty(row.get(name))), None)


@functools.lru_cache(1000)
def words_of(name):
    """The words in the name of a field, in small letters: tool_calls and toolCalls have two."""
    camel = re.sub(r"(?<=[a-z])(?=[A-Z][a-z]+)", "_", name)
    return [word for word in re.split(r"[^a-z]+", camel.lower()) if word]


def small_letters(row):
    """A row with the fields that are read under their names in small letters: Question, optionA."""
    known = {*FIELDS, *ANSWERS, "text"}
    return {name.lower() if name.lower() in known - row.keys() else name: value for name, value in row.items()}


def system_columns(row):
    """The columns of a row that hold a system message: system, sys_prompt, systemInstruction.

    "developer" alone is a game's."""
    named = [name for name in row if SYSTEM.intersection(words_of(name)) and SYSTEM_WORDS.issuperset(words_of(name))]
    return [name for name in named if words_of(name) != ["developer"]]


def earlier_columns(row):
    """The columns of a row that hold earlier turns: history, chat_history, a list of past turns."""
    named = [name for name in row if EARLIER.intersection(words_of(name)) and EARLIER_WORDS.issuperset(words_of(name))]
    return [name for name in named if "history" in words_of(name) or isinstance(row[name], list)]


def check_read(fields, words, others, where=""):
    """Raises Unread for a field that is not empty and whose name has one of `words`.

    A number, a flag, a list of flags or a remark ("image_id") is no content. others: names in full.
    """
    for name, value in fields.items():
        found = words_of(name)
        flags = isinstance(value, list) and all(isinstance(v, bool) for v in value)
        content = not flags and not isinstance(value, (bool, int, float)) and value not in NO_CONTENT
        by_word = words.intersection(found) and content and found[-1] not in ABOUT
        by_name = name in others and flag_of(value) is not False
        if (by_word or by_name) and not is_empty(value):
            raise Unread(name, where)


def flag_of(value):
    """True or false, 1 or 0, also in quotes, as a bool; None for anything else."""
    return LABELS.get(str(value).lower().removesuffix(".0"))


def check_whole(fields):
    """Raises ValueError if an answer was cut: a model trained on it would learn to end there."""
    said = []
    for name, value in fields.items():
        words = [word for word in words_of(name) if word not in ("chosen", "rejected")]
        spaced = " ".join(words)
        ends, cut = WHOLE.intersection(words) or words == ["end", "turn"], CUT_FLAG.search(spaced)
        flag = {"yes": True, "no": False}.get(str(value).lower(), flag_of(value)) if ends or cut else None
        reasons = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        reason_is_cut = STOP_REASON.search(spaced) and any(str(x).lower() in CUT for x in reasons)
        if ends and flag is False or cut and flag or reason_is_cut:
            said.append(name)
    if said:
        raise ValueError(
            f'"{said[0]}" is {json.dumps(fields[said[0]])}: the answer was cut, and a model trained on it would learn '
            "to end there"
        )


def strings(value):
    """The texts in a JSON value; of a message its content."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value.get(name) for name in CONTENTS]
    elif isinstance(value, dict):
        value = [v for name, v in value.items() if name != "type"]
    if isinstance(value, list):
        return [text for v in value for text in strings(v)]
    return [value] if isinstance(value, str) else []


# -------------------------------------------------------------------------------------------------
# Messages


def message(role, content):
    return {"role": role, "content": content}


def content_of(m, where):
    """The text of a message: a string, or a list of parts that are text."""
    values = [m[name] for name in CONTENTS if name in m]
    values = [value for value in values if not is_empty(value)] or values[:1]
    if any(value != values[0] for value in values):
        raise ValueError(f'"{where}" has a "content" and another "value" or "text"; one of them was expected')
    value = values[0] if values else None
    if isinstance(value, list) and value:
        value = "".join(part_text(part, where) for part in value)
    return value


def part_text(part, where):
    """The text of one part of a message: a string, or {"type": "text", "text"}."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        kind = kind or type(part).__name__
        raise Unread(f"content of type {kind}", what=f'"{where}" has content of type {kind!r}, which is not read')
    check_read(part, UNREAD | REASONING, MESSAGE_UNREAD, f"{where}.content.")
    check_trained(part, f"{where}.content.")
    if flag_of(part.get("label")) is False:
        raise Unread("label", f"{where}.content.")
    return part["text"]


def check_trained(fields, where=""):
    """Raises Unread if a row, or a part of a message, is not to be trained, or not fully."""
    check_masks(fields, where)
    for name, flag in train_flags(fields).items():
        if flag_of(flag) is False or abs(number_of(flag) - 1) > 0:
            raise Unread(name, where)


def check_masks(fields, where=""):
    """Raises Unread for a field that says which tokens or turns are trained, and is no flag of one
    message: ignore_loss, do_not_train, or a list of 0 and 1 beside the messages."""
    for name, value in fields.items():
        words = words_of(name)
        masks = MASKS.intersection(words) or NOT.intersection(words) and TRAINED.intersection(words)
        of_parts = isinstance(value, list) and not is_empty(value) and any(v != 1 for v in value)
        of_turns = is_flag(name) and isinstance(value, list) and any(flag_of(v) is False for v in value)
        if of_turns or masks and (of_parts or flag_of(value) and not is_flag(name)):
            raise Unread(name, where)


def train_flags(m):
    """The fields of a message or a row that say whether it is trained: weight, train, loss_mask."""
    return {name: value for name, value in m.items() if is_flag(name) and not is_empty(value)}


def is_flag(name):
    """Whether a field says by this name that something is trained: loss_mask, and not mask_loss."""
    words = words_of(name)
    return FLAG.issuperset(words) and bool(TRAINED.intersection(words)) and "mask" not in words[:-1]


def is_trained(m, role, where):
    """Whether a message is trained if it is the assistant's: by its `train_flags`."""
    flags = train_flags(m)
    for name, flag in flags.items():
        if isinstance(flag, (list, dict)):  # parts of it are
            raise Unread(name, f"{where}.")
        if flag not in (0, 1):
            raise ValueError(f'"{where}.{name}" is {flag!r}; 0 or 1, true or false, were expected')
        if role != "assistant" and "weight" not in words_of(name) and flag:
            raise ValueError(f'"{where}.{name}" is true, but only messages of the assistant are trained')
    if len(set(map(bool, flags.values()))) > 1:
        raise ValueError(f'"{where}": {" and ".join(flags)} contradict each other')
    return all(flags.values())


def role_of(m):
    """The role of a message, in our word for it; None if it has none."""
    role = m.get("role", m.get("from")) if isinstance(m, dict) else None
    return ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else None


def read_message(m, where):
    """One message as {"role", "content"}, and "train": False if it is the assistant's but not to be
    trained."""
    role = role_of(m)
    if "role" in m and "from" in m and role != role_of({"role": m["from"]}):
        raise ValueError(f'"{where}" has a "role" and another "from"; one of them was expected')
    check_read(m, UNREAD | REASONING, MESSAGE_UNREAD, f"{where}.")
    check_masks(m, f"{where}.")
    if (UNREAD | REASONING | {"code"}).intersection(words_of(str(m.get("type", "")))):
        raise Unread(f"type {m['type']}", what=f'"{where}" is of type {m["type"]!r}, which is not read')
    content, trained = content_of(m, where), is_trained(m, role, where)
    if role == "system" and is_empty(content):
        return message(role, "")
    found = message(role, text_of(content, f"{where}.content"))
    return found if trained or role != "assistant" else found | {"train": False}


def split_turns(items):
    """The messages of a list whose items may be turns: {"human": text, "assistant": text}."""
    found = []
    for item in items:
        roles = [TURN.get(name, ROLES.get(name, name)) for name in item] if isinstance(item, dict) else []
        if roles in (["user"], ["assistant"], ["user", "assistant"], ["system", "user", "assistant"]):
            found += [{"role": role, "content": text} for role, text in zip(roles, item.values())]
        else:
            found.append(item)
    return found


def check_messages(messages, field="messages"):
    """The same messages: role, content and, if it is false, "train".

    Raises ValueError unless they are system (at most one, first), then user and assistant in turn.
    An empty system message is none.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{field}" is not a list of messages')
    checked, speakers = [], {}
    for i, m in enumerate(split_turns(messages)):
        role = role_of(m)
        if role is None:
            raise ValueError(f'"{field}"[{i}] is not {{"role", "content"}}')
        if role not in ("system", "user", "assistant"):
            raise Unread(f"role {role}", what=f'"{field}"[{i}] has the role {role!r}, which is not read')
        found = read_message(m, f"{field}[{i}]")
        due = "assistant" if checked and checked[-1]["role"] == "user" else "user"
        if role != due and not (role == "system" and i == 0):
            raise ValueError(f'"{field}"[{i}]: a message of {role!r}, but one of {due!r} is due')
        if speakers.setdefault(role, m.get("name")) != m.get("name"):
            raise Unread("name", f"{field}[{i}].")  # it tells two speakers apart
        if found["content"]:
            checked.append(found)
    if not checked:
        raise ValueError(f'"{field}" has no message that is not empty')
    return checked


def without_train(messages):
    """The messages of a prompt, of which none is trained anyhow."""
    return [message(m["role"], m["content"]) for m in messages]


def ends_with(messages, role, field):
    """The messages themselves; raises ValueError unless the last one is of `role`."""
    last = messages[-1]["role"]
    if last != role:
        raise ValueError(f'"{field}" ends with a message of {last!r}; the last one must be of {role!r}')
    return messages


def is_dialogue(text):
    """Whether a string is written as Anthropic's HH is."""
    return isinstance(text, str) and bool(re.match(r"\s*Human:.*\n\nAssistant:", text, re.DOTALL))


def dialogue(text, field):
    """Anthropic's HH: a string of "\\n\\nHuman: ...\\n\\nAssistant: ..." turns -> messages.

    A last turn of the assistant that is empty, as in a prompt, is left out.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 5 or parts[0].strip():
        raise ValueError(
            f'"{field}" is a string without "\\n\\nHuman: ... \\n\\nAssistant: ..." turns, and there is no "prompt"'
        )
    if parts[-2] == "Assistant" and not parts[-1].strip():
        parts = parts[:-2]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[1::2]]
    contents = [part.removeprefix(" ") for part in parts[2::2]]
    return check_messages([message(*turn) for turn in zip(roles, contents)], field)


# -------------------------------------------------------------------------------------------------
# Fields of a row


def normalise(row, answered=True):
    """A row without nulls, under the names read below.

    answered: whether what the assistant said is read as well. Raises ValueError for a field with a
    meaning that is not read.
    """
    row = small_letters(without_nulls(row))
    optional = {*MATERIAL, *system_columns(row), *(["input"] if "instruction" in row else [])}
    row = {name: v for name, v in row.items() if name not in optional or str(v).strip().lower() not in ABSENT}
    if isinstance(row.get("input"), dict) and "messages" in row["input"]:  # OpenAI's preferences
        row = row.pop("input") | row
    for alias, name in ALIASES.items():
        if alias in row:
            value = row.pop(alias)
            if row.setdefault(name, value) != value:
                raise ValueError(f'"{alias}" and "{name}" differ; leave one of them out')
            if alias == "rejected_response" and "chosen" not in row:  # ms-swift's, beside the good one
                row |= sides_of_swift(row)
    if not answered:
        check_read(row, UNREAD, PREFERRED)
        return row
    check_read(row, UNREAD | REASONING, PREFERRED)
    check_masks(row)
    check_trained({name: v for name, v in row.items() if name != "loss"})  # of a whole row a measurement
    return row


def sides_of_swift(row):
    """The sides of a row whose "response", or last message, is the chosen answer."""
    if "response" in row:
        return {"chosen": row["response"]}
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return {}
    return {"chosen": messages, "rejected": [*messages[:-1], message("assistant", row["rejected"])]}


def check_repeated(row, fields, messages):
    """Raises Unread for one of these fields that is not empty and not part of the messages.

    "text" may be a copy of them in a template: it has the beginning of the last one.
    """
    said = squeezed(" ".join(m["content"] for m in messages))
    begin = squeezed(messages[-1]["content"].split("\n\n")[0])
    for name in filter(row.__contains__, fields):
        texts = map(squeezed, strings(row[name]))
        if not all(text in said or name == "text" and begin in text for text in texts):
            raise Unread(name)


def stated_prompt(row):
    """(field, messages) of the prompt in a field of PROMPTS; None if there is none."""
    field = first_stated(row, PROMPTS)
    if not field:
        return None
    value = row[field]
    if isinstance(value, list):
        messages = check_messages(value, field)
    elif is_dialogue(value):
        messages = dialogue(value, field)
    else:
        more = [name for name in ("input", "context") if field == "instruction" and not is_empty(row.get(name))]
        parts = [column_text(row, name) for name in (field, *more)]
        check_plain(BEGUN.match(parts[0]), field)
        messages = [message("user", "\n\n".join(parts))]
    others = [name for name in PROMPTS if name != field]
    check_repeated(row, [*others, *MATERIAL], messages)
    other, answer = first_stated(row, others), first_stated(row, COMPLETIONS)
    if other and answer and is_whole(value, row[other], row[answer]):
        raise ValueError(f'"{field}" ends with the "{answer}", its answer; take "{field}" out, or the answer out of it')
    return field, messages


def check_plain(mark, field):
    """Raises ValueError if a text has this mark (a match of BEGUN or ENDED) of a chat template."""
    if mark:
        raise ValueError(
            f'"{field}" has {mark[1]!r}, so it is written in a chat template already, and would be in one twice; give '
            "what was said alone, or messages"
        )


def column_text(row, field):
    """The text in a column; raises ValueError also for a list of messages written as a string."""
    text = text_of(row.get(field), field)
    if LISTED.match(text) and text.rstrip().endswith("]"):
        raise ValueError(f'"{field}" is a list of messages written as a string; write the list itself')
    return text


def check_answer(text, field):
    """Raises ValueError if an answer ends with a special token that it spells, for the end is added
    anyhow, or in the middle of a thought."""
    if text.lstrip().startswith("<think>") and "</think>" not in text:
        raise ValueError(f'"{field}" begins a thought with <think> and does not end it, so it was cut; leave it out')
    mark = ENDED.search(text)
    if mark and not (mark[1] == "</s>" and "<s>" in text):  # of HTML
        check_plain(mark, field)


def no_prompt(row):
    """The ValueError for a row without a prompt."""
    empty = next((name for name in PROMPTS if name in row), None)
    return ValueError(f'"{empty}" is empty' if empty else f'no "prompt" in the fields {names(row)}')


def earlier_turns(history, field):
    """The messages in a "history": Alpaca's pairs of a message and its answer, or messages."""
    if not isinstance(history, list):
        raise Unread(field)
    items = []
    for item in history:
        if isinstance(item, list) and len(item) == 2:
            items += [message("user", item[0]), message("assistant", item[1])]
        else:
            items.append(item)
    return ends_with(check_messages(items, field), "assistant", field)


def in_context(row, messages):
    """The messages after the system message and the earlier turns in columns of the row."""
    for name in earlier_columns(row):
        if is_empty(row[name]):
            continue
        earlier = earlier_turns(row[name], name)
        if len(messages) > 2 or messages[0]["role"] == "system" == earlier[0]["role"]:
            raise Unread(name)
        if messages[0]["role"] == "system":
            messages = [messages[0], *earlier, *messages[1:]]
        else:
            messages = [*earlier, *messages]
    for name in system_columns(row):
        if is_empty(row[name]):
            continue
        system = text_of(content_of({"content": row[name]}, name), name)
        if messages[0]["role"] != "system":
            messages = [message("system", system), *messages]
        elif squeezed(messages[0]["content"]) != squeezed(system):
            raise ValueError(f'"{name}" is another system message than that of the conversation; leave one out')
    return messages


def beside_conversation(row, messages):
    """A prompt after the system message of a conversation that stands beside it.

    Raises Unread if that begins with another question: the prompt is then one of its later turns,
    and what was said before would be lost. UltraChat's is its first question.
    """
    said, asked = squeezed(" ".join(m["content"] for m in messages)), squeezed(messages[-1]["content"])
    for name in CONVERSATIONS:
        whole = [] if is_empty(row.get(name)) else check_messages(row[name], name)
        first = next((squeezed(m["content"]) for m in whole if m["role"] == "user"), "")
        if first not in said and asked not in first:
            raise Unread(name, what=f'"{name}" begins with another question than the prompt; its turns are not read')
        if [m["role"] for m in whole[:1]] == ["system"] != [m["role"] for m in messages[:1]]:
            messages = [whole[0], *messages]
    return messages


def check_asks(messages, field):
    """Raises ValueError unless a prompt ends with the user.

    With the assistant at its end it holds the beginning of the answer.
    """
    if messages[-1]["role"] == "system":
        raise ValueError(f'"{field}" has no question of a user')
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f'"{field}" ends with a message of the assistant, the beginning of an answer, which is not read; '
            "put it at the head of the answer"
        )


def repeats(text, prompt):
    """Whether an answer begins with its prompt, if that is more than a greeting, which may come
    back: three words, or two with a number. So does a whole dialogue in Anthropic's form."""
    if is_dialogue(text):
        return True
    words, prompt = re.findall(r"\w+", prompt), squeezed(prompt)
    short = len(words) < 2 or len(words) == 2 and all(map(str.isalpha, words))
    return not short and squeezed(text).startswith(prompt)


def is_whole(text, prompt, answer):
    """Whether a text for training, as it stands beside its parts in some data sets, holds the
    prompt and ends with the answer."""
    if not all(isinstance(x, str) for x in (text, prompt, answer)):
        return False
    return squeezed(prompt) in squeezed(text) and squeezed(text).endswith(squeezed(answer))


def single_reply(value, field):
    """The content of one message of the assistant, by itself or in a list."""
    messages = value if isinstance(value, list) else [value]
    if len(messages) != 1 or role_of(messages[0]) != "assistant":
        raise ValueError(f'"{field}": one message of the assistant was expected')
    return trained_reply([read_message(messages[0], f"{field}[0]")], field)


def trained_reply(messages, field):
    """The content of the last message, the assistant's, which is trained or judged."""
    if "train" in messages[-1]:
        raise ValueError(f'"{field}" ends with a message that is not to be trained')
    check_answer(messages[-1]["content"], field)
    return messages[-1]["content"]


def solution(row, field="answer"):
    """The "answer" of a problem, without GSM8K's <<48/2=24>> annotations."""
    return re.sub(r"<<[^<>]*=[^<>]*>>", "", text_of(row.get(field), field))


# -------------------------------------------------------------------------------------------------
# A row as a conversation, a prompt or a problem


def completion(row):
    """(field, text) of the answer that stands apart from its prompt."""
    solved = [name for name in ANSWERS if not is_empty(row.get(name))]
    field = first_stated(row, COMPLETIONS) or max(solved, key=lambda name: len(str(row[name])), default=None)
    if not field:
        expected = "output" if "instruction" in row else None
        field = next((name for name in (*COMPLETIONS, *ANSWERS) if name in row), expected)
    if not field:
        raise ValueError(
            f'no conversation in the fields {names(row)}; "messages", or "prompt" and "completion", were expected'
        )
    value = row.get(field)
    if field in ANSWERS:
        return field, solution(row, field)
    return field, single_reply(value, field) if isinstance(value, (list, dict)) else column_text(row, field)


def conversation(row):
    """A row of any chat format -> messages that end with the assistant's."""
    row = normalise(row)
    check_read(row, RATIONALE, ())
    check_good(row)
    for name in (*CONVERSATIONS, *COMPLETIONS):
        for m in row[name] if isinstance(row.get(name), list) else [row.get(name)]:
            if isinstance(m, dict) and all(train_flags(m).values()):
                check_good(m)
    return read_conversation(row)


def check_good(fields):
    """Raises ValueError if a row or a message calls its answer a bad one, also in quotes.

    0 is a label's, but a measurement in "correct".
    """
    for name, value in fields.items():
        words = words_of(name)
        bad_label = name == "label" and (flag_of(value) is False or str(value).lower() in BAD_LABELS)
        bad_flag = GOOD.intersection(words) and str(value).lower() == "false"
        if bad_label or bad_flag or BAD.intersection(words) and str(value).lower() == "true":
            raise ValueError(
                f'"{name}" is {json.dumps(value)}: a bad answer, which dpo.py --loss=kto reads, as "label": false; '
                "here it would be trained"
            )


def read_conversation(row):
    """`conversation` of a normalised row; its label is not looked at."""
    check_whole(row)
    if "chosen" in row and "rejected" in row:
        raise ValueError("this is a preference (chosen, rejected), not a conversation; reward.py and dpo.py read it")
    field = first_stated(row, CONVERSATIONS)
    if not field and not first_stated(row, PROMPTS):
        field = next((name for name in CONVERSATIONS if name in row), None)
    if field:
        messages = check_messages(row[field], field)
        for m in row[field]:
            check_whole(m)
        for m in messages:
            if m["role"] == "assistant":
                check_answer(m["content"], field)
        if first_stated(row, COMPLETIONS) and messages[-1]["role"] == "user":
            messages.append(answer_to(row, field, messages))
        ends_with(messages, "assistant", field)
        others = [name for name in CONVERSATIONS if name != field]
        check_repeated(row, [*others, *PROMPTS, *COMPLETIONS, *MATERIAL, "text"], messages)
        if all("train" in m for m in messages if m["role"] == "assistant"):
            raise ValueError(f'"{field}" has no message of the assistant that is to be trained')
        return in_context(row, messages)
    if "text" in row and not first_stated(row, (*PROMPTS, *COMPLETIONS, *ANSWERS)):
        raise ValueError(
            '"text" is what pretraining reads; a conversation has "messages", or "prompt" and "completion"'
        )
    completion(row)
    stated = stated_prompt(row)
    if not stated:
        raise no_prompt(row)
    prompt_field, messages = stated
    check_asks(messages, prompt_field)
    messages = [*messages, answer_to(row, prompt_field, messages)]
    check_repeated(row, [*COMPLETIONS, "text"], messages)
    return in_context(row, messages)


def answer_to(row, prompt_field, messages):
    """The message of the assistant that answers these messages, which stand in `prompt_field`.

    Raises ValueError if it begins with what it answers.
    """
    field, text = completion(row)
    value = row[prompt_field]
    check_answer(text, field)
    prompts = [messages[-1]["content"], *([value] if isinstance(value, str) else [])]
    if any(repeats(text, prompt) for prompt in prompts):
        raise ValueError(f'"{field}" begins with the "{prompt_field}"; only what follows it is the answer')
    return message("assistant", text)


def prompt(row):
    """What the assistant is to answer -> messages.

    A field of PROMPTS (a string or messages), or a conversation without its last answer.
    """
    row = normalise(row, answered=False)
    stated, field = stated_prompt(row), first_stated(row, CONVERSATIONS)
    if stated:
        field, messages = stated
        if first_stated(row, (*COMPLETIONS, *ANSWERS, "chosen", "rejected")):
            check_asks(messages, field)
        messages = beside_conversation(row, messages)
        check_repeated(row, ["text"], messages)
    else:
        field = field or next((name for name in CONVERSATIONS if name in row), None)
        if not field:
            raise no_prompt(row)
        messages = check_messages(row[field], field)
        check_repeated(row, [*MATERIAL, "text"], messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    check_asks(messages, field)
    return in_context(row, without_train(messages))


def prompt_only(row):
    """Any row with a prompt -> (messages, row), which a reward reads under its own names too."""
    return prompt(row), small_letters(row) | row


def problem(row):
    """{"prompt" or "question", "answer" with a number to compare with} -> (messages, row)."""
    row = small_letters(row)
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        row = row | {"answer": str(answer)}
    row = row | {"answer": solution(row)}
    if right_number(row) is None:
        raise ValueError('"answer" has no number to compare with: neither "#### 72" at its end nor a number by itself')
    return prompt(row), row


def warn_of_no_number(examples, reward):
    """Warn of problems [(messages, row)] whose answer data/rules.py:final_number, if that is in the
    reward, cannot read."""
    unread = [row["answer"] for _, row in examples if "answer" in row and right_number(row) is None]
    if unread and "rules.py:final_number" in reward:
        print0(
            f"warning: --data: {len(unread)} of {len(examples)} answers have no number, as {str(unread[0])[:40]!r}, so "
            'that final_number is 0 for all completions; write the number by itself, or after "####"'
        )


# -------------------------------------------------------------------------------------------------
# A row as a preference


def preference_side(row, field, has_prompt):
    """The "chosen" or "rejected" of a row -> messages that end with the assistant's."""
    if field not in row:
        hint = "; this is a conversation, which sft.py reads" if "messages" in row else f" in the fields {names(row)}"
        raise ValueError(f'no "{field}"{hint}')
    side = row[field]
    for m in side if isinstance(side, list) else [side]:
        if isinstance(m, dict):
            check_whole(m)
    if isinstance(side, dict) or isinstance(side, list) and len(side) == 1 and has_prompt:
        return [message("assistant", single_reply(side, field))]
    if isinstance(side, list):
        messages = ends_with(check_messages(side, field), "assistant", field)
        trained_reply(messages, field)
        return without_train(messages)
    text = column_text(row, field)
    if has_prompt and not is_dialogue(text):
        check_answer(text, field)
        return [message("assistant", text)]
    if first_stated(row, ["prompt"]) is None and "prompt" in row:
        raise no_prompt(row)
    return ends_with(dialogue(text, field), "assistant", field)


def preference_prompt(row):
    """(field, messages) of the prompt that stands apart from both sides; None if there is none."""
    stated, field = stated_prompt(row), first_stated(row, CONVERSATIONS)
    if stated or not field or isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1:
        return stated
    return field, check_messages(row[field], field)  # LLaMA-Factory's, before a chosen and a rejected message


def check_order(row):
    """Raises ValueError if something else in a row says that "chosen" is not the better side."""
    for name, value in row.items():
        words, other = words_of(name), row.get(name.replace("chosen", "rejected"))
        if "chosen" in words and RATINGS.intersection(words) and number_of(value) < number_of(other):
            raise ValueError(f'"{name}" is {value}, less than that of the rejected side, {other}; correct one of them')
        if name not in FIELDS and str(value).strip().lower() == "tie":
            raise Unread(name)


def preference(row):
    """{"chosen", "rejected"} and a prompt, apart or as the beginning of both sides -> Pair.

    Optional: "probability" that the chosen one is preferred.
    """
    raw, row = row, normalise(row)
    check_whole(row)
    stated = preference_prompt(row)
    chosen, rejected = (preference_side(row, field, stated is not None) for field in ("chosen", "rejected"))
    messages = chosen[:-1]
    if messages != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" answer different prompts: all but the last message must be the same')
    chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]
    if stated:
        field, prompt_messages = stated
        check_asks(prompt_messages, field)
        prompt_messages = without_train(prompt_messages)
        said = [(m["role"], squeezed(m["content"])) for m in messages]  # UltraFeedback repeats it in both sides
        if said and any((m["role"], squeezed(m["content"])) not in said for m in prompt_messages):
            raise ValueError(f'"chosen" begins with messages that are not the "{field}"')
        if not messages and all(repeats(text, prompt_messages[-1]["content"]) for text in (chosen, rejected)):
            raise ValueError(f'"chosen" and "rejected" begin with the "{field}"; only what follows it is the answer')
        messages = messages or prompt_messages
    if not messages:
        raise ValueError("there is no prompt: neither a field of that name nor messages before the answers")
    messages = beside_conversation(row, messages)
    check_repeated(row, [*MATERIAL, "text"], messages)
    check_order(row)
    if not is_empty(row.get("margin")) and row["margin"] != 0:
        raise Unread("margin")
    if chosen.strip() == rejected.strip():
        raise ValueError('"chosen" and "rejected" are the same text')
    probability = row.get("probability", 1.0)
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
        raise ValueError(f'"probability" is {probability!r}; a number from 0 to 1 was expected')
    return Pair(in_context(row, messages), chosen, rejected, float(probability), raw)


def judged(row):
    """KTO's {"prompt", "completion", "label"} -> [(messages, completion, label)].

    A preference gives two of them, the better one by its "probability".
    """
    labelled = normalise(row)
    if "label" not in labelled and "chosen" not in labelled:
        raise ValueError(f'no "label" (nor "chosen" and "rejected") in the fields {names(labelled)}')
    if "label" not in labelled:
        pair = preference(row)
        if pair.probability == 0.5:
            raise Unread("probability", what='"probability" is 0.5, so neither answer is the better one')
        better = pair.probability > 0.5
        return [(pair.prompt, pair.chosen, better), (pair.prompt, pair.rejected, not better)]
    label = flag_of(labelled["label"])
    if label is None:
        raise ValueError(f'"label" is {labelled["label"]!r}; true or false was expected')
    messages = read_conversation(labelled)
    return [(without_train(messages[:-1]), trained_reply(messages, "messages"), label)]


def gold_margin(row):
    """How much better "chosen" truly is, by "gold_chosen" and "gold_rejected"; nan without them."""
    gold = [row.get(name) for name in ("gold_chosen", "gold_rejected")]
    known = all(isinstance(g, (int, float)) and abs(g) < 1e100 for g in gold)
    return float(gold[0] - gold[1]) if known else math.nan


# -------------------------------------------------------------------------------------------------
# Files


def unknown_fields(row):
    """The fields of the messages in a row that are neither read nor refused, and not empty."""
    lists = [value for value in row.values() if isinstance(value, list)]
    messages = [m for messages in lists for m in messages if isinstance(m, dict) and role_of(m)]
    unknown = {name for m in messages for name in m if name not in MESSAGE_READ and not is_empty(m[name])}
    return {name for name in unknown if not is_flag(name)}


def unknown_columns(row):
    """The columns of a row that are neither read nor refused and hold text, more than a name."""
    known = {*FIELDS, *ANSWERS, "text", *OWN, *system_columns(row), *earlier_columns(row)}
    return {
        name
        for name, value in small_letters(row).items()
        if name not in known and words_of(name)[-1:] not in [[word] for word in ABOUT] and has_prose(value)
    }


def has_prose(value):
    return any(len(text.split()) > 2 for text in strings(value))


def read_source(name, parse, skip_bad, encode):
    """(rows, SHA-256 of the file's rows) of one source, each row through `parse` and `encode`."""
    rows, bad, digest = [], 0, hashlib.sha256()
    unread, unknown, columns = Counter(), set(), set()  # fields for which rows were left out; that nobody knows
    for line, row in read_rows(name, skip_bad):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        if row is None:
            bad += 1
            continue
        try:
            parsed = parse(row)
            rows.append(Encoded(parsed, encode(parsed)) if encode else parsed)
            unknown |= unknown_fields(row)
            columns |= unknown_columns(row) if parse in (conversation, preference, judged) else set()
        except (ValueError, RecursionError, UserError) as e:
            if not skip_bad:
                raise bad_row(f"{name}:{line}", reason(e)) from None
            bad += 1
            if isinstance(e, Unread):
                unread[e.field] += 1
    if bad:
        fields = ", ".join(f'{n} for "{field}"' for field, n in unread.most_common())
        fields = f"; {fields}, which is not read" if unread else ""
        print0(f"{name}: {bad} bad lines left out, {len(rows)} read{fields}")
    for what, fields in (("fields of messages", unknown), ("columns", columns)):
        if fields:
            listed = ", ".join(f'"{field}"' for field in sorted(fields))
            print0(f"{name}: {what} that are not read: {listed}")
    if not rows:
        raise UserError(f"{name}: there is nothing in it" + (f" but {bad} bad lines" if bad else ""))
    return rows, digest.hexdigest()


def read(sources, parse, skip_bad=False, seed=0, encode=None):
    """The rows of --data, each through `parse` -> (list, {source: SHA-256 of its rows}).

    With `encode`, a function of a parsed row, they are Encoded; its UserErrors name the line too.

    sources: a.jsonl,b.parquet,hf:NAME[configuration,split,rows] (data/read.py). Weights, as in
    a.jsonl:0.7,b.jsonl:0.3, are shares of the rows: every row is used of the source that is
    shortest of its share, a random choice of the others. Raises UserError naming the file, the
    line, the field and what is wrong.
    """
    mixture = parse_mixture(sources)
    found, hashes = [], {}
    for name, _ in mixture:
        rows, hashes[name] = read_source(name, parse, skip_bad, encode)
        found.append(rows)
    if mixture[0][1]:
        scale = min(len(rows) / weight for rows, (_, weight) in zip(found, mixture))
        for i, (name, weight) in enumerate(mixture):
            rows, n = found[i], max(1, round(scale * weight))
            used = np.sort(np.random.default_rng([seed, i]).permutation(len(rows))[:n])
            print0(f"{name}: {len(used)} of {len(rows)} rows, for its share of {weight:g}")
            found[i] = [rows[j] for j in used]
    return [row for rows in found for row in rows], hashes


def messages_of(row):
    """The messages of a row as `read` gives it; of a preference or a judgement its prompt's."""
    while not isinstance(row[0], dict):  # Encoded, a Pair, (messages, row), [(messages, ...)] of `judged`
        row = row[0]
    return row


def prompt_of(row):
    """The prompt of a row as `read` gives it: ((role, content), ...); of a conversation all before
    the first answer."""
    messages = messages_of(row)
    if messages[-1]["role"] == "assistant":
        messages = itertools.takewhile(lambda m: m["role"] != "assistant", messages)
    return tuple((m["role"], m["content"]) for m in messages)


def folded_prompt(row):
    """`prompt_of` a row, of which `folded` leaves what tells questions apart."""
    return tuple((role, folded(content)) for role, content in prompt_of(row))


def answered_turns(row):
    """{(("user", folded content),)}: what the user asks, at any turn, and training answers."""
    messages = messages_of(row)
    asked = [m for m, answer in itertools.pairwise(messages) if m["role"] == "user" and answer.get("train", True)]
    if messages[-1]["role"] == "user":  # a prompt: what is trained answers its end
        asked = messages[-1:]
    return {(("user", folded(m["content"])),) for m in asked}


def rare_turns(rows):
    """The `answered_turns` of each row, without those that are `common`."""
    turns, many = list(map(answered_turns, rows)), common(rows)
    times = Counter(itertools.chain(*turns))
    return [{turn for turn in said if times[turn] < many} for said in turns]


def common(rows):
    """In how many places a message is no question but "Hi", or an example that shows the form of an
    answer: a hundredth of the rows, and ten or more."""
    return max(10, len(rows) // 100)


def questions(rows, many=0):
    """What is asked in each row, ((role, folded content), ...): the first message of the user,
    without the system message and later turns.

    A message that begins `many` rows or more, 0 for as many as is `common`, is taken for a greeting
    or an example; what is asked is the whole prompt then.
    """
    prompts, many = list(map(folded_prompt, rows)), many or common(rows)
    first = {prompt: next(((said,) for said in prompt if said[0] == "user"), prompt) for prompt in set(prompts)}
    times = Counter(first.values())
    asked = [prompt if times[first[prompt]] >= many else first[prompt] for prompt in prompts]
    return asked if len(set(asked)) > 1 else prompts


def split_off(rows, fraction, seed, name="the rows"):
    """(train, held out): a random `fraction` of the rows is held out, and of each of the
    `questions` all rows or none.

    Raises UserError, which begins with `name`, if all ask the same.
    """
    by_question, limit = {}, max(1, int(fraction * len(rows)))
    # A question asked under twelve system messages stays one, and a greeting does no harm as a
    # question, unless its rows are more than are held out
    for i, question in enumerate(questions(rows, many=max(20, limit + 1))):
        by_question.setdefault(question, []).append(i)
    if len(by_question) < 2:
        raise UserError(f"{name}: one prompt only; at least two are needed, one to train on and one to hold out")
    groups = list(by_question.values())
    shuffled = [groups[g] for g in np.random.default_rng(seed).permutation(len(groups))]
    held_out = []
    for group in shuffled:
        if len(held_out) + len(group) <= min(limit, len(rows) - 1):
            held_out += group
    held_out = held_out or min(shuffled, key=len)
    train = sorted(set(range(len(rows))) - set(held_out))
    return [rows[i] for i in train], [rows[i] for i in sorted(held_out)]


def warn_of_shared_prompts(train, val, what):
    """Warn if validation rows have a prompt that is trained on, or ask the same: the same of
    `questions`, or one that the other side has in a later turn."""
    trained, asked = {prompt_of(row) for row in train}, questions(train + val)
    first, turns = set(asked[: len(train)]), set().union(*rare_turns(train))
    anywhere, alone = first | turns, first & turns
    exact = sum(prompt_of(row) in trained for row in val)
    pairs = zip(asked[len(train) :], rare_turns(val), strict=True)
    similar = sum(question in anywhere or not alone.isdisjoint(said) for question, said in pairs) - exact
    if exact + similar:
        print0(
            f"warning: {what}: of {len(val)} rows to validate on, {exact} have a prompt that is trained on as well, "
            f"{similar} one that asks the same but for case, white space, punctuation, system message or other turns; "
            "on these the figures measure memory: leave them out of one side"
        )


def count_asked(prompts, train):
    """How many folded prompts differ, whatever the system message, unless that alone tells them
    and those of `train` apart."""

    def without_system(prompt):
        return tuple(message for message in prompt if message[0] != "system")

    asked = set(map(without_system, prompts))
    alone = len(asked) == 1 and all(without_system(folded_prompt(row)) in asked for row in train)
    return len(prompts if alone else asked)


def read_split(config, parse, encode=None, fit=None):
    """(train rows, validation rows, {source: SHA-256}) of --data and --val, as `read` gives them.

    Without --val, --val_fraction of --data is held out. With `fit`, each side is the first of the
    two that fit(rows, their name for messages) gives: what it makes of them, and the rows that are
    left. Raises UserError if the answers to validate on are all to one prompt; a single prompt that
    is to be answered may do.
    """
    rows, hashes = read(config.data, parse, config.skip_bad, config.seed, encode)
    if config.val:
        refuse_unread(config, {"val_fraction": f"--val={config.val} is what is validated on"})
        what, more = f"--val={config.val}", "bring more"
        train, (val, val_hashes) = rows, read(config.val, parse, config.skip_bad, encode=encode)
        hashes |= val_hashes
    else:
        what, more = f"held out of {config.data}", "raise --val_fraction, or give --val"
        train, val = split_off(rows, config.val_fraction, config.seed, config.data)
    fitted = train, val
    if fit:
        (fitted_train, train), (fitted_val, val) = fit(train, config.data), fit(val, config.val or "held out of it")
        fitted = fitted_train, fitted_val
    prompts = set(map(folded_prompt, val))
    if len(prompts) < 2 and parse is not prompt_only:
        raise UserError(f"{what}: rows of one prompt only to validate on, which say nothing of others; {more}")
    if (asked := count_asked(prompts, train)) < FEW_PROMPTS:
        print0(f"warning: {what}: {asked} prompts to validate on, so its figures are mostly chance; {more}")
    warn_of_shared_prompts(train, val, what)
    return *fitted, hashes


def random_rows(rows, n, seed):
    """At most n of the rows, at random, in their order: the first n may all be of one source."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:n]
    return [rows[i] for i in np.sort(chosen)]
