"""Folder of images with a metadata.jsonl or metadata.csv that has a column file_name, as for the Hub's imagefolder."""

import csv
from functools import partial
from pathlib import Path
from typing import Any, Literal

from thinkimg.data.image_files import scheme_of
from thinkimg.data.json_lines import read_json_lines
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Source, require_path, short
from thinkimg.data.text_tables import Rows, as_list, open_tables
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath
from thinkimg.store.files import walk_files

TABLES = ("metadata.jsonl", "metadata.csv")


class Settings(RowsConfig):
    """Settings of a folder of images."""

    source: Literal["folder"] = "folder"
    path: FilePath
    """A folder of images with a metadata.jsonl or metadata.csv."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the rows of all tables in the folder.

    Raises UserError if there is no folder, no table, a broken link to one, or no column that is mapped.
    """
    root = require_path(data.path, f"a folder of images with a {' or '.join(TABLES)}")
    tables = walk_files(root, *TABLES)
    if not tables:
        raise UserError(
            f"{root} has no {' or '.join(TABLES)}.", hint="Each row of it has file_name, question and answer."
        )
    folders = [table.parent for table in tables]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise UserError(f"{twice[0]} has both {' and '.join(TABLES)}.", hint="Keep one: each row would count twice.")
    return open_tables("folder", root, tables, partial(_read_table, root, data.columns.image), data, limits)


def _read_table(root: Path, column: str, table: Path) -> Rows:
    """Yield the rows of a table, with file_name renamed to the image column and relative to the root."""
    folder = table.parent.relative_to(root)
    for number, record in read_json_lines(table) if table.suffix == ".jsonl" else _read_csv(table):
        if isinstance(record, dict):
            for alias in ("file_name", "file_names", f"{column}_file_name", f"{column}_file_names"):
                if alias in record and column not in record:
                    record[column] = record.pop(alias)
            if column in record:
                paths = [_below(folder, name) for name in as_list(record[column])]
                record[column] = paths if isinstance(record[column], list) else paths[0]
        yield number, record


def _below(folder: Path, name: Any) -> Any:
    """Return a table's relative path as one from the root; other values stay as they are."""
    if isinstance(name, dict) and "path" in name:
        return name | {"path": _below(folder, name["path"])}
    is_relative = isinstance(name, str) and name and not scheme_of(name) and not name.startswith("/")
    return f"{folder.as_posix()}/{name}" if is_relative and folder.parts else name


def _read_csv(table: Path) -> Rows:
    # Bytes that are no UTF-8 become surrogates, which refuse their own row instead of ending the file.
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
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
                yield number, f"no CSV: {short(str(error))}"
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
