"""Drawing a token from logits: temperature, top-k, top-p, the draw and its log-probability in one
kernel. And `record_draw`, which writes what was drawn into the sampler's rows.

    p(token) = softmax(logits / temperature), cut to the `top_k` likeliest tokens, then to the
    fewest that hold `top_p` of what is left (Holtzman et al. 2020, arXiv 1904.09751)

The draw inverts the cumulative distribution at u, so a row depends on its own u alone. The kernel
does not sort: it finds the smallest kept logit by counting. It reads the logits once if nothing is
cut and twice otherwise, where PyTorch's ops make 7 passes over memory, and 20 with a sort. Neither
op has a gradient.
"""

import torch
import torch.nn.functional as F

from kernels._lib import LOG2E, UNFUSED, cdiv, next_power_of_2, register, tl, triton, use
from kernels.proof import proof


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token per row of logits [B, V] -> (tokens int64 [B], logp fp32 [B]).

    u: fp32 [B], uniform in [0, 1). Temperature 0 takes the likeliest token (logp 0: it was
    certain). top_k keeps the k likeliest tokens, top_p the fewest that hold that much probability;
    logp is under what is left. Each of the three is a number for all rows, or a tensor [B, 1] with
    one per row, of which V and infinity cut nothing.

    The kernel takes temperatures between 0 and 1e-6 for 1e-6. It keeps all tokens that are as
    likely as the last one kept; the reference breaks such ties by the order of the ids if top_p
    cuts."""
    settings = temperature, top_k, top_p
    per_row = any(isinstance(x, torch.Tensor) for x in settings)
    if not use("draw", logits) or (not per_row and temperature == 0):
        return draw_reference(logits, u, *settings)
    V = logits.shape[1]
    if per_row:
        columns = [x if isinstance(x, torch.Tensor) else logits.new_full((len(logits), 1), x) for x in settings]
        rows = torch.cat([x.to(torch.float32) for x in columns], 1)  # [B, 3]
        return draw_kernels(logits, u, rows, 1.0, 0.0, 1.0, True)
    cut = 0 < top_k < V or top_p < 1
    return draw_kernels(logits, u, None, float(temperature), float(top_k), float(top_p), cut)


def record_draw(token, logp, slots, is_stop, tokens, logprobs, last, drawn, left, lengths):
    """Write tokens drawn, int64 [b], and their logp, fp32 [b], into the rows `slots`, int64 [b].

    tokens, logprobs: [B, T + 1], written at column `drawn`; a row that is dead (left <= 0) writes
    into the last column, which nobody reads. last: int64 [B], the token drawn last. drawn, left:
    int64 [B], tokens so far and tokens that may follow; none may follow one of the row's stop
    tokens, is_stop bool [B, V]. lengths: int64 [B], tokens in the cache; 0 for a row that is dead.
    """
    op = record_draw_kernels if use("draw", logp) else record_draw_reference
    op(token, logp, slots, is_stop, tokens, logprobs, last, drawn, left, lengths)


# --------------------------------------------------------------------------------------------------
# The references


def draw_reference(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """See draw."""
    if isinstance(temperature, torch.Tensor):
        greedy = temperature[:, 0] == 0
        tempered = logits.float() / temperature.float().masked_fill(greedy[:, None], 1.0)
        tokens, logp = draw_reference(tempered, u, 1.0, top_k, top_p)
        return torch.where(greedy, logits.argmax(-1), tokens), logp.masked_fill(greedy, 0.0)
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if isinstance(top_k, torch.Tensor):
        threshold = logits.sort(descending=True).values.gather(1, top_k.long() - 1)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    elif 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if isinstance(top_p, torch.Tensor) or top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
        likelier = running_sum(ordered) - ordered  # probability of all likelier tokens
        cut = (likelier >= top_p) & (likelier > 0)
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -torch.inf)
    p = logits.softmax(-1)
    tokens, total = invert(p, u)
    # A softmax over many tokens in fp32 loses those far below the likeliest: the total is not 1
    return tokens, (p.gather(1, tokens[:, None])[:, 0] / total).log().float()


def wide_dtype(device):
    """fp64, or fp32 on Apple's GPUs, which have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_blocks(x):
    """x [..., V] -> [..., blocks, width], zeros behind its end; both about the root of V."""
    width = int(x.shape[-1] ** 0.5) + 1
    return F.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))


def running_sum(x):
    """cumsum over the last dimension, in fp64. By products on a GPU: CUDA's own may change its
    bits."""
    if x.device.type == "cpu":
        return x.cumsum(-1, dtype=torch.float64)
    blocks = in_blocks(x.to(wide_dtype(x.device)))
    inside = blocks @ blocks.new_ones(blocks.shape[-1], blocks.shape[-1]).triu()
    before = blocks.sum(-1) @ blocks.new_ones(blocks.shape[-2], blocks.shape[-2]).triu(1)
    return (inside + before[..., None]).flatten(-2)[..., : x.shape[-1]]


def invert(p, u):
    """The first token whose cumulative probability exceeds the share u of the total:
    p fp32 [B, V], u [B] -> (tokens int64 [B], total fp64 [B]).

    On a GPU in two levels, blocks and then tokens, so that p is read once.
    """
    if p.device.type == "cpu":
        up_to = running_sum(p)
        tokens = torch.searchsorted(up_to, u[:, None] * up_to[:, -1:], right=True)[:, 0]
        return tokens.clamp(max=p.shape[-1] - 1), up_to[:, -1]
    blocks = in_blocks(p)  # [B, blocks, width]
    up_to = running_sum(blocks.sum(-1, dtype=wide_dtype(p.device)))  # [B, blocks]
    target = u.to(up_to.dtype) * up_to[:, -1]
    block = (up_to <= target[:, None]).sum(-1).clamp(max=up_to.shape[1] - 1)
    inside = running_sum(blocks[torch.arange(len(p), device=p.device), block])  # [B, width]
    before = torch.where(block > 0, up_to.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    # Rounding must not carry the rest past the block's last token
    largest = inside[:, -1] * (1 - torch.finfo(up_to.dtype).eps * 4)
    rest = torch.minimum(target - before, largest)
    return block * blocks.shape[-1] + (inside <= rest[:, None]).sum(-1), up_to[:, -1]


def record_draw_reference(token, logp, slots, is_stop, tokens, logprobs, last, drawn, left, lengths):
    """See record_draw."""
    before, may_follow = drawn[slots], left[slots]
    alive = may_follow > 0
    column = torch.where(alive, before, tokens.shape[1] - 1)
    tokens[slots, column], logprobs[slots, column], last[slots] = token, logp, token
    drawn[slots] = before + alive
    may_follow = (may_follow - 1) * ~is_stop[slots, token]
    left[slots] = may_follow
    lengths[slots] *= may_follow > 0


# --------------------------------------------------------------------------------------------------
# The kernel. A program takes one row and goes through it a block at a time. z = logit / temperature
# in base 2, so that p = exp2(z - m). The first pass keeps each block's maximum and sum; if nothing
# is cut, these name the block in which the draw falls, and that block alone is read again.
#
# If something is cut, the first pass also counts tokens and adds up probability in bins, one for
# each whole number that z can be rounded down to (its level), the BINS highest. They say in which
# levels the smallest kept logit lies. The second pass copies the logits of these levels, few, out
# of the row (candidates), and among them the logit is found exactly, by bisecting its bit pattern.

LOWEST = -2e30  # stands for -inf
COLDEST = 1e-6  # lower temperatures count as this one: levels of z must fit into an int32
BINS = 32
NONE = -(2**31)  # below every level, and no more than any key
BLOCK, WARPS = 8192, 16


@triton.jit
def load_block(row_ptr, start, V, scale, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """(z fp32 [BLOCK], LOWEST for -inf and behind V; its columns)."""
    cols = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32) * scale
    return tl.where(z < LOWEST, LOWEST, z), cols


@triton.jit
def level_of(z):
    """z rounded down to an int32."""
    return tl.floor(tl.minimum(tl.maximum(z, -1e9), 1e9)).to(tl.int32)


@triton.jit
def key_of(z):
    """An int32 that orders as the fp32 z does."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # -0.0 is as likely as 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def tally(candidates_ptr, n, key, m, BLOCK: tl.constexpr):
    """How many of n candidates have at least this key, and their probability (times a constant)."""
    count, mass = 0, 0.0
    for start in tl.range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(candidates_ptr + cols, mask=cols < n, other=0.0)
        kept = (cols < n) & (key_of(z) >= key)
        count += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(kept, tl.exp2(z - m), 0.0), 0)
    return count, mass


@triton.jit
def last_bin(counts, masses_before, depth, bins_mass, limit):
    """(whether the running probability reaches `limit` within the bins, depth of that bin)."""
    begins_below = (counts > 0) & (masses_before < limit)
    return bins_mass >= limit, tl.max(tl.where(begins_below, depth, 0), 0)


@triton.jit
def levels_of_cut(counts, masses, depth, highest, total, V, top_k, top_p, BINS: tl.constexpr, NONE: tl.constexpr):
    """(low, high): the smallest kept logit has one of these levels, and so has the top_k-th.

    top_k's level is where the count of tokens passes top_k. top_p's is less certain: what top_k
    leaves is only known to lie between `least` and `most`, hence a low level and a high one.

    counts, masses [BINS]: of the level `highest` - depth.
    """
    likelier = depth[None, :] < depth[:, None]  # [BINS, BINS]
    counts_before = tl.sum(tl.where(likelier, counts[None, :], 0), 1)
    masses_before = tl.sum(tl.where(likelier, masses[None, :], 0.0), 1)
    bins_mass = tl.sum(masses, 0)
    has_kth = (counts_before < top_k) & (counts_before + counts >= top_k)
    in_bin = tl.sum(has_kth.to(tl.int32), 0) > 0
    kth_depth = tl.where(in_bin, tl.sum(tl.where(has_kth, depth, 0), 0), BINS)
    # The probability that top_k leaves is between these two
    least = tl.sum(tl.where(depth < kth_depth, masses, 0.0), 0)
    most = tl.where(in_bin, tl.sum(tl.where(depth <= kth_depth, masses, 0.0), 0), total)
    cut_k, cut_p = top_k < V, top_p < 1
    least, most = tl.where(cut_k, least, total), tl.where(cut_k, most, total)
    # and 1e-5 more than rounding moves the sums; 1e-30: top_p = 0 keeps one token
    inside, first = last_bin(counts, masses_before, depth, bins_mass, tl.maximum(top_p * least * (1 - 1e-5), 1e-30))
    high_p = highest - tl.where(inside, first, BINS)
    inside, last = last_bin(counts, masses_before, depth, bins_mass, tl.maximum(top_p * most * (1 + 1e-5), 1e-30))
    low_p = tl.where(inside, highest - last, NONE)
    high_k = highest - kth_depth
    low = tl.where(cut_k, tl.where(in_bin, high_k, NONE), tl.where(cut_p, low_p, NONE))
    return low, tl.maximum(tl.where(cut_k, high_k, NONE), tl.where(cut_p, high_p, NONE))


@triton.jit
def key_of_cut(
    candidates_ptr, n, above, mass_above, total, V, top_k, top_p, m, NONE: tl.constexpr, BLOCK: tl.constexpr
):
    """The least key that is kept among n candidates.

    above, mass_above: how many tokens are likelier than all candidates, and their probability; it
    is `total` for all tokens.
    """
    # The greatest key that at least top_k tokens have or exceed: `kth` always is such a key,
    # `beyond` never
    kth, beyond = tl.cast(NONE, tl.int64), key_of(m).to(tl.int64) + 1
    for _ in tl.range(0, tl.where(top_k < V, 32, 0)):
        middle = (kth + beyond) >> 1
        count, _mass = tally(candidates_ptr, n, middle, m, BLOCK)
        enough = above + count >= top_k
        kth, beyond = tl.where(enough, middle, kth), tl.where(enough, beyond, middle)
    _count, mass = tally(candidates_ptr, n, kth, m, BLOCK)
    limit = tl.maximum(top_p * tl.where(top_k < V, mass_above + mass, total), 1e-30)
    # The least key such that all greater ones hold less than the limit: above `least` they do,
    # above `excluded` they do not
    excluded, least = tl.cast(NONE, tl.int64) - 1, key_of(m).to(tl.int64)
    for _ in tl.range(0, tl.where(top_p < 1, 32, 0)):
        middle = (excluded + least) >> 1
        _count, mass = tally(candidates_ptr, n, middle + 1, m, BLOCK)
        enough = mass_above + mass >= limit
        excluded, least = tl.where(enough, middle, excluded), tl.where(enough, least, middle)
    return tl.maximum(kth, tl.where(top_p < 1, least, kth))


@triton.jit
def first_pass(
    row_ptr,
    V,
    scale,
    LOWEST: tl.constexpr,
    BINS: tl.constexpr,
    NONE: tl.constexpr,
    CUT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(tops, sums, counts, masses, highest): each block's maximum and sum [PARTS]; of the BINS
    highest levels the tokens and their probability, and the highest one."""
    part, bins = tl.arange(0, PARTS), tl.arange(0, BINS)
    tops, sums = tl.full([PARTS], LOWEST, tl.float32), tl.zeros([PARTS], tl.float32)
    counts, masses = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.float32)
    highest = tl.cast(NONE // 2, tl.int32)  # level of any token so far
    for start in tl.range(0, V, BLOCK):
        z, cols = load_block(row_ptr, start, V, scale, LOWEST, BLOCK)
        top = tl.max(z, 0)
        here = part == start // BLOCK
        tops = tl.where(here, top, tops)
        sums = tl.where(here, tl.sum(tl.exp2(z - top), 0), sums)
        if CUT:
            # A ring: level l lies in bin -l mod BINS; a new highest takes the place of the lowest
            level = tl.where(cols < V, level_of(z), NONE)
            new = tl.maximum(highest, level_of(top))
            gone = highest - ((highest + bins) & (BINS - 1)) <= new - BINS
            counts, masses = tl.where(gone, 0, counts), tl.where(gone, 0.0, masses)
            highest = new
            for depth in tl.range(0, BINS):
                in_bin, bin = level == highest - depth, bins == ((depth - highest) & (BINS - 1))
                p = tl.where(in_bin, tl.exp2(z - (highest - depth).to(tl.float32)), 0.0)
                counts += tl.where(bin, tl.sum(in_bin.to(tl.int32), 0), 0)
                masses += tl.where(bin, tl.sum(p, 0), 0.0)
    return tops, sums, counts, masses, highest


@triton.jit
def second_pass(
    row_ptr,
    candidates_ptr,
    weights,
    low,
    high,
    total,
    V,
    scale,
    top_k,
    top_p,
    m,
    LOWEST: tl.constexpr,
    NONE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(key, weights): the least key that is kept among the logits of levels `low` to `high`, which
    are copied to the candidates, and the kept probability of each block [PARTS]."""
    part = tl.arange(0, PARTS)
    n, above, starts = 0, 0, tl.zeros([PARTS], tl.int32)
    for start in tl.range(0, V, BLOCK):
        z, cols = load_block(row_ptr, start, V, scale, LOWEST, BLOCK)
        level, here = level_of(z), part == start // BLOCK
        kept, candidate = (cols < V) & (level > high), (cols < V) & (level >= low) & (level <= high)
        weights = tl.where(here, tl.sum(tl.where(kept, tl.exp2(z - m), 0.0), 0), weights)
        above += tl.sum(kept.to(tl.int32), 0)
        starts = tl.where(here, n, starts)
        ones = tl.where(candidate, 1, 0)  # candidate.to(tl.int32) spills on sm_120 under triton 3.6
        tl.store(candidates_ptr + n + tl.cumsum(ones, 0) - 1, z, mask=candidate)
        n += tl.sum(ones, 0)
    tl.debug_barrier()  # every thread sees all candidates
    key = key_of_cut(candidates_ptr, n, above, tl.sum(weights, 0), total, V, top_k, top_p, m, NONE, BLOCK)
    for i in tl.range(0, tl.cdiv(V, BLOCK)):
        begin = tl.sum(tl.where(part == i, starts, 0), 0)
        end = tl.where((i + 1) * BLOCK < V, tl.sum(tl.where(part == i + 1, starts, 0), 0), n)
        _count, mass = tally(candidates_ptr + begin, end - begin, key, m, BLOCK)
        weights += tl.where(part == i, mass, 0.0)
    return key, weights


@triton.jit
def block_of(weights, u, PARTS: tl.constexpr):
    """(block, rest, total): the block in which the draw at u falls, how far into the block's
    probability, and the probability of all blocks. weights [PARTS]: that of each block."""
    part = tl.arange(0, PARTS)
    up_to = tl.cumsum(weights, 0)
    total = tl.max(up_to, 0)
    target = u * total
    last = tl.max(tl.where(weights > 0, part, 0), 0)
    block = tl.minimum(tl.sum((up_to <= target).to(tl.int32), 0), last)
    rest = target - tl.max(tl.where(part < block, up_to, 0.0), 0)
    return block, rest, total


@triton.jit(do_not_specialize=["top_k"])
def draw_kernel(
    logits_ptr,
    u_ptr,
    settings_ptr,
    candidates_ptr,
    tokens_ptr,
    logp_ptr,
    V,
    temperature,
    top_k,
    top_p,
    COLDEST: tl.constexpr,
    LOWEST: tl.constexpr,
    BINS: tl.constexpr,
    NONE: tl.constexpr,
    CUT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    if settings_ptr is not None:
        temperature = tl.load(settings_ptr + 3 * row)
        top_k = tl.load(settings_ptr + 3 * row + 1)
        top_p = tl.load(settings_ptr + 3 * row + 2)
    greedy = temperature == 0
    if settings_ptr is not None:
        top_k = tl.where(greedy, 1, top_k)  # of which all are the likeliest
    scale = LOG2E / tl.where(greedy, 1.0, tl.maximum(temperature, COLDEST))
    tops, sums, counts, masses, highest = first_pass(row_ptr, V, scale, LOWEST, BINS, NONE, CUT, PARTS, BLOCK)
    m = tl.max(tops, 0)
    weights = sums * tl.exp2(tops - m)  # [PARTS] probability of each block, times a constant
    low, high, key = NONE, NONE, tl.cast(NONE, tl.int64)
    if CUT:
        depths = (highest + tl.arange(0, BINS)) & (BINS - 1)
        masses *= tl.exp2((highest - depths).to(tl.float32) - m)
        total = tl.sum(weights, 0)
        low, high = levels_of_cut(counts, masses, depths, highest, total, V, top_k, top_p, BINS, NONE)
        candidates_ptr += row * V
        key, weights = second_pass(
            row_ptr, candidates_ptr, weights, low, high, total, V, scale, top_k, top_p, m, LOWEST, NONE, PARTS, BLOCK
        )
    block, rest, total = block_of(weights, tl.where(greedy, 0.0, tl.load(u_ptr + row)), PARTS)
    # The token in this block
    z, cols = load_block(row_ptr, block * BLOCK, V, scale, LOWEST, BLOCK)
    kept = (cols < V) & (z > LOWEST)
    if CUT:
        kept &= (level_of(z) > high) | ((level_of(z) >= low) & (key_of(z) >= key))
    p = tl.where(kept, tl.exp2(z - m), 0.0)
    beyond = (tl.cumsum(p, 0) > rest) & (p > 0)
    token = tl.min(tl.where(beyond, cols, V), 0)
    # Rounding may carry the rest past the block's last token; 0 if all logits are nan
    token = tl.where(token < V, token, tl.max(tl.where(p > 0, cols, 0), 0))
    tl.store(tokens_ptr + row, token.to(tl.int64))
    z_token = tl.load(row_ptr + token).to(tl.float32) * scale
    tl.store(logp_ptr + row, tl.where(greedy, 0.0, (z_token - m) / LOG2E - tl.log(total)))


def draw_fake(logits, *_):
    B = len(logits)
    return logits.new_empty(B, dtype=torch.int64), logits.new_empty(B, dtype=torch.float32)


@register(
    "draw(Tensor logits, Tensor u, Tensor? settings, float temperature, float top_k, float top_p, bool cut)"
    " -> (Tensor, Tensor)",
    fake=draw_fake,
)
def draw_kernels(logits, u, settings, temperature, top_k, top_p, cut):
    """settings: fp32 [B, 3], temperature, top_k and top_p of each row; None: the three numbers."""
    B, V = logits.shape
    tokens, logp = draw_fake(logits)
    candidates = logits.new_empty((B, V) if cut else 1, dtype=torch.float32)
    block = min(BLOCK, next_power_of_2(V))
    draw_kernel[(B,)](
        logits.contiguous(),
        u.contiguous(),
        settings,
        candidates,
        tokens,
        logp,
        V,
        temperature,
        top_k or V,
        top_p,
        COLDEST=COLDEST,
        LOWEST=LOWEST,
        BINS=BINS,
        NONE=NONE,
        CUT=cut,
        PARTS=next_power_of_2(cdiv(V, block)),
        BLOCK=block,
        num_warps=max(4, block // 512),
        **UNFUSED,
    )
    return tokens, logp


# --------------------------------------------------------------------------------------------------
# record_draw: one thread for each slot


@triton.jit(do_not_specialize=["b", "V", "columns"])
def record_draw_kernel(
    token_ptr,
    logp_ptr,
    slots_ptr,
    is_stop_ptr,
    tokens_ptr,
    logprobs_ptr,
    last_ptr,
    drawn_ptr,
    left_ptr,
    lengths_ptr,
    b,
    V,
    columns,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < b
    slot = tl.load(slots_ptr + rows, mask=inside, other=0)
    token = tl.load(token_ptr + rows, mask=inside, other=0)
    drawn = tl.load(drawn_ptr + slot, mask=inside, other=0)
    left = tl.load(left_ptr + slot, mask=inside, other=0)
    alive = left > 0
    place = slot * columns + tl.where(alive, drawn, columns - 1)
    tl.store(tokens_ptr + place, token, mask=inside)
    tl.store(logprobs_ptr + place, tl.load(logp_ptr + rows, mask=inside, other=0.0), mask=inside)
    tl.store(last_ptr + slot, token, mask=inside)
    tl.store(drawn_ptr + slot, drawn + alive.to(tl.int64), mask=inside)
    stop = tl.load(is_stop_ptr + slot * V + token, mask=inside, other=0) != 0
    left = tl.where(stop, 0, left - 1)
    tl.store(left_ptr + slot, left, mask=inside)
    length = tl.load(lengths_ptr + slot, mask=inside, other=0)
    tl.store(lengths_ptr + slot, tl.where(left > 0, length, 0), mask=inside)


@register(
    "record_draw(Tensor token, Tensor logp, Tensor slots, Tensor is_stop, Tensor(a!) tokens, Tensor(b!) logprobs, "
    "Tensor(c!) last, Tensor(d!) drawn, Tensor(e!) left, Tensor(f!) lengths) -> ()",
    fake=lambda *_: None,
)
def record_draw_kernels(token, logp, slots, is_stop, tokens, *rows):
    sizes, grid = (len(slots), is_stop.shape[1], tokens.shape[1]), (cdiv(len(slots), 128),)
    tensors = token, logp, slots.contiguous(), is_stop, tokens, *rows
    record_draw_kernel[grid](*tensors, *sizes, ROWS=128, num_warps=4)


@proof("draw")
def draw_proof(device):
    u = torch.rand(5, device=device)
    per_row = [torch.tensor(x, device=device)[:, None] for x in ([1.0, 0.7, 0.0, 1.0, 1.5], [9, 3003, 1, 40, 3003])]
    top_p = torch.tensor([0.9, 0.5, torch.inf, torch.inf, 0.95], device=device)[:, None]

    def recorded(token, logp):
        """The rows of a sampler after one more draw: a live one, one that stops, three dead
        ones."""
        numbers = torch.tensor([[1, 1, 1, 1, 1], [4, 1, 0, 0, 0], [7, 7, 7, 7, 7]], device=device)
        drawn, left, lengths = numbers.unbind()
        is_stop = torch.zeros(5, 3003, dtype=torch.bool, device=device)
        tokens, last = numbers.new_zeros(5, 9), numbers.new_zeros(5)
        logprobs, slots = torch.zeros(5, 9, device=device), torch.arange(5, device=device).flip(0)
        record_draw(token, logp, slots, is_stop, tokens, logprobs, last, drawn, left, lengths)
        return [tokens, logprobs, last, drawn, left, lengths]

    @torch.no_grad()
    def run(logits):
        found = [*draw(logits, u), *draw(logits, u, 0.8, 50, 0.9), *draw(logits, u, *per_row, top_p)]
        return [x.float() for x in [*found, *recorded(*found[:2])]]

    return run, [6 * torch.randn(5, 3003, device=device)]
