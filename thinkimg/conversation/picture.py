"""Picture: an image of a conversation in full resolution and as the model sees it, with the hashes of both."""

from dataclasses import dataclass

from PIL import Image

from thinkimg.conversation.tokens import Grid, ImageSlot
from thinkimg.images.decode import pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import resize_to_view, view_size


@dataclass(frozen=True)
class Picture:
    """Image of a conversation, and the view of it that the model sees."""

    image: Image.Image
    sha256: str
    """Content hash of the full resolution."""
    view: Image.Image
    uuid: str
    """Content hash of the view, by which the engine caches it."""

    grid: Grid
    """Patches (t, h, w) of the view."""
    tokens: int
    """Tokens of the view."""

    @property
    def slot(self) -> ImageSlot:
        """Place of the image in a token stream."""
        return ImageSlot(self.sha256, self.grid, self.tokens)


def make_picture(image: Image.Image, limits: ViewLimits) -> Picture:
    """Return the picture of full-resolution RGB pixels. Raises ValueError if the aspect exceeds 200.

    CPU work (resize, hashes), to be done once and off the event loop.
    """
    seen = resize_to_view(image, limits)
    sha256 = pixel_hash(image)
    uuid = sha256 if seen is image else pixel_hash(seen)
    return Picture(image, sha256, seen, uuid, limits.count_patches(seen.size), limits.count_tokens(seen.size))


def model_view_size(image: Image.Image, limits: ViewLimits) -> tuple[int, int]:
    """Return the size at which the model sees an image: (width, height) in pixels."""
    return view_size(*image.size, limits)
