"""distill.py: the loss against fp64 on whole distributions, micro-batches, ranks and resume, two
teachers, and a student that becomes its teacher."""

import numpy as np
import pytest
import test_ppo
import torch
from runs import kill, logged, pair, records, refused, save, start, succeeds, train_steps, wait_until, write_rows
from test_ppo import TOK, ask, assert_close_runs, assert_same, moved, questions, sampled

import distill
from data import chat
from data.pack import pack
from runtime import checkpoint

files = test_ppo.files
TINY = {"prompts_per_step": 6, "max_new_tokens": 6, "lr": 0.003, "steps": 4, "eval_every": 2, "eval_prompts": 4}
TINY |= {"val_fraction": 0.2, "save_every": 0, "keep_last": 9, "device": "cpu"}


@pytest.fixture
def flags(files, make_model, tmp_path):
    """The student is a fresh model; the teacher talks."""
    save(make_model, tmp_path / "student", "sft", seed=4)
    return TINY | {"init": tmp_path / "student", "teacher": files / "sft", "data": files / "prompts.jsonl"}


@pytest.fixture
def train(fork, flags):
    """A function: flags -> Child that runs `distill.py` with them on the tiny files."""

    def run(out, **more):
        return start(fork, distill, **(flags | {"out": out} | more))

    return run


def kl_of_whole_distributions(model, teacher, chats, direction, temperature):
    """The definition, a token at a time: [M]."""
    found = []
    for c in chats:
        log_p = (model(pack([c.ids])) @ model.head.T / temperature).log_softmax(-1)
        log_q = (teacher(pack([c.ids])) @ teacher.head.T / temperature).log_softmax(-1)
        if direction == "forward":
            log_p, log_q = log_q, log_p
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        found += [kl[i - 1] for i in np.flatnonzero(c.loss_mask)]
    return torch.stack(found)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_are_those_of_whole_distributions(files, direction, temperature):
    student, _, _ = checkpoint.load(files / "sft")
    teacher = moved(student, by=0.1).double()
    student = student.double()
    chats, _ = sampled(student.float(), n=2)
    student = student.double()
    loss = distill.distill_loss(student, teacher, chats, direction, temperature)
    wanted = kl_of_whole_distributions(student, teacher, chats, direction, temperature).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9) and loss > 0.1
    parameters = list(student.parameters())
    found = torch.autograd.grad(loss, parameters)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    assert all(p.grad is None for p in teacher.parameters())


def test_each_row_is_scored_by_its_own_teacher(files):
    student, _, _ = checkpoint.load(files / "sft")
    teachers = [moved(student, seed, 0.1) for seed in (1, 2)]
    chats, _ = sampled(student, n=2)
    items = [(c, i % 2) for i, c in enumerate(chats)]
    n_tokens = distill.count_trained(items)
    config = distill.Config(init="", teacher="a,b", out="")
    total = distill.run_batch(student, teachers, items, n_tokens, config)
    wanted = sum(
        kl_of_whole_distributions(student, teachers[i], [c for c, own in items if own == i], "reverse", 1.0).sum()
        for i in (0, 1)
    )
    assert total.item() == pytest.approx(wanted.item() / n_tokens, rel=1e-5)
    gradients = [p.grad.clone() for p in student.parameters()]
    for p in student.parameters():
        p.grad = None
    config.micro_batch_tokens = 40  # micro-batches of one or two conversations: the same gradient
    distill.run_batch(student, teachers, items, n_tokens, config)
    for ours, p in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_a_student_becomes_its_teacher(train, flags, tmp_path):
    """And a student that is its teacher already has no distance to it and does not move, and says
    so."""
    out = tmp_path / "run"
    said = "warning: the student says what its teacher says (loss and gradient are 0)"
    assert "the student says" not in succeeds(train(out, steps=60, lr=0.02, prompts_per_step=24, eval_every=0))
    first, last = ([r for r in records(out) if "loss" in r][i] for i in (0, -1))
    assert last["loss"] < 0.35 * first["loss"], (first["loss"], last["loss"])
    assert last["finished"] > first["finished"]
    same = tmp_path / "same"
    assert said in succeeds(train(same, init=flags["teacher"], steps=1))
    (step,) = [r for r in records(same) if "loss" in r]
    assert step["loss"] == 0 and step["grad_norm"] == 0


@pytest.mark.parametrize("offline", [False, True])
def test_a_killed_run_resumes_as_if_nothing_had_been(train, tmp_path, offline):
    flags = {"steps": 9, "save_every": 3}
    if offline:
        flags |= unsampled(tmp_path)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    succeeds(train(straight, **flags))
    child = train(killed, **flags)
    wait_until(lambda: logged(killed, 5), child)
    assert kill(child)[0] == -9
    assert "continuing after step 3" in succeeds(train(killed, resume=True, **flags))
    assert train_steps(killed) == list(range(1, 10))
    assert_same(straight, killed, [3, 6, 9])
    assert "--direction=forward" in refused(train(killed, resume=True, **(flags | {"direction": "forward"})))


def conversations(tmp_path, **more):
    rows = [
        {"messages": [*ask(f"q{i}"), {"role": "assistant", "content": ["yes", "no"][i % 2]}], **more} for i in range(20)
    ]
    return write_rows(tmp_path / "conversations.jsonl", rows)


def unsampled(tmp_path):
    """The flags of a run on conversations that are there."""
    return {"data": "", "offline": conversations(tmp_path), "max_new_tokens": distill.Config.max_new_tokens}


def test_one_process_and_two_agree(train, fork, flags, tmp_path):
    succeeds(train(tmp_path / "one"))
    pair(fork, distill, **(flags | {"out": tmp_path / "two"}))
    assert_close_runs(tmp_path / "one", tmp_path / "two", 4, ["model.safetensors"])


def test_two_teachers_and_their_rows(train, files, make_model, tmp_path):
    save(make_model, tmp_path / "other", "sft", seed=7)
    two = f"{files / 'sft'},{tmp_path / 'other'}"
    rows = [{**row, "teacher": i % 2} for i, row in enumerate(questions(30))]
    succeeds(train(tmp_path / "run", teacher=two, data=write_rows(tmp_path / "prompts.jsonl", rows)))
    plain = write_rows(tmp_path / "plain.jsonl", questions(30))
    line = refused(train(tmp_path / "a", teacher=two, data=plain))
    assert "plain.jsonl:1" in line and '"teacher" is None' in line
    wrong = write_rows(tmp_path / "wrong.jsonl", [{**row, "teacher": 2} for row in questions(30)])
    assert '"teacher" is 2' in refused(train(tmp_path / "b", teacher=two, data=wrong))


def test_a_single_prompt_may_be_validated_on(train, files, tmp_path):
    """What is sampled to it is new each time, as in grpo.py; of conversations it says nothing."""
    val = write_rows(tmp_path / "val.jsonl", questions(1))
    assert "1 prompts to validate on" in succeeds(train(tmp_path / "run", val=val, val_fraction=0.05, steps=1))
    answers = [{"messages": [*ask("q"), {"role": "assistant", "content": text}]} for text in ("yes", "no", "perhaps")]
    val = write_rows(tmp_path / "one.jsonl", answers)
    line = refused(train(tmp_path / "a", **unsampled(tmp_path), val=val, val_fraction=0.05))
    assert "one.jsonl: rows of one prompt only to validate on" in line


def test_refusals(train, files, make_model, tmp_path):
    assert "--teacher" in refused(train(tmp_path / "a", teacher=""))
    assert "--data and --offline" in refused(train(tmp_path / "a", offline=conversations(tmp_path)))
    assert "--data and --offline" in refused(train(tmp_path / "a", data=""))
    line = refused(train(tmp_path / "a", **unsampled(tmp_path) | {"max_new_tokens": 6}))
    assert "--max_new_tokens=6: with --offline nothing is sampled" in line
    assert "--direction=sideways" in refused(train(tmp_path / "a", direction="sideways"))
    assert "a reward model" in refused(train(tmp_path / "a", teacher=files / "rm"))
    from data import tokenizer

    other = tokenizer.train(["some other words of another corpus " * 20], 284)
    save(make_model, tmp_path / "other", "sft", tok=other)
    assert "another tokenizer" in refused(train(tmp_path / "a", teacher=tmp_path / "other"))


def test_completions_that_the_limit_cuts_are_said_once(train, tmp_path):
    """A fresh student writes no end."""
    assert succeeds(train(tmp_path / "run", steps=3)).count("warning: --max_new_tokens=6 cuts") == 1


def test_a_comma_after_one_teacher_names_no_second(train, flags, tmp_path):
    succeeds(train(tmp_path / "run", teacher=f"{flags['teacher']},", steps=1))


def test_a_student_may_be_of_another_shape(train, make_model, tmp_path):
    save(make_model, tmp_path / "small", "sft", seed=4, layers=1, width=8, heads=1, kv_heads=1)
    assert "memory:" in succeeds(train(tmp_path / "run", init=tmp_path / "small"))


def test_offline_validation_is_the_kl_of_held_out_conversations(train, files, tmp_path):
    out = tmp_path / "run"
    succeeds(train(out, **unsampled(tmp_path), steps=2))
    (validation,) = [r for r in records(out) if "val_loss" in r]
    student, _, _ = checkpoint.load(out)
    teacher, _, _ = checkpoint.load(files / "sft")
    config = distill.Config(init="", teacher=str(files / "sft"), offline=str(tmp_path / "conversations.jsonl"), out="")
    config.val_fraction = 0.2
    _, val, _ = distill.read_data(config, TOK, student.config.context)
    chats = [c for c, _ in val]
    assert len(chats) == 4 and chats[0].loss_mask.any()
    assert [chat.decode_completion(TOK, c.ids[c.loss_mask]) in ("yes", "no") for c in chats] == [True] * 4
    kl = kl_of_whole_distributions(student, teacher, chats, "reverse", 1.0).mean().item()
    assert validation["val_loss"] == pytest.approx(kl, rel=1e-4)
