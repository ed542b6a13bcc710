"""rollout.py: what is drawn is what is differentiated, whatever the slots; draws invert the distribution; rewards are read as they are written; best-of-n."""
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, save, write_rows
from test_evaluate import END, TOK, ask, constant_model

import checkpoint
import evaluate
import rollout
from common import UserError
from data import chat, tokenizer
from data.pack import pack
from model import KVCache, logprobs
from rollout import Sample, check_one_distribution, draw, invert, judge_score, load_rewards, read_constitution, reward_answers, reward_hashes, time_limit

ROOT = Path(__file__).parents[1]


def some_prompts(lengths, seed=0, vocab=61):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def forced(model, prompt, sample):
    """fp64 [tokens, V]: the model's logits before each token of a sample, by one full pass."""
    with torch.no_grad():
        hidden = model.eval()(pack([prompt + sample.tokens]))
    return (hidden.double() @ model.head.double().T)[len(prompt) - 1 : -1]


# ---------------------------------------------------------------------------------------------------------------------------------
# Rollouts


@pytest.mark.parametrize("slots", [1, 3, 5, 128])
def test_logprobs_are_the_teacher_forced_ones_in_refilled_slots(make_model, slots):
    model, prompts = make_model(), some_prompts([3, 1, 10, 7, 22])
    samples = rollout.rollout(model, prompts, max_new=14, n=4, temperature=0.7, stop={5, 9, 33}, seed=1, slots=slots)
    assert [s.prompt_index for s in samples] == [i for i in range(5) for _ in range(4)]
    assert {s.finished for s in samples} == {True, False} and len({len(s.tokens) for s in samples}) > 4  # slots are refilled at different times
    logp = logprobs(model, pack([prompts[s.prompt_index] + s.tokens for s in samples]), 0.7).detach().split([len(prompts[s.prompt_index]) + len(s.tokens) for s in samples])
    for s, whole in zip(samples, logp):
        assert s.logprobs == pytest.approx(whole[-len(s.tokens) :].tolist(), abs=1e-5)
    long = [tuple(s.tokens) for s in samples if len(s.tokens) > 2]
    assert len(set(long)) == len(long) > 10


@pytest.mark.parametrize("how", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}])
def test_logprobs_of_cut_distributions_are_those_of_what_is_left(make_model, how):
    model, prompts = make_model(), some_prompts([4, 9, 2])
    kept = 0
    for s in rollout.rollout(model, prompts, max_new=10, n=3, temperature=0.7, seed=2, slots=4, **how):
        for logits, token, logp in zip(forced(model, prompts[s.prompt_index], s), s.tokens, s.logprobs):
            p = (logits / 0.7).softmax(0)
            if "top_k" in how:
                p = torch.where(p >= p.topk(how["top_k"]).values[-1], p, 0.0)
                p /= p.sum()
            if "top_p" in how:
                ordered, order = p.sort(descending=True)
                fewest = int((ordered.cumsum(0) < how["top_p"]).sum()) + 1
                p = torch.zeros_like(p).index_copy(0, order[:fewest], ordered[:fewest])
                p /= p.sum()
            kept = max(kept, int((p > 0).sum()))
            assert p[token] > 0 and logp == pytest.approx(p[token].log().item(), abs=1e-5)
    assert 1 < kept < 61


def test_samples_depend_on_seed_and_number_alone(make_model):
    model, prompts = make_model(), some_prompts([3, 1, 10, 7, 2, 2])
    how = dict(max_new=9, n=3, temperature=0.9, stop={3, 40}, seed=4)
    found = [[s.tokens for s in rollout.rollout(model, prompts, slots=slots, **how)] for slots in (1, 4, 128)]
    assert found[0] == found[1] == found[2]
    ranks = [rollout.rollout(model, prompts[a:b], first=a * 3, slots=4, **how) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert [s.tokens for mine in ranks for s in mine] == found[0]
    assert [s.prompt_index for s in ranks[1]] == [0] * 3 + [1] * 3 + [2] * 3  # among the prompts that were given
    assert [s.tokens for s in rollout.rollout(model, prompts[1:4], slots=4, **how)] != found[0][3:12]
    assert [s.tokens for s in rollout.rollout(model, prompts, slots=4, **how | {"seed": 5})] != found[0]


def test_no_prompts_give_no_samples(make_model):
    assert rollout.rollout(make_model(), [], max_new=3) == []  # a rank whose share of the held-out prompts is empty


def test_a_sample_ends_at_its_stop_at_max_new_or_at_the_context(make_model):
    model, prompts = make_model(context=24, noise=0.05), some_prompts([20, 5, 23, 11, 17])
    room = [4, 8, 1, 8, 7]
    free = rollout.rollout(model, prompts, max_new=8, n=6, seed=3, slots=4)
    assert [len(s.tokens) for s in free] == [r for r in room for _ in range(6)] and not any(s.finished for s in free)
    stop = set(range(0, 61, 7))
    ended = rollout.rollout(model, prompts, max_new=8, n=6, seed=3, slots=4, stop=stop)
    for whole, s in zip(free, ended):
        cut = next((t + 1 for t, token in enumerate(whole.tokens) if token in stop), len(whole.tokens))
        assert s.tokens == whole.tokens[:cut] and s.finished == (s.tokens[-1] in stop) and len(s.logprobs) == cut
    assert any(s.finished and len(s.tokens) == room[s.prompt_index] for s in ended)  # a stop at the very last place is an end


def reads(model):
    """Have the model note the documents that its forward reads."""
    read, forward = [], model.forward

    def noting(p, *rest):
        read.extend(tuple(p.tokens[a:b].tolist()) for a, b in zip(p.cu.tolist(), p.cu.tolist()[1:]))
        return forward(p, *rest)

    model.forward = noting
    return read


def test_a_prompt_is_read_once_for_all_its_samples(make_model):
    model, prompts = make_model(), some_prompts([3, 12, 6])
    read = reads(model)
    rollout.rollout(model, prompts, max_new=5, n=6, slots=128)
    assert sorted(read) == sorted(map(tuple, prompts))
    read.clear()
    model.dropout = 0.5
    samples = rollout.rollout(model, prompts, max_new=12, n=6, stop={4, 11, 20, 30}, slots=4)
    assert len(read) < len(samples) / 2 and set(read) == set(map(tuple, prompts))
    assert not model.training


def test_two_equal_prompts_are_two_prompts(make_model):
    model, (prompt,) = make_model(), some_prompts([5])
    a, b, c, d = rollout.rollout(model, [prompt, prompt], max_new=6, n=2, seed=1)
    assert len({tuple(s.tokens) for s in (a, b, c, d)}) == 4 and [s.prompt_index for s in (a, b, c, d)] == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------------------
# Drawing


def expected(p, u):
    """The inverse of the cumulative distribution, plainly, in fp64; and how near u lies to a step of it."""
    cdf = p.double().cumsum(-1)
    target = u.double()[:, None] * cdf[:, -1:]
    return (cdf <= target).sum(-1), (cdf - target).abs().amin(-1) / cdf[:, -1]


@pytest.mark.parametrize("V", [2, 3, 16, 61, 1000, 50_257])
def test_invert_is_the_inverse_of_the_cumulative_distribution(V):
    generator = torch.Generator().manual_seed(V)
    B = 400 if V < 5000 else 40
    p = torch.rand(B, V, generator=generator).pow(6) * (torch.rand(B, V, generator=generator) < 0.5)
    p[torch.arange(B), torch.randint(V, (B,), generator=generator)] += 0.1  # none is all zeros
    p /= p.sum(-1, keepdim=True)
    u = torch.rand(B, generator=generator)
    u[: B // 8], u[B // 8 : B // 4] = 0.0, 1 - 2**-24
    tokens, (plain, gap) = invert(p, u), expected(p, u)
    assert tokens.min() >= 0 and tokens.max() < V and (p.gather(1, tokens[:, None]) > 0).all()
    assert torch.equal(tokens[gap > 1e-12], plain[gap > 1e-12]) and (gap > 1e-12).float().mean() > 0.5
    rows = torch.arange(B // 8)
    assert torch.equal(tokens[rows], (p[rows] > 0).int().argmax(-1))  # u = 0: the first that can be
    last = V - 1 - (p.flip(-1) > 1e-6).int().argmax(-1)  # u = 1 - 2^-24: the last that is not smaller than what is left
    assert (tokens[B // 8 : B // 4] >= last[B // 8 : B // 4]).all()


@pytest.mark.parametrize("V", [5, 70, 700])
def test_no_token_without_probability_is_drawn_at_the_steps_themselves(V):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        p = torch.rand(V, generator=generator) * (torch.rand(V, generator=generator) < 0.3)
        p[int(torch.randint(V, (1,), generator=generator))] = 1.0
        steps = (p.double().cumsum(0) / p.double().sum()).float()
        u = torch.cat([steps, torch.nextafter(steps, torch.zeros(())), torch.nextafter(steps, torch.ones(()))]).clamp(0, 1 - 2**-24)
        tokens = invert(p.expand(len(u), -1), u)
        assert tokens.max() < V and (p[tokens] > 0).all()


def test_frequencies_are_those_of_a_multinomial():
    generator = torch.Generator().manual_seed(0)
    V, n = 300, 30_000
    logits = torch.randn(V, generator=generator) * 1.5
    logits[::7] = -torch.inf
    p = (logits.double() / 1.3).softmax(0)
    tokens, logp = draw(logits.expand(n, -1), torch.rand(n, generator=generator), 1.3)
    counts, seen = torch.bincount(tokens, minlength=V).double(), p > 0
    assert counts[~seen].sum() == 0
    chi2, freedom = ((counts - n * p)[seen] ** 2 / (n * p)[seen]).sum().item(), int(seen.sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=0, atol=1e-5)


def test_one_token_of_all_probability_is_always_drawn():
    for V in (2, 65, 4096):
        for token in (0, V // 2, V - 1):
            logits = torch.full((3, V), -200.0)
            logits[:, token] = 5.0
            tokens, logp = draw(logits, torch.tensor([0.0, 0.3, 1 - 2**-24]))
            assert tokens.tolist() == [token] * 3 and logp.tolist() == [0.0] * 3


# ---------------------------------------------------------------------------------------------------------------------------------
# The cache


def test_the_first_slots_are_a_view_and_copies_are_whole(make_model):
    cache = KVCache(make_model(), 5, 8)
    cache.k.normal_(), cache.v.normal_()
    cache.lengths[:] = torch.tensor([1, 2, 3, 4, 5])
    view = cache.first(2)
    view.k.zero_(), view.lengths.add_(5)
    assert view.k.shape[1] == 2 and not cache.k[:, :2].any() and cache.k[:, 2:].all() and cache.lengths.tolist() == [6, 7, 3, 4, 5]
    k, v = cache.k.clone(), cache.v.clone()
    cache.copy(torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor([4, 2]), 4)
    for now, before in ((cache.k, k), (cache.v, v)):
        assert torch.equal(now[:, :2, :4], before[:, 3:, :4]) and torch.equal(now[:, :2, 4:], before[:, :2, 4:]) and torch.equal(now[:, 2:], before[:, 2:])
    assert cache.lengths.tolist() == [4, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------------------
# Rewards


def labelled_tokenizer():
    return tokenizer.train(["Better: A Better: B " * 5], 256 + 4 + 7)


def test_a_judge_is_asked_in_both_orders(make_model):
    tok = labelled_tokenizer()
    a, b = (tok.encode_ordinary(text)[0] for text in (" A", " B"))
    triples, principle = [("how?", "so", "thus and so"), ("why?", "x", "y")], "Be kind: always."
    model = make_model(vocab_size=tok.n_vocab, context=256).eval()
    found = judge_score(model, tok, triples, principle, micro_tokens=120)
    for (p, x, y), row in zip(triples, found):
        for (one, other), value in zip(((x, y), (y, x)), (row[0], 1 - row[1])):
            with torch.no_grad():
                logits = model(pack([[tok.eot, *tok.encode_ordinary(rollout.judge_prompt(p, one, other, principle))]]))[-1] @ model.head.T
            assert value == pytest.approx(logits[[a, b]].softmax(0)[0].item(), abs=1e-5)
    swapped = judge_score(model, tok, [(p, y, x) for p, x, y in triples], principle, 10**6)
    np.testing.assert_allclose(swapped, 1 - found[:, ::-1], atol=1e-5)
    always_a = judge_score(constant_model(make_model, tok, {a: 4.0}), tok, triples, principle, 10**6)
    np.testing.assert_allclose(always_a.mean(1), 0.5, atol=1e-6)  # who always says the same prefers nobody


def test_a_constitution_is_its_lines(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("# a comment\n\n  Be kind: always. \nBe brief: # is no comment here\n   # one more\n", encoding="utf-8")
    assert read_constitution(path) == ["Be kind: always.", "Be brief: # is no comment here"]
    path.write_text("# nothing\n\n")
    for wrong, message in ((path, "no principle"), (tmp_path / "none.txt", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=f"--constitution={wrong}.*{message}"):
            read_constitution(wrong)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="--constitution="):
        read_constitution(path)
    assert len(read_constitution(ROOT / "data/constitution.txt")) >= 1


@pytest.fixture
def rewards_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def length(prompt, completion, row):\n    return len(completion)\n\ndef asked(prompt, completion, row):\n    return row['id'] + 0.5 * row['finished']\n\n"
                    "def bad(prompt, completion, row):\n    return float('nan')\n\ndef slow(prompt, completion, row):\n    while True:\n        pass\n\nx = 3\n")  # fmt: skip
    return path


def load(names, **how):
    return load_rewards(names, torch.device("cpu"), 1000, **how)


def test_rewards_of_a_command_line_are_weighted_and_added(rewards_file, tmp_path, make_model):
    directory = save(make_model, tmp_path / "rm", "reward", scalar_head=True)
    found = load(f"{rewards_file}:length*0.5,{rewards_file}:asked,{directory}*-2e-1")
    assert [(name, weight) for name, weight, _ in found] == [(f"{rewards_file}:length", 0.5), (f"{rewards_file}:asked", 1.0), (str(directory), -0.2)]
    rows = [(m, {"id": i}) for i, m in enumerate(ask("one", "two"))]
    samples, texts = [Sample(1, [65, END], [], True), Sample(0, [65, 66], [], False)], ["A", "AB"]
    total, parts = reward_answers(found, rows, samples, texts)
    assert parts[f"{rewards_file}:length"].tolist() == [1, 2] and parts[f"{rewards_file}:asked"].tolist() == [1.5, 0.0]
    np.testing.assert_allclose(total, [0.5 + 1.5 - 0.2 * parts[str(directory)][0], 1 - 0.2 * parts[str(directory)][1]])
    assert load("") == []


def test_what_is_only_watched_weighs_nothing(rewards_file):
    found = load(f"{rewards_file}:length*2", monitor=f"{rewards_file}:asked,{rewards_file}:length")
    assert [(name.rpartition(":")[2], weight) for name, weight, _ in found] == [("length", 2.0), ("asked", 0.0)]


@pytest.mark.parametrize("names, message", [("{f}:length*x", "'x' is no weight"), ("{f}:none", "has no function none"), ("{f}:x", "has no function x"), ("gone.py:f", "gone.py does not exist"),
                                            ("{f}:length,{f}:length*2", "twice"), ("gone", "gone"), ("judge:gone", "needs principles")])  # fmt: skip
def test_rewards_that_cannot_be_are_refused(rewards_file, names, message):
    with pytest.raises(UserError, match=message):
        load(names.format(f=rewards_file))


def test_a_file_that_breaks_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match=r"broken.py cannot be imported \(ModuleNotFoundError"):
        load(f"{tmp_path}/broken.py:f")


@pytest.mark.parametrize("name, message", [("bad", "nan for the completion 'A'"), ("slow", "TimeoutError: took longer than 0.2 seconds")])
def test_a_function_that_fails_names_its_completion(rewards_file, name, message):
    begin = time.perf_counter()
    with pytest.raises(UserError, match=message) as e:
        reward_answers(load(f"{rewards_file}:{name}", timeout=0.2), [(ask("q")[0], {"id": 0})], [Sample(0, [65], [], True)], ["A"])
    assert "'A'" in str(e.value) and time.perf_counter() - begin < 5


def test_a_time_limit_ends_with_what_it_limits():
    with pytest.raises(TimeoutError, match="0.05 seconds"):
        with time_limit(0.05):
            while True:
                pass
    with time_limit(0.05):
        pass
    with pytest.raises(KeyError):
        with time_limit(0.05):
            raise KeyError
    time.sleep(0.1)  # an alarm left behind would end this process


def test_hashes_follow_what_rewards_are_made_of(rewards_file, tmp_path, make_model):
    directory, other = (save(make_model, tmp_path / name, "reward", seed, scalar_head=True) for seed, name in enumerate(("rm", "rm2")))
    constitution = tmp_path / "c.txt"
    constitution.write_text("Be kind.\n")
    names = f"{rewards_file}:length*0.5,{directory},judge:{other}*2"
    found = reward_hashes(names, str(constitution))
    assert set(found) == {str(constitution), f"{rewards_file}:length", str(directory), f"judge:{other}"} and len(set(found.values())) == 4
    rewards_file.write_text(rewards_file.read_text() + "# more\n")
    again = reward_hashes(names, str(constitution))
    assert [key for key in found if again[key] != found[key]] == [f"{rewards_file}:length"]
    assert reward_hashes("") == {}


# ---------------------------------------------------------------------------------------------------------------------------------
# One distribution


def sampled(model, temperature=0.8):
    prompts = some_prompts([4, 9, 2])
    samples = rollout.rollout(model, prompts, max_new=7, n=2, temperature=temperature, stop={5}, seed=1)
    chats = [chat.answered(prompts[s.prompt_index], s.tokens) for s in samples]
    return chats, samples, chat.constant_logprobs(model, chats, temperature, 30)


def test_sampler_trainer_and_reference_agree_before_the_first_update(make_model):
    model = make_model()
    chats, samples, logp = sampled(model)
    gap = check_one_distribution(model, chats, samples, logp, logp.clone(), 0.8, 30, True)
    assert 0 <= gap < 1e-6
    assert check_one_distribution(model, [], [], logp[:0], None, 0.8, 30, True) == 0


def test_distributions_that_differ_are_refused(make_model):
    model = make_model()
    chats, samples, logp = sampled(model)
    how = (model, chats, samples)
    with pytest.raises(UserError, match="KL != 0"):
        check_one_distribution(*how, logp, logp + 1e-6, 0.8, 30, True)
    with pytest.raises(UserError, match="ratio != 1"):  # another temperature in training
        check_one_distribution(*how, logp, None, 0.9, 30, True)
    shifted = [Sample(s.prompt_index, s.tokens, [x + 1e-4 for x in s.logprobs], s.finished) for s in samples]
    with pytest.raises(UserError, match="sampler and trainer disagree: mean .* 1.00e-04"):
        check_one_distribution(model, chats, shifted, logp, None, 0.8, 30, True)
    model.dropout = 0.3
    with pytest.raises(UserError, match="ratio != 1"):
        check_one_distribution(*how, logp, None, 0.8, 30, True)
    assert check_one_distribution(*how, logp, None, 0.8, 30, False) < 1e-6  # looked for at the first step only


# ---------------------------------------------------------------------------------------------------------------------------------
# Best of n


def test_the_best_of_n_answers_is_chosen_counted_and_read_by_sft(make_model, tmp_path, rewards_file):
    model = constant_model(make_model, TOK, {END: 4.0, **{i: 2.0 for i in range(97, 123)}})
    model.config.context = SMALL["context"]
    where = checkpoint.save(tmp_path / "run", model, TOK, {"stage": "sft", "step": 1, "config": {}, "data": {}, "lineage": []})
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}", "id": i} for i in range(12)])
    reward, n = f"{rewards_file}:length", 5
    flags = dict(model=str(where), data=str(data), max_new=12, seed=3, reward=reward, device="cpu", best_of=n)
    evaluate.main(evaluate.Config(**flags, out=str(tmp_path / "out.json"), samples=str(tmp_path / "best.jsonl")))
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    # The chosen: the longest of the finished ones
    _, samples, texts = rollout.answers(checkpoint.load(where)[0], TOK, [m for m, _ in evaluate.rows_of(str(data), chat.prompt_only, 0)], max_new=12, n=n, seed=3)
    wanted = {}
    for i in range(12):
        own = [(len(text), text) for s, text in zip(samples, texts) if s.prompt_index == i and s.finished]
        wanted[f"question {i}"] = max(own)[0] if own else None
    assert sum(s.finished for s in samples) < len(samples) and len({len(t) for t in texts}) > 4
    said = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert all(row["finished"] and row[reward] == len(row["completion"]) for row in said)
    assert {row["prompt"]: len(row["completion"]) for row in said} == {q: length for q, length in wanted.items() if length is not None}
    # What sft.py makes of the file
    conversations, _ = chat.read(str(tmp_path / "best.jsonl"), chat.conversation, skip_bad=True)
    assert [m[-1]["content"] for m in conversations] == [row["completion"].strip() for row in said if row["completion"].strip()]
    # The bound, against the log-ratio of the best of n uniform draws: log n + (n - 1) log u
    best = np.random.default_rng(0).random((400_000, n)).max(1)
    bounds = {name: f["value"] for name, f in figures.items() if "KL" in name and f"best of {n}" in name}
    (bound,) = bounds.values()
    assert bound == pytest.approx(np.mean(math.log(n) + (n - 1) * np.log(best)), abs=5e-3)


def test_the_bound_on_what_best_of_n_costs_holds_where_answers_tie():
    rng = np.random.default_rng(1)
    for n in (2, 4, 16):
        p = rng.dirichlet(np.ones(40))
        below = np.concatenate([[0], p.cumsum()])
        best = below[1:] ** n - below[:-1] ** n  # of answers in the order of their rewards
        assert 0.6 * (math.log(n) - (n - 1) / n) < np.sum(best * np.log(best / p)) < math.log(n) - (n - 1) / n


def test_a_reward_model_that_reaches_less_far_reads_the_ends_and_says_so(make_model, tmp_path, capsys):
    rm = save(make_model, tmp_path / "rm", "reward", context=24, scalar_head=True)
    (_, _, reward), = load_rewards(str(rm), torch.device("cpu"), 10**6)
    samples = [Sample(0, [1], [0.0], True), Sample(1, [1], [0.0], True)]
    found = reward([m for m in ask("a" * 30, "b" * 30)], [{}, {}], samples, ["yes", "yes"])
    reward([m for m in ask("a" * 30, "b" * 30)], [{}, {}], samples, ["yes", "yes"])
    model = checkpoint.load(rm)[0]
    documents = [(chat.encode_prompt(TOK, m) + chat.encode_answer(TOK, "yes"))[-24:] for m in ask("a" * 30, "b" * 30)]
    np.testing.assert_allclose(found, rollout.scores(model, documents, 10**6), atol=1e-6)
    printed = capsys.readouterr().out
    assert printed.count("2 of 2 conversations exceed its context of 24 tokens") == 1


def test_two_functions_of_a_file_share_it_and_find_what_lies_beside(tmp_path):
    (tmp_path / "beside.py").write_text("WORTH = 3.0\n")
    (tmp_path / "both.py").write_text("import dataclasses\nimport beside\nloads = []\nloads.append(1)\n\n@dataclasses.dataclass\nclass State:\n    n: int = 0\n\nstate = State()\n\n"
                                      "def one(p, c, r):\n    state.n += 1\n    return beside.WORTH\n\ndef two(p, c, r):\n    return float(state.n)\n")  # fmt: skip
    first, second = load_rewards(f"{tmp_path}/both.py:one,{tmp_path}/both.py:two", torch.device("cpu"), 1)
    sample = [Sample(0, [1], [0.0], True)]
    assert first[2](ask("q"), [{}], sample, ["a"]) == [3.0] and second[2](ask("q"), [{}], sample, ["a"]) == [1.0]


@pytest.mark.parametrize("size", [1, 2, 7, 300, 50_000])
def test_running_sums_are_cumsums_without_a_square_of_the_vocabulary(size):
    x = torch.rand(3, size)
    torch.testing.assert_close(rollout.running_sum(x), x.double().cumsum(-1), rtol=1e-12, atol=1e-12)
