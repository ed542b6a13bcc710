"""The quick start, whole but tiny: it ends in a report, is not run twice, and goes on where it was
interrupted."""

import importlib
import json
import re
import shlex
import signal
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from runs import here, refused, start

import bench.world as world_bench
import quickstart
import quickstart_puzzles
import report as page_maker
from data import puzzles
from report import matplotlib
from runtime import checkpoint, files
from runtime.cli import check_ranges, parse_cli
from runtime.errors import UserError


def check_page(page, words):
    """One whole HTML file that asks nothing of the network, with these words in it."""
    tags = Tags()
    tags.feed(page)
    assert not tags.open, tags.open
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import|<script""", page)
    for word in words:
        assert word in page or matplotlib is None, word
    assert matplotlib is None or page.count("<svg") == page.count("</svg>") > 1 and "#123456" not in page


class Tags(HTMLParser):
    """The elements that are open and never closed, or closed and never opened."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def run_here(lanes):
    """Run the commands of lanes in this process -> the record of a quick start that ran them."""
    record = {"stages": []}
    for stage, line in (pair for lane in lanes for pair in lane.items()):
        words = shlex.split(line)
        module, argv = module_of(words)
        here(module.main, parse_cli(module.Config, argv))
        record["stages"].append({"stage": stage, "command": shlex.join(["python", *words]), "seconds": 1.0})
    return record


def test_interrupted_it_continues_where_it_was(tmp_path, capfd, monkeypatch):
    """Interrupted twice: in the middle of the world, whose files are made again, and of
    pretraining, which is resumed."""
    out = tmp_path / "qs"
    (out / "world").mkdir(parents=True)
    (out / "world/pretrain.jsonl").write_text('{"text": "half a wor')
    first, *_ = quickstart.command_lanes(quickstart.Config(out=str(out), fast=True))
    lines = {name: first[name] for name in ("world", "tokenizer", "prepare", "pretrain")}
    lines["pretrain"] = lines["pretrain"].replace("--save_every=200", "--save_every=5")
    world = quickstart.run("world", shlex.split(lines["world"]))
    record = run_here([{name: lines[name] for name in ("tokenizer", "prepare")}])
    run_here([{"pretrain": lines["pretrain"].replace("--steps=20", "--steps=10")}])
    (out / "report.json").write_text(json.dumps({"stages": [world, *record["stages"]]}))
    monkeypatch.setattr(quickstart, "command_lanes", lambda config: [lines, {}])
    monkeypatch.setattr(quickstart, "figures", lambda out: [])
    capfd.readouterr()
    here(quickstart.main, quickstart.Config(out=str(out), fast=True))
    printed = capfd.readouterr().out
    assert "world: done already" in printed and "prepare: done already" in printed
    assert "continuing after step 10" in printed
    steps = [r["step"] for r in map(json.loads, (out / "base/log.jsonl").read_text().splitlines()) if "loss" in r]
    assert steps == list(range(1, 21))
    assert [ran["stage"] for ran in json.loads((out / "report.json").read_text())["stages"]] == list(lines)


def test_it_ends_in_the_table_and_the_report_of_one_run(tmp_path, capfd):
    out = tmp_path / "qs"
    config = quickstart.Config(out=str(out), fast=True)
    lanes = quickstart.command_lanes(config)
    out.mkdir()
    (out / "report.json").write_text(json.dumps(run_here(lanes)))
    capfd.readouterr()
    here(quickstart.main, config)  # nothing is left to run
    printed = capfd.readouterr().out
    assert printed.count("done already") == sum(map(len, lanes)) and "story loss" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["seconds"] == len(lanes[0]) + max(map(len, lanes[1:]))  # lanes run side by side
    figures = {(f["stage"], f["figure"]): f for f in report["figures"]}
    loss = figures["pretrain", "story loss, nats per token"]
    assert 0 < loss["after"]["value"] < loss["before"]["value"] and loss["improved"]  # even 20 steps learn something
    for stage in ("ppo", "grpo, after ppo", "dpo", "rlaif + dpo"):
        assert (
            0 <= figures[stage, "win rate against SFT, by gold"]["after"]["value"] <= 1
            and figures[stage, "KL to SFT, nats per completion"]["after"]["value"] > 0
        )
    assert (
        figures["grpo, after ppo", "gold reward, PPO's before"]["before"]
        == figures["ppo", "gold reward, SFT's before"]["after"]
    )
    check_page(
        (out / "report.html").read_text(),
        ["grpo.py --init=", "best: best of n by rm", "pretrain", "The same prompts", "right where it says"],
    )
    for run, parents in {
        "sft": ["pretrain"],
        "rm": ["pretrain", "sft"],
        "dpo": ["pretrain", "sft"],
        "ppo": ["pretrain", "sft"],
        "grpo": ["pretrain", "sft", "ppo"],
    }.items():
        info = json.loads((checkpoint.find(out / run) / checkpoint.INFO).read_text())
        assert [p["stage"] for p in info["lineage"]] == parents
    assert report["code"] and report["torch"]

    # A report of runs alone: a directory that no quick start made.
    (tmp_path / "mine").mkdir()
    for name in ("sft", "grpo"):
        (tmp_path / "mine" / name).symlink_to(out / name)
    page_maker.make([tmp_path / "mine"])
    check_page((tmp_path / "mine/report.html").read_text(), ["grpo: reward", "sft: loss"])


def test_the_world_of_puzzles_ends_in_the_table_of_its_models(tmp_path):
    """All of its commands, in this process, and what is measured of them."""
    out = tmp_path / "puzzles"
    run_here(quickstart.command_lanes(quickstart.Config(world="puzzles", out=str(out), fast=True)))
    figures = {(f["stage"], f["figure"]): f for f in quickstart.puzzle_figures(out)}
    for stage, (before, after) in quickstart_puzzles.COMPARED.items():
        for side, model in (("before", before), ("after", after)):
            measured = json.loads((out / f"{model}.json").read_text())["figures"]
            assert figures[stage, "right, pass@1"][side] == measured[quickstart_puzzles.PASS_1]
            assert figures[stage, "tokens per answer"][side] == measured["tokens per sample"]
    assert {f"right, pass@1, family {name}" for name in puzzles.FAMILIES} <= {name for _, name in figures}
    lineage = {"r1": ["pretrain", "sft"], "distilled": ["pretrain", "sft"], "first": ["pretrain", "sft"]}
    for run, parents in lineage.items():
        info = json.loads((checkpoint.find(out / run) / checkpoint.INFO).read_text())
        assert [p["stage"] for p in info["lineage"]] == parents
    kept = [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]
    assert kept and all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in kept)
    (out / "report.json").write_text(json.dumps({"stages": [], "figures": list(figures.values())}))
    page = page_maker.make([out]).read_text()
    check_page(page, ["zero: reward", "small_rl: reward", "pass@8 before"])


def test_puzzles_are_not_served(tmp_path):
    with pytest.raises(UserError, match="--serve: it needs --world=shop"):
        here(quickstart.main, quickstart.Config(world="puzzles", serve=True, out=str(tmp_path)))


@pytest.mark.parametrize("world", ["shop", "puzzles"])
@pytest.mark.parametrize("fast", [False, True])
def test_every_command_reads_what_an_earlier_one_of_its_lane_wrote(world, fast):
    out = "out/some where"
    first, *lanes = quickstart.command_lanes(quickstart.Config(world=world, out=out, fast=fast))
    for lane in lanes:
        written = set()
        for stage, line in (first | lane).items():
            words = shlex.split(line)
            values = {name: value for name, _, value in (word.partition("=") for word in words)}
            read = re.findall(rf"{out}/\w+", " ".join(v for name, v in values.items() if name not in WRITTEN))
            assert set(read) <= written, (stage, set(read) - written)
            for name in WRITTEN & values.keys():
                written.add(f"{out}/{Path(values[name]).relative_to(out).parts[0].removesuffix('.jsonl')}")


@pytest.mark.parametrize("world", ["shop", "puzzles"])
def test_every_command_is_one_that_a_user_can_type(world):
    lanes = quickstart.command_lanes(quickstart.Config(world=world, out="out/a b"))
    for stage, line in (pair for lane in lanes for pair in lane.items()):
        words = shlex.split(line)
        assert words[0] == "-m" or words[0].endswith(".py"), stage
        assert stage == "sample" or any("out/a b" in word for word in words)
        module, argv = module_of(words)
        check_ranges(parse_cli(module.Config, argv))


def module_of(words):
    """(the module that a command runs, its flags)"""
    module, *argv = words[1:] if words[0] == "-m" else [words[0].removesuffix(".py"), *words[1:]]
    return importlib.import_module(module), argv


def test_another_command_of_the_same_stage_is_refused(tmp_path):
    (tmp_path / "report.json").write_text(
        json.dumps({"stages": [{"stage": "world", "command": "python -m data.world --seed=9", "seconds": 1.0}]})
    )
    with pytest.raises(UserError, match="world was run by another command"):
        here(quickstart.main, quickstart.Config(out=str(tmp_path)))


def test_a_stage_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "STOPPED", [])
    with pytest.raises(UserError, match="sample ended with status 1"):
        quickstart.run("sample", ["sample.py", f"--model={tmp_path}"])


WRITTEN = {"--out", "--samples", "--kept"}  # the flags that name what a command writes
SLEEP = "-c 'import time; print(1, flush=True); time.sleep(60)'"


def lanes_of(out, *lanes):
    """Run lanes as a quick start does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, quickstart.stop)
    quickstart.run_side_by_side(lanes, {"stages": []}, out / "report.json")


def test_a_signal_reaches_the_stages_of_both_lanes_and_ends_all(fork, tmp_path):
    child = fork(lanes_of, tmp_path, {"ppo": SLEEP, "grpo": SLEEP}, {"dpo": SLEEP})
    while not {"ppo | 1", "dpo | 1"} <= set(child.output().splitlines()):
        assert not child.ended(), child.output()
        time.sleep(0.01)
    child.send(signal.SIGTERM)
    status, output = child.wait()
    assert status == 143 and "grpo" not in output
    for stage in ("ppo", "dpo"):
        assert f"stopped in {stage}; the same command continues from here" in output


def test_a_stage_that_fails_ends_the_one_beside_it(fork, tmp_path):
    fail = """-c "import sys; sys.exit('error: no')" """
    child = fork(lanes_of, tmp_path, {"ppo": SLEEP, "grpo": SLEEP}, {"world": "-c 1", "dpo": fail})
    assert child.wait()[0] == 1 and "dpo ended with status 1" in child.output() and "grpo" not in child.output()
    assert [ran["stage"] for ran in json.loads((tmp_path / "report.json").read_text())["stages"]] == ["world"]


def test_lanes_share_the_threads(fork, tmp_path):
    show = """-c "import os; print('threads', os.environ['OMP_NUM_THREADS'])" """
    child = fork(lanes_of, tmp_path, {"ppo": show}, {"dpo": show})
    assert child.wait()[0] == 0 and {"ppo | threads 1", "dpo | threads 1"} <= set(child.output().splitlines())


def test_what_lies_outside_its_range_is_named():
    rows = [quickstart.row("ppo", name, {}, {"value": value}) for name, value in (("a", 0.5), ("b", 0.7), ("c", 9))]
    (line,) = quickstart.outside(rows, {"ppo | a": [0.4, 0.5], "ppo | b": [0.4, 0.65]})
    assert line == "outside its range: ppo | b: 0.7, elsewhere 0.4 to 0.65"
    (line,) = quickstart.outside(rows, {"ppo | a": [0.4, 0.5], "ppo | b": [0.4, 0.7]})
    assert line == "all 2 figures that were measured elsewhere lie within their ranges"
    assert quickstart.outside(rows, {}) == []


def test_two_quick_starts_do_not_share_a_directory(fork, tmp_path):
    files.lock_file(tmp_path / ".lock", tmp_path)
    try:
        assert f"--out={tmp_path}: another process is writing" in refused(start(fork, quickstart, out=tmp_path))
    finally:
        files.LOCKS.pop().close()


def test_a_stage_whose_interval_holds_no_change_is_an_error(tmp_path, monkeypatch):
    """After all rows have run, the table shown and the report written."""
    before = {"value": 0.3, "low": 0.2, "high": 0.4}
    after = {"value": 0.5, "low": 0.35, "high": 0.6}
    found = [quickstart.row("ppo", "gold reward", before, after, "1.9", "rises")]
    assert found[0]["improved"] is False
    monkeypatch.setattr(quickstart, "command_lanes", lambda config: [{}, {}, {}])
    monkeypatch.setattr(quickstart, "figures", lambda out: found)
    (tmp_path / "m_answers.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "finished": True}) + "\n")
    with pytest.raises(UserError, match="no sure improvement.*ppo: gold reward"):
        here(quickstart.main, quickstart.Config(out=str(tmp_path)))
    assert "✗" in (tmp_path / "report.html").read_text()
    found[0]["improved"] = True
    here(quickstart.main, quickstart.Config(out=str(tmp_path)))


def test_a_screening_is_what_the_judge_needs_and_a_whole_row_every_stage(tmp_path):
    screened = [stage for stage, _, _ in world_bench.commands(tmp_path, 0, True)]
    assert screened == ["world", "tokenizer", "prepare", "pretrain", "evaluate base"]
    whole = world_bench.commands(tmp_path, 0, False)
    first, *lanes = quickstart.command_lanes(quickstart.Config(out=str(tmp_path)))
    assert {stage for stage, _, beside in whole if beside} == {*lanes[0], *lanes[1]}
    assert {stage for stage, _, _ in whole} == {*first, *lanes[0], *lanes[1]}


def test_bounds_and_ranges_name_figures_of_the_table():
    asked = {" | ".join(cell.strip() for cell in line.split("|")[:2]) for line in quickstart.TABLE.split("\n") if line}
    judged = {name for name in world_bench.BOUNDS if "judge: " in name}
    assert len(judged) == 2 and set(world_bench.BOUNDS) - judged <= asked
    for name, (low, high) in json.loads(page_maker.RANGES.read_text()).items():
        assert (name in asked or "judge: " in name) and low <= high


def test_a_range_spans_the_intervals_of_all_rows_and_what_breaks_a_bound_is_marked():
    kind, sums = "pretrain | judge: be kind, both orders", "pretrain | held-out sums right"
    rows = {
        "seed-0": {"figures": {kind: {"value": 0.96, "low": 0.94, "high": 0.98}}},
        "seed-1": {
            "figures": {
                kind: {"value": 0.90, "low": 0.88, "high": 0.92},
                sums: {"value": 0.99, "low": 0.98, "high": 1.0},
                "tokenizer | bytes per token": {"value": 2.76, "low": None, "high": None},
            }
        },
    }
    assert world_bench.ranges(rows, {}) == {kind: [0.88, 0.98], sums: [0.98, 1.0]}
    known = {kind: [0.9, 0.99], "ppo | gold": [1.0, 1.5]}
    assert world_bench.ranges(rows, known) == {kind: [0.88, 0.99], sums: [0.98, 1.0], "ppo | gold": [1.0, 1.5]}
    assert world_bench.summary(rows)[kind] == {"rows": 2, "mean": pytest.approx(0.93), "low": 0.90, "high": 0.96}
    *_, first, second = world_bench.rows_table(rows).splitlines()
    assert first.split() == ["seed-0", "0.960"] and second.split() == ["seed-1", "0.900!", "0.990"]


def test_the_rows_behind_the_readme_are_there_and_give_its_log(tmp_path, capsys):
    """And the ranges: what is kept of earlier rows is their log, and what they widened."""
    results = ROOT / "bench/results"
    ranges = tmp_path / "ranges.json"
    ranges.write_text((results / "ranges.json").read_text())
    log = (results / "world_rows_cpu.txt").read_text()
    words = log.partition("\n")[0].split()
    assert words[:3] == ["python", "-m", "bench.world"]
    config = parse_cli(world_bench.Config, words[3:])
    config.out, config.earlier, config.ranges = str(ROOT / config.out), str(ROOT / config.earlier), str(ranges)
    world_bench.main(config)
    printed = capsys.readouterr().out
    for head in ("\ncombination", "\nfigure"):
        logged, shown = (text[text.index(head) :].strip().partition("\n\n")[0] for text in (log, printed))
        assert logged == shown
    assert ranges.read_text() == (results / "ranges.json").read_text()
