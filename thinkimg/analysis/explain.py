"""The whole story of one trajectory's reward: what was said and shown, what each component made of it, and what came of it."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from thinkimg.analysis.joined import Scored, Weighing, open_scores, weighings
from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import Inclusion
from thinkimg.records import Sample, StopReason, Trajectory
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import IDENTITY, Dataset, Rollouts, Scores

SHOWN = 5  # candidates in an error


def find(store: Store, prefix: str, scores: Scores | None = None) -> tuple[Scores, str, list[Scores]]:
    """(scores, trajectory id, other scores of it) for the beginning of an id: the scores made last, unless they are named.

    Raises UserError where no trajectory or several begin so.
    """
    places: dict[str, list[Scores]] = {}
    every: list[str] = []
    for artifact in [scores] if scores else sorted(store.list("scores"), key=lambda one: one.manifest["finished"]):
        ids, _ = artifact.identities()
        every += ids
        for name in ids:
            if name.startswith(prefix):
                places.setdefault(name, []).append(artifact)
    if prefix in places:
        places = {prefix: places[prefix]}
    if len(places) == 1 and prefix:
        [(name, found)] = places.items()
        return found[-1], name, found[:-1]
    where = f"in {scores.reference}" if scores else f"in the scores under {store.root}"
    listed = ", ".join(list(places or dict.fromkeys(every))[:SHOWN])
    left = len(places or set(every)) - SHOWN
    hint = f"There are {listed}{f' and {left} more' if left > 0 else ''}." if listed else "There are no scores yet."
    what = f"{len(places)} trajectories {where} begin" if places else f"No trajectory {where} begins"
    raise UserError(f"{what} with '{prefix}'.", hint=hint)


def story(store: Store, scores: Scores, trajectory_id: str, config: Config) -> dict[str, Any]:
    """All of it as JSON: see the keys. config: whose mix is shown where no policy was trained on the scores."""
    scored = open_scores(scores, store)
    dataset = store.origin(scored.rollouts, "dataset")
    row, sample = played(scored.rollouts, dataset, trajectory_id)
    place = scored.ids.index(trajectory_id)
    return {
        "trajectory_id": trajectory_id,
        "sample_id": row.sample_id,
        "group_id": row.group_id,
        "index": row.index,
        "policy": row.policy,
        "weights": row.weights,
        "artifacts": {
            "scores": str(scores.reference),
            "rollouts": str(scored.rollouts.reference),
            "dataset": str(dataset.reference),
        },
        "question": sample.question,
        "choices": list(sample.choices),
        "right_answer": sample.answer,
        "answer": row.answer,
        "stop": str(row.stop),
        "error": row.error,
        "turns": [asdict(turn) for turn in row.turns],
        "images": images(row, sample, scored.rollouts, dataset),
        "components": components(scores, trajectory_id),
        "weighed": [weighed(scored, weighing, row, place) for weighing in weighings(store, scores, config)],
    }


def played(rollouts: Rollouts, dataset: Dataset, trajectory_id: str) -> tuple[Trajectory, Sample]:
    row = next(rollouts.trajectories(ids=[trajectory_id]), None)
    if row is None:
        raise UserError(f"{rollouts.reference} has no trajectory {trajectory_id}.")
    sample = dataset.samples_of([row]).get(row.sample_id)
    if sample is None:
        raise UserError(f"{dataset.reference} has no sample {row.sample_id}.")
    return row, sample


def images(row: Trajectory, sample: Sample, rollouts: Rollouts, dataset: Dataset) -> list[dict[str, Any]]:
    """Each image of the conversation in order: hash, size in pixels, size as the model saw it, and where it came from."""
    sizes = rollouts.image_sizes(dataset, set(row.images))
    makers = [None] * len(sample.images) + [number for number, turn in enumerate(row.turns) if turn.image is not None]
    entries = []
    for number, (sha256, (seen_width, seen_height)) in enumerate(zip(row.images, row.sizes, strict=True)):
        width, height = sizes.get(sha256, (None, None))
        entries.append(
            {
                "index": number,
                "sha256": sha256,
                "width": width,
                "height": height,
                "seen_width": seen_width,
                "seen_height": seen_height,
                "made_by_turn": makers[number] if number < len(makers) else None,
            }
        )
    return entries


def components(scores: Scores, trajectory_id: str) -> dict[str, dict[str, Any]]:
    """Component -> value, status, reason, evidence, and the judgements that the evidence names, as they are stored."""
    row = next(scores.rows(ids=[trajectory_id]))
    found = {name: score for name, score in row.items() if name not in IDENTITY}
    for score in found.values():
        score["evidence"] = score["evidence"] and json.loads(score["evidence"])
    keys = {name: judgement_keys(score["evidence"]) for name, score in found.items()}
    stored = scores.judgements(key for some in keys.values() for key in some)
    for name, score in found.items():
        score["judgements"] = [readable(stored[key]) if key in stored else {"key": key} for key in keys[name]]
    return found


def judgement_keys(evidence: Any) -> list[str]:
    named = evidence.get("judgements") if isinstance(evidence, dict) else None
    return [key for key in named if isinstance(key, str)] if isinstance(named, list) else []


def readable(judgement: dict[str, Any]) -> dict[str, Any]:
    evidence = judgement.get("evidence")
    return judgement | {"evidence": json.loads(evidence) if isinstance(evidence, str) and evidence else evidence}


def weighed(scored: Scored, weighing: Weighing, row: Trajectory, place: int) -> dict[str, Any]:
    """Return the terms that one mix made of the trajectory, and its group. Where a policy was trained: the rows that it was trained with.

    terms: name in the mix, column, weight, value that was added (None where the column has none), whether it is the
    group's mean, weight x value. group: every row of the group with total, advantage, included and reason.
    """
    totals, result = weighing.of(scored)
    members = np.flatnonzero(scored.groups == scored.groups[place])
    columns = weighing.mix.values(scored.components)
    terms = []
    for name, column, weight in weighing.mix.parts():
        values = columns[name, column]
        present = members[scored.counted[members] & ~np.isnan(values[members])]
        missing = bool(np.isnan(values[place]))
        value = float(values[present].mean()) if missing and len(present) else None if missing else float(values[place])
        terms.append(
            {
                "name": name,
                "column": column,
                "weight": weight,
                "value": value,
                "group_mean": missing,
                "adds": weight * (value or 0.0),
            }
        )
    reason = result.reasons[place]
    used = weighing.policy.advantages() if weighing.policy is not None else None
    group = [
        {
            "trajectory_id": scored.ids[i],
            "total": float(totals[i]),
            "advantage": float(result.advantages[i]),
            "included": bool(result.included[i]),
            "reason": str(result.reasons[i]),
        }
        if used is None
        else {name: value for name, value in used[scored.ids[i]].items() if name != "group_id"}
        for i in members
    ]
    own = next(one for one in group if one["trajectory_id"] == row.trajectory_id)
    return {
        "by": weighing.name,
        "trained": used is not None,
        **weighing.mix.slice(),
        "terms": terms,
        **{name: value for name, value in own.items() if name != "trajectory_id"},
        "included": own["included"] and not _masked(weighing, row),
        "why": why(reason, weighing, row, totals[place], totals[members[scored.counted[members]]]),
        "group": group,
    }


def _masked(weighing: Weighing, row: Trajectory) -> bool:
    return weighing.mask_truncated and row.stop is StopReason.TRUNCATED


def why(reason: Inclusion, weighing: Weighing, row: Trajectory, total: float, totals: np.ndarray) -> str:
    """One sentence. totals: (n,) of the group's counted rows."""
    spread = f"{np.std(totals, ddof=1):.3g}" if len(totals) > 1 else "0"
    match reason:
        case Inclusion.INVALID if row.stop is StopReason.FAILED:
            return "Left out: the conversation failed, which says nothing about the policy."
        case Inclusion.INVALID:
            return (
                f"Left out: it ended by {row.stop} with every turn in order, and might have been right with more room."
            )
        case Inclusion.ALONE:
            return "Left out: no other row of its group counts, so that there is nothing to compare it with."
        case Inclusion.SILENT:
            return (
                f"Left out: the totals of its group have a deviation of {spread}, below min_std {weighing.min_std:g}."
            )
    if _masked(weighing, row):
        return "Left out: a turn reached its token limit, and mask_truncated_completions is on; it counts in its group."
    return f"In the loss: its total is {total:.3g}, its group's mean {totals.mean():.3g} (deviation {spread})."
