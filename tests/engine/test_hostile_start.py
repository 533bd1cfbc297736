"""An engine that was started in a hostile shell (conftest.py): it answers its own client, and talks to this machine."""

import asyncio
import os
from pathlib import Path

from fake_engine import PLAIN
from hostile import CANARY, HOSTILE, read_addresses
from processes import title

from thinkimg.engine.client import EngineClient
from thinkimg.environment import is_healthy, is_loopback
from thinkimg.process import SOCKET_NAME, SOCKET_PATH
from thinkimg.watchdog import descendants


def variables(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_it_answers(engine, monkeypatch):
    monkeypatch.setenv("http_proxy", HOSTILE["http_proxy"])
    assert is_healthy(f"{engine.url}/health")

    async def ask():
        async with EngineClient([engine.url], media="data") as client:
            return await client.generate([5], [], PLAIN)

    assert asyncio.run(ask()).token_ids


def test_nothing_hostile_has_reached_its_processes(engine):
    servers = [pid for pid in descendants(engine.pid) if "thinkimg.engine" in title(pid) or "VLLM" in title(pid)]
    assert len(servers) >= 2
    for pid in servers:
        if made := variables(pid):
            assert CANARY not in str(made), title(pid)
            assert {name for name in HOSTILE if made.get(name) == HOSTILE[name]} <= {"CUDA_VISIBLE_DEVICES"}


def test_its_sockets_fit_though_tmpdir_is_long(engine):
    server = next(pid for pid in descendants(engine.pid) if title(pid).split()[1:3] == ["-m", "thinkimg.engine.serve"])
    temporary = variables(server)["TMPDIR"]
    assert len(temporary) + SOCKET_NAME <= SOCKET_PATH and os.stat(temporary).st_mode & 0o77 == 0


def test_it_talks_to_this_machine_alone(engine):
    seen = read_addresses(engine.addresses)
    assert ("bind", "127.0.0.1") in seen
    assert not [(call, host) for call, host in seen if not is_loopback(host)], seen
