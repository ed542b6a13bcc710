"""Over-optimisation: a policy that follows a weak reward model for long enough does well by it and
badly in truth, unless KL to where it began has a price.

A reward model from 64 pairs of the embedded world, and PPO against it, without a price and with
one; the gold reward, which no stage sees, is logged beside the proxy. After Gao et al. 2022 (arXiv
2210.10760), whose proxy rises on and on while gold rises and then falls. Prints the curves, then
for each price the best gold along the way and the gold of the last tenth; writes an SVG where
matplotlib is there. Last line of output: JSON.

    python -m bench.overoptimisation --quickstart=out/quickstart
"""

import json, statistics, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.errors import UserError
from runtime.process import describe, launch
from quickstart import table


@dataclass
class Config:
    quickstart: str = "out/quickstart"  # a finished quick start, whose sft, weak reward model and world are used
    out: str = "out/bench_overoptimisation"  # directory of the runs; what is finished there is not run again
    betas: str = "0,0.15"  # prices of a nat, comma-separated
    steps: int = 64  # of PPO
    lr: float = 7e-4  # of the policy
    seed: int = 0


def curve(config, beta):
    """[{"step", "proxy", "gold", "kl"}, ...] of one PPO run."""
    out, start = Path(config.out) / f"beta_{beta}", config.quickstart
    flags = {"init": f"{start}/sft", "reward": f"{start}/weak_rm", "data": f"{start}/world/prompts.jsonl", "monitor": "data/world.py:gold", "max_new_tokens": 64, "beta": beta, "steps": config.steps,
             "lr": config.lr, "seed": config.seed, "stop_kl": 0, "min_accuracy": 0, "eval_every": 0, "print_every": 8, "out": out}  # fmt: skip
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
                xlabel="KL to SFT, nats an answer",
                title={"proxy": "what the weak reward model says", "gold": "what the answers are worth"}[name],
            )
    axes[0].legend()
    figure.savefig(path)


def main(config):
    if not (Path(config.quickstart) / "weak_rm").is_dir():
        raise UserError(f"--quickstart={config.quickstart}: no weak_rm there; python quickstart.py makes one")
    curves = {beta: curve(config, beta) for beta in config.betas.split(",")}
    found = {}
    for beta, rows in curves.items():
        tenth = max(1, len(rows) // 10)
        gold = [r["gold"] for r in rows]
        best = max(range(len(gold) - tenth + 1), key=lambda i: statistics.mean(gold[i : i + tenth]))
        mean = lambda name, part: round(statistics.mean(r[name] for r in part), 3)  # noqa: E731
        first, top, last = rows[:tenth], rows[best : best + tenth], rows[-tenth:]
        found[beta] = {
            when: {name: mean(name, part) for name in ("proxy", "gold", "kl")}
            for when, part in (("first", first), ("best gold", top), ("last", last))
        }
        print(
            f"\nbeta {beta}\n"
            + table(
                [
                    ("step", "KL", "proxy", "gold"),
                    *(
                        (str(r["step"]), *(f"{r[n]:.2f}" for n in ("kl", "proxy", "gold")))
                        for r in rows[:: max(1, len(rows) // 16)]
                    ),
                ]
            )
        )
    print(f"\nmeans over a tenth of the steps; {describe(torch.device('cpu'))}")
    print(
        table(
            [
                ("beta", "when", "KL", "proxy", "gold"),
                *(
                    (beta, when, *(f"{f[n]:.2f}" for n in ("kl", "proxy", "gold")))
                    for beta, row in found.items()
                    for when, f in row.items()
                ),
            ]
        )
    )
    try:
        draw(curves, Path(config.out) / "overoptimisation.svg")
        print(f"drawn: {config.out}/overoptimisation.svg")
    except ImportError:
        print("no drawing: pip install matplotlib")
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
