"""What the image rewards judge: a processed image beside the original that it comes from, and what was found."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from thinkimg.images.coordinates import Box, taken_box
from thinkimg.images.patches import PATCH
from thinkimg.records import CallStatus, Sample, StopReason, Trajectory
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.judgement import Pair

if TYPE_CHECKING:
    from PIL import Image

WHOLE = 0.95  # a crop of this share of its source or more is no crop
SLIVER_PIXELS, SLIVER_ASPECT = 8, 20  # a shorter side below, or an aspect above: nothing can be seen in it


def processed(row: Trajectory, sample: Sample) -> "list[Pair | str]":
    """Every image that came back from a tool, in order: a pair to be judged, or the reason why it is worth nothing."""
    count = len(sample.images)
    roots: list[tuple[str, Box | None]] = [(sha, (0.0, 0.0, 1.0, 1.0)) for sha in sample.images]
    found: list[Pair | str] = []
    for turn in row.turns:
        if turn.image is None:
            continue
        original, region = roots[turn.source]
        _, high, wide = row.grids[turn.source]
        view = wide * PATCH, high * PATCH
        box = taken_box(turn.tool, json.loads(turn.args), view)
        if box is not None:
            area = (box[2] - box[0]) * (box[3] - box[1]) / (view[0] * view[1])
            region = region and within(region, box, view)
        elif turn.tool in ("rotate_image", "flip_image"):
            region = None
        roots.append((original, region))
        if turn.status is CallStatus.DUPLICATE:
            found.append("The image is the same as one before.")
        elif box is not None and area >= WHOLE:
            found.append(f"The {'crop' if turn.tool == 'crop_image' else 'zoom'} took the whole image.")
        else:
            found.append(Pair(sample.question, original, turn.image, region))
    assert len(roots) <= max(count, len(row.images)), "an image for each placeholder"
    return found


def within(region: Box, box: Box, view: tuple[int, int]) -> Box:
    """The part of the original that `box` (pixels of a view that shows `region` of it) takes."""
    left, top, right, bottom = region
    wide, high = (right - left) / view[0], (bottom - top) / view[1]
    return left + box[0] * wide, top + box[1] * high, left + box[2] * wide, top + box[3] * high


def degenerate(image: "Image.Image") -> str | None:
    """Why nothing can be seen in an RGB image, None if something can."""
    short, long = sorted(image.size)
    if short < SLIVER_PIXELS or long > SLIVER_ASPECT * short:
        return f"The image is a sliver of {image.width}x{image.height} pixels."
    if all(low == high for low, high in image.getextrema()):
        return "The image has one colour only."
    return None


def score_images(name: str, batch: Batch) -> list[Score]:
    """The scores of an image component from its judgements: one per trajectory, in order."""
    return [_score(name, row, batch) for row in batch.trajectories]


def _score(name: str, row: Trajectory, batch: Batch) -> Score:
    if row.stop is StopReason.FAILED:
        return Score.missing("The conversation failed.")
    images = processed(row, batch.sample(row))
    if not images:
        return Score.zero("No image was processed.")
    which = batch.image.which
    counted = [_value(name, image, batch) for image in (images[-1:] if which == "final" else images)]
    evidence = {"which": which, "judgements": [key for *_, key in counted if key]}
    known = [(value, reason) for value, reason, _ in counted if value is not None]
    if not known:
        return Score.missing(counted[-1][1], evidence)
    if which == "mean":
        value, reason = sum(value for value, _ in known) / len(known), known[-1][1]
    else:
        value, reason = max(known, key=lambda one: one[0])
    return Score.of(value, reason or "The judge gave 0.", evidence)


def _value(name: str, image: "Pair | str", batch: Batch) -> tuple[float | None, str | None, str | None]:
    """(value, reason, key of the judgement) of one processed image."""
    if isinstance(image, str):
        return 0.0, image, None
    found = batch.judgements[name, image]
    return found.value, found.reason, found.by and found.by.key(image)


def by_group(rows: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    groups: dict[str, list[Trajectory]] = {}
    for row in rows:
        groups.setdefault(row.group_id, []).append(row)
    return groups


def image_component(name: str) -> Callable[[Batch], list[Score]]:
    return lambda batch: score_images(name, batch)
