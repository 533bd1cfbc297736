"""Rows of Arrow's batches as Python values."""

from typing import Any

import numpy as np
import pyarrow as pa

NARROW = {pa.float16(): np.float16, pa.float32(): np.float32}
"""Types whose numbers are no doubles -> NumPy's types of the same precision."""


def to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch; numbers of half and single precision by their shortest decimals: 0.1 is 0.1.

    Python's own conversion would make 0.10000000149011612 of it.
    """
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        if _has_narrow(field.type):
            for row in rows:
                row[field.name] = _shorten(row[field.name], field.type)
    return rows


def _has_narrow(kind: pa.DataType) -> bool:
    return kind in NARROW or any(_has_narrow(kind.field(index).type) for index in range(kind.num_fields))


def _shorten(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if kind in NARROW:
        return float(str(NARROW[kind](value)))
    if isinstance(value, list) and kind.num_fields == 1 and not pa.types.is_map(kind):
        return [_shorten(one, kind.field(0).type) for one in value]
    if isinstance(value, dict):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return value | {field.name: _shorten(value[field.name], field.type) for field in fields}
    return value
