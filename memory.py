"""The memory plan: how much a run holds at its fullest, told before its first step; and where that does not fit, the flag that makes it fit.

Nothing of it is a formula that could fall behind the code. The very model, head, backward and optimizer are walked at the sizes of the run, on tensors that
have a shape and no memory (PyTorch's fake tensors), and every storage that an operation makes is counted for as long as it lives: so whatever the kernels,
the precision and the checkpointing of activations are, the plan knows. A phase counts what lives in it; the run needs as much as its largest phase.

Left out: what lies inside one operation of PyTorch's, allocators' fragments, what torch.compile saves, and the data, which are small beside the rest.
"""
import bisect, contextlib, ctypes, dataclasses, itertools, os, platform, weakref
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import UserError, rank, world_size
from data.pack import Pack
from kernels.head import linear_cross_entropy, linear_logprob
from model import GPT
from optim import Optimizer


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations within it make: `live` now, `peak` at most. What is asked of real tensors alone, a pack's boundaries, is really done."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.forget(key, size))
                self.live += size
        self.peak = max(self.peak, self.live + head_scratch(func, given))
        return out

    def forget(self, key, size):
        del self.known[key]
        self.live -= size


def head_scratch(func, given):
    """Bytes that the head's kernels hold within: the weight in the hidden states' dtype and a chunk of logits (kernels/head.py, `logits_by_chunk`)."""
    if not func.name().startswith("feinschliff::linear_"):
        return 0
    hidden, weight = [x for x in given if x.dim() == 2]
    return hidden.element_size() * (weight.numel() + min(max(128 * len(weight), 512 * 2**20 // hidden.element_size()), len(hidden) * len(weight)))


@contextlib.contextmanager
def walk(device):
    """-> the Meter of what is done within, on fake tensors of `device`."""
    meter = Meter()
    with FakeTensorMode(allow_non_fake_inputs=True), meter, torch.device(device):
        yield meter


def some_pack(lengths, tokens, device):
    """A Pack without memory of `tokens` tokens in documents as long as the given ones are, over and over, the last one cut."""
    ends = itertools.takewhile(lambda end: end < tokens, itertools.accumulate(itertools.cycle(lengths)))
    cu = torch.tensor([0, *map(int, ends), tokens], dtype=torch.int32, device=device)
    with walk(device):
        return Pack(torch.empty(tokens, dtype=torch.int64), torch.empty(tokens, dtype=torch.int64), cu, int(cu.diff().max()))


def loss_of(model, pack, loss, learnt):
    """What a stage makes of a pack, to go backward from; its head sees the share `learnt` of the tokens. A reward model or critic has a head of its own."""
    hidden = model(pack)
    if learnt < 1:
        hidden = hidden.index_select(0, torch.arange(max(1, int(learnt * len(hidden)))))
    if model.config.scalar_head:
        return (hidden.to(model.score.dtype) @ model.score[0]).float().sum()
    targets = torch.empty(len(hidden), dtype=torch.int64)
    return linear_cross_entropy(hidden, model.head, targets) if loss == "cross_entropy" else linear_logprob(hidden, model.head, targets).sum()


def training(configs, device, pack, loss, learnt, several, dropout, checkpointed, muon, flat):
    """({part: bytes} of a forward and backward pass, {part: bytes} of an optimizer step) of the models of `configs`, which are trained side by side.

    several: an optimizer step has more packs than one, so that all gradients are there while one goes through. muon: the dtype of Newton-Schulz, None
    where AdamW has all. flat: the gradients are laid flat, for an all-reduce.
    """
    with walk(device) as meter:
        models = [GPT(c).train() for c in configs]
        parameters = meter.live
        optimizers = [Optimizer(model, 1.0, matrix_lr=float(muon is not None), polar="bf16" if muon == torch.bfloat16 else "fp32") for model in models]
        for p in (p for model in models for p in model.parameters()):
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
        if not several:
            for model in models:
                model.zero_grad()
        passes = {}
        for model in models:
            model.dropout, model.checkpoint_activations = dropout, checkpointed
            meter.peak = before = meter.live
            value = loss_of(model, pack, loss, learnt)
            kept = meter.live - before
            value.backward()
            parts = resident | {"gradients": before - sum(resident.values()), "activations": kept, "backward": meter.peak - before - kept}
            passes = max(passes, parts, key=total)
            del value
    return passes, update


def reading(config, device, pack, loss=""):
    """Bytes of a forward pass without gradients: of as many layers as of one. loss: "" where no head comes after it."""
    with walk(device) as meter, torch.no_grad():
        model = GPT(dataclasses.replace(config, layers=1)).eval()
        meter.peak = before = meter.live
        loss_of(model, pack, loss, 1.0) if loss else model(pack)
    return meter.peak - before


def weights(config, device):
    """Bytes of a model's parameters and tables."""
    with walk(device) as meter:
        model = GPT(config)  # noqa: F841  counted while it lives
        return meter.live


def drawn(lengths, n):
    """Tokens that n items of these lengths have, drawn at random: hardly ever more."""
    return int(n * np.mean(lengths) + 3 * n**0.5 * np.std(lengths))


def total(parts):
    return sum(parts.values())


def plan(config, device, trained, lengths, batch_tokens, *, longest=0, loss="logprob", learnt=1.0, held={}, read_tokens=0, samples=(0, 0, 0), dropout=0.0, muon=None, shards=1):
    """{phase: {part: bytes}} of a stage on one rank.

    config: the stage's, of which micro_tokens and checkpoint_activations are read. trained: [GPTConfig]. lengths: tokens of its documents, as many as there
    are; longest: of what may not be parted (a pair), where that is more than a document. batch_tokens: of an optimizer step, all ranks. learnt: the share of the
    tokens that the head sees. held: {name: GPTConfig} of further models. read_tokens: of the largest pass without gradients, if --micro_tokens did not bound it.
    samples: (slots, longest sample with its prompt, longest prompt). shards: ranks that parameters, gradients and optimizer are divided over (FSDP).
    """
    device = device if device.type == "cuda" else torch.device("cpu")  # Apple's GPUs run the same references, in fp32
    share, longest = -(-batch_tokens // world_size()), max(longest, int(np.max(lengths)))
    tokens = max(min(config.micro_tokens, share), longest)
    pack = some_pack(lengths, tokens, device)
    flat = shards == 1 and world_size() > 1
    passes, update = training(trained, device, pack, loss, learnt, share > tokens or shards > 1, dropout, config.checkpoint_activations, muon, flat)
    others = {f"{name}'s parameters": weights(c, device) for name, c in held.items()}
    parameters, state = passes["parameters"], passes["optimizer"]
    resident = {"parameters": parameters, "optimizer": state} | others
    phases = {"training": passes | others, "the optimizer": update | others}
    policy, read = trained[0], max(min(config.micro_tokens, read_tokens), longest)
    if read > tokens or held:  # less than is learnt from needs less, but for a larger model
        phases["reading"] = resident | {"activations": max(reading(c, device, some_pack(lengths, read, device), loss) for c in [policy, *held.values()])}
    slots, length, prompt = samples
    if slots:
        c, number = policy, 2 if device.type == "cuda" else 4  # bytes of what it computes in
        cache = 2 * number * c.layers * slots * length * c.kv_heads * c.head_dim
        if device.type == "cuda":  # rollout takes fewer slots where they would fill more than half of what is free
            cache = min(cache, max(cache // slots, (torch.cuda.mem_get_info(device)[0] - state) // 2))
        prompts = reading(c, device, some_pack([prompt], min(16384, slots * prompt), device))
        lean = {"bf16 weights": parameters // 2} if number == 2 else {}
        phases["sampling"] = resident | lean | {"KV cache": cache, "prompts and draws": max(prompts, 16 * slots * c.vocab_size)}
    if shards > 1:  # whole are, at a time, the embedding, the head and two blocks, and the gradients of as much
        block = (parameters - weights(dataclasses.replace(policy, layers=0), device)) // policy.layers
        whole = 2 * (parameters - (policy.layers - 2) * block)
        phases = {phase: {part: -(-size // shards) if part in ("parameters", "optimizer", "gradients") else size for part, size in parts.items()} | {"gathered": whole} for phase, parts in phases.items()}
        if "sampling" in phases:
            phases["sampling"]["a whole copy"] = parameters
    return phases


def sampled(config, device, trained, prompts, answers, minibatches, held):
    """`plan` of a stage that learns from its own answers, `answers` a step in so many minibatches, to prompts of these lengths."""
    lengths = np.array(prompts) + config.max_new
    walked = dict(learnt=float((config.max_new / lengths).mean()), held=held, read_tokens=drawn(lengths, answers))
    walked["samples"] = min(128, -(-answers // world_size())), int(lengths.max()), max(prompts)
    return plan(config, device, trained, lengths, drawn(lengths, answers / minibatches), **walked)


# ---------------------------------------------------------------------------------------------------------------------------------
# What is there, and what to do where that is too little


def room(device, loaded):
    """Bytes that a run may hold on this device, the `loaded` bytes of parameters that are there already among them; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu" or not Path("/proc/meminfo").exists():
        return None
    import resource  # POSIX only

    kilobytes = lambda file, name: int(next(line.split()[1] for line in Path(file).read_text().splitlines() if line.startswith(name))) * 1024  # noqa: E731
    free, address_space = [kilobytes("/proc/meminfo", "MemAvailable")], resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:  # ulimit -v
        free.append(address_space - kilobytes("/proc/self/status", "VmSize"))
    for limit, used, idle in (("memory.max", "memory.current", "inactive_file"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file")):
        limit, used = Path("/sys/fs/cgroup", limit), Path("/sys/fs/cgroup", used)
        if limit.exists() and used.exists() and limit.read_text().strip() != "max":
            files = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
            free.append(int(limit.read_text()) - int(used.read_text()) + int(files[idle]))  # files in memory make way
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + loaded


# A plan is true to 15 % (bench/memory.py).
# common.setup has glibc keep what is freed, for speed. Tensors of ever other sizes then leave holes: up to 2.4 times the plan was resident there.
# Where there is not room for so much, freed tensors go back to the system and the plan is what the run holds; it takes longer.
TRUE_TO, FRAGMENTS, GLIBC = 1.15, 3, platform.libc_ver()[0] == "glibc"
SHARD = ", or divide it over several devices by --shard=fsdp under torchrun"


def in_words(size):
    return f"{size / 1e6:,.0f} MB" if size < 10e9 else f"{size / 1e9:,.1f} GB"


def largest(phases):
    """(its name, its parts, their sum) of the phase that needs the most."""
    name = max(phases, key=lambda phase: total(phases[phase]))
    return name, phases[name], total(phases[name])


def check(config, device, make, smaller="", or_else="", limit=None):
    """Print the plan, `make(config)`; UserError where the device holds less by more than the plan may be wrong, with the flags that make it fit. Else a warning.

    smaller: the flag of the batch that a rollout's slots follow, where there is one. or_else: what else helps. limit: bytes there would be, None for those there are.
    """
    phases = make(config)
    name, parts, need = largest(phases)
    loaded = sum(size for part, size in parts.items() if part.endswith("parameters"))
    there = room(device, loaded) if limit is None else limit
    scarce = device.type == "cpu" and GLIBC and there is not None and FRAGMENTS * need > there
    if rank() == 0:
        shown = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in parts.items() if size >= 5e5)
        kept = "" if device.type != "cpu" or not GLIBC or world_size() > 1 else "; freed tensors are given back" if scarce else f"; up to {FRAGMENTS} times that with what is freed and kept, for speed"
        print(f"memory: {in_words(need)}{f' of {in_words(there)}' if there else ''}, the most of it in {name}: {shown}{kept}")
    if scarce and limit is None:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**20), libc.mallopt(-4, 2**20)  # M_MMAP_THRESHOLD, M_MMAP_MAX: every tensor of 1 MiB has a mapping of its own
    if there is None or need <= there:
        return
    change = fitting(config, make, there, smaller)
    asked = f"this run needs {in_words(need)} of memory, {in_words(there)} are there"
    if change is None:
        text = f"{asked}, and no smaller --micro_tokens makes it fit, not even with --checkpoint_activations: take a smaller model{or_else}"
    else:
        text = f"{asked}: {' '.join(f'--{flag}={value}' for flag, value in change.items())} makes it fit" + ("" if smaller in change else ", with the same result")
    if need > TRUE_TO * there and not vars(config).get("compile"):  # compiled, it needs less than is planned
        raise UserError(text)
    if rank() == 0:
        print(f"warning: {text}")


def fitting(config, make, there, smaller=""):
    """{flag: value} that make it fit, None where none do: smaller packs, activations checkpointed, both, and last a smaller batch, alone or with these."""
    need = lambda change: largest(make(dataclasses.replace(config, **change)))[2]  # noqa: E731
    again = {"checkpoint_activations": True}
    if need({}) <= there:
        return {}
    if need(again | {"micro_tokens": 1} | ({smaller: 1} if smaller else {})) > there:
        return None
    for change in ({}, again):
        if change and need(change) <= there:
            return change
        fits = bisect.bisect_right(range((config.micro_tokens - 1).bit_length()), there, key=lambda n: need(change | {"micro_tokens": 1 << n}))  # noqa: B023
        if fits:
            return change | {"micro_tokens": 1 << (fits - 1)}
    less = {smaller: vars(config)[smaller] // 2}
    return less | fitting(dataclasses.replace(config, **less), make, there, smaller)
