"""Score stored rollouts: one raw column per reward component.

Some parts of the rollouts at a time: first the judges of processed images, side by side, whose judgements are the ledgers
(judgements-<judge>-*), then the components, part by part, which are pure functions of rows and ledgers.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from thinkimg import records
from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.images.settings import ViewLimits
from thinkimg.images.toolbox import user_sources
from thinkimg.models.base import BaseSource
from thinkimg.models.clip import weights_digest
from thinkimg.rewards import judging
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judge import load_judges
from thinkimg.rewards.judgement import Judgements, Pair
from thinkimg.rewards.judges.teacher import FROZEN, check_teacher
from thinkimg.rewards.registry import components
from thinkimg.rewards.settings import RewardsConfig
from thinkimg.stages.stage import Input, Job, Lineage, Slice, Stage
from thinkimg.stages.train_clip import train_clip
from thinkimg.store.artifacts import Artifact, Reference, Work
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import IDENTITY, Clip, Dataset, Policy, Rollouts, Scores

AT_ONCE = 4096  # trajectories whose images are judged together, at least


class ScoreSettings(Slice):
    rewards: RewardsConfig
    components: tuple[str, ...]
    judges: JudgeSettings | None
    """None without judges of images."""
    prompts: dict[str, str]
    """Judge -> hash of how it asks."""
    own_clip: bool = Field(exclude=True)

    @property
    def types(self) -> tuple[str, ...]:
        """The judges."""
        return self.judges.image.columns if self.judges else ()

    def fingerprinted(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"rewards": self.rewards.model_dump(mode="json"), "components": list(self.components)}
        if self.judges:
            tree |= {"image": self.judges.image.scored(), "prompts": self.prompts}
        return tree

    def outside(self) -> dict[str, Reference]:
        """Return the weights of a CLIP that is no artifact."""
        if "embedding" not in self.types or self.own_clip:
            return {}
        return {"clip": Reference("clip", weights_digest(self.judges.image.embedding, None))}


def judge_settings(config: Config) -> JudgeSettings:
    return JudgeSettings(
        image=config.image,
        view=ViewLimits.of(config.images),
        model=config.model,
        token_budget=config.train.token_budget,
        base=BaseSource.of(config.model),
    )


def settings_of(config: Config) -> ScoreSettings:
    """Raises UserError for a user's function that is not as it must be."""
    judges, asked = judge_settings(config), load_judges(config.image)
    return ScoreSettings(
        rewards=config.rewards,
        components=tuple(components(config.rewards, config.image)),
        judges=judges if config.image.types else None,
        prompts={name: asked[name].prompt(judges) for name in config.image.columns},
        own_clip=config.has_own_clip,
    )


@dataclass(frozen=True)
class PartJob:
    """One part of the rollouts to be scored: small, and complete wherever the artifacts can be read."""

    part: str
    settings: ScoreSettings
    dataset: Path
    rollouts: Path
    judgements: tuple[Path, ...]


def run(job: Job[ScoreSettings]) -> None:
    """Score chunk after chunk, and close a part of the same number for each of the rollouts; one part is in memory at a time.

    Progress counts trajectories, and pairs that judges look at. Raises UserError for rollouts of another data set.
    """
    settings, work, rollouts = job.settings, job.work, job.inputs["rollouts"]
    dataset = job.inputs["dataset"]
    played = rollouts.manifest["recipe"]["inputs"]["dataset"]
    if played["digest"] != dataset.digest:
        raise UserError(
            f"{rollouts.reference} was not made from {dataset.reference}.",
            hint=f"Its data set is dataset/{played['fingerprint']}/{played['attempt']}.",
        )
    parts = list(rollouts.parts())
    tally = Tally(job.progress, sum(rollouts.files[part]["rows"] for part in parts))
    earlier = judging.earlier(job.store, rollouts.digest) if settings.judges else None
    asked = load_judges(settings.judges.image) if settings.judges else ()
    for number, chunk in enumerate(chunks(rollouts, parts)):
        if settings.judges and not all(work.has(scores_name(part)) for part in chunk):
            fill_ledgers(job, context_of(job, tally), number, chunk, earlier)
        judged = tuple(work.path(name) for name in (ledger_name(number, judge) for judge in asked) if work.has(name))
        missing = [part for part in chunk if not work.has(scores_name(part))]
        tally.add(sum(rollouts.files[part]["rows"] for part in chunk if part not in missing))
        jobs = [PartJob(part, settings, dataset.directory, rollouts.directory, judged) for part in missing]
        for part, columns in zip(missing, job.map(score_part, jobs), strict=True):
            work.table(scores_name(part), table_of(rollouts, part, columns))
            tally.add(rollouts.files[part]["rows"])
    job.resources.release_encoder()
    work.metrics |= summary([work.path(scores_name(part)) for part in parts], list(settings.components))


def context_of(job: Job[ScoreSettings], tally: "Tally") -> JudgeContext:
    assert job.settings.judges is not None
    tables = (job.inputs["dataset"], job.inputs["rollouts"])
    return JudgeContext(
        job.settings.judges,
        job.resources,
        job.inputs.get("player"),
        job.inputs.get("first"),
        job.inputs.get("clip"),
        tables,
        ImageTable(tables),
        tally.expect,
        tally.add,
    )


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


def fill_ledgers(job: Job[ScoreSettings], context: JudgeContext, number: int, chunk: list[str], earlier) -> None:
    """Close a chunk's ledgers, one per judge; those that an earlier try has closed stay."""
    pairs: set[Pair] = set()
    for part in chunk:
        rows = list(job.inputs["rollouts"].trajectories(part))
        samples = job.inputs["dataset"].samples_of(rows)
        pairs |= judging.pairs_of(rows, samples, job.inputs["rollouts"].tools)
    judge_pairs(job.work, context, number, pairs, earlier)


def judge_pairs(work: Work, context: JudgeContext, number: int, pairs: set[Pair], earlier) -> None:
    def close(name: str, judgements: Judgements) -> None:
        work.table(ledger_name(number, name), judging.table(judgements))

    def ask(names: Iterable[str]) -> None:
        missing = [name for name in names if not work.has(ledger_name(number, name))]
        if missing:
            judging.judge(missing, pairs, context, earlier, close)

    image = context.settings.image
    ask(image.columns)
    if "teacher" in image.types and image.teacher.fallback == "self":
        judged = judging.read(work.path(ledger_name(number, "teacher")))
        if any(one.unreachable for one in judged.values()):
            ask(["self"])  # about all: whole groups fall back


def score_part(job: PartJob) -> dict[str, list[Score]]:
    """Component -> one score per trajectory of the part, in order; the components in threads beside each other."""
    dataset, rollouts = Dataset.open(job.dataset), Rollouts.open(job.rollouts)
    image, rows = job.settings.judges and job.settings.judges.image, list(rollouts.trajectories(job.part))
    batch = Batch(
        rows,
        dataset.samples_of(rows),
        job.settings.rewards,
        ImageTable([dataset, rollouts]),
        image,
        {key: one for path in job.judgements for key, one in judging.read(path).items()},
        rollouts.tools,
    )
    scorers = components(job.settings.rewards, image)
    with ThreadPoolExecutor(len(scorers)) as pool:
        scores = {name: pool.submit(scorers[name], batch) for name in job.settings.components}
        return {name: future.result() for name, future in scores.items()}


def ledger_name(number: int, component: str) -> str:
    return f"judgements-{component}-{number:05}.parquet"


def scores_name(part: str) -> str:
    return part.replace("trajectories", "scores", 1)


def table_of(rollouts: Artifact, part: str, columns: dict[str, list[Score]]) -> pa.Table:
    table = pq.read_table(rollouts.checked(part), columns=list(IDENTITY)).to_pydict()
    for name, found in columns.items():
        assert len(found) == len(table["trajectory_id"]), f"{name} has {len(found)} scores"
        table[name] = [one.row() for one in found]
    return pa.Table.from_pydict(table, records.scores(list(columns)))


def summary(parts: list[Path], names: list[str]) -> dict[str, float | None]:
    """reward/<component>: mean over the present values (None without one); missing/<component>: how many there are not."""
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


def _values(table: pa.Table, name: str) -> np.ndarray:
    found = pc.struct_field(table.column(name), "value").to_pylist()
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)


def asks_policy(config: Config) -> bool:
    """Whether a judge is a policy."""
    return bool(set(config.image.types) - {"embedding"})


def uses(config: Config) -> frozenset[str]:
    """What the judges occupy: the engine for `self`, the trainer for `attention`."""
    return frozenset().union(*(judge.uses for judge in load_judges(config.image).values()))


score = Stage(
    name="score",
    version=4,
    makes=Scores,
    settings=settings_of,
    run=run,
    reads={
        "rollouts": Input(Rollouts),
        "dataset": Input(Dataset, origin=Lineage("rollouts", "dataset")),
        "player": Input(Policy, origin=Lineage("rollouts", "policy"), counts=asks_policy, implied=True),
        "clip": Input(Clip, origin=train_clip, counts=lambda config: config.has_own_clip),
        "first": Input(
            Policy,
            origin=Lineage("player", "policy", first=True),
            counts=lambda config: "teacher" in config.image.types and config.image.teacher.model == FROZEN,
        ),
    },
    packages=lambda settings: (
        ("rapidfuzz", "math-verify", "latex2sympy2_extended", "sympy")
        + (("torch", "open-clip-torch", "transformers") if settings.judges else ())
    ),
    outside=ScoreSettings.outside,
    # What part of a picture an image shows, its tool states.
    loads=lambda settings, inputs: user_sources(inputs["rollouts"].tools) if settings.judges else {},
    check=lambda config: check_teacher(config.image, config.where.teacher),
    uses=uses,
    player="player",
)
