"""Keeper of the engine: requests go on with whoever answers, and no client stays open."""

import asyncio

import pytest
from chat_server import ScriptedClient

from thinkimg.engine.client import EngineUnavailable
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.refusal import Refusal


async def opened() -> tuple[EngineKeeper, list[ScriptedClient]]:
    """A keeper that is connected, and all clients that it has made so far."""
    clients = []

    async def connect():
        clients.append(ScriptedClient())
        return clients[-1]

    keeper = EngineKeeper(connect)
    await keeper.open()
    return keeper, clients


def test_a_keeper_leaves_no_client_open():
    """Also where a request still uses one that was given up."""

    async def run() -> None:
        keeper, clients = await opened()
        with pytest.raises(Refusal):
            async with keeper.use(), keeper.use():
                raise EngineUnavailable("gone")
        await asyncio.sleep(0.01)
        assert keeper.ready and [client.closed for client in clients] == [1, 0]
        async with keeper.use() as client:
            assert client is clients[1]
        await keeper.close()
        assert [client.closed for client in clients] == [1, 1]
        with pytest.raises(Refusal):
            async with keeper.use():
                raise AssertionError("closed")

    asyncio.run(run())


def test_a_keeper_tries_again_whatever_went_wrong(monkeypatch):
    """Else an endpoint would answer 503 for ever."""
    monkeypatch.setattr("thinkimg.serving.keeper.RETRY_S", 0.0)
    failures = [EngineUnavailable("gone"), RuntimeError("no memory"), KeyError("weights"), OSError("no port")]

    async def run() -> None:
        keeper, clients = await opened()
        connect = keeper._connect

        async def fail_first():
            if failures:
                raise failures.pop()
            return await connect()

        keeper._connect = fail_first
        with pytest.raises(Refusal):
            async with keeper.use():
                raise EngineUnavailable("gone")
        async with asyncio.timeout(5):
            while not keeper.ready:
                await asyncio.sleep(0.001)
        await keeper.close()
        assert not failures and len(clients) == 2

    asyncio.run(run())


def test_an_engine_that_hangs_is_not_well(monkeypatch):
    """A look at the health has an end; whether the engine is gone its requests find out."""
    monkeypatch.setattr("thinkimg.serving.keeper.CHECK_S", 0.05)

    async def run() -> None:
        keeper, (client,) = await opened()
        client.versions = asyncio.Event().wait
        with pytest.raises(Refusal, match="does not answer"):
            await asyncio.wait_for(keeper.check(), 5)
        assert keeper.ready and not client.closed
        await keeper.close()

    asyncio.run(run())


def test_while_one_server_of_several_is_gone_requests_go_on():
    """The client leaves it out by itself; a look at the health takes nothing away from the others."""

    async def run() -> None:
        keeper, clients = await opened()
        clients[0].urls, clients[0].gone = ("one", "other"), True
        await keeper.check()
        clients[0].urls = ("one",)
        with pytest.raises(Refusal):
            await keeper.check()
        assert clients[0].closed == 1
        await asyncio.sleep(0.01)
        await keeper.check()
        await keeper.close()
        assert [client.closed for client in clients] == [1, 1]

    asyncio.run(run())
