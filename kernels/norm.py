"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight  (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)

Also with the residual addition that precedes it in a transformer: s = x + delta, y = rms_norm(s),
in one pass over memory. Sums are fp32 (fp64 for fp64 input).
"""

import torch

from kernels._lib import cdiv, contiguous, next_power_of_2, register, sm_count, tl, triton, use
from kernels.proof import proof


def inverse_rms(x, eps):
    """x [..., C] -> [..., 1]: 1 / sqrt(mean(x^2) + eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalise(x, weight, eps):
    """(rms_norm(x), 1 / rms(x) [N, 1])."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = inverse_rms(wide, eps)
    return (wide * rstd).mul_(weight).to(x.dtype), rstd


class RMSNormReference(torch.autograd.Function):
    """Its own backward: on a CPU both autograd through the small ops and `F.rms_norm` take several
    times as long."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        # With r = (mean(x^2) + eps)^(-1/2): dx = r (g w - x r^2 mean(g w x)), and dw is the sum of
        # g x r over rows. Both begin with p = g x.
        x, weight, rstd = ctx.saved_tensors
        x, g = x.to(rstd.dtype), grad.to(rstd.dtype)
        p = g * x  # [N, C]
        mean = torch.mv(p, weight)[:, None].mul_(rstd.square()).div_(x.shape[-1])  # [N, 1]
        dx = (g * weight).addcmul_(x, mean, value=-1).mul_(rstd)
        return dx.to(grad.dtype), torch.mv(p.t(), rstd[:, 0]), None


def rms_norm_reference(x, weight, eps):
    """See rms_norm."""
    if torch.is_grad_enabled():
        return RMSNormReference.apply(x, weight, eps)
    return normalise(x, weight, eps)[0]  # an autograd.Function costs time without gradients too


def add_rms_norm_reference(x, delta, weight, eps):
    """See add_rms_norm."""
    total = x + delta
    return total, rms_norm_reference(total, weight, eps)


# --------------------------------------------------------------------------------------------------
# The kernels. A program takes ROWS whole rows; COLS is C rounded up to a power of two. Everything
# is fp32, with one rounding at each store.

PROGRAMS = 4  # of the backward, per multiprocessor


def tile(C, elements):
    """The (rows, columns, warps) of a tile of about `elements` numbers, or of one longer row."""
    cols = next_power_of_2(C)
    rows = max(1, elements // cols)
    return rows, cols, min(max(4 * rows * cols // elements, 4), 32)


@triton.jit(do_not_specialize=["N"])
def rms_norm_forward_kernel(
    x_ptr, delta_ptr, weight_ptr, total_ptr, y_ptr, rstd_ptr, N, C, eps, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # N * C exceeds int32
    cols = tl.arange(0, COLS)
    inside = (rows[:, None] < N) & (cols[None, :] < C)
    offsets = rows[:, None] * C + cols[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        total = (x + delta).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, total, mask=inside)
        x = total.to(tl.float32)  # the next layers see the rounded sum, so that is normalised
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, (x * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def rms_norm_backward_kernel(
    grad_ptr, d_total_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dw_ptr, N, C, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Each program takes every num_programs-th tile and keeps its part of dw in registers.

    The parts, [programs, C], are added in a fixed order afterwards. Atomics would save that
    addition and give different bits every time.
    """
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    # Its rows are summed after the loop: inside, each tile would cost an exchange between threads.
    dw = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(tl.program_id(0).to(tl.int64) * ROWS, N, tl.num_programs(0) * ROWS):
        inside = (rows[:, None] < N - start) & (cols[None, :] < C)
        rstd = tl.load(rstd_ptr + start + rows, mask=rows < N - start, other=0.0)[:, None]
        normed = tl.load(x_ptr + start * C + offsets, mask=inside, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + start * C + offsets, mask=inside, other=0.0).to(tl.float32)
        dw += grad * normed
        g = grad * weight
        dx = (g - normed * (tl.sum(g * normed, 1) / C)[:, None]) * rstd
        if d_total_ptr is not None:  # the gradient that reaches the sum past the norm
            dx += tl.load(d_total_ptr + start * C + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start * C + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * C + cols, tl.sum(dw, 0), mask=cols < C)


def forward_fake(x, delta, weight, eps):
    total = x.new_empty(0 if delta is None else x.shape)
    return total, x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@register("rms_norm(Tensor x, Tensor? delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", fake=forward_fake)
def rms_norm_forward(x, delta, weight, eps):
    """Returns the sum (empty without delta), y, and rstd fp32 [N]."""
    N, C = x.shape
    total, y, rstd = forward_fake(x, delta, weight, eps)
    rows, cols, warps = tile(C, 4096)
    rms_norm_forward_kernel[(cdiv(N, rows),)](
        *contiguous(x, delta, weight), total, y, rstd, N, C, eps, ROWS=rows, COLS=cols, num_warps=warps
    )
    return total, y, rstd


@register(
    "rms_norm_backward(Tensor grad, Tensor? d_total, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda grad, d_total, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
def rms_norm_backward(grad, d_total, x, weight, rstd):
    """x: what was normalised. Returns dx, to which d_total (or None) is added, and dw."""
    N, C = x.shape
    rows, cols, warps = tile(C, 2048)
    programs = min(cdiv(N, rows), PROGRAMS * sm_count(x.device))
    dx, partial = x.new_empty(N, C), x.new_empty(programs, C, dtype=torch.float32)
    tensors = contiguous(grad, d_total, x, weight, rstd)
    rms_norm_backward_kernel[(programs,)](*tensors, dx, partial, N, C, ROWS=rows, COLS=cols, num_warps=warps)
    return dx, partial.sum(0).to(weight.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        total, y, rstd = rms_norm_forward(x, delta, weight, eps)
        ctx.save_for_backward(x if delta is None else total, weight, rstd)
        return y if delta is None else (total, y)

    @staticmethod
    def backward(ctx, *grads):
        d_total = grads[0] if len(grads) == 2 else None
        dx, dw = rms_norm_backward(grads[-1], d_total, *ctx.saved_tensors)
        return dx, None if d_total is None else dx, dw, None


def rms_norm(x, weight, eps):
    """x [N, C], weight fp32 [C] -> [N, C] in x's dtype."""
    return RMSNorm.apply(x, None, weight, eps) if use("rms_norm", x) else rms_norm_reference(x, weight, eps)


def add_rms_norm(x, delta, weight, eps):
    """x and delta [N, C], weight fp32 [C] -> (x + delta, rms_norm(x + delta)), [N, C] in x's dtype.

    The sum is rounded to x's dtype before it is normalised.
    """
    if use("add_rms_norm", x):
        return RMSNorm.apply(x, delta, weight, eps)
    return add_rms_norm_reference(x, delta, weight, eps)


PROOF_WIDTHS = 256, 512, 768, 2048, 4096  # one for each number of columns up to 4096


def proof_inputs(device, per_width):
    """[x, ..., weight] of each width, `per_width` tensors [37, C] and a weight."""
    inputs = []
    for C in PROOF_WIDTHS:
        inputs += [torch.randn(37, C, device=device).bfloat16() for _ in range(per_width)]
        inputs.append(torch.randn(C, device=device))
    return inputs


@proof("rms_norm")
def rms_norm_proof(device):
    def f(*inputs):
        return [rms_norm(x, w, 1e-6) for x, w in zip(inputs[::2], inputs[1::2])]

    return f, proof_inputs(device, 1)


@proof("add_rms_norm")
def add_rms_norm_proof(device):
    def f(*inputs):
        groups = zip(inputs[::3], inputs[1::3], inputs[2::3])
        return [out for x, delta, w in groups for out in add_rms_norm(x, delta, w, 1e-6)]

    return f, proof_inputs(device, 2)
