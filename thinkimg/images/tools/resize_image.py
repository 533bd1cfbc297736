"""Resize to a width and height in pixels; with keep_aspect to the largest size within them in proportion."""

from PIL import Image
from pydantic import Field

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import ToolArgs, Whole, in_place


class Args(ToolArgs):
    """Size in pixels of the resulting image."""

    width: Whole = Field(ge=1, le=4096)
    height: Whole = Field(ge=1, le=4096)
    keep_aspect: bool = True


region = in_place


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return the resized image (BICUBIC), with sides of at least one pixel."""
    size = args.width, args.height
    if args.keep_aspect:
        scale = min(args.width / image.width, args.height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)
