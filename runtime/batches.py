"""The order of the data, which a resumed run finds again, and micro-batches, which bound the
memory."""

import operator

import numpy as np
import torch

from data.corpus import epoch_pieces
from data.pack import pack, rank_span, token_slices
from runtime.process import rank, reduce_sum, world_size
from runtime.shard import is_sharded


class Order:
    """Every item once an epoch, in a new random order each time; `epoch` and `index` are the whole
    state.

    epoch_items(random) -> (items, lengths): the items of an epoch, one in each row, and what each
    counts."""

    def __init__(self, epoch_items, seed):
        self.epoch_items, self.seed = epoch_items, seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch, index=0):
        random = np.random.default_rng([self.seed, epoch])
        items, lengths = self.epoch_items(random)
        order = random.permutation(len(items))
        self.items, self.lengths = items[order], lengths[order]
        self.ends = np.cumsum(self.lengths)
        self.epoch, self.index = epoch, index

    def epoch_batch(self, amount):
        """The next items [n, ...], as many as fit in `amount` tokens or items (at least one); the
        last batch of an epoch has what is left."""
        if self.index >= len(self.items):
            self.begin_epoch(self.epoch + 1)
        return self.take(amount, least=1)

    def take(self, amount, least):
        """The next items of this epoch that fit in `amount`, at least so many."""
        begin = self.index
        limit = self.ends[begin] - self.lengths[begin] + amount
        self.index = max(begin + least, int(np.searchsorted(self.ends, limit, side="right")))
        return self.items[begin : self.index]

    def plan(self, amount, epochs, steps=0):
        """(steps, epochs): how many batches of an epoch see every item `epochs` times; or how often
        `steps` of them do."""
        (epoch, index), n = (self.epoch, self.index), 0
        if epoch:
            self.begin_epoch(0)
        self.index = 0
        while n < steps or (not steps and self.epoch + self.index / len(self.items) < epochs):
            self.epoch_batch(amount)
            n += 1
        seen = self.epoch + self.index / len(self.items)
        if self.epoch != epoch:
            self.begin_epoch(epoch)
        self.index = index
        return n, seen

    def batch(self, amount):
        """The next items [n, ...], as many as fit in `amount` tokens or items (at least one),
        across the end of an epoch."""
        taken = []
        while True:
            if self.index >= len(self.items):
                self.begin_epoch(self.epoch + 1)
            begin = self.index
            taken.append(self.take(amount, least=0 if taken else 1))
            amount -= self.lengths[begin : self.index].sum()
            if self.index < len(self.items):
                return np.concatenate(taken)

    def epochs_of(self, amount, steps):
        """How many epochs `steps` of `batch` see, from the start."""
        walk = Order(self.epoch_items, self.seed)
        for _ in range(steps):
            walk.batch(amount)
        return walk.epoch + walk.index / len(walk.items)

    def first_items(self, n):
        """The indices, sorted, that the first n items of an index_order have."""
        if n >= len(self.items):
            return np.arange(len(self.items))
        items = Order(self.epoch_items, self.seed)
        return np.unique(np.concatenate([items.batch(1) for _ in range(n)]))

    def state(self):
        return {"epoch": self.epoch, "index": self.index}

    def load_state(self, state):
        """Raises TypeError or ValueError if `state` is not a place in the data."""
        epoch, index = operator.index(state["epoch"]), operator.index(state["index"])
        if min(epoch, index) < 0:
            raise ValueError(f"epoch {epoch}, item {index} is no place in the data")
        self.begin_epoch(epoch, index)


def index_order(n, seed, lengths=None):
    """An Order of the indices 0 to n - 1. lengths: the tokens of each; None counts each as one."""
    lengths = np.ones(n) if lengths is None else np.asarray(lengths)
    return Order(lambda random: (np.arange(n), lengths), seed)


def text_order(streams, eot, context, seed):
    """An Order of the pieces of a corpus, cut at other places in every epoch."""
    return Order(lambda random: epoch_pieces(streams, eot, context, random), seed)


def minibatches(completions, n, step, config):
    """Yield (this rank's completions, trained tokens, number of completions) of each optimizer step
    of PPO and GRPO: --epochs times all of them, shuffled, in --minibatches parts.

    completions: those of this rank that are trained, of `n` on all ranks. The tokens and
    completions counted are of all ranks."""
    by_index = {c.index: c for c in completions}
    lengths = np.zeros(n)
    for c in completions:
        lengths[c.index] = c.n_tokens
    lengths = np.array(reduce_sum(*lengths))
    trained = np.flatnonzero(lengths)
    for epoch in range(config.epochs):
        parts = [trained]  # not shuffled: the very packs whose log-probabilities have been read
        if config.minibatches > 1:
            shuffled = np.random.default_rng([config.seed, step, epoch]).permutation(trained)
            parts = np.array_split(shuffled, config.minibatches)
        for part in parts:
            if len(part):
                yield [by_index[i] for i in part if i in by_index], lengths[part].sum(), len(part)


def micro_batches(model, lengths, micro_batch_tokens):
    """Yield this rank's part of a batch as slices of at most `micro_batch_tokens` tokens.

    lengths: the tokens of all documents of the batch, on all ranks. A sharded model gathers its
    weights from all ranks at every pass: a rank that has fewer micro-batches than another runs
    dummy ones at the end."""
    begin, end = rank_span(lengths, rank(), world_size())
    for part in token_slices(lengths[begin:end], micro_batch_tokens):
        yield slice(begin + part.start, begin + part.stop)
    if is_sharded(model):
        run_dummy_micro_batches(model, lengths, micro_batch_tokens)


def run_dummy_micro_batches(model, lengths, micro_batch_tokens):
    """Run a sharded model on one token until this rank has run it as often as the busiest rank.

    With gradients enabled the backward runs as well; it adds 0.
    """
    counts = []
    for r in range(world_size()):
        begin, end = rank_span(lengths, r, world_size())
        counts.append(len(token_slices(lengths[begin:end], micro_batch_tokens)))
    for _ in range(max(counts) - counts[rank()]):
        hidden = model(pack([[0]]).to(model.embed.device))
        if torch.is_grad_enabled():
            ((hidden.sum() + model.head.sum()) * 0).backward()
