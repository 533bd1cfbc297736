"""Sources made of text tables, JSONL or CSV, whose rows name image files."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from thinkimg.data.image_files import ImageFiles
from thinkimg.data.json_lines import recognise, require_json_lines
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import RawRow, Reason, Refused, Source, raw_row, require_columns
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

PEEK = 100
"""Rows of a table whose keys say which columns there are."""

Rows = Iterator[tuple[int, dict[str, Any] | str]]
"""(line number from 1, record) of a table's rows; instead of a bad record, a text that says why it is none."""


def open_tables(
    name: str, root: Path, tables: Sequence[Path], read: Callable[[Path], Rows], data: RowsConfig, limits: ImageLimits
) -> Source:
    """Return the source of the tables' rows, in order. Raises UserError if a mapped column is missing.

    root: the directory that holds the tables and that their image paths start from.
    """
    images = ImageFiles(root, limits, data.url_hosts)
    names = {table: printable(table.relative_to(root).as_posix()) for table in tables}
    columns: set[str] = set()
    mapped = {column for _, column in data.columns}
    for table in tables:
        first = [record for _, record in islice(read(table), PEEK)]
        keys = {key for record in first if isinstance(record, dict) for key in record}
        if table.suffix != ".csv":
            require_json_lines(table, first)
        elif mapped.isdisjoint(keys) and (format := recognise(table)):
            raise UserError(f"{table} is no CSV file: it looks like {format}.", hint="Save it as CSV in UTF-8.")
        elif first and not keys:
            raise UserError(f"{table} has no row that can be read; the first is {first[0]}.", hint="Correct the file.")
        columns |= keys
    require_columns(data.columns, columns, " and ".join(names.values()))

    def read_rows() -> Iterator[RawRow | Refused]:
        for table in tables:
            for number, record in read(table):
                where = f"{names[table]} line {number}"
                if isinstance(record, str):
                    yield Refused(where, Reason.SYNTAX, record)
                else:
                    yield raw_row(record, data, images.reader_of, id=f"{names[table]}:{number}", where=where)

    image_names = (
        name
        for table in tables
        for _, record in read(table)
        if isinstance(record, dict)
        for name in as_list(record.get(data.columns.image))
    )
    return Source(name, images.digest(tables, image_names), read_rows)


def printable(name: str) -> str:
    """Return a file's name as valid Unicode: bytes that are no UTF-8 are written as escapes."""
    return name.encode(errors="backslashreplace").decode()


def as_list(value: Any) -> list[Any]:
    """Return a list of one value, or the list itself."""
    return value if isinstance(value, list) else [value]
