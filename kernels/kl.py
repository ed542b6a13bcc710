"""linear + KL: how far apart the next-token distributions of two output heads are, without ever
holding the logits of all tokens.

    p = softmax(hidden W^T / temperature)                     the student's
    q = softmax(teacher_hidden teacher_W^T / temperature)     the teacher's
    reverse   sum_i KL(p_i || q_i) = sum_i sum_v p (log p - log q),   d logits = p (log p/q - KL_i)
    forward   sum_i KL(q_i || p_i) = sum_i sum_v q (log q - log p),   d logits = p - q

Both are exact, over the whole vocabulary. Reverse KL makes the student prefer what the teacher
prefers most; forward KL makes it cover all that the teacher might say (Agarwal et al. 2024, arXiv
2306.13649, section 2). Logits are made one chunk of tokens at a time, and the student's gradients
are formed while they are there, as in kernels/head.py. The teacher gets no gradient.
"""

import torch

from kernels._lib import LOG2E, UNFUSED, register, tl, triton, use
from kernels.head import (
    LOWEST,
    add_gradients,
    block,
    chunk_default,
    chunks,
    gradients,
    logits_by_chunk,
    proof_inputs,
    row_statistics,
    scaled,
    scaled_reference,
    sum_fake,
    wanted,
)
from kernels.linear import product
from kernels.proof import proof


class LinearKLReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, reverse, temperature, chunk_mb, grad_enabled):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w, teacher_w = weight.to(hidden.dtype), teacher_weight.to(teacher_hidden.dtype)
        want_hidden, want_weight = wanted(ctx, grad_enabled)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        for part in chunks(len(hidden), len(weight), chunk_mb):
            log_p = (product(hidden[part], w).to(wide) / temperature).log_softmax(-1)  # [n, V]
            log_q = (product(teacher_hidden[part], teacher_w).to(wide) / temperature).log_softmax(-1)
            p = log_p.exp()
            if reverse:
                log_ratio = log_p - log_q
                kl = (p * log_ratio).sum(-1, keepdim=True)  # [n, 1]
                d_logits = p * (log_ratio - kl)
            else:
                q = log_q.exp()
                kl = (q * (log_q - log_p)).sum(-1, keepdim=True)
                d_logits = p - q
            total += kl.sum()
            d_logits = (d_logits / temperature).to(hidden.dtype)
            if want_hidden:
                d_hidden[part] = product(d_logits, w.T)
            if want_weight:
                d_weight += product(d_logits.T, hidden[part].T)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        return *scaled_reference(ctx, grad), None, None, None, None, None, None


def linear_kl_reference(hidden, weight, teacher_hidden, teacher_weight, *, reverse=True, temperature=1.0, chunk_mb=64):
    """See linear_kl."""
    options = reverse, temperature, chunk_mb, torch.is_grad_enabled()
    return LinearKLReference.apply(hidden, weight, teacher_hidden, teacher_weight, *options)


# --------------------------------------------------------------------------------------------------
# The kernel. A program takes one row of a chunk's logits: z of the student, y of the teacher, laid
# out as kernels/head.py says.


@triton.jit
def log_softmax(row_ptr, start, lse, V, stride, scale, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """log softmax of the columns from `start`; LOWEST where the logit is -inf or behind V."""
    cols = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + cols, mask=cols < stride, other=0.0).to(tl.float32)
    log_p = z * scale - lse
    return tl.where((cols >= V) | (log_p < LOWEST), LOWEST, log_p)


@triton.jit(do_not_specialize=["V"])
def kl_kernel(
    student_ptr,
    teacher_ptr,
    kl_ptr,
    V,
    stride,
    scale,
    LOWEST: tl.constexpr,
    REVERSE: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kl [n]. GRAD: the student's logits become the gradient of the sum of kl."""
    row = tl.program_id(0).to(tl.int64)
    student, teacher = student_ptr + row * stride, teacher_ptr + row * stride
    m, d, _ = row_statistics(student, V, stride, scale, LOWEST, False, BLOCK)
    lse_p = m + tl.log(d)
    m, d, _ = row_statistics(teacher, V, stride, scale, LOWEST, False, BLOCK)
    lse_q = m + tl.log(d)
    kl = 0.0
    for start in tl.range(0, V, BLOCK):
        log_p = log_softmax(student, start, lse_p, V, stride, scale, LOWEST, BLOCK)
        log_q = log_softmax(teacher, start, lse_q, V, stride, scale, LOWEST, BLOCK)
        if REVERSE:
            kl += tl.sum(tl.exp2(log_p * LOG2E) * (log_p - log_q), 0)
        else:
            kl += tl.sum(tl.exp2(log_q * LOG2E) * (log_q - log_p), 0)
    tl.store(kl_ptr + row, kl)
    if GRAD:  # the sum above has waited for every thread, so all logits have been read
        cols = tl.arange(0, BLOCK)
        for start in tl.range(0, V, BLOCK):
            log_p = log_softmax(student, start, lse_p, V, stride, scale, LOWEST, BLOCK)
            log_q = log_softmax(teacher, start, lse_q, V, stride, scale, LOWEST, BLOCK)
            p = tl.exp2(log_p * LOG2E)
            if REVERSE:
                grad = p * (log_p - log_q - kl)
            else:
                grad = p - tl.exp2(log_q * LOG2E)
            tl.store(
                student + start + cols, (grad * scale).to(student_ptr.dtype.element_ty), mask=start + cols < stride
            )


# --------------------------------------------------------------------------------------------------
# The op


@register(
    "linear_kl(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, bool reverse, "
    "float temperature, int chunk_mb, bool want_hidden, bool want_weight) -> (Tensor, Tensor, Tensor)",
    fake=sum_fake,
)
def linear_kl_forward(hidden, weight, teacher_hidden, teacher_weight, reverse, temperature, chunk_mb, *want):
    """Returns the sum of the KL and, already, its gradients."""
    V, w, teacher_w = len(weight), weight.to(hidden.dtype), teacher_weight.to(hidden.dtype)
    cols, warps = block(V)
    constants = dict(LOWEST=LOWEST, REVERSE=reverse, GRAD=any(want), BLOCK=cols, num_warps=warps, **UNFUSED)
    kl = hidden.new_empty(len(hidden), dtype=torch.float32)
    d_hidden, d_weight = gradients(hidden, weight, *want)
    student_chunks = logits_by_chunk(hidden, w, chunk_mb)
    teacher_chunks = logits_by_chunk(teacher_hidden, teacher_w, chunk_mb)  # the same slices: V and dtype are the same
    for (part, logits), (_, teacher_logits) in zip(student_chunks, teacher_chunks):
        grid = (len(logits),)
        kl_kernel[grid](logits, teacher_logits, kl[part], V, logits.stride(0), 1 / temperature, **constants)
        add_gradients(logits, part, hidden, w, d_hidden, d_weight)
    return kl.sum(), d_hidden, d_weight


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, reverse, temperature, chunk_mb, grad_enabled):
        ctx.want, ctx.weight_dtype = wanted(ctx, grad_enabled), weight.dtype
        inputs = hidden, weight, teacher_hidden, teacher_weight
        total, d_hidden, d_weight = linear_kl_forward(*inputs, reverse, temperature, chunk_mb, *ctx.want)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *scaled(ctx, grad), None, None, None, None, None, None


def linear_kl(hidden, weight, teacher_hidden, teacher_weight, *, reverse=True, temperature=1.0, chunk_mb=None):
    """The KL divergence of two heads summed over tokens, in nats, an fp32 scalar.

    hidden [N, C] and weight fp32 [V, C] are the student's, which has the gradient; teacher_hidden
    [N, C'] (hidden's dtype) and teacher_weight fp32 [V, C'] the teacher's. reverse: KL(student ||
    teacher), else KL(teacher || student). chunk_mb: bounds the memory of either's logits. Raises
    ValueError if the vocabularies differ.
    """
    if len(weight) != len(teacher_weight):
        raise ValueError(f"vocabularies of {len(weight)} and {len(teacher_weight)} tokens")
    chunk_mb = chunk_default(hidden) if chunk_mb is None else chunk_mb
    inputs = hidden, weight, teacher_hidden, teacher_weight
    if not use("linear_kl", hidden):
        return linear_kl_reference(*inputs, reverse=reverse, temperature=temperature, chunk_mb=chunk_mb)
    return LinearKL.apply(*inputs, reverse, temperature, chunk_mb, torch.is_grad_enabled())


@proof("linear_kl")
def linear_kl_proof(device):
    inputs, _ = proof_inputs(device)
    teachers = [torch.randn(len(x), x.shape[1] // 2, device=device) for x in inputs]

    def f(*inputs):
        outs = []
        for h, w, hidden, weight in zip(inputs[::2], inputs[1::2], teachers[::2], teachers[1::2]):
            hidden = hidden.to(h.dtype)
            outs.append(linear_kl(h, w, hidden, weight / 6, reverse=True, temperature=0.7, chunk_mb=0))
            outs.append(linear_kl(h[:9], w, hidden[:9], weight / 6, reverse=False))
        return outs

    return f, inputs
