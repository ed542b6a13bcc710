"""What the kernels compile to, read from the machine code, with no GPU: registers, spills, shared memory, tensor-core instructions, wide loads, atomics.

The real ops run, forward and backward, on small CPU tensors of realistic widths. A stub stands where triton's CUDA driver would, so every
`kernel[grid](...)` is compiled for the architecture asked for and recorded instead of launched: what is checked here is what is launched there. Results
are therefore garbage, and only widths, dtypes and alignments matter. Each row is judged by `broken`. Needs nothing but the triton wheel, whose own
ptxas, cuobjdump and nvdisasm do the work.

    python -m bench.sass               sm_80, sm_90, sm_100; exit status 1 where a rule is broken
    bash bench/sass.sh                 the same under the oldest and the newest triton that pyproject.toml allows
"""
import collections, json, multiprocessing, os, re, subprocess, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, launch


@dataclass
class Config:
    # 80, 90 or 100; 0: all three
    arch: int = 0
    # cases whose name begins with this: attention, head, ...
    only: str = ""
    # also write the rows to this JSON file
    out: str = ""


# architecture: (shared memory a block may have, in bytes; the tensor cores' instruction; multiprocessors of A100, H100, B200)
ARCHS = {80: (163 * 1024, "HMMA", 108), 90: (227 * 1024, "HGMMA", 132), 100: (227 * 1024, "UTCHMMA", 148)}

# ---------------------------------------------------------------------------------------------------------------------------------
# The rules


SPILLS = {("dkdv_kernel", 80): 32}  # {(kernel, architecture): most bytes of stack}: a few registers of 255, and smaller blocks would cost more
SUMS = {"logprob_kernel", "cross_entropy_kernel", "combine_kernel"}  # write a small part of what they read (the second: where no gradient is wanted)
SMALL_DOTS = {"decode_kernel"}  # their products have 16 rows: HGMMA and UTCHMMA begin at 64, so HMMA it is everywhere


def broken(row):
    """The rules this row breaks, in words; [] for a sound kernel."""
    smem, tensor_core, _ = ARCHS[row["arch"]]
    half = row["dtype"] != "fp32"  # fp32 must compile and be sound; a GPU trains in bf16, and exact products are not its tensor cores' work
    wrong = []
    if half and row["stack"] > SPILLS.get((row["kernel"], row["arch"]), 0):
        wrong.append(f"spills: {row['stack']} bytes of stack, {row['spills']} instructions")
    if row["smem"] > smem:
        wrong.append(f"{row['smem']} bytes of shared memory, over {smem}")
    if row["tmem"] > 512:
        wrong.append(f"{row['tmem']} columns of tensor memory, over 512")  # triton then emits an empty kernel, and no error
    if row["instructions"] < (200 if row["dot"] else 30):
        wrong.append(f"only {row['instructions']} instructions: an empty kernel?")
    if row["dot"] and half and not row["tensor"].get("HMMA" if row["kernel"] in SMALL_DOTS else tensor_core):
        wrong.append(f"no {tensor_core}: {row['tensor'] or 'no tensor core at all'}")
    if not row["wide_loads"] or not row["dot"] and row["narrow_bytes"] > 16 * row["wide_loads"]:
        wrong.append(f"of {row['loads']} loads {row['wide_loads']} are of 128 bits, and the others move more bytes")
    if not row["dot"] and not row["wide_stores"] and row["kernel"] not in SUMS:
        wrong.append(f"memory-bound, yet none of its {row['stores']} stores is of 128 bits")
    if row["atomics"]:
        wrong.append(f"{row['atomics']} global atomics: the order of their sums is chance")
    return wrong


# ---------------------------------------------------------------------------------------------------------------------------------
# Compile instead of launch


class StubDriver:
    """What triton asks of a driver on the way to a compiled kernel."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(arch):
    """Make every later launch in this process compile for `arch` and be recorded. Returns the growing list of (kernel function, compiled kernel).

    Before the kernel files are imported: they take `use`, `arch` and `sm_count` from _lib by name.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # a kernel defined under it is never compiled
    os.environ["FEINSCHLIFF_KERNELS"] = "1"
    import triton
    from triton.runtime.jit import JITFunction

    from kernels import _lib

    _lib.use = lambda op, x: x.dtype != torch.float64
    _lib.arch = lambda device: arch
    _lib.sm_count = lambda device: ARCHS[arch][2]
    triton.runtime.driver.set_active(StubDriver(arch))
    recorded, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        recorded.append((self, compiled))
        return compiled

    JITFunction.run = record
    return recorded


# ---------------------------------------------------------------------------------------------------------------------------------
# Read the machine code

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)([.\w]*)", re.M)


def tool(name):
    """The path of one of the wheel's own tools."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise UserError(f"{path} is missing: this triton has no NVIDIA tools; pip's wheel for Linux has them")
    return path


def read_machine_code(compiled):
    """{what a row says of the code} of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    code = collections.Counter(INSTRUCTION.findall(sass))
    code = {key: n for key, n in code.items() if key[0] != "NOP"}  # padding

    def count(*names, wide=False):
        return sum(n for (name, suffix), n in code.items() if name in names and (not wide or re.search(r"\.(128|256)\b", suffix)))

    def width(suffix):
        return next((bits // 8 for bits in (256, 128, 64, 16, 8) if re.search(rf"\.[US]?{bits}\b", suffix)), 4)

    atomic = {name for name, _ in code if name.startswith(("ATOM", "RED", "UTMARED", "UBLKRED"))} - {"ATOMS", "REDAS", "REDUX"}  # shared memory's; a warp's
    bulk = count("UTMALDG"), count("UTMASTG")
    return {
        "registers": registers, "stack": stack, "spills": count("STL", "LDL"), "instructions": sum(code.values()),
        "tensor": {name: count(name) for name in TENSOR_CORES if count(name)}, "atomics": count(*atomic),
        "narrow_bytes": sum(n * width(suffix) for (name, suffix), n in code.items() if name in ("LDG", "LDGSTS") and width(suffix) < 16),
        "loads": count("LDG", "LDGSTS") + bulk[0], "wide_loads": count("LDG", "LDGSTS", wide=True) + bulk[0],
        "stores": count("STG") + bulk[1], "wide_stores": count("STG", wide=True) + bulk[1],
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# The launches: each public op at the widths people train

# Each case: (name, dtype, op, inputs that may want a gradient). 64 rows stand for any number that 16 divides: what triton specialises on


def zeros(dtype, *shape):
    return torch.zeros(shape, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])


def act_cases():
    from kernels.act import swiglu

    for dtype in ("bf16", "fp16", "fp32"):
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
        qkv, weight, angle = zeros(dtype, 64, 12 + 2 * 4, dh), zeros("fp32", dh), zeros("fp32", 64, dh // 2)
        yield f"qk_norm_rope Dh={dh}", dtype, lambda x, q, k: qk_norm_rope(x, q, k, angle, angle, 12, 1e-6), [qkv, weight, weight]
        yield f"rope Dh={dh}", dtype, lambda x: qk_norm_rope(x, None, None, angle, angle, 12, 1e-6), [qkv]


def head_cases():
    from kernels.head import linear_cross_entropy, linear_logprob

    for dtype, vocab in [("bf16", 50304), ("fp16", 8192), ("fp32", 8192)]:  # a CPU multiplies fp16 slowly
        x, weight, targets = zeros(dtype, 64, 768), zeros("fp32", vocab, 768), torch.zeros(64, dtype=torch.int64)
        yield f"linear_cross_entropy V={vocab}", dtype, lambda x, w: linear_cross_entropy(x, w, targets), [x, weight]
        yield f"linear_cross_entropy V={vocab} alone", dtype, torch.no_grad()(lambda x, w: linear_cross_entropy(x, w, targets)), [x, weight]  # no gradients
        yield f"linear_logprob V={vocab}", dtype, lambda x, w: linear_logprob(x, w, targets), [x, weight]
        yield f"linear_logprob V={vocab} entropy", dtype, lambda x, w: linear_logprob(x, w, targets, entropy=True), [x, weight]


def attention_cases():
    from kernels.attention import attention, layout

    wanted = [("bf16", dh, group, window) for dh in (32, 64, 128) for group, window in [(1, 0), (1, 256), (4, 0)]] + [("fp16", 64, 1, 0), ("fp32", 64, 1, 0)]
    cu = torch.tensor([0, 200, 512], dtype=torch.int32)
    for dtype, dh, group, window in wanted:
        qkv = zeros(dtype, 512, 4 + 2 * (4 // group), dh)

        def op(qkv, kv_heads=4 // group, window=window, dh=dh):  # views of one tensor, as the model has them
            return attention(*qkv.split([4, kv_heads, kv_heads], dim=1), layout(cu, qkv, dh), window)

        yield f"attention Dh={dh} G={group} window={window}", dtype, op, [qkv]


def decode_cases():
    from kernels.decode import append_rope, decode_attention

    wanted = [("bf16", dh, group, B) for dh in (64, 128) for group, B in [(1, 4), (4, 4), (8, 4), (4, 64)]] + [("fp16", 64, 4, 4), ("fp32", 64, 4, 4)]
    for dtype, dh, group, B in wanted:  # 4 slots are split over the multiprocessors, 64 are enough as they are
        q, cache, lengths = zeros(dtype, B, 2 * group, dh), zeros(dtype, B, 1024, 2, dh), torch.full((B,), 1000)
        yield f"decode Dh={dh} G={group} B={B}", dtype, torch.no_grad()(lambda q, k, v: decode_attention(q, k, v, lengths)), [q, cache, cache]
    for dtype, dh in [("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp32", 64)]:
        qkv, weight, table, cache = zeros(dtype, 4, 12 + 2 * 4, dh), zeros("fp32", dh), zeros("fp32", 1024, dh // 2), zeros(dtype, 4, 1024, 4, dh)
        for name, weights in [("append_norm_rope", (weight, weight)), ("append_rope", (None, None))]:
            op = torch.no_grad()(lambda qkv, k, v: append_rope(qkv, *weights, table, table, 12, 1e-6, k, v, torch.full((4,), 1000)))
            yield f"{name} Dh={dh}", dtype, op, [qkv, cache, cache.clone()]


CASES = [act_cases, norm_cases, rope_cases, head_cases, attention_cases, decode_cases]


def compile_all(arch, only=""):
    """Every row for one architecture, in a process of its own. Two cases that compile to one and the same kernel make one row."""
    recorded = compile_only(arch)
    from kernels._lib import with_gradients

    rows, seen = [], set()
    for case, dtype, op, inputs in (case for cases in CASES for case in cases()):
        if not case.startswith(only):
            continue
        del recorded[:]
        with_gradients(op, inputs)
        for kernel, compiled in recorded:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                m = compiled.metadata
                row = {"kernel": kernel.__name__, "case": case, "dtype": dtype, "arch": m.target.arch, "warps": m.num_warps, "stages": m.num_stages, "smem": m.shared}
                row |= {"tmem": getattr(m, "tmem_size", None) or 0, "dot": "tt.dot" in compiled.asm["ttir"]} | read_machine_code(compiled)
                rows.append(row | {"broken": broken(row)})
    return rows


COLUMNS = ["kernel", "case", "dtype", "arch", "warps", "stages", "registers", "stack", "spills", "smem", "tmem", "instructions", "tensor", "loads", "stores", "atomics"]


def table(rows):
    """The rows as text, those that break a rule followed by the rules they break."""

    def text(row, column):
        if column == "tensor":
            return " ".join(f"{name} {n}" for name, n in row["tensor"].items())
        return f"{row['wide_' + column]}/{row[column]}" if column in ("loads", "stores") else str(row[column])

    cells = [COLUMNS] + [[text(row, c) for c in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in cells]
    for i, row in reversed(list(enumerate(rows))):
        lines[i + 2 : i + 2] = [f"    BROKEN: {rule}" for rule in row["broken"]]
    return "\n".join(lines)


def summary(rows):
    """A line a kernel: registers, bytes of stack, KiB of shared memory on each architecture, the most of its bf16 cases."""
    by_kernel = {}
    for row in rows:
        if row["dtype"] == "bf16":
            by_kernel.setdefault(row["kernel"], {}).setdefault(row["arch"], []).append(row)
    lines = [f"{'registers/stack/KiB, bf16':<30}" + "".join(f"{f'sm_{arch}':<18}" for arch in ARCHS).rstrip()]
    for kernel, archs in by_kernel.items():
        most = lambda arch, column: max(row[column] for row in archs[arch])  # noqa: E731
        cells = [f"{most(a, 'registers')}/{most(a, 'stack')}/{most(a, 'smem') / 1024:.0f}" if a in archs else "" for a in ARCHS]
        lines.append((f"{kernel:<30}" + "".join(f"{cell:<18}" for cell in cells)).rstrip())
    return "\n".join(lines)


def main(config):
    if config.arch and config.arch not in ARCHS:
        raise UserError(f"--arch={config.arch}: one of {', '.join(map(str, ARCHS))}, or 0 for all")
    try:
        import triton
    except ImportError:
        raise UserError("triton is missing: pip install triton (Linux only)") from None
    tool("cuobjdump"), tool("nvdisasm"), tool("ptxas")
    archs = [config.arch] if config.arch else list(ARCHS)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # or kernels compiled by another version of this file would be read back
        with ProcessPoolExecutor(min(len(archs), os.cpu_count()), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            rows = [row for rows in pool.map(compile_all, archs, [config.only] * len(archs)) for row in rows]
    if not rows:
        raise UserError(f"--only={config.only}: no case begins so, or it launches no kernel")
    print(f"torch {torch.__version__}, triton {triton.__version__}; loads and stores: 128-bit or by TMA / all global ones\n\n{table(rows)}\n\n{summary(rows)}")
    if config.out:
        Path(config.out).write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if row["broken"]]
    print(f"\n{len(rows)} kernels, {len(wrong)} of them break a rule")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    launch(main, Config)
