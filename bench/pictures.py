"""The README's drawings: the pipeline, light and dark, and the end of a quick start as a terminal
shows it.

The pipeline is laid out below by hand. The terminal's lines are those of a log of a quick start:
the rows that must improve, and the last line. They appear one after another.

    python -m bench.pictures
    python -m bench.pictures --log=bench/results/quickstart_cpu.txt --out=docs
"""

import html
from dataclasses import dataclass
from pathlib import Path

from data.read import read_text
from runtime.cli import check_ranges, launch
from runtime.errors import UserError


@dataclass
class Config:
    # log of a quick start: what it printed from the table on
    log: str = "bench/results/quickstart_cpu.txt"
    # directory to write pipeline_light.svg, pipeline_dark.svg and quickstart_end.svg to
    out: str = "docs"


@dataclass
class Colours:
    ink: str
    quiet: str
    line: str
    data: str  # behind what goes in
    train: str
    refine: str
    sharpen: str
    serve: str
    area: str  # behind the whole of sharpening


LIGHT = Colours("#1f2933", "#52606d", "#7b8794", "#ffffff", "#cfe3fa", "#d3f0dc", "#fde3c3", "#e8dafb", "#faf6ef")
DARK = Colours("#e4e7eb", "#9aa5b1", "#7b8794", "#1b232c", "#1d4268", "#1c4a30", "#5c3d14", "#43306b", "#181d23")
FONT = "font-family='ui-sans-serif, system-ui, Segoe UI, Helvetica, Arial, sans-serif'"
MONO = "font-family='ui-monospace, SFMono-Regular, Menlo, Consolas, monospace'"


# --------------------------------------------------------------------------------------------------
# The pipeline


def box(c, x, y, width, fill, title, note="", radius=8):
    """A script: its name, and a few words on it."""
    height = 52 if note else 36
    parts = [f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='{radius}' fill='{fill}' stroke='{c.line}'/>"]
    middle = x + width / 2
    parts.append(
        f"<text x='{middle}' y='{y + 23}' text-anchor='middle' font-weight='600' fill='{c.ink}'>{title}</text>"
    )
    if note:
        parts.append(
            f"<text x='{middle}' y='{y + 41}' text-anchor='middle' font-size='12' fill='{c.quiet}'>{note}</text>"
        )
    return "".join(parts)


def pill(c, x, y, width, title):
    """Data: what goes in."""
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='32' rx='16' fill='{c.data}' stroke='{c.line}' "
        f"stroke-dasharray='4 3'/><text x='{x + width / 2}' y='{y + 21}' text-anchor='middle' font-size='13' "
        f"fill='{c.quiet}'>{title}</text>"
    )


def arrow(c, *points):
    """A line through some points [(x, y)], with a head at the last."""
    path = " L".join(f"{x} {y}" for x, y in points)
    return f"<path d='M{path}' fill='none' stroke='{c.line}' stroke-width='1.6' marker-end='url(#head)'/>"


def pipeline(c):
    """The pipeline as an SVG file, in these colours."""
    head = (
        f"<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' "
        f"orient='auto-start-reverse'><path d='M0 0L10 5L0 10z' fill='{c.line}'/></marker></defs>"
    )
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1000 372' {FONT} font-size='15' role='img'>",
        "<title>corpus, train, refine, sharpen by preferences, rewards or a teacher, serve, vote, again</title>",
        head,
        f"<rect x='428' y='44' width='404' height='316' rx='12' fill='{c.area}' stroke='{c.line}'/>",
        f"<text x='442' y='66' font-size='13' fill='{c.quiet}'>sharpen</text>",
        pill(c, 8, 190, 92, "corpus"),
        arrow(c, (100, 206), (124, 206)),
        box(c, 126, 180, 124, c.train, "pretrain.py", "train"),
        arrow(c, (250, 206), (280, 206)),
        pill(c, 286, 106, 116, "conversations"),
        arrow(c, (344, 138), (344, 178)),
        box(c, 282, 180, 124, c.refine, "sft.py", "refine"),
        arrow(c, (406, 206), (426, 206)),
        pill(c, 444, 108, 124, "preferences"),
        box(c, 444, 168, 124, c.sharpen, "rlaif.py", "AI feedback"),
        arrow(c, (506, 168), (506, 142)),
        pill(c, 444, 240, 124, "a rule, a reward"),
        pill(c, 444, 302, 124, "a teacher"),
        arrow(c, (568, 118), (590, 90), (604, 90)),
        arrow(c, (568, 130), (590, 158), (604, 158)),
        box(c, 606, 64, 100, c.sharpen, "reward.py", "a score"),
        arrow(c, (706, 90), (720, 90)),
        box(c, 722, 64, 96, c.sharpen, "ppo.py", "RLHF"),
        box(c, 606, 132, 212, c.sharpen, "dpo.py", "straight from the pairs"),
        arrow(c, (568, 256), (586, 256), (586, 226), (604, 226)),
        box(c, 606, 200, 212, c.sharpen, "grpo.py", "from rewards that check"),
        arrow(c, (568, 318), (604, 310)),
        box(c, 606, 284, 212, c.sharpen, "distill.py", "token by token"),
        arrow(c, (832, 206), (854, 206)),
        box(c, 856, 180, 132, c.serve, "serve.py", "chat, compare, vote"),
        arrow(c, (922, 180), (922, 20), (506, 20), (506, 106)),
        f"<text x='620' y='14' font-size='13' fill='{c.quiet}'>votes: sharpen.py, and again</text>",
        "</svg>\n",
    ]
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------
# The terminal


def last_words(log):
    """The lines of a quick start's log to show: the command, the rows of the table that improved
    for sure, and where the result is."""
    lines = read_text(log).splitlines()
    heads = [line for line in lines if line.startswith("stage ")]
    rows = [line for line in lines if line.endswith("  sure")]
    ends = [line for line in lines if " in all" in line and "; talk to it: " in line]
    if not (heads and rows and ends):
        raise UserError(f"{log}: no table of a quick start in it")
    where, _, command = ends[0].partition("; talk to it: ")
    return ["$ bash run.sh", "...", heads[0], *rows, "", where, "", f"$ {command}"]


def terminal(lines, seconds=0.35):
    """Lines of text as an SVG file in which they appear one after another, every so many
    seconds."""
    width, height = max(map(len, lines)) * 7.3 + 32, len(lines) * 18 + 52
    rows = []
    for i, line in enumerate(lines):
        colour = "#9fe0b0" if line.startswith("$") else "#e4e7eb"
        rows.append(
            f"<text x='16' y='{i * 18 + 50}' fill='{colour}' xml:space='preserve' class='line' "
            f"style='animation-delay:{i * seconds:.2f}s'>{html.escape(line, quote=False)}</text>"
        )
    dots = "".join(
        f"<circle cx='{18 + 16 * i}' cy='16' r='5' fill='{x}'/>"
        for i, x in enumerate(("#e06c60", "#e0b050", "#62b062"))
    )
    style = (
        "<style>.line{opacity:0;animation:appear .2s forwards}@keyframes appear{to{opacity:1}}"
        "@media(prefers-reduced-motion:reduce){.line{opacity:1;animation:none}}</style>"
    )
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height}' {MONO} font-size='12' role='img'>"
    )
    back = f"<rect width='{width:.0f}' height='{height}' rx='8' fill='#1b232c'/>"
    return "\n".join([head, "<title>the end of a quick start</title>", style, back, dots, *rows, "</svg>\n"])


def main(config):
    check_ranges(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"pipeline_light": pipeline(LIGHT), "pipeline_dark": pipeline(DARK)}
    pictures["quickstart_end"] = terminal(last_words(config.log))
    for name, text in pictures.items():
        (out / f"{name}.svg").write_text(text, encoding="utf-8")
        print(out / f"{name}.svg")


if __name__ == "__main__":
    launch(main, Config)
