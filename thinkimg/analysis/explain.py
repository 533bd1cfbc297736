"""Explanation of one trajectory's reward: conversation, components with their judgements, totals and advantage."""

import json
from collections.abc import Iterable, Mapping
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

EXAMPLES = 5  # of ids, in an error
SCORE_FIELDS = ("value", "status", "reason", "evidence")


def find_trajectory(store: Store, prefix: str, scores: Scores | None = None) -> tuple[Scores, str, list[Scores]]:
    """Return (scores, trajectory id, other scores of it) for the beginning of an id; the newest scores unless given.

    Raises UserError where no trajectory, or several, begin with the prefix.
    """
    scores_of: dict[str, list[Scores]] = {}
    all_ids: dict[str, None] = {}
    candidates = [scores] if scores else sorted(store.list("scores"), key=lambda entry: entry.manifest["finished"])
    for artifact in candidates:
        ids, _ = artifact.identities()
        all_ids |= dict.fromkeys(ids)
        for name in ids:
            if name.startswith(prefix):
                scores_of.setdefault(name, []).append(artifact)
    if prefix in scores_of:
        scores_of = {prefix: scores_of[prefix]}
    if len(scores_of) == 1 and prefix:
        [(name, artifacts)] = scores_of.items()
        return artifacts[-1], name, artifacts[:-1]
    where = f"in {scores.reference}" if scores else f"in the scores in {store.root}"
    ids = list(scores_of or all_ids)
    more = f" and {len(ids) - EXAMPLES} more" if len(ids) > EXAMPLES else ""
    hint = f"There are {', '.join(ids[:EXAMPLES])}{more}." if ids else "There are no scores yet."
    count = f"{len(scores_of)} trajectories {where} begin" if scores_of else f"No trajectory {where} begins"
    raise UserError(f"{count} with '{prefix}'.", hint=hint)


def explain_reward(store: Store, scores: Scores, trajectory_id: str, config: Config) -> dict[str, Any]:
    """Return the explanation as JSON. config: its mix is shown where no policy was trained, if the scores have it."""
    scored = open_scores(scores, store)
    dataset = store.origin(scored.rollouts, "dataset")
    row, sample = read_trajectory(scored.rollouts, dataset, trajectory_id)
    index = scored.ids.index(trajectory_id)
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
        "coordinates": str(row.coordinates),
        "turns": [asdict(turn) for turn in row.turns],
        "images": describe_images(row, sample, scored.rollouts, dataset),
        "components": read_components(scores, [trajectory_id])[trajectory_id],
        "weighed": [weighed.explain(row, index) for weighed in weigh(store, scored, config)],
    }


def read_trajectory(rollouts: Rollouts, dataset: Dataset, trajectory_id: str) -> tuple[Trajectory, Sample]:
    """Return a trajectory and its sample. Raises UserError where one of them is missing."""
    row = next(rollouts.trajectories(ids=[trajectory_id]), None)
    if row is None:
        raise UserError(f"{rollouts.reference} has no trajectory {trajectory_id}.")
    sample = dataset.samples_of([row]).get(row.sample_id)
    if sample is None:
        raise UserError(f"{dataset.reference} has no sample {row.sample_id}.")
    return row, sample


def describe_images(row: Trajectory, sample: Sample, rollouts: Rollouts, dataset: Dataset) -> list[dict[str, Any]]:
    """Return each image of the conversation in order: hash, size in pixels, size as the model saw it, origin."""
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


def read_components(scores: Scores, ids: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return trajectory id -> component -> value, status, reason, evidence, and the judgements that the evidence names.

    A judgement that is not stored is its key alone.
    """
    rows = {
        row["trajectory_id"]: {name: parse_score(score) for name, score in row.items() if name not in IDENTITY}
        for row in scores.rows(ids)
    }
    listed = [score for components in rows.values() for score in components.values()]
    stored = scores.judgements(key for score in listed for key in judgement_keys(score["evidence"]))
    for score in listed:
        keys = judgement_keys(score["evidence"])
        score["judgements"] = [parse_evidence(stored[key]) if key in stored else {"key": key} for key in keys]
    return rows


def parse_score(score: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored score with its evidence parsed."""
    evidence = score["evidence"]
    return {name: score[name] for name in SCORE_FIELDS} | {"evidence": json.loads(evidence) if evidence else None}


def judgement_keys(evidence: Any) -> list[str]:
    """Return the keys of the judgements that a component's evidence names."""
    named = evidence.get("judgements") if isinstance(evidence, dict) else None
    return [key for key in named if isinstance(key, str)] if isinstance(named, list) else []


def parse_evidence(judgement: dict[str, Any]) -> dict[str, Any]:
    """Return a judgement with its evidence parsed."""
    evidence = judgement.get("evidence")
    return judgement | {"evidence": json.loads(evidence) if isinstance(evidence, str) and evidence else evidence}


def weigh(store: Store, scored: Scored, config: Config) -> list["Weighed"]:
    """Return the rows under each weighing whose mix has all its columns in the scores; see `joined.weighings`."""
    return [
        Weighed(scored, weighing)
        for weighing in weighings(store, scored.scores, config)
        if set(scored.components).issuperset(weighing.mix.columns())
    ]


class Weighed:
    """Totals and advantages of all rows under one weighing; as stored with the policy where one was trained."""

    def __init__(self, scored: Scored, weighing: Weighing) -> None:
        self._scored, self.weighing = scored, weighing
        self._totals, self._result = weighing.of(scored)
        self._columns = weighing.mix.values(scored.components)
        self._used = weighing.policy.advantages() if weighing.policy is not None else None
        self._members = {group: np.flatnonzero(scored.groups == group) for group in dict.fromkeys(scored.groups)}

    def explain(self, row: Trajectory, index: int) -> dict[str, Any]:
        """Return the terms of the total of the row at `index`, and the rows of its group.

        terms: name in the mix, column, weight, value (None where the column has none), group_mean (whether the value is
        the group's mean), adds (weight x value). group: total, advantage, included and reason of every row.
        """
        members = self._members[self._scored.groups[index]]
        group = [self._entry(i) for i in members]
        own = next(entry for entry in group if entry["trajectory_id"] == row.trajectory_id)
        counted = members[self._scored.counted[members]]
        return {
            "by": self.weighing.name,
            "trained": self._used is not None,
            **self.weighing.mix.fingerprinted(),
            "terms": self._terms(index, members),
            **{name: value for name, value in own.items() if name != "trajectory_id"},
            "included": own["included"] and not _masked(self.weighing, row),
            "why": explain_inclusion(
                self._result.reasons[index], self.weighing, row, self._totals[index], self._totals[counted]
            ),
            "group": group,
        }

    def _entry(self, index: int) -> dict[str, Any]:
        name = self._scored.ids[index]
        if self._used is not None:
            return {key: value for key, value in self._used[name].items() if key != "group_id"}
        return {
            "trajectory_id": name,
            "total": float(self._totals[index]),
            "advantage": float(self._result.advantages[index]),
            "included": bool(self._result.included[index]),
            "reason": str(self._result.reasons[index]),
        }

    def _terms(self, index: int, members: np.ndarray) -> list[dict[str, Any]]:
        terms = []
        for name, column, weight in self.weighing.mix.terms():
            values = self._columns[name, column]
            present = members[self._scored.counted[members] & ~np.isnan(values[members])]
            missing = bool(np.isnan(values[index]))
            counting = present if missing else [index]
            value = float(values[counting].mean()) if len(counting) else None
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
        return terms


def _masked(weighing: Weighing, row: Trajectory) -> bool:
    return weighing.mask_truncated and row.stop is StopReason.TRUNCATED


def explain_inclusion(reason: Inclusion, weighing: Weighing, row: Trajectory, total: float, totals: np.ndarray) -> str:
    """Return one sentence on why the row is in the loss or not. totals: (n,) of the group's counted rows."""
    spread = f"{np.std(totals, ddof=1):.3g}" if len(totals) > 1 else "0"
    match reason:
        case Inclusion.INVALID if row.stop is StopReason.FAILED:
            return "Left out: the conversation failed for a reason that is not the policy's."
        case Inclusion.INVALID:
            return f"Left out: it ended by {row.stop} with every turn in order; with more room it might be right."
        case Inclusion.ALONE:
            return "Left out: no other row of its group counts, so it can't be compared."
        case Inclusion.SILENT:
            return f"Left out: its group's totals have a standard deviation of {spread}, below {weighing.min_std:g}."
    if _masked(weighing, row):
        return "Left out by mask_truncated_completions: a turn reached its token limit. It counts in its group."
    return f"In the loss: its total is {total:.3g}, its group's mean {totals.mean():.3g} (standard deviation {spread})."
