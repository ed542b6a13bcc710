"""The pack: a flat run of documents, the one shape in which tokens go through every stage. No padding anywhere."""
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F


@dataclasses.dataclass
class Pack:
    tokens: torch.Tensor  # int64 [N]
    positions: torch.Tensor  # int64 [N], from 0 in every document
    cu: torch.Tensor  # int32 [D+1]: document d is tokens[cu[d]:cu[d+1]]
    max_len: int  # length of the longest document

    def to(self, device):
        """The same pack on another device."""
        return Pack(self.tokens.to(device), self.positions.to(device), self.cu.to(device), self.max_len)


def pack(documents):
    """Lay documents end to end: a sequence of sequences of token ids (lists, arrays or tensors) -> Pack. At least one token in all."""
    lengths = np.array([len(d) for d in documents])
    cu = np.concatenate([[0], lengths.cumsum()])
    tokens = np.concatenate([np.asarray(d, dtype=np.int64) for d in documents])
    positions = np.arange(len(tokens)) - cu[:-1].repeat(lengths)
    return Pack(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(cu.astype(np.int32)), int(lengths.max()))


def split(lengths, limit):
    """Cut a run of documents into packs of at most `limit` tokens: lengths -> [(first, last + 1), ...], in order, each at least one document.

    A document longer than `limit` gets a pack of its own: nothing is dropped here, whoever cannot afford it must not pass it in.
    """
    parts, begin, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > limit:
            parts.append((begin, i))
            begin, tokens = i, 0
        tokens += length
    return parts + [(begin, len(lengths))] if len(lengths) else parts


def fill(pack, tokens, documents):
    """The pack with `tokens` tokens and `documents` documents, for whoever needs one shape every time (torch.compile, CUDA graphs): filled up at its end.

    Filler is documents of token 0, none longer than the longest real one, and then empty documents. What a model makes of the first N tokens and D
    documents stays what it was. No loss sees filler, for next_tokens and so `logprobs` take each filler token, at position 0 like a document's first,
    for a document's last; targets from elsewhere are padded with IGNORE, values and scores cut to the real ones.
    """
    N, D = len(pack.tokens), len(pack.cu) - 1
    ends = list(range(N, tokens, pack.max_len))[1:] + [tokens] if tokens > N else []
    if tokens < N or D + len(ends) > documents:
        raise ValueError(f"a pack of {N} tokens in {D} documents, the longest of {pack.max_len}, cannot be filled up to {tokens} in {documents}")
    cu = F.pad(torch.cat([pack.cu, pack.cu.new_tensor(ends)]), (0, documents - D - len(ends)), value=tokens)
    return Pack(F.pad(pack.tokens, (0, tokens - N)), F.pad(pack.positions, (0, tokens - N)), cu, pack.max_len)


def next_tokens(pack, last):
    """Targets of next-token prediction, int64 [N]: the token that follows; at each document's last token, and at all of a filled pack's filler, `last`.

    last: int, or int64 [D] with one for each document of a pack that is not filled.
    """
    targets = torch.roll(pack.tokens, -1)
    if isinstance(last, int):
        return targets.masked_fill_(torch.roll(pack.positions, -1) == 0, last)
    targets[pack.cu[1:].long() - 1] = last  # documents in a pack are not empty
    return targets


def share(lengths, rank, world):
    """(first, last + 1): the run of documents that falls to one of `world` ranks, near-equal in tokens; together the ranks have each document once."""
    ends, total = np.cumsum(lengths), sum(lengths)
    middle = ends - np.asarray(lengths) / 2  # a document goes where its middle lies
    return tuple(int(i) for i in np.searchsorted(middle, [total * rank / world, total * (rank + 1) / world]))
