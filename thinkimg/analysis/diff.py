"""Two scores artifacts compared: first what they were made with, then which values differ, and what is behind that."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from thinkimg.analysis.explain import judgement_keys, readable
from thinkimg.store.kinds import Scores
from thinkimg.store.manifest import Artifact

PARTS = ("value", "status", "reason", "evidence")
JUDGED = ("judge", "model", "weights", "prompt", "question", "original", "processed", "value", "reason", "evidence",
          "unreachable")  # fmt: skip
ABSENT = "(none)"
"""In the place of a setting that only one of two recipes has."""


def diff(one: Scores, other: Scores) -> dict[str, Any]:
    """JSON: `recipe` (what differs between the two, dotted key -> [one, other]), `only_in` (trajectories and components of
    one alone), `rows` (one entry per trajectory and component that differ) and `components` (their summary).

    The same artifact twice gives empty lists. Rows are in order of `one`.
    """
    rows = [{row["trajectory_id"]: row for row in scores.rows()} for scores in (one, other)]
    columns = [scores.components for scores in (one, other)]
    both = [name for name in columns[0] if name in columns[1]]
    pairs = [(rows[0][name], rows[1][name]) for name in rows[0] if name in rows[1]]
    cells = [
        (before["trajectory_id"], name, plain(before[name]), plain(after[name]))
        for before, after in pairs
        for name in both
        if before[name] != after[name]
    ]
    cells = [cell for cell in cells if cell[2] != cell[3]]
    verdicts = [
        scores.judgements(key for cell in cells for key in judgement_keys(cell[place]["evidence"]))
        for place, scores in ((2, one), (3, other))
    ]
    changed = [entry(*cell, *verdicts) for cell in cells]
    return {
        "one": str(one.reference),
        "other": str(other.reference),
        "recipe": recipes(one, other),
        "only_in": {
            "one": {
                "trajectories": [name for name in rows[0] if name not in rows[1]],
                "components": [name for name in columns[0] if name not in columns[1]],
            },
            "other": {
                "trajectories": [name for name in rows[1] if name not in rows[0]],
                "components": [name for name in columns[1] if name not in columns[0]],
            },
        },
        "compared": len(pairs),
        "components": {name: summary([row for row in changed if row["component"] == name]) for name in both},
        "rows": changed,
    }


def recipes(one: Artifact, other: Artifact) -> dict[str, list[Any]]:
    """Dotted key -> [one, other] of the settings, inputs (by digest), functions and packages that differ."""
    flat = [dict(_flat(_recipe(artifact))) for artifact in (one, other)]
    keys = sorted(flat[0].keys() | flat[1].keys())
    pairs = {key: [side.get(key, ABSENT) for side in flat] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _recipe(artifact: Artifact) -> dict[str, Any]:
    recipe = artifact.manifest["recipe"]
    return recipe | {"inputs": {name: entry["digest"] for name, entry in recipe["inputs"].items()}}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(score: Mapping[str, Any]) -> dict[str, Any]:
    """A score with its evidence read."""
    evidence = score["evidence"]
    return {name: score[name] for name in PARTS} | {"evidence": json.loads(evidence) if evidence else None}


def entry(
    trajectory_id: str, component: str, before: dict, after: dict, judged_before: Mapping, judged_after: Mapping
) -> dict[str, Any]:
    """A value that differs, and why: which of its parts, and what differs between the judgements behind it."""
    why = [name for name in ("status", "reason") if before[name] != after[name]]
    keys = [judgement_keys(score["evidence"]) for score in (before, after)]
    changes: list[dict[str, list[Any]]] = []
    if keys[0] != keys[1]:
        changes = [
            judgement(judged_before.get(first), judged_after.get(second), first, second)
            for first, second in _paired(*keys)
            if first != second
        ]
    else:  # one key is one model, weights, prompt and images: where the verdicts differ, the judge does not repeat itself
        changes = [
            judgement(judged_before[key], judged_after[key], key, key)
            for key in keys[0]
            if key in judged_before and key in judged_after
        ]
    changes = [change for change in changes if change]
    why += [f"judgement: {name}" for name in dict.fromkeys(name for change in changes for name in change)]
    why += [f"evidence: {name}" for name in evidence(before["evidence"], after["evidence"])]
    return {
        "trajectory_id": trajectory_id,
        "component": component,
        "from": before,
        "to": after,
        "change": None if None in (before["value"], after["value"]) else after["value"] - before["value"],
        "why": why or ["value"],
        "judgements": changes,
    }


def _paired(one: list[str], other: list[str]) -> Iterator[tuple[str | None, str | None]]:
    """By place: both list the same questions in the same order."""
    for place in range(max(len(one), len(other))):
        yield one[place] if place < len(one) else None, other[place] if place < len(other) else None


def judgement(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, first: str | None, second: str | None
) -> dict[str, list[Any]]:
    """Field -> [before, after] of what differs; the keys where one of the two judgements is not stored."""
    if before is None or after is None:
        return {"key": [first, second]}
    sides = [readable(dict(side)) for side in (before, after)]
    return {name: [side.get(name) for side in sides] for name in JUDGED if sides[0].get(name) != sides[1].get(name)}


def evidence(before: Any, after: Any) -> list[str]:
    """The keys of the evidence that differ, but for the judgements; "all" where it is no mapping on both sides."""
    if before == after:
        return []
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return ["all"]
    return [
        name
        for name in dict.fromkeys([*before, *after])
        if name != "judgements" and (name in before, before.get(name)) != (name in after, after.get(name))
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the changed values of one component: how many, their mean and largest change, and how often each reason."""
    changes = [row["change"] for row in rows if row["change"] is not None]
    return {
        "changed": len(rows),
        "mean_change": sum(changes) / len(changes) if changes else None,
        "largest_change": max(changes, key=abs) if changes else None,
        "why": dict(Counter(reason for row in rows for reason in row["why"])),
    }
