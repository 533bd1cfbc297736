"""Sharpen: above 1 is sharper, 1 changes nothing, 0 is slightly smoothed."""

from PIL import Image, ImageEnhance
from pydantic import Field

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import Number, ToolArgs, in_place


class Args(ToolArgs):
    """Factor on the distance from the smoothed image."""

    factor: Number = Field(ge=0, le=16)


region = in_place


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return smooth + factor * (pixel - smooth), clipped to 0..255."""
    return ImageEnhance.Sharpness(image).enhance(args.factor)
