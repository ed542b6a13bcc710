"""Cases of the field's bug reports about chat templates and conventions (../shared/cases, kinds B
and C)."""

import io
import json
import shutil

import pytest
from conftest import ROOT

import evaluate
import sample
from data import chat, rows, tokenizer
from data.read import read_texts
from data.rows import message
from runtime import checkpoint

CASES = ROOT.parent / "shared/cases"
AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
pytestmark = pytest.mark.skipif(not CASES.exists(), reason=f"{CASES} is not here")


def test_instruct_sample(monkeypatch, capsys):
    """A downloaded chat model answers a line on stdin."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is 2 + 3?\n")))
    sample.main(sample.Config(model=str(CASES / "_q3"), temperature=0.0, max_new_tokens=40, device="cpu"))
    assert "<answer>5</answer>" in capsys.readouterr().out


def test_default_system(tmp_path):
    folder = shutil.copytree(CASES / "_q3", tmp_path / "m")
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{'<|im_start|>system\nYou are Kiwi.<|im_end|>\n'}}{% endif %}"
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
    )
    (folder / "chat_template.jinja").chmod(0o600)
    (folder / "chat_template.jinja").write_text(theirs.chat_template)
    messages = [message("user", "hi")]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat.encode_prompt(tokenizer.load(folder), messages) == ids


def test_bos():
    """Nats per token of documents that begin with Llama 3's <|begin_of_text|>."""
    model, tok, _ = checkpoint.load(CASES / "_ll3")
    totals = evaluate.document_nats(model, tok, list(read_texts(str(CASES / "bos/va.jsonl"))), 4096).sum(0)
    assert totals[0] / totals[1] == pytest.approx(4.2732, abs=1e-4)  # transformers'


def test_export_eos(tmp_path):
    model, tok, _ = checkpoint.load(CASES / "_base")
    folder = checkpoint.save(tmp_path, model, tok, {"stage": "sft", "step": 1})
    found = [json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    assert {c["eos_token_id"] for c in found} == {AutoTokenizer.from_pretrained(folder).eos_token_id} == {259}


def test_think_ids():
    """Qwen3's <think> is one token, which text yields."""
    (messages, _), _ = rows.read(str(CASES / "think_ids/data.jsonl"), rows.conversation)
    tok, theirs = tokenizer.load(CASES / "_q3"), AutoTokenizer.from_pretrained(CASES / "_q3")
    found = chat.encode(tok, messages)
    assert found.ids.tolist() == theirs.apply_chat_template(messages)["input_ids"]
    think = tok.encode_single_token("<think>")
    assert found.loss_mask[found.ids.tolist().index(think)]
    assert "<think>" in chat.decode_completion(tok, found.ids[found.loss_mask].tolist())
