"""The kernels of attention and decoding, forward and every gradient, against plain formulas in fp64
written here, and the whole model on all kernels.

The rule is flash-attention's, with the RMS of flash-linear-attention: no error above twice that of
PyTorch's own ops in the same dtype, and in the mean below RMS of the truth. The kernels run on the
GPU, or by the interpreter, in smaller blocks unless the table of sizes is what is tested.
"""

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from data.pack import Pack, fill, next_tokens, pack
from kernels import _lib, attention, decode, proof
from kernels.attention import attention_reference, batches, layout, tiles
from kernels.decode import (
    append_rope,
    append_rope_reference,
    count_splits,
    decode_attention,
    decode_attention_reference,
)
from kernels.head import IGNORE, linear_cross_entropy
from kernels.proof import excess, with_gradients
from model import GPT, KVCache, logprobs
from optim import Optimizer

# The interpreter's, of numbers that a mask then hides
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
RMS = {torch.float32: 0.005, torch.float16: 0.01, torch.bfloat16: 0.01}
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 and 32 rows, in every combination over the three kernels."""
    monkeypatch.setattr(attention, "TILE", 32)
    sizes = ((32, 16, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2))
    monkeypatch.setattr(attention, "BLOCKS", dict.fromkeys(attention.BLOCKS, sizes))
    monkeypatch.setattr(attention, "BLOCKS_FP32", ((16, 32, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)))
    monkeypatch.setattr(decode, "BLOCK", {2: (16, 4, 2), 4: (16, 4, 1)})


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(q, k, v, lengths, window=0):
    """softmax(q k^T / sqrt(Dh)) v with a mask, one document at a time."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    parts = []
    for a, n in zip(boundaries(lengths).tolist(), lengths, strict=False):
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        seen = (distance >= 0) & (distance < (window or n))
        scores = torch.einsum("qhd,khd->hqk", q[a : a + n], k[a : a + n]) / math.sqrt(q.shape[2])
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", p, v[a : a + n]))
    return torch.cat(parts)


def attend(q, k, v, cu_seqlens, window=0):
    """The op as a model calls it."""
    return attention.attention(q, k, v, layout(cu_seqlens, q, q.shape[2]), window)


def judge(found, own, truth, dtype, names):
    """The rule, for each of several results."""
    for f, o, t, name in zip(found, own, truth, names, strict=True):
        assert f.dtype == dtype and excess(f, o, t, FLOOR[dtype]) <= 1, (name, excess(f, o, t, FLOOR[dtype]))
        rms = (f.double() - t).norm() / math.sqrt(f.numel())
        assert rms <= RMS[dtype] * t.norm() / math.sqrt(f.numel()) + FLOOR[dtype], (name, rms.item())


def check(device, lengths, heads, kv_heads, head_dim, dtype, window=0):
    """Kernels against the formula, for parts of one fused tensor."""
    cu_seqlens, rows = boundaries(lengths).to(device), [heads, kv_heads, kv_heads]
    qkv = normal(len(lengths), sum(lengths), sum(rows), head_dim).to(device, dtype)
    assert all(attention.heads_together(x) is x for x in qkv.split(rows, dim=1))  # nothing is copied
    assert isinstance(layout(cu_seqlens, qkv, head_dim), attention.Tiles)

    def kernels(qkv):
        return attend(*qkv.split(rows, dim=1), cu_seqlens, window)

    def reference(qkv):
        return attention_reference(*qkv.split(rows, dim=1), batches(cu_seqlens), window)

    def plain(qkv):
        return formula(*qkv.split(rows, dim=1), lengths, window)

    found, own, truth = (
        [out, *grad.split(rows, dim=1)]
        for out, grad in (
            with_gradients(kernels, [qkv]),
            with_gradients(reference, [qkv]),
            with_gradients(plain, [qkv.double()]),
        )
    )
    judge(found, own, truth, dtype, ["out", "dq", "dk", "dv"])


# --------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize(
    "lengths, heads, kv_heads, head_dim, dtype",
    [
        ([1], 2, 2, 32, torch.bfloat16),
        ([1] * 6, 3, 1, 64, torch.float32),
        ([15, 16, 17, 31, 32, 33], 2, 1, 32, torch.float32),  # one off a block
        ([15, 16, 17, 33], 4, 2, 32, torch.bfloat16),
        ([0, 5, 0, 0, 40, 0], 4, 1, 32, torch.float16),
        ([0, 5, 0, 0, 40, 0], 2, 2, 32, torch.float32),
        ([7, 61, 3], 3, 1, 128, torch.bfloat16),
    ],
)
def test_attention(lengths, heads, kv_heads, head_dim, dtype, small, kernels_run):
    check(kernels_run, lengths, heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize(
    "window, dtype", [(1, torch.float32), (9, torch.bfloat16), (18, torch.float32), (1000, torch.bfloat16)]
)
def test_windows(window, dtype, small, kernels_run):
    check(kernels_run, [34, 1, 50], 2, 1, 32, dtype, window)


def test_rows_without_a_key_in_a_block_bear_fused_arithmetic(small, kernels_run, monkeypatch):
    """On a GPU s * SCALE - m is one operation, which leaves the rounding of a masked score's
    product where both are the same: here the interpreter leaves it, too."""
    if kernels_run.type == "cuda":
        pytest.skip("the GPU does it itself: test_windows")
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def subtract(a, b):
        left = np.subtract(a, b)
        return np.where((left == 0) & (np.abs(a) > 1e25), 1e21, left).astype(left.dtype)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_fsub", lambda self, a, b: self.binary_op(a, b, subtract)
    )
    check(kernels_run, [150, 41], 2, 1, 64, torch.float32, window=20)
    check(kernels_run, [150, 41], 2, 1, 64, torch.bfloat16, window=20)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_sizes_of_the_table(head_dim, kernels_run):
    check(kernels_run, [1, 129, 0, 128], 2, 1, head_dim, torch.bfloat16)


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e3), (torch.bfloat16, 1e2), (torch.float16, 1e2)])
def test_huge_scores(dtype, scale, small, kernels_run):
    """The softmax becomes a choice; nothing overflows, and an output is still a mean of values."""
    q, k, v = (scale * normal(1, 60, 3, 32)).to(kernels_run, dtype).split([1, 1, 1], dim=1)
    cu_seqlens = boundaries([40, 20]).to(kernels_run)
    out, *grads = with_gradients(lambda *x: attend(*x, cu_seqlens), [q, k, v])
    assert all(x.isfinite().all() for x in (out, *grads)) and out.abs().max() <= v.abs().max()


def test_every_entry_is_written_and_three_runs_are_equal(small, kernels_run, monkeypatch):
    """Poison in the memory that the launches allocate would show; and no sum depends on which
    program comes first."""
    q, k, v = normal(2, 37, 4, 32).to(kernels_run, torch.bfloat16).split([2, 1, 1], dim=1)
    cu_seqlens = boundaries([0, 18, 1, 18]).to(kernels_run)

    def run():
        return with_gradients(lambda *x: attend(*x, cu_seqlens), [q, k, v])

    def poisoned(make):
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(7)

    first = run()
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for _ in range(2):
        assert all(map(torch.equal, first, run()))


def test_a_document_never_notices_its_neighbours(small, kernels_run):
    """Packed is alone, bit for bit, even next to a document of inf and nan."""
    lengths = [33, 20, 17]
    parts = normal(3, 70, 4, 32).to(kernels_run, torch.bfloat16).split([2, 1, 1], dim=1)
    inputs = [x.contiguous() for x in parts]
    upstream = normal(4, 70, 2, 32).to(inputs[0])

    def run(inputs, upstream, lengths):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, boundaries(lengths).to(kernels_run))
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    for x, value in zip(inputs, (torch.inf, torch.nan, torch.inf), strict=True):
        x[33:53] = value
    packed = run(inputs, upstream, lengths)
    for here in (slice(0, 33), slice(53, 70)):
        alone = run([x[here] for x in inputs], upstream[here], [here.stop - here.start])
        assert all(torch.equal(a, p[here]) and a.isfinite().all() for a, p in zip(alone, packed, strict=True))


def test_strange_strides_and_gradients(small, kernels_run):
    """Heads that do not lie together, an upstream gradient that is one number expanded, and one of
    zeros."""
    lengths, shapes = [20, 15], [(4, 35, 32), (2, 35, 32), (2, 35, 32)]
    inputs = [normal(i, *shape).to(kernels_run).transpose(0, 1) for i, shape in enumerate(shapes)]
    cu_seqlens = boundaries(lengths).to(kernels_run)

    def gradients(f, inputs, scale=None):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = f(*leaves)
        return torch.autograd.grad(out.sum() if scale is None else (out * scale).sum(), leaves)

    def kernels(*x):
        return attend(*x, cu_seqlens)

    own = gradients(lambda *x: attention_reference(*x, batches(cu_seqlens)), inputs)
    truth = gradients(lambda *x: formula(*x, lengths), [x.double() for x in inputs])
    judge(gradients(kernels, inputs), own, truth, torch.float32, ["dq", "dk", "dv"])
    assert all(g.eq(0).all() for g in gradients(kernels, inputs, 0.0))


@pytest.mark.parametrize("lengths", [[1], [5, 1, 17, 0, 64, 2, 9], [0, 0, 7], [1] * 50, [200, 90, 301], [128] * 3])
def test_tiles_hold_every_token_once_most_work_first(lengths):
    cu_seqlens, rows, size = boundaries(lengths).tolist(), sum(lengths), attention.TILE
    found = tiles(boundaries(lengths), rows)
    for name, table in zip(("queries", "keys"), found, strict=True):
        assert table.shape == (rows // size + len(lengths), 3) and table.dtype == torch.int32
        used = [tuple(row) for row in table.tolist() if row[2] > 0]
        expected = [(first, a, b) for a, b in itertools.pairwise(cu_seqlens) for first in range(a, b, size)]
        assert sorted(used) == expected
        work = [first - a if name == "queries" else b - first for first, a, b in used]
        assert work == sorted(work, reverse=True)
        assert all(row == [0, 0, 0] for row in table.tolist() if row[2] == 0)


def test_which_path_runs(kernels_run, monkeypatch):
    cu_seqlens, x = boundaries([3, 4]).to(kernels_run), torch.zeros(7, 8, device=kernels_run)
    assert isinstance(layout(cu_seqlens, x, 64), attention.Tiles)
    assert not isinstance(layout(cu_seqlens, x, 16), attention.Tiles)
    assert not isinstance(layout(cu_seqlens, x.double(), 64), attention.Tiles)
    monkeypatch.setattr(_lib, "OFF", {"attention"})
    assert not isinstance(layout(cu_seqlens, x, 64), attention.Tiles)


def test_windows_of_the_reference():
    for window, lengths in itertools.product((1, 4, 50), ([9, 9], [5, 1, 17, 30])):
        q, k, v = normal(0, sum(lengths), 4, 8).double().split([2, 1, 1], dim=1)
        found = attention_reference(q, k, v, batches(boundaries(lengths)), window)
        torch.testing.assert_close(found, formula(q, k, v, lengths, window), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Decoding


def decode_formula(q, k_cache, v_cache, lengths, window):
    """The last token of each sequence, by a masked softmax over its row of the cache."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[2], dim=2) for x in (k_cache, v_cache))
    key = torch.arange(k.shape[1], device=q.device)
    seen = (key < lengths[:, None]) & (key >= lengths[:, None] - (window or k.shape[1]))  # [B, S]
    scores = torch.einsum("bhd,bshd->bhs", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("bhs,bshd->bhd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, splits, window, dtype",
    [
        (2, 2, 64, 1, 0, torch.float32),
        (6, 1, 128, 3, 0, torch.bfloat16),
        (3, 1, 32, 1, 1, torch.bfloat16),
        (4, 2, 64, 3, 16, torch.float32),
        (6, 1, 32, 12, 37, torch.bfloat16),
        (6, 3, 32, 6, 64, torch.float32),
        (3, 1, 64, 2, 500, torch.bfloat16),
    ],
)
def test_decode_attention(heads, kv_heads, head_dim, splits, window, dtype, small, kernels_run, monkeypatch):
    """Random lengths, more splits than some of them have blocks, nan at every token unseen."""
    monkeypatch.setattr(decode, "count_splits", lambda *_: splits)
    some = torch.randint(2, 120, (2,), generator=torch.Generator().manual_seed(splits)).tolist()
    lengths = torch.tensor([1, *some, window or 64, 120], device=kernels_run).clamp(max=120)
    q = normal(0, 5, heads, head_dim).to(kernels_run, dtype)
    k, v = normal(1, 2, 5, kv_heads, 120, head_dim).to(kernels_run, dtype).transpose(2, 3)  # as in a KVCache
    own = decode_attention_reference(q, k, v, lengths, window)
    truth = decode_formula(q.double(), k.double(), v.double(), lengths, window)
    key = torch.arange(120, device=kernels_run)
    unseen = (key >= lengths[:, None]) | (key < lengths[:, None] - (window or 120))
    for x in (k, v):
        x[unseen] = torch.nan
    found = decode_attention(q, k, v, lengths, window)
    judge([found], [own], [truth], dtype, ["out"])
    if splits == 3:
        assert torch.equal(found, decode_attention(q, k, v, lengths, window))


@pytest.mark.parametrize("window", [0, 5, 16, 100])
def test_decoding_token_by_token_is_attention(window, small, kernels_run, monkeypatch):
    """One slot per token of a pack: its cache holds its document, of which it has seen its part."""
    monkeypatch.setattr(decode, "count_splits", lambda *_: 2)
    document_lengths = [3, 21, 1]
    q, k, v = normal(7, 25, 4, 32).to(kernels_run).split([2, 1, 1], dim=1)
    cu_seqlens = boundaries(document_lengths).to(kernels_run)
    document = torch.tensor([0] * 3 + [1] * 21 + [2], device=kernels_run)
    caches = []
    for x in (k, v):
        padded = [F.pad(part, (0, 0, 0, 0, 0, 21 - len(part))) for part in x.split(document_lengths)]
        caches.append(torch.stack(padded)[document])  # [25, 21, 1, 32]
    lengths = torch.arange(25, device=kernels_run) - cu_seqlens[document] + 1
    found = decode_attention(q, *caches, lengths, window)
    torch.testing.assert_close(found, attend(q, k, v, cu_seqlens, window), rtol=0, atol=2e-6)
    found = decode_attention_reference(q, *caches, lengths, window)
    expected = attention_reference(q, k, v, batches(cu_seqlens), window)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_splits_cover_the_window_alone(kernels_run, monkeypatch):
    counted = []
    monkeypatch.setattr(decode, "count_splits", lambda length, *_: counted.append(length) or 1)
    q, cache = torch.zeros(1, 2, 32, device=kernels_run), torch.zeros(1, 300, 1, 32, device=kernels_run)
    for window in (0, 7, 300, 1000):
        decode_attention(q, cache, cache, torch.tensor([300], device=kernels_run), window)
    assert counted == [300, 7, 300, 300]


def test_the_count_of_splits():
    assert count_splits(4096, 128, 64, 132) == 1  # the GPU is full as it is
    assert count_splits(256, 1, 64, 132) == 1  # four blocks are not worth it
    assert count_splits(8192, 1, 64, 132) == 32  # nothing fills the GPU: as many as there may be
    assert count_splits(8192, 8, 64, 132) == 15  # 120 of 132 places, in one wave
    assert count_splits(2048, 60, 64, 132) == 2  # 120 of 132 again


def append_formula(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    """What append_rope leaves, as (q, k_cache, v_cache), the rotation by complex numbers."""
    k_cache, v_cache, kv_heads = k_cache.clone(), v_cache.clone(), k_cache.shape[2]
    rotation = torch.complex(cos, sin)[:, None]

    def make(x, weight):
        if weight is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
        z = torch.complex(*x.chunk(2, dim=-1)) * rotation
        return torch.cat([z.real, z.imag], dim=-1)

    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    for b, n in enumerate(lengths.tolist()):
        k_cache[b, n], v_cache[b, n] = make(k, k_weight)[b], v[b]
    return make(q, q_weight), k_cache, v_cache


def to_double(x):
    return None if x is None else x.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 32), (12, 2, 64), (3, 1, 128)])
def test_append_rope(heads, kv_heads, head_dim, norm, dtype, kernels_run):
    B, S = 3, 9
    qkv = normal(0, B, heads + 2 * kv_heads, head_dim).to(kernels_run, dtype)
    caches = normal(1, 2, B, kv_heads, S, head_dim).to(kernels_run, dtype).transpose(2, 3)  # as in a KVCache
    weights = list(normal(5, 2, head_dim).to(kernels_run)) if norm else [None, None]
    angle = 6 * normal(6, B, head_dim // 2).to(kernels_run)
    rotation = [angle.cos(), angle.sin()]
    lengths = torch.tensor([0, S - 1, 4], device=kernels_run)
    double = map(to_double, [qkv, *weights, *rotation])
    truth = append_formula(*double, heads, 1e-6, *map(to_double, caches), lengths)
    results = []
    for op in (append_rope, append_rope_reference):
        k_cache, v_cache = (x.clone() for x in caches)
        results.append((op(qkv, *weights, *rotation, heads, 1e-6, k_cache, v_cache, lengths), k_cache, v_cache))
    judge(*results, truth, dtype, ["q", "k_cache", "v_cache"])
    for new, old in zip(results[0][1:], caches, strict=True):  # no other row
        changed = (new != old).flatten(2).any(-1)
        assert changed.nonzero().tolist() == [[b, n] for b, n in enumerate(lengths.tolist())]


def test_a_full_slot_is_left_alone(kernels_run):
    caches = [normal(i, 2, 4, 1, 32).to(kernels_run) for i in range(2)]
    before, angle = [x.clone() for x in caches], normal(2, 2, 16).to(kernels_run)
    qkv, lengths = normal(3, 2, 4, 32).to(kernels_run), torch.tensor([4, 1], device=kernels_run)
    append_rope(qkv, None, None, angle, angle, 2, 1e-6, *caches, lengths)
    for new, old in zip(caches, before, strict=True):
        assert torch.equal(new[0], old[0]) and not torch.equal(new[1, 1], old[1, 1])


# --------------------------------------------------------------------------------------------------
# What PyTorch is told of them


def test_opcheck(small, kernels_run):
    parts = normal(0, 5, 4, 32).to(kernels_run).split([2, 1, 1], dim=1)
    q, k, v = (x.contiguous() for x in parts)
    table, ops = tiles(boundaries([2, 3]).to(kernels_run), 5), torch.ops.feinschliff
    torch.library.opcheck(ops.attention.default, (q, k, v, table.queries, 0))
    out, lse = ops.attention(q, k, v, table.queries, 3)
    torch.library.opcheck(ops.attention_backward.default, (q, q, k, v, out, lse, *table, 3))
    caches = [normal(i, 5, 4, 1, 32).to(kernels_run) for i in range(2)]
    lengths, angle = torch.full((5,), 2, device=kernels_run), normal(2, 5, 16).to(kernels_run)
    torch.library.opcheck(ops.decode_attention.default, (q, *caches, lengths, 2))
    for weight in (normal(3, 32).to(kernels_run), None):
        qkv = normal(4, 5, 4, 32).to(kernels_run)
        args = (qkv, weight, weight, angle, angle, 2, 1e-6, *caches, lengths)
        torch.library.opcheck(ops.append_rope.default, args)


def test_compiled_is_eager(small, kernels_run):
    qkv = normal(0, 20, 4, 32).to(kernels_run)

    def op(x, cu_seqlens):
        return attend(*x.split([2, 1, 1], dim=1), cu_seqlens)

    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)

    def equal(lengths):
        cu_seqlens = boundaries(lengths).to(kernels_run)
        eager = with_gradients(lambda x: op(x, cu_seqlens), [qkv])
        return all(map(torch.equal, eager, with_gradients(lambda x: compiled(x, cu_seqlens), [qkv])))

    assert equal([9, 1, 10])
    with torch.compiler.set_stance("fail_on_recompile"):  # other documents, the same graph
        assert equal([5, 5, 10])


SHAPE = dict(width=64, heads=2, kv_heads=1, head_dim=32)
WINDOWS = dict(window=7, window_every=2)


def documents(*lengths):
    generator = torch.Generator().manual_seed(0)
    return pack([torch.randint(61, (n,), generator=generator) for n in lengths])


def test_a_pass_and_a_step_never_wait_for_the_gpu(make_model, kernels_run):
    """Fake tensors have no numbers: code that looked at one, to decide or to size something, would
    fail."""
    model = make_model(**SHAPE, **WINDOWS).to(kernels_run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = torch.zeros(2, 24, dtype=torch.int64, device=kernels_run)
        cu_seqlens = torch.zeros(4, dtype=torch.int32, device=kernels_run)
        slots = torch.zeros(3, dtype=torch.int64, device=kernels_run)
        p, cache = Pack(tokens[0], tokens[1], cu_seqlens, 24), KVCache(model, 3, 30)
        logprobs(model, p).sum().backward()
        with torch.no_grad():
            model(p, cache, slots)
        assert model.step(slots, cache).shape == (3, 64)


# --------------------------------------------------------------------------------------------------
# The whole model


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, dict(qk_norm=False, qkv_bias=True)),  # Qwen2
        (torch.bfloat16, {}),
        (torch.float32, WINDOWS),
    ],
)
def test_the_model_on_kernels_is_the_model_on_references(dtype, options, make_model, small, kernels_run, monkeypatch):
    """log-probabilities and gradients within 1e-5 of the largest (bf16: 2 % in the mean)."""
    monkeypatch.setattr(GPT, "compute_dtype", dtype)
    model = make_model(noise=0.1, **SHAPE, **options).to(kernels_run)
    p, found = documents(33, 1).to(kernels_run), []
    for mode in (_lib.MODE, "0"):
        monkeypatch.setattr(_lib, "MODE", mode)
        logp = logprobs(model, p)
        found.append([logp.detach(), *torch.autograd.grad(logp.sum(), [*model.parameters()])])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.norm()


def test_the_model_compiles_as_one_graph(make_model, small, kernels_run):
    model, p = make_model(noise=0.1, **SHAPE).to(kernels_run), documents(7, 1, 9).to(kernels_run)
    eager = model(p)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(p), eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, WINDOWS])
def test_cached_decoding_is_the_full_pass(options, make_model, small, kernels_run, monkeypatch):
    monkeypatch.setattr(GPT, "compute_dtype", torch.float32)
    model, p = make_model(noise=0.1, **SHAPE, **options).to(kernels_run), documents(20, 9).to(kernels_run)
    with torch.no_grad():
        full, cache = model(p), KVCache(model, 2, 25)
        start = documents(17, 6).to(kernels_run)
        start.tokens = torch.cat([p.tokens[:17], p.tokens[20:26]])
        model(start, cache, torch.tensor([1, 0], device=kernels_run))  # document 0 in slot 1
        for t in range(3):
            hidden = model.step(torch.stack([p.tokens[26 + t], p.tokens[17 + t]]), cache)
            torch.testing.assert_close(hidden, torch.stack([full[26 + t], full[17 + t]]), rtol=0, atol=2e-5)


def test_steps_of_training(make_model, small, kernels_run, monkeypatch):
    """Losses on kernels stay within 1e-3 of those on references (fp32): sums in another order, six
    times through the optimizer."""
    monkeypatch.setattr(GPT, "compute_dtype", torch.float32)
    p, losses = documents(17, 7).to(kernels_run), {}
    for mode in (_lib.MODE, "0"):
        monkeypatch.setattr(_lib, "MODE", mode)
        model = make_model(noise=0.0, layers=1, **SHAPE).to(kernels_run)
        optimizer = Optimizer(model, 0.01, matrix_lr=0.02, embed_lr=0.1, muon_dtype="fp32")
        losses[mode] = []
        for _ in range(6):
            loss = linear_cross_entropy(model(p), model.head, next_tokens(p, IGNORE)) / 22
            loss.backward()
            optimizer.step(1.0)
            losses[mode].append(loss.item())
    found, expected = losses.values()
    assert expected[-1] < expected[0] - 1
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-3, (found, expected)


# --------------------------------------------------------------------------------------------------
# The proof


def prove_one_head_size(device, monkeypatch):
    """On a GPU the proof compares all sizes of heads; the interpreter would take a minute."""
    if device.type != "cuda":
        for module in (attention, decode):
            monkeypatch.setattr(module, "PROOF_HEADS", [(64, 3, 70)])


@pytest.mark.parametrize("op", ["attention", "rope_attention", "decode_attention", "append_rope"])
def test_every_op_proves_itself(op, kernels_run, monkeypatch):
    prove_one_head_size(kernels_run, monkeypatch)
    assert proof.prove_op(op, kernels_run) == ""


@pytest.mark.parametrize(
    "op, module, launch, scale",
    [
        ("attention", attention, "attention_backward", [1.05]),
        ("decode_attention", decode, "decode_kernels", [1.05]),
    ],
)
def test_a_kernel_with_a_bug_is_switched_off(op, module, launch, scale, kernels_run, monkeypatch, capsys, tmp_path):
    """The proof sees it, says so, remembers it, and the reference runs."""
    for other in ("draw", "kl"):
        importlib.import_module(f"kernels.{other}")  # or prove() would, and they would add their proofs to PROOFS below
    prove_one_head_size(kernels_run, monkeypatch)
    right, prove_op, runs = getattr(module, launch), proof.prove_op, []

    def wrong(*args):
        outs = right(*args)
        return tuple(x * s for x, s in zip(outs, scale, strict=True)) if isinstance(outs, tuple) else outs * scale[0]

    monkeypatch.setattr(module, launch, wrong)
    monkeypatch.setattr(proof, "PROOFS", {op: proof.PROOFS[op]})
    monkeypatch.setattr(_lib, "OFF", set())
    monkeypatch.setattr(proof, "proof_key", lambda device: "this machine")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(proof, "prove_op", lambda op, device: runs.append(op) or prove_op(op, kernels_run))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        assert set(proof.prove(torch.device("cuda"))) == {op}
        assert f"WARNING: the kernel {op} is switched off on this machine: its error is" in capsys.readouterr().err
    assert runs == [op]  # the second time the verdict was read
    x = torch.zeros(1, device=kernels_run)
    assert not _lib.use(op, x) and _lib.use("another", x)


# --------------------------------------------------------------------------------------------------
# Filled packs


@pytest.mark.parametrize(
    "lengths, size, count", [([5, 1, 17, 9], 64, 8), ([5, 1, 17, 9], 32, 4), ([4, 4], 12, 3), ([3], 10, 20)]
)
def test_filler_changes_nothing(lengths, size, count, make_model):
    """Log-probabilities of the real tokens, and the gradient of their sum over the whole filled
    pack, are those of the pack as it was."""
    model, p = make_model().double(), documents(*lengths)
    filled, N = fill(p, size, count), sum(lengths)
    cu_seqlens = filled.cu_seqlens
    assert filled.tokens.shape == filled.positions.shape == (size,)
    assert cu_seqlens.shape == (count + 1,) and cu_seqlens.dtype == torch.int32
    assert cu_seqlens[-1] == size and cu_seqlens.diff().min() >= 0
    assert cu_seqlens.diff().max() == filled.max_len == p.max_len
    expected = F.pad(next_tokens(p, IGNORE), (0, size - N), value=IGNORE)
    assert torch.equal(next_tokens(filled, IGNORE), expected)
    found = []
    for some in (p, filled):
        logp = logprobs(model, some)
        found.append([logp[:N].detach(), *torch.autograd.grad(logp.sum(), [*model.parameters()])])
        assert logp[N:].eq(0).all()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_filler_that_does_not_fit():
    for size, count in [(31, 9), (64, 4), (64, 5)]:
        with pytest.raises(ValueError, match="a pack of 32 tokens in 4 documents, the longest of 17"):
            fill(documents(5, 1, 17, 9), size, count)
