"""Kinds of artifacts, and the reader of each kind's tables, with one row group in memory at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from thinkimg.errors import UserError
from thinkimg.records import Sample, Trajectory, from_row
from thinkimg.store.image_table import ImageTable
from thinkimg.store.manifest import Artifact, read_manifest
from thinkimg.store.tables import read_batches

IDENTITY = ("trajectory_id", "sample_id", "group_id")
"""Columns of a scores table that are no component."""
JUDGEMENTS = "judgements"


class TypedArtifact(Artifact):
    """An artifact of one of the kinds below."""

    KIND: ClassVar[str]
    FIGURES: ClassVar[tuple[str, ...]] = ()
    """Headline metrics, which tell an artifact from others of its kind."""
    SPACES: ClassVar[tuple[str, ...]]
    """Prefixes of its metrics' names in a loop's run; names without a prefix get the first."""
    LASTING: ClassVar[bool] = False
    """True if later stages read it again and again, so that its files are never dropped."""


class Dataset(TypedArtifact):
    """Samples and their images."""

    KIND, FIGURES, SPACES, LASTING = "dataset", ("train", "held_out"), ("data",), True

    def samples(self, split: str | None = None, ids: Iterable[str] | None = None) -> Iterator[Sample]:
        """Yield the samples in their order: all, those of "train" or "held_out", or those of some ids."""
        for row in _select(self.batches("samples"), "sample_id", ids):
            if split in (None, row["split"]):
                yield from_row(Sample, row)

    def split(self, name: str) -> list[Sample]:
        """Return the samples of "train" or "held_out". Raises UserError if there are none."""
        samples = list(self.samples(name))
        if not samples:
            raise UserError(
                f"{self.reference} has no samples in the split {name}.", hint="The splits are train and held_out."
            )
        return samples

    def samples_of(self, rows: Iterable[Trajectory]) -> dict[str, Sample]:
        """Return the samples of some trajectories, by id."""
        return {sample.sample_id: sample for sample in self.samples(ids={row.sample_id for row in rows})}

    def image_sizes(self, hashes: set[str]) -> dict[str, tuple[int, int]]:
        """Return (width, height) in pixels of some images, by hash."""
        return _read_image_sizes([self], hashes)


class Episodes(TypedArtifact):
    """Trajectories, and the images that tools made in them."""

    def parts(self) -> dict[str, int]:
        """Return the name of each part of the trajectories -> its number of rows, in order."""
        return {path.name: self.files[path.name]["rows"] for path in self.table_files("trajectories")}

    def trajectories(
        self, part: str | None = None, ids: Iterable[str] | None = None, table: str = "trajectories"
    ) -> Iterator[Trajectory]:
        """Yield the trajectories in their order: all, those of a part, or those of some ids."""
        return read_trajectories(self.table_files(table) if part is None else [self.checked(part)], ids)

    def rows(self, columns: list[str], part: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield some columns of the trajectories as plain values, in order."""
        return read_columns(self.table_files("trajectories") if part is None else [self.checked(part)], columns)

    def ids(self) -> list[str]:
        """Return the trajectory ids, in order."""
        return [row["trajectory_id"] for row in self.rows(["trajectory_id"])]

    @property
    def tools(self) -> tuple[str, ...] | None:
        """Setting `conversation.tools` of these conversations; None for all shipped tools."""
        names = self.manifest["recipe"]["config"].get("conversation", {}).get("tools")
        return None if names is None else tuple(names)

    def images(self, dataset: Dataset) -> ImageTable:
        """Return the images of the conversations by hash: those of the samples, and stored ones that tools made."""
        return ImageTable([dataset, self] if self.has_table("images") else [dataset])

    def image_sizes(self, dataset: Dataset, hashes: set[str]) -> dict[str, tuple[int, int]]:
        """Return (width, height) in pixels of some images, by hash."""
        return _read_image_sizes([dataset, self], hashes)


class Rollouts(Episodes):
    """Trajectories of an iteration; the rows of a group are adjacent."""

    KIND, FIGURES, SPACES = "rollouts", ("trajectories", "tool/rate"), ("rollout", "tool")


class Demonstrations(Episodes):
    """Scripted trajectories, and comparisons of pairs in the same form."""

    KIND, SPACES = "demonstrations", ("demonstrations",)


class Evaluation(Episodes):
    """Trajectories over held-out samples."""

    KIND, FIGURES, SPACES = "evaluation", ("accuracy", "avg_at_k", "chance", "failed"), ("eval",)


class Scores(TypedArtifact):
    """Raw values, one per trajectory and component, in the order of the rollouts; and the judgements behind them."""

    KIND, SPACES = "scores", ("reward",)

    @property
    def components(self) -> list[str]:
        """Names of the components' columns."""
        names = pq.read_schema(self.table_files("scores")[0]).names
        return [name for name in names if name not in IDENTITY]

    def values(self) -> dict[str, np.ndarray]:
        """Return component -> (N,) float64, NaN where the value is missing."""
        names = self.components
        values: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for batch in self.batches("scores", [f"{name}.value" for name in names]):
            for name in names:
                column = batch.column(name).field("value")
                values[name].append(column.to_numpy(zero_copy_only=False).astype(np.float64))
        return {name: np.concatenate([*parts, np.empty(0)]) for name, parts in values.items()}

    def identities(self) -> tuple[list[str], list[str]]:
        """Return (trajectory ids, group ids), in order."""
        ids: list[str] = []
        groups: list[str] = []
        for batch in self.batches("scores", ["trajectory_id", "group_id"]):
            ids += batch.column("trajectory_id").to_pylist()
            groups += batch.column("group_id").to_pylist()
        return ids, groups

    def rows(self, ids: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield rows as stored, all or those of some ids: per component value, status, reason and evidence."""
        return _select(self.batches("scores"), "trajectory_id", ids)

    def judgements(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return key -> the judgement as it is stored, without the keys that have none.

        Two components may name one key, where one judge answered for both: the verdict is the same.
        """
        wanted = set(keys)
        if not wanted or not self.has_table(JUDGEMENTS):
            return {}
        return {row["key"]: row for row in _select(self.batches(JUDGEMENTS), "key", wanted)}


class Policy(TypedArtifact):
    """Weights with their vocabulary, a complete model or an adapter, and the advantages that they were trained on."""

    KIND, FIGURES = "policy", ("train/rows", "parity/mean_abs")
    SPACES = ("train", "parity", "reward", "time")

    @property
    def is_full(self) -> bool:
        """True for a complete model, False for an adapter."""
        return "policy/model/config.json" in self.files

    @property
    def model_directory(self) -> Path:
        """Directory of the complete model."""
        return self.checked("policy/model")

    @property
    def adapter_directory(self) -> Path:
        """Directory of the adapter."""
        return self.checked("policy/adapter")

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapter."""
        return self.json("policy/adapter/adapter_config.json")["r"]

    @property
    def vocabulary(self) -> Path:
        """Directory with tokenizer, processor and chat template."""
        return self.model_directory if self.is_full else self.adapter_directory

    def advantages(self) -> dict[str, dict[str, Any]]:
        """Return trajectory id -> {total, advantage, included, reason, group_id} of the training of these weights."""
        return {row["trajectory_id"]: row for row in _select(self.batches("advantages"))}


class Pairs(TypedArtifact):
    """Known pairs of puzzle images."""

    KIND, SPACES, LASTING = "pairs", ("pairs",), True

    def rows(self) -> list[dict[str, str]]:
        """Return rows of sample_id, question, family, and the hashes original, right and wrong."""
        return self.table("pairs").to_pylist()


class Clip(TypedArtifact):
    """The small CLIP."""

    KIND, SPACES, LASTING = "clip", ("clip",), True


KINDS: dict[str, type[TypedArtifact]] = {
    kind.KIND: kind for kind in (Clip, Pairs, Dataset, Demonstrations, Policy, Rollouts, Scores, Evaluation)
}
"""Classes by name, in the order of the pipeline: a lineage is drawn along each artifact's last input in this order."""


def read_trajectories(paths: Iterable[Path], ids: Iterable[str] | None = None) -> Iterator[Trajectory]:
    """Yield the trajectories of files in their order, all or those of some ids; one batch is in memory."""
    for row in _select(read_batches(paths, rows=256), "trajectory_id", ids):
        yield from_row(Trajectory, row)


def read_columns(paths: Iterable[Path], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield some columns of files as plain values, row by row."""
    return _select(read_batches(paths, columns))


def open_artifact(directory: Path) -> Artifact:
    """Return the artifact in a directory, as its kind. Raises as `Artifact.open`."""
    return as_kind(directory, read_manifest(directory)).check_sizes()


def as_kind(directory: Path, manifest: dict[str, Any]) -> Artifact:
    """Return the artifact of a manifest, as its kind; files are not looked at."""
    return KINDS.get(manifest["kind"], Artifact)(directory, manifest)


def _select(
    batches: Iterable[pa.RecordBatch], column: str = "", ids: Iterable[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of batches as plain values, all or those that have one of `ids` in a column."""
    wanted = None if ids is None else pa.array(sorted(set(ids)), pa.string())
    for batch in batches:
        yield from (batch if wanted is None else batch.filter(pc.is_in(batch.column(column), wanted))).to_pylist()


def _read_image_sizes(artifacts: Iterable[Artifact], hashes: set[str]) -> dict[str, tuple[int, int]]:
    columns = ["sha256", "width", "height"]
    return {
        row["sha256"]: (row["width"], row["height"])
        for artifact in artifacts
        if artifact.has_table("images")
        for row in _select(artifact.batches("images", columns), "sha256", hashes)
    }
