"""Boxes in answers: x, y, width, height in pixels."""

import re

BoxXYWH = tuple[float, float, float, float]
"""(x, y, width, height): the top left corner, and the sides, both > 0."""

MAX_BOX_LENGTH = 200  # characters
EDGE = r"([+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,2})?)"
BOX = re.compile(rf"\s*[\[(]?\s*{EDGE}(?:\s*,\s*|\s+){EDGE}(?:\s*,\s*|\s+){EDGE}(?:\s*,\s*|\s+){EDGE}\s*[\])]?\.?\s*")


def read_box(text: str) -> BoxXYWH | None:
    """Return the box that a text states as four numbers, with brackets or without; None for any other text."""
    match = BOX.fullmatch(text) if len(text) <= MAX_BOX_LENGTH else None
    if not match:
        return None
    x, y, width, height = map(float, match.groups())
    return (x, y, width, height) if width > 0 and height > 0 else None


def iou(a: BoxXYWH, b: BoxXYWH) -> float:
    """Return the intersection over union of two boxes, in [0, 1]."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if a == b or wide <= 0 or high <= 0:
        return float(a == b)
    both = wide * high
    return min(1.0, both / (a[2] * a[3] + b[2] * b[3] - both))
