"""Source of questions and pictures: its rows, in as many passes as are asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkimg.data.recognise import by_columns
from thinkimg.data.refusal import Refused
from thinkimg.data.row import RawRow, ReaderOf, make_row
from thinkimg.data.settings import SOURCES, DataConfig, RowsConfig
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits


@dataclass(frozen=True)
class Source:
    """An opened source. digest: sha256 over its content, 64 hex digits. rows: starts a new pass over it."""

    name: str
    digest: str
    rows: Callable[[], Iterator[RawRow | Refused]]
    schemas: tuple[tuple[str, str, str], ...] = ()
    """(table, schema, version) of its tables."""


def open_source(data: DataConfig, limits: ImageLimits) -> Source:
    """Return the source that `data` names. Raises UserError if it is missing, unreadable, or lacks a mapped column."""
    return SOURCES.member(data.source, "open_source")(data, limits)


def require_path(name: str, what: str) -> Path:
    """Return the absolute path of that name; links are kept, for what lies beside a link is meant.

    what: a noun for the hint. Raises UserError if there is no file.
    """
    path = Path(name).absolute()
    if not path.exists():
        raise UserError(f"There is no {name}.", hint=f"data.path must be {what}.")
    return path


def raw_row(
    record: Mapping[str, Any], data: RowsConfig, reader_of: ReaderOf, *, id: str, where: str
) -> RawRow | Refused:
    """Return the row of a record of a source of the user's own, whose columns have the names of `data.columns`.

    reader_of: returns the reader of an image as the source has it, may raise RowRefused. id: used if no column is
    mapped to it. Columns that are not mapped are kept as the user's own, except binary and long ones.
    """
    return make_row(record, by_columns(data), data, reader_of, id=id, where=where)
