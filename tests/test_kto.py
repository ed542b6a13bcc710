"""data/kto.py: a judged completion is paired with one to another prompt, and dropped for its own
length only."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from runs import write_rows

from data import kto, tokenizer
from runtime.errors import UserError

TOK = tokenizer.byte_level()


def judged(sizes):
    """Judged completions (messages, completion, label), so many to each prompt."""
    singles = []
    for q, size in enumerate(sizes):
        messages = [{"role": "user", "content": f"q{q}"}]
        singles += [(messages, f"answer {q}.{i}", i == 0) for i in range(size)]
    return singles


def texts(items):
    """[(prompt, completion, mismatched completion)] of items."""
    found = []
    for own, other in items:
        halves = [TOK.decode(side.ids.tolist()).split("<|im_start|>assistant\n") for side in (own, other)]
        assert halves[0][0] == halves[1][0]  # the prompt is this one's
        found.append((halves[0][0], *(half[1].removesuffix("<|im_end|>") for half in halves)))
    return found


def make_items(judged, context, what):
    return kto.make_items(kto.encode_judged(TOK, judged), context, what)


@pytest.mark.parametrize("sizes", [[1, 1], [2] * 5, [1] * 4 + [4], [8] * 6, [3, 1, 4, 1, 5, 9, 2, 6]])
def test_each_completion_is_once_that_of_another_prompt(sizes):
    items, labels = make_items(judged(sizes), 200, "data")
    found = texts(items)
    for _, own, mismatched in found:
        assert own.split(".")[0] != mismatched.split(".")[0]
    assert sorted(own for _, own, _ in found) == sorted(mismatched for *_, mismatched in found)
    assert labels.tolist() == [float(label) for *_, label in judged(sizes)]


def test_the_order_of_the_rows_changes_no_pair():
    singles = judged([4, 2, 3, 1])
    shuffled = [singles[i] for i in torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    first, second = (make_items(some, 200, "data")[0] for some in (singles, shuffled))
    assert sorted(texts(first)) == sorted(texts(second))


def test_where_one_prompt_has_most_rows_its_partners_are_taken_in_turn():
    found = texts(make_items(judged([9, 2, 1]), 200, "data")[0])
    partners = [mismatched for _, own, mismatched in found if own.startswith("answer 0")]
    assert all(not partner.startswith("answer 0") for partner in partners) and len(set(partners)) == 3
    assert max(map(partners.count, partners)) == 3


def test_another_spelling_or_system_message_is_no_other_prompt():
    def asked(i, content, system=""):
        return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": content}], i

    spellings, systems = ("What is {}+{}?", "what is {}+{}", "What  is {}+{}? "), ("Be brief.", "Be kind.", "Be right.")
    spelt = [asked(i, text.format(i, i)) for i in range(6) for text in spellings]
    told = [asked(i, f"What is {i}+{i}?", system) for i in range(6) for system in systems]
    for prompts in (spelt, told, told * 4):  # of the last, twelve ask the same
        singles = [(messages, f"{i}", n % 2 == 0) for n, (messages, i) in enumerate(prompts)]
        assert all(own != other for _, own, other in texts(make_items(singles, 200, "")[0]))


def test_completions_to_one_prompt_only_are_refused():
    with pytest.raises(UserError, match="file.jsonl: completions to one prompt only"):
        make_items(judged([5]), 200, "file.jsonl")


def test_a_row_is_dropped_for_its_own_length_only(capsys):
    """A short answer to a long prompt stays, however long the answers to other prompts are: those
    are cut behind it."""
    long, short = [{"role": "user", "content": "word " * 20}], [{"role": "user", "content": "q"}]
    singles = [(long, "yes", True), (long, "no", False), (short, "word " * 20, True), (short, "word " * 99, False)]
    items, labels = make_items(singles, 150, "data")
    assert labels.tolist() == [1, 0, 1] and "1 of 4" in capsys.readouterr().out
    for own, other in items:
        assert len(own.ids) <= 150 and len(other.ids) <= 150 and other.loss_mask.sum() >= 2
    assert any(len(other.ids) == 150 for _, other in items)


@dataclass
class Reading:
    """The flags of dpo.py that its data are read by."""

    data: str
    val: str = ""
    val_fraction: float = 0.05
    skip_bad: bool = False
    seed: int = 0


@pytest.mark.parametrize("label, side", [(True, "good"), (False, "bad")])
def test_labels_of_one_side_are_warned_of_by_their_file_and_with_what_helps_there(tmp_path, capsys, label, side):
    both = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(20)]
    one = [row | {"label": label} for row in both]
    # One-sided are: the training rows; those of --val; of the rows that a seed holds out, both
    data, same = (str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("both", both), ("one", one)))
    train = "kto learns from the difference: bring both, or fine-tune on good ones with sft.py"
    for flags, said in [
        ({"data": data, "val": data}, []),
        ({"data": same, "val": data}, [f"{same}: all 20 completions are labelled {side}; {train}"]),
        (
            {"data": data, "val": same},
            [f"--val={same}: all 20 completions are labelled {side}; kto is judged on both: bring both"],
        ),
        (
            {"data": same, "val_fraction": 0.2},
            [
                f"{same}: all 16 completions are labelled {side}; {train}",
                f"held out of {same}: all 4 completions are labelled {side}; kto is judged on both: "
                "raise --val_fraction, or give --val",
            ],
        ),
    ]:
        kto.read_items(Reading(**flags), TOK, 200)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if "are labelled" in line] == [f"warning: {text}" for text in said]


def test_items_of_files_share_no_prompt_with_those_held_out(tmp_path):
    rows = [{"prompt": f"q{q}", "completion": f"answer {q}.{i}", "label": i == 0} for q in range(20) for i in range(3)]
    flags = {"data": str(write_rows(tmp_path / "rows.jsonl", rows)), "val": "", "val_fraction": 0.2}
    train, labels, val, val_labels, hashes = kto.read_items(SimpleNamespace(**flags, skip_bad=False, seed=0), TOK, 200)
    assert not {prompt for prompt, *_ in texts(train)} & {prompt for prompt, *_ in texts(val)}
    assert (len(train), len(labels), len(val), len(val_labels)) == (48, 48, 12, 12) and list(hashes) == [flags["data"]]
