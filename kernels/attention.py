"""Causal attention over documents: softmax(q k^T / sqrt(Dh)) v. A token sees itself and the earlier
tokens of its own document, or the last `window` of them.

Tokens lie in one flat run (a pack), and `cu_seqlens` holds the documents' boundaries. Nothing is
padded in the model.

The kernels (FlashAttention-2: Dao 2023, arXiv 2307.08691, alg. 1 and 2) work on a table of tiles,
each of TILE rows of one document. No tile crosses a boundary, so one kernel serves documents of any
length, dense batches and windows: its mask compares positions. The backward is deterministic: it
loops over keys and over queries separately, which costs 7 matrix products where atomic additions
would need 5. cuDNN's attention is faster on Hopper for dense batches of wide heads, but its
backward is not deterministic.

In the reference, documents of similar length share a right-padded batch for PyTorch's attention. A
causal query never looks to its right, so the padding changes nothing and needs no mask. Masks of
N x N and nested tensors were slower in every case measured.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels._lib import LOG2E, arch, register, tl, triton, use
from kernels.proof import proof
from kernels.rope import qk_norm_rope, rotate_back, rotate_queries_and_keys


class Tiles(NamedTuple):
    """The tiles of a pack, int32 [tiles, 3]: first row, begin and end of its document.

    Those with the most work come first. Unused entries are (0, 0, 0).
    """

    queries: torch.Tensor  # a tile of queries works on the keys before it,
    keys: torch.Tensor  # a tile of keys on the queries behind it


def layout(cu_seqlens, x, head_dim):
    """What attention needs to know of a pack's documents: made once per forward, for every layer.

    cu_seqlens: int32 [D+1]. x: any tensor of N rows with the dtype and device of the queries.
    Returns Tiles for the kernels, or `batches` for the reference.
    """
    return tiles(cu_seqlens, len(x)) if use("attention", x) and head_dim in WIDTHS else batches(cu_seqlens)


def attention(q, k, v, layout, window=0):
    """q [N, H, Dh], k and v [N, K, Dh] with H a multiple of K -> [N, H, Dh].

    q, k and v may be views of one tensor. layout: from `layout`. window: how many tokens a token
    sees, itself included; 0: all of its document so far.
    """
    if isinstance(layout, Tiles):
        return Attention.apply(q, k, v, *layout, window)
    return attention_reference(q, k, v, layout, window)


# --------------------------------------------------------------------------------------------------
# The reference


def batches(cu_seqlens):
    """How the documents of a pack share dense batches: cu_seqlens int32 [D+1] -> (groups, slot).

    groups: [(documents, padded length), ...]. slot: int64 [N], each token's row when the groups are
    laid end to end, or None if all documents have one length, so that the pack is the batch.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    lengths = lengths[lengths > 0]  # an empty document has no row
    ordered, order = lengths.sort(descending=True, stable=True)
    groups, N = group(ordered.tolist()), int(lengths.sum())
    if len(groups) == 1 and groups[0][0] * groups[0][1] == N:
        return groups, None
    starts, rows = [], 0  # each document's first row, the longest document first
    for documents, length in groups:
        starts += range(rows, rows + documents * length, length)
        rows += documents * length
    start = torch.empty_like(lengths)
    start[order] = torch.tensor(starts, device=cu_seqlens.device)
    shift = start - (lengths.cumsum(0) - lengths)  # from a token's row in the pack to its row in the groups
    return groups, torch.arange(N, device=cu_seqlens.device) + shift.repeat_interleave(lengths)


def group(lengths):
    """Cuts lengths, longest first, into batches of similar length: [(documents, longest), ...].

    A shorter document joins a batch while padding stays below an eighth of the batch, or below 64
    tokens, which are cheaper than one more call. So many short ragged documents make a few batches,
    and a few long ones a batch each.
    """
    groups, documents, longest, tokens = [], 0, 0, 0
    for length in lengths:
        padded = (documents + 1) * longest
        if documents and padded - tokens - length > max(64, padded // 8):
            groups.append((documents, longest))
            documents = tokens = 0
        if not documents:
            longest = length
        documents, tokens = documents + 1, tokens + length
    return groups + [(documents, longest)] if documents else groups


class ToSlots(torch.autograd.Function):
    """x [N, ...] -> [rows, ...]: token i in row slot[i], 0 elsewhere. Its gradient is a gather."""

    @staticmethod
    def forward(ctx, x, slot, rows):
        ctx.save_for_backward(slot)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, slot, x)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class FromSlots(torch.autograd.Function):
    """The way back, y [rows, ...] -> [N, ...]: index_select, whose own gradient is slower."""

    @staticmethod
    def forward(ctx, y, slot):
        ctx.save_for_backward(slot)
        ctx.rows = len(y)
        return y.index_select(0, slot)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def dense_attention(q, k, v, documents, length, window):
    """q [D*T, H, Dh], k and v [D*T, K, Dh] of D = `documents` of one length -> [D*T, H, Dh]."""
    q, k, v = (x.unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))  # [D, H or K, T, Dh]
    band = None
    if 0 < window < length:
        band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=band, is_causal=band is None, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)


def ragged_attention(q, k, v, groups, slot, window):
    """As attention_reference, for documents of several lengths."""
    sizes = [documents * length for documents, length in groups]
    q, k, v = (ToSlots.apply(x, slot, sum(sizes)).split(sizes) for x in (q, k, v))
    outs = [dense_attention(q[i], k[i], v[i], *groups[i], window) for i in range(len(groups))]
    return FromSlots.apply(torch.cat(outs), slot)


def exclude_ragged_from_compile():
    """Make torch.compile leave ragged_attention alone: its shapes change with every pack, so that
    compiling would never end."""
    # Called by GPT.compile: a decorator would import the compiler, two seconds, into every script.
    global ragged_attention
    ragged_attention = torch.compiler.disable(ragged_attention)


def attention_reference(q, k, v, layout, window=0):
    """See attention."""
    groups, slot = layout
    if slot is None:
        return dense_attention(q, k, v, *groups[0], window)
    return ragged_attention(q, k, v, groups, slot, window)


# --------------------------------------------------------------------------------------------------
# Sizes

TILE = 128  # rows of a tile in the tables; a multiple of every BLOCK that a kernel cuts it into
WIDTHS = (32, 64, 128)  # of a head; for others the reference runs

# (architecture, head width): (BLOCK_M queries, BLOCK_N keys, warps, stages) of forward, dkdv, dq.
# Those of sm_90 were the fastest on an H200 (bench.gpu --part=sweep). The others are the largest
# that compile without spills (bench/sass.py), on sm_89 within the 99 KiB of shared memory of
# consumer GPUs.
BLOCKS = {
    (80, 64): ((128, 64, 4, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    (80, 128): ((128, 64, 8, 3), (64, 64, 8, 2), (128, 32, 8, 2)),
    (89, 64): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    (89, 128): ((128, 32, 8, 3), (64, 32, 8, 2), (128, 32, 8, 2)),
    (90, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
    (90, 128): ((64, 64, 4, 3), (32, 128, 8, 3), (128, 64, 8, 3)),
    (100, 64): ((128, 128, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2)),
    (100, 128): ((128, 64, 8, 3), (32, 128, 8, 3), (128, 32, 8, 2)),
}
BLOCKS_FP32 = ((16, 16, 8, 1),) * 3  # exact products use no tensor cores and need registers


def blocks(x):
    """The three rows of sizes for queries x [N, H, Dh]."""
    return BLOCKS_FP32 if x.dtype == torch.float32 else BLOCKS[arch(x.device), max(x.shape[2], 64)]


def tiles(cu_seqlens, N):
    """cu_seqlens int32 [D+1], N tokens -> Tiles.

    Everything stays on the device and its size depends on N and D alone: nothing waits for the
    GPU, and CUDA graphs can hold it.
    """
    count = (cu_seqlens.diff() + TILE - 1) // TILE  # [D] tiles of each document
    last = count.cumsum(0)
    tile = torch.arange(N // TILE + len(count), device=cu_seqlens.device)  # as many as there can be
    document = torch.searchsorted(last, tile, right=True).clamp(max=len(count) - 1)
    begin, end = cu_seqlens[document], cu_seqlens[document + 1]
    first = begin + (tile - (last - count)[document]) * TILE
    table = torch.stack([first, begin, end], dim=1).to(torch.int32) * (tile < last[-1])[:, None]
    most_keys = (table[:, 0] - table[:, 1]).argsort(descending=True, stable=True)
    most_queries = (table[:, 2] - table[:, 0]).argsort(descending=True, stable=True)
    return Tiles(table[most_keys], table[most_queries])


# --------------------------------------------------------------------------------------------------
# The kernels. A program has one head and one block of rows. Rows count from the document's begin,
# in int32; pointers move in int64. Rows are loaded through pointers: descriptors (TMA) compile to
# the same blocks with as many registers, but cost 3 to 5 tensor maps per program, which short
# documents would feel, and need an allocator. The mask is -1e30, finite: there is no inf - inf.
#
# Without a window each loop runs twice: over the blocks that every row sees, which need no mask,
# and over the others. With a window it runs once, masked.


@triton.jit
def find_rows(tiles_ptr, heads, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's head, its document's begin and length, and the first row of its block.

    There is no work if that row is not below the length.
    """
    head, block = tl.program_id(0) % heads, tl.program_id(0) // heads  # heads fastest: a group reads the same keys
    PARTS: tl.constexpr = TILE // BLOCK
    tile_ptr = tiles_ptr + block // PARTS * 3
    begin, end = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    return head, begin.to(tl.int64), end - begin, tl.load(tile_ptr) - begin + block % PARTS * BLOCK


@triton.jit
def pointers(x_ptr, row, offs, stride, DH: tl.constexpr):
    """To [rows, DH] elements, from `row` on."""
    return x_ptr + row * tl.cast(stride, tl.int64) + offs[:, None] * stride + tl.arange(0, DH)[None, :]


@triton.jit
def load_rows(x_ptr, row, offs, length, stride, DH: tl.constexpr, MASKED: tl.constexpr):
    """[rows, DH]; zeros behind the length, so that a neighbour's inf cannot reach a document."""
    if MASKED:
        return tl.load(pointers(x_ptr, row, offs, stride, DH), mask=(row + offs < length)[:, None], other=0.0)
    return tl.load(pointers(x_ptr, row, offs, stride, DH))


@triton.jit
def store_rows(x_ptr, row, offs, length, stride, x, DH: tl.constexpr):
    """Write x [rows, DH], except behind the length."""
    mask = (row + offs < length)[:, None]
    tl.store(pointers(x_ptr, row, offs, stride, DH), x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible(queries, keys, WINDOW: tl.constexpr):
    if WINDOW > 0:
        return (queries - keys).to(tl.uint32) < WINDOW  # one comparison for both ends: negatives become huge
    return keys <= queries


@triton.jit(do_not_specialize=["N", "H"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    N,
    H,
    stride_q,
    stride_k,
    stride_v,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The output, and the softmax's log2-sum-exp2 [H, N] for the backward: online, in base 2."""
    SCALE: tl.constexpr = LOG2E * DH**-0.5
    head, begin, length, row = find_rows(tiles_ptr, H, TILE, BLOCK_M)
    if row >= length:
        return
    k_ptr += begin * stride_k + head // GROUP * DH
    v_ptr += begin * stride_v + head // GROUP * DH
    rows, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_m = row + rows
    q = load_rows(q_ptr + begin * stride_q + head * DH, row, rows, length, stride_q, DH, True)
    # Far above a masked score and far below all others: p = 0 in a row that has seen no key. If m
    # were the masked score, a fused s * SCALE - m would be its rounding, 1e21, and p infinite.
    m_i = tl.full([BLOCK_M], -1e20, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DH], tl.float32)
    # With a window no row sees the keys before `low`, without one every row does.
    low = tl.maximum(row - WINDOW + 1, 0) if WINDOW > 0 else (row + 1) // BLOCK_N * BLOCK_N
    for masked in tl.static_range(1 if WINDOW > 0 else 0, 2):
        start, end = (low, tl.minimum(row + BLOCK_M, length)) if masked else (0, low)
        for n in tl.range(start, end, BLOCK_N):
            k = load_rows(k_ptr, n, offs_n, length, stride_k, DH, masked)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if masked:
                s = tl.where(visible(offs_m[:, None], n + offs_n[None, :], WINDOW), s, -1e30)
            m_new = tl.maximum(m_i, tl.max(s, 1) * SCALE)
            p = tl.exp2(s * SCALE - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)  # before v is loaded: after it, sm_80 spills
            v = load_rows(v_ptr, n, offs_n, length, stride_v, DH, masked)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m_i = m_new
    store_rows(out_ptr + (begin * H + head) * DH, row, rows, length, H * DH, acc / l_i[:, None], DH)
    tl.store(lse_ptr + head.to(tl.int64) * N + begin + offs_m, m_i + tl.log2(l_i), mask=offs_m < length)


@triton.jit(do_not_specialize=["N", "H"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    tiles_ptr,
    N,
    H,
    stride_q,
    stride_k,
    stride_v,
    stride_d,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq, and delta [H, N] = rowsum(grad * out) for dkdv_kernel.

    The softmax's gradient subtracts delta. Its probabilities are computed again, never stored.
    """
    head, begin, length, row = find_rows(tiles_ptr, H, TILE, BLOCK_M)
    if row >= length:
        return
    k_ptr += begin * stride_k + head // GROUP * DH
    v_ptr += begin * stride_v + head // GROUP * DH
    rows, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_m = row + rows
    q = load_rows(q_ptr + begin * stride_q + head * DH, row, rows, length, stride_q, DH, True)
    grad = load_rows(grad_ptr + (begin * H + head) * DH, row, rows, length, H * DH, DH, True)
    out = load_rows(out_ptr + (begin * H + head) * DH, row, rows, length, H * DH, DH, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    entries = head.to(tl.int64) * N + begin + offs_m
    tl.store(delta_ptr + entries, delta, mask=offs_m < length)
    lse = tl.load(lse_ptr + entries, mask=offs_m < length, other=0.0)
    dq = tl.zeros([BLOCK_M, DH], tl.float32)
    low = tl.maximum(row - WINDOW + 1, 0) if WINDOW > 0 else (row + 1) // BLOCK_N * BLOCK_N
    for masked in tl.static_range(1 if WINDOW > 0 else 0, 2):
        start, end = (low, tl.minimum(row + BLOCK_M, length)) if masked else (0, low)
        for n in tl.range(start, end, BLOCK_N):
            k = load_rows(k_ptr, n, offs_n, length, stride_k, DH, masked)
            v = load_rows(v_ptr, n, offs_n, length, stride_v, DH, masked)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            p = tl.exp2(s * (LOG2E * DH**-0.5) - lse[:, None])
            if masked:
                p = tl.where(visible(offs_m[:, None], n + offs_n[None, :], WINDOW), p, 0.0)
            ds = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr + begin * stride_d + head * DH, row, rows, length, stride_d, dq * DH**-0.5, DH)


@triton.jit(do_not_specialize=["N", "K"])
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    tiles_ptr,
    N,
    K,
    stride_q,
    stride_k,
    stride_v,
    stride_d,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one key head. The GROUP query heads that share it follow one another in one flat
    loop, so that nothing is expanded or added up later."""
    kv_head, begin, length, row = find_rows(tiles_ptr, K, TILE, BLOCK_N)
    if row >= length:
        return
    stride_grad = K * GROUP * DH
    q_ptr += begin * stride_q + kv_head * GROUP * DH
    grad_ptr += begin * stride_grad + kv_head * GROUP * DH
    lse_ptr += (kv_head * GROUP).to(tl.int64) * N + begin
    delta_ptr += (kv_head * GROUP).to(tl.int64) * N + begin
    rows, offs_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    offs_n = row + rows
    k = load_rows(k_ptr + begin * stride_k + kv_head * DH, row, rows, length, stride_k, DH, True)
    v = load_rows(v_ptr + begin * stride_v + kv_head * DH, row, rows, length, stride_v, DH, True)
    dk = tl.zeros([BLOCK_N, DH], tl.float32)
    dv = tl.zeros([BLOCK_N, DH], tl.float32)
    # From here on queries see every key of the block, and need no mask; with a window they see none
    behind = row + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M + (WINDOW - 1 if WINDOW > 0 else 0)
    for unmasked in tl.static_range(1 if WINDOW > 0 else 2):
        start, end = (behind, tl.maximum(behind, length)) if unmasked else (row, tl.minimum(behind, length))
        steps = tl.cdiv(end - start, BLOCK_M)
        for j in tl.range(0, steps * GROUP):
            h, m = j // steps, start + j % steps * BLOCK_M
            q = load_rows(q_ptr + h * DH, m, offs_m, length, stride_q, DH, True)
            grad = load_rows(grad_ptr + h * DH, m, offs_m, length, stride_grad, DH, True)
            entry, exists = h * tl.cast(N, tl.int64) + m, m + offs_m < length
            lse = tl.load(lse_ptr + entry + offs_m, mask=exists, other=float("inf"))  # else p = exp2(s - inf) = 0
            delta = tl.load(delta_ptr + entry + offs_m, mask=exists, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]: no transposes in registers
            p = tl.exp2(s * (LOG2E * DH**-0.5) - lse[None, :])
            if not unmasked:
                p = tl.where(visible(m + offs_m[None, :], offs_n[:, None], WINDOW), p, 0.0)
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    first = begin * stride_d + kv_head * DH
    store_rows(dk_ptr + first, row, rows, length, stride_d, dk * DH**-0.5, DH)
    store_rows(dv_ptr + first, row, rows, length, stride_d, dv, DH)


# --------------------------------------------------------------------------------------------------
# The launches


def heads_together(x):
    """x [N, heads, Dh] as the kernels read it: each row's heads one behind the other.

    x itself if it is so already, even as a part of a wider tensor's rows.
    """
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def sizes(q, k, window, block_m, block_n, warps, stages):
    """The keywords that every launch takes."""
    return dict(
        GROUP=q.shape[1] // k.shape[1],
        DH=q.shape[2],
        WINDOW=window,
        TILE=TILE,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )


def forward_fake(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@register("attention(Tensor q, Tensor k, Tensor v, Tensor queries, int window) -> (Tensor, Tensor)", fake=forward_fake)
def attention_forward(q, k, v, queries, window):
    """Returns the output, and lse fp32 [H, N] for the backward."""
    q, k, v = map(heads_together, (q, k, v))
    N, H, _ = q.shape
    out, lse = forward_fake(q)
    shape = blocks(q)[0]
    grid = (len(queries) * (TILE // shape[0]) * H,)
    strides = q.stride(0), k.stride(0), v.stride(0)
    forward_kernel[grid](q, k, v, out, lse, queries, N, H, *strides, **sizes(q, k, window, *shape))
    return out, lse


def backward_fake(grad, q, k, v, *_):
    return q.new_empty(q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2])


@register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor queries, "
    "Tensor keys, int window) -> Tensor",
    fake=backward_fake,
)
def attention_backward(grad, q, k, v, out, lse, queries, keys, window):
    """Returns dq, dk and dv side by side, [N, H + 2K, Dh]: no pass over memory has to join them."""
    q, k, v = map(heads_together, (q, k, v))
    grad = grad.contiguous()
    N, H, _ = q.shape
    K = k.shape[1]
    d_qkv = backward_fake(grad, q, k, v)
    dq, dk, dv = d_qkv.split([H, K, K], dim=1)
    delta = torch.empty_like(lse)
    strides = q.stride(0), k.stride(0), v.stride(0), d_qkv.stride(0)
    _, for_dkdv, for_dq = blocks(q)
    grid = (len(queries) * (TILE // for_dq[0]) * H,)
    dq_kernel[grid](q, k, v, out, grad, dq, lse, delta, queries, N, H, *strides, **sizes(q, k, window, *for_dq))
    grid = (len(keys) * (TILE // for_dkdv[1]) * K,)
    dkdv_kernel[grid](q, k, v, grad, dk, dv, lse, delta, keys, N, K, *strides, **sizes(q, k, window, *for_dkdv))
    return d_qkv


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, queries, keys, window):
        out, lse = attention_forward(q, k, v, queries, window)
        ctx.save_for_backward(q, k, v, out, lse, queries, keys)
        ctx.window, ctx.heads = window, [q.shape[1], k.shape[1], k.shape[1]]
        return out

    @staticmethod
    def backward(ctx, grad):
        d_qkv = attention_backward(grad, *ctx.saved_tensors, ctx.window)
        return *d_qkv.split(ctx.heads, dim=1), None, None, None


class RopeAttention(torch.autograd.Function):
    """qk_norm_rope and attention in one: the rotated queries and keys are all that is written in
    between, and the gradients of queries, keys and values lie side by side from the start."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, heads, eps, queries, keys, window):
        qk = rotate_queries_and_keys(qkv, q_weight, k_weight, cos, sin, heads, eps)  # [N, H + K, Dh]
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, qk.shape[1] :]
        out, lse = attention_forward(q, k, v, queries, window)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, qk, out, lse, queries, keys)
        ctx.heads, ctx.eps, ctx.window = heads, eps, window
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, q_weight, k_weight, cos, sin, qk, out, lse, queries, keys = ctx.saved_tensors
        q, k, v = qk[:, : ctx.heads], qk[:, ctx.heads :], qkv[:, qk.shape[1] :]
        d_qkv = attention_backward(grad, q, k, v, out, lse, queries, keys, ctx.window)
        d_weights = rotate_back(d_qkv, qkv, q_weight, k_weight, cos, sin, ctx.heads, ctx.eps)
        dq, dk = (None, None) if q_weight is None else d_weights.to(q_weight.dtype)
        return d_qkv, dq, dk, None, None, None, None, None, None, None


def rope_attention(qkv, q_weight, k_weight, cos, sin, heads, eps, layout, window=0):
    """qkv [N, H+2K, Dh] -> [N, H, Dh]: kernels/rope.py's qk_norm_rope, then attention."""
    rope = q_weight, k_weight, cos, sin, heads, eps
    if isinstance(layout, Tiles) and use("rope_attention", qkv):
        return RopeAttention.apply(qkv, *rope, *layout, window)
    kv_heads = (qkv.shape[1] - heads) // 2
    return attention(*qk_norm_rope(qkv, *rope).split([heads, kv_heads, kv_heads], dim=1), layout, window)


# (head width, query heads a key head, window): those of the models that config_for gives, and of
# Hugging Face's most common ones
PROOF_HEADS = [(64, 1, 0), (64, 1, 70), (64, 3, 0), (64, 7, 0), (128, 1, 0), (128, 2, 0), (128, 4, 0)]
PROOF_DOCUMENTS = 0, 1, 131, 131, 140  # one of them longer than a tile


@proof("attention")
def attention_proof(device):
    cu_seqlens = torch.tensor(PROOF_DOCUMENTS, device=device)
    inputs = [torch.randn(140, group + 2, dh, device=device, dtype=torch.bfloat16) for dh, group, _ in PROOF_HEADS]

    def run(*qkvs):  # each as the model has it: one tensor
        outs = []
        for qkv, (dh, group, window) in zip(qkvs, PROOF_HEADS, strict=True):
            q, k, v = qkv.split([group, 1, 1], dim=1)
            outs.append(attention(q, k, v, layout(cu_seqlens, q, dh), window))
        return outs

    return run, inputs


@proof("rope_attention")
def rope_attention_proof(device):
    cu_seqlens = torch.tensor(PROOF_DOCUMENTS, device=device)
    inputs, angles = [], []
    for dh, group, _ in PROOF_HEADS:
        inputs += [torch.randn(140, group + 2, dh, device=device).bfloat16()]
        inputs += [torch.rand(dh, device=device) for _ in range(2)]
        angles.append(6 * torch.rand(140, dh // 2, device=device))

    def with_and_without_norm(*inputs):
        outs = []
        for i, (dh, group, window) in enumerate(PROOF_HEADS):
            qkv, q_weight, k_weight = inputs[3 * i : 3 * i + 3]
            rest = angles[i].cos(), angles[i].sin(), group, 1e-6
            table = layout(cu_seqlens, qkv, dh)
            outs.append(rope_attention(qkv, q_weight, k_weight, *rest, table, window))
            if window:  # rope's own proof has the others
                outs.append(rope_attention(qkv, None, None, *rest, table))
        return outs

    return with_and_without_norm, inputs
