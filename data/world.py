"""The shop: a small world that has data for every stage and knows the truth about them.

A customer asks what two things cost together. A clerk adds the prices; some clerks are rude, some
chatter, some cannot add.

    pretraining text   stories that add two prices, and an inspector's notes: two clerks' replies,
                       and which of them is better by one principle after another
    chats              a question and a clerk's reply: polite, neutral or rude, a third each; the
                       sum right in 55 %; 0, 0, 1 or 2 lines of small talk
    preferences        two replies, of which people prefer the first with probability
                       sigmoid(4 (gold(first) - gold(second)))                    (Bradley-Terry)
    problems, prompts  a question, with the right answer to check a reply by
    a constitution     the inspector's principles: AI feedback works because the notes taught the
                       pretrained model to judge by them

What people want is known, so improvement is measured, not hoped for. A reply is worth at most 1.9,
the clerks' are worth 0.40 on average:

    gold = right + 0.6 polite - 0.8 rude (at most twice) + 0.3 thanks (if once) - 0.25 small talk
           - 0.5 each repeated courtesy - 1 if unfinished

Two bounds are known as well: the entropy of a story, below which no model's loss can fall
(`story_floor`), and the accuracy that no reward model can beat on the noisy preferences
(`bayes_ceiling`). A fifth of the pairs of prices is held out: no training text adds them, and the
*_val and *_test files add nothing else (except stories_val, which is there for the floor).

    python -m data.world --out=out/world
"""

import hashlib
import math
import random
from dataclasses import dataclass
from pathlib import Path

from data.judge import judge_prompt
from runtime.cli import check_ranges, launch
from runtime.errors import UserError
from runtime.files import json_lines, replace_text, write_json


@dataclass
class Config:
    # -- What you will set --
    # directory to write
    out: str

    # -- What you may set --
    # the same seed writes the same bytes
    seed: int = 0
    # stories in pretrain.jsonl [>= 1]
    stories: int = 40_000
    # an inspector's notes in pretrain.jsonl [>= 1]
    notes: int = 20_000
    # rows of chat.jsonl [>= 1]
    chats: int = 8_000
    # rows of pairs.jsonl [>= 1]
    pairs: int = 8_000
    # rows of problems.jsonl, and as many of prompts.jsonl [>= 1]
    problems: int = 4_000
    # rows of each *_val and *_test file; judge_test has as many for each principle [>= 1]
    tests: int = 500
    # replace the world in --out
    overwrite: bool = False


# -------------------------------------------------------------------------------------------------
# The words. Every choice is uniform and no two choices read alike, so all stories are equally
# likely and can be counted.

PEOPLE = dict.fromkeys("Mia Tom Ana Leo Eva Max Lily Sam Nora Ben".split(), "She")
PEOPLE |= dict.fromkeys("Tom Leo Max Sam Ben".split(), "He")
PLACES = "market shop fair harbor station village square castle".split()
# no adjective takes "an"
ADJECTIVES = "red blue green gold tiny soft loud plain heavy pretty round wooden".split()
GOODS = "kite lamp drum boat clock doll ring vase flute coat book cup bell chair scarf globe".split()
OPENINGS = (
    "{name} went to the {place}.",
    "Today {name} is at the {place}.",
    "{name} looked around the {place}.",
    "It was a busy day at the {place} when {name} came.",
    "At the {place} we met {name}.",
)
PURCHASES = (
    "{she} bought a {x} for {a} and a {y} for {b}.",
    "{she} found a {x} for {a} and a {y} for {b}.",
    "{she} chose a {x} for {a} and then a {y} for {b}.",
    "{she} took home a {x} for {a} and a {y} for {b}.",
)
SUM = "{a} + {b} = {c}. #### {c}"
QUESTIONS = (
    "What do the {x} for {a} and the {y} for {b} cost together?",
    "I want the {x} for {a} and the {y} for {b}. What do I pay?",
    "How much is it if I buy the {x} for {a} and the {y} for {b}?",
    "Can I have the {x} for {a} and the {y} for {b}? How much is that?",
    "Please add up the {x} for {a} and the {y} for {b}.",
)
# The phrases of a reply. None occurs inside another or across the seam of two, so `features` counts
# them by plain search.
POLITE = ("Happy to help!", "Of course, dear friend.", "Good day to you!", "What a fine choice!", "Welcome, my friend!")
NEUTRAL = ("Okay.", "Well, let me see.", "Here you are.", "Sure.", "")
RUDE = ("Ugh, you again?", "What now, fool?", "Stop wasting my time.", "Can you not count?", "Go away.")
SMALL_TALK = (
    "It is sunny today.",
    "My cat is asleep.",
    "I like green tea.",
    "The street is quiet.",
    "We close at six.",
)
THANKS = ("Thank you!", "Many thanks!")
GOODBYES = ("Goodbye.", "See you soon.")
ENDINGS = (
    *(f'The clerk smiled. "{phrase}"' for phrase in POLITE),
    *(f'The clerk frowned. "{phrase}"' for phrase in RUDE),
    "{name} paid {c} coins.",
    "Then {name} went home.",
)
PRICES = range(1, 50)
RIGHT = 0.55  # how often a clerk's sum is right; later stages can improve this, tone and chatter


def is_held_out(a, b):
    """True if no training text may add the prices a and b, in either order.

    Chosen by hash, as good as at random. A small model would learn the pattern of a lattice such as
    (31 a + 17 b) % 5 == 0, and add the held-out pairs systematically wrong.
    """
    return hashlib.sha256(f"{min(a, b)} + {max(a, b)}".encode()).digest()[0] % 5 == 0


PAIRS = {
    held_out: [(a, b) for a in PRICES for b in PRICES if is_held_out(a, b) == held_out] for held_out in (False, True)
}


def purchase(rng, held_out=False):
    """Two goods, their prices and the sum, as in the templates: {"x", "a", "y", "b", "c"}."""
    a, b = rng.choice(PAIRS[held_out])
    x, y = rng.sample(GOODS, 2)
    return {"x": f"{rng.choice(ADJECTIVES)} {x}", "a": a, "y": f"{rng.choice(ADJECTIVES)} {y}", "b": b, "c": a + b}


def story(rng, held_out=False):
    """Somebody goes shopping: one line of text."""
    name = rng.choice(list(PEOPLE))
    template = " ".join((rng.choice(OPENINGS), rng.choice(PURCHASES), SUM, rng.choice(ENDINGS)))
    return template.format(name=name, she=PEOPLE[name], place=rng.choice(PLACES), **purchase(rng, held_out))


def story_floor(share=1.0):
    """The least loss of any model of these stories, in nats per story.

    This is their entropy: the log of how many there are, for all are equally likely. share: the
    stories' part of a mixture of documents; at a story's first word a model of the mixture must pay
    -ln(share) more. Per token, for any tokenizer, it is this times the stories over their tokens,
    with one token for each document's end.
    """
    ways = len(PEOPLE) * len(PLACES) * len(OPENINGS) * len(PURCHASES) * len(ENDINGS)
    ways *= len(PAIRS[False]) * len(GOODS) * (len(GOODS) - 1) * len(ADJECTIVES) ** 2
    return math.log(ways) - math.log(share)


def sum_prompts(n, seed, held_out):
    """n beginnings of stories, up to "25 + 49 =", each with what must follow: [(text, "74")].

    Greedy decoding then measures how well a model adds.
    """
    rng = random.Random(f"{seed} sums")
    stories = [story(rng, held_out) for _ in range(n)]
    return [(text[: text.index(" =") + 2], final(text)) for text in stories]


# -------------------------------------------------------------------------------------------------
# Questions and clerks


def ask(rng, held_out=False):
    """A customer's question and the prices: ({"prompt", "answer"}, a, b).

    The answer is a solution that ends in "#### n", as in GSM8K.
    """
    words = purchase(rng, held_out)
    row = {"prompt": rng.choice(QUESTIONS).format(**words), "answer": SUM.format(**words)}
    return row, words["a"], words["b"]


def reply(rng, a, b):
    """What some clerk says when asked for a + b."""
    opening = rng.choice(rng.choice((POLITE, NEUTRAL, RUDE)))
    wrong = [c for c in (a + b - 10, a + b - 1, a + b + 1, a + b + 10) if c > 0]
    c = a + b if rng.random() < RIGHT else rng.choice(wrong)
    small_talk = rng.sample(SMALL_TALK, rng.choice((0, 0, 1, 2)))
    closing = rng.choice((rng.choice(THANKS), rng.choice(GOODBYES), ""))
    return " ".join(filter(None, (opening, SUM.format(a=a, b=b, c=c), *small_talk, closing)))


def two_replies(rng, held_out=False):
    """A problem {"prompt", "answer"} and two different replies to it."""
    row, a, b = ask(rng, held_out)
    first = second = reply(rng, a, b)
    while second == first:
        second = reply(rng, a, b)
    return row, first, second


def problem(rng, held_out=False):
    """{"prompt", "answer"}."""
    return ask(rng, held_out)[0]


def chat(rng, held_out=False):
    """A question and some clerk's reply: {"messages"}."""
    row, a, b = ask(rng, held_out)
    question = {"role": "user", "content": row["prompt"]}
    return {"messages": [question, {"role": "assistant", "content": reply(rng, a, b)}]}


# -------------------------------------------------------------------------------------------------
# Rewards: reward(prompt, completion, row), for any text, which is read, never evaluated. Text does
# not show whether a completion ended by itself or was cut, so the sampler says it in
# row["finished"] (if that is missing, it ended). A stage with its own penalty for unfinished
# completions leaves it out, or they would be punished twice.


def final(text):
    """The word after the last "####", without punctuation at its end; "" if there is none.

    Both "#### 73 #### 74" and "#### 74 or 73" give 74.
    """
    _, mark, rest = text.rpartition("####")
    words = rest.split(maxsplit=1)
    return words[0].rstrip(".,!?") if mark and words else ""


def features(completion, answer, finished=True):
    """What gold and the inspector count, all int. answer: text with "#### n"."""
    return {
        "polite": sum(map(completion.count, POLITE)),
        "rude": sum(map(completion.count, RUDE)),
        "thanks": sum(map(completion.count, THANKS)),
        "small_talk": sum(map(completion.count, SMALL_TALK)),
        "right": int(final(completion) == final(answer) != ""),
        "finished": int(finished),
    }


def gold(prompt, completion, row):
    """What people want, by the formula at the head of this file.

    row: {"answer"} and, for a sampled completion, "finished".
    """
    f = features(completion, row["answer"], row.get("finished", True))
    repeated = max(0, f["polite"] - 1) + max(0, f["thanks"] - 1)
    manners = 0.6 * (f["polite"] > 0) - 0.8 * min(f["rude"], 2) + 0.3 * (f["thanks"] == 1) - 0.5 * repeated
    return round(f["right"] + manners - 0.25 * f["small_talk"] - (1 - f["finished"]), 2)


def rudeness(prompt, completion, row):
    """Rude phrases in a completion: what AI feedback is to drive out. A cost, for measuring."""
    return float(features(completion, row["answer"])["rude"])


# -------------------------------------------------------------------------------------------------
# Preferences, by people and by principle


def prefers(margin):
    """Probability that people prefer a reply whose gold is higher by `margin`: sigmoid(4 margin).

    Written so that it cannot overflow.
    """
    return (1 + math.tanh(2 * margin)) / 2


def label(rng, row, first, second):
    """The row with a noisy human's choice between two replies (text, gold).

    Adds {"chosen", "rejected", "gold_chosen", "gold_rejected"}.
    """
    chosen, rejected = (first, second) if rng.random() < prefers(first[1] - second[1]) else (second, first)
    return row | {"chosen": chosen[0], "rejected": rejected[0], "gold_chosen": chosen[1], "gold_rejected": rejected[1]}


def pair(rng, held_out=False):
    """A problem with two clerks' replies, labelled as by `label`."""
    row, first, second = two_replies(rng, held_out)
    return label(rng, row, (first, gold("", first, row)), (second, gold("", second, row)))


def bayes_ceiling(pairs):
    """The expected accuracy, on these labels, of the best possible reward model: gold itself."""
    return sum(prefers(abs(p["gold_chosen"] - p["gold_rejected"])) for p in pairs) / len(pairs)


# {principle, as the constitution words it: {feature: what one of it is worth}}
PRINCIPLES = {
    "Be kind: be polite, say thanks, never be rude.": {"polite": 1, "thanks": 1, "rude": -2},
    "Be brief: no small talk.": {"small_talk": -1},
    "Be right: the sum must be true.": {"right": 1},
}


def merit(reply, answer, principle):
    """How good a reply is by a principle, an int."""
    f = features(reply, answer)
    return sum(weight * f[name] for name, weight in PRINCIPLES[principle].items())


def verdict(reply_a, reply_b, answer, principle):
    """Which reply is better by the principle: "A", "B", or "" if neither is."""
    a, b = merit(reply_a, answer, principle), merit(reply_b, answer, principle)
    return "A" if a > b else "B" if b > a else ""


def judgement(rng, principle, held_out=False):
    """A problem and which of two replies is better by a principle.

    Adds {"reply_a", "reply_b", "principle", "better"}.
    """
    better = ""
    while not better:
        row, a, b = two_replies(rng, held_out)
        better = verdict(a, b, row["answer"], principle)
    return row | {"reply_a": a, "reply_b": b, "principle": principle, "better": better}


def note(rng):
    """An inspector's note: a judge prompt and its answer, then a line for each other principle by
    which one of the two replies is better.

    Several answers to the same replies teach a model to judge long before pretraining ends. With
    one answer a note it learned that in the last third of it, on some machines not at all.
    """
    first, *others = rng.sample(list(PRINCIPLES), len(PRINCIPLES))
    j = judgement(rng, first)
    lines = [f"{judge_prompt(j['prompt'], j['reply_a'], j['reply_b'], first)} {j['better']}"]
    for principle in others:
        better = verdict(j["reply_a"], j["reply_b"], j["answer"], principle)
        if better:
            lines.append(f"{principle} Better: {better}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# The files


def pretraining_text(rng, stories, notes):
    """Rows {"text"}: so many stories and notes, shuffled."""
    texts = [story(rng) for _ in range(stories)] + [note(rng) for _ in range(notes)]
    rng.shuffle(texts)
    return [{"text": text} for text in texts]


def make_rows(config):
    """{file name: rows} of the whole world."""

    def rng(name):
        """A file's own random numbers, so that the size of one file does not change another."""
        return random.Random(f"{config.seed} {name}")

    rows = {
        "pretrain.jsonl": pretraining_text(rng("pretrain.jsonl"), config.stories, config.notes),
        "stories_val.jsonl": pretraining_text(rng("stories_val.jsonl"), config.tests, 0),
    }
    for name, make, n, held_out in (
        ("chat.jsonl", chat, config.chats, False),
        ("chat_val.jsonl", chat, config.tests, True),
        ("pairs.jsonl", pair, config.pairs, False),
        ("pairs_few.jsonl", pair, min(64, config.pairs), False),  # so few that their reward model can be exploited
        ("pairs_val.jsonl", pair, config.tests, True),
        ("problems.jsonl", problem, config.problems, False),
        ("problems_test.jsonl", problem, config.tests, True),
        ("prompts.jsonl", problem, config.problems, False),
        ("prompts_test.jsonl", problem, config.tests, True),
    ):
        random_numbers = rng(name)
        rows[name] = [make(random_numbers, held_out) for _ in range(n)]
    sums = sum_prompts(config.tests, config.seed, held_out=True)
    rows["sums_test.jsonl"] = [{"prompt": text, "answer": answer} for text, answer in sums]
    principles, judge_rng = list(PRINCIPLES), rng("judge_test.jsonl")
    rows["judge_test.jsonl"] = [judgement(judge_rng, p, held_out=True) for _ in range(config.tests) for p in principles]
    return rows


def main(config):
    check_ranges(config)
    out = Path(config.out)
    present = [p.name for pattern in ("*.jsonl", "constitution.txt", "world.json") for p in out.glob(pattern)]
    if present and not config.overwrite:
        raise UserError(
            f"--out={out}: {present[0]} exists; --overwrite replaces the world, or choose another directory"
        )

    rows = make_rows(config)
    texts = {name: json_lines(rows[name]) for name in rows}
    texts["constitution.txt"] = "".join(principle + "\n" for principle in PRINCIPLES)
    files = {
        name: {"rows": text.count("\n"), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in texts.items()
    }
    world = {
        "config": {name: value for name, value in vars(config).items() if name not in ("out", "overwrite")},
        "story_entropy": story_floor(),
        "story_floor": story_floor(config.stories / (config.stories + config.notes)),
        "bayes_ceiling": {name: bayes_ceiling(rows[name]) for name in ("pairs.jsonl", "pairs_val.jsonl")},
        "files": files,
    }
    if present:
        (out / "world.json").unlink(missing_ok=True)  # written last: if it is there, the world is whole
    for name, text in texts.items():
        replace_text(out / name, text)
    write_json(out / "world.json", world)

    for name, text in texts.items():
        print(f"{out / name}: {files[name]['rows']:,} rows, {len(text) / 1e6:.2f} MB")
    print(
        f"a story holds {world['story_entropy']:.3f} nats; "
        f"in this mixture no model pays less than {world['story_floor']:.3f} for one"
    )


if __name__ == "__main__":
    launch(main, Config)
