"""grpo.py: advantages, weights and the KL estimators by exact enumeration, gradients against fp64
on full logits, and real runs in which every guard rail is tripped."""

import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import test_ppo
import torch
from runs import (
    SMALL,
    completions_of,
    kill,
    logged,
    meetings,
    pair,
    records,
    refused,
    save,
    start,
    succeeds,
    train_steps,
    wait_until,
    write_rows,
)
from test_ppo import (
    REWARDS,
    TOK,
    ask,
    assert_close_runs,
    assert_same,
    full_logps,
    moved,
    questions,
    sampled,
    save_reward_model,
    steps_of,
)

import grpo
import ppo
import scoring
from data import chat, rows as data_rows, tokenizer
from data.judge import judge_prompt
from data.pack import make_completion, pack
from model import completion_logprobs, logprobs_no_grad
from optim import Optimizer
from rollout import Sample, get_per_token, rollout
from runtime import checkpoint
from runtime.batches import index_order, minibatches
from runtime.cli import check_ranges
from runtime.errors import UserError

files = test_ppo.files
KINDS = ("grpo", "dr_grpo", "rloo")
TINY = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6, "lr": 0.003, "steps": 3, "eval_every": 0}
TINY |= {"eval_prompts": 4, "val_fraction": 0.2, "save_every": 0, "keep_last": 9, "device": "cpu"}


@pytest.fixture
def flags(files):
    return TINY | {"init": files / "sft", "data": files / "prompts.jsonl", "reward": f"{files}/rewards.py:some"}


@pytest.fixture
def train(fork, flags):
    """A function: flags -> Child that runs `grpo.py` with them on the tiny files."""

    def run(out, **more):
        return start(fork, grpo, **(flags | {"out": out} | more))

    return run


def configure(**flags):
    config = grpo.Config(init="", data="", reward="x.py:y", out="", **flags)
    grpo.apply_recipe(config)
    grpo.check_flags(config)
    check_ranges(config)
    return config


def weights(run):
    """{name: tensor} of the newest checkpoint of a run."""
    return safetensors.torch.load_file(checkpoint.find(run) / "model.safetensors")


def assert_nothing_moved(init, run):
    before, after = weights(init), weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


# --------------------------------------------------------------------------------------------------
# Advantages, weights, penalties by hand


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_equal_rewards_has_no_advantages_at_all(kind):
    for value, G in ((0.3, 6), (0.1, 3), (1 / 3, 7), (1e6 + 0.1, 5), (0.0, 4), (-0.7, 64)):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.full((2, G), value, dtype=dtype)
            assert (grpo.group_advantages(rewards, kind) == 0).all() and not grpo.differs(rewards).any()
    mixed = torch.tensor([[0.3] * 6, [0.3] * 5 + [0.4]])
    equal, different = grpo.group_advantages(mixed, kind)
    assert (equal == 0).all() and (different != 0).all() and grpo.differs(mixed).tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_of_each_group_alone(kind):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 6, generator=generator, dtype=torch.float64) + torch.arange(5)[:, None] * 10
    found = grpo.group_advantages(rewards, kind)
    for row, group in zip(found, rewards.tolist(), strict=True):
        mean = sum(group) / 6
        std = (sum((r - mean) ** 2 for r in group) / 5) ** 0.5
        expected = {
            "grpo": [(r - mean) / std for r in group],
            "dr_grpo": [r - mean for r in group],
            "rloo": [r - (sum(group) - r) / 5 for r in group],
        }
        assert row.tolist() == pytest.approx(expected[kind], abs=1e-9)
        alone = grpo.group_advantages(torch.tensor([group], dtype=torch.float64), kind)[0]
        assert row.tolist() == pytest.approx(alone.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    "scale, offset", [(1e-7, 0.0), (1.0, 1e9), (1e-7, 0.5), (1e29, 0.0), (1e-30, 0.0), (1e-200, 0.0), (3.0, -4)]
)
def test_advantages_depend_neither_on_scale_nor_on_offset(scale, offset):
    """Whether rewards differ is judged by their own size: 1e-7 apart, or beside 1e9, they still
    do."""
    rewards = torch.tensor([[0.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 1.0]], dtype=torch.float64)
    assert grpo.differs(rewards * scale + offset).tolist() == [True, False, True]
    expected = grpo.group_advantages(rewards, "grpo")
    found = grpo.group_advantages(rewards * scale + offset, "grpo")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for kind in ("dr_grpo", "rloo"):
        found = grpo.group_advantages(rewards * scale + offset, kind) / scale
        torch.testing.assert_close(found, grpo.group_advantages(rewards, kind), rtol=1e-5, atol=1e-6)


def group(*completions):
    """[Completion] of one prompt, of (text, score, finished)."""
    found = completions_of([make_completion([1], [2, 3]) for _ in completions], [None] * len(completions))
    for c, (c.text, c.score, finished) in zip(found, completions, strict=True):
        c.sample = Sample(0, [2, 3], [0.0, 0.0], finished)
    return found


def test_the_same_text_is_worth_the_same_however_a_reward_model_rounds():
    rounded = [("yes", 0.3, True), ("yes", 0.3 + 1e-8, True), ("yes", 0.3 - 1e-8, True), ("yes", 0.3, True)]
    trained, groups = grpo.find_advantages(group(*rounded), configure(group_size=4))
    assert not trained and groups["zero_variance"] == [True] * 4
    other = [*rounded[:3], ("no", 0.3 + 1e-8, True)]
    trained, groups = grpo.find_advantages(group(*other), configure(group_size=4))
    assert len(trained) == 4 and groups["zero_variance"] == [False] * 4


def test_the_shares_of_groups_say_why_they_teach_nothing():
    four = [
        [("a", 1.0, True), ("b", 1.0, True)],  # all right
        [("a", 0.0, True), ("b", 0.0, False)],  # all wrong
        [("a", 0.0, False), ("b", 1.0, False)],  # all cut, and different
        [("a", -1.0, False), ("b", -1.0, False)],  # all wrong and all cut
    ]
    completions = [c for completions in four for c in group(*completions)]
    for i, c in enumerate(completions):
        c.index = i
    trained, groups = grpo.find_advantages(completions, configure(group_size=2))
    found = {name: [*map(float, values[::2])] for name, values in groups.items()}
    assert all(values[::2] == values[1::2] for values in groups.values())
    assert found["zero_variance"] == [1, 1, 0, 1] and found["all_cut"] == [0, 0, 1, 1]
    assert found["all_right"] == [1, 0, 0, 0] and found["all_wrong"] == [0, 1, 0, 1]
    assert found["pass_at_1"] == [1, 0, 0.5, 0] and found["pass_at_k"] == [1, 0, 1, 0]
    assert [c.index for c in trained] == [4, 5]


def test_the_weight_of_a_token():
    lengths = [3, 1, 6]
    assert grpo.token_weights(lengths, "token", 20, 5, 8).tolist() == pytest.approx([1 / 20] * 10)
    expected = [1 / 15] * 3 + [1 / 5] + [1 / 30] * 6
    assert grpo.token_weights(lengths, "sequence", 20, 5, 8).tolist() == pytest.approx(expected)
    assert grpo.token_weights(lengths, "constant", 20, 5, 8).tolist() == pytest.approx([1 / 40] * 10)
    for kind, total in (("token", 1), ("sequence", 1), ("constant", 10 / 24)):
        assert grpo.token_weights(lengths, kind, 10, 3, 8).sum().item() == pytest.approx(total)


def test_the_penalty_of_length_falls_over_the_last_share():
    samples = [Sample(0, [5] * n, [], True) for n in (1, 50, 79, 80, 85, 90, 99, 100)]
    found = grpo.overlong_penalty(samples, configure(overlong="punish", max_new_tokens=100, overlong_share=0.2))
    assert found == pytest.approx([0, 0, 0, 0, -0.25, -0.5, -0.95, -1]) and max(found) == 0
    every = configure(overlong="punish", max_new_tokens=100, overlong_share=1.0)
    assert grpo.overlong_penalty(samples, every)[1] == -0.5


def test_the_objective_is_clipped_at_both_ends_by_their_own_measure():
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.25, 1.5] * 2, dtype=torch.float64)
    advantages = torch.tensor([2.0] * 5 + [-3.0] * 5, dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    losses, found = grpo.clip_loss(logp, torch.zeros_like(ratio), advantages, [10], 0.2, 0.28)
    assert found.tolist() == pytest.approx(ratio.tolist())
    expected = [-2 * min(r, 1.28) for r in ratio[:5].tolist()] + [3 * max(r, 0.8) for r in ratio[5:].tolist()]
    assert losses.tolist() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(losses.sum(), logp)
    inside = torch.tensor([True, True, True, True, False, False, True, True, True, True])
    assert slope.tolist() == pytest.approx((-advantages * ratio * inside).tolist())
    wide, _ = grpo.clip_loss(logp, torch.zeros_like(ratio), advantages, [10], 10.0, 10.0)  # R1's: none below
    assert wide.tolist() == pytest.approx((-advantages * ratio).tolist())


def three_completions(seed=0):
    """(lengths, logp, old_logp, advantages) in fp64, with ratios on both sides of every bound."""
    lengths, generator = [2, 5, 3], torch.Generator().manual_seed(seed)
    logp, drift = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.5, -2.0], dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
    return lengths, logp.requires_grad_(), logp.detach() + drift * 0.5, advantages


def test_cispo_weighs_every_token_and_stops_none():
    """Its gradient is that of -A log pi, times the clipped ratio."""
    lengths, logp, old_logp, advantages = three_completions()
    losses, ratio = grpo.cispo_loss(logp, old_logp, advantages, lengths, 0.2, 0.28)
    (slope,) = torch.autograd.grad(losses.sum(), logp)
    ratios = [math.exp(a - b) for a, b in zip(logp.tolist(), old_logp.tolist())]
    assert ratio.tolist() == pytest.approx(ratios) and min(ratios) < 0.8 and max(ratios) > 1.28
    wanted = [-a * min(max(r, 0.8), 1.28) for a, r in zip(advantages.tolist(), ratios)]
    assert slope.tolist() == pytest.approx(wanted) and not ratio.requires_grad


def test_gspo_has_one_ratio_per_completion():
    """-mean over completions of min(s A, clip(s) A), s = (pi(y) / old(y))^(1 / |y|), a loop over
    completions."""
    lengths, logp, old_logp, advantages = three_completions()
    weights = grpo.token_weights(lengths, "sequence", 10, 3, 99).double()
    losses, ratio = grpo.gspo_loss(logp, old_logp, advantages, lengths, 0.05, 0.1)
    (slope,) = torch.autograd.grad((weights * losses).sum(), logp)
    again, wanted, begin = logp.detach().requires_grad_(), 0.0, 0
    for n in lengths:
        part = slice(begin, begin + n)
        s = (again[part].sum().exp() / old_logp[part].sum().exp()) ** (1 / n)
        assert ratio[part].tolist() == pytest.approx([s.item()] * n)
        wanted = wanted - torch.minimum(s * advantages[begin], s.clamp(0.95, 1.1) * advantages[begin]) / 3
        begin += n
    (expected,) = torch.autograd.grad(wanted, again)
    assert (weights * losses).sum().item() == pytest.approx(wanted.item())
    torch.testing.assert_close(slope, expected)


def test_off_policy_completions_that_are_worse_teach_nothing():
    lengths, logp, _, advantages = three_completions()
    drift = torch.tensor([9.0, 9.0, 0.6, 0.6, 0.6, 0.6, 0.6, 0.9, 0.0, 0.0], dtype=torch.float64)
    kept = grpo.off_policy_weights(logp, logp.detach() + drift, advantages, lengths, 0.5)
    assert kept.tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1]  # good ones may drift; 0.3 on average is within 0.5
    assert grpo.off_policy_weights(logp, logp.detach() - drift, advantages, lengths, 0.5).tolist() == [1] * 10
    assert not kept.requires_grad


# --------------------------------------------------------------------------------------------------
# What the gradient of each KL estimator is, on 7 tokens, by enumeration


def kl(p, q):
    """KL(p || q) of two distributions over all tokens, given as log-probabilities."""
    return (p.exp() * (p - q)).sum()


@pytest.fixture
def tiny_policy():
    """Log-probabilities of a policy, its reference and an old policy, and the gradients of the KL
    in both directions with respect to the policy's logits."""
    generator = torch.Generator().manual_seed(3)
    logits, ref, old = (torch.randn(7, generator=generator, dtype=torch.float64) * 1.5 for _ in range(3))
    logits.requires_grad_()
    logp, ref_logp = logits.log_softmax(0), ref.log_softmax(0)
    (reverse,) = torch.autograd.grad(kl(logp, ref_logp), logits, retain_graph=True)
    (forward,) = torch.autograd.grad(kl(ref_logp, logp), logits, retain_graph=True)
    policy = {"logits": logits, "logp": logp, "ref": ref_logp, "old": old.log_softmax(0)}
    return policy | {"reverse": reverse, "forward": forward}


@pytest.mark.parametrize(
    "kind, truth, behaviour",
    [("k2", "reverse", "logp"), ("k3", "forward", "logp"), ("unbiased", "reverse", "logp")]
    + [("unbiased", "reverse", "old")],
)
def test_the_gradient_of_each_kl_estimator(tiny_policy, kind, truth, behaviour):
    """In expectation over what samples, the policy itself or an old one."""
    t, behaviour = tiny_policy, tiny_policy[behaviour].detach()
    ratio = torch.exp(t["logp"] - behaviour)
    value = (behaviour.exp() * grpo.kl_loss(t["logp"], t["ref"], ratio, kind)).sum()
    (slope,) = torch.autograd.grad(value, t["logits"], retain_graph=True)
    assert slope.tolist() == pytest.approx(t[truth].tolist(), abs=1e-12)
    if kind != "k2":
        assert value.item() == pytest.approx(kl(t["logp"], t["ref"]).item())
    assert (t["forward"] - t["reverse"]).abs().max() > 0.1


def test_k1_as_a_loss_has_no_gradient_and_is_refused(tiny_policy):
    logp = tiny_policy["logp"]
    expected_k1 = (logp.detach().exp() * (logp - tiny_policy["ref"])).sum()
    (slope,) = torch.autograd.grad(expected_k1, tiny_policy["logits"])
    assert slope.abs().max() < 1e-12
    with pytest.raises(UserError, match="--kl=k1: as a loss its gradient is 0"):
        configure(kl="k1", beta=0.1)


@pytest.mark.parametrize("kind", ["k2", "k3", "unbiased"])
def test_the_kl_draws_the_policy_back_to_its_reference(kind):
    ref_logp, logp = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -3.0], requires_grad=True)
    losses = grpo.kl_loss(logp, ref_logp, torch.ones(2), kind)
    assert (losses > 0).all() and (grpo.kl_loss(ref_logp, ref_logp, torch.ones(2), kind) == 0).all()
    (slope,) = torch.autograd.grad(losses.sum(), logp)
    assert slope[0] > 0 > slope[1]


# --------------------------------------------------------------------------------------------------
# Recipes


PAPERS = {
    "default": {"group_size": 8, "loss_aggregation": "token", "kl": "none", "beta": 0.0, "clip_high": 0.28},
    "deepseekmath": {"group_size": 64, "advantage": "grpo", "loss_aggregation": "sequence", "kl": "k3", "beta": 0.04},
    "r1": {"group_size": 16, "clip_high": 10.0, "beta": 0.001, "reference_every": 400, "kl": "k3"},
    "dr_grpo": {"advantage": "dr_grpo", "loss_aggregation": "constant", "kl": "none", "beta": 0.0},
    "dapo": {"loss_aggregation": "token", "clip_low": 0.2, "clip_high": 0.28, "kl": "none", "overlong": "punish"},
    "cispo": {"policy_loss": "cispo", "loss_aggregation": "token", "clip_low": 1.0, "kl": "none"},
    "gspo": {"policy_loss": "gspo", "loss_aggregation": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "v3.2": {"advantage": "dr_grpo", "kl": "unbiased", "off_policy_mask": 0.5, "policy_loss": "clip"},
}


@pytest.mark.parametrize("recipe", grpo.RECIPES)
def test_a_recipe_sets_what_is_not_given(recipe):
    config = vars(configure(recipe=recipe))
    assert {name: config[name] for name in PAPERS[recipe]} == PAPERS[recipe]
    of_recipe = {name: config[name] for name in grpo.DEFAULT_RECIPE}
    assert of_recipe == grpo.DEFAULT_RECIPE | grpo.RECIPES[recipe]


def test_a_flag_wins_over_the_recipe():
    given = {"group_size": 3, "clip_high": 0.5, "overlong": "none", "refill": 0, "minibatches": 2}
    config = vars(configure(recipe="dapo", **given))
    assert {name: config[name] for name in given} == given
    assert config["advantage"] == "grpo" and config["clip_low"] == 0.2
    config = configure(recipe="deepseekmath", kl="none", beta=0.0)
    assert (config.kl, config.beta, config.loss_aggregation) == ("none", 0.0, "sequence")


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"recipe": "tulu"}, "--recipe=tulu: expected one of default, deepseekmath, r1, dr_grpo, dapo"),
        ({"advantage": "gae"}, "--advantage=gae: expected one of 'grpo', 'dr_grpo', 'rloo'"),
        ({"loss_aggregation": "mean"}, "--loss_aggregation=mean: expected one of 'token', 'sequence', 'constant'"),
        ({"policy_loss": "tis"}, "--policy_loss=tis: expected one of 'clip', 'cispo', 'gspo'"),
        ({"kl": "k4", "beta": 0.1}, "--kl=k4: expected one of 'none', 'k2', 'k3', 'unbiased'"),
        ({"overlong": "cut"}, "--overlong=cut: expected one of 'none', 'mask', 'punish'"),
        ({"kl": "k2"}, "--beta=0.0 and --kl=k2: give both"),
        ({"beta": 0.1}, "--beta=0.1 and --kl=none: give both"),
        ({"recipe": "r1", "kl": "none"}, "--beta=0.001 and --kl=none: give both"),
        ({"reference": "out/sft"}, "--reference and --reference_every need --kl"),
        ({"reference_every": 5}, "--reference and --reference_every need --kl"),
        ({"group_size": 1}, "--group_size=1"),
        ({"prompts_per_step": 0}, "--prompts_per_step=0"),
        ({"clip_low": -0.5}, "--clip_low=-0.5"),
        ({"refill": -2}, "--refill=-2"),
        ({"temperature": 0.0}, "--temperature=0.0"),
        ({"overlong_share": 0.0}, "--overlong_share=0.0"),
        ({"overlong_share": 0.5}, "--overlong_share=0.5: only --overlong=punish reads it; leave it out"),
        ({"reward_timeout": 0.0}, "--reward_timeout=0.0"),
        ({"decay": 2.0}, "--decay=2.0"),
        ({"stop_kl": math.inf}, "--stop_kl=inf"),
    ],
)
def test_flags_without_meaning_are_refused(flags, named):
    with pytest.raises(UserError) as e:
        configure(**flags)
    assert named in str(e.value)


# --------------------------------------------------------------------------------------------------
# On models


def trained_completions(chats, samples, advantages, **per_token):
    """[Completion] with an advantage each, and what else belongs to their tokens."""
    completions = completions_of(chats, samples, **per_token)
    for c, advantage in zip(completions, advantages, strict=True):
        c.per_token["advantages"] = torch.full((c.n_tokens,), float(advantage))
    return completions


@pytest.mark.parametrize(
    "aggregation, kl", [("token", "none"), ("sequence", "k3"), ("constant", "k2"), ("token", "unbiased")]
)
def test_gradients_are_those_of_full_logits_for_any_split_and_order(files, aggregation, kl):
    old = checkpoint.load(files / "sft")[0].double()
    model, reference, T = moved(old, by=0.1).double(), moved(old, seed=4, by=0.05).double(), 0.8
    chats, samples = sampled(old, n=3, temperature=T)
    lengths = [len(s.tokens) for s in samples]
    assert len(set(lengths)) > 1
    old_logp, ref_logp = (full_logps(m, chats, T).detach() for m in (old, reference))
    random = np.random.default_rng(0)
    advantages = random.normal(size=len(chats)).astype(np.float32)
    of_tokens = torch.from_numpy(advantages.repeat(lengths))
    logp = full_logps(model, chats, T)
    ratio, d = (logp - old_logp).exp(), logp - ref_logp
    k3 = torch.exp(-d) - 1 + d
    kl_losses = {"none": 0, "k2": d**2 / 2, "k3": k3, "unbiased": ratio * k3}[kl]
    losses = -torch.minimum(ratio * of_tokens, ratio.clamp(0.9, 1.15) * of_tokens) + 0.3 * kl_losses
    n_completions, n_tokens = 12, 61  # of all ranks
    expected = {
        "token": losses.sum() / n_tokens,
        "sequence": sum(x.mean() for x in losses.split(lengths)) / n_completions,
        "constant": losses.sum() / (n_completions * 6),
    }[aggregation]
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    x = (logp - old_logp).detach()
    clipped = ((ratio < 0.9) | (ratio > 1.15)).sum() / n_tokens
    figures = [expected, (x.exp() - 1 - x).sum() / n_tokens, clipped, ratio.sum() / n_tokens]
    flags = {"temperature": T, "clip_low": 0.1, "clip_high": 0.15, "loss_aggregation": aggregation}
    flags |= {"max_new_tokens": 6, **({} if kl == "none" else {"kl": kl, "beta": 0.3})}
    completions = trained_completions(chats, samples, advantages, old_logp=old_logp, ref_logp=ref_logp)
    for micro_batch_tokens, shuffled in ((1, True), (70, False), (70, True), (10**6, False)):
        config = configure(micro_batch_tokens=micro_batch_tokens, **flags)
        order = random.permutation(len(chats)) if shuffled else range(len(chats))
        model.zero_grad()
        stats = grpo.add_gradients(model, [completions[i] for i in order], n_tokens, n_completions, config)
        for p, g in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6 * g.abs().max().item() + 1e-9)
        assert list(stats.values()) == pytest.approx([float(f.detach()) for f in figures], rel=1e-4)


@pytest.mark.parametrize("temperature, known", [(1.0, True), (0.7, True), (0.7, False)])
def test_before_the_first_update_every_ratio_is_1(files, temperature, known):
    """Also if the old log-probabilities are not known before: then the update itself finds them."""
    model = checkpoint.load(files / "sft")[0]
    chats, samples = sampled(model, temperature=temperature)
    logp = logprobs_no_grad(model, chats, temperature, 70)
    old_logp = {"old_logp": logp} if known else {}
    completions = trained_completions(chats, samples, np.ones(len(chats)), ref_logp=logp, **old_logp)
    config = configure(temperature=temperature, micro_batch_tokens=70, kl="k3", beta=0.5)
    stats = grpo.add_gradients(model, completions, len(logp), len(chats), config)
    assert stats["approx_kl"] == 0 == stats["clip_fraction"]
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["loss"] == pytest.approx(-1, abs=1e-6)
    assert torch.equal(get_per_token(model, completions, "old_logp"), logp)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_update_makes_the_better_completion_likelier_and_of_flipped_rewards_the_worse(files, sign):
    """One question, two completions known, a few dozen steps on them."""
    model = checkpoint.load(files / "sft")[0]
    prompt = chat.encode_prompt(TOK, ask("q1"))
    chats = [make_completion(prompt, chat.encode_completion(TOK, text)) for text in ("yes", "no")]
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0]]) * sign, "grpo")[0].tolist()
    optimizer, config = Optimizer(model, 3e-4), configure()
    before = completion_logprobs(model, chats).detach()
    for _ in range(24):
        logp = logprobs_no_grad(model, chats, 1.0, 10**6)
        grpo.add_gradients(model, trained_completions(chats, [None, None], advantages, old_logp=logp), 7, 2, config)
        optimizer.step(1.0, 1.0)
    change = (completion_logprobs(model, chats).detach() - before).split([4, 3])
    assert change[0].sum() * sign > 0.3 and change[1].sum() * sign < -0.3


def roll_out(files, n_prompts, function, **flags):
    """(completions, n_prompts, config, rows, order) of a step on n_prompts questions."""
    config = configure(**({"group_size": 3, "prompts_per_step": n_prompts, "max_new_tokens": 6, "seed": 0} | flags))
    model = checkpoint.load(files / "sft")[0]
    rows = [data_rows.prompt_only(row) for row in questions(30)]
    rewards, order = scoring.load_rewards(f"{files}/rewards.py:{function}", "cpu", 10**6), index_order(30, 0)
    if config.overlong == "punish":
        rewards.append((grpo.OVERLONG, 1.0, lambda *args: grpo.overlong_penalty(args[2], config)))
    completions, seen = grpo.roll_out(model, TOK, rewards, order, rows, 1, config, print)
    return completions, seen, config, rows, order


def groups_of(completions, seen, config):
    """{number of the prompt: its completions} of the groups that teach."""
    groups = {}
    for c in grpo.find_advantages(completions, config)[0]:
        groups.setdefault(c.index // config.group_size, []).append(c)
    return groups


def test_groups_without_a_difference_are_left_out(files):
    """Of every third question all completions are worth the same."""
    completions, seen, config, *_ = roll_out(files, 12, "some")
    assert seen == 12 and [c.index for c in completions] == list(range(36))
    trained, groups_are = grpo.find_advantages(completions, config)
    zero_variance = groups_are["zero_variance"]
    groups = groups_of(completions, seen, config)
    assert 0 < len(groups) < 12 and all(len({c.score for c in group}) > 1 for group in groups.values())
    assert trained == [c for c, equal in zip(completions, zero_variance, strict=True) if not equal]
    for group in groups.values():
        scores = torch.tensor([[c.score for c in group]], dtype=torch.float64)
        for c, advantage in zip(group, grpo.group_advantages(scores, "grpo")[0].float(), strict=True):
            assert c.per_token["advantages"].tolist() == [advantage.item()] * c.n_tokens


def test_they_are_refilled_with_other_prompts_and_other_random_numbers(files):
    kept = groups_of(*roll_out(files, 12, "some")[:3])
    completions, seen, config, rows, order = roll_out(files, 12, "some", refill=5)
    groups = groups_of(completions, seen, config)
    assert len(groups) == 12 < seen and len(completions) == 3 * seen == 3 * order.index
    assert list(groups)[: len(kept)] == list(kept)
    model, asked = checkpoint.load(files / "sft")[0], index_order(30, 0).batch(seen)
    for number, group in groups.items():
        messages, row = rows[asked[number]]
        prompt = chat.encode_prompt(TOK, messages)
        assert not row["flat"] and len(group) == 3
        texts = [chat.decode_completion(TOK, c.sample.tokens) for c in group]
        assert [c.score for c in group] == pytest.approx([len(t) + 0.1 * t.count("e") for t in texts])
        assert all(c.chat.ids.tolist() == prompt + c.sample.tokens for c in group)
        sampling = {"max_new_tokens": 6, "n": 3, "stop": {chat.end_of_turn(TOK)}, "seed": 1, "first": number * 3}
        assert [s.tokens for s in rollout(model, [prompt], **sampling)] == [c.sample.tokens for c in group]


def test_refilling_ends_where_nothing_ever_differs(files):
    completions, seen, config, *_ = roll_out(files, 6, "same", refill=2)
    trained, groups_are = grpo.find_advantages(completions, config)
    zero_variance = groups_are["zero_variance"]
    assert seen == 18 and not trained and all(zero_variance)
    assert list(minibatches(trained, len(completions), 1, config)) == []


def test_completions_near_the_limit_are_punished_in_the_score(files):
    plain, *_ = roll_out(files, 12, "some", max_new_tokens=4)
    punished, _, config, *_ = roll_out(files, 12, "some", max_new_tokens=4, overlong="punish", overlong_share=0.25)
    penalties = grpo.overlong_penalty([c.sample for c in plain], config)
    assert [c.score for c in punished] == pytest.approx([c.score + p for c, p in zip(plain, penalties, strict=True)])
    for c, before in zip(punished, plain, strict=True):  # what is right stays right, however long
        assert (c.score > c.penalty) == (before.score > 0)
    found = [grpo.find_advantages(some, configure(group_size=4))[1] for some in (plain, punished)]
    assert found[0]["pass_at_1"] == found[1]["pass_at_1"] and any(found[0]["pass_at_1"])
    assert min(penalties) < 0 == max(penalties)


def test_completions_without_an_end_teach_nothing_if_they_are_masked(files):
    completions, seen, config, *_ = roll_out(files, 12, "some", max_new_tokens=4, overlong="mask")
    trained, groups_are = grpo.find_advantages(completions, config)
    zero_variance = groups_are["zero_variance"]
    teaching = [c for c, equal in zip(completions, zero_variance, strict=True) if not equal]
    assert 0 < len(trained) < len(teaching) and trained == [c for c in teaching if c.sample.finished]


def test_minibatches_have_every_completion_once_per_epoch():
    chats = [make_completion([1], [2] * (n % 3 + 1)) for n in range(12)]
    completions = completions_of(chats, [None] * 12)
    for c in completions:
        c.index *= 3  # those of other ranks are in between
    config = configure(minibatches=4, epochs=3)
    cuts = list(minibatches(completions, 40, 7, config))
    assert len(cuts) == 12
    for epoch in (cuts[:4], cuts[4:8], cuts[8:]):
        assert sorted(c.index for own, *_ in epoch for c in own) == [c.index for c in completions]
        for own, n_tokens, n_completions in epoch:
            assert n_tokens == sum(c.n_tokens for c in own) and n_completions == len(own)
    assert [c.index for own, *_ in cuts[:4] for c in own] != [c.index for own, *_ in cuts[4:8] for c in own]
    undivided = list(minibatches(completions, 40, 7, configure(epochs=2)))
    assert [own for own, *_ in undivided] == [completions] * 2


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_one_step_by_hand(train, files, tmp_path):
    """What is logged of the first update, from completions sampled and scored again here."""
    reference = moved(checkpoint.load(files / "sft")[0])
    reference_folder = checkpoint.save(tmp_path / "reference", reference, TOK, {"stage": "sft", "step": 1})
    flags = {"temperature": 0.8, "max_new_tokens": 4, "group_size": 3}
    run_flags = flags | {"loss_aggregation": "sequence", "kl": "k3", "beta": 0.5, "prompts_per_step": 6}
    run_flags |= {"val": write_rows(tmp_path / "val.jsonl", questions(4)), "val_fraction": 0.05}
    succeeds(train(tmp_path / "run", steps=1, reference=reference_folder, **run_flags))
    (log,) = [r for r in records(tmp_path / "run") if "loss" in r]

    completions, seen, config, *_ = roll_out(files, 6, "some", **flags)
    trained, _ = grpo.find_advantages(completions, config)
    groups, chats = groups_of(completions, seen, config), [c.chat for c in trained]
    assert 1 < len(groups) < 6
    logp, ref_logp = (full_logps(m, chats, 0.8) for m in (checkpoint.load(files / "sft")[0], reference))
    d = logp - ref_logp
    k3 = (torch.exp(-d) - 1 + d).split([c.n_tokens for c in trained])
    advantages = []
    for group in groups.values():
        scores = [c.score for c in group]
        advantages += [(r - np.mean(scores)) / np.std(scores, ddof=1) for r in scores]
    loss = np.mean([-a + 0.5 * k.mean().item() for a, k in zip(advantages, k3, strict=True)])
    expected = {
        "loss": loss,
        "reward": np.mean([c.score for c in completions]),
        "zero_variance": 1 - len(groups) / 6,
        "kl": d.sum().item() / len(chats),
        "finished": np.mean([c.sample.finished for c in completions]),
        "completion_tokens": np.mean([len(c.sample.tokens) for c in completions]),
        "prompts_seen": 6,
        "approx_kl": 0,
        "ratio": 1,
        "clip_fraction": 0,
        "updates": 1,
        "entropy": -full_logps(checkpoint.load(files / "sft")[0], [c.chat for c in completions], 0.8).mean().item(),
        "tokens": sum(len(c.chat.ids) for c in completions),  # those left out have been sampled as well
    }
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5) and loss > 0.001


@pytest.mark.parametrize("function, sign", [("yes", 1), ("no", -1)])
def test_what_is_rewarded_becomes_likelier_and_what_is_punished_less(train, files, tmp_path, function, sign):
    flags = {"steps": 12, "group_size": 6, "lr": 0.005}
    succeeds(train(tmp_path / "run", reward=f"{files}/rewards.py:{function}", **flags))
    before, after = (checkpoint.load(folder)[0] for folder in (files / "sft", tmp_path / "run"))
    yes = chat.encode_completion(TOK, "yes")
    chats = [make_completion(chat.encode_prompt(TOK, ask(f"q{i}")), yes) for i in range(4)]
    change = (completion_logprobs(after, chats) - completion_logprobs(before, chats)).sum().item() / 4
    assert change * sign > 0.3
    reward = steps_of(tmp_path / "run", "reward")
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.1


@pytest.mark.parametrize(
    "more",
    [
        {
            **{"kl": "k2", "beta": 0.1, "loss_aggregation": "sequence", "advantage": "rloo"},
            **{"overlong": "mask", "max_new_tokens": 4},
        },
        {"recipe": "dapo", "minibatches": 3, "refill": 2, "epochs": 2, "max_new_tokens": 5, "overlong_share": 0.5},
    ],
    ids=["k2", "dapo"],
)
def test_one_process_micro_batches_and_two_processes_agree(train, fork, flags, tmp_path, more):
    """If groups are left out, so that the ranks have unequal shares."""
    more = {"prompts_per_step": 5, "group_size": 3, "temperature": 0.9, "steps": 4, "eval_every": 2, "lr": 0.001} | more
    succeeds(train(tmp_path / "whole", **more))
    succeeds(train(tmp_path / "micro", micro_batch_tokens=1, **more))
    outputs = pair(fork, grpo, **(flags | more | {"out": tmp_path / "pair"}))
    assert "step 4/4" in outputs[0] and not outputs[1].strip()
    for name in ("micro", "pair"):
        assert_close_runs(tmp_path / name, tmp_path / "whole", 4, ["model.safetensors"])
    assert max(steps_of(tmp_path / "whole", "updates")) > 0 and max(steps_of(tmp_path / "whole", "sampler_gap")) < 1e-5
    assert max(steps_of(tmp_path / "whole", "prompts_seen")) > 5 or "refill" not in more


def test_the_ranks_meet_once_for_all_completions_of_a_step(fork, flags, tmp_path):
    for events in meetings(fork, grpo, **(flags | {"out": tmp_path / "pair"})):
        assert events.count("bem") == events.count("b") == 3, events


def test_fewer_prompts_than_ranks_are_refused(fork, flags, tmp_path):
    with pytest.raises(AssertionError, match="--prompts_per_step=1: fewer than there are ranks"):
        pair(fork, grpo, **(flags | {"out": tmp_path / "pair", "prompts_per_step": 1}))


def test_a_killed_run_resumes_as_if_nothing_had_been(train, make_model, files, tmp_path):
    """With refilled groups and a reference that is renewed; even if the model it began from has
    been trained further since."""
    init, straight, killed = tmp_path / "sft", tmp_path / "straight", tmp_path / "killed"
    shutil.copytree(files / "sft", init, symlinks=True)
    flags = {"init": init, "kl": "k2", "beta": 0.1, "refill": 2, "reference_every": 4, "minibatches": 2}
    flags |= {"steps": 13, "save_every": 3}
    succeeds(train(straight, **flags))
    child = train(killed, **flags)
    wait_until(lambda: logged(killed, 7), child)
    assert kill(child)[0] == -9
    checkpoint.save(init, make_model(9, **SMALL), TOK, {"stage": "sft", "step": 2})
    assert "continuing after step" in succeeds(train(killed, resume=True, **flags))
    assert train_steps(killed) == list(range(1, 14)) and max(steps_of(killed, "prompts_seen")) > 4
    assert_same(straight, killed, [3, 6, 9, 12, 13])
    assert not (killed / "step_000003/reference").exists()
    first, second, third, policy = (
        safetensors.torch.load_file(killed / f"step_{name}/model.safetensors")
        for name in ("000006/reference", "000009/reference", "000012/reference", "000012")
    )
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(third[k], policy[k]) for k in policy)
    for changed, named in [
        ({"kl": "k3"}, "--kl=k3: this run was started with --kl=k2"),
        ({"recipe": "dapo"}, "--recipe=dapo"),
        ({"refill": 1}, "--refill=1"),
    ]:
        assert named in refused(train(killed, resume=True, **(flags | changed)))


def test_a_run_resumes_only_with_the_rewards_it_began_with(train, make_model, files, tmp_path):
    shutil.copy(files / "rewards.py", tmp_path / "mine.py")
    save_reward_model(make_model, tmp_path / "rm")
    reference = save(make_model, tmp_path / "reference", "sft", seed=3)
    flags = {"reward": f"{tmp_path}/mine.py:yes,{tmp_path}/rm", "kl": "k2", "beta": 0.01, "reference": reference}
    flags |= {"steps": 2, "save_every": 1}
    succeeds(train(tmp_path / "run", **flags))
    unlike = "not the data this run was started with (its SHA-256 differs)"
    (tmp_path / "mine.py").write_text(REWARDS + "\n")
    assert unlike in refused(train(tmp_path / "run", resume=True, **flags))
    (tmp_path / "mine.py").write_text(REWARDS)
    succeeds(train(tmp_path / "run", resume=True, **flags))
    for path, stage, shape in ((tmp_path / "rm", "reward", {"scalar_head": True}), (reference.parent, "sft", {})):
        kept = shutil.copytree(path, tmp_path / "kept", symlinks=True)
        shutil.rmtree(path)
        save(make_model, path, stage, seed=8, **shape)
        assert unlike in refused(train(tmp_path / "run", resume=True, **flags))
        shutil.rmtree(path)
        kept.rename(path)


def test_a_reward_that_is_always_the_same_moves_nothing(train, files, tmp_path):
    flags = {"refill": 1, "minibatches": 2, "kl": "k2", "beta": 1}
    succeeds(train(tmp_path / "run", reward=f"{files}/rewards.py:same", **flags))
    assert_nothing_moved(files / "sft", tmp_path / "run")
    assert steps_of(tmp_path / "run", "updates") == [0, 0, 0]
    assert steps_of(tmp_path / "run", "zero_variance") == [1, 1, 1]
    assert steps_of(tmp_path / "run", "reward") == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("weight, said", [(100, 1), (1e8, 0)])
def test_rewards_that_are_nothing_beside_the_kl_are_said_once(train, files, tmp_path, weight, said):
    """1e-7 apart, they move the policy by 1e-7 / beta from its reference: it does not learn."""
    how = {"advantage": "dr_grpo", "kl": "k2", "beta": 0.02, "reward": f"{files}/rewards.py:small*{weight}"}
    output = succeeds(train(tmp_path / "run", **how))
    assert output.count("nothing beside --beta=0.02 (now at most ") == said
    assert "the loss is 0 and the policy learns" not in output


def test_too_far_a_step_is_left_out_and_moves_nothing(train, tmp_path):
    flags = {"lr": 0.01}
    succeeds(train(tmp_path / "short", epochs=1, stop_kl=0, **flags))
    succeeds(train(tmp_path / "cut", epochs=3, stop_kl=1e-5, **flags))
    updates = steps_of(tmp_path / "cut", "updates")
    assert updates == steps_of(tmp_path / "short", "updates") and updates[0] == 1
    assert_same(tmp_path / "short", tmp_path / "cut", [3], log=False)


def test_a_run_of_completions_without_an_end_moves_nothing_if_they_are_masked(train, files, tmp_path):
    """Of at most one token, none has an end."""
    flags = {"reward": f"{files}/rewards.py:first", "max_new_tokens": 1}
    succeeds(train(tmp_path / "masked", overlong="mask", **flags))
    assert steps_of(tmp_path / "masked", "finished") == [0, 0, 0] == steps_of(tmp_path / "masked", "updates")
    assert min(steps_of(tmp_path / "masked", "zero_variance")) < 1
    assert_nothing_moved(files / "sft", tmp_path / "masked")


def test_completions_that_no_longer_end_are_reported_once(train, files, tmp_path):
    flags = {"reward": f"{files}/rewards.py:length", "steps": 20, "prompts_per_step": 5, "max_new_tokens": 10}
    flags |= {"lr": 0.02, "stop_kl": 0, "save_every": 19}
    output = succeeds(train(tmp_path / "run", **flags))
    assert output.count("of the completions end, after") == 1
    shutil.rmtree(tmp_path / "run/step_000020")
    assert "completions end, after" not in succeeds(train(tmp_path / "run", resume=True, **flags))  # it has been said


@pytest.mark.parametrize("recipe", grpo.RECIPES)
def test_every_recipe_runs_with_rewards_of_both_kinds(train, files, tmp_path, recipe):
    names = {f"{files}/rm": 0.5, f"{files}/rewards.py:yes": 2.0}
    monitor = f"{files}/rewards.py:length"
    flags = {"reward": ",".join(f"{name}*{weight}" for name, weight in names.items()), "monitor": monitor}
    output = succeeds(train(tmp_path / "run", recipe=recipe, steps=2, minibatches=2, **flags))
    assert checkpoint.load(tmp_path / "run")[2]["stage"] == "grpo" and "validation val_loss" in output
    assert f"recipe {recipe}: group_size 4" in output
    for r in [r for r in records(tmp_path / "run") if "loss" in r]:
        total = sum(weight * r[name] for name, weight in names.items()) + r.get(grpo.OVERLONG, 0.0)
        assert r["reward"] == pytest.approx(total, abs=1e-5) and (grpo.OVERLONG in r) == (recipe == "dapo")
        assert r["updates"] == 2 and monitor in r and ("kl" in r) == (recipe in ("deepseekmath", "r1", "v3.2"))


@pytest.mark.parametrize("how", [{"overlong": "punish"}, {"recipe": "dapo", "minibatches": 2, "refill": 0}])
def test_validation_subtracts_the_penalty_of_length_as_training_does(train, files, tmp_path, how):
    """Over the whole length it is the share of the limit that a completion takes, and of a reward
    of 0.3 that is what differs."""
    flags = {"reward": f"{files}/rewards.py:same", "overlong_share": 1.0, "eval_every": 1}
    succeeds(train(tmp_path / "run", **flags, **how))
    found = [r for r in records(tmp_path / "run") if "reward" in r]
    assert sum("val_loss" in r for r in found) == 3 == sum("loss" in r for r in found)
    for r in found:
        assert r["reward"] == pytest.approx(0.3 - r["completion_tokens"] / 6, abs=1e-6)
        assert r.get("val_loss", -r["reward"]) == -r["reward"]


def test_bad_input_is_one_clear_line_and_costs_nothing(train, make_model, files, tmp_path):
    run = tmp_path / "old"
    succeeds(train(run, steps=1, monitor=f"{files}/rewards.py:some"))  # a reward may be monitored as well
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    other = save(make_model, tmp_path / "other", "sft", tok=tokenizer.train(["the old map " * 5], 256 + 4 + 3))
    short = save(make_model, tmp_path / "short", "sft", context=20)
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": x * 90} for x in "xy"])
    held = {"kl": "k2", "beta": 0.1}
    for flags, named in [
        ({"init": files / "rm"}, "a reward model, which has no output head and writes nothing"),
        ({"reference": other, **held}, f"--reference={other}: it has another tokenizer"),
        ({"reference": short, **held}, f"--reference={short}: its context of 20 tokens is shorter"),
        ({"data": long}, "no prompt leaves room for a completion of --max_new_tokens=6 tokens"),
        ({"data": files / "sft"}, "a checkpoint, "),
        ({"reward": ""}, "--reward: name what to maximise"),
        ({"reward": f"{files}/rewards.py:yes*"}, "'' is not a number"),
        ({"reward": "nowhere.py:f"}, "nowhere.py does not exist"),
        ({"constitution": long}, f"--constitution={long}: no judge:DIR in --reward or --monitor reads it"),
        ({"reward": files / "sft"}, "not a reward model"),
        ({"reward": f"{files}/rm,{files}/rm*0.5"}, "named twice"),
        ({"kl": "k1", "beta": 0.1}, "--kl=k1"),
        ({"max_new_tokens": 96}, "--max_new_tokens=96: the model's context is 96 tokens"),
        ({"target_kl": 0.1}, "--target_kl: is called --stop_kl now"),
        ({"loss": "token"}, "--loss: is called --loss_aggregation now"),
    ]:
        line = refused(train(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags


# --------------------------------------------------------------------------------------------------
# A judge as the reward


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """(its directory, a file of two principles): a model of random weights that has " A" and " B"
    as tokens."""
    from conftest import random_model

    folder = tmp_path_factory.mktemp("judge")
    tok = tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)
    save(random_model, folder / "judge", "pretrain", tok=tok, context=400)
    (folder / "principles.txt").write_text("# a comment\nBe kind: always.\n\nBe brief: never long.\n")
    return folder / "judge", folder / "principles.txt"


def test_a_judge_compares_each_completion_with_the_next_in_both_orders_by_every_principle(judge):
    folder, principles = judge
    model, tok, _ = checkpoint.load(folder)
    rewards = scoring.load_rewards(f"judge:{folder}*0.5", "cpu", 10**6, str(principles))
    ((name, weight, function),) = rewards
    assert (name, weight) == (f"judge:{folder}", 0.5)
    texts = ["yes", "no", "ja", "well", "quite so"]
    samples = [Sample(i // 3, [], [], True) for i in range(5)]
    conversation = [*ask("hello"), {"role": "assistant", "content": "hi"}, *ask("second")]
    total, parts = scoring.score_completions(rewards, [(ask("first"), {}), (conversation, {})], samples, texts)
    a, b = (tok.encode_ordinary(label)[0] for label in (" A", " B"))

    def first_is_better(prompt, x, y, principle):
        hidden = model(pack([[tok.eot, *tok.encode_ordinary(judge_prompt(prompt, x, y, principle))]]))[-1]
        return torch.softmax(hidden @ model.head[[a, b]].T, -1)[0].item()

    prompts, expected = ["first", "user: hello\nassistant: hi\nuser: second"], []
    for i, opponent in enumerate((1, 2, 0, 4, 3)):
        wins = []
        for principle in ("Be kind: always.", "Be brief: never long."):
            wins.append(first_is_better(prompts[i // 3], texts[i], texts[opponent], principle))
            wins.append(1 - first_is_better(prompts[i // 3], texts[opponent], texts[i], principle))
        expected.append(np.mean(wins))
    assert parts[name].tolist() == pytest.approx(expected, abs=1e-5) and np.std(expected) > 1e-3
    assert total.tolist() == pytest.approx([0.5 * w for w in expected], abs=1e-5)
    with pytest.raises(UserError, match=r"there must be at least two \(--group_size=2\)"):
        function([ask("q")], [{}], samples[:1], texts[:1])


def test_runs_with_a_judge(train, fork, files, judge, tmp_path):
    folder, principles = judge
    flags = {"reward": f"judge:{folder},{files}/rewards.py:yes*0.5", "constitution": principles}
    succeeds(train(tmp_path / "grpo", **flags, steps=2))
    (log, _) = [r for r in records(tmp_path / "grpo") if "loss" in r]
    total = log[f"judge:{folder}"] + 0.5 * log[f"{files}/rewards.py:yes"]
    assert log["reward"] == pytest.approx(total, abs=1e-6) and log["updates"] == 1
    ppo_flags = TINY | flags | {"init": files / "sft", "data": files / "prompts.jsonl", "steps": 1}
    ppo_flags |= {"prompts_per_step": 8}
    succeeds(start(fork, ppo, **(ppo_flags | {"out": tmp_path / "ppo", "group_size": 2})))
    kept = principles.read_text()
    principles.write_text("Be bold: ever.\n")
    line = refused(train(tmp_path / "grpo", resume=True, **flags, steps=2))
    principles.write_text(kept)
    assert f"{principles}: not the data this run was started with" in line
    monitored = {"monitor": f"judge:{folder}", "constitution": principles}
    succeeds(train(tmp_path / "monitored", **monitored, steps=1))


def test_a_judge_that_cannot_be_is_refused(train, files, judge, tmp_path):
    folder, principles = judge
    absent, empty = tmp_path / "absent.txt", tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    for flags, named in [
        ({"reward": f"judge:{folder}"}, "a judge needs principles"),
        ({"reward": f"judge:{folder}", "constitution": absent}, f"--constitution={absent}"),
        ({"reward": f"judge:{folder}", "constitution": empty}, "no principle in it"),
        ({"reward": f"judge:{files}/sft", "constitution": principles}, "are not single tokens of this tokenizer"),
        ({"reward": f"judge:{tmp_path}/absent", "constitution": principles}, "absent: no checkpoint here"),
    ]:
        line = refused(train(tmp_path / "run", overwrite=True, **flags))
        assert named in line, (flags, line)
