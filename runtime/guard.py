"""What a user's code may do to the process that runs it: nothing that lasts.

`guard` surrounds the import of a reward's file and each call of its function, `guard_batch` the
calls of a batch. What the code raises becomes a UserError; what it prints is marked; the settings
of the process are as before.

Out of reach: what it replaces elsewhere than in STANDARD, and what ends this process itself (a
crash in C, os.exec, os.abort, a signal that kills, os._exit in a thread). What was saved is
complete then, and --resume continues from it.
"""

import builtins
import contextlib
import decimal
import gc
import io
import json
import locale
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings

import numpy as np
import torch
import torch.utils._device
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.errors import UserError

# -------------------------------------------------------------------------------------------------
# Settings of the process


def working_directory():
    """Its path; None if it has been deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def set_working_directory(path):
    if path is not None:
        os.chdir(path)


def umask():
    mask = os.umask(0o77)  # it can only be read by setting it
    os.umask(mask)
    return mask


def environment():
    return dict(os.environ)


def set_environment(values):
    for name in set(os.environ) - set(values):
        del os.environ[name]
    os.environ.update(values)


def time_zone():
    return time.tzname, time.timezone


def set_time_zone(value):
    time.tzset()  # to that of the environment


LISTS = [(warnings, "filters"), (sys, "path"), (sys, "argv"), (gc, "callbacks"), (logging.root, "handlers")]


def lists():
    """[(a list of the process, what is in it)]; another list may be in its place afterwards."""
    found = [getattr(owner, name) for owner, name in LISTS]
    return [(items, list(items)) for items in found]


def set_lists(values):
    for (owner, name), (items, before) in zip(LISTS, values, strict=True):
        items[:] = before
        setattr(owner, name, items)


def logs():
    """(level, level that is off) of Python's logging."""
    return logging.root.level, logging.root.manager.disable


def set_logs(levels):
    logging.root.setLevel(levels[0])
    logging.disable(levels[1])


def print_options():
    return np.get_printoptions(), torch._tensor_str.get_printoptions()


def set_print_options(values):
    np.set_printoptions(**values[0])
    torch.set_printoptions(**values[1])


def current_locale():
    return locale.setlocale(locale.LC_ALL)


def set_locale(name):
    locale.setlocale(locale.LC_ALL, name)


def set_numpy_errors(modes):
    np.seterr(**modes)


def set_collection(enabled):
    """Turn Python's garbage collector on or off."""
    if enabled:
        gc.enable()
    else:
        gc.disable()


def deterministic():
    """(whether PyTorch's operations must be deterministic or only warn, whether fresh memory is
    filled)."""
    return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory


def set_deterministic(flags):
    mode, fill = flags
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def autocast():
    return [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


def set_autocast(values):
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), values, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


INFERENCE = []  # the modes that were entered to undo what a user's code had entered


def set_inference_mode(enabled):
    INFERENCE.append(torch.inference_mode(enabled))
    INFERENCE[-1].__enter__()


TENSORS = torch._C._autograd  # what is saved of them for the backward


def contexts():
    """What PyTorch is within: (how many function modes, how many dispatch modes, the hooks of saved
    tensors, why there may be none, the device of the modes, the mode of the default device)."""
    refusal = TENSORS._saved_tensors_hooks_get_disabled_error_message()
    hooks = TENSORS._top_saved_tensors_default_hooks(True)
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return *modes, hooks, refusal, torch.utils._device.CURRENT_DEVICE, default


def leave_contexts(before):
    """Leave those that a user's code has entered."""
    functions, dispatches, hooks, _, torch.utils._device.CURRENT_DEVICE, default = before
    torch._GLOBAL_DEVICE_CONTEXT.device_context = default
    for _ in range(functions, torch._C._len_torch_function_stack()):
        torch._C._pop_torch_function_stack()
    for i in reversed(range(dispatches, torch._C._len_torch_dispatch_stack())):
        TorchDispatchMode.__exit__(torch._C._get_dispatch_stack_at(i), None, None, None)
    TENSORS._saved_tensors_hooks_enable()
    while TENSORS._top_saved_tensors_default_hooks(True) not in (None, hooks):
        TENSORS._pop_saved_tensors_default_hooks()


def attributes(*places):
    """(read, set) of attributes, each (object, name)."""

    def values():
        return [getattr(owner, name) for owner, name in places]

    def set_values(found):
        for (owner, name), value in zip(places, found, strict=True):
            setattr(owner, name, value)

    return values, set_values


def decimal_context():
    return decimal.getcontext().copy()


def set_threshold(counts):
    """The counts at which the garbage collector runs."""
    gc.set_threshold(*counts)


def flush_denormal():
    """Whether numbers below the smallest normal one become 0; PyTorch can only set it."""
    return sys.float_info.min / 2 == 0


def wakeup_descriptor():
    """Where signals are written to; it can only be read by setting it."""
    descriptor = signal.set_wakeup_fd(-1)
    with contextlib.suppress(OSError, ValueError):  # it has been closed
        signal.set_wakeup_fd(descriptor)
    return descriptor


# What a run needs: to be stopped, to notice a late call, to wait for children, to lose its reader
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGPIPE")  # some systems lack some
SIGNALS = [number for number in signal.Signals if number.name in SIGNAL_NAMES]


def signal_handlers(numbers=SIGNALS):
    return {number: signal.getsignal(number) for number in numbers}


def all_signal_handlers():
    return signal_handlers(signal.valid_signals())


def set_signal_handlers(handlers):
    for number, handler in handlers.items():
        # None: not Python's, and so it cannot be set
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def blocked_signals():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def set_blocked_signals(numbers):
    signal.pthread_sigmask(signal.SIG_SETMASK, numbers)


def timers():
    return [signal.getitimer(which) for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)]


def set_timers(values):
    for which, value in zip((signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF), values, strict=True):
        signal.setitimer(which, *value)


def blocking():
    """{descriptor: whether a write waits for its reader}; asyncio has them not wait."""
    return {number: os.get_blocking(number) for number in (0, 1, 2) if is_open(number)}


def set_blocking(flags):
    for number, waits in flags.items():
        if is_open(number):
            os.set_blocking(number, waits)


def limits():
    """{resource: (soft, hard)} of the process."""
    return {which: resource.getrlimit(which) for which in LIMITS}


def set_limits(values):
    for which, value in values.items():
        resource.setrlimit(which, value)


def affinity():
    """The cores that this process may use."""
    return os.sched_getaffinity(0)


def set_affinity(cores):
    os.sched_setaffinity(0, cores)


CUDA = torch.backends.cuda
ATTENTION = ("flash", "mem_efficient", "cudnn", "math")
FP32_PRECISION = [torch.backends, CUDA.matmul, torch.backends.mkldnn.matmul]


def matmul_precision():
    """(what torch.get_float32_matmul_precision says, the newer settings of the same). The first
    raises RuntimeError once one of these has been set: it is None then."""
    newer = [backend.fp32_precision for backend in FP32_PRECISION]
    try:
        return torch.get_float32_matmul_precision(), newer
    except RuntimeError:
        return None, newer


def set_matmul_precision(value):
    older, newer = value
    if older:
        torch.set_float32_matmul_precision(older)
    for backend, precision in zip(FP32_PRECISION, newer, strict=True):  # last: the line above sets them, too
        backend.fp32_precision = precision


def cudnn_tf32():
    """Whether cuDNN's convolutions may use TF32; None if that differs between them."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def set_cudnn_tf32(allowed):
    torch.backends.cudnn.allow_tf32 = allowed


SUMS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def matmul_sums():
    """[(whether sums may be rounded to 16 bits, whether they may be split)] of fp16 and bf16."""
    return [(getattr(CUDA.matmul, name), getattr(CUDA.matmul, f"{name}_split_k")) for name in SUMS]


def set_matmul_sums(values):
    for name, value in zip(SUMS, values, strict=True):
        setattr(CUDA.matmul, name, value)


KEPT = [  # (read, set): as before after each call and after the import
    (contexts, leave_contexts),  # first: nothing else is read and set within them
    (torch._C._get_torch_function_state, torch._C._set_torch_function_state),
    (sys.gettrace, sys.settrace),
    (sys.getprofile, sys.setprofile),
    (threading.gettrace, threading.settrace),
    (threading.getprofile, threading.setprofile),
    (threading.stack_size, threading.stack_size),
    (wakeup_descriptor, signal.set_wakeup_fd),
    (working_directory, set_working_directory),
    (umask, os.umask),
    (current_locale, set_locale),
    (gc.isenabled, set_collection),
    (np.geterr, set_numpy_errors),
    (np.random.get_bit_generator, np.random.set_bit_generator),  # which own_random's states are of
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_inference_mode_enabled, set_inference_mode),
    (torch.is_grad_enabled, torch.set_grad_enabled),  # after the line above, which changes it
    (torch.get_num_threads, torch.set_num_threads),
    (matmul_precision, set_matmul_precision),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (autocast, set_autocast),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    *[(getattr(CUDA, f"{kind}_sdp_enabled"), getattr(CUDA, f"enable_{kind}_sdp")) for kind in ATTENTION],
    (CUDA.fp16_bf16_reduction_math_sdp_allowed, CUDA.allow_fp16_bf16_reduction_math_sdp),
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
    (cudnn_tf32, set_cudnn_tf32),
    attributes(
        *[(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        (torch.backends.mkldnn, "enabled"),
    ),
    attributes(  # what Python calls for an error or a value
        *[(sys, f"{name}hook") for name in ("except", "unraisable", "display", "breakpoint")],
        (threading, "excepthook"),
    ),
    (torch.is_warn_always_enabled, torch.set_warn_always),
    (decimal_context, decimal.setcontext),
    (gc.get_threshold, set_threshold),
    (gc.get_debug, gc.set_debug),
    (flush_denormal, torch.set_flush_denormal),
    (sys.getswitchinterval, sys.setswitchinterval),
    (deterministic, set_deterministic),
]
if os.name == "posix":
    import resource

    LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    KEPT += [(os.geteuid, os.seteuid), (os.getegid, os.setegid)]
    KEPT += [(timers, set_timers), (blocked_signals, set_blocked_signals), (blocking, set_blocking)]
    KEPT += [(limits, set_limits)]
if sys.platform == "linux":
    KEPT += [(affinity, set_affinity)]
KEPT += [(signal_handlers, set_signal_handlers)]  # after the timers: none may go off without its handler
KEPT_BY_IMPORT = [  # slow to read, so not at each call
    (all_signal_handlers, set_signal_handlers),
    (matmul_sums, set_matmul_sums),
    attributes((CUDA.matmul, "allow_fp16_accumulation")),
]
KEPT_BY_BATCH = [  # the file may set these as it is imported, for what it imports and for its calls
    *KEPT_BY_IMPORT,
    (environment, set_environment),
    (lists, set_lists),
    (logs, set_logs),
    (print_options, set_print_options),
    (socket.getdefaulttimeout, socket.setdefaulttimeout),
    (sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    attributes(
        (warnings, "showwarning"), (warnings, "formatwarning"), (torch.distributions.Distribution, "_validate_args")
    ),
]
if os.name == "posix":
    KEPT_BY_BATCH += [(time_zone, set_time_zone)]  # after the environment, which names it


def changed(read, before):
    """Whether a setting differs; one that was deleted, or holds something else now, does."""
    try:
        return read() != before
    except Exception:
        return True


@contextlib.contextmanager
def kept(settings):
    """The settings are the same after the body as before it.

    Raises UserError if one cannot be set back: a lower hard limit, a user that is not root."""
    before = [read() for read, _ in settings]
    try:
        yield
    finally:
        for (read, restore), value in zip(settings, before, strict=True):
            try:
                if changed(read, value):
                    restore(value)
            except Exception as e:
                what = read.__name__.replace("_", " ")
                raise UserError(
                    f"it changed something of this process that cannot be set back ({what}: {e}); do that in a child "
                    "process"
                ) from None


# -------------------------------------------------------------------------------------------------
# Random states

USERS_RANDOM = []  # where the user's code has come to in random numbers of its own


def random_states():
    """[state of Python's, numpy's, torch's and the GPUs' default generators]."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda]


def set_random_states(states):
    for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states[:3], strict=True):
        restore(state)
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])


@contextlib.contextmanager
def own_random():
    """The body draws from a stream of its own, continued by the next body; seeding it changes
    nothing outside. A resumed run starts a new stream."""
    before = random_states()
    set_random_states(USERS_RANDOM or before)
    try:
        yield
    finally:
        USERS_RANDOM[:] = random_states()
        set_random_states(before)


@contextlib.contextmanager
def guard_batch():
    """What is slow to keep, around all calls of a batch: random states, KEPT_BY_BATCH."""
    with own_random(), kept(KEPT_BY_BATCH):
        yield


# -------------------------------------------------------------------------------------------------
# What is printed


class MarkedStream(io.TextIOBase):
    """Passes lines on to a text stream, each with a mark in front; what the stream cannot encode
    goes out as an escape."""

    def __init__(self, stream, mark):
        self.stream, self.mark, self.unfinished = stream, mark, ""

    def reconfigure(self, **options):
        """As sys.stdout has it; the run's own settings stay."""

    def writable(self):
        return True

    def fileno(self):
        return self.stream.fileno()

    @property
    def encoding(self):
        return self.stream.encoding

    @property
    def buffer(self):
        return MarkedBytes(self)

    def write(self, text):
        encoding = self.encoding or "utf-8"
        first, *more = re.split(r"\r\n?|\n", text.encode(encoding, "backslashreplace").decode(encoding))
        *lines, self.unfinished = self.unfinished + first, *more
        for line in lines:
            with contextlib.suppress(OSError):  # the reader has left, or the disk is full: not the reward's fault
                self.stream.write(f"{self.mark} {line}\n")
                self.stream.flush()
        return len(text)

    def end(self):
        """End a line that was begun."""
        if self.unfinished:
            self.write("\n")


class MarkedBytes(io.RawIOBase):
    """Passes bytes on to a MarkedStream, as text."""

    def __init__(self, text):
        self.text = text

    def writable(self):
        return True

    def write(self, data):
        self.text.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


OUTPUTS = ("stdout", "stderr", "__stdout__", "__stderr__")  # of sys


@contextlib.contextmanager
def marked_output(mark):
    """What the body prints is marked; neither it nor its children read what is meant for the run.

    The streams and descriptors 0 to 2 are the same afterwards. What a child process or C writes to
    the descriptors goes out without a mark. Raises UserError if the run's other descriptors were
    closed, or if the user's code has left none.
    """
    before = {name: getattr(sys, name) for name in ("stdin", "__stdin__", *OUTPUTS)}
    try:
        descriptors = {number: os.dup(number) for number in (0, 1, 2) if is_open(number)}
        nothing = os.open(os.devnull, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"it has left the run no file to open ({e.strerror}): close what it opens") from None
    os.dup2(nothing, 0)
    if nothing:
        os.close(nothing)
    # None: was closed from the start. sys.stdout is sys.__stdout__, as a rule, and stays so
    marked = {before[name]: before[name] and MarkedStream(before[name], mark) for name in OUTPUTS}
    vars(sys).update({name: marked[before[name]] for name in OUTPUTS})
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    try:
        yield
    finally:
        vars(sys).update(before)
        for number, copy in descriptors.items():
            try:
                os.dup2(copy, number)
                os.close(copy)
            except OSError:
                raise UserError("it closed files of the run (os.close, os.closerange): do that in a child") from None
        for stream in filter(None, marked.values()):
            stream.end()


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# -------------------------------------------------------------------------------------------------
# What is raised

SECONDS_TO_DESCRIBE = 5.0
# The namespaces of the modules that a run needs: a user's code may put another function in a name's
# place
STANDARD = [vars(module) for module in (builtins, json, math, os, os.path, random, shutil, signal, subprocess, time)]


def set_names(before):
    """Put back what STANDARD held: before is [(namespace, a copy of it)]. What a module has got
    since, a submodule for example, stays."""
    for names, values in before:  # nothing is called here that may have been replaced
        names.update(values)
    if os.name == "posix":
        time.tzset()  # its names of the zone follow the environment


@contextlib.contextmanager
def guard(name):
    """Run the user's code of name = FILE.py:FUNCTION in the body; after it KEPT and STANDARD are as
    before.

    Raises UserError for all that it raises, SystemExit and os._exit too. A child process that it
    forked ends here, however it comes: it must not go on as a second run. A real Ctrl-C stays one.
    """
    file, _, function = name.rpartition(":")
    process, interrupts, error = os.getpid(), [], None
    path = os.path.join(working_directory() or os.sep, file)  # the body may leave this directory, or delete it
    recursion_limit, before = sys.getrecursionlimit(), [(names, dict(names)) for names in STANDARD]
    end_process = os._exit

    def leave(status):
        """os._exit: in the main thread what exit() is; in another thread, or a child, itself."""
        if os.getpid() == process and threading.current_thread() is threading.main_thread():
            raise SystemExit(status)
        end_process(status)

    def on_interrupt(number, frame):
        interrupts.append(number)
        raise KeyboardInterrupt

    with kept(KEPT), marked_output(f"[{os.path.basename(file)}:{function}]"):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, on_interrupt)
        try:
            try:
                os._exit = leave
                yield
            finally:
                sys.setrecursionlimit(recursion_limit)  # first: all that follows calls functions
                set_names(before)  # second: what follows calls theirs
        except BaseException as e:
            error = e if type(e) is UserError else UserError(describe(e, os.path.realpath(path)))
            status = exit_status(e)
            set_names(before)  # its message, too, is the user's code
        if os.getpid() != process:
            leave_child(error, status if error else 0)
    if interrupts:
        raise KeyboardInterrupt
    if error:
        raise error


def describe(error, file):
    """What an exception says, and the last line of `file` that it came through, if it did."""
    name = vars(type)["__name__"].__get__(type(error))  # its class may have another __name__, as code
    try:
        with time_limit(SECONDS_TO_DESCRIBE):
            text = f"{name}: {error}"[:500]
    except BaseException:
        text = f"{name}, whose message cannot be shown"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return f"{text} ({file}:{lines[-1]})" if lines else text


def exit_status(error):
    """The status of a process that this exception ends."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return 1


def leave_child(error, status):
    """End a child that the user's code forked, without what a process does at its end."""
    try:
        if status:
            print(f"a child process that it forked: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


class Overdue(BaseException):
    """A body still runs after its TimeoutError. No Exception, which a loop that retries catches."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError if the body takes longer, even if the body catches that.

    By a signal, so in the main thread and on POSIX only; elsewhere there is no limit. A body that
    takes the alarm for itself, or catches all there is (`except:`), is found late at its end.
    An alarm of its own without a handler is a TimeoutError that says so.
    """
    if os.name != "posix":
        yield
        return
    late = TimeoutError(f"took longer than {seconds:g} seconds")
    expired, ended = 0, False
    monotonic, set_handler, set_timer = time.monotonic, signal.signal, signal.setitimer  # the body may replace them

    def on_alarm(number, frame):
        nonlocal expired
        if ended:  # nothing may be raised between the end of the body and the end of the timer
            return
        if monotonic() - began < seconds:
            raise TimeoutError("its own alarm (signal.alarm, signal.setitimer) came without a handler for it")
        expired += 1
        raise late if expired == 1 else Overdue

    began, before = monotonic(), set_handler(signal.SIGALRM, on_alarm)
    timer = min(seconds, 1e9)  # 30 years: the system counts no further than some hundred
    try:
        # Again and again, for a body that catches the first, but not before its handler has run
        set_timer(signal.ITIMER_REAL, timer, max(timer, 0.1))
        yield
    except Overdue:
        if not expired:  # it is the body's own
            raise
        # `late` has the line that it was raised at first
    finally:
        ended = True
        set_timer(signal.ITIMER_REAL, 0)
        set_handler(signal.SIGALRM, before)
    if monotonic() - began >= seconds:
        raise late
