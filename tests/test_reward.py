"""reward.py: Bradley and Terry's loss against fp64, where the score is read, real runs that stop, go on, split their work and learn an order."""
import random
import shutil

import numpy as np
import pytest
import torch
from runs import SMALL, assert_same_run, losses, pair, refused, save, start, write_rows
from test_pretrain import kill, logged, records, results, succeeds, train_steps, wait_until

import checkpoint
import evaluate
import rollout
import reward
from data import chat, tokenizer
from data.chat import Pair
from data.pack import pack
from model import score

TOK = tokenizer.byte_level()
TINY = dict(batch=16, lr=0.003, eval_every=10, save_every=10, keep_last=9, center_samples=12, max_new=8, device="cpu")


def some_rows(n, seed, flipped=False):
    """Preferences for the answer that thanks."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        thanks, none = (f"{draw.choice(['yes', 'no', 'well'])} {draw.choice(['Ada', 'Ben'])}{end}" for end in (" thanks", draw.choice([".", " bye"])))
        rows.append({"prompt": draw.choice(["hi", "is it?", "how\nmany"]), **dict(zip(("rejected", "chosen") if flipped else ("chosen", "rejected"), (thanks, none)))})
    return rows


def pairs_of(rows):
    return [chat.preference(row) for row in rows]


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


# ---------------------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("margin, smoothing", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.2), (0.3, 0.1)])
@pytest.mark.parametrize("micro_tokens", [1, 200, 10**6])
def test_loss_and_gradient_are_bradley_and_terrys(make_model, micro_tokens, margin, smoothing):
    """-p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m), d = w h(chosen's end) - w h(rejected's end), in fp64 and a document at a time; with soft labels."""
    rows, draw = some_rows(9, 2), random.Random(3)
    for row in rows:
        row["probability"] = draw.choice([1.0, 0.9, 0.5, 0.25])
    model = make_scalar(make_model).double()
    wanted = 0.0
    for row in rows:
        s = {}
        for side in ("chosen", "rejected"):
            ids = [258, *f"user\n{row['prompt']}".encode(), 259, *b"\n", 258, *f"assistant\n{row[side]}".encode(), 259]
            s[side] = model(pack([ids]))[-1] @ model.score[0]
        d, p = s["chosen"] - s["rejected"], row["probability"] * (1 - smoothing) + (1 - row["probability"]) * smoothing
        wanted = wanted - p * torch.log(1 / (1 + torch.exp(-(d - margin)))) - (1 - p) * torch.log(1 / (1 + torch.exp(d + margin)))
    wanted = wanted / len(rows)
    gradients = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    config = reward.Config("", "", "", margin=margin, smoothing=smoothing, micro_tokens=micro_tokens)
    pairs = pairs_of(rows)
    probability = torch.tensor([p.probability for p in pairs], dtype=torch.float64)
    loss, _ = reward.train_step(model, evaluate.pair_documents(TOK, pairs), probability, np.arange(len(rows)), config)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for (name, p), g in zip(model.named_parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-6 * g.abs().max().item(), msg=name)


def test_hand_worked_losses():
    loss = lambda lead, p=1.0, **how: reward.preference_loss(torch.tensor([lead]), torch.tensor([p]), **how).item()  # noqa: E731
    assert loss(0.0) == pytest.approx(np.log(2)) and loss(0.0, 0.3) == pytest.approx(np.log(2))
    assert loss(2.0) == pytest.approx(np.log(1 + np.exp(-2))) and loss(2.0, 0.0) == pytest.approx(np.log(1 + np.exp(2)))
    assert loss(2.0, margin=2.0) == pytest.approx(np.log(2)) and loss(50.0) == pytest.approx(0, abs=1e-6) and loss(-200.0) == pytest.approx(200)
    lead = torch.tensor([np.log(3.0)], requires_grad=True)  # sigmoid(log 3) = 3/4: there the gradient of a label that is right in 3 of 4 cases is 0
    for how in (dict(probability=torch.tensor([0.75])), dict(probability=torch.tensor([1.0]), smoothing=0.25)):
        assert torch.autograd.grad(reward.preference_loss(lead, **how).sum(), lead)[0].item() == pytest.approx(0, abs=1e-7)


# ---------------------------------------------------------------------------------------------------------------------------------
# The score


def test_a_score_does_not_depend_on_packing_order_or_neighbours(make_model):
    model, documents = make_scalar(make_model), evaluate.pair_documents(TOK, pairs_of(some_rows(12, 4)))
    whole = reward.all_leads(model, documents, 10**6)
    assert whole.std() > 0.1
    alone = [(score(model, pack([c])) - score(model, pack([r]))).item() for c, r in zip(*documents)]
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    np.testing.assert_allclose(reward.all_leads(model, documents, 1), whole, atol=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    np.testing.assert_allclose(reward.all_leads(model, tuple([side[i] for i in order] for side in documents), 300), whole[order], atol=1e-5)
    flat = [d for side in documents for d in side]
    for micro_tokens in (1, 100, 10**6):
        np.testing.assert_allclose(rollout.scores(model, flat, micro_tokens, center=0.5), score(model, pack(flat)).detach() - 0.5, atol=1e-5)


def test_a_score_is_read_at_the_end_of_the_answer_and_sees_all_of_it(make_model):
    model = make_scalar(make_model)
    a, b, c = (ids for ids in evaluate.pair_documents(TOK, pairs_of(some_rows(3, 5)))[0])
    assert b[-1] == chat.end_of_turn(TOK)
    before = score(model, pack([a, b, c]))
    torch.testing.assert_close(before[1], (model(pack([b])) @ model.score[0])[-1])
    for neighbours in ([a[:-3], c], [c, a], [[1, 2, 3], a + b]):
        torch.testing.assert_close(score(model, pack([neighbours[0], b, neighbours[1]]))[1], before[1], rtol=0, atol=1e-5)
    for t in range(len(b)):
        assert abs(score(model, pack([a, b[:t] + [(b[t] + 1) % 256] + b[t + 1 :], c]))[1] - before[1]) > 1e-4, t


@pytest.mark.parametrize("tied", [False, True])
def test_the_new_head_is_small_and_the_trunk_is_the_old_one(make_model, tied):
    language_model = make_model(**(SMALL | {"width": 512, "tied": tied}))
    model = reward.with_scalar_head(language_model, seed=1)
    assert model.score.std().item() == pytest.approx(513**-0.5, rel=0.1) and abs(model.score.mean().item()) < 0.01
    ours, theirs = dict(model.named_parameters()), dict(language_model.named_parameters())
    assert set(ours) - set(theirs) == {"score"} and set(theirs) - set(ours) == (set() if tied else {"untied_head"})
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n != "score")
    p = pack([[1, 2, 3]])
    assert torch.equal(model(p), language_model(p))
    assert torch.equal(reward.with_scalar_head(language_model, seed=1).score, model.score) and not torch.equal(reward.with_scalar_head(language_model, seed=2).score, model.score)
    assert reward.with_scalar_head(model, seed=5) is model


# ---------------------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_an_order_is_learnt_and_flipped_labels_teach_the_opposite(train, tmp_path, files):
    transformers = pytest.importorskip("transformers")
    flipped = write_rows(tmp_path / "flipped.jsonl", some_rows(160, 1, flipped=True))
    test = evaluate.pair_documents(TOK, pairs_of(some_rows(60, 77)))
    right = {}
    for name, data in (("straight", files["data"]), ("flipped", flipped)):
        output = succeeds(train(tmp_path / name, data=data, steps=60, lr=0.01))
        model, _, info = checkpoint.load(tmp_path / name)
        right[name] = (reward.all_leads(model, test, 10**6) > 0).double().mean().item()
        assert "% of 8 pairs ordered as labelled" in output and "accuracy of 'the longer wins'" in output and "read for the score" in output and "«<|im_end|>»" in output
        assert info["stage"] == "reward" and info["metrics"]["accuracy"] > 0.8 and info["metrics"]["figures"]["accuracy"]["value"] == info["metrics"]["accuracy"]
        assert info["lineage"][-1]["stage"] == "sft" and np.mean([r["accuracy"] for r in records(tmp_path / name) if "tokens" in r][-10:]) > 0.9
    assert right["straight"] > 0.95 and right["flipped"] < 0.05

    # The answers of the model it came from score 0 on average: of the training rows, which come first
    rows, _ = chat.split_off(pairs_of(some_rows(160, 1, flipped=True)), 0.05, 0)
    starts, samples, _ = rollout.answers(checkpoint.load(files["init"])[0], TOK, [p.prompt for p in rows[:12]], max_new=8, seed=0)
    found = rollout.scores(model, [starts[s.prompt_index] + s.tokens for s in samples], 10**6, info["center"])
    assert found.mean() == pytest.approx(0, abs=1e-5) and found.std() > 0 and info["center"] != 0

    # transformers scores as we do
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint.find(tmp_path / "flipped"))
    assert type(theirs).__name__ == "Qwen3ForSequenceClassification" and theirs.config.num_labels == 1
    template = transformers.AutoTokenizer.from_pretrained(checkpoint.find(tmp_path / "flipped"))
    for row in some_rows(5, 8):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        ids = template.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert theirs(torch.tensor([ids])).logits.item() == pytest.approx(score(model, pack([chat.encode(TOK, messages).ids])).item(), abs=1e-4)


def test_a_killed_run_goes_on_as_if_nothing_had_been(train, make_model, tmp_path, files):
    """Even where the model it began from has been trained further since: its scores are centred on the answers of the one it began from."""
    init = tmp_path / "sft"
    shutil.copytree(files["init"], init, symlinks=True)
    straight, killed, how = tmp_path / "straight", tmp_path / "killed", dict(steps=30, init=init)
    succeeds(train(straight, **how))
    child = train(killed, **how)
    wait_until(lambda: logged(killed, 15), child)
    assert kill(child)[0] == -9
    checkpoint.save(init, make_model(9, **SMALL), TOK, {"stage": "sft", "step": 2})
    assert "going on after step" in succeeds(train(killed, resume=True, **how))
    assert train_steps(killed) == list(range(1, 31))
    assert_same_run(straight, killed, [10, 20, 30])
    for flags, named in [({"lr": 0.5}, "--lr=0.5"), ({"margin": 1}, "--margin=1.0"), ({"batch": 3}, "--batch=3")]:
        assert named in refused(train(killed, resume=True, **(how | flags)))
    other = make_model(11, **SMALL)
    shutil.rmtree(init / "step_000001")
    checkpoint.save(init, other, TOK, {"stage": "sft", "step": 1}, keep_last=9)
    assert "step_000001: not the weights this run began from" in refused(train(killed, resume=True, **how))


def test_one_process_micro_batches_and_two_processes_agree(train, fork, tmp_path, files):
    how = dict(steps=10, eval_every=5, save_every=0)
    succeeds(train(tmp_path / "whole", **how))
    succeeds(train(tmp_path / "micro", micro_tokens=1, **how))
    outputs = pair(fork, reward, **(TINY | files | how | {"out": tmp_path / "pair"}))
    assert "step 10/10" in outputs[0] and not outputs[1].strip()
    truth = results(tmp_path / "whole")
    for name in ("micro", "pair"):
        for ours, theirs in zip(results(tmp_path / name), truth, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
        assert checkpoint.load(tmp_path / name)[2]["center"] == pytest.approx(checkpoint.load(tmp_path / "whole")[2]["center"], abs=1e-4)


def test_a_reward_model_may_be_trained_further(train, tmp_path):
    succeeds(train(tmp_path / "one", steps=2))
    succeeds(train(tmp_path / "two", init=tmp_path / "one", steps=2))
    two = checkpoint.load(tmp_path / "two")[2]
    assert [p["stage"] for p in two["lineage"]] == ["sft", "reward"]
    assert losses(tmp_path / "one") != losses(tmp_path / "two")


def test_pairs_too_long_are_dropped_and_counted(train, tmp_path):
    rows = some_rows(10, 1) + [{"prompt": "q", "chosen": "x" * 90, "rejected": "y"}, {"prompt": "q", "chosen": "y", "rejected": "x" * 90}, {"prompt": "x" * 90, "chosen": "y", "rejected": "z"}]
    data, val = write_rows(tmp_path / "long.jsonl", rows), write_rows(tmp_path / "val.jsonl", rows[-4:])
    output = succeeds(train(tmp_path / "run", data=data, val=val, steps=1))
    assert f"{data}: 3 of 13 pairs left out, a side of which is longer than 96 tokens" in output and f"{val}: 3 of 4 pairs left out" in output and "10 pairs; 1 steps" in output
    only = write_rows(tmp_path / "only.jsonl", rows[-3:])
    assert "only.jsonl: no pair fits into 96 tokens" in refused(train(tmp_path / "none", data=only))


def test_bad_input_is_one_clear_line_and_costs_nothing(train, make_model, tmp_path, files):
    run = tmp_path / "old"
    succeeds(train(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    chats = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    same = write_rows(tmp_path / "same.jsonl", some_rows(1, 1) + [{"prompt": "q", "chosen": "a", "rejected": " a"}])
    save(make_model, tmp_path / "plain", "pretrain", tok=tokenizer.Tokenizer("plain", tokenizer.PATTERN, {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256}, pad="<|endoftext|>"))
    for flags, named in [
        ({"data": chats}, "chat.jsonl:1: no \"chosen\"; this is a conversation, which sft.py reads"),
        ({"data": same}, 'same.jsonl:2: "chosen" and "rejected" are the same text'),
        ({"data": files["init"]}, "sft: a checkpoint, where a .jsonl or .parquet file was expected"),
        ({"init": files["data"]}, "pairs.jsonl: no checkpoint here, but a file"),
        ({"init": tmp_path / "plain"}, "no <|im_start|>; only sft.py starts from such a model"),
        ({"context": 97}, "--context=97: the model of"),
        ({"smoothing": 0.5}, "--smoothing=0.5"),
        ({"margin": -1}, "--margin=-1.0"),
        ({"batch": 0}, "--batch=0"),
        ({"center_samples": 0}, "--center_samples=0"),
        ({"epochs": 0}, "--epochs=0.0"),
    ]:  # fmt: skip
        line = refused(train(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags


# ---------------------------------------------------------------------------------------------------------------------------------
# What margins say


def test_figures_of_margins_worked_by_hand():
    #          margin  chosen, rejected tokens  label is right with   gold
    table = [( 2.0,    (10, 10),                1.0,                  (1.0, 0.5)),
             (-1.0,    (20, 10),                1.0,                  (0.0, 0.5)),
             ( 0.0,    (10, 20),                1.0,                  (1.0, 1.0)),
             ( 0.5,    (100, 91),               0.75,                 (1.5, 0.5)),
             (-3.0,    (5, 9),                  0.0,                  (0.2, 0.6))]  # fmt: skip
    pairs = [Pair([], "", "", p, {"gold_chosen": g[0], "gold_rejected": g[1]}) for _, _, p, g in table]
    margins, lengths = [m for m, *_ in table], [n for _, n, *_ in table]
    found = reward.preference_figures(pairs, margins, lengths, seed=0)
    value = {name: f["value"] for name, f in found.items()}
    assert value["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.75 + 1) / 5)
    assert value["accuracy of 'the longer wins'"] == pytest.approx((0.5 + 1 + 0 + 0.75 + 1) / 5)
    assert value["accuracy less that of 'the longer wins'"] == pytest.approx((0.5 - 1 + 0.5 + 0 + 0) / 5)
    assert value["accuracy, 2 pairs within 10 % in length"] == pytest.approx((1 + 0.75) / 2)
    gap = [a - b for a, b in lengths]
    assert value["correlation of margin and length gap"] == pytest.approx(np.corrcoef(margins, gap)[0, 1])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert value["calibration error"] == pytest.approx((abs(sigmoid(2) - 1) + sigmoid(1) + 0.5 + abs(sigmoid(0.5) - 0.75) + abs(sigmoid(3) - 1)) / 5)
    # 0.50: margin 0, whose side counts as preferred; 0.62 in the bin of 0.6; 0.73 in 0.7, which is wrong; 0.88 in 0.8 and 0.95 in 0.9
    assert [name for name in value if name.startswith("right where")] == ["right where it says 0.50 (1 pairs)", "right where it says 0.62 (1 pairs)", "right where it says 0.73 (1 pairs)", "right where it says 0.88 (1 pairs)", "right where it says 0.95 (1 pairs)"]
    assert [value[name] for name in value if name.startswith("right where")] == [1, 0.75, 0, 1, 1]
    assert value["order as gold's"] == pytest.approx(4 / 4)  # where gold is the same there is no order
    assert value["accuracy that noise allows (Bayes)"] == pytest.approx(np.mean([sigmoid(4 * abs(a - b)) for *_, (a, b) in table]))
    for f in found.values():
        assert f["low"] is None or f["low"] <= f["value"] <= f["high"]


def test_correlation_is_numpys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.normal(size=(2, 30)) * 10 + 3
        y = y + rng.normal() * x
        assert evaluate.correlation(np.array([30, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert evaluate.correlation(np.array([3, 6, 3, 14, 3, 6])) == 0.0  # y is always 1


def test_a_calibrated_model_has_no_calibration_error_and_a_boaster_has_his():
    rng = np.random.default_rng(1)
    margins = rng.normal(size=200_000) * 2
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    agrees = rng.random(len(margins)) < predicted
    assert evaluate.calibration_error(predicted, agrees) < 0.005
    assert evaluate.calibration_error(np.full(1000, 0.99), np.arange(1000) < 700) == pytest.approx(0.29)
