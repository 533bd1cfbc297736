"""Files of any layout: Parquet, JSON, CSV or TSV tables, and pictures with a .json file beside each."""

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from thinkimg.data.hub.hub_tables import settle
from thinkimg.data.hub.public_sets import with_role
from thinkimg.data.pictures.image_files import ImageFiles
from thinkimg.data.recognise import Recognised, recognise
from thinkimg.data.refusal import Reason, Refused, RowRefused
from thinkimg.data.row import RawRow, make_row, read_fields
from thinkimg.data.settings import FilesConfig
from thinkimg.data.source import Source
from thinkimg.data.tables.find import find_root, find_tables
from thinkimg.data.tables.table import Table
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.settings import FilePath, Name


class Settings(FilesConfig):
    """Settings of files."""

    source: Literal["files"] = "files"
    path: FilePath
    """A table, or a folder of tables and their pictures; the name of a public data set (`thinkimg data ls`); or the id
    of one of the Hub, `owner/name` or `owner/name@split`."""
    hub_config: Name | None = None
    """Configuration of a data set of the Hub."""
    revision: Name | None = None
    """Commit or tag of a data set of the Hub; null is the commit that its main branch is."""

    _role = model_validator(mode="before")(with_role)


def open_source(data: Settings, limits: ImageLimits) -> Source:
    """Return the source of the tables' rows. Raises UserError where there is none, or where its meaning is unclear."""
    if settled := settle(data):
        return open_tables(settled.name, find_tables(settled.data), settled.data, limits, digest=settled.digest)
    return open_tables("files", find_tables(data), data, limits)


def open_tables(
    name: str, tables: list[Table], data: FilesConfig, limits: ImageLimits, digest: str | None = None
) -> Source:
    """Return the source of the tables' rows, in order. digest: of all of them, where it is known without reading them.

    Raises UserError where they are of several schemas.
    """
    root = find_root(Path(data.path).absolute())
    images = ImageFiles(root, limits, data.url_hosts, images=Path(data.images).absolute() if data.images else None)
    schemas = [recognise(table, data) for table in tables]
    check_schemas(tables, schemas)
    named = (name for table, schema in zip(tables, schemas, strict=True) for name in _named_images(table, schema, data))
    if digest is None:
        digest = images.digest((path for table in tables for path in table.files), named)
    elif data.images:  # names that share a picture are known before threads read any
        deque(images.find_all(named), maxlen=0)
    return Source(
        name,
        digest,
        lambda: _rows(tables, schemas, data, images),
        tuple((table.name, schema.name, schema.version) for table, schema in zip(tables, schemas, strict=True)),
    )


def check_schemas(tables: list[Table], schemas: list[Recognised]) -> None:
    """Raise UserError where the tables of one folder have different schemas."""
    kinds = {schema.name: table.name for table, schema in zip(tables, schemas, strict=True)}
    if len(kinds) > 1:
        listed = ", ".join(f"{table} ({schema})" for schema, table in kinds.items())
        raise UserError(
            f"The tables are of different kinds: {listed}.",
            hint=f"Set data.files to the pattern of those to read, such as data.files={next(iter(kinds.values()))}.",
        )


def _rows(
    tables: list[Table], schemas: list[Recognised], data: FilesConfig, images: ImageFiles
) -> Iterator[RawRow | Refused]:
    for table, schema in zip(tables, schemas, strict=True):
        reader_of = partial(images.reader_of, folder=table.folder)
        for number, record in table.read(schema.opens):
            where = f"{table.name} {table.unit} {number}"
            if isinstance(record, str):
                yield Refused(where, Reason.SYNTAX, record)
            else:
                yield make_row(
                    record, schema, data, reader_of, id=f"{table.name}:{number}", where=where,
                    values=table.values,
                )  # fmt: skip


def _named_images(table: Table, schema: Recognised, data: FilesConfig) -> Iterator[tuple[Any, Path]]:
    """Yield the values that name images outside of a table, without reading images that are inside.

    A function of the user's gets whole records, as it may need their bytes to find the names.
    """
    read = table.read if ":" in schema.name else table.read_names
    for _, record in read(schema.opens):
        if isinstance(record, str):
            continue
        try:
            values = read_fields(record, schema, data.columns).images
        except (RowRefused, ValueError, RecursionError):
            continue  # the row is refused when it is read
        for value in values if isinstance(values, list | tuple) else [values]:
            yield value, table.folder
