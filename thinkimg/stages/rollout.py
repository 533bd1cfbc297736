"""The rollout stage: groups of trajectories for this iteration's samples, published in parts as they finish."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

import numpy as np
from PIL import Image

from thinkimg import schemas
from thinkimg.artifacts import Artifact, Recipe, Store, Work, package_versions
from thinkimg.chat.episode import Episode
from thinkimg.config import Config
from thinkimg.data.images import encode, image_writer, load_samples
from thinkimg.engine import package as engine_package
from thinkimg.errors import UserError
from thinkimg.machines import Machines, machines
from thinkimg.rollout import Play, Players, view_limits
from thinkimg.schemas import SCHEMA_VERSION, CallStatus, Sample, StopReason, Trajectory, TurnKind, to_row

STAGE, VERSION, KIND = "rollout", 1, "rollouts"
PARTS = 8  # an iteration is published in this many parts


def recipe(config: Config, dataset: Artifact, policy: Artifact, iteration: int) -> Recipe:
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={
            "conversation": config.conversation.model_dump(mode="json"),
            "images": view_limits(config),
            "rollout": config.rollout.model_dump(mode="json"),
            "iteration": iteration,
            "seed": config.seed,
        },
        inputs={"dataset": dataset.reference, "policy": policy.reference},
        packages=package_versions("pillow", "transformers", "tokenizers", engine_package()),
    )  # fmt: skip


def rollout(
    config: Config, dataset: Artifact, policy: Artifact, store: Store, *, iteration: int = 1, force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Play `rollout.samples` x `rollout.group_size` conversations with `policy`; returns the artifact, and if it was there.

    Raises UserError where every conversation failed, EngineError where the engine cannot be reached.
    """

    def produce(work: Work) -> None:
        with machines(config) as crew:
            asyncio.run(fill(work, config, dataset, policy, crew, iteration, progress))

    where = config.where.model_dump(mode="json")
    return store.build(
        KIND, recipe(config, dataset, policy, iteration), produce, seed=config.seed, where=where, force=force
    )


def draw(samples: list[Sample], count: int, iteration: int, seed: int) -> list[Sample]:
    """This iteration's samples (iterations count from 1): all of them once, in an order of its own, before any again."""
    drawn: list[Sample] = []
    position = (iteration - 1) * count
    while len(drawn) < count:
        epoch, offset = divmod(position, len(samples))
        order = np.random.default_rng([seed, epoch]).permutation(len(samples))
        take = order[offset : offset + count - len(drawn)]
        drawn += [samples[i] for i in take]
        position += len(take)
    return drawn


async def fill(
    work: Work, config: Config, dataset: Artifact, policy: Artifact, crew: Machines, iteration: int, progress
):
    """Play what is missing and close part after part; a part holds whole groups, in the order of the samples."""
    samples = draw(load_samples(dataset, "train"), config.rollout.samples, iteration, config.seed)
    size = -(-len(samples) // PARTS)
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    group = config.rollout.group_size
    started, tokens = time.perf_counter(), 0
    missing = [number for number in range(len(parts)) if not work.has(f"trajectories-{number:05}.parquet")]
    place = {(number, i): sample for number in missing for i, sample in enumerate(parts[number])}
    jobs = [(sample, index, (number, i)) for (number, i), sample in place.items() for index in range(group)]
    total = len(samples) * group
    ended: dict[int, list[tuple[int, Episode]]] = {number: [] for number in missing}

    def told(done: int) -> None:
        progress(total - len(jobs) + done, total)

    async with Players(config, dataset, policy, crew) as players:
        how = Play(config.rollout.temperature, config.rollout.top_p)
        async for (number, i), episode in players.play(jobs, how, told):
            ended[number].append((i, episode))
            if len(ended[number]) == len(parts[number]) * group:
                done = [e for _, e in sorted(ended.pop(number), key=lambda pair: (pair[0], pair[1].index))]
                tokens += sum(turn.tokens for e in done for turn in e.trajectory().turns)
                write_part(work, number, done, players.pool)
    seconds = time.perf_counter() - started
    rows = [row for number in range(len(parts)) for row in read_part(work, number)]
    failed = [row for row in rows if row.stop is StopReason.FAILED]
    if len(failed) == len(rows):
        raise UserError(f"every conversation failed, the first with: {failed[0].error}", hint="read the engine's log")
    work.metrics |= summary(rows)
    if jobs:
        work.where["tokens_per_s"] = round(tokens / seconds, 1)


def write_part(work: Work, number: int, episodes: list[Episode], pool: Executor) -> None:
    """Close the images that the tools made, each once, and then the trajectories."""
    import pyarrow as pa

    if not work.has(f"images-{number:05}.parquet"):
        made = {sha: image for episode in episodes for sha, image in episode.made_images.items()}
        write_images(work, f"images-{number:05}.parquet", made, pool)
    trajectories = [to_row(episode.trajectory()) for episode in episodes]
    work.table(f"trajectories-{number:05}.parquet", pa.Table.from_pylist(trajectories, schemas.trajectories()))


def write_images(work: Work, name: str, made: dict[str, Image.Image], pool: Executor) -> None:
    """Close a part of full-resolution images by content hash."""
    hashes = sorted(made)
    with work.part(name) as path, image_writer(path) as add:
        for sha, data in zip(hashes, pool.map(encode, (made[sha] for sha in hashes)), strict=True):
            add(sha, data, *made[sha].size)


def read_part(work: Work, number: int) -> list[Trajectory]:
    import pyarrow.parquet as pq

    rows = pq.read_table(work.path(f"trajectories-{number:05}.parquet")).to_pylist()
    return [schemas.from_row(Trajectory, row) for row in rows]


def summary(rows: Iterable[Trajectory]) -> dict[str, float]:
    """Headline figures of some trajectories: shares of the calls, of the ends, means per trajectory."""
    rows = list(rows)
    turns = [turn for row in rows for turn in row.turns]
    calls = [turn for turn in turns if turn.kind is TurnKind.TOOL]
    using = [row for row in rows if any(turn.status in (CallStatus.OK, CallStatus.DUPLICATE) for turn in row.turns)]
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
