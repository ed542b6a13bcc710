"""The output head: linear + cross-entropy and linear + log-probability, without ever holding the logits of all tokens.

    loss = sum_i -log softmax(hidden_i W^T)[target_i]            logp_i = log softmax(hidden_i W^T / temperature)[target_i]

Logits are made a chunk of tokens at a time. The cross-entropy forms its gradients while it holds them (three matrix products, nothing computed
twice). The log-probability, whose upstream gradient is not known yet, keeps one log-sum-exp a token and makes the logits again in the backward.
Log-sum-exp and all that follows from it is fp32 (fp64 for fp64 input).
"""
import torch

IGNORE = -100  # a target that asks for nothing


def chunks(n_tokens, vocab_size, chunk_mb):
    """Slices over the tokens, each with at most `chunk_mb` MiB of fp32 logits but at least 128 tokens, so that the products stay efficient."""
    rows = max(128, chunk_mb * 2**20 // (4 * vocab_size))
    return [slice(start, min(start + rows, n_tokens)) for start in range(0, n_tokens, rows)]


class LinearCrossEntropyReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_mb):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)  # [V, C]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        for part in chunks(len(hidden), len(weight), chunk_mb):
            x, target = hidden[part], targets[part, None]
            asked = (target != IGNORE).to(wide)  # [n, 1]
            target = target.clamp(min=0)
            logits = (x @ w.T).to(wide)  # [n, V]
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            loss += ((lse - logits.gather(1, target)) * asked).sum()
            if want_hidden or want_weight:
                d_logits = logits.sub_(lse).exp_().scatter_add_(1, target, -torch.ones_like(lse)).mul_(asked).to(hidden.dtype)  # (p - 1[target]) asked
            if want_hidden:
                d_hidden[part] = d_logits @ w
            if want_weight:
                d_weight += d_logits.T @ x
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None


class LinearLogprobReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, chunk_mb):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)
        logp, lse, ent = (torch.zeros(len(hidden), dtype=wide, device=hidden.device) for _ in range(3))
        for part in chunks(len(hidden), len(weight), chunk_mb):
            target = targets[part, None]
            logits = (hidden[part] @ w.T).to(wide).div_(temperature)  # [n, V]
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
            log_p = (x @ w.T).to(lse.dtype).div_(ctx.temperature).sub_(lse[part, None])
            p = log_p.exp()
            d_logits = p * -g  # g (1[target] - p) - d_ent p (log p + H)
            d_logits.scatter_add_(1, target.clamp(min=0), g)
            if ctx.entropy:
                d_logits -= d_ent[part, None] * p * (log_p + ent[part, None])
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
            if want_hidden:
                d_hidden[part] = d_logits @ w
            if want_weight:
                d_weight += d_logits.T @ x
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def linear_cross_entropy_reference(hidden, weight, targets, chunk_mb=64):
    """See linear_cross_entropy."""
    return LinearCrossEntropyReference.apply(hidden, weight, targets, chunk_mb)


def linear_logprob_reference(hidden, weight, targets, temperature=1.0, entropy=False, chunk_mb=64):
    """See linear_logprob."""
    logp, ent = LinearLogprobReference.apply(hidden, weight, targets, temperature, entropy, chunk_mb)
    return (logp, ent) if entropy else logp


def linear_cross_entropy(hidden, weight, targets, chunk_mb=64):
    """Sum over tokens of the cross-entropy in nats, a fp32 scalar: divide by the global count of asked targets, not by this batch's.

    hidden [N, C]; weight fp32 [V, C]; targets int64 [N], IGNORE where nothing is asked. `chunk_mb` bounds the memory the logits take.
    """
    return linear_cross_entropy_reference(hidden, weight, targets, chunk_mb)


def linear_logprob(hidden, weight, targets, temperature=1.0, entropy=False, chunk_mb=64):
    """fp32 [N]: log-probability in nats of each target at `temperature`, 0 where the target is IGNORE; with `entropy` also the fp32 [N] entropy.

    Shapes as linear_cross_entropy. Gradients flow to hidden and weight, from both outputs.
    """
    return linear_logprob_reference(hidden, weight, targets, temperature, entropy, chunk_mb)
