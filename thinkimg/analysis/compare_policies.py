"""Comparison of two policies on the samples that both were evaluated on: the greedy answers that differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thinkimg.analysis.diff import compare_recipes
from thinkimg.analysis.view import Entry, View, score_answers
from thinkimg.errors import UserError
from thinkimg.records import Trajectory
from thinkimg.rewards.mix import RIGHT
from thinkimg.stages.evaluate import GREEDY
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Dataset, Evaluation
from thinkimg.store.manifest import Artifact

CHANGES = ("lost", "gained", "judged otherwise", "other answer")
"""Kinds of changes, in the order in which they are listed: right before, right after, not judged in one, neither."""


def find_evaluation(store: Store, artifact: Artifact) -> Evaluation:
    """Return an evaluation, or the newest one of a policy that shows tools' images.

    Raises UserError for another artifact, and for a policy that has none.
    """
    if isinstance(artifact, Evaluation):
        return artifact
    if artifact.kind != "policy":
        raise UserError(
            f"{artifact.reference} can't be compared with an evaluation.",
            hint="Name two scores, two evaluations, or two policies.",
        )
    evaluations = [
        evaluation
        for evaluation in store.list("evaluation")
        if "policy" in evaluation.inputs
        and evaluation.inputs["policy"].digest == artifact.digest
        and not evaluation.dropped
        and not evaluation.manifest["recipe"]["config"].get("blind")
    ]
    if not evaluations:
        raise UserError(
            f"policy/{artifact.short} has no evaluation.", hint=f"thinkimg evaluate --policy {artifact.short}"
        )
    return max(evaluations, key=lambda evaluation: evaluation.manifest["finished"])


def compare_evaluations(store: Store, first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """Return what differs between the greedy answers of two evaluations, as JSON.

    recipe: as in `diff.compare_scores`. compared: number of samples that both have. accuracy: over these, of the first
    and the second. changes: kind of change -> number. p_value: two-sided sign test on lost and gained answers (McNemar,
    1947, exact), None where there are none. rows: an entry per sample with another answer or verdict, by CHANGES.
    Raises UserError where they are of different data sets.
    """
    dataset: Dataset = store.origin(first, "dataset")
    if second.inputs["dataset"].digest != dataset.digest:
        raise UserError(
            f"{first.reference} and {second.reference} are of different data sets.",
            hint="Evaluate both policies on one: thinkimg evaluate --policy … --dataset …",
        )
    sides = [read_greedy(evaluation, dataset) for evaluation in (first, second)]
    both = [name for name in sides[0] if name in sides[1]]
    rows = [describe_pair(*sides[0][name], *sides[1][name]) for name in both]
    changed = sorted((row for row in rows if row["change"]), key=lambda row: CHANGES.index(row["change"]))
    values = [[row[side]["value"] for row in rows if row[side]["value"] is not None] for side in ("from", "to")]
    changes = {kind: sum(row["change"] == kind for row in changed) for kind in CHANGES}
    return {
        "one": str(first.reference),
        "other": str(second.reference),
        "recipe": compare_recipes(first, second),
        "only_in": {
            side: [name for name in sides[i] if name not in sides[1 - i]] for i, side in enumerate(("one", "other"))
        },
        "compared": len(both),
        "accuracy": [sum(value >= RIGHT for value in side) / len(side) if side else None for side in values],
        "changes": changes,
        "p_value": sign_test(changes["lost"], changes["gained"]),
        "rows": changed,
    }


def read_greedy(evaluation: Evaluation, dataset: Dataset) -> dict[str, tuple[Trajectory, Mapping[str, Any]]]:
    """Return sample id -> (greedy trajectory, its score of `answer`), in the order of the evaluation."""
    rows = [row for row in read_texts(evaluation) if row.index == GREEDY]
    scores = score_answers(evaluation, dataset, rows)
    return {row.sample_id: (row, scores[row.trajectory_id]["answer"]) for row in rows}


def read_texts(evaluation: Evaluation, ids: Sequence[str] | None = None) -> Iterator[Trajectory]:
    """Yield the trajectories, all or those of some ids, without their tokens, so that thousands fit into memory."""
    for row in evaluation.trajectories(ids=ids):
        yield replace(row, tokens=(), roles=(), logprobs=())


def describe_pair(
    first: Trajectory, first_score: Mapping[str, Any], second: Trajectory, second_score: Mapping[str, Any]
) -> dict[str, Any]:
    """Return both answers about a sample. change: one of CHANGES, None where answer and verdict are the same."""
    sides = [
        {
            "trajectory_id": row.trajectory_id,
            "answer": row.answer,
            "value": score["value"],
            "reason": score["reason"],
            "stop": str(row.stop),
            "calls": [turn.tool for turn in row.turns if turn.tool],
        }
        for row, score in ((first, first_score), (second, second_score))
    ]
    before, after = (None if side["value"] is None else side["value"] >= RIGHT for side in sides)
    if before != after:
        change = "judged otherwise" if None in (before, after) else "gained" if after else "lost"
    else:
        change = "other answer" if first.answer != second.answer else None
    return {"sample_id": first.sample_id, "change": change, "from": sides[0], "to": sides[1]}


def sign_test(lost: int, gained: int) -> float | None:
    """Return the probability of a split at least as uneven, if losing and gaining were equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(gained, lost + gained).pvalue) if lost + gained else None


def read_pairs(changes: Mapping[str, Any], first: View, second: View) -> Iterator[tuple[str, Entry, Entry]]:
    """Yield (heading, first conversation, second) of each changed pair of `compare_evaluations`, with pictures.

    Each evaluation is read once. The pictures of one pair are in memory at a time.
    """
    sides = []
    for view, side in ((first, "from"), (second, "to")):
        ids = [row[side]["trajectory_id"] for row in changes["rows"]]
        texts = {row.trajectory_id: row for row in read_texts(view.episodes, ids)}
        sides.append(view.describe([texts[name] for name in ids]))
    for row, before, after in zip(changes["rows"], *sides, strict=True):
        yield f"{row['change']}: {row['sample_id']}", before, after
