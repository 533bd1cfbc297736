"""Scores with all that their mix needs, and the policies that were trained on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from thinkimg.config.tree import Config
from thinkimg.grpo.advantages import AdvantageResult, advantages
from thinkimg.rewards.joined import Joined, join
from thinkimg.rewards.mix import Mix
from thinkimg.store.artifacts import Artifact, Store
from thinkimg.store.kinds import Rollouts, Scores


@dataclass(frozen=True)
class Scored(Joined):
    """One iteration's scores, with their artifacts."""

    scores: Scores
    rollouts: Rollouts


@dataclass(frozen=True)
class Weighing:
    """A mix and what advantages are made with: of a policy that was trained, or of the config at hand."""

    name: str
    mix: Mix
    scale_rewards: str
    min_std: float
    mask_truncated: bool
    policy: Artifact | None = None

    def of(self, joined: Joined) -> tuple[np.ndarray, AdvantageResult]:
        """Totals and advantages, as stages.train makes them."""
        totals = joined.totals(self.mix)
        return totals, advantages(
            totals, joined.groups, joined.counted, scale_rewards=self.scale_rewards, min_std=self.min_std
        )


def open_scores(scores: Scores, store: Store) -> Scored:
    rollouts = store.origin(scores, "rollouts")
    return Scored(**vars(join(rollouts, scores)), scores=scores, rollouts=rollouts)


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
    mix = Mix.of_settings(config.mix, config.image)
    return [_weighing(f"preset {config.preset}", mix, config.train.model_dump(mode="json"), None)]


def _weighing(name: str, mix: Mix, train: dict[str, Any], policy: Artifact | None) -> Weighing:
    loss = train["loss"]
    return Weighing(
        name, mix, loss["scale_rewards"], train["min_std"], bool(loss["mask_truncated_completions"]), policy
    )
