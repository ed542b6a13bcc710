"""Proof that this code computes what commit 9d07743 computed, before the house was rebuilt.

Every stage runs from the same checkpoints at small sizes, on the CPU in fp32 with two threads, and
every number that it logs, times apart, is compared with what the old code logged. A number is the
same if it differs by at most 1e-6 times max(1, |number|); files are the same if their bytes are.

    python -m bench.same_losses --checkpoints=/tmp/golden

runs this code and prints, for each stage and figure, the largest relative and absolute difference.
The old side is in bench/results/losses_9d07743.json; its checkpoints are made again by

    git worktree add /tmp/base 9d07743
    python -m bench.same_losses --make_golden --old=/tmp/base --checkpoints=/tmp/golden

Processors and versions of PyTorch round differently, so both sides must run on the same machine.
"""

import hashlib
import inspect
import json
import math
import os
import platform
import queue
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.cli import launch
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench/results/losses_9d07743.json"
TOLERANCE = 1e-6
THREADS = 2
MODULES = [
    *["data.world", "data.tokenizer", "data.prepare", "pretrain", "sft", "reward", "ppo", "dpo", "grpo", "rlaif"],
    *["evaluate", "sample"],
]


@dataclass
class Config:
    # directory of the checkpoints and data that every run starts from
    checkpoints: str
    # run the old code: write --checkpoints and the record of its losses
    make_golden: bool = False
    # checkout of the old code, for --make_golden
    old: str = ""
    # checkout whose stages are compared with the record; "": this one
    new: str = ""
    # only the runs whose names begin with one of these, comma-separated; "": all
    only: str = ""
    # file of the old code's losses; "": bench/results/losses_9d07743.json
    record: str = ""
    # processes at once
    workers: int = 2


# --------------------------------------------------------------------------------------------------
# What was renamed: the flags, the log's keys and the names of files, old -> new

FLAGS = {
    "clip": "max_grad_norm",
    "gain_lr": "norm_lr",
    "kl_horizon": "adaptive_kl_horizon",
    "kl_target": "adaptive_kl",
    "max_new": "max_new_tokens",
    "micro_tokens": "micro_batch_tokens",
    "polar": "muon_dtype",
    "target_kl": "stop_kl",
}
SCRIPT_FLAGS = {
    "reward.py": {"batch": "batch_size"},
    "dpo.py": {"batch": "batch_size"},
    # The old --batch counted completions, of which each prompt had --group.
    "ppo.py": {"batch": "prompts_per_step", "group": "group_size"},
    "grpo.py": {"prompts": "prompts_per_step", "group": "group_size", "loss": "loss_aggregation"},
    "rlaif.py": {"batch": "rows_per_write", "n": "group_size"},
}
VALUES = {"--recipe=ours": "--recipe=default", "data/rewards.py": "data/rules.py"}
LOG_KEYS = {
    "answer_tokens": "completion_tokens",
    "chosen_ratio": "chosen_logratio",
    "largest_ratio": "max_ratio",
    "rejected_ratio": "rejected_logratio",
    "same": "zero_variance",
}
# Figures that mean something else now; the losses beside them are compared.
REWARDS = ["chosen_reward", "rejected_reward", "margin"]
LOGRATIOS = ["validation chosen_logratio", "validation rejected_logratio"]
NOT_COMPARED = {
    # They need no reference: the old code ran one over all the data for these figures.
    "dpo simpo": [*REWARDS, *LOGRATIOS],
    "dpo orpo": [*REWARDS, *LOGRATIOS],
    # They are per token now, as the loss is.
    "dpo ipo": [*REWARDS, *LOGRATIOS, "accuracy", "validation accuracy"],
    # It is summed in fp64 now; the old code's fp32 sums differ from it by up to 2e-5.
    **dict.fromkeys(("ppo", "ppo adaptive", "ppo group"), ["explained_variance"]),
    # They are means over the good and the bad completions now; the old took half for good.
    "dpo kto": REWARDS,
}


def is_old(checkout):
    """Whether a checkout has the old flags: there runtime/ was one file, common.py."""
    return (Path(checkout) / "common.py").exists()


def old_words(words):
    """A command with the old flags and values, from one with the new."""
    script = words[0]
    old_flags = {new: old for old, new in (FLAGS | SCRIPT_FLAGS.get(script, {})).items()}
    group_size = next((word.partition("=")[2] for word in words if word.startswith("--group_size=")), "1")
    translated = []
    for word in words:
        for old, new in VALUES.items():
            word = word.replace(new, old)
        flag, equals, value = word.removeprefix("--").partition("=")
        if script == "ppo.py" and flag == "prompts_per_step":
            value = str(int(value) * int(group_size))
        translated.append(f"--{old_flags.get(flag, flag)}{equals}{value}" if word.startswith("--") else word)
    return translated


def new_name(key):
    """The new name of a figure that the old code logged."""
    for old, new in VALUES.items():
        key = key.replace(old, new)
    prefix, space, name = key.rpartition("validation ")
    return f"{prefix}{space}{LOG_KEYS.get(name, name)}"


# --------------------------------------------------------------------------------------------------
# The runs, by their new flags. G is the directory of checkpoints; the runs of one stage begin with
# its name. What the golden side makes first, in this order, all others start from.

TRAIN = ["--steps=20", "--device=cpu", "--print_every=20", "--eval_every=10", "--save_every=0"]
TUNE = [*TRAIN, "--lr=1e-3", "--val_fraction=0.1"]
PAIRS = ["--data=G/world/pairs.jsonl", "--batch_size=16", *TUNE]
RL = [*TRAIN, "--max_new_tokens=40", "--eval_every=0", "--eval_prompts=8", "--lr=5e-4"]
PPO = [
    "ppo.py",
    "--init=G/sft",
    "--data=G/world/prompts.jsonl",
    "--monitor=data/world.py:gold",
    "--min_accuracy=0",
    *RL,
]
GRPO = ["grpo.py", "--init=G/sft", "--data=G/world/problems.jsonl", "--prompts_per_step=4", "--group_size=4", *RL]
GOLD = "--reward=data/world.py:gold"
EVALUATE = ["evaluate.py", "--max_new_tokens=40", "--device=cpu"]
PREPARED = ["--data=G/data", "--batch_tokens=1024"]

INPUTS = {
    "world": [
        *["-m", "data.world", "--stories=3000", "--notes=1500", "--chats=800"],
        *["--pairs=400", "--problems=200", "--tests=40"],
    ],
    "tokenizer": ["-m", "data.tokenizer", "--data=G/world/pretrain.jsonl", "--vocab_size=672"],
    "data": [
        *["-m", "data.prepare", "--data=G/world/pretrain.jsonl", "--tokenizer=G/tokenizer"],
        *["--clean=False", "--dedup=exact"],
    ],
    "base": ["pretrain.py", *PREPARED, "--depth=2", "--width=128", "--context=256", *TRAIN, "--steps=120"],
    "sft": ["sft.py", "--init=G/base", "--data=G/world/chat.jsonl", "--batch_tokens=1024", *TUNE, "--steps=100"],
    "rm": ["reward.py", "--init=G/sft", *PAIRS, "--max_new_tokens=40", "--steps=40"],
}
RUNS = {
    "pretrain text": [
        *["pretrain.py", "--data=G/world/stories_val.jsonl", "--tokenizer=char", "--depth=2", "--width=64", "--tied"],
        *["--dropout=0.1", "--max_grad_norm=1", "--weight_decay=0.01", "--norm_lr=0.02", "--muon_dtype=fp32"],
        *["--batch_tokens=1024", "--micro_batch_tokens=512", *TRAIN],
    ],
    "pretrain prepared": ["pretrain.py", *PREPARED, "--depth=2", "--width=128", "--context=256", *TRAIN],
    "pretrain init": ["pretrain.py", "--init=G/base", *PREPARED, "--warmup=5", *TRAIN],
    "sft": ["sft.py", "--init=G/base", "--data=G/world/chat.jsonl", "--batch_tokens=1024", "--context=96", *TUNE],
    "sft replay": [
        *["sft.py", "--init=G/base", "--data=G/world/chat.jsonl:0.8,G/world/problems.jsonl:0.2", "--replay=G/data"],
        *["--problems=G/world/problems_test.jsonl", "--max_new_tokens=40", "--batch_tokens=1024", *TUNE],
    ],
    "reward": ["reward.py", "--init=G/sft", *PAIRS, "--max_new_tokens=40", "--center_samples=32"],
    "reward margin": [
        *["reward.py", "--init=G/rm", *PAIRS, "--margin=0.1", "--smoothing=0.1", "--weight_decay=0.1"],
        *["--micro_batch_tokens=512", "--checkpoint_activations"],
    ],
    "dpo dpo": ["dpo.py", "--init=G/sft", *PAIRS, "--micro_batch_tokens=512"],
    "dpo dpo nll": ["dpo.py", "--init=G/sft", *PAIRS, "--nll=0.2", "--reference=G/base"],
    "dpo cdpo": ["dpo.py", "--init=G/sft", *PAIRS, "--loss=cdpo"],
    "dpo ipo": ["dpo.py", "--init=G/sft", *PAIRS, "--loss=ipo"],
    "dpo simpo": ["dpo.py", "--init=G/sft", *PAIRS, "--loss=simpo", "--gamma=0.5"],
    "dpo orpo": ["dpo.py", "--init=G/sft", *PAIRS, "--loss=orpo"],
    "dpo kto": ["dpo.py", "--init=G/sft", *PAIRS, "--loss=kto", "--desirable=1.2"],
    "ppo": [*PPO, "--reward=G/rm", "--prompts_per_step=16"],
    "ppo adaptive": [
        *[*PPO, "--reward=G/rm*0.5,data/world.py:gold", "--prompts_per_step=16"],
        *["--adaptive_kl=0.5", "--adaptive_kl_horizon=200", "--stop_kl=0.002"],
    ],
    "ppo group": [*PPO, GOLD, "--prompts_per_step=8", "--group_size=2", "--temperature=0.8"],
    "grpo default": [*GRPO, GOLD, "--micro_batch_tokens=512"],
    "grpo deepseekmath": [*GRPO, GOLD, "--recipe=deepseekmath"],
    "grpo r1": [*GRPO, GOLD, "--recipe=r1", "--minibatches=4", "--reference_every=8"],
    "grpo dr_grpo": [*GRPO, GOLD, "--recipe=dr_grpo", "--overlong=mask"],
    "grpo dapo": [*GRPO, "--reward=data/rules.py:final_number", "--recipe=dapo", "--minibatches=4"],
    "grpo kl": [
        *[*GRPO, "--reward=data/rules.py:final_number,G/rm*0.3", "--advantage=rloo", "--kl=unbiased", "--beta=0.02"],
        *["--epochs=2", "--loss_aggregation=sequence"],
    ],
    "grpo refill": [*GRPO, "--reward=data/rules.py:final_number", "--refill=2", "--kl=k2", "--beta=0.02"],
    "rlaif judge": [
        *["rlaif.py", "--policy=G/sft", "--judge=G/base", "--constitution=G/world/constitution.txt", GOLD],
        *["--data=G/world/prompts.jsonl", "--limit=48", "--group_size=3", "--rows_per_write=16", "--min_margin=0.01"],
        *["--max_new_tokens=40", "--device=cpu"],
    ],
    "rlaif revise": [
        *["rlaif.py", "--mode=revise", "--policy=G/sft", "--judge=G/sft", "--constitution=G/world/constitution.txt"],
        *["--data=G/world/prompts.jsonl", "--limit=32", "--rows_per_write=16", "--max_new_tokens=48", "--device=cpu"],
    ],
    "evaluate base": [
        *[*EVALUATE, "--model=G/base", "--text=G/world/stories_val.jsonl", "--complete=G/world/sums_test.jsonl"],
        "--judge=G/world/judge_test.jsonl",
    ],
    "evaluate sft": [
        *[*EVALUATE, "--model=G/sft", "--problems=G/world/problems_test.jsonl", "--reference=G/base"],
        *["--data=G/world/prompts_test.jsonl", "--reward=data/world.py:gold,data/rules.py:final_number,G/rm"],
    ],
    "evaluate best": [
        *[*EVALUATE, "--model=G/sft", "--data=G/world/prompts_test.jsonl", "--reward=G/rm,data/world.py:gold"],
        *["--best_of=4", "--limit=20"],
    ],
    "evaluate pairs": ["evaluate.py", "--model=G/rm", "--pairs=G/world/pairs_val.jsonl", "--device=cpu"],
    "sample": [
        *["sample.py", "--model=G/sft", "--prompt=What do a red kite and a blue lamp cost?", "--temperature=0"],
        *["--max_new_tokens=60", "--device=cpu"],
    ],
}
SAMPLINGS = [
    {"temperature": 1.0, "slots": 128},
    {"temperature": 1.0, "slots": 3},
    {"temperature": 0.0, "slots": 4},
    {"temperature": 0.7, "slots": 4, "top_k": 5},
    {"temperature": 1.3, "slots": 2, "top_p": 0.8},
    {"temperature": 1.0, "slots": 16, "top_k": 20, "top_p": 0.9},
]


# --------------------------------------------------------------------------------------------------
# Running commands of a checkout


def fork_commands(modules):
    """Import `modules`, then run each command that stdin brings in a forked copy of this process.

    A line of stdin is JSON [words after `python`, file for the output]; the answer is the exit
    status. Runs alone, with the modules of a checkout.
    """
    import contextlib
    import importlib
    import json
    import os
    import runpy
    import sys
    import traceback

    def run(words, path):
        status = 1
        try:
            for descriptor, name in ((1, path), (2, f"{path}.err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.argv = words[1:] if words[0] in ("-m", "-c") else words
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            elif words[0] == "-c":
                exec(words[1], {"__name__": "__main__"})
            else:
                runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as e:
            print(e.code, file=sys.stderr)
            status = e.code if isinstance(e.code, int) else int(bool(e.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    for module in modules:
        with contextlib.suppress(Exception):  # a command that needs it will show the error
            importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Runner:
    """A process in a checkout that has imported torch and the scripts, and forks for each command.

    A fork is a process of its own without the seconds that the imports take. `variables` are added
    to the environment. Two threads a process, which sleep while they wait.
    """

    def __init__(self, checkout, variables=None):
        self.checkout = checkout
        environment = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"} | (variables or {})
        code = f"{inspect.getsource(fork_commands)}\nfork_commands({MODULES!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=checkout,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words):
        """The standard output of `python words`. Raises UserError if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "output")
            self.process.stdin.write(json.dumps([words, str(path)]) + "\n")
            self.process.stdin.flush()
            status = self.process.stdout.readline().strip()
            output = path.read_text()
            if status != "0":
                errors = Path(f"{path}.err").read_text()
                tail = "\n".join((output + errors).splitlines()[-20:])
                raise UserError(f"status {status or 'unknown'} of python {' '.join(words)}\n{tail}")
        return output

    def call(self, function, *arguments):
        """Call a function of this file, which imports what it needs -> its standard output."""
        return self.run(["-c", f"{inspect.getsource(function)}\n{function.__name__}(*{arguments!r})"])

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def command(checkout, words, checkpoints, out=None):
    """The words after `python` that run an entry of INPUTS or RUNS in a checkout."""
    words = old_words(words) if is_old(checkout) else list(words)
    words = [word.replace("G/", f"{checkpoints}/") for word in words]
    flags = {word.partition("=")[0]: word for word in words if word.startswith("--")}  # the last one wins
    words = [word for word in words if not word.startswith("--")] + list(flags.values())
    return [*words, f"--out={out}"] if out else words


# --------------------------------------------------------------------------------------------------
# What a run has computed: {figure: list of numbers, or of texts that must be the same}


def read_log(path):
    """The numbers of a training log: a list for each figure, one number a step or validation."""
    figures = {}
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        if "event" in record:
            continue
        prefix = "validation " if "val_loss" in record else ""
        for key, value in record.items():
            is_time = key.startswith(("seconds", "tokens_per_s", "mfu"))
            if isinstance(value, int | float) and not is_time:
                figures.setdefault(prefix + key, []).append(value)
    return figures


def read_figures(path):
    """The figures of evaluate.py: [value, low, high], without bounds where there is no interval."""
    figures = json.loads(Path(path).read_text())["figures"]
    return {name: [x for x in (f["value"], f["low"], f["high"]) if x is not None] for name, f in figures.items()}


def read_judgements(path):
    """The counts and figures (sum, number) of rlaif.py's log after the last batch."""
    record = json.loads(Path(path).read_text().splitlines()[-1])
    return {name: [n] for name, n in record["counts"].items()} | record["figures"]


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def folder_hashes(folder, pattern):
    """{file name: [SHA-256]} of the files in a folder that match a pattern."""
    paths = sorted(Path(folder).glob(pattern))
    return {path.relative_to(folder).as_posix(): [file_hash(path)] for path in paths}


def run_stage(runner, words, checkpoints, scratch):
    """Run an entry of RUNS -> its figures."""
    script = words[0]
    suffix = {"rlaif.py": ".jsonl", "evaluate.py": ".json"}.get(script, "")
    out = None if script == "sample.py" else f"{scratch}/out{suffix}"
    printed = runner.run(command(runner.checkout, words, checkpoints, out))
    if script == "sample.py":
        figures = {"text": [printed]}
    elif script == "rlaif.py":
        figures = {"bytes of the file": [file_hash(out)]} | read_judgements(f"{scratch}/out.log.jsonl")
    elif script == "evaluate.py":
        figures = read_figures(out)
    else:
        figures = read_log(f"{out}/log.jsonl")
    figures = {key.replace(f"{checkpoints}/", "G/"): values for key, values in figures.items()}
    return {new_name(key): values for key, values in figures.items()} if is_old(runner.checkout) else figures


def make_inputs(runner, names, folder):
    """Make some entries of INPUTS in `folder`, the later ones from the earlier ones."""
    for name in names:
        runner.run(command(runner.checkout, INPUTS[name], folder, f"{folder}/{name}"))


def run_inputs(runner, scratch):
    """The bytes of the data that the world, the tokenizer and data/prepare.py make."""
    make_inputs(runner, ["world", "tokenizer", "data"], scratch)
    files = folder_hashes(scratch, "world/*.jsonl") | folder_hashes(scratch, "tokenizer/tokenizer.json")
    return files | folder_hashes(scratch, "data/**/*.bin")


def draw_samples(folder, prompts_path, out, samplings):
    """Rollouts of a checkpoint as JSON. Runs alone, in a process of the old or the new code."""
    import inspect
    import json

    import torch

    try:
        from runtime.checkpoint import load
    except ImportError:
        from checkpoint import load
    from rollout import rollout

    model = load(folder, torch.device("cpu"))[0]
    with open(prompts_path) as f:
        given = json.load(f)
    parameters = inspect.signature(rollout).parameters
    sizes = {"n": 2, "group_size": 2, "max_new": 40, "max_new_tokens": 40}
    sizes = {name: size for name, size in sizes.items() if name in parameters}
    figures = {}
    for sampling in samplings:
        samples = rollout(model, given["prompts"], stop=set(given["stop"]), seed=7, **sizes, **sampling)
        name = ", ".join(f"{key}={value}" for key, value in sampling.items())
        figures[f"tokens, {name}"] = [token for s in samples for token in s.tokens]
        figures[f"logprobs, {name}"] = [logprob for s in samples for logprob in s.logprobs]
        figures[f"finished, {name}"] = [int(s.finished) for s in samples]
    with open(out, "w") as f:
        json.dump(figures, f)


def write_prompts(tokenizer_folder, rows_path, out):
    """Eight prompts as token ids, and the end of turn. Runs alone, in a process of the old code."""
    import json

    from data import chat, tokenizer

    tok = tokenizer.with_turns(tokenizer.load(tokenizer_folder))
    with open(rows_path) as f:
        rows = [json.loads(line) for line in f][:8]
    prompts = [chat.encode_prompt(tok, [{"role": "user", "content": row["prompt"]}]) for row in rows]
    with open(out, "w") as f:
        json.dump({"prompts": prompts, "stop": [chat.end_of_turn(tok)]}, f)


def run_rollout(runner, checkpoints, scratch):
    """The tokens and log-probabilities of a fixed set of prompts, several ways of sampling."""
    samples_path = f"{scratch}/samples.json"
    runner.call(draw_samples, f"{checkpoints}/sft", f"{checkpoints}/prompts.json", samples_path, SAMPLINGS)
    return json.loads(Path(samples_path).read_text())


# --------------------------------------------------------------------------------------------------
# The two sides


def measure(name, runner, checkpoints):
    """The figures of one run, to nine digits: they determine an fp32 number."""
    with tempfile.TemporaryDirectory() as scratch:
        if name == "inputs":
            figures = run_inputs(runner, scratch)
        elif name == "rollout":
            figures = run_rollout(runner, checkpoints, scratch)
        else:
            figures = run_stage(runner, RUNS[name], checkpoints, scratch)
    return {key: [float(f"{x:.9g}") if isinstance(x, float) else x for x in xs] for key, xs in figures.items()}


def measure_all(config, checkout):
    """{run: its figures, or the UserError it ended in} of the runs that --only names."""
    prefixes = tuple(config.only.split(","))
    names = [name for name in ["inputs", "rollout", *RUNS] if name.startswith(prefixes)]
    runners = queue.SimpleQueue()
    for _ in range(config.workers):
        runners.put(Runner(checkout))

    def measure_next(name):
        runner, begin = runners.get(), time.perf_counter()
        try:
            return measure(name, runner, config.checkpoints)
        except UserError as e:
            return e
        finally:
            print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
            runners.put(runner)

    with ThreadPoolExecutor(config.workers) as pool:
        results = dict(zip(names, pool.map(measure_next, names), strict=True))
    for _ in range(config.workers):
        runners.get().close()
    return results


def hardware():
    """The processor's name and how many cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def make_golden(config, record_path):
    """Run the old code: write the checkpoints, then the record of what every run computed."""
    if not is_old(config.old or "."):
        raise UserError(f"--old={config.old}: not a checkout of the old code; git worktree add makes one")
    checkpoints = Path(config.checkpoints)
    if checkpoints.exists() and any(checkpoints.iterdir()):
        raise UserError(f"--checkpoints={checkpoints}: not empty; choose another directory")
    checkpoints.mkdir(parents=True, exist_ok=True)
    runner = Runner(config.old)
    make_inputs(runner, INPUTS, checkpoints)
    prompts_path = checkpoints / "world/prompts.jsonl"
    runner.call(write_prompts, f"{checkpoints}/tokenizer", str(prompts_path), f"{checkpoints}/prompts.json")
    runner.close()

    runs = measure_all(config, config.old)
    for error in runs.values():
        if isinstance(error, UserError):
            raise error
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=config.old, capture_output=True, text=True)
    machine = {"commit": revision.stdout.strip(), "hardware": hardware(), "threads": THREADS}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    lines = []
    for name, figures in runs.items():
        entries = [f"  {json.dumps(key)}: {json.dumps(xs)}" for key, xs in figures.items()]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(entries) + "\n }")
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in (machine | versions).items())
    record_path.write_text(f'{{\n{head}"runs": {{\n' + ",\n".join(lines) + "\n}\n}\n")
    print(f"wrote {record_path}, {record_path.stat().st_size / 1e3:.0f} kB, and {checkpoints}")


def difference(old, new):
    """(largest relative, largest absolute difference, place of the first number that differs).

    Differences are infinite between lists of two lengths, texts and numbers that are not finite;
    the place is None if all numbers count as the same.
    """
    if len(old) != len(new):
        return math.inf, math.inf, min(len(old), len(new))
    relative, absolute, first = 0.0, 0.0, None
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if a == b:
            continue
        comparable = isinstance(a, int | float) and isinstance(b, int | float) and math.isfinite(a - b)
        gap = abs(a - b) if comparable else math.inf
        size = abs(a) if comparable else 1.0
        relative = max(relative, gap / size if size else gap)
        absolute = max(absolute, gap)
        if first is None and gap > TOLERANCE * max(1.0, size):
            first = i
    return relative, absolute, first


def match_names(name, old, new):
    """[(name, old figures, new figures or None)] of a run.

    The figures of evaluate.py and rlaif.py have sentences as names; if they were reworded, they
    match in their order.
    """
    old = {key: values for key, values in old.items() if key not in NOT_COMPARED.get(name, ())}
    if not name.startswith(("evaluate", "rlaif")):
        return [(key, values, new.get(key)) for key, values in old.items()]
    unmatched = iter([key for key in new if key not in old])
    matched = []
    for key, values in old.items():
        found = key if key in new else next(unmatched, None)
        matched.append((key, values, new.get(found)))
    return matched


def compare(record, measured):
    """Print every stage's largest differences -> the runs that differ."""
    failed = []
    stages = {}  # stage: {figure: (largest absolute, relative difference, run)}
    for name, new in measured.items():
        if isinstance(new, UserError):
            print(f"\n{name} failed: {new.args[0]}")
            failed.append(name)
            continue
        worst = stages.setdefault(name.split()[0], {})
        for key, old_values, new_values in match_names(name, record["runs"][name], new):
            relative, absolute, first = difference(old_values, new_values or [])
            worst[key] = max(worst.get(key, (0.0, 0.0, "")), (absolute, relative, name))
            if new_values is None:
                failed.append(f"{name}: {key} is missing")
            elif first is not None:
                failed.append(f"{name}: {key} from number {first + 1} of {len(old_values)}")
    for stage, worst in stages.items():
        print(f"\n{stage:<42} relative   absolute   largest in")
        for key, (absolute, relative, run) in worst.items():
            if absolute:
                print(f"  {key[:40]:<40} {relative:9.2g}  {absolute:9.2g}   {run}")
        equal = [key for key, (absolute, *_) in worst.items() if not absolute]
        if equal:
            print(f"  equal to nine digits: {', '.join(equal)}")
    for name, keys in NOT_COMPARED.items():
        if name in measured:
            print(f"\nnot compared in {name}: {', '.join(keys)}")
    return failed


def main(config):
    config.checkpoints = os.path.abspath(config.checkpoints)  # the runs have directories of their own
    record_path = Path(config.record or RECORD)
    begin = time.perf_counter()
    if config.make_golden:
        make_golden(config, record_path)
        print(f"{time.perf_counter() - begin:.0f} s")
        return
    if not Path(config.checkpoints, "prompts.json").exists():
        raise UserError(f"--checkpoints={config.checkpoints}: nothing is there; --make_golden writes it")
    record = json.loads(record_path.read_text())
    measured = measure_all(config, config.new or ROOT)
    failed = compare(record, measured)
    print(f"\nrecord of {record['hardware']}, torch {record['torch']}; here {hardware()}, torch {torch.__version__}")
    print(f"{len(measured)} runs in {time.perf_counter() - begin:.0f} s")
    if failed:
        print("\n".join(failed))
        raise UserError(f"FAIL: {len(failed)} figures differ by more than {TOLERANCE:g}")
    print(f"PASS: every number is the same to {TOLERANCE:g}")


if __name__ == "__main__":
    launch(main, Config)
