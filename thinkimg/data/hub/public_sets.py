"""Public data sets by name: `data.path=deepeyes`. The table of them is public_sets.toml."""

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from thinkimg.errors import UserError, shorten

ADDRESSES = {"hf:": "https://huggingface.co/datasets/", "gh:": "https://github.com/"}
"""Beginnings of sources in the table -> beginnings of their addresses."""
SECOND_HAND = "index:"
"""Beginning of a source that people can't look up: a figure of such a source counts as unverified."""
OWNER = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
ID = re.compile(rf"({OWNER}/{OWNER})", re.ASCII)
SPLIT = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".zip", ".gz", ".txt", ".jpg", ".png")
"""Endings of names that are files, and no ids."""


@dataclass(frozen=True)
class Figure:
    """Fact about a data set. source: its address, or `index:…` for one that people can't look up."""

    value: Any
    source: str

    @property
    def is_verified(self) -> bool:
        return not self.source.startswith(SECOND_HAND)


@dataclass(frozen=True)
class PublicSet:
    """Data set of the Hub. A figure is None where no source of it was seen."""

    name: str
    title: str
    role: Literal["training", "benchmark"]
    id: Figure
    schema: str = "auto"
    config: str | None = None
    """Configuration that `name@split` reads."""
    files: Figure | None = None
    """Patterns of its tables in the repository; without them its card decides."""
    pictures: Figure | None = None
    """Patterns of the pictures and ZIP archives outside of its tables."""
    tables: Figure | None = None
    """Number of the tables."""
    columns: Figure | None = None
    """Columns that its tables have, and more perhaps."""
    rows: Figure | None = None
    bytes: Figure | None = None
    """Size of what is downloaded."""
    licence: Figure | None = None
    unpack: Figure | None = None
    """Archive of its pictures that has to be unpacked by hand."""
    bad_rows: Figure | None = None
    """Rows that are known to be wrong, as "table:row"; None is no claim that there are none."""
    note: str = ""

    @property
    def repository(self) -> str:
        return str(self.id.value)


FIGURES = ("id", "files", "pictures", "tables", "columns", "rows", "bytes", "licence", "unpack", "bad_rows")


@functools.cache
def public_sets() -> Mapping[str, PublicSet]:
    """Return name -> data set, in the order of the table."""
    table = tomllib.loads((resources.files("thinkimg.data.hub") / "public_sets.toml").read_text(encoding="utf-8"))
    return {name: _read_entry(name, entry) for name, entry in table.items()}


def find_set(name: str) -> PublicSet | None:
    """Return the data set of that name, None if there is none."""
    return public_sets().get(name)


@dataclass(frozen=True)
class Remote:
    """Data set of the Hub that a path names: an id, a split, and the entry of the table if it was named by it."""

    id: str
    split: str | None
    entry: PublicSet | None


def read_remote(path: str, *, is_explicit: bool = False) -> Remote | None:
    """Return the data set of the Hub that `data.path` names: `name`, `owner/name`, each perhaps with `@split`.

    None where there is a file or folder of that name, which always comes first, and for any other path. is_explicit:
    the path is said to be an id, and may be one in a directory that exists here. Raises UserError for a split that
    can't be one.
    """
    if Path(path).exists():
        return None
    whole, at, split = path.partition("@")
    entry = find_set(whole)
    if entry is None and not (is_id(whole) and (is_explicit or not _is_local(whole))):
        return None
    if at and not SPLIT.fullmatch(split):
        raise UserError(f"{shorten(split)!a} is no name of a split.", hint="Write it as owner/name@validation.")
    return Remote(entry.repository if entry else whole, split if at else None, entry)


def is_id(text: str) -> bool:
    """Tell whether a text can be the id of a data set of the Hub, `owner/name`."""
    return bool(ID.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def _is_local(path: str) -> bool:
    """Tell whether a path that leads nowhere is a mistaken one of this machine rather than an id."""
    return path.lower().endswith(FILES) or Path(path).parent.is_dir()


def shadowed_set(path: str) -> PublicSet | None:
    """Return the public data set whose name a file or folder has, which is read in its place."""
    return find_set(path) if Path(path).exists() else None


def near_names(path: str) -> list[str]:
    """Return names of public data sets that resemble a path, the closest first."""
    name = path.partition("@")[0].rpartition("/")[2].lower()
    return difflib.get_close_matches(name, public_sets(), 2, cutoff=0.75)


def explain_missing(path: str) -> UserError:
    """Return the mistake of a path that is no file here, and names no data set either."""
    near = near_names(path)
    hint = f"Did you mean {' or '.join(near)}?" if near else "data.path is a file, a folder, or owner/name of the Hub."
    return UserError(f"There is no {shorten(path)}.", hint=f"{hint} `thinkimg data ls` lists public data sets by name.")


def with_role(fields: Any) -> Any:
    """Return settings of data with the role that a public data set has by its name, unless they have one.

    A split that is said to be for training has none of a benchmark.
    """
    path = fields.get("path") if isinstance(fields, Mapping) else None
    if not isinstance(path, str):
        return fields
    name, _, split = path.partition("@")
    entry = find_set(name)
    if entry is None or split.startswith("train") or Path(path).exists():
        return fields
    return {"role": entry.role} | dict(fields)


def _read_entry(name: str, entry: Mapping[str, Any]) -> PublicSet:
    fields: dict[str, Any] = {key: _figure(value) if key in FIGURES else value for key, value in entry.items()}
    return PublicSet(name=name, **fields)


def _figure(pair: list[Any]) -> Figure:
    value, source = pair
    for short, address in ADDRESSES.items():
        if source.startswith(short):
            source = address + source.removeprefix(short)
    return Figure(tuple(value) if isinstance(value, list) else value, source)
