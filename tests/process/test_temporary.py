"""Scratch, records, logs and sockets: short paths, and one sentence where the disk takes nothing."""

import builtins
import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from hostile import deep_folder
from hypothesis import given
from hypothesis import strategies as st

from thinkimg import process
from thinkimg.disk import writing
from thinkimg.errors import UserError
from thinkimg.process import RECORD_NAME, SOCKET_NAME, SOCKET_PATH, run_directory, scratch, scratch_directory, spawn

BIND = """
import os, socket, tempfile, uuid
path = os.path.join(tempfile.gettempdir(), str(uuid.uuid4()))
socket.socket(socket.AF_UNIX).bind(path)
print(path)
"""


@pytest.fixture
def tmpdir(monkeypatch):
    """A TMPDIR that is short enough for sockets, which pytest's tmp_path is not."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def test_a_child_has_room_for_sockets_however_long_tmpdir_is(tmp_path, monkeypatch):
    deep = deep_folder(tmp_path, 200)
    monkeypatch.setenv("TMPDIR", str(deep))
    with spawn([sys.executable, "-c", BIND], name="long-name", log_path=tmp_path / "log") as child:
        assert child.wait(30) == 0, child.log_tail()
    assert not Path(child.log_tail()).is_relative_to(deep)
    with scratch() as directory:  # holds weights: it stays where there is room
        assert directory.is_relative_to(deep)


@given(st.integers(1, 180))
def test_a_run_directory_is_short_private_and_in_tmpdir_where_that_is_short(length):
    with pytest.MonkeyPatch.context() as patch:
        root = Path("/tmp") / ("x" * length)
        root.mkdir()
        patch.setenv("TMPDIR", str(root))
        try:
            directory = run_directory()
            assert len(str(directory)) + RECORD_NAME + SOCKET_NAME <= SOCKET_PATH
            assert directory.stat().st_mode & 0o777 == 0o700
            assert scratch_directory().parent == root
            if len(str(root)) <= 12:
                assert directory.parent == root
            with socket.socket(socket.AF_UNIX) as listener:
                path = directory / ("n" * (RECORD_NAME - 1))
                path.mkdir()
                listener.bind(str(path / str(uuid.uuid4())))
                (path / os.listdir(path)[0]).unlink()
                path.rmdir()
        finally:
            scratch_directory().rmdir()
            root.rmdir()


def missing(root: Path) -> Path:
    return root / "missing"


def a_file(root: Path) -> Path:
    (root / "file").write_text("")
    return root / "file"


def taken_by_a_file(root: Path) -> Path:
    (root / f"thinkimg-{os.getuid()}").write_text("")
    return root


def of_another_user(root: Path) -> Path:
    (root / f"thinkimg-{os.getuid()}").mkdir()
    os.chown(root / f"thinkimg-{os.getuid()}", 12345, 12345)
    return root


# Each entry of a command into TMPDIR, in a process of its own; `full` gives it a disk that takes no byte.
START = """
import os, resource, sys
from thinkimg import process
from thinkimg.engine.media import Media
from thinkimg.exit import run_guarded
from PIL import Image
def scratch():
    with process.scratch() as folder:
        Media(folder).ref("picture", Image.new("RGB", (64, 64)))
def spawn():
    process.spawn(["true"], name="child", log_path=None).wait()
use = globals()[sys.argv[1]]
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
run_guarded(use)
"""


@pytest.mark.parametrize("use", ["spawn", "scratch"])
@pytest.mark.parametrize("fault", [missing, a_file, taken_by_a_file, of_another_user, "full"])
def test_a_tmpdir_that_is_no_good_is_one_sentence(tmpdir, use, fault):
    if fault is of_another_user and (os.getuid() or use == "spawn"):
        return  # only root can give a directory away, and records are kept elsewhere then
    root = tmpdir if fault == "full" else fault(tmpdir)
    command = [sys.executable, "-c", START, use, fault if fault == "full" else ""]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(root)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and str(root) in done.stderr, done.stderr
    assert done.stderr.startswith("thinkimg: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_whichever_write_into_tmpdir_fails_it_is_a_sentence_with_its_path(tmpdir, monkeypatch, number):
    """Fails the first, second, … call that writes there, until none is left that fails."""
    calls, fail_at = 0, 0

    def failing(real, writes=lambda *_: True):
        def call(path, *arguments, **options):
            nonlocal calls
            if str(tmpdir) in str(path) and writes(*arguments):
                calls += 1
                if calls == fail_at:
                    raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        return call

    for name in ("mkdir", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr(builtins, "open", failing(open, lambda mode="r", *_: mode != "r"))

    def use():
        with scratch():
            spawn(["true"], name="child", log_path=tmpdir / "logs" / "log").wait(20)

    failures = 0
    while True:
        calls, fail_at = 0, fail_at + 1
        try:
            use()
        except UserError as error:
            failures += 1
            assert str(tmpdir) in error.message and os.strerror(number) in error.message and error.hint
        if calls < fail_at:
            break
    assert failures >= 5, "mkdir of scratch and run directory, the record and its rename, the log"
    process.clear_leftovers()
    assert list((tmpdir / f"thinkimg-{os.getuid()}").iterdir()) == []


def test_rusts_libraries_have_sentences_too(tmp_path):
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(UserError, match=f"Cannot write {tmp_path}: No space left on device. Hint: "), writing(tmp_path):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="a bug"), writing(tmp_path):
        raise RuntimeError("a bug")


def test_a_name_that_another_user_has_taken_is_left_alone(tmp_path, monkeypatch):
    long, mine = deep_folder(tmp_path / "long"), Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        taken, free = mine / "a", mine / "b"
        for root in (taken, free):
            root.mkdir()
        (taken / f"thinkimg-{os.getuid()}").mkdir()
        monkeypatch.setattr(process, "is_own", lambda path: path.parent != taken)
        monkeypatch.setattr(process, "SHORT_ROOTS", (taken, free))
        monkeypatch.setenv("TMPDIR", str(long))
        assert run_directory() == free / f"thinkimg-{os.getuid()}"
        monkeypatch.setattr(process, "SHORT_ROOTS", (taken,))
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        with pytest.raises(UserError, match="belongs to another user"):
            run_directory()
    finally:
        shutil.rmtree(mine)
