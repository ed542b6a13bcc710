"""The model over packs, its cache, and sampling from it. Models are tiny, with all weights random, in fp64 where an identity must hold exactly."""
import math
import types

import pytest
import torch

from common import UserError
from data.pack import pack
from model import GPT, KVCache, config_for, logprobs, rotary_tables, score, values
from rollout import draw, rollout, stream

LENGTHS = [5, 1, 17, 2, 30, 9]


def documents(seed=0, lengths=LENGTHS, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def logits_of(model, p):
    return model(p) @ model.head.T


# ---------------------------------------------------------------------------------------------------------------------------------
# One pass


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_no_token_sees_a_later_one_or_another_document(make_model, kv_heads):
    model = make_model(kv_heads=kv_heads).double()
    docs = documents(lengths=[6, 11, 4])
    before = model(pack(docs))
    for t in range(11):
        changed = [list(d) for d in docs]
        changed[1][t] = (changed[1][t] + 1) % 61
        difference = (model(pack(changed)) - before).abs().amax(-1)
        unseen = [i for i in range(21) if not 6 + t <= i < 17]
        assert difference[unseen].max() < 1e-12
        assert difference[6 + t : 17].min() > 1e-6  # and each later token of the document does see it


def test_packed_equals_alone(make_model):
    model, critic = make_model().double(), make_model(scalar_head=True).double()
    docs = documents()
    p, singles = pack(docs), [pack([d]) for d in docs]
    for together, alone in [
        (model(p), torch.cat([model(s) for s in singles])),
        (logprobs(model, p, 0.7), torch.cat([logprobs(model, s, 0.7) for s in singles])),
        (values(critic, p), torch.cat([values(critic, s) for s in singles])),
        (score(critic, p), torch.cat([score(critic, s) for s in singles])),
    ]:
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6 if together.dtype == torch.float32 else 1e-11)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = logprobs(model, pack([docs[i] for i in order])).split([LENGTHS[i] for i in order])
    for i, part in zip(order, shuffled):
        torch.testing.assert_close(part, logprobs(model, singles[i]), rtol=0, atol=1e-11)


def test_packed_gradients_equal_alone(make_model):
    docs = documents(1)
    weight = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for shape, f in [({}, logprobs), ({"tied": True, "qk_norm": False}, logprobs), ({"scalar_head": True, "qkv_bias": True}, values)]:
        model = make_model(**shape).double()
        parameters = list(model.parameters())
        together = torch.autograd.grad((f(model, pack(docs)) * weight).sum(), parameters)
        alone = torch.autograd.grad((torch.cat([f(model, pack([d])) for d in docs]) * weight).sum(), parameters)
        for (name, _), a, b in zip(model.named_parameters(), together, alone):
            assert a.abs().max() > 0, name
            torch.testing.assert_close(a, b, rtol=1e-5 if f is values else 1e-9, atol=1e-6 if f is values else 1e-10, msg=name)


def test_fp32_agrees_with_fp64(make_model):
    model, docs = make_model(), documents()
    found = logprobs(model, pack(docs))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logprobs(model.double(), pack(docs)), rtol=0, atol=2e-5)


def test_logprobs_are_what_they_say(make_model):
    model, docs = make_model().double(), documents()
    p = pack(docs)
    for temperature in (1.0, 0.5):
        expected = []
        for d in docs:
            log_p = (logits_of(model, pack([d])) / temperature).log_softmax(-1)
            expected += [0.0, *log_p[torch.arange(len(d) - 1), d[1:]].tolist()]
        assert logprobs(model, p, temperature).tolist() == pytest.approx(expected, abs=1e-11)


def test_scalar_heads(make_model):
    critic, p = make_model(scalar_head=True), pack(documents())
    v, s = values(critic, p), score(critic, p)
    assert v.shape == (sum(LENGTHS),) and s.shape == (len(LENGTHS),) and v.dtype == s.dtype == torch.float32
    torch.testing.assert_close(v, model_values_by_hand(critic, p))
    assert torch.equal(s, v[torch.tensor(LENGTHS).cumsum(0) - 1])
    assert not hasattr(critic, "untied_head")


def model_values_by_hand(critic, p):
    return (critic(p) * critic.score).sum(-1)


def test_loss_at_the_start_is_that_of_a_uniform_guess():
    p = pack(documents())
    for width in (32, 512):
        fresh = GPT(config_for(2, 61, width=width, heads=4)).init_weights(0)
        nats = -logprobs(fresh, p)[p.positions > 0]
        assert nats.tolist() == pytest.approx([math.log(61)] * len(nats), abs=1e-6)
        tied = GPT(config_for(2, 61, width=width, heads=4, tied=True)).init_weights(0)
        assert -logprobs(tied, p)[p.positions > 0].mean().item() == pytest.approx(math.log(61), abs=0.2)


def test_init_depends_on_the_seed_alone():
    config = config_for(2, 61, width=32)
    torch.manual_seed(1)
    a = GPT(config).init_weights(7).state_dict()
    torch.manual_seed(2)
    b, c = GPT(config).init_weights(7).state_dict(), GPT(config).init_weights(8).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["embed"], c["embed"])


@pytest.mark.parametrize("shape", [{}, {"tied": True, "kv_heads": 1}, {"qk_norm": False, "qkv_bias": True}])
def test_gradients_by_finite_differences(make_model, shape):
    """Along a random direction in each parameter: (L(p + h d) - L(p - h d)) / 2h = <gradient, d>."""
    model, p = make_model(**shape).double(), pack(documents(lengths=[7, 3]))
    loss = lambda: -logprobs(model, p).sum()  # noqa: E731
    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    generator, h = torch.Generator().manual_seed(0), 1e-6
    with torch.no_grad():
        for (name, w), g in zip(model.named_parameters(), gradients):
            d = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            w.add_(d, alpha=h)
            above = loss()
            w.add_(d, alpha=-2 * h)
            below = loss()
            w.add_(d, alpha=h)
            assert ((above - below) / (2 * h)).item() == pytest.approx((g * d).sum().item(), rel=1e-6, abs=1e-6), name


def test_dropout_only_where_it_is_set_and_in_training(make_model):
    model, p = make_model(), pack(documents())
    model.train()
    assert torch.equal(model(p), model(p))
    model.dropout = 0.5
    assert not torch.equal(model(p), model(p))
    model.eval()
    assert torch.equal(model(p), model(p))


# ---------------------------------------------------------------------------------------------------------------------------------
# Its shape


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_give_the_same_gradients_bit_for_bit_and_are_not_kept(make_model, dropout):
    model, p, found, kept = make_model(layers=3), pack(documents()), [], []
    model.dropout = dropout

    def keep(x):
        kept[-1] += x.numel()
        return x

    for model.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = logprobs(model, p).sum()
        loss.backward()
        found.append([loss.detach(), *(q.grad for q in model.parameters())])
    assert all(map(torch.equal, *found)) and found[0][1].abs().max() > 0
    assert kept[1] < kept[0] / 4


def test_the_one_dial():
    for depth in (1, 2, 4, 8, 12, 20):
        c = config_for(depth, 4096)
        assert (c.layers, c.width, c.kv_heads) == (depth, 64 * depth, c.heads)
        assert c.heads * c.head_dim >= c.width and c.head_dim in (32, 64, 128) and 2.3 * c.width < c.ffn <= 8 / 3 * c.width
    c = config_for(4, 65, width=96, heads=3, kv_heads=1, ffn=100, context=77, tied=True)
    assert (c.width, c.heads, c.kv_heads, c.head_dim, c.ffn, c.context, c.tied) == (96, 3, 1, 32, 100, 77, True)


def test_shakespeares_model_stays_under_its_limit():
    """nanoGPT's CPU recipe has 0.80M parameters without embeddings; the benchmark against it may not have more."""
    model = GPT(config_for(4, 65, width=128))
    assert 0.7e6 < sum(p.numel() for n, p in model.named_parameters() if n not in ("embed", "untied_head")) < 0.80e6


@pytest.mark.parametrize("shape", [dict(width=64, heads=3), dict(width=60, heads=4), dict(width=64, heads=4, kv_heads=3), dict(width=64, heads=-2), dict(width=8, heads=16)])
def test_heads_that_do_not_fit_are_refused(shape):
    with pytest.raises(UserError, match="heads"):
        config_for(2, 61, **shape)


@pytest.mark.parametrize("shape", [dict(depth=0), dict(depth=-1), dict(width=-64), dict(ffn=-8), dict(context=0)])
def test_sizes_that_are_none_are_refused(shape):
    with pytest.raises(UserError, match=f"--{next(iter(shape))}"):
        config_for(**(dict(depth=2, vocab_size=61, width=32) | shape))


def test_rope_scaling_of_llama_3_against_transformers(make_model):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    how = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=512, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **how}
    )
    frequency, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    cos, sin = rotary_tables(types.SimpleNamespace(rope_theta=500.0, head_dim=64, context=512, rope_scaling=tuple(how.values())))
    angle = torch.arange(512)[:, None] * frequency
    torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-4)
    plain, _ = rotary_tables(types.SimpleNamespace(rope_theta=500.0, head_dim=64, context=512, rope_scaling=()))
    assert (plain - cos).abs().max() > 0.1


def test_flops_per_token_by_hand(make_model):
    """2 an element of each weight for the product, twice that for its two gradients; two products with each earlier token and oneself, half of them masked."""
    C, H, K, Dh, F, V, L, T = 32, 4, 2, 8, 48, 61, 2, 40
    block = C * (H + 2 * K) * Dh + H * Dh * C + 3 * C * F + 2 * C + 2 * Dh
    expected = 6 * (L * block + C + V * C) + 3 * L * H * (2 * 2 * Dh * T / 2)
    assert make_model().flops_per_token(T) == make_model(tied=True).flops_per_token(T) == expected
    assert make_model(scalar_head=True).flops_per_token(T) == expected - 6 * (V - 1) * C
    assert make_model(scalar_head=True, tied=True).flops_per_token(T) == expected - 6 * (V - 1) * C


# ---------------------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1, "qk_norm": False, "qkv_bias": True}])
def test_cached_decoding_equals_the_full_pass(make_model, shape):
    model = make_model(**shape).double()
    docs, prompts = documents(lengths=[12, 9, 20, 14]), [4, 1, 11, 5]
    with torch.no_grad():
        full = [model(pack([d])) for d in docs]
        cache, slots = KVCache(model, 4, 20), torch.tensor([2, 0, 3, 1])  # document d in slot slots[d]
        p = pack([d[:n] for d, n in zip(docs, prompts)])
        model(pack([documents(5, [15])[0]]), cache, torch.tensor([3]))  # what a slot held before must not matter
        hidden = model(p, cache, slots)
        for part, whole, n in zip(hidden.split(prompts), full, prompts):
            torch.testing.assert_close(part, whole[:n], rtol=0, atol=1e-11)
        for t in range(8):
            tokens = torch.zeros(4, dtype=torch.int64)
            for d, n, slot in zip(docs, prompts, slots):
                tokens[slot] = d[n + t]
            hidden = model.step(tokens, cache)
            for whole, n, slot in zip(full, prompts, slots):
                torch.testing.assert_close(hidden[slot], whole[n + t], rtol=0, atol=1e-11)
        assert cache.lengths[slots].tolist() == [n + 8 for n in prompts]


def test_a_slot_can_be_refilled_while_others_go_on(make_model):
    model = make_model().double()
    long, first, second = documents(lengths=[12, 9, 6])
    with torch.no_grad():
        cache = KVCache(model, 2, 16)
        model(pack([long[:5], first[:8]]), cache, torch.tensor([0, 1]))
        model.step(torch.tensor([long[5], first[8]]), cache)
        model(pack([second[:2]]), cache, torch.tensor([1]))
        for t in range(4):
            hidden = model.step(torch.tensor([long[6 + t], second[2 + t]]), cache)
            torch.testing.assert_close(hidden[0], model(pack([long]))[6 + t], rtol=0, atol=1e-11)
            torch.testing.assert_close(hidden[1], model(pack([second]))[2 + t], rtol=0, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------------------------
# Drawing


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator) * 1.5
    n = 40_000
    for how in ({}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.7}):
        p = (logits.double() / how.get("temperature", 1.0)).softmax(0)
        if "top_k" in how:
            p = torch.where(p >= p.topk(how["top_k"]).values[-1], p, 0)
        if "top_p" in how:
            ordered, order = p.sort(descending=True)
            keep = order[: int((ordered.cumsum(0) < how["top_p"]).sum()) + 1]
            p = torch.zeros_like(p).index_copy(0, keep, p[keep])
        p = p / p.sum()
        tokens, logp = draw(logits.expand(n, -1), torch.rand(n, generator=generator), **how)
        counts = torch.bincount(tokens, minlength=12).double()
        assert counts[p == 0].sum() == 0
        seen = p > 0
        chi2 = ((counts - n * p)[seen] ** 2 / (n * p)[seen]).sum().item()
        freedom = int(seen.sum()) - 1
        assert chi2 < freedom + 5 * math.sqrt(2 * freedom), (how, chi2, freedom)
        torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=0, atol=1e-5)


def test_draws_at_the_ends_of_the_uniform_interval():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf, 2.0, -torch.inf]]).expand(3, -1)
    tokens, logp = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert tokens[0] == 1 and tokens[2] == 4 and logp.isfinite().all()


def test_greedy_and_extreme_cuts():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    u = torch.rand(50, generator=torch.Generator().manual_seed(2))
    for how in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"temperature": 1e-4}):
        tokens, logp = draw(logits, u, **how)
        assert torch.equal(tokens, logits.argmax(-1)) and logp.abs().max() < 1e-6, how
    for how in ({"top_k": 20}, {"top_k": 99}, {"top_p": 1.0}):
        assert all(torch.equal(a, b) for a, b in zip(draw(logits, u, **how), draw(logits, u)))


def test_a_rollouts_logprobs_are_the_teacher_forced_ones(make_model):
    model = make_model()
    prompts = documents(lengths=[3, 1, 10, 7])
    samples = rollout(model, prompts, max_new=12, n=3, temperature=0.7, stop={5, 9}, seed=1)
    assert [s.prompt_index for s in samples] == [i for i in range(4) for _ in range(3)]
    with torch.no_grad():
        logp = logprobs(model, pack([prompts[s.prompt_index] + s.tokens for s in samples]), 0.7)
    start = 0
    for s in samples:
        n = len(prompts[s.prompt_index])
        forced = logp[start + n : start + n + len(s.tokens)]
        assert s.logprobs == pytest.approx(forced.tolist(), abs=1e-5)
        start += n + len(s.tokens)
    assert len({tuple(s.tokens) for s in samples}) == len(samples)  # samples of one prompt differ


def test_the_same_seed_gives_the_same_samples_whatever_the_slots(make_model):
    model, prompts = make_model(), documents(lengths=[3, 1, 10, 7, 2])
    how = dict(max_new=10, n=2, temperature=0.9, stop={3}, top_p=0.95)
    tokens = [[s.tokens for s in rollout(model, prompts, seed=4, slots=slots, **how)] for slots in (1, 3, 128)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert tokens[0] != [s.tokens for s in rollout(model, prompts, seed=5, **how)]


def test_stops_end_samples_and_nothing_else_finishes(make_model):
    model, prompts = make_model(noise=0.05), documents(lengths=[2, 4, 3])
    stop = set(range(0, 61, 6))
    samples = rollout(model, prompts, max_new=8, n=10, stop=stop, seed=0)
    assert {s.finished for s in samples} == {True, False}
    for s in samples:
        assert len(s.tokens) == len(s.logprobs) <= 8
        assert not stop & set(s.tokens[:-1]) and s.finished == (s.tokens[-1] in stop)
        assert s.finished or len(s.tokens) == 8
    free = rollout(model, prompts, max_new=8, n=10, seed=0)
    assert not any(s.finished for s in free) and all(f.tokens[: len(s.tokens)] == s.tokens for f, s in zip(free, samples))


def test_greedy_rollouts_take_the_likeliest_token(make_model):
    model, prompts = make_model(), documents(lengths=[2, 9])
    for s in rollout(model, prompts, max_new=6, temperature=0):
        text = prompts[s.prompt_index] + s.tokens
        with torch.no_grad():
            best = logits_of(model, pack([text])).argmax(-1).tolist()
        assert s.tokens == best[len(text) - 7 : -1]


def test_the_context_bounds_a_rollout_and_a_prompt_that_fills_it_is_refused(make_model):
    model = make_model(context=16)
    assert [len(s.tokens) for s in rollout(model, [[1] * 10, [1] * 15, [1, 2]], max_new=7)] == [6, 1, 7]
    with pytest.raises(UserError, match="context of 16"):
        rollout(model, [[1, 2], [1] * 16], max_new=7)


def test_the_stream_goes_on_past_the_context(make_model):
    model = make_model(context=16)
    prompt = documents(lengths=[5])[0]
    ids = list(stream(model, prompt, max_new=60, temperature=0))
    assert len(ids) == 60
    text = list(prompt)
    seen = len(prompt)  # how much of the text the model sees
    for token in ids:
        if seen == 16 + 1 or (seen == 16 and len(text) == len(prompt)):
            seen = 8
        with torch.no_grad():
            best = logits_of(model, pack([text[-seen:]]))[-1].topk(2)
        assert token == best.indices[0] or best.values[0] - best.values[1] < 1e-4
        text.append(token)
        seen += 1
    for n in (15, 16, 40):  # prompts about as long as the context, and longer
        assert len(list(stream(model, documents(lengths=[n])[0], max_new=20))) == 20


def test_the_stream_ends_with_a_stop_token_and_repeats_itself(make_model):
    model = make_model(noise=0.05)
    ids = list(stream(model, [1, 2], max_new=500, stop={7}, seed=3))
    assert ids[-1] == 7 and 7 not in ids[:-1] and len(ids) < 500
    assert ids == list(stream(model, [1, 2], max_new=500, stop={7}, seed=3)) != list(stream(model, [1, 2], max_new=500, stop={7}, seed=4))
