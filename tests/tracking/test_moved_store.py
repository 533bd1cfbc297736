"""A store that is moved, copied or reached by another name: MLflow's files are where the store is."""

import logging
import shutil
import sqlite3
from pathlib import Path

import pytest
import tracking_store
from hypothesis import given
from hypothesis import strategies as st
from tracking_store import contents, run_loop, settings

from thinkimg.store.artifacts import Store
from thinkimg.tracking.connection import Connection, forget_places
from thinkimg.tracking.loop import sync_store, ui_command
from thinkimg.tracking.relocation import location_of, move, path_of
from thinkimg.tracking.settings import TrackingConfig

store = tracking_store.store


def mentions(database: Path, text: str) -> set[tuple[str, str]]:
    """(table, column) of a database that have the text anywhere."""
    connection = sqlite3.connect(database)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = [(table, row[1]) for table in tables for row in connection.execute(f"PRAGMA table_info('{table}')")]
    where = 'SELECT count(*) FROM "{0}" WHERE instr(CAST("{1}" AS TEXT), ?)'
    return {each for each in columns if connection.execute(where.format(*each), (text,)).fetchone() != (0,)}


def files_of(store: Store, uri: str | None = None) -> list[bytes]:
    """The content of every run's files and the images of every trace, as MLflow's own client hands them out."""
    forget_places()  # as in another process
    connection = Connection(store.root, TrackingConfig(uri=uri))
    client, found = connection.client, []
    for run in connection.all_runs(connection.loops):
        found += [Path(client.download_artifacts(run.info.run_id, file.path)).read_bytes()
                  for file in client.list_artifacts(run.info.run_id)]  # fmt: skip
        for trace in client.search_traces(locations=[connection.loops], run_id=run.info.run_id):
            folder = path_of(trace.info.tags["mlflow.artifactLocation"])
            assert folder.is_relative_to(store.root.resolve()), "MLflow's UI reads a trace's images there"
            found += sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return found


@pytest.mark.parametrize(
    ("first", "name"), [("sync", "elsewhere"), ("ui", "a %20b#ü's; --"), ("loop", "a %20b#ü's; --")]
)
def test_after_a_move_everything_is_there_and_new_files_come_beside_it(store, first, name, caplog):
    run_loop(store, settings(store), iterations=1)
    (before, models), files = contents(store), files_of(store)
    assert len(files) > 3
    old, new = store.root, store.root.parent / name
    old.rename(new)
    moved = Store(new)
    with caplog.at_level(logging.WARNING):
        if first == "sync":
            sync_store(moved)
        elif first == "ui":
            ui_command(str(new), TrackingConfig())
        else:
            run_loop(moved, settings(moved), iterations=2)
    (said,) = [line for line in caplog.messages if "before" in line]
    assert str(old) in said and str(new) in said
    assert not old.exists(), "nothing is made at the old place"
    assert mentions(new / "mlflow.db", f"{old}/") == set()
    caplog.clear()
    assert files_of(moved)[: len(files)] == files or first == "loop"
    if first != "loop":
        after, after_models = contents(moved)
        assert after == before
        assert {name: len(versions) for name, (_, versions) in after_models.items()} == {
            name: len(versions) for name, (_, versions) in models.items()
        }
        run_loop(moved, settings(moved), iterations=2)
    assert not old.exists() and len(files_of(moved)) > len(files)
    assert not [line for line in caplog.messages if "before" in line], "said once"


def test_a_copy_takes_nothing_from_the_original(store):
    run_loop(store, settings(store), iterations=1)
    before, files = contents(store), files_of(store)
    copy = Store(store.root.parent / "copy")
    shutil.copytree(store.root, copy.root)
    run_loop(copy, settings(copy), iterations=2)
    assert files_of(store) == files and contents(store) == before
    assert mentions(copy.root / "mlflow.db", f"{store.root}/") == set()


def test_by_another_name_it_is_the_same_store(store, caplog):
    run_loop(store, settings(store), iterations=1)
    link = store.root.parent / "link"
    link.symlink_to(store.root)
    sync_store(Store(link))
    assert not [line for line in caplog.messages if "before" in line]
    assert mentions(store.root / "mlflow.db", f"{link}/") == set()


def test_a_database_elsewhere_is_followed_for_the_store_that_moved_alone(store, empty_database):
    database = store.root.parent / "shared.db"
    shutil.copy(empty_database, database)
    uri = f"sqlite:///{database}"
    run_loop(store, settings(store, uri=uri), iterations=1)
    files, old = files_of(store, uri), store.root
    other = Store(old.parent / "other")
    other.root.mkdir()
    sync_store(other, TrackingConfig(uri=uri))  # another one that is tracked there takes nothing over
    assert mentions(database, f"{other.root}/") == set()
    old.rename(old.parent / "new")
    sync_store(other, TrackingConfig(uri=uri))
    assert mentions(database, f"{other.root}/") == set()
    moved = Store(old.parent / "new")
    assert files_of(moved, uri) == files and mentions(database, f"{old}/") == set()


NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: Path("/", *names))


@given(PATHS, PATHS, PATHS)
def test_what_is_inside_moves_and_nothing_else(old, new, rest):
    inside = old.joinpath(*rest.parts[1:])
    for value in (str(inside), inside.as_uri(), location_of(inside)):
        assert path_of(move(value, old, new)) == new.joinpath(*rest.parts[1:])
    beside = old.with_name(old.name + "x").joinpath(*rest.parts[1:])
    for value in (str(beside), f"thinkimg:/{rest.name}", "http://host/x", "", None, f'{{"uri": "{beside}"}}', "text"):
        assert move(value, old, new) is None
