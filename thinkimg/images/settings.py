"""Settings of images: limits of what is decoded and of what the model sees."""

from typing import Self

from pydantic import model_validator

from thinkimg.settings import Positive, Settings


class ViewLimits(Settings):
    """Numbers of pixels between which a picture is shown to the model."""

    min_pixels: Positive
    max_pixels: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"images.min_pixels ({self.min_pixels}) exceeds images.max_pixels ({self.max_pixels})")
        return self

    @classmethod
    def of(cls, images: "ViewLimits") -> Self:
        """Return the limits alone, without further settings of images."""
        return cls(min_pixels=images.min_pixels, max_pixels=images.max_pixels)


class ImagesConfig(ViewLimits):
    """Limits of images. Tools work on the full resolution, the model sees min_pixels to max_pixels of it."""

    min_pixels: Positive = 56 * 56
    """Smaller pictures are enlarged for the model."""
    max_pixels: Positive = 1280 * 28 * 28
    """Larger pictures are shrunk for the model: 28 x 28 pixels are one image token."""
    max_bytes: Positive = 32 * 2**20
    """Larger files are refused before they are decoded."""
    max_decoded_pixels: Positive = 50_000_000
    """Pictures of more pixels are refused before they are decoded."""
