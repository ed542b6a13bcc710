"""runtime/guard.py: what a user's reward does to the process is undone or one line, by the kind."""

import builtins
import contextlib
import decimal
import gc
import json
import locale
import logging
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from bench.child import Child
from rollout import Sample
from runtime import guard
from runtime.errors import UserError
from runtime.guard import random_states
from runtime.process import Stop
from scoring import call_function, load_function, load_rewards, read_value, score_completions

HEAD = (
    "import gc, locale, os, random, signal, subprocess, sys, threading, time, warnings\nimport numpy as np\n"
    "import torch\n\ndef reward(prompt, completion, row):\n"
)


def write_reward(folder, body, head=HEAD):
    """FILE.py:reward, whose function has this body."""
    (folder / "mine.py").write_text(head + "".join(f"    {line}\n" for line in body.splitlines()))
    return f"{folder}/mine.py:reward"


def score(name, timeout=30.0, n=1):
    """What a reward says of n completions "A", "AA", ... to one prompt of three messages."""
    rewards = load_rewards(name, torch.device("cpu"), 1000, timeout=timeout)
    row = ([{"role": "user", "content": "q"}] * 3, {"id": 7, "tests": ["a", "b"]})
    samples = [Sample(0, [65], [0.0], True) for _ in range(n)]
    return score_completions(rewards, [row], samples, ["A" * (i + 1) for i in range(n)])[0].tolist()


# --------------------------------------------------------------------------------------------------
# What it raises


@pytest.mark.parametrize(
    "body, error",
    [
        ("exit()", "SystemExit: None"),
        ("exec('exit()')", "SystemExit: None"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("raise GeneratorExit", "GeneratorExit: "),
        ("raise StopIteration(3)", "StopIteration: 3"),
        ("return reward(prompt, completion, row)", "RecursionError: maximum recursion depth exceeded"),
        ("sys.setrecursionlimit(60)\nreturn reward(prompt, completion, row)", "RecursionError: "),
        ("assert False, 'no such word'", "AssertionError: no such word"),
        ("class E(Exception):\n    def __str__(self): exit()\nraise E", "E, whose message cannot be shown"),
        ("return float(input())", "EOFError: "),
        ("signal.alarm(0)\ntime.sleep(0.2)\nreturn 1.0", "TimeoutError: took longer than 0.1 seconds"),
        ("signal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(2)", "TimeoutError: its own alarm (signal.alarm, "),
        ("raise BrokenPipeError(32, 'gone')", "BrokenPipeError: "),
        (
            "class M(type): __name__ = property(len)\nclass E(Exception, metaclass=M): pass\nraise E('x')",
            "E: x",
        ),
        ("from runtime.guard import Overdue\nraise Overdue('x')", "Overdue: x"),
        (
            "for _ in range(50):\n    try: time.sleep(1)\n    except Exception: alarm = 1",
            "TimeoutError: took longer than 0.1 seconds",
        ),
    ],
)
def test_whatever_a_reward_raises_names_it_its_completion_and_its_row(tmp_path, body, error):
    name, limit = write_reward(tmp_path, body), sys.getrecursionlimit()
    with pytest.raises(UserError) as e:
        score(name, timeout=0.1 if "alarm" in body else 5.0)
    message = str(e.value)
    assert message.startswith(f"--reward={name}: {error}") and (f"({tmp_path}/mine.py:" in message or "alarm" in body)
    assert "for the completion 'A' and the row {'id': 7, " in message and sys.getrecursionlimit() == limit


@pytest.mark.parametrize("head", ["", "from os import _exit as leave\n"])
def test_a_reward_that_ends_the_process_is_named(tmp_path, head):
    """In a child, which would end with status 0 and say nothing."""
    name = write_reward(tmp_path, "leave(0)" if head else "os._exit(0)", head + HEAD)
    status, output = Child(tmp_path / "output", lambda: score(name)).wait(20)
    assert status == 1 and f"UserError: --reward={name}: SystemExit: 0 ({tmp_path}/mine.py:" in output


def test_a_reward_may_catch_its_own_alarm_without_a_handler(tmp_path):
    body = "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntry: time.sleep(2)\nexcept TimeoutError: return 3.0"
    assert score(write_reward(tmp_path, body)) == [3.0]


def test_a_run_that_is_stopped_twice_within_a_reward_leaves_at_once(tmp_path):
    """Even if the reward catches everything: by os._exit, which the reward itself does not have."""
    body = "try:\n    for _ in 'ab': os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(5)\nexcept: pass\nreturn 1.0"
    name = write_reward(tmp_path, body)

    def run():
        stop = Stop()
        print(score(name), stop)

    status, output = Child(tmp_path / "output", run).wait(20)
    assert status == 128 + signal.SIGTERM and "left at once on a second SIGTERM" in output.splitlines()[-1]


def test_an_exception_whose_message_does_not_end_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS_TO_DESCRIBE", 0.1)
    body = "class E(Exception):\n    def __str__(self): return str([time.sleep(0.01) for _ in range(300)])\nraise E"
    with pytest.raises(UserError, match=r"reward: E, whose message cannot be shown \(.*mine.py:8\), for the comp"):
        score(write_reward(tmp_path, body))


@pytest.mark.parametrize(
    "body",
    [
        "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n    os.chdir(d)\n    raise ValueError('x')",
        "os.chdir('/')\nraise ValueError('x')",
    ],
)
def test_an_error_in_another_directory_or_in_none_names_its_line(tmp_path, body, monkeypatch):
    """The file is named as a user does, from the directory of the run."""
    monkeypatch.chdir(tmp_path)
    write_reward(tmp_path, body)
    with pytest.raises(UserError, match=rf"ValueError: x \({tmp_path}/mine.py:\d+\), for the completion 'A'"):
        score("mine.py:reward")
    assert os.getcwd() == str(tmp_path)


@pytest.mark.parametrize("body", ["exit()", "raise KeyboardInterrupt", "import nothing_of_this_name", "x = ("])
def test_a_file_that_leaves_as_it_is_imported_is_named(tmp_path, body):
    name = write_reward(tmp_path, "return 1.0", body + "\ndef reward(prompt, completion, row):\n")
    with pytest.raises(UserError, match=f"--reward={name}: .*mine.py cannot be imported: [A-Z]"):
        load_function(name)


def test_ctrl_c_during_a_reward_stays_ctrl_c(tmp_path):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for body in ("os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)", "os.kill(os.getpid(), signal.SIGINT)"):
            caught = "\n".join(f"    {line}" for line in body.splitlines())
            for code in (body, f"try:\n{caught}\nexcept BaseException: pass\nreturn 0.0"):
                sys.modules.pop(f"{tmp_path}/mine.py", None)
                with pytest.raises(KeyboardInterrupt):
                    score(write_reward(tmp_path, code))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)


# --------------------------------------------------------------------------------------------------
# Children


@pytest.mark.parametrize(
    "end", ["return 5.0", "raise ValueError('x')", "exit()", "os._exit(0)", "os.kill(os.getpid(), 9)", "sys.exit(3)"]
)
def test_a_child_that_a_reward_forks_is_no_second_run(tmp_path, end):
    name = write_reward(
        tmp_path,
        f"pid = os.fork()\nif pid == 0:\n    {end}\nreturn float(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    )

    def run():
        try:
            value = score(name)
        finally:
            with open(tmp_path / "ends", "a") as file:
                file.write("end\n")
        print(value)

    status, output = Child(tmp_path / "output", run).wait(20)
    expected = {"raise": 1, "sys.e": 3, "os.ki": -9}.get(end[:5], 0)
    assert (status, output.splitlines()[-1]) == (0, f"[{expected}.0]") and (tmp_path / "ends").read_text() == "end\n"
    assert ("[mine.py:reward] a child process that it forked: ValueError: x" in output) == ("raise" in end)


def test_a_child_of_a_run_can_be_terminated(tmp_path):
    body = "pid = os.fork()\nif pid == 0:\n    time.sleep(9)\n    os._exit(0)\n"
    body += "time.sleep(0.1)\nos.kill(pid, signal.SIGTERM)\n"  # Python forgets what comes during a fork
    body += "return float(os.waitpid(pid, 0)[1])"
    name = write_reward(tmp_path, body)

    def run():
        stop = Stop()
        print(score(name), stop.signal)

    assert Child(tmp_path / "output", run).wait(8) == (0, "[15.0] 0\n")


def test_a_file_may_use_dataclasses_pickle_and_processes_as_any_module_may(tmp_path):
    head = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport multiprocessing\n"
        "import pickle\n\n@dataclass\nclass Case:\n    text: str\n\ndef length(case):\n    return len(case.text)\n\n"
        "def reward(prompt, completion, row):\n"
    )
    body = (
        "case = pickle.loads(pickle.dumps(Case(completion)))\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "    return sum(pool.map(length, [case, case]))"
    )
    name = write_reward(tmp_path, body, head)
    assert Child(tmp_path / "output", lambda: print(score(name, n=2))).wait(30) == (0, "[2.0, 4.0]\n")


# --------------------------------------------------------------------------------------------------
# What it changes


def test_a_reward_gets_copies(tmp_path):
    body = (
        "seen = len(prompt) + 10 * len(row['tests']) + 100 * len(prompt[0])\nprompt.append(prompt[0])\n"
        "prompt[0].clear()\nrow['tests'].pop()\nrow.clear()\nreturn seen"
    )
    assert score(write_reward(tmp_path, body), n=3) == [223.0] * 3


CHANGES = {
    "working directory": "os.chdir('/')",
    "umask": "os.umask(0o777)",
    "environment": "os.environ['HOME'] = 'x'; os.environ['NEW_NAME'] = '1'; os.environ.pop('PATH', 0)",
    "warnings": "warnings.simplefilter('error')",
    "no warnings": "warnings.resetwarnings()",
    "locale": "locale.setlocale(locale.LC_ALL, 'C.UTF-8' if locale.setlocale(locale.LC_ALL) == 'C' else 'C')",
    "garbage collector": "gc.disable()",
    "numpy errors": "np.seterr(all='raise')",
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta:0')",
    "grad mode": "torch.set_grad_enabled(not torch.is_grad_enabled())",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "determinism": "torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "precision of cuBLAS": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "precision of all": "torch.backends.fp32_precision = 'tf32'",
    "recursion limit": "sys.setrecursionlimit(5000)",
    "low recursion limit": "sys.setrecursionlimit(len(__import__('inspect').stack()) + 30)",
    "handlers": "[signal.signal(n, signal.SIG_IGN) for n in (2, 14, 15, 17)]",
    "blocked signals": "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})",
    "alarm": "signal.alarm(1)",
    "profiling timer": "signal.setitimer(signal.ITIMER_PROF, 30)",
    "trace": "sys.settrace(print); sys.setprofile(None)",
    "inference mode": "global M; M = torch.inference_mode(); M.__enter__()",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "anomaly": "torch.autograd.set_detect_anomaly(True)",
    "product of another library": "torch.backends.mkldnn.enabled = not torch.backends.mkldnn.enabled",
    "error hooks": "sys.excepthook = threading.excepthook = print",
    "builtins": "import builtins as b; print('x', end=''); b.print = b.open = b.zip = None; del b.hex",
    "functions": "import json, math, shutil; os.replace = os.unlink = shutil.rmtree = subprocess.Popen = None; "
    "json.dumps, math.isfinite, os.path.exists = str, bool, len; del os.stat",
    "functions that the guard calls": "os.chdir = os.getcwd = os.dup2 = time.monotonic = random.getstate = None; "
    "signal.signal = signal.setitimer = signal.getsignal = time.tzset = None",
    "a patch": "from unittest import mock; mock.patch('os.replace').start(); mock.patch('time.perf_counter').start()",
    "constants": "import math; math.pi, os.sep, os.path.sep, os.path, time.tzname = 3, '/', '/', None, None",
    "another environment": "os.environ = {}",
    "decimals": "import decimal; decimal.getcontext().prec = 2",
    "collector's counts": "gc.set_threshold(1)",
    "collector's messages": "gc.set_debug(gc.DEBUG_UNCOLLECTABLE)",
    "denormal numbers": "torch.set_flush_denormal(True)",
    "generator of numpy": "np.random.set_bit_generator(np.random.PCG64(1))",
    "switches of threads": "sys.setswitchinterval(2)",
    "writes that do not wait": "os.set_blocking(2, not os.get_blocking(2))",
    "limits": "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (9, r.getrlimit(r.RLIMIT_FSIZE)[1]))",
    "cores": "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "attention": "[getattr(torch.backends.cuda, f'enable_{name}_sdp')(False) for name in SDP]",
    "attention of one kind": "M.append(K(B.CUDNN_ATTENTION, True)); M[-1].__enter__()",
    "attention's sums": "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)",
    "cuDNN": "c = torch.backends.cudnn; c.enabled, c.benchmark, c.deterministic = not c.enabled, True, True",
    "precision of cuDNN": "torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32",
    "precision of convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "type of autocast": "torch.set_autocast_dtype('cpu', torch.float16)",
    "cache of autocast": "torch.set_autocast_cache_enabled(False)",
    "warnings of PyTorch": "torch.set_warn_always(True)",
    "a device's context": "[torch.device('meta').__enter__() for _ in range(2)]",
    "a function mode": "class F(torch.overrides.TorchFunctionMode): pass\nF().__enter__()",
    "a dispatch mode": "class D(TorchDispatchMode): pass\nD().__enter__()",
    "hooks of saved tensors": "[torch.autograd.graph.saved_tensors_hooks(len, id).__enter__() for _ in range(2)]",
    "no hooks of saved tensors": "M.append(torch.autograd.graph.disable_saved_tensors_hooks('no')); M[-1].__enter__()",
    "functions of tensors": "M.append(torch._C.DisableTorchFunction()); M[-1].__enter__()",
    "deleted": "del sys.excepthook, sys.unraisablehook; sys.displayhook = sys.breakpointhook = None",
    "traced threads": "threading.settrace(print); threading.setprofile(print); threading.stack_size(1 << 20)",
    "wakeup": "s = socket.socket(); M.append(s); s.setblocking(False); signal.set_wakeup_fd(s.fileno())",
    "a closed wakeup": "with socket.socket() as s: s.setblocking(False); signal.set_wakeup_fd(s.fileno())",
}
BY_BATCH = {  # the others also after each call
    **{name: CHANGES[name] for name in ("environment", "warnings", "no warnings")},
    "time zone": "os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()",
    "all signals": "[signal.signal(n, signal.SIG_IGN) for n in signal.valid_signals() - {9, 19}]",
    "lists": "sys.path.append('x'); sys.argv = ['x']; gc.callbacks.append(lambda *a: 0); sys.argv.append('y')",
    "no lists": "gc.callbacks.append(lambda *a: 0); gc.callbacks = []; sys.argv = sys.path = None",
    "logs": "logging.basicConfig(level=10); logging.disable(50); logging.root.handlers = []",
    "printed numbers": "np.set_printoptions(precision=2, formatter={'int': str}); torch.set_printoptions(2)",
    "time of a socket": "socket.setdefaulttimeout(1e-3)",
    "digits": "sys.set_int_max_str_digits(700)",
    "warning hooks": "warnings.showwarning = warnings.formatwarning = print",
    "checks of distributions": "torch.distributions.Distribution.set_default_validate_args(False)",
    "sums of products": "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)",
    "split sums": "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, True)",
    "fp16 sums": "torch.backends.cuda.matmul.allow_fp16_accumulation = True",
}
CHANGES |= BY_BATCH
SDP = ("flash", "mem_efficient", "cudnn", "math")
CHANGES_HEAD = (
    f"import logging, socket\nfrom torch.nn.attention import SDPBackend as B, sdpa_kernel as K\nSDP, M = {SDP}, []\n"
    "from torch.utils._python_dispatch import TorchDispatchMode\n"
)


def settings():
    """All that CHANGES change; not read from the guard's own list, which may lack one."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    timers = [signal.getitimer(which) for which in (signal.ITIMER_REAL, signal.ITIMER_PROF)]
    python = [os.getcwd(), guard.umask(), dict(os.environ), gc.isenabled(), id(os.environ)]
    lists = (warnings.filters, sys.path, sys.argv, gc.callbacks, logging.root.handlers)
    python += [(id(items), list(items)) for items in lists]
    python += [dict(vars(m)) for m in (builtins, json, math, os, os.path, random, shutil, signal, subprocess, time)]
    python += [logging.root.level, logging.root.manager.disable, logging.root.isEnabledFor(20)]
    python += [time.tzname, time.localtime(0).tm_hour, socket.getdefaulttimeout(), sys.get_int_max_str_digits()]
    python += [sys.unraisablehook, sys.displayhook, sys.breakpointhook, warnings.showwarning, warnings.formatwarning]
    python += [threading.gettrace(), threading.getprofile(), threading.stack_size(), signal.set_wakeup_fd(-1)]
    python += [locale.setlocale(locale.LC_ALL), sys.getrecursionlimit(), sys.gettrace(), sys.getprofile()]
    numbers = [np.geterr(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()]
    numbers += [torch.get_num_threads(), torch.get_float32_matmul_precision(), guard.deterministic()]
    numbers += [torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision]
    numbers += [torch.is_inference_mode_enabled(), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()]
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    numbers += [getattr(cuda, f"{name}_sdp_enabled")() for name in SDP] + [torch._C._get_sdp_priority_order()]
    numbers += [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.conv.fp32_precision]
    numbers += [cuda.fp16_bf16_reduction_math_sdp_allowed(), cuda.matmul.allow_fp16_accumulation]
    numbers += [torch._C._get_cublas_allow_bf16_reduced_precision_reduction()]
    numbers += [torch._C._get_cublas_allow_fp16_reduced_precision_reduction()]
    numbers += [torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()]
    numbers += [torch._C._autograd._top_saved_tensors_default_hooks(True), torch.overrides._get_current_function_mode()]
    numbers += [torch._C._autograd._saved_tensors_hooks_is_enabled(), torch._C._is_torch_function_enabled()]
    numbers += [np.get_printoptions(), repr(torch.tensor(1.5)), torch.is_warn_always_enabled()]
    numbers += [torch.distributions.Distribution._validate_args, torch.utils._device.CURRENT_DEVICE]
    numbers += [torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled(), torch.backends.mkldnn.enabled]
    python += [sys.excepthook, threading.excepthook, sys.getswitchinterval()]
    python += [decimal.getcontext().prec, gc.get_threshold(), os.get_blocking(2), os.sched_getaffinity(0)]
    python += [resource.getrlimit(resource.RLIMIT_FSIZE), gc.get_debug()]
    numbers += [(torch.tensor(1e-310, dtype=torch.float64) * 1.5).item() > 0, np.random.get_bit_generator()]
    return [handlers, timers, signal.pthread_sigmask(signal.SIG_BLOCK, ()), python, numbers]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("closed", [True, False])
def test_a_reward_may_print_where_nothing_can_be_written(tmp_path, monkeypatch, closed):
    """With `>&-` Python has no stdout; on a full disk every write fails."""
    stream = None if closed else open("/dev/full", "w")
    monkeypatch.setattr("sys.stdout", stream)
    assert score(write_reward(tmp_path, "print('seen')\nreturn 2.0")) == [2.0]
    if stream:
        with contextlib.suppress(OSError):
            stream.close()


def test_a_reward_that_leaves_no_file_to_open_is_named(tmp_path):
    name = write_reward(
        tmp_path, "FILES.append(open(__file__))\nreturn 1.0", HEAD.replace("def ", "FILES = []\ndef ", 1)
    )
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    function, open_now = load_function(name), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, hard))
    try:
        with pytest.raises(UserError, match="reward.*(no file to open|Too many open files)"):
            for _ in range(30):
                call_function(name, function, 5.0, [{"content": "q"}], {}, "A")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_as_before_after_a_call(tmp_path, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write_reward(tmp_path, f"{CHANGES[change]}\nreturn 2.0", CHANGES_HEAD + HEAD)
    function, before = load_function(name), settings()
    assert score(name, n=2) == [2.0, 2.0] and settings() == before
    if change not in BY_BATCH:
        call_function(name, function, 5.0, [{"content": "q"}], {}, "A")
        assert settings() == before


def test_what_a_module_has_got_stays(tmp_path):
    """As it does when a submodule is imported for the first time."""
    name = write_reward(tmp_path, "os.got = 1\nreturn 1.0")
    try:
        assert score(name) == [1.0] and os.got == 1
    finally:
        vars(os).pop("got", None)


def test_a_time_zone_that_an_import_sets_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    head = "import os, time\nos.environ['TZ'] = 'Asia/Tokyo'\ntime.tzset()\n" + HEAD
    try:
        assert score(write_reward(tmp_path, "return float(time.timezone)", head)) == [-9 * 3600.0]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_user_is_as_before(tmp_path):
    """In a child, since what is left of this process could not clean up."""
    name = write_reward(tmp_path, "os.setegid(os.getegid() or 9)\nos.seteuid(os.geteuid() or 9)\nreturn os.geteuid()")
    before = os.geteuid(), os.getegid()
    child = Child(tmp_path / "output", lambda: print(score(name), (os.geteuid(), os.getegid()) == before))
    assert child.wait(20) == (0, f"[{before[0] or 9}.0] True\n")


def test_random_states_are_as_before_and_a_reward_draws_from_its_own(tmp_path):
    name = write_reward(tmp_path, "return random.random() + np.random.rand() + torch.rand(()).item()")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random_states()
    drawn = score(name, n=2) + score(name, n=2)
    after = random_states()
    assert len(set(drawn)) == 4 and before[0] == after[0] and torch.equal(before[2], after[2])
    assert all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    sys.modules.pop(f"{tmp_path}/mine.py")
    score(write_reward(tmp_path, "return 0.0", "import random, torch\nrandom.seed(3)\ntorch.manual_seed(3)\n" + HEAD))
    assert before[0] == random.getstate() and torch.equal(before[2], torch.get_rng_state())


def test_an_import_changes_no_directory_but_what_it_sets_for_libraries_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_A_LIBRARY", "0")
    monkeypatch.chdir(tmp_path)
    head = "import os, torch\nos.chdir('/')\nos.environ['OF_A_LIBRARY'] = '1'\nprint('loaded')\n"
    head += "import signal\ntorch.set_default_device('meta:0')\nsignal.signal(signal.SIGUSR1, print)\n" + HEAD
    assert score(write_reward(tmp_path, "return float(os.environ['OF_A_LIBRARY'])", head)) == [1.0]
    assert os.getcwd() == str(tmp_path) and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert torch.zeros(1).device.type == torch.get_default_device().type == "cpu"


# --------------------------------------------------------------------------------------------------
# What it prints


def test_what_a_reward_prints_is_marked_and_ends_its_line(tmp_path, capsys):
    body = (
        "print('one\\ntwo')\nprint('three', end='')\nsys.stderr.write('10%\\r20%')\n"
        "sys.stdout.buffer.write(sys.stdout.encoding.encode() * 0 + b' four')\n"
        "sys.stdout = sys.stderr = None\nreturn 1.0"
    )
    name = write_reward(tmp_path, body, "print('as it loads', end='')\n" + HEAD)
    streams = sys.stdin, sys.stdout, sys.stderr
    assert score(name, n=2) == [1.0, 1.0] and (sys.stdin, sys.stdout, sys.stderr) == streams
    out, err = capsys.readouterr()
    mark = "[mine.py:reward] "
    assert out == f"{mark}as it loads\n" + f"{mark}one\n{mark}two\n{mark}three four\n" * 2
    assert err == f"{mark}10%\n{mark}20%\n" * 2


def test_what_cannot_be_encoded_goes_out_as_an_escape_and_streams_are_as_python_has_them(tmp_path):
    body = (
        "sys.stdout.reconfigure(encoding='utf-8', line_buffering=True)\nprint('caf\\u00e9 \\ud800')\n"
        "for i in range(20000): print('.', end='')\nprint('\\ud800', end='')\nreturn 1.0"
    )
    name = write_reward(tmp_path, body)

    def run():
        sys.stdout.reconfigure(encoding="ascii")
        score(name, timeout=5)

    said = f"[mine.py:reward] caf\\xe9 \\ud800\n[mine.py:reward] {'.' * 20000}\\ud800\n"
    assert Child(tmp_path / "output", run).wait(20) == (0, said)


def test_what_is_meant_for_the_run_is_not_read_by_a_reward_or_its_children(tmp_path):
    body = (
        "assert subprocess.run(['cat'], capture_output=True).stdout == b''\n"
        "assert subprocess.run(['cat'], stdin=sys.stdin, capture_output=True).stdout == b''\n"
        "assert sys.stdin.buffer.read() == b'' and sys.stdin.read() == ''\nreturn 1.0"
    )
    name = write_reward(tmp_path, body)
    (tmp_path / "input").write_text("for the run")

    def run():
        os.dup2(os.open(tmp_path / "input", os.O_RDONLY), 0)
        score(name, n=2)
        print(os.read(0, 99))

    assert Child(tmp_path / "output", run).wait(20) == (0, "b'for the run'\n")


def test_descriptors_that_a_reward_closes_or_leads_elsewhere_are_as_before(tmp_path):
    for i, body in enumerate(
        ("os.close(0)", "os.close(1)\nos.close(2)", "os.dup2(os.open(os.devnull, 1), 1)", "sys.stdout.close()")
    ):
        sys.modules.pop(f"{tmp_path}/mine.py", None)
        name = write_reward(tmp_path, f"{body}\nreturn 1.0")
        assert Child(tmp_path / f"{i}", lambda name=name: print(score(name, n=2))).wait(8) == (0, "[1.0, 1.0]\n")


def test_the_streams_that_python_began_with_are_the_runs_own(tmp_path):
    body = "print('seen', file=sys.__stdout__)\n[s.close() for s in (sys.__stdin__, sys.__stdout__, sys.__stderr__)]"
    name = write_reward(tmp_path, f"{body}\nreturn 1.0 + (sys.stdout is sys.__stdout__)")

    def run():
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams = sys.stdin, sys.stdout, sys.stderr
        assert score(name, n=2) == [2.0, 2.0]
        assert (sys.__stdin__, sys.__stdout__, sys.__stderr__) == streams == (sys.stdin, sys.stdout, sys.stderr)
        print("said"), print(" on", file=sys.__stderr__)

    assert Child(tmp_path / "output", run).wait(8) == (0, "[mine.py:reward] seen\n" * 2 + "said\n on\n")


def test_what_cannot_be_undone_names_the_reward(tmp_path):
    """In a child, whose files, directory and limits these are."""

    def run(name, error):
        os.chdir(tmp_path / "here")
        with pytest.raises(UserError, match=f"^--reward={name}: {error}.*for the completion 'A'"):
            score(name)

    lost = "os.rmdir(os.getcwd())\nos.chdir('/')"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\nos.geteuid() or os.setuid(65534)"
    for body, said in (
        ("os.closerange(3, 256)", "it closed files of the run"),
        (lost, r"it changed something of this process that cannot be set back \(working directory: .*No such file"),
        (limit, r"it changed something of this process that cannot be set back \("),
    ):
        (tmp_path / "here").mkdir(exist_ok=True)
        name = write_reward(tmp_path, f"{body}\nreturn 1.0")
        status, output = Child(tmp_path / "output", lambda name=name, said=said: run(name, said)).wait(20)
        assert status == 0, output


# --------------------------------------------------------------------------------------------------
# What it returns


@pytest.mark.parametrize(
    "value, number",
    [
        (True, 1.0),
        (3, 3.0),
        (np.bool_(False), 0.0),
        (np.float32(0.5), 0.5),
        (np.array([2]), 2.0),
        (torch.tensor(0.25, dtype=torch.bfloat16, requires_grad=True), 0.25),
        (torch.tensor([True]), 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 4), 0.25),
        (-1e15, -1e15),
    ],
)
def test_numbers_of_every_library_are_rewards(value, number):
    found = read_value(value)
    assert found == number and type(found) is float


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "returned None of the type NoneType; a number was expected"),
        ("1.0", "returned '1.0' of the type str"),
        (np.str_("1"), "of the type str_"),
        (np.array("1"), "of the type ndarray"),
        (b"1", "of the type bytes"),
        ([1.0], "of the type list"),
        (np.ma.masked, "returned masked of the type MaskedConstant"),
        (1j, "of the type complex"),
        (torch.tensor(1j), "of the type Tensor"),
        (float("nan"), "returned nan; a finite number was expected"),
        (float("-inf"), "returned -inf"),
        (torch.tensor(float("inf")), "returned inf"),
        (-1.1e15, r"returned -1.1e\+15"),
        (1e39, r"returned 1e\+39; .*at most 1e\+15"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(value, said):
    with pytest.raises(UserError, match=said):
        read_value(value)


def test_a_coroutine_is_refused_in_one_line(tmp_path):
    name = write_reward(tmp_path, "return 1.0", HEAD.replace("def", "async def"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="reward: is an `async def`; make it a `def` that returns a number"):
            score(name)
        gc.collect()
    assert caught == []


@pytest.mark.parametrize("value", ["torch.zeros(2)", "np.zeros(2)", "10**400"])
def test_what_cannot_become_a_number_names_the_reward(tmp_path, value):
    with pytest.raises(UserError, match=r"mine.py:reward: (RuntimeError|ValueError|OverflowError): .*'A'"):
        score(write_reward(tmp_path, f"return {value}"))


def test_a_guard_costs_little(tmp_path):
    name = write_reward(tmp_path, "return 1.0")
    score(name)
    began = time.process_time()
    score(name, n=500)
    assert (time.process_time() - began) / 500 < 1e-3  # 1e-4 on an idle core
