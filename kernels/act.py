"""SwiGLU: silu(gate) * up, silu(x) = x * sigmoid(x)   (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

import torch
import torch.nn.functional as F

from kernels._lib import cdiv, contiguous, next_power_of_2, register, tl, triton, use
from kernels.proof import proof


def gated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class SwiGLUReference(torch.autograd.Function):
    """Keeps its input only and computes silu again in the backward: half of autograd's memory."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def swiglu_reference(gate_up):
    """See swiglu."""
    return SwiGLUReference.apply(gate_up) if torch.is_grad_enabled() else gated(gate_up)


# --------------------------------------------------------------------------------------------------
# The kernels. A program makes a tile of ROWS x COLS outputs; all arithmetic is fp32, with one
# rounding at the store.

TILE, WARPS = 2048, 4  # 16 outputs per thread: two 128-bit loads of bf16 from each operand


def tiles(N, F):
    """(the grid, a tile's sizes) for outputs [N, F]: whole rows if they are narrow, else at most
    1024 columns."""
    cols = min(next_power_of_2(F), 1024)
    rows = TILE // cols
    return (cdiv(N, rows), cdiv(F, cols)), dict(ROWS=rows, COLS=cols, num_warps=WARPS)


@triton.jit(do_not_specialize=["N"])
def swiglu_forward_kernel(gate_up_ptr, out_ptr, N, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # N * 2F exceeds int32
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (rows < N) & (cols < F)
    gate_ptrs = gate_up_ptr + rows * 2 * F + cols
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * F + cols, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def swiglu_backward_kernel(grad_ptr, gate_up_ptr, out_ptr, N, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (rows < N) & (cols < F)
    gate_offsets = rows * 2 * F + cols
    grad = tl.load(grad_ptr + rows * F + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + gate_offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_offsets + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)  # computing it again is cheaper than keeping silu(gate)
    silu = gate * sigmoid
    d_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(out_ptr + gate_offsets, d_gate.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + gate_offsets + F, (grad * silu).to(out_ptr.dtype.element_ty), mask=inside)


@register(
    "swiglu(Tensor gate_up) -> Tensor",
    fake=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
def swiglu_forward(gate_up):
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(N, F)
    grid, sizes = tiles(N, F)
    swiglu_forward_kernel[grid](gate_up.contiguous(), out, N, F, **sizes)
    return out


@register(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor",
    fake=lambda grad, gate_up: gate_up.new_empty(gate_up.shape),
)
def swiglu_backward(grad, gate_up):
    N, F = grad.shape
    out = gate_up.new_empty(N, 2 * F)
    grid, sizes = tiles(N, F)
    swiglu_backward_kernel[grid](*contiguous(grad, gate_up), out, N, F, **sizes)
    return out


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, grad):
        return swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(gate_up):
    """gate_up [N, 2F], the gate first -> [N, F]."""
    return SwiGLU.apply(gate_up) if use("swiglu", gate_up) else swiglu_reference(gate_up)


@proof("swiglu")
def swiglu_proof(device):
    inputs = [torch.randn(37, 2 * F, device=device, dtype=torch.bfloat16) for F in (200, 688, 2048)]
    return lambda *gate_ups: list(map(swiglu, gate_ups)), inputs
