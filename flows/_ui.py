"""Display of a flow run in Prefect's UI: headline metrics as a table, a link to its MLflow run, progress.

None of it may stop a run: a failure is a warning. An embedded server has no UI, and is sent nothing.
"""

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import flows._environment  # noqa: F401

from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows import _server
from thinkimg import console
from thinkimg.environment import is_loopback
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.records import LoopRecord, headline

log = logging.getLogger(__name__)

UPDATE_S = 2.0  # between two updates of a progress bar


@contextmanager
def forgiving(what: str) -> Iterator[None]:
    """Turn every failure inside into a warning."""
    try:
        yield
    except Exception as error:  # the run is worth more than its picture, whatever a server or a network raises
        log.warning("Prefect did not take %s (%s: %s)", what, type(error).__name__, str(error).split("\n")[0])


def show_artifact(artifact: Artifact, cached: bool, link: str | None) -> None:
    """Show an artifact's headline metrics as a table, and the link to MLflow."""
    if _server.is_embedded():
        return
    key = f"thinkimg-{artifact.manifest['recipe']['stage'].replace('_', '-')}"  # Prefect allows no underscore
    rows = [{"metric": name, "value": _rounded(value)} for name, value in sorted(headline(artifact).items())]
    state = "cached: it was in the store already" if cached else "made by this run"
    with forgiving("a table"):
        create_table_artifact(rows, key=key, description=f"`{artifact.reference}`, {state}.")
    show_link(link)


def show_loop(record: LoopRecord) -> None:
    """Show the loop's headline metrics as a table, one row per iteration."""
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
    """Show the link to the MLflow run."""
    if link and not _server.is_embedded():
        with forgiving("a link"):
            create_link_artifact(link, "MLflow run", key="thinkimg-mlflow", description=describe_link(link))


def describe_link(link: str) -> str:
    """Return the link as Markdown; one of this machine needs `thinkimg track ui`, which may not run."""
    served = " It is there while `thinkimg track ui` runs." if is_loopback(urlsplit(link).hostname or "") else ""
    return f"[MLflow run]({link}).{served}"


def is_headline(name: str) -> bool:
    """Tell whether a metric of the loop is a column of its table."""
    return name.count("/") == 1 and name.startswith(("reward/", "eval/accuracy", "eval/avg_at_k", "tool/rate", "time/"))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@contextmanager
def report_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(done, total), shown at the terminal and in the UI."""
    with console.show_progress(label) as at_terminal, show_bar(label) as in_ui:

        def show(done: int, total: int) -> None:
            at_terminal(done, total)
            in_ui(done, total)

        yield show


@contextmanager
def show_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(done, total), shown in the UI alone.

    A thread sends it every UPDATE_S at most: a stage reports from within an event loop, which must not wait.
    """
    bar = _Bar(label)
    try:
        yield bar
    finally:
        bar.close()


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
            self._thread = threading.Thread(target=self._context.run, args=[self._send], name="progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _send(self) -> None:
        artifact, sent = None, None
        with forgiving("progress"):
            while True:
                last = self._closed.wait(0 if artifact is None else UPDATE_S)
                latest = self._latest
                if latest != sent:
                    done, total = sent = latest
                    share, text = 100.0 * done / max(1, total), f"{self.label}: {done} of {total}"
                    if artifact is None:
                        artifact = create_progress_artifact(share, key="thinkimg-progress", description=text)
                    else:
                        update_progress_artifact(artifact, share, description=text)
                if last:
                    return
