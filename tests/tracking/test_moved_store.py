"""A store that is moved, copied or reached by another name: MLflow's files are where the store is."""

import logging
import shutil
import sqlite3
from contextlib import nullcontext
from pathlib import Path

import pytest
import tracking_store
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from tracking_store import contents, run_loop, settings

from thinkimg.store.artifacts import Store
from thinkimg.tracking.connection import LOOPS, STAGES, Connection, artifact_root, forget_places
from thinkimg.tracking.loop import sync_store, ui_command
from thinkimg.tracking.relocation import COLUMNS, location_of, move, move_records, path_of
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
            home = artifact_root(store.root, connection.uri)
            assert folder.is_relative_to(home if home.exists() else store.root), "MLflow's UI reads images there"
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


def share_as_before(store: Store, database: Path, empty_database: Path) -> str:
    """A database elsewhere as an earlier version left it: its files are in the first of its stores."""
    shutil.copy(empty_database, database)
    client = MlflowClient(uri := f"sqlite:///{database}")
    for name in (LOOPS, STAGES):
        client.create_experiment(name, location_of(store.root / "mlartifacts" / name))
    return uri


def test_a_database_elsewhere_is_followed_for_the_store_that_moved_alone(store, empty_database):
    database = store.root.parent / "shared.db"
    uri = share_as_before(store, database, empty_database)
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
    assert files_of(moved, uri) == files
    assert mentions(database, f"{old}/mlartifacts/thinkimg/") == set() and mentions(database, f"{moved.root}/")


def test_a_shared_database_is_left_alone_where_a_disk_is_not_mounted(store, empty_database, caplog):
    """Of the same loop, too: another machine's store has a record of an equal id, and not the run's files."""
    database = store.root.parent / "shared.db"
    uri = share_as_before(store, database, empty_database)
    run_loop(store, settings(store, uri=uri), iterations=1)
    other = Store(store.root.parent / "other")
    other.root.mkdir()
    shutil.copy(empty_database, other.root / "mlflow.db")
    run_loop(other, settings(other), iterations=1)  # it has files of MLflow, in a database of its own
    files = files_of(store, uri)
    store.root.rename(store.root.parent / "unmounted")
    with caplog.at_level(logging.WARNING):
        Connection(other.root, TrackingConfig(uri=uri))
    assert [line for line in caplog.messages if str(store.root) in line and "nothing at" in line]
    assert mentions(database, f"{other.root}/") == set()
    store.root.parent.joinpath("unmounted").rename(store.root)
    assert files_of(store, uri) == files


def test_rows_whose_files_are_elsewhere_stay_in_a_shared_database(store, empty_database):
    database = store.root.parent / "shared.db"
    uri = share_as_before(store, database, empty_database)
    run_loop(store, settings(store, uri=uri), iterations=1)
    client, loops = (connection := Connection(store.root, TrackingConfig(uri=uri))).client, connection.loops
    theirs = client.create_run(loops, tags={"thinkimg.loop": "0" * 16}).info  # another machine's, with its files there
    old = store.root.rename(store.root.parent / "new")
    forget_places()
    Connection(old, TrackingConfig(uri=uri))
    assert client.get_run(theirs.run_id).info.artifact_uri == theirs.artifact_uri
    assert client.get_experiment(loops).artifact_location == str(old / "mlartifacts" / "thinkimg")


@pytest.mark.parametrize("link", [False, True])
def test_a_copy_reached_by_a_relative_name_or_a_link_is_a_copy(store, link):
    run_loop(store, settings(store), iterations=1)
    original, base = files_of(store), store.root.parent
    copy = Store(base / "copy")
    shutil.copytree(store.root, copy.root)
    (base / "link").symlink_to(copy.root)
    uri = f"sqlite:///{base}/link/mlflow.db" if link else "sqlite:///../copy/mlflow.db"
    before = sorted(store.root.rglob("*"))
    run_loop(copy, settings(copy, uri=uri), iterations=2)
    assert sorted(store.root.rglob("*")) == before and files_of(store) == original
    assert mentions(copy.root / "mlflow.db", f"{store.root}/") == set()


def test_a_copy_of_what_is_in_a_closed_home_is_followed(store, monkeypatch):
    Connection(store.root, TrackingConfig())
    copy = store.root.parent / "copy"
    shutil.copytree(store.root, copy)
    stat = Path.stat

    def refuse(path, **options):  # as for another user's home with the mode 0700; tests may run as root
        if path.is_relative_to(store.root):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        Connection(copy, TrackingConfig())
    assert mentions(copy / "mlflow.db", f"{store.root}/") == set()


def test_the_cost_of_moving_grows_with_the_rows_and_not_with_their_square(store, monkeypatch):
    import sqlalchemy as sql

    Connection(store.root, TrackingConfig())
    old, count = Path("/old/store"), 3000
    with sqlite3.connect(store.root / "mlflow.db") as connection:
        connection.executemany(
            "INSERT INTO trace_tags(key, value, request_id) VALUES (?, ?, ?)",
            [("mlflow.artifactLocation", f"{old}/traces/{i}", str(i)) for i in range(count)]
            + [("why", f"{old}/traces/{i}", str(i)) for i in range(3)],
        )
    statements = []
    engine = sql.create_engine(uri := f"sqlite:///{store.root}/mlflow.db")
    monkeypatch.setattr(sql, "create_engine", lambda uri: engine)
    sql.event.listen(engine, "before_cursor_execute", lambda c, cursor, statement, *_: statements.append(statement))
    assert move_records(uri, old, Path("/new")) == count
    assert len(statements) <= 12 and all('"key"' in s or "trace_tags.key" in s for s in statements if "trace_tags" in s)


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql", "mysql", "mssql"])
def test_its_statements_compile_for_every_database(dialect, monkeypatch):
    import sqlalchemy as sql

    statements = []

    class Recorder:
        def begin(self):
            return nullcontext(self)

        def dispose(self): ...

        def execute(self, statement, rows=()):
            statements.append(str(statement.compile(dialect=sql.dialects.registry.load(dialect)())))
            return [(*("k" for _ in list(statement.selected_columns)[1:]), "/old/x")] if statement.is_select else None

    monkeypatch.setattr(sql, "create_engine", lambda uri: Recorder())
    assert move_records("any", Path("/old"), Path("/new")) == len(COLUMNS) == len(statements) / 2


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


def test_a_shared_database_has_its_files_beside_it(store, empty_database, caplog):
    """Whichever store was first, whichever is copied, and wherever the database goes with its files."""
    folder = store.root.parent / "tracking"
    folder.mkdir()
    shutil.copy(empty_database, folder / "shared.db")
    uri = f"sqlite:///{folder / 'shared.db'}"
    run_loop(store, settings(store, uri=uri), iterations=1)
    copy = Store(store.root.parent / "copy")
    shutil.copytree(store.root, copy.root)
    count = len(files_of(store, uri))
    run_loop(copy, settings(copy, uri=uri), iterations=2)
    shutil.rmtree(store.root)
    assert len(files := files_of(copy, uri)) > count > 3
    assert [path.parent for path in store.root.parent.rglob("mlartifacts")] == [folder]
    new = folder.rename(store.root.parent / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert files_of(copy, moved := f"sqlite:///{new / 'shared.db'}") == files
    assert [line for line in caplog.messages if str(folder) in line and str(new) in line]
    run_loop(copy, settings(copy, uri=moved), iterations=2)
    assert not folder.exists() and mentions(new / "shared.db", f"{folder}/") == set()
