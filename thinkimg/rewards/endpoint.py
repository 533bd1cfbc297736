"""Endpoint of a larger model: the connection, which sends a key to its host alone, and questions with their failures.

judges/teacher, sentences ──► connect, Asker ──► where.teacher.url
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx

from thinkimg.engine.errors import REFUSED
from thinkimg.engine.settings import TeacherEndpoint
from thinkimg.errors import UserError, shorten
from thinkimg.http_clients import make_client
from thinkimg.keys import read_key
from thinkimg.redaction import without_secrets
from thinkimg.rewards.judgement import Judgement

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion as ChatCompletion

log = logging.getLogger(__name__)

PROBE_S = 5.0
HEADERS = ("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent")
OPENAI_KEY = "OPENAI_API_KEY"
OPENAI_HEADERS = ("openai-organization", "openai-project")
LOCKED = (401, 403)
UNREADABLE = (LookupError, ValueError, TypeError, AttributeError)  # what an answer of another form raises
T = TypeVar("T")


def connect(url: str, where: TeacherEndpoint) -> "AsyncOpenAI":
    """Return a client that sends the key of `where` to the host of `url`, and nothing else of the user's environment.

    openai takes keys, organisation, project and further headers from the environment, for any host. So each request
    keeps only the headers in HEADERS and, at the host of `url`, its key or the name and password in `url`. Organisation
    and project are kept where the host is OpenAI's own. Raises UserError as api_key and make_client.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    key, origin = api_key(where), httpx.URL(url)

    async def only_ours(request: httpx.Request) -> None:
        at_home = (request.url.scheme, request.url.netloc) == (origin.scheme, origin.netloc)
        allowed = set(HEADERS)
        if at_home and is_openai(url):
            allowed |= set(OPENAI_HEADERS)
        if at_home and origin.userinfo:
            allowed.add("authorization")
        for name in [name for name in request.headers if name not in allowed]:
            del request.headers[name]
        if at_home and key:
            request.headers["authorization"] = f"Bearer {key}"

    hooks = {"request": [only_ours]}
    http = make_client(DefaultAsyncHttpxClient, origin.host, event_hooks=hooks, timeout=where.timeout_s)
    return AsyncOpenAI(
        base_url=url, api_key="unused", timeout=where.timeout_s, max_retries=where.retries, http_client=http
    )


def api_key(where: TeacherEndpoint) -> str | None:
    """Return the key for `where.url`, from the variable where.api_key_env; by default OPENAI_API_KEY for OpenAI alone.

    Raises UserError as `read_key`.
    """
    if where.url is None:  # our own server
        return None
    variable = where.api_key_env or (OPENAI_KEY if is_openai(where.url) else None)
    if variable is None:
        return None
    key = read_key(variable)
    log.info("the key in %s is sent to %s", variable, urlsplit(where.url).hostname)
    return key


def is_openai(url: str) -> bool:
    """Tell whether a URL is that of OpenAI's own API, encrypted."""
    parts = urlsplit(url)
    return (parts.scheme, parts.hostname, parts.port or 443) == ("https", "api.openai.com", 443)


def describe(error: object) -> str:
    """Return a failure's text for logs and for the scores, in one line and without keys."""
    return shorten(without_secrets(str(error)))


class Asker:
    """Client that asks one model; once the endpoint is gone, every further question is unanswered at once."""

    def __init__(self, client: "AsyncOpenAI", model: str, slots: asyncio.Semaphore):
        self.client, self.model, self.slots = client, model, slots
        self.gone: str | None = None

    async def judge(self, ask: Callable[[], Awaitable[Judgement]]) -> Judgement:
        """Return the judgement that `ask` makes, or one without a value for a failure of the endpoint.

        Raises UserError if a key is refused.
        """
        from openai import APIConnectionError, APIError, APIStatusError

        async with self.slots:
            if self.gone is not None:
                return Judgement(None, self.gone, {}, unreachable=True)
            try:
                return await ask()
            except APIStatusError as error:
                reason = f"The endpoint answered {error.status_code}: {describe(error.message)}"
                if error.status_code in LOCKED:  # it will not pass, and no other judge is to take its place
                    raise UserError(
                        f"The teacher {self.model} does not let us in. {reason}",
                        hint=f"Name the variable with its key: where.teacher.api_key_env={OPENAI_KEY}, say.",
                    ) from error
                refused = error.status_code in REFUSED
                if not refused:
                    await self._probe(reason)
                return Judgement(None, reason, {}, unreachable=not refused, refused=refused)
            except APIConnectionError as error:  # time-outs included
                reason = f"No answer: {describe(error.__cause__ or error)}".strip()
                await self._probe(reason)
                return Judgement(None, reason, {}, unreachable=True)
            except (APIError, *UNREADABLE) as error:
                reason = f"The answer can't be read: {type(error).__name__}: {describe(error)}"
                return Judgement(None, reason, {}, unreachable=True)

    async def complete(self, read: Callable[["ChatCompletion"], T], **request: Any) -> T:
        """Return what `read` makes of a greedy completion.

        One that can't be read (a proxy's page) is asked for again.
        """
        from openai import APIResponseValidationError

        create = self.client.chat.completions.create
        try:
            return read(await create(model=self.model, temperature=0, **request))
        except (APIResponseValidationError, *UNREADABLE):
            return read(await create(model=self.model, temperature=0, **request))

    async def _probe(self, reason: str) -> None:
        """Note whether the endpoint is gone, or only this request failed."""
        try:
            await self.client.with_options(timeout=PROBE_S, max_retries=0).models.list()
        except Exception:  # any failure means that there is no answer
            self.gone = self.gone or reason
