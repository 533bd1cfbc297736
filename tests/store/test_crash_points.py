"""Every stage, stopped before and after every operation of the file layer, with and without a power cut; and every file
of what they make, damaged.

The stages are those of recorded_stages.py, so that the operations are those of a real run.
"""

import os
import random
import shutil
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
from disk import Crash, Disk
from recorded_stages import STAGES

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.artifacts import Store


@cache
def losses(kind: str) -> tuple:
    return {"kill": (None, None, None), "power": (1.0, 1.0, 1.0)}[kind]


def crash_everywhere(stages, name, root, monkeypatch, kind, step):
    whole = stages.made[name]
    disk = Disk(monkeypatch)
    stages.run(name, Store(root / "counted"))
    events = disk.events
    assert events > 20
    for stop_at in range(1 + random.Random(name).randrange(step), events + 1, step):
        rng, disk, store = random.Random(stop_at), Disk(monkeypatch), Store(root / str(stop_at))
        store.root.mkdir()
        stops = (
            stop_at,
            rng.randint(1, events),
            None,
        )  # a run, a recovery that is stopped, too, and one that gets through
        for stop, loss in zip(stops, losses(kind), strict=True):
            disk.events, disk.stop_at = 0, stop
            try:
                stages.run(name, store)
                finished = True
            except Crash:
                finished = False
            if loss is not None:
                disk.cut_power(rng, loss)
            found = store.find(whole.kind, whole.fingerprint)
            assert found or not finished, f"{name} {stop_at}: what was returned must outlive a power cut"
            assert not found or (store.verify(found) == [] and found.digest == whole.digest), f"{name} {stop_at}"
        assert finished and store.sweep() == [], f"{name} {stop_at}: something is left"
        shutil.rmtree(store.root)


@pytest.mark.parametrize("kind", ["kill", "power"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_stopped_publishes_all_or_nothing_and_then_gets_through(
    stages, name, kind, tmp_path, monkeypatch
):
    crash_everywhere(stages, name, tmp_path, monkeypatch, kind, step=17)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["kill", "power"])
@pytest.mark.parametrize("name", STAGES)
def test_at_every_operation(stages, name, kind, tmp_path, monkeypatch):
    crash_everywhere(stages, name, tmp_path, monkeypatch, kind, step=1)


WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


class Audit:
    """Python's audit events that change something under a root while the file layer is not at work in that thread.

    Native code (Parquet, safetensors) raises no event of its own; it writes to the name that a "write" has given.
    """

    def __init__(self):
        self.root, self.found, self.depth = None, [], threading.local()
        sys.addaudithook(self)  # for the life of the process: it watches only while there is a root

    def hook(self, event, *paths):
        self.depth.ops = getattr(self.depth, "ops", 0) + (1 if event.startswith("before") else -1)

    def __call__(self, event, arguments):
        if self.root is None or getattr(self.depth, "ops", 0) > 0:
            return
        path, writes = arguments[0] if arguments else None, event in WRITES
        if event == "open" and isinstance(path, (str, bytes, os.PathLike)):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(self.root):
            self.found.append((event, str(path)))


@pytest.fixture(scope="module")
def audit():
    return Audit()


@pytest.mark.parametrize("name", STAGES)
def test_nothing_is_written_past_the_file_layer(stages, name, tmp_path, monkeypatch, audit):
    monkeypatch.setattr(files, "hook", audit.hook)
    audit.root, audit.found = tmp_path, []
    try:
        stages.run(name, Store(tmp_path))
        assert audit.found == []
        (tmp_path / "past").write_text("")
    finally:
        audit.root = None
    assert audit.found == [("open", str(tmp_path / "past"))]  # it does watch


@pytest.mark.parametrize("name", STAGES)
def test_damage_to_any_file_is_named_and_the_file_is_refused(stages, name, tmp_path):
    artifact, rng = stages.made[name], random.Random(name)
    copy = Store(tmp_path)
    shutil.copytree(stages.store.root, tmp_path, dirs_exist_ok=True)
    directory = tmp_path / str(artifact.reference)
    for file in ("manifest.json", *artifact.files):
        path = directory / file
        good = path.read_bytes()
        flips = [rng.randrange(len(good)) for _ in range(6)]
        bad = [good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :] for at in flips]
        bad += [good[: rng.randrange(len(good))], b"", good + b"\0"]
        for data in bad:
            path.write_bytes(data)
            assert [problem.name for problem in copy.verify(directory)] == [file]
            with pytest.raises(UserError, match=f"{path.name}.* is not what was published"):
                copy.find(artifact.kind, artifact.fingerprint).checked(file)
        path.unlink()
        assert [problem.name for problem in copy.verify(directory)] == [file]
        path.write_bytes(good)
    assert copy.verify(directory) == []
