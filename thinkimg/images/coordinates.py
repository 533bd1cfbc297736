"""Coordinates: from pixels of the model's view to pixels of the full-resolution image."""

import math
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Edges (left, top, right, bottom) in pixels, right and bottom exclusive; (0, 0, width, height) is the whole image."""


@dataclass(frozen=True)
class Frame:
    """Sizes of one image: full is (W, H) of its pixels, view is (w, h) as the model sees it; all >= 1.

    Coordinates are continuous: pixel i covers [i, i + 1), so that x in the view lies at x * W / w in full.
    """

    full: tuple[int, int]
    view: tuple[int, int]

    def to_full(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the full-resolution image, unrounded and unclamped, at (x, y) of the view."""
        return x * self.full[0] / self.view[0], y * self.full[1] / self.view[1]

    def box_to_full(self, box: Box) -> tuple[int, int, int, int]:
        """Return the smallest box of full-resolution pixels that covers `box` of the view; exact for integers.

        Edges are rounded outwards (floor for left and top, ceil for right and bottom) and clamped to the image. A box
        outside of the image becomes an empty one on its border.
        """
        x0, x1 = _scale_outwards(box[0], box[2], self.view[0], self.full[0])
        y0, y1 = _scale_outwards(box[1], box[3], self.view[1], self.full[1])
        return x0, y0, x1, y1


def _scale_outwards(low: float, high: float, source: int, target: int) -> tuple[int, int]:
    # Floor division rather than floor of a quotient: with integers no float is involved, so edges are exact.
    edges = math.floor(low * target // source), -math.floor(-high * target // source)
    return min(max(edges[0], 0), target), min(max(edges[1], 0), target)


def map_to_region(region: Box, box: Box, view: tuple[int, int]) -> Box:
    """Return the part of a picture that `box` covers.

    region: the part of the picture that an image shows, in pixels of the picture. box: in pixels of the image's view.
    view: (width, height) of that view.
    """
    x0, y0, x1, y1 = region
    scale_x, scale_y = (x1 - x0) / view[0], (y1 - y0) / view[1]
    return x0 + box[0] * scale_x, y0 + box[1] * scale_y, x0 + box[2] * scale_x, y0 + box[3] * scale_y
