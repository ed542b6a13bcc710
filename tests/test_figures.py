"""figures.py: intervals that cover, preferences by hand, calibration, what verdicts say."""

import math
import re
import tracemalloc

import numpy as np
import pytest

import figures
from data.rows import Pair, message
from runtime.output import add_values


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pair_of(prompt, probability=1.0, row=None):
    return Pair([message("user", str(prompt))], "a", "b", probability, row or {})


def known_of(values):
    """The values of a figure that are not nan."""
    return values[np.isfinite(values)].tolist()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(100):
        figure = figures.mean_interval(rng.random(80) < 0.3, seed=trial)
        assert figure["low"] <= figure["value"] <= figure["high"]
        covered += figure["low"] <= 0.3 <= figure["high"]
    assert 87 <= covered <= 99


def test_the_draws_of_many_rows_are_those_at_once_and_need_no_memory_of_them_all():
    """A million documents would take 8 GB at once."""
    rows = np.random.default_rng(0).random((5000, 1))
    picks = np.random.default_rng(5).integers(0, len(rows), (1000, len(rows)))
    expected = np.percentile([rows[pick].sum() for pick in picks], [2.5, 97.5])
    del picks
    tracemalloc.start()
    try:
        figure = figures.interval(lambda sums: sums[0], rows, seed=5)
        assert tracemalloc.get_traced_memory()[1] < 100 * rows.nbytes
    finally:
        tracemalloc.stop()
    assert [figure["low"], figure["high"]] == expected.tolist()


def test_one_row_has_no_interval():
    assert figures.mean_interval([3.5], seed=0) == {"value": 3.5, "low": None, "high": None}


def test_a_statistic_is_that_of_the_sums_and_its_draws_depend_on_the_seed():
    rows = np.random.default_rng(0).random((50, 2)) + 1
    ratio = [figures.interval(lambda sums: sums[0] / sums[1], rows, seed) for seed in (0, 0, 1)]
    assert ratio[0]["value"] == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum())
    assert ratio[0] == ratio[1] and ratio[0]["low"] != ratio[2]["low"]


def test_distinct_by_hand():
    texts = ["a b a b", "a b", "c", ""]
    assert figures.distinct(texts, 1) == 3 / 7 and figures.distinct(texts, 2) == 2 / 4
    assert figures.distinct(["a b c"], 2) == 1.0 and figures.distinct(["a b", "a b", "a b"], 2) == 1 / 3
    assert figures.distinct(["one", ""], 2) is None is figures.distinct([""], 1)  # that is no variety of 0


def test_figures_are_shown_in_columns():
    shown = figures.table({"a": {"value": 0.5, "low": 0.25, "high": 1.0}, "b": figures.point_estimate(2)})
    assert shown.splitlines() == [f"{'a':<48}    0.5000   [0.2500, 1.0000]", f"{'b':<48}    2.0000"]


# --------------------------------------------------------------------------------------------------
# A reward model on preferences


def test_preference_figures_by_hand():
    table = [  # margin, lengths, probability of the label, gold
        (2.0, (10, 10), 1.0, (1.0, 0.0)),
        (-1.0, (30, 20), 1.0, (0.5, 0.5)),
        (0.0, (10, 40), 1.0, (2.0, 2.0)),
        (0.5, (100, 91), 0.75, (1.5, 0.5)),
        (-3.0, (5, 9), 0.0, (0.2, 0.6)),
    ]
    margins, lengths, labels, gold = zip(*table, strict=True)
    rows = [{"gold_chosen": a, "gold_rejected": b} for a, b in gold]
    pairs = [pair_of(i, p, row) for i, (p, row) in enumerate(zip(labels, rows, strict=True))]
    found = figures.preference_figures(pairs, margins, lengths, seed=0)
    value = {name: figure["value"] for name, figure in found.items()}
    assert value["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.75 + 1) / 5)
    assert value["accuracy of 'the longer wins'"] == pytest.approx((0.5 + 1 + 0 + 0.75 + 1) / 5)
    assert value["accuracy less that of 'the longer wins'"] == pytest.approx((0.5 - 1 + 0.5 + 0 + 0) / 5)
    assert value["accuracy, 2 pairs within 10 % in length"] == pytest.approx((1 + 0.75) / 2)
    gap = [a - b for a, b in lengths]
    assert value["correlation of margin and length gap"] == pytest.approx(np.corrcoef(margins, gap)[0, 1])
    errors = [sigmoid(2) - 1, sigmoid(1), 0, sigmoid(0.5) - 0.75, sigmoid(3) - 1]  # a tie is right half the time
    assert value["calibration error"] == pytest.approx(np.abs(errors).sum() / 5)
    # A margin of 0 is right half the time; 0.62 lies in the bin of 0.6, and so on
    shares = {0.50: 0.5, 0.62: 0.75, 0.73: 0, 0.88: 1, 0.95: 1}
    assert {f"right where it says {p:.2f} (1 pairs)": share for p, share in shares.items()} == {
        name: x for name, x in value.items() if name.startswith("right where")
    }
    assert value["order as gold's"] == pytest.approx(3 / 3)  # of the pairs that differ in gold
    best = [sigmoid(4 * abs(a - b)) for a, b in gold]
    assert value["accuracy that noise allows (Bayes)"] == pytest.approx(np.mean(best))
    for figure in found.values():
        assert figure["low"] is None or figure["low"] <= figure["value"] <= figure["high"]


def test_rows_without_gold_have_no_figures_of_it():
    pairs = [pair_of("q")] * 3
    assert not [name for name in figures.preference_figures(pairs, [1.0] * 3, [(1, 2)] * 3, 0) if "gold" in name]


def test_correlation_is_numpys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.normal(size=(2, 30)) * 10 + 3
        y = y + rng.normal() * x
        sums = np.array([30, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
        assert figures.correlation(sums) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert figures.correlation(np.array([3, 6, 3, 14, 3, 6])) == 0.0  # y is always 1


def test_a_calibrated_model_has_no_calibration_error_and_a_boaster_has_his():
    rng = np.random.default_rng(1)
    confidence = sigmoid(np.abs(rng.normal(size=200_000) * 2))
    agrees = rng.random(len(confidence)) < confidence
    assert figures.calibration_error(confidence, agrees) < 0.005
    assert figures.calibration_error(np.full(1000, 0.99), np.arange(1000) < 700) == pytest.approx(0.29)


# --------------------------------------------------------------------------------------------------
# A judge's verdicts


def test_a_judge_that_always_says_a_is_all_position_bias():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.6]])  # the last one knows the first reply is better
    np.testing.assert_allclose(figures.position_bias(p), [0.9, 0.9, 0.5])
    margins = p[:, None].mean(2) - 0.5
    values = figures.verdict_values(p[:, None], margins, 0.5 + margins[:, 0], np.array([False, False, True]), {}, ["x"])
    assert known_of(values["the two orders contradict each other"]) == [True, True, False]
    assert known_of(values["confidence, kept pairs"]) == pytest.approx([0.6])


def test_agreement_is_counted_where_something_is_known_and_by_the_principles_that_were_asked():
    margins = np.array([[0.2, np.nan], [np.nan, -0.1], [0.3, -0.4], [0.1, 0.1]])
    p = np.stack([margins + 0.5, margins + 0.5], axis=2)
    known = {"gold": figures.sure_margins([1.0, 1.0, -2.0, 0.0]), "nobody": np.full(4, np.nan)}
    kept = np.array([True, True, False, True])
    values = figures.verdict_values(p, margins, 0.5 + np.nanmean(margins, axis=1), kept, known, ["one", "two"])
    agrees = {name: known_of(x) for name, x in values.items() if name.startswith("agrees")}
    assert agrees["agrees with gold, all pairs"] == [True, False, True]  # a tie in gold is no order
    assert agrees["agrees with gold, kept pairs"] == [True, False]
    assert agrees["agrees with gold, by: one"] == [True, False] and agrees["agrees with gold, by: two"] == [False, True]
    assert not [name for name, x in agrees.items() if "nobody" in name and x]
    for by, n in (("", 6), (", by: one", 3), (", by: two", 3)):
        for name in ('position bias (how much " A" is said)', "the two orders contradict each other"):
            assert len(known_of(values[name + by])) == n


# --------------------------------------------------------------------------------------------------
# Several pairs of one prompt


def recorded(values, prompts):
    """The record of rlaif.py of values of a figure, float64 [n] or [n, k], in two batches."""
    record, half = {"counts": {"pairs": 1200}, "figures": {}, "squares": {}}, len(values) // 2
    for part in (slice(half), slice(half, None)):
        add_values(record, {"right": values[part]}, prompts[part])
    return record


def shown(record):
    """(mean, low, high), or the mean alone, of the one figure of a record."""
    return [float(x) for x in re.findall(r"\d+\.\d+", figures.show_record(record).splitlines()[1])]


def test_a_record_is_shown_as_counts_and_means():
    """With one value to a prompt, of 0 or 1, the interval is that of a share."""
    record = recorded(np.repeat([0.0, np.nan, 1.0], [70, 6, 30]), np.arange(106))
    record["figures"]["none"] = 0.0, 0
    counts, figure = figures.show_record(record).splitlines()
    error = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert counts == f"{'pairs':<48}     1,200"
    assert figure == f"{'right':<48}    0.3000   [{0.3 - error:.4f}, {0.3 + error:.4f}]"
    of_one_prompt = {"right": [1, 3]}, {"right": [1, 3, 9]}
    assert shown(record | dict(zip(("figures", "squares"), of_one_prompt))) == [0.3333]  # it says nothing of others


def skilled(seed, prompts, pairs):
    """float64 [prompts, pairs] of 0 and 1: a judge is right on a share of a prompt's pairs that is
    another for each prompt, 1/2 in the mean."""
    random = np.random.default_rng(seed)
    return (random.random((prompts, pairs)) < random.beta(1, 1, (prompts, 1))).astype(float)


@pytest.mark.parametrize("pairs", [1, 3, 28])
def test_intervals_of_a_judge_cover_whatever_the_pairs_of_a_prompt(pairs):
    """As pairs, and as verdicts of several principles on one pair."""
    covered = 0
    for seed in range(200):
        right, prompts = skilled(seed, 100, pairs), np.arange(100)
        flat = shown(recorded(right.ravel(), prompts.repeat(pairs)))
        mean, low, high = shown(recorded(right, prompts))
        assert flat == [mean, low, high] and mean == pytest.approx(right.mean(), abs=1e-4)
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 198


def test_intervals_of_a_reward_model_cover_whatever_the_pairs_of_a_prompt():
    covered = 0
    for seed in range(100):
        right = skilled(seed, 40, 6).ravel()
        figure = figures.mean_interval(right, seed, np.arange(40).repeat(6))
        covered += figure["low"] <= 0.5 <= figure["high"]
    assert 88 <= covered <= 99


def test_pairs_of_one_prompt_that_say_the_same_say_it_once():
    random = np.random.default_rng(0)
    margins, lengths = random.normal(size=40), random.integers(1, 4, (40, 2))
    rows = [{"gold_chosen": x, "gold_rejected": 0.0} for x in random.normal(size=40)]
    pairs = [pair_of(i, row=row) for i, row in enumerate(rows)]
    once = figures.preference_figures(pairs, margins, lengths, 0)
    again = figures.preference_figures(pairs * 3, np.tile(margins, 3), np.tile(lengths, (3, 1)), 0)
    assert len(once) > 9
    for one, three in zip(once.values(), again.values(), strict=True):
        assert [x for x in three.values() if x is not None] == pytest.approx([x for x in one.values() if x is not None])


# --------------------------------------------------------------------------------------------------
# Agreement


def test_agreement_counts_a_tie_as_a_half_and_a_label_by_its_probability():
    margins, labels = np.array([2.0, -1.0, 0.0, 0.0, 3.0, -3.0]), np.array([1.0, 1.0, 1.0, 0.2, 0.0, 0.25])
    assert figures.agreement(margins, labels).tolist() == [1, 0, 0.5, 0.5, 0, 0.75]
    assert figures.agreement(margins, labels > 0.5).tolist() == [1, 0, 0.5, 0.5, 0, 1]


def test_a_judge_and_a_reward_model_agree_with_the_same_labels_by_the_same_measure():
    """By the labels' probability, be it 1/2; with gold by its order alone."""
    labels, margins = [0.6, 0.6, 0.5, 0.1, 1.0], np.array([0.2, -0.1, 0.4, -0.3, 0.1])
    rows = [{"gold_chosen": gold, "gold_rejected": 0.3} for gold in (0.4, 0.4, 0.3, 0.2, 0.9)]
    pairs = [pair_of(i, label, row) for i, (label, row) in enumerate(zip(labels, rows, strict=True))]
    p = np.stack([0.5 + margins] * 2, axis=1)[:, None]
    known, kept = figures.label_margins(pairs), np.array([True, True, True, True, False])
    values = figures.verdict_values(p, margins[:, None], 0.5 + margins, kept, known, ["be kind"])
    expected = [0.6, 0.4, 0.5, 0.9, 1.0]
    for name, right in {"all pairs": expected, "by: be kind": expected, "kept pairs": expected[:4]}.items():
        assert known_of(values[f"agrees with the labels, {name}"]) == pytest.approx(right)
    assert known_of(values["agrees with gold, all pairs"]) == [1, 0, 1, 1]
    found = figures.preference_figures(pairs, margins, np.ones((5, 2)), 0)
    assert found["accuracy"]["value"] == pytest.approx(np.mean(expected))
    assert found["order as gold's"]["value"] == pytest.approx(3 / 4)


def test_a_judge_and_a_reward_model_without_an_opinion_agree_half_the_time():
    """Every accuracy, so that one is comparable with another."""
    n = 12
    known = {"the labels": np.array([0.5, -0.5] * (n // 2))}
    kept, undecided = np.ones(n, bool), np.full(n, 0.5)
    values = figures.verdict_values(np.full((n, 1, 2), 0.5), np.zeros((n, 1)), undecided, kept, known, ["be kind"])
    for name in ("all pairs", "kept pairs", "by: be kind"):
        assert known_of(values[f"agrees with the labels, {name}"]) == [0.5] * n
    rows = [{"gold_chosen": float(i), "gold_rejected": 3.0} for i in range(n)]
    pairs = [pair_of(i, float(i % 2), row) for i, row in enumerate(rows)]
    found = figures.preference_figures(pairs, np.zeros(n), np.ones((n, 2)), 0)
    assert found["accuracy"]["value"] == found["order as gold's"]["value"] == 0.5
    assert found["calibration error"]["value"] == 0  # it says 1/2, and is right half the time
