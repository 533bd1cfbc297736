"""CSV and TSV tables, by the standard library's reader: all of their values are texts."""

import csv
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from thinkimg.data.refusal import short
from thinkimg.data.tables.table import SMALL, Rows, Table, Values, all_of, draw_evenly

MAX_FIELD = 2**27
"""Characters of a field, at most: a picture in base64."""
STATED = re.compile(r"sep=([,;|\t])\s*", re.IGNORECASE)
"""First line by which spreadsheets state the mark."""
FORMS = {"\t": "TSV", ";": "CSV with semicolons", "|": "CSV with bars"}


@dataclass(frozen=True)
class Dialect:
    """Form of a table. mark: between the fields. skipped: lines before the headings."""

    mark: str
    skipped: int = 0
    is_spaced: bool = False
    """True where a blank follows the marks, as in `image, question`."""

    def reader(self, lines: Iterable[str]) -> Any:
        """Return a reader of lines."""
        csv.field_size_limit(min(MAX_FIELD, sys.maxsize))
        return csv.reader(lines, delimiter=self.mark, skipinitialspace=self.is_spaced, strict=True)


def open_delimited(path: Path, name: str, folder: Path) -> Table:
    """Return the table of a CSV or TSV file, by the marks in its first line."""
    dialect = find_dialect(path)
    read = partial(read_delimited, path, dialect)
    return Table(
        path,
        name,
        FORMS.get(dialect.mark, "CSV"),
        "line",
        tuple(_header(path, dialect)),
        None,
        all_of(read),
        all_of(read),
        partial(_seek, path, dialect) if path.stat().st_size > SMALL else partial(draw_evenly, read),
        folder,
        (path,),
        values=Values.COMMAS if dialect.mark == ";" else Values.TEXTS,
    )


def find_dialect(path: Path) -> Dialect:
    """Return the form of a table: by the mark that its first line states, or has most of, a tab, comma or semicolon.

    A bar is one where there are none of these.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        line = file.readline(4096)
        stated = STATED.fullmatch(line)
        line = file.readline(4096) if stated else line
    mark = max((",", "\t", ";"), key=line.count)
    mark = "|" if mark not in line and "|" in line else mark
    mark = "\t" if path.suffix.lower() == ".tsv" else mark
    mark = stated[1] if stated else mark
    return Dialect(mark, int(stated is not None), f"{mark} " in line)


def read_delimited(path: Path, dialect: Dialect) -> Rows:
    """Yield the rows of a table; their numbers are those of the lines that they begin on."""
    # Bytes that are no UTF-8 become surrogates, which refuse their own row instead of ending the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = dialect.reader(islice(file, dialect.skipped, None))
        try:
            header = _trim(next(reader, []))
        except csv.Error as error:
            yield 1 + dialect.skipped, f"no CSV: {short(str(error))}"
            return
        twice = sorted({name for name in header if header.count(name) > 1})
        while True:
            number = reader.line_num + dialect.skipped + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                # A quote that is not closed takes the lines behind it along: each was a row.
                for line in range(number, max(number, reader.line_num + dialect.skipped) + 1):
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


def _seek(path: Path, dialect: Dialect, count: int) -> Rows:
    """Yield rows that begin after evenly spread places of the file; their numbers are not known, and 0.

    A line that is none of the table's rows is passed over: it may lie within a field.
    """
    header, size, seen = _header(path, dialect), path.stat().st_size, set()
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
                lines = list(dialect.reader([line.decode(errors="surrogateescape")]))
            except csv.Error:
                continue
            if len(lines) == 1 and len(lines[0]) == len(header) and _trim(lines[0]) != header:
                yield 0, dict(zip(header, lines[0], strict=True))


def _header(path: Path, dialect: Dialect) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            return _trim(next(dialect.reader(islice(file, dialect.skipped, None)), []))
        except csv.Error:
            return []


def _trim(names: Iterable[str]) -> list[str]:
    return [name.strip() for name in names]
