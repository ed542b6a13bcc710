"""A CUDA GPU that is not there: tensors say that they lie on cuda:0, their numbers are computed on
the CPU, and CUDA's rules hold.

    operands on two devices raise                 so does a kernel that is given a CPU tensor
    a host that waits for the device is counted   by the line of this repository that made it wait,
                                                  and raises while a graph is being captured
    a captured graph is replayed                  op by op, on the memory it was captured with; if
                                                  that has been freed meanwhile, replay raises
    a copy that does not wait is late             its target holds nonsense until something waits,
                                                  and its source must not change until then
    memory is a caching allocator's               freed memory stays reserved
    random numbers are the device's own           with a state of their own

A launcher of kernels (the function under @register) runs as it is; its launches are checked and
recorded with the machine-code variant that triton would compile. The numbers come from the plain
references below, because Triton's interpreter takes minutes; ops whose schema has no reference
here, and all within `interpreted`, are interpreted.

Not modelled: rounding of CUDA's kernels, speed, several streams, torch.compile, NCCL.

    with emulate() as gpu:
        pretrain.main(pretrain.Config(device="cuda", ...))
    gpu.waits, gpu.launches, gpu.variants
"""

import collections
import contextlib
import functools
import importlib
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels import _lib, act, decode, draw, head, rope
from runtime import memory

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROOT = str(Path(__file__).parents[1])
HERE = str(Path(__file__).parent)
CPU_TO, CPU_TENSOR = torch.Tensor.to, torch.tensor
GPU = None  # the device, within `emulate`


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0. `host` holds its numbers; C++ takes it for a CPU tensor, and so needs no
    driver."""

    @staticmethod
    def __new__(cls, host):
        options = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        with torch.inference_mode(host.is_inference()):  # a view of a tensor from outside is none of inference mode
            tensor = torch.Tensor._make_wrapper_subclass(cls, host.size(), **options)
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = CUDA, True, False

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.run(func, args, kwargs or {})

    def __repr__(self):
        return f"CudaTensor({self.host})"

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def is_pinned(self, device=None):
        return False

    def tolist(self):
        GPU.wait("tolist")
        return self.host.tolist()

    def numpy(self, *, force=False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, dtype=None):
        self.numpy()

    def cpu(self):
        return self.to("cpu")

    def cuda(self, device=None, non_blocking=False):
        return self

    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)


class IsFake(type):
    def __instancecheck__(cls, x):
        return isinstance(host_of(x), FakeTensor)


class AnyFakeTensor(metaclass=IsFake):
    """What a fake tensor is to the memory plan, which runs on the emulated device as well."""


def to(self, *args, **kwargs):
    """Tensor.to, which in C++ would take a CudaTensor for one on the CPU, and has no driver."""
    other = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.pop("other", None)
    if other is not None:
        args = other.device, other.dtype, *args[1:]
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or self.device, dtype or self.dtype
    if "cuda" not in (device.type, self.device.type):
        return CPU_TO(self, device, dtype, non_blocking, copy, memory_format=memory_format)
    if device.type == self.device.type and dtype == self.dtype and not copy:
        return self
    return aten._to_copy(self, dtype=dtype, device=device, non_blocking=non_blocking)


def tensor(data, *, device=None, **options):
    """torch.tensor. The device is always told: a `with device:` around this, as of the memory plan,
    would tell PyTorch's own to make it on a GPU."""
    device = torch.get_default_device() if device is None else torch.device(device)
    made = CPU_TENSOR(data, device=on_host(device), **options)
    return made.to(device) if is_cuda_device(device) else made


def host_of(x):
    return x.host if isinstance(x, CudaTensor) else x


def leaves(x):
    """What the tuples, lists and dicts of an op's arguments hold; faster than pytree."""
    if isinstance(x, (tuple, list)):
        for part in x:
            yield from leaves(part)
    elif isinstance(x, dict):
        yield from leaves(list(x.values()))
    else:
        yield x


def mapped(f, x):
    """x with f of each leaf."""
    if isinstance(x, (tuple, list)):
        return type(x)([mapped(f, part) for part in x])
    return {key: mapped(f, part) for key, part in x.items()} if isinstance(x, dict) else f(x)


@functools.cache
def is_composite(func):
    """Whether the op is made of others, which inference mode leaves to us."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def on_host(device):
    return torch.device("cpu") if isinstance(device, torch.device) and device.type == "cuda" else device


def is_cuda_device(device):
    return device is not None and torch.device(device).type == "cuda"


def caller():
    """ "file.py:line" of the innermost frame in this repository's sources."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(HERE) and "/.venv/" not in name:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


def called_by_autograd():
    """Whether autograd's engine itself makes this tensor, for which C++ names the CPU: the zeros of
    an output without a gradient, or a gradient in another dtype."""
    frame = sys._getframe(2)
    while "/torch/_" in frame.f_code.co_filename:  # how modes are called
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


# --------------------------------------------------------------------------------------------------
# The device

# Ops that give the host a number that the device computes
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
READS |= {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Besides pointwise ops these take a scalar tensor from the CPU
TAKE_SCALARS = INDEXED | {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}


class Device(TorchDispatchMode):
    """One emulated GPU, and what has happened on it."""

    def __init__(self, memory=80 << 30, capability=(9, 0)):
        super().__init__()
        self.capability, self.memory = capability, memory
        self.generator = torch.Generator().manual_seed(0)
        self.allocated = self.reserved = self.peak = 0
        self.known = set()  # storages that are counted as allocated
        self.waits = collections.Counter()  # {(what, line): how often the host waited}
        self.launches = collections.Counter()  # {kernel: launches}
        self.variants = collections.defaultdict(set)  # {kernel: machine-code variants, as triton tells them apart}
        self.ops = collections.Counter()  # {op: calls}, graphs' replays left out
        self.sorted_writes = collections.Counter()  # {line: indexed writes that determinism makes a sort of}
        self.replays = 0
        self.graph = None  # that is being captured
        self.interpret = False  # whether kernels are interpreted
        self.only_record = False  # whether launches are recorded and nothing is computed by them
        self.launching = False  # within a launcher whose numbers come from a reference
        self.late = []  # copies that nobody has waited for

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.zeros.default, aten._to_copy.default) and called_by_autograd():
            kwargs = kwargs | {"device": CUDA}
        return self.run(func, args, kwargs)

    # ---- what the host knows

    def wait(self, what):
        """The host waits for the device."""
        line = caller()
        if self.graph is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what}, {line})")
        self.waits[what, line] += 1
        self.finish_copies()

    def finish_copies(self):
        late, self.late = self.late, []
        for target, numbers, source in late:
            if target is not None:
                target.copy_(numbers)
            elif not torch.equal(source, numbers):
                raise AssertionError("a pinned tensor was written before its copy to the device was over")

    def pin(self, tensor):
        """tensor.pin_memory()"""
        assert not isinstance(tensor, CudaTensor), "only CPU tensors can be pinned"
        pinned = tensor.clone()
        pinned.untyped_storage().pinned = True
        return pinned

    # ---- memory

    def allocate(self, tensor):
        """Count a tensor's storage until it is freed; a graph that is captured owns it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.allocated += size
        if self.allocated > self.memory:
            self.known.remove(key)
            self.allocated -= size
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.reserved = min(self.memory, max(self.reserved, self.allocated))
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self.free, key, size)
        if self.graph is not None:
            self.graph.own[key] = storage

    def free(self, key, size):
        self.known.discard(key)
        self.allocated -= size

    def wrap(self, x):
        if not isinstance(x, torch.Tensor) or isinstance(x, CudaTensor):
            return x
        if not isinstance(x, FakeTensor):
            self.allocate(x)
        return CudaTensor(x)

    # ---- ops

    def run(self, func, args, kwargs):
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, CudaTensor)]
        if not on_gpu and not is_cuda_device(kwargs.get("device")):
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        planning = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if planning or any(isinstance(x.host, FakeTensor) for x in on_gpu):
            return self.compute(func, args, kwargs)
        self.ops[func.name()] += not self.launching
        if func.namespace == "feinschliff":
            return self.launch_op(func, args, kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self.copy(func, args, kwargs)
        self.check(func, args, kwargs, [x for x in tensors if not isinstance(x, CudaTensor)])
        return self.compute(func, args, kwargs)

    def check(self, func, args, kwargs, on_cpu):
        """Raise where CUDA would; count waits."""
        name = func.name()
        if func in READS:
            self.wait(name)
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.wait(name)
        elif func in INDEXED:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.wait(f"{name} by a mask")
            if any(i in on_cpu for i in map(Identity, indices)) or any(not i.is_cuda for i in indices):
                self.wait(f"{name} by indices on the CPU")
            on_cpu = [x for x in on_cpu if not any(x is i for i in indices)]
            if func is not aten.index.Tensor and torch.are_deterministic_algorithms_enabled():
                self.sorted_writes[caller()] += 1
        scalars_may_lie_on_the_cpu = torch.Tag.pointwise in func.tags or "_foreach" in name or func in TAKE_SCALARS
        wrong = [x for x in on_cpu if x.dim() or not scalars_may_lie_on_the_cpu]
        if wrong:
            shapes = [tuple(x.shape) for x in wrong]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({name}, {shapes} on the CPU, {caller()})"
            )

    def copy(self, func, args, kwargs):
        """_to_copy and copy_, which may cross devices."""
        if func is aten.copy_.default:
            target, source, non_blocking = args[0], args[1], (args[2] if len(args) > 2 else False)
            from_gpu, to_gpu = isinstance(source, CudaTensor), isinstance(target, CudaTensor)
        else:
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
            from_gpu = isinstance(source, CudaTensor)
            device = kwargs.get("device")
            to_gpu = from_gpu if device is None else is_cuda_device(device)
        if from_gpu == to_gpu:
            return self.compute(func, args, kwargs)
        pinned = hasattr((source if to_gpu else args[0]).untyped_storage(), "pinned")
        late = non_blocking and (pinned if to_gpu else True)
        if not late:
            self.wait("host to device" if to_gpu else "device to host")
        elif self.graph is not None:
            raise RuntimeError("a copy between host and device is not modelled in a graph")
        out = self.compute(func, args, kwargs, to_gpu)
        if late and to_gpu:
            self.late.append((None, source.clone(), source))
        elif late:
            self.late.append((out, out.clone(), None))
            out.fill_(float("nan") if out.is_floating_point() else -(2**30) if out.dtype != torch.bool else False)
        return out

    def compute(self, func, args, kwargs, to_gpu=True):
        """The op on the hosts' numbers; its outputs lie on the GPU, or where it wrote them."""
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": on_host(torch.device(kwargs["device"]))}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        for argument in func._schema.arguments:
            if (
                argument.name == "generator"
                and kwargs.get("generator") is None
                and len(args) <= len(func._schema.arguments)
            ):
                kwargs = kwargs | {"generator": self.generator}
        call = functools.partial(numbers, func)
        written = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.append(args[i] if i < len(args) else kwargs.get(argument.name))
        taped = self.graph is not None and not self.launching
        if self.graph is not None:
            self.graph.before_writing(written)
        out = call(*mapped(host_of, args), **mapped(host_of, kwargs))
        returns = func._schema.returns
        returns_written = bool(returns) and returns[0].alias_info is not None and returns[0].alias_info.is_write
        if not returns or returns_written:
            result = None if not returns else written[0] if len(returns) == 1 else tuple(written)
        else:
            result = mapped(self.wrap, out) if to_gpu else out
        if taped:
            self.graph.record(call, args, kwargs, None if returns_written else result)
        return result

    # ---- kernels

    def launch_op(self, func, args, kwargs):
        """An op of kernels/: its launcher, and the numbers of its reference."""
        assert not kwargs, func
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        wrong = [tuple(x.shape) for x in tensors if not isinstance(x, CudaTensor)]
        if wrong:
            raise RuntimeError(f"{func.name()}: {wrong} on the CPU among tensors on cuda:0 ({caller()})")
        reference = None if self.interpret else REFERENCES.get(str(func._schema))
        outer, self.launching = self.launching, reference is not None
        try:
            with self, torch.no_grad():
                out = func._op_dk(torch._C.DispatchKey.CUDA, *args)
        finally:
            self.launching = outer
        if reference is None or self.only_record:
            return out
        outs = list(out) if isinstance(out, (tuple, list)) else [] if out is None else [out]
        if self.graph is not None:
            self.graph.before_writing(tensors)

        def fill(outs, args):
            found = reference(*args)
            for host, numbers in zip(outs, found if isinstance(found, tuple) else (found,), strict=True):
                assert host.shape == numbers.shape, (func.name(), host.shape, numbers.shape)
                host.copy_(numbers)

        fill(mapped(host_of, outs), mapped(host_of, args))
        if self.graph is not None and not self.launching:
            self.graph.record(fill, (outs, args), {}, None)
        return out

    def launch(self, kernel, grid, args, kwargs):
        """kernel[grid](*args, **kwargs)"""
        bound = dict(zip(kernel.arg_names, args)) | kwargs
        for name, value in bound.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor):
                raise ValueError(
                    f"Pointer argument ({name} of {kernel.__name__}) cannot be accessed from Triton (cpu tensor?)"
                )
        if any(not isinstance(n, int) for n in grid) or max(grid[1:], default=1) > 65535 or grid[0] >= 2**31:
            raise RuntimeError(f"{kernel.__name__}: CUDA has no grid {grid}")
        self.launches[kernel.__name__] += 1
        self.variants[kernel.__name__].add(variant(kernel, bound))
        if self.launching:
            return
        options = {k: v for k, v in kwargs.items() if k in kernel.arg_names}

        def interpret(args, options):
            kernel.run(*args, grid=grid, warmup=False, **options)

        if self.graph is not None:
            self.graph.before_writing([x for x in bound.values() if isinstance(x, CudaTensor)])
            self.graph.record(interpret, (args, options), {}, None)
        interpret(mapped(host_of, args), mapped(host_of, options))


class Identity:
    """Compares by identity."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x is other

    __hash__ = None


def variant(kernel, bound):
    """What triton compiles anew for: dtypes and alignments, integers that are 1 or multiples of 16
    unless `do_not_specialize` names them, constants, warps and stages."""
    key = []
    annotations = kernel.fn.__annotations__
    unspecialised = kernel.kwargs.get("do_not_specialize") or ()
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            key.append((name, str(value.dtype), value.host.storage_offset() * value.element_size() % 16 == 0))
        elif name not in kernel.arg_names or value is None or "constexpr" in str(annotations.get(name, "")):
            key.append((name, value))
        elif isinstance(value, int) and name not in unspecialised:
            key.append((name, "1" if value == 1 else "16" if value % 16 == 0 else "int"))
        else:
            key.append((name, type(value).__name__))
    return tuple(key)


def numbers(func, *args, **kwargs):
    """The op on CPU tensors. The CPU lacks some of CUDA's."""
    name = func.name()
    if name in ("aten::mm.dtype", "aten::mm.dtype_out"):
        a, b, dtype = args
        out = torch.mm(a.to(dtype), b.to(dtype))
        return kwargs["out"].copy_(out) if "out" in kwargs else out
    if name in ("aten::addmm.dtype", "aten::addmm.dtype_out"):
        total, a, b, dtype = args
        assert a.dtype == b.dtype and total.dtype in (dtype, a.dtype), "addmm: dtypes"
        out = torch.addmm(total, a.to(dtype), b.to(dtype))
        return kwargs["out"].copy_(out) if "out" in kwargs else out
    return func(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# Graphs


class Freed:
    """A tensor in memory that a graph does not own."""

    def __init__(self, tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.place = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype, self.line = tensor.dtype, caller()

    def tensor(self):
        if self.storage.expired():
            raise RuntimeError(
                f"CUDA error: an illegal memory access: {self.line} captured a tensor that has been freed"
            )
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Graph:
    """torch.cuda.CUDAGraph. What is made while it is captured is its own; other memory it only
    knows by address."""

    def __init__(self, keep_graph=False):
        self.tape, self.own, self.before = [], {}, {}

    def before_writing(self, tensors):
        """Keep the bytes of foreign memory, because capturing computes nothing."""
        for x in leaves(tensors):
            if isinstance(x, CudaTensor):
                storage = x.host.untyped_storage()
                if storage._cdata not in self.own:
                    self.before.setdefault(storage._cdata, (storage, storage.clone()))

    def hold(self, x):
        if not isinstance(x, CudaTensor):
            return x
        return x.host if x.host.untyped_storage()._cdata in self.own else Freed(x.host)

    def record(self, call, args, kwargs, result):
        """result: what the call makes, None if it writes into its arguments. A view of foreign
        memory is made again from the address when it is used."""
        results = [host_of(x) for x in leaves(result) if isinstance(x, CudaTensor)]
        if all(x.untyped_storage()._cdata not in self.own for x in results) and results:
            return
        self.tape.append((call, mapped(self.hold, args), mapped(self.hold, kwargs), results))

    def capture_begin(self, pool=None, capture_error_mode="global"):
        GPU.wait("synchronize before a capture")
        GPU.graph = self

    def capture_end(self):
        GPU.graph = None
        for storage, bytes_before in self.before.values():
            storage.copy_(bytes_before)
        self.before = {}

    def replay(self):
        GPU.replays += 1
        with _disable_current_modes():
            for call, args, kwargs, results in self.tape:
                out = call(*mapped(address, args), **mapped(address, kwargs))
                for result, numbers in zip(results, leaves(out)):
                    result.copy_(numbers)

    def reset(self):
        self.__init__()

    def pool(self):
        return (0, 0)


def address(x):
    return x.tensor() if isinstance(x, Freed) else x


@contextlib.contextmanager
def capture(graph, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph"""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


# --------------------------------------------------------------------------------------------------
# The numbers of every op


REFERENCES = {}  # {schema: function of CPU tensors}; an op whose schema changes is interpreted until its own does


def reference(schema):
    """Decorator: the numbers of an op of kernels/, in fp32."""

    def decorate(f):
        REFERENCES[f"feinschliff::{schema}"] = f
        return f

    return decorate


def pullback(f, inputs, grads):
    """The gradients of f at inputs, in fp32. Autograd is off within an op: here it is on again."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False), torch.enable_grad():
            leaves = [x.detach().float().requires_grad_() for x in inputs]
            outs = f(*leaves)
            outs = outs if isinstance(outs, tuple) else (outs,)
            return torch.autograd.grad(outs, leaves, [g.float() for g in grads])


@reference("swiglu(Tensor gate_up) -> Tensor")
def swiglu(gate_up):
    return act.gated(gate_up.float())


@reference("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor")
def swiglu_backward(grad, gate_up):
    return pullback(act.swiglu_reference, [gate_up], [grad])[0]


@reference(f"qk_norm_rope(Tensor qkv, {rope.ARGS}) -> Tensor")
def qk_norm_rope(qkv, *rest):
    return rope.forward_reference(qkv.float(), *rest)[0]


@reference(f"rotate_queries_and_keys(Tensor qkv, {rope.ARGS}) -> Tensor")
def rotate_queries_and_keys(qkv, *rest):
    return qk_norm_rope(qkv, *rest)[:, : (qkv.shape[1] + rest[4]) // 2]


@reference(f"qk_norm_rope_backward(Tensor grad, Tensor? qkv, {rope.ARGS}) -> (Tensor, Tensor)")
def rope_backward(grad, qkv, q_weight, k_weight, *rest):
    if q_weight is None:
        d_qkv = pullback(lambda x: rope.qk_norm_rope_reference(x, None, None, *rest), [torch.zeros_like(grad)], [grad])
        return d_qkv[0], grad[:0, 0, 0]

    def f(x, q, k):
        return rope.qk_norm_rope_reference(x, q, k, *rest)

    d_qkv, dq, dk = pullback(f, [qkv, q_weight, k_weight], [grad])
    return d_qkv, torch.stack([dq, dk])


@reference(f"rotate_back(Tensor(a!) d_qkv, Tensor qkv, {rope.ARGS}) -> Tensor")
def rotate_back(d_qkv, *args):
    back, d_weights = rope_backward(d_qkv, *args)
    d_qkv.copy_(back)
    return d_weights


@reference("rms_norm(Tensor x, Tensor? delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
def rms_norm(x, delta, weight, eps):
    total = x if delta is None else x + delta
    rstd = total.float().square().mean(-1).add(eps).rsqrt()
    return total if delta is not None else total[:0, 0], total.float() * rstd[:, None] * weight, rstd


@reference("rms_norm_backward(Tensor grad, Tensor? d_total, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)")
def rms_norm_backward(grad, d_total, x, weight, rstd):
    normed, g = x.float() * rstd[:, None], grad.float() * weight
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd[:, None]
    return dx if d_total is None else dx + d_total, (grad * normed).sum(0)


def documents_of(queries):
    """[(begin, end)] of a table of tiles."""
    return sorted({(begin, end) for _, begin, end in queries.tolist() if end > begin})


@reference("attention(Tensor q, Tensor k, Tensor v, Tensor queries, int window) -> (Tensor, Tensor)")
def attend(q, k, v, queries, window):
    """(the output, log2-sum-exp2 [H, N])"""
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    for begin, end in documents_of(queries):
        q_, k_, v_ = (x[begin:end].transpose(0, 1) for x in (q, k, v))  # [heads, T, Dh]
        k_, v_ = (x.repeat_interleave(group, 0) for x in (k_, v_))
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        seen = seen.triu(1 - window) if window else seen
        scores = (q_ @ k_.mT * q.shape[2] ** -0.5).masked_fill(~seen, -torch.inf)
        lses.append(scores.logsumexp(-1) * 1.4426950408889634)
        outs.append((scores.softmax(-1) @ v_).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, 1)


@reference(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor queries, "
    "Tensor keys, int window) -> Tensor"
)
def attention_backward(grad, q, k, v, out, lse, queries, keys, window):
    return torch.cat(pullback(lambda q, k, v: attend(q, k, v, queries, window)[0], [q, k, v], [grad]), 1)


def head_gradients(pulled, want_hidden, want_weight):
    """An op's gradients, empty if not wanted."""
    d_hidden, d_weight = pulled
    return d_hidden if want_hidden else d_hidden[:0, 0], d_weight if want_weight else d_weight[:0, 0]


def rounded(weight, hidden):
    return weight.to(hidden.dtype).float()


@reference(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int chunk_mb, bool want_hidden, "
    "bool want_weight) -> (Tensor, Tensor, Tensor)"
)
def cross_entropy(hidden, weight, targets, chunk_mb, want_hidden, want_weight):
    def f(h, w):
        return torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum", ignore_index=head.IGNORE)

    inputs = [hidden, rounded(weight, hidden)]
    return f(hidden.float(), inputs[1]), *head_gradients(
        pullback(f, inputs, [torch.ones(())]), want_hidden, want_weight
    )


def log_softmax(hidden, weight, targets, temperature):
    """(log-probability of each target, log-sum-exp, entropy)"""
    logits = hidden @ weight.T / temperature
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == head.IGNORE, 0.0)
    return chosen, logits.logsumexp(-1), -(log_p.exp() * log_p).sum(-1)


@reference(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy, int chunk_mb)"
    " -> (Tensor, Tensor, Tensor)"
)
def logprob(hidden, weight, targets, temperature, entropy, chunk_mb):
    logp, lse, ent = log_softmax(hidden.float(), rounded(weight, hidden), targets, temperature)
    return logp, lse, ent if entropy else ent[:0]


@reference(
    "linear_logprob_backward(Tensor d_logp, Tensor d_ent, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, "
    "Tensor ent, float temperature, bool entropy, int chunk_mb, bool want_hidden, bool want_weight)"
    " -> (Tensor, Tensor)"
)
def logprob_backward(
    d_logp, d_ent, hidden, weight, targets, lse, ent, temperature, entropy, chunk_mb, want_hidden, want_weight
):
    def f(h, w):
        logp, _, ent = log_softmax(h, w, targets, temperature)
        return (logp, ent) if entropy else logp

    grads = [d_logp, d_ent] if entropy else [d_logp]
    return head_gradients(pullback(f, [hidden, rounded(weight, hidden)], grads), want_hidden, want_weight)


@reference(
    "linear_kl(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, bool reverse, "
    "float temperature, int chunk_mb, bool want_hidden, bool want_weight) -> (Tensor, Tensor, Tensor)"
)
def kl(hidden, weight, teacher_hidden, teacher_weight, reverse, temperature, chunk_mb, want_hidden, want_weight):
    log_q = (teacher_hidden.float() @ rounded(teacher_weight, hidden).T / temperature).log_softmax(-1)

    def f(h, w):
        log_p = (h @ w.T / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum() if reverse else (log_q.exp() * (log_q - log_p)).sum()

    inputs = [hidden, rounded(weight, hidden)]
    return f(hidden.float(), inputs[1]), *head_gradients(
        pullback(f, inputs, [torch.ones(())]), want_hidden, want_weight
    )


@reference(
    "append_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads, float eps, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths) -> Tensor"
)
def append_rope(qkv, q_weight, k_weight, cos, sin, heads, eps, k_cache, v_cache, lengths):
    room = lengths < k_cache.shape[1]  # nothing is written to a full slot
    k, v = k_cache[room], v_cache[room]
    q = qkv.new_zeros(len(qkv), heads, qkv.shape[2])
    q[room] = decode.append_rope_reference(
        qkv[room], q_weight, k_weight, cos[room], sin[room], heads, eps, k, v, lengths[room]
    )
    k_cache[room], v_cache[room] = k, v
    return q


@reference("decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, int window) -> Tensor")
def decode_attention(q, k_cache, v_cache, lengths, window):
    lengths = lengths.clamp(max=k_cache.shape[1])
    return decode.decode_attention_reference(q.float(), k_cache.float(), v_cache.float(), lengths, window)


@reference(
    "draw(Tensor logits, Tensor u, Tensor? settings, float temperature, float top_k, float top_p, bool cut)"
    " -> (Tensor, Tensor)"
)
def draw_token(logits, u, settings, temperature, top_k, top_p, cut):
    if settings is None:
        return draw.draw_reference(logits, u, temperature, int(top_k), top_p)
    return draw.draw_reference(logits, u, *(settings[:, i, None] for i in range(3)))


@reference(
    "record_draw(Tensor token, Tensor logp, Tensor slots, Tensor is_stop, Tensor(a!) tokens, Tensor(b!) logprobs, "
    "Tensor(c!) last, Tensor(d!) drawn, Tensor(e!) left, Tensor(f!) lengths) -> ()"
)
def record_draw(*args):
    draw.record_draw_reference(*args)
    return ()


# --------------------------------------------------------------------------------------------------
# torch.cuda


class Event:
    """torch.cuda.Event on the one stream there is."""

    def __init__(self, enable_timing=False, **options):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return False

    def synchronize(self):
        GPU.wait("event")

    def elapsed_time(self, other):
        return 1.0


@contextlib.contextmanager
def emulate(**options):
    """Within it `--device=cuda` is an emulated GPU; yields the Device. options: of Device."""
    global GPU
    with pytest.MonkeyPatch.context() as patch:
        GPU = gpu = Device(**options)
        importlib.import_module("torch._dynamo")  # before CUDA is said to be there
        patch_cuda(patch, gpu)
        patch_tensors(patch, gpu)
        patch_kernels(patch, gpu)
        try:
            with gpu:
                yield gpu
        finally:
            GPU = None


def patch_cuda(patch, gpu):
    """torch.cuda as it is with one GPU."""
    cuda = torch.cuda
    name = {9: "NVIDIA H100 80GB HBM3", 7: "Tesla T4"}[gpu.capability[0]]
    sms, major, minor = 132, *gpu.capability
    properties = types.SimpleNamespace(
        name=name, multi_processor_count=sms, total_memory=gpu.memory, major=major, minor=minor
    )

    def synchronize(device=None):
        gpu.wait("synchronize")

    def empty_cache():
        gpu.reserved = gpu.allocated

    def set_device(device):
        if torch.device(device).index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got: {device}")

    def reset_peak(device=None):
        gpu.peak = gpu.allocated

    for attribute, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": set_device,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (gpu.memory - gpu.reserved, gpu.memory),
        "memory_reserved": lambda device=None: gpu.reserved,
        "memory_allocated": lambda device=None: gpu.allocated,
        "max_memory_allocated": lambda device=None: gpu.peak,
        "reset_peak_memory_stats": reset_peak,
        "synchronize": synchronize,
        "empty_cache": empty_cache,
        "get_rng_state": lambda device=None: gpu.generator.get_state(),
        "set_rng_state": lambda state, device=None: gpu.generator.set_state(state),
        "get_rng_state_all": lambda: [gpu.generator.get_state()],
        "set_rng_state_all": lambda states: gpu.generator.set_state(states[0]),
        "manual_seed": gpu.generator.manual_seed,
        "manual_seed_all": gpu.generator.manual_seed,
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
    }.items():
        patch.setattr(cuda, attribute, value)
    group = torch._C._group_tensors_by_device_and_dtype

    def group_tensors(lists, with_indices=False):
        groups = group(lists, with_indices)
        on_gpu = any(isinstance(x, CudaTensor) for tensors in lists for x in tensors)
        return {(CUDA if on_gpu else device, dtype): found for (device, dtype), found in groups.items()}

    pad = torch._C._nn.pad_sequence

    def pad_sequence(sequences, batch_first=False, padding_value=0.0, padding_side="right"):
        padded = pad([host_of(x) for x in sequences], batch_first, padding_value, padding_side)
        return gpu.wrap(padded) if isinstance(sequences[0], CudaTensor) else padded

    patch.setattr(torch._C._nn, "pad_sequence", pad_sequence)
    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group_tensors)


def patch_tensors(patch, gpu):
    """Methods that C++ would answer for the CPU."""
    module_to = torch.nn.Module.to

    def move(module, *args, **kwargs):
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter becomes one of another class
        try:
            return module_to(module, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    patch.setattr(torch.nn.Module, "to", move)
    patch.setattr(torch, "tensor", tensor)
    patch.setattr(torch.Tensor, "to", to)
    patch.setattr(
        torch.Tensor, "cuda", lambda self, device=None, non_blocking=False: self.to(CUDA, non_blocking=non_blocking)
    )
    patch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: gpu.pin(self))
    patch.setattr(torch.Tensor, "is_pinned", lambda self, device=None: hasattr(self.untyped_storage(), "pinned"))

    patch.setattr(memory, "FakeTensor", AnyFakeTensor)


def patch_kernels(patch, gpu):
    """Launches go to the device; what kernels have found out about a device is forgotten."""
    from triton.runtime.interpreter import InterpretedFunction

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            gpu.launch(kernel, grid if isinstance(grid, tuple) else (grid,), args, kwargs)

        return launch

    patch.setattr(InterpretedFunction, "__getitem__", getitem)
    patch.setattr(_lib, "OFF", set())
    for cached in (_lib.arch, _lib.sm_count):
        cached.cache_clear()
