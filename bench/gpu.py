"""What to measure first on a GPU: whether it runs at all, what its memory and matrix units give,
and what a training step and a decode step take, beside what bench/predict.py says.

Every number is printed as soon as it is there, and a row that fails says why and ends nothing; only
the smoke test ends with an error. bench/gpu_first.sh runs the parts one after another.

    python -m bench.gpu --part=smoke        set-up, the kernels' proof, a training step, a rollout
    python -m bench.gpu --part=floors       bytes/s of copies, FLOP/s of the model's products
    python -m bench.gpu --part=contexts     attention by the length of its documents
    python -m bench.gpu --part=sweep        attention's blocks, the sampler's block
    python -m bench.gpu --part=profile      a micro-batch, an optimizer step and decoding, profiled
    python -m bench.gpu --part=micro        micro-batches, head widths, determinism; memory
    python -m bench.gpu --part=decode       decode steps of a real model's shape
    python -m bench.gpu --part=floors --tiny --device=cpu      the script itself, at toy sizes
"""

import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import kernels.attention
import kernels.draw
from bench.predict import GPUS, SHAPES, Config as Predicted, decode_floor, decode_row, training_row
from data.pack import IGNORE, next_tokens, pack, to_device
from kernels.attention import attention, layout
from kernels.draw import draw
from kernels.proof import prove
from model import GPT, GPTConfig, config_for
from optim import Optimizer
from pretrain import nll_sum
from rollout import GRAPH_STEPS, Sampler, rollout
from runtime.errors import UserError
from runtime.process import describe, launch, setup


@dataclass
class Config:
    # smoke, floors, contexts, sweep, profile, micro or decode
    part: str
    # toy sizes: times mean nothing
    tiny: bool = False
    # auto, cpu, cuda, cuda:1
    device: str = "auto"


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device, rounds=5, in_a_row=1):
    """The median seconds of f(). Several in a row let the CPU launch ahead of the GPU."""
    f()  # compiles and warms up
    times = []
    for _ in range(rounds):
        wait(device)
        begin = time.perf_counter()
        for _ in range(in_a_row):
            f()
        wait(device)
        times.append((time.perf_counter() - begin) / in_a_row)
    return statistics.median(times)


def row(name, measure):
    """Print a row: its name and what measure() says, or why that failed."""
    begin = time.perf_counter()
    try:
        found = measure()
    except Exception as e:  # a row must not end the rest
        found = f"FAILED {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:150]}"
    print(f"{name:<52} {found}   [{time.perf_counter() - begin:.1f} s]", flush=True)


class Trained:
    """A model, its optimizer and batches of tokens."""

    def __init__(self, device, tiny, **shape):
        self.vocab, context, depth = (61, 16, 1) if tiny else (50304, 1024, 12)
        self.context, self.device = context, device
        self.model = GPT(config_for(depth, self.vocab, context=context, **shape)).init_weights(0).to(device).train()
        rates = dict(matrix_lr=0.02, embed_lr=0.1, head_lr=0.003, betas=(0.8, 0.95))
        self.optimizer = Optimizer(self.model, 0.01, **rates)

    def micro_batch(self, tokens):
        """Forward, loss and backward."""
        documents = torch.randint(self.vocab, (max(1, tokens // self.context), self.context))
        p = pack(documents)
        (nll_sum(self.model, p, next_tokens(p, IGNORE)) / tokens).backward()

    def step(self, tokens, micro_batches):
        for _ in range(micro_batches):
            self.micro_batch(tokens)
        self.optimizer.step(1.0)


# --------------------------------------------------------------------------------------------------
# The parts


def smoke(device, tiny):
    """Raises what fails."""
    trained = Trained(device, tiny)
    p = pack([[i % trained.vocab for i in range(trained.context)]] * 2)
    losses = []
    for _ in range(5):
        loss = nll_sum(trained.model, p, next_tokens(p, IGNORE)) / len(p.tokens)
        loss.backward()
        trained.optimizer.step(1.0)
        losses.append(loss.item())
    print(f"the loss of five steps on one batch: {' '.join(f'{x:.3f}' for x in losses)}")
    if not losses[-1] < losses[0]:
        raise UserError("the loss does not fall")
    samples = rollout(trained.model, [[1, 2, 3]] * 4, max_new_tokens=8, n=2, seed=1)
    print(f"a rollout: {samples[0].tokens}")


def floors(device, tiny):
    n = 2**16 if tiny else 2**29
    x, y = torch.zeros(n, dtype=torch.uint8, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    row("copy_ on the device", lambda: f"{2 * n / seconds(lambda: y.copy_(x), device) / 1e12:.2f} TB/s")
    host = torch.zeros(n // 8, dtype=torch.uint8)
    row("copy from pageable memory", lambda: f"{n / 8 / seconds(lambda: host.to(device), device) / 1e9:.1f} GB/s")
    row("copy, pinned first", lambda: f"{n / 8 / seconds(lambda: to_device(host, device), device) / 1e9:.1f} GB/s")
    rows = 64 if tiny else 32768
    shapes = [(768, 2304), (768, 768), (768, 4096), (2048, 768), (768, 50304)]
    for inner, columns in [(8, 16)] if tiny else shapes:
        a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)

        def rate(a=a, b=b):
            return f"{2 * len(a) * b.numel() / seconds(lambda: a @ b.T, device) / 1e12:.1f} TF/s"

        row(f"product of {rows} x {inner} and {inner} x {columns}", rate)


def attention_of(N, T, heads, dh, device):
    """(queries, forward, both): attention of N tokens in documents of T, also with its backward."""
    qkv = torch.randn(N, 3 * heads, dh, device=device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(N, heads, dh, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.split(heads, dim=1)
    table = layout(torch.arange(0, N + 1, T, dtype=torch.int32, device=device), q, dh)

    @torch.no_grad()
    def forward():
        attention(q, k, v, table)

    def both():
        torch.autograd.grad(attention(q, k, v, table), (q, k, v), upstream)

    return q, forward, both


def contexts(device, tiny):
    """Attention by the length of its documents."""
    N, repeated = (64, 1) if tiny else (16384, 10)
    for heads, dh in [(2, 64)] if tiny else [(16, 128), (32, 64)]:
        for T in (N // 4, N):
            _, *timed = attention_of(N, T, heads, dh, device)

            def measure(timed=timed):
                one, two = (1e3 * seconds(f, device, 3, repeated) for f in timed)
                return f"forward {one:.3f} ms, and backward {two:.3f} ms"

            row(f"{heads} heads of {dh}, {N // T} documents of {T}", measure)


def sweep(device, tiny):
    """Attention's blocks, then the sampler's; the table's own come first."""
    N, T = (64, 32) if tiny else (32768, 1024)
    for heads, dh in [(2, 64)] if tiny else [(12, 64), (6, 128)]:
        q, _, both = attention_of(N, T, heads, dh, device)

        def measure(both=both):
            return f"{1e3 * seconds(both, device, 3, 1 if tiny else 20):.3f} ms"

        own = kernels.attention.blocks(q)
        print(f"attention, {heads} heads of {dh}, forward and backward; its blocks are {own}", flush=True)
        row(f"  documents of {T}", measure)
        for i, (name, swept) in enumerate(SWEPT.items()):
            for block in swept:
                blocks = [*own[:i], block, *own[i + 1 :]]
                with mock.patch.object(kernels.attention, "blocks", lambda x, blocks=blocks: blocks):
                    row(f"  {name}: {block}", measure)
    B, V = (2, 200) if tiny else (128, 151936)
    logits, u = torch.randn(B, V, device=device), torch.rand(B, device=device)
    for settings in [(1.0, 0, 1.0), (0.8, 50, 0.9)]:
        for block in (4096, 8192, 16384):
            with mock.patch.object(kernels.draw, "BLOCK", block):
                drawn = partial(draw, logits, u, *settings)
                s = seconds(drawn, device, 3, 1 if tiny else 20)
                print(f"draw, {B} rows of {V}, {settings}, blocks of {block:<7} {1e6 * s:.0f} us", flush=True)


# Queries of a block, keys of a block, warps, stages: those that keep everything in registers at
# heads of 64 or of 128 on sm_90.
SWEPT = {
    "forward": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 128, 4, 2),
        (128, 32, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
    ],
    "dk and dv": [
        (32, 64, 4, 2),
        (32, 64, 4, 3),
        (32, 128, 8, 2),
        (32, 128, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 8, 2),
        (64, 128, 8, 2),
        (64, 128, 8, 3),
    ],
    "dq": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 128, 8, 2),
        (128, 32, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ],
}


def profiled(device, tiny):
    trained, tokens = Trained(device, tiny), 64 if tiny else 32768
    trained.step(tokens, 1)
    print_profile(f"a micro-batch of {tokens} tokens", lambda: trained.micro_batch(tokens), device)
    print_profile("an optimizer step", lambda: trained.optimizer.step(1.0), device)
    name, shape, slots, held, steps = DECODED[0] if not tiny else TOY_DECODED
    sampler = sampler_of(shape, slots, held, steps, device)
    print_profile(f"a Sampler.step of {slots} slots, {name}: {GRAPH_STEPS} tokens each", sampler.step, device)


def print_profile(name, run, device):
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    key = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
    with profile(activities=activities) as found:
        run()
        wait(device)
    print(f"{name}\n{found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)}", flush=True)


def predicted_for(device):
    """The GPU of bench/predict.py that this one is, else its H100."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((key for key in GPUS if key in name), "H100")


def micro(device, tiny):
    known = predicted_for(device)
    for head_dim in (0,) if tiny else (128, 64):
        shape = {"heads": 768 // head_dim} if head_dim else {}
        for tokens in (32, 64) if tiny else (8192, 16384, 32768, 65536):
            for deterministic in (True, False):

                def measure(tokens=tokens, deterministic=deterministic, shape=shape):
                    trained = Trained(device, tiny, **shape)
                    torch.use_deterministic_algorithms(deterministic, warn_only=True)
                    n = 2 if tiny else 131072 // tokens
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    s = seconds(lambda: trained.step(tokens, n), device, 3)
                    mfu = n * tokens * trained.model.flops_per_token(trained.context) / s / GPUS[known].flops_per_s
                    memory = ""
                    if device.type == "cuda":
                        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                        memory = "; GiB allocated, reserved: " + ", ".join(f"{x / 2**30:.1f}" for x in peaks)
                    return f"{1e3 * s:.1f} ms a step, {n * tokens / s:,.0f} tok/s, MFU {mfu:.1%} of {known}{memory}"

                row(f"heads of {head_dim}, micro-batch {tokens}, deterministic {deterministic}", measure)
    if not tiny:
        said = training_row(Predicted(), GPUS[known], 32768)
        print(f"predicted for {known} at 32,768: {said['step_ms']:.1f} ms, MFU {said['mfu']:.1%}")


DECODED = [(name, SHAPES[name], slots, 400, 64) for name in ("Qwen2.5-0.5B", "Qwen3-0.6B") for slots in (128, 64, 256)]
TOY_DECODED = ("toy", (1, 32, 2, 1, 16, 48, 61), 2, 8, 4)


def decode(device, tiny):
    for row_of in [TOY_DECODED] if tiny else DECODED:
        print_decode_row(device, *row_of)


def sampler_of(shape, slots, held, steps, device):
    """A sampler whose slots hold prompts of `held` tokens, read and captured, with room for four
    times `steps`."""
    layers, width, heads, kv_heads, head_dim, ffn, vocab = shape
    c = GPTConfig(vocab, layers, width, heads, kv_heads, head_dim, ffn, context=1024, tied=True)
    sampler = Sampler(GPT(c).init_weights(0).to(device), slots, held + 4 * steps)
    sampler.add([[i % vocab] * held for i in range(slots)], max_new_tokens=4 * steps)
    sampler.step(), sampler.step()  # reads the prompts; captures
    wait(device)
    return sampler


def print_decode_row(device, name, shape, slots, held, steps):
    """Print what a decode step took, and what was predicted."""
    gpu = predicted_for(device)

    def measure():
        sampler = sampler_of(shape, slots, held, steps, device)
        begin, before = time.perf_counter(), sampler.drawn.sum().item()
        while sampler.drawn.sum().item() < before + slots * steps:
            sampler.step()
        s = time.perf_counter() - begin
        drawn = sampler.drawn.sum().item() - before
        floor = decode_floor(sampler.model, slots, held + steps // 2) / GPUS[gpu].bytes_per_s
        per_step = s * slots / drawn
        return f"{1e3 * per_step:.2f} ms a step, {drawn / s:,.0f} tok/s, {floor / per_step:.0%} of floor"

    row(f"{name}, {slots} slots, {held} tokens held", measure)
    if name in SHAPES:
        said = decode_row(name, GPUS[gpu], slots, held)
        figures = f"{said['step_ms']:.2f} ms, {said['tokens_per_s']:,.0f} tok/s, {said['of_floor']:.0%} of floor"
        print(f"  predicted for {gpu}: {figures}", flush=True)


PARTS = {
    "smoke": smoke,
    "floors": floors,
    "contexts": contexts,
    "sweep": sweep,
    "profile": profiled,
    "micro": micro,
    "decode": decode,
}


def main(config):
    if config.part not in PARTS:
        raise UserError(f"--part={config.part}: the parts are {', '.join(PARTS)}")
    device = setup(config.device, 0)
    if device.type == "cpu" and not config.tiny:
        raise UserError("these sizes need a CUDA GPU; --tiny runs toy sizes on the CPU")
    print(json.dumps(describe(device) | {"switched off": prove(device)}), flush=True)
    PARTS[config.part](device, config.tiny)


if __name__ == "__main__":
    launch(main, Config)
