"""The GPT: one decoder-only transformer for every stage, weight for weight a Qwen3 (or Llama, or
Qwen2) of Hugging Face.

    x_0 = E[token]
    x <- x + Attention(RMSNorm(x));   x <- x + SwiGLU(RMSNorm(x))
    logits = W RMSNorm(x_L)

RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU, no biases (except Qwen2's
on q, k, v); optionally a sliding window in every n-th layer. Output projections start at zero, so
every block starts as the identity and the loss at ln V. Parameters are fp32; on CUDA the matrix
products run in bf16. Each residual addition and the norm after it are one pass over memory
(`add_rms_norm`): a block therefore hands its last addition to the norm of the next one.

Dimension letters, here and everywhere: N tokens in a pack, D documents, B rollout slots, T time,
C width, H query heads, K key-value heads, Dh head width, V vocabulary, M tokens trained on,
L layers, P pairs.
"""

import copy
import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.pack import IGNORE, next_tokens, pack_chats, share_prompts, to_device, token_slices
from kernels.act import swiglu
from kernels.attention import attention, exclude_ragged_from_compile, layout, rope_attention
from kernels.decode import append_rope, decode_attention, decode_bias
from kernels.head import linear_logprob
from kernels.linear import linear
from kernels.norm import add_rms_norm
from kernels.rope import qk_norm_rope
from runtime.errors import UserError


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
    window: int = 0  # tokens that a token sees in a windowed layer, itself included; 0: no layer has one
    window_every: int = 1  # which layers are windowed: every n-th, from the first; 2: layers 0, 2, 4, ...
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3's: (factor, low_freq_factor, high_freq_factor, original context)
    norm_eps: float = 1e-6
    tied: bool = False  # one matrix for embedding and head
    qk_norm: bool = True
    qkv_bias: bool = False  # Qwen2
    scalar_head: bool = False  # a reward model or critic: one number per token instead of logits
    padding: int = 0  # unused ids at the vocabulary's end: never drawn, of probability 0

    @property
    def qkv_rows(self):
        """Rows of queries, keys and values in the fused projection."""
        return [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]

    @property
    def windows(self):
        """The window of each layer; 0: its tokens see all of their document so far."""
        return [self.window if i % self.window_every == 0 else 0 for i in range(self.layers)]

    def slot_bytes(self, length, item_size):
        """Bytes of the keys and values of `length` tokens: a slot of a KVCache."""
        return 2 * self.layers * length * self.kv_heads * self.head_dim * item_size


def config_for(depth, vocab_size, width=0, heads=0, kv_heads=0, ffn=0, **options):
    """The one dial: `depth` layers of width 64 x depth, and everything else from the width.

    A size that is given (not 0) replaces the derived one; options: further fields of GPTConfig.
    Raises UserError if the heads do not fit.
    """
    width = width or 64 * depth
    head_dim = 32 if width < 256 else 64 if width < 768 else 128  # wider heads fill tensor cores better
    if heads:
        head_dim = width // heads
    heads = heads or -(-width // head_dim)
    kv_heads = kv_heads or heads
    if head_dim < 2 or head_dim % 2 or heads % kv_heads:
        raise UserError(
            f"--heads={heads} --kv_heads={kv_heads}: width {width} gives heads of {head_dim}, and that must be even; "
            "kv_heads must divide heads"
        )
    multiple = 16 if width < 512 else 128  # tiles of the matrix units
    ffn = ffn or max(multiple, 8 * width // 3 // multiple * multiple)
    c = GPTConfig(vocab_size, depth, width, heads, kv_heads, head_dim, ffn, **options)
    c.window_every = min(c.window_every, depth) if c.window else 1  # as config.json will give it back
    return c


class ParameterInfo(NamedTuple):
    """What optimizer, checkpoint and export need to know about a parameter."""

    rows: list  # of each matrix stacked in it along dim 0, how many rows; of a vector, its length
    hf_names: list  # their names in a Hugging Face checkpoint
    muon: bool = False  # whether it is a matrix of the trunk, which Muon orthogonalises


def parameter_table(c):
    """{parameter name: ParameterInfo} of a GPT with this config. Every parameter must be here: see
    hub.check_parameters."""
    block = {"attn_norm": ParameterInfo([c.width], ["input_layernorm.weight"])}
    block["attn.qkv"] = ParameterInfo(c.qkv_rows, [f"self_attn.{x}_proj.weight" for x in "qkv"], muon=True)
    if c.qkv_bias:
        block["attn.qkv_bias"] = ParameterInfo(c.qkv_rows, [f"self_attn.{x}_proj.bias" for x in "qkv"])
    if c.qk_norm:
        block["attn.q_norm"] = ParameterInfo([c.head_dim], ["self_attn.q_norm.weight"])
        block["attn.k_norm"] = ParameterInfo([c.head_dim], ["self_attn.k_norm.weight"])
    block["attn.out"] = ParameterInfo([c.width], ["self_attn.o_proj.weight"], muon=True)
    block["mlp_norm"] = ParameterInfo([c.width], ["post_attention_layernorm.weight"])
    block["mlp.gate_up"] = ParameterInfo([c.ffn, c.ffn], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], muon=True)
    block["mlp.down"] = ParameterInfo([c.width], ["mlp.down_proj.weight"], muon=True)

    table = {
        "embed": ParameterInfo([c.vocab_size], ["model.embed_tokens.weight"]),
        "norm": ParameterInfo([c.width], ["model.norm.weight"]),
    }
    if c.scalar_head:
        table["score"] = ParameterInfo([1], ["score.weight"])
    elif not c.tied:
        table["untied_head"] = ParameterInfo([c.vocab_size], ["lm_head.weight"])
    for i in range(c.layers):
        for name, row in block.items():
            hf_names = [f"model.layers.{i}.{hf_name}" for hf_name in row.hf_names]
            table[f"blocks.{i}.{name}"] = row._replace(hf_names=hf_names)
    return table


class Attention(nn.Module):
    """Grouped-query attention with QK-norm. `view`, a PackView or a StepView, decides which tokens
    attend to which."""

    def __init__(self, c, layer):
        super().__init__()
        rows = sum(c.qkv_rows)
        self.layer, self.window = layer, c.windows[layer]
        self.heads, self.kv_heads, self.head_dim, self.norm_eps = c.heads, c.kv_heads, c.head_dim, c.norm_eps
        self.qkv = nn.Parameter(torch.empty(rows, c.width))  # queries, then keys, then values
        self.qkv_bias = nn.Parameter(torch.zeros(rows)) if c.qkv_bias else None
        self.q_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.out = nn.Parameter(torch.zeros(c.width, c.heads * c.head_dim))

    def forward(self, x, view):
        qkv = linear(x, self.qkv, self.qkv_bias).view(len(x), -1, self.head_dim)  # [N, H + 2K, Dh]
        heads = view.attend(self, qkv)  # [N, H, Dh]
        return linear(heads.flatten(1), self.out)  # [N, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * c.ffn, c.width))  # the gate's rows, then those of up
        self.down = nn.Parameter(torch.zeros(c.width, c.ffn))

    def forward(self, x):
        return linear(swiglu(linear(x, self.gate_up)), self.down)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm_eps = c.norm_eps
        self.attn_norm = nn.Parameter(torch.ones(c.width))
        self.attn = Attention(c, layer)
        self.mlp_norm = nn.Parameter(torch.ones(c.width))
        self.mlp = MLP(c)

    def forward(self, x, delta, view, dropout):
        """x [N, C] and delta, still to be added to it -> both, one block further."""
        x, y = add_rms_norm(x, delta, self.attn_norm, self.norm_eps)  # x + delta, and its norm
        delta = F.dropout(self.attn(y, view), dropout)
        x, y = add_rms_norm(x, delta, self.mlp_norm, self.norm_eps)
        return x, F.dropout(self.mlp(y), dropout)


class PackView:
    """A token of a pack sees the earlier tokens of its own document.

    With a KVCache, document d is also written into slot `slots[d]` (int64 [D]), ready for a
    StepView."""

    def __init__(self, model, pack, x, cache, slots):
        self.pack, self.cache = pack, cache
        if pack.stored_row is not None:
            # x has a shared prompt once; the layout is of the whole documents, [N, C]
            x = x[:1].expand(len(pack.stored_row), -1)
        self.layout = layout(pack.cu_seqlens, x, model.config.head_dim)
        self.cos, self.sin = model.cos[pack.positions], model.sin[pack.positions]  # [N, Dh/2]
        if cache is not None:
            lengths = pack.cu_seqlens.diff().long()
            self.slots = slots.repeat_interleave(lengths, output_size=len(x))  # [N] of each token
            cache.lengths[slots] = lengths

    def attend(self, attn, qkv):
        """qkv [N, H + 2K, Dh] of the module `attn` -> what each token saw [N, H, Dh]."""
        rope = attn.q_norm, attn.k_norm, self.cos, self.sin, attn.heads, attn.norm_eps
        if self.cache is None and self.pack.stored_row is None:
            return rope_attention(qkv, *rope, self.layout, attn.window)
        qkv = qk_norm_rope(qkv, *rope)
        if self.pack.stored_row is not None:
            qkv = qkv.index_select(0, self.pack.stored_row)  # a shared prompt for each of its documents
        q, k, v = qkv.split([attn.heads, attn.kv_heads, attn.kv_heads], dim=1)
        if self.cache is not None:
            self.cache.k[attn.layer, self.slots, self.pack.positions] = k
            self.cache.v[attn.layer, self.slots, self.pack.positions] = v
        out = attention(q, k, v, self.layout, attn.window)
        return out if self.pack.stored_row is None else out.index_select(0, self.pack.first_copy)


class StepView:
    """A token appended to each slot of a KVCache sees what its slot holds, itself included."""

    def __init__(self, model, cache):
        self.cache = cache
        self.held = cache.lengths.clone()  # int64 [B]: tokens of each slot before this one
        self.cos, self.sin = model.cos[self.held], model.sin[self.held]  # [B, Dh/2]
        cache.lengths += 1
        self.biases = {}  # {window: decode_attention's bias}
        for window in set(model.config.windows):
            self.biases[window] = decode_bias(cache.k, model.config.head_dim, cache.lengths, window)

    def attend(self, attn, qkv):
        """qkv [B, H + 2K, Dh] of the module `attn` -> what each token saw [B, H, Dh]."""
        k, v = self.cache.k[attn.layer], self.cache.v[attn.layer]  # [B, T, K, Dh]
        rope = attn.q_norm, attn.k_norm, self.cos, self.sin, attn.heads, attn.norm_eps
        q = append_rope(qkv, *rope, k, v, self.held)  # normalised and rotated; the cache gets this token's k and v
        return decode_attention(q, k, v, self.cache.lengths, attn.window, self.biases[attn.window])


class GPT(nn.Module):
    """model(pack) -> hidden [N, C] after the final norm. Logits are never materialised whole: see
    `logprobs`, and kernels/head.py."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.width))
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.width))
        if c.scalar_head:
            self.score = nn.Parameter(torch.empty(1, c.width))
        elif not c.tied:
            self.untied_head = nn.Parameter(torch.zeros(c.vocab_size, c.width))
        # Only pretrain.py sets dropout; every later stage needs the same pass twice to give the
        # same numbers.
        self.dropout = 0.0
        # Keep each block's input only, and compute the block again in the backward.
        self.checkpoint_activations = False
        # Compute in fp32 on CUDA too: rollout.py's check of sampler against trainer.
        self.exact = False
        cos, sin = rotary_tables(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw fresh weights from `seed`, on the CPU in fp32, so that every device gets the same.
        Returns the model."""
        generator = torch.Generator().manual_seed(seed)
        c = self.config

        def draw(p, std):
            p.copy_(torch.randn(p.shape, generator=generator) * std)

        draw(self.embed, 1 / c.width if c.tied else 0.3)  # tied: a token's own logit starts near 1
        for block in self.blocks:
            draw(block.attn.qkv, c.width**-0.5)
            draw(block.mlp.gate_up, c.width**-0.5)
        if c.scalar_head:
            draw(self.score, (c.width + 1) ** -0.5)  # Stiennon et al. 2020, as published in their code
        return self

    @property
    def head(self):
        """The output matrix [V, C], without the rows of ids that stand for no token."""
        matrix = self.embed if self.config.tied else self.untied_head
        return matrix[: -self.config.padding] if self.config.padding else matrix

    @property
    def compute_dtype(self):
        return torch.bfloat16 if self.embed.is_cuda and not self.exact else self.embed.dtype

    def compile(self, **options):
        """torch.compile the forward pass, except attention over documents of several lengths."""
        exclude_ragged_from_compile()
        super().compile(**options)

    def forward(self, pack, cache=None, slots=None):
        """hidden [N, C] of a Pack. With a KVCache, document d is also written into slot `slots[d]`
        (int64 [D])."""
        x = F.embedding(pack.tokens, self.embed).to(self.compute_dtype)  # [N, C]
        return self.run_blocks(x, PackView(self, pack, x, cache, slots), self.dropout if self.training else 0.0)

    @torch.no_grad()
    def step(self, tokens, cache):
        """Append tokens [B], one to each slot of the cache -> hidden [B, C] of these tokens.

        Nothing here waits for the GPU, and no control flow depends on the lengths.
        """
        x = F.embedding(tokens, self.embed).to(self.compute_dtype)  # [B, C]
        return self.run_blocks(x, StepView(self, cache), 0.0)

    def run_blocks(self, x, view, dropout):
        """Embeddings [N, C] through all blocks and the final norm."""
        x = F.dropout(x, dropout)
        delta = torch.zeros_like(x)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, delta = checkpoint(block, x, delta, view, dropout, use_reentrant=False)
            else:
                x, delta = block(x, delta, view, dropout)
        return add_rms_norm(x, delta, self.norm, self.config.norm_eps)[1]

    def flops_per_token(self, length):
        """FLOPs of forward and backward per token of a document of `length` tokens: 6 per weight
        that is multiplied, and 6 per channel and token for attention's two products: a token sees
        half of the document on average. A window is not counted."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters())
        if not c.tied or c.scalar_head:
            weights -= self.embed.numel()  # a table that is only looked up
        return 6 * weights + 6 * c.layers * c.heads * c.head_dim * length


class KVCache:
    """Keys and values of B slots of up to T tokens, k and v [L, B, T, K, Dh], and how many tokens
    each slot holds.

    In memory a head's tokens are contiguous, so that a step's attention is a batched
    product without copies."""

    def __init__(self, model, slots, length):
        c, device = model.config, model.embed.device
        shape = c.layers, slots, c.kv_heads, length, c.head_dim
        self.k = torch.zeros(shape, dtype=model.compute_dtype, device=device).transpose(2, 3)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)

    def first(self, n):
        """A view of the first n slots."""
        view = copy.copy(self)
        view.k, view.v, view.lengths = self.k[:, :n], self.v[:, :n], self.lengths[:n]
        return view

    def copy(self, source, to, lengths, longest):
        """Have the slots `to` hold the first `lengths` tokens of the slots `source` (int64 [n]
        each), none of them more than `longest`."""
        for x in (self.k, self.v):
            x[:, to, :longest] = x[:, source, :longest]
        self.lengths[to] = lengths


def rotary_tables(c):
    """cos and sin, fp32 [context, Dh/2], of position * theta^(-2i/Dh), the slow frequencies
    stretched as Llama 3 does if rope_scaling is given."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling:
        factor, low, high, original = c.rope_scaling
        turns = original * freq / (2 * torch.pi)  # of this frequency within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, kept; 0: slow, divided by the factor
        freq = keep * freq + (1 - keep) * freq / factor
    angle = torch.arange(c.context, dtype=torch.float64)[:, None] * freq
    return angle.cos().float(), angle.sin().float()


# --------------------------------------------------------------------------------------------------
# What the stages read from a model


def logprobs(model, pack, temperature=1.0):
    """fp32 [N]: log p(token i | earlier tokens of its document) at `temperature`; 0 for the first
    token of a document."""
    logp = linear_logprob(model(pack), model.head, next_tokens(pack, IGNORE), temperature)
    return logp.roll(1)  # from the token that predicts to the one predicted; a document's last has 0


def hidden_before_targets(model, chats):
    """(hidden [M, C], targets int64 [M]): the model's output at the token before each one that is
    trained on.

    The hidden state at index t - 1 predicts token t: a prompt's last token predicts the first of
    the completion. A prompt that several chats begin with is computed once, except in attention.
    Only these rows reach the head; with all of them a DPO step takes 8 % longer where prompts are
    a quarter of the tokens."""
    pack, targets = pack_chats(chats)
    rows = (targets != IGNORE).nonzero()[:, 0]  # found on the CPU, which avoids a wait for the device
    targets, pack = targets[rows], share_prompts(pack, chats)
    if pack.stored_row is not None:
        rows = pack.stored_row[rows]
    device = model.embed.device
    return model(pack.to(device)).index_select(0, to_device(rows, device)), to_device(targets, device)


def completion_logprobs(model, chats, temperature=1.0):
    """fp32 [M]: the log-probability of each token that is trained on, in order."""
    hidden, targets = hidden_before_targets(model, chats)
    return linear_logprob(hidden, model.head, targets, temperature)


def completion_logprob_sums(model, chats):
    """fp32 [D]: `completion_logprobs` summed over each chat: log p(completion | prompt)."""
    ends = np.cumsum([0, *(c.loss_mask.sum() for c in chats)])
    offsets = to_device(torch.tensor(ends), model.embed.device)
    return torch.segment_reduce(completion_logprobs(model, chats), "sum", offsets=offsets)


@torch.no_grad()
def logprobs_no_grad(model, chats, temperature, micro_batch_tokens):
    """`completion_logprobs` without gradients, at most `micro_batch_tokens` tokens at once."""
    model.eval()
    found = [torch.zeros(0, device=model.embed.device)]  # a rank's share may be empty
    for part in token_slices([len(c.ids) for c in chats], micro_batch_tokens):
        found.append(completion_logprobs(model, chats[part], temperature))
    return torch.cat(found)


def values(model, pack):
    """fp32 [N]: the scalar head at every token."""
    return (model(pack).to(model.score.dtype) @ model.score[0]).float()


def score(model, pack):
    """fp32 [D]: the scalar head at each document's last token, the end-of-turn token of a finished
    answer."""
    return values(model, pack)[pack.cu_seqlens[1:].long() - 1]


def state_values(critic, chats):
    """fp32 [M]: V of the state before each completion token, read at the token before it, where
    the policy predicts that token."""
    hidden, _ = hidden_before_targets(critic, chats)
    return (hidden.to(critic.score.dtype) @ critic.score[0]).float()


@torch.no_grad()
def values_no_grad(critic, chats, micro_batch_tokens):
    """`state_values` without gradients, at most `micro_batch_tokens` tokens at once."""
    critic.eval()
    found = [torch.zeros(0, device=critic.embed.device)]
    for part in token_slices([len(c.ids) for c in chats], micro_batch_tokens):
        found.append(state_values(critic, chats[part]))
    return torch.cat(found)
