"""Record of a loop, `<store>/loops/<loop id>.json`: metrics and artifacts of each step."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Protocol

from thinkimg.conversation.settings import ConversationConfig
from thinkimg.errors import UserError
from thinkimg.redaction import without_query
from thinkimg.store import files
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import KINDS
from thinkimg.store.manifest import Artifact, Reference, canonical_json, git_revision, json_number, utc_now
from thinkimg.tracking.settings import TrackingConfig

log = logging.getLogger(__name__)

FORMAT = 1
NOTHING: Mapping[str, str] = MappingProxyType({})
CHANGING = ("iterations", "where", "preset", "on_alarm")
"""Settings that may change in a loop."""
PATHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "source": ("data", "path"),
        "script": ("warmstart", "demonstrations"),
        "checkpoint": ("warmstart", "checkpoint"),
        "base": ("model", "path"),
        "clip": ("image", "embedding", "pretrained"),
    }
)
"""Role of a loop's outside input -> setting that names it: its digest counts in place of the path."""
CLIP_FOLDER = ("image", "embedding", "model")
"""Setting that names a CLIP in a folder, as `local-dir:<folder>`."""


class WhereSettings(Protocol):
    """Part of `where` that tracking reads."""

    @property
    def tracking(self) -> TrackingConfig: ...


class LoopSettings(Protocol):
    """Part of a loop's config that tracking reads."""

    @property
    def seed(self) -> int: ...
    @property
    def mix(self) -> Mapping[str, float]: ...
    @property
    def where(self) -> WhereSettings: ...
    def talk(self) -> ConversationConfig: ...
    def model_dump(self, *, mode: str, exclude: Any = None) -> dict[str, Any]: ...


@dataclass
class IterationRecord:
    """Record of one step: 0 is before training, n is after the n-th iteration."""

    step: int
    artifacts: dict[str, Reference] = field(default_factory=dict)
    """Stage -> artifact, made or reused."""
    metrics: dict[str, float] = field(default_factory=dict)
    time: str = field(default_factory=utc_now)
    """Time of the last change (UTC, ISO 8601)."""


@dataclass
class LoopRecord:
    """Record of a loop: with its artifacts, all that MLflow shows of it."""

    loop_id: str
    config: dict[str, Any]
    """Resolved config as plain JSON, so that records of older versions stay readable."""
    name: str
    iterations: list[IterationRecord] = field(default_factory=list)
    system: str | None = None
    """System prompt of the conversations."""
    outside: dict[str, str] = field(default_factory=dict)
    """Name -> digest of what the loop reads beside its config; empty in records of version 0.2."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Name -> rows."""
    git: str | None = field(default_factory=git_revision)
    started: str = field(default_factory=utc_now)
    finished: str | None = None
    status: str = "RUNNING"
    """RUNNING, FINISHED, FAILED or KILLED, as MLflow has them."""

    def iteration(self, step: int) -> IterationRecord:
        """Return the record of a step, created if there is none; steps are kept in order."""
        for iteration in self.iterations:
            if iteration.step == step:
                return iteration
        self.iterations.append(IterationRecord(step))
        self.iterations.sort(key=lambda iteration: iteration.step)
        return self.iteration(step)

    def references(self, kind: str) -> list[tuple[int, Reference]]:
        """Return (step, reference) of every artifact of a kind, by step."""
        return [
            (iteration.step, reference)
            for iteration in self.iterations
            for reference in iteration.artifacts.values()
            if reference.kind == kind
        ]

    def add(
        self, step: int, artifacts: Mapping[str, Artifact | Reference], metrics: Mapping[str, float | None]
    ) -> None:
        """Add to a step. Artifacts bring their headline metrics; `metrics` override them. NaN and None are left out."""
        iteration = self.iteration(step)
        for stage, artifact in artifacts.items():
            if isinstance(artifact, Artifact):
                iteration.metrics |= headline(artifact)
                artifact = artifact.reference
            iteration.artifacts[stage] = artifact
        assert all("/" in key for key in metrics), f"keys have a namespace, as in eval/accuracy: {list(metrics)}"
        iteration.metrics |= finite(metrics)
        iteration.time = utc_now()


def loop_id(config: LoopSettings, outside: Mapping[str, str] = NOTHING) -> str:
    """Return 16 hex digits over the config without `iterations`, `where` and `on_alarm`, which may change in a loop.

    outside: name -> digest of what the loop reads beside it, such as a user's data. Paths of these don't count.
    """
    tree = identity_of(config.model_dump(mode="json"), outside)
    return hashlib.sha256(canonical_json([tree, dict(outside)] if outside else tree).encode()).hexdigest()[:16]


def identity_of(tree: Mapping[str, Any], outside: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    """Return a resolved config without settings that may change in a loop, and without paths that `outside` covers."""
    identity = {name: value for name, value in tree.items() if name not in CHANGING}
    for role in outside.keys() & PATHS.keys():
        path = PATHS[role]
        if role == "clip" and str(_setting(identity, CLIP_FOLDER)).startswith("local-dir:"):
            path = CLIP_FOLDER
        identity = _without(identity, path)
    return identity


def _setting(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Return the setting at a path, None if a tree has none."""
    value: Any = tree
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _without(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return a tree without the setting at a path, if it has that."""
    name, rest = path[0], path[1:]
    if not rest or not isinstance(tree.get(name), Mapping):
        return {key: value for key, value in tree.items() if rest or key != name}
    return {**tree, name: _without(tree[name], rest)}


def changed_inputs(record: LoopRecord, config: LoopSettings, outside: Mapping[str, str]) -> list[str] | None:
    """Return the names of outside inputs in which a loop differs from a recorded one, None if its config differs."""
    if identity_of(record.config, outside) != identity_of(config.model_dump(mode="json"), outside):
        return None
    names = record.outside.keys() | outside.keys()
    return sorted(name for name in names if record.outside.get(name) != outside.get(name))


def resolved(config: LoopSettings) -> dict[str, Any]:
    """Return the config as JSON without a password in the tracking URI."""
    tree = config.model_dump(mode="json")
    if tree["where"]["tracking"]["uri"]:
        tree["where"]["tracking"]["uri"] = without_query(tree["where"]["tracking"]["uri"])
    return tree


def headline(artifact: Artifact) -> dict[str, float]:
    """Return the manifest's metrics under the keys of a loop's run, and the stage's seconds as `time/<stage>_s`.

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
    """Return the metrics without None, NaN and infinities."""
    numbers = {name: json_number(value) for name, value in metrics.items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def milliseconds(time: str) -> int:
    """Return milliseconds since the epoch of an ISO 8601 time."""
    return round(datetime.fromisoformat(time).timestamp() * 1000)


def save_record(store: Store, record: LoopRecord) -> None:
    """Replace the loop's file atomically. Two loops take turns."""
    directory = store.root / "loops"
    files.make_directory(directory)
    # Keys stay in order: that of the stages, and of a table's columns.
    text = json.dumps({"format": FORMAT} | asdict(record), indent=1, allow_nan=False)
    with files.locked(directory / ".lock"):
        files.write(directory / f"{record.loop_id}.json", text + "\n")


def load_record(store: Store, loop_id: str) -> LoopRecord | None:
    """Return the loop's record, None if there is none. Raises UserError if the file can't be read."""
    path = store.root / "loops" / f"{loop_id}.json"
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_bytes())
        if tree.pop("format") != FORMAT:
            raise UserError(f"{path} was written by another version of thinkimg.")
        for iteration in tree["iterations"]:
            iteration["artifacts"] = {stage: Reference(**entry) for stage, entry in iteration["artifacts"].items()}
        tree["iterations"] = [IterationRecord(**iteration) for iteration in tree["iterations"]]
        return LoopRecord(**tree)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no loop record: {error!r}.", hint="Move it away to start the loop anew.") from error


def load_records(store: Store) -> Iterator[LoopRecord]:
    """Yield every loop's record, oldest first; one that can't be read is logged and left out."""
    records = []
    for path in (store.root / "loops").glob("*.json"):
        try:
            records.append(load_record(store, path.stem))
        except UserError as error:
            log.warning("%s", error)
    yield from sorted(records, key=lambda record: (record.started, record.loop_id))


def find_loop(store: Store, artifact: Artifact) -> LoopRecord | None:
    """Return the record of the loop that made or used an artifact; None if a single stage made it."""
    for record in load_records(store):
        if any(reference.digest == artifact.digest for _, reference in record.references(artifact.kind)):
            return record
    return None
