"""The curves of docs/stages.md, one panel for each stage, drawn from the logs of a quick start.

Gold is what the stages never see. The colours suit a light and a dark page.

    python -m bench.figure --quickstart=out/quickstart --out=docs/curves.svg
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.read import read_jsonl
from runtime.errors import UserError
from runtime.process import launch

try:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

INK = "#7b8794"
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "feinschliff"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
BLUE, ORANGE, GREEN = "#3b76c4", "#d9822b", "#3d9a50"
GOLD, RULE = "data/world.py:gold", "data/rules.py:final_number"
PANELS = [  # (run, title, [(figure of its log, label, colour)])
    ("base", "pretrain.py: nats per token", [("loss", "training", BLUE), ("val_loss", "held out", ORANGE)]),
    ("sft", "sft.py: nats per trained token", [("loss", "training", BLUE), ("val_loss", "held out", ORANGE)]),
    ("rm", "reward.py", [("loss", "loss", BLUE), ("accuracy", "accuracy", GREEN)]),
    ("dpo", "dpo.py: rewards", [("chosen_reward", "chosen", GREEN), ("rejected_reward", "rejected", ORANGE)]),
    ("ppo", "ppo.py, per completion", [("reward", "reward", BLUE), (GOLD, "gold", GREEN), ("kl", "KL", ORANGE)]),
    ("grpo", "grpo.py, after PPO", [(RULE, "sums right", BLUE), (GOLD, "gold", GREEN), ("kl", "KL", ORANGE)]),
]


@dataclass
class Config:
    # a finished quick start
    quickstart: str = "out/quickstart"
    # file to write
    out: str = "docs/curves.svg"


def series(log, name):
    """([step], [value]) of the lines of a log that have this figure."""
    lines = [line for _, line in read_jsonl(log) if name in line and ("loss" in line or name == "val_loss")]
    return [line["step"] for line in lines], [line[name] for line in lines]


def smooth(values):
    """Running mean over a twentieth of the values: the course without the noise."""
    n = max(1, len(values) // 20)
    return [np.mean(values[max(0, i - n) : i]) for i in range(1, len(values) + 1)]


def draw(axes, log, title, curves):
    """One panel: the points of each figure, and their smoothed course where there are many."""
    for name, label, colour in curves:
        steps, values = series(log, name)
        if len(values) < 20:
            axes.plot(steps, values, "o", color=colour, markersize=4, label=label)
            continue
        if len(values) < 200:
            axes.plot(steps, values, ".", color=colour, markersize=2, alpha=0.4)
        axes.plot(steps, smooth(values), color=colour, linewidth=1.6, label=label)
    axes.set(title=title)
    axes.set_xlabel("step", loc="right")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # for the legend
    axes.legend(frameon=False, ncols=3, loc="upper center")


def main(config):
    if pyplot is None:
        raise UserError('matplotlib is not there: pip install matplotlib, or the extra "report"')
    with pyplot.rc_context(STYLE):
        figure, grid = pyplot.subplots(2, 3, figsize=(10, 5), layout="constrained")
        for axes, (run, title, curves) in zip(grid.flat, PANELS, strict=True):
            draw(axes, Path(config.quickstart) / run / "log.jsonl", title, curves)
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(config.out, transparent=True, metadata={"Date": None})
    print(config.out)


if __name__ == "__main__":
    launch(main, Config)
