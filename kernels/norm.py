"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4). Sums are fp32 (fp64 for fp64 input).

With the residual addition before it, for that is where a transformer needs it: s = x + delta, y = rms_norm(s), in one pass over memory.
"""
import torch


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


def rms_norm(x, weight, eps):
    """x [N, C], weight fp32 [C] -> [N, C] in x's dtype."""
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x, delta, weight, eps):
    """x, delta [N, C], weight fp32 [C] -> (x + delta, rms_norm(x + delta)), both [N, C] in x's dtype; the sum is rounded to it before it is normalised."""
    return add_rms_norm_reference(x, delta, weight, eps)
