"""The score stage: what each reward component makes of each trajectory, raw and unweighted.

Some parts of the rollouts at a time: first the judges of processed images, side by side, whose findings are the ledgers
(judgements-<judge>-*), then the components, part by part, which are pure functions of rows and ledgers.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from thinkimg import records
from thinkimg.config import Config, RewardsConfig
from thinkimg.errors import UserError
from thinkimg.models.clip import forget as forget_clip
from thinkimg.records import SCHEMA_VERSION, Sample, Trajectory
from thinkimg.resources import machines
from thinkimg.rewards import judging
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.context import Bench
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.judges.teacher import FROZEN
from thinkimg.rewards.registry import JUDGES, components, sources
from thinkimg.rewards.settings import ImageConfig
from thinkimg.stages import clip, warmstart
from thinkimg.store.artifacts import Artifact, Recipe, Store, Work, package_versions

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from thinkimg.rewards.judgement import Judgements
    from thinkimg.store.image_table import ImageTable

STAGE, VERSION, KIND = "score", 3, "scores"
AT_ONCE = 4096  # trajectories whose images are judged together, at least
IDENTITY = ("trajectory_id", "sample_id", "group_id")


@dataclass(frozen=True)
class Job:
    """One component on one part of the rollouts: small, and complete wherever the artifacts can be read."""

    component: str
    part: str
    rewards: RewardsConfig
    image: ImageConfig
    dataset: Path
    rollouts: Path
    judgements: tuple[Path, ...]


Mapper = Callable[[Callable[[Job], list[Score]], list[Job]], Iterable[list[Score]]]
"""Runs a function on jobs, results in order: `map`, an executor's, or one that submits tasks to a Prefect task runner."""


def recipe(config: Config, dataset: Artifact, rollouts: Artifact, bench: Bench) -> Recipe:
    inputs = {"dataset": dataset.reference, "rollouts": rollouts.reference}
    if bench.clip is not None:
        inputs["clip"] = bench.clip.reference
    if bench.founder is not None:
        inputs["teacher"] = bench.founder.reference
    settings = {
        "rewards": config.rewards.model_dump(mode="json"),
        "components": list(components(config.rewards, config.image)),
    }
    packages = ["rapidfuzz", "math-verify", "latex2sympy2_extended", "sympy"]
    if config.image.types:
        settings["image"] = config.image.scored()
        settings["judges"] = {name: asdict(JUDGES[name].identity(bench)) for name in config.image.types}
        packages += ["torch", "open-clip-torch", "transformers"]
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config=settings, inputs=inputs, sources=sources(config.rewards), packages=package_versions(*packages),
    )  # fmt: skip


def bench_of(
    config: Config, dataset: Artifact, rollouts: Artifact, store: Store, crew, small_clip: Artifact | None
) -> Bench:
    """Where the judges work; nothing is started or loaded yet."""
    policy = founder = None
    if set(config.image.types) - {"embedding"}:
        policy = store.origin(rollouts, "policy")
    if "teacher" in config.image.types and config.image.teacher.model == FROZEN:
        founder = policy
        while founder.manifest["recipe"]["stage"] != warmstart.STAGE:
            founder = store.origin(founder, "policy")
    return Bench(config, crew, policy, founder, small_clip, (dataset, rollouts), None)


def score(
    config: Config, dataset: Artifact, rollouts: Artifact, store: Store, *, force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None, mapper: Mapper | None = None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Score every trajectory; returns the artifact, and if it was there. One part of the rollouts is in memory at a time.

    mapper: who runs the components of a part; None is a pool of `where.workers` threads. progress counts trajectories.
    Raises UserError for rollouts of another data set and for a user's function that is not as it must be.
    """
    played = rollouts.manifest["recipe"]["inputs"]["dataset"]
    if played["digest"] != dataset.digest:
        raise UserError(
            f"{rollouts.reference} was not made from {dataset.reference}.",
            hint=f"Its data set is dataset/{played['fingerprint']}/{played['attempt']}.",
        )
    small_clip = clip.train_clip(config, store)[0] if clip.wanted(config) else None
    bench = bench_of(config, dataset, rollouts, store, None, small_clip)
    plan = recipe(config, dataset, rollouts, bench)

    def produce(work: Work) -> None:
        with ExitStack() as stack:
            stack.callback(forget)
            if not config.where.engine.keep:
                stack.callback(forget_clip)  # the engine wants the memory next
            run = mapper or stack.enter_context(ThreadPoolExecutor(config.where.workers)).map
            if config.image.types:  # else nobody needs the device, which a loop may hold
                bench.crew = stack.enter_context(machines(config))
            known = judging.earlier(store, rollouts.digest) if config.image.types else None
            fill(work, config, bench, dataset, rollouts, run, known, progress)

    return store.build(KIND, plan, produce, where=config.where.public(), force=force)


def fill(
    work: Work, config: Config, bench: Bench, dataset: Artifact, rollouts: Artifact, run: Mapper, known, progress
) -> None:
    """Score chunk after chunk, and close a part of the same number for each of the rollouts."""
    names = list(components(config.rewards, config.image))
    parts = [path.name for path in rollouts.table_files("trajectories")]
    tally = Tally(progress, sum(rollouts.files[part]["rows"] for part in parts))
    bench.expect, bench.judged = tally.expect, tally.add
    for number, chunk in enumerate(chunks(rollouts, parts)):
        if config.image.types and not all(work.has(scores_name(part)) for part in chunk):
            fill_ledgers(work, bench, dataset, rollouts, number, chunk, known)
        ledgers = [ledger_name(number, name) for name in JUDGES]
        judged = tuple(work.path(name) for name in ledgers if work.has(name))
        for part in chunk:
            if not work.has(scores_name(part)):
                jobs = [
                    Job(name, part, config.rewards, config.image, dataset.directory, rollouts.directory, judged)
                    for name in names
                ]
                columns = dict(zip(names, run(run_job, jobs), strict=True))
                work.table(scores_name(part), table_of(rollouts, part, columns))
            tally.add(rollouts.files[part]["rows"])
    work.metrics |= summary([work.path(scores_name(part)) for part in parts], names)


class Tally:
    """Progress of judging, which is found out about as it goes, and of scoring: pairs and trajectories."""

    def __init__(self, progress: Callable[[int, int], None], total: int):
        self._progress, self._total, self._done, self._lock = progress, total, 0, threading.Lock()

    def expect(self, count: int) -> None:
        with self._lock:
            self._total += count

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)


def chunks(rollouts: Artifact, parts: list[str]) -> Iterator[list[str]]:
    """Parts that are judged together: judges work in batches, and engine and trainer may have to take turns in the memory."""
    chunk: list[str] = []
    for part in parts:
        chunk.append(part)
        if sum(rollouts.files[one]["rows"] for one in chunk) >= AT_ONCE or part == parts[-1]:
            yield chunk
            chunk = []


def fill_ledgers(
    work: Work, bench: Bench, dataset: Artifact, rollouts: Artifact, number: int, chunk: list[str], known
) -> None:
    """Close a chunk's ledgers, one per judge; those that an earlier try has closed stay."""
    pairs: set[Pair] = set()
    for part in chunk:
        batch = _batch(rollouts.directory, dataset.directory, part)
        bench.images = batch.images
        pairs |= judging.pairs_of(batch.trajectories, batch.samples)
    judge_pairs(work, bench, number, pairs, known)


def judge_pairs(work: Work, bench: Bench, number: int, pairs: set[Pair], known) -> None:
    def close(name: str, found: "Judgements") -> None:
        work.table(ledger_name(number, name), judging.table(found))

    def ask(names: Iterable[str]) -> None:
        missing = [name for name in names if not work.has(ledger_name(number, name))]
        if missing:
            judging.judge(missing, pairs, bench, known, close)

    settings = bench.config.image
    ask(settings.types)
    if "teacher" in settings.types and settings.teacher.fallback == "self":
        told = judging.read(work.path(ledger_name(number, "teacher")))
        if any(one.unreachable for one in told.values()):
            ask(["self"])  # about all: whole groups fall back


def ledger_name(number: int, component: str) -> str:
    return f"judgements-{component}-{number:05}.parquet"


def scores_name(part: str) -> str:
    return part.replace("trajectories", "scores", 1)


def table_of(rollouts: Artifact, part: str, columns: dict[str, list[Score]]) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(rollouts.checked(part), columns=list(IDENTITY)).to_pydict()
    for name, found in columns.items():
        assert len(found) == len(table["trajectory_id"]), f"{name} has {len(found)} scores"
        table[name] = [one.row() for one in found]
    return pa.Table.from_pydict(table, records.scores(list(columns)))


def run_job(job: Job) -> list[Score]:
    """One score per trajectory of the part, in order."""
    with _lock:  # the components of a part share it: who comes first reads it
        batch = _batch(job.rollouts, job.dataset, job.part)
        judged = _judgements(job.judgements)
    batch = replace(batch, config=job.rewards, image=job.image, judgements=judged)
    return components(job.rewards, job.image)[job.component](batch)


_lock = threading.Lock()


@lru_cache(maxsize=1)
def _batch(rollouts: Path, dataset: Path, part: str) -> Batch:
    import pyarrow.parquet as pq

    samples, images = _inputs(rollouts, dataset)
    rows = pq.read_table(Artifact.open(rollouts).checked(part)).to_pylist()
    return Batch([records.from_row(Trajectory, row) for row in rows], samples, RewardsConfig(), images)


@lru_cache(maxsize=1)
def _judgements(paths: tuple[Path, ...]) -> "Judgements":
    return {key: one for path in paths for key, one in judging.read(path).items()}


@lru_cache(maxsize=1)
def _inputs(rollouts: Path, dataset: Path) -> "tuple[dict[str, Sample], ImageTable]":
    from thinkimg.store.image_table import ImageTable, load_samples

    artifacts = [Artifact.open(dataset), Artifact.open(rollouts)]
    return {sample.sample_id: sample for sample in load_samples(artifacts[0])}, ImageTable(artifacts)


def forget() -> None:
    """Let go of what the last jobs have read."""
    _batch.cache_clear()
    _judgements.cache_clear()
    _inputs.cache_clear()


def summary(parts: list[Path], names: list[str]) -> dict[str, float | None]:
    """reward/<component>: mean over the present values (None without one); missing/<component>: how many there are not."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    metrics: dict[str, float | None] = {}
    for name in names:
        total, present, missing, fallen = 0.0, 0, 0, 0
        for path in parts:
            table = pq.ParquetFile(path).read([name])
            values = _values(table, name)
            found = values[values == values]
            total, present, missing = total + found.sum(), present + len(found), missing + len(values) - len(found)
            if name == "teacher":
                evidence = pc.struct_field(table.column(name), "evidence")
                fallen += pc.sum(pc.match_substring(evidence, '"fallback":')).as_py() or 0
        metrics[f"reward/{name}"] = float(total / present) if present else None
        metrics[f"missing/{name}"] = missing
        if name == "teacher":
            metrics["reward/teacher_fallback"] = fallen / max(1, present + missing)
    return metrics


def read_scores(artifact: Artifact) -> "tuple[dict[str, np.ndarray], list[str], list[str]]":
    """component -> (N,) float64 with NaN where a value is missing; trajectory ids; group ids; all in order of the rollouts."""
    table = artifact.table("scores")
    names = [name for name in table.column_names if name not in IDENTITY]
    ids, groups = (table.column(name).to_pylist() for name in ("trajectory_id", "group_id"))
    return {name: _values(table, name) for name in names}, ids, groups


def _values(table: "pa.Table", name: str) -> "np.ndarray":
    import numpy as np
    import pyarrow.compute as pc

    found = pc.struct_field(table.column(name), "value").to_pylist()
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)
