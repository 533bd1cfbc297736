"""Folder of images with a metadata.jsonl or metadata.csv that has a column file_name, as for the Hub's imagefolder."""

from typing import Literal

from thinkimg.data.settings import FilesConfig
from thinkimg.data.source import Source, require_path
from thinkimg.data.sources.files import open_tables
from thinkimg.data.tables.find import open_table, printable
from thinkimg.data.tables.json_lines import open_json_lines
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath
from thinkimg.store.files import walk_files

TABLES = ("metadata.jsonl", "metadata.csv")


class Settings(FilesConfig):
    """Settings of a folder of images."""

    source: Literal["folder"] = "folder"
    path: FilePath
    """A folder of images with a metadata.jsonl or metadata.csv."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the rows of all tables in the folder.

    Raises UserError if there is no folder, no table, a broken link to one, or no column that is mapped.
    """
    root = require_path(data.path, f"a folder of images with a {' or '.join(TABLES)}")
    paths = walk_files(root, *TABLES)
    if not paths:
        raise UserError(
            f"{root} has no {' or '.join(TABLES)}.", hint="Each row of it has file_name, question and answer."
        )
    folders = [path.parent for path in paths]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise UserError(f"{twice[0]} has both {' and '.join(TABLES)}.", hint="Keep one: each row would count twice.")
    tables = [
        (open_json_lines if path.suffix == ".jsonl" else open_table)(
            path, printable(path.relative_to(root).as_posix()), path.parent
        )
        for path in paths
    ]
    return open_tables("folder", tables, data, limits)
