"""Image processor of a model family: the patches of a picture as its vision tower takes them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

TEMPORAL = 2  # frames per patch; a still image is repeated
Channels = tuple[float, float, float]
"""A number for red, green and blue."""


@dataclass(frozen=True)
class ImageProcessor:
    """Constants of transformers' Qwen2VLImageProcessor, which preprocessor_config.json states for a model."""

    patch: int
    """Pixels of a patch's side."""
    merge: int
    """Patches of a token's side."""
    mean: Channels
    """Mean of a channel in [0, 1]."""
    std: Channels

    @property
    def token_side(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge

    @property
    def patch_values(self) -> int:
        """Numbers of a patch: 3 channels x TEMPORAL frames x its pixels."""
        return 3 * TEMPORAL * self.patch**2

    def extract_patches(self, image: Image.Image) -> np.ndarray:
        """Return (h * w, patch_values) float32, the h x w patches of an RGB picture, in Qwen2VLImageProcessor's order.

        Both sides of the picture are multiples of token_side.
        """
        pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(self.mean)) / np.float32(self.std)
        height, width, _ = pixels.shape
        side, patch, merge = self.token_side, self.patch, self.merge
        assert height % side == 0 and width % side == 0, f"{width} x {height} is no multiple of {side}"
        h, w = height // patch, width // patch
        blocks = pixels.reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, 1, patch, patch)
        return np.repeat(blocks, TEMPORAL, axis=2).reshape(h * w, -1)
