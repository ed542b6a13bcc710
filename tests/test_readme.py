"""README.md: it is short, every command in it runs, its figures are those of the logs, its drawings
are what their command draws."""

import importlib
import io
import re
import shlex
import shutil
import signal
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import ROOT, random_model
from runs import here, save, start, wait_until, write_rows

import serve
import sharpen
from bench import answers, pictures
from bench.world import read_summary
from data import tokenizer, world
from runtime.cli import parse_cli

README = (ROOT / "README.md").read_text()
VARIABLES = {"$Q": "out/quickstart", "$W": "out/quickstart/world"}
# What makes a command small, in place of what stands in README or is left out there
STEP = {"steps": 1, "micro_batch_tokens": 2048, "device": "cpu"}
SAMPLED = {"max_new_tokens": 4, "prompts_per_step": 4, "eval_prompts": 2}
SMALL = {
    "pretrain.py": STEP | {"depth": 1, "width": 32, "context": 64, "batch_tokens": 256, "sample_every": 0},
    "sft.py": STEP | {"batch_tokens": 512, "max_new_tokens": 4},
    "reward.py": STEP | {"batch_size": 4, "center_samples": 2, "max_new_tokens": 4},
    "dpo.py": STEP | {"batch_size": 4},
    "ppo.py": STEP | SAMPLED,
    "grpo.py": STEP | SAMPLED | {"group_size": 2},
    "distill.py": STEP | SAMPLED,
    "rlaif.py": {"limit": 4, "max_new_tokens": 4, "device": "cpu"},
    "evaluate.py": {"limit": 4, "max_new_tokens": 4, "device": "cpu"},
    "sample.py": {"max_new_tokens": 4, "device": "cpu"},
    "serve.py": {"port": 0, "device": "cpu"},
    "sharpen.py": {"feedback": "out/votes", "rounds": "out/rounds"},
}


def test_it_is_short_and_begins_with_a_command():
    assert len(README.split()) <= 1500
    assert len(README[: README.index("git clone")].split()) <= 60
    assert README.index("<picture>") < README.index("git clone") < README.index("bash run.sh") < README.index("![")


# --------------------------------------------------------------------------------------------------
# Commands


def blocks():
    """[(comment above, language, text)] of the fenced blocks. A comment says why the tests do not
    run one: network, eight GPUs, another test."""
    found = re.findall(r"(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)```", README, re.S)
    assert len(found) >= 8
    return found


def commands():
    """The commands of README that the tests run, without comments."""
    fenced = [text for comment, language, text in blocks() if language == "bash" and not comment]
    lines = [line for text in fenced for line in text.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(python [^`]*)`", re.sub(r"```.*?```", "", README, flags=re.S))
    found = [shlex.join(shlex.split(line, comments=True)) for line in [*lines, *inline]]
    return [line for line in found if line and line != "source .venv/bin/activate"]


def test_what_is_not_run_says_why():
    comments = [comment for comment, language, _ in blocks() if language == "bash"]
    assert set(comments) == {"", "network", "eight GPUs", "tests/test_quickstart.py runs it in small"}
    assert all(line.startswith("python ") for line in commands())
    named = {name for line in commands() for name in re.findall(r"python (\w+\.py)", line)}
    assert named == SMALL.keys(), named ^ SMALL.keys()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with what a quick start leaves, tiny, in out/quickstart."""
    root = tmp_path_factory.mktemp("readme")
    out = root / "out/quickstart"
    few = {"stories": 60, "notes": 30, "chats": 40, "pairs": 40, "problems": 40, "tests": 20}
    world.main(world.Config(out=str(out / "world"), **few))
    text = out / "world/pretrain.jsonl"
    tokenizer.main(tokenizer.Config(data=str(text), vocab_size=480, out=str(out / "tokenizer")))
    model = {"tok": tokenizer.load(out / "tokenizer"), "context": 256}
    for name, stage in [("base", "pretrain"), *((name, name) for name in ("sft", "dpo", "ppo", "grpo"))]:
        save(random_model, out / name, stage, **model)
    save(random_model, out / "rm", "reward", scalar_head=True, **model)
    save(random_model, root / "Qwen3-0.6B", "sft", **model)
    (root / "out/votes").mkdir()
    shutil.copy(out / "world/pairs.jsonl", root / "out/votes")
    (code,) = [text for _, language, text in blocks() if language == "python"]
    (root / "my_rewards.py").write_text(code)
    return root


def words_in(line, root):
    """The words of a command, made small, with its own files below `root`."""
    for name, value in VARIABLES.items():
        assert f"{name[1:]}={value.replace('out/quickstart/', '$Q/')}" in README
        line = line.replace(name, value)
    name, *flags = shlex.split(line)[1:]
    small = SMALL.get(name, {})
    flags = [flag for flag in flags if flag.partition("=")[0][2:] not in small]
    flags += [f"--{flag}={value}" for flag, value in small.items()]
    return [name, *(re.sub(r"(?<=[=,])(?=out/|Qwen3|my_rewards)", f"{root}/", flag) for flag in flags)]


def run(words):
    """Do what `python WORDS` does, in this process."""
    name, *flags = words
    if name == "-m":
        name, *flags = flags
    script = importlib.import_module(name.removesuffix(".py"))
    here(script.main, parse_cli(script.Config, flags))
    return SimpleNamespace(returncode=0)


@pytest.mark.parametrize("line", [line for line in commands() if "serve.py" not in line and "-m bench" not in line])
def test_a_command_runs(line, root, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))

    def run_small(words, pass_fds):  # what sharpen.py starts
        words = words[1:]
        done = run(words if words[0] == "-m" else words_in(shlex.join(["python", *words]), root))
        return SimpleNamespace(wait=lambda: done.returncode)

    monkeypatch.setattr(sharpen, "subprocess", SimpleNamespace(Popen=run_small))
    words = words_in(line, root)
    run(words)
    for flag in words:
        if flag.startswith("--out="):
            assert (root / flag.removeprefix("--out=")).exists()


def answers_at(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def test_the_server_starts(root, fork, monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = [line for line in commands() if "serve.py" in line]
    flags = dict(flag[2:].split("=", 1) for flag in words_in(line, root)[1:])
    child = start(fork, serve, **flags)
    wait_until(lambda: "http://" in child.output(), child)
    (where,) = re.findall(r"http://[\d.]+:\d+/v1", child.output())
    wait_until(lambda: answers_at(f"{where}/models"), child)
    child.send(signal.SIGINT)
    assert child.wait()[0] in (0, 130)


def test_the_benches_that_are_named_exist():
    named = {words[1] for line in commands() if (words := shlex.split(line)[1:])[0] == "-m"}
    assert named == {"bench.house"}
    for name in named:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists()


# --------------------------------------------------------------------------------------------------
# Figures and drawings


ROWS = {  # of the learning table: the log's figures before, if it has one, and after
    "pretraining": (None, "pretrain | held-out sums right"),
    "SFT": (None, "sft | gold reward"),
    "PPO on": ("sft | gold reward", "ppo | gold reward, SFT's before"),
    "GRPO after PPO": ("ppo | sampled sums right", "grpo, after ppo | sampled sums right"),
    "DPO on": ("sft | gold reward", "dpo | gold reward, SFT's before"),
    "AI feedback": (None, "rlaif + dpo | rude phrases per completion"),
}


def test_the_learning_table_is_the_log():
    """Means, lowest and highest of all rows."""
    logged = read_summary((ROOT / "bench/results/world_rows_cpu.txt").read_text())
    table = README[README.index("## What it learns") : README.index("## Start from")]
    for name, (before, after) in ROWS.items():
        (row,) = re.findall(rf"^{name}.*$", table, re.M)
        _, first, second, _ = row.replace("−", "-").split(" | ")
        shown = [float(x) for x in re.findall(r"-?\d+\.?\d*", second)]
        assert shown == pytest.approx([logged[after][end] for end in ("mean", "low", "high")], abs=0.0051), name
        if before in logged:
            assert float(first) == pytest.approx(logged[before]["mean"], abs=0.0051), name


def test_the_four_answers_are_those_of_a_quick_start():
    log = (ROOT / "bench/results/answers_cpu.txt").read_text()
    (shown,) = [text for _, language, text in blocks() if not language and "GRPO" in text]
    assert shown.strip() in log


def test_answers_are_printed_side_by_side(tmp_path):
    question = {"prompt": "What do I pay?", "answer": "74"}
    (tmp_path / "world").mkdir()
    write_rows(tmp_path / "world/prompts_test.jsonl", [question, question])
    for name in ("base", "sft", "ppo", "grpo"):
        write_rows(tmp_path / f"{name}_answers.jsonl", [{"completion": "no"}, {"completion": f"{name}\nsays 74."}])
    lines = answers.side_by_side(tmp_path, 2)
    assert lines[0] == "question  What do I pay?" and lines[3] == "PPO       ppo says 74."


def test_the_drawings_are_what_the_command_draws(tmp_path):
    pictures.main(pictures.Config(log=str(ROOT / "bench/results/quickstart_cpu.txt"), out=str(tmp_path)))
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 3
    for path in drawn:
        assert path.read_text() == (ROOT / "docs" / path.name).read_text(), "run python -m bench.pictures"
