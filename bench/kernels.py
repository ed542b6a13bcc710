"""Every op against the best that PyTorch has for it, in the same run on the same GPU.

A contest is one op at one size with several contenders, which run in turns, so that a throttling GPU slows all alike. Times are medians, 20 % and 80 %
quantiles in microseconds, the L2 cache cleared before each run; where anyone needs less than 50 us all run from CUDA graphs, 20 runs on end, for Python
would be what is timed. TF/s count the operations of the formula (attention's backward 2.5 times its forward, causal half, the window and the documents as they are),
GB/s the bytes that must move: neither what is recomputed nor what is read twice. "speed" is the contender's time divided by ours. Errors are the largest
deviation from fp32, relative to the largest true number. Memory is the peak on top of the inputs. A contender that is not installed says so.

    python -m bench.kernels                      minutes on a GPU; bench/results/kernels_DEVICE.json
    python -m bench.kernels --tiny --device=cpu  seconds: the script itself, at toy sizes, times mean nothing
"""
import json, math, re, statistics, subprocess, time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import UserError, describe, launch, setup
from kernels._lib import prove
from kernels.act import swiglu, swiglu_reference
from kernels.attention import attention, attention_reference, batches, layout
from kernels.decode import decode_attention, decode_attention_reference
from kernels.head import linear_cross_entropy, linear_cross_entropy_reference, linear_logprob, linear_logprob_reference
from kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import qk_norm_rope, qk_norm_rope_reference


@dataclass
class Config:
    # ops whose name begins with this: attention, linear, rms_norm, ...
    only: str = ""
    # turns each contender has
    rounds: int = 3
    # toy sizes
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
    contenders: dict  # {name: function() -> function() -> tensors}: prepare, then run; OURS among them
    rate: float = 0  # asked of ours, in `unit`; 0: nothing
    speed: dict = field(default_factory=dict)  # {name: asked of ours, as a multiple of this contender's speed}
    memory: dict = field(default_factory=dict)  # {name: asked of ours, at most this share of its peak}


# ---------------------------------------------------------------------------------------------------------------------------------
# What a contender runs


def tuple_of(x):
    return x if isinstance(x, tuple) else (x,)


def forward(f, *inputs):
    @torch.no_grad()
    def run():
        return tuple_of(f(*inputs))

    return lambda: run


def upstream_of(outs):
    """Gradients to come from above, the same for every contender."""
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
        return (torch.randn(shape, generator=self.generator, device=self.device) * std).to(dtype or self.dtype)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def compiled(self, f):
        """By inductor; at toy sizes only traced, for inductor takes its time."""
        torch._dynamo.reset()
        return torch.compile(f, backend="eager" if self.tiny else "inductor", dynamic=False)


# ---------------------------------------------------------------------------------------------------------------------------------
# Attention


def sdpa(backend, documents, length):
    """PyTorch's attention by the named backend, in the pack's layout."""

    def f(q, k, v):
        q, k, v = (x.unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2).flatten(0, 1)

    return f


def varlen(cu, longest, window):
    from torch.nn.attention.varlen import varlen_attn

    def f(q, k, v):
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=((window or longest) - 1, 0))

    return f


def flex(make, lengths, window):
    """Compiled FlexAttention; its mask is built anew each time, as a new pack asks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.arange(len(lengths), device=make.device).repeat_interleave(torch.tensor(lengths, device=make.device))

    def seen(b, h, i, j):
        return (i >= j) & (document[i] == document[j]) & (i - j < (window or len(document)))

    def f(q, k, v):
        mask = create_block_mask(seen, None, None, len(document), len(document), device=make.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return make.compiled(f)


def boundaries(make, lengths):
    return torch.tensor([0, *lengths], device=make.device).cumsum(0).to(torch.int32)


def attention_pairs(lengths, window=0):
    """How many (query, key) pairs a causal pass looks at; half of each square, as everyone counts, a window as a band."""
    return sum(n * n / 2 if not window or n <= window else window * window / 2 + (n - window) * window for n in lengths)


def attention_contests(make):
    tokens, width = (64, 64) if make.tiny else (16384, 2048)
    asked = {  # (Dh, length): TF/s
        (128, 2048): 360, (128, 4096): 400, (128, 8192): 430, (128, 16384): 450, (64, 2048): 300, (64, 4096): 340, (64, 8192): 360, (64, 16384): 370,
    }
    for dh, length, group in [(32, 32, 2)] if make.tiny else [*((*key, 1) for key in asked), (128, 4096, 4), (64, 1024, 1)]:
        heads, documents = width // dh, tokens // length
        q, k, v = make.normal(tokens, heads, dh), make.normal(tokens, heads // group, dh), make.normal(tokens, heads // group, dh)
        cu = boundaries(make, [length] * documents)
        tiles, groups = layout(cu, q, dh), batches(cu)  # once a forward pass, for every layer
        ours, reference = (lambda q, k, v: attention(q, k, v, tiles)), (lambda q, k, v: attention_reference(q, k, v, groups))
        named = {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, documents, length), "FLASH": sdpa(SDPBackend.FLASH_ATTENTION, documents, length)}
        flops = 4 * attention_pairs([length] * documents) * heads * dh
        shape = f"{documents}x{length} H{heads} K{heads // group} Dh{dh}"
        speeds = ({"cuDNN": 0.7, "FLASH": 1.2} if dh == 128 else {"cuDNN": 0.9, "FLASH": 1.15}), {"cuDNN": 0.6, "FLASH": 1.0}
        for way, part, scale in [("forward", forward, 1), ("backward", backward, 2.5)]:
            if way == "backward" and (dh, length) in asked and length < 4096:
                continue
            contenders = {OURS: part(ours, q, k, v)} | {name: part(f, q, k, v) for name, f in named.items()}
            contest = Contest(f"attention {way}", shape, "TF/s", scale * flops, part(reference, *wide(q, k, v)), contenders)
            if group == 1 and (dh, length) in asked:
                contest.rate = asked[dh, length] if way == "forward" else {128: 300, 64: 250}[dh]
                contest.speed = speeds[way == "backward"] if length >= 4096 else {"FLASH": speeds[way == "backward"]["FLASH"]}
            yield contest


def packed_contests(make):
    """Documents of log-normal length, some 700 tokens in the mean, as a web corpus has them; and a window of 512 over long ones. Everything is timed that
    a new pack asks for: our table of tiles, Flex's mask."""
    tokens = 64 if make.tiny else 32768
    generator, ragged = torch.Generator().manual_seed(0), []
    while sum(ragged) < tokens:
        length = int(torch.empty(1).log_normal_(math.log(400), 1.05, generator=generator).clamp(16, 8192)) // (20 if make.tiny else 1) + 1
        ragged.append(min(length, tokens - sum(ragged)))
    for name, lengths, window in [("packed", ragged, 0), ("window", [tokens // 4] * 4, 8 if make.tiny else 512)]:
        for dh, heads in [(32, 2)] if make.tiny else [(128, 16), (64, 12)]:
            q, k, v = (make.normal(tokens, heads, dh) for _ in range(3))
            cu, longest = boundaries(make, lengths), max(lengths)

            def ours(q, k, v):
                return attention(q, k, v, layout(cu, q, dh), window)

            def reference(q, k, v):
                return attention_reference(q, k, v, batches(cu), window)

            shape = f"{len(lengths)} documents, {tokens} tokens H{heads} Dh{dh}"
            flops = 3.5 * 4 * attention_pairs(lengths, window) * heads * dh
            others = {"varlen_attn": lambda: both(varlen(cu, longest, window), q, k, v)(), "flex": lambda: both(flex(make, lengths, window), q, k, v)()}
            contenders = {OURS: both(ours, q, k, v), **others}
            yield Contest(f"attention {name}", shape, "TF/s", flops, both(reference, *wide(q, k, v)), contenders, speed={"varlen_attn": 1.3, "flex": 1.3})


def decode_contests(make):
    sizes = [(3, 40, 2, 16)] if make.tiny else [(64, 1024, 8, 128), (128, 1024, 8, 64), (8, 512, 4, 128)]
    for B, S, K, dh in sizes:
        for group in (2,) if make.tiny else (1, 4, 8):
            for kind in ("full", "ragged"):
                q, k, v = make.normal(B, K * group, dh), make.normal(B, S, K, dh), make.normal(B, S, K, dh)
                lengths = torch.full((B,), S, device=make.device) if kind == "full" else 1 + make.integers(S, B)
                seen = (torch.arange(S, device=make.device) < lengths[:, None])[:, None, None]  # [B, 1, 1, S]: the whole cache, as a fixed graph must
                n_bytes = 4 * K * dh * int(lengths.sum())

                def masked(q, k, v):
                    return F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, enable_gqa=group > 1)[:, :, 0]

                contenders = {OURS: forward(decode_attention, q, k, v, lengths), "copy_": copy(n_bytes, make.device), "SDPA, mask": forward(masked, q, k, v)}
                speed = {"copy_": 0.8 if n_bytes >= 64e6 else 0.6} | ({"SDPA, mask": 1.5} if kind == "ragged" else {})
                truth = forward(decode_attention_reference, *wide(q, k, v), lengths)
                yield Contest("decode_attention", f"{kind} B{B} S{S} K{K} G{group} Dh{dh}", "GB/s", n_bytes, truth, contenders, speed=speed)


# ---------------------------------------------------------------------------------------------------------------------------------
# The head


def plain_cross_entropy(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets, reduction="sum")


def plain_logprob(hidden, weight, targets, entropy):
    logp = torch.log_softmax((hidden @ weight.to(hidden.dtype).T).float(), -1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    return (chosen, -(logp.exp() * logp).sum(-1)) if entropy else chosen


def products(hidden, weight, n):
    """The first n of the three matrix products that no head can do without, on bf16 weights: logits, d_hidden, d_weight."""

    def prepare():
        w, logits = weight.to(hidden.dtype), torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
        runs = [lambda: torch.mm(hidden, w.T, out=logits), lambda: torch.mm(logits, w), lambda: torch.mm(logits.T, hidden)]
        return lambda: tuple(run() for run in runs[:n])

    return prepare


def liger(targets):
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    def f(hidden, weight):
        return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight.to(hidden.dtype), targets, None, None, -100, 0.0, 0.0, "sum")[0]

    return f


def head_contests(make):
    n = 7 if make.tiny else 32768
    for V, C in [(61, 16)] if make.tiny else [(50304, 768), (65536, 1024), (131072, 2048)]:
        hidden, weight, targets = make.normal(n, C), make.normal(V, C, std=C**-0.5, dtype=torch.float32), make.integers(V, n)
        shape, gemm = f"N{n} V{V} C{C}", 2 * n * V * C
        plain = make.compiled(lambda h, w: plain_cross_entropy(h, w, targets))
        contenders = {
            OURS: both(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight),
            "3 products": products(hidden, weight, 3),
            "compiled": both(plain, hidden, weight),
            "Liger": lambda: both(liger(targets), hidden, weight)(),
        }
        truth = both(lambda h, w: linear_cross_entropy_reference(h, w, targets, 1024), *wide(hidden, weight))
        speed = {"3 products": 1 / 1.25, "compiled": 1 / 1.05, "Liger": 1 / 0.6}
        yield Contest("linear_cross_entropy", shape, "TF/s", 3 * gemm, truth, contenders, speed=speed, memory={"compiled": 0.25})
        for entropy in (False, True):
            ours = lambda h, w: linear_logprob(h, w, targets, entropy=entropy)  # noqa: E731
            reference = lambda h, w: linear_logprob_reference(h, w, targets, entropy=entropy, chunk_mb=1024)  # noqa: E731
            name = "linear_logprob" + ("+entropy" if entropy else "")
            plain = make.compiled(lambda h, w: plain_logprob(h, w, targets, entropy))
            contenders = {OURS: forward(ours, hidden, weight), "1 product": products(hidden, weight, 1), "compiled": forward(plain, hidden, weight)}
            yield Contest(f"{name} forward", shape, "TF/s", gemm, forward(reference, *wide(hidden, weight)), contenders, speed={"1 product": 0.75})
            contenders = {OURS: both(ours, hidden, weight), "3 products": products(hidden, weight, 3), "compiled": both(plain, hidden, weight)}
            yield Contest(f"{name} both", shape, "TF/s", 3 * gemm, both(reference, *wide(hidden, weight)), contenders, speed={"3 products": 1 / 1.75})


# ---------------------------------------------------------------------------------------------------------------------------------
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

    def turn(x, weight):
        a, b = plain_rms_norm(x.float(), weight).chunk(2, dim=-1)
        return torch.cat([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1).to(x.dtype)

    return torch.cat([turn(q, q_weight), turn(k, k_weight), v], dim=1)


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def memory_bound(make, op, shape, ours, plain, reference, inputs, passes, asked):
    """Forward and backward contests of an op that must move passes = (bytes forward, bytes backward), `asked` of a copy's speed."""
    plain = make.compiled(plain)
    for way, part, n_bytes, share in zip(("forward", "backward"), (forward, backward), passes, asked):
        contenders = {OURS: part(ours, *inputs), "copy_": copy(n_bytes, make.device), "compiled": part(plain, *inputs)}
        yield Contest(f"{op} {way}", shape, "GB/s", n_bytes, part(reference, *wide(*inputs)), contenders, speed={"copy_": share, "compiled": 1.0})


def norm_contests(make):
    n = 40 if make.tiny else 32768
    for C in (32,) if make.tiny else (768, 1024, 2048, 4096):
        x, delta, weight = make.normal(n, C), make.normal(n, C), 1 + make.normal(C, std=0.1, dtype=torch.float32)
        size = x.element_size() * x.numel()
        ours, reference = (lambda x, w, f=f: f(x, w, 1e-6) for f in (rms_norm, rms_norm_reference))
        yield from memory_bound(make, "rms_norm", f"{n}x{C}", ours, plain_rms_norm, reference, [x, weight], (2 * size, 3 * size), (0.9, 0.85))
        ours, reference = (lambda x, d, w, f=f: f(x, d, w, 1e-6) for f in (add_rms_norm, add_rms_norm_reference))
        yield from memory_bound(make, "add_rms_norm", f"{n}x{C}", ours, plain_add_rms_norm, reference, [x, delta, weight], (4 * size, 4 * size), (0.9, 0.85))


def rope_contests(make):
    n = 40 if make.tiny else 32768
    for heads, kv_heads, dh in [(4, 2, 16)] if make.tiny else [(12, 12, 64), (16, 8, 128)]:
        rows = heads + 2 * kv_heads
        qkv, weight = make.normal(n, rows, dh), 1 + make.normal(dh, std=0.1, dtype=torch.float32)
        angle = make.normal(n, dh // 2, std=10, dtype=torch.float32)
        cos, sin = angle.cos(), angle.sin()
        ours, reference = (lambda x, q, k, f=f: f(x, q, k, cos, sin, heads, 1e-6) for f in (qk_norm_rope, qk_norm_rope_reference))
        size, tables = qkv.element_size() * qkv.numel(), 4 * n * dh
        passes = 2 * size + tables, 2 * size + size * (heads + kv_heads) // rows + tables
        plain = lambda x, q, k: plain_rope(x, q, k, cos, sin, heads)  # noqa: E731
        yield from memory_bound(make, "qk_norm_rope", f"{n} tokens H{heads} K{kv_heads} Dh{dh}", ours, plain, reference, [qkv, weight, weight.clone()], passes, (0.85, 0.8))


def act_contests(make):
    n = 40 if make.tiny else 32768
    for width in (24,) if make.tiny else (2048, 5376):
        gate_up = make.normal(n, 2 * width)
        size = gate_up.element_size() * n * width
        yield from memory_bound(make, "swiglu", f"{n}x{width}", swiglu, plain_swiglu, swiglu_reference, [gate_up], (3 * size, 5 * size), (0.9, 0.9))


CONTESTS = [attention_contests, packed_contests, decode_contests, head_contests, rope_contests, act_contests, norm_contests]


# ---------------------------------------------------------------------------------------------------------------------------------
# The clock


def times_of(run, device, milliseconds, graph):
    """Microseconds of single runs."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return [1e6 * (time.perf_counter() - begin)]
    from triton.testing import do_bench

    if not graph:
        return [1e3 * t for t in do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode="all")]
    recorded, found, repeats = torch.cuda.CUDAGraph(), [], 20
    with torch.cuda.graph(recorded, stream=torch.cuda.current_stream()):  # this stream, on which autograd ran the forward: it runs the backward on the same
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
    return max(((f.double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-30)).item() for f, t in zip(found, truth))


def hold(contest, device, rounds):
    """Run a contest -> its rows, ours first: [{op, shape, contender, us, rate, speed, error, mib, asked, reached}]."""
    rows, runs = {}, {}
    try:
        truth = contest.truth()()
    except torch.cuda.OutOfMemoryError:  # fp32 needs more of it; then nobody's error is known
        truth = None
    for name, prepare in contest.contenders.items():
        row = {"op": contest.op, "shape": contest.shape, "contender": name, "unit": contest.unit}
        try:
            run = prepare()
            mib, found = peak_of(run, device)
        except Exception as e:  # one that is not installed, or refuses the size or the device, must not end the others' contest
            rows[name] = row | {"absent": f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:150]}"}
            continue
        error = error_of(found, truth) if truth is not None and name != "copy_" and "product" not in name else None
        runs[name], rows[name] = run, row | {"mib": mib, "error": error}
        del found
    del truth
    graph = device.type == "cuda" and min(statistics.median(times_of(run, device, 10, False)) for run in runs.values()) < 50
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name] += times_of(run, device, 100 // rounds, graph)
    for name in runs:
        low, middle, high = (sorted(times[name])[int(q * (len(times[name]) - 1))] for q in (0.2, 0.5, 0.8))
        rows[name] |= {"us": middle, "us20": low, "us80": high, "graph": graph, "rate": contest.work / middle / (1e6 if contest.unit == "TF/s" else 1e3)}
    judge(contest, rows)
    return list(rows.values())


def judge(contest, rows):
    """Add to each row what was asked of ours against it, and whether that was reached (None: nothing was asked, or there is no such contender)."""
    ours = rows[OURS]
    for name, row in rows.items():
        asked, reached = [], []
        if "us" in row and "us" in ours:
            row["speed"] = row["us"] / ours["us"]
        wanted = {"speed": contest.speed.get(name), "rate": contest.rate if name == OURS else 0, "memory": contest.memory.get(name)}
        if wanted["rate"]:
            asked.append(f">= {wanted['rate']} {contest.unit}")
            reached.append("rate" in row and row["rate"] >= wanted["rate"])
        if wanted["speed"]:
            asked.append(f">= {wanted['speed']:.2f}x")
            reached.append(row["speed"] >= wanted["speed"] if "speed" in row else None)
        if wanted["memory"] and row.get("mib") and ours.get("mib") is not None:
            asked.append(f"<= {wanted['memory']:.2f} memory")
            reached.append(ours["mib"] <= wanted["memory"] * row["mib"])
        row["asked"] = ", ".join(asked)
        row["reached"] = False if False in reached else None if not reached or None in reached else True
    if "absent" in ours:
        ours["reached"] = False


# ---------------------------------------------------------------------------------------------------------------------------------
# The report


def shown(row):
    """A row of the table, as text."""
    who = f"{row['op']:<30} {row['shape']:<40} {row['contender']:<12}"
    if "absent" in row:
        return f"{who} {row['absent']}"
    size = "" if row["mib"] is None else f"{row['mib']:.0f}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    verdict = {True: "yes", False: "NO", None: ""}[row["reached"]]
    speed = f"{row['speed']:.2f}x" if "speed" in row and row["contender"] != OURS else ""
    time_ = f"{row['us']:9.1f} [{row['us20']:.1f}, {row['us80']:.1f}]"
    return f"{who} {time_:<32} {row['rate']:7.1f} {row['unit']} {speed:>8} {size:>8} {error:>8}  {row['asked']:<26} {verdict}"


HEADER = f"{'op':<30} {'shape':<40} {'contender':<12} {'us, median [20 %, 80 %]':<32} {'rate':>12} {'speed':>8} {'MiB':>8} {'error':>8}  asked of ours              reached"


def clock_now():
    """The GPU's clock and temperature, in nvidia-smi's words; "" without it."""
    try:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,temperature.gpu,power.draw", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def machine(device):
    """What a figure holds for: hardware, versions, commit."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {**describe(device), "triton": version, "cuda": torch.version.cuda, "commit": commit or "unknown"}


def result_file(folder, what, device):
    """bench/results/WHAT_DEVICE.json"""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / f"{what}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"


def main(config):
    device = setup(config.device, 0)
    torch.use_deterministic_algorithms(False)  # the baselines at their best; ours are deterministic as they are
    if device.type == "cpu" and not config.tiny:
        raise UserError("these sizes need a CUDA GPU; --tiny runs toy sizes on the CPU")
    off = prove(device)
    path, rows, clocks = result_file(config.out, "kernels", device), [], []
    print(json.dumps(machine(device) | {"switched off": off}))
    print(HEADER, flush=True)
    with torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):  # a graph cannot be captured on the default stream
        for contest in (contest for contests in CONTESTS for contest in contests(Maker(device, config.tiny))):
            if contest.op.startswith(config.only):
                if config.tiny:
                    contest.rate, contest.speed, contest.memory = 0, {}, {}
                new = hold(contest, device, config.rounds)
                rows, clocks = rows + new, clocks + [clock_now()]
                print("\n".join(map(shown, new)), flush=True)
                path.write_text(json.dumps({**machine(device), "off": off, "clocks": clocks, "rows": rows}, indent=1) + "\n")  # each time: a timeout keeps what there is
    judged = [row["reached"] for row in rows if row["reached"] is not None]
    print(f"{sum(judged)} of {len(judged)} reached; {path}")
    if config.only and not rows:
        raise UserError(f"--only={config.only}: no op's name begins so")


if __name__ == "__main__":
    launch(main, Config)
