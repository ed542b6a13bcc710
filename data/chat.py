"""Conversations as tokens: the template, and which tokens are trained.

    <|im_start|>user
    What is 2 + 3?<|im_end|>
    <|im_start|>assistant
    5<|im_end|>

That is ChatML, which Qwen uses. The assistant's words and the <|im_end|> after them are trained,
nothing else. A conversation is one document of a pack and ends at its last <|im_end|>: there a
reward model reads its score, and there a sampler stops. Text never yields a special token, so no
content can end a turn or begin one. Content stays as it is: white space at the head of an answer
may be the indentation of code.
"""

from itertools import pairwise

import numpy as np

from data import rows
from data.pack import Chat, make_completion
from runtime.cli import print0
from runtime.errors import UserError

# The same in Jinja, for `transformers`. The line end comes before a turn, so that a finished
# conversation ends at <|im_end|>.
TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)

# -------------------------------------------------------------------------------------------------
# Messages to tokens


def special(tok, name):
    """The id of a special token; raises UserError if the tokenizer has none of this name."""
    try:
        return tok.encode_single_token(name)
    except KeyError:
        raise UserError(
            f"this tokenizer has no {name}; run sft.py first, which adds the tokens of a conversation to such a model"
        ) from None


def end_of_turn(tok):
    """The id that ends every message."""
    return special(tok, "<|im_end|>")


def encode_header(tok, role, first):
    """The ids before the content of a message, the `first` of a conversation or a later one."""
    line_end = [] if first else tok.encode_ordinary("\n")
    return [*line_end, special(tok, "<|im_start|>"), *tok.encode_ordinary(role + "\n")]


def encode_completion(tok, text):
    """The ids of an assistant's message and its end: what follows `encode_prompt`."""
    return [*tok.encode_ordinary(text), end_of_turn(tok)]


def encode(tok, messages):
    """The Chat of a finished conversation, whose assistant's messages are trained, but for those
    with "train": False.

    messages: [{"role", "content"}, ...], checked by `rows.check_messages`.
    """
    ids, loss_mask = [], []
    for i, message in enumerate(messages):
        header = encode_header(tok, message["role"], first=i == 0)
        body = encode_completion(tok, message["content"])
        ids += header + body
        trained = message["role"] == "assistant" and message.get("train", True)
        loss_mask += [False] * len(header) + [trained] * len(body)
    return Chat(np.array(ids, dtype=np.int32), np.array(loss_mask, dtype=bool))


def encode_prompt(tok, messages):
    """The ids of a conversation that the assistant is to continue."""
    return [*encode(tok, messages).ids.tolist(), *encode_header(tok, "assistant", first=False)]


def encode_pair(tok, pair):
    """(chosen Chat, rejected Chat) of a rows.Pair, whose completions are trained."""
    prompt = encode_prompt(tok, pair.prompt)
    chosen, rejected = (make_completion(prompt, encode_completion(tok, text)) for text in (pair.chosen, pair.rejected))
    return chosen, rejected


def decode_completion(tok, ids):
    """The text of a sampled completion, without special tokens."""
    return tok.decode([i for i in ids if i not in tok._special_tokens.values()])


# -------------------------------------------------------------------------------------------------
# What is too long


def whole_turns(chat, limit, end):
    """The Chat up to the last completion that ends within `limit` tokens; None if none does.

    end: the id that ends a turn.
    """
    if len(chat.ids) <= limit:
        return chat
    ends = np.flatnonzero((chat.ids[:limit] == end) & chat.loss_mask[:limit])
    if not len(ends):
        return None
    return Chat(chat.ids[: ends[-1] + 1], chat.loss_mask[: ends[-1] + 1])


def drop_too_long(chats, limit, end, what):
    """The chats cut by `whole_turns`; says how many of `what` were cut or dropped.

    Raises UserError if none is left.
    """
    kept = [whole_turns(chat, limit, end) for chat in chats]
    kept = [chat for chat in kept if chat is not None]
    dropped = len(chats) - len(kept)
    cut = sum(len(chat.ids) > limit for chat in chats) - dropped
    if cut + dropped:
        print0(
            f"{what}: of {len(chats):,} conversations, {cut} were cut after their last answer that ends within "
            f"{limit} tokens, {dropped} dropped, none of whose answers does"
        )
    if not kept:
        raise UserError(
            f"{what}: no conversation has an answer that ends within {limit} tokens; "
            "give a larger --context if the model's reaches further"
        )
    return kept


def drop_long_pairs(pairs, limit, what):
    """The indices of the pairs (Chat, Chat) whose sides both fit into `limit` tokens.

    A cut answer would have lost its end. Raises UserError if no pair is left.
    """
    kept = [i for i, sides in enumerate(pairs) if max(len(side.ids) for side in sides) <= limit]
    if len(kept) < len(pairs):
        print0(
            f"{what}: {len(pairs) - len(kept)} of {len(pairs)} pairs left out, a side of which exceeds {limit} tokens"
        )
    if not kept:
        raise UserError(
            f"{what}: no pair fits into {limit} tokens; give a larger --context if the model's reaches further"
        )
    return kept


def read_prompts(config, tok, context):
    """(train rows, validation rows, {source: SHA-256}) of --data and --val.

    A row is (messages, row). Prompts that leave less than --max_new_tokens of the context are left
    out; says how many. Raises UserError if none is left.
    """
    longest = context - config.max_new_tokens
    flag = f"--max_new_tokens={config.max_new_tokens}"
    if longest <= 0:
        raise UserError(f"{flag}: the model's context is {context} tokens, and a prompt must fit in as well")
    train, val, hashes = rows.read_split(config, rows.prompt_only)
    kept = []
    for found, what in ((train, config.data), (val, config.val or "held out of it")):
        fitting = [row for row in found if len(encode_prompt(tok, row[0])) <= longest]
        if len(fitting) < len(found):
            print0(
                f"{what}: {len(found) - len(fitting)} of {len(found)} prompts left out, "
                f"which leave less than {flag} of the context's {context} tokens"
            )
        if not fitting:
            raise UserError(f"{what}: no prompt leaves room for a completion of {flag} tokens; lower that")
        kept.append(fitting)
    return *kept, hashes


# -------------------------------------------------------------------------------------------------
# The audit before step 0


def audit(tok, chats, what, action="trained"):
    """Print one example with the tokens of its loss mask marked, and their share.

    action: what is done with these tokens. Raises UserError if there are none, or no end of a turn
    is among them.
    """
    trained = sum(int(chat.loss_mask.sum()) for chat in chats)
    total = sum(len(chat.ids) for chat in chats)
    end = end_of_turn(tok)
    if not trained:
        raise UserError(f"{what}: no token of an answer in it: nothing could be {action}")
    if not any((chat.ids[chat.loss_mask] == end).any() for chat in chats):
        raise UserError(f"{what}: no answer ends in {tok.decode([end])}: a model trained on it would never stop")
    example = min(chats, key=lambda chat: abs(len(chat.ids) - total / len(chats)))  # of average length
    print0(
        f"{what}: {len(chats):,} conversations, {total:,} tokens, {trained / total:.1%} of them {action}; "
        f"one of them, what is {action} marked:"
    )
    print0(marked(tok, example))


def marked(tok, chat):
    """The text of a Chat, its trained tokens between guillemets."""
    edges = np.flatnonzero(np.diff(chat.loss_mask, prepend=False, append=False)).tolist()
    bounds = [0, *edges, len(chat.ids)]  # untrained, trained, ..., untrained
    text = ""
    for i, (a, b) in enumerate(pairwise(bounds)):
        part = tok.decode(chat.ids[a:b].tolist())
        text += f"«{part}»" if i % 2 else part
    return text
