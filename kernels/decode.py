"""Sampling's two ops on a cache of keys and values: put one new token a sequence into it, and let that token attend to its sequence.

`append_rope` is qk_norm_rope of kernels/rope.py and the two writes into the cache in one kernel. `decode_attention` splits each sequence's keys over
several programs, for one token a sequence cannot fill a GPU, and then adds up the parts (Flash-Decoding: Dao et al. 2023). The query heads that share
a key head are the rows of one product, so each key is read once. Lengths stay on the device and no launch depends on them: CUDA graphs can hold both.
Neither has a gradient.
"""
import torch
import torch.nn.functional as F

from kernels._lib import LOG2E, proof, register, sm_count, tl, triton, use
from kernels.attention import WIDTHS, load_rows
from kernels.rope import qk_norm_rope_reference


def append_rope(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    """Normalise and turn the new tokens' queries and keys; write keys and values into the cache; return the queries [B, H, Dh].

    qkv [B, H+2K, Dh]; weights fp32 [Dh] or None; cos, sin fp32 [context, Dh/2], whole tables; k_cache, v_cache [B, S, K, Dh], of which row b holds
    lengths[b] < S tokens (int64 [B], not changed here). A row that is full already is left as it is by the kernel, and an error in the reference.
    """
    if use("append_rope", qkv) and qkv.shape[2] in WIDTHS:
        return append_rope_kernels(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths)
    return append_rope_reference(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths)


def decode_attention(q, k_cache, v_cache, lengths):
    """q [B, H, Dh]; k_cache and v_cache [B, S, K, Dh], of which row b holds lengths[b] >= 1 tokens, int64 [B] -> [B, H, Dh]."""
    if use("decode_attention", q) and q.shape[2] in WIDTHS:
        return decode_kernels(q, k_cache, v_cache, lengths)
    return decode_attention_reference(q, k_cache, v_cache, lengths)


def append_rope_reference(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    """See append_rope."""
    kv_heads = k_cache.shape[2]
    qkv = qk_norm_rope_reference(qkv, q_weight, k_weight, cos[lengths], sin[lengths], heads, eps)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    slots = torch.arange(len(q), device=q.device)
    k_cache[slots, lengths], v_cache[slots, lengths] = k, v
    return q


def decode_attention_reference(q, k_cache, v_cache, lengths):
    """See decode_attention."""
    longest = int(lengths.max())
    k, v = k_cache[:, :longest].transpose(1, 2), v_cache[:, :longest].transpose(1, 2)  # [B, K, T, Dh]
    seen = torch.arange(longest, device=q.device) < lengths[:, None]  # [B, T]
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1])
    return out[:, :, 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# append_rope. One program: a few of one slot's H+2K heads. All arithmetic in fp32, one rounding at the store.

HEADS = 8  # a program


@triton.jit
def append_rope_kernel(qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, H, K, S, stride_slot, eps,
                       NORM: tl.constexpr, DH: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    HALF: tl.constexpr = DH // 2
    slot, head, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)[None, :]
    position = tl.load(lengths_ptr + slot)
    inside = position < S  # what a full slot lacks is room: nothing is written there
    x_ptrs = qkv_ptr + (slot * (H + 2 * K) + head)[:, None] * DH + offs
    a = tl.load(x_ptrs, mask=(head < H + 2 * K)[:, None], other=0.0)  # [HEADS, HALF]
    b = tl.load(x_ptrs + HALF, mask=(head < H + 2 * K)[:, None], other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        rstd = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / DH + eps)[:, None]
        is_query = (head < H)[:, None]
        x *= rstd * tl.where(is_query, tl.load(q_weight_ptr + offs), tl.load(k_weight_ptr + offs))
        y *= rstd * tl.where(is_query, tl.load(q_weight_ptr + HALF + offs), tl.load(k_weight_ptr + HALF + offs))
    cos = tl.load(cos_ptr + position * HALF + offs, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + offs, mask=inside, other=0.0)
    x, y = (x * cos - y * sin).to(q_ptr.dtype.element_ty), (y * cos + x * sin).to(q_ptr.dtype.element_ty)
    q_ptrs, mask = q_ptr + (slot * H + head)[:, None] * DH + offs, (head < H)[:, None]
    tl.store(q_ptrs, x, mask=mask)
    tl.store(q_ptrs + HALF, y, mask=mask)
    row = slot * stride_slot + position * K * DH  # of the cache
    k_ptrs, mask = k_ptr + row + (head - H)[:, None] * DH + offs, ((head >= H) & (head < H + K) & inside)[:, None]
    tl.store(k_ptrs, x, mask=mask)
    tl.store(k_ptrs + HALF, y, mask=mask)
    v_ptrs, mask = v_ptr + row + (head - H - K)[:, None] * DH + offs, ((head >= H + K) & (head < H + 2 * K) & inside)[:, None]
    tl.store(v_ptrs, a, mask=mask)
    tl.store(v_ptrs + HALF, b, mask=mask)


@register("append_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads, float eps, Tensor(a!) k_cache, Tensor(b!) v_cache, "
          "Tensor lengths) -> Tensor", fake=lambda qkv, q_weight, k_weight, cos, sin, heads, *_: qkv.new_empty(qkv.shape[0], heads, qkv.shape[2]))  # fmt: skip
def append_rope_kernels(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    (B, S, K, Dh), norm = k_cache.shape, q_weight is not None
    q = qkv.new_empty(B, heads, Dh)
    weights = (q_weight, k_weight) if norm else (qkv, qkv)  # not read
    append_rope_kernel[(B, triton.cdiv(heads + 2 * K, HEADS))](qkv.contiguous(), *weights, cos, sin, q, k_cache, v_cache, lengths, heads, K, S,
                                                               slot_stride(k_cache, v_cache), eps, NORM=norm, DH=Dh, HEADS=HEADS, num_warps=1)  # fmt: skip
    return q


def slot_stride(k_cache, v_cache):
    """Elements from slot to slot in both caches, each slot's rows lying one behind the other."""
    _, _, K, Dh = k_cache.shape
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (K * Dh, Dh, 1), "caches [B, S, K, Dh] with gaps within a slot"
    return k_cache.stride(0)


# ---------------------------------------------------------------------------------------------------------------------------------
# decode_attention. One program: one slot, one key head with its GROUP query heads, one split of the slot's keys; products are 16 rows high at the least.

BLOCK = {2: (64, 4, 3), 4: (16, 4, 1)}  # bytes an element: BLOCK_N keys, warps, stages


def count_splits(length, programs, block, sms):
    """Over how many programs each of `programs` walks through `length` keys is split: FlashAttention-3's rule.

    None where they fill the GPU or there is little to split; else the least that keeps it within 85 % as busy as the best would. From the length of
    the cache, not from what it holds: that stands on the device, and one CUDA graph must do for all.
    """
    blocks = triton.cdiv(length, block)
    if programs >= 0.8 * sms or blocks <= 4:
        return 1
    counts = [s for s in range(1, min(32, blocks) + 1) if s == 1 or triton.cdiv(blocks, s) != triton.cdiv(blocks, s - 1)]
    busy = [programs * s / sms / triton.cdiv(programs * s, sms) for s in counts]  # share of the waves' places that are taken
    return next(s for s, share in zip(counts, busy) if share >= 0.85 * max(busy))


@triton.jit
def decode_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr, K, S, stride_slot,
                  GROUP: tl.constexpr, ROWS: tl.constexpr, DH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """This split's output [GROUP, DH] and log2-sum-exp2; 0 and -1e30 where no keys are left for it."""
    SCALE: tl.constexpr = LOG2E * DH**-0.5
    slot, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.minimum(tl.load(lengths_ptr + slot), S).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    end = tl.minimum((split + 1) * share, length)
    k_ptr += slot * stride_slot + kv_head * DH
    v_ptr += slot * stride_slot + kv_head * DH
    rows, offs_n = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr + (slot * K + kv_head) * GROUP * DH, 0, rows, GROUP, DH, DH, True)
    m_i = tl.full([ROWS], -1e30, tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DH], tl.float32)
    for n in tl.range(split * share, end, BLOCK_N):
        k = load_rows(k_ptr, n, offs_n, end, K * DH, DH, True)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where((n + offs_n)[None, :] < end, s, -1e30)
        m_new = tl.maximum(m_i, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_rows(v_ptr, n, offs_n, end, K * DH, DH, True)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    part = ((slot * K + kv_head) * SPLITS + split) * GROUP + rows  # with one split these are the rows of the output itself
    out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    tl.store(out_ptr + part[:, None] * DH + tl.arange(0, DH)[None, :], out.to(out_ptr.dtype.element_ty), mask=(rows < GROUP)[:, None])
    if SPLITS > 1:
        tl.store(lse_ptr + part, tl.where(l_i > 0, m_i + tl.log2(l_i), -1e30), mask=rows < GROUP)


@triton.jit
def combine_kernel(part_ptr, lse_ptr, out_ptr, GROUP: tl.constexpr, DH: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """One program: one query head of one slot; its parts, weighted by 2^lse. An empty one weighs 2^-1e30 = 0."""
    query = tl.program_id(0).to(tl.int64)
    splits, offs = tl.arange(0, ROWS), tl.arange(0, DH)[None, :]
    part = (query // GROUP * SPLITS + splits) * GROUP + query % GROUP
    lse = tl.load(lse_ptr + part, mask=splits < SPLITS, other=-1e30)
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = tl.where(splits < SPLITS, weight / tl.sum(weight, 0), 0.0)
    parts = tl.load(part_ptr + part[:, None] * DH + offs, mask=(splits < SPLITS)[:, None], other=0.0)
    tl.store(out_ptr + query * DH + tl.arange(0, DH), tl.sum(parts * weight[:, None], 0).to(out_ptr.dtype.element_ty))


@register("decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths) -> Tensor", fake=lambda q, *_: q.new_empty(q.shape))
def decode_kernels(q, k_cache, v_cache, lengths):
    (B, H, Dh), (S, K) = q.shape, k_cache.shape[1:3]
    block, warps, stages = BLOCK[q.element_size()]
    splits = count_splits(S, B * K, block, sm_count(q.device))
    out = q.new_empty(q.shape)
    parts = out if splits == 1 else q.new_empty(B, K, splits, H // K, Dh, dtype=torch.float32)
    lse = q.new_empty(B, K, splits, H // K, dtype=torch.float32)
    decode_kernel[(B, K, splits)](q.contiguous(), k_cache, v_cache, lengths, parts, lse, K, S, slot_stride(k_cache, v_cache),
                                  GROUP=H // K, ROWS=max(16, triton.next_power_of_2(H // K)), DH=Dh, SPLITS=splits, BLOCK_N=block,
                                  num_warps=warps, num_stages=stages)  # fmt: skip
    if splits > 1:
        combine_kernel[(B * H,)](parts, lse, out, GROUP=H // K, DH=Dh, SPLITS=splits, ROWS=triton.next_power_of_2(splits))
    return out


# ---------------------------------------------------------------------------------------------------------------------------------
# Their proofs


@proof("decode_attention")
def decode_attention_proof(device):
    normal = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    inputs = [normal(3, 8, 64), normal(3, 400, 2, 64), normal(3, 400, 2, 64), torch.tensor([1, 200, 400], device=device)]
    return torch.no_grad()(decode_attention), torch.no_grad()(decode_attention_reference), inputs


@proof("append_rope")
def append_rope_proof(device):
    normal = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    angle = torch.rand(40, 32, device=device) * 6
    weights, caches = [torch.rand(64, device=device) for _ in "qk"], [normal(3, 40, 2, 64) for _ in "kv"]
    inputs = [normal(3, 12, 64), *weights, angle.cos(), angle.sin(), *caches]

    @torch.no_grad()
    def run(op, qkv, q_weight, k_weight, cos, sin, k_cache, v_cache):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        q = op(qkv, q_weight, k_weight, cos, sin, 8, 1e-6, k_cache, v_cache, torch.tensor([0, 7, 39], device=device))
        return q, k_cache, v_cache

    return lambda *x: run(append_rope, *x), lambda *x: run(append_rope_reference, *x), inputs
