"""One process of a run: its device, its generators, its end, and what the hardware can do."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from runs import free_port, succeeds

from runtime import process
from runtime.errors import UserError
from runtime.process import Stop, end_in_time, launch, peak_flops, random_state, reduce_sum, set_random_state, setup


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "abacus:1", "mps"])
def test_devices_that_are_not_there_are_named(device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=f"--device={device}"):
        setup(device, 0)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_single_gpu_is_named_by_its_index(name, monkeypatch):
    """torch.cuda.set_device refuses a device without an index, on a CPU build as on a GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(process, "prove", lambda device: {})
    assert setup(name, 0) == torch.device("cuda", 0)
    assert chosen == [0]


def test_apples_gpus_are_used_by_name_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert process.choose_device("auto") == torch.device("cpu")
    assert process.choose_device("mps") == torch.device("mps")


def test_each_rank_has_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process.choose_device("auto") == process.choose_device("cuda") == torch.device("cuda", 3)
    assert process.choose_device("cuda:1") == torch.device("cuda", 1)
    assert process.choose_device("cpu") == torch.device("cpu")
    for name, why in [("cuda:4", "4 GPUs are visible here"), ("meta", "not tried here"), ("xpu", "not tried here")]:
        with pytest.raises(UserError, match=f"--device={name}: {why}"):
            process.choose_device(name)
    monkeypatch.setenv("LOCAL_RANK", "4")  # more ranks than GPUs
    with pytest.raises(UserError, match="--device=cuda:4: 4 GPUs"):
        process.choose_device("cuda")


def test_a_script_starts_without_the_compiler():
    code = "import sys, evaluate, runtime.process as p; p.setup('cpu', 0); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_random_state_comes_back():
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    state = random_state(cpu)
    first = torch.rand(5)
    set_random_state(state, cpu)
    assert torch.equal(first, torch.rand(5))


def two_ranks(rank, port):
    cpu = torch.device("cpu")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assert setup("cpu", 5) == cpu
    assert reduce_sum(rank, 2.5, True) == [1.0, 5.0, 2.0]
    state = random_state(cpu)
    assert len(state["random/cpu"]) == 2 and not torch.equal(*state["random/cpu"])  # each rank has its own
    first = torch.rand(5)
    set_random_state(state, cpu)
    assert torch.equal(first, torch.rand(5))
    before = torch.get_rng_state()
    set_random_state({"random/cpu": state["random/cpu"][:1]}, cpu)  # of a run on one rank: left alone
    assert torch.equal(before, torch.get_rng_state())
    print("agreed")


def test_ranks_draw_differently_and_get_their_own_state_back(fork):
    port = free_port()
    assert all("agreed" in succeeds(child) for child in [fork(two_ranks, rank, port) for rank in range(2)])


# --------------------------------------------------------------------------------------------------
# How a process ends


def end_with(error):
    """A process whose script raises `error`."""

    def main(config):
        raise error

    sys.argv = ["script.py"]
    launch(main, type("Config", (), {"__dataclass_fields__": {}}))


@pytest.mark.parametrize(
    "error, line",
    [
        (
            torch.OutOfMemoryError("Tried to allocate 2 GiB.\nDetails"),
            "error: out of memory: Tried to allocate 2 GiB. ",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "error: out of memory: [enforce"),
        (
            RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/pair.cc:5] Connection closed"),
            "error: another process",
        ),
        (dist.DistBackendError("NCCL error"), "error: another process of this run has ended"),
        (UserError("book.txt: missing"), "error: book.txt: missing"),
    ],
)
def test_what_a_user_cannot_help_is_one_line_too(fork, error, line):
    status, output = fork(end_with, error).wait()
    assert status == 1 and output.startswith(line) and output.count("\n") == 1


def test_a_mistake_in_the_code_keeps_its_traceback(fork):
    status, output = fork(end_with, RuntimeError("shapes cannot be multiplied")).wait()
    assert status == 1 and "Traceback" in output and "shapes cannot be multiplied" in output


@pytest.mark.parametrize("make", [threading.Thread, get_context("fork").Process])
@pytest.mark.parametrize("status", [0, 3, "error: a line"])
def test_what_a_reward_has_left_does_not_hold_the_process(fork, make, status):
    def end():
        left = make(target=time.sleep, args=(4,), name="sandbox")
        left.start()
        print("figures", end="")
        end_in_time(status, seconds=0.1)
        left.join()  # as Python does at its end

    said = "figureswarning: ended without waiting any longer for sandbox\n"
    assert fork(end).wait(20) == (1 if status == "error: a line" else status, said)


def fill(number):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def leave_without_a_reader(number):
    reader, writer = os.pipe()
    os.dup2(writer, number)
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("spoil", [fill, leave_without_a_reader, os.close])
def test_a_signal_stops_a_run_whose_stderr_takes_nothing(fork, spoil):
    def run():
        stop = Stop()
        spoil(2)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            print(stop.signal, flush=True)
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(9)

    assert fork(run).wait(20) == (128 + signal.SIGINT, f"{signal.SIGTERM:d}\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_reward_has_left_does_not_hold_a_process_that_cannot_say_so(fork, number):
    def end():
        left = threading.Thread(target=time.sleep, args=(2,), name="sandbox")
        left.start()
        print("figures", end="")
        fill(number)
        end_in_time(3, seconds=0.1)
        left.join()
        os._exit(9)

    said = "warning: ended without waiting any longer for sandbox\n" if number == 1 else "figures"
    assert fork(end).wait(20) == (3, said)


# --------------------------------------------------------------------------------------------------
# The hardware

# Dense bf16 TFLOP/s from the makers' data sheets, for names as drivers report them
DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA H20": 148,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA A30": 165,
    "NVIDIA A40": 150,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA RTX A6000": 155,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA RTX A4000": 77,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 3090 Ti": 71,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla T4": 65,
    "AMD Instinct MI300X": 1307,
    "NVIDIA RTX A3000 Laptop GPU": 0,
    "NVIDIA RTX A1000": 0,
    "NVIDIA T400 4GB": 0,
    "NVIDIA GeForce GTX 1080": 0,
}


def test_every_gpus_peak(monkeypatch):
    for name, tflops in DATA_SHEETS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == tflops * 1e12, name
    assert peak_flops(torch.device("cpu")) == 0
