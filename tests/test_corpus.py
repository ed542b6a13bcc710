"""A corpus: what its documents are, how they become streams and pieces, what is held out."""

import re
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from data import corpus, tokenizer
from runtime.errors import UserError

quick = settings(deadline=None, derandomize=True, max_examples=60)
EOT = 0
STREAMS = st.lists(  # the lengths of each stream's documents
    st.lists(st.integers(0, 60), min_size=1, max_size=12), min_size=1, max_size=3
)


def streams_of(lengths):
    """eot document eot ... eot, each other token different from all others."""
    streams, token = [], 1
    for documents in lengths:
        ids = [EOT]
        for n in documents:
            ids += [*range(token, token + n), EOT]
            token += n
        streams.append(np.array(ids, dtype=np.int32))
    return streams


@quick
@given(STREAMS, st.integers(1, 20), st.data())
def test_every_token_is_predicted_exactly_once(lengths, context, data):
    first = data.draw(st.integers(0, context))
    streams = streams_of(lengths)
    found = corpus.pieces(streams, EOT, context, first)
    seen = [np.zeros(len(s), dtype=int) for s in streams]
    for s, a, b in found:
        assert 0 < b - a <= context and EOT not in streams[s][a + 1 : b]  # within one document
        seen[s][a + 1 : b + 1] += 1
    for counts in seen:
        assert counts[0] == 0 and (counts[1:] == 1).all()
    windows = [-(-(n + 1) // context) for documents in lengths for n in documents]
    assert sum(windows) <= len(found) <= sum(windows) + len(windows)
    assert first or len(found) == sum(windows)

    p, targets = corpus.pack_pieces(streams, found)
    assert len(p.tokens) == len(targets) == sum(len(s) - 1 for s in streams)
    inside = (p.positions[1:] > 0).nonzero()[:, 0]
    assert torch.equal(targets[inside], p.tokens[inside + 1])  # the targets are the next tokens
    chats = corpus.piece_chats(streams, found)
    trained = [token for chat in chats for token in chat.ids[chat.loss_mask]]
    assert trained == targets.tolist()


def test_epochs_have_other_windows():
    streams = streams_of([[40] * 30])
    random = np.random.default_rng(0)
    epochs = [corpus.epoch_pieces(streams, EOT, 16, random) for _ in range(5)]
    for cut, lengths in epochs:
        assert np.array_equal(lengths, cut[:, 2] - cut[:, 1]) and lengths.sum() == len(streams[0]) - 1
    assert len({tuple(lengths[:9]) for _, lengths in epochs}) > 1


@quick
@given(st.lists(st.text(max_size=30), min_size=1, max_size=9).filter(any), st.floats(0, 1))
def test_holding_out_loses_no_text(documents, fraction):
    train, val = corpus.hold_out(documents, fraction)
    assert "".join(train + val) == "".join(documents) and len(val) >= 1
    if len(documents) > 1:
        assert train + val == documents
        assert fraction == 0 or abs(len(val) - len(documents) * fraction) <= 1


def test_a_document_in_another_spelling_is_trained_on_too(capsys):
    first = "Un café à côté ?"
    val = [unicodedata.normalize("NFD", first), "un  CAFÉ à côté ?", "15", " "]
    corpus.warn_of_shared_documents([first, "1.5", ""], val)
    assert "2 of the 4 documents to validate on are trained on too" in capsys.readouterr().out


def test_a_stream_scans_back_to_its_documents():
    tok = tokenizer.byte_level()
    documents = ["", "a<|endoftext|>b", "ü😀\n", " "]  # a user's text never yields an eot
    stream = corpus.encode(tok, documents)
    ends = np.flatnonzero(stream == tok.eot)
    assert [tok.decode(part[1:].tolist()) for part in np.split(stream, ends[1:])[:-1]] == documents


def test_some_pieces_are_a_fixed_choice_of_about_so_many_tokens():
    streams = streams_of([[13] * 200, [5] * 100])
    every = corpus.pieces(streams, EOT, 8)
    for tokens in (1, 100, 1500):
        some = corpus.some_pieces(streams, EOT, 8, tokens)
        assert tokens <= (some[:, 2] - some[:, 1]).sum() < tokens + 8
        assert np.array_equal(some, corpus.some_pieces(streams, EOT, 8, tokens))
        different = {tuple(p) for p in some}
        assert len(different) == len(some) and different <= {tuple(p) for p in every}
    assert {s for s, *_ in corpus.some_pieces(streams, EOT, 8, 1500)} == {0, 1}  # of all streams
    assert np.array_equal(corpus.some_pieces(streams, EOT, 8, 10**6), every)


def write(path, data):
    path.write_bytes(data)
    return str(path)


def test_documents_are_read_as_they_are(tmp_path):
    text = write(tmp_path / "a.txt", "\ufeffüber\r\nalles".encode())
    assert corpus.read_documents(text) == ["über\r\nalles"]
    rows = write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": "", "x": 1}\n')
    assert corpus.read_documents(rows) == ["a", ""]


@pytest.mark.parametrize(
    "name, data, named",
    [
        ("b.jsonl", b'{"text": "a"}\n{"text": 3}\n', 'b.jsonl:2: no string "text"'),
        ("c.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'c.jsonl:2: no string "text" in this row; its fields: txt'),
        ("d.jsonl", b'{"text": "a"\n', "d.jsonl:1:"),
        ("e.jsonl", b"[]\n", "e.jsonl:1:"),
        ("f.txt", b"", "f.txt: there is no text in it"),
        ("g.jsonl", b'{"text": ""}\n', "g.jsonl: there is no text in it"),
        ("h.txt", b"good\nb\xffad", "h.txt:2: byte 6"),
    ],
)
def test_files_without_documents_are_refused(tmp_path, name, data, named):
    with pytest.raises(UserError, match=re.escape(named)):
        corpus.read_documents(write(tmp_path / name, data))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="absent.txt: No such file"):
        corpus.read_documents(str(tmp_path / "absent.txt"))
