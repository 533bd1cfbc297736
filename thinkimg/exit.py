"""How a command ends: a sentence and an exit code in place of a traceback."""

import atexit
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from thinkimg.errors import UserError

EXPLAINED = {"EngineError", "TrainerError", "PrefectUnavailable", "Stopped"}
"""RuntimeErrors (and what derives from them) that say all there is to say; named here, their modules need not be loaded."""


def leave() -> None:
    """Spare the interpreter its last look for garbage: 1.2 s of each command."""
    if "triton" not in sys.modules:  # which would complain about each object that is left, in eighty lines
        gc.freeze()


def guarded(command: Callable[[], object]) -> None:
    """Run a command; a user's mistake is one sentence on stderr and exit code 2, a broken engine or trainer, or an alarm, exit code 1."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # Prefect logs every exception once per flow level
    sys.path.insert(0, str(Path.cwd()))  # a user's own reward functions
    atexit.register(leave)
    try:
        command()
    except Exception as error:
        sentence, code = explained(error)
        if sentence is None:
            raise
        print(f"thinkimg: {sentence}", file=sys.stderr)
        raise SystemExit(code) from None


def explained(error: Exception) -> tuple[str | None, int]:
    """What a person is told, and the exit code; None for what nobody has foreseen."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, UserError):
        return str(error), 2
    if "ParameterTypeError" in kinds:  # Prefect's: a flow's argument does not fit
        return " ".join(str(error).split()), 2
    if EXPLAINED & kinds:
        return str(error), 1
    if str(error).startswith("Failed to reach API") or type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpcore",
    ):
        said = str(error).split("\n")[0] or type(error).__name__
        hint = "start it (`make server`), or unset PREFECT_API_URL; then run this again: what is complete is kept"
        return f"Prefect's server does not answer ({said}). Hint: {hint}.", 1
    return None, 1
