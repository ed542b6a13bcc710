"""scoring.py: rewards are read as they are written, add up by weight, and name what fails; a judge
is asked in both orders."""

import contextlib
import importlib.util
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import SMALL, here, save
from test_evaluate import END, TOK, ask, constant_model
from test_run import Stage

from data import chat, rows as data_rows, tokenizer
from data.judge import judge_prompt
from data.pack import make_completion, pack
from model import completion_logprobs, logprobs_no_grad
from rollout import Completion, Sample, sample_completions
from runtime import checkpoint
from runtime.errors import UserError
from runtime.guard import time_limit
from runtime.run import Run
from scoring import (
    exact_match,
    judge_score,
    load_rewards,
    next_of_group,
    read_constitution,
    refuse_shadowed,
    reward_configs,
    reward_hashes,
    reward_scores,
    score_batch,
    score_completions,
    validate_policy,
)

ROOT = Path(__file__).parents[1]
FUNCTIONS = """
def length(prompt, completion, row):
    return len(completion)

def asked(prompt, completion, row):
    return row["id"] + 0.5 * row["finished"]

def bad(prompt, completion, row):
    return float("nan")

def word(prompt, completion, row):
    return "good"

def slow(prompt, completion, row):
    while True:
        pass

x = 3
"""


@pytest.fixture
def functions(tmp_path):
    """A file of reward functions."""
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def load(names, **options):
    return load_rewards(names, torch.device("cpu"), 1000, **options)


def score_one(reward):
    """Score one completion, "A", to one prompt."""
    return score_completions(reward, [(ask("q")[0], {"id": 0})], [Sample(0, [65], [0.0], True)], ["A"])


# -------------------------------------------------------------------------------------------------
# A command line


def test_rewards_of_a_command_line_are_weighted_and_added(functions, tmp_path, make_model):
    directory = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    length, asked = f"{functions}:length", f"{functions}:asked"
    rewards = load(f"{length}*0.5,{asked},{directory}*-2e-1")
    assert [(name, weight) for name, weight, _ in rewards] == [(length, 0.5), (asked, 1.0), (str(directory), -0.2)]
    rows = [(messages, {"id": i}) for i, messages in enumerate(ask("one", "two"))]
    samples, texts = [Sample(1, [65, END], [], True), Sample(0, [65, 66], [], False)], ["A", "AB"]
    total, parts = score_completions(rewards, rows, samples, texts)
    assert parts[length].tolist() == [1, 2] and parts[asked].tolist() == [1.5, 0.0]
    by_model = parts[str(directory)]
    np.testing.assert_allclose(total, [0.5 + 1.5 - 0.2 * by_model[0], 1 - 0.2 * by_model[1]])
    total, parts = score_completions(rewards, rows, [], [])  # a rank's share may be empty
    assert total.shape == (0,) and [values.shape for values in parts.values()] == [(0,)] * 3
    assert load("") == []


@pytest.mark.parametrize("flag", ["reward", "monitor", "checker"])
def test_an_error_names_the_flag_that_named_the_reward(functions, tmp_path, make_model, flag):
    sft = save(make_model, tmp_path / "sft", "sft")
    rm = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    (tmp_path / "principles.txt").write_text("Be kind.\n")
    principles = {"constitution": str(tmp_path / "principles.txt")}

    def load_and_score(name, options):
        if flag == "monitor":
            return score_one(load(f"{functions}:length", monitor=name, **options))
        return score_one(load(name, flag=flag, **options))

    for name, message, options in [
        (f"{functions}:none", "has no function none", {}),
        (f"{functions}:bad", "returned nan", {}),
        (f"{functions}:slow", "0.2 seconds", {"timeout": 0.2}),
        ("gone.py:f", "gone.py does not exist", {}),
        (str(sft), "not a reward model", {}),
        (f"judge:{rm}", "needs principles", {}),
        (f"judge:{rm}", "writes no verdict", principles),
        (f"judge:{sft}", "at least two", principles),
    ]:
        with pytest.raises(UserError, match=f"^--{flag}={name}: .*{message}"):
            load_and_score(name, options)


def test_what_is_only_monitored_weighs_nothing(functions):
    rewards = load(f"{functions}:length*2", monitor=f"{functions}:asked,{functions}:length")
    assert [(name.rpartition(":")[2], weight) for name, weight, _ in rewards] == [("length", 2.0), ("asked", 0.0)]


@pytest.mark.parametrize(
    "names, message",
    [
        ("{f}:length*x", "'x' is not a number"),
        ("{f}:length*nan", "'nan' is not a number of at most"),
        ("{f}:length*inf", "'inf' is not a number of at most"),
        (", ,", "--reward=, ,: there is no name in it"),
        ("{f}:none", "has no function none"),
        ("{f}:x", "has no function x"),
        ("gone.py:f", "gone.py does not exist"),
        ("{f}:length,{f}:length*2", "twice"),
        ("gone", "gone"),
        ("judge:gone", "needs principles"),
    ],
)
def test_rewards_that_cannot_be_are_refused(functions, names, message):
    with pytest.raises(UserError, match=message):
        load(names.format(f=functions))


def test_models_in_the_wrong_place_are_refused(make_model, tmp_path):
    policy = save(make_model, tmp_path / "sft", "sft")
    critic = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    constitution = tmp_path / "c.txt"
    constitution.write_text("Be kind.\n")
    with pytest.raises(UserError, match="not a reward model"):
        load(str(policy))
    with pytest.raises(UserError, match="a reward model, which writes no verdict"):
        load(f"judge:{critic}", constitution=str(constitution))


def test_hashes_follow_what_rewards_are_made_of(functions, tmp_path, make_model):
    directory, other = (
        save(make_model, tmp_path / name, "reward", seed, scalar_head=True) for seed, name in enumerate(("rm", "rm2"))
    )
    constitution = tmp_path / "c.txt"
    constitution.write_text("Be kind.\n")
    names = f"{functions}:length*0.5,{directory},judge:{other}*2"
    hashes = reward_hashes(names, str(constitution))
    assert set(hashes) == {str(constitution), f"{functions}:length", str(directory), f"judge:{other}"}
    assert len(set(hashes.values())) == 4
    functions.write_text(functions.read_text() + "# more\n")
    again = reward_hashes(names, str(constitution))
    assert [name for name in hashes if again[name] != hashes[name]] == [f"{functions}:length"]
    assert reward_hashes("") == {}
    configs = reward_configs(names)
    assert list(configs) == sorted([str(directory), str(other)])
    assert all(c.scalar_head and c.layers == 2 for c in configs.values())


# -------------------------------------------------------------------------------------------------
# Functions


def test_a_file_that_breaks_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match=r"broken.py cannot be imported: ModuleNotFoundError.*broken.py:1\)"):
        load(f"{tmp_path}/broken.py:f")


@pytest.mark.parametrize("timeout", [1e-30, 1e-6, 3e-5, 1e-4])
def test_a_time_limit_shorter_than_any_call_is_an_error_and_ends(functions, timeout):
    with pytest.raises(UserError, match="TimeoutError: took longer than"):
        score_one(load(f"{functions}:slow", timeout=timeout))


@pytest.mark.parametrize(
    "name, message",
    [
        ("bad", "returned nan; a finite number was expected.* and the row {"),
        ("word", "returned 'good' of the type str; a number was expected"),
        ("slow", "TimeoutError: took longer than 0.2 seconds"),
    ],
)
def test_a_function_that_fails_names_its_completion(functions, name, message):
    begin = time.perf_counter()
    with pytest.raises(UserError, match=message) as e:
        score_one(load(f"{functions}:{name}", timeout=0.2))
    assert "'A'" in str(e.value) and time.perf_counter() - begin < 5


def test_a_time_limit_ends_with_what_it_limits():
    with pytest.raises(TimeoutError, match="0.05 seconds"):
        with time_limit(0.05):
            while True:
                pass
    for seconds in (0.05, 1e30):
        with time_limit(seconds):
            pass
    with pytest.raises(KeyError):
        with time_limit(0.05):
            raise KeyError
    time.sleep(0.1)  # an alarm left behind would end this process


def test_a_time_limit_holds_for_a_body_that_catches_it():
    begin = time.perf_counter()
    with pytest.raises(TimeoutError):
        with time_limit(0.05):
            for _ in range(3):
                try:
                    while True:
                        pass
                except TimeoutError:
                    pass
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("caught", [TimeoutError, Exception, (OSError, ValueError)])
def test_a_loop_that_retries_ends_with_its_time(caught):
    begin = time.perf_counter()
    with pytest.raises(TimeoutError, match="took longer than 0.05 seconds"):
        with time_limit(0.05):
            for _ in range(100):
                with contextlib.suppress(caught):
                    time.sleep(0.2)
    assert time.perf_counter() - begin < 2  # with each alarm caught it takes 5 seconds
    with time_limit(0.5):  # the neighbour: what is tried again, in time
        for _ in range(3):
            with contextlib.suppress(Exception):
                raise ConnectionError


def test_two_functions_of_a_file_share_it_and_find_the_files_next_to_it(tmp_path):
    (tmp_path / "beside.py").write_text("WORTH = 3.0\n")
    (tmp_path / "both.py").write_text(
        "import dataclasses\nimport beside\n\n"
        "@dataclasses.dataclass\nclass State:\n    n: int = 0\n\nstate = State()\n\n"
        "def one(p, c, r):\n    state.n += 1\n    return beside.WORTH\n\n"
        "def two(p, c, r):\n    return float(state.n)\n"
    )
    rewards = load(f"{tmp_path}/both.py:one,{tmp_path}/both.py:two")
    total, parts = score_one(rewards)
    assert [values.tolist() for values in parts.values()] == [[3.0], [1.0]] and total.tolist() == [4.0]


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_processes_that_a_function_starts_find_its_file(tmp_path, start):
    (tmp_path / f"by_{start}.py").write_text(
        "import multiprocessing\n\ndef run(q, completion):\n    q.put(len(completion) + 1.0)\n\n"
        "def f(prompt, completion, row):\n"
        f"    context = multiprocessing.get_context('{start}')\n    q = context.Queue()\n"
        "    p = context.Process(target=run, args=(q, completion))\n    p.start()\n    p.join()\n"
        "    return 0.0 if q.empty() else q.get()\n"
    )
    assert score_one(load(f"{tmp_path}/by_{start}.py:f"))[0].tolist() == [2.0]


def test_files_of_one_name_are_two_modules_and_in_nobodys_place(tmp_path):
    names = [f"{folder}/{file}" for folder in "ab" for file in ("twin", "model", "this", "two.dots", "class")]
    for n, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(f"def f(p, c, r):\n    return {n}\n")
    worth = [score_one(load(f"{tmp_path}/{name}.py:f"))[0].item() for name in names]
    assert worth == list(range(len(names)))
    for name in ("model", "this"):  # one of ours, and one of Python's that nobody imports
        assert not importlib.util.find_spec(name).origin.startswith(str(tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        {"mine": "from model import judge_it", "model": ""},
        {"mine": "def f(p, c, r):\n    import model", "model": "x = 1"},
        {"mine": "import helper", "helper": "import data.help", "data/help": ""},
        {"mine": "from runtime import cli", "runtime/__init__": "cli = 1", "runtime/cli": ""},
    ],
)
def test_a_file_that_is_called_as_ours_is_and_imported_is_refused(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    reward = f"{tmp_path}/mine.py:f"
    said = rf"(mine|helper).py imports .*, which is {ROOT}/.*py here; rename {tmp_path}/.*py"
    with pytest.raises(UserError, match=f"^--reward={reward}: {said}$"):
        load(reward)


def test_a_file_may_import_ours_and_what_is_next_to_it(tmp_path):
    (tmp_path / "model.py").write_text("")  # which it does not import
    (tmp_path / "data.py").write_text("")  # no package, so data.rules is ours
    (tmp_path / "help.py").write_text("import mine, help\nimport data.rules as rules")
    (tmp_path / "mine.py").write_text("import help, json\nfrom data.rules import brief\nf = brief")
    load(f"{tmp_path}/mine.py:f")
    for ours in ("model.py", "data/rules.py", "data/puzzles.py", "bench/peers.py"):
        refuse_shadowed(ROOT / ours, "--reward")


# -------------------------------------------------------------------------------------------------
# Reward models


def test_a_reward_model_with_a_shorter_context_reads_the_ends_and_says_so(make_model, tmp_path, capsys):
    directory = save(make_model, tmp_path / "rm", "reward", context=24, scalar_head=True)
    ((_, _, reward),) = load(str(directory))
    samples = [Sample(i, [1], [0.0], True) for i in range(2)]
    conversations = ask("a" * 30, "b" * 30)
    values = reward(conversations, [{}, {}], samples, ["yes", "yes"])
    reward(conversations, [{}, {}], samples, ["yes", "yes"])
    model = checkpoint.load(directory)[0]
    documents = [(chat.encode_prompt(TOK, m) + chat.encode_completion(TOK, "yes")) for m in conversations]
    np.testing.assert_allclose(values, reward_scores(model, [d[-24:] for d in documents], 10**6), atol=1e-6)
    assert capsys.readouterr().out.count("2 of 2 conversations exceed its context of 24 tokens") == 1
    with pytest.raises(UserError, match="conversation of .* exceeds the model's context of 24"):
        reward_scores(model, documents, 10**6)


def test_a_resumed_run_repeats_no_warning_of_a_reward(make_model, tmp_path, capsys):
    short = save(make_model, tmp_path / "rm", "reward", context=24, scalar_head=True)
    base = save(make_model, tmp_path / "base", "pretrain")

    def train(config):
        run = Run("sft", config)
        model, tok = run.load()
        run.begin(config.steps, model, data={}, saved={})
        for step in run.steps():
            score_completions(load(str(short)), [(ask("a" * 30)[0], {})], [Sample(0, [1], [0.0], True)], ["yes"])
            run.end_step(step, model, tok)

    for steps in (1, 2):
        here(train, Stage(out=str(tmp_path / "run"), init=str(base), steps=steps, save_every=1, resume=steps > 1))
    assert capsys.readouterr().out.count("exceed its context of 24 tokens") == 1
    here(train, Stage(out=str(tmp_path / "other"), init=str(base), steps=1))
    assert "exceed its context of 24 tokens" in capsys.readouterr().out


def test_scores_that_are_not_finite_are_refused(make_model):
    model = make_model(scalar_head=True)
    with torch.no_grad():
        model.score[0, 0] = float("inf")
    with pytest.raises(UserError, match="reward model's scores are not finite"):
        reward_scores(model, [[1, 2, 3]], 100)


# -------------------------------------------------------------------------------------------------
# Judges


def labelled_tokenizer():
    return tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)


def test_a_judge_is_asked_in_both_orders(make_model):
    tok = labelled_tokenizer()
    a, b = (tok.encode_ordinary(text)[0] for text in (" A", " B"))
    triples, principle = [("how?", "so", "thus and so"), ("why?", "x", "y")], "Be kind: always."
    model = make_model(vocab_size=tok.n_vocab, context=256).eval()
    found = judge_score(model, tok, triples, principle, micro_batch_tokens=120)
    for (prompt, x, y), row in zip(triples, found, strict=True):
        for one, other, p in ((x, y, row[0]), (y, x, 1 - row[1])):
            ids = [tok.eot, *tok.encode_ordinary(judge_prompt(prompt, one, other, principle))]
            with torch.no_grad():
                logits = model(pack([ids]))[-1] @ model.head.T
            assert p == pytest.approx(logits[[a, b]].softmax(0)[0].item(), abs=1e-5)
    swapped = judge_score(model, tok, [(prompt, y, x) for prompt, x, y in triples], principle, 10**6)
    np.testing.assert_allclose(swapped, 1 - found[:, ::-1], atol=1e-5)
    always_a = judge_score(constant_model(make_model, tok, {a: 4.0}), tok, triples, principle, 10**6)
    np.testing.assert_allclose(always_a.mean(1), 0.5, atol=1e-6)  # one that always says the same prefers nobody
    with pytest.raises(UserError, match="judge prompt of .* exceeds the model's context"):
        judge_score(model, tok, [("q" * 300, "x", "y")], principle, 10**6)


def test_the_opponent_of_a_completion_is_the_next_one_to_its_prompt():
    samples = [Sample(i, [1], [0.0], True) for i in (0, 1, 0, 1, 0)]
    assert next_of_group(samples, "judge:x") == {0: 2, 2: 4, 4: 0, 1: 3, 3: 1}
    with pytest.raises(UserError, match="at least two"):
        next_of_group(samples[:3], "judge:x")


def test_a_constitution_is_its_lines(tmp_path):
    path = tmp_path / "c.txt"
    text = "# a comment\n\n  Be kind: always. \nBe brief: # is no comment here\n   # one more\n"
    path.write_text(text, encoding="utf-8")
    assert read_constitution(path) == ["Be kind: always.", "Be brief: # is no comment here"]
    path.write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8", newline="")  # as Windows writes it
    assert read_constitution(path) == ["Be kind: always.", "Be brief: # is no comment here"]
    path.write_text("# nothing\n\n")
    for wrong, message in ((path, "no principle"), (tmp_path / "none.txt", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=f"--constitution={wrong}.*{message}"):
            read_constitution(wrong)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="--constitution="):
        read_constitution(path)
    assert len(read_constitution(ROOT / "data/constitution.txt")) >= 1


# -------------------------------------------------------------------------------------------------
# A policy


def test_a_greedy_answer_is_right_if_it_ends_by_itself_with_the_right_number(make_model):
    (hi,), model = ask("hi"), make_model(**SMALL)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    answer = chat.encode(TOK, [*hi, {"role": "assistant", "content": "1,2 #### 1,234.50"}])
    for _ in range(40):  # it learns this answer by heart
        optimizer.zero_grad()
        (-completion_logprobs(model, [answer]).mean()).backward()
        optimizer.step()
    answers = ("#### 1234.5", "1234.5", "so $1,234.50 #### 1,234.5", "#### -1234.5", "#### 1234", "#### 1")
    problems = [(hi, {"answer": text}) for text in answers]
    assert exact_match(model, TOK, problems, 40) == ([1, 1, 1, 0, 0, 0], [True] * 6)
    assert exact_match(model, TOK, problems[:1], 17) == ([0], [False])  # all but its end
    assert exact_match(model, TOK, problems[:1], 18) == ([1], [True])


def test_a_policy_is_validated_on_its_own_completions(make_model, functions):
    policy, reference = make_model(1, **SMALL), make_model(2, **SMALL)
    rows = [(messages, {"id": i}) for i, messages in enumerate(ask("one", "two", "three", "and a fourth"))]
    limits = {"max_new_tokens": 9, "micro_batch_tokens": 60, "eval_prompts": 3}
    config = SimpleNamespace(reward=f"{functions}:length", monitor="", temperature=0.8, seed=4, **limits)
    rewards = load(config.reward, monitor=f"{functions}:asked")
    metrics, sample = validate_policy(policy, reference, TOK, rewards, rows, config, kl_coef=0.3, penalty=2.0)
    shown = data_rows.random_rows(rows, 3, 4)
    conversations = [messages for messages, _ in shown]
    options = dict(max_new_tokens=9, temperature=0.8, seed=4)
    prompts, samples, texts = sample_completions(policy, TOK, conversations, **options)
    chats = [make_completion(prompts[s.prompt_index], s.tokens) for s in samples]
    logp, ref_logp = (logprobs_no_grad(model, chats, 0.8, 10**6) for model in (policy, reference))
    unfinished = np.mean([not s.finished for s in samples])
    lengths = np.mean([len(t) for t in texts])
    expected = {
        "reward": lengths - 2.0 * unfinished,
        "kl": (logp - ref_logp).sum().item() / 3,
        "finished": 1 - unfinished,
        "completion_tokens": np.mean([len(s.tokens) for s in samples]),
        f"reward {functions}:length": lengths,
        f"reward {functions}:asked": np.mean([row["id"] for _, row in shown]) + 0.5 * (1 - unfinished),
    }
    expected["val_loss"] = 0.3 * expected["kl"] - expected["reward"]
    assert (
        metrics == pytest.approx(expected, abs=1e-4)
        and sample == f"{conversations[0][-1]['content']}\n--- completion:\n{texts[0]}"
    )
    alone, _ = validate_policy(policy, None, TOK, rewards, rows, config, kl_coef=0.3)
    assert "kl" not in alone and alone["val_loss"] == -alone["reward"] == pytest.approx(-lengths)


def test_a_score_too_large_to_learn_from_is_refused():
    def same(conversations, rows, samples, texts):
        return np.array([rows[0]["worth"]])

    for value in (1e15, -1e15, 3.0):
        completion = Completion(0, (ask("q")[0], {"worth": value}), None, Sample(0, [1], [0.0], True), "some text")
        score_batch([("r", 1.0, same)], [completion])
        assert completion.score == value and completion.parts == {"r": value}
        with pytest.raises(UserError, match="--reward: .*e[+].* for the completion 'some text'.*a smaller scale"):
            score_batch([("r", 1e16, same)], [completion])
