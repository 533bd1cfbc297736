"""Conversations as the trainer computes on them, their mRoPE positions, and padded batches of similar length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from thinkimg.images.patches import MERGE, image_tokens

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


def compute_mrope_positions(tokens: np.ndarray, image_token: int, grids: np.ndarray) -> np.ndarray:
    """Return (3, T) int64 temporal, height and width positions, equal to Qwen2.5-VL's get_rope_index for still images.

    Images are told apart by their grids in order, so two images may stand side by side.
    """
    positions = np.empty((3, len(tokens)), dtype=np.int64)
    index, position = 0, 0
    starts = np.flatnonzero(tokens == image_token)
    placed = 0
    for grid in grids:
        assert placed < len(starts), "more grids than image tokens"
        start, count = int(starts[placed]), image_tokens(grid)
        placed += count
        text = np.arange(position, position + start - index)
        positions[:, index:start] = text
        position += start - index
        rows, columns = int(grid[1]) // MERGE, int(grid[2]) // MERGE
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
