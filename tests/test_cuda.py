"""The same code on a CUDA GPU, in bf16: close to the CPU's fp32, kernels and references alike, the
same twice, sampling what it trains on. Skipped without a GPU."""

import functools
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import logged, save, write_rows
from test_ppo import assert_same

import pretrain
from data import corpus, tokenizer
from data.pack import next_tokens, pack
from kernels import _lib, proof
from kernels.attention import attention, layout
from kernels.decode import decode_attention
from kernels.head import IGNORE, linear_cross_entropy, linear_logprob
from model import KVCache, logprobs
from optim import Optimizer
from rollout import rollout
from runtime import memory
from runtime.batches import text_order
from runtime.process import setup

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Heads as wide as the kernels want them
SHAPE = dict(width=128, heads=4, kv_heads=2, head_dim=64, ffn=256, context=512)
SENTENCE = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(autouse=True, scope="module")
def as_a_script():
    setup("cuda", 0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def switch(monkeypatch):
    """A function: "kernels" or "references" -> from now on they run."""
    modes = {"kernels": "1", "references": "0"}
    return lambda which: monkeypatch.setattr(_lib, "MODE", modes[which])


def documents(lengths, vocab=61):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


def train(model, steps=20, muon_dtype="fp32"):
    """(losses, weights) of training on one sentence."""
    tok = tokenizer.byte_level()
    streams = [corpus.encode(tok, [SENTENCE * 40])]
    optimizer = Optimizer(model, 0.01, matrix_lr=0.02, embed_lr=0.3, muon_dtype=muon_dtype)
    order = text_order(streams, tok.eot, 64, seed=0)
    losses = []
    for _ in range(steps):
        losses.append(pretrain.mean_nll(model.train(), streams, order.batch(512), 256))
        optimizer.step(1.0)
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("op", sorted(proof.PROOFS))
def test_every_op_proves_itself(op):
    assert proof.prove_op(op, torch.device("cuda")) == ""


@pytest.mark.parametrize("shape", [{}, SHAPE], ids=["narrow", "wide"])
def test_logprobs_and_gradients_are_close_to_the_cpu_in_fp32(make_model, shape):
    p = pack(documents([64, 1, 17, 40, 40, 3]))
    found = []
    for device in ("cpu", "cuda"):
        model = make_model(noise=0.1 if not shape else 0.02, **shape).to(device)
        logp = logprobs(model, p.to(device))
        logp.sum().backward()
        found.append((logp.detach().cpu(), model.blocks[0].attn.qkv.grad.cpu()))
    (logp, grad), (logp_gpu, grad_gpu) = found
    assert (logp - logp_gpu).abs().mean() < 0.02
    assert (grad - grad_gpu).norm() / grad.norm() < 0.05


def largest_difference(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_twenty_steps_learn_as_on_the_cpu_and_kernels_as_references(make_model, switch):
    losses = []
    for which, device in [("kernels", "cuda"), ("references", "cuda"), ("references", "cpu")]:
        switch(which)
        model = make_model(vocab_size=tokenizer.byte_level().n_vocab, noise=0.0, **SHAPE).to(device)
        losses.append(train(model)[0])
    kernels, references, cpu = losses
    assert kernels[-1] < kernels[0] - 1
    assert largest_difference(kernels[:1], references[:1]) < 2e-3
    assert largest_difference(kernels, references) < 0.1 and largest_difference(kernels, cpu) < 0.15


def test_five_steps_twice_are_equal_bit_for_bit(make_model):
    shape = dict(vocab_size=tokenizer.byte_level().n_vocab, noise=0.02, **SHAPE)
    losses, weights = train(make_model(**shape).cuda(), steps=5, muon_dtype="bf16")
    losses_again, weights_again = train(make_model(**shape).cuda(), steps=5, muon_dtype="bf16")
    assert losses == losses_again and all(map(torch.equal, weights, weights_again))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_memory_plan_is_what_two_packs_and_a_step_allocate(make_model, checkpointed):
    tok = tokenizer.byte_level()
    model = make_model(vocab_size=tok.n_vocab, noise=0.02, **(SHAPE | {"layers": 6})).cuda()
    model.checkpoint_activations = checkpointed
    streams = [corpus.encode(tok, [SENTENCE * n for n in range(1, 200)])]
    order = text_order(streams, tok.eot, 512, seed=0)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    optimizer = Optimizer(model, 0.01, matrix_lr=0.02)

    def loss(model, pieces):
        return pretrain.nll_sum(model, *corpus.pack_pieces(streams, pieces))

    phases = memory.plan(
        types.SimpleNamespace(device=torch.device("cuda")),
        [(model, optimizer, loss)],
        order.items,
        order.lengths,
        step_tokens=65536,
        read_tokens=0,
        frozen={},
        prompt_lengths=(),
        completions=0,
        micro_batch_tokens=32768,
        checkpoint_activations=checkpointed,
    )
    planned = max(map(memory.total, phases.values()))
    for _ in range(2):
        pretrain.mean_nll(model.train(), streams, order.batch(65536), 32768)
        optimizer.step(1.0)
    assert 0.85 < planned / (torch.cuda.max_memory_allocated() - held) < 1.15


def test_the_training_loss_compiles_as_one_graph(make_model):
    model = make_model(noise=0.05, **SHAPE).cuda()

    def loss(p, targets):
        return linear_cross_entropy(model(p), model.head, targets)

    compiled = torch.compile(loss, fullgraph=True)
    for lengths in ([64, 1, 17, 40], [100, 22], [64, 1, 17, 40]):
        p = pack(documents(lengths))
        targets = next_tokens(p, IGNORE).cuda()
        found = []
        for f in (loss, compiled):
            model.zero_grad()
            value = f(p.to("cuda"), targets)
            value.backward()
            found.append((value.item(), model.blocks[0].attn.qkv.grad.clone(), model.untied_head.grad.clone()))
        (eager, *grads), (fused, *fused_grads) = found
        assert abs(eager - fused) / eager < 1e-2
        assert all((a - b).norm() / a.norm() < 0.05 for a, b in zip(grads, fused_grads, strict=True))


@pytest.mark.parametrize("dh", [64, 128])
def test_attention_repeats_itself_a_thousand_times(dh):
    """Races show as rare differences."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 700, 701, 1300, 4096], dtype=torch.int32, device="cuda")
    qkv, upstream = random(4096, 8 + 2 * 2, dh).requires_grad_(), random(4096, 8, dh)

    def run():
        out = attention(*qkv.split([8, 2, 2], dim=1), layout(cu_seqlens, qkv, dh))
        return out, *torch.autograd.grad(out, qkv, upstream)

    first = run()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        for a, b in zip(first, run(), strict=True):
            differs |= (a != b).any()
    assert first[0].isfinite().all() and not differs


def test_the_head_with_more_logits_than_an_int32_counts():
    N, V, C = 43_008, 50_304, 64
    assert N * V > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(V, C, generator=generator, device="cuda") / 8
    targets = torch.randint(V, (N,), generator=generator, device="cuda")
    loss = functools.partial(linear_cross_entropy, targets=targets)
    whole = proof.with_gradients(functools.partial(loss, chunk_mb=5000), [hidden, weight])
    parts = proof.with_gradients(functools.partial(loss, chunk_mb=256), [hidden, weight])
    for a, b in zip(whole, parts, strict=True):
        assert (a.float() - b.float()).abs().max() <= 1e-2 * b.float().abs().max()
    whole, parts = (linear_logprob(hidden, weight, targets, chunk_mb=mb) for mb in (5000, 256))
    assert torch.allclose(whole, parts, atol=2e-2)


@pytest.mark.parametrize("window", [0, 100])
def test_a_captured_graph_decodes_any_lengths(window):
    generator = torch.Generator("cuda").manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
    q, k, v = random(4, 8, 64), random(4, 1024, 2, 64), random(4, 1024, 2, 64)
    lengths = torch.full((4,), 1, device="cuda")
    decode_attention(q, k, v, lengths, window)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths, window)
    for now in ([1, 2, 3, 4], [99, 100, 101, 1024]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, lengths, window))


@pytest.mark.parametrize("options", [{"kv_heads": 1}, {}, {"kv_heads": 4}, {"window": 70, "window_every": 2}])
def test_decoding_with_the_cache_is_the_full_pass(make_model, options):
    model = make_model(noise=0.05, **(SHAPE | options)).cuda()
    texts = documents([300, 1, 64, 129])
    with torch.no_grad():
        cache = KVCache(model, len(texts), 320)
        p = pack(texts).to("cuda")
        model.forward(p, cache, torch.arange(len(texts), device="cuda"))
        for _ in range(10):
            token = torch.randint(61, (len(texts),), device="cuda")
            stepped = model.step(token, cache)
            texts = [torch.cat([t, token[i : i + 1].cpu()]) for i, t in enumerate(texts)]
            p = pack(texts).to("cuda")
            whole = model(p)[p.cu_seqlens[1:].long() - 1]
            assert (stepped.float() - whole.float()).norm() / whole.float().norm() < 2e-2


def test_refilled_slots_and_captured_graphs_draw_what_one_slot_at_a_time_draws(make_model):
    """Two prompts, many samples of very different lengths: slots are refilled and move together,
    and new graphs are captured."""
    model = make_model(noise=0.05, **SHAPE).cuda()
    prompts = [d.tolist() for d in documents([3, 90])]
    options = dict(max_new_tokens=100, n=12, stop=set(range(3)), seed=3)
    found = [rollout(model, prompts, slots=slots, **options) for slots in (24, 5, 1)]
    assert len({len(s.tokens) for s in found[0]}) > 5 and any(s.finished for s in found[0])
    # bf16 in another batch may round differently, and after the first token that differs a sample
    # is another one.
    for other in found[1:]:
        same = [a.tokens[:20] == b.tokens[:20] for a, b in zip(found[0], other, strict=True)]
        assert np.mean(same) >= 0.7


@pytest.mark.parametrize("shape", [{}, SHAPE], ids=["narrow", "wide"])
def test_sampled_logprobs_are_the_teacher_forced_ones(make_model, shape):
    model = make_model(noise=0.1 if not shape else 0.02, **shape).cuda()
    prompts = [d.tolist() for d in documents([3, 9, 1])]
    for s in rollout(model, prompts, max_new_tokens=20, n=2, temperature=0.7, seed=1):
        ids = prompts[s.prompt_index] + s.tokens
        with torch.no_grad():
            logp = logprobs(model, pack([ids]).to("cuda"), temperature=0.7)[-len(s.tokens) :].cpu()
        assert (logp - torch.tensor(s.logprobs)).abs().mean() < 1e-2


def command(script, out, **flags):
    """The running process of a stage on the GPU, which a forked child of this one could not use."""
    words = [f"--{name}={value}" for name, value in (flags | {"out": out, "device": "cuda"}).items()]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, script, *words], cwd=Path(pretrain.__file__).parent, **piped)


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_a_killed_run_resumes_bit_for_bit(make_model, tmp_path, stage):
    if stage == "pretrain":
        text = tmp_path / "text.txt"
        text.write_text("".join(f"{i} and {i + 1} are {2 * i + 1}. " for i in range(3000)))
        flags = {"data": text, "depth": 2, "width": 128, "context": 256, "batch_tokens": 2048, "dropout": 0.1}
        flags |= {"sample_every": 10, "max_new_tokens": 20}
    else:
        prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}?"} for i in range(60)])
        init = save(make_model, tmp_path / "sft", "sft", **SHAPE)
        flags = {"init": init, "data": prompts, "reward": "data/rules.py:brief", "prompts_per_step": 4}
        flags |= {"group_size": 8, "max_new_tokens": 24, "eval_prompts": 4, "lr": 1e-4, "kl": "k2", "beta": 0.1}
    flags |= {"steps": 30, "save_every": 15, "keep_last": 9}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    first, second = command(f"{stage}.py", straight, **flags), command(f"{stage}.py", killed, **flags)
    while not logged(killed, 16):
        assert second.poll() is None, second.stdout.read().decode()
        time.sleep(0.01)
    second.kill()
    second.wait()
    for process in (first, command(f"{stage}.py", killed, resume=True, **flags)):
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
    assert "continuing after step 15" in output  # of the resumed one
    assert_same(straight, killed, [15, 30])
