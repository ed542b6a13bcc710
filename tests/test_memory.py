"""The memory plan: what it counts on tensors without memory is what real passes keep and real runs
hold; and if a run does not fit, the flags it proposes make it fit."""

import dataclasses
import random
import re
import resource
from types import SimpleNamespace

import pytest
import torch
from runs import refused, succeeds

import pretrain
from bench.child import run_script
from data.pack import make_completion, pack
from model import completion_logprobs, logprobs
from optim import Optimizer
from runtime import memory
from runtime.errors import UserError

CPU = torch.device("cpu")
DENSE, RAGGED = [32] * 64, [5, 1, 17, 2, 30, 64, 9] * 16


@dataclasses.dataclass
class Config:
    """The flags that a plan reads."""

    micro_batch_tokens: int = 512
    checkpoint_activations: bool = False
    max_new_tokens: int = 48
    batch_size: int = 64
    compile: bool = False
    shard: str = ""


def loss(model, items):
    return completion_logprobs(model, items).sum()


def make_items(lengths):
    return [make_completion([1], [2] * (n - 1)) for n in lengths]


def make_plan(model, lengths, step_tokens, config=None, matrix_lr=0.0, **options):
    """memory.plan of one model that is trained on items of these lengths."""
    config = config or Config()
    return memory.plan(
        SimpleNamespace(device=CPU, config=config),
        [(model, Optimizer(model, 0.1, matrix_lr=matrix_lr), loss)],
        make_items(lengths),
        lengths,
        step_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        checkpoint_activations=config.checkpoint_activations,
        **options,
    )


def need(phases):
    return max(map(memory.total, phases.values()))


def stored_bytes(model):
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


# --------------------------------------------------------------------------------------------------
# What is counted


def check_activations(model, lengths, checkpointed, loss_of_pack):
    """The planned activations are the bytes that autograd keeps."""
    p, kept = pack([[1] * n for n in lengths]), {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.checkpoint_activations = checkpointed
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = loss_of_pack(model, p)
    known = [*model.parameters(), *model.buffers(), p.tokens, p.positions, p.cu_seqlens]
    known = {x.untyped_storage().data_ptr() for x in known}
    expected = sum(size for pointer, size in kept.items() if pointer not in known)
    if checkpointed:  # cosines and sines, which are kept for the blocks that are computed again
        expected += 4 * len(p.tokens) * model.config.head_dim
    trained = [(model, Optimizer(model, 0.1), lambda model, items: loss_of_pack(model, p))]
    passes = memory.training(CPU, trained, [], False, checkpointed, False)["training"]
    assert value.isfinite() and abs(passes["activations"] - expected) < 0.02 * expected, (passes, expected)
    assert passes["backward"] >= 4 * len(p.tokens) * model.config.width  # at least the gradient of the hidden states
    return passes["activations"]


def logprob_loss(model, p):
    return logprobs(model, p).sum()


@pytest.mark.parametrize("shape", [{}, {"layers": 3, "window": 8, "window_every": 2}], ids=["plain", "windows"])
@pytest.mark.parametrize("lengths", [DENSE, RAGGED], ids=["dense", "ragged"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_planned_activations_are_the_bytes_that_autograd_keeps(make_model, shape, lengths, checkpointed):
    """Layers that differ are counted one by one."""
    check_activations(make_model(**shape), lengths, checkpointed, logprob_loss)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_kernels_are_planned_like_their_references(make_model, kernels_run, checkpointed):
    if kernels_run.type == "cuda":
        pytest.skip("tests/test_cuda.py measures the whole")
    check_activations(make_model(layers=1, head_dim=32), [5, 30], checkpointed, logprob_loss)


def test_a_loss_of_the_users_own_is_planned_as_what_it_keeps(make_model):
    """One that holds all logits, twice; by a list of known losses it was planned as the others."""

    def entropy_loss(model, p):
        logp = (model(p) @ model.head.T).log_softmax(-1)
        return (logp.exp() * logp).sum()

    model = make_model(vocab_size=2000)
    usual = check_activations(model, DENSE, False, logprob_loss)
    assert check_activations(model, DENSE, False, entropy_loss) > 4 * usual


@pytest.mark.parametrize("muon", [False, True])
def test_what_stays_is_four_bytes_per_parameter_and_the_optimizers_state(make_model, muon):
    model = make_model()
    numel = sum(p.numel() for p in model.parameters())
    optimizer = Optimizer(model, 0.1, matrix_lr=0.1)
    matrices = sum(m.numel() for m in optimizer.momenta.values()) if muon else 0
    phases = make_plan(model, [20, 30], 4096, matrix_lr=0.1 * muon)
    counters = 4 * len(list(model.parameters()))  # AdamW's counts of steps
    for name, parts in phases.items():
        assert parts["parameters"] == stored_bytes(model)
        assert 0 <= parts["optimizer"] - (4 * matrices + 8 * (numel - matrices)) <= counters
        assert name == "reading" or parts["gradients"] == 4 * numel
    scratch = phases["the optimizer"]["the step"]
    assert scratch > 4 * matrices if muon else scratch == 0


def test_cache_reference_and_critic_are_counted_by_hand(make_model):
    model, critic = make_model(), make_model(scalar_head=True)
    c = model.config
    alone = make_plan(model, [20, 30], 256)
    trained = [(m, Optimizer(m, 0.1), function) for m, function in ((model, loss), (critic, value_loss))]
    run = SimpleNamespace(device=CPU, config=Config())
    items = make_items([20, 30])
    options = {"read_tokens": 2048, "frozen": {"reference": c}, "prompt_lengths": [2, 20], "completions": 7}
    run.config.max_new_tokens = 30
    phases = memory.plan(run, trained, items, [20, 30], 256, 512, False, **options)
    assert set(phases) == {"training", "the optimizer", "reading", "sampling"} == set(alone) | {"sampling"}
    # 7 slots of the longest prompt and 30 new tokens
    assert phases["sampling"]["KV cache"] == 2 * 4 * c.layers * 7 * (20 + 30) * c.kv_heads * c.head_dim
    for parts in phases.values():
        assert parts["reference's parameters"] == stored_bytes(model)
        assert parts["parameters"] == stored_bytes(model) + stored_bytes(critic)
    assert need(phases) > need(alone) + stored_bytes(model) + stored_bytes(critic)
    # sampling ends where the model's context does
    run.config.max_new_tokens = 2**63 - 1
    endless = memory.plan(run, trained, items, [20, 30], 256, 512, False, **options)
    assert endless["sampling"]["KV cache"] == 2 * 4 * c.layers * 7 * (c.context + 1) * c.kv_heads * c.head_dim


def value_loss(model, items):
    p = pack([item.ids for item in items])
    return (model(p) @ model.score[0]).square().sum()


def test_shards_divide_what_stays(make_model):
    model = make_model(layers=8)
    phases = make_plan(model, [20, 30], 4096)
    phases["sampling"] = {"parameters": 8, "KV cache": 100}
    sharded = memory.over_shards(phases, model, 4)
    for part in ("parameters", "optimizer", "gradients"):
        assert sharded["training"][part] == -(-phases["training"][part] // 4)
    assert sharded["training"]["activations"] == phases["training"]["activations"]
    assert 0 < sharded["training"]["gathered"] < 2 * phases["training"]["parameters"]
    assert sharded["sampling"]["KV cache"] == 100  # and a whole copy to sample from
    assert sharded["sampling"]["a whole copy"] == phases["training"]["parameters"]


def test_a_micro_batch_is_as_large_as_a_step_and_at_least_the_longest_item(make_model):
    model = make_model()

    def activations(micro_batch_tokens, step_tokens, lengths):
        return make_plan(model, lengths, step_tokens, Config(micro_batch_tokens))["training"]["activations"]

    assert activations(512, 128, [16] * 9) == activations(128, 128, [16] * 9) == activations(128, 4096, [16] * 9)
    assert activations(128, 4096, [16] * 9) < activations(160, 4096, [16] * 9)
    assert activations(1, 4096, [64, 8]) == activations(64, 4096, [64, 8])
    batch = memory.largest_micro_batch(["a", "b", "c"], [5, 9, 2], 40)  # the longest, then all in turn
    assert batch == ["b", "a", "b", "c", "a", "b"]


# --------------------------------------------------------------------------------------------------
# What does not fit


def check(model, config, available, monkeypatch, lengths=(64,) * 8, step_tokens=2048, function=loss, **options):
    """memory.check on a machine with so many bytes available."""
    monkeypatch.setattr(memory, "available_memory", lambda device, loaded: available)
    run, trained = SimpleNamespace(device=CPU, config=config), [(model, Optimizer(model, 0.1), function)]
    memory.check(run, trained, make_items(lengths), lengths, step_tokens, read_tokens=1, **options)


@pytest.mark.parametrize(
    "share, lengths, named",
    [
        (0.5, [16], ["micro_batch_tokens"]),  # so much of what it needs is there
        (0.8, [256], ["checkpoint_activations"]),
        (0.21, [64], ["checkpoint_activations", "micro_batch_tokens"]),
        (0.65, [64], ["batch_size"]),
    ],
)
def test_the_proposed_flags_make_it_fit(make_model, monkeypatch, share, lengths, named, capsys):
    model, config = make_model(context=256), Config()
    options = {"step_tokens": 256 if lengths == [256] else 2048}
    if named == ["batch_size"]:  # the cache of a rollout
        config.max_new_tokens = 254
        options |= {"prompt_lengths": [2], "completions": 64, "batch_flag": "batch_size"}
    plan_options = {key: value for key, value in options.items() if key != "batch_flag"}
    whole = need(make_plan(model, lengths, config=config, **plan_options))
    available = int(share * whole)
    with pytest.raises(UserError) as e:
        check(model, config, available, monkeypatch, lengths, **options)
    proposed = dict(re.findall(r"--(\w+)=(\w+)", str(e.value)))
    assert sorted(proposed) == named and "of memory" in str(e.value)
    assert ("with the same result" in str(e.value)) == ("batch_size" not in named)
    values = {name: True if value == "True" else int(value) for name, value in proposed.items()}
    better = dataclasses.replace(config, **values)
    if named == ["batch_size"]:
        options |= {"completions": better.batch_size, "step_tokens": 2048 * better.batch_size // 64}
    check(model, better, available, monkeypatch, lengths, **options)
    assert capsys.readouterr().out.count("memory: ") == 2
    if named == ["micro_batch_tokens"]:  # and it is no smaller than it must be
        more = Config(micro_batch_tokens=2 * better.micro_batch_tokens)
        assert need(make_plan(model, lengths, config=more, **plan_options)) > available


def test_what_the_plan_may_be_wrong_by_is_a_warning_and_so_is_more_if_compiled(make_model, monkeypatch, capsys):
    model, config = make_model(), Config(micro_batch_tokens=16)
    whole = need(make_plan(model, [16], 2048, config))
    check(model, config, whole / 1.1, monkeypatch, [16])
    check(model, Config(16, compile=True), whole / 2, monkeypatch, [16])
    assert capsys.readouterr().out.count("\nwarning: this run needs") == 2
    with pytest.raises(UserError, match="this run needs"):
        check(model, config, whole / 1.2, monkeypatch, [16])


def test_if_no_flag_helps_a_smaller_model_is_what_remains(make_model, monkeypatch):
    with pytest.raises(UserError, match="smaller model, or divide it over several devices with --shard=fsdp"):
        check(make_model(), Config(), 1000, monkeypatch)
    with pytest.raises(UserError, match="smaller model$"):
        check(make_model(), Config(shard="fsdp"), 1000, monkeypatch)


def masked_loss(model, items):
    hidden = model(pack([item.ids for item in items]))
    return hidden[hidden.sum(-1) > 0].sum()


def branching_loss(model, items):
    value = loss(model, items)
    return value if value.item() > 0 else -value


def numpy_loss(model, items):
    value = loss(model, items)
    return value * float(value.detach().numpy().mean())


@pytest.mark.parametrize("function", [masked_loss, branching_loss, numpy_loss])
def test_a_loss_whose_shapes_depend_on_its_data_is_not_planned_and_the_run_continues(
    make_model, monkeypatch, capsys, function
):
    """It ended the run before the first step, and no flag turned the plan off."""
    model = make_model()
    assert function(model, make_items([64])).isfinite()
    check(model, Config(), 10**12, monkeypatch, function=function)
    output = capsys.readouterr().out
    assert output.startswith("memory: not planned, because this model or loss reads its own values (")
    assert output.count("\n") == 1


def test_what_a_container_leaves(tmp_path):
    """Its limit, less what is used, and files that were only cached make way."""
    names = tmp_path, "memory.max", "memory.current", "inactive_file"
    assert memory.cgroup_free(*names) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 100\ntotal_inactive_file 7\ninactive_file 300\n")
    assert memory.cgroup_free(*names) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.cgroup_free(*names) == [600]


# --------------------------------------------------------------------------------------------------
# A real run


def status(name):
    """A line of /proc/self/status, in bytes."""
    return int(re.search(rf"{name}:\s*(\d+)", open("/proc/self/status").read())[1]) * 1024


def limited(script, argv, bytes_more):
    """Run a script with so many bytes more than this process has; then print by how much it
    grew."""
    before = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + bytes_more, resource.RLIM_INFINITY))
    run_script(script, argv)
    print("grew by", status("VmHWM") - before)


def test_a_run_that_does_not_fit_is_refused_and_with_the_flag_it_names_holds_what_it_said(fork, tmp_path):
    draw = random.Random(0)
    words = (draw.choice(["one", "two", "three", "four"]) for _ in range(20_000))
    (tmp_path / "text.txt").write_text(" ".join(words))
    flags = {"data": tmp_path / "text.txt", "out": tmp_path / "run", "depth": 4, "width": 128, "context": 128}
    flags |= {"batch_tokens": 28_000, "eval_tokens": 200, "steps": 1, "sample_every": 0, "device": "cpu"}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    line = refused(fork(limited, pretrain, [*argv, "--micro_batch_tokens=28000"], 900 << 20))
    assert "this run needs" in line and not (tmp_path / "run/log.jsonl").exists()
    flag = re.search(r"--micro_batch_tokens=\d+", line)[0]
    output = succeeds(fork(limited, pretrain, [*argv, flag], 900 << 20))
    planned = float(re.search(r"memory: ([\d,]+) MB of", output)[1].replace(",", "")) * 1e6
    grown = int(re.search(r"grew by (\d+)", output)[1])
    assert grown > 500e6 and 0.85 < planned / grown < 1.15, (planned, grown)


# --------------------------------------------------------------------------------------------------
# --micro_batch_tokens=0


def test_the_micro_batch_is_what_fits_into_a_gpu(monkeypatch):
    def plan_of(tokens, checkpoint_activations):
        return {"training": {"parameters": 100, "activations": tokens}, "reading": {"parameters": 100}}

    monkeypatch.setattr(memory, "available_memory", lambda device, loaded: 40_000)
    proposed = [
        memory.proposed_micro_batch(torch.device(device), plan_of, Config(), step_tokens)
        for device, step_tokens in [("cuda", 131_072), ("cuda", 9_001), ("cuda", 10**9), ("cpu", 131_072), ("cpu", 700)]
    ]
    assert proposed == [32_768, 9_001, 30_518, 16_384, 700]


def test_a_run_trains_with_the_proposed_micro_batch(make_model, capsys):
    model, config = make_model(), Config(micro_batch_tokens=0)
    run = SimpleNamespace(device=CPU, config=config)
    trained = [(model, Optimizer(model, 0.1), loss)]
    memory.check(run, trained, make_items(DENSE), DENSE, 512)
    assert config.micro_batch_tokens == 512
    assert "memory: --micro_batch_tokens=512 is what fits" in capsys.readouterr().out
