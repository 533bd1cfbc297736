"""Turns conversations into batches: expanded token ids, mRoPE positions, the patches of each unique image once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from thinkimg.images.patches import MERGE, image_tokens

BUSY, SPREAD = 2048, 1.15  # tokens that keep a machine busy; from there on, longest to shortest row of a batch


@dataclass(frozen=True)
class Conversation:
    """What the trainer needs of one trajectory.

    tokens: (T,) int64, expanded (one id per image token). scored: (T,) bool, the tokens with a log-probability (never the
    first). images: keys of the pictures in order. grids: (n_images, 3) int64 patches (t, h, w).
    extras: further per-scored-token arrays, each (scored.sum(),), that travel with the row.
    """

    tokens: np.ndarray
    scored: np.ndarray
    images: tuple[str, ...]
    grids: np.ndarray
    extras: dict[str, np.ndarray] = field(default_factory=dict)


def mrope_positions(tokens: np.ndarray, image_token: int, grids: np.ndarray) -> np.ndarray:
    """(3, T) int64 temporal, height and width positions, as Qwen2.5-VL's get_rope_index gives them for still images.

    Images are told apart by their grids in order, so two images may stand side by side.
    """
    positions = np.empty((3, len(tokens)), dtype=np.int64)
    index, position = 0, 0
    starts = np.flatnonzero(tokens == image_token)
    taken = 0
    for grid in grids:
        assert taken < len(starts), "more grids than image tokens"
        start, count = int(starts[taken]), image_tokens(grid)
        taken += count
        text = np.arange(position, position + start - index)
        positions[:, index:start] = text
        position += start - index
        rows, columns = int(grid[1]) // MERGE, int(grid[2]) // MERGE
        positions[0, start : start + count] = position
        positions[1, start : start + count] = position + np.repeat(np.arange(rows), columns)
        positions[2, start : start + count] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        index = start + count
    assert taken == len(starts), f"{len(starts)} image tokens, grids hold {taken}"
    positions[:, index:] = np.arange(position, position + len(tokens) - index)
    return positions


def micro_batches(conversations: Iterable[Conversation], token_budget: int) -> Iterator[list[int]]:
    """Indices of conversations of similar length, each batch at most token_budget padded tokens (or a single row).

    Once a batch keeps the machine busy, a row that would add much padding begins the next: 9 % of a step on a CPU.
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
