"""Joined view of an iteration: its trajectories with their scores, and the ones that count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from thinkimg.errors import UserError
from thinkimg.records import StopReason
from thinkimg.rewards.mix import Mix
from thinkimg.store.kinds import Rollouts, Scores

OVER = (StopReason.MAX_TURNS, StopReason.MAX_TOKENS)


@dataclass(frozen=True)
class Joined:
    """N trajectories with their scores, in the order of the rollouts."""

    ids: Sequence[str]
    groups: np.ndarray
    """(N,) ids."""
    stops: np.ndarray
    """(N,) StopReason as text."""
    counted: np.ndarray
    """(N,) bool: rows that enter the loss and the statistics of their groups."""
    components: Mapping[str, np.ndarray]
    """Column -> (N,) float64, NaN where missing."""

    def totals(self, mix: Mix) -> np.ndarray:
        """Return the totals of a mix over the rows that count: (N,) float64."""
        return mix.totals(self.components, self.groups, self.counted)


def join(rollouts: Rollouts, scores: Scores) -> Joined:
    """Return rollouts with their scores. Raises UserError where the scores are of other rollouts."""
    ids, groups = scores.identities()
    stops, counted = [], []
    rows = rollouts.rows(["trajectory_id", "stop", "turns.list.element.error"])
    for row, scored in zip_longest(rows, ids):
        if row is None or row["trajectory_id"] != scored:
            raise UserError(f"{scores.reference} does not hold the trajectories of {rollouts.reference}.")
        stops.append(row["stop"])
        counted.append(is_counted(row["stop"], row["turns"]))
    return Joined(ids, np.array(groups), np.array(stops), np.array(counted, dtype=bool), scores.values())


def is_counted(stop: str, turns: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a row counts in the loss and in the statistics of its group.

    A failed row does not. Nor does one that ran out of turns or tokens while every turn was in order. With more of them
    it might have been right (over-turn masking, Mini-o3, arXiv 2509.07969). One that spent its turns on malformed text
    or refused calls does count. Without such rows nothing held malformed turns back: on the puzzles their share rose
    from 5 to 28 % within four iterations.
    """
    return stop != StopReason.FAILED and (stop not in OVER or any(turn["error"] for turn in turns))
