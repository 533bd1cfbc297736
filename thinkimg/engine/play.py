"""Sampling of episodes: one asyncio task each, so that nobody waits for the slowest."""

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from PIL import Image

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import Episode, Outcome, seed
from thinkimg.conversation.picture import Picture, picture
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.conversation.tokens import TokenMismatch
from thinkimg.engine.client import EngineClient, EngineUnavailable, Sampling
from thinkimg.engine.errors import EngineError
from thinkimg.engine.media import Media
from thinkimg.images.settings import ViewLimits
from thinkimg.records import Sample
from thinkimg.store.image_table import ImageTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingMode:
    """How the turns of an episode are sampled; the seed of each is a hash of (policy, sample, index, turn).

    blind: every image that a tool makes is replaced by a grey one of the same size.
    """

    temperature: float
    blind: bool = False


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to be sampled: index tells those of one sample apart."""

    sample: Sample
    index: int
    mode: SamplingMode


@dataclass(frozen=True)
class ConversationSpec:
    """How all episodes go: their rules, the size at which images are seen, and the policy's tokens."""

    conversation: ConversationConfig
    view: ViewLimits
    codec: Codec


async def play(
    episode: Episode, engine: EngineClient, media: Media, mode: SamplingMode, adapter: str | None, pool: Executor
) -> Episode:
    """Play one conversation to its end. What the engine refuses or garbles ends it as a failed row, not as a crash.

    Raises EngineUnavailable where no server answers: then the stage stops, and goes on later from its closed parts.
    """
    loop = asyncio.get_running_loop()
    codec = episode.codec
    while episode.stop is None:
        refs = [await loop.run_in_executor(pool, media.ref, uuid, view) for uuid, view in episode.view_images]
        sampling = Sampling(
            temperature=mode.temperature,
            max_tokens=episode.budget(),
            seed=seed(episode.policy, episode.sample.sample_id, episode.index, len(episode.turns)),
            stop_token_ids=(codec.end,),
            banned_token_ids=codec.banned,
        )
        try:
            sampled = await engine.generate(episode.prompt_ids, refs, sampling, adapter)
            episode.stream.check(sampled.prompt_token_ids)
        except EngineUnavailable:
            raise
        except (EngineError, TokenMismatch) as error:
            episode.fail(str(error))
            episode.refused = True
            break
        call = episode.feed(sampled.token_ids, sampled.logprobs, sampled.finish_reason, sampled.weight_version)
        if call is not None:
            try:
                outcome = await loop.run_in_executor(pool, call.run)
                if mode.blind:
                    outcome = await loop.run_in_executor(pool, grey, outcome, episode.images_config)
            except Exception as error:  # a tool of ours or of the user's is broken: one row fails, not the run
                log.exception("the tool %s broke", call.call.name)
                episode.fail(f"The tool {call.call.name} broke: {type(error).__name__}: {error}")
                break
            episode.observe(outcome)
    return episode


def grey(outcome: Outcome, images: ViewLimits) -> Outcome:
    """The same outcome with a uniformly grey image in place of the one that the tool made."""
    if outcome.picture is None:
        return outcome
    blank = Image.new("RGB", outcome.picture.image.size, (128, 128, 128))
    return replace(outcome, picture=picture(blank, images))


class Sampler:
    """Samples episodes of a data set's samples from a policy that the engine holds; for one event loop.

    adapter: name under which the engine serves the policy, None where it holds its weights. pool: threads for tools and
    pictures, owned by the caller. concurrency: episodes under way at a time.
    """

    def __init__(
        self,
        spec: "ConversationSpec",
        images: ImageTable,
        policy: str,
        engine: EngineClient,
        adapter: str | None,
        media: Media,
        pool: Executor,
    ):
        self.spec, self.images, self.policy = spec, images, policy
        self.engine, self.adapter, self.media, self.pool = engine, adapter, media, pool
        self._pictures: dict[str, asyncio.Future[list[Picture]]] = {}
        self._playing: Counter[str] = Counter()  # episodes under way, by sample

    async def sample(
        self, jobs: Sequence[EpisodeSpec], progress: Callable[[int], None] = lambda done: None
    ) -> AsyncIterator[tuple[EpisodeSpec, Episode]]:
        """Play the episodes of `jobs`, those of one sample side by side; yields (job, episode) as they end.

        At most `engine.concurrency` are under way: one task each, and a new one begins when one ends.
        """
        waiting = iter(jobs)
        running: set[asyncio.Task[tuple[EpisodeSpec, Episode]]] = set()
        done = 0
        try:
            while True:
                while len(running) < self.engine.concurrency and (job := next(waiting, None)) is not None:
                    running.add(asyncio.create_task(self._play(job)))
                if not running:
                    return
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    done += 1
                    progress(done)
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _play(self, job: EpisodeSpec) -> tuple[EpisodeSpec, Episode]:
        sample = job.sample.sample_id
        self._playing[sample] += 1
        try:
            group = group_name(self.policy, sample)
            episode = Episode(
                job.sample, await self._pictures_of(job.sample), self.spec.conversation, self.spec.view, self.spec.codec,
                trajectory_id=f"{group}-{job.index}", group_id=group, index=job.index, policy=self.policy,
            )  # fmt: skip
            return job, await play(episode, self.engine, self.media, job.mode, self.adapter, self.pool)
        finally:
            self._playing[sample] -= 1
            if not self._playing[sample]:
                self._pictures.pop(sample, None)

    async def _pictures_of(self, sample: Sample) -> list[Picture]:
        """The sample's pictures, made once for all of its conversations that are under way."""
        if sample.sample_id not in self._pictures:
            loop = asyncio.get_running_loop()
            self._pictures[sample.sample_id] = loop.run_in_executor(self.pool, self._look, sample)
        return await asyncio.shield(self._pictures[sample.sample_id])

    def _look(self, sample: Sample) -> list[Picture]:
        return [picture(self.images.decoded(sha), self.spec.view) for sha in sample.images]


def group_name(policy: str, sample_id: str) -> str:
    """Name of the group of rollouts of a sample with a policy: 16 hex digits."""
    return hashlib.sha256(json.dumps([policy, sample_id]).encode()).hexdigest()[:16]
