"""An image of a conversation: its full resolution, what the model sees of it, and the hashes of both."""

from dataclasses import dataclass

from PIL import Image

from thinkimg.conversation.tokens import Grid, ImageSlot
from thinkimg.images.decode import pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import grid, view, view_size


@dataclass(frozen=True)
class Picture:
    """sha256: content hash of the full resolution. uuid: content hash of the view, by which the engine caches it."""

    image: Image.Image
    sha256: str
    view: Image.Image
    uuid: str

    @property
    def grid(self) -> Grid:
        return grid(*self.view.size)

    @property
    def slot(self) -> ImageSlot:
        return ImageSlot(self.sha256, self.grid)


def picture(image: Image.Image, config: ViewLimits) -> Picture:
    """A picture from full-resolution RGB pixels: CPU work (resize, hashes) to be done once, off the event loop.

    Raises ValueError if the aspect exceeds 200.
    """
    seen = view(image, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    sha256 = pixel_hash(image)
    return Picture(image, sha256, seen, sha256 if seen is image else pixel_hash(seen))


def size_seen(image: Image.Image, config: ViewLimits) -> tuple[int, int]:
    """(width, height) of what the model sees of an image."""
    return view_size(*image.size, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
