"""Errors: mistakes that a user can correct, and failures that pass."""

import errno
import subprocess
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
"""Errors of the system that are about a name, and so fail again."""
PASSING_STATUSES = (401, 403, 408, 425, 429)
"""HTTP statuses beside 5xx that another time, or with another key, may be 200."""


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
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", cause), "status_code", getattr(cause, "code", None))
        if (
            isinstance(cause, ConnectionError | TimeoutError | subprocess.TimeoutExpired | MemoryError)
            or (isinstance(cause, OSError) and cause.errno is not None and cause.errno not in LASTING)
            or (isinstance(status, int) and (status in PASSING_STATUSES or 500 <= status < 600))
            or type(cause).__name__ == "OutOfMemoryError"  # torch's
        ):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


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
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {shorten(str(error))}{place}"


def check_share(errors: Sequence[str], total: int, what: str) -> None:
    """Raise UserError where more than half of `total` failed: the cause then lies outside of them.

    errors: messages of those that failed. what: plural noun for the sentence.
    """
    if 2 * len(errors) > total:
        raise UserError(
            f"{len(errors)} of {total} {what} failed, the first with: {errors[0]}",
            hint="Correct that and run this again: what failed is done again.",
        )


def shorten(text: str, length: int = 200) -> str:
    """Return a text in one line of at most `length` characters; what is cut is counted at its end."""
    text = " ".join(text.split())
    end = f"… ({len(text)} characters)"
    return text if len(text) <= length else text[: max(length - len(end), 0)] + end
