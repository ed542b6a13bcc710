"""kernels/kl.py: the KL of two heads against fp64 on whole logits, finite differences, the kernel
by Triton's interpreter, and what must be exactly 0."""

from functools import partial

import pytest
import test_kernels
import torch
from test_kernels import DTYPES, check, check_kernel, needs_triton, normal, with_gradients
from torch.autograd import gradcheck

from kernels import kl, proof
from kernels.kl import linear_kl, linear_kl_reference

device = test_kernels.device
DIRECTIONS = pytest.mark.parametrize("reverse", [True, False])
SHAPES = [(1, 1, 2), (1, 5, 3), (130, 7, 11), (300, 16, 129)]  # tokens, width, vocabulary


def divergence(hidden, weight, teacher, reverse, temperature):
    """The definition, on whole logits. teacher: (hidden, weight)."""
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    log_q = (teacher[0].to(log_p) @ teacher[1].to(log_p).T / temperature).log_softmax(-1)
    if not reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum()


def teacher_for(n, v, device="cpu"):
    return [x.to(device) for x in normal(n + v, (n, 6), (v, 6))]


def with_teacher(op, teacher, **options):
    """op as a function of the student's (hidden, weight); the teacher's hidden has its dtype."""

    def f(hidden, weight):
        return op(hidden, weight, teacher[0].to(hidden.dtype), teacher[1].to(weight.dtype), **options)

    return f


@DIRECTIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_two_heads(dtype, reverse):
    for seed, (n, c, v) in enumerate(SHAPES):
        for temperature, chunk_mb in ((1.0, 64), (0.7, 0), (2.0, 0)):
            teacher = [x.to(dtype).double() for x in teacher_for(n, v)]
            rest = {"reverse": reverse, "temperature": temperature}
            op = with_teacher(linear_kl_reference, teacher, chunk_mb=chunk_mb, **rest)
            formula = partial(divergence, teacher=teacher, **rest)
            check(op, formula, normal(seed, (n, c), (v, c)), dtype, parameters=1)


@DIRECTIONS
def test_finite_differences_of_the_kl(reverse):
    inputs = [t.requires_grad_() for t in normal(1, (4, 3), (5, 3))]
    assert gradcheck(with_teacher(linear_kl_reference, teacher_for(4, 5), reverse=reverse, temperature=0.7), inputs)


@DIRECTIONS
def test_a_model_has_no_distance_to_itself(reverse):
    inputs = normal(0, (9, 8), (50, 8), dtype=torch.float32)
    total, d_hidden, d_weight = with_gradients(with_teacher(linear_kl, inputs, reverse=reverse), inputs)
    assert total == 0 and d_hidden.eq(0).all() and d_weight.eq(0).all()


def test_the_two_directions_are_told_apart_by_a_hand_made_case():
    """p = (1/2, 1/2), q = (1/4, 3/4)."""
    one = torch.ones(1, 1)
    student, teacher = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]).log()
    reverse = linear_kl(one, student, one, teacher, reverse=True).item()
    forward = linear_kl(one, student, one, teacher, reverse=False).item()
    assert reverse == pytest.approx(0.5 * torch.tensor([2.0, 2 / 3]).log().sum().item(), abs=1e-6)
    assert forward == pytest.approx((0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()).item(), abs=1e-6)


def test_gradients_are_made_only_if_they_are_wanted():
    hidden, weight = normal(0, (5, 4), (7, 4), dtype=torch.float32)
    teacher = teacher_for(5, 7)
    f = with_teacher(linear_kl_reference, teacher)
    _, d_hidden, d_weight = with_gradients(f, [hidden, weight])
    scale = normal(99, ())[0].item()  # with_gradients's upstream number
    frozen_head, frozen_trunk = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    f(frozen_head, weight).backward()
    f(hidden, frozen_trunk).backward()
    torch.testing.assert_close(frozen_head.grad * scale, d_hidden)
    torch.testing.assert_close(frozen_trunk.grad * scale, d_weight)
    with torch.no_grad():
        assert not f(frozen_head, weight).requires_grad


def test_vocabularies_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="vocabularies of 7 and 8 tokens"):
        linear_kl(torch.zeros(2, 3), torch.zeros(7, 3), torch.zeros(2, 3), torch.zeros(8, 3))


# --------------------------------------------------------------------------------------------------
# The kernel


@needs_triton
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, c, v", [(1, 1, 2), (130, 7, 65), (3, 8, 8193)])
def test_kl_kernel(n, c, v, dtype, reverse, device):
    teacher = [x.to(dtype).double() for x in teacher_for(n, v, device)]
    rest = {"reverse": reverse, "temperature": 0.7}
    op, reference = (with_teacher(f, teacher, chunk_mb=0, **rest) for f in (linear_kl, linear_kl_reference))
    formula = partial(divergence, teacher=teacher, **rest)
    check_kernel(op, reference, formula, normal(n, (n, c), (v, c)), dtype, 1, device)


@needs_triton
@DIRECTIONS
def test_kl_kernel_of_tokens_that_cannot_be(reverse, device):
    """Logits of -inf on both sides: no nan from 0 x inf, and a gradient of 0."""
    hidden = torch.ones(2, 1, device=device)
    weight, teacher = torch.full((2, 70, 1), -torch.inf, device=device)
    weight[:3, 0], teacher[:3, 0] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 1.0])
    found, _, d_weight = kl.linear_kl_forward(hidden, weight, hidden, teacher, reverse, 1.0, 64, False, True)
    expected = divergence(hidden.cpu(), weight[:3].cpu(), (hidden.cpu(), teacher[:3].cpu()), reverse, 1.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert d_weight[:3].isfinite().all() and d_weight[3:].eq(0).all()


@needs_triton
def test_kl_kernel_shows_a_nan_and_takes_no_tokens(device):
    hidden, weight = [x.to(device) for x in normal(0, (3, 4), (9, 4), dtype=torch.float32)]
    total, d_hidden, d_weight = with_gradients(
        lambda h, w: linear_kl(h, w, h.detach(), w.detach()), [hidden[:0], weight]
    )
    assert total == 0 and d_hidden.shape == (0, 4) and d_weight.eq(0).all()
    broken = hidden.clone()
    broken[1, 0] = torch.nan
    assert linear_kl(broken, weight, hidden, weight).isnan() and linear_kl(hidden, weight, broken, weight).isnan()


@needs_triton
def test_proof_and_registration(device):
    torch.manual_seed(0)
    assert proof.prove_op("linear_kl", device) == ""
    hidden, weight = [x.to(device) for x in normal(0, (9, 16), (40, 16), dtype=torch.float32)]
    arguments = hidden, weight, hidden * 2, weight, True, 0.7, 64, True, True
    torch.library.opcheck(kl.linear_kl_forward.default, arguments)
