"""Calibration of the attention judge: AUC of every layer and kind of query rows on known pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thinkimg.config.tree import Config
from thinkimg.models.base import BaseSource
from thinkimg.models.family import find_family
from thinkimg.resources import Resources, locate_base
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
class LayerAuc:
    """AUC of right against wrong processing, (value, low, high) with its 95 % interval, on two halves of the pairs."""

    layer: int
    rows: str
    selection: tuple[float, float, float]
    """On the half that chooses layer and rows."""
    test: tuple[float, float, float]
    """On the other half."""


def calibrate_attention(config: Config, policy: Policy, store: Store, *, count: int) -> list[LayerAuc]:
    """Return every layer and kind of rows, the best on the selection half first. count: pairs, at most."""
    with Resources(config.where) as resources:
        pairs = Builder(config, store, resources).make(known_pairs, split="held_out", count=count)
        context = JudgeContext(judge_settings(config), resources, policy, None, None, (pairs,), ImageTable([pairs]))
        rows = pairs.rows()
        right, wrong = (known_side(rows, name) for name in ("right", "wrong"))
        measured = attention.measure_attention([*right, *wrong], context, list_layers(policy, context.settings.base))
    results = []
    order = np.random.default_rng(config.seed).permutation(len(rows))  # shuffled, as families of puzzles take turns
    for key in measured[0]:
        values = [attention.judge_masses(masses[key], key).value for masses in measured]
        sides = np.array([0.5 if value is None else value for value in values]).reshape(2, -1)
        layer, _, kind = key.partition("/")
        halves = [auc_interval(*sides[:, half]) for half in np.array_split(order, 2)]
        results.append(LayerAuc(int(layer), kind, *halves))
    return sorted(results, key=lambda result: -result.selection[0])


def known_side(rows: Sequence[dict[str, str]], side: str) -> list[Pair]:
    """Return each question with its original and the image of one side, "right" or "wrong"."""
    return [Pair(row["question"], row["original"], row[side]) for row in rows]


def list_layers(policy: Policy, base: BaseSource) -> tuple[int, ...]:
    """Return the policy's decoder layers whose attention can be read."""
    from transformers import AutoConfig

    directory = policy.model_directory if policy.is_full else locate_base(base, policy)
    config = AutoConfig.from_pretrained(directory)
    return find_family(config.model_type).attention_layers(config.get_text_config())
