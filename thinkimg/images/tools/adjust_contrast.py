"""Multiply the contrast around the mean brightness: above 1 is stronger, below 1 weaker, 0 is plain grey."""

from PIL import Image, ImageEnhance
from pydantic import Field

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import Number, ToolArgs, in_place


class Args(ToolArgs):
    """Factor on the distance from the image's mean grey."""

    factor: Number = Field(ge=0, le=256)


region = in_place


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return mean + factor * (pixel - mean), clipped to 0..255; mean is that of the image in grey."""
    return ImageEnhance.Contrast(image).enhance(args.factor)
