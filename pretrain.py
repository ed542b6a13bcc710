"""Train: a language model from raw text, from nothing.

    minimise  -1/N sum_i log p(token_i | the tokens before it in its document)

Text goes straight in (--data=book.txt, --data=a.jsonl,b.txt), and so do shards that data/prepare.py
has written. Validation is in nats per token and in bits per byte, which no choice of tokenizer
changes. Left out: curricula; the mixture of the data is made by data/prepare.py.

    python pretrain.py --data=shakespeare.txt --out=out/shakespeare --depth=4 --width=128 \\
        --context=64 --batch_tokens=768 --steps=2000
    python pretrain.py --data=out/data/world --out=out/base --depth=4
    torchrun --nproc_per_node=8 pretrain.py --data=out/web --out=out/base --depth=12 --compile
    torchrun --nproc_per_node=8 pretrain.py --data=out/web --out=out/base --depth=32 --shard=fsdp
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import chat, corpus, tokenizer
from data.pack import IGNORE, fill, to_device
from data.read import source_names
from data.shards import read_prepared, text_hashes
from kernels.head import linear_cross_entropy
from model import GPT, config_for
from optim import Optimizer, wsd
from rollout import stream
from runtime import memory
from runtime.batches import micro_batches, text_order
from runtime.checkpoint import check_same_data
from runtime.cli import print0, refuse_unread
from runtime.errors import UserError
from runtime.process import launch, rank, reduce_sum, world_size
from runtime.run import Run, RunConfig
from runtime.shard import shard, unsharded


@dataclass(kw_only=True)
class Config(RunConfig):
    # -- What you will set --
    # text files (.txt, .jsonl, .parquet; formats: data/read.py), comma-separated, or a directory
    # written by data/prepare.py
    data: str
    # layers: the one dial; a size below that is 0 follows from it [>= 1; <= 10000]
    depth: int = 4
    # longest piece of a document, in tokens [>= 1; <= 16777216]
    context: int = 1024
    # -- What you may set --
    # checkpoint to start from, with its tokenizer; "": fresh weights
    init: str = ""
    # validation text files; "": hold out the end of each file (prepared data bring their own)
    val: str = ""
    # share of the text to hold out [> 0; < 1]
    val_fraction: float = 0.1
    # tokenizer of text files: char, byte, or what data/tokenizer.py loads (a directory, gpt2)
    tokenizer: str = "char"
    # leave out bad lines and documents that cannot be tokenized, and count them
    skip_bad: bool = False
    # width of the model; 0: 64 x depth [<= 1048576]
    width: int = 0
    # query heads; 0: width / 32, 64 or 128, by width
    heads: int = 0
    # key-value heads; 0: as many as heads
    kv_heads: int = 0
    # hidden width of the MLP; 0: 8/3 width [<= 4194304]
    ffn: int = 0
    # one matrix for embedding and head
    tied: bool = False
    # tokens that a token sees in a windowed layer; 0: no windows
    window: int = 0
    # every n-th layer from the first is windowed [>= 1]
    window_every: int = 1
    # share of activations to drop, for small corpora that are seen many times [>= 0; < 1]
    dropout: float = 0.0
    # optimizer steps; 0: 20 tokens per parameter (Chinchilla) [<= 1000000; may change on resume]
    steps: int = 0
    # tokens per optimizer step, over all ranks; 0: 1024 x depth^2
    batch_tokens: int = 0
    # tokens a rank holds at once: memory depends on it, the result does not (dropout's masks do);
    # 0: as many as fit, by the memory plan [>= 0; may change on resume]
    micro_batch_tokens: int = 16384
    # peak learning rate of Muon, for the matrices of the blocks [> 0]
    lr: float = 0.02
    # peak learning rate of AdamW, for the embedding; 0: 0.3 (128 / width)^0.5, or the head's if
    # they are tied [>= 0]
    embed_lr: float = 0.0
    # peak learning rate of AdamW, for the head; 0: 0.01 (128 / width)^0.5 [>= 0]
    head_lr: float = 0.0
    # peak learning rate of AdamW, for the gains of the norms [>= 0]
    norm_lr: float = 0.01
    # torch.compile the model [may change on resume]
    compile: bool = False
    # fsdp: divide parameters, gradients and optimizer state over torchrun's ranks; "": each rank
    # has them all [one of fsdp; may change on resume]
    shard: str = ""
    # steps between samples in samples.txt; 0: none [may change on resume]
    sample_every: int = 500
    # what the samples continue; "": they begin a document [may change on resume]
    prompt: str = ""
    # -- What you will rarely set --
    # momentum of Muon [>= 0; < 1]
    momentum: float = 0.95
    # weight decay of the matrices of the blocks [>= 0]
    weight_decay: float = 0.0
    # steps over which the learning rates rise
    warmup: int = 0
    # last share of the steps, over which the learning rates fall to 0 [>= 0; <= 1]
    decay: float = 0.6
    max_grad_norm: float = 0.0
    # precision of Muon's Newton-Schulz; auto: bf16 if the processor is fast at it [one of auto,
    # bf16, fp32]
    muon_dtype: str = "auto"
    eval_every: int = 250
    # validation tokens to read, at most [may change on resume]
    eval_tokens: int = 1_000_000
    save_every: int = 1000
    # longest sample in samples.txt, in tokens [>= 1; may change on resume]
    max_new_tokens: int = 200


MIN_VAL_TOKENS = 50
SHAPE = ("width", "heads", "kv_heads", "ffn", "tied", "window", "window_every")  # what overrides --depth


def check_flags(config):
    """Raises UserError for a flag that what is given with it decides already."""
    decided = {}
    if not config.window:
        decided["window_every"] = "no layer is windowed without --window"
    if Path(config.data).is_dir():
        decided |= dict.fromkeys(("tokenizer", "val", "val_fraction", "skip_bad"), "prepared data have decided it")
    elif config.val:
        decided["val_fraction"] = f"--val={config.val} is what is validated on"
    if config.init:
        flags = ("depth", *SHAPE, "tokenizer")
        decided |= dict.fromkeys(flags, f"the shape and the tokenizer come from --init={config.init}")
    refuse_unread(config, decided)


# --------------------------------------------------------------------------------------------------
# Data and model


def read_data(config, tok):
    """(tokenizer, train streams, validation streams) of --data.

    tok: the tokenizer of --init or of the run to resume; None for a fresh start.
    """
    if Path(config.data).is_dir():
        tok = tok or tokenizer.load(config.data)
        return tok, *read_prepared(config.data, tok)
    files = [corpus.read_documents(file, config.skip_bad) for file in source_names(config.data, "data")]
    val_files = [corpus.read_documents(file, config.skip_bad) for file in source_names(config.val, "val")]
    if not val_files:
        files, val_files = zip(*[corpus.hold_out(documents, config.val_fraction) for documents in files], strict=True)
    train, val = ([document for documents in read for document in documents] for read in (files, val_files))
    corpus.warn_of_shared_documents(train, val)
    if tok is None and config.tokenizer == "char":
        tok = tokenizer.characters("".join(train + val))
    elif tok is None:
        tok = tokenizer.byte_level() if config.tokenizer == "byte" else tokenizer.load(config.tokenizer)
    return tok, *[[corpus.encode(tok, documents, config.skip_bad)] for documents in (train, val)]


def check_sizes(config, n_train, n_val, batch_tokens):
    """Raises UserError if there are too few tokens."""
    if n_train < batch_tokens:
        raise UserError(
            f"{config.data}: {n_train} training tokens, fewer than one batch of {batch_tokens}; lower --batch_tokens "
            "or bring more text"
        )
    if n_val < MIN_VAL_TOKENS:
        where = config.val or config.data
        raise UserError(f"{where}: {n_val} tokens to validate on say nothing; hold out more, or bring a longer --val")


def make_model(config, tok):
    """The model of --depth and of the flags that override it, its weights from --seed."""
    shape = {flag: vars(config)[flag] for flag in SHAPE}
    return GPT(config_for(config.depth, tok.n_vocab, context=config.context, **shape)).init_weights(config.seed)


def make_optimizer(config, model):
    """Muon for the matrices of the blocks, AdamW for the rest.

    AdamW's defaults were measured at width 128; they fall with the square root of the width.
    """
    by_width = (128 / model.config.width) ** 0.5
    head_lr = config.head_lr or 0.01 * by_width
    embed_lr = head_lr if model.config.tied else 0.3 * by_width  # a tied matrix is a head too, which 0.3 blows up
    muon = {"matrix_lr": config.lr, "momentum": config.momentum, "muon_dtype": config.muon_dtype}
    adamw = {"embed_lr": config.embed_lr or embed_lr, "head_lr": head_lr, "betas": (0.8, 0.95)}
    return Optimizer(model, config.norm_lr, **muon, **adamw, weight_decay=config.weight_decay)


# --------------------------------------------------------------------------------------------------
# The loss


def nll_sum(model, pack, targets):
    """Sum of -log p(target) over a pack, in nats. targets: int64 [N]; IGNORE is left out."""
    device = model.embed.device
    return linear_cross_entropy(model(pack.to(device)), model.head, to_device(targets, device))


def mean_nll(model, streams, pieces, micro_batch_tokens, one_size=False):
    """Nats per token of `pieces` [n, 3], which the ranks share. With gradients enabled, adds up the
    gradient of this rank's part.

    one_size: fill every pack up to `micro_batch_tokens`, for a compiled model.
    """
    lengths = pieces[:, 2] - pieces[:, 1]
    loss = torch.zeros((), device=model.embed.device)
    for part in micro_batches(model, lengths, micro_batch_tokens):
        pack, targets = corpus.pack_pieces(streams, pieces[part])
        if one_size:
            pack, targets = one_shape(pack, targets, micro_batch_tokens)
        part_loss = nll_sum(model, pack, targets) / lengths.sum()  # of the batch, so that no split changes the gradient
        if torch.is_grad_enabled():
            part_loss.backward()
        loss += part_loss.detach()
    return reduce_sum(loss)[0]


@torch.no_grad()
def evaluate(model, streams, pieces, sizes, micro_batch_tokens):
    """(nats per token, bits per byte) of some pieces [n, 3], which the ranks share.

    sizes: int64 [V], the bytes of each id (tokenizer.token_bytes).
    """
    model.eval()
    nats = mean_nll(model, streams, pieces, micro_batch_tokens)
    _, targets = corpus.pack_pieces(streams, pieces)
    n_bytes = int(sizes[targets.numpy()].sum())
    return nats, nats * len(targets) / math.log(2) / max(1, n_bytes)


# --------------------------------------------------------------------------------------------------
# One shape for torch.compile, which compiles again for every other


def one_shape(pack, targets, tokens):
    """A pack and its targets filled up to `tokens` tokens and a power of two of documents; a larger
    pack as it is."""
    missing = tokens - len(targets)
    if missing < 0:
        return pack, targets
    documents = len(pack.cu_seqlens) - 1 + -(-missing // pack.max_len)
    return fill(pack, tokens, 1 << (documents - 1).bit_length()), F.pad(targets, (0, missing), value=IGNORE)


def even_pack_tokens(batch_tokens, context, limit):
    """The one size of a rank's packs: as few as possible, of at most `limit` tokens, with space
    for a last document that is longer than its share."""
    tokens = -(-batch_tokens // world_size())
    packs = -(-tokens // limit)
    return min(limit, context + -(-tokens // packs))


def main(config):
    check_flags(config)
    run = Run("pretrain", config)

    # 1. Data and model: fresh, from --init, or as they were when the run was stopped
    hashes = text_hashes(config.data, "data") | text_hashes(config.val, "val")
    if run.resumed:  # before it is read: changed text may have characters that the tokenizer lacks
        check_same_data(run.info, hashes)
    model, tok = run.load("cpu") if run.folder else (None, None)
    tok, train, val = read_data(config, tok)
    model = model or make_model(config, tok)
    model.dropout, model.checkpoint_activations = config.dropout, config.checkpoint_activations
    model = shard(model, run.device) if config.shard else model.to(run.device)
    context = min(config.context, model.config.context)  # a default yields to the model, a --context does not
    if config.context != Config.context:
        context = run.context(model)
    n_train, n_parameters = sum(map(len, train)), sum(p.numel() for p in model.parameters())
    batch_tokens = config.batch_tokens or 1024 * model.config.layers**2
    default_steps = -(-20 * n_parameters // batch_tokens)
    steps = config.steps or default_steps
    check_sizes(config, n_train, sum(map(len, val)), batch_tokens)
    optimizer = make_optimizer(config, model)
    order = text_order(train, tok.eot, context, config.seed)
    val_pieces, sizes = corpus.some_pieces(val, tok.eot, context, config.eval_tokens), tokenizer.token_bytes(tok)
    prompt = [tok.bos, *tok.encode_ordinary(config.prompt)]
    check_memory(run, model, optimizer, train, order, batch_tokens, len(prompt))

    # bookkeeping: what is compiled, printed, saved and resumed
    pack_tokens, one_size = config.micro_batch_tokens, config.compile and run.device.type == "cuda"
    if one_size:
        pack_tokens = even_pack_tokens(batch_tokens, context, pack_tokens)
    if config.compile:
        model.compile()
        if run.device.type == "cpu":
            print0("warning: on a CPU --compile takes half a minute, and training was slower wherever it was measured")
    epochs = order.epochs_of(batch_tokens, steps)
    print0(f"{n_train:,} training tokens; {steps} steps of {batch_tokens:,}: {epochs:.2f} epochs")
    run.begin(steps, model, data=hashes, saved={"optimizer": optimizer, "order": order})
    run.warn_of_other_steps(default_steps, schedule)

    for step in run.steps():
        # 2. Learn from the next pieces of text
        pieces = order.batch(batch_tokens)
        model.train()
        loss = mean_nll(model, train, pieces, pack_tokens, one_size)
        lr_scale = schedule(step, steps, config)
        grad_norm = optimizer.step(lr_scale, config.max_grad_norm)
        if not grad_norm.isfinite():
            run.require_finite(step, loss, [grad_norm], corpus.piece_chats(train, pieces))
        rates = {"lr": config.lr * lr_scale, "grad_norm": grad_norm.item()}
        run.log(step, model, pieces[:, 2] - pieces[:, 1], loss=loss, **rates)

        # 3. Validate, sample, save
        if run.eval_due(step):
            nats, bits = evaluate(model, val, val_pieces, sizes, config.micro_batch_tokens)
            metrics = {"val_loss": nats, "val_bpb": bits}
            run.validated(step, metrics, text=f"{nats:.4f} nats per token, {bits:.4f} bits per byte")
        if config.sample_every and run.due(step, config.sample_every):
            write_sample(run, step, model, tok, prompt)
        run.end_step(step, model, tok)


def schedule(step, steps, config):
    """What the learning rates are multiplied by in a step of `steps`."""
    return wsd(step - 1, steps, config.warmup, int(config.decay * steps))


def write_sample(run, step, model, tok, prompt):
    """Append `prompt` (ids, the end of a document first) and a continuation to samples.txt."""
    model = unsharded(model, run.device, keep=rank() == 0)
    if rank() == 0:
        stop = chat.text_stop_ids(tok)
        ids = stream(model, prompt, max_new_tokens=run.config.max_new_tokens, stop=stop, seed=run.config.seed)
        run.sample(step, tok.decode([i for i in [*prompt, *ids] if i not in {tok.bos, *stop}]))


def check_memory(run, model, optimizer, streams, order, batch_tokens, prompt_length):
    """The memory plan of a step and of a sample; see runtime/memory.py."""

    def loss(model, pieces):
        return nll_sum(model, *corpus.pack_pieces(streams, pieces))

    sample = {"prompt_lengths": [prompt_length], "completions": int(run.config.sample_every > 0)}
    memory.check(run, [(model, optimizer, loss)], order.items, order.lengths, batch_tokens, **sample)


if __name__ == "__main__":
    launch(main, Config)
