"""Reasons to refuse a row, and the reading of values as texts."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from thinkimg.answers.text import drop_invisible
from thinkimg.errors import shorten
from thinkimg.redaction import without_password


class Reason(StrEnum):
    """Reason to refuse a row; an image that does not decode has `image_<RefusalReason>`."""

    SYNTAX = "syntax"
    """The line is no row."""
    TEXT = "text"
    """Not a text, or not valid Unicode."""
    EMPTY = "empty"
    """A mapped column holds nothing."""
    CHOICES = "choices"
    """The choices are no list of at least two different texts."""
    ANSWER = "answer"
    """The answer is not among the choices, or does not fit its type; or the further answers are no list of texts."""
    TARGET = "target"
    """The target is no box."""
    IMAGE = "image"
    """The image column holds no image."""
    PATH = "path"
    """An image's path leads out of the data set, or nowhere."""
    URL = "url"
    """An image's host is not allowed, or did not deliver."""
    DUPLICATE = "duplicate"
    """An earlier row has the same id."""
    SCHEMA = "schema"
    """The record is none that the schema can read."""
    PLACEHOLDERS = "placeholders"
    """The question has other numbers of placeholders than pictures, or one of something that is no picture."""
    LENGTH = "length"
    """The question exceeds the limits of a conversation: conversation.max_tokens or max_images."""


class RowRefused(ValueError):
    """Error for a row that cannot be used: reason names the rule, detail explains.

    passing: the cause lies outside of the data, and another time the row may be good.
    """

    def __init__(self, reason: str, detail: str, *, passing: bool = False):
        super().__init__(reason, detail)
        self.reason, self.detail, self.passing = reason, detail, passing


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used. where: its position, for people. reason: a Reason or `image_<RefusalReason>`."""

    where: str
    reason: str
    detail: str
    passing: bool = False
    """True if another time the row may be good."""


def short(value: object) -> str:
    """Return a value for an error text: quoted, without passwords in addresses, and cut to 60 characters."""
    return shorten(without_password(ascii(value)), 60)


def as_text(value: Any, column: str) -> str:
    """Return a text without surrounding space; numbers are written out, 3.0 as 3.

    Raises RowRefused (EMPTY or TEXT) for any other value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for nothing
        raise RowRefused(Reason.EMPTY, f"{column} is empty")
    if isinstance(value, bool | int | float):
        is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        value = str(int(value)) if is_whole else str(value)
    if not isinstance(value, str):
        raise RowRefused(Reason.TEXT, f"{column} is {type(value).__name__}, not a text")
    if not drop_invisible(value).strip():
        raise RowRefused(Reason.EMPTY, f"{column} is empty")
    if not is_unicode(value):
        raise RowRefused(Reason.TEXT, f"{column} is no valid Unicode: {short(value)}")
    return value.strip()


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes or from bytes that are no UTF-8
        return False
    return True
