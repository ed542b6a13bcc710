"""QK-norm and rotary position embedding in one pass over the fused query-key-value projection.

q, k <- rotate(rms_norm(q), position), rotate(rms_norm(k), position); v passes through.
Rotary embedding: Su et al. 2021, arXiv 2104.09864, eq. 34, in the half-split layout of Llama and
Qwen (element i is paired with element i + Dh/2).
"""

import torch

from kernels._lib import cdiv, contiguous, next_power_of_2, register, sm_count, tl, triton, use
from kernels.norm import inverse_rms
from kernels.proof import proof


def rotate(x, cos, sin, out):
    """out = x rotated: x, out [N, heads, Dh]; cos, sin [N, 1, Dh/2]. -sin rotates back."""
    a, b = x.chunk(2, dim=-1)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)


def normalise_and_rotate(qk, q_weight, k_weight, cos, sin, heads, eps, out):
    """out [N, H+K, Dh] = the queries and keys qk, normalised and rotated. Returns (weights [H+K,
    Dh], 1 / rms [N, H+K, 1]), or () without a norm."""
    norm = ()
    if q_weight is not None:
        kv_heads, Dh = qk.shape[1] - heads, qk.shape[2]
        norm = torch.cat([q_weight.expand(heads, Dh), k_weight.expand(kv_heads, Dh)]), inverse_rms(qk, eps)
        qk = (qk * norm[1]).mul_(norm[0])
    rotate(qk, cos[:, None], sin[:, None], out)
    return norm


def forward_reference(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """(qk_norm_rope(qkv), what its backward needs of the norm)."""
    rotated = (qkv.shape[1] + heads) // 2  # of H+2K heads the queries and the keys
    wide = torch.promote_types(qkv.dtype, torch.float32)
    out = torch.empty(qkv.shape, dtype=wide, device=qkv.device)
    qk, out_qk = qkv[:, :rotated].to(wide), out[:, :rotated]
    norm = normalise_and_rotate(qk, q_weight, k_weight, cos, sin, heads, eps, out_qk)
    out[:, rotated:] = qkv[:, rotated:]
    return out.to(qkv.dtype), norm


class QKNormRopeReference(torch.autograd.Function):
    """Its own backward, for the reason of RMSNormReference: a third of the time of autograd's."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, heads, eps):
        out, norm = forward_reference(qkv, q_weight, k_weight, cos, sin, heads, eps)
        ctx.save_for_backward(qkv, cos, sin, *norm)
        ctx.heads, ctx.kv_heads = heads, (qkv.shape[1] - heads) // 2
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, cos, sin, *norm = ctx.saved_tensors
        heads, kv_heads = ctx.heads, ctx.kv_heads
        rotated = slice(0, heads + kv_heads)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        out = torch.empty(qkv.shape, dtype=wide, device=qkv.device)
        out[:, heads + kv_heads :] = grad[:, heads + kv_heads :]
        rotate(grad[:, rotated].to(wide), cos[:, None], -sin[:, None], out[:, rotated])
        if not norm:
            return out.to(grad.dtype), None, None, None, None, None, None
        weight, rstd = norm
        x, g = qkv[:, rotated].to(wide), out[:, rotated]  # the norm's backward as in norm.py, per head
        per_head = torch.einsum("nhd,nh->hd", g * x, rstd[..., 0])  # [H+K, Dh]
        g = g * weight
        mean = torch.linalg.vecdot(g, x)[..., None].mul_(rstd.square()).div_(x.shape[-1])  # [N, H+K, 1]
        torch.mul(g.addcmul_(x, mean, value=-1), rstd, out=out[:, rotated])
        return out.to(grad.dtype), per_head[:heads].sum(0), per_head[heads:].sum(0), None, None, None, None


def qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """See qk_norm_rope."""
    args = qkv, q_weight, k_weight, cos, sin, heads, eps
    return QKNormRopeReference.apply(*args) if torch.is_grad_enabled() else forward_reference(*args)[0]


# --------------------------------------------------------------------------------------------------
# The kernels. A program takes ROWS of the flat run of N (H+2K) heads, whichever token and kind they
# belong to, so that no H or K wastes threads. A head is its two halves a and b of HALF = Dh/2
# numbers; COLS is HALF rounded up to a power of two. Everything is fp32, with one rounding at each
# store.

TILE = 1024  # numbers in a tile of one half: 8 per thread, one 128-bit load of bf16
WARPS = 4
PROGRAMS = 4  # of the backward, per multiprocessor


@triton.jit
def locate(start, rows_total, R, H, K, HALF, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where ROWS heads from `start` lie, of the first R heads of every token.

    Returns offsets of their first halves in a tensor of all heads and of their angles, masks of
    what exists and of what is rotated (all but values), and which heads are queries and which are
    rotated.
    """
    row = start + tl.arange(0, ROWS)  # N (H+2K) stays below 2^31; times Dh it does not
    cols = tl.arange(0, COLS)
    token, head = row // R, row % R
    is_rotated = (head < H + K)[:, None]
    inside = (row < rows_total)[:, None] & (cols < HALF)[None, :]
    offsets = (token.to(tl.int64) * (H + 2 * K) + head)[:, None] * (2 * HALF) + cols[None, :]
    angles = token.to(tl.int64)[:, None] * HALF + cols[None, :]
    return offsets, angles, inside, inside & is_rotated, (head < H)[:, None], is_rotated


@triton.jit
def head_weights(q_weight_ptr, k_weight_ptr, is_query, offset, HALF, COLS: tl.constexpr):
    """[ROWS, COLS]: one half of each head's weight."""
    cols = tl.arange(0, COLS)
    q = tl.load(q_weight_ptr + offset + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    k = tl.load(k_weight_ptr + offset + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    return tl.where(is_query, q[None, :], k[None, :])


@triton.jit(do_not_specialize=["rows_total", "R", "H", "K"])
def qk_norm_rope_forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows_total,
    R,
    H,
    K,
    HALF,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    offsets, angles, inside, rotated, is_query, is_rotated = locate(start, rows_total, R, H, K, HALF, ROWS, COLS)
    a = tl.load(qkv_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angles, mask=rotated, other=1.0)  # values: rotated by nothing
    sin = tl.load(sin_ptr + angles, mask=rotated, other=0.0)
    if q_weight_ptr is not None:
        rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        weight_a = head_weights(q_weight_ptr, k_weight_ptr, is_query, 0, HALF, COLS)
        weight_b = head_weights(q_weight_ptr, k_weight_ptr, is_query, HALF, HALF, COLS)
        a = tl.where(is_rotated, a * rstd * weight_a, a)
        b = tl.where(is_rotated, b * rstd * weight_b, b)
    rows = start + tl.arange(0, ROWS).to(tl.int64)  # `out` has R heads a token
    out_ptrs = out_ptr + rows[:, None] * (2 * HALF) + tl.arange(0, COLS)[None, :]
    tl.store(out_ptrs, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptrs + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_total", "R", "H", "K"])
def qk_norm_rope_backward_kernel(
    grad_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    dw_ptr,
    rows_total,
    R,
    H,
    K,
    HALF,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rotates the gradient back, then the norm's backward as in norm.py.

    rstd is computed again from x, which is read anyway. Each program takes every num_programs-th
    tile and keeps its part of both weights' gradients in registers; the parts, [programs, 2, Dh],
    are added in a fixed order afterwards.
    """
    if q_weight_ptr is not None:
        dq_a, dq_b = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
        dk_a, dk_b = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows_total, tl.num_programs(0) * ROWS):
        offsets, angles, inside, rotated, is_query, is_rotated = locate(start, rows_total, R, H, K, HALF, ROWS, COLS)
        grad_a = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        grad_b = tl.load(grad_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angles, mask=rotated, other=1.0)
        sin = tl.load(sin_ptr + angles, mask=rotated, other=0.0)
        g_a, g_b = grad_a * cos + grad_b * sin, grad_b * cos - grad_a * sin
        if q_weight_ptr is not None:
            a = tl.load(qkv_ptr + offsets, mask=rotated, other=0.0).to(tl.float32)
            b = tl.load(qkv_ptr + offsets + HALF, mask=rotated, other=0.0).to(tl.float32)
            rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
            a, b = a * rstd, b * rstd
            dw_a, dw_b = g_a * a, g_b * b  # 0 for values, whose a and b were not read
            dq_a, dq_b = dq_a + tl.where(is_query, dw_a, 0.0), dq_b + tl.where(is_query, dw_b, 0.0)
            dk_a, dk_b = dk_a + tl.where(is_query, 0.0, dw_a), dk_b + tl.where(is_query, 0.0, dw_b)
            wg_a = g_a * head_weights(q_weight_ptr, k_weight_ptr, is_query, 0, HALF, COLS)
            wg_b = g_b * head_weights(q_weight_ptr, k_weight_ptr, is_query, HALF, HALF, COLS)
            mean = ((tl.sum(wg_a * a, 1) + tl.sum(wg_b * b, 1)) / (2 * HALF))[:, None]
            g_a = tl.where(is_rotated, (wg_a - a * mean) * rstd, g_a)
            g_b = tl.where(is_rotated, (wg_b - b * mean) * rstd, g_b)
        tl.store(out_ptr + offsets, g_a.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + offsets + HALF, g_b.to(out_ptr.dtype.element_ty), mask=inside)
    if q_weight_ptr is not None:
        cols = tl.arange(0, COLS)
        dw_ptr += tl.program_id(0) * (4 * HALF)
        tl.store(dw_ptr + cols, tl.sum(dq_a, 0), mask=cols < HALF)
        tl.store(dw_ptr + HALF + cols, tl.sum(dq_b, 0), mask=cols < HALF)
        tl.store(dw_ptr + 2 * HALF + cols, tl.sum(dk_a, 0), mask=cols < HALF)
        tl.store(dw_ptr + 3 * HALF + cols, tl.sum(dk_b, 0), mask=cols < HALF)


def tile(shape, heads, values=True):
    """qkv's shape -> (all heads, heads a token, H, K, Dh/2) for the kernels, and a tile's rows and
    columns. values: whether the kernel goes over them too."""
    N, R, Dh = shape
    kv_heads, cols = (R - heads) // 2, next_power_of_2(Dh // 2)
    worked = R if values else R - kv_heads
    return (N * worked, worked, heads, kv_heads, Dh // 2), max(1, TILE // cols), cols


ARGS = "Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads, float eps"


def launch_forward(out, qkv, q_weight, k_weight, cos, sin, heads, eps):
    """Write qkv's first heads, as many as `out` has, into it."""
    sizes, rows, cols = tile(qkv.shape, heads, values=out.shape == qkv.shape)
    tensors, grid = contiguous(qkv, q_weight, k_weight, cos, sin), (cdiv(sizes[0], rows),)
    qk_norm_rope_forward_kernel[grid](*tensors, out, *sizes, eps, ROWS=rows, COLS=cols, num_warps=WARPS)
    return out


@register(f"qk_norm_rope(Tensor qkv, {ARGS}) -> Tensor", fake=lambda qkv, *_: qkv.new_empty(qkv.shape))
def qk_norm_rope_forward(qkv, *args):
    return launch_forward(qkv.new_empty(qkv.shape), qkv, *args)


def queries_and_keys(qkv, q_weight, k_weight, cos, sin, heads, eps):
    return qkv.new_empty(qkv.shape[0], (qkv.shape[1] + heads) // 2, qkv.shape[2])


@register(f"rotate_queries_and_keys(Tensor qkv, {ARGS}) -> Tensor", fake=queries_and_keys)
def rotate_queries_and_keys(qkv, *args):
    """The first H+K heads of qk_norm_rope(qkv), [N, H+K, Dh]."""
    return launch_forward(queries_and_keys(qkv, *args), qkv, *args)


def weight_gradients(grad, qkv, q_weight, *_):
    return grad.new_empty(0 if q_weight is None else (2, grad.shape[2]), dtype=torch.float32)


def launch_backward(out, grad, qkv, q_weight, k_weight, cos, sin, heads, eps, values):
    """Write the gradient of qkv into `out`, which may be `grad`; returns those of the weights."""
    sizes, rows, cols = tile(grad.shape, heads, values)
    programs = min(cdiv(sizes[0], rows), PROGRAMS * sm_count(grad.device))
    partial = grad.new_empty(0 if q_weight is None else (programs, 2, grad.shape[2]), dtype=torch.float32)
    tensors = contiguous(grad, qkv, q_weight, k_weight, cos, sin)
    qk_norm_rope_backward_kernel[(programs,)](
        *tensors, out, partial, *sizes, eps, ROWS=rows, COLS=cols, num_warps=WARPS
    )
    return partial if q_weight is None else partial.sum(0)


@register(
    f"qk_norm_rope_backward(Tensor grad, Tensor? qkv, {ARGS}) -> (Tensor, Tensor)",
    fake=lambda grad, *args: (grad.new_empty(grad.shape), weight_gradients(grad, *args)),
)
def qk_norm_rope_backward(grad, *args):
    """Returns d_qkv and both weights' gradients as one fp32 [2, Dh].

    Without weights the latter is empty, and qkv is not needed.
    """
    out = grad.new_empty(grad.shape)
    return out, launch_backward(out, grad, *args, True)


@register(f"rotate_back(Tensor(a!) d_qkv, Tensor qkv, {ARGS}) -> Tensor", fake=weight_gradients)
def rotate_back(d_qkv, *args):
    """Make the gradient of rotate_queries_and_keys(qkv), the first H+K heads of d_qkv, that of qkv,
    in place. Returns both weights' gradients as qk_norm_rope_backward does."""
    return launch_backward(d_qkv, d_qkv, *args, False)


class QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, heads, eps):
        ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, cos, sin)
        ctx.heads, ctx.eps = heads, eps
        return qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, heads, eps)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # read once: a checkpointed block gives them once
        _, q_weight, k_weight, _, _ = saved
        d_qkv, d_weights = qk_norm_rope_backward(grad, *saved, ctx.heads, ctx.eps)
        dq, dk = (None, None) if q_weight is None else d_weights.to(q_weight.dtype)
        return d_qkv, dq, dk, None, None, None, None


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps):
    """qkv [N, H+2K, Dh] -> the same, its H query and K key heads normalised and rotated.

    q_weight, k_weight: fp32 [Dh], or None for no norm. cos, sin: fp32 [N, Dh/2], of the angles at
    each token's position in its document.
    """
    op = QKNormRope.apply if use("qk_norm_rope", qkv) else qk_norm_rope_reference
    return op(qkv, q_weight, k_weight, cos, sin, heads, eps)


@proof("qk_norm_rope")
def qk_norm_rope_proof(device):
    inputs, angles = [], []
    for dh in (48, 64, 128):
        inputs += [torch.randn(37, 6 + 2 * 2, dh, device=device).bfloat16()]
        inputs += [torch.randn(dh, device=device) for _ in range(2)]
        angles.append(3 * torch.randn(37, dh // 2, device=device))

    def with_and_without_norm(*inputs):
        outs = []
        for x, q, k, angle in zip(inputs[::3], inputs[1::3], inputs[2::3], angles):
            rest = angle.cos(), angle.sin(), 6, 1e-6
            outs += [qk_norm_rope(x, q, k, *rest), qk_norm_rope(x, None, None, *rest)]
        return outs

    return with_and_without_norm, inputs
