"""bench/predict.py: what it records is what the code launches. bench/gpu.py runs at toy sizes, and
a row that fails ends nothing."""

import pytest
import torch

from bench import gpu, predict
from bench.predict import GPUS, Config, decode_row, record_training, training_row

H100 = GPUS["H100"]
SMALL = Config(depth=2, vocab=512, context=64, batch_tokens=1024)


def test_a_decode_step_launches_nine_kernels_a_layer_and_twelve(monkeypatch):
    monkeypatch.setitem(predict.SHAPES, "small", (3, 64, 4, 2, 64, 128, 997))
    row = decode_row("small", H100, slots=128, held=100)
    assert (row["launches"], row["per_layer"], row["others"]) == (3 * 9 + 12, 9, 12)
    assert 0 < row["of_floor"] < 1


def test_a_micro_batch_waits_for_nothing_and_every_product_is_counted():
    micro, update, groups, peak, model = record_training(SMALL, 256)
    assert not any(op.wait for op in micro) and sum(op.wait for op in update) == 1  # whether the norm is finite
    trunk = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert sum(op.flops for op in micro if op.part == "products") == 6 * trunk * 256
    kernels = [op.name for op in micro if op.part != "small ops"]
    assert kernels.count("attention") == kernels.count("attention_backward") == kernels.count("rotate_back") == 2
    assert "cat" not in kernels and groups == 3
    stored = sum(p.nbytes for p in model.parameters())
    assert peak > 4 * stored  # weights, gradients, the optimizer's moments, activations


def test_twice_the_tokens_take_nearly_twice_the_time():
    config = Config(depth=4, batch_tokens=32768)
    small, large = (training_row(config, H100, tokens) for tokens in (16384, 32768))
    assert 1.8 < large["micro_ms"] / small["micro_ms"] < 2
    assert large["mfu"] > small["mfu"] > 0.2 and large["gib"] > small["gib"]
    assert large["launches"] == small["launches"]


@pytest.mark.parametrize("part", ["smoke", "floors", "micro", "decode"])
def test_the_first_measurements_run_at_toy_sizes(part, capsys):
    try:
        gpu.PARTS[part](torch.device("cpu"), True)
    finally:
        torch.use_deterministic_algorithms(False)
    out = capsys.readouterr().out
    assert out and "FAILED" not in out


def test_a_row_that_fails_says_why(capsys):
    gpu.row("a product", lambda: torch.ones(2) @ torch.ones(3))
    gpu.row("the next", lambda: "7 ms")
    first, second = capsys.readouterr().out.splitlines()
    assert "FAILED RuntimeError" in first and "7 ms" in second
