"""Parquet file or folder of them; images are binary, {bytes, path} as the Hub writes them, paths, or lists of these."""

from typing import Literal

from thinkimg.data.settings import FilesConfig
from thinkimg.data.source import Source, require_path
from thinkimg.data.sources.files import open_tables
from thinkimg.data.tables.find import check_unambiguous, find_root, fits, printable
from thinkimg.data.tables.parquet import open_parquet
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath
from thinkimg.store.files import walk_files


class Settings(FilesConfig):
    """Settings of Parquet files."""

    source: Literal["parquet"] = "parquet"
    path: FilePath
    """A Parquet file or a folder of them."""


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the files' rows.

    Raises UserError if there is no file, one that is damaged, or one that lacks a mapped column.
    """
    target = require_path(data.path, "a Parquet file or a folder of them")
    root = find_root(target)
    paths = walk_files(target, "*.parquet") if target.is_dir() else [target]
    names = {path: printable(path.relative_to(root).as_posix()) for path in paths}
    if data.files:
        paths = [path for path in paths if fits(names[path], data.files)]
    if not paths:
        raise UserError(
            f"{target} holds no .parquet file.", hint="data.path must be a Parquet file or a folder of them."
        )
    if not data.files:
        check_unambiguous(root, list(names.values()), has_pairs=False)
    tables = [open_parquet(path, names[path], path.parent) for path in paths]
    return open_tables("parquet", tables, data, limits)
