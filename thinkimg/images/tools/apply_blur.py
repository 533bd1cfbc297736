"""Blur (Gaussian), to suppress noise and fine texture; radius in pixels."""

from PIL import Image, ImageFilter
from pydantic import Field

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import Number, ToolArgs, in_place


class Args(ToolArgs):
    """Standard deviation in pixels of the image as the model sees it, in whatever unit positions are."""

    radius: Number = Field(ge=0, le=256)


region = in_place


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return the blurred image; the radius is scaled along each axis, so that the model sees the one it asked for."""
    radii = args.radius * image.width / frame.seen[0], args.radius * image.height / frame.seen[1]
    return image.filter(ImageFilter.GaussianBlur(radii))
