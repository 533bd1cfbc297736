"""An engine's answers that are none: the request is sent again, and then it is one sentence."""

import asyncio

import pytest
from fake_engine import PLAIN, image
from scripted_engine import ScriptedEngine

from thinkimg.engine import client
from thinkimg.engine.client import EngineClient, EngineUnavailable


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.0)
    server = ScriptedEngine()
    server.turns[PLAIN.seed] = [5], [1]
    yield server
    server.close()


async def generate(url):
    async with EngineClient([url], media="data") as asked:
        return await asked.generate([5], [image(0)], PLAIN)


@pytest.mark.parametrize("fault", ["garbage", "page", "empty", "abort", "reset"])
def test_an_answer_that_is_none_is_asked_for_again_and_then_a_sentence(engine, fault):
    engine.begin(lambda number: fault if number < 3 else None)
    assert asyncio.run(generate(engine.url)).token_ids == [1] and engine.count == 4
    engine.begin(lambda number: fault)
    with pytest.raises(EngineUnavailable, match=f"^{engine.url}.*\nHint: "):
        asyncio.run(generate(engine.url))
    assert engine.count == 4


@pytest.mark.parametrize("fault", ["garbage", "page", "empty"])
def test_so_is_what_it_says_of_its_weights(engine, fault):
    async def versions():
        async with EngineClient([engine.url], media="data") as asked:
            return await asked.versions()

    engine.begin(lambda number: fault)
    with pytest.raises(EngineUnavailable, match="can't be read"):
        asyncio.run(versions())


def test_no_message_has_the_password_of_an_address(monkeypatch, caplog):
    """Neither what is raised, which goes into rows and logs, nor what is logged of a server that is left out."""
    monkeypatch.setattr(client, "BACKOFF_S", 0.0)
    urls = ["http://user:s3cret@127.0.0.1:1", "http://user:s3cret@127.0.0.1:2"]

    async def ask(method):
        async with EngineClient(urls, media="data") as asked:
            await method(asked)

    for method in (lambda asked: asked.generate([5], [], PLAIN), EngineClient.versions, EngineClient.leave_out_dead):
        with pytest.raises(EngineUnavailable, match=r"http://user:\*\*\*@127.0.0.1:") as caught:
            asyncio.run(ask(method))
        assert "s3cret" not in str(caught.value) + caught.value.message
    assert "is left out" in caplog.text and "s3cret" not in caplog.text
