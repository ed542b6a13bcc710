"""The inputs of ../shared/cases that failed in the field: each is read as it is meant, or refused
in one line that names where and what. Run with -s, it prints the verdict of each."""

import json
import re

import pytest
from conftest import ROOT
from runs import here

from data import chat, corpus, prepare, rows, shards, tokenizer
from data.read import parse_mixture
from runtime.errors import UserError

CASES = ROOT.parent / "shared/cases"
BASE = CASES / "_base/step_000010"  # its link "latest" has become a file there
pytestmark = pytest.mark.skipif(not CASES.exists(), reason=f"{CASES} is not here")


@pytest.fixture(scope="module")
def tok():
    return tokenizer.load(BASE)


def data(case):
    return str(CASES / case / "data.jsonl")


def verdict(case, text):
    print(f"\n{case:<24} {text}")


def refusal(case, parse, named):
    """The line that refuses a case, which must name its file, its first line and `named`; under
    --skip_bad every row is left out, and counted."""
    with pytest.raises(UserError, match=re.escape(f"{data(case)}:1: ") + f".*{named}") as e:
        rows.read(data(case), parse)
    with pytest.raises(UserError, match=r"nothing in it but \d bad lines"):
        rows.read(data(case), parse, skip_bad=True)
    verdict(case, f"refused: {e.value}")


def marked(case, tok):
    """The first conversation of a case as sft.py trains it, trained tokens between guillemets."""
    conversations, _ = rows.read(data(case), rows.conversation)
    text = chat.marked(tok, chat.encode(tok, conversations[0]))
    verdict(case, f"read: {text!r}")
    return text


@pytest.mark.parametrize(
    "case, parse, named",
    [
        ("reasoning_content", rows.conversation, '"messages\\[1\\].reasoning_content"'),
        ("tool_calls", rows.conversation, '"tools"'),
        ("assistant_prefill", rows.conversation, '"prompt" ends with a message of the assistant'),
        ("prompt_in_answer", rows.preference, '"chosen" and "rejected" begin with the "prompt"'),
    ],
)
def test_what_is_not_read_is_refused(capsys, case, parse, named):
    refusal(case, parse, named)


def test_a_system_column_is_read(tok):
    assert "<|im_start|>system\nAnswer in capitals.<|im_end|>" in marked("row_system_sharegpt", tok)
    pair = rows.read(data("row_system_dpo"), rows.preference)[0][0]
    verdict("row_system_dpo", f"read: {pair.prompt}")
    assert pair.prompt[0] == {"role": "system", "content": "Answer in capitals."}


def test_a_message_of_weight_0_is_not_trained(tok):
    text = marked("message_mask", tok)
    assert "\nWRONG<|im_end|>" in text and text.count("«") == 1 and text.endswith("«1<|im_end|>»")


def test_a_question_is_a_prompt():
    pair = rows.read(data("pair_orca"), rows.preference)[0][0]
    verdict("pair_orca", f"read: {pair.prompt}")
    assert pair.prompt == [{"role": "user", "content": "0?"}]


@pytest.mark.parametrize("suffix", ["json", "ndjson"])
def test_rows_are_no_text(tmp_path, suffix):
    case = f"pretrain_{suffix}_as_text"
    path = tmp_path / f"c.{suffix}"
    path.write_bytes((CASES / case / "data.jsonl").read_bytes())
    documents = corpus.read_documents(str(path))
    verdict(case, f"read: {len(documents)} documents, the first {documents[0]!r}")
    assert documents[0].startswith("the quick brown fox number 0 ") and len(documents) == 40


def test_paths_have_colons(tmp_path):
    windows = r"C:\data\chat.jsonl"
    assert parse_mixture(windows) == [(windows, 0.0)]
    (tmp_path / "run 12:30").mkdir()
    path = tmp_path / "run 12:30/data.jsonl"
    path.write_bytes((CASES / "windows_path/data.jsonl").read_bytes())
    conversations, _ = rows.read(str(path), rows.conversation)
    verdict("windows_path", f"read: {len(conversations)} conversations of {path.parent.name}/{path.name}")
    assert len(conversations) == 3


def test_a_document_that_cannot_be_tokenized_costs_itself(tmp_path, tok, capsys):
    texts = [f"document {i} has some words of its own and then a few more of them to be kept" for i in range(60)]
    texts[30] += " " * 600_000 + "end"
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = prepare.Config(data=str(path), tokenizer=str(BASE), out=str(tmp_path / "out"))
    config.dedup = "none"
    with pytest.raises(UserError, match=re.escape(f"{path}:31: ") + ".*--skip_bad") as e:
        here(prepare.main, config)
    config.skip_bad = config.overwrite = True
    here(prepare.main, config)
    assert f"{path}:31: " in capsys.readouterr().out
    manifest = shards.load_manifest(config.out)
    verdict("long_space_unnamed", f"left out, and 59 documents written; without --skip_bad: {e.value}")
    assert manifest["documents_out"] == 59 and manifest["rules"]["bad_line"] == 1


def test_an_array_of_messages_is_a_conversation(tok):
    assert marked("advice_nanochat", tok) == "<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\n«x<|im_end|>»"
    assert len(rows.read(data("advice_nanochat"), rows.conversation)[0]) == 3


def test_an_answer_keeps_its_indentation(tok):
    assert "«    return 1<|im_end|>»" in marked("code_indent", tok)
