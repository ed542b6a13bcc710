"""sft.py: the loss against fp64 on full logits, real runs that stop, resume, split their work and
learn, and what is said about bad input."""

import json
import math
import os
import random
import re

import numpy as np
import pytest
import torch
from conftest import random_model
from runs import SMALL, here, losses, pair, records, refused, results, save, start, succeeds, write_rows

import evaluate
import pretrain
import rollout
import sft
from data import chat, corpus, tokenizer
from data.pack import pack
from data.read import read_json
from runtime import checkpoint
from runtime.cli import check_ranges
from runtime.errors import UserError

TINY = {"batch_tokens": 300, "eval_every": 10, "save_every": 10, "keep_last": 9, "max_new_tokens": 12, "device": "cpu"}


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def some_rows(n, seed, turns=2):
    """Chats about names, of one to `turns` turns: a little to learn."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        messages = [{"role": "system", "content": "be brief"}] if draw.random() < 0.2 else []
        for _ in range(draw.randint(1, turns)):
            name = draw.choice(["Ada", "Ben", "Cleo"])
            question = draw.choice([f"hi {name}", f"{name}?"]) + f" {i}"
            messages += turn(question, f"{name}!" + " yes" * draw.randint(0, 2))
        rows.append({"messages": messages})
    return rows


def encoded(rows):
    tok = tokenizer.byte_level()
    return [chat.encode(tok, row["messages"]) for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, chats, problems and a text to replay."""
    folder = tmp_path_factory.mktemp("sft")
    save(random_model, folder / "base", "pretrain")
    (folder / "text.txt").write_text("the old map and the red door. " * 60)
    problems = []
    for a, b in ((1, 2), (2, 2)):
        answer = f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
        problems.append({"question": f"{a} + {b}?", "answer": answer})
    return {
        "init": folder / "base",
        "data": write_rows(folder / "chat.jsonl", some_rows(120, 1)),
        "problems": write_rows(folder / "problems.jsonl", problems),
        "replay": folder / "text.txt",
    }


@pytest.fixture(scope="module", autouse=True)
def warm_caches(files, tmp_path_factory):
    """One run in this process: forked children inherit the caches that it fills, and start in half
    the time."""
    paths = {"init": files["init"], "data": files["data"], "out": tmp_path_factory.mktemp("warm") / "run"}
    here(sft.main, sft.Config(**TINY, **{name: str(path) for name, path in paths.items()}, steps=1))


@pytest.fixture
def flags_for(files):
    """A function: (out, flags) -> the flags of a run on the tiny files."""

    def add(out, **flags):
        return TINY | {"init": files["init"], "data": files["data"], "out": out} | flags

    return add


@pytest.fixture
def tune(fork, flags_for):
    """A function: (out, flags) -> Child that runs sft.py with them on the tiny files."""

    def run(out, **flags):
        return start(fork, sft, **flags_for(out, **flags))

    return run


# --------------------------------------------------------------------------------------------------
# The loss


def loss_of_full_logits(model, rows):
    """Mean over the trained tokens of -log p, from each conversation's text: bytes are tokens, and
    every special token is one."""
    nats, count, special = 0.0, 0, {name: i for i, name in enumerate(tokenizer.SPECIALS, 256)}
    for row in rows:
        ids, trained = [], []
        for i, m in enumerate(row["messages"]):
            head = [*(b"\n" if i else b""), special["<|im_start|>"], *m["role"].encode(), *b"\n"]
            body = [*m["content"].encode(), special["<|im_end|>"]]
            ids += head + body
            trained += [False] * len(head) + [m["role"] == "assistant"] * len(body)
        logp = torch.log_softmax(model(pack([ids])) @ model.head.T, dim=-1)
        for t in range(1, len(ids)):
            if trained[t]:
                nats, count = nats - logp[t - 1, ids[t]], count + 1
    return nats / count


@pytest.mark.parametrize("micro_batch_tokens", [1, 150, 10**6])
def test_loss_and_gradient_are_those_of_full_logits(make_model, micro_batch_tokens):
    """In fp64, however the batch is split, and so packed == alone."""
    model, rows = make_model(**SMALL | {"context": 200}).double(), some_rows(9, 2, turns=3)
    assert any(m["role"] == "system" for row in rows for m in row["messages"])
    expected = loss_of_full_logits(model, rows)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = sft.mean_nll(model, encoded(rows), micro_batch_tokens)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9 * g.abs().max().item(), msg=name)
    with torch.no_grad():
        assert sft.mean_nll(model, encoded(rows), micro_batch_tokens) == pytest.approx(loss, rel=1e-6)


def test_a_conversation_costs_the_same_in_any_pack(make_model):
    model, chats = make_model(**SMALL), encoded(some_rows(8, 3))
    alone = sum(sft.nll_sum(model, [c]).item() for c in chats)
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 3, 1, 0, 2, 6, 5, 4]):
        together = sft.nll_sum(model, [chats[i] for i in order]).item()
        assert together == pytest.approx(alone, rel=1e-5)


def test_answers_and_the_ends_of_turns_get_gradient_and_nothing_else_does(make_model):
    """If a model says anything with the same probability, the gradient of a token's output row
    tells how often it was trained."""
    model, rows, tok = make_model(**SMALL), some_rows(12, 4), tokenizer.byte_level()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.fill_(1.0)
        model.norm.fill_(1.0)  # hidden is 1 in every channel
    sft.mean_nll(model, encoded(rows), 10**6)
    answers = [m["content"].encode() for row in rows for m in row["messages"] if m["role"] == "assistant"]
    ids = [b for answer in answers for b in answer] + [chat.end_of_turn(tok)] * len(answers)
    count = np.bincount(ids, minlength=260)
    expected = 1 / 260 - count / count.sum()
    np.testing.assert_allclose(model.untied_head.grad.mean(1), expected, atol=1e-6)
    assert expected[ord("?")] > 0 > expected[chat.end_of_turn(tok)]  # only users ask; every answer ends


def test_replayed_text_is_trained_as_in_pretraining(make_model):
    tok, model = tokenizer.byte_level(), make_model(**SMALL)
    streams = [corpus.encode(tok, ["a red door", "two bells and an old map, " * 9])]
    pieces = corpus.pieces(streams, tok.eot, SMALL["context"] - 1)
    chats = corpus.piece_chats(streams, pieces)
    assert max(len(c.ids) for c in chats) == SMALL["context"]
    nats, _ = pretrain.evaluate(model, streams, pieces, tokenizer.token_bytes(tok), 10**6)
    assert sft.mean_nll(model, chats, 10**6) == pytest.approx(nats, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Models from elsewhere


def foreign_tokenizer(kind):
    """A tokenizer that knows no conversation."""
    ranks = tokenizer.train(["the old map and the red door " * 5], 256 + 4 + 9)._mergeable_ranks
    if kind == "gpt2":
        specials, eot = {"<|endoftext|>": len(ranks)}, "<|endoftext|>"
        return tokenizer.Tokenizer("gpt2", tokenizer.GPT2_PATTERN, ranks, specials, pad=eot)
    specials = {s: len(ranks) + i for i, s in enumerate(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])}
    eot = "<|end_of_text|>"
    return tokenizer.Tokenizer("llama", tokenizer.PATTERN, ranks, specials, eot=eot, pad=eot)


@pytest.mark.parametrize("padding", [0, 2, 50])  # of the model's vocabulary beyond the tokenizer's
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_chat_tokens_are_added_to_a_model_from_elsewhere(make_model, tmp_path, capsys, kind, tied, padding):
    tok = foreign_tokenizer(kind)
    old = tok.n_vocab + padding
    model = make_model(**(SMALL | {"vocab_size": old, "tied": tied, "qk_norm": kind == "gpt2"}))
    p = pack([list(range(1, 50, 3))])
    before, mean, ids = model(p) @ model.head.T, model.embed.detach().mean(0), tok.encode_ordinary("the old map?")
    model, tok = sft.add_chat_tokens(model, tok)
    new = max(old, tok.n_vocab)
    assert model.config.vocab_size == len(model.embed) == new
    assert len(model.head) == tok.n_vocab == new - model.config.padding  # what pads the vocabulary is not predicted
    assert (new > old) == ("are new to this model" in capsys.readouterr().out)
    after = model(p) @ model.head.T
    torch.testing.assert_close(after[:, :old], before[:, : tok.n_vocab], rtol=0, atol=0)
    if new > old:
        torch.testing.assert_close(model.embed[old:], mean.expand(new - old, -1))
        mean_logit = before.mean(1, keepdim=True).expand(-1, new - old)
        torch.testing.assert_close(after[:, old:], mean_logit, rtol=1e-4, atol=1e-4)
    assert tok.encode_ordinary("the old map?") == ids
    assert tok.eot < chat.special(tok, "<|im_start|>") < chat.end_of_turn(tok) < new

    folder = checkpoint.save(tmp_path, model, tok, {"stage": "sft", "step": 1})
    again, their_tok, _ = checkpoint.load(folder)
    assert again.config == model.config and their_tok.pad == tok.pad
    assert tokenizer.fingerprint(their_tok) == tokenizer.fingerprint(tok)
    torch.testing.assert_close(again(p) @ again.head.T, after, rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == chat.end_of_turn(their_tok)
    assert sft.add_chat_tokens(again, their_tok)[0].config.vocab_size == new  # once is enough


def test_a_downloaded_model_is_tuned(make_model, tmp_path, tune):
    transformers = pytest.importorskip("transformers")
    folder = save(make_model, tmp_path / "theirs", "pretrain", tok=foreign_tokenizer("llama"), qk_norm=False)
    for name in ("manifest.json", "feinschliff.json"):
        (folder / name).unlink()
    output = succeeds(tune(tmp_path / "run", init=folder, steps=2))
    assert "2 tokens of a conversation are new to this model" in output
    model, tok, info = checkpoint.load(tmp_path / "run")
    assert info["lineage"][0]["path"] == str(folder) and info["stage"] == "sft"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.find(tmp_path / "run"))
    ids = chat.encode_prompt(tok, [{"role": "user", "content": "the old map?"}])
    logits = model(pack([ids])) @ model.head.T
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], logits, rtol=0, atol=1e-4)
    succeeds(tune(tmp_path / "run", init=folder, steps=2, resume=True))


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_a_handful_of_chats_is_learned_by_heart_and_the_model_stops_by_itself(tune, tmp_path):
    answers = ["Ada!", "red and blue", "no.\n\nnever", "7 = 7\n#### 7", "ja, grün"]
    rows = [{"prompt": f"question {i}", "completion": text} for i, text in enumerate(answers)]
    data = write_rows(tmp_path / "five.jsonl", rows)
    problems = [{"prompt": "question 3", "answer": answer} for answer in ("7", "#### 7", "8")]
    problems = write_rows(tmp_path / "p.jsonl", problems)
    run = tmp_path / "run"
    flags = {"lr": 0.02, "eval_every": 20, "save_every": 40, "max_new_tokens": 30}
    output = succeeds(tune(run, data=data, val=data, problems=problems, steps=120, **flags))
    model, tok, info = checkpoint.load(run)
    questions = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    _, samples, texts = rollout.sample_completions(model, tok, questions, max_new_tokens=60, temperature=0)
    assert texts == answers and all(s.finished for s in samples)
    found = [r for r in records(run) if "val_loss" in r]
    assert found[-1]["val_loss"] < 0.1 < found[0]["val_loss"] and found[-1]["exact_match"] == pytest.approx(2 / 3)
    assert "66.7% of 3 problems right" in output and "5 conversations" in output and "<|im_end|>»" in output
    assert "--problems=" in output and "of 3 rows to validate on, 3 have a prompt that is trained on as well" in output
    assert info["stage"] == "sft" and info["metrics"] == {k: v for k, v in found[-1].items() if k != "step"}
    assert [parent["stage"] for parent in info["lineage"]] == ["pretrain"]
    assert "question 0\n--- answers:\nAda!" in (run / "samples.txt").read_text()
    best = min((r for r in found if r["step"] % 40 == 0), key=lambda r: r["val_loss"])
    assert os.readlink(run / "latest") == "step_000120"
    assert os.readlink(run / "best") == f"step_{best['step']:06d}"


@pytest.mark.parametrize("limit, said", [(2, 1), (80, 0)])
def test_greedy_answers_that_the_limit_cuts_are_said(tune, tmp_path, files, limit, said):
    """Nothing is right then, whatever the model knows."""
    model, tok, _ = checkpoint.load(files["init"])
    model.untied_head.data.zero_()[chat.end_of_turn(tok)] = 5.0 if limit == 80 else 0.0
    init = checkpoint.save(tmp_path / "init", model, tok, {"stage": "pretrain", "step": 1})
    flags = {"init": init, "problems": files["problems"], "steps": 2, "eval_every": 1, "lr": 1e-9}
    output = succeeds(tune(tmp_path / "run", max_new_tokens=limit, **flags))
    assert output.count(f"--max_new_tokens={limit} cuts 100% of the completions") == said


def test_only_the_same_run_is_resumed(tune, tmp_path, files):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(files["replay"].read_text())
    data = write_rows(tmp_path / "chat.jsonl", some_rows(120, 1))
    flags = {"steps": 3, "data": data, "replay": text, "replay_share": 0.3, "problems": files["problems"]}
    succeeds(tune(run, **flags))
    output = succeeds(tune(run, resume=True, **flags))
    assert "nothing is left to do" in output
    assert "--steps" not in output  # that would be another run, since the learning rate falls to 0 over the steps
    for changed, named in [
        ({"lr": 0.5}, "--lr=0.5: this run was started with --lr=0.0"),
        ({"steps": 40}, "--steps=40"),
        ({"replay_share": 0.2}, "--replay_share=0.2"),
        ({"epochs": 2}, "--epochs"),
    ]:
        assert named in refused(tune(run, resume=True, **(flags | changed)))
    for file in (text, data):
        before = file.read_text()
        file.write_text(before + before.splitlines()[0] + "\n")
        line = refused(tune(run, resume=True, **flags))
        assert f"{file}: not the data this run was started with" in line
        file.write_text(before)


def test_one_process_micro_batches_and_two_processes_agree(tune, fork, tmp_path, files, flags_for):
    flags = {"steps": 6, "eval_every": 3, "save_every": 0, "replay": files["replay"], "problems": files["problems"]}
    succeeds(tune(tmp_path / "whole", **flags))
    succeeds(tune(tmp_path / "micro", micro_batch_tokens=1, **flags))
    outputs = pair(fork, sft, **flags_for(tmp_path / "pair", **flags))
    assert "step 6/6" in outputs[0] and not outputs[1].strip()  # only one of them prints
    pair(fork, sft, **flags_for(tmp_path / "sharded", shard="fsdp", micro_batch_tokens=60, **flags))
    expected = results(tmp_path / "whole")
    for name in ("micro", "pair", "sharded"):
        for ours, theirs in zip(results(tmp_path / name), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name


def test_replay_keeps_what_was_known(tune, tmp_path, files):
    """Half of the batch is text: its loss stays below that of a run without; the share is the one
    of the flag."""
    text, nats = files["replay"].read_text(), {}
    for name, flags in (("without", {}), ("with", {"replay": files["replay"], "replay_share": 0.5})):
        output = succeeds(tune(tmp_path / name, steps=30, lr=0.01, eval_every=0, save_every=0, **flags))
        model, tok, _ = checkpoint.load(tmp_path / name)
        nats[name] = evaluate.document_nats(model, tok, [text], 10**6)[0, 0]
    assert "30 steps of 300 tokens, 150 of them replayed text" in output
    few = {"replay": files["replay"], "replay_share": 0.05, "eval_every": 0, "steps": 5}
    succeeds(tune(tmp_path / "few", **few))
    most = 300 + 1  # with the id that begins the replayed piece
    assert max(record["tokens"] for record in records(tmp_path / "few") if "loss" in record) <= most
    assert "--replay_share=0.001: no token of a batch of 300" in refused(
        tune(tmp_path / "none", **few | {"replay_share": 0.001})
    )
    assert nats["with"] < 0.8 * nats["without"]


def test_epochs_are_the_steps_that_see_every_conversation_once(tune, tmp_path, files):
    """Each once, and so that the printed count is what has been seen; the last batch is smaller."""
    rows = [json.loads(line) for line in files["data"].read_text().splitlines()]
    val = write_rows(tmp_path / "val.jsonl", some_rows(5, 7))
    chats = chat.drop_too_long(encoded(rows), SMALL["context"], chat.end_of_turn(tokenizer.byte_level()), "")
    total = sum(len(c.ids) for c in chats)
    for epochs, steps in ((1, 0), (2, 0), (1, 7)):
        run = tmp_path / f"{epochs} {steps}"
        output = succeeds(tune(run, val=val, epochs=epochs, steps=steps, batch_tokens=1000, eval_every=0))
        seen = sum(r["tokens"] for r in records(run) if "loss" in r)
        assert seen == epochs * total if not steps else seen < total
        (said,) = re.findall(r"([\d.]+) epochs", output)
        state = read_json(checkpoint.find(run) / "train_state.json")["order"]
        assert float(said) == pytest.approx(state["epoch"] + state["index"] / len(chats), abs=0.006)


def test_samples_that_were_cut_are_refused_as_answers(tune, tmp_path):
    samples = [{"prompt": f"{i}?", "completion": "yes and", "finished": i % 2 == 0} for i in range(30)]
    data = write_rows(tmp_path / "samples.jsonl", samples)
    assert 'samples.jsonl:2: "finished" is false' in refused(tune(tmp_path / "run", data=data, steps=1))
    output = succeeds(tune(tmp_path / "other", data=data, steps=1, skip_bad=True, val_fraction=0.3))
    assert "15 bad lines left out, 15 read" in output


# --------------------------------------------------------------------------------------------------
# What does not fit, and what a user gets wrong


def test_long_conversations_are_cut_or_dropped_and_counted(tune, tmp_path):
    short, long = {"messages": turn("hi", "hello")}, {"messages": turn("x" * 200, "a")}
    many = {"messages": turn("hi", "hello") * 5}
    data = write_rows(tmp_path / "long.jsonl", [many] * 3 + [long] * 2 + [short] * 4)
    # The long one is also the first question that samples.txt could show.
    others = [{"messages": turn(f"{i}?", "hello")} for i in range(3)]
    val = write_rows(tmp_path / "val.jsonl", [long, many, *others])
    output = succeeds(tune(tmp_path / "run", data=data, val=val, steps=2))
    cut = f"{data}: of 9 conversations, 3 were cut after their last answer that ends within 96 tokens"
    assert f"{cut}, 2 dropped, none of whose answers does" in output
    assert "7 conversations" in output and f"{val}: of 5 conversations, 1 were cut" in output
    assert (tmp_path / "run/samples.txt").read_text().startswith("=== step 2 ===\nhi\n--- answers:\n")
    only = write_rows(tmp_path / "only.jsonl", [long] * 5)
    line = refused(tune(tmp_path / "none", data=only, val=data))
    assert "only.jsonl: no conversation has an answer that ends within 96 tokens" in line
    assert not (tmp_path / "none/log.jsonl").exists()


@pytest.mark.parametrize(
    "flag, value",
    [
        *[("epochs", 0.0), ("epochs", math.inf), ("val_fraction", 1.0), ("val_fraction", 0.0), ("replay_share", 1.0)],
        *[("replay_share", 0.0), ("lr", math.inf), ("lr", -1.0), ("warmup", 2.0), ("warmup", -0.1), ("steps", -1)],
        *[("weight_decay", -1.0), ("max_grad_norm", -1.0), ("keep_last", 0), ("print_every", 0)],
        *[("max_new_tokens", 0), ("shard", "ddp"), ("batch_tokens", -1)],
    ],
)
def test_a_value_outside_its_range_is_refused(flag, value):
    with pytest.raises(UserError, match=f"--{flag}="):
        check_ranges(sft.Config(**({"init": "base", "data": "chat.jsonl", "out": "run"} | {flag: value})))


def test_bad_input_is_one_clear_line_and_costs_nothing(tune, make_model, tmp_path, files):
    run = tmp_path / "old"
    succeeds(tune(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for name, some in {
        "pairs.jsonl": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
        "text.jsonl": [{"text": "once"}],
        "one.jsonl": some_rows(1, 1),
        "roles.jsonl": [*some_rows(1, 1), {"messages": [{"role": "assistant", "content": "a"}]}],
        "words.jsonl": [{"prompt": "q", "answer": "five"}],
        "long.jsonl": [{"prompt": "x" * 99, "answer": "5"}],
    }.items():
        write_rows(tmp_path / name, some)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"messages": turn("q", "a")}) + '\n{"messages": \n')
    scalar = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    pairs = "pairs.jsonl:1: this is a preference (chosen, rejected), not a conversation; reward.py and dpo.py read it"
    for flags, named in [
        ({"data": tmp_path / "pairs.jsonl"}, pairs),
        ({"data": tmp_path / "text.jsonl"}, 'text.jsonl:1: "text" is what pretraining reads'),
        ({"data": tmp_path / "roles.jsonl"}, "roles.jsonl:2: \"messages\"[0]: a message of 'assistant'"),
        ({"data": broken}, "broken.jsonl:2: "),
        ({"data": files["init"]}, "base: a checkpoint, "),
        ({"data": tmp_path / "one.jsonl"}, "one prompt only"),
        ({"data": tmp_path / "absent.jsonl"}, "absent.jsonl: No such file"),
        ({"val": tmp_path / "absent.jsonl"}, "absent.jsonl: No such file"),
        ({"replay": tmp_path / "absent.txt"}, "absent.txt: No such file"),
        ({"replay": tmp_path}, "no manifest.json: not prepared data"),
        ({"problems": tmp_path / "words.jsonl"}, 'words.jsonl:1: "answer" has no number'),
        ({"problems": tmp_path / "long.jsonl"}, "a prompt of 118 tokens fills the model's context of 96"),
        ({"init": files["data"]}, "chat.jsonl: no checkpoint here, but a file"),
        ({"init": tmp_path}, "no checkpoint here"),
        ({"init": ""}, "--init: name the checkpoint"),
        ({"init": scalar}, "a reward model, which has no output head"),
        ({"context": 97}, "--context=97: the model of"),
        ({"warmup": 2}, "--warmup=2.0: must be <= 1"),
        ({"shard": "fsdp"}, "--shard=fsdp: there are no ranks to divide over; start with torchrun"),
    ]:
        line = refused(tune(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags
    output = succeeds(tune(tmp_path / "skipped", data=f"{files['data']},{broken}", skip_bad=True, steps=1))
    assert "1 bad lines left out, 1 read" in output


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tune, tmp_path, files):
    run = tmp_path / "run"
    line = refused(tune(run, steps=9, lr=1e30, replay=files["replay"], eval_every=0, save_every=0))
    (kept,) = run.glob("nonfinite_step_*.safetensors")
    assert str(kept) in line and len(losses(run)) == int(kept.stem[-6:]) - 1
