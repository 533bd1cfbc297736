"""Data set of the Hugging Face Hub, or a local copy of one with its card."""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from thinkimg.data.hub.hub_tables import check_names, list_tables, name_tables, settle
from thinkimg.data.hub.public_sets import Remote, with_role
from thinkimg.data.hub.snapshot import Snapshot
from thinkimg.data.settings import FilesConfig
from thinkimg.data.source import Source
from thinkimg.data.sources.files import open_tables
from thinkimg.data.tables.find import find_tables
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath, Name
from thinkimg.store.files import files_under


class Settings(FilesConfig):
    """Settings of a data set of the Hub."""

    source: Literal["hub"] = "hub"
    path: FilePath
    """Id of the data set on the Hub, or a local copy of one."""
    hub_config: Name | None = None
    """Name of its configuration."""
    hub_split: Name | None = None
    """Split of the data set that is read; null is train, or the only one."""
    revision: Name | None = None
    """Commit or tag; null is the commit that its main branch is."""

    _role = model_validator(mode="before")(with_role)


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the data set's rows, after a download of what is read of it.

    The digest is the commit, also where the library's cache stands in for the Hub; for a local directory the hash of
    its files. Raises UserError where it can't be had, and where it is unclear which of its tables are meant.
    """
    settled = settle(data, is_explicit=True)
    if settled is not None:
        return open_tables(settled.name, find_tables(settled.data), settled.data, limits, digest=settled.digest)
    if Path(data.path).is_dir():
        data = choose_locally(data, Path(data.path))
    return open_tables("hub", find_tables(data), data, limits)


def choose_locally(data: Settings, folder: Path) -> Settings:
    """Return the settings with the tables that the card of a local copy, or the names of its files, stand for."""
    check_names(None, data.hub_config)
    copy = Snapshot(data.path, "", folder, dict.fromkeys(files_under(folder), 0), is_listed=False)
    local = Remote(data.path, None, None)
    tables = list_tables(copy, local, data.files, data.hub_config, data.hub_split)
    copy.check_shards(tables)
    return data.model_copy(update={"files": name_tables(tables, copy.sizes, local, data.files)})
