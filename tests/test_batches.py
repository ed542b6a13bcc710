"""The order of the data, which a resumed run finds again, and the micro-batches of a batch."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from test_corpus import EOT, STREAMS, quick, streams_of

from runtime import batches
from runtime.batches import index_order, micro_batches, text_order


@quick
@given(STREAMS, st.integers(1, 20), st.integers(1, 90), st.integers(0, 3))
def test_an_order_takes_every_piece_once_per_epoch_and_resumes_exactly(lengths, context, tokens, seed):
    streams = streams_of(lengths)
    order = text_order(streams, EOT, context, seed)
    taken, states = [], []
    while order.epoch < 2:
        states.append(order.state())
        taken.append(order.batch(tokens))
        sizes = taken[-1][:, 2] - taken[-1][:, 1]
        assert sizes.sum() <= tokens or len(sizes) == 1
    n = sum(len(s) - 1 for s in streams)
    predicted = np.concatenate([np.arange(a, b) + 10_000 * s for batch in taken for s, a, b in batch])
    for epoch in range(2):  # all of it, before any of it again
        assert len(set(predicted[epoch * n : (epoch + 1) * n].tolist())) == n
    for i in np.linspace(0, len(taken) - 1, 5).astype(int):
        again = text_order(streams, EOT, context, seed)
        again.load_state(states[i])
        assert np.array_equal(again.batch(tokens), taken[i])


@quick
@given(STREAMS, st.integers(1, 20), st.integers(1, 90), st.integers(1, 40))
def test_the_epochs_that_are_printed_are_those_of_the_walk(lengths, context, tokens, steps):
    streams = streams_of(lengths)
    order = text_order(streams, EOT, context, 0)
    printed = order.epochs_of(tokens, steps)
    assert order.state() == {"epoch": 0, "index": 0}
    for _ in range(steps):
        order.batch(tokens)
    assert printed == order.epoch + order.index / len(order.items)


def first_pieces(streams, seed, epoch):
    order = text_order(streams, EOT, 16, seed)
    order.load_state({"epoch": epoch, "index": 0})
    return order.items


def test_orders_differ_by_epoch_and_seed():
    streams = streams_of([[40] * 30])
    assert np.array_equal(first_pieces(streams, 0, 0), first_pieces(streams, 0, 0))
    assert not np.array_equal(first_pieces(streams, 0, 0), first_pieces(streams, 1, 0))
    assert not np.array_equal(first_pieces(streams, 0, 0), first_pieces(streams, 0, 1))
    cuts = {tuple(sorted(b - a for _, a, b in first_pieces(streams, 0, epoch)[:9])) for epoch in range(5)}
    assert len(cuts) > 1  # other epochs see other windows


def test_items_are_counted_one_by_one_or_by_their_tokens():
    assert [len(index_order(10, 0).batch(4)) for _ in range(3)] == [4, 4, 4]
    order = index_order(10, 3)
    taken = [order.batch(4) for _ in range(5)]
    assert [sorted(np.concatenate(taken)[i : i + 10]) for i in (0, 10)] == [list(range(10))] * 2  # over an epoch's end
    lengths = [5, 30, 5, 5, 5]
    order = index_order(5, 0, lengths)
    for _ in range(20):
        batch = order.batch(12)
        assert sum(lengths[i] for i in batch) <= 12 or len(batch) == 1


@pytest.mark.parametrize("n", [1, 7, 10, 999])
def test_the_first_items_are_those_that_a_run_of_so_many_will_see(n):
    order = index_order(10, 5)
    seen = np.sort(order.batch(min(n, 10)))
    assert np.array_equal(index_order(10, 5).first_items(n), seen)
    order.batch(3)
    assert np.array_equal(order.first_items(n), seen)  # wherever the order stands now


def test_a_place_beyond_the_end_is_the_next_epochs_beginning():
    order = text_order([np.array([256, 104, 105, 256])], 256, 8, 0)
    order.load_state({"epoch": 0, "index": 10**12})
    assert len(order.batch(8)) and order.epoch >= 1


@pytest.mark.parametrize("lengths", [[5, 1, 9, 2, 2, 7, 3, 3], [4], [1, 1, 50]])
def test_the_ranks_micro_batches_cover_a_batch_once(make_model, monkeypatch, lengths):
    model = make_model()
    for world in (1, 2, 3):
        covered = []
        for rank in range(world):
            monkeypatch.setattr(batches, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(batches, "world_size", lambda world=world: world)
            for part in micro_batches(model, lengths, 8):
                assert sum(lengths[part]) <= 8 or part.stop - part.start == 1
                covered += range(part.start, part.stop)
        assert covered == list(range(len(lengths)))


# --------------------------------------------------------------------------------------------------
# Epochs


@pytest.mark.parametrize("n, amount", [(57, 8), (95, 64), (3, 64), (64, 64), (1, 1)])
@pytest.mark.parametrize("lengths", [False, True])
def test_batches_of_an_epoch_have_each_row_once_and_the_plan_counts_them(n, amount, lengths):
    """Also where the last batch is partial, or one batch could hold several epochs."""
    lengths = np.random.default_rng(0).integers(1, amount + 2, n) if lengths else None
    order = index_order(n, 4, lengths)
    steps, epochs = order.plan(amount, 2)
    assert epochs == 2 and order.state() == {"epoch": 0, "index": 0}
    batches = [order.epoch_batch(amount) for _ in range(steps)]
    taken = np.concatenate(batches)
    assert [sorted(taken[:n]), sorted(taken[n:])] == [list(range(n))] * 2
    assert order.state() == {"epoch": 1, "index": n}
    for batch in batches:
        assert len(batch) == 1 or (len(batch) if lengths is None else lengths[batch].sum()) <= amount
    assert order.plan(amount, 1, steps) == (steps, 2)  # how often so many steps see each row


def test_a_plan_of_part_of_an_epoch_sees_that_part_and_no_batch_more():
    order = index_order(100, 0)
    assert order.plan(10, 0.25) == (3, 0.3) and order.plan(10, 0.2) == (2, 0.2)
    assert order.plan(10, 1.0, 4) == (4, 0.4)
    assert order.plan(30, 1.5) == (6, 1.6)  # 30, 30, 30, 10, 30, 30


def test_a_batch_of_an_epoch_resumes_exactly():
    order = index_order(50, 1, np.arange(50) % 7 + 1)
    for _ in range(25):
        state = order.state()
        expected = order.epoch_batch(20)
        again = index_order(50, 1, np.arange(50) % 7 + 1)
        again.load_state(state)
        assert np.array_equal(again.epoch_batch(20), expected)
