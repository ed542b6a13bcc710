"""SwiGLU: silu(gate) * up with silu(x) = x * sigmoid(x)   (Shazeer 2020, arXiv 2002.05202, eq. 6)."""
import torch
import torch.nn.functional as F


class SwiGLUReference(torch.autograd.Function):
    """Keeps only its input and recomputes silu in the backward: half the memory that autograd would keep."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

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
    return SwiGLUReference.apply(gate_up)


def swiglu(gate_up):
    """gate_up [N, 2F], the gate first -> [N, F]."""
    return swiglu_reference(gate_up)
