"""Errors of the disk, turned into sentences; for scratch and records. The store's files go through store/files.py."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinkimg.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
NO_ENTRY = {
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EIO, errno.ESTALE,
}  # fmt: skip
OTHERS_TEXT = re.compile(r"(?:\(os error |\[Errno )(\d+)[)\]]")


@contextmanager
def writing(
    path: str | os.PathLike[str], hint: str = "Free some space there, or set TMPDIR to another directory."
) -> Iterator[None]:
    """Turn an error of the disk into one sentence that names `path`, whatever library wrote. Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = disk_number(error)
        if number not in NO_SPACE | NO_ENTRY:
            raise
        raise UserError(f"Cannot write {os.fspath(path)}: {os.strerror(number)}.", hint=hint) from error


def disk_number(error: BaseException) -> int:
    """Return the system's number of an error of the disk, 0 for another; Rust's libraries have it in their texts."""
    number = error.errno if isinstance(error, OSError) else None
    text = None if number else OTHERS_TEXT.search(str(error))
    return number or (int(text[1]) if text else 0)


def free_space(path: str | os.PathLike[str]) -> int:
    """Return the bytes that are free on the disk of a path, which need not exist yet."""
    path = Path(path).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free
