"""Exit of a command: a sentence and an exit code in place of a traceback, whatever its surroundings are."""

import atexit
import contextlib
import gc
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from thinkimg.crash import write_report
from thinkimg.disk import NO_SPACE, disk_number
from thinkimg.environment import drop_empty, exempt_localhost
from thinkimg.errors import UserError, shorten
from thinkimg.redaction import redact_logs, without_secrets
from thinkimg.registry import allow_user_modules

EXPLAINED = {"EngineError", "TrainerError", "PrefectUnavailable", "StoppedByAlarm"}
"""Names of errors, and of their base classes, whose text is complete; by name, so that their modules need not load."""
GO_ON = "The same command goes on from what is complete."
HTTP_LIBRARIES = {"httpx", "httpcore", "h11", "anyio", "sniffio"}
AGAIN_S = 0.1  # until a signal whose exception was ignored is raised again
SOON_S = 10.0  # after a signal, in which an error is its consequence
LIBRARIES = HTTP_LIBRARIES | {"pydantic", "pydantic_core", "pydantic_settings"}


class Termination(KeyboardInterrupt):
    """SIGTERM in the main thread.

    No SystemExit, which guards around a user's code take for theirs. A KeyboardInterrupt, for asyncio keeps any other
    exception that a callback raises to itself.
    """


class Interruption(KeyboardInterrupt):
    """SIGINT in the main thread.

    No KeyboardInterrupt itself: where that leaves an `exec` of text (dataclasses and namedtuples are made by one, in
    any import), Python run with -m ends by the signal in place of our exit code (seen with 3.11).
    """


def skip_last_collection() -> None:
    """Make the interpreter skip its last garbage collection: 1.2 s of each command."""
    if "triton" not in sys.modules:  # it would print eighty lines about the objects that remain
        gc.freeze()


def run_guarded(command: Callable[[], object]) -> None:
    """Run a command; print what went wrong as one sentence on stderr, and exit.

    The exit code is 2 for a user's mistake, 1 for a broken engine, trainer or server, for an alarm and for an error
    that nobody expected, and 128 + n for signal n.
    """
    drop_empty(os.environ)
    redact_logs()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # Prefect logs every exception once per flow level
    open_streams()
    atexit.register(skip_last_collection)
    heard: list[tuple[float, int]] = []
    try:
        allow_user_modules(in_command=True)
        exempt_localhost(os.environ)
        try:
            with hearing_signals(heard):
                command()
        finally:
            sys.stdout.flush()  # at the interpreter's end a broken pipe would be a traceback
    except BaseException as error:
        recent = [number for moment, number in heard if time.monotonic() - moment < SOON_S]
        number = find_signal(error) or next(iter(recent), None)
        if isinstance(error, BrokenPipeError) and (is_abandoned(1) or is_abandoned(2)):
            leave(None, 128 + (number or signal.SIGPIPE))
        if number:
            leave(f"{'Interrupted' if number == signal.SIGINT else 'Terminated'}. {GO_ON}", 128 + number)
        if not isinstance(error, Exception):
            raise
        leave(*explain_error(error))


def find_signal(error: BaseException | None) -> int | None:
    """Return the number of the signal whose exception ended a command; None where there was none.

    A library may make an exception of its own of it (pydantic does), which names it as its cause or its context; one
    whose import is interrupted may name nothing, and is told by its time.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if (number := signal_of(error)) is not None:
            return number
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def signal_of(error: BaseException | None) -> int | None:
    """Return the number of the signal that an exception stands for; None for any other."""
    if isinstance(error, Termination) or type(error).__name__ == "TerminationSignal":  # Prefect's
        return signal.SIGTERM
    return signal.SIGINT if isinstance(error, KeyboardInterrupt) else None


def leave(sentence: str | None, code: int) -> None:
    """Print a sentence on stderr and exit. What is left in the buffers and can't be written is dropped."""
    with contextlib.suppress(OSError):
        if sentence:
            print(f"thinkimg: {without_secrets(sentence)}", file=sys.stderr)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # else the interpreter's own flush makes the code 120
    raise SystemExit(code) from None


@contextlib.contextmanager
def hearing_signals(heard: list[tuple[float, int]]) -> Iterator[None]:
    """Have the first Ctrl-C, or SIGTERM, say so at once, and end what the main thread does by an exception.

    heard: gets the time (monotonic) and the number of each. One that is ignored, as out of a destructor, is raised
    again.
    asyncio would take Python's own handler for one of its own, which waits until a coroutine waits: an engine that
    starts would be waited for.
    """
    again: list[threading.Timer] = []

    def hear(number: int, frame: FrameType | None) -> NoReturn:
        is_first = not heard
        heard.append((time.monotonic(), number))
        if is_first:
            with contextlib.suppress(OSError):  # nobody reads stderr: another exception than ours might be caught
                os.write(2, b"thinkimg: stopping\n")  # print might be interrupted within itself
        raise Interruption if number == signal.SIGINT else Termination

    def raise_again(ignored: "sys.UnraisableHookArgs") -> None:
        if (number := signal_of(ignored.exc_value)) is None:
            kept_hook(ignored)
            return
        again.append(threading.Timer(AGAIN_S, signal.pthread_kill, [threading.main_thread().ident, number]))
        again[-1].start()

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in kept.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ours:
        signal.signal(number, hear)
    kept_hook, sys.unraisablehook = sys.unraisablehook, raise_again
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = kept_hook
        for number in ours:
            signal.signal(number, kept[number])


def open_streams() -> None:
    """Let stdin, stdout and stderr be there, and take every text.

    Where one is closed, the next file that is opened gets its number, and what we or a child print goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, which is this
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an en dash in a table must not end a loop at a latin-1 terminal


def is_abandoned(descriptor: int) -> bool:
    """Tell whether a descriptor is a pipe or a terminal that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def explain_error(error: Exception) -> tuple[str, int]:
    """Return a sentence for the user and the exit code."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, UserError):
        return str(error), 2
    if "ParameterTypeError" in kinds:  # Prefect's: a flow's argument does not fit
        return " ".join(str(error).split()), 2
    if EXPLAINED & kinds:
        return str(error), 1
    if (sentence := explain_setting(error)) is not None:
        return sentence, 2
    if "PrefectHTTPStatusError" in kinds:
        return explain_status(error), 1
    library = type(error).__module__.partition(".")[0]
    if str(error).startswith("Failed to reach API") or (library in HTTP_LIBRARIES and is_of_prefect(error)):
        detail = str(error).split("\n")[0] or type(error).__name__
        hint = "Start it (`make server`) or unset PREFECT_API_URL, then run this again: complete artifacts are kept."
        return f"Prefect's server does not answer ({detail}). Hint: {hint}", 1
    if isinstance(error, PermissionError) or disk_number(error) in NO_SPACE:
        return f"{shorten(str(error))}. Hint: Free some space there, or get leave to write. {GO_ON}", 2
    cause, report = write_report(error)
    return f"Nobody expected this: {cause}. Hint: {GO_ON} If it happens again, report it with {report}", 1


def explain_setting(error: Exception) -> str | None:
    """Return a sentence for a setting of Prefect's own that does not validate; None for another error."""
    if type(error).__name__ != "ValidationError" or not is_of_prefect(error):
        return None
    first = error.errors()[0]  # type: ignore[attr-defined]  # pydantic's
    field = str(first["loc"][-1]) if first["loc"] else ""
    names = [name for name in os.environ if name.startswith("PREFECT_") and name.endswith(f"_{field.upper()}")]
    where = " or ".join(names) or f"{field} (a variable, a profile or prefect.toml)"
    return f"Prefect does not take its setting {where}: {first['msg']}. Hint: Correct it, or unset it."


def explain_status(error: Exception) -> str:
    """Return a sentence for a request that Prefect's server refused."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = f"Its log says why. {GO_ON}"
    if status in (401, 403):
        hint = f"Set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY for Prefect Cloud. {GO_ON}"
    return f"Prefect's server refused a request ({shorten(str(error).split(chr(10))[0])}). Hint: {hint}"


def is_of_prefect(error: Exception) -> bool:
    """Tell whether Prefect made the request or read the setting that failed, and no other library or user's code."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in frames]
    callers = [name for name in packages if name not in LIBRARIES and name not in sys.stdlib_module_names]
    return callers[-1:] == ["prefect"]
