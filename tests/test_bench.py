"""The benches of the preference stages at toy sizes: they prove that contenders do the same before they time them, and print what they were asked for."""
import importlib.util
import json

import numpy as np
import pytest

from bench import peers, preference
from common import UserError
from data.chat import Chat


@pytest.fixture
def pairs(tmp_path):
    """A file of preferences whose lengths differ."""
    path, words = tmp_path / "pairs.jsonl", "the cat sat on a mat and looked at its own tail while nobody else was there to see".split()
    with open(path, "w", encoding="utf-8") as f:
        for i in range(24):
            text = lambda n, shift: " ".join(words[(i * shift + j) % len(words)] for j in range(n))  # noqa: E731
            f.write(json.dumps({"prompt": text(2 + i % 5, 3), "chosen": text(1 + i * 7 % 12, 5), "rejected": text(1 + i * 11 % 17, 7) + " not"}) + "\n")
    return path


SIZES = dict(depth=1, width=32, vocab=300, context=128, device="cpu")


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().split("\n")[-1])


def test_padding_fills_up_to_the_longest_and_is_not_learnt():
    a, b = Chat(np.array([5, 6, 7], np.int32), np.array([False, True, True])), Chat(np.array([8], np.int32), np.array([False]))
    long, short = preference.fill_up([a, b], 9)
    assert long.ids.tolist() == [5, 6, 7] and short.ids.tolist() == [8, 9, 9] and short.learnt.tolist() == [False] * 3


def test_packed_padded_and_uncached_are_proved_equal_and_timed(pairs, capsys, monkeypatch):
    monkeypatch.setattr(preference, "apart", lambda function, *args: max(1, function(*args)))  # five processes would take longer than all the rest
    preference.main(preference.Config(data=str(pairs), pairs=4, steps=2, **SIZES))
    found = last_line(capsys)
    assert 0 < found["real_share_of_padded"] < 1 and set(found["reached"]) == {"DPO packed", "SFT packed", "cache"}
    for stage, way in preference.CONTENDERS:
        row = found[f"{stage} {way}"]
        assert row["tokens_per_s"] > 0 and row["mib"] > 0
    assert found["saved"]["of_1_epochs"] == 0


def test_contenders_that_differ_are_not_timed(pairs, monkeypatch):
    monkeypatch.setattr(preference, "fill_up", lambda chats, pad: [Chat(c.ids[::-1], c.learnt) for c in chats])
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
    assert len(losses) == 3 and abs(losses[2] - losses[0]) > 1e-4  # something is learnt: at equal losses of ln 2 little would be shown


def test_an_unknown_contest_is_named():
    with pytest.raises(UserError, match="--only=chess: expected some of dpo"):
        peers.main(peers.Config(data="", only="chess"))
