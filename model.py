"""The GPT: one decoder-only transformer for every stage, weight for weight a Qwen3 (or Llama, or Qwen2) of Hugging Face.

    x_0 = E[token];   x <- x + Attention(RMSNorm(x));   x <- x + SwiGLU(RMSNorm(x));   logits = W RMSNorm(x_L)

A block hands its last addition on to the next norm, so that each addition and the norm after it are one pass over memory (`add_rms_norm`).

RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU, no biases (Qwen2's on q, k, v excepted). Output projections start at
zero, so every block starts as the identity and the loss at ln V. Parameters are fp32; on CUDA the matrix products run in bf16.
Left out, because nothing here uses them: sliding windows, mixtures of experts, logit soft-capping.

Dimension letters, here and everywhere: N tokens in a pack, D documents, B rollout slots, T time, C width, H query heads, K key-value heads,
Dh head width, V vocabulary, L layers.
"""
import copy
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError
from data.pack import next_tokens
from kernels.act import swiglu
from kernels.attention import attention, layout
from kernels.decode import append_rope, decode_attention
from kernels.head import IGNORE, linear_logprob
from kernels.linear import linear
from kernels.norm import add_rms_norm
from kernels.rope import qk_norm_rope


@dataclasses.dataclass
class GPTConfig:
    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int = 1024  # longest document the rotary tables reach
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3's: (factor, low_freq_factor, high_freq_factor, original context)
    norm_eps: float = 1e-6
    tied: bool = False  # one matrix for embedding and head
    qk_norm: bool = True
    qkv_bias: bool = False  # Qwen2
    scalar_head: bool = False  # a reward model or critic: one number a token instead of logits

    @property
    def qkv_rows(self):
        """Rows of queries, keys and values in the fused projection."""
        return [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]


def config_for(depth, vocab_size, width=0, heads=0, kv_heads=0, ffn=0, context=1024, tied=False):
    """The one dial: `depth` layers of width 64 x depth, and all else from the width. Every value given (not 0) wins over the derived one.

    UserError where sizes are none or heads do not fit.
    """
    for name, size in {"depth": depth - 1, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "context": context - 1}.items():
        if size < 0:
            raise UserError(f"--{name}: too small")
    width = width or 64 * depth
    head_dim = width // heads if heads else 32 if width < 256 else 64 if width < 1024 else 128
    heads = heads or -(-width // head_dim)
    if head_dim < 2 or head_dim % 2 or heads % (kv_heads or heads):
        raise UserError(f"--heads={heads}: width {width} gives heads of {head_dim}, and that must be even; kv_heads ({kv_heads or heads}) must divide heads")
    multiple = 16 if width < 512 else 128  # what the matrix units like
    ffn = ffn or 8 * width // 3 // multiple * multiple
    return GPTConfig(vocab_size, depth, width, heads, kv_heads or heads, head_dim, ffn, context, tied=tied)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        rows = sum(c.qkv_rows)
        self.config = c
        self.attn_norm = nn.Parameter(torch.ones(c.width))
        self.qkv = nn.Parameter(torch.empty(rows, c.width))  # queries, then keys, then values
        self.qkv_bias = nn.Parameter(torch.zeros(rows)) if c.qkv_bias else None
        self.q_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.out = nn.Parameter(torch.zeros(c.width, c.heads * c.head_dim))
        self.mlp_norm = nn.Parameter(torch.ones(c.width))
        self.gate_up = nn.Parameter(torch.empty(2 * c.ffn, c.width))  # the gate, then what it gates
        self.down = nn.Parameter(torch.zeros(c.width, c.ffn))

    def forward(self, x, delta, attend, dropout):
        """x [N, C] and what is still to be added to it -> the same, one block further. `attend` makes of qkv [N, H+2K, Dh] what each token saw [N, H, Dh]."""
        x, y = add_rms_norm(x, delta, self.attn_norm, self.config.norm_eps)
        qkv = linear(y, self.qkv, self.qkv_bias).view(len(y), -1, self.config.head_dim)
        y = linear(attend(qkv, self.q_norm, self.k_norm).flatten(1), self.out)  # [N, H Dh] -> [N, C]
        x, y = add_rms_norm(x, F.dropout(y, dropout), self.mlp_norm, self.config.norm_eps)
        return x, F.dropout(self.mlp(y), dropout)

    def mlp(self, x):
        return linear(swiglu(linear(x, self.gate_up)), self.down)


class GPT(nn.Module):
    """model(pack) -> hidden [N, C] after the final norm. The logits are never made whole: see logprobs, and kernels/head.py."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.width))
        if c.scalar_head:
            self.score = nn.Parameter(torch.empty(1, c.width))
        elif not c.tied:
            self.untied_head = nn.Parameter(torch.zeros(c.vocab_size, c.width))
        self.dropout = 0.0  # only pretrain.py sets it; every later stage needs the same pass twice to give the same numbers
        self.checkpoint_activations = False  # keep a block's input only and compute the block again in the backward: less memory, more time
        cos, sin = rotary_tables(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed):
        """Fresh weights from `seed`, the same on every device: drawn on the CPU, in fp32."""
        generator = torch.Generator().manual_seed(seed)
        c = self.config
        draw = lambda p, std: p.copy_(torch.randn(p.shape, generator=generator) * std)  # noqa: E731
        draw(self.embed, 1 / c.width if c.tied else 0.3)  # tied: a token's logit of itself, width x std, starts at 1
        for block in self.blocks:
            draw(block.qkv, c.width**-0.5)
            draw(block.gate_up, c.width**-0.5)
        if c.scalar_head:
            draw(self.score, (c.width + 1) ** -0.5)  # Stiennon et al. 2020, as published in their code
        return self

    @property
    def head(self):
        """The output matrix [V, C]."""
        return self.embed if self.config.tied else self.untied_head

    def forward(self, pack, cache=None, slots=None):
        """hidden [N, C]. With a KVCache, document d is also written into slot `slots[d]` (int64 [D]), ready for `step`."""
        c = self.config
        x = F.embedding(pack.tokens, self.embed).to(self.compute_dtype)  # [N, C]
        documents = layout(pack.cu, x, c.head_dim)
        cos, sin = self.cos[pack.positions], self.sin[pack.positions]  # [N, Dh/2]
        dropout = self.dropout if self.training else 0.0
        x = F.dropout(x, dropout)
        delta = torch.zeros_like(x)
        if cache is not None:
            lengths = pack.cu.diff().long()
            rows = slots.repeat_interleave(lengths, output_size=len(x))  # [N] the slot of each token
            cache.lengths[slots] = lengths
        for i, block in enumerate(self.blocks):

            def attend(qkv, q_norm, k_norm):
                qkv = qk_norm_rope(qkv, q_norm, k_norm, cos, sin, c.heads, c.norm_eps)
                q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
                if cache is not None:
                    cache.k[i, rows, pack.positions], cache.v[i, rows, pack.positions] = k, v
                return attention(q, k, v, documents)

            if self.checkpoint_activations and torch.is_grad_enabled():
                x, delta = checkpoint(block, x, delta, attend, dropout, use_reentrant=False)
            else:
                x, delta = block(x, delta, attend, dropout)
        return add_rms_norm(x, delta, self.norm, c.norm_eps)[1]

    @torch.no_grad()
    def step(self, tokens, cache):
        """Append tokens [B], one to each slot of the cache -> hidden [B, C] of these tokens. Nothing in it waits for the GPU or depends on the lengths."""
        c = self.config
        held = cache.lengths.clone()
        cache.lengths += 1
        x = F.embedding(tokens, self.embed).to(self.compute_dtype)
        delta = torch.zeros_like(x)
        for i, block in enumerate(self.blocks):

            def attend(qkv, q_norm, k_norm):
                q = append_rope(qkv, q_norm, k_norm, self.cos, self.sin, c.heads, c.norm_eps, cache.k[i], cache.v[i], held)
                return decode_attention(q, cache.k[i], cache.v[i], cache.lengths)

            x, delta = block(x, delta, attend, 0.0)
        return add_rms_norm(x, delta, self.norm, c.norm_eps)[1]

    @property
    def compute_dtype(self):
        return torch.bfloat16 if self.embed.is_cuda else self.embed.dtype

    def matrices(self):
        """The trunk's weight matrices, as {parameter name: row counts of the matrices stacked in it}: what Muon orthogonalises, one by one."""
        c = self.config
        kinds = {"qkv": c.qkv_rows, "out": [c.width], "gate_up": [c.ffn, c.ffn], "down": [c.width]}
        return {f"blocks.{i}.{kind}": rows for i in range(c.layers) for kind, rows in kinds.items()}

    def flops_per_token(self, length):
        """Floating-point operations of one training step a token, documents of `length` tokens: 6 a weight used, and causal attention's two products."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - (0 if c.tied and not c.scalar_head else self.embed.numel())
        return 6 * weights + 6 * c.layers * c.heads * c.head_dim * length


class KVCache:
    """Keys and values of B slots of up to T tokens, and how many each slot holds."""

    def __init__(self, model, slots, length):
        c = model.config
        self.k, self.v = torch.zeros(2, c.layers, slots, length, c.kv_heads, c.head_dim, dtype=model.compute_dtype, device=model.embed.device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=model.embed.device)

    def first(self, n):
        """A view of the first n slots."""
        view = copy.copy(self)
        view.k, view.v, view.lengths = self.k[:, :n], self.v[:, :n], self.lengths[:n]
        return view

    def copy(self, source, to, lengths, longest):
        """Have the slots `to` hold the first `lengths` tokens of the slots `source` (int64 [n] each), none of them more than `longest`."""
        for x in (self.k, self.v):
            x[:, to, :longest] = x[:, source, :longest]
        self.lengths[to] = lengths


def rotary_tables(c):
    """cos and sin, fp32 [context, Dh/2], of position x theta^(-2i/Dh); with Llama 3's stretching of the slow frequencies where asked."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling:
        factor, low, high, original = c.rope_scaling
        turns = original * freq / (2 * torch.pi)  # of this frequency within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, kept; 0: slow, divided by the factor; between: a mixture
        freq = keep * freq + (1 - keep) * freq / factor
    angle = torch.arange(c.context, dtype=torch.float64)[:, None] * freq
    return angle.cos().float(), angle.sin().float()


def logprobs(model, pack, temperature=1.0):
    """fp32 [N]: log p(token i | earlier tokens of its document) in nats at `temperature`; 0 at a document's first token."""
    logp = linear_logprob(model(pack), model.head, next_tokens(pack, IGNORE), temperature)
    return logp.roll(1)  # from the token that predicts to the token predicted; what rolls over each boundary is the 0 of an IGNORE


def values(model, pack):
    """fp32 [N]: the scalar head at every token."""
    return (model(pack).to(model.score.dtype) @ model.score[0]).float()


def score(model, pack):
    """fp32 [D]: the scalar head at each document's last token, the end-of-turn token of a finished answer."""
    return values(model, pack)[pack.cu[1:].long() - 1]
