"""What the model sees of an image: its view, whose sides are multiples of the vision encoder's merged patch."""

import math

from PIL import Image

MAX_ASPECT = 200
"""Longer side / shorter side beyond which Qwen2-VL's preprocessing refuses an image."""


def view_size(width: int, height: int, *, min_pixels: int, max_pixels: int, factor: int = 28) -> tuple[int, int]:
    """Size (width, height) in pixels at which the model sees an image of width x height pixels, both >= 1.

    Equals `smart_resize` of transformers.models.qwen2_vl.image_processing_qwen2_vl, which has (height, width) instead.
    Both sides are multiples of factor, at least factor if min_pixels >= 1. Raises ValueError if the aspect exceeds 200.

    It is no projection: the view's own aspect may exceed 200 (41 x 8200 is seen as 28 x 8204), and its area max_pixels
    where that is below 200 * factor**2. Such a view does not survive being preprocessed once more.
    """
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT:
        raise ValueError(f"An image of {width}x{height} pixels has aspect {aspect:g}, more than {MAX_ASPECT}.")
    view_w, view_h = round(width / factor) * factor, round(height / factor) * factor
    if view_w * view_h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        view_w = max(factor, math.floor(width / shrink / factor) * factor)
        view_h = max(factor, math.floor(height / shrink / factor) * factor)
    elif view_w * view_h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        view_w = math.ceil(width * grow / factor) * factor
        view_h = math.ceil(height * grow / factor) * factor
    return view_w, view_h


def view(image: Image.Image, *, min_pixels: int, max_pixels: int, factor: int = 28) -> Image.Image:
    """The RGB image that the model sees: resized by PIL's BICUBIC to view_size, or `image` itself if it has that size.

    Raises ValueError if the aspect exceeds 200.
    """
    size = view_size(*image.size, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def grid(view_w: int, view_h: int, patch: int = 14) -> tuple[int, int, int]:
    """Patches (time, rows, columns) of a view of view_w x view_h pixels: Qwen's image_grid_thw of one still image."""
    assert view_w % patch == 0 and view_h % patch == 0, f"{view_w}x{view_h} is no multiple of {patch}"
    return 1, view_h // patch, view_w // patch
