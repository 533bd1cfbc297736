"""Comparison of a public data set, as it is on the Hub at a commit, with the table of public_sets.py."""

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow.parquet as pq

from thinkimg.console import format_number, format_size
from thinkimg.data.hub.public_sets import PublicSet
from thinkimg.data.hub.snapshot import Snapshot, explain
from thinkimg.data.tables.find import fits, open_table
from thinkimg.data.tables.table import list_keys

COUNTED_BYTES = 2**26
"""Size of a table that is downloaded for its rows to be counted; of Parquet only the ends of the files are read."""
FOOTER_BYTES = 2**18
"""Bytes that are asked for at a time of the end of a Parquet file."""


@dataclass(frozen=True)
class Comparison:
    """Fact of the table beside the one of the Hub; an empty text where either says nothing."""

    what: str
    listed: str
    found: str
    differs: bool


@dataclass(frozen=True)
class Content:
    """Rows and columns of some tables. rows: None where they were not counted."""

    rows: int | None
    columns: frozenset[str]
    """Columns that all tables have."""


def compare(entry: PublicSet, snapshot: Snapshot, tables: Sequence[str]) -> list[Comparison]:
    """Return what the table says of a data set beside what the Hub has. tables: names of those that are read."""
    content = read_content(snapshot, tables)
    rows = None if entry.rows is None else int(entry.rows.value)
    count = None if entry.tables is None else int(entry.tables.value)
    columns = describe_columns(entry, content.columns)
    licence = None if entry.licence is None else str(entry.licence.value)
    size = sum(snapshot.sizes[name] for name in (*tables, *find_pictures(entry, snapshot)))
    return [
        Comparison("tables", _number(count), _number(len(tables)), count is not None and count != len(tables)),
        Comparison(
            "rows", _number(rows), _number(content.rows), None not in (rows, content.rows) and rows != content.rows
        ),
        *columns,
        Comparison(
            "licence",
            licence or "",
            snapshot.card.licence or "",
            None not in (licence, snapshot.card.licence) and licence != snapshot.card.licence,
        ),
        Comparison("size", format_size(entry.bytes.value) if entry.bytes else "", format_size(size), False),
    ]


def describe_columns(entry: PublicSet, found: frozenset[str]) -> list[Comparison]:
    """Return what columns are missing: of those that the table lists, or else of all sets that the schema reads by."""
    if entry.columns:
        wanted: list[frozenset[str]] = [frozenset(entry.columns.value)]
    elif entry.schema != "auto":
        module = importlib.import_module(f"thinkimg.data.schemas.{entry.schema}")
        wanted = [frozenset(name.partition(".")[0] for name in columns) for columns in module.COLUMNS]
    else:
        return []
    nearest = min(wanted, key=lambda columns: (len(columns - found), sorted(columns)))
    missing = sorted(nearest - found)
    listed = ", ".join(sorted(nearest))
    return [Comparison("columns", listed, f"without {', '.join(missing)}" if missing else "these", bool(missing))]


def find_pictures(entry: PublicSet, snapshot: Snapshot) -> list[str]:
    """Return the names of the pictures and archives outside of the tables that are downloaded."""
    patterns = "|".join(entry.pictures.value) if entry.pictures else None
    return [name for name in snapshot.sizes if patterns and fits(name, patterns)]


def read_content(snapshot: Snapshot, tables: Iterable[str]) -> Content:
    """Return the number of rows, and the columns, of tables: of Parquet without a download of it."""
    total: int | None = 0
    columns: frozenset[str] | None = None
    for name in tables:
        is_here = (snapshot.folder / name).is_file()
        if PurePosixPath(name).suffix == ".parquet" and not is_here:
            rows, own = _read_footer(snapshot, name)
        elif is_here or snapshot.sizes[name] <= COUNTED_BYTES:
            rows, own = _count(snapshot, name)
        else:
            total = None
            continue
        total = None if total is None else total + rows
        columns = own if columns is None else columns & own
    return Content(total, columns or frozenset())


def _read_footer(snapshot: Snapshot, name: str) -> tuple[int, frozenset[str]]:
    from huggingface_hub import HfFileSystem, constants

    path = f"datasets/{snapshot.id}@{snapshot.commit}/{name}"
    try:
        with HfFileSystem(endpoint=constants.ENDPOINT).open(path, "rb", block_size=FOOTER_BYTES) as file:
            metadata = pq.read_metadata(file)
    except Exception as error:  # the library's own, those of its HTTP client, and Arrow's
        raise explain(error, snapshot.id, snapshot.commit) from error
    return metadata.num_rows, frozenset(metadata.schema.to_arrow_schema().names)


def _count(snapshot: Snapshot, name: str) -> tuple[int, frozenset[str]]:
    path = snapshot.download([name]) / name
    table = open_table(path, name, path.parent)
    rows = table.rows if table.rows is not None else sum(1 for _ in table.read(()))
    return rows, frozenset(list_keys(table.columns, (row for _, row in table.read_names(()))))


def _number(value: int | None) -> str:
    return "" if value is None else format_number(value)
