"""View of an image, as the model sees it: its sides are multiples of the vision encoder's merged patch."""

import math

from PIL import Image

from thinkimg.images.patches import MERGE, PATCH

TOKEN_SIDE = PATCH * MERGE  # pixels of a merged patch's side: 28
MAX_ASPECT = 200
"""Longer side / shorter side beyond which Qwen2-VL's preprocessing refuses an image."""


def view_size(width: int, height: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) in pixels at which the model sees an image of width x height pixels, both >= 1.

    Equals `smart_resize` of transformers.models.qwen2_vl.image_processing_qwen2_vl, which has (height, width) instead.
    Both sides are multiples of 28, at least 28 if min_pixels >= 1. Raises ValueError if the aspect exceeds 200.

    Applied twice it may fail or change the size: the view's own aspect may exceed 200 (41 x 8200 is seen as 28 x 8204).
    Its area may exceed max_pixels where that is below 200 * 28**2.
    """
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT:
        raise ValueError(f"An image of {width}x{height} pixels has aspect {aspect:g}, more than {MAX_ASPECT}.")
    view_w, view_h = round(width / TOKEN_SIDE) * TOKEN_SIDE, round(height / TOKEN_SIDE) * TOKEN_SIDE
    if view_w * view_h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        view_w = max(TOKEN_SIDE, math.floor(width / shrink / TOKEN_SIDE) * TOKEN_SIDE)
        view_h = max(TOKEN_SIDE, math.floor(height / shrink / TOKEN_SIDE) * TOKEN_SIDE)
    elif view_w * view_h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        view_w = math.ceil(width * grow / TOKEN_SIDE) * TOKEN_SIDE
        view_h = math.ceil(height * grow / TOKEN_SIDE) * TOKEN_SIDE
    return view_w, view_h


def resize_to_view(image: Image.Image, *, min_pixels: int, max_pixels: int) -> Image.Image:
    """Return the RGB image that the model sees, or `image` itself if it has the view's size; resampled by BICUBIC.

    Raises ValueError if the aspect exceeds 200.
    """
    size = view_size(*image.size, min_pixels=min_pixels, max_pixels=max_pixels)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def count_patches(view_w: int, view_h: int) -> tuple[int, int, int]:
    """Return (time, rows, columns) of the patches of a view: Qwen's image_grid_thw of one still image."""
    assert view_w % PATCH == 0 and view_h % PATCH == 0, f"{view_w}x{view_h} is no multiple of {PATCH}"
    return 1, view_h // PATCH, view_w // PATCH
