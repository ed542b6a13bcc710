"""The quick start, whole but tiny: it ends in a report, is not run twice, and goes on where it was interrupted."""
import json
import shlex

import pytest

import checkpoint
import quickstart
from common import UserError


@pytest.mark.xdist_group("quickstart")
def test_interrupted_and_run_again_it_ends_in_the_report_of_one_run(tmp_path, capfd, monkeypatch):
    config = quickstart.Config(out=str(tmp_path / "qs"), fast=True)
    out = tmp_path / "qs"

    # Interrupted twice: in the middle of the world, whose files are made again, and of pretraining, which is resumed.
    (out / "world").mkdir(parents=True)
    (out / "world/pretrain.jsonl").write_text('{"text": "half a wor')
    rows = quickstart.rows(config)
    stopped = [(stage, [*words, "--steps=10", "--save_every=5"] if stage == "pretrain" else words) for stage, words in rows]
    done = {"stages": []}
    for stage, words in stopped[:4]:
        words = [w for w in words if not (stage == "pretrain" and w in ("--steps=20", "--save_every=200"))]
        record = quickstart.run(stage, words)
        if stage != "pretrain":
            done["stages"].append(record)
    (out / "report.json").write_text(json.dumps(done))
    monkeypatch.setattr(quickstart, "rows", lambda config: [(s, [w for w in words if w != "--save_every=200"] + ["--save_every=5"] if s == "pretrain" else words) for s, words in rows])
    capfd.readouterr()

    quickstart.main(config)
    printed = capfd.readouterr().out
    assert "world: done already" in printed and "prepare: done already" in printed
    assert "going on after step 10" in printed
    report = json.loads((out / "report.json").read_text())
    assert [s["stage"] for s in report["stages"]] == [
        "world", "tokenizer", "prepare", "pretrain", "sample", "evaluate base", "sft", "reward", "dpo", "evaluate sft", "evaluate dpo"
    ]  # fmt: skip
    steps = [r["step"] for r in map(json.loads, (out / "base/log.jsonl").read_text().splitlines()) if "loss" in r]
    assert steps == list(range(1, 21))
    figures = {f["figure"]: f for f in report["figures"]}
    assert 0 < float(figures["story loss, nats a token"]["after"].split()[0]) < float(figures["story loss, nats a token"]["before"])  # even 20 steps learn something
    assert figures["win rate against SFT, by gold"]["before"] == "0.5" and 0 <= float(figures["win rate against SFT, by gold"]["after"].split()[0]) <= 1
    for run, parents in {"sft": ["pretrain"], "rm": ["pretrain", "sft"], "dpo": ["pretrain", "sft"]}.items():
        info = json.loads((checkpoint.find(out / run) / checkpoint.INFO).read_text())
        assert [p["stage"] for p in info["lineage"]] == parents
    assert report["code"] and report["torch"]

    quickstart.main(config)  # a third time: nothing is left to do, and the table is printed again
    printed = capfd.readouterr().out
    assert printed.count("done already") == 11 and "story loss" in printed


def test_every_command_is_one_that_a_user_can_type():
    for stage, words in quickstart.rows(quickstart.Config()):
        assert words[0] == "-m" or words[0].endswith(".py"), stage
        assert shlex.split(shlex.join(words)) == words


def test_another_command_of_the_same_stage_is_refused(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"stages": [{"stage": "world", "command": "python -m data.world --seed=9", "seconds": 1.0}]}))
    with pytest.raises(UserError, match="world was run by another command"):
        quickstart.main(quickstart.Config(out=str(tmp_path)))


def test_a_stage_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match="sample ended with status 1"):
        quickstart.run("sample", ["sample.py", f"--model={tmp_path}"])
