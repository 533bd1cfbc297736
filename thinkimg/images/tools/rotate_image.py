"""Rotate counter-clockwise by an angle in degrees; with expand the result grows so that no corner is lost."""

import math

from PIL import Image
from pydantic import Field

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import Number, ToolArgs, require_acceptable


class Args(ToolArgs):
    """Angle in degrees, counter-clockwise."""

    angle: Number = Field(ge=-360, le=360)
    expand: bool = True


def region(args: Args, view: tuple[int, int]) -> None:
    """Return None: a box of the source is askew, or lies on its side."""


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return the rotated image: exact for multiples of 90 degrees with expand, else resampled (BICUBIC).

    Pixels from outside of the source are black.
    """
    if args.expand:
        # Before the work: a 50-megapixel strip of 100,000 x 500, rotated by 45 degrees, would take 15 GB.
        cos, sin = (abs(ratio(math.radians(args.angle))) for ratio in (math.cos, math.sin))
        width, height = image.width * cos + image.height * sin, image.width * sin + image.height * cos
        require_acceptable(round(width), round(height), what="this rotation with expand")
    return image.rotate(args.angle, Image.Resampling.BICUBIC, expand=args.expand)
