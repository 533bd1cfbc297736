"""Asynchronous client of vLLM's tokens-in-tokens-out interface, over any number of servers with the same weights."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Literal, Self, TypeVar

import aiohttp
import orjson

from thinkimg.engine.errors import REFUSED, EngineError
from thinkimg.engine.request import Generation, ImageRef, Sampling
from thinkimg.errors import shorten
from thinkimg.redaction import without_password

log = logging.getLogger(__name__)
A, T = TypeVar("A"), TypeVar("T")

GENERATE = "/inference/v1/generate"
RETRIES = 3
FINISHED = ("stop", "length")  # reasons of vLLM to end a turn; with any other it gave the request up
HEALTH_AFTER_S = 25.0  # a server that has not answered for so long is asked for its health, again and again
HEALTH_TIMEOUT_S = 20.0  # without an answer to that for so long it is given up
STATUS_HINTS = {
    401: "start the server without VLLM_API_KEY and --api-key",
    403: "start the server without VLLM_API_KEY and --api-key",
    404: "start the server with VLLM_SERVER_DEV_MODE=1, --enable-scale-out and, for adapters, --enable-lora",
}
BACKOFF_S = 0.25  # doubled with each retry
AFFINITY_SLACK = 8  # requests that a prompt's own server may have more than the least busy one


class EngineClient:
    """Client of servers that hold the same weights: `async with EngineClient(urls, media="file") as engine`.

    media: "file" where the servers read images from our disk, else "data". concurrency: requests under way at once,
    over all servers. timeout_s: seconds for one request, its wait in the server's queue included.

    Every method raises EngineError at once if a server refuses the request itself (REFUSED). It raises
    EngineUnavailable, after retries, if no server can be reached or serves it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        media: Literal["file", "data"],
        concurrency: int = 64,
        timeout_s: float = 1800.0,
        on_close: Callable[[], None] = lambda: None,
    ):
        assert urls, "an engine client needs at least one url"
        self.urls = [url.rstrip("/") for url in urls]
        self.media = media
        self.adapter: str | None = None
        self.version: str | None = None
        """Version of the weights that the servers have to hold; None: any."""
        self._adapter_path: Path | None = None
        self._outstanding = dict.fromkeys(self.urls, 0)
        self._dead: set[str] = set()  # not used again: one that comes back may hold other weights
        self.concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        # httpx looks at all of its connections for every request: with 128 of them that took most of this process's
        # time.
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=30.0)
        self._on_close = on_close
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency + 8), timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._http.close()
        finally:
            self._on_close()

    async def generate(self, token_ids: Sequence[int], images: Sequence[ImageRef], sampling: Sampling) -> Generation:
        """Sample one continuation of a compact prompt, which has one image pad per entry of `images`, in order."""

        def read(body: dict) -> Generation:
            choice = body["choices"][0]
            if choice["finish_reason"] not in FINISHED:
                raise ValueError(f"it gave up the request ({choice['finish_reason']})")
            versions = self._read_versions(body)
            return Generation(
                token_ids=choice["token_ids"],
                logprobs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
                prompt_token_ids=body["prompt_token_ids"],
                finish_reason=choice["finish_reason"],
                weight_version=">".join(versions),
            )

        return await self._generate(token_ids, images, sampling.params(), read)

    async def next_token_logprobs(
        self, token_ids: Sequence[int], images: Sequence[ImageRef], candidates: Sequence[int]
    ) -> list[float]:
        """Return the log-probabilities of up to 127 candidates as next token, at temperature 1 with nothing banned.

        All requests under way should have equally many candidates. vLLM 0.32 pads shorter lists with token 0, and loses
        that token's value where it is a candidate, or is sampled by `generate`.
        """
        # The server's list begins with the sampled token and is cut to the length asked for: ask for one more.
        asked = [*candidates, candidates[0]]
        params = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "detokenize": False}
        params |= {"logprobs": len(asked), "logprob_token_ids": asked}

        def read(body: dict) -> list[float]:
            self._read_versions(body)
            entries = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            logprobs = {entry["token_id"]: entry["logprob"] for entry in entries}
            return [logprobs[token] for token in candidates]

        return await self._generate(token_ids, images, params, read)

    def _read_versions(self, body: dict) -> list[str]:
        """Return the weights that a server says it used. Raises EngineUnavailable if others than these were loaded.

        A server that was started again has those of its start.
        """
        if self.adapter is None:
            versions, wanted = [span["version"] for span in body["choices"][0]["weight_versions"]], self.version
        else:
            versions, wanted = [body["model"]], self.adapter
        if wanted is not None and set(versions) != {wanted}:
            raise EngineUnavailable(
                f"an engine played {', '.join(map(str, versions))} and not {wanted}",
                hint="was it started again? Run this again: the weights are loaded anew",
            )
        return versions

    async def load_weights(self, model_dir: Path, version: str) -> None:
        """Replace the weights of all servers, in place, by those of a saved model of the same architecture.

        Requests under way end first, and caches are dropped. From then on the servers report `version`.
        """

        async def load(url: str) -> None:
            # Killed from here on, we leave a server with unknown weights, or one that stays paused. It then reports
            # neither the old nor the new version, so that the next client loads again and resumes it.
            await self._post(url, "/update_weight_version", {"new_version": f"loading {version}"})
            await self._post(url, "/pause?mode=wait", {})
            try:
                arguments = {"method": "load_model_dir", "kwargs": {"path": str(Path(model_dir).absolute())}}
                await self._post(url, "/collective_rpc", arguments)
                reset = await self._post(url, "/reset_prefix_cache", {})
                assert read_answer(url, reset, itemgetter("success")), "nothing runs while the server is paused"
            finally:
                await self._post(url, "/resume", {})
            await self._post(url, "/update_weight_version", {"new_version": version})

        await self._on_all(load)
        self.version = version

    async def load_adapter(self, name: str, path: Path) -> None:
        """Load an adapter into all servers that do not have it, and sample from it from now on.

        Each version needs a new name: prefix caches are keyed by the name. Raises EngineUnavailable for a server that
        then samples from others.
        """
        await self._on_all(lambda url: self._load_adapter(url, name, path))
        self.adapter, self._adapter_path = name, path
        await self._on_all(self._probe)

    async def takes_adapters(self) -> bool:
        """Tell whether every server takes adapters, as with --enable-lora."""

        async def ask(url: str) -> bool:
            try:
                await self._post(url, "/v1/load_lora_adapter", {})
            except _NotFound:
                return False
            except EngineUnavailable:
                raise
            except EngineError:  # the name is missing
                pass
            return True

        return all(await self._on_all(ask))

    async def _load_adapter(self, url: str, name: str, path: Path) -> None:
        try:
            body = {"lora_name": name, "lora_path": str(Path(path).absolute())}
            await self._post(url, "/v1/load_lora_adapter", body)
        except EngineError as error:
            if "already been loaded" not in error.message:
                raise

    async def _probe(self, url: str) -> None:
        """Have a server sample a token, and say of which weights."""
        body = {"token_ids": [1], "sampling_params": {"max_tokens": 1}, "return_token_ids": True, "model": self.adapter}
        answer = await self._request(url, "POST", GENERATE, orjson.dumps(body))
        read_answer(url, answer, self._read_versions)

    async def versions(self) -> dict[str, str]:
        """Return url -> the weight version that the server reports."""
        bodies = await self._on_all(lambda url: self._request(url, "GET", "/weight_info"))
        read = itemgetter("weight_version")
        return {url: read_answer(url, body, read) for url, body in zip(self.urls, bodies, strict=True)}

    async def releases(self) -> dict[str, str | None]:
        """Return url -> the release of vLLM that the server reports; None where it does not say."""

        async def read(url: str) -> str | None:
            try:
                release = (await self._request(url, "GET", "/version")).get("version")
            except (EngineError, AttributeError):
                return None
            return release if isinstance(release, str) else None

        return dict(zip(map(without_password, self.urls), await self._on_all(read), strict=True))

    async def leave_out_dead(self) -> None:
        """Drop the servers that do not answer, with a warning. Raises EngineUnavailable if none answers."""
        await asyncio.gather(*(self._check(url) for url in self.urls))
        alive = [url for url in self.urls if url not in self._dead]
        if not alive:
            raise EngineUnavailable(
                f"none of the servers {', '.join(self.urls)} answers", hint="start them, or set where.engine.urls"
            )
        self.urls, self._dead = alive, set()

    async def _check(self, url: str) -> None:
        """Mark a server as dead if it does not report that it is healthy."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._request(url, "GET", "/health")
        except (EngineError, TimeoutError) as error:
            if url not in self._dead:
                reason = str(error).split("\n")[0] or "no answer"
                log.warning("the server %s is left out: %s", without_password(url), reason)
            self._dead.add(url)

    async def _on_all(self, call) -> list:
        return await asyncio.gather(*(call(url) for url in self.urls))

    async def _generate(
        self, token_ids: Sequence[int], images: Sequence[ImageRef], params: dict, read: Callable[[dict], T]
    ) -> T:
        """Return what `read` makes of a server's answer."""
        parts = [{"type": "image_url", "url": image.url(self.media), "uuid": image.uuid} for image in images]
        body = {
            "token_ids": list(token_ids),
            "content_parts": parts or None,
            "sampling_params": {key: value for key, value in params.items() if value is not None},
            "return_token_ids": True,
            "model": self.adapter,
        }
        # Prompts about one image share a prefix, as do the turns of a conversation: one server's cache should see them
        # all.
        affinity = images[0].uuid if images else json.dumps(list(token_ids[:256]))
        content = orjson.dumps({key: value for key, value in body.items() if value is not None})
        async with self._slots:
            return await self._send(affinity, content, read)

    async def _send(self, affinity: str, content: bytes, read: Callable[[dict], T]) -> T:
        failed: set[str] = set()
        refused: EngineError | None = None
        attempt = 0
        while True:
            url = self._choose(affinity, failed)
            self._outstanding[url] += 1
            try:
                answer = read_answer(url, await self._watched(url, content), read)
                if refused is not None:
                    log.warning("%s served what another server refused: %s", without_password(url), refused)
                return answer
            except EngineUnavailable as error:
                if isinstance(error, _Unreachable) and len(self.urls) > 1:
                    await self._check(url)
                if isinstance(error, _NotFound) and self.adapter is not None and self._adapter_path is not None:
                    try:  # a server that was started again has lost its adapters
                        await self._load_adapter(url, self.adapter, self._adapter_path)
                    except EngineError as problem:
                        log.warning("the adapter could not be loaded again: %s", problem)
                if attempt == RETRIES or isinstance(error, _Hanging) and self._dead.issuperset(self.urls):
                    raise
                failed.add(url)
                if failed.issuperset(self.urls):
                    failed.clear()
                    await asyncio.sleep(BACKOFF_S * 2**attempt)
                attempt += 1
            except EngineError as error:
                # One server alone may be the one that is wrong, with narrower limits than the others.
                others = [other for other in self.urls if other not in failed | self._dead | {url}]
                if refused is not None or not others:
                    raise refused or error from None
                refused = error
                failed.add(url)
            finally:
                self._outstanding[url] -= 1

    async def _watched(self, url: str, content: bytes) -> dict:
        """Send a generation; give up a server that hangs long before the request's own time-out."""
        request = asyncio.create_task(self._request(url, "POST", GENERATE, content))
        try:
            while not (await asyncio.wait({request}, timeout=HEALTH_AFTER_S))[0]:
                await self._check(url)
                if url in self._dead and not request.done():
                    raise _Hanging(f"{url} hangs: it does not answer", hint="read its log and start it again")
            return request.result()
        finally:
            request.cancel()

    def _choose(self, affinity: str, failed: set[str]) -> str:
        """Return the affinity's own server (rendezvous hashing), unless it failed or is much busier than another."""
        urls = [url for url in self.urls if url not in failed]
        urls = [url for url in urls if url not in self._dead] or urls
        own = max(urls, key=lambda url: hashlib.sha256(f"{url} {affinity}".encode()).digest())
        least = min(urls, key=lambda url: self._outstanding[url])
        return least if self._outstanding[own] > self._outstanding[least] + AFFINITY_SLACK else own

    async def _post(self, url: str, path: str, body: dict) -> dict:
        content = json.dumps(body).encode()
        try:
            return await self._request(url, "POST", path, content)
        except _Unreachable:  # vLLM closes a connection after an error; all that is posted here may be posted twice
            return await self._request(url, "POST", path, content)

    async def _request(self, url: str, method: str, path: str, content: bytes | None = None) -> dict:
        headers = {"Content-Type": "application/json"} if content is not None else None
        try:
            async with self._http.request(method, url + path, data=content, headers=headers) as response:
                status, body, kind = response.status, await response.read(), response.content_type
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Unreachable(
                f"{url}{path}: {type(error).__name__} {error}".rstrip(),
                hint="is the server running, and did it run out of memory?",
            ) from error
        if status in REFUSED:
            raise EngineError(f"{url}{path} answered {status}: {read_error(body)}")
        if status >= 400:
            fault = _NotFound if status == 404 else EngineUnavailable
            raise fault(
                f"{url}{path} answered {status}: {read_error(body)}",
                hint=STATUS_HINTS.get(status, "read the server's log"),
            )
        # /v1/load_lora_adapter answers in plain text, /pause and others in JSON
        return read_answer(url + path, body, orjson.loads) if kind == "application/json" else {}


class EngineUnavailable(EngineError):
    """Failure that is not this request's fault: another server, or a later attempt, may serve it."""


class _NotFound(EngineUnavailable):
    """Server that lacks an interface, or a model of this name."""


class _Unreachable(EngineUnavailable):
    """Server that sent no answer at all."""


class _Hanging(_Unreachable):
    """Server that accepts connections and does not answer."""


def read_answer(url: str, answer: A, read: Callable[[A], T]) -> T:
    """Return what `read` makes of a server's answer. Raises EngineUnavailable where it can't be read."""
    try:
        return read(answer)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EngineUnavailable(
            f"{url} gave an answer that can't be read: {type(error).__name__}: {shorten(str(error))}",
            hint="is it a vLLM server, started with --enable-scale-out?",
        ) from error


def read_error(answer: bytes) -> str:
    """Return the server's own message, or the beginning of its answer."""
    try:
        body = json.loads(answer)
    except ValueError:
        return shorten(answer.decode(errors="replace"), 500)
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return shorten(str(error.get("message", error) if isinstance(error, dict) else error), 2000)
