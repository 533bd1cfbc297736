"""CSV and TSV tables, by the standard library's reader: all of their values are texts."""

import csv
import sys
from functools import partial
from pathlib import Path

from thinkimg.data.refusal import short
from thinkimg.data.tables.table import Rows, Table, all_of, draw_evenly

MAX_FIELD = 2**27
"""Characters of a field, at most: a picture in base64."""
SMALL = 64 * 2**20
"""Bytes up to which a file is read whole to draw a sample of it."""


def open_delimited(path: Path, name: str, folder: Path) -> Table:
    """Return the table of a CSV or TSV file, by the marks in its first line."""
    mark = find_delimiter(path)
    read = partial(read_delimited, path, mark)
    columns = tuple(_header(path, mark))
    form = {"\t": "TSV", ";": "CSV with semicolons"}.get(mark, "CSV")
    return Table(
        path,
        name,
        form,
        "line",
        columns,
        None,
        all_of(read),
        all_of(read),
        partial(_seek, path, mark) if path.stat().st_size > SMALL else partial(draw_evenly, read),
        folder,
        (path,),
        is_untyped=True,
    )


def find_delimiter(path: Path) -> str:
    """Return the mark that the first line of a table has most of: a tab, a comma or a semicolon."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        line = file.readline(4096)
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max((",", "\t", ";"), key=line.count)


def read_delimited(path: Path, mark: str) -> Rows:
    """Yield the rows of a table; their numbers are those of the lines that they begin on."""
    csv.field_size_limit(min(MAX_FIELD, sys.maxsize))
    # Bytes that are no UTF-8 become surrogates, which refuse their own row instead of ending the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=mark, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            yield 1, f"no CSV: {short(str(error))}"
            return
        twice = sorted({name for name in header if header.count(name) > 1})
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                # A quote that is not closed takes the lines behind it along: each was a row.
                for line in range(number, max(number, reader.line_num) + 1):
                    yield line, f"no CSV: {short(str(error))}"
                continue
            if fields is None:
                return
            if not fields:
                continue  # a blank line
            if twice:
                yield number, f"the heading {short(twice[0])} stands twice"
            elif len(fields) != len(header):
                yield number, f"{len(fields)} fields under {len(header)} headings"
            else:
                yield number, dict(zip(header, fields, strict=True))


def _seek(path: Path, mark: str, count: int) -> Rows:
    """Yield rows that begin after evenly spread places of the file; their numbers are not known, and 0.

    A line that is none of the table's rows is passed over: it may lie within a field.
    """
    csv.field_size_limit(min(MAX_FIELD, sys.maxsize))
    header, size, seen = _header(path, mark), path.stat().st_size, set()
    if len(set(header)) < len(header):
        return  # each row would be refused for its heading
    with path.open("rb") as file:
        for place in (size * i // count for i in range(count)):
            file.seek(place)
            file.readline(MAX_FIELD)
            start = file.tell()
            line = file.readline(MAX_FIELD)
            if not line.endswith(b"\n") or start in seen:
                continue
            seen.add(start)
            try:
                lines = list(csv.reader([line.decode(errors="surrogateescape")], delimiter=mark, strict=True))
            except csv.Error:
                continue
            if len(lines) == 1 and len(lines[0]) == len(header):
                yield 0, dict(zip(header, lines[0], strict=True))


def _header(path: Path, mark: str) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            return next(csv.reader(file, delimiter=mark, strict=True), [])
        except csv.Error:
            return []
