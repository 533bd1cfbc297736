"""View of an image, as the model sees it: its sides are multiples of the vision encoder's merged patch."""

import math

from PIL import Image

from thinkimg.images.settings import ViewLimits

MAX_ASPECT = 200
"""Longer side / shorter side beyond which Qwen2-VL's preprocessing refuses an image."""


def view_size(width: int, height: int, limits: ViewLimits) -> tuple[int, int]:
    """Return (width, height) in pixels at which the model sees an image of width x height pixels, both >= 1.

    Equals `smart_resize` of transformers.models.qwen2_vl.image_processing_qwen2_vl, which has (height, width) instead.
    Both sides are multiples of a token's, at least one token if min_pixels >= 1. Raises ValueError if the aspect
    exceeds 200.

    Applied twice it may fail or change the size: the view's own aspect may exceed 200 (41 x 8200 is seen as 28 x 8204
    by a Qwen2.5-VL). Its area may exceed max_pixels where that is below 200 tokens.
    """
    side = limits.token_side
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT:
        raise ValueError(f"An image of {width}x{height} pixels has aspect {aspect:g}, more than {MAX_ASPECT}.")
    view_w, view_h = round(width / side) * side, round(height / side) * side
    if view_w * view_h > limits.max_pixels:
        shrink = math.sqrt(width * height / limits.max_pixels)
        view_w = max(side, math.floor(width / shrink / side) * side)
        view_h = max(side, math.floor(height / shrink / side) * side)
    elif view_w * view_h < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (width * height))
        view_w = math.ceil(width * grow / side) * side
        view_h = math.ceil(height * grow / side) * side
    return view_w, view_h


def resize_to_view(image: Image.Image, limits: ViewLimits) -> Image.Image:
    """Return the RGB image that the model sees, or `image` itself if it has the view's size; resampled by BICUBIC.

    Raises ValueError if the aspect exceeds 200.
    """
    size = view_size(*image.size, limits)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
