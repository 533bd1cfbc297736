"""Connection to MLflow: its location, its two experiments, and a lock for one writing process at a time."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from thinkimg.errors import UserError
from thinkimg.redaction import without_query
from thinkimg.store import files
from thinkimg.tracking.relocation import (
    is_gone,
    is_here,
    is_same,
    location_of,
    loop_locations,
    move,
    move_records,
    path_of,
)
from thinkimg.tracking.settings import TrackingConfig, check_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

FILES = "mlartifacts"
LOOPS, STAGES = "thinkimg", "thinkimg-stages"


@functools.cache
def load_mlflow() -> ModuleType:
    """Import mlflow with telemetry off, and with limits that keep an outage from delaying training for long."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"  # so that traces have arrived when `log_traces` returns
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # of two lines per stage
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 retries back off for four minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    # Fifty lines about the migrations of a new database, and four about a thread.
    for name in ("mlflow.store.db.utils", "alembic", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def forget_places() -> None:
    """Drop the places of runs' files that MLflow 3.17 keeps by run for the whole process."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()


def uri_of(root: Path, tracking: TrackingConfig) -> str:
    """Return the tracking URI: the configured one, or sqlite in the store's root."""
    return tracking.uri or check_uri(f"sqlite:///{root.resolve() / 'mlflow.db'}")


def database_path(uri: str) -> Path | None:
    """Return the file of a tracking URI's database; None where it is none."""
    from sqlalchemy import make_url

    if not uri.startswith("sqlite"):
        return None
    database = make_url(uri).database
    return Path(database.removeprefix("file:")).resolve() if database else None


def is_inside(root: Path, database: Path | None) -> bool:
    """Return True if a database is a file in the store, by whatever name the two have."""
    return database is not None and any(is_same(folder, root) for folder in database.parents)


def artifact_root(root: Path, uri: str) -> Path:
    """Return the directory of MLflow's own files: tables, and images of traces.

    It is in the store, or beside a database that lies elsewhere, as several stores may have that one.
    """
    database = database_path(uri)
    outside = database is not None and not is_inside(root, database)
    return (database.parent if outside else root.resolve()) / FILES


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


class Connection:
    """MLflow that answers, with the ids of its two experiments. Raises UserError if the URI is unusable."""

    def __init__(self, root: Path, tracking: TrackingConfig) -> None:
        self.root, self.uri = root, uri_of(root, tracking)
        files.make_directory(root)
        mlflow = load_mlflow()
        with self.usable(), self.alone():  # of three processes that create one database at once, two crash
            mlflow.set_tracking_uri(self.uri)  # traces go where this points, whatever a client is told
            self.client: MlflowClient = mlflow.MlflowClient(self.uri, registry_uri=self.uri)
            self.loops, self.stages = (self._experiment(name) for name in (LOOPS, STAGES))
            self._follow_store()

    @property
    def served(self) -> bool:
        """Tell whether MLflow is a server, which has an artifact location of its own and does not see our disk."""
        return not self.uri.startswith(("sqlite", "postgres", "mysql", "mssql"))

    @contextmanager
    def usable(self) -> Iterator[None]:
        """Turn every failure inside into a UserError; for the start, when the user still watches."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # every store and driver has errors of its own
            reason = first_line(error).replace(self.uri, without_query(self.uri))
            raise UserError(
                f"MLflow can't be used at {without_query(self.uri)}: {reason}.",
                hint="Set where.tracking.uri, or where.tracking.enabled=false and run `thinkimg track sync` later.",
            ) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the store's MLflow lock: one process at a time looks up what is missing and adds it."""
        with files.locked(self.root / "mlflow.lock"):
            yield

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self.served else location_of(artifact_root(self.root, self.uri) / name)
            return self.client.create_experiment(name, location)
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"The MLflow experiment {name} at {without_query(self.uri)} has been deleted.",
                hint=f"Restore it: mlflow experiments restore --experiment-id {experiment.experiment_id}",
            )
        return experiment.experiment_id

    def _follow_store(self) -> None:
        """Let the database name the place of its files where it names one at which they were before.

        A database in the store was moved with it, another one with the files beside it. An earlier version kept a
        shared one's files in the first of its stores, and these may be on machines or disks that can't be seen here.
        There a row moves if the files of its run, whose name is random, are here.
        """
        recorded = path_of(self.client.get_experiment(self.loops).artifact_location)
        own = artifact_root(self.root, self.uri) / LOOPS
        if self.served or recorded is None or recorded == own or recorded.parts[-2:] != own.parts[-2:]:
            return
        if is_same(recorded, own):  # by another name
            return
        old, new = recorded.parents[1], own.parents[1]
        if is_inside(self.root, database_path(self.uri)):
            count = move_records(self.uri, old, new)
        elif not is_gone(recorded):
            return
        elif not is_gone(own):
            count = move_records(self.uri, old, new)
        elif self._has_runs(old, new := self.root.resolve()):
            count = move_records(self.uri, old, new, is_here)
        else:
            log.warning("There is nothing at %s, where MLflow's database keeps files, and not all are here.", recorded)
            return
        forget_places()
        log.warning("The store was at %s before: %d places in MLflow's database now name %s.", old, count, new)

    def _has_runs(self, old: Path, new: Path) -> bool:
        """Return True if this store's loops have runs in `old`, and the files of all of these are in `new`."""
        own = {path.stem for path in (self.root / "loops").glob("*.json")}
        locations = [move(location, old, new) for loop, location in loop_locations(self.uri) if loop in own]
        moved = [location for location in locations if location is not None]
        return bool(moved) and all(is_here("runs", location) for location in moved)

    def find_run(self, experiment: str, tag: str, value: str) -> "Run | None":
        """Return the oldest run with a tag, if any."""
        runs = self.client.search_runs([experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time"])
        return runs[0] if runs else None

    def all_runs(self, experiment: str) -> "Iterator[Run]":
        """Yield every run of an experiment."""
        return read_pages(self.client.search_runs, experiment_ids=[experiment], max_results=1000)


def read_pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """Yield the results of a search of MLflow, from all its pages."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
