"""The memory plan: how much a run holds at its fullest, told before its first step; and if that
does not fit, the flag that makes it fit.

There is no formula that could fall behind the code. The stage's own model, loss, backward and
optimizer run at the sizes of the run on tensors that have a shape and no memory (PyTorch's fake
tensors), and every storage that an operation makes is counted while it lives. A phase counts what
lives in it; the run needs as much as its largest phase. A plan is true to 15 % (bench/memory.py).

Left out: what lies inside one operation of PyTorch's, allocator fragments, what torch.compile
saves, and the data, which are small next to the rest."""

import bisect
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import platform
import weakref
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import chat
from data.pack import Pack, make_completion
from kernels.head import linear_logprob
from model import GPT
from optim import Optimizer
from runtime.cli import print0
from runtime.errors import UserError
from runtime.process import world_size
from runtime.shard import is_sharded

TOLERANCE = 1.15  # a run is refused only if it needs more than this times what is there
FRAGMENTS = 3  # on a CPU a run may hold this times its plan if freed memory is kept: see give_back_freed_memory
SLOTS = 128  # rollout's default


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations within it make: `live` now, `peak` at most.

    Operations on real tensors alone (a pack's boundaries) are done for real.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live + head_scratch(func, given))
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.live += size

    def forget(self, key, size):
        del self.known[key]
        self.live -= size


def head_scratch(func, given):
    """Bytes within the head's kernels: the weight in the hidden states' dtype and a chunk of logits
    (kernels/head.py, `logits_by_chunk`)."""
    if not func.name().startswith("feinschliff::linear_"):
        return 0
    hidden, weight = [x for x in given if x.dim() == 2]
    chunk = max(128 * len(weight), 512 * 2**20 // hidden.element_size())
    return hidden.element_size() * (weight.numel() + min(chunk, len(hidden) * len(weight)))


@contextlib.contextmanager
def metered(device):
    """A Meter of what is done within, on fake tensors of `device`."""
    meter = Meter()
    with FakeTensorMode(allow_non_fake_inputs=True), meter, torch.device(device):
        yield meter


# --------------------------------------------------------------------------------------------------
# The phases, each as {part: bytes}


def plan(
    run,
    trained,
    items,
    lengths,
    step_tokens,
    read_tokens,
    frozen,
    prompt_lengths,
    completions,
    micro_batch_tokens,
    checkpoint_activations,
    fraction=1.0,
):
    """{phase: {part: bytes}} of a stage on one rank; see `check` for the arguments.

    fraction: of the batch, and so of the step's tokens and completions.
    """
    device = run.device if run.device.type == "cuda" else torch.device("cpu")  # MPS runs the same references
    policy = trained[0][0]
    shards = world_size() if is_sharded(policy) else 1
    share = -(-int(step_tokens * fraction) // world_size())  # of this rank
    longest = int(np.max(lengths))
    tokens = max(min(micro_batch_tokens, share), longest)
    batch = largest_micro_batch(items, lengths, tokens)
    keeps_gradients = share > tokens or shards > 1  # several micro-batches add up to one step
    flat = shards == 1 and world_size() > 1  # gradients are laid flat for the all-reduce
    passes, update = training(device, trained, batch, keeps_gradients, checkpoint_activations, flat)
    others = {f"{name}'s parameters": parameter_bytes(c, device) for name, c in frozen.items()}
    resident = {"parameters": passes["parameters"], "optimizer": passes["optimizer"]} | others
    phases = {"training": passes | others, "the optimizer": update | others}

    read_tokens = max(min(micro_batch_tokens, read_tokens), longest)
    pack = fake_pack(lengths, read_tokens, device)
    reads = [reading(c, device, pack) for c in [policy.config, *frozen.values()]]
    phases["reading"] = resident | {"activations": max(reads)}
    if completions:
        slots = min(SLOTS, -(-int(completions * fraction) // world_size()))
        longest_sample = max(prompt_lengths) + run.config.max_new_tokens
        phases["sampling"] = resident | sampling(policy, device, slots, longest_sample, max(prompt_lengths), resident)
    return over_shards(phases, policy, device, shards) if shards > 1 else phases


def largest_micro_batch(items, lengths, tokens):
    """The longest item, and further ones as long as they fit into `tokens` tokens."""
    longest = int(np.argmax(lengths))
    batch, total = [items[longest]], int(lengths[longest])
    for i in itertools.islice(itertools.cycle(range(len(items))), 100_000):
        if total + lengths[i] > tokens:
            break
        batch.append(items[i])
        total += int(lengths[i])
    return batch


def training(device, trained, batch, keeps_gradients, checkpoint_activations, flat):
    """The parts of the largest forward and backward pass, and of an optimizer step, of the models
    trained together.

    keeps_gradients: all gradients are there while a micro-batch goes through; flat: a copy of them
    too."""
    with metered(device) as meter:
        models = [GPT(model.config).train() for model, _, _ in trained]
        parameters = meter.live
        optimizers = [fake_optimizer(m, own) for m, (_, own, _) in zip(models, trained, strict=True)]
        for model in models:
            for p in model.parameters():
                p.grad = torch.empty_like(p)
        gradients, scratch = sum(p.grad.nbytes for model in models for p in model.parameters()), 0
        for optimizer in optimizers:
            with torch.no_grad():
                optimizer.adamw.step()
                meter.peak = meter.live
                optimizer.muon_step(1.0)
            scratch = max(scratch, meter.peak - meter.live)
        resident = {"parameters": parameters, "optimizer": meter.live - parameters - gradients}
        update = resident | {"gradients": gradients, "the step": max(scratch, flat * gradients)}
        if not keeps_gradients:
            for model in models:
                model.zero_grad()
        passes = {}
        for model, (real, _, loss) in zip(models, trained, strict=True):
            model.dropout, model.checkpoint_activations = real.dropout, checkpoint_activations
            meter.peak = before = meter.live
            value = loss(model, batch)
            kept = meter.live - before
            value.backward()
            parts = {"gradients": before - total(resident), "activations": kept}
            passes = max(passes, resident | parts | {"backward": meter.peak - before - kept}, key=total)
            del value
    return passes, update


def fake_optimizer(model, real):
    """An Optimizer of a fake model like the real one."""
    muon_dtype = "bf16" if real.muon_dtype == torch.bfloat16 else "fp32"
    return Optimizer(model, 1.0, matrix_lr=float(bool(real.rows)), muon_dtype=muon_dtype)


def fake_pack(lengths, tokens, device):
    """A Pack without memory of `tokens` tokens, its documents as long as the given ones, the last
    one cut."""
    ends = itertools.accumulate(itertools.cycle(lengths))
    ends = itertools.takewhile(lambda end: end < tokens, ends)
    cu_seqlens = torch.tensor([0, *map(int, ends), tokens], dtype=torch.int32, device=device)
    with metered(device):
        ids, positions = torch.empty(2, tokens, dtype=torch.int64)
    return Pack(ids, positions, cu_seqlens, int(cu_seqlens.diff().max()))


def reading(config, device, pack):
    """Bytes of a forward pass without gradients, its head included."""
    with metered(device) as meter, torch.no_grad():
        model = GPT(config).eval()
        meter.peak = before = meter.live
        hidden = model(pack)
        if not config.scalar_head:
            linear_logprob(hidden, model.head, pack.tokens)
    return meter.peak - before


def sampling(policy, device, slots, length, prompt, resident):
    """The parts of a rollout of `slots` slots of `length` tokens, prompts of up to `prompt` tokens
    among them."""
    c, item_size = policy.config, 2 if device.type == "cuda" else 4
    parts = {"sampling weights": resident["parameters"] * item_size // 4}  # see rollout.sampling_weights
    cache = 2 * item_size * c.layers * slots * length * c.kv_heads * c.head_dim
    if device.type == "cuda":  # rollout takes fewer slots if they would fill more than half of what is free
        half = (torch.cuda.mem_get_info(device)[0] - resident["optimizer"]) // 2
        cache = min(cache, max(cache // slots, half))
    with metered(device) as meter, torch.no_grad():
        model = GPT(c).eval()
        meter.peak = before = meter.live
        model(fake_pack([prompt], min(16384, slots * prompt), device))
    parts["KV cache"] = cache
    parts["prompts and draws"] = max(meter.peak - before, 16 * slots * c.vocab_size)
    return parts


def parameter_bytes(config, device):
    """Bytes of a model's parameters and tables."""
    with metered(device) as meter:
        model = GPT(config)  # noqa: F841  counted while it lives
        return meter.live


def over_shards(phases, policy, device, shards):
    """The phases of one rank of a sharded run."""
    parameters = phases["training"]["parameters"]
    ends = parameter_bytes(dataclasses.replace(policy.config, layers=0), device)  # embedding and head
    block = (parameters - ends) // policy.config.layers
    gathered = 2 * (ends + 2 * block)  # at a time these and two blocks, and the gradients of as much
    sharded = {}
    for phase, parts in phases.items():
        sharded[phase] = {"gathered": gathered}
        for part, size in parts.items():
            divided = part in ("parameters", "optimizer", "gradients")
            sharded[phase][part] = -(-size // shards) if divided else size
    if "sampling" in sharded:
        sharded["sampling"]["a whole copy"] = parameters
    return sharded


def total(parts):
    return sum(parts.values())


# --------------------------------------------------------------------------------------------------
# What is there, and what to do if that is too little


def check(
    run,
    trained,
    items,
    lengths,
    step_tokens,
    *,
    read_tokens=0,
    frozen=None,
    prompt_lengths=(),
    completions=0,
    batch_flag="",
):
    """Print the run's memory plan. Raises UserError, with the flags that make it fit, if the device
    holds less by more than the plan may be wrong.

    trained: [(model, optimizer, loss)] of the models trained together, loss(model, items) -> scalar
    being the stage's own of one micro-batch. items: what the stage trains on; lengths: the tokens
    of each. step_tokens: of an optimizer step, on all ranks. read_tokens: how many are read without
    gradients at a time, if --micro_batch_tokens allowed it (0: all items). frozen: {name:
    GPTConfig} of further models. prompt_lengths, completions: tokens of the prompts and number of
    completions of a rollout, on all ranks. batch_flag: the flag that makes the batch smaller, if a
    rollout's slots depend on it."""
    read_tokens = read_tokens or int(np.sum(lengths))
    known = run, trained, items, lengths, step_tokens, read_tokens, frozen or {}, prompt_lengths, completions
    make = functools.cache(functools.partial(plan, *known))
    config = run.config
    try:
        phases = make(config.micro_batch_tokens, config.checkpoint_activations, 1.0)
    except RuntimeError as e:  # what fake tensors cannot do; a real error will show at the first step
        reason = str(e).strip().split("\n")[0]
        print0(f"memory: not planned, because this model or loss reads its own values ({type(e).__name__}: {reason})")
        return
    name = max(phases, key=lambda phase: total(phases[phase]))
    need = total(phases[name])
    loaded = sum(size for part, size in phases[name].items() if part.endswith("parameters"))
    available = available_memory(run.device, loaded)
    of_available = f" of {in_words(available)}" if available else ""
    parts = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in phases[name].items() if size >= 5e5)
    print0(f"memory: {in_words(need)}{of_available}, most of it in {name}: {parts}")
    if run.device.type == "cpu" and available and FRAGMENTS * need > available:
        give_back_freed_memory()
    if available is None or need <= available:
        return
    text = f"this run needs {in_words(need)} of memory, {in_words(available)} are there"
    change = flags_that_fit(make, config, available, batch_flag)
    if change is None:
        shard = ", or divide it over several devices with --shard=fsdp under torchrun"
        has_shard = "shard" in vars(config) and not config.shard
        text += (
            ", and no smaller --micro_batch_tokens makes it fit, not even with --checkpoint_activations: take a "
            f"smaller model{shard if has_shard else ''}"
        )
    else:
        same = "" if batch_flag in change else ", with the same result"
        text += f": {' '.join(f'--{flag}={value}' for flag, value in change.items())} makes it fit{same}"
    compiled = vars(config).get("compile", False)  # compiled, it needs less than is planned
    if need > TOLERANCE * available and not compiled:
        raise UserError(text)
    print0(f"warning: {text}")


def check_rollout(run, trained, tok, rows, completions_per_update, completions, frozen):
    """`check` for a stage that trains on completions to the prompts of `rows` (messages, row): the
    plan takes them to be --max_new_tokens long.

    completions_per_update, completions: per optimizer step and per rollout, on all ranks.
    """
    prompts = [chat.encode_prompt(tok, messages) for messages, _ in rows]
    items = [make_completion(prompt, [0] * run.config.max_new_tokens) for prompt in prompts]
    lengths = [len(item.ids) for item in items]
    step_tokens = likely_tokens(lengths, completions_per_update)
    check(
        run,
        trained,
        items,
        lengths,
        step_tokens,
        read_tokens=likely_tokens(lengths, completions),
        frozen=frozen,
        prompt_lengths=[len(p) for p in prompts],
        completions=completions,
        batch_flag="prompts_per_step",
    )


def give_back_freed_memory():
    """Have glibc give a freed tensor back to the system, if it has 1 MiB or more.

    It keeps them for the next one, which is faster. But tensors of changing sizes leave holes: 1.6
    times the plan was measured. Without holes the plan is what the run holds.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: the bytes from which memory has a mapping of its own
        libc.mallopt(-4, 2**20)  # M_MMAP_MAX: as many of them as are needed


def flags_that_fit(make, config, available, batch_flag):
    """{flag: value} that make the run fit, None if nothing does: smaller micro-batches, then
    activations checkpointed, then both, and last a smaller batch, alone or with these."""

    def fits(micro_batch_tokens, checkpoint_activations, fraction):
        phases = make(micro_batch_tokens, checkpoint_activations, fraction)
        return max(map(total, phases.values())) <= available

    batch = vars(config)[batch_flag] if batch_flag else 1
    size = batch
    while size >= 1:
        change = {batch_flag: size} if size < batch else {}
        fraction = size / batch
        if fits(config.micro_batch_tokens, config.checkpoint_activations, fraction):
            return change
        if fits(1, True, fraction):
            for checkpointed in dict.fromkeys((config.checkpoint_activations, True)):
                if checkpointed != config.checkpoint_activations:
                    change = change | {"checkpoint_activations": True}
                    if fits(config.micro_batch_tokens, True, fraction):
                        return change
                powers = range((config.micro_batch_tokens - 1).bit_length())
                count = bisect.bisect_left(powers, True, key=lambda n: not fits(1 << n, checkpointed, fraction))
                if count:
                    return change | {"micro_batch_tokens": 1 << (count - 1)}
        size //= 2
    return None


def available_memory(device, loaded):
    """Bytes that a run may hold on this device, including the `loaded` bytes of parameters that are
    there already; None if nobody can tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu" or not Path("/proc/meminfo").exists():
        return None
    import resource  # POSIX only

    free = [kilobytes("/proc/meminfo", "MemAvailable")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:  # ulimit -v
        free.append(address_space - kilobytes("/proc/self/status", "VmSize"))
    cgroup = Path("/sys/fs/cgroup")
    free += cgroup_free(cgroup / "memory.max", cgroup / "memory.current", "inactive_file")
    old = cgroup / "memory"
    free += cgroup_free(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", "total_inactive_file")
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + loaded


def kilobytes(file, name):
    """A line "name: 123 kB" of a file, in bytes."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024


def cgroup_free(limit, used, file_cache):
    """[bytes that a container's limit leaves], [] if there is none. Cached files make way."""
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return []
    statistics = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
    return [int(limit.read_text()) - int(used.read_text()) + int(statistics[file_cache])]


def in_words(size):
    return f"{size / 1e6:,.0f} MB" if size < 10e9 else f"{size / 1e9:,.1f} GB"


def likely_tokens(lengths, n):
    """Tokens that n items of these lengths have, drawn at random: hardly ever more."""
    return int(n * np.mean(lengths) + 3 * n**0.5 * np.std(lengths))
