"""The data sources: every module of this package is one, named like `config.data.source`, with `open_source(data, limits)`.

A source yields its rows lazily and in order, as often as it is asked; an image is read only when its reader is called, so
that memory holds the images in work and no more. A row that cannot be used is a Refused, in its place.
"""

import importlib
from typing import TYPE_CHECKING

from thinkimg.data.sources._rows import RawRow, Reader, Reason, Refused, RowRefused, Source

if TYPE_CHECKING:
    from thinkimg.config import DataConfig
    from thinkimg.images.decode import ImageLimits

__all__ = ["RawRow", "Reader", "Reason", "Refused", "RowRefused", "Source", "open_source"]


def open_source(data: "DataConfig", limits: "ImageLimits") -> Source:
    """The source that `data` names. Raises UserError where it is not there, unreadable, or lacks a mapped column."""
    return importlib.import_module(f"{__name__}.{data.source}").open_source(data, limits)
