"""Sampling of episodes: one asyncio task each, so that none waits for the slowest.

    rollout, evaluate ──► Sampler ─┐                  ┌─► sample_turn ──► EngineClient
    serving ───────────────────────┴─► play_episode ──┴─► play_turns (tools, observations) ──► Turn, Turn, …
    environments ─────────────────────────► play_turns, with their own sampling

Whoever samples elsewhere, as an adapter to another framework, hands play_turns a function of its own.
"""

import asyncio
import gc
import hashlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from PIL import Image

from thinkimg.conversation.episode import ConversationSpec, Episode, derive_seed
from thinkimg.conversation.picture import Picture, make_picture
from thinkimg.conversation.text_core import Outcome, PendingCall, TextCore
from thinkimg.conversation.tokens import TokenMismatch
from thinkimg.engine.client import EngineClient, EngineUnavailable
from thinkimg.engine.errors import EngineError
from thinkimg.engine.media import Media
from thinkimg.engine.request import Sampling
from thinkimg.errors import is_passing
from thinkimg.images.settings import ViewLimits
from thinkimg.records import Sample, StopReason, Turn
from thinkimg.store.image_table import ImageTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingMode:
    """Sampling of an episode's turns; the seed of each is a hash of (policy, sample, index, turn)."""

    temperature: float
    blind: bool = False
    """Replace every image that a tool makes by a grey one of the same size."""
    max_tokens: int | None = None
    """Tokens of all turns together, at most; None: as many as the conversation's limits admit."""


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to be sampled."""

    sample: Sample
    index: int
    """Number of the episode among those of its sample."""
    mode: SamplingMode


async def play_turns(
    core: TextCore, take_turn: Callable[[], Awaitable[PendingCall | None]], pool: Executor, *, blind: bool = False
) -> AsyncIterator[Turn]:
    """Play a conversation to its end; yield each turn after its tool has run and the model was told the outcome.

    take_turn: samples one turn and has the conversation read it. blind: as in SamplingMode. A tool that breaks makes
    the conversation fail.
    """
    loop = asyncio.get_running_loop()
    while core.stop is None:
        number = len(core.turns)
        call = await take_turn()
        if call is not None:
            try:
                outcome = await loop.run_in_executor(pool, run_tool, call)
                if blind:
                    outcome = await loop.run_in_executor(pool, grey_out, outcome, core.view)
            except Exception as error:  # a tool of ours or of the user's is broken: one row fails, not the run
                log.exception("the tool %s broke", call.call.name)
                core.fail(f"The tool {call.call.name} broke: {type(error).__name__}: {error}")
                core.refused, core.passing = True, is_passing(error)
            else:
                core.observe(outcome)
        for turn in core.turns[number:]:  # none where the engine refused it
            yield turn


def play_episode(
    episode: Episode, engine: EngineClient, media: Media, mode: SamplingMode, pool: Executor
) -> AsyncIterator[Turn]:
    """Play one conversation with an engine; yield its turns. A request that the engine refuses makes it fail.

    `refused` and `passing` say whether it may be played again. Raises EngineUnavailable where no server answers: the
    stage stops, and goes on later from its closed parts.
    """

    async def take_turn() -> PendingCall | None:
        return await sample_turn(episode, engine, media, mode, pool)

    return play_turns(episode, take_turn, pool, blind=mode.blind)


async def sample_turn(
    episode: Episode, engine: EngineClient, media: Media, mode: SamplingMode, pool: Executor
) -> PendingCall | None:
    """Sample the next turn and feed it: the one place where tokens come from. Returns a call that is to be run.

    Raises EngineUnavailable; any other error of the engine makes the episode fail.
    """
    budget, codec = episode.budget(), episode.codec
    if mode.max_tokens is not None:
        budget = min(budget, mode.max_tokens - sum(turn.tokens for turn in episode.turns))
        if budget < 1:
            episode.stop = StopReason.MAX_TOKENS
            return None
    sampling = Sampling(
        temperature=mode.temperature,
        max_tokens=budget,
        seed=derive_seed(episode.policy, episode.sample.sample_id, episode.index, len(episode.turns)),
        stop_token_ids=(codec.end,),
        banned_token_ids=codec.banned,
    )
    try:
        async with media.lend(episode.view_images, pool) as refs:
            sampled = await engine.generate(episode.prompt_ids, refs, sampling)
        episode.stream.check(sampled.prompt_token_ids)
    except EngineUnavailable:
        raise
    except (EngineError, TokenMismatch) as error:
        episode.fail(str(error))
        episode.refused = True
        return None
    return episode.feed(sampled.token_ids, sampled.logprobs, sampled.finish_reason, sampled.weight_version)


def run_tool(call: PendingCall) -> Outcome:
    """Return what a tool makes. No future can carry a StopIteration: whoever waits for it would wait for ever."""
    try:
        return call.run()
    except StopIteration as error:
        raise RuntimeError("StopIteration") from error


def grey_out(outcome: Outcome, images: ViewLimits) -> Outcome:
    """Return the outcome with a uniformly grey image in place of the one that the tool made."""
    if outcome.picture is None:
        return outcome
    blank = Image.new("RGB", outcome.picture.image.size, (128, 128, 128))
    return replace(outcome, picture=make_picture(blank, images))


class Sampler:
    """Sampler of episodes from the policy that the engine holds, for one event loop.

    images: those of the data set. policy: its digest. adapter: name under which the engine serves the policy, None
    where it holds its weights. pool: threads for tools and pictures, owned by the caller.
    """

    def __init__(
        self,
        spec: ConversationSpec,
        images: ImageTable,
        policy: str,
        engine: EngineClient,
        media: Media,
        pool: Executor,
    ):
        self.spec, self.images, self.policy = spec, images, policy
        self.engine, self.media, self.pool = engine, media, pool
        self._pictures: dict[str, asyncio.Future[list[Picture]]] = {}
        self._playing: Counter[str] = Counter()  # episodes under way, by sample

    async def sample(
        self, jobs: Iterable[EpisodeSpec], progress: Callable[[int], None] = lambda done: None
    ) -> AsyncIterator[tuple[EpisodeSpec, Episode]]:
        """Play the episodes of `jobs`; yields (job, episode) in the order in which they end.

        At most `engine.concurrency` are under way at a time. progress: called with the number that have ended.
        """
        waiting = iter(jobs)
        running: set[asyncio.Task[tuple[EpisodeSpec, Episode]]] = set()
        # asyncio.wait looks at all of its tasks for each that ends.
        ended: asyncio.Queue[asyncio.Task[tuple[EpisodeSpec, Episode]]] = asyncio.Queue()
        done = 0
        gc.freeze()  # else each full collection walks the million objects of the libraries (docs/design.md)
        try:
            while True:
                while len(running) < self.engine.concurrency and (job := next(waiting, None)) is not None:
                    running.add(task := asyncio.create_task(self._play(job)))
                    task.add_done_callback(ended.put_nowait)
                if not running:
                    return
                task = await ended.get()
                done += 1
                progress(done)  # what it raises ends this: the task is still one of those that are waited for
                running.remove(task)
                yield task.result()
        finally:
            gc.unfreeze()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _play(self, job: EpisodeSpec) -> tuple[EpisodeSpec, Episode]:
        sample = job.sample.sample_id
        self._playing[sample] += 1
        try:
            group, pictures = name_group(self.policy, sample), await self._pictures_of(job.sample)
            episode = Episode(job.sample, pictures, self.spec, policy=self.policy, group_id=group, index=job.index)
            async for _ in play_episode(episode, self.engine, self.media, job.mode, self.pool):
                pass
            return job, episode
        finally:
            self._playing[sample] -= 1
            if not self._playing[sample]:
                self._pictures.pop(sample, None)

    async def _pictures_of(self, sample: Sample) -> list[Picture]:
        """Return the sample's pictures, made once for all of its episodes under way."""
        if sample.sample_id not in self._pictures:
            loop = asyncio.get_running_loop()
            self._pictures[sample.sample_id] = loop.run_in_executor(self.pool, self._make_pictures, sample)
        return await asyncio.shield(self._pictures[sample.sample_id])

    def _make_pictures(self, sample: Sample) -> list[Picture]:
        return [make_picture(self.images.decoded(sha), self.spec.view) for sha in sample.images]


def name_group(policy: str, sample_id: str) -> str:
    """Return the name of the group of a sample's rollouts with a policy: 16 hex digits."""
    return hashlib.sha256(json.dumps([policy, sample_id]).encode()).hexdigest()[:16]
