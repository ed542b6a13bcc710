"""The same code on a CUDA GPU, in bf16: close to the CPU's fp32, learning alike, sampling what it trains on. Skipped without a GPU."""
import pytest
import torch

import pretrain
from data import corpus, tokenizer
from data.pack import pack
from model import logprobs
from optim import Optimizer
from rollout import rollout

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def documents(lengths, vocab=61):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


def test_logprobs_and_gradients_are_close_to_the_cpu_in_fp32(make_model):
    p = pack(documents([64, 1, 17, 40, 40, 3]))
    found = []
    for device in ("cpu", "cuda"):
        model = make_model(noise=0.1).to(device)
        logp = logprobs(model, p.to(device))
        logp.sum().backward()
        found.append((logp.detach().cpu(), model.blocks[0].qkv.grad.cpu()))
    (logp, grad), (logp_gpu, grad_gpu) = found
    assert (logp - logp_gpu).abs().mean() < 0.02
    assert (grad - grad_gpu).norm() / grad.norm() < 0.05


def test_twenty_steps_learn_as_on_the_cpu(make_model):
    tok = tokenizer.byte_level()
    streams = [corpus.encode(tok, ["the quick brown fox jumps over the lazy dog. " * 40])]
    losses = {}
    for device in ("cpu", "cuda"):
        model = make_model(vocab_size=tok.n_vocab, noise=0.0).to(device)
        optimizer = Optimizer(model, 0.01, matrix_lr=0.02, embed_lr=0.3, polar="fp32")
        order = corpus.text_order(streams, tok.eot, 64, seed=0)
        losses[device] = []
        for _ in range(20):
            losses[device].append(pretrain.train_step(model, streams, order.batch(512), 256).item())
            optimizer.step(1.0)
    assert losses["cuda"][-1] < losses["cuda"][0] - 1
    assert max(abs(a - b) for a, b in zip(losses["cpu"], losses["cuda"])) < 0.15


def test_sampled_logprobs_are_the_teacher_forced_ones(make_model):
    model = make_model(noise=0.1).cuda()
    prompts = [d.tolist() for d in documents([3, 9, 1])]
    for s in rollout(model, prompts, max_new=20, n=2, temperature=0.7, seed=1):
        ids = prompts[s.prompt_index] + s.tokens
        with torch.no_grad():
            logp = logprobs(model, pack([ids]).to("cuda"), temperature=0.7)[-len(s.tokens) :].cpu()
        assert (logp - torch.tensor(s.logprobs)).abs().mean() < 1e-2
