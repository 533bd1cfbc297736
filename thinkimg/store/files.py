"""The file layer: each file is written under another name, synced and renamed, then its directory is synced.

Every operation that touches the disk is an `op`, so that tests can stop the process before and after each of them.
Nothing cleans up after a failure: an exception leaves the same files as a kill, and one recovery handles both.
"""

import errno
import fnmatch
import functools
import hashlib
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from thinkimg.errors import UserError

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILED = {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN}
"""A disk, or the network to it, has failed."""
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""A file system without flock, as NFS and FUSE are mounted at times."""
NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
"""A file system whose directories need no fsync, or take none."""
NO_ENTRY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def hook(event: str, *paths: Path) -> None:
    """Do nothing before and after each operation; tests replace it to watch and to interrupt."""


@contextmanager
def op(name: str, *paths: Path) -> Iterator[None]:
    """Run one operation on `paths`. Raises UserError for a full, unwritable or broken disk; other errors pass."""
    try:
        hook(f"before {name}", *paths)
        yield
        hook(f"after {name}", *paths)
    except OSError as error:
        # Inside a "write" a stage's own code runs: its errors about files elsewhere are not explained here.
        concerns_path = str(error.filename or paths[0]).startswith(str(paths[0]))
        if error.errno in NO_SPACE:
            hint = "Free some space and run again: closed parts are kept."
        elif error.errno in NO_ENTRY and concerns_path:
            hint = "Set where.store to a directory that this user can write to."
        elif error.errno in FAILED and concerns_path:
            hint = "Run again when the disk, or the network to it, is mended: closed parts are kept."
        elif error.errno in NO_LOCKS and name == "lock":
            hint = "Set where.store to a file system that has locks (flock)."
        else:
            raise
        raise UserError(f"Cannot {name} {paths[0]}: {os.strerror(error.errno)}.", hint=hint) from error


def sync_path(path: Path) -> None:
    """Fsync one file or one directory; a directory that its file system can't sync is left to it."""
    with op("sync", path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NO_SYNC or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Fsync a file, or all files and directories under a directory, leaves first."""
    if path.is_dir():
        for child in sorted(path.iterdir()):
            sync_tree(child)
    sync_path(path)


def make_directory(path: Path) -> None:
    """Make `path` and its parents, each synced into its own parent; those that exist stay as they are."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with op("make", path):
        path.mkdir(exist_ok=True)
    sync_path(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename within one directory and sync that directory."""
    with op("rename", source, target):
        source.rename(target)
    sync_path(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a tree; do nothing if there is none."""
    if not path.exists() and not path.is_symlink():
        return
    with op("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write one file or directory at; after the block it is synced and renamed to `path`."""
    temporary = path.with_name(TEMPORARY + path.name)
    remove(temporary)
    with op("write", temporary):
        yield temporary
        assert temporary.exists(), f"nothing was written for {path}"
    sync_tree(temporary)
    rename(temporary, path)


def write(path: Path, data: bytes | str) -> None:
    """Replace the file at `path` by `data` (text as UTF-8); a reader sees all of the old or all of the new."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def append(path: Path, line: str) -> None:
    """Add one line to a file that exists, and sync it; a crash may leave half a line."""
    with op("append", path), path.open("ab") as file:
        file.write(f"{line}\n".encode())
    sync_path(path)


@contextmanager
def locked(path: Path, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock of the file at `path`; yield False if another process has it and `wait` is False.

    waiting: called again and again while this waits; its exceptions end the waiting.
    The kernel (flock) ends the lock with the process that holds it. The file stays.
    """
    lock = FileLock(path)
    try:
        with op("lock", path):
            lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            yield False
            return
        log.info("Waiting for another process that works on %s.", path.parent)
        while not lock.is_locked:
            waiting()
            with suppress(Timeout), op("lock", path):
                lock.acquire(timeout=0.5)
    try:
        yield True
    finally:
        lock.release()


def files_under(directory: Path) -> list[str]:
    """Return the paths of all files and links under `directory`, relative with forward slashes, sorted."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def walk_files(directory: Path, *patterns: str) -> list[Path]:
    """Return the sorted paths of the files under `directory` whose names fit a pattern, through links, each once.

    A directory is entered once, by its own name rather than by a link's: links may form loops. Raises UserError for a
    directory that cannot be read, and for a broken link that may be such a file or a directory of them.
    """
    paths: list[Path] = []
    entered: set[tuple[int, int]] = set()
    pending = deque([directory])
    while pending:
        folder = pending.popleft()
        try:
            stat, entries = folder.stat(), sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder} can't be read: {os.strerror(error.errno or 0)}.") from error
        if (stat.st_dev, stat.st_ino) in entered:
            continue
        entered.add((stat.st_dev, stat.st_ino))
        for entry in entries:
            path, is_link = folder / entry.name, entry.is_symlink()
            fits = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
            # An entry that is no link costs no stat: there may be a million pictures.
            if path.is_dir() if is_link else entry.is_dir():
                if is_link:
                    pending.append(path)
                else:
                    pending.appendleft(path)
            elif path.is_file() if is_link else entry.is_file():
                paths += [path] if fits else []
            elif is_link and not path.exists() and (fits or not path.suffix):
                hint = "Download or copy it again, or remove the link."
                raise UserError(f"{path} is a broken link: it leads to {os.readlink(path)}.", hint=hint)
    return sorted(paths)


def sha256(path: Path) -> str:
    """Return 64 hex digits over the file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return `sha256`; a file whose inode, size and times have not changed is read once per process."""
    stat = path.stat()
    return _sha256_of(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _sha256_of(path: Path, *_stat: int) -> str:
    return sha256(path)
