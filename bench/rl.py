"""Where the seconds of a PPO step and of a GRPO step go: ppo.py and grpo.py themselves, on a
made-up model, prompts and reward; what their logs say.

A step is rollout, scoring (the rewards; in PPO the log-probabilities and values of the answers too)
and update. The first step warms up, of the others each phase's median is told; new tokens a second
are those of the whole step. The model never ends a turn, so every answer has --max_new_tokens
tokens. PPO's reward model and critic are as large as the policy; GRPO's reward is a function that
costs nothing. Last line of output: JSON.

    python -m bench.rl
    python -m bench.rl --depth=12 --vocab=50304 --answers=256 --max_new_tokens=512 --device=cuda
"""

import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import grpo
import ppo
from bench import peers
from bench.preference import apart, fresh
from data import tokenizer
from model import config_for
from runtime import checkpoint
from runtime.errors import UserError
from runtime.process import describe, launch, setup


@dataclass
class Config:
    # scripts, comma-separated: ppo, grpo; "": both
    only: str = ""
    # layers
    depth: int = 4
    # of the model; 0: 64 x depth
    width: int = 0
    # ids, most of which the byte-level tokenizer has no text for
    vocab: int = 4096
    # a step
    answers: int = 32
    # to a prompt
    group: int = 8
    # tokens of a prompt, about
    prompt: int = 64
    # tokens of an answer
    max_new_tokens: int = 64
    # the first not counted
    steps: int = 4
    # see grpo.py
    micro_batch_tokens: int = 16384
    # auto, cpu, cuda, cuda:1
    device: str = "auto"


PHASES = ("rollout", "scoring", "update")


def made_up(folder, config):
    """{"policy", "rm", "data"}: a policy that never ends a turn, a reward model, and prompts."""
    tok = tokenizer.train(
        ["the cat sat on a mat and looked at its own tail while nobody else was there to see " * 3], 300
    )
    shape = config_for(
        config.depth,
        max(config.vocab, tok.n_vocab),
        config.width,
        context=2 * config.prompt + 64 + config.max_new_tokens,
    )
    info = {"step": 0, "config": {}, "data": {}, "lineage": []}
    silent = [*tok._special_tokens.values(), *range(tok.n_vocab, shape.vocab_size)]  # what has no text is not said
    policy = checkpoint.save(folder / "policy", peers.endless(shape, silent), tok, info | {"stage": "sft"})
    rm = checkpoint.save(
        folder / "rm",
        fresh(dataclasses.replace(shape, scalar_head=True), 1, torch.device("cpu")),
        tok,
        info | {"stage": "reward", "metrics": {"accuracy": 1.0}},
    )
    rng, words = (
        np.random.default_rng(0),
        "the cat sat on a mat and looked at its own tail while nobody was there".split(),
    )
    rows = [
        {"prompt": " ".join(rng.choice(words, rng.integers(1, max(3, config.prompt // 2))))}
        for _ in range(4 * config.answers)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"policy": str(policy), "rm": str(rm), "data": str(folder / "data.jsonl")}


def run(script, made, config):
    """The log of a run of a script, one row a step."""
    with tempfile.TemporaryDirectory() as out:
        flags = {
            "init": made["policy"],
            "data": made["data"],
            "val": made["data"],
            "eval_prompts": 1,
            "out": f"{out}/run",
            "steps": config.steps,
            "group_size": config.group,
            "prompts_per_step": config.answers // config.group,
            "max_new_tokens": config.max_new_tokens,
            "micro_batch_tokens": config.micro_batch_tokens,
            "eval_every": 0,
            "save_every": 0,
            "device": config.device,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            if script == "ppo":
                ppo.main(ppo.Config(**flags, reward=made["rm"]))
            else:
                grpo.main(grpo.Config(**flags, reward=f"{peers.__file__}:vowels"))
        return [
            row
            for row in map(json.loads, (Path(out) / "run/log.jsonl").read_text().splitlines())
            if "seconds_rollout" in row
        ]


def main(config):
    scripts = config.only.split(",") if config.only else ["ppo", "grpo"]
    if set(scripts) - {"ppo", "grpo"}:
        raise UserError(f"--only={config.only}: expected some of ppo, grpo")
    if config.answers % config.group or config.steps < 2:
        raise UserError(
            f"--answers={config.answers}: must be a multiple of --group={config.group}, and --steps at least 2"
        )
    device = setup(config.device, 0)
    config.device, found = str(device), {}
    print(f"{describe(device)}; {config.depth} layers, width {config.width or 64 * config.depth}")
    print(f"{config.answers} answers of {config.max_new_tokens} tokens, {config.group} per prompt", flush=True)
    print(f"\n{'':<5} {'new tokens/s':>12} {'seconds a step':>14}   " + "".join(f"{phase:>18}" for phase in PHASES))
    with tempfile.TemporaryDirectory() as folder:
        made = made_up(Path(folder), config)
        for script in scripts:
            log = apart(run, script, made, config)
            if any(row["completion_tokens"] != config.max_new_tokens for row in log):
                raise UserError(f"{script}: an answer ended early, and seconds would depend on the model")
            row = {phase: statistics.median(step[f"seconds_{phase}"] for step in log[1:]) for phase in PHASES}
            whole = statistics.median(step["seconds"] for step in log[1:])
            found[script] = {
                "seconds": whole,
                "tokens_per_s": config.answers * config.max_new_tokens / whole,
                **{f"seconds_{phase}": s for phase, s in row.items()},
                "updates": log[-1]["updates"],
            }
            print(
                f"{script:<5} {found[script]['tokens_per_s']:>12,.0f} {whole:>14.3f}   "
                + "".join(f"{f'{s:.3f} ({s / whole:.0%})':>18}" for s in row.values()),
                flush=True,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
