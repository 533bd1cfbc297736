"""Cut out a rectangle at full resolution, to see small details; x and y are its left and top edge."""

from PIL import Image
from pydantic import Field

from thinkimg.images.coordinates import Box, Frame
from thinkimg.images.tool import ToolArgs, ToolError, Whole


class Args(ToolArgs):
    """Rectangle in the model's coordinates."""

    x: Whole = Field(ge=0)
    y: Whole = Field(ge=0)
    width: Whole = Field(ge=1)
    height: Whole = Field(ge=1)


def region(args: Args, view: tuple[int, int]) -> Box:
    """Return the rectangle."""
    return args.x, args.y, args.x + args.width, args.y + args.height


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return all full-resolution pixels that the rectangle touches."""
    box = region(args, frame.view)
    if box[2] > frame.view[0] or box[3] > frame.view[1]:
        raise ToolError(f"the rectangle ends at x={box[2]}, y={box[3]}, but {frame.limits}")
    return image.crop(frame.box_to_full(box))
