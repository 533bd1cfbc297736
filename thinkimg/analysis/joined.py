"""Scores with all that their mix needs, and the policies that were trained on them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from thinkimg.config import Config
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import AdvantageResult, advantages
from thinkimg.rewards.mix import Mix
from thinkimg.stages.score import read_scores
from thinkimg.stages.train import counted
from thinkimg.store.artifacts import Artifact, Store

JUDGEMENTS = "judgements"
"""Table of a scores artifact: key, judge, model, weights, prompt, question, original, processed, value, reason, evidence.

Two components may name one key, where one judge answered for both: the verdict is the same."""


@dataclass(frozen=True)
class Scored:
    """One iteration's scores: N rows in order of the rollouts.

    components: column -> (N,) float64, NaN where missing. groups: (N,) ids. counted: (N,) bool, see stages.train.
    """

    scores: Artifact
    rollouts: Artifact
    components: dict[str, np.ndarray]
    ids: list[str]
    groups: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class Weighing:
    """A mix and what advantages are made with: of a policy that was trained, or of the config at hand."""

    name: str
    mix: Mix
    scale_rewards: str
    min_std: float
    mask_truncated: bool
    policy: Artifact | None = None

    def of(self, scored: Scored) -> tuple[np.ndarray, AdvantageResult]:
        """Totals and advantages, as stages.train makes them."""
        totals = self.mix.totals(scored.components, scored.groups, scored.counted)
        found = advantages(
            totals, scored.groups, scored.counted, scale_rewards=self.scale_rewards, min_std=self.min_std
        )
        return totals, found


def open_scores(scores: Artifact, store: Store) -> Scored:
    rollouts = store.origin(scores, "rollouts")
    components, ids, groups = read_scores(scores)
    ends = rollouts.table("trajectories", ["trajectory_id", "stop", "turns"]).to_pydict()
    if ids != ends["trajectory_id"]:
        raise UserError(f"{scores.reference} does not hold the trajectories of {rollouts.reference}.")
    return Scored(scores, rollouts, components, ids, np.array(groups), counted(ends["stop"], ends["turns"]))


def trained(store: Store, scores: Artifact) -> list[Artifact]:
    """The policies that these scores were trained on, oldest first."""
    found = []
    for policy in store.list("policy"):
        used = policy.manifest["recipe"]["inputs"].get("scores")
        if used and used["digest"] == scores.digest:
            found.append(policy)
    return sorted(found, key=lambda policy: policy.manifest["finished"])


def weighings(store: Store, scores: Artifact, config: Config) -> list[Weighing]:
    """Of each policy that was trained on the scores, oldest first; of the config where there is none."""
    found = []
    for policy in trained(store, scores):
        recipe = policy.manifest["recipe"]["config"]
        found.append(_weighing(f"policy/{policy.short}", Mix.of(recipe), recipe["train"], policy))
    if found:
        return found
    mix = Mix.of_config(config)
    return [_weighing(f"preset {config.preset}", mix, config.train.model_dump(mode="json"), None)]


def _weighing(name: str, mix: Mix, train: dict[str, Any], policy: Artifact | None) -> Weighing:
    loss = train["loss"]
    return Weighing(
        name, mix, loss["scale_rewards"], train["min_std"], bool(loss["mask_truncated_completions"]), policy
    )


def stored_advantages(policy: Artifact) -> dict[str, dict[str, Any]]:
    """Trajectory id -> {total, advantage, included, reason, group_id} as the policy was trained."""
    return {row["trajectory_id"]: row for row in policy.table("advantages").to_pylist()}


def judgements(scores: Artifact, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Key -> the judgement as it is stored; those that are not there are left out, as is all where there is no table."""
    wanted = set(keys)
    if not wanted or not any(name.startswith(JUDGEMENTS) for name in scores.files):
        return {}
    rows = (row for batch in scores.batches(JUDGEMENTS) for row in batch.to_pylist())
    return {row["key"]: row for row in rows if row["key"] in wanted}
