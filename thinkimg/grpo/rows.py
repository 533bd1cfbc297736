"""What a training job reads: trajectories with their advantages, and the patches of their images."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thinkimg.artifacts import Artifact
from thinkimg.chat.tokens import conversation
from thinkimg.data.images import ImageTable
from thinkimg.errors import UserError
from thinkimg.grpo.packing import Conversation, patches
from thinkimg.images.decode import pixel_hash
from thinkimg.images.view import grid, view
from thinkimg.schemas import Trajectory, from_row

CACHE_BYTES = 2 * 2**30  # patches, float32: an image of 1,000 tokens is 19 MB
PIXEL_CACHE_BYTES = 64 * 2**20  # full-resolution images behind them are hardly read twice
READERS = 8


@dataclass(frozen=True)
class Row:
    """A trajectory as the trainer sees it. engine: (N,) float32 log-probabilities of its N scored tokens."""

    trajectory_id: str
    group_id: str
    weights: str
    conversation: Conversation
    engine: np.ndarray
    advantage: float = 0.0


def read_advantages(path: Path | str) -> dict[str, float]:
    """trajectory_id -> advantage of the included rows."""
    import pyarrow.parquet as pq

    columns = pq.read_table(path, columns=["trajectory_id", "advantage"]).to_pydict()
    return dict(zip(columns["trajectory_id"], columns["advantage"], strict=True))


def read_rows(artifact: Artifact, image_token: int, advantages: Mapping[str, float] | None = None) -> list[Row]:
    """The rows with an advantage (all with sampled tokens if None) in the artifact's order.

    Raises UserError if an advantage belongs to none of them, or a row has another number of placeholders than of grids.
    """
    rows = []
    for batch in artifact.batches("trajectories"):
        for record in batch.to_pylist():
            if advantages is not None and record["trajectory_id"] not in advantages:
                continue
            trajectory = from_row(Trajectory, record)
            if trajectory.logprobs:
                rows.append(read_row(trajectory, image_token, (advantages or {}).get(trajectory.trajectory_id, 0.0)))
    if advantages is not None and len(rows) < len(advantages):
        unknown = sorted(set(advantages) - {row.trajectory_id for row in rows})
        raise UserError(
            f"{len(unknown)} of {len(advantages)} advantages belong to no trajectory with sampled tokens: {unknown[:3]}.",
            hint="Are the advantages those of these rollouts?",
        )
    return rows


def read_row(trajectory: Trajectory, image_token: int, advantage: float) -> Row:
    placeholders = trajectory.tokens.count(image_token)
    if not placeholders == len(trajectory.grids) == len(trajectory.images):
        raise UserError(
            f"Trajectory {trajectory.trajectory_id} has {placeholders} placeholders, {len(trajectory.images)} images "
            f"and {len(trajectory.grids)} grids."
        )
    return Row(
        trajectory.trajectory_id,
        trajectory.group_id,
        trajectory.weights,
        conversation(trajectory, image_token),
        np.asarray(trajectory.logprobs, dtype=np.float32),
        advantage,
    )


class Patches:
    """Image hash -> patches as the vision tower takes them, made once while they fit and checked against hash and grid."""

    def __init__(self, tables: Iterable[Path | str], *, min_pixels: int, max_pixels: int, cache_bytes: int = CACHE_BYTES):
        self._images = ImageTable([Artifact.open(Path(table)) for table in tables], PIXEL_CACHE_BYTES)
        self._limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self._made: OrderedDict[str, Future[np.ndarray]] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="patches")

    def prepare(self, conversations: Iterable[Conversation]) -> None:
        """Begin to make what these will need, in threads, while the model computes on others."""
        wanted = {key: tuple(g) for c in conversations for key, g in zip(c.images, c.grids, strict=True)}
        for key, patch_grid in wanted.items():
            self._request(key, patch_grid)

    def __call__(self, key: str) -> np.ndarray:
        """(h * w, 1176) float32 of an image that was prepared before.

        Raises UserError if the pixels don't have the hash that they are stored under, or a row has them in another grid.
        """
        return self._request(key, None).result()

    def _request(self, key: str, patch_grid: tuple[int, ...] | None) -> "Future[np.ndarray]":
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            self._room -= 0 if patch_grid is None else _bytes(patch_grid)
            future = self._readers.submit(self._make, key, patch_grid)
            self._made[key] = future
            return future

    def trim(self) -> None:
        """Forget the images that were not asked for longest, down to the limit; call it between batches."""
        with self._lock:
            while self._room < 0 and self._made:
                _, future = self._made.popitem(last=False)
                self._room += future.result().nbytes

    def _make(self, key: str, patch_grid: tuple[int, ...] | None) -> np.ndarray:
        try:
            image = self._images.decoded(key)
        except KeyError:
            raise UserError(f"The image {key} is in none of the image tables.", hint="Does the data set belong to the rollouts?") from None
        if (found := pixel_hash(image)) != key:
            raise UserError(f"The pixels stored as {key[:16]}… have the hash {found[:16]}….", hint="See `thinkimg verify`.")
        seen = view(image, **self._limits)
        if patch_grid is not None and grid(*seen.size) != tuple(patch_grid):
            raise UserError(
                f"The image {key[:16]}… was {tuple(patch_grid)} patches to the engine and is {grid(*seen.size)} to the trainer.",
                hint="images.min_pixels and images.max_pixels must be those of the rollouts.",
            )
        return patches(seen)

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)


def _bytes(patch_grid: tuple[int, ...]) -> int:
    return int(np.prod(patch_grid)) * 1176 * 4
