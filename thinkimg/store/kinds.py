"""Typed artifacts: the one reader of each kind's tables. They stream: one row group, or one part, is in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from thinkimg import records
from thinkimg.errors import UserError
from thinkimg.records import Sample, Trajectory
from thinkimg.store.image_table import ImageTable
from thinkimg.store.manifest import Artifact, read_manifest
from thinkimg.store.tables import read_batches

IDENTITY = ("trajectory_id", "sample_id", "group_id")
"""Columns of a scores table that are no component."""
JUDGEMENTS = "judgements"


class Typed(Artifact):
    """An artifact of a known kind."""

    KIND: ClassVar[str]
    FIGURES: ClassVar[tuple[str, ...]] = ()
    """Metrics that tell one from another of its kind."""
    SPACES: ClassVar[tuple[str, ...]]
    """Beginnings of its metrics' names in a loop's run; the first is put before names that have none of them."""
    LASTING: ClassVar[bool] = False
    """Whether later stages go on reading it, so that its files are never dropped."""


class Dataset(Typed):
    """Samples and their images."""

    KIND, FIGURES, SPACES, LASTING = "dataset", ("train", "held_out"), ("data",), True

    def samples(self, split: str | None = None, ids: Iterable[str] | None = None) -> Iterator[Sample]:
        """The samples in their order: all, those of "train" or "held_out", those of some ids."""
        wanted = None if ids is None else pa.array(sorted(set(ids)), pa.string())
        for batch in self.batches("samples"):
            if wanted is not None:
                batch = batch.filter(pc.is_in(batch.column("sample_id"), wanted))
            if split is not None:
                batch = batch.filter(pc.equal(batch.column("split"), split))
            yield from (records.from_row(Sample, row) for row in batch.to_pylist())

    def split(self, name: str) -> list[Sample]:
        """The samples of "train" or "held_out". Raises UserError if there are none."""
        samples = list(self.samples(name))
        if not samples:
            raise UserError(
                f"{self.reference} has no samples in the split {name}.", hint="The splits are train and held_out."
            )
        return samples

    def samples_of(self, rows: Iterable[Trajectory]) -> dict[str, Sample]:
        """The samples of some trajectories, by id."""
        return {sample.sample_id: sample for sample in self.samples(ids={row.sample_id for row in rows})}

    def image_sizes(self, hashes: set[str]) -> dict[str, tuple[int, int]]:
        """(width, height) in pixels of some images, by hash."""
        return _image_sizes([self], hashes)


class Episodes(Typed):
    """Trajectories, and the images that tools made in them."""

    def parts(self) -> dict[str, int]:
        """Name of each part of the trajectories -> its rows, in order."""
        return {path.name: self.files[path.name]["rows"] for path in self.table_files("trajectories")}

    def trajectories(
        self, part: str | None = None, ids: Iterable[str] | None = None, table: str = "trajectories"
    ) -> Iterator[Trajectory]:
        """The trajectories in their order: all, those of a part, or those of some ids."""
        return read_trajectories(self.table_files(table) if part is None else [self.checked(part)], ids)

    def rows(self, columns: list[str], part: str | None = None) -> Iterator[dict[str, Any]]:
        """Some columns of the trajectories as plain values, in order."""
        return read_columns(self.table_files("trajectories") if part is None else [self.checked(part)], columns)

    def ids(self) -> list[str]:
        """Trajectory ids, in order."""
        return [row["trajectory_id"] for row in self.rows(["trajectory_id"])]

    @property
    def tools(self) -> tuple[str, ...] | None:
        """`conversation.tools` of the conversations; None: the shipped ones."""
        names = self.manifest["recipe"]["config"].get("conversation", {}).get("tools")
        return None if names is None else tuple(names)

    def images(self, dataset: Dataset) -> ImageTable:
        """The images of the conversations, by hash: those of the samples, and those that tools made where they are kept."""
        return ImageTable([dataset, self] if self.has_table("images") else [dataset])

    def image_sizes(self, dataset: Dataset, hashes: set[str]) -> dict[str, tuple[int, int]]:
        """(width, height) in pixels of some images, by hash."""
        return _image_sizes([dataset, self], hashes)


class Rollouts(Episodes):
    """An iteration's trajectories, whole groups next to each other."""

    KIND, FIGURES, SPACES = "rollouts", ("trajectories", "tool/rate"), ("rollout", "tool")


class Demonstrations(Episodes):
    """Scripted trajectories, and comparisons of pairs in the same form."""

    KIND, SPACES = "demonstrations", ("demonstrations",)


class Evaluation(Episodes):
    """Trajectories over held-out samples."""

    KIND, FIGURES, SPACES = "evaluation", ("accuracy", "avg_at_k"), ("eval",)


class Scores(Typed):
    """One raw value per trajectory and component, in order of the rollouts, and the judgements beside them."""

    KIND, SPACES = "scores", ("reward",)

    @property
    def components(self) -> list[str]:
        """Names of the columns."""
        names = pq.read_schema(self.table_files("scores")[0]).names
        return [name for name in names if name not in IDENTITY]

    def values(self) -> dict[str, np.ndarray]:
        """Component -> (N,) float64, NaN where the value is missing."""
        names = self.components
        values: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for batch in self.batches("scores", [f"{name}.value" for name in names]):
            for name in names:
                column = batch.column(name).field("value")
                values[name].append(column.to_numpy(zero_copy_only=False).astype(np.float64))
        return {name: np.concatenate([*parts, np.empty(0)]) for name, parts in values.items()}

    def identities(self) -> tuple[list[str], list[str]]:
        """(trajectory ids, group ids), in order."""
        ids: list[str] = []
        groups: list[str] = []
        for batch in self.batches("scores", ["trajectory_id", "group_id"]):
            ids += batch.column("trajectory_id").to_pylist()
            groups += batch.column("group_id").to_pylist()
        return ids, groups

    def rows(self, ids: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Rows as stored: identity, and per component value, status, reason and evidence; all, or those of some ids."""
        wanted = None if ids is None else pa.array(sorted(set(ids)), pa.string())
        for batch in self.batches("scores"):
            if wanted is not None:
                batch = batch.filter(pc.is_in(batch.column("trajectory_id"), wanted))
            yield from batch.to_pylist()

    def judgements(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Key -> the judgement as it is stored; those that are not there are left out.

        Two components may name one key, where one judge answered for both: the verdict is the same.
        """
        wanted = set(keys)
        if not wanted or not self.has_table(JUDGEMENTS):
            return {}
        rows = (row for batch in self.batches(JUDGEMENTS) for row in batch.to_pylist())
        return {row["key"]: row for row in rows if row["key"] in wanted}


class Policy(Typed):
    """Weights with their vocabulary, as a whole model or an adapter, and the advantages that they were trained with."""

    KIND, FIGURES = "policy", ("train/rows", "parity/mean_abs")
    SPACES = ("train", "parity", "reward", "time")

    @property
    def is_full(self) -> bool:
        """Whether it is a whole model and not an adapter."""
        return "policy/model/config.json" in self.files

    @property
    def model_directory(self) -> Path:
        return self.checked("policy/model")

    @property
    def adapter_directory(self) -> Path:
        return self.checked("policy/adapter")

    @property
    def adapter_rank(self) -> int:
        return self.json("policy/adapter/adapter_config.json")["r"]

    @property
    def vocabulary(self) -> Path:
        """The directory with tokenizer, processor and chat template."""
        return self.model_directory if self.is_full else self.adapter_directory

    def advantages(self) -> dict[str, dict[str, Any]]:
        """Trajectory id -> {total, advantage, included, reason, group_id} as it was trained."""
        rows = (row for batch in self.batches("advantages") for row in batch.to_pylist())
        return {row["trajectory_id"]: row for row in rows}


class Pairs(Typed):
    """Known pairs of puzzle images."""

    KIND, SPACES, LASTING = "pairs", ("pairs",), True

    def rows(self) -> list[dict[str, str]]:
        """sample_id, question, family, and the hashes original, right and wrong."""
        return self.table("pairs").to_pylist()


class Clip(Typed):
    """The small CLIP."""

    KIND, SPACES, LASTING = "clip", ("clip",), True


KINDS: dict[str, type[Typed]] = {
    kind.KIND: kind for kind in (Clip, Pairs, Dataset, Demonstrations, Policy, Rollouts, Scores, Evaluation)
}
"""By name, in the order of the pipeline: what an artifact goes on from is the last of its inputs."""


def read_trajectories(paths: Iterable[Path], ids: Iterable[str] | None = None) -> Iterator[Trajectory]:
    """Yield the trajectories of files in their order, all or those of some ids; one batch is in memory."""
    wanted = None if ids is None else pa.array(sorted(set(ids)), pa.string())
    for batch in read_batches(paths, rows=256):
        if wanted is not None:
            batch = batch.filter(pc.is_in(batch.column("trajectory_id"), wanted))
        yield from (records.from_row(Trajectory, row) for row in batch.to_pylist())


def read_columns(paths: Iterable[Path], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield some columns of files as plain values, row by row."""
    for batch in read_batches(paths, columns):
        yield from batch.to_pylist()


def open_artifact(directory: Path) -> Artifact:
    """The artifact in a directory, as its kind. Raises as `Artifact.open`."""
    manifest = read_manifest(directory)
    return typed(directory, manifest).compared()


def typed(directory: Path, manifest: dict[str, Any]) -> Artifact:
    """The artifact of a manifest, as its kind."""
    return KINDS.get(manifest["kind"], Artifact)(directory, manifest)


def _image_sizes(artifacts: Iterable[Artifact], hashes: set[str]) -> dict[str, tuple[int, int]]:
    return {
        row["sha256"]: (row["width"], row["height"])
        for artifact in artifacts
        if artifact.has_table("images")
        for batch in artifact.batches("images", ["sha256", "width", "height"])
        for row in batch.to_pylist()
        if row["sha256"] in hashes
    }
