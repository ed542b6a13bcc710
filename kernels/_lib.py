"""What the kernel files share: whether kernels run, and how PyTorch knows them.

A kernel file holds for its op: the plain PyTorch `op_reference`, the @triton.jit kernels, the
functions that launch them, an autograd.Function, and `op` itself, which picks by `use`. `register`
makes every launch one opaque op for torch.compile. kernels/proof.py compares kernels and references
on a new machine. The references run on a CPU, for fp64, and without triton (macOS, Windows).

Triton compiles again for every integer that is 1 or a multiple of 16, unless `do_not_specialize`
names it: counts that change from pack to pack, and sizes on which no alignment depends.

    FEINSCHLIFF_KERNELS=0          references everywhere
    FEINSCHLIFF_KERNELS=interpret  kernels on a CPU too, by Triton's interpreter: slow, but print()
                                   and breakpoints work inside them
"""

import functools
import os

import torch

MODE = os.environ.get("FEINSCHLIFF_KERNELS", "1")
if MODE == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when a kernel is defined

try:
    import triton
    import triton.language as tl
except ImportError:
    from types import SimpleNamespace

    def jit(kernel=None, do_not_specialize=()):
        """Enough to define the kernels."""
        return kernel or jit

    triton = SimpleNamespace(jit=jit)
    tl = SimpleNamespace(constexpr=float)
    MODE = "0"

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x LOG2E), and the hardware has exp2
# How kernels with a temperature are launched. Fused, logit * scale - m would not be 0 at the
# largest logit, because m holds that product rounded: at a temperature of 1e-6, probabilities were
# wrong by a factor of 1.15.
UNFUSED = {"enable_fp_fusion": False}
OFF = set()  # ops whose kernels failed their proof on this machine


def use(op, x):
    """True if the kernels of `op` run for tensor x, False if its reference does."""
    return (x.is_cuda or MODE == "interpret") and MODE != "0" and op not in OFF and x.dtype != torch.float64


def contiguous(*tensors):
    """The tensors as kernels read them; None stays None."""
    return [x if x is None else x.contiguous() for x in tensors]


def cdiv(a, b):
    """a / b, rounded up. triton.cdiv takes 2 us, as much as a view."""
    return -(-a // b)


def next_power_of_2(n):
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


# --------------------------------------------------------------------------------------------------
# Registration

LIBRARY = torch.library.Library("feinschliff", "DEF")


def register(schema, fake):
    """Decorator: makes a function that launches kernels the op torch.ops.feinschliff.NAME.

    schema: as PyTorch writes it, "swiglu(Tensor gate_up) -> Tensor".
    fake: a function of the same arguments that returns empty outputs, which is all that
    torch.compile needs to know. Outputs never alias inputs.

    Define + impl + autograd.Function costs 4 us per call, torch.library.custom_op 17 (on a CPU).
    """

    def decorate(launch):
        name = schema.partition("(")[0]

        @functools.wraps(launch)
        def launch_on_device(*args):
            x = next(a for a in args if isinstance(a, torch.Tensor))
            with torch.cuda.device_of(x):  # triton launches on the current device
                return launch(*args)

        LIBRARY.define(schema)
        LIBRARY.impl(name, launch_on_device, "CUDA")
        LIBRARY.impl(name, launch, "CPU")  # by the interpreter
        torch.library.register_fake(f"feinschliff::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.feinschliff, name)

    return decorate


# --------------------------------------------------------------------------------------------------
# What the device is


@functools.cache
def arch(device):
    """The architecture whose block sizes this device uses."""
    return family(torch.cuda.get_device_capability(device)) if device.type == "cuda" else 80


def family(capability):
    """80 (Ampere and every unknown one), 89 (Ada, and Blackwell's consumer GPUs), 90 (Hopper) or
    100 (Blackwell)."""
    return {(8, 9): 89, (12, 0): 89, (12, 1): 89, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get(capability, 80)


@functools.cache
def sm_count(device):
    """The number of multiprocessors: what one wave of a persistent kernel fills.

    4 for the interpreter, which runs programs one after another.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
