"""Conversations: one template, the formats people have, and which tokens a model is to learn.

    <|im_start|>user
    What is 2 + 3?<|im_end|>
    <|im_start|>assistant
    5<|im_end|>

That is ChatML, which Qwen uses. The assistant's words and the <|im_end|> after them are learnt, nothing else. A conversation is one document of a pack
and ends at its last <|im_end|>: there a reward model reads its score, and there a sampler stops. Special tokens are never made from text, so no
content can end a turn or begin one. White space round a message is dropped, as Llama 3's template does.

Read, besides {"messages"}: {"prompt", "completion"}, Alpaca ({"instruction", "input", "output"}), ShareGPT ({"conversations"}), problems ({"prompt" or
"question", "answer"}); preferences whose sides are strings or messages, with the prompt apart, or inside both sides, or both (UltraFeedback, HH).
Left out: tools and images.
"""
import hashlib, json, math, os, re, sys
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, rank
from data.pack import next_tokens, pack, split
from data.read import parse_mixture, read_rows
from data.rewards import right_number
from kernels.head import IGNORE, linear_logprob

TEMPLATE = (  # the same in Jinja, for `transformers`. The line end comes before a turn, so that a finished conversation ends at <|im_end|>
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] | trim) + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


class Chat(NamedTuple):
    ids: np.ndarray  # int32 [T], the whole conversation
    learnt: np.ndarray  # bool [T]: the tokens of an answer, its <|im_end|> included


class Pair(NamedTuple):
    prompt: list  # messages
    chosen: str
    rejected: str
    probability: float  # that people (or a judge) prefer `chosen`; 1 where the data do not say
    row: dict  # as it stood in the file


# ---------------------------------------------------------------------------------------------------------------------------------
# Messages to tokens


def end_of_turn(tok):
    """The id that ends every message."""
    return special(tok, "<|im_end|>")


def special(tok, name):
    try:
        return tok.encode_single_token(name)
    except KeyError:
        raise UserError(f"this tokenizer has no {name}; only sft.py starts from such a model: it adds the tokens of a conversation") from None


def header(tok, role, first):
    """The ids before a message's content."""
    return [*(() if first else tok.encode_ordinary("\n")), special(tok, "<|im_start|>"), *tok.encode_ordinary(role + "\n")]


def encode_answer(tok, text):
    """The ids of an assistant's message, its end included: what follows `encode_prompt`."""
    return [*tok.encode_ordinary(text.strip()), end_of_turn(tok)]


def encode(tok, messages):
    """A finished conversation -> Chat. messages: [{"role", "content"}, ...], checked by `check_messages`."""
    ids, learnt = [], []
    for i, message in enumerate(messages):
        head, body = header(tok, message["role"], first=i == 0), encode_answer(tok, message["content"])
        ids += head + body
        learnt += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    return Chat(np.array(ids, dtype=np.int32), np.array(learnt, dtype=bool))


def encode_prompt(tok, messages):
    """The ids of a conversation that the assistant is to go on with."""
    return [*encode(tok, messages).ids.tolist(), *header(tok, "assistant", first=False)]


def decode_answer(tok, ids):
    """The text of a sampled answer, without the special tokens."""
    return tok.decode([i for i in ids if i not in tok._special_tokens.values()]).strip()


def answered(prompt, answer):
    """The Chat of a prompt's ids and an answer's, of which the answer is learnt and no earlier one."""
    return Chat(np.array(prompt + answer, dtype=np.int32), np.arange(len(prompt) + len(answer)) >= len(prompt))


def pack_chats(chats):
    """[Chat, ...] -> (pack, targets int64 [N]): the token after each one where that is learnt, IGNORE elsewhere."""
    p = pack([c.ids for c in chats])
    learnt = torch.from_numpy(np.concatenate([c.learnt for c in chats])).roll(-1)  # a conversation begins with a token that is not learnt
    return p, next_tokens(p, IGNORE).masked_fill(~learnt, IGNORE)


def before_learnt(model, chats):
    """(hidden [M, C], targets [M]): what the model has at each token before a learnt one, in order, and the learnt ones: all that a head need be asked.

    A head over prompts as well costs a DPO step 8 % more where they are a quarter of the tokens. The rows are found before they go to the device, which
    else would have to be waited for.
    """
    p, targets = pack_chats(chats)
    rows, device = (targets != IGNORE).nonzero()[:, 0], model.embed.device
    return model(p.to(device)).index_select(0, rows.to(device)), targets[rows].to(device)


def learnt_logprobs(model, chats, temperature=1.0):
    """fp32 [M]: the log-probability of each learnt token, in order."""
    hidden, targets = before_learnt(model, chats)
    return linear_logprob(hidden, model.head, targets, temperature)


@torch.no_grad()
def constant_logprobs(model, chats, temperature, micro_tokens):
    """`learnt_logprobs` in evaluation, without a gradient, at most `micro_tokens` tokens at once."""
    model.eval()
    if not chats:  # a rank's share may be empty
        return torch.zeros(0, device=model.embed.device)
    return torch.cat([learnt_logprobs(model, chats[first:last], temperature) for first, last in split([len(c.ids) for c in chats], micro_tokens)])


# ---------------------------------------------------------------------------------------------------------------------------------
# Rows of a file to messages. A ValueError says what is wrong; `read` adds the file and the line.

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # ShareGPT's


def text_of(value, field):
    if not isinstance(value, str):
        raise ValueError(f'"{field}" is {type(value).__name__ if value is not None else "missing"}; a string was expected')
    if not value.strip():
        raise ValueError(f'"{field}" is empty')
    return value


def check_messages(messages, field="messages"):
    """The same messages, role and content only. ValueError unless they are system (at most one, first), then user and assistant in turn."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{field}" is not a list of messages')
    clean = []
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or not isinstance(m.get("role", m.get("from")), str):
            raise ValueError(f'"{field}"[{i}] is no {{"role", "content"}}')
        role = m.get("role", m.get("from"))
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f'"{field}"[{i}] has the role {role!r}; system, user and assistant are known')
        due = "user" if not clean or clean[-1]["role"] != "user" else "assistant"
        if role != due and not (role == "system" and i == 0):
            raise ValueError(f'"{field}"[{i}]: a message of {role!r} where one of {due!r} is due')
        clean.append({"role": role, "content": text_of(m.get("content", m.get("value")), f"{field}[{i}].content")})
    return clean


def as_messages(value, field):
    """A string (what the user says) or messages -> messages."""
    return [{"role": "user", "content": text_of(value, field)}] if isinstance(value, str) else check_messages(value, field)


def ends_with(messages, role, field):
    if messages[-1]["role"] != role:
        raise ValueError(f'"{field}" ends with a message of {messages[-1]["role"]!r}; the last one must be of {role!r}')
    return messages


def conversation(row):
    """A row of any chat format -> messages that end with the assistant's."""
    if "chosen" in row and "rejected" in row:
        raise ValueError("this is a preference (chosen, rejected), no conversation; reward.py and dpo.py read it")
    if "messages" in row or "conversations" in row:
        field = "messages" if "messages" in row else "conversations"
        return ends_with(check_messages(row[field], field), "assistant", field)
    if "instruction" in row:  # Alpaca
        return [instruction(row), {"role": "assistant", "content": text_of(row.get("output"), "output")}]
    if "completion" in row:
        said = row["completion"]
        said = check_answer(said, "completion") if isinstance(said, list) else text_of(said, "completion")
        return [*prompt(row), {"role": "assistant", "content": said}]
    if "answer" in row:
        return [*prompt(row), {"role": "assistant", "content": solution(row)}]
    if "text" in row:
        raise ValueError('"text" is what pretraining reads; a conversation has "messages", or "prompt" and "completion"')
    raise ValueError(f'no conversation in the fields {", ".join(row) or "(none)"}; "messages" or "prompt" and "completion" were expected')


def instruction(row):
    """Alpaca's "instruction" and "input" as the user's message."""
    asked, more = text_of(row["instruction"], "instruction"), row.get("input") or ""
    return {"role": "user", "content": asked if isinstance(more, str) and not more.strip() else f"{asked}\n\n{text_of(more, 'input')}"}


def check_answer(messages, field):
    """The content of a list that holds one message of the assistant."""
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != "assistant":
        raise ValueError(f'"{field}": one message of the assistant was expected')
    return text_of(messages[0].get("content"), f"{field}[0].content")


def solution(row):
    """The "answer" of a problem, without GSM8K's <<48/2=24>> annotations."""
    return re.sub(r"<<[^<>]*>>", "", text_of(row.get("answer"), "answer"))


def prompt(row):
    """What the assistant is to answer: "prompt" or "question" (string or messages), or a conversation, whose last answer is left out -> messages."""
    field = next((name for name in ("prompt", "question", "messages", "conversations", "instruction") if name in row), None)
    if field is None:
        raise ValueError(f'no "prompt" in the fields {", ".join(row) or "(none)"}')
    messages = [instruction(row)] if field == "instruction" else as_messages(row[field], field)
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f'"{field}" has no question of a user')
    return messages


def problem(row):
    """{"prompt" or "question", "answer" with a number to compare with} -> (messages, row)."""
    row = row | {"answer": solution(row)}
    if right_number(row) is None:
        raise ValueError('"answer" has no number to compare with: neither "#### 72" at its end nor a number by itself')
    return prompt(row), row


def prompt_only(row):
    """Any row with a prompt -> (messages, row)."""
    return prompt(row), row


def dialogue(text, field):
    """Anthropic's HH: a string of "\\n\\nHuman: ...\\n\\nAssistant: ..." turns -> messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) < 5 or parts[0].strip():
        raise ValueError(f'"{field}" is a string without a prompt apart and without "\\n\\nHuman: ... \\n\\nAssistant: ..." turns')
    return check_messages([{"role": "user" if who == "Human" else "assistant", "content": said} for who, said in zip(parts[1::2], parts[2::2])], field)


def preference(row):
    """{"chosen", "rejected"} and "prompt", apart or as the beginning of both -> Pair. Optional: "probability" that the chosen one is preferred."""
    sides = []
    for field in ("chosen", "rejected"):
        if field not in row:
            raise ValueError(f'no "{field}"' + ("; this is a conversation, which sft.py reads" if "messages" in row else f" in the fields {', '.join(row) or '(none)'}"))
        side = row[field]
        if not isinstance(side, list) and "prompt" in row:
            side = [{"role": "assistant", "content": text_of(side, field)}]
        elif not isinstance(side, list):
            side = dialogue(text_of(side, field), field)
        elif len(side) == 1 and "prompt" in row:
            side = [{"role": "assistant", "content": check_answer(side, field)}]
        else:
            side = check_messages(side, field)
        sides.append(ends_with(side, "assistant", field))
    inside = sides[0][:-1]
    if inside != sides[1][:-1]:
        raise ValueError('"chosen" and "rejected" answer different prompts: all but the last message must be the same')
    asked = inside
    if "prompt" in row:
        asked = prompt(row)
        if inside and inside[-len(asked) :] != asked:  # UltraFeedback repeats the prompt in both sides, HH's system message may come on top
            raise ValueError('"chosen" begins with messages that are not the "prompt"')
        asked = inside or asked
    if not asked:
        raise ValueError("there is no prompt: neither a field of that name nor messages before the answers")
    chosen, rejected = (side[-1]["content"].strip() for side in sides)
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same text')
    probability = row.get("probability", 1.0)
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
        raise ValueError(f'"probability" is {probability!r}; a number from 0 to 1 was expected')
    return Pair(asked, chosen, rejected, float(probability), row)


def gold_lead(row):
    """By how much "chosen" is better than "rejected" in truth, where a row knows it ("gold_chosen", "gold_rejected"); else nan."""
    gold = [row.get(name) for name in ("gold_chosen", "gold_rejected")]
    return float(gold[0] - gold[1]) if all(isinstance(g, (int, float)) and abs(g) < 1e100 for g in gold) else math.nan


def judged(row):
    """KTO's {"prompt", "completion", "label"} -> [(messages, completion, label)]; a preference gives two of them."""
    if "label" in row:
        if not isinstance(row["label"], bool):
            raise ValueError(f'"label" is {row["label"]!r}; true or false was expected')
        messages = conversation(row)
        return [(messages[:-1], messages[-1]["content"].strip(), row["label"])]
    pair = preference(row)
    return [(pair.prompt, pair.chosen, True), (pair.prompt, pair.rejected, False)]


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading files


def read(sources, parse, skip_bad=False, seed=0):
    """The rows of --data, each through `parse` -> (list, {source: SHA-256 of its rows}).

    sources: a.jsonl,b.parquet,hf:NAME[configuration,split,rows]; with weights, a.jsonl:0.7,b.jsonl:0.3, these are shares of the rows: of the source that is
    shortest of its share every row is used, of the others a random choice. UserError names the file, the line, the field and what is wrong there.
    """
    weighed, found, digests = parse_mixture(sources), [], {}
    for name, _ in weighed:
        rows, bad, digest = [], 0, hashlib.sha256()
        for line, row in read_rows(name, skip_bad):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            try:
                if row is not None:
                    rows.append(parse(row))
            except ValueError as e:
                if not skip_bad:
                    raise UserError(f"{name}:{line}: {e}; mend the line, or leave bad lines out with --skip_bad=True") from None
                row = None
            bad += row is None
        if bad and rank() == 0:
            print(f"{name}: {bad} bad lines left out, {len(rows)} read")
        if not rows:
            raise UserError(f"{name}: there is nothing in it" + (f" but {bad} bad lines" if bad else ""))
        found.append(rows)
        digests[name] = digest.hexdigest()
    if weighed[0][1]:
        scale = min(len(rows) / weight for rows, (_, weight) in zip(found, weighed))
        for i, (name, weight) in enumerate(weighed):
            used = np.sort(np.random.default_rng([seed, i]).permutation(len(found[i]))[: max(1, round(scale * weight))])
            if rank() == 0:
                print(f"{name}: {len(used)} of {len(found[i])} rows, for its share of {weight:g}")
            found[i] = [found[i][j] for j in used]
    return [row for rows in found for row in rows], digests


def whole_turns(chat, limit, end):
    """The conversation up to the last answer that ends within `limit` tokens; None where not even the first does. end: the id that ends a turn."""
    if len(chat.ids) <= limit:
        return chat
    ends = np.flatnonzero((chat.ids[:limit] == end) & chat.learnt[:limit])
    return Chat(chat.ids[: ends[-1] + 1], chat.learnt[: ends[-1] + 1]) if len(ends) else None


def split_off(rows, fraction, seed):
    """(train, held out): a random `fraction` of the rows, at least one of each."""
    if len(rows) < 2:
        raise UserError("--data: one row only; two are the least, one to learn from and one to hold out")
    order = np.random.default_rng(seed).permutation(len(rows))
    n = min(len(rows) - 1, max(1, int(fraction * len(rows))))
    return [rows[i] for i in np.sort(order[n:])], [rows[i] for i in np.sort(order[:n])]


def read_split(config, parse):
    """(train rows, validation rows, {source: SHA-256}) of --data and --val, or with a part of --data held out."""
    rows, data = read(config.data, parse, config.skip_bad, config.seed)
    if not config.val:
        return *split_off(rows, config.val_fraction, config.seed), data
    val_rows, val_data = read(config.val, parse, config.skip_bad)
    return rows, val_rows, data | val_data


def read_prompts(config, tok, context):
    """(train, val, {source: SHA-256}) of --data and --val: rows (messages, row) whose prompt leaves room for an answer of --max_new. Says how many do not."""
    if config.max_new >= context:
        raise UserError(f"--max_new={config.max_new}: the model's context is {context} tokens, and a prompt must go in as well")
    train, val, data = read_split(config, prompt_only)
    kept = []
    for rows, what in ((train, config.data), (val, config.val or "held out of it")):
        fits = [row for row in rows if len(encode_prompt(tok, row[0])) + config.max_new <= context]
        if rank() == 0 and len(fits) < len(rows):
            print(f"{what}: {len(rows) - len(fits)} of {len(rows)} prompts left out, which leave less than --max_new={config.max_new} of the context's {context} tokens")
        if not fits:
            raise UserError(f"{what}: no prompt leaves room for an answer of --max_new={config.max_new} tokens; lower that")
        kept.append(fits)
    return *kept, data


# ---------------------------------------------------------------------------------------------------------------------------------
# The audit before step 0


def audit(tok, chats, what, done="learnt"):
    """Print one example with what is learnt (`done`) marked, and the share of such tokens. UserError where nothing is, or no end of a turn is."""
    learnt, total = sum(int(c.learnt.sum()) for c in chats), sum(len(c.ids) for c in chats)
    end = end_of_turn(tok)
    if not learnt:
        raise UserError(f"{what}: not one token of an answer in it: nothing could be learnt")
    if not any((c.ids[c.learnt] == end).any() for c in chats):
        raise UserError(f"{what}: no answer ends in {tok.decode([end])}: a model trained on it would never stop")
    if rank() == 0:
        example = min(chats, key=lambda c: abs(len(c.ids) - total / len(chats)))  # of average length
        print(f"{what}: {len(chats):,} conversations, {total:,} tokens, {learnt / total:.1%} of them {done}; one of them, what is {done} marked:")
        print(coloured(tok, example, sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def coloured(tok, chat, colour):
    """The text of a conversation, learnt tokens in green, or between guillemets where there is no colour."""
    begin, end = ("\033[32m", "\033[0m") if colour else ("«", "»")
    edges = np.flatnonzero(np.diff(chat.learnt, prepend=False, append=False)).tolist()
    text, last = "", 0
    for a, b in zip(edges[::2], edges[1::2]):
        text += tok.decode(chat.ids[last:a].tolist()) + begin + tok.decode(chat.ids[a:b].tolist()) + end
        last = b
    return text + tok.decode(chat.ids[last:].tolist())
