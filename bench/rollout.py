"""New tokens a second of rollout.py's engine, against the loops people write, in the same run.

    rollout        rollout.py: slots that are refilled, a cache laid out once, on CUDA a captured graph
    plain          the loop of most RL scripts, written below: the batch in step, keys and values by torch.cat, until its last answer has ended
    transformers   its generate on the checkpoint's own files, where it is installed

All draw from the same weights, at temperature 1 without cuts, the same number of answers, --slots at once, to prompts of one length, so that none needs padding. Twice: every
answer has --new tokens; or lengths vary, for some tokens end an answer: the lengths are geometric, a third of --new on average, and no answer is longer than --new.
Greedy continuations are compared first. Contenders take turns after one that warms up (on CUDA: that compiles), and the fastest counts. Only tokens up to an answer's end count.
The floor is the time that reading the weights once a step, and each live sequence's keys and values, takes at the GPU's bandwidth. Last line of output: JSON.

    python -m bench.rollout
    python -m bench.rollout --depth=12 --width=768 --vocab=50304 --slots=16,128,512 --news=256
"""
import importlib.util, json, os, tempfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from bench.preference import clock, fresh
from common import UserError, describe, launch, setup
from data import tokenizer
from kernels import _lib
from model import config_for
from rollout import rollout, sampling_weights


@dataclass
class Config:
    # layers
    depth: int = 4
    # of the model
    width: int = 256
    # ids, those of bytes at the least
    vocab: int = 4096
    # answers at once; the first of each list is what the others are varied from
    slots: str = "32,8,128"
    # tokens of a prompt
    prompts: str = "64,256"
    # tokens of an answer, at most
    news: str = "64,256"
    # answers a slot
    waves: int = 4
    # timed turns of each contender
    rounds: int = 2
    # of the prompts and of the draws
    seed: int = 0
    # auto, cpu, cuda, cuda:1
    device: str = "auto"


ASKED = 1.5  # times the plain loop's tokens/s where lengths vary
BANDWIDTH = {  # bytes a second, of the data sheets
    "B200": 8.0e12, "H200": 4.8e12, "GH200": 4.0e12, "H100 PCIe": 2.04e12, "H100 NVL": 3.94e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.04e12, "A100 80GB PCIe": 1.94e12, "A100": 1.56e12,
    "L40S": 0.864e12, "L4": 0.3e12, "A10": 0.6e12, "V100": 0.9e12, "T4": 0.32e12, "RTX 5090": 1.79e12, "RTX 4090": 1.01e12, "RTX 3090": 0.936e12,
}


def bandwidth(device):
    """Of this GPU, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [key for key in BANDWIDTH if key in name]
    return BANDWIDTH[max(known, key=len)] if known else None


# ---------------------------------------------------------------------------------------------------------------------------------
# The plain loop


class Plain:
    """One batch of a model's weights through ordinary PyTorch."""

    def __init__(self, model):
        self.c, self.m = model.config, sampling_weights(model)

    def turn(self, x, start):
        """x [B, H, T, Dh] at positions `start` and on."""
        cos, sin = (table[start : start + x.shape[2]].to(x.dtype) for table in (self.m.cos, self.m.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, tokens, cache):
        """tokens [B, T], cache: [(k, v), ...] or [None, ...] -> logits [B, V] after the last, and the cache that has grown."""
        c, grown = self.c, []
        x = F.embedding(tokens, self.m.embed).to(self.m.compute_dtype)
        start = 0 if cache[0] is None else cache[0][0].shape[2]
        norm = lambda x, weight: F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), c.norm_eps)  # noqa: E731
        for block, held in zip(self.m.blocks, cache):
            q, k, v = (z.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for z in F.linear(norm(x, block.attn_norm), block.qkv).split(c.qkv_rows, dim=-1))
            q, k = self.turn(norm(q, block.q_norm), start), self.turn(norm(k, block.k_norm), start)
            if held is not None:
                k, v = torch.cat([held[0], k], dim=2), torch.cat([held[1], v], dim=2)
            grown.append((k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=held is None, enable_gqa=c.heads != c.kv_heads)
            x = x + F.linear(y.transpose(1, 2).flatten(2), block.out)
            gate, up = F.linear(norm(x, block.mlp_norm), block.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, block.down)
        return F.linear(norm(x[:, -1], self.m.norm), self.m.head.to(x.dtype)).float(), grown

    @torch.no_grad()
    def sample(self, prompts, new, stop, greedy=False):
        """(tokens [B, at most `new`], log-probabilities)."""
        device = self.m.embed.device
        stop = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
        logits, cache = self.forward(torch.tensor(prompts, device=device), [None] * self.c.layers)
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


# ---------------------------------------------------------------------------------------------------------------------------------
# Contenders: function(prompts, slots, new, stop, greedy, seed) -> lists of the new tokens, up to a stop


def cut(tokens, stop):
    """A row of tokens up to its first stop."""
    return tokens[: next((t + 1 for t, token in enumerate(tokens) if token in stop), len(tokens))]


def ours(model, device):
    def run(prompts, slots, new, stop, greedy, seed):
        return [s.tokens for s in rollout(model, prompts, max_new=new, temperature=0 if greedy else 1.0, stop=stop, seed=seed, slots=slots)]

    return run


def plain(model, device):
    loop = Plain(model)

    def run(prompts, slots, new, stop, greedy, seed):
        torch.manual_seed(seed)
        return [cut(row, stop) for i in range(0, len(prompts), slots) for row in loop.sample(prompts[i : i + slots], new, stop, greedy)[0].tolist()]

    return run


def transformers(model, device):
    """None where it is not installed."""
    if not importlib.util.find_spec("transformers"):
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers as hf

    hf.utils.logging.set_verbosity_error(), hf.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tok = tokenizer.byte_level()
        path = checkpoint.save(folder, model, tok, {"stage": "pretrain", "step": 0})
        theirs = hf.AutoModelForCausalLM.from_pretrained(path, dtype=model.compute_dtype).to(device).eval()

    @torch.inference_mode()
    def run(prompts, slots, new, stop, greedy, seed):
        torch.manual_seed(seed)
        theirs.generation_config.eos_token_id = sorted(stop) or None
        how, found = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0), []
        for i in range(0, len(prompts), slots):
            ids = torch.tensor(prompts[i : i + slots], device=device)
            out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, use_cache=True, **how)
            found += [cut(row, stop) for row in out[:, ids.shape[1] :].tolist()]
        return found

    return run


CONTENDERS = {"rollout": ours, "plain": plain, "transformers": transformers}


def check_same(contenders, prompts, new):
    """UserError where greedy continuations are not those of the plain loop, but for what rounding turns."""
    how = (prompts[:8], 8, min(new, 16), set(), True, 0)
    truth = contenders["plain"](*how)
    for name, run in contenders.items():
        same = np.mean([a == b for one, other in zip(run(*how), truth) for a, b in zip(one, other)])
        if same < (0.8 if torch.cuda.is_available() else 0.95):
            raise UserError(f"{name}: only {same:.0%} of its greedy tokens are the plain loop's, so times would compare different things")


# ---------------------------------------------------------------------------------------------------------------------------------
# The contest


def floor(model, lengths, slots, prompt, rate):
    """Seconds that memory needs: the weights read once a step, keys and values once a token."""
    c, size = model.config, model.compute_dtype.itemsize
    weights = size * (sum(p.numel() for p in model.parameters() if p.dim() > 1) - (0 if c.tied else model.embed.numel()))
    row = 2 * c.layers * c.kv_heads * c.head_dim * size
    read = sum(n * prompt + n * (n + 1) / 2 for n in lengths) * row
    return (weights * sum(lengths) / slots + read) / rate


def contest(model, contenders, slots, prompt, new, varying, config, device):
    """The rows of one case, ours first."""
    rng = np.random.default_rng([config.seed, slots, prompt, new])
    prompts = rng.integers(0, config.vocab, (config.waves * slots, prompt)).tolist()
    stop = set(range(max(1, round(3 * config.vocab / new)))) if varying else set()
    seconds, tokens = {name: [] for name in contenders}, {name: [] for name in contenders}
    for i in range(config.rounds + 1):
        for name, run in contenders.items():
            begin = clock(device)
            found = run(prompts, slots, new, stop, False, config.seed + i)
            seconds[name].append(clock(device) - begin)
            tokens[name].append([len(t) for t in found])
    rows = []
    for name in contenders:
        speed, i = max((sum(tokens[name][i]) / seconds[name][i], i) for i in range(1, config.rounds + 1))
        row = {"slots": slots, "prompt": prompt, "new": new, "varying": varying, "contender": name, "tokens_per_s": speed, "seconds": seconds[name][i], "mean_length": float(np.mean(tokens[name][i]))}
        row["share_of_bandwidth"] = floor(model, tokens[name][i], slots, prompt, bandwidth(device)) / row["seconds"] if bandwidth(device) else None
        rows.append(row | {"speed": rows[0]["tokens_per_s"] / speed if rows else 1.0})
    return rows


def shown(row):
    case = f"{row['slots']:>5} {row['prompt']:>6} {row['new']:>4} {'varying' if row['varying'] else 'equal':<8} {row['mean_length']:>6.1f}"
    share = "" if row["share_of_bandwidth"] is None else f"{row['share_of_bandwidth']:.1%}"
    return f"{case}  {row['contender']:<13} {row['tokens_per_s']:>9,.0f} {row['seconds']:>8.3f} {row['speed']:>6.2f} {share:>7}"


def cases(config):
    """(slots, prompt, new) to hold: the first of each list together, and then each of the others in the place of one of them."""
    lists = [[int(x) for x in text.split(",")] for text in (config.slots, config.prompts, config.news)]
    base = [values[0] for values in lists]
    return list(dict.fromkeys(tuple(base[:i] + [value] + base[i + 1 :]) for i, values in enumerate(lists) for value in values))


def main(config):
    if config.vocab < tokenizer.byte_level().n_vocab:
        raise UserError(f"--vocab={config.vocab}: the checkpoint's tokenizer has {tokenizer.byte_level().n_vocab} ids")
    device = setup(config.device, config.seed)
    off = _lib.prove(device)
    longest = max(prompt + new for _, prompt, new in cases(config))
    model = fresh(config_for(config.depth, config.vocab, config.width, context=longest), 0, device).eval()
    contenders = {name: run for name, make in CONTENDERS.items() if (run := make(model, device))}
    print(f"{describe(device)}; kernels switched off: {off}")
    print(f"{config.depth} layers, width {config.width}, {config.vocab} ids, {sum(p.numel() for p in model.parameters()):,} parameters; {config.waves} answers a slot; {torch.get_num_threads()} threads on the CPU")
    check_same(contenders, np.random.default_rng(config.seed).integers(0, config.vocab, (8, cases(config)[0][1])).tolist(), cases(config)[0][2])
    print(f"\n{'slots':>5} {'prompt':>6} {'new':>4} {'lengths':<8} {'mean':>6}  {'contender':<13} {'tokens/s':>9} {'seconds':>8} {'speed':>6} {'of bandwidth':>7}   speed: ours against this one", flush=True)
    rows = []
    for varying in (False, True):
        for slots, prompt, new in cases(config):
            rows += (case := contest(model, contenders, slots, prompt, new, varying, config, device))
            print("\n".join(map(shown, case)), flush=True)
    against = {row["contender"]: [other["speed"] for other in rows if other["varying"] and other["contender"] == row["contender"]] for row in rows if row["contender"] != "rollout"}
    print("where lengths vary: " + ", ".join(f"{min(speeds):.2f} to {max(speeds):.2f} times {name}" for name, speeds in against.items()))
    print(json.dumps({"rows": rows, "asked": ASKED, "reached": min(against["plain"]) >= ASKED}))


if __name__ == "__main__":
    launch(main, Config)
