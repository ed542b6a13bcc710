"""The report of runs, as one HTML file that needs nothing else: no network, readable on a phone, in
light and in dark.

It shows what is there: the stages of a quick start (report.json), the curves of runs (log.jsonl),
figures of evaluate.py and reward.py with their 95 % intervals, completions of the same prompts
(*_answers.jsonl), where every checkpoint came from. Several directories are compared: their curves
share a plot. The page is report.html in the directory, or comparison.html in the one that several
share; its template is web/report.html. Charts need matplotlib (pip install matplotlib).

    python report.py out/quickstart
    python report.py out/sft out/sft_long      # two runs, or two quick starts: curves on one plot
"""

import dataclasses
import io
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
from jinja2 import Environment

from data.read import read_json, read_jsonl
from runtime import checkpoint
from runtime.cli import launch
from runtime.errors import UserError
from runtime.files import replace_text
from runtime.run import clock_time

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None

HERE = Path(__file__).parent
# {"STAGE | FIGURE": [low, high]} of quick starts with other seeds and on other machines, by
# bench/world.py
RANGES = HERE / "bench/results/ranges.json"
GOLD = "data/world.py:gold"
KL = "KL to the reference, nats per completion"
MAX_POINTS = 300  # of a curve, so that a page with a hundred long runs stays small
LARGEST = 1e100  # figure that is drawn: matplotlib squares and subtracts them, and doubles end at 1.8e308
# The page has its own colours, for light and for dark. The lines' differ in lightness too, so that
# a reader who sees few colours can tell them apart.
INK = "#123456"
COLOURS = {f"#00000{n}": f"var(--c{n})" for n in range(1, 7)}
CHART = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "legend.fontsize": 8.5}
CHART |= {"text.parse_math": False}  # $x$ in the name of a run is no formula
CHART |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.4}
CHART |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


@dataclasses.dataclass
class Config:
    # -- What you will set --
    # a run's own directory, or one with runs in it, as a quick start makes it; several are compared
    directories: list = dataclasses.field(default_factory=list)


def show(figure):
    """{"value", "low", "high"} -> "0.81 [0.78, 0.84]"."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    return f"{value:.3g}" if low is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


# --------------------------------------------------------------------------------------------------
# What is there


def common(directories):
    return Path(os.path.commonpath(directories))


def read_all(directories, pattern, read):
    """{name: read(file)} of the files of the directories that match, in each by age. A file is
    called by its path below what the directories share, without the end that the pattern names.
    What cannot be read is left out, and a line says so."""
    root, files, found = common(directories), [], {}
    for directory in directories:
        files += sorted(filter(Path.is_file, directory.glob(pattern)), key=os.path.getmtime)
    for file in files:
        name = str(file.relative_to(root)).removesuffix(pattern.strip("*")).strip("/") or root.name
        try:
            found[name] = read(file)
        except UserError as e:  # of an evaluation that was interrupted, or not one of ours
            print(f"left out: {e}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            print(f"left out: {file}: is not as Feinschliff writes it ({e!r})")
    return found


def read_run(log):
    """{"log", "info", "figures"} of a run: the numbers of its log, line by line, and what its
    newest checkpoint says of it."""
    lines = [row for _, row in read_jsonl(log, skip_bad=True)]
    if None in lines:
        print(f"left out: {lines.count(None)} damaged lines of {log}")
    numbers = [{name: float(x) for name, x in line.items() if isinstance(x, int | float)} for line in lines if line]
    steps = checkpoint.steps_in(log.parent)
    info = checkpoint.read_info(steps[-1]) if steps else {}
    figures = check_figures(info.get("metrics", {}).get("figures", {}))
    return {"log": numbers, "info": info, "figures": figures}


def find_runs(directories):
    """{name: run}. Plots show a run by its "title": those that have the same are compared."""
    own = read_all(directories, "log.jsonl", read_run)
    runs = own | read_all(directories, "*/log.jsonl", read_run)
    for name, run in runs.items():
        run["title"] = "" if name in own and len(directories) > 1 else Path(name).name
    return runs


def check_figures(figures):
    """The figures themselves; raises an error of some kind unless all can be shown."""
    for figure in figures.values():
        show(figure)
    return figures


def read_record(file):
    """What quickstart.py wrote: {"stages", "figures", hardware and versions}; raises an error of
    some kind unless all can be shown."""
    record = read_json(file)
    figures, stages = record.get("figures", []), record.get("stages", [])
    for row in figures:
        check_figures({"before": row["before"], "after": row["after"]})
    seconds = sum(stage["seconds"] for stage in stages)
    clock_time(record.get("seconds") or seconds)
    "".join([record.get("code") or "", *(row.get("stage", "") for row in [*figures, *stages])])  # all of it is text
    return record


def read_figures(file):
    """The figures of an evaluation; {} if the file is of something else."""
    if file.name == "report.json":  # read_record says what is wrong with it
        return {}
    figures = read_json(file).get("figures")
    return check_figures(figures) if isinstance(figures, dict) else {}


def read_answers(file):
    """{prompt as JSON: row} of what evaluate.py --samples wrote; raises an error of some kind
    unless all its numbers can be shown."""
    answers = {json.dumps(row["prompt"]): row for _, row in read_jsonl(file)}
    sum(float(x) for row in answers.values() for x in row.values() if isinstance(x, int))  # raises above 1e308
    return answers


def read_completions(directories):
    """[(prompt, {name: row})] of the first five prompts that every model of evaluate.py --samples
    has completed."""
    answers, by_prompt = read_all(directories, "*_answers.jsonl", read_answers), {}
    for name, rows in answers.items():
        for prompt, row in rows.items():
            by_prompt.setdefault(prompt, {})[name] = row
    shared = [(json.loads(prompt), rows) for prompt, rows in by_prompt.items() if len(rows) == len(answers)]
    return shared[:5]


def read_feedback(file):
    """({figure: (sum, number)}, {name: count}) of all pairs, by the last line of rlaif.py's log."""
    *_, (_, record) = read_jsonl(file)
    figures = {name: (float(total), int(n)) for name, (total, n) in record.get("figures", {}).items()}
    return figures, {name: int(n) for name, n in record.get("counts", {}).items()}


# --------------------------------------------------------------------------------------------------
# Curves


def series(log, x, y):
    """([x], [y]) of the lines of a run's log that have both: its steps, or for val_loss its
    validations."""
    rows = [r for r in log if x in r and y in r and ("val_loss" in r) == (y == "val_loss")]
    return [r[x] for r in rows], [r[y] for r in rows]


def quantities(log):
    """What shows a run's course: its loss, or for reinforcement learning its reward and every
    part of it."""
    names = list(dict.fromkeys(name for row in log for name in row))
    if "reward" not in names:
        return [name for name in ("loss", "val_loss") if name in names]
    reward = series(log, "step", "reward")
    parts = [name for name in names if re.search("[/:]", name) and series(log, "step", name)[1] not in ([], reward[1])]
    return ["reward", *parts]


def short(quantity):
    """data/world.py:gold -> gold"""
    return re.split("[/:]", quantity)[-1]


def smooth(values):
    """Running mean over a twentieth of the values, so that a curve shows its course and not its
    noise; at most MAX_POINTS of it."""
    n = max(1, len(values) // 20)
    ends = np.unique(np.linspace(1, len(values), MAX_POINTS, dtype=int))
    return [np.mean(values[max(0, end - n) : end]) for end in ends]


# --------------------------------------------------------------------------------------------------
# Charts. A plot is {caption: lines}, a line (label, [x], [y]) or (label, [x], *intervals(figures))


def draw(plots, label_x):
    """[(caption, SVG)] of all plots that have something to show."""
    charts = []
    styles = matplotlib.cycler(linestyle=["-", "--", "-."] * 2) + matplotlib.cycler(color=list(COLOURS))
    for caption, lines in plots.items():
        lines = [line for line in (drawable(*line) for line in lines) if len(line[1])]
        if lines:
            with matplotlib.rc_context(CHART | {"svg.hashsalt": caption, "axes.prop_cycle": styles}):
                charts.append((caption, svg_of(lines, label_x)))
    return charts


def drawable(label, x, y, *bars):
    """The line without points that are not finite or exceed LARGEST, and without such bars."""
    x, y, *sides = np.array([x, y, *(side for bar in bars for side in bar)], dtype=float)
    fits = (np.abs(x) < LARGEST) & (np.abs(y) < LARGEST)  # nan does not
    sides = [np.where((side >= 0) & (side < LARGEST), side, np.nan)[fits] for side in sides]
    shown = f"\u200b{label}" if label.startswith("_") else label  # a legend leaves out what begins with _
    return (shown, x[fits], y[fits], *([sides] if sides else []))


def svg_of(lines, label_x):
    figure = Figure(figsize=(4.0, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label_x)
    for (label, x, y, *bars), marker in zip(lines, "osD^vP*X" * len(lines)):
        few = len(x) < 20
        axes.errorbar(smooth(x), smooth(y), *bars, marker=marker if few else "", markersize=3, label=label)
    if len(lines) > 1:
        axes.legend()
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page has text, for the browser's fonts
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    for placeholder, colour in (COLOURS | {INK: "currentColor"}).items():
        svg = svg.replace(placeholder, colour)
    return svg


def intervals(figures):
    """([value], [to the interval's lower end, to its upper end]) of figures; nan for those without
    an interval."""
    value, low, high = np.array([[f["value"], f["low"], f["high"]] for f in figures], dtype=float).T
    with np.errstate(all="ignore"):  # of what is not finite, or nearly so, nothing is drawn
        return value, [value - low, high - value]


def curves(runs, x):
    """The course of the runs along x, a plot for each run; runs of one title are compared in a plot
    for each quantity."""
    plots = {}
    for name, run in runs.items():
        of_run = quantities(run["log"])
        for quantity in of_run:
            caption, label = f"{name}: {of_run[0]}", short(quantity)
            if run["title"] != name:
                caption, label = f"{run['title']}: {label}".removeprefix(": "), name
            plots.setdefault(caption, []).append((label, *series(run["log"], x, quantity)))
    return plots


def best_of(figures, what):
    """([KL], [value of `what`]) along best-of-1, 2, 4, ... of an evaluation."""
    kl, values = [], []
    for name, figure in figures.items():
        m = re.fullmatch(rf"best of (\d+): {re.escape(what)}", name)
        if m and (to_one := f"best of {m[1]}: KL to one completion, at most, nats") in figures:
            kl.append(figures[to_one]["value"])
            values.append(figure["value"])
    return kl, values


def frontier(evaluations):
    """True reward against KL to the fine-tuned model, of every method."""
    lines = []
    for name, figures in evaluations.items():
        gold = figures.get(f"reward {GOLD}")
        if gold and KL in figures:
            lines.append((name, [figures[KL]["value"]], *intervals([gold])))
        lines.append((f"{name}, best of n", *best_of(figures, GOLD)))
    return {"What completions are truly worth (gold), with 95 % intervals": lines}


def exploitation(evaluations):
    """Best of n by a reward: what it says of the best, and what that is worth."""
    plots = {}
    for name, figures in evaluations.items():
        for proxy in [n.removeprefix("best of 1: ") for n in figures if n.startswith("best of 1: ")]:
            line = best_of(figures, proxy)
            if proxy != GOLD and line[0] and not proxy.startswith("KL"):
                gold = ("gold", *best_of(figures, GOLD))
                plots[f"{name}: best of n by {short(proxy)}"] = [(f"{short(proxy)} says", *line), gold]
    return plots


def charts(runs, evaluations):
    """{section of the page: [(caption, SVG)]}"""
    learned = {name: run for name, run in runs.items() if "reward" in quantities(run["log"])}
    lengths = [(name, *series(run["log"], "step", "completion_tokens")) for name, run in learned.items()]
    reward = draw(curves(learned, "kl") | frontier(evaluations), "KL per completion")
    return {
        "learning": draw(curves(runs, "step"), "step"),
        "reward": reward + draw(exploitation(evaluations), "KL: log n - (n-1)/n"),
        "lengths": draw({"Tokens per completion": lengths}, "step"),
    }


# --------------------------------------------------------------------------------------------------
# The page


def make(directories):
    """Write report.html into the directory, or comparison.html into the one that several share;
    return its path. Raises UserError if nothing is there to report."""
    directories = [Path(os.path.abspath(directory)) for directory in directories]
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; name one with runs in it, or a run's own")
    root, runs = common(directories), find_runs(directories)
    measured = {name: run["figures"] for name, run in runs.items()}
    for name, figures in read_all(directories, "*.json", read_figures).items():
        measured[name] = measured.get(name, {}) | figures  # of rm/ and of rm.json
    evaluations = {name: figures for name, figures in measured.items() if figures}
    completions = read_completions(directories)
    if not (runs or evaluations or completions):
        raise UserError(f"{root}: nothing to report: no run (log.jsonl) and no evaluation (*.json) is there")
    page = TEMPLATE.render(
        directories=directories,
        record={} if len(directories) > 1 else read_all(directories, "report.json", read_record).get(root.name, {}),
        ranges=read_json(RANGES) if RANGES.exists() else {},
        evaluations=evaluations,
        feedback=read_all(directories, "*.log.jsonl", read_feedback),
        completions=completions,
        runs=runs,
        charts=charts(runs, evaluations) if matplotlib else {},
    )
    file = root / ("comparison.html" if len(directories) > 1 else "report.html")
    replace_text(file, page)
    return file


# Escapes what files and models say
ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
TEMPLATE = ENVIRONMENT.from_string(
    (HERE / "web/report.html").read_text(), globals={"clock_time": clock_time, "Path": Path, "can_draw": matplotlib}
)


def main(config):
    if not config.directories:
        raise UserError("name a directory of runs: python report.py out/quickstart; several are compared")
    print(make(config.directories))


if __name__ == "__main__":
    launch(main, Config)
