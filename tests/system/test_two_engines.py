"""engine.urls: rollouts against two real servers, one of which dies in the middle."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from single_stage import build_stage

from thinkimg.config.load import load_config
from thinkimg.engine.client import EngineClient
from thinkimg.engine.server import Server, ServerSettings, is_healthy
from thinkimg.engine.settings import EngineConfig, EngineSettings
from thinkimg.process import free_port, spawn
from thinkimg.records import StopReason
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import rollout
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store
from thinkimg.watchdog import descendants

pytestmark = pytest.mark.long

SETTINGS = [
    "data.train=24", "data.held_out=4", "warmstart.steps=2", "warmstart.batch=8", "rollout.samples=24",
    "rollout.group_size=4",
    "conversation.max_turns=3", "conversation.max_turn_tokens=32", "where.engine.concurrency=16",
    "where.tracking.enabled=false",
    "image.types=[]", "warmstart.pairs=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("engines"))
    config = load_config("tiny", [*SETTINGS, f"where.store={store.root}"])
    with Resources(config.where) as resources:
        builder = Builder(config, store, resources)
        dataset = builder.make(prepare)
        policy = builder.make(warmstart, dataset=dataset)
    return store, dataset, policy


@pytest.fixture(scope="module")
def servers(made, tmp_path_factory):
    """Two servers on a core each; they hold the policy under a version of their own, so that it is loaded first."""
    _, _, policy = made
    logs = tmp_path_factory.mktemp("logs")
    limits = EngineSettings(dtype="float32", max_tokens=1024, max_images=16, max_pixels=10**6)
    started = []
    for core in (0, 1):
        engine = EngineConfig(cpu_kvcache_gib=1, max_num_seqs=16, cpu_threads_bind=str(core))
        started.append(
            Server(
                policy.checked("policy/model"), log_path=logs / f"{core}.log", version="other",
                settings=ServerSettings(limits, engine), name=f"engine-{core}",
            )
        )  # fmt: skip
    starts = [threading.Thread(target=server.start) for server in started]
    try:
        for thread in starts:
            thread.start()
        for thread in starts:
            thread.join()
        assert all(server.alive for server in started)
        yield started
    finally:
        for server in started:
            server.stop()


def kill(server: Server) -> None:
    """SIGKILL to the server and all its processes at once, as the kernel does when memory runs out."""
    for pid in [*descendants(server._child.pid), server._child.pid]:
        os.kill(pid, signal.SIGKILL)


def play(made, servers, progress=lambda done, total: None, **settings):
    store, dataset, policy = made
    urls = "[" + ", ".join(server.url for server in servers) + "]"
    extra = [f"{name}={value}" for name, value in settings.items()]
    config = load_config("tiny", [*SETTINGS, f"where.store={store.root}", f"where.engine.urls={urls}", *extra])
    return build_stage(rollout, config, store, dataset=dataset, policy=policy, force=True, progress=progress)[0]


def rows(artifact):
    return artifact.table("trajectories").to_pylist()


@pytest.fixture(scope="module")
def whole(made, servers):
    """Rollouts that nothing disturbed."""
    return play(made, servers)


def test_a_server_started_by_hand_plays_the_same(made, whole, tmp_path):
    store, _, policy = made
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "thinkimg",
        "serve",
        "--preset",
        "tiny",
        "--policy",
        policy.fingerprint[:12],
        "--port",
        port,
    ]
    settings = [f"where.store={store.root}", "where.engine={cpu_kvcache_gib: 1, max_num_seqs: 16}"]
    options = [part for setting in settings for part in ("--set", setting)]
    with spawn([*command, *options], name="served", log_path=tmp_path / "served.log") as served:
        deadline = time.monotonic() + 300
        while not is_healthy(f"http://127.0.0.1:{port}/health"):
            assert served.alive and time.monotonic() < deadline, served.log_tail()
            time.sleep(0.5)
        assert play(made, [SimpleNamespace(url=f"http://127.0.0.1:{port}")]).digest == whole.digest


def test_a_server_that_dies_is_replaced_without_losing_a_trajectory(made, servers, whole, caplog):
    served = [Path(server.log_path).read_text() for server in servers]
    assert all("other" not in row["weights"] for row in rows(whole))
    killed = threading.Event()

    def progress(done, total):
        if done >= total // 4 and not killed.is_set():
            killed.set()
            kill(servers[0])

    survived = play(made, servers, progress)
    assert killed.is_set() and not servers[0].alive and servers[1].alive, served
    assert [row["stop"] for row in rows(survived)].count(StopReason.FAILED) == 0
    identities = [(row["policy"], row["sample_id"], row["index"]) for row in rows(survived)]
    assert len(identities) == len(set(identities)) == 24 * 4
    assert survived.digest == whole.digest  # seeds by turn: whoever serves it samples the same
    assert caplog.text.count(f"the server {servers[0].url} is left out") == 1


def test_the_next_stage_goes_on_with_those_that_answer(made, servers, caplog):
    assert not servers[0].alive
    again = play(made, servers, **{"rollout.samples": 4})
    assert len(rows(again)) == 16 and all(row["stop"] != StopReason.FAILED for row in rows(again))
    assert f"the server {servers[0].url} is left out" in caplog.text


def test_the_loops_own_two_servers_play_as_one_does(made, whole, monkeypatch):
    """One on each core, behind one client: the same tokens, and both play."""
    store, dataset, policy = made
    binds, asked, request = set(), set(), EngineClient._request

    async def record(self, url, method, path, *rest):
        if path.endswith("/generate"):
            asked.add(url)
        return await request(self, url, method, path, *rest)

    def progress(done, total):
        for pid in descendants(os.getpid()):
            with suppress(OSError):  # it ended meanwhile
                parts = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                variables = dict(part.partition("=")[::2] for part in parts)
                if "VLLM_SERVER_DEV_MODE" in variables:
                    binds.add(variables.get("VLLM_CPU_OMP_THREADS_BIND"))

    monkeypatch.setattr(EngineClient, "_request", record)
    engine = "where.engine={cpu_threads_bind: '0|1', cpu_kvcache_gib: 1, max_num_seqs: 16, concurrency: 16}"
    config = load_config("tiny", [*SETTINGS, f"where.store={store.root}", engine])
    rollouts = build_stage(rollout, config, store, dataset=dataset, policy=policy, force=True, progress=progress)[0]
    assert binds >= {"0", "1"} and len(asked) == 2
    assert rollouts.digest == whole.digest
