"""rlaif.py: soft labels against the model's own probabilities, both orders, what is dropped and counted; a run that was cut anywhere ends in the same bytes."""
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from runs import SMALL, here, refused, save, start, write_rows
from test_pretrain import succeeds

import checkpoint
import dpo
import rlaif
from common import UserError
from data import chat, tokenizer
from data.pack import pack
from data.world import PRINCIPLES, judge_prompt, pair
from model import logprobs
from rollout import read_constitution, scores

TOK = tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)  # " A" and " B" are single tokens
A, B = (TOK.encode_ordinary(text)[0] for text in (" A", " B"))
LONG, KIND, SHORT = "Be long.", "Be kind.", "Be short."


def ending(make_model, seed, **shape):
    """A model with random weights that ends what it writes after a handful of tokens: one channel is much the same everywhere, and the ends read it."""
    model = make_model(seed, **(SMALL | {"vocab_size": TOK.n_vocab, "context": 640} | shape))
    with torch.no_grad():
        model.embed[:, 0] += 10.0
        model.untied_head[[chat.end_of_turn(TOK), TOK.eot], 0] += 1.4
    return model


@pytest.fixture
def files(make_model, tmp_path):
    """A policy and a judge with random weights, a constitution and prompts."""
    for name, stage, seed in (("sft", "sft", 0), ("base", "pretrain", 5)):
        checkpoint.save(tmp_path / name, ending(make_model, seed), TOK, {"stage": stage, "step": 1, "config": {}, "data": {}, "lineage": []})
    (tmp_path / "constitution.txt").write_text(f"# ours\n{LONG}\n\n{KIND}\n")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Number {i}?", "answer": str(i)} for i in range(10)])
    return tmp_path


def config(files, **flags):
    flags = {"policy": files / "sft", "judge": files / "base", "data": files / "prompts.jsonl", "out": files / "out.jsonl", "constitution": files / "constitution.txt"} | flags
    settings = dict(device="cpu", max_new=30, batch=4, min_margin=0.0) | {k: str(v) if isinstance(v, os.PathLike) else v for k, v in flags.items()}
    return rlaif.Config(**settings)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log(path):
    """Its records without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows(path.with_suffix(".log.jsonl"))]


def judged(monkeypatch, some, texts, **flags):
    """`judge_batch` on pairs of a file, by a judge whose taste is known: length for LONG, less length for SHORT, "kind" for KIND; and that says " A" too often."""
    taste = {LONG: len, SHORT: lambda text: -len(text), KIND: lambda text: 3 * text.count("kind")}

    def score(model, tok, triples, principle, micro_tokens):
        lead = np.array([taste[principle](a) - taste[principle](b) for _, a, b in triples], dtype=np.float64)
        return 1 / (1 + np.exp(-np.stack([lead + 0.4, lead - 0.4], 1)))

    monkeypatch.setattr(rlaif, "judge_score", score)
    settings = rlaif.Config("", "", "", **({"min_margin": 0.0} | flags))
    model = type("Judge", (), {"config": type("Shape", (), {"context": 150})})
    return rlaif.judge_batch(settings, None, (model, TOK, {}), texts, [], [rlaif.two_answers(row) for row in some], 0)


PAIRS = [
    {"prompt": "q1", "chosen": "aaa", "rejected": "bb", "answer": "5", "gold_chosen": 1.0, "gold_rejected": 0.5, "chosen_model": "x", "rejected_model": "y"},
    {"prompt": "q2", "chosen": "a", "rejected": "b kind", "answer": "6", "gold_chosen": 0.0, "gold_rejected": 2.0, "chosen_model": "x", "rejected_model": "y"},
    {"prompt": "q3", "reply_a": "aaa", "reply_b": "bbb"},
    {"prompt": "q4", "reply_a": "same", "reply_b": "same", "better": "A"},
    {"prompt": "q5", "reply_a": "a", "reply_b": "b" * 200, "better": "A"},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q6"}], "reply_a": "kind", "reply_b": "bbbbbb", "better": "A"},
]  # fmt: skip


def test_the_preferred_side_is_written_with_the_probability_of_it_and_what_belongs_to_a_side_goes_with_it(monkeypatch):
    both = lambda lead: np.mean([1 / (1 + np.exp(-lead - 0.4)), 1 / (1 + np.exp(-lead + 0.4))])  # noqa: E731
    written, counts, figures = judged(monkeypatch, PAIRS, [LONG])
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in written] == [("q1", "aaa", "bb"), ("q2", "b kind", "a"), (PAIRS[-1]["prompt"], "bbbbbb", "kind")]
    assert [r["probability"] for r in written] == pytest.approx([both(1), both(5), both(2)], abs=2e-6)
    for r, lead in zip(written, (1, 5, 2)):
        assert r["verdicts"] == [pytest.approx([1 / (1 + np.exp(-lead - 0.4)), 1 / (1 + np.exp(-lead + 0.4))], abs=1e-4)] and r["principle"] == LONG
    assert (written[1]["gold_chosen"], written[1]["gold_rejected"], written[1]["chosen_model"], written[1]["rejected_model"]) == (2.0, 0.0, "y", "x")
    assert written[0]["gold_chosen"] == 1.0 and written[0]["answer"] == "5" and not {"reply_a", "better"} & written[2].keys()
    assert counts == {"prompts": 6, "ties (twice the same answer)": 1, "pairs too long for the judge": 1, "pairs judged": 4, "pairs kept": 3, "pairs dropped, too near to 1/2": 1}
    agrees = lambda name: np.asarray(figures[f"agrees with {name}"]).tolist()  # noqa: E731
    assert agrees("the labels, all pairs") == [True, False, False] and agrees("gold, all pairs") == agrees("gold, kept pairs") == [True, True]  # q3 has no label
    assert (np.array(figures['position bias (how much " A" is said)']) > 0.5).all()
    assert np.mean(figures["the two orders contradict each other"]) == 0.25  # q3, where only the place speaks


def test_principles_make_one_probability_by_mean_or_vote_or_chance(monkeypatch):
    alone = {p: {str(r["prompt"]): (r["chosen"], r["probability"]) for r in judged(monkeypatch, PAIRS, [p])[0]} for p in (LONG, KIND, SHORT)}
    written, _, figures = judged(monkeypatch, PAIRS, [LONG, KIND])
    by = {str(r["prompt"]): r for r in written}
    assert by["q2"]["probability"] == pytest.approx((alone[LONG]["q2"][1] + alone[KIND]["q2"][1]) / 2, abs=2e-6) and len(by["q2"]["verdicts"]) == 2
    assert by["q1"]["probability"] == pytest.approx((alone[LONG]["q1"][1] + 0.5) / 2, abs=2e-6) and "principle" not in by["q1"]
    assert len(figures[f"agrees with gold, by: {KIND}"]) == 2
    voted = {str(r["prompt"]): r["probability"] for r in judged(monkeypatch, PAIRS, [LONG, KIND], principles="vote")[0]}
    assert voted == {"q1": 0.75, "q2": 1.0}  # KIND abstains on q1; on the last pair one is for each side
    assert {str(r["prompt"]) for r in judged(monkeypatch, PAIRS, [LONG, KIND, SHORT], principles="vote", min_margin=0.3)[0]} == set()
    found = judged(monkeypatch, [dict(PAIRS[1], prompt=f"q{i}") for i in range(90)], [LONG, KIND, SHORT], principles="random")[0]
    assert {p: sum(r["principle"] == p for r in found) > 15 for p in (LONG, KIND, SHORT)} == {LONG: True, KIND: True, SHORT: True}
    assert all((r["chosen"], r["probability"]) == alone[r["principle"]]["q2"] for r in found)
    assert rlaif.random_principles(9, "abc", 7, 0).tolist() == [*rlaif.random_principles(4, "abc", 7, 0), *rlaif.random_principles(5, "abc", 7, 4)]


@pytest.mark.parametrize("margin, kept", [(0.0, ["q1", "q2", "q6"]), (0.21, ["q1", "q2", "q6"]), (0.25, ["q2", "q6"]), (0.499, [])])
def test_pairs_nearer_to_a_half_than_the_margin_are_dropped(monkeypatch, margin, kept):
    written, counts, _ = judged(monkeypatch, PAIRS, [LONG], min_margin=margin)
    assert [r["prompt"][-1]["content"] if isinstance(r["prompt"], list) else r["prompt"] for r in written] == kept
    assert (counts["pairs kept"], counts["pairs dropped, too near to 1/2"]) == (len(kept), 4 - len(kept))


def test_verdicts_are_the_models_own_probabilities(make_model):
    model = make_model(7, **(SMALL | {"vocab_size": TOK.n_vocab, "context": 256})).eval()
    triples, principles, which = [("q1", "one", "two"), ("q2", "x", "and y")], [LONG, KIND], np.array([[0, 1], [1, 0]])
    p = rlaif.verdicts(model, TOK, triples, principles, which, 150)

    def says_a(*question):
        ids = [TOK.eot, *TOK.encode_ordinary(judge_prompt(*question))]
        a, b = (logprobs(model, pack([[*ids, label]]))[-1].item() for label in (A, B))
        return np.exp(a) / (np.exp(a) + np.exp(b))

    for i, (q, one, two) in enumerate(triples):
        for k, j in enumerate(which[i]):
            assert p[i, k] == pytest.approx([says_a(q, one, two, principles[j]), 1 - says_a(q, two, one, principles[j])], rel=1e-4)
    assert p.std() > 0.01


def test_sampled_pairs_are_different_whole_answers_and_do_not_depend_on_the_batch(make_model):
    model = ending(make_model, 2, context=96)
    some = [chat.prompt_only({"prompt": text}) for text in ("a", "bb", "c" * 200, "d", "e")]
    settings = rlaif.Config("", "", "", n=4, max_new=12)
    pairs, counts = rlaif.sampled_pairs(settings, (model, TOK), some[:2], 0)
    assert pairs and all(a != b and a and b for _, a, b in pairs) and len(pairs) == len(set(pairs))
    assert counts["answers cut or empty"] and counts["prompts too long"] == 0
    alone = rlaif.sampled_pairs(settings, (model, TOK), some[1:2], 1)[0]
    assert [p[1:] for p in alone] == [p[1:] for p in pairs if p[0] == 1]
    pairs, counts = rlaif.sampled_pairs(settings, (model, TOK), some, 0)
    assert counts["prompts too long"] == 1 and 2 not in {i for i, _, _ in pairs} and {i for i, _, _ in pairs} >= {3, 4} - {2}
    assert rlaif.sampled_pairs(settings, (model, TOK), some[2:3], 2)[0] == []
    same = rlaif.sampled_pairs(rlaif.Config("", "", "", n=4, max_new=12, temperature=0), (model, TOK), some[:1], 0)
    assert same[0] == [] and same[1]["ties (twice the same answer)"] + same[1]["answers cut or empty"] in (4, 6)  # all four the same: six ties, or all cut


def test_a_run_writes_what_dpo_reads_soft_labels_and_all(files, capsys):
    here(rlaif.main, config(files, n=3, reward=f"{files}/mine.py:length") if (files / "mine.py").write_text("def length(prompt, completion, row):\n    return len(completion) + 0 * int(row['answer'])\n") else None)
    out = files / "out.jsonl"
    written, shown = rows(out), capsys.readouterr().out
    assert "agrees with the reward, kept pairs" in shown and "position bias" in shown and "prompts a second" in shown
    pairs, _ = chat.read(str(out), chat.preference)
    assert len(pairs) == log(out)[-1]["counts"]["pairs kept"] > 9 and all(r["answer"] == r["prompt"][7:-1] for r in written)
    _, known = dpo.read_items(TOK, pairs, kto=False)
    assert known == [r["probability"] for r in written] and all(0.5 < p < 1 for p in known)
    total, n = log(out)[-1]["figures"]["agrees with the reward, kept pairs"]
    lead = [len(r["chosen"]) - len(r["rejected"]) for r in written]
    assert (total, n) == (sum(x > 0 for x in lead), sum(x != 0 for x in lead))


@pytest.mark.parametrize("mode", ["judge", "revise"])
def test_a_run_cut_anywhere_ends_in_the_same_bytes(files, mode, monkeypatch):
    flags = dict(mode=mode, principles="random", ask="text", max_new=60)
    here(rlaif.main, config(files, out=files / "whole.jsonl", **flags))
    whole = (files / "whole.jsonl").read_bytes()
    assert len(whole) > 500
    ends = [r["bytes"] for r in log(files / "whole.jsonl")[1:]]
    assert ends[-1] == len(whole) and [r["rows"] for r in log(files / "whole.jsonl")[1:]] == [4, 8, 10]
    work, done = getattr(rlaif, f"{mode}_batch"), []
    monkeypatch.setattr(rlaif, f"{mode}_batch", lambda *args: done.append(args[-1]) or work(*args))
    for size in (0, 7, ends[0] - 1, ends[0], ends[0] + 40, ends[1], len(whole) - 1, len(whole)):
        cut = files / "cut.jsonl"
        cut.write_bytes(whole[:size])
        shutil.copy(files / "whole.log.jsonl", files / "cut.log.jsonl")
        done.clear()
        here(rlaif.main, config(files, out=cut, resume=True, **flags))
        assert cut.read_bytes() == whole and log(cut)[1:] == log(files / "whole.jsonl")[1:]
        assert done == [first for first, end in zip((0, 4, 8), ends) if end > size]  # what is whole is not made again
    (files / "cut.log.jsonl").write_bytes((files / "whole.log.jsonl").read_bytes()[:-9])  # and where it was the log's last line that was cut
    here(rlaif.main, config(files, out=cut, resume=True, **flags))
    assert cut.read_bytes() == whole and log(cut)[1:] == log(files / "whole.jsonl")[1:]


def test_only_the_same_run_is_gone_on_with(files, fork):
    flags = {k: v for k, v in vars(config(files)).items() if v != ""}
    succeeds(start(fork, rlaif, **flags))
    assert "is here already" in refused(start(fork, rlaif, **flags))
    for changed, named in [({"seed": 1}, "--seed=1: this run was started with --seed=0"), ({"judge": files / "sft"}, "--judge="), ({"batch": 5}, "--batch=5")]:
        assert named in refused(start(fork, rlaif, **(flags | {"resume": True} | changed)))
    (files / "constitution.txt").write_text(f"{SHORT}\n")
    assert "constitution.txt: not the data this run was started with" in refused(start(fork, rlaif, **(flags | {"resume": True})))
    succeeds(start(fork, rlaif, **(flags | {"overwrite": True})))
    assert {len(r["verdicts"]) for r in rows(files / "out.jsonl")} == {1}
    (files / "out.log.jsonl").unlink()
    assert "there is no" in refused(start(fork, rlaif, **(flags | {"resume": True})))
    (files / "out.log.jsonl").write_text("{}\n")
    assert "is damaged" in refused(start(fork, rlaif, **(flags | {"resume": True})))


def test_a_judge_or_a_reward_model_that_breaks_is_no_tie(make_model):
    """What it says would not be finite, and in every comparison count as equal."""
    judge, scorer = ending(make_model, 0), make_model(1, **(SMALL | {"scalar_head": True}))
    with torch.no_grad():
        judge.norm[0], scorer.norm[0] = float("nan"), float("inf")
    with pytest.raises(UserError, match="the judge's probabilities are not finite"):
        rlaif.verdicts(judge, TOK, [("?", "a", "b")], [LONG], np.array([[0]]), 10**6)
    with pytest.raises(UserError, match="the reward model's scores are not finite"):
        scores(scorer, [[1, 2, 3]], 10**6)


def test_a_revision_is_asked_for_in_turns_or_as_text_and_read_by_sft(files, monkeypatch):
    asked = []
    rollout = rlaif.rollout

    def recorded(model, prompts, **how):
        asked.append([TOK.decode(ids) for ids in prompts])
        return rollout(model, prompts, **how)

    monkeypatch.setattr(rlaif, "rollout", recorded)
    for how, judge, opening in [("auto", "base", "User: Number "), ("auto", "sft", "<|im_start|>user\nNumber "), ("chat", "base", "<|im_start|>user\nNumber ")]:
        asked.clear()
        here(rlaif.main, config(files, mode="revise", judge=files / judge, ask=how, batch=20, max_new=40, overwrite=True, min_margin=0.05))
        written = rows(files / "out.jsonl")
        (answered, criticised, revised), counts = asked, log(files / "out.jsonl")[-1]["counts"]
        assert answered[0].endswith("<|im_start|>assistant\n") and len(written) > 3 and len(answered) == 10 > len(criticised) >= len(revised) >= len(written)
        assert counts == {"prompts": 10, "answers revised": len(written), "left out: an answer, critique or revision was cut or empty": 10 - len(written)}
        end = "Assistant:" if judge == "base" and how == "auto" else "<|im_start|>assistant\n"
        assert all(text.removeprefix("<|endoftext|>").startswith(opening) and text.endswith(end) for text in criticised + revised), criticised[0]
        for row in written:
            i, said = int(row["answer"]), chat.conversation(row)
            assert said[0] == {"role": "user", "content": f"Number {i}?"} and said[1]["role"] == "assistant" and len(said) == 2 and said[1]["content"]
            (critique,), (revision,) = ([text for text in some if f"Number {i}?" in text] for some in (criticised, revised))
            assert row["principle"] in (LONG, KIND) and rlaif.CRITIQUE.format(principle=row["principle"]) in critique and row["original"] in critique
            assert rlaif.REVISION.format(principle=row["principle"]) in revision and row["critique"] in revision and revision.startswith(critique)


def test_the_judge_to_revise_is_the_policy_where_none_is_named(files):
    here(rlaif.main, config(files, mode="revise", judge="", out=files / "a.jsonl"))
    here(rlaif.main, config(files, mode="revise", judge=files / "sft", out=files / "b.jsonl"))
    assert (files / "a.jsonl").read_bytes() == (files / "b.jsonl").read_bytes()


def test_a_strangers_directory_judges(files):
    folder = checkpoint.find(files / "base")
    for name in ("feinschliff.json", "manifest.json"):
        (folder / name).unlink()
    shutil.copytree(folder, files / "hub")
    here(rlaif.main, config(files, judge=files / "hub"))
    assert rows(files / "out.jsonl")


def test_peoples_pairs_are_judged_and_written_to_be_read(make_model, files, realdata):
    save(make_model, files / "far", "pretrain", seed=4, tok=TOK, context=8192)
    here(rlaif.main, config(files, policy="", judge=files / "far", data=realdata("ai_preferences_test.jsonl"), limit=12))
    counts, figures = (log(files / "out.jsonl")[-1][name] for name in ("counts", "figures"))
    assert counts["prompts"] == 12 and counts["pairs judged"] + counts["pairs too long for the judge"] == 12 and counts["pairs kept"] > 5
    assert figures["agrees with the labels, all pairs"][1] == counts["pairs judged"]
    originals = {frozenset((p.chosen, p.rejected)) for p in chat.read(str(realdata("ai_preferences_test.jsonl")), chat.preference)[0]}
    assert {frozenset((p.chosen, p.rejected)) for p in chat.read(str(files / "out.jsonl"), chat.preference)[0]} <= originals


def test_the_constitution_is_the_worlds():
    assert read_constitution("data/constitution.txt") == list(PRINCIPLES)


def test_the_worlds_pairs_have_a_gold_to_agree_with(files, capsys):
    write_rows(files / "pairs.jsonl", [pair(random.Random(i)) for i in range(12)])
    here(rlaif.main, config(files, policy="", data=files / "pairs.jsonl"))
    figures, written = log(files / "out.jsonl")[-1]["figures"], rows(files / "out.jsonl")
    right, n = figures["agrees with gold, kept pairs"]
    assert (right, n) == (sum(r["gold_chosen"] > r["gold_rejected"] for r in written), sum(r["gold_chosen"] != r["gold_rejected"] for r in written))
    assert np.isfinite([p for r in written for v in r["verdicts"] for p in v]).all()


def test_what_cannot_be_judged_is_one_clear_line(make_model, files, fork):
    save(make_model, files / "rm", "reward", scalar_head=True, tok=TOK)
    save(make_model, files / "bytes", "pretrain")
    no_turns = tokenizer.Tokenizer("plain", tokenizer.PATTERN, {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256}, pad="<|endoftext|>")
    save(make_model, files / "no_turns", "pretrain", tok=no_turns)
    (files / "empty.txt").write_text("# nothing\n")
    flags = {k: v for k, v in vars(config(files)).items() if v != ""}
    for changed, named in [
        ({"constitution": files / "empty.txt"}, "no principle in it"),
        ({"constitution": files / "absent.txt"}, "--constitution="),
        ({"data": files / "absent.jsonl"}, "absent.jsonl"),
        ({"judge": files / "rm"}, "--judge=" + str(files / "rm") + ": a reward model"),
        ({"judge": files / "bytes"}, '" A" and " B" are not single tokens'),
        ({"judge": files / "absent"}, "absent: no checkpoint here"),
        ({"policy": files / "no_turns"}, "no <|im_end|>"),
        ({"reward": f"{files}/absent.py:f"}, "absent.py"),
        ({"mode": "rank"}, "--mode=rank"),
        ({"mode": "revise", "reward": "x.py:f"}, "--reward: only --mode=judge"),
        ({"principles": "all"}, "--principles=all"),
        ({"ask": "nicely"}, "--ask=nicely"),
        ({"n": 1}, "--n=1"),
        ({"batch": 0}, "--batch=0"),
        ({"max_new": 0}, "--max_new=0"),
        ({"temperature": -1}, "--temperature=-1"),
        ({"min_margin": 0.5}, "--min_margin=0.5"),
        ({"out": files / "out.txt"}, "--out="),
        ({"out": "/proc/no/out.jsonl"}, "--out=/proc/no/out.jsonl"),
        ({"out": files / "prompts.jsonl", "overwrite": True}, "is what is read"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite: choose one"),
    ]:  # fmt: skip
        line = refused(start(fork, rlaif, **(flags | changed)))
        assert named in line, (changed, line)
    assert not (files / "out.jsonl").exists() and len(rows(files / "prompts.jsonl")) == 10
    for missing, named in [("judge", "--judge: name the checkpoint"), ("policy", 'prompts.jsonl:1: no pair of answers in the fields prompt, answer')]:
        line = refused(start(fork, rlaif, **{k: v for k, v in flags.items() if k != missing}))
        assert named in line, line
    assert "--policy: name the checkpoint" in refused(start(fork, rlaif, **{k: v for k, v in (flags | {"mode": "revise"}).items() if k != "policy"}))


def test_two_answers_says_what_is_wrong():
    for row, why in [
        ({"prompt": "q", "reply_a": "a"}, '"reply_b" is missing'),
        ({"reply_a": "a", "reply_b": "b"}, 'no "prompt"'),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same text"),
        ({"prompt": "q", "chosen": "a"}, 'no "rejected"'),
    ]:
        with pytest.raises(ValueError, match=why):
            rlaif.two_answers(row)
    with pytest.raises(UserError, match="--policy"):
        rlaif.check_flags(rlaif.Config("c", "d", "o.jsonl", mode="revise"))
