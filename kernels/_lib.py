"""What the kernel files share: whether kernels run, how PyTorch knows them, how each proves itself before it is trusted.

A kernel file holds, for its op: the plain PyTorch `op_reference`, the @triton.jit kernels, functions that launch them, registered by `register` so that
torch.compile sees one opaque op each, an autograd.Function over these, and `op`, which picks by `use`. On a CPU, for fp64, and where triton is missing
(macOS, Windows) the reference runs.

    FEINSCHLIFF_KERNELS=0           the references run everywhere
    FEINSCHLIFF_KERNELS=interpret   the kernels run on the CPU too, through Triton's interpreter: slow, but print() and breakpoints work inside them
"""
import functools, hashlib, json, os, sys, time
from pathlib import Path

import torch

MODE = os.environ.get("FEINSCHLIFF_KERNELS", "1")
if MODE == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when a kernel is defined

try:
    import triton
    import triton.language as tl
except ImportError:
    from types import SimpleNamespace

    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)  # enough for the kernels' definitions
    MODE = "0"

LOG2E = tl.constexpr(1.4426950408889634) if MODE != "0" else 1.4426950408889634  # exp(x) = exp2(x LOG2E), and exp2 is what the hardware has
OFF = set()  # ops whose kernels failed their proof on this machine


def use(op, x):
    """True where the kernels of `op` run for the tensor x, False where its reference does."""
    return (x.is_cuda or MODE == "interpret") and MODE != "0" and op not in OFF and x.dtype != torch.float64


# ---------------------------------------------------------------------------------------------------------------------------------
# Registration

LIBRARY = torch.library.Library("feinschliff", "DEF")


def register(schema, fake):
    """Decorator: make a function that launches kernels the op torch.ops.feinschliff.NAME, and return that op.

    schema: as PyTorch writes it, "swiglu(Tensor gate_up) -> Tensor"; fake: the same arguments -> empty outputs, which is all that torch.compile needs
    to know. Outputs never alias inputs. Define + impl + autograd.Function costs 4 us a call where torch.library.custom_op costs 17 (measured on a CPU).
    """

    def decorate(launch):
        name = schema.partition("(")[0]

        @functools.wraps(launch)
        def on_its_device(*args):
            x = next(a for a in args if isinstance(a, torch.Tensor))
            with torch.cuda.device_of(x):  # triton launches on the current device
                return launch(*args)

        LIBRARY.define(schema)
        LIBRARY.impl(name, on_its_device, "CUDA")
        LIBRARY.impl(name, launch, "CPU")  # under the interpreter
        torch.library.register_fake(f"feinschliff::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.feinschliff, name)

    return decorate


# ---------------------------------------------------------------------------------------------------------------------------------
# Sizes


@functools.cache
def arch(device):
    """Which row of a kernel's table of block sizes this device reads: 80 (Ampere, Ada, and what is not known), 90 (Hopper) or 100 (Blackwell)."""
    if device.type != "cuda":
        return 80
    capability = torch.cuda.get_device_capability(device)
    return {(9, 0): 90, (10, 0): 100, (10, 3): 100}.get(capability, 80)


@functools.cache
def sm_count(device):
    """How many programs a persistent kernel starts a wave; a small number under the interpreter, which runs them one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# ---------------------------------------------------------------------------------------------------------------------------------
# The proof: at the first run on a device each op is compared with its reference, forward and backward; then the verdict is remembered

PROOFS = {}  # {op: function(device) -> (kernel, reference, inputs)}


def proof(op):
    """Decorator of a function(device) -> (kernel, reference, inputs): two functions of the same tensors, and bf16 (weights: fp32) tensors for them."""

    def decorate(make):
        PROOFS[op] = make
        return make

    return decorate


def with_gradients(f, inputs):
    """[outputs, then gradients of the floating-point inputs] of f, for upstream gradients that are the same for every f."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outs = f(*leaves)
    outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    wanted = [o for o in outs if o.requires_grad]
    grads = torch.autograd.grad(wanted, [x for x in leaves if x.requires_grad], [g for o, g in zip(outs, upstream) if o.requires_grad]) if wanted else []
    return [o.detach() for o in outs] + list(grads)


def excess(found, own, truth, floor):
    """How far an error goes beyond what is allowed: largest |found - truth| / (2 largest |own - truth| + floor); at most 1 is right.

    own: what PyTorch's own ops give in the same dtype; twice their error is flash-attention's rule, and needs no tuning. nan counts as wrong.
    """
    wide = lambda x: x.double()  # noqa: E731
    if found.shape != truth.shape or not found.isfinite().all():
        return float("inf")
    if not truth.numel():
        return 0.0
    error, allowed = (wide(found) - wide(truth)).abs().max(), 2 * (wide(own) - wide(truth)).abs().max() + floor
    return (error / allowed).item()


def prove_op(op, device):
    """"" if the kernels of `op` agree with its reference on this device, else what went wrong, in words."""
    try:
        kernel, reference, inputs = PROOFS[op](device)
        found, own = with_gradients(kernel, inputs), with_gradients(reference, inputs)
        truth = with_gradients(reference, [x.double() if x.is_floating_point() else x for x in inputs])
        again = with_gradients(kernel, inputs)
        worst = max(excess(f, o, t, 1e-2 * t.abs().max().item() + 1e-5) for f, o, t in zip(found, own, truth, strict=True))
        if worst > 1:
            return f"its error is {2 * worst:.1f} times that of PyTorch's own ops"
        return "" if all(map(torch.equal, found, again)) else "two runs on the same numbers differ"
    except Exception as e:  # a kernel that does not even compile or launch must not end the run: that is what the proof is for
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"


def proof_key(device):
    """What a verdict holds for: this GPU model, its driver, these versions, these sources."""
    sources = b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))
    gpu = [torch.cuda.get_device_name(device), torch.version.cuda, torch._C._cuda_getDriverVersion()] if device.type == "cuda" else ["cpu"]
    return hashlib.sha256(json.dumps([*gpu, torch.__version__, triton.__version__, hashlib.sha256(sources).hexdigest()]).encode()).hexdigest()


def prove(device):
    """Check every op's kernels on `device`, or remember that they were checked; switch off those that fail, with a warning. Returns {op: what is wrong}.

    The verdicts lie in ~/.cache/feinschliff/kernels.json ($XDG_CACHE_HOME). On a CPU there is nothing to prove.
    """
    if MODE == "0" or device.type != "cuda":
        return {}
    for module in ("act", "attention", "decode", "head", "norm", "rope"):
        __import__(f"kernels.{module}")
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feinschliff/kernels.json"
    key, known = proof_key(device), {}
    try:
        known = json.loads(path.read_text())
        verdicts = {op: str(known[key][op]) for op in PROOFS}
    except (OSError, ValueError, KeyError, TypeError):
        begin = time.perf_counter()
        verdicts = {op: prove_op(op, device) for op in PROOFS}
        print(f"kernels: {len(PROOFS)} ops compared with their references in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        remember(path, (known if isinstance(known, dict) else {}) | {key: verdicts})
    wrong = {op: why for op, why in verdicts.items() if why}
    OFF.update(wrong)
    for op, why in wrong.items():
        print(f"WARNING: the kernel {op} is switched off on this machine: {why}. Its plain PyTorch reference runs instead, more slowly.", file=sys.stderr)
    return wrong


def remember(path, verdicts):
    """Write the verdicts; where the disk refuses, the proof runs again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(verdicts, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        pass
