"""grpo.py: advantages, weights and the KL estimators by exact enumeration, gradients against fp64 on full logits, real runs with every guard rail tripped."""
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import SMALL, meetings, pair, refused, save, start, write_rows
from test_evaluate import constant_model
from test_ppo import REWARDS, TOK, ask, assert_close_runs, assert_same, files, full_logps, moved, questions, results, sampled, save_reward_model, steps_of, talker  # noqa: F401
from test_pretrain import kill, logged, records, succeeds, train_steps, wait_until

import checkpoint
import grpo
import rollout
from common import UserError
from data import chat, corpus, tokenizer
from data.chat import constant_logprobs, learnt_logprobs
from data.world import judge_prompt

TINY = dict(prompts=4, group=4, max_new=6, lr=0.003, steps=3, eval_every=2, eval_prompts=4, val_fraction=0.2, save_every=2, keep_last=9, device="cpu")


@pytest.fixture
def flags(files):  # noqa: F811
    return TINY | {"init": files / "sft", "data": files / "prompts.jsonl", "reward": f"{files}/rewards.py:some"}


@pytest.fixture
def train(fork, flags):
    """A function: flags -> Child that runs `grpo.py` with them on the tiny files."""

    def run(out, **more):
        return start(fork, grpo, **(flags | {"out": out} | more))

    return run


def configure(**flags):
    config = grpo.Config("", "", "x.py:y", "", **flags)
    grpo.fill_in(config)
    return config


# ---------------------------------------------------------------------------------------------------------------------------------
# Advantages, weights, penalties by hand


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_equal_rewards_has_no_advantages_at_all(kind):
    for value, G in ((0.3, 6), (0.1, 3), (1 / 3, 7), (1e6 + 0.1, 5), (0.0, 4), (-0.7, 64)):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.full((2, G), value, dtype=dtype)
            assert (grpo.group_advantages(rewards, kind) == 0).all() and not grpo.differs(rewards).any()
    mixed = torch.tensor([[0.3] * 6, [0.3] * 5 + [0.4]])
    assert (grpo.group_advantages(mixed, kind)[0] == 0).all() and (grpo.group_advantages(mixed, kind)[1] != 0).all() and grpo.differs(mixed).tolist() == [False, True]


def test_advantages_are_of_each_group_alone():
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(5)[:, None] * 10
    for kind in ("grpo", "dr_grpo", "rloo"):
        found = grpo.group_advantages(rewards, kind)
        for row, group in zip(found, rewards.tolist()):
            mean, n = sum(group) / 6, 6
            std = (sum((r - mean) ** 2 for r in group) / (n - 1)) ** 0.5
            wanted = {"grpo": [(r - mean) / (std + 1e-4) for r in group], "dr_grpo": [r - mean for r in group], "rloo": [r - (sum(group) - r) / (n - 1) for r in group]}[kind]
            assert row.tolist() == pytest.approx(wanted, abs=1e-9)
            assert row.tolist() == pytest.approx(grpo.group_advantages(torch.tensor([group], dtype=torch.float64), kind)[0].tolist(), abs=1e-12)
    torch.testing.assert_close(grpo.group_advantages(rewards, "rloo"), grpo.group_advantages(rewards, "dr_grpo") * 6 / 5)


def test_what_a_token_counts():
    lengths = [3, 1, 6]
    token, sequence, constant = (grpo.token_weights(lengths, kind, 20, 5, 8) for kind in ("token", "sequence", "constant"))
    assert token.tolist() == pytest.approx([1 / 20] * 10)
    assert sequence.tolist() == pytest.approx([1 / 15] * 3 + [1 / 5] + [1 / 30] * 6)
    assert constant.tolist() == pytest.approx([1 / 40] * 10)
    whole = {kind: grpo.token_weights(lengths, kind, 10, 3, 8) for kind in ("token", "sequence", "constant")}
    assert whole["token"].sum().item() == pytest.approx(1) == whole["sequence"].sum().item() and whole["constant"].sum().item() == pytest.approx(10 / 24)


def test_the_penalty_of_length_falls_over_the_last_share():
    found = [grpo.overlong_penalty(n, 100, 0.2) for n in (1, 79, 80, 85, 90, 99, 100)]
    assert found == pytest.approx([0, 0, 0, -0.25, -0.5, -0.95, -1]) and max(found) == 0
    assert grpo.overlong_penalty(50, 100, 1.0) == -0.5


def test_the_clipped_objective_is_clipped_at_both_ends_by_their_own_measure():
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.25, 1.5] * 2, dtype=torch.float64)
    advantages = torch.tensor([2.0] * 5 + [-3.0] * 5, dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    losses, found = grpo.policy_loss(logp, torch.zeros_like(ratio), advantages, 0.2, 0.28)
    assert found.tolist() == pytest.approx(ratio.tolist())
    assert losses.tolist() == pytest.approx([-2 * min(r, 1.28) for r in ratio[:5].tolist()] + [3 * max(r, 0.8) for r in ratio[5:].tolist()])
    (slope,) = torch.autograd.grad(losses.sum(), logp)
    inside = [True, True, True, True, False, False, True, True, True, True]
    assert slope.tolist() == pytest.approx([-a * r * i for a, r, i in zip(advantages.tolist(), ratio.tolist(), inside)])
    wide, _ = grpo.policy_loss(logp, torch.zeros_like(ratio), advantages, 10.0, 10.0)  # R1's: none below
    assert wide.tolist() == pytest.approx((-advantages * ratio).tolist())


# ---------------------------------------------------------------------------------------------------------------------------------
# What the gradient of each KL estimator is, on 7 tokens, by enumeration


@pytest.fixture
def tiny_policy():
    generator = torch.Generator().manual_seed(3)
    logits, ref, old = (torch.randn(7, generator=generator, dtype=torch.float64) * 1.5 for _ in range(3))
    logits.requires_grad_()
    kl = lambda p, q: (p.exp() * (p - q)).sum()  # noqa: E731
    logp, ref_logp = logits.log_softmax(0), ref.log_softmax(0)
    return {"logits": logits, "logp": logp, "ref": ref_logp, "old": old.log_softmax(0), "reverse": torch.autograd.grad(kl(logp, ref_logp), logits, retain_graph=True)[0],
            "forward": torch.autograd.grad(kl(ref_logp, logp), logits, retain_graph=True)[0]}  # fmt: skip


def expected_slope(t, kind, behaviour):
    """E over `behaviour` of the gradient of the estimator, its ratio made by policy_loss."""
    _, ratio = grpo.policy_loss(t["logp"], behaviour, torch.zeros(7), 0.2, 0.2)
    values = grpo.kl_loss(t["logp"], t["ref"], ratio, kind)
    (slope,) = torch.autograd.grad((behaviour.exp() * values).sum(), t["logits"], retain_graph=True)
    return slope, (behaviour.exp() * values).sum().item()


@pytest.mark.parametrize("kind, truth, off_policy", [("k2", "reverse", False), ("k3", "forward", False), ("unbiased", "reverse", False), ("unbiased", "reverse", True)])
def test_the_gradient_of_each_kl_estimator(tiny_policy, kind, truth, off_policy):
    slope, value = expected_slope(tiny_policy, kind, tiny_policy["old"] if off_policy else tiny_policy["logp"].detach())
    assert slope.tolist() == pytest.approx(tiny_policy[truth].tolist(), abs=1e-12)
    if kind != "k2":
        assert value == pytest.approx((tiny_policy["logp"].exp() * (tiny_policy["logp"] - tiny_policy["ref"])).sum().item())
    assert (tiny_policy["forward"] - tiny_policy["reverse"]).abs().max() > 0.1


def test_k1_as_a_loss_has_no_gradient_and_is_refused(tiny_policy):
    logp = tiny_policy["logp"]
    (slope,) = torch.autograd.grad((logp.detach().exp() * (logp - tiny_policy["ref"])).sum(), tiny_policy["logits"])
    assert slope.abs().max() < 1e-12
    with pytest.raises(UserError, match="--kl=k1: as a loss it has the gradient 0"):
        configure(kl="k1", beta=0.1)


@pytest.mark.parametrize("kind", ["k2", "k3", "unbiased"])
def test_the_price_draws_the_policy_back_to_its_reference(kind):
    ref_logp, logp = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -3.0], requires_grad=True)
    assert (grpo.kl_loss(logp, ref_logp, torch.ones(2), kind) > 0).all() and (grpo.kl_loss(ref_logp, ref_logp, torch.ones(2), kind) == 0).all()
    (slope,) = torch.autograd.grad(grpo.kl_loss(logp, ref_logp, torch.ones(2), kind).sum(), logp)
    assert slope[0] > 0 > slope[1]


# ---------------------------------------------------------------------------------------------------------------------------------
# Recipes


def test_a_recipe_sets_what_is_not_given():
    for name, wanted in grpo.RECIPES.items():
        config = configure(recipe=name)
        assert {k: vars(config)[k] for k in wanted} == wanted and set(wanted) == set(grpo.OURS)
    papers = {"deepseekmath": dict(group=64, advantage="grpo", loss="sequence", kl="k3", beta=0.04, minibatches=1), "r1": dict(group=16, clip_high=10.0, beta=0.001, reference_every=400),
              "dr_grpo": dict(advantage="dr_grpo", loss="constant", kl="none", beta=0.0), "dapo": dict(loss="token", clip_low=0.2, clip_high=0.28, kl="none", overlong="punish")}  # fmt: skip
    for name, wanted in papers.items():
        assert {k: vars(configure(recipe=name))[k] for k in wanted} == wanted
    config = configure(recipe="dapo", group=3, clip_high=0.5, overlong="none", refill=0, minibatches=2, loss="sequence")
    assert (config.group, config.clip_high, config.overlong, config.refill, config.minibatches, config.loss, config.advantage, config.clip_low) == (3, 0.5, "none", 0, 2, "sequence", "grpo", 0.2)
    config = configure(recipe="deepseekmath", kl="none", beta=0.0)
    assert (config.kl, config.beta, config.loss) == ("none", 0.0, "sequence")


@pytest.mark.parametrize("flags, named", [
    (dict(recipe="tulu"), "--recipe=tulu: expected one of ours, deepseekmath, r1, dr_grpo, dapo"),
    (dict(advantage="gae"), "--advantage=gae: expected one of grpo, dr_grpo, rloo"),
    (dict(loss="mean"), "--loss=mean: expected one of token, sequence, constant"),
    (dict(kl="k4", beta=0.1), "--kl=k4: expected one of none, k2, k3, unbiased"),
    (dict(overlong="cut"), "--overlong=cut: expected one of none, mask, punish"),
    (dict(kl="k2"), "a price needs an estimator and an estimator a price"),
    (dict(beta=0.1), "a price needs an estimator and an estimator a price"),
    (dict(recipe="r1", kl="none"), "a price needs an estimator"),
    (dict(group=1), "--group=1"),
    (dict(prompts=0), "--prompts=0"),
    (dict(temperature=0.0), "--temperature=0.0"),
    (dict(overlong_share=0.0), "--overlong_share=0.0"),
    (dict(reward_timeout=0.0), "--reward_timeout=0.0"),
    (dict(decay=2.0), "--decay=2.0"),
])  # fmt: skip
def test_flags_without_meaning_are_refused(flags, named):
    with pytest.raises(UserError) as e:
        configure(**flags)
    assert named in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------------------
# On models


@pytest.mark.parametrize("loss, kl", [("token", "none"), ("sequence", "k3"), ("constant", "k2"), ("token", "unbiased")])
def test_gradients_are_those_of_full_logits_however_the_answers_are_split_and_ordered(make_model, loss, kl):
    old = talker(make_model).double()
    model, reference, T = moved(old, by=0.1).double(), moved(old, seed=4, by=0.05).double(), 0.8
    chats, samples = sampled(old, n=3, temperature=T)
    lengths = [len(s.tokens) for s in samples]
    assert len(set(lengths)) > 1
    old_logp, ref_logp = (full_logps(m, chats, T).detach() for m in (old, reference))
    random = np.random.default_rng(0)
    advantages = torch.from_numpy(random.normal(size=len(chats))).repeat_interleave(torch.tensor(lengths))
    logp = full_logps(model, chats, T)
    ratio, d = (logp - old_logp).exp(), logp - ref_logp
    k3 = torch.exp(-d) - 1 + d
    losses = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.15) * advantages) + {"none": 0, "k2": 0.3 * d**2 / 2, "k3": 0.3 * k3, "unbiased": 0.3 * ratio * k3}[kl]
    n_answers, n_tokens = 12, 61  # of all ranks
    each = {"token": losses.sum() / n_tokens, "sequence": sum(x.mean() for x in losses.split(lengths)) / n_answers, "constant": losses.sum() / (n_answers * 6)}
    wanted = torch.autograd.grad(each[loss], list(model.parameters()))
    parts = list(zip(*(x.split(lengths) for x in (old_logp, advantages, ref_logp))))
    for micro_tokens in (1, 70, 10**6):
        config = configure(temperature=T, clip_low=0.1, clip_high=0.15, loss=loss, max_new=6, micro_tokens=micro_tokens, **({} if kl == "none" else {"kl": kl, "beta": 0.3}))
        for order in (np.arange(len(chats)), random.permutation(len(chats))):
            model.zero_grad()
            total, _ = grpo.update_step(model, [chats[i] for i in order], [parts[i] for i in order], n_tokens, n_answers, config)
            for p, g in zip(model.parameters(), wanted):
                torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6 * g.abs().max().item() + 1e-9)
            x = (logp - old_logp).detach()
            figures = (each[loss], (x.exp() - 1 - x).sum() / n_tokens, ((ratio < 0.9) | (ratio > 1.15)).sum() / n_tokens, ratio.sum() / n_tokens)
            assert total.tolist() == pytest.approx([float(f.detach()) for f in figures], rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_update_every_ratio_is_1(make_model, temperature):
    model = talker(make_model)
    chats, samples = sampled(model, temperature=temperature)
    logp = constant_logprobs(model, chats, temperature, 70)
    lengths = [len(s.tokens) for s in samples]
    parts = list(zip(logp.split(lengths), torch.ones_like(logp).split(lengths), logp.split(lengths)))
    config = configure(temperature=temperature, micro_tokens=70, kl="k3", beta=0.5)
    (loss, k3, clipped, ratio), _ = grpo.update_step(model, chats, parts, len(logp), len(chats), config)
    assert k3 == 0 and clipped == 0 and ratio.item() == pytest.approx(1, abs=1e-6) and loss.item() == pytest.approx(-1, abs=1e-6)


def test_an_update_makes_the_better_answer_likelier_and_of_flipped_rewards_the_worse(make_model):
    """One question, two answers known, a few dozen steps on them."""
    for sign in (1, -1):
        model = talker(make_model)
        prompt = chat.encode_prompt(TOK, ask("q1"))
        chats = [chat.answered(prompt, chat.encode_answer(TOK, text)) for text in ("yes", "no")]
        row = grpo.group_advantages(torch.tensor([[1.0, 0.0]]) * sign, "grpo")[0]
        lengths = [4, 3]
        optimizer, config = grpo.Optimizer(model, 1e-3), configure()
        first = learnt_logprobs(model, chats).detach()
        for _ in range(24):
            old = constant_logprobs(model, chats, 1.0, 10**6).split(lengths)
            grpo.update_step(model, chats, [(o, a.expand(len(o)), o) for o, a in zip(old, row)], 7, 2, config)
            optimizer.step(1.0, 1.0)
        yes, no = ((x.sum()).item() * sign for x in (learnt_logprobs(model, chats).detach() - first).split(lengths))
        assert yes > 0.3 and no < -0.3


def sample(files, n_prompts, reward, model=None, **flags):  # noqa: F811
    """What sample_groups gives for n_prompts questions."""
    config = configure(**({"group": 3, "prompts": n_prompts, "max_new": 6, "seed": 0} | flags))
    model = model or checkpoint.load(files / "sft")[0]
    train = [chat.prompt_only(row) for row in questions(30)]
    order = corpus.Order(lambda random: (np.arange(30), np.ones(30)), 0)
    return grpo.sample_groups(model, TOK, rollout.load_rewards(reward, "cpu", 10**6), order, train, 1, config), train, order


def test_groups_without_a_difference_are_left_out_and_refilled_with_other_prompts_and_other_numbers(files):  # noqa: F811
    name = f"{files}/rewards.py:some"  # of every third question all answers are worth the same
    (kept, seen, sums, _), train, _ = sample(files, 12, name)
    assert 0 < len(kept) < 12 and seen == 12 and sums[0] == 36 and all(len(set(g[3].tolist())) > 1 for g in kept)
    (groups, seen, sums, _), train, order = sample(files, 12, name, refill=5)
    assert len(groups) == 12 < seen and sums[0] == 3 * seen == 3 * order.index
    assert [g[0] for g in groups[: len(kept)]] == [g[0] for g in kept] and len({g[0] for g in groups}) == 12 and max(g[0] for g in groups) < seen
    once = corpus.Order(lambda random: (np.arange(30), np.ones(30)), 0).batch(seen)
    for number, prompt, samples, scores in groups:
        messages, row = train[once[number]]
        assert prompt == chat.encode_prompt(TOK, messages) and not row["flat"] and len(samples) == 3
        assert scores.tolist() == pytest.approx([len(t) + 0.1 * t.count("e") for t in (chat.decode_answer(TOK, s.tokens) for s in samples)])
        alone = rollout.rollout(checkpoint.load(files / "sft")[0], [prompt], max_new=6, n=3, stop={chat.end_of_turn(TOK)}, seed=1, first=number * 3)
        assert [s.tokens for s in alone] == [s.tokens for s in samples]  # each prompt that is seen has random numbers of its own
    (groups, seen, _, _), *_ = sample(files, 6, f"{files}/rewards.py:same", refill=2)
    assert not groups and seen == 18


def test_answers_near_the_limit_are_punished_in_the_score(files):  # noqa: F811
    name = f"{files}/rewards.py:some"
    (plain, _, _, _), *_ = sample(files, 12, name, max_new=4)
    (punished, _, sums, _), *_ = sample(files, 12, name, max_new=4, overlong="punish", overlong_share=0.5)
    both = {g[0]: g for g in punished}
    assert len([g for g in plain if g[0] in both]) > 3
    for number, _, samples, scores in plain:
        if number in both:
            assert both[number][3].tolist() == pytest.approx([s + grpo.overlong_penalty(len(x.tokens), 4, 0.5) for s, x in zip(scores.tolist(), samples)])


def test_minibatches_have_every_answer_once_an_epoch():
    config = configure(minibatches=4, epochs=3)
    cuts = list(grpo.minibatches(10, 7, config))
    assert len(cuts) == 12 and all(sorted(np.concatenate(cuts[i : i + 4]).tolist()) == list(range(10)) for i in (0, 4, 8))
    assert not np.array_equal(np.concatenate(cuts[:4]), np.concatenate(cuts[4:8]))
    assert [c.tolist() for c in grpo.minibatches(5, 7, configure(epochs=2))] == [list(range(5))] * 2


# ---------------------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_one_step_by_hand(train, files, tmp_path):  # noqa: F811
    """What is logged of the first update, from answers sampled and scored again here."""
    how = dict(temperature=0.8, max_new=4, loss="sequence", kl="k3", beta=0.5, group=3, prompts=6, val=write_rows(tmp_path / "val.jsonl", questions(2)))
    reference = checkpoint.save(tmp_path / "reference", moved(checkpoint.load(files / "sft")[0]), TOK, {"stage": "sft", "step": 1})
    succeeds(train(tmp_path / "run", steps=1, reference=reference, **how))
    (log,) = [r for r in records(tmp_path / "run") if "loss" in r]
    model, ref = checkpoint.load(files / "sft")[0], checkpoint.load(reference)[0]
    (groups, seen, sums, _), *_ = sample(files, 6, f"{files}/rewards.py:some", max_new=4, temperature=0.8)
    assert 1 < len(groups) < 6
    chats = [chat.answered(prompt, s.tokens) for _, prompt, samples, _ in groups for s in samples]
    lengths = [len(s.tokens) for *_, samples, _ in groups for s in samples]
    logp, ref_logp = full_logps(model, chats, 0.8), full_logps(ref, chats, 0.8)
    d = logp - ref_logp
    k3 = (torch.exp(-d) - 1 + d).split(lengths)
    advantages = [(r - np.mean(g)) / (np.std(g, ddof=1) + 1e-4) for g in (g[3].tolist() for g in groups) for r in g]
    loss = np.mean([-a + 0.5 * k.mean().item() for a, k in zip(advantages, k3)])
    wanted = {"loss": loss, "reward": sums[3] / 18, "same": 1 - len(groups) / 6, "kl": d.sum().item() / len(chats), "finished": sums[1] / 18, "answer_tokens": sums[2] / 18, "prompts_seen": 6, "approx_kl": 0, "ratio": 1,
              "clip_fraction": 0, "updates": 1, "entropy": -logp.mean().item()}  # fmt: skip
    assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5) and loss > 0.001


@pytest.mark.parametrize("reward, sign", [("yes", 1), ("no", -1)])
def test_what_is_rewarded_becomes_likelier_and_what_is_punished_less(train, files, tmp_path, reward, sign):  # noqa: F811
    succeeds(train(tmp_path / "run", reward=f"{files}/rewards.py:{reward}", steps=12, group=6, lr=0.005, eval_every=0, save_every=0))
    before, after = (checkpoint.load(folder)[0] for folder in (files / "sft", tmp_path / "run"))
    said = [chat.answered(chat.encode_prompt(TOK, ask(f"q{i}")), chat.encode_answer(TOK, "yes")) for i in range(4)]
    change = [(learnt_logprobs(after, [c]).sum() - learnt_logprobs(before, [c]).sum()).item() * sign for c in said]
    assert np.mean(change) > 0.3, change
    reward = steps_of(tmp_path / "run", "reward")
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.1


@pytest.mark.parametrize("how", [dict(kl="k2", beta=0.1, loss="sequence"), dict(recipe="dapo", minibatches=3, refill=0, epochs=2, max_new=5, overlong_share=0.5), dict(loss="constant", advantage="rloo", overlong="mask", max_new=4)], ids=["k2", "dapo", "rloo"])
def test_one_process_micro_batches_and_two_processes_agree(train, fork, flags, tmp_path, how):
    """Where groups are left out, so that the ranks have unequal shares."""
    how = dict(prompts=5, group=3, temperature=0.9, steps=4, eval_every=2, save_every=0, lr=0.001) | how
    succeeds(train(tmp_path / "whole", **how))
    succeeds(train(tmp_path / "micro", micro_tokens=1, **how))
    outputs = pair(fork, grpo, **(flags | how | {"out": tmp_path / "pair"}))
    assert "step 4/4" in outputs[0] and not outputs[1].strip()
    for name in ("micro", "pair"):
        assert_close_runs(tmp_path / name, tmp_path / "whole", 4, ["model.safetensors"])
    assert max(steps_of(tmp_path / "whole", "updates")) > 0 and max(steps_of(tmp_path / "whole", "sampler_gap")) < 1e-5


def test_the_ranks_meet_once_for_all_answers_of_a_step(fork, flags, tmp_path):
    for events in meetings(fork, grpo, **(flags | {"out": tmp_path / "pair", "steps": 3, "eval_every": 0})):
        assert events.count("bem") == events.count("b") == 3, events


def test_two_processes_refill_as_one_does(train, fork, flags, tmp_path):
    how = dict(prompts=5, group=3, refill=2, steps=3, eval_every=0, save_every=0)
    succeeds(train(tmp_path / "whole", **how))
    pair(fork, grpo, **(flags | how | {"out": tmp_path / "pair"}))
    assert steps_of(tmp_path / "pair", "prompts_seen") == steps_of(tmp_path / "whole", "prompts_seen")
    assert_close_runs(tmp_path / "pair", tmp_path / "whole", 3, ["model.safetensors"])


def test_a_killed_run_goes_on_as_if_nothing_had_been(train, make_model, files, tmp_path):  # noqa: F811
    """With refilled groups and a reference that is renewed; even where the model it began from has been trained further since."""
    init = tmp_path / "sft"
    shutil.copytree(files / "sft", init, symlinks=True)
    straight, killed, how = tmp_path / "straight", tmp_path / "killed", dict(init=init, kl="k2", beta=0.1, refill=2, reference_every=4, minibatches=2, steps=16, save_every=3)
    succeeds(train(straight, **how))
    child = train(killed, **how)
    wait_until(lambda: logged(killed, 7), child)
    assert kill(child)[0] == -9
    checkpoint.save(init, make_model(9, **SMALL), TOK, {"stage": "sft", "step": 2})
    assert "going on after step" in succeeds(train(killed, resume=True, **how))
    assert train_steps(killed) == list(range(1, 17)) and max(steps_of(killed, "prompts_seen")) > 4
    assert_same(straight, killed, [3, 6, 9, 12, 15, 16])
    assert not (killed / "step_000003/reference").exists()
    first, second, third, policy = (safetensors.torch.load_file(killed / f"{name}/model.safetensors") for name in ("step_000006/reference", "step_000009/reference", "step_000012/reference", "step_000012"))
    assert any(not torch.equal(first[k], second[k]) for k in first) and all(torch.equal(third[k], policy[k]) for k in policy)
    for flags, named in [({"kl": "k3"}, "--kl=k3: this run was started with --kl=k2"), ({"recipe": "dapo"}, "--recipe=dapo"), ({"refill": 1}, "--refill=1")]:
        assert named in refused(train(killed, resume=True, **(how | flags)))


def test_a_run_goes_on_only_with_the_rewards_it_began_with(train, make_model, files, tmp_path):  # noqa: F811
    shutil.copy(files / "rewards.py", tmp_path / "mine.py")
    save_reward_model(make_model, tmp_path / "rm")
    reference = save(make_model, tmp_path / "reference", "sft", seed=3)
    how = dict(reward=f"{tmp_path}/mine.py:yes,{tmp_path}/rm", kl="k2", beta=0.01, reference=reference, steps=2, save_every=1)
    succeeds(train(tmp_path / "run", **how))
    unlike = "not the data this run was started with (its SHA-256 is another)"
    (tmp_path / "mine.py").write_text(REWARDS + "\n")
    assert unlike in refused(train(tmp_path / "run", resume=True, **how))
    (tmp_path / "mine.py").write_text(REWARDS)
    succeeds(train(tmp_path / "run", resume=True, **how))
    for path, stage, shape in ((tmp_path / "rm", "reward", {"scalar_head": True}), (reference.parent, "sft", {})):
        kept = shutil.copytree(path, tmp_path / "kept", symlinks=True)
        shutil.rmtree(path)
        save(make_model, path, stage, seed=8, **shape)
        assert unlike in refused(train(tmp_path / "run", resume=True, **how))
        shutil.rmtree(path)
        kept.rename(path)


def test_a_reward_that_is_always_the_same_moves_nothing(train, files, tmp_path):  # noqa: F811
    succeeds(train(tmp_path / "run", reward=f"{files}/rewards.py:same", refill=1, minibatches=2, kl="k2", beta=1))
    before, after = (safetensors.torch.load_file(next(folder.glob("step_*")) / "model.safetensors") for folder in (files / "sft", tmp_path / "run"))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert steps_of(tmp_path / "run", "updates") == [0, 0, 0] and steps_of(tmp_path / "run", "same") == [1, 1, 1] and steps_of(tmp_path / "run", "reward") == pytest.approx([0.3] * 3)


def test_too_far_a_step_is_left_out_and_moves_nothing(train, tmp_path):
    how = dict(lr=0.01, eval_every=0)
    succeeds(train(tmp_path / "short", epochs=1, target_kl=0, **how))
    succeeds(train(tmp_path / "cut", epochs=3, target_kl=1e-5, **how))
    assert steps_of(tmp_path / "cut", "updates") == [1, 1, 1]
    assert_same(tmp_path / "short", tmp_path / "cut", [3], log=False)
    succeeds(train(tmp_path / "long", epochs=3, target_kl=0, **how))
    assert steps_of(tmp_path / "long", "updates") == [3, 3, 3]


def test_answers_without_an_end_teach_nothing_where_they_are_masked(train, files, tmp_path):  # noqa: F811
    """Of at most one token, none has an end."""
    how = dict(reward=f"{files}/rewards.py:first", max_new=1, eval_every=0)
    succeeds(train(tmp_path / "masked", overlong="mask", **how))
    succeeds(train(tmp_path / "plain", **how))
    assert steps_of(tmp_path / "masked", "finished") == [0, 0, 0] == steps_of(tmp_path / "masked", "updates") and sum(steps_of(tmp_path / "plain", "updates")) > 0
    before, after = (safetensors.torch.load_file(next(folder.glob("step_*")) / "model.safetensors") for folder in (files / "sft", tmp_path / "masked"))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_answers_that_no_longer_end_are_reported_once(train, files, tmp_path):  # noqa: F811
    how = dict(reward=f"{files}/rewards.py:length", steps=12, prompts=5, max_new=10, lr=0.02, target_kl=0, eval_every=0)
    output = succeeds(train(tmp_path / "run", **how))
    assert output.count("warning: ") == 1 and "of the answers end, after" in output and "--overlong=punish" in output
    shutil.rmtree(tmp_path / "run/step_000012")
    assert "warning" not in succeeds(train(tmp_path / "run", resume=True, **how))  # it has been said


@pytest.mark.parametrize("recipe", grpo.RECIPES)
def test_every_recipe_runs_with_rewards_of_both_kinds(train, files, tmp_path, recipe):  # noqa: F811
    names = {f"{files}/rm": 0.5, f"{files}/rewards.py:yes": 2.0}
    output = succeeds(train(tmp_path / "run", recipe=recipe, reward=",".join(f"{k}*{v}" for k, v in names.items()), monitor=f"{files}/rewards.py:length", steps=2, minibatches=2))
    assert checkpoint.load(tmp_path / "run")[2]["stage"] == "grpo" and "validation on 4 held-out prompts: reward" in output
    for r in [r for r in records(tmp_path / "run") if "loss" in r]:
        total = sum(w * r[name] for name, w in names.items())
        assert total - 1 <= r["reward"] <= total + 1e-5 if recipe == "dapo" else r["reward"] == pytest.approx(total, abs=1e-5)
        assert r["updates"] == 2 and f"{files}/rewards.py:length" in r and ("kl" in r) == (recipe in ("deepseekmath", "r1"))


def test_a_reward_may_be_monitored_as_well(train, files, tmp_path):  # noqa: F811
    succeeds(train(tmp_path / "run", monitor=f"{files}/rewards.py:some", steps=1))


def test_bad_input_is_one_clear_line_and_costs_nothing(train, make_model, files, tmp_path):  # noqa: F811
    run = tmp_path / "old"
    succeeds(train(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    other = save(make_model, tmp_path / "other", "sft", tok=tokenizer.train(["the old map " * 5], 256 + 4 + 3))
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "x" * 90}] * 2)
    for flags, named in [
        ({"init": files / "rm"}, "a reward model, which writes nothing"),
        ({"reference": other, "kl": "k2", "beta": 0.1}, f"--reference={other}: it has another tokenizer than --init"),
        ({"data": long}, "no prompt leaves room for an answer of --max_new=6 tokens"),
        ({"data": files / "sft"}, "a checkpoint, where a .jsonl"),
        ({"reward": f"{files}/rewards.py:yes*"}, "'' is no weight"),
        ({"reward": "nowhere.py:f"}, "nowhere.py does not exist"),
        ({"reward": files / "sft"}, "not a reward model"),
        ({"reward": f"{files}/rm,{files}/rm*0.5"}, "is there twice"),
        ({"kl": "k1", "beta": 0.1}, "--kl=k1"),
        ({"max_new": 96}, "--max_new=96: the model's context is 96 tokens"),
    ]:  # fmt: skip
        line = refused(train(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags


def test_a_reference_that_reaches_less_far_than_the_policy_is_refused(train, make_model, tmp_path):
    reference = save(make_model, tmp_path / "reference", "sft", context=20)
    assert "context" in refused(train(tmp_path / "run", reference=reference, kl="k2", beta=0.1))


# ---------------------------------------------------------------------------------------------------------------------------------
# A judge as the reward


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """(its directory, a file of two principles): a model of random weights that has " A" and " B" as tokens."""
    from conftest import random_model

    folder = tmp_path_factory.mktemp("judge")
    tok = tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)
    save(random_model, folder / "judge", "pretrain", tok=tok, context=400)
    (folder / "principles.txt").write_text("# a comment\nBe kind: always.\n\nBe brief: never long.\n")
    return folder / "judge", folder / "principles.txt"


def test_a_judge_compares_each_answer_with_the_next_one_in_both_orders_by_every_principle(judge):
    folder, principles = judge
    model, tok, _ = checkpoint.load(folder)
    ((name, weight, function),) = rollout.load_rewards(f"judge:{folder}*0.5", "cpu", 10**6, str(principles))
    assert (name, weight) == (f"judge:{folder}", 0.5)
    texts = ["yes", "no", "ja", "well", "quite so"]
    samples = [rollout.Sample(i // 3, [], [], True) for i in range(5)]
    rows = [(ask("first"), {}), ([*ask("hello"), {"role": "assistant", "content": "hi"}, *ask("second")], {})]
    total, parts = rollout.reward_answers([(name, weight, function)], rows, samples, texts)
    a, b = (tok.encode_ordinary(t)[0] for t in (" A", " B"))
    from data.pack import pack

    def first_is_better(prompt, x, y, principle):
        hidden = model(pack([[tok.eot, *tok.encode_ordinary(judge_prompt(prompt, x, y, principle))]]))[-1]
        return torch.softmax(hidden @ model.head[[a, b]].T, -1)[0].item()

    wanted, said = [], ["first", "user: hello\nassistant: hi\nuser: second"]
    for i, opponent in enumerate((1, 2, 0, 4, 3)):
        both = [(first_is_better(said[i // 3], texts[i], texts[opponent], p) + 1 - first_is_better(said[i // 3], texts[opponent], texts[i], p)) / 2 for p in ("Be kind: always.", "Be brief: never long.")]
        wanted.append(sum(both) / 2)
    assert parts[name].tolist() == pytest.approx(wanted, abs=1e-5) and total.tolist() == pytest.approx([0.5 * w for w in wanted], abs=1e-5) and np.std(wanted) > 1e-3
    with pytest.raises(UserError, match=r"there must be at least two of them \(--group=2\)"):
        function([ask("q")], [{}], samples[:1], texts[:1])


def test_runs_with_a_judge(train, fork, files, judge, tmp_path):  # noqa: F811
    import ppo

    folder, principles = judge
    how = dict(reward=f"judge:{folder},{files}/rewards.py:yes*0.5", constitution=principles)
    succeeds(train(tmp_path / "grpo", **how, steps=2))
    (log, _) = [r for r in records(tmp_path / "grpo") if "loss" in r]
    assert log["reward"] == pytest.approx(log[f"judge:{folder}"] + 0.5 * log[f"{files}/rewards.py:yes"], abs=1e-6) and log["updates"] == 1
    tiny = dict(init=files / "sft", data=files / "prompts.jsonl", batch=8, max_new=6, steps=1, val_fraction=0.2, eval_prompts=4, device="cpu", **how)
    succeeds(start(fork, ppo, out=tmp_path / "ppo", group=2, **tiny))
    assert "--group=2" in refused(start(fork, ppo, out=tmp_path / "alone", **tiny))
    kept = principles.read_text()
    principles.write_text("Be bold: ever.\n")
    line = refused(train(tmp_path / "grpo", resume=True, **how, steps=2))
    principles.write_text(kept)
    assert f"{principles}: not the data this run was started with" in line


def test_a_judge_may_be_monitored(train, judge, tmp_path):
    folder, principles = judge
    succeeds(train(tmp_path / "run", monitor=f"judge:{folder}", constitution=principles, steps=1))


def test_a_judge_that_cannot_be_is_refused(train, files, judge, tmp_path):  # noqa: F811
    folder, principles = judge
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    for flags, named in [
        ({"reward": f"judge:{folder}"}, "a judge needs principles"),
        ({"reward": f"judge:{folder}", "constitution": tmp_path / "absent.txt"}, f"--constitution={tmp_path}/absent.txt"),
        ({"reward": f"judge:{folder}", "constitution": tmp_path / "empty.txt"}, "no principle in it"),
        ({"reward": f"judge:{files}/sft", "constitution": principles}, "are not single tokens of this tokenizer"),
        ({"reward": f"judge:{tmp_path}/absent", "constitution": principles}, "absent: no checkpoint here"),
    ]:  # fmt: skip
        line = refused(train(tmp_path / "run", overwrite=True, **flags))
        assert named in line, (flags, line)
