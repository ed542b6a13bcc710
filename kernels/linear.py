"""The matrix product of every layer: y = x W^T. There is no kernel of ours in it: cuBLAS multiplies on CUDA, and on a CPU one of the two libraries PyTorch has.

PyTorch asks MKL for fp32 products, and MKL gives AMD's processors its AVX2 code though they have AVX-512. oneDNN does not ask who made the processor: on
a core of an EPYC it multiplies up to 2.4 times as fast from some 16 rows on, and a third as fast for a single one (python -m bench.products).
"""
import sys

import torch
import torch.nn.functional as F


def is_amd():
    if sys.platform != "linux":
        return False
    with open("/proc/cpuinfo") as f:
        return "AuthenticAMD" in f.read(2000)


ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and is_amd()
ROWS = 16  # from here on


def product(a, b):
    """a [n, k] times b^T [k, m] -> [n, m], no gradient. The same shapes and threads give the same bits."""
    if ONEDNN and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and len(a) >= ROWS and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad
        return product(grad, weight.T) if want_x else None, product(grad.T, x.T) if want_weight else None


def linear(x, weight, bias=None):
    """x [N, in] W^T (+ b), in x's dtype whatever the parameters' is."""
    if not ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = OneDNNLinear.apply(x, weight.to(x.dtype))
    return y if bias is None else y + bias
