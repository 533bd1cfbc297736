"""Parquet tables, read in small batches; columns of bytes that are no pictures of theirs are left out."""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from thinkimg.data.refusal import short
from thinkimg.data.tables.arrow_rows import to_rows
from thinkimg.data.tables.parquet_drawing import draw_rows
from thinkimg.data.tables.table import Rows, Table
from thinkimg.errors import UserError, shorten

BATCH_ROWS = 8
"""Rows in memory: a row may hold megabytes of images."""
BUFFER = 2**20
"""Bytes that are read of a column at a time; without a buffer it is a row group's column.

Still a page is decoded at once, and Arrow's writers make one page of up to 1,024 images: memory is that of the file's
largest row group."""
ODD_VALUES = (ValueError, OverflowError, LookupError, pa.ArrowException)
"""Errors of values that Python can't hold: no UTF-8, a year above 9999, a time zone that nobody knows."""
Labels = dict[str, tuple[list[str], bool]]
"""Names of the Hub's class labels by column, and whether the column is a list of them."""
DRAWN_GROUPS = 8
"""Row groups of which a sample consists, at most."""


def open_parquet(path: Path, name: str, folder: Path) -> Table:
    """Return the table. Raises UserError for a file that is damaged, or has a column twice."""
    with _open(path) as file:
        columns, rows = file.schema_arrow.names, file.metadata.num_rows
        labels = _class_labels(file.schema_arrow)
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
        heavy = {_column_of(leaf) for leaf in leaves if _is_binary(leaf)}
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise UserError(f"{name} has the column '{twice[0]}' twice.", hint="Rename or remove one of them.")

    def read(needed: Collection[str] = ()) -> Rows:
        """Columns of bytes, such as other images, are read where they are needed."""
        return _read(path, labels, lambda leaf: _column_of(leaf) in needed or _column_of(leaf) not in heavy)

    def read_names(needed: Collection[str] = ()) -> Rows:
        return _read(path, labels, lambda leaf: not _is_binary(leaf))

    def draw(count: int) -> Rows:
        yield from ((number, _name_labels(record, labels)) for number, record in _draw(path, count))

    return Table(path, name, "Parquet", "row", tuple(columns), rows, read, read_names, draw, folder, (path,))


def _read(path: Path, labels: Labels, is_wanted: Callable[[Any], bool]) -> Rows:
    """Yield the rows with those leaves of the schema that are wanted; of a struct of them all or some."""
    with _open(path) as file:
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
        wanted = [leaf.path for leaf in leaves if is_wanted(leaf)]
        number = 0
        for batch in _read_batches(file, path, range(file.num_row_groups), wanted):
            for record in _records(batch):
                number += 1
                yield number, _name_labels(record, labels)


def _draw(path: Path, count: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield rows from the beginnings of row groups that are spread over the file."""
    with _open(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = [sum(sizes[:group]) for group in range(len(sizes))]
        chosen = spread(len(sizes), DRAWN_GROUPS)
        for position, group in enumerate(chosen):
            wanted = count // len(chosen) + (position < count % len(chosen))
            if (drawn := draw_rows(path, file, group, wanted)) is not None:
                yield from enumerate(drawn, starts[group] + 1)
                continue
            number = starts[group]
            for batch in _read_batches(file, path, [group]):
                for record in _records(batch):
                    if number - starts[group] >= wanted:
                        break
                    number += 1
                    yield number, record
                if number - starts[group] >= wanted:
                    break


def spread(total: int, count: int) -> list[int]:
    """Return `count` of the indices below `total`, at most, evenly spread from the first to the last."""
    if total <= count:
        return list(range(total))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)] if count > 1 else [0][:count]


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Yield the records of a batch; a text instead of one that Python can't hold: no UTF-8, a year above 9999."""
    try:
        yield from to_rows(batch)
    except ODD_VALUES:
        for row in range(batch.num_rows):
            try:
                yield from to_rows(batch.slice(row, 1))
            except ODD_VALUES as error:
                yield short(str(error))


def _read_batches(
    file: pq.ParquetFile, path: Path, groups: Collection[int], columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    try:
        for group in groups:
            yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {shorten(str(error), 120)}", hint="Copy it again.") from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file: {shorten(str(error), 120)}") from error


def _column_of(leaf: Any) -> str:
    return str(leaf.path).split(".")[0]


def _is_binary(leaf: Any) -> bool:
    """Tell whether a leaf of the schema holds bytes that are no text, such as images."""
    kind, logical = leaf.physical_type, str(leaf.logical_type)
    return (kind == "BYTE_ARRAY" and logical == "None") or (kind == "FIXED_LEN_BYTE_ARRAY" and logical == "None")


def _class_labels(schema: pa.Schema) -> Labels:
    """Return the labels that the Hub's library wrote into the file."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(metadata)["info"]["features"] if metadata else {}
        labels: Labels = {}
        for name, feature in features.items():
            inner = feature.get("feature") if isinstance(feature, dict) else None
            kind = inner if isinstance(inner, dict) else feature
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list):
                labels[name] = ([str(label) for label in kind["names"]], kind is inner)
    except (ValueError, KeyError, TypeError, AttributeError):  # metadata of somebody else's
        return {}
    return labels


def _name_labels(record: dict[str, Any] | str, labels: Labels) -> dict[str, Any] | str:
    """Return a record with the names of its class labels; None for -1, by which the Hub says that there is none."""
    if isinstance(record, str) or not labels:
        return record

    def name_of(names: list[str], value: Any) -> Any:
        return (names[value] if 0 <= value < len(names) else None) if isinstance(value, int) else value

    for column, (names, is_list) in labels.items():
        value = record.get(column)
        if is_list and isinstance(value, list):
            record[column] = [name_of(names, one) for one in value]
        else:
            record[column] = name_of(names, value)
    return record
