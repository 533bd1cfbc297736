"""A key goes to the host that it was named for, and to no other: every client, with keys of all kinds in the shell."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from fake_engine import PLAIN
from hostile import CANARY, KEYS

from thinkimg.config.load import load_config
from thinkimg.crash import render_report
from thinkimg.data.pictures.urls import UrlReader
from thinkimg.data.refusal import RowRefused
from thinkimg.engine.client import EngineClient
from thinkimg.engine.settings import TeacherEndpoint
from thinkimg.rewards.endpoint import connect

OWN = "own-4711"
"""Stands for the key that was named for a host."""


class Recorder:
    """Server that notes all that it is sent, and answers 404, or with a redirect."""

    def __init__(self, redirect: str | None = None):
        self.requests: list[str] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                requests.append(f"{self.command} {self.path} {dict(self.headers)} {body!r}")
                self.send_response(307 if redirect else 404)
                if redirect:
                    self.send_header("Location", redirect + self.path)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_HEAD = do_GET

            def log_message(self, *_):
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def keys(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OWN_KEY", OWN)


def ask_engine(url: str) -> None:
    async def ask():
        async with EngineClient([url], media="data") as client:
            await client.generate([5], [], PLAIN)

    asyncio.run(ask())


def ask_teacher(url: str) -> None:
    async def ask():
        async with connect(f"{url}/v1", TeacherEndpoint(url=f"{url}/v1", api_key_env="OWN_KEY", retries=0)) as client:
            await client.models.list()

    asyncio.run(ask())


def read_image(url: str) -> None:
    UrlReader({"127.0.0.1"}, 1000).read(f"{url}/image.png")


HUB = "from huggingface_hub import snapshot_download; snapshot_download('somebody/something')"


def ask_hub(url: str) -> None:
    environment = os.environ | {"HF_ENDPOINT": url, "HF_TOKEN": OWN, "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, timeout=60)


CLIENTS = {ask_engine: False, read_image: False, ask_teacher: True, ask_hub: True}
"""Client -> whether a key was named for its host."""


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_sends_the_key_that_was_named_for_its_host_and_no_other(client, keys, monkeypatch):
    monkeypatch.setattr("thinkimg.engine.client.BACKOFF_S", 0.01)
    with Recorder() as other, Recorder(redirect=other.url) as asked:
        with contextlib.suppress(Exception):  # both answer nonsense
            client(asked.url)
        assert asked.requests and CANARY not in str(asked.requests + other.requests)
        assert (OWN in str(asked.requests)) == CLIENTS[client]
        assert OWN not in str(other.requests)


def test_prefects_own_server_is_sent_no_key_of_another(keys, monkeypatch):
    """Nor does it let in everybody of this machine: each has a password of its own."""
    from flows import _server

    servers = []

    def spawn(argv, env, **_):
        servers.append(env)
        return SimpleNamespace(alive=True, terminate=lambda **_: None)

    monkeypatch.setattr(_server, "spawn", spawn)
    monkeypatch.setattr(_server, "is_healthy", lambda url: True)
    reached = [_server._launch(port, 1.0) for port in (1, 2)]
    assert CANARY not in str(reached + servers)
    for client, server in zip(reached, servers, strict=True):
        assert client.keys() >= {"PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_CLIENT_CUSTOM_HEADERS"}
        assert client["PREFECT_API_AUTH_STRING"] == server["PREFECT_SERVER_API_AUTH_STRING"]
        assert client["PREFECT_API_URL"].startswith("http://127.0.0.1:")
    assert reached[0]["PREFECT_API_AUTH_STRING"] != reached[1]["PREFECT_API_AUTH_STRING"]


def test_reports_and_manifests_have_no_key(keys):
    assert CANARY not in render_report(RuntimeError("broken"))
    secret = f"https://bob:{CANARY}@db.example.org/v1"
    settings = [f"where.teacher.url={secret}", f"where.engine.urls=[{secret}]", f"where.tracking.uri={secret}"]
    shown = load_config("tiny", settings).where.public()
    assert CANARY not in json.dumps(shown) and "db.example.org" in json.dumps(shown)


def test_an_image_is_read_or_refused(keys):
    with Recorder() as server, pytest.raises(RowRefused, match="404"):
        read_image(server.url)
