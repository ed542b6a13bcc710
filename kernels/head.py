"""The output head: linear + cross-entropy and linear + log-probability, without ever holding the
logits of all tokens.

    loss = sum_i -log softmax(hidden_i W^T)[target_i]
    logp_i = log softmax(hidden_i W^T / temperature)[target_i]

Logits are made one chunk of tokens at a time. The cross-entropy forms its gradients while it holds
them: three matrix products, nothing computed twice. The log-probability does not know its upstream
gradient yet; it keeps one log-sum-exp per token and makes the logits again in the backward.
Log-sum-exp and everything that follows from it is fp32 (fp64 for fp64 input). cuBLAS does the
matrix products; the kernels do what lies between them.
"""

import torch

from kernels._lib import LOG2E, UNFUSED, contiguous, next_power_of_2, register, tl, triton, use
from kernels.linear import product
from kernels.proof import proof

IGNORE = -100  # the target of a token that has none


def chunks(n_tokens, vocab_size, chunk_mb):
    """Slices over the tokens, each with at most `chunk_mb` MiB of fp32 logits.

    But with at least 128 tokens, so that the products stay efficient.
    """
    rows = max(128, chunk_mb * 2**20 // (4 * vocab_size))
    return [slice(start, min(start + rows, n_tokens)) for start in range(0, n_tokens, rows)]


def wanted(ctx, grad_enabled):
    """Whether the gradients of hidden and of weight are wanted.

    needs_input_grad alone is also true for a parameter under no_grad.
    """
    return [grad_enabled and need for need in ctx.needs_input_grad[:2]]


def scaled_reference(ctx, grad):
    """grad times the gradients of hidden and weight that the forward saved; None if not wanted."""
    d_hidden, d_weight = ctx.saved_tensors
    d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
    return d_hidden, None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)


class LinearCrossEntropyReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_mb, grad_enabled):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)  # [V, C]
        want_hidden, want_weight = wanted(ctx, grad_enabled)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        for part in chunks(len(hidden), len(weight), chunk_mb):
            x, target = hidden[part], targets[part, None]
            counts = (target != IGNORE).to(wide)  # [n, 1]
            target = target.clamp(min=0)
            logits = product(x, w).to(wide)  # [n, V]
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            loss += ((lse - logits.gather(1, target)) * counts).sum()
            if want_hidden or want_weight:  # (p - 1[target]) counts
                p = logits.sub_(lse).exp_()
                d_logits = p.scatter_add_(1, target, -torch.ones_like(lse)).mul_(counts).to(hidden.dtype)
            if want_hidden:
                d_hidden[part] = product(d_logits, w.T)
            if want_weight:
                d_weight += product(d_logits.T, x.T)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *scaled_reference(ctx, grad), None, None, None


def wide_logits(hidden, w, wide):
    """hidden [n, C] w^T [C, V] in `wide`, not rounded to hidden's dtype."""
    if hidden.dtype == wide:
        return product(hidden, w)
    return multiply(hidden, w.T, hidden.new_empty(len(hidden), len(w), dtype=wide))


class LinearLogprobReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, chunk_mb):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)
        logp, lse, ent = (torch.zeros(len(hidden), dtype=wide, device=hidden.device) for _ in range(3))
        for part in chunks(len(hidden), len(weight), chunk_mb):
            target = targets[part, None]
            logits = wide_logits(hidden[part], w, wide).div_(temperature)  # [n, V]
            lse[part] = torch.logsumexp(logits, dim=-1)
            chosen = logits.gather(1, target.clamp(min=0))[:, 0]
            logp[part] = (chosen - lse[part]).masked_fill_(target[:, 0] == IGNORE, 0.0)
            if entropy:
                log_p = logits.sub_(lse[part, None])
                ent[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse, ent)
        ctx.options = temperature, entropy, chunk_mb
        return logp, ent

    @staticmethod
    def backward(ctx, d_logp, d_ent):
        hidden, weight, targets, lse, ent = ctx.saved_tensors
        temperature, entropy, chunk_mb = ctx.options
        w = weight.to(hidden.dtype)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if want_weight else None
        for part in chunks(len(hidden), len(weight), chunk_mb):
            x, target = hidden[part], targets[part, None]
            g = (d_logp[part, None] * (target != IGNORE)).to(lse.dtype)  # [n, 1]
            log_p = wide_logits(x, w, lse.dtype).div_(temperature).sub_(lse[part, None])
            p = log_p.exp()
            d_logits = p * -g  # g (1[target] - p) - d_ent p (log p + H)
            d_logits.scatter_add_(1, target.clamp(min=0), g)
            if entropy:
                d_logits -= d_ent[part, None] * p * (log_p + ent[part, None])
            d_logits = d_logits.div_(temperature).to(hidden.dtype)
            if want_hidden:
                d_hidden[part] = product(d_logits, w.T)
            if want_weight:
                d_weight += product(d_logits.T, x.T)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def linear_cross_entropy_reference(hidden, weight, targets, chunk_mb=64):
    """See linear_cross_entropy."""
    return LinearCrossEntropyReference.apply(hidden, weight, targets, chunk_mb, torch.is_grad_enabled())


def linear_logprob_reference(hidden, weight, targets, temperature=1.0, entropy=False, chunk_mb=64):
    """See linear_logprob."""
    logp, ent = LinearLogprobReference.apply(hidden, weight, targets, temperature, entropy, chunk_mb)
    return (logp, ent) if entropy else logp


# --------------------------------------------------------------------------------------------------
# The kernels. A program takes one row of a chunk's logits z, [n, V] in hidden's dtype. Rows are
# `stride` numbers apart, V rounded up to 64: every row then begins at a multiple of 128 bytes, and
# loads are 128 bits wide for every V. What lies behind V is loaded and stored like the rest, and
# never used.

LOWEST = -2e30  # stands for -inf, because 0 * -inf would be nan


def block(V, dtype=torch.bfloat16):
    """The (columns, warps) of a program: 16 numbers per thread at a time.

    Programs are few and large, because a row is read twice and the second time should find it in
    L2, which holds 260 rows of 64k bf16 logits (two programs per multiprocessor) or 130 of twice
    that. Of fp32 logits, more than 4096 need more registers than there are.
    """
    limit = 8192 if V <= 65536 else 16384
    cols = min(next_power_of_2(V), 4096 if dtype == torch.float32 else limit)
    return cols, max(4, cols // 512)


@triton.jit
def row_statistics(row_ptr, V, stride, scale, LOWEST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """One pass over y = scale z: m = max y, d = sum e^(y-m), s = sum e^(y-m) (y-m).

    So lse = m + log d and entropy = log d - s / d, in which no large numbers cancel. A nan among
    the logits shows in d. Milakov & Gimelshein 2018, arXiv 1805.02867.
    """
    cols = tl.arange(0, BLOCK)
    m = LOWEST / 2  # below every logit, above what stands behind V
    d, s = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK):
        z = tl.load(row_ptr + start + cols, mask=start + cols < stride, other=0.0, eviction_policy="evict_last")
        y = z.to(tl.float32) * scale
        y = tl.where((start + cols >= V) | (y < LOWEST), LOWEST, y)
        top = tl.maximum(m, tl.max(y, 0))
        e = tl.exp2((y - top) * LOG2E)
        shrink = tl.exp2((m - top) * LOG2E)
        if ENTROPY:
            s = shrink * (s + (m - top) * d) + e * (y - top)
        d = shrink * d + e
        m = top
    return m, tl.sum(d, 0), tl.sum(s, 0)


@triton.jit(do_not_specialize=["V"])
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    V,
    stride,
    IGNORE: tl.constexpr,
    LOWEST: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss [n] = lse - z_target, 0 without a target. GRAD: the logits become p - 1[target]."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, cols = logits_ptr + row * stride, tl.arange(0, BLOCK)  # n * V exceeds int32
    target = tl.load(targets_ptr + row).to(tl.int32)
    if target == IGNORE:
        tl.store(loss_ptr + row, 0.0)
        if GRAD:
            zeros = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
            for start in tl.range(0, V, BLOCK):
                tl.store(row_ptr + start + cols, zeros, mask=start + cols < stride)
    else:
        m, d, _ = row_statistics(row_ptr, V, stride, 1.0, LOWEST, False, BLOCK)
        # A target that is no token yields nan, so the error is visible.
        z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        tl.store(loss_ptr + row, tl.log(d) - (z_target - m))
        if GRAD:
            tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
            r = 1 / d
            for start in tl.range(0, V, BLOCK):
                z = tl.load(row_ptr + start + cols, mask=start + cols < stride, other=0.0).to(tl.float32)
                p = tl.exp2((z - m) * LOG2E) * r
                grad = tl.where(
                    start + cols == target, p - 1, p
                )  # in fp32: if p is nearly 1, bf16 loses the difference
                tl.store(row_ptr + start + cols, grad.to(logits_ptr.dtype.element_ty), mask=start + cols < stride)


@triton.jit(do_not_specialize=["V"])
def logprob_kernel(
    logits_ptr,
    targets_ptr,
    logp_ptr,
    lse_ptr,
    ent_ptr,
    V,
    stride,
    scale,
    IGNORE: tl.constexpr,
    LOWEST: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logp, lse and ent [n] of softmax(scale z)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    m, d, s = row_statistics(row_ptr, V, stride, scale, LOWEST, ENTROPY, BLOCK)
    z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    tl.store(logp_ptr + row, tl.where(target == IGNORE, 0.0, z_target * scale - m - tl.log(d)))
    tl.store(lse_ptr + row, m + tl.log(d))
    if ENTROPY:
        tl.store(ent_ptr + row, tl.log(d) - s / d)


@triton.jit(do_not_specialize=["V"])
def logprob_backward_kernel(
    logits_ptr,
    targets_ptr,
    d_logp_ptr,
    d_ent_ptr,
    lse_ptr,
    ent_ptr,
    V,
    stride,
    scale,
    IGNORE: tl.constexpr,
    LOWEST: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The logits become their gradient: (g (1[target] - p) - h p (log p + entropy)) scale.

    g and h are the gradients of logp and of the entropy.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr, cols = logits_ptr + row * stride, tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row).to(tl.int32)
    g = tl.where(target == IGNORE, 0.0, tl.load(d_logp_ptr + row))
    lse = tl.load(lse_ptr + row)
    if ENTROPY:
        h, ent = tl.load(d_ent_ptr + row), tl.load(ent_ptr + row)
    for start in tl.range(0, V, BLOCK):
        z = tl.load(row_ptr + start + cols, mask=start + cols < stride, other=0.0)
        log_p = z.to(tl.float32) * scale - lse
        p = tl.exp2(log_p * LOG2E)
        grad = tl.where(start + cols == target, g, 0.0) - p * g
        if ENTROPY:
            grad -= h * p * (tl.where(log_p < LOWEST, LOWEST, log_p) + ent)
        tl.store(row_ptr + start + cols, (grad * scale).to(logits_ptr.dtype.element_ty), mask=start + cols < stride)


# --------------------------------------------------------------------------------------------------
# The ops. Each loops over all chunks, so that torch.compile sees neither the loop nor its memory.


def logits_by_chunk(hidden, w, chunk_mb, dtype=None):
    """Yields (slice of the tokens, their logits [n, V]), every chunk in the same memory.

    hidden [N, C] and w [V, C] have one dtype, and the logits have it too unless `dtype` is given.
    """
    dtype = dtype or hidden.dtype
    (N, _), V = hidden.shape, len(w)
    stride = -(-V // 64) * 64
    rows = max(128, chunk_mb * 2**20 // (stride * dtype.itemsize) // 128 * 128)
    memory = hidden.new_empty(min(rows, N), stride, dtype=dtype)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        yield part, multiply(hidden[part], w.T, memory[: part.stop - start, :V])


def multiply(a, b, out):
    """out = a b, in the dtype of `out`, which may be fp32 for a and b in bf16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if out.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)  # a CPU has no such product


def rounded(logits, dtype):
    """The logits [n, V] in `dtype`, their rows as far apart as before."""
    if logits.dtype == dtype:
        return logits
    return logits.new_empty(len(logits), logits.stride(0), dtype=dtype)[:, : logits.shape[1]].copy_(logits)


def accumulate(total, a, b):
    """total += a b, in fp32 for every dtype of a and b: no chunk is rounded to bf16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a CPU has no such product, and only the interpreter comes here
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def gradients(hidden, weight, want_hidden, want_weight):
    """Memory for d_hidden, and for d_weight in fp32; empty if not wanted."""
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    return d_hidden, weight.new_zeros(weight.shape if want_weight else 0, dtype=torch.float32)


def add_gradients(d_logits, part, hidden, w, d_hidden, d_weight):
    """Adds what one chunk's d_logits [n, V] contribute to the gradients of hidden and weight."""
    if d_hidden.numel():
        torch.mm(d_logits, w, out=d_hidden[part])
    if d_weight.numel():
        accumulate(d_weight, d_logits.T, hidden[part])


def sum_fake(hidden, weight, *args):
    """Of an op that returns a sum over tokens, and its gradients if the last two arguments want
    them."""
    return hidden.new_empty((), dtype=torch.float32), *gradients(hidden, weight, *args[-2:])


@register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int chunk_mb, bool want_hidden, "
    "bool want_weight) -> (Tensor, Tensor, Tensor)",
    fake=sum_fake,
)
def linear_cross_entropy_forward(hidden, weight, targets, chunk_mb, *want):
    """Returns the loss and, already, its gradients."""
    V, w, targets = len(weight), weight.to(hidden.dtype), targets.contiguous()
    cols, warps = block(V)
    constants = dict(IGNORE=IGNORE, LOWEST=LOWEST, GRAD=any(want), BLOCK=cols, num_warps=warps)
    loss = hidden.new_empty(len(hidden), dtype=torch.float32)
    d_hidden, d_weight = gradients(hidden, weight, *want)
    for part, logits in logits_by_chunk(hidden, w, chunk_mb):
        grid = (len(logits),)
        cross_entropy_kernel[grid](logits, targets[part], loss[part], V, logits.stride(0), **constants)
        add_gradients(logits, part, hidden, w, d_hidden, d_weight)
    return loss.sum(), d_hidden, d_weight


def logprob_constants(V, entropy):
    """The keywords that both kernels of the log-probability take."""
    cols, warps = block(V, torch.float32)
    return dict(IGNORE=IGNORE, LOWEST=LOWEST, ENTROPY=entropy, BLOCK=cols, num_warps=warps, **UNFUSED)


def logprob_fake(hidden, weight, targets, temperature, entropy, chunk_mb):
    N = hidden.shape[0]
    return tuple(hidden.new_empty(n, dtype=torch.float32) for n in (N, N, N if entropy else 0))


@register(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy, int chunk_mb)"
    " -> (Tensor, Tensor, Tensor)",
    fake=logprob_fake,
)
def linear_logprob_forward(hidden, weight, targets, temperature, entropy, chunk_mb):
    """Returns logp, lse and the entropy (empty if not wanted), each fp32 [N]."""
    V, w, targets = len(weight), weight.to(hidden.dtype), targets.contiguous()
    constants = logprob_constants(V, entropy)
    logp, lse, ent = outs = logprob_fake(hidden, weight, targets, temperature, entropy, chunk_mb)
    # In fp32 as the sampler's: in bf16 a logit of 20, and so its ratio, is off by up to 0.06
    for part, logits in logits_by_chunk(hidden, w, chunk_mb, torch.float32):
        rows = [x[part] for x in (targets, logp, lse, ent)]
        logprob_kernel[(len(logits),)](logits, *rows, V, logits.stride(0), 1 / temperature, **constants)
    return outs


@register(
    "linear_logprob_backward(Tensor d_logp, Tensor d_ent, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, "
    "Tensor ent, float temperature, bool entropy, int chunk_mb, bool want_hidden, bool want_weight)"
    " -> (Tensor, Tensor)",
    fake=lambda d_logp, d_ent, hidden, weight, *args: gradients(hidden, weight, *args[-2:]),
)
def linear_logprob_backward(d_logp, d_ent, hidden, weight, targets, lse, ent, temperature, entropy, chunk_mb, *want):
    """Returns d_hidden and d_weight, empty if not wanted."""
    V, w = len(weight), weight.to(hidden.dtype)
    targets, d_logp, d_ent = contiguous(targets, d_logp, d_ent)
    constants = logprob_constants(V, entropy)
    d_hidden, d_weight = gradients(hidden, weight, *want)
    # The logits of the forward again, in fp32: others would not fit their log-sum-exp
    for part, logits in logits_by_chunk(hidden, w, chunk_mb, torch.float32):
        rows = [x[part] for x in (targets, d_logp, d_ent, lse, ent)]
        logprob_backward_kernel[(len(logits),)](logits, *rows, V, logits.stride(0), 1 / temperature, **constants)
        add_gradients(rounded(logits, hidden.dtype), part, hidden, w, d_hidden, d_weight)
    return d_hidden, d_weight


def scaled(ctx, grad):
    """`scaled_reference` of what a kernel made, which is empty if not wanted."""
    d_hidden, d_weight = ctx.saved_tensors
    want_hidden, want_weight = ctx.want
    # As [1] instead of a scalar, grad stays fp32: 1 / count rounded to bf16 would be off by up
    # to 0.4 %, for every token alike.
    d_hidden = torch.mul(d_hidden, grad.view(1), out=torch.empty_like(d_hidden)) if want_hidden else None
    return d_hidden, (d_weight * grad).to(ctx.weight_dtype) if want_weight else None


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_mb, grad_enabled):
        ctx.want, ctx.weight_dtype = wanted(ctx, grad_enabled), weight.dtype
        loss, d_hidden, d_weight = linear_cross_entropy_forward(hidden, weight, targets, chunk_mb, *ctx.want)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *scaled(ctx, grad), None, None, None


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, chunk_mb):
        logp, lse, ent = linear_logprob_forward(hidden, weight, targets, temperature, entropy, chunk_mb)
        ctx.save_for_backward(hidden, weight, targets, lse, ent)
        ctx.options, ctx.weight_dtype = (temperature, entropy, chunk_mb), weight.dtype
        return logp, ent

    @staticmethod
    def backward(ctx, d_logp, d_ent):
        want = want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden, d_weight = linear_logprob_backward(d_logp, d_ent, *ctx.saved_tensors, *ctx.options, *want)
        d_weight = d_weight.to(ctx.weight_dtype) if want_weight else None
        return d_hidden if want_hidden else None, d_weight, None, None, None, None


# --------------------------------------------------------------------------------------------------
# What models call


def chunk_default(hidden):
    """MiB of logits: 64 on a CPU, 512 on CUDA.

    On CUDA every chunk reads and writes the fp32 gradient [V, C] once more. At 512 that takes 4 %
    of the head's time with a vocabulary of 50k and 10 % with 128k (computed, for H100).
    """
    return 512 if hidden.is_cuda else 64


def linear_cross_entropy(hidden, weight, targets, chunk_mb=None):
    """The cross-entropy summed over tokens, in nats, an fp32 scalar.

    Divide it by the global count of targets, not by this batch's.
    hidden: [N, C]. weight: fp32 [V, C]. targets: int64 [N], IGNORE for a token without a target.
    chunk_mb: bounds the memory of the logits.
    """
    chunk_mb = chunk_default(hidden) if chunk_mb is None else chunk_mb
    if not use("linear_cross_entropy", hidden):
        return linear_cross_entropy_reference(hidden, weight, targets, chunk_mb)
    return LinearCrossEntropy.apply(hidden, weight, targets, chunk_mb, torch.is_grad_enabled())


def linear_logprob(hidden, weight, targets, temperature=1.0, entropy=False, chunk_mb=None):
    """fp32 [N]: the log-probability of each target at `temperature`, in nats, 0 if it is IGNORE.

    With `entropy` also the entropy of each token's distribution, fp32 [N]. Other arguments as in
    linear_cross_entropy. Gradients flow to hidden and weight from both outputs.
    """
    chunk_mb = chunk_default(hidden) if chunk_mb is None else chunk_mb
    if not use("linear_logprob", hidden):
        return linear_logprob_reference(hidden, weight, targets, temperature, entropy, chunk_mb)
    logp, ent = LinearLogprob.apply(hidden, weight, targets, float(temperature), entropy, chunk_mb)
    return (logp, ent) if entropy else logp


# Rows, width, vocabulary: one for each size of block that real vocabularies have
PROOF_SHAPES = (130, 64, 1003), (3, 16, 9000), (3, 16, 65600)


def proof_inputs(device):
    """([hidden, weight, ...], [targets, ...]) of each shape.

    The proofs' 0 MiB of logits cut 130 rows into chunks of 128 and 2.
    """
    inputs, targets = [], []
    for rows, C, V in PROOF_SHAPES:
        inputs += [torch.randn(rows, C, device=device).bfloat16(), torch.randn(V, C, device=device) / 8]
        ignored = torch.rand(rows, device=device) < 0.3
        targets.append(torch.randint(V, (rows,), device=device).masked_fill_(ignored, IGNORE))
    return inputs, targets


@proof("linear_cross_entropy")
def linear_cross_entropy_proof(device):
    inputs, targets = proof_inputs(device)

    def f(*inputs):
        return [linear_cross_entropy(h, w, t, 0) for h, w, t in zip(inputs[::2], inputs[1::2], targets)]

    return f, inputs


@proof("linear_logprob")
def linear_logprob_proof(device):
    inputs, targets = proof_inputs(device)

    def f(*inputs):
        outs = []
        for h, w, t in zip(inputs[::2], inputs[1::2], targets):
            outs += [linear_logprob(h, w, t, 0.7, False, 0), *linear_logprob(h, w, t, 0.7, True, 0)]
        return outs

    return f, inputs
