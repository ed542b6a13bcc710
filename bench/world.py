"""The quick start over seeds, threads and products: its figures, whether each holds in every
combination, and the ranges that quickstart.py compares a reader's run with.

A combination runs quickstart.py's own commands. Each ends in DIR/NAME/row.json; what is there is
not run again, so rows may be made one by one, by several processes, on several days. --screen makes
only what the first bounds ask of the pretrained model. Without --only the rows of all combinations
that are there are shown. Rows of which only a log is left count in by --earlier.

--ranges writes {"stage | figure": [low, high]}: the ends of the 95 % intervals of these rows, and
of the file as it was, that lie furthest apart.

    python -m bench.world --only=seed-0,seed-1-1-thread
    python -m bench.world --out=bench/results/world_rows \\
        --earlier=bench/results/world_rows_2026_11_26_cpu.txt --ranges=bench/results/ranges.json
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import quickstart
from data.read import read_json, read_jsonl
from data.world import features
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.files import lock_file, write_json
from runtime.process import describe, launch

BOUNDS = {  # figure: (what is asked of every combination, whether more is better)
    "pretrain | judge: be kind, both orders": (0.95, True),
    "pretrain | judge: be brief, both orders": (0.95, True),
    "pretrain | held-out sums right": (0.98, True),
    "reward | held-out pairs ordered as gold's": (0.77, True),
    "ppo | gold reward, SFT's before": (1.35, True),
    "grpo, after ppo | gold reward, PPO's before": (1.78, True),
    "dpo | gold reward, SFT's before": (1.45, True),
    "rlaif + dpo | gold reward, SFT's before": (0.85, True),
    "rlaif + dpo | rude phrases per completion": (0.10, False),
}
BLIND = "reward | the same by a scorer blind to sums"
LAST_SCREENED = "evaluate base"


@dataclass(frozen=True)
class Combination:
    seed: int
    threads: int = 2  # of the machine; stages that run side by side have half of them each
    environment: tuple = ()  # ((name, value), ...)
    other_product: bool = False


# On a processor without AVX-512 PyTorch's own kernels are AVX2 already; its baseline ones differ
CAPABILITY = "default" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "avx2"
COMBINATIONS = {f"seed-{seed}": Combination(seed) for seed in range(10)}
COMBINATIONS |= {f"seed-{seed}-1-thread": Combination(seed, threads=1) for seed in range(5)}
COMBINATIONS |= {f"seed-{seed}-other-product": Combination(seed, other_product=True) for seed in range(3)}
COMBINATIONS |= {
    f"seed-{seed}-{CAPABILITY}": Combination(seed, environment=(("ATEN_CPU_CAPABILITY", CAPABILITY),))
    for seed in range(3)
}


@dataclass
class Config:
    # combinations to run, comma-separated; all: every one that has no row yet; "": none
    only: str = ""
    # run no further than the judge and the sums of the pretrained model
    screen: bool = False
    # one quick start a combination below it
    out: str = "out/bench_world"
    # log of earlier rows, whose last table counts in; "": none
    earlier: str = ""
    # file of the ranges to write, from the rows that are there and from what it holds; "": none
    ranges: str = ""


def order_by_manners(pairs):
    """How many of the pairs that gold tells apart would be ordered as gold does by somebody who
    knows all of it but whether the sum is right; ties count half."""
    gold = [p["gold_chosen"] - p["gold_rejected"] for p in pairs]
    sums = [features(p["chosen"], p["answer"])["right"] - features(p["rejected"], p["answer"])["right"] for p in pairs]
    manners = [round(g - r, 6) for g, r in zip(gold, sums)]
    found = [0.5 if m == 0 else float((m > 0) == (g > 0)) for m, g in zip(manners, gold) if g]
    return sum(found) / len(found)


def figures(out):
    """{"stage | figure": {"value", "low", "high"}} of a quick start: all of its table if it is
    whole, else what the pretrained model reached."""
    if (out / "ai_dpo.json").exists():
        found = {f"{f['stage']} | {f['figure']}": f["after"] for f in quickstart.figures(out)}
        blind = order_by_manners([row for _, row in read_jsonl(f"{out}/world/pairs_val.jsonl")])
        return found | {BLIND: {"value": blind, "low": None, "high": None}}
    base = read_json(out / "base.json")["figures"]
    judged = {f"pretrain | {name}": base[name] for name in base if name.endswith("both orders")}
    return judged | {"pretrain | held-out sums right": base["completions right"]}


def commands(out, seed, screen):
    """[(stage, command, whether it runs beside another)] of a quick start, or of its screening."""
    first, *lanes = quickstart.command_lanes(quickstart.Config(out=str(out), seed=seed))
    found = [(stage, line, False) for stage, line in first.items()]
    found += [(stage, line, True) for lane in lanes for stage, line in lane.items()]
    if screen:
        names = [*list(first)[: list(first).index("pretrain") + 1], LAST_SCREENED]
        found = [row for row in found if row[0] in names]
    return found


def run(out, combination, screen):
    """Run what a combination has not run yet; its figures go to row.json."""
    lock_file(out / ".lock", out)
    record = read_json(out / "report.json") if (out / "report.json").exists() else {"stages": []}
    os.environ |= dict(combination.environment)
    for stage, line, beside in commands(out, combination.seed, screen):
        if stage in {ran["stage"] for ran in record["stages"]}:
            continue
        words = shlex.split(line)
        multiplies = words[0] != "-m"  # -m data.world and its like only read and write text
        wrapper = ["-m", "bench.other_product"] if combination.other_product and multiplies else []
        threads = max(1, combination.threads // 2) if beside else combination.threads
        ran = quickstart.run(stage, words, threads, wrapper)
        if ran is None:
            sys.exit(1)
        record["stages"].append(ran)
        write_json(out / "report.json", record)
    write_json(out / "row.json", {"screened": screen, "figures": figures(out)})
    for name, _ in combination.environment:
        del os.environ[name]


def holds(name, value):
    bound, more = BOUNDS[name]
    return value >= bound if more else value <= bound


def rows_table(rows):
    """A line a combination: the figures that have a bound, those beyond it marked."""
    names = [name.replace(" | ", ": ").replace("held-out ", "").replace(", both orders", "") for name in BOUNDS]
    lines = [
        (f"({i})", name, f"{'>=' if more else '<='} {bound}")
        for i, (name, (bound, more)) in enumerate(zip(names, BOUNDS.values()), 1)
    ]
    head = ("combination", *(f"({i})" for i in range(1, len(BOUNDS) + 1)))
    body = []
    for name, row in rows.items():
        cells = []
        for figure in BOUNDS:
            found = row["figures"].get(figure)
            cells.append("" if found is None else f"{found['value']:.3f}" + "!" * (not holds(figure, found["value"])))
        body.append((name, *cells))
    return quickstart.table(lines) + "\n\n" + quickstart.table([head, *body])


def summary(rows):
    """{figure: {"rows", "mean", "low", "high"}} over the rows that have it."""
    found = {}
    for row in rows.values():
        for name, figure in row["figures"].items():
            found.setdefault(name, []).append(figure["value"])
    return {
        name: {"rows": len(values), "mean": sum(values) / len(values), "low": min(values), "high": max(values)}
        for name, values in found.items()
    }


def read_summary(log):
    """The `summary` in the last table of the text of a log of this bench."""
    table = log[log.rindex("\nfigure ") + 1 :].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[1:]:
        name, n, *numbers = re.split("  +", line.strip())
        found[name] = {"rows": int(n), **dict(zip(("mean", "low", "high"), map(float, numbers), strict=True))}
    return found


def add_summaries(a, b):
    """The `summary` of the rows of both."""
    both = {name: a.get(name) or b[name] for name in [*a, *b]}
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        n = x["rows"] + y["rows"]
        mean = (x["rows"] * x["mean"] + y["rows"] * y["mean"]) / n
        both[name] = {"rows": n, "mean": mean, "low": min(x["low"], y["low"]), "high": max(x["high"], y["high"])}
    return both


def ranges(rows, known):
    """{"stage | figure": [low, high]}: of each figure that has 95 % intervals, their outermost
    ends, or the `known` ones that lie further out."""
    found = dict(known)
    for row in rows.values():
        for name, figure in row["figures"].items():
            if figure["low"] is not None:
                low, high = found.get(name, (figure["low"], figure["high"]))
                found[name] = [min(low, figure["low"]), max(high, figure["high"])]
    return {name: [round(low, 4), round(high, 4)] for name, (low, high) in found.items()}


def main(config):
    check_ranges(config)
    out = Path(config.out)
    wanted = list(COMBINATIONS) if config.only == "all" else [name for name in config.only.split(",") if name]
    for name in wanted:
        if name not in COMBINATIONS:
            raise UserError(f"--only={name}: no combination; there are {', '.join(COMBINATIONS)}")
        if not (out / name / "row.json").exists() or read_json(out / name / "row.json")["screened"] > config.screen:
            run(out / name, COMBINATIONS[name], config.screen)
    # all that are there: another processor has another CAPABILITY
    rows = {path.parent.name: read_json(path) for path in sorted(out.glob("*/row.json"))}
    if not rows:
        raise UserError(f"--out={out}: no row is there; name combinations with --only")

    print(f"\n{len(rows)} of {len(COMBINATIONS)} combinations, {describe(torch.device('cpu'))}\n")
    print(rows_table(rows) + "\n")
    lines = [("figure", "rows", "mean", "low", "high")]
    found = summary(rows)
    if config.earlier:
        found = add_summaries(read_summary(Path(config.earlier).read_text()), found)
        print(f"with the rows of {config.earlier}:\n")
    for name, s in found.items():
        lines.append((name, str(s["rows"]), *(f"{s[k]:.4g}" for k in ("mean", "low", "high"))))
    print(quickstart.table(lines))
    if config.ranges:
        file = Path(config.ranges)
        write_json(file, ranges(rows, read_json(file) if file.exists() else {}))


if __name__ == "__main__":
    launch(main, Config)
