"""Coordinates: from those that the model writes to pixels of the full-resolution image."""

import math
from dataclasses import dataclass

from thinkimg.records import Coordinates

Box = tuple[float, float, float, float]
"""Edges (left, top, right, bottom), right and bottom exclusive; (0, 0, width, height) is the whole image."""


@dataclass(frozen=True)
class Frame:
    """Sizes of one image: full is (W, H) of its pixels, seen is (w, h) of those that the model sees; all >= 1.

    Positions that the model writes go from (0, 0) to `view`, in either unit. They are continuous: pixel i covers
    [i, i + 1), so that x lies at x * W / view[0] in full.
    """

    full: tuple[int, int]
    seen: tuple[int, int]
    coordinates: Coordinates = Coordinates.PIXELS
    """Unit of the model's positions."""

    @property
    def view(self) -> tuple[int, int]:
        """Width and height in the model's coordinates: `seen` for pixels, (1000, 1000) for thousandths."""
        return self.coordinates.extent(self.seen)

    @property
    def limits(self) -> str:
        """Clause of an error that the model reads: the largest coordinates, and their unit."""
        if self.coordinates is Coordinates.PIXELS:
            return f"the image is {self.seen[0]}x{self.seen[1]} pixels as you see it"
        return f"coordinates are {self.coordinates} of the image's width and height, from 0 to {self.view[0]}"

    def to_full(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the full-resolution image, unrounded and unclamped, at the model's (x, y)."""
        return x * self.full[0] / self.view[0], y * self.full[1] / self.view[1]

    def box_to_full(self, box: Box) -> tuple[int, int, int, int]:
        """Return the smallest box of full-resolution pixels that covers the model's `box`; exact for integers.

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

    region: the part of the picture that an image shows, in any unit of the picture, which is the result's, too.
    box: in the model's coordinates on the image. view: width and height of the image in them.
    """
    x0, y0, x1, y1 = region
    wide, high = x1 - x0, y1 - y0
    # Multiplied first: half of a picture is exactly half of it in either unit.
    left, right = x0 + box[0] * wide / view[0], x0 + box[2] * wide / view[0]
    return left, y0 + box[1] * high / view[1], right, y0 + box[3] * high / view[1]
