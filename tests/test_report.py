"""The report: what it shows of runs, what it takes, and what it leaves out."""

import html
import json
import math
import re

import pytest

import report
from runtime import cli
from runtime.errors import UserError

needs_charts = pytest.mark.skipif(report.matplotlib is None, reason="charts need matplotlib")


def write_log(folder, rows):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(rows, 1)))
    return folder


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def section(page, title):
    """The page from a title on to the end of its section."""
    return page[page.index(f"<h2>{title}") :].split("</section>")[0]


def captions(html):
    return re.findall("<figcaption>(.*?)</figcaption>", html)


def rl_rows(n, gold):
    """A log whose reward rises to 1 and whose gold goes to `gold`; at the end a validation."""
    rows = []
    for i in range(n):
        share = i / (n - 1)
        rewards = {"reward": share, "out/rm": share, report.GOLD: gold * share}
        rows.append({"loss": 0.1, "kl": 3 * share, "completion_tokens": 20 + i, **rewards})
    return [*rows, {"val_loss": -9.0, "reward": 99.0, "kl": 99.0, "completion_tokens": 999.0}]


def test_the_report_takes_any_log_or_leaves_it_out_in_one_line(tmp_path, capsys):
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "kl": None, "event": "x"}]
    lines = "".join(json.dumps(line) + "\n" for line in good)
    logs = {  # taken, whatever they hold
        "whole": lines,
        "cut": lines + '{"step": 3, "lo',
        "binary": lines.encode() + b"\xff\x00\n",
        "strange": lines + '[1]\n7\nnull\n{"loss": "low"}\n{"step": [1], "loss": {}}\n{"loss": NaN}\n',
        "true": lines + '{"reward": true}\n',
        "empty": "",
        "old": '{"chosen_ratio": 1.0, "iter": 3}\n',
    }
    for name, text in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "folder/log.jsonl").mkdir(parents=True)
    (tmp_path / "gone.json").symlink_to("nowhere")
    figures = {"reward data/world.py:gold": figure(0.5), "x": figure(0.5)}
    (tmp_path / "fine.json").write_text(json.dumps({"figures": figures}))
    (tmp_path / "best.json").write_text(json.dumps({"figures": {"best of 1: data/world.py:gold": figure(0.5)}}))
    left_out = {
        "huge/log.jsonl": f'{{"step": 1, "loss": {10**400}}}\n',
        "a.json": "{",
        "b.json": '{"figures": {"x": 3}}',
        "c.json": '{"figures": {"x": {"value": "high", "low": null, "high": null}}}',
        "d.json": '{"figures": {"x": {"value": 1.0}}}',
        "report.json": '{"figures": [{"stage": "sft", "before": 3}]}',
        "empty.log.jsonl": "",
        "short.log.jsonl": '{"figures": {"bias": [1.0]}}\n',
        "words.log.jsonl": '{"counts": {"pairs": "many"}}\n',
        "x_answers.jsonl": '{"completion": "no prompt"}\n',
        "v_answers.jsonl": f'{{"prompt": "a", "my.py:gold": {10**400}}}\n',
        "y_answers.jsonl": '{"prompt": "cut", "com',
    }
    for name, text in left_out.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    odd = [7, [], {}, ["hi"], [{"content": 3}], "text"]
    rows = [{"prompt": prompt, "completion": prompt, "finished": 3, "my.py:gold": "much"} for prompt in odd]
    (tmp_path / "z_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fine.log.jsonl").write_text('{"rows": 9}\n{"figures": {"bias": [3.5, 7]}, "counts": {"pairs": 7}}\n')

    page = report.make([tmp_path]).read_text()
    printed = capsys.readouterr().out.splitlines()
    for name in left_out:
        assert len([line for line in printed if line.startswith("left out: ") and f"{tmp_path / name}:" in line]) == 1
    damaged = {"cut": 1, "binary": 1, "strange": 4}
    for name, n in damaged.items():
        assert f"left out: {n} damaged lines of {tmp_path / name / 'log.jsonl'}" in printed
    assert len(printed) == len(left_out) + len(damaged)
    assert "0.5 of 7" in page
    if report.matplotlib:
        assert sorted(captions(section(page, "Learning"))) == [
            f"{name}: loss" for name in sorted(logs) if name not in ("empty", "true", "old")
        ]


STAGE = {"stage": "sft", "command": "python sft.py", "seconds": 9.0}


@pytest.mark.parametrize(
    "record",
    [
        {"stages": 3},
        {"stages": [3]},
        {"stages": [{"stage": "sft"}]},
        {"stages": [STAGE | {"seconds": "9"}]},
        {"stages": [STAGE | {"seconds": "9"}], "seconds": 9.0},
        {"stages": [STAGE | {"stage": 1}]},
        {"stages": [STAGE], "seconds": math.inf},
        {"code": 5},
        {"code": ["abc"]},
        {"figures": [{"stage": ["sft"], "figure": "x", "before": {}, "after": {}}]},
    ],
)
def test_a_record_of_something_else_is_left_out_in_one_line(tmp_path, capsys, record):
    write_log(tmp_path / "a", [{"loss": 2.0}])
    (tmp_path / "report.json").write_text(json.dumps({"stages": [STAGE], "code": "abc"} | record))
    page = report.make([tmp_path]).read_text()
    assert "python sft.py" not in page
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"left out: {tmp_path}/report.json: is not as Feinschliff writes it")
    (tmp_path / "report.json").write_text(json.dumps({"stages": [STAGE], "code": "abc"}))
    assert "python sft.py" in report.make([tmp_path]).read_text() and not capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"stages": [', "[]", "7", "", "\x00"])
def test_a_damaged_record_is_said_once(tmp_path, capsys, text):
    write_log(tmp_path / "a", [{"loss": 2.0}])
    (tmp_path / "report.json").write_text(text)
    report.make([tmp_path])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"left out: {tmp_path}/report.json: ")


@needs_charts
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [r"$\frac$", "a$b$c", "$1", r"\$x$", "_x", "__", "<b>", "模型", "報酬モデル", "🙂"])
def test_runs_of_any_name_are_in_the_legend(tmp_path, name):
    for folder in (name, "other"):
        write_log(tmp_path / folder, [{"loss": 2.0}, {"loss": 1.0}])
    page = report.make([tmp_path / name, tmp_path / "other"]).read_text()
    names = [html.unescape(text) for text in re.findall("<text[^>]*>(.*?)</text>", section(page, "Learning"))]
    assert [text for text in names if text.strip("\u200b") == name] and "other" in names


@needs_charts
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("huge", [1e308, -1e308, 1e200, math.inf, -math.inf, math.nan])
def test_what_cannot_be_drawn_is_left_out_of_the_curves(huge):
    numbers = [1.0, huge, -huge, 2.0, huge]
    run = {"log": [{"step": i, "loss": x, "reward": x, "kl": x} for i, x in enumerate(numbers, 1)], "title": "a"}
    ((_, x, y),) = [report.drawable(*line) for line in report.curves({"a": run}, "step")["a: reward"]]
    assert x.tolist() == [1, 4] and y.tolist() == [1, 2]
    odd = figure(huge, -huge, huge)
    figures = {report.KL: figure(1.0), f"reward {report.GOLD}": figure(1.0, -huge, huge)}
    figures |= {f"best of {n}: KL to one completion, at most, nats": figure(n, n, n) for n in (1, 2)}
    figures |= {f"best of {n}: {what}": odd for n in (1, 2) for what in ("rm", report.GOLD)}
    drawn = report.charts({"a": run}, {"e": figures})
    assert [caption for caption, _ in drawn["learning"]] == ["a: reward"]
    assert [len(drawn[name]) for name in ("reward", "lengths")] == [2, 0]


def test_the_strip_and_the_table_show_before_after_and_what_other_runs_reach(tmp_path, monkeypatch):
    rows = [("sft", "gold", True, 1.25), ("sft", "other", None, 7.5), ("ppo", "gold", False, 1.75)]
    found = []
    for stage, name, improved, after in rows:
        row = {"stage": stage, "figure": name, "improved": improved, "bound": "1.9"}
        found.append(row | {"before": figure(0.25), "after": figure(after, after - 0.1, after + 0.1)})
    stages = [{"stage": "sft", "command": "python sft.py --init=<base>", "seconds": 90}]
    (tmp_path / "report.json").write_text(json.dumps({"figures": found, "stages": stages}))
    (tmp_path / "sft.json").write_text(json.dumps({"figures": {"x": figure(1)}}))
    ranges = tmp_path / "ranges.json"
    monkeypatch.setattr(report, "RANGES", ranges)
    assert "other runs" not in report.make([tmp_path]).read_text()
    ranges.write_text(json.dumps({"sft | gold": [1.0, 1.5], "ppo | gold": [1.8, 1.9]}))
    page = report.make([tmp_path]).read_text()
    strip = page[page.index("<ol>") : page.index("</ol>")]
    assert re.findall("<b>(.*?)</b>", strip) == ["sft", "ppo"]
    assert re.findall(r"<span>([\d.]+) → <strong>([\d.]+)", strip) == [("0.25", "1.25"), ("0.25", "1.75")]
    assert re.findall("[✓✗]", strip) == ["✓", "✗"]
    table = section(page, "What each stage did")
    cells = [re.sub(r"<.*?>|\s+", " ", row).split() for row in re.findall(r"<tr><td>.*?</tr>", table, re.S)]
    assert cells == [
        "gold 0.25 1.25 [1.15, 1.35] ✓ 1 to 1.5 1.9".split(),
        "other 0.25 7.5 [7.4, 7.6] 1.9".split(),
        "gold 0.25 1.75 [1.65, 1.85] ✗ 1.8 to 1.9 outside 1.9".split(),
    ]
    folded = page[page.index("<summary>Commands") :]
    assert "1.5</td>" in folded and "python sft.py --init=&lt;base&gt;" in folded and "<ol>" not in folded


@needs_charts
def test_of_reinforcement_learning_it_shows_every_reward_over_steps_and_kl_and_the_lengths(tmp_path):
    write_log(tmp_path / "ppo", rl_rows(40, gold=0.5))
    write_log(tmp_path / "sft", [{"loss": 2.0}, {"loss": 1.0}, {"val_loss": 1.5}])
    page = report.make([tmp_path]).read_text()
    assert captions(section(page, "Learning")) == ["ppo: reward", "sft: loss"]
    kl = section(page, "Reward against KL")
    assert captions(kl) == ["ppo: reward"] and ">gold<" in kl and ">rm<" not in kl  # rm is the reward itself
    assert captions(section(page, "How long")) == ["Tokens per completion"]
    assert "reward in training" in page and "0 →\n<strong>0.885</strong>" in page  # of the last ten steps
    assert "2 →\n<strong>1.5</strong>" in page
    assert "99" not in re.findall(r"<!-- (.*?) -->", kl)  # no tick of an axis: validations are no steps


def test_the_lines_of_a_plot_are_those_of_the_log():
    runs = {"ppo": {"log": [{"step": i, **row} for i, row in enumerate(rl_rows(5, 2.0), 1)], "title": "ppo"}}
    ((caption, lines),) = report.curves(runs, "kl").items()
    kl, rewards = [0, 0.75, 1.5, 2.25, 3], [0, 0.25, 0.5, 0.75, 1]
    assert caption == "ppo: reward"
    assert lines == [("reward", kl, rewards), ("gold", kl, [2 * reward for reward in rewards])]
    assert report.smooth([3.0]) == [3] and report.smooth(rewards) == rewards
    assert report.smooth(list(range(100)))[-1] == 97  # the mean of the last five
    assert len(report.smooth([1.0] * 100_000)) == report.MAX_POINTS


def test_best_of_n_by_a_reward_is_shown_beside_what_it_is_worth():
    figures = {}
    for n, kl, says, gold in ((1, 0, 0.0, 0.0), (2, 0.2, 1.0, 0.5), (4, 0.6, 2.0, 0.25)):
        figures[f"best of {n}: out/rm"] = figure(says)
        figures[f"best of {n}: {report.GOLD}"] = figure(gold)
        figures[f"best of {n}: KL to one completion, at most, nats"] = figure(kl)
    assert report.exploitation({"best": figures}) == {
        "best: best of n by rm": [("rm says", [0, 0.2, 0.6], [0, 1, 2]), ("gold", [0, 0.2, 0.6], [0, 0.5, 0.25])]
    }


@needs_charts
def test_runs_are_compared_on_one_plot(tmp_path):
    a = write_log(tmp_path / "a", [{"loss": 2.0}, {"loss": 1.0}])
    b = write_log(tmp_path / "b", [{"loss": 3.0}, {"loss": 1.5}])
    file = report.make([a, b])
    assert file == tmp_path / "comparison.html" and not (tmp_path / "report.html").exists()
    learning = section(file.read_text(), "Learning")
    assert captions(learning) == ["loss"] and ">a<" in learning and ">b<" in learning
    # two directories of runs: each run with its namesake, those without one alone
    for name, runs in {"x": ["sft", "ppo"], "y": ["sft", "dpo"]}.items():
        for run in runs:
            rows = rl_rows(5, 2.0) if run == "ppo" else [{"loss": 2.0}]
            write_log(tmp_path / name / run, rows)
        (tmp_path / name / "sft.json").write_text(json.dumps({"figures": {"win rate": figure(0.5)}}))
    page = report.make([tmp_path / "x", tmp_path / "y"]).read_text()
    learning = section(page, "Learning")
    assert sorted(captions(learning)) == ["dpo: loss", "ppo: gold", "ppo: reward", "sft: loss"]
    assert ">x/sft<" in learning and ">y/sft<" in learning
    assert re.findall(r'<th scope="col">(.*?)</th>', page)[:3] == ["figure", "x/sft", "y/sft"]


def test_the_same_five_prompts_stand_side_by_side(tmp_path):
    for name, n in {"base": 9, "sft": 8}.items():
        rows = [{"prompt": f"question {i}", "completion": f"{name} says {i}", report.GOLD: i / 4} for i in range(n)]
        (tmp_path / f"{name}_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = section(report.make([tmp_path]).read_text(), "The same prompts")
    assert re.findall("<h3>(.*?)</h3>", page) == [f"question {i}" for i in range(5)]
    assert re.findall("<dd>(.*?)</dd>", page) == [f"{name} says {i}" for i in range(5) for name in ("base", "sft")]
    assert page.count("gold 0.75") == 2


@needs_charts
def test_the_page_of_a_long_run_stays_small_and_asks_for_nothing(tmp_path):
    write_log(tmp_path / "ppo", rl_rows(20_000, 2.0))  # three plots
    file = report.make([tmp_path])
    assert file.stat().st_size < 100_000
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import|<script""", file.read_text())


def test_what_cannot_be_reported_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="nothing to report"):
        report.make([tmp_path])
    with pytest.raises(UserError, match="gone: no such directory"):
        report.make([tmp_path, tmp_path / "gone"])
    with pytest.raises(UserError, match="name a directory of runs"):
        report.main(report.Config())


def test_directories_are_the_words_of_its_command_line():
    assert cli.parse_cli(report.Config, ["out/a", "out/b"]).directories == ["out/a", "out/b"]
    assert cli.parse_cli(report.Config, []).directories == []
    with pytest.raises(UserError, match="--out: no such flag"):
        cli.parse_cli(report.Config, ["out/a", "--out=x"])
