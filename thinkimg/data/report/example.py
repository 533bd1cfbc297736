"""Examples of a data set for people: samples as the model reads them, with small pictures for a sheet."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import view_size
from thinkimg.records import Sample

SIDE = 480
"""Longer side of a small picture in pixels, at most."""
SMALL = 64
"""Longer side in pixels up to which a picture is kept as PNG: a JPEG would smear it."""

StateQuestion = Callable[[Sample, Sequence[tuple[int, int]]], str]
"""Function that returns the text of a sample's question as the model reads it. Sizes: (width, height) of its views."""


@dataclass(frozen=True)
class Thumbnail:
    """Picture of a sample at most SIDE pixels wide and high."""

    size: tuple[int, int]
    """(width, height) of the picture itself in pixels: the frame of a sample's boxes."""
    uri: str = ""
    """The small picture as a data: URI; "" where only the size is wanted."""


@dataclass(frozen=True)
class Example:
    """Sample as people are shown it."""

    where: str
    """Row of a table, or the sample's id."""
    sample: Sample
    text: str
    """The question as the model reads it."""
    pictures: tuple[Thumbnail, ...]
    changes: tuple[str, ...] = ()
    """Changes to the texts of the row."""


def make_thumbnail(image: Image.Image) -> Thumbnail:
    """Return the small picture of an RGB image, as JPEG; a tiny one as PNG."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    kind = "PNG" if max(image.size) <= SMALL else "JPEG"
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": 80}
    small.save(buffer, kind, **options)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(image.size, f"data:image/{kind.lower()};base64,{text}")


def make_example(
    where: str,
    sample: Sample,
    pictures: Sequence[Thumbnail],
    view: ViewLimits,
    state: StateQuestion,
    changes: Sequence[str] = (),
) -> Example:
    """Return the example of a sample with all of its pictures. Raises ValueError for a picture that can't be seen."""
    sizes = [view_size(*picture.size, view) for picture in pictures]
    return Example(where, sample, state(sample, sizes), tuple(pictures), tuple(changes))
