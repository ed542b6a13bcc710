"""What the kernels compile to for Ampere, Hopper and Blackwell, without a GPU: no rule of bench/sass.py is broken, and no kernel escapes it."""
import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import sass

pytest.importorskip("triton")

SOUND = {
    "kernel": "k", "case": "c", "dtype": "bf16", "arch": 90, "warps": 8, "stages": 2, "smem": 200_000, "tmem": 0, "dot": True, "registers": 255, "stack": 0, "spills": 0,
    "instructions": 900, "tensor": {"HGMMA": 16}, "loads": 4, "wide_loads": 4, "stores": 2, "wide_stores": 2, "atomics": 0,
}  # fmt: skip


def kernels_defined():
    """Names of the @triton.jit functions of kernels/*.py that are launched: those that no other of them calls."""
    functions = [node for file in (ROOT / "kernels").glob("*.py") for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    jitted = {f.name: f for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)}
    called = {node.func.id for f in jitted.values() for node in ast.walk(f) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return set(jitted) - called


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_every_kernel_compiles_and_no_rule_is_broken(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "bench.sass", f"--arch={arch}", f"--out={tmp_path / 'rows.json'}"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == kernels_defined()
    assert all(sass.broken(row) == [] and row["arch"] == arch for row in rows)


@pytest.mark.parametrize(
    "planted, word",
    [
        ({"stack": 8, "spills": 2}, "spills"), ({"smem": 240_000}, "shared"), ({"tmem": 516}, "tensor memory"), ({"instructions": 16}, "empty"), ({"tensor": {"HMMA": 64}}, "HGMMA"),
        ({"tensor": {}}, "HGMMA"), ({"atomics": 1}, "atomics"), ({"dot": False, "wide_loads": 0}, "loads"), ({"dot": False, "wide_stores": 0}, "stores"), ({"arch": 80}, "shared"),
    ],
)  # fmt: skip
def test_the_judge_sees_what_is_wrong(planted, word):
    assert sass.broken(SOUND) == [] and sass.broken(SOUND | {"dot": False}) == []
    assert any(word in rule for rule in sass.broken(SOUND | planted))


PLANTED = '''
import json, sys, torch
from bench import sass
recorded = sass.compile_only(int(sys.argv[1]))
import triton
import triton.language as tl


@triton.jit
def adds(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(out_ptr + i % 8, tl.load(x_ptr + i))


@triton.jit
def spills(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    tl.store(out_ptr + i[:, None] * N + i[None, :], tl.dot(x, x))


x = torch.zeros(1 << 14, dtype=torch.bfloat16)
adds[(1,)](x.float(), x.float(), N=1024)
spills[(1,)](x, x.float(), N=64, num_warps=4, maxnreg=32)
print(json.dumps([sass.read_machine_code(compiled) for _, compiled in recorded]))
'''


def test_spills_and_atomics_are_read_from_machine_code(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    (tmp_path / "planted.py").write_text(PLANTED)
    done = subprocess.run([sys.executable, tmp_path / "planted.py", "80"], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    adds, spills = json.loads(done.stdout)
    assert adds["atomics"] > 0 and adds["stack"] == 0 and spills["atomics"] == 0
    assert spills["stack"] > 0 and spills["spills"] > 0 and spills["tensor"]["HMMA"] > 0
