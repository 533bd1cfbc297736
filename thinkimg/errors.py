"""Errors: mistakes that a user can correct, and failures that pass."""

import errno
import socket
import subprocess
import sysconfig
import traceback
from collections.abc import Collection, Sequence, Sized
from concurrent.futures import BrokenExecutor
from itertools import islice
from pathlib import Path

LASTING = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EEXIST,
    errno.ENOTEMPTY, errno.ENOTTY, errno.EBADF, socket.EAI_NONAME,
)  # fmt: skip
"""Errors of the system that are about a name or a descriptor, and so fail again."""
HTTP_LIBRARIES = ("aiohttp", "httpx", "httpcore", "requests", "urllib3", "http.client")
"""Libraries whose errors are those of a connection, unless they have a status."""
LASTING_STATUSES = (400, 404, 405, 406, 410, 411, 413, 414, 415, 416, 417, 422, 431, 451)
"""HTTP statuses from 400 on that say the same each time; others may be 200 another time, or with another key."""


class UserError(ValueError):
    """A user's mistake, explained in one sentence.

    message: names the mistake. hint: a way to correct it, or "". `str()` joins the two.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} Hint: {self.hint}" if self.hint else self.message


def is_passing(error: BaseException) -> bool:
    """Tell whether machine, network or a key made something fail, so that it may succeed another time.

    True for connections, time-outs, memory, what the system refuses (a full disk), and HTTP statuses that say so. The
    error counts, and what it was raised from.
    """
    todo, seen = [error], set()
    while todo:
        cause = todo.pop()
        if id(cause) in seen:  # `raise error from error`
            continue
        seen.add(id(cause))
        if _is_passing_itself(cause):
            return True
        if isinstance(cause, BaseExceptionGroup):
            todo += cause.exceptions
        if reason := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
            todo.append(reason)
    return False


def is_passing_status(status: int) -> bool:
    """Tell whether a server that answered with this status of HTTP may answer another time with what was asked for."""
    return 400 <= status < 1000 and status not in LASTING_STATUSES


def _is_passing_itself(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", error), "status_code", getattr(error, "code", None))
    if isinstance(status, int) and not isinstance(error, OSError):
        return is_passing_status(status)
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode < 0  # by a signal, as of a kernel that is short of memory
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in LASTING
    return (
        isinstance(error, ConnectionError | TimeoutError | subprocess.TimeoutExpired | MemoryError | BrokenExecutor)
        or type(error).__name__ == "OutOfMemoryError"  # torch's
        or type(error).__module__.startswith(HTTP_LIBRARIES)
        or "database is locked" in str(error)
    )


def describe_error(error: BaseException) -> str:
    """Return the type, message and place of an error in a user's own code: the last frame outside of packages.

    "ZeroDivisionError: division by zero (my_rewards.py, line 12)"; without a place where there is no such frame.
    """
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((str(Path(__file__).parent), "<", *installed))
    ]
    location = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {shorten(str(error))}{location}"


def check_share(errors: Sequence[str], total: int, what: str) -> None:
    """Raise UserError where more than half of `total` failed: the cause then lies outside of them.

    errors: messages of those that failed. what: plural noun for the sentence.
    """
    if 2 * len(errors) > total:
        raise UserError(
            f"{len(errors)} of {total} {what} failed, the first with: {errors[0]}",
            hint="Correct that and run this again: what failed is done again.",
        )


def count_more(values: Sized, most: int) -> str:
    """Return the number of values beyond the first `most`, in words: " and 3 more"; nothing where there are none."""
    return f" and {len(values) - most:,} more" if len(values) > most else ""


def name_some(names: Collection[str], most: int = 4, length: int = 80) -> str:
    """Return the first names for an error text, each cut to `length` characters, and the number of the others."""
    return ", ".join(shorten(name, length) for name in islice(names, most)) + count_more(names, most)


def shorten(text: str, length: int = 200) -> str:
    """Return a text in one line of at most `length` characters; what is cut is counted at its end."""
    text = " ".join(text.split())
    end = f"… ({len(text)} characters)"
    return text if len(text) <= length else text[: max(length - len(end), 0)] + end
