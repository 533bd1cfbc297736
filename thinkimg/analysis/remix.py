"""Comparison of mixes on stored scores: totals, advantages, silent groups, best rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from thinkimg.analysis.joined import Scored, Weighing
from thinkimg.config.values import read_yaml_file
from thinkimg.grpo.advantages import AdvantageResult
from thinkimg.rewards.mix import read_mix

EQUAL = 1e-9
"""Difference of totals that is a tie: sums of the same values in another order differ by less."""


def read_mixes(paths: list[Path], base: Weighing, scored: Scored) -> list[Weighing]:
    """Return `base` with the mix of each YAML file. Raises UserError, naming the file."""
    mixes = []
    for path in paths:
        mix = read_mix(read_yaml_file(path), str(path), base.mix, list(scored.components))
        mixes.append(replace(base, name=path.stem, mix=mix, policy=None))
    return mixes


def compare_mixes(scored: Scored, weighings: list[Weighing]) -> list[dict[str, Any]]:
    """Return one entry per mix, compared with the first.

    mean_total: over the counted rows.
    included: number of rows that enter the loss.
    spearman: rank correlation of the counted rows' advantages with those of each mix; None if one is constant.
    best_changed: number of groups in which no best row of this mix is one of the first mix.
    sign_changed: number of rows whose advantage has the other sign than with the first mix.
    reproduced: largest difference to the advantages that the policy was trained with; None without a policy.
    """
    weighed = [weighing.of(scored) for weighing in weighings]
    entries = []
    for weighing, (totals, result) in zip(weighings, weighed, strict=True):
        entry = {
            "name": weighing.name,
            **weighing.mix.fingerprinted(),
            "mean_total": float(totals[scored.counted].mean()) if scored.counted.any() else None,
            "rows": int(scored.counted.sum()),
            "included": int(result.included.sum()),
            "groups": len(np.unique(scored.groups)),
            "silent": len(result.silent_groups),
            "spearman": [spearman(result, other, scored.counted) for _, other in weighed],
            "best_changed": count_best_changes(weighed[0][0], totals, scored),
            "sign_changed": int((weighed[0][1].advantages * result.advantages < 0).sum()),
            "reproduced": None,
            "advantages": dict(zip(scored.ids, result.advantages.tolist(), strict=True)),
        }
        if weighing.policy is not None:
            stored = weighing.policy.advantages()
            differences = [abs(stored[name]["advantage"] - value) for name, value in entry["advantages"].items()]
            entry["reproduced"] = max(differences, default=0.0)
        entries.append(entry)
    return entries


def spearman(first: AdvantageResult, second: AdvantageResult, counted: np.ndarray) -> float | None:
    """Return the rank correlation of the counted rows' advantages; None if one is constant."""
    from scipy.stats import spearmanr

    pair = [result.advantages[counted] for result in (first, second)]
    if any(len(values) < 2 or np.ptp(values) == 0 for values in pair):
        return None
    return float(spearmanr(*pair).statistic)


def count_best_changes(first: np.ndarray, second: np.ndarray, scored: Scored) -> int:
    """Return the number of groups in which no row is best by both totals; more or fewer ties are no change."""
    changed = 0
    for group in np.unique(scored.groups[scored.counted]):
        rows = np.flatnonzero((scored.groups == group) & scored.counted)
        best = [values[rows] >= values[rows].max() - EQUAL for values in (first, second)]
        changed += not (best[0] & best[1]).any()
    return changed
