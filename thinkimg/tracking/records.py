"""A loop's story on disk, `<store>/loops/<loop id>.json`: what happened at which step, by reference to artifacts."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Protocol

from thinkimg.conversation.settings import ConversationConfig
from thinkimg.errors import UserError
from thinkimg.settings import without_password
from thinkimg.store import files
from thinkimg.store.artifacts import Artifact, Reference, Store
from thinkimg.store.kinds import KINDS
from thinkimg.store.manifest import canonical, git_revision, now
from thinkimg.tracking.settings import TrackingConfig

log = logging.getLogger(__name__)

FORMAT = 1


class WhereSettings(Protocol):
    @property
    def tracking(self) -> TrackingConfig: ...


class LoopSettings(Protocol):
    """What tracking reads of the config of a loop."""

    @property
    def seed(self) -> int: ...
    @property
    def mix(self) -> Mapping[str, float]: ...
    @property
    def conversation(self) -> ConversationConfig: ...
    @property
    def where(self) -> WhereSettings: ...
    def model_dump(self, *, mode: str, exclude: Any = None) -> dict[str, Any]: ...


@dataclass
class IterationRecord:
    """One step: 0 is before training, n is after the n-th iteration."""

    step: int
    artifacts: dict[str, Reference] = field(default_factory=dict)
    """Stage -> what it made, or what was reused."""
    metrics: dict[str, float] = field(default_factory=dict)
    time: str = field(default_factory=now)
    """When it was last added to (UTC, ISO 8601)."""


@dataclass
class LoopRecord:
    """All that the projection of a loop needs beside its artifacts."""

    loop_id: str
    config: dict[str, Any]
    """The resolved config as JSON; plain, so that records of older versions stay readable."""
    name: str
    iterations: list[IterationRecord] = field(default_factory=list)
    system: str | None = None
    """System prompt of the conversations."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Name -> rows."""
    git: str | None = field(default_factory=git_revision)
    started: str = field(default_factory=now)
    finished: str | None = None
    status: str = "RUNNING"
    """RUNNING, FINISHED, FAILED or KILLED, as MLflow has them."""

    def iteration(self, step: int) -> IterationRecord:
        """The record of a step, made if there is none; they are kept in order."""
        for iteration in self.iterations:
            if iteration.step == step:
                return iteration
        self.iterations.append(IterationRecord(step))
        self.iterations.sort(key=lambda iteration: iteration.step)
        return self.iteration(step)

    def references(self, kind: str) -> list[tuple[int, Reference]]:
        """(step, reference) of every artifact of a kind, by step."""
        return [
            (iteration.step, reference)
            for iteration in self.iterations
            for reference in iteration.artifacts.values()
            if reference.kind == kind
        ]

    def add(
        self, step: int, artifacts: Mapping[str, Artifact | Reference], metrics: Mapping[str, float | None]
    ) -> None:
        """Add to a step: artifacts bring their headline metrics, `metrics` wins over them; no NaN, no None."""
        iteration = self.iteration(step)
        for stage, artifact in artifacts.items():
            if isinstance(artifact, Artifact):
                iteration.metrics |= headline(artifact)
                artifact = artifact.reference
            iteration.artifacts[stage] = artifact
        assert all("/" in key for key in metrics), f"keys have a space, as in eval/accuracy: {list(metrics)}"
        iteration.metrics |= finite(metrics)
        iteration.time = now()


def loop_id(config: LoopSettings) -> str:
    """16 hex digits over the config but `iterations`, `where` and `on_alarm`: resumed or extended it stays the same."""
    return hashlib.sha256(canonical(resolved(config, identity=True)).encode()).hexdigest()[:16]


def resolved(config: LoopSettings, identity: bool = False) -> dict[str, Any]:
    """The config as JSON, without a password in the tracking URI; for identity without what may change."""
    tree = config.model_dump(mode="json", exclude={"iterations", "where", "preset", "on_alarm"} if identity else None)
    if not identity and tree["where"]["tracking"]["uri"]:
        tree["where"]["tracking"]["uri"] = without_password(tree["where"]["tracking"]["uri"])
    return tree


def headline(artifact: Artifact) -> dict[str, float]:
    """The manifest's metrics under the keys of a loop's run, and the stage's seconds as `time/<stage>_s`.

    Of an evaluation `accuracy` becomes `eval/accuracy`, `detail/accuracy` becomes `eval/detail/accuracy`; of rollouts
    `tool/rate` stays as it is (see SPACES in store/kinds.py), and of scores `tool` becomes `reward/tool`.
    """
    spaces = KINDS[artifact.kind].SPACES if artifact.kind in KINDS else (artifact.kind,)
    keys = {
        name: name if name.startswith(tuple(f"{space}/" for space in spaces)) else f"{spaces[0]}/{name}"
        for name in artifact.metrics
    }
    seconds = (milliseconds(artifact.manifest["finished"]) - milliseconds(artifact.manifest["started"])) / 1000
    return {f"time/{artifact.manifest['recipe']['stage']}_s": seconds} | finite(
        {keys[name]: value for name, value in artifact.metrics.items()}
    )


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if value is not None and math.isfinite(value)}


def milliseconds(time: str) -> int:
    """Since the epoch."""
    return round(datetime.fromisoformat(time).timestamp() * 1000)


def save_record(store: Store, record: LoopRecord) -> None:
    """Replace the loop's file at once: a reader sees all of the old or all of the new. Two loops take turns."""
    directory = store.root / "loops"
    files.make_directory(directory)
    # Keys in their order: it is that of the stages, and of a table's columns.
    text = json.dumps({"format": FORMAT} | asdict(record), indent=1, allow_nan=False)
    with files.locked(directory / ".lock"):
        files.write(directory / f"{record.loop_id}.json", text + "\n")


def load_record(store: Store, loop_id: str) -> LoopRecord | None:
    """The loop's record, None if it has none; UserError where the file can't be read."""
    path = store.root / "loops" / f"{loop_id}.json"
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_bytes())
        if tree.pop("format") != FORMAT:
            raise UserError(f"{path} was written by another version of thinkimg")
        tree["iterations"] = [
            IterationRecord(
                **iteration
                | {"artifacts": {stage: Reference(**reference) for stage, reference in iteration["artifacts"].items()}}
            )
            for iteration in tree["iterations"]
        ]
        return LoopRecord(**tree)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no loop record: {error!r}", hint="move it away to start anew") from error


def records(store: Store) -> Iterator[LoopRecord]:
    """Every loop's record, oldest first; one that can't be read is logged, not listed."""
    found = []
    for path in (store.root / "loops").glob("*.json"):
        try:
            found.append(load_record(store, path.stem))
        except UserError as error:
            log.warning("%s", error)
    yield from sorted(found, key=lambda record: (record.started, record.loop_id))
