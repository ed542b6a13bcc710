"""What a user's code may do to the process that runs it: nothing that lasts.

`guard` surrounds the import of a reward's file and each call of its function, `guard_batch` the
calls of a batch. What the code raises becomes a UserError; what it prints is marked; the settings
of the process are as before.

Out of reach: code that ends this process itself (os._exit, a crash in C). What was saved is
complete then, and --resume continues from it.
"""

import builtins
import contextlib
import decimal
import gc
import io
import locale
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
import warnings

import numpy as np
import torch

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


def warning_filters():
    return list(warnings.filters)


def set_warning_filters(filters):
    warnings.filters[:] = filters


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
    return [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]


def set_autocast(flags):
    for kind, enabled in zip(("cpu", "cuda"), flags, strict=True):
        torch.set_autocast_enabled(kind, enabled)


INFERENCE = []  # the modes that were entered to undo what a user's code had entered


def set_inference_mode(enabled):
    INFERENCE.append(torch.inference_mode(enabled))
    INFERENCE[-1].__enter__()


def mkldnn():
    return torch.backends.mkldnn.enabled


def set_mkldnn(enabled):
    torch.backends.mkldnn.enabled = enabled


def hooks():
    """What Python calls for an error, and what the run calls to speak and to save."""
    return sys.excepthook, threading.excepthook, builtins.print, builtins.open


def set_hooks(functions):
    sys.excepthook, threading.excepthook, builtins.print, builtins.open = functions


def decimal_context():
    return decimal.getcontext().copy()


def set_threshold(counts):
    """The counts at which the garbage collector runs."""
    gc.set_threshold(*counts)


def flush_denormal():
    """Whether numbers below the smallest normal one become 0; PyTorch can only set it."""
    return sys.float_info.min / 2 == 0


# What a run needs: to be stopped, to notice a late call, to wait for children, to lose its reader
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGPIPE")  # some systems lack some
SIGNALS = [number for number in signal.Signals if number.name in SIGNAL_NAMES]


def signal_handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def set_signal_handlers(handlers):
    for number, handler in zip(SIGNALS, handlers, strict=True):
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


FP32_PRECISION = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]


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


KEPT = [  # (read, set): as before after each call and after the import
    (sys.gettrace, sys.settrace),
    (sys.getprofile, sys.setprofile),
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
    (mkldnn, set_mkldnn),
    (hooks, set_hooks),
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
KEPT_BY_IMPORT = [(torch.get_default_device, torch.set_default_device)]  # slow to read, so not at each call
# The file may set these two as it is imported, for what it imports
KEPT_BY_BATCH = [*KEPT_BY_IMPORT, (warning_filters, set_warning_filters), (environment, set_environment)]


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
                if read() != value:
                    restore(value)
            except (OSError, ValueError) as e:
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


@contextlib.contextmanager
def marked_output(mark):
    """What the body prints is marked; neither it nor its children read what is meant for the run.

    The streams and descriptors 0 to 2 are the same afterwards. What a child process or C writes to
    the descriptors goes out without a mark. Raises UserError if the run's other descriptors were
    closed, or if the user's code has left none.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    try:
        descriptors = {number: os.dup(number) for number in (0, 1, 2) if is_open(number)}
        nothing = os.open(os.devnull, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"it has left the run no file to open ({e.strerror}): close what it opens") from None
    os.dup2(nothing, 0)
    if nothing:
        os.close(nothing)
    marked = [stream and MarkedStream(stream, mark) for stream in before[1:]]  # None: was closed from the start
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), *marked
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for number, copy in descriptors.items():
            try:
                os.dup2(copy, number)
                os.close(copy)
            except OSError:
                raise UserError("it closed files of the run (os.close, os.closerange): do that in a child") from None
        for stream in filter(None, marked):
            stream.end()


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# -------------------------------------------------------------------------------------------------
# What is raised


@contextlib.contextmanager
def guard(name):
    """Run the user's code of name = FILE.py:FUNCTION in the body; KEPT is as before after it.

    Raises UserError for all that it raises, SystemExit too. A child process that it forked ends
    here, however it comes: it must not go on as a second run. A real Ctrl-C stays one.
    """
    file, _, function = name.rpartition(":")
    process, interrupts, error = os.getpid(), [], None
    path = os.path.join(working_directory() or os.sep, file)  # the body may leave this directory, or delete it
    recursion_limit = sys.getrecursionlimit()

    def on_interrupt(number, frame):
        interrupts.append(number)
        raise KeyboardInterrupt

    with kept(KEPT), marked_output(f"[{os.path.basename(file)}:{function}]"):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, on_interrupt)
        try:
            try:
                yield
            finally:
                sys.setrecursionlimit(recursion_limit)  # first: all that follows calls functions
        except BaseException as e:
            error = e if isinstance(e, UserError) else UserError(describe(e, os.path.realpath(path)))
            status = exit_status(e)
        if os.getpid() != process:
            leave_child(error, status if error else 0)
    if interrupts:
        raise KeyboardInterrupt
    if error:
        raise error


def describe(error, file):
    """What an exception says, and the last line of `file` that it came through, if it did."""
    try:
        text = f"{type(error).__name__}: {error}"[:500]
    except BaseException:  # its own code too
        text = f"{type(error).__name__}, whose message cannot be shown"
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
    """
    if os.name != "posix":
        yield
        return
    late = TimeoutError(f"took longer than {seconds:g} seconds")
    expired, ended = 0, False

    def on_alarm(number, frame):
        nonlocal expired
        expired += 1
        if not ended:  # nothing may be raised between the end of the body and the end of the timer
            raise late if expired == 1 else Overdue

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, on_alarm)
    # No shorter than a handler takes, and no longer than the system counts
    timer = min(max(seconds, 1e-3), 1e9)
    try:
        # again and again, for a body that catches the first
        signal.setitimer(signal.ITIMER_REAL, timer, max(timer, 0.1))
        yield
    except Overdue:
        pass  # `late` has the line that it was raised at first
    finally:
        ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if expired or time.monotonic() - began > seconds:
        raise late
