"""Images beside a metadata.jsonl or metadata.csv with a column file_name, the convention of the Hub's imagefolder."""

import csv
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from thinkimg.data.image_files import ImageFiles, scheme_of
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import (
    RawRow,
    Reason,
    Refused,
    Source,
    raw_row,
    require_columns,
    require_path,
    short,
)
from thinkimg.data.sources import jsonl
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

TABLES = ("metadata.jsonl", "metadata.csv")


class Settings(RowsConfig):
    source: Literal["folder"] = "folder"
    path: str
    """A folder of images with a metadata.jsonl or metadata.csv."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    root = require_path(data.path, f"a folder of images with a {' or '.join(TABLES)}").resolve()
    images = ImageFiles(root, limits, data.url_hosts)
    tables = sorted(path for name in TABLES for path in root.rglob(name) if path.is_file() and not path.is_symlink())
    if not tables:
        raise UserError(
            f"{root} has no {' or '.join(TABLES)}.", hint="Each row of it has file_name, question and answer."
        )
    seen = [record for table in tables for _, record in islice(_records(table, root, data), jsonl.PEEK)]
    require_columns(
        data.columns,
        {key for record in seen if isinstance(record, dict) for key in record},
        " and ".join(path.relative_to(root).as_posix() for path in tables),
    )

    def rows() -> Iterator[RawRow | Refused]:
        for table in tables:
            name = table.relative_to(root).as_posix()
            for number, record in _records(table, root, data):
                where = f"{name} line {number}"
                if isinstance(record, str):
                    yield Refused(where, Reason.SYNTAX, record)
                else:
                    yield raw_row(record, data, images.reader_of, id=f"{name}:{number}", where=where)

    records = chain.from_iterable(_records(table, root, data) for table in tables)
    names = (
        name
        for _, record in records
        if isinstance(record, dict)
        for name in jsonl.listed(record.get(data.columns.image))
    )
    return Source("folder", images.digest(tables, names), rows)


def _records(table: Path, root: Path, data: Settings) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """As jsonl.records, with file_name under the name of the image column and relative to the root."""
    column, place = data.columns.image, table.parent.relative_to(root)
    for number, record in jsonl.records(table) if table.suffix == ".jsonl" else _csv_records(table):
        if isinstance(record, dict):
            for alias in ("file_name", "file_names", f"{column}_file_name", f"{column}_file_names"):
                if alias in record and column not in record:
                    record[column] = record.pop(alias)
            if column in record:
                here = [_beneath(place, name) for name in jsonl.listed(record[column])]
                record[column] = here if isinstance(record[column], list) else here[0]
        yield number, record


def _beneath(place: Path, name: Any) -> Any:
    """A relative path from the root for one from a table's own folder; what is no such path stays as it is."""
    plain = isinstance(name, str) and name and not scheme_of(name) and not name.startswith("/")
    return f"{place.as_posix()}/{name}" if plain and place.parts else name


def _csv_records(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    # Bytes that are no UTF-8 become surrogates, and these refuse their row alone instead of ending the file.
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield number, f"no CSV: {short(str(error))}"
                continue
            if fields is None:
                return
            if not fields:
                continue  # a blank line
            if len(fields) != len(header):
                yield number, f"{len(fields)} fields under {len(header)} headings"
            else:
                yield number, dict(zip(header, fields, strict=True))
