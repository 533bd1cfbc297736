"""Let a policy play an iteration's samples."""

import asyncio
import json
import logging
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from thinkimg import records
from thinkimg.closure import engine_package
from thinkimg.config.tree import Config
from thinkimg.conversation.episode import ConversationSpec, Episode
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.engine.media import Media
from thinkimg.engine.play import EpisodeSpec, Sampler, SamplingMode
from thinkimg.engine.settings import EngineSettings, RolloutConfig
from thinkimg.errors import UserError, check_share, shorten
from thinkimg.images.settings import ViewLimits
from thinkimg.models.base import BaseSource
from thinkimg.records import CallStatus, Sample, StopReason, Trajectory, TurnKind, to_row
from thinkimg.resources import Resources
from thinkimg.stages.stage import Input, Job, Lineage, Parameter, Slice, Stage, write_images
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset, Policy, Rollouts, read_columns, read_trajectories
from thinkimg.store.manifest import MANIFEST, Artifact, read_manifest
from thinkimg.store.spool import ImageSpool, RowSpool

log = logging.getLogger(__name__)

PARTS = 8  # an iteration is published in this many parts
FEW = 2  # samples of a part


class PlaySettings(Slice):
    """Settings of conversations that a policy plays."""

    conversation: ConversationConfig
    images: ViewLimits
    precision: str
    """Precision of the weights in the engine."""
    base: BaseSource = Field(exclude=True)

    @property
    def engine(self) -> EngineSettings:
        """Limits of a server for these conversations."""
        return EngineSettings(
            dtype=self.precision,
            max_tokens=self.conversation.max_tokens,
            max_images=self.conversation.max_images,
            max_pixels=self.images.max_pixels,
        )


class RolloutSettings(PlaySettings):
    """Slice of `rollout`."""

    rollout: RolloutConfig
    iteration: int
    seed: int


def play_settings(config: Config) -> dict:
    """Return the fields of PlaySettings."""
    return {
        "conversation": config.talk(),
        "images": config.view(),
        "precision": config.model.precision,
        "base": BaseSource.of(config.model),
        "family": config.family().name,
    }


def settings_of(config: Config, iteration: int = 1) -> RolloutSettings:
    """Return the slice of the config."""
    return RolloutSettings(**play_settings(config), rollout=config.rollout, iteration=iteration, seed=config.seed)


def run(job: Job[RolloutSettings]) -> None:
    """Play `rollout.samples` x `rollout.group_size` conversations, in parts that hold whole groups.

    Raises UserError where every conversation failed, EngineError where the engine cannot be reached.
    """
    settings, work = job.settings, job.work
    samples = job.inputs["dataset"].split("train")
    samples = draw_samples(samples, settings.rollout.samples, settings.iteration, settings.seed)
    modes = [SamplingMode(settings.rollout.temperature)] * settings.rollout.group_size
    started = time.perf_counter()
    tokens = asyncio.run(play_parts(job, samples, modes))
    work.metrics |= summarise_rows(read_closed(work))
    report_failures(read_closed(work))
    if tokens:
        work.where["tokens_per_s"] = round(tokens / (time.perf_counter() - started), 1)


def draw_samples(samples: list[Sample], count: int, iteration: int, seed: int) -> list[Sample]:
    """Return the samples of an iteration (from 1), none twice; every sample is drawn once before any comes again.

    Where an epoch ends within an iteration, the samples that the iteration has already come last in the next epoch. If
    there are fewer samples than `count`, all are drawn every time.
    """
    count = min(count, len(samples))
    queue: list[int] = []
    epoch = 0
    for _ in range(iteration):
        if len(queue) < count:
            order = np.random.default_rng([seed, 1, epoch]).permutation(len(samples)).tolist()
            queue += sorted(order, key=lambda i: i in queue)  # stable: samples of the old epoch come last
            epoch += 1
        drawn, queue = queue[:count], queue[count:]
    return [samples[i] for i in drawn]


@asynccontextmanager
async def open_sampler(settings: PlaySettings, dataset: Dataset, policy: Policy, resources: Resources):
    """Yield a Sampler whose engine holds the policy."""
    spec = ConversationSpec.load(settings.conversation, settings.images, policy.vocabulary)
    engine = await resources.engine(policy, settings.engine, settings.base)
    pool = ThreadPoolExecutor(resources.where.workers, thread_name_prefix="tools")
    async with engine:
        with tempfile.TemporaryDirectory(dir=resources.media) as scratch:
            room = resources.where.engine.image_cache_gib * 2**30
            media = Media(Path(scratch) if engine.media == "file" else None, room)
            try:
                yield Sampler(spec, ImageTable([dataset]), policy.digest, engine, media, pool)
            finally:
                pool.shutdown(cancel_futures=True)


async def play_parts(
    job: Job[PlaySettings], samples: list[Sample], modes: list[SamplingMode], *, keep_images: bool = True
) -> int:
    """Play each sample once per entry of `modes`, and close the parts that are not closed yet.

    keep_images: store the images of tools, too; they can be made again from the data set and the calls. Returns the
    number of tokens sampled now. Raises UserError where every conversation of the artifact failed, most were refused,
    or machine or network failed.

    A conversation that engine or tool refused is played a second time when the others of its part have ended. If it is
    refused again, its part is closed when all have ended: before, nobody knows whose fault the refusal is, and the next
    run would take the part for finished work. A part of which most samples were refused is not closed at all.
    """
    work = job.work
    size = -(-len(samples) // PARTS)
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    part_of = {sample.sample_id: number for number, part in enumerate(parts) for sample in part}
    discard_parts(work, [number for number in range(len(parts)) if find_total_failure(work, [number])])
    missing = [number for number in range(len(parts)) if not work.has(f"trajectories-{number:05}.parquet")]
    discard_parts(work, missing)  # images of conversations that were never closed: others will be played
    indices = range(len(modes))
    specs = [EpisodeSpec(sample, i, modes[i]) for number in missing for sample in parts[number] for i in indices]
    total = len(samples) * len(modes)
    ended: dict[int, OpenPart] = {}
    again: dict[int, list[EpisodeSpec]] = {number: [] for number in missing}
    errors: dict[str, list[str]] = defaultdict(list)  # of those refused twice, by sample
    waiting = Waiting(specs)
    tokens = 0

    def progress(done: int) -> None:
        job.progress(min(total - len(specs) + done, total), total)  # some are played twice

    if specs:
        opened = open_sampler(job.settings, job.inputs["dataset"], job.inputs["policy"], job.resources)
        async with AsyncExitStack() as stack, opened as sampler, Writer() as writer:
            for number in missing:
                images = ImageSpool(work.directory, sampler.pool) if keep_images else None
                ended[number] = OpenPart(images and await stack.enter_async_context(images))
            # The packages of the recipe are this machine's; the servers of where.engine.urls have their own.
            work.where["engine_releases"] = await sampler.engine.releases()

            async def close(number: int) -> None:
                nonlocal tokens
                part, keys = ended.pop(number), [(sample.sample_id, i) for sample in parts[number] for i in indices]
                tokens += part.tokens
                if part.images is not None:
                    await part.images.done()
                await writer.write(work, number, part, keys)

            async for spec, episode in sampler.sample(waiting, progress):
                number = part_of[spec.sample.sample_id]
                if episode.refused and not waiting.is_repeated(spec):
                    again[number].append(spec)
                else:
                    await ended[number].add(episode)
                    if episode.refused:
                        errors[spec.sample.sample_id].append(episode.error or "?")
                if ended[number].rows + len(again[number]) == len(parts[number]) * len(modes):
                    waiting.repeat(again[number])
                    again[number] = []
                    complete = ended[number].rows == len(parts[number]) * len(modes)
                    if complete and not ended[number].errors:
                        await close(number)
            if len(errors) > 1 or len(specs) == total:  # a single sample of a run that goes on may be at fault
                check_share(list(chain(*errors.values())), len(specs), "conversations")
            for number in sorted(ended):
                if ended[number].is_work():
                    await close(number)
        broken = [error for part in ended.values() for error in part.errors]
        if broken:
            raise UserError(
                f"{len(broken)} of {total} conversations could not be played, the first with: {broken[0]}",
                hint="Correct that and run this again: only their parts are played again.",
            )
    if error := find_total_failure(work, range(len(parts))):
        discard_parts(work, range(len(parts)))
        raise UserError(
            f"Every conversation failed, the first with: {error}",
            hint="Correct that and run this again: everything is played again.",
        )
    return tokens


class OpenPart:
    """Conversations of a part that have ended: rows, the images that tools made, and what engine or tool refused.

    images: those to be stored; None where none is. Nothing of a conversation's pictures stays in memory.
    """

    def __init__(self, images: ImageSpool | None):
        self.images, self.table = images, RowSpool(records.trajectory_schema())
        self.rows = self.tokens = 0
        self.errors: list[str | None] = []
        """One of each conversation that was refused."""
        self._samples: set[str] = set()
        self._refused: set[str] = set()
        self._passing = False

    async def add(self, episode: Episode) -> None:
        """Take a conversation that has ended. Raises UserError for a full disk."""
        sample = episode.sample.sample_id
        self.table.add((sample, episode.index), to_row(episode.trajectory()))
        self.rows += 1
        self.tokens += sum(turn.tokens for turn in episode.turns)
        self._samples.add(sample)
        self._passing |= episode.passing
        if episode.refused:
            self._refused.add(sample)
            self.errors.append(episode.error)
        if self.images is not None:
            await self.images.add(episode.made_images)

    def is_work(self) -> bool:
        """Tell whether it may be closed: nothing failed in passing, no more than half of its samples were refused.

        Up to FEW samples may be refused, however few there are: a picture of theirs may be the reason.
        """
        return len(self._refused) <= max(FEW, len(self._samples) // 2) and not self._passing


class Waiting:
    """Iterator over episodes to be played, to which more can be added while it runs."""

    def __init__(self, specs: Iterable[EpisodeSpec]):
        self._specs = deque(specs)
        self._repeated: set[tuple[str, int]] = set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EpisodeSpec:
        if not self._specs:
            raise StopIteration
        return self._specs.popleft()

    def repeat(self, specs: Iterable[EpisodeSpec]) -> None:
        """Have episodes played a second time, before those that wait: their parts wait for them alone."""
        for spec in specs:
            self._repeated.add((spec.sample.sample_id, spec.index))
            self._specs.appendleft(spec)

    def is_repeated(self, spec: EpisodeSpec) -> bool:
        """Tell whether an episode is played, or was played, a second time."""
        return (spec.sample.sample_id, spec.index) in self._repeated


def report_failures(rows: Iterable[Trajectory]) -> None:
    """Log one line with the number of conversations that failed, and the first error; nothing where none did."""
    errors = [row.error for row in rows if row.stop is StopReason.FAILED]
    if errors:
        log.warning("%d conversations failed and don't count, the first with: %s", len(errors), errors[0])


def find_total_failure(work: Work, numbers: Iterable[int]) -> str | None:
    """Return the first error of closed parts in which every conversation failed; None where there is none."""
    names = [name for name in (f"trajectories-{number:05}.parquet" for number in numbers) if work.has(name)]
    error = None
    for row in read_columns([work.path(name) for name in names], ["stop", "error"]):
        if row["stop"] != StopReason.FAILED:
            return None
        error = error or row["error"] or "?"
    return error


def has_failed(work: Work, number: int) -> bool:
    """Tell whether a closed part has a conversation that failed."""
    name = f"trajectories-{number:05}.parquet"
    return work.has(name) and any(row["stop"] == StopReason.FAILED for row in read_columns([work.path(name)], ["stop"]))


def discard_parts(work: Work, numbers: Iterable[int]) -> None:
    """Remove closed parts, so that their conversations are played again."""
    for number in numbers:
        for table in ("trajectories", "images"):
            work.discard(f"{table}-{number:05}.parquet")


class Writer:
    """Async context manager that closes parts in a thread, one at a time, while other conversations go on."""

    def __init__(self):
        self._writing: asyncio.Task | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            await self.done()
        except (OSError, UserError) as error:  # of the disk
            if kind is None:
                raise
            # The error that ended the conversations is raised; this part is played again by the next run.
            log.error("a part was not written: %s", error)

    async def write(self, *part) -> None:
        """Start `write_part(*part)` once the last part is written; raises what that write has raised."""
        await self.done()
        self._writing = asyncio.create_task(asyncio.to_thread(write_part, *part))

    async def done(self) -> None:
        """Wait for the part that is being written, even if we are cancelled: its thread still needs its directory."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait([writing])
                raise


def write_part(work: Work, number: int, part: OpenPart, keys: Sequence[tuple[str, int]]) -> None:
    """Close a part: the images that tools made, each once, then the trajectories of (sample, index) in this order."""
    if part.images is not None:
        write_images(work, f"images-{number:05}.parquet", part.images.rows())
        part.images.close()
    work.table(f"trajectories-{number:05}.parquet", part.table.table(keys))


def read_closed(work: Work) -> Iterator[Trajectory]:
    """Yield the trajectories of the closed parts, in order, with one batch in memory."""
    for number in range(PARTS):
        if work.has(name := f"trajectories-{number:05}.parquet"):
            yield from read_trajectories([work.path(name)])


def summarise_rows(rows: Iterable[Trajectory]) -> dict[str, float]:
    """Return headline figures of trajectories: shares of stop reasons and of calls, means per trajectory played.

    Those that failed count among the stop reasons alone.
    """
    counts: Counter[str] = Counter()
    tools: Counter[str | None] = Counter()
    for row in rows:
        counts["rows"] += 1
        counts[f"stop/{row.stop}"] += 1
        if row.stop is StopReason.FAILED:
            continue
        counts["played"] += 1
        counts["shown"] += any(turn.image is not None for turn in row.turns)
        counts["turns"] += len(row.turns)
        for turn in row.turns:
            counts["tokens"] += turn.tokens
            counts["malformed"] += turn.kind is TurnKind.MALFORMED
            if turn.kind is TurnKind.TOOL:
                tools[turn.tool] += 1
                counts[f"tool/{turn.status}"] += 1
    total, played, calls = counts["rows"], max(1, counts["played"]), tools.total()
    metrics = {
        "trajectories": total,
        "tool/rate": counts["shown"] / played,
        "tool/calls": calls / played,
        "turns": counts["turns"] / played,
        "tokens": counts["tokens"] / played,
        "malformed": counts["malformed"] / max(1, counts["turns"]),
    }
    metrics |= {f"tool/{status}": counts[f"tool/{status}"] / max(1, calls) for status in CallStatus}
    metrics |= {f"stop/{reason}": counts[f"stop/{reason}"] / total for reason in StopReason}
    return metrics | {f"tool/share/{name}": count / calls for name, count in tools.items()}


def compare_settings(settings: PlaySettings, inputs: Mapping[str, Artifact], store: Store) -> str:
    """Return a sentence that names the settings under which the policy has learned otherwise; "" where none differs.

    They are those of the rollouts or demonstrations that it was trained on, if the store has them.
    """
    policy = inputs["policy"]
    learned = next((policy.inputs[role] for role in ("rollouts", "demonstrations") if role in policy.inputs), None)
    if learned is None or not (store.root / str(learned) / MANIFEST).is_file():
        return ""
    recipe = read_manifest(store.root / str(learned))["recipe"]["config"]
    now = settings.model_dump(mode="json", include={"conversation", "images"})
    changes = [
        f"{group}.{name} is {shorten(json.dumps(value), 60)}, not {shorten(json.dumps(recipe[group][name]), 60)}"
        for group, values in now.items()
        for name, value in values.items()
        if name in recipe.get(group, {}) and recipe[group][name] != value
    ]
    if not changes:
        return ""
    return f"The policy {policy.short} has learned under other settings than these: {'; '.join(changes)}."


Iteration = Annotated[int, Field(ge=1, le=1_000_000)]

rollout = Stage(
    name="rollout",
    version=3,
    makes=Rollouts,
    settings=settings_of,
    run=run,
    reads={
        "policy": Input(Policy),
        "dataset": Input(Dataset, origin=Lineage("policy", "dataset"), shown=True),
    },
    parameters={"iteration": Parameter(Iteration, 1, "Number of the iteration, from 1.")},
    packages=lambda settings: ("pillow", "transformers", "tokenizers", engine_package()),
    warn=compare_settings,
    uses=lambda config: frozenset({"engine"}),
    player="policy",
)
