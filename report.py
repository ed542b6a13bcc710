"""The report of any set of runs below one directory, as one HTML file that needs nothing else: no network, readable on a phone, in light and in dark.

Drawn is what is there: the stages a quick start ran (report.json), the loss and reward curves of runs (*/log.jsonl), figures of evaluate.py with their 95 %
intervals (*.json), answers to the same prompts (*_answers.jsonl), where every checkpoint came from. Charts need matplotlib (pip install matplotlib).

    python quickstart.py --report_only=True --out=DIR
"""
import html, io, json, re
from pathlib import Path

import checkpoint
from common import UserError, clock_time, replace_text
from data.read import read_jsonl

try:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

GOLD = "reward data/world.py:gold"
INK = "#123456"  # stands for the page's own text colour, which light and dark choose
COLOURS = ("#3b76c4", "#d9822b", "#3d9a50", "#b5476b", "#7d5bbe", "#8a6d3b", "#2a9d8f", "#c0392b")

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60656c; --paper: #fbfbfa; --line: #d9dce0; --good: #1d7a3a; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a6ad; --paper: #16181b; --line: #363b41; --good: #63c782; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem 1rem 4rem; color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 1rem 0 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line) }
p { max-width: 46rem } .soft { color: var(--soft) } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; width: 100% } th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums } code { font-size: .85em; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem } figure { margin: 0 } figcaption { font-size: .85rem; color: var(--soft) }
@media (max-width: 40rem) { table { font-size: .8rem } td.n { white-space: normal } td, th { padding-right: .5rem } td code { font-size: .75em } }
svg { width: 100%; height: auto } .good { color: var(--good) } .bad { color: var(--bad) } details { margin: .4rem 0 } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
"""


def text(value):
    return html.escape(str(value))


def show(figure):
    """{"value", "low", "high"} -> "0.81 [0.78, 0.84]"."""
    if figure is None:
        return ""
    low = f" [{figure['low']:.3g}, {figure['high']:.3g}]" if figure.get("low") is not None else ""
    return f"{figure['value']:.3g}{low}"


def grid(head, rows, numbers=()):
    """An HTML table; cells are HTML already. numbers: columns that do not wrap."""
    cell = lambda i, x: f'<td class="n">{x}</td>' if i in numbers else f"<td>{x}</td>"  # noqa: E731
    body = "".join("<tr>" + "".join(cell(i, x) for i, x in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{"".join(f"<th>{text(h)}</th>" for h in head)}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(plot, caption, label_x, label_y):
    """A figure: `plot(axes)` draws; "" where there is no matplotlib or nothing was drawn."""
    if pyplot is None:
        return ""
    with pyplot.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
                            "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": caption}):  # fmt: skip
        figure, axes = pyplot.subplots(figsize=(4.4, 3.1), layout="constrained")
        plot(axes)
        drawn = axes.has_data()
        axes.set(xlabel=label_x, ylabel=label_y)
        if drawn and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = out.getvalue()
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg[svg.index("<svg") :])).replace(INK, "currentColor")
    return f'<figure role="img" aria-label="{text(caption)}">{svg}<figcaption>{text(caption)}</figcaption></figure>' if drawn else ""


# ---------------------------------------------------------------------------------------------------------------------------------
# What is there


def read_lines(path):
    return [row for _, row in read_jsonl(path)]


def collect(out):
    """{"runs": {name: {"log", "info"}}, "figures": {name: figures}, "answers": {name: rows}} of what lies in a directory, in the order in which it was made."""
    by_age = lambda pattern: sorted(out.glob(pattern), key=lambda p: p.stat().st_mtime)  # noqa: E731
    runs, figures = {}, {}
    for log in by_age("*/log.jsonl"):
        found = checkpoint.steps_in(log.parent)
        runs[log.parent.name] = {"log": read_lines(log), "info": checkpoint.read_info(found[-1]) if found else {}}
    for file in by_age("*.json"):
        try:
            found = checkpoint.read_json(file).get("figures")
        except UserError as e:  # begun by an evaluation that was interrupted, or nothing of ours
            print(f"left out: {e}")
            continue
        if isinstance(found, dict):
            figures[file.stem] = found
    return {"runs": runs, "figures": figures, "answers": {file.stem.removesuffix("_answers"): read_lines(file) for file in by_age("*_answers.jsonl")}}


def series(log, name):
    """([step], [value]) of a quantity in a run's log."""
    rows = [r for r in log if name in r and "step" in r]
    return [r["step"] for r in rows], [r[name] for r in rows]


def smooth(values, share=0.05):
    """Running mean over a share of the values, so that a curve shows its course and not its noise."""
    n = max(1, int(len(values) * share))
    return [sum(values[max(0, i - n + 1) : i + 1]) / (i + 1 - max(0, i - n + 1)) for i in range(len(values))]


# ---------------------------------------------------------------------------------------------------------------------------------
# Its parts, each HTML or ""


def curves(runs):
    """The course of every run: its loss, or for reinforcement learning its reward."""
    found = []
    for (name, run), colour in zip(runs.items(), COLOURS * 9):
        what = "reward" if any("approx_kl" in r or "same" in r for r in run["log"]) else "loss"

        def plot(axes):
            steps, values = series(run["log"], what)
            axes.plot(steps, smooth(values), color=colour, linewidth=1.3)
            if what == "loss":
                axes.plot(*series(run["log"], "val_loss"), "o", markersize=3, color=INK)

        found.append(chart(plot, f"{name}: {what}" + (", and on held-out data (dots)" if what == "loss" else ""), "step", what))
    return "".join(found)


def best_of(figures, what):
    """[(KL, value of `what`)] along best-of-1, 2, 4, ... of an evaluation."""
    ns = sorted(int(m[1]) for m in (re.fullmatch(r"best of (\d+): KL.*", name) for name in figures) if m)
    return [(figures[f"best of {n}: KL to one answer, at most, nats"]["value"], figures[f"best of {n}: {what}"]["value"]) for n in ns if f"best of {n}: {what}" in figures]


def frontier(found, gold):
    """True reward against KL to the fine-tuned model, for every method."""
    kl = "KL to the reference, nats an answer"

    def plot(axes):
        for (name, figures), colour in zip(found["figures"].items(), COLOURS * 9):
            if kl in figures and f"reward {gold}" in figures:
                x, y = figures[kl], figures[f"reward {gold}"]
                low, high = (y["value"] if y[end] is None else y[end] for end in ("low", "high"))
                axes.errorbar(x["value"], y["value"], yerr=[[y["value"] - low], [high - y["value"]]], fmt="o", color=colour, label=name, markersize=5)
            line = best_of(figures, gold)
            if len(line) > 1:
                axes.plot(*zip(*line), ".--", color=colour, label=f"{name}: best of 1, 2, 4 ...", linewidth=1)
        for (name, run), colour in zip(found["runs"].items(), COLOURS[::-1] * 9):
            x, y = zip(*([(r["kl"], r[gold]) for r in run["log"] if "kl" in r and gold in r] or [((), ())]))
            if len(x) > 1 and len(run["info"].get("lineage", [])) == 2:  # from the fine-tuned model itself; what goes on from elsewhere has another zero
                axes.plot(smooth(x), smooth(y), color=colour, linewidth=0.8, alpha=0.6, label=f"{name} while it learns")

    return chart(plot, "What answers are truly worth against how far the model has moved from the fine-tuned one: points are finished models, with 95 % intervals", "KL, nats an answer", "gold reward")


def proxy_and_gold(figures, gold):
    """Best-of-n by a reward model: what it says of the best, and what that is worth."""

    def one(name, rows):
        proxy = next((n.partition(": ")[2] for n in rows if n.startswith("best of 1: ") and gold not in n and "KL" not in n), None)

        def plot(axes):
            if proxy and best_of(rows, gold):
                axes.plot(*zip(*best_of(rows, proxy)), ".-", color=COLOURS[1], label="its own score")
                axes.plot(*zip(*best_of(rows, gold)), ".-", color=COLOURS[0], label="gold")

        return chart(plot, f"{name}: best of n by {Path(proxy or '').name}. Where its score rises and gold does not, it is being exploited", "KL, nats (log n - (n-1)/n)", "reward of the best")

    return "".join(one(name, rows) for name, rows in figures.items())


def calibration(figures):
    """How often a reward model is right against how sure it is."""
    points = [(float(m[1]), f) for m, f in ((re.fullmatch(r"right where it says ([\d.]+) .*", name), f) for name, f in figures.items()) if m]

    def plot(axes):
        if points:
            axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.6)
            low, high = ([(f["value"] - f["low"] if f["low"] is not None else 0) for _, f in points], [(f["high"] - f["value"] if f["high"] is not None else 0) for _, f in points])
            axes.errorbar([x for x, _ in points], [f["value"] for _, f in points], yerr=[low, high], fmt="o-", color=COLOURS[2], markersize=4)

    return chart(plot, "Calibration of the reward model on held-out pairs: on the line it is as often right as it says", "says it is right", "is right")


def reply_table(answers):
    """The same six prompts answered by every stage."""
    by_prompt = {name: {json.dumps(row["prompt"]): row for row in rows} for name, rows in answers.items()}
    shared = [p for p in next(iter(by_prompt.values()), {}) if all(p in rows for rows in by_prompt.values())][:6]
    blocks = []
    for i, key in enumerate(shared):
        asked = json.loads(key)
        rows = []
        for name, row in ((name, rows[key]) for name, rows in by_prompt.items()):
            worth = next((f"{v:.2f}" for k, v in row.items() if k.endswith(":gold")), "")
            rows.append((f"<b>{text(name)}</b>", text(row["completion"]) + ("" if row.get("finished", True) else ' <span class="soft">(unfinished)</span>'), worth))
        blocks.append(f"<details{' open' if i < 2 else ''}><summary>{text(asked if isinstance(asked, str) else asked[-1]['content'])}</summary>{grid(('model', 'answer', 'gold'), rows, {2})}</details>")
    return "".join(blocks)


def lineage(runs):
    """Where each run's newest checkpoint came from, back to the corpus, with hashes."""
    rows = []
    for name, run in runs.items():
        info = run["info"]
        if info:
            line = " → ".join([*(f"{text(p.get('stage', Path(p['path']).name))} <code>{text(p['weights'][:8])}</code>" for p in info["lineage"]), f"<b>{text(name)}</b>"])
            data = "<br>".join(f"{text(Path(path).name)} <code>{text(digest[:8])}</code>" for path, digest in info["data"].items())
            rows.append((line, str(info["step"]), data, f"<code>{text(info['code'][:8])}</code>"))
    return grid(("lineage (SHA-256 of weights)", "steps", "data (SHA-256)", "code"), rows) if rows else ""


def make(out, record):
    """Write DIR/report.html -> its path. record: what quickstart.py knows: {"stages", "figures", hardware and versions}, or {} for any other runs."""
    found, gold = collect(out), "data/world.py:gold"
    if not any(found.values()):
        raise UserError(f"--out={out}: nothing to report: no run (*/log.jsonl) and no evaluation (*.json of evaluate.py) is there")
    parts, seconds = [], {s["stage"]: s["seconds"] for s in record.get("stages", [])}
    if record.get("figures"):
        head = ("stage", "figure", "before", "after [95 %]", "bound")
        mark = {True: ' <span class="good" title="the interval excludes no change">✓</span>', False: ' <span class="bad" title="the interval includes no change">✗</span>', None: ""}
        rows = [(f"<b>{text(f['stage'])}</b>", text(f["figure"]), show(f["before"]), show(f["after"]) + mark[f.get("improved")], text(f["bound"])) for f in record["figures"]]
        parts.append("<h2>What each stage did, on prompts that training never saw</h2>" + grid(head, rows, {2, 3}))
    if seconds:
        rows = [(text(s["stage"]), f"{s['seconds'] / 60:.1f}", f"<code>{text(s['command'])}</code>") for s in record["stages"]]
        parts.append(f"<h2>Commands: {clock_time(sum(seconds.values()))} in all</h2>" + grid(("stage", "minutes", "command"), rows, {1}))
    drawn = frontier(found, gold) + proxy_and_gold(found["figures"], gold)
    reward_models = {name: run["info"]["metrics"]["figures"] for name, run in found["runs"].items() if run["info"].get("metrics", {}).get("figures")}
    drawn += "".join(calibration(figures) for name, figures in reward_models.items() if name != "weak_rm")
    if drawn:
        parts.append(f'<h2>Reward, and what it costs</h2><div class="charts">{drawn}</div>')
    judged = [(text(name), text(figure.removeprefix("judge: ")), show(f)) for name, figures in found["figures"].items() for figure, f in figures.items() if figure.startswith("judge")]
    for file in sorted(out.glob("*.log.jsonl")):  # of rlaif.py: its last line has sums and counts of all pairs
        last = read_lines(file)[-1]
        judged += [(text(file.stem.removesuffix(".log")), text(name), f"{total / n:.3g} of {n:,}") for name, (total, n) in last.get("figures", {}).items() if n]
        judged += [(text(file.stem.removesuffix(".log")), text(name), f"{n:,}") for name, n in last.get("counts", {}).items()]
    if judged:
        parts.append("<h2>The judge</h2>" + grid(("model or pairs", "agreement with the truth, and what was counted", ""), judged, {2}))
    if found["answers"]:
        parts.append("<h2>The same prompts, answered by every stage</h2>" + reply_table(found["answers"]))
    if found["runs"]:
        parts.append(f'<h2>Learning curves</h2><div class="charts">{curves(found["runs"])}</div>' if pyplot else "<p>Charts need matplotlib: pip install matplotlib, then this command again.</p>")
        parts.append("<h2>Where every model came from</h2>" + lineage(found["runs"]))
    everything = [(text(name), text(figure), show(f)) for name, figures in found["figures"].items() for figure, f in figures.items()]
    if everything:
        parts.append(f"<h2>All figures</h2><details><summary>{len(everything)} figures of {len(found['figures'])} evaluations</summary>{grid(('evaluation', 'figure', 'value [95 %]'), everything, {2})}</details>")
    machine = ", ".join(f"{k} {text(v)}" for k, v in record.items() if k in ("hardware", "torch", "python", "device")) or ", ".join(
        f"{k} {text(v)}" for k, v in next((r["info"] for r in found["runs"].values() if r["info"]), {}).items() if k in ("hardware", "torch", "python", "device"))  # fmt: skip
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Feinschliff: {text(out.name)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>Feinschliff</h1><p class="soft">Train, refine, sharpen: the report of {text(out)}. {machine}{f", code {record['code'][:8]}" if 'code' in record else ""}</p>
{"".join(parts)}</body></html>"""
    replace_text(out / "report.html", page)
    return out / "report.html"
