"""A training run on disk: its directory, lock, log and checkpoints; how it starts, stops and
resumes.

The same for every stage, so that every stage resumes exactly:

    run = Run("dpo", config)
    model, tok = run.load()
    ...
    run.begin(steps, model, data=hashes, saved={"optimizer": optimizer, "order": order})
    for step in run.steps():
        ...
        run.log(step, model, lengths, loss=loss)
        run.end_step(step, model, tok)
"""

import dataclasses
import datetime
import json
import math
import re
import shlex
import shutil
import sys
import time
from itertools import compress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from data import template
from data.pack import pack_chats
from runtime import checkpoint, hub
from runtime.checkpoint import ADVICE
from runtime.cli import check_ranges, print0, read_flags
from runtime.errors import UserError
from runtime.files import append, flush, json_lines, lock_file, replace_text
from runtime.process import (
    Stop,
    describe,
    peak_flops,
    random_state,
    rank,
    reduce_max,
    reduce_sum,
    set_random_state,
    setup,
    world_size,
)
from runtime.shard import full_tensor, unsharded

FITTED_WIDTH = 128  # of the models on which the default learning rates were found
FORMAT = 2  # of what a run resumes from; the first version of Feinschliff wrote none
# What log.jsonl has of a rollout's step and the terminal does not
LOG_ONLY = {"finished", "completion_tokens", "entropy", "updates", "clip_fraction", "ratio", "max_ratio"}
LOG_ONLY |= {"all_right", "all_wrong", "all_cut", "pass_at_1", "pass_at_k", "explained_variance", "prompts_seen"}
LOG_ONLY |= {"sampler_gap", "beta", "lr", "grad_norm", "critic_grad_norm"}
KILLED_SAVE = r"\.tmp_step_[0-9]+"
WARNED = []  # names of the warnings that were printed in this run; a resumed one has them, too
RUN_FILES = r"log\.jsonl|samples\.txt|latest|best|step_[0-9]+|nonfinite_step_[0-9]+\.safetensors|" + KILLED_SAVE


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """The flags of every run; a stage's Config extends it."""

    # -- What you will set --
    # directory of the run [may change on resume]
    out: str
    # -- What you may set --
    # continue from the newest checkpoint in --out [may change on resume]
    resume: bool = False
    # replace the run in --out [may change on resume]
    overwrite: bool = False
    # tokens a rank holds at once: memory depends on it, the result does not [>= 1; may change on
    # resume]
    micro_batch_tokens: int = 16384
    # keep only the input of each block and compute the block again in the backward: less memory,
    # more time, the same result [may change on resume]
    checkpoint_activations: bool = False
    # -- What you will rarely set --
    # seed of everything random: the order of the data, what is held out, samples, fresh weights
    seed: int = 0
    # auto, cpu, cuda, cuda:1, mps [may change on resume]
    device: str = "auto"
    # gradients with a larger norm are scaled down to it; 0: never [>= 0]
    max_grad_norm: float = 1.0
    # steps between lines on the terminal; log.jsonl has every step [>= 1; may change on resume]
    print_every: int = 1
    # steps between validations; 0: only at the end [may change on resume]
    eval_every: int = 50
    # steps between checkpoints; 0: only at the end [may change on resume]
    save_every: int = 500
    # checkpoints kept, besides the best [>= 1; may change on resume]
    keep_last: int = 2


@dataclasses.dataclass(kw_only=True)
class RolloutConfig(RunConfig):
    """The flags of a stage that learns from completions it samples; ppo.py and grpo.py extend
    it."""

    # -- What you will set --
    # checkpoint the policy starts from: a run of sft.py, or of a stage after it
    init: str
    # what to maximise, comma-separated, with or without *WEIGHT: a reward model, FILE.py:FUNCTION,
    # judge:DIR
    reward: str
    # prompts {"prompt", ...}, problems {"prompt", "answer"}, or conversations, whose last answer is
    # left out
    data: str
    # -- What you may set --
    # prompts per step, over all ranks [>= 1; <= 1000000]
    prompts_per_step: int = 16
    # completions of each prompt [>= 1; <= 1000000]
    group_size: int = 1
    # longest completion, in tokens [>= 1]
    max_new_tokens: int = 256
    # KL per token to the policy that sampled, beyond which a step's updates end; 0: never [>= 0]
    stop_kl: float = 0.1
    # peak learning rate of the policy's AdamW; 0: ppo 6e-4 (128 / width)^2, grpo half of that,
    # fitted on the embedded world at width 128 and extrapolated to others [>= 0]
    lr: float = 0.0
    # checkpoint the policy is held to; "": --init
    reference: str = ""
    # for judge:DIR: a file of principles, one a line
    constitution: str = ""
    # rewards that are only logged, written as --reward is [may change on resume]
    monitor: str = ""
    # prompts to validate on; "": hold out some of --data
    val: str = ""
    # share of --data to hold out [> 0; < 1]
    val_fraction: float = 0.05
    # held-out prompts to complete at a validation [>= 1]
    eval_prompts: int = 128
    # drop bad lines of the data, and count them
    skip_bad: bool = False
    # -- What you will rarely set --
    # temperature of sampling, and so of every log-probability [> 0]
    temperature: float = 1.0
    # seconds that a FUNCTION may take over one completion [> 0; may change on resume]
    reward_timeout: float = 60.0
    # share of the steps over which the learning rate rises [>= 0; <= 1]
    warmup: float = 0.05
    save_every: int = 50

    @property
    def completions_per_step(self):
        return self.prompts_per_step * self.group_size


class Run:
    """stage: the script's name for itself. config: its flags, of which out, init, resume,
    overwrite, seed, device, print_every, eval_every, save_every, keep_last and
    checkpoint_activations are read here."""

    def __init__(self, stage, config):
        check_ranges(config)
        self.stage, self.config = stage, config
        if stage != "pretrain" and not config.init:
            raise UserError("--init: name the checkpoint to start from")
        self.device = setup(config.device, config.seed)
        if isinstance(config, RolloutConfig) and config.prompts_per_step < world_size():
            raise UserError(
                f"--prompts_per_step={config.prompts_per_step}: fewer than there are ranks ({world_size()})"
            )
        self.path = open_run(config.out, config.resume, config.overwrite).absolute()
        self.stop = Stop()
        self.resumed = None  # the checkpoint that this run continues from
        if config.resume and checkpoint.steps_in(self.path):
            self.resumed = checkpoint.find(self.path)
        self.folder = self.resumed  # where weights and tokenizer come from; None: from nothing
        if config.init and not self.resumed:
            self.folder = checkpoint.find(config.init)
        self.info = checkpoint.read_info(self.folder) if self.folder else {}
        if self.resumed:
            if self.info.get("format") != FORMAT:
                raise UserError(
                    f"--resume: {self.resumed} was written by another version of Feinschliff, whose runs cannot be "
                    f"continued; start a new run with --init={self.resumed} and another --out"
                )
            checkpoint.check_same_run(self.info, stage, config)
        self.started = (self.resumed and self.info.get("started")) or agreed_time()
        template.fix_time(self.started)
        self.start, self.best, self.metrics = 0, math.inf, {}
        self.asked_at = 0  # the last step at which the ranks agreed whether to stop
        self.warnings = WARNED
        WARNED.clear()
        self.first_step_stats = {}  # what later steps are compared with: see warn_of_drift
        self.streaks = {}  # {warning: times in a row that there was reason for it}: see warn_if_it_lasts
        self.last_reward = None  # the smallest of the step before: see warn_of_rewards

    @property
    def init_checkpoint(self):
        """The checkpoint this run began from; --init may be a run that has been continued since."""
        if not self.resumed:
            return self.folder
        parent = self.info["lineage"][-1]
        folder = checkpoint.find(parent["path"])
        if parent["weights"] not in ("sharded", checkpoint.weights_hash(folder)):
            raise UserError(
                f"{folder}: not the weights this run began from (their SHA-256 differs); bring those back, or start "
                "another run in a new --out"
            )
        return folder

    def load(self, device=None):
        """(model, tokenizer) of the checkpoint to resume or of --init, on the run's device by
        default.

        Raises UserError if it is a reward model, which writes nothing.
        """
        model, tok, _ = checkpoint.read(self.folder, device or self.device)
        if model.config.scalar_head:
            raise UserError(
                f"--init={self.config.init}: a reward model, which has no output head and writes nothing; start from "
                "the model it was trained from"
            )
        model.checkpoint_activations = self.config.checkpoint_activations
        return model, tok

    def load_reference(self, model, tok):
        """The frozen model that the policy is held to: as the run has renewed it, or --reference,
        or the checkpoint this run began from."""
        where = self.config.reference or self.init_checkpoint
        if self.resumed and (self.resumed / "reference").exists():
            where = self.resumed / "reference"
        reference = checkpoint.load_matching(where, model, tok, f"--reference={self.config.reference}")
        return reference.requires_grad_(False)

    def context(self, model):
        """The longest document in tokens: --context, or all that the model reaches if that is 0."""
        if self.config.context > model.config.context:
            raise UserError(
                f"--context={self.config.context}: the model of --init={self.config.init} reaches "
                f"{model.config.context} tokens"
            )
        return self.config.context or model.config.context

    def begin(self, steps, model, *, data, saved):
        """Restore the state of a stopped run, open the log, and write its first line.

        data: {what is read: SHA-256}; a resumed run must read the same. saved: {name: object with
        state() and load_state()}; state() returns {key: tensor, number, bool, None or list of
        numbers}."""
        self.total_steps, self.data, self.saved = steps, data, saved
        self.lineage = []
        hub.check_parameters(model)
        if self.resumed:
            checkpoint.check_same_data(self.info, data)
            self.restore()
        elif self.folder:
            self.lineage = self.info.get("lineage", []) + [checkpoint.parent_record(self.folder, self.info)]
        if reduce_sum(self.start)[0] != self.start * world_size():
            raise UserError(
                f"--out={self.path}: the processes of this run find different checkpoints there; on several machines "
                "it must be a directory that they share"
            )
        clear_run(self.path, self.config.overwrite)
        self.log_file = Log(self.path, steps, self.start, self.config.print_every, peak_flops(self.device))
        event = {"event": "resume" if self.resumed else "start", "config": dataclasses.asdict(self.config)}
        event |= {"parameters": sum(p.numel() for p in model.parameters()), **describe(self.device)}
        self.log_file.write(event)
        self.say_what_begins(model.config, event)

    def say_what_begins(self, c, event):
        """Print what is trained, on what, and from where on. event: the first line of the log."""
        shape = f"{c.layers} layers, width {c.width}, {c.heads} heads of {c.head_dim}, vocabulary {c.vocab_size}"
        print0(f"{event['parameters']:,} parameters: {shape}; on {event['hardware']}")
        if self.stage != "pretrain" and not self.config.lr and c.width != FITTED_WIDTH:
            print0(
                f"--lr is left out: its default was fitted at width {FITTED_WIDTH} (1M parameters) and extrapolated to "
                f"width {c.width}; try half and twice of it"
            )
        if self.config.resume and not self.resumed:
            print0("no checkpoint is here yet: starting from the beginning")
        if self.resumed:
            print0(f"continuing after step {self.start}")
        if self.start >= self.total_steps:
            larger = read_flags(type(self.config))["steps"].may_change_on_resume
            print0("nothing is left to do" + ("; a larger --steps continues" if larger else ""))

    def say_passes(self, n_prompts, steps, lr):
        """Print how often PPO or GRPO passes over its prompts."""
        at_once = self.config.prompts_per_step
        passes = steps * at_once / n_prompts
        print0(f"{n_prompts:,} prompts; {steps} steps of {at_once}: {passes:.3g} passes; peak lr {lr:.3g}")

    def warn_of_other_steps(self, default_steps, schedule):
        """Say what becomes of the learning rate if a run is resumed with another number of steps.

        default_steps: what --steps=0 means; schedule(step, steps, config): the share of the peak.
        """
        if not self.resumed or self.start >= self.total_steps:
            return
        old_steps = self.info["config"]["steps"] or default_steps
        if self.total_steps != old_steps:
            before = schedule(self.start, old_steps, self.config)
            after = schedule(self.start + 1, self.total_steps, self.config)
            print0(
                f"warning: --steps was {old_steps} and is {self.total_steps}: the learning rate goes from {before:.0%} "
                f"of its peak at step {self.start} to {after:.0%} at the next; what follows is not what a run of "
                f"{self.total_steps} steps without a stop would have done"
            )

    def restore(self):
        """Take back what `save` wrote: the state of every saved object, the random generators, the
        step."""
        tensors, counters = checkpoint.load_state(self.resumed)
        try:
            for name, saved in self.saved.items():
                own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
                saved.load_state(own | counters.get(name, {}))
            set_random_state(tensors, self.device)
            self.best, self.warnings[:] = float(counters["best"]), list(counters["warnings"])
            self.first_step_stats = dict(counters["first_step_stats"])
            self.streaks, self.last_reward = dict(counters.get("streaks", {})), counters.get("last_reward")
            self.start, self.lineage = self.info["step"], self.info["lineage"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(
                f"{self.resumed}: its train_state is damaged, or not of this model ({e}); take another checkpoint "
                "with --init"
            ) from None

    def steps(self):
        """Yield the numbers of the steps to do, from 1; what follows a step's log line is not
        timed."""
        for step in range(self.start + 1, self.total_steps + 1):
            self.log_file.restart_clock()
            yield step

    def due(self, step, every):
        """True at every `every`-th step (0: none) and at the last."""
        return step == self.total_steps or bool(every and step % every == 0)

    def save_due(self, step):
        """True if this step ends in a checkpoint: one is due, or some rank was asked to stop.

        The ranks agree on that once a step: a signal that comes later waits for the next.
        """
        if self.asked_at != step:
            self.asked_at = step
            self.stop.agreed()
        return self.due(step, self.config.save_every) or self.stop.leaving

    def eval_due(self, step):
        """True if a validation is due: at every --eval_every-th step, and before a checkpoint."""
        return self.due(step, self.config.eval_every) or self.due(step, self.config.save_every)

    def log(self, step, model, lengths, **printed):
        """Log a step on documents of these lengths, on all ranks; see Log.step."""
        self.log_file.step(step, round(np.sum(lengths)), model.flops_per_token(int(np.mean(lengths))), **printed)

    def log_rollout(self, step, model, chats, passes, metrics):
        """Log a step on this rank's completions `chats`, and warn of what its metrics show.

        metrics: those of `rollout_metrics` and, at least, "loss", "grad_norm", "updates" and
        "clip_fraction". passes: how often they went through a model, forward and backward counted
        as 1, forward alone as 1/3; a number, or one for each of them."""
        lengths = np.array([len(c.ids) for c in chats])
        tokens, passed, n = reduce_sum(lengths.sum(), (lengths * passes).sum(), len(chats))
        flops_per_token = model.flops_per_token(int(tokens / max(1, n))) * passed / max(1, tokens)
        log_only = {name: value for name, value in metrics.items() if name in LOG_ONLY}
        printed = {name: value for name, value in metrics.items() if name not in LOG_ONLY}
        self.log_file.step(step, int(tokens), flops_per_token, log_only, **printed)
        self.warn_of_drift(step, metrics)
        self.warn_of_standstill(metrics)

    def time_phase(self, name):
        """Count the time since the step began, or since the last call, as `seconds_name` in its log
        line."""
        self.log_file.time_phase(name)

    def warn_if_it_lasts(self, name, holds, text):
        """Print the warning `name`, once, if `holds` is true ten times in a row, in a short run for
        a third of it and three times at least: a single step may be an odd one. Steps that cannot
        be judged do not call this."""
        self.streaks[name] = self.streaks.get(name, 0) + 1 if holds else 0
        if self.streaks[name] >= min(10, max(3, self.total_steps // 3), self.total_steps):
            often = f"{self.streaks[name]} times in a row " if self.streaks[name] > 1 else ""
            self.warn_once(name, often + text)

    def mean_of_first(self, name, step, value):
        """The mean of a metric over the first steps: as many as have 16 prompts, for fewer say
        little."""
        mean = self.first_step_stats.setdefault(name, value)
        if (step - 1) * self.config.prompts_per_step < 16:
            self.first_step_stats[name] += (value - mean) / step
        return self.first_step_stats[name]

    def warn_of_drift(self, step, metrics):
        """Warn, once each, if sampled completions have no end, end less often or are twice as long
        as in the first steps, or if their entropy is below a tenth of those steps'."""
        finished, tokens, entropy = (metrics[name] for name in ("finished", "completion_tokens", "entropy"))
        first = self.mean_of_first("entropy", step, entropy)
        self.warn_if_it_lasts(
            "entropy",
            entropy < first / 10,
            f"entropy was below a tenth of the first steps' ({entropy:.3g} of {first:.3g} nats per token): the policy "
            "says almost always the same, and can learn little more; a lower --lr or a higher --beta keeps variety",
        )
        first = self.mean_of_first("finished", step, finished)
        first_tokens = self.mean_of_first("completion_tokens", step, tokens)
        self.warn_if_it_lasts(
            "drift",
            finished < first - 0.2 or tokens > 2 * first_tokens,
            f"fewer completions end than at first, or they are twice as long: now {finished:.0%} of the completions "
            f"end, after {tokens:.0f} tokens; at first it was {first:.0%} after {first_tokens:.0f}. Longer ones may be "
            "what the reward likes: look at samples.txt; a larger --max_new_tokens or a reward for brevity may help",
        )
        self.warn_of_cut(finished)

    def warn_of_cut(self, finished):
        """Warn, once, if the limit cuts more than half of the sampled completions."""
        if finished < 0.5:
            self.warn_once(
                "cut",
                f"--max_new_tokens={self.config.max_new_tokens} cuts {1 - finished:.0%} of the completions before "
                "their end, which is then never seen; raise it, or fine-tune on answers that end in time",
            )

    def warn_of_standstill(self, metrics):
        """Warn, once each, if steps make no update, if updates move nothing, or if the loss is 0
        although the policy learns."""
        reason = "no completion is left to learn from; see --stop_kl, and in grpo.py --overlong"
        if metrics["entropy"] < 0.01 and metrics.get("zero_variance") == 1:
            reason = (
                f"the policy is all but certain of what it says (entropy {metrics['entropy']:.2g}); begin with one "
                "that varies, and keep its variety by a lower --lr, a higher --beta or a higher --temperature"
            )
        elif metrics.get("all_cut", 0) > 0.5:
            reason = (
                f"--max_new_tokens={self.config.max_new_tokens} cuts every completion of {metrics['all_cut']:.0%} of "
                "the prompts; raise it, or fine-tune on answers that end in time"
            )
        elif metrics.get("zero_variance") == 1:
            reason = (
                "the completions of every prompt get the same reward "
                f"({metrics['all_right']:.0%} of the groups are all above 0, {metrics['all_wrong']:.0%} all at "
                "most 0); bring easier or harder prompts, a reward with more shades, or a larger --group_size"
            )
        self.warn_if_it_lasts("standstill", not metrics["updates"], f"a step made no update: {reason}")
        if not metrics["updates"]:
            return
        # What is clipped has no gradient, and moves on with the next completions
        still = metrics["grad_norm"] < 1e-8 and not metrics["clip_fraction"]
        self.warn_if_it_lasts(
            "tiny_gradient",
            still,
            f"the gradient's norm was below 1e-8 (now {metrics['grad_norm']:.2g}): AdamW, whose epsilon is 1e-10, "
            "hardly moves the weights: if entropy is near 0, the policy is all but certain of what it says, so begin "
            "with one that varies; else, where --advantage keeps the rewards' scale, give them a larger one "
            "(--reward=NAME*1000)",
        )
        if abs(metrics["loss"]) < 1e-6 and not still and not self.streaks.get("small_rewards"):
            self.warn_once(
                "zero_loss",
                "the loss is 0 and the policy learns: before its first update every ratio is 1, and the advantages "
                "add up to 0, but their gradient does not; watch the reward and grad_norm",
            )

    def warn_of_advantages(self, advantages):
        """Warn, once, if GRPO's advantages, fp32 [M], are nothing beside its KL: the policy goes to
        where -A d + beta d^2 / 2 is least, d = log pi - log pi_ref, and that is d = A / beta."""
        largest = advantages.abs().max().item() if len(advantages) else 0.0
        size, beta = reduce_max(largest), self.config.beta
        if size > 0:
            self.warn_if_it_lasts(
                "small_rewards",
                size < 1e-3 * beta,
                f"the advantages of a step were nothing beside --beta={beta:g} (now at most {size:.3g}): the policy "
                "hardly follows the reward; give it a larger scale (--reward=NAME*1000), or lower --beta",
            )

    def warn_of_rewards(self, rewards, kl_penalties, values):
        """Warn, once each, of what PPO can hardly learn from. rewards, kl_penalties: what the
        reward says of each completion of this rank, and beta times its KL; values: the critic's."""
        smallest, largest = extremes(rewards)
        spread, size = largest - smallest, max(-smallest, largest)
        rounding = 1e-12 * max(size, self.config.unfinished_penalty)  # taken off and put back
        before = smallest if self.last_reward is None else self.last_reward
        self.last_reward = smallest
        self.warn_if_it_lasts(
            "equal_rewards",
            max(spread, abs(smallest - before)) <= rounding,
            f"the reward of every completion was {smallest:.3g}, which teaches nothing; bring other prompts, or a "
            "reward with more shades",
        )
        if spread <= rounding:
            return
        self.warn_if_it_lasts(
            "offset",
            spread < 1e-4 * size,
            f"the rewards of a step were large and differed by little (now {size:.3g} in size, {spread:.3g} apart), "
            "which PPO hardly sees: its critic learns their size first; subtract a constant in the reward, so that "
            "they lie around 0",
        )
        kl, value = (high - low for low, high in (extremes(kl_penalties), extremes(values)))
        self.warn_if_it_lasts(
            "small_rewards",
            1e-4 * size <= spread < 1e-3 * max(kl, value),
            f"the rewards of a step differed by little (now {spread:.3g}; --beta times the KL by {kl:.3g}, the "
            f"critic's values by {value:.3g}): the policy hardly follows the reward; give it a larger scale "
            "(--reward=NAME*1000)",
        )

    def sample(self, step, text):
        """Append a sample of the model's text to samples.txt."""
        self.log_file.append("samples.txt", f"=== step {step} ===\n{text}\n")

    def validated(self, step, metrics, sample="", text=""):
        """Log and print what a validation found: `metrics`, with "val_loss"; the next save has
        them.

        sample: of the model's text, for samples.txt. text: how to print the metrics; "": each by
        its name. Raises UserError if the loss is not finite.
        """
        if not math.isfinite(metrics["val_loss"]):
            raise UserError(
                f"step {step}: the validation loss is {metrics['val_loss']}; these weights are not saved. {ADVICE}"
            )
        self.metrics = metrics
        self.log_file.write({"step": step, **metrics})
        text = text or ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print0(f"step {step}/{self.total_steps} | validation {text}")
        if sample:
            self.sample(step, sample)

    def warn_once(self, name, text):
        """Print the warning `name`, the first time in this run only."""
        if name not in self.warnings:
            self.warnings.append(name)
            print0(f"warning: {text}")

    def require_finite(self, step, loss, norms, chats, **tensors):
        """End the run if a gradient norm is not finite; the weights are those of the step before.

        The batch (chats, and what else is given) is kept in a file, and the UserError names it.
        """
        if all(norm.isfinite() for norm in norms):
            return
        path = self.path / f"nonfinite_step_{step:06d}.safetensors"
        where = f"the batch is in {path}" if chats or rank() else "the first process had no part of the batch"
        if rank() == 0 and chats:
            pack, targets = pack_chats(chats)
            batch = {"tokens": pack.tokens, "cu_seqlens": pack.cu_seqlens, "targets": targets, **tensors}
            try:
                safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in batch.items()}, path)
            except (OSError, safetensors.SafetensorError) as e:
                where = f"the batch could not be saved ({e})"
        raise UserError(f"step {step}: the loss is {loss:.4g} and its gradient is not finite; {where}. {ADVICE}")

    def end_step(self, step, model, tok, models=None, **info):
        """Save if a checkpoint is due or the run was asked to stop; then leave if it was.

        models: {name: model} saved within the checkpoint (PPO's critic); info: fields of
        feinschliff.json."""
        if self.save_due(step):
            self.save(step, model, tok, models or {}, info)
        self.metrics = {}
        if step == self.total_steps:
            self.say_what_next()
        elif self.stop.leaving:
            self.stop.leave(step)

    def say_what_next(self):
        """Print where the result is, and what to type next."""
        out, use = shlex.quote(self.config.out), "sample.py --model="
        if self.stage == "reward":
            use = f"ppo.py --init={shlex.quote(self.config.init)} --data=prompts.jsonl --out=out/ppo --reward="
        seconds = clock_time(time.perf_counter() - self.log_file.began)
        print0(f"finished in {seconds}: {out}; its curves: python report.py {out}; next: python {use}{out}")

    def save(self, step, model, tok, models, info):
        """Save a checkpoint; the best so far by val_loss is kept next to the newest.

        A failed write costs this checkpoint, not the run, unless it is the last one.
        """
        refuse_nonfinite_weights(step, [model, *models.values()])
        best_before = self.best
        self.best = min(self.best, self.metrics.get("val_loss", self.best))
        state = self.collect_state()
        model = unsharded(model, "cpu", keep=rank() == 0)
        failure = ""
        if rank() == 0:
            info = {"format": FORMAT, "stage": self.stage, "step": step, "total_steps": self.total_steps, **info}
            info["started"] = self.started
            info |= {"config": dataclasses.asdict(self.config), "data": self.data, "metrics": self.metrics}
            info |= {"lineage": self.lineage, "code": checkpoint.code_hash(), **describe(self.device)}
            try:
                self.log_file.sync()
                is_best = self.best < best_before
                checkpoint.save(self.path, model, tok, info, state, self.config.keep_last, is_best, models)
            except UserError as e:
                failure = str(e)
        # All ranks wait here: none may end, and have torchrun end the others, while rank 0 writes.
        if reduce_sum(bool(failure))[0]:
            self.best = best_before
            if step == self.total_steps or self.stop.leaving:
                raise UserError(failure or "rank 0 could not save")
            if failure:
                print0(f"warning: {failure}\nwarning: training continues; the next save may work", file=sys.stderr)

    def collect_state(self):
        """(tensors, counters) of all saved objects and generators, on the CPU; counters are JSON
        values."""
        tensors, counters = random_state(self.device), {"best": self.best, "warnings": self.warnings}
        counters |= {"first_step_stats": self.first_step_stats, "streaks": self.streaks}
        counters |= {"last_reward": self.last_reward}
        for name, saved in self.saved.items():
            for key, value in saved.state().items():
                if isinstance(value, torch.Tensor):
                    value = full_tensor(value)  # one at a time: sharded state may not fit on one GPU
                    if rank() == 0:
                        tensors[f"{name}/{key}"] = value.cpu()
                else:
                    counters.setdefault(name, {})[key] = value
        return tensors, counters


def rollout_metrics(completions, n_trained, logp, ref_logp, **values):
    """What a step of PPO or GRPO logs of its completions: {name: mean over all ranks}.

    logp, ref_logp: fp32 [M], of the trained tokens of `n_trained` completions; values: a number of
    each completion, {name: list}. "entropy" is per token drawn; "kl" per trained completion, and
    left out if ref_logp is None."""
    found, parts = {"reward": [c.score for c in completions]}, completions[0].parts
    if len(parts) > 1:  # one alone would repeat the reward
        # A directory may be called as a column is, "reward" or "kl": ./reward is it as well
        columns = {name: name if re.search("[/:]", name) else f"./{name}" for name in parts}
        found |= {column: [c.parts[name] for c in completions] for name, column in columns.items()}
    samples = [c.sample for c in completions]
    found |= values | {"finished": [s.finished for s in samples]}
    found["completion_tokens"] = [len(s.tokens) for s in samples]
    kl = 0.0 if ref_logp is None else (logp - ref_logp).sum()
    drawn = np.array([logprob for s in samples for logprob in compress(s.logprobs, s.loss_mask)])
    counts = len(samples), n_trained, len(drawn)
    n, n_trained, n_drawn, entropy, kl, *totals = reduce_sum(*counts, -drawn.sum(), kl, *map(sum, found.values()))
    means = {name: total / n for name, total in zip(found, totals, strict=True)}
    if ref_logp is not None:
        means["kl"] = kl / max(1, n_trained)
    return means | {"entropy": entropy / max(1, n_drawn) + 0.0}  # not -0.0


def extremes(numbers):
    """(smallest, largest) of all ranks' numbers."""
    return -reduce_max(-min(numbers)), reduce_max(max(numbers))


def mean_updates(updates, names):
    """{"updates": their number, name: its mean over the updates of a step; 0 if there were
    none}."""
    means = {name: sum(stats[name] for stats in updates) / max(1, len(updates)) for name in names}
    return means | {"updates": len(updates)}


def agreed_time():
    """When the run began by the clock of rank 0, in ISO format."""
    (seconds,) = reduce_sum(time.time() if rank() == 0 else 0.0)
    return datetime.datetime.fromtimestamp(seconds).isoformat()


def refuse_nonfinite_weights(step, models):
    """Raises UserError naming a parameter that is not finite: such weights must not become a
    checkpoint."""
    for model in models:
        for name, p in model.named_parameters():
            if not full_tensor(p.isfinite().all()):
                raise UserError(f"step {step}: {name} is no longer finite; these weights are not saved. {ADVICE}")


# --------------------------------------------------------------------------------------------------
# The run directory


def open_run(out, resume, overwrite):
    """Make `out` this run's directory, lock it against a second process, and return its Path.

    Raises UserError if it holds another run and neither `resume` nor `overwrite` was given, or
    another process is writing it. Nothing is deleted yet."""
    if not out:
        raise UserError("--out: name a directory for the run, for example --out=out/base")
    if resume and overwrite:
        raise UserError("--resume and --overwrite: choose one")
    path = Path(out)
    if rank() == 0:
        lock_file(path / ".lock", out)
        found = files_of_run(path)
        if found and not (resume or overwrite):
            raise UserError(
                f"--out={out}: a run is here already ({found[0].name}); --resume continues it, --overwrite replaces it"
            )
    return path


def files_of_run(path, pattern=RUN_FILES):
    """The files and folders in `path` whose whole name fits; others are the user's."""
    return sorted(p for p in path.iterdir() if re.fullmatch(pattern, p.name))


def clear_run(path, overwrite):
    """Delete what a killed save left; with `overwrite` all that an earlier run wrote, and nothing
    else.

    Called once the input is known to be good, so that a mistyped --data costs no run.
    """
    if rank() != 0:
        return
    try:
        for p in files_of_run(path, RUN_FILES if overwrite else KILLED_SAVE):
            if p.is_dir() and not p.is_symlink():
                shutil.rmtree(p)
            else:
                p.unlink()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


# --------------------------------------------------------------------------------------------------
# The log


class Log:
    """log.jsonl, one line a step, and samples.txt of a run; a line on the terminal at the first
    step and every `print_every` steps.

    A failed write loses nothing: the text waits in memory for the next one. Only rank 0 writes.
    """

    def __init__(self, path, total_steps, start, print_every=1, peak=None):
        self.path, self.total_steps, self.start, self.print_every = path, total_steps, start, print_every
        self.peak = peak  # FLOP/s of the device, if they are known
        self.files = {}  # {name: (bytes written, text that waits)}
        self.began = time.perf_counter()
        self.restart_clock()
        if rank() == 0:
            try:
                rewind_log(path / "log.jsonl", start)
                rewind_samples(path / "samples.txt", start)
            except OSError as e:
                raise UserError(f"{path}: {e.strerror}; the log was left as it is") from None

    def restart_clock(self):
        """Leave what happened since the last step (a validation, a save) out of the next step's
        speed."""
        self.clock = self.phase_clock = time.perf_counter()
        self.phases = {}  # {name: seconds} of this step

    def time_phase(self, name):
        now = time.perf_counter()
        self.phases[name] = self.phases.get(name, 0.0) + now - self.phase_clock
        self.phase_clock = now

    def step(self, step, tokens, flops_per_token, log_only=None, **printed):
        """Log update number `step` (from 1): its `tokens` (on all ranks), speed, MFU if the GPU's
        peak is known, time left, and the values `printed`; `log_only` ones do not go to the
        terminal."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record = {"step": step, **printed, **(log_only or {}), "tokens": tokens}
        record |= {f"seconds_{name}": round(phase, 4) for name, phase in self.phases.items()}
        record |= {"tokens_per_s": round(tokens / seconds, 1), "seconds": round(seconds, 4)}
        if self.peak:
            record["mfu"] = round(tokens * flops_per_token / seconds / (self.peak * world_size()), 4)
        self.write(record)
        if step % self.print_every == 0 or step in (self.start + 1, self.total_steps):  # the first tells how long
            left = (now - self.began) / (step - self.start) * (self.total_steps - step)
            values = [f"{k} {v:.4f}" if k == "loss" else f"{k} {v:.4g}" for k, v in printed.items()]
            values.append(f"{record['tokens_per_s']:,.0f} tok/s")
            if self.peak:
                values.append(f"mfu {record['mfu']:.1%}")
            print0(f"step {step}/{self.total_steps} | {' | '.join(values)} | eta {clock_time(left)}")

    def write(self, record):
        """Append one JSON object to log.jsonl."""
        self.append("log.jsonl", json_lines([record]))

    def append(self, name, text):
        """Append text to a file of the run. Returns why that failed, "" if it did not."""
        if rank() != 0:
            return ""
        path, failure = self.path / name, ""
        size, waiting = self.files.get(name) or (path.stat().st_size if path.exists() else 0, b"")
        waiting += text.encode("utf-8", "replace")
        try:
            size, waiting = append(path, waiting, size, sync=False), b""
        except OSError as e:
            failure = e.strerror
            print0(f"warning: {path}: {failure}; {len(waiting)} bytes wait in memory", file=sys.stderr)
        self.files[name] = size, waiting
        return failure

    def sync(self):
        """Flush what was written, and what waits, to the disk: a checkpoint must not know more than
        its log.

        Raises UserError if that fails.
        """
        for name in self.files:
            failure, path = self.append(name, ""), self.path / name
            try:
                flush(path)
            except OSError as e:
                failure = failure or e.strerror
            if failure:
                raise UserError(
                    f"{path}: {failure}; make room or give the directory back, then rerun with --resume to continue"
                )


def clock_time(seconds):
    """90 -> "1m30s"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def rewind_log(path, step):
    """Drop the lines of updates after `step`, which a resumed run makes again, and a half-written
    last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line.decode()).get("step", 0) <= step and line.endswith(b"\n"):
                kept.append(line)
        except (AttributeError, TypeError, ValueError, RecursionError):  # of another program, or half a line
            pass
    replace_text(path, b"".join(kept).decode())


def rewind_samples(path, step):
    """The same for samples.txt, whose entries begin with "=== step N ===" lines."""
    if not path.exists():
        return
    written = path.read_bytes()
    complete = written[: written.rfind(b"\n") + 1].decode("utf-8", "replace")
    entries = re.split(r"(?m)^(?==== step \d+ ===$)", complete)
    steps = [re.match(r"=== step (\d+) ===$", entry, re.MULTILINE) for entry in entries]
    replace_text(path, "".join(e for e, found in zip(entries, steps) if not found or int(found[1]) <= step))
