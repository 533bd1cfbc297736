"""Forms of boxes: the conversion of each to x, y, width, height in pixels, and the forms that fit a set of boxes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from thinkimg.answers.boxes import BoxXYWH
from thinkimg.data.fields import BoxForm

FORMS: tuple[BoxForm, ...] = get_args(BoxForm)
SLACK = 1.0
"""Pixels by which a box may exceed its picture: coordinates are rounded. At least a thousandth of a side."""
MIN_SIDE = 1.0
"""Pixels of a box's side, at least."""

Numbers = tuple[float, float, float, float]
"""Four numbers that are a box in some form."""
Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class PlacedBox:
    """Box whose form is still to be found, and its picture."""

    where: str
    numbers: Numbers
    size: Size


def to_pixels(numbers: Numbers, form: BoxForm, size: Size) -> BoxXYWH:
    """Return (x, y, width, height) in pixels of the upright picture of `size`, unchecked."""
    wide, high = size
    a, b, c, d = numbers
    match form:
        case "xywh":
            return a, b, c, d
        case "xyxy":
            return a, b, c - a, d - b
        case "yxyx":
            return b, a, d - b, c - a
        case "unit_xywh":
            return a * wide, b * high, c * wide, d * high
        case "unit_xyxy":
            return a * wide, b * high, (c - a) * wide, (d - b) * high
        case "thousandths_xyxy":
            return a * wide / 1000, b * high / 1000, (c - a) * wide / 1000, (d - b) * high / 1000


def place_box(numbers: Numbers, form: BoxForm, size: Size) -> BoxXYWH | None:
    """Return the box in pixels, cut at the edges of its picture; None where it does not lie inside.

    Also None for a box that is thinner than a pixel: coordinates from 0 to 1 that are taken for pixels.
    """
    x, y, width, height = to_pixels(numbers, form, size)
    for start, length, side in ((x, width, size[0]), (y, height, size[1])):
        slack = max(SLACK, side / 1000)
        # Not `length < MIN_SIDE`: a comparison with NaN is false.
        if not (length >= MIN_SIDE and start >= -slack and start + length <= side + slack):
            return None
    right, bottom = min(x + width, size[0]), min(y + height, size[1])
    x, y = max(x, 0.0), max(y, 0.0)
    return (x, y, right - x, bottom - y) if right > x and bottom > y else None


def count_fits(boxes: Iterable[PlacedBox]) -> dict[BoxForm, int]:
    """Return form -> number of the boxes that lie inside their pictures in this form."""
    fits = dict.fromkeys(FORMS, 0)
    for box in boxes:
        for form in FORMS:
            fits[form] += place_box(box.numbers, form, box.size) is not None
    return fits


def fits_centred(box: PlacedBox) -> bool:
    """Tell whether a box of shares of the sides lies inside its picture also if it begins with its centre."""
    x, y, width, height = box.numbers
    return place_box((x - width / 2, y - height / 2, width, height), "unit_xywh", box.size) is not None
