"""The two libraries that multiply on a CPU, on the three products of a layer: what
kernels/linear.py chooses between. GFLOP/s, the fastest of several turns.

Forward y = x W^T, also of a W that lies transposed in memory (yt: the sampler's, see
rollout.sampling_weights), and the gradients dx = g W and dW = g^T x, in fp32, by MKL (or what `@`
uses here) and by oneDNN. The last line of the output is JSON.

    python -m bench.products
"""

import json
import time
from dataclasses import dataclass

import torch

from kernels import linear
from quickstart import table
from runtime.cli import launch
from runtime.process import describe


@dataclass
class Config:
    # tokens at once
    rows: str = "1,8,32,64,200,3000"
    # shapes of W, outputs by inputs
    shapes: str = "384x128,256x256,1360x256,4096x256"
    # turns of each product, of which the fastest counts
    turns: int = 7


def plain(a, b):
    return a @ b.T


def onednn(a, b):
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def seconds(multiply, a, b, turns):
    """The fastest mean of ten calls."""
    found = []
    for _ in range(turns + 1):  # the first warms up
        begin = time.perf_counter()
        for _ in range(10):
            multiply(a, b)
        found.append((time.perf_counter() - begin) / 10)
    return min(found[1:])


def main(config):
    lines = [("rows", "W", "product", "plain GFLOP/s", "oneDNN GFLOP/s", "oneDNN / plain")]
    found = []
    for rows in map(int, config.rows.split(",")):
        for shape in config.shapes.split(","):
            outputs, inputs = map(int, shape.split("x"))
            x, w, g = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
            gflop = 2e-9 * rows * outputs * inputs
            for name, a, b in (("y", x, w), ("yt", x, w.T.contiguous().T), ("dx", g, w.T), ("dW", g.T, x.T)):
                p, o = (gflop / seconds(multiply, a, b, config.turns) for multiply in (plain, onednn))
                row = {"rows": rows, "W": shape, "product": name, "plain": round(p, 1), "onednn": round(o, 1)}
                found.append(row)
                lines.append((str(rows), shape, name, f"{p:.0f}", f"{o:.0f}", f"{o / p:.2f}"))
    print(describe(torch.device("cpu")), end="; ")
    print(f"kernels/linear.py uses oneDNN here from {linear.WORK:,} multiplications per thread on: {linear.ONEDNN}\n")
    print(table(lines))
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
