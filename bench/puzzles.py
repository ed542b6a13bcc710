"""What `quickstart.py --world=puzzles` found, of one or several seeds: share right, pass@1, pass@8,
tokens an answer, and how many answers' steps are true, by family and level; and the plot of
accuracy and length against the steps of GRPO.

Intervals are bootstrapped over the problems of a seed; those of a mean over seeds are 1.96 standard
errors of it.

    python -m bench.puzzles --runs=out/puzzles0,out/puzzles1 --out=bench/results/puzzles_cpu.txt
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.figure import INK, STYLE, pyplot
from data.puzzles import FAMILIES
from data.read import read_json
from quickstart_puzzles import MODELS, PASS_1, PASS_8, STEPS_RIGHT
from report import read_run, series, smooth
from runtime.errors import UserError
from runtime.files import replace_text
from runtime.process import launch

TOKENS, STEPS = "tokens per sample", f"samples: {STEPS_RIGHT}"
SHOWN = {"pass@1": PASS_1, "pass@8": PASS_8, "tokens": TOKENS, "steps true": STEPS}


@dataclass
class Config:
    # directories of quickstart.py --world=puzzles, one a seed, comma-separated
    runs: str
    # file to write; "": only print
    out: str = ""
    # plot to write; "": none
    figure: str = ""


def read_figures(run):
    """{model: {figure: {"value", "low", "high"}}} of the models that a run has measured."""
    files = {name: Path(run) / f"{name}.json" for name in MODELS}
    return {name: read_json(file)["figures"] for name, file in files.items() if file.exists()}


def over_seeds(figures, name):
    """One figure of several seeds -> "0.512 [0.470, 0.560]"."""
    values = [f[name]["value"] for f in figures]
    low, high = figures[0][name]["low"], figures[0][name]["high"]
    if len(values) > 1:
        error = 1.96 * np.std(values, ddof=1) / len(values) ** 0.5
        low, high = np.mean(values) - error, np.mean(values) + error
    digits = 1 if name.startswith(TOKENS) else 3
    interval = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{np.mean(values):.{digits}f}{interval}"


def model_table(runs):
    """Every model on all held-out problems."""
    lines = [f"{'model':<12}" + "".join(f"{name:<24}" for name in SHOWN)]
    for model in [name for name in MODELS if all(name in run for run in runs)]:
        found = [run[model] for run in runs]
        lines.append(f"{model:<12}" + "".join(f"{over_seeds(found, name):<24}" for name in SHOWN.values()))
    return lines


def family_table(runs, models, figure):
    """One figure of some models, by family and level."""
    labels = [name.removeprefix(figure) for name in runs[0][models[0]] if name.startswith(figure)]
    lines = [f"{'family, level':<22}" + "".join(f"{model:<24}" for model in models)]
    for label in labels:
        cells = [f"{over_seeds([run[model] for run in runs], figure + label):<24}" for model in models]
        lines.append(f"{label.removeprefix(', family ') or 'all':<22}" + "".join(cells))
    return lines


def seed_table(runs, models):
    """pass@1 / tokens / steps true of some models, by family, in each run."""
    lines = []
    for label in ("", *(f", family {family}" for family in FAMILIES)):
        lines.append(label.removeprefix(", family ") or "all")
        for number, run in enumerate(runs):
            cells = []
            for model in models:
                right, tokens, steps = (run[model][name + label]["value"] for name in (PASS_1, TOKENS, STEPS))
                cells.append(f"{model} {right:.2f}/{tokens:.0f}/{steps:.2f}")
            lines.append(f"  run {number}: {'  '.join(cells)}")
    return lines


def lifts(runs):
    """By how much GRPO lifts pass@1 of each family over its start, and length."""
    lines = []
    for family in FAMILIES:
        label = f", family {family}"
        before, after = ([run[model] for run in runs] for model in ("start", "zero"))
        means = [
            np.mean([f[name + label]["value"] for f in some]) for name in (PASS_1, TOKENS) for some in (before, after)
        ]
        best = np.mean([f[PASS_8 + label]["value"] for f in before])
        lines.append(
            f"{family:<10} pass@1 {means[0]:.3f} -> {means[1]:.3f} ({100 * (means[1] - means[0]):+.0f} points; "
            f"pass@8 before: {best:.3f}), tokens {means[2]:.1f} -> {means[3]:.1f}"
        )
    return lines


def draw(runs, file):
    """Accuracy and length of R1-Zero's training completions against the steps of GRPO."""
    if pyplot is None:
        raise UserError('matplotlib is not there: pip install matplotlib, or the extra "report"')
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
        lengths = axes.twinx()
        for number, run in enumerate(runs):
            log = [record for record in read_run(Path(run) / "zero/log.jsonl")["log"] if "loss" in record]
            for where, name, colour, label in (
                (axes, "reward", "#3d9a50", "share right"),
                (lengths, "completion_tokens", "#d9822b", "tokens per answer"),
            ):
                steps, values = series(log, "step", name)
                where.plot(steps, values, ".", color=colour, markersize=3, alpha=0.4)
                where.plot(steps, smooth(values), color=colour, linewidth=1.6, label=label if number == 0 else None)
        axes.set(xlabel="step of grpo.py", ylabel="share right", ylim=(0, 1), title="thinking longer, because it pays")
        lengths.set(ylabel="tokens per answer", ylim=(0, None))
        lengths.spines["right"].set(visible=True, color=INK)
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
        figure.savefig(file, transparent=True, metadata={"Date": None})


def main(config):
    names = config.runs.split(",")
    runs = [read_figures(name) for name in names]
    missing = [
        f"{name}/{model}.json" for name, run in zip(names, runs) for model in ("start", "zero") if model not in run
    ]
    if missing:
        raise UserError(f"--runs={config.runs}: {missing[0]} is not there; quickstart.py --world=puzzles writes it")
    measured = [
        model for model in ("start", "zero", "cold", "r1", "small_rl", "distilled") if all(model in r for r in runs)
    ]
    lines = [f"{len(runs)} seed{'s' * (len(runs) > 1)}; held-out problems, 8 samples to each", "", *model_table(runs)]
    for shown, figure in SHOWN.items():
        lines += ["", shown, *family_table(runs, measured, figure)]
    lines += ["", "GRPO from the start (R1-Zero)", *lifts(runs)]
    lines += ["", "Each run: pass@1 / tokens / share of answers whose steps are all true", *seed_table(runs, measured)]
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    print(text, end="")
    if config.out:
        replace_text(config.out, text)
    if config.figure:
        draw(names, config.figure)


if __name__ == "__main__":
    launch(main, Config)
