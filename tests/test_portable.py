"""Every script on a machine without Triton: imported, and run through a tiny quick start, with the
largest seed that a flag takes."""

import importlib
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
SEED = 2**63 - 1
# {script: flags}, in the order of running; {o} is the folder of all outputs
RUNS = {
    "data.world": "--out={o}/world --stories=40 --notes=8 --chats=24 --pairs=24 --problems=24 --tests=8",
    "data.tokenizer": "--data={o}/world/pretrain.jsonl --out={o}/tok --vocab_size=400",
    "data.prepare": "--data={o}/world/pretrain.jsonl --tokenizer={o}/tok --out={o}/data --val_fraction=0.1",
    "pretrain": "--data={o}/data --out={o}/base --depth=1 --width=16 --heads=2 --kv_heads=1 --ffn=16 --context=256"
    " --batch_tokens=512",
    "sft": "--init={o}/base --data={o}/world/chat.jsonl --out={o}/sft --batch_tokens=512 --val_fraction=0.2",
    "reward": "--init={o}/sft --data={o}/world/pairs.jsonl --out={o}/rm --batch_size=4 --val_fraction=0.2",
    "dpo": "--init={o}/sft --data={o}/world/pairs.jsonl --out={o}/dpo --batch_size=4 --val_fraction=0.2",
    "ppo": "--init={o}/sft --reward={o}/rm --data={o}/world/prompts.jsonl --out={o}/ppo --prompts_per_step=2"
    " --eval_prompts=2 --min_accuracy=0 --temperature=0.01",
    "grpo": "--init={o}/sft --reward=data/world.py:gold --data={o}/world/problems.jsonl --out={o}/grpo"
    " --prompts_per_step=2 --group_size=2 --eval_prompts=2 --temperature=0.01",
    "distill": "--init={o}/sft --teacher={o}/sft --data={o}/world/prompts.jsonl --out={o}/distill --prompts_per_step=2"
    " --eval_prompts=2 --val_fraction=0.2",
    "rlaif": "--policy={o}/sft --judge={o}/base --data={o}/world/prompts.jsonl --out={o}/ai.jsonl --limit=2"
    " --constitution={o}/world/constitution.txt --temperature=1e-30",
    "evaluate": "--model={o}/sft --data={o}/world/prompts.jsonl --reward=data/world.py:gold --limit=2 --out={o}/e.json"
    " --temperature=1e-30",
    "sample": "--model={o}/sft --prompt=Hello --temperature=1e-30",
}
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill")
SAMPLING = ("ppo", "grpo", "distill", "rlaif", "evaluate", "sample")


def run_blocked(out):
    """In a process of its own: import every script of the product, run those of RUNS."""
    sys.modules["triton"] = None  # `import triton` raises ImportError
    from runs import here

    from runtime.cli import parse_cli

    for path in sorted(ROOT.glob("*.py")):
        importlib.import_module(path.stem)
    for name, flags in RUNS.items():
        script, words = importlib.import_module(name), flags.format(o=out).split()
        words += ["--device=cpu"] * (not name.startswith("data.")) + [f"--seed={SEED}"] * (name != "data.tokenizer")
        words += ["--steps=1"] * (name in STAGES) + ["--max_new_tokens=4"] * (name in SAMPLING)
        here(script.main, parse_cli(script.Config, words))
    assert not any(name == "triton" or name.startswith("triton.") for name, module in sys.modules.items() if module)


def test_every_script_runs_without_triton_and_with_the_largest_seed(tmp_path):
    code = "import sys; sys.path += ['tests']; import test_portable; test_portable.run_blocked(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in STAGES[:1] + STAGES[3:]:
        assert (tmp_path / {"pretrain": "base"}.get(name, name) / "step_000001").exists()
    assert (tmp_path / "ai.jsonl").exists() and (tmp_path / "e.json").stat().st_size


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"data.tokenizer"}) + ["quickstart"])
def test_other_seeds_are_refused_before_anything_is_read(name, seed, tmp_path):
    script = importlib.import_module(name)
    needed = {f.name: str(tmp_path / "x") for f in fields(script.Config) if f.default is MISSING}
    with pytest.raises(UserError, match=f"--seed={seed}: a count was expected"):
        script.main(script.Config(**needed, seed=seed))
    assert not list(tmp_path.iterdir())
