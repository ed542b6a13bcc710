"""What the kernels compile to for Ampere, Hopper and Blackwell, without a GPU: no rule of
bench/sass.py is broken, and no kernel escapes it. And the benches that need a GPU to mean something
run at toy sizes."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from bench import kernels as kernel_bench, sass, train as train_bench
from data.pack import pack
from kernels.head import linear_cross_entropy

pytest.importorskip("triton")

SOUND = {
    "kernel": "k",
    "case": "c",
    "dtype": "bf16",
    "arch": 90,
    "warps": 8,
    "stages": 2,
    "smem": 200_000,
    "tmem": 0,
    "dot": True,
    "registers": 255,
    "stack": 0,
    "spills": 0,
    "instructions": 900,
    "tensor": {"HGMMA": 16},
    "loads": 4,
    "wide_loads": 4,
    "narrow_bytes": 0,
    "stores": 2,
    "wide_stores": 2,
    "atomics": 0,
    "fused": False,
}


def is_jitted(function):
    return any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)


def kernels_defined():
    """Names of the @triton.jit functions of kernels/*.py that are launched: those that no other of
    them calls."""
    nodes = [node for file in (ROOT / "kernels").glob("*.py") for node in ast.parse(file.read_text()).body]
    jitted = [node for node in nodes if isinstance(node, ast.FunctionDef) and is_jitted(node)]
    calls = [node for function in jitted for node in ast.walk(function) if isinstance(node, ast.Call)]
    called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    return {function.name for function in jitted} - called


def run_python(*args, **environment):
    """stdout of a Python process in which kernels are compiled instead of interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arch", [80, 90])  # bench/sass.sh: all of sass.ARCHS
def test_every_kernel_compiles_and_no_rule_is_broken(arch, tmp_path):
    run_python("-m", "bench.sass", "--quick", f"--arch={arch}", f"--out={tmp_path / 'rows.json'}")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    expected = kernels_defined() if arch == 90 else {"forward_kernel", "dq_kernel", "dkdv_kernel"}
    assert {row["kernel"] for row in rows} == expected
    assert all(sass.broken(row) == [] and row["arch"] == arch for row in rows)


@pytest.mark.parametrize(
    "planted, word",
    [
        ({"stack": 8, "spills": 2}, "spills"),
        ({"smem": 240_000}, "shared"),
        ({"tmem": 516}, "tensor memory"),
        ({"instructions": 16}, "empty"),
        ({"tensor": {"HMMA": 64}}, "HGMMA"),
        ({"tensor": {}}, "HGMMA"),
        ({"atomics": 1}, "atomics"),
        ({"kernel": "draw_kernel", "fused": True}, "fused"),
        ({"dot": False, "narrow_bytes": 65}, "loads"),
        ({"wide_loads": 0}, "loads"),
        ({"dot": False, "wide_stores": 0}, "stores"),
        ({"arch": 80}, "shared"),
    ],
)
def test_the_judge_sees_what_is_wrong(planted, word):
    assert sass.broken(SOUND) == [] and sass.broken(SOUND | {"dot": False}) == []
    assert any(word in rule for rule in sass.broken(SOUND | planted))


def test_the_stated_exception_extends_no_further_than_stated():
    row = SOUND | {"kernel": "dkdv_kernel", "arch": 80, "smem": 100_000, "tensor": {"HMMA": 64}}
    assert sass.broken(row | {"stack": 32}) == [] and sass.broken(row | {"stack": 40})
    hopper = row | {"arch": 90, "tensor": {"HGMMA": 64}}
    assert sass.broken(hopper | {"stack": 8}) == [] and sass.broken(hopper | {"stack": 16})


PLANTED = """
import json, torch
from bench import sass
driver, recorded = sass.compile_only()
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
"""


def test_spills_and_atomics_are_read_from_machine_code(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)  # triton reads the source of a kernel
    found = run_python(str(tmp_path / "planted.py"), PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    adds, spills = json.loads(found)
    assert adds["atomics"] > 0 and adds["stack"] == 0 and spills["atomics"] == 0
    assert spills["stack"] > 0 and spills["spills"] > 0 and spills["tensor"]["HMMA"] > 0


# --------------------------------------------------------------------------------------------------
# The other two benches

OPS = {"attention", "decode_attention", "linear_cross_entropy", "linear_logprob", "linear_logprob+entropy"}
OPS |= {"rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of memory behind V that is never used
def test_the_bench_of_kernels_runs_and_judges(kernels_run, tmp_path, capsys):
    kernel_bench.main(kernel_bench.Config(tiny=True, rounds=1, device=kernels_run.type, out=str(tmp_path)))
    (written,) = tmp_path.glob("kernels_*.json")
    rows = json.loads(written.read_text())["rows"]
    ours = [row for row in rows if row["contender"] == kernel_bench.OURS]
    assert {row["op"].split(" ")[0] for row in ours} == OPS
    limit = 3e-2 if kernels_run.type == "cuda" else 1e-5
    assert all(row["error"] < limit and row["us"] > 0 for row in ours), ours
    assert len([row for row in rows if "us" in row and row["contender"] == "compiled"]) >= 10
    assert "attention packed" in capsys.readouterr().out


def test_what_is_wanted_is_judged():
    contest = kernel_bench.Contest("op", "shape", "TF/s", 1e12, None, {}, wanted_rate=500)
    contest.wanted_speed, contest.wanted_memory = {"fast": 0.8, "gone": 1.0}, {"fast": 0.25}
    rows = {
        "kernel": {"us": 100.0, "mib": 10, "rate": 450},
        "fast": {"us": 90.0, "mib": 50},
        "gone": {"absent": "ImportError"},
    }
    kernel_bench.judge(contest, rows)
    assert [row["reached"] for row in rows.values()] == [False, True, None]
    contest.wanted_rate, contest.wanted_speed["fast"], rows["fast"]["mib"] = 400, 1.0, 50
    kernel_bench.judge(contest, rows)
    assert [row["reached"] for row in rows.values()] == [True, False, None]


def test_the_bench_of_training_runs(tmp_path, capsys):
    train_bench.main(train_bench.Config(tiny=True, device="cpu", out=str(tmp_path)))
    rows = json.loads((tmp_path / "train_cpu.json").read_text())["rows"]
    contenders = ["baseline", "kernels", "kernels+compile", "references+compile"]
    assert [row["contender"] for row in rows] == contenders and all(row["tokens_per_s"] > 0 for row in rows)
    assert "tokens/s" in capsys.readouterr().out


def test_the_baseline_of_the_training_bench_is_the_same_model(make_model):
    """Its loss equals ours with the same weights: two scripts that do the same work."""
    model = make_model(kv_heads=4)
    c = model.config
    baseline = train_bench.Baseline(c)
    state = {"embed.weight": model.embed, "norm.weight": model.norm, "head.weight": model.head}
    for i, block in enumerate(model.blocks):
        for name, p in block.named_parameters():
            state[f"blocks.{i}.{name.rpartition('.')[2]}.weight"] = p
    baseline.load_state_dict(state)
    tokens = torch.randint(c.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    p = pack(tokens)
    targets = tokens.roll(-1, 1)
    loss = linear_cross_entropy(model(p), model.head, targets.flatten())
    assert torch.allclose(baseline(tokens, targets), loss, rtol=1e-4)
