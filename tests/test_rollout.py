"""rollout.py: what is drawn is what is differentiated, for any number of slots; requests do not
depend on each other; draws invert the distribution."""

import math

import numpy as np
import pytest
import torch
from conftest import random_model
from runs import check_sampler

from data import chat, tokenizer
from data.pack import make_completion, pack
from kernels.draw import draw, draw_reference, invert, running_sum
from model import GPT, KVCache, logprobs, logprobs_no_grad
from rollout import (
    GRAPH_STEPS,
    PATIENCE,
    Sample,
    Sampler,
    logits_of,
    rollout,
    sample_completions,
    sampling_weights,
    stream,
    token_budgets,
)
from runtime.errors import UserError


def some_prompts(lengths, seed=0, vocab=61):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def next_logits(model, ids):
    """fp32 [T, V]: the logits after each token, by one full pass."""
    with torch.no_grad():
        return logits_of(model, model.eval()(pack([ids])))


# -------------------------------------------------------------------------------------------------
# Rollouts


@pytest.mark.parametrize("slots, shape", [(1, {}), (3, {}), (5, {}), (128, {}), (5, {"window": 4, "window_every": 2})])
def test_logprobs_are_the_teacher_forced_ones_in_refilled_slots(make_model, slots, shape):
    model, prompts = make_model(**shape), some_prompts([3, 1, 10, 7, 22])
    samples = rollout(model, prompts, max_new_tokens=14, n=4, temperature=0.7, stop={5, 9, 33}, seed=1, slots=slots)
    assert [s.prompt_index for s in samples] == [i for i in range(5) for _ in range(4)]
    assert {s.finished for s in samples} == {True, False}
    assert len({len(s.tokens) for s in samples}) > 4  # slots are refilled at different times
    texts = [prompts[s.prompt_index] + s.tokens for s in samples]
    expected = logprobs(model, pack(texts), 0.7).detach().split([len(text) for text in texts])
    for s, logp in zip(samples, expected):
        assert s.logprobs == pytest.approx(logp[-len(s.tokens) :].tolist(), abs=1e-5)
    long = [tuple(s.tokens) for s in samples if len(s.tokens) > 2]
    assert len(set(long)) == len(long) > 10


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}])
def test_logprobs_of_cut_distributions_are_those_of_what_is_left(make_model, cut):
    model, prompts = make_model(), some_prompts([4, 9, 2])
    kept = 0
    for s in rollout(model, prompts, max_new_tokens=10, n=3, temperature=0.7, seed=2, slots=4, **cut):
        prompt = prompts[s.prompt_index]
        all_logits = next_logits(model, prompt + s.tokens).double()[len(prompt) - 1 : -1]
        for logits, token, logp in zip(all_logits, s.tokens, s.logprobs):
            p = (logits / 0.7).softmax(0)
            if "top_k" in cut:
                p = torch.where(p >= p.topk(cut["top_k"]).values[-1], p, 0.0)
                p /= p.sum()
            if "top_p" in cut:
                ordered, order = p.sort(descending=True)
                fewest = int((ordered.cumsum(0) < cut["top_p"]).sum()) + 1
                p = torch.zeros_like(p).index_copy(0, order[:fewest], ordered[:fewest])
                p /= p.sum()
            kept = max(kept, int((p > 0).sum()))
            assert p[token] > 0 and logp == pytest.approx(p[token].log().item(), abs=1e-5)
    assert 1 < kept < 61


def test_samples_depend_on_seed_and_number_alone(make_model):
    model, prompts = make_model(), some_prompts([3, 1, 10, 7, 2, 2])
    options = dict(max_new_tokens=9, n=3, temperature=0.9, stop={3, 40}, seed=4)
    found = [[s.tokens for s in rollout(model, prompts, slots=slots, **options)] for slots in (1, 4, 128)]
    assert found[0] == found[1] == found[2]
    ranks = [rollout(model, prompts[a:b], first=a * 3, slots=4, **options) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert [s.tokens for mine in ranks for s in mine] == found[0]
    assert [s.prompt_index for s in ranks[1]] == [0] * 3 + [1] * 3 + [2] * 3  # among the prompts that were given
    assert [s.tokens for s in rollout(model, prompts[1:4], slots=4, **options)] != found[0][3:12]
    assert [s.tokens for s in rollout(model, prompts, slots=4, **options | {"seed": 5})] != found[0]


def test_no_prompts_give_no_samples(make_model):
    assert rollout(make_model(), [], max_new_tokens=3) == []  # a rank's share of the held-out prompts may be empty


def test_a_sample_ends_at_its_stop_at_its_limit_or_at_the_context(make_model):
    model, prompts = make_model(context=24, noise=0.05), some_prompts([20, 5, 23, 11, 17])
    budgets = [4, 8, 1, 8, 7]
    options = dict(max_new_tokens=8, n=6, seed=3, slots=4)
    free = rollout(model, prompts, **options)
    assert [len(s.tokens) for s in free] == [budget for budget in budgets for _ in range(6)]
    assert not any(s.finished for s in free)
    stop = set(range(0, 61, 7))
    ended = rollout(model, prompts, stop=stop, **options)
    for whole, s in zip(free, ended):
        cut = next((t + 1 for t, token in enumerate(whole.tokens) if token in stop), len(whole.tokens))
        assert s.tokens == whole.tokens[:cut] and len(s.logprobs) == cut
        assert s.finished == (s.tokens[-1] in stop)
    # A stop token at the very last place is an end
    assert any(s.finished and len(s.tokens) == budgets[s.prompt_index] for s in ended)


@pytest.mark.parametrize("prompt", [[], [1] * 16, [1] * 40])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(make_model, prompt):
    model = make_model(context=16)
    with pytest.raises(UserError, match=f"prompt of {len(prompt)} tokens: a context of 16 takes 1 to 15"):
        rollout(model, [[1] * 14, prompt], max_new_tokens=7)
    sampler = Sampler(model, 2, 16)
    with pytest.raises(UserError, match=f"prompt of {len(prompt)} tokens"):
        sampler.add([[1, 2], prompt], max_new_tokens=7)
    assert not sampler.busy  # none of them waits


def test_a_long_prompt_cuts_its_own_completions_and_no_others(make_model):
    tok = tokenizer.byte_level()
    model = make_model(vocab_size=tok.n_vocab, context=96)
    conversations = [[{"role": "user", "content": text}] for text in ("a", "b" * 60, "c" * 70, "d")]
    prompts = [chat.encode_prompt(tok, messages) for messages in conversations]
    budgets = token_budgets(model, prompts, 30)
    assert budgets == [min(30, 96 - len(p)) for p in prompts] and min(budgets) < 30
    options = dict(max_new_tokens=30, n=3, seed=1)
    encoded, samples, texts = sample_completions(model, tok, conversations, **options)
    assert encoded == prompts and texts == [chat.decode_completion(tok, s.tokens) for s in samples]
    for s in samples:
        assert len(s.tokens) == budgets[s.prompt_index] or s.finished
        assert s.finished == (s.tokens[-1] == chat.end_of_turn(tok))
    # With short prompts in their places, the others are the same
    conversations[1:3] = [[{"role": "user", "content": text}] for text in ("short", "short too")]
    _, alone, _ = sample_completions(model, tok, conversations, **options)
    for i in (0, 3):
        assert [s.tokens for s in alone if s.prompt_index == i] == [s.tokens for s in samples if s.prompt_index == i]
    with pytest.raises(UserError, match="a prompt of 96 tokens fills the model's context of 96"):
        token_budgets(model, [[1], [1] * 96], 30)


def test_greedy_rollouts_take_the_likeliest_token(make_model):
    model, prompts = make_model(), some_prompts([2, 9])
    for s in rollout(model, prompts, max_new_tokens=6, temperature=0):
        text = prompts[s.prompt_index] + s.tokens
        assert s.tokens == next_logits(model, text).argmax(-1).tolist()[len(text) - 7 : -1]
        assert s.logprobs == [0.0] * 6


def test_a_prompt_is_read_once_for_all_its_samples(make_model, monkeypatch):
    model, prompts = make_model(), some_prompts([3, 12, 6])
    read, forward = [], GPT.forward

    def noting(model, p, *rest):
        ends = p.cu_seqlens.tolist()
        read.extend(tuple(p.tokens[a:b].tolist()) for a, b in zip(ends, ends[1:]))
        return forward(model, p, *rest)

    monkeypatch.setattr(GPT, "forward", noting)
    rollout(model, prompts, max_new_tokens=5, n=6, slots=128)
    assert sorted(read) == sorted(map(tuple, prompts))
    read.clear()
    model.dropout = 0.5
    samples = rollout(model, prompts, max_new_tokens=12, n=6, stop={4, 11, 20, 30}, slots=4)
    assert len(read) < len(samples) / 2 and set(read) == set(map(tuple, prompts))
    assert not model.training


def test_two_equal_prompts_are_two_prompts(make_model):
    model, (prompt,) = make_model(), some_prompts([5])
    samples = rollout(model, [prompt, prompt], max_new_tokens=6, n=2, seed=1)
    assert len({tuple(s.tokens) for s in samples}) == 4
    assert [s.prompt_index for s in samples] == [0, 0, 1, 1]


# -------------------------------------------------------------------------------------------------
# The sampler


PROMPTS = some_prompts([3, 1, 10, 7, 22])
REQUESTS = [  # prompts and options of Sampler.add
    (PROMPTS[0], dict(max_new_tokens=7, temperature=0.0)),
    (PROMPTS[0], dict(max_new_tokens=10, temperature=0.7, seed=3, n=2)),
    (PROMPTS[1], dict(max_new_tokens=3, seed=4, first=5, n=3)),
    (PROMPTS[2], dict(max_new_tokens=14, temperature=1.6, top_k=5, seed=1)),
    (PROMPTS[3], dict(max_new_tokens=14, temperature=1.6, stop={4, 11, 20, 33, 59}, seed=2, n=2)),
    (PROMPTS[4], dict(max_new_tokens=6, top_p=0.6, seed=9, n=2)),
    (PROMPTS[1], dict(max_new_tokens=9, temperature=2.0, top_k=30, top_p=0.9, stop=[7], n=2)),
]


def content(s):
    """What a Sample has. Products of more or fewer rows may round its log-probabilities apart."""
    return s.tokens, pytest.approx(s.logprobs, abs=1e-5), s.finished


@pytest.fixture(scope="module")
def alone():
    """What each of REQUESTS gives alone, in one list: request i of a sampler gives alone[i]."""
    model = random_model()
    return [content(s) for prompt, options in REQUESTS for s in rollout(model, [prompt], **options)]


def finish(sampler):
    """{request: (tokens, logprobs, finished)} of all that are left."""
    found = {}
    while sampler.busy:
        found |= {s.request: (s.tokens, s.logprobs, s.finished) for s in sampler.step()}
    return found


@pytest.mark.parametrize("slots", [1, 4, 32])
def test_requests_side_by_side_are_what_each_is_alone(make_model, alone, slots):
    sampler, ids = Sampler(make_model(), slots, 40), []
    for prompt, options in REQUESTS:
        ids += sampler.add([prompt], **options)
    assert ids == list(range(13))
    found = finish(sampler)
    assert [found[id] for id in ids] == alone
    assert {finished for _, _, finished in alone} == {True, False} and len({len(tokens) for tokens, _, _ in alone}) > 5


def test_requests_may_be_added_while_others_run(make_model, alone):
    sampler, found = Sampler(make_model(), 3, 40), {}
    for prompt, options in REQUESTS:
        sampler.add([prompt], **options)
        for _ in range(3):
            found |= {s.request: (s.tokens, s.logprobs, s.finished) for s in sampler.step()}
    assert 0 < len(found) < 13
    found |= finish(sampler)
    assert [found[id] for id in range(13)] == alone
    assert sampler.step() == [] and not sampler.busy
    # And once all have finished, others may follow
    prompt, options = REQUESTS[3]
    assert sampler.add([prompt], **options) == [13]
    assert finish(sampler) == {13: alone[6]}


def test_a_slot_that_ends_between_two_looks_is_left_alone(make_model, alone):
    """As on CUDA, where a captured graph steps all slots many times before anyone looks."""
    sampler, samples = Sampler(make_model(), 4, 40), []
    for prompt, options in REQUESTS:
        sampler.add([prompt], **options)
    with torch.no_grad():
        while sampler.busy:
            if sampler.waiting and len(sampler.live) < 4:
                sampler.admit()
            for _ in range(GRAPH_STEPS):
                sampler.step_slots(4)
            samples += sampler.collect()
    found = {s.request: (s.tokens, s.logprobs, s.finished) for s in samples}
    assert [found[id] for id in range(13)] == alone


def test_prompts_are_read_together_but_none_is_put_off_for_long(make_model):
    sampler = Sampler(make_model(), 20, 40)
    sampler.add([[1, 2]], n=16, max_new_tokens=38)
    sampler.step()
    for newcomers, steps in [(1, PATIENCE + 1), (2, 1)]:  # two are an eighth of those that wait for their reading
        ids = sampler.add([[3]], n=newcomers, max_new_tokens=1)
        found = [[sample.request for sample in sampler.step()] for _ in range(steps)]
        assert found == [[]] * (steps - 1) + [ids]


def test_cancelling_frees_the_slot_and_changes_nothing_for_the_others(make_model):
    model, prompts = make_model(), some_prompts([4, 9, 2])
    options = dict(max_new_tokens=12, seed=2, n=2)
    expected = {s.request: content(s) for s in rollout(model, prompts, **options)}
    sampler = Sampler(model, 3, 40)
    first, waiting_too, *rest = ids = sampler.add(prompts, **options)
    sampler.step()
    sampler.step()
    assert [bool(sampler.written(id)) for id in ids] == [True] * 3 + [False] * 3  # three slots, three wait
    sampler.cancel(first)
    sampler.cancel(rest[-1])  # one that waits
    assert sampler.written(first) == []
    sampler.step()
    assert sampler.written(rest[1])  # one that waited has the slot, which had been the first one's
    found = finish(sampler)
    assert found == {id: expected[id] for id in (waiting_too, *rest[:-1])}
    sampler.cancel(waiting_too)  # has finished: nothing happens
    assert not sampler.busy


def test_what_is_written_so_far_can_be_read(make_model):
    model, prompts = make_model(), some_prompts([4, 9, 2])
    sampler = Sampler(model, 2, 40)
    ids = sampler.add(prompts, max_new_tokens=6, seed=2, stop={5, 9, 33})
    written, samples = {id: [[]] for id in ids}, []
    while sampler.busy:
        samples += sampler.step()
        for id in ids:
            written[id].append(sampler.written(id))
    for s in samples:
        longest = max(written[s.request], key=len)
        assert all(tokens == s.tokens[: len(tokens)] for tokens in written[s.request])
        assert len(longest) == len(s.tokens) - 1 and sampler.written(s.request) == []


def test_sampling_leaves_pytorchs_determinism_as_it_was(make_model):
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        rollout(make_model(), [[1, 2]], max_new_tokens=2)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_damaged_weights_are_reported_instead_of_sampled(make_model):
    model = make_model()
    with torch.no_grad():
        model.norm[3] = float("nan")
    with pytest.raises(UserError, match="not finite: the model's weights are damaged"):
        rollout(model, some_prompts([3]), max_new_tokens=4)


# -------------------------------------------------------------------------------------------------
# A stream


def test_a_stream_is_the_rollout_of_the_same_seed(make_model):
    model, (prompt,) = make_model(noise=0.05), some_prompts([5])
    options = dict(max_new_tokens=59, temperature=0.8, top_k=30, seed=3)
    (sample,) = rollout(model, [prompt], **options)
    assert list(stream(model, prompt, **options)) == sample.tokens and len(sample.tokens) == 59
    end = next(i for i in range(8, 59) if sample.tokens[i] not in sample.tokens[:i])
    assert list(stream(model, prompt, stop={sample.tokens[end]}, **options)) == sample.tokens[: end + 1]
    options |= {"seed": 4, "max_new_tokens": 5}
    assert list(stream(model, prompt, **options)) != sample.tokens[:5]


def test_a_stream_has_a_cache_for_what_it_may_write(make_model, monkeypatch):
    lengths = []

    class Noting(KVCache):
        def __init__(self, model, slots, length):
            super().__init__(model, slots, length)
            lengths.append(length)

    monkeypatch.setattr("rollout.KVCache", Noting)
    model = make_model(context=64)
    for prompt, new in ((3, 5), (3, 61), (3, 62), (60, 9), (80, 1)):
        assert len(list(stream(model, [1] * prompt, max_new_tokens=new))) == new
    assert lengths == [8, 64, 65, 65, 65]


def test_a_stream_continues_past_the_context(make_model):
    model = make_model(context=16)
    (prompt,) = some_prompts([5])
    ids = list(stream(model, prompt, max_new_tokens=40, temperature=0))
    assert len(ids) == 40
    text, seen = list(prompt), len(prompt)  # seen: how much of the text the model reads
    for token in ids:
        if seen == 16 + 1:
            seen = 8
        best = next_logits(model, text[-seen:])[-1].topk(2)
        assert token == best.indices[0] or best.values[0] - best.values[1] < 1e-4
        text.append(token)
        seen += 1
    for n in (15, 16, 40):  # prompts about as long as the context, and longer
        assert len(list(stream(model, some_prompts([n])[0], max_new_tokens=12))) == 12
    ids = list(stream(make_model(context=16, noise=0.05), prompt, max_new_tokens=30))
    assert ids[12:18] != ids[21:27]  # each part has its own random numbers


# -------------------------------------------------------------------------------------------------
# Drawing


def expected_tokens(p, u):
    """The inverse of the cumulative distribution, in fp64, and how near u is to a step of it."""
    cdf = p.double().cumsum(-1)
    target = u.double()[:, None] * cdf[:, -1:]
    return (cdf <= target).sum(-1), (cdf - target).abs().amin(-1) / cdf[:, -1]


@pytest.mark.parametrize("V", [2, 3, 16, 61, 1000, 50_257])
def test_invert_is_the_inverse_of_the_cumulative_distribution(V):
    generator = torch.Generator().manual_seed(V)
    B = 400 if V < 5000 else 40
    p = torch.rand(B, V, generator=generator).pow(6) * (torch.rand(B, V, generator=generator) < 0.5)
    p[torch.arange(B), torch.randint(V, (B,), generator=generator)] += 0.1  # none is all zeros
    p /= p.sum(-1, keepdim=True)
    u = torch.rand(B, generator=generator)
    u[: B // 8], u[B // 8 : B // 4] = 0.0, 1 - 2**-24
    (tokens, _), (plain, gap) = invert(p, u), expected_tokens(p, u)
    assert tokens.min() >= 0 and tokens.max() < V and (p.gather(1, tokens[:, None]) > 0).all()
    assert torch.equal(tokens[gap > 1e-12], plain[gap > 1e-12]) and (gap > 1e-12).float().mean() > 0.5
    rows = torch.arange(B // 8)
    assert torch.equal(tokens[rows], (p[rows] > 0).int().argmax(-1))  # u = 0: the first that can be
    # u = 1 - 2^-24: the last that is not smaller than what is left
    last = V - 1 - (p.flip(-1) > 1e-6).int().argmax(-1)
    assert (tokens[B // 8 : B // 4] >= last[B // 8 : B // 4]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.8, torch.ones(4, 1)], ids=str)
def test_log_probabilities_keep_the_tail_of_a_large_vocabulary(temperature):
    """SmolLM2's 49,152 tokens were 1.5e-5 too likely: softmax adds up in fp32."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50_000, generator=generator) * 2
    logits[:, 7] = torch.tensor([12.0, 16.0, 18.0, 20.0])
    expected = (logits.double() / temperature).log_softmax(-1)
    tops = []
    if isinstance(temperature, torch.Tensor):
        tops = [torch.full((4, 1), 50_000), torch.full((4, 1), math.inf)]
    tokens, logp = draw_reference(logits, torch.rand(4, generator=generator), temperature, *tops)
    assert (logp - expected.gather(1, tokens[:, None])[:, 0]).abs().max() < 2e-6


@pytest.mark.parametrize("V", [5, 70, 700])
def test_no_token_without_probability_is_drawn_at_the_steps_themselves(V):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        p = torch.rand(V, generator=generator) * (torch.rand(V, generator=generator) < 0.3)
        p[int(torch.randint(V, (1,), generator=generator))] = 1.0
        steps = (p.double().cumsum(0) / p.double().sum()).float()
        u = torch.cat([steps, steps.nextafter(torch.zeros(())), steps.nextafter(torch.ones(()))]).clamp(0, 1 - 2**-24)
        tokens, _ = invert(p.expand(len(u), -1), u)
        assert tokens.max() < V and (p[tokens] > 0).all()


def check_frequencies(tokens, p):
    """A chi-squared test of tokens drawn from p."""
    n, counts, possible = len(tokens), torch.bincount(tokens, minlength=len(p)).double(), p > 0
    assert counts[~possible].sum() == 0
    chi2 = ((counts - n * p)[possible] ** 2 / (n * p)[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_frequencies_are_those_of_a_multinomial():
    generator = torch.Generator().manual_seed(0)
    V, n = 300, 30_000
    logits = torch.randn(V, generator=generator) * 1.5
    logits[::7] = -torch.inf
    p = (logits.double() / 1.3).softmax(0)
    tokens, logp = draw(logits.expand(n, -1), torch.rand(n, generator=generator), 1.3)
    check_frequencies(tokens, p)
    torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cut", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.7}], ids=str)
def test_draws_follow_the_distribution(cut):
    generator = torch.Generator().manual_seed(0)
    logits, n = torch.randn(12, generator=generator) * 1.5, 40_000
    p = (logits.double() / cut.get("temperature", 1.0)).softmax(0)
    if "top_k" in cut:
        p = torch.where(p >= p.topk(cut["top_k"]).values[-1], p, 0)
    if "top_p" in cut:
        ordered, order = p.sort(descending=True)
        keep = order[: int((ordered.cumsum(0) < cut["top_p"]).sum()) + 1]
        p = torch.zeros_like(p).index_copy(0, keep, p[keep])
    p = p / p.sum()
    tokens, logp = draw(logits.expand(n, -1), torch.rand(n, generator=generator), **cut)
    check_frequencies(tokens, p)
    torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=0, atol=1e-5)


def test_draws_at_the_ends_of_the_uniform_interval():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf, 2.0, -torch.inf]]).expand(3, -1)
    tokens, logp = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert tokens[0] == 1 and tokens[2] == 4 and logp.isfinite().all()


def test_greedy_draws_and_extreme_cuts():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    u = torch.rand(50, generator=torch.Generator().manual_seed(2))
    for cut in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"temperature": 1e-4}):
        tokens, logp = draw(logits, u, **cut)
        assert torch.equal(tokens, logits.argmax(-1)) and logp.abs().max() < 1e-6, cut
    for cut in ({"top_k": 20}, {"top_k": 99}, {"top_p": 1.0}):
        assert all(torch.equal(a, b) for a, b in zip(draw(logits, u, **cut), draw(logits, u), strict=True))


def test_one_token_of_all_probability_is_always_drawn():
    for V in (2, 65, 4096):
        for token in (0, V // 2, V - 1):
            logits = torch.full((3, V), -200.0)
            logits[:, token] = 5.0
            tokens, logp = draw(logits, torch.tensor([0.0, 0.3, 1 - 2**-24]))
            assert tokens.tolist() == [token] * 3 and logp.tolist() == [0.0] * 3


def test_rows_of_a_draw_may_have_their_own_settings():
    generator = torch.Generator().manual_seed(3)
    B, V = 60, 50
    logits, u = torch.randn(B, V, generator=generator) * 2, torch.rand(B, generator=generator)
    logits[:5] = 0.0  # ties: greedy draws take the first of them, and are certain
    settings = [((0.0, 0.5, 1.0, 1.7)[i % 4], (V, 1, 7)[i % 3], (math.inf, 0.3, 0.9)[i // 3 % 3]) for i in range(B)]
    temperature, top_k, top_p = torch.tensor(settings, dtype=torch.float64).split(1, dim=1)
    tokens, logp = draw(logits, u, temperature, top_k, top_p)
    alone = [draw(logits[i : i + 1], u[i : i + 1], *settings[i]) for i in range(B)]
    assert tokens.tolist() == [int(token) for token, _ in alone]
    assert logp.tolist() == [float(logp) for _, logp in alone]


def test_sampling_weights_are_the_models_own_transposed_in_memory_for_onednn(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr("rollout.ONEDNN", False)
    assert sampling_weights(model) is model
    monkeypatch.setattr("rollout.ONEDNN", True)
    copy = sampling_weights(model)
    for (name, p), own in zip(copy.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, own) and own.is_contiguous(), name
        assert p.is_contiguous() if p.dim() == 1 or name == "embed" else p.T.is_contiguous(), name


@pytest.mark.parametrize("size", [1, 2, 7, 300, 50_000])
def test_running_sums_are_cumsums_without_a_square_of_the_vocabulary(size):
    x = torch.rand(3, size)
    torch.testing.assert_close(running_sum(x), x.double().cumsum(-1), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------------
# The cache


def test_the_first_slots_are_a_view_and_copies_are_whole(make_model):
    cache = KVCache(make_model(), 5, 8)
    cache.k.normal_(), cache.v.normal_()
    cache.lengths[:] = torch.tensor([1, 2, 3, 4, 5])
    view = cache.first(2)
    view.k.zero_(), view.lengths.add_(5)
    assert view.k.shape[1] == 2 and not cache.k[:, :2].any() and cache.k[:, 2:].all()
    assert cache.lengths.tolist() == [6, 7, 3, 4, 5]
    k, v = cache.k.clone(), cache.v.clone()
    cache.copy(torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor([4, 2]), 4)
    for now, before in ((cache.k, k), (cache.v, v)):
        assert torch.equal(now[:, :2, :4], before[:, 3:, :4]) and torch.equal(now[:, :2, 4:], before[:, :2, 4:])
        assert torch.equal(now[:, 2:], before[:, 2:])
    assert cache.lengths.tolist() == [4, 2, 3, 4, 5]


# -------------------------------------------------------------------------------------------------
# One distribution


def sampled(model, temperature=0.8):
    prompts = some_prompts([4, 9, 2])
    samples = rollout(model, prompts, max_new_tokens=7, n=2, temperature=temperature, stop={5}, seed=1)
    chats = [make_completion(prompts[s.prompt_index], s.tokens, s.loss_mask) for s in samples]
    return chats, samples, logprobs_no_grad(model, chats, temperature, 30)


def test_sampler_trainer_and_reference_agree_before_the_first_update(make_model):
    model = make_model()
    chats, samples, logp = sampled(model)
    gap = check_sampler(model, chats, samples, logp, logp.clone(), 0.8, 30, True)
    assert 0 <= gap < 1e-6
    assert check_sampler(model, [], [], logp[:0], None, 0.8, 30, True) == 0


def test_tokens_of_others_in_a_sample_are_neither_trained_nor_compared(make_model):
    model = make_model()
    chats, samples, logp = sampled(model)
    assert all(s.loss_mask == [True] * len(s.tokens) for s in samples)
    s = samples[2]
    s.loss_mask[1:3] = [False, False]  # a tool's, say
    s.logprobs[1:3] = [7.0, float("nan")]
    chats[2] = make_completion(chats[2].ids[: -len(s.tokens)], s.tokens, s.loss_mask)
    logp = logprobs_no_grad(model, chats, 0.8, 30)
    assert len(logp) == sum(len(s.tokens) for s in samples) - 2
    assert check_sampler(model, chats, samples, logp, None, 0.8, 30, True) < 1e-6


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.05, 30.0])
def test_rounding_grows_as_the_temperature_falls(make_model, temperature):
    model = make_model()
    chats, samples, logp = sampled(model, temperature)
    assert all(math.isfinite(x) for s in samples for x in s.logprobs)
    wide = [Sample(s.prompt_index, s.tokens, [x + 5e-5 / temperature for x in s.logprobs], True) for s in samples]
    if temperature < 1:
        check_sampler(model, chats, wide, logp, None, temperature, 30, True)
    far = 2e-4 / min(temperature, 1)
    wide = [Sample(s.prompt_index, s.tokens, [x + far for x in s.logprobs], True) for s in samples]
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        check_sampler(model, chats, wide, logp, None, temperature, 30, True)


def test_distributions_that_differ_are_refused(make_model):
    model = make_model()
    chats, samples, logp = sampled(model)
    sides = (model, chats, samples)
    with pytest.raises(UserError, match="KL != 0"):
        check_sampler(*sides, logp, logp + 1e-6, 0.8, 30, True)
    with pytest.raises(UserError, match="ratio != 1"):  # another temperature in training
        check_sampler(*sides, logp, None, 0.9, 30, True)
    shifted = [Sample(s.prompt_index, s.tokens, [x + 1e-3 for x in s.logprobs], s.finished) for s in samples]
    with pytest.raises(UserError, match="sampler and trainer disagree: mean .* 1.00e-03"):
        check_sampler(model, chats, shifted, logp, None, 0.8, 30, True)
    model.dropout = 0.3
    with pytest.raises(UserError, match="ratio != 1"):
        check_sampler(*sides, logp, None, 0.8, 30, True)
    # That is looked for in a run's first step only
    assert check_sampler(*sides, logp, None, 0.8, 30, False) < 1e-6
