"""Tracking of a loop and of single stages: once MLflow has answered at the start, no failure of it stops training."""

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from thinkimg.conversation.episode import render_system_prompt
from thinkimg.redaction import without_password, without_query
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact, Reference, git_revision, utc_now
from thinkimg.tracking.connection import Connection, artifact_root, first_line, uri_of
from thinkimg.tracking.projection import LoopRun, open_run, project_loop, project_policies, project_stage, readable_mix
from thinkimg.tracking.records import (
    NOTHING,
    LoopRecord,
    LoopSettings,
    changed_inputs,
    load_record,
    load_records,
    loop_id,
    resolved,
    save_record,
)
from thinkimg.tracking.settings import TrackingConfig
from thinkimg.tracking.trace_data import has_trace_data, read_trace_data
from thinkimg.tracking.traces import log_traces, trace_key, trace_keys
from thinkimg.tracking.view import QUERY

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

PORT = 5000  # of MLflow's UI
SAMPLE_S, SAMPLES_PER_POINT = 10, 3  # of the machine's load


class LoopTracker:
    """Record of a loop, saved after each change, and the MLflow run that shows it. Not thread-safe.

    `connection` is None where tracking is off: the record is kept for a later `sync_store`. The next call repeats what
    MLflow did not take.
    """

    def __init__(self, store: Store, record: LoopRecord, connection: Connection | None, run: LoopRun | None) -> None:
        self.store, self.record, self.connection, self._run = store, record, connection, run
        self._warned: set[str] = set()
        self._traced: set[int] = set()
        self._machine: SystemMetricsMonitor | None = None

    def log_iteration(
        self,
        step: int,
        metrics: Mapping[str, float | None] | None = None,
        artifacts: Mapping[str, Artifact | Reference] | None = None,
    ) -> None:
        """Add to a step, any number of times; step 0 is before training.

        artifacts: stage -> its artifact; an Artifact brings its headline metrics (see `records.headline`).
        metrics: full keys such as `reward/total`. A step with rollouts and scores gets its traces, and each artifact
        the run of its stage.
        """
        self.record.add(step, artifacts or {}, metrics or {})
        self._save()
        for artifact in (artifacts or {}).values():
            if isinstance(artifact, Artifact):
                self._log_stage(artifact)

    @property
    def link(self) -> str | None:
        """URL of the run; None where tracking is off or MLflow has not answered."""
        return run_link(self.connection, self.connection.loops, self._run.run_id) if self._run else None

    def finish(self, status: str = "FINISHED") -> None:
        """Set the status: FINISHED, FAILED or KILLED. A loop that is opened again runs again."""
        self.record.status, self.record.finished = status, utc_now()
        self._save()

    def _log_stage(self, artifact: Artifact) -> None:
        if self.connection:
            with self._forgiving("stages"), self.connection.alone():
                project_stage(self.connection, artifact)

    def __enter__(self) -> Self:
        if self._run is not None:
            self._machine = watch_machine(self.connection, self._run.run_id)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._machine is not None:
            self._machine.finish()
        if kind is None:
            self.finish()
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _save(self) -> None:
        if self.connection is None:
            save_record(self.store, self.record)
            return
        # Saved under the lock: a sync in between would add the new points, and we would add them again, as we only
        # remember what MLflow had before.
        with self.connection.alone():
            save_record(self.store, self.record)
            self._project()

    def _project(self) -> None:
        with self._forgiving("runs"):
            self._run = self._run or open_run(self.connection, self.record)
            project_loop(self.connection, self.record, self._run)
        run = self._run
        if run is None:
            return
        with self._forgiving("traces"):
            log_missing_traces(self.connection, self.store, self.record, run.run_id, self._traced)
        with self._forgiving("policies"):
            project_policies(self.connection, self.store, self.record, run.run_id)

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        """Turn a failure into a warning, one per kind of entry."""
        try:
            yield
        except Exception as error:  # of a database, a network or a driver: none may stop training
            self._run = None  # to look up what has arrived when MLflow answers again
            level = logging.DEBUG if what in self._warned else logging.WARNING
            message = "MLflow did not take %s (%s: %s); `thinkimg track sync` adds what is missing"
            log.log(level, message, what, type(error).__name__, first_line(error))
            self._warned.add(what)


def open_loop(config: LoopSettings, store: Store, outside: Mapping[str, str] = NOTHING) -> LoopTracker:
    """Return the tracker of a loop, new or continued: `iterations` and `where` do not make it another loop.

    outside: see `loop_id`. Raises UserError if MLflow is unusable.
    """
    identity = loop_id(config, outside)
    record = load_record(store, identity)
    if record is None:
        name = f"{readable_mix(config.mix)} seed={config.seed} {identity[:6]}"
        system = render_system_prompt(config.talk())
        warn_of_changed_inputs(config, store, outside)
        record = LoopRecord(identity, resolved(config), name, system=system, outside=dict(outside))
    assert record.loop_id == identity, f"the record of loop {record.loop_id} for loop {identity}"
    record.config, record.status, record.finished = resolved(config), "RUNNING", None
    record.git = git_revision()
    tracking = config.where.tracking
    save_record(store, record)
    if not tracking.enabled:
        return LoopTracker(store, record, None, None)
    connection = Connection(store.root, tracking)
    with connection.usable(), connection.alone():
        run = open_run(connection, record)
        project_loop(connection, record, run)
    return LoopTracker(store, record, connection, run)


def warn_of_changed_inputs(config: LoopSettings, store: Store, outside: Mapping[str, str]) -> None:
    """Warn where the latest recorded loop of this config read other data, weights or code."""
    for record in reversed(list(load_records(store))):
        names = changed_inputs(record, config, outside)
        if names:
            log.warning(
                "This is a new loop, and none that goes on: since loop %s of the same config there has changed: %s.",
                record.loop_id,
                ", ".join(names),
            )
            return


def watch_machine(connection: Connection, run_id: str) -> "SystemMetricsMonitor":
    """Start a thread that logs `system/…` (CPU, memory, disk, network, GPUs) until it is finished or MLflow fails.

    No record has these figures of MLflow, so that `sync_store` does not restore them.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, SAMPLE_S, SAMPLES_PER_POINT, resume_logging=True, tracking_uri=connection.uri
    )
    monitor.start()
    return monitor


def log_stage(artifact: Artifact, store: Store, tracking: TrackingConfig) -> str | None:
    """Log the run of a single stage, and return its URL; a failure is a warning."""
    if tracking.enabled:
        try:
            connection = Connection(store.root, tracking)
            with connection.alone():
                project_stage(connection, artifact)
            run = connection.find_run(connection.stages, "thinkimg.artifact", str(artifact.reference))
            return run_link(connection, connection.stages, run.info.run_id)
        except Exception as error:  # the artifact is complete, and worth more than its run in MLflow
            log.warning("MLflow did not take %s (%s)", artifact.reference, error)
    return None


def run_link(connection: Connection, experiment: str, run_id: str) -> str:
    """Return the URL of a run; for a database, the one at which `thinkimg track ui` shows it."""
    return f"{address(connection)}/#/experiments/{experiment}/runs/{run_id}"


def compare_link(store: str, tracking: TrackingConfig, port: int = PORT) -> str:
    """Return the URL at which all loops overlay, comparable charts first (see view.py). store: its root."""
    connection = Connection(Path(store), tracking)
    return f"{address(connection, port)}/#/experiments/{connection.loops}/runs?{QUERY}"


def address(connection: Connection, port: int = PORT) -> str:
    """Return the URL of MLflow's UI. port: that of `thinkimg track ui`, which shows a database."""
    return (
        without_password(connection.uri).rstrip("/")
        if connection.uri.startswith("http")
        else f"http://127.0.0.1:{port}"
    )


def log_missing_traces(connection: Connection, store: Store, record: LoopRecord, run_id: str, done: set[int]) -> int:
    """Log traces of the steps that have rollouts and scores in the store and are not `done`, and add these to it.

    Returns the number of traces that were missing.
    """
    count, added = record.config["where"]["tracking"]["traces"], 0
    ready = [iteration.step for iteration in record.iterations if has_trace_data(store, record, iteration.step)]
    steps = [step for step in ready if step not in done] if count else []
    existing = trace_keys(connection, run_id, steps[0] if len(steps) == 1 else None) if steps else set()
    for step in steps:
        done.add(step)  # even if it fails: a damaged artifact would be read again with every call
        if sum(key.startswith(trace_key(run_id, step, "")) for key in existing) < count:
            added += log_traces(connection, run_id, step, read_trace_data(store, record, step, count), existing)
    return added


@dataclass
class SyncReport:
    """Counts of entries that a sync added to MLflow."""

    loops: int = 0
    stages: int = 0
    points: int = 0
    traces: int = 0
    policies: int = 0

    def __str__(self) -> str:
        return "added " + ", ".join(f"{getattr(self, field.name)} {field.name}" for field in fields(self))


def sync_store(store: Store, tracking: TrackingConfig | None = None) -> SyncReport:
    """Add to MLflow what it lacks of all records and artifacts; a second time adds nothing.

    tracking: None for sqlite in the store's root. Raises UserError if MLflow is unusable or a record can't be read, and
    MLflow's own errors; entries that were added before stay.
    """
    connection, report = Connection(store.root, tracking or TrackingConfig()), SyncReport()
    have = {
        run.data.tags.get("thinkimg.artifact")
        for run in connection.all_runs(connection.stages)
        if run.info.status == "FINISHED"
    }
    for artifact in store.list():
        if str(artifact.reference) not in have:
            with connection.alone():
                report.stages += project_stage(connection, artifact)
    for record in load_records(store):
        with connection.alone():
            report.loops += connection.find_run(connection.loops, "thinkimg.loop", record.loop_id) is None
            run = open_run(connection, record)
            report.points += project_loop(connection, record, run)
            report.traces += log_missing_traces(connection, store, record, run.run_id, set())
            report.policies += project_policies(connection, store, record, run.run_id)
    return report


def ui_command(store: str, tracking: TrackingConfig, port: int = PORT) -> str:
    """Return the shell command that shows the runs in a browser: a local server, or the tracking server's page.

    A password is left out. Raises UserError if the database is unusable.
    """
    root, argv = Path(store), list_ui_arguments(store, tracking, port)
    uri = uri_of(root, tracking)
    if is_page(uri):
        return shlex.join(argv)
    Connection(root, tracking)  # which follows a store that was moved
    return f"MLFLOW_DISABLE_TELEMETRY=true {shlex.join([*argv, '--backend-store-uri', without_query(uri)])}"


def list_ui_arguments(store: str, tracking: TrackingConfig, port: int = PORT) -> list[str]:
    """Return the program and arguments of `ui_command`, without the database: everybody sees a process's arguments.

    MLflow reads its URI from MLFLOW_BACKEND_STORE_URI.
    """
    root = Path(store)
    uri = uri_of(root, tracking)
    if is_page(uri):
        parts = urlsplit(uri)
        page = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="")
        return [sys.executable, "-m", "webbrowser", page.geturl()]
    server = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*server, "--default-artifact-root", str(artifact_root(root, uri))]


def is_page(uri: str) -> bool:
    """Tell whether a tracking URI is that of a server, which has a page of its own."""
    return uri.startswith(("http:", "https:"))
