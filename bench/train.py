"""Tokens per second, share of the hardware's peak and memory of whole training steps: forward,
loss, backward, gradient accumulation, optimizer.

Contenders train models of one architecture and size (this repository's: RMSNorm, RoPE, QK-norm,
SwiGLU, untied head, 50,304 tokens), on documents as long as the context. They take turns in one
process, so that a throttling GPU slows all alike:

    baseline             a plain nanoGPT-style script, written below: dense batches, PyTorch's
                         attention, logits whole, AdamW fused, autocast, torch.compile
    kernels              model.py and optim.py (Muon + AdamW) as pretrain.py runs them
    kernels+compile      the same with --compile
    references+compile   the same, the kernels switched off

The batch of a step is the same for all; a contender that runs out of memory halves its micro-batch,
and the table says so. MFU counts 6 operations per weight and token and causal attention's products,
against the data sheet's dense bf16 peak. Memory is the peak of everything a contender needs,
weights and optimizer included.

    python -m bench.train                    minutes on a GPU; bench/results/train_DEVICE.json
    python -m bench.train --depths=12 --contexts=1024
    python -m bench.train --tiny --device=cpu    seconds: the script itself, at toy sizes
"""

import contextlib
import gc
import json
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.kernels import clock_now, machine, result_file
from data.pack import IGNORE, next_tokens, pack
from kernels import _lib
from kernels.head import linear_cross_entropy
from kernels.proof import prove
from model import GPT, config_for, rotary_tables
from optim import Optimizer
from runtime.errors import UserError
from runtime.process import launch, peak_flops, setup

CONTENDERS = ["baseline", "kernels", "kernels+compile", "references+compile"]


@dataclass
class Config:
    # layers, comma-separated; width 64 x depth
    depths: str = "12,24"
    # tokens per document, comma-separated
    contexts: str = "1024,2048,4096,8192"
    # tokens per step
    batch_tokens: int = 131072
    # tokens at once, at first
    micro_batch_tokens: int = 32768
    # comma-separated, the baseline first
    contenders: str = ",".join(CONTENDERS)
    # timed steps of each contender
    steps: int = 5
    # one toy size: times mean nothing
    tiny: bool = False
    # auto, cpu, cuda, cuda:1
    device: str = "auto"
    # folder of the JSON file
    out: str = "bench/results"


VOCAB = 50304
# Of the kernels at depth 12 and context 1024, the last two relative to the baseline
WANTED = {"mfu": 0.45, "speed": 1.15, "memory": 0.6}


# --------------------------------------------------------------------------------------------------
# The baseline


def rotate(x, cos, sin):
    """Rotary positions, x [B, H, T, Dh]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class BaselineBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.head_dim = c.heads, c.head_dim
        self.qkv = nn.Linear(c.width, 3 * c.heads * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.gate_up = nn.Linear(c.width, 2 * c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)
        self.attn_norm, self.mlp_norm = nn.RMSNorm(c.width), nn.RMSNorm(c.width)
        self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim), nn.RMSNorm(c.head_dim)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        qkv = self.qkv(self.attn_norm(x)).chunk(3, dim=-1)
        q, k, v = (z.view(B, T, self.heads, self.head_dim).transpose(1, 2) for z in qkv)  # [B, H, T, Dh]
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Baseline(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(BaselineBlock(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        cos, sin = rotary_tables(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, y):
        h, T = self.embed(x), x.shape[1]
        for block in self.blocks:
            h = block(h, self.cos[:T], self.sin[:T])
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), y.flatten(), reduction="sum")


class BaselineRun:
    deterministic = False  # the baseline at its best

    def __init__(self, c, device, backend):
        torch.manual_seed(0)
        self.model = Baseline(c).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.model.compile(backend=backend, dynamic=False)
        self.device = device

    def loss(self, tokens):
        tokens, targets = tokens.to(self.device), tokens.roll(-1, 1).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(tokens, targets)

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------
# Ours


class OurRun:
    deterministic = True  # as in every script

    def __init__(self, c, device, backend="", kernels=True):
        self.model = GPT(c).init_weights(0).to(device)
        self.optimizer = Optimizer(self.model, 0.01, matrix_lr=0.02, embed_lr=0.1, head_lr=0.003, betas=(0.8, 0.95))
        if backend:
            self.model.compile(backend=backend, dynamic=False)
        self.device, self.kernels = device, kernels

    def loss(self, tokens):
        with contextlib.nullcontext() if self.kernels else references():
            p = pack(tokens)  # on the CPU, as pretrain.py makes it
            targets = next_tokens(p, IGNORE).to(self.device)
            return linear_cross_entropy(self.model(p.to(self.device)), self.model.head, targets)

    def update(self):
        self.optimizer.step(1.0)


@contextlib.contextmanager
def references():
    """Within it every op runs its PyTorch reference."""
    mode, _lib.MODE = _lib.MODE, "0"
    try:
        yield
    finally:
        _lib.MODE = mode


def make(contender, shape, device, backend):
    """The run of a contender, by its name in the table."""
    if contender == "baseline":
        return BaselineRun(shape, device, backend)
    if contender == "kernels":
        return OurRun(shape, device)
    return OurRun(shape, device, backend, kernels=contender == "kernels+compile")


# --------------------------------------------------------------------------------------------------
# The clock


def step(run, batch, micro):
    """One optimizer step on batch [documents, T], `micro` documents at a time."""
    torch.use_deterministic_algorithms(run.deterministic, warn_only=True)
    for part in batch.split(micro):
        (run.loss(part) / batch.numel()).backward()
    run.update()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def fit(run, batch, micro, device):
    """(micro-batch that fits, bytes at the peak or None): take two steps, halve the micro-batch if
    memory ends.

    The second step is the one that counts: in the first, compilers measure and the optimizer's
    state is not there yet.
    """
    while True:
        try:
            step(run, batch, micro)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step(run, batch, micro)
            synchronize(device)
            return micro, torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        run.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        micro //= 2


def contest(depth, context, config, device):
    """The rows of one size, the baseline first."""
    vocab, backend = (61, "eager") if config.tiny else (VOCAB, "inductor")
    shape = config_for(depth, vocab, context=context)
    torch._dynamo.reset()
    documents = max(1, config.batch_tokens // context)
    batch = torch.randint(vocab, (documents, context), generator=torch.Generator().manual_seed(0))
    first_micro = max(1, min(documents, config.micro_batch_tokens // context))
    rows, runs = {}, {}
    for name in config.contenders.split(","):
        row = {"depth": depth, "context": context, "contender": name}
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        try:
            begin = time.perf_counter()
            run = make(name, shape, device, backend)
            micro, peak = fit(run, batch, first_micro, device)
            print(f"{name}: compiled and warm after {time.perf_counter() - begin:.0f} s", flush=True)
        except Exception as e:  # out of memory at one document, or its compiler fails: that must not end the rest
            reason = (str(e).strip().splitlines() or [""])[0][:150]
            rows[name] = row | {"absent": f"{type(e).__name__}: {reason}"}
            continue
        runs[name] = run, micro
        rows[name] = row | {"micro_batch_tokens": micro * context, "gib": peak and (peak - before) / 2**30}
    seconds = {name: [] for name in runs}
    for _ in range(config.steps):
        for name, (run, micro) in runs.items():
            synchronize(device)
            begin = time.perf_counter()
            step(run, batch, micro)
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    flops, peak = batch.numel() * GPT(shape).flops_per_token(context), peak_flops(device)
    for name in runs:
        median = statistics.median(seconds[name])
        rows[name] |= {"ms": 1e3 * median, "ms_all": [1e3 * s for s in seconds[name]]}
        rows[name] |= {"tokens_per_s": batch.numel() / median, "mfu": flops / median / peak if peak else None}
    judge(rows)
    return list(rows.values())


def judge(rows):
    """Add each row's speed and memory relative to the baseline, and, at the size that has wanted
    figures, whether they were reached."""
    base = rows["baseline"]
    for name, row in rows.items():
        if "ms" in row and "ms" in base:
            row["speed"] = base["ms"] / row["ms"]
            row["memory"] = row["gib"] / base["gib"] if row["gib"] else None
        row["reached"] = None
        if (row["depth"], row["context"]) == (12, 1024) and name.startswith("kernels"):
            row["reached"] = {key: bool(row.get(key)) and reaches(key, row[key]) for key in WANTED}


def reaches(key, value):
    return value <= WANTED[key] if key == "memory" else value >= WANTED[key]


# --------------------------------------------------------------------------------------------------
# The report

HEADER = (
    f"{'depth':>5} {'context':>7} {'contender':<20} {'micro':>7} {'ms a step':>10} {'tokens/s':>11} {'MFU':>6} "
    f"{'speed':>6} {'GiB':>6} {'memory':>6}  not reached"
)


def as_text(row):
    """A row of the table."""
    name = f"{row['depth']:>5} {row['context']:>7} {row['contender']:<20}"
    if "absent" in row:
        return f"{name} {row['absent']}"
    cells = [f"{row['micro_batch_tokens']:>7} {row['ms']:>10.1f} {row['tokens_per_s']:>11,.0f}"]
    for key, form in (("mfu", ".1%"), ("speed", ".2f"), ("gib", ".1f"), ("memory", ".2f")):
        cells.append(f"{'' if row.get(key) is None else format(row[key], form):>6}")
    missed = [f"{key} ({WANTED[key]})" for key, reached in (row["reached"] or {}).items() if not reached]
    return f"{name} {' '.join(cells)}  {', '.join(missed) or ('none' if row['reached'] else '')}"


def main(config):
    chosen = config.contenders.split(",")
    if chosen[0] != "baseline" or set(chosen) - set(CONTENDERS):
        raise UserError(f"--contenders={config.contenders}: baseline, then any of {', '.join(CONTENDERS[1:])}")
    device = setup(config.device, 0)
    if device.type == "cpu" and not config.tiny:
        raise UserError("these sizes need a CUDA GPU; --tiny runs a toy size on the CPU")
    if config.tiny:
        config.depths, config.contexts, config.steps = "1", "16", 1
        config.batch_tokens, config.micro_batch_tokens = 64, 32
    off = prove(device)
    path, rows, clocks = result_file(config.out, "train", device), [], []
    print(json.dumps(machine(device) | {"switched off": off, "wanted at depth 12, context 1024": WANTED}))
    print(HEADER, flush=True)
    for depth in map(int, config.depths.split(",")):
        for context in map(int, config.contexts.split(",")):
            new = contest(depth, context, config, device)
            rows += new
            clocks.append(clock_now())
            print("\n".join(map(as_text, new)), flush=True)
            found = machine(device) | {"off": off, "wanted": WANTED, "clocks": clocks, "rows": rows}
            path.write_text(json.dumps(found, indent=1) + "\n")  # each time: a timeout keeps what there is
            gc.collect()  # this size's models
    print(path)


if __name__ == "__main__":
    launch(main, Config)
