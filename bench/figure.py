"""The README's figure, drawn from the logs of a quick start: how a model learns to speak, and then
to be kind and right.

Left the loss of pretraining, on stories and notes. Right the gold reward of the answers sampled
while PPO learns from the reward model and then GRPO from the sums, with their smoothed course; gold
is what the stages never see. The colours suit a light and a dark page.

    python -m bench.figure --quickstart=out/quickstart --out=docs/quickstart.svg
"""

from dataclasses import dataclass
from pathlib import Path

from report import read_run, series, smooth
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
LABELS = {"ppo": "ppo.py: people's preferences", "grpo": "grpo.py on top: sums that check out"}


@dataclass
class Config:
    # a finished quick start
    quickstart: str = "out/quickstart"
    # file to write
    out: str = "docs/quickstart.svg"


def main(config):
    if pyplot is None:
        raise UserError('matplotlib is not there: pip install matplotlib, or the extra "report"')
    start = Path(config.quickstart)
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(1, 1.5))
        log = read_run(start / "base/log.jsonl")["log"]
        left.plot(*series(log, "step", "loss"), color="#3b76c4", linewidth=1.2)
        left.plot(*series(log, "step", "val_loss"), "o", color=INK, markersize=3, label="on held-out text")
        left.set(xlabel="step of pretrain.py", ylabel="loss, nats per token", title="learning to speak", ylim=(0, None))
        left.legend(frameon=False)
        begun, bound = 0, 1.9
        for name, colour in (("ppo", "#d9822b"), ("grpo", "#3d9a50")):
            steps, gold = series(read_run(start / name / "log.jsonl")["log"], "step", "data/world.py:gold")
            right.plot([begun + s for s in steps], gold, ".", color=colour, markersize=3, alpha=0.6)
            right.plot(
                [begun + s for s in steps],
                smooth(gold),
                color=colour,
                linewidth=1.6,
                label=LABELS[name],
            )
            begun += steps[-1]
        right.axhline(bound, color=INK, linestyle=":", linewidth=1)
        right.text(0, bound, " the best there is", va="bottom", fontsize=8)
        right.set(
            xlabel="step",
            ylabel="gold reward of a completion",
            title="learning to be kind, and then right",
            ylim=(None, 2.05),
        )
        right.legend(frameon=False, loc="lower right")
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(config.out, transparent=True, metadata={"Date": None})
    print(config.out)


if __name__ == "__main__":
    launch(main, Config)
