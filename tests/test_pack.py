"""Packs: documents end to end, their targets, and how a batch is cut into packs and shared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from data.pack import (
    IGNORE,
    Chat,
    fill,
    make_completion,
    next_tokens,
    pack,
    pack_chats,
    rank_span,
    share_prompts,
    token_slices,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@quick
@given(LENGTHS)
def test_a_pack_is_its_documents_end_to_end(lengths):
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    for kind in (list, np.array, torch.tensor):
        p = pack([kind(d) for d in documents])
        assert (p.tokens.dtype, p.positions.dtype) == (torch.int64, torch.int64)
        assert p.cu_seqlens.dtype == torch.int32
        assert p.tokens.tolist() == [token for d in documents for token in d]
        assert p.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
        assert p.positions.tolist() == [i for n in lengths for i in range(n)]
        assert p.max_len == max(lengths)
    assert next_tokens(p, IGNORE).tolist() == [t for d in documents for t in [*d[1:], IGNORE]]
    last = torch.arange(len(lengths))
    assert next_tokens(p, last).tolist() == [t for i, d in enumerate(documents) for t in [*d[1:], i]]


@quick
@given(LENGTHS, st.integers(1, 120))
def test_slices_lose_nothing_and_fill_their_packs(lengths, limit):
    parts = [lengths[part] for part in token_slices(lengths, limit)]
    assert sum(parts, []) == lengths
    assert all(sum(part) <= limit or len(part) == 1 for part in parts)
    for part, following in zip(parts, parts[1:]):
        assert sum(part) + following[0] > limit  # the next document did not fit
    assert token_slices([], limit) == []


@quick
@given(LENGTHS, st.integers(1, 9))
def test_ranks_share_a_batch_evenly_and_completely(lengths, world):
    spans = [rank_span(lengths, rank, world) for rank in range(world)]
    assert [i for begin, end in spans for i in range(begin, end)] == list(range(len(lengths)))
    for begin, end in spans:
        assert abs(sum(lengths[begin:end]) - sum(lengths) / world) <= max(lengths)


def test_a_pack_of_chats_has_the_next_trained_token_as_target():
    draw = np.random.default_rng(4)
    chats = []
    for n in (1, 9, 2, 30):
        loss_mask = draw.random(n) < 0.5
        loss_mask[0] = False
        chats.append(Chat(draw.integers(0, 50, n).astype(np.int32), loss_mask))
    p, targets = pack_chats(chats)
    begin = 0
    for ids, loss_mask in chats:
        expected = [int(ids[t]) if loss_mask[t] else IGNORE for t in range(1, len(ids))]
        assert targets[begin : begin + len(ids)].tolist() == [*expected, IGNORE]
        begin += len(ids)
    assert begin == len(p.tokens)


def test_a_completion_is_trained_and_its_prompt_is_not():
    chat = make_completion([1, 2], [3, 4, 5])
    assert chat.ids.tolist() == [1, 2, 3, 4, 5] and chat.ids.dtype == np.int32
    assert chat.loss_mask.tolist() == [False, False, True, True, True]
    masked = make_completion([1, 2], [3, 4, 5], [True, False, True])
    assert masked.loss_mask.tolist() == [False, False, True, False, True]
    assert make_completion([1], []).loss_mask.tolist() == [False]


@pytest.mark.parametrize("tokens, documents", [(31, 9), (64, 4), (64, 5)])
def test_a_pack_that_cannot_be_filled_is_refused(tokens, documents):
    p = pack([range(n) for n in (5, 1, 17, 9)])
    with pytest.raises(ValueError, match="a pack of 32 tokens in 4 documents, the longest of 17"):
        fill(p, tokens, documents)


def test_filler_comes_last_and_is_no_target():
    p = pack([range(5), range(3)])
    filled = fill(p, 20, 6)
    assert filled.cu_seqlens.tolist() == [0, 5, 8, 13, 18, 20, 20] and filled.max_len == p.max_len
    assert torch.equal(filled.tokens[:8], p.tokens) and not filled.tokens[8:].any()
    assert next_tokens(filled, IGNORE).tolist() == [*next_tokens(p, IGNORE).tolist(), *[IGNORE] * 12]
    assert fill(p, 8, 2).cu_seqlens.tolist() == p.cu_seqlens.tolist()


def test_chats_of_one_prompt_share_its_tokens():
    prompts, lengths = ([7, 8, 9], [7, 8], [7, 8, 9], [7, 8, 9]), (2, 4, 1, 3)
    chats = [make_completion(prompt, range(n)) for prompt, n in zip(prompts, lengths)]
    whole, _ = pack_chats(chats)
    shared = share_prompts(whole, chats)
    assert shared.tokens.tolist() == [7, 8, 9, 0, 1, 7, 8, 0, 1, 2, 3, 0, 0, 1, 2]
    assert torch.equal(shared.tokens[shared.stored_row], whole.tokens)
    assert torch.equal(shared.positions[shared.stored_row], whole.positions)
    assert torch.equal(shared.stored_row[shared.first_copy], torch.arange(15))
    assert torch.equal(shared.cu_seqlens, whole.cu_seqlens) and shared.max_len == whole.max_len


def test_chats_that_share_no_prompt_are_packed_as_they_are():
    untrained = Chat(np.array([1, 2], dtype=np.int32), np.zeros(2, dtype=bool))
    for chats in ([make_completion([1, 2], [3]), make_completion([1, 3], [3])], [untrained, untrained]):
        p, _ = pack_chats(chats)
        assert share_prompts(p, chats) is p
