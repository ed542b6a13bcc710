"""The proof: kernels are compared with their references before they are trusted.

`prove` runs at the start of every script. At the first run on a machine it compares each op's
kernels with its reference, forward and backward, and remembers the verdicts. An op whose kernels
fail is switched off with a warning; its reference runs instead.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from kernels import _lib
from runtime.errors import UserError
from runtime.files import write_json

PROOFS = {}  # {op: function(device) -> (f, inputs)}


def proof(op):
    """Decorator for a function(device) -> (f, inputs), the proof of `op`.

    f: a function of tensors that runs `op` and returns a tensor or several. inputs: tensors for it
    on the device, activations in bf16 and weights in fp32.
    """

    def decorate(make):
        PROOFS[op] = make
        return make

    return decorate


def with_gradients(f, inputs):
    """Returns [*outputs, *gradients of the inputs] of f; no gradients if f has none.

    The upstream gradients are the same for every f.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = f(*leaves)
    outs = [outs] if isinstance(outs, torch.Tensor) else outs
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    grads = torch.autograd.grad(outs, leaves, upstream) if outs[0].requires_grad else ()
    return [*(o.detach() for o in outs), *grads]


def excess(found, own, truth, floor):
    """max |found - truth| / (2 max |own - truth| + floor): right if at most 1. NaN counts as wrong.

    own: what PyTorch's own ops give in the same dtype. Twice their error is the rule of
    flash-attention's tests and needs no tuning. truth: fp64.
    """
    if found.shape != truth.shape or not found.isfinite().all():
        return float("inf")
    allowed = 2 * (own - truth).abs().max() + floor
    return ((found - truth).abs().max() / allowed).item()


def prove_op(op, device):
    """ "" if the kernels of `op` agree with its reference on this device, else what is wrong."""
    try:
        f, inputs = PROOFS[op](device)
        _lib.OFF.add(op)  # its reference runs
        own = with_gradients(f, inputs)
        truth = with_gradients(f, [x.double() for x in inputs])
        _lib.OFF.remove(op)
        found = with_gradients(f, inputs)
        outcomes = zip(found, own, truth, strict=True)
        worst = max(excess(x, o, t, 1e-2 * t.abs().max() + 1e-5) for x, o, t in outcomes)
        if worst > 1:
            return f"its error is {worst:.1f} times what is allowed (twice that of PyTorch's own ops, and 1 %)"
        again = with_gradients(f, inputs)
        return "" if all(map(torch.equal, found, again)) else "two runs on the same numbers differ"
    except Exception as e:  # a kernel that does not compile or launch must not end the run
        return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}"


def proof_key(device):
    """What the verdicts hold for: this GPU model, these versions, these sources."""
    versions = [torch.__version__, torch.version.cuda, _lib.triton.__version__]
    if device.type == "cuda":
        versions += [torch.cuda.get_device_name(device)]
    key = hashlib.sha256(repr(versions).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        key.update(file.read_bytes())
    return key.hexdigest()[:32]


def prove(device):
    """Checks every op's kernels on `device`, or reads that they were checked before.

    Switches off the ops that fail, with a warning, and all of them below sm_80, whose tensor cores
    know no bf16: kernels compile there, to code that is slower than PyTorch's own. Returns
    {op: what is wrong}; {} on a CPU, where there is nothing to prove. The verdicts lie in
    ~/.cache/feinschliff ($XDG_CACHE_HOME).
    """
    if _lib.MODE == "0" or device.type != "cuda":
        return {}
    for module in ("act", "attention", "decode", "draw", "head", "kl", "norm", "rope"):
        __import__(f"kernels.{module}")  # each adds its proofs
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        if not _lib.OFF.issuperset(PROOFS):
            name = torch.cuda.get_device_name(device)
            print(
                f"kernels: off on {name} (sm_{capability[0]}{capability[1]}, below sm_80): PyTorch's own ops run",
                file=sys.stderr,
            )
        _lib.OFF.update(PROOFS)
        return dict.fromkeys(PROOFS, "this GPU is below sm_80")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / f"feinschliff/kernels-{proof_key(device)}.json"
    try:
        known = json.loads(path.read_text())
        verdicts = {op: str(known[op]) for op in PROOFS}
    except (OSError, ValueError, KeyError, TypeError):
        begin = time.perf_counter()
        verdicts = {op: prove_op(op, device) for op in PROOFS}
        seconds = time.perf_counter() - begin
        print(f"kernels: {len(PROOFS)} ops compared with their references in {seconds:.1f} s", file=sys.stderr)
        with contextlib.suppress(UserError):  # not remembered: the next run proves them again
            write_json(path, verdicts)
    wrong = {op: why for op, why in verdicts.items() if why}
    _lib.OFF.update(wrong)
    for op, why in wrong.items():
        print(
            f"WARNING: the kernel {op} is switched off on this machine: {why}. "
            "Its plain PyTorch reference runs instead, more slowly.",
            file=sys.stderr,
        )
    return wrong
