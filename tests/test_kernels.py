"""Every op, forward and each gradient, against a plain formula in fp64 written here, and by finite differences."""
import pytest
import torch
from torch.autograd import gradcheck

from kernels.act import swiglu_reference
from kernels.attention import attention_reference, batches
from kernels.decode import decode_attention_reference
from kernels.head import IGNORE, chunks, linear_cross_entropy_reference, linear_logprob_reference
from kernels.norm import rms_norm_reference
from kernels.rope import qk_norm_rope_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def normal(seed, *shapes, dtype=torch.float64):
    """Tensors of standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(f, inputs):
    """[outputs..., gradients...] of f for upstream gradients that are the same for every f."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [g.to(o.dtype) for g, o in zip(normal(99, *[o.shape for o in outs]), outs)]
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
