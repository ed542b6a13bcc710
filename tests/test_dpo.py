"""dpo.py: each loss by hand and against fp64 on full logits, the reference, and real runs that
stop, resume, divide their work and learn."""

import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from runs import (
    SMALL,
    assert_same_run,
    here,
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

import dpo
from data import chat, kto, rows as data_rows, tokenizer
from data.chat import encode_pair
from data.pack import pack
from model import completion_logprob_sums
from optim import Optimizer
from runtime import checkpoint

TOK = tokenizer.byte_level()
LOSSES = ("dpo", "dpo_norm", "cdpo", "ipo", "simpo", "orpo", "kto")
TINY = {"batch_size": 16, "eval_every": 10, "save_every": 10, "keep_last": 9, "device": "cpu"}


def some_rows(n, seed):
    """Preferences for the answer that thanks."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        chosen, rejected = (
            f"{draw.choice(['yes', 'no', 'well'])} {draw.choice(['Ada', 'Ben'])}{end}"
            for end in (" thanks", draw.choice([".", " bye"]))
        )
        prompt = draw.choice(["hi", "is it?", "how\nmany"]) + f" {i}"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def flip(rows):
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def read(rows, of_kto=False):
    """(items, label_probs fp64) as dpo.py reads them."""
    if of_kto:
        judged = [single for row in rows for single in data_rows.judged(row)]
        items, labels = kto.make_items(kto.encode_judged(TOK, judged), 10**6, "")
        return items, labels.double()
    pairs = [data_rows.preference(row) for row in rows]
    label_probs = torch.tensor([p.probability for p in pairs], dtype=torch.float64)
    return [encode_pair(TOK, p) for p in pairs], label_probs


def configure(loss, **flags):
    config = dpo.Config(init="", data="", out="", loss=loss, **({"beta": dpo.LOSSES[loss].beta} | flags))
    dpo.check_flags(config)
    return config


def item_logps(model, items):
    return torch.stack([completion_logprob_sums(model, list(item)) for item in items])


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


# --------------------------------------------------------------------------------------------------
# By hand


def t(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slopes(loss, *inputs):
    return [g.tolist() for g in torch.autograd.grad(loss.sum(), inputs)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_begins_at_ln_2_and_its_gradient_is_the_papers():
    chosen, rejected = t(-3.0, 0.5), t(-3.0, 0.5)
    assert dpo.dpo_loss(chosen, rejected, 0.1).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    chosen, rejected = t(0.7, -2.0, 30.0), t(-0.4, 1.0, -900.0)
    losses = dpo.dpo_loss(chosen, rejected, 0.1)
    h = [1.1, -3.0, 930.0]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.1 * x)) for x in h])
    closed = [-0.1 * sigmoid(-0.1 * x) for x in h]
    assert slopes(losses, chosen, rejected) == [pytest.approx(closed), pytest.approx([-g for g in closed])]


def test_a_doubtful_label_counts_for_both_orders():
    chosen, rejected = t(0.7), t(-0.4)
    for loss, flags in ((dpo.dpo_loss, {}), (dpo.simpo_loss, {"gamma": 0.3}), (dpo.cdpo_loss, {"smoothing": 0.2})):
        straight = loss(chosen, rejected, 0.1, **flags).item()
        turned = loss(rejected, chosen, 0.1, **flags).item()
        doubtful = loss(chosen, rejected, 0.1, 0.25, **flags).item()
        assert doubtful == pytest.approx(0.25 * straight + 0.75 * turned)
    even = dpo.cdpo_loss(t(0.0), rejected, 0.1, label_probs=0.5, smoothing=0.25)  # stays even
    assert slopes(even, rejected) == [[pytest.approx(0.1 * (sigmoid(-0.04) - 0.5))]]


def test_conservative_dpo_leads_to_the_odds_of_a_right_label_and_coin_flips_have_no_gradient():
    chosen, rejected = t(1.5), t(1.5)
    coin_flips = dpo.cdpo_loss(chosen, rejected, 0.1, smoothing=0.5)
    assert slopes(coin_flips, chosen, rejected) == [[pytest.approx(0, abs=1e-15)]] * 2
    sure = dpo.cdpo_loss(chosen, rejected, 0.1, smoothing=0.0)
    assert sure.item() == dpo.dpo_loss(chosen, rejected, 0.1).item()
    chosen, rejected = t(math.log(3) / 0.1), t(0.0)  # beta h = log 3: the label is right in 3 of 4 cases
    at_its_odds = dpo.cdpo_loss(chosen, rejected, 0.1, smoothing=0.25)
    assert slopes(at_its_odds, chosen, rejected) == [[pytest.approx(0, abs=1e-15)]] * 2


def test_ipo_leads_margins_to_1_over_2_beta_and_no_further():
    beta = 0.2
    chosen, rejected = t(1 / (2 * beta) + 0.3), t(0.3)
    assert (
        dpo.ipo_loss(chosen, rejected, beta).item() == pytest.approx(0)
        and slopes(dpo.ipo_loss(chosen, rejected, beta), chosen, rejected) == [[pytest.approx(0, abs=1e-14)]] * 2
    )
    assert (
        dpo.ipo_loss(t(1.0), t(0.0), beta).item() == pytest.approx(1.5**2) == dpo.ipo_loss(t(4.0), t(0.0), beta).item()
    )
    assert dpo.ipo_loss(t(0.7), t(0.7), beta, 0.5).item() == 0  # an even label: no margin


def test_simpo_by_hand():
    chosen, rejected = t(-1.0), t(-1.5)
    loss = dpo.simpo_loss(chosen, rejected, 2.0, gamma=0.4)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(2.0 * 0.5 - 0.4))))
    slope = 2 * sigmoid(-0.6)
    assert slopes(loss, chosen, rejected) == [[pytest.approx(-slope)], [pytest.approx(slope)]]


def test_orpo_by_hand():
    chosen, rejected = t(math.log(0.5)), t(math.log(0.2))  # odds 1 and 1/4; sigmoid(log 4) = 4/5
    assert dpo.orpo_loss(chosen, rejected, 0.1).item() == pytest.approx(math.log(2) + 0.1 * math.log(1.25))
    # d/dw of -log sigmoid(log odds) is -(1/5) d(log odds)/dw; that of log P - log(1 - P) by log P
    # is 1/(1 - P)
    assert slopes(dpo.orpo_loss(chosen, rejected, 0.1), chosen, rejected) == [
        [pytest.approx(-1 - 0.1 * 0.2 / 0.5)],
        [pytest.approx(0.1 * 0.2 / 0.8)],
    ]
    for sure in (0.0, -1e-9, -1e-4):  # an answer known by heart: fp32 must not lose 1 - P
        chosen = torch.tensor([sure], requires_grad=True)
        loss = dpo.orpo_loss(chosen, torch.tensor([-2.0]), 0.1)
        assert loss.isfinite() and torch.autograd.grad(loss.sum(), chosen)[0].isfinite()


def test_kto_by_hand():
    logratio, is_good = t(1.0, 1.0, -2.0), torch.tensor([True, False, False])
    losses = dpo.kto_loss(logratio, is_good, 0.5, 0.1, desirable=2.0, undesirable=3.0)
    assert losses.tolist() == pytest.approx(
        [2 * (1 - sigmoid(0.05)), 3 * (1 - sigmoid(-0.05)), 3 * (1 - sigmoid(0.25))]
    )
    near, far = (0.1 * sigmoid(x) * sigmoid(-x) for x in (0.05, 0.25))
    assert slopes(losses, logratio) == [pytest.approx([-2 * near, 3 * near, 3 * far])]


# --------------------------------------------------------------------------------------------------
# Against fp64, from the papers' formulas, on full logits, an answer at a time


def logp_of(model, prompt, answer):
    """(sum over the answer's bytes and its <|im_end|> of log p, how many they are)."""
    before = [258, *f"user\n{prompt}".encode(), 259, *b"\n", 258, *b"assistant\n"]
    ids = before + [*answer.encode(), 259]
    logp = torch.log_softmax(model(pack([ids])) @ model.head.T, dim=-1)
    return sum(logp[i - 1, ids[i]] for i in range(len(before), len(ids))), len(ids) - len(before)


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def log_odds(logp, n):
    return torch.log(torch.exp(logp / n) / (1 - torch.exp(logp / n)))


def kto_truth(model, reference, rows, config):
    """The mean KTO loss of some preferences, each as a good and a bad completion."""
    singles = [(row["prompt"], row[side], side == "chosen") for row in rows for side in ("chosen", "rejected")]

    def logratio(prompt, answer):
        return logp_of(model, prompt, answer)[0] - logp_of(reference, prompt, answer)[0].detach()

    mismatched = kto.other_prompts([(prompt, answer) for prompt, answer, _ in singles], "")
    others = [logratio(p, singles[i][1]).detach() for i, (p, _, _) in zip(mismatched, singles, strict=True)]
    z, total = max(0.0, (sum(others) / len(others)).item()), 0.0
    for prompt, answer, good in singles:
        gap = logratio(prompt, answer) - z
        weight = config.desirable if good else config.undesirable
        total = total + weight * (1 - torch.sigmoid(config.beta * (gap if good else -gap)))
    return total / len(singles)


def truth(model, reference, rows, config):
    """The mean --loss of some preferences, whose "probability" says how sure the label is."""
    if config.loss == "kto":
        return kto_truth(model, reference, rows, config)
    total, beta = 0.0, config.beta
    for row in rows:
        (w, n_w), (r, n_r) = (logp_of(model, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        ref_w, ref_r = (logp_of(reference, row["prompt"], row[side])[0].detach() for side in ("chosen", "rejected"))
        p = row["probability"]
        if config.loss == "cdpo":
            p = p * (1 - config.smoothing) + (1 - p) * config.smoothing
        h = beta * ((w - ref_w) - (r - ref_r))
        if config.loss in ("dpo", "cdpo"):
            loss = -p * log_sigmoid(h) - (1 - p) * log_sigmoid(-h)
        elif config.loss == "dpo_norm":
            h = beta * ((w - ref_w) / n_w - (r - ref_r) / n_r)
            loss = -p * log_sigmoid(h) - (1 - p) * log_sigmoid(-h)
        elif config.loss == "ipo":
            loss = ((w - ref_w) / n_w - (r - ref_r) / n_r - (2 * p - 1) / (2 * beta)) ** 2
        elif config.loss == "simpo":
            m = beta * (w / n_w - r / n_r)
            loss = -p * log_sigmoid(m - config.gamma) - (1 - p) * log_sigmoid(-m - config.gamma)
        else:
            m = log_odds(w, n_w) - log_odds(r, n_r)
            loss = -w / n_w + beta * (-p * log_sigmoid(m) - (1 - p) * log_sigmoid(-m))
        total = total + loss - config.nll * w / n_w
    return total / len(rows)


FLAGS = {
    "dpo": dict(nll=0.3),
    "dpo_norm": dict(nll=0.1),
    "cdpo": dict(smoothing=0.2),
    "ipo": dict(beta=0.5, nll=0.1),
    "simpo": dict(gamma=0.5),
    "orpo": dict(beta=0.7),
    "kto": dict(desirable=1.5, undesirable=0.5),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_full_logits(make_model, loss):
    """However the batch is split, and so packed == alone; for kto with a z above 0, of the whole
    batch."""
    rows, draw = some_rows(7, 2), random.Random(3)
    for row in rows:
        row["probability"] = draw.choice([1.0, 0.75, 0.25]) if loss != "kto" else 1.0
    reference, model = make_model(0, **SMALL).double(), make_model(0, noise=0.21, **SMALL).double()
    with torch.no_grad():  # this answer has become likelier everywhere
        model.untied_head[ord("a")] += 0.05 * model.untied_head[ord("b")]
    items, label_probs = read(rows, loss == "kto")
    config = configure(loss, **FLAGS[loss])
    wanted = truth(model, reference, rows, config)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    with torch.no_grad():
        ref_logps = item_logps(reference, items)
        logratio = item_logps(model, items) - ref_logps
    assert logratio.abs().min() > 1e-3
    for micro_batch_tokens in (1, 200, 10**6):
        config.micro_batch_tokens = micro_batch_tokens
        found = dpo.run_batch(model, items, label_probs, ref_logps, config)
        assert found["loss"] == pytest.approx(wanted.item(), rel=1e-6)
        for (name, p), g in zip(model.named_parameters(), gradients):
            torch.testing.assert_close(
                p.grad, g, rtol=1e-6, atol=1e-7 * g.abs().max().item(), msg=f"{name}, {micro_batch_tokens}"
            )
            p.grad = None
        if loss in ("dpo", "cdpo"):
            compared = [found["chosen_logratio"], found["rejected_logratio"]]
            assert compared == pytest.approx(logratio.mean(0).tolist(), rel=1e-5)


def test_ktos_z_is_of_the_whole_batch_never_negative_and_without_gradient(make_model):
    """It is the mean by which the policy finds completions to other prompts likelier than the
    reference does, 0 if they are less likely."""
    reference = make_model(0, **SMALL).double()
    items, label_probs = read(some_rows(6, 4), of_kto=True)
    with torch.no_grad():
        logps = item_logps(reference, items)
    for shift in (-2.0, 2.0, torch.linspace(-4, 6, len(items), dtype=torch.float64)):
        ref_logps = logps.clone()
        ref_logps[:, 1] -= shift  # as if the reference had found them so much less likely
        z = max(0.0, float(torch.as_tensor(shift).mean()))
        unmoved = torch.zeros(len(items), dtype=torch.float64)
        wanted = dpo.kto_loss(unmoved, label_probs > 0.5, z, 0.3).mean().item()
        for micro_batch_tokens in (1, 150, 10**6):
            config = configure("kto", beta=0.3, micro_batch_tokens=micro_batch_tokens)
            found = dpo.run_batch(reference, items, label_probs, ref_logps, config)
            assert found["loss"] == pytest.approx(wanted, rel=1e-6)
    reference.zero_grad()
    dpo.run_batch(reference, items, label_probs, ref_logps, configure("kto", beta=0.3))
    ours = [p.grad.clone() for p in reference.parameters()]
    reference.zero_grad()
    logp = completion_logprob_sums(reference, [completion for completion, _ in items])
    dpo.kto_loss(logp - ref_logps[:, 0], label_probs > 0.5, z, 0.3).mean().backward()  # z is a number here
    for a, p in zip(ours, reference.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_without_a_reference_none_matters(make_model, loss):
    model, (items, label_probs) = make_model(**SMALL), read(some_rows(4, 5))
    found = []
    for ref in (torch.zeros(4, 2), torch.randn(4, 2, generator=torch.Generator().manual_seed(0)) * 30):
        model.zero_grad()
        found.append(
            [
                dpo.run_batch(model, items, label_probs.float(), ref, configure(loss))["loss"],
                *(p.grad.norm().item() for p in model.parameters()),
            ]
        )
    assert found[0] == found[1]


def test_log_probabilities_are_of_the_answer_and_its_end_alone_whatever_the_pack(make_model):
    model, rows = make_model(**SMALL), some_rows(6, 6)
    items, _ = read(rows)
    for (chosen, rejected), row in zip(items, rows):
        assert (
            TOK.decode(chosen.ids[chosen.loss_mask].tolist()) == row["chosen"] + "<|im_end|>"
            and TOK.decode(rejected.ids[rejected.loss_mask].tolist()) == row["rejected"] + "<|im_end|>"
        )
    wanted = torch.stack(
        [torch.stack([logp_of(model, row["prompt"], row[side])[0] for side in ("chosen", "rejected")]) for row in rows]
    ).detach()
    for micro_batch_tokens in (1, 130, 10**6):
        torch.testing.assert_close(dpo.all_logps(model, items, micro_batch_tokens), wanted, rtol=1e-5, atol=1e-5)
    earlier = [
        {
            "prompt": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "an earlier answer"},
                {"role": "user", "content": "r"},
            ],
            "chosen": "a",
            "rejected": "b",
        }
    ]
    assert dpo.completion_lengths(read(earlier)[0]).tolist() == [[2, 2]]  # is part of the prompt


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_what_is_preferred_and_flipped_pairs_teach_the_opposite(make_model, loss):
    rows = [{"prompt": "hi", "chosen": "yes", "rejected": "not"}, {"prompt": "ho", "chosen": "yea", "rejected": "nay"}]
    lead = {}
    for name, some in (("straight", rows), ("flipped", flip(rows))):
        model = make_model(**SMALL)
        items, label_probs = read(some, loss == "kto")
        ref_logps = dpo.all_logps(model, items, 10**6)
        optimizer, config = Optimizer(model, 3e-3), configure(loss)
        for _ in range(15):
            dpo.run_batch(model, items, label_probs.float(), ref_logps, config)
            optimizer.step(1.0)
        after = dpo.all_logps(model, read(rows)[0], 10**6) - dpo.all_logps(make_model(**SMALL), read(rows)[0], 10**6)
        lead[name] = (after[:, 0] - after[:, 1]).tolist()
    assert min(lead["straight"]) > 1 and max(lead["flipped"]) < -1, lead


# --------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])  # pairs, single answers, no reference
def test_one_process_micro_batches_and_two_processes_agree(train, fork, tmp_path, files, loss):
    how = dict(loss=loss, steps=10, eval_every=5, save_every=0, lr=0.003)
    succeeds(train(tmp_path / "whole", **how))
    succeeds(train(tmp_path / "micro", micro_batch_tokens=1, **how))
    outputs = pair(fork, dpo, **(TINY | files | how | {"out": tmp_path / "pair"}))
    assert "step 10/10" in outputs[0] and not outputs[1].strip()
    truth = results(tmp_path / "whole")
    for name in ("micro", "pair"):
        for ours, theirs in zip(results(tmp_path / name), truth, strict=True):
            if ours["step"] == 1:  # all logratios are 0 but for rounding, which decides who leads
                ours = ours | {"accuracy": theirs["accuracy"]}
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
    if loss in ("dpo", "cdpo"):
        assert losses(tmp_path / "whole")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(train, make_model, tmp_path, files, loss):
    """Even where the model it began from has been trained further since: the reference stays the
    one it began with."""
    init = tmp_path / "sft"
    shutil.copytree(files["init"], init, symlinks=True)
    straight, killed, how = tmp_path / "straight", tmp_path / "killed", dict(loss=loss, steps=30, init=init)
    succeeds(train(straight, **how))
    child = train(killed, **how)
    wait_until(lambda: logged(killed, 15), child)
    assert kill(child)[0] == -9
    checkpoint.save(init, make_model(9, **SMALL), TOK, {"stage": "sft", "step": 2})
    output = succeeds(train(killed, resume=True, **how))
    assert "continuing after step" in output
    assert train_steps(killed) == list(range(1, 31))
    assert_same_run(straight, killed, [10, 20, 30])
    for flags, named in [
        ({"beta": 0.2}, "--beta=0.2: this run was started with --beta=0.1"),
        ({"loss": "ipo"}, "--loss=ipo"),
        ({"reference": files["init"]}, "--reference="),
    ]:
        assert named in refused(train(killed, resume=True, **(how | flags)))


def test_the_reference_of_a_run_must_not_change(train, make_model, tmp_path, files):
    reference = tmp_path / "reference"
    save(make_model, reference, "sft", seed=5)
    flags = {"steps": 4, "reference": reference}
    for name in ("first", "again"):
        succeeds(train(tmp_path / name, **flags))
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    checkpoint.save(reference, make_model(6, **SMALL), TOK, {"stage": "sft", "step": 2})
    succeeds(train(tmp_path / "other", **flags))
    assert losses(tmp_path / "other") != losses(tmp_path / "first")
    changed = refused(train(tmp_path / "first", resume=True, **flags))
    assert f"{reference}: not the data this run was started with" in changed


def test_two_references_in_several_files_are_not_taken_for_one_another(make_model, tmp_path):
    """They may have the same config.json and the same index."""
    fingerprints = []
    for seed in (1, 2):
        folder = save(make_model, tmp_path / f"reference{seed}", "sft", seed=seed)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        for name in ("manifest.json", "feinschliff.json", "model.safetensors"):
            (folder / name).unlink()
        parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
        for file, names in parts.items():
            safetensors.torch.save_file({name: weights[name] for name in names}, folder / file)
        where = {name: file for file, names in parts.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        fingerprints.append(checkpoint.fingerprint(folder))
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_a_reference_loads_none_and_runs_it_over_nothing(monkeypatch, files, tmp_path, loss):
    asked = []
    monkeypatch.setattr(dpo.Run, "load_reference", lambda *args: asked.append("reference"))
    monkeypatch.setattr(dpo, "all_logps", lambda *args: asked.append("its log-probabilities"))
    config = dpo.Config(
        **(TINY | {"init": str(files["init"]), "data": str(files["data"])}), loss=loss, steps=1, out=str(tmp_path)
    )
    here(dpo.main, config)
    assert not asked


def test_the_reference_is_asked_only_for_the_pairs_that_the_steps_use(monkeypatch, files, tmp_path):
    asked, all_logps = [], dpo.all_logps

    def counted(model, items, micro_batch_tokens):
        asked.append(len(items))
        return all_logps(model, items, micro_batch_tokens)

    monkeypatch.setattr(dpo, "all_logps", counted)
    flags = TINY | {"init": str(files["init"]), "data": str(files["data"]), "val_fraction": 0.1}
    for steps in (2, 30):
        here(dpo.main, dpo.Config(**flags, steps=steps, out=str(tmp_path / f"{steps} steps")))
    assert asked == [32, 12, 108, 12]  # 2 x 16 of 108 pairs, and 12 held out


def cpo_loss(chosen, rejected, beta, label_probs=1.0):
    """CPO (Xu et al. 2024, arXiv 2401.08417): DPO without a reference, on whole completions."""
    return dpo.dpo_loss(chosen, rejected, beta, label_probs)


def test_a_forkers_loss_is_a_function_and_a_row(monkeypatch, make_model):
    """Its accuracy is judged by what its row says it compares."""
    monkeypatch.setitem(dpo.LOSSES, "cpo", dpo.Loss(cpo_loss, 0.1, "mean_logp"))
    model, (items, label_probs) = make_model(**SMALL), read(some_rows(12, 7))
    config = dpo.Config(init="", data="", out="", loss="cpo", beta=0.1)
    found = dpo.run_batch(model, items, label_probs, torch.randn(12, 2), config)
    mean_logps = item_logps(model, items).detach() / dpo.completion_lengths(items)
    assert found["accuracy"] == pytest.approx((mean_logps[:, 0] > mean_logps[:, 1]).float().mean().item())
    assert found["chosen_mean_logp"] == pytest.approx(mean_logps[:, 0].mean().item(), rel=1e-5)
    assert all(p.grad is not None for p in model.parameters())


def test_a_run_learns_and_warns_when_the_chosen_answers_become_less_likely(train, make_model, tmp_path):
    run = tmp_path / "run"
    output = succeeds(train(run, steps=30, lr=0.01))
    model, tok, info = checkpoint.load(run)
    found = [r for r in records(run) if "val_loss" in r]
    assert (
        found[-1]["accuracy"] > 0.8
        and found[-1]["val_loss"] < found[0]["val_loss"] < math.log(2)
        and info["lineage"][-1]["stage"] == "sft"
        and info["stage"] == "dpo"
    )
    assert info["config"]["beta"] == 0.1 and "chosen completions" in output and "thanks<|im_end|>»" in output
    step = [r for r in records(run) if "loss" in r][-1]
    assert (
        step["margin"] == pytest.approx(step["chosen_reward"] - step["rejected_reward"], abs=1e-6)
        and step["margin"] > 0
    )

    # A model that says both answers already can hardly say one of them more often
    alike = [
        {"prompt": f"hi {i}", "chosen": f"{i % 3} apples on the table", "rejected": f"{i % 3} apples on the chair"}
        for i in range(60)
    ]
    items, model = [side for item in read(alike)[0] for side in item], make_model(**SMALL)
    optimizer = Optimizer(model, 0.01)
    for _ in range(100):
        (-completion_logprob_sums(model, items).mean()).backward()
        optimizer.step(1.0)
    checkpoint.save(tmp_path / "knows", model, TOK, {"stage": "sft", "step": 1})
    how = dict(
        init=tmp_path / "knows", data=write_rows(tmp_path / "alike.jsonl", alike), steps=30, lr=0.003, eval_every=1
    )
    falls, held = succeeds(train(tmp_path / "falls", **how)), succeeds(train(tmp_path / "held", nll=1, **how))
    chosen = {
        name: min(r["chosen_logratio"] for r in records(tmp_path / name) if "val_loss" in r)
        for name in ("falls", "held")
    }
    assert (
        chosen["falls"] < 0 and falls.count("warning: chosen completions are less likely") == 1 and "--nll=1" in falls
    ), chosen
    assert chosen["held"] > chosen["falls"] and ("warning: chosen" in held) == (chosen["held"] < 0), chosen
    (tmp_path / "falls/step_000030/manifest.json").unlink()
    again = succeeds(train(tmp_path / "falls", resume=True, **how))
    assert "continuing after step 20" in again and "warning: chosen" not in again  # it has been said


@pytest.mark.parametrize(
    "loss, beta, said",
    [
        ("simpo", 2.0, "than before the first step; --nll=1 keeps them up"),
        ("orpo", 100.0, "than before the first step; a smaller --beta keeps them up"),
        ("kto", 0.1, "than in the reference; a larger --desirable or --beta keeps them up"),
    ],
)
def test_every_loss_warns_when_the_chosen_answers_become_less_likely(train, tmp_path, loss, beta, said):
    """At a rate that ruins the model, with a single validation; without a reference what counts is
    the model before the first step."""
    how = {"loss": loss, "steps": 3, "eval_every": 0, "save_every": 0}
    output = succeeds(train(tmp_path / "run", lr=1.0, beta=beta, **how))
    assert output.count("warning: chosen completions are less likely " + said) == 1
    good = succeeds(train(tmp_path / "good", lr=1e-3, **how))
    (validation,) = [r for r in records(tmp_path / "good") if "val_loss" in r]
    assert "warning: chosen" not in good and validation["step"] == 3


def test_a_tie_is_half_right_and_a_soft_label_counts_by_its_probability(make_model):
    """The same text on both sides leads by nothing; as evaluate.py counts it."""
    model, row = make_model(**SMALL), some_rows(1, 3)[0]
    (item,), _ = read([row])
    for label_prob, sides, right in ((1.0, item[:1] * 2, 0.5), (0.75, item, None), (0.25, item[::-1], None)):
        found = dpo.run_batch(model, [sides], torch.tensor([label_prob]), torch.zeros(1, 2), configure("simpo"))
        leads = found["chosen_mean_logp"] > found["rejected_mean_logp"]
        expected = (label_prob if leads else 1 - label_prob) if right is None else right
        assert found["accuracy"] == expected


def test_the_likelier_answer_of_a_pair_is_its_chosen_one(tmp_path):
    """Otherwise --nll and orpo would make the worse answer likelier."""
    rows = [row | {"probability": p} for row, p in zip(some_rows(20, 1), [0.9, 1.0, 0.75, 0.6] * 5)]
    turned = [row | {"probability": 1 - row["probability"]} for row in flip(rows)]
    found = []
    for some in (rows, turned):
        data = str(write_rows(tmp_path / f"{len(found)}.jsonl", some))
        config = SimpleNamespace(data=data, val="", val_fraction=0.25, skip_bad=False, seed=0)
        train, label_probs, val, val_label_probs, _ = chat.read_items(config, TOK, 200)
        ids = [[side.ids.tolist() for side in item] for item in train + val]
        found.append((ids, torch.cat([label_probs, val_label_probs])))
        assert all("thanks" in TOK.decode(first.ids) for first, _ in train + val)
    (ids, probs), (turned_ids, turned_probs) = found
    assert ids == turned_ids and probs.min() > 0.5
    torch.testing.assert_close(probs, turned_probs)


def test_an_epoch_has_each_pair_once_and_the_reference_reads_what_is_used(train, tmp_path):
    data, val = (write_rows(tmp_path / f"{k}.jsonl", some_rows(k, k)) for k in (95, 5))
    output = succeeds(train(tmp_path / "run", data=data, val=val, batch_size=64, epochs=1))
    assert "95 pairs" in output and "2 steps of 64: 1.00 epochs" in output
    tokens = sum(len(side.ids) for item in read(some_rows(95, 95))[0] for side in item)
    assert sum(r["tokens"] for r in records(tmp_path / "run") if "loss" in r) == tokens


@pytest.mark.parametrize("certain, said", [(0, 1), (5, 0)])
def test_pairs_that_all_prefer_neither_side_are_said_once(tmp_path, capsys, certain, said):
    rows = [row | {"probability": 1.0 if i < certain else 0.5} for i, row in enumerate(some_rows(20, 1))]
    data = str(write_rows(tmp_path / "even.jsonl", rows))
    for read_them in (chat.read_pairs, chat.read_items):  # of reward.py and of dpo.py
        config = SimpleNamespace(data=data, val="", val_fraction=0.1, skip_bad=False, seed=0)
        read_them(config, TOK, 200)
        lines = capsys.readouterr().out.splitlines()
        found = [line for line in lines if line.startswith("warning: ") and '"probability" 0.5' in line]
        assert len(found) == said and all(f"{data}: all 18 pairs" in line and "bring labels" in line for line in found)


def singles(n, seed, sides):
    """KTO's rows: these sides of some pairs, with their labels."""
    pairs = some_rows(n, seed)
    return [{"prompt": row["prompt"], "completion": row[s], "label": s == "chosen"} for row in pairs for s in sides]


@pytest.mark.parametrize("here, absent", [("chosen", "rejected"), ("rejected", "chosen")])
def test_a_side_that_a_batch_of_kto_lacks_has_no_figure(make_model, here, absent):
    model = make_model(**SMALL)
    items, labels = read(singles(6, 3, [here]), of_kto=True)
    ref_logps = torch.full((len(items), 2), -20.0)
    found = dpo.run_batch(model, items, labels, ref_logps, configure("kto"))
    logratios = item_logps(model, items)[:, 0] + 20
    assert found[f"{here}_logratio"] == pytest.approx(logratios.mean().item(), rel=1e-4)
    assert set(found) == {"loss", "accuracy", f"{here}_logratio"}


def test_a_margin_is_logged_of_the_batches_of_kto_that_have_both_sides(train, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", singles(36, 1, ["chosen"]) + singles(3, 2, ["rejected"]))
    val = write_rows(tmp_path / "bad.jsonl", singles(8, 3, ["rejected"]))
    output = succeeds(train(tmp_path / "run", loss="kto", data=data, val=val, batch_size=4, epochs=1, lr=0.003))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    both = [r for r in steps if {"chosen_reward", "rejected_reward"} <= set(r)]
    assert 0 < len(both) <= 3 and [r for r in steps if "margin" in r] == both
    assert all(("chosen_reward" in r) or ("rejected_reward" in r) for r in steps)
    assert all(r["margin"] == pytest.approx(r["chosen_reward"] - r["rejected_reward"], abs=1e-6) for r in both)
    validations = [r for r in records(tmp_path / "run") if "val_loss" in r]
    assert validations and all("rejected_logratio" in r and "chosen_logratio" not in r for r in validations)
    assert "warning: chosen completions are less likely" not in output


def test_kto_reads_single_answers_of_which_the_held_out_may_all_be_good(train, tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in some_rows(40, 1)
        for side in ("chosen", "rejected")
    ]
    data, val = (
        write_rows(tmp_path / "single.jsonl", rows),
        write_rows(tmp_path / "good.jsonl", [row for row in rows if row["label"]]),
    )
    output = succeeds(train(tmp_path / "run", loss="kto", data=data, val=val, steps=5))
    assert "NaN" not in (tmp_path / "run/log.jsonl").read_text() and "nan" not in output


def test_pairs_too_long_are_dropped_and_counted(train, tmp_path):
    rows = some_rows(10, 1) + [
        {"prompt": "q", "chosen": "x" * 90, "rejected": "y"},
        {"prompt": "q", "chosen": "y", "rejected": "x" * 90},
    ]
    data = write_rows(tmp_path / "long.jsonl", rows)
    output = succeeds(train(tmp_path / "run", data=data, val=data, steps=1))
    assert (
        output.count(f"{data}: 2 of 12 pairs left out, a side of which exceeds 96 tokens") == 2 and "10 pairs" in output
    )
    only = write_rows(tmp_path / "only.jsonl", rows[-2:])
    assert "only.jsonl: no pair fits into 96 tokens" in refused(train(tmp_path / "none", data=only, val=data))


def test_bad_input_is_one_clear_line_and_costs_nothing(train, make_model, tmp_path, files):
    run = tmp_path / "old"
    succeeds(train(run, steps=1))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    chats = write_rows(
        tmp_path / "chat.jsonl",
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    )
    label = write_rows(tmp_path / "label.jsonl", [{"prompt": "q", "completion": "a", "label": "yes"}])
    scalar = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    other = save(make_model, tmp_path / "other", "sft", tok=tokenizer.train(["the old map " * 5], 256 + 4 + 3))
    for flags, named in [
        ({"data": chats}, 'chat.jsonl:1: no "chosen"; this is a conversation, which sft.py reads'),
        ({"data": label, "loss": "kto"}, "label.jsonl:1: \"label\" is 'yes'; true or false"),
        ({"data": files["init"]}, "sft: a checkpoint, but a .jsonl or .parquet file was expected"),
        ({"init": files["data"]}, "pairs.jsonl: no checkpoint here, but a file"),
        ({"init": scalar}, "a reward model, which has no output head"),
        ({"reference": other}, "it has another tokenizer"),
        ({"reference": tmp_path / "absent"}, "absent: no checkpoint here"),
        ({"loss": "ppo"}, "--loss=ppo: expected one of dpo, dpo_norm, cdpo"),
        ({"gamma": 1}, "--gamma=1.0: --loss=dpo does not read it"),
        ({"smoothing": 0.2}, "--smoothing=0.2: --loss=dpo does not read it"),
        ({"desirable": 2}, "--desirable=2.0: --loss=dpo does not read it"),
        ({"undesirable": 2, "loss": "ipo"}, "--undesirable=2.0: --loss=ipo does not read it"),
        ({"nll": 1, "loss": "orpo"}, "--nll=1.0: --loss=orpo does not read it"),
        ({"nll": 1, "loss": "kto"}, "--nll=1.0: --loss=kto does not read it"),
        ({"reference": files["init"], "loss": "simpo"}, ": --loss=simpo does not read it"),
        ({"smoothing": 0.6, "loss": "cdpo"}, "--smoothing=0.6"),
        ({"beta": -1}, "--beta=-1.0"),
        ({"beta": "inf"}, "--beta=inf"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"context": 97}, "--context=97: the model of"),
    ]:
        line = refused(train(run, overwrite=True, **flags))
        assert named in line, (flags, line)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, flags
