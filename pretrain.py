"""Train: a language model from raw text, from nothing.

    minimise  -1/N sum_i log p(token_i | the tokens before it in its document)

Text goes straight in (--data=book.txt, --data=a.jsonl,b.txt), or prepared shards do (data/prepare.py). Validation is in nats a token and in bits a
byte, which no choice of tokenizer changes. Left out: curricula and other changes of the data on the way; the mixture is data/prepare.py's.

    python pretrain.py --data=shakespeare.txt --out=out/shakespeare --depth=4 --width=128 --context=64 --batch_tokens=768 --steps=2000
    python pretrain.py --data=out/data/world --out=out/base --depth=4
    torchrun --nproc_per_node=8 pretrain.py --data=out/data/fineweb --out=out/base --depth=12 --compile
    torchrun --nproc_per_node=8 pretrain.py --data=out/data/fineweb --out=out/base --depth=32 --shard=fsdp
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint, memory
from common import UserError, check, describe, launch, rank, reduce_sum, world_size
from data import corpus, prepare, tokenizer
from data.pack import fill, share, split
from kernels.head import IGNORE, linear_cross_entropy
from model import GPT, config_for
from optim import Optimizer, wsd
from rollout import stream
from shard import keep_company, shard, unsharded


@dataclass
class Config:
    data: str  # text files (.txt, .jsonl), comma-separated, or a directory written by data/prepare.py
    out: str  # directory of the run
    val: str = ""  # validation text files; "": hold out the end of the data (prepared data bring their own)
    val_fraction: float = 0.1  # how much of the text to hold out
    tokenizer: str = "char"  # for text files: char, byte, or whatever data/tokenizer.py loads (a directory, gpt2)
    init: str = ""  # checkpoint to go on from, with its tokenizer; "": fresh weights of the shape below
    depth: int = 4  # layers: the one dial; what is 0 below follows from it
    width: int = 0  # 0: 64 x depth
    heads: int = 0  # 0: width / 32, 64 or 128, by width
    kv_heads: int = 0  # 0: as many as heads
    ffn: int = 0  # 0: 8/3 width
    tied: bool = False  # one matrix for embedding and head
    context: int = 1024  # longest window of a document, in tokens
    dropout: float = 0.0  # for small corpora seen many times
    steps: int = 0  # optimizer steps; 0: 20 tokens a parameter (Chinchilla)
    batch_tokens: int = 0  # tokens an optimizer step, over all ranks; 0: 1024 x depth^2
    micro_tokens: int = 16384  # tokens a rank holds at once: memory, not the result (dropout's masks apart), depends on it
    checkpoint_activations: bool = False  # keep each block's input only, and compute the block again in the backward: less memory, more time, the same result
    lr: float = 0.02  # peak rate of Muon, for the trunk's matrices
    embed_lr: float = 0.0  # peak rate of AdamW for the embedding; 0: 0.3 (128 / width)^0.5, or the head's where they are tied
    head_lr: float = 0.0  # for the head; 0: 0.01 (128 / width)^0.5
    gain_lr: float = 0.01  # for the norms' gains
    momentum: float = 0.95  # of Muon
    weight_decay: float = 0.0  # of the trunk's matrices
    warmup: int = 0  # steps over which the rates rise
    decay: float = 0.6  # last share of the steps, over which they fall to 0
    clip: float = 0.0  # largest gradient norm let through; 0: any
    polar: str = "auto"  # precision of Muon's Newton-Schulz: bf16, fp32, or auto (bf16 where the processor is fast at it)
    seed: int = 0  # of weights, data order and samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    compile: bool = False  # torch.compile the model
    shard: str = ""  # fsdp: divide parameters, gradients and optimizer state over torchrun's ranks; "": each rank has them all
    print_every: int = 1  # steps between lines on the terminal; log.jsonl has every step
    eval_every: int = 250  # steps between validations (there is one at the end); 0: none between
    eval_tokens: int = 1_000_000  # at most so many validation tokens
    save_every: int = 1000  # steps between checkpoints (there is one at the end); 0: none between
    keep_last: int = 2  # checkpoints kept, besides the best
    sample_every: int = 500  # steps between samples in samples.txt; 0: none
    prompt: str = ""  # what the samples continue; "": they begin a document
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out


FREE = {"out", "resume", "overwrite", "device", "compile", "shard", "steps", "micro_tokens", "checkpoint_activations", "print_every", "eval_every", "eval_tokens", "save_every", "keep_last", "sample_every", "prompt"}


def check_flags(config):
    """UserError for a value that has the right type and no meaning."""
    rates = {name: 0 <= vars(config)[name] < float("inf") for name in ("embed_lr", "head_lr", "gain_lr", "weight_decay", "clip")}
    good = {**rates, "val_fraction": 0 < config.val_fraction < 1, "dropout": 0 <= config.dropout < 1, "decay": 0 <= config.decay <= 1, "lr": 0 < config.lr < float("inf"), "momentum": 0 <= config.momentum < 1,
            "keep_last": config.keep_last > 0, "print_every": config.print_every > 0, "seed": config.seed < 2**63, "polar": config.polar in ("auto", "bf16", "fp32"), "shard": config.shard in ("", "fsdp"),
            }  # fmt: skip
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    for name in ("depth", "width", "heads", "kv_heads", "ffn", "tied", "tokenizer"):
        if config.init and vars(config)[name] != defaults[name]:
            raise UserError(f"--{name}={vars(config)[name]}: the shape and the tokenizer come from --init={config.init}; leave it out")
    for name in ("tokenizer", "val", "val_fraction"):
        if Path(config.data).is_dir() and vars(config)[name] != defaults[name]:
            raise UserError(f"--{name}={vars(config)[name]}: prepared data bring their own; leave it out")
    check(config, good)


def data_hashes(config):
    """{what --data and --val name: its SHA-256}, that of the manifest for prepared data."""
    names = [config.data] if Path(config.data).is_dir() else [f for f in f"{config.data},{config.val}".split(",") if f]
    return {name: checkpoint.sha256(Path(name) / "manifest.json" if Path(name).is_dir() else name) for name in names}


def read_data(config, tok):
    """(tokenizer, train streams, val streams) of --data. tok: the tokenizer of --init or of the run to resume, None for a fresh start."""
    if Path(config.data).is_dir():
        prepare.load_manifest(config.data)  # before its tokenizer: a folder of something else should be called that
        tok = tok or tokenizer.load(config.data)
        return tok, *corpus.read_prepared(config.data, tok)
    files, val_files = config.data.split(","), [f for f in config.val.split(",") if f]
    train, val = [], [d for f in val_files for d in corpus.read_documents(f)]
    for f in files:
        documents = corpus.read_documents(f)
        kept, held_out = (documents, []) if val_files else corpus.hold_out(documents, config.val_fraction)  # the end of each file
        train, val = train + kept, val + held_out
    if tok is None:
        made = {"char": lambda: tokenizer.characters("".join(train + val)), "byte": tokenizer.byte_level}
        tok = made.get(config.tokenizer, lambda: tokenizer.load(config.tokenizer))()
    return tok, [corpus.encode(tok, train)], [corpus.encode(tok, val)]


def make_model(config, tok):
    """The model of --depth and of what overrides it, its weights from --seed."""
    shape = dict(width=config.width, heads=config.heads, kv_heads=config.kv_heads, ffn=config.ffn, context=config.context, tied=config.tied)
    return GPT(config_for(config.depth, tok.n_vocab, **shape)).init_weights(config.seed)


def make_optimizer(config, model):
    """Muon and AdamW at the rates of the flags. 0.3 and 0.01 were measured at width 128; AdamW's rates fall with the square root of the width."""
    by_width = (128 / model.config.width) ** 0.5
    head_lr = config.head_lr or 0.01 * by_width
    rates = dict(embed_lr=config.embed_lr or (head_lr if model.config.tied else 0.3 * by_width), head_lr=head_lr)  # a tied matrix is a head: 0.3 blows it up
    return Optimizer(model, config.gain_lr, matrix_lr=config.lr, **rates, betas=(0.8, 0.95), momentum=config.momentum, weight_decay=config.weight_decay, polar=config.polar)


def multiple(config, step, steps):
    """The multiple of the peak rates for update `step`, counted from 0."""
    return wsd(step, steps, config.warmup, int(config.decay * steps))


def even_part(tokens, limit):
    """`tokens` cut into the fewest parts of at most `limit`, all of one size: that size."""
    return -(-tokens // -(-tokens // limit))


def one_shape(pack, targets, tokens):
    """The pack and its targets filled up to `tokens` tokens and a power of two of documents, so that torch.compile sees few shapes; a larger pack as it is."""
    missing = tokens - len(targets)
    if missing < 0:
        return pack, targets
    documents = len(pack.cu) - 1 + -(-missing // pack.max_len)
    return fill(pack, tokens, 1 << (documents - 1).bit_length()), F.pad(targets, (0, missing), value=IGNORE)


def train_step(model, streams, pieces, micro_tokens, static=False):
    """Add up the gradient of the mean loss over `pieces` [n, 3], the whole batch, of which this rank takes its share. Returns its share of the loss.

    static: fill packs up to `micro_tokens`, for a compiled model.
    """
    model.train()  # sampling leaves it in evaluation
    lengths = (pieces[:, 2] - pieces[:, 1]).tolist()
    begin, end = share(lengths, rank(), world_size())
    loss = torch.zeros((), device=model.embed.device)
    for first, last in split(lengths[begin:end], micro_tokens):
        pack, targets = corpus.pack_pieces(streams, pieces[begin + first : begin + last])
        if static:
            pack, targets = one_shape(pack, targets, micro_tokens)
        pack, targets = pack.to(model.embed.device), targets.to(model.embed.device)
        part = linear_cross_entropy(model(pack), model.head, targets) / sum(lengths)  # the batch's count, so that no split changes the gradient
        part.backward()
        loss += part.detach()
    keep_company(model, lengths, micro_tokens)
    return loss


def continuation(model, tok, prompt, seed):
    """The text of `prompt` (token ids, the document's eot first) and of what the model makes follow it."""
    ids = stream(model, prompt, max_new=200, stop={tok.eot}, seed=seed)
    return tok.decode([i for i in [*prompt, *ids] if i != tok.eot])


def main(config):
    check_flags(config)
    run = checkpoint.Run("pretrain", config, FREE)
    device = run.device

    # 1. Data and model: fresh, from --init, or as they were when the run was stopped
    model, tok, _ = checkpoint.read(run.folder) if run.folder else (None, None, {})
    if run.resumed:
        run.check_same(data_hashes(config))
    tok, train, val = read_data(config, tok)
    model = model or make_model(config, tok)
    model = shard(model, device) if config.shard else model.to(device)
    context = min(config.context, model.config.context)
    if config.init and config.context not in (Config.context, context):
        raise UserError(f"--context={config.context}: the model of --init={config.init} reaches {context} tokens")
    batch_tokens = config.batch_tokens or 1024 * model.config.layers**2
    static = config.compile and device.type == "cuda"  # compiled kernels want one shape: packs are filled up to it
    micro_tokens = min(config.micro_tokens, context + even_part(-(-batch_tokens // world_size()), config.micro_tokens)) if static else config.micro_tokens
    n_parameters = sum(p.numel() for p in model.parameters())
    steps = config.steps or -(-20 * n_parameters // batch_tokens)
    n_train = sum(map(len, train))
    if n_train < batch_tokens:
        raise UserError(f"{config.data}: {n_train} training tokens, fewer than one batch of {batch_tokens}; lower --batch_tokens or bring more text")
    val_pieces = corpus.some_pieces(val, tok.eot, context, config.eval_tokens)
    sizes = tokenizer.token_bytes(tok)
    prompt = [tok.eot, *tok.encode_ordinary(config.prompt)]

    # 2. Optimizer and order of the data, and on a resume all their state
    optimizer = make_optimizer(config, model)
    order = corpus.text_order(train, tok.eot, context, config.seed)
    model.dropout, model.checkpoint_activations = config.dropout, config.checkpoint_activations
    if config.compile:
        model.compile()
    if rank() == 0:
        c = model.config
        print(f"{n_parameters:,} parameters: {c.layers} layers, width {c.width}, {c.heads} heads of {c.head_dim}, vocabulary {c.vocab_size}; on {describe(device)['hardware']}")
        print(f"{n_train:,} training tokens; {steps} steps of {batch_tokens:,}: {steps * batch_tokens / n_train:.2f} epochs")
        if config.compile and device.type == "cpu":
            print("warning: on a CPU --compile takes half a minute and was slower afterwards wherever it was measured")
    walked = dict(read_tokens=int((val_pieces[:, 2] - val_pieces[:, 1]).sum()), samples=(1, context, len(prompt)), dropout=config.dropout, muon=optimizer.dtype, shards=world_size() if config.shard else 1)
    memory.check(config, device, lambda c: memory.plan(c, device, [model.config], order.lengths, batch_tokens, loss="cross_entropy", **walked), or_else="" if config.shard else memory.SHARD)
    counters = run.begin(steps, {"": optimizer}, data_hashes(config), n_parameters)
    if run.resumed:
        order.begin(counters["epoch"], counters["index"])
    flops = model.flops_per_token(int(np.mean([b - a for _, a, b in order.items])))

    # 3. Train
    for step in range(run.start + 1, steps + 1):
        rate = multiple(config, step - 1, steps)
        pieces = order.batch(batch_tokens)
        loss = train_step(model, train, pieces, micro_tokens, static)
        norm = optimizer.step(rate, config.clip)
        (loss,) = reduce_sum(loss)
        if not norm.isfinite():
            pack, targets = corpus.pack_pieces(train, pieces)
            checkpoint.refuse_nonfinite(run.path, step, loss, {"tokens": pack.tokens, "cu": pack.cu, "targets": targets})
        run.log.step(step, int((pieces[:, 2] - pieces[:, 1]).sum()), flops, device, loss=loss, lr=config.lr * rate, grad_norm=norm.item())

        # 4. Validate, sample, save
        leaving, metrics = run.stop.agreed(), {}
        if run.due(step, config.eval_every) or run.due(step, config.save_every):
            loss, bpb = corpus.evaluate(model, val, val_pieces, sizes, config.micro_tokens)
            metrics = run.validated(step, {"val_loss": loss, "val_bpb": bpb}, f"{loss:.4f} nats/token, {bpb:.4f} bits/byte")
        if config.sample_every and run.due(step, config.sample_every):
            writer = unsharded(model, device, keep=rank() == 0)
            if rank() == 0:
                run.log.sample(step, continuation(writer, tok, prompt, config.seed))
            del writer  # of a sharded model a whole copy
        if run.due(step, config.save_every) or leaving:  # leaving, without a validation that is not due: who sends SIGTERM may not wait for one
            run.save(step, model, tok, optimizer.state(), {"epoch": order.epoch, "index": order.index}, metrics)
        if leaving and step < steps:
            run.stop.leave(step)
        run.log.skip_time()


if __name__ == "__main__":
    launch(main, Config)
