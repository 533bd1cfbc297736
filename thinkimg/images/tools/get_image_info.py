"""Tell an image's size, as you see it and at full resolution."""

from PIL import Image

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import ToolArgs
from thinkimg.records import Coordinates


class Args(ToolArgs):
    """No arguments of its own."""


def apply(image: Image.Image, args: Args, frame: Frame) -> str:
    """Return both sizes, width x height in pixels, and the coordinates' limits where they are something else."""
    (width, height), (seen_w, seen_h) = image.size, frame.seen
    sizes = f"The image is {seen_w}x{seen_h} pixels as you see it and {width}x{height} pixels at full resolution."
    return sizes if frame.coordinates is Coordinates.PIXELS else f"{sizes} But {frame.limits}."
