"""rlaif.py: soft labels against the model's own probabilities, both orders, what is dropped and
counted; a run that was cut anywhere ends in the same bytes."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from runs import SMALL, here, null_device, refused, save, start, succeeds, write_rows, write_wanderer

import rlaif
from bench.child import run_script
from data import chat, rows, tokenizer
from data.judge import judge_prompt, random_principles, reply_pair
from data.pack import pack
from data.world import PRINCIPLES, pair
from figures import label_margins
from model import logprobs
from runtime import checkpoint
from runtime.errors import UserError
from scoring import read_constitution, reward_scores

TOK = tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)  # " A" and " B" are single tokens
A, B = (TOK.encode_ordinary(text)[0] for text in (" A", " B"))
LONG, KIND, SHORT = "Be long.", "Be kind.", "Be short."


def ending(make_model, seed, **shape):
    """A model with random weights that ends what it writes after a handful of tokens: one channel
    is much the same everywhere, and the ends read it."""
    model = make_model(seed, **(SMALL | {"vocab_size": TOK.n_vocab, "context": 640} | shape))
    with torch.no_grad():
        model.embed[:, 0] += 10.0
        model.untied_head[[chat.end_of_turn(TOK), TOK.eot], 0] += 1.4
    return model


@pytest.fixture
def files(make_model, tmp_path):
    """A policy and a judge with random weights, a constitution and prompts."""
    for name, stage, seed in (("sft", "sft", 0), ("base", "pretrain", 5)):
        info = {"stage": stage, "step": 1, "config": {}, "data": {}, "lineage": []}
        checkpoint.save(tmp_path / name, ending(make_model, seed), TOK, info)
    (tmp_path / "constitution.txt").write_text(f"# ours\n{LONG}\n\n{KIND}\n")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Number {i}?", "answer": str(i)} for i in range(10)])
    return tmp_path


def flags_of(files, **changed):
    flags = {"policy": files / "sft", "judge": files / "base", "data": files / "prompts.jsonl"}
    flags |= {"out": files / "out.jsonl", "constitution": files / "constitution.txt", "device": "cpu"}
    flags |= {"rows_per_write": 4} | changed
    if flags["policy"]:
        flags.setdefault("max_new_tokens", 30)
    if flags.get("mode") != "revise":
        flags.setdefault("min_margin", 0.0)
    return {name: str(value) if isinstance(value, os.PathLike) else value for name, value in flags.items()}


def run(files, **changed):
    """Run rlaif.py in this process -> the rows it wrote."""
    flags = flags_of(files, **changed)
    here(rlaif.main, rlaif.Config(**flags))
    return read(flags["out"])


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def log(path):
    """The records of a file's log, without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read(path.with_suffix(".log.jsonl"))]


# --------------------------------------------------------------------------------------------------
# Preferences from verdicts

PAIRS = [
    {"prompt": "q1", "chosen": "aaa", "rejected": "bb", "gold_chosen": 1.0, "gold_rejected": 0.5},
    {"prompt": "q2", "chosen": "a", "rejected": "b kind", "gold_chosen": 0.0, "gold_rejected": 2.0},
    {"prompt": "q3", "reply_a": "aaa", "reply_b": "bbb"},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q6"}]},
]
PAIRS[0] |= {"answer": "5", "chosen_model": "x", "rejected_model": "y"}
PAIRS[1] |= {"answer": "6", "chosen_model": "x", "rejected_model": "y"}
PAIRS[3] |= {"reply_a": "kind", "reply_b": "bbbbbb", "better": "A"}


def taste(principle, text):
    """What a judge thinks of a reply: length for LONG, less for SHORT, "kind" for KIND."""
    return {LONG: len(text), SHORT: -len(text), KIND: 3 * text.count("kind")}[principle]


def soft(margin):
    """p(first is better), in this order and in the other, by a judge that says " A" too often."""
    return 1 / (1 + np.exp(-np.stack([margin + 0.4, margin - 0.4], axis=-1)))


def judged(some, by, asked=None, **flags):
    """`preferences` of these rows, by the taste of a judge."""
    pairs = [reply_pair(row) for row in some]
    margins = [[taste(p, pair.chosen) - taste(p, pair.rejected) for p in by] for pair in pairs]
    p = soft(np.array(margins, dtype=np.float64))
    if asked is not None:
        p[~asked] = np.nan
    config = rlaif.Config("", "", "", **({"min_margin": 0.0} | flags))
    return rlaif.preferences(config, pairs, p, by, label_margins(pairs))


def test_the_preferred_side_is_chosen_and_what_belongs_to_a_side_goes_with_it():
    written, counts, values = judged(PAIRS, [LONG])
    sides = [("q1", "aaa", "bb"), ("q2", "b kind", "a"), (PAIRS[3]["prompt"], "bbbbbb", "kind")]
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in written] == sides
    for row, margin in zip(written, (1, 5, 2), strict=True):
        assert row["probability"] == pytest.approx(soft(margin).mean(), abs=2e-6)
        assert row["verdicts"] == [pytest.approx(1 - soft(-margin)[::-1], abs=1e-4)] and row["principle"] == LONG
    assert written[0]["gold_chosen"] == 1.0 and written[0]["answer"] == "5"
    gold = {"gold_chosen": 2.0, "gold_rejected": 0.0, "chosen_model": "y", "rejected_model": "x"}
    assert gold.items() <= written[1].items()
    assert not {"reply_a", "better"} & written[2].keys()
    assert counts == {"pairs kept": 3, "pairs dropped, too near to 1/2": 1}
    agrees = {name: x[np.isfinite(x)].tolist() for name, x in values.items() if name.startswith("agrees")}
    assert agrees["agrees with the labels, all pairs"] == [True, False, False]  # q3 has no label
    assert agrees["agrees with gold, all pairs"] == agrees["agrees with gold, kept pairs"] == [True, True]
    assert (values['position bias (how much " A" is said)'] > 0.5).all()
    assert values["the two orders contradict each other"].mean() == 0.25  # q3, where only the place speaks


def test_agreement_with_labels_is_that_of_their_probability_and_with_a_reward_that_of_its_order(make_model):
    judge = ending(make_model, 5, context=400), TOK, {}
    texts, label_probs = [("yes", "no indeed"), ("well", "so"), ("Ada", "Ben or so"), ("a", "bb")], [0.6, 0.6, 0.5, 1.0]
    some = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in texts]
    batch = [reply_pair(row | {"probability": p}) for row, p in zip(some, label_probs, strict=True)]

    def length(conversations, rows, samples, texts):
        return np.array([float(len(text)) for text in texts])

    config = rlaif.Config("", "", "", min_margin=0.0)
    rewards = [("mine.py:length", 1.0, length)]
    written, _, values, _ = rlaif.judge_batch(config, None, judge, [LONG], rewards, batch, 0)
    judged_better = {row["chosen"] for row in written}
    agrees = [p if a in judged_better else 1 - p for (a, _), p in zip(texts, label_probs, strict=True)]
    assert len(written) == 4 and values["agrees with the labels, all pairs"].tolist() == pytest.approx(agrees)
    longer = [float(max(pair, key=len) in judged_better) for pair in texts]
    assert values["agrees with the reward, all pairs"].tolist() == longer


def test_principles_make_one_probability_by_mean_or_vote_or_chance():
    alone = {p: {str(r["prompt"]): r["probability"] for r in judged(PAIRS, [p])[0]} for p in (LONG, KIND, SHORT)}
    written, _, values = judged(PAIRS, [LONG, KIND])
    by = {str(r["prompt"]): r for r in written}
    assert by["q2"]["probability"] == pytest.approx((alone[LONG]["q2"] + alone[KIND]["q2"]) / 2, abs=2e-6)
    assert by["q1"]["probability"] == pytest.approx((alone[LONG]["q1"] + 0.5) / 2, abs=2e-6)
    assert len(by["q2"]["verdicts"]) == 2 and "principle" not in by["q1"]
    assert np.isfinite(values[f"agrees with gold, by: {KIND}"]).tolist() == [True, True, False, False]
    voted = {str(r["prompt"]): r["probability"] for r in judged(PAIRS, [LONG, KIND], principles="vote")[0]}
    assert voted == {"q1": 0.75, "q2": 1.0}  # KIND abstains on q1; on the last pair one is for each side
    assert judged(PAIRS, [LONG, KIND, SHORT], principles="vote", min_margin=0.3)[0] == []
    principles, asked = [LONG, KIND, SHORT], np.eye(3, dtype=bool)
    for row, principle in zip(judged([PAIRS[1]] * 3, principles, asked)[0], principles, strict=True):
        assert (row["principle"], row["probability"]) == (principle, alone[principle]["q2"])
        assert row["chosen"] == ("a" if principle == SHORT else "b kind") and len(row["verdicts"]) == 1


def test_a_vote_at_the_margin_is_kept():
    """Three of five: 0.5 + 0.1 - 0.5 is a little less than 0.1."""
    pair = [{"prompt": "q", "chosen": "aaaa", "rejected": "bb"}]
    for principles in ([LONG] * 3 + [SHORT] * 2, [SHORT] * 3 + [LONG] * 2):
        (row,), counts, _ = judged(pair, principles, principles="vote", min_margin=0.1)
        assert row["probability"] == pytest.approx(0.6) and counts["pairs kept"] == 1
        assert row["chosen"] == ("aaaa" if principles[0] == LONG else "bb")
        assert judged(pair, principles, principles="vote", min_margin=0.100001)[0] == []


def test_random_principles_depend_on_the_seed_and_the_row_alone():
    drawn = random_principles(90, 3, 7, 0)
    assert drawn.tolist() == [*random_principles(40, 3, 7, 0), *random_principles(50, 3, 7, 40)]
    assert np.bincount(drawn).min() > 15 and drawn.tolist() != random_principles(90, 3, 8, 0).tolist()


@pytest.mark.parametrize("margin, kept", [(0.0, 3), (0.21, 3), (0.25, 2), (0.499, 0)])
def test_pairs_nearer_to_a_half_than_the_margin_are_dropped(margin, kept):
    written, counts, _ = judged(PAIRS, [LONG], min_margin=margin)
    assert len(written) == counts["pairs kept"] == kept
    assert counts["pairs dropped, too near to 1/2"] == 4 - kept


def test_a_pair_of_replies_says_what_is_wrong():
    for row, why in [
        ({"prompt": "q", "reply_a": "a"}, '"reply_b" is missing'),
        ({"reply_a": "a", "reply_b": "b"}, 'no "prompt"'),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same text"),
        ({"prompt": "q", "chosen": "a"}, 'no "rejected"'),
        ({"prompt": "q", "answer": "a"}, "no pair of replies in the fields prompt, answer"),
    ]:
        with pytest.raises(ValueError, match=why):
            reply_pair(row)


# --------------------------------------------------------------------------------------------------
# What the models are asked


def test_verdicts_are_the_models_own_probabilities(make_model):
    model = make_model(7, **(SMALL | {"vocab_size": TOK.n_vocab, "context": 256})).eval()
    triples, principles = [("q1", "one", "two"), ("q2", "x", "and y")], [LONG, KIND]
    asked = np.array([[True, True], [True, False]])
    p = rlaif.verdicts(model, TOK, triples, principles, asked, 150)

    def says_a(*question):
        ids = [TOK.eot, *TOK.encode_ordinary(judge_prompt(*question))]
        a, b = (np.exp(logprobs(model, pack([[*ids, label]]))[-1].item()) for label in (A, B))
        return a / (a + b)

    assert np.isnan(p[1, 1]).all()
    for i, j in zip(*np.nonzero(asked), strict=True):
        question, a, b = triples[i]
        both = says_a(question, a, b, principles[j]), 1 - says_a(question, b, a, principles[j])
        assert p[i, j] == pytest.approx(both, rel=1e-4)
    assert p[asked].std() > 0.01


def test_a_batch_counts_ties_and_pairs_that_are_too_long(make_model):
    judge = ending(make_model, 5, context=150), TOK, {}
    texts = [("same", "same"), ("a", "b" * 200), ("aaa", "bbb")]
    batch = [reply_pair({"prompt": "q", "reply_a": a, "reply_b": b}) for a, b in texts]
    config = rlaif.Config("", "", "", min_margin=0.0)
    written, counts, *_ = rlaif.judge_batch(config, None, judge, [LONG], [], batch, 0)
    assert len(written) == 1 and {written[0]["chosen"], written[0]["rejected"]} == {"aaa", "bbb"}
    counted = {"prompts": 3, "ties (twice the same text)": 1, "pairs too long for the judge": 1}
    assert counts.items() >= (counted | {"pairs judged": 1, "pairs kept": 1}).items()
    written, counts, values, _ = rlaif.judge_batch(config, None, judge, [LONG], [], batch[:2], 0)
    assert written == [] and values == {} and counts["pairs judged"] == 0


def test_sampled_pairs_are_different_finished_texts_and_do_not_depend_on_the_batch(make_model):
    model = ending(make_model, 2, context=96)
    batch = [rows.prompt_only({"prompt": text}) for text in ("a", "bb", "c" * 200, "d", "e")]
    config = rlaif.Config("", "", "", group_size=4, max_new_tokens=12)
    pairs, counts = rlaif.sampled_pairs(config, model, TOK, batch[:2], 0)
    texts = [(i, pair.chosen, pair.rejected) for i, pair in pairs]
    assert texts and len(texts) == len(set(texts)) and all(a != b and a and b for _, a, b in texts)
    assert counts["completions cut or empty"] and counts["prompts too long"] == 0
    alone, _ = rlaif.sampled_pairs(config, model, TOK, batch[1:2], 1)
    assert [pair for _, pair in alone] == [pair for i, pair in pairs if i == 1]
    pairs, counts = rlaif.sampled_pairs(config, model, TOK, batch, 0)
    sampled = {i for i, _ in pairs}
    assert counts["prompts too long"] == 1 and 2 not in sampled and sampled & {3, 4}
    assert rlaif.sampled_pairs(config, model, TOK, batch[2:3], 2)[0] == []
    config.temperature = 0.0
    pairs, counts = rlaif.sampled_pairs(config, model, TOK, batch[:1], 0)
    # all four the same: six ties, or all cut
    assert pairs == [] and counts["ties (twice the same text)"] + counts["completions cut or empty"] in (4, 6)


def test_a_judge_or_a_reward_model_that_breaks_is_not_a_tie(make_model):
    """What it says would not be finite, and in every comparison count as equal."""
    judge, scorer = ending(make_model, 0), make_model(1, **(SMALL | {"scalar_head": True}))
    with torch.no_grad():
        judge.norm[0], scorer.norm[0] = float("nan"), float("inf")
    with pytest.raises(UserError, match="the judge's probabilities are not finite"):
        rlaif.verdicts(judge, TOK, [("?", "a", "b")], [LONG], np.array([[True]]), 10**6)
    with pytest.raises(UserError, match="the reward model's scores are not finite"):
        reward_scores(scorer, [[1, 2, 3]], 10**6)


def test_a_revision_is_asked_for_in_turns_or_as_text_and_read_by_sft(files, monkeypatch):
    asked = []
    rollout = rlaif.rollout

    def recorded(model, prompts, **options):
        asked.append([TOK.decode(ids) for ids in prompts])
        return rollout(model, prompts, **options)

    monkeypatch.setattr(rlaif, "rollout", recorded)
    turn, chat_end = "<|im_start|>user\nNumber ", "<|im_start|>assistant\n"
    for ask, judge, opening, end in [
        ("auto", "base", "User: Number ", "Assistant:"),
        ("auto", "sft", turn, chat_end),
        ("chat", "base", turn, chat_end),
    ]:
        asked.clear()
        flags = {"mode": "revise", "judge": files / judge, "ask": ask, "rows_per_write": 20, "overwrite": True}
        written = run(files, **flags, max_new_tokens=40)
        answered, criticised, revised = asked
        assert answered[0].endswith(chat_end)
        assert 10 == len(answered) > len(criticised) >= len(revised) >= len(written) > 3
        counts = {"prompts": 10, "answers revised": len(written)}
        counts["left out: an answer, critique or revision was cut or empty"] = 10 - len(written)
        assert log(files / "out.jsonl")[-1]["counts"] == counts
        for text in criticised + revised:
            assert text.removeprefix("<|endoftext|>").startswith(opening) and text.endswith(end), text
        for row in written:
            prompt, reply = rows.conversation(row)
            assert prompt == rows.message("user", f"Number {row['answer']}?")
            assert reply["role"] == "assistant" and reply["content"]
            (critique,) = [text for text in criticised if prompt["content"] in text]
            (revision,) = [text for text in revised if prompt["content"] in text]
            assert rlaif.CRITIQUE.format(principle=row["principle"]) in critique and row["original"] in critique
            assert rlaif.REVISION.format(principle=row["principle"]) in revision
            assert row["critique"] in revision and revision.startswith(critique)


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_writes_what_dpo_reads_soft_labels_and_all(files, capsys):
    reward = "def length(prompt, completion, row):\n    return len(completion) + 0 * int(row['answer'])\n"
    (files / "mine.py").write_text(reward)
    written = run(files, group_size=3, reward=f"{files}/mine.py:length")
    printed = capsys.readouterr().out
    assert "agrees with the reward, kept pairs" in printed and "position bias" in printed
    last = log(files / "out.jsonl")[-1]
    pairs, _ = rows.read(str(files / "out.jsonl"), rows.preference)
    assert len(pairs) == last["counts"]["pairs kept"] > 9
    assert [pair.probability for pair in pairs] == [row["probability"] for row in written]
    assert all(row["answer"] == row["prompt"][7:-1] and 0.5 < row["probability"] < 1 for row in written)
    margins = [len(row["chosen"]) - len(row["rejected"]) for row in written]
    agreeing, n = last["figures"]["agrees with the reward, kept pairs"]
    assert (agreeing, n) == (sum(x > 0 for x in margins), sum(x != 0 for x in margins))


OF_OLD_ANSWERS = {
    "gold_chosen": 0.5,
    "rejected_model": "x",
    "finished": False,
    "chosen_truncated": True,
    "stop_reason": "length",
    "label_source": "people",
    "score": 3,
    "ratings": [1, 2],
    "data/world.py:gold": 0.5,
    "is_correct": True,
    "wrong": True,
    "preference": "tie",
    "margin": 0.5,
    "train": False,
    "reasoning": "first this, then that",
    "instead_of": "another answer",
    "text": "User: Number 9? Assistant: three",
}
OF_QUESTIONS = {"correct_answer": "B", "level": 3, "topic": "numbers", "expected_output": "5", "id": 7}


@pytest.mark.parametrize("mode, parse", [("judge", rows.preference), ("revise", rows.conversation)])
def test_what_a_row_says_of_other_answers_is_not_written_beside_new_ones(files, mode, parse, capsys):
    one_each = [{"prompt": "Number 9?", name: said} for name, said in OF_OLD_ANSWERS.items()]
    pair = {"prompt": "Number 9?", "chosen": "a", "rejected": "b", **OF_OLD_ANSWERS, **OF_QUESTIONS}
    write_rows(files / "old.jsonl", [*one_each, pair])
    flags = {"mode": mode, "data": files / "old.jsonl", "max_new_tokens": 60, "rows_per_write": 99}
    written = run(files, **flags, **({"group_size": 3} if mode == "judge" else {}))
    assert len(rows.read(str(files / "out.jsonl"), parse)[0]) == len(written) > 9
    assert not [row for row in written if OF_OLD_ANSWERS.keys() & row.keys()]
    of_the_pair = [row for row in written if "id" in row]
    assert of_the_pair and all(OF_QUESTIONS.items() <= row.items() for row in of_the_pair)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "are left out" in line]
    named = ", ".join(f'"{name}"' for name in sorted(OF_OLD_ANSWERS))
    assert line == f"{files}/old.jsonl: fields that speak of other answers than those of --policy are left out: {named}"


def test_pairs_of_one_prompt_are_judged_in_one_batch_and_counted_as_one_prompt(files):
    texts = [(f"Number {i % 5}?", f"it is {i}", f"no, {2 * i}") for i in range(20)]
    some = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in texts]
    written = run(files, policy="", data=write_rows(files / "pairs.jsonl", some))
    assert [row["prompt"] for row in written] == sorted(row["prompt"] for row in some)
    bias = 'position bias (how much " A" is said)'
    last = log(files / "out.jsonl")[-1]
    assert last["figures"][bias][1] == 2 * 20 and last["squares"][bias][2] == 5 * (2 * 4) ** 2


@pytest.mark.parametrize("flags", [{"mode": "judge", "principles": "random"}, {"mode": "revise", "ask": "text"}])
def test_a_run_cut_anywhere_ends_in_the_same_bytes(files, flags, monkeypatch):
    flags |= {"max_new_tokens": 60}
    run(files, out=files / "whole.jsonl", **flags)
    whole, whole_log = (files / "whole.jsonl").read_bytes(), log(files / "whole.jsonl")
    assert len(whole) > 500
    ends = [record["bytes"] for record in whole_log[1:]]
    assert ends[-1] == len(whole) and [record["rows"] for record in whole_log[1:]] == [4, 8, 10]
    name, done = f"{flags['mode']}_batch", []
    work = vars(rlaif)[name]
    monkeypatch.setattr(rlaif, name, lambda *args: done.append(args[-1]) or work(*args))
    cut, cut_log = files / "cut.jsonl", files / "cut.log.jsonl"
    for size in (0, 7, ends[0] - 1, ends[0], ends[1], len(whole) - 1, len(whole)):
        cut.write_bytes(whole[:size])
        shutil.copy(files / "whole.log.jsonl", cut_log)
        done.clear()
        run(files, out=cut, resume=True, **flags)
        assert cut.read_bytes() == whole and log(cut)[1:] == whole_log[1:]
        # what is complete is not made again
        assert done == [first for first, end in zip((0, 4, 8), ends, strict=True) if end > size]
    cut_log.write_bytes((files / "whole.log.jsonl").read_bytes()[:-9])  # and if the log's last line was cut
    run(files, out=cut, resume=True, **flags)
    assert cut.read_bytes() == whole and log(cut)[1:] == whole_log[1:]


def test_only_the_same_run_is_resumed(files, fork):
    flags = flags_of(files)
    succeeds(start(fork, rlaif, **flags))
    assert "is here already" in refused(start(fork, rlaif, **flags))
    for changed, why in [
        ({"seed": 1}, "--seed=1: this run was started with --seed=0"),
        ({"judge": files / "sft"}, "--judge="),
        ({"rows_per_write": 5}, "--rows_per_write=5"),
    ]:
        assert why in refused(start(fork, rlaif, **(flags | {"resume": True} | changed)))
    (files / "constitution.txt").write_text(f"{SHORT}\n")
    line = refused(start(fork, rlaif, **(flags | {"resume": True})))
    assert "constitution.txt: not the data this run was started with" in line
    succeeds(start(fork, rlaif, **(flags | {"overwrite": True})))
    assert {len(row["verdicts"]) for row in read(files / "out.jsonl")} == {1}
    log_file = files / "out.log.jsonl"
    head, *records = read(log_file)
    for record in records:
        del record["squares"]  # as an older version wrote them
    of_before = "".join(json.dumps(line) + "\n" for line in (head, *records))
    for damage in ("{}\n", '{"stage": "rlaif"}\n', "", of_before):
        log_file.write_text(damage)
        assert "missing, damaged" in refused(start(fork, rlaif, **(flags | {"resume": True})))
    log_file.unlink()
    assert "missing, damaged" in refused(start(fork, rlaif, **(flags | {"resume": True})))


def test_the_judge_to_revise_is_the_policy_if_none_is_named(files):
    run(files, mode="revise", judge="", out=files / "a.jsonl")
    run(files, mode="revise", judge=files / "sft", out=files / "b.jsonl")
    assert (files / "a.jsonl").read_bytes() == (files / "b.jsonl").read_bytes()


def test_a_downloaded_model_judges(files):
    folder = checkpoint.find(files / "base")
    for name in ("feinschliff.json", "manifest.json"):
        (folder / name).unlink()
    shutil.copytree(folder, files / "hub")
    assert run(files, judge=files / "hub")


def test_peoples_pairs_are_judged_and_written_to_be_read(make_model, files, realdata):
    data = realdata("ai_preferences_test.jsonl")
    save(make_model, files / "far", "pretrain", seed=4, tok=TOK, context=8192)
    run(files, policy="", judge=files / "far", data=data, limit=12)
    counts, figures = (log(files / "out.jsonl")[-1][name] for name in ("counts", "figures"))
    assert counts["prompts"] == 12 == counts["pairs judged"] + counts["pairs too long for the judge"]
    assert counts["pairs kept"] > 5
    assert figures["agrees with the labels, all pairs"][1] == counts["pairs judged"]
    before, after = (
        {frozenset((pair.chosen, pair.rejected)) for pair in rows.read(str(path), rows.preference)[0]}
        for path in (data, files / "out.jsonl")
    )
    assert after <= before


def test_the_constitution_is_the_worlds():
    assert read_constitution("data/constitution.txt") == list(PRINCIPLES)


def test_the_worlds_pairs_have_a_gold_to_agree_with(files):
    write_rows(files / "pairs.jsonl", [pair(random.Random(i)) for i in range(12)])
    written = run(files, policy="", data=files / "pairs.jsonl")
    gold = [row["gold_chosen"] - row["gold_rejected"] for row in written]
    figure = log(files / "out.jsonl")[-1]["figures"]["agrees with gold, kept pairs"]
    assert figure == [sum(x > 0 for x in gold), sum(x != 0 for x in gold)]
    assert np.isfinite([row["verdicts"] for row in written]).all()


def test_what_cannot_be_judged_is_one_clear_line(make_model, files, fork):
    save(make_model, files / "rm", "reward", scalar_head=True, tok=TOK)
    save(make_model, files / "bytes", "pretrain")
    byte_ids = {bytes([b]): b for b in range(256)}
    plain = tokenizer.Tokenizer("plain", tokenizer.PATTERN, byte_ids, {"<|endoftext|>": 256}, pad="<|endoftext|>")
    save(make_model, files / "no_turns", "pretrain", tok=plain)
    (files / "empty.txt").write_text("# nothing\n")
    (files / "null.jsonl").symlink_to(null_device(files))
    shutil.copy(files / "prompts.jsonl", files / "x.log.jsonl")
    for changed, why in [
        ({"constitution": files / "empty.txt"}, "no principle in it"),
        ({"constitution": files / "prompts.jsonl"}, "no principle in it; one per line is expected, as plain text"),
        ({"constitution": files / "absent.txt"}, "--constitution="),
        ({"data": files / "absent.jsonl"}, "absent.jsonl"),
        ({"judge": files / "rm"}, f"{files / 'rm'}: a reward model"),
        ({"judge": files / "bytes"}, '" A" and " B" are not single tokens'),
        ({"judge": files / "absent"}, "absent: no checkpoint here"),
        ({"policy": files / "no_turns"}, "no <|im_start|>"),
        ({"reward": f"{files}/absent.py:f"}, "absent.py"),
        ({"mode": "rank"}, "--mode=rank"),
        ({"mode": "revise", "reward": "x.py:f"}, "--reward=x.py:f: only --mode=judge reads it"),
        ({"mode": "revise", "principles": "vote"}, "--principles=vote: only --mode=judge reads it"),
        ({"mode": "revise", "min_margin": 0.3}, "--min_margin=0.3: only --mode=judge reads it"),
        ({"ask": "text"}, "--ask=text: only --mode=revise reads it"),
        ({"policy": "", "temperature": 0.5}, "--temperature=0.5: without --policy nothing is sampled"),
        ({"mode": "revise", "policy": ""}, "--policy: name the checkpoint"),
        ({"judge": ""}, "--judge: name the checkpoint"),
        ({"policy": ""}, "prompts.jsonl:1: no pair of replies in the fields prompt, answer"),
        ({"principles": "all"}, "--principles=all"),
        ({"ask": "nicely"}, "--ask=nicely"),
        ({"group_size": 1}, "--group_size=1"),
        ({"rows_per_write": 0}, "--rows_per_write=0"),
        ({"max_new_tokens": 0}, "--max_new_tokens=0"),
        ({"temperature": -1}, "--temperature=-1"),
        ({"min_margin": 0.5}, "--min_margin=0.5"),
        ({"out": files / "out.txt"}, "--out="),
        ({"out": "/proc/no/out.jsonl"}, "--out=/proc/no/out.jsonl"),
        ({"out": files / "null.jsonl", "overwrite": True}, "null.jsonl: is no regular file"),
        ({"seed": 2**63}, "--seed=9223372036854775808: a count was expected"),
        ({"out": files / "prompts.jsonl", "overwrite": True}, "is what is read"),
        ({"data": files / "x.log.jsonl", "out": files / "x.jsonl"}, f"--out={files}/x.log.jsonl: is what is read"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite: choose one"),
    ]:
        line = refused(start(fork, rlaif, **flags_of(files, **changed)))
        assert why in line, (changed, line)
    assert not (files / "out.jsonl").exists() and not (files / "x.jsonl").exists()
    assert len(read(files / "prompts.jsonl")) == len(read(files / "x.log.jsonl")) == 10


LENGTH = """
def length(prompt, completion, row):
    return len(completion)
"""


def test_the_output_stays_in_the_directory_where_it_was_started(files, fork):
    """Whatever the threads that a reward has started do."""
    (files / "here").mkdir()
    write_wanderer(files / "own.py", LENGTH)
    flags = flags_of(files, reward=f"{files}/own.py:length", out="out.jsonl")

    def in_folder():
        os.chdir(files / "here")
        run_script(rlaif, [f"--{name}={value}" for name, value in flags.items()])

    succeeds(fork(in_folder))
    assert sorted(os.listdir(files / "here")) == [".out.jsonl.lock", "out.jsonl", "out.log.jsonl"]
    assert os.listdir(files / "elsewhere") == []
