"""Part of the rollouts: its scores, one column per component, as pure functions of its rows and of the ledgers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from thinkimg import records
from thinkimg.records import StopReason, Trajectory
from thinkimg.rewards import judging, sentences
from thinkimg.rewards.batch import Batch, Score, Status
from thinkimg.rewards.registry import load_components
from thinkimg.rewards.settings import ImageConfig, RewardsConfig
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import IDENTITY, Dataset, Rollouts

FAILED = "The conversation failed."
Columns = dict[str, list[Score]]
"""Component -> one score per trajectory, in order."""


@dataclass(frozen=True)
class Scoring:
    """Components of a scoring, and their settings."""

    rewards: RewardsConfig
    image: ImageConfig | None
    """None without judges of images."""
    components: tuple[str, ...]


@dataclass(frozen=True)
class PartJob:
    """Part of the rollouts to be scored, for any process that can read the artifacts."""

    part: str
    scoring: Scoring
    dataset: Path
    rollouts: Path
    ledgers: tuple[Path, ...]
    verdicts: tuple[Path, ...]
    """Ledger of the verdicts on answers, if a model judges them."""
    table: Path | None
    """Scores of some components that were made before."""


def score_part(job: PartJob) -> Columns:
    """Return the scores of a part by all components."""
    stored = {} if job.table is None else read_scores(job.table)
    missing = tuple(name for name in job.scoring.components if name not in stored)
    scoring = Scoring(job.scoring.rewards, job.scoring.image, missing)
    artifacts = Dataset.open(job.dataset), Rollouts.open(job.rollouts)
    columns = stored | compute_columns(job.part, scoring, *artifacts, ledgers=job.ledgers, verdicts=job.verdicts)
    return {name: columns[name] for name in job.scoring.components}


def compute_columns(
    part: str,
    scoring: Scoring,
    dataset: Dataset,
    rollouts: Rollouts,
    *,
    ledgers: Iterable[Path] = (),
    verdicts: Iterable[Path] = (),
) -> Columns:
    """Return the scores of a part by some components, which run in threads.

    Conversations that failed are shown to none, and their scores are missing.
    """
    if not scoring.components:
        return {}
    stored = list(rollouts.trajectories(part))
    rows = [row for row in stored if row.stop is not StopReason.FAILED]
    batch = Batch(
        rows,
        dataset.samples_of(rows),
        scoring.rewards,
        ImageTable([dataset, rollouts]),
        scoring.image,
        {key: judgement for path in ledgers for key, judgement in judging.read_ledger(path).items()},
        rollouts.tools,
        {answer: verdict for path in verdicts for answer, verdict in sentences.read_ledger(path).items()},
    )
    scorers = load_components(scoring.rewards, scoring.image)
    with ThreadPoolExecutor(len(scorers)) as pool:
        running = {name: pool.submit(scorers[name], batch) for name in scoring.components}
        scores = {name: future.result() for name, future in running.items()}
    return {name: add_failed(stored, column) for name, column in scores.items()}


def add_failed(rows: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
    """Return one score per row, from those of the rows that did not fail."""
    played = iter(scores)
    return [Score.missing(FAILED) if row.stop is StopReason.FAILED else next(played) for row in rows]


def build_table(part: Path, columns: Columns) -> pa.Table:
    """Return the scores of a part, in the order of its rows. part: the file with its trajectories."""
    table = pq.read_table(part, columns=list(IDENTITY)).to_pydict()
    for name, scores in columns.items():
        assert len(scores) == len(table["trajectory_id"]), f"{name} has {len(scores)} scores"
        table[name] = [score.row() for score in scores]
    return pa.Table.from_pydict(table, records.score_schema(list(columns)))


def read_scores(path: Path) -> Columns:
    """Return the scores of a table that `build_table` has built."""
    table = pq.read_table(path)
    return {
        name: [read_score(row) for row in table.column(name).to_pylist()]
        for name in table.column_names
        if name not in IDENTITY
    }


def read_score(row: Mapping[str, Any]) -> Score:
    """Return the score of a row of the scores' table."""
    evidence = None if row["evidence"] is None else json.loads(row["evidence"])
    return Score(row["value"], Status(row["status"]), row["reason"], evidence)
