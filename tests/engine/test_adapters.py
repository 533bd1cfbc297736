"""Adapters by the engine's interface: what the server says that it used counts, and what it lost is loaded again."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import PLAIN, image, send_json

from thinkimg.config.load import load_config
from thinkimg.engine import client as module
from thinkimg.engine.client import EngineClient, EngineUnavailable
from thinkimg.resources import Resources

ANSWER = {
    "choices": [{"token_ids": [1], "logprobs": {"content": [{"logprob": -1.0}]}, "finish_reason": "length",
                 "weight_versions": [{"version": "base"}]}],
    "prompt_token_ids": [5],
}  # fmt: skip


class AdapterServer:
    """Serves adapters as vLLM does: by name, until it is started again.

    takes: it has --enable-lora. plays: name of what it samples from, whatever is asked; None: what is asked.
    """

    def __init__(self, takes: bool = True, plays: str | None = None):
        server, self.loaded, self.loads, self.plays = self, set(), 0, plays

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer(200, {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/load_lora_adapter":
                    self.load(body)
                elif (name := body.get("model")) is not None and name not in server.loaded:
                    self.answer(404, {"error": {"message": f"The model `{name}` does not exist."}})
                else:
                    self.answer(200, ANSWER | {"model": server.plays or name or "policy"})

            def load(self, body):
                if not takes:
                    self.answer(404, {"detail": "Not Found"})
                elif "lora_name" not in body:
                    self.answer(422, {"detail": "lora_name is missing"})
                else:
                    server.loads += 1
                    server.loaded.add(body["lora_name"])
                    self.answer(200, {})

            answer = send_json

            def log_message(self, *_):
                """Silent."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 0.001)


def test_a_server_that_was_started_again_gets_its_adapter_again():
    servers = [AdapterServer(), AdapterServer()]

    async def run():
        async with EngineClient([server.url for server in servers], media="data") as client:
            await client.load_adapter("v7", Path("adapter"))
            found = []
            for number in range(30):
                if number % 10 == 5:
                    servers[number % 2].loaded.clear()  # it was started again
                found.append(await client.generate([5], [image(number)], PLAIN))
            return found

    found = asyncio.run(run())
    assert {one.weight_version for one in found} == {"v7"} and len(found) == 30
    assert [server.loads for server in servers][0] + servers[1].loads > 2


@pytest.mark.parametrize("plays", ["base", "v6", None])
def test_what_the_server_says_that_it_used_counts(plays):
    server = AdapterServer(plays=plays)

    async def run():
        async with EngineClient([server.url], media="data") as client:
            await client.load_adapter("v7", Path("adapter"))
            return await client.generate([5], [image(0)], PLAIN)

    if plays is None:
        assert asyncio.run(run()).weight_version == "v7"
        return
    with pytest.raises(EngineUnavailable, match=f"played {plays} and not v7"):
        asyncio.run(run())


def test_a_server_that_does_not_apply_an_adapter_is_refused_as_it_is_loaded():
    """Also if it is one of several, and before any conversation."""
    servers = [AdapterServer(), AdapterServer(plays="base")]

    async def run():
        async with EngineClient([server.url for server in servers], media="data") as client:
            await client.load_adapter("v7", Path("adapter"))

    with pytest.raises(EngineUnavailable, match="played base and not v7"):
        asyncio.run(run())


def test_a_server_that_takes_none_is_unavailable_and_no_row_fails_for_it():
    server = AdapterServer(takes=False)

    async def run():
        async with EngineClient([server.url], media="data") as client:
            await client.load_adapter("v7", Path("adapter"))

    with pytest.raises(EngineUnavailable) as caught:
        asyncio.run(run())
    assert "--enable-lora" in str(caught.value)


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("adapters", ["auto", "always", "never"])
@pytest.mark.parametrize("servers", [(), (True,), (False,), (True, False)])
def test_who_serves_adapters_is_asked_the_servers_and_not_this_machine(servers, adapters, cpu, monkeypatch, tmp_path):
    """servers: whether each of where.engine.urls takes them; none: our own."""
    monkeypatch.setattr("thinkimg.closure.on_cpu", lambda: cpu)
    urls = [AdapterServer(takes).url for takes in servers]
    settings = [f"where.store={tmp_path}", f"where.engine.adapters={adapters}", f"where.engine.urls={json.dumps(urls)}"]
    resources = SimpleNamespace(where=load_config("tiny", settings).where)
    expected = {"always": True, "never": False, "auto": all(servers) if servers else not cpu}[adapters]
    assert asyncio.run(Resources._serves_adapters(resources)) == expected
