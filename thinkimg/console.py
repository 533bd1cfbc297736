"""Progress bars and tables for people; in a pipe or a log file, a line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Without a terminal rich takes 80 columns, which cuts tables.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
EVERY_S = 15.0  # between lines where there is no terminal


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(done, total) that shows a bar on a terminal, and lines elsewhere; silent if it is never called."""
    if not console.is_terminal:
        yield _Lines(label)
        return
    with _bars.added(label) as show:
        yield show


class _Bars:
    """The bars of all stages that are under way; rich draws one display at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._display: Progress | None = None

    @contextmanager
    def added(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Yield progress(done, total) of a bar that is drawn meanwhile."""
        with self._lock:
            if self._display is None:
                columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
                self._display = Progress(
                    TextColumn("{task.description:<16}"), *columns, console=console, transient=True
                )
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
    def __init__(self, label: str):
        self.label, self.told = label, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.told >= EVERY_S:
            self.told = time.monotonic()
            console.print(f"{self.label}: {done} of {total}")


def say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def decimal(value: float) -> str:
    """A figure for people: counts as they are, the rest with three significant digits."""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes for people, as in 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
