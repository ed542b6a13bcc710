"""Muon and AdamW against their formulas, one matrix at a time, in a tiny real model with random gradients."""
import copy

import pytest
import torch

from optim import Optimizer, polar, polar_dtype, wsd


def with_gradients(model, seed, scale=1.0):
    """Random gradients of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * scale * 10 ** torch.randn((), generator=generator)
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------------------
# The polar factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_brings_all_singular_values_near_one(dtype):
    generator = torch.Generator().manual_seed(0)
    for r, c in [(1, 8), (16, 16), (32, 96), (64, 65)]:
        u, v = (torch.linalg.qr(torch.randn(3, n, r, generator=generator))[0] for n in (r, c))
        for condition in (1.0, 10.0, 100.0):
            s = torch.logspace(0, -torch.tensor(condition).log10(), r) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
            x = (u * s[:, None]) @ v.mT
            found = polar(x, dtype)
            assert found.dtype == dtype
            sizes = torch.linalg.svdvals(found.float())
            assert 0.85 < sizes.min() and sizes.max() < 1.15, (r, c, condition)
            if dtype == torch.float32:  # and it turns nothing: U and V stay
                inner = u.mT @ found @ v
                assert (inner - inner.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-3


def test_polar_of_a_matrix_without_full_rank_and_of_none():
    a, b = torch.randn(2, 8, 2), torch.randn(2, 2, 12)
    sizes = torch.linalg.svdvals(polar(a @ b, torch.float32))
    assert sizes[:, :2].min() > 0.85 and sizes.max() < 1.15 and sizes[:, 2:].max() < 0.1
    assert polar(torch.zeros(1, 4, 6), torch.bfloat16).eq(0).all()


def test_polars_precision():
    cpu = torch.device("cpu")
    assert polar_dtype("bf16", cpu) == torch.bfloat16 and polar_dtype("fp32", cpu) == torch.float32
    assert polar_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert polar_dtype("auto", torch.device("mps")) == torch.float32


# ---------------------------------------------------------------------------------------------------------------------------------
# A step


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1, "ffn": 20, "qk_norm": False, "qkv_bias": True}, {"heads": 8, "ffn": 128}])
def test_muon_treats_every_matrix_alone(make_model, shape):
    """Wide, tall and fused ones: q, k, v, gate and up each move by lr sqrt(max(1, rows / columns)) in all their directions."""
    model = make_model(**shape)
    optimizer = Optimizer(model, 0.01, matrix_lr=0.03, momentum=0.9, weight_decay=0.2, polar="fp32")
    expected = {n: p.double() for n, p in weights(model).items()}
    momenta = {n: torch.zeros_like(p) for n, p in expected.items()}
    shapes = set()
    for step in range(3):
        gradients, multiple = with_gradients(model, step), 0.5 + step
        optimizer.step(multiple)
        lr = 0.03 * multiple
        for name, rows in model.matrices().items():
            g = gradients[name].double()
            momenta[name] = 0.9 * momenta[name] + 0.1 * g
            parts = []
            for w, u in zip(expected[name].split(rows), (0.1 * g + 0.9 * momenta[name]).split(rows)):
                shapes.add(u.shape[0] > u.shape[1])
                direction = polar(u[None] if u.shape[0] <= u.shape[1] else u.T[None], torch.float64)[0]
                direction = direction if u.shape[0] <= u.shape[1] else direction.T
                parts.append((1 - lr * 0.2) * w - lr * max(1, u.shape[0] / u.shape[1]) ** 0.5 * direction)
            expected[name] = torch.cat(parts)
    assert shapes == {True, False}
    for name in model.matrices():
        torch.testing.assert_close(weights(model)[name].double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert all(p.grad is None for p in model.parameters())


def test_matrices_are_the_trunks_and_their_rows_add_up(make_model):
    model = make_model(kv_heads=1)
    named = dict(model.named_parameters())
    assert set(model.matrices()) == {n for n, p in named.items() if n.startswith("blocks.") and p.dim() == 2}
    assert all(sum(rows) == len(named[name]) for name, rows in model.matrices().items())
    assert model.matrices()["blocks.1.qkv"] == [32, 8, 8]


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
def test_adamw_against_its_formula(make_model, matrix_lr):
    """m / (sqrt(v) + eps), bias-corrected, each parameter at its rate. Without Muon AdamW decays matrices, and never gains or biases."""
    model = make_model(qkv_bias=True)
    optimizer = Optimizer(model, 0.01, matrix_lr=matrix_lr, embed_lr=0.3, head_lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    expected = {n: p.double() for n, p in weights(model).items()}
    rates = {"embed": 0.3, "untied_head": 0.02}
    names = [n for n in expected if n not in model.matrices() or not matrix_lr]
    m, v = ({n: torch.zeros_like(expected[n]) for n in names} for _ in range(2))
    for step in range(1, 5):
        gradients, multiple = with_gradients(model, step), 1 / step
        optimizer.step(multiple)
        for n in names:
            lr, g = rates.get(n, 0.01) * multiple, gradients[n].double()
            m[n] = 0.8 * m[n] + 0.2 * g
            v[n] = 0.95 * v[n] + 0.05 * g * g
            decay = 0.1 if expected[n].dim() == 2 and not matrix_lr else 0.0
            expected[n] = (1 - lr * decay) * expected[n] - lr * (m[n] / (1 - 0.8**step)) / ((v[n] / (1 - 0.95**step)).sqrt() + 1e-10)
    for n in names:
        torch.testing.assert_close(weights(model)[n].double(), expected[n], rtol=1e-5, atol=1e-5, msg=n)


def test_a_multiple_of_zero_moves_nothing(make_model):
    model = make_model()
    before, optimizer = weights(model), Optimizer(model, 0.01, matrix_lr=0.02, weight_decay=0.1)
    with_gradients(model, 0)
    optimizer.step(0.0)
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())


def test_clipping(make_model):
    """A gradient beyond the limit is scaled to it, one below is not; the norm returned is that before."""
    for scale, limit, factor in [(1.0, 1e9, 1.0), (1.0, 0.5, None)]:
        models = [make_model(), make_model()]
        optimizers = [Optimizer(m, 0.01, matrix_lr=0.02, momentum=0.5, betas=(0.5, 0.5), polar="fp32") for m in models]
        for step in range(2):
            gradients = with_gradients(models[0], step)
            norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
            for p, g in zip(models[1].parameters(), gradients.values()):
                p.grad = g * min(1.0, limit / norm)
            assert optimizers[0].step(1.0, clip=limit).item() == pytest.approx(norm, rel=1e-5)
            optimizers[1].step(1.0)
        for (n, a), b in zip(models[0].named_parameters(), models[1].parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(make_model, bad):
    for clip in (0.0, 1.0):
        model = make_model()
        optimizer = Optimizer(model, 0.01, matrix_lr=0.02, weight_decay=0.1)
        with_gradients(model, 0)
        optimizer.step(1.0)
        before, state = weights(model), copy.deepcopy(optimizer.state())
        with_gradients(model, 1)
        model.blocks[1].k_norm.grad[3] = bad
        assert not optimizer.step(1.0, clip).isfinite()
        assert all(torch.equal(p, before[n]) for n, p in weights(model).items())
        assert all(torch.equal(t, state[k]) for k, t in optimizer.state().items())
        assert all(p.grad is None for p in model.parameters())


def test_parameters_without_a_gradient_stay(make_model):
    model = make_model()
    optimizer = Optimizer(model, 0.01, matrix_lr=0.02, weight_decay=0.1)
    before = weights(model)
    with_gradients(model, 0)
    frozen = ["embed", "blocks.0.qkv", "blocks.1.q_norm"]
    for n in frozen:
        dict(model.named_parameters())[n].grad = None
    optimizer.step(1.0)
    moved = {n for n, p in weights(model).items() if not torch.equal(p, before[n])}
    assert moved == set(before) - set(frozen)
    before = weights(model)
    assert optimizer.step(1.0) == 0  # nothing has one: a batch in which nothing was asked
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_is_everything_the_next_step_depends_on(make_model, matrix_lr, precision):
    how = dict(lr=0.01, matrix_lr=matrix_lr, weight_decay=0.1, polar=precision)
    straight = make_model()
    optimizer = Optimizer(straight, **how)
    for step in range(5):
        with_gradients(straight, step)
        optimizer.step(1.0 - step / 10)
        if step == 2:
            stopped, state = copy.deepcopy(straight), copy.deepcopy(optimizer.state())
    again = Optimizer(stopped, **how)
    again.load_state(state)
    for tensor in state.values():
        tensor.fill_(torch.nan)  # the optimizer keeps none of the tensors it was given
    for step in (3, 4):
        with_gradients(stopped, step)
        again.step(1.0 - step / 10)
    for (n, a), b in zip(straight.named_parameters(), stopped.parameters()):
        assert torch.equal(a, b), n
    assert optimizer.state().keys() == again.state().keys() == state.keys()
    assert all(torch.equal(t, again.state()[k]) for k, t in optimizer.state().items())


# ---------------------------------------------------------------------------------------------------------------------------------
# The schedule


def test_warm_up_stable_decay():
    rates = [wsd(step, 100, 10, 40) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10:61] == [1.0] * 51
    assert rates[99] == pytest.approx(1 / 40) and wsd(100, 100, 10, 40) == 0
    assert all(a - b == pytest.approx(1 / 40) for a, b in zip(rates[60:], rates[61:]))
    assert all(wsd(step, 7, 0, 0) == 1.0 for step in range(7))
    assert 0 < min(wsd(step, 5, 10, 10) for step in range(5)) and max(wsd(step, 5, 10, 10) for step in range(5)) < 1
