"""Every file that the product writes, and locks that end with their process.

A file is replaced whole: if the process is killed, it is either the old one or the new one, and the
disk holds it; if two processes write it, it is that of the last. It keeps its owner and its mode,
and links are followed. What is there and is no regular file (/dev/null, a pipe), or is what the
process prints to, is written to, never replaced.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import sys
from pathlib import Path

from runtime.errors import UserError

LOCKS = []  # open while the process lives: closing a file gives its lock up
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}  # opened by name, a file they lead to would be emptied


def lock_file(path, out, flag="out"):
    """Hold `path`, in a folder that is made if it is missing, as the lock of `--flag=out`.

    Raises UserError if another process holds it, or it cannot be written.
    """
    try:
        make_folder(path)
        file = open(path, "w")
    except OSError as e:
        raise UserError(f"--{flag}={out}: {e.strerror}") from None
    if os.name != "posix":
        return  # fcntl is POSIX; on Windows two runs in one directory are the user's to avoid
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--{flag}={out}: another process is writing this run; wait for it or choose another --{flag}"
        ) from None
    except OSError as e:  # a file system without locks, say
        raise UserError(f"--{flag}={out}: it cannot be locked ({e.strerror}); choose another --{flag}") from None
    LOCKS.append(file)


def close_locks():
    """In a forked child: what a user's reward forks may outlive a run, and must not keep it locked.

    The run's own locks stay."""
    while LOCKS:
        LOCKS.pop().close()


if os.name == "posix":
    os.register_at_fork(after_in_child=close_locks)


def stream_of(path):
    """The descriptor of the standard output or error that `path` is, by whichever name (/dev/fd/1,
    the file that a shell has them go to); None: it is neither."""
    if str(path) in STREAMS:
        return STREAMS[str(path)]
    for descriptor in STREAMS.values():
        with contextlib.suppress(OSError):  # there is no such file, or the stream is closed
            found = os.stat(path)  # a device that is both, /dev/null say, is written to under its own name
            if stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def make_folder(path):
    """Make the folder in which the file `path` is, or the one that it leads to if it is a link."""
    Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)


def temporary_name(path):
    """Where a file is written before it takes the place of `path`, another name each time; None:
    `path` is no regular file, or one that is printed to.

    A link names the file that it leads to.
    """
    if stream_of(path) or os.path.exists(path) and not os.path.isfile(path):
        return None
    path = Path(os.path.realpath(path))
    # of the name only a part: names may have 255 bytes
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")


def check_writable(flag, path):
    """Raises UserError if the file that --`flag` names cannot be written: before the work, not
    after it."""
    if os.path.isdir(path):
        raise UserError(f"--{flag}={path}: is a directory; name a file")
    if os.path.exists(path) and os.path.exists(os.path.join(os.path.dirname(path), "config.json")):
        raise UserError(f"--{flag}={path}: is a file of a model; name another")
    try:
        make_folder(path)
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # a name that is too long, a link to itself
        if temporary := temporary_name(path):
            temporary.touch()
            temporary.unlink()
    except OSError as e:
        raise UserError(f"--{flag}={path}: {e.strerror}") from None


def check_apart(flag, path, others):
    """Raises UserError if the file that --`flag` names is one of the `others` that the same call
    reads or writes, and so would replace it."""
    if temporary_name(path) and os.path.realpath(path) in map(os.path.realpath, others):
        raise UserError(f"--{flag}={path}: is what is read or written besides; name another file")


@contextlib.contextmanager
def replace_file(path):
    """Open a binary file that takes the place of `path` when the block ends without an error.

    Its folder is made if it is missing. Raises UserError naming the path if it cannot be written.
    """
    temporary, before = temporary_name(path), None
    target = temporary or path
    if stream := stream_of(path):
        sys.stdout.flush()
        target = os.dup(stream)
    try:
        make_folder(path)
        if temporary and os.path.exists(path):
            before = os.stat(path)
        with open(target, "wb") as file:
            if before:
                os.chmod(temporary, 0o600)  # what comes next may be for no other eyes
            yield file
        if temporary:
            flush(temporary)
            if before:
                keep_owner_and_mode(temporary, before)
            os.replace(temporary, os.path.realpath(path))
            flush(temporary.parent)
    except BaseException as e:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if not isinstance(e, OSError):
            raise
        raise UserError(f"{path}: {e.strerror}") from None


def keep_owner_and_mode(path, before):
    """Give a file the owner and the mode of the one that it replaces, whose os.stat is `before`."""
    if os.name == "posix":
        with contextlib.suppress(OSError):  # only root may give a file to somebody else
            os.chown(path, before.st_uid, before.st_gid)
    os.chmod(path, stat.S_IMODE(before.st_mode))  # after the owner, which resets some of it


def replace_text(path, text):
    """Replace a file by a text, as UTF-8; what is no character is written as an escape."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def json_lines(rows, **options):
    """The text of a JSONL file: an object a line, letters of every alphabet as they are."""
    return "".join(json.dumps(row, ensure_ascii=False, **options) + "\n" for row in rows)


def write_json(path, value):
    """Replace a file by a value as indented JSON."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def append(path, data, size=None, sync=True):
    """Add bytes to the end of a file, or from its byte `size` on -> its new size.

    sync: have the disk hold them. Raises OSError, with the file's name.
    """
    try:
        with open(path, "ab") as file:
            if size is not None and file.tell() > size:
                file.truncate(size)  # a disk that filled up may have taken half of the last data
            file.write(data)
        if sync:
            flush(path)
        return os.path.getsize(path)
    except OSError as e:
        e.filename = str(path)  # one of `write` or `fsync` has none
        raise


def sha256(path):
    """Hex SHA-256 of a file; raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def flush(path):
    """Have the disk, not just the operating system, hold this file or directory.

    Nothing else can be flushed: a device, a pipe, a directory on Windows.
    """
    if not os.path.isfile(path) and (os.name == "nt" or not os.path.isdir(path)):
        return
    handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
