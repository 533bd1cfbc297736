"""The file layer: links count by what they lead to; file systems without locks, and without fsync of directories."""

import errno
import fcntl
import os

import pytest

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.manifest import directory_digest


def test_a_model_of_links_has_the_digest_of_its_files(tmp_path):
    plain, linked = tmp_path / "plain", tmp_path / "linked"
    (plain / "tokenizer").mkdir(parents=True)
    (plain / "config.json").write_text("{}")
    (plain / "tokenizer" / "vocabulary.txt").write_text("a b")
    linked.mkdir()
    (linked / "config.json").symlink_to(plain / "config.json")
    (linked / "tokenizer").symlink_to(plain / "tokenizer")
    assert directory_digest(linked) == directory_digest(plain)
    (linked / "again").symlink_to(linked)  # a loop
    assert directory_digest(linked) == directory_digest(plain)
    (linked / "weights.safetensors").symlink_to(tmp_path / "blobs" / "lost")
    with pytest.raises(UserError, match=r"weights.safetensors is a broken link: it leads to .*lost"):
        directory_digest(linked)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("taken", [0, 4])
def test_a_file_system_without_locks_is_a_sentence(tmp_path, monkeypatch, code, taken):
    """As NFS without its lock daemon. taken: attempts that find the lock taken."""
    answers = iter([OSError(errno.EAGAIN, "")] * taken)

    def flock(descriptor, operation):
        if operation & fcntl.LOCK_EX:
            raise next(answers, OSError(code, "no locks"))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=rf"^Cannot lock {tmp_path}.*: {os.strerror(code)}\. Hint: \w"),
        files.locked(tmp_path / ".lock"),
    ):
        raise AssertionError("it is not locked")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_directory_that_its_file_system_cannot_sync_is_left_to_it(tmp_path, monkeypatch, code):
    def fsync(descriptor):
        raise OSError(code, "")

    monkeypatch.setattr(os, "fsync", fsync)
    files.sync_path(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=str(code)):
        files.sync_path(tmp_path / "file")  # whose loss a power cut would show
