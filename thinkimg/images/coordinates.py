"""The coordinate contract: from the pixels that the model sees to those of the full-resolution image, and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def taken_box(tool: str | None, args: Mapping[str, Any], view: tuple[int, int]) -> Box | None:
    """(left, top, right, bottom), in pixels of the view, of what a crop or a zoom took; None for the other tools."""
    if tool == "crop_image":
        return args["x"], args["y"], args["x"] + args["width"], args["y"] + args["height"]
    if tool == "zoom_image":
        width, height = view[0] / args["factor"], view[1] / args["factor"]
        left = min(max(args["center_x"] - width / 2, 0), view[0] - width)
        top = min(max(args["center_y"] - height / 2, 0), view[1] - height)
        return left, top, left + width, top + height
    return None
