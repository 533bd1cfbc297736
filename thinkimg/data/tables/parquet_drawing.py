"""Rows from the beginning of a Parquet row group, whose pictures are read without decoding all of them."""

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from thinkimg.data.tables.arrow_rows import to_rows
from thinkimg.data.tables.parquet_head import HEAVY, Chunk, Unsupported, read_rows

ROOM = 32 * 2**20
"""Bytes of a heavy column that are read of a row group; one row more may be read."""
BATCH_ROWS = 8
MIDDLE = ("list", "element", "item", "array", "bag", "array_element")
"""Names of a list's inner levels in paths of leaves."""


def draw_rows(path: Path, file: pq.ParquetFile, group: int, count: int) -> list[dict[str, Any]] | None:
    """Return the first rows of a row group; None where none of its columns is heavy, or in a layout of its own."""
    metadata = file.metadata.row_group(group)
    heavy: dict[str, tuple[Chunk, bool]] = {}
    light: list[str] = []
    for index in range(len(file.schema)):
        leaf, chunk = file.schema.column(index), metadata.column(index)
        if chunk.total_uncompressed_size <= HEAVY or leaf.physical_type != "BYTE_ARRAY":
            light.append(leaf.path)
            continue
        starts = [at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at]
        heavy[leaf.path] = (
            Chunk(
                min(starts), chunk.total_compressed_size, chunk.num_values, chunk.compression,
                leaf.max_definition_level, leaf.max_repetition_level,
            ),
            str(leaf.logical_type) == "String",
        )  # fmt: skip
    if not heavy or len({leaf.path for leaf in map(file.schema.column, range(len(file.schema)))}) < len(file.schema):
        return None
    try:
        with path.open("rb") as raw:
            # Not closed by hand: Arrow's buffers point into it for as long as they live.
            content = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            heads = {name: read_rows(content, chunk, count, ROOM) for name, (chunk, _) in heavy.items()}
        count = min(count, *map(len, heads.values()))
        records = _read_light(file, group, light, count) if light else [{} for _ in range(count)]
        for name, rows in heads.items():
            chunk, is_text = heavy[name]
            for record, values in zip(records, rows, strict=False):
                shown = [value.decode() if is_text and value is not None else value for value in values]
                _insert(record, name.split("."), shown, is_list=chunk.max_repetition > 0)
    except (Unsupported, pa.ArrowException, OSError, ValueError, OverflowError, LookupError):
        return None  # read as a whole, which says what is wrong
    names = file.schema_arrow.names
    return [{name: record[name] for name in names if name in record} for record in records]


def _read_light(file: pq.ParquetFile, group: int, leaves: Sequence[str], count: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(leaves)):
        records += to_rows(batch)
        if len(records) >= count:
            break
    return records[:count]


def _insert(record: dict[str, Any], path: Sequence[str], values: Sequence[Any], *, is_list: bool) -> None:
    """Put the values of a leaf into a record, which lacks them. Raises Unsupported for deeper structures."""
    column, *inner = [path[0], *(part for part in path[1:] if not is_list or part not in MIDDLE)]
    if len(inner) > 1 or (not is_list and len(values) != 1):
        raise Unsupported("a leaf that lies deeper")
    if is_list and None in values:
        raise Unsupported("an empty list, or a gap in one: both look alike here")
    if not inner:
        record[column] = list(values) if is_list else values[0]
    elif not is_list:
        struct = record.setdefault(column, {})
        if isinstance(struct, dict):
            struct[inner[0]] = values[0]
    else:
        structs = record.setdefault(column, [{} for _ in values])
        if not isinstance(structs, list) or len(structs) != len(values) or not _are_structs(structs):
            raise Unsupported("a list with gaps")
        for struct, value in zip(structs, values, strict=True):
            struct[inner[0]] = value


def _are_structs(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Mapping) for value in values)
