"""JSONL file with an object per line; image paths are relative to the file and stay inside its directory."""

from typing import Literal

from thinkimg.data.json_lines import read_json_lines
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Source, require_path
from thinkimg.data.text_tables import open_tables
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath


class Settings(RowsConfig):
    """Settings of a JSONL file."""

    source: Literal["jsonl"] = "jsonl"
    path: FilePath
    """A JSONL file."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the file's rows. Raises UserError if it is no file or lacks a mapped column."""
    path = require_path(data.path, "a JSONL file")
    if not path.is_file():
        raise UserError(
            f"{path} is no file.", hint="data.path must be a JSONL file; for a folder set data.source=folder."
        )
    return open_tables("jsonl", path.parent, [path], read_json_lines, data, limits)
