"""Scores joined with their rollouts, and the mixes that they were or could be weighed with."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from thinkimg.config.tree import Config
from thinkimg.grpo.advantages import AdvantageResult, group_advantages
from thinkimg.rewards.joined import Joined, join
from thinkimg.rewards.mix import Mix
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Rollouts, Scores
from thinkimg.store.manifest import Artifact


@dataclass(frozen=True)
class Scored(Joined):
    """Joined columns of one iteration, with their artifacts."""

    scores: Scores
    rollouts: Rollouts


@dataclass(frozen=True)
class Weighing:
    """Settings that turn scores into advantages: those of a trained policy, or of a config."""

    name: str
    mix: Mix
    scale_rewards: str
    min_std: float
    mask_truncated: bool
    policy: Artifact | None = None

    def of(self, joined: Joined) -> tuple[np.ndarray, AdvantageResult]:
        """Return totals and advantages, as stages.train computes them."""
        totals = joined.totals(self.mix)
        return totals, group_advantages(
            totals, joined.groups, joined.counted, scale_rewards=self.scale_rewards, min_std=self.min_std
        )


def open_scores(scores: Scores, store: Store) -> Scored:
    """Return scores joined with their rollouts."""
    rollouts = store.origin(scores, "rollouts")
    return Scored(**vars(join(rollouts, scores)), scores=scores, rollouts=rollouts)


def trained_policies(store: Store, scores: Artifact) -> list[Artifact]:
    """Return the policies that were trained on these scores, oldest first."""
    inputs = ((policy, policy.inputs.get("scores")) for policy in store.list("policy"))
    policies = [policy for policy, used in inputs if used and used.digest == scores.digest]
    return sorted(policies, key=lambda policy: policy.manifest["finished"])


def weighings(store: Store, scores: Artifact, config: Config) -> list[Weighing]:
    """Return that of each policy that was trained on the scores, oldest first; the config's where there is none."""
    recipes = [(policy, policy.manifest["recipe"]["config"]) for policy in trained_policies(store, scores)]
    if recipes:
        return [
            _weighing(f"policy/{policy.short}", Mix.from_tree(recipe), recipe["train"], policy)
            for policy, recipe in recipes
        ]
    mix = Mix.from_config(config.mix, config.image)
    return [_weighing(f"preset {config.preset}", mix, config.train.model_dump(mode="json"), None)]


def _weighing(name: str, mix: Mix, train: dict[str, Any], policy: Artifact | None) -> Weighing:
    loss = train["loss"]
    return Weighing(
        name, mix, loss["scale_rewards"], train["min_std"], bool(loss["mask_truncated_completions"]), policy
    )
