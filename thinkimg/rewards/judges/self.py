"""Judge `self`: the policy's own preference between the original and the processed image, given the question.

It is judged by the weights that made the rollouts. The reply is read from the distribution of one forward step, in both
orders, so that a habit of saying 1 or 2 cancels out.

    value = ½ [P(2 | original, processed) + P(1 | processed, original)]

P is normalised over the two ratings; 0.5 is no preference.
"""

import asyncio
import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from thinkimg.conversation import compare
from thinkimg.engine.client import EngineClient, EngineUnavailable
from thinkimg.engine.errors import EngineError
from thinkimg.engine.request import ImageRef
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair
from thinkimg.rewards.views import Views

USES = ("engine",)


def prompt(settings: JudgeSettings) -> str:
    return settings.hashed(compare.hash_prompt(), settings.model.precision)


def identity(context: JudgeContext) -> JudgeIdentity:
    assert context.policy is not None
    return JudgeIdentity("self", "policy", context.policy.digest, prompt(context.settings))


def judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    """Judge by the engine. Raises EngineUnavailable where no server answers: the stage stops, and can go on later."""
    return asyncio.run(_judge(pairs, context))


async def _judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    assert context.policy is not None
    settings = context.settings
    prompts = {
        question: compare.encode_comparison(context.codec, question) for question in {pair.question for pair in pairs}
    }
    resources = context.resources
    engine = await resources.engine(context.policy, settings.engine(prompts.values()), settings.base)
    async with engine:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=resources.media)))
            folder, slots = scratch if engine.media == "file" else None, resources.where.engine.concurrency
            views = stack.enter_context(Views(context, folder, slots))
            ratings = compare.rating_tokens(context.codec)

            async def judge_pair(pair: Pair) -> Judgement:
                async with views.lend(pair) as images:
                    judgement = await _compare(engine, images, prompts[pair.question], ratings)
                context.judged(1)
                return judgement

            return await asyncio.gather(*(judge_pair(pair) for pair in pairs))


async def _compare(engine: EngineClient, images: list[ImageRef], prompt: list[int], ratings: list[int]) -> Judgement:
    try:
        forward, backward = await asyncio.gather(
            engine.next_token_logprobs(prompt, images, ratings),
            engine.next_token_logprobs(prompt, images[::-1], ratings),
        )
    except EngineUnavailable:
        raise
    except EngineError as error:
        return Judgement(None, f"The engine refused to judge: {error.message}", {}, refused=True)
    return judge_ratings(forward, backward)


def judge_ratings(forward: Sequence[float], backward: Sequence[float]) -> Judgement:
    """Return the judgement of the log-probabilities of (1, 2): with the original first, and with it second."""
    evidence = {"logprobs": [list(forward), list(backward)]}
    preferences = [preference(forward[1], forward[0]), preference(backward[0], backward[1])]
    if any(math.isnan(p) for p in preferences):
        return Judgement(None, "The model gives neither rating a probability.", {})
    return Judgement(sum(preferences) / 2, None, evidence | {"preferences": preferences})


def preference(chosen: float, other: float) -> float:
    """Return P(chosen) normalised over the two, by their log-probabilities; NaN if both are -inf."""
    if chosen == other:
        return math.nan if chosen == -math.inf else 0.5
    return 1 / (1 + math.exp(min(other - chosen, 700.0)))
