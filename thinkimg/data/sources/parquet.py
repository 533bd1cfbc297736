"""Parquet file or folder of them; images are binary, {bytes, path} as the Hub writes them, paths, or lists of these."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from thinkimg.data.image_files import ImageFiles
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import RawRow, Reason, Refused, Source, raw_row, require_columns, require_path, short
from thinkimg.data.text_tables import printable
from thinkimg.errors import UserError, shorten
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath
from thinkimg.store.files import walk_files

BATCH_ROWS = 8
"""Rows in memory: a row may hold megabytes of images."""
BUFFER = 2**20
"""Bytes that are read of a column at a time; without a buffer it is a row group's column.

Still a page is decoded at once, and Arrow's writers make one page of up to 1,024 images: memory is that of the file's
largest row group."""


class Settings(RowsConfig):
    """Settings of Parquet files."""

    source: Literal["parquet"] = "parquet"
    path: FilePath
    """A Parquet file or a folder of them."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the files' rows.

    Raises UserError if there is no file, one that is damaged, or one that lacks a mapped column.
    """
    target = require_path(data.path, "a Parquet file or a folder of them")
    root = target if target.is_dir() else target.parent
    paths = walk_files(target, "*.parquet") if target.is_dir() else [target]
    if not paths:
        raise UserError(
            f"{target} holds no .parquet file.", hint="data.path must be a Parquet file or a folder of them."
        )
    for path in paths:
        with _open(path) as file:
            name, columns = path.relative_to(root).as_posix(), file.schema_arrow.names
            require_columns(data.columns, columns, name)
            if twice := sorted({column for column in columns if columns.count(column) > 1}):
                raise UserError(f"{name} has the column '{twice[0]}' twice.", hint="Rename or remove one of them.")
    images = ImageFiles(root, limits, data.url_hosts)
    return Source(
        "parquet",
        images.digest(paths, _named_images(paths, data.columns.image)),
        lambda: _rows(paths, root, data, images),
    )


def _rows(paths: list[Path], root: Path, data: Settings, images: ImageFiles) -> Iterator[RawRow | Refused]:
    mapped = {name for _, name in data.columns}
    for path in paths:
        name, number = printable(path.relative_to(root).as_posix()), 0
        with _open(path) as file:
            columns = [field.name for field in file.schema_arrow if field.name in mapped or not _is_heavy(field.type)]
            for batch in _read_batches(file, path, columns):
                for record in _records(batch):
                    number += 1
                    where = f"{name} row {number}"
                    if isinstance(record, str):
                        yield Refused(where, Reason.SYNTAX, record)
                    else:
                        yield raw_row(record, data, images.reader_of, id=f"{name}:{number}", where=where)


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Yield the records of a batch; a text instead of one that Python can't hold: no UTF-8, a year above 9999."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield short(str(error))


def _named_images(paths: list[Path], column: str) -> Iterator[Any]:
    """Yield the paths of images outside of the files, without reading images that are inside."""
    for path in paths:
        with _open(path) as file:
            kind = file.schema_arrow.field(column).type
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                kind = kind.value_type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                continue
            # Of a struct only the leaf `path` is read; where it has bytes, too, there is mostly no such file.
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            leaves = [leaf for leaf in leaves if leaf.split(".")[0] == column]
            if pa.types.is_struct(kind):
                leaves = [leaf for leaf in leaves if leaf.endswith(".path")]
            for batch in _read_batches(file, path, leaves) if leaves else ():
                for value in (record[column] for record in _records(batch) if isinstance(record, dict)):
                    yield from value if isinstance(value, list) else [value]


def _read_batches(file: pq.ParquetFile, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        for group in range(file.num_row_groups):
            yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {shorten(str(error), 120)}", hint="Copy it again.") from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file: {shorten(str(error), 120)}") from error


def _is_heavy(kind: pa.DataType) -> bool:
    """Return True if a column holds binary values, such as other images: unless it is mapped it is not read."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_is_heavy(kind.field(i).type) for i in range(kind.num_fields))
