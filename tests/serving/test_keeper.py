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
