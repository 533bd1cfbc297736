"""Engine, teacher and trainer where memory holds one of them at a time. Only a GPU's server can sleep: stand-ins take notes."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from thinkimg.config import load
from thinkimg.resources import Machines

POLICY = SimpleNamespace(digest="d", files={"policy/model/config.json": {}}, checked=lambda name: Path(name))


@pytest.fixture
def notes(monkeypatch) -> list[str]:
    taken: list[str] = []

    class Noting:
        def __init__(self, *_, settings=None, name="engine", **__):
            self.settings, self.name = settings, name

        def __enter__(self):
            taken.append(f"{self.name} starts")
            self.alive = True
            return self

        def __exit__(self, *_):
            self.alive = False

        def stop(self):
            if self.alive:
                taken.append(f"{self.name} stops")
            self.alive = False

        def sleep(self):
            taken.append(f"{self.name} sleeps")

        def wake(self):
            taken.append(f"{self.name} wakes")

    monkeypatch.setattr("thinkimg.engine.server.Server", Noting)
    monkeypatch.setattr("thinkimg.trainer.worker.Trainer", lambda *_, **__: Noting(name="trainer"))
    return taken


def turns(tmp_path, keep: bool) -> None:
    with Machines(load("tiny", [f"where.engine.keep={keep}", f"where.store={tmp_path}"])) as machines:
        machines.server(POLICY, None)
        machines.server(POLICY, None)
        machines.trainer  # noqa: B018  starts with the first look
        machines.server(POLICY, None)
        machines.teacher(POLICY)


def test_on_a_gpu_who_is_not_wanted_sleeps_and_starts_once(tmp_path, notes, monkeypatch):
    monkeypatch.setattr("thinkimg.closure.on_cpu", lambda: False)
    monkeypatch.setattr("thinkimg.closure.visible_gpus", lambda: 1)
    turns(tmp_path, keep=False)
    assert notes == [
        "engine starts", "engine wakes", "engine wakes", "engine sleeps", "trainer starts", "engine wakes",
        "engine sleeps", "teacher starts", "teacher wakes",
    ]  # fmt: skip


def test_on_a_cpu_who_is_not_wanted_ends(tmp_path, notes):
    turns(tmp_path, keep=False)
    assert [note for note in notes if "wakes" not in note] == [
        "engine starts", "engine stops", "trainer starts", "engine starts", "engine stops", "teacher starts",
    ]  # fmt: skip


def test_where_there_is_room_for_all_nobody_leaves(tmp_path, notes):
    turns(tmp_path, keep=True)
    assert [note for note in notes if "wakes" not in note] == ["engine starts", "trainer starts", "teacher starts"]
