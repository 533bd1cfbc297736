"""A larger model's judgement, by the same question as `self`, behind an OpenAI-compatible endpoint.

Needs no more than the endpoint's top log-probabilities. Where it can't be reached, config.image.teacher.fallback
decides, for whole groups: rows of one group are only comparable by one judge.
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
from thinkimg.engine.errors import EngineError
from thinkimg.engine.server import SERVED_NAME
from thinkimg.engine.settings import TeacherEndpoint
from thinkimg.errors import UserError
from thinkimg.records import Trajectory
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judgement import Identity, Judgement, Pair
from thinkimg.rewards.judges.self import verdict
from thinkimg.rewards.pairs import by_group, processed, score_images
from thinkimg.rewards.settings import ImageConfig
from thinkimg.store.image_table import encode

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

log = logging.getLogger(__name__)

NAME, USES = "teacher", ("teacher", "engine")
FROZEN = "warmstart"
TOP = 20  # the most that OpenAI's API and vLLM's default give
PROBE_S = 5.0
HEADERS = ("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent")
OPENAI_KEY = "OPENAI_API_KEY"
OPENAI_HEADERS = ("openai-organization", "openai-project")
LOCKED = (401, 403)
REFUSED = (400, 413, 422)  # this request (a picture too large, say), and not whoever asks


class Settings(thinkimg.settings.Settings):
    """A larger model that judges, behind the OpenAI-compatible endpoint `where.teacher.url`."""

    model: str = "Qwen/Qwen2.5-VL-72B-Instruct"
    """Its name at the endpoint; "warmstart": the frozen first policy, which a loop serves on a second server of its
    own."""
    prefix: bool = True
    """Begin the reply for the model, so that its next token is the rating: vLLM and SGLang can, OpenAI's own API
    can't."""
    fallback: Literal["error", "self", "skip"] = "self"
    """Where the endpoint can't be reached: fail, take the policy's own judgement for whole groups, or have no value."""


def score(batch: Batch) -> list[Score]:
    """One score per trajectory; a group with a pair that the teacher could not be asked about falls back as a whole."""
    scores = dict(zip([row.trajectory_id for row in batch.trajectories], score_images(NAME, batch), strict=True))
    for rows in by_group(batch.trajectories).values():
        unreached = [pair for row in rows for pair in pairs_of(row, batch) if batch.judgements[NAME, pair].unreachable]
        if not unreached:
            continue
        assert batch.image is not None
        reason = batch.judgements[NAME, unreached[0]].reason
        fallback = (
            score_images("self", replace(batch, trajectories=rows)) if batch.image.teacher.fallback == "self" else []
        )
        for i, row in enumerate(rows):
            if fallback:
                evidence = (fallback[i].evidence or {}) | {"fallback": "self", "because": reason}
                scores[row.trajectory_id] = replace(fallback[i], evidence=evidence)
            else:
                if pairs_of(row, batch):  # a row without an image is worth nothing whoever judges
                    evidence = {"fallback": "skip", "because": reason}
                    scores[row.trajectory_id] = Score.missing(f"The teacher was not asked: {reason}", evidence)
    return [scores[row.trajectory_id] for row in batch.trajectories]


def pairs_of(row: Trajectory, batch: Batch) -> list[Pair]:
    return [pair for pair in processed(row, batch.sample(row), batch.tools) if isinstance(pair, Pair)]


def prompt(settings: JudgeSettings) -> str:
    teacher = settings.image.teacher
    precision = settings.model.dtype if teacher.model == FROZEN else None
    return settings.hashed(compare.prompt_hash(), teacher.prefix, precision)


def identity(context: JudgeContext) -> Identity:
    teacher = context.settings.image.teacher
    weights = ""
    if teacher.model == FROZEN:
        assert context.first is not None
        weights = context.first.digest
    return Identity(NAME, teacher.model, weights, prompt(context.settings))


def judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    """Raises UserError where the endpoint can't be reached and the fallback is "error"."""
    return asyncio.run(_judge(pairs, context))


async def _judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    where, teacher = context.resources.where.teacher, context.settings.image.teacher
    try:
        url, model = await asyncio.to_thread(locate, context, {pair.question for pair in pairs})
    except EngineError as error:  # the loop's own second server does not come up
        if teacher.fallback == "error":
            raise
        return [Judgement(None, f"The teacher's server does not start: {error.message}", {}, unreachable=True)] * len(
            pairs
        )
    async with connect(url, where) as client:
        asker = Asker(client, model, teacher.prefix, asyncio.Semaphore(where.concurrency))
        shas = sorted({sha for pair in pairs for sha in (pair.original, pair.processed)})
        images = dict(
            zip(shas, await asyncio.to_thread(context.map, lambda sha: data_url(context, sha), shas), strict=True)
        )

        async def one(pair: Pair) -> Judgement:
            judgement = await asker.compare(pair, images)
            context.judged(1)
            return judgement

        found = await asyncio.gather(*(one(pair) for pair in pairs))
    lost = [one for one in found if one.unreachable]
    if lost and teacher.fallback == "error":
        raise UserError(
            f"The teacher {teacher.model} at {url} can't be asked: {lost[0].reason}",
            hint="Start it and score again, or set image.teacher.fallback=self.",
        )
    return list(found)


def locate(context: JudgeContext, questions: set[str]) -> tuple[str, str]:
    """(base URL, name of the model there)."""
    settings, where = context.settings, context.resources.where.teacher
    check_teacher(settings.image, where)
    url, model = where.url, settings.image.teacher.model
    if url is not None:
        return url.rstrip("/"), model

    assert context.first is not None
    engine = settings.engine(compare.prompt(context.codec, question) for question in questions)
    return f"{context.resources.teacher(context.first, engine, settings.base).url}/v1", SERVED_NAME


def connect(url: str, where: TeacherEndpoint) -> "AsyncOpenAI":
    """A client that sends the key of `where` to the host of `url`, and nothing of the user's environment to anyone.

    openai takes keys, organisation, project and further headers from the environment, whoever it talks to. So each
    request is left with the headers of HEADERS and, unless a redirect leads to another host, what belongs to that: the
    key, or the name and password in `url`; organisation and project where it is OpenAI's own. Raises UserError as
    api_key.
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

    http = DefaultAsyncHttpxClient(event_hooks={"request": [only_ours]}, timeout=where.timeout_s)
    return AsyncOpenAI(
        base_url=url, api_key="unused", timeout=where.timeout_s, max_retries=where.retries, http_client=http
    )


def api_key(where: TeacherEndpoint) -> str | None:
    """The key for `where.url`: that of the variable that where.api_key_env names, by default OPENAI_API_KEY for
    OpenAI's API alone. Raises UserError if the named variable is not set."""
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
    """Raise UserError where the teacher is to judge and it is not known where, or its key is not there."""
    if NAME not in image.types:
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
            f"It is not known where the teacher {teacher.model} answers.",
            hint="Set where.teacher.url=http://…/v1, or take 'teacher' out of image.types.",
        )


def data_url(context: JudgeContext, sha256: str) -> str:
    """What the policy sees of an image: the question is what it makes of it."""
    return f"data:image/webp;base64,{base64.b64encode(encode(context.picture(sha256).view)).decode()}"


class Asker:
    """Asks about pairs until the endpoint turns out to be gone; from then on every pair is unreachable at once."""

    def __init__(self, client: "AsyncOpenAI", model: str, prefix: bool, slots: asyncio.Semaphore):
        self.client, self.model, self.prefix, self.slots = client, model, prefix, slots
        self.gone: str | None = None

    async def compare(self, pair: Pair, images: dict[str, str]) -> Judgement:
        from openai import APIConnectionError, APIError, APIStatusError

        shown = [images[pair.original], images[pair.processed]]
        async with self.slots:
            if self.gone is not None:
                return Judgement(None, self.gone, {}, unreachable=True)
            try:
                forward = ratings(await self._ask(pair.question, shown))
                backward = ratings(await self._ask(pair.question, shown[::-1]))
            except APIStatusError as error:
                reason = f"The endpoint answered {error.status_code}: {error.message[:200]}"
                if error.status_code in LOCKED:  # no passing trouble: nobody else is to judge in its place
                    raise UserError(
                        f"The teacher {self.model} does not let us in. {reason}",
                        hint=f"Name the variable with its key: where.teacher.api_key_env={OPENAI_KEY}, say.",
                    ) from error
                if error.status_code not in REFUSED:
                    await self._probe(reason)
                return Judgement(None, reason, {}, unreachable=error.status_code not in REFUSED)
            except APIConnectionError as error:  # time-outs included
                reason = f"No answer: {error.__cause__ or error}".strip()
                await self._probe(reason)
                return Judgement(None, reason, {}, unreachable=True)
            except (
                APIError,
                LookupError,
                ValueError,
                TypeError,
                AttributeError,
            ) as error:  # an answer in no known form
                return Judgement(None, f"The answer can't be read: {type(error).__name__}: {str(error)[:200]}", {})
        if forward is None or backward is None:
            return Judgement(None, f"A rating is not among the {TOP} likeliest tokens.", {})
        return verdict(forward, backward)

    async def _ask(self, question: str, images: Sequence[str]) -> "ChatCompletion":
        return await self.client.chat.completions.create(
            model=self.model, max_tokens=1, temperature=0, logprobs=True, top_logprobs=TOP,
            **request(question, images, prefix=self.prefix),
        )  # fmt: skip

    async def _probe(self, reason: str) -> None:
        """Is it gone, or was it this request?"""
        try:
            await self.client.with_options(timeout=PROBE_S, max_retries=0).models.list()
        except Exception:  # whatever it is, it is no answer
            self.gone = self.gone or reason


def request(question: str, images: Sequence[str], *, prefix: bool) -> dict[str, Any]:
    """The prompt of `self` as a chat completion's messages; with `prefix` the reply is begun, which vLLM and SGLang go
    on."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    asked = {"role": "user", "content": [*content, {"type": "text", "text": compare.instruction(question)}]}
    if not prefix:
        return {"messages": [asked]}
    begun = {"role": "assistant", "content": compare.REPLY}
    return {
        "messages": [asked, begun],
        "extra_body": {"continue_final_message": True, "add_generation_prompt": False},
    }


def ratings(answer: "ChatCompletion") -> list[float] | None:
    """Log-probabilities of (1, 2) as first token; None if one is not among those that came."""
    logprobs = answer.choices[0].logprobs
    if logprobs is None or not logprobs.content:
        raise ValueError("it has no log-probabilities")
    first = logprobs.content[0].top_logprobs
    found: dict[str, float] = {}
    for entry in first:  # " 1" and "1" are one rating
        token = entry.token.strip()
        found[token] = float(np.logaddexp(found.get(token, -np.inf), entry.logprob))
    if not all(rating in found for rating in compare.RATINGS):
        return None
    return [found[rating] for rating in compare.RATINGS]
