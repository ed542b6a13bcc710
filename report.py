"""The report of any set of runs below one directory, as one HTML file that needs nothing else: no
network, readable on a phone, in light and in dark.

It shows what is there: the stages a quick start ran (report.json), the curves of runs
(*/log.jsonl), figures of evaluate.py with their 95 % intervals (*.json), completions of the same
prompts (*_answers.jsonl), where every checkpoint came from. Charts need matplotlib (pip install
matplotlib).

    python quickstart.py --report_only=True --out=DIR
"""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
from jinja2 import Environment

from data.read import read_json, read_jsonl
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import replace_text
from runtime.run import clock_time

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None

GOLD = "data/world.py:gold"
KL = "KL to the reference, nats per completion"
INK = "#123456"  # stands for the page's own text colour, which light and dark choose
COLOURS = ("#3b76c4", "#d9822b", "#3d9a50", "#b5476b", "#7d5bbe", "#8a6d3b", "#2a9d8f", "#c0392b")
CHART = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
CHART |= {"axes.spines.top": False, "axes.spines.right": False}
CHART |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


def show(figure):
    """{"value", "low", "high"} -> "0.81 [0.78, 0.84]"."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    return f"{value:.3g}" if low is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


# --------------------------------------------------------------------------------------------------
# What is there


def read_lines(path):
    return [row for _, row in read_jsonl(path)]


def by_age(out, pattern):
    return sorted(out.glob(pattern), key=lambda p: p.stat().st_mtime)


def read_runs(out):
    """{name: {"log", "info"}} of the runs in a directory, in the order in which they were made."""
    runs = {}
    for log in by_age(out, "*/log.jsonl"):
        steps = checkpoint.steps_in(log.parent)
        runs[log.parent.name] = {"log": read_lines(log), "info": checkpoint.read_info(steps[-1]) if steps else {}}
    return runs


def read_figures(out):
    """{name: figures} of the evaluations in a directory."""
    evaluations = {}
    for file in by_age(out, "*.json"):
        try:
            figures = read_json(file).get("figures")
            if isinstance(figures, dict):
                evaluations[file.stem] = figures
        except UserError as e:  # of an evaluation that was interrupted, or not one of ours
            print(f"left out: {e}")
    return evaluations


def read_completions(out):
    """[(prompt, {name: row})] of the first six prompts that every model of evaluate.py --samples
    has completed."""
    files, by_prompt = by_age(out, "*_answers.jsonl"), {}
    for file in files:
        for row in read_lines(file):
            by_prompt.setdefault(json.dumps(row["prompt"]), {})[file.stem.removesuffix("_answers")] = row
    shared = [(json.loads(prompt), rows) for prompt, rows in by_prompt.items() if len(rows) == len(files)]
    return shared[:6]


def read_feedback(out):
    """{name: last line of its log} of the files that rlaif.py wrote: sums and counts of all
    pairs."""
    return {file.stem.removesuffix(".log"): read_lines(file)[-1] for file in by_age(out, "*.log.jsonl")}


# --------------------------------------------------------------------------------------------------
# Charts


@contextlib.contextmanager
def chart(charts, caption, label_x, label_y):
    """Axes to draw on; if something was drawn, (caption, SVG) is added to `charts`."""
    with matplotlib.rc_context(CHART | {"svg.hashsalt": caption}):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        axes = figure.subplots()
        yield axes
        if not axes.has_data():
            return
        axes.set(xlabel=label_x, ylabel=label_y)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    charts.append((caption, svg[svg.index("<svg") :].replace(INK, "currentColor")))


def series(log, x, y):
    """([x], [y]) of the lines of a run's log that have both."""
    rows = [r for r in log if x in r and y in r]
    return [r[x] for r in rows], [r[y] for r in rows]


def smooth(values):
    """Running mean over a twentieth of the values, so that a curve shows its course and not its
    noise."""
    n = max(1, len(values) // 20)
    return [np.mean(values[max(0, i - n) : i]) for i in range(1, len(values) + 1)]


def curves(runs):
    """Every run's course: its loss, or for reinforcement learning its reward."""
    charts = []
    for (name, run), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        is_rl = any("reward" in r and "loss" in r for r in run["log"])
        quantity = "reward" if is_rl else "loss"
        caption = f"{name}: reward" if is_rl else f"{name}: loss, and on held-out data (dots)"
        with chart(charts, caption, "step", quantity) as axes:
            steps, values = series(run["log"], "step", quantity)
            axes.plot(steps, smooth(values), color=colour, linewidth=1.3)
            if not is_rl:
                axes.plot(*series(run["log"], "step", "val_loss"), "o", markersize=3, color=INK)
    return charts


def best_of(figures, what):
    """([KL], [value of `what`]) along best-of-1, 2, 4, ... of an evaluation."""
    kl, values = [], []
    for name, figure in figures.items():
        if m := re.fullmatch(rf"best of (\d+): {re.escape(what)}", name):
            kl.append(figures[f"best of {m[1]}: KL to one completion, at most, nats"]["value"])
            values.append(figure["value"])
    return kl, values


def plot_intervals(axes, x, figures, **style):
    """Plot figures at `x`, with bars for those that have an interval."""
    value, low, high = np.array([[f["value"], f["low"], f["high"]] for f in figures], dtype=float).T  # None: nan
    axes.errorbar(x, value, [value - low, high - value], **style)


def frontier(charts, runs, evaluations):
    """True reward against KL to the fine-tuned model, of every method."""
    caption = (
        "What completions are truly worth against how far the model has moved from the fine-tuned one: points are "
        "finished models, with 95 % intervals"
    )
    with chart(charts, caption, "KL per completion", "gold") as axes:
        for (name, figures), colour in zip(evaluations.items(), itertools.cycle(COLOURS)):
            gold = figures.get(f"reward {GOLD}")
            if gold and KL in figures:
                plot_intervals(axes, figures[KL]["value"], [gold], fmt="o", color=colour, markersize=5, label=name)
            x, y = best_of(figures, GOLD)
            if len(x) > 1:
                axes.plot(x, y, ".--", color=colour, label=f"{name}: best of 1, 2, 4 ...", linewidth=1)
        for (name, run), colour in zip(runs.items(), itertools.cycle(COLOURS[::-1])):
            x, y = series(run["log"], "kl", GOLD)
            # only runs from the fine-tuned model itself: others have another zero
            if len(x) > 1 and len(run["info"].get("lineage", [])) == 2:
                label = f"{name} in training"
                axes.plot(smooth(x), smooth(y), color=colour, linewidth=0.8, alpha=0.6, label=label)


def proxy_and_gold(charts, name, figures):
    """Best-of-n by a reward model: what it says of the best, and what that is worth."""
    rewards = [n.removeprefix("best of 1: ") for n in figures if n.startswith("best of 1: ")]
    proxies = [n for n in rewards if n != GOLD and not n.startswith("KL")]
    if GOLD in rewards and proxies:
        proxy = Path(proxies[0]).name
        caption = f"{name}: best of n by {proxy}. If its score rises and gold does not, it is exploited"
        with chart(charts, caption, "KL: log n - (n-1)/n", "reward of the best") as axes:
            axes.plot(*best_of(figures, proxies[0]), ".-", color=COLOURS[1], label="its own score")
            axes.plot(*best_of(figures, GOLD), ".-", color=COLOURS[0], label="gold")


def calibration(charts, figures):
    """How often a reward model is right against how sure it is."""
    bins = {float(m[1]): f for n, f in figures.items() if (m := re.match(r"right where it says ([\d.]+) ", n))}
    caption = "Calibration of the reward model on held-out pairs: on the line it is as often right as it says"
    with chart(charts, caption, "says it is right", "is right") as axes:
        if bins:
            axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.6)
            plot_intervals(axes, list(bins), bins.values(), fmt="o-", color=COLOURS[2], markersize=4)


def reward_charts(runs, evaluations):
    """What is told of reward, by every evaluation and reward model."""
    charts = []
    frontier(charts, runs, evaluations)
    for name, figures in evaluations.items():
        proxy_and_gold(charts, name, figures)
    for name, run in runs.items():
        figures = run["info"].get("metrics", {}).get("figures")
        if figures and name != "weak_rm":
            calibration(charts, figures)
    return charts


# --------------------------------------------------------------------------------------------------
# The page. Jinja escapes what files and models say

PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
{% macro table(head) %}
<div class="wide"><table><thead><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{{ caller() }}</tbody></table></div>
{% endmacro %}
{% macro section(title, charts) %}
{% if charts %}
<h2>{{ title }}</h2><div class="charts">
{% for caption, svg in charts %}
<figure role="img" aria-label="{{ caption }}">{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% endmacro %}
<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Feinschliff: {{ out.name }}</title><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60656c; --paper: #fbfbfa; --line: #d9dce0;
--good: #1d7a3a; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a6ad; --paper: #16181b; --line: #363b41;
--good: #63c782; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem 1rem 4rem; color: var(--ink); background: var(--paper);
font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 1rem 0 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem;
border-bottom: 1px solid var(--line) }
p { max-width: 46rem } .soft { color: var(--soft) } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; width: 100% } th, td { text-align: left;
padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums } code { font-size: .85em; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: .85rem; color: var(--soft) }
@media (max-width: 40rem) { table { font-size: .8rem } td.n { white-space: normal } td, th { padding-right: .5rem }
td code { font-size: .75em } }
svg { width: 100%; height: auto } .good { color: var(--good) } .bad { color: var(--bad) }
details { margin: .4rem 0 } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
</style></head><body>
<h1>Feinschliff</h1>
<p class="soft">Train, refine, sharpen: the report of {{ out }}.
{% set machine = record if record.hardware else runs.values() | map(attribute="info") | select | first | default({}) %}
{% for name in ["hardware", "torch", "python", "device"] if name in machine %}
{{- ", " if not loop.first }}{{ name }} {{ machine[name] }}
{%- endfor %}
{{- ", code " ~ record.code[:8] if record.code }}</p>

{% if record.figures %}
<h2>What each stage did, on prompts that training never saw</h2>
{% call table(["stage", "figure", "before", "after [95 %]", "bound"]) %}
{% for f in record.figures %}
<tr><td><b>{{ f.stage }}</b></td><td>{{ f.figure }}</td><td class="n">{{ show(f.before) }}</td>
<td class="n">{{ show(f.after) }}
{% if f.improved is true %}<span class="good" title="the interval excludes no change">✓</span>
{% elif f.improved is false %}<span class="bad" title="the interval includes no change">✗</span>
{% endif %}
</td><td>{{ f.bound }}</td></tr>
{% endfor %}
{% endcall %}
{% endif %}

{% if record.stages %}
<h2>Commands: {{ clock_time(record.stages | sum(attribute="seconds")) }} in all</h2>
{% call table(["stage", "minutes", "command"]) %}
{% for s in record.stages %}
<tr><td>{{ s.stage }}</td><td class="n">{{ "%.1f" % (s.seconds / 60) }}</td><td><code>{{ s.command }}</code></td></tr>
{% endfor %}
{% endcall %}
{% endif %}

{{ section("Reward, and what it costs", charts) }}

{% set judged %}
{% for name, figures in evaluations.items() %}
{% for figure, value in figures.items() if figure.startswith("judge") %}
<tr><td>{{ name }}</td><td>{{ figure.removeprefix("judge: ") }}</td><td class="n">{{ show(value) }}</td></tr>
{% endfor %}
{% endfor %}
{% for name, record in feedback.items() %}
{% for figure, (total, n) in (record.figures or {}).items() if n %}
<tr><td>{{ name }}</td><td>{{ figure }}</td><td class="n">{{ "%.3g" % (total / n) }} of {{ "{:,}".format(n) }}</td></tr>
{% endfor %}
{% for figure, n in (record.counts or {}).items() %}
<tr><td>{{ name }}</td><td>{{ figure }}</td><td class="n">{{ "{:,}".format(n) }}</td></tr>
{% endfor %}
{% endfor %}
{% endset %}
{% if judged | trim %}
<h2>The judge</h2>
{% call table(["model or pairs", "agreement with the truth, and what was counted", ""]) %}{{ judged }}{% endcall %}
{% endif %}

{% if completions %}
<h2>The same prompts, completed by every stage</h2>
{% for prompt, rows in completions %}
<details{{ " open" if loop.index < 3 }}>
<summary>{{ prompt if prompt is string else prompt[-1].content }}</summary>
{% call table(["model", "completion", "gold"]) %}
{% for name, row in rows.items() %}
<tr><td><b>{{ name }}</b></td><td>{{ row.completion }}
{% if not row.get("finished", true) %}<span class="soft">(unfinished)</span>
{% endif %}
</td><td class="n">
{%- for field, gold in row.items() if field.endswith(":gold") %}{{ "%.2f" % gold if loop.first }}{% endfor %}
</td></tr>
{% endfor %}
{% endcall %}
</details>
{% endfor %}
{% endif %}

{{ section("Learning curves", curves) }}
{% if runs %}
{% if not can_draw %}
<p>Charts need matplotlib: pip install matplotlib, then this command again.</p>
{% endif %}
<h2>Where every model came from</h2>
{% call table(["lineage (SHA-256 of weights)", "steps", "data (SHA-256)", "code"]) %}
{% for name, run in runs.items() if run.info %}
<tr><td>
{%- for parent in run.info.lineage %}
{{ parent.stage | default(Path(parent.path).name) }} <code>{{ parent.weights[:8] }}</code> → {% endfor -%}
<b>{{ name }}</b></td><td>{{ run.info.step }}</td><td>
{%- for path, digest in run.info.data.items() %}
{{ Path(path).name }} <code>{{ digest[:8] }}</code>{% if not loop.last %}<br>{% endif %}
{% endfor -%}
</td><td><code>{{ run.info.code[:8] }}</code></td></tr>
{% endfor %}
{% endcall %}
{% endif %}

{% if evaluations %}
<h2>All figures</h2>
<details><summary>{{ evaluations.values() | map("length") | sum }} figures of {{ evaluations | length }} evaluations
</summary>
{% call table(["evaluation", "figure", "value [95 %]"]) %}
{% for name, figures in evaluations.items() %}
{% for figure, value in figures.items() %}
<tr><td>{{ name }}</td><td>{{ figure }}</td><td class="n">{{ show(value) }}</td></tr>
{% endfor %}
{% endfor %}
{% endcall %}
</details>
{% endif %}
</body></html>
""",
    globals={"show": show, "clock_time": clock_time, "Path": Path},
)


def make(out, record):
    """Write DIR/report.html and return its path.

    record: what quickstart.py knows: {"stages", "figures", hardware and versions}; {} for other
    runs."""
    runs, evaluations, completions = read_runs(out), read_figures(out), read_completions(out)
    if not (runs or evaluations or completions):
        raise UserError(
            f"--out={out}: nothing to report: no run (*/log.jsonl) and no evaluation (*.json of evaluate.py) is there"
        )
    page = PAGE.render(
        out=out,
        record=record,
        charts=reward_charts(runs, evaluations) if matplotlib else [],
        feedback=read_feedback(out),
        completions=completions,
        runs=runs,
        curves=curves(runs) if matplotlib else [],
        can_draw=matplotlib is not None,
        evaluations=evaluations,
    )
    replace_text(out / "report.html", page)
    return out / "report.html"
