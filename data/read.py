"""Read text and JSONL strictly: UTF-8 or an error that names the byte, one JSON object a line or an error that names the line.

A byte order mark at the head of a file is dropped; nothing else is changed, and nothing is left out unasked.
"""
import codecs, json

from common import UserError


def raw_lines(path):
    """Yield (line number, offset in the file, bytes) of every line, line ends kept: only b"\\n" ends one. UserError names a file that cannot be read."""
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
    """Yield (line number, text) of a UTF-8 file, line ends kept. UserError names the file, the line and the offset of a byte that is not UTF-8."""
    for number, offset, raw in raw_lines(path):
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}:{number}: byte {offset + e.start} of the file is not UTF-8 ({e.reason}); convert the file to UTF-8") from None


def read_text(path):
    """The whole of a UTF-8 file as one string. UserError as `read_lines`."""
    return "".join(text for _, text in read_lines(path))


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")  # Python's json would take NaN, Infinity and -Infinity


JSON = json.JSONDecoder(parse_constant=refuse_constant)


def parse_row(text):
    """One JSON object -> dict. ValueError or RecursionError says what is wrong with it."""
    row = JSON.decode(text)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    if "\\ud" in text.lower():  # an escaped half of a surrogate pair is legal JSON but no text: no encoder would take it
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    return row


def read_jsonl(path, skip_bad=False):
    """Yield (line number, row) for every line of a JSONL file that is not blank; every row is a dict.

    A line that is not UTF-8, not JSON or no object is a UserError `file:line: reason`; with `skip_bad` it is yielded as (line number, None): count it.
    """
    for number, _, raw in raw_lines(path):
        if not raw.strip():
            continue
        try:
            row = parse_row(raw.decode("utf-8").strip())
        except (ValueError, RecursionError) as e:
            if not skip_bad:
                reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
                raise UserError(f"{path}:{number}: {reason}; mend the line, or leave bad lines out with --skip_bad=True") from None
            row = None
        yield number, row
