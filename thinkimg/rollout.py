"""Plays conversations against the engine: one asyncio task each, so that nobody waits for the slowest."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from PIL import Image

from thinkimg.artifacts import Artifact
from thinkimg.chat.codec import Codec
from thinkimg.chat.episode import Episode, Outcome, seed
from thinkimg.chat.picture import Picture, picture
from thinkimg.chat.tokens import TokenMismatch
from thinkimg.config import Config
from thinkimg.data.images import ImageTable, encode
from thinkimg.engine import EngineError
from thinkimg.engine.client import EngineClient, EngineUnavailable, ImageRef, Sampling
from thinkimg.machines import Machines
from thinkimg.schemas import Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Play:
    """How the turns of all conversations are sampled; the seed of each is a hash of (policy, sample, index, turn).

    blind: every image that a tool makes is replaced by a grey one of the same size.
    """

    temperature: float
    top_p: float = 1.0
    adapter: str | None = None
    blind: bool = False


class Media:
    """Encodes each unique picture once and offers it to the engine as a file in `folder`, or as data without one."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._known: dict[str, ImageRef] = {}

    def ref(self, uuid: str, image: Image.Image) -> ImageRef:
        if uuid not in self._known:
            data = encode(image)
            if self.folder is None:
                self._known[uuid] = ImageRef(uuid, data=data)
            else:
                path = self.folder / f"{uuid}.webp"
                path.write_bytes(data)  # scratch for the engine's eyes, gone with the loop: not for the file layer
                self._known[uuid] = ImageRef(uuid, path=path)
        return self._known[uuid]

    def forget(self, uuids: Iterable[str]) -> None:
        """Drop pictures of conversations that have ended, so that memory and scratch do not grow with the run."""
        for uuid in uuids:
            ref = self._known.pop(uuid, None)
            if ref is not None and ref.path is not None:
                ref.path.unlink(missing_ok=True)


async def play(episode: Episode, engine: EngineClient, media: Media, how: Play, pool: Executor) -> Episode:
    """Play one conversation to its end. What the engine refuses or garbles ends it as a failed row, not as a crash.

    Raises EngineUnavailable where no server answers: then the stage stops, and goes on later from its closed parts.
    """
    loop = asyncio.get_running_loop()
    codec = episode.codec
    while episode.stop is None:
        refs = [await loop.run_in_executor(pool, media.ref, uuid, view) for uuid, view in episode.view_images]
        sampling = Sampling(
            temperature=how.temperature,
            top_p=how.top_p,
            max_tokens=episode.budget(),
            seed=seed(episode.policy, episode.sample.sample_id, episode.index, len(episode.turns)),
            stop_token_ids=(codec.end,),
            banned_token_ids=codec.banned,
        )
        try:
            sampled = await engine.generate(episode.prompt_ids, refs, sampling, how.adapter)
            episode.stream.check(sampled.prompt_token_ids)
        except EngineUnavailable:
            raise
        except (EngineError, TokenMismatch) as error:
            episode.fail(str(error))
            break
        call = episode.feed(sampled.token_ids, sampled.logprobs, sampled.finish_reason, sampled.weight_version)
        if call is not None:
            try:
                outcome = await loop.run_in_executor(pool, call.run)
            except Exception as error:  # a tool of ours or of the user's is broken: one row fails, not the run
                log.exception("the tool %s broke", call.call.name)
                episode.fail(f"The tool {call.call.name} broke: {type(error).__name__}: {error}")
                break
            episode.observe(grey(outcome, episode) if how.blind else outcome)
    return episode


def grey(outcome: Outcome, episode: Episode) -> Outcome:
    """The same outcome with a uniformly grey image in place of the one that the tool made."""
    if outcome.picture is None:
        return outcome
    blank = Image.new("RGB", outcome.picture.image.size, (128, 128, 128))
    return replace(outcome, picture=picture(blank, episode.images_config))


async def collect(
    episodes: Iterable[Episode],
    engine: EngineClient,
    media: Media,
    how: Play,
    pool: Executor,
    *,
    concurrency: int,
    progress: Callable[[int], None] = lambda done: None,
) -> AsyncIterator[Episode]:
    """Yield episodes as they end. At most `concurrency` are under way; a new one is made when one ends."""
    waiting = iter(episodes)
    running: set[asyncio.Task[Episode]] = set()
    done = 0
    try:
        while True:
            while len(running) < concurrency and (episode := next(waiting, None)) is not None:
                running.add(asyncio.create_task(play(episode, engine, media, how, pool)))
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


def view_limits(config: Config) -> dict[str, int]:
    """What decides how large the model sees a picture."""
    return {"min_pixels": config.images.min_pixels, "max_pixels": config.images.max_pixels}


class Players:
    """Async context manager: plays samples of a data set with a policy, on the machines of the loop."""

    def __init__(self, config: Config, dataset: Artifact, policy: Artifact, crew: Machines):
        self.config, self.dataset, self.policy, self.crew = config, dataset, policy, crew

    async def __aenter__(self) -> Self:
        self.engine, self.adapter = await self.crew.engine(self.policy)
        self.codec = Codec.load(self.crew.vocabulary(self.policy))
        self.pool = ThreadPoolExecutor(self.config.where.workers, thread_name_prefix="tools")
        self.images = ImageTable([self.dataset])
        self.media = Media(self.crew.media if self.engine.media == "file" else None)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        await self.engine.__aexit__(*error)

    async def play(
        self, jobs: Sequence[tuple[Sample, int, Any]], how: Play, progress: Callable[[int], None] = lambda done: None
    ) -> AsyncIterator[tuple[Any, Episode]]:
        """Play (sample, index, key) conversations, those of one sample side by side; yields (key, episode) as they end."""
        how = replace(how, adapter=self.adapter)
        keys: dict[str, Any] = {}
        seen: dict[str, list[Picture]] = {}  # pictures of the newest sample only: its conversations share them

        def episodes() -> Iterable[Episode]:
            for sample, index, key in jobs:
                if sample.sample_id not in seen:
                    seen.clear()
                    seen[sample.sample_id] = [
                        picture(self.images.decoded(sha), self.config.images) for sha in sample.images
                    ]
                group = identity(self.policy.digest, sample.sample_id)
                episode = Episode(
                    sample, seen[sample.sample_id], self.config.conversation, self.config.images, self.codec,
                    trajectory_id=f"{group}-{index}", group_id=group, index=index, policy=self.policy.digest,
                )  # fmt: skip
                keys[episode.trajectory_id] = key
                yield episode

        concurrency = self.config.where.engine.concurrency
        ended = collect(episodes(), self.engine, self.media, how, self.pool, concurrency=concurrency, progress=progress)
        async for episode in ended:
            yield keys.pop(episode.trajectory_id), episode


def identity(policy: str, sample_id: str) -> str:
    """Name of the group of rollouts of a sample with a policy: 16 hex digits."""
    return hashlib.sha256(json.dumps([policy, sample_id]).encode()).hexdigest()[:16]
