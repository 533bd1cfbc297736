"""A Parquet file or a folder of them; images are binary, {bytes, path} as the Hub writes them, paths, or lists of
these."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from thinkimg.data.image_files import ImageFiles
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import RawRow, Refused, Source, raw_row, require_columns, require_path
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

ROWS = 8
"""Rows in memory: a row may hold megabytes of images."""
BUFFER = 2**20
"""Bytes read of a column at a time; without a buffer a whole row group's column is read at once. One page is decoded at
a time, though, and Arrow's writers make one page of up to 1,024 images: memory is that of the file's largest row
group."""


class Settings(RowsConfig):
    source: Literal["parquet"] = "parquet"
    path: str
    """A Parquet file or a folder of them."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    place = require_path(data.path, "a Parquet file or a folder of them").resolve()
    root = place if place.is_dir() else place.parent
    paths = sorted(path for path in place.rglob("*.parquet") if path.is_file()) if place.is_dir() else [place]
    if not paths:
        raise UserError(
            f"{place} holds no .parquet file.", hint="data.path must be a Parquet file or a folder of them."
        )
    for path in paths:
        with _opened(path) as file:
            require_columns(data.columns, file.schema_arrow.names, path.relative_to(root).as_posix())
    images = ImageFiles(root, limits, data.url_hosts)
    return Source(
        "parquet",
        images.digest(paths, _named_images(paths, data.columns.image)),
        lambda: _rows(paths, root, data, images),
    )


def _rows(paths: list[Path], root: Path, data: Settings, images: ImageFiles) -> Iterator[RawRow | Refused]:
    mapped = {name for _, name in data.columns}
    for path in paths:
        name, number = path.relative_to(root).as_posix(), 0
        with _opened(path) as file:
            columns = [field.name for field in file.schema_arrow if field.name in mapped or not _is_heavy(field.type)]
            for batch in _batches(file, path, columns):
                for record in batch.to_pylist():
                    number += 1
                    yield raw_row(record, data, images.reader_of, id=f"{name}:{number}", where=f"{name} row {number}")


def _named_images(paths: list[Path], column: str) -> Iterator[Any]:
    """The names of images that are not in the files themselves; without reading those that are."""
    for path in paths:
        with _opened(path) as file:
            kind = file.schema_arrow.field(column).type
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                kind = kind.value_type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                continue
            # Of a struct only the leaf `path` is read; where there are bytes, too, there is mostly no such file.
            leaf = [leaf for leaf in _leaves(file, column) if not pa.types.is_struct(kind) or leaf.endswith(".path")]
            for batch in _batches(file, path, leaf) if leaf else ():
                for value in batch.column(0).to_pylist():
                    for item in value if isinstance(value, list) else [value]:
                        yield item.get("path") if isinstance(item, dict) else item


def _leaves(file: pq.ParquetFile, column: str) -> list[str]:
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    return [leaf for leaf in leaves if leaf.split(".")[0] == column]


def _batches(file: pq.ParquetFile, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        for group in range(file.num_row_groups):
            yield from file.iter_batches(ROWS, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:120]}", hint="Copy it again.") from error


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file: {' '.join(str(error).split())[:120]}") from error


def _is_heavy(kind: pa.DataType) -> bool:
    """Whether a column holds binary values somewhere, such as other images: not read where it is not mapped."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_is_heavy(kind.field(i).type) for i in range(kind.num_fields))
