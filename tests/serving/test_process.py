"""The command itself, as a process, with an engine elsewhere: it says where it serves, and leaves on a signal."""

import signal
import subprocess
import sys
import threading

import httpx
import pytest
from paths import SUPPORT
from scripted_engine import ScriptedEngine

from thinkimg.process import free_port

STORE = SUPPORT / "golden" / "store_v1"


@pytest.fixture
def engine():
    engine = ScriptedEngine()
    yield engine
    engine.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(engine, tmp_path, monkeypatch, number):
    monkeypatch.setenv("CHAT_KEY", "s3cret")
    port, key = free_port(), {"Authorization": "Bearer s3cret"}
    command = [sys.executable, "-m", "thinkimg", "chat", "--preset", "tiny", "--policy", "569f", "--port", str(port)]
    settings = [f"where.store={STORE}", f"where.engine.urls=[{engine.url}]", "where.engine.adapters=never"]
    options = [part for setting in settings for part in ("--set", setting)]
    with subprocess.Popen(
        [*command, *options, "--api-key-env", "CHAT_KEY"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as served:
        watchdog = threading.Timer(120, served.kill)
        watchdog.start()
        try:
            lines = []
            while not lines or f"http://127.0.0.1:{port}/v1 serves policy" not in lines[-1]:
                lines.append(served.stderr.readline())
                assert lines[-1], lines
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=10)) as http:
                assert http.get("/health").status_code == 200
                assert http.get("/v1/models").status_code == 401
                model = http.get("/v1/models", headers=key).json()["data"][0]
                assert model["id"] == "policy" and model["created"] > 1_700_000_000
                body = {"model": "policy", "messages": [{"role": "user", "content": "q"}]}
                lost = http.post("/v1/chat/completions", json=body, headers=key, timeout=60)
                assert (lost.status_code, lost.json()["error"]["code"]) == (503, "engine_unavailable")
            served.send_signal(number)
            assert served.wait(30) == 0
            assert "Traceback" not in served.stderr.read()
        finally:
            watchdog.cancel()
            served.kill()
