"""Keeper of the engine: one client for all requests, opened again by itself when no server answers."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from thinkimg.engine.client import EngineClient, EngineUnavailable
from thinkimg.engine.errors import EngineError
from thinkimg.errors import shorten
from thinkimg.serving.refusal import unavailable

log = logging.getLogger(__name__)

RETRY_S = 2.0  # between attempts to open the engine again
CHECK_S = 20.0  # in which an engine answers, or is not well


class EngineKeeper:
    """Keeper of the engine that holds the policy.

    connect: returns a new client; it may start a server that has ended, and raises where that is impossible now.
    """

    def __init__(self, connect: Callable[[], Awaitable[EngineClient]]) -> None:
        self._connect = connect
        self._client: EngineClient | None = None
        self._users: Counter[EngineClient] = Counter()
        self._opening: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """True unless the engine is known to be gone."""
        return self._client is not None

    async def open(self) -> None:
        """Connect for the first time. Raises what `connect` raises."""
        self._client = await self._connect()

    async def close(self) -> None:
        """Leave the engine; nothing is connected from then on."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        for client in {self._client, *self._users} - {None}:
            await client.__aexit__()
        self._client = None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[EngineClient]:
        """Yield the client. Raises Refusal (503) where the engine is gone, and connects again."""
        client = self._client
        if client is None:
            raise unavailable()
        self._users[client] += 1
        try:
            yield client
        except EngineUnavailable as error:
            self._lose(client, error)
            raise unavailable() from error
        finally:
            self._users[client] -= 1
            if not self._users[client]:
                del self._users[client]
                if client is not self._client:  # others had used it when it was given up
                    await client.__aexit__()

    async def check(self) -> None:
        """Ask the engine for its weights. Raises Refusal (503) where it can't be reached, and connects again.

        Several servers are not asked: the client leaves out those that are gone, and requests go on.
        """
        async with self.use() as client:
            if len(client.urls) == 1:
                try:
                    async with asyncio.timeout(CHECK_S):
                        await client.versions()
                except TimeoutError:  # requests find out by themselves whether it is gone
                    raise unavailable() from None

    def _lose(self, client: EngineClient, error: EngineError) -> None:
        if client is self._client:
            log.warning("the engine is gone: %s", shorten(error.message))
            self._client = None
            self._opening = asyncio.create_task(self._open_again())

    async def _open_again(self) -> None:
        while True:
            try:
                self._client = await self._connect()
            except Exception as error:  # whatever it is, without another attempt there would be none for ever
                log.warning("the engine is not back yet: %s: %s", type(error).__name__, shorten(str(error)))
                await asyncio.sleep(RETRY_S)
            else:
                log.warning("the engine is back")
                return
