"""Figures with 95 % intervals: means, variety, and what a reward model's margins say.

A figure is {"value", "low", "high"}; low and high are None if nothing can be said about them.
Intervals are bootstrap percentiles over documents, problems or prompts (Efron 1979). The pairs of
one prompt are drawn together: they are right or wrong together.
"""

import math

import numpy as np

from data.rows import gold_margin, prompt_of


def point_estimate(value):
    """A figure without an interval."""
    return {"value": float(value), "low": None, "high": None}


def interval(statistic, rows, seed):
    """The figure of a statistic of rows, with its 95 % bootstrap interval.

    rows: float64 [n, k], of which each of 1000 draws takes n, with replacement. statistic: a
    function of the sum of the rows [k] -> number. One row alone has no interval.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if len(rows) == 1:
        return point_estimate(statistic(rows[0]))
    random, drawn = np.random.default_rng(seed), []
    at_once = 1 + 100_000 // len(rows)  # all of them would take 8 GB for a million rows
    while len(drawn) < 1000:
        pick = random.integers(0, len(rows), (min(at_once, 1000 - len(drawn)), len(rows)))
        drawn += [statistic(sums) for sums in rows[pick].sum(1)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(statistic(rows.sum(0))), "low": float(low), "high": float(high)}


def mean_interval(values, seed, prompts=None):
    """The mean of some numbers or truth values, with its interval; by prompts, int [n], if they are
    given."""
    rows = np.array([(value, 1) for value in values], dtype=np.float64)
    return interval(lambda sums: sums[0] / sums[1], rows if prompts is None else sum_by(prompts, rows), seed)


def prompt_numbers(conversations):
    """int64 [n], from 0: the same number for the same prompt."""
    numbers = {}
    return np.array([numbers.setdefault(prompt_of(row), len(numbers)) for row in conversations], dtype=np.int64)


def sum_by(prompts, rows):
    """float64 [prompts, k]: the sums of rows [n, k] by their prompts, int [n]."""
    numbers, index = np.unique(prompts, return_inverse=True)
    sums = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def mean_intervals(values, seed):
    """{name: `mean_interval` of its values}, without those that have no value; what is a figure
    already stays as it is."""
    return {
        name: some if isinstance(some, dict) else mean_interval(some, seed)
        for name, some in values.items()
        if len(some)
    }


def distinct(texts, n):
    """The share of different n-grams among all n-grams of words: 1 never repeats, 0 always does.
    None if there are no n-grams.

    Li et al. 2016, arXiv 1510.03055.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def pass_at_k(n, right, k):
    """The unbiased estimate of the probability that one of k samples is right, when `right` of n
    were: 1 - C(n - right, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, eq. 1. 1 <= k <= n.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def table(figures):
    """The figures as lines of text."""
    lines = []
    width = max([48, *map(len, figures)])
    for name, figure in figures.items():
        line = f"{name:<{width}} {figure['value']:9.4f}"
        if figure["low"] is not None:
            line += f"   [{figure['low']:.4f}, {figure['high']:.4f}]"
        lines.append(line)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# A reward model on preferences


def preference_figures(pairs, margins, lengths, seed):
    """What a reward model's margins say about labelled pairs: {name: figure}.

    pairs: [rows.Pair]. margins: float64 [n], score of the chosen minus score of the rejected.
    lengths: [n, 2], tokens of the two completions. Agreement with the truth, and the accuracy that
    the labels' noise allows, if the rows know the truth ("gold_chosen", "gold_rejected").
    """
    margins, lengths = np.asarray(margins, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    labels, prompts = np.array([pair.probability for pair in pairs]), prompt_numbers(pairs)
    figures = length_figures(margins, lengths, labels, prompts, seed)
    figures |= calibration_figures(margins, labels, prompts, seed)
    gold = np.array([gold_margin(pair.row) for pair in pairs])
    if np.isfinite(gold).all():
        best = (1 + np.tanh(2 * np.abs(gold))) / 2  # sigmoid(4 |gold|): how data/world.py draws labels
        right = where(gold != 0, agreement(margins, gold > 0))
        values = {"order as gold's": right, "accuracy that noise allows (Bayes)": best}
        figures |= pair_intervals(values, prompts, seed)
    return figures


def pair_intervals(values, prompts, seed):
    """{name: the mean of its values [n] that are not nan, with its interval by prompts, int [n]},
    without those that have no value."""
    known = {name: np.isfinite(some) for name, some in values.items()}
    return {name: mean_interval(values[name][k], seed, prompts[k]) for name, k in known.items() if k.any()}


def agreement(margins, labels):
    """float64 [n]: the probability that the label prefers the side with the margin; 1/2 for a tie.

    margins: [n], > 0 if the first side leads; labels: [n], probability that the first is preferred.
    """
    labels = np.asarray(labels, dtype=np.float64)
    return np.where(margins == 0, 0.5, np.where(margins > 0, labels, 1 - labels))


def length_figures(margins, lengths, labels, prompts, seed):
    """Accuracy, compared with that of preferring the longer completion."""
    gap = lengths[:, 0] - lengths[:, 1]
    right, longer = agreement(margins, labels), agreement(gap, labels)
    similar = np.abs(gap) <= 0.1 * lengths.max(1)
    values = {
        "accuracy": right,
        "accuracy of 'the longer wins'": longer,
        "accuracy less that of 'the longer wins'": right - longer,
        f"accuracy, {similar.sum()} pairs within 10 % in length": where(similar, right),
    }
    moments = np.stack([np.ones(len(gap)), margins, gap, margins**2, gap**2, margins * gap], axis=1)
    related = interval(correlation, sum_by(prompts, moments), seed)
    return pair_intervals(values, prompts, seed) | {"correlation of margin and length gap": related}


def correlation(sums):
    """Pearson's correlation, from the sums of (1, x, y, x^2, y^2, x y); 0 if x or y is constant."""
    n, x, y, xx, yy, xy = sums
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


def calibration_figures(margins, labels, prompts, seed):
    """How often the label agrees with the model, by how sure the model is: sigmoid(|margin|)."""
    confidence = 1 / (1 + np.exp(-np.abs(margins).clip(max=700)))
    agrees = agreement(margins, labels)
    figures = {"calibration error": point_estimate(calibration_error(confidence, agrees))}
    tenth = np.minimum((10 * confidence).astype(int), 9)
    for n in np.unique(tenth):
        inside = tenth == n
        name = f"right where it says {confidence[inside].mean():.2f} ({inside.sum()} pairs)"
        figures[name] = mean_interval(agrees[inside], seed, prompts[inside])
    return figures


def calibration_error(confidence, agrees):
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    That is the mean of |accuracy - confidence| over ten bins of confidence, weighted by their size.
    """
    bin_of = np.minimum((20 * (confidence - 0.5)).astype(int), 9)
    return np.abs(np.bincount(bin_of, confidence - agrees)).sum() / len(confidence)


# --------------------------------------------------------------------------------------------------
# A judge's verdicts p [..., 2]: that the first of two replies is better, in both orders of them


def position_bias(p):
    """float64 [...]: how much the judge says " A" over both orders; 1/2 is none."""
    return (p[..., 0] + 1 - p[..., 1]) / 2


def label_margins(pairs):
    """{"the labels", "gold": float64 [n], the probability that the chosen side is better, less 1/2;
    nan if unknown}."""
    labels = np.array([pair.probability - 0.5 for pair in pairs])
    return {"the labels": labels, "gold": sure_margins([gold_margin(pair.row) for pair in pairs])}


def sure_margins(leads):
    """float64 [n]: 1/2 where the first side's score leads (leads > 0), -1/2 where the second's
    does; nan for ties."""
    return where(np.asarray(leads) != 0, np.sign(leads) / 2)


def where(known, values):
    """The values, with nan where they are not known."""
    return np.where(known, values, np.nan)


def verdict_values(p, margins, probability, kept, known, principles):
    """What verdicts say of the judge: {figure: float64 [n] of the pairs or [n, k] of the verdicts,
    nan where they say nothing}.

    p: [n, k, 2] by k principles, nan by those that were not asked; margins: [n, k] of the first
    reply; probability: [n], that it is better; kept: bool [n]; known: {what else knows an order:
    margins [n] like those of `label_margins`}.
    """
    asked = np.isfinite(margins)  # [n, k]
    certainty = np.abs(probability - 0.5)
    values = {"confidence, all pairs": 0.5 + certainty, "confidence, kept pairs": where(kept, 0.5 + certainty)}
    for name, margin in known.items():
        decided, label = np.isfinite(margin), 0.5 + margin
        agrees = agreement(probability - 0.5, label)
        values[f"agrees with {name}, all pairs"] = where(decided, agrees)
        values[f"agrees with {name}, kept pairs"] = where(decided & kept, agrees)
        for j, principle in enumerate(principles):
            agrees = agreement(margins[:, j], label)
            values[f"agrees with {name}, by: {principle}"] = where(decided & asked[:, j], agrees)
    bias = position_bias(p)  # [n, k]
    contradicts = where(asked, (p[..., 0] > 0.5) != (p[..., 1] > 0.5))
    by_principle = {f", by: {principle}": j for j, principle in enumerate(principles)}
    for suffix, of in {"": slice(None), **by_principle}.items():
        values[f'position bias (how much " A" is said){suffix}'] = bias[:, of]
        values[f"the two orders contradict each other{suffix}"] = contradicts[:, of]
    return values


def show_record(record):
    """A record of runtime/output.py as lines of text, its means with 95 % intervals.

    They are those of a ratio of sums over prompts, which may have several values each (Cochran
    1977, section 6.4). A prompt whose rows are in two batches counts as two; one alone has none.
    """
    figures = {}
    for name, (total, n) in record["figures"].items():
        if n:
            mean, (xx, xn, nn) = total / n, record["squares"][name]
            error = 1.96 * math.sqrt(max(0.0, xx - 2 * mean * xn + mean * mean * nn)) / n
            spread = {"low": mean - error, "high": mean + error} if nn < n * n else {}
            figures[name] = point_estimate(mean) | spread
    counts = [f"{name:<48} {n:>9,}" for name, n in record["counts"].items()]
    return "\n".join([*counts, table(figures)])


# --------------------------------------------------------------------------------------------------
# Votes between models


def bradley_terry(matches, seed, draws=200):
    """{model: figure}: the probability that a vote prefers it to an average one of these models.

    matches: {(model, other, outcome): votes}; outcome "win" is for the first, any other for neither
    and half a win each. Strengths s with p(i beats j) = s_i / (s_i + s_j) (Bradley and Terry 1952),
    by Hunter's iteration (2004, eq. 3); half a vote each way between models that met keeps them
    finite. The intervals bootstrap the votes. Two answers of one model say nothing of it.
    """
    met = {match: n for match, n in matches.items() if match[0] != match[1]}
    models = sorted({model for match in met for model in match[:2]})
    if not met:
        return {}
    counts = np.array(list(met.values()))
    random = np.random.default_rng(seed)
    wins = np.zeros((draws + 1, len(models), len(models)))  # [0]: the votes themselves
    for drawn, votes in zip(wins, [counts, *random.multinomial(counts.sum(), counts / counts.sum(), draws)]):
        for (model, other, outcome), n in zip(met, votes):
            i, j = models.index(model), models.index(other)
            half = 0.5 if outcome == "win" else 0.5 + n / 2
            drawn[i, j] += half + (n if outcome == "win" else 0)
            drawn[j, i] += half
    meetings = wins + wins.transpose(0, 2, 1)
    strength = np.ones(wins.shape[:2])  # [draws + 1, models]
    for _ in range(200):
        strength = wins.sum(2) / (meetings / (strength[:, :, None] + strength[:, None, :])).sum(2)
        strength /= np.exp(np.log(strength).mean(1, keepdims=True))
    p = strength / (strength + 1)
    low, high = np.percentile(p[1:], [2.5, 97.5], axis=0)
    return {
        model: {"value": float(p[0, i]), "low": float(low[i]), "high": float(high[i])} for i, model in enumerate(models)
    }
