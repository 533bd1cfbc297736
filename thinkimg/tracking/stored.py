"""What traces need, read back from the artifacts of an iteration."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from thinkimg.errors import UserError
from thinkimg.images.toolbox import load_tools
from thinkimg.records import Sample, StopReason, Trajectory
from thinkimg.rewards.joined import Joined, join
from thinkimg.rewards.mix import Mix
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import IDENTITY, Rollouts
from thinkimg.store.manifest import DROPPED, MANIFEST, Reference
from thinkimg.tracking.records import LoopRecord
from thinkimg.tracking.traces import Candidate, select


@dataclass(frozen=True)
class Stored:
    """The arguments of `log_traces` for one step."""

    chosen: list[tuple[Trajectory, str]]
    images: Callable[[str], Image]
    scores: dict[str, dict[str, float | None]]
    samples: dict[str, Sample]
    reasons: dict[tuple[str, str], str]
    tools: tuple[str, ...] | None


def sources(record: LoopRecord, step: int) -> list[Reference | None]:
    """The step's rollouts and scores, and the loop's data set."""
    of_step = {reference.kind: reference for reference in record.iteration(step).artifacts.values()}
    dataset = next((reference for _, reference in record.references("dataset")), None)
    return [of_step.get("rollouts"), of_step.get("scores"), dataset]


def has_traces(store: Store, record: LoopRecord, step: int) -> bool:
    """Whether the step has rollouts with scores, and the store (still) all that they refer to."""
    places = [reference and reference.attempt and store.root / str(reference) for reference in sources(record, step)]
    return all(place and (place / MANIFEST).is_file() and not place.with_suffix(DROPPED).exists() for place in places)


def stored(store: Store, record: LoopRecord, step: int, count: int) -> Stored:
    """Read `count` trajectories of a step that `has_traces`."""
    rollouts, scores, dataset = (store.resolve(reference) for reference in sources(record, step))
    joined = join(rollouts, scores)
    totals = Mix.of(record.config).totals(joined.components, joined.groups)
    chosen = select(candidates(joined, totals), count)
    rows = {row.trajectory_id: row for row in rollouts.trajectories(ids=[name for name, _ in chosen])}
    values: dict[str, dict[str, float | None]] = {}
    reasons = {}
    for row in scores.rows(ids=rows):
        columns = {name: row[name] for name in row if name not in IDENTITY}
        values[row["trajectory_id"]] = {name: column["value"] for name, column in columns.items()}
        reasons |= {(row["trajectory_id"], name): explain(column) for name, column in columns.items()}
    return Stored(
        [(rows[name], why) for name, why in chosen],
        rollouts.images(dataset).decoded,
        {name: {"total": float(totals[joined.ids.index(name)])} | values[name] for name in rows},
        dataset.samples_of(rows.values()),
        {key: text for key, text in reasons.items() if text},
        tools_of(rollouts),
    )


def candidates(joined: Joined, totals: np.ndarray) -> list[Candidate]:
    """All trajectories, as `select` wants them."""
    columns = np.array(list(joined.components.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row without any value
        spreads = np.nan_to_num(np.nanmax(columns, axis=0) - np.nanmin(columns, axis=0)) if len(columns) else totals * 0
    failed = joined.stops == StopReason.FAILED
    return list(map(Candidate, joined.ids, failed.tolist(), totals.tolist(), spreads.tolist()))


def tools_of(rollouts: Rollouts) -> tuple[str, ...] | None:
    """Return the tools that the rollouts were played with; none where a user's own is not on this machine: no boxes then."""
    try:
        load_tools(rollouts.tools)
    except UserError:
        return ()
    return rollouts.tools


def explain(score: dict[str, str | None]) -> str:
    """Why a score is what it is: its reason, and its evidence in readable JSON."""
    evidence = json.dumps(json.loads(score["evidence"]), ensure_ascii=False) if score["evidence"] else None
    return "; ".join(filter(None, (score["reason"], evidence)))[:2000]
