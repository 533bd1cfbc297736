"""The rollout stage: groups of trajectories for this iteration's samples, published in parts as they finish."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Self

import numpy as np
from PIL import Image

from thinkimg import records
from thinkimg.closure import engine_package
from thinkimg.config import Config
from thinkimg.conversation.episode import Episode
from thinkimg.errors import UserError
from thinkimg.records import SCHEMA_VERSION, CallStatus, Sample, StopReason, Trajectory, TurnKind, to_row
from thinkimg.resources import Machines, machines
from thinkimg.rollout import Job, Play, Players, view_limits
from thinkimg.store.artifacts import Artifact, Recipe, Store, Work, package_versions
from thinkimg.store.image_table import encode, image_writer, load_samples

log = logging.getLogger(__name__)

STAGE, VERSION, KIND = "rollout", 1, "rollouts"
PARTS = 8  # an iteration is published in this many parts


def recipe(config: Config, dataset: Artifact, policy: Artifact, iteration: int) -> Recipe:
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={
            "conversation": config.conversation.model_dump(mode="json"),
            "images": view_limits(config),
            "precision": precision(config),
            "rollout": config.rollout.model_dump(mode="json"),
            "iteration": iteration,
            "seed": config.seed,
        },
        inputs={"dataset": dataset.reference, "policy": policy.reference},
        packages=package_versions("pillow", "transformers", "tokenizers", engine_package()),
    )  # fmt: skip


def precision(config: Config) -> str:
    """Of the weights in the engine."""
    return config.model.dtype


def rollout(
    config: Config, dataset: Artifact, policy: Artifact, store: Store, *, iteration: int = 1, force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Play `rollout.samples` x `rollout.group_size` conversations with `policy`; returns the artifact, and if it was there.

    Raises UserError where every conversation failed, EngineError where the engine cannot be reached. force: play them anew.
    """

    def produce(work: Work) -> None:
        with machines(config) as crew:
            asyncio.run(fill(work, config, dataset, policy, crew, iteration, progress))

    where = config.where.public()
    return store.build(
        KIND, recipe(config, dataset, policy, iteration), produce, seed=config.seed, where=where, force=force
    )


def draw(samples: list[Sample], count: int, iteration: int, seed: int) -> list[Sample]:
    """This iteration's samples (iterations count from 1), none of them twice; every sample once before any comes again.

    Where an epoch ends within an iteration, what the iteration holds already is moved to the next epoch's end. Fewer
    samples than `count` are all drawn every time.
    """
    count = min(count, len(samples))
    queue: list[int] = []
    epoch = 0
    for _ in range(iteration):
        if len(queue) < count:
            order = np.random.default_rng([seed, 1, epoch]).permutation(len(samples)).tolist()
            queue += sorted(order, key=lambda i: i in queue)  # stable: those still in the queue come last
            epoch += 1
        drawn, queue = queue[:count], queue[count:]
    return [samples[i] for i in drawn]


async def fill(
    work: Work, config: Config, dataset: Artifact, policy: Artifact, crew: Machines, iteration: int, progress
):
    """Play what is missing and close part after part; a part holds whole groups, in the order of the samples."""
    samples = draw(load_samples(dataset, "train"), config.rollout.samples, iteration, config.seed)
    plays = [Play(config.rollout.temperature)] * config.rollout.group_size
    started = time.perf_counter()
    played = await play_parts(work, config, dataset, policy, crew, samples, plays, progress)
    rows = read_rows(work)
    work.metrics |= summary(rows)
    if played:
        work.where["tokens_per_s"] = round(played / (time.perf_counter() - started), 1)


async def play_parts(
    work: Work, config: Config, dataset: Artifact, policy: Artifact, crew: Machines, samples: list[Sample],
    plays: list[Play], progress: Callable[[int, int], None], *, keep_images: bool = True,
) -> int:  # fmt: skip
    """Play each sample once per entry of `plays` (its index), and close the parts that are not closed yet.

    keep_images: store what the tools made, too; it can be made again from the data set and the calls.
    Returns the number of tokens sampled now. Raises UserError where every conversation of the artifact failed, or the engine
    refused most of them. Until all are played no part with a refusal is closed: only then it is known whose fault that is, and
    whatever ends the run before leaves nothing behind that the next run would take for finished work.
    """
    size = -(-len(samples) // PARTS)
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    part_of = {sample.sample_id: number for number, part in enumerate(parts) for sample in part}
    discard(work, [number for number, rows in closed(work) if all_failed(rows)])  # of a run that knew no better
    missing = [number for number in range(len(parts)) if not work.has(f"trajectories-{number:05}.parquet")]
    jobs = [Job(sample, i, how) for number in missing for sample in parts[number] for i, how in enumerate(plays)]
    total = len(samples) * len(plays)
    ended: dict[int, dict[tuple[str, int], Episode]] = {number: {} for number in missing}
    pending: dict[int, list[Episode]] = {}  # parts with a refusal
    tokens = 0
    if jobs:
        async with Players(config, dataset, policy, crew) as players, Writer() as writer:
            async for job, episode in players.play(jobs, lambda done: progress(total - len(jobs) + done, total)):
                number = part_of[job.sample.sample_id]
                ended[number][job.sample.sample_id, job.index] = episode
                if len(ended[number]) == len(parts[number]) * len(plays):
                    whole = ended.pop(number)
                    episodes = [whole[sample.sample_id, i] for sample in parts[number] for i in range(len(plays))]
                    tokens += sum(turn.tokens for episode in episodes for turn in episode.turns)
                    if any(episode.refused for episode in episodes):
                        pending[number] = episodes
                    else:
                        await writer.write(work, number, episodes, players.pool if keep_images else None)
            refused = [episode for episodes in pending.values() for episode in episodes if episode.refused]
            if 2 * len(refused) > total:
                raise UserError(
                    f"The engine refused {len(refused)} of {total} conversations, the first with: {refused[0].error}",
                    hint="Mend that and run this again: parts without a refusal are kept, the others are played again.",
                )
            for number, episodes in sorted(pending.items()):
                await writer.write(work, number, episodes, players.pool if keep_images else None)
    if all_failed(rows := read_rows(work)):
        discard(work, range(len(parts)))
        raise UserError(
            f"Every conversation failed, the first with: {rows[0].error}",
            hint="Mend that and run this again: everything is played again.",
        )
    return tokens


def all_failed(rows: Sequence[Trajectory]) -> bool:
    return all(row.stop is StopReason.FAILED for row in rows)


def discard(work: Work, numbers: Iterable[int]) -> None:
    """Remove closed parts, so that their conversations are played again."""
    for number in numbers:
        for table in ("trajectories", "images"):
            work.discard(f"{table}-{number:05}.parquet")


class Writer:
    """Async context manager: closes parts in a thread, one at a time, while the other conversations go on."""

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
            # What has ended the conversations is what the user has to hear first; the part is played again by the next run.
            log.error("a part was not written: %s", error)

    async def write(self, *part) -> None:
        """Begin with `write_part(*part)`, after the one before; raises what that one has raised."""
        await self.done()
        self._writing = asyncio.create_task(asyncio.to_thread(write_part, *part))

    async def done(self) -> None:
        """Wait for the part that is being written, even if we are cancelled: its thread would lose what it works with."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait([writing])
                raise


def write_part(work: Work, number: int, episodes: list[Episode], pool: Executor | None) -> None:
    """Close the images that the tools made, each once (encoded in `pool`; none are kept without), and the trajectories."""
    import pyarrow as pa

    if pool is not None and not work.has(f"images-{number:05}.parquet"):
        made = {sha: image for episode in episodes for sha, image in episode.made_images.items()}
        write_images(work, f"images-{number:05}.parquet", made, pool)
    trajectories = [to_row(episode.trajectory()) for episode in episodes]
    work.table(f"trajectories-{number:05}.parquet", pa.Table.from_pylist(trajectories, records.trajectories()))


def write_images(work: Work, name: str, made: dict[str, Image.Image], pool: Executor) -> None:
    """Close a part of full-resolution images by content hash."""
    hashes = sorted(made)
    with work.part(name) as path, image_writer(path) as add:
        for sha, data in zip(hashes, pool.map(encode, (made[sha] for sha in hashes)), strict=True):
            add(sha, data, *made[sha].size)


def read_rows(work: Work) -> list[Trajectory]:
    """All trajectories of the closed parts, in order."""
    return [row for _, rows in closed(work) for row in rows]


def closed(work: Work) -> Iterator[tuple[int, list[Trajectory]]]:
    """(number, trajectories) of each closed part, in order."""
    import pyarrow.parquet as pq

    for number in range(PARTS):
        if work.has(name := f"trajectories-{number:05}.parquet"):
            rows = pq.read_table(work.path(name)).to_pylist()
            yield number, [records.from_row(Trajectory, row) for row in rows]


def summary(rows: Iterable[Trajectory]) -> dict[str, float]:
    """Headline figures of some trajectories: shares of the calls, of the ends, means per trajectory."""
    rows = list(rows)
    turns = [turn for row in rows for turn in row.turns]
    calls = [turn for turn in turns if turn.kind is TurnKind.TOOL]
    using = [row for row in rows if any(turn.image is not None for turn in row.turns)]
    metrics = {
        "trajectories": len(rows),
        "tool/rate": len(using) / len(rows),
        "tool/calls": len(calls) / len(rows),
        "turns": len(turns) / len(rows),
        "tokens": sum(turn.tokens for turn in turns) / len(rows),
        "malformed": sum(turn.kind is TurnKind.MALFORMED for turn in turns) / max(1, len(turns)),
    }
    for status in CallStatus:
        metrics[f"tool/{status}"] = sum(turn.status is status for turn in calls) / max(1, len(calls))
    for reason in StopReason:
        metrics[f"stop/{reason}"] = sum(row.stop is reason for row in rows) / len(rows)
    for name, count in Counter(turn.tool for turn in calls).items():
        metrics[f"tool/share/{name}"] = count / len(calls)
    return metrics
