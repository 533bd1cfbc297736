"""Rollouts at scale: thinkimg's Sampler against eight simulated servers of a 7B (simulated_engine.py).

    python benchmarks/rollouts_at_scale.py                             10,000 conversations, small pictures
    python benchmarks/rollouts_at_scale.py --conversations 100000
    python benchmarks/rollouts_at_scale.py --conversations 1000 --side 868

Reports the client's CPU time per conversation, its memory over time, how busy the servers were, and the throughput
against a loop that waits for the slowest of each turn, with as many conversations as the servers have slots.

Busy is the mean share of a server's batch slots that decode or are prefilled. It is measured from the first to the last
moment at which conversations waited to be begun, in simulated seconds.
"""

import asyncio
import ctypes
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import aiohttp
import cyclopts
import numpy as np
import psutil
from barrier import Barrier
from PIL import Image

from thinkimg.conversation.episode import ConversationSpec, render_system_prompt
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.engine.client import EngineClient
from thinkimg.engine.media import Media
from thinkimg.engine.play import EpisodeSpec, Sampler, SamplingMode
from thinkimg.images.decode import pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.models.family import load_family
from thinkimg.models.tiny import write_processor, write_tokenizer
from thinkimg.records import AnswerType, Sample, StopReason
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable, encode_lossless, image_writer
from thinkimg.store.manifest import Artifact, Recipe

GROUP, SERVERS, PROCESSES = 8, 8, 2
CACHE_BYTES = 16 * 2**20
SAMPLES_OF_MEMORY = 60  # of a run


@dataclass(frozen=True)
class World:
    """Samples, their images, and the rules of their conversations."""

    samples: list[Sample]
    dataset: Artifact
    spec: ConversationSpec
    vocabulary: Path
    side: int


@dataclass(frozen=True)
class Played:
    """Figures of one run."""

    conversations: int
    seconds: float
    cpu: float
    memory: list[int]
    """Bytes, at equal distances."""
    servers: list[dict[str, float]]
    throughput: float
    """Conversations per simulated second, while conversations waited to be begun."""

    @property
    def busy(self) -> float:
        """Mean share of the slots that were filled."""
        return float(np.mean([server["filled"] / server["seconds"] for server in self.servers]))


def make_world(folder: Path, samples: int, side: int) -> World:
    """Write a vocabulary and a data set of `samples` pictures of `side` x `side` pixels."""
    conversation = ConversationConfig(max_turn_tokens=512)
    corpus = [render_system_prompt(conversation), " I look at the picture and think about what it shows."]
    (vocabulary := folder / "vocabulary").mkdir()
    write_tokenizer(vocabulary, corpus, 4096, load_family("qwen2_5_vl"))
    write_processor(vocabulary, load_family("qwen2_5_vl"))
    made: list[Sample] = []

    def produce(work) -> None:
        with work.part("images-00000.parquet") as path, image_writer(path) as add:
            for number in range(samples):
                rng = np.random.default_rng(number)
                small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image = small.resize((side, side), Image.Resampling.BICUBIC)
                sha256 = pixel_hash(image)
                add(sha256, encode_lossless(image), side, side)
                question = "Which way do the stripes run?"
                made.append(Sample(f"s{number}", question, ("left",), AnswerType.TEXT, (), (sha256,), "noise", "train"))

    dataset, _ = Store(folder / "store").build("dataset", Recipe("prepare", 1, 1, {}), produce)
    spec = ConversationSpec.load(conversation, ViewLimits(min_pixels=56 * 56, max_pixels=1280 * 28 * 28), vocabulary)
    return World(made, dataset, spec, vocabulary, side)


@contextmanager
def simulated(world: World, slots: int, speed: float, spread: float = 0.7) -> Iterator[list[str]]:
    """Yield the URLs of the servers, which end with the context."""
    command = [sys.executable, str(Path(__file__).with_name("simulated_engine.py")), str(world.vocabulary)]
    options = [f"--servers={SERVERS // PROCESSES}", f"--slots={slots}", f"--speed={speed}", f"--spread={spread}"]
    options.append(f"--side={world.side}")
    processes = [
        subprocess.Popen([*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    try:
        yield [url for process in processes for url in json.loads(process.stdout.readline())]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()


async def ask(urls: list[str], method: str, path: str) -> list[dict[str, float]]:
    """Return every server's answer."""
    async with aiohttp.ClientSession() as session:

        async def request(url: str) -> dict[str, float]:
            async with session.request(method, url + path) as answer:
                return await answer.json()

        return await asyncio.gather(*map(request, urls))


def resident() -> int:
    """Bytes of this process, without what malloc keeps."""
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


class Jobs:
    """Iterator over the episodes of all samples; `empty` is set when the last has been begun."""

    def __init__(self, world: World, conversations: int):
        mode = SamplingMode(1.0)
        self._jobs = (EpisodeSpec(world.samples[i // GROUP], i % GROUP, mode) for i in range(conversations))
        self.empty = asyncio.Event()

    def __iter__(self) -> "Jobs":
        return self

    def __next__(self) -> EpisodeSpec:
        try:
            return next(self._jobs)
        except StopIteration:
            self.empty.set()
            raise


async def play(
    world: World, urls: list[str], conversations: int, concurrency: int, media: Literal["file", "data"], *, batch: int
) -> Played:
    """Play all conversations: freely, or in batches of `batch` (0: freely) that play turn by turn."""
    memory: list[int] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(2) as pool,
    ):
        async with EngineClient(urls, media=media, concurrency=concurrency) as engine:
            # Caches that are full early, so that what is left to grow would be a leak.
            kept = Media(Path(scratch) if media == "file" else None, cache_bytes=CACHE_BYTES)
            images = ImageTable([world.dataset], cache_bytes=CACHE_BYTES)
            sampler = Sampler(world.spec, images, "policy", engine, kept, pool)
            await ask(urls, "POST", "/simulation/reset")
            jobs = Jobs(world, conversations)
            figures: asyncio.Task | None = None
            started, cpu, done, done_at_end = time.perf_counter(), time.process_time(), 0, 0

            async def count(specs, leave=lambda: None) -> None:
                nonlocal done, figures, done_at_end
                async for _, episode in sampler.sample(specs):
                    assert episode.stop is not StopReason.FAILED, episode.error
                    leave()
                    done += 1
                    if done % max(1, conversations // SAMPLES_OF_MEMORY) == 0:
                        memory.append(resident())
                        spent = time.perf_counter() - started
                        print(f"  {done} after {spent:.0f} s, {memory[-1] / 2**20:.0f} MiB", file=sys.stderr)
                    if figures is None and jobs.empty.is_set():
                        figures, done_at_end = asyncio.create_task(ask(urls, "GET", "/simulation")), done

            if batch:
                while specs := list(itertools.islice(jobs, batch)):
                    sampler.engine = barrier = Barrier(engine, len(specs))
                    await count(specs, barrier.leave)
                figures, done_at_end = asyncio.create_task(ask(urls, "GET", "/simulation")), done
            else:
                await count(jobs)
            assert figures is not None
            servers = await figures
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    throughput = done_at_end / float(np.mean([server["seconds"] for server in servers]))
    return Played(done, seconds, cpu, memory, servers, throughput)


def describe(name: str, played: Played) -> None:
    """Print one run."""
    third = max(1, len(played.memory) // 3)
    first, last = np.mean(played.memory[:third]) / 2**20, np.mean(played.memory[-third:]) / 2**20
    full = np.mean([server["full"] / server["seconds"] for server in played.servers])
    tokens = sum(server["tokens"] for server in played.servers)
    print(f"{name}: {played.conversations} conversations in {played.seconds:.0f} s", flush=True)
    print(f"  client's CPU     {1000 * played.cpu / played.conversations:.2f} ms per conversation")
    print(f"  memory           {first:.0f} MiB in the first third, {last:.0f} in the last, {last / first:.3f}")
    print(f"  servers          busy {played.busy:.1%} of their slots, all slots filled {full:.1%} of the time")
    print(f"  throughput       {played.throughput:.1f} conversations, {tokens:.0f} tokens sampled", flush=True)


def main(
    *,
    conversations: int = 10_000,
    together: int = 2_048,
    slots: int = 64,
    speed: float = 1.0,
    spread: float = 0.7,
    side: int = 112,
    media: Literal["file", "data"] = "data",
) -> None:
    """Measure the loop, and one that plays turn by turn.

    together: conversations of the second; 0: leave it out. slots: of a server. speed: of the servers' time. spread: of
    the logarithm of a turn's length. side: of a picture, in pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), -(-max(conversations, together) // GROUP), side)
        total = SERVERS * slots
        with simulated(world, slots, speed, spread) as urls:
            free = asyncio.run(play(world, urls, conversations, total * 5 // 4, media, batch=0))
        describe("loop", free)
        if together:
            with simulated(world, slots, speed, spread) as urls:
                barred = asyncio.run(play(world, urls, together, total, media, batch=total))
            describe("turn by turn", barred)
            print(f"the loop is {free.throughput / barred.throughput:.2f} times as fast")


if __name__ == "__main__":
    cyclopts.run(main)
