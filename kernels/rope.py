"""QK-norm and rotary position embedding in one pass over the fused query-key-value projection.

q, k <- rotate(rms_norm(q), position), rotate(rms_norm(k), position); v passes through.
Rotary embedding: Su et al. 2021, arXiv 2104.09864, eq. 34, in the half-split layout of Llama and Qwen (element i is paired with element i + Dh/2).
"""
import torch

from kernels._lib import proof, register, sm_count, tl, triton, use


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


# ---------------------------------------------------------------------------------------------------------------------------------
# One program: ROWS heads, taken from the flat run of N (H+2K) of them whatever the token and the kind, so that no H or K wastes threads. A head is its
# two halves a and b, HALF = Dh/2 numbers each, COLS = HALF rounded up to a power of two. Everything in fp32, one rounding at each store.

TILE, WARPS, PROGRAMS = 1024, 4, 4  # numbers in a tile of one half: 8 a thread, one 128-bit load of bf16; programs of the backward a multiprocessor


@triton.jit
def place(start, rows_total, H, K, HALF, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of ROWS heads from `start`: where their first halves and their angles lie, masks, and which are queries, which get turned (all but values)."""
    row = start + tl.arange(0, ROWS)  # N (H+2K) stays below 2^31, times Dh does not
    cols = tl.arange(0, COLS)
    token, head = row // (H + 2 * K), row % (H + 2 * K)
    turned = (head < H + K)[:, None]
    inside = (row < rows_total)[:, None] & (cols < HALF)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * HALF) + cols[None, :]
    return at, token.to(tl.int64)[:, None] * HALF + cols[None, :], inside, inside & turned, (head < H)[:, None], turned


@triton.jit
def head_weights(q_weight_ptr, k_weight_ptr, is_q, offset, HALF, COLS: tl.constexpr):
    """[ROWS, COLS]: one half of each head's weight."""
    cols = tl.arange(0, COLS)
    q = tl.load(q_weight_ptr + offset + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    k = tl.load(k_weight_ptr + offset + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    return tl.where(is_q, q[None, :], k[None, :])


@triton.jit
def qk_norm_rope_forward_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, rows_total, H, K, HALF, eps, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    at, angle_at, inside, wanted, is_q, turned = place(tl.program_id(0) * ROWS, rows_total, H, K, HALF, ROWS, COLS)
    a = tl.load(qkv_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle_at, mask=wanted, other=1.0)  # values: turned by nothing
    sin = tl.load(sin_ptr + angle_at, mask=wanted, other=0.0)
    if q_weight_ptr is not None:
        rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a = tl.where(turned, a * rstd * head_weights(q_weight_ptr, k_weight_ptr, is_q, 0, HALF, COLS), a)
        b = tl.where(turned, b * rstd * head_weights(q_weight_ptr, k_weight_ptr, is_q, HALF, HALF, COLS), b)
    tl.store(out_ptr + at, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def qk_norm_rope_backward_kernel(
    grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, dw_ptr, rows_total, H, K, HALF, eps, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Turn the gradient back, then the norm's backward as in norm.py, its rstd recomputed from x, which is read anyway. Each program walks through every
    num_programs-th tile and keeps its share of both weights' gradients in registers: [programs, 2, Dh] partial sums, added up in a fixed order."""
    if q_weight_ptr is not None:
        dq_a, dq_b = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
        dk_a, dk_b = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows_total, tl.num_programs(0) * ROWS):
        at, angle_at, inside, wanted, is_q, turned = place(start, rows_total, H, K, HALF, ROWS, COLS)
        grad_a = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_b = tl.load(grad_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle_at, mask=wanted, other=1.0)
        sin = tl.load(sin_ptr + angle_at, mask=wanted, other=0.0)
        g_a, g_b = grad_a * cos + grad_b * sin, grad_b * cos - grad_a * sin
        if q_weight_ptr is not None:
            a = tl.load(qkv_ptr + at, mask=wanted, other=0.0).to(tl.float32)
            b = tl.load(qkv_ptr + at + HALF, mask=wanted, other=0.0).to(tl.float32)
            rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
            a, b = a * rstd, b * rstd
            dw_a, dw_b = g_a * a, g_b * b  # 0 for values, whose a and b were not read
            dq_a, dq_b = dq_a + tl.where(is_q, dw_a, 0.0), dq_b + tl.where(is_q, dw_b, 0.0)
            dk_a, dk_b = dk_a + tl.where(is_q, 0.0, dw_a), dk_b + tl.where(is_q, 0.0, dw_b)
            wg_a = g_a * head_weights(q_weight_ptr, k_weight_ptr, is_q, 0, HALF, COLS)
            wg_b = g_b * head_weights(q_weight_ptr, k_weight_ptr, is_q, HALF, HALF, COLS)
            mean = ((tl.sum(wg_a * a, 1) + tl.sum(wg_b * b, 1)) / (2 * HALF))[:, None]
            g_a, g_b = tl.where(turned, (wg_a - a * mean) * rstd, g_a), tl.where(turned, (wg_b - b * mean) * rstd, g_b)
        tl.store(out_ptr + at, g_a.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + at + HALF, g_b.to(out_ptr.dtype.element_ty), mask=inside)
    if q_weight_ptr is not None:
        cols = tl.arange(0, COLS)
        dw_ptr += tl.program_id(0) * (4 * HALF)
        tl.store(dw_ptr + cols, tl.sum(dq_a, 0), mask=cols < HALF)
        tl.store(dw_ptr + HALF + cols, tl.sum(dq_b, 0), mask=cols < HALF)
        tl.store(dw_ptr + 2 * HALF + cols, tl.sum(dk_a, 0), mask=cols < HALF)
        tl.store(dw_ptr + 3 * HALF + cols, tl.sum(dk_b, 0), mask=cols < HALF)


def tile(shape, heads):
    """For qkv's shape -> (all heads, H, K, Dh/2) as the kernels take them, and the rows and columns of a tile."""
    N, R, Dh = shape
    cols = triton.next_power_of_2(Dh // 2)
    return (N * R, heads, (R - heads) // 2, Dh // 2), max(1, TILE // cols), cols


@register(
    "qk_norm_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads, float eps) -> Tensor",
    fake=lambda qkv, q_weight, k_weight, cos, sin, heads, eps: qkv.new_empty(qkv.shape),
)
def qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, heads, eps):
    sizes, rows, cols = tile(qkv.shape, heads)
    out = qkv.new_empty(qkv.shape)
    tensors = [None if x is None else x.contiguous() for x in (qkv, q_weight, k_weight, cos, sin)]
    qk_norm_rope_forward_kernel[(triton.cdiv(sizes[0], rows),)](*tensors, out, *sizes, eps, ROWS=rows, COLS=cols, num_warps=WARPS)
    return out


def backward_fake(grad, qkv, q_weight, k_weight, cos, sin, heads, eps):
    return grad.new_empty(grad.shape), grad.new_empty(0 if q_weight is None else (2, grad.shape[2]), dtype=torch.float32)


@register(
    "qk_norm_rope_backward(Tensor grad, Tensor? qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads, float eps) -> (Tensor, Tensor)",
    fake=backward_fake,
)
def qk_norm_rope_backward(grad, qkv, q_weight, k_weight, cos, sin, heads, eps):
    """-> d_qkv, and both weights' gradients as one fp32 [2, Dh]; without weights that is empty, and qkv is not needed."""
    sizes, rows, cols = tile(grad.shape, heads)
    programs = min(triton.cdiv(sizes[0], rows), PROGRAMS * sm_count(grad.device))
    out = grad.new_empty(grad.shape)
    partial = grad.new_empty(0 if q_weight is None else (programs, 2, grad.shape[2]), dtype=torch.float32)
    tensors = [None if x is None else x.contiguous() for x in (grad, qkv, q_weight, k_weight, cos, sin)]
    qk_norm_rope_backward_kernel[(programs,)](*tensors, out, partial, *sizes, eps, ROWS=rows, COLS=cols, num_warps=WARPS)
    return out, partial if q_weight is None else partial.sum(0)


class QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, heads, eps):
        ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, cos, sin)
        ctx.heads, ctx.eps = heads, eps
        return qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, heads, eps)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # asked once: a checkpointed block gives them once
        _, *weights, _, _ = saved
        d_qkv, d_weights = qk_norm_rope_backward(grad, *saved, ctx.heads, ctx.eps)
        dq, dk = [None, None] if weights[0] is None else [d.to(w.dtype) for d, w in zip(d_weights, weights)]
        return d_qkv, dq, dk, None, None, None, None


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """qkv [N, H+2K, Dh] -> the same shape and dtype with its H query and K key heads normalised (unless the weights [Dh] are None) and turned.

    cos, sin: fp32 [N, Dh/2], the angles at each token's position in its document.
    """
    op = QKNormRope.apply if use("qk_norm_rope", qkv) else qk_norm_rope_reference
    return op(qkv, q_weight, k_weight, cos, sin, heads, eps)


@proof("qk_norm_rope")
def qk_norm_rope_proof(device):
    qkv, q_weight, k_weight, angle = (torch.randn(shape, device=device) for shape in [(37, 6 + 2 * 2, 48), (48,), (48,), (37, 24)])

    def both(op):  # with the norm, and without
        rest = (3 * angle).cos(), (3 * angle).sin(), 6, 1e-6
        return lambda x, q, k: (op(x, q, k, *rest), op(x, None, None, *rest))

    return both(qk_norm_rope), both(qk_norm_rope_reference), [qkv.bfloat16(), q_weight, k_weight]
