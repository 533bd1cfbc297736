"""Engine, teacher and trainer: what is started, kept, started again, and ended. Stand-ins take notes, as only a GPU's
server can sleep.
"""

import asyncio
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from thinkimg.config.load import load_config
from thinkimg.engine.errors import EngineError
from thinkimg.engine.settings import EngineSettings
from thinkimg.models.base import BaseSource
from thinkimg.resources import Resources
from thinkimg.watchdog import descendants

POLICY = SimpleNamespace(digest="d", is_full=True, model_directory=Path("policy"))
SETTINGS = EngineSettings(dtype="float32", max_tokens=1024, max_images=4, max_pixels=2_000_000)
BASE = BaseSource(path="nowhere", revision=None, tiny=True)


def resources_of(tmp_path, *settings) -> Resources:
    return Resources(load_config("tiny", [f"where.store={tmp_path}", *settings]).where, say=lambda line: None)


@pytest.fixture
def notes(monkeypatch) -> list[str]:
    taken: list[str] = []

    class Noting:
        url = "http://127.0.0.1:1"

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

    monkeypatch.setattr("thinkimg.resources.Server", Noting)
    monkeypatch.setattr("thinkimg.resources.Trainer", lambda *_, **__: Noting(name="trainer"))
    return taken


def turns(tmp_path, keep: bool) -> None:
    with resources_of(tmp_path, f"where.engine.keep={keep}", f"where.trainer.keep={keep}") as resources:
        resources.server(POLICY, None, SETTINGS, BASE)
        resources.server(POLICY, None, SETTINGS, BASE)
        resources.trainer  # noqa: B018  starts with the first look
        resources.server(POLICY, None, SETTINGS, BASE)
        resources.teacher(POLICY, SETTINGS, BASE)


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


def test_a_server_that_made_room_comes_back_as_wide_as_it_was(tmp_path, notes):
    """Else the next who asks for more has it started once more."""
    with resources_of(tmp_path, "where.engine.keep=False", "where.trainer.keep=False") as resources:
        resources.server(POLICY, None, SETTINGS, BASE)
        resources.trainer  # noqa: B018
        narrow = SETTINGS.model_copy(update={"max_tokens": 512})
        assert resources.server(POLICY, None, narrow, BASE).settings.limits.max_tokens == 1024
        notes.clear()
        resources.server(POLICY, None, SETTINGS, BASE)
        assert notes == ["engine wakes"]


@pytest.mark.parametrize("server", ["engine", "teacher"])
def test_a_kept_server_is_started_again_for_what_it_was_not_started_for(tmp_path, notes, server):
    def serve(**changes):
        """Have a server for these settings; whether it was started (again), and how it runs."""
        notes.clear()
        settings = SETTINGS.model_copy(update=changes)
        arguments = (POLICY, None, settings, BASE) if server == "engine" else (POLICY, settings, BASE)
        running = (resources.server if server == "engine" else resources.teacher)(*arguments)
        return [note.split()[1] for note in notes if "wakes" not in note], running.settings.limits

    with resources_of(tmp_path) as resources:
        assert serve()[0] == ["starts"]
        for covered in ({}, {"max_tokens": 512}, {"max_images": 1, "max_pixels": 784}):
            assert serve(**covered)[0] == []
        for name, wider in (("max_tokens", 2048), ("max_images", 8), ("max_pixels", 4_000_000)):
            done, running = serve(**{name: wider})
            assert done == ["stops", "starts"] and getattr(running, name) == wider
            assert serve()[0] == [], "the wider one serves who asked before"
        assert (running.max_tokens, running.max_images, running.max_pixels) == (2048, 8, 4_000_000)
        done, running = serve(dtype="bfloat16", max_images=2)
        assert done == ["stops", "starts"] and running.dtype == "bfloat16" and running.max_images == 8
        assert serve(dtype="bfloat16")[0] == [] and serve()[0] == ["stops", "starts"]


def test_two_threads_that_ask_for_one_policy_load_it_once(tmp_path, notes, monkeypatch):
    """Be it on a server of our own, which was started with another policy."""
    loaded = []

    class Client:
        def __init__(self, urls, **_):
            self.urls = urls

        async def leave_out_dead(self):
            pass

        async def versions(self):
            return dict.fromkeys(self.urls, loaded[-1] if loaded else "other")

        async def load_weights(self, directory, version):
            await asyncio.sleep(0.3)  # the other one asks meanwhile
            loaded.append(version)

    monkeypatch.setattr("thinkimg.resources.EngineClient", Client)
    both, held = threading.Barrier(2), []

    def ask():
        both.wait()
        client = asyncio.run(resources.engine(POLICY, SETTINGS, BASE))
        held.append((loaded[-1], asyncio.run(client.versions())))

    with resources_of(tmp_path) as resources:
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert loaded == ["d"] and held == [("d", {"http://127.0.0.1:1": "d"})] * 2
    assert notes.count("engine starts") == 1


@pytest.mark.parametrize("moment", ["its model is made", "it is not ready"])
def test_closing_ends_a_server_that_is_being_started(tmp_path, monkeypatch, moment):
    """A real one, whose program never answers."""
    begun, raised, model = threading.Event(), [], tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def weights(self, policy, base):
        if moment == "its model is made":
            begun.set()
            time.sleep(0.5)  # somebody closes meanwhile
        return model

    def command(*_):
        threading.Timer(0.5, begun.set).start()
        return ["sleep", "600"]

    def ask():
        try:
            resources.server(POLICY, None, SETTINGS, BASE)
        except Exception as error:
            raised.append(error)

    monkeypatch.setattr(Resources, "weights", weights)
    monkeypatch.setattr("thinkimg.engine.server.server_command", command)
    with resources_of(tmp_path) as resources:
        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(20)
        started = time.monotonic()
        resources.close()
        assert time.monotonic() - started < 8
        thread.join(8)
        assert not thread.is_alive() and [type(error) for error in raised] == [EngineError], raised
        with pytest.raises(RuntimeError, match="closed"):
            resources.server(POLICY, None, SETTINGS, BASE)
    assert not [pid for pid in descendants(os.getpid()) if b"sleep\x00600" in Path(f"/proc/{pid}/cmdline").read_bytes()]
