"""The two libraries that multiply on a CPU, on the three products of a layer: what kernels/linear.py chooses between. GFLOP/s, the fastest of several turns.

forward y = x W^T, and the gradients dx = g W and dW = g^T x, fp32, by MKL (or whatever `@` uses here) and by oneDNN. Last line of output: JSON.

    python -m bench.products
"""

import json, time
from dataclasses import dataclass

import torch

from common import describe, launch
from kernels import linear
from quickstart import table


@dataclass
class Config:
    # tokens at once
    rows: str = "1,8,32,200,3000"
    # of W, outputs by inputs
    shapes: str = "384x128,1360x256,4096x256"
    # of each, of which the fastest counts
    turns: int = 7


def seconds(work, turns):
    """The fastest mean of ten calls."""
    found = []
    for _ in range(turns + 1):  # the first warms up
        begin = time.perf_counter()
        for _ in range(10):
            work()
        found.append((time.perf_counter() - begin) / 10)
    return min(found[1:])


def main(config):
    onednn = lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # noqa: E731
    lines, found = [], []
    for rows in map(int, config.rows.split(",")):
        for shape in config.shapes.split(","):
            out, inside = map(int, shape.split("x"))
            x, w, g = torch.randn(rows, inside), torch.randn(out, inside), torch.randn(rows, out)
            for name, a, b in (("y", x, w), ("dx", g, w.T), ("dW", g.T, x.T)):
                speed = [
                    2e-9 * rows * out * inside / seconds(lambda: f(a, b), config.turns)
                    for f in (lambda a, b: a @ b.T, onednn)
                ]
                found.append(
                    {
                        "rows": rows,
                        "W": shape,
                        "product": name,
                        "plain": round(speed[0], 1),
                        "onednn": round(speed[1], 1),
                    }
                )
                lines.append(
                    (str(rows), shape, name, f"{speed[0]:.0f}", f"{speed[1]:.0f}", f"{speed[1] / speed[0]:.2f}")
                )
    print(
        f"{describe(torch.device('cpu'))}; kernels/linear.py takes oneDNN here from {linear.ROWS} rows on: {linear.ONEDNN}\n"
    )
    print(table([("rows", "W", "product", "plain GFLOP/s", "oneDNN GFLOP/s", "oneDNN / plain"), *lines]))
    print(json.dumps(found))


if __name__ == "__main__":
    launch(main, Config)
