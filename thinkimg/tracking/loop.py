"""What stages and the loop call: nothing here stops training once MLflow has answered at set-up."""

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from thinkimg.conversation.episode import system_prompt
from thinkimg.settings import without_password
from thinkimg.store.artifacts import Artifact, Reference, Store
from thinkimg.store.manifest import now
from thinkimg.tracking.connection import Connection, artifact_root, first_line, uri_of
from thinkimg.tracking.projection import LoopRun, open_run, project_loop, project_policies, project_stage, readable_mix
from thinkimg.tracking.records import (
    LoopRecord,
    LoopSettings,
    load_record,
    loop_id,
    records,
    resolved,
    save_record,
)
from thinkimg.tracking.settings import TrackingConfig
from thinkimg.tracking.stored import has_traces, stored
from thinkimg.tracking.traces import log_traces, trace_key, trace_keys
from thinkimg.tracking.view import QUERY

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

LOCAL_UI = "http://127.0.0.1:5000"
SAMPLE_S, SAMPLES_PER_POINT = 10, 3  # of the machine's load


class LoopTracker:
    """The loop's record, saved after each change, and the run that shows it.

    `connection` is None where tracking is off: the record is kept all the same, for a later `sync`. What MLflow did not
    take is tried again at the next call. Not for several threads.
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
        """Add to a step, as often as there is something new; 0 is before training.

        artifacts: stage -> what it made or reused; an Artifact brings its headline metrics (see `records.headline`).
        metrics: full keys such as `reward/total`. A step that has rollouts and scores gets its traces, an artifact the
        run of its stage.
        """
        self.record.add(step, artifacts or {}, metrics or {})
        self._changed()
        for artifact in (artifacts or {}).values():
            if isinstance(artifact, Artifact):
                self.log_stage(artifact)

    def log_stage(self, artifact: Artifact, cached: bool = False) -> None:
        """The short run of a stage that has been executed; it has one already if it is cached."""
        if self.connection and not cached:
            with self._forgiving("stages"), self.connection.alone():
                project_stage(self.connection, artifact)

    @property
    def link(self) -> str | None:
        """Where a browser finds the run; None where tracking is off or MLflow has not answered."""
        return run_link(self.connection, self.connection.loops, self._run.run_id) if self._run else None

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rows (JSON values, finite) as a table of the run; replaces the table of that name. Keep it short."""
        self.record.tables[name] = [dict(row) for row in rows]
        self._changed()

    def finish(self, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED; a loop that is opened again runs again."""
        self.record.status, self.record.finished = status, now()
        self._changed()

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

    def _changed(self) -> None:
        if self.connection is None:
            save_record(self.store, self.record)
            return
        # Saved under the lock: else a sync could add the new points before we do, and we, who remember what MLflow has,
        # would add them again.
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
        """Warn once for each kind of thing that MLflow did not take, and go on."""
        try:
            yield
        except Exception as error:  # whatever a database, a network or a driver raises must not stop training
            self._run = None  # look up what has arrived when it answers again
            log.log(
                logging.DEBUG if what in self._warned else logging.WARNING,
                "MLflow did not take %s (%s: %s); `thinkimg track sync` adds what is missing",
                what,
                type(error).__name__,
                first_line(error),
            )
            self._warned.add(what)


def open_loop(
    config: LoopSettings, store: Store, record: LoopRecord | None = None, *, name: str | None = None
) -> LoopTracker:
    """The tracker of a loop, new or continued: the same config but for `iterations` and `where` is the same loop.

    record: the loop's story so far, read from the store if None. Raises UserError if MLflow is unusable.
    """
    identity = loop_id(config)
    record = record or load_record(store, identity)
    if record is None:
        name = name or f"{readable_mix(config.mix)} seed={config.seed} {identity[:6]}"
        record = LoopRecord(identity, resolved(config), name, system=system_prompt(config.conversation))
    assert record.loop_id == identity, f"the record of loop {record.loop_id} for loop {identity}"
    record.config, record.status, record.finished = resolved(config), "RUNNING", None
    tracking = config.where.tracking
    save_record(store, record)
    if not tracking.enabled:
        return LoopTracker(store, record, None, None)
    connection = Connection(store.root, tracking)
    with connection.usable(), connection.alone():
        run = open_run(connection, record)
        project_loop(connection, record, run)
    return LoopTracker(store, record, connection, run)


def watch_machine(connection: Connection, run_id: str) -> "SystemMetricsMonitor":
    """A thread that logs `system/…` (CPU, memory, disk, network, GPUs) until it is finished, or MLflow fails it.

    These figures are MLflow's own: no record has them, and `sync` does not bring them back.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, SAMPLE_S, SAMPLES_PER_POINT, resume_logging=True, tracking_uri=connection.uri
    )
    monitor.start()
    return monitor


def log_stage(artifact: Artifact, store: Store, tracking: TrackingConfig) -> str | None:
    """The short run of a stage that was executed by itself, and where a browser finds it; a failure is a warning."""
    if tracking.enabled:
        try:
            connection = Connection(store.root, tracking)
            with connection.alone():
                project_stage(connection, artifact)
            run = connection.find_run(connection.stages, "thinkimg.artifact", str(artifact.reference))
            return run_link(connection, connection.stages, run.info.run_id)
        except Exception as error:  # the artifact is made: that is what counts
            log.warning("MLflow did not take %s (%s)", artifact.reference, error)
    return None


def run_link(connection: Connection, experiment: str, run_id: str) -> str:
    """The run's page; for a database, where `thinkimg track ui` shows it."""
    return f"{address(connection)}/#/experiments/{experiment}/runs/{run_id}"


def compare_link(store: str, tracking: TrackingConfig) -> str:
    """The page on which all loops overlay, raw rewards and held-out evaluation first (see `view`). store: its root."""
    connection = Connection(Path(store), tracking)
    return f"{address(connection)}/#/experiments/{connection.loops}/runs?{QUERY}"


def address(connection: Connection) -> str:
    return without_password(connection.uri).rstrip("/") if connection.uri.startswith("http") else LOCAL_UI


def log_missing_traces(connection: Connection, store: Store, record: LoopRecord, run_id: str, done: set[int]) -> int:
    """Traces of the steps that have rollouts and scores in the store and are not `done`; these are done now."""
    count, added = record.config["where"]["tracking"]["traces"], 0
    ready = [iteration.step for iteration in record.iterations if has_traces(store, record, iteration.step)]
    left = [step for step in ready if step not in done] if count else []
    known = trace_keys(connection, run_id, left[0] if len(left) == 1 else None) if left else set()
    for step in left:
        done.add(step)  # even if it fails: a damaged artifact would be read again with every call
        if sum(key.startswith(trace_key(run_id, step, "")) for key in known) < count:
            found = stored(store, record, step, count)
            added += log_traces(
                connection,
                run_id,
                step,
                found.chosen,
                found.images,
                found.scores,
                found.samples,
                system=record.system,
                reasons=found.reasons,
                known=known,
                tools=found.tools,
            )
    return added


@dataclass
class SyncReport:
    """What MLflow lacked and now has."""

    loops: int = 0
    stages: int = 0
    points: int = 0
    traces: int = 0
    policies: int = 0

    def __str__(self) -> str:
        return "added " + ", ".join(f"{getattr(self, field.name)} {field.name}" for field in fields(self))


def sync(store: Store, tracking: TrackingConfig | None = None) -> SyncReport:
    """Add to MLflow what it lacks of all records and artifacts, sqlite in the store's root unless `tracking` says else.

    Doing it again adds nothing.
    Raises UserError if MLflow is unusable or a record can't be read, and whatever MLflow raises on the way: what has
    been added stays.
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
    for record in records(store):
        with connection.alone():
            report.loops += connection.find_run(connection.loops, "thinkimg.loop", record.loop_id) is None
            run = open_run(connection, record)
            report.points += project_loop(connection, record, run)
            report.traces += log_missing_traces(connection, store, record, run.run_id, set())
            report.policies += project_policies(connection, store, record, run.run_id)
    return report


def ui_command(store: str, tracking: TrackingConfig) -> str:
    """The command that shows the runs in a browser, at http://127.0.0.1:5000 or where the tracking server is."""
    root = Path(store)
    uri = uri_of(root, tracking)
    if uri.startswith(("http:", "https:")):
        return shlex.join([sys.executable, "-m", "webbrowser", uri])
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        "5000",
        "--workers",
        "1",
        "--backend-store-uri",
        uri,
        "--default-artifact-root",
        str(artifact_root(root)),
    ]
    return f"MLFLOW_DISABLE_TELEMETRY=true {shlex.join(command)}"
