"""Settings of images: limits of what is decoded and of what the model sees."""

from typing import Self

from thinkimg.settings import Positive, Settings


class ViewLimits(Settings):
    """Limits of a picture as the model sees it."""

    min_pixels: Positive
    max_pixels: Positive

    @classmethod
    def of(cls, images: "ViewLimits") -> Self:
        """The limits alone."""
        return cls(min_pixels=images.min_pixels, max_pixels=images.max_pixels)


class ImagesConfig(ViewLimits):
    """The picture as the model sees it has between min_pixels and max_pixels; tools work on the full resolution."""

    min_pixels: Positive = 56 * 56
    max_pixels: Positive = 1280 * 28 * 28
    max_bytes: Positive = 32 * 2**20
    """Larger files are refused before they are decoded."""
    max_decoded_pixels: Positive = 50_000_000
