"""kernels/draw.py: the kernel by Triton's interpreter draws what the reference draws, in two passes
over the logits; and what is drawn is written down the same by both."""

import math
from collections import Counter

import pytest
import torch

from kernels import draw as drawing
from kernels.draw import draw, draw_reference, record_draw, record_draw_reference

pytest.importorskip("triton")


@pytest.fixture
def device(kernels_run, monkeypatch):
    monkeypatch.setattr(drawing, "BLOCK", 128)  # several blocks of a short row
    monkeypatch.setattr(drawing, "BINS", 8)  # and logits below the lowest bin; the interpreter is slow
    return kernels_run


def some(V, B=2, scale=3.0, seed=0):
    """(logits [B, V], u [B])."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(B, V, generator=generator), torch.rand(B, generator=generator)


def check(device, logits, u, *settings):
    """The kernel's draws are the reference's."""
    settings = [x.to(device) if isinstance(x, torch.Tensor) else x for x in settings]
    tokens, logp = draw(logits.to(device), u.to(device), *settings)
    expected, expected_logp = draw_reference(logits.to(device), u.to(device), *settings)
    assert tokens.dtype == torch.int64 and logp.dtype == torch.float32
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(logp, expected_logp, rtol=1e-5, atol=2e-6)
    return tokens, logp


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_draws_of_the_whole_distribution(device, V, temperature):
    logits, _ = some(V, B=6)
    check(device, logits, torch.tensor([0.0, 0.1, 0.5, 0.77, 0.9, 0.999]), temperature)


@pytest.mark.parametrize("settings", [(1e-30,), (1e-30, 5), (1e-9, 0, 0.9)])
def test_the_likeliest_of_negative_logits_is_drawn_at_the_lowest_temperatures(device, settings):
    logits, u = some(300)
    tokens, logp = check(device, logits - 20, u, *settings)
    assert tokens.tolist() == logits.argmax(-1).tolist() and logp.eq(0).all()


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (40, 1.0), (0, 0.9), (0, 0.0), (40, 0.8)])
def test_draws_of_a_cut_distribution(device, top_k, top_p):
    check(device, *some(200, B=1, seed=top_k), 0.8, top_k, top_p)


@pytest.mark.parametrize("scale", [1e-3, 60.0])
def test_cuts_of_flat_and_of_sharp_distributions(device, scale):
    # all logits in one level; most of them below the lowest bin
    check(device, *some(150, B=1, scale=scale, seed=1), 1.0, 100, 0.99)


@pytest.mark.parametrize("top_k", [3, 11, 25])
def test_levels_that_have_left_the_bins_count_no_more(device, top_k):
    """The second block's levels take the bins of the first one's, all eight."""
    levels = torch.cat([torch.arange(128) % 8, 8 + torch.arange(40) % 8]) + 0.9 * some(168, B=1)[0][0].sigmoid()
    check(device, (levels * math.log(2))[None], torch.tensor([0.7]), 1.0, top_k)


def test_every_row_has_its_own_settings(device):
    logits, u = some(130, B=4, seed=2)
    temperature, top_k = torch.tensor([[1.0], [0.0], [0.7], [1.5]]), torch.tensor([[130.0], [130.0], [5.0], [130.0]])
    top_p = torch.tensor([[0.9], [0.9], [math.inf], [math.inf]])
    tokens, logp = check(device, logits, u, temperature, top_k, top_p)
    assert tokens[1] == logits[1].argmax() and logp[1] == 0


def test_ids_of_probability_0_are_never_drawn(device):
    logits, _ = some(200, B=3)
    logits[:, :60], logits[:, 180:] = -math.inf, -math.inf
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    check(device, logits, u)
    check(device, logits[:1], u[:1], 1.0, 0, 0.9)


def test_tokens_as_likely_as_the_last_one_kept_are_kept(device):
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -2.0]])
    drawn = {int(draw(logits.to(device), torch.tensor([u], device=device), 1.0, 2, 1.0)[0]) for u in (0.1, 0.5, 0.9)}
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("zeros", [[0.0, -0.0, 0.0], [-0.0, 0.0, -0.0]])
def test_the_two_zeros_are_equally_likely(device, zeros, temperature):
    logits = torch.tensor([[-1.0, *zeros, -3.0]])
    settings = [torch.tensor([[x]]) for x in (temperature, 1.0, math.inf)]
    drawn = [int(check(device, logits, torch.tensor([u]), *settings)[0]) for u in (0.1, 0.5, 0.9)]
    assert drawn == ([1, 2, 3] if temperature else [1, 1, 1])


def test_nan_shows_in_the_log_probability(device):
    logits, u = some(130)
    logits[0, 3] = math.nan
    tokens, logp = draw(logits.to(device), u.to(device))
    assert logp[0].isnan() and logp[1].isfinite() and 0 <= tokens[0] < 130


@pytest.mark.parametrize("settings, most", [((0.9,), 1.3), ((0.9, 30, 0.9), 2.3)])
def test_the_logits_are_read_once_or_twice(device, settings, most, monkeypatch):
    if device.type == "cuda":
        pytest.skip("the interpreter counts")
    from triton.runtime.interpreter import InterpreterBuilder

    logits, u = some(500, B=1, seed=3)
    begin, read, load = logits.data_ptr(), Counter(), InterpreterBuilder.create_masked_load

    def counted(self, ptrs, mask, *rest):
        for address in ptrs.data[mask.data]:
            read[int(address)] += begin <= int(address) < begin + logits.nbytes
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    draw(logits, u, *settings)
    assert len([a for a in read if read[a]]) == 500  # every logit
    # a block of 128 is a quarter of this row: of 152k ids one of 8192 is a nineteenth
    assert sum(read.values()) <= most * 500


def rows(B=4, V=9, T=6):
    """What the sampler keeps: a dead row, one about to end by its limit, and others."""
    is_stop = torch.zeros(B, V, dtype=torch.bool)
    is_stop[:, 7] = True
    tokens, logprobs = torch.zeros(B, T + 1, dtype=torch.int64), torch.zeros(B, T + 1)
    drawn, left = torch.tensor([0, 2, 3, 1]), torch.tensor([5, 1, 0, 4])
    return [is_stop, tokens, logprobs, torch.zeros(B, dtype=torch.int64), drawn, left, torch.tensor([3, 5, 0, 2])]


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [3, 0]])
def test_what_is_drawn_is_written_down(device, slots):
    token, logp = torch.tensor([4, 2, 1, 7])[slots], -torch.rand(len(slots))
    kept, expected = [[x.to(device) for x in rows()] for _ in range(2)]
    given = token.to(device), logp.to(device), torch.tensor(slots, device=device)
    record_draw(*given, *kept)
    record_draw_reference(*given, *expected)
    dead = 2
    for x, y in zip(kept, expected):
        assert torch.equal(x, y) or (x[[0, 1, 3]] == y[[0, 1, 3]]).all(), dead
    _, tokens, logprobs, last, drawn, left, lengths = (x.cpu() for x in kept)
    assert tokens[0, 0] == 4 and logprobs[0, 0] == logp[slots.index(0)] and last[0] == 4
    assert (drawn[0], left[0], lengths[0]) == (1, 4, 3)
    assert (drawn[3], left[3] > 0, lengths[3]) == (2, False, 0)  # 7 is a stop token
    if 1 in slots:
        assert left[1] == 0 and lengths[1] == 0 and tokens[1, 2] == 2  # its limit
        assert tokens[2, :6].eq(0).all() and drawn[2] == 3 and left[2] <= 0  # dead: in the last column
