"""Files that are either the old or the new one, whole, and locks that end with their process."""

import hashlib
import json
import os
from pathlib import Path

from runtime.errors import UserError

LOCKS = []  # open while the process lives: closing a file gives its lock up


def lock_file(path, out):
    """Hold `path` as the lock of `--out=out`; raises UserError if another process holds it."""
    if os.name != "posix":
        return  # fcntl is POSIX; on Windows two runs in one directory are the user's to avoid
    import fcntl

    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"--out={out}: another process is writing this run; wait for it or choose another --out"
        ) from None
    LOCKS.append(file)


def replace_text(path, text):
    """Write a text file so that, if killed, `path` is either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, value):
    """`replace_text` of a JSON value."""
    replace_text(Path(path), json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256(path):
    """Hex SHA-256 of a file; raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def flush(path):
    """Have the disk, not just the operating system, hold this file or directory."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows cannot open a directory
    handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
