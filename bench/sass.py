"""What the kernels compile to, read from the machine code, without a GPU: registers, spills, shared
memory, tensor-core instructions, wide loads, atomics.

The real ops run, forward and backward, on small CPU tensors of realistic widths. A stub stands in
for triton's CUDA driver: every `kernel[grid](...)` is compiled for the wanted architecture and
recorded instead of launched, so what is checked here is what is launched there. Results are
garbage; only widths, dtypes and alignments matter. `broken` judges each row. This needs nothing but
the triton wheel, whose own ptxas, cuobjdump and nvdisasm do the work.

    python -m bench.sass               sm_80, 89, 90, 100, 120; exit status 1 if a rule is broken
    python -m bench.sass --quick       what the tests run: the cases in QUICK
    bash bench/sass.sh                 under the oldest and the newest triton of pyproject.toml
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.cli import launch
from runtime.errors import UserError


@dataclass
class Config:
    # 80, 89, 90, 100 or 120; 0: all of them
    arch: int = 0
    # cases whose name begins with this: attention, linear, ...
    only: str = ""
    # only the cases in QUICK
    quick: bool = False
    # also write the rows to this JSON file
    out: str = ""


# architecture: (shared memory a block may have, in bytes; the tensor cores' instruction;
# multiprocessors of A100, RTX 4090, H100, B200, RTX 5090)
ARCHS = {
    80: (163 * 1024, "HMMA", 108),
    89: (99 * 1024, "HMMA", 128),
    90: (227 * 1024, "HGMMA", 132),
    100: (227 * 1024, "UTCHMMA", 148),
    120: (99 * 1024, "HMMA", 170),
}

# --------------------------------------------------------------------------------------------------
# The rules

# (kernel, architecture): most bytes of stack, a few of 255 registers. Smaller blocks cost more; on
# sm_90, where triton 3.6 needs them, that was measured (bench.gpu --part=sweep).
SPILLS = {("dkdv_kernel", 80): 32, ("dkdv_kernel", 90): 8}
# They write a small part of what they read; the second one without gradients.
SUMS = {"logprob_kernel", "cross_entropy_kernel", "kl_kernel", "combine_kernel"}
# Their products and sums must be rounded one by one, as they are written.
UNFUSED = {"draw_kernel", "logprob_kernel", "logprob_backward_kernel", "kl_kernel"}
# They read or write single numbers: of a slot, or a cut row's few candidates.
SCATTERED = {"draw_kernel", "record_draw_kernel"}
# Their products have 16 rows. HGMMA and UTCHMMA begin at 64, so these use HMMA everywhere.
SMALL_DOTS = {"decode_kernel"}


def broken(row):
    """The rules that this row breaks, in words; [] for a sound kernel."""
    smem, tensor_core, _ = ARCHS[row["arch"]]
    tensor_core = "HMMA" if row["kernel"] in SMALL_DOTS else tensor_core
    half = row["dtype"] != "fp32"  # a GPU trains in bf16: tensor cores and registers do not matter for exact products
    wrong = []
    if half and row["stack"] > SPILLS.get((row["kernel"], row["arch"]), 0):
        wrong.append(f"spills: {row['stack']} bytes of stack, {row['spills']} instructions")
    if row["smem"] > smem:
        wrong.append(f"{row['smem']} bytes of shared memory, over {smem}")
    if row["tmem"] > 512:  # triton then emits an empty kernel, and no error
        wrong.append(f"{row['tmem']} columns of tensor memory, over 512")
    if row["instructions"] < (200 if row["dot"] else 30):
        wrong.append(f"only {row['instructions']} instructions: an empty kernel?")
    if row["dot"] and half and not row["tensor"].get(tensor_core):
        wrong.append(f"no {tensor_core}: {row['tensor'] or 'no tensor core at all'}")
    scattered = row["kernel"] in SCATTERED
    no_wide_loads = not row["wide_loads"] and row["kernel"] != "record_draw_kernel"
    if no_wide_loads or not row["dot"] and not scattered and row["narrow_bytes"] > 16 * row["wide_loads"]:
        wrong.append(f"of {row['loads']} loads {row['wide_loads']} have 128 bits, and the others move more bytes")
    if not row["dot"] and not row["wide_stores"] and row["kernel"] not in SUMS | SCATTERED:
        wrong.append(f"memory-bound, yet none of its {row['stores']} stores has 128 bits")
    if row["fused"] and row["kernel"] in UNFUSED:
        wrong.append("products and sums may be fused, which rounds differently from what is written")
    if row["atomics"]:
        wrong.append(f"{row['atomics']} global atomics: the order of their sums is random")
    return wrong


# --------------------------------------------------------------------------------------------------
# Compile instead of launch


class StubDriver:
    """What triton asks of a driver on the way to a compiled kernel; a device per architecture."""

    arch = 80

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def compile_only():
    """Makes every later launch in this process compile for `driver.arch` and be recorded.

    Returns driver, and the growing list of (kernel function, compiled kernel). Call it before the
    kernel files are imported: they take `use`, `arch` and `sm_count` from _lib by name.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # a kernel that is defined under it never compiles
    os.environ["FEINSCHLIFF_KERNELS"] = "1"
    import triton
    from triton.runtime.jit import JITFunction

    from kernels import _lib

    driver = StubDriver()
    _lib.use = lambda op, x: x.dtype != torch.float64
    _lib.arch = lambda device: _lib.family(divmod(driver.arch, 10))
    _lib.sm_count = lambda device: ARCHS[driver.arch][2]
    triton.runtime.driver.set_active(driver)
    recorded, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        recorded.append((self, compiled))
        return compiled

    JITFunction.run = record
    return driver, recorded


# --------------------------------------------------------------------------------------------------
# Read the machine code

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)([.\w]*)", re.M)


def tool(name):
    """The path of one of the wheel's own tools. Raises UserError if the wheel has none."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise UserError(f"{path} is missing: this triton has no NVIDIA tools; pip's wheel for Linux has them")
    return path


def read_machine_code(compiled):
    """What a row says of the code of a compiled kernel, as a dict."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    code = collections.Counter(INSTRUCTION.findall(sass))
    code = {key: n for key, n in code.items() if key[0] != "NOP"}  # padding

    def count(*names, wide=False):
        matches = [key for key in code if key[0] in names and (not wide or re.search(r"\.(128|256)\b", key[1]))]
        return sum(code[key] for key in matches)

    def width(suffix):
        return next((bits // 8 for bits in (256, 128, 64, 16, 8) if re.search(rf"\.[US]?{bits}\b", suffix)), 4)

    narrow = {key: n for key, n in code.items() if key[0] in ("LDG", "LDGSTS") and width(key[1]) < 16}
    atomic = {name for name, _ in code if name.startswith(("ATOM", "RED", "UTMARED", "UBLKRED"))}
    atomic -= {"ATOMS", "REDAS", "REDUX"}  # in shared memory; within a warp
    return {
        "registers": registers,
        "stack": stack,
        "spills": count("STL", "LDL"),
        "instructions": sum(code.values()),
        "tensor": {name: count(name) for name in TENSOR_CORES if count(name)},
        "atomics": count(*atomic),
        "narrow_bytes": sum(n * width(suffix) for (_, suffix), n in narrow.items()),
        "loads": count("LDG", "LDGSTS", "UTMALDG"),
        "wide_loads": count("LDG", "LDGSTS", wide=True) + count("UTMALDG"),
        "stores": count("STG", "UTMASTG"),
        "wide_stores": count("STG", wide=True) + count("UTMASTG"),
    }


# --------------------------------------------------------------------------------------------------
# The launches: each public op at the widths people train

# Cases are (name, dtype, op, inputs). 64 rows stand for any number that 16 divides, which is what
# triton specialises on.

# The cases of --quick: every kernel and every branch of it, where registers are scarce.
QUICK = {
    "swiglu F=2048",
    "rms_norm C=2048",
    "add_rms_norm C=2048",
    "qk_norm_rope Dh=128",
    "rope Dh=128",
    "linear_cross_entropy V=50304",
    "linear_cross_entropy V=50304 alone",
    "linear_logprob V=50304",
    "linear_logprob V=50304 entropy",
    "linear_kl V=50304 reverse",
    "linear_kl V=50304 forward",
    "attention Dh=64 G=4 window=0",
    "attention Dh=128 G=4 window=0",
    "attention Dh=128 G=1 window=256",
    "decode Dh=64 G=4 B=64",
    "decode Dh=128 G=8 B=4",
    "append_norm_rope Dh=128",
    "append_rope Dh=128",
    "draw V=151936",
    "draw V=151936 cut",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def zeros(dtype, *shape):
    return torch.zeros(shape, dtype=DTYPES[dtype])


def act_cases():
    from kernels.act import swiglu

    for dtype in DTYPES:
        yield "swiglu F=2048", dtype, swiglu, [zeros(dtype, 64, 4096)]


def norm_cases():
    from kernels.norm import add_rms_norm, rms_norm

    for dtype, width in [("bf16", 768), ("bf16", 1024), ("bf16", 2048), ("fp16", 768), ("fp32", 768)]:
        x, weight = zeros(dtype, 64, width), zeros("fp32", width)
        yield f"rms_norm C={width}", dtype, lambda x, w: rms_norm(x, w, 1e-6), [x, weight]
        yield f"add_rms_norm C={width}", dtype, lambda x, d, w: add_rms_norm(x, d, w, 1e-6), [x, x, weight]


def rope_cases():
    from kernels.rope import qk_norm_rope

    for dtype, dh in [("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp32", 64)]:
        qkv, weight = zeros(dtype, 64, 12 + 2 * 4, dh), zeros("fp32", dh)
        rest = zeros("fp32", 64, dh // 2), zeros("fp32", 64, dh // 2), 12, 1e-6

        def normed(x, q, k, rest=rest):
            return qk_norm_rope(x, q, k, *rest)

        def plain(x, rest=rest):
            return qk_norm_rope(x, None, None, *rest)

        yield f"qk_norm_rope Dh={dh}", dtype, normed, [qkv, weight, weight]
        yield f"rope Dh={dh}", dtype, plain, [qkv]


def head_cases():
    from kernels.head import linear_cross_entropy, linear_logprob

    targets = torch.zeros(64, dtype=torch.int64)

    def cross_entropy(x, w):
        return linear_cross_entropy(x, w, targets)

    def logprob(x, w):
        return linear_logprob(x, w, targets)

    def with_entropy(x, w):
        return linear_logprob(x, w, targets, entropy=True)

    for dtype, vocab in [("bf16", 50304), ("fp16", 8192), ("fp32", 8192)]:
        inputs = [zeros(dtype, 64, 32), zeros("fp32", vocab, 32)]  # any width: cuBLAS multiplies
        yield f"linear_cross_entropy V={vocab}", dtype, cross_entropy, inputs
        yield f"linear_cross_entropy V={vocab} alone", dtype, torch.no_grad()(cross_entropy), inputs
        yield f"linear_logprob V={vocab}", dtype, logprob, inputs
        yield f"linear_logprob V={vocab} entropy", dtype, with_entropy, inputs


def kl_cases():
    from kernels.kl import linear_kl

    for dtype, vocab in [("bf16", 50304), ("fp16", 8192), ("fp32", 8192)]:
        inputs = [zeros(dtype, 64, 32), zeros("fp32", vocab, 32)]
        for reverse in (True, False):

            def kl(x, w, reverse=reverse):
                return linear_kl(x, w, x.detach(), w.detach(), reverse=reverse)

            yield f"linear_kl V={vocab} {'reverse' if reverse else 'forward'}", dtype, kl, inputs
        yield f"linear_kl V={vocab} alone", dtype, torch.no_grad()(kl), inputs


def attention_cases():
    from kernels.attention import attention, layout

    shapes = [("bf16", dh, group, window) for dh in (32, 64, 128) for group, window in [(1, 0), (1, 256), (4, 0)]]
    cu_seqlens = torch.tensor([0, 200, 512], dtype=torch.int32)
    for dtype, dh, group, window in [*shapes, ("fp16", 64, 1, 0), ("fp32", 64, 1, 0)]:
        kv_heads = 4 // group

        def op(qkv, kv_heads=kv_heads, window=window):  # views of one tensor, as in the model
            q, k, v = qkv.split([4, kv_heads, kv_heads], dim=1)
            return attention(q, k, v, layout(cu_seqlens, qkv, qkv.shape[2]), window)

        yield f"attention Dh={dh} G={group} window={window}", dtype, op, [zeros(dtype, 512, 4 + 2 * kv_heads, dh)]


def decode_cases():
    from kernels.decode import append_rope, decode_attention

    # 4 slots are split over the multiprocessors; 64 are enough as they are. Every window is the
    # same code: it is an argument.
    shapes = [("bf16", dh, group, B) for dh in (64, 128) for group, B in [(1, 4), (4, 4), (8, 4), (4, 64)]]
    for dtype, dh, group, B in [*shapes, ("fp16", 64, 4, 4), ("fp32", 64, 4, 4)]:
        q, cache = zeros(dtype, B, 2 * group, dh), zeros(dtype, B, 2, 1024, dh).transpose(1, 2)

        def attend(q, k, v):
            return decode_attention(q, k, v, torch.full((len(q),), 1000))

        yield f"decode Dh={dh} G={group} B={B}", dtype, torch.no_grad()(attend), [q, cache, cache]
    for dtype, dh in [("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp32", 64)]:
        caches = zeros(dtype, 2, 4, 4, 1024, dh).transpose(2, 3)
        inputs = [zeros(dtype, 4, 12 + 2 * 4, dh), *caches]
        weight, angle = zeros("fp32", dh), zeros("fp32", 4, dh // 2)
        for name, w in [("append_norm_rope", weight), ("append_rope", None)]:

            def append(qkv, k, v, w=w, angle=angle):
                return append_rope(qkv, w, w, angle, angle, 12, 1e-6, k, v, torch.full((4,), 1000))

            yield f"{name} Dh={dh}", dtype, torch.no_grad()(append), inputs


def draw_cases():
    from kernels.draw import draw, record_draw

    def plain(logits, u):
        token, logp = draw(logits, u)
        numbers = [torch.zeros(4, dtype=torch.int64) for _ in range(4)]
        stop, tokens = torch.zeros(4, logits.shape[1], dtype=torch.bool), torch.zeros(4, 9, dtype=torch.int64)
        record_draw(token, logp, torch.arange(4), stop, tokens, zeros("fp32", 4, 9), *numbers)
        return logp

    def cut(logits, u):
        return draw(logits, u, 0.7, 50, 0.9)[1]

    def cut_by_row(logits, u):
        settings = zeros("fp32", 4, 1)
        return draw(logits, u, settings, settings, settings)[1]

    for name, op in [("", plain), (" cut", cut), (" cut by row", cut_by_row)]:
        inputs = [zeros("fp32", 4, 151936), zeros("fp32", 4)]
        yield f"draw V=151936{name}", "bf16", torch.no_grad()(op), inputs


CASES = [act_cases, norm_cases, rope_cases, head_cases, kl_cases, attention_cases, decode_cases, draw_cases]


def is_quick(case, dtype, arch):
    """Except on Hopper, only attention's largest heads: its blocks depend on the architecture, and
    registers and shared memory are scarce there."""
    return case in QUICK and dtype == "bf16" and (arch == 90 or case.startswith("attention Dh=128"))


def compile_all(archs, only="", quick=False):
    """Every row for these architectures. Cases that compile to the same kernel make one row."""
    driver, recorded = compile_only()
    from kernels.proof import with_gradients

    rows, seen = [], set()
    for arch in archs:
        driver.arch = arch
        for case, dtype, op, inputs in (case for cases in CASES for case in cases()):
            if not case.startswith(only) or quick and not is_quick(case, dtype, arch):
                continue
            recorded.clear()
            with_gradients(op, inputs)
            for kernel, compiled in recorded:
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                m = compiled.metadata
                row = {"kernel": kernel.__name__, "case": case, "dtype": dtype, "arch": m.target.arch}
                row |= {"warps": m.num_warps, "stages": m.num_stages, "smem": m.shared, "fused": m.enable_fp_fusion}
                row |= {"tmem": getattr(m, "tmem_size", None) or 0, "dot": "tt.dot" in compiled.asm["ttir"]}
                row |= read_machine_code(compiled)
                rows.append(row | {"broken": broken(row)})
    return rows


COLUMNS = ["kernel", "case", "dtype", "arch", "warps", "stages", "registers", "stack", "spills", "smem", "tmem"]
COLUMNS += ["instructions", "tensor", "loads", "stores", "atomics"]


def table(rows):
    """The rows as text; a row that breaks rules is followed by them."""

    def text(row, column):
        if column == "tensor":
            return " ".join(f"{name} {n}" for name, n in row["tensor"].items())
        return f"{row['wide_' + column]}/{row[column]}" if column in ("loads", "stores") else str(row[column])

    cells = [COLUMNS] + [[text(row, c) for c in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    for i, row in reversed(list(enumerate(rows))):
        lines[i + 2 : i + 2] = [f"    BROKEN: {rule}" for rule in row["broken"]]
    return "\n".join(lines)


def summary(rows):
    """One line per kernel: registers, bytes of stack and KiB of shared memory on each architecture.

    Each is the most of its bf16 cases.
    """
    by_kernel = {}
    for row in rows:
        if row["dtype"] == "bf16":
            by_kernel.setdefault(row["kernel"], {}).setdefault(row["arch"], []).append(row)
    lines = [f"{'registers/stack/KiB, bf16':<30}" + "".join(f"{f'sm_{arch}':<18}" for arch in ARCHS).rstrip()]
    for kernel, archs in by_kernel.items():
        cells = []
        for arch in ARCHS:
            most = {c: max((row[c] for row in archs.get(arch, [])), default=0) for c in ("registers", "stack", "smem")}
            cell = f"{most['registers']}/{most['stack']}/{most['smem'] / 1024:.0f}"
            cells.append(cell if arch in archs else "")
        lines.append((f"{kernel:<30}" + "".join(f"{cell:<18}" for cell in cells)).rstrip())
    return "\n".join(lines)


def main(config):
    if config.arch and config.arch not in ARCHS:
        raise UserError(f"--arch={config.arch}: use one of {', '.join(map(str, ARCHS))}, or 0 for all")
    try:
        import triton
    except ImportError:
        raise UserError("triton is missing: pip install triton (Linux only)") from None
    for name in ("cuobjdump", "nvdisasm", "ptxas"):
        tool(name)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # else kernels of another version of this file could be read back
        rows = compile_all([config.arch] if config.arch else list(ARCHS), config.only, config.quick)
    if not rows:
        raise UserError(f"--only={config.only}: no case begins with it, or none of these launches a kernel")
    print(f"torch {torch.__version__}, triton {triton.__version__}", end="; ")
    print(f"loads and stores: 128-bit or by TMA / all global ones\n\n{table(rows)}\n\n{summary(rows)}")
    if config.out:
        Path(config.out).write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if row["broken"]]
    print(f"\n{len(rows)} kernels, {len(wrong)} of them break a rule")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    launch(main, Config)
