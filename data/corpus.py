"""What pretraining reads: token streams, cut into pieces, in an order that a resumed run finds again; and bits per byte.

A stream is `eot document eot document ... eot`. A piece [a, b) of it is trained on as tokens [a, b) predicting tokens [a+1, b+1): a document begins
with the eot before it, and the last thing it predicts is the eot after it. A document longer than the context is cut into windows. Every token is
predicted once an epoch; nothing is dropped and nothing padded.
"""
import math
from pathlib import Path

import numpy as np
import torch

from common import UserError, rank, reduce_sum, world_size
from data import prepare
from data.pack import pack, share, split
from data.read import read_jsonl, read_text
from kernels.head import linear_cross_entropy
from shard import keep_company


def read_documents(path):
    """The documents of a .jsonl file ({"text"} a line) or of any other file (its whole text). UserError names the file, the line and what is wrong."""
    if path.endswith(".jsonl"):
        rows = list(read_jsonl(path))
        for line, row in rows:
            if not isinstance(row.get("text"), str):
                raise UserError(f'{path}:{line}: no "text" string; pretraining reads {{"text": "..."}}')
        documents = [row["text"] for _, row in rows]
    else:
        documents = [read_text(path)]
    if not any(documents):
        raise UserError(f"{path}: there is no text in it")
    return documents


def hold_out(documents, fraction):
    """(train, val) documents: the last `fraction` of the documents, or of the characters where there is only one."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = min(len(documents) - 1, int(len(documents) * (1 - fraction)))
    return documents[:cut], documents[cut:]


def read_prepared(folder, tok):
    """(train streams, val streams) of a directory written by data/prepare.py, as memory maps. UserError where it is damaged or tokenized otherwise."""
    manifest = prepare.check(folder, tok)
    return tuple([np.memmap(Path(folder) / shard["file"], dtype=manifest["dtype"], mode="r") for shard in manifest["splits"][part]] for part in ("train", "val"))


def encode(tok, documents):
    """The stream of some documents: int32 array."""
    parts = [np.array([tok.eot, *tok.encode_ordinary(document)], dtype=np.int32) for document in documents]
    return np.concatenate([*parts, np.array([tok.eot], dtype=np.int32)])


def pieces(streams, eot, context, first=0):
    """Where to cut: int64 [P, 3] of (stream, begin, end), each piece within one document and at most `context` tokens long.

    first: length of the first window of a document longer than the context (0: a whole one), so that other epochs see other windows.
    """
    found = []
    for s, stream in enumerate(streams):
        ends = np.flatnonzero(stream == eot)
        begin, end = ends[:-1], ends[1:]
        head = np.where((end - begin > context) & (first > 0), first, 0)  # an extra, short first window
        windows = (head > 0) + -(-(end - begin - head) // context)  # per document
        document = np.repeat(np.arange(len(begin)), windows)
        number = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)  # of the window in its document
        a = begin[document] + np.where(number > 0, head[document] + (number - (head[document] > 0)) * context, 0)
        b = np.minimum(np.where((number == 0) & (head[document] > 0), begin[document] + head[document], a + context), end[document])
        found.append(np.stack([np.full(len(a), s), a, b], axis=1))
    return np.concatenate(found)


def some_pieces(streams, eot, context, tokens):
    """Pieces to evaluate on: all of them, or where they hold more than `tokens` tokens, a fixed random choice of about that many."""
    found = pieces(streams, eot, context)
    shuffled = np.random.default_rng(0).permutation(found)
    enough = np.searchsorted(np.cumsum(shuffled[:, 2] - shuffled[:, 1]), tokens) + 1
    return found if enough >= len(found) else shuffled[:enough]


class Order:
    """What is trained on, in order: every item once an epoch, shuffled anew each time. `epoch` and `index` are the whole state.

    deal(random) -> (items, lengths): the items of an epoch, an array with one in each row, and the tokens of each.
    """

    def __init__(self, deal, seed, epoch=0, index=0):
        self.deal, self.seed = deal, seed
        self.begin(epoch, index)

    def begin(self, epoch, index=0):
        random = np.random.default_rng([self.seed, epoch])
        items, lengths = self.deal(random)
        order = random.permutation(len(items))
        self.items, self.lengths, self.epoch, self.index = items[order], lengths[order], epoch, index

    def batch(self, tokens):
        """The next items [n, ...], as many as fit in `tokens` tokens (at least one)."""
        taken, total = [], 0
        while True:
            if self.index >= len(self.items):
                self.begin(self.epoch + 1)
            total += self.lengths[self.index]
            if taken and total > tokens:
                return np.stack(taken)
            taken.append(self.items[self.index])
            self.index += 1


def text_order(streams, eot, context, seed, epoch=0, index=0):
    """The Order of a corpus: its items are the pieces of all documents, cut elsewhere in every epoch."""

    def deal(random):
        cut = pieces(streams, eot, context, int(random.integers(1, context + 1)))
        return cut, cut[:, 2] - cut[:, 1]

    return Order(deal, seed, epoch, index)


def pack_pieces(streams, cut):
    """(pack, targets): pieces [n, 3] as one pack, and the int64 [N] tokens it is to predict."""
    targets = np.concatenate([streams[s][a + 1 : b + 1] for s, a, b in cut]).astype(np.int64)
    return pack([streams[s][a:b] for s, a, b in cut]), torch.from_numpy(targets)


@torch.no_grad()
def evaluate(model, streams, cut, sizes, micro_tokens):
    """(nats per token, bits per byte) of the model on the given pieces, which the ranks share. sizes: int64 [V], the bytes of each id (`token_bytes`)."""
    training, device = model.training, model.embed.device
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    lengths = (cut[:, 2] - cut[:, 1]).tolist()
    begin, end = share(lengths, rank(), world_size())
    for first, last in split(lengths[begin:end], micro_tokens):
        p, targets = pack_pieces(streams, cut[begin + first : begin + last])
        size += int(sizes[targets.numpy()].sum())
        tokens += len(targets)
        nats += linear_cross_entropy(model(p.to(device)), model.head, targets.to(device)).item()
    keep_company(model, lengths, micro_tokens)
    model.train(training)
    nats, tokens, size = reduce_sum(nats, tokens, size)
    return nats / tokens, nats / math.log(2) / max(1, size)
