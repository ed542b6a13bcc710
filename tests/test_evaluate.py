"""evaluate.py's figures against what they claim: sums of log-probabilities, verdicts in both
orders, rewards, the KL of exact enumeration, the best of n; and what it refuses."""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, here, refused, save, start, succeeds, write_rows, write_wanderer

import evaluate
from bench.child import run_script
from data import chat, rows, rules, tokenizer
from data.pack import pack
from figures import mean_intervals, pass_at_k
from model import completion_logprobs, logprobs, score
from optim import Optimizer
from rollout import Sample, sample_completions
from runtime import checkpoint
from runtime.errors import UserError
from scoring import prefer_first

TOK = tokenizer.byte_level()
END = chat.end_of_turn(TOK)
SFT = {"stage": "sft", "step": 1, "config": {}, "data": {}, "lineage": []}


def constant_model(make_model, tok, scores, **shape):
    """A model that gives each token its logit in `scores`, else 0, whatever it reads."""
    model = make_model(**({"vocab_size": tok.n_vocab, "context": 256} | shape))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.fill_(1.0)  # the residual stream stays at 1 in every channel, and so does its norm
        model.norm.fill_(1.0)
        for i, logit in scores.items():
            model.untied_head[i] = logit / model.config.width
    return model


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def measure(tmp_path, **flags):
    """The figures that evaluate.py writes."""
    config = evaluate.Config(**{"device": "cpu", "out": tmp_path / "out.json"} | flags)
    for name, value in vars(config).items():
        setattr(config, name, value if isinstance(value, (bool, int, float)) else str(value))
    here(evaluate.main, config)
    return json.loads((tmp_path / "out.json").read_text())["figures"]


# --------------------------------------------------------------------------------------------------
# Text


def test_document_nats_are_the_sums_of_logprobs(make_model):
    model = make_model(vocab_size=TOK.n_vocab, context=256).eval()
    texts = ["one", "", "zwei Bäume", "and a third, longer than the others are"]
    totals = evaluate.document_nats(model, TOK, texts, micro_batch_tokens=30)
    for text, (nats, tokens, size) in zip(texts, totals, strict=True):
        ids = [TOK.eot, *TOK.encode_ordinary(text), TOK.eot]
        assert nats == pytest.approx(-logprobs(model, pack([ids])).sum().item(), rel=1e-5)
        assert (tokens, size) == (len(ids) - 1, len(text.encode()))


def test_blank_documents_are_left_out_of_what_is_measured(make_model, tmp_path, capsys):
    """By chance the bootstrap draws them alone: nan, which is no JSON."""
    checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {}), TOK, {"stage": "pretrain", "step": 1})
    found = []
    for name, texts in (("some", ["", "Hello world", " \n"]), ("all", ["Hello world"])):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        found.append(measure(tmp_path, model=tmp_path / "run", text=tmp_path / f"{name}.jsonl"))
    assert found[0] == found[1] and "2 blank documents are left out" in capsys.readouterr().out


def test_documents_that_cannot_be_tokenized_are_left_out_with_a_line(make_model, tmp_path, capsys):
    tok = tokenizer.characters("Hello world")
    checkpoint.save(tmp_path / "run", constant_model(make_model, tok, {}), tok, {"stage": "pretrain", "step": 1})
    found, texts = [], {"some": ["Hello", "日本", "world"], "all": ["Hello", "world"], "none": ["日本"]}
    for name, some in texts.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for text in some])
    flags = {"model": tmp_path / "run", "skip_bad": True}
    found = [measure(tmp_path, **flags, text=tmp_path / f"{name}.jsonl") for name in ("some", "all")]
    assert found[0] == found[1] and "some.jsonl:2: " in capsys.readouterr().out
    with pytest.raises(UserError, match="some.jsonl:2: "):
        measure(tmp_path, model=tmp_path / "run", text=tmp_path / "some.jsonl")
    with pytest.raises(UserError, match="--text: the model's tokenizer can read none of its documents"):
        measure(tmp_path, **flags, text=tmp_path / "none.jsonl")


def test_a_document_longer_than_the_context_counts_every_token_once(make_model):
    model = constant_model(make_model, TOK, {})
    nats, tokens, size = evaluate.document_nats(model, TOK, ["x" * 1000], 16384)[0]
    assert (tokens, size) == (1001, 1000)
    assert nats == pytest.approx(1001 * np.log(TOK.n_vocab), rel=1e-5)


def test_completions_must_begin_with_the_answer_and_not_continue_it(make_model):
    model = constant_model(make_model, TOK, {ord("7"): 5.0})  # 7777... for ever
    examples = [{"prompt": "3 + 4 =", "answer": "7"}, {"prompt": "3 + 4 =", "answer": "77777777"}]
    assert evaluate.completions_right(model, TOK, [*examples, {"prompt": "is it", "answer": "no"}]) == [False] * 3
    model = constant_model(make_model, TOK, {TOK.eot: 5.0})
    assert evaluate.completions_right(model, TOK, [{"prompt": "3 + 4 =", "answer": ""}]) == [True]  # nothing, as asked


def test_a_judge_that_always_says_a_is_all_position_bias(make_model):
    tok = tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)
    a, b = (tok.encode_ordinary(text) for text in (" A", " B"))
    assert len(a) == len(b) == 1
    model = constant_model(make_model, tok, {a[0]: 4.0})
    examples = [{"prompt": "q", "reply_a": "x", "reply_b": "yy", "principle": "Be kind: always."} for _ in range(40)]
    for i, row in enumerate(examples):
        row["better"] = "A" if i % 4 else "B"
    config = evaluate.Config("", micro_batch_tokens=500)
    figures = mean_intervals(evaluate.judge_figures(config, model, tok, examples), seed=0)
    assert figures["judge: position bias"]["value"] == pytest.approx(1 / (1 + math.exp(-4)), rel=1e-4)
    assert figures["judge: be kind, one order"]["value"] == 0.75  # it is right wherever A is
    assert figures["judge: be kind, both orders"]["value"] == 0.5  # they cancel: it has no opinion


def test_a_tokenizer_without_single_labels_is_refused(make_model):
    with pytest.raises(UserError, match="single tokens"):
        prefer_first(constant_model(make_model, TOK, {}), TOK, ["?"], 100)


def test_main_writes_what_it_prints(make_model, tmp_path, capsys):
    run = save(make_model, tmp_path / "run", "pretrain")
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a few words"}, {"text": "and more"}])
    (tmp_path / "made").mkdir()
    figures = measure(tmp_path, model=run, text=text)
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["model"], result["stage"], result["step"]) == (str(run), "pretrain", 1)
    assert set(figures) == {"nats/token", "bits/byte", "nats/document", "tokens/document"}
    printed = capsys.readouterr().out
    for name, f in figures.items():
        assert f"{name:<48} {f['value']:9.4f}   [{f['low']:.4f}, {f['high']:.4f}]" in printed


# --------------------------------------------------------------------------------------------------
# Completions


def test_what_is_sampled_from_is_what_is_measured(make_model):
    model = make_model(**SMALL)
    prompts, samples, _ = sample_completions(model, TOK, ask("a", "b" * 60, "c" * 70), max_new_tokens=30, n=3, seed=1)
    totals = evaluate.sequence_logprobs(evaluate.Config("", micro_batch_tokens=200), model, prompts, samples)
    np.testing.assert_allclose(totals, [sum(s.logprobs) for s in samples], atol=1e-3)


def test_completions_end_as_often_as_the_model_ends_them(make_model):
    """A token is the end with probability 1/4: lengths are geometric, cut at --max_new_tokens."""
    model = constant_model(make_model, TOK, {END: np.log(259 / 3)}, width=16, layers=1)
    examples = [(ask("q")[0], {"prompt": "q"})] * 1000
    config = evaluate.Config("", max_new_tokens=8)
    values, sampled, _ = evaluate.completion_figures(config, model, TOK, examples, torch.device("cpu"))
    figures = mean_intervals(values, seed=0)
    assert figures["completions finished"]["value"] == pytest.approx(1 - 0.75**8, abs=0.03)
    assert figures["completion tokens"]["value"] == pytest.approx(sum(0.75**k for k in range(8)), abs=0.2)
    assert {row["finished"] for row in sampled} == {True, False}
    assert all("<|im_end|>" not in row["completion"] for row in sampled)


def test_completions_of_one_word_have_no_variety_of_two(make_model):
    """They never repeat; 0 would say that they always do."""
    model = constant_model(make_model, TOK, {ord("a"): 12.0}, width=16, layers=1)
    examples = [(ask("q")[0], {"prompt": "q"})] * 4
    config = evaluate.Config("", max_new_tokens=3)
    values, *_ = evaluate.completion_figures(config, model, TOK, examples, torch.device("cpu"))
    figures = mean_intervals(values, seed=0)
    assert figures["distinct-1"]["value"] == 1 / 4 and "distinct-2" not in figures


def distribution(logits, temperature):
    scores = torch.zeros(260, dtype=torch.float64)
    for token, logit in logits.items():
        scores[token] = logit
    return (scores / temperature).softmax(0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_that_of_exact_enumeration(make_model, tmp_path, temperature):
    """Completions of one token, from two models whose distributions are known."""
    p_logits = {ord("a"): 6.0, ord("b"): 5.0, END: 6.5}
    q_logits = {ord("a"): 5.0, ord("b"): 6.0, END: 6.0}
    model, reference = (constant_model(make_model, TOK, z, width=16, layers=1) for z in (p_logits, q_logits))
    checkpoint.save(tmp_path / "reference", reference, TOK, SFT)
    p, q = distribution(p_logits, temperature), distribution(q_logits, temperature)
    logratio, n = (p / q).log(), 1500
    kl = (p * logratio).sum().item()
    error = ((p * logratio**2).sum() - kl**2).sqrt().item() / n**0.5
    examples = [(ask("q")[0], {"prompt": "q"})] * n
    config = evaluate.Config("", max_new_tokens=1, reference=str(tmp_path / "reference"), temperature=temperature)
    values, _, _ = evaluate.completion_figures(config, model, TOK, examples, torch.device("cpu"))
    figures = mean_intervals(values, seed=0)
    figure = figures["KL to the reference, nats per completion"]
    assert abs(figure["value"] - kl) < 4 * error and kl > 12 * error
    assert figure["high"] - figure["low"] == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_a_model_compared_with_itself_has_no_kl_and_wins_half(make_model, tmp_path):
    folder = save(make_model, tmp_path / "run", "sft")
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(20)])
    (tmp_path / "mine.py").write_text(
        "def size(prompt, completion, row):\n    return len(completion) + row['finished']\n"
    )
    name = f"{tmp_path}/mine.py:size"
    figures = measure(tmp_path, model=folder, data=data, reference=folder, reward=name, max_new_tokens=20)
    assert abs(figures["KL to the reference, nats per completion"]["value"]) < 1e-5
    assert figures[f"win rate by {name}"]["value"] == 0.5
    assert figures[f"reward {name}"] == figures[f"reference's reward {name}"]


MINE = """
def mine(prompt, completion, row):
    assert isinstance(prompt, str) or prompt[-1]['content'] == 'second'
    return row['worth'] + len(completion) / 100 - row['finished']
"""


def test_rewards_of_a_file_and_of_a_reward_model_and_what_is_written(make_model, tmp_path):
    """A function gets the text (or the messages), the completion and the row; a reward model's
    center is subtracted."""
    folder = save(make_model, tmp_path / "sft", "sft", seed=1)
    other = save(make_model, tmp_path / "other", "sft", seed=2)
    reward_model = make_model(3, **(SMALL | {"scalar_head": True, "context": 120}))
    by = str(checkpoint.save(tmp_path / "rm", reward_model, TOK, {"stage": "reward", "step": 1, "center": 2.5}))
    (tmp_path / "mine.py").write_text(MINE)
    mine = f"{tmp_path}/mine.py:mine"
    turns = [rows.message("user", "first"), rows.message("assistant", "yes"), rows.message("user", "second")]
    whole = [*turns, rows.message("assistant", "not this")]
    examples = [{"prompt": f"q{i}", "worth": i} for i in range(6)]
    examples += [{"prompt": turns, "worth": 6}, {"messages": whole, "worth": 7}]
    flags = {"model": folder, "data": write_rows(tmp_path / "p.jsonl", examples), "reward": f"{mine},{by}"}
    flags |= {"reference": other, "max_new_tokens": 12, "samples": tmp_path / "new/sampled.jsonl"}
    figures = measure(tmp_path, **flags)
    sampled = [json.loads(line) for line in (tmp_path / "new/sampled.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in sampled] == [f"q{i}" for i in range(6)] + [turns] * 2  # as sft.py reads them

    conversations = [rows.prompt(row) for row in examples]
    _, samples, texts = sample_completions(checkpoint.load(folder)[0], TOK, conversations, max_new_tokens=12)
    assert [row["completion"] for row in sampled] == texts
    assert [row["finished"] for row in sampled] == [s.finished for s in samples]
    worth = [i + len(text) / 100 - s.finished for i, (text, s) in enumerate(zip(texts, samples, strict=True))]
    assert [row[mine] for row in sampled] == pytest.approx(worth)

    scores = []
    for messages, text, s in zip(conversations, texts, samples, strict=True):
        ids = chat.encode_prompt(TOK, messages) + TOK.encode_ordinary(text) + [END] * s.finished
        scores.append(score(reward_model, pack([ids])).item() - 2.5)
    assert [row[by] for row in sampled] == pytest.approx(scores, abs=1e-4) and np.std(scores) > 0.1
    assert figures[f"reward {by}"]["value"] == pytest.approx(np.mean(scores), abs=1e-4)

    _, samples, texts = sample_completions(checkpoint.load(other)[0], TOK, conversations, max_new_tokens=12)
    other_worth = [i + len(text) / 100 - s.finished for i, (text, s) in enumerate(zip(texts, samples, strict=True))]
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(worth, other_worth, strict=True)]
    assert figures[f"win rate by {mine}"]["value"] == pytest.approx(np.mean(wins))
    assert figures[f"reference's reward {mine}"]["value"] == pytest.approx(np.mean(other_worth))


def test_the_best_of_n_is_chosen_counted_and_read_by_sft(make_model, tmp_path):
    letters = {i: 2.0 for i in range(97, 123)}
    model = constant_model(make_model, TOK, {END: 4.0} | letters, context=96)
    folder = checkpoint.save(tmp_path / "run", model, TOK, SFT)
    (tmp_path / "mine.py").write_text("def length(prompt, completion, row):\n    return len(completion)\n")
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(12)])
    best_file, reward, n = tmp_path / "best.jsonl", f"{tmp_path}/mine.py:length", 5
    flags = {"model": folder, "data": data, "max_new_tokens": 12, "seed": 3, "reward": reward, "best_of": n}
    figures = measure(tmp_path, samples=best_file, **flags)
    # The best is the longest of those that finished
    conversations = [messages for messages, _ in rows.read(str(data), rows.prompt_only)[0]]
    _, samples, texts = sample_completions(model, TOK, conversations, max_new_tokens=12, n=n, seed=3)
    longest = {}
    for s, text in zip(samples, texts, strict=True):
        if s.finished:
            name = f"question {s.prompt_index}"
            longest[name] = max(longest.get(name, 0), len(text))
    assert sum(s.finished for s in samples) < len(samples) and len({len(text) for text in texts}) > 4
    sampled = [json.loads(line) for line in best_file.read_text().splitlines()]
    assert all(row["finished"] and row[reward] == len(row["completion"]) for row in sampled)
    assert {row["prompt"]: len(row["completion"]) for row in sampled} == longest
    kept = [row["completion"] for row in sampled if row["completion"].strip()]
    assert [m[-1]["content"] for m in rows.read(str(best_file), rows.conversation, skip_bad=True)[0]] == kept
    assert [name for name in figures if "KL" in name] == [
        f"best of {k}: KL to one completion, at most, nats" for k in (1, 2, 4, 5)
    ]
    # The bound, against the log-ratio of the best of n uniform draws: log n + (n - 1) log u
    bound = figures[f"best of {n}: KL to one completion, at most, nats"]["value"]
    best = np.random.default_rng(0).random((400_000, n)).max(1)
    assert bound == pytest.approx(np.mean(math.log(n) + (n - 1) * np.log(best)), abs=5e-3)


@pytest.mark.parametrize(
    "finished, best_of_1_2_4",
    [
        ([], [1, 5, 9]),  # none: the best of all
        ([0, 1, 2, 3], [1, 5, 9]),
        ([2], [1, 5, 2]),  # the only one
        ([1, 2], [1, 5, 5]),
    ],
)
def test_the_best_of_n_is_the_best_of_those_that_finished_or_else_of_all(finished, best_of_1_2_4):
    samples = [Sample(0, [], [], i in finished) for i in range(4)]
    values, best = evaluate.best_of_n(
        evaluate.Config("", best_of=4), samples, {"r": np.array([1.0, 5.0, 2.0, 9.0])}, "r"
    )
    assert [values[f"best of {n}: r"].tolist() for n in (1, 2, 4)] == [[score] for score in best_of_1_2_4]
    assert best.tolist() == [[1, 5, 2, 9].index(best_of_1_2_4[-1])]


def test_the_bound_on_the_kl_of_the_best_of_n_holds_if_completions_tie():
    rng = np.random.default_rng(1)
    for n in (2, 4, 16):
        p = rng.dirichlet(np.ones(40))
        below = np.concatenate([[0], p.cumsum()])
        best = below[1:] ** n - below[:-1] ** n  # of completions in the order of their rewards
        bound = math.log(n) - (n - 1) / n
        assert 0.6 * bound < np.sum(best * np.log(best / p)) < bound


def test_a_greedy_answer_is_right_if_it_ends_by_itself_with_the_right_number(make_model, tmp_path):
    model = make_model(**SMALL)
    optimizer = Optimizer(model, 0.02)
    conversation = [*ask("hi")[0], rows.message("assistant", "1,2 #### 1,234.50")]
    for _ in range(40):
        completion_logprobs(model, [chat.encode(TOK, conversation)]).mean().neg().backward()
        optimizer.step(1.0)
    answers = ("#### 1234.5", "1234.5", "so $1,234.50 #### 1,234.5", "#### -1234.5", "#### 1234", "#### 1")
    problems = [{"prompt": "hi", "answer": answer} for answer in answers]
    flags = {"model": checkpoint.save(tmp_path / "run", model.eval(), TOK, SFT)}
    flags["problems"] = write_rows(tmp_path / "problems.jsonl", problems)
    # 17 tokens are all but its end
    for max_new_tokens, limit, right in ((40, 0, 3 / 6), (40, 3, 1), (17, 3, 0), (18, 3, 1)):
        figures = measure(tmp_path, **flags, max_new_tokens=max_new_tokens, limit=limit)
        assert figures["problems right, greedy"]["value"] == right


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(make_model, tmp_path):
    for n in (1, 3, 6):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                share = sum(min(subset) < right for subset in subsets) / len(subsets)
                assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_problems_are_sampled_for_pass_at_k(make_model, tmp_path, capsys):
    """A model that says "#" mostly, and sometimes 5, or ends, independently of what it said."""
    logits = {ord("#"): 7.0, ord("5"): 6.0, END: 5.5}
    folder = checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, logits), TOK, SFT)
    problems = [{"prompt": f"q{i}", "answer": "#### 5"} for i in range(60)]
    flags = {"model": folder, "problems": write_rows(tmp_path / "problems.jsonl", problems), "max_new_tokens": 24}
    figures = measure(tmp_path, **flags, samples_per_problem=6, temperature=0.9, seed=4)
    assert "warning: --max_new_tokens=24 cuts 100% of the greedy answers; raise it" in capsys.readouterr().out
    names = [f"problems right, pass@{k} of 6 samples" for k in (1, 2, 4)]
    assert [name for name in figures if "pass" in name] == names and "problems right, greedy" in figures
    model = checkpoint.load(folder)[0]
    conversations = [rows.prompt(row) for row in problems]
    options = {"max_new_tokens": 24, "n": 6, "temperature": 0.9, "seed": 4}
    _, samples, texts = sample_completions(model, TOK, conversations, **options)
    right = np.zeros((60, 6))
    for i, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        right[i // 6, i % 6] = sample.finished and rules.number_after(text) == 5
    assert figures[names[0]]["value"] == pytest.approx(right.mean())
    pairs = [right[:, list(pair)].any(1).mean() for pair in itertools.combinations(range(6), 2)]
    assert figures[names[1]]["value"] == pytest.approx(np.mean(pairs)) and 0 < right.mean() < np.mean(pairs)


CHECKERS = """
def ends_in_five(prompt, completion, row):
    assert isinstance(row["level"], int)
    return row["finished"] and completion.endswith("5")

def says_five(prompt, completion, row):
    return completion.endswith("5")

def length(prompt, completion, row):
    return len(completion)
"""


def test_problems_are_judged_by_a_checker_and_told_apart_by_fields(make_model, tmp_path):
    logits = {ord("#"): 6.0, ord("5"): 6.0, END: 5.5}
    folder = checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, logits), TOK, SFT)
    problems = [{"prompt": f"q{i}", "kind": "ab"[i % 2], "level": i % 4, "answer": "no number"} for i in range(24)]
    (tmp_path / "own.py").write_text(CHECKERS)
    own = f"{tmp_path}/own.py:"
    flags = {"model": folder, "problems": write_rows(tmp_path / "problems.jsonl", problems), "max_new_tokens": 24}
    flags |= {"checker": f"{own}ends_in_five,{own}length", "samples_per_problem": 4, "seed": 4}
    figures = measure(tmp_path, **flags, by="kind,level")
    conversations = [rows.prompt(row) for row in problems]
    options = {"max_new_tokens": 24, "n": 4, "seed": 4}
    _, samples, texts = sample_completions(checkpoint.load(folder)[0], TOK, conversations, **options)
    right = np.reshape([s.finished and text.endswith("5") for s, text in zip(samples, texts)], (24, 4))
    tokens = np.reshape([len(s.tokens) for s in samples], (24, 4))
    lengths = np.reshape([len(text) for text in texts], (24, 4))
    labels = ["", ", kind a", ", kind a, level 0", ", kind a, level 2"]
    labels += [", kind b", ", kind b, level 1", ", kind b, level 3"]
    assert [name.removeprefix("tokens per sample") for name in figures if name.startswith("tokens")] == labels
    assert 0.1 < right.mean() < right.any(1).mean() < 1
    for label in labels:
        mine = [
            i
            for i, row in enumerate(problems)
            if f"kind {row['kind']}, level {row['level']}"[: len(label[2:])] == label[2:]
        ]
        expected = {"problems right, pass@1 of 4 samples": right, f"samples: {own}length": lengths}
        expected |= {"tokens per sample": tokens, "problems right, pass@4 of 4 samples": right.any(1)}
        for name, values in expected.items():
            assert figures[name + label]["value"] == pytest.approx(values[mine].mean()), name + label


def test_the_right_answers_are_kept_as_conversations_for_sft(make_model, tmp_path, capsys):
    """Those that ended, each text once, at most --keep_per_prompt; counted by level."""
    model = constant_model(make_model, TOK, {END: 12.0, ord("a"): 12.0, ord("5"): 12.0}, context=96)
    folder = checkpoint.save(tmp_path / "run", model, TOK, SFT)
    (tmp_path / "own.py").write_text(CHECKERS)
    data = [{"prompt": f"q{i}", "level": i % 2} for i in range(16)]
    flags = {"model": folder, "data": write_rows(tmp_path / "prompts.jsonl", data), "max_new_tokens": 6, "seed": 3}
    flags |= {"reward": f"{tmp_path}/own.py:says_five", "best_of": 8, "by": "level"}
    measure(tmp_path, **flags, kept=tmp_path / "new/kept.jsonl", keep_per_prompt=2)
    conversations = [rows.prompt(row) for row in data]
    _, samples, texts = sample_completions(model, TOK, conversations, max_new_tokens=6, n=8, seed=3)
    right = [[] for _ in data]
    for s, text in zip(samples, texts, strict=True):
        right[s.prompt_index] += [text] if s.finished and text.endswith("5") else []
    expected = [(f"q{i}", text) for i, some in enumerate(right) for text in list(dict.fromkeys(some))[:2]]
    kept = rows.read(str(tmp_path / "new/kept.jsonl"), rows.conversation)[0]
    assert [tuple(m["content"] for m in messages) for messages in kept] == expected
    assert any(text.endswith("5") and not s.finished for s, text in zip(samples, texts, strict=True))
    assert any(len(set(some)) > 2 for some in right) and any(len(set(some)) < len(some) for some in right)
    assert not all(right)
    printed = capsys.readouterr().out
    for level in (0, 1):
        mine = [min(2, len(set(some))) for some in right[level::2]]
        assert f"level {level}: {sum(mine)} right answers to {np.count_nonzero(mine)} of 8 prompts" in printed


def test_with_nothing_to_keep_the_earlier_file_stays_and_what_was_sampled_is_written(make_model, tmp_path, capsys):
    folder = checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {END: 9.0}), TOK, SFT)
    (tmp_path / "own.py").write_text(CHECKERS)
    flags = {"model": folder, "data": write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}] * 3)}
    flags |= {"reward": f"{tmp_path}/own.py:says_five", "max_new_tokens": 2, "samples": tmp_path / "samples.jsonl"}
    earlier = tmp_path / "kept.jsonl"
    earlier.write_text("of an earlier run\n")
    for kept in (earlier, tmp_path / "none.jsonl"):
        for written in ("out.json", "samples.jsonl"):
            (tmp_path / written).unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"--kept={kept}: not written, for no completion is right and ended"):
            measure(tmp_path, **flags, kept=kept)
        assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 3
        figures = json.loads((tmp_path / "out.json").read_text())["figures"]
        printed = capsys.readouterr().out
        assert all(name in printed for name in figures) and f"{kept}: 0 right answers to 0 of 3 prompts" in printed
    assert earlier.read_text() == "of an earlier run\n" and not (tmp_path / "none.jsonl").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_what_was_sampled_is_written_though_nothing_can_be_printed(make_model, tmp_path, monkeypatch):
    model = constant_model(make_model, TOK, {END: 7.0, ord("5"): 7.0})
    folder = checkpoint.save(tmp_path / "run", model, TOK, SFT)
    (tmp_path / "own.py").write_text(CHECKERS)
    flags = {"model": folder, "data": write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}] * 8), "best_of": 2}
    flags |= {"reward": f"{tmp_path}/own.py:says_five", "max_new_tokens": 1}  # some end, some do not
    flags["samples"] = tmp_path / "samples.jsonl"
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w", buffering=1))  # by lines, as on a terminal
    assert measure(tmp_path, **flags)
    sampled = rows.read(str(tmp_path / "samples.jsonl"), dict)[0]
    assert 0 < len(sampled) < 8


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("full", ["kept", "samples"])
def test_one_file_that_cannot_be_written_loses_no_other(make_model, tmp_path, capsys, full):
    checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {END: 7.0, ord("5"): 7.0}), TOK, SFT)
    (tmp_path / "own.py").write_text(SAYS_FIVE)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}] * 8)
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("kept", "samples")} | {full: "/dev/full"}
    flags = {"model": tmp_path / "run", "data": tmp_path / "prompts.jsonl", "best_of": 4, "max_new_tokens": 4}
    with pytest.raises(UserError, match="^/dev/full: No space left"):
        measure(tmp_path, **flags, **paths, reward=f"{tmp_path / 'own.py'}:says_five")
    assert "completion tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["figures"]
    other = ({"kept", "samples"} - {full}).pop()
    assert paths[other].read_text().count("\n") > 3


RESTLESS = """
calls = 0

def restless(prompt, completion, row):
    global calls
    calls += 1
    return calls * 1e-7
"""


def test_the_same_answer_of_both_models_is_a_tie(make_model, tmp_path):
    """Though a reward model reads it in another batch, and rounds otherwise."""
    checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {END: 5.0, ord("5"): 5.0}), TOK, SFT)
    checkpoint.save(tmp_path / "other", constant_model(make_model, TOK, {END: 5.0, ord("6"): 5.0}), TOK, SFT)
    (tmp_path / "own.py").write_text(RESTLESS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}] * 8)
    reward = f"{tmp_path / 'own.py'}:restless"
    flags = {"model": tmp_path / "run", "data": tmp_path / "prompts.jsonl", "reward": reward, "max_new_tokens": 9}
    for reference, rate in (("run", 0.5), ("other", 0.0)):
        figure = measure(tmp_path, **flags, reference=tmp_path / reference, temperature=0.0)[f"win rate by {reward}"]
        assert figure["value"] == rate


def test_a_reward_called_as_a_field_of_the_samples_replaces_none(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {END: 7.0, ord("5"): 7.0}), TOK, SFT)
    for name in ("completion", "prompt", "finished"):
        save(make_model, tmp_path / name, "reward", tok=TOK, scalar_head=True)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}] * 4)
    flags = {"model": "run", "data": "prompts.jsonl", "reward": "completion,prompt,finished", "max_new_tokens": 4}
    measure(tmp_path, **flags, samples="samples.jsonl")
    for row in map(json.loads, Path("samples.jsonl").read_text().splitlines()):
        assert row["prompt"] == "q" and isinstance(row["completion"], str) and isinstance(row["finished"], bool)
        assert all(isinstance(row[f"./{name}"], float) for name in ("completion", "prompt", "finished"))


SAYS_FIVE = """
def says_five(prompt, completion, row):
    return completion.endswith("5")
"""


def test_outputs_stay_in_the_directory_where_it_was_started(make_model, tmp_path, fork):
    """Whatever the threads that a reward has started do; and so does the reference."""
    model = constant_model(make_model, TOK, {END: 7.0, ord("5"): 7.0})
    checkpoint.save(tmp_path / "run", model, TOK, SFT)
    write_wanderer(tmp_path / "own.py", SAYS_FIVE)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}] * 8)
    flags = {"model": "run", "data": "prompts.jsonl", "reward": "own.py:says_five", "best_of": 4, "device": "cpu"}
    flags |= {"kept": "kept.jsonl", "samples": "new/samples.jsonl", "out": "out.json", "max_new_tokens": 4}
    for folder, also in (("best", {}), ("compared", {"reference": "../run", "best_of": 1})):
        (tmp_path / folder).mkdir()
        there = {name: f"../{flags[name]}" for name in ("model", "data", "reward")}

        def in_folder(folder=folder, changed=there | also):
            os.chdir(tmp_path / folder)
            run_script(evaluate, [f"--{name}={value}" for name, value in (flags | changed).items()])

        succeeds(fork(in_folder))
        assert sorted(os.listdir(tmp_path / folder)) == ["kept.jsonl", "new", "out.json"]
        assert os.listdir(tmp_path / folder / "new") == ["samples.jsonl"]


# --------------------------------------------------------------------------------------------------
# Choices


def test_the_right_choice_is_the_likeliest_raw_or_per_byte(make_model, tmp_path):
    """A model whose next byte depends on nothing: a has the logit 3, b 2, all others 0."""
    model = constant_model(make_model, TOK, {ord("a"): 3.0, ord("b"): 2.0})
    folder = checkpoint.save(tmp_path / "run", model, TOK, SFT)
    examples = [
        {"prefix": "it is ", "choices": ["b", "a"], "answer": 1},
        {"prefix": "", "choices": ["bb", "aaa"], "answer": "aaa"},  # a minimal pair; raw the shorter one leads
        {"prefix": "it", "choices": ["xy", "b"], "answer": 0},
        {"question": "which?", "choices": ["ab", "bb", "x"], "answer": "x"},
        {"prefix": "", "choices": ["b", "aaaa"], "answer": 1},
    ]
    figures = measure(tmp_path, model=folder, choices=write_rows(tmp_path / "c.jsonl", examples))
    assert figures["choices right"]["value"] == 2 / 5
    assert figures["choices right, per byte"]["value"] == 3 / 5
    log_z = math.log(258 + math.exp(3) + math.exp(2))
    raw = [[2 - log_z, 3 - log_z], [2 * (2 - log_z), 3 * (3 - log_z)], [-2 * log_z, 2 - log_z]]
    raw += [[5 - 2 * log_z, 4 - 2 * log_z, -log_z], [2 - log_z, 4 * (3 - log_z)]]
    share = [np.exp(z[i]) / np.exp(z).sum() for z, i in zip(raw, (1, 1, 0, 2, 1), strict=True)]
    name = "probability of the right one among the choices"
    assert figures[name]["value"] == pytest.approx(np.mean(share), rel=1e-4)
    assert measure(tmp_path, model=folder, choices=tmp_path / "c.jsonl", limit=1)["choices right"]["value"] == 1


def test_choices_that_score_the_same_share_what_is_right(make_model, tmp_path):
    """A model to which all is the same is right by chance, wherever the right one stands."""
    folder = checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {}), TOK, SFT)
    for answer in range(3):
        rows = [{"prefix": "it is ", "choices": ["a", "b", "c"], "answer": answer}]
        figures = measure(tmp_path, model=folder, choices=write_rows(tmp_path / "c.jsonl", rows))
        assert figures["choices right"]["value"] == figures["choices right, per byte"]["value"] == 1 / 3


@pytest.mark.parametrize("flag, other", [("out", "choices"), ("out", "data"), ("kept", "data"), ("samples", "out")])
def test_what_is_read_or_written_besides_is_not_replaced(make_model, tmp_path, flag, other):
    folder = checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {}), TOK, SFT)
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError, match="=.*/a.jsonl: is what is read or written besides"):
        measure(tmp_path, **{"model": folder, "data": file, "reward": "any.py:f", flag: file, other: file})
    assert file.read_text() == '{"prompt": "q"}\n'


def test_a_token_may_span_the_prefix_and_a_choice(make_model):
    tok = tokenizer.train(["the map, the red map " * 9], 256 + 4 + 9)
    row = {"prefix": "the ", "choices": ["map", "xy"]}
    chats = evaluate.choice_chats(tok, row)
    assert [c.ids.tolist() for c in chats] == [[tok.eot, *tok.encode_ordinary(f"the {x}")] for x in row["choices"]]
    assert tok.decode(chats[0].ids[chats[0].loss_mask].tolist()) == " map"
    assert tok.decode(chats[1].ids[chats[1].loss_mask].tolist()) == " xy"
    chats = evaluate.choice_chats(tok, {"question": "which?", "choices": ["map", "xy"]})
    prompt = chat.encode_prompt(tok, [rows.message("user", "which?")])
    assert chats[1].ids.tolist() == [*prompt, *tok.encode_ordinary("xy")] and chats[1].loss_mask.sum() == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"prefix": None}, '"prefix" .a text. or "question" .to a chat model. was expected'),
        ({"question": "too?"}, '"question" says something that is not read'),
        ({"passage": "The box is red."}, '"passage" says something that is not read'),
        ({"system": "Be brief."}, '"system" says something that is not read'),
        ({"images": ["a.png"]}, '"images" says something that is not read'),
        ({"prefix": None, "question": " "}, '"prefix" .a text. or "question"'),
        ({"prefix": None, "question": "q", "context": "The box is red."}, '"context" says something that is not read'),
        ({"choices": ["a", " "]}, "two or more strings"),
        ({"choices": ["a"]}, "two or more strings"),
        ({"choices": ["a", ""]}, "two or more strings"),
        ({"choices": "ab"}, "two or more strings"),
        ({"choices": ["a", "a"]}, "are the same"),
        ({"answer": "c"}, "'c'; one of the"),
        ({"answer": 2}, "2; one of the"),
        ({"answer": -1}, "-1; one of the"),
        ({"answer": True}, "True; one of the"),
        ({"answer": None}, "None; one of the"),
    ],
)
def test_rows_that_are_no_choices_are_named(tmp_path, change, named):
    path = write_rows(tmp_path / "c.jsonl", [{"prefix": "x", "choices": ["a", "b"], "answer": 0} | change])
    with pytest.raises(UserError, match=f"c.jsonl:1: .*{named}"):
        rows.read(str(path), evaluate.multiple_choice)


def test_choices_follow_the_whole_question(make_model, tmp_path):
    tok = tokenizer.byte_level()
    row = {"question": "The box is red. Which?", "passage": "The box is red.", "choices": ["ab", "c"], "answer": 0}
    talk = [rows.message(role, text) for role, text in (("user", "hi"), ("assistant", "a"), ("user", "Which?"))]
    spoken = row | {"question": None, "passage": None, "messages": talk}
    for asked, messages in ((row, [rows.message("user", row["question"])]), (spoken, talk)):
        asked = asked | {"system": "Be brief."}
        assert evaluate.multiple_choice(asked) == (asked, 0)
        expected = chat.encode_prompt(tok, [rows.message("system", "Be brief."), *messages])
        for found, choice in zip(evaluate.choice_chats(tok, asked), row["choices"], strict=True):
            assert found.ids.tolist() == [*expected, *tok.encode_ordinary(choice)]
    folder = checkpoint.save(tmp_path / "run", constant_model(make_model, TOK, {}), TOK, SFT)
    file = write_rows(tmp_path / "c.jsonl", [row | {"passage": None}, {"question": "q"}])
    assert measure(tmp_path, model=folder, choices=file, skip_bad=True)["choices right, per byte"]["value"] == 1 / 2


# --------------------------------------------------------------------------------------------------
# Preferences


def test_pairs_are_measured_by_a_reward_model_if_they_fit(make_model, tmp_path, capsys):
    model = make_model(3, **(SMALL | {"scalar_head": True}))
    folder = checkpoint.save(tmp_path / "rm", model, TOK, {"stage": "reward", "step": 1, "center": 9.0})
    examples = [{"prompt": f"q{i}", "chosen": "yes" * (i + 1), "rejected": "no"} for i in range(8)]
    for i, row in enumerate(examples):
        row |= {"gold_chosen": 1, "gold_rejected": i % 2}
    data = write_rows(tmp_path / "pairs.jsonl", [*examples, {"prompt": "q", "chosen": "x" * 90, "rejected": "y"}])
    margins = []
    for row in examples:
        pair = rows.preference(row)
        chosen, rejected = (score(model, pack([side.ids])).item() for side in chat.encode_pair(TOK, pair))
        margins.append(chosen - rejected)
    for limit, n in ((0, 8), (5, 5)):
        figures = measure(tmp_path, model=folder, pairs=data, limit=limit)
        left_out = "1 of 9 pairs left out, a side of which exceeds 96 tokens"
        assert (left_out in capsys.readouterr().out) == (not limit)
        assert figures["accuracy"]["value"] == pytest.approx(np.mean(np.array(margins[:n]) > 0))
        assert figures["accuracy of 'the longer wins'"]["value"] == 1
    with pytest.raises(UserError, match="no pair fits into 96 tokens"):
        pairs = rows.read(str(data), rows.preference)[0]
        evaluate.pair_figures(evaluate.Config(""), model, TOK, pairs[-1:])


# --------------------------------------------------------------------------------------------------
# What cannot be measured


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a"}\n', r"rows.jsonl:1: \"answer\" is missing; a string was expected"),
        ('{"prompt": "a", "answer": " "}\n', r"rows.jsonl:1: \"answer\" is empty"),  # which any text begins with
        ("", "nothing in it"),
    ],
)
def test_rows_without_their_fields_are_named(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        evaluate.read_strings(str(tmp_path / "rows.jsonl"), ("prompt", "answer"))


@pytest.mark.parametrize("better", ["tie", "a", "", "reply_a"])
def test_a_comparison_has_a_better_reply(tmp_path, better):
    file = write_rows(tmp_path / "j.jsonl", [{"prompt": "p", "better": better}])
    with pytest.raises(UserError, match='j.jsonl:1: .*"better" is '):
        evaluate.read_strings(str(file), ("prompt", "better"))


def test_nothing_to_measure_is_said(make_model, tmp_path):
    run = save(make_model, tmp_path / "run", "pretrain")
    with pytest.raises(UserError, match="give --text, --complete, --choices, --judge, --problems, --data or --pairs"):
        measure(tmp_path, model=run)


def test_what_cannot_be_measured_is_one_clear_line(make_model, tmp_path, fork):
    sft = save(make_model, tmp_path / "sft", "sft")
    rm = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    other = save(make_model, tmp_path / "other", "sft", tok=tokenizer.train(["the old map " * 5], 256 + 4 + 3))
    byte_ids = {bytes([b]): b for b in range(256)}
    plain = tokenizer.Tokenizer("plain", tokenizer.PATTERN, byte_ids, {"<|endoftext|>": 256}, pad="<|endoftext|>")
    base = save(make_model, tmp_path / "base", "pretrain", tok=plain)
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a question", "answer": "5"}])
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "x" * 99, "answer": "5"}])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2)
    choices = write_rows(tmp_path / "c.jsonl", [{"prefix": "x" * 98, "choices": ["a", "bb"], "answer": 0}])
    (tmp_path / "broken.py").write_text("def reward(:\n")
    (tmp_path / "fine.py").write_text("def reward(prompt, completion, row):\n    return 1\n")
    (tmp_path / "slow.py").write_text("import time\n\ndef reward(prompt, completion, row):\n    time.sleep(30)\n")
    slow = {"reward_timeout": 0.2, "max_new_tokens": 4}
    for flags, message in [
        ({"data": data, "reward": f"{tmp_path}/slow.py:reward", **slow}, "0.2 seconds"),
        ({"problems": data, "checker": f"{tmp_path}/slow.py:reward", **slow}, "0.2 seconds"),
        ({"model": data}, "prompts.jsonl: no checkpoint here, but a file"),
        ({"data": sft}, "a checkpoint, but a .jsonl or .parquet file was expected"),
        ({"data": data, "model": base}, "no <|im_start|>; run sft.py first"),
        ({"data": long}, "long.jsonl:1: a prompt of 118 tokens"),
        ({"problems": long}, "long.jsonl:1: a prompt of 118 tokens"),
        ({"problems": pairs}, 'pairs.jsonl:1: "answer" is missing'),
        ({"pairs": pairs}, f"--pairs: {sft} is not a reward model"),
        ({"model": rm, "pairs": data}, 'prompts.jsonl:1: no "chosen"'),
        ({"model": rm, "data": data}, "a reward model writes nothing"),
        ({"data": data, "reference": other}, "it has another tokenizer"),
        ({"data": data, "reference": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"data": data, "reference": rm}, "gives no probabilities"),
        ({"data": data, "reward": sft}, "not a reward model"),
        ({"data": data, "reward": f"{rm}*2"}, "a weight means nothing here"),
        ({"data": data, "reward": f"judge:{sft}"}, "--best_of must be 2 or more"),
        ({"data": data, "reward": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"data": data, "reward": f"{tmp_path}/absent.py:reward"}, "absent.py does not exist"),
        ({"data": data, "reward": f"{tmp_path}/broken.py:reward"}, "broken.py cannot be imported: SyntaxError"),
        ({"data": data, "reward": f"{tmp_path}/fine.py:other"}, "fine.py has no function other"),
        ({"choices": choices}, "have 101 tokens, the model's context 96"),
        ({"model": rm, "choices": choices}, "a reward model writes nothing"),
        ({"samples_per_problem": 4}, "--samples_per_problem: needs --problems"),
        ({"reward": rm}, "--reward: needs --data"),
        ({"reference": sft}, "--reference: needs --data"),
        ({"samples": tmp_path / "s.jsonl"}, "--samples: needs --data"),
        ({"data": data, "best_of": 2}, "--best_of: more than 1 needs a --reward"),
        ({"data": data, "kept": "k.jsonl"}, "--kept: needs a --reward"),
        ({"text": data, "kept": "k.jsonl"}, "--kept: needs --data"),
        ({"data": data, "by": "level"}, "--by: needs --problems or --kept"),
        ({"data": data, "checker": "a.py:b"}, "--checker: needs --problems"),
        ({"problems": data, "checker": "judge:a"}, "--checker=judge:a: a judge compares"),
        ({"problems": data, "checker": "a.py:b*-1"}, "--checker=a.py:b*-1: a weight means nothing here"),
        ({"problems": data, "checker": "a.py:b,a.py:c*0"}, "a.py:c*0: a weight means nothing here"),
        ({"problems": data, "checker": "a.py:b*x"}, "--checker=a.py:b*x: 'x' is not a number"),
        ({"problems": data, "checker": "a.py:b"}, "--checker=a.py:b: a.py does not exist"),
        ({"problems": data, "checker": "data/rules.py:brief", "by": "level"}, "row 1 has no field 'level'"),
        ({"data": data, "best_of": 0}, "--best_of=0"),
        ({"data": data, "temperature": -1}, "--temperature=-1"),
        ({"data": data, "max_new_tokens": 0}, "--max_new_tokens=0"),
        ({"data": data, "out": "/proc/no/out.json"}, "--out=/proc/no/out.json"),
        ({"data": data, "out": tmp_path}, f"--out={tmp_path}: is a directory"),
        ({"data": data, "samples": "/proc/no/s.jsonl"}, "--samples=/proc/no/s.jsonl"),
        ({"data": data, "temperature": 1e-31}, "--temperature=1e-31: a finite number was expected"),
        ({"data": data, "seed": 2**64}, "--seed=18446744073709551616: a count was expected"),
    ]:
        line = refused(start(fork, evaluate, **({"model": sft, "device": "cpu"} | flags)))
        assert message in line, (flags, line)
