"""The coordinate contract: from the pixels that the model sees to those of the full-resolution image, and back."""

import math
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Edges (left, top, right, bottom) in pixels, right and bottom exclusive; (0, 0, width, height) is the whole image."""


@dataclass(frozen=True)
class Frame:
    """One image at two sizes: full is (W, H) of its pixels, view is (w, h) as the model sees it; all >= 1.

    Coordinates are continuous: pixel i covers [i, i + 1), so that x in the view lies at x * W / w in full.

    Boxes are rounded outwards (floor for left and top, ceil for right and bottom) and clamped to the image, so that
    the result covers what of the box lies inside; a box wholly outside becomes an empty one on the border. From view to
    full and back no edge moves by more than one view pixel; where the view is the larger one, by more than ceil(w / W).
    """

    full: tuple[int, int]
    view: tuple[int, int]

    def to_full(self, x: float, y: float) -> tuple[float, float]:
        """The point of the full-resolution image, unrounded and unclamped, at (x, y) of the view."""
        return x * self.full[0] / self.view[0], y * self.full[1] / self.view[1]

    def box_to_full(self, box: Box) -> tuple[int, int, int, int]:
        """Smallest box of whole full-resolution pixels that covers `box` of the view. Exact for integers."""
        return _scale_outwards(box, self.view, self.full)

    def box_to_view(self, box: Box) -> tuple[int, int, int, int]:
        """Smallest box of whole view pixels that covers `box` of the full-resolution image. Exact for integers."""
        return _scale_outwards(box, self.full, self.view)


def _scale_outwards(box: Box, source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    left, right = (_clamp(edge, target[0]) for edge in _outwards(box[0], box[2], source[0], target[0]))
    top, bottom = (_clamp(edge, target[1]) for edge in _outwards(box[1], box[3], source[1], target[1]))
    return left, top, right, bottom


def _outwards(low: float, high: float, source: int, target: int) -> tuple[int, int]:
    # Floor division rather than floor of a quotient: with integers no float is involved, so edges are exact.
    return math.floor(low * target // source), -math.floor(-high * target // source)


def _clamp(edge: int, size: int) -> int:
    return min(max(edge, 0), size)


def within(region: Box, box: Box, view: tuple[int, int]) -> Box:
    """Return the part of a picture that `box` takes, in pixels of a view of it that shows `region` of the picture."""
    left, top, right, bottom = region
    wide, high = (right - left) / view[0], (bottom - top) / view[1]
    return left + box[0] * wide, top + box[1] * high, left + box[2] * wide, top + box[3] * high
