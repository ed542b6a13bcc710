"""Attention's and decoding's kernels, forward and every gradient, against plain formulas in fp64 written here; and the whole model on all kernels.

The rule (flash-attention's, and the RMS of flash-linear-attention's): no error larger than twice that of PyTorch's own ops in the same dtype, and in the
mean under RMS of the truth. The kernels run on the GPU, or by the interpreter, there in smaller blocks but where the table of sizes itself is meant.
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from data.pack import Pack, fill, next_tokens, pack
from kernels import _lib, attention, decode
from kernels._lib import excess, with_gradients
from kernels.attention import attention_reference, batches, layout, tiles
from kernels.decode import append_rope, append_rope_reference, count_splits, decode_attention, decode_attention_reference
from kernels.head import IGNORE, linear_cross_entropy
from model import GPT, KVCache, logprobs
from optim import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of numbers that a mask then hides
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
    for a, n in zip(boundaries(lengths).tolist(), lengths):
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        seen = (distance >= 0) & (distance < (window or n))
        scores = torch.einsum("qhd,khd->hqk", q[a : a + n], k[a : a + n]) / math.sqrt(q.shape[2])
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[a : a + n]))
    return torch.cat(parts)


def judge(found, own, truth, dtype, names):
    """The rule, for each of several results."""
    for f, o, t, name in zip(found, own, truth, names, strict=True):
        assert f.dtype == dtype and excess(f, o, t, FLOOR[dtype]) <= 1, (name, excess(f, o, t, FLOOR[dtype]))
        rms = (f.double() - t).norm() / math.sqrt(f.numel())
        assert rms <= RMS[dtype] * t.norm() / math.sqrt(f.numel()) + FLOOR[dtype], (name, rms.item())


def check(device, lengths, heads, kv_heads, head_dim, dtype, window=0, scale=1.0):
    """Kernels against the formula, for parts of one fused tensor."""
    cu, rows = boundaries(lengths).to(device), [heads, kv_heads, kv_heads]
    qkv = (scale * normal(len(lengths), sum(lengths), sum(rows), head_dim)).to(device, dtype)
    parts = list(qkv.split(rows, dim=1))
    assert all(attention.heads_together(x) is x for x in parts)  # nothing is copied
    assert isinstance(layout(cu, qkv, head_dim), attention.Tiles)
    found = with_gradients(lambda x: attention.attention(*x.split(rows, dim=1), layout(cu, x, head_dim), window), [qkv])
    own = with_gradients(lambda x: attention_reference(*x.split(rows, dim=1), batches(cu), window), [qkv])
    truth = with_gradients(lambda x: formula(*x.split(rows, dim=1), lengths, window), [qkv.double()])
    found, own, truth = ([out, *grad.split(rows, dim=1)] for out, grad in (found, own, truth))
    judge(found, own, truth, dtype, ["out", "dq", "dk", "dv"])


# ---------------------------------------------------------------------------------------------------------------------------------
# Attention

MIXES = {  # lengths of documents, and a head width
    "one token": ([1], 32),
    "only single tokens": ([1] * 6, 64),
    "one off a block": ([15, 16, 17, 31, 32, 33], 32),
    "empty ones among them": ([0, 5, 0, 0, 40, 0], 32),
    "odd": ([7, 61, 3], 128),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
def test_attention(mix, dtype, small, kernels_run):
    lengths, head_dim = MIXES[mix]
    heads, kv_heads = [(2, 2), (3, 1), (4, 1)][(list(MIXES).index(mix) + list(RMS).index(dtype)) % 3]
    check(kernels_run, lengths, heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 9, 18, 1000])
def test_windows(window, dtype, small, kernels_run):
    check(kernels_run, [34, 1, 50], 2, 1, 32, dtype, window)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_sizes_of_the_table(head_dim, kernels_run):
    check(kernels_run, [1, 129, 0, 128, 200], 2, 1, head_dim, torch.bfloat16)


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e3), (torch.bfloat16, 1e2), (torch.float16, 1e2)])
def test_huge_scores(dtype, scale, small, kernels_run):
    """The softmax becomes a choice; nothing overflows, and an output is still a mean of values."""
    q, k, v = (scale * normal(1, 70, 4, 32)).to(kernels_run, dtype).split([2, 1, 1], dim=1)
    cu = boundaries([50, 20]).to(kernels_run)
    out, *grads = with_gradients(lambda *x: attention.attention(*x, layout(cu, x[0], 32)), [q, k, v])
    assert all(x.isfinite().all() for x in (out, *grads)) and out.abs().max() <= v.abs().max()


def test_every_entry_is_written_and_three_runs_are_equal(small, kernels_run, monkeypatch):
    """Poison in whatever memory the launches allocate would show; and no sum depends on which program comes first."""
    q, k, v = normal(2, 83, 6, 32).to(kernels_run, torch.bfloat16).split([4, 1, 1], dim=1)
    cu = boundaries([0, 40, 1, 42]).to(kernels_run)
    run = lambda: with_gradients(lambda *x: attention.attention(*x, layout(cu, x[0], 32)), [q, k, v])  # noqa: E731
    first, poison = run(), lambda make: lambda *a, **b: make(*a, **b).fill_(7)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    for _ in range(2):
        assert all(map(torch.equal, first, run()))


def test_a_document_never_notices_its_neighbours(small, kernels_run):
    """Packed is alone, bit for bit, even beside a document of inf and nan."""
    lengths = [33, 20, 47]
    inputs = [x.contiguous() for x in normal(3, 100, 4, 32).to(kernels_run, torch.bfloat16).split([2, 1, 1], dim=1)]
    upstream = normal(4, 100, 2, 32).to(inputs[0])

    def run(inputs, upstream, lengths):
        leaves, cu = [x.clone().requires_grad_() for x in inputs], boundaries(lengths).to(kernels_run)
        out = attention.attention(*leaves, layout(cu, leaves[0], 32))
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    for x, value in zip(inputs, (torch.inf, torch.nan, torch.inf)):
        x[33:53] = value
    packed = run(inputs, upstream, lengths)
    for here in (slice(0, 33), slice(53, 100)):
        alone = run([x[here] for x in inputs], upstream[here], [here.stop - here.start])
        assert all(torch.equal(a, p[here]) and a.isfinite().all() for a, p in zip(alone, packed))


def test_strange_strides_and_gradients(small, kernels_run):
    """Heads that do not lie together, an upstream gradient that is one number expanded, and one of zeros."""
    lengths, head_dim = [20, 25], 32
    inputs = [normal(i, n, 45, head_dim).to(kernels_run).transpose(0, 1) for i, n in enumerate((4, 2, 2))]  # [N, n, Dh] of [n, N, Dh]
    cu = boundaries(lengths).to(kernels_run)

    def gradients(f, inputs, pull):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(pull(f(*leaves)), leaves)

    kernels = lambda *x: attention.attention(*x, layout(cu, x[0], head_dim))  # noqa: E731
    found = gradients(kernels, inputs, torch.sum)
    own = gradients(lambda *x: attention_reference(*x, batches(cu)), inputs, torch.sum)
    truth = gradients(lambda *x: formula(*x, lengths), [x.double() for x in inputs], torch.sum)
    judge(found, own, truth, torch.float32, ["dq", "dk", "dv"])
    assert all(g.eq(0).all() for g in gradients(kernels, inputs, lambda out: (out * 0.0).sum()))


@pytest.mark.parametrize("lengths", [[1], [5, 1, 17, 0, 64, 2, 9], [0, 0, 7], [1] * 50, [200, 90, 301], [128] * 3])
def test_tiles_hold_every_token_once_longest_work_first(lengths):
    cu, rows, size = boundaries(lengths).tolist(), sum(lengths), attention.TILE
    found = tiles(boundaries(lengths), rows)
    for table, work in ((found.queries, lambda first, begin, end: first - begin), (found.keys, lambda first, begin, end: end - first)):
        assert table.shape == (rows // size + len(lengths), 3) and table.dtype == torch.int32
        used = [tuple(row) for row in table.tolist() if row[2] > 0]
        assert sorted(used) == [(first, a, b) for a, b in zip(cu, cu[1:]) for first in range(a, b, size)]
        assert [work(*row) for row in used] == sorted((work(*row) for row in used), reverse=True)
        assert all(row == [0, 0, 0] for row in table.tolist() if row[2] == 0)


def test_which_path_runs(kernels_run, monkeypatch):
    cu, x = boundaries([3, 4]).to(kernels_run), torch.zeros(7, 8, device=kernels_run)
    assert isinstance(layout(cu, x, 64), attention.Tiles)
    assert not isinstance(layout(cu, x, 16), attention.Tiles) and not isinstance(layout(cu, x.double(), 64), attention.Tiles)
    monkeypatch.setattr(_lib, "OFF", {"attention"})
    assert not isinstance(layout(cu, x, 64), attention.Tiles)


def test_windows_of_the_reference():
    for window, lengths in itertools.product((1, 4, 50), ([9, 9], [5, 1, 17, 30])):
        q, k, v = normal(0, sum(lengths), 4, 8).double().split([2, 1, 1], dim=1)
        found = attention_reference(q, k, v, batches(boundaries(lengths)), window)
        torch.testing.assert_close(found, formula(q, k, v, lengths, window), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------------------
# Decoding


def decode_formula(q, k_cache, v_cache, lengths):
    """The last token of each sequence, by the formula above."""
    rows = []
    for b, n in enumerate(lengths.tolist()):
        rows.append(formula(q[b].expand(n, -1, -1), k_cache[b, :n], v_cache[b, :n], [n])[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, head_dim, splits", [(2, 2, 64, 1), (4, 1, 128, 3), (8, 1, 32, 12), (3, 1, 64, 2)])
def test_decode_attention(heads, kv_heads, head_dim, splits, dtype, small, kernels_run, monkeypatch):
    """Ragged lengths, more splits than some of them have blocks, nan wherever a slot holds nothing."""
    monkeypatch.setattr(decode, "count_splits", lambda *_: splits)
    lengths = torch.tensor([1, 16, 17, 200, 130], device=kernels_run)
    q, k, v = (normal(i, *shape).to(kernels_run, dtype) for i, shape in enumerate([(5, heads, head_dim), (5, 210, kv_heads, head_dim), (5, 210, kv_heads, head_dim)]))
    own, truth = decode_attention_reference(q, k, v, lengths), decode_formula(q.double(), k.double(), v.double(), lengths)
    for b, n in enumerate(lengths.tolist()):
        k[b, n:] = v[b, n:] = torch.nan
    found = decode_attention(q, k, v, lengths)
    judge([found], [own], [truth], dtype, ["out"])
    assert torch.equal(found, decode_attention(q, k, v, lengths))


def test_the_count_of_splits():
    assert count_splits(4096, 128, 64, 132) == 1  # the GPU is full as it is
    assert count_splits(256, 1, 64, 132) == 1  # four blocks are not worth it
    assert count_splits(8192, 1, 64, 132) == 32  # nothing fills the GPU: as many as there may be
    assert count_splits(8192, 8, 64, 132) == 15  # 120 of 132 places, in one wave
    assert count_splits(2048, 60, 64, 132) == 2  # 120 of 132 again


def append_formula(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    """What append_rope leaves, as (q, k_cache, v_cache), the rotation by complex numbers."""
    k_cache, v_cache, kv_heads = k_cache.clone(), v_cache.clone(), k_cache.shape[2]
    turn = torch.complex(cos, sin)[lengths][:, None]

    def make(x, weight):
        if weight is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
        z = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    for b, n in enumerate(lengths.tolist()):
        k_cache[b, n], v_cache[b, n] = make(k, k_weight)[b], v[b]
    return make(q, q_weight), k_cache, v_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 32), (12, 2, 64), (3, 1, 128)])
def test_append_rope(heads, kv_heads, head_dim, norm, dtype, kernels_run):
    B, S = 3, 9
    qkv, *caches = (normal(i, *shape).to(kernels_run, dtype) for i, shape in enumerate([(B, heads + 2 * kv_heads, head_dim)] + [(B, S, kv_heads, head_dim)] * 2))
    weights = [normal(5, 2, head_dim).to(kernels_run)[i] if norm else None for i in range(2)]
    angle = 6 * normal(6, S, head_dim // 2).to(kernels_run)
    lengths = torch.tensor([0, S - 1, 4], device=kernels_run)
    wide = lambda x: None if x is None else x.double()  # noqa: E731
    double = append_formula(*map(wide, [qkv, *weights, angle.cos(), angle.sin()]), heads, 1e-6, *map(wide, caches), lengths)
    results = []
    for op in (append_rope, append_rope_reference):
        k_cache, v_cache = (x.clone() for x in caches)
        results.append((op(qkv, *weights, angle.cos(), angle.sin(), heads, 1e-6, k_cache, v_cache, lengths), k_cache, v_cache))
    judge(*results, double, dtype, ["q", "k_cache", "v_cache"])
    changed = [(new != old).flatten(2).any(-1) for new, old in zip(results[0][1:], caches)]
    assert all(c.nonzero().tolist() == [[b, n] for b, n in enumerate(lengths.tolist())] for c in changed)  # no other row


def test_a_full_slot_is_left_alone(kernels_run):
    caches = [normal(i, 2, 4, 1, 32).to(kernels_run) for i in range(2)]
    before, angle = [x.clone() for x in caches], normal(2, 4, 16).to(kernels_run)
    append_rope(normal(3, 2, 4, 32).to(kernels_run), None, None, angle, angle, 2, 1e-6, *caches, torch.tensor([4, 1], device=kernels_run))
    assert all(torch.equal(new[0], old[0]) and not torch.equal(new[1, 1], old[1, 1]) for new, old in zip(caches, before))


# ---------------------------------------------------------------------------------------------------------------------------------
# What PyTorch is told of them


def test_opcheck(small, kernels_run):
    q, k, v = (x.contiguous() for x in normal(0, 20, 4, 32).to(kernels_run).split([2, 1, 1], dim=1))
    table, ops = tiles(boundaries([9, 11]).to(kernels_run), 20), torch.ops.feinschliff
    torch.library.opcheck(ops.attention.default, (q, k, v, table.queries, 0))
    out, lse = ops.attention(q, k, v, table.queries, 3)
    torch.library.opcheck(ops.attention_backward.default, (q, q, k, v, out, lse, *table, 3))
    caches = [normal(i, 20, 4, 1, 32).to(kernels_run) for i in range(2)]
    lengths, angle = torch.full((20,), 2, device=kernels_run), normal(2, 4, 16).to(kernels_run)
    torch.library.opcheck(ops.decode_attention.default, (q, *caches, lengths))
    for weight in (normal(3, 32).to(kernels_run), None):
        torch.library.opcheck(ops.append_rope.default, (normal(4, 20, 4, 32).to(kernels_run), weight, weight, angle, angle, 2, 1e-6, *caches, lengths))


def test_compiled_is_eager(small, kernels_run):
    cu, qkv = boundaries([20, 1, 19]).to(kernels_run), normal(0, 40, 4, 32).to(kernels_run)
    op = lambda x, cu: attention.attention(*x.split([2, 1, 1], dim=1), layout(cu, x, 32))  # noqa: E731
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    both = lambda: map(torch.equal, with_gradients(lambda x: op(x, cu), [qkv]), with_gradients(lambda x: compiled(x, cu), [qkv]))  # noqa: E731
    assert all(both())
    cu = boundaries([5, 5, 30]).to(kernels_run)
    with torch.compiler.set_stance("fail_on_recompile"):  # other documents, the same graph
        assert all(both())


SHAPE = dict(width=64, heads=2, kv_heads=1, head_dim=32)


def documents(*lengths):
    generator = torch.Generator().manual_seed(0)
    return pack([torch.randint(61, (n,), generator=generator) for n in lengths])


def test_a_pass_and_a_step_never_wait_for_the_gpu(make_model, kernels_run):
    """Fake tensors have no numbers: whatever looked at one, to decide or to size something, would fail."""
    model = make_model(**SHAPE).to(kernels_run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, cu = torch.zeros(2, 24, dtype=torch.int64, device=kernels_run), torch.zeros(4, dtype=torch.int32, device=kernels_run)
        p, cache = Pack(tokens[0], tokens[1], cu, 24), KVCache(model, 3, 30)
        logprobs(model, p).sum().backward()
        with torch.no_grad():
            model(p, cache, torch.zeros(3, dtype=torch.int64, device=kernels_run))
        assert model.step(torch.zeros(3, dtype=torch.int64, device=kernels_run), cache).shape == (3, 64)


# ---------------------------------------------------------------------------------------------------------------------------------
# The whole model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE | dict(qk_norm=False, qkv_bias=True)], ids=["qwen3", "qwen2"])
def test_the_model_on_kernels_is_the_model_on_references(shape, dtype, make_model, small, kernels_run, monkeypatch):
    """log-probabilities and gradients within 1e-5 of the largest (bf16: 2 % in the mean)."""
    monkeypatch.setattr(GPT, "compute_dtype", dtype)
    model, p = make_model(noise=0.1, **shape).to(kernels_run), documents(33, 1, 20).to(kernels_run)
    found = []
    for mode in (_lib.MODE, "0"):
        monkeypatch.setattr(_lib, "MODE", mode)
        logp = logprobs(model, p)
        found.append([logp.detach(), *torch.autograd.grad(logp.sum(), [*model.parameters()])])
    for a, b in zip(*found):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.norm()


def test_the_model_compiles_as_one_graph(make_model, small, kernels_run):
    model, p = make_model(noise=0.1, **SHAPE).to(kernels_run), documents(20, 1, 9).to(kernels_run)
    eager = model(p)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(p), eager, rtol=0, atol=1e-6)


def test_cached_decoding_is_the_full_pass(make_model, small, kernels_run, monkeypatch):
    monkeypatch.setattr(GPT, "compute_dtype", torch.float32)
    model, p = make_model(noise=0.1, **SHAPE).to(kernels_run), documents(20, 9).to(kernels_run)
    with torch.no_grad():
        full, cache = model(p), KVCache(model, 2, 25)
        start = documents(17, 6).to(kernels_run)
        start.tokens = torch.cat([p.tokens[:17], p.tokens[20:26]])
        model(start, cache, torch.tensor([1, 0], device=kernels_run))  # document 0 in slot 1
        for t in range(3):
            hidden = model.step(torch.stack([p.tokens[26 + t], p.tokens[17 + t]]), cache)
            torch.testing.assert_close(hidden, torch.stack([full[26 + t], full[17 + t]]), rtol=0, atol=2e-5)


def test_twenty_steps_of_training(make_model, small, kernels_run, monkeypatch):
    """Losses on kernels within 1e-3 of those on references all the way (fp32; sums in another order, twenty times through the optimizer)."""
    monkeypatch.setattr(GPT, "compute_dtype", torch.float32)
    p, losses = documents(33, 15).to(kernels_run), {}
    for mode in (_lib.MODE, "0"):
        monkeypatch.setattr(_lib, "MODE", mode)
        model = make_model(noise=0.0, layers=1, **SHAPE).to(kernels_run)
        optimizer, losses[mode] = Optimizer(model, 0.01, matrix_lr=0.02, embed_lr=0.1, polar="fp32"), []
        for _ in range(20):
            loss = linear_cross_entropy(model(p), model.head, next_tokens(p, IGNORE)) / 46
            loss.backward()
            optimizer.step(1.0)
            losses[mode].append(loss.item())
    found, expected = losses.values()
    assert expected[-1] < expected[0] - 2
    assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-3, (found, expected)


# ---------------------------------------------------------------------------------------------------------------------------------
# The proof


@pytest.mark.parametrize("op", ["attention", "decode_attention", "append_rope"])
def test_every_op_proves_itself(op, kernels_run):
    assert _lib.prove_op(op, kernels_run) == ""


@pytest.mark.parametrize("op, module, launch, wrong", [
    ("attention", attention, "attention_backward", lambda grads: (grads[0], grads[1] * 1.05, grads[2])),
    ("decode_attention", decode, "decode_kernels", lambda out: out + 0.05),
])  # fmt: skip
def test_a_kernel_with_a_bug_is_switched_off(op, module, launch, wrong, kernels_run, monkeypatch, capsys, tmp_path):
    """The proof sees it, says so, remembers it, and the reference runs."""
    right, prove_op, runs = getattr(module, launch), _lib.prove_op, []
    monkeypatch.setattr(module, launch, lambda *args: wrong(right(*args)))
    monkeypatch.setattr(_lib, "PROOFS", {op: _lib.PROOFS[op]})
    monkeypatch.setattr(_lib, "OFF", set())
    monkeypatch.setattr(_lib, "proof_key", lambda device: "this machine")
    monkeypatch.setattr(_lib, "prove_op", lambda op, device: runs.append(op) or prove_op(op, kernels_run))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        assert set(_lib.prove(torch.device("cuda"))) == {op}
        assert f"WARNING: the kernel {op} is switched off on this machine: its error is" in capsys.readouterr().err
    assert runs == [op]  # the second time the verdict was read
    assert not _lib.use(op, torch.zeros(1, device=kernels_run)) and _lib.use("another", torch.zeros(1, device=kernels_run))


# ---------------------------------------------------------------------------------------------------------------------------------
# Filled packs


@pytest.mark.parametrize("lengths, size, count", [([5, 1, 17, 9], 64, 8), ([5, 1, 17, 9], 32, 4), ([4, 4], 12, 3), ([3], 10, 20)])
def test_filler_changes_nothing(lengths, size, count, make_model):
    """Log-probabilities of the real tokens, and the gradient of their sum over the whole filled pack, are those of the pack as it was."""
    model, p = make_model().double(), documents(*lengths)
    filled, N = fill(p, size, count), sum(lengths)
    assert (filled.tokens.shape, filled.positions.shape, filled.cu.shape) == ((size,), (size,), (count + 1,)) and filled.cu.dtype == torch.int32
    assert filled.cu[-1] == size and filled.cu.diff().min() >= 0 and filled.cu.diff().max() == filled.max_len == p.max_len
    assert torch.equal(next_tokens(filled, IGNORE), F.pad(next_tokens(p, IGNORE), (0, size - N), value=IGNORE))
    found = []
    for some in (p, filled):
        logp = logprobs(model, some)
        found.append([logp[:N].detach(), *torch.autograd.grad(logp.sum(), [*model.parameters()])])
        assert logp[N:].eq(0).all()
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_filler_that_does_not_fit():
    for size, count in [(31, 9), (64, 4), (64, 5)]:
        with pytest.raises(ValueError, match="a pack of 32 tokens in 4 documents, the longest of 17"):
            fill(documents(5, 1, 17, 9), size, count)
