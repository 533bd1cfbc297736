"""Parquet tables of the store: written with fixed options, read with one row group in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP, IMAGES_PER_GROUP = 4096, 16  # rows in a reader's memory; binary rows are megabytes each


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet with fixed options: the bytes depend on schema, values and pyarrow's version alone."""
    heavy = any(pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type) for column in table.schema)
    # Arrow ends pages and dictionaries where a chunk ends: combined, the bytes do not depend on the chunks.
    pq.write_table(
        table.combine_chunks(),
        path,
        row_group_size=IMAGES_PER_GROUP if heavy else ROWS_PER_GROUP,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=1,
    )


def read_batches(paths: Iterable[Path], columns: list[str] | None = None, rows: int = 1024) -> Iterator[pa.RecordBatch]:
    """Yield the rows of files in batches of at most `rows`, in order, with one row group in memory at a time.

    columns: names, of fields in a struct as `answer.value`.
    """
    for path in paths:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):  # else a batch would gather rows of many groups
                yield from file.iter_batches(rows, row_groups=[group], columns=columns)
