"""Join of a table of questions with a table of its pictures, as GQA has them in two configurations."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from thinkimg.data.settings import SCHEMAS
from thinkimg.data.tables.table import Rows, Table
from thinkimg.errors import UserError

IMAGE = "image"
MAX_BYTES = 4 * 2**30
"""Bytes of the tables of pictures, which are held in memory."""


def join_tables(tables: Sequence[Table]) -> list[Table]:
    """Return the tables, those of questions joined with those of pictures where a schema defines how.

    Raises UserError where the pictures are too large to be joined.
    """
    for module in SCHEMAS.values():
        if (join := getattr(module, "JOIN", None)) is None:
            continue
        key, name = join
        pictures = [table for table in tables if {name, IMAGE} <= {*table.columns} and key not in table.columns]
        questions = [table for table in tables if key in table.columns and IMAGE not in table.columns]
        if pictures and questions and len(pictures) + len(questions) == len(tables):
            return [_join(table, pictures, key, name) for table in questions]
    return list(tables)


def _join(table: Table, pictures: Sequence[Table], key: str, name: str) -> Table:
    files = tuple(path for one in (table, *pictures) for path in one.files)
    if sum(path.stat().st_size for one in pictures for path in one.files) > MAX_BYTES:
        raise UserError(
            f"The pictures of {table.name} are in tables of more than {MAX_BYTES / 2**30:.0f} GiB.",
            hint="Unpack them as files named by their id, set data.images to their folder, and data.files to the "
            "questions' table.",
        )

    @cache
    def images() -> Mapping[Any, Any]:
        found: dict[Any, Any] = {}
        for one in pictures:
            for _, record in one.read({name, IMAGE}):
                if isinstance(record, dict) and isinstance(value := record.get(name), str | int):
                    image = record.get(IMAGE)
                    # Of two pictures with one id none is the right one, and its questions are refused.
                    found[value] = image if found.get(value, image) == image else None
        return found

    def joined(rows: Rows, with_images: bool) -> Rows:
        for number, record in rows:
            if isinstance(record, str):
                yield number, record
            else:
                value = record.get(key)
                yield (
                    number,
                    record | {IMAGE: images().get(value) if with_images and isinstance(value, str | int) else None},
                )

    def reader(read: Callable[[Collection[str]], Rows], *, with_images: bool) -> Callable[[Collection[str]], Rows]:
        return lambda needed: joined(read(needed), with_images)

    return replace(
        table,
        format=f"{table.format}, joined with {' and '.join(one.name for one in pictures)}",
        columns=(*table.columns, IMAGE),
        read=reader(table.read, with_images=True),
        read_names=reader(table.read_names, with_images=False),
        draw=lambda count: joined(table.draw(count), True),
        files=files,
    )
