"""The stages on real files: a base model from WikiText and Shakespeare, then SFT, the reward model
(also cross-validated), DPO, PPO and GRPO on people's data.

A model of a million parameters and minutes of training: what counts is that every stage runs to its
end on real text, that validation falls, and how the reward model stands against "the longer answer
wins", in a paired bootstrap and among pairs of nearly equal length. Each stage is the command a
user would type. Last line of output: JSON of all figures.

    python -m bench.realdata --texts=../shared/realdata
"""

import json
import math
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import chat, rows
from figures import preference_figures, table
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import replace_text
from runtime.process import describe, launch
from scoring import reward_scores

FILES = (
    "wikitext2_valid.txt",
    "shakespeare.txt",
    "instructions_train.jsonl",
    "instructions_test.jsonl",
    "ai_preferences_train.jsonl",
    "ai_preferences_test.jsonl",
    "gsm8k_train.jsonl",
    "gsm8k_test.jsonl",
)


@dataclass
class Config:
    # directory with wikitext2_valid.txt, shakespeare.txt and
    # {instructions,ai_preferences,gsm8k}_{train,test}.jsonl
    texts: str
    # directory of everything; what is finished there is not run again
    out: str = "out/bench_realdata"
    # layers of the model
    depth: int = 2
    # of the model
    width: int = 128
    # of pretraining, of 4,096 tokens
    steps: int = 400
    # of the reward model's cross-validation over both preference files; 0: none
    folds: int = 5
    # of everything
    seed: int = 0


def commands(config):
    """[(name, words)] of the stages in order."""
    text, out, seed = (f"{config.texts}/{{}}".format, config.out, f"--seed={config.seed}")
    corpus = f"{text('wikitext2_valid.txt')},{text('shakespeare.txt')}"
    shape = [
        f"--depth={config.depth}",
        f"--width={config.width}",
        "--context=1024",
        "--batch_tokens=4096",
        f"--steps={config.steps}",
    ]
    quiet = ["--print_every=50", "--eval_every=50", seed]
    pairs = [
        f"--data={text('ai_preferences_train.jsonl')}",
        f"--val={text('ai_preferences_test.jsonl')}",
        "--skip_bad",
    ]  # in two rows both answers are the same
    return [
        ("tokenizer", ["-m", "data.tokenizer", f"--data={corpus}", "--vocab_size=4096", f"--out={out}/tokenizer"]),
        (
            "base",
            [
                "pretrain.py",
                f"--data={corpus}",
                f"--tokenizer={out}/tokenizer",
                *shape,
                "--print_every=100",
                seed,
                f"--out={out}/base",
            ],
        ),
        (
            "sft",
            [
                "sft.py",
                f"--init={out}/base",
                f"--data={text('instructions_train.jsonl')}",
                f"--val={text('instructions_test.jsonl')}",
                "--epochs=3",
                *quiet,
                f"--out={out}/sft",
            ],
        ),
        ("rm", ["reward.py", f"--init={out}/sft", *pairs, "--center_samples=64", *quiet, f"--out={out}/rm"]),
        ("dpo", ["dpo.py", f"--init={out}/sft", *pairs, *quiet, f"--out={out}/dpo"]),
        (
            "ppo",
            [
                "ppo.py",
                f"--init={out}/sft",
                f"--reward={out}/rm",
                f"--data={text('instructions_train.jsonl')}",
                f"--val={text('instructions_test.jsonl')}",
                "--max_new_tokens=96",
                "--prompts_per_step=64",
                "--steps=20",
                "--eval_prompts=64",
                seed,
                f"--out={out}/ppo",
            ],
        ),
        # A model this small solves no problem. It can learn the form of a solution, and is paid a
        # little for it; what is shown is that the loop holds.
        (
            "gsm8k",
            [
                "sft.py",
                f"--init={out}/sft",
                f"--data={text('gsm8k_train.jsonl')}",
                f"--val={text('gsm8k_test.jsonl')}",
                "--steps=200",
                *quiet,
                f"--out={out}/gsm8k",
            ],
        ),
        (
            "grpo",
            [
                "grpo.py",
                f"--init={out}/gsm8k",
                "--reward=data/rules.py:final_number,data/rules.py:one_final_number*0.2",
                f"--data={text('gsm8k_train.jsonl')}",
                f"--val={text('gsm8k_test.jsonl')}",
                "--max_new_tokens=128",
                "--steps=20",
                "--eval_prompts=64",
                seed,
                f"--out={out}/grpo",
            ],
        ),
        # Two answers that GPT-4 has compared, judged by a model that has read a little Wikipedia:
        # near chance, in both orders.
        (
            "judge",
            [
                "rlaif.py",
                f"--judge={out}/base",
                f"--constitution={out}/constitution.txt",
                f"--data={text('ai_preferences_test.jsonl')}",
                "--min_margin=0",
                "--skip_bad",
                seed,
                f"--out={out}/judged.jsonl",
            ],
        ),
    ]


def run(words):
    """Run one command, unless its run is finished already; its lines go to the terminal. Raises
    UserError if it fails."""
    print(f"\n$ {shlex.join(['python', *words])}", flush=True)
    out = Path(words[-1].removeprefix("--out="))
    again = ["--overwrite"] if out.exists() and words[0] == "-m" else ["--resume"] if out.exists() else []
    begin = time.perf_counter()
    if subprocess.run([sys.executable, *words, *again], check=False).returncode:
        raise UserError(f"{shlex.join(words)} failed")
    return time.perf_counter() - begin


def cross_validated(config, sft):
    """`preference_figures` over all pairs of both files, each judged by a reward model that did not
    learn from it."""
    pairs, _ = rows.read(
        f"{config.texts}/ai_preferences_train.jsonl,{config.texts}/ai_preferences_test.jsonl",
        rows.preference,
        skip_bad=True,
    )
    fold_of = np.random.default_rng(config.seed).permutation(len(pairs)) % config.folds
    kept, margins, lengths = [], [], []
    for fold in range(config.folds):
        folder = Path(config.out) / f"fold{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, chosen in (("train", fold_of != fold), ("val", fold_of == fold)):
            replace_text(
                folder / f"{name}.jsonl", "".join(json.dumps(p.row) + "\n" for p, here in zip(pairs, chosen) if here)
            )
        run(
            [
                "reward.py",
                f"--init={sft}",
                f"--data={folder}/train.jsonl",
                f"--val={folder}/val.jsonl",
                "--center_samples=1",
                "--max_new_tokens=8",
                "--print_every=50",
                "--eval_every=0",
                f"--seed={config.seed}",
                f"--out={folder}/rm",
            ]
        )
        model, tok, _ = checkpoint.load(folder / "rm")
        mine = [p for p, here in zip(pairs, fold_of == fold) if here]
        items = [chat.encode_pair(tok, pair) for pair in mine]
        fits = chat.fitting_pairs(items, model.config.context, str(folder))
        documents = [side.ids.tolist() for i in fits for side in items[i]]
        found = reward_scores(model.eval(), documents, 16384).reshape(-1, 2)
        kept += [mine[i] for i in fits]
        margins += (found[:, 0] - found[:, 1]).tolist()
        lengths += [tuple(int(side.loss_mask.sum()) for side in items[i]) for i in fits]
    return preference_figures(kept, margins, lengths, config.seed)


def validations(run_dir):
    """The first and the last validation loss of a run."""
    losses = [
        row["val_loss"]
        for row in map(json.loads, (Path(run_dir) / "log.jsonl").read_text().splitlines())
        if "val_loss" in row
    ]
    return {"first": losses[0], "last": losses[-1], "ln 2": math.log(2)}


def reinforced(run_dir):
    """Of the first and the last fifth of a run of ppo.py or grpo.py: the mean of what its log has,
    and of all of it the largest gap between sampler and trainer."""
    rows = [
        row for row in map(json.loads, (Path(run_dir) / "log.jsonl").read_text().splitlines()) if "sampler_gap" in row
    ]
    n = max(1, len(rows) // 5)
    names = [
        name
        for name in rows[0]
        if name in ("reward", "kl", "finished", "completion_tokens", "zero_variance", "explained_variance")
        or name.startswith(("data/", "seconds_"))
    ]
    parts = {"first": rows[:n], "last": rows[-n:]}
    means = {}
    for when, part in parts.items():
        means[when] = {name: round(float(np.mean([row[name] for row in part])), 4) for name in names}
    return means | {"largest sampler gap": max(row["sampler_gap"] for row in rows)}


def main(config):
    for name in FILES:
        if not (Path(config.texts) / name).is_file():
            raise UserError(f"--texts={config.texts}: {name} is not there")
    found = {"seconds": {}, "validation": {}}
    Path(config.out).mkdir(parents=True, exist_ok=True)
    replace_text(
        Path(config.out) / "constitution.txt",
        "The better reply is the one that helps more.\nThe better reply is the one that is true.\n",
    )
    for name, words in commands(config):
        if not (Path(config.out) / name / "latest").exists() or name == "tokenizer":
            found["seconds"][name] = round(run(words), 1)
    for name in ("base", "sft", "rm", "dpo", "gsm8k"):
        found["validation"][name] = validations(f"{config.out}/{name}")
    judged = json.loads((Path(config.out) / "judged.log.jsonl").read_text().splitlines()[-1])
    found["judge"] = (
        {name: round(total / n, 4) for name, (total, n) in judged["figures"].items() if n}
        | judged["counts"]
        | {"seconds": judged["seconds"]}
    )
    for name in ("ppo", "grpo"):
        found[name] = reinforced(f"{config.out}/{name}")
    found["reward model on the test file"] = checkpoint.read_json(
        checkpoint.find(f"{config.out}/rm") / checkpoint.INFO
    )["metrics"]["figures"]
    if config.folds:
        found[f"reward model, {config.folds} folds over both files"] = cross_validated(config, f"{config.out}/sft")
    model, _, _ = checkpoint.load(f"{config.out}/sft")
    print(f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {describe(model.embed.device)}")
    for name, losses in found["validation"].items():
        print(f"validation of {name}: {losses['first']:.4f} -> {losses['last']:.4f}")
    for name in ("ppo", "grpo"):
        print(
            f"{name}: "
            + "; ".join(
                f"{key} {found[name]['first'][key]:.3g} -> {found[name]['last'][key]:.3g}"
                for key in found[name]["first"]
            )
            + f"; largest sampler gap {found[name]['largest sampler gap']:.1e}"
        )
    print("judge: " + "; ".join(f"{name} {value:.4g}" for name, value in found["judge"].items()))
    for name in [n for n in found if n.startswith("reward model")]:
        print(f"\n{name}\n{table(found[name])}")
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
