"""Settings of images: limits of what is decoded and of what the model sees."""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from thinkimg.images.patches import ImageProcessor
from thinkimg.settings import Positive, Settings


class PixelLimits(Settings):
    """Numbers of pixels between which a picture is shown to the model."""

    min_pixels: Positive
    max_pixels: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"images.min_pixels ({self.min_pixels}) exceeds images.max_pixels ({self.max_pixels})")
        return self


class ViewLimits(PixelLimits):
    """Numbers of pixels between which a picture is shown to the model, and the model's grid.

    The defaults are Qwen2.5-VL's: manifests of earlier versions name no grid.
    """

    patch: Positive = 14
    """Pixels of a patch's side."""
    merge: Positive = 2
    """Patches of a token's side."""

    @classmethod
    def of(cls, images: PixelLimits, processor: ImageProcessor) -> Self:
        """Return the limits of these settings on a model's grid."""
        return cls(
            min_pixels=images.min_pixels,
            max_pixels=images.max_pixels,
            patch=processor.patch,
            merge=processor.merge,
        )

    @property
    def token_side(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest picture."""
        return max(self.max_pixels // self.token_side**2, 1)

    def count_patches(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Return (time, rows, columns) of the patches of a view of (width, height) pixels: Qwen's image_grid_thw."""
        width, height = size
        assert width % self.patch == 0 and height % self.patch == 0, f"{width}x{height} is no multiple of {self.patch}"
        return 1, height // self.patch, width // self.patch

    def count_tokens(self, size: Sequence[int]) -> int:
        """Return the number of tokens of a view of (width, height) pixels."""
        return size[0] * size[1] // self.token_side**2


class ImagesConfig(PixelLimits):
    """Limits of images. Tools work on the full resolution, the model sees min_pixels to max_pixels of it."""

    min_pixels: Positive = 56 * 56
    """Smaller pictures are enlarged for the model."""
    max_pixels: Positive = 1280 * 28 * 28
    """Larger pictures are shrunk for the model. An image token is 28 x 28 pixels of a Qwen2.5-VL, 32 x 32 of a Qwen3-VL
    or Qwen3.5."""
    max_bytes: Positive = 32 * 2**20
    """Larger files are refused before they are decoded."""
    max_decoded_pixels: Positive = 50_000_000
    """Pictures of more pixels are refused before they are decoded."""
