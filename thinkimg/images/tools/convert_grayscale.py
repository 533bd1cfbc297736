"""Remove the colours."""

from PIL import Image

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import ToolArgs, in_place


class Args(ToolArgs):
    """No arguments of its own."""


region = in_place


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return luma (ITU-R 601-2) in all three channels."""
    return image.convert("L").convert("RGB")
