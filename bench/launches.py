"""What the launches of a training micro-batch and of an optimizer step cost the CPU, without a GPU.

Python, autograd, PyTorch's dispatch and triton's launch path run as on CUDA; only the launch itself
is left out: triton compiles for sm_90 and launches nothing, and tensors are so small that PyTorch's
own ops cost on this CPU about what a CUDA launch does. Seconds are those of one thread of this
process.

    python -m bench.launches --depth=12
"""

import time
from dataclasses import dataclass

import torch

from bench import sass
from runtime.cli import launch


@dataclass
class Config:
    # layers [>= 1]
    depth: int = 12
    # timed micro-batches; the fastest half counts [>= 2]
    rounds: int = 30


def milliseconds(f, rounds):
    """The median of the faster half of the CPU times of f()."""
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        f()
        seconds.append(time.process_time() - begin)
    return 1e3 * sorted(seconds)[rounds // 4]


def main(config):
    torch.set_num_threads(1)
    driver, launched = sass.compile_only()
    driver.arch = 90
    # The kernel files take `use` from _lib when they are imported, and so after compile_only
    from data.pack import IGNORE, next_tokens, pack
    from kernels.act import swiglu_forward
    from kernels.head import linear_cross_entropy
    from model import GPT, GPTConfig
    from optim import Optimizer

    model = GPT(GPTConfig(304, config.depth, 64, 1, 1, 64, 64, context=64)).init_weights(0)
    documents = pack([torch.randint(300, (32,)), torch.randint(300, (32,))])
    targets = next_tokens(documents, IGNORE)
    optimizer = Optimizer(model, 0.01, matrix_lr=0.02, embed_lr=0.1, head_lr=0.003)

    def micro_batch():
        (linear_cross_entropy(model(documents), model.head, targets) / 64).backward()

    def with_gradients():
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    def update():
        with_gradients()
        optimizer.step(1.0)

    for _ in range(3):
        micro_batch()
    launched.clear()
    micro_batch()
    print(f"depth {config.depth}, torch {torch.__version__}; {len(launched)} launches of our kernels a micro-batch")
    print(f"forward, loss and backward: {milliseconds(micro_batch, config.rounds):.2f} ms of CPU")
    update()
    own = milliseconds(update, config.rounds) - milliseconds(with_gradients, config.rounds)
    print(f"optimizer step: {own:.2f} ms of CPU, {len(optimizer.adamw.param_groups)} groups of AdamW")
    x = torch.zeros(16, 128)
    swiglu_forward(x)

    def thousand():
        for _ in range(1000):
            swiglu_forward(x)

    print(f"one launch of swiglu: {milliseconds(thousand, 4):.1f} us")


if __name__ == "__main__":
    launch(main, Config)
