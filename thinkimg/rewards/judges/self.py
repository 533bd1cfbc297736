"""The policy's own judgement: shown the original and the processed image, with which is the question easier to answer?

Judged by the weights that made the rollouts. The reply is read from the distribution of one forward step, in both
orders, so that a habit of saying 1 or 2 cancels out: value = ½ [P(2 | original, processed) + P(1 | processed,
original)], with P normalised over the two ratings; 0.5 is no preference.
"""

import asyncio
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from thinkimg.conversation import compare
from thinkimg.engine.client import EngineClient, EngineUnavailable, ImageRef
from thinkimg.engine.errors import EngineError
from thinkimg.engine.media import Media
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judgement import Identity, Judgement, Pair

NAME, USES = "self", ("engine",)


def prompt(settings: JudgeSettings) -> str:
    return settings.hashed(compare.prompt_hash(), settings.model.dtype)


def identity(context: JudgeContext) -> Identity:
    assert context.policy is not None
    return Identity(NAME, "policy", context.policy.digest, prompt(context.settings))


def judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    """Raises EngineUnavailable where no server answers: then the stage stops, and goes on later from its closed
    parts."""
    return asyncio.run(_judge(pairs, context))


async def _judge(pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
    assert context.policy is not None
    settings = context.settings
    prompts = {question: compare.prompt(context.codec, question) for question in {pair.question for pair in pairs}}
    engine, adapter = await context.resources.engine(context.policy, settings.engine(prompts.values()), settings.base)
    async with engine:
        with tempfile.TemporaryDirectory(dir=context.resources.media) as scratch:
            refs = await asyncio.to_thread(
                references, pairs, context, Path(scratch) if engine.media == "file" else None
            )
            ratings = compare.rating_tokens(context.codec)

            async def one(pair: Pair) -> Judgement:
                found = await _compare(pair, engine, adapter, refs, prompts[pair.question], ratings)
                context.judged(1)
                return found

            return await asyncio.gather(*(one(pair) for pair in pairs))


def references(pairs: Sequence[Pair], context: JudgeContext, folder: Path | None) -> dict[str, ImageRef]:
    """What the engine is sent for each image: its view, encoded once."""
    media = Media(folder)

    def refer(sha256: str) -> ImageRef:
        seen = context.picture(sha256)
        return media.ref(seen.uuid, seen.view)

    hashes = sorted({sha for pair in pairs for sha in (pair.original, pair.processed)})
    return dict(zip(hashes, context.map(refer, hashes), strict=True))


async def _compare(
    pair: Pair, engine: EngineClient, adapter: str | None, refs: dict[str, ImageRef], prompt: list[int], ratings: list[int]
) -> Judgement:  # fmt: skip
    images = [refs[pair.original], refs[pair.processed]]
    try:
        found = await asyncio.gather(
            engine.next_token_logprobs(prompt, images, ratings, adapter),
            engine.next_token_logprobs(prompt, images[::-1], ratings, adapter),
        )
    except EngineUnavailable:
        raise
    except EngineError as error:
        return Judgement(None, f"The engine refused to judge: {error.message}", {})
    return verdict(*found)


def verdict(forward: Sequence[float], backward: Sequence[float]) -> Judgement:
    """From the log-probabilities of (1, 2) with the original shown first, and with the processed image shown first."""
    evidence = {"logprobs": [list(forward), list(backward)]}
    preferences = [preference(forward[1], forward[0]), preference(backward[0], backward[1])]
    if any(math.isnan(p) for p in preferences):
        return Judgement(None, "The model gives neither rating a probability.", {})
    return Judgement(sum(preferences) / 2, None, evidence | {"preferences": preferences})


def preference(chosen: float, other: float) -> float:
    """P(chosen) normalised over the two, from their log-probabilities; NaN if neither has any."""
    if chosen == other:
        return math.nan if chosen == -math.inf else 0.5
    return 1 / (1 + math.exp(min(other - chosen, 700.0)))
