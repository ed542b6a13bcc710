"""The field's best-known small run, and ours beside it in the same process: character-level
Shakespeare, nanoGPT's CPU or GPU size.

90/10 split by characters, the characters of the whole file as vocabulary. --size=cpu: 4 layers,
width 128, 4 heads, context 64, 12 x 64 tokens a step, 2,000 steps. --size=gpu: 6 layers, width 384,
6 heads, context 256, 64 x 256 tokens, dropout 0.2, 5,000 steps. Three models train in turns of 50
steps, so that a noisy machine slows all alike:

    ours        pretrain.py's own functions at its default rates
    short       the same with a horizon of its own, only as long as it takes to pass the baseline's
                final loss
    baseline    nanoGPT's recipe, written plainly below: GPT-2 block with LayerNorm, learned
                positions, tied embedding, AdamW 1e-3, betas 0.9/0.99, cosine to 1e-4, warm-up 100

Validation is over the whole held-out split in windows of the context, for all three; its time, and
that of drawing batches, is not counted. Last line of output: JSON.

    python -m bench.shakespeare --text=shakespeare.txt
"""

import json
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import pretrain
from data import corpus, tokenizer
from data.read import read_text
from optim import wsd
from runtime.batches import text_order
from runtime.process import describe, launch, setup


@dataclass
class Config:
    # the file: 1,115,394 characters of Shakespeare
    text: str
    # char, byte, or whatever data/tokenizer.py loads
    tokenizer: str = "char"
    # cpu or gpu: nanoGPT's two well-known runs
    size: str = "cpu"
    # 0: the size's own
    steps: int = 0
    # horizon of the short run, as a share of the steps
    short: float = 0.125
    seed: int = 1337
    device: str = "auto"


SIZES = {  # layers, width, heads, context, sequences a step, dropout, steps
    "cpu": (4, 128, 4, 64, 12, 0.0, 2000),
    "gpu": (6, 384, 6, 256, 64, 0.2, 5000),
}


# --------------------------------------------------------------------------------------------------
# The baseline: nanoGPT's model.py and train.py at their Shakespeare settings, as plainly as it can
# be said


class BaselineBlock(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.heads, -1).transpose(1, 2) for z in self.attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p if self.training else 0.0)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)), self.p, self.training)
        return x + F.dropout(self.out(F.gelu(self.fc(self.ln_2(x)))), self.p, self.training)


class Baseline(nn.Module):
    def __init__(self, vocab, layers, width, heads, context, dropout):
        super().__init__()
        self.wte, self.wpe, self.p = nn.Embedding(vocab, width), nn.Embedding(context, width), dropout
        self.blocks = nn.Sequential(*(BaselineBlock(width, heads, dropout) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * layers) if name.endswith(("proj.weight", "out.weight")) else 0.02
                )

    def forward(self, x, y):
        h = F.dropout(self.wte(x) + self.wpe.weight[: x.shape[1]], self.p, self.training)
        logits = F.linear(self.ln_f(self.blocks(h)), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


class BaselineRun:
    def __init__(self, config, size, streams, device, tok):
        layers, width, heads, self.context, self.sequences, dropout, self.steps = size
        self.train, self.val = (torch.from_numpy(s).long() for s in streams)
        self.device, self.seconds, self.done = device, 0.0, 0
        self.model = Baseline(tok.n_vocab, layers, width, heads, self.context, dropout).to(device)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        if device.type == "cuda":
            self.model.compile()

    def loss(self, x, y):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(x, y)

    def advance(self, steps):
        for _ in range(min(steps, self.steps - self.done)):
            at = torch.randint(len(self.train) - self.context, (self.sequences,), generator=self.generator)
            x = torch.stack([self.train[i : i + self.context] for i in at]).to(self.device)
            y = torch.stack([self.train[i + 1 : i + 1 + self.context] for i in at]).to(self.device)
            begin = clock(self.device)
            cosine = 0.5 * (1 + math.cos(math.pi * max(0, self.done - 100) / max(1, self.steps - 100)))
            for g in self.optimizer.param_groups:
                g["lr"] = 1e-3 * (self.done + 1) / 101 if self.done < 100 else 1e-4 + cosine * 9e-4
            self.loss(x, y).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.seconds += clock(self.device) - begin
            self.done += 1

    @torch.no_grad()
    def validate(self):
        self.model.eval()
        rows = (len(self.val) - 1) // self.context
        x, y = (self.val[o : o + rows * self.context].view(rows, self.context) for o in (0, 1))
        total = sum(
            self.loss(a.to(self.device), b.to(self.device)).item() * len(a) for a, b in zip(x.split(64), y.split(64))
        )
        self.model.train()
        return total / rows


# --------------------------------------------------------------------------------------------------
# Ours: what pretrain.py runs


class OurRun:
    def __init__(self, config, size, streams, device, tok, steps):
        layers, width, heads, context, sequences, dropout, _ = size
        flags = dict(
            depth=layers,
            width=width,
            heads=heads,
            context=context,
            batch_tokens=sequences * context,
            dropout=dropout,
            steps=steps,
            seed=config.seed,
        )
        self.config = pretrain.Config(data=config.text, out="", **flags)
        self.model = pretrain.make_model(self.config, tok).to(device)
        self.model.dropout = dropout
        self.optimizer = pretrain.make_optimizer(self.config, self.model)
        self.train, self.val = [streams[0]], [streams[1]]
        self.order = text_order(self.train, tok.eot, context, config.seed)
        self.val_pieces, self.sizes = corpus.pieces(self.val, tok.eot, context), tokenizer.token_bytes(tok)
        self.device, self.seconds, self.done = device, 0.0, 0
        if device.type == "cuda":
            self.model.compile()

    def advance(self, steps):
        for _ in range(min(steps, self.config.steps - self.done)):
            pieces = self.order.batch(self.config.batch_tokens)
            begin = clock(self.device)
            pretrain.mean_nll(self.model.train(), self.train, pieces, self.config.micro_batch_tokens)
            steps = self.config.steps
            lr_scale = wsd(self.done, steps, self.config.warmup, int(self.config.decay * steps))
            self.optimizer.step(lr_scale, self.config.max_grad_norm)
            self.seconds += clock(self.device) - begin
            self.done += 1

    def validate(self):
        return pretrain.evaluate(self.model, self.val, self.val_pieces, self.sizes, 16384)[0]


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(config):
    device = setup(config.device, config.seed)
    size = SIZES[config.size]
    if config.steps:
        size = (*size[:-1], config.steps)
    text = read_text(config.text)
    train, val = corpus.hold_out([text], 0.1)
    if config.tokenizer == "char":
        tok = tokenizer.characters(text)
    elif config.tokenizer == "byte":
        tok = tokenizer.byte_level()
    else:
        tok = tokenizer.load(config.tokenizer)
    streams = corpus.encode(tok, train), corpus.encode(tok, val)
    torch.manual_seed(config.seed)
    baseline = BaselineRun(config, size, streams, device, tok)
    ours = OurRun(config, size, streams, device, tok, size[-1])
    short = OurRun(config, size, streams, device, tok, int(config.short * size[-1]))
    outside = sum(p.numel() for p in ours.model.parameters()) - ours.model.embed.numel()
    in_all = sum(p.numel() for p in baseline.model.parameters())
    print(f"{describe(device)}; {outside:,} parameters outside the embedding; baseline {in_all:,} in all")
    for done in range(50, size[-1] + 50, 50):
        for run in (baseline, ours, short):
            run.advance(50)
        if done % 250 == 0 or done >= size[-1]:
            print(
                f"step {min(done, size[-1])}: val ours {ours.validate():.4f}, baseline {baseline.validate():.4f}",
                flush=True,
            )
    val, baseline_val, short_val = ours.validate(), baseline.validate(), short.validate()
    reached = short_val <= baseline_val
    share = short.seconds / baseline.seconds
    text = f"short run: {short.config.steps} steps to {short_val:.4f} in {short.seconds:.1f} s"
    print(f"{text}, {share:.3f} of the baseline's time" + ("" if reached else ": NOT at the baseline's loss"))
    found = {
        "val": round(val, 4),
        "baseline_val": round(baseline_val, 4),
        "ms": round(1e3 * ours.seconds / size[-1], 2),
        "baseline_ms": round(1e3 * baseline.seconds / size[-1], 2),
        "seconds_to_baseline": round(short.seconds, 2) if reached else None,
        "baseline_seconds": round(baseline.seconds, 2),
    }
    print(json.dumps(found))
    if not reached:
        sys.exit(1)


if __name__ == "__main__":
    launch(main, Config)
