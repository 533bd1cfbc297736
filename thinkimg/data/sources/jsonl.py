"""One JSON object per line; image paths are relative to the file and stay inside its directory."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from thinkimg.data.image_files import ImageFiles
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
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

LINE = 256 * 2**20
"""Bytes of a line, at most: some images as data: URIs have room."""
PEEK = 100
"""Lines whose keys say which columns there are."""


class Settings(RowsConfig):
    source: Literal["jsonl"] = "jsonl"
    path: str
    """A JSONL file."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    path = require_path(data.path, "a JSONL file")
    if not path.is_file():
        raise UserError(
            f"{path} is no file.", hint="data.path must be a JSONL file; see data.source: folder for a folder."
        )
    path = path.resolve()
    images = ImageFiles(path.parent, limits, data.url_hosts)
    seen = [record for _, record in islice(records(path), PEEK) if isinstance(record, dict)]
    require_columns(data.columns, {key for record in seen for key in record}, path.name)

    def rows() -> Iterator[RawRow | Refused]:
        for number, record in records(path):
            where = f"{path.name} line {number}"
            if isinstance(record, str):
                yield Refused(where, Reason.SYNTAX, record)
            else:
                yield raw_row(record, data, images.reader_of, id=f"{path.name}:{number}", where=where)

    names = (
        name
        for _, record in records(path)
        if isinstance(record, dict)
        for name in listed(record.get(data.columns.image))
    )
    return Source("jsonl", images.digest([path], names), rows)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def records(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number from 1, object) of each line that is not blank; instead of an object, a text that says what is
    wrong."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE):
            number += 1
            if len(line) == LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LINE)) and not rest.endswith(b"\n"):
                    pass  # to its end, in pieces
                yield number, f"longer than {LINE:,} bytes"
                continue
            text = line.strip()
            if number == 1:
                text = text.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                yield number, _object(text)


def _object(text: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError:
        return f"no UTF-8: {short(text[:80])}"
    except (ValueError, RecursionError) as error:
        return f"no JSON: {short(str(error))}"
    return value if isinstance(value, dict) else f"no JSON object: {short(value)}"
