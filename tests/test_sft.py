"""sft.py: the loss against fp64 on full logits, real runs that stop, go on, split their work and learn, and what bad input gets to hear."""
import json
import os
import random

import numpy as np
import pytest
import torch
from runs import SMALL, pair, refused, save, start, write_rows
from test_pretrain import records, results, succeeds

import checkpoint
import evaluate
import rollout
import sft
from data import chat, corpus, tokenizer
from data.pack import pack

TINY = dict(batch_tokens=300, eval_every=10, save_every=10, keep_last=9, max_new=12, device="cpu")


def some_rows(n, seed, turns=2):
    """Chats about sums and names, of one to `turns` turns: a little to learn."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        messages = [{"role": "system", "content": "be brief"}] if draw.random() < 0.2 else []
        for _ in range(draw.randint(1, turns)):
            name = draw.choice(["Ada", "Ben", "Cleo"])
            messages += [{"role": "user", "content": draw.choice([f"hi {name}", f"{name}?"])}, {"role": "assistant", "content": f"{name}!" + " yes" * draw.randint(0, 2)}]
        rows.append({"messages": messages})
    return rows


def encoded(rows, tok=tokenizer.byte_level()):
    return [chat.encode(tok, row["messages"]) for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, chats, problems and a text to replay."""
    from conftest import random_model

    folder = tmp_path_factory.mktemp("sft")
    save(random_model, folder / "base", "pretrain")
    (folder / "text.txt").write_text("the old map and the red door. " * 60)
    problems = [{"question": f"{a} + {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"} for a, b in ((1, 2), (2, 2))]
    return {"folder": folder, "init": folder / "base", "data": write_rows(folder / "chat.jsonl", some_rows(120, 1)), "problems": write_rows(folder / "problems.jsonl", problems), "replay": folder / "text.txt"}


@pytest.fixture
def tune(fork, files):
    """A function: flags -> Child that runs `sft.py` with them on the tiny files."""

    def run(out, **flags):
        return start(fork, sft, **(TINY | {name: files[name] for name in ("init", "data")} | {"out": out} | flags))

    return run


# ---------------------------------------------------------------------------------------------------------------------------------
# The loss


def truth(model, rows):
    """Mean over the learnt tokens of -log p, from each conversation's text: bytes are tokens, and every special token is one. On full logits, in fp64."""
    nats, count, special = 0.0, 0, {name: i for i, name in enumerate(tokenizer.SPECIALS, 256)}
    for row in rows:
        ids, learnt = [], []
        for i, m in enumerate(row["messages"]):
            head = [*(b"\n" if i else b""), special["<|im_start|>"], *m["role"].encode(), *b"\n"]
            body = [*m["content"].encode(), special["<|im_end|>"]]
            ids, learnt = ids + head + body, learnt + [False] * len(head) + [m["role"] == "assistant"] * len(body)
        logp = torch.log_softmax(model(pack([ids])) @ model.head.T, dim=-1)
        for t in range(1, len(ids)):
            if learnt[t]:
                nats, count = nats - logp[t - 1, ids[t]], count + 1
    return nats / count


@pytest.mark.parametrize("micro_tokens", [1, 150, 10**6])
def test_loss_and_gradient_are_those_of_full_logits(make_model, micro_tokens):
    """In fp64, however the batch is split, and so packed == alone."""
    model, rows = make_model(**SMALL | {"context": 200}).double(), some_rows(9, 2, turns=3)
    assert any(m["role"] == "system" for row in rows for m in row["messages"])
    wanted = truth(model, rows)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    loss = sft.train_step(model, encoded(rows), micro_tokens)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for (name, p), g in zip(model.named_parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9 * g.abs().max().item(), msg=name)
    assert sft.validation_loss(model, encoded(rows), micro_tokens) == pytest.approx(wanted.item(), rel=1e-6)


def test_a_conversation_costs_the_same_in_any_pack(make_model):
    model, chats = make_model(**SMALL), encoded(some_rows(8, 3))
    alone = [sft.nats(model, [c]).item() for c in chats]
    together = [sft.nats(model, [chats[i] for i in order]).item() for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 3, 1, 0, 2, 6, 5, 4])]
    assert together == pytest.approx([sum(alone)] * 2, rel=1e-5)


def test_answers_and_the_ends_of_turns_get_gradient_and_nothing_else_does(make_model):
    """Of a model that says anything with the same probability, the gradient of a token's output row tells how often it was learnt."""
    model, rows, tok = make_model(**SMALL), some_rows(12, 4), tokenizer.byte_level()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.fill_(1.0)
        model.norm.fill_(1.0)  # hidden is 1 in every channel
    sft.train_step(model, encoded(rows), 10**6)
    answers = [m["content"].encode() for row in rows for m in row["messages"] if m["role"] == "assistant"]
    count = np.bincount([b for a in answers for b in a] + [chat.end_of_turn(tok)] * len(answers), minlength=260)
    wanted = 1 / 260 - count / count.sum()
    np.testing.assert_allclose(model.untied_head.grad.mean(1), wanted, atol=1e-6)
    assert wanted[ord("?")] > 0 > wanted[chat.end_of_turn(tok)]  # only users ask; every answer ends


def test_replayed_text_is_learnt_as_in_pretraining(make_model):
    tok, model = tokenizer.byte_level(), make_model(**SMALL)
    streams = [corpus.encode(tok, ["a red door", "two bells and an old map, " * 9])]
    cut = corpus.pieces(streams, tok.eot, SMALL["context"] - 1)
    chats = sft.text_chats(streams, cut)
    assert max(len(c.ids) for c in chats) == SMALL["context"]
    nats, _ = corpus.evaluate(model, streams, cut, tokenizer.token_bytes(tok), 10**6)
    assert sft.validation_loss(model, chats, 10**6) == pytest.approx(nats, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------------------
# Models from elsewhere


def strangers(kind):
    """Tokenizers that know no conversation."""
    ranks = tokenizer.train(["the old map and the red door " * 5], 256 + 4 + 9)._mergeable_ranks
    if kind == "gpt2":
        return tokenizer.Tokenizer("gpt2", tokenizer.GPT2_PATTERN, ranks, {"<|endoftext|>": len(ranks)}, pad="<|endoftext|>")
    specials = {s: len(ranks) + i for i, s in enumerate(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])}
    return tokenizer.Tokenizer("llama", tokenizer.PATTERN, ranks, specials, eot="<|end_of_text|>", pad="<|end_of_text|>")


@pytest.mark.parametrize("padding", [0, 2, 50])  # of the model's vocabulary beyond the tokenizer's
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_chat_tokens_are_added_to_a_model_from_elsewhere(make_model, tmp_path, capsys, kind, tied, padding):
    tok = strangers(kind)
    old = tok.n_vocab + padding
    model = make_model(**(SMALL | {"vocab_size": old, "tied": tied, "qk_norm": kind == "gpt2"}))
    p = pack([list(range(1, 50, 3))])
    before, mean, ids = model(p) @ model.head.T, model.embed.detach().mean(0), tok.encode_ordinary("the old map?")
    model, tok = sft.add_chat_tokens(model, tok)
    new = max(old, tok.n_vocab)
    assert model.config.vocab_size == len(model.embed) == len(model.head) == new and (new > old) == ("are new to this model" in capsys.readouterr().out)
    after = model(p) @ model.head.T
    torch.testing.assert_close(after[:, :old], before, rtol=0, atol=0)
    if new > old:
        torch.testing.assert_close(model.embed[old:], mean.expand(new - old, -1))
        torch.testing.assert_close(after[:, old:], before.mean(1, keepdim=True).expand(-1, new - old), rtol=1e-4, atol=1e-4)
    assert tok.encode_ordinary("the old map?") == ids and tok.eot < chat.special(tok, "<|im_start|>") < chat.end_of_turn(tok) < new
    folder = checkpoint.save(tmp_path, model, tok, {"stage": "sft", "step": 1})
    again, their_tok, _ = checkpoint.load(folder)
    assert again.config == model.config and tokenizer.fingerprint(their_tok) == tokenizer.fingerprint(tok) and their_tok.pad == tok.pad
    torch.testing.assert_close(again(p) @ again.head.T, after, rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == chat.end_of_turn(their_tok)
    assert sft.add_chat_tokens(again, their_tok)[0].config.vocab_size == new  # once is enough


def test_a_downloaded_model_is_tuned(make_model, tmp_path, files, tune):
    transformers = pytest.importorskip("transformers")
    folder = save(make_model, tmp_path / "theirs", "pretrain", tok=strangers("llama"), qk_norm=False)
    for name in ("manifest.json", "feinschliff.json"):
        (folder / name).unlink()
    output = succeeds(tune(tmp_path / "run", init=folder, steps=2))
    assert "2 tokens of a conversation are new to this model" in output
    model, tok, info = checkpoint.load(tmp_path / "run")
    assert info["lineage"][0]["path"] == str(folder) and info["stage"] == "sft"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.find(tmp_path / "run"))
    ids = chat.encode_prompt(tok, [{"role": "user", "content": "the old map?"}])
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], model(pack([ids])) @ model.head.T, rtol=0, atol=1e-4)
    succeeds(tune(tmp_path / "run", init=folder, steps=2, resume=True))


# ---------------------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_a_handful_of_chats_is_learnt_by_heart_and_the_model_stops_by_itself(tune, tmp_path, files):
    said = ["Ada!", "red and blue", "no.\n\nnever", "7 = 7\n#### 7", "ja, grün"]
    rows = [{"prompt": f"question {i}", "completion": text} for i, text in enumerate(said)]
    data = write_rows(tmp_path / "five.jsonl", rows)
    problems = write_rows(tmp_path / "p.jsonl", [{"prompt": "question 3", "answer": "7"}, {"prompt": "question 3", "answer": "#### 7"}, {"prompt": "question 3", "answer": "8"}])
    run = tmp_path / "run"
    output = succeeds(tune(run, data=data, val=data, problems=problems, steps=120, lr=0.02, eval_every=4, save_every=40, max_new=30))
    model, tok, info = checkpoint.load(run)
    _, samples, texts = rollout.answers(model, tok, [[{"role": "user", "content": row["prompt"]}] for row in rows], max_new=60, temperature=0)
    assert texts == said and all(s.finished for s in samples)
    found = [r for r in records(run) if "val_loss" in r]
    saved = [r for r in found if r["step"] % 40 == 0]
    assert found[-1]["val_loss"] < 0.1 < found[0]["val_loss"] and found[-1]["exact_match"] == pytest.approx(2 / 3)
    assert "66.7% of 3 problems right" in output and "5 conversations" in output and "<|im_end|>»" in output
    assert info["stage"] == "sft" and info["metrics"] == {k: v for k, v in found[-1].items() if k != "step"} and len(info["lineage"]) == 1 and info["lineage"][0]["stage"] == "pretrain"
    assert "question 0\n--- answers:\nAda!" in (run / "samples.txt").read_text()
    assert os.readlink(run / "latest") == "step_000120" and os.readlink(run / "best") == f"step_{min(saved, key=lambda r: r['val_loss'])['step']:06d}"


def test_only_the_same_run_is_gone_on_with(tune, tmp_path, files):
    killed, how = tmp_path / "killed", dict(steps=3, replay=files["replay"], replay_share=0.3, problems=files["problems"])
    succeeds(tune(killed, **how))
    output = succeeds(tune(killed, resume=True, **how))
    assert "nothing is left to do" in output and "--steps" not in output  # which another run would have, for its rate falls to 0 over them
    for flags, named in [({"lr": 0.5}, "--lr=0.5: this run was started with --lr=0.0"), ({"steps": 40}, "--steps=40"), ({"replay_share": 0.2}, "--replay_share=0.2"), ({"epochs": 2}, "--epochs")]:
        assert named in refused(tune(killed, resume=True, **(how | flags)))
    text = files["replay"].read_text()
    try:
        for name in ("replay", "data"):
            before = files[name].read_text()
            files[name].write_text(before + before.splitlines()[0] + "\n")
            assert f"{files[name]}: not the data this run was started with" in refused(tune(killed, resume=True, **how))
            files[name].write_text(before)
    finally:
        files["replay"].write_text(text)


def test_one_process_micro_batches_and_two_processes_agree(tune, fork, tmp_path, files):
    how = dict(steps=10, eval_every=5, save_every=0, replay=files["replay"], problems=files["problems"])
    succeeds(tune(tmp_path / "whole", **how))
    succeeds(tune(tmp_path / "micro", micro_tokens=1, **how))
    outputs = pair(fork, sft, **(TINY | how | {"init": files["init"], "data": files["data"], "out": tmp_path / "pair"}))
    assert "step 10/10" in outputs[0] and not outputs[1].strip()  # one of them speaks
    pair(fork, sft, **(TINY | how | {"init": files["init"], "data": files["data"], "out": tmp_path / "sharded", "shard": "fsdp", "micro_tokens": 60}))
    truth = results(tmp_path / "whole")
    for name in ("micro", "pair", "sharded"):
        for ours, theirs in zip(results(tmp_path / name), truth, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name


def test_replay_keeps_what_was_known(tune, tmp_path, files):
    """Half of the batch is text: its loss stays below that of a run without; the share is what was asked for."""
    text = files["replay"].read_text()
    for name, flags in (("without", {}), ("with", {"replay": files["replay"], "replay_share": 0.5})):
        output = succeeds(tune(tmp_path / name, steps=30, lr=0.01, **flags))
    assert "30 steps of 300 tokens, 150 of them replayed text" in output
    without, kept = (evaluate.document_nats(*checkpoint.load(tmp_path / name)[:2], [text], 10**6)[0, 0] for name in ("without", "with"))
    assert kept < 0.8 * without


def test_epochs_are_the_steps_that_see_every_conversation_once(tune, tmp_path, files):
    rows = [json.loads(line) for line in files["data"].read_text().splitlines()]
    total = sum(len(c.ids) for c in encoded(rows))
    output = succeeds(tune(tmp_path / "run", epochs=0.5, batch_tokens=1000))
    seen = sum(r["tokens"] for r in records(tmp_path / "run") if "loss" in r)
    assert 0.8 * 0.475 * total < seen < 1.05 * 0.475 * total and f"of {len(rows)}" not in output  # 0.05 of the rows are held out


# ---------------------------------------------------------------------------------------------------------------------------------
# What does not fit, and what a user gets wrong


def test_long_conversations_are_cut_or_dropped_and_counted(tune, tmp_path, files):
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    long = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "a"}]}
    data = write_rows(tmp_path / "long.jsonl", [{"messages": turn * 5}] * 3 + [long] * 2 + [{"messages": turn}] * 4)
    val = write_rows(tmp_path / "val.jsonl", [long, {"messages": turn * 5}])
    output = succeeds(tune(tmp_path / "run", data=data, val=val, steps=2))  # the long one is also the first to be shown in samples.txt
    assert f"{data}: of 9 conversations 3 were cut after their last answer that ends within 96 tokens, 2 dropped, none of whose answers does" in output
    assert "7 conversations" in output and f"{val}: of 2 conversations 1 were cut" in output
    assert (tmp_path / "run/samples.txt").read_text().startswith("=== step 2 ===\nhi\n--- answers:\n")
    only = write_rows(tmp_path / "only.jsonl", [long] * 5)
    assert "only.jsonl: no conversation has an answer that ends within 96 tokens" in refused(tune(tmp_path / "none", data=only))
    assert not (tmp_path / "none/log.jsonl").exists()


def test_bad_input_is_one_clear_line_and_costs_nothing(tune, make_model, tmp_path, files):
    run = tmp_path / "old"
    succeeds(tune(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    rows = {
        "pairs.jsonl": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
        "text.jsonl": [{"text": "once"}],
        "one.jsonl": some_rows(1, 1),
        "roles.jsonl": [*some_rows(1, 1), {"messages": [{"role": "assistant", "content": "a"}]}],
        "words.jsonl": [{"prompt": "q", "answer": "five"}],
        "long.jsonl": [{"prompt": "x" * 99, "answer": "5"}],
    }
    for name, some in rows.items():
        write_rows(tmp_path / name, some)
    (tmp_path / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n{"messages": \n')
    scalar = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    for flags, named in [
        ({"data": tmp_path / "pairs.jsonl"}, "pairs.jsonl:1: this is a preference (chosen, rejected), no conversation; reward.py and dpo.py read it"),
        ({"data": tmp_path / "text.jsonl"}, 'text.jsonl:1: "text" is what pretraining reads'),
        ({"data": tmp_path / "roles.jsonl"}, "roles.jsonl:2: \"messages\"[0]: a message of 'assistant' where one of 'user' is due"),
        ({"data": tmp_path / "broken.jsonl"}, "broken.jsonl:2: "),
        ({"data": files["init"]}, "base: a checkpoint, where a .jsonl or .parquet file was expected"),
        ({"data": tmp_path / "one.jsonl"}, "one row only"),
        ({"data": tmp_path / "absent.jsonl"}, "absent.jsonl: No such file"),
        ({"val": tmp_path / "absent.jsonl"}, "absent.jsonl: No such file"),
        ({"replay": tmp_path / "absent.txt"}, "absent.txt: No such file"),
        ({"problems": tmp_path / "words.jsonl"}, 'words.jsonl:1: "answer" has no number'),
        ({"problems": tmp_path / "long.jsonl"}, "a prompt of 118 tokens fills the model's context of 96"),
        ({"init": files["data"]}, "chat.jsonl: no checkpoint here, but a file"),
        ({"init": tmp_path}, "no checkpoint here"),
        ({"init": ""}, "--init: name the checkpoint"),
        ({"init": scalar}, "a reward model, which has no output head"),
        ({"context": 97}, "--context=97: the model of"),
        ({"epochs": 0}, "--epochs=0.0"),
        ({"val_fraction": 1.0}, "--val_fraction=1.0"),
        ({"replay_share": 1}, "--replay_share=1.0"),
        ({"lr": "inf"}, "--lr=inf"),
        ({"warmup": 2}, "--warmup=2.0"),
        ({"keep_last": 0}, "--keep_last=0"),
        ({"max_new": 0}, "--max_new=0"),
    ]:
        line = refused(tune(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags
    assert "1 bad lines left out, 1 read" in succeeds(tune(tmp_path / "skipped", data=f"{files['data']},{tmp_path / 'broken.jsonl'}", skip_bad=True, steps=1))
