"""QK-norm and rotary position embedding in one pass over the fused query-key-value projection.

q, k <- rotate(rms_norm(q), position), rotate(rms_norm(k), position); v passes through.
Rotary embedding: Su et al. 2021, arXiv 2104.09864, eq. 34, in the half-split layout of Llama and Qwen (element i is paired with element i + Dh/2).
"""
import torch


def rotate(x, cos, sin, out):
    """out = x turned by the angles: x, out [N, heads, Dh]; cos, sin [N, 1, Dh/2]. Turning back is the same with -sin."""
    a, b = x.chunk(2, dim=-1)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)


class QKNormRopeReference(torch.autograd.Function):
    """By hand for the same reason as RMSNorm: a third of the time of autograd's chain on a CPU."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, heads, eps):
        N, rows, Dh = qkv.shape  # rows = H + 2K: all query heads, then key heads, then value heads
        kv_heads = (rows - heads) // 2
        wide = torch.promote_types(qkv.dtype, torch.float32)
        x = qkv[:, : heads + kv_heads].to(wide)  # [N, H+K, Dh]
        normed = x
        if q_weight is not None:
            weight = torch.cat([q_weight.expand(heads, Dh), k_weight.expand(kv_heads, Dh)])  # [H+K, Dh]
            rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(Dh).add_(eps).rsqrt_()  # [N, H+K, 1]
            normed = (x * rstd).mul_(weight)
            ctx.save_for_backward(qkv, cos, sin, weight, rstd)
        else:
            ctx.save_for_backward(qkv, cos, sin)
        ctx.heads, ctx.kv_heads = heads, kv_heads
        out = torch.empty(qkv.shape, dtype=wide, device=qkv.device)
        rotate(normed, cos[:, None], sin[:, None], out[:, : heads + kv_heads])
        out[:, heads + kv_heads :] = qkv[:, heads + kv_heads :]
        return out.to(qkv.dtype)

    @staticmethod
    def backward(ctx, grad):
        qkv, cos, sin, *norm = ctx.saved_tensors
        heads, kv_heads = ctx.heads, ctx.kv_heads
        turned = slice(0, heads + kv_heads)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        out = torch.empty(qkv.shape, dtype=wide, device=qkv.device)
        out[:, heads + kv_heads :] = grad[:, heads + kv_heads :]
        rotate(grad[:, turned].to(wide), cos[:, None], -sin[:, None], out[:, turned])
        if not norm:
            return out.to(grad.dtype), None, None, None, None, None, None
        weight, rstd = norm
        x, g = qkv[:, turned].to(wide), out[:, turned]  # the norm's backward as in norm.py, a head at a time
        per_head = torch.einsum("nhd,nh->hd", g * x, rstd[..., 0])  # [H+K, Dh]
        g = g * weight
        mean = torch.linalg.vecdot(g, x)[..., None].mul_(rstd.square()).div_(x.shape[-1])  # [N, H+K, 1]
        torch.mul(g.addcmul_(x, mean, value=-1), rstd, out=out[:, turned])
        return out.to(grad.dtype), per_head[:heads].sum(0), per_head[heads:].sum(0), None, None, None, None


def qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """See qk_norm_rope."""
    return QKNormRopeReference.apply(qkv, q_weight, k_weight, cos, sin, heads, eps)


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """qkv [N, H+2K, Dh] -> the same shape and dtype with its H query and K key heads normalised (unless the weights [Dh] are None) and turned.

    cos, sin: fp32 [N, Dh/2], the angles at each token's position in its document.
    """
    return qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, heads, eps)
