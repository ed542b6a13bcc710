"""The pack: a flat run of documents without padding, in which tokens pass through every stage.

    documents     [a b c] [d e]
    tokens        a b c d e
    positions     0 1 2 0 1
    cu_seqlens    0 3 5

Document d is tokens[cu_seqlens[d] : cu_seqlens[d + 1]].
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = -100  # the target of a token that no loss sees


@dataclasses.dataclass
class Pack:
    tokens: torch.Tensor  # int64 [N]
    positions: torch.Tensor  # int64 [N], from 0 in every document
    cu_seqlens: torch.Tensor  # int32 [D+1]
    max_len: int  # length of the longest document
    # If documents share prompts (share_prompts), only U <= N tokens are stored. The documents' N
    # tokens are tokens[stored_row], and token u is the document token first_copy[u].
    stored_row: torch.Tensor = None  # int64 [N]
    first_copy: torch.Tensor = None  # int64 [U]

    def to(self, device):
        """The same pack on another device."""
        tensors = self.tokens, self.positions, self.cu_seqlens, self.stored_row, self.first_copy
        tokens, positions, cu_seqlens, *shared = (None if x is None else to_device(x, device) for x in tensors)
        return Pack(tokens, positions, cu_seqlens, self.max_len, *shared)


def to_device(x, device):
    """A CPU tensor on another device. A GPU fetches it from pinned memory without a wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Chat(NamedTuple):
    """A conversation as tokens: one document of a pack."""

    ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]: the tokens that are trained, as targets


def pack(documents):
    """Lay documents end to end: sequences of token ids (lists, arrays or tensors) -> Pack.

    There must be at least one token in all.
    """
    lengths = np.array([len(d) for d in documents])
    cu_seqlens = np.append(0, lengths.cumsum())  # [D+1]
    tokens = np.concatenate([np.asarray(d, dtype=np.int64) for d in documents])  # [N]
    positions = np.arange(len(tokens)) - cu_seqlens[:-1].repeat(lengths)  # [N]
    return Pack(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        int(lengths.max()),
    )


def pack_chats(chats):
    """[Chat, ...] -> (pack, targets int64 [N]): the next token if it is trained, else IGNORE.

    The first token of a chat must not be trained: nothing comes before it to predict it from.
    """
    p = pack([c.ids for c in chats])
    loss_mask = torch.from_numpy(np.concatenate([c.loss_mask for c in chats]))  # [N]
    return p, next_tokens(p, IGNORE).masked_fill(~loss_mask.roll(-1), IGNORE)


def share_prompts(p, chats):
    """The pack of these chats with each prompt once, however many of them it begins: U <= N tokens.

    A prompt is what comes before the first token that is trained. All that a layer does to a single
    token is done once for the tokens of a prompt; attention sees the documents whole.
    """
    # source[i]: where the token i stands first. Of [p q a] and [p q b]: 0 1 2 0 1 5
    source, first_begin = np.arange(len(p.tokens)), {}  # {prompt: where it first begins}
    for chat, begin in zip(chats, p.cu_seqlens.tolist()):
        n = int(chat.loss_mask.argmax())
        first = first_begin.setdefault(chat.ids[:n].tobytes(), begin)
        source[begin : begin + n] = np.arange(first, first + n)
    # What is stored, 0 1 2 5, and the row of it that each token has: 0 1 2 0 1 3
    first_copy, stored_row = (torch.from_numpy(x) for x in np.unique(source, return_inverse=True))
    if len(first_copy) == len(stored_row):
        return p
    tokens, positions = p.tokens[first_copy], p.positions[first_copy]
    return Pack(tokens, positions, p.cu_seqlens, p.max_len, stored_row, first_copy)


def make_completion(prompt_ids, completion_ids, loss_mask=None):
    """The Chat of a prompt and a completion, of which only the completion is trained.

    loss_mask: bool per token of the completion; None: all of them.
    """
    ids = np.array([*prompt_ids, *completion_ids], dtype=np.int32)
    trained = np.arange(len(ids)) >= len(prompt_ids)
    if loss_mask is not None:
        trained[len(prompt_ids) :] = loss_mask
    return Chat(ids, trained)


def item_lengths(items):
    """The tokens of both sides of each item (Chat, Chat) together."""
    return [len(a.ids) + len(b.ids) for a, b in items]


def token_slices(lengths, limit):
    """Cut a run of documents into packs of at most `limit` tokens: lengths -> [slice, ...].

    A document longer than `limit` gets a pack of its own. Nothing is dropped here.
    """
    slices, begin, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > limit:
            slices.append(slice(begin, i))
            begin, tokens = i, 0
        tokens += length
    if len(lengths):
        slices.append(slice(begin, len(lengths)))
    return slices


def rank_span(lengths, rank, world):
    """(begin, end) of the documents that fall to one of `world` ranks, near-equal in tokens.

    A document goes to the rank in whose span its middle lies, so each has exactly one rank.
    """
    total = sum(lengths)
    middle = np.cumsum(lengths) - np.asarray(lengths) / 2
    begin, end = np.searchsorted(middle, [total * rank / world, total * (rank + 1) / world])
    return int(begin), int(end)


def fill(pack, tokens, documents):
    """Fill a pack at its end up to `tokens` tokens and `documents` documents.

    torch.compile and CUDA graphs want one shape every time. Filler is documents of token 0, none
    longer than the longest real one, then empty documents. It changes nothing for the real tokens
    and documents, which come first. No loss sees it: every filler token is at position 0, so
    `next_tokens` takes each for the last of a document. Pad other targets with IGNORE, and cut
    values and scores to the real ones. Raises ValueError if the pack is too large.
    """
    N, D = len(pack.tokens), len(pack.cu_seqlens) - 1
    ends = list(range(N, tokens, pack.max_len))[1:] + [tokens] if tokens > N else []
    empty = documents - D - len(ends)
    if tokens < N or empty < 0:
        raise ValueError(
            f"a pack of {N} tokens in {D} documents, the longest of {pack.max_len}, "
            f"cannot be filled up to {tokens} tokens in {documents} documents"
        )
    cu_seqlens = torch.cat([pack.cu_seqlens, pack.cu_seqlens.new_tensor(ends + [tokens] * empty)])
    padding = (0, tokens - N)
    return Pack(F.pad(pack.tokens, padding), F.pad(pack.positions, padding), cu_seqlens, pack.max_len)


def next_tokens(pack, last):
    """Targets of next-token prediction, int64 [N]: `last` at the last token of each document.

    last: an int, or int64 [D] with one for each document of a pack that is not filled.
    """
    targets = pack.tokens.roll(-1)
    if isinstance(last, int):
        return targets.masked_fill_(pack.positions.roll(-1) == 0, last)
    targets[pack.cu_seqlens[1:].long() - 1] = last  # no document of such a pack is empty
    return targets
