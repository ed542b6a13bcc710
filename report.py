"""The report of any set of runs below one directory, as one HTML file that needs nothing else: no
network, readable on a phone, in light and in dark.

It shows what is there: the stages a quick start ran (report.json), the curves of runs
(*/log.jsonl), figures of evaluate.py with their 95 % intervals (*.json), completions of the same
prompts (*_answers.jsonl), where every checkpoint came from. Charts need matplotlib (pip install
matplotlib).

    python quickstart.py --report_only=True --out=DIR
"""

import html
import io
import json
import re
from pathlib import Path

from data.read import read_json, read_jsonl
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import replace_text
from runtime.run import clock_time

try:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

GOLD = "data/world.py:gold"
KL = "KL to the reference, nats per completion"
INK = "#123456"  # stands for the page's own text colour, which light and dark choose
COLOURS = ("#3b76c4", "#d9822b", "#3d9a50", "#b5476b", "#7d5bbe", "#8a6d3b", "#2a9d8f", "#c0392b")
CHART = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
CHART |= {"axes.spines.top": False, "axes.spines.right": False}
CHART |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)

STYLE = """
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
"""


# --------------------------------------------------------------------------------------------------
# HTML


def text(value):
    return html.escape(str(value))


def code(value):
    return f"<code>{text(value)}</code>"


def show(figure):
    """{"value", "low", "high"} -> "0.81 [0.78, 0.84]"."""
    if figure is None:
        return ""
    if figure.get("low") is None:
        return f"{figure['value']:.3g}"
    return f"{figure['value']:.3g} [{figure['low']:.3g}, {figure['high']:.3g}]"


def grid(head, rows, numbers=()):
    """An HTML table; cells are HTML already. numbers: columns that do not wrap."""
    parts = ["".join(f"<th>{text(h)}</th>" for h in head)]
    for row in rows:
        cells = (f'<td class="n">{x}</td>' if i in numbers else f"<td>{x}</td>" for i, x in enumerate(row))
        parts.append("".join(cells))
    body = "".join(f"<tr>{part}</tr>" for part in parts[1:])
    return f'<div class="wide"><table><thead><tr>{parts[0]}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(plot, caption, label_x, label_y):
    """A figure that `plot(axes)` draws; "" if there is no matplotlib or nothing was drawn."""
    if pyplot is None:
        return ""
    with pyplot.rc_context(CHART | {"svg.hashsalt": caption}):
        figure, axes = pyplot.subplots(figsize=(4.4, 3.1), layout="constrained")
        plot(axes)
        drawn = axes.has_data()
        axes.set(xlabel=label_x, ylabel=label_y)
        if drawn and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    if not drawn:
        return ""
    head, rest = re.match(r".*?(<svg[^>]*>)(.*)", out.getvalue(), re.DOTALL).groups()
    svg = re.sub(r' (?:width|height)="[^"]*"', "", head) + rest  # the page decides the size
    svg = svg.replace(INK, "currentColor")
    caption = text(caption)
    return f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'


def charts(title, drawn):
    return f'<h2>{title}</h2><div class="charts">{drawn}</div>' if drawn else ""


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
        except UserError as e:  # of an evaluation that was interrupted, or not one of ours
            print(f"left out: {e}")
            continue
        if isinstance(figures, dict):
            evaluations[file.stem] = figures
    return evaluations


def series(log, name):
    """([step], [value]) of a quantity in a run's log."""
    rows = [r for r in log if name in r and "step" in r]
    return [r["step"] for r in rows], [r[name] for r in rows]


def smooth(values, share=0.05):
    """Running mean over a share of the values, so that a curve shows its course and not its
    noise."""
    n = max(1, int(len(values) * share))
    windows = [values[max(0, i - n) : i] for i in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


# --------------------------------------------------------------------------------------------------
# The parts of the page, each HTML or ""


def curve(name, log, colour):
    """A run's course: its loss, or for reinforcement learning its reward."""
    is_rl = any("reward" in r and "loss" in r for r in log)

    def plot(axes):
        steps, values = series(log, "reward" if is_rl else "loss")
        axes.plot(steps, smooth(values), color=colour, linewidth=1.3)
        if not is_rl:
            axes.plot(*series(log, "val_loss"), "o", markersize=3, color=INK)

    caption = f"{name}: reward" if is_rl else f"{name}: loss, and on held-out data (dots)"
    return chart(plot, caption, "step", "reward" if is_rl else "loss")


def best_of(figures, what):
    """([KL], [value of `what`]) along best-of-1, 2, 4, ... of an evaluation."""
    ns = [int(m[1]) for m in (re.fullmatch(r"best of (\d+): KL.*", name) for name in figures) if m]
    line = {n: figures[f"best of {n}: {what}"]["value"] for n in sorted(ns) if f"best of {n}: {what}" in figures}
    return [figures[f"best of {n}: KL to one completion, at most, nats"]["value"] for n in line], list(line.values())


def errors(figures):
    """[[below], [above]]: how far the intervals of figures reach, for matplotlib's error bars."""
    below = [0 if f["low"] is None else f["value"] - f["low"] for f in figures]
    return [below, [0 if f["high"] is None else f["high"] - f["value"] for f in figures]]


def frontier(runs, evaluations):
    """True reward against KL to the fine-tuned model, of every method."""

    def plot(axes):
        for (name, figures), colour in zip(evaluations.items(), COLOURS * 9):
            gold = figures.get(f"reward {GOLD}")
            if gold and KL in figures:
                bars = {"yerr": errors([gold]), "fmt": "o", "color": colour, "markersize": 5}
                axes.errorbar(figures[KL]["value"], gold["value"], label=name, **bars)
            x, y = best_of(figures, GOLD)
            if len(x) > 1:
                axes.plot(x, y, ".--", color=colour, label=f"{name}: best of 1, 2, 4 ...", linewidth=1)
        for (name, run), colour in zip(runs.items(), COLOURS[::-1] * 9):
            points = [(r["kl"], r[GOLD]) for r in run["log"] if "kl" in r and GOLD in r]
            # only runs from the fine-tuned model itself: others have another zero
            if len(points) > 1 and len(run["info"].get("lineage", [])) == 2:
                x, y = (smooth(values) for values in zip(*points))
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.6, label=f"{name} in training")

    caption = "What completions are truly worth against how far the model has moved from the fine-tuned one"
    return chart(plot, f"{caption}: points are finished models, with 95 % intervals", "KL per completion", "gold")


def proxy_and_gold(name, figures):
    """Best-of-n by a reward model: what it says of the best, and what that is worth."""
    rewards = [n.removeprefix("best of 1: ") for n in figures if n.startswith("best of 1: ")]
    proxies = [n for n in rewards if n != GOLD and not n.startswith("KL")]
    if GOLD not in rewards or not proxies:
        return ""

    def plot(axes):
        axes.plot(*best_of(figures, proxies[0]), ".-", color=COLOURS[1], label="its own score")
        axes.plot(*best_of(figures, GOLD), ".-", color=COLOURS[0], label="gold")

    caption = f"{name}: best of n by {Path(proxies[0]).name}. If its score rises and gold does not, it is exploited"
    return chart(plot, caption, "KL: log n - (n-1)/n", "reward of the best")


def calibration(figures):
    """How often a reward model is right against how sure it is."""
    bins = {float(m[1]): figures[m[0]] for m in (re.match(r"right where it says ([\d.]+) .*", n) for n in figures) if m}

    def plot(axes):
        if bins:
            axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.6)
            values = [f["value"] for f in bins.values()]
            bars = {"yerr": errors(bins.values()), "fmt": "o-", "color": COLOURS[2], "markersize": 4}
            axes.errorbar(list(bins), values, **bars)

    caption = "Calibration of the reward model on held-out pairs: on the line it is as often right as it says"
    return chart(plot, caption, "says it is right", "is right")


def completion_table(completions):
    """The same six prompts completed by every stage. completions: {name: rows of evaluate.py
    --samples}."""
    by_prompt = {name: {json.dumps(row["prompt"]): row for row in rows} for name, rows in completions.items()}
    shared = [key for key in next(iter(by_prompt.values())) if all(key in rows for rows in by_prompt.values())]
    blocks = []
    for i, key in enumerate(shared[:6]):
        prompt, table = json.loads(key), []
        for name, rows in by_prompt.items():
            row = rows[key]
            gold = next((f"{value:.2f}" for field, value in row.items() if field.endswith(":gold")), "")
            cut = "" if row.get("finished", True) else ' <span class="soft">(unfinished)</span>'
            table.append((f"<b>{text(name)}</b>", text(row["completion"]) + cut, gold))
        question = text(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        rows = grid(("model", "completion", "gold"), table, {2})
        blocks.append(f"<details{' open' if i < 2 else ''}><summary>{question}</summary>{rows}</details>")
    return "".join(blocks)


def lineage(runs):
    """Where each run's newest checkpoint came from, back to the corpus, with hashes."""
    rows = []
    for name, info in ((name, run["info"]) for name, run in runs.items() if run["info"]):
        parents = [f"{text(p.get('stage', Path(p['path']).name))} {code(p['weights'][:8])}" for p in info["lineage"]]
        data = [f"{text(Path(path).name)} {code(digest[:8])}" for path, digest in info["data"].items()]
        line = " → ".join([*parents, f"<b>{text(name)}</b>"])
        rows.append((line, str(info["step"]), "<br>".join(data), code(info["code"][:8])))
    return grid(("lineage (SHA-256 of weights)", "steps", "data (SHA-256)", "code"), rows) if rows else ""


def stage_table(record):
    """What each stage of a quick start did, and its commands."""
    marks = {
        True: ' <span class="good" title="the interval excludes no change">✓</span>',
        False: ' <span class="bad" title="the interval includes no change">✗</span>',
        None: "",
    }
    rows = []
    for f in record["figures"]:
        after = show(f["after"]) + marks[f.get("improved")]
        rows.append((f"<b>{text(f['stage'])}</b>", text(f["figure"]), show(f["before"]), after, text(f["bound"])))
    head = ("stage", "figure", "before", "after [95 %]", "bound")
    return "<h2>What each stage did, on prompts that training never saw</h2>" + grid(head, rows, {2, 3})


def commands(stages):
    rows = [(text(s["stage"]), f"{s['seconds'] / 60:.1f}", code(s["command"])) for s in stages]
    total = clock_time(sum({s["stage"]: s["seconds"] for s in stages}.values()))
    return f"<h2>Commands: {total} in all</h2>" + grid(("stage", "minutes", "command"), rows, {1})


def judge_table(out, evaluations):
    """What evaluate.py and rlaif.py say of the judge."""
    rows = []
    for name, figures in evaluations.items():
        judged = {figure: f for figure, f in figures.items() if figure.startswith("judge")}
        rows += [(text(name), text(figure.removeprefix("judge: ")), show(f)) for figure, f in judged.items()]
    for file in sorted(out.glob("*.log.jsonl")):  # of rlaif.py: its last line has sums and counts of all pairs
        last, name = read_lines(file)[-1], text(file.stem.removesuffix(".log"))
        means = {figure: f"{total / n:.3g} of {n:,}" for figure, (total, n) in last.get("figures", {}).items() if n}
        means |= {what: f"{n:,}" for what, n in last.get("counts", {}).items()}
        rows += [(name, text(what), value) for what, value in means.items()]
    head = ("model or pairs", "agreement with the truth, and what was counted", "")
    return "<h2>The judge</h2>" + grid(head, rows, {2}) if rows else ""


def all_figures(evaluations):
    rows = [
        (text(name), text(figure), show(f)) for name, figures in evaluations.items() for figure, f in figures.items()
    ]
    if not rows:
        return ""
    summary = f"<summary>{len(rows)} figures of {len(evaluations)} evaluations</summary>"
    table = grid(("evaluation", "figure", "value [95 %]"), rows, {2})
    return f"<h2>All figures</h2><details>{summary}{table}</details>"


def make(out, record):
    """Write DIR/report.html and return its path.

    record: what quickstart.py knows: {"stages", "figures", hardware and versions}; {} for other
    runs."""
    runs, evaluations = read_runs(out), read_figures(out)
    completions = {file.stem.removesuffix("_answers"): read_lines(file) for file in by_age(out, "*_answers.jsonl")}
    if not (runs or evaluations or completions):
        raise UserError(
            f"--out={out}: nothing to report: no run (*/log.jsonl) and no evaluation (*.json of evaluate.py) is there"
        )
    parts = []
    if record.get("figures"):
        parts.append(stage_table(record))
    if record.get("stages"):
        parts.append(commands(record["stages"]))
    drawn = frontier(runs, evaluations)
    drawn += "".join(proxy_and_gold(name, figures) for name, figures in evaluations.items())
    for name, run in runs.items():
        figures = run["info"].get("metrics", {}).get("figures")
        drawn += calibration(figures) if figures and name != "weak_rm" else ""
    parts += [charts("Reward, and what it costs", drawn), judge_table(out, evaluations)]
    if completions:
        parts.append("<h2>The same prompts, completed by every stage</h2>" + completion_table(completions))
    if runs:
        curves = "".join(curve(name, run["log"], colour) for (name, run), colour in zip(runs.items(), COLOURS * 9))
        parts.append(charts("Learning curves", curves))
        if pyplot is None:
            parts.append("<p>Charts need matplotlib: pip install matplotlib, then this command again.</p>")
        parts.append("<h2>Where every model came from</h2>" + lineage(runs))
    parts.append(all_figures(evaluations))

    machine = record if "hardware" in record else next((run["info"] for run in runs.values() if run["info"]), {})
    described = ", ".join(f"{k} {text(machine[k])}" for k in ("hardware", "torch", "python", "device") if k in machine)
    version = f", code {record['code'][:8]}" if "code" in record else ""
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Feinschliff: {text(out.name)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>Feinschliff</h1>
<p class="soft">Train, refine, sharpen: the report of {text(out)}. {described}{version}</p>
{"".join(parts)}</body></html>"""
    replace_text(out / "report.html", page)
    return out / "report.html"
