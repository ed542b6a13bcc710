"""The commands of `quickstart.py --world=puzzles`: a model learns to reason by checked rewards.

    base          reads puzzles with their answers, one in three worked out in steps, as web text
    start         fine-tuned on such answers: it ends its turn, and knows nothing more
    zero          R1-Zero: GRPO from there, rewarded for right results alone
    cold, first   R1: fine-tuned on 300 chains of steps, then GRPO
    refined, r1   its right answers are kept (rejection sampling), the base is fine-tuned on them,
                  and GRPO sharpens it again (DeepSeek-R1, arXiv 2501.12948, section 2.3)
    small         a model of a third of the size, pretrained and started alike; then
    small_rl      by GRPO itself, or
    distilled     by distill.py from R1 (section 2.4 compares the two so)

Each is measured on held-out problems, by family and level, with 8 samples to each.
"""

import shlex

from data.puzzles import FAMILIES

RIGHT, STEPS_RIGHT = "data/puzzles.py:right", "data/puzzles.py:steps_right"
SIZES = {  # {name: flags, and those of a fast run}
    "few": (
        "--texts=40000 --problems=3000 --tests=300",
        "--texts=600 --answers=60 --chains=40 --problems=60 --tests=20",
    ),
    "pretrain_steps": ("--steps=800 --batch_tokens=2048", "--steps=5 --batch_tokens=512"),
    "prompts": ("--prompts_per_step=32 --eval_prompts=64", "--prompts_per_step=4 --eval_prompts=8"),
    "rl_steps": ("--steps=80", "--steps=2"),
    "half_rl_steps": ("--steps=40", "--steps=1"),  # twice in R1, so that it has as many as R1-Zero
    "distill_steps": ("--steps=40", "--steps=2 --prompts_per_step=4 --eval_prompts=8"),
    # a model that has hardly been trained is never right
    "keep": (
        f"--reward={RIGHT} --limit=1000 --best_of=4 --keep_per_prompt=2",
        "--reward=data/rules.py:brief --best_of=4",
    ),
    "refine": ("--epochs=3", "--val_fraction=0.4"),  # few answers are kept
    "samples": ("--samples_per_problem=8 --max_new_tokens=96", "--samples_per_problem=8 --max_new_tokens=8"),
}
MODELS = ("start", "zero", "cold", "first", "refined", "r1", "small_start", "small_rl", "distilled")


def commands(config):
    """The lines "stage: its command", in three lanes with a blank line between."""
    out, seed = shlex.quote(config.out), f"--seed={config.seed}"
    size = {name: flags[config.fast] for name, flags in SIZES.items()}
    world = f"{out}/world"
    pretraining = f"--data={world}/pretrain.jsonl --tokenizer={out}/tokenizer --context=256 "
    pretraining += f"--val_fraction=0.01 --print_every=50 {size['pretrain_steps']} {seed}"
    tuning = f"--print_every=20 --eval_every=20 --max_new_tokens=64 {seed}"
    rl = f"--data={world}/problems.jsonl --reward={RIGHT} --monitor={STEPS_RIGHT} "
    rl += f"--max_new_tokens=80 --print_every=10 {size['prompts']} {seed}"
    measure = {
        name: f"evaluate {name}: evaluate.py --model={out}/{name} --problems={world}/problems_test.jsonl "
        f"--checker={RIGHT},{STEPS_RIGHT} --by=family,level {size['samples']} {seed} "
        f"--out={out}/{name}.json"
        for name in MODELS
    }
    return f"""
        world: -m data.puzzles --out={world} {size["few"]} {seed}
        tokenizer: -m data.tokenizer --data={world}/pretrain.jsonl --vocab_size=327 --out={out}/tokenizer
        base: pretrain.py {pretraining} --depth=2 --width=96 --out={out}/base
        small: pretrain.py {pretraining} --depth=2 --width=48 --heads=3 --out={out}/small
        small_start: sft.py --init={out}/small --data={world}/answers.jsonl --epochs=2 {tuning} --out={out}/small_start

        cold: sft.py --init={out}/base --data={world}/chains.jsonl --epochs=4 {tuning} --out={out}/cold
        first: grpo.py --init={out}/cold {rl} {size["half_rl_steps"]} --out={out}/first
        kept: evaluate.py --model={out}/first --data={world}/problems.jsonl {size["keep"]} \
            --max_new_tokens=80 --by=family,level {seed} --kept={out}/kept.jsonl
        refined: sft.py --init={out}/base --data={out}/kept.jsonl {size["refine"]} {tuning} --out={out}/refined
        r1: grpo.py --init={out}/refined {rl} {size["half_rl_steps"]} --out={out}/r1
        distilled: distill.py --init={out}/small_start --teacher={out}/r1 --data={world}/problems.jsonl \
            --max_new_tokens=80 --print_every=10 {size["distill_steps"]} {seed} --out={out}/distilled
        {measure["r1"]}
        {measure["distilled"]}
        {measure["cold"]}
        {measure["first"]}
        {measure["refined"]}

        start: sft.py --init={out}/base --data={world}/answers.jsonl --epochs=2 {tuning} --out={out}/start
        zero: grpo.py --init={out}/start {rl} {size["rl_steps"]} --out={out}/zero
        small_rl: grpo.py --init={out}/small_start {rl} {size["rl_steps"]} --lr=1e-3 --out={out}/small_rl
        {measure["start"]}
        {measure["zero"]}
        {measure["small_start"]}
        {measure["small_rl"]}
    """


PASS_1, PASS_8 = (f"problems right, pass@{k} of 8 samples" for k in (1, 8))
COMPARED = {  # {stage: (before, after)}
    "r1-zero": ("start", "zero"),
    "r1: cold start": ("start", "cold"),
    "r1: first grpo": ("cold", "first"),
    "r1: kept answers": ("first", "refined"),
    "r1": ("refined", "r1"),
    "r1 after r1-zero": ("zero", "r1"),
    "small by grpo": ("small_start", "small_rl"),
    "small distilled": ("small_start", "distilled"),
    "distilled after grpo": ("small_rl", "distilled"),
}


def cells(found):
    """The rows of the table (stage, figure, before, after, bound, change), as those of
    quickstart.TABLE are; found: {model: {figure: its value and interval}}."""
    rows = []
    for stage, (before, after) in COMPARED.items():
        families = ["", *(f", family {name}" for name in FAMILIES)]
        for label in families if stage in ("r1-zero", "r1 after r1-zero") else [""]:
            for shown, figure in {
                "right, pass@1": PASS_1,
                "right, pass@8": PASS_8,
                "tokens per answer": "tokens per sample",
                "answers whose steps are all true": f"samples: {STEPS_RIGHT}",
            }.items():
                bound = f"{found[before][PASS_8 + label]['value']:.3f}, pass@8 before" if figure == PASS_1 else ""
                change = "rises" if stage == "r1-zero" and figure == PASS_1 and not label else ""
                cell = f"{figure}{label}"
                rows.append((stage, f"{shown}{label}", f"{before}: {cell}", f"{after}: {cell}", bound, change))
    return rows
