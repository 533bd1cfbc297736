"""Places of files in MLflow's database: they are absolute there, so that a store that was moved has them rewritten."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

BATCH = 1000  # updates per statement
LEGACY = '{"uri": '  # of data sets of versions up to 0.2


@dataclass(frozen=True)
class Column:
    """Column of MLflow 3.17's database that holds places."""

    table: str
    name: str
    keys: tuple[str, ...]
    """Columns of the primary key by which a row is found through an index."""
    fixed: tuple[str, str] | None = None
    """Key column and its only value."""


COLUMNS = (
    Column("experiments", "artifact_location", ("experiment_id",)),
    Column("runs", "artifact_uri", ("run_uuid",)),
    Column("trace_tags", "value", ("request_id", "key"), ("key", "mlflow.artifactLocation")),
    Column("model_versions", "source", ("name", "version")),
    Column("model_versions", "storage_location", ("name", "version")),
    Column("datasets", "dataset_source", ("experiment_id", "name", "digest")),
)


def location_of(directory: Path) -> str:
    """Return a directory as MLflow's location: a URI, as MLflow would take a % in a path for an escape."""
    return directory.as_uri() if "%" in str(directory) else str(directory)


def path_of(location: str) -> Path | None:
    """Return the path that a location names, None if it is none of this machine's."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return Path(location) if location.startswith("/") else None


def is_gone(path: Path) -> bool:
    """Return True if there is nothing at a path, False if there is, or if that can't be read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def is_same(path: Path, other: Path) -> bool:
    """Return True if two paths lead to one file or folder, False also where one of them can't be read."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def loop_locations(uri: str) -> list[tuple[str, str]]:
    """Return (loop id, artifact location) of every run of a loop in a database of MLflow, without deleted ones."""
    import sqlalchemy as sql

    runs = sql.table("runs", *map(sql.column, ("run_uuid", "artifact_uri", "lifecycle_stage"))).c
    tags = sql.table("tags", *map(sql.column, ("run_uuid", "key", "value"))).c
    query = sql.select(tags.value, runs.artifact_uri).where(
        runs.run_uuid == tags.run_uuid, tags.key == "thinkimg.loop", runs.lifecycle_stage == "active"
    )
    engine = sql.create_engine(uri)
    try:
        with engine.connect() as connection:
            return [(loop, location) for loop, location in connection.execute(query)]
    finally:
        engine.dispose()


def always(table: str, value: str) -> bool:
    """Return True: every row moves."""
    return True


def is_here(table: str, value: str) -> bool:
    """Return True if a row's new place exists. An experiment's may be made later."""
    path = path_of(value)
    return table == "experiments" or (path is not None and not is_gone(path))


def move_records(uri: str, old: Path, new: Path, moves: Callable[[str, str], bool] = always) -> int:
    """Let a database of MLflow name `new` where it names a place in `old`; return the number of changed values.

    moves: given a table and a new value, tells if that row changes.
    """
    import sqlalchemy as sql

    engine, changed = sql.create_engine(uri), 0
    try:
        with engine.begin() as connection:
            for column in COLUMNS:
                names = (*column.keys, column.name)
                table = sql.table(column.table, *map(sql.column, names))
                values = table.c[column.name]
                forms = (str(old), "file:", LEGACY)  # a database may ignore case here, `move` does not
                query = sql.select(*table.c).where(
                    sql.or_(*(values.startswith(form, autoescape=True) for form in forms))
                )
                if column.fixed:
                    query = query.where(table.c[column.fixed[0]] == column.fixed[1])
                rows = [
                    {f"old_{name}": part for name, part in zip(names, row, strict=True)} | {"moved": moved}
                    for row in connection.execute(query)
                    if (moved := move(row[-1], old, new)) is not None and moves(column.table, moved)
                ]
                conditions = (table.c[name] == sql.bindparam(f"old_{name}") for name in names)
                update = sql.update(table).where(*conditions).values({column.name: sql.bindparam("moved")})
                for start in range(0, len(rows), BATCH):
                    connection.execute(update, rows[start : start + BATCH])
                changed += len(rows)
    finally:
        engine.dispose()
    return changed


def move(value: str | None, old: Path, new: Path) -> str | None:
    """Return a value with the new place, None if it names nothing in the old one."""
    if value is None:
        return None
    inside = LEGACY + json.dumps(f"{old}/")[:-1]
    if value.startswith(inside):
        return '{"uri": "thinkimg:/' + value.removeprefix(inside)
    path = path_of(value)
    if path is None or not path.is_relative_to(old):
        return None
    return location_of(new / path.relative_to(old))
