"""Over-optimisation: a policy that follows a weak reward model for long enough does well by it and
badly in truth, unless KL to where it began has a price.

A reward model from 64 pairs of the embedded world, and PPO against it, without a price and with
one; the gold reward, which no stage sees, is logged beside the proxy. After Gao et al. 2022 (arXiv
2210.10760), whose proxy rises on and on while gold rises and then falls. Prints the curves, then
for each price the best gold along the way and the gold of the last tenth; writes an SVG where
matplotlib is there. Last line of output: JSON.

    python -m bench.overoptimisation --quickstart=out/quickstart
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from quickstart import table
from runtime.errors import UserError
from runtime.process import describe, launch


@dataclass
class Config:
    # a finished quick start, whose sft, weak reward model and world are used
    quickstart: str = "out/quickstart"
    # directory of the runs; what is finished there is not run again
    out: str = "out/bench_overoptimisation"
    # KL coefficients, comma-separated
    betas: str = "0,0.15"
    # of PPO
    steps: int = 64
    # of the policy
    lr: float = 7e-4
    seed: int = 0


def curve(config, beta):
    """[{"step", "proxy", "gold", "kl"}, ...] of one PPO run."""
    out, start = Path(config.out) / f"beta_{beta}", config.quickstart
    flags = {
        "init": f"{start}/sft",
        "reward": f"{start}/weak_rm",
        "data": f"{start}/world/prompts.jsonl",
        "monitor": "data/world.py:gold",
        "max_new_tokens": 64,
        "beta": beta,
        "steps": config.steps,
        "lr": config.lr,
        "seed": config.seed,
        "stop_kl": 0,
        "min_accuracy": 0,
        "eval_every": 0,
        "print_every": 8,
        "out": out,
    }
    command = [
        sys.executable,
        "ppo.py",
        *(f"--{name}={value}" for name, value in flags.items()),
        *(["--resume"] if out.exists() else []),
    ]
    if subprocess.run(command).returncode:
        raise UserError(f"PPO with beta {beta} failed; what it said stands above")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {"step": r["step"], "proxy": r["reward"], "gold": r["data/world.py:gold"], "kl": r["kl"]}
        for r in rows
        if "approx_kl" in r
    ]


def draw(curves, path):
    """Proxy and gold over the steps and over KL, one panel each, as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for (beta, rows), colour in zip(curves.items(), ("#c44e52", "#4c72b0", "#55a868", "#8172b2")):
        for axis, name in zip(axes, ("proxy", "gold")):
            axis.plot([r["kl"] for r in rows], [r[name] for r in rows], ".-", color=colour, label=f"beta {beta}")
            axis.set(
                xlabel="KL to SFT, nats per completion",
                title={"proxy": "what the weak reward model says", "gold": "what the completions are worth"}[name],
            )
    axes[0].legend()
    figure.savefig(path)


def means(rows):
    """{"kl", "proxy", "gold"}: their means over some steps."""
    return {name: round(statistics.mean(r[name] for r in rows), 3) for name in ("kl", "proxy", "gold")}


def cells(row):
    return [f"{row[name]:.2f}" for name in ("kl", "proxy", "gold")]


def main(config):
    if not (Path(config.quickstart) / "weak_rm").is_dir():
        raise UserError(f"--quickstart={config.quickstart}: no weak_rm there; python quickstart.py makes one")
    curves = {beta: curve(config, beta) for beta in config.betas.split(",")}
    found = {}
    for beta, rows in curves.items():
        tenth = max(1, len(rows) // 10)
        gold = [statistics.mean(r["gold"] for r in rows[i : i + tenth]) for i in range(len(rows) - tenth + 1)]
        best = gold.index(max(gold))
        parts = {"first": rows[:tenth], "best gold": rows[best : best + tenth], "last": rows[-tenth:]}
        found[beta] = {when: means(part) for when, part in parts.items()}
        shown = rows[:: max(1, len(rows) // 16)]
        lines = [("step", "KL", "proxy", "gold"), *((str(r["step"]), *cells(r)) for r in shown)]
        print(f"\nbeta {beta}\n{table(lines)}")
    print(f"\nmeans over a tenth of the steps; {describe(torch.device('cpu'))}")
    lines = [("beta", "when", "KL", "proxy", "gold")]
    for beta, row in found.items():
        lines += [(beta, when, *cells(part)) for when, part in row.items()]
    print(table(lines))
    try:
        draw(curves, Path(config.out) / "overoptimisation.svg")
        print(f"drawn: {config.out}/overoptimisation.svg")
    except ImportError:
        print("no drawing: pip install matplotlib")
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
