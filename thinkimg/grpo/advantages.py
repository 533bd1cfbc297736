"""From raw reward components to group-relative advantages, and the rows that enter the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np

from thinkimg.errors import UserError
from thinkimg.grpo.settings import ScaleRewards

K = TypeVar("K", str, tuple[str, str])

STD_EPSILON = 1e-4
"""Added to the standard deviation, as in TRL 1.16."""


class Inclusion(StrEnum):
    """Decision on a row: it enters the loss, or the reason why not."""

    INCLUDED = "included"
    INVALID = "invalid"
    """The trajectory failed, ran over its turns, or was excluded by the caller for another reason."""
    ALONE = "alone"
    """Its group has fewer than two valid rows: nothing to compare it with."""
    SILENT = "silent"
    """Its group's totals vary less than min_std: no signal, only noise to be blown up by the scaling."""


@dataclass(frozen=True)
class AdvantageResult:
    """Advantages of N rows. A row that is not included influences no other row's advantage."""

    advantages: np.ndarray
    """(N,) float64, 0 where not included; sums to 0 over each group."""
    included: np.ndarray
    """(N,) bool."""
    silent_groups: np.ndarray
    """(S,) ids of the silent groups, ascending."""
    reasons: np.ndarray
    """(N,) of Inclusion, dtype object."""


def mix_rewards(
    components: Mapping[K, np.ndarray],
    weights: Mapping[K, float],
    groups: np.ndarray,
    valid: np.ndarray | None = None,
) -> np.ndarray:
    """Return the weighted sum of the components that the mix names, sum_c w_c r_c: (N,) float64.

    components: (N,) float64 each, NaN where missing; those that `weights` does not name have no influence.
    groups: (N,) ids. valid: (N,) bool, the rows that count for group means; None means all.
    A missing value becomes the mean of that component over the valid rows of its group that have it. So it moves
    neither the group's mean nor the row's distance from it; TRL takes 0, which punishes the row.
    If no row of a group has a value, the component adds 0 to all of them. Weights are not renormalised.
    The result has no NaN in valid rows.
    Raises UserError if the mix names a component that was not scored.
    """
    unknown = sorted(set(weights) - set(components))
    if unknown:
        raise UserError(
            f"the mix names components that have no scores: {', '.join(map(str, unknown))}",
            hint=f"scored components are: {', '.join(sorted(map(str, components))) or 'none'}",
        )
    ids, index = np.unique(groups, return_inverse=True)
    valid = np.ones(len(index), dtype=bool) if valid is None else valid
    total = np.zeros(len(index))
    for name, weight in weights.items():
        values = components[name]
        missing = np.isnan(values)
        means = _group_mean(np.where(missing, 0.0, values), valid & ~missing, index, len(ids))
        total += weight * np.where(missing, means[index], values)
    return total


def group_advantages(
    totals: np.ndarray,
    groups: np.ndarray,
    valid: np.ndarray,
    *,
    scale_rewards: ScaleRewards,
    min_std: float = 0.02,
) -> AdvantageResult:
    """Return the advantage of each row relative to its group: (r - mean) / (std + 1e-4).

    totals: (N,) float64, finite where valid. groups: (N,) ids, in any order. min_std: in units of the totals.
    valid: (N,) bool; other rows count neither in the loss nor in any statistic.
    scale_rewards: the divisor. "group": unbiased standard deviation of the row's group. "batch": that of the totals of
    all included rows. "none": no divisor and no 1e-4.
    DeepSeekMath (arXiv 2402.03300) section 4.1.2, outcome supervision; "none" is Dr. GRPO (arXiv 2503.20783);
    "batch" is arXiv 2508.08221. Equal to TRL 1.16 with min_std=0 where every row is valid.
    """
    ids, index = np.unique(groups, return_inverse=True)
    totals = np.where(valid, totals, 0.0)
    assert np.isfinite(totals).all(), "a valid row has no finite total"
    counts = np.bincount(index, weights=valid, minlength=len(ids))
    centred = totals - _group_mean(totals, valid, index, len(ids))[index]
    squares = np.bincount(index, weights=np.where(valid, centred**2, 0.0), minlength=len(ids))
    std = np.sqrt(squares / np.maximum(counts - 1, 1))

    alone = counts < 2
    silent = ~alone & (std < min_std)
    reasons = np.full(len(index), Inclusion.INCLUDED, dtype=object)
    reasons[silent[index]] = Inclusion.SILENT
    reasons[alone[index]] = Inclusion.ALONE
    reasons[~valid] = Inclusion.INVALID
    included = reasons == Inclusion.INCLUDED

    if scale_rewards == "group":
        centred = centred / (std[index] + STD_EPSILON)
    elif scale_rewards == "batch" and included.any():
        centred = centred / (np.std(totals[included], ddof=1) + STD_EPSILON)
    return AdvantageResult(np.where(included, centred, 0.0), included, ids[silent], reasons)


def select_included_rows(
    included: np.ndarray, truncated: np.ndarray, *, mask_truncated_completions: bool
) -> np.ndarray:
    """Return the indices of the rows to be trained on: (n,) int64, ascending.

    Take them before anything is counted, packed or normalised. included: (N,) bool, from `advantages`.
    truncated: (N,) bool, rows that ended at the length limit. They count in their group's statistics and are dropped
    here if `mask_truncated_completions`. TRL keeps them with an empty mask, which changes the divisor if that is the
    number of rows.
    """
    return np.flatnonzero(included & ~truncated if mask_truncated_completions else included)


def _group_mean(values: np.ndarray, counted: np.ndarray, index: np.ndarray, n_groups: int) -> np.ndarray:
    """Return (n_groups,): the mean of values (N,) over the counted rows of each group; 0 for a group without any."""
    sums = np.bincount(index, weights=np.where(counted, values, 0.0), minlength=n_groups)
    return sums / np.maximum(np.bincount(index, weights=counted, minlength=n_groups), 1)
