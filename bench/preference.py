"""What packing and a cached reference save: DPO's and SFT's training steps, without padding and
with it, in the same run.

Contenders take turns on the same batches, drawn at random from the file as a plain loop draws them
(not sorted by length), and train from the same weights:

    packed       a training step of dpo.py and of sft.py, and the optimizer's step
    padded       the same on a batch filled up to its longest conversation: rows of [B, T], dense
                 causal attention, the padding masked in the loss
    no cache     dpo.py's, packed, with the reference's forward in every step instead of its
                 log-probabilities from before the first

Padded and packed thus have the same operations on every token, and must have the same loss and
gradients; that is proved first. A padded loop that puts prompts and padding through its head, or a
mask into its attention, is slower and larger than this one. Tokens are real tokens. Memory is the
peak that training adds to a process of its own: activations, gradients, the optimizer's moments, on
a CPU resident memory. Last line of output: JSON.

    python -m bench.preference --data=../shared/realdata/ai_preferences_train.jsonl
"""

import json
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import dpo
import sft
from data import chat, rows as data_rows, tokenizer
from data.pack import Chat
from kernels.proof import prove
from model import GPT, config_for
from optim import Optimizer
from runtime.errors import UserError
from runtime.process import describe, launch, setup


@dataclass
class Config:
    # preferences: .jsonl, .parquet or hf:NAME (see data/chat.py)
    data: str
    # layers
    depth: int = 4
    # of the model
    width: int = 256
    # ids of the tokenizer, which is trained on the file
    vocab: int = 4096
    # tokens; pairs with a longer side are left out
    context: int = 1024
    # a step; for SFT conversations: their chosen sides
    pairs: int = 16
    # timed, a contender
    steps: int = 10
    # of the batches
    seed: int = 0
    # auto, cpu, cuda, cuda:1
    device: str = "auto"


CONTENDERS = [("DPO", "packed"), ("DPO", "padded"), ("DPO", "no cache"), ("SFT", "packed"), ("SFT", "padded")]
# packed against padded; the reference's forward against a step that has its log-probabilities
# already
ASKED = {"speed": 1.5, "saved": 1 / 3}


# --------------------------------------------------------------------------------------------------
# Memory and processes


def memory(device, peak=False):
    """Bytes that this process holds, or the most it has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("memory is read from /proc: run this on Linux")
    return 1024 * int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status.read_text())[1])


def forget_peak(device):
    """From here on `memory(peak=True)` is the peak since now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def apart(function, *args):
    """function(*args) in a process of its own. A new one: a fork would begin with this one's
    memory, and its OpenMP threads would be gone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------
# The contenders


@torch.no_grad()
def fresh(shape, seed, device):
    """A model all of whose weights are random: as initialised, output projections are zero, and
    most gradients with them."""
    model, generator = GPT(shape).init_weights(seed), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if not p.any():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model.to(device)


def fill_up(chats, pad):
    """The same conversations, each with padding behind it to the length of the longest. None of it
    is trained."""
    longest = max(len(c.ids) for c in chats)
    return [
        Chat(*(np.pad(part, (0, longest - len(c.ids)), constant_values=fill) for part, fill in zip(c, (pad, False))))
        for c in chats
    ]


class Contender:
    def __init__(self, stage, way, shape, pad, device):
        self.stage, self.way, self.pad = stage, way, pad
        self.model = fresh(shape, 0, device)
        self.optimizer = Optimizer(self.model, 1e-4, betas=(0.9, 0.95))
        self.reference = fresh(shape, 1, device) if way == "no cache" else None
        everything = 2**40  # the batch at once, however long it is padded
        self.config = dpo.Config(init="", data="", out="", beta=0.1, micro_batch_tokens=everything)

    def gradient(self, pairs, ref_logps):
        """Leave the gradient of the mean loss over the pairs in the model; returns that loss.

        ref_logps fp32 [P, 2]: the reference's."""
        chats = [pair[0] for pair in pairs] if self.stage == "SFT" else [side for pair in pairs for side in pair]
        if self.way == "padded":
            chats = fill_up(chats, self.pad)
        if self.stage == "SFT":
            return sft.mean_nll(self.model, chats, self.config.micro_batch_tokens)
        items = list(zip(chats[::2], chats[1::2]))
        if self.way == "no cache":
            ref_logps = dpo.all_logps(self.reference, items, self.config.micro_batch_tokens)
        self.model.train()
        return dpo.run_batch(self.model, items, torch.ones(len(items)), ref_logps, self.config)["loss"]

    def step(self, batch):
        loss = self.gradient(*batch)
        self.optimizer.step(1.0, self.config.max_grad_norm)
        return loss


def growth(stage, way, shape, pad, batches, device_name):
    """Peak bytes that training adds to this process."""
    device = setup(device_name, 0)
    prove(device)
    contender = Contender(stage, way, shape, pad, device)
    before = memory(device)
    forget_peak(device)
    for batch in batches:
        contender.step(batch)
    return memory(device, peak=True) - before


def difference(a, b, batch):
    """How far apart two contenders' losses and gradients on a batch are, relative to the largest
    gradient of each parameter."""
    losses = [c.gradient(*batch) for c in (a, b)]
    apart = max(
        ((p.grad - q.grad).abs().max() / p.grad.abs().max()).item()
        for p, q in zip(a.model.parameters(), b.model.parameters())
    )
    for c in (a, b):
        c.optimizer.zero_grad()
    return losses, apart


# --------------------------------------------------------------------------------------------------


def main(config):
    device = setup(config.device, config.seed)
    off = prove(device)
    rows, _ = data_rows.read(config.data, data_rows.preference, skip_bad=True)
    tok = tokenizer.train((f"{r.prompt[-1]['content']}\n{r.chosen}\n{r.rejected}" for r in rows), config.vocab)
    items = [chat.encode_pair(tok, row) for row in rows]
    items = [items[i] for i in chat.fitting_pairs(items, config.context, config.data)]
    needed = config.pairs * (config.steps + 1)
    if len(items) < needed:
        raise UserError(
            f"{config.data}: {len(items)} pairs; {needed} are needed for one step more than --steps={config.steps} of "
            f"--pairs={config.pairs}"
        )
    shape = config_for(config.depth, tok.n_vocab, config.width, context=config.context)
    order = np.random.default_rng(config.seed).permutation(len(items))
    reference, batches = fresh(shape, 1, device), []
    for begin in range(0, needed, config.pairs):
        pairs = [items[i] for i in order[begin : begin + config.pairs]]
        batches.append((pairs, dpo.all_logps(reference, pairs, 2**40)))
    del reference
    # [steps x pairs, 2]; the first batch warms up
    lengths = np.array([[len(side.ids) for side in pair] for pairs, _ in batches[1:] for pair in pairs])
    tokens = {"DPO": int(lengths.sum()), "SFT": int(lengths[:, 0].sum())}
    by_batch = lengths.reshape(config.steps, -1)
    real = by_batch.sum() / (by_batch.max(1) * by_batch.shape[1]).sum()
    print(f"{describe(device)}; kernels switched off: {off}")
    print(f"{len(items):,} pairs; {config.depth} layers, width {shape.width}, {tok.n_vocab} ids")
    padded = f"{real:.0%} of a padded batch of {config.pairs} pairs are real tokens"
    print(f"{lengths.mean():.0f} tokens per side; {padded}")

    # 1. The same loss, the same gradients
    contenders = {(stage, way): Contender(stage, way, shape, tok.pad, device) for stage, way in CONTENDERS}
    worst = 3e-2 if device.type == "cuda" else 1e-4  # bf16 products there
    for stage, other in (("DPO", "padded"), ("SFT", "padded"), ("DPO", "no cache")):
        (loss, other_loss), apart_by = difference(contenders[stage, "packed"], contenders[stage, other], batches[0])
        print(f"{stage}: loss {loss:.7f} packed, {other_loss:.7f} {other}")
        print(f"{stage}: gradients differ by {apart_by:.1e} of the largest")
        if abs(loss - other_loss) > worst * abs(loss) or apart_by > worst:
            raise UserError(
                f"{stage}, {other}: these losses or gradients are not the packed ones, so times would compare "
                "different things"
            )

    # 2. In turns
    seconds = {key: [] for key in contenders}
    for i, batch in enumerate(batches):
        keys = list(contenders)
        for key in keys[i % len(keys) :] + keys[: i % len(keys)]:
            begin = clock(device)
            contenders[key].step(batch)
            if i:
                seconds[key].append(clock(device) - begin)
    del contenders

    # 3. Memory, and the table
    result = {"real_share_of_padded": float(real)}
    head = f"{'':<16} {'tokens/s':>9} {'ms a step':>10} {'speed':>6} {'MiB':>7} {'memory':>7}"
    print(f"\n{head}   speed and memory: packed against this one")
    peaks = {key: apart(growth, *key, shape, tok.pad, batches[:4], str(device)) for key in CONTENDERS}
    for stage, way in CONTENDERS:
        ours, theirs = seconds[stage, "packed"], seconds[stage, way]
        row = {
            "tokens_per_s": tokens[stage] / sum(theirs),
            "ms": 1e3 * sum(theirs) / config.steps,
            "mib": peaks[stage, way] / 2**20,
            "speed": statistics.median(t / o for t, o in zip(theirs, ours)),
            "memory": peaks[stage, "packed"] / peaks[stage, way],
        }
        result[f"{stage} {way}"] = row
        speed = f"{row['tokens_per_s']:>9,.0f} {row['ms']:>10.1f} {row['speed']:>6.2f}"
        print(f"{stage + ' ' + way:<16} {speed} {row['mib']:>7.0f} {row['memory']:>7.2f}")

    # 4. What keeping the reference's log-probabilities saves: of E epochs one forward of every pair
    # for that of E - 1.
    more = result["DPO no cache"]["speed"] - 1
    saved = {"of_a_cached_step": more} | {f"of_{e}_epochs": (e - 1) / e * more / (1 + more) for e in (1, 2, 3, 10)}
    print(
        f"the reference's forward takes {more:.1%} of a step that has it cached; the cache saves "
        + ", ".join(f"{saved[f'of_{e}_epochs']:.1%} of {e} epoch{'s' * (e > 1)}" for e in (1, 2, 3, 10))
    )
    reached = {f"{stage} packed": result[f"{stage} padded"]["speed"] >= ASKED["speed"] for stage in ("DPO", "SFT")} | {
        "cache": more >= ASKED["saved"]
    }
    print(json.dumps(result | {"saved": saved, "asked": ASKED, "reached": reached}))


if __name__ == "__main__":
    launch(main, Config)
