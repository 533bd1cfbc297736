"""HTTP part of the endpoint: routes, limits, the key, and errors as JSON."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from aiohttp import web

from thinkimg.environment import is_loopback
from thinkimg.errors import shorten
from thinkimg.records import Turn
from thinkimg.serving.body import Question, read_body
from thinkimg.serving.page import PATHS, page_routes
from thinkimg.serving.refusal import Refusal, unavailable
from thinkimg.serving.reply import KEEP_ALIVE, Reply, event
from thinkimg.serving.service import Service

log = logging.getLogger(__name__)

MAX_BODY = 64 * 2**20
"""Bytes of a body."""
BODY_S = 60.0
"""Seconds in which a body must arrive."""
KEEP_ALIVE_S = 15.0
"""Seconds without a turn after which a stream shows that it lives."""
SERVICE = web.AppKey("service", Service)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Access:
    """Rules of the endpoint for its clients."""

    name: str = "policy"
    """Name of the model; with "-images" behind it, pictures of the turns come with the answer."""
    created: int = 0
    """Time at which the policy was made, in seconds since 1970."""
    key: str | None = None
    """Key that clients must send; None: none, and only names of this machine are taken as the endpoint's."""
    timeout_s: float = 600.0
    """Seconds for one request, its wait for the engine included."""
    concurrency: int = 256
    """Requests that are read and played at once; others wait unread."""
    page: bool = False
    """Serve the page at /."""

    @property
    def names(self) -> tuple[str, str]:
        """Names of the model."""
        return self.name, f"{self.name}-images"

    @property
    def public(self) -> set[str]:
        """Paths that need no key."""
        return {"/health", *(PATHS if self.page else ())}


def make_app(service: Service, access: Access) -> web.Application:
    """Return the application of the endpoint; its start connects to the engine, its end leaves it."""
    slots = asyncio.Semaphore(access.concurrency)

    async def complete(request: web.Request) -> web.StreamResponse:
        deadline = asyncio.get_running_loop().time() + access.timeout_s
        async with asyncio.timeout_at(deadline):
            await slots.acquire()
        try:
            question = read_body(await read_content(request), access.names)
            return await answer(request, service, question, deadline)
        finally:
            slots.release()

    async def models(request: web.Request) -> web.StreamResponse:
        entry = {"object": "model", "created": access.created, "owned_by": "thinkimg"}
        return web.json_response({"object": "list", "data": [{"id": name} | entry for name in access.names]})

    async def health(request: web.Request) -> web.StreamResponse:
        await service.keeper.check()
        return web.json_response({"status": "ok"})

    async def connect(app: web.Application):
        await service.keeper.open()
        yield
        await service.keeper.close()

    app = web.Application(client_max_size=MAX_BODY, middlewares=[answer_errors, guard(access)])
    app[SERVICE] = service
    app.cleanup_ctx.append(connect)
    app.add_routes(
        [
            web.post("/v1/chat/completions", complete),
            web.get("/v1/models", models),
            web.get("/health", health),
            *(page_routes() if access.page else ()),
        ]
    )
    return app


def run_app(service: Service, access: Access, address: tuple[str, int]) -> None:
    """Serve at (host, port) until the process is interrupted or terminated."""
    host, port = address
    # A handler is cancelled when its client is gone, and with it the request to the engine.
    web.run_app(make_app(service, access), host=host, port=port, access_log=None, print=None, handler_cancellation=True)


async def read_content(request: web.Request) -> bytes:
    """Return the body. Raises Refusal where it is no JSON or arrives too slowly, HTTPRequestEntityTooLarge."""
    if request.content_type != "application/json":  # a page in a browser can send others, and none, without being asked
        raise Refusal("The body must be JSON, with Content-Type: application/json.", status=415)
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise Refusal(f"The body did not arrive within {BODY_S:.0f} s.", status=408) from None
    except web.RequestPayloadError as error:
        raise Refusal(f"The body can't be read: {shorten(str(error))}.") from error


async def answer(request: web.Request, service: Service, question: Question, deadline: float) -> web.StreamResponse:
    """Play a question and send the reply, as JSON or as a stream. deadline: by the loop's clock."""
    if not service.keeper.ready:  # a stream has begun with status 200 before it asks
        raise unavailable()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout_at(deadline):
        reply = Reply(await service.prepare(question), question)
        if not question.stream:
            async with aclosing(service.play(reply.episode, question)) as turns:
                async for turn in turns:
                    await loop.run_in_executor(service.pool, reply.add, turn)
            return web.json_response(reply.completion())
    return await stream(request, service, reply, deadline)


async def stream(request: web.Request, service: Service, reply: Reply, deadline: float) -> web.StreamResponse:
    """Send the turns as they end, then the answer; an error after the start is an event."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(deadline), aclosing(service.play(reply.episode, reply.question)) as turns:
            await response.write(reply.chunk({"role": "assistant"}))
            async for turn in keep_alive(turns, response):
                await response.write(reply.chunk(await loop.run_in_executor(service.pool, reply.add, turn)))
            for chunk in reply.last_chunks():
                await response.write(chunk)
    except ConnectionError:  # the client is gone
        return response
    except Exception as error:
        await response.write(event(explain_error(error).body()))
    await response.write_eof()
    return response


async def keep_alive(turns: AsyncIterator[Turn], response: web.StreamResponse) -> AsyncIterator[Turn]:
    """Yield the turns; while the next one takes long, comments show that the stream lives."""
    pending = asyncio.ensure_future(anext(turns, None))
    try:
        while True:
            if not (await asyncio.wait([pending], timeout=KEEP_ALIVE_S))[0]:
                await response.write(KEEP_ALIVE)
                continue
            if (turn := pending.result()) is None:
                return
            yield turn
            pending = asyncio.ensure_future(anext(turns, None))
    finally:
        pending.cancel()
        await asyncio.wait([pending])


def guard(access: Access):
    """Return the middleware that lets in whoever has the key, or, without one, whoever means this machine."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if access.key is not None and request.path not in access.public:
            given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {access.key}".encode()):
                raise Refusal("The API key is missing or wrong.", status=401, code="invalid_api_key")
        # A page in a browser can have its own host's name lead to this machine.
        host = request.headers.get("Host", "")
        if access.key is None and not is_loopback(host if host.endswith("]") else host.rpartition(":")[0] or host):
            raise Refusal("Without a key only localhost is served.", status=403)
        return await handler(request)

    return check


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with OpenAI's error bodies, whatever went wrong."""
    try:
        return await handler(request)
    except Exception as error:
        refusal = explain_error(error)
    headers = {"Retry-After": "5"} if refusal.status == 503 else None
    return web.json_response(refusal.body(), status=refusal.status, headers=headers)


def explain_error(error: Exception) -> Refusal:
    """Return the refusal for an error; one that nobody expected is logged."""
    match error:
        case Refusal():
            return error
        case TimeoutError():
            return Refusal("The request took too long.", status=504, code="timeout")
        case web.HTTPRequestEntityTooLarge():
            return Refusal(f"The body has more than {MAX_BODY // 2**20} MiB.", status=413)
        case web.HTTPException():
            return Refusal(f"{error.reason}.", status=error.status)
    log.error("a request failed", exc_info=error)
    return Refusal("The server failed; its log says why.", status=500)
