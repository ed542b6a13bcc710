"""The command line: a dataclass whose comments are the flags' help, ranges and rules."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest
from conftest import ROOT

import distill
import evaluate
import grpo
import ppo
import pretrain
import report
import rlaif
from runtime.checkpoint import check_same_run
from runtime.cli import GROUPS, RENAMED, check_ranges, launch, parse_cli, print0, read_flags
from runtime.errors import UserError
from runtime.run import RunConfig

SCRIPTS = ["pretrain", "sft", "reward", "ppo", "dpo", "grpo", "rlaif", "evaluate", "sample", "quickstart"]
SCRIPTS += ["distill", "sharpen", "serve", "export", "data.tokenizer", "data.prepare", "data.world", "data.feedback"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_ends_nothing_and_a_closed_pipe_does(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    full, pipe = open("/dev/full", "w"), open(writer, "w")
    monkeypatch.setattr("sys.stdout", full)
    print0("not lost: it is in log.jsonl")
    monkeypatch.setattr("sys.stdout", pipe)
    with pytest.raises(BrokenPipeError):
        print0("nobody reads this")
    for stream in (full, pipe):
        with contextlib.suppress(OSError):
            stream.close()


def test_stages_print_what_a_full_disk_may_lose():
    """With print0: what matters is in a file as well."""
    for name in ("pretrain", "sft", "reward", "ppo", "dpo", "grpo", "distill", "rlaif", "evaluate"):
        assert not re.search(r"(?<!\w)print\(", (ROOT / f"{name}.py").read_text()), name


SCRIPT = """
from dataclasses import dataclass
from runtime.errors import UserError
from runtime.process import launch

@dataclass
class Config:
    # a name
    name: str = ""

def main(config):
    print("«Bäumchen» \\u65e5 \\udcff", config.name)
    raise UserError(f"{config.name} \\u65e5")

launch(main, Config)
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_show_ends_nothing(tmp_path, encoding):
    (tmp_path / "script.py").write_text(SCRIPT, "utf-8")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "script.py", "--name=ä"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 1 and b"\\udcff" in done.stdout and done.stderr.count(b"\n") == 1, done.stderr.decode()


@dataclass
class Config:
    # -- What you will set --
    # directory of the run
    out: str
    # -- What you may set --
    # how many; 0: as many as it takes [may change on resume]
    steps: int = 10
    # peak rate # and no more [> 0; < 1]
    lr: float = 0.02
    # what it is called [one of , short, long]
    name_of_it: str = ""
    # continue a run that was stopped, for whatever
    # reason it was [may change
    # on resume]
    resume: bool = False
    shuffle: bool = True
    # share of the steps, the ends included [>= 0; <= 0.5]
    warmup: float = 0.0
    # how many at once; 2 is too few for itself [>= 4; may change on resume]
    amount: int = 2


# --------------------------------------------------------------------------------------------------
# Reading flags


def test_every_type_in_every_spelling():
    argv = ["--out=a", "--steps", "1_000", "--lr=1e-3", "--name-of-it", "a b=c", "--resume", "--shuffle", "False"]
    assert parse_cli(Config, argv) == Config("a", 1000, 0.001, "a b=c", True, False)
    assert parse_cli(Config, ["--out", "a", "--resume", "--steps=3"]) == Config("a", 3, resume=True)
    assert parse_cli(Config, ["--out="]).out == ""
    assert parse_cli(Config, ["--out=x=y", "--lr", "-2"]) == Config("x=y", lr=-2.0)
    for text, value in [("true", True), ("True", True), ("1", True), ("FALSE", False), ("0", False)]:
        assert parse_cli(Config, ["--out=a", f"--resume={text}"]).resume is value
    assert parse_cli(Config, ["--out=a", "--resume", "--lr=3"]).lr == 3


def test_a_path_may_begin_at_home(monkeypatch):
    """A shell expands --out ~/run, but not --out=~/run: a folder of the name ~ would be made."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    config = parse_cli(pretrain.Config, ["--out=~/run", "--data", "~/a.jsonl:0.5,~/b.txt:1,c~/d:2", "--prompt=~/a"])
    assert config.out == "/home/ada/run"
    assert config.data == "/home/ada/a.jsonl:0.5,/home/ada/b.txt:1,c~/d:2"
    assert config.prompt == "~/a"  # which a model is to continue
    assert parse_cli(Config, ["--out=a", "--name_of_it=~"]).name_of_it == "/home/ada"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out=a", "--stepz=3"], "--stepz: no such flag"),
        (["--out=a", "--step=3"], "--step: no such flag"),  # no abbreviations
        (["--out=a", "--out=b"], "--out: given twice"),
        (["--out=a", "--name-of-it=x", "--name_of_it=y"], "--name_of_it: given twice"),
        (["--out=a", "--steps"], "--steps: needs a value"),
        (["--out=a", "--steps", "--resume"], "--steps: needs a value"),
        (["--out=a", "--steps=abc"], "--steps=abc: expected int"),
        (["--out=a", "--steps=1.5"], "--steps=1.5: expected int"),
        (["--out=a", "--steps="], "--steps=: expected int"),
        (["--out=a", "--lr=fast"], "--lr=fast: expected float"),
        (["--out=a", "--resume=maybe"], "--resume=maybe: expected True or False"),
        (["--out=a", "--resume="], "--resume=: expected True or False"),
        (["--out=a", "shuffle"], "'shuffle': a flag was expected"),
        (["--out=a", "-x"], "'-x': a flag was expected"),
        (["--out=a", "--"], "--: no such flag"),
        (["--steps=3"], "--out: must be given"),
        ([], "--out: must be given"),
    ],
)
def test_bad_flags_are_named(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_cli(Config, argv)


@pytest.mark.parametrize("argv", [["--directories=a"], ["--directories", "a"], ["a", "--directories=b"]])
def test_words_have_no_flag(argv):
    assert parse_cli(report.Config, ["a", "b"]).directories == ["a", "b"]
    with pytest.raises(UserError, match="^--directories: is no flag; give its values by themselves"):
        parse_cli(report.Config, argv)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "-3"], "--steps=-3: a count was expected, not less than 0"),
        (["--steps=9223372036854775808"], "a count was expected, not less than 0 and less than 2^63"),
        (["--lr=nan"], "--lr=nan: a finite number was expected"),
        (["--warmup=1e-31"], "--warmup=1e-31: a finite number was expected, 0 or 1e-30 to 1e+38 in size"),
        (["--warmup=-1e39"], "--warmup=-1e+39: a finite number was expected, 0 or 1e-30 to 1e+38 in size"),
        (["--lr=inf"], "--lr=inf: a finite number was expected"),
        (["--lr=0"], "--lr=0.0: must be > 0"),
        (["--lr=1"], "--lr=1.0: must be < 1"),
        (["--warmup=-0.1"], "--warmup=-0.1: must be >= 0"),
        (["--warmup=0.51"], "--warmup=0.51: must be <= 0.5"),
        (["--amount=3"], "--amount=3: must be >= 4"),
        (["--name_of_it=other"], "--name_of_it=other: expected one of '', 'short', 'long'"),
    ],
)
def test_values_out_of_range_are_named(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_ranges(parse_cli(Config, ["--out=a", *argv]))


def test_the_ends_of_a_range_count_and_a_default_is_always_allowed():
    for argv in (
        [],
        ["--steps=9223372036854775807", "--lr=1e-30"],
        ["--warmup=0.5", "--lr=0.999", "--amount=4", "--name_of_it=long"],
        ["--warmup=0", "--amount=2"],
    ):
        check_ranges(parse_cli(Config, ["--out=a", *argv]))


@pytest.mark.parametrize("old", RENAMED)
def test_flags_of_earlier_versions_are_refused_with_the_new_name(old):
    for new in RENAMED[old]:
        script = dataclass(type("Config", (), {"__annotations__": {new: int}, new: 1}))
        with pytest.raises(UserError, match=f"--{old}: is called --{new} now"):
            parse_cli(script, [f"--{old}=3"])
    with pytest.raises(UserError, match=f"--{old}: no such flag"):  # where no new name would help
        parse_cli(Config, ["--out=a", f"--{old}=3"])


# --------------------------------------------------------------------------------------------------
# What the comments say


def test_the_comments_above_a_field_are_its_help_its_range_and_its_group():
    flags = read_flags(Config)
    assert list(flags) == [field.name for field in fields(Config)]
    assert flags["lr"].bounds == [(">", 0.0), ("<", 1.0)] and not flags["lr"].may_change_on_resume
    assert flags["name_of_it"].choices == ["", "short", "long"]
    assert flags["resume"].help.startswith("continue a run that was stopped, for whatever reason it was [may")
    assert {name for name, flag in flags.items() if flag.may_change_on_resume} == {"steps", "resume", "amount"}
    assert flags["amount"].bounds == [(">=", 4.0)]
    assert [flags[name].group for name in ("out", "steps", "warmup")] == [GROUPS[0], GROUPS[1], GROUPS[1]]
    assert flags["shuffle"].help == "" and flags["shuffle"].group == GROUPS[1]


@dataclass(kw_only=True)
class Stage(RunConfig):
    # -- What you will set --
    # where it starts
    init: str
    # its own words for it [>= 5]
    eval_every: int = 70
    save_every: int = 100


def test_a_stage_inherits_the_flags_of_a_run_with_their_help_and_its_own_defaults():
    flags = read_flags(Stage)
    assert flags["save_every"] == read_flags(RunConfig)["save_every"] and flags["save_every"].may_change_on_resume
    assert flags["eval_every"].help == "its own words for it [>= 5]" and flags["eval_every"].group == GROUPS[0]
    assert not flags["eval_every"].may_change_on_resume
    config = parse_cli(Stage, ["--out=a", "--init=b"])
    assert (config.save_every, config.eval_every, config.keep_last) == (100, 70, 2)
    check_ranges(config)
    for argv, message in [("--eval_every=4", "must be >= 5"), ("--keep_last=0", "must be >= 1")]:
        with pytest.raises(UserError, match=message):
            check_ranges(parse_cli(Stage, ["--out=a", "--init=b", argv]))


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_flag_by_group_with_its_type_and_default(capsys, word):
    with pytest.raises(SystemExit) as e:
        parse_cli(Stage, ["--out=a", word])
    shown = capsys.readouterr().out
    assert e.value.code == 0 and shown.startswith("The command line: a dataclass")
    assert max(map(len, shown.splitlines())) <= 100
    shown = re.sub(r"\n {34}", " ", shown)  # long lines are folded
    groups = dict(re.findall(r"^(What you .*):\n((?:  --.*\n)+)", shown, flags=re.M))
    assert list(groups) == GROUPS[:3]
    assert re.search(r"^  --out +str +directory of the run \[may change on resume\]$", groups[GROUPS[0]], flags=re.M)
    assert re.search(r"^  --init +str +where it starts$", groups[GROUPS[0]], flags=re.M)
    assert re.search(r"^  --resume +bool +.* \(default: False\)$", groups[GROUPS[1]], flags=re.M)
    assert re.search(r"^  --save_every +int +steps between .* \(default: 100\)$", groups[GROUPS[2]], flags=re.M)
    assert len(re.findall("^  --", shown, flags=re.M)) == len(fields(Stage))


def test_help_shows_what_a_recipe_sets_and_no_default_that_only_marks_what_is_left_out(capsys):
    with pytest.raises(SystemExit):
        parse_cli(grpo.Config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, value in grpo.DEFAULT_RECIPE.items():
        (help_text,) = re.findall(rf"--{name} \w+ (\(recipe: .*?)(?= --\w+ (?:str|int|float|bool) | What you)", shown)
        recipe = re.match(r"\(recipe: (.*?)\)", help_text)[1]
        assert type(value)(recipe) == value and "(default:" not in help_text, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_of_every_script_has_help_and_a_group(name):
    script = importlib.import_module(name)
    flags = read_flags(script.Config)
    assert flags.keys() == {field.name for field in fields(script.Config)}
    for field in fields(script.Config):
        assert flags[field.name].help and field.type in (int, float, str, bool), field.name
        assert flags[field.name].group in GROUPS, field.name
        assert field.name not in RENAMED or (name, field.name) == ("dpo", "loss")


@pytest.mark.parametrize(
    "flag", ["depth=0", "depth=-1", "width=-64", "ffn=-8", "heads=-2", "context=0", "window_every=0"]
)
def test_sizes_that_no_model_has_are_refused(flag):
    with pytest.raises(UserError, match=f"--{flag}: "):
        check_ranges(parse_cli(pretrain.Config, ["--out=a", "--data=b", f"--{flag}"]))


@pytest.mark.parametrize(
    "stage, flag",
    [
        *((pretrain, flag) for flag in ("depth", "width", "context", "ffn")),
        *((ppo, flag) for flag in ("prompts_per_step", "group_size", "epochs")),
        *((grpo, flag) for flag in ("prompts_per_step", "group_size", "epochs", "minibatches")),
        *((distill, flag) for flag in ("prompts_per_step", "group_size")),
        *((evaluate, flag) for flag in ("best_of", "samples_per_problem")),
        (rlaif, "group_size"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused(stage, flag):
    """They would build or sample without end, and without a word."""
    given = {field.name for field in fields(stage.Config) if field.default is MISSING}
    argv = [f"--{name}=a" for name in given] + [f"--{flag}=1000000000000"]
    with pytest.raises(UserError, match=f"--{flag}=1000000000000: must be <= "):
        check_ranges(parse_cli(stage.Config, argv))


def test_only_flags_that_may_change_on_resume_change():
    started = Config("a", steps=10, lr=0.02)
    info = {"stage": "sft", "config": vars(started)}
    check_same_run(info, "sft", Config("a", steps=99, lr=0.02, resume=True, amount=7))
    check_same_run({"stage": "sft", "config": {}}, "sft", started)  # a flag that did not exist then
    with pytest.raises(UserError, match="--lr=0.5: this run was started with --lr=0.02"):
        check_same_run(info, "sft", Config("a", lr=0.5))
    with pytest.raises(UserError, match="one of sft.py, not of dpo.py"):
        check_same_run(info, "dpo", started)


# --------------------------------------------------------------------------------------------------
# How a script ends


def run_main(monkeypatch, main, *argv):
    """What `launch` exits with."""
    monkeypatch.setattr("sys.argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as e:
        launch(main, Config)
    return e.value.code


def test_a_users_error_is_one_line_and_status_1(monkeypatch):
    def main(config):
        raise UserError(f"{config.out}: missing; bring it\x1b[2J")

    # Python prints a string to stderr and exits with 1
    assert run_main(monkeypatch, main, "--out=book\n.txt") == "error: book\\n.txt: missing; bring it\\x1b[2J"
    assert run_main(monkeypatch, main, "--wrong") == "error: --wrong: no such flag; --help lists them"


def test_other_ends_have_the_status_that_a_shell_expects(monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    def stopped(config):
        raise SystemExit(143)

    def unreadable(config):
        open("x" * 300)

    assert run_main(monkeypatch, interrupted, "--out=a") == 130
    assert run_main(monkeypatch, stopped, "--out=a") == 143
    assert run_main(monkeypatch, unreadable, "--out=a") == f"error: {'x' * 300}: File name too long"
    monkeypatch.setattr("sys.argv", ["script.py", "--out=a"])
    launch(print, Config)  # status 0: it returns
