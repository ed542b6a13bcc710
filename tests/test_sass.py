"""What the kernels compile to for Ampere, Hopper and Blackwell, without a GPU: no rule of bench/sass.py is broken, and no kernel escapes it. And the benches
that need a GPU to mean something run through at toy sizes."""
import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from bench import kernels as kernel_bench
from bench import sass
from bench import train as train_bench
from data.pack import pack
from kernels.head import linear_cross_entropy

pytest.importorskip("triton")

SOUND = {
    "kernel": "k", "case": "c", "dtype": "bf16", "arch": 90, "warps": 8, "stages": 2, "smem": 200_000, "tmem": 0, "dot": True, "registers": 255, "stack": 0, "spills": 0,
    "instructions": 900, "tensor": {"HGMMA": 16}, "loads": 4, "wide_loads": 4, "narrow_bytes": 0, "stores": 2, "wide_stores": 2, "atomics": 0,
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
        ({"tensor": {}}, "HGMMA"), ({"atomics": 1}, "atomics"), ({"dot": False, "narrow_bytes": 65}, "loads"), ({"wide_loads": 0}, "loads"), ({"dot": False, "wide_stores": 0}, "stores"), ({"arch": 80}, "shared"),
    ],
)  # fmt: skip
def test_the_judge_sees_what_is_wrong(planted, word):
    assert sass.broken(SOUND) == [] and sass.broken(SOUND | {"dot": False}) == []
    assert any(word in rule for rule in sass.broken(SOUND | planted))


def test_the_stated_exception_goes_no_further_than_stated():
    row = SOUND | {"kernel": "dkdv_kernel", "arch": 80, "smem": 100_000, "tensor": {"HMMA": 64}}
    assert sass.broken(row | {"stack": 32}) == [] and sass.broken(row | {"stack": 40}) and sass.broken(row | {"stack": 8, "arch": 90, "tensor": {"HGMMA": 1}})


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


# ---------------------------------------------------------------------------------------------------------------------------------
# The other two benches


def test_the_bench_of_kernels_runs_and_judges(kernels_run, tmp_path, capsys):
    kernel_bench.main(kernel_bench.Config(tiny=True, rounds=1, device=kernels_run.type, out=str(tmp_path)))
    (written,) = tmp_path.glob("kernels_*.json")
    rows = json.loads(written.read_text())["rows"]
    ours = [row for row in rows if row["contender"] == kernel_bench.OURS]
    assert {row["op"].split(" ")[0] for row in ours} >= {"attention", "decode_attention", "linear_cross_entropy", "linear_logprob", "rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu"}
    assert all(row["error"] < (3e-2 if kernels_run.type == "cuda" else 1e-5) and row["us"] > 0 for row in ours), ours
    assert len([row for row in rows if "us" in row and row["contender"] == "compiled"]) >= 10
    assert "attention packed" in capsys.readouterr().out


def test_what_was_asked_is_judged():
    contest = kernel_bench.Contest("op", "shape", "TF/s", 1e12, None, {}, rate=500, speed={"fast": 0.8, "gone": 1.0}, memory={"fast": 0.25})
    rows = {"kernel": {"us": 100.0, "mib": 10, "rate": 450}, "fast": {"us": 90.0, "mib": 50}, "gone": {"absent": "ImportError"}}
    kernel_bench.judge(contest, rows)
    assert [row["reached"] for row in rows.values()] == [False, True, None]
    contest.rate, contest.speed["fast"], rows["fast"]["mib"] = 400, 1.0, 50
    kernel_bench.judge(contest, rows)
    assert [row["reached"] for row in rows.values()] == [True, False, None]


def test_the_bench_of_training_runs(tmp_path, capsys):
    train_bench.main(train_bench.Config(tiny=True, device="cpu", out=str(tmp_path)))
    rows = json.loads((tmp_path / "train_cpu.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["baseline", "kernels", "kernels, compile", "references, compile"] and all(row["tokens_per_s"] > 0 for row in rows)
    assert "tokens/s" in capsys.readouterr().out


def test_the_baseline_of_the_training_bench_is_the_same_model(make_model):
    """Its loss equals ours with the same weights: two scripts that do the same work."""
    model = make_model(kv_heads=4)
    c = model.config
    baseline = train_bench.Baseline(c)
    state = {"embed.weight": model.embed, "norm.weight": model.norm, "head.weight": model.head}
    for i, block in enumerate(model.blocks):
        for name, p in block.named_parameters():
            state[f"blocks.{i}.{name}.weight"] = p
    baseline.load_state_dict(state)
    tokens = torch.randint(c.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    p = pack(tokens)
    targets = tokens.roll(-1, 1)
    loss = linear_cross_entropy(model(p), model.head, targets.flatten())
    assert torch.allclose(baseline(tokens, targets), loss, rtol=1e-4)
