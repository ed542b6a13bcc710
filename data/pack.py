"""The pack: a flat run of documents, the one shape in which tokens go through every stage. No padding anywhere."""
import dataclasses

import numpy as np
import torch


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


def next_tokens(pack, last):
    """Targets of next-token prediction, int64 [N]: the token that follows; at each document's last token the given one.

    last: int, or int64 [D] with one for each document.
    """
    targets = torch.roll(pack.tokens, -1)
    targets[pack.cu[1:].long() - 1] = last  # documents in a pack are not empty
    return targets


def share(lengths, rank, world):
    """(first, last + 1): the run of documents that falls to one of `world` ranks, near-equal in tokens; together the ranks have each document once."""
    ends, total = np.cumsum(lengths), sum(lengths)
    middle = ends - np.asarray(lengths) / 2  # a document goes where its middle lies
    return tuple(int(i) for i in np.searchsorted(middle, [total * rank / world, total * (rank + 1) / world]))
