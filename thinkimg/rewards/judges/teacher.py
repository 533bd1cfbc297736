"""Judge `teacher`: a larger model behind an OpenAI-compatible endpoint, asked the same question as `self`.

It needs the endpoint's top log-probabilities, nothing more. Where the endpoint can't be reached, image.teacher.fallback
decides for whole groups: rows of one group are comparable only by one judge.
"""

import asyncio
import base64
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx
import numpy as np

import thinkimg.settings
from thinkimg.conversation import compare
from thinkimg.engine.errors import REFUSED, EngineError
from thinkimg.engine.server import SERVED_NAME
from thinkimg.engine.settings import TeacherEndpoint
from thinkimg.environment import is_loopback
from thinkimg.errors import UserError, shorten
from thinkimg.records import Trajectory
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair
from thinkimg.rewards.judges.self import judge_ratings
from thinkimg.rewards.pairs import group_rows, pair_images, score_images
from thinkimg.rewards.settings import ImageConfig
from thinkimg.store.image_table import encode_lossless

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

log = logging.getLogger(__name__)

USES = ("teacher", "engine")
FROZEN = "warmstart"
TOP = 20  # log-probabilities: the most that OpenAI's API and vLLM by default return
PROBE_S = 5.0
HEADERS = ("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent")
OPENAI_KEY = "OPENAI_API_KEY"
OPENAI_HEADERS = ("openai-organization", "openai-project")
LOCKED = (401, 403)
UNREADABLE = (LookupError, ValueError, TypeError, AttributeError)  # what an answer of another form raises


class Settings(thinkimg.settings.Settings):
    """Larger model that judges, behind the OpenAI-compatible endpoint `where.teacher.url`."""

    model: thinkimg.settings.Name = "Qwen/Qwen2.5-VL-72B-Instruct"
    """Its name at the endpoint; "warmstart": the frozen first policy, which a loop serves on a second server."""
    prefix: bool = True
    """Begin the reply for the model, so that its next token is the rating: vLLM and SGLang can, OpenAI's API can't."""
    fallback: Literal["error", "self", "skip"] = "self"
    """If the endpoint can't be reached: fail, take the policy's own judgement for whole groups, or have no value."""


def score(batch: Batch) -> list[Score]:
    """Return one score per trajectory; a group with a pair that did not reach the teacher falls back whole."""
    assert batch.image is not None
    scores = dict(zip([row.trajectory_id for row in batch.trajectories], score_images("teacher", batch), strict=True))
    for rows in group_rows(batch.trajectories).values():
        unreached = [
            pair for row in rows for pair in _pairs(row, batch) if batch.judgements["teacher", pair].unreachable
        ]
        if not unreached:
            continue
        reason = batch.judgements["teacher", unreached[0]].reason
        if batch.image.teacher.fallback == "self":
            for row, own in zip(rows, score_images("self", replace(batch, trajectories=rows)), strict=True):
                evidence = (own.evidence or {}) | {"fallback": "self", "because": reason}
                scores[row.trajectory_id] = replace(own, evidence=evidence)
            continue
        for row in rows:
            if _pairs(row, batch):  # a row without an image is worth nothing, whoever judges
                evidence = {"fallback": "skip", "because": reason}
                scores[row.trajectory_id] = Score.missing(f"The teacher was not asked: {reason}", evidence)
    return [scores[row.trajectory_id] for row in batch.trajectories]


def _pairs(row: Trajectory, batch: Batch) -> list[Pair]:
    return [pair for pair in pair_images(row, batch.sample(row), batch.tools) if isinstance(pair, Pair)]


def prompt(settings: JudgeSettings) -> str:
    teacher = settings.image.teacher
    precision = settings.model.dtype if teacher.model == FROZEN else None
    return settings.hashed(compare.hash_prompt(), teacher.prefix, precision)


def identity(context: JudgeContext) -> JudgeIdentity:
    teacher = context.settings.image.teacher
    weights = ""
    if teacher.model == FROZEN:
        assert context.first is not None
        weights = context.first.digest
    return JudgeIdentity("teacher", teacher.model, weights, prompt(context.settings))


def judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    """Judge by the endpoint. Raises UserError where it can't be reached and the fallback is "error"."""
    return asyncio.run(_judge(pairs, context))


async def _judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    where, teacher = context.resources.where.teacher, context.settings.image.teacher
    try:
        url, model = await asyncio.to_thread(find_endpoint, context, {pair.question for pair in pairs})
    except EngineError as error:  # the loop's own second server does not come up
        if teacher.fallback == "error":
            raise
        reason = f"The teacher's server does not start: {error.message}"
        return [Judgement(None, reason, {}, unreachable=True)] * len(pairs)
    async with connect(url, where) as client:
        asker = Asker(client, model, teacher.prefix, asyncio.Semaphore(where.concurrency))
        shas = sorted({sha for pair in pairs for sha in (pair.original, pair.processed)})
        views = await asyncio.to_thread(context.map, lambda sha: encode_view(context, sha), shas)
        images = dict(zip(shas, views, strict=True))

        async def judge_pair(pair: Pair) -> Judgement:
            judgement = await asker.compare(pair, images)
            context.judged(1)
            return judgement

        judgements = await asyncio.gather(*(judge_pair(pair) for pair in pairs))
    unreached = [judgement for judgement in judgements if judgement.unreachable]
    if unreached and teacher.fallback == "error":
        raise UserError(
            f"The teacher {teacher.model} at {url} can't be asked: {unreached[0].reason}",
            hint="Start it and score again, or set image.teacher.fallback=self.",
        )
    return judgements


def find_endpoint(context: JudgeContext, questions: set[str]) -> tuple[str, str]:
    """Return (base URL, name of the model there); starts the loop's second server if the teacher is its own."""
    settings, where = context.settings, context.resources.where.teacher
    check_teacher(settings.image, where)
    url, model = where.url, settings.image.teacher.model
    if url is not None:
        return url.rstrip("/"), model

    assert context.first is not None
    engine = settings.engine(compare.encode_comparison(context.codec, question) for question in questions)
    return f"{context.resources.teacher(context.first, engine, settings.base).url}/v1", SERVED_NAME


def connect(url: str, where: TeacherEndpoint) -> "AsyncOpenAI":
    """Return a client that sends the key of `where` to the host of `url`, and nothing else of the user's environment.

    openai takes keys, organisation, project and further headers from the environment, for any host. So each request
    keeps only the headers in HEADERS and, at the host of `url`, its key or the name and password in `url`. Organisation
    and project are kept where the host is OpenAI's own. Raises UserError as api_key.
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

    proxies = not is_loopback(origin.host)
    http = DefaultAsyncHttpxClient(event_hooks={"request": [only_ours]}, timeout=where.timeout_s, trust_env=proxies)
    return AsyncOpenAI(
        base_url=url, api_key="unused", timeout=where.timeout_s, max_retries=where.retries, http_client=http
    )


def api_key(where: TeacherEndpoint) -> str | None:
    """Return the key for `where.url`, from the variable where.api_key_env; by default OPENAI_API_KEY for OpenAI alone.

    Raises UserError if the variable is not set.
    """
    if where.url is None:  # our own server
        return None
    variable = where.api_key_env or (OPENAI_KEY if is_openai(where.url) else None)
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise UserError(
            f"The environment variable {variable} is not set, which holds the teacher's key.",
            hint="Set it, or name another one in where.teacher.api_key_env.",
        )
    log.info("the key in %s is sent to %s", variable, urlsplit(where.url).hostname)
    return key


def is_openai(url: str) -> bool:
    """Tell whether a URL is that of OpenAI's own API, encrypted."""
    parts = urlsplit(url)
    return (parts.scheme, parts.hostname, parts.port or 443) == ("https", "api.openai.com", 443)


def check_teacher(image: ImageConfig, where: TeacherEndpoint) -> None:
    """Raise UserError where the teacher is to judge and its endpoint or its key is missing."""
    if "teacher" not in image.types:
        return
    teacher = image.teacher
    api_key(where)
    if where.url is not None and teacher.model == FROZEN:
        raise UserError(
            f"The teacher {FROZEN} is the loop's own second server, and where.teacher.url names another one.",
            hint="Leave where.teacher.url out, or set image.teacher.model to the model's name there.",
        )
    if where.url is None and teacher.model != FROZEN:
        raise UserError(
            f"The teacher {teacher.model} has no endpoint.",
            hint="Set where.teacher.url=http://…/v1, or take 'teacher' out of image.types.",
        )


def encode_view(context: JudgeContext, sha256: str) -> str:
    """Return the view of an image that the policy sees, as a data URL."""
    return f"data:image/webp;base64,{base64.b64encode(encode_lossless(context.picture(sha256).view)).decode()}"


class Asker:
    """Client that asks about pairs; once the endpoint is gone, every further pair is unreachable at once."""

    def __init__(self, client: "AsyncOpenAI", model: str, prefix: bool, slots: asyncio.Semaphore):
        self.client, self.model, self.prefix, self.slots = client, model, prefix, slots
        self.gone: str | None = None

    async def compare(self, pair: Pair, images: dict[str, str]) -> Judgement:
        """Return the judgement of a pair. images: content hash -> data URL. Raises UserError if a key is refused."""
        from openai import APIConnectionError, APIError, APIStatusError

        shown = [images[pair.original], images[pair.processed]]
        async with self.slots:
            if self.gone is not None:
                return Judgement(None, self.gone, {}, unreachable=True)
            try:
                forward = await self._rate(pair.question, shown)
                backward = await self._rate(pair.question, shown[::-1])
            except APIStatusError as error:
                reason = f"The endpoint answered {error.status_code}: {shorten(error.message)}"
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
                reason = f"No answer: {error.__cause__ or error}".strip()
                await self._probe(reason)
                return Judgement(None, reason, {}, unreachable=True)
            except (APIError, *UNREADABLE) as error:
                reason = f"The answer can't be read: {type(error).__name__}: {shorten(str(error))}"
                return Judgement(None, reason, {}, unreachable=True)
        if forward is None or backward is None:
            return Judgement(None, f"A rating is not among the {TOP} likeliest tokens.", {})
        return judge_ratings(forward, backward)

    async def _rate(self, question: str, images: Sequence[str]) -> list[float] | None:
        """Return the log-probabilities of (1, 2); an answer that can't be read (a proxy's page) is asked for again."""
        from openai import APIResponseValidationError

        try:
            return read_ratings(await self._ask(question, images))
        except (APIResponseValidationError, *UNREADABLE):
            return read_ratings(await self._ask(question, images))

    async def _ask(self, question: str, images: Sequence[str]) -> "ChatCompletion":
        return await self.client.chat.completions.create(
            model=self.model, max_tokens=1, temperature=0, logprobs=True, top_logprobs=TOP,
            **build_messages(question, images, prefix=self.prefix),
        )  # fmt: skip

    async def _probe(self, reason: str) -> None:
        """Note whether the endpoint is gone, or only this request failed."""
        try:
            await self.client.with_options(timeout=PROBE_S, max_retries=0).models.list()
        except Exception:  # any failure means that there is no answer
            self.gone = self.gone or reason


def build_messages(question: str, images: Sequence[str], *, prefix: bool) -> dict[str, Any]:
    """Return the prompt of `self` as messages of a chat completion; with `prefix` the reply is begun."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    asked = {"role": "user", "content": [*content, {"type": "text", "text": compare.render_instruction(question)}]}
    if not prefix:
        return {"messages": [asked]}
    begun = {"role": "assistant", "content": compare.REPLY}
    options = {"continue_final_message": True, "add_generation_prompt": False}  # of vLLM and SGLang
    return {"messages": [asked, begun], "extra_body": options}


def read_ratings(answer: "ChatCompletion") -> list[float] | None:
    """Return the log-probabilities of (1, 2) as first token; None if one is not among the top."""
    logprobs = answer.choices[0].logprobs
    if logprobs is None or not logprobs.content:
        raise ValueError("it has no log-probabilities")
    likely: dict[str, float] = {}
    for entry in logprobs.content[0].top_logprobs:  # " 1" and "1" are one rating
        token = entry.token.strip()
        likely[token] = float(np.logaddexp(likely.get(token, -np.inf), entry.logprob))
    if not all(rating in likely for rating in compare.RATINGS):
        return None
    return [likely[rating] for rating in compare.RATINGS]
