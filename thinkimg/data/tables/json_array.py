"""One JSON array of objects, or one object that holds a list of them, as CLEVR and DocVQA have it, or columns."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from thinkimg.data.json_lines import refuse_twice
from thinkimg.data.records.conversations import is_conversation
from thinkimg.data.refusal import short
from thinkimg.data.tables.table import Rows, Table, all_of, draw_evenly, list_keys
from thinkimg.errors import UserError, name_some, shorten

MAX_BYTES = 4 * 2**30
"""Bytes of a file, which is read whole."""
HEAD = 4096
RECORD = ("question", "image", "answer", "problem", "query", "prompt", "solution")
"""Names that an object has which is itself a record."""


def open_json_array(path: Path, name: str, folder: Path) -> Table:
    """Return the table of the array's objects. Raises UserError where the file is no array, or too large."""
    rows = list(_read(path))
    if rows and not any(isinstance(record, dict) for _, record in rows):
        raise _no_array(path)
    columns = list_keys((), (record for _, record in rows))
    read = partial(_read, path)
    return Table(
        path,
        name,
        "JSON array",
        "row",
        columns,
        len(rows),
        all_of(read),
        all_of(read),
        partial(draw_evenly, read),
        folder,
        (path,),
    )


def is_document(path: Path) -> bool:
    """Tell whether a file is one object with a list of records in it, and not an object on each line."""
    with path.open("rb") as file:
        line = file.readline(MAX_BYTES)
        is_further = bool(file.read(HEAD).strip())
    if is_further and line.rstrip().endswith(b"}"):
        return False
    try:
        document = _load(path)
    except UserError:
        return False  # read as JSONL, which says what is wrong
    if not isinstance(document, dict):
        return False
    is_record = any(name in document for name in RECORD)
    return _is_by_columns(document) or (not is_record and (_is_map(document) or bool(_list_records(document))))


def _is_by_columns(document: dict[str, Any]) -> bool:
    """Tell whether an object maps columns to values by the number of their row, as pandas' to_json writes a table."""
    columns = list(document.values())
    if not columns or not all(isinstance(column, dict) and column for column in columns):
        return False
    is_numbered = all(number.isdecimal() for number in columns[0]) and not any(map(str.isdecimal, document))
    return is_numbered and all(column.keys() == columns[0].keys() for column in columns)


def _is_map(document: dict[str, Any]) -> bool:
    """Tell whether an object maps names to records, as GQA has it."""
    return len(document) > 1 and all(isinstance(value, dict) and value for value in document.values())


def _list_records(document: dict[str, Any]) -> list[str]:
    """Return the names of a document's lists of objects that are no conversations."""
    return [
        name
        for name, values in document.items()
        if isinstance(values, list) and values and isinstance(values[0], dict) and not is_conversation(values)
    ]


def _read(path: Path) -> Rows:
    values = _load(path)
    if isinstance(values, dict) and _is_by_columns(values):
        numbers = next(iter(values.values()))
        values = [{name: column[number] for name, column in values.items()} for number in numbers]
    elif isinstance(values, dict) and _is_map(values):
        values = [{"id": name, **value} for name, value in values.items()]
    if isinstance(values, dict):
        names = _list_records(values)
        if len(names) != 1:
            raise UserError(
                f"{path} holds several lists of objects: {name_some(names)}.",
                hint="Write one table of questions, answers and pictures of them, as JSONL.",
            )
        values = values[names[0]]
    if not isinstance(values, list):
        raise _no_array(path)
    for number, value in enumerate(values, 1):
        yield number, value if isinstance(value, dict) else f"no JSON object: {short(value)}"


def _no_array(path: Path) -> UserError:
    return UserError(f"{path} is no JSON array of objects.", hint="Write one object a line, as JSONL.")


def _load(path: Path) -> Any:
    """Return what a file holds. Raises UserError where it is no JSON, or too large."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is a JSON array of {path.stat().st_size / 1e9:.1f} GB.", hint="Write it as JSONL.")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {shorten(str(error), 120)}.", hint="Copy it again.") from error
