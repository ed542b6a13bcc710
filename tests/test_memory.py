"""The memory plan: what is walked without memory is what real passes keep and real runs hold; and where it does not fit, the flag that is proposed does make it fit."""
import dataclasses
import random
import re
import resource
from types import SimpleNamespace

import pytest
import torch
from runs import refused
from test_pretrain import run_script, succeeds

import memory
import pretrain
from common import UserError
from data.pack import pack
from model import GPT, logprobs

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(micro_tokens=512, checkpoint_activations=False)


def total(phases):
    return memory.largest(phases)[2]


@pytest.mark.parametrize("lengths", [[32] * 64, [5, 1, 17, 2, 30, 64, 9] * 16], ids=["dense", "ragged"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_walked_activations_are_the_bytes_that_autograd_really_keeps(make_model, lengths, checkpointed):
    check_walked(make_model(), lengths, checkpointed)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_kernels_are_walked_like_their_references(make_model, kernels_run, checkpointed):
    if kernels_run.type == "cuda":
        pytest.skip("tests/test_cuda.py measures the whole")
    check_walked(make_model(layers=1, head_dim=32), [5, 30], checkpointed)


def check_walked(model, lengths, checkpointed):
    p, kept = pack([[1] * n for n in lengths]), {}
    model.checkpoint_activations = checkpointed

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = logprobs(model, p).sum()
    known = [*model.parameters(), *model.buffers(), p.tokens, p.positions, p.cu]
    found = sum(size for at, size in kept.items() if at not in {x.untyped_storage().data_ptr() for x in known})
    found += checkpointed * 4 * len(p.tokens) * model.config.head_dim  # cosines and sines, which a block that is computed again is given anew
    walked = memory.some_pack(lengths, sum(lengths), CPU)
    parts, _ = memory.training([model.config], CPU, walked, "logprob", 1.0, False, 0.0, checkpointed, None, False)
    assert loss.isfinite() and abs(parts["activations"] - found) < 0.02 * found, (parts, found)


@pytest.mark.parametrize("muon", [None, torch.float32])
def test_what_stays_is_four_bytes_a_parameter_and_the_optimizers_state(make_model, muon):
    model = make_model()
    numel, matrices = sum(p.numel() for p in model.parameters()), sum(dict(model.named_parameters())[name].numel() for name in model.matrices())
    phases = memory.plan(CONFIG, CPU, [model.config], [20, 30], 4096, muon=muon)
    tables = sum(b.nbytes for b in model.buffers())
    for parts in phases.values():
        assert parts["parameters"] == 4 * numel + tables
        few = 4 * len(list(model.parameters()))  # AdamW's counts of steps
        assert 0 <= parts["optimizer"] - (4 * matrices + 8 * (numel - matrices) if muon else 8 * numel) <= few
        assert parts["gradients"] == 4 * numel
    assert phases["the optimizer"]["the step"] > 4 * matrices if muon else phases["the optimizer"]["the step"] == 0


def test_the_cache_companions_and_a_critic_are_counted_by_hand(make_model):
    c = make_model().config
    critic = dataclasses.replace(c, scalar_head=True)
    phases = memory.plan(CONFIG, CPU, [c, critic], [20, 30], 256, held={"reference": c}, read_tokens=2048, samples=(7, 50, 20))
    alone = memory.plan(CONFIG, CPU, [c], [20, 30], 256)
    bytes_of = lambda config: sum(x.nbytes for x in [*GPT(config).parameters(), *GPT(config).buffers()])  # noqa: E731
    assert phases["sampling"]["KV cache"] == 2 * 4 * c.layers * 7 * 50 * c.kv_heads * c.head_dim
    assert all(parts["reference's parameters"] == bytes_of(c) and parts["parameters"] == bytes_of(c) + bytes_of(critic) for parts in phases.values())
    assert total(phases) > total(alone) + bytes_of(c) + bytes_of(critic)
    assert set(phases) == {"training", "the optimizer", "reading", "sampling"} and set(alone) == {"training", "the optimizer"}


def test_shards_divide_what_stays(make_model):
    c = make_model(layers=8).config
    whole, parts = (memory.plan(CONFIG, CPU, [c], [20, 30], 4096, shards=n)["the optimizer"] for n in (1, 4))
    for part in ("parameters", "optimizer", "gradients"):
        assert parts[part] == -(-whole[part] // 4)
    assert 0 < parts["gathered"] < 2 * whole["parameters"]


def test_a_pack_is_as_large_as_a_batch_and_at_least_the_longest_document(make_model):
    c = make_model().config
    kept = lambda micro, batch, lengths: memory.plan(SimpleNamespace(micro_tokens=micro, checkpoint_activations=False), CPU, [c], lengths, batch)["training"]["activations"]  # noqa: E731
    assert kept(512, 128, [16]) == kept(128, 128, [16]) == kept(128, 4096, [16]) < kept(129, 4096, [16])
    assert kept(1, 4096, [64, 8]) == kept(64, 4096, [64, 8])


# ---------------------------------------------------------------------------------------------------------------------------------
# What does not fit


@dataclasses.dataclass
class Flags:
    micro_tokens: int = 512
    checkpoint_activations: bool = False
    batch: int = 64


@pytest.mark.parametrize("share, lengths, named", [
    (0.5, [16], ["micro_tokens"]),  # of what it needs so much is there
    (0.5, [256], ["checkpoint_activations"]),
    (0.2, [64], ["checkpoint_activations", "micro_tokens"]),
    (0.6, [64], ["batch"]),
])  # fmt: skip
def test_the_proposed_flags_make_it_fit(make_model, share, lengths, named, capsys):
    c = make_model(context=256, layers=8).config
    held = (64, 256, 2) if "batch" in named else (0, 0, 0)
    make = lambda f: memory.plan(f, CPU, [c], lengths, 256 if lengths == [256] else 2048, samples=(held[0] and f.batch, held[1], held[2]))  # noqa: E731
    limit = int(share * total(make(Flags())))
    with pytest.raises(UserError) as e:
        memory.check(Flags(), CPU, make, smaller="batch", limit=limit)
    proposed = dict(re.findall(r"--(\w+)=(\w+)", str(e.value)))
    assert sorted(proposed) == named and "of memory" in str(e.value) and ("the same result" in str(e.value)) == ("batch" not in named)
    better = dataclasses.replace(Flags(), **{name: value == "True" if value == "True" else int(value) for name, value in proposed.items()})
    memory.check(better, CPU, make, limit=limit)
    assert capsys.readouterr().out.count("memory: ") == 2
    if named == ["micro_tokens"]:  # not smaller than it must be
        assert total(make(dataclasses.replace(better, micro_tokens=2 * better.micro_tokens))) > limit


def test_what_the_plan_may_be_wrong_by_is_a_warning_and_so_is_more_where_it_is_compiled(make_model, capsys):
    make = lambda f: memory.plan(f, CPU, [make_model().config], [64], 2048)  # noqa: E731
    need, compiled = total(make(Flags())), dataclasses.make_dataclass("Compiled", [("compile", bool, True)], bases=(Flags,))()
    memory.check(Flags(), CPU, make, limit=need / 1.1)
    memory.check(compiled, CPU, make, limit=need / 2)
    assert capsys.readouterr().out.count("\nwarning: this run needs") == 2
    with pytest.raises(UserError):
        memory.check(Flags(), CPU, make, limit=need / 1.2)


def test_where_no_flag_helps_a_smaller_model_is_what_remains(make_model):
    c = make_model().config
    with pytest.raises(UserError, match="smaller model, or divide it over several devices by --shard=fsdp"):
        memory.check(Flags(), CPU, lambda f: memory.plan(f, CPU, [c], [16], 4096), or_else=memory.SHARD, limit=1000)


# ---------------------------------------------------------------------------------------------------------------------------------
# A real run


def limited(script, argv, room):
    """Run a script with `room` bytes more than this process has; then print by how much it grew."""
    status = lambda name: int(re.search(rf"{name}:\s*(\d+)", open("/proc/self/status").read())[1]) * 1024  # noqa: E731
    before = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room, resource.RLIM_INFINITY))
    run_script(script, argv)
    print("grew by", status("VmHWM") - before)


def test_a_run_that_does_not_fit_is_refused_and_with_the_flag_it_names_holds_what_it_said(fork, tmp_path):
    draw = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(draw.choice(["one", "two", "three", "four"]) for _ in range(20_000)))
    how = dict(data=tmp_path / "text.txt", out=tmp_path / "run", depth=4, width=128, context=128, batch_tokens=40_000, eval_tokens=200, steps=1, sample_every=0, device="cpu")
    argv = [f"--{name}={value}" for name, value in how.items()]
    line = refused(fork(limited, pretrain, [*argv, "--micro_tokens=40000"], 900 << 20))
    assert "this run needs" in line and not (tmp_path / "run/log.jsonl").exists()
    flag = re.search(r"--micro_tokens=\d+", line)[0]
    output = succeeds(fork(limited, pretrain, [*argv, flag], 900 << 20))
    planned, grown = float(re.search(r"memory: ([\d,]+) MB of", output)[1].replace(",", "")) * 1e6, int(re.search(r"grew by (\d+)", output)[1])
    assert grown > 500e6 and 0.85 < planned / grown < 1.15, (planned, grown)
