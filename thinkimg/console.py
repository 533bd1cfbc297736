"""Console output for people: results on stdout, and on stderr progress, so that `$(thinkimg …)` is the result alone."""

import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Console(Console):
    """Console that leaves a broken pipe to exit.py, whether it is stdout's or stderr's."""

    def on_broken_pipe(self) -> None:
        raise  # what rich has just caught


# Without a terminal rich takes 80 columns, which cuts tables. There may be no stdout at all.
console = _Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 160)
notes = _Console(highlight=False, stderr=True, width=None if sys.stderr and sys.stderr.isatty() else 160)
LINE_S = 15.0  # between two lines of progress where there is no terminal


@contextmanager
def show_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(done, total): a bar at a terminal, lines elsewhere, nothing if it is never called."""
    if not notes.is_terminal:
        yield _Lines(label)
        return
    with _bars.add(label) as show:
        yield show


class _Bars:
    """Bars of all running stages in one display, as rich draws one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._display: Progress | None = None

    @contextmanager
    def add(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Yield progress(done, total) of a new bar, and remove it in the end."""
        with self._lock:
            if self._display is None:
                columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
                self._display = Progress(TextColumn("{task.description:<16}"), *columns, console=notes, transient=True)
                self._display.start()
            display, task = self._display, self._display.add_task(label, total=None)
        try:
            yield lambda done, total: display.update(task, completed=done, total=total)
        finally:
            with self._lock:
                display.remove_task(task)
                if not display.tasks:
                    display.stop()
                    self._display = None


_bars = _Bars()


class _Lines:
    """Progress as lines, LINE_S apart."""

    def __init__(self, label: str):
        self.label, self.printed = label, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.printed >= LINE_S:
            self.printed = time.monotonic()
            note(f"{self.label}: {done} of {total}")


def say(line: str) -> None:
    """Print a line of a result as it is, without markup or wrapping."""
    console.print(line, markup=False, soft_wrap=True)


def note(line: str) -> None:
    """Print a line about the work, on stderr."""
    notes.print(line, markup=False, soft_wrap=True)


def takes_unicode() -> bool:
    """Tell whether stdout can show every character; else JSON and YAML have escapes, so that nothing is lost."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def escape_controls(text: str) -> str:
    """Return a text as it may be shown: visible escapes in place of control characters and of changes of direction.

    Line feeds and tabs stay. A stranger's text moves no cursor then, sets no colour, and hides no part of itself.
    """
    return "".join(map(_escape_control, text.replace("\r\n", "\n")))


def _escape_control(character: str) -> str:
    shown = character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"
    return character if shown else character.encode("unicode_escape").decode()


def format_number(value: float) -> str:
    """Return a number as text: counts in full, others with three significant digits."""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def format_size(count: int) -> str:
    """Return a number of bytes as text, as in 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
