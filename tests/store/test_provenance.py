"""The recorded origin of an artifact: ours if it can be known, and else nothing; never that of a user's repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tracking_store

import thinkimg
from thinkimg.tracking.connection import Connection
from thinkimg.tracking.settings import TrackingConfig

store = tracking_store.store
ASK = (
    "from thinkimg.store.manifest import git_revision; import thinkimg; print(thinkimg.__file__); print(git_revision())"
)


def git(folder: Path, *arguments: str) -> str:
    own = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, env=os.environ | own, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def repository(folder: Path) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "users.txt").write_text("a user's\n")
    git(folder, "add", "users.txt")
    git(folder, "commit", "-qm", "one")
    return folder


def install(place: Path) -> Path:
    """A copy of the package as pip leaves one; the part that this question needs."""
    root = Path(thinkimg.__file__).parent
    shutil.copytree(root, place / "thinkimg", ignore=shutil.ignore_patterns("__pycache__"))
    return place


def revision(place: Path, cwd: Path, **environment: str) -> str | None:
    known = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK], cwd=cwd, env=known, capture_output=True, text=True, check=True
    )
    file, answer = done.stdout.splitlines()
    assert Path(file).is_relative_to(place)
    return None if answer == "None" else answer


def test_a_users_repository_around_an_installed_thinkimg_is_not_its_origin(tmp_path):
    users = repository(tmp_path / "users")
    for inside in (".venv/lib/python3.11/site-packages", "vendor", "."):  # the last as by `pip install --target .`
        assert revision(install(users / inside), users) is None, inside
    git(users, "add", "-f", "vendor")
    git(users, "commit", "-qm", "a copy of thinkimg")
    assert revision(users / "vendor", users) is None
    shutil.rmtree(users / "thinkimg")
    other = install(tmp_path / "apart")
    assert revision(other, users) is None
    hook = {"GIT_DIR": str(users / ".git"), "GIT_WORK_TREE": str(users), "GIT_INDEX_FILE": str(users / ".git/index")}
    assert revision(other, users, **hook) is None


def test_its_own_repository_is(tmp_path):
    users, own = repository(tmp_path / "users"), repository(tmp_path / "own")
    install(own)
    git(own, "add", "thinkimg")
    git(own, "commit", "-qm", "two")
    commit = git(own, "rev-parse", "HEAD")
    hook = {"GIT_DIR": str(users / ".git"), "GIT_WORK_TREE": str(users)}
    assert revision(own, own) == revision(own, users) == revision(own, tmp_path, **hook) == commit
    with open(own / "thinkimg" / "errors.py", "a") as file:
        file.write("# changed\n")
    assert revision(own, users) == f"{commit}-dirty"
    git(users, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(own), "parts/own")
    commit_there = git(users / "parts" / "own", "rev-parse", "HEAD")
    assert revision(users / "parts" / "own", users) == commit_there == commit
    assert revision(own, users, PATH="/nowhere") is None, "no git on the machine"


def test_traces_and_runs_name_no_repository_of_the_working_directory(store, tmp_path, monkeypatch):
    """MLflow looks for one around the working directory."""
    from mlflow.tracing.utils import environment

    users = repository(tmp_path / "users")
    git(users, "remote", "add", "origin", "https://private-host/x.git")
    monkeypatch.chdir(users)
    environment.resolve_env_metadata.cache_clear()
    try:
        found = environment.resolve_env_metadata()
        assert "private-host" in str(found), "MLflow does so by itself"
        monkeypatch.setattr("thinkimg.tracking.loop.git_revision", lambda: None)
        monkeypatch.setattr("thinkimg.store.artifacts.git_revision", lambda: None)
        tracking_store.run_loop(store, tracking_store.settings(store), iterations=1)
    finally:
        environment.resolve_env_metadata.cache_clear()
    connection, commit = Connection(store.root, TrackingConfig()), git(users, "rev-parse", "HEAD")
    runs = [run for experiment in (connection.loops, connection.stages) for run in connection.all_runs(experiment)]
    assert runs and not any({"git", "mlflow.source.git.commit"} & run.data.tags.keys() for run in runs)
    traces = connection.client.search_traces(locations=[connection.loops])
    assert traces and not any(
        value for trace in traces for name, value in trace.info.trace_metadata.items() if "git" in name
    )
    data = (store.root / "mlflow.db").read_bytes()
    assert commit.encode() not in data and b"private-host" not in data


@pytest.mark.parametrize("name", ["git", "where", "host", "seed"])
def test_a_manifest_says_null_for_what_is_not_known(store, name, monkeypatch):
    monkeypatch.setattr("thinkimg.store.artifacts.git_revision", lambda: None)
    dataset, *_ = tracking_store.make_dataset(store)
    assert name in dataset.manifest
    assert dataset.manifest["git"] is None and dataset.manifest["host"]["thinkimg"] == thinkimg.__version__
