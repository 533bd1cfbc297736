"""Recognition of a table's schema, by a sample of its rows."""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from thinkimg.data.columns import ROLES, convert_columns, fill_in, guess_columns, read_columns, require_columns
from thinkimg.data.fields import Fields, has_column, is_empty
from thinkimg.data.refusal import Reason, RowRefused, short
from thinkimg.data.settings import SCHEMAS, Columns, RowsConfig
from thinkimg.data.tables.table import Table, list_keys
from thinkimg.errors import UserError
from thinkimg.source_code import code_digest

DRAWN = 64
"""Rows by which a schema is recognised."""
SHARE = 0.5
"""Share of these rows that must be of it."""


@dataclass(frozen=True)
class Recognised:
    """A table's schema, and the number of rows that spoke for it."""

    name: str
    version: str
    """Version of its code: a number, or the digest of a function of the user's."""
    title: str
    convert: Callable[[Mapping[str, Any]], Fields]
    reads: frozenset[str]
    """Top-level columns that are not the user's own."""
    looked: int
    matched: int
    columns: Columns
    """Columns by their role: of the settings, and those that were guessed by their names."""
    opens: frozenset[str]
    """Top-level columns whose bytes are read."""
    guessed: tuple[str, ...] = ()
    """Roles whose columns were guessed."""
    others: tuple[str, ...] = ()
    """Further schemas that fit, less closely."""


def recognise(table: Table, data: RowsConfig) -> Recognised:
    """Return the table's schema: that of the settings, or the one that fits the rows best.

    Columns that the settings name for the image, the question or the answer turn the recognition off. Raises UserError
    where several schemas fit alike, or where a column is missing.
    """
    if ":" in data.schema:
        return _own_function(table, data)
    if data.schema not in ("auto", "none"):
        module = SCHEMAS[data.schema]
        records = _draw(table)
        return _of_schema(data.schema, module, data, records, matched=sum(_fits(module, r) for r in records))
    is_mapped = any(getattr(data.columns, role) is not None for role in ROLES)
    if data.schema == "none" or is_mapped:
        return _by_columns(table, data, guess=data.schema == "auto")
    records = _draw(table)
    counts = {name: sum(_fits(SCHEMAS[name], record) for record in records) for name in SCHEMAS}
    fitting = {name: count for name, count in counts.items() if records and count >= max(1, SHARE * len(records))}
    if not fitting:
        return _by_columns(table, data, guess=True)
    best = max(fitting, key=lambda name: (fitting[name], _closeness(SCHEMAS[name], records)))
    equal = [
        name
        for name in fitting
        if (fitting[name], _closeness(SCHEMAS[name], records)) == (fitting[best], _closeness(SCHEMAS[best], records))
    ]
    if len(equal) > 1:
        raise UserError(
            f"{table.name} may be of the schemas {' and '.join(equal)}.",
            hint=f"Set data.schema={equal[0]}, or another.",
        )
    others = tuple(name for name in fitting if name != best)
    return _of_schema(best, SCHEMAS[best], data, records, matched=fitting[best], others=others)


def by_columns(data: RowsConfig) -> Recognised:
    """Return the schema of records whose columns have the names of the settings, or of their roles."""
    return _by_names(fill_in(data.columns), ())


def _by_columns(table: Table, data: RowsConfig, *, guess: bool) -> Recognised:
    records = _draw(table)
    present = list_keys(table.columns, records)
    lacks_named = any(name.partition(".")[0] not in present for name in read_columns(data.columns))
    if table.is_small or (table.is_open and lacks_named):
        records += _draw_further(table, present, records)
        present = list_keys(present, records)
    columns, guessed = guess_columns(data.columns, present, records) if guess else (data.columns, ())
    filled = fill_in(columns)
    require_columns(filled, present, table.name, records)
    return _by_names(filled, guessed)


def _by_names(columns: Columns, guessed: tuple[str, ...]) -> Recognised:
    reads = read_columns(columns)
    return Recognised(
        "none", "1", "columns by their names", partial(convert_columns, columns=columns), reads, 0, 0, columns,
        _top_columns(reads), guessed,
    )  # fmt: skip


def _own_function(table: Table, data: RowsConfig) -> Recognised:
    path, _, name = data.schema.partition(":")
    try:
        module = importlib.import_module(path)
        function = getattr(module, name)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"The schema {data.schema} can't be imported: {type(error).__name__}: {short(str(error))}.",
            hint="Write it as my_module:convert, and run from the directory that holds my_module.py.",
        ) from error

    def convert(record: Mapping[str, Any]) -> Fields:
        try:
            fields = function(record)
        except RowRefused:
            raise
        except Exception as error:
            raise RowRefused(
                Reason.SCHEMA, f"{data.schema} failed: {type(error).__name__}: {short(str(error))}"
            ) from error
        if not isinstance(fields, Fields):
            raise RowRefused(Reason.SCHEMA, f"{data.schema} returned {type(fields).__name__}, not Fields")
        return fields

    opens = _top_columns(table.columns)  # what the function reads is not known
    return Recognised(data.schema, code_digest(module), data.schema, convert, frozenset(), 0, 0, data.columns, opens)


def _of_schema(
    name: str,
    module: Any,
    data: RowsConfig,
    records: list[dict[str, Any]],
    *,
    matched: int,
    others: tuple[str, ...] = (),
) -> Recognised:
    return Recognised(
        name, str(module.VERSION), module.TITLE, module.convert, frozenset(module.READS), len(records), matched,
        data.columns, _top_columns(module.READS | read_columns(data.columns)), (), others,
    )  # fmt: skip


def _top_columns(names: Collection[str]) -> frozenset[str]:
    """Return names with the first part of each dotted one, which is the name of the top-level column."""
    return frozenset({*names, *(name.partition(".")[0] for name in names)})


def _draw(table: Table) -> list[dict[str, Any]]:
    return [record for _, record in table.draw(DRAWN) if isinstance(record, dict)]


def _draw_further(table: Table, present: Collection[str], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first record that fills each column that those drawn leave empty, after a pass over the table."""
    filled = {name for record in records for name in _filled(record)}
    further: list[dict[str, Any]] = []
    if not table.is_open and filled >= set(present):
        return further
    for _, record in table.read(present):
        if isinstance(record, dict) and not (names := _filled(record)) <= filled:
            filled |= names
            further.append(record)
    return further


def _filled(record: Mapping[str, Any]) -> set[str]:
    return {name for name, value in record.items() if not is_empty(value) and value not in ([], "[]", {})}


def _fits(module: Any, record: Mapping[str, Any]) -> bool:
    if not any(all(has_column(record, column) for column in columns) for columns in module.COLUMNS):
        return False
    fits = getattr(module, "fits", None)
    return fits is None or bool(fits(record))


def _closeness(module: Any, records: list[dict[str, Any]]) -> int:
    """Return the number of columns of the largest set that the first fitting record has."""
    sets = (
        len(columns)
        for record in records
        for columns in module.COLUMNS
        if all(has_column(record, column) for column in columns)
    )
    return max(chain([0], sets))
