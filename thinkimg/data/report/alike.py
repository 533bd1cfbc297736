"""Tables of a data set in groups that differ in the digits of their names alone, such as shards."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinkimg.data.settings import FilesConfig
from thinkimg.data.tables.find import find_tables, fits, open_folder
from thinkimg.data.tables.table import Table
from thinkimg.errors import UserError

PAIRS = "*.json"
"""Pattern for `data.files` that fits pictures with .json files, which are one table."""
DIGITS = re.compile(r"[0-9]+")


def path_of(data: FilesConfig) -> Path:
    """Return the absolute path of a data set of files."""
    return Path(name_of(data)).absolute()


def name_of(data: FilesConfig) -> str:
    """Return `data.path`, which all sources of files have."""
    return str(data.model_dump(include={"path"})["path"])


def find_all(data: FilesConfig) -> tuple[list[Table], UserError | None]:
    """Return the tables, and the error with which `prepare` asks which of them are meant; None if it does not ask.

    Raises UserError where there is none.
    """
    try:
        return find_tables(data), None
    except UserError as question:
        path = path_of(data)
        if data.files is not None or not path.is_dir():
            raise
        tables: dict[str, Table] = {}
        for pattern in ("*", PAIRS):
            with contextlib.suppress(UserError):
                tables |= {table.name: table for table in open_folder(path, pattern)}
        if not tables:
            raise
        return list(tables.values()), question


def group_alike(tables: Sequence[Table]) -> list[list[Table]]:
    """Return the tables in groups: of one folder, format and columns, with names that differ in digits alone."""
    groups: dict[tuple[Any, ...], list[Table]] = {}
    for table in tables:
        key = (DIGITS.sub("0", table.name), table.format, table.folder, frozenset(table.columns))
        groups.setdefault(key, []).append(table)
    return list(groups.values())


def first_alike(names: Sequence[str]) -> list[str]:
    """Return the first of the names that differ in digits alone, sorted."""
    return sorted({DIGITS.sub("0", name): name for name in sorted(names, reverse=True)}.values())


def find_pattern(group: Sequence[Table], tables: Sequence[Table]) -> str | None:
    """Return a pattern for `data.files` that the names of a group fit and those of no other table; None for none."""
    if group[0].path.is_dir():
        return PAIRS
    first = group[0].name
    numbers = [DIGITS.findall(table.name) for table in group]
    varies = iter([len({row[place] for row in numbers}) > 1 for place in range(len(numbers[0]))])
    parts = re.split(f"({DIGITS.pattern})", first)
    pattern = "".join(("*" if next(varies) else part) if DIGITS.fullmatch(part) else _literal(part) for part in parts)
    fitting = [table for table in tables if fits(table.name, pattern)]
    return pattern if fitting == list(group) else None


def _literal(text: str) -> str:
    """Return the pattern that fits a text alone."""
    return re.sub(r"[*?\[]", r"[\g<0>]", text)
