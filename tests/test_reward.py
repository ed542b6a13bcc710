"""reward.py: Bradley and Terry's loss against fp64, where the score is read, and real runs that
stop, resume, divide their work and learn an order."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
from runs import (
    SMALL,
    assert_same_run,
    kill,
    logged,
    losses,
    pair,
    records,
    refused,
    results,
    save,
    start,
    succeeds,
    train_steps,
    wait_until,
    write_rows,
)

import reward
from data import chat, rows as data_rows, tokenizer
from data.pack import pack
from model import score
from rollout import sample_completions
from runtime import checkpoint
from scoring import reward_scores

TOK = tokenizer.byte_level()
TINY = {"batch_size": 16, "lr": 0.003, "eval_every": 10, "save_every": 10, "keep_last": 9}
TINY |= {"center_samples": 12, "max_new_tokens": 8, "device": "cpu"}


def some_rows(n, seed, flipped=False):
    """Preferences for the answer that thanks."""
    draw, rows = random.Random(seed), []
    sides = ("rejected", "chosen") if flipped else ("chosen", "rejected")
    for i in range(n):
        answers = []
        for end in (" thanks", draw.choice([".", " bye"])):
            answers.append(f"{draw.choice(['yes', 'no', 'well'])} {draw.choice(['Ada', 'Ben'])}{end}")
        prompt = draw.choice(["hi", "is it?", "how\nmany"]) + f" {i}"
        rows.append({"prompt": prompt, **dict(zip(sides, answers, strict=True))})
    return rows


def items_of(rows):
    return [chat.encode_pair(TOK, data_rows.preference(row)) for row in rows]


def documents_of(rows):
    """The ids of both sides of each row, one after the other."""
    return [side.ids for item in items_of(rows) for side in item]


def make_scalar(make_model, seed=0, **shape):
    return make_model(seed, **(SMALL | {"scalar_head": True} | shape))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An SFT model and preferences."""
    from conftest import random_model

    folder = tmp_path_factory.mktemp("reward")
    save(random_model, folder / "sft", "sft")
    return {"init": folder / "sft", "data": write_rows(folder / "pairs.jsonl", some_rows(160, 1))}


@pytest.fixture
def train(fork, files):
    """A function: flags -> Child that runs `reward.py` with them on the tiny files."""

    def run(out, **flags):
        return start(fork, reward, **(TINY | files | {"out": out} | flags))

    return run


# --------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize(
    "margin, smoothing, micro_batch_tokens", [(0.0, 0.0, 200), (0.7, 0.0, 1), (0.0, 0.2, 10**6), (0.3, 0.1, 200)]
)
def test_loss_and_gradient_are_bradley_and_terrys(make_model, margin, smoothing, micro_batch_tokens):
    """-p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m), d = w h(chosen's end) - w h(rejected's
    end), in fp64 and a document at a time; with soft labels."""
    rows, draw = some_rows(9, 2), random.Random(3)
    label_probs = [draw.choice([1.0, 0.9, 0.5, 0.25]) for _ in rows]
    model = make_scalar(make_model).double()
    expected = 0.0
    for row, label_prob in zip(rows, label_probs, strict=True):
        scores = []
        for side in ("chosen", "rejected"):
            ids = [258, *f"user\n{row['prompt']}".encode(), 259, *b"\n", 258, *f"assistant\n{row[side]}".encode(), 259]
            scores.append(model(pack([ids]))[-1] @ model.score[0])
        d, p = scores[0] - scores[1], label_prob * (1 - smoothing) + (1 - label_prob) * smoothing
        expected = expected + p * torch.log(1 + torch.exp(margin - d)) + (1 - p) * torch.log(1 + torch.exp(margin + d))
    expected = expected / len(rows)
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    batch = items_of(rows), torch.tensor(label_probs, dtype=torch.float64), micro_batch_tokens, margin, smoothing
    loss, margins = reward.run_batch(model, *batch)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        again = reward.run_batch(model, *batch)
    assert again[0] == loss and (again[1] == margins).all()
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-6 * g.abs().max().item(), msg=name)


def loss_of(score_margin, label_prob=1.0, **flags):
    return reward.preference_loss(torch.tensor([score_margin]), torch.tensor([label_prob]), **flags).item()


def test_losses_by_hand():
    assert loss_of(0.0) == pytest.approx(math.log(2)) == loss_of(0.0, 0.3)
    assert loss_of(2.0) == pytest.approx(math.log(1 + math.exp(-2)))
    assert loss_of(2.0, 0.0) == pytest.approx(math.log(1 + math.exp(2)))
    assert loss_of(2.0, margin=2.0) == pytest.approx(math.log(2))
    assert loss_of(50.0) == pytest.approx(0, abs=1e-6) and loss_of(-200.0) == pytest.approx(200)


@pytest.mark.parametrize("label_prob, smoothing", [(0.75, 0.0), (1.0, 0.25)])
def test_the_gradient_is_0_where_the_margin_says_how_often_the_label_is_right(label_prob, smoothing):
    margins = torch.tensor([math.log(3.0)], requires_grad=True)  # sigmoid(log 3) = 3/4
    loss = reward.preference_loss(margins, torch.tensor([label_prob]), smoothing=smoothing)
    assert torch.autograd.grad(loss.sum(), margins)[0].item() == pytest.approx(0, abs=1e-7)


# --------------------------------------------------------------------------------------------------
# The score


def test_a_score_does_not_depend_on_packing_order_or_neighbours(make_model):
    model, rows = make_scalar(make_model), some_rows(12, 4)
    items = items_of(rows)
    together = reward.score_margins(model, items)
    assert together.std() > 0.1
    alone = [score(model, pack([c.ids])) - score(model, pack([r.ids])) for c, r in items]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = reward.score_margins(model, [items[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)
    documents = documents_of(rows)
    expected = score(model, pack(documents)).detach() - 0.5
    for micro_batch_tokens in (1, 100, 10**6):
        found = reward_scores(model, documents, micro_batch_tokens, center=0.5)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_score_is_read_at_the_end_of_the_completion_and_sees_all_of_it(make_model):
    model = make_scalar(make_model)
    a, b, c = [chosen.ids.tolist() for chosen, _ in items_of(some_rows(3, 5))]
    assert b[-1] == chat.end_of_turn(TOK)
    before = score(model, pack([a, b, c]))[1]
    torch.testing.assert_close(before, (model(pack([b])) @ model.score[0])[-1])
    for first, last in ([a[:-3], c], [c, a], [[1, 2, 3], a + b]):
        torch.testing.assert_close(score(model, pack([first, b, last]))[1], before, rtol=0, atol=1e-5)
    for t in range(len(b)):
        changed = b[:t] + [(b[t] + 1) % 256] + b[t + 1 :]
        assert abs(score(model, pack([a, changed, c]))[1] - before) > 1e-4, t


@pytest.mark.parametrize("tied", [False, True])
def test_the_new_head_is_small_and_the_trunk_is_the_old_one(make_model, tied):
    language_model = make_model(**(SMALL | {"width": 512, "tied": tied}))
    model = reward.with_scalar_head(language_model, seed=1)
    assert model.score.std().item() == pytest.approx(513**-0.5, rel=0.1) and abs(model.score.mean().item()) < 0.01
    ours, theirs = dict(model.named_parameters()), dict(language_model.named_parameters())
    assert set(ours) - set(theirs) == {"score"}
    assert set(theirs) - set(ours) == (set() if tied else {"untied_head"})
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n != "score")
    p = pack([[1, 2, 3]])
    assert torch.equal(model(p), language_model(p))
    assert torch.equal(reward.with_scalar_head(language_model, seed=1).score, model.score)
    assert not torch.equal(reward.with_scalar_head(language_model, seed=2).score, model.score)
    assert reward.with_scalar_head(model, seed=5) is model


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_an_order_is_learned_and_flipped_labels_teach_the_opposite(train, tmp_path, files):
    flipped = write_rows(tmp_path / "flipped.jsonl", some_rows(160, 1, flipped=True))
    items, right = items_of(some_rows(60, 77)), {}
    for name, data in (("straight", files["data"]), ("flipped", flipped)):
        output = succeeds(train(tmp_path / name, data=data, steps=60, lr=0.01, save_every=0))
        model, _, info = checkpoint.load(tmp_path / name)
        right[name] = (reward.score_margins(model, items) > 0).double().mean().item()
        assert "% of 8 pairs ordered as labelled" in output and "accuracy of 'the longer wins'" in output
        assert "read for the score" in output and "«<|im_end|>»" in output
        assert info["stage"] == "reward" and info["lineage"][-1]["stage"] == "sft"
        assert info["metrics"]["figures"]["accuracy"]["value"] == info["metrics"]["accuracy"] > 0.8
        assert np.mean([r["accuracy"] for r in records(tmp_path / name) if "tokens" in r][-10:]) > 0.9
    assert right["straight"] > 0.95 and right["flipped"] < 0.05

    # Completions of the model it came from, to some of the training rows, score 0 on average.
    pairs = [data_rows.preference(row) for row in some_rows(160, 1, flipped=True)]
    conversations = [p.prompt for p in data_rows.random_rows(data_rows.split_off(pairs, 0.05, 0)[0], 12, 0)]
    language_model = checkpoint.load(files["init"])[0]
    prompts, samples, _ = sample_completions(language_model, TOK, conversations, max_new_tokens=8, seed=0)
    found = reward_scores(model, [prompts[s.prompt_index] + s.tokens for s in samples], 10**6, info["center"])
    assert found.mean() == pytest.approx(0, abs=1e-5) and found.std() > 0 and info["center"] != 0

    transformers_scores_as_we_do(tmp_path / "flipped", model)


def transformers_scores_as_we_do(run, model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint.find(run))
    assert type(theirs).__name__ == "Qwen3ForSequenceClassification" and theirs.config.num_labels == 1
    template = transformers.AutoTokenizer.from_pretrained(checkpoint.find(run))
    for row in some_rows(5, 8):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        ids = template.apply_chat_template(messages, tokenize=True, return_dict=False)
        ours = score(model, pack([chat.encode(TOK, messages).ids])).item()
        assert theirs(torch.tensor([ids])).logits.item() == pytest.approx(ours, abs=1e-4)


def test_a_killed_run_resumes_as_if_nothing_had_been(train, make_model, tmp_path, files):
    """Even if the model it began from has been trained further since: its scores are centred on the
    completions of the one it began from."""
    init, straight, killed = tmp_path / "sft", tmp_path / "straight", tmp_path / "killed"
    shutil.copytree(files["init"], init, symlinks=True)
    flags = {"steps": 24, "init": init, "eval_every": 8, "save_every": 8}
    succeeds(train(straight, **flags))
    child = train(killed, **flags)
    wait_until(lambda: logged(killed, 12), child)
    assert kill(child)[0] == -9
    checkpoint.save(init, make_model(9, **SMALL), TOK, {"stage": "sft", "step": 2})
    assert "continuing after step" in succeeds(train(killed, resume=True, **flags))
    assert train_steps(killed) == list(range(1, 25))
    assert_same_run(straight, killed, [8, 16, 24])
    for changed, named in [({"lr": 0.5}, "--lr=0.5"), ({"margin": 1}, "--margin=1.0"), ({"batch_size": 3}, "--batch")]:
        assert named in refused(train(killed, resume=True, **(flags | changed)))
    shutil.rmtree(init / "step_000001")
    checkpoint.save(init, make_model(11, **SMALL), TOK, {"stage": "sft", "step": 1}, keep_last=9)
    line = refused(train(killed, resume=True, **flags))
    assert "step_000001: not the weights this run began from" in line


def test_a_run_that_is_asked_to_stop_saves_a_centred_model(train, tmp_path):
    flags = {"steps": 1000, "save_every": 0, "eval_every": 0}
    child = train(tmp_path / "run", **flags)
    wait_until(lambda: logged(tmp_path / "run", 3), child)
    child.send(15)
    assert child.wait()[0] == 128 + 15
    model, _, info = checkpoint.load(tmp_path / "run")
    assert info["step"] < 1000 and info["center"] != 0


def test_a_center_of_completions_that_the_limit_cuts_is_said_once(train, tmp_path):
    """The model is random and writes no end."""
    said = "warning: --max_new_tokens=8 cuts"
    assert succeeds(train(tmp_path / "run", steps=1)).count(said) == 1
    assert said not in succeeds(train(tmp_path / "run", steps=1, resume=True))


def test_one_process_micro_batches_and_two_processes_agree(train, fork, tmp_path, files):
    flags = {"steps": 10, "eval_every": 5, "save_every": 0}
    succeeds(train(tmp_path / "whole", **flags))
    succeeds(train(tmp_path / "micro", micro_batch_tokens=1, **flags))
    outputs = pair(fork, reward, **(TINY | files | flags | {"out": tmp_path / "pair"}))
    assert "step 10/10" in outputs[0] and not outputs[1].strip()
    expected, center = results(tmp_path / "whole"), checkpoint.load(tmp_path / "whole")[2]["center"]
    for name in ("micro", "pair"):
        for ours, theirs in zip(results(tmp_path / name), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
        assert checkpoint.load(tmp_path / name)[2]["center"] == pytest.approx(center, abs=1e-4)


def test_a_reward_model_may_be_trained_further(train, tmp_path):
    succeeds(train(tmp_path / "one", steps=2))
    succeeds(train(tmp_path / "two", init=tmp_path / "one", steps=2))
    one, two = (checkpoint.load(tmp_path / name)[2] for name in ("one", "two"))
    assert [p["stage"] for p in two["lineage"]] == ["sft", "reward"] and two["center"] == one["center"]
    assert losses(tmp_path / "one") != losses(tmp_path / "two")


def test_accuracy_is_that_of_the_labels_probability_at_every_step(train, tmp_path):
    """ "probability": 0 says that the rejected side is the better one."""
    turned = [row | {"probability": 0.0} for row in some_rows(160, 1, flipped=True)]
    data = write_rows(tmp_path / "turned.jsonl", turned)
    succeeds(train(tmp_path / "turned", data=data, steps=20))
    succeeds(train(tmp_path / "plain", data=write_rows(tmp_path / "plain.jsonl", some_rows(160, 1)), steps=20))
    runs = tmp_path / "turned", tmp_path / "plain"
    turned, plain = ([r["accuracy"] for r in records(run) if "accuracy" in r] for run in runs)
    assert turned == pytest.approx(plain, abs=0.13) and np.mean(turned[-3:]) > 0.7
    figures = checkpoint.load(tmp_path / "turned")[2]["metrics"]
    assert figures["figures"]["accuracy"]["value"] == figures["accuracy"]


@pytest.mark.parametrize("flags", [{"margin": 2.0}, {"smoothing": 0.2}, {"margin": 1.0, "smoothing": 0.1}, {}])
def test_validation_has_the_loss_that_is_trained(train, tmp_path, flags):
    """Of the same pairs, before the rate has moved anything."""
    data = write_rows(tmp_path / "pairs.jsonl", some_rows(40, 5))
    succeeds(train(tmp_path / "run", data=data, val=data, steps=1, batch_size=40, lr=1e-9, **flags))
    (loss,), (found,) = losses(tmp_path / "run"), [r for r in records(tmp_path / "run") if "val_loss" in r]
    assert found["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert flags == {} or abs(loss - reward.preference_loss(torch.zeros(1), torch.ones(1)).item()) > 1e-3


@pytest.mark.parametrize("n, batch_size", [(95, 64), (6, 64)])
def test_an_epoch_has_each_pair_once(train, tmp_path, n, batch_size):
    data, val = (write_rows(tmp_path / f"{k}.jsonl", some_rows(k, k)) for k in (n, 5))
    output = succeeds(train(tmp_path / "run", data=data, val=val, batch_size=batch_size, epochs=2))
    steps = 2 * -(-n // batch_size)
    assert f"{n} pairs; {steps} steps of {batch_size}: 2.00 epochs" in output
    tokens = sum(len(side.ids) for item in items_of(some_rows(n, n)) for side in item)
    assert sum(r["tokens"] for r in records(tmp_path / "run") if "loss" in r) == 2 * tokens


def test_pairs_too_long_are_dropped_and_counted(train, tmp_path):
    long = [
        {"prompt": "q", "chosen": "x" * 90, "rejected": "y"},
        {"prompt": "q", "chosen": "y", "rejected": "x" * 90},
        {"prompt": "x" * 90, "chosen": "y", "rejected": "z"},
    ]
    rows = some_rows(10, 1) + long
    data, val = write_rows(tmp_path / "long.jsonl", rows), write_rows(tmp_path / "val.jsonl", rows[-5:])
    output = succeeds(train(tmp_path / "run", data=data, val=val, steps=1))
    assert f"{data}: 3 of 13 pairs left out, a side of which exceeds 96 tokens" in output
    assert f"{val}: 3 of 5 pairs left out" in output and "10 pairs; 1 steps of" in output
    only = write_rows(tmp_path / "only.jsonl", long)
    assert "only.jsonl: no pair fits into 96 tokens" in refused(train(tmp_path / "none", data=only, val=data))


def test_bad_input_is_one_clear_line_and_costs_nothing(train, make_model, tmp_path, files):
    run = tmp_path / "old"
    succeeds(train(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chats = write_rows(tmp_path / "chat.jsonl", [{"messages": conversation}])
    same = write_rows(tmp_path / "same.jsonl", some_rows(1, 1) + [{"prompt": "q", "chosen": "a", "rejected": " a"}])
    ranks, eot = {bytes([b]): b for b in range(256)}, "<|endoftext|>"
    plain = tokenizer.Tokenizer("plain", tokenizer.PATTERN, ranks, {eot: 256}, pad=eot)
    save(make_model, tmp_path / "plain", "pretrain", tok=plain)
    for flags, named in [
        ({"data": chats}, 'chat.jsonl:1: no "chosen"; this is a conversation, which sft.py reads'),
        ({"data": same}, 'same.jsonl:2: "chosen" and "rejected" are the same text'),
        ({"data": files["init"]}, "sft: a checkpoint, "),
        ({"init": files["data"]}, "pairs.jsonl: no checkpoint here, but a file"),
        ({"init": tmp_path / "plain"}, "no <|im_start|>; run sft.py first"),
        ({"context": 97}, "--context=97: the model of"),
        ({"smoothing": 0.5}, "--smoothing=0.5"),
        ({"margin": -1}, "--margin=-1.0"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"batch": 8}, "--batch: is called --batch_size now"),
        ({"center_samples": 0}, "--center_samples=0"),
        ({"epochs": 0}, "--epochs=0.0"),
    ]:
        line = refused(train(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags
