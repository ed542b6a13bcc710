"""A training run on disk: its directory, lock, log and checkpoints; how it starts, stops and
resumes.

The same for every stage, so that every stage resumes exactly:

    run = Run("dpo", config)
    model, tok = run.load()
    ...
    run.begin(steps, model, data=hashes, saved={"optimizer": optimizer, "order": order})
    for step in run.steps():
        ...
        run.log(step, tokens, flops, loss=loss)
        run.end_step(step, model, tok)
"""

import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

from data.pack import pack_chats
from runtime import checkpoint, hub
from runtime.checkpoint import ADVICE
from runtime.cli import check_ranges, print0, read_flags
from runtime.errors import UserError
from runtime.files import lock_file, replace_text
from runtime.process import (
    Stop,
    describe,
    peak_flops,
    random_state,
    rank,
    reduce_sum,
    set_random_state,
    setup,
    world_size,
)
from runtime.shard import full_tensor, unsharded

FORMAT = 2  # of what a run resumes from; the first version of Feinschliff wrote none
RUN_FILES = ("log.jsonl", "samples.txt", "latest", "best", "step_[0-9]*", ".tmp_step_*", "nonfinite_*")


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
    # of everything random: the order of the data, what is held out, samples, fresh weights [< 2e18]
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
    # prompts per step, over all ranks [>= 1]
    prompts_per_step: int = 16
    # completions of each prompt [>= 1]
    group_size: int = 1
    # longest completion, in tokens [>= 1]
    max_new_tokens: int = 256
    # KL per token to the policy that sampled, beyond which a step's updates end; 0: never [>= 0]
    stop_kl: float = 0.1
    # peak learning rate of the policy's AdamW; 0: ppo 6e-4 (128 / width)^2, grpo half of that [>=
    # 0]
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
    # of sampling, and so of every log-probability [> 0]
    temperature: float = 1.0
    # seconds that a FUNCTION may take over one completion [> 0; may change on resume]
    reward_timeout: float = 60.0
    # share of the steps over which the learning rate rises [>= 0; <= 1]
    warmup: float = 0.05
    save_every: int = 50


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
        self.path = open_run(config.out, config.resume, config.overwrite)
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
        self.start, self.best, self.metrics = 0, math.inf, {}
        self.asked_at = 0  # the last step at which the ranks agreed whether to stop
        self.warnings = []  # names of those that were printed
        self.first_step_stats = {}  # what later steps are compared with: see warn_of_drift

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
        """The frozen model that the policy is held to: --reference, or the checkpoint this run
        began from."""
        where = self.config.reference or self.init_checkpoint
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
        self.log_file = Log(self.path, steps, self.start, self.config.print_every)
        event = {"event": "resume" if self.resumed else "start", "config": dataclasses.asdict(self.config)}
        event["parameters"] = sum(p.numel() for p in model.parameters())
        self.log_file.write(event | describe(self.device))
        if self.config.resume and not self.resumed:
            print0("no checkpoint is here yet: starting from the beginning")
        if self.resumed:
            print0(f"continuing after step {self.start}")
        if self.start >= steps:
            larger = read_flags(type(self.config))["steps"].may_change_on_resume
            print0("nothing is left to do" + ("; a larger --steps continues" if larger else ""))

    def restore(self):
        """Take back what `save` wrote: the state of every saved object, the random generators, the
        step."""
        tensors, counters = checkpoint.load_state(self.resumed)
        try:
            for name, saved in self.saved.items():
                own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
                saved.load_state(own | counters.get(name, {}))
            set_random_state(tensors, self.device)
            self.best, self.warnings = float(counters["best"]), list(counters["warnings"])
            self.first_step_stats = dict(counters["first_step_stats"])
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

    def log(self, step, tokens, flops_per_token, log_only=None, **printed):
        """Log a step; see Log.step."""
        self.log_file.step(step, tokens, flops_per_token, self.device, log_only or {}, **printed)

    def log_rollout(self, step, model, chats, passes, log_only, **printed):
        """Log a step on this rank's completions `chats`, "finished" and "completion_tokens" among
        `log_only`.

        passes: how often they went through a model, forward and backward counted as 1, forward
        alone as 1/3."""
        tokens, n = reduce_sum(sum(len(c.ids) for c in chats), len(chats))
        flops_per_token = model.flops_per_token(int(tokens / max(1, n))) * passes
        self.log(step, int(tokens), flops_per_token, log_only, **printed)
        self.warn_of_drift(log_only["finished"], log_only["completion_tokens"])

    def time_phase(self, name):
        """Count the time since the step began, or since the last call, as `seconds_name` in its log
        line."""
        self.log_file.time_phase(name)

    def warn_of_drift(self, finished, completion_tokens):
        """Warn, once, if sampled completions end less often, or have become twice as long, as in
        the first step."""
        if not self.first_step_stats:
            self.first_step_stats = {"finished": finished, "completion_tokens": completion_tokens}
        first = self.first_step_stats
        if finished < first["finished"] - 0.2 or completion_tokens > 2 * first["completion_tokens"]:
            self.warn_once(
                "drift",
                f"{finished:.0%} of the completions end, after {completion_tokens:.0f} tokens; at first it was "
                f"{first['finished']:.0%} after {first['completion_tokens']:.0f}. Longer ones may be what the reward "
                "likes: look at samples.txt; a larger --max_new_tokens or a reward for brevity may help",
            )

    def sample(self, step, text):
        """Append a sample of the model's text to samples.txt."""
        self.log_file.append("samples.txt", f"=== step {step} ===\n{text}\n")

    def validated(self, step, metrics, text=""):
        """Log and print what a validation found: `metrics`, with "val_loss"; the next save has
        them.

        text: how to print them; "": each by its name. Raises UserError if the loss is not finite.
        """
        if not math.isfinite(metrics["val_loss"]):
            raise UserError(
                f"step {step}: the validation loss is {metrics['val_loss']}; these weights are not saved. {ADVICE}"
            )
        self.metrics = metrics
        self.log_file.write({"step": step, **metrics})
        text = text or ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print0(f"step {step}/{self.total_steps} | validation {text}")

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
        where = f"the batch is in {path}"
        if rank() == 0:
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
        if self.stop.leaving and step < self.total_steps:
            self.stop.leave(step)

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
        counters["first_step_stats"] = self.first_step_stats
        for name, saved in self.saved.items():
            for key, value in saved.state().items():
                if isinstance(value, torch.Tensor):
                    value = full_tensor(value)  # one at a time: sharded state may not fit on one GPU
                    if rank() == 0:
                        tensors[f"{name}/{key}"] = value.cpu()
                else:
                    counters.setdefault(name, {})[key] = value
        return tensors, counters


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
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock_file(path / ".lock", out)
            found = [p for pattern in RUN_FILES for p in path.glob(pattern)]
        except OSError as e:
            raise UserError(f"--out={out}: {e.strerror}") from None
        if found and not (resume or overwrite):
            raise UserError(
                f"--out={out}: a run is here already ({found[0].name}); --resume continues it, --overwrite replaces it"
            )
    return path


def clear_run(path, overwrite):
    """Delete what a killed save left; with `overwrite` all that an earlier run wrote, and nothing
    else.

    Called once the input is known to be good, so that a mistyped --data costs no run.
    """
    if rank() != 0:
        return
    try:
        for pattern in RUN_FILES if overwrite else (".tmp_step_*",):
            for p in path.glob(pattern):
                if p.is_dir() and not p.is_symlink():
                    shutil.rmtree(p)
                else:
                    p.unlink()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


# --------------------------------------------------------------------------------------------------
# The log


class Log:
    """log.jsonl, one line a step, and samples.txt of a run; a line on the terminal every
    `print_every` steps.

    A failed write loses nothing: the text waits in memory for the next one. Only rank 0 writes.
    """

    def __init__(self, path, total_steps, start, print_every=1):
        self.path, self.total_steps, self.start, self.print_every = path, total_steps, start, print_every
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

    def step(self, step, tokens, flops_per_token, device, log_only, **printed):
        """Log update number `step` (from 1): its `tokens` (on all ranks), speed, MFU if the GPU's
        peak is known, time left, and the values `printed`; `log_only` ones do not go to the
        terminal."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record = {"step": step, **printed, **log_only, "tokens": tokens}
        record |= {f"seconds_{name}": round(phase, 4) for name, phase in self.phases.items()}
        record |= {"tokens_per_s": round(tokens / seconds, 1), "seconds": round(seconds, 4)}
        peak = peak_flops(device)
        if peak:
            record["mfu"] = round(tokens * flops_per_token / seconds / (peak * world_size()), 4)
        self.write(record)
        if step % self.print_every == 0 or step == self.total_steps:
            left = (now - self.began) / (step - self.start) * (self.total_steps - step)
            values = [f"{k} {v:.4f}" if k == "loss" else f"{k} {v:.4g}" for k, v in printed.items()]
            values.append(f"{record['tokens_per_s']:,.0f} tok/s")
            if peak:
                values.append(f"mfu {record['mfu']:.1%}")
            print0(f"step {step}/{self.total_steps} | {' | '.join(values)} | eta {clock_time(left)}")

    def write(self, record):
        """Append one JSON object to log.jsonl."""
        self.append("log.jsonl", json.dumps(record, ensure_ascii=False) + "\n")

    def append(self, name, text):
        """Append text to a file of the run. Returns why that failed, "" if it did not."""
        if rank() != 0:
            return ""
        path, failure = self.path / name, ""
        size, waiting = self.files.get(name) or (path.stat().st_size if path.exists() else 0, b"")
        waiting += text.encode("utf-8", "replace")
        try:
            with open(path, "ab") as f:
                f.truncate(size)  # a disk that filled up may have taken half of what waits
                f.write(waiting)
            size, waiting = size + len(waiting), b""
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
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
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
            if json.loads(line).get("step", 0) <= step and line.endswith(b"\n"):
                kept.append(line)
        except ValueError:
            pass
    replace_text(path, b"".join(kept).decode())


def rewind_samples(path, step):
    """The same for samples.txt, whose entries begin with "=== step N ===" lines."""
    if not path.exists():
        return
    written = path.read_bytes()
    complete = written[: written.rfind(b"\n") + 1].decode("utf-8", "replace")
    entries = re.split(r"(?m)^(?==== step \d+ ===$)", complete)
    replace_text(path, "".join(e for e in entries if e and int(e.split()[2]) <= step))
