"""The benches of the stages after fine-tuning at toy sizes: they prove that contenders do the same
before they time them, and print what they were asked for."""

import importlib.util
import json
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT

import rollout
from bench import mutants, peers, preference, products, rl, rollout as bench_rollout
from data.pack import Chat, pack
from model import config_for, logprobs
from runtime.errors import UserError


@pytest.fixture
def pairs(tmp_path):
    """A file of preferences whose lengths differ."""
    path, words = (
        tmp_path / "pairs.jsonl",
        "the cat sat on a mat and looked at its own tail while nobody else was there to see".split(),
    )
    with open(path, "w", encoding="utf-8") as f:
        for i in range(24):
            row = {}
            for name, n, shift in (
                ("prompt", 2 + i % 5, 3),
                ("chosen", 1 + i * 7 % 12, 5),
                ("rejected", 1 + i * 11 % 17, 7),
            ):
                row[name] = " ".join(words[(i * shift + j) % len(words)] for j in range(n))
            f.write(json.dumps(row | {"rejected": row["rejected"] + " not"}) + "\n")
    return path


SIZES = dict(depth=1, width=32, vocab=300, context=128, device="cpu")


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().split("\n")[-1])


def test_padding_fills_up_to_the_longest_and_is_not_trained():
    a, b = (
        Chat(np.array([5, 6, 7], np.int32), np.array([False, True, True])),
        Chat(np.array([8], np.int32), np.array([False])),
    )
    long, short = preference.fill_up([a, b], 9)
    assert (
        long.ids.tolist() == [5, 6, 7] and short.ids.tolist() == [8, 9, 9] and short.loss_mask.tolist() == [False] * 3
    )


def test_packed_padded_and_uncached_are_proved_equal_and_timed(pairs, capsys, monkeypatch):
    monkeypatch.setattr(
        preference, "apart", lambda function, *args: max(1, function(*args))
    )  # five processes would take longer than all the rest
    preference.main(preference.Config(data=str(pairs), pairs=4, steps=2, **SIZES))
    found = last_line(capsys)
    assert 0 < found["real_share_of_padded"] < 1 and set(found["reached"]) == {"DPO packed", "SFT packed", "cache"}
    for stage, way in preference.CONTENDERS:
        row = found[f"{stage} {way}"]
        assert row["tokens_per_s"] > 0 and row["mib"] > 0
    assert found["saved"]["of_1_epochs"] == 0


def test_contenders_that_differ_are_not_timed(pairs, monkeypatch):
    monkeypatch.setattr(preference, "fill_up", lambda chats, pad: [Chat(c.ids[::-1], c.loss_mask) for c in chats])
    with pytest.raises(UserError, match="DPO, padded: these losses or gradients are not the packed ones"):
        preference.main(preference.Config(data=str(pairs), pairs=4, steps=1, **SIZES))


def test_a_file_with_too_few_pairs_says_how_many_are_needed(pairs):
    with pytest.raises(UserError, match="24 pairs; 110 are needed"):
        preference.main(preference.Config(data=str(pairs), pairs=10, steps=10, **SIZES))


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
def test_our_dpo_and_trls_train_alike(pairs, capsys):
    peers.main(peers.Config(data=str(pairs), pairs=6, batch=2, rounds=1, **SIZES))
    found = last_line(capsys)["dpo"]
    assert set(found["contenders"]) == {"feinschliff", "TRL", "TRL, reference first"}
    assert found["reached"]["first_loss"] and found["reached"]["losses"]
    losses = found["contenders"]["feinschliff"]["losses"]
    assert len(losses) == 3 and abs(losses[2] - losses[0]) > 1e-4  # at equal losses of ln 2 little would be shown


def test_an_unknown_contest_is_named():
    with pytest.raises(UserError, match="--only=chess: expected some of dpo"):
        peers.main(peers.Config(data="", only="chess"))


def test_an_endless_model_is_one_that_never_says_what_ends():
    shape = config_for(2, 64, 32, context=64)
    model = peers.endless(shape, [3, 60])
    samples = rollout.rollout(model, [[1, 2], [5]], max_new_tokens=60, n=30, stop={3, 60})
    assert not any(s.finished for s in samples) and len({t for s in samples for t in s.tokens}) == 62


@pytest.fixture
def ours_here(monkeypatch):
    """Ours in this process: another one spends seconds on imports. Theirs change the settings of
    logging, and stay apart."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }  # which a run takes over
    for bench in (peers, rl):
        monkeypatch.setattr(
            bench,
            "apart",
            lambda function, *args: (
                preference.apart(function, *args)
                if function.__name__.startswith(("trl_", "their_"))
                else function(*args)
            ),
        )
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_our_rollout_and_transformers_generate(pairs, capsys, ours_here):
    peers.main(peers.Config(data=str(pairs), only="rollout", samples=6, new=12, rounds=1, **SIZES))
    found = last_line(capsys)["rollout"]
    assert (
        set(found["contenders"]) == {"feinschliff", "transformers"} and found["same"] >= 0.95 and found["asked"] == 3.0
    )
    assert all(row["tokens_per_s"] > 0 for row in found["contenders"].values())


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
def test_our_grpo_and_trls(pairs, capsys, ours_here):
    peers.main(peers.Config(data=str(pairs), only="grpo", samples=4, group=2, new=8, steps=2, rounds=1, **SIZES))
    found = last_line(capsys)["grpo"]
    ours, theirs = (found["contenders"][name] for name in ("feinschliff", "TRL"))
    assert (
        ours["entropy"] == pytest.approx(theirs["entropy"], abs=1)
        and len(ours["seconds_of_steps"]) == len(theirs["seconds_of_steps"]) == 2
    )


def test_answers_that_end_early_are_not_timed(pairs, monkeypatch):
    monkeypatch.setattr(
        peers, "apart", lambda function, *args: {"seconds": 1.0, "lengths": [[12, 11]], "greedy": [[1]]}
    )
    with pytest.raises(UserError, match="ended early"):
        peers.main(peers.Config(data=str(pairs), only="rollout", samples=6, new=12, rounds=1, **SIZES))


ROLLOUT = dict(depth=1, width=32, vocab=300, slots="4,2", prompts="5", news="12", waves=2, rounds=1, device="cpu")


def test_the_engine_and_the_plain_loops_are_the_same_model_and_timed(capsys):
    bench_rollout.main(bench_rollout.Config(**ROLLOUT))
    found = last_line(capsys)
    assert {(row["slots"], row["varying"]) for row in found["rows"]} == {(4, False), (2, False), (4, True), (2, True)}
    assert {"rollout", "plain"} <= {row["contender"] for row in found["rows"]} and isinstance(found["reached"], bool)
    for row in found["rows"]:
        assert row["tokens_per_s"] > 0 and (
            1 <= row["mean_length"] < 12 if row["varying"] else row["mean_length"] == 12
        )


def test_the_plain_loop_is_the_model(make_model):
    model = make_model(vocab_size=40).eval()
    loop, prompts = bench_rollout.Plain(model), [[3, 4, 5, 6], [7, 8, 9, 1]]
    tokens, logps = loop.sample(prompts, 7, set())
    packed = pack([a + b for a, b in zip(prompts, tokens.tolist())])
    for whole, part in zip(logprobs(model, packed).detach().split(11), logps):
        torch.testing.assert_close(whole[4:], part, rtol=0, atol=1e-5)
    assert loop.sample(prompts, 7, set(range(40)))[0].shape == (2, 1)  # all have ended


def test_a_contender_of_another_model_is_not_timed(monkeypatch):
    monkeypatch.setitem(
        bench_rollout.CONTENDERS,
        "plain",
        lambda model, device: bench_rollout.plain(preference.fresh(model.config, 5, device), device),
    )
    with pytest.raises(UserError, match="rollout: only .* of its greedy tokens"):
        bench_rollout.main(bench_rollout.Config(**ROLLOUT))


def test_the_floor_of_a_rollout_by_hand(make_model):
    model = make_model(vocab_size=10, layers=1, width=8, heads=2, kv_heads=1, head_dim=4, ffn=6)
    weights = 4 * (16 * 8 + 8 * 8 + 12 * 8 + 6 * 8 + 10 * 8)  # qkv, out, gate and up, down, head
    read = (
        2 * 4 * 4 * ((5 + 1) + (5 + 2) + (5 + 3) + (5 + 1))
    )  # two answers of 3 and of 1 tokens to prompts of 5; keys and values
    assert bench_rollout.floor(model, [3, 1], 2, 5, 1000.0) == pytest.approx((weights * 4 / 2 + read) / 1000)


def test_a_steps_seconds_are_split(capsys, monkeypatch):
    monkeypatch.setattr(
        rl,
        "run",
        lambda script, *args: [
            {
                "seconds": 4.0,
                "seconds_rollout": r,
                "seconds_scoring": 1.0,
                "seconds_update": 1.0,
                "completion_tokens": 6.0,
                "updates": 1,
            }
            for r in (9.0, 2.0, 2.0)
        ],
    )
    monkeypatch.setattr(rl, "apart", lambda function, *args: function(*args))
    rl.main(rl.Config(answers=4, group=2, max_new_tokens=6, depth=1, width=32, vocab=320, device="cpu"))
    assert last_line(capsys)["ppo"] == {
        "seconds": 4.0,
        "tokens_per_s": 6.0,
        "seconds_rollout": 2.0,
        "seconds_scoring": 1.0,
        "seconds_update": 1.0,
        "updates": 1,
    }


def test_the_real_scripts_give_a_steps_seconds(capsys, ours_here):
    rl.main(
        rl.Config(answers=4, group=2, prompt=6, max_new_tokens=6, steps=2, depth=1, width=32, vocab=320, device="cpu")
    )
    found = last_line(capsys)
    for script in ("ppo", "grpo"):
        row = found[script]
        assert (
            row["tokens_per_s"] > 0
            and 0 < row["seconds_rollout"] + row["seconds_scoring"] + row["seconds_update"] <= row["seconds"] + 0.01
        )
    with pytest.raises(UserError, match="multiple of --group"):
        rl.main(rl.Config(answers=5, group=2))


def test_both_libraries_multiply_and_are_timed(capsys):
    products.main(products.Config(rows="1,20", shapes="256x256", turns=1))
    found = last_line(capsys)
    assert {(row["rows"], row["product"]) for row in found} == {
        (rows, name) for rows in (1, 20) for name in ("y", "yt", "dx", "dW")
    } and all(row["plain"] > 0 < row["onednn"] for row in found)


def test_every_mutant_can_be_planted():
    """Its text is once in its file, and no two have one name."""
    names = [name for name, *_ in mutants.MUTANTS]
    assert len(set(names)) == len(names)
    wrong = {name: file for name, file, old, *_ in mutants.MUTANTS if (ROOT / file).read_text().count(old) != 1}
    assert not wrong
