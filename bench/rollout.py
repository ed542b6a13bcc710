"""New tokens per second of rollout.py's sampler, against the loops people write, in the same run.

    rollout        rollout.py: refilled slots, a cache laid out once, on CUDA a captured graph
    plain          the loop of most RL scripts, written below: the batch in step, keys and values by
                   torch.cat, until its last completion has ended
    transformers   its generate on the checkpoint's own files, if it is installed

All draw from the same weights, at temperature 1 without cuts, the same number of completions,
--slots at once, to prompts of one length, so that none needs padding. Twice: every completion has
--new tokens; or lengths vary, because some tokens end a completion: the lengths are geometric, a
third of --new on average, and none is longer than --new. Greedy completions are compared first.
Contenders take turns after one that warms up (on CUDA: that compiles), and the fastest counts. Only
tokens up to a completion's end count. The floor is the time that reading the weights once per step,
and the keys and values of each live sequence, takes at the GPU's bandwidth. On a CPU it prints
first where the time of one step goes. Last line of output: JSON.

    python -m bench.rollout
    python -m bench.rollout --depth=12 --width=768 --vocab=50304 --slots=16,128,512 --news=256
"""

import contextlib
import importlib.util
import json
import os
import pkgutil
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from bench.preference import clock, fresh
from data import tokenizer
from kernels.proof import prove
from model import config_for
from rollout import Sampler, rollout, sampling_weights
from runtime import checkpoint
from runtime.cli import check_ranges
from runtime.errors import UserError
from runtime.process import describe, launch, setup


@dataclass
class Config:
    # layers [>= 1]
    depth: int = 4
    # width of the model [>= 1]
    width: int = 256
    # token ids, at least those of bytes
    vocab: int = 4096
    # completions at once; the first of each list is what the others are varied from
    slots: str = "32,8,128"
    # tokens of a prompt
    prompts: str = "64,256"
    # tokens of a completion, at most
    news: str = "64,256"
    # completions per slot [>= 1]
    waves: int = 4
    # timed turns of each contender [>= 1]
    rounds: int = 2
    # seed of the prompts and of the draws
    seed: int = 0
    # auto, cpu, cuda, cuda:1
    device: str = "auto"


ASKED = 1.5  # times the plain loop's tokens/s if lengths vary
BANDWIDTH = {  # TB/s, of the data sheets
    **{"B200": 8.0, "H200": 4.8, "GH200": 4.0, "H100 PCIe": 2.04, "H100 NVL": 3.94, "H100": 3.35},
    **{"A100-SXM4-80GB": 2.04, "A100 80GB PCIe": 1.94, "A100": 1.56, "L40S": 0.864, "L4": 0.3, "A10": 0.6},
    **{"V100": 0.9, "T4": 0.32, "RTX 5090": 1.79, "RTX 4090": 1.01, "RTX 3090": 0.936},
}


def bandwidth(device):
    """Bytes per second of this GPU's memory, or None if that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [key for key in BANDWIDTH if key in name]
    return 1e12 * BANDWIDTH[max(known, key=len)] if known else None


# -------------------------------------------------------------------------------------------------
# The plain loop


class Plain:
    """One batch of a model's weights through ordinary PyTorch."""

    def __init__(self, model):
        self.config, self.model = model.config, sampling_weights(model)

    def norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.config.norm_eps)

    def rotate(self, x, start):
        """x [B, H, T, Dh] at positions `start` and on."""
        tables = self.model.cos, self.model.sin
        cos, sin = (table[start : start + x.shape[2]].to(x.dtype) for table in tables)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def attend(self, attn, x, past):
        """x [B, T, C], the layer's (k, v) so far or None -> (what it adds to x, the new (k, v))."""
        c, start = self.config, past[0].shape[2] if past else 0
        parts = F.linear(x, attn.qkv).split(c.qkv_rows, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for part in parts)  # [B, H, T, Dh]
        q, k = self.rotate(self.norm(q, attn.q_norm), start), self.rotate(self.norm(k, attn.k_norm), start)
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not past, enable_gqa=c.heads != c.kv_heads)
        return F.linear(y.transpose(1, 2).flatten(2), attn.out), (k, v)

    def forward(self, tokens, cache):
        """tokens [B, T], a (k, v) or None per layer -> (logits [B, V] after the last, that
        cache)."""
        x, grown = F.embedding(tokens, self.model.embed).to(self.model.compute_dtype), []
        for block, past in zip(self.model.blocks, cache, strict=True):
            y, kept = self.attend(block.attn, self.norm(x, block.attn_norm), past)
            grown.append(kept)
            x = x + y
            gate, up = F.linear(self.norm(x, block.mlp_norm), block.mlp.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, block.mlp.down)
        last = self.norm(x[:, -1], self.model.norm)
        return F.linear(last, self.model.head.to(x.dtype)).float(), grown

    @torch.no_grad()
    def sample(self, prompts, new, stop, greedy=False):
        """(tokens [B, at most `new`], log-probabilities)."""
        device = self.model.embed.device
        stop = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
        logits, cache = self.forward(torch.tensor(prompts, device=device), [None] * self.config.layers)
        tokens, logps, done = [], [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
        while True:
            logp = logits.log_softmax(-1)
            token = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logp.exp(), 1)
            tokens.append(token)
            logps.append(logp.gather(1, token))
            done |= torch.isin(token[:, 0], stop)
            if len(tokens) == new or done.all():
                return torch.cat(tokens, dim=1), torch.cat(logps, dim=1)
            logits, cache = self.forward(token, cache)


# -------------------------------------------------------------------------------------------------
# Contenders: function(prompts, slots, new, stop, greedy, seed) -> the new tokens, up to a stop


def up_to_stop(tokens, stop):
    """A row of tokens up to its first stop."""
    return tokens[: next((t + 1 for t, token in enumerate(tokens) if token in stop), len(tokens))]


def ours(model, device):
    def run(prompts, slots, new, stop, greedy, seed):
        options = dict(temperature=0 if greedy else 1.0, stop=stop, seed=seed)
        return [s.tokens for s in rollout(model, prompts, max_new_tokens=new, slots=slots, **options)]

    return run


def plain(model, device):
    loop = Plain(model)

    def run(prompts, slots, new, stop, greedy, seed):
        torch.manual_seed(seed)
        completions = []
        for i in range(0, len(prompts), slots):
            tokens, _ = loop.sample(prompts[i : i + slots], new, stop, greedy)
            completions += [up_to_stop(row, stop) for row in tokens.tolist()]
        return completions

    return run


def transformers(model, device):
    """None if it is not installed."""
    if not importlib.util.find_spec("transformers"):
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(folder, model, tokenizer.byte_level(), {"stage": "pretrain", "step": 0})
        theirs = hf.AutoModelForCausalLM.from_pretrained(path, dtype=model.compute_dtype).to(device).eval()

    @torch.inference_mode()
    def run(prompts, slots, new, stop, greedy, seed):
        torch.manual_seed(seed)
        theirs.generation_config.eos_token_id = sorted(stop) or None
        options = dict(max_new_tokens=new, pad_token_id=0, use_cache=True, do_sample=not greedy)
        if not greedy:
            options |= dict(temperature=1.0, top_k=0, top_p=1.0)
        completions = []
        for i in range(0, len(prompts), slots):
            ids = torch.tensor(prompts[i : i + slots], device=device)
            out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            completions += [up_to_stop(row, stop) for row in out[:, ids.shape[1] :].tolist()]
        return completions

    return run


CONTENDERS = {"rollout": ours, "plain": plain, "transformers": transformers}


def check_same(contenders, prompts, new):
    """Raises UserError if greedy completions differ from the plain loop's by more than rounding."""
    case = (prompts[:8], 8, min(new, 16), set(), True, 0)
    expected = np.array(contenders["plain"](*case))
    for name, run in contenders.items():
        same = np.mean(np.array(run(*case)) == expected)
        if same < (0.8 if torch.cuda.is_available() else 0.95):
            raise UserError(
                f"{name}: only {same:.0%} of its greedy tokens are the plain loop's, so times would compare "
                "different things"
            )


# -------------------------------------------------------------------------------------------------
# Where a step's time goes, on a CPU

PARTS = {  # what a step calls; the rest of its time is Python, and tables of slots
    "products": ["model:linear", "rollout:linear"],
    "attention": ["model:decode_attention"],
    "small ops": ["model:add_rms_norm", "model:append_rope", "model:swiglu"],
    "drawing": ["rollout:draw"],
}


def step_parts(model, slots, prompts, steps):
    """{part: milliseconds} of one step of all slots, the mean of so many."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part, function):
        def run(*args):
            begin = time.perf_counter()
            found = function(*args)
            seconds[part] += time.perf_counter() - begin
            return found

        return run

    sampler = Sampler(model, slots, max(map(len, prompts)) + steps + 2)
    sampler.add(prompts, max_new_tokens=steps + 2)
    sampler.step(), sampler.step()  # reads the prompts, and warms up
    with contextlib.ExitStack() as stack:
        for part, functions in PARTS.items():
            for name in functions:
                stack.enter_context(mock.patch(name.replace(":", "."), timed(part, pkgutil.resolve_name(name))))
        begin = time.perf_counter()
        for _ in range(steps):
            sampler.step()
        total = time.perf_counter() - begin
    seconds["Python"] = total - sum(seconds.values())
    return {part: 1e3 * s / steps for part, s in seconds.items()}


# -------------------------------------------------------------------------------------------------
# The contest


def floor(model, lengths, slots, prompt, rate):
    """Seconds that memory needs: the weights read once per step, keys and values once per token."""
    c, size = model.config, model.compute_dtype.itemsize
    read_whole = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    if not c.tied:
        read_whole -= model.embed.numel()
    row = 2 * c.layers * c.kv_heads * c.head_dim * size
    read = sum(n * prompt + n * (n + 1) / 2 for n in lengths) * row
    return (size * read_whole * sum(lengths) / slots + read) / rate


def contest(model, contenders, slots, prompt, new, varying, config, device):
    """The rows of one case, ours first."""
    rng = np.random.default_rng([config.seed, slots, prompt, new])
    prompts = rng.integers(0, config.vocab, (config.waves * slots, prompt)).tolist()
    stop = set(range(max(1, round(3 * config.vocab / new)))) if varying else set()
    turns = {name: [] for name in contenders}  # [(tokens per second, seconds, lengths)]
    for i in range(config.rounds + 1):
        for name, run in contenders.items():
            begin = clock(device)
            lengths = [len(tokens) for tokens in run(prompts, slots, new, stop, False, config.seed + i)]
            seconds = clock(device) - begin
            turns[name].append((sum(lengths) / seconds, seconds, lengths))
    rows, rate = [], bandwidth(device)
    for name in contenders:
        speed, seconds, lengths = max(turns[name][1:])
        rows.append(
            {
                "slots": slots,
                "prompt": prompt,
                "new": new,
                "varying": varying,
                "contender": name,
                "tokens_per_s": speed,
                "seconds": seconds,
                "mean_length": float(np.mean(lengths)),
                "share_of_bandwidth": floor(model, lengths, slots, prompt, rate) / seconds if rate else None,
                "speed": rows[0]["tokens_per_s"] / speed if rows else 1.0,
            }
        )
    return rows


HEADER = (
    f"\n{'slots':>5} {'prompt':>6} {'new':>4} {'lengths':<8} {'mean':>6}  {'contender':<13} {'tokens/s':>9} "
    f"{'seconds':>8} {'speed':>6} {'of bandwidth':>7}   speed: ours against this one"
)


def shown(row):
    case = f"{row['slots']:>5} {row['prompt']:>6} {row['new']:>4} {'varying' if row['varying'] else 'equal':<8}"
    share = "" if row["share_of_bandwidth"] is None else f"{row['share_of_bandwidth']:.1%}"
    result = f"{row['tokens_per_s']:>9,.0f} {row['seconds']:>8.3f} {row['speed']:>6.2f} {share:>7}"
    return f"{case} {row['mean_length']:>6.1f}  {row['contender']:<13} {result}"


def cases(config):
    """[(slots, prompt, new)]: the first of each list together, then each other one in its place."""
    lists = [[int(x) for x in text.split(",")] for text in (config.slots, config.prompts, config.news)]
    base = [values[0] for values in lists]
    varied = [base[:i] + [value] + base[i + 1 :] for i, values in enumerate(lists) for value in values]
    return list(dict.fromkeys(map(tuple, varied)))


def main(config):
    check_ranges(config)
    if config.vocab < tokenizer.byte_level().n_vocab:
        raise UserError(f"--vocab={config.vocab}: the checkpoint's tokenizer has {tokenizer.byte_level().n_vocab} ids")
    device = setup(config.device, config.seed)
    off = prove(device)
    longest = max(prompt + new for _, prompt, new in cases(config))
    model = fresh(config_for(config.depth, config.vocab, config.width, context=longest), 0, device).eval()
    contenders = {name: run for name, make in CONTENDERS.items() if (run := make(model, device))}
    print(f"{describe(device)}; kernels switched off: {off}")
    print(
        f"{config.depth} layers, width {config.width}, {config.vocab} ids, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {config.waves} completions per slot; "
        f"{torch.get_num_threads()} threads on the CPU"
    )
    slots, prompt, new = cases(config)[0]
    parts = {}
    if device.type == "cpu":
        prompts = np.random.default_rng(config.seed).integers(0, config.vocab, (slots, prompt)).tolist()
        parts = step_parts(model, slots, prompts, new - 2)
        shares = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items())
        print(f"a step of {slots} slots takes {sum(parts.values()):.2f} ms: {shares}")
    check_same(contenders, np.random.default_rng(config.seed).integers(0, config.vocab, (8, prompt)).tolist(), new)
    print(HEADER, flush=True)
    rows = []
    for varying in (False, True):
        for slots, prompt, new in cases(config):
            case = contest(model, contenders, slots, prompt, new, varying, config, device)
            print("\n".join(map(shown, case)), flush=True)
            rows += case
    against = {}
    for row in rows:
        if row["varying"] and row["contender"] != "rollout":
            against.setdefault(row["contender"], []).append(row["speed"])
    for name, speeds in against.items():
        print(f"if lengths vary: {min(speeds):.2f} to {max(speeds):.2f} times {name}")
    print(json.dumps({"rows": rows, "step_ms": parts, "asked": ASKED, "reached": min(against["plain"]) >= ASKED}))


if __name__ == "__main__":
    launch(main, Config)
