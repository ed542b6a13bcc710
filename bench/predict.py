"""What a GPU that is not here would do: time, MFU, memory and cost of a training step and of a
decode step, predicted from the operations that they launch.

The code itself runs, forward, backward, optimizer and decode step, on tensors that have a shape and
no memory (device meta), and every operation that would launch a kernel is recorded with its bytes
and FLOPs. Each takes the longest of its FLOPs at the rate below, its bytes at the rate below, and
the least time of such a kernel (Williams et al. 2009, "Roofline"). The rates are shares of the data
sheet, set once from what such kernels reach elsewhere, and frozen: only what is recorded moves a
prediction. No GPU has confirmed it; measured rows of bench/results/ are printed beside it.

    python -m bench.predict                                depth 12 on an H100
    python -m bench.predict --gpu=4090 --micro_batch_tokens=16384
    python -m bench.predict --shape=Qwen2.5-0.5B           decode steps of a known model

What the launches cost the CPU is measured: python -m bench.launches.
"""

import collections
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

import rollout
from data.pack import IGNORE, next_tokens, pack
from kernels import _lib
from model import GPT, GPTConfig, config_for
from optim import Optimizer
from pretrain import nll_sum
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.memory import Meter, head_scratch
from runtime.process import launch


@dataclass
class Config:
    # H100 or 4090
    gpu: str = "H100"
    # layers of the model that is trained [>= 1]
    depth: int = 12
    # vocabulary of it [>= 1]
    vocab: int = 50304
    # tokens of a document [>= 1]
    context: int = 1024
    # tokens that the GPU holds at once; 0: 8k to 128k
    micro_batch_tokens: int = 0
    # tokens of an optimizer step [>= 1]
    batch_tokens: int = 131072
    # model whose decode steps are predicted (SHAPES); "": all
    shape: str = ""
    # tokens that a slot holds, on average [>= 1]
    held: int = 400
    # directory of measured rows
    results: str = "bench/results"


@dataclass(frozen=True)
class GPU:
    bytes_per_s: float  # of the data sheet
    flops_per_s: float  # bf16 with fp32 sums, dense
    gib: float
    dollars_per_hour: float  # assumed; rent changes by the week


GPUS = {
    "H100": GPU(3.35e12, 989e12, 80, 2.5),
    "H200": GPU(4.8e12, 989e12, 141, 3.5),
    "4090": GPU(1.008e12, 165.2e12, 24, 0.35),
}

# Shares of the data sheet's figures that kernels reach.
STREAM = 0.806  # bytes of an elementwise kernel
DECODE_STREAM = 0.687  # bytes of a product of few rows, and of decode_attention
HEAD_STREAM = 0.776  # bytes of the head's product of few rows
TRUNK = 0.566  # FLOPs of a product of many rows and K of 768 to 4096
HEAD = 0.607  # FLOPs of the head's
DECODE_FLOPS = 0.455  # FLOPs of a product of few rows
ATTENTION = {64: (0.212, 0.152), 128: (0.293, 0.202)}  # FLOPs by head width: forward, backward (5 products)
L2_HIT = 0.85  # of the cross-entropy's bytes: it reads each row twice
# Least seconds of a kernel, and what the host loses.
SMALL, OWN, PRODUCT, DECODE = 2.2e-6, 2.8e-6, 4.5e-6, 6e-6
WAIT = 0.15e-3  # a copy for which the host waits: the GPU runs dry behind it
SORT = 0.12e-3  # the sort in the embedding's backward
DETERMINISTIC_PUT = 11  # kernels of an index_put_ that sorts
HOST_OP, HOST_GROUP = 12e-6, 60e-6  # host: an operation of the optimizer; an AdamW group

SHAPES = {  # layers, width, heads, kv heads, head width, ffn, vocabulary
    "Qwen2.5-0.5B": (24, 896, 14, 2, 64, 4864, 151936),
    "Qwen3-0.6B": (28, 1024, 16, 8, 128, 3072, 151936),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 128, 8960, 151936),
}


# --------------------------------------------------------------------------------------------------
# The recording


@dataclass
class Op:
    """An operation that launches kernels: those that share a part share a line of the table."""

    name: str
    part: str
    tensors: list  # shapes of the inputs and outputs
    bytes: int = 0
    flops: int = 0
    launches: int = 1
    least: float = SMALL
    wait: bool = False
    seconds: float = 0.0


EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_local_scalar_dense"}


def is_view(func, given, made):
    """Whether a call gave back its input's memory as it was, and launched nothing."""
    inputs = {x.untyped_storage()._cdata for x in given}
    return not func._schema.is_mutable and all(x.untyped_storage()._cdata in inputs for x in made)


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class Recorder(Meter):
    """The Ops that are launched within, and the bytes that live, at most `peak`."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
            self.ops.append(Op("item", "waits for a number", [], wait=True, launches=0))
            return True  # what the code asks is whether a norm is finite
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in made if x.is_meta]
        for x in on_gpu:
            self.count(x.untyped_storage())
        self.peak = max(self.peak, self.live + head_scratch(func, given))
        name = func._schema.name.split("::")[-1]
        returns_nothing = not made and any(x.is_meta for x in given)
        if (on_gpu or returns_nothing) and not is_view(func, given, made) and name not in EMPTY:
            self.ops.append(describe(name, func, args, kwargs, given, made))
        return out


def describe(name, func, args, kwargs, given, made):
    """The Op of a call. Its bytes: inputs and outputs once each, except where it reads less."""
    read, written = [x for x in given if x.is_meta], made
    op = Op(name, "small ops", [tuple(x.shape) for x in (*read, *written)])
    if name in ("copy_", "fill_", "zero_", "index_put_", "_index_put_impl_", "scatter_"):
        read = read[1:]  # what is overwritten is not read
        written = read[-1:] if name not in ("copy_", "fill_", "zero_") else made
    op.bytes = nbytes(read) + nbytes(written)
    if name in ("embedding", "index", "gather", "index_select"):
        op.bytes = 2 * nbytes(made) + nbytes(read[1:])
    if name in ("_to_copy", "copy_") and any(x.device.type == "cpu" and x.dim() for x in given):
        op.part, op.wait = "copies from the host", not kwargs.get("non_blocking", len(args) > 2 and args[2])
    if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
        product(op, name, [x for x in given if x.dim() >= 2], made[0])
    if name in ("softmax", "_softmax"):
        op.bytes = 4 * nbytes(made)  # reads a long row three times: its maximum, its sum, the result
    if name == "cat":
        op.part = "cat of dq, dk, dv" if op.bytes > 2**20 else "small ops"
    if name in ("add", "add_", "_to_copy", "clone", "mul", "sum") and op.bytes > 2**20:
        op.part = "casts, sums, additions"
    if name == "embedding_dense_backward":
        op.part = "embedding"
    if name.startswith("_fused_adam"):  # weights, gradients and two moments; the first of them not written
        op.part, op.bytes = "AdamW", nbytes(given) * 7 // 4
    if name.startswith("_foreach"):
        op.bytes = nbytes(given) + nbytes(given[: len(given) // 2])
    if name == "linalg_vector_norm":  # on CUDA all of them are one _foreach_norm
        op.launches = 0
    if name in ("index_put_", "_index_put_impl_") and torch.are_deterministic_algorithms_enabled():
        op.launches = DETERMINISTIC_PUT
    if func.namespace == "feinschliff":
        own_kernel(op, args, given, made)
    return op


def product(op, name, given, out):
    """2 FLOPs per multiplication."""
    a = given[1] if name in ("addmm", "baddbmm") else given[0]
    op.part, op.flops, op.least = "products", 2 * out.numel() * a.shape[-1], PRODUCT


def own_kernel(op, args, given, made):
    """Bytes and FLOPs of a kernel of kernels/, from its shapes."""
    op.least = OWN
    if op.name in ("rms_norm", "rms_norm_backward"):
        op.part, op.launches = "norms", 2 if "backward" in op.name else 1
    elif op.name.startswith("swiglu"):
        op.part = "swiglu"
    elif op.name == "rotate_queries_and_keys":  # the values are neither read nor written
        op.part, op.bytes = "qk-norm and rope", 2 * nbytes(made) + nbytes(given[1:])
    elif op.name == "rotate_back":  # in place; the values' gradients stay as they are
        op.part, op.launches = "qk-norm and rope", 3
        heads, total = args[6], given[0].shape[1]
        op.bytes = 3 * nbytes(given[:1]) * (total + heads) // 2 // total + nbytes(given[2:])
    elif op.name.startswith("qk_norm_rope"):
        op.part, op.launches = "qk-norm and rope", 3 if "backward" in op.name else 1
        if "backward" in op.name:  # values are rotated by nothing: their inputs are not read
            heads, total = args[6], given[0].shape[1]
            op.bytes -= nbytes(given[1:2]) * (total - heads) // 2 // total
    elif op.name == "append_rope":
        op.part, op.bytes = "append_rope", 2 * nbytes(given[:1])  # not the whole cache
    elif op.name == "attention":
        op.part, op.least = "attention forward", DECODE
    elif op.name == "attention_backward":
        op.part, op.launches, op.least = "attention backward", 2, DECODE
    elif op.name == "decode_attention":
        op.part, op.least = "decode_attention", DECODE
    elif op.name.startswith("linear_cross_entropy"):
        op.part = "head"
    elif op.name == "draw":  # the logits once, or twice if they are cut
        op.part, cut = "drawing", args[6]
        op.bytes = nbytes(given[:1]) * (2 if cut else 1)
    elif op.name == "record_draw":
        op.part, op.bytes = "drawing", nbytes(given[:3])


@contextlib.contextmanager
def recorded():
    """A Recorder of what CUDA would run: kernels for every op, bf16 products, fp32 logits."""

    def fp32_logits(model, hidden):
        return torch.ops.aten.mm.dtype(hidden, model.head.T.to(hidden.dtype), torch.float32)

    def pinned_copy(x, device):
        return x.to(device, non_blocking=True)

    with (
        mock.patch("data.pack.to_device", pinned_copy),
        mock.patch("pretrain.to_device", pinned_copy),
        mock.patch.object(_lib, "MODE", "interpret"),
        mock.patch.object(GPT, "compute_dtype", torch.bfloat16),
        mock.patch.object(rollout, "logits_of", fp32_logits),
        mock.patch("torch.optim.adam._device_dtype_check_for_fused"),
        Recorder() as recorder,
        torch.device("meta"),
    ):
        yield recorder


# --------------------------------------------------------------------------------------------------
# The rates


def rate(op, gpu):
    """Sets the seconds of an Op on a GPU."""
    stream = gpu.bytes_per_s * STREAM
    seconds = op.bytes / stream
    if op.part == "products":
        seconds = product_seconds(op, gpu)
    elif op.part.startswith("attention"):
        N, H, Dh = op.tensors[0]
        forward, backward = ATTENTION[64 if Dh < 128 else 128]
        seconds = op.flops / (gpu.flops_per_s * (backward if op.part.endswith("backward") else forward))
    elif op.part == "head":
        seconds = head_seconds(op, gpu)
    elif op.part == "decode_attention":
        seconds = op.bytes / (gpu.bytes_per_s * DECODE_STREAM)
    elif op.part == "embedding":
        seconds += SORT
    op.seconds = max(seconds, op.least * op.launches) + WAIT * op.wait


def product_seconds(op, gpu):
    """One rate for many rows, another for few; the head's own among them."""
    rows, inner, columns = op.tensors[0][-2], op.tensors[0][-1], op.tensors[-1][-1]
    if min(rows, inner, columns) > 512 or len(op.tensors[-1]) == 3:
        return op.flops / (gpu.flops_per_s * TRUNK)
    reads = HEAD_STREAM if columns > 32768 else DECODE_STREAM
    weights = 2 * inner * columns
    return max(weights / (gpu.bytes_per_s * reads), op.flops / (gpu.flops_per_s * DECODE_FLOPS)) + (
        4 * rows * columns / (gpu.bytes_per_s * STREAM) if columns > 32768 else 0
    )


def head_seconds(op, gpu):
    """linear_cross_entropy: three products, the kernel, and the fp32 gradient once a chunk."""
    (N, C), (V, _) = op.tensors[:2]
    chunk = 512 * 2**20 // (2 * V) // 128 * 128
    products = 6 * N * V * C / (gpu.flops_per_s * HEAD)
    kernel = 3 * 2 * N * V * L2_HIT
    accumulated = 8 * V * C * -(-N // chunk)
    return products + (kernel + accumulated + 10 * V * C) / (gpu.bytes_per_s * STREAM)


# --------------------------------------------------------------------------------------------------
# A training step


def attention_flops(ops, context):
    """FLOPs of attention over documents of `context` tokens, of which a query sees half.

    The forward has 2 products, the backward is counted as 5.
    """
    for op in ops:
        if op.name == "attention":
            N, H, Dh = op.tensors[0]
            op.flops = 2 * N * H * Dh * context
        elif op.name == "attention_backward":
            N, H, Dh = op.tensors[0]
            op.flops = 5 * N * H * Dh * context


def record_training(config, tokens):
    """(ops of a micro-batch, of the optimizer step, AdamW groups, bytes at the peak, model)."""
    c = config_for(config.depth, config.vocab, context=config.context)
    documents = max(1, tokens // config.context)
    with recorded() as recorder:
        model = GPT(c).train()
        optimizer = Optimizer(model, 0.01, matrix_lr=0.02, embed_lr=0.1, head_lr=0.003, betas=(0.8, 0.95))
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step(1.0)  # the second one has its moments
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        recorder.ops.clear()
        with torch.device("cpu"):
            p = pack([[1] * config.context] * documents)
            targets = next_tokens(p, IGNORE)
        loss = nll_sum(model, p, targets)
        (loss / config.batch_tokens).backward()
        micro = list(recorder.ops)
        del loss
        recorder.ops.clear()
        optimizer.step(1.0)
    attention_flops(micro, config.context)
    groups = len(optimizer.adamw.param_groups)
    return micro, recorder.ops, groups, recorder.peak, model


def by_part(ops):
    """{part: seconds}, the longest first."""
    parts = collections.Counter()
    for op in ops:
        parts[op.part] += op.seconds
    return dict(parts.most_common())


def training_row(config, gpu, tokens):
    """What is predicted of a step with micro-batches of `tokens` tokens."""
    micro, update, groups, peak, model = record_training(config, tokens)
    for op in [*micro, *update]:
        rate(op, gpu)
    micro_s, update_gpu = (sum(op.seconds for op in ops) for ops in (micro, update))
    # The host asks whether the norm is finite, so the GPU is idle when the updates are launched.
    update_s = max(update_gpu, HOST_OP * sum(op.launches for op in update) + HOST_GROUP * groups)
    batch = max(config.batch_tokens, tokens)
    step_s = micro_s * batch / tokens + update_s
    tokens_per_s = batch / step_s
    parameters = sum(p.numel() for p in model.parameters())
    hours = 20 * parameters / tokens_per_s / 3600
    return {
        "micro_batch_tokens": tokens,
        "micro_ms": 1e3 * micro_s,
        "step_ms": 1e3 * step_s,
        "optimizer_ms": 1e3 * update_s,
        "launches": sum(op.launches for op in micro),
        "waits": sum(op.wait for op in micro),
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * model.flops_per_token(config.context) / gpu.flops_per_s,
        "gib": peak / 2**30,
        "hours": hours,
        "dollars": hours * gpu.dollars_per_hour,
        "parts_ms": {part: 1e3 * s for part, s in by_part(micro).items()},
    }


# --------------------------------------------------------------------------------------------------
# A decode step


def record_decode(shape, slots, **settings):
    """(ops of a decode step of `slots` slots, model)."""
    layers, width, heads, kv_heads, head_dim, ffn, vocab = shape
    c = GPTConfig(vocab, layers, width, heads, kv_heads, head_dim, ffn, context=1024, tied=True)
    with recorded() as recorder:
        model = GPT(c)
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16) if p.dim() > 1 else p.data
        sampler = rollout.Sampler(model, slots, 1024)
        recorder.ops.clear()
        with torch.inference_mode(), rollout.unsorted_writes():
            sampler.step_slots(slots)
    return recorder.ops, model


def kept_bytes(c, slots, held):
    """Bytes of keys and values that a layer reads in a decode step, in bf16."""
    return 2 * 2 * c.kv_heads * c.head_dim * held * slots


def decode_floor(model, slots, held):
    """The least bytes of a decode step: weights, keys and values read once, in bf16."""
    weights = 2 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return weights + model.config.layers * kept_bytes(model.config, slots, held)


def decode_row(name, gpu, slots, held):
    """What is predicted of a decode step, beside the least that the memory allows."""
    ops, model = record_decode(SHAPES[name], slots)
    c = model.config
    kept = kept_bytes(c, slots, held)
    for op in ops:
        if op.part == "decode_attention":
            op.bytes = kept
        rate(op, gpu)
    seconds = sum(op.seconds for op in ops)
    floor = decode_floor(model, slots, held) / gpu.bytes_per_s
    launches = sum(op.launches for op in ops)
    per_layer = sum(op.launches for op in ops if op.part in IN_LAYER or op.part == "products") // c.layers
    return {
        "model": name,
        "slots": slots,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": slots / seconds,
        "of_floor": floor / seconds,
        "launches": launches,
        "per_layer": per_layer,
        "others": launches - per_layer * c.layers,
        "parts_ms": {part: 1e3 * s for part, s in by_part(ops).items()},
    }


IN_LAYER = ("norms", "append_rope", "decode_attention", "swiglu")

# --------------------------------------------------------------------------------------------------
# The report


def measured(results, gpu):
    """The rows that bench.train has measured on such a GPU, [] if there are none."""
    rows = []
    for path in sorted(Path(results).glob("train_*.json")):
        found = json.loads(path.read_text())
        if gpu in found["hardware"]:
            rows += [row for row in found.get("rows", []) if row.get("contender") == "kernels"]
    return rows


def main(config):
    check_ranges(config)
    if config.gpu not in GPUS:
        raise UserError(f"--gpu={config.gpu}: known are {', '.join(GPUS)}")
    if config.shape and config.shape not in SHAPES:
        raise UserError(f"--shape={config.shape}: known are {', '.join(SHAPES)}")
    gpu = GPUS[config.gpu]
    torch.use_deterministic_algorithms(True, warn_only=True)  # as runtime/process.py does
    print(f"PREDICTED, not measured: training on one {config.gpu}, depth {config.depth}, context {config.context}")
    print(
        f"{'micro-batch':>11} {'ms':>7} {'launches':>8} {'waits':>5} {'step ms':>8} {'tokens/s':>9} {'MFU':>6} "
        f"{'GiB':>5} {'hours':>6} {'dollars':>7}"
    )
    sizes = [config.micro_batch_tokens] if config.micro_batch_tokens else [8192, 16384, 32768, 65536, 131072]
    rows = [training_row(config, gpu, tokens) for tokens in sizes]
    for row in rows:
        fits = "" if row["gib"] < 0.9 * gpu.gib else f"  does not fit into {gpu.gib:.0f} GiB"
        print(
            f"{row['micro_batch_tokens']:>11,} {row['micro_ms']:>7.1f} {row['launches']:>8} {row['waits']:>5} "
            f"{row['step_ms']:>8.1f} {row['tokens_per_s']:>9,.0f} {row['mfu']:>6.1%} {row['gib']:>5.1f} "
            f"{row['hours']:>6.2f} {row['dollars']:>7.2f}{fits}"
        )
    row = rows[min(2, len(rows) - 1)]
    parts = ", ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms"].items())
    print(f"ms of a micro-batch of {row['micro_batch_tokens']:,}: {parts}; optimizer {row['optimizer_ms']:.1f}")
    for found in measured(config.results, config.gpu):
        print(f"MEASURED: {json.dumps(found)}")
    print(f"\nPREDICTED, not measured: decode steps on one {config.gpu}, {config.held} tokens held a slot")
    print(f"{'model':<14} {'slots':>5} {'ms':>6} {'tokens/s':>9} {'of floor':>8} {'launches':>8}")
    decode = []
    for name in [config.shape] if config.shape else SHAPES:
        for slots in (64, 128, 256):
            row = decode_row(name, gpu, slots, config.held)
            decode.append(row)
            print(
                f"{name:<14} {slots:>5} {row['step_ms']:>6.2f} {row['tokens_per_s']:>9,.0f} {row['of_floor']:>8.0%} "
                f"{row['launches']:>8} = {row['per_layer']} a layer + {row['others']}"
            )
    row = decode[min(1, len(decode) - 1)]
    parts = ", ".join(f"{part} {ms:.3f}" for part, ms in row["parts_ms"].items())
    print(f"ms of a step of {row['model']} with {row['slots']} slots: {parts}")
    print(json.dumps({"training": rows, "decode": decode}))


if __name__ == "__main__":
    launch(main, Config)
