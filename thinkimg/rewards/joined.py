"""The joined view of an iteration: trajectories, scores, and which of them count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thinkimg.errors import UserError
from thinkimg.records import StopReason
from thinkimg.rewards.mix import Mix
from thinkimg.store.kinds import Rollouts, Scores

OVER = (StopReason.MAX_TURNS, StopReason.MAX_TOKENS)


@dataclass(frozen=True)
class Joined:
    """N trajectories with their scores, in order of the rollouts."""

    ids: Sequence[str]
    groups: np.ndarray
    """(N,) ids."""
    stops: np.ndarray
    """(N,) StopReason as text."""
    counted: np.ndarray
    """(N,) bool: the rows that enter the loss and the statistics of their groups."""
    components: Mapping[str, np.ndarray]
    """Column -> (N,) float64, NaN where missing."""

    def totals(self, mix: Mix) -> np.ndarray:
        """(N,) float64: the mix, over the rows that count."""
        return mix.totals(self.components, self.groups, self.counted)


def join(rollouts: Rollouts, scores: Scores) -> Joined:
    """Read both. Raises UserError where the scores are not those of the rollouts."""
    ids, groups = scores.identities()
    stops, counted, place = [], [], 0
    for row in rollouts.rows(["trajectory_id", "stop", "turns.list.element.error"]):
        if place >= len(ids) or row["trajectory_id"] != ids[place]:
            raise UserError(f"{scores.reference} does not hold the trajectories of {rollouts.reference}.")
        stops.append(row["stop"])
        counted.append(counts(row["stop"], row["turns"]))
        place += 1
    if place != len(ids):
        raise UserError(f"{scores.reference} does not hold the trajectories of {rollouts.reference}.")
    return Joined(ids, np.array(groups), np.array(stops), np.array(counted, dtype=bool), scores.values())


def counts(stop: str, turns: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a row counts in the loss and in the statistics of its group.

    A failed row does not. Nor does one that ran out of turns or tokens while every turn of it was in order: with more of
    them it might have been right (over-turn masking, Mini-o3, arXiv 2509.07969). One that spent its turns on malformed text or
    refused calls does count: where such rows were left out nothing held them back, and on the puzzles the share of
    malformed turns rose from 5 to 28 % within four iterations.
    """
    return stop != StopReason.FAILED and (stop not in OVER or any(turn["error"] for turn in turns))
