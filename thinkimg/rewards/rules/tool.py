"""Rule `tool`: the share of tool calls that succeeded and brought something new."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from thinkimg.conversation.regions import tool_images
from thinkimg.records import CallStatus, Trajectory, Turn, TurnKind
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.pairs import WHOLE_SHARE

SQUARE, MARGIN = 28, 2
"""Pixels of the view: side of the squares that are compared, and border that is left out, where rotations are black."""
LEAST_CHANGE = 1.75
"""Levels of 255 below which an image shows what its source shows: brightness by 1.02, rotations by 0.1 degrees."""
ENLARGED = 1.5
"""Pixels over those of the source, in the image and in its view, from which on a larger copy shows more."""
INFORMATION = "get_image_info"
"""Tool that tells what the prompt says already: it neither earns anything nor counts as a call that failed."""

ViewOf = Callable[[str, tuple[int, int]], np.ndarray]
"""Function of an image's hash and a view's (width, height): `describe_squares` of it."""


def score(batch: Batch) -> list[Score]:
    """Return (calls that brought something new / calls); 0 without a call.

    A call brings nothing new if it failed, if it succeeded before on the same image, or if its image hardly differs
    from an earlier one: equal pixels, squares that differ by less than LEAST_CHANGE (root mean square), or a crop of
    WHOLE_SHARE or more. The first INFORMATION about an image is left out of both numbers.
    """
    view_of = lru_cache(maxsize=4096)(partial(_view, batch))
    return [_score(trajectory, batch, view_of) for trajectory in batch.trajectories]


def _score(trajectory: Trajectory, batch: Batch, view_of: ViewOf) -> Score:
    calls = [turn for turn in trajectory.turns if turn.kind is TurnKind.TOOL]
    if not calls:
        return Score.zero("No tool was called.")
    unchanged = {id(turn) for turn in list_unchanged(trajectory, batch, view_of)}
    succeeded: set[tuple[str, str, int]] = set()
    new = information = duplicates = 0
    for turn in calls:
        if turn.status is CallStatus.OK and id(turn) not in unchanged and _identity(turn) not in succeeded:
            succeeded.add(_identity(turn))
            information += turn.tool == INFORMATION
            new += turn.tool != INFORMATION
        elif turn.status in (CallStatus.OK, CallStatus.DUPLICATE):
            duplicates += 1
    errors = len(calls) - new - information - duplicates
    evidence = {"calls": len(calls), "new": new, "duplicates": duplicates, "errors": errors}
    return Score.of(new / max(1, len(calls) - information), "No call brought anything new.", evidence)


def list_unchanged(trajectory: Trajectory, batch: Batch, view_of: ViewOf) -> Iterator[Turn]:
    """Yield the successful calls whose image shows what an earlier image of the conversation shows."""
    if batch.images is None or not trajectory.images:
        return
    own = len(trajectory.images) - sum(turn.image is not None for turn in trajectory.turns)
    for place, made in enumerate(tool_images(trajectory, batch.tools), own):
        assert made.turn.source is not None and made.turn.image is not None
        if made.turn.status is not CallStatus.OK:
            continue
        if made.cut is not None:
            if made.cut >= WHOLE_SHARE:
                yield made.turn
            continue
        after, before = trajectory.sizes[place], trajectory.sizes[made.turn.source]
        earlier = [
            sha256
            for index, sha256 in enumerate(trajectory.images[:place])
            if index == made.turn.source or trajectory.sizes[index] == before
        ]
        try:
            made_from = trajectory.images[made.turn.source]
            full_after, full_before = (batch.images.decoded(one).size for one in (made.turn.image, made_from))
            # Both: a view's sides are rounded, and one pixel more may double a small one.
            if min(area(after) / area(before), area(full_after) / area(full_before)) >= ENLARGED:
                continue
            new = view_of(made.turn.image, before)
            if any(root_mean_square(view_of(sha256, before) - new) < LEAST_CHANGE for sha256 in earlier):
                yield made.turn
        except KeyError:  # its image was not stored, so that nobody can tell
            continue


def describe_squares(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return mean and standard deviation of the squares of an RGB image's view: (2, rows, columns, 3) float32.

    size: (width, height) of the view. Half its resolution is looked at: shifts by part of a pixel change nothing.
    """
    (width, height), side = size, SQUARE // 2
    columns, rows = max(1, width // SQUARE), max(1, height // SQUARE)
    inner = (MARGIN, MARGIN, width - MARGIN, height - MARGIN)
    view = image.resize(size, Image.Resampling.BICUBIC)
    half = view.resize((columns * side, rows * side), Image.Resampling.BOX, box=inner)
    squares = np.asarray(half, np.float32).reshape(rows, side, columns, side, 3)
    return np.stack([squares.mean((1, 3)), squares.std((1, 3))])


def area(size: tuple[int, int]) -> int:
    """Return the number of pixels."""
    return size[0] * size[1]


def root_mean_square(difference: np.ndarray) -> float:
    """Return the root of the mean of the squares, in the unit of the values."""
    return float(np.sqrt(np.mean(np.square(difference))))


def _view(batch: Batch, sha256: str, size: tuple[int, int]) -> np.ndarray:
    assert batch.images is not None
    return describe_squares(batch.images.decoded(sha256), size)


def _identity(turn: Turn) -> tuple[str, str, int]:
    """Return tool, arguments and source of a call; without `image`, as "current" and 0 may name the same source."""
    assert turn.tool is not None and turn.args is not None and turn.source is not None
    args = json.loads(turn.args)
    args.pop("image", None)
    return turn.tool, json.dumps(args, sort_keys=True), turn.source
