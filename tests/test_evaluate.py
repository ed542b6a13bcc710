"""evaluate.py's figures against what they claim: sums of log-probabilities, exact matches, verdicts in both orders, rewards, KL, intervals that cover."""
import json
import time
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import SMALL, refused, save, start, write_rows

import checkpoint
import evaluate
import rollout
from common import UserError
from data import chat, tokenizer
from data.pack import pack
from data.rewards import brief, final_number, number_after, one_final_number, right_number, thinks_first
from model import logprobs, score
from optim import Optimizer


def constant_model(make_model, tok, scores, **shape):
    """A model that gives every token the logit `scores` has for it ({id: logit}, 0 for the rest), whatever it reads."""
    model = make_model(vocab_size=tok.n_vocab, context=256, **shape)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.fill_(1.0)  # the residual stream stays at 1 in every channel, and so does its norm
        model.norm.fill_(1.0)
        for i, score in scores.items():
            model.untied_head[i] = score / model.config.width
    return model


def test_document_nats_are_the_sums_of_logprobs(make_model):
    tok = tokenizer.byte_level()
    model = make_model(vocab_size=tok.n_vocab, context=256).eval()
    texts = ["one", "", "zwei Bäume", "and a third, longer than the others are"]
    totals = evaluate.document_nats(model, tok, texts, micro_tokens=30)
    for text, (nats, tokens, size) in zip(texts, totals):
        ids = [tok.eot, *tok.encode_ordinary(text), tok.eot]
        assert nats == pytest.approx(-logprobs(model, pack([ids])).sum().item(), rel=1e-5)
        assert (tokens, size) == (len(ids) - 1, len(text.encode()))


def test_a_document_longer_than_the_context_counts_every_token_once(make_model):
    tok = tokenizer.byte_level()
    model = constant_model(make_model, tok, {})
    nats, tokens, size = evaluate.document_nats(model, tok, ["x" * 1000], 16384)[0]
    assert (tokens, size) == (1001, 1000)
    assert nats == pytest.approx(1001 * np.log(tok.n_vocab), rel=1e-5)


def test_completions_must_begin_with_the_answer_and_not_go_on_in_it(make_model):
    tok = tokenizer.byte_level()
    model = constant_model(make_model, tok, {ord("7"): 5.0})  # goes on 7777... for ever
    rows = [{"prompt": "3 + 4 =", "answer": "7"}, {"prompt": "3 + 4 =", "answer": "77777777"}, {"prompt": "is it", "answer": "no"}]
    assert evaluate.completions_right(model, tok, rows) == [0, 0, 0]
    model = constant_model(make_model, tok, {tok.eot: 5.0})
    assert evaluate.completions_right(model, tok, [{"prompt": "3 + 4 =", "answer": ""}]) == [1]  # what was asked for: nothing


def test_a_judge_that_always_says_a_is_all_position_bias(make_model):
    tok = tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)
    a, b = (tok.encode_ordinary(text) for text in (" A", " B"))
    assert len(a) == len(b) == 1
    model = constant_model(make_model, tok, {a[0]: 4.0})
    rows = [{"prompt": "q", "reply_a": "x", "reply_b": "yy", "principle": "Be kind: always.", "better": "A" if i % 4 else "B"} for i in range(40)]
    found = evaluate.judge(model, tok, rows, seed=0, micro_tokens=500)
    assert found["position bias"]["value"] == pytest.approx(torch.sigmoid(torch.tensor(4.0)).item(), rel=1e-4)
    assert found["be kind, one order"]["value"] == 0.75  # it is right wherever A is
    assert found["be kind, both orders"]["value"] in (0.25, 0.75)  # both orders cancel: 0.5 to the last bit or beside it, the same for all


def test_a_tokenizer_without_single_labels_is_refused(make_model):
    tok = tokenizer.byte_level()
    with pytest.raises(UserError, match="single tokens"):
        rollout.prefer_first(constant_model(make_model, tok, {}), tok, ["?"], 100)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        f = evaluate.mean_interval(rng.random(80) < 0.3, seed=trial)
        assert f["low"] <= f["value"] <= f["high"]
        covered += f["low"] <= 0.3 <= f["high"]
    assert 180 <= covered <= 199


def test_main_writes_what_it_prints(make_model, tmp_path, capsys):
    tok = tokenizer.byte_level()
    checkpoint.save(tmp_path / "run", make_model(vocab_size=tok.n_vocab, context=128), tok, {"stage": "pretrain", "step": 3})
    (tmp_path / "text.jsonl").write_text('{"text": "a few words"}\n{"text": "and more"}\n')
    evaluate.main(evaluate.Config(model=str(tmp_path / "run"), text=str(tmp_path / "text.jsonl"), out=str(tmp_path / "made/figures.json"), device="cpu"))
    result = json.loads((tmp_path / "made/figures.json").read_text())
    assert (result["stage"], result["step"]) == ("pretrain", 3)
    assert set(result["figures"]) == {"nats/token", "bits/byte", "nats/document", "tokens/document"}
    printed = capsys.readouterr().out
    for name, f in result["figures"].items():
        assert f"{name:<48} {f['value']:9.4f}   [{f['low']:.4f}, {f['high']:.4f}]" in printed


@pytest.mark.parametrize("text, message", [('{"prompt": "a"}\n', r"rows.jsonl:1: no \"answer\" string"), ("", "nothing in it")])
def test_rows_without_their_fields_are_named(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        evaluate.required(tmp_path / "rows.jsonl", ("prompt", "answer"))


def test_nothing_to_measure_is_said(make_model, tmp_path):
    tok = tokenizer.byte_level()
    checkpoint.save(tmp_path / "run", make_model(vocab_size=tok.n_vocab), tok, {"stage": "pretrain", "step": 1})
    with pytest.raises(UserError, match="give --text, --complete, --judge, --problems, --data or --pairs"):
        evaluate.main(evaluate.Config(model=str(tmp_path / "run"), device="cpu"))


def test_one_document_has_no_interval():
    assert evaluate.mean_interval([3.5], seed=0) == {"value": 3.5, "low": None, "high": None}


# ---------------------------------------------------------------------------------------------------------------------------------
# Answers

TOK = tokenizer.byte_level()
END = chat.end_of_turn(TOK)


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def speaker(make_model, said, **shape):
    """A model that has learnt by heart what to answer to "hi"."""
    from sft import train_step

    model = make_model(**(SMALL | shape))
    optimizer = Optimizer(model, 0.02)
    for _ in range(40):
        train_step(model, [chat.encode(TOK, [*ask("hi")[0], {"role": "assistant", "content": said}])], 10**6)
        optimizer.step(1.0)
    return model.eval()


def test_long_prompts_cut_their_own_answers_and_no_others(make_model):
    model = make_model(**SMALL)  # context 96; a prompt's frame takes 19 tokens
    room = {text: 96 - len(chat.encode_prompt(TOK, *ask(text))) for text in ("a", "b" * 60, "c" * 70, "d")}
    prompts, samples, texts = rollout.answers(model, TOK, ask(*room), max_new=30, n=3, seed=1)
    assert [s.prompt_index for s in samples] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and len(texts) == 12
    for s, wanted in zip(samples[::3], room.values()):
        longest = min(30, wanted)
        assert len(s.tokens) == longest or s.finished and len(s.tokens) < longest
    assert min(room.values()) < 30
    _, alone, _ = rollout.answers(model, TOK, ask("a", "short", "short too", "d"), max_new=30, n=3, seed=1)
    assert [s.tokens for s in alone if s.prompt_index in (0, 3)] == [s.tokens for s in samples if s.prompt_index in (0, 3)]
    totals = evaluate.answer_logps(model, prompts, samples, 1.0, 200)
    np.testing.assert_allclose(totals, [sum(s.logprobs) for s in samples], atol=1e-3)  # what was sampled from is what is measured
    with pytest.raises(UserError, match="a prompt of 96 tokens fills the model's context of 96"):
        rollout.answers(model, TOK, ask("a", "e" * (room["a"] + 1)), max_new=30)


def test_answers_end_as_often_as_the_model_ends_them(make_model, tmp_path):
    """A model whose every token is the end with probability 1/4: lengths are geometric, cut at --max_new."""
    model = constant_model(make_model, TOK, {END: np.log(259 / 3)})
    rows = [([{"role": "user", "content": "q"}], {"prompt": "q"})] * 2000
    config = evaluate.Config("", max_new=8)
    figures, said = evaluate.answer_figures(config, model, TOK, rows, torch.device("cpu"))
    assert figures["answers finished"]["value"] == pytest.approx(1 - 0.75**8, abs=0.03)
    assert figures["answer tokens"]["value"] == pytest.approx(sum(0.75**k for k in range(8)), abs=0.2)
    assert {row["finished"] for row in said} == {True, False} and all("<|im_end|>" not in row["completion"] for row in said)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_that_of_exact_enumeration(make_model, tmp_path, temperature):
    """Answers of one token, from two models whose distributions are known."""
    p_logits, q_logits = {ord("a"): 6.0, ord("b"): 5.0, END: 6.5}, {ord("a"): 5.0, ord("b"): 6.0, END: 6.0}
    model = constant_model(make_model, TOK, p_logits)
    checkpoint.save(tmp_path / "reference", constant_model(make_model, TOK, q_logits), TOK, {"stage": "sft", "step": 1})
    p, q = (torch.zeros(260, dtype=torch.float64).index_add(0, torch.tensor(list(z)), torch.tensor(list(z.values()), dtype=torch.float64)).div(temperature).softmax(0) for z in (p_logits, q_logits))
    ratio = (p / q).log()
    kl = (p * ratio).sum().item()
    n = 4000
    rows = [([{"role": "user", "content": "q"}], {"prompt": "q"})] * n
    config = evaluate.Config("", max_new=1, reference=str(tmp_path / "reference"), temperature=temperature)
    figure = evaluate.answer_figures(config, model, TOK, rows, torch.device("cpu"))[0]["KL to the reference, nats an answer"]
    error = ((p * ratio**2).sum() - kl**2).sqrt().item() / n**0.5
    assert abs(figure["value"] - kl) < 4 * error and figure["high"] - figure["low"] == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert kl > 20 * error


def test_a_model_beside_itself_has_no_kl_and_wins_half(make_model, tmp_path):
    folder = save(make_model, tmp_path / "run", "sft")
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(20)])
    (tmp_path / "mine.py").write_text("def size(prompt, completion, row):\n    return len(completion) + row['finished']\n")
    config = evaluate.Config(str(folder), data=str(data), reference=str(folder), reward=f"{tmp_path}/mine.py:size", max_new=20, device="cpu", out=str(tmp_path / "out.json"))
    evaluate.main(config)
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert abs(figures["KL to the reference, nats an answer"]["value"]) < 1e-5
    name = f"{tmp_path}/mine.py:size"
    assert figures[f"win rate by {name}"]["value"] == 0.5 and figures[f"reward {name}"] == figures[f"reference's reward {name}"]


def test_rewards_of_a_file_and_of_a_reward_model_and_what_is_written(make_model, tmp_path):
    """A function gets the text (or the messages), the answer and the row; a reward model's center is subtracted."""
    folder = save(make_model, tmp_path / "sft", "sft", seed=1)
    other = save(make_model, tmp_path / "other", "sft", seed=2)
    judge = make_model(3, **(SMALL | {"scalar_head": True, "context": 120}))
    judge_folder = checkpoint.save(tmp_path / "rm", judge, TOK, {"stage": "reward", "step": 1, "center": 2.5})
    source = "def mine(prompt, completion, row):\n    assert isinstance(prompt, str) or prompt[-1]['content'] == 'second'\n    return row['worth'] + len(completion) / 100 - row['finished']\n"
    (tmp_path / "mine.py").write_text(source)
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "second"}]
    rows = [{"prompt": f"q{i}", "worth": i} for i in range(6)] + [{"prompt": turns, "worth": 6}, {"messages": [*turns, {"role": "assistant", "content": "not this"}], "worth": 7}]
    mine, by = f"{tmp_path}/mine.py:mine", str(judge_folder)
    config = evaluate.Config(str(folder), data=str(write_rows(tmp_path / "p.jsonl", rows)), reward=f"{mine},{by}", reference=str(other), max_new=12, device="cpu",
                             out=str(tmp_path / "new/out.json"), samples=str(tmp_path / "new/said.jsonl"))  # fmt: skip
    evaluate.main(config)
    figures = json.loads((tmp_path / "new/out.json").read_text())["figures"]
    said = [json.loads(line) for line in (tmp_path / "new/said.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in said] == [f"q{i}" for i in range(6)] + [turns] * 2  # as sft.py reads them
    model = checkpoint.load(folder)[0]
    conversations = [chat.prompt(row) for row in rows]
    prompts, samples, texts = rollout.answers(model, TOK, conversations, max_new=12)
    assert [row["completion"] for row in said] == texts and [row["finished"] for row in said] == [s.finished for s in samples]
    assert [row[mine] for row in said] == pytest.approx([i + len(t) / 100 - s.finished for i, (t, s) in enumerate(zip(texts, samples))])
    read = [chat.encode_prompt(TOK, m) + TOK.encode_ordinary(t) + [END] * s.finished for m, t, s in zip(conversations, texts, samples)]
    wanted = [score(judge, pack([ids])).item() - 2.5 for ids in read]
    assert [row[by] for row in said] == pytest.approx(wanted, abs=1e-4) and np.std(wanted) > 0.1
    assert figures[f"reward {by}"]["value"] == pytest.approx(np.mean(wanted), abs=1e-4)
    theirs = rollout.answers(checkpoint.load(other)[0], TOK, conversations, max_new=12)
    their_worth = [i + len(t) / 100 - s.finished for i, (t, s) in enumerate(zip(theirs[2], theirs[1]))]
    wins = [float(a > b) + 0.5 * (a == b) for a, b in zip([row[mine] for row in said], their_worth)]
    assert figures[f"win rate by {mine}"]["value"] == pytest.approx(np.mean(wins)) and figures[f"reference's reward {mine}"]["value"] == pytest.approx(np.mean(their_worth))


def test_a_greedy_answer_is_right_if_it_ends_by_itself_with_the_right_number(make_model):
    model = speaker(make_model, "1,2 #### 1,234.50")
    problems = [(ask("hi")[0], {"answer": answer}) for answer in ("#### 1234.5", "1234.5", "so $1,234.50 #### 1,234.5", "#### -1234.5", "#### 1234", "#### 1")]
    assert evaluate.exact_match(model, TOK, problems, 40) == [1, 1, 1, 0, 0, 0]
    assert evaluate.exact_match(model, TOK, problems[:1], 17) == [0]  # all but its end
    assert evaluate.exact_match(model, TOK, problems[:1], 18) == [1]


def test_distinct_by_hand():
    texts = ["a b a b", "a b", "c", ""]
    assert evaluate.distinct(texts, 1) == 3 / 7 and evaluate.distinct(texts, 2) == 2 / 4 and evaluate.distinct(["one"], 2) == 0
    assert evaluate.distinct(["a b c"], 2) == 1.0


NUMBERS = {
    "#### 72": 72, "so 5\n#### 72.": 72, "#### -5": -5, "#### $1,234,567": 1234567, "#### -$3.50": "-3.5", "#### 3.50 dollars": "3.5", "####7": 7, "#### 0072": 72,
    "#### 5 #### 6": 6, "####\n\n 9": 9, "#### 72\n- 5 apples are left": 72, "#### 72 or 73": 72, "#### 5%": 5, "#### 1,000": 1000, "#### 10, not 9": 10,
    "72": None, "": None, "####": None, "#### five": None, "#### - 5": None, "#### #### ": None, "#### 6 ####": None, "##### 5": 5, "#### .5": None,
    "#### 2**5": None, "#### 2 ** 5": None, "#### 10/2": None, "#### 6*7": None, "#### 3 + 4": None, "#### 99**98**97": None, "#### 1e9": None, "#### 2^5": None, "#### 7-(2)": None,
    "#### 1,23": None, "#### 1,0000": None, "#### 1.2.3": None, "#### 9" + "9" * 40: None, "#### 1." + "0" * 41: None, "#### 9" + ",999" * 30: None,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=range(len(NUMBERS)))
def test_numbers_after_the_mark(text):
    wanted = None if NUMBERS[text] is None else Decimal(NUMBERS[text])
    assert number_after(text) == wanted
    assert final_number("", text, {"answer": f"#### {wanted}", "finished": True}) == float(wanted is not None)
    assert final_number("", text, {"answer": f"#### {wanted}", "finished": False}) == 0.0


@given(st.text(alphabet="0123456789.,-+*/^$# e(\n٣½x", max_size=60))
def test_any_completion_has_a_number_or_none(text):
    number = number_after(text)
    assert number is None or number.is_finite()
    assert final_number("", text, {"answer": "#### 72"}) in (0.0, 1.0)


def test_no_completion_makes_the_verifier_slow():
    begin = time.perf_counter()
    for text in ["####" * 10**5, "#### " + "1" * 10**6, "#### " + "1," * 10**6, "#### " + "1,000" * 10**5, "#" * 10**6, "#### " + " " * 10**6, "#### 9" + "**9" * 10**5, "#### " + "-$" * 10**6, "#### 1." + "0" * 10**6]:
        final_number("", text, {"answer": "#### 72"})
    assert time.perf_counter() - begin < 1


def test_every_answer_of_gsm8k_is_read(realdata):
    for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl"):
        rows = [json.loads(line) for line in open(realdata(name), encoding="utf-8")]
        for row in rows:
            _, row = chat.problem(row)
            said = row["answer"].split("####")[1].strip()
            assert right_number(row) == Decimal(said.replace(",", "")) and "<<" not in row["answer"]
            assert final_number("", row["answer"], row) == 1.0


def test_pairs_are_measured_by_a_reward_model_those_that_fit(make_model, tmp_path, capsys):
    model = make_model(3, **(SMALL | {"scalar_head": True}))
    folder = checkpoint.save(tmp_path / "rm", model, TOK, {"stage": "reward", "step": 1, "center": 9.0})
    rows = [{"prompt": f"q{i}", "chosen": "yes" * (i + 1), "rejected": "no", "gold_chosen": 1, "gold_rejected": i % 2} for i in range(8)] + [{"prompt": "q", "chosen": "x" * 90, "rejected": "y"}]
    for limit, n in ((0, 8), (5, 5)):
        evaluate.main(evaluate.Config(str(folder), pairs=str(write_rows(tmp_path / "pairs.jsonl", rows)), limit=limit, device="cpu", out=str(tmp_path / "out.json")))
        assert ("1 of 9 pairs left out, a side of which is longer than the 96 tokens" in capsys.readouterr().out) == (not limit)
        figures = json.loads((tmp_path / "out.json").read_text())["figures"]
        lead = []
        for row in rows[:n]:
            lead.append(np.subtract(*(score(model, pack([chat.encode(TOK, [*ask(row["prompt"])[0], {"role": "assistant", "content": row[side]}]).ids])).item() for side in ("chosen", "rejected"))))
        assert figures["accuracy"]["value"] == pytest.approx(np.mean(np.array(lead) > 0)) and figures["accuracy of 'the longer wins'"]["value"] == 1
    with pytest.raises(UserError, match="no pair fits into the 96 tokens"):
        evaluate.pair_figures(model, TOK, [chat.preference(rows[-1])], 1000, 0)


def test_what_cannot_be_measured_is_one_clear_line(make_model, tmp_path, fork):
    sft, rm = save(make_model, tmp_path / "sft", "sft"), save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    small = save(make_model, tmp_path / "small", "reward", scalar_head=True, context=30)
    other = save(make_model, tmp_path / "other", "sft", tok=tokenizer.train(["the old map " * 5], 256 + 4 + 3))
    base = save(make_model, tmp_path / "base", "pretrain", tok=tokenizer.Tokenizer("plain", tokenizer.PATTERN, {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256}, pad="<|endoftext|>"))
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a question", "answer": "5"}])
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "x" * 99, "answer": "5"}])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2)
    (tmp_path / "broken.py").write_text("def reward(:\n")
    (tmp_path / "fine.py").write_text("def reward(prompt, completion, row):\n    return 1\n")
    for flags, named in [
        ({"model": data}, "prompts.jsonl: no checkpoint here, but a file"),
        ({"data": sft}, "a checkpoint, where a .jsonl"),
        ({"data": data, "model": base}, "no <|im_start|>; only sft.py starts from such a model"),
        ({"data": long}, "a prompt of 118 tokens fills the model's context of 96"),
        ({"problems": long}, "a prompt of 118 tokens fills the model's context of 96"),
        ({"problems": pairs}, 'pairs.jsonl:1: "answer" is missing'),
        ({"pairs": pairs}, f"--pairs: {sft} is no reward model"),
        ({"model": rm, "pairs": data}, 'prompts.jsonl:1: no "chosen"'),
        ({"model": rm, "data": data}, "a reward model writes nothing"),
        ({"data": data, "reference": other}, "it has another tokenizer than --model"),
        ({"data": data, "reference": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"data": data, "reward": sft}, "not a reward model"),
        ({"data": data, "reward": f"{rm}*2"}, "a weight says nothing here"),
        ({"data": data, "reward": f"judge:{sft}"}, "--best_of must be 2 or more"),
        ({"data": data, "reference": rm}, "gives no probabilities"),
        ({"data": data, "reward": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"data": data, "reward": f"{tmp_path}/absent.py:reward"}, "absent.py does not exist"),
        ({"data": data, "reward": f"{tmp_path}/broken.py:reward"}, "broken.py cannot be imported (SyntaxError"),
        ({"data": data, "reward": f"{tmp_path}/fine.py:other"}, "fine.py has no function other"),
        ({"reward": rm}, "--reward: needs --data"),
        ({"reference": sft}, "--reference: needs --data"),
        ({"samples": tmp_path / "s.jsonl"}, "--samples: needs --data"),
        ({"data": data, "temperature": -1}, "--temperature"),
        ({"data": data, "max_new": 0}, "--max_new"),
        ({"data": data, "out": "/proc/no/out.json"}, "--out=/proc/no/out.json"),
    ]:  # fmt: skip
        line = refused(start(fork, evaluate, **({"model": sft, "device": "cpu", "max_new": 5} | flags)))
        assert named in line, (flags, line)


def test_rewards_of_form_and_length():
    for said, worth in {"2 + 3 = 5 #### 5": 1, "#### 5 #### 6": 0, "#### 5.": 0, "#### five": 0, "5": 0, "####  $1,000 ": 1, "": 0}.items():
        assert one_final_number("", said, {}) == worth, said
        assert one_final_number("", said, {"finished": False}) == 0
    for said, worth in {"<think>a\nb</think>\n<answer>4</answer>": 1, "<think></think><answer>4</answer>": 0, "x <think>a</think><answer>4</answer>": 0, "<think>a</think>": 0,
                        "<think>a<think>b</think><answer>4</answer>": 0, "<think>a</think> so <answer>4</answer>": 0, "<think>a</think><answer>4</answer><answer>5</answer>": 0}.items():  # fmt: skip
        assert thinks_first("", said, {}) == worth, said
    assert brief("", "", {}) == 1 and brief("", "a " * 50, {}) == 0.5 and brief("", "a " * 1000, {}) == 0
    begin = time.perf_counter()
    for nasty in ("<think>" * 30000, "<think>" + "<answer" * 30000, "<think>a</think>" + " " * 100000 + "<answer>", "####" * 50000, "#### " + "1," * 50000):
        assert thinks_first("", nasty, {}) == one_final_number("", nasty, {}) == 0
    assert time.perf_counter() - begin < 1


@given(st.text())
def test_rewards_of_form_and_length_take_any_text(said):
    assert {one_final_number("", said, {}), thinks_first("", said, {})} <= {0.0, 1.0} and 0 <= brief("", said, {}) <= 1
