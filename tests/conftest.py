"""Fixtures that are dear to make and so are made once: tiny models, and one vLLM server for all tests that need one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# An example's time says nothing where other work takes the cores.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

# A shell's `pytest &` has SIGINT ignored, in all that it starts: nothing could be interrupted, here or in a child.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> tuple[Path, Path]:
    """Directories of two Qwen2.5-VL of half a million parameters that differ in their random weights only."""
    from chat_codecs import CORPUS

    from thinkimg.models.settings import TinyModel
    from thinkimg.models.tiny import create_tiny

    tiny = TinyModel(
        vocab_size=512, hidden_size=128, layers=2, heads=2, vision_layers=2, vision_hidden_size=64, vision_heads=2
    )
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        create_tiny(root / str(seed), tiny, CORPUS, seed=seed)
    return root / "0", root / "1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy and rollouts for tests of the trainer (grpo_world.py), on one thread.

    Results are bit-equal at a fixed number.
    """
    import torch
    from grpo_world import World

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield World(tmp_path_factory.mktemp("world"))
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def media_dir(tmp_path_factory) -> Path:
    """The folder from which the server of `engine` reads images."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The stages by name, each on recorded outputs of those before it (recorded_stages.py)."""
    from recorded_stages import recorded

    with recorded(tmp_path_factory.mktemp("stages")) as stages:
        yield stages


@pytest.fixture
def fakes(monkeypatch):
    """fakes(*scripts): all engine servers started so far, which answer with these statuses (fake_engine.py)."""
    from fake_engine import FakeServer

    monkeypatch.setattr("thinkimg.engine.client.BACKOFF_S", 0.01)
    started = []

    def start(*scripts):
        started.extend(FakeServer(script) for script in scripts)
        return started

    yield start
    for fake in started:
        fake.close()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """An empty MLflow database: to make one takes 10 s, to copy it nothing."""
    from thinkimg.tracking.connection import load_mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    load_mlflow().MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


# The server's parent is a process of its own, so that the last thing we do to it can be the worst.
KEEPER = """
import json, os, sys, time
from pathlib import Path
os.environ |= json.loads(sys.argv[4])
from thinkimg.engine.server import Server, ServerSettings
from thinkimg.engine.settings import EngineConfig, EngineSettings
model, log, media = map(Path, sys.argv[1:4])
limits = EngineSettings(dtype="float32", max_tokens=2048, max_images=16, max_pixels=10**6)
settings = ServerSettings(limits, EngineConfig(cpu_kvcache_gib=1, max_num_seqs=64), media_dir=media)
server = Server(model, log_path=log, version="v0", settings=settings)
server.start()
print(server.url, flush=True)
time.sleep(1e6)
"""


@pytest.fixture(scope="session")
def engine(tiny_models, media_dir, tmp_path_factory):
    """A running vLLM server (`.url`, below `.pid`) with the first tiny model, version "v0"; who loads other weights
    loads these again.

    Everything about its start is hostile: variables, the working directory's modules, the length of TMPDIR. What it and
    its processes connect to is in `.addresses`.

    At the end its parent gets SIGKILL, and everything that descends from that has to be gone within seconds: without
    the watchdog VLLM::EngineCore is what stays alive.
    """
    from hostile import GOOD, HOSTILE, deep_folder, record_addresses, shadow
    from processes import title

    from thinkimg.watchdog import descendants

    place = tmp_path_factory.mktemp("engine")
    addresses = place / "addresses"
    variables = HOSTILE | GOOD | record_addresses(addresses) | {"TMPDIR": str(deep_folder(place))}
    argv = [sys.executable, "-P", "-c", KEEPER, str(tiny_models[0]), str(place / "engine.log"), str(media_dir)]
    with subprocess.Popen(
        [*argv, json.dumps(variables)], cwd=shadow(place / "folder"), stdout=subprocess.PIPE, text=True
    ) as keeper:
        try:
            url = keeper.stdout.readline().strip()
            assert url, "the server did not start: see the captured stderr"
            family = descendants(keeper.pid)
            titles = [title(pid) for pid in family]
            assert any("EngineCore" in name for name in titles), titles
            yield SimpleNamespace(url=url, pid=keeper.pid, addresses=addresses)
        finally:
            keeper.kill()
    deadline = time.monotonic() + 10
    while survivors := [name for pid, name in zip(family, titles, strict=True) if title(pid)]:
        assert time.monotonic() < deadline, f"these outlived their parent: {survivors}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def family_engines(tmp_path_factory):
    """A vLLM server for each family but the default, by name (served_families.py), with the first of two tiny models,
    version "v0"; who loads other weights loads these again. They end with the module: each takes 3 GB.
    """
    from served_families import serve

    with serve(tmp_path_factory.mktemp("families")) as engines:
        yield engines


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A local Hub (hub_server.py) that this process asks, with an empty cache."""
    from hub_server import HubServer, ask_locally

    from thinkimg import hub

    started = HubServer()
    ask_locally(monkeypatch, started, tmp_path / "cache")
    hub._resolve.cache_clear()
    yield started
    started.close()
    hub._resolve.cache_clear()
