"""Magnify the surroundings of a point by a factor, at full resolution; the result is as large as the whole image."""

import math

from PIL import Image
from pydantic import Field

from thinkimg.images.coordinates import Box, Frame
from thinkimg.images.tool import Number, ToolArgs, ToolError


class Args(ToolArgs):
    """Magnification, and its centre in the model's coordinates."""

    factor: Number = Field(ge=1, le=64)
    center_x: Number = Field(ge=0)
    center_y: Number = Field(ge=0)


def region(args: Args, view: tuple[int, int]) -> Box:
    """Return 1/factor of the frame around the centre, moved inside if it would cross the border."""
    x0, _ = _window(args.center_x, view[0], args.factor)
    y0, _ = _window(args.center_y, view[1], args.factor)
    return x0, y0, x0 + view[0] / args.factor, y0 + view[1] / args.factor


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    """Return the region, cut from the full resolution and resized to the size at which the model sees the image."""
    if args.center_x > frame.view[0] or args.center_y > frame.view[1]:
        center = f"x={args.center_x:g}, y={args.center_y:g}"
        raise ToolError(f"the center {center} is outside of the image: {frame.limits}")
    x0, x1 = _window(frame.to_full(args.center_x, 0)[0], image.width, args.factor)
    y0, y1 = _window(frame.to_full(0, args.center_y)[1], image.height, args.factor)
    # Cut first, as resize would blend in pixels from beyond its box; the rest of the box keeps the factor exact.
    x, y = math.floor(x0), math.floor(y0)
    part = image.crop((x, y, math.ceil(x1), math.ceil(y1)))
    return part.resize(frame.seen, Image.Resampling.BICUBIC, box=(x0 - x, y0 - y, x1 - x, y1 - y))


def _window(center: float, size: int, factor: float) -> tuple[float, float]:
    length = size / factor
    low = min(max(center - length / 2, 0.0), size - length)
    return low, min(low + length, size)
