"""Read text and JSONL strictly: UTF-8 or an error naming the byte, one object per line or its line.

A byte order mark at the head of a file is dropped. Nothing else is changed, and nothing is left out
unless the user asks for it.
"""

import codecs
import itertools
import json
import math
import re
import reprlib
from pathlib import Path

from runtime.errors import UserError

LARGEST_JSON = 2**25  # bytes; the largest tokenizer.json in use has 28 million. More is an attack


def raw_lines(path):
    """Yield (line number, offset in the file, bytes) of every line, with its end, which is b"\\n".

    Raises UserError naming a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(offset)
            for number, raw in enumerate(file, 1):
                yield number, offset, raw
                offset += len(raw)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def read_lines(path):
    """Yield (line number, text) of every line of a UTF-8 file, with its end.

    Raises UserError naming the file, the line and the offset of a byte that is not UTF-8.
    """
    for number, offset, raw in raw_lines(path):
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UserError(
                f"{path}:{number}: byte {offset + e.start} of the file is not UTF-8 ({e.reason}); "
                "convert the file to UTF-8"
            ) from None


def read_text(path):
    """The whole of a UTF-8 file as one string; raises UserError as `read_lines` does."""
    return "".join(text for _, text in read_lines(path))


def read_json(path):
    """The JSON object in a file.

    Raises UserError if the file is missing, broken, larger than LARGEST_JSON or not a plain file (a
    device, a pipe).
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path}: not a plain file, so no JSON is read from it")
        if size > LARGEST_JSON:
            raise UserError(f"{path}: {size} bytes, more than {LARGEST_JSON}, so no JSON is read from it")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); download or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def inside(file, name):
    """The path of `name`, which `file` mentions, in the folder of that file or below.

    Raises UserError if it would lead elsewhere, or is not a name.
    """
    path = Path(name) if isinstance(name, str) and name.isprintable() else Path()
    if path.as_posix() != name or path.anchor or ".." in path.parts or not path.parts:
        raise UserError(
            f"{file}: {reprlib.repr(name)} is not the name of a file in its folder; this file is damaged or hostile"
        )
    return Path(file).parent / path


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")  # Python's json would take NaN, Infinity and -Infinity


JSON = json.JSONDecoder(parse_constant=refuse_constant)


def parse_row(text):
    """One JSON object -> dict; raises ValueError or RecursionError saying what is wrong with it."""
    if text.startswith("["):  # as in Alpaca's and ShareGPT's files
        raise ValueError(
            "a JSON object was expected, not list (write an array's objects one per line, with jq -c '.[]' FILE)"
        )
    row = JSON.decode(text)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    if "\\ud" in text.lower():  # an escaped half of a surrogate pair is JSON, but no encoder takes it
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    return row


def read_jsonl(path, skip_bad=False):
    """Yield (line number, row) for every line of a JSONL file that is not blank; rows are dicts.

    Raises UserError `file:line: reason` for a line that is not UTF-8, not JSON or not an object;
    with `skip_bad`, yields (line number, None) for it.
    """
    for number, _, raw in raw_lines(path):
        if not raw.strip():
            continue
        try:
            row = parse_row(raw.decode("utf-8").strip())
        except (ValueError, RecursionError) as e:
            if not skip_bad:
                reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
                raise UserError(
                    f"{path}:{number}: {reason}; correct the line, or leave bad lines out with --skip_bad=True"
                ) from None
            row = None
        yield number, row


def parse_mixture(text):
    """The value of a --data flag -> [(name, weight), ...], weight 0 if none is given.

    For example a.jsonl:0.7,hf:NAME[configuration,split,rows]:0.3. Raises UserError naming the piece
    that does not parse, a name given twice, or a source that lacks a weight while another has one.
    """
    sources = []
    for piece in re.split(r",(?![^\[]*\])", text):  # a comma within [...] belongs to the name
        hub = "hf:" if piece.startswith("hf:") else ""
        name, colon, weight = piece.removeprefix(hub).partition(":")
        if colon and not (re.fullmatch(r"\d+\.?\d*|\.\d+", weight) and 0 < float(weight) < math.inf):
            raise UserError(f"--data: {piece!r}: the weight {weight!r} is not a positive number")
        sources.append((hub + name, float(weight or 0)))
    names = [name for name, _ in sources]
    for name, weight in sources:
        if not weight and any(w for _, w in sources):
            raise UserError(f"--data: {name} has no weight; give one to every source or to none")
        if names.count(name) > 1:
            raise UserError(f"--data: {name} is named twice; a larger share is a larger weight")
    return sources


def without_nulls(row):
    return {name: value for name, value in row.items() if value is not None}


def hub_rows(name):
    """Yield the rows of hf:NAME[configuration,split,rows] of Hugging Face, as dicts without nulls.

    The defaults are the default configuration, train, and all rows.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: needs the package `datasets`: pip install -e '.[data]'") from None
    parts = re.split(r"[\[,]", name.removeprefix("hf:").rstrip("]"))
    repository, configuration, split, rows = (parts + ["", "", ""])[:4]
    try:
        stream = datasets.load_dataset(repository, configuration or None, split=split or "train", streaming=True)
        yield from map(without_nulls, itertools.islice(stream, int(rows) if rows else None))
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{name}: {e!r}") from None


def parquet_rows(path):
    """Yield the rows of a Parquet file as dicts, without nulls, for each row has every column."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: needs the package `pyarrow`, which comes with pip install -e '.[data]'") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from map(without_nulls, batch.to_pylist())
    except (OSError, ValueError) as e:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{path}: cannot be read as Parquet ({e})") from None


def read_rows(name, skip_bad=False):
    """Yield (line number, row) of a .jsonl or .parquet file or of hf:NAME[...].

    With `skip_bad`, a bad line yields (line number, None). Raises UserError if `name` is something
    else, for example a checkpoint.
    """
    path = Path(name)
    if name.startswith("hf:"):
        yield from enumerate(hub_rows(name), 1)
    elif path.is_dir():
        checkpoint = (path / "config.json").exists() or any(path.glob("step_*"))
        raise UserError(
            f"{name}: {'a checkpoint' if checkpoint else 'a directory'}, but a .jsonl or .parquet file was expected"
        )
    elif path.suffix == ".parquet":
        yield from enumerate(parquet_rows(path), 1)
    elif path.suffix in (".jsonl", ".json"):
        yield from read_jsonl(name, skip_bad)
    else:
        raise UserError(f"{name}: expected FILE.jsonl, FILE.parquet or hf:NAME")


def read_texts(name, skip_bad=False):
    """Yield the "text" of every row of a .jsonl or .parquet file or of hf:NAME[...].

    Raises UserError naming the file and the line of a row without it; with `skip_bad`, yields None.
    """
    for line, row in read_rows(name, skip_bad):
        text = row.get("text") if row else None
        if isinstance(text, str):
            yield text
        elif skip_bad:
            yield None
        else:
            raise UserError(f'{name}:{line}: no string "text" in this row; its fields: {", ".join(row) or "none"}')
