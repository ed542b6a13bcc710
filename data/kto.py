"""KTO's data: single completions that were judged good or bad, each with a completion to another
prompt, by which the KL to the reference is measured (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from collections import Counter

import numpy as np
import torch

from data import chat, rows
from data.pack import make_completion
from runtime.cli import print0
from runtime.errors import UserError


def read_items(config, tok, context):
    """(train items, labels, validation items, labels, {source: SHA-256}) of --data and --val.

    An item is (Chat, Chat): the completion that was judged, and one to another prompt. labels: fp32
    [n], 1 for a good one. Warns of labels that are all the same.
    """

    def fit(found, what):
        items = make_items([single for _, singles in found for single in singles], context, what)
        return items, [row for row, singles in found if any(len(side.ids) <= context for _, side in singles)]

    train, val, hashes = rows.read_split(config, rows.judged, chat.encoder(tok, encode_judged), fit)
    warn_of_one_side(
        train[1], config.data, "kto learns from the difference: bring both, or fine-tune on good ones with sft.py"
    )
    what, more = f"held out of {config.data}", "raise --val_fraction, or give --val"
    if config.val:
        what, more = f"--val={config.val}", "bring both"
    warn_of_one_side(val[1], what, f"kto is judged on both: {more}")
    return *train, *val, hashes


def encode_judged(tok, judged):
    """[(judged completion, its Chat)] of a row's [(messages, completion, label)]."""
    found = []
    for single in judged:
        messages, text, _ = single
        ids = chat.encode_completion(tok, text, messages)
        found.append((single, make_completion(chat.encode_prompt(tok, messages), ids)))
    return found


def make_items(encoded, context, what):
    """(items, labels) of judged completions as `encode_judged` gives them.

    Those that exceed `context` are dropped. A completion to another prompt is cut to fit.
    """
    lengths, why = [len(document.ids) for _, document in encoded], f"which exceed {context} tokens"
    advice = f"fits into {context} tokens; give a larger --context if the model's reaches further"
    kept = chat.fitting(lengths, context, what, "completion", why, advice)
    judged, documents = zip(*[encoded[i] for i in kept])
    prompts = [rows.prompt_of([single]) for single in judged]
    asked = rows.questions([[single] for single in judged])
    # The first of its prompts stands for a question, so that those asked once are paired as ever
    first = dict(sorted(zip(asked, prompts, strict=True), reverse=True))
    others = other_prompts([(first[question], single[1]) for question, single in zip(asked, judged, strict=True)], what)
    items = []
    for document, i in zip(documents, others, strict=True):
        prompt, other = document.ids[~document.loss_mask], documents[i].ids[documents[i].loss_mask]
        items.append((document, make_completion(prompt, other[: context - len(prompt)])))
    return items, torch.tensor([float(label) for *_, label in judged])


def warn_of_one_side(labels, what, advice):
    """Warn if all completions are labelled good, or all bad."""
    if labels.min() == labels.max():
        side = "good" if labels[0] else "bad"
        print0(f"warning: {what}: all {len(labels)} completions are labelled {side}; {advice}")


def other_prompts(keys, what):
    """For each of keys, [(prompt, completion)], the index of a completion to another prompt.

    Each is taken once, unless one prompt has more than half of them; the order of the keys does not
    matter. Raises UserError if there is one prompt only.
    """
    prompts = sorted({prompt for prompt, _ in keys})
    if len(prompts) < 2:
        raise UserError(f"{what}: completions to one prompt only; kto compares with those to others")
    place = dict(zip(prompts, np.random.default_rng(0).permutation(len(prompts)), strict=True))
    order = sorted(range(len(keys)), key=lambda i: (place[keys[i][0]], keys[i][1]))
    [(largest, size)] = Counter(prompt for prompt, _ in keys).most_common(1)
    foreign = [i for i in order if keys[i][0] != largest]
    others = [0] * len(keys)
    for k, i in enumerate(order):  # those of a prompt are neighbours, so `size` further on is another
        others[i] = order[(k + size) % len(order)]
        if keys[others[i]][0] == keys[i][0]:
            others[i] = foreign[k % len(foreign)]
    return others
