"""Report on a table before it is prepared, and the limits under which its pictures are looked at."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinkimg.data.recognise import Recognised
from thinkimg.data.report.example import Example
from thinkimg.data.survey.oddity import Oddity
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.images.settings import ViewLimits


@dataclass(frozen=True)
class TableReport:
    """Table, or several that are alike, as far as it was looked at."""

    name: str
    format: str
    columns: tuple[str, ...]
    rows: int | None
    """Number of rows, those of tables alike included; None where it is not known."""
    alike: int
    """Number of tables that are alike, this one included."""
    looked: int
    """Rows that were looked at. All counts below are of these."""
    problem: UserError | None = None
    """Reason for which nothing of the table can be read; what follows `record` is empty then."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """First of its rows that were drawn, as it is."""
    schema: Recognised | None = None
    pictures: Counter[str] = field(default_factory=Counter)
    """Origin of pictures, for people -> number."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of the pictures that were decoded, in pixels."""
    changes: Counter[str] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    """Answer type -> number of rows."""
    oddities: tuple[Oddity, ...] = ()
    """Questions that `prepare` would ask, and warnings."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> number of rows that are left out."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Reason -> its first row, and why."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """Settings that reproduce this reading, by their dotted names."""
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Limits of pictures: of those that are accepted, and of what the model sees of them."""

    accepted: ImageLimits
    view: ViewLimits
