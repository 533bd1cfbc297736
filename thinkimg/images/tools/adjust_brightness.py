"""Multiply the brightness: above 1 is brighter (a dark scene may need 50), below 1 darker, 0 is black."""

from PIL import Image, ImageEnhance
from pydantic import Field

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import Number, ToolArgs, in_place


class Args(ToolArgs):
    """Factor on every channel of every pixel."""

    factor: Number = Field(ge=0, le=256)


region = in_place


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return min(255, factor * pixel)."""
    return ImageEnhance.Brightness(image).enhance(args.factor)
