"""Exit of a command: a sentence and an exit code in place of a traceback."""

import atexit
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from thinkimg.errors import UserError

EXPLAINED = {"EngineError", "TrainerError", "PrefectUnavailable", "StoppedByAlarm"}
"""Names of errors, and of their base classes, whose text is complete; by name, so that their modules need not load."""


def skip_last_collection() -> None:
    """Make the interpreter skip its last garbage collection: 1.2 s of each command."""
    if "triton" not in sys.modules:  # it would print eighty lines about the objects that remain
        gc.freeze()


def run_guarded(command: Callable[[], object]) -> None:
    """Run a command; print an error that has an explanation as one sentence on stderr, and exit.

    The exit code is 2 for a user's mistake, 1 for a broken engine, trainer or server, and for an alarm.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # Prefect logs every exception once per flow level
    sys.path.insert(0, str(Path.cwd()))  # a user's own reward functions
    atexit.register(skip_last_collection)
    try:
        command()
    except Exception as error:
        sentence, code = explain_error(error)
        if sentence is None:
            raise
        print(f"thinkimg: {sentence}", file=sys.stderr)
        raise SystemExit(code) from None


def explain_error(error: Exception) -> tuple[str | None, int]:
    """Return a sentence for the user and the exit code; None for an unexpected error."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, UserError):
        return str(error), 2
    if "ParameterTypeError" in kinds:  # Prefect's: a flow's argument does not fit
        return " ".join(str(error).split()), 2
    if EXPLAINED & kinds:
        return str(error), 1
    library = type(error).__module__.partition(".")[0]
    if str(error).startswith("Failed to reach API") or library in ("httpx", "httpcore"):
        detail = str(error).split("\n")[0] or type(error).__name__
        hint = "Start it (`make server`) or unset PREFECT_API_URL, then run this again: complete artifacts are kept."
        return f"Prefect's server does not answer ({detail}). Hint: {hint}", 1
    return None, 1
