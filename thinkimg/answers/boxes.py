"""Boxes in answers: x, y, width, height, and the other forms that models write."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from thinkimg.answers.text import strip_wrapping
from thinkimg.images.coordinates import Frame

BoxXYWH = tuple[float, float, float, float]
"""(x, y, width, height): the top left corner, and the sides, both > 0."""

MAX_BOX_LENGTH = 200  # characters of a right box
MAX_STATED_LENGTH = 1000  # characters of an answer with a box: JSON with a label, a sentence
EDGE = r"([+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,2})?)"
COMMA = r"(?:\s*,\s*|\s+)"
FOUR = COMMA.join([EDGE] * 4)
BOX = re.compile(rf"\s*[\[(]?\s*{FOUR}\s*[\])]?\.?\s*")
IN_PIXELS = re.compile(r"(?<=[\d.)\]])\s*(?:px|pixels?)\b", re.IGNORECASE)
BOX_2D = re.compile(rf"""["']?bbox_2d["']?\s*[:=]\s*[\[(]\s*{FOUR}\s*[\])]""")
CORNERS = re.compile(rf"\(\s*{EDGE}\s*,\s*{EDGE}\s*\)\s*(?:,|-|to|and)?\s*\(\s*{EDGE}\s*,\s*{EDGE}\s*\)")
TAGS = re.compile(r"<\|?(?:box_start|box_end|box|/box)\|?>")
NAMED = re.compile(rf"""([A-Za-z][A-Za-z0-9_]{{0,9}})["']?\s*[:=]\s*{EDGE}""")
BRACKETED = re.compile(rf"[\[(]\s*{FOUR}\s*[\])]")
NAMES: Mapping[frozenset[str], tuple[tuple[str, str, str, str], bool]] = {
    frozenset(names): (names, corners)
    for names, corners in (
        (("x", "y", "width", "height"), False),
        (("x", "y", "w", "h"), False),
        (("left", "top", "width", "height"), False),
        (("x1", "y1", "x2", "y2"), True),
        (("x0", "y0", "x1", "y1"), True),
        (("xmin", "ymin", "xmax", "ymax"), True),
        (("x_min", "y_min", "x_max", "y_max"), True),
        (("left", "top", "right", "bottom"), True),
    )
}
"""Names that people give to the four numbers -> their order, and True where they are two corners."""


@dataclass(frozen=True)
class StatedBox:
    """Four numbers of an answer. corners: x1, y1, x2, y2; else x, y, width, height."""

    numbers: tuple[float, float, float, float]
    corners: bool

    def in_full(self, frame: Frame | None) -> BoxXYWH | None:
        """Return the box in pixels of the full-resolution image; None where it is no box.

        The only place that says what the numbers count: the frame's coordinates. Four fractions from 0 to 1 are two
        corners as shares of the sides, for no box is that small. Without a frame all numbers are taken for pixels.
        """
        x, y, right, bottom = self.numbers
        is_share = all(0 <= number <= 1 for number in self.numbers) and any(number % 1 for number in self.numbers)
        corners = self.corners
        if is_share and frame is not None:
            corners = True
            wide, high = frame.view
            x, right, y, bottom = x * wide, right * wide, y * high, bottom * high
        width, height = (right - x, bottom - y) if corners else (right, bottom)
        if not (width > 0 and height > 0):
            return None
        if frame is None or frame.full == frame.view:
            return x, y, width, height
        return *frame.to_full(x, y), *frame.to_full(width, height)


def read_box(text: str) -> BoxXYWH | None:
    """Return the box that a text states as four numbers, with brackets or without; None for any other text."""
    match = BOX.fullmatch(text) if len(text) <= MAX_BOX_LENGTH else None
    if not match:
        return None
    x, y, width, height = map(float, match.groups())
    return (x, y, width, height) if width > 0 and height > 0 else None


def read_stated_box(text: str) -> StatedBox | None:
    """Return the only box of an answer: four numbers, or a form that says its own order. None for any other text.

    Numbers alone are x, y, width, height. Corners are `bbox_2d`, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, two points,
    and numbers named as such.
    """
    if len(text) > MAX_STATED_LENGTH:
        return None
    if "bbox_2d" in text:
        match = BOX_2D.search(text)
        return _state(match, corners=True) if match and text.count("bbox_2d") == 1 else None
    plain = IN_PIXELS.sub("", strip_wrapping(TAGS.sub(" ", text)))
    if match := BOX.fullmatch(plain):
        # Brackets inside the tags of Qwen and InternVL hold corners.
        return _state(match, corners=TAGS.search(text) is not None)
    names = [name.lower() for name, _ in NAMED.findall(plain)]
    if frozenset(names) in NAMES and len(names) == 4:
        order, corners = NAMES[frozenset(names)]
        numbers = {name.lower(): float(number) for name, number in NAMED.findall(plain)}
        a, b, c, d = (numbers[name] for name in order)
        return StatedBox((a, b, c, d), corners)
    for form, corners in ((CORNERS, True), (BRACKETED, False)):
        match = form.search(plain)
        # One box in a sentence without further numbers.
        if match and not re.search(r"\d", plain[: match.start()] + plain[match.end() :]):
            return _state(match, corners)
    return None


def _state(match: re.Match[str], corners: bool) -> StatedBox:
    a, b, c, d = map(float, match.groups())
    return StatedBox((a, b, c, d), corners)


def iou(a: BoxXYWH, b: BoxXYWH) -> float:
    """Return the intersection over union of two boxes, in [0, 1]."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if a == b or wide <= 0 or high <= 0:
        return float(a == b)
    both = wide * high
    return min(1.0, both / (a[2] * a[3] + b[2] * b[3] - both))
