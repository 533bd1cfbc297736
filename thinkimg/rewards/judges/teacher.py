"""Judge `teacher`: a larger model behind an OpenAI-compatible endpoint, asked the same question as `self`.

It needs the endpoint's top log-probabilities, nothing more. Where the endpoint can't be reached, image.teacher.fallback
decides for whole groups: rows of one group are comparable only by one judge.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

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
from thinkimg.rewards.endpoint import Asker, api_key, connect
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair
from thinkimg.rewards.judges.self import judge_ratings
from thinkimg.rewards.pairs import group_rows, pair_images, score_images
from thinkimg.rewards.settings import ImageConfig
from thinkimg.rewards.views import Views

if TYPE_CHECKING:
    from thinkimg.rewards.endpoint import ChatCompletion

USES = ("teacher", "engine")
FROZEN = "warmstart"
TOP = 20  # log-probabilities: the most that OpenAI's API and vLLM by default return


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
    precision = settings.model.precision if teacher.model == FROZEN else None
    return settings.hashed(compare.hash_prompt(), teacher.prefix, precision)


def identity(context: JudgeContext) -> JudgeIdentity:
    teacher = context.settings.image.teacher
    weights = ""
    if teacher.model == FROZEN:
        assert context.first is not None
        weights = context.first.digest
    return JudgeIdentity("teacher", teacher.model, weights, prompt(context.settings))


def start(context: JudgeContext, questions: set[str]) -> None:
    """Start the loop's own second server where it may start beside the engine: else that would wait for it."""
    resources = context.resources
    if resources.where.teacher.url is None and resources.start_apart:
        with suppress(EngineError):  # `judge` tries once more, and says so
            find_endpoint(context, questions)


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
        asker = PairAsker(Asker(client, model, asyncio.Semaphore(where.concurrency)), teacher.prefix)
        # While a pair's images are encoded, others are asked about.
        with Views(context, None, where.concurrency + context.resources.where.workers) as views:

            async def judge_pair(pair: Pair) -> Judgement:
                async with views.lend(pair) as images:
                    judgement = await asker.compare(pair.question, [image.url("data") for image in images])
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


@dataclass(frozen=True)
class PairAsker:
    """Client that asks about pairs of images. prefix: the reply is begun for the model."""

    asker: Asker
    prefix: bool

    async def compare(self, question: str, images: Sequence[str]) -> Judgement:
        """Return the judgement of (original, processed). images: data URLs. Raises UserError if a key is refused."""

        async def ask() -> Judgement:
            forward = await self._rate(question, images)
            backward = await self._rate(question, images[::-1])
            if forward is None or backward is None:
                return Judgement(None, f"A rating is not among the {TOP} likeliest tokens.", {})
            return judge_ratings(forward, backward)

        return await self.asker.judge(ask)

    async def _rate(self, question: str, images: Sequence[str]) -> list[float] | None:
        """Return the log-probabilities of (1, 2)."""
        options = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        request = options | build_messages(question, images, prefix=self.prefix)
        return await self.asker.complete(read_ratings, **request)


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
