"""Plays conversations against the engine: one asyncio task each, so that nobody waits for the slowest."""

import asyncio
import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Self

from PIL import Image

from thinkimg.config import Config, ImagesConfig
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import Episode, Outcome, seed
from thinkimg.conversation.picture import Picture, picture
from thinkimg.conversation.tokens import TokenMismatch
from thinkimg.engine import EngineError
from thinkimg.engine.client import EngineClient, EngineUnavailable, ImageRef, Sampling
from thinkimg.records import Sample
from thinkimg.resources import Machines
from thinkimg.store.artifacts import Artifact
from thinkimg.store.image_table import ImageTable, encode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Play:
    """How the turns of a conversation are sampled; the seed of each is a hash of (policy, sample, index, turn).

    blind: every image that a tool makes is replaced by a grey one of the same size.
    """

    temperature: float
    blind: bool = False


@dataclass(frozen=True)
class Job:
    """One conversation to be played: index tells those of one sample apart."""

    sample: Sample
    index: int
    how: Play


class Media:
    """Encodes each unique picture once and offers it to the engine as a file in `folder`, or as data without one."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._known: dict[str, ImageRef] = {}
        self._making: dict[str, Lock] = {}
        self._lock = Lock()

    def ref(self, uuid: str, image: Image.Image) -> ImageRef:
        """For any number of threads: the first that asks for a picture makes it, the others wait for that."""
        with self._lock:
            making = self._making.setdefault(uuid, Lock())
        with making:
            if uuid not in self._known:
                data = encode(image)
                if self.folder is None:
                    self._known[uuid] = ImageRef(uuid, data=data)
                else:
                    path = self.folder / f"{uuid}.webp"
                    path.write_bytes(
                        data
                    )  # scratch for the engine's eyes, gone with the players: not for the file layer
                    self._known[uuid] = ImageRef(uuid, path=path)
            return self._known[uuid]


async def play(
    episode: Episode, engine: EngineClient, media: Media, how: Play, adapter: str | None, pool: Executor
) -> Episode:
    """Play one conversation to its end. What the engine refuses or garbles ends it as a failed row, not as a crash.

    Raises EngineUnavailable where no server answers: then the stage stops, and goes on later from its closed parts.
    """
    loop = asyncio.get_running_loop()
    codec = episode.codec
    while episode.stop is None:
        refs = [await loop.run_in_executor(pool, media.ref, uuid, view) for uuid, view in episode.view_images]
        sampling = Sampling(
            temperature=how.temperature,
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
                if how.blind:
                    outcome = await loop.run_in_executor(pool, grey, outcome, episode.images_config)
            except Exception as error:  # a tool of ours or of the user's is broken: one row fails, not the run
                log.exception("the tool %s broke", call.call.name)
                episode.fail(f"The tool {call.call.name} broke: {type(error).__name__}: {error}")
                break
            episode.observe(outcome)
    return episode


def grey(outcome: Outcome, images: ImagesConfig) -> Outcome:
    """The same outcome with a uniformly grey image in place of the one that the tool made."""
    if outcome.picture is None:
        return outcome
    blank = Image.new("RGB", outcome.picture.image.size, (128, 128, 128))
    return replace(outcome, picture=picture(blank, images))


def view_limits(config: Config) -> dict[str, int]:
    """What decides how large the model sees a picture."""
    return {"min_pixels": config.images.min_pixels, "max_pixels": config.images.max_pixels}


class Players:
    """Async context manager: plays samples of a data set with a policy, on the machines of the loop."""

    def __init__(self, config: Config, dataset: Artifact, policy: Artifact, crew: Machines):
        self.config, self.dataset, self.policy, self.crew = config, dataset, policy, crew
        self._pictures: dict[str, asyncio.Future[list[Picture]]] = {}
        self._playing: Counter[str] = Counter()  # conversations under way, by sample

    async def __aenter__(self) -> Self:
        self.codec = Codec.load(self.crew.vocabulary(self.policy))
        self.engine, self.adapter = await self.crew.engine(self.policy)
        self.pool = ThreadPoolExecutor(self.config.where.workers, thread_name_prefix="tools")
        self.images = ImageTable([self.dataset])
        self._scratch = tempfile.TemporaryDirectory(dir=self.crew.media)
        self.media = Media(Path(self._scratch.name) if self.engine.media == "file" else None)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        await self.engine.__aexit__(*error)
        self._scratch.cleanup()

    async def play(
        self, jobs: Sequence[Job], progress: Callable[[int], None] = lambda done: None
    ) -> AsyncIterator[tuple[Job, Episode]]:
        """Play jobs, those of one sample side by side; yields (job, episode) as they end.

        At most `engine.concurrency` are under way: one task each, and a new one begins when one ends.
        """
        waiting = iter(jobs)
        running: set[asyncio.Task[tuple[Job, Episode]]] = set()
        done = 0
        try:
            while True:
                while len(running) < self.config.where.engine.concurrency and (job := next(waiting, None)) is not None:
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

    async def _play(self, job: Job) -> tuple[Job, Episode]:
        sample = job.sample.sample_id
        self._playing[sample] += 1
        try:
            group = identity(self.policy.digest, sample)
            episode = Episode(
                job.sample, await self._seen(job.sample), self.config.conversation, self.config.images, self.codec,
                trajectory_id=f"{group}-{job.index}", group_id=group, index=job.index, policy=self.policy.digest,
            )  # fmt: skip
            return job, await play(episode, self.engine, self.media, job.how, self.adapter, self.pool)
        finally:
            self._playing[sample] -= 1
            if not self._playing[sample]:
                self._pictures.pop(sample, None)

    async def _seen(self, sample: Sample) -> list[Picture]:
        """The sample's pictures, made once for all of its conversations that are under way."""
        if sample.sample_id not in self._pictures:
            loop = asyncio.get_running_loop()
            self._pictures[sample.sample_id] = loop.run_in_executor(self.pool, self._look, sample)
        return await asyncio.shield(self._pictures[sample.sample_id])

    def _look(self, sample: Sample) -> list[Picture]:
        return [picture(self.images.decoded(sha), self.config.images) for sha in sample.images]


def identity(policy: str, sample_id: str) -> str:
    """Name of the group of rollouts of a sample with a policy: 16 hex digits."""
    return hashlib.sha256(json.dumps([policy, sample_id]).encode()).hexdigest()[:16]
