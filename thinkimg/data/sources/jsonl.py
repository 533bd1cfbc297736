"""JSONL file with an object per line; image paths are relative to the file and stay inside its directory."""

import json
from pathlib import Path
from typing import Any, Literal

from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Source, require_path, short
from thinkimg.data.text_tables import Rows, open_tables
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

LINE = 256 * 2**20
"""Bytes of a line, at most: enough for some images as data: URIs."""


class Settings(RowsConfig):
    """Settings of a JSONL file."""

    source: Literal["jsonl"] = "jsonl"
    path: str
    """A JSONL file."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the file's rows. Raises UserError if it is no file or lacks a mapped column."""
    path = require_path(data.path, "a JSONL file")
    if not path.is_file():
        raise UserError(
            f"{path} is no file.", hint="data.path must be a JSONL file; for a folder set data.source=folder."
        )
    path = path.resolve()
    return open_tables("jsonl", path.parent, [path], read_jsonl, data, limits)


def read_jsonl(path: Path) -> Rows:
    """Yield the rows of the lines that are not blank."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE):
            number += 1
            if len(line) == LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LINE)) and not rest.endswith(b"\n"):
                    pass  # skip the rest of the line, in pieces
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
