"""Every file is written by runtime/files.py: whole or not at all, through links, into devices and
pipes, and nowhere else in the product."""

import ast
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runs import null_device

from bench.house import product_files
from runtime import files
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and devices of POSIX")


def read_pipe(path):
    """A thread that reads a named pipe to its end, and the list that gets what it read."""
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, found


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"ü": 1})
    assert path.read_text("utf-8") == '{\n "ü": 1\n}\n' and os.listdir(tmp_path) == ["a.json"]

    class Killed(BaseException):
        pass

    def killed(path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", killed)
        with pytest.raises(Killed):
            files.replace_text(path, "new")
    assert path.read_text("utf-8").startswith("{")
    files.replace_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(small_disk):
    path = small_disk(64) / "a.txt"
    files.replace_text(path, "old")
    with pytest.raises(UserError, match="a.txt: No space left on device"):
        files.replace_text(path, "x" * 2**17)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]


def test_whatever_ends_the_writing_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    files.replace_text(path, "old")
    for error in (UserError("this cannot be written"), KeyboardInterrupt()):
        with pytest.raises(type(error)), files.replace_file(path) as file:
            file.write(b"new")
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_named_by_what_is_appended(small_disk):
    path = small_disk(64) / "a.bin"
    with pytest.raises(OSError) as raised:
        files.append(path, b"x" * 2**17)
    assert raised.value.filename == str(path)


def test_the_disk_holds_the_file_before_it_takes_its_place(tmp_path, monkeypatch):
    events, replace, flush = [], os.replace, files.flush
    monkeypatch.setattr(files, "flush", lambda path: events.append(("flush", path.name)) or flush(path))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(("replace", a.name)) or replace(a, b))
    files.replace_text(tmp_path / "a", "text")
    temporary = events[0][1]
    assert temporary.startswith(".a.") and temporary.endswith(".tmp")
    assert events == [("flush", temporary), ("replace", temporary), ("flush", tmp_path.name)]
    assert files.append(tmp_path / "a", b"+1") == 6 and events[-1] == ("flush", "a")
    assert files.append(tmp_path / "a", b"!", size=4, sync=False) == 5 and len(events) == 4
    assert (tmp_path / "a").read_bytes() == b"text!"


@posix
def test_links_lead_to_the_file(tmp_path):
    (tmp_path / "real").mkdir()
    for name, there in (("new", False), ("old", True)):
        target, link, second = tmp_path / "real" / name, tmp_path / f"{name}.link", tmp_path / f"{name}.second"
        if there:
            target.write_text("old")
        link.symlink_to(Path("real") / name)
        second.symlink_to(link.name)
        files.check_writable("out", second)
        assert target.exists() == there
        files.replace_text(second, "text")
        assert second.is_symlink() and link.is_symlink() and target.read_text() == "text"
        files.append(second, b" and more")
        assert target.read_text() == "text and more"
    assert sorted(os.listdir(tmp_path / "real")) == ["new", "old"]


@posix
def test_devices_and_pipes_are_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files.check_writable("out", pipe)  # opening it would end its reader
    for write in (lambda: files.replace_text(pipe, "text"), lambda: files.append(pipe, b"text")):
        thread, found = read_pipe(pipe)
        write()
        thread.join(10)
        assert found == [b"text"] and stat.S_ISFIFO(pipe.stat().st_mode)
    device, link = null_device(tmp_path), tmp_path / "link"
    link.symlink_to(device)
    for path in (link, device):
        files.check_writable("out", path)
        files.replace_text(path, "text")
        assert files.append(path, b"text") == 0
        assert stat.S_ISCHR(device.stat().st_mode) and link.is_symlink() and not device.is_symlink()
    assert {"link", "pipe"} <= set(os.listdir(tmp_path)) <= {"link", "pipe", device.name}


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    """And nobody else reads what is written until it has it; a new file is as umask says."""
    path, link, umask = tmp_path / "a", tmp_path / "link", os.umask(0o022)
    try:
        path.write_text("old")
        path.chmod(mode)
        link.symlink_to("a")
        for name in (path, link):
            with files.replace_file(name) as file:
                assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
                file.write(b"new")
            assert stat.S_IMODE(path.stat().st_mode) == mode
        files.replace_text(tmp_path / "new", "text")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644
    finally:
        os.umask(umask)


@posix
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    os.chown(path, 1234, 2345)
    path.chmod(0o640)
    files.replace_text(path, "new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o640)


def test_of_two_writers_the_last_one_wins_and_neither_takes_the_others_file(tmp_path):
    path, user = tmp_path / "a", tmp_path / ".a.tmp"
    user.write_text("the user's own")
    with files.replace_file(path) as first:
        first.write(b"1" * 100)
        files.check_writable("out", path)  # as a second process does at its start
        with files.replace_file(path) as second:
            second.write(b"2")
        assert path.read_text() == "2"
        first.write(b"1")
    assert path.read_text() == "1" * 101 and user.read_text() == "the user's own"
    assert sorted(os.listdir(tmp_path)) == [".a.tmp", "a"]


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path):
    path = tmp_path / ("ü" * 127)  # 254 bytes
    files.check_writable("out", path)
    files.replace_text(path, "text")
    assert path.read_text() == "text"


@posix
def test_a_link_to_a_folder_that_is_missing_makes_it(tmp_path):
    (tmp_path / "run").symlink_to("disk/run")
    (tmp_path / "figures.json").symlink_to("disk/figures/a.json")
    files.lock_file(tmp_path / "run" / ".lock", "run")
    files.check_writable("out", tmp_path / "figures.json")
    files.write_json(tmp_path / "figures.json", {})
    assert (tmp_path / "disk/run/.lock").exists() and (tmp_path / "disk/figures/a.json").read_text() == "{}\n"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="--out=.*loop: Too many levels of symbolic links"):
        files.check_writable("out", tmp_path / "loop")


@posix
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "/dev/fd/1", "/dev/fd/2", "/proc/self/fd/1"])
def test_standard_output_goes_on(tmp_path, name):
    """Also if it is a file: what was printed before stays, and what is printed after follows."""
    if not os.path.exists(name):
        pytest.skip("only Linux has /proc")
    code = "import sys; from runtime.files import *\nout = sys.stderr if sys.argv[1][-1] in 'r2' else sys.stdout\n"
    code += "check_writable('out', sys.argv[1]); print('before', file=out); replace_text(sys.argv[1], 'text\\n')\n"
    code += "print('after', file=out)"
    command = [sys.executable, "-c", code, name]
    stream = "stderr" if name[-1] in "r2" else "stdout"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert vars(done)[stream] == "before\ntext\nafter\n"
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(command, cwd=ROOT, check=True, **{stream: log})
    assert (tmp_path / "log").read_text() == "before\ntext\nafter\n"


@posix
def test_a_file_that_is_printed_to_is_not_replaced(tmp_path):
    """Also if it goes by its own name, or by that of a link."""
    (tmp_path / "link").symlink_to("log")
    for name in ("log", "link"):
        code = f"from runtime.files import *; print('before'); replace_text({str(tmp_path / name)!r}, 'text\\n')\n"
        with open(tmp_path / "log", "wb") as log:
            subprocess.run([sys.executable, "-c", code + "print('after')"], cwd=ROOT, check=True, stdout=log)
        assert (tmp_path / "log").read_text() == "before\ntext\nafter\n"


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("kept")
    files.check_writable("out", tmp_path / "new" / "folder" / "a")
    files.check_writable("out", tmp_path / "file")
    assert os.listdir(tmp_path / "new" / "folder") == [] and (tmp_path / "file").read_text() == "kept"
    with pytest.raises(UserError, match=r"--out=.*/new: is a directory"):
        files.check_writable("out", tmp_path / "new")
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="--samples=.*(Not a directory|File exists|too long)"):
            files.check_writable("samples", path)
        with pytest.raises(UserError, match="Not a directory|File exists|too long"):
            files.replace_text(path, "text")
    with pytest.raises(UserError, match="--out=run: (File exists|Not a directory)"):
        files.lock_file(tmp_path / "file" / ".lock", "run")
    files.write_json(tmp_path / "other" / "folder" / "a.json", {})
    assert os.listdir(tmp_path / "other" / "folder") == ["a.json"]
    (tmp_path / "config.json").write_text("{}")  # of a checkpoint, beside which figures may lie
    files.check_writable("out", tmp_path / "figures.json")
    with pytest.raises(UserError, match="--out=.*config.json: is a file of a model; name another"):
        files.check_writable("out", tmp_path / "config.json")


@posix
def test_a_file_that_is_read_or_written_besides_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to("data")
    files.check_apart("out", tmp_path / "new", [tmp_path / "data"])
    files.check_apart("out", "/dev/stdout", ["/dev/stdout"])
    for path in (tmp_path / "data", tmp_path / "link", tmp_path / "." / "data"):
        with pytest.raises(UserError, match=f"--out={path}: is what is read or written besides; name another"):
            files.check_apart("out", path, [tmp_path / "a", tmp_path / "data"])


def test_a_file_that_was_deleted_is_begun_again(tmp_path):
    """And not filled up with zeros to its old size."""
    assert files.append(tmp_path / "log", b"two\n", size=900) == 4 and (tmp_path / "log").read_bytes() == b"two\n"
    assert files.append(tmp_path / "log", b"one\n", size=0) == 4 and (tmp_path / "log").read_bytes() == b"one\n"


def writing_calls(text):
    """The calls of a source that write a file, as "line: call"."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            strings = [a.value for a in node.args + [k.value for k in node.keywords] if isinstance(a, ast.Constant)]
            opens = name in ("open", "fdopen") and any(isinstance(s, str) and set("wax+") & set(s) for s in strings)
            if opens or name in ("write_text", "write_bytes", "tofile"):
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_nothing_else_in_the_product_writes_files():
    assert list(writing_calls("open(a, 'ab'); p.open(mode='w'); p.write_text(x); open(b); open(c, 'rb')")) == [
        "1: open(a, 'ab')",
        "1: p.open(mode='w')",
        "1: p.write_text(x)",
    ]
    found = {name: list(writing_calls(text)) for name, text in product_files(ROOT).items()}
    assert {name: calls for name, calls in found.items() if calls and name != "runtime/files.py"} == {}
