"""What pretraining reads: documents, laid end to end as token streams and cut into pieces.

A stream is `eot document eot document ... eot`; of a tokenizer that begins documents with a token
of their own, as Llama 3's, `bos document eot bos document eot`. Piece [a, b) is trained on as
tokens [a, b) that predict tokens [a+1, b+1): a document begins with its bos or the eot before it,
and the last thing it predicts is the eot after it. A document longer than the context is cut into
windows. Every token is predicted once per epoch; nothing is dropped and nothing padded."""

import numpy as np
import torch

from data.clean import text_key
from data.pack import Chat, pack
from data.read import Document, file_kind, good_texts, named, part_of, read_text
from runtime.cli import print0
from runtime.errors import UserError


def read_documents(path, skip_bad=False):
    """The documents of a data file: the "text" of its rows, or a whole text file.

    Raises UserError naming the file, the line and what is wrong; with `skip_bad`, bad rows are left
    out and counted.
    """
    if file_kind(path) == "text":
        documents = [Document(read_text(path), path)]
    else:
        documents = list(good_texts(path, skip_bad))
    if not any(map(str.strip, documents)):
        raise UserError(f"{path}: there is no text in it")
    return documents


def hold_out(documents, fraction):
    """(train, val): the last `fraction` of the documents, or of the characters of a single one."""
    if len(documents) == 1:
        whole = documents[0]
        cut = int(len(whole) * (1 - fraction))
        return [part_of(whole, slice(None, cut))], [part_of(whole, slice(cut, None))]
    cut = min(len(documents) - 1, int(len(documents) * (1 - fraction)))
    return documents[:cut], documents[cut:]


def warn_of_shared_documents(train, val):
    """Print how many documents of `val` are in `train` too, as `text_key` compares them."""
    seen = set(map(text_key, train)) - {text_key("")}
    shared = sum(text_key(document) in seen for document in val)
    if shared:
        print0(
            f"warning: {shared:,} of the {len(val):,} documents to validate on are trained on too (case and white "
            "space aside): the validation loss will flatter; python -m data.prepare leaves out what is there twice"
        )


def encode(tok, documents, skip_bad=False):
    """The stream of some documents, int32 [T].

    Raises UserError naming the file and the line of one that cannot be tokenized; with `skip_bad`,
    it is left out with a line that says so.
    """
    parts, own_bos = [], tok.bos != tok.eot
    for document in documents:
        try:
            ids = tok.encode_ordinary(document)
        except UserError as e:
            if not skip_bad:
                raise UserError(named(document, e)) from None
            print0(f"{named(document, e)}; left out")
            continue
        parts.append(np.array([tok.bos, *ids, *[tok.eot] * own_bos], dtype=np.int32))
    return np.concatenate([*parts, np.array([tok.eot] * (not own_bos), dtype=np.int32)])


def pieces(streams, eot, context, first=0):
    """Where to cut: int64 [P, 3] of (stream, begin, end).

    Each piece lies within one document and has at most `context` tokens. first: the length of the
    first window of a document longer than the context (0: a whole one), so that other epochs see
    other windows.
    """
    found = []
    for s, stream in enumerate(streams):
        ends = np.flatnonzero(stream == eot)
        if stream[0] == eot:
            begin, end = ends[:-1], ends[1:]  # [documents]
        else:  # each begins with a bos of its own
            begin, end = np.append(0, ends[:-1] + 1), ends
        # a shorter first window is a whole one that begins before its document
        origin = np.where((end - begin > context) & (first > 0), begin + first - context, begin)
        windows = -(-(end - origin) // context)  # [documents], rounded up
        document = np.repeat(np.arange(len(begin)), windows)  # [windows]
        number = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)
        a = origin[document] + number * context
        b = np.minimum(a + context, end[document])
        found.append(np.stack([np.full(len(a), s), np.maximum(a, begin[document]), b], axis=1))
    return np.concatenate(found)


def epoch_pieces(streams, eot, context, random):
    """(pieces int64 [P, 3], their lengths [P]) of one epoch, whose windows `random` places."""
    cut = pieces(streams, eot, context, int(random.integers(1, context + 1)))
    return cut, cut[:, 2] - cut[:, 1]


def some_pieces(streams, eot, context, tokens):
    """Pieces to evaluate on: all, or a fixed random choice that holds about `tokens` tokens."""
    found = pieces(streams, eot, context)
    shuffled = np.random.default_rng(0).permutation(found)
    enough = np.searchsorted(np.cumsum(shuffled[:, 2] - shuffled[:, 1]), tokens) + 1
    return found if enough >= len(found) else shuffled[:enough]


def pack_pieces(streams, cut):
    """Pieces [n, 3] as one pack -> (pack, targets int64 [N])."""
    targets = np.concatenate([streams[s][a + 1 : b + 1] for s, a, b in cut]).astype(np.int64)
    return pack([streams[s][a:b] for s, a, b in cut]), torch.from_numpy(targets)


def piece_chats(streams, cut):
    """Pieces [n, 3] as Chats, of which every token but the first is trained."""
    documents = [np.asarray(streams[s][a : b + 1]) for s, a, b in cut]
    return [Chat(ids, np.arange(len(ids)) > 0) for ids in documents]
