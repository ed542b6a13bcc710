"""The model over packs and its cache.

Models are tiny, with all weights random, in fp64 if an identity must hold exactly.
"""

import math
import types

import numpy as np
import pytest
import torch

from data.pack import Chat, make_completion, pack
from model import (
    GPT,
    KVCache,
    completion_logprob_sums,
    completion_logprobs,
    config_for,
    hidden_before_targets,
    logprobs,
    logprobs_no_grad,
    parameter_table,
    rotary_tables,
    score,
    values,
)
from runtime.errors import UserError

LENGTHS = [5, 1, 17, 2, 30, 9]
WINDOWED = {"layers": 3, "window": 4, "window_every": 2}  # the first layer and the third


def documents(seed=0, lengths=LENGTHS, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


# --------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("shape, reach", [({"window": 3}, 4), ({"window": 3, "window_every": 2}, 10)])
def test_a_token_sees_a_window_in_each_windowed_layer(make_model, shape, reach):
    """Two layers of 3 tokens reach 4 tokens back; a layer without a window reaches everything."""
    model, (doc,) = make_model(**shape).double(), documents(lengths=[11])
    before = model(pack([doc]))
    for t in range(11):
        changed = [*doc[:t], (doc[t] + 1) % 61, *doc[t + 1 :]]
        difference = (model(pack([changed])) - before).abs().amax(-1)
        assert difference[t : t + reach + 1].min() > 1e-6
        assert difference[:t].sum() + difference[t + reach + 1 :].sum() < 1e-11


def test_windows_are_in_every_nth_layer():
    windows = [config_for(5, 61, width=32, window=7, window_every=every).windows for every in (1, 2, 3, 9)]
    assert windows == [[7] * 5, [7, 0, 7, 0, 7], [7, 0, 0, 7, 0], [7, 0, 0, 0, 0]]
    assert config_for(2, 61, width=32, window_every=3).windows == [0, 0]
    assert config_for(2, 61, width=32, window_every=3) == config_for(2, 61, width=32)


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
        atol = 1e-6 if together.dtype == torch.float32 else 1e-11
        torch.testing.assert_close(together, alone, rtol=0, atol=atol)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = logprobs(model, pack([docs[i] for i in order])).split([LENGTHS[i] for i in order])
    for i, part in zip(order, shuffled, strict=True):
        torch.testing.assert_close(part, logprobs(model, singles[i]), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "shape, function",
    [
        ({}, logprobs),
        (WINDOWED, logprobs),
        ({"tied": True, "qk_norm": False}, logprobs),
        ({"scalar_head": True, "qkv_bias": True}, values),
    ],
)
def test_packed_gradients_equal_alone(make_model, shape, function):
    model, docs = make_model(**shape).double(), documents(1)
    weight = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = list(model.parameters())
    together = torch.autograd.grad((function(model, pack(docs)) * weight).sum(), parameters)
    singles = torch.cat([function(model, pack([d])) for d in docs])
    alone = torch.autograd.grad((singles * weight).sum(), parameters)
    rtol, atol = (1e-5, 1e-6) if function is values else (1e-9, 1e-10)  # values are rounded to fp32
    for (name, _), a, b in zip(model.named_parameters(), together, alone, strict=True):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=name)


def test_fp32_agrees_with_fp64(make_model):
    model, docs = make_model(), documents()
    found = logprobs(model, pack(docs))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logprobs(model.double(), pack(docs)), rtol=0, atol=2e-5)


def test_logprobs_are_what_they_say(make_model):
    model, docs = make_model().double(), documents()
    for temperature in (1.0, 0.5):
        expected = []
        for d in docs:
            log_p = (model(pack([d])) @ model.head.T / temperature).log_softmax(-1)
            expected += [0.0, *log_p[torch.arange(len(d) - 1), d[1:]].tolist()]
        assert logprobs(model, pack(docs), temperature).tolist() == pytest.approx(expected, abs=1e-11)


def test_log_probabilities_of_completions_are_those_of_the_whole_pack(make_model):
    model = make_model()
    chats = [make_completion(*documents(i, [3 + i, 4 - i])) for i in range(3)]
    chats.append(make_completion([1, 2], [3, 4, 5, 6], [True, False, True, True]))
    chats.append(make_completion([5], [6], [False]))  # nothing of it is trained
    p, mask = pack([c.ids for c in chats]), torch.from_numpy(np.concatenate([c.loss_mask for c in chats]))
    expected = logprobs(model, p, 0.7)[mask]
    found = completion_logprobs(model, chats, 0.7)
    assert len(found) == mask.sum() and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    parts = logprobs(model, p)[mask].split([int(c.loss_mask.sum()) for c in chats])
    sums = torch.stack([part.sum() for part in parts])
    torch.testing.assert_close(completion_logprob_sums(model, chats), sums, rtol=0, atol=1e-5)
    for tokens in (1, 9, 10**6):
        torch.testing.assert_close(logprobs_no_grad(model, chats, 0.7, tokens), expected.detach(), rtol=0, atol=1e-6)
    assert len(logprobs_no_grad(model, [], 1.0, 10)) == 0  # a rank's share may be empty
    assert not logprobs_no_grad(model, chats, 1.0, 10).requires_grad


def test_the_hidden_state_before_a_token_predicts_it(make_model):
    model = make_model()
    chat = Chat(np.array([7, 8, 9, 3], dtype=np.int32), np.array([False, False, True, True]))
    hidden, targets = hidden_before_targets(model, [chat])
    assert targets.tolist() == [9, 3]
    torch.testing.assert_close(hidden, model(pack([[7, 8, 9, 3]]))[1:3])


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1, **WINDOWED}])
def test_completions_of_one_prompt_are_what_each_is_alone(make_model, shape, checkpoint_activations):
    model = make_model(**shape).double()
    long, short, *completions = documents()
    prompts = long, short, long, long, short
    chats = [make_completion(prompt, ids) for prompt, ids in zip(prompts, [*completions, [3]])]
    together = completion_logprobs(model, chats, 0.7)
    weight = torch.rand(len(together), generator=torch.Generator().manual_seed(1))
    model.checkpoint_activations = checkpoint_activations
    grads = torch.autograd.grad((completion_logprobs(model, chats, 0.7) * weight).sum(), list(model.parameters()))
    alone = torch.cat([completion_logprobs(model, [chat], 0.7) for chat in chats])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    expected = torch.autograd.grad((alone * weight).sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


def test_scalar_heads(make_model):
    critic, p = make_model(scalar_head=True), pack(documents())
    v, s = values(critic, p), score(critic, p)
    assert v.shape == (sum(LENGTHS),) and s.shape == (len(LENGTHS),) and v.dtype == s.dtype == torch.float32
    torch.testing.assert_close(v, (critic(p) * critic.score).sum(-1))
    assert torch.equal(s, v[torch.tensor(LENGTHS).cumsum(0) - 1])
    assert not hasattr(critic, "untied_head")


def test_loss_at_the_start_is_that_of_a_uniform_guess():
    p = pack(documents())
    for width in (32, 512):
        fresh = GPT(config_for(2, 61, width=width, heads=4)).init_weights(0)
        nll = -logprobs(fresh, p)[p.positions > 0]
        assert nll.tolist() == pytest.approx([math.log(61)] * len(nll), abs=1e-6)
        tied = GPT(config_for(2, 61, width=width, heads=4, tied=True)).init_weights(0)
        assert -logprobs(tied, p)[p.positions > 0].mean().item() == pytest.approx(math.log(61), abs=0.2)


def test_init_depends_on_the_seed_alone():
    config = config_for(2, 61, width=32)
    torch.manual_seed(1)
    a = GPT(config).init_weights(7).state_dict()
    torch.manual_seed(2)
    b, c = GPT(config).init_weights(7).state_dict(), GPT(config).init_weights(8).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["embed"], c["embed"])


@pytest.mark.parametrize("shape", [WINDOWED, {"tied": True, "kv_heads": 1}, {"qk_norm": False, "qkv_bias": True}])
def test_gradients_by_finite_differences(make_model, shape):
    """Along a random direction d in each parameter:

    (L(p + h d) - L(p - h d)) / 2h = <gradient, d>
    """
    model, p = make_model(**shape).double(), pack(documents(lengths=[7, 3]))

    def loss():
        return -logprobs(model, p).sum()

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    generator, h = torch.Generator().manual_seed(0), 1e-6
    with torch.no_grad():
        for (name, w), g in zip(model.named_parameters(), gradients, strict=True):
            d = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            w.add_(d, alpha=h)
            above = loss()
            w.add_(d, alpha=-2 * h)
            below = loss()
            w.add_(d, alpha=h)
            slope = ((above - below) / (2 * h)).item()
            assert slope == pytest.approx((g * d).sum().item(), rel=1e-6, abs=1e-6), name


def test_dropout_only_if_it_is_set_and_in_training(make_model):
    model, p = make_model(), pack(documents())
    model.train()
    assert torch.equal(model(p), model(p))
    model.dropout = 0.5
    assert not torch.equal(model(p), model(p))
    model.eval()
    assert torch.equal(model(p), model(p))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [{"layers": 3}, WINDOWED])
def test_checkpointed_activations_give_the_same_gradients_and_are_not_kept(make_model, dropout, shape):
    """Bit for bit, also if layers differ: the backward must compute each block again as it was."""
    model, p, found, kept = make_model(**shape), pack(documents()), [], []
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


# --------------------------------------------------------------------------------------------------
# Its shape


def test_the_one_dial():
    for depth in (1, 2, 4, 8, 12, 20):
        c = config_for(depth, 4096)
        assert (c.layers, c.width, c.kv_heads) == (depth, 64 * depth, c.heads)
        assert c.heads * c.head_dim >= c.width and c.head_dim in (32, 64, 128)
        assert 2.3 * c.width < c.ffn <= 8 / 3 * c.width
    c = config_for(4, 65, width=96, heads=3, kv_heads=1, ffn=100, context=77, tied=True)
    assert (c.width, c.heads, c.kv_heads, c.head_dim, c.ffn, c.context, c.tied) == (96, 3, 1, 32, 100, 77, True)
    assert config_for(1, 61, width=1).ffn == 16  # the least that a matrix unit takes, not none


def test_shakespeares_model_stays_under_its_limit():
    """nanoGPT's CPU recipe has 0.80M parameters without embeddings; the benchmark against it may
    not have more."""
    model = GPT(config_for(4, 65, width=128))
    assert 0.7e6 < sum(p.numel() for n, p in model.named_parameters() if n not in ("embed", "untied_head")) < 0.80e6


@pytest.mark.parametrize(
    "shape",
    [
        {"width": 64, "heads": 3},
        {"width": 60, "heads": 4},
        {"width": 64, "heads": 4, "kv_heads": 3},
        {"width": 64, "heads": -2},
        {"width": 8, "heads": 16},
    ],
)
def test_heads_that_do_not_fit_are_refused(shape):
    with pytest.raises(UserError, match="heads"):
        config_for(2, 61, **shape)


@pytest.mark.parametrize(
    "shape", [{}, {"kv_heads": 1}, {"tied": True, "qkv_bias": True}, {"scalar_head": True}, WINDOWED]
)
def test_every_parameter_has_its_row_in_the_table(make_model, shape):
    model = make_model(**shape)
    table, named = parameter_table(model.config), dict(model.named_parameters())
    assert table.keys() == named.keys()
    for name, row in table.items():
        assert sum(row.rows) == len(named[name]) and len(row.rows) == len(row.hf_names), name
        assert row.muon == (name.startswith("blocks.") and named[name].dim() == 2), name
    assert len({hf_name for row in table.values() for hf_name in row.hf_names}) == sum(
        len(r.rows) for r in table.values()
    )
    assert parameter_table(make_model(kv_heads=1).config)["blocks.1.attn.qkv"].rows == [32, 8, 8]


def test_rope_scaling_of_llama_3_against_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    llama = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **scaling},
    )
    frequency, _ = ROPE_INIT_FUNCTIONS["llama3"](llama, "cpu")
    config = types.SimpleNamespace(rope_theta=500.0, head_dim=64, context=512, rope_scaling=tuple(scaling.values()))
    cos, sin = rotary_tables(config)
    angle = torch.arange(512)[:, None] * frequency
    torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-4)
    config.rope_scaling = ()
    assert (rotary_tables(config)[0] - cos).abs().max() > 0.1


def test_flops_per_token_by_hand(make_model):
    """2 per element of each weight for the product, twice that for its two gradients; two products
    with each earlier token and oneself, half of them masked."""
    C, H, K, Dh, F, V, L, T = 32, 4, 2, 8, 48, 61, 2, 40
    block = C * (H + 2 * K) * Dh + H * Dh * C + 3 * C * F + 2 * C + 2 * Dh
    expected = 6 * (L * block + C + V * C) + 3 * L * H * (2 * 2 * Dh * T / 2)
    assert make_model().flops_per_token(T) == make_model(tied=True).flops_per_token(T) == expected
    assert make_model(scalar_head=True).flops_per_token(T) == expected - 6 * (V - 1) * C
    assert make_model(scalar_head=True, tied=True).flops_per_token(T) == expected - 6 * (V - 1) * C


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize(
    "shape",
    [{}, {"kv_heads": 1, "qk_norm": False, "qkv_bias": True}, WINDOWED, {"window": 1}],
    ids=["qwen3", "qwen2", "windows", "window 1"],
)
def test_cached_decoding_equals_the_full_pass(make_model, shape):
    model = make_model(**shape).double()
    docs, prompts = documents(lengths=[12, 9, 20, 14]), [4, 1, 11, 5]
    with torch.no_grad():
        full = [model(pack([d])) for d in docs]
        cache, slots = KVCache(model, 4, 20), torch.tensor([2, 0, 3, 1])  # document d in slot slots[d]
        # what a slot held before must not matter
        model(pack([documents(5, [15])[0]]), cache, torch.tensor([3]))
        hidden = model(pack([d[:n] for d, n in zip(docs, prompts, strict=True)]), cache, slots)
        for part, whole, n in zip(hidden.split(prompts), full, prompts, strict=True):
            torch.testing.assert_close(part, whole[:n], rtol=0, atol=1e-11)
        for t in range(8):
            tokens = torch.zeros(4, dtype=torch.int64)
            for d, n, slot in zip(docs, prompts, slots, strict=True):
                tokens[slot] = d[n + t]
            hidden = model.step(tokens, cache)
            for whole, n, slot in zip(full, prompts, slots, strict=True):
                torch.testing.assert_close(hidden[slot], whole[n + t], rtol=0, atol=1e-11)
        assert cache.lengths[slots].tolist() == [n + 8 for n in prompts]


def test_a_slot_can_be_refilled_while_others_continue(make_model):
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
