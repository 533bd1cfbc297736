"""Input of a training job: trajectories with their advantages, and the patches of their images."""

import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from thinkimg.conversation.tokens import ROLES, expansion
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.images.patches import ImageProcessor
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import resize_to_view
from thinkimg.records import Role, Trajectory
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Episodes, open_artifact
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.policy import PolicyModel

CACHE_BYTES = 2 * 2**30  # patches, float32: an image of 1,000 tokens is 19 MB
PIXEL_CACHE_BYTES = 64 * 2**20  # full-resolution images behind them are hardly read twice
FLOAT_BYTES = 4
READERS = 8


@dataclass(frozen=True)
class Row:
    """A trajectory with N scored tokens."""

    trajectory_id: str
    group_id: str
    weights: str
    conversation: Conversation
    engine: np.ndarray
    """(N,) float32 log-probabilities, as sampled."""
    advantage: float = 0.0


def read_advantages(path: Path | str) -> dict[str, float]:
    """Return the advantages of the included rows, by trajectory_id."""
    columns = pq.read_table(path, columns=["trajectory_id", "advantage"]).to_pydict()
    return dict(zip(columns["trajectory_id"], columns["advantage"], strict=True))


def read_rows(
    artifact: Episodes,
    image_token: ImageToken,
    advantages: Mapping[str, float] | None = None,
    table: str = "trajectories",
) -> list[Row]:
    """Return the rows with an advantage (None: all with sampled tokens), in the artifact's order.

    Raises UserError if an advantage belongs to none of them, or a row has another number of placeholders than of grids.
    """
    rows = []
    for trajectory in artifact.trajectories(ids=advantages, table=table):
        if trajectory.logprobs:
            rows.append(read_row(trajectory, image_token, (advantages or {}).get(trajectory.trajectory_id, 0.0)))
    if advantages is not None and len(rows) < len(advantages):
        unknown = sorted(set(advantages) - {row.trajectory_id for row in rows})
        raise UserError(
            f"{len(unknown)} of {len(advantages)} advantages belong to no trajectory with sampled tokens; the first is "
            f"{unknown[0]}.",
            hint="Are the advantages those of these rollouts?",
        )
    return rows


def read_row(trajectory: Trajectory, image_token: ImageToken, advantage: float) -> Row:
    """Return a trajectory as a row. Raises UserError if placeholders, images and grids differ in number."""
    placeholders = trajectory.tokens.count(image_token.id)
    if not placeholders == len(trajectory.grids) == len(trajectory.images):
        raise UserError(
            f"Trajectory {trajectory.trajectory_id} has {placeholders} placeholders, {len(trajectory.images)} images "
            f"and {len(trajectory.grids)} grids.",
            hint="The rollouts were changed since they were made: make them again.",
        )
    return Row(
        trajectory.trajectory_id,
        trajectory.group_id,
        trajectory.weights,
        build_conversation(trajectory, image_token),
        np.asarray(trajectory.logprobs, dtype=np.float32),
        advantage,
    )


class Patches:
    """Cache of patches as the vision tower takes them, by image hash; checked against hash and grid."""

    def __init__(
        self,
        tables: Iterable[Path | str],
        processor: ImageProcessor,
        limits: ViewLimits,
        *,
        cache_bytes: int = CACHE_BYTES,
    ):
        """tables: artifacts with an `images` table. limits: those under which the engine saw the images."""
        self._images = ImageTable([open_artifact(Path(table)) for table in tables], PIXEL_CACHE_BYTES)
        self._limits, self._processor = limits, processor
        self._grids: dict[str, tuple[int, ...]] = {}
        self._cache: OrderedDict[str, Future[np.ndarray]] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="patches")

    def prepare(self, conversations: Iterable[Conversation], unneeded: Container[str] = ()) -> None:
        """Start making the patches of conversations in threads, while the model computes on others.

        unneeded: keys of images whose features are cached.
        """
        for row in conversations:
            for key, patch_grid in zip(row.images, row.grids, strict=True):
                self._grids[key] = tuple(patch_grid.tolist())
                if key not in unneeded:
                    self._request(key)

    def __call__(self, key: str) -> np.ndarray:
        """Return (h * w, values) float32 of an image of a conversation that was prepared before.

        Raises UserError if the pixels' hash is not the one they are stored under, or a row has another grid.
        """
        return self._request(key).result()

    def trim(self) -> None:
        """Forget the least recently used images, down to the limit."""
        with self._lock:
            while self._room < 0:
                key, _ = self._cache.popitem(last=False)
                self._room += self._bytes(key)

    def close(self) -> None:
        """Stop the threads."""
        self._readers.shutdown(cancel_futures=True)

    def _request(self, key: str) -> Future[np.ndarray]:
        with self._lock:  # micro-batches side by side ask at the same time
            if key not in self._cache:
                self._cache[key] = self._readers.submit(self._make, key, self._grids[key])
                self._room -= self._bytes(key)
            self._cache.move_to_end(key)
            return self._cache[key]

    def _bytes(self, key: str) -> int:
        return int(np.prod(self._grids[key])) * self._processor.patch_values * FLOAT_BYTES

    def _make(self, key: str, patch_grid: tuple[int, ...]) -> np.ndarray:
        try:
            image = self._images.decoded(key)
        except KeyError:
            hint = "Does the data set belong to the rollouts?"
            raise UserError(f"The image {key} is in none of the image tables.", hint=hint) from None
        if (actual := pixel_hash(image)) != key:
            raise UserError(
                f"The pixels stored as {key[:16]}… have the hash {actual[:16]}….",
                hint="The artifact was changed since it was made: make it again.",
            )
        resized = resize_to_view(image, self._limits)
        if (own := self._limits.count_patches(resized.size)) != patch_grid:
            raise UserError(
                f"The image {key[:16]}… had {patch_grid} patches in the engine and has {own} in the trainer.",
                hint="images.min_pixels and images.max_pixels must be those of the rollouts.",
            )
        return self._processor.extract_patches(resized)


def read_patches(job: Mapping, policy: PolicyModel) -> Patches:
    """Return the patches of a job's images, as the policy's vision tower takes them.

    Raises UserError where the rollouts had another grid.
    """
    images, processor = job["images"], policy.family.processor
    limits = ViewLimits(**{name: value for name, value in images.items() if name != "tables"})
    if (limits.patch, limits.merge) != (processor.patch, processor.merge):
        raise UserError(
            f"The images were seen in tokens of {limits.token_side} pixels, and the model is a {policy.family.name}, "
            f"which has {processor.token_side}.",
            hint="Is model.path of the rollouts that of the training?",
        )
    return Patches(images["tables"], processor, limits)


def build_conversation(trajectory: Trajectory, image_token: ImageToken) -> Conversation:
    """Return a trajectory's expanded ids, scored at the sampled ones.

    Scored tokens and trajectory.logprobs have the same order. Images go by content hash of their full resolution.
    """
    counts = expansion(trajectory.tokens, [*map(image_token.count, trajectory.grids)], image_token.id)
    scored = np.asarray(trajectory.roles) == ROLES.index(Role.SAMPLED)
    assert scored.sum() == len(trajectory.logprobs), "one log-probability per sampled token"
    return Conversation(
        tokens=np.repeat(np.asarray(trajectory.tokens, dtype=np.int64), counts),
        scored=np.repeat(scored, counts),
        images=trajectory.images,
        grids=np.asarray(trajectory.grids, dtype=np.int64).reshape(-1, 3),
    )
