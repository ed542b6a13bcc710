"""One process of a run: device, seed, torchrun's group, signals, and what the hardware can do."""

import contextlib
import os
import platform
import re
import signal
import sys
import threading
from multiprocessing import active_children
from os import _exit  # while a reward is called, os._exit is another

import torch
import torch.distributed as dist

from kernels.proof import prove
from runtime import cli
from runtime.cli import print0
from runtime.errors import UserError


def launch(main, Config):
    """cli.launch for a script that computes: running out of memory and the loss of another rank of
    the run are one line on stderr as well."""

    def guarded_main(config):
        try:
            main(config)
        except torch.OutOfMemoryError as e:
            raise UserError(out_of_memory(e, config)) from None
        except RuntimeError as e:
            if "DefaultCPUAllocator: " in str(e):
                raise UserError(out_of_memory(e, config)) from None
            if not (isinstance(e, dist.DistError) or re.search(r"[/\\]gloo[/\\]", str(e))):
                raise  # gloo's errors are plain RuntimeErrors that name its sources
            raise UserError(
                f"another process of this run has ended or cannot be reached ({str(e).splitlines()[0]}); it says why "
                "itself. What was saved is complete: fix that, then rerun with --resume"
            ) from None

    status = cli.exit_status(guarded_main, Config)
    if dist.is_initialized():
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # gloo's threads abort the process now and then while Python shuts down
    end_in_time(status)
    if status:
        sys.exit(status)


def out_of_memory(error, config):
    """What is said of it: which flags of this script need less."""
    saving = {"micro_batch_tokens": "a smaller --micro_batch_tokens", "max_new_tokens": "a smaller --max_new_tokens"}
    saving["checkpoint_activations"] = "--checkpoint_activations"
    less = [advice for flag, advice in saving.items() if flag in vars(config)]
    return f"out of memory: {str(error).splitlines()[0]} Less is needed with {', '.join(less) or 'a smaller model'}"


def say(line):
    """Write a line to stderr, also where a signal interrupts a print. That nobody takes it ends
    nothing."""
    if sys.__stderr__ is not None:  # else descriptor 2 may be another file
        with contextlib.suppress(OSError):
            os.write(2, line.encode())


def end_in_time(status, seconds=10):
    """Python waits at its end for threads and children, which a user's reward may have left: after
    so many seconds the process ends without them."""
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    names = [one.name for one in [*threads, *active_children()] if one is not threading.current_thread()]

    def leave():
        try:
            sys.stdout.flush()
        finally:
            say(f"warning: ended without waiting any longer for {', '.join(names)}\n")
            os._exit(1 if isinstance(status, str) else status)

    if names:
        timer = threading.Timer(seconds, leave)
        timer.daemon = True
        timer.start()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(device, seed):
    """Prepare this process and return its torch.device: join torchrun's group if there is one,
    seed, make PyTorch deterministic, have the kernels prove themselves.

    device: "auto" (CUDA, else CPU), "cpu", "cuda", "cuda:1", "mps".
    """
    device = choose_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        # cuBLAS repeats itself bit for bit only with this
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
            # Packs of changing sizes would leave holes that nothing fits into
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.set_device(device)  # CUDA reads the variables when it starts
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms takes seconds: it imports the compiler
    # a debugging aid that comes with the line above and costs a pass over every tensor
    torch.utils.deterministic.fill_uninitialized_memory = False
    prove(device)
    torch.manual_seed(seed + 1000003 * rank())  # ranks drop out different units
    return device


def choose_device(name):
    """The torch.device of --device; a CUDA device has its index. Raises UserError if it is not
    there."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if is_there["cuda"] else "cpu"  # MPS has not been measured: ask for it by name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: not a device; use auto, cpu, cuda, cuda:0 or mps") from None
    if device.type not in ("cpu", *is_there):
        raise UserError(f"--device={name}: not tried here; use auto, cpu, cuda, cuda:0 or mps")
    if not is_there.get(device.type, True):
        raise UserError(f"--device={name}: no such GPU is visible here; use --device=cpu")
    if device.type == "cuda" and device.index is None:  # torch.cuda.set_device wants an index
        index = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else torch.cuda.current_device()
        device = torch.device("cuda", index)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"--device={device}: {torch.cuda.device_count()} GPUs are visible here, from cuda:0 on")
    return device


def reduce_sum(*numbers):
    """Each number summed over all ranks, as floats."""
    total = torch.tensor([float(x) for x in numbers], dtype=torch.float64)
    if world_size() > 1:
        if dist.get_backend() == "nccl":
            total = total.cuda()
        dist.all_reduce(total)
    return total.tolist()


def reduce_max(number):
    """The largest of the ranks' numbers: a sum in which each rank fills only its own place."""
    return max(reduce_sum(*[number if r == rank() else 0.0 for r in range(world_size())]))


def random_state(device):
    """{name: uint8 [ranks, bytes]}: the default generators of every rank. All ranks must call
    it."""
    state = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    for name, mine in state.items():
        mine = mine.to(device)  # NCCL moves only what lies on a GPU
        every = [mine.clone() for _ in range(world_size())]
        if world_size() > 1:
            dist.all_gather(every, mine)
        state[name] = torch.stack(every).cpu()
    return state


def set_random_state(tensors, device):
    """Restore this rank's generators. If the number of ranks has changed, they stay as `setup`
    seeded them."""
    if len(tensors["random/cpu"]) != world_size():
        return
    torch.set_rng_state(tensors["random/cpu"][rank()].clone())  # PyTorch misreads a row of a matrix
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"][rank()].clone(), device)


class Stop:
    """SIGTERM and SIGINT ask a run to finish its step, save and leave; a second one leaves at
    once."""

    def __init__(self):
        self.signal = 0  # the number of the signal that came
        self.leaving = False  # whether all ranks know
        self.process = os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if os.getpid() != self.process:  # a child that a reward forked ends as others do
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if self.signal:
            say(f"\nleft at once on a second {name}; what was saved is complete\n")
            _exit(128 + number)  # a reward function might catch an exception
        self.signal = number
        say(f"\n{name}: finishing this step, then saving; once more to leave at once\n")

    def agreed(self):
        """True if any rank was asked to stop; all ranks learn it at the same step."""
        self.leaving = reduce_sum(self.signal)[0] > 0
        return self.leaving

    def leave(self, step, unit="step"):
        """End the process after a save, with the exit status a shell expects of the signal."""
        print0(f"stopped after {unit} {step}, saved; rerun with --resume to continue", file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))


# Peak dense bf16 TFLOP/s (fp16 before Ampere), from the makers' data sheets; the first entry that
# is a word of the device's name counts
PEAK_TFLOPS = """
    B300 2250; B200 2250; GH200 989; H200 989; H100 PCIe 756; H100 NVL 835; H100 989; H800 989; H20 148;
    A100 312; A800 312; A40 150; A30 165; A10G 70; A10 125; A6000 155; A5000 111; A4000 77; L40S 362; L40 181; L4 121;
    6000 Ada 364; RTX PRO 6000 504; 5090 210; 5080 113; 5070 62; 4090 165; 4080 97; 4070 58; 3090 71; 3080 60; 3070 41;
    V100 125; T4 65; MI325X 1307; MI300X 1307; MI250X 383
"""


def peak_flops(device):
    """Peak dense bf16 FLOP/s of this CUDA device; 0 for a CPU, or if the table does not have it."""
    if device.type != "cuda":
        return 0
    device_name = torch.cuda.get_device_name(device)
    for entry in PEAK_TFLOPS.split(";"):
        name, tflops = entry.strip().rsplit(" ", 1)
        if re.search(rf"\b{name}\b", device_name):
            return float(tflops) * 1e12
    return 0


def describe(device):
    """Versions and hardware, for the head of a log."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "hardware": hardware,
        "world_size": world_size(),
    }
