"""Every stage as a user types it, with --device=cuda, on an emulated GPU (emulated_cuda.py); and
the rules of that GPU themselves."""

import functools
import importlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import CudaTensor, emulate
from runs import completions_of, here, losses, records, train_steps, write_rows
from safetensors.torch import load_file

import bench.kernels as bench_kernels
import bench.train as bench_train
import distill
import dpo
import pretrain
import reward
import rollout as rollout_module
import sft
from data import corpus, tokenizer
from data.pack import make_completion, pack
from kernels import _lib, head, proof
from kernels.act import swiglu
from kernels.attention import layout, rope_attention
from kernels.decode import append_rope, decode_attention
from kernels.kl import linear_kl
from kernels.norm import add_rms_norm
from model import logprobs, logprobs_no_grad
from rollout import GRAPH_STEPS, Sampler, affordable_slots, rollout
from runtime import memory
from runtime.batches import text_order
from runtime.errors import UserError
from runtime.process import setup

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here: tests/test_cuda.py")

SHAPE = {"width": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 64, "context": 128, "noise": 0.05}
SENTENCE = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(autouse=True)
def as_before():
    """What a script sets up for its whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu():
    with emulate() as device:
        yield device


# --------------------------------------------------------------------------------------------------
# The rules


def test_tensors_compute_on_the_device_and_come_back(gpu):
    x = torch.arange(6.0).view(2, 3).to("cuda")
    assert x.is_cuda and x.device == torch.device("cuda", 0) and isinstance(x * 2, CudaTensor)
    y = (x @ x.T).cpu()
    assert not y.is_cuda and torch.equal(y, torch.tensor([[5.0, 14.0], [14.0, 50.0]]))
    layer = torch.nn.Linear(3, 1).to("cuda")
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad.cpu(), x.cpu().sum(0, keepdim=True))


@pytest.mark.parametrize("wrong", ["add", "index", "kernel"])
def test_two_devices_in_one_op_are_an_error(gpu, wrong):
    x = torch.randn(4, 32, device="cuda")
    with pytest.raises((RuntimeError, ValueError), match="CPU|same device"):
        if wrong == "add":
            x + torch.randn(4, 32)
        elif wrong == "index":
            x.index_select(0, torch.tensor([1]))
        else:
            add_rms_norm(x, torch.randn(4, 32), torch.ones(32, device="cuda"), 1e-6)
    assert isinstance(swiglu(x), CudaTensor)


def test_waits_are_counted_and_forbidden_in_a_capture(gpu):
    x = torch.zeros(3, device="cuda")
    x.sum().item()
    x[x > 0]
    x + 1
    assert sum(gpu.waits.values()) == 2
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
        x.sum().item()


def test_a_graph_replays_on_its_own_memory_and_knows_other_memory_by_address_only(gpu):
    x, y = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += y
        out = x * 2
    assert x.tolist() == [0, 0, 0], "a capture computes nothing"
    graph.replay()
    graph.replay()
    assert x.tolist() == [2, 2, 2] and out.tolist() == [4, 4, 4]
    del y
    with pytest.raises(RuntimeError, match="has been freed"):
        graph.replay()


def test_a_copy_that_does_not_wait_is_late(gpu):
    x = torch.ones(3, device="cuda")
    late = x.to("cpu", non_blocking=True)
    assert late.isnan().all() and not gpu.waits
    torch.cuda.synchronize()
    assert late.tolist() == [1, 1, 1]
    pinned = torch.ones(3).pin_memory()
    y = pinned.to("cuda", non_blocking=True)
    assert sum(gpu.waits.values()) == 1 and y.is_cuda
    pinned.zero_()
    with pytest.raises(AssertionError, match="pinned"):
        torch.cuda.synchronize()
    torch.ones(3).to("cuda", non_blocking=True)  # not pinned
    assert gpu.waits["host to device", "a test"] == 1


def test_memory_is_a_caching_allocators():
    with emulate(memory=8 << 20) as gpu:
        check_allocator(gpu)


def check_allocator(gpu):
    x = torch.zeros(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() == torch.cuda.memory_reserved() == 4 << 20
    del x
    assert torch.cuda.memory_allocated() == 0 and torch.cuda.mem_get_info()[0] == gpu.memory - (4 << 20)
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] == gpu.memory
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(3 << 20, device="cuda")


# --------------------------------------------------------------------------------------------------
# Every stage


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Inputs of the stages, and what the stages write."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "tok").mkdir()
    tokenizer.save(tokenizer.train(["Better: A Better: B " * 5], 267), folder / "tok")  # " A" and " B" are tokens
    (folder / "text.txt").write_text(SENTENCE * 60)
    numbers = range(12)
    write_rows(folder / "chat.jsonl", [{"prompt": f"{i}+1?", "completion": f"{i + 1}"} for i in numbers])
    pairs = [{"prompt": f"{i}+1?", "chosen": f"{i + 1}", "rejected": f"no {i}"} for i in numbers]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "problems.jsonl", [{"prompt": f"{i}+1?", "answer": f"{i + 1}"} for i in numbers])
    (folder / "reward.py").write_text("def score(prompt, completion, row):\n    return len(completion) % 3\n")
    (folder / "constitution.txt").write_text("Be long.\nBe kind.\n")
    return folder


RUN = {"steps": 2, "micro_batch_tokens": 96, "save_every": 0, "eval_every": 0, "val_fraction": 0.2}
ROLLOUT = RUN | {"max_new_tokens": 20, "eval_prompts": 2}
BASE = {"depth": 2, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 64, "context": 512, "batch_tokens": 256}
BASE |= {"dropout": 0.1, "checkpoint_activations": True, "eval_tokens": 64, "sample_every": 0, "max_new_tokens": 20}
# stage: its flags; @name is a file of `files`
STAGES = {
    "pretrain": RUN | BASE | {"data": "@text.txt", "out": "@base", "tokenizer": "@tok"},
    "sft": RUN | {"init": "@base", "data": "@chat.jsonl", "out": "@sft", "batch_tokens": 120, "max_new_tokens": 20},
    "reward": RUN | {"init": "@sft", "data": "@pairs.jsonl", "out": "@rm", "batch_size": 4, "center_samples": 2},
    "dpo": RUN | {"init": "@sft", "data": "@pairs.jsonl", "out": "@dpo", "batch_size": 4},
    "ppo": ROLLOUT | {"init": "@sft", "data": "@problems.jsonl", "reward": "@rm", "out": "@ppo"},
    "grpo": ROLLOUT | {"init": "@sft", "data": "@problems.jsonl", "reward": "@reward.py:score", "out": "@grpo"},
    "distill": ROLLOUT | {"init": "@sft", "teacher": "@dpo", "data": "@problems.jsonl", "out": "@distill"},
    "rlaif": {"policy": "@sft", "judge": "@sft", "data": "@problems.jsonl", "constitution": "@constitution.txt"},
    "evaluate": {"model": "@sft", "reference": "@base", "text": "@text.txt", "problems": "@problems.jsonl"},
    "sample": {"model": "@base", "prompt": "the", "max_new_tokens": 20, "top_k": 20, "top_p": 0.9},
}
STAGES["pretrain"] |= {"save_every": 1}
STAGES["grpo"] |= {"save_every": 1}
STAGES["sft"] |= {"problems": "@problems.jsonl", "replay": "@text.txt"}
STAGES["reward"] |= {"max_new_tokens": 4}
STAGES["ppo"] |= {"prompts_per_step": 4, "min_accuracy": 0.0, "max_new_tokens": 10}
STAGES["grpo"] |= {"prompts_per_step": 2, "group_size": 4}
STAGES["distill"] |= {"prompts_per_step": 4}
STAGES["rlaif"] |= {"out": "@rlaif.jsonl", "max_new_tokens": 8, "limit": 4}
STAGES["evaluate"] |= {"reward": "@rm", "data": "@problems.jsonl", "max_new_tokens": 8, "limit": 4}
FIRST = {"pretrain": [], "sft": ["pretrain"], "reward": ["sft"], "dpo": ["sft"], "ppo": ["sft", "reward"]}
FIRST |= {"grpo": ["sft"], "distill": ["sft", "dpo"], "rlaif": ["sft"], "evaluate": ["sft", "reward"]}
FIRST |= {"sample": ["pretrain"]}  # stage: those whose checkpoints it reads


def type_command(files, stage, **more):
    """Run a stage's main with its flags in this process -> the Device it ran on."""
    flags = STAGES[stage] | {"device": "cuda"} | more
    found = {}
    for name, value in flags.items():
        found[name] = f"{files}/{value[1:]}" if isinstance(value, str) and value.startswith("@") else value
    script = importlib.import_module(stage)
    with pytest.MonkeyPatch.context() as patch, emulate() as device:
        patch.setenv("XDG_CACHE_HOME", str(files / "cache"))  # where the kernels' proof is remembered
        here(script.main, script.Config(**found))
    return device


@pytest.fixture(scope="module")
def run_stage(files):
    """A function: stage -> the Device it ran on. Each runs once, after those it needs."""

    @functools.cache
    def run(stage):
        for first in FIRST[stage]:
            run(first)
        return type_command(files, stage)

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_on_cuda(run_stage, files, stage, capsys):
    device = run_stage(stage)
    assert device.launches["rms_norm_forward_kernel"] and device.launches["forward_kernel"]
    if stage != "pretrain":  # which comes first, and so compares kernels and references
        assert not {name for name in device.ops if "scaled_dot_product" in name}, "a reference ran"
    if stage in ("sft", "reward", "ppo", "grpo", "distill", "sample"):
        assert device.replays >= GRAPH_STEPS and device.launches["decode_kernel"]
    if "out" in STAGES[stage] and stage != "rlaif":
        run = files / STAGES[stage]["out"][1:]
        assert train_steps(run) == [1, 2] and records(run)[0]["hardware"].startswith("NVIDIA")
        assert device.launches["rms_norm_backward_kernel"]
        assert "not planned" not in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_a_resumed_run_is_the_same_on_cuda(run_stage, files, stage):
    """Dropout draws from the device's own generator, whose state a checkpoint must hold."""
    run_stage(stage)
    whole, cut = files / STAGES[stage]["out"][1:], files / f"{stage}_cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step_000002")
    type_command(files, stage, out=str(cut), resume=True)
    for name in ("model.safetensors", "train_state.safetensors"):
        first, second = (load_file(run / "step_000002" / name) for run in (whole, cut))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert losses(whole) == losses(cut)


def test_a_stage_starts_with_the_kernels_proof(run_stage, files):
    run_stage("pretrain")
    (verdicts,) = [json.loads(p.read_text()) for p in (files / "cache/feinschliff").iterdir()]
    assert verdicts and set(verdicts.values()) == {""}


def test_the_proof_runs_the_kernels_themselves(gpu):
    """By Triton's interpreter."""
    gpu.interpret = True
    for module in ("act", "norm"):
        importlib.import_module(f"kernels.{module}")
    assert proof.prove_op("swiglu", torch.device("cuda", 0)) == ""
    # Three widths, each run twice
    assert gpu.launches == {"swiglu_forward_kernel": 6, "swiglu_backward_kernel": 6}


# width, query heads, key heads, width of a head, ffn, vocabulary
MODELS = {
    "depth 4": (256, 4, 4, 64, 640, 50304),
    "depth 8": (512, 8, 8, 64, 1280, 50304),
    "depth 12": (768, 6, 6, 128, 2048, 50304),
    "SmolLM2-135M": (576, 9, 3, 64, 1536, 49152),
    "Qwen2.5-0.5B": (896, 14, 2, 64, 4864, 151936),
    "Qwen3-0.6B": (1024, 16, 8, 128, 3072, 151936),
}


def launch_a_step(model, N):
    """The kernels of a layer, forward and backward, on a pack of N tokens, of the head, and of
    drawing at 128 slots."""
    width, heads, kv_heads, dh, ffn, V = MODELS[model]

    def activation(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    def fp32(*shape):
        return torch.zeros(shape, device="cuda", requires_grad=True)

    def back(outs):
        torch.autograd.backward(outs, [torch.zeros_like(x) for x in outs])

    x, norm, qkv = activation(N, width), fp32(width), activation(N, heads + 2 * kv_heads, dh)
    back(add_rms_norm(x, x, norm, 1e-6))
    back([swiglu(activation(N, 2 * ffn))])
    table = layout(torch.tensor([0, N // 3, N], dtype=torch.int32, device="cuda"), qkv, dh)
    angles = [torch.zeros(N, dh // 2, device="cuda") for _ in range(2)]
    norms = (fp32(dh), fp32(dh)) if model.startswith(("depth", "Qwen3")) else (None, None)
    back([rope_attention(qkv, *norms, *angles, heads, 1e-6, table)])
    targets = torch.zeros(3, dtype=torch.int64, device="cuda")
    back([head.linear_cross_entropy(activation(3, 16), fp32(V, 16), targets)])
    back([head.linear_logprob(activation(3, 16), fp32(V, 16), targets)])
    back([linear_kl(activation(3, 16), fp32(V, 16), activation(3, 16), fp32(V, 16))])
    with torch.no_grad():
        cache = torch.zeros(2, 128, kv_heads, N, dh, dtype=torch.bfloat16, device="cuda").transpose(2, 3)
        lengths = torch.ones(128, dtype=torch.int64, device="cuda")
        step = activation(128, heads + 2 * kv_heads, dh), *norms, *[x.new_zeros(128, dh // 2) for x in angles]
        q = append_rope(*step, heads, 1e-6, *cache, lengths)
        decode_attention(q, *cache, lengths)


def test_the_proof_covers_what_training_launches(gpu):
    """Of every kernel the very machine code, as triton compiles it for other alignments and
    constants."""
    gpu.only_record = True
    for make in load_proofs().values():
        proof.with_gradients(*make(torch.device("cuda", 0)))
    proved = dict(gpu.variants)
    gpu.variants.clear()
    for model in MODELS:
        for N in (256, 255):
            launch_a_step(model, N)
    assert len(gpu.variants) > 10
    assert {kernel: found - proved[kernel] for kernel, found in gpu.variants.items() if found - proved[kernel]} == {}


def load_proofs():
    for module in ("act", "attention", "decode", "draw", "head", "kl", "norm", "rope"):
        importlib.import_module(f"kernels.{module}")
    return {op: make for op, make in proof.PROOFS.items() if op != "draw"}


# --------------------------------------------------------------------------------------------------
# Sampler and trainer


def first_step(make_model, gpu, **changed):
    """(model, completions, the trainer's log-probabilities, config) of a first step of RL."""
    model = make_model(**(SHAPE | changed)).to("cuda")
    prompts = [[1, 2, 3 + i] for i in range(8)]
    samples = rollout(model, prompts, max_new_tokens=30, seed=1)
    chats = [make_completion(prompts[s.prompt_index], s.tokens) for s in samples]
    config = SimpleNamespace(temperature=1.0, micro_batch_tokens=1000, max_new_tokens=30)
    logp = logprobs_no_grad(model, chats, config.temperature, config.micro_batch_tokens)
    return model, completions_of(chats, samples), logp, config


def test_sampler_and_trainer_agree_but_for_rounding(make_model, gpu):
    model, completions, logp, config = first_step(make_model, gpu)
    gap = rollout_module.check_sampler_matches_trainer(model, completions, logp, config, repeat=True)
    assert 0 < gap < 8e-3


def other_temperature(patch):
    logits_of = rollout_module.logits_of
    patch.setattr(rollout_module, "logits_of", lambda model, hidden: logits_of(model, hidden) / 1.01)


def other_weights(patch):
    sampling_weights = rollout_module.sampling_weights

    def perturbed(model):
        copy = sampling_weights(model)
        weights = {name: p * 1.01 if name.startswith("blocks.1.") else p for name, p in copy.state_dict().items()}
        copy.load_state_dict(weights, assign=True)
        return copy

    patch.setattr(rollout_module, "sampling_weights", perturbed)


def dropped_token(patch):
    pack_prompts = rollout_module.pack
    patch.setattr(rollout_module, "pack", lambda prompts: pack_prompts([prompt[1:] for prompt in prompts]))


@pytest.mark.parametrize("plant", [other_temperature, other_weights, dropped_token])
def test_a_sampler_that_is_not_the_trainer_is_refused(make_model, gpu, plant, monkeypatch):
    plant(monkeypatch)
    model, completions, logp, config = first_step(make_model, gpu)
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        rollout_module.check_sampler_matches_trainer(model, completions, logp, config, repeat=True)


def test_log_probabilities_come_from_fp32_logits(make_model, gpu):
    """Rounded to bf16, a large logit alone would move them by 0.03."""
    hidden = (4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(64)
    exact = (hidden.double() @ weight.bfloat16().double().T).log_softmax(-1)[targets, targets]
    for off in (set(), {"linear_logprob"}):
        _lib.OFF.update(off)
        found = head.linear_logprob(hidden.to("cuda"), weight.to("cuda"), targets.to("cuda"))
        assert (found.cpu() - exact).abs().max() < 1e-4
    (launched,) = gpu.variants["logprob_kernel"]
    assert launched[0][:2] == ("logits_ptr", "torch.float32")


# --------------------------------------------------------------------------------------------------
# Waits


def waits_of(gpu, f):
    """How often the host waits in f()."""
    gpu.waits.clear()
    f()
    return sum(gpu.waits.values())


def micro_batches_of_pretraining(make_model):
    tok = tokenizer.byte_level()
    model = make_model(**(SHAPE | {"vocab_size": tok.n_vocab})).to("cuda").train()
    streams = [corpus.encode(tok, [SENTENCE * 20])]
    pieces = text_order(streams, tok.eot, 32, seed=0).batch(128)
    return lambda tokens: pretrain.mean_nll(model, streams, pieces, tokens)


def micro_batches_of_sft(make_model):
    model = make_model(**SHAPE).to("cuda").train()
    chats = [make_completion([1, 2], [3, 4, 5, 6, 7, 8]) for _ in range(8)]
    return lambda tokens: sft.mean_nll(model, chats, tokens)


def micro_batches_of_reward(make_model):
    model = reward.with_scalar_head(make_model(**SHAPE), 0).to("cuda").train()
    pairs = [(make_completion([1, 2], [3, 4]), make_completion([1, 2], [5, i])) for i in range(8)]
    return lambda tokens: reward.run_batch(model, pairs, torch.ones(8), tokens)


def micro_batches_of_dpo(make_model):
    model = make_model(**SHAPE).to("cuda").train()
    pairs = [(make_completion([1, 2], [3, 4]), make_completion([1, 2], [5, i])) for i in range(8)]
    ref_logps = dpo.all_logps(model, pairs, 1000)

    def run(tokens):
        config = dpo.Config(init="", data="", out="", beta=0.1, micro_batch_tokens=tokens)
        dpo.run_batch(model, pairs, torch.ones(8), ref_logps, config)

    return run


def micro_batches_of_distill(make_model):
    student, teacher = (make_model(seed, **SHAPE).to("cuda") for seed in (0, 1))
    items = [(make_completion([1, 2], [3, 4, 5, 6, 7, 8]), 0) for _ in range(8)]

    def run(tokens):
        config = distill.Config(init="", teacher="", out="", micro_batch_tokens=tokens)
        distill.run_batch(student.train(), [teacher], items, distill.count_trained(items), config)

    return run


@pytest.mark.parametrize("stage", ["pretraining", "sft", "reward", "dpo", "distill"])
def test_a_training_micro_batch_never_waits(make_model, gpu, stage):
    run = globals()[f"micro_batches_of_{stage}"](make_model)
    run(1000)
    few, many = (waits_of(gpu, functools.partial(run, tokens)) for tokens in (64, 16))
    assert many == few, gpu.waits


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_micro_batch_of_reinforcement_learning_never_waits(run_stage, algorithm):
    """Nor one that reads log-probabilities, or values."""
    waiting = {line.partition(":")[0] for _, line in run_stage(algorithm).waits}
    assert not waiting & {"model.py", "kernels/head.py", "data/pack.py", "kernels/attention.py"}


def test_decoding_waits_once_in_sixteen_steps(make_model, gpu):
    model = make_model(**SHAPE).to("cuda")
    sampler = Sampler(model, 4, 100)
    sampler.add([[1, 2, 3]] * 4, max_new_tokens=90)
    sampler.step()  # reads the prompts
    sampler.step()  # captures
    gpu.replays = 0
    waits = waits_of(gpu, lambda: [sampler.step() for _ in range(2)])
    assert gpu.replays == 2 * GRAPH_STEPS and waits == 2 * 2  # of one kind: after the first the GPU has nothing to do


def test_a_rollout_writes_without_sorting(run_stage):
    """Under deterministic algorithms an indexed write sorts its indices, and copies what it writes
    into: the cache."""
    assert not [line for line in run_stage("grpo").sorted_writes if line.startswith(("rollout.py", "model.py"))]


# --------------------------------------------------------------------------------------------------
# Memory, old GPUs


def test_memory_that_the_allocator_keeps_is_free_memory(make_model):
    """A step of training frees as much as a rollout needs."""
    with emulate(memory=16 << 20):
        model = make_model(**SHAPE).to("cuda")
        before = affordable_slots(model, 64), memory.kv_cache(model.config, torch.device("cuda"), 10**6, 64, 0)
        step = torch.zeros(3 << 20, device="cuda")
        assert affordable_slots(model, 64) < before[0] / 2
        del step
        cached = affordable_slots(model, 64), memory.kv_cache(model.config, torch.device("cuda"), 10**6, 64, 0)
        assert cached == before


def test_below_sm_80_the_references_run_and_it_is_said(make_model, capsys):
    with emulate(capability=(7, 5)) as gpu:
        setup("cuda", 0)
        assert capsys.readouterr().err.count("sm_75") == 1
        model = make_model(**SHAPE).to("cuda")
        assert logprobs(model, pack([[1, 2, 3]]).to("cuda")).isfinite().all()
        assert len(rollout(model, [[1, 2]], max_new_tokens=3)[0].tokens) == 3
    assert not gpu.launches


def test_a_run_asks_for_segments_that_grow(monkeypatch):
    for chosen in ("", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        if chosen:
            monkeypatch.setenv(chosen, "backend:native")
        monkeypatch.setattr(proof, "PROOFS", {})
        with emulate():
            setup("cuda", 0)
        found = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
        assert found == ({chosen: "backend:native"} if chosen else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


# --------------------------------------------------------------------------------------------------
# Benches


def test_a_capture_that_fails_ends_no_contest(monkeypatch):
    def times_of(run, device, milliseconds, graph):
        if run() == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing")
        return [1.0]

    monkeypatch.setattr(bench_kernels, "times_of", times_of)
    monkeypatch.setattr(bench_kernels, "peak_of", lambda run, device: (None, ()))
    contenders = {bench_kernels.OURS: lambda: lambda: "works", "other": lambda: lambda: "refuses"}
    contest = bench_kernels.Contest("op", "shape", "GB/s", 1.0, lambda: tuple, contenders)
    contest.wanted_speed = {"other": 1.0}
    monkeypatch.setattr(bench_kernels, "error_of", lambda found, truth: 0.0)
    ours, other = bench_kernels.hold(contest, torch.device("cpu"), rounds=2)
    assert ours["us"] == 1.0 and "capturing" in other["absent"] and "capturing" in bench_kernels.show(other)


def test_the_baseline_may_use_algorithms_that_are_not_deterministic():
    found = {}
    for run in (bench_train.BaselineRun, bench_train.OurRun):
        torch.use_deterministic_algorithms(True, warn_only=True)
        weight = torch.ones(4, requires_grad=True)
        stub = SimpleNamespace(deterministic=run.deterministic, update=list, loss=weight.dot)
        bench_train.step(stub, torch.zeros(4), 4)
        found[run] = torch.are_deterministic_algorithms_enabled()
    assert found == {bench_train.BaselineRun: False, bench_train.OurRun: True}
