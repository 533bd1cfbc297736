"""Mirror the image: horizontal swaps left and right, vertical swaps top and bottom."""

from typing import Literal

from PIL import Image

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import ToolArgs


class Args(ToolArgs):
    """The direction in which pixels move."""

    direction: Literal["horizontal", "vertical"]


def region(args: Args, view: tuple[int, int]) -> None:
    """Return None: left is right, or top is bottom."""


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return the mirrored image, exact."""
    methods = {"horizontal": Image.Transpose.FLIP_LEFT_RIGHT, "vertical": Image.Transpose.FLIP_TOP_BOTTOM}
    return image.transpose(methods[args.direction])
