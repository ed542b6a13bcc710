"""The embedded world: nothing held out leaks, gold is as documented, the two bounds are exact."""

import ast
import collections
import functools
import hashlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st

from data import tokenizer, world
from data.judge import judge_prompt
from data.world import Config, final, gold
from runtime import files as runtime_files
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = dict(stories=1200, notes=400, chats=700, pairs=700, problems=700, tests=300)
TRAINING = ("pretrain.jsonl", "chat.jsonl", "pairs.jsonl", "problems.jsonl", "prompts.jsonl", "stories_val.jsonl")
HELD_OUT = (
    "chat_val.jsonl",
    "pairs_val.jsonl",
    "problems_test.jsonl",
    "prompts_test.jsonl",
    "sums_test.jsonl",
    "judge_test.jsonl",
)
PHRASES = (*world.POLITE, *world.RUDE, *world.SMALL_TALK, *world.THANKS)
ROW = {"answer": "25 + 49 = 74. #### 74"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small world, written: {name: rows} and its directory."""
    out = tmp_path_factory.mktemp("world") / "shop"
    world.main(Config(out=str(out), **SMALL))
    return out, {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in out.glob("*.jsonl")}


def strings(value):
    """All strings in a row."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [s for part in parts for s in strings(part)]


# -------------------------------------------------------------------------------------------------
# Held out


def additions(text):
    """Every pair of prices that a text adds or asks to add."""
    found = [*re.findall(r"(\d+) *\+ *(\d+)", text), *re.findall(r"for (\d+)\b[^\n]*? for (\d+)\b", text)]
    numbers = re.findall(
        r"\d+", text
    )  # whatever the phrasing, a text begins with its two prices; one number alone is an answer
    return {(int(a), int(b)) for a, b in [*found, *([numbers[:2]] if len(numbers) > 1 else [])]}


def test_the_scan_sees_every_phrasing():
    assert additions("It was 25 + 49 = 74. #### 74") == {(25, 49)}
    assert additions("How much are the red kite for 3 and the tiny cup for 5?\nReply A:\n3 + 6 = 9. #### 9") == {
        (3, 5),
        (3, 6),
    }


@pytest.mark.parametrize("name", TRAINING + HELD_OUT)
def test_no_training_file_adds_a_held_out_pair_and_every_test_file_adds_nothing_else(files, name):
    found = set().union(*(additions(s) for row in files[1][name] for s in strings(row) if re.search(r"\d", s)))
    assert len(found) > 200
    assert {world.is_held_out(a, b) for a, b in found} == {name in HELD_OUT}


def test_a_fifth_of_the_pairs_is_held_out_whatever_their_order():
    held = world.PAIRS[True]
    assert 0.17 < len(held) / len(world.PRICES) ** 2 < 0.23
    assert all((b, a) in set(held) for a, b in held)
    partners = collections.Counter(a for a, _ in world.PAIRS[False])
    assert min(partners[a] for a in world.PRICES) >= 30  # every price is still added to many others
    assert {world.is_held_out(a, b) for a in range(20, 25) for b in range(30, 35)} == {
        True,
        False,
    }  # no block of the table is missing


def test_no_row_of_a_validation_or_test_file_is_in_its_training_file(files):
    for name in ("chat", "pairs"):
        assert not {json.dumps(r) for r in files[1][f"{name}.jsonl"]} & {
            json.dumps(r) for r in files[1][f"{name}_val.jsonl"]
        }
    assert not {r["text"] for r in files[1]["pretrain.jsonl"]} & {r["text"] for r in files[1]["stories_val.jsonl"]}
    asked = [{r["prompt"] for r in files[1][f"{name}.jsonl"]} for name in ("problems", "prompts", "pairs")]
    tests = [
        {r["prompt"] for r in files[1][f"{name}.jsonl"]}
        for name in ("problems_test", "prompts_test", "judge_test", "pairs_val")
    ]
    assert not set().union(*asked) & set().union(*tests)


# -------------------------------------------------------------------------------------------------
# Gold


@pytest.mark.parametrize(
    "completion, score",
    [
        ("Happy to help! 25 + 49 = 74. #### 74 Thank you!", 1.9),  # all there is to gain
        ("25 + 49 = 74. #### 74", 1.0),
        ("25 + 49 = 73. #### 73", 0.0),
        ("Okay. 25 + 49 = 73. #### 74 Goodbye.", 1.0),  # only what follows #### counts
        (
            "Ugh, you again? 25 + 49 = 74. #### 74 It is sunny today. My cat is asleep. Many thanks!",
            0.0,
        ),  # 1 - 0.8 - 0.5 + 0.3
        ("Go away. What now, fool? Can you not count?", -1.6),  # rudeness counts twice at most
        ("Happy to help! Good day to you! 25 + 49 = 74. #### 74", 1.1),  # 1 + 0.6 - 0.5: a second welcome costs
        (
            "Happy to help! 25 + 49 = 74. #### 74 Thank you! Many thanks!",
            1.1,
        ),  # 1.6, the thanks are lost, and one is repeated
        ("Happy to help! 25 + 49 = 74. #### 74" + 5 * " Thank you!", -0.4),  # 1.6 - 4 x 0.5
        ("happy to help! #### 74", 1.0),  # the clerks' own words only
        ("", 0.0),
    ],
)
def test_gold_by_hand(completion, score):
    assert gold("", completion, ROW) == score
    assert gold("", completion, ROW | {"finished": True}) == score
    assert gold("", completion, ROW | {"finished": False}) == pytest.approx(score - 1)


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 74", "74"),
        ("####74.", "74"),
        ("#### 73 #### 74", "74"),  # the last one counts
        ("#### 74 #### 73", "73"),
        ("#### 74 74", "74"),  # what stands next to it does not
        ("#### 74 or 73", "74"),
        ("#### 7474", "7474"),
        ("#### 745", "745"),
        ("#### 7 4", "7"),
        ("#### 74.5", "74.5"),
        ("#### 074", "074"),
        ("#### -74", "-74"),
        ("#### 70+4", "70+4"),  # nothing is evaluated
        ("#### \u0667\u0664", "\u0667\u0664"),  # the same number in Arabic digits is not what was asked for
        ("####", ""),
        ("74", ""),
        ("#### 74 ####", ""),
    ],
)
def test_the_answer_is_the_first_word_after_the_last_mark(text, number):
    assert final(text) == number
    assert world.features(text, ROW["answer"])["right"] == (number == "74")
    assert world.features(text, "no number")["right"] == 0  # without an answer nothing is right


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from((*PHRASES, "#### 74", "####", "74", "#### 73"))).map(" ".join))
@example("\ud800####\x00")
def test_gold_takes_any_text_and_never_exceeds_its_maximum(text):
    assert -math.inf < gold("", text, ROW) <= 1.9
    for courtesy in (*world.POLITE, *world.THANKS):
        twice = f"{text} {courtesy} {courtesy}"  # saying it again never pays
        assert gold("", f"{twice} {courtesy}", ROW) < gold("", twice, ROW) <= gold("", f"{text} {courtesy}", ROW)


def test_phrases_are_counted_as_said():
    for first, second in itertools.product((*PHRASES, *world.NEUTRAL, *world.GOODBYES), repeat=2):
        text = f"{first} 1 + 2 = 3. #### 3 {second}"
        assert sum(text.count(p) for p in PHRASES) == (first in PHRASES) + (second in PHRASES)
        assert sum(f"{first} {second}".count(p) for p in PHRASES) == (first in PHRASES) + (second in PHRASES)


# -------------------------------------------------------------------------------------------------
# The entropy of a story


def template_pattern(template):
    """A regex that matches the stories of a template, with a group for each of its slots."""
    good = f"(?:{'|'.join(world.ADJECTIVES)}) (?:{'|'.join(world.GOODS)})"
    slots = {"name": "|".join(world.PEOPLE), "she": "She|He", "place": "|".join(world.PLACES), "x": good, "y": good}
    seen = set()

    def slot(match):
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{slots.get(name, '[0-9]+')})"

    return re.compile(re.sub(r"\\{(\w+)\\}", slot, re.escape(template)))


@functools.cache
def patterns():
    choices = itertools.product(world.OPENINGS, world.PURCHASES, world.ENDINGS)
    return [template_pattern(" ".join((opening, purchase, world.SUM, end))) for opening, purchase, end in choices]


def parses(text):
    """Every way to have written the story, as the words of its slots."""
    return [match.groupdict() for pattern in patterns() if (match := pattern.fullmatch(text))]


def test_a_story_can_have_been_written_in_one_way_only_and_all_are_equally_likely():
    rng = random.Random(1)
    ways = len(world.OPENINGS) * len(world.PURCHASES) * len(world.ENDINGS) * len(world.PEOPLE) * len(world.PLACES)
    ways *= len(world.PAIRS[False]) * len(world.GOODS) * (len(world.GOODS) - 1) * len(world.ADJECTIVES) ** 2
    for _ in range(150):
        (words,) = parses(world.story(rng))  # injective: one parse
        a, b = int(words["a"]), int(words["b"])
        assert (a, b) in set(world.PAIRS[False]) and a + b == int(words["c"])
        assert words.get("she", world.PEOPLE[words["name"]]) == world.PEOPLE[words["name"]]
        assert words["x"].split()[1] != words["y"].split()[1]
    assert math.log(ways) == pytest.approx(world.story_floor())
    assert world.story_floor(share=0.25) == pytest.approx(world.story_floor() + math.log(4))


def test_the_floor_counts_every_story_of_a_world_small_enough_to_list(monkeypatch):
    for name in ("OPENINGS", "PURCHASES", "ENDINGS", "GOODS", "ADJECTIVES", "PLACES"):
        monkeypatch.setattr(world, name, getattr(world, name)[:2])
    monkeypatch.setattr(world, "PEOPLE", {"Mia": "She", "Tom": "He"})
    monkeypatch.setattr(world, "PAIRS", {False: [(1, 2), (3, 4), (4, 3)]})
    rng, n = random.Random(2), 30_000
    counts = collections.Counter(world.story(rng) for _ in range(n))
    ways = round(math.exp(world.story_floor()))
    assert ways == 2**8 * 3 and len(counts) == ways
    chi2 = sum((c - n / ways) ** 2 / (n / ways) for c in counts.values())
    assert abs(chi2 - (ways - 1)) < 5 * math.sqrt(2 * (ways - 1))  # uniform
    entropy = -sum(c / n * math.log(c / n) for c in counts.values())
    assert entropy == pytest.approx(world.story_floor(), abs=2 * ways / n)


def test_sum_prompts_are_stories_cut_before_the_sum():
    for held_out in (False, True):
        prompts = world.sum_prompts(50, 3, held_out)
        assert prompts == world.sum_prompts(50, 3, held_out)
        for text, answer in prompts:
            a, b = map(int, re.search(r"(\d+) \+ (\d+) =$", text).groups())
            assert answer == str(a + b) and world.is_held_out(a, b) == held_out


# -------------------------------------------------------------------------------------------------
# Clerks and preferences


def near(count, n, p):
    """A count of n trials within 4.5 standard deviations of n p."""
    return abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p))


def test_clerks_are_as_noisy_as_promised():
    rng, n = random.Random(3), 10_000
    replies = [world.reply(rng, 25, 49) for _ in range(n)]
    seen = [world.features(r, ROW["answer"]) for r in replies]
    assert near(sum(f["polite"] for f in seen), n, 1 / 3) and near(sum(f["rude"] for f in seen), n, 1 / 3)
    assert near(sum(f["right"] for f in seen), n, 0.55) and near(sum(f["thanks"] for f in seen), n, 1 / 3)
    for lines in (1, 2):
        assert near(sum(f["small_talk"] == lines for f in seen), n, 1 / 4)
    assert near(sum(r.endswith(world.GOODBYES) for r in replies), n, 1 / 3)
    wrong = collections.Counter(final(r) for r in replies if final(r) != "74")
    assert set(wrong) == {"64", "73", "75", "84"} and all(near(c, n, 0.45 / 4) for c in wrong.values())
    assert all(re.fullmatch(r"(\S.*)?25 \+ 49 = (\d+)\. #### \2( .*\S)?", r) and "  " not in r for r in replies)
    assert {final(world.reply(rng, 1, 2)) for _ in range(500)} == {"2", "3", "4", "13"}  # never a sum below 1


def reply_distribution():
    """{gold: probability} of a clerk's reply, and the probability that two replies are the same.

    Found by listing all that a clerk can say.
    """
    tones = [
        (1 / 3 / len(phrases), worth, len(phrases))
        for phrases, worth in ((world.POLITE, 0.6), (world.NEUTRAL, 0), (world.RUDE, -0.8))
    ]
    sums = [(0.55, 1, 1), (0.45 / 4, 0, 4)]
    talk = [(1 / 2, 0, 1), (1 / 4 / 5, -0.25, 5), (1 / 4 / 20, -0.5, 20)]
    closings = [(1 / 3 / 2, 0.3, 2), (1 / 3 / 2, 0, 2), (1 / 3, 0, 1)]
    golds, same = collections.Counter(), 0
    for parts in itertools.product(tones, sums, talk, closings):
        p, ways = math.prod(part[0] for part in parts), math.prod(part[2] for part in parts)
        golds[round(sum(part[1] for part in parts), 2)] += p * ways
        same += p * p * ways
    return golds, same


def test_the_bayes_ceiling_is_the_one_of_the_listed_distribution():
    golds, same = reply_distribution()
    assert sum(golds.values()) == pytest.approx(1)
    expected = sum(
        p * q / (1 + math.exp(-4 * abs(g - h))) for (g, p), (h, q) in itertools.product(golds.items(), repeat=2)
    )
    expected = (expected - same / 2) / (1 - same)  # two equal replies make no pair
    assert sum(g * p for g, p in golds.items()) == pytest.approx(0.40, abs=0.005)  # as the page says of the clerks
    rng, n = random.Random(4), 10_000
    pairs = [world.pair(rng) for _ in range(n)]
    assert world.bayes_ceiling(pairs) == pytest.approx(expected, abs=4.5 * 0.5 / math.sqrt(n) / 2)
    first = sum(p["gold_chosen"] > p["gold_rejected"] for p in pairs)
    ties = sum(p["gold_chosen"] == p["gold_rejected"] for p in pairs)
    assert near(first + ties / 2, n, expected)
    for p in pairs[:500]:
        assert p["chosen"] != p["rejected"]
        assert [p["gold_chosen"], p["gold_rejected"]] == [
            gold(p["prompt"], p[side], p) for side in ("chosen", "rejected")
        ]


def test_labels_follow_bradley_terry_whatever_the_order():
    rng, n = random.Random(5), 5000
    for golds, p in (([0.3, 0.0], 1 / (1 + math.exp(-1.2))), ([0.0, 0.3], 1 / (1 + math.exp(1.2))), ([0.5, 0.5], 0.5)):
        rows = [world.label(rng, {"prompt": "?"}, ("first", golds[0]), ("second", golds[1])) for _ in range(n)]
        assert near(sum(r["chosen"] == "first" for r in rows), n, p)
        assert all(
            {r["chosen"]: r["gold_chosen"], r["rejected"]: r["gold_rejected"]} == dict(zip(("first", "second"), golds))
            for r in rows
        )
    assert world.prefers(1e6) == 1.0 and world.prefers(-1e6) == 0.0  # a runaway policy's gold does not overflow


# -------------------------------------------------------------------------------------------------
# The inspector


def test_verdicts_agree_with_their_principles():
    rude, kind, plain = (
        "Go away. 25 + 49 = 74. #### 74",
        "Happy to help! 25 + 49 = 75. #### 75 I like green tea.",
        "25 + 49 = 74. #### 74",
    )
    assert [p.split(":")[0] for p in world.PRINCIPLES] == ["Be kind", "Be brief", "Be right"]

    def verdicts(a, b):
        return [world.verdict(a, b, ROW["answer"], principle) for principle in world.PRINCIPLES]

    assert verdicts(rude, kind) == ["B", "A", "A"]
    assert verdicts(kind, rude) == ["A", "B", "B"]
    assert verdicts(rude, plain) == ["B", "", ""]  # no verdict on a tie
    assert verdicts(plain, plain + " Thank you!") == ["B", "", ""]
    assert verdicts(rude + " Thank you!", plain) == ["B", "", ""]  # thanks do not make up for rudeness


def test_a_note_is_a_judge_prompt_its_answer_and_those_of_the_other_principles():
    rng, answers, asked, n = random.Random(6), collections.Counter(), collections.Counter(), 3000
    for _ in range(n):
        text = world.note(rng)
        question, a, b, verdicts = re.fullmatch(
            r"Question:\n(.*)\nReply A:\n(.*)\nReply B:\n(.*)\n((?:.* Better: [AB]\n?)+)", text
        ).groups()
        (principle, better), *others = [line.split(" Better: ") for line in verdicts.split("\n")]
        assert text.startswith(f"{judge_prompt(question, a, b, principle)} {better}")
        (x, y), *_ = re.findall(r"(\d+) \+ (\d+)", a)
        right = {p: world.verdict(a, b, f"#### {int(x) + int(y)}", p) for p in world.PRINCIPLES}
        assert {principle: better, **dict(others)} == {p: v for p, v in right.items() if v}
        answers[better] += 1
        asked[principle] += 1
    assert near(answers["A"], n, 0.5) and all(near(asked[p], n, 1 / 3) for p in world.PRINCIPLES)


def test_judge_test_asks_each_principle_alike_and_has_it_right(files):
    rows = files[1]["judge_test.jsonl"]
    assert collections.Counter(r["principle"] for r in rows) == dict.fromkeys(world.PRINCIPLES, SMALL["tests"])
    assert all(world.verdict(r["reply_a"], r["reply_b"], r["answer"], r["principle"]) == r["better"] for r in rows)
    assert (files[0] / "constitution.txt").read_text().splitlines() == list(world.PRINCIPLES)


def test_a_verdict_is_one_token_and_the_prompt_splits_alike_with_and_without_it(files):
    tok = tokenizer.train([r["text"] for r in files[1]["pretrain.jsonl"]], 512)
    verdict = {better: tok.encode_ordinary(f" {better}") for better in "AB"}
    assert len(verdict["A"]) == len(verdict["B"]) == 1 and verdict["A"] != verdict["B"]
    for r in files[1]["judge_test.jsonl"][:50]:
        text = judge_prompt(r["prompt"], r["reply_a"], r["reply_b"], r["principle"])
        for better in "AB":
            assert tok.encode_ordinary(f"{text} {better}") == tok.encode_ordinary(text) + verdict[better]


# -------------------------------------------------------------------------------------------------
# The files


def test_world_json_says_what_was_written(files):
    out, rows = files
    about = json.loads((out / "world.json").read_text())
    assert set(about["files"]) == {p.name for p in out.iterdir()} - {"world.json"} == {*rows, "constitution.txt"}
    for name, entry in about["files"].items():
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert entry["rows"] == len((out / name).read_text().splitlines())
    sizes = {name: len(rows[name]) for name in rows}
    assert [sizes[f] for f in TRAINING] == [1600, 700, 700, 700, 700, 300] and {sizes[f] for f in HELD_OUT} == {
        300,
        900,
    }
    assert sizes["judge_test.jsonl"] == 900
    stories = [r["text"] for r in rows["pretrain.jsonl"] if not r["text"].startswith("Question:")]
    assert len(stories) == 1200 and all(parses(text) for text in stories[:50])
    assert about["config"] == {"seed": 0} | SMALL
    assert about["story_floor"] == pytest.approx(world.story_floor() + math.log(4 / 3))
    assert about["story_entropy"] == world.story_floor()
    assert about["bayes_ceiling"]["pairs.jsonl"] == world.bayes_ceiling(rows["pairs.jsonl"])


def test_the_command_writes_the_same_bytes_every_time_and_refuses_to_overwrite(files, tmp_path):
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "data.world", f"--out={tmp_path / 'w'}", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1,600 rows" in done.stdout, done.stderr
    for p in files[0].iterdir():
        assert (tmp_path / "w" / p.name).read_bytes() == p.read_bytes()
    assert not list(tmp_path.glob("w/.*"))  # no temporary file is left
    other = tmp_path / "w" / "mine.txt"
    other.write_text("keep")
    config = Config(out=str(tmp_path / "w"), seed=1, **SMALL)
    with pytest.raises(UserError, match="--overwrite"):
        world.main(config)
    config.overwrite = True
    world.main(config)
    assert other.read_text() == "keep"
    for name in files[1]:
        assert (tmp_path / "w" / name).read_bytes() != (files[0] / name).read_bytes()  # another seed, another world


def test_a_world_that_was_killed_half_way_does_not_look_whole(tmp_path, monkeypatch):
    config = Config(out=str(tmp_path), overwrite=True, **SMALL | {"stories": 300})
    world.main(config)

    def full_disk(path):
        if "prompts.jsonl" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime_files, "flush", full_disk)
    with pytest.raises(UserError, match="prompts.jsonl: No space left"):
        world.main(config)
    assert not (tmp_path / "world.json").exists() and (tmp_path / "pairs.jsonl").exists()


def test_a_size_or_directory_that_cannot_be_is_named(tmp_path):
    with pytest.raises(UserError, match="--pairs=0"):
        world.main(Config(out=str(tmp_path), pairs=0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        world.main(Config(out=str(tmp_path / "file"), **SMALL))


def test_the_size_of_one_file_does_not_change_another(files, tmp_path):
    world.main(Config(out=str(tmp_path), **SMALL | {"stories": 10, "pairs": 100}))
    assert (tmp_path / "chat.jsonl").read_bytes() == (files[0] / "chat.jsonl").read_bytes()
    assert (files[0] / "pairs.jsonl").read_text().startswith((tmp_path / "pairs.jsonl").read_text())


def test_data_that_is_only_text_loads_no_torch():
    modules = "data.world, data.prepare, data.shards, data.rows, data.rules, data.judge"
    code = f"import sys, {modules}; print({{'torch', 'triton', 'kernels', 'model'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done


def test_data_imports_nothing_from_above():
    for path in (ROOT / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                own = node.module.split(".")[0] in {p.stem for p in ROOT.glob("*.py")} | {"kernels"}
                assert not own, (path.name, node.module)
                if node.module.startswith("runtime"):
                    assert node.module in ("runtime.errors", "runtime.cli", "runtime.files"), path.name
