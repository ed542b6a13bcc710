"""dpo.py: each loss by hand and against fp64 on full logits, the reference and its cache, real runs that stop, go on, split their work and learn."""
import json
import math
import random
import shutil

import pytest
import torch
from runs import SMALL, assert_same_run, losses, pair, refused, save, start, write_rows
from test_pretrain import kill, logged, records, results, succeeds, train_steps, wait_until

import checkpoint
import dpo
from data import chat, tokenizer
from data.pack import pack
from optim import Optimizer

TOK = tokenizer.byte_level()
LOSSES = ("dpo", "cdpo", "ipo", "simpo", "orpo", "kto")
TINY = dict(batch=16, eval_every=10, save_every=10, keep_last=9, device="cpu")


def some_rows(n, seed):
    """Preferences for the answer that thanks."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        chosen, rejected = (f"{draw.choice(['yes', 'no', 'well'])} {draw.choice(['Ada', 'Ben'])}{end}" for end in (" thanks", draw.choice([".", " bye"])))
        rows.append({"prompt": draw.choice(["hi", "is it?", "how\nmany"]), "chosen": chosen, "rejected": rejected})
    return rows


def flip(rows):
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def read(rows, kto=False):
    items, known = dpo.read_items(TOK, [(chat.judged if kto else chat.preference)(row) for row in rows], kto)
    return items, torch.tensor(known, dtype=torch.float64)


def configure(loss, **flags):
    config = dpo.Config("", "", "", **({"loss": loss, "beta": dpo.BETA[loss]} | flags))
    dpo.check_flags(config)
    return config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An SFT model and preferences."""
    from conftest import random_model

    folder = tmp_path_factory.mktemp("dpo")
    save(random_model, folder / "sft", "sft")
    return {"init": folder / "sft", "data": write_rows(folder / "pairs.jsonl", some_rows(120, 1))}


@pytest.fixture
def train(fork, files):
    """A function: flags -> Child that runs `dpo.py` with them on the tiny files."""

    def run(out, **flags):
        return start(fork, dpo, **(TINY | files | {"out": out} | flags))

    return run


# ---------------------------------------------------------------------------------------------------------------------------------
# By hand


def t(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slopes(loss, *inputs):
    return [g.tolist() for g in torch.autograd.grad(loss.sum(), inputs)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_begins_at_ln_2_and_its_gradient_is_the_papers():
    w, l = t(-3.0, 0.5), t(-3.0, 0.5)
    assert dpo.dpo_loss(w, l, 0.1).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    w, l = t(0.7, -2.0, 30.0), t(-0.4, 1.0, -900.0)
    losses = dpo.dpo_loss(w, l, 0.1)
    h = [1.1, -3.0, 930.0]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.1 * x)) for x in h])
    closed = [-0.1 * sigmoid(-0.1 * x) for x in h]
    assert slopes(losses, w, l) == [pytest.approx(closed), pytest.approx([-g for g in closed])]


def test_a_doubtful_label_counts_for_both_orders():
    w, l = t(0.7), t(-0.4)
    for loss in (lambda w, l, p: dpo.dpo_loss(w, l, 0.1, p), lambda w, l, p: dpo.simpo_loss(w, l, 2.0, 0.3, p)):
        assert loss(w, l, 0.25).item() == pytest.approx((0.25 * loss(w, l, 1.0) + 0.75 * loss(l, w, 1.0)).item())
    assert slopes(dpo.cdpo_loss(t(0.0), l, 0.1, 0.25, 0.5), l) == [[pytest.approx(0.1 * (sigmoid(-0.04) - 0.5))]]  # an even label stays even


def test_conservative_dpo_of_coin_flips_has_no_gradient_where_nothing_is_preferred_and_leads_to_its_odds():
    w, l = t(1.5), t(1.5)
    assert slopes(dpo.cdpo_loss(w, l, 0.1, 0.5), w, l) == [[pytest.approx(0, abs=1e-15)]] * 2
    assert dpo.cdpo_loss(w, l, 0.1, 0.0).item() == dpo.dpo_loss(w, l, 0.1).item()
    w, l = t(math.log(3) / 0.1), t(0.0)  # beta h = log 3: the label is right in 3 of 4 cases
    assert slopes(dpo.cdpo_loss(w, l, 0.1, 0.25), w, l) == [[pytest.approx(0, abs=1e-15)]] * 2


def test_ipo_leads_margins_to_1_over_2_beta_and_no_further():
    beta = 0.2
    w, l = t(1 / (2 * beta) + 0.3), t(0.3)
    assert dpo.ipo_loss(w, l, beta).item() == pytest.approx(0) and slopes(dpo.ipo_loss(w, l, beta), w, l) == [[pytest.approx(0, abs=1e-14)]] * 2
    assert dpo.ipo_loss(t(1.0), t(0.0), beta).item() == pytest.approx(1.5**2) == dpo.ipo_loss(t(4.0), t(0.0), beta).item()
    assert dpo.ipo_loss(t(0.7), t(0.7), beta, 0.5).item() == 0  # an even label: no margin


def test_simpo_by_hand():
    w, l = t(-1.0), t(-1.5)
    assert dpo.simpo_loss(w, l, 2.0, 0.4).item() == pytest.approx(math.log1p(math.exp(-(2.0 * 0.5 - 0.4))))
    assert slopes(dpo.simpo_loss(w, l, 2.0, 0.4), w, l) == [[pytest.approx(-2 * sigmoid(-0.6))], [pytest.approx(2 * sigmoid(-0.6))]]


def test_orpo_by_hand():
    w, l = t(math.log(0.5)), t(math.log(0.2))  # odds 1 and 1/4: their ratio is 4, and sigmoid(log 4) = 4/5
    assert dpo.orpo_loss(w, l, 0.1).item() == pytest.approx(math.log(2) + 0.1 * math.log(1.25))
    # d/dw of -log sigmoid(log odds) is -(1/5) d(log odds)/dw, and that of log P - log(1 - P) by log P is 1/(1 - P)
    assert slopes(dpo.orpo_loss(w, l, 0.1), w, l) == [[pytest.approx(-1 - 0.1 * 0.2 / 0.5)], [pytest.approx(0.1 * 0.2 / 0.8)]]
    for sure in (0.0, -1e-9, -1e-4):  # an answer known by heart: fp32 must not lose 1 - P
        w = torch.tensor([sure], requires_grad=True)
        loss = dpo.orpo_loss(w, torch.tensor([-2.0]), 0.1)
        assert loss.isfinite() and torch.autograd.grad(loss.sum(), w)[0].isfinite()


def test_kto_by_hand():
    ratio, label = t(1.0, 1.0, -2.0), torch.tensor([True, False, False])
    losses = dpo.kto_loss(ratio, label, 0.5, 0.1, desirable=2.0, undesirable=3.0)
    assert losses.tolist() == pytest.approx([2 * (1 - sigmoid(0.05)), 3 * (1 - sigmoid(-0.05)), 3 * (1 - sigmoid(0.25))])
    slope = lambda x: 0.1 * sigmoid(x) * sigmoid(-x)  # noqa: E731
    assert slopes(losses, ratio) == [pytest.approx([-2 * slope(0.05), 3 * slope(0.05), 3 * slope(0.25)])]
    assert dpo.kto_baseline(6.0, 4) == 1.5 and dpo.kto_baseline(-6.0, 4) == 0.0


# ---------------------------------------------------------------------------------------------------------------------------------
# Against fp64, from the papers' formulas, on full logits, an answer at a time


def logp_of(model, prompt, answer):
    """(sum over the answer's bytes and its <|im_end|> of log p, how many they are)."""
    before = [258, *f"user\n{prompt}".encode(), 259, *b"\n", 258, *b"assistant\n"]
    ids = before + [*answer.encode(), 259]
    logp = torch.log_softmax(model(pack([ids])) @ model.head.T, dim=-1)
    return sum(logp[i - 1, ids[i]] for i in range(len(before), len(ids))), len(ids) - len(before)


def truth(model, reference, rows, config):
    """The mean --loss of some preferences, whose "probability" says how sure the label is."""
    total, log_sigmoid = 0.0, lambda x: -torch.log(1 + torch.exp(-x))  # noqa: E731
    beta, gamma = config.beta, config.gamma
    if config.loss == "kto":
        single = [(row["prompt"], row[side], side == "chosen") for row in rows for side in ("chosen", "rejected")]
        ratio = lambda prompt, answer: logp_of(model, prompt, answer)[0] - logp_of(reference, prompt, answer)[0].detach()  # noqa: E731
        other = [ratio(prompt, single[(i + 2) % len(single)][1]).detach() for i, (prompt, _, _) in enumerate(single)]
        z = max(0.0, (sum(other) / len(other)).item())
        for prompt, answer, good in single:
            r = ratio(prompt, answer)
            total = total + (config.desirable * (1 - torch.sigmoid(beta * (r - z))) if good else config.undesirable * (1 - torch.sigmoid(beta * (z - r))))
        return total / len(single)
    for row in rows:
        (w, n_w), (l, n_l) = (logp_of(model, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        ref_w, ref_l = (logp_of(reference, row["prompt"], row[side])[0].detach() for side in ("chosen", "rejected"))
        p = row["probability"]
        if config.loss == "cdpo":
            p = p * (1 - config.smoothing) + (1 - p) * config.smoothing
        h = (w - ref_w) - (l - ref_l)
        odds = lambda logp, n: torch.exp(logp / n) / (1 - torch.exp(logp / n))  # noqa: E731
        if config.loss in ("dpo", "cdpo"):
            loss = -p * log_sigmoid(beta * h) - (1 - p) * log_sigmoid(-beta * h)
        elif config.loss == "ipo":
            loss = ((w - ref_w) / n_w - (l - ref_l) / n_l - (2 * p - 1) / (2 * beta)) ** 2
        elif config.loss == "simpo":
            m = beta * (w / n_w - l / n_l)
            loss = -p * log_sigmoid(m - gamma) - (1 - p) * log_sigmoid(-m - gamma)
        else:
            m = torch.log(odds(w, n_w) / odds(l, n_l))
            loss = -w / n_w + beta * (-p * log_sigmoid(m) - (1 - p) * log_sigmoid(-m))
        total = total + loss - config.nll * w / n_w
    return total / len(rows)


FLAGS = {"dpo": dict(nll=0.3), "cdpo": dict(smoothing=0.2), "ipo": dict(beta=0.5, nll=0.1), "simpo": dict(gamma=0.5), "orpo": dict(beta=0.7), "kto": dict(desirable=1.5, undesirable=0.5)}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_full_logits(make_model, loss):
    """However the batch is split, and so packed == alone; for kto with a baseline above 0, of the whole batch."""
    rows, draw = some_rows(7, 2), random.Random(3)
    for row in rows:
        row["probability"] = draw.choice([1.0, 0.75, 0.25]) if loss != "kto" else 1.0
    reference, model = make_model(0, **SMALL).double(), make_model(0, noise=0.21, **SMALL).double()
    with torch.no_grad():  # this answer has become likelier everywhere
        model.untied_head[ord("a")] += 0.05 * model.untied_head[ord("b")]
    items, known = read(rows, loss == "kto")
    config = configure(loss, **FLAGS[loss])
    wanted = truth(model, reference, rows, config)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    with torch.no_grad():
        ref_logps = torch.stack([dpo.answer_logps(reference, list(item)) for item in items])
        ratio = torch.stack([dpo.answer_logps(model, list(item)) for item in items]) - ref_logps
    assert ratio.abs().min() > 1e-3
    for micro_tokens in (1, 200, 10**6):
        config.micro_tokens = micro_tokens
        found = dpo.train_step(model, items, known, ref_logps, config)
        assert found[0].item() == pytest.approx(wanted.item(), rel=1e-6)
        for (name, p), g in zip(model.named_parameters(), gradients):
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-7 * g.abs().max().item(), msg=f"{name}, {micro_tokens}")
            p.grad = None
        if loss != "kto":
            assert found[1:3].tolist() == pytest.approx(ratio.mean(0).tolist(), rel=1e-5)


def test_kto_baseline_is_of_the_whole_batch_never_negative_and_without_gradient(make_model):
    """Where the policy finds other prompts' answers likelier than the reference does, z is their mean; where less likely, 0."""
    reference, items_known = make_model(0, **SMALL).double(), read(some_rows(6, 4), kto=True)
    items, known = items_known
    with torch.no_grad():
        logps = torch.stack([dpo.answer_logps(reference, list(item)) for item in items])
    for shift in (-2.0, 2.0, torch.linspace(-4, 6, len(items), dtype=torch.float64)):  # as though the reference had found them so much less likely
        ref_logps = logps.clone()
        ref_logps[:, 1] -= shift
        z = max(0.0, float(torch.as_tensor(shift).mean()))
        wanted = dpo.kto_loss(torch.zeros(len(items), dtype=torch.float64), known > 0.5, z, 0.3).mean().item()
        for micro_tokens in (1, 150, 10**6):
            found = dpo.train_step(reference, items, known, ref_logps, configure("kto", beta=0.3, micro_tokens=micro_tokens))
            assert found[0].item() == pytest.approx(wanted, rel=1e-6)
    reference.zero_grad()
    dpo.train_step(reference, items, known, ref_logps, configure("kto", beta=0.3))
    ours = [p.grad.clone() for p in reference.parameters()]
    reference.zero_grad()
    logp = dpo.answer_logps(reference, [answer for answer, _ in items])
    dpo.kto_loss(logp - ref_logps[:, 0], known > 0.5, z, 0.3).mean().backward()  # z is a number here
    for a, p in zip(ours, reference.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)


def test_kto_pairs_each_prompt_with_an_answer_to_another(make_model):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)] + [{"prompt": "p4", "completion": "single", "label": False}]
    items, known = read(rows, kto=True)
    texts = [[TOK.decode(side.ids.tolist()) for side in item] for item in items]
    said = {f"p{i}": {f"good {i}", f"bad {i}"} for i in range(4)} | {"p4": {"single"}}
    for ours, other in texts:
        (prompt, answer), (same, mismatched) = (text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>").split("<|im_end|>\n<|im_start|>assistant\n") for text in (ours, other))
        assert prompt == same and answer in said[prompt] and mismatched not in said[prompt]
    assert known.tolist() == [1, 0] * 4 + [0]


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_without_a_reference_none_matters(make_model, loss):
    model, (items, known) = make_model(**SMALL), read(some_rows(4, 5))
    found = []
    for ref in (torch.zeros(4, 2), torch.randn(4, 2, generator=torch.Generator().manual_seed(0)) * 30):
        model.zero_grad()
        found.append([dpo.train_step(model, items, known.float(), ref, configure(loss))[0].item(), *(p.grad.norm().item() for p in model.parameters())])
    assert found[0] == found[1]


def test_log_probabilities_are_of_the_answer_and_its_end_alone_whatever_the_pack(make_model):
    model, rows = make_model(**SMALL), some_rows(6, 6)
    items, _ = read(rows)
    for (chosen, rejected), row in zip(items, rows):
        assert TOK.decode(chosen.ids[chosen.learnt].tolist()) == row["chosen"] + "<|im_end|>" and TOK.decode(rejected.ids[rejected.learnt].tolist()) == row["rejected"] + "<|im_end|>"
    wanted = torch.stack([torch.stack([logp_of(model, row["prompt"], row[side])[0] for side in ("chosen", "rejected")]) for row in rows]).detach()
    for micro_tokens in (1, 130, 10**6):
        torch.testing.assert_close(dpo.all_logps(model, items, micro_tokens), wanted, rtol=1e-5, atol=1e-5)
    earlier = [{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an earlier answer"}, {"role": "user", "content": "r"}], "chosen": "a", "rejected": "b"}]
    assert dpo.answer_lengths(read(earlier)[0]).tolist() == [[2, 2]]  # is part of the prompt


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_what_is_preferred_and_flipped_pairs_teach_the_opposite(make_model, loss):
    rows = [{"prompt": "hi", "chosen": "yes", "rejected": "not"}, {"prompt": "ho", "chosen": "yea", "rejected": "nay"}]
    lead = {}
    for name, some in (("straight", rows), ("flipped", flip(rows))):
        model = make_model(**SMALL)
        items, known = read(some, loss == "kto")
        ref_logps = dpo.all_logps(model, items, 10**6)
        optimizer, config = Optimizer(model, 3e-3), configure(loss)
        for _ in range(15):
            dpo.train_step(model, items, known.float(), ref_logps, config)
            optimizer.step(1.0)
        after = dpo.all_logps(model, read(rows)[0], 10**6) - dpo.all_logps(make_model(**SMALL), read(rows)[0], 10**6)
        lead[name] = (after[:, 0] - after[:, 1]).tolist()
    assert min(lead["straight"]) > 1 and max(lead["flipped"]) < -1, lead


# ---------------------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize("loss", LOSSES)
def test_one_process_micro_batches_and_two_processes_agree(train, fork, tmp_path, files, loss):
    how = dict(loss=loss, steps=10, eval_every=5, save_every=0, lr=0.003)
    succeeds(train(tmp_path / "whole", **how))
    succeeds(train(tmp_path / "micro", micro_tokens=1, **how))
    outputs = pair(fork, dpo, **(TINY | files | how | {"out": tmp_path / "pair"}))
    assert "step 10/10" in outputs[0] and not outputs[1].strip()
    truth = results(tmp_path / "whole")
    for name in ("micro", "pair"):
        for ours, theirs in zip(results(tmp_path / name), truth, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
    if loss in ("dpo", "cdpo"):
        assert losses(tmp_path / "whole")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(train, make_model, tmp_path, files, loss):
    """Even where the model it began from has been trained further since: the reference stays the one it began with."""
    init = tmp_path / "sft"
    shutil.copytree(files["init"], init, symlinks=True)
    straight, killed, how = tmp_path / "straight", tmp_path / "killed", dict(loss=loss, steps=30, init=init)
    succeeds(train(straight, **how))
    child = train(killed, **how)
    wait_until(lambda: logged(killed, 15), child)
    assert kill(child)[0] == -9
    checkpoint.save(init, make_model(9, **SMALL), TOK, {"stage": "sft", "step": 2})
    output = succeeds(train(killed, resume=True, **how))
    assert "going on after step" in output and "the reference's log-probabilities are those of" in output
    assert train_steps(killed) == list(range(1, 31))
    assert_same_run(straight, killed, [10, 20, 30])
    for flags, named in [({"beta": 0.2}, "--beta=0.2: this run was started with --beta=0.1"), ({"loss": "ipo"}, "--loss=ipo"), ({"reference": files["init"]}, "--reference=")]:
        assert named in refused(train(killed, resume=True, **(how | flags)))


def test_the_reference_is_asked_once_and_never_changed(train, fork, make_model, tmp_path, files):
    cache, reference = tmp_path / "cache", tmp_path / "reference"
    save(make_model, reference, "sft", seed=5)
    before = {p: p.read_bytes() for p in reference.rglob("*") if p.is_file()}
    how = dict(steps=4, ref_cache=cache, reference=reference)
    first = succeeds(train(tmp_path / "first", **how))
    (kept,) = cache.iterdir()
    assert "are those of" not in first and kept.name.startswith("reference_")
    renamed = shutil.copy(files["data"], tmp_path / "renamed.jsonl")
    for name, flags in (("second", {}), ("third", {"data": renamed, "loss": "ipo"}), ("fourth", {"micro_tokens": 50})):
        assert f"the reference's log-probabilities are those of {kept}" in succeeds(train(tmp_path / name, **(how | flags)))
    assert losses(tmp_path / "first") == losses(tmp_path / "second") and list(cache.iterdir()) == [kept]
    succeeds(train(tmp_path / "other data", data=write_rows(tmp_path / "other.jsonl", some_rows(120, 8)), **how))
    succeeds(train(tmp_path / "other cut", val_fraction=0.2, **how))
    assert len(list(cache.iterdir())) == 3
    assert {p: p.read_bytes() for p in reference.rglob("*") if p.is_file()} == before
    whole = kept.read_bytes()
    for i, broken in enumerate((b"broken", whole[:-4], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])):
        kept.write_bytes(broken)
        output = succeeds(train(tmp_path / f"broken {i}", **how))
        assert f"warning: {kept}" in output and "the reference is asked again" in output and "are those of" not in output
        assert losses(tmp_path / f"broken {i}") == losses(tmp_path / "first") and kept.read_bytes() == whole
    elsewhere = tmp_path / "other machine"
    outputs = pair(fork, dpo, differ=({}, {"ref_cache": elsewhere}), **(TINY | {name: files[name] for name in ("init", "data")} | how | {"out": tmp_path / "pair"}))
    assert "are those of" not in outputs[0]  # where one of two processes does not find it, both ask the reference
    assert losses(tmp_path / "pair") == pytest.approx(losses(tmp_path / "first"), rel=1e-5)
    kept.unlink()
    checkpoint.save(reference, make_model(6, **SMALL), TOK, {"stage": "sft", "step": 2})
    assert "are those of" not in succeeds(train(tmp_path / "sixth", **how))
    assert losses(tmp_path / "sixth") != losses(tmp_path / "first")
    assert f"{reference}: not the data this run was started with" in refused(train(tmp_path / "first", resume=True, **how))


def test_two_sharded_references_are_not_taken_for_one_another(train, make_model, tmp_path, files):
    """They may have the same config.json, and their weights lie in several files."""
    import safetensors.torch

    seen = []
    for seed in (1, 2):
        folder = save(make_model, tmp_path / f"reference{seed}", "sft", seed=seed)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        for name in ("manifest.json", "feinschliff.json", "model.safetensors"):
            (folder / name).unlink()
        parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
        for file, names in parts.items():
            safetensors.torch.save_file({name: weights[name] for name in names}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for file, names in parts.items() for name in names}}))
        assert "are those of" not in succeeds(train(tmp_path / f"run{seed}", reference=folder, steps=1, ref_cache=tmp_path / "cache"))
        seen.append(losses(tmp_path / f"run{seed}"))
    assert seen[0] != seen[1] and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_run_learns_and_warns_when_the_chosen_answers_become_less_likely(train, make_model, tmp_path):
    run = tmp_path / "run"
    output = succeeds(train(run, steps=30, lr=0.01))
    model, tok, info = checkpoint.load(run)
    found = [r for r in records(run) if "val_loss" in r]
    assert found[-1]["accuracy"] > 0.8 and found[-1]["val_loss"] < found[0]["val_loss"] < math.log(2) and info["lineage"][-1]["stage"] == "sft" and info["stage"] == "dpo"
    assert info["config"]["beta"] == 0.1 and "chosen answers are" in output and "thanks<|im_end|>»" in output
    step = [r for r in records(run) if "loss" in r][-1]
    assert step["margin"] == pytest.approx(step["chosen_reward"] - step["rejected_reward"], abs=1e-6) and step["margin"] > 0

    # A model that says both answers already can hardly say one of them more often
    alike = [{"prompt": "hi", "chosen": f"{i % 3} apples on the table", "rejected": f"{i % 3} apples on the chair"} for i in range(60)]
    items, model = [side for item in read(alike[:3])[0] for side in item], make_model(**SMALL)
    optimizer = Optimizer(model, 0.01)
    for _ in range(100):
        (-dpo.answer_logps(model, items).mean()).backward()
        optimizer.step(1.0)
    checkpoint.save(tmp_path / "knows", model, TOK, {"stage": "sft", "step": 1})
    how = dict(init=tmp_path / "knows", data=write_rows(tmp_path / "alike.jsonl", alike), steps=30, lr=0.003, eval_every=1)
    falls, held = succeeds(train(tmp_path / "falls", **how)), succeeds(train(tmp_path / "held", nll=1, **how))
    chosen = {name: min(r["chosen_ratio"] for r in records(tmp_path / name) if "val_loss" in r) for name in ("falls", "held")}
    assert chosen["falls"] < 0 and falls.count("warning: chosen answers have become") == 1 and "--nll=1" in falls, chosen
    assert chosen["held"] > chosen["falls"] and ("warning" in held) == (chosen["held"] < 0), chosen
    (tmp_path / "falls/step_000030/manifest.json").unlink()
    again = succeeds(train(tmp_path / "falls", resume=True, **how))
    assert "going on after step 20" in again and "warning: chosen" not in again  # it has been said


def test_kto_reads_single_answers_of_which_the_held_out_may_all_be_good(train, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row in some_rows(40, 1) for side in ("chosen", "rejected")]
    data, val = write_rows(tmp_path / "single.jsonl", rows), write_rows(tmp_path / "good.jsonl", [row for row in rows if row["label"]])
    output = succeeds(train(tmp_path / "run", loss="kto", data=data, val=val, steps=5))
    assert "NaN" not in (tmp_path / "run/log.jsonl").read_text() and "nan" not in output


def test_pairs_too_long_are_dropped_and_counted(train, tmp_path):
    rows = some_rows(10, 1) + [{"prompt": "q", "chosen": "x" * 90, "rejected": "y"}, {"prompt": "q", "chosen": "y", "rejected": "x" * 90}]
    data = write_rows(tmp_path / "long.jsonl", rows)
    output = succeeds(train(tmp_path / "run", data=data, val=data, steps=1))
    assert output.count(f"{data}: 2 of 12 pairs left out, a side of which is longer than 96 tokens") == 2 and "10 pairs; 1 steps" in output
    only = write_rows(tmp_path / "only.jsonl", rows[-2:])
    assert "only.jsonl: no pair fits into 96 tokens" in refused(train(tmp_path / "none", data=only))


def test_bad_input_is_one_clear_line_and_costs_nothing(train, make_model, tmp_path, files):
    run = tmp_path / "old"
    succeeds(train(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    chats = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    label = write_rows(tmp_path / "label.jsonl", [{"prompt": "q", "completion": "a", "label": "yes"}])
    scalar = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    other = save(make_model, tmp_path / "other", "sft", tok=tokenizer.train(["the old map " * 5], 256 + 4 + 3))
    for flags, named in [
        ({"data": chats}, 'chat.jsonl:1: no "chosen"; this is a conversation, which sft.py reads'),
        ({"data": label, "loss": "kto"}, "label.jsonl:1: \"label\" is 'yes'; true or false"),
        ({"data": files["init"]}, "sft: a checkpoint, where a .jsonl or .parquet file was expected"),
        ({"init": files["data"]}, "pairs.jsonl: no checkpoint here, but a file"),
        ({"init": scalar}, "a reward model, which has no output head"),
        ({"reference": other}, "it has another tokenizer than --init"),
        ({"reference": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"loss": "ppo"}, "--loss=ppo: expected one of dpo, cdpo, ipo, simpo, orpo, kto"),
        ({"gamma": 1}, "--gamma: --loss=dpo does not have it, only simpo"),
        ({"smoothing": 0.1}, "--smoothing: --loss=dpo does not have it, only cdpo"),
        ({"desirable": 2}, "--desirable: --loss=dpo does not have it, only kto"),
        ({"undesirable": 2, "loss": "ipo"}, "--undesirable: --loss=ipo does not have it, only kto"),
        ({"nll": 1, "loss": "orpo"}, "--nll: --loss=orpo does not have it"),
        ({"nll": 1, "loss": "kto"}, "--nll: --loss=kto does not have it"),
        ({"reference": files["init"], "loss": "simpo"}, "--reference: --loss=simpo does not have it"),
        ({"ref_cache": tmp_path, "loss": "orpo"}, "--ref_cache: --loss=orpo does not have it"),
        ({"smoothing": 0.6, "loss": "cdpo"}, "--smoothing=0.6"),
        ({"beta": -1}, "--beta=-1.0"),
        ({"beta": "inf"}, "--beta=inf"),
        ({"batch": 0}, "--batch=0"),
        ({"context": 97}, "--context=97: the model of"),
    ]:  # fmt: skip
        line = refused(train(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags
