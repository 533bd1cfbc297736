"""Data of traces, read back from the artifacts of an iteration."""

import json
import warnings

import numpy as np

from thinkimg.errors import UserError, shorten
from thinkimg.images.toolbox import load_tools
from thinkimg.records import StopReason
from thinkimg.rewards.joined import Joined, join
from thinkimg.rewards.mix import Mix
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import IDENTITY, Rollouts
from thinkimg.store.manifest import DROPPED, MANIFEST, Reference
from thinkimg.tracking.records import LoopRecord
from thinkimg.tracking.traces import Candidate, TraceData, select_trajectories


def trace_inputs(record: LoopRecord, step: int) -> list[Reference | None]:
    """Return the step's rollouts and scores, and the loop's data set."""
    of_step = {reference.kind: reference for reference in record.iteration(step).artifacts.values()}
    dataset = next((reference for _, reference in record.references("dataset")), None)
    return [of_step.get("rollouts"), of_step.get("scores"), dataset]


def has_trace_data(store: Store, record: LoopRecord, step: int) -> bool:
    """Tell whether the step has rollouts with scores, and the store still has all that they refer to."""
    references = trace_inputs(record, step)
    paths = [store.root / str(reference) for reference in references if reference and reference.attempt]
    return len(paths) == len(references) and all(
        (path / MANIFEST).is_file() and not path.with_suffix(DROPPED).exists() for path in paths
    )


def read_trace_data(store: Store, record: LoopRecord, step: int, count: int) -> TraceData:
    """Return the data of `count` trajectories of a step that `has_trace_data`."""
    rollouts, scores, dataset = (store.resolve(reference) for reference in trace_inputs(record, step))
    joined = join(rollouts, scores)
    totals = Mix.from_tree(record.config).totals(joined.components, joined.groups)
    chosen = select_trajectories(trace_candidates(joined, totals), count)
    rows = {row.trajectory_id: row for row in rollouts.trajectories(ids=[name for name, _ in chosen])}
    values: dict[str, dict[str, float | None]] = {}
    reasons = {}
    for row in scores.rows(ids=rows):
        columns = {name: row[name] for name in row if name not in IDENTITY}
        values[row["trajectory_id"]] = {name: column["value"] for name, column in columns.items()}
        reasons |= {(row["trajectory_id"], name): explain_score(column) for name, column in columns.items()}
    return TraceData(
        [(rows[name], why) for name, why in chosen],
        rollouts.images(dataset).decoded,
        {name: {"total": float(totals[joined.ids.index(name)])} | values[name] for name in rows},
        dataset.samples_of(rows.values()),
        {key: text for key, text in reasons.items() if text},
        usable_tools(rollouts),
        record.system,
    )


def trace_candidates(joined: Joined, totals: np.ndarray) -> list[Candidate]:
    """Return all trajectories as candidates."""
    columns = np.array(list(joined.components.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row without any value
        spreads = np.nan_to_num(np.nanmax(columns, axis=0) - np.nanmin(columns, axis=0)) if len(columns) else totals * 0
    failed = joined.stops == StopReason.FAILED
    return list(map(Candidate, joined.ids, failed.tolist(), totals.tolist(), spreads.tolist()))


def usable_tools(rollouts: Rollouts) -> tuple[str, ...] | None:
    """Return the tools of the rollouts; none if a user's own is not on this machine, so that no boxes are drawn."""
    try:
        load_tools(rollouts.tools)
    except UserError:
        return ()
    return rollouts.tools


def explain_score(score: dict[str, str | None]) -> str:
    """Return the reason of a score, and its evidence as readable JSON."""
    evidence = json.dumps(json.loads(score["evidence"]), ensure_ascii=False) if score["evidence"] else None
    return shorten("; ".join(filter(None, (score["reason"], evidence))), 2000)
