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
import functools
import itertools
import os
import platform
import re
import weakref
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import chat
from data.pack import make_completion, pack
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
DEFAULT_MICRO_BATCH = 16384  # tokens


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations within it make: `live` now, `peak` at most.

    Operations on real tensors alone (a pack's boundaries) are done for real.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live + head_scratch(func, given))
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.remove(key)
        self.live -= size


def head_scratch(func, given):
    """Bytes within the head's kernels: the weight in the hidden states' dtype and a chunk of logits
    (kernels/head.py, `logits_by_chunk`)."""
    if not func.name().startswith("feinschliff::linear_"):
        return 0
    scratch, matrices = 0, [x for x in given if x.dim() == 2]
    for hidden, weight in zip(matrices[::2], matrices[1::2]):  # linear_kl has those of two models
        size = 4 if func.name() == "feinschliff::linear_logprob" else hidden.element_size()  # of a logit
        chunk = max(128 * len(weight), 512 * 2**20 // size)
        scratch += hidden.element_size() * weight.numel() + size * min(chunk, len(hidden) * len(weight))
    return scratch


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
    micro_batch_tokens,
    checkpoint_activations,
    fraction=1.0,
    *,
    read_tokens=0,
    frozen=None,
    prompt_lengths=(),
    completions=0,
):
    """{phase: {part: bytes}} of a stage on one rank.

    trained: [(model, optimizer, loss)] of the models trained together, loss(model, items) -> scalar
    being the stage's own of one micro-batch. items: what the stage trains on; lengths: the tokens
    of each. step_tokens: of a step, on all ranks. fraction: of the batch that is tried, and so of
    the step's tokens and completions. read_tokens: how many are read without gradients at a time,
    if micro_batch_tokens allowed it (0: all items). frozen: {name: GPTConfig} of further models.
    prompt_lengths, completions: tokens of the prompts and number of completions of a rollout, on
    all ranks."""
    device = run.device if run.device.type == "cuda" else torch.device("cpu")  # MPS runs the same references
    policy, frozen = trained[0][0], frozen or {}
    shards = world_size() if is_sharded(policy) else 1
    share = -(-int(step_tokens * fraction) // world_size())  # of this rank
    longest = int(np.max(lengths))
    tokens = max(min(micro_batch_tokens, share), longest)
    batch = largest_micro_batch(items, lengths, tokens)
    keeps_gradients = share > tokens or shards > 1  # several micro-batches add up to one step
    flat = shards == 1 and world_size() > 1  # gradients are laid flat for the all-reduce
    phases = training(device, trained, batch, keeps_gradients, checkpoint_activations, flat)
    resident = {part: phases["training"][part] for part in ("parameters", "optimizer")}

    read_tokens = max(min(micro_batch_tokens, read_tokens or int(np.sum(lengths))), longest)
    documents = largest_micro_batch(lengths, lengths, read_tokens)
    reads = [reading(c, device, documents) for c in [policy.config, *frozen.values()]]
    phases["reading"] = resident | {"activations": max(reads)}
    if completions:
        slots = min(SLOTS, -(-int(completions * fraction) // world_size()))
        prompt = max(prompt_lengths)
        positions = min(prompt + run.config.max_new_tokens, policy.config.context + 1)
        cache = kv_cache(policy.config, device, slots, positions, resident["optimizer"])
        prompts = [prompt] * max(1, min(slots, 16384 // prompt))
        read = reading(policy.config, device, prompts, head=False)
        phases["sampling"] = resident | {
            # see rollout.sampling_weights
            "sampling weights": resident["parameters"] // (2 if device.type == "cuda" else 1),
            "KV cache": cache,
            "prompts and draws": max(read, 16 * slots * policy.config.vocab_size),
        }
    others = {f"{name}'s parameters": parameter_bytes(c) for name, c in frozen.items()}
    phases = {phase: parts | others for phase, parts in phases.items()}
    return over_shards(phases, policy, shards) if shards > 1 else phases


def largest_micro_batch(items, lengths, tokens):
    """The longest item, and further ones as long as they fit into `tokens` tokens."""
    order = np.append(np.argmax(lengths), np.resize(np.arange(len(items)), 100_000))
    count = np.searchsorted(np.asarray(lengths)[order].cumsum(), tokens, side="right")
    return [items[i] for i in order[:count]]


def training(device, trained, batch, keeps_gradients, checkpoint_activations, flat):
    """The two phases of a step of the models trained together: the largest forward and backward
    pass of one, and the optimizers.

    keeps_gradients: all gradients are there while a micro-batch goes through; flat: a copy of them
    too."""
    with metered(device) as meter:
        models = [GPT(model.config).train() for model, _, _ in trained]
        parameters = meter.live
        optimizers = [fake_optimizer(m, own) for m, (_, own, _) in zip(models, trained)]
        before, scratch = meter.live, 0
        for p in itertools.chain(*(model.parameters() for model in models)):
            p.grad = torch.empty_like(p)
        gradients = meter.live - before
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
        for model, (real, _, loss) in zip(models, trained):
            model.dropout, model.checkpoint_activations = real.dropout, checkpoint_activations
            meter.peak = before = meter.live
            value = loss(model, batch)
            kept = meter.live - before
            value.backward()
            parts = {"gradients": before - total(resident), "activations": kept}
            passes = max(passes, resident | parts | {"backward": meter.peak - before - kept}, key=total)
            del value
    return {"training": passes, "the optimizer": update}


def fake_optimizer(model, real):
    """An Optimizer of a fake model like the real one."""
    muon_dtype = "bf16" if real.muon_dtype == torch.bfloat16 else "fp32"
    return Optimizer(model, 1.0, matrix_lr=float(bool(real.rows)), muon_dtype=muon_dtype)


def reading(config, device, lengths, head=True):
    """Bytes of a forward pass of documents of these lengths without gradients, and of the head's
    log-probabilities."""
    p = pack([[0] * int(length) for length in lengths]).to(device)
    with metered(device) as meter, torch.no_grad():
        model = GPT(config).eval()
        meter.peak = before = meter.live
        hidden = model(p)
        if head and not config.scalar_head:
            linear_logprob(hidden, model.head, p.tokens)
    return meter.peak - before


def kv_cache(config, device, slots, length, optimizer):
    """Bytes of the KV cache of a rollout of `slots` slots of `length` tokens."""
    slot = config.slot_bytes(length, item_size=2 if device.type == "cuda" else 4)
    if device.type == "cuda":  # rollout takes fewer slots if they would fill more than half of what is free
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free as well
        half = (torch.cuda.mem_get_info(device)[0] + cached - optimizer) // 2
        return min(slots * slot, max(slot, half))
    return slots * slot


def parameter_bytes(config):
    """Bytes of a model's parameters and tables."""
    with torch.device("meta"):
        model = GPT(config)
    return sum(x.nbytes for x in itertools.chain(model.parameters(), model.buffers()))


def over_shards(phases, policy, shards):
    """The phases of one rank of a sharded run."""
    parameters = phases["training"]["parameters"]
    blocks = [sum(p.nbytes for p in block.parameters()) for block in policy.blocks]
    # at a time embedding, head and two blocks, and the gradients of as much
    gathered = 2 * (parameters - sum(blocks) + 2 * max(blocks))
    sharded = {}
    for phase, parts in phases.items():
        divided = parts.keys() & {"parameters", "optimizer", "gradients"}
        sharded[phase] = {"gathered": gathered} | parts | {part: -(-parts[part] // shards) for part in divided}
    if "sampling" in sharded:
        sharded["sampling"]["a whole copy"] = parameters
    return sharded


def total(parts):
    return sum(parts.values())


# --------------------------------------------------------------------------------------------------
# What is there, and what to do if that is too little


def check(run, trained, items, lengths, step_tokens, batch_flag="", **options):
    """Print the run's memory plan; see `plan` for the arguments. Raises UserError, with the flags
    that make it fit, if the device holds less by more than the plan may be wrong.

    batch_flag: the flag that makes the batch smaller, if a rollout's slots depend on it."""
    plan_of = functools.cache(functools.partial(plan, run, trained, items, lengths, step_tokens, **options))
    config, proposed = run.config, not run.config.micro_batch_tokens
    try:
        if proposed:
            config.micro_batch_tokens = proposed_micro_batch(run.device, plan_of, config, step_tokens)
        phases = plan_of(config.micro_batch_tokens, config.checkpoint_activations)
    except RuntimeError as e:  # what fake tensors cannot do; a real error will show at the first step
        reason = str(e).strip().split("\n")[0]
        config.micro_batch_tokens = config.micro_batch_tokens or DEFAULT_MICRO_BATCH
        print0(f"memory: not planned, because this model or loss reads its own values ({type(e).__name__}: {reason})")
        return
    if proposed:
        print0(f"memory: --micro_batch_tokens={config.micro_batch_tokens} is what fits")
    name, largest = max(phases.items(), key=lambda phase: total(phase[1]))
    need = total(largest)
    available = available_memory(run.device, largest)
    of_available = f" of {in_words(available)}" if available else ""
    parts = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in largest.items() if size >= 5e5)
    print0(f"memory: {in_words(need)}{of_available}, most of it in {name}: {parts}")
    if run.device.type == "cpu" and available and FRAGMENTS * need > available:
        give_back_freed_memory()
    if available is None or need <= available:
        return
    text = f"this run needs {in_words(need)} of memory, {in_words(available)} are there"
    change = flags_that_fit(plan_of, config, available, batch_flag)
    if change is None:
        shard = ""
        if vars(config).get("shard") == "":
            shard = ", or divide it over several devices with --shard=fsdp under torchrun"
        text += (
            ", and no smaller --micro_batch_tokens makes it fit, not even with --checkpoint_activations: take a "
            f"smaller model{shard}"
        )
    else:
        same = "" if batch_flag in change else ", with the same result"
        text += f": {' '.join(f'--{flag}={value}' for flag, value in change.items())} makes it fit{same}"
    compiled = vars(config).get("compile", False)  # compiled, it needs less than is planned
    if need > TOLERANCE * available and not compiled:
        raise UserError(text)
    print0(f"warning: {text}")


def proposed_micro_batch(device, plan_of, config, step_tokens):
    """The micro_batch_tokens for --micro_batch_tokens=0: this rank's share of a step, halved until
    the plan leaves a GPU a tenth of its memory. On a CPU, which larger ones do not make faster, at
    most DEFAULT_MICRO_BATCH."""
    tokens = -(-int(step_tokens) // world_size())
    if device.type != "cuda":
        return min(tokens, DEFAULT_MICRO_BATCH)
    while tokens > 1024:
        largest = max(plan_of(tokens, config.checkpoint_activations).values(), key=total)
        if total(largest) <= 0.9 * available_memory(device, largest):
            break
        tokens = -(-tokens // 2)
    return tokens


def check_rollout(run, trained, tok, rows, completions_per_update, completions, frozen):
    """`check` for a stage that trains on completions to the prompts of `rows` (messages, row): the
    plan takes them to be --max_new_tokens long.

    completions_per_update, completions: per optimizer step and per rollout, on all ranks.
    """
    prompts = [chat.encode_prompt(tok, messages) for messages, _ in rows]
    items = [make_completion(prompt, [0] * run.config.max_new_tokens) for prompt in prompts]
    lengths = [len(item.ids) for item in items]
    check(
        run,
        trained,
        items,
        lengths,
        likely_tokens(lengths, completions_per_update),
        "prompts_per_step",
        read_tokens=likely_tokens(lengths, completions),
        frozen=frozen,
        prompt_lengths=[len(p) for p in prompts],
        completions=completions,
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


def flags_that_fit(plan_of, config, available, batch_flag):
    """{flag: value} that make the run fit, None if nothing does: smaller micro-batches, then
    activations checkpointed, then both, and last a smaller batch, alone or with these."""

    def fits(micro_batch_tokens, checkpoint_activations, fraction):
        phases = plan_of(micro_batch_tokens, checkpoint_activations, fraction)
        return max(map(total, phases.values())) <= available

    full = config.micro_batch_tokens
    sizes = [full, *(1 << n for n in reversed(range((full - 1).bit_length())))]  # and the powers of two below it
    batch = vars(config)[batch_flag] if batch_flag else 1
    for smaller in (batch >> n for n in range(batch.bit_length())):
        fraction = smaller / batch
        for checkpointed in sorted({config.checkpoint_activations, True}):
            if not fits(1, True, fraction):
                break
            first = bisect.bisect_left(sizes, True, key=lambda size: fits(size, checkpointed, fraction))
            if first < len(sizes):
                found = {"checkpoint_activations": checkpointed, "micro_batch_tokens": sizes[first]}
                found |= {batch_flag: smaller} if batch_flag else {}
                return {flag: value for flag, value in found.items() if vars(config)[flag] != value}
    return None


def available_memory(device, phase):
    """Bytes that a run may hold on this device, including those of the phase's parameters, which
    are there already; None if nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu" or not Path("/proc/meminfo").exists():
        return None
    import resource  # POSIX only

    free = [1024 * number_in("/proc/meminfo", "MemAvailable")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:  # ulimit -v
        free.append(address_space - 1024 * number_in("/proc/self/status", "VmSize"))
    cgroups = Path("/sys/fs/cgroup")
    free += cgroup_free(cgroups, "memory.max", "memory.current", "inactive_file")
    free += cgroup_free(cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    loaded = sum(size for part, size in phase.items() if part.endswith("parameters"))
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + loaded


def number_in(file, name):
    """The number in the line of a file that begins with `name`."""
    return int(re.search(rf"(?m)^{name}:?\s+(\d+)", Path(file).read_text())[1])


def cgroup_free(folder, limit, used, file_cache):
    """[bytes that a container's limit leaves], [] if there is none. Cached files make way."""
    limit, used = folder / limit, folder / used
    if not limit.exists() or not used.exists() or limit.read_text() == "max\n":
        return []
    return [int(limit.read_text()) - int(used.read_text()) + number_in(folder / "memory.stat", file_cache)]


def in_words(size):
    return f"{size / 1e6:,.0f} MB" if size < 10e9 else f"{size / 1e9:,.1f} GB"


def likely_tokens(lengths, n):
    """Tokens that n items of these lengths have, drawn at random: hardly ever more."""
    return int(n * np.mean(lengths) + 3 * n**0.5 * np.std(lengths))
