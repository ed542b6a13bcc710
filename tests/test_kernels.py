"""Every op, forward and each gradient, against a plain formula in fp64 written here, and by finite differences.

The references first, then the kernels, which run on the GPU where there is one and by Triton's interpreter elsewhere. Attention's kernels: test_attention.py.
"""
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.autograd import gradcheck

from kernels import _lib, act, head, linear, norm, rope
from kernels.act import swiglu, swiglu_reference
from kernels.attention import attention_reference, batches
from kernels.decode import decode_attention_reference
from kernels.head import IGNORE, chunks, linear_cross_entropy, linear_cross_entropy_reference, linear_logprob, linear_logprob_reference
from kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import qk_norm_rope, qk_norm_rope_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def normal(seed, *shapes, dtype=torch.float64):
    """Tensors of standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(f, inputs, upstream=None):
    """[outputs..., gradients...] of f for upstream gradients that are the same for every f."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [g.to(o) for g, o in zip(upstream or normal(99, *[o.shape for o in outs]), outs)]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, upstream))


def error(found, truth):
    """Largest deviation, relative to the largest true number (to 0.1 where cancellation leaves less)."""
    assert found.shape == truth.shape and found.isfinite().all()
    return ((found.double() - truth).abs().max() / truth.abs().max().clamp(min=0.1)).item() if truth.numel() else 0.0


def check(op, formula, inputs, dtype, parameters=0):
    """op in `dtype` against formula in fp64. In bf16 an error may be twice what the formula itself makes when it is computed in bf16.

    The last `parameters` of the inputs are weights, which are fp32 where activations are bf16; so are their gradients.
    """
    inputs = [x.to(dtype) for x in inputs]
    truth = with_gradients(formula, [x.double() for x in inputs])
    plain = with_gradients(formula, inputs) if dtype == torch.bfloat16 else [None] * len(truth)
    if dtype == torch.bfloat16:
        inputs = [x.float() if i >= len(inputs) - parameters else x for i, x in enumerate(inputs)]
    found = with_gradients(op, inputs)
    assert [g.dtype for g in found[-len(inputs) :]] == [x.dtype for x in inputs]
    for i, (f, t, p) in enumerate(zip(found, truth, plain)):
        allowed = TOLERANCE[dtype] if p is None else 2 * error(p, t) + 2e-3
        assert error(f, t) < allowed, (i, error(f, t), allowed)


DTYPES = [torch.float64, torch.float32, torch.bfloat16]

# ---------------------------------------------------------------------------------------------------------------------------------
# norm, act, rope


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    for seed, (n, c) in enumerate([(1, 1), (1, 7), (3, 64), (123, 431)]):
        x, w = normal(seed, (n, c), (c,))
        check(lambda x, w: rms_norm_reference(x, w, 1e-6), lambda x, w: rms(x, w, 1e-6), [x * 3, w], dtype, parameters=1)


def test_rms_norm_of_zeros_and_of_large_rows():
    y, dx, dw = with_gradients(lambda x, w: rms_norm_reference(x, w, 1e-6), [torch.zeros(2, 8), torch.ones(8)])
    assert y.eq(0).all() and dx.isfinite().all() and dw.eq(0).all()
    (x,) = normal(0, (2, 8), dtype=torch.float32)
    assert error(rms_norm_reference(x * 1e15, torch.ones(8), 1e-6), rms(x.double(), 1.0, 0.0)) < 1e-6


def silu_gated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    for seed, (n, f) in enumerate([(1, 1), (1, 5), (77, 33)]):
        check(swiglu_reference, silu_gated, [x * 3 for x in normal(seed, (n, 2 * f))], dtype)


def test_swiglu_of_extreme_gates():
    y, grad = with_gradients(swiglu_reference, [torch.tensor([[-1e4, 1e4, 2.0, 2.0]])])
    assert y.tolist() == [[0.0, 2e4]] and grad.isfinite().all()


def turned(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """Rotary embedding as what it is: pair (i, i + Dh/2) is a complex number, turned by multiplying it with e^(i angle)."""
    kv_heads = (qkv.shape[1] - heads) // 2
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None:
        q, k = rms(q, q_weight, eps), rms(k, k_weight, eps)
    turn = torch.complex(cos, sin)[:, None]

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        if x.dtype == torch.bfloat16:  # there is no complex bf16
            return torch.cat([a * cos[:, None] - b * sin[:, None], a * sin[:, None] + b * cos[:, None]], -1).to(x.dtype)
        z = torch.complex(a, b) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    return torch.cat([rotate(q), rotate(k), v], dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_qk_norm_and_rope(heads, kv_heads, dtype):
    for n, dh in [(1, 2), (37, 16)]:
        qkv, qw, kw, angle = normal(n, (n, heads + 2 * kv_heads, dh), (dh,), (dh,), (n, dh // 2))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = (angle * 5).cos().to(wide), (angle * 5).sin().to(wide)
        double = cos.double(), sin.double()

        def angles(x):  # the formula runs in fp64 too, with the very same angles
            return double if x.dtype == torch.float64 else (cos, sin)

        op = lambda x, a, b: qk_norm_rope_reference(x, a, b, cos, sin, heads, 1e-6)  # noqa: E731
        check(op, lambda x, a, b: turned(x, a, b, *angles(x), heads, 1e-6), [qkv, qw, kw], dtype, parameters=2)
        op = lambda x: qk_norm_rope_reference(x, None, None, cos, sin, heads, 1e-6)  # noqa: E731
        check(op, lambda x: turned(x, None, None, *angles(x), heads, 1e-6), [qkv], dtype)


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = normal(0, (16,), (16,))
    frequency = 100.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)

    def turn(x, position):
        angle = position * frequency[None]
        return qk_norm_rope_reference(x.expand(1, 3, 16), None, None, angle.cos(), angle.sin(), 1, 1e-6)[0, 0]

    assert torch.allclose(turn(q, 3) @ turn(k, 1), turn(q, 33) @ turn(k, 31), atol=1e-12)
    assert not torch.allclose(turn(q, 3) @ turn(k, 1), turn(q, 3) @ turn(k, 2), atol=1e-3)


def test_finite_differences_of_norm_act_rope():
    x, w, gate_up, qkv, qw, kw, angle = normal(5, (3, 6), (6,), (3, 8), (3, 4, 4), (4,), (4,), (3, 2))
    leaves = [t.requires_grad_() for t in (x, w, gate_up, qkv, qw, kw)]
    x, w, gate_up, qkv, qw, kw = leaves
    assert gradcheck(lambda x, w: rms_norm_reference(x, w, 1e-5), (x, w))
    assert gradcheck(swiglu_reference, (gate_up,))
    assert gradcheck(lambda a, b, c: qk_norm_rope_reference(a, b, c, angle.cos(), angle.sin(), 2, 1e-5), (qkv, qw, kw))


# ---------------------------------------------------------------------------------------------------------------------------------
# attention

MIXES = {  # lengths of the documents of a pack
    "one token": [1],
    "only single tokens": [1, 1, 1, 1],
    "one document": [29],
    "equal": [16, 16, 16],
    "ragged": [5, 1, 17, 3, 64, 2, 9],
    "many short": [(7 * i) % 12 + 1 for i in range(40)],
    "few long": [200, 90, 301],
    "empty ones among them": [0, 5, 0, 0, 3, 0],
    "equal but for empty ones": [8, 0, 8],
}


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def document_by_document(q, k, v, lengths):
    """softmax(q k^T / sqrt(Dh)) v with a mask, one document and one head at a time."""
    group = q.shape[1] // k.shape[1]
    parts, start = [], 0
    for n in lengths:
        here = slice(start, start + n)
        heads = []
        for h in range(q.shape[1]):
            scores = q[here, h] @ k[here, h // group].T / q.shape[2] ** 0.5
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[here, h // group])
        parts.append(torch.stack(heads, dim=1))
        start += n
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
def test_attention(mix, dtype):
    lengths = MIXES[mix]
    layout = batches(boundaries(lengths))
    for heads, kv_heads in [(4, 4), (4, 2), (4, 1)] if sum(lengths) < 200 else [(2, 1)]:
        q, k, v = normal(heads + kv_heads, (sum(lengths), heads, 8), (sum(lengths), kv_heads, 8), (sum(lengths), kv_heads, 8))
        check(lambda *x: attention_reference(*x, layout), lambda *x: document_by_document(*x, lengths), [q, k, v], dtype)


@pytest.mark.parametrize("mix", ["equal", "ragged"])
def test_attention_over_views_of_one_projection(mix):
    lengths = MIXES[mix]
    layout = batches(boundaries(lengths))
    (qkv,) = normal(3, (sum(lengths), 4 + 2 + 2, 8))
    split = lambda x: x.split([4, 2, 2], dim=1)  # noqa: E731
    check(lambda x: attention_reference(*split(x), layout), lambda x: document_by_document(*split(x), lengths), [qkv], torch.float32)


def test_finite_differences_of_attention():
    for lengths in ([3, 3], [4, 1, 2]):
        q, k, v = (t.requires_grad_() for t in normal(7, (sum(lengths), 2, 4), (sum(lengths), 1, 4), (sum(lengths), 1, 4)))
        assert gradcheck(lambda *x: attention_reference(*x, batches(boundaries(lengths))), (q, k, v))


@pytest.mark.parametrize("mix", MIXES)
def test_layout_has_a_row_for_every_token_and_little_padding(mix):
    lengths = MIXES[mix]
    groups, slot = batches(boundaries(lengths))
    rows = sum(documents * length for documents, length in groups)
    assert sum(documents for documents, _ in groups) == sum(n > 0 for n in lengths)
    if slot is None:
        assert len(groups) == 1 and rows == sum(lengths)
        return
    assert len(slot.unique()) == sum(lengths) and slot.max() < rows
    starts = [r + i * length for r, (documents, length) in zip(offsets(groups), groups) for i in range(documents)]
    room = dict(zip(starts, [length for documents, length in groups for _ in range(documents)]))
    begin = 0
    for n in lengths:
        here = slot[begin : begin + n].tolist()
        if n:
            assert here == list(range(here[0], here[0] + n)) and n <= room[here[0]]  # in order, from the start of a row that is long enough
        begin += n
    for (documents, length), r in zip(groups, offsets(groups)):
        used = ((slot >= r) & (slot < r + documents * length)).sum().item()
        assert documents * length - used <= max(64, documents * length // 8)


def offsets(groups):
    found, row = [], 0
    for documents, length in groups:
        found.append(row)
        row += documents * length
    return found


def test_layout_batches_the_short_and_not_the_long():
    for mix in ("one token", "only single tokens", "one document", "equal", "equal but for empty ones"):
        assert batches(boundaries(MIXES[mix]))[1] is None  # no copy at all
    assert len(batches(boundaries(MIXES["few long"]))[0]) == 3
    assert len(batches(boundaries(MIXES["many short"]))[0]) <= 5
    long = torch.randint(400, 420, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(batches(boundaries(long))[0]) == 1  # nearly equal: one batch


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_decode_attention(heads, kv_heads):
    lengths = torch.tensor([1, 7, 4, 12])
    q, k, v = normal(heads, (4, heads, 8), (4, 20, kv_heads, 8), (4, 20, kv_heads, 8))
    for b, n in enumerate(lengths):  # what lies behind a slot's end must not matter
        k[b, n:], v[b, n:] = 1e3, 1e3
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)]:
        found = decode_attention_reference(q.to(dtype), k.to(dtype), v.to(dtype), lengths)
        assert found.dtype == dtype
        for b, n in enumerate(lengths.tolist()):
            here = [x.to(dtype).double() for x in (q[b : b + 1].expand(n, -1, -1), k[b, :n], v[b, :n])]
            assert error(found[b], document_by_document(*here, [n])[-1]) < tolerance


# ---------------------------------------------------------------------------------------------------------------------------------
# head


def cross_entropy(hidden, weight, targets):
    asked = targets != IGNORE
    logits = hidden[asked] @ weight.T
    return -(logits - logits.logsumexp(-1, keepdim=True)).gather(1, targets[asked, None]).sum()


def logprob_and_entropy(hidden, weight, targets, temperature):
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    logp = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets != IGNORE)
    return logp, -(log_p.exp() * log_p).sum(-1)


def targets_for(n, v, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (n,), generator=generator)
    return targets.masked_fill(torch.rand(n, generator=generator) < ignored, IGNORE)


HEAD_SHAPES = [(1, 1, 2), (1, 5, 3), (130, 7, 11), (300, 16, 129)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    for seed, (n, c, v) in enumerate(HEAD_SHAPES):
        targets = targets_for(n, v, seed, ignored=0.3 if n > 1 else 0)
        for chunk_mb in (64, 0):
            op = lambda h, w: linear_cross_entropy_reference(h, w, targets, chunk_mb)  # noqa: E731
            check(op, lambda h, w: cross_entropy(h, w, targets), normal(seed, (n, c), (v, c)), dtype, parameters=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprob_and_entropy(temperature, dtype):
    for seed, (n, c, v) in enumerate(HEAD_SHAPES):
        targets, inputs = targets_for(n, v, seed, ignored=0.3 if n > 1 else 0), normal(seed, (n, c), (v, c))
        for chunk_mb in (64, 0):
            both = lambda h, w: linear_logprob_reference(h, w, targets, temperature, entropy=True, chunk_mb=chunk_mb)  # noqa: E731
            check(both, lambda h, w: logprob_and_entropy(h, w, targets, temperature), inputs, dtype, parameters=1)
        one = lambda h, w: linear_logprob_reference(h, w, targets, temperature)  # noqa: E731
        check(one, lambda h, w: logprob_and_entropy(h, w, targets, temperature)[0], inputs, dtype, parameters=1)


def test_finite_differences_of_the_head():
    for targets in (torch.tensor([2, IGNORE, 0, 4]), torch.tensor([IGNORE] * 4)):
        hidden, weight = (t.requires_grad_() for t in normal(1, (4, 3), (5, 3)))
        assert gradcheck(lambda h, w: linear_cross_entropy_reference(h, w, targets), (hidden, weight))
        assert gradcheck(lambda h, w: linear_logprob_reference(h, w, targets, 0.7, entropy=True), (hidden, weight))


def test_chunks_cover_the_tokens_and_bound_the_logits():
    for n, v, mb in [(1, 10, 1), (128, 50257, 0), (1000, 50257, 64), (513, 100, 0)]:
        parts = chunks(n, v, mb)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
        assert all((part.stop - part.start) * v * 4 <= max(mb * 2**20, 128 * v * 4) for part in parts)
    assert len(chunks(513, 100, 0)) == 5


def test_nothing_asked_costs_nothing():
    hidden, weight = normal(0, (300, 8), (50, 8), dtype=torch.float32)
    targets = torch.full((300,), IGNORE)
    for chunk_mb in (64, 0):
        loss, *grads = with_gradients(lambda h, w: linear_cross_entropy_reference(h, w, targets, chunk_mb), [hidden, weight])
        logp, *more = with_gradients(lambda h, w: linear_logprob_reference(h, w, targets, 1.0, False, chunk_mb), [hidden, weight])
        assert loss == 0 and logp.eq(0).all() and all(g.eq(0).all() for g in grads + more)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_logits(scale):
    hidden, weight = normal(0, (40, 16), (100, 16))
    targets = targets_for(40, 100)
    inputs = [hidden * scale, weight]
    check(lambda h, w: linear_cross_entropy_reference(h, w, targets), lambda h, w: cross_entropy(h, w, targets), inputs, torch.float64)
    both = lambda h, w: linear_logprob_reference(h, w, targets, 1.0, entropy=True)  # noqa: E731
    check(both, lambda h, w: logprob_and_entropy(h, w, targets, 1.0), inputs, torch.float64)
    for x in with_gradients(both, [x.float() for x in inputs]):
        assert x.isfinite().all()
    loss = linear_cross_entropy_reference(*[x.float() for x in inputs], targets)
    assert error(loss, cross_entropy(*inputs, targets)) < 1e-5


def test_entropy_of_a_uniform_and_of_a_certain_distribution():
    hidden = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    weight = torch.zeros(8, 2)
    weight[3, 0] = 200.0
    logp, ent = linear_logprob_reference(hidden, weight, torch.tensor([0, 3]), entropy=True)
    assert ent.tolist() == pytest.approx([torch.tensor(8.0).log().item(), 0.0], abs=1e-6)
    assert logp.tolist() == pytest.approx([-torch.tensor(8.0).log().item(), 0.0], abs=1e-6)


def test_gradients_are_made_only_where_they_are_wanted():
    """A frozen head (a policy's reference, an adapter) costs no [V, C] gradient; a frozen trunk none for hidden."""
    hidden, weight = normal(0, (5, 4), (7, 4), dtype=torch.float32)
    targets = targets_for(5, 7, ignored=0)
    truth = with_gradients(lambda h, w: cross_entropy(h, w, targets), [hidden.double(), weight.double()])
    for f in (lambda h, w: linear_cross_entropy_reference(h, w, targets), lambda h, w: -linear_logprob_reference(h, w, targets).sum()):
        h, w = hidden.clone().requires_grad_(), weight.clone()
        f(h, w).backward()
        scale = normal(99, ())[0]  # with_gradients's upstream number
        assert error(h.grad * scale, truth[1]) < 1e-5
        h, w = hidden.clone(), weight.clone().requires_grad_()
        f(h, w).backward()
        assert error(w.grad * scale, truth[2]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------------------
# The kernels

needs_triton = pytest.mark.skipif(_lib.MODE == "0", reason="needs triton")
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}  # allowed besides twice PyTorch's own error, relative to the largest number
RMS = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # allowed root mean square error, relative to that of the numbers, or 1.2 x PyTorch's
SMALL = [torch.float32, torch.bfloat16]


@pytest.fixture
def device(kernels_run, monkeypatch):
    """Where the kernels run. Fresh memory is full of nan, so that a place left unwritten, or read though it means nothing, shows; and persistent
    kernels have 4 multiprocessors, so that each program goes round its loop."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 7)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    for module in (norm, rope):
        monkeypatch.setattr(module, "sm_count", lambda device: 4)
    return kernels_run


def rms_error(found, truth):
    """Root mean square of the errors, relative to that of the true numbers, or to 0.01 where cancellation leaves less."""
    return ((found.double() - truth).norm() / truth.norm().clamp(min=0.01 * truth.numel() ** 0.5)).item()


def excess(found, own, truth, dtype):
    """How far the largest error, and the root mean square error, go beyond what is allowed: at most 1 is right."""
    assert found.shape == truth.shape and found.dtype == own.dtype and found.isfinite().all()
    if not truth.numel():
        return 0.0
    worst = lambda x: (x.double() - truth).abs().max().item()  # noqa: E731
    allowed = 2 * worst(own) + FLOOR[dtype] * truth.abs().max().item() + 1e-7
    return max(worst(found) / allowed, rms_error(found, truth) / max(RMS[dtype], 1.2 * rms_error(own, truth)))


def check_kernel(kernel, reference, formula, inputs, dtype, parameters=0, device="cpu", weight_dtype=torch.float32, repeats=1):
    """kernel against formula in fp64: no error beyond twice the reference's in the same dtype. Every run must give the same bits.

    The last `parameters` of the inputs are weights, in weight_dtype. Rounded inputs and rounded upstream gradients are the same numbers for all three.
    """
    inputs = [x.to(device, weight_dtype if i >= len(inputs) - parameters else dtype) for i, x in enumerate(inputs)]
    outs = reference(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    upstream = [g.to(o) for g, o in zip(normal(99, *[o.shape for o in outs]), outs)]
    found, own = with_gradients(kernel, inputs, upstream), with_gradients(reference, inputs, upstream)
    truth = with_gradients(formula, [x.double() for x in inputs], upstream)
    for i, (f, o, t) in enumerate(zip(found, own, truth, strict=True)):
        WORST[dtype] = max(WORST.get(dtype, 0), excess(f, o, t, dtype))
        assert excess(f, o, t, dtype) <= 1, (i, excess(f, o, t, dtype), rms_error(f, t), rms_error(o, t))
    for _ in range(repeats):
        assert all(map(torch.equal, found, with_gradients(kernel, inputs, upstream)))
    return found


WORST = {}  # {dtype: the largest of these}


@pytest.fixture(scope="module", autouse=True)
def tell_the_worst():
    yield
    print(*[f"\nkernels, {dtype}: errors at most {worst:.2f} of what is allowed" for dtype, worst in WORST.items()])


@needs_triton
@pytest.mark.parametrize("dtype", [*SMALL, torch.float16])
@pytest.mark.parametrize("n, f", [(1, 1), (3, 5), (1, 431), (123, 431), (15, 128), (16, 127), (17, 129), (2, 1023), (2, 1024), (3, 1025), (199, 33)])
def test_swiglu_kernel(n, f, dtype, device):
    inputs = [x * 3 for x in normal(n, (n, 2 * f))]
    check_kernel(swiglu, swiglu_reference, silu_gated, inputs, dtype, device=device)


@needs_triton
def test_swiglu_kernel_of_extreme_gates(device):
    y, grad = with_gradients(swiglu, [torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=device)])
    assert y.tolist() == [[0.0, 2e4]] and grad.isfinite().all()


def added_rms(x, delta, weight, eps, dtype):
    """The sum is rounded to `dtype` before it is normalised; rounding has the gradient 1."""
    total = x + delta
    total = total + (total.detach().to(dtype).double() - total.detach())
    return total, rms(total, weight, eps)


@needs_triton
@pytest.mark.parametrize("dtype", [*SMALL, torch.float16])
@pytest.mark.parametrize("n, c", [(1, 1), (1, 7), (3, 64), (123, 431), (31, 127), (32, 128), (33, 129), (199, 16), (5, 1023), (4, 2049), (2, 4097)])
def test_norm_kernels(n, c, dtype, device):
    x, delta, w = normal(n + c, (n, c), (n, c), (c,))
    eps = {"eps": 1e-6}
    check_kernel(partial(rms_norm, **eps), partial(rms_norm_reference, **eps), partial(rms, **eps), [x * 3, w], dtype, 1, device)
    formula = partial(added_rms, dtype=dtype, **eps)
    found = check_kernel(partial(add_rms_norm, **eps), partial(add_rms_norm_reference, **eps), formula, [x * 3, delta, w], dtype, 1, device)
    assert torch.equal(found[0].cpu(), (x * 3).to(dtype) + delta.to(dtype))  # the very sum PyTorch makes
    assert torch.equal(found[2], found[3])  # the sum's two terms have one gradient


@needs_triton
def test_norm_kernel_of_zeros_and_of_large_rows(device):
    y, dx, dw = with_gradients(partial(rms_norm, eps=1e-6), [torch.zeros(2, 8, device=device), torch.ones(8, device=device)])
    assert y.eq(0).all() and dx.isfinite().all() and dw.eq(0).all()
    x = normal(0, (2, 8), dtype=torch.float32)[0].to(device)
    assert error(rms_norm(x * 1e15, torch.ones(8, device=device), 1e-6), rms(x.double(), 1.0, 0.0)) < 1e-6


ROPE_SHAPES = [(1, 4, 2, 2), (37, 4, 4, 16), (37, 4, 1, 16), (11, 5, 5, 48), (123, 3, 1, 10), (1, 1, 1, 64), (9, 12, 4, 128), (199, 2, 1, 6)]


@needs_triton
@pytest.mark.parametrize("dtype", [*SMALL, torch.float16])
@pytest.mark.parametrize("n, heads, kv_heads, dh", ROPE_SHAPES)
def test_qk_norm_and_rope_kernel(n, heads, kv_heads, dh, dtype, device):
    qkv, qw, kw, angle = normal(n, (n, heads + 2 * kv_heads, dh), (dh,), (dh,), (n, dh // 2))
    cos, sin = (angle * 5).cos().float().to(device), (angle * 5).sin().float().to(device)
    rest = (cos, sin, heads, 1e-6)
    formula = lambda x, a=None, b=None: turned(x, a, b, cos.double(), sin.double(), heads, 1e-6)  # noqa: E731
    normed = check_kernel(lambda *x: qk_norm_rope(*x, *rest), lambda *x: qk_norm_rope_reference(*x, *rest), formula, [qkv, qw, kw], dtype, 2, device)
    without = lambda op: lambda x: op(x, None, None, *rest)  # noqa: E731
    plain = check_kernel(without(qk_norm_rope), without(qk_norm_rope_reference), formula, [qkv], dtype, 0, device)
    values = slice(heads + kv_heads, None)
    assert torch.equal(normed[0][:, values].cpu(), qkv[:, values].to(dtype)) and torch.equal(normed[1][:, values], plain[1][:, values])  # passed through


def check_head(dtype, n, c, v, device, seed=0, chunk_mb=64, temperature=0.7, inputs=None, targets=None, **kwargs):
    """Both ops of the head, the log-probability with and without the entropy. Logits are of the order of 1."""
    targets = targets_for(n, v, seed, ignored=0.3 if n > 1 else 0) if targets is None else targets
    targets = targets.to(device)
    hidden, weight = normal(seed, (n, c), (v, c)) if inputs is None else inputs
    inputs = [hidden, weight / (c**0.5 if inputs is None else 1)]
    ce = lambda op: lambda h, w: op(h, w, targets, chunk_mb)  # noqa: E731
    check_kernel(ce(linear_cross_entropy), ce(linear_cross_entropy_reference), lambda h, w: cross_entropy(h, w, targets), inputs, dtype, 1, device, **kwargs)
    both = lambda op: lambda h, w: op(h, w, targets, temperature, True, chunk_mb)  # noqa: E731
    formula = lambda h, w: logprob_and_entropy(h, w, targets, temperature)  # noqa: E731
    logp, *_ = check_kernel(both(linear_logprob), both(linear_logprob_reference), formula, inputs, dtype, 1, device, **kwargs)
    one = lambda op: lambda h, w: op(h, w, targets, temperature, False, chunk_mb)  # noqa: E731
    alone, *_ = check_kernel(one(linear_logprob), one(linear_logprob_reference), lambda h, w: formula(h, w)[0], inputs, dtype, 1, device, **kwargs)
    assert torch.equal(logp, alone)


@needs_triton
@pytest.mark.parametrize("dtype", SMALL)
def test_head_kernels(dtype, device):
    for seed, (n, c, v) in enumerate([(1, 1, 2), (1, 5, 3), (9, 16, 1), (40, 123, 507)]):
        check_head(dtype, n, c, v, device, seed)
    check_head(dtype, 140, 11, 129, device, chunk_mb=0)  # two chunks, the second ragged
    check_head(torch.float16, 9, 16, 100, device)


@needs_triton
@pytest.mark.parametrize("v", [8191, 8192, 8193, 20000, 65537])
def test_head_kernels_where_a_row_is_several_blocks(v, device):
    check_head(torch.float32, 3, 4, v, device, temperature=1.0)
    check_head(torch.bfloat16, 3, 4, v, device)


@needs_triton
@pytest.mark.parametrize("dtype", SMALL)
def test_head_kernels_of_peaked_distributions(dtype, device):
    """Hidden states that point at their targets: p is nearly 1, and its gradient the small rest."""
    targets = targets_for(30, 61, ignored=0)
    noise, weight = normal(4, (30, 16), (61, 16))
    check_head(dtype, 30, 16, 61, device, inputs=[1.5 * weight[targets] + 0.1 * noise, weight], targets=targets, temperature=1.0)
    check_head(torch.float32, 30, 16, 61, device, inputs=[2 * weight[targets], weight], targets=(targets + 1) % 61)  # and at what is not asked


@needs_triton
def test_head_kernels_in_mixed_dtypes(device):
    check_head(torch.float32, 7, 8, 50, device, weight_dtype=torch.bfloat16)
    check_head(torch.bfloat16, 7, 8, 50, device, weight_dtype=torch.bfloat16)
    check_head(torch.bfloat16, 7, 8, 50, device, weight_dtype=torch.float16)


@needs_triton
def test_head_kernels_where_nothing_is_asked(device):
    hidden, weight = [x.to(device) for x in normal(0, (130, 8), (50, 8), dtype=torch.float32)]
    targets = torch.full((130,), IGNORE, device=device)
    loss, *grads = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets, 0), [hidden, weight])
    logp, *more = with_gradients(lambda h, w: linear_logprob(h, w, targets, 1.0, False, 0), [hidden, weight])
    assert loss == 0 and logp.eq(0).all() and all(g.eq(0).all() for g in grads + more)
    loss, d_hidden, d_weight = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets[:0]), [hidden[:0], weight])  # and where nothing is
    assert loss == 0 and d_hidden.shape == (0, 8) and d_weight.eq(0).all()


@needs_triton
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_head_kernels_of_huge_logits(scale, device):
    hidden, weight = normal(0, (20, 16), (100, 16))
    targets = targets_for(20, 100).to(device)
    inputs = [(hidden * scale).to(device), weight.to(device)]
    both = lambda h, w: linear_logprob(h, w, targets, 1.0, entropy=True)  # noqa: E731
    for dtype in SMALL:
        for x in with_gradients(both, [x.to(dtype) for x in inputs]):
            assert x.isfinite().all()
    narrow = [x.float() for x in inputs]
    assert error(linear_cross_entropy(*narrow, targets), cross_entropy(*[x.double() for x in narrow], targets)) < 1e-5
    reference = linear_logprob_reference(*narrow, targets, 1.0, True)
    for found, own, truth in zip(both(*narrow), reference, logprob_and_entropy(*[x.double() for x in narrow], targets, 1.0)):
        assert excess(found, own, truth, torch.float32) <= 1


@needs_triton
def test_head_kernels_of_equal_logits(device):
    """lse = entropy = log V wherever the logits lie."""
    for v in (100, 8193):
        for level in (0.0, 3.0, -1e4, 1e4):
            hidden, weight = torch.full((2, 1), level, device=device), torch.ones(v, 1, device=device)
            logp, lse, ent = head.linear_logprob_forward(hidden, weight, torch.tensor([0, v - 1], device=device), 1.0, True, 64)
            log_v = torch.tensor(float(v)).log().item()
            assert logp.tolist() == pytest.approx([-log_v] * 2, abs=1e-6) and ent.tolist() == pytest.approx([log_v] * 2, abs=1e-6)
            assert lse.tolist() == pytest.approx([level + log_v] * 2, rel=1e-7, abs=1e-6)


@needs_triton
@pytest.mark.parametrize("v", [70, 8200])
def test_head_kernels_where_most_logits_are_minus_infinity(v, device):
    """Tokens that cannot be: probability 0, gradient 0, and no nan from 0 x inf."""
    hidden = torch.ones(2, 1, device=device)
    weight = torch.full((v, 1), -torch.inf, device=device)
    weight[:3, 0] = torch.tensor([1.0, 2.0, 3.0])
    targets = torch.tensor([2, IGNORE], device=device)
    truth = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log_softmax(0)
    _, p = head.linear_cross_entropy_forward(hidden, weight, targets, 64, False, True)[1:]
    assert p[:3, 0].tolist() == pytest.approx([x - (i == 2) for i, x in enumerate(truth.exp().tolist())], abs=1e-6) and p[3:].eq(0).all()
    logp, lse, ent = head.linear_logprob_forward(hidden, weight, targets, 1.0, True, 64)
    assert logp.tolist() == pytest.approx([truth[2].item(), 0.0], abs=1e-6) and ent.tolist() == pytest.approx([-(truth.exp() @ truth).item()] * 2, abs=1e-6)
    one = torch.ones(2, device=device)
    d_weight = head.linear_logprob_backward(one, one, hidden, weight, targets, lse, ent, 1.0, True, 64, False, True)[1]
    assert d_weight[:3].isfinite().all() and d_weight[3:].eq(0).all()


@needs_triton
def test_head_kernels_show_what_is_wrong(device):
    """nan among the logits, and targets that are no tokens, give nan and not a number that looks right; an ignored row hides nothing of another's."""
    hidden, weight = [x.to(device) for x in normal(0, (3, 4), (9, 4), dtype=torch.float32)]
    targets = torch.tensor([1, 9, -1], device=device)
    assert linear_logprob(hidden, weight, targets).isnan().tolist() == [False, True, True]
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    hidden[1, 0] = torch.nan
    assert linear_logprob(hidden, weight, torch.tensor([1, 2, IGNORE], device=device)).isnan().tolist() == [False, True, False]
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3], device=device)).isnan()
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, IGNORE, 3], device=device)).isfinite()


def inputs_of_every_op(device, dtype=torch.float32):
    """{op: (function of floating-point inputs, these inputs)}."""
    x, delta, w, gate_up, qkv, qw, kw, angle, hidden, weight = [
        t.to(device, dtype) for t in normal(8, (5, 20), (5, 20), (20,), (5, 24), (5, 6, 8), (8,), (8,), (5, 4), (9, 16), (40, 16))
    ]
    targets = targets_for(9, 40).to(device)
    cos, sin = angle.float().cos(), angle.float().sin()
    return {
        "swiglu": (swiglu, [gate_up]),
        "rms_norm": (partial(rms_norm, eps=1e-6), [x, w]),
        "add_rms_norm": (partial(add_rms_norm, eps=1e-6), [x, delta, w]),
        "qk_norm_rope": (lambda x, q, k: qk_norm_rope(x, q, k, cos, sin, 2, 1e-6), [qkv, qw, kw]),
        "rope": (lambda x: qk_norm_rope(x, None, None, cos, sin, 2, 1e-6), [qkv]),
        "linear_cross_entropy": (lambda h, w: linear_cross_entropy(h, w, targets), [hidden, weight]),
        "linear_logprob": (lambda h, w: linear_logprob(h, w, targets, 0.7, True), [hidden, weight]),
        "linear_logprob alone": (lambda h, w: linear_logprob(h, w, targets), [hidden, weight]),
    }


OPS = list(inputs_of_every_op("cpu"))


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_kernels_take_any_strides_and_any_upstream_gradient(op, device):
    """sum().backward() hands over a gradient of stride 0; views hand over inputs that are not contiguous; a mask hands over zeros."""
    f, inputs = inputs_of_every_op(device)[op]
    strided = [torch.stack([x, -x], dim=-1)[..., 0] for x in inputs]
    outs = f(*inputs)
    ones = [torch.ones_like(o) for o in (outs if isinstance(outs, tuple) else (outs,))]
    truth = with_gradients(f, inputs, ones)
    assert all(map(torch.equal, with_gradients(f, strided, ones), truth))
    expanded = [o.new_ones(()).expand(o.shape) for o in ones]
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = f(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    assert all(map(torch.equal, torch.autograd.grad(outs, leaves, expanded, retain_graph=True), truth[len(outs) :]))
    assert all(g.eq(0).all() for g in torch.autograd.grad(outs, leaves, [torch.zeros_like(o) for o in outs], retain_graph=True))
    if len(outs) == 2:  # an output nobody used
        only = torch.autograd.grad(outs[1].sum(), leaves, allow_unused=True)
        assert all(g.isfinite().all() for g in only if g is not None)


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_kernels_give_gradients_where_they_are_wanted(op, device):
    f, inputs = inputs_of_every_op(device)[op]
    truth = with_gradients(f, inputs)[-len(inputs) :]
    for wanted in range(len(inputs)):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        outs = f(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.backward(outs, [g.to(o) for g, o in zip(normal(99, *[o.shape for o in outs]), outs)])
        assert all(x.grad is None for i, x in enumerate(leaves) if i != wanted) and torch.equal(leaves[wanted].grad, truth[wanted])


@needs_triton
def test_a_frozen_head_costs_no_gradient_of_its_size(device, monkeypatch):
    hidden, weight = [x.to(device) for x in normal(0, (5, 4), (7, 4), dtype=torch.float32)]
    targets, wanted = targets_for(5, 7, ignored=0).to(device), []
    original = head.gradients
    monkeypatch.setattr(head, "gradients", lambda *args: (wanted.append(args[2:]), original(*args))[1])
    frozen, trunk = weight.clone(), hidden.clone().requires_grad_()
    linear_cross_entropy(trunk, frozen, targets).backward()
    linear_logprob(trunk, frozen, targets).sum().backward()
    assert wanted == [(True, False)] * 2
    with torch.no_grad():
        linear_cross_entropy(trunk, weight.requires_grad_(), targets)  # an evaluation
    assert wanted[2:] == [(False, False)]


@needs_triton
def test_gradient_of_a_mean_is_not_rounded_on_the_way(device):
    """1/3 is not a bf16 number: were it rounded first, every gradient would be off by 0.2 %, all in one direction."""
    hidden, weight = [x.to(device) for x in normal(0, (40, 16), (50, 16))]
    targets = targets_for(40, 50, ignored=0).to(device)
    h = hidden.bfloat16().requires_grad_()
    (by_sum,) = torch.autograd.grad(linear_cross_entropy(h, weight.float(), targets), h)
    (by_third,) = torch.autograd.grad(linear_cross_entropy(h, weight.float(), targets) / 3, h)
    assert torch.equal(by_third, (by_sum.float() * torch.tensor(1 / 3)).bfloat16())


@needs_triton
@pytest.mark.parametrize("dtype", [*SMALL, torch.float16])
def test_chunks_add_up_in_fp32(dtype, device):
    total = torch.zeros(7, 5, device=device)
    a, b = [x.to(device, dtype) for x in normal(0, (7, 300), (300, 5))]
    for part in (slice(0, 128), slice(128, 256), slice(256, 300)):
        head.accumulate(total, a[:, part], b[part])
    assert error(total, a.double() @ b.double()) < 2e-6  # rounded to bf16 a chunk: 2e-3


@needs_triton
def test_chunks_of_the_kernels_cover_the_tokens_and_bound_the_logits(device):
    for n, v, mb, dtype in [(1, 10, 1, torch.float32), (300, 517, 0, torch.float32), (1000, 517, 1, torch.bfloat16), (128, 5, 64, torch.bfloat16)]:
        hidden, w = [x.to(device, dtype) for x in normal(0, (n, 2), (v, 2))]
        rows, memories = [], set()
        for part, logits in head.logits_by_chunk(hidden, w, mb):
            rows += range(n)[part]
            memories.add(logits.data_ptr())
            assert logits.shape == (len(range(n)[part]), v) and logits.stride(0) % 64 == 0 and part.start % 128 == 0
            assert len(logits) <= 128 or len(logits) * logits.stride(0) * logits.element_size() <= mb * 2**20
            assert torch.equal(logits, hidden[part] @ w.T)
        assert rows == list(range(n)) and len(memories) == 1


@needs_triton
def test_opcheck_of_every_registered_op(device):
    r = lambda *shape: normal(len(shape), shape, dtype=torch.float32)[0].to(device)  # noqa: E731
    x, half, w, targets = r(5, 20), r(5, 10), r(20), targets_for(9, 21).to(device)
    qkv, qw, cos, hidden, weight, lse = r(5, 4, 6), r(6), r(5, 3), r(9, 8), r(21, 8), r(9)
    cases = {
        act.swiglu_forward: [(x,)],
        act.swiglu_backward: [(half, x)],
        norm.rms_norm_forward: [(x, None, w, 1e-6), (x.bfloat16(), x.bfloat16(), w, 1e-6)],
        norm.rms_norm_backward: [(x, None, x, w, r(5)), (x, x, x, w, r(5))],
        rope.qk_norm_rope_forward: [(qkv, qw, qw, cos, cos, 2, 1e-6), (qkv, None, None, cos, cos, 2, 1e-6)],
        rope.qk_norm_rope_backward: [(qkv, qkv, qw, qw, cos, cos, 2, 1e-6), (qkv, None, None, None, cos, cos, 2, 1e-6)],
        head.linear_cross_entropy_forward: [(hidden, weight, targets, 0, True, True), (hidden.bfloat16(), weight, targets, 64, False, False)],
        head.linear_logprob_forward: [(hidden, weight, targets, 0.7, True, 0), (hidden, weight, targets, 1.0, False, 0)],
        head.linear_logprob_backward: [
            (lse, lse, hidden, weight, targets, lse, lse, 0.7, True, 0, True, True),
            (lse, lse[:0], hidden, weight, targets, lse, lse[:0], 0.7, False, 0, True, False),
        ],
    }
    registered = {op for module in (act, head, norm, rope) for op in vars(module).values() if isinstance(op, torch._ops.OpOverloadPacket)}
    assert set(cases) == registered
    for op, arguments in cases.items():
        for args in arguments:
            torch.library.opcheck(op.default, args)


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_compiled_kernels_equal_eager_ones(op, device):
    for dtype in SMALL:
        f, inputs = inputs_of_every_op(device, dtype)[op]
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, with_gradients(compiled, inputs), with_gradients(f, inputs)))


# ---------------------------------------------------------------------------------------------------------------------------------
# Which of the two runs, and the kernels' proof of themselves

PROVED = ["swiglu", "rms_norm", "add_rms_norm", "qk_norm_rope", "linear_cross_entropy", "linear_logprob"]


@needs_triton
@pytest.mark.parametrize("op", PROVED)
def test_proof(op, device):
    torch.manual_seed(0)
    assert _lib.prove_op(op, device) == ""


@pytest.fixture
def proofs(kernels_run, monkeypatch, tmp_path):
    """A machine whose kernels have not been proved yet: swiglu's and rms_norm's. Returns (its device, {op: how often it was compared})."""
    torch.manual_seed(0)
    count = dict.fromkeys(["swiglu", "rms_norm"], 0)

    def counted(op, make, device):
        count[op] += 1
        return make(kernels_run)

    monkeypatch.setattr(_lib, "PROOFS", {op: partial(counted, op, _lib.PROOFS[op]) for op in count})
    monkeypatch.setattr(_lib, "OFF", set())
    monkeypatch.setattr(_lib, "proof_key", lambda device: "this GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return SimpleNamespace(type="cuda"), count


@needs_triton
def test_sound_kernels_are_proved_once(proofs, monkeypatch, capsys):
    device, count = proofs
    assert _lib.prove(device) == {} and not _lib.OFF and count == {"swiglu": 1, "rms_norm": 1}
    assert "2 ops compared" in capsys.readouterr().err
    assert _lib.prove(device) == {} and count == {"swiglu": 1, "rms_norm": 1}  # remembered
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(_lib, "proof_key", lambda device: "another driver")
    assert _lib.prove(device) == {} and count == {"swiglu": 2, "rms_norm": 2}
    monkeypatch.setattr(_lib, "proof_key", lambda device: "this GPU")
    assert _lib.prove(device) == {} and count == {"swiglu": 2, "rms_norm": 2}  # both are


@needs_triton
@pytest.mark.parametrize("damage", [b"", b"not JSON", b"[1, 2]", b'{"this GPU": {"swiglu": ""}}', b'{"this GPU": 3}', b"\xff"])
def test_a_damaged_memory_only_costs_another_proof(proofs, tmp_path, damage):
    device, count = proofs
    (tmp_path / "feinschliff").mkdir()
    (tmp_path / "feinschliff/kernels.json").write_bytes(damage)
    assert _lib.prove(device) == {} and count == {"swiglu": 1, "rms_norm": 1}
    assert _lib.prove(device) == {} and count == {"swiglu": 1, "rms_norm": 1}


calls = iter(range(100))


def raises(y):
    raise RuntimeError("no such instruction\nand more")


DAMAGES = {  # name: (what happens to the kernel's output, words of the warning)
    "wrong": (lambda y: y * 1.1, "times that of PyTorch's own ops"),
    "nan": (lambda y: y * torch.nan, "inf times"),
    "not always the same": (lambda y: y * (1 + 5e-3 * (next(calls) % 2)), "two runs on the same numbers differ"),
    "raises": (raises, "RuntimeError: no such instruction"),
    "another shape": (lambda y: y[:-1], "RuntimeError"),
}


@needs_triton
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_kernel_is_switched_off_and_the_reference_runs(damage, proofs, monkeypatch, capsys):
    device, count = proofs
    (change, words), original = DAMAGES[damage], act.swiglu_forward
    monkeypatch.setattr(act, "swiglu_forward", lambda x: change(original(x)))
    assert list(_lib.prove(device)) == ["swiglu"] and _lib.OFF == {"swiglu"}
    warning = capsys.readouterr().err
    assert "WARNING: the kernel swiglu is switched off" in warning and words in warning and "and more" not in warning
    x = normal(0, (3, 8), dtype=torch.float32)[0]
    assert torch.equal(swiglu(x), swiglu_reference(x))
    _lib.OFF.clear()
    assert list(_lib.prove(device)) == ["swiglu"] and _lib.OFF == {"swiglu"} and count == {"swiglu": 1, "rms_norm": 1}  # remembered, and told again
    assert "switched off" in capsys.readouterr().err


@needs_triton
def test_proof_key_tells_machines_and_sources_apart(monkeypatch):
    device = torch.device("cpu")
    keys = [_lib.proof_key(device)]
    assert _lib.proof_key(device) == keys[0]
    for change in [lambda m: m.setattr(torch, "__version__", "9.9"), lambda m: m.setattr(_lib.triton, "__version__", "9.9"),
                   lambda m: m.setattr(_lib.Path, "read_bytes", lambda self: b"other sources")]:  # fmt: skip
        with monkeypatch.context() as m:
            change(m)
            keys.append(_lib.proof_key(device))
    assert len(set(keys)) == 4


def test_the_references_run_on_a_cpu_in_fp64_and_when_told_to(monkeypatch):
    gpu = lambda dtype: SimpleNamespace(is_cuda=True, dtype=dtype)  # noqa: E731
    for mode, expected in [("1", _lib.MODE != "0"), ("0", False), ("interpret", True)]:
        monkeypatch.setattr(_lib, "MODE", mode if _lib.MODE != "0" else "0")
        assert _lib.use("swiglu", gpu(torch.bfloat16)) == (expected and _lib.MODE != "0")
        assert not _lib.use("swiglu", gpu(torch.float64))
        assert _lib.use("swiglu", torch.ones(1)) == (_lib.MODE == "interpret")


ALL_SIX = """
import sys, torch
from types import SimpleNamespace
from kernels import _lib, act, attention, decode, head, norm, rope
x, w, t = torch.randn(4, 8, requires_grad=True), torch.randn(8), torch.tensor([1, 0, -100, 2])
qkv, cos = torch.randn(4, 3, 8, requires_grad=True), torch.ones(4, 4)
outs = [act.swiglu(x), norm.rms_norm(x, w, 1e-6), *norm.add_rms_norm(x, x, w, 1e-6), rope.qk_norm_rope(qkv, w, w, cos, cos, 1, 1e-6),
        head.linear_cross_entropy(x, x, t), *head.linear_logprob(x, x, t, 1.0, True)]
sum(o.sum() for o in outs).backward()
assert x.grad.isfinite().all() and qkv.grad.isfinite().all()
assert not _lib.use("swiglu", SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)) and _lib.prove(SimpleNamespace(type="cuda")) == {}
"""


def run_python(code, path=ROOT, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_without_triton_the_references_run(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    done = run_python(ALL_SIX + "assert 'triton' not in sys.modules", f"{tmp_path}:{ROOT}", FEINSCHLIFF_KERNELS="interpret")
    assert done.returncode == 0, done.stderr


def test_kernels_can_be_switched_off():
    done = run_python(ALL_SIX, FEINSCHLIFF_KERNELS="0")
    assert done.returncode == 0, done.stderr


@needs_triton
def test_kernels_can_be_interpreted_by_anyone():
    code = "import torch; from kernels import act; x = torch.randn(3, 10); assert act.use('swiglu', x)\n"
    done = run_python(code + "assert torch.allclose(act.swiglu(x), act.swiglu_reference(x), atol=1e-6)", FEINSCHLIFF_KERNELS="interpret")
    assert done.returncode == 0, done.stderr


def test_products_of_layers_are_exact_whichever_library_multiplies():
    for rows in (1, linear.ROWS - 1, linear.ROWS, 200):
        x, w, bias = torch.randn(rows, 40, requires_grad=True), torch.randn(24, 40, requires_grad=True), torch.randn(24, requires_grad=True)
        upstream = torch.randn(rows, 24)
        inputs = (x, w, bias)
        want = torch.autograd.grad(torch.nn.functional.linear(*(t.double() for t in inputs)), inputs, upstream.double())
        got = torch.autograd.grad(linear.linear(*inputs), inputs, upstream)
        torch.testing.assert_close(linear.linear(*inputs), torch.nn.functional.linear(*inputs), rtol=1e-5, atol=1e-5)
        for g, t in zip(got, want):
            torch.testing.assert_close(g, t.float(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(linear.product(upstream.T, x.T), (upstream.T.double() @ x.double()).float(), rtol=1e-5, atol=1e-4)
