"""Every stage in order on the embedded world, then one report: no download, no GPU, minutes on a
laptop.

Each row is a command a user would type: it is printed and run, and what it made is measured on text
that training never saw. Rows that do not need each other run side by side. If it is interrupted,
the same command continues where it stopped. It ends in out/quickstart/report.json and a table,
beside which it says what lies outside the ranges that other seeds and machines gave.

    python quickstart.py
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import quickstart_puzzles
import report
from data.read import read_json
from figures import point_estimate
from runtime import checkpoint
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.files import LOCKS, lock_file, write_json
from runtime.process import choose_device, describe, launch
from runtime.run import clock_time

# For commands on a CPU. Threads that spin while they wait make training many times slower on a
# laptop that does other things as well; and glibc is told to keep what is freed, which saves an
# eighth of the time of a step and costs memory in holes between tensors of many sizes.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
ENVIRONMENT |= {"PYTHONUNBUFFERED": "1"}  # a stage prints into a pipe


@dataclass
class Config:
    # -- What you may set --
    # shop: from text to a model that is kind and right; puzzles: to one that reasons, by checked
    # rewards (quickstart_puzzles.py) [one of shop, puzzles]
    world: str = "shop"
    # directory of everything; "": out/quickstart, or out/puzzles
    out: str = ""
    # when all is done, serve the model of DPO, to be talked to and voted on
    serve: bool = False
    # -- What you will rarely set --
    # seed of the world, the weights and the samples
    seed: int = 0
    # a tiny run of every row, for tests: it shows that everything works, not that it learns
    fast: bool = False


SIZES = {  # {name: flags, and those of a fast run}
    "few": ("", "--stories=600 --notes=200 --chats=200 --pairs=100 --problems=50 --tests=40"),
    "shape": ("--depth=4 --width=128", "--depth=2 --width=64"),
    "steps": ("--steps=600 --batch_tokens=3072", "--steps=20 --batch_tokens=1024"),
    "ppo_steps": ("--steps=24", "--steps=2 --prompts_per_step=8 --eval_prompts=8"),
    "grpo_steps": ("--steps=40", "--steps=2 --prompts_per_step=2 --eval_prompts=8"),
    "weak_epochs": ("--epochs=30", "--epochs=2"),
    "ai_steps": ("--steps=120", "--steps=2"),
    # a model that has hardly been trained ends no completion and judges none
    "judged": (
        "--policy={out}/sft --data={out}/world/prompts.jsonl --group_size=3 --limit=1000 --min_margin=0.12 "
        "--max_new_tokens=64",
        "--data={out}/world/pairs.jsonl --min_margin=0",
    ),
    "best_of": ("--best_of=32 --limit=100", "--best_of=2 --limit=10"),
    "min_accuracy": ("", "--min_accuracy=0"),
}


def shop_commands(config):
    """The lines "stage: its command" of --world=shop, in three lanes with a blank line between."""
    out, seed = shlex.quote(config.out), f"--seed={config.seed}"
    size = {name: flags[config.fast].format(out=out) for name, flags in SIZES.items()}
    world = f"{out}/world"
    small = "--micro_batch_tokens=4096"  # a quick start must fit into 4 GB
    tuning = f"--epochs=1 --print_every=25 --eval_every=100 {small} {seed}"
    pairs = f"--data={world}/pairs.jsonl --val={world}/pairs_val.jsonl"
    weak_pairs = f"--data={world}/pairs_few.jsonl --val={world}/pairs_val.jsonl"
    measure = f"--data={world}/prompts_test.jsonl --max_new_tokens=64 {seed}"
    gold = "data/world.py:gold"
    # grpo, --advantage=dr_grpo: in a group whose sums are all right only the reward model tells
    # answers apart; over their std, its small differences would count as much as right and wrong
    rewards = f"{gold},data/world.py:rudeness,data/rules.py:final_number,{out}/rm"
    against = f"--problems={world}/problems_test.jsonl {measure} --reward={rewards}"
    preference = "--nll=0.4 --batch_size=32"  # imitation keeps sums right; twice the usual steps teach more
    rl = f"--monitor={gold} --max_new_tokens=64 --print_every=10 {seed}"
    # prepare: stories are short and differ in a few words, so neither the rules for web text nor
    # the removal of near-duplicates suit them
    text = f"""
        world: -m data.world --out={world} {seed} {size["few"]}
        tokenizer: -m data.tokenizer --data={world}/pretrain.jsonl --vocab_size=672 --out={out}/tokenizer
        prepare: -m data.prepare --data={world}/pretrain.jsonl --tokenizer={out}/tokenizer --clean=False \
            --dedup=exact --out={out}/data
        pretrain: pretrain.py --data={out}/data {size["shape"]} --context=512 {size["steps"]} {seed} \
            --save_every=200 --print_every=50 --prompt='Mia went to the' --out={out}/base
        sample: sample.py --model={out}/base --prompt='Mia went to the' --max_new_tokens=80 {seed}
        sft: sft.py --init={out}/base --data={world}/chat.jsonl --val={world}/chat_val.jsonl {tuning} --out={out}/sft
        reward: reward.py --init={out}/sft {pairs} --lr=1.5e-3 --max_new_tokens=64 {tuning} --out={out}/rm

        ppo: ppo.py --init={out}/sft --reward={out}/rm --data={world}/prompts.jsonl {rl} {size["ppo_steps"]} \
            {size["min_accuracy"]} --out={out}/ppo
        grpo: grpo.py --init={out}/ppo --reward=data/rules.py:final_number,{out}/rm*0.3 --advantage=dr_grpo --kl=k2 \
            --beta=0.02 --data={world}/problems.jsonl {rl} {size["grpo_steps"]} --out={out}/grpo
        weak reward: reward.py --init={out}/sft {weak_pairs} --lr=1.5e-3 --max_new_tokens=64 {size["weak_epochs"]} \
            --print_every=25 {seed} --out={out}/weak_rm
        best of n, weak: evaluate.py --model={out}/sft {measure} --reward={out}/weak_rm,{gold} {size["best_of"]} \
            --out={out}/best_weak.json
        best of n: evaluate.py --model={out}/sft {measure} --reward={out}/rm,{gold} {size["best_of"]} \
            --out={out}/best.json
        evaluate base: evaluate.py --model={out}/base --text={world}/stories_val.jsonl \
            --complete={world}/sums_test.jsonl --judge={world}/judge_test.jsonl {measure} --reward={gold} \
            --samples={out}/base_answers.jsonl --out={out}/base.json
        evaluate ppo: evaluate.py --model={out}/ppo {against} --reference={out}/sft \
            --samples={out}/ppo_answers.jsonl --out={out}/ppo.json
        evaluate grpo: evaluate.py --model={out}/grpo {against} --reference={out}/sft \
            --samples={out}/grpo_answers.jsonl --out={out}/grpo.json

        evaluate sft: evaluate.py --model={out}/sft {against} --samples={out}/sft_answers.jsonl --out={out}/sft.json
        dpo: dpo.py --init={out}/sft {pairs} {preference} {tuning} --out={out}/dpo
        rlaif: rlaif.py {size["judged"]} --judge={out}/base --constitution=data/constitution.txt \
            --reward={gold} {seed} --out={out}/ai_pairs.jsonl
        dpo of rlaif's: dpo.py --init={out}/sft --data={out}/ai_pairs.jsonl {preference} --print_every=25 {small} \
            {seed} {size["ai_steps"]} --out={out}/ai_dpo
        evaluate dpo: evaluate.py --model={out}/dpo {against} --reference={out}/sft \
            --samples={out}/dpo_answers.jsonl --out={out}/dpo.json
        evaluate ai_dpo: evaluate.py --model={out}/ai_dpo {against} --reference={out}/sft \
            --samples={out}/ai_dpo_answers.jsonl --out={out}/ai_dpo.json
    """
    return text


def command_lanes(config):
    """[{stage: its command}]: what runs first, and the lanes that run side by side after it, each
    in order."""
    text = quickstart_puzzles.commands(config) if config.world == "puzzles" else shop_commands(config)
    lanes = (lane.strip().splitlines() for lane in text.split("\n\n"))
    return [dict(line.strip().split(": ", 1) for line in lane) for lane in lanes]


def continue_flags(words):
    """The flag with which a command continues what an interrupted one left; [] if there is
    nothing."""
    outs = [Path(word.removeprefix("--out=")) for word in words if word.startswith("--out=")]
    if not outs or not outs[0].exists() or words[0] == "evaluate.py" or words[1] == "data.prepare":
        return []  # data/prepare.py continues by itself
    return ["--overwrite"] if words[0] == "-m" else ["--resume"]


RUNNING = set()  # the stages' processes
STOPPED = []  # signals that ended stages, and reasons to begin no other
RECORDING = threading.Lock()


def stop(number, frame=None):
    """Begin no other stage; the stages that run finish their step, save and leave."""
    STOPPED.append(number)
    if number == signal.SIGTERM:  # Ctrl-C reaches the stages too
        for process in list(RUNNING):
            process.terminate()


def run(stage, words, threads=1, wrapper=()):
    """Run one command, and print each line of it behind its stage -> its record {"stage",
    "command", "seconds"}; None if a signal stopped it.

    wrapper: what runs the command, as in python -m WRAPPER COMMAND. Raises UserError if it fails.
    """
    command = shlex.join(["python", *words])
    print(f"\n{stage} | $ {command}", flush=True)
    begin = time.perf_counter()
    # It holds our lock too: if we are killed and it is not, the next quick start is refused until
    # it ends.
    process = subprocess.Popen(
        [sys.executable, *wrapper, *words, *continue_flags(words)],
        env=ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock.fileno() for lock in LOCKS],
    )
    RUNNING.add(process)
    for line in process.stdout:
        print(f"{stage} | {line}", end="", flush=True)
    status = process.wait()
    RUNNING.remove(process)
    number = -status if status < 0 else status - 128
    if number in (signal.SIGINT, signal.SIGTERM):
        print(f"stopped in {stage}; the same command continues from here", file=sys.stderr)
        STOPPED.append(number)
        return None
    if status:
        stop(signal.SIGTERM)
        raise UserError(f"{stage} ended with status {status}; the same command continues from here")
    return {"stage": stage, "command": command, "seconds": round(time.perf_counter() - begin, 1)}


def run_lane(lane, threads, record, file):
    """Run the stages of a lane that the record, which is kept in a file, does not have."""
    for stage, line in lane.items():
        words = shlex.split(line)
        command = shlex.join(["python", *words])
        done = {ran["stage"]: ran["command"] for ran in record["stages"]}
        if done.get(stage) == command:
            print(f"\n{stage}: done already ($ {command})")
            continue
        if stage in done:
            raise UserError(f"{file}: {stage} was run by another command there; remove that directory or name another")
        ran = None if STOPPED else run(stage, words, threads)
        if ran is None:
            return
        with RECORDING:
            record["stages"].append(ran)
            write_json(file, record)


def run_side_by_side(lanes, record, file):
    """Run lanes at once, the CPU's threads shared between them; if a signal stopped them, end as
    they did."""
    threads = max(1, torch.get_num_threads() // len(lanes))
    with ThreadPoolExecutor(len(lanes)) as pool:
        running = [pool.submit(run_lane, lane, threads, record, file) for lane in lanes]
    for lane in running:
        lane.result()
    if STOPPED:
        sys.exit(128 + STOPPED[0])


# --------------------------------------------------------------------------------------------------
# What came of it


# What each stage must do: stage, what is measured, before, after, bound, how it must change. "sft:
# accuracy" is a figure of DIR/sft.json; "rm" are those of the reward model, "text" of the data.
TABLE = """
tokenizer | bytes per token | 1 | text: bytes per token | |
pretrain | story loss, nats per token | text: uniform loss | base: nats/token | {entropy:.4f}, the entropy | falls
pretrain | held-out sums right | 0 | base: completions right | 1 | rises
{judged}
sft | completions finished | base: completions finished | sft: completions finished | 1 | rises
sft | gold reward | base: {gold} | sft: {gold} | 1.9 | rises
reward | held-out pairs ordered as labelled | 0.5 | rm: accuracy | {noise:.3f}, the labels' noise | rises
reward | held-out pairs ordered as gold's | 0.5 | rm: order as gold's | 1 | rises
ppo | gold reward, SFT's before | sft: {gold} | ppo: {gold} | 1.9 | rises
ppo | sampled sums right | sft: {sums} | ppo: {sums} | 1 |
ppo | rude phrases per completion | sft: {rude} | ppo: {rude} | 0 |
ppo | win rate against SFT, by gold | 0.5 | ppo: {wins} | 1 |
ppo | KL to SFT, nats per completion | 0 | ppo: {kl} | |
grpo, after ppo | gold reward, PPO's before | ppo: {gold} | grpo: {gold} | 1.9 | rises
grpo, after ppo | sampled sums right | ppo: {sums} | grpo: {sums} | 1 | rises
grpo, after ppo | rude phrases per completion | ppo: {rude} | grpo: {rude} | 0 |
grpo, after ppo | win rate against SFT, by gold | ppo: {wins} | grpo: {wins} | 1 |
grpo, after ppo | KL to SFT, nats per completion | ppo: {kl} | grpo: {kl} | |
dpo | gold reward, SFT's before | sft: {gold} | dpo: {gold} | 1.9 | rises
dpo | sampled sums right | sft: {sums} | dpo: {sums} | 1 |
dpo | rude phrases per completion | sft: {rude} | dpo: {rude} | 0 |
dpo | win rate against SFT, by gold | 0.5 | dpo: {wins} | 1 |
dpo | KL to SFT, nats per completion | 0 | dpo: {kl} | |
rlaif + dpo | gold reward, SFT's before | sft: {gold} | ai_dpo: {gold} | 1.9 |
rlaif + dpo | sampled sums right | sft: {sums} | ai_dpo: {sums} | 1 |
rlaif + dpo | rude phrases per completion | sft: {rude} | ai_dpo: {rude} | 0 | falls
rlaif + dpo | win rate against SFT, by gold | 0.5 | ai_dpo: {wins} | 1 |
rlaif + dpo | KL to SFT, nats per completion | 0 | ai_dpo: {kl} | |
"""

NAMES = {  # of figures that the table asks for often
    "gold": "reward data/world.py:gold",
    "sums": "reward data/rules.py:final_number",
    "rude": "reward data/world.py:rudeness",
    "wins": "win rate by data/world.py:gold",
    "kl": "KL to the reference, nats per completion",
}


def figures(out):
    """The rows of the table: what the stages reached on text that training never saw."""
    found = {name: read_json(out / f"{name}.json")["figures"] for name in "base sft dpo ppo grpo ai_dpo".split()}
    found["rm"] = checkpoint.read_info(checkpoint.find(out / "rm"))["metrics"]["figures"]
    world, manifest = read_json(out / "world/world.json"), read_json(out / "data/manifest.json")
    shards = manifest["splits"]["train"] + manifest["splits"]["val"]
    bytes_per_token = sum(shard["bytes"] for shard in shards) / sum(shard["tokens"] for shard in shards)
    found["text"] = {
        "bytes per token": point_estimate(bytes_per_token),
        "uniform loss": point_estimate(math.log(manifest["n_vocab"])),
    }
    judges = [name for name in found["base"] if name.startswith("judge") and name.endswith("both orders")]
    text = TABLE.format(
        judged="\n".join(f"pretrain | {name} | 0.5 | base: {name} | 1 |" for name in judges),
        entropy=world["story_floor"] / found["base"]["tokens/document"]["value"],
        noise=found["rm"]["accuracy that noise allows (Bayes)"]["value"],
        **NAMES,
    )
    return fill_in([[cell.strip() for cell in line.split("|")] for line in text.split("\n") if line], found)


def puzzle_figures(out):
    """The rows of the table of --world=puzzles."""
    found = {name: read_json(out / f"{name}.json")["figures"] for name in quickstart_puzzles.MODELS}
    return fill_in(quickstart_puzzles.cells(found), found)


def fill_in(cells, found):
    """The rows of a table, of which `before` and `after` are looked up."""
    return [
        row(stage, figure, look_up(before, found), look_up(after, found), bound, change)
        for stage, figure, before, after, bound, change in cells
    ]


def look_up(cell, found):
    """The figure that a cell of the table names, or the number in it as one."""
    name, colon, figure = cell.partition(": ")
    return found[name][figure] if colon else point_estimate(cell)


def row(stage, figure, before, after, bound="", change=""):
    """{"stage", "figure", "before", "after", "bound", "improved"} of the table.

    change: "rises" or "falls" if it must. improved: whether that is sure, the 95 % intervals of
    before and after lying apart; None if nothing is asked."""
    improved = None
    if change == "rises":
        improved = after["low"] > (before["value"] if before["high"] is None else before["high"])
    elif change == "falls":
        improved = after["high"] < (before["value"] if before["low"] is None else before["low"])
    return {
        "stage": stage,
        "figure": figure,
        "before": before,
        "after": after,
        "bound": bound,
        "improved": improved,
    }


def table(lines):
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def table_lines(rows):
    """The rows of `figures` as text, below a head."""
    lines = [("stage", "figure", "before", "after [95 %]", "bound", "better")]
    for f in rows:
        better = {True: "sure", False: "NOT sure", None: ""}[f["improved"]]
        lines.append((f["stage"], f["figure"], report.show(f["before"]), report.show(f["after"]), f["bound"], better))
    return lines


def outside(rows, ranges):
    """A line for each figure that lies outside the range of other seeds, threads and machines; none
    for figures without a range."""
    values = {f"{f['stage']} | {f['figure']}": f["after"]["value"] for f in rows}
    known = values.keys() & ranges.keys()
    lines = []
    for name in values:
        if name in known and not ranges[name][0] <= values[name] <= ranges[name][1]:
            low, high = ranges[name]
            lines.append(f"outside its range: {name}: {values[name]:.3g}, elsewhere {low:.3g} to {high:.3g}")
    if known and not lines:
        lines.append(f"all {len(known)} figures that were measured elsewhere lie within their ranges")
    return lines


def product_seconds():
    """How long a product of two fp32 matrices of 2048 x 2048 takes here, with all threads: times of
    two machines compare by it."""
    a, seconds = torch.ones(2048, 2048), []
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main(config):
    check_ranges(config)
    here = Path(__file__).parent
    if Path.cwd() != here:
        raise UserError(f"run it from the repository's directory: cd {here}")
    puzzles = config.world == "puzzles"
    if puzzles and config.serve:
        raise UserError("--serve: it needs --world=shop; python serve.py --model=out/puzzles/r1 serves a puzzler")
    config.out = config.out or ("out/puzzles" if puzzles else "out/quickstart")
    out = Path(config.out)
    file = out / "report.json"

    # 1. Run what has not been run yet
    lock_file(out / ".lock", config.out)
    record = read_json(file) if file.exists() else {"stages": []}
    first, *lanes = command_lanes(config)
    n = sum(map(len, (first, *lanes)))
    print(f"{n} commands, 10 to 30 minutes on two cores; run again, it continues where it was interrupted")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    run_side_by_side([first], record, file)
    run_side_by_side(lanes, record, file)

    # 2. Measure, and write the report
    seconds = {ran["stage"]: ran["seconds"] for ran in record["stages"]}
    record["seconds"] = sum(map(seconds.get, first)) + max(sum(map(seconds.get, lane)) for lane in lanes)
    found = puzzle_figures(out) if puzzles else figures(out)
    record |= {"figures": found, "code": checkpoint.code_hash(), **describe(choose_device("auto"))}
    write_json(file, record)
    page = report.make([out])
    print("\n" + table(table_lines(record["figures"])))
    last = "r1" if puzzles else "grpo"
    print(
        f"\n{clock_time(record['seconds'])} in all, on a machine that multiplies two matrices of 2048 x 2048 in "
        f"{product_seconds():.2f} s; report: {page}; talk to it: python sample.py --model={out}/{last}"
    )
    if not config.fast:
        print("\n".join(outside(record["figures"], read_json(report.RANGES))))
    failed = [f"{f['stage']}: {f['figure']}" for f in record["figures"] if f["improved"] is False]
    if failed and not config.fast:
        raise UserError(f"no sure improvement, by its 95 % interval, of {'; '.join(failed)}")
    if config.serve:
        serve(config.out)


def serve(out):
    """Serve the DPO model beside the SFT model until Ctrl-C; says how its votes sharpen it."""
    votes = [f"--feedback={out}/feedback"]
    models = [f"--model={out}/dpo", f"--compare={out}/sft", f"--follow={out}/rounds"]
    sharpen = shlex.join(["python", "sharpen.py", f"--init={out}/dpo", *votes, f"--rounds={out}/rounds"])
    print(f"\nwhen people have voted, in another terminal: {sharpen}", flush=True)
    os.execv(sys.executable, [sys.executable, "serve.py", *models, *votes])


if __name__ == "__main__":
    launch(main, Config)
