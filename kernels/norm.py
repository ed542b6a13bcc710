"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4). Sums are fp32 (fp64 for fp64 input).

With the residual addition before it, for that is where a transformer needs it: s = x + delta, y = rms_norm(s), in one pass over memory.
"""
import torch

from kernels._lib import proof, register, sm_count, tl, triton, use


class RMSNormReference(torch.autograd.Function):
    """By hand, because on a CPU autograd through the chain of small ops, and `F.rms_norm`'s own backward, take several times as long."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [N, 1]
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        # With r = (mean(x^2) + eps)^(-1/2):  dx = r (g w - x r^2 mean(g w x)),  dw = sum over rows of g x r. Both start from p = g x.
        x, weight, rstd = ctx.saved_tensors
        x, g = x.to(rstd.dtype), grad.to(rstd.dtype)
        p = g * x  # [N, C]
        mean = torch.mv(p, weight)[:, None].mul_(rstd.square()).div_(x.shape[-1])  # [N, 1]
        dx = (g * weight).addcmul_(x, mean, value=-1).mul_(rstd)
        return dx.to(grad.dtype), torch.mv(p.t(), rstd[:, 0]), None


def rms_norm_reference(x, weight, eps):
    """x [N, C], weight [C] -> [N, C] in x's dtype."""
    return RMSNormReference.apply(x, weight, eps)


def add_rms_norm_reference(x, delta, weight, eps):
    """See add_rms_norm."""
    total = x + delta
    return total, rms_norm_reference(total, weight, eps)


# ---------------------------------------------------------------------------------------------------------------------------------
# One program: ROWS whole rows, COLS = C rounded up to a power of two. Everything in fp32, one rounding at each store.

PROGRAMS = 4  # of the backward, a multiprocessor


def tile(C, elements):
    """(rows, columns, warps) of a program's tile of about `elements` numbers, or of one row where that is longer."""
    cols = triton.next_power_of_2(C)
    rows = max(1, elements // cols)
    return rows, cols, min(max(4 * rows * cols // elements, 4), 32)


@triton.jit
def rms_norm_forward_kernel(x_ptr, delta_ptr, weight_ptr, total_ptr, y_ptr, rstd_ptr, N, C, eps, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # N * C passes 2^31
    cols = tl.arange(0, COLS)
    inside = (rows[:, None] < N) & (cols[None, :] < C)
    at = rows[:, None] * C + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        total = (x + tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)  # the rounded sum is what the next layers see, so it is what gets normalised
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, d_total_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dw_ptr, N, C, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Each program walks through every num_programs-th tile and keeps its share of dw in registers: [programs, C] partial sums, added up in a fixed
    order afterwards. Atomics would save that addition, and give other bits every time."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None] * C + cols[None, :]
    dw = tl.zeros([ROWS, COLS], tl.float32)  # summed over its rows at the end: in the loop that would cost an exchange between threads a tile
    for start in tl.range(tl.program_id(0).to(tl.int64) * ROWS, N, tl.num_programs(0) * ROWS):
        inside = (rows[:, None] < N - start) & (cols[None, :] < C)
        rstd = tl.load(rstd_ptr + start + rows, mask=rows < N - start, other=0.0)[:, None]
        normed = tl.load(x_ptr + start * C + at, mask=inside, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + start * C + at, mask=inside, other=0.0).to(tl.float32)
        dw += grad * normed
        g = grad * weight
        dx = (g - normed * (tl.sum(g * normed, 1) / C)[:, None]) * rstd
        if d_total_ptr is not None:  # what reaches the sum past the norm
            dx += tl.load(d_total_ptr + start * C + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start * C + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * C + cols, tl.sum(dw, 0), mask=cols < C)


def forward_fake(x, delta, weight, eps):
    return x.new_empty(0 if delta is None else x.shape), x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@register("rms_norm(Tensor x, Tensor? delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", fake=forward_fake)
def rms_norm_forward(x, delta, weight, eps):
    """-> the sum (empty without delta), y, rstd fp32 [N]."""
    N, C = x.shape
    total, y, rstd = forward_fake(x, delta, weight, eps)
    rows, cols, warps = tile(C, 4096)
    delta = None if delta is None else delta.contiguous()
    rms_norm_forward_kernel[(triton.cdiv(N, rows),)](
        x.contiguous(), delta, weight.contiguous(), total, y, rstd, N, C, eps, ROWS=rows, COLS=cols, num_warps=warps
    )  # fmt: skip
    return total, y, rstd


def backward_fake(grad, d_total, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@register("rms_norm_backward(Tensor grad, Tensor? d_total, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)", fake=backward_fake)
def rms_norm_backward(grad, d_total, x, weight, rstd):
    """x: what was normalised. -> dx with d_total, the gradient of x by its other way, added to it; dw."""
    N, C = x.shape
    rows, cols, warps = tile(C, 2048)
    programs = min(triton.cdiv(N, rows), PROGRAMS * sm_count(x.device))
    dx, partial = x.new_empty(N, C), x.new_empty(programs, C, dtype=torch.float32)
    d_total = None if d_total is None else d_total.contiguous()
    rms_norm_backward_kernel[(programs,)](
        grad.contiguous(), d_total, x.contiguous(), weight.contiguous(), rstd, dx, partial, N, C, ROWS=rows, COLS=cols, num_warps=warps
    )  # fmt: skip
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
    """x, delta [N, C], weight fp32 [C] -> (x + delta, rms_norm(x + delta)), both [N, C] in x's dtype; the sum is rounded to it before it is normalised."""
    return RMSNorm.apply(x, delta, weight, eps) if use("add_rms_norm", x) else add_rms_norm_reference(x, delta, weight, eps)


def proof_inputs(device):
    x, delta, weight = (torch.randn(shape, device=device) for shape in [(37, 200), (37, 200), (200,)])
    return x.bfloat16(), delta.bfloat16(), weight


@proof("rms_norm")
def rms_norm_proof(device):
    x, _, weight = proof_inputs(device)
    return lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), [x, weight]


@proof("add_rms_norm")
def add_rms_norm_proof(device):
    return lambda *x: add_rms_norm(*x, 1e-6), lambda *x: add_rms_norm_reference(*x, 1e-6), list(proof_inputs(device))
