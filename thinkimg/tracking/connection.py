"""Opening MLflow: where it keeps things, its two experiments, and one process at a time that writes."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.tracking.records import without_password
from thinkimg.tracking.settings import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOOPS, STAGES = "thinkimg", "thinkimg-stages"


@functools.cache
def load_mlflow() -> ModuleType:
    """mlflow, imported with telemetry off, and with limits under which an outage does not hold up training for long."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"  # so that a trace is there when `log_traces` returns
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # two lines for every stage
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 retries back off for four minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    # Fifty lines about the migrations of a new database, and four about a thread.
    for name in ("mlflow.store.db.utils", "alembic", "mlflow.system_metrics.system_metrics_monitor"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def uri_of(root: Path, tracking: TrackingConfig) -> str:
    """The tracking URI; sqlite below the store's root unless there is another."""
    return tracking.uri or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def artifact_root(root: Path) -> Path:
    """Where MLflow keeps files of its own: tables, and the images of traces."""
    return root.resolve() / "mlartifacts"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


class Connection:
    """An MLflow that answers, with the ids of the two experiments. Raises UserError if the URI is unusable."""

    def __init__(self, root: Path, tracking: TrackingConfig) -> None:
        self.root, self.uri = root, uri_of(root, tracking)
        files.make_directory(root)
        mlflow = load_mlflow()
        with self.usable(), self.alone():  # three processes that create one database at once: two crashes
            mlflow.set_tracking_uri(self.uri)  # traces go where this points, whatever a client is told
            self.client: MlflowClient = mlflow.MlflowClient(self.uri, registry_uri=self.uri)
            self.loops, self.stages = (self._experiment(name) for name in (LOOPS, STAGES))

    @property
    def served(self) -> bool:
        """Whether a server is between us and the database, that knows its own artifact location and not our disk."""
        return not self.uri.startswith(("sqlite", "postgres", "mysql", "mssql"))

    @contextmanager
    def usable(self) -> Iterator[None]:
        """Whatever fails inside is a UserError: for set-up, where someone still looks."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # every store and driver has errors of its own
            reason = first_line(error).replace(self.uri, without_password(self.uri))
            raise UserError(
                f"MLflow can't be used at {without_password(self.uri)}: {reason}",
                hint="set where.tracking.uri, or where.tracking.enabled=false and sync later",
            ) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the store's MLflow lock: what is missing is looked up and added by one process at a time."""
        with files.locked(self.root / "mlflow.lock"):
            yield

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self.served else str(artifact_root(self.root) / name)
            return self.client.create_experiment(name, location)
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {name} at {without_password(self.uri)} has been deleted",
                hint=f"restore it: mlflow experiments restore --experiment-id {experiment.experiment_id}",
            )
        return experiment.experiment_id

    def find_run(self, experiment: str, tag: str, value: str) -> "Run | None":
        """The oldest run with a tag."""
        runs = self.client.search_runs([experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time"])
        return runs[0] if runs else None

    def all_runs(self, experiment: str) -> "Iterator[Run]":
        token = None
        while True:
            page = self.client.search_runs([experiment], max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return
