"""Data set of the Hub as settings of local files: its tables, and the pictures beside them, are brought here.

data.path ──► public_sets.read_remote ──► hub_snapshot.Snapshot ──► hub_card.choose_tables ──► folder, `data.files`
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkimg.console import note
from thinkimg.data.hub.card import choose_tables, find_pairs, is_picture, is_table
from thinkimg.data.hub.pins import find_pin
from thinkimg.data.hub.public_sets import PublicSet, Remote, explain_missing, public_sets, read_remote, shadowed_set
from thinkimg.data.hub.snapshot import Snapshot, escape
from thinkimg.data.settings import FilesConfig
from thinkimg.data.tables.find import fits, open_table
from thinkimg.errors import UserError, shorten

OR = "|"
"""Sign between the patterns of `data.files`."""
DRAWN = 64
"""Rows of a table that are looked at for names of pictures: those that an inspection looks at."""
ZIP = ".zip"
MAX_NAME = 4096
NAME = re.compile(r"[^\n]*\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
REVISION = re.compile(r"\w[\w./-]{0,254}", re.ASCII)
CONFIG = re.compile(r"[^<>:/\\|?*\x00-\x1f\x7f]{1,200}")

Choose = Callable[[list[str]], list[str]]
"""Function that returns some of the names of tables."""


@dataclass(frozen=True)
class Settled:
    """Data set of the Hub that is here. data: settings that read it as files. name: its id."""

    data: FilesConfig
    name: str
    commit: str
    digest: str | None
    """The commit, which stands for all of the content; None where the user has pictures of their own, in data.images.

    The name says the commit then.
    """


def settle(data: FilesConfig, *, is_explicit: bool = False, choose: Choose = sorted) -> Settled | None:
    """Return the data set of the Hub that `data.path` names, after a download of what is read of it.

    None where the path is one of this machine. is_explicit: the path is said to be an id. choose: takes some of the
    tables, for a look. Raises UserError where it can't be had, and where it is unclear which of its tables are meant.
    """
    path = str(getattr(data, "path", ""))
    remote = read_remote(path, is_explicit=is_explicit)
    if remote is None:
        if not Path(path).exists():
            raise explain_missing(path)
        if entry := shadowed_set(path):
            note(f"data.path={path} is the file or folder here, not the public data set {entry.repository}.")
        return None
    revision, config = (getattr(data, name, None) for name in ("revision", "hub_config"))
    check_names(revision, config)
    split = remote.split or getattr(data, "hub_split", None)
    snapshot = Snapshot.open(remote.id, revision or find_pin(path.partition("@")[0], remote.id))
    tables = list_tables(snapshot, remote, data.files, config, split)
    snapshot.check_shards(tables)
    tables = choose(tables)
    snapshot.download(tables)
    folder, has_own = snapshot.folder, data.images is not None
    has_pictures = not has_own and _bring_pictures(snapshot, remote.entry, tables, is_look=choose is not sorted)
    changes: dict[str, Any] = {"path": str(folder), "files": name_tables(tables, snapshot.sizes, remote, data.files)}
    if has_pictures:
        changes["images"] = str(folder)
    if remote.entry and data.schema == "auto":
        changes["schema"] = remote.entry.schema
    name, digest = (f"{remote.id}@{snapshot.commit}", None) if has_own else (remote.id, snapshot.commit)
    return Settled(data.model_copy(update=changes), name, snapshot.commit, digest)


def list_tables(
    snapshot: Snapshot, remote: Remote, pattern: str | None, config: str | None, split: str | None
) -> list[str]:
    """Return the names of the tables to read: those of `data.files`, of the entry, of the card, or by their names.

    Raises UserError where there are none, or where it is unclear which are meant.
    """
    names, entry = snapshot.sizes.keys(), remote.entry
    if pattern is not None:
        chosen = [name for name in names if is_table(name) and fits(name, pattern)]
        if not chosen:
            raise UserError(f"No table of {remote.id} fits data.files={pattern}.", hint=_list_some(names))
        return sorted(chosen)
    if entry and entry.files and split is None and config is None:
        chosen = [name for name in names if is_table(name) and fits(name, OR.join(entry.files.value))]
        if not chosen:
            wanted = ", ".join(entry.files.value)
            raise UserError(f"{remote.id} has no {wanted}, which is read for {entry.name}.", hint=_list_some(names))
        return sorted(chosen)
    config = config or (entry.config if entry else None)
    try:
        chosen = choose_tables(names, snapshot.card, config, split, remote.id) or find_pairs(names)
    except UserError as error:
        if entry or not (known := [one.name for one in public_sets().values() if one.repository == remote.id]):
            raise
        raise UserError(error.message, hint=f"{error.hint} Parts of it have names: {', '.join(known)}.") from error
    if not chosen:
        raise UserError(f"{remote.id} holds no table: no Parquet, JSON, CSV or TSV file.", hint=_list_some(names))
    return chosen


def name_tables(chosen: Collection[str], names: Collection[str], remote: Remote, pattern: str | None) -> str | None:
    """Return the setting `data.files` that chooses these tables of all that the repository has, and no others.

    None where they are the .json files of pictures, which are one table.
    """
    if set(chosen) <= set(find_pairs(names)):
        return None
    listed = remote.entry.files.value if remote.entry and remote.entry.files else ()
    start = f"{escape(os.path.commonprefix(sorted(chosen)))}*" if len(chosen) > 1 else None
    for short in (pattern, OR.join(listed), start):
        if short and {name for name in names if is_table(name) and fits(name, short)} == set(chosen):
            return short
    return OR.join(map(escape, chosen))


def check_names(revision: str | None, config: str | None) -> None:
    """Raise UserError for a revision or a configuration that can't be one."""
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        hint = "It is a commit, a branch or a tag."
        raise UserError(f"data.revision={shorten(revision, 60)!a} is no revision.", hint=hint)
    if config is not None and (not CONFIG.fullmatch(config) or config in (".", "..")):
        raise UserError(f"data.hub_config={shorten(config, 60)!a} is no configuration.", hint="The card lists them.")


def _bring_pictures(snapshot: Snapshot, entry: PublicSet | None, tables: Collection[str], *, is_look: bool) -> bool:
    """Download the pictures and archives that the tables name; return False where all pictures are in the tables.

    is_look: of the pictures that are no archive only those of the rows that are looked at.
    """
    if entry and entry.unpack:
        note(f"The pictures of {entry.name} are in {entry.unpack.value}: unpack it, and set data.images to its folder.")
        return False
    is_paired = set(tables) <= set(find_pairs(snapshot.sizes))
    patterns = OR.join(entry.pictures.value) if entry and entry.pictures else None
    wanted = [name for name in snapshot.sizes if is_picture(name) and (patterns is None or fits(name, patterns))]
    if not wanted or is_paired:
        snapshot.download(wanted, _picture_patterns(wanted))
        return bool(wanted)
    records = [record for name in tables for record in _draw(snapshot.folder, name)]
    if patterns is None and not any(map(_names_pictures, records)):
        return False
    if is_look:
        named = {text.replace("\\", "/").rpartition("/")[2] for record in records for text in _texts(record)}
        wanted = [name for name in wanted if name.lower().endswith(ZIP) or name.rpartition("/")[2] in named]
    snapshot.download(wanted, None if is_look else _picture_patterns(wanted))
    return True


def _picture_patterns(names: Collection[str]) -> list[str]:
    """Return few patterns that fit pictures and archives of these names: for each folder and ending, one."""
    archives = [escape(name) for name in names if name.lower().endswith(ZIP)]
    places = {(name.rpartition("/")[0], Path(name).suffix) for name in names if not name.lower().endswith(ZIP)}
    return [
        *archives,
        *(f"{escape(folder)}/*{suffix}" if folder else f"*{suffix}" for folder, suffix in sorted(places)),
    ]


def _draw(folder: Path, name: str) -> Iterator[Mapping[str, Any]]:
    table = open_table(folder / name, name, (folder / name).parent)
    yield from (record for _, record in table.draw(DRAWN) if isinstance(record, Mapping))


def _texts(value: Any) -> Iterator[str]:
    """Yield the short texts in a record."""
    todo = [value]
    while todo:
        inner = todo.pop()
        if isinstance(inner, str) and len(inner) <= MAX_NAME:
            yield inner
        todo += inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, list | tuple) else ()


def _names_pictures(value: Any) -> bool:
    """Tell whether a record names pictures by paths, and holds none itself."""
    texts: list[str] = []
    todo = [value]
    while todo:
        inner = todo.pop()
        if isinstance(inner, bytes) and inner:
            return False
        if isinstance(inner, str):
            texts.append(inner)
        todo += inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, list | tuple) else ()
    is_inside = any(len(text) > MAX_NAME and " " not in text[:MAX_NAME] for text in texts)  # base64
    return not is_inside and any(NAME.fullmatch(text) for text in texts if len(text) <= MAX_NAME and "://" not in text)


def _list_some(names: Collection[str]) -> str:
    tables = sorted(name for name in names if is_table(name))
    listed = ", ".join(shorten(name, 80) for name in tables[:6]) or "none"
    return f"Its tables are {listed}{' and more' if len(tables) > 6 else ''}."
