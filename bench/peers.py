"""Other people's libraries on our weights, our tokenizer and our data, in the same run: what one gives up, or gains, by using this repository.

    dpo     TRL's DPOTrainer: the same batches in the same order, the same AdamW, rates, clipping, fp32 (bf16 on a GPU); its losses must be ours. It runs
            as its users would run it on such a machine (no gradient checkpointing, no padding to multiples), with the reference's log-probabilities
            computed in every step, its default, and before the first one; the better of the two is compared with ours

Every contender has a process of its own, one after the other, --rounds times, and its fastest turn counts. Seconds are from texts and loaded weights to the
end of the last step: tokenizing, the reference's pass and training, not imports. Tokens are real tokens, without padding, of the training steps. Memory is
the whole process at its peak, and what was added after imports and weights; on a GPU both are what PyTorch allocated. Last line of output: JSON.

    python -m bench.peers --data=../shared/realdata/ai_preferences_train.jsonl      pip install trl transformers, or the extra "peers"
"""
import hashlib, importlib.metadata, json, logging, os, tempfile, time, warnings
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint, dpo
from bench.preference import apart, clock, fresh, memory
from common import UserError, describe, launch, setup
from data import chat, tokenizer
from kernels import _lib
from model import config_for
from optim import Optimizer, wsd


@dataclass
class Config:
    data: str  # preferences, of which the first --pairs that fit are used: .jsonl, .parquet or hf:NAME (see data/chat.py)
    only: str = ""  # contests to hold, comma-separated: dpo; "": all
    pairs: int = 160
    batch: int = 16  # pairs a step
    depth: int = 4  # layers
    width: int = 256  # of the model
    vocab: int = 4096  # ids of the tokenizer, which is trained on the file
    context: int = 1024  # tokens
    lr: float = 1e-4  # at the first step, falling to 0
    rounds: int = 2  # turns each contender has
    device: str = "auto"  # auto, cpu, cuda


BETAS, EPS, BETA, CLIP = (0.9, 0.95), 1e-10, 0.1, 1.0  # AdamW's (EPS is optim.py's), DPO's, and the largest gradient norm
ASKED = {"speed": 5.0, "memory": 0.5, "first_loss": 1e-5, "losses": 1e-3}  # times TRL's tokens/s, its peak, and how far losses may lie apart


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
        seconds, cpu_seconds, peak = clock(self.device) - self.start, time.process_time() - self.cpu_start, memory(self.device, peak=True)
        versions = {name: importlib.metadata.version(name) for name in packages}
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak, "added": peak - self.held, "losses": self.losses, "batches": self.batches, "versions": versions}


# ---------------------------------------------------------------------------------------------------------------------------------
# DPO


def our_dpo(config, folder, pairs):
    """dpo.py's functions in its order."""
    device = setup(config.device, 0)
    _lib.prove(device)
    model, tok, _ = checkpoint.load(folder, device)
    flags = dpo.Config(init="", data="", out="", beta=BETA)
    meter = Meter(device)
    meter.begin()
    items, known = dpo.read_items(tok, pairs, False)
    known, ref_logps = torch.tensor(known, dtype=torch.float32), dpo.all_logps(model, items, flags.micro_tokens)
    optimizer = Optimizer(model, config.lr, betas=BETAS)
    steps = len(items) // config.batch
    for step in range(steps):
        batch = slice(step * config.batch, (step + 1) * config.batch)
        loss = dpo.train_step(model, items[batch], known[batch], ref_logps[batch], flags)[0]
        optimizer.step(wsd(step, steps, 0, steps), CLIP)
        meter.step(loss.item(), np.concatenate([item[side].ids for side in (0, 1) for item in items[batch]]))
    return meter.end("torch")


def trl_dpo(config, folder, pairs, precompute):
    """TRL's trainer; precompute: whether the reference's log-probabilities are computed before the first step."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import datasets, transformers
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars(), transformers.utils.logging.disable_progress_bar()
    device = torch.device(config.device)  # without `setup`: what that does to PyTorch and to the C library, its users do not do
    model, tok = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), transformers.AutoTokenizer.from_pretrained(folder)
    message = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = [{"prompt": pair.prompt, "chosen": message(pair.chosen), "rejected": message(pair.rejected)} for pair in pairs]
    meter = Meter(device)

    class Trainer(DPOTrainer):
        def compute_loss(self, model, inputs, *rest, **more):
            loss = super().compute_loss(model, inputs, *rest, **more)
            meter.step(float(loss.detach()), inputs["input_ids"][inputs["attention_mask"].bool()].cpu())
            return loss

    with tempfile.TemporaryDirectory() as out:
        flags = DPOConfig(
            out, use_cpu=device.type == "cpu", bf16=device.type == "cuda", gradient_checkpointing=False, max_length=config.context,
            per_device_train_batch_size=config.batch, num_train_epochs=1, train_sampling_strategy="sequential", precompute_ref_log_probs=precompute,
            learning_rate=config.lr, lr_scheduler_type="linear", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, weight_decay=0.0, max_grad_norm=CLIP, beta=BETA,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        meter.begin()
        trainer = Trainer(model, args=flags, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return meter.end("trl", "transformers", "torch")


def dpo_contest(config):
    """{contender: row} and what was asked of ours, after all have trained the same model on the same pairs."""
    if config.pairs % config.batch:
        raise UserError(f"--pairs={config.pairs}: whole batches of --batch={config.batch} are needed, for the two may end an epoch differently")
    rows, _ = chat.read(config.data, chat.preference, skip_bad=True)
    tok = tokenizer.train((f"{r.prompt[-1]['content']}\n{r.chosen}\n{r.rejected}" for r in rows), config.vocab)
    pairs = [r for r in rows[: 4 * config.pairs] if all(len(side.ids) <= config.context for side in dpo.read_items(tok, [r], False)[0][0])][: config.pairs]
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
            raise UserError("the two did not see the same tokens in the same order, so times would compare different things")
    tokens = sum(n for n, _ in ours["batches"])
    print(f"\ndpo: {len(pairs)} pairs, {tokens:,} tokens, {len(ours['losses'])} steps of {config.batch} pairs; {shape.layers} layers, width {shape.width}, {shape.vocab_size} ids; {theirs[0]['versions']}")
    print(f"{'':<22} {'tokens/s':>9} {'seconds':>8} {'peak MiB':>9} {'added MiB':>10}   losses of the first steps, and of the last")
    for name, row in found.items():
        row["tokens_per_s"] = tokens / row["seconds"]
        shown = " ".join(f"{loss:.6f}" for loss in [*row["losses"][:3], row["losses"][-1]])
        print(f"{name:<22} {row['tokens_per_s']:>9,.0f} {row['seconds']:>8.2f} {row['peak'] / 2**20:>9.0f} {row['added'] / 2**20:>10.0f}   {shown}")
    apart_by = [max(abs(a - b) for a, b in zip(ours["losses"][:n], other["losses"][:n])) for n in (1, 3, None) for other in theirs]
    compared = {
        "speed": min(other["seconds"] for other in theirs) / ours["seconds"], "memory": ours["peak"] / min(other["peak"] for other in theirs),
        "added": ours["added"] / min(other["added"] for other in theirs),
        "first_loss": max(apart_by[:2]), "losses": max(apart_by[2:4]), "all_losses": max(apart_by[4:]),
    }  # fmt: skip
    reached = {key: compared[key] >= asked if key == "speed" else compared[key] <= asked for key, asked in ASKED.items()}
    print(f"against TRL's better: {compared['speed']:.2f} times as fast, {compared['memory']:.2f} of its peak memory ({compared['added']:.2f} of what is added); losses differ by {compared['first_loss']:.1e} at the first step, {compared['losses']:.1e} over three, {compared['all_losses']:.1e} over all")
    return {"contenders": {name: {k: v for k, v in row.items() if k != "batches"} for name, row in found.items()}, **compared, "reached": reached}


CONTESTS = {"dpo": dpo_contest}


def main(config):
    names = config.only.split(",") if config.only else list(CONTESTS)
    for name in names:
        if name not in CONTESTS:
            raise UserError(f"--only={config.only}: expected some of {', '.join(CONTESTS)}")
    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("TRL is not installed: pip install trl transformers") from None
    device = setup(config.device, 0)
    config.device = str(device)
    print(describe(device), flush=True)
    print(json.dumps({name: CONTESTS[name](config) for name in names} | {"asked": ASKED}))


if __name__ == "__main__":
    launch(main, Config)
