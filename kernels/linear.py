"""The matrix product of every layer, y = x W^T.

There is no kernel of ours: cuBLAS multiplies on CUDA, one of PyTorch's two libraries on a CPU.

PyTorch gives fp32 products to MKL, and MKL runs its AVX2 code on AMD's processors even if they
have AVX-512. oneDNN does not ask who made the processor: on a core of an EPYC with AVX-512 it is up
to 2.4 times as fast, but each call costs it as much as MKL needs for two million multiplications,
so small products go to MKL (python -m bench.products). Without AVX-512 all go to MKL.
"""

import sys

import torch
import torch.nn.functional as F


def is_amd():
    if sys.platform != "linux":
        return False
    with open("/proc/cpuinfo") as f:
        return "AuthenticAMD" in f.read(2000)


AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
ONEDNN = AVX512 and is_amd()
WORK = 2_200_000  # multiplications per thread from which on oneDNN multiplies


def missing_rows(n):
    """The number of rows of zeros that oneDNN gets after n rows.

    It compiles and keeps code for each number of rows, up to 0.5 MB: a server that reads prompts of
    all lengths would grow by half a gigabyte if it saw every number.
    """
    return -n % (64 if n > 64 else 8)


def product(a, b):
    """a [n, k] times b^T [k, m] -> [n, m], without a gradient.

    The same shapes and threads give the same bits.
    """
    fp32_on_cpu = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"
    if ONEDNN and fp32_on_cpu and not torch.compiler.is_compiling():
        if len(a) * b.numel() >= WORK * torch.get_num_threads():
            missing = missing_rows(len(a))
            filled = F.pad(a, (0, 0, 0, missing)) if missing else a  # padding by nothing would copy
            return torch.ops.mkldnn._linear_pointwise(filled, b, None, "none", [], "")[: len(a)]
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
    """x [N, in] W^T (+ b) -> [N, out], in x's dtype: parameters of another dtype are cast to it."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y = OneDNNLinear.apply(x, weight) if torch.is_grad_enabled() else product(x, weight)
    return y if bias is None else y + bias
