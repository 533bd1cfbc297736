"""Display of a flow run in Prefect's UI: headline metrics as a table, a link to its MLflow run, progress.

None of it may stop a run: what the server does not take is a warning. An embedded server has no interface, so nothing is sent.
"""

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import flows._environment  # noqa: F401

from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows import _server
from thinkimg import console
from thinkimg.store.artifacts import Artifact
from thinkimg.tracking.records import LoopRecord, headline

log = logging.getLogger(__name__)

EVERY_S = 2.0  # between two updates of a progress bar


@contextmanager
def forgiving(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the run is worth more than its picture, whatever a server or a network raises
        log.warning("Prefect did not take %s (%s: %s)", what, type(error).__name__, str(error).split("\n")[0])


def show_artifact(artifact: Artifact, cached: bool, link: str | None) -> None:
    """The table of an artifact's headline metrics, and the link."""
    if _server.is_embedded():
        return
    stage = artifact.manifest["recipe"]["stage"]
    rows = [{"metric": name, "value": _rounded(value)} for name, value in sorted(headline(artifact).items())]
    state = "found in the store" if cached else "made by this run"
    with forgiving("a table"):
        create_table_artifact(rows, key=f"thinkimg-{stage}", description=f"`{artifact.reference}`, {state}.")
    show_link(link)


def show_loop(record: LoopRecord) -> None:
    """One row per iteration, as the loop's last table has it."""
    if _server.is_embedded():
        return
    names = sorted({name for step in record.iterations for name in step.metrics if is_headline(name)})
    rows = [
        {"iteration": step.step} | {name: _rounded(step.metrics.get(name)) for name in names}
        for step in record.iterations
    ]
    with forgiving("a table"):
        create_table_artifact(rows, key="thinkimg-loop", description=f"{record.name}: one row per iteration.")


def show_link(link: str | None) -> None:
    if link and not _server.is_embedded():
        with forgiving("a link"):
            create_link_artifact(link, "MLflow run", key="thinkimg-mlflow", description=f"[MLflow run]({link})")


def is_headline(name: str) -> bool:
    return name.count("/") == 1 and name.startswith(("reward/", "eval/accuracy", "eval/avg_at_k", "tool/rate", "time/"))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(done, total) for people at a terminal and in the UI."""
    with console.progress(label) as tell, bar(label) as draw:

        def show(done: int, total: int) -> None:
            tell(done, total)
            draw(done, total)

        yield show


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(done, total) for the UI alone.

    A thread tells the server, every EVERY_S at most: a stage reports from within an event loop, which must not wait.
    """
    drawn = _Bar(label)
    try:
        yield drawn
    finally:
        drawn.close()


class _Bar:
    def __init__(self, label: str):
        self.label = label
        self._latest: tuple[int, int] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._context = contextvars.copy_context()  # the flow run that artifacts belong to

    def __call__(self, done: int, total: int) -> None:
        self._latest = (done, total)
        if self._thread is None and not _server.is_embedded():
            self._thread = threading.Thread(target=self._context.run, args=[self._tell], name="progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _tell(self) -> None:
        artifact, told = None, None
        with forgiving("progress"):
            while True:
                last = self._closed.wait(0 if artifact is None else EVERY_S)
                latest = self._latest
                if latest != told:
                    done, total = told = latest
                    share, text = 100.0 * done / max(1, total), f"{self.label}: {done} of {total}"
                    if artifact is None:
                        artifact = create_progress_artifact(share, key="thinkimg-progress", description=text)
                    else:
                        update_progress_artifact(artifact, share, description=text)
                if last:
                    return
