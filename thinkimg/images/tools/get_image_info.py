"""Tell an image's size, as you see it and at full resolution."""

from PIL import Image

from thinkimg.images.coordinates import Frame
from thinkimg.images.tool import ToolArgs


class Args(ToolArgs):
    """No arguments of its own."""


def apply(image: Image.Image, args: Args, frame: Frame) -> str:
    """Return both sizes, width x height in pixels."""
    (width, height), (view_w, view_h) = image.size, frame.view
    return f"The image is {view_w}x{view_h} pixels as you see it and {width}x{height} pixels at full resolution."
