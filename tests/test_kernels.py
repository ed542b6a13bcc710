"""Every op, forward and each gradient, against a plain formula in fp64 written here, and by finite
differences.

First the references, then the kernels, which run on the GPU if there is one and else by Triton's
interpreter. Attention's kernels: test_attention.py.
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

from kernels import _lib, act, head, linear, norm, proof, rope
from kernels.act import swiglu, swiglu_reference
from kernels.attention import attention_reference, batches
from kernels.decode import decode_attention_reference
from kernels.head import (
    IGNORE,
    chunks,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_logprob,
    linear_logprob_reference,
)
from kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import qk_norm_rope, qk_norm_rope_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def normal(seed, *shapes, dtype=torch.float64):
    """Tensors of standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outputs_of(f, inputs):
    outs = f(*inputs)
    return outs if isinstance(outs, tuple) else (outs,)


def upstream_for(outs):
    """Upstream gradients that are the same for every f, in the outputs' dtypes."""
    return [g.to(o) for g, o in zip(normal(99, *[o.shape for o in outs]), outs, strict=True)]


def with_gradients(f, inputs, upstream=None):
    """[outputs..., gradients...] of f."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = outputs_of(f, leaves)
    upstream = [g.to(o) for g, o in zip(upstream or upstream_for(outs), outs, strict=True)]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, upstream))


def error(found, truth):
    """Largest deviation, relative to the largest true number, or to 0.1 if cancellation leaves
    less."""
    assert found.shape == truth.shape and found.isfinite().all()
    if not truth.numel():
        return 0.0
    return ((found.double() - truth).abs().max() / truth.abs().max().clamp(min=0.1)).item()


def check(op, formula, inputs, dtype, parameters=0):
    """op in `dtype` against formula in fp64. In bf16 an error may be twice that of the formula
    itself in bf16.

    The last `parameters` of the inputs are weights, which are fp32 with bf16 activations; so are
    their gradients.
    """
    inputs = [x.to(dtype) for x in inputs]
    truth = with_gradients(formula, [x.double() for x in inputs])
    plain = with_gradients(formula, inputs) if dtype == torch.bfloat16 else [None] * len(truth)
    if dtype == torch.bfloat16:
        inputs = [x.float() if i >= len(inputs) - parameters else x for i, x in enumerate(inputs)]
    found = with_gradients(op, inputs)
    assert [g.dtype for g in found[-len(inputs) :]] == [x.dtype for x in inputs]
    for i, (f, t, p) in enumerate(zip(found, truth, plain, strict=True)):
        allowed = TOLERANCE[dtype] if p is None else 2 * error(p, t) + 2e-3
        assert error(f, t) < allowed, (i, error(f, t), allowed)


DTYPES = [torch.float64, torch.float32, torch.bfloat16]

# --------------------------------------------------------------------------------------------------
# norm, act, rope


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    eps = {"eps": 1e-6}
    for seed, (n, c) in enumerate([(1, 1), (1, 7), (3, 64), (123, 431)]):
        x, w = normal(seed, (n, c), (c,))
        check(partial(rms_norm_reference, **eps), partial(rms, **eps), [x * 3, w], dtype, parameters=1)


def test_rms_norm_of_zeros_and_of_large_rows():
    inputs = [torch.zeros(2, 8), torch.ones(8)]
    y, dx, dw = with_gradients(partial(rms_norm_reference, eps=1e-6), inputs)
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


def rotated(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """Rotary embedding as what it is: the pair (i, i + Dh/2) is a complex number, multiplied by
    e^(i angle)."""
    kv_heads = (qkv.shape[1] - heads) // 2
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None:
        q, k = rms(q, q_weight, eps), rms(k, k_weight, eps)
    if qkv.dtype == torch.float64:  # with the very same angles
        cos, sin = cos.double(), sin.double()
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        if x.dtype == torch.bfloat16:  # there is no complex bf16
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
        z = torch.complex(a, b) * torch.complex(cos, sin)
        return torch.cat([z.real, z.imag], dim=-1)

    return torch.cat([rotate(q), rotate(k), v], dim=1)


def with_norm(op, *rest):
    return lambda x, q_weight, k_weight: op(x, q_weight, k_weight, *rest)


def without_norm(op, *rest):
    return lambda x: op(x, None, None, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_qk_norm_and_rope(heads, kv_heads, dtype):
    for n, dh in [(1, 2), (37, 16)]:
        qkv, qw, kw, angle = normal(n, (n, heads + 2 * kv_heads, dh), (dh,), (dh,), (n, dh // 2))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rest = (angle * 5).cos().to(wide), (angle * 5).sin().to(wide), heads, 1e-6
        op, formula = qk_norm_rope_reference, rotated
        check(with_norm(op, *rest), with_norm(formula, *rest), [qkv, qw, kw], dtype, parameters=2)
        check(without_norm(op, *rest), without_norm(formula, *rest), [qkv], dtype)


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = normal(0, (16,), (16,))
    frequency = 100.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)

    def at(x, position):
        angle = position * frequency[None]
        return qk_norm_rope_reference(x.expand(1, 3, 16), None, None, angle.cos(), angle.sin(), 1, 1e-6)[0, 0]

    assert torch.allclose(at(q, 3) @ at(k, 1), at(q, 33) @ at(k, 31), atol=1e-12)
    assert not torch.allclose(at(q, 3) @ at(k, 1), at(q, 3) @ at(k, 2), atol=1e-3)


def test_finite_differences_of_norm_act_rope():
    *leaves, angle = normal(5, (3, 6), (6,), (3, 8), (3, 4, 4), (4,), (4,), (3, 2))
    x, w, gate_up, qkv, qw, kw = (t.requires_grad_() for t in leaves)
    assert gradcheck(partial(rms_norm_reference, eps=1e-5), (x, w))
    assert gradcheck(swiglu_reference, (gate_up,))
    assert gradcheck(with_norm(qk_norm_rope_reference, angle.cos(), angle.sin(), 2, 1e-5), (qkv, qw, kw))


# --------------------------------------------------------------------------------------------------
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
    layout, N = batches(boundaries(lengths)), sum(lengths)
    for heads, kv_heads in [(4, 4), (4, 2), (4, 1)] if N < 200 else [(2, 1)]:
        inputs = normal(heads + kv_heads, (N, heads, 8), (N, kv_heads, 8), (N, kv_heads, 8))
        op, formula = partial(attention_reference, layout=layout), partial(document_by_document, lengths=lengths)
        check(op, formula, inputs, dtype)


@pytest.mark.parametrize("mix", ["equal", "ragged"])
def test_attention_over_views_of_one_projection(mix):
    lengths = MIXES[mix]
    layout = batches(boundaries(lengths))

    def op(qkv):
        return attention_reference(*qkv.split([4, 2, 2], dim=1), layout)

    def formula(qkv):
        return document_by_document(*qkv.split([4, 2, 2], dim=1), lengths)

    check(op, formula, normal(3, (sum(lengths), 4 + 2 + 2, 8)), torch.float32)


@pytest.mark.parametrize("lengths", [[3, 3], [4, 1, 2]])
def test_finite_differences_of_attention(lengths):
    N = sum(lengths)
    inputs = [x.requires_grad_() for x in normal(7, (N, 2, 4), (N, 1, 4), (N, 1, 4))]
    assert gradcheck(lambda *x: attention_reference(*x, batches(boundaries(lengths))), inputs)


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
    space, first = {}, 0  # {first row of a batch's row: its length}
    for documents, length in groups:
        for _ in range(documents):
            space[first] = length
            first += length
    begin = 0
    for n in lengths:
        here = slot[begin : begin + n].tolist()
        if n:  # in order, from the start of a row that is long enough
            assert here == list(range(here[0], here[0] + n)) and n <= space[here[0]]
        begin += n
    first = 0
    for documents, length in groups:
        used = ((slot >= first) & (slot < first + documents * length)).sum().item()
        assert documents * length - used <= max(64, documents * length // 8)
        first += documents * length


def test_layout_batches_the_short_and_not_the_long():
    for mix in ("one token", "only single tokens", "one document", "equal", "equal but for empty ones"):
        assert batches(boundaries(MIXES[mix]))[1] is None  # no copy at all
    assert len(batches(boundaries(MIXES["few long"]))[0]) == 3
    assert len(batches(boundaries(MIXES["many short"]))[0]) <= 5
    long = torch.randint(400, 420, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(batches(boundaries(long))[0]) == 1  # nearly equal: one batch


@pytest.mark.parametrize("window", [0, 3, 7, 50])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_decode_attention(heads, kv_heads, window):
    lengths = torch.tensor([1, 7, 4, 12])
    q, k, v = normal(heads, (4, heads, 8), (4, 20, kv_heads, 8), (4, 20, kv_heads, 8))
    for b, n in enumerate(lengths):  # what lies behind a slot's end must not matter
        k[b, n:], v[b, n:] = 1e3, 1e3
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)]:
        found = decode_attention_reference(q.to(dtype), k.to(dtype), v.to(dtype), lengths, window)
        assert found.dtype == dtype
        for b, n in enumerate(lengths.tolist()):
            seen = slice(max(0, n - window) if window else 0, n)
            count = seen.stop - seen.start
            here = [x.to(dtype).double() for x in (q[b].expand(count, -1, -1), k[b, seen], v[b, seen])]
            assert error(found[b], document_by_document(*here, [count])[-1]) < tolerance


# --------------------------------------------------------------------------------------------------
# head


def cross_entropy(hidden, weight, targets):
    has_target = targets != IGNORE
    logits = hidden[has_target] @ weight.T
    return -(logits - logits.logsumexp(-1, keepdim=True)).gather(1, targets[has_target, None]).sum()


def logprob_and_entropy(hidden, weight, targets, temperature):
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    logp = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets != IGNORE)
    return logp, -(log_p.exp() * log_p).sum(-1)


def logprob_alone(hidden, weight, targets, temperature):
    return logprob_and_entropy(hidden, weight, targets, temperature)[0]


def targets_for(n, v, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (n,), generator=generator)
    return targets.masked_fill(torch.rand(n, generator=generator) < ignored, IGNORE)


HEAD_SHAPES = [(1, 1, 2), (1, 5, 3), (130, 7, 11), (300, 16, 129)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    for seed, (n, c, v) in enumerate(HEAD_SHAPES):
        rest = {"targets": targets_for(n, v, seed, ignored=0.3 if n > 1 else 0)}
        for chunk_mb in (64, 0):
            op = partial(linear_cross_entropy_reference, chunk_mb=chunk_mb, **rest)
            check(op, partial(cross_entropy, **rest), normal(seed, (n, c), (v, c)), dtype, parameters=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprob_and_entropy(temperature, dtype):
    for seed, (n, c, v) in enumerate(HEAD_SHAPES):
        targets = targets_for(n, v, seed, ignored=0.3 if n > 1 else 0)
        rest, inputs = {"targets": targets, "temperature": temperature}, normal(seed, (n, c), (v, c))
        for chunk_mb in (64, 0):
            op = partial(linear_logprob_reference, entropy=True, chunk_mb=chunk_mb, **rest)
            check(op, partial(logprob_and_entropy, **rest), inputs, dtype, parameters=1)
        check(partial(linear_logprob_reference, **rest), partial(logprob_alone, **rest), inputs, dtype, parameters=1)


@pytest.mark.parametrize("targets", [[2, IGNORE, 0, 4], [IGNORE] * 4])
def test_finite_differences_of_the_head(targets):
    inputs = [t.requires_grad_() for t in normal(1, (4, 3), (5, 3))]
    targets = torch.tensor(targets)
    assert gradcheck(lambda h, w: linear_cross_entropy_reference(h, w, targets), inputs)
    assert gradcheck(lambda h, w: linear_logprob_reference(h, w, targets, 0.7, entropy=True), inputs)


def test_chunks_cover_the_tokens_and_bound_the_logits():
    for n, v, mb in [(1, 10, 1), (128, 50257, 0), (1000, 50257, 64), (513, 100, 0)]:
        parts = chunks(n, v, mb)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
        assert all((part.stop - part.start) * v * 4 <= max(mb * 2**20, 128 * v * 4) for part in parts)
    assert len(chunks(513, 100, 0)) == 5


@pytest.mark.parametrize("chunk_mb", [64, 0])
def test_no_targets_cost_nothing(chunk_mb):
    inputs, targets = normal(0, (300, 8), (50, 8), dtype=torch.float32), torch.full((300,), IGNORE)
    rest = {"targets": targets, "chunk_mb": chunk_mb}
    loss, *grads = with_gradients(partial(linear_cross_entropy_reference, **rest), inputs)
    logp, *more = with_gradients(partial(linear_logprob_reference, **rest), inputs)
    assert loss == 0 and logp.eq(0).all() and all(g.eq(0).all() for g in grads + more)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_logits(scale):
    hidden, weight = normal(0, (40, 16), (100, 16))
    targets = targets_for(40, 100)
    inputs = [hidden * scale, weight]
    rest = {"targets": targets}
    check(partial(linear_cross_entropy_reference, **rest), partial(cross_entropy, **rest), inputs, torch.float64)
    both = partial(linear_logprob_reference, entropy=True, **rest)
    check(both, partial(logprob_and_entropy, temperature=1.0, **rest), inputs, torch.float64)
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


def test_gradients_are_made_only_if_they_are_wanted():
    """A frozen head (a policy's reference, an adapter) costs no [V, C] gradient; a frozen trunk
    none for hidden."""
    hidden, weight = normal(0, (5, 4), (7, 4), dtype=torch.float32)
    targets = targets_for(5, 7, ignored=0)
    inputs = [hidden.double(), weight.double()]
    _, d_hidden, d_weight = with_gradients(partial(cross_entropy, targets=targets), inputs)
    (scale,) = normal(99, ())  # with_gradients's upstream number

    def negative_logprob(hidden, weight, targets):
        return -linear_logprob_reference(hidden, weight, targets).sum()

    for f in (linear_cross_entropy_reference, negative_logprob):
        h, w = hidden.clone().requires_grad_(), weight.clone()
        f(h, w, targets).backward()
        assert error(h.grad * scale, d_hidden) < 1e-5
        h, w = hidden.clone(), weight.clone().requires_grad_()
        f(h, w, targets).backward()
        assert error(w.grad * scale, d_weight) < 1e-5


# --------------------------------------------------------------------------------------------------
# The kernels

needs_triton = pytest.mark.skipif(_lib.MODE == "0", reason="needs triton")
# Allowed on top of twice PyTorch's own error, relative to the largest number
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
# Allowed root mean square error, relative to that of the numbers, or 1.2 x PyTorch's
RMS = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SMALL = [torch.float32, torch.bfloat16]


@pytest.fixture
def device(kernels_run, monkeypatch):
    """Where the kernels run. Fresh memory is full of nan, so that a place left unwritten, or read
    though it means nothing, shows; and persistent kernels have 4 multiprocessors, so that each
    program repeats its loop."""

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
    """Root mean square of the errors, relative to that of the true numbers, or to 0.01 if
    cancellation leaves less."""
    return ((found.double() - truth).norm() / truth.norm().clamp(min=0.01 * truth.numel() ** 0.5)).item()


def excess(found, own, truth, dtype):
    """How far the largest error and the root mean square error exceed what is allowed: right if
    at most 1. A GPU's own exp2 and log2, of 2 ulp, are allowed twice as much."""
    assert found.shape == truth.shape and found.dtype == own.dtype and found.isfinite().all()
    if not truth.numel():
        return 0.0
    worst, own_worst = ((x.double() - truth).abs().max().item() for x in (found, own))
    allowed = 2 * own_worst + FLOOR[dtype] * truth.abs().max().item() + 1e-7
    wrong = max(worst / allowed, rms_error(found, truth) / max(RMS[dtype], 1.2 * rms_error(own, truth)))
    return wrong / 2 if found.is_cuda else wrong


def check_kernel(
    kernel, reference, formula, inputs, dtype, parameters=0, device="cpu", weight_dtype=torch.float32, repeats=1
):
    """kernel against formula in fp64: no error above twice the reference's in the same dtype. Every
    run must give the same bits.

    The last `parameters` of the inputs are weights, in weight_dtype. Rounded inputs and rounded
    upstream gradients are the same numbers for all three.
    """
    first_weight = len(inputs) - parameters
    inputs = [x.to(device, weight_dtype if i >= first_weight else dtype) for i, x in enumerate(inputs)]
    upstream = upstream_for(outputs_of(reference, inputs))
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
def print_the_worst():
    yield
    for dtype, worst in WORST.items():
        print(f"\nkernels, {dtype}: errors at most {worst:.2f} of what is allowed")


SWIGLU_SHAPES = [(1, 1), (3, 5), (16, 127), (17, 129), (2, 1024), (3, 1025), (199, 33)]


@needs_triton
@pytest.mark.parametrize("dtype", [*SMALL, torch.float16])
@pytest.mark.parametrize("n, f", SWIGLU_SHAPES)
def test_swiglu_kernel(n, f, dtype, device):
    inputs = [x * 3 for x in normal(n, (n, 2 * f))]
    check_kernel(swiglu, swiglu_reference, silu_gated, inputs, dtype, device=device)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's exp overflows to inf, as it should
def test_swiglu_kernel_of_extreme_gates(device):
    y, grad = with_gradients(swiglu, [torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=device)])
    assert y.tolist() == [[0.0, 2e4]] and grad.isfinite().all()


def added_rms(x, delta, weight, eps, dtype):
    """The sum is rounded to `dtype` before it is normalised; rounding has the gradient 1."""
    total = x + delta
    total = total + (total.detach().to(dtype).double() - total.detach())
    return total, rms(total, weight, eps)


NORM_SHAPES = [(1, 1), (3, 64), (63, 431), (31, 127), (33, 129), (199, 16), (4, 2049)]


@needs_triton
@pytest.mark.parametrize("dtype", [*SMALL, torch.float16])
@pytest.mark.parametrize("n, c", NORM_SHAPES)
def test_norm_kernels(n, c, dtype, device):
    x, delta, w = normal(n + c, (n, c), (n, c), (c,))
    eps = {"eps": 1e-6}
    op, reference = partial(rms_norm, **eps), partial(rms_norm_reference, **eps)
    check_kernel(op, reference, partial(rms, **eps), [x * 3, w], dtype, 1, device)
    op, reference = partial(add_rms_norm, **eps), partial(add_rms_norm_reference, **eps)
    formula = partial(added_rms, dtype=dtype, **eps)
    found = check_kernel(op, reference, formula, [x * 3, delta, w], dtype, 1, device)
    assert torch.equal(found[0].cpu(), (x * 3).to(dtype) + delta.to(dtype))  # the very sum PyTorch makes
    assert torch.equal(found[2], found[3])  # the sum's two terms have one gradient


@needs_triton
def test_norm_kernel_of_zeros_and_of_large_rows(device):
    inputs = [torch.zeros(2, 8, device=device), torch.ones(8, device=device)]
    y, dx, dw = with_gradients(partial(rms_norm, eps=1e-6), inputs)
    assert y.eq(0).all() and dx.isfinite().all() and dw.eq(0).all()
    x = normal(0, (2, 8), dtype=torch.float32)[0].to(device)
    assert error(rms_norm(x * 1e15, torch.ones(8, device=device), 1e-6), rms(x.double(), 1.0, 0.0)) < 1e-6


ROPE_SHAPES = [(1, 4, 2, 2), (37, 4, 1, 16), (11, 5, 5, 48), (63, 3, 1, 10), (9, 12, 4, 128), (199, 2, 1, 6)]


@needs_triton
@pytest.mark.parametrize("dtype", [*SMALL, torch.float16])
@pytest.mark.parametrize("n, heads, kv_heads, dh", ROPE_SHAPES)
def test_qk_norm_and_rope_kernel(n, heads, kv_heads, dh, dtype, device):
    qkv, qw, kw, angle = normal(n, (n, heads + 2 * kv_heads, dh), (dh,), (dh,), (n, dh // 2))
    rest = (angle * 5).cos().float().to(device), (angle * 5).sin().float().to(device), heads, 1e-6
    ops = qk_norm_rope, qk_norm_rope_reference, rotated
    normed = check_kernel(*(with_norm(op, *rest) for op in ops), [qkv, qw, kw], dtype, 2, device)
    plain = check_kernel(*(without_norm(op, *rest) for op in ops), [qkv], dtype, 0, device)
    values = slice(heads + kv_heads, None)  # pass through
    assert torch.equal(normed[0][:, values].cpu(), qkv[:, values].to(dtype))
    assert torch.equal(normed[1][:, values], plain[1][:, values])


def check_head(dtype, n, c, v, device, seed=0, chunk_mb=64, temperature=0.7, inputs=None, targets=None, **kwargs):
    """Both ops of the head, the log-probability with and without the entropy. Logits are of the
    order of 1."""
    targets = targets_for(n, v, seed, ignored=0.3 if n > 1 else 0) if targets is None else targets
    targets = targets.to(device)
    if inputs is None:
        hidden, weight = normal(seed, (n, c), (v, c))
        inputs = [hidden, weight / c**0.5]

    def judge(op, reference, formula, *rest):
        ops = (lambda h, w: op(h, w, *rest, chunk_mb)), (lambda h, w: reference(h, w, *rest, chunk_mb))
        return check_kernel(*ops, formula, inputs, dtype, 1, device, **kwargs)

    judge(linear_cross_entropy, linear_cross_entropy_reference, lambda h, w: cross_entropy(h, w, targets), targets)
    truth = {"targets": targets, "temperature": temperature}
    ops, rest = (linear_logprob, linear_logprob_reference), (targets, temperature)
    logp, *_ = judge(*ops, partial(logprob_and_entropy, **truth), *rest, True)
    alone, *_ = judge(*ops, partial(logprob_alone, **truth), *rest, False)
    assert torch.equal(logp, alone)


@needs_triton
@pytest.mark.parametrize("dtype", SMALL)
def test_head_kernels(dtype, device):
    for seed, (n, c, v) in enumerate([(1, 1, 2), (1, 5, 3), (9, 16, 1), (11, 123, 507)]):
        check_head(dtype, n, c, v, device, seed)
    check_head(torch.float16, 9, 16, 100, device)


@needs_triton
@pytest.mark.parametrize("v", [8191, 8193, 20000, 65537])
def test_head_kernels_with_several_blocks_per_row(v, device):
    check_head(torch.float32, 3, 4, v, device, temperature=1.0)
    check_head(torch.bfloat16, 3, 4, v, device)


@needs_triton
@pytest.mark.parametrize("dtype", SMALL)
def test_head_kernels_of_peaked_distributions(dtype, device):
    """Hidden states that point at their targets: p is nearly 1, and its gradient the small rest."""
    targets = targets_for(30, 61, ignored=0)
    noise, weight = normal(4, (30, 16), (61, 16))
    inputs = [1.5 * weight[targets] + 0.1 * noise, weight]
    check_head(dtype, 30, 16, 61, device, inputs=inputs, targets=targets, temperature=1.0)


@needs_triton
def test_head_kernels_of_distributions_peaked_elsewhere(device):
    targets = targets_for(30, 61, ignored=0)
    _, weight = normal(4, (30, 16), (61, 16))
    inputs = [2 * weight[targets], weight]
    check_head(torch.float32, 30, 16, 61, device, inputs=inputs, targets=(targets + 1) % 61)


@needs_triton
def test_head_kernels_in_mixed_dtypes(device):
    check_head(torch.float32, 7, 8, 50, device, weight_dtype=torch.bfloat16)
    check_head(torch.bfloat16, 7, 8, 50, device, weight_dtype=torch.bfloat16)
    check_head(torch.bfloat16, 7, 8, 50, device, weight_dtype=torch.float16)


@needs_triton
def test_head_kernels_without_targets(device):
    hidden, weight = [x.to(device) for x in normal(0, (9, 8), (50, 8), dtype=torch.float32)]
    targets = torch.full((9,), IGNORE, device=device)
    loss, *grads = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets), [hidden, weight])
    logp, *more = with_gradients(lambda h, w: linear_logprob(h, w, targets, 1.0, False), [hidden, weight])
    assert loss == 0 and logp.eq(0).all() and all(g.eq(0).all() for g in grads + more)
    # and without tokens
    none = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets[:0]), [hidden[:0], weight])
    loss, d_hidden, d_weight = none
    assert loss == 0 and d_hidden.shape == (0, 8) and d_weight.eq(0).all()


@needs_triton
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_head_kernels_of_huge_logits(scale, device):
    hidden, weight = normal(0, (20, 16), (100, 16))
    targets = targets_for(20, 100).to(device)
    inputs = [(hidden * scale).to(device), weight.to(device)]

    def both(h, w):
        return linear_logprob(h, w, targets, 1.0, entropy=True)

    for dtype in SMALL:
        for x in with_gradients(both, [x.to(dtype) for x in inputs]):
            assert x.isfinite().all()
    narrow = [x.float() for x in inputs]
    double = [x.double() for x in narrow]
    assert error(linear_cross_entropy(*narrow, targets), cross_entropy(*double, targets)) < 1e-5
    results = both(*narrow), linear_logprob_reference(*narrow, targets, 1.0, True)
    for found, own, truth in zip(*results, logprob_and_entropy(*double, targets, 1.0), strict=True):
        assert excess(found, own, truth, torch.float32) <= 1


@needs_triton
@pytest.mark.parametrize("v", [100, 8193])
def test_head_kernels_of_equal_logits(v, device):
    """lse - level = entropy = log V for logits of every level."""
    log_v, targets = torch.tensor(float(v)).log().item(), torch.tensor([0, v - 1], device=device)
    for level in (0.0, 3.0, -1e4, 1e4):
        hidden, weight = torch.full((2, 1), level, device=device), torch.ones(v, 1, device=device)
        logp, lse, ent = head.linear_logprob_forward(hidden, weight, targets, 1.0, True, 64)
        assert logp.tolist() == pytest.approx([-log_v] * 2, abs=1e-6)
        assert ent.tolist() == pytest.approx([log_v] * 2, abs=1e-6)
        assert lse.tolist() == pytest.approx([level + log_v] * 2, rel=1e-7, abs=1e-6)


@needs_triton
@pytest.mark.parametrize("v", [70, 8200])
def test_head_kernels_if_most_logits_are_minus_infinity(v, device):
    """Tokens that cannot be: probability 0, gradient 0, and no nan from 0 x inf."""
    hidden = torch.ones(2, 1, device=device)
    weight = torch.full((v, 1), -torch.inf, device=device)
    weight[:3, 0] = torch.tensor([1.0, 2.0, 3.0])
    targets = torch.tensor([2, IGNORE], device=device)
    log_p = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log_softmax(0)
    entropy = -(log_p.exp() @ log_p).item()
    _, _, d_weight = head.linear_cross_entropy_forward(hidden, weight, targets, 64, False, True)
    expected = log_p.exp() - torch.tensor([0.0, 0.0, 1.0])
    assert d_weight[:3, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert d_weight[3:].eq(0).all()
    logp, lse, ent = head.linear_logprob_forward(hidden, weight, targets, 1.0, True, 64)
    assert logp.tolist() == pytest.approx([log_p[2].item(), 0.0], abs=1e-6)
    assert ent.tolist() == pytest.approx([entropy] * 2, abs=1e-6)
    one = torch.ones(2, device=device)
    rest = hidden, weight, targets, lse, ent, 1.0, True, 64, False, True
    _, d_weight = head.linear_logprob_backward(one, one, *rest)
    assert d_weight[:3].isfinite().all() and d_weight[3:].eq(0).all()


@needs_triton
def test_head_kernels_show_what_is_wrong(device):
    """nan among the logits, and targets that are no tokens, give nan instead of a number that looks
    right; a token without a target hides nothing of another's."""
    hidden, weight = [x.to(device) for x in normal(0, (3, 4), (9, 4), dtype=torch.float32)]

    def to_targets(*targets):
        return torch.tensor(targets, device=device)

    targets = to_targets(1, 9, -1)
    assert linear_logprob(hidden, weight, targets).isnan().tolist() == [False, True, True]
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    hidden[1, 0] = torch.nan
    assert linear_logprob(hidden, weight, to_targets(1, 2, IGNORE)).isnan().tolist() == [False, True, False]
    assert linear_cross_entropy(hidden, weight, to_targets(1, 2, 3)).isnan()
    assert linear_cross_entropy(hidden, weight, to_targets(1, IGNORE, 3)).isfinite()


def inputs_of_every_op(device, dtype=torch.float32):
    """{op: (function of floating-point inputs, these inputs)}."""
    shapes = [(5, 20), (5, 20), (20,), (5, 24), (5, 6, 8), (8,), (8,), (5, 4), (9, 16), (40, 16)]
    tensors = [t.to(device, dtype) for t in normal(8, *shapes)]
    x, delta, w, gate_up, qkv, qw, kw, angle, hidden, weight = tensors
    targets = targets_for(9, 40).to(device)
    rest = angle.float().cos(), angle.float().sin(), 2, 1e-6
    return {
        "swiglu": (swiglu, [gate_up]),
        "rms_norm": (partial(rms_norm, eps=1e-6), [x, w]),
        "add_rms_norm": (partial(add_rms_norm, eps=1e-6), [x, delta, w]),
        "qk_norm_rope": (with_norm(qk_norm_rope, *rest), [qkv, qw, kw]),
        "rope": (without_norm(qk_norm_rope, *rest), [qkv]),
        "linear_cross_entropy": (lambda h, w: linear_cross_entropy(h, w, targets), [hidden, weight]),
        "linear_logprob": (lambda h, w: linear_logprob(h, w, targets, 0.7, True), [hidden, weight]),
        "linear_logprob alone": (lambda h, w: linear_logprob(h, w, targets), [hidden, weight]),
    }


OPS = list(inputs_of_every_op("cpu"))


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_kernels_take_any_strides_and_any_upstream_gradient(op, device):
    """sum().backward() hands over a gradient of stride 0, views hand over inputs that are not
    contiguous, and a mask hands over zeros."""
    f, inputs = inputs_of_every_op(device)[op]
    strided = [torch.stack([x, -x], dim=-1)[..., 0] for x in inputs]
    ones = [torch.ones_like(o) for o in outputs_of(f, inputs)]
    truth = with_gradients(f, inputs, ones)
    # The head's products are the library's: on a GPU other strides may mean another algorithm.
    library = device.type == "cuda" and op.startswith("linear")
    same = partial(torch.testing.assert_close, rtol=1e-5 if library else 0, atol=1e-6 if library else 0)
    for found, expected in zip(with_gradients(f, strided, ones), truth, strict=True):
        same(found, expected)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = outputs_of(f, leaves)
    expanded = [o.new_ones(()).expand(o.shape) for o in ones]
    grads = torch.autograd.grad(outs, leaves, expanded, retain_graph=True)
    for found, expected in zip(grads, truth[len(outs) :], strict=True):
        same(found, expected)
    zeros = [torch.zeros_like(o) for o in outs]
    assert all(g.eq(0).all() for g in torch.autograd.grad(outs, leaves, zeros, retain_graph=True))
    if len(outs) == 2:  # an output that nobody used
        only = torch.autograd.grad(outs[1].sum(), leaves, allow_unused=True)
        assert all(g.isfinite().all() for g in only if g is not None)


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_kernels_give_the_gradients_that_are_wanted(op, device):
    f, inputs = inputs_of_every_op(device)[op]
    truth = with_gradients(f, inputs)[-len(inputs) :]
    for wanted in range(len(inputs)):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        outs = outputs_of(f, leaves)
        torch.autograd.backward(outs, upstream_for(outs))
        assert all(x.grad is None for i, x in enumerate(leaves) if i != wanted)
        assert torch.equal(leaves[wanted].grad, truth[wanted])


@needs_triton
def test_a_frozen_head_costs_no_gradient_of_its_size(device, monkeypatch):
    hidden, weight = [x.to(device) for x in normal(0, (5, 4), (7, 4), dtype=torch.float32)]
    targets, wanted = targets_for(5, 7, ignored=0).to(device), []
    original = head.gradients

    def recorded(hidden, weight, *want):
        wanted.append(want)
        return original(hidden, weight, *want)

    monkeypatch.setattr(head, "gradients", recorded)
    frozen, trunk = weight.clone(), hidden.clone().requires_grad_()
    linear_cross_entropy(trunk, frozen, targets).backward()
    linear_logprob(trunk, frozen, targets).sum().backward()
    assert wanted == [(True, False)] * 2
    with torch.no_grad():
        linear_cross_entropy(trunk, weight.requires_grad_(), targets)  # an evaluation
    assert wanted[2:] == [(False, False)]


@needs_triton
def test_gradient_of_a_mean_is_not_rounded_on_the_way(device):
    """1/3 is not a bf16 number: rounded first, it would put every gradient off by 0.2 %, all in one
    direction."""
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
    assert error(total, a.double() @ b.double()) < 2e-6  # each chunk rounded to bf16: 2e-3


CHUNKED = [
    (1, 10, 1, torch.float32),
    (300, 517, 0, torch.float32),
    (1000, 517, 1, torch.bfloat16),
    (128, 5, 64, torch.bfloat16),
]


@needs_triton
@pytest.mark.parametrize("n, v, mb, dtype", CHUNKED)
def test_chunks_of_the_kernels_cover_the_tokens_and_bound_the_logits(n, v, mb, dtype, device):
    hidden, w = [x.to(device, dtype) for x in normal(0, (n, 2), (v, 2))]
    rows, memories = [], set()
    for part, logits in head.logits_by_chunk(hidden, w, mb):
        rows += range(n)[part]
        memories.add(logits.data_ptr())
        stride = logits.stride(0)
        assert logits.shape == (len(range(n)[part]), v) and stride % 64 == 0 and part.start % 128 == 0
        assert len(logits) <= 128 or len(logits) * stride * logits.element_size() <= mb * 2**20
        assert torch.equal(logits, hidden[part] @ w.T)
    assert rows == list(range(n)) and len(memories) == 1


@needs_triton
def test_opcheck_of_every_registered_op(device):
    shapes = [(3, 20), (3, 10), (20,), (3, 4, 6), (6,), (3, 3), (4, 8), (21, 8), (4,), (3,)]
    tensors = [x.to(device) for x in normal(0, *shapes, dtype=torch.float32)]
    x, half, w, qkv, qw, cos, hidden, weight, lse, rstd = tensors
    targets = targets_for(4, 21).to(device)
    saved, none = (hidden, weight, targets, lse), lse[:0]
    cases = {
        act.swiglu_forward: [(x,)],
        act.swiglu_backward: [(half, x)],
        norm.rms_norm_forward: [(x, None, w, 1e-6), (x.bfloat16(), x.bfloat16(), w, 1e-6)],
        norm.rms_norm_backward: [(x, None, x, w, rstd), (x, x, x, w, rstd)],
        rope.qk_norm_rope_forward: [(qkv, qw, qw, cos, cos, 2, 1e-6), (qkv, None, None, cos, cos, 2, 1e-6)],
        rope.qk_norm_rope_backward: [
            (qkv, qkv, qw, qw, cos, cos, 2, 1e-6),
            (qkv, None, None, None, cos, cos, 2, 1e-6),
        ],
        rope.rotate_queries_and_keys: [(qkv, qw, qw, cos, cos, 2, 1e-6), (qkv, None, None, cos, cos, 2, 1e-6)],
        rope.rotate_back: [
            (qkv.clone(), qkv, qw, qw, cos, cos, 2, 1e-6),
            (qkv.clone(), qkv, None, None, cos, cos, 2, 1e-6),
        ],
        head.linear_cross_entropy_forward: [
            (hidden, weight, targets, 0, True, True),
            (hidden.bfloat16(), weight, targets, 64, False, False),
        ],
        head.linear_logprob_forward: [
            (hidden, weight, targets, 0.7, True, 0),
            (hidden, weight, targets, 1.0, False, 0),
        ],
        head.linear_logprob_backward: [
            (lse, lse, *saved, lse, 0.7, True, 0, True, True),
            (lse, none, *saved, none, 0.7, False, 0, True, False),
        ],
    }
    names = [op for module in (act, head, norm, rope) for op in vars(module).values()]
    assert set(cases) == {op for op in names if isinstance(op, torch._ops.OpOverloadPacket)}
    for op, arguments in cases.items():
        for args in arguments:
            torch.library.opcheck(op.default, args)


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_compiled_kernels_equal_eager_ones(op, device):
    f, inputs = inputs_of_every_op(device, torch.bfloat16)[op]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, inputs), with_gradients(f, inputs)))


# --------------------------------------------------------------------------------------------------
# Which of the two runs, and the kernels' proof of themselves

PROVED = ["swiglu", "rms_norm", "add_rms_norm", "qk_norm_rope", "linear_cross_entropy", "linear_logprob"]


@needs_triton
@pytest.mark.parametrize("op", PROVED)
def test_proof(op, device):
    torch.manual_seed(0)
    assert proof.prove_op(op, device) == "" and op not in _lib.OFF


@pytest.fixture
def proofs(kernels_run, monkeypatch, tmp_path):
    """A machine whose kernels have not been proved yet: swiglu's and rms_norm's. Returns (its
    device, {op: how often it was compared})."""
    torch.manual_seed(0)
    for module in ("draw", "kl"):  # or proving would import them, and they would add their proofs
        __import__(f"kernels.{module}")
    count = dict.fromkeys(["swiglu", "rms_norm"], 0)

    def counted(op, make, device):
        count[op] += 1
        f, inputs = make(kernels_run)
        return f, [x[:8] if x.dim() > 1 else x for x in inputs]  # few rows: the interpreter is slow

    monkeypatch.setattr(proof, "PROOFS", {op: partial(counted, op, proof.PROOFS[op]) for op in count})
    monkeypatch.setattr(_lib, "OFF", set())
    monkeypatch.setattr(proof, "proof_key", lambda device: "this_gpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return SimpleNamespace(type="cuda"), count


@needs_triton
def test_sound_kernels_are_proved_once(proofs, monkeypatch, capsys):
    device, count = proofs
    assert proof.prove(device) == {} and not _lib.OFF and count == {"swiglu": 1, "rms_norm": 1}
    assert "2 ops compared" in capsys.readouterr().err
    assert proof.prove(device) == {} and count == {"swiglu": 1, "rms_norm": 1}  # remembered
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(proof, "proof_key", lambda device: "another_driver")
    assert proof.prove(device) == {} and count == {"swiglu": 2, "rms_norm": 2}
    monkeypatch.setattr(proof, "proof_key", lambda device: "this_gpu")
    assert proof.prove(device) == {} and count == {"swiglu": 2, "rms_norm": 2}  # both are


@needs_triton
@pytest.mark.parametrize("damage", [b"not JSON", b"[1, 2]", b"\xff"])
def test_a_damaged_memory_only_costs_another_proof(proofs, tmp_path, damage):
    device, count = proofs
    (tmp_path / "feinschliff").mkdir()
    (tmp_path / "feinschliff/kernels-this_gpu.json").write_bytes(damage)
    assert proof.prove(device) == {} and count == {"swiglu": 1, "rms_norm": 1}
    assert proof.prove(device) == {} and count == {"swiglu": 1, "rms_norm": 1}


@needs_triton
def test_a_memory_that_cannot_be_written_only_costs_another_proof(proofs, tmp_path):
    device, count = proofs
    (tmp_path / "feinschliff").write_text("a file, not a folder")
    for times in (1, 2):
        assert proof.prove(device) == {} and count == {"swiglu": times, "rms_norm": times}


CALLS = iter(range(100))


def raises(y):
    raise RuntimeError("no such instruction\nand more")


DAMAGES = {  # name: (what happens to the kernel's output, words of the warning)
    "wrong": (lambda y: y * 1.1, "times what is allowed"),
    "nan": (lambda y: y * torch.nan, "inf times"),
    "not always the same": (lambda y: y * (1 + 5e-3 * (next(CALLS) % 2)), "two runs on the same numbers differ"),
    "raises": (raises, "RuntimeError: no such instruction"),
    "another shape": (lambda y: y[:-1], "RuntimeError"),
}


@needs_triton
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_kernel_is_switched_off_and_the_reference_runs(damage, proofs, monkeypatch, capsys):
    device, count = proofs
    (change, words), original = DAMAGES[damage], act.swiglu_forward
    monkeypatch.setattr(act, "swiglu_forward", lambda x: change(original(x)))
    assert list(proof.prove(device)) == ["swiglu"] and _lib.OFF == {"swiglu"}
    warning = capsys.readouterr().err
    assert "WARNING: the kernel swiglu is switched off" in warning
    assert words in warning and "and more" not in warning
    x = normal(0, (3, 8), dtype=torch.float32)[0]
    assert torch.equal(swiglu(x), swiglu_reference(x))
    _lib.OFF.clear()
    assert list(proof.prove(device)) == ["swiglu"] and _lib.OFF == {"swiglu"}
    assert count == {"swiglu": 1, "rms_norm": 1}  # remembered, and told again
    assert "switched off" in capsys.readouterr().err


@needs_triton
def test_a_kernel_that_was_switched_off_is_proved_by_its_kernels(kernels_run, monkeypatch):
    monkeypatch.setattr(_lib, "OFF", {"swiglu"})
    monkeypatch.setattr(act, "swiglu_forward", raises)
    assert "no such instruction" in proof.prove_op("swiglu", kernels_run)


@needs_triton
@pytest.mark.parametrize(
    "where, name, value",
    [
        (torch, "__version__", "9.9"),
        (_lib.triton, "__version__", "9.9"),
        (proof.Path, "read_bytes", lambda self: b"other sources"),
    ],
)
def test_proof_key_tells_machines_and_sources_apart(where, name, value, monkeypatch):
    device = torch.device("cpu")
    key = proof.proof_key(device)
    assert proof.proof_key(device) == key
    monkeypatch.setattr(where, name, value)
    assert proof.proof_key(device) != key


@pytest.mark.parametrize("mode", ["1", "0", "interpret"])
def test_the_references_run_on_a_cpu_in_fp64_and_when_told_to(mode, monkeypatch):
    mode = mode if _lib.MODE != "0" else "0"
    monkeypatch.setattr(_lib, "MODE", mode)
    assert _lib.use("swiglu", SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)) == (mode != "0")
    assert not _lib.use("swiglu", SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert _lib.use("swiglu", torch.ones(1)) == (mode == "interpret")


WITHOUT_TRITON = """
import sys, torch
from types import SimpleNamespace
from kernels import _lib, act, attention, decode, head, norm, proof, rope
x, w, t = torch.randn(4, 8, requires_grad=True), torch.randn(8), torch.tensor([1, 0, -100, 2])
qkv, cos = torch.randn(4, 3, 8, requires_grad=True), torch.ones(4, 4)
outs = [act.swiglu(x), norm.rms_norm(x, w, 1e-6), *norm.add_rms_norm(x, x, w, 1e-6)]
outs += [rope.qk_norm_rope(qkv, w, w, cos, cos, 1, 1e-6), head.linear_cross_entropy(x, x, t)]
outs += head.linear_logprob(x, x, t, 1.0, True)
sum(o.sum() for o in outs).backward()
assert x.grad.isfinite().all() and qkv.grad.isfinite().all()
assert not _lib.use("swiglu", SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
assert proof.prove(SimpleNamespace(type="cuda")) == {} and "triton" not in sys.modules
"""
SWITCHED_OFF = """
import torch
from types import SimpleNamespace
from kernels import _lib, act, proof
x = torch.randn(3, 10)
assert torch.equal(act.swiglu(x), act.swiglu_reference(x))
assert not _lib.use("swiglu", SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
assert proof.prove(SimpleNamespace(type="cuda")) == {}
"""
INTERPRETED = """
import torch
from kernels import act
x = torch.randn(3, 10)
assert act.use("swiglu", x) and torch.allclose(act.swiglu(x), act.swiglu_reference(x), atol=1e-6)
"""


def run_python(code, path=ROOT, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_triton_the_references_run(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    run_python(WITHOUT_TRITON, f"{tmp_path}:{ROOT}", FEINSCHLIFF_KERNELS="interpret")


def test_kernels_can_be_switched_off():
    run_python(SWITCHED_OFF, FEINSCHLIFF_KERNELS="0")


@needs_triton
def test_kernels_can_be_interpreted_by_anyone():
    run_python(INTERPRETED, FEINSCHLIFF_KERNELS="interpret")


MANY_SHAPES = """
import torch
from kernels import linear

linear.WORK, linear.ONEDNN = 0, True
weight = torch.randn(64, 64)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def read_prompts(lengths):
    for n in lengths:
        linear.product(torch.randn(n, 64), weight)

read_prompts(range(1, 2000, 60))
before = resident()
read_prompts(range(1, 1000))
grown = resident() - before
assert grown < 10e6, grown  # 559 MB without filling up rows
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.mkldnn.is_available(), reason="needs Linux and oneDNN"
)
def test_products_of_many_lengths_keep_no_memory():
    run_python(MANY_SHAPES)


@pytest.mark.parametrize("work", [0, 20_000, 10**9])
@pytest.mark.parametrize("rows", [1, 15, 200])
def test_products_of_layers_are_exact_whichever_library_multiplies(rows, work, monkeypatch):
    monkeypatch.setattr(linear, "WORK", work)
    monkeypatch.setattr(linear, "ONEDNN", torch.backends.mkldnn.is_available())
    inputs = [torch.randn(shape, requires_grad=True) for shape in [(rows, 40), (24, 40), (24,)]]
    upstream, (x, _, _) = torch.randn(rows, 24), inputs
    plain = torch.nn.functional.linear
    want = torch.autograd.grad(plain(*(t.double() for t in inputs)), inputs, upstream.double())
    got = torch.autograd.grad(linear.linear(*inputs), inputs, upstream)
    torch.testing.assert_close(linear.linear(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)
    for g, t in zip(got, want, strict=True):
        torch.testing.assert_close(g, t.float(), rtol=1e-5, atol=1e-4)
    found, exact = linear.product(upstream.T, x.T), (upstream.T.double() @ x.double()).float()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
