"""Runs a script with the other of PyTorch's two products on a CPU: MKL where kernels/linear.py
takes oneDNN, and oneDNN where it takes MKL. For bench/world.py.

    python -m bench.other_product pretrain.py --data=out/data
"""

import runpy
import sys

from kernels import linear

if __name__ == "__main__":
    linear.ONEDNN = not linear.ONEDNN
    script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
