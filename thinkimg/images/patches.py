"""Patches of a picture as Qwen2.5-VL's vision tower takes them, and the number of their tokens."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

PATCH, MERGE, TEMPORAL = 14, 2, 2  # Qwen2.5-VL's patch side, merged patches per token side, frames per patch
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of a channel in [0, 1]


def extract_patches(image: Image.Image) -> np.ndarray:
    """Return (h * w, 3 * 2 * 14 * 14) float32, the h x w patches of an RGB picture, in Qwen2VLImageProcessor's order.

    Both sides of the picture are multiples of 28.
    """
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    height, width, _ = pixels.shape
    assert height % (PATCH * MERGE) == 0 and width % (PATCH * MERGE) == 0, f"{width} x {height} is no multiple of 28"
    h, w = height // PATCH, width // PATCH
    blocks = pixels.reshape(h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, 1, PATCH, PATCH)
    return np.repeat(blocks, TEMPORAL, axis=2).reshape(h * w, -1)


def image_tokens(grid: Sequence[int]) -> int:
    """Return the number of tokens that an image of (t, h, w) patches takes in the language model."""
    return int(grid[0] * grid[1] * grid[2]) // (MERGE * MERGE)
