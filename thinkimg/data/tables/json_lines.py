"""JSONL tables: one object per line."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from thinkimg.data.json_lines import LINE, parse_line, read_json_lines, require_json_lines
from thinkimg.data.tables.table import SMALL, Rows, Table, all_of, draw_evenly, list_keys

PEEK = 100
"""Rows of a table whose keys are looked at when it is opened."""


def open_json_lines(path: Path, name: str, folder: Path) -> Table:
    """Return the table of a JSONL file. Raises UserError where the file is none."""
    # Of a record its keys alone: a hundred with pictures in base64 are a gigabyte.
    head = (record for _, record in islice(read_json_lines(path), PEEK))
    first = [record if isinstance(record, str) else dict.fromkeys(record) for record in head]
    require_json_lines(path, first)
    read = partial(read_json_lines, path)
    draw = partial(_seek, path) if path.stat().st_size > SMALL else partial(draw_evenly, read)
    return Table(
        path,
        name,
        "JSON lines",
        "line",
        list_keys((), first),
        None,
        all_of(read),
        all_of(read),
        draw,
        folder,
        (path,),
        is_open=True,
    )


def _seek(path: Path, count: int) -> Rows:
    """Yield lines that begin after evenly spread places of the file; their numbers are not known, and 0."""
    size = path.stat().st_size
    seen: set[int] = set()
    with path.open("rb") as file:
        for place in _places(size, count):
            file.seek(place)
            if place:
                file.readline(LINE)
            start = file.tell()
            line = file.readline(LINE).strip()
            if line and start not in seen:
                seen.add(start)
                yield 0, parse_line(line)


def _places(size: int, count: int) -> Iterator[int]:
    yield from (size * i // count for i in range(count))
