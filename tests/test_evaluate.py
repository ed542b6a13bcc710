"""evaluate.py's figures against what they claim: sums of log-probabilities, exact matches, verdicts in both orders, intervals that cover."""
import json

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
from common import UserError
from data import tokenizer
from data.pack import pack
from model import logprobs


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
        evaluate.prefer_first(constant_model(make_model, tok, {}), tok, ["?"], 100)


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
