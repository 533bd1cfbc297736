"""Comparison of two scores artifacts: their settings and inputs, the values that differ, and the reasons."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from thinkimg.analysis.explain import judgement_keys, parse_evidence, parse_score
from thinkimg.store.kinds import Scores
from thinkimg.store.manifest import Artifact

JUDGEMENT_FIELDS = (
    *("judge", "model", "weights", "prompt", "question", "original", "processed"),
    *("value", "reason", "evidence", "unreachable"),
)
ABSENT = "(none)"
"""Value of a setting that only the other recipe has."""


def compare_scores(first: Scores, second: Scores) -> dict[str, Any]:
    """Return all that differs, as JSON.

    recipe: dotted key -> [first, second] of settings, inputs, functions and packages that differ.
    only_in: trajectories and components that one of the two alone has.
    rows: an entry per trajectory and component with another score, in the order of `first`.
    components: a summary of the rows of each component.
    """
    rows = [{row["trajectory_id"]: row for row in scores.rows()} for scores in (first, second)]
    columns = [scores.components for scores in (first, second)]
    both = [name for name in columns[0] if name in columns[1]]
    pairs = [(rows[0][name], rows[1][name]) for name in rows[0] if name in rows[1]]
    cells = [
        (before["trajectory_id"], name, parse_score(before[name]), parse_score(after[name]))
        for before, after in pairs
        for name in both
        if before[name] != after[name]
    ]
    cells = [cell for cell in cells if cell[2] != cell[3]]
    verdicts = [
        scores.judgements(key for cell in cells for key in judgement_keys(cell[column]["evidence"]))
        for column, scores in ((2, first), (3, second))
    ]
    changed = [describe_change(*cell, *verdicts) for cell in cells]
    return {
        "one": str(first.reference),
        "other": str(second.reference),
        "recipe": compare_recipes(first, second),
        "only_in": {
            side: {
                "trajectories": [name for name in rows[i] if name not in rows[1 - i]],
                "components": [name for name in columns[i] if name not in columns[1 - i]],
            }
            for i, side in enumerate(("one", "other"))
        },
        "compared": len(pairs),
        "components": {name: summarise([row for row in changed if row["component"] == name]) for name in both},
        "rows": changed,
    }


def compare_recipes(first: Artifact, second: Artifact) -> dict[str, list[Any]]:
    """Return dotted key -> [first, second] of settings, inputs (by digest), functions and packages that differ."""
    flat = [dict(_flatten(_recipe(artifact))) for artifact in (first, second)]
    keys = sorted(flat[0].keys() | flat[1].keys())
    pairs = {key: [side.get(key, ABSENT) for side in flat] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _recipe(artifact: Artifact) -> dict[str, Any]:
    recipe = artifact.manifest["recipe"]
    return recipe | {"inputs": {name: entry["digest"] for name, entry in recipe["inputs"].items()}}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_change(
    trajectory_id: str, component: str, before: dict, after: dict, judged_before: Mapping, judged_after: Mapping
) -> dict[str, Any]:
    """Return a changed score with its reasons: the fields that differ, and what differs in its judgements."""
    why = [name for name in ("status", "reason") if before[name] != after[name]]
    keys = [judgement_keys(score["evidence"]) for score in (before, after)]
    changes: list[dict[str, list[Any]]] = []
    if keys[0] != keys[1]:
        changes = [
            compare_judgements(judged_before.get(old), judged_after.get(new), old, new)
            for old, new in zip_longest(*keys)  # both list the same questions in the same order
            if old != new
        ]
    else:  # a key stands for model, weights, prompt and images: another verdict means that the judge is not repeatable
        changes = [
            compare_judgements(judged_before[key], judged_after[key], key, key)
            for key in keys[0]
            if key in judged_before and key in judged_after
        ]
    changes = [change for change in changes if change]
    why += [f"judgement: {name}" for name in dict.fromkeys(name for change in changes for name in change)]
    why += [f"evidence: {name}" for name in compare_evidence(before["evidence"], after["evidence"])]
    return {
        "trajectory_id": trajectory_id,
        "component": component,
        "from": before,
        "to": after,
        "change": None if None in (before["value"], after["value"]) else after["value"] - before["value"],
        "why": why or ["value"],
        "judgements": changes,
    }


def compare_judgements(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, old_key: str | None, new_key: str | None
) -> dict[str, list[Any]]:
    """Return field -> [before, after] of what differs; the keys where one of the two judgements is not stored."""
    if before is None or after is None:
        return {"key": [old_key, new_key]}
    old, new = (parse_evidence(dict(side)) for side in (before, after))
    return {name: [old.get(name), new.get(name)] for name in JUDGEMENT_FIELDS if old.get(name) != new.get(name)}


def compare_evidence(before: Any, after: Any) -> list[str]:
    """Return the keys of the evidence that differ, without the judgements; "all" where it is not two mappings."""
    if before == after:
        return []
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return ["all"]
    return [
        name
        for name in dict.fromkeys([*before, *after])
        if name != "judgements" and (name in before, before.get(name)) != (name in after, after.get(name))
    ]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of changed values of one component, their mean and largest change, and a count per reason."""
    changes = [row["change"] for row in rows if row["change"] is not None]
    return {
        "changed": len(rows),
        "mean_change": sum(changes) / len(changes) if changes else None,
        "largest_change": max(changes, key=abs) if changes else None,
        "why": dict(Counter(reason for row in rows for reason in row["why"])),
    }
