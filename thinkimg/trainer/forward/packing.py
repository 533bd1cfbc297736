"""Conversations as the trainer computes on them, their mRoPE positions, and padded batches of similar length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUSY, SPREAD = 2048, 1.15  # tokens that keep a machine busy; from there on, longest to shortest row of a batch


@dataclass(frozen=True)
class Conversation:
    """Tokens and images of one trajectory."""

    tokens: np.ndarray
    """(T,) int64, expanded: one id per image token."""
    scored: np.ndarray
    """(T,) bool: the tokens with a log-probability, never the first."""
    images: tuple[str, ...]
    """Keys of the images, in order."""
    grids: np.ndarray
    """(images, 3) int64: patches (t, h, w) of each image."""


@dataclass(frozen=True)
class ImageToken:
    """Token that stands for a square of an image's patches."""

    id: int
    merge: int
    """Patches of the square's side."""

    @classmethod
    def of(cls, config: "PretrainedConfig") -> Self:
        """Return the image token of a model's config."""
        return cls(config.image_token_id, config.vision_config.spatial_merge_size)

    def count(self, grid: Iterable[int]) -> int:
        """Return the number of tokens of an image of (t, h, w) patches."""
        t, h, w = (int(side) for side in grid)
        return t * h * w // self.merge**2

    def cells(self, grid: Iterable[int]) -> tuple[int, int]:
        """Return the rows and columns of tokens of a still image of (1, h, w) patches."""
        _, h, w = (int(side) for side in grid)
        return h // self.merge, w // self.merge


def compute_mrope_positions(tokens: np.ndarray, image_token: ImageToken, grids: np.ndarray) -> np.ndarray:
    """Return (3, T) int64 temporal, height and width positions, equal to the model's get_rope_index for still images.

    Images are told apart by their grids in order, so two images may stand side by side.
    """
    positions = np.empty((3, len(tokens)), dtype=np.int64)
    index, position = 0, 0
    starts = np.flatnonzero(tokens == image_token.id)
    placed = 0
    for grid in grids:
        assert placed < len(starts), "more grids than image tokens"
        start, count = int(starts[placed]), image_token.count(grid)
        placed += count
        text = np.arange(position, position + start - index)
        positions[:, index:start] = text
        position += start - index
        rows, columns = image_token.cells(grid)
        positions[0, start : start + count] = position
        positions[1, start : start + count] = position + np.repeat(np.arange(rows), columns)
        positions[2, start : start + count] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        index = start + count
    assert placed == len(starts), f"{len(starts)} image tokens, grids hold {placed}"
    positions[:, index:] = np.arange(position, position + len(tokens) - index)
    return positions


def batch_by_length(conversations: Iterable[Conversation], token_budget: int) -> Iterator[list[int]]:
    """Yield batches of indices of conversations of similar length, the shortest first.

    A batch has at most token_budget padded tokens, or a single row. Once it keeps the machine busy, a row that would
    add much padding begins the next: 9 % of a step on a CPU.
    """
    lengths = [len(c.tokens) for c in conversations]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batch: list[int] = []
    for i in order:  # ascending: the newest is the longest
        padded = lengths[i] * (len(batch) + 1)
        if batch and (padded > token_budget or (padded > BUSY and lengths[i] > SPREAD * lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
