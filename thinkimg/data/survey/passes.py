"""Passes over a source: one over the texts of all rows, and further ones over the pictures of some."""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from thinkimg.data import split
from thinkimg.data.pictures.image_files import ImageReader
from thinkimg.data.pictures.prints import Picture, look_at
from thinkimg.data.refusal import Reason, Refused, RowRefused
from thinkimg.data.row import RawRow
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Source
from thinkimg.data.survey.checks import Checker
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits, ImageRefused

CHANGED = "Run the stage again."
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Row whose texts are accepted."""

    number: int
    """Place in the source, from 0."""
    where: str
    group: str
    """Rows of one group stay on one side of the split."""


@dataclass(frozen=True)
class Texts:
    """Result of the pass over the texts."""

    candidates: dict[str, Candidate]
    """Row id -> candidate, in the source's order."""
    refused: dict[int, Refused]
    """Row number -> refusal."""
    checker: Checker


@dataclass(frozen=True, slots=True)
class LookedRow:
    """Row whose pictures were decoded."""

    row: RawRow
    """Without its readers, which may hold megabytes, and without the user's columns."""
    pictures: tuple[Picture, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the first picture, in which the boxes lie."""
        return self.pictures[0].size


@dataclass
class Looks:
    """Rows whose texts were accepted and whose pictures were looked at."""

    rows: dict[str, LookedRow] = field(default_factory=dict)
    """Row id -> row whose pictures are good."""
    refused: dict[str, Refused] = field(default_factory=dict)
    """Row id -> refusal, of its pictures or of what depends on them."""

    def add(self, id: str, result: LookedRow | Refused) -> None:
        """Add a row that was looked at."""
        if isinstance(result, Refused):
            self.refused[id] = result
        else:
            self.rows[id] = result

    def refuse(self, id: str, reason: str, detail: str) -> None:
        """Refuse a row whose pictures are good."""
        self.refused[id] = Refused(self.rows[id].row.where, reason, detail)

    def new(self, ids: Iterable[str]) -> list[str]:
        """Return those of some rows that were not looked at."""
        return [id for id in ids if id not in self.rows and id not in self.refused]

    def good(self, ids: Iterable[str]) -> list[str]:
        """Return those of some rows that were looked at and not refused."""
        return [id for id in ids if id in self.rows and id not in self.refused]

    @property
    def count(self) -> int:
        """Number of rows that were looked at."""
        return len(self.rows.keys() | self.refused.keys())


def map_in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], window: int) -> Generator[R]:
    """Yield the function's results in order, computed on a pool at most `window` items ahead of the caller."""
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:  # the caller has stopped
            future.cancel()


def read_texts(source: Source, data: RowsConfig) -> Texts:
    """Read the texts of all rows, check them, and group the rows; no picture is decoded.

    Rows with no group of their own are grouped by their pictures: those of one file or the same bytes are together.
    """
    checker = Checker(data)
    refused: dict[int, Refused] = {}
    rows: dict[str, tuple[int, str, str | None]] = {}
    keys: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for number, row in enumerate(source.rows()):
        refusal = row if isinstance(row, Refused) else None
        images: tuple[str, ...] = ()
        if isinstance(row, RawRow) and row.id in seen:
            refusal = Refused(row.where, Reason.DUPLICATE, f"an earlier row has the id {row.id!a}")
        elif isinstance(row, RawRow):
            seen.add(row.id)
            try:
                images = tuple(map(key_of, row.images))
            except RowRefused as error:
                refusal = Refused(row.where, error.reason, error.detail, error.passing)
            refusal = refusal or checker.add(row, images)
        if refusal is not None:
            refused[number] = refusal
            continue
        assert isinstance(row, RawRow)
        rows[row.id] = number, row.where, row.group
        keys.append(images if row.group is None else (f"group {row.group}",))
    # A group is named by its first row and not by a picture, whose name holds the path of the data set.
    names: dict[str, str] = {}
    candidates = {
        id: Candidate(number, where, names.setdefault(root, id) if group is None else group)
        for (id, (number, where, group)), root in zip(rows.items(), split.group_by_images(keys), strict=True)
    }
    return Texts(candidates, refused, checker)


def key_of(reader: ImageReader) -> str:
    """Return a text that is equal for equal images, without decoding. Raises RowRefused."""
    key: str | None = getattr(reader, "key", None)
    return hashlib.sha256(reader()).hexdigest() if key is None else key


def look_at_rows(
    source: Source, wanted: Collection[str], limits: ImageLimits, pool: Executor, window: int
) -> Generator[tuple[str, LookedRow | Refused]]:
    """Yield (row id, row with its pictures or refusal) of some rows, in the source's order. Raises as `rows_of`."""
    return map_in_order(pool, partial(_look_at_row, limits=limits), rows_of(source, wanted), window)


def rows_of(source: Source, wanted: Collection[str]) -> Iterator[RawRow]:
    """Yield some rows by id in the source's order, with no more of the source read than needed.

    Raises UserError where one is not there any more.
    """
    left = set(wanted)
    if not left:
        return
    for row in source.rows():
        # Of rows with one id the first was surveyed; if another rule refused it, it is not wanted.
        if isinstance(row, RawRow) and row.id in left:
            left.remove(row.id)
            yield row
            if not left:
                return
    raise UserError(f"The row {min(left)} of {source.name} vanished while the data were read.", hint=CHANGED)


def _look_at_row(row: RawRow, limits: ImageLimits) -> tuple[str, LookedRow | Refused]:
    try:
        pictures = tuple(look_at(read(), limits) for read in row.images)
        return row.id, LookedRow(replace(row, images=(), columns={}), pictures)
    except RowRefused as refused:
        return row.id, Refused(row.where, refused.reason, refused.detail, refused.passing)
    except ImageRefused as refused:
        return row.id, Refused(row.where, f"image_{refused.reason}", refused.detail)
