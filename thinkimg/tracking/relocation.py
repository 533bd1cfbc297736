"""Places of files in MLflow's database: they are absolute there, so that a store that was moved has them rewritten."""

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("trace_tags", "value"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("datasets", "dataset_source"),
)
"""(table, column) of MLflow 3.17's database that hold places."""


def location_of(directory: Path) -> str:
    """Return a directory as MLflow's location: a URI, as MLflow would take a % in a path for an escape."""
    return directory.as_uri() if "%" in str(directory) else str(directory)


def path_of(location: str) -> Path | None:
    """Return the path that a location names, None if it is none of this machine's."""
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return Path(location) if location.startswith("/") else None


def move_records(uri: str, old: Path, new: Path) -> int:
    """Let a database of MLflow name `new` wherever it names a place in `old`; return the number of changed values."""
    import sqlalchemy as sql

    engine, changed = sql.create_engine(uri), 0
    try:
        with engine.begin() as connection:
            for table, column in COLUMNS:
                values = sql.table(table, sql.column(column)).c[column]
                for (value,) in connection.execute(sql.select(values).distinct()).all():
                    moved = move(value, old, new)
                    if moved is not None:
                        update = sql.update(values.table).where(values == value).values({column: moved})
                        changed += connection.execute(update).rowcount
    finally:
        engine.dispose()
    return changed


def move(value: str | None, old: Path, new: Path) -> str | None:
    """Return a value with the new place, None if it names nothing in the old one."""
    if value is None:
        return None
    inside = '{"uri": ' + json.dumps(f"{old}/")[:-1]  # of versions up to 0.2
    if value.startswith(inside):
        return '{"uri": "thinkimg:/' + value.removeprefix(inside)
    path = path_of(value)
    if path is None or not path.is_relative_to(old):
        return None
    return location_of(new / path.relative_to(old))
