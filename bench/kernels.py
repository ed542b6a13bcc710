"""Every op against the best that PyTorch has for it, in the same run on the same GPU.

A contest is one op at one size with several contenders. They run in turns, so that a throttling GPU
slows all alike. Times are medians with 20 % and 80 % quantiles, in microseconds; the L2 cache is
cleared before each run. If any contender needs less than half a millisecond, all run from CUDA
graphs, 20 runs in a row, because Python would be timed otherwise: it launches a backward in 0.2 to
0.5 ms.

TF/s count the operations of the formula: attention's backward 2.5 times its forward, causal half,
the window and the documents as they are. GB/s count the bytes that must move. Neither counts what
is computed or read twice. "speed" is the contender's time divided by ours. Errors are the largest
deviation from fp32, relative to the largest true number. Memory is the peak on top of the inputs. A
contender that is not installed says so.

    python -m bench.kernels                      minutes on a GPU; bench/results/kernels_DEVICE.json
    python -m bench.kernels --tiny --device=cpu  seconds: the script itself at toy sizes
"""

import json
import math
import re
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.act import swiglu, swiglu_reference
from kernels.attention import attention, attention_reference, batches, layout
from kernels.decode import decode_attention, decode_attention_reference
from kernels.head import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_logprob,
    linear_logprob_reference,
)
from kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.proof import prove
from kernels.rope import qk_norm_rope, qk_norm_rope_reference
from runtime.cli import launch
from runtime.errors import UserError
from runtime.process import describe, setup


@dataclass
class Config:
    # ops whose names begin with one of these, comma-separated: attention,linear
    only: str = ""
    # turns of each contender
    rounds: int = 3
    # toy sizes: times mean nothing
    tiny: bool = False
    # auto, cpu, cuda, cuda:1
    device: str = "auto"
    # folder of the JSON file
    out: str = "bench/results"


OURS = "kernel"


@dataclass
class Contest:
    op: str
    shape: str
    unit: str  # TF/s or GB/s
    work: float  # operations or bytes
    truth: object  # like a contender, in fp32
    contenders: dict  # {name: function() -> function() -> tensors}: prepare, then run; OURS is one of them
    wanted_rate: float = 0  # of ours, in `unit`; 0: any
    wanted_speed: dict = field(default_factory=dict)  # {name: of ours, as a multiple of this contender's}
    wanted_memory: dict = field(default_factory=dict)  # {name: of ours, at most this share of its peak}


# --------------------------------------------------------------------------------------------------
# What a contender runs


def tuple_of(x):
    return x if isinstance(x, tuple) else (x,)


def forward(f, *inputs):
    @torch.no_grad()
    def run():
        return tuple_of(f(*inputs))

    return lambda: run


def upstream_of(outs):
    """Upstream gradients, the same for every contender."""
    generator = torch.Generator(outs[0].device).manual_seed(1)
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outs]


def leaves_of(inputs):
    return [x.detach().requires_grad_() for x in inputs]


def backward(f, *inputs):
    """The backward alone: the forward is over before the clock starts."""

    def prepare():
        leaves = leaves_of(inputs)
        outs = tuple_of(f(*leaves))
        upstream = upstream_of(outs)
        return lambda: torch.autograd.grad(outs, leaves, upstream, retain_graph=True)

    return prepare


def both(f, *inputs):
    """Forward and backward."""

    def prepare():
        leaves = leaves_of(inputs)
        upstream = upstream_of(tuple_of(f(*leaves)))

        def run():
            outs = tuple_of(f(*leaves))
            return tuple(o.detach() for o in outs) + torch.autograd.grad(outs, leaves, upstream)

        return run

    return prepare


def copy(n_bytes, device):
    """copy_ that moves this many bytes: half read, half written."""

    def prepare():
        source = torch.zeros(int(n_bytes) // 4, dtype=torch.bfloat16, device=device)
        out = torch.empty_like(source)
        return lambda: (out.copy_(source),)

    return prepare


def wide(*tensors):
    return [x.float() for x in tensors]


class Maker:
    """Random inputs, and what depends on the device and on --tiny."""

    def __init__(self, device, tiny):
        self.device, self.tiny = device, tiny
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape, std=1.0, dtype=None):
        x = torch.randn(shape, generator=self.generator, device=self.device) * std
        return x.to(dtype or self.dtype)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def compiled(self, f):
        """By inductor; at toy sizes only traced, because inductor takes its time."""
        torch._dynamo.reset()
        return torch.compile(f, backend="eager" if self.tiny else "inductor", dynamic=False)


# --------------------------------------------------------------------------------------------------
# Attention

# (Dh, length): TF/s that are wanted of the forward
WANTED_RATES = {
    (128, 2048): 360,
    (128, 4096): 400,
    (128, 8192): 430,
    (128, 16384): 450,
    (64, 2048): 300,
    (64, 4096): 340,
    (64, 8192): 360,
    (64, 16384): 370,
}


def sdpa(backend, documents, length):
    """PyTorch's attention by the named backend, in the pack's layout."""

    def f(q, k, v):
        q, k, v = (x.unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1)

    return f


def varlen(cu_seqlens, longest, window):
    from torch.nn.attention.varlen import varlen_attn

    def f(q, k, v):
        size = (window or longest) - 1, 0
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=size)

    return f


def flex(make, lengths, window):
    """Compiled FlexAttention; its mask is built again each time, as a new pack requires."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    counts = torch.tensor(lengths, device=make.device)
    document = torch.arange(len(lengths), device=make.device).repeat_interleave(counts)
    N = len(document)

    def seen(b, h, i, j):
        return (i >= j) & (document[i] == document[j]) & (i - j < (window or N))

    def f(q, k, v):
        mask = create_block_mask(seen, None, None, N, N, device=make.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return make.compiled(f)


def boundaries(make, lengths):
    return torch.tensor([0, *lengths], device=make.device).cumsum(0).to(torch.int32)


def attention_pairs(lengths, window=0):
    """How many (query, key) pairs a causal pass looks at: half of each square, as everyone counts,
    a window as a band."""
    pairs = 0
    for n in lengths:
        pairs += n * n / 2 if not window or n <= window else window * window / 2 + (n - window) * window
    return pairs


def attention_contests(make):
    """Documents of one length. The table of tiles is made once, as for all layers of a forward."""
    tokens, width = (64, 64) if make.tiny else (16384, 2048)
    shapes = [(32, 32, 2)] if make.tiny else [*((*key, 1) for key in WANTED_RATES), (128, 4096, 4), (64, 1024, 1)]
    for dh, length, group in shapes:
        heads, documents = width // dh, tokens // length
        q = make.normal(tokens, heads, dh)
        k, v = make.normal(tokens, heads // group, dh), make.normal(tokens, heads // group, dh)
        cu_seqlens = boundaries(make, [length] * documents)
        ours = partial(attention, layout=layout(cu_seqlens, q, dh))
        reference = partial(attention_reference, layout=batches(cu_seqlens))
        others = {
            "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, documents, length),
            "FLASH": sdpa(SDPBackend.FLASH_ATTENTION, documents, length),
        }
        flops = 4 * attention_pairs([length] * documents) * heads * dh
        shape = f"{documents}x{length} H{heads} K{heads // group} Dh{dh}"
        for way in ("forward", "backward"):
            is_forward = way == "forward"
            rate = WANTED_RATES.get((dh, length)) if group == 1 else None
            if not is_forward and (dh, length) in WANTED_RATES and length < 4096:
                continue
            part = forward if is_forward else backward
            contenders = {name: part(f, q, k, v) for name, f in [(OURS, ours), *others.items()]}
            work, truth = flops if is_forward else 2.5 * flops, part(reference, *wide(q, k, v))
            contest = Contest(f"attention {way}", shape, "TF/s", work, truth, contenders)
            if rate:
                contest.wanted_rate = rate if is_forward else {128: 300, 64: 250}[dh]
                contest.wanted_speed = wanted_speed(dh, is_forward)
                if length < 4096:
                    del contest.wanted_speed["cuDNN"]
            yield contest


def wanted_speed(dh, is_forward):
    if not is_forward:
        return {"cuDNN": 0.6, "FLASH": 1.0}
    return {"cuDNN": 0.7, "FLASH": 1.2} if dh == 128 else {"cuDNN": 0.9, "FLASH": 1.15}


def packed_contests(make):
    """Documents of log-normal length, about 700 tokens in the mean, as in a web corpus; and a
    window of 512 over long ones. What a new pack requires is timed: our table of tiles, Flex's
    mask."""
    tokens, shrink = (64, 20) if make.tiny else (32768, 1)
    generator, ragged = torch.Generator().manual_seed(0), []
    while sum(ragged) < tokens:
        length = torch.empty(1).log_normal_(math.log(400), 1.05, generator=generator).clamp(16, 8192)
        ragged.append(min(int(length) // shrink + 1, tokens - sum(ragged)))
    cases = [("packed", ragged, 0), ("window", [tokens // 4] * 4, 8 if make.tiny else 512)]
    sizes = [(32, 2)] if make.tiny else [(128, 16), (64, 12)]
    for name, lengths, window, dh, heads in ((*case, *size) for case in cases for size in sizes):
        yield packed_contest(make, name, lengths, window, dh, heads)


def packed_contest(make, name, lengths, window, dh, heads):
    tokens = sum(lengths)
    q, k, v = (make.normal(tokens, heads, dh) for _ in range(3))
    cu_seqlens, longest = boundaries(make, lengths), max(lengths)

    def ours(q, k, v):
        return attention(q, k, v, layout(cu_seqlens, q, dh), window)

    def reference(q, k, v):
        return attention_reference(q, k, v, batches(cu_seqlens), window)

    contenders = {  # the others are imported when they are prepared: they may be missing
        OURS: both(ours, q, k, v),
        "varlen_attn": lambda: both(varlen(cu_seqlens, longest, window), q, k, v)(),
        "flex": lambda: both(flex(make, lengths, window), q, k, v)(),
    }
    shape = f"{len(lengths)} documents, {tokens} tokens H{heads} Dh{dh}"
    flops = 3.5 * 4 * attention_pairs(lengths, window) * heads * dh
    contest = Contest(f"attention {name}", shape, "TF/s", flops, both(reference, *wide(q, k, v)), contenders)
    contest.wanted_speed = {"varlen_attn": 1.3, "flex": 1.3}
    return contest


def decode_contests(make):
    """Full slots, slots of random lengths, and these with a window."""
    sizes = [(3, 40, 2, 32)] if make.tiny else [(64, 1024, 8, 128), (128, 1024, 8, 64), (8, 512, 4, 128)]
    for B, S, K, dh in sizes:
        for group in (2,) if make.tiny else (1, 4, 8):
            for kind in ("full", "ragged", "window"):
                yield decode_contest(make, kind, B, S, K, dh, group)


def decode_contest(make, kind, B, S, K, dh, group):
    q, k, v = make.normal(B, K * group, dh), make.normal(B, S, K, dh), make.normal(B, S, K, dh)
    lengths = torch.full((B,), S, device=make.device) if kind == "full" else 1 + make.integers(S, B)
    window = S // 4 if kind == "window" else 0
    key = torch.arange(S, device=make.device)
    seen = (key < lengths[:, None]) & (key >= lengths[:, None] - (window or S))
    mask = seen[:, None, None]  # [B, 1, 1, S]: the whole cache, as a fixed graph requires
    n_bytes = 4 * K * dh * int(seen.sum())

    def masked(q, k, v):
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=group > 1)[:, :, 0]

    contenders = {
        OURS: forward(decode_attention, q, k, v, lengths, window),
        "copy_": copy(n_bytes, make.device),
        "SDPA, mask": forward(masked, q, k, v),
    }
    shape, truth = f"{kind} B{B} S{S} K{K} G{group} Dh{dh}", wide(q, k, v)
    truth = forward(decode_attention_reference, *truth, lengths, window)
    contest = Contest("decode_attention", shape, "GB/s", n_bytes, truth, contenders)
    contest.wanted_speed = {"copy_": 0.8 if n_bytes >= 64e6 else 0.6}
    if kind != "full":
        contest.wanted_speed["SDPA, mask"] = 1.5
    return contest


# --------------------------------------------------------------------------------------------------
# The head


def plain_cross_entropy(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets, reduction="sum")


def plain_logprob(hidden, weight, targets, entropy):
    logp = torch.log_softmax((hidden @ weight.to(hidden.dtype).T).float(), -1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    return (chosen, -(logp.exp() * logp).sum(-1)) if entropy else chosen


def products(hidden, weight, n):
    """The first n of the three matrix products that every head needs, on bf16 weights: logits,
    d_hidden, d_weight."""

    def prepare():
        w = weight.to(hidden.dtype)
        logits = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)

        def run():
            outs = [torch.mm(hidden, w.T, out=logits)]
            if n == 3:
                outs += [torch.mm(logits, w), torch.mm(logits.T, hidden)]
            return tuple(outs)

        return run

    return prepare


def liger(targets):
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    def f(hidden, weight):
        args = hidden, weight.to(hidden.dtype), targets, None, None, -100, 0.0, 0.0, "sum"
        return LigerFusedLinearCrossEntropyFunction.apply(*args)[0]

    return f


def head_contests(make):
    n = 7 if make.tiny else 32768
    for V, C in [(61, 16)] if make.tiny else [(50304, 768), (65536, 1024), (131072, 2048)]:
        hidden, targets = make.normal(n, C), make.integers(V, n)
        weight = make.normal(V, C, std=C**-0.5, dtype=torch.float32)
        yield cross_entropy_contest(make, hidden, weight, targets)
        for entropy in (False, True):
            yield from logprob_contests(make, hidden, weight, targets, entropy)


def cross_entropy_contest(make, hidden, weight, targets):
    (n, C), V = hidden.shape, len(weight)
    contenders = {
        OURS: both(partial(linear_cross_entropy, targets=targets), hidden, weight),
        "3 products": products(hidden, weight, 3),
        "compiled": both(make.compiled(partial(plain_cross_entropy, targets=targets)), hidden, weight),
        "Liger": lambda: both(liger(targets), hidden, weight)(),
    }
    reference = partial(linear_cross_entropy_reference, targets=targets, chunk_mb=1024)
    truth, shape = both(reference, *wide(hidden, weight)), f"N{n} V{V} C{C}"
    contest = Contest("linear_cross_entropy", shape, "TF/s", 3 * 2 * n * V * C, truth, contenders)
    contest.wanted_speed = {"3 products": 1 / 1.25, "compiled": 1 / 1.05, "Liger": 1 / 0.6}
    contest.wanted_memory = {"compiled": 0.25}
    return contest


def logprob_contests(make, hidden, weight, targets, entropy):
    (n, C), V = hidden.shape, len(weight)
    ours = partial(linear_logprob, targets=targets, entropy=entropy)
    reference = partial(linear_logprob_reference, targets=targets, entropy=entropy, chunk_mb=1024)
    plain = make.compiled(partial(plain_logprob, targets=targets, entropy=entropy))
    name, shape = "linear_logprob" + ("+entropy" if entropy else ""), f"N{n} V{V} C{C}"
    for way, part, count, share in [("forward", forward, 1, 0.75), ("both", both, 3, 1 / 1.75)]:
        needed = f"{count} product{'s' if count > 1 else ''}"
        contenders = {
            OURS: part(ours, hidden, weight),
            needed: products(hidden, weight, count),
            "compiled": part(plain, hidden, weight),
        }
        truth, work = part(reference, *wide(hidden, weight)), count * 2 * n * V * C
        contest = Contest(f"{name} {way}", shape, "TF/s", work, truth, contenders)
        contest.wanted_speed = {needed: share}
        yield contest


# --------------------------------------------------------------------------------------------------
# What memory bounds: norm, rope, act


def plain_rms_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def plain_add_rms_norm(x, delta, weight):
    total = x + delta
    return total, plain_rms_norm(total, weight)


def plain_rope(qkv, q_weight, k_weight, cos, sin, heads):
    kv_heads = (qkv.shape[1] - heads) // 2
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x, weight):
        a, b = plain_rms_norm(x.float(), weight).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    return torch.cat([rotate(q, q_weight), rotate(k, k_weight), v], dim=1)


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def memory_bound(make, op, shape, ours, plain, reference, inputs, passes, shares):
    """The forward and backward contests of an op that must move passes = (bytes forward, bytes
    backward), which should reach `shares` of a copy's speed."""
    plain = make.compiled(plain)
    for i, (way, part) in enumerate([("forward", forward), ("backward", backward)]):
        contenders = {
            OURS: part(ours, *inputs),
            "copy_": copy(passes[i], make.device),
            "compiled": part(plain, *inputs),
        }
        truth = part(reference, *wide(*inputs))
        contest = Contest(f"{op} {way}", shape, "GB/s", passes[i], truth, contenders)
        contest.wanted_speed = {"copy_": shares[i], "compiled": 1.0}
        yield contest


def norm_contests(make):
    n, eps = 40 if make.tiny else 32768, {"eps": 1e-6}
    for C in (32,) if make.tiny else (768, 1024, 2048, 4096):
        x, delta = make.normal(n, C), make.normal(n, C)
        weight = 1 + make.normal(C, std=0.1, dtype=torch.float32)
        shape, size = f"{n}x{C}", x.nbytes
        ours, reference = partial(rms_norm, **eps), partial(rms_norm_reference, **eps)
        passes, shares = (2 * size, 3 * size), (0.9, 0.85)
        inputs = [x, weight]
        yield from memory_bound(make, "rms_norm", shape, ours, plain_rms_norm, reference, inputs, passes, shares)
        ours, reference = partial(add_rms_norm, **eps), partial(add_rms_norm_reference, **eps)
        passes, plain = (4 * size, 4 * size), plain_add_rms_norm
        inputs = [x, delta, weight]
        yield from memory_bound(make, "add_rms_norm", shape, ours, plain, reference, inputs, passes, shares)


def rope_contests(make):
    n = 40 if make.tiny else 32768
    for heads, kv_heads, dh in [(4, 2, 16)] if make.tiny else [(12, 12, 64), (16, 8, 128)]:
        rows = heads + 2 * kv_heads
        qkv, weight = make.normal(n, rows, dh), 1 + make.normal(dh, std=0.1, dtype=torch.float32)
        angle = make.normal(n, dh // 2, std=10, dtype=torch.float32)
        rest = {"cos": angle.cos(), "sin": angle.sin(), "heads": heads}
        ours, reference = (partial(f, **rest, eps=1e-6) for f in (qk_norm_rope, qk_norm_rope_reference))
        size, tables = qkv.nbytes, 4 * n * dh
        passes = 2 * size + tables, 2 * size + size * (heads + kv_heads) // rows + tables
        shape, inputs = f"{n} tokens H{heads} K{kv_heads} Dh{dh}", [qkv, weight, weight.clone()]
        plain, shares = partial(plain_rope, **rest), (0.85, 0.8)
        yield from memory_bound(make, "qk_norm_rope", shape, ours, plain, reference, inputs, passes, shares)


def act_contests(make):
    n = 40 if make.tiny else 32768
    for width in (24,) if make.tiny else (2048, 5376):
        gate_up = make.normal(n, 2 * width)
        size, ops = gate_up.nbytes // 2, (swiglu, plain_swiglu, swiglu_reference)
        passes, shares = (3 * size, 5 * size), (0.9, 0.9)
        yield from memory_bound(make, "swiglu", f"{n}x{width}", *ops, [gate_up], passes, shares)


CONTESTS = [
    attention_contests,
    packed_contests,
    decode_contests,
    head_contests,
    rope_contests,
    act_contests,
    norm_contests,
]


# --------------------------------------------------------------------------------------------------
# The clock


def times_of(run, device, milliseconds, graph):
    """Microseconds of single runs."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return [1e6 * (time.perf_counter() - begin)]
    from triton.testing import do_bench

    if not graph:
        times = do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode="all")
        return [1e3 * t for t in times]
    recorded, found, repeats = torch.cuda.CUDAGraph(), [], 20
    # On the stream of the forward: autograd runs the backward on the same one.
    with torch.cuda.graph(recorded, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            run()
    for _ in range(max(5, milliseconds)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        recorded.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / repeats)
    return found


def peak_of(run, device):
    """(MiB at the peak of a run on top of what was there before, what it returned)."""
    if device.type == "cpu":
        return None, run()
    run()  # compiles, and may measure on the way
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, out


def error_of(found, truth):
    errors = []
    for f, t in zip(found, truth, strict=True):
        errors.append((f.double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-30))
    return max(errors).item()


def first_line(e):
    """An exception in a line of the table."""
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:150]}"


def quantile(times, share):
    return sorted(times)[int(share * (len(times) - 1))]


def hold(contest, device, rounds):
    """Runs a contest. Returns its rows, ours first.

    [{op, shape, contender, us, rate, speed, error, mib, wanted, reached}]
    """
    rows, runs = {}, {}
    try:
        truth = contest.truth()()
    except torch.cuda.OutOfMemoryError:  # fp32 needs more memory; then no error is known
        truth = None
    for name, prepare in contest.contenders.items():
        rows[name] = {"op": contest.op, "shape": contest.shape, "contender": name, "unit": contest.unit}
        try:
            run = prepare()
            mib, found = peak_of(run, device)
        except Exception as e:  # one that is missing or refuses must not end the others' contest
            rows[name]["absent"] = first_line(e)
            continue
        has_error = truth is not None and name != "copy_" and "product" not in name
        rows[name] |= {"mib": mib, "error": error_of(found, truth) if has_error else None}
        runs[name] = run
        del found
    del truth
    graph = False
    if device.type == "cuda":
        graph = min(statistics.median(times_of(run, device, 10, False)) for run in runs.values()) < 500
    times = {name: [] for name in runs}
    for name in [*runs] * rounds:
        if "absent" in rows[name]:
            continue
        try:
            times[name] += times_of(runs[name], device, 100 // rounds, graph)
        except Exception as e:  # one that cannot be captured must not end the bench
            rows[name]["absent"] = first_line(e)
    for name in [name for name in runs if "absent" not in rows[name]]:
        us20, us, us80 = (quantile(times[name], share) for share in (0.2, 0.5, 0.8))
        rate = contest.work / us / (1e6 if contest.unit == "TF/s" else 1e3)
        rows[name] |= {"us": us, "us20": us20, "us80": us80, "graph": graph, "rate": rate}
    judge(contest, rows)
    return list(rows.values())


def judge(contest, rows):
    """Adds to each row what is wanted of ours against it, and whether that is reached.

    reached is None if nothing is wanted or the contender is absent.
    """
    ours = rows[OURS]
    for name, row in rows.items():
        wanted, reached = [], []
        if "us" in row and "us" in ours:
            row["speed"] = row["us"] / ours["us"]
        rate = contest.wanted_rate if name == OURS else 0
        speed, memory = contest.wanted_speed.get(name), contest.wanted_memory.get(name)
        if rate:
            wanted.append(f">= {rate} {contest.unit}")
            reached.append("rate" in row and row["rate"] >= rate)
        if speed:
            wanted.append(f">= {speed:.2f}x")
            reached.append(row["speed"] >= speed if "speed" in row else None)
        if memory and row.get("mib") and ours.get("mib") is not None:
            wanted.append(f"<= {memory:.2f} memory")
            reached.append(ours["mib"] <= memory * row["mib"])
        row["wanted"] = ", ".join(wanted)
        row["reached"] = None if None in reached or not reached else True
        if False in reached:
            row["reached"] = False
    if "absent" in ours:
        ours["reached"] = False


# --------------------------------------------------------------------------------------------------
# The report

HEADER = f"{'op':<30} {'shape':<40} {'contender':<12} {'us, median [20 %, 80 %]':<32} {'rate':>12} {'speed':>8} "
HEADER += f"{'MiB':>8} {'error':>8}  {'wanted of ours':<26} reached"


def show(row):
    """A row of the table, as text."""
    who = f"{row['op']:<30} {row['shape']:<40} {row['contender']:<12}"
    if "absent" in row:
        return f"{who} {row['absent']}"
    size = "" if row["mib"] is None else f"{row['mib']:.0f}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    verdict = {True: "yes", False: "NO", None: ""}[row["reached"]]
    speed = f"{row['speed']:.2f}x" if "speed" in row and row["contender"] != OURS else ""
    times = f"{row['us']:9.1f} [{row['us20']:.1f}, {row['us80']:.1f}]"
    rate = f"{row['rate']:7.1f} {row['unit']}"
    return f"{who} {times:<32} {rate} {speed:>8} {size:>8} {error:>8}  {row['wanted']:<26} {verdict}"


def clock_now():
    """The GPU's clock and temperature, in nvidia-smi's words; "" without it."""
    query = "--query-gpu=clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        return done.stdout.strip()
    except OSError:
        return ""


def machine(device):
    """What a figure holds for: hardware, versions, commit."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {**describe(device), "triton": version, "cuda": torch.version.cuda, "commit": commit or "unknown"}


def result_file(folder, what, device):
    """bench/results/WHAT_DEVICE.json"""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / f"{what}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"


def main(config):
    device = setup(config.device, 0)
    torch.use_deterministic_algorithms(False)  # the others at their best; ours are deterministic anyway
    if device.type == "cpu" and not config.tiny:
        raise UserError("these sizes need a CUDA GPU; --tiny runs toy sizes on the CPU")
    off = prove(device)
    path, rows, clocks = result_file(config.out, "kernels", device), [], []
    print(json.dumps(machine(device) | {"switched off": off}))
    print(HEADER, flush=True)
    make = Maker(device, config.tiny)
    # A graph cannot be captured on the default stream.
    with torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):
        for contest in (contest for contests in CONTESTS for contest in contests(make)):
            if not contest.op.startswith(tuple(config.only.split(","))):
                continue
            if config.tiny:
                contest.wanted_rate, contest.wanted_speed, contest.wanted_memory = 0, {}, {}
            new = hold(contest, device, config.rounds)
            rows, clocks = rows + new, clocks + [clock_now()]
            print("\n".join(map(show, new)), flush=True)
            # Written each time: a timeout keeps what there is.
            result = {**machine(device), "off": off, "clocks": clocks, "rows": rows}
            path.write_text(json.dumps(result, indent=1) + "\n")
    judged = [row["reached"] for row in rows if row["reached"] is not None]
    print(f"{sum(judged)} of {len(judged)} reached; {path}")
    if config.only and not rows:
        raise UserError(f"--only={config.only}: no op's name begins with it")


if __name__ == "__main__":
    launch(main, Config)
