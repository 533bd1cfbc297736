"""Calibration of the attention judge: every layer and kind of query rows on known pairs: chosen on one half, told on the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thinkimg.config.tree import Config
from thinkimg.models.base import BaseSource
from thinkimg.resources import Resources, base_directory
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.judges import attention
from thinkimg.rewards.quality import auc_interval
from thinkimg.scheduler import Builder
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.score import judge_settings
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Policy


@dataclass(frozen=True)
class Place:
    """AUC of right against wrong processing with its 95 % interval, on the half that chooses and on the other one."""

    layer: int
    rows: str
    chosen_on: tuple[float, float, float]
    told_on: tuple[float, float, float]


def calibrate_attention(config: Config, policy: Policy, store: Store, *, count: int) -> list[Place]:
    """All places, the best on the choosing half first."""
    with Resources(config.where) as resources:
        pairs = Builder(config, store, resources).make(known_pairs, split="held_out", count=count)
        context = JudgeContext(judge_settings(config), resources, policy, None, None, (pairs,), ImageTable([pairs]))
        rows = pairs.rows()
        right, wrong = (known_side(rows, name) for name in ("right", "wrong"))
        found = attention.look([*right, *wrong], context, range(layers(policy, context.settings.base)))
    places = []
    order = np.random.default_rng(config.seed).permutation(len(rows))  # the families stand in turn
    for place in found[0]:
        values = [attention.verdict(one[place], place).value for one in found]
        sides = np.array([0.5 if value is None else value for value in values]).reshape(2, -1)
        layer, _, kind = place.partition("/")
        halves = [auc_interval(*sides[:, half]) for half in np.array_split(order, 2)]
        places.append(Place(int(layer), kind, *halves))
    return sorted(places, key=lambda one: -one.chosen_on[0])


def known_side(rows: Sequence[dict[str, str]], side: str) -> list[Pair]:
    """Each question with the original and the image of one side, "right" or "wrong"."""
    return [Pair(row["question"], row["original"], row[side]) for row in rows]


def layers(policy: Policy, base: BaseSource) -> int:
    from transformers import AutoConfig

    directory = policy.model_directory if policy.is_full else base_directory(base)
    return AutoConfig.from_pretrained(directory).get_text_config().num_hidden_layers
