"""JSONL file with an object per line; image paths are relative to the file and stay inside its directory."""

from typing import Literal

from thinkimg.data.settings import FilesConfig
from thinkimg.data.source import Source, require_path
from thinkimg.data.sources.files import open_tables
from thinkimg.data.tables.json_lines import open_json_lines
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath


class Settings(FilesConfig):
    """Settings of a JSONL file."""

    source: Literal["jsonl"] = "jsonl"
    path: FilePath
    """A JSONL file."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the file's rows. Raises UserError if it is no file or lacks a mapped column."""
    path = require_path(data.path, "a JSONL file")
    if not path.is_file():
        raise UserError(
            f"{path} is no file.", hint="data.path must be a JSONL file; set data.source=files for a folder."
        )
    return open_tables("jsonl", [open_json_lines(path, path.name, path.parent)], data, limits)
