"""A run: its directory, its log, what it begins from, and what it refuses before the first step."""

import contextlib
import io
import json
import os
import shutil
import time
from dataclasses import dataclass

import pytest
import torch
from runs import SMALL, completions_of, here, records, save

import dpo
import pretrain
import reward
import sft
from data import tokenizer
from data.pack import make_completion
from data.read import read_json
from model import GPT, GPTConfig
from optim import Optimizer
from rollout import Sample
from runtime import checkpoint
from runtime.batches import index_order
from runtime.errors import UserError
from runtime.files import LOCKS
from runtime.run import Log, RolloutConfig, Run, RunConfig, clear_run, clock_time, open_run, rollout_metrics


@pytest.fixture(autouse=True)
def give_up_locks():
    """A process holds its locks until it ends; here one process stands for several."""
    yield
    LOCKS.clear()


# --------------------------------------------------------------------------------------------------
# The run directory


def run_with(path, **files):
    """A run directory with a checkpoint, half of another one, and these files (__ for a dot)."""
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    (path / "step_000010").mkdir()
    (path / "step_000010/config.json").write_text("{}")
    (path / ".tmp_step_000020").mkdir()
    (path / "latest").symlink_to("step_000010")
    return path


def names_in(path):
    return {p.name for p in path.iterdir()} - {".lock"}


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    assert open_run(str(tmp_path / "new/run"), False, False).is_dir()
    LOCKS.clear()
    assert open_run(str(tmp_path / "new/run"), False, False)  # nothing in it yet
    run = run_with(tmp_path / "old", log__jsonl="{}\n")
    replaced = "--resume continues it, --overwrite replaces it"
    for flags, message in [((False, False), replaced), ((True, True), "choose one")]:
        with pytest.raises(UserError, match=message):
            open_run(str(run), *flags)
        LOCKS.clear()
    assert (run / "log.jsonl").exists() and (run / "step_000010").exists()
    with pytest.raises(UserError, match="--out"):
        open_run("", False, False)


def test_resume_keeps_all_but_half_written_checkpoints(tmp_path):
    run = run_with(tmp_path / "run", log__jsonl="{}\n", samples__txt="")
    before = names_in(run)
    clear_run(open_run(str(run), True, False), False)
    assert names_in(run) == before - {".tmp_step_000020"}


def test_overwrite_deletes_only_what_a_run_writes(tmp_path):
    run = run_with(tmp_path / "run", log__jsonl="{}\n", samples__txt="s", nonfinite_step_000003__safetensors="")
    kept = {"notes.txt", "step_by_step.md", "best_practice", "precious"}
    kept |= {"step_000200_kept", "step_2_notes.txt", "nonfinite_notes.txt", ".tmp_step_of_mine"}
    for name in kept - {"precious"}:
        (run / name).write_text("mine")
    (run / "precious").mkdir()
    (run / "best").symlink_to(run / "precious")  # a link is deleted, never what it points to
    (run / "precious/data.txt").write_text("mine")
    before = names_in(run)
    open_run(str(run), False, True)
    assert names_in(run) == before  # not before the input was looked at
    clear_run(run, True)
    assert names_in(run) == kept and (run / "precious/data.txt").read_text() == "mine"


def test_a_second_process_is_kept_out(tmp_path, fork):
    run = tmp_path / "run"

    def hold():
        open_run(str(run), False, False)
        if not os.fork():  # as a pool of a user's reward, which outlives the run
            time.sleep(5)
            os._exit(0)
        (run / "log.jsonl").write_text("{}\n")
        time.sleep(60)

    child = fork(hold)
    while not (run / "log.jsonl").exists():
        time.sleep(0.01)
    for flags in [(False, False), (True, False), (False, True)]:
        with pytest.raises(UserError, match="another process is writing this run"):
            open_run(str(run), *flags)
    assert (run / "log.jsonl").exists()
    os.kill(child.pid, 9)
    child.wait()
    open_run(str(run), True, False)  # neither a killed process nor its child holds anything


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match=f"--out={out}"):
            open_run(str(out), False, False)


# --------------------------------------------------------------------------------------------------
# The log


def add_sample(log, step, text):
    log.append("samples.txt", f"=== step {step} ===\n{text}\n")


def test_a_log_goes_back_to_where_the_run_continues(tmp_path):
    log = Log(tmp_path, 100, 0)
    # U+2028 ends a line for str.splitlines, but not in a file
    log.write({"event": "start", "config": {"data": "b\u2028ücher.txt"}})
    for step in range(1, 8):
        log.write({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            log.write({"step": step, "val_loss": 2 / step})
            add_sample(log, step, f"Once\r\nupon a \u2028time {step}\n=== not a step ===")
    lines, samples = (tmp_path / "log.jsonl").read_bytes(), (tmp_path / "samples.txt").read_bytes()
    # cut within a letter, and just before the end of the line
    for half in ('{"step": 3, "text": "ü'.encode()[:-1], b'{"step": 3}'):
        (tmp_path / "log.jsonl").write_bytes(lines + half)
        (tmp_path / "samples.txt").write_bytes(samples + b"=== step 8")
        Log(tmp_path, 100, 7)
        assert (tmp_path / "log.jsonl").read_bytes() == lines
        assert (tmp_path / "samples.txt").read_bytes() == samples
    Log(tmp_path, 100, 4)
    kept = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().split("\n")[:-1]]
    assert [r.get("step") for r in kept] == [None, 1, 2, 2, 3, 4, 4]
    assert kept[0]["config"]["data"] == "b\u2028ücher.txt"
    kept = (tmp_path / "samples.txt").read_bytes()
    assert samples.startswith(kept) and kept.endswith(b"time 4\n=== not a step ===\n")
    Log(tmp_path, 100, 0)
    assert (tmp_path / "samples.txt").read_bytes() == b""


def test_a_full_disk_loses_no_line_and_breaks_none(small_disk, capsys):
    run = small_disk(64)
    log, filler = Log(run, 10_000, 0), run / "filler"
    filler.write_bytes(bytes(48 * 1024))  # what is left is a few pages: lines get cut in the middle
    steps, waiting = 0, b""
    while not waiting or steps % 50:
        steps += 1
        log.write({"step": steps, "text": "ü" * (steps % 40)})
        waiting = log.files["log.jsonl"][1]
    assert "No space left" in capsys.readouterr().err
    add_sample(log, 3, "a sample")
    filler.unlink()
    add_sample(log, 4, "another")
    log.write({"step": steps + 1})
    assert [r["step"] for r in records(run)] == list(range(1, steps + 2))
    assert (run / "samples.txt").read_text() == "=== step 3 ===\na sample\n=== step 4 ===\nanother\n"


def test_before_a_checkpoint_the_disk_gets_what_waited(small_disk):
    """Samples are rare: what found no space must not wait for the next of them, and as long as it
    finds none there is no checkpoint."""
    disk = small_disk(64)
    log = Log(disk, 9, 0)
    (disk / "filler").write_bytes(bytes(64 * 1024))
    add_sample(log, 1, "rain")
    with pytest.raises(UserError, match="samples.txt: No space left on device; make room"):
        log.sync()
    (disk / "filler").unlink()
    log.sync()
    assert "rain" in (disk / "samples.txt").read_text()


def test_lines_of_others_in_a_log_do_not_end_a_resumed_run(tmp_path):
    """What is no record of ours is left out, notes at the head of the samples stay."""
    own = ['{"step": 1}', '{"epoch": 3, "loss": 2.5}']
    foreign = ["[1]", "null", '"text"', "5", '{"step": "last"}', '{"step": null}', '{"step": 1, "lo', "\0\0"]
    foreign += ["[" * 200_000, '{"step": 1, "half of a pair": "\ud800"}']
    lines = "\n".join([own[0], *foreign, own[1], '{"step": 3}']) + "\n"
    (tmp_path / "log.jsonl").write_bytes(lines.encode("utf-8", "surrogatepass"))
    (tmp_path / "samples.txt").write_text("my notes\n=== step 1 ===\na\n=== step 3 ===\nb\n")
    Log(tmp_path, 9, 2)
    assert (tmp_path / "log.jsonl").read_text().splitlines() == own
    assert (tmp_path / "samples.txt").read_text() == "my notes\n=== step 1 ===\na\n"


def test_a_log_that_cannot_be_rewound_stays_as_it_is(small_disk):
    run = small_disk(64)
    text = "".join(json.dumps({"step": i, "text": "x" * 100}) + "\n" for i in range(200))
    (run / "log.jsonl").write_text(text)
    (run / "filler").write_bytes(bytes((os.statvfs(run).f_bavail - 1) * os.statvfs(run).f_bsize))
    with pytest.raises(UserError, match="No space left"):
        Log(run, 1000, 150)
    assert (run / "log.jsonl").read_text() == text


def test_a_line_per_step(tmp_path, capsys):
    log = Log(tmp_path, 7, 0, print_every=3)
    for step in range(1, 8):
        log.step(step, 5000, 100, {"entropy": 0.5}, loss=1.23456, lr=3e-4)
    found = records(tmp_path)
    assert [r["step"] for r in found] == list(range(1, 8))
    assert found[0]["loss"] == 1.23456 and found[0]["tokens"] == 5000 and found[0]["tokens_per_s"] > 0
    assert found[0]["entropy"] == 0.5 and "mfu" not in found[0]
    lines = capsys.readouterr().out.splitlines()
    assert [x.split(" |")[0] for x in lines] == ["step 1/7", "step 3/7", "step 6/7", "step 7/7"]
    assert "loss 1.2346 | lr 0.0003" in lines[0] and "entropy" not in lines[0] and "eta 0m00s" in lines[-1]
    assert (clock_time(59.9), clock_time(90), clock_time(3 * 3600 + 125)) == ("0m59s", "1m30s", "3h02m")


# --------------------------------------------------------------------------------------------------
# Beginning and resuming


@dataclass(kw_only=True)
class Stage(RunConfig):
    # checkpoint to start from
    init: str = ""
    # optimizer steps [may change on resume]
    steps: int = 4
    # peak learning rate [> 0]
    lr: float = 0.01
    device: str = "cpu"
    save_every: int = 2


class Beta:
    """What a stage may save besides optimizer and order: a number that follows the training."""

    value = 0.5

    def state(self):
        return {"value": self.value}

    def load_state(self, state):
        self.value = float(state["value"])


def train(config, change=None):
    """The smallest stage: it makes every weight of its batch a little larger."""
    run = Run("sft", config)
    model, tok = run.load()
    if change:
        change(model)
    optimizer, order, beta = Optimizer(model, config.lr), index_order(5, config.seed), Beta()
    saved = {"optimizer": optimizer, "order": order, "beta": beta}
    run.begin(config.steps, model, data={"book.txt": "ab12"}, saved=saved)
    for step in run.steps():
        batch = order.batch(2)
        loss = -model.embed[torch.from_numpy(batch)].sum() * torch.rand(())
        loss.backward()
        beta.value *= 1.5
        optimizer.step(1.0)
        run.log(step, model, [2], loss=loss.item(), beta=beta.value)
        if run.eval_due(step):
            run.validated(step, {"val_loss": loss.item()}, text="done")
            run.warn_once("first", "this is said once")
        run.end_step(step, model, tok)


@pytest.fixture
def base(make_model, tmp_path):
    """A checkpoint as the first version of Feinschliff wrote them: no "format" in it."""
    folder = save(make_model, tmp_path / "base", "pretrain")
    assert "format" not in read_json(folder / "feinschliff.json")
    return folder


def test_everything_that_is_saved_comes_back(base, tmp_path, capsys):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    here(train, Stage(out=str(straight), init=str(base), steps=4))
    here(train, Stage(out=str(stopped), init=str(base), steps=2))
    assert capsys.readouterr().out.count("this is said once") == 2
    here(train, Stage(out=str(stopped), init=str(base), steps=4, resume=True))
    assert "continuing after step 2" in (shown := capsys.readouterr().out) and "this is said once" not in shown
    a, b = (checkpoint.load_state(run / "step_000004") for run in (straight, stopped))
    assert a[1] == b[1] and a[1]["beta"] == {"value": 0.5 * 1.5**4} and a[1]["order"] == {"epoch": 1, "index": 3}
    assert a[0].keys() == b[0].keys() and all(torch.equal(t, b[0][name]) for name, t in a[0].items())
    info = read_json(straight / "step_000004/feinschliff.json")
    assert info["lineage"][-1]["path"] == str(base) and info["format"] == 2 and info["data"] == {"book.txt": "ab12"}
    here(train, Stage(out=str(stopped), init=str(base), steps=4, resume=True))
    assert "nothing is left to do; a larger --steps continues" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0.02}, "--lr=0.02: this run was started with --lr=0.01"),
        ({"seed": 1}, "--seed=1: this run was started with --seed=0"),
        ({"resume": False}, "--resume continues it, --overwrite replaces it"),
    ],
)
def test_what_may_not_change_is_refused(base, tmp_path, change, message):
    config = {"out": str(tmp_path / "run"), "init": str(base), "steps": 2}
    here(train, Stage(**config))
    with pytest.raises(UserError, match=message):
        here(train, Stage(**(config | {"resume": True} | change)))
    free = {"steps": 3, "save_every": 1, "micro_batch_tokens": 5, "print_every": 2, "keep_last": 3}
    here(train, Stage(**(config | free | {"resume": True})))  # what may change, changes


def test_a_run_of_an_earlier_version_is_refused_in_one_line_but_can_be_started_from(base, tmp_path):
    """Its optimizer's tensors and counters have other names."""
    info = {"stage": "sft", "step": 3, "config": {"lr": 0.5, "micro_tokens": 512}, "data": {}, "lineage": []}
    model, tok, _ = checkpoint.load(base)
    old = checkpoint.save(tmp_path / "old", model, tok, info, ({"exp_avg/embed": torch.zeros(1)}, {"epoch": 0}))
    with pytest.raises(UserError) as e:
        here(train, Stage(out=str(tmp_path / "old"), init=str(base), resume=True))
    assert f"{old} was written by another version" in str(e.value) and f"--init={old}" in str(e.value)
    here(train, Stage(out=str(tmp_path / "new"), init=str(old), steps=1))
    lineage = read_json(tmp_path / "new/step_000001/feinschliff.json")["lineage"]
    assert [parent["path"] for parent in lineage] == [str(old)]


@pytest.mark.parametrize(
    "name, change",
    [
        ("train_state.json", {"best": "x"}),
        ("train_state.json", {"warnings": None}),
        ("train_state.json", {"beta": {"value": "x"}}),
        ("train_state.json", {"beta": 7}),
        ("train_state.json", {"beta": {}}),
        ("train_state.json", {"order": {"epoch": -1, "index": 0}}),
        ("train_state.json", {"order": {"epoch": 0, "index": -1}}),
        ("train_state.json", {"order": {"epoch": 0, "index": None}}),
        ("train_state.json", {"order": {"epoch": 1.5, "index": 0}}),
        ("train_state.json", {"order": {"epoch": 0}}),
    ],
)
def test_a_state_of_another_kind_is_refused(base, tmp_path, name, change):
    config = {"out": str(tmp_path / "run"), "init": str(base)}
    here(train, Stage(**config, steps=2))
    folder = checkpoint.find(tmp_path / "run")
    (folder / name).write_text(json.dumps(read_json(folder / name) | change))
    manifest = read_json(folder / "manifest.json")
    manifest[name] = checkpoint.sha256(folder / name)  # as if it had been written so
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="train_state is damaged"):
        here(train, Stage(**config, resume=True))


def add_parameter(model):
    model.blocks[0].attn.gate = torch.nn.Parameter(torch.ones(3))


def add_rows(model):
    qkv = model.blocks[1].attn.qkv
    model.blocks[1].attn.qkv = torch.nn.Parameter(torch.cat([qkv, qkv]))


def drop_parameter(model):
    model.blocks[0].attn.k_norm = None


def bias_and_qk_norm(model):
    """No Hugging Face family has both."""
    other = GPT(GPTConfig(**(SMALL | {"vocab_size": tokenizer.byte_level().n_vocab}), qkv_bias=True)).init_weights(0)
    model.config, model.blocks = other.config, other.blocks


def windows_beyond_the_layers(model):
    model.config.window, model.config.window_every = 8, 5


@pytest.mark.parametrize(
    "change, message",
    [
        (add_parameter, "parameter blocks.0.attn.gate has no Hugging Face name: add a row to model.parameter_table"),
        (add_rows, r"parameter blocks.1.attn.qkv has 64 rows; model.parameter_table says \[16, 8, 8\] for 3"),
        (drop_parameter, "has a row for blocks.0.attn.k_norm, which this model does not have"),
        (bias_and_qk_norm, "attention_bias=True is not supported"),
        (windows_beyond_the_layers, "GPTConfig.window_every=5 would be read back as 2"),
    ],
)
def test_a_model_that_could_not_be_saved_and_read_is_refused_before_the_first_step(base, tmp_path, change, message):
    """It trained, and died with a KeyError at its first checkpoint."""
    with pytest.raises(UserError, match=message):
        here(lambda config: train(config, change), Stage(out=str(tmp_path / "run"), init=str(base)))
    assert not (tmp_path / "run/log.jsonl").exists()


def test_weights_that_are_not_finite_are_not_saved(base, tmp_path):
    def spoil(model):
        model.blocks[1].mlp.down.data[0, 0] = torch.inf

    with pytest.raises(UserError, match="step 2: blocks.1.mlp.down is no longer finite; these weights are not saved"):
        here(lambda config: train(config, spoil), Stage(out=str(tmp_path / "run"), init=str(base)))
    assert not checkpoint.steps_in(tmp_path / "run")


# --------------------------------------------------------------------------------------------------
# Warnings of a run that learns from its own completions


@dataclass(kw_only=True)
class Rollouts(RolloutConfig):
    # steps
    steps: int = 12
    # as in ppo.py
    unfinished_penalty: float = 1.0
    device: str = "cpu"


STEP = {"finished": 0.9, "completion_tokens": 10.0, "entropy": 1.0, "updates": 1, "loss": 0.5, "zero_variance": 0.25}
STEP |= {"all_right": 0.25, "all_wrong": 0.0, "all_cut": 0.0, "grad_norm": 0.1, "clip_fraction": 0.0}
IDLE = {"updates": 0, "loss": 0.0, "zero_variance": 1.0, "all_right": 0.25, "all_wrong": 0.75}


def warnings_of(base, out, steps, rewards=(), **flags):
    """What a run prints as warnings whose steps log these metrics, besides those of STEP. rewards:
    of each step's completions, as PPO has them."""

    def log(config):
        run = Run("grpo", config)
        model, tok = run.load()
        run.begin(len(steps), model, data={}, saved={})
        for step in run.steps():
            if rewards:
                run.warn_of_rewards(rewards[step - 1], [0.0], [0.0, 0.1])
            run.log_rollout(step, model, [], 1, STEP | steps[step - 1])
            run.end_step(step, model, tok)

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        here(log, Rollouts(out=str(out), init=str(base), reward="", data="", steps=len(steps), **flags))
    return [line for line in printed.getvalue().splitlines() if line.startswith("warning: ")]


def test_a_run_that_is_well_warns_of_nothing(base, tmp_path):
    assert warnings_of(base, tmp_path / "run", [{}] * 12 + [IDLE] * 9 + [{}] + [IDLE] * 9 + [{}]) == []
    odd = [{"entropy": 0.05}, {"finished": 0.6}, {"completion_tokens": 30.0}, {"loss": 0.0, "grad_norm": 1e-12}]
    assert warnings_of(base, tmp_path / "odd", [{}] + odd * 9) == []


def test_the_first_steps_of_few_prompts_are_judged_together(base, tmp_path):
    """A first step of one prompt whose completions were short and ended says little."""
    steps = [{"finished": 1.0, "completion_tokens": 3.0, "entropy": 9.0}, *[{"finished": 0.75, "entropy": 0.8}] * 30]
    assert warnings_of(base, tmp_path / "one", steps, prompts_per_step=1) == []
    (drift,) = warnings_of(base, tmp_path / "many", steps[:1] + [{"finished": 0.75}] * 30)
    assert "75% of the completions end, after 10 tokens; at first it was 100% after 3" in drift


@pytest.mark.parametrize(
    "later, named, remedy",
    [
        ({"entropy": 0.09}, "(0.09 of 1 nats per token)", "lower --lr or a higher --beta"),
        ({"finished": 0.6}, "60% of the completions end", "a larger --max_new_tokens"),
        ({"completion_tokens": 21.0}, "after 21 tokens", "look at samples.txt"),
        ({"loss": 1e-9}, "the loss is 0 and the policy learns", "watch the reward and grad_norm"),
        ({"loss": 0.0, "grad_norm": 1e-12}, "below 1e-8 (now 1e-12)", "give them a larger one"),
    ],
)
def test_each_change_for_the_worse_is_said_once_with_what_to_do(base, tmp_path, later, named, remedy):
    (line,) = warnings_of(base, tmp_path / "run", [{}, {}, *[later] * 10, {}, *[later] * 10, *[{}] * 9])
    assert named in line and remedy in line and line.startswith("warning: 10 times in a row") == ("learns" not in line)


def test_a_gradient_that_was_clipped_away_is_no_standstill(base, tmp_path):
    """The norm is the last minibatch's, of which nothing may be left to gain."""
    tiny = {"loss": -0.1, "grad_norm": 0.0}
    assert warnings_of(base, tmp_path / "run", [tiny | {"clip_fraction": 0.75}] * 12) == []


def test_endings_that_the_limit_cuts_are_said(base, tmp_path):
    (line,) = warnings_of(base, tmp_path / "run", [{"finished": 0.25}] * 3, max_new_tokens=7)
    assert "--max_new_tokens=7 cuts 75% of the completions before their end" in line and "raise it" in line


@pytest.mark.parametrize(
    "later, said",
    [
        ({"entropy": 0.01}, "3 times in a row entropy was below a tenth"),
        ({"finished": 0.6}, "3 times in a row fewer completions end than at first"),
        ({"finished": 0.0, "completion_tokens": 10.0}, "cuts 100% of the completions"),
    ],
)
def test_a_short_run_says_what_has_become_worse_too(base, tmp_path, later, said):
    assert said in warnings_of(base, tmp_path / "run", [{}] * 6 + [later] * 3 + [{}])[0]


def test_ten_steps_without_an_update_are_said_once_with_the_reason(base, tmp_path):
    (line,) = warnings_of(base, tmp_path / "a", [{}] + [IDLE] * 30)
    assert "10 times in a row a step made no update: the completions of every prompt get the same reward" in line
    assert "25% of the groups are all above 0, 75% all at most 0" in line and "easier or harder prompts" in line
    (line,) = warnings_of(base, tmp_path / "b", [IDLE] * 2)  # a run of two steps that never updates says so too
    assert "2 times in a row a step made no update" in line
    (line,) = warnings_of(base, tmp_path / "same", [IDLE | {"entropy": 0.0, "all_cut": 1.0}] * 2)
    assert "the policy is all but certain of what it says (entropy 0)" in line and "higher --temperature" in line
    (line,) = warnings_of(base, tmp_path / "c", [IDLE | {"zero_variance": 0.5}] * 3)
    assert "no completion is left to learn from; see --stop_kl" in line
    for equal in (1.0, 0.5):  # the latter with --overlong=mask
        cut = IDLE | {"all_cut": 0.9, "zero_variance": equal}
        (line,) = warnings_of(base, tmp_path / f"cut_{equal}", [cut] * 3, max_new_tokens=8)
        assert "--max_new_tokens=8 cuts every completion of 90% of the prompts; raise it" in line


@pytest.mark.parametrize(
    "rewards, said",
    [
        ([[4.0, 4.0]] * 12, "the reward of every completion was 4, which teaches nothing"),
        ([[1.0, 2.0]] * 3 + [[4.0, 4.0]] * 11, "the reward of every completion was 4, which teaches nothing"),
        ([[float(i)] for i in range(12)], ""),  # one completion a step
        ([[float(i), float(i)] for i in range(12)], ""),
        ([[1e6, 1e6 + 1]] * 12, "(now 1e+06 in size, 1 apart), which PPO hardly sees"),
        ([[0.0, 1e-5]] * 12, "the policy hardly follows the reward"),
        ([[0.0, 1.0], [1.0, 1.0 - 1e-6], [0.0, 1e-5]] * 12, ""),  # odd steps of a run that is well
    ],
)
def test_rewards_that_teach_ppo_nothing_for_ten_steps_are_said(base, tmp_path, rewards, said):
    found = warnings_of(base, tmp_path / "run", [{}] * len(rewards), rewards)
    assert len(found) == bool(said) and all(said in line for line in found)


def test_a_resumed_run_counts_on_from_where_it_stopped(base, tmp_path):
    steps = [IDLE] * 12
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    (line,) = warnings_of(base, straight, steps, save_every=3)
    assert warnings_of(base, stopped, steps, save_every=3) == [line]
    for step in (6, 9, 12):
        shutil.rmtree(stopped / f"step_{step:06d}", ignore_errors=True)
    (stopped / "latest").unlink()
    (stopped / "latest").symlink_to("step_000003")
    assert warnings_of(base, stopped, steps, save_every=3, resume=True) == [line]  # of 3 + 1 steps
    states = [read_json(run / "step_000012/train_state.json") for run in (straight, stopped)]
    assert states[0] == states[1] and states[0]["streaks"]["standstill"] == 12


def test_a_reward_that_changes_as_a_run_resumes_has_changed(base, tmp_path):
    rewards = [[1.0]] * 3 + [[2.0]] * 3 + [[3.0], [4.0]] * 3
    steps, stopped = [{}] * 12, tmp_path / "stopped"
    assert warnings_of(base, stopped, steps, rewards, save_every=3) == []
    for step in (6, 9, 12):
        shutil.rmtree(stopped / f"step_{step:06d}", ignore_errors=True)
    (stopped / "latest").unlink()
    (stopped / "latest").symlink_to("step_000003")
    assert warnings_of(base, stopped, steps, rewards, save_every=3, resume=True) == []


def test_the_mfu_counts_each_completion_as_often_as_it_was_read(base, tmp_path):
    """Some are only sampled, others trained as well."""

    def log(config):
        run = Run("grpo", config)
        model, tok = run.load()
        run.begin(1, model, data={}, saved={})
        run.log_file.peak = 1.0
        chats = [make_completion([1], [2] * n) for n in (3, 7)]
        run.log_rollout(1, model, chats, [1 / 3, 1 / 3 + 2], STEP)
        (record,) = [r for r in records(tmp_path / "run") if "loss" in r]
        flops = model.flops_per_token(6) * (4 / 3 + 8 * 7 / 3)
        assert record["tokens"] == 12 and record["mfu"] * record["seconds"] == pytest.approx(flops, rel=0.2)

    here(log, Rollouts(out=str(tmp_path / "run"), init=str(base), reward="", data=""))


@pytest.mark.parametrize("logprobs, entropy", [([-0.5, -0.1], "0.5"), ([0.0, 0.0], "0.0")])
def test_entropy_is_of_all_tokens_that_were_drawn_trained_on_or_not(logprobs, entropy):
    """A group that has collapsed is not trained on; a tool's words were not drawn."""
    samples = [Sample(0, [2, 3], logprobs, True, [True, False])]
    completions = completions_of([make_completion([1], [2, 3])], samples)
    assert str(rollout_metrics(completions, 0, torch.zeros(0), None)["entropy"]) == entropy


@pytest.mark.parametrize("stage", [pretrain, sft, reward, dpo])
def test_more_than_can_be_planned_is_refused(stage, tmp_path):
    """The plan walks through every step before the first, in silence."""
    config = stage.Config(init="none", data="none.jsonl", out=str(tmp_path / "run"), steps=10**9)
    with pytest.raises(UserError, match="--steps=1000000000: must be <= 1,000,000"):
        stage.main(config)
    config.steps, config.epochs = 0, 1e9
    if stage is not pretrain:  # its epochs follow from --steps
        with pytest.raises(UserError, match="--epochs=1000000000.0: must be <= 10,000"):
            stage.main(config)


@pytest.mark.parametrize("stage", [sft, reward, dpo])
def test_epochs_beside_steps_are_refused(stage, tmp_path):
    config = stage.Config(init="none", data="none.jsonl", out=str(tmp_path / "run"), steps=3, epochs=2.0)
    with pytest.raises(UserError, match="--epochs=2.0: --steps=3 says how long to train; leave it out"):
        stage.main(config)
    assert not (tmp_path / "run").exists()
