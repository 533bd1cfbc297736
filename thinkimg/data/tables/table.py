"""Table of a data set: its columns, and its records in order or as a sample."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[int, dict[str, Any] | str]]
"""(number from 1: of a line or row, record) of a table's rows; instead of a bad record, a text that says why."""


SMALL = 16 * 2**20
"""Bytes up to which a table is read whole to draw a sample of it, or to list its columns."""


class Values(StrEnum):
    """Notation of a table's values."""

    TYPED = "typed"
    """Numbers, lists and texts are told apart."""
    TEXTS = "texts"
    """All are texts, as in CSV."""
    COMMAS = "commas"
    """All are texts, and a comma may be a decimal point, as in CSV with semicolons."""


@dataclass(frozen=True)
class Table:
    """Table of records."""

    path: Path
    name: str
    """Path from the data set's root, printable."""
    format: str
    """Noun for people, such as "Parquet"."""
    unit: str
    """Unit of the rows' numbers: "line" or "row"."""
    columns: tuple[str, ...]
    """Names of the top-level columns; of some of its records, where `is_open`."""
    rows: int | None
    """Number of rows, where it is known without reading them."""
    read: Callable[[Collection[str]], Rows]
    """Starts a pass over all rows, in order; columns of bytes are read only where they are named."""
    read_names: Callable[[Collection[str]], Rows]
    """The same without any bytes: enough for the names of images."""
    draw: Callable[[int], Rows]
    """Yields a number of rows, at most, spread over the table: the same ones each time, quickly."""
    folder: Path
    """Directory that the images' paths are relative to."""
    files: tuple[Path, ...]
    """Files that hold it."""
    values: Values = Values.TYPED
    is_open: bool = False
    """True where each record has its own keys, and those of some were looked at."""

    @property
    def is_small(self) -> bool:
        """True where a pass over the table takes no time that counts."""
        return sum(path.stat().st_size for path in self.files) <= SMALL


def list_keys(columns: Iterable[str], records: Iterable[dict[str, Any] | str]) -> tuple[str, ...]:
    """Return some columns, as they are, and the further keys of records, in their order."""
    first = tuple(columns)
    further = dict.fromkeys(key for one in records if isinstance(one, dict) for key in one)
    return first + tuple(key for key in further if key not in first)


def all_of(read: Callable[[], Rows]) -> Callable[[Collection[str]], Rows]:
    """Return a reader that reads all columns, whichever are needed."""
    return lambda needed: read()


def draw_evenly(read: Callable[[], Rows], count: int) -> Rows:
    """Yield `count` rows, at most, of a whole pass: a random part that is the same each time, in order.

    Algorithm R (Vitter 1985), by a fixed seed.
    """
    draw = random.Random(0)
    drawn: list[tuple[int, dict[str, Any] | str]] = []
    for position, row in enumerate(read()):
        if len(drawn) < count:
            drawn.append(row)
        elif (place := draw.randrange(position + 1)) < count:
            drawn[place] = row
    yield from sorted(drawn, key=lambda row: row[0])
