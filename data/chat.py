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

A downloaded model keeps its own template (data/template.py), and the ids are those of
transformers' apply_chat_template. What such a template writes after a prompt, up to the first of
the model's stop ids, is an answer.
"""

import functools
import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

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
# Checkpoints of earlier versions have it with white space around a message dropped
TRIMMED = TEMPLATE.replace("m['content']", "(m['content'] | trim)")

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
    """The id that ends an answer; raises UserError if nothing does."""
    if not has_own_template(tok):
        return special(tok, "<|im_end|>")
    end = structure(tok).end
    if end is None:
        raise UserError(
            f"{tok.template.file}: the chat template ends no answer with a special token, so that a model trained "
            "on it would never stop; add one to it"
        )
    return end


def stop_ids(tok):
    """The set of ids at which an answer ends: of a downloaded model, all its eos ids as well."""
    if not has_own_template(tok):
        return {end_of_turn(tok)}
    return {*structure(tok).stop_ids}


def text_stop_ids(tok):
    """The set of ids at which a text ends that is continued, not answered.

    A downloaded chat model may end it as it ends a turn.
    """
    return {tok.eot, *tok.eos_ids}


def is_chat_model(tok, info):
    """Whether a model of this tokenizer and feinschliff.json ends its turns.

    Base models are published with a chat template, too, but with an eos that ends documents.
    """
    if info.get("stage", "pretrain") != "pretrain":
        return True
    return tok.template is not None and end_of_turn(tok) in tok.eos_ids


def encode_header(tok, role, first):
    """The ids before the content of a message, the `first` of a conversation or a later one."""
    line_end = [] if first else tok.encode_ordinary("\n")
    return [*line_end, special(tok, "<|im_start|>"), *tok.encode_ordinary(role + "\n")]


def encode_completion(tok, text, prompt=()):
    """The ids of an assistant's message and its end: what follows `encode_prompt(tok, prompt)`.

    Our template writes the same after every prompt.
    """
    if has_own_template(tok):
        return Rendering(tok, [*(prompt or PROBE), rows.message("assistant", text)]).completion()
    return [*tok.encode_ordinary(text), end_of_turn(tok)]


def is_trained(message):
    """Whether a message is in the loss: an assistant's, unless the data say "train": false."""
    return message["role"] == "assistant" and message.get("train", True)


def encode(tok, messages):
    """The Chat of a finished conversation, whose assistant's messages are trained, but for those
    with "train": False.

    messages: [{"role", "content"}, ...], checked by `rows.check_messages`; one with "train": False
    is not trained. Nor is one that a downloaded template writes otherwise once others follow: see
    `encode_turns`.
    """
    if has_own_template(tok):
        return Rendering(tok, messages).chats()[0]
    ids, loss_mask = [], []
    for i, message in enumerate(messages):
        header = encode_header(tok, message["role"], first=i == 0)
        body = [*tok.encode_ordinary(message["content"]), end_of_turn(tok)]
        ids += header + body
        loss_mask += [False] * len(header) + [is_trained(message)] * len(body)
    return Chat(np.array(ids, dtype=np.int32), np.array(loss_mask, dtype=bool))


def encode_turns(tok, messages):
    """[Chat]: a finished conversation such that each trained message is once in a loss mask.

    One Chat, unless the template writes earlier answers otherwise (Qwen3's drops their thinking):
    such an answer is trained as the end of a Chat of its own, for there it is as the model is to
    write it.
    """
    if not has_own_template(tok):
        return [encode(tok, messages)]
    whole, *rewritten = Rendering(tok, messages).chats()
    if rewritten and not whole.loss_mask.any():  # nothing is left to train in the whole
        return rewritten
    return [whole, *rewritten]


def encode_prompt(tok, messages):
    """The ids of a conversation that the assistant is to continue."""
    if has_own_template(tok):
        rendering = Rendering(tok, messages)
        return rendering.ids(rendering.text(len(messages), True))
    return [*encode(tok, messages).ids.tolist(), *encode_header(tok, "assistant", first=False)]


def encode_pair(tok, pair):
    """(chosen Chat, rejected Chat) of a rows.Pair, whose completions are trained."""
    prompt = encode_prompt(tok, pair.prompt)
    chosen = make_completion(prompt, encode_completion(tok, pair.chosen, pair.prompt))
    return chosen, make_completion(prompt, encode_completion(tok, pair.rejected, pair.prompt))


def encoder(tok, function):
    """A function of a parsed row for `rows.read`: function(tok, row).

    Raises UserError if no row can be encoded, which is no fault of a line.
    """
    if has_own_template(tok):
        structure(tok)
    else:
        special(tok, "<|im_start|>")
        special(tok, "<|im_end|>")
    return functools.partial(function, tok)


def decode_completion(tok, ids):
    """The text of a sampled completion, without special tokens."""
    return tok.decode([i for i in ids if i not in tok.special_ids])


# -------------------------------------------------------------------------------------------------
# A downloaded model's template

PROBE = (rows.message("user", "What is a kiwi?"),)  # a conversation that almost every template can render
ANSWER = "A fruit."
PRIVATE = 0xF0000  # the first of the characters that Unicode gives no meaning


class Structure(NamedTuple):
    """What the template and the files of a downloaded model say of its turns."""

    end: int | None  # the id that ends an answer
    stop_ids: frozenset  # at which sampling ends
    names: dict  # {special token: id}
    pattern: re.Pattern  # finds special tokens, of several at one place the longest
    spelled: re.Pattern  # finds the first character of each
    edges: str  # the characters that special tokens begin or end with
    lstrip: set  # special tokens that take the white space before them
    rstrip: set  # and after them


def has_own_template(tok):
    """Whether the chats of this tokenizer's model have another template than ours."""
    return tok.template is not None and tok.template.source not in (TEMPLATE, TRIMMED)


def example(tok):
    """A short conversation in the tokenizer's template; some ask for a system message."""
    messages = [*PROBE, rows.message("assistant", ANSWER)]
    try:
        return tok.template.render(messages, False)
    except UserError:
        return tok.template.render([rows.message("system", "Be brief."), *messages], False)


@functools.lru_cache(maxsize=8)
def structure(tok):
    """The Structure of a tokenizer that `has_own_template`."""
    names = {tok.decode([i]): i for i in tok.special_ids}
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
    spelled = re.compile(f"(?=(?:{pattern.pattern}))(.)", re.DOTALL)
    text = example(tok)
    after = pattern.search(text, text.rfind(ANSWER) + len(ANSWER))
    end = names[after[0]] if after and ANSWER in text else None
    stops = frozenset([*tok.eos_ids, *([] if end is None else [end])])
    edges = "".join({char for name in names for char in (name[0], name[-1])})
    strips = [{row["content"] for row in tok.added if row.get(side)} for side in ("lstrip", "rstrip")]
    return Structure(end, stops, names, pattern, spelled, edges, *strips)


class Rendering:
    """A conversation under a downloaded model's template, which may not let text become a token.

    transformers would find special tokens in what people wrote. Here the first character of one
    that is spelled in a message is a private one until the special tokens of the rendered text are
    found.
    """

    def __init__(self, tok, messages):
        self.tok, self.structure = tok, structure(tok)
        found = "".join(m["content"] for m in messages)
        unused = (chr(i) for i in range(PRIVATE, PRIVATE + 2**16) if chr(i) not in found)
        self.private = dict(zip(self.structure.edges, unused))
        self.public = {ord(private): char for char, private in self.private.items()}
        self.roles, self.trained = [m["role"] for m in messages], [is_trained(m) for m in messages]
        self.contents = [self.disguise(m["content"]) for m in messages]
        self.neutral = [content.translate(str.maketrans(self.private)) for content in self.contents]

    def disguise(self, content):
        """The text with private characters where it spells special tokens."""
        return self.structure.spelled.sub(lambda match: self.private[match[1]], content)

    def text(self, n, add_generation_prompt):
        """The first n messages rendered.

        Raises UserError if the template makes a special token of what messages say, as one that
        joins two of them may.
        """
        text = self.render(self.contents[:n], add_generation_prompt)
        if self.neutral[:n] != self.contents[:n]:
            neutral = self.render(self.neutral[:n], add_generation_prompt)
            if self.structure.pattern.findall(text) != self.structure.pattern.findall(neutral):
                raise UserError(
                    f"{self.tok.template.file}: the chat template makes a special token of what the message "
                    f"{self.contents[n - 1][:80]!r} or one before it says; leave that conversation out"
                )
        return text

    def render(self, contents, add_generation_prompt):
        messages = [rows.message(*message) for message in zip(self.roles, contents)]
        return self.tok.template.render(messages, add_generation_prompt)

    def ids(self, text):
        """The ids of a rendered text."""
        ids, begin = [], 0
        for match in self.structure.pattern.finditer(text):
            before = text[begin : match.start()]
            before = before.rstrip() if match[0] in self.structure.lstrip else before
            ids += self.tok.encode_ordinary(before.translate(self.public))
            ids.append(self.structure.names[match[0]])
            begin = match.end()
            if match[0] in self.structure.rstrip:
                begin += len(text[begin:]) - len(text[begin:].lstrip())
        return ids + self.tok.encode_ordinary(text[begin:].translate(self.public))

    def answer(self, i):
        """(prompt, answer): what is rendered before message i, and what it adds.

        Raises UserError if the template does not render the answer as the prompt's continuation, or
        leaves out part of it, as some do with a thought.
        """
        prompt, text = self.text(i, True), self.text(i + 1, False)
        if not text.startswith(prompt):
            raise UserError(
                f"{self.tok.template.file}: under this chat template the answer {self.contents[i][:80]!r} does not "
                f"continue the prompt, which ends in {prompt[-40:]!r}; it cannot be trained on: give answers that do, "
                "or take another template"
            )
        answer = text[len(prompt) :]
        if leaves_out(self.contents[i], answer):
            raise UserError(
                f"{self.tok.template.file}: this chat template leaves out part of the answer "
                f"{self.contents[i][:80]!r}, and writes {answer[:80]!r}; give answers without that part, or take "
                "another template"
            )
        return prompt, answer

    def end(self, ids, begin=0):
        """Where the answer that begins at ids[begin] ends: after the first stop id."""
        ends = (i + 1 for i in range(begin, len(ids)) if ids[i] in self.structure.stop_ids)
        return next(ends, len(ids))

    def completion(self):
        """The ids of the last message, an answer, and its end."""
        ids = self.ids(self.answer(len(self.roles) - 1)[1])
        return ids[: self.end(ids)]

    def chats(self):
        """[the Chat of the whole, and one for each trained answer that is otherwise there]."""
        whole = self.ids(self.text(len(self.roles), False))
        mask, others = np.zeros(len(whole), dtype=bool), []
        for i in np.flatnonzero(self.trained):
            prompt, answer = self.answer(i)
            ids = self.ids(prompt + answer)
            # a token that joins the prompt's end and the answer's beginning belongs to the answer
            begin = common_length(ids, self.ids(prompt))
            end = self.end(ids, begin)
            if whole[:end] == ids[:end]:
                mask[begin:end] = True
            else:
                others.append(Chat(np.array(ids[:end], dtype=np.int32), np.arange(end) >= begin))
        return [Chat(np.array(whole, dtype=np.int32), mask), *others]


def leaves_out(content, text):
    """Whether a text lacks letters or digits of what it should hold.

    White space, quotes and escapes may differ.
    """
    if "".join(content.split()) in "".join(text.split()):
        return False
    return bool(Counter(filter(str.isalnum, content)) - Counter(filter(str.isalnum, text)))


def common_length(a, b):
    """How many items two lists begin with alike."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


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


def fitting(lengths, limit, what, unit, why, advice):
    """The indices of what has at most `limit` tokens; says how many of `what` were left out.

    unit: what has a length, in a word; why it was left out. Raises UserError with the advice if
    none is left.
    """
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    if len(kept) < len(lengths):
        print0(f"{what}: {len(lengths) - len(kept)} of {len(lengths)} {unit}s left out, {why}")
    if not kept:
        raise UserError(f"{what}: no {unit} {advice}")
    return kept


def fitting_pairs(pairs, limit, what):
    """The indices of the pairs (Chat, Chat) whose sides both fit into `limit` tokens.

    A cut answer would have lost its end. Raises UserError if no pair is left.
    """
    lengths = [max(len(side.ids) for side in sides) for sides in pairs]
    advice = f"fits into {limit} tokens; give a larger --context if the model's reaches further"
    return fitting(lengths, limit, what, "pair", f"a side of which exceeds {limit} tokens", advice)


def prompt_length(tok, row):
    """How many tokens the prompt of (messages, row) has."""
    return len(encode_prompt(tok, row[0]))


def read_prompts(config, tok, context, length=prompt_length):
    """(train rows, validation rows, {source: SHA-256}) of --data and --val.

    A row is (messages, row); length(tok, row): its tokens. Prompts that leave less than
    --max_new_tokens of the context are left out; says how many. Raises UserError if none is left.
    """
    longest = context - config.max_new_tokens
    flag = f"--max_new_tokens={config.max_new_tokens}"
    if longest <= 0:
        raise UserError(f"{flag}: the model's context is {context} tokens, and a prompt must fit in as well")
    why = f"which leave less than {flag} of the context's {context} tokens"
    advice = f"leaves room for a completion of {flag} tokens; lower that"

    def fit(found, what):
        kept = fitting([n for _, n in found], longest, what, "prompt", why, advice)
        kept = [found[i].row for i in kept]
        return kept, kept

    return rows.read_split(config, rows.prompt_only, encoder(tok, length), fit)


def read_pairs(config, tok, context):
    """(train pairs, train items, validation pairs, validation items, {source: SHA-256}) of --data
    and --val, without pairs that exceed `context`. Warns if no label says which side is better.

    Pairs are rows.Pair, with the text; items are the same in tokens.
    """

    def fit(found, what):
        pairs, items = zip(*found)
        kept = fitting_pairs(items, context, what)
        pairs = [pairs[i] for i in kept]
        return (pairs, [items[i] for i in kept]), pairs

    train, val, hashes = rows.read_split(config, rows.preference, encoder(tok, encode_pair), fit)
    if all(pair.probability == 0.5 for pair in train[0]):
        print0(
            f'warning: {config.data}: all {len(train[0])} pairs have "probability" 0.5, so none says which side is '
            'better and no preference is learned; bring labels, or leave "probability" out where "chosen" is better'
        )
    return *train, *val, hashes


def read_items(config, tok, context):
    """(train items, label_probs, validation items, label_probs, {source: SHA-256}): `read_pairs`
    without the text.

    label_probs, fp32 [n], are 1/2 or more: of a pair whose "probability" is less, the rejected side
    is the better one, and comes first.
    """
    pairs, items, val_pairs, val_items, hashes = read_pairs(config, tok, context)
    return *better_first(pairs, items), *better_first(val_pairs, val_items), hashes


def better_first(pairs, items):
    """(items, label_probs): the better side first, and the probability that it is better."""
    items = [item if pair.probability >= 0.5 else item[::-1] for pair, item in zip(pairs, items, strict=True)]
    return items, torch.tensor([max(pair.probability, 1 - pair.probability) for pair in pairs])


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
