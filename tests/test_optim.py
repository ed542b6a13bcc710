"""Muon and AdamW against their formulas, one matrix at a time, in a tiny real model with random
gradients."""

import copy
import json
import os

import pytest
import torch
from conftest import random_model
from runs import free_port, succeeds

from model import parameter_table
from optim import Optimizer, choose_muon_dtype, polar, wsd
from runtime.errors import UserError
from runtime.process import setup


def with_gradients(model, seed):
    """Give every parameter a random gradient, of very different sizes; returns copies of them."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 10 ** torch.randn((), generator=generator)
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def matrices(model):
    """{name: rows} of what Muon updates."""
    return {name: row.rows for name, row in parameter_table(model.config).items() if row.muon}


def norm(gradients):
    return torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt().item()


# --------------------------------------------------------------------------------------------------
# The polar factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_brings_all_singular_values_near_one(dtype):
    generator = torch.Generator().manual_seed(0)
    for r, c in [(1, 8), (16, 16), (32, 96), (64, 65)]:
        u, v = (torch.linalg.qr(torch.randn(3, n, r, generator=generator))[0] for n in (r, c))
        for condition in (1.0, 10.0, 100.0):
            s = torch.logspace(0, -torch.tensor(condition).log10(), r) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
            found = polar((u * s[:, None]) @ v.mT, dtype)
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


def test_muons_precision():
    cpu = torch.device("cpu")
    assert choose_muon_dtype("bf16", cpu) == torch.bfloat16 and choose_muon_dtype("fp32", cpu) == torch.float32
    assert choose_muon_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_muon_dtype("auto", torch.device("mps")) == torch.float32


# --------------------------------------------------------------------------------------------------
# A step


def muon_direction(update):
    """sqrt(max(1, rows / columns)) polar(update), a matrix at a time, in fp64."""
    wide = update.shape[0] <= update.shape[1]
    direction = polar(update[None] if wide else update.T[None], torch.float64)[0]
    return max(1, update.shape[0] / update.shape[1]) ** 0.5 * (direction if wide else direction.T)


@pytest.mark.parametrize(
    "shape", [{}, {"kv_heads": 1, "ffn": 20, "qk_norm": False, "qkv_bias": True}, {"heads": 8, "ffn": 128}]
)
def test_muon_treats_every_matrix_alone(make_model, shape):
    """Wide, tall and stacked ones: q, k, v, gate and up are five matrices."""
    model = make_model(**shape)
    optimizer = Optimizer(model, 0.01, matrix_lr=0.03, momentum=0.9, weight_decay=0.2, muon_dtype="fp32")
    expected = {n: p.double() for n, p in weights(model).items()}
    momenta = {n: torch.zeros_like(p) for n, p in expected.items()}
    tall = set()
    for step in range(3):
        gradients, lr_scale = with_gradients(model, step), 0.5 + step
        optimizer.step(lr_scale)
        lr = 0.03 * lr_scale
        for name, rows in matrices(model).items():
            g = gradients[name].double()
            momenta[name] = 0.9 * momenta[name] + 0.1 * g
            updates = (0.1 * g + 0.9 * momenta[name]).split(rows)
            parts = []
            for w, u in zip(expected[name].split(rows), updates, strict=True):
                tall.add(u.shape[0] > u.shape[1])
                parts.append((1 - lr * 0.2) * w - lr * muon_direction(u))
            expected[name] = torch.cat(parts)
    assert tall == {True, False}
    for name in matrices(model):
        torch.testing.assert_close(weights(model)[name].double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
def test_adamw_against_its_formula(make_model, matrix_lr):
    """m / (sqrt(v) + eps), bias-corrected, each parameter at its rate.

    Without Muon AdamW decays matrices, and never gains or biases.
    """
    model = make_model(qkv_bias=True)
    rates = {"embed": 0.3, "untied_head": 0.02}
    optimizer = Optimizer(
        model, 0.01, matrix_lr=matrix_lr, embed_lr=0.3, head_lr=0.02, betas=(0.8, 0.95), weight_decay=0.1
    )
    expected = {n: p.double() for n, p in weights(model).items()}
    names = [n for n in expected if n not in matrices(model) or not matrix_lr]
    m, v = ({n: torch.zeros_like(expected[n]) for n in names} for _ in range(2))
    for step in range(1, 5):
        gradients, lr_scale = with_gradients(model, step), 1 / step
        optimizer.step(lr_scale)
        for n in names:
            lr, g = rates.get(n, 0.01) * lr_scale, gradients[n].double()
            m[n] = 0.8 * m[n] + 0.2 * g
            v[n] = 0.95 * v[n] + 0.05 * g * g
            m_hat, v_hat = m[n] / (1 - 0.8**step), v[n] / (1 - 0.95**step)
            decay = 0.1 if expected[n].dim() == 2 and not matrix_lr else 0.0
            expected[n] = (1 - lr * decay) * expected[n] - lr * m_hat / (v_hat.sqrt() + 1e-10)
    for n in names:
        torch.testing.assert_close(weights(model)[n].double(), expected[n], rtol=1e-5, atol=1e-5, msg=n)


def test_a_scale_of_zero_moves_nothing(make_model):
    model = make_model()
    before, optimizer = weights(model), Optimizer(model, 0.01, matrix_lr=0.02, weight_decay=0.1)
    with_gradients(model, 0)
    optimizer.step(0.0)
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())


@pytest.mark.parametrize("limit", [1e9, 0.5])
def test_clipping(make_model, limit):
    """A gradient beyond the limit is scaled to it, one below is not; the norm returned is that
    before."""
    models = [make_model(), make_model()]
    options = {"matrix_lr": 0.02, "momentum": 0.5, "betas": (0.5, 0.5), "muon_dtype": "fp32"}
    optimizers = [Optimizer(m, 0.01, **options) for m in models]
    for step in range(2):
        gradients = with_gradients(models[0], step)
        for p, g in zip(models[1].parameters(), gradients.values(), strict=True):
            p.grad = g * min(1.0, limit / norm(gradients.values()))
        found = optimizers[0].step(1.0, max_grad_norm=limit)
        assert found.item() == pytest.approx(norm(gradients.values()), rel=1e-5)
        optimizers[1].step(1.0)
    for (n, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=n)


WATCHED = ("attn.out", "mlp", "embed")


def step_in_two(rank, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    setup("cpu", 0)
    model = random_model()
    optimizer = Optimizer(model, 0.01, watch=WATCHED)
    with_gradients(model, rank)
    norms = {"all": optimizer.step(1.0, max_grad_norm=1e-3).item()}
    print(json.dumps(norms | optimizer.watched_norms))  # as log.jsonl would have them


def test_watched_norms_are_those_of_all_ranks_before_clipping(fork, make_model):
    """Read before the step, they would be those of one rank's share."""
    model, port = make_model(), free_port()
    children = [fork(step_in_two, rank, port) for rank in range(2)]
    shares = [with_gradients(model, rank) for rank in range(2)]
    gradients = {name: g + shares[1][name] for name, g in shares[0].items()}
    expected = {"all": norm(gradients.values())}
    for watched in WATCHED:
        expected[f"grad_norm_{watched}"] = norm(g for name, g in gradients.items() if watched in name)
    for child in children:
        found = json.loads(succeeds(child))
        assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="no parameter of this model has 'atn.out'"):
        Optimizer(model, 0.01, watch=("atn.out",))
    assert abs(norm(shares[0].values()) / expected["all"] - 1) > 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(make_model, bad, max_grad_norm):
    model = make_model()
    optimizer = Optimizer(model, 0.01, matrix_lr=0.02, weight_decay=0.1)
    with_gradients(model, 0)
    optimizer.step(1.0)
    before, state = weights(model), copy.deepcopy(optimizer.state())
    with_gradients(model, 1)
    model.blocks[1].attn.k_norm.grad[3] = bad
    assert not optimizer.step(1.0, max_grad_norm).isfinite()
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())
    assert all(torch.equal(t, state[k]) for k, t in optimizer.state().items())
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_a_gradient_stay(make_model):
    model = make_model()
    optimizer = Optimizer(model, 0.01, matrix_lr=0.02, weight_decay=0.1)
    before = weights(model)
    with_gradients(model, 0)
    frozen = ["embed", "blocks.0.attn.qkv", "blocks.1.attn.q_norm"]
    for n in frozen:
        model.get_parameter(n).grad = None
    optimizer.step(1.0)
    moved = {n for n, p in weights(model).items() if not torch.equal(p, before[n])}
    assert moved == set(before) - set(frozen)
    before = weights(model)
    assert optimizer.step(1.0) == 0  # nothing has one: a batch in which nothing is trained
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
@pytest.mark.parametrize("muon_dtype", ["fp32", "bf16"])
def test_state_is_everything_the_next_step_depends_on(make_model, matrix_lr, muon_dtype):
    options = {"lr": 0.01, "matrix_lr": matrix_lr, "weight_decay": 0.1, "muon_dtype": muon_dtype}
    straight = make_model()
    optimizer = Optimizer(straight, **options)
    for step in range(5):
        with_gradients(straight, step)
        optimizer.step(1.0 - step / 10)
        if step == 2:
            stopped, state = copy.deepcopy(straight), copy.deepcopy(optimizer.state())
    again = Optimizer(stopped, **options)
    again.load_state(state)
    for tensor in state.values():
        tensor.fill_(torch.nan)  # the optimizer keeps none of the tensors it was given
    for step in (3, 4):
        with_gradients(stopped, step)
        again.step(1.0 - step / 10)
    for (n, a), b in zip(straight.named_parameters(), stopped.parameters(), strict=True):
        assert torch.equal(a, b), n
    assert optimizer.state().keys() == again.state().keys() == state.keys()
    assert all(torch.equal(t, again.state()[k]) for k, t in optimizer.state().items())


# --------------------------------------------------------------------------------------------------
# The schedule


def test_warm_up_stable_decay():
    rates = [wsd(step, 100, 10, 40) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10:61] == [1.0] * 51
    assert rates[99] == pytest.approx(1 / 40) and wsd(100, 100, 10, 40) == 0
    assert all(a - b == pytest.approx(1 / 40) for a, b in zip(rates[60:], rates[61:], strict=False))
    assert all(wsd(step, 7, 0, 0) == 1.0 for step in range(7))
    short = [wsd(step, 5, 10, 10) for step in range(5)]
    assert 0 < min(short) and max(short) < 1


def test_parameters_of_one_rate_and_decay_are_one_group(make_model):
    model = make_model(tied=False)
    groups = Optimizer(model, 0.01, embed_lr=0.3, head_lr=0.02, weight_decay=0.1).adamw.param_groups
    found = sorted((group["lr"], group["weight_decay"], len(group["params"])) for group in groups)
    matrices, gains = 4 * 2, 4 * 2 + 1  # of two layers
    assert found == [(0.01, 0.0, gains), (0.01, 0.1, matrices), (0.02, 0.1, 1), (0.3, 0.1, 1)]
