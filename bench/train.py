"""Tokens a second, share of the hardware's peak and memory of whole training steps: forward, loss, backward, gradient accumulation, optimizer.

Contenders train models of one architecture and size (this repository's: RMSNorm, RoPE, QK-norm, SwiGLU, untied head, 50,304 tokens), on documents as
long as the context, and take turns in one process, so that a throttling GPU slows all alike:

    baseline            a plain nanoGPT-style script, written below: dense batches, PyTorch's attention, logits whole, AdamW fused, autocast, torch.compile
    kernels             model.py and optim.py (Muon + AdamW) as pretrain.py runs them
    kernels, compile    the same with --compile
    references, compile the same, the kernels switched off

The batch a step is the same for all; who runs out of memory halves its micro-batch, and the table says so. MFU counts 6 operations a weight and token and
causal attention's products, against the data sheet's dense bf16 peak. Memory is the peak of everything a contender needs, weights and optimizer included.

    python -m bench.train                               minutes on a GPU; bench/results/train_DEVICE.json
    python -m bench.train --depths=12 --contexts=1024
    python -m bench.train --tiny --device=cpu           seconds: the script itself, at toy sizes, times mean nothing
"""
import contextlib, gc, json, statistics, time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.kernels import clock_now, machine, result_file
from common import UserError, launch, peak_flops, setup
from data.pack import next_tokens, pack
from kernels import _lib
from kernels.head import IGNORE, linear_cross_entropy
from model import GPT, config_for, rotary_tables
from optim import Optimizer


@dataclass
class Config:
    # layers; width 64 x depth
    depths: str = "12,24"
    # tokens a document
    contexts: str = "1024,2048,4096,8192"
    # tokens a step
    batch_tokens: int = 131072
    # tokens at once, at first
    micro_tokens: int = 32768
    # timed, a contender
    steps: int = 5
    # one toy size
    tiny: bool = False
    # auto, cpu, cuda, cuda:1
    device: str = "auto"
    # folder of the JSON file
    out: str = "bench/results"


VOCAB = 50304
ASKED = {"mfu": 0.45, "speed": 1.15, "memory": 0.6}  # of the kernels at depth 12 and context 1024, the last two relative to the baseline


# ---------------------------------------------------------------------------------------------------------------------------------
# The baseline


class BaselineBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.head_dim = c.heads, c.head_dim
        self.qkv, self.out = nn.Linear(c.width, 3 * c.heads * c.head_dim, bias=False), nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.gate_up, self.down = nn.Linear(c.width, 2 * c.ffn, bias=False), nn.Linear(c.ffn, c.width, bias=False)
        self.attn_norm, self.mlp_norm = nn.RMSNorm(c.width), nn.RMSNorm(c.width)
        self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim), nn.RMSNorm(c.head_dim)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q, k, v = (z.view(B, T, self.heads, self.head_dim).transpose(1, 2) for z in self.qkv(self.attn_norm(x)).chunk(3, dim=-1))

        def turn(z):
            a, b = z.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(v.dtype)

        y = F.scaled_dot_product_attention(turn(self.q_norm(q)), turn(self.k_norm(k)), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Baseline(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(c.vocab_size, c.width), nn.RMSNorm(c.width), nn.Linear(c.width, c.vocab_size, bias=False)
        self.blocks = nn.ModuleList(BaselineBlock(c) for _ in range(c.layers))
        cos, sin = rotary_tables(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, y):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, self.cos[: x.shape[1]], self.sin[: x.shape[1]])
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), y.flatten(), reduction="sum")


class BaselineRun:
    def __init__(self, c, device, backend):
        torch.manual_seed(0)
        self.model = Baseline(c).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.model.compile(backend=backend, dynamic=False)
        self.device = device

    def loss(self, tokens):
        tokens, targets = tokens.to(self.device), tokens.roll(-1, 1).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(tokens, targets)

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# Ours


class OurRun:
    def __init__(self, c, device, backend, kernels=True):
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


# ---------------------------------------------------------------------------------------------------------------------------------
# The clock


def step(run, batch, micro):
    """One optimizer step on batch [documents, T], `micro` documents at a time."""
    for part in batch.split(micro):
        (run.loss(part) / batch.numel()).backward()
    run.update()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def settle(make, batch, micro, device):
    """(run, micro-batch that fits, GiB at the peak): build a contender, take two steps, halve its micro-batch where memory ends.

    The second step is the one that counts: in the first, compilers measure and the optimizer's state is not there yet.
    """
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    run = make()
    while True:
        try:
            step(run, batch, micro)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            step(run, batch, micro)
            synchronize(device)
            return run, micro, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
        except torch.cuda.OutOfMemoryError:
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
    makers = {
        "baseline": lambda: BaselineRun(shape, device, backend),
        "kernels": lambda: OurRun(shape, device, ""),
        "kernels, compile": lambda: OurRun(shape, device, backend),
        "references, compile": lambda: OurRun(shape, device, backend, kernels=False),
    }
    documents = max(1, config.batch_tokens // context)
    batch = torch.randint(vocab, (documents, context), generator=torch.Generator().manual_seed(0))
    rows, runs = {}, {}
    for name, make in makers.items():
        row = {"depth": depth, "context": context, "contender": name}
        try:
            run, micro, gib = settle(make, batch, max(1, min(documents, config.micro_tokens // context)), device)
        except Exception as e:  # one contender that cannot run (out of memory at one document, or its compiler fails) must not end the others' contest
            rows[name] = row | {"absent": f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:150]}"}
            continue
        runs[name], rows[name] = (run, micro), row | {"micro_tokens": micro * context, "gib": gib}
    seconds = {name: [] for name in runs}
    for _ in range(config.steps):
        for name, (run, micro) in runs.items():
            synchronize(device)
            begin = time.perf_counter()
            step(run, batch, micro)
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    flops = GPT(shape).flops_per_token(context)
    for name in runs:
        median = statistics.median(seconds[name])
        rows[name] |= {"ms": 1e3 * median, "ms_all": [1e3 * s for s in seconds[name]], "tokens_per_s": batch.numel() / median}
        rows[name]["mfu"] = batch.numel() / median * flops / peak_flops(device) if peak_flops(device) else None
    judge(rows)
    return list(rows.values())


def judge(rows):
    """Add each row's speed and memory relative to the baseline, and, where figures were asked, whether they were reached."""
    base = rows["baseline"]
    for name, row in rows.items():
        if "ms" in row and "ms" in base:
            row |= {"speed": base["ms"] / row["ms"], "memory": row["gib"] / base["gib"] if row["gib"] else None}
        row["reached"] = None
        if (row["depth"], row["context"]) == (12, 1024) and name.startswith("kernels"):
            row["reached"] = {key: bool(row.get(key)) and (row[key] <= limit if key == "memory" else row[key] >= limit) for key, limit in ASKED.items()}


# ---------------------------------------------------------------------------------------------------------------------------------
# The report

HEADER = f"{'depth':>5} {'context':>7} {'contender':<20} {'micro':>7} {'ms a step':>10} {'tokens/s':>11} {'MFU':>6} {'speed':>6} {'GiB':>6} {'memory':>6}  not reached"


def shown(row):
    """A row of the table, as text."""
    who = f"{row['depth']:>5} {row['context']:>7} {row['contender']:<20}"
    if "absent" in row:
        return f"{who} {row['absent']}"
    cell = lambda key, form: "" if row.get(key) is None else format(row[key], form)  # noqa: E731
    missed = ", ".join(f"{key} ({ASKED[key]})" for key, reached in (row["reached"] or {}).items() if not reached)
    figures = f"{row['micro_tokens']:>7} {row['ms']:>10.1f} {row['tokens_per_s']:>11,.0f} {cell('mfu', '.1%'):>6} {cell('speed', '.2f'):>6} {cell('gib', '.1f'):>6} {cell('memory', '.2f'):>6}"
    return f"{who} {figures}  {missed or ('none' if row['reached'] else '')}"


def main(config):
    device = setup(config.device, 0)
    if device.type == "cpu" and not config.tiny:
        raise UserError("these sizes need a CUDA GPU; --tiny runs a toy size on the CPU")
    if config.tiny:
        config.depths, config.contexts, config.batch_tokens, config.micro_tokens, config.steps = "1", "16", 64, 32, 1
    off = _lib.prove(device)
    path, rows, clocks = result_file(config.out, "train", device), [], []
    print(json.dumps(machine(device) | {"switched off": off, "asked at depth 12, context 1024": ASKED}))
    print(HEADER, flush=True)
    for depth in map(int, config.depths.split(",")):
        for context in map(int, config.contexts.split(",")):
            new = contest(depth, context, config, device)
            rows, clocks = rows + new, clocks + [clock_now()]
            print("\n".join(map(shown, new)), flush=True)
            path.write_text(json.dumps({**machine(device), "off": off, "asked": ASKED, "clocks": clocks, "rows": rows}, indent=1) + "\n")  # each time: a timeout keeps what there is
            gc.collect()  # this size's models
    print(path)


if __name__ == "__main__":
    launch(main, Config)
