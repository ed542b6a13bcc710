"""The one reader of data files: text, JSON and Parquet, strict, the same in every script.

What a file is follows from its name, in any case: .jsonl, .ndjson and .json (an object per line,
one array, or objects that span lines; an array of messages is a conversation), .parquet, each of
them packed by gzip or not; else it is text. A text whose first line is a JSON object is read as
JSON. Text is UTF-8, or an error names the byte; a bad row is an error that names its line. A byte
order mark at the head of a file is dropped. Nothing else is changed, and nothing is left out unless
the user asks for it.
"""

import codecs
import gzip
import itertools
import json
import math
import os
import re
import reprlib
import zlib
from pathlib import Path

from runtime.cli import print0
from runtime.errors import UserError

LARGEST_JSON = 2**25  # bytes; the largest tokenizer.json in use has 28 million. More is an attack
JSON_SUFFIXES = {".json", ".jsonl", ".jsonlines", ".ndjson"}
LONG_SPACE = 500_000  # white-space characters in a row; a million overflow the stack of tiktoken's regex engine
LOOK = 8192  # bytes at the head of a file, of which text has none of value 0
TABLES = {".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather"}
POINTER = b"version https://git-lfs"  # what stands for a file that Git LFS has not fetched
PACKED = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}


class Document(str):
    """A text that knows its place, "file:line", for messages about it."""

    def __new__(cls, text, place=""):
        found = super().__new__(cls, text)
        found.place = place
        return found


def part_of(text, span):
    """text[span], which stands where the whole does."""
    return Document(text[span], text.place) if isinstance(text, Document) else text[span]


def named(text, error):
    """What is wrong with a text, after the place where it stands, if that is known."""
    return f"{text.place}: {error}" if isinstance(text, Document) else str(error)


def raw_lines(path):
    """Yield (line number, offset in the file, bytes) of every line, with its end, which is b"\\n".

    A file packed by gzip is unpacked. Raises UserError naming a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            offset = 0
            for number, raw in enumerate(gzip.GzipFile(fileobj=file) if packed else file, 1):
                if number == 1 and raw.startswith(codecs.BOM_UTF8):
                    raw, offset = raw[3:], 3
                yield number, offset, raw
                offset += len(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{path}: damaged gzip data ({e}); download or pack it again") from None
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
        value = json.loads(path.read_text(encoding="utf-8-sig"))
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


def object_of(pairs):
    """The dict of a JSON object; raises ValueError if a key is there twice: one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" is in an object twice')
    return found


def finite(text):
    """The float that a JSON number is; raises ValueError for one as large as 1e400, which would be
    written again as Infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


JSON = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=object_of)
GRAMMAR = json.JSONDecoder()  # of JSON alone: what JSON refuses besides, it takes
SPACE = re.compile(r"\s*")
CONTENT = {"content", "value", "text", "tool_calls"}


def decode_json(text):
    """The value of a JSON text; raises ValueError or RecursionError saying what is wrong."""
    value = JSON.decode(text)
    if "\\ud" in text.lower():
        check_surrogates(value)
    return value


def check_surrogates(value):
    """Raises ValueError for half of a surrogate pair: escaped, it is JSON, but no text."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def parse_row(text):
    """One JSON object -> dict; raises ValueError or RecursionError saying what is wrong with it."""
    row = decode_json(text)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    return row


def is_message(value):
    """Whether a JSON value is {"role", "content"} or ShareGPT's {"from", "value"}."""
    return isinstance(value, dict) and len({"role", "from"} & set(value)) == 1 and bool(CONTENT & set(value))


def rows_of(value):
    """The rows in a JSON value: an object is one, and so is an array of messages.

    Any other array holds rows. Raises ValueError if it does not.
    """
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(item, (dict, list)) for item in value):
        raise ValueError(f"a JSON object was expected, not {type(value).__name__}")
    if all(map(is_message, value)):  # nanochat writes a conversation so
        return [{"messages": value}]
    return [row for item in value for row in rows_of(item)]


def array_items(text, at):
    """([(offset, value)], offset of the end) of the JSON array that begins at text[at]."""
    items, at = [], skip_space(text, at + 1)
    while text[at : at + 1] != "]" or items:
        value, end = JSON.raw_decode(text, at)
        items.append((at, value))
        at = skip_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = skip_space(text, at + 1)
    return items, at + 1


def skip_space(text, at):
    return SPACE.match(text, at).end()


def spanning_values(text):
    """Yield (line number, value) of JSON that spans lines: the items of an array, or objects.

    Raises ValueError or RecursionError at the first value that is not JSON.
    """
    line, at, end = 1, 0, skip_space(text, 0)
    while end < len(text):
        if text[end] == "[":
            items, after = array_items(text, end)
        else:
            value, after = JSON.raw_decode(text, end)
            items = [(end, value)]
        values = [value for _, value in items]
        if text[end] == "[" and all(map(is_message, values)):
            items = [(end, values)]
        for begin, value in items:
            line, at = line + text.count("\n", at, begin), begin
            yield line, value
        end = skip_space(text, after)


def spans_lines(path):
    """Whether the JSON values of a file span lines: its first line is no JSON, and neither are the
    lines after it; or it is not, but with later ones it is."""
    if not os.path.isfile(path):  # a pipe can be read but once
        return False
    begin = [raw for _, _, raw in itertools.islice(raw_lines(path), 5) if raw.strip()]
    if not begin or begin[0].strip()[:1] not in (b"{", b"[") or is_json(begin[0]):
        return False
    if begin[0].strip() in (b"{", b"[") or len(begin) > 1 and not any(map(is_json, begin[1:])):
        return True
    return "\n" in first_value(path)[1]


def is_json(raw):
    """Whether a line follows JSON's grammar: what is refused besides, as a key that is there twice,
    is the fault of one row."""
    try:
        GRAMMAR.decode(raw.decode("utf-8", "replace").strip())
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass
    return True


def first_value(path):
    """(the JSON value that a file begins with, its text); (None, "") if it begins with none.

    Reads as far as the value goes, or as what is there may be one.
    """
    for text in heads(path):
        begin = skip_space(text, 0)
        try:
            value, end = GRAMMAR.raw_decode(text, begin)
            return value, text[begin:end]
        except json.JSONDecodeError as e:
            if text[e.pos :].strip():  # a fault; at the end of the text, the value may go on
                break
        except (ValueError, RecursionError):
            break
    return None, ""


def heads(path):
    """Yield the head of a file, in whole lines, and each time twice as much of it, up to all."""
    lines, size, due = [], 0, LOOK
    for _, _, raw in raw_lines(path):
        lines.append(raw)
        size += len(raw)
        if size >= due:
            yield b"".join(lines).decode("utf-8", "replace")
            due = 2 * size
    yield b"".join(lines).decode("utf-8", "replace")


def reason(error):
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def read_jsonl(path, skip_bad=False):
    """Yield (line number, row) for every row of a JSON file; rows are dicts.

    Raises UserError `file:line: reason` for a line that is not UTF-8, not JSON or has no rows; with
    `skip_bad`, yields (line number, None) for it.
    """
    for number, value in spanning_lines(path) if spans_lines(path) else json_lines(path, skip_bad):
        try:
            found = rows_of(value)
        except (ValueError, RecursionError) as e:
            if not skip_bad:
                raise bad_row(f"{path}:{number}", reason(e)) from None
            found = [None]
        for row in found:
            yield number, row


def json_lines(path, skip_bad):
    """Yield (line number, value) of every line that is not blank, None of a bad one."""
    for number, _, raw in raw_lines(path):
        if not raw.strip():
            continue
        value = None
        try:
            value = decode_json(raw.decode("utf-8").strip())
        except (ValueError, RecursionError) as e:
            if not skip_bad:
                raise bad_row(f"{path}:{number}", reason(e)) from None
        yield number, value


def spanning_lines(path):
    """`spanning_values` of a file; a fault is an error always, for nothing after it can be read."""
    text, number = read_text(path), 1
    surrogates = "\\ud" in text.lower()
    try:
        for number, value in spanning_values(text):
            if surrogates:
                check_surrogates(value)
            yield number, value
    except (ValueError, RecursionError) as e:
        number = getattr(e, "lineno", number)
        raise UserError(
            f"{path}:{number}: {reason(e)}; correct it, or write an object a line, where --skip_bad=True can help"
        ) from None


def bad_row(place, reason):
    """The UserError for a row that cannot be read."""
    return UserError(f"{place}: {reason}; correct the line, or leave bad lines out with --skip_bad=True")


def split_weight(piece):
    """(name, weight) of NAME:WEIGHT, weight 0 if there is none.

    A path may have colons: only a number after the last one is a weight, and not even that if a
    file has the whole name. Raises UserError if the weight of a data file is no positive number.
    """
    piece = piece.strip()
    hub = "hf:" if piece.startswith("hf:") else ""
    name, colon, weight = piece.removeprefix(hub).rpartition(":")
    weight = weight.strip()
    number = re.fullmatch(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", weight, re.ASCII)
    data_file = name.endswith("]") or suffix(name) in {".txt", ".parquet", *JSON_SUFFIXES}  # a.jsonl:much
    meant = data_file and not re.search(r"[/\\.]", weight)
    if not colon or not (number or meant) or os.path.exists(piece):
        return piece, 0.0
    if not number or not 0 < float(weight) < math.inf:
        raise UserError(f"--data: {piece!r}: the weight {weight!r} is not a positive number")
    return hub + name, float(weight)


def parse_mixture(text):
    """The value of a --data flag -> [(name, weight), ...], weight 0 if none is given.

    For example a.jsonl:0.7,hf:NAME[configuration,split,rows]:0.3. Raises UserError naming the piece
    that does not parse, a name given twice, or a source that lacks a weight while another has one.
    """
    sources = [split_weight(piece) for piece in re.split(r",(?![^\[]*\])", text)]  # [a,b] belongs to a name
    names = [name for name, _ in sources]
    for name, weight in sources:
        if not weight and any(w for _, w in sources):
            raise UserError(f"--data: {name} has no weight; give one to every source or to none")
        if names.count(name) > 1:
            raise UserError(f"--data: {name} is named twice; a larger share is a larger weight")
    return sources


def source_names(text, flag):
    """The sources of a flag that takes all of each: raises UserError naming one with a weight."""
    sources = parse_mixture(text) if text else []
    for name, weight in sources:
        if weight:
            raise UserError(
                f"--{flag}: {name} has the weight {weight:g}, but all of it is read; leave that out, or mix with "
                "data/prepare.py"
            )
    return [name for name, _ in sources]


def is_null(value):
    """Whether a value of a table is none; pandas writes nan for it."""
    return value is None or isinstance(value, float) and math.isnan(value)


def without_nulls(row):
    return {name: value for name, value in row.items() if not is_null(value)}


def one_line(error):
    """What a library's exception says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


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
    except Exception as e:  # for one that is made by a script it is a RuntimeError
        raise UserError(f"{name}: {one_line(e)}") from None


def parquet_rows(path):
    """Yield the rows of a Parquet file as dicts, without nulls, for each row has every column."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: needs the package `pyarrow`, which comes with pip install -e '.[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):  # to_pylist keeps the last of them
            raise ValueError(f"{max(names, key=names.count)!r} is the name of several columns")
        for batch in file.iter_batches():
            yield from map(without_nulls, batch.to_pylist())
    except Exception as e:  # a date may be an OverflowError, for example
        raise UserError(f"{path}: cannot be read as Parquet ({one_line(e)})") from None


def suffix(name):
    """The suffix of a file's name in small letters, without that of gzip."""
    return Path(str(name).lower().removesuffix(".gz")).suffix


def file_kind(name):
    """What a source is: "hub", "parquet", "json" or "text".

    Raises UserError if it is something else: a directory, a table, a file packed by another program
    than gzip.
    """
    name = str(name)
    if name.startswith("hf:"):
        return "hub"
    if not name or suffix(name) in TABLES:
        raise UserError(f"{name!r}: expected FILE.txt, FILE.jsonl, FILE.parquet or hf:NAME")
    if os.path.isdir(name):
        checkpoint = os.path.exists(f"{name}/config.json") or any(Path(name).glob("step_*"))
        raise UserError(
            f"{name}: {'a checkpoint' if checkpoint else 'a directory'}, but a .jsonl or .parquet file was expected"
        )
    if not os.path.exists(name) and (re.search(r"[*?;]|://", name) or not suffix(name)):
        raise UserError(
            f"{name}: No such file or directory; FILE or hf:NAME was expected, several separated by commas: patterns "
            "and addresses are not read"
        )
    head = first_line(name)
    if head.startswith(POINTER):
        raise UserError(f"{name}: a pointer of Git LFS, not the file itself; fetch that with git lfs pull")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name}: in UTF-16 (or 32), which is not read; convert the file to UTF-8")
    for magic, packer in PACKED.items():
        if head.startswith(magic):
            raise UserError(f"{name}: packed by {packer}, which is not read; unpack it")
    if head.startswith(b"PAR1") or suffix(name) in (".parquet", ".pq"):
        return "parquet"
    if suffix(name) in JSON_SUFFIXES or head.strip()[:1] in (b"{", b"[") and holds_objects(name):
        return "json"
    if b"\0" in head[:LOOK]:
        raise UserError(
            f"{name}: holds bytes of value 0, so it is no text; expected FILE.txt, FILE.jsonl or FILE.parquet"
        )
    return "text"


def first_line(path):
    """The first line of a plain file that is not blank; b"" of a pipe, which is read but once."""
    if os.path.exists(path) and not os.path.isfile(path):
        return b""
    return next((raw for _, _, raw in raw_lines(path) if raw.strip()), b"")


def holds_objects(path):
    """Whether a text begins with a JSON object, in its first line or over several."""
    value, _ = first_value(path)
    try:
        return bool(rows_of(value[0] if isinstance(value, list) and value else value))
    except (ValueError, RecursionError):
        return False


def read_rows(name, skip_bad=False):
    """Yield (line number, row) of a JSON or Parquet file or of hf:NAME[...].

    With `skip_bad`, a bad line yields (line number, None). Raises UserError if `name` is something
    else, for example a checkpoint.
    """
    kind = file_kind(name)
    if kind == "hub":
        yield from enumerate(hub_rows(name), 1)
    elif kind == "parquet":
        yield from enumerate(parquet_rows(name), 1)
    elif kind == "json":
        yield from read_jsonl(name, skip_bad)
    else:
        raise UserError(f"{name}: expected FILE.jsonl, FILE.parquet or hf:NAME, but this is text")


def good_texts(name, skip_bad):
    """`read_texts` without bad rows, whose number is printed."""
    bad = 0
    for text in read_texts(name, skip_bad):
        if text is None:
            bad += 1
        else:
            yield text
    if bad:
        print0(f"{name}: {bad} bad lines left out")


def read_texts(name, skip_bad=False):
    """Yield the "text" of every row of a JSON or Parquet file or of hf:NAME[...], as Documents.

    Raises UserError naming the file and the line of a row without it; with `skip_bad`, yields None.
    """
    for line, row in read_rows(name, skip_bad):
        text = row.get("text") if row else None
        if isinstance(text, str):
            yield Document(text, f"{name}:{line}")
        elif skip_bad:
            yield None
        else:
            hint = "; sft.py reads conversations" if "messages" in row else ""
            fields = ", ".join(row) or "none"
            raise bad_row(f"{name}:{line}", f'no string "text" in this row; its fields: {fields}{hint}')
