"""What every stage uses unchanged: the command line, process set-up, the log, signals.

A script is a `Config` dataclass (one commented line a field; every field is a flag), pure functions, and `main(config)`; it ends in
`launch(main, Config)`.
"""
import ctypes, dataclasses, inspect, json, os, platform, re, shutil, signal, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

from kernels._lib import prove


class UserError(Exception):
    """Something the user can mend. The message names the file, line, flag or tensor, and what to do next; `launch` prints it without a traceback."""

    def __str__(self):
        """One line: what stands in a file could else begin further ones, or command the terminal."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


def field_comments(Config):
    """The trailing comment of every field of a dataclass, read from its source: {name: comment}."""
    found = re.findall(r"^    (\w+)\s*:[^#\n]*#\s*(.*)$", inspect.getsource(Config), flags=re.M)
    return {name: comment.strip() for name, comment in found}


def parse_cli(Config, argv=None):
    """Read `--name=value` or `--name value` for every field of the dataclass `Config`; a bool may stand bare. Returns a Config.

    Fields are int, float, str or bool. Raises UserError naming the flag where it is unknown, given twice, lacks a value or has one of the wrong type.
    `--help` prints each field with its comment and default, and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values = {}
    while argv:
        word = argv.pop(0)
        if word in ("-h", "--help"):
            print_help(Config)
            raise SystemExit(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: a flag was expected (--name=value); --help lists them")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields:
            raise UserError(f"--{name}: no such flag; --help lists them")
        if name in values:
            raise UserError(f"--{name}: given twice")
        if not equals:
            bare = not argv or argv[0].startswith("--")
            if bare and fields[name].type is not bool:
                raise UserError(f"--{name}: needs a value ({fields[name].type.__name__})")
            text = "True" if bare else argv.pop(0)
        values[name] = convert(name, text, fields[name].type)
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise UserError(f"--{missing[0]}: must be given; --help lists the flags")
    return Config(**values)


def convert(name, text, kind):
    """The text of flag `name` as int, float, str or bool; UserError names the flag where it is not one."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"--{name}={text}: expected True or False")
        return text.lower() in ("true", "1")
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"--{name}={text}: expected {kind.__name__}") from None
    if kind is float and value != value:
        raise UserError(f"--{name}={text}: not a number")
    if kind is int and value < 0:
        raise UserError(f"--{name}={text}: a count was expected, not less than 0")
    return value


def check(config, good):
    """UserError that names the first flag whose entry in `good`, {flag: bool}, is False: a value of the right type and without meaning."""
    for name, fine in good.items():
        if not fine:
            raise UserError(f"--{name}={vars(config)[name]}: that cannot be; --help says what it means")


def print_help(Config):
    comments = field_comments(Config)
    print((inspect.getmodule(Config).__doc__ or "").strip(), "\n\nflags:")
    for f in dataclasses.fields(Config):
        default = "" if f.default is dataclasses.MISSING else f" (default: {f.default!r})"
        print(f"  --{f.name:<16} {f.type.__name__:<6} {comments.get(f.name, '')}{default}")


def launch(main, Config):
    """Run a script: parse its flags, call `main(config)`, turn a UserError, or the end of another rank, into one line on stderr and exit status 1."""
    status = 0
    try:
        main(parse_cli(Config))
    except UserError as e:
        status = f"error: {e}"
    except SystemExit as e:
        status = e.code
    except torch.OutOfMemoryError as e:
        status = f"error: {str(e).splitlines()[0]} A smaller --micro_tokens or --checkpoint_activations needs less"
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or re.search(r"[/\\]gloo[/\\]", str(e))):  # Gloo's are plain RuntimeErrors
            raise
        status = f"error: another process of this run has ended or cannot be reached ({str(e).splitlines()[0]}); it says why itself. What was saved is whole: mend that, then go on with --resume"
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + 13
    except OSError as e:  # a path too long for a name, or in a directory of somebody else's, fails already where one asks whether it exists
        if e.filename is None:
            raise
        status = f"error: {e.filename}: {e.strerror}"
    if dist.is_initialized():
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1 if isinstance(status, str) else status or 0)  # gloo's threads, still at work while Python takes itself down, abort the process now and then
    if status:
        sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------------------
# The process: one, or one of several under torchrun


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(device, seed):
    """Prepare this process: join torchrun's group if there is one, seed, make what PyTorch offers deterministic, have the kernels prove themselves.

    Returns the torch.device.

    device: "auto" (CUDA, else Apple's MPS, else CPU), "cpu", "cuda", "cuda:1", "mps".
    """
    if device == "auto":
        alone = "RANK" not in os.environ  # gloo, which connects ranks where there is no CUDA, moves nothing that lies on Apple's GPUs
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device={device}: no CUDA GPU is visible here; use --device=cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: no Apple GPU is visible here; use --device=cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device={device}: not a device; use auto, cpu, cuda, cuda:0 or mps") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # set_device refuses a device without an index
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself bit for bit only with this
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc" and not dist.is_initialized():  # several processes need the memory more
        # What is freed stays with this process. Left alone, glibc gives large tensors back, and the system clears each page of the next one at its first touch:
        # a twelfth of the time of a DPO step on 6,000 tokens. The price is memory, in holes between tensors of many sizes; where there is too little, memory.py undoes it.
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX: no mappings; M_TRIM_THRESHOLD: nothing is given back
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that comes with the line above and costs a pass over every tensor
    prove(device)
    torch.manual_seed(seed + 1000003 * rank())  # ranks drop out different units
    return device


def reduce_sum(*numbers):
    """Each number added over all ranks, as floats."""
    if world_size() == 1:
        return [float(x) for x in numbers]
    total = torch.tensor([float(x) for x in numbers], dtype=torch.float64)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.tolist()


def random_state(device):
    """{name: uint8 [ranks, bytes]}: the default generators of every rank, for `set_random_state`. All ranks must call it."""
    state = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    for name, mine in state.items():
        here = mine.to(device)  # NCCL moves only what lies on a GPU
        every = [torch.empty_like(here) for _ in range(world_size())]
        dist.all_gather(every, here) if world_size() > 1 else every[0].copy_(here)
        state[name] = torch.stack(every).cpu()
    return state


def set_random_state(tensors, device):
    """Restore this rank's generators; with another number of ranks than at the save they stay as `setup` seeded them."""
    if len(tensors["random/cpu"]) == world_size():
        torch.set_rng_state(tensors["random/cpu"][rank()].clone())  # PyTorch reads a row of a matrix from the wrong place
        if device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"][rank()].clone(), device)


class Stop:
    """SIGTERM and SIGINT ask the run to finish its step, save and leave; a second one leaves at once."""

    def __init__(self):
        self.asked, self.leaving = 0, False  # the signal's number; whether all ranks know
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked:
            os.write(2, f"\nleft at once on a second {signal.Signals(number).name}; what was saved is whole\n".encode())
            os._exit(128 + number)  # whatever is being done: a reward function may catch what is raised here
        self.asked = number
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving; once more to leave at once\n".encode())  # print may be what was interrupted

    def agreed(self):
        """True when any rank was asked, on all ranks at the same step."""
        self.leaving = reduce_sum(self.asked)[0] > 0
        return self.leaving

    def leave(self, step, unit="step"):
        """End the process after a save, with the exit status a shell expects of the signal."""
        if rank() == 0:
            print(f"stopped after {unit} {step}, saved; the same command with --resume goes on", file=sys.stderr, flush=True)
        sys.exit(128 + (self.asked or signal.SIGTERM))


# ---------------------------------------------------------------------------------------------------------------------------------
# The run directory and its log

OURS = ("log.jsonl", "samples.txt", "latest", "best", "step_[0-9]*", ".tmp_step_*", "nonfinite_*")  # what --overwrite may delete


def open_run(out, resume, overwrite):
    """Make `out` this run's directory and lock it against a second process. Returns its Path.

    UserError where it holds another run and neither `resume` nor `overwrite` was asked, or another process is writing it. Nothing is deleted yet.
    """
    if not out:
        raise UserError("--out: name a directory for the run, for example --out=out/base")
    if resume and overwrite:
        raise UserError("--resume and --overwrite: choose one")
    run = Path(out)
    if rank() == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock(run / ".lock", out)
            found = [p for pattern in OURS for p in run.glob(pattern)]
            if found and not (resume or overwrite):
                raise UserError(f"--out={out}: a run is here already ({found[0].name}); --resume goes on with it, --overwrite replaces it")
        except OSError as e:
            raise UserError(f"--out={out}: {e.strerror}") from None
    return run


def clear_run(run, overwrite):
    """Delete what a killed save left behind; with `overwrite` all that an earlier run wrote, never a stranger's files.

    To be called once the input is known to be good, so that a mistyped --data costs no run.
    """
    if rank() == 0:
        try:
            for p in [p for pattern in (OURS if overwrite else [".tmp_step_*"]) for p in run.glob(pattern)]:
                shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
        except OSError as e:
            raise UserError(f"{run}: {e.strerror}") from None


def lock(path, out):
    """Hold the lock file of `--out=out` while this process lives; UserError if another one does."""
    if os.name != "posix":
        return  # fcntl is POSIX; on Windows two runs in one directory are the user's to avoid
    import fcntl

    handle = open(path, "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--out={out}: another process is writing this run; wait for it or choose another --out") from None
    LOCKS.append(handle)


LOCKS = []  # open for as long as the process lives: closing the file gives the lock up


class Log:
    """One line a step in run/log.jsonl and, every `print_every` steps, on the terminal; and samples.txt. A disk that refuses loses nothing: text waits in memory."""

    def __init__(self, run, steps, start, print_every=1):
        self.path, self.steps, self.start, self.print_every, self.files = run / "log.jsonl", steps, start, print_every, {}
        self.clock = self.began = time.perf_counter()
        if rank() == 0:
            try:
                rewind_log(self.path, start)
                rewind_samples(run / "samples.txt", start)
            except OSError as e:
                raise UserError(f"{run}: {e.strerror}; the log was left as it is") from None

    def write(self, record):
        """Append one JSON object to log.jsonl (rank 0)."""
        self.append("log.jsonl", json.dumps(record, ensure_ascii=False) + "\n")

    def sample(self, step, text):
        """Append an entry to samples.txt (rank 0)."""
        self.append("samples.txt", f"=== step {step} ===\n{text}\n")

    def append(self, name, text):
        """-> what the disk says against it, "" where it has taken all."""
        if rank() != 0:
            return ""
        path = self.path.with_name(name)
        size, waiting = self.files.get(name) or (path.stat().st_size if path.exists() else 0, b"")
        waiting += text.encode("utf-8", "replace")
        try:
            with open(path, "ab") as f:
                f.truncate(size)  # a disk that filled up may have taken half of what waits
                f.write(waiting)
            size, waiting, refused = size + len(waiting), b"", ""
        except OSError as e:
            refused = e.strerror
            print(f"warning: {path}: {e.strerror}; {len(waiting)} bytes wait in memory", file=sys.stderr)
        self.files[name] = size, waiting
        return refused

    def sync(self):
        """Have the disk hold what was written, and what waits: before a checkpoint, so that a checkpoint never knows more than its log. UserError where it cannot."""
        for name in self.files:
            refused, path = self.append(name, ""), self.path.with_name(name)
            try:
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
            except OSError as e:
                refused = refused or e.strerror
            if refused:
                raise UserError(f"{path}: {refused}; make room or give the directory back, then go on with --resume")

    def step(self, step, tokens, flops_per_token, device, quiet={}, **values):
        """Log update number `step` (from 1): its `tokens` (all ranks), speed, MFU where the GPU's peak is known, time left, and `values`; `quiet` ones not on the terminal."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record = {"step": step, **values, **quiet, "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1), "seconds": round(seconds, 4)}
        peak = peak_flops(device)
        if peak:
            record["mfu"] = round(tokens * flops_per_token / seconds / (peak * world_size()), 4)
        self.write(record)
        if rank() == 0 and (step % self.print_every == 0 or step == self.steps):
            left = (now - self.began) / (step - self.start) * (self.steps - step)
            shown = " | ".join(f"{k} {v:.4g}" if k != "loss" else f"loss {v:.4f}" for k, v in values.items())
            mfu = f" | mfu {record['mfu']:.1%}" if peak else ""
            print(f"step {step}/{self.steps} | {shown} | {record['tokens_per_s']:,.0f} tok/s{mfu} | eta {clock_time(left)}", flush=True)

    def skip_time(self):
        """Leave what happened since the last step (an evaluation, a save) out of the next step's speed."""
        self.clock = time.perf_counter()


def clock_time(seconds):
    """90 -> "1m30s"."""
    hours, minutes, seconds = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def rewind_log(path, step):
    """Drop the lines of updates after `step`: a run resumed from an older checkpoint makes them again. A half-written last line goes too."""
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line).get("step", 0) <= step and line.endswith(b"\n"):
                    kept.append(line)
            except ValueError:
                pass
        replace_text(path, b"".join(kept).decode())


def rewind_samples(path, step):
    """The same for samples.txt, whose entries begin with "=== step N ===" lines."""
    if path.exists():
        whole = path.read_bytes()
        parts = re.split(r"(?m)^(?==== step \d+ ===$)", whole[: whole.rfind(b"\n") + 1].decode("utf-8", "replace"))
        replace_text(path, "".join(p for p in parts if p and int(p.split()[2]) <= step))


def replace_text(path, text):
    """Write a text file so that it is either the old or the new one, whole, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------------------
# What the hardware could do

PEAK_TFLOPS = {  # dense bf16 (fp16 before Ampere), from the makers' data sheets; the first found as a word of the device's name counts
    "B300": 2250, "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125, "A6000": 155, "A5000": 111, "A4000": 77, "L40S": 362, "L40": 181, "L4": 121,
    "6000 Ada": 364, "RTX PRO 6000": 504, "5090": 210, "5080": 113, "5070": 62, "4090": 165, "4080": 97, "4070": 58, "3090": 71, "3080": 60, "3070": 41,
    "V100": 125, "T4": 65, "MI325X": 1307, "MI300X": 1307, "MI250X": 383,
}  # fmt: skip


def peak_flops(device):
    """Peak dense bf16 FLOP/s of this CUDA device; 0 where it is not in the table, or for a CPU."""
    if device.type != "cuda":
        return 0
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), 0)


def describe(device):
    """Versions and hardware, for the head of a log."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "python": platform.python_version(), "device": str(device), "hardware": name, "world_size": world_size()}
