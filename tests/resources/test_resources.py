"""Engine, teacher and trainer: what is started, kept, started again, and ended. Stand-ins take notes, as only a GPU's
server can sleep.
"""

import asyncio
import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from thinkimg import resources as resources_module
from thinkimg.config.load import load_config
from thinkimg.engine.errors import EngineError
from thinkimg.engine.settings import EngineSettings
from thinkimg.errors import UserError
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
        urls = ("http://127.0.0.1:1",)

        def __init__(self, *_, settings=None, name="engine", **__):
            self.settings, self.name, self.each, self.alive = settings, name, [self], False

        def start(self):
            taken.append(f"{self.name} starts")
            self.alive = True

        def __enter__(self):
            self.start()
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

    monkeypatch.setattr("thinkimg.resources.Servers", Noting)
    monkeypatch.setattr("thinkimg.resources.Trainer", lambda config, **_: Noting(settings=config, name="trainer"))
    return taken


def turns(tmp_path, notes, *settings) -> list[str]:
    """Return what engine, trainer and teacher did while each was asked for in turn."""
    with resources_of(tmp_path, *settings) as resources:
        resources.servers(POLICY, None, SETTINGS, BASE)
        resources.servers(POLICY, None, SETTINGS, BASE)
        resources.trainer  # noqa: B018  starts with the first look
        resources.servers(POLICY, None, SETTINGS, BASE)
        resources.teacher(POLICY, SETTINGS, BASE)
        return list(notes)


def without_wakes(notes: list[str]) -> list[str]:
    return [note for note in notes if "wakes" not in note]


IN_TURNS = ("where.engine.keep=false", "where.trainer.keep=false")


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr("thinkimg.closure.on_cpu", lambda: False)
    monkeypatch.setattr("thinkimg.closure.visible_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_on_a_gpu_who_is_not_wanted_sleeps_and_starts_once(tmp_path, notes, four_gpus):
    assert turns(tmp_path, notes, *IN_TURNS) == [
        "engine starts", "engine wakes", "engine wakes", "engine sleeps", "trainer starts", "engine wakes",
        "engine sleeps", "teacher starts", "teacher wakes",
    ]  # fmt: skip


def test_on_a_cpu_who_is_not_wanted_ends(tmp_path, notes):
    assert without_wakes(turns(tmp_path, notes, *IN_TURNS)) == [
        "engine starts", "engine stops", "trainer starts", "engine starts", "engine stops", "teacher starts",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings, sleeps",
    [
        (["where.engine.devices=[0,1]", "where.trainer.devices=[2,3]"], ["engine sleeps"]),  # for the teacher, on GPU 0
        (["where.engine.devices=[0,1]", "where.trainer.devices=[2]", "where.teacher.devices=[3]"], []),
        (["where.trainer.devices=[1]"], ["engine sleeps"]),  # the engine is on GPU 0, and so is the teacher
        (["where.teacher.devices=[1]"], ["engine sleeps"]),  # for the trainer, on GPU 0 as well
        (["where.trainer.devices=[1]", "where.teacher.devices=[1]"], []),  # the teacher starts last
        (["where.engine.devices=[GPU-a]", "where.trainer.devices=[1]"], ["engine sleeps"] * 2),  # nobody knows
        (["where.trainer.processes=2", "where.engine.devices=[1]"], ["engine sleeps"] * 2),
        (["where.engine.tensor_parallel_size=2", "where.trainer.devices=[1]"], ["engine sleeps"] * 2),
    ],
)
def test_who_shares_no_gpu_stays_awake(tmp_path, notes, four_gpus, settings, sleeps):
    done = turns(tmp_path, notes, *IN_TURNS, *settings)
    assert [note for note in done if "sleeps" in note] == sleeps
    assert [note for note in done if "starts" in note] == ["engine starts", "trainer starts", "teacher starts"]


@pytest.mark.parametrize(
    "settings, apart",
    [
        (["where.engine.devices=[0,1]", "where.trainer.devices=[2,3]"], True),
        (["where.engine.devices=[0,1]", "where.trainer.devices=[2,3]", "where.teacher.devices=[3]"], False),
        (["where.engine.devices=[0,1]", "where.trainer.devices=[1]"], False),
        ([], False),
    ],
)
def test_a_trainer_on_gpus_of_its_own_stays_and_is_no_rival_of_the_engine(tmp_path, notes, four_gpus, settings, apart):
    with resources_of(tmp_path, *IN_TURNS, *settings) as resources:
        assert resources.where.exclusive == (not apart) and resources.trainer.settings.keep == apart
        assert resources.where.takes_turns, "engine and teacher may share a GPU still"
    with resources_of(tmp_path, *settings) as resources:
        assert not resources.where.exclusive and not resources.where.takes_turns and resources.trainer.settings.keep
    alone = [*settings, "where.engine.keep=false"]  # an engine that sleeps beside a trainer that stays
    if apart:
        assert load_config("tiny", alone).where.apart
    else:
        with pytest.raises(UserError, match="where.trainer.keep=false"):
            load_config("tiny", alone)


def test_where_there_is_room_for_all_nobody_leaves(tmp_path, notes):
    assert without_wakes(turns(tmp_path, notes)) == ["engine starts", "trainer starts", "teacher starts"]


@pytest.mark.parametrize(
    "settings, beside",
    [
        (["where.engine.devices=[0]", "where.teacher.devices=[1]", "where.trainer.devices=[2]"], True),
        (["where.engine.devices=[0]", "where.teacher.devices=[0]", "where.trainer.devices=[2]"], False),
        (["where.engine.devices=[0]", "where.teacher.devices=[1]", "where.trainer.devices=[0]"], False),
        (["where.engine.devices=[0]", "where.teacher.devices=[1]", "where.trainer.devices=[2]", *IN_TURNS], False),
        (None, True),  # on a CPU
        (IN_TURNS, False),
    ],
)
def test_engine_and_teacher_start_side_by_side_where_no_other_takes_their_memory(
    tmp_path, notes, request, monkeypatch, settings, beside
):
    if settings not in (None, IN_TURNS):
        request.getfixturevalue("four_gpus")
    starting, most, servers = [], [], resources_module.Servers

    class Slow(servers):
        def start(self):
            starting.append(self.name)
            deadline = time.monotonic() + (20 if beside else 0.3)
            while len(starting) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            most.append(len(starting))
            super().start()
            time.sleep(0.1)
            starting.remove(self.name)

    monkeypatch.setattr("thinkimg.resources.Servers", Slow)
    with resources_of(tmp_path, *(settings or [])) as resources:
        threads = [
            threading.Thread(target=resources.servers, args=(POLICY, None, SETTINGS, BASE)),
            threading.Thread(target=resources.teacher, args=(POLICY, SETTINGS, BASE)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(most) == 1 + beside
    assert sorted(note for note in notes if "starts" in note) == ["engine starts", "teacher starts"]


def test_a_server_that_made_room_comes_back_as_wide_as_it_was(tmp_path, notes):
    """Else the next who asks for more has it started once more."""
    with resources_of(tmp_path, "where.engine.keep=False", "where.trainer.keep=False") as resources:
        resources.servers(POLICY, None, SETTINGS, BASE)
        resources.trainer  # noqa: B018
        narrow = SETTINGS.model_copy(update={"max_tokens": 512})
        assert resources.servers(POLICY, None, narrow, BASE).settings.limits.max_tokens == 1024
        notes.clear()
        resources.servers(POLICY, None, SETTINGS, BASE)
        assert notes == ["engine wakes"]


@pytest.mark.parametrize("server", ["engine", "teacher"])
def test_a_kept_server_is_started_again_for_what_it_was_not_started_for(tmp_path, notes, server):
    def serve(**changes):
        """Have a server for these settings; whether it was started (again), and how it runs."""
        notes.clear()
        settings = SETTINGS.model_copy(update=changes)
        arguments = (POLICY, None, settings, BASE) if server == "engine" else (POLICY, settings, BASE)
        running = (resources.servers if server == "engine" else resources.teacher)(*arguments)
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


def test_a_client_that_needs_other_weights_or_wider_limits_waits_for_the_others(tmp_path, notes, monkeypatch):
    """And who needs the same, within the limits, does not."""
    events: list[str] = []

    class Client:
        def __init__(self, urls, *, on_close, **_):
            self.urls, self.on_close = urls, on_close

        async def leave_out_dead(self):
            pass

        async def versions(self):
            return dict.fromkeys(self.urls, "none")

        async def load_weights(self, directory, version):
            events.append(f"load {version}")

        async def __aexit__(self, *_):
            self.on_close()

    monkeypatch.setattr("thinkimg.resources.EngineClient", Client)
    other = SimpleNamespace(**vars(POLICY) | {"digest": "other"})
    wide = SETTINGS.model_copy(update={"max_tokens": 4 * SETTINGS.max_tokens})

    def ask(policy, settings, name):
        with contextlib.suppress(RuntimeError):  # they have been closed
            asyncio.run(resources.engine(policy, settings, BASE))
            events.append(name)

    with resources_of(tmp_path) as resources:
        first = asyncio.run(resources.engine(POLICY, SETTINGS, BASE))
        beside = asyncio.run(resources.engine(POLICY, SETTINGS, BASE))
        events.clear()
        threads = [threading.Thread(target=ask, args=(other, SETTINGS, "other"))]
        threads.append(threading.Thread(target=ask, args=(POLICY, wide, "wide")))
        for thread in threads:
            thread.start()
            thread.join(0.5)
        assert events == [] and all(thread.is_alive() for thread in threads)
        asyncio.run(first.__aexit__())
        threads[0].join(0.5)
        assert events == [], "one is left"
        asyncio.run(beside.__aexit__())
        while all(thread.is_alive() for thread in threads):
            threads[0].join(0.05)
        assert sum(thread.is_alive() for thread in threads) == 1, "one of them has the servers, and the other waits"
        resources.close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "who waits is told"


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

    def ask(serve, *arguments):
        try:
            serve(*arguments)
        except Exception as error:
            raised.append(error)

    monkeypatch.setattr(Resources, "weights", weights)
    monkeypatch.setattr("thinkimg.engine.server.server_command", command)
    with resources_of(tmp_path) as resources:
        threads = [
            threading.Thread(target=ask, args=(resources.servers, POLICY, None, SETTINGS, BASE)),
            threading.Thread(target=ask, args=(resources.teacher, POLICY, SETTINGS, BASE)),
        ]
        for thread in threads:
            thread.start()
        assert begun.wait(20)
        started = time.monotonic()
        resources.close()
        assert time.monotonic() - started < 8
        for thread in threads:
            thread.join(8)
            assert not thread.is_alive()
        kinds = {type(error) for error in raised}
        assert len(raised) == 2 and EngineError in kinds and kinds <= {EngineError, RuntimeError}, raised
        with pytest.raises(RuntimeError, match="closed"):
            resources.servers(POLICY, None, SETTINGS, BASE)
    assert not [pid for pid in descendants(os.getpid()) if b"sleep\x00600" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_the_teachers_model_is_merged_beside_the_one_that_the_engine_starts_with(tmp_path, monkeypatch):
    """An adapter's loop goes on with a later policy: the engine's merged model was removed before it was read."""
    merged = SimpleNamespace(export_merged=lambda policy, directory, base: directory.mkdir())
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "thinkimg.trainer.checkpoint", merged)
    monkeypatch.setattr(BaseSource, "entry", lambda self, policy: {"directory": "d"})
    monkeypatch.setattr("thinkimg.resources.Base", lambda **_: None)

    def adapter(digest: str):
        return SimpleNamespace(digest=digest, is_full=False, directory=tmp_path)

    with resources_of(tmp_path) as resources:
        resources._frozen = "first"
        later = resources.weights(adapter("later"), BASE)
        first = resources.weights(adapter("first"), BASE)
        assert later.is_dir() and first.is_dir()
        assert resources.weights(adapter("latest"), BASE).is_dir() and first.is_dir() and not later.exists()


def test_a_scratch_folder_is_one_whoever_asks_first(tmp_path):
    """One thread that holds the lock, as for a merged model, and one that has just begun to ask."""
    with resources_of(tmp_path) as resources:
        asked, found = threading.Event(), []

        def ask():
            asked.set()
            found.append(resources.scratch)

        with resources._lock:
            thread = threading.Thread(target=ask)
            thread.start()
            assert asked.wait(20)
            time.sleep(0.1)
            found.append(resources.scratch)
        thread.join(20)
        assert not thread.is_alive() and found[0] == found[1]
