"""Schema of Pixel Reasoner: questions on images and videos, whose answers are lists of boxed texts."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.values import has_values, refuse, require_schema

VERSION = 1
TITLE = "Pixel Reasoner"
COLUMNS = ({"question", "image", "answer", "is_video"},)
READS = {"question", "image", "answer", "is_video"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the record says if it is a video, or has a list of images and one of answers."""
    if not has_values(record, COLUMNS, nullable=("is_video",)):
        return False
    listed = isinstance(record.get("image"), list | tuple) and isinstance(record.get("answer"), list | tuple)
    return listed if record.get("is_video") is None else isinstance(record.get("is_video"), bool)


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record of images; a list inside a box is several right answers."""
    require_schema(record, COLUMNS, fits)
    if record.get("is_video"):
        raise refuse("the record is a video")
    return Fields(record.get("question"), record.get("image"), record.get("answer"))
