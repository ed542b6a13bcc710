"""The output head: linear + cross-entropy and linear + log-probability, without ever holding the logits of all tokens.

    loss = sum_i -log softmax(hidden_i W^T)[target_i]            logp_i = log softmax(hidden_i W^T / temperature)[target_i]

Logits are made a chunk of tokens at a time. The cross-entropy forms its gradients while it holds them (three matrix products, nothing computed
twice). The log-probability, whose upstream gradient is not known yet, keeps one log-sum-exp a token and makes the logits again in the backward.
Log-sum-exp and all that follows from it is fp32 (fp64 for fp64 input). The matrix products are cuBLAS's; the kernels do what lies between them.
"""
import torch

from kernels._lib import LOG2E, proof, register, tl, triton, use
from kernels.linear import product

IGNORE = -100  # a target that asks for nothing


def chunks(n_tokens, vocab_size, chunk_mb):
    """Slices over the tokens, each with at most `chunk_mb` MiB of fp32 logits but at least 128 tokens, so that the products stay efficient."""
    rows = max(128, chunk_mb * 2**20 // (4 * vocab_size))
    return [slice(start, min(start + rows, n_tokens)) for start in range(0, n_tokens, rows)]


def wanted(ctx, grad_enabled):
    """Whether the gradients of hidden and of weight are wanted. needs_input_grad alone also says yes to a parameter under no_grad."""
    return [grad_enabled and need for need in ctx.needs_input_grad[:2]]


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
            asked = (target != IGNORE).to(wide)  # [n, 1]
            target = target.clamp(min=0)
            logits = product(x, w).to(wide)  # [n, V]
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            loss += ((lse - logits.gather(1, target)) * asked).sum()
            if want_hidden or want_weight:
                d_logits = logits.sub_(lse).exp_().scatter_add_(1, target, -torch.ones_like(lse)).mul_(asked).to(hidden.dtype)  # (p - 1[target]) asked
            if want_hidden:
                d_hidden[part] = product(d_logits, w.T)
            if want_weight:
                d_weight += product(d_logits.T, x.T)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


class LinearLogprobReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, chunk_mb):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)
        logp, lse, ent = (torch.zeros(len(hidden), dtype=wide, device=hidden.device) for _ in range(3))
        for part in chunks(len(hidden), len(weight), chunk_mb):
            target = targets[part, None]
            logits = product(hidden[part], w).to(wide).div_(temperature)  # [n, V]
            lse[part] = torch.logsumexp(logits, dim=-1)
            logp[part] = (logits.gather(1, target.clamp(min=0))[:, 0] - lse[part]).masked_fill_(target[:, 0] == IGNORE, 0.0)
            if entropy:
                log_p = logits.sub_(lse[part, None])
                ent[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse, ent)
        ctx.temperature, ctx.entropy, ctx.chunk_mb = temperature, entropy, chunk_mb
        return logp, ent

    @staticmethod
    def backward(ctx, d_logp, d_ent):
        hidden, weight, targets, lse, ent = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if want_weight else None
        for part in chunks(len(hidden), len(weight), ctx.chunk_mb):
            x, target = hidden[part], targets[part, None]
            g = (d_logp[part, None] * (target != IGNORE)).to(lse.dtype)  # [n, 1]
            log_p = product(x, w).to(lse.dtype).div_(ctx.temperature).sub_(lse[part, None])
            p = log_p.exp()
            d_logits = p * -g  # g (1[target] - p) - d_ent p (log p + H)
            d_logits.scatter_add_(1, target.clamp(min=0), g)
            if ctx.entropy:
                d_logits -= d_ent[part, None] * p * (log_p + ent[part, None])
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
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


# ---------------------------------------------------------------------------------------------------------------------------------
# The kernels: one program a row of a chunk's logits z, [n, V] in hidden's dtype. Rows are `stride` numbers apart, V rounded up to 64: then every row
# begins at a multiple of 128 bytes and loads are 128 bits wide whatever V is. What lies behind V is loaded and stored like the rest, and never used.

LOWEST = -2e30  # stands for -inf: 0 * -inf would be nan


def block(V):
    """(columns a program takes at a time, warps): 16 numbers a thread. Few and large programs, because a row is read twice and the second time should
    find it in L2, which holds 260 rows of 64k bf16 logits (two programs a multiprocessor) or 130 of twice that (one)."""
    cols = min(triton.next_power_of_2(V), 8192 if V <= 65536 else 16384)
    return cols, max(4, cols // 512)


@triton.jit
def row_statistics(row_ptr, V, stride, scale, LOWEST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """One pass over y = scale z (Milakov & Gimelshein 2018, arXiv 1805.02867): m = max y, d = sum e^(y-m), s = sum e^(y-m) (y-m). So lse = m + log d and
    entropy = log d - s / d, in which no large numbers cancel. A nan among the logits comes out in d."""
    cols = tl.arange(0, BLOCK)
    m = LOWEST / 2  # below every logit, above what stands beyond V
    d, s = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK):
        y = tl.load(row_ptr + start + cols, mask=start + cols < stride, other=0.0, eviction_policy="evict_last").to(tl.float32) * scale
        y = tl.where((start + cols >= V) | (y < LOWEST), LOWEST, y)
        top = tl.maximum(m, tl.max(y, 0))
        e = tl.exp2((y - top) * LOG2E)
        shrink = tl.exp2((m - top) * LOG2E)
        if ENTROPY:
            s = shrink * (s + (m - top) * d) + e * (y - top)
        d = shrink * d + e
        m = top
    return m, tl.sum(d, 0), tl.sum(s, 0)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, loss_ptr, V, stride, IGNORE: tl.constexpr, LOWEST: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """loss [n] = lse - z_target, 0 where nothing is asked; with GRAD the logits become their gradient, p - 1[target]."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, cols = logits_ptr + row * stride, tl.arange(0, BLOCK)  # n * V passes 2^31
    target = tl.load(targets_ptr + row).to(tl.int32)
    if target == IGNORE:
        tl.store(loss_ptr + row, 0.0)
        if GRAD:
            for start in tl.range(0, V, BLOCK):
                tl.store(row_ptr + start + cols, tl.zeros([BLOCK], logits_ptr.dtype.element_ty), mask=start + cols < stride)
    else:
        m, d, _ = row_statistics(row_ptr, V, stride, 1.0, LOWEST, False, BLOCK)
        # A target that is no token makes the loss nan: not found out, but found.
        z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        tl.store(loss_ptr + row, tl.log(d) - (z_target - m))
        if GRAD:
            tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
            r = 1 / d
            for start in tl.range(0, V, BLOCK):
                z = tl.load(row_ptr + start + cols, mask=start + cols < stride, other=0.0).to(tl.float32)
                p = tl.exp2((z - m) * LOG2E) * r
                grad = tl.where(start + cols == target, p - 1, p)  # in fp32: where p is nearly 1, bf16 would leave nothing of the difference
                tl.store(row_ptr + start + cols, grad.to(logits_ptr.dtype.element_ty), mask=start + cols < stride)


@triton.jit
def logprob_kernel(
    logits_ptr, targets_ptr, logp_ptr, lse_ptr, ent_ptr, V, stride, scale, IGNORE: tl.constexpr, LOWEST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """logp, lse and ent [n] of softmax(scale z)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    m, d, s = row_statistics(row_ptr, V, stride, scale, LOWEST, ENTROPY, BLOCK)
    y_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32) * scale
    tl.store(logp_ptr + row, tl.where(target == IGNORE, 0.0, y_target - m - tl.log(d)))
    tl.store(lse_ptr + row, m + tl.log(d))
    if ENTROPY:
        tl.store(ent_ptr + row, tl.log(d) - s / d)


@triton.jit
def logprob_backward_kernel(
    logits_ptr, targets_ptr, d_logp_ptr, d_ent_ptr, lse_ptr, ent_ptr, V, stride, scale,
    IGNORE: tl.constexpr, LOWEST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The logits become their gradient: (g (1[target] - p) - h p (log p + entropy)) scale, with g and h the gradients of logp and of the entropy."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, cols = logits_ptr + row * stride, tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row).to(tl.int32)
    g = tl.where(target == IGNORE, 0.0, tl.load(d_logp_ptr + row))
    lse = tl.load(lse_ptr + row)
    if ENTROPY:
        h, ent = tl.load(d_ent_ptr + row), tl.load(ent_ptr + row)
    for start in tl.range(0, V, BLOCK):
        log_p = tl.load(row_ptr + start + cols, mask=start + cols < stride, other=0.0).to(tl.float32) * scale - lse
        p = tl.exp2(log_p * LOG2E)
        grad = tl.where(start + cols == target, g, 0.0) - p * g
        if ENTROPY:
            grad -= h * p * (tl.where(log_p < LOWEST, LOWEST, log_p) + ent)
        tl.store(row_ptr + start + cols, (grad * scale).to(logits_ptr.dtype.element_ty), mask=start + cols < stride)


# ---------------------------------------------------------------------------------------------------------------------------------
# The ops: the whole walk over the chunks is one, so that torch.compile sees neither its length nor its memory


def logits_by_chunk(hidden, w, chunk_mb):
    """Yields (slice of the tokens, their logits [n, V]), each in the memory of the one before. hidden [N, C], w [V, C] of one dtype."""
    (N, _), V = hidden.shape, len(w)
    stride = -(-V // 64) * 64
    rows = max(128, chunk_mb * 2**20 // (stride * hidden.element_size()) // 128 * 128)
    memory = hidden.new_empty(min(rows, N), stride)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        yield part, torch.mm(hidden[part], w.T, out=memory[: part.stop - start, :V])


def accumulate(total, a, b):
    """total += a b, in fp32 whatever a and b are: a chunk's share is never rounded to bf16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # there is no such product on the CPU, where only the interpreter comes by
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def gradients(hidden, weight, want_hidden, want_weight):
    """Where the gradients will stand: d_hidden, and d_weight in fp32. Empty where they are not wanted."""
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    return d_hidden, weight.new_zeros(weight.shape if want_weight else 0, dtype=torch.float32)


def add_gradients(d_logits, part, hidden, w, d_hidden, d_weight):
    """What one chunk's d_logits [n, V] mean for hidden and weight."""
    if d_hidden.numel():
        torch.mm(d_logits, w, out=d_hidden[part])
    if d_weight.numel():
        accumulate(d_weight, d_logits.T, hidden[part])


@register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int chunk_mb, bool want_hidden, bool want_weight) -> (Tensor, Tensor, Tensor)",
    fake=lambda hidden, weight, targets, chunk_mb, *want: (hidden.new_empty((), dtype=torch.float32), *gradients(hidden, weight, *want)),
)
def linear_cross_entropy_forward(hidden, weight, targets, chunk_mb, want_hidden, want_weight):
    """-> the loss and, already, its gradients."""
    V, w, targets = len(weight), weight.to(hidden.dtype), targets.contiguous()
    cols, warps = block(V)
    loss = hidden.new_empty(len(hidden), dtype=torch.float32)
    d_hidden, d_weight = gradients(hidden, weight, want_hidden, want_weight)
    for part, logits in logits_by_chunk(hidden, w, chunk_mb):
        cross_entropy_kernel[(len(logits),)](
            logits, targets[part], loss[part], V, logits.stride(0), IGNORE, LOWEST, GRAD=want_hidden or want_weight, BLOCK=cols, num_warps=warps
        )  # fmt: skip
        add_gradients(logits, part, hidden, w, d_hidden, d_weight)
    return loss.sum(), d_hidden, d_weight


def logprob_fake(hidden, weight, targets, temperature, entropy, chunk_mb):
    return tuple(hidden.new_empty(n, dtype=torch.float32) for n in (hidden.shape[0], hidden.shape[0], hidden.shape[0] if entropy else 0))


@register(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy, int chunk_mb) -> (Tensor, Tensor, Tensor)",
    fake=logprob_fake,
)
def linear_logprob_forward(hidden, weight, targets, temperature, entropy, chunk_mb):
    """-> logp, lse, entropy (empty if not asked for)."""
    V, w, targets = len(weight), weight.to(hidden.dtype), targets.contiguous()
    cols, warps = block(V)
    logp, lse, ent = outs = logprob_fake(hidden, weight, targets, temperature, entropy, chunk_mb)
    for part, logits in logits_by_chunk(hidden, w, chunk_mb):
        logprob_kernel[(len(logits),)](
            logits, targets[part], logp[part], lse[part], ent[part], V, logits.stride(0), 1 / temperature, IGNORE, LOWEST, entropy, BLOCK=cols, num_warps=warps
        )  # fmt: skip
    return outs


@register(
    "linear_logprob_backward(Tensor d_logp, Tensor d_ent, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, Tensor ent, float temperature, "
    "bool entropy, int chunk_mb, bool want_hidden, bool want_weight) -> (Tensor, Tensor)",
    fake=lambda d_logp, d_ent, hidden, weight, targets, lse, ent, temperature, entropy, chunk_mb, *want: gradients(hidden, weight, *want),
)
def linear_logprob_backward(d_logp, d_ent, hidden, weight, targets, lse, ent, temperature, entropy, chunk_mb, want_hidden, want_weight):
    V, w, (targets, d_logp, d_ent) = len(weight), weight.to(hidden.dtype), (x.contiguous() for x in (targets, d_logp, d_ent))
    cols, warps = block(V)
    d_hidden, d_weight = gradients(hidden, weight, want_hidden, want_weight)
    for part, logits in logits_by_chunk(hidden, w, chunk_mb):
        rows = [x[part] for x in (targets, d_logp, d_ent, lse, ent)]
        logprob_backward_kernel[(len(logits),)](
            logits, *rows, V, logits.stride(0), 1 / temperature, IGNORE, LOWEST, ENTROPY=entropy, BLOCK=cols, num_warps=warps
        )  # fmt: skip
        add_gradients(logits, part, hidden, w, d_hidden, d_weight)
    return d_hidden, d_weight


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_mb, grad_enabled):
        ctx.want, ctx.weight_dtype = wanted(ctx, grad_enabled), weight.dtype
        loss, d_hidden, d_weight = linear_cross_entropy_forward(hidden, weight, targets, chunk_mb, *ctx.want)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        want_hidden, want_weight = ctx.want
        if want_hidden:  # as [1], and not as a scalar, grad stays fp32: 1 / count rounded to bf16 would be off by up to 0.4 % for every token alike
            d_hidden = torch.mul(d_hidden, grad.view(1), out=torch.empty_like(d_hidden))
        return d_hidden if want_hidden else None, (d_weight * grad).to(ctx.weight_dtype) if want_weight else None, None, None, None


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, chunk_mb):
        logp, lse, ent = linear_logprob_forward(hidden, weight, targets, temperature, entropy, chunk_mb)
        ctx.save_for_backward(hidden, weight, targets, lse, ent)
        ctx.how = temperature, entropy, chunk_mb
        return logp, ent

    @staticmethod
    def backward(ctx, d_logp, d_ent):
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden, d_weight = linear_logprob_backward(d_logp, d_ent, *ctx.saved_tensors, *ctx.how, want_hidden, want_weight)
        return d_hidden if want_hidden else None, d_weight.to(ctx.saved_tensors[1].dtype) if want_weight else None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------------------


def chunk_default(hidden):
    """MiB of logits. CUDA: 512, because every chunk reads and writes the fp32 gradient [V, C] once more, which then takes 4 % of the head's time at a
    vocabulary of 50k and 10 % at 128k (computed, for H100). CPU: 64."""
    return 512 if hidden.is_cuda else 64


def linear_cross_entropy(hidden, weight, targets, chunk_mb=None):
    """Sum over tokens of the cross-entropy in nats, a fp32 scalar: divide by the global count of asked targets, not by this batch's.

    hidden [N, C]; weight fp32 [V, C]; targets int64 [N], IGNORE where nothing is asked. `chunk_mb` bounds the memory the logits take.
    """
    chunk_mb = chunk_default(hidden) if chunk_mb is None else chunk_mb
    if not use("linear_cross_entropy", hidden):
        return linear_cross_entropy_reference(hidden, weight, targets, chunk_mb)
    return LinearCrossEntropy.apply(hidden, weight, targets, chunk_mb, torch.is_grad_enabled())


def linear_logprob(hidden, weight, targets, temperature=1.0, entropy=False, chunk_mb=None):
    """fp32 [N]: log-probability in nats of each target at `temperature`, 0 where the target is IGNORE; with `entropy` also the fp32 [N] entropy.

    Shapes as linear_cross_entropy. Gradients flow to hidden and weight, from both outputs.
    """
    chunk_mb = chunk_default(hidden) if chunk_mb is None else chunk_mb
    if not use("linear_logprob", hidden):
        return linear_logprob_reference(hidden, weight, targets, temperature, entropy, chunk_mb)
    logp, ent = LinearLogprob.apply(hidden, weight, targets, float(temperature), entropy, chunk_mb)
    return (logp, ent) if entropy else logp


def proof_inputs(device):
    hidden, weight = torch.randn(140, 64, device=device), torch.randn(1003, 64, device=device) / 8  # at 0 MiB: chunks of 128 and 12 rows
    targets = torch.randint(1003, (140,), device=device).masked_fill_(torch.rand(140, device=device) < 0.3, IGNORE)
    return [hidden.bfloat16(), weight], targets


@proof("linear_cross_entropy")
def linear_cross_entropy_proof(device):
    inputs, targets = proof_inputs(device)
    return lambda h, w: linear_cross_entropy(h, w, targets, 0), lambda h, w: linear_cross_entropy_reference(h, w, targets, 0), inputs


@proof("linear_logprob")
def linear_logprob_proof(device):
    inputs, targets = proof_inputs(device)
    return lambda h, w: linear_logprob(h, w, targets, 0.7, True, 0), lambda h, w: linear_logprob_reference(h, w, targets, 0.7, True, 0), inputs
