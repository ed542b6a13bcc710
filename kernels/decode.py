"""Sampling's two ops on a cache of keys and values: `append_rope` puts one new token per sequence
into it, and `decode_attention` lets that token attend to its sequence.

`append_rope` is kernels/rope.py's qk_norm_rope and the two writes into the cache in one kernel.
`decode_attention` splits each sequence's keys over several programs, because one token per
sequence cannot fill a GPU, and then adds up the parts (Flash-Decoding: Dao et al. 2023). The query
heads that share a key head are the rows of one product, so each key is read once. Lengths stay on
the device and no launch depends on them, so CUDA graphs can hold both ops. Neither has a gradient.
"""

import torch

from kernels._lib import LOG2E, cdiv, contiguous, next_power_of_2, register, sm_count, tl, triton, use
from kernels.attention import PROOF_HEADS, WIDTHS, load_rows
from kernels.proof import proof
from kernels.rope import normalise_and_rotate


def append_rope(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    """Normalises and rotates the new tokens' queries and keys; writes keys and values to the cache.

    qkv: [B, H+2K, Dh]. q_weight, k_weight: fp32 [Dh] or None. cos, sin: fp32 [B, Dh/2], of the
    angles at each new token's position. k_cache, v_cache: [B, S, K, Dh]; row b holds lengths[b] < S
    tokens. lengths: int64 [B], not changed here. Returns the queries [B, H, Dh].

    The kernel leaves a row that is already full as it is; in the reference it is an error.
    """
    kernels = use("append_rope", qkv) and qkv.shape[2] in WIDTHS
    op = append_rope_kernels if kernels else append_rope_reference
    return op(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths)


def decode_attention(q, k_cache, v_cache, lengths, window=0, bias=None):
    """q [B, H, Dh] of each sequence's last token -> [B, H, Dh].

    k_cache, v_cache: [B, S, K, Dh]; row b holds lengths[b] >= 1 tokens, that one included. lengths:
    int64 [B]. window: how many tokens a token sees, itself included; 0: all of its sequence. bias:
    from `decode_bias`, which layers can share; None: it is made here.
    """
    if use("decode_attention", q) and q.shape[2] in WIDTHS:
        return decode_kernels(q, k_cache, v_cache, lengths, window)
    return decode_attention_reference(q, k_cache, v_cache, lengths, window, bias)


def decode_bias(x, head_dim, lengths, window):
    """What the reference adds to the scores: 0 where a last token sees a key, else -inf, [B, 1, T].

    x: any tensor of the queries' dtype and device. None if the kernel runs: it compares lengths.
    """
    if use("decode_attention", x) and head_dim in WIDTHS:
        return None
    key = torch.arange(int(lengths.max()), device=x.device)
    unseen = key >= lengths[:, None]  # [B, T]
    if window:
        unseen |= key < lengths[:, None] - window
    bias = torch.zeros(unseen.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return bias.masked_fill_(unseen, -torch.inf)[:, None]


def append_rope_reference(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    """See append_rope."""
    qk, v = qkv.split([heads + k_cache.shape[2], k_cache.shape[2]], dim=1)
    qk = qk.to(torch.promote_types(qk.dtype, torch.float32))
    out = torch.empty_like(qk, memory_format=torch.contiguous_format)
    normalise_and_rotate(qk, q_weight, k_weight, cos, sin, heads, eps, out)
    out, slots = out.to(qkv.dtype), torch.arange(len(qkv), device=qkv.device)
    k_cache[slots, lengths], v_cache[slots, lengths] = out[:, heads:], v
    return out[:, :heads]


def decode_attention_reference(q, k_cache, v_cache, lengths, window=0, bias=None):
    """See decode_attention."""
    (B, H, Dh), K = q.shape, k_cache.shape[2]
    if bias is None:
        bias = decode_bias(q, 0, lengths, window)
    T = bias.shape[2]
    # Two batched products: PyTorch's attention takes 1.6 times as long for a single query
    k, v = (x[:, :T].transpose(1, 2).flatten(0, 1).to(bias.dtype) for x in (k_cache, v_cache))  # [B*K, T, Dh]
    q_groups = q.reshape(B * K, H // K, Dh).to(bias.dtype)
    bias = bias.expand(B, K, T).reshape(B * K, 1, T)
    p = torch.baddbmm(bias, q_groups, k.mT, alpha=Dh**-0.5).softmax(-1)  # [B*K, H/K, T]
    return torch.bmm(p, v).view(B, H, Dh).to(q.dtype)


# --------------------------------------------------------------------------------------------------
# append_rope. A program takes some of one slot's H+2K heads. All arithmetic is fp32, with one
# rounding at the store.

HEADS = 8  # per program


@triton.jit(do_not_specialize=["H", "K", "S"])
def append_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    H,
    K,
    S,
    stride_slot,
    stride_row,
    stride_head,
    eps,
    DH: tl.constexpr,
    HEADS: tl.constexpr,
):
    HALF: tl.constexpr = DH // 2
    slot, offs = tl.program_id(0).to(tl.int64), tl.arange(0, HALF)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    position = tl.load(lengths_ptr + slot)
    has_room = position < S  # nothing is written to a full slot
    x_ptrs = qkv_ptr + (slot * (H + 2 * K) + head)[:, None] * DH + offs
    a = tl.load(x_ptrs, mask=(head < H + 2 * K)[:, None], other=0.0)  # [HEADS, HALF]
    b = tl.load(x_ptrs + HALF, mask=(head < H + 2 * K)[:, None], other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    is_query = (head < H)[:, None]
    if q_weight_ptr is not None:
        rstd = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / DH + eps)[:, None]
        x *= rstd * tl.where(is_query, tl.load(q_weight_ptr + offs), tl.load(k_weight_ptr + offs))
        y *= rstd * tl.where(is_query, tl.load(q_weight_ptr + HALF + offs), tl.load(k_weight_ptr + HALF + offs))
    cos, sin = tl.load(cos_ptr + slot * HALF + offs), tl.load(sin_ptr + slot * HALF + offs)
    x, y = (x * cos - y * sin).to(q_ptr.dtype.element_ty), (y * cos + x * sin).to(q_ptr.dtype.element_ty)
    q_ptrs = q_ptr + (slot * H + head)[:, None] * DH + offs
    tl.store(q_ptrs, x, mask=is_query)
    tl.store(q_ptrs + HALF, y, mask=is_query)
    row = slot * stride_slot + position * stride_row  # of the cache
    k_ptrs = k_ptr + row + (head - H)[:, None] * stride_head + offs
    is_key = ((head >= H) & (head < H + K) & has_room)[:, None]
    tl.store(k_ptrs, x, mask=is_key)
    tl.store(k_ptrs + HALF, y, mask=is_key)
    v_ptrs = v_ptr + row + (head - H - K)[:, None] * stride_head + offs
    is_value = ((head >= H + K) & (head < H + 2 * K) & has_room)[:, None]
    tl.store(v_ptrs, a, mask=is_value)
    tl.store(v_ptrs + HALF, b, mask=is_value)


@register(
    "append_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads, float eps, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths) -> Tensor",
    fake=lambda qkv, q_weight, k_weight, cos, sin, heads, *_: qkv.new_empty(qkv.shape[0], heads, qkv.shape[2]),
)
def append_rope_kernels(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    B, S, K, Dh = k_cache.shape
    q = qkv.new_empty(B, heads, Dh)
    tensors = *contiguous(qkv, q_weight, k_weight, cos, sin), q, k_cache, v_cache, lengths
    sizes, grid = (heads, K, S, *cache_strides(k_cache, v_cache)), (B, cdiv(heads + 2 * K, HEADS))
    append_rope_kernel[grid](*tensors, *sizes, eps, DH=Dh, HEADS=HEADS, num_warps=1)
    return q


def cache_strides(k_cache, v_cache):
    """Elements from slot to slot, from token to token and from head to head, in both caches."""
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1, "keys and values lie differently"
    return k_cache.stride()[:3]


# --------------------------------------------------------------------------------------------------
# decode_attention. A program takes one slot, one key head with its GROUP query heads, and one split
# of the slot's visible keys. Products are at least 16 rows high.

BLOCK = {2: (64, 4, 3), 4: (16, 4, 1)}  # bytes per element: BLOCK_N keys, warps, stages


def count_splits(length, programs, block, sms):
    """Over how many programs each of `programs` that walks through `length` keys is split.

    FlashAttention-3's rule: no split if the programs fill the GPU or there is little to split, else
    the fewest that keep it within 85 % as busy as the best number would. `length` is what the cache
    has room for, or the window, not what the cache holds: that stands on the device, and one CUDA
    graph must serve every length.
    """
    blocks = cdiv(length, block)
    if programs >= 0.8 * sms or blocks <= 4:
        return 1
    # One split more is of use only if each then has fewer blocks
    useful = [1, *(s for s in range(2, min(32, blocks) + 1) if cdiv(blocks, s) < cdiv(blocks, s - 1))]
    # The share of places that are taken in the waves of programs
    busy = {s: programs * s / sms / cdiv(programs * s, sms) for s in useful}
    return next(s for s in useful if busy[s] >= 0.85 * max(busy.values()))


@triton.jit(do_not_specialize=["K", "S", "window"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    K,
    S,
    stride_slot,
    stride_row,
    stride_head,
    window,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This split's output [GROUP, DH] and log2-sum-exp2: 0 and -1e30 if no keys are left for it."""
    SCALE: tl.constexpr = LOG2E * DH**-0.5
    slot, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.minimum(tl.load(lengths_ptr + slot), S).to(tl.int32)
    first = tl.maximum(length - window, 0)  # of the visible keys
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    k_ptr += slot * stride_slot + kv_head * stride_head
    v_ptr += slot * stride_slot + kv_head * stride_head
    rows, offs_n = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr + (slot * K + kv_head) * GROUP * DH, 0, rows, GROUP, DH, DH, True)
    m_i = tl.full([ROWS], -1e30, tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DH], tl.float32)
    for n in tl.range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, n, offs_n, end, stride_row, DH, True)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where((n + offs_n)[None, :] < end, s, -1e30)
        m_new = tl.maximum(m_i, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_rows(v_ptr, n, offs_n, end, stride_row, DH, True)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    part = ((slot * K + kv_head) * SPLITS + split) * GROUP + rows  # with one split, the rows of the output itself
    out = (acc / tl.where(l_i > 0, l_i, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part[:, None] * DH + tl.arange(0, DH)[None, :], out, mask=(rows < GROUP)[:, None])
    if SPLITS > 1:
        tl.store(lse_ptr + part, tl.where(l_i > 0, m_i + tl.log2(l_i), -1e30), mask=rows < GROUP)


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, GROUP: tl.constexpr, DH: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr
):
    """One query head of one slot: its parts, weighted by 2^lse. An empty one weighs 2^-1e30 = 0."""
    query = tl.program_id(0).to(tl.int64)
    splits, offs = tl.arange(0, ROWS), tl.arange(0, DH)[None, :]
    part = (query // GROUP * SPLITS + splits) * GROUP + query % GROUP
    lse = tl.load(lse_ptr + part, mask=splits < SPLITS, other=-1e30)
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = tl.where(splits < SPLITS, weight / tl.sum(weight, 0), 0.0)
    parts = tl.load(part_ptr + part[:, None] * DH + offs, mask=(splits < SPLITS)[:, None], other=0.0)
    out = tl.sum(parts * weight[:, None], 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query * DH + tl.arange(0, DH), out)


@register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, int window) -> Tensor",
    fake=lambda q, *_: q.new_empty(q.shape),
)
def decode_kernels(q, k_cache, v_cache, lengths, window):
    (B, H, Dh), (S, K) = q.shape, k_cache.shape[1:3]
    window = min(window or S, S)
    block, warps, stages = BLOCK[q.element_size()]
    splits = count_splits(window, B * K, block, sm_count(q.device))
    out = q.new_empty(q.shape)
    parts = out if splits == 1 else q.new_empty(B, K, splits, H // K, Dh, dtype=torch.float32)
    lse = q.new_empty(B, K, splits, H // K, dtype=torch.float32)
    decode_kernel[(B, K, splits)](
        q.contiguous(),
        k_cache,
        v_cache,
        lengths,
        parts,
        lse,
        K,
        S,
        *cache_strides(k_cache, v_cache),
        window,
        GROUP=H // K,
        ROWS=max(16, next_power_of_2(H // K)),
        DH=Dh,
        SPLITS=splits,
        BLOCK_N=block,
        num_warps=warps,
        num_stages=stages,
    )
    if splits > 1:
        rows = next_power_of_2(splits)
        combine_kernel[(B * H,)](parts, lse, out, GROUP=H // K, DH=Dh, SPLITS=splits, ROWS=rows)
    return out


# --------------------------------------------------------------------------------------------------
# Their proofs


@proof("decode_attention")
def decode_attention_proof(device):
    inputs = []
    for dh, group, _ in PROOF_HEADS:
        shapes = [(3, 2 * group, dh), (3, 400, 2, dh), (3, 400, 2, dh)]
        inputs += [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    lengths = torch.tensor([1, 200, 400], device=device)

    @torch.no_grad()
    def run(*inputs):
        outs = []
        for q, k, v in zip(inputs[::3], inputs[1::3], inputs[2::3]):
            outs += [decode_attention(q, k, v, lengths, window) for window in (0, 150)]
            short = k[:, :64], v[:, :64], lengths.clamp(max=64)
            outs.append(decode_attention(q, *short))  # in one split
        return outs

    return run, inputs


@proof("append_rope")
def append_rope_proof(device):
    inputs = []
    for dh in (64, 128):
        shapes = [(3, 12, dh), (3, 40, 2, dh), (3, 40, 2, dh)]
        inputs += [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
        inputs += [torch.rand(dh, device=device) for _ in range(2)]
    angle = 6 * torch.rand(3, 64, device=device)
    lengths = torch.tensor([0, 7, 39], device=device)

    @torch.no_grad()
    def run(*inputs):
        outs = []
        for qkv, k_cache, v_cache, *norms in (inputs[:5], inputs[5:]):
            rotation = [f(angle[:, : qkv.shape[2] // 2]) for f in (torch.cos, torch.sin)]
            for weights in (norms, (None, None)):
                caches = k_cache.clone(), v_cache.clone()
                outs += [append_rope(qkv, *weights, *rotation, 8, 1e-6, *caches, lengths), *caches]
        return outs

    return run, inputs
