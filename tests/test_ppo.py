"""ppo.py: the algorithm by hand and against fp64 on full logits, one distribution for sampler and
trainer, real runs that learn, stop, resume and divide their work."""

import math
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import (
    SMALL,
    check_sampler,
    completions_of,
    kill,
    logged,
    meetings,
    pair,
    records,
    refused,
    results as timed_results,
    save,
    start,
    succeeds,
    train_steps,
    wait_until,
    write_rows,
)

import ppo
import rollout
import scoring
import sft
from data import chat, rows as data_rows, tokenizer
from data.pack import make_completion, pack
from model import completion_logprobs, logprobs_no_grad, state_values, values_no_grad
from optim import Optimizer
from runtime import checkpoint
from runtime.batches import index_order
from runtime.errors import UserError

TOK = tokenizer.byte_level()
END = chat.end_of_turn(TOK)
TINY = dict(
    prompts_per_step=12,
    max_new_tokens=6,
    lr=0.003,
    eval_every=2,
    eval_prompts=4,
    val_fraction=0.2,
    save_every=2,
    keep_last=9,
    device="cpu",
)
WORDS = ("yes", "no", "ja")
REWARDS = """
import os

def yes(prompt, completion, row):
    assert isinstance(prompt, str) and isinstance(row["finished"], bool)
    return float(completion == "yes")

def first(prompt, completion, row):
    return float(completion == "y")

def no(prompt, completion, row):
    return -yes(prompt, completion, row)

def some(prompt, completion, row):
    return 0.3 if row["flat"] else len(completion) + 0.1 * completion.count("e")

def same(prompt, completion, row):
    return 0.3

def length(prompt, completion, row):
    return float(len(completion) - 10 * row["finished"])

def raises(prompt, completion, row):
    return row["absent"]

def word(prompt, completion, row):
    return "good"

def huge(prompt, completion, row):
    return 1e16 * len(completion)

def beside(prompt, completion, row):
    return 1e9 + len(completion)

def small(prompt, completion, row):
    return 1e-9 * len(completion)

def tiny(prompt, completion, row):
    return 1e-7

def of_rank(prompt, completion, row):
    return float(os.environ["RANK"])
"""


def ask(text):
    return [{"role": "user", "content": text}]


def questions(n):
    return [{"prompt": f"q{i}", "flat": i % 3 == 0} for i in range(n)]


def talker(make_model, seed=0):
    """A tiny model that answers most questions with one of WORDS, and ends."""
    model = make_model(seed, **SMALL)
    chats = [
        chat.encode(TOK, [*ask(f"q{i}"), {"role": "assistant", "content": word}]) for i in range(4) for word in WORDS
    ]
    optimizer = Optimizer(model, 0.02)
    for _ in range(25):
        sft.mean_nll(model, chats, 10**6)
        optimizer.step(1.0)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that talks, prompts, reward functions and a reward model."""
    from conftest import random_model

    folder = tmp_path_factory.mktemp("ppo")
    checkpoint.save(
        folder / "sft", talker(random_model), TOK, {"stage": "sft", "step": 1, "config": {}, "data": {}, "lineage": []}
    )
    save_reward_model(random_model, folder / "rm")
    write_rows(folder / "prompts.jsonl", questions(30))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def save_reward_model(make_model, run, seed=5, tok=TOK, **info):
    model = make_model(seed, **(SMALL | {"scalar_head": True, "vocab_size": tok.n_vocab}))
    return checkpoint.save(
        run, model, tok, {"stage": "reward", "step": 1, "center": 0.25, "metrics": {"accuracy": 0.8}} | info
    )


@pytest.fixture
def flags(files):
    return TINY | {"init": files / "sft", "data": files / "prompts.jsonl", "reward": f"{files}/rewards.py:yes"}


@pytest.fixture
def train(fork, flags):
    """A function: flags -> Child that runs `ppo.py` with them on the tiny files."""

    def run(out, **more):
        return start(fork, ppo, **(flags | {"out": out} | more))

    return run


def results(run):
    """The log without how long things took."""
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in timed_results(run)]


def steps_of(run, name):
    return [r[name] for r in records(run) if "loss" in r]


def assert_same(a, b, steps, log=True):
    """Every tensor of these checkpoints, further models included, counters and log equal bit for
    bit."""
    for step in (f"step_{s:06d}" for s in steps):
        names = sorted(p.relative_to(a / step).as_posix() for p in (a / step).rglob("*.safetensors"))
        assert (
            names == sorted(p.relative_to(b / step).as_posix() for p in (b / step).rglob("*.safetensors"))
            and "train_state.safetensors" in names
        )
        for name in names:
            ours, theirs = (safetensors.torch.load_file(run / step / name) for run in (a, b))
            assert ours.keys() == theirs.keys() and not [k for k in ours if not torch.equal(ours[k], theirs[k])], (
                step,
                name,
            )
        if log:
            assert (a / step / "train_state.json").read_text() == (b / step / "train_state.json").read_text()
    if log:
        assert results(a) == results(b)


def assert_close_runs(a, b, step, names):
    """Logs and final weights equal to rounding."""
    for ours, theirs in zip(results(a), results(b), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"max_ratio"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), (key, ours["step"])
    for name in names:
        ours, theirs = (safetensors.torch.load_file(run / f"step_{step:06d}" / name) for run in (a, b))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5, msg=f"{name} {key}")


def sampled(model, n=6, temperature=1.0, max_new_tokens=6, seed=3, prompts=("q1", "q2", "a longer question")):
    """(chats, samples) of answers by the model."""
    starts, samples, _ = rollout.sample_completions(
        model, TOK, [ask(p) for p in prompts], max_new_tokens=max_new_tokens, n=n, temperature=temperature, seed=seed
    )
    return [make_completion(starts[s.prompt_index], s.tokens) for s in samples], samples


def full_logps(model, chats, temperature=1.0):
    """[M] from full logits, a conversation at a time."""
    found = []
    for c in chats:
        logp = torch.log_softmax(model(pack([c.ids])) @ model.head.T / temperature, dim=-1)
        found += [logp[i - 1, c.ids[i]] for i in np.flatnonzero(c.loss_mask)]
    return torch.stack(found)


def full_values(critic, chats, center):
    """[M]: at each learnt token, the score of all that came before it."""
    return torch.stack(
        [
            (critic(pack([c.ids]))[i - 1] * critic.score[0]).sum() - center
            for c in chats
            for i in np.flatnonzero(c.loss_mask)
        ]
    )


def moved(model, seed=9, by=0.05):
    """Another model close by."""
    from model import GPT

    other = GPT(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * by)
    return other


# --------------------------------------------------------------------------------------------------
# By hand


def configure(**flags):
    config = ppo.Config(init="", reward="x.py:y", data="", out="", **flags)
    ppo.check_flags(config)
    return config


def ragged(seed):
    random = np.random.default_rng(seed)
    lengths = [*random.integers(1, 9, 7).tolist(), 1]
    rewards, values = (torch.from_numpy(random.normal(size=sum(lengths))) for _ in range(2))
    return lengths, rewards, values


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 1.0), (0.97, 0.0), (0.0, 0.5)])
def test_gae_is_the_sum_of_all_later_td_errors(gamma, lam):
    for seed in range(3):
        lengths, rewards, values = ragged(seed)
        advantages, returns = ppo.gae(rewards, values, lengths, gamma, lam)
        begin = 0
        for n in lengths:
            r, v = rewards[begin : begin + n].tolist(), [*values[begin : begin + n].tolist(), 0.0]
            delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
            wanted = [sum((gamma * lam) ** (later - t) * delta[later] for later in range(t, n)) for t in range(n)]
            assert advantages[begin : begin + n].tolist() == pytest.approx(wanted, abs=1e-12)
            assert returns[begin : begin + n].tolist() == pytest.approx([a + b for a, b in zip(wanted, v)], abs=1e-12)
            if lam == 1:
                discounted = [sum(gamma ** (later - t) * r[later] for later in range(t, n)) for t in range(n)]
                assert returns[begin : begin + n].tolist() == pytest.approx(discounted, abs=1e-12)
            begin += n


def test_an_answers_rewards_add_up_to_its_score_less_the_price_of_its_kl():
    lengths, logp, ref_logp = ragged(1)
    scores = torch.randn(len(lengths), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = ppo.token_rewards(scores, logp, ref_logp, lengths, 0.3)
    for own, kl, score in zip(rewards.split(lengths), (logp - ref_logp).split(lengths), scores):
        assert own.sum().item() == pytest.approx((score - 0.3 * kl.sum()).item())
        assert own[:-1].tolist() == pytest.approx((-0.3 * kl[:-1]).tolist()) and own[-1].item() == pytest.approx(
            (score - 0.3 * kl[-1]).item()
        )
    likelier = ppo.token_rewards(scores, logp + 0.1, ref_logp, lengths, 0.3)
    assert (likelier < rewards).all()  # what the reference finds less likely than the policy does costs


def test_advantages_are_whitened_over_all_tokens():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 7
    white = ppo.whiten(x)
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and white.std(correction=0).item() == pytest.approx(
        1, abs=1e-6
    )
    torch.testing.assert_close(white, (x - x.mean()) / x.std(correction=0), rtol=1e-5, atol=1e-5)
    rounded = torch.tensor([0.3, 0.3, np.nextafter(np.float32(0.3), np.float32(1))])
    for equal in (torch.full((3,), 0.3), rounded, torch.zeros(3)):
        assert ppo.whiten(equal).abs().max() < 0.2  # nothing out of rounding


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e9])
def test_no_scale_of_the_rewards_is_too_small_to_be_whitened_and_explained(scale):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 2
    torch.testing.assert_close(ppo.whiten(x * scale), ppo.whiten(x), rtol=1e-5, atol=1e-5)
    zero = torch.zeros_like(x)
    assert ppo.explained_variance(zero, x * scale) == 0 == ppo.explained_variance(x * scale, zero)
    assert ppo.explained_variance(x * scale, x * scale) == 1 == ppo.explained_variance(zero, zero)
    assert ppo.explained_variance(x * scale * 0.9, x * scale) == pytest.approx(0.99, abs=1e-5)


def adapted(beta, kl, n, target, horizon):
    """Beta after n completions with this mean KL."""
    b = ppo.Beta(configure(beta=beta, adaptive_kl=target, adaptive_kl_horizon=horizon, prompts_per_step=4))
    b.update(kl, n)
    return b.value


def test_beta_is_adapted_towards_the_target():
    assert adapted(0.1, 6.0, 64, 6.0, 1000) == 0.1
    assert adapted(0.1, 6.6, 64, 6.0, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.064))
    assert adapted(0.1, 60.0, 64, 6.0, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.064))
    assert adapted(0.1, -5.0, 64, 6.0, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.064))
    assert adapted(0.1, 60.0, 64, 0.0, ppo.Config.adaptive_kl_horizon) == 0.1  # without a target it stays


def test_the_clipped_objective_and_where_it_has_no_gradient():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5] * 2, dtype=torch.float64)
    advantages = torch.tensor([2.0] * 5 + [-3.0] * 5, dtype=torch.float64)
    old = torch.full_like(ratio, -1.3)
    logp = (ratio.log() + old).requires_grad_()
    losses, found = ppo.policy_loss(logp, old, advantages, 0.2)
    assert found.tolist() == pytest.approx(ratio.tolist())
    assert losses.tolist() == pytest.approx(
        [-2 * min(r, 1.2) for r in ratio[:5].tolist()] + [3 * max(r, 0.8) for r in ratio[5:].tolist()]
    )
    (slope,) = torch.autograd.grad(losses.sum(), logp)
    inside = [
        True,
        True,
        True,
        True,
        False,
        False,
        True,
        True,
        True,
        True,
    ]  # too far in the direction that the advantage points to: no gradient
    assert slope.tolist() == pytest.approx([-a * r * i for a, r, i in zip(advantages.tolist(), ratio.tolist(), inside)])


def test_the_value_loss_is_the_larger_of_both():
    value = torch.tensor([1.0, 1.5, 1.5, 0.2, 1.1], dtype=torch.float64, requires_grad=True)
    old, returns = torch.ones(5, dtype=torch.float64), torch.tensor([3.0, 3.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    losses = ppo.value_loss(value, old, returns, 0.2)
    assert losses.tolist() == pytest.approx([0.5 * x**2 for x in (2.0, 1.8, 1.5, 0.8, 1.9)])
    (slope,) = torch.autograd.grad(losses.sum(), value)
    assert slope.tolist() == pytest.approx([-2.0, 0.0, 1.5, 0.0, -1.9])


# --------------------------------------------------------------------------------------------------
# On models


def test_a_value_is_of_the_state_in_which_the_policy_decides(make_model):
    """It and the log-probability of token t see all before t and nothing from t, or after t, on."""
    model, critic = make_model(**SMALL).double(), make_model(1, **(SMALL | {"scalar_head": True})).double()
    prompt, answer = chat.encode_prompt(TOK, ask("q1")), [*b"an answer", END]
    values = state_values(critic, [make_completion(prompt, answer)]).detach()
    logps = completion_logprobs(model, [make_completion(prompt, answer)]).detach()
    assert len(values) == len(logps) == len(answer)
    for t in range(len(answer)):
        alone = (critic(pack([prompt + answer[:t]]))[-1] * critic.score[0]).sum().item()  # of what has been said so far
        assert values[t].item() == pytest.approx(alone, abs=1e-5)
        other = [*answer[:t], (answer[t] + 1) % 250, *answer[t + 1 :]]
        changed = (state_values(critic, [make_completion(prompt, other)]) - values).abs() > 1e-6
        assert changed.tolist() == [i > t for i in range(len(answer))]
        changed = (completion_logprobs(model, [make_completion(prompt, other)]) - logps).abs() > 1e-9
        assert changed.tolist() == [i >= t for i in range(len(answer))]
    chats = [make_completion(prompt, answer), make_completion(prompt, [END]), make_completion(prompt, answer[3:])]
    torch.testing.assert_close(state_values(critic, chats), full_values(critic, chats, 0).float(), rtol=1e-5, atol=1e-5)
    for micro_batch_tokens in (1, 60):
        torch.testing.assert_close(
            values_no_grad(critic, chats, micro_batch_tokens),
            state_values(critic, chats).detach(),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_update_every_ratio_is_1_and_there_is_no_kl(make_model, temperature):
    model, critic = talker(make_model), make_model(1, **(SMALL | {"scalar_head": True}))
    chats, samples = sampled(model, temperature=temperature)
    for micro_batch_tokens in (70, 10**6):
        logp = logprobs_no_grad(model, chats, temperature, micro_batch_tokens)
        gap = check_sampler(
            model,
            chats,
            samples,
            logp,
            logprobs_no_grad(model, chats, temperature, micro_batch_tokens),
            temperature,
            micro_batch_tokens,
            repeat=True,
        )
        assert 0 <= gap < 1e-5
        zero = torch.zeros_like(logp)
        per_token = {"old_logp": logp, "values": zero, "advantages": zero + 1, "returns": zero}
        stats = ppo.add_gradients(
            model,
            critic,
            completions_of(chats, samples, **per_token),
            len(logp),
            configure(temperature=temperature, micro_batch_tokens=micro_batch_tokens),
            0.0,
        )
        assert stats["max_ratio"] == 1 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0
        assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["loss"] == pytest.approx(-1, abs=1e-6)


def test_what_is_not_one_distribution_is_refused(make_model):
    model = talker(make_model)
    chats, samples = sampled(model)
    logp = logprobs_no_grad(model, chats, 1.0, 10**6)

    def check(model, samples, logp, ref_logp, temperature=1.0):
        return check_sampler(model, chats, samples, logp, ref_logp, temperature, 10**6, repeat=True)

    assert check(model, samples, logp, logp) < 1e-5 and check(model, samples, logp, None) < 1e-5
    with pytest.raises(UserError, match="KL != 0"):
        check(model, samples, logp, logprobs_no_grad(moved(model, by=1e-3), chats, 1.0, 10**6))
    check(model, samples, logp, None)  # another reference is fine where one was asked for
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        check(model, samples, logprobs_no_grad(model, chats, 0.9, 10**6), None, 0.9)
    with pytest.raises(UserError, match="ratio != 1"):
        check(model, samples, logprobs_no_grad(model, chats, 0.9, 10**6), None, 1.0)
    one_off = []
    for i, s in enumerate(samples):
        logprobs = [x + (i == 3) * 0.01 for x in s.logprobs]
        one_off.append(rollout.Sample(s.prompt_index, s.tokens, logprobs, s.finished, s.loss_mask))
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        check(model, one_off, logp, None)
    model.dropout = 0.1
    with pytest.raises(UserError, match="dropout"):
        check(model, samples, logp, None)
    model.dropout = 0.0
    prompts = [chat.encode_prompt(TOK, ask(p)) for p in ("q1", "q2")]
    cut = rollout.rollout(model, prompts, max_new_tokens=6, n=8, top_k=3, stop={END})
    chats = [make_completion(prompts[s.prompt_index], s.tokens) for s in cut]
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        check(model, cut, logprobs_no_grad(model, chats, 1.0, 10**6), None)


@pytest.mark.parametrize("micro_batch_tokens", [1, 70, 10**6])
def test_gradients_are_those_of_full_logits_however_the_answers_are_split_and_ordered(make_model, micro_batch_tokens):
    old = talker(make_model).double()
    model, critic = moved(old, by=0.1).double(), make_model(1, **(SMALL | {"scalar_head": True})).double()
    temperature, center, clip_ratio, clip_value = 0.8, 0.25, 0.1, 0.15
    config = configure(
        temperature=temperature, clip_ratio=clip_ratio, clip_value=clip_value, micro_batch_tokens=micro_batch_tokens
    )
    chats, samples = sampled(old, n=3, temperature=temperature)
    lengths = [len(s.tokens) for s in samples]
    assert len(set(lengths)) > 1
    random = np.random.default_rng(0)
    old_logp = full_logps(old, chats, temperature).detach()

    def noise(scale):
        return torch.from_numpy(random.normal(size=len(old_logp))) * scale

    advantages, old_values = noise(1), full_values(critic, chats, center).detach() + noise(0.3)
    returns = old_values + noise(1)
    ratio = (full_logps(model, chats, temperature) - old_logp).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages).sum() / 50
    values = full_values(critic, chats, center)
    clipped_values = old_values + (values - old_values).clamp(-clip_value, clip_value)
    value_loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2).sum() / 50
    assert 0.1 < ((ratio - 1).abs() > clip_ratio).double().mean() < 0.9
    wanted = torch.autograd.grad(loss, list(model.parameters())) + torch.autograd.grad(
        value_loss, list(critic.parameters())
    )
    per_token = {"old_logp": old_logp, "values": old_values, "advantages": advantages, "returns": returns}
    completions = completions_of(chats, samples, **per_token)
    for order in (np.arange(len(chats)), random.permutation(len(chats))):
        model.zero_grad(), critic.zero_grad()
        stats = ppo.add_gradients(model, critic, [completions[i] for i in order], 50, config, center)
        for p, g in zip([*model.parameters(), *critic.parameters()], wanted):
            torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6 * g.abs().max().item() + 1e-9)
        d = ratio.detach().log()
        figures = (
            loss,
            value_loss,
            (d.exp() - 1 - d).sum() / 50,
            ((ratio - 1).abs() > clip_ratio).sum() / 50,
            ratio.sum() / 50,
        )
        figures = [float(x.detach()) for x in (*figures, ratio.max())]
        assert list(stats.values()) == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_end_of_a_turn_is_learnt_as_any_other_token(make_model, sign):
    """Where only it has an advantage, it becomes likelier, or less likely, by that."""
    model, critic = talker(make_model), make_model(1, **(SMALL | {"scalar_head": True}))
    chats, samples = sampled(model, n=8)
    chats, samples = zip(*((c, s) for c, s in zip(chats, samples) if s.finished))
    logp = logprobs_no_grad(model, list(chats), 1.0, 10**6)
    ends = torch.tensor(np.cumsum([len(s.tokens) for s in samples]) - 1)
    advantages = torch.zeros_like(logp).index_fill(0, ends, float(sign))
    zero = torch.zeros_like(logp)
    per_token = {"old_logp": logp, "values": zero, "advantages": advantages, "returns": zero}
    ppo.add_gradients(model, critic, completions_of(chats, samples, **per_token), len(logp), configure(), 0.0)
    hidden = torch.cat([model(pack([c.ids]))[-2:-1] for c in chats]).detach()
    slope = hidden @ model.untied_head.grad[END]  # of the loss, along the logit of the end where an end was written
    assert (slope * sign < 0).all()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad * 0.1)
    after = logprobs_no_grad(model, list(chats), 1.0, 10**6)
    assert ((after - logp)[ends] * sign).mean() > 0


def test_the_critic_begins_as_the_reward_model_or_as_nothing_expected(make_model, files):
    model = checkpoint.load(files / "sft")[0]
    chats, _ = sampled(model, n=2)

    def first(**flags):
        config = ppo.Config(**({"init": "", "data": "", "out": "", "reward": "a.py:b"} | flags))
        return scoring.first_critic(config, model, TOK)

    critic, center = first()
    assert center == 0 and values_no_grad(critic, chats, 10**6).abs().max() == 0
    assert all(
        torch.equal(p, dict(model.named_parameters())[name]) for name, p in critic.named_parameters() if name != "score"
    )
    rm = checkpoint.load(files / "rm")[0]
    for flags, weight in (
        ({"reward": f"a.py:b,{files}/rm*2"}, 2),
        ({"critic": f"{files}/rm"}, 1),
    ):  # as much as the reward model counts in the reward
        critic, center = first(**flags)
        ours, theirs = critic.state_dict(), rm.state_dict()
        assert (
            center == 0.25 * weight
            and torch.equal(ours.pop("score"), weight * theirs.pop("score"))
            and all(torch.equal(ours[name], p) for name, p in theirs.items())
        )


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_one_step_by_hand(train, files, make_model, tmp_path):
    """What is logged of the first update, from a rollout and scores made again here; at another
    temperature, with a penalty, a center and another reference."""
    reference = checkpoint.save(
        tmp_path / "reference", moved(checkpoint.load(files / "sft")[0]), TOK, {"stage": "sft", "step": 1}
    )
    how = dict(
        reward=f"{files}/rm*2,{files}/rewards.py:yes",
        monitor=f"{files}/rewards.py:length",
        reference=reference,
        temperature=0.8,
        max_new_tokens=3,
        beta=0.5,
        gamma=0.9,
        lam=0.8,
    )
    succeeds(train(tmp_path / "run", steps=1, epochs=1, minibatches=1, unfinished_penalty=1.5, **how))
    (log,) = [r for r in records(tmp_path / "run") if "loss" in r]
    (model, _, _), (ref, _, _), (rm, _, _) = (checkpoint.load(x) for x in (files / "sft", reference, files / "rm"))
    rows, _ = data_rows.split_off([data_rows.prompt_only(row) for row in questions(30)], 0.2, 0)
    rows = [rows[i] for i in index_order(24, 0).batch(12)]
    prompts, samples, texts = rollout.sample_completions(
        model, TOK, [m for m, _ in rows], max_new_tokens=3, temperature=0.8, seed=1
    )
    chats = [make_completion(prompts[s.prompt_index], s.tokens) for s in samples]
    logp, ref_logp = full_logps(model, chats, 0.8), full_logps(ref, chats, 0.8)
    values = 2 * full_values(rm, chats, 0.25)  # the reward model counts twice
    scored = [(rm(pack([c.ids]))[-1] * rm.score[0]).sum().item() - 0.25 for c in chats]
    scores = [2 * r + float(t == "yes") - 1.5 * (not s.finished) for r, t, s in zip(scored, texts, samples)]
    assert {s.finished for s in samples} == {True, False}
    lengths = [len(s.tokens) for s in samples]
    rewards = []
    for kl, score in zip((logp - ref_logp).split(lengths), scores):
        rewards.append(-0.5 * kl)
        rewards[-1][-1] += score
    advantages = ppo.gae(torch.cat(rewards), values, lengths, 0.9, 0.8)[0].detach()
    returns = advantages + values.detach()
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
    critic = moved(rm, by=0)
    critic.score.data *= 2
    gradients = {
        "grad_norm": torch.autograd.grad(-(whitened * logp).mean(), list(model.parameters())),
        "critic_grad_norm": torch.autograd.grad(
            0.5 * (full_values(critic, chats, 0.5) - returns).square().mean(), list(critic.parameters())
        ),
    }
    wanted = {name: torch.nn.utils.get_total_norm(some).item() for name, some in gradients.items()} | {
        "reward": np.mean(scores),
        f"{files}/rm": np.mean(scored),
        f"{files}/rewards.py:length": np.mean([len(t) - 10 * s.finished for t, s in zip(texts, samples)]),
        "kl": (logp - ref_logp).sum().item() / 12,
        "value_loss": 0.5 * advantages.square().mean().item(),
        "loss": 0,
        "approx_kl": 0,
        "ratio": 1,
        "clip_fraction": 0,
        "entropy": -logp.mean().item(),
        "updates": 1,
        "beta": 0.5,
        "finished": np.mean([s.finished for s in samples]),
        "completion_tokens": np.mean(lengths),
        "explained_variance": 1 - (advantages.var(correction=0) / returns.var(correction=0)).item(),
    }
    assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("reward, sign", [("yes", 1), ("no", -1)])
def test_what_is_rewarded_becomes_likelier_and_what_is_punished_less(train, files, tmp_path, reward, sign):
    succeeds(
        train(
            tmp_path / "run",
            reward=f"{files}/rewards.py:{reward}",
            steps=12,
            prompts_per_step=24,
            beta=0.01,
            lr=0.01,
            eval_every=0,
            save_every=0,
        )
    )
    before, after = (checkpoint.load(folder)[0] for folder in (files / "sft", tmp_path / "run"))
    said = [
        make_completion(chat.encode_prompt(TOK, ask(f"q{i}")), chat.encode_completion(TOK, "yes")) for i in range(4)
    ]
    change = [
        (completion_logprobs(after, [c]).sum() - completion_logprobs(before, [c]).sum()).item() * sign for c in said
    ]
    assert np.mean(change) > 0.3, change
    reward = steps_of(tmp_path / "run", "reward")
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.1
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), checkpoint.load(files / "sft")[0].parameters()))


def test_the_critic_learns_what_is_to_be_expected(train, files, tmp_path):
    """Of a reward that is always 0.3, from a head of zeros and a policy that stays as it is."""
    run = tmp_path / "run"
    succeeds(
        train(
            run,
            reward=f"{files}/rewards.py:same",
            unfinished_penalty=0,
            steps=10,
            lr=1e-7,
            critic_lr=0.02,
            lam=1,
            eval_every=0,
            save_every=0,
        )
    )
    loss = steps_of(run, "value_loss")
    assert loss[-1] < loss[0] / 10 and loss[0] < 0.5 * 0.3**2 + 1e-3
    chats, _ = sampled(checkpoint.load(run)[0], n=4)
    values = (
        values_no_grad(checkpoint.load(run / "latest/critic")[0], chats, 10**6)
        - checkpoint.load(run)[2]["critic_center"]
    )
    assert values.mean().item() == pytest.approx(0.3, abs=0.1)


def test_one_process_micro_batches_and_two_processes_agree(train, fork, files, flags, tmp_path):
    """With a reward model as reward and critic, another temperature, a steered beta and prompts
    that do not split evenly."""
    how = dict(
        reward=f"{files}/rm,{files}/rewards.py:yes*0.5",
        group_size=2,
        prompts_per_step=5,
        temperature=0.9,
        adaptive_kl=0.5,
        adaptive_kl_horizon=100,
        steps=4,
        eval_every=2,
        save_every=0,
        lr=0.001,
    )
    succeeds(train(tmp_path / "whole", **how))
    succeeds(train(tmp_path / "micro", micro_batch_tokens=1, **how))
    outputs = pair(fork, ppo, **(flags | how | {"out": tmp_path / "pair"}))
    assert "step 4/4" in outputs[0] and not outputs[1].strip()
    for name in ("micro", "pair"):
        for run in (tmp_path / name, tmp_path / "whole"):
            assert all(r["sampler_gap"] < 1e-5 for r in records(run) if "loss" in r)
        assert_close_runs(tmp_path / name, tmp_path / "whole", 4, ["model.safetensors", "critic/model.safetensors"])
    kl, beta = steps_of(tmp_path / "whole", "kl"), steps_of(tmp_path / "whole", "beta")
    assert (
        beta == pytest.approx([0.05, *(adapted(b, k, 10, 0.5, 100) for b, k in zip(beta, kl))][:4])
        and len(set(beta)) > 1
    )


def test_the_max_ratio_is_that_of_all_ranks(train, fork, flags, tmp_path):
    how = dict(steps=1, lr=0.01, eval_every=0, seed=1)
    succeeds(train(tmp_path / "whole", **how))
    pair(fork, ppo, **(flags | how | {"out": tmp_path / "pair"}))
    assert steps_of(tmp_path / "pair", "max_ratio") == pytest.approx(
        steps_of(tmp_path / "whole", "max_ratio"), rel=1e-4
    )


def test_the_ranks_meet_once_for_all_answers_of_a_step(fork, flags, tmp_path):
    for events in meetings(fork, ppo, **(flags | {"out": tmp_path / "pair", "steps": 3, "eval_every": 0})):
        assert events.count("bem") == events.count("b") == 3, events


def test_two_processes_may_share_a_single_held_out_prompt(fork, files, flags, tmp_path):
    outputs = pair(fork, ppo, **(flags | {"out": tmp_path / "pair", "eval_prompts": 1, "steps": 1}))
    assert "step 1/1" in outputs[0]


def test_a_killed_run_goes_on_as_if_nothing_had_been(train, make_model, files, tmp_path):
    """Critic, both optimizers, steered beta and order; even where the model it began from has been
    trained further since: that is not its reference."""
    init = tmp_path / "sft"
    shutil.copytree(files / "sft", init, symlinks=True)
    straight, killed, how = (
        tmp_path / "straight",
        tmp_path / "killed",
        dict(
            init=init,
            reward=f"{files}/rm,{files}/rewards.py:yes",
            adaptive_kl=0.1,
            adaptive_kl_horizon=50,
            steps=13,
            save_every=3,
        ),
    )
    succeeds(train(straight, **how))
    child = train(killed, **how)
    wait_until(lambda: logged(killed, 4), child)
    assert kill(child)[0] == -9
    checkpoint.save(init, make_model(9, **SMALL), TOK, {"stage": "sft", "step": 2})
    assert "continuing after step" in succeeds(train(killed, resume=True, **how))
    assert train_steps(killed) == list(range(1, 14)) and len(set(steps_of(killed, "beta"))) > 1
    assert_same(straight, killed, [3, 6, 9, 12, 13])
    assert {p.name for p in (killed / "step_000013").iterdir()} >= {"critic", "model.safetensors"} and checkpoint.load(
        killed / "step_000013/critic"
    )[0].config.scalar_head
    assert "--beta=0.2: this run was started with --beta=0.05" in refused(train(killed, resume=True, **how, beta=0.2))


def test_a_run_goes_on_only_with_the_rewards_it_began_with(train, make_model, files, tmp_path):
    shutil.copy(files / "rewards.py", tmp_path / "mine.py")
    save_reward_model(make_model, tmp_path / "rm"), save_reward_model(make_model, tmp_path / "critic", seed=6)
    reference = save(make_model, tmp_path / "reference", "sft", seed=3)
    how = dict(
        reward=f"{tmp_path}/mine.py:yes,{tmp_path}/rm",
        critic=tmp_path / "critic",
        reference=reference,
        steps=2,
        save_every=1,
    )
    succeeds(train(tmp_path / "run", **how))
    for step in ("step_000002", "latest", "best"):
        path = tmp_path / "run" / step
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    unlike = "not the data this run was started with (its SHA-256 differs)"
    for path, seed in ((tmp_path / "rm", 7), (tmp_path / "critic", 8)):
        shutil.copytree(path, tmp_path / "kept", symlinks=True)
        shutil.rmtree(path)
        save_reward_model(make_model, path, seed=seed)
        assert f"{path}: {unlike}" in refused(train(tmp_path / "run", resume=True, **how))
        shutil.rmtree(path)
        (tmp_path / "kept").rename(path)
    (tmp_path / "mine.py").write_text(REWARDS + "\n")
    assert f"{tmp_path}/mine.py: {unlike}" in refused(train(tmp_path / "run", resume=True, **how)).replace(
        ".py:yes:", ".py:"
    )
    (tmp_path / "mine.py").write_text(REWARDS)
    succeeds(train(tmp_path / "run", resume=True, **how))


def test_too_far_a_step_is_left_out_and_moves_nothing(train, files, tmp_path):
    """A run whose second epoch is always too far is the run of one epoch, bit for bit: weights,
    critic, optimizers."""
    how = dict(minibatches=1, lr=0.01, steps=3, eval_every=0)
    succeeds(train(tmp_path / "short", epochs=1, stop_kl=0, **how))
    succeeds(train(tmp_path / "cut", epochs=3, stop_kl=1e-5, **how))
    assert steps_of(tmp_path / "cut", "updates") == [1, 1, 1]
    assert_same(tmp_path / "short", tmp_path / "cut", [3], log=False)
    succeeds(train(tmp_path / "long", epochs=3, stop_kl=0, **how))
    assert steps_of(tmp_path / "long", "updates") == [3, 3, 3] and max(steps_of(tmp_path / "long", "approx_kl")) > 1e-5


def test_a_poor_reward_model_is_refused(train, make_model, files, tmp_path):
    poor, unknown = (
        save_reward_model(make_model, tmp_path / "poor", metrics={"accuracy": 0.5}),
        save_reward_model(make_model, tmp_path / "unknown", metrics={}),
    )
    assert f"--reward={poor}: it ordered 50.0% of its held-out pairs right, less than --min_accuracy=0.55" in refused(
        train(tmp_path / "run", reward=f"{poor}*0.5")
    )
    succeeds(train(tmp_path / "run", reward=poor, min_accuracy=0.5, steps=1))
    assert f"{unknown}: its accuracy is not recorded" in succeeds(train(tmp_path / "other", reward=unknown, steps=1))


def test_answers_that_grow_or_no_longer_end_are_reported_once(train, files, tmp_path):
    how = dict(
        reward=f"{files}/rewards.py:length",
        unfinished_penalty=0,
        steps=20,
        save_every=19,
        prompts_per_step=24,
        beta=0,
        lr=0.02,
        max_new_tokens=10,
        stop_kl=0,
        eval_every=0,
    )
    output = succeeds(train(tmp_path / "run", **how))
    assert output.count("of the completions end, after") == 1
    shutil.rmtree(tmp_path / "run/step_000020")
    assert "completions end, after" not in succeeds(train(tmp_path / "run", resume=True, **how))  # it has been said
    assert "completions end, after" not in succeeds(train(tmp_path / "calm", steps=2, lr=1e-5))


@pytest.mark.parametrize(
    "reward, penalty, said",
    [
        ("same", 1.0, "3 times in a row the reward of every completion was 0.3,"),
        ("same", 0.0, "3 times in a row the reward of every completion was 0.3,"),
        ("tiny", 1.0, "3 times in a row the reward of every completion was 1e-07,"),
        ("beside", 1.0, "differed by little (now 1e+09 in size, "),
        ("small", 0.0, "the policy hardly follows the reward"),
        ("yes", 1.0, ""),
    ],
)
def test_a_reward_that_ppo_can_hardly_learn_from_is_said_once(train, files, tmp_path, reward, penalty, said):
    """Judged without our own penalty, of which 1e9 beside 1 is no fault."""
    reference = checkpoint.save(
        tmp_path / "reference", moved(checkpoint.load(files / "sft")[0]), TOK, {"stage": "sft", "step": 1}
    )  # so that there is a KL from the first step on
    how = dict(reward=f"{files}/rewards.py:{reward}", unfinished_penalty=penalty, reference=reference)
    output = succeeds(train(tmp_path / "run", steps=3, max_new_tokens=3, **how))
    assert said in output
    assert len(re.findall("warning: .*the (reward of every completion|rewards of a step)", output)) == bool(said)


def test_rewards_are_judged_on_all_ranks(fork, files, flags, tmp_path):
    """On each they are equal, and one of them differs from the other's."""
    how = {"reward": f"{files}/rewards.py:of_rank", "unfinished_penalty": 0, "steps": 2, "eval_every": 0}
    outputs = pair(fork, ppo, **(flags | how | {"out": tmp_path / "pair"}))
    assert "warning: " in outputs[0] and "every completion" not in outputs[0]


def test_rewards_that_are_nothing_beside_the_critics_values_are_said_once(train, files, tmp_path):
    """Without a KL the advantages are the critic's noise then; its first values are all 0."""
    how = dict(reward=f"{files}/rewards.py:small", beta=0, unfinished_penalty=0, steps=12, eval_every=0)
    output = succeeds(train(tmp_path / "run", **how))
    assert len(re.findall("now .*e-0[89]; --beta times the KL by 0, the critic's values by", output)) == 1


def test_a_reward_model_in_a_directory_called_as_a_column_replaces_none(train, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files / "rm", "reward")
    succeeds(train(tmp_path / "run", reward=f"reward,{files}/rewards.py:length", steps=1))
    (log,) = [r for r in records(tmp_path / "run") if "loss" in r]
    parts = log["./reward"] + log[f"{files}/rewards.py:length"]
    assert log["reward"] == pytest.approx(parts - (1 - log["finished"]), abs=1e-5)


@pytest.mark.parametrize("critic", ["", "rm"])
@pytest.mark.parametrize("reward", ["{0}/rm", "{0}/rewards.py:yes", "{0}/rm*0.5,{0}/rewards.py:yes*2"])
def test_with_and_without_a_reward_model_and_a_critic(train, files, tmp_path, reward, critic):
    names = reward.format(files)
    output = succeeds(
        train(
            tmp_path / "run",
            reward=names,
            critic=critic and files / critic,
            monitor=f"{files}/rewards.py:length",
            steps=2,
        )
    )
    model, _, info = checkpoint.load(tmp_path / "run")
    assert (
        info["stage"] == "ppo"
        and [x["stage"] for x in info["lineage"]] == ["sft"]
        and info["critic_center"]
        == (0.25 if critic else 0.25 * ("{0}/rm" in reward) * (0.5 if "rm*0.5" in reward else 1))
    )
    last = [r for r in records(tmp_path / "run") if "loss" in r][-1]
    assert math.isfinite(last["loss"]) and f"{files}/rewards.py:length" in last and "validation val_loss" in output
    parts = [(name.partition("*")[0], float(name.partition("*")[2] or 1)) for name in names.split(",")]
    unfinished = 1 - last["finished"]
    assert last["reward"] == pytest.approx(sum(w * last[name] for name, w in parts) - unfinished, abs=1e-5)
    (entry,) = (tmp_path / "run/samples.txt").read_text().split("=== step ")[1:]
    assert "--- completion:" in entry


def test_a_prompt_that_leaves_no_room_is_counted_and_left_out(train, tmp_path):
    rows = write_rows(tmp_path / "long.jsonl", [*questions(9), {"prompt": "x" * 90, "flat": False}])
    validation = {"val": write_rows(tmp_path / "val.jsonl", questions(4)), "val_fraction": 0.05}
    output = succeeds(train(tmp_path / "run", data=rows, **validation, steps=1))
    left_out = "1 of 10 prompts left out, which leave less than --max_new_tokens=6 of the context's 96 tokens"
    assert f"{rows}: {left_out}" in output
    only = write_rows(tmp_path / "only.jsonl", [{"prompt": x * 90} for x in "xy"])
    assert "no prompt leaves room for a completion of --max_new_tokens=6 tokens" in refused(
        train(tmp_path / "none", data=only)
    )


def test_bad_input_is_one_clear_line_and_costs_nothing(train, make_model, files, tmp_path):
    run = tmp_path / "old"
    succeeds(train(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    strange = tokenizer.train(["the old map " * 5], 256 + 4 + 3)
    other, other_rm = (
        save(make_model, tmp_path / "other", "sft", tok=strange),
        save_reward_model(make_model, tmp_path / "other_rm", tok=strange),
    )
    mine = f"{files}/rewards.py"
    for flags, named in [
        ({"init": files / "rm"}, "writes nothing; start from"),
        ({"init": files / "prompts.jsonl"}, "prompts.jsonl: no checkpoint here, but a file"),
        ({"reference": other}, "--reference=" + f"{other}: it has another tokenizer"),
        ({"critic": other_rm}, f"--critic={other_rm}: it has another tokenizer"),
        ({"critic": files / "sft"}, "not a reward model (it has no scalar head)"),
        ({"reward": files / "sft"}, "not a reward model (it has no scalar head)"),
        ({"reward": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"reward": f"{mine}:yes*much"}, "'much' is not a number"),
        ({"reward": f"{mine}:absent"}, "rewards.py has no function absent"),
        ({"reward": f"{tmp_path}/absent.py:f"}, "absent.py does not exist"),
        ({"reward": f"judge:{files}/sft"}, "a judge needs principles"),
        ({"reward": ""}, "--reward: name what to maximise"),
        ({"max_new_tokens": 96}, "--max_new_tokens=96: the model's context is 96 tokens"),
        ({"batch": 9}, "--batch: is called --prompts_per_step now"),
        ({"prompts_per_step": 1, "minibatches": 2}, "--minibatches=2: more than the 1 completions of a step"),
        ({"group_size": 0}, "--minibatches=2"),
        ({"beta": -1}, "--beta=-1.0"),
        ({"temperature": 0}, "--temperature=0.0"),
        ({"gamma": 1.1}, "--gamma=1.1"),
        ({"lam": -0.1}, "--lam=-0.1"),
        ({"epochs": 0}, "--epochs=0"),
        ({"clip_ratio": 0}, "--clip_ratio=0.0"),
        ({"reward_timeout": 0}, "--reward_timeout=0.0"),
    ]:
        line = refused(train(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags


def test_a_critic_or_reference_that_reaches_less_far_than_the_policy_is_refused(train, make_model, files, tmp_path):
    critic, reference = (
        save(make_model, tmp_path / "critic", "reward", scalar_head=True, context=20),
        save(make_model, tmp_path / "reference", "sft", context=20),
    )
    for flags in ({"reward": critic}, {"critic": critic}, {"reference": reference}):
        assert "context" in refused(train(tmp_path / "run", overwrite=True, steps=1, **flags))


@pytest.mark.parametrize(
    "name, named",
    [("raises", "KeyError: 'absent' ("), ("word", "returned 'good' of the type str; a number was expected")],
)
def test_a_reward_function_that_fails_is_named_with_the_answer_it_failed_on(train, files, tmp_path, name, named):
    line = refused(train(tmp_path / "run", reward=f"{files}/rewards.py:{name}", steps=1))
    assert f"--reward={files}/rewards.py:{name}: {named}" in line and "completion" in line


def test_rewards_that_fp32_does_not_hold_are_said(train, files, tmp_path):
    line = refused(train(tmp_path / "huge", reward=f"{files}/rewards.py:huge", steps=1))
    assert "at most 1e+15 in size: more cannot be learned from" in line
    output = succeeds(train(tmp_path / "beside", reward=f"{files}/rewards.py:beside", steps=2))
    assert (
        output.count("differed by little (now 1e+09 in size, ") == 1 and "subtract a constant in the reward" in output
    )


def test_beta_is_adapted_only_where_it_can_be():
    for flags in ({"beta": 0.0}, {"adaptive_kl_horizon": 19.0}):
        with pytest.raises(UserError, match="--adaptive_kl"):
            ppo.check_flags(ppo.Config(init="", reward="r", data="", out="", adaptive_kl=6.0, **flags))
    ppo.check_flags(ppo.Config(init="", reward="r", data="", out="", adaptive_kl=6.0))
    with pytest.raises(UserError, match="--adaptive_kl_horizon=50: only --adaptive_kl reads it"):
        ppo.check_flags(ppo.Config(init="", reward="r", data="", out="", adaptive_kl_horizon=50))
