"""Other people's libraries on our weights, our tokenizer and our data, in the same run: what one
gives up, or gains, by using this repository.

    dpo     TRL's DPOTrainer: the same batches in the same order, the same AdamW, rates, clipping,
            fp32 (bf16 on a GPU); its losses must be ours. It runs as its users would run it on
            such a machine (no gradient checkpointing, no padding to multiples), with the
            reference's log-probabilities computed in every step, its default, and before the first
            one; the better of the two is compared with ours
    rollout transformers' generate on the checkpoint's own files: --samples prompts of unequal
            lengths, --new tokens each, drawn at temperature 1 without cuts from a cache, prompts
            padded on the left. Greedy continuations must be the same ones
    grpo    TRL's GRPOTrainer: steps of --samples answers, --group per prompt, each of --new
            tokens: sampling, reward, update; one update a batch, no KL, the same reward, AdamW,
            rate and clipping, on a CPU as its users run it there (no vLLM). The entropy of the
            first answers must be the same

In dpo tokens are real tokens, without padding, of the training steps, and seconds go from texts and
loaded weights to the end of the last step: tokenizing, the reference's pass and training, not
imports. In rollout and grpo they are new tokens; the weights are such that the end of a turn is
never drawn, so that all answers have --new tokens, which is checked; the first call or step warms
up and the fastest counts. Every contender has a process of its own, one after the other, --rounds
times, and its fastest turn counts. Memory is the whole process at its peak, and what was added
after imports and weights; on a GPU both are what PyTorch allocated. Last line of output: JSON.

    pip install trl transformers, or the extra "peers"
    python -m bench.peers --data=../shared/realdata/ai_preferences_train.jsonl
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dpo
import grpo
from bench.preference import apart, clock, fresh, memory
from data import chat, rows as data_rows, tokenizer
from kernels.proof import prove
from model import config_for
from optim import Optimizer, wsd
from rollout import rollout
from runtime import checkpoint
from runtime.errors import UserError
from runtime.process import describe, launch, setup


@dataclass
class Config:
    # preferences, of which the first --pairs that fit are used, and prompts: .jsonl, .parquet or
    # hf:NAME (see data/rows.py)
    data: str
    # contests to hold, comma-separated: dpo, rollout, grpo; "": all
    only: str = ""
    # of dpo
    pairs: int = 160
    # pairs a step
    batch: int = 16
    # answers of rollout, and of a step of grpo
    samples: int = 32
    # tokens of each
    new: int = 64
    # of grpo, answers to a prompt
    group: int = 8
    # of grpo, the first not counted
    steps: int = 6
    # layers
    depth: int = 4
    # of the model
    width: int = 256
    # ids of the tokenizer, which is trained on the file
    vocab: int = 4096
    # tokens
    context: int = 1024
    # at the first step, falling to 0
    lr: float = 1e-4
    # turns each contender has
    rounds: int = 2
    # auto, cpu, cuda
    device: str = "auto"


BETAS, EPS, BETA = (0.9, 0.95), 1e-10, 0.1  # AdamW's (EPS is optim.py's), and DPO's
CLIP = 1.0  # the largest gradient norm
# dpo: times TRL's tokens/s, its peak, and how far losses may lie apart
ASKED = {"speed": 5.0, "memory": 0.5, "first_loss": 1e-5, "losses": 1e-3}
ASKED_SPEED = {"rollout": 3.0, "grpo": 3.0}  # times the other's new tokens/s


class Meter:
    """Seconds and memory of a contender, from `begin` on."""

    def __init__(self, device):
        self.device, self.losses, self.batches = device, [], []

    def begin(self):
        self.held, self.start, self.cpu_start = memory(self.device), clock(self.device), time.process_time()

    def step(self, loss, ids):
        """Note a step's loss, and what was in its batch: ids, all real tokens in order."""
        self.losses.append(loss)
        self.batches.append((len(ids), hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()))

    def end(self, *packages):
        seconds, cpu_seconds, peak = (
            clock(self.device) - self.start,
            time.process_time() - self.cpu_start,
            memory(self.device, peak=True),
        )
        versions = {name: importlib.metadata.version(name) for name in packages}
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak": peak,
            "added": peak - self.held,
            "losses": self.losses,
            "batches": self.batches,
            "versions": versions,
        }


# --------------------------------------------------------------------------------------------------
# DPO


def our_dpo(config, folder, pairs):
    """dpo.py's functions in its order."""
    device = setup(config.device, 0)
    prove(device)
    model, tok, _ = checkpoint.load(folder, device)
    flags = dpo.Config(init="", data="", out="", beta=BETA)
    meter = Meter(device)
    meter.begin()
    items = [chat.encode_pair(tok, pair) for pair in pairs]
    label_probs = torch.tensor([pair.probability for pair in pairs])
    ref_logps = dpo.all_logps(model, items, flags.micro_batch_tokens)
    optimizer = Optimizer(model, config.lr, betas=BETAS)
    steps = len(items) // config.batch
    model.train()
    for step in range(steps):
        batch = slice(step * config.batch, (step + 1) * config.batch)
        loss = dpo.run_batch(model, items[batch], label_probs[batch], ref_logps[batch], flags)["loss"]
        optimizer.step(wsd(step, steps, 0, steps), CLIP)
        meter.step(loss, np.concatenate([item[side].ids for side in (0, 1) for item in items[batch]]))
    return meter.end("torch")


def trl_dpo(config, folder, pairs, precompute):
    """TRL's trainer; precompute: whether the reference's log-probabilities are computed before the
    first step."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars(), transformers.utils.logging.disable_progress_bar()
    device = torch.device(config.device)  # without `setup`: what that does to PyTorch, its users do not do
    model, tok = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    rows = []
    for pair in pairs:
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
        rows.append({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected})
    meter = Meter(device)

    class Trainer(DPOTrainer):
        def compute_loss(self, model, inputs, *rest, **more):
            loss = super().compute_loss(model, inputs, *rest, **more)
            meter.step(float(loss.detach()), inputs["input_ids"][inputs["attention_mask"].bool()].cpu())
            return loss

    with tempfile.TemporaryDirectory() as out:
        flags = DPOConfig(
            out,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            gradient_checkpointing=False,
            max_length=config.context,
            per_device_train_batch_size=config.batch,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=precompute,
            learning_rate=config.lr,
            lr_scheduler_type="linear",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=0.0,
            max_grad_norm=CLIP,
            beta=BETA,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        meter.begin()
        trainer = Trainer(model, args=flags, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return meter.end("trl", "transformers", "torch")


def dpo_contest(config):
    """{contender: row} and what was asked of ours, after all have trained the same model on the
    same pairs."""
    if config.pairs % config.batch:
        raise UserError(
            f"--pairs={config.pairs}: whole batches of --batch={config.batch} are needed, for the "
            "two may end an epoch differently"
        )
    rows, _ = data_rows.read(config.data, data_rows.preference, skip_bad=True)
    tok = tokenizer.train((f"{r.prompt[-1]['content']}\n{r.chosen}\n{r.rejected}" for r in rows), config.vocab)
    pairs = [
        r for r in rows[: 4 * config.pairs] if all(len(side.ids) <= config.context for side in chat.encode_pair(tok, r))
    ][: config.pairs]
    shape = config_for(config.depth, tok.n_vocab, config.width, context=config.context)
    contenders = {"feinschliff": (our_dpo,), "TRL": (trl_dpo, False), "TRL, reference first": (trl_dpo, True)}
    turns = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        where = checkpoint.save(folder, fresh(shape, 0, torch.device("cpu")), tok, {"stage": "sft", "step": 0})
        for _ in range(config.rounds):
            for name, (function, *flags) in contenders.items():
                turns[name].append(apart(function, config, where, pairs, *flags))
    found = {name: min(turn, key=lambda result: result["seconds"]) for name, turn in turns.items()}
    ours, theirs = found["feinschliff"], [found[name] for name in contenders if name != "feinschliff"]
    for other in theirs:
        if other["batches"] != ours["batches"]:
            raise UserError(
                "the two did not see the same tokens in the same order, so times would compare different things"
            )
    tokens = sum(n for n, _ in ours["batches"])
    print(
        f"\ndpo: {len(pairs)} pairs, {tokens:,} tokens, {len(ours['losses'])} steps of "
        f"{config.batch} pairs; {shape.layers} layers, width {shape.width}, {shape.vocab_size} "
        f"ids; {theirs[0]['versions']}"
    )
    print(
        f"{'':<22} {'tokens/s':>9} {'seconds':>8} {'peak MiB':>9} {'added MiB':>10}   losses of "
        "the first steps, and of the last"
    )
    for name, row in found.items():
        row["tokens_per_s"] = tokens / row["seconds"]
        shown = " ".join(f"{loss:.6f}" for loss in [*row["losses"][:3], row["losses"][-1]])
        print(
            f"{name:<22} {row['tokens_per_s']:>9,.0f} {row['seconds']:>8.2f} "
            f"{row['peak'] / 2**20:>9.0f} {row['added'] / 2**20:>10.0f}   {shown}"
        )
    apart_by = [
        max(abs(a - b) for a, b in zip(ours["losses"][:n], other["losses"][:n]))
        for n in (1, 3, None)
        for other in theirs
    ]
    compared = {
        "speed": min(other["seconds"] for other in theirs) / ours["seconds"],
        "memory": ours["peak"] / min(other["peak"] for other in theirs),
        "added": ours["added"] / min(other["added"] for other in theirs),
        "first_loss": max(apart_by[:2]),
        "losses": max(apart_by[2:4]),
        "all_losses": max(apart_by[4:]),
    }
    reached = {
        key: compared[key] >= asked if key == "speed" else compared[key] <= asked for key, asked in ASKED.items()
    }
    print(
        f"against TRL's better: {compared['speed']:.2f} times as fast, {compared['memory']:.2f} "
        f"of its peak memory ({compared['added']:.2f} of what is added); losses differ by "
        f"{compared['first_loss']:.1e} at the first step, {compared['losses']:.1e} over three, "
        f"{compared['all_losses']:.1e} over all"
    )
    return {
        "contenders": {name: {k: v for k, v in row.items() if k != "batches"} for name, row in found.items()},
        **compared,
        "reached": reached,
    }


# --------------------------------------------------------------------------------------------------
# Rollouts


def quiet():
    """Have the other libraries say nothing."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


@torch.no_grad()
def endless(shape, ends):
    """A model of random weights that never says the tokens `ends`: a channel of the stream is 1
    for any input, and their logits fall with it."""
    model = fresh(shape, 0, torch.device("cpu"))
    model.embed[:, 0], model.untied_head[:, 0] = 1.0, 0.0
    for block in model.blocks:
        block.attn.out[0], block.mlp.down[0] = 0.0, 0.0
    model.untied_head[ends] = 0.0
    model.untied_head[ends, 0] = -100.0
    return model


def best_of(seconds_of, device, times=3):
    """The fewest seconds that one of so many calls takes, after one that warms up."""
    seconds = []
    for i in range(times + 1):
        begin = clock(device)
        seconds_of(i)
        seconds.append(clock(device) - begin)
    return min(seconds[1:])


def our_rollout(config, folder, prompts):
    device = setup(config.device, 0)
    prove(device)
    model, tok, _ = checkpoint.load(folder, device)
    greedy = [s.tokens for s in rollout(model, prompts, max_new_tokens=min(16, config.new), temperature=0)]
    held, lengths = memory(device), []
    seconds = best_of(
        lambda seed: lengths.append(
            [
                len(s.tokens)
                for s in rollout(model, prompts, max_new_tokens=config.new, stop={chat.end_of_turn(tok)}, seed=seed)
            ]
        ),
        device,
    )
    return result(seconds, lengths, greedy, memory(device, peak=True), held, "torch")


def their_rollout(config, folder, prompts):
    quiet()
    import transformers

    device = torch.device(config.device)
    model, tok = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    tok.padding_side = "left"
    batch = tok.pad({"input_ids": prompts}, return_tensors="pt").to(device)
    width = batch["input_ids"].shape[1]
    with torch.inference_mode():
        greedy = model.generate(**batch, max_new_tokens=min(16, config.new), do_sample=False)[:, width:].tolist()
        held, lengths = memory(device), []

        def sample(seed):
            torch.manual_seed(seed)
            out = model.generate(
                **batch, max_new_tokens=config.new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True
            )[:, width:]
            lengths.append((out != tok.pad_token_id).sum(1).tolist())

        seconds = best_of(sample, device)
    return result(seconds, lengths, greedy, memory(device, peak=True), held, "transformers", "torch")


def result(seconds, lengths, greedy, peak, held, *packages):
    return {
        "seconds": seconds,
        "lengths": lengths,
        "greedy": greedy,
        "peak": peak,
        "added": peak - held,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def endless_checkpoint(config, folder):
    """(checkpoint of a model that never ends a turn, its tokenizer, its shape, the prompts of
    --data that leave room)."""
    rows, _ = data_rows.read(config.data, data_rows.preference, skip_bad=True)
    tok = tokenizer.train((f"{r.prompt[-1]['content']}\n{r.chosen}\n{r.rejected}" for r in rows), config.vocab)
    shape = config_for(config.depth, tok.n_vocab, config.width, context=config.context)
    prompts = [r.prompt for r in rows if len(chat.encode_prompt(tok, r.prompt)) <= config.context - config.new]
    return (
        checkpoint.save(folder, endless(shape, sorted(tok._special_tokens.values())), tok, {"stage": "sft", "step": 0}),
        tok,
        shape,
        prompts,
    )


def turns_of(contenders, config, *args):
    """The fastest of --rounds turns of each contender."""
    turns = {name: [] for name in contenders}
    for _ in range(config.rounds):
        for name, function in contenders.items():
            turns[name].append(apart(function, config, *args))
    return {name: min(turn, key=lambda found: found["seconds"]) for name, turn in turns.items()}


def compare(name, found, config, shape, tokens, what):
    """Print the two rows of a contest and return what it found. `tokens`: new ones in a row's
    seconds."""
    (our_name, ours), (their_name, theirs) = found.items()
    print(
        f"\n{name}: {what}; {shape.layers} layers, width {shape.width}, {shape.vocab_size} ids; "
        f"{torch.get_num_threads()} threads; {theirs['versions']}"
    )
    print(f"{'':<22} {'new tokens/s':>12} {'seconds':>8} {'peak MiB':>9} {'added MiB':>10}")
    for who, row in found.items():
        row["tokens_per_s"] = tokens / row["seconds"]
        print(
            f"{who:<22} {row['tokens_per_s']:>12,.0f} {row['seconds']:>8.3f} "
            f"{row['peak'] / 2**20:>9.0f} {row['added'] / 2**20:>10.0f}"
        )
    speed, share = theirs["seconds"] / ours["seconds"], ours["peak"] / theirs["peak"]
    print(f"against {their_name}: {speed:.2f} times as fast, {share:.2f} of its peak memory")
    kept = {who: {k: v for k, v in row.items() if k not in ("lengths", "greedy")} for who, row in found.items()}
    return {
        "contenders": kept,
        "speed": speed,
        "memory": share,
        "asked": ASKED_SPEED[name],
        "reached": speed >= ASKED_SPEED[name],
    }


def rollout_contest(config):
    """Seconds of one batch of answers, ours and transformers'."""
    with tempfile.TemporaryDirectory() as folder:
        where, tok, shape, prompts = endless_checkpoint(config, folder)
        prompts = [chat.encode_prompt(tok, p) for p in prompts[: config.samples]]
        found = turns_of({"feinschliff": our_rollout, "transformers": their_rollout}, config, where, prompts)
    ours, theirs = found.values()
    if any(n != config.new for row in found.values() for call in row["lengths"] for n in call):
        raise UserError("an answer ended early, so times would compare different things")
    same = np.mean([a == b for one, other in zip(ours["greedy"], theirs["greedy"]) for a, b in zip(one, other)])
    if same < 0.95:  # rounding may turn one, and then what follows it
        raise UserError(f"only {same:.0%} of the greedy tokens are the same, so times would compare different things")
    lengths = [len(p) for p in prompts]
    what = (
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {config.new} new tokens "
        f"each; {same:.1%} of greedy tokens the same"
    )
    return compare("rollout", found, config, shape, len(prompts) * config.new, what) | {"same": same}


# --------------------------------------------------------------------------------------------------
# GRPO


def vowels(prompt, completion, row):
    """The reward: the share of vowels in an answer."""
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))


def our_grpo(config, folder, prompts):
    """grpo.py itself; its log has the seconds."""
    with tempfile.TemporaryDirectory() as out:
        data = Path(out) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
        flags = grpo.Config(
            init=str(folder),
            data=str(data),
            val=str(data),
            eval_prompts=1,
            reward=f"{__file__}:vowels",
            out=f"{out}/run",
            group_size=config.group,
            prompts_per_step=config.samples // config.group,
            steps=config.steps,
            max_new_tokens=config.new,
            lr=config.lr,
            warmup=0.0,
            decay=1.0,
            max_grad_norm=CLIP,
            eval_every=0,
            save_every=0,
            device=config.device,
        )
        held = memory(setup(config.device, 0))
        with contextlib.redirect_stdout(io.StringIO()):
            grpo.main(flags)
        log = [
            row for row in map(json.loads, (Path(out) / "run/log.jsonl").read_text().splitlines()) if "seconds" in row
        ]
    phases = {name: min(row[f"seconds_{name}"] for row in log[1:]) for name in ("rollout", "scoring", "update")}
    return of_steps(
        [row["seconds"] for row in log],
        [row["completion_tokens"] for row in log],
        log[0],
        held,
        torch.device(config.device),
        "torch",
    ) | {"phases": phases}


def trl_grpo(config, folder, prompts):
    """TRL's trainer; its log has lengths and entropy, a callback the seconds."""
    quiet()
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars(), transformers.utils.logging.disable_progress_bar()
    device = torch.device(config.device)
    model, tok = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    held, ticks = memory(device), []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *rest, **more):
            ticks.append(clock(device))

        on_step_end = on_train_begin

    def reward(completions, **columns):
        return [vowels("", said[0]["content"], {}) for said in completions]

    with tempfile.TemporaryDirectory() as out:
        flags = GRPOConfig(
            out,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            gradient_checkpointing=False,
            per_device_train_batch_size=config.samples,
            num_generations=config.group,
            max_completion_length=config.new,
            max_steps=config.steps,
            beta=0.0,
            num_iterations=1,
            temperature=1.0,
            learning_rate=config.lr,
            lr_scheduler_type="linear",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=0.0,
            max_grad_norm=CLIP,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=reward,
            args=flags,
            train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in prompts]),
            processing_class=tok,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
        log = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    return of_steps(
        np.diff(ticks).tolist(),
        [row["completions/mean_length"] for row in log],
        log[0],
        held,
        device,
        "trl",
        "transformers",
        "torch",
    )


def of_steps(seconds, lengths, first, held, device, *packages):
    """A result of training steps: seconds of the fastest but the first; first: the log of that
    one."""
    found = result(min(seconds[1:]), [lengths], [], memory(device, peak=True), held, *packages)
    return found | {"seconds_of_steps": seconds, "entropy": first["entropy"], "reward": first["reward"]}


def grpo_contest(config):
    """Seconds of a step, ours and TRL's."""
    if config.samples % config.group or config.steps < 2:
        raise UserError(
            f"--samples={config.samples}: must be a multiple of --group={config.group}, and --steps at least 2"
        )
    with tempfile.TemporaryDirectory() as folder:
        where, tok, shape, prompts = endless_checkpoint(config, folder)
        prompts = prompts[: config.samples // config.group * config.steps]  # each of them once
        found = turns_of({"feinschliff": our_grpo, "TRL": trl_grpo}, config, where, prompts)
    ours, theirs = found.values()
    if any(abs(n - config.new) > 1e-6 for row in found.values() for run in row["lengths"] for n in run):
        raise UserError("an answer ended early, so times would compare different things")
    if abs(ours["entropy"] - theirs["entropy"]) > 0.03 + 10 / (config.samples * config.new) ** 0.5:
        raise UserError(
            f"the first answers have {ours['entropy']:.3f} nats a token here and "
            f"{theirs['entropy']:.3f} there: they are not of one model"
        )
    what = (
        f"{config.steps - 1} steps after the first, of {config.samples} answers ({config.group} to a "
        f"prompt) of {config.new} tokens; entropy at first {ours['entropy']:.3f} and "
        f"{theirs['entropy']:.3f}, reward {ours['reward']:.4f} and {theirs['reward']:.4f}"
    )
    compared = compare("grpo", found, config, shape, config.samples * config.new, what)
    print("of ours: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in ours["phases"].items()))
    return compared


NEEDED = {
    "dpo": ["trl", "transformers", "datasets"],
    "rollout": ["transformers"],
    "grpo": ["trl", "transformers", "datasets"],
}
CONTESTS = {"dpo": dpo_contest, "rollout": rollout_contest, "grpo": grpo_contest}


def main(config):
    names = config.only.split(",") if config.only else list(CONTESTS)
    for name in names:
        if name not in CONTESTS:
            raise UserError(f"--only={config.only}: expected some of {', '.join(CONTESTS)}")
        for package in NEEDED[name]:
            if not importlib.util.find_spec(package):
                raise UserError(
                    f"{package} is not installed, which {name} is compared with: pip install "
                    f'{package}, or the extra "peers"'
                )
    device = setup(config.device, 0)
    config.device = str(device)
    print(describe(device), flush=True)
    print(json.dumps({name: CONTESTS[name](config) for name in names} | {"asked": ASKED}))


if __name__ == "__main__":
    launch(main, Config)
