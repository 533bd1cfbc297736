"""Pairs of images that image rewards are computed from: processed images beside the originals they were made from."""

from collections.abc import Sequence
from typing import cast

from PIL import Image

from thinkimg.conversation.regions import tool_images
from thinkimg.records import CallStatus, Sample, StopReason, Trajectory
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.judgement import Pair

WHOLE_SHARE = 0.95  # a crop of this share of its source or more is no crop
SLIVER_PIXELS, SLIVER_ASPECT = 8, 20  # with a shorter side below, or an aspect above, an image shows nothing


def pair_images(row: Trajectory, sample: Sample, tools: tuple[str, ...] | None = None) -> list[Pair | str]:
    """Return a pair to be judged, or the reason for a value of 0, for each image that a tool made, in order.

    tools: `conversation.tools` of the row.
    """
    pairs: list[Pair | str] = []
    for image in tool_images(row, tools):
        turn = image.turn
        if turn.status is CallStatus.DUPLICATE:
            pairs.append("The image is the same as one before.")
        elif image.cut is not None and image.cut >= WHOLE_SHARE:
            assert turn.tool is not None
            pairs.append(f"The {turn.tool.removesuffix('_image')} took the whole image.")
        else:
            assert turn.image is not None
            pairs.append(Pair(sample.question, sample.images[image.root], turn.image, image.region))
    return pairs


def find_defect(image: Image.Image) -> str | None:
    """Return the reason why nothing can be seen in an RGB image; None if something can."""
    short, long = sorted(image.size)
    if short < SLIVER_PIXELS or long > SLIVER_ASPECT * short:
        return f"The image is a sliver of {image.width}x{image.height} pixels."
    if all(low == high for low, high in cast("list[tuple[int, int]]", image.getextrema())):
        return "The image has one colour only."
    return None


def score_images(name: str, batch: Batch) -> list[Score]:
    """Return the scores of an image component, by its judgements: one per trajectory, in order."""
    return [_score(name, row, batch) for row in batch.trajectories]


def _score(name: str, row: Trajectory, batch: Batch) -> Score:
    if row.stop is StopReason.FAILED:
        return Score.missing("The conversation failed.")
    images = pair_images(row, batch.sample(row), batch.tools)
    if not images:
        return Score.zero("No image was processed.")
    assert batch.image is not None
    which = batch.image.which
    values = [_value(name, image, batch) for image in (images[-1:] if which == "final" else images)]
    evidence = {"which": which, "judgements": [key for *_, key in values if key]}
    present = [(value, reason) for value, reason, _ in values if value is not None]
    if not present:
        return Score.missing(values[-1][1] or "It was not judged.", evidence)
    if which == "mean":
        value, reason = sum(value for value, _ in present) / len(present), present[-1][1]
    else:
        value, reason = max(present, key=lambda pair: pair[0])
    return Score.of(value, reason or "The judge gave 0.", evidence)


def _value(name: str, image: Pair | str, batch: Batch) -> tuple[float | None, str | None, str | None]:
    """Return (value, reason, key of the judgement) of one processed image."""
    if isinstance(image, str):
        return 0.0, image, None
    judgement = batch.judgements[name, image]
    return judgement.value, judgement.reason, judgement.by.key(image) if judgement.by else None


def group_rows(rows: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Return group id -> its trajectories, in order."""
    groups: dict[str, list[Trajectory]] = {}
    for row in rows:
        groups.setdefault(row.group_id, []).append(row)
    return groups
