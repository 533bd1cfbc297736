"""Pictures of a data set as its survey sees them: hashes, size, and a print by which resized ones are found again."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image

from thinkimg.images.decode import ImageLimits, decode, pixel_hash
from thinkimg.store.image_table import is_plain

SIDE = 32
"""Pixels of a thumbnail's side."""
MAX_BITS = 12
"""Bits of 64 in which the difference hashes of two files of one picture differ, at most."""
MAX_MEAN, MAX_LEVEL = 2.5, 24
"""Levels of 255 by which their thumbnails differ, at most: in the mean, and at any pixel. docs/design.md has the
measurement."""
MIN_CONTRAST = 4.0
"""Standard deviation of a thumbnail's levels, at least: flat pictures are the same only where their pixels are."""
MAX_ASPECT = 1.03
"""Ratio of their aspects, at most."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Picture that was decoded once."""

    sha256: str
    """Hash of its pixels."""
    size: tuple[int, int]
    """(width, height) in pixels, upright."""
    file: str | None
    """Hash of its file, where that is stored as it is; None where the pixels are encoded anew."""
    print: bytes
    """Thumbnail of SIDE x SIDE grey levels."""


def look_at(data: bytes, limits: ImageLimits) -> Picture:
    """Return the picture in a file. Raises ImageRefused."""
    image = decode(data, limits)
    file = hashlib.sha256(data).hexdigest() if is_plain(data, image) else None
    return Picture(pixel_hash(image), image.size, file, make_print(image))


def make_print(image: Image.Image) -> bytes:
    """Return the thumbnail of an RGB image: SIDE * SIDE bytes."""
    return image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("L").tobytes()


def difference_hash(print: bytes) -> int:
    """Return 64 bits of a thumbnail: each is 1 where one of 8 x 9 cells is brighter than its left neighbour."""
    cells = Image.frombytes("L", (SIDE, SIDE), print).resize((9, 8), Image.Resampling.BOX)
    levels_HW = np.asarray(cells, dtype=np.int16)
    bits = np.packbits(levels_HW[:, 1:] > levels_HW[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


class Gallery:
    """Pictures among which others are found again: the same pixels, or the same picture resized or encoded anew."""

    def __init__(self, hashes: Iterable[str], prints: Sequence[bytes], sizes: Sequence[tuple[int, int]]):
        self._hashes = set(hashes)
        self._bits = np.array([difference_hash(one) for one in prints], dtype=np.uint64)
        self._prints = np.frombuffer(b"".join(prints), np.uint8).reshape(-1, SIDE * SIDE)
        self._aspects = np.array([wide / high for wide, high in sizes])

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> Self:
        """Return the gallery of some pictures."""
        return cls([one.sha256 for one in pictures], [one.print for one in pictures], [one.size for one in pictures])

    def has(self, picture: Picture) -> bool:
        """Tell whether the picture is one of the gallery's."""
        if picture.sha256 in self._hashes:
            return True
        levels = np.frombuffer(picture.print, np.uint8).astype(np.int16)
        if not len(self._bits) or levels.std() < MIN_CONTRAST:
            return False
        distances = np.bitwise_count(self._bits ^ np.uint64(difference_hash(picture.print)))
        aspect = picture.size[0] / picture.size[1]
        ratios = np.maximum(self._aspects / aspect, aspect / self._aspects)
        near = self._prints[(distances <= MAX_BITS) & (ratios <= MAX_ASPECT)]
        differences = np.abs(near.astype(np.int16) - levels)
        return bool(((differences.mean(1) <= MAX_MEAN) & (differences.max(1, initial=0) <= MAX_LEVEL)).any())
