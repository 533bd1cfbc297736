"""Stored scores under another mix: totals, advantages, silent groups, and who is best in a group."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from thinkimg.analysis.joined import Scored, Weighing
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import AdvantageResult
from thinkimg.rewards.mix import read_mix

EQUAL = 1e-9
"""Totals that differ by less are a tie: sums of the same values in another order."""


def read_mixes(paths: list[Path], own: Weighing, scored: Scored) -> list[Weighing]:
    """The mixes of YAML files; they are weighed as `own` but for the mix. Raises UserError, naming the file."""
    found = []
    for path in paths:
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        mix = read_mix(tree, str(path), own.mix, list(scored.components))
        found.append(replace(own, name=path.stem, mix=mix, policy=None))
    return found


def remix(scored: Scored, weighings: list[Weighing]) -> list[dict[str, Any]]:
    """One entry per mix, compared with the first.

    mean_total: over the counted rows. included: rows that enter the loss. spearman: rank correlation of the advantages of
    the counted rows with those of each mix, in order; None where one of the two has no two different values.
    best_changed: groups of which no best row is a best row by the first mix. sign_changed: rows whose advantage has the
    other sign. reproduced: largest difference to the advantages that the policy was trained with, None without a policy.
    """
    weighed = [weighing.of(scored) for weighing in weighings]
    entries = []
    for weighing, (totals, result) in zip(weighings, weighed, strict=True):
        entry = {
            "name": weighing.name,
            **weighing.mix.slice(),
            "mean_total": float(totals[scored.counted].mean()) if scored.counted.any() else None,
            "rows": int(scored.counted.sum()),
            "included": int(result.included.sum()),
            "groups": len(np.unique(scored.groups)),
            "silent": len(result.silent_groups),
            "spearman": [spearman(result, other, scored.counted) for _, other in weighed],
            "best_changed": best_changed(weighed[0][0], totals, scored),
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


def spearman(one: AdvantageResult, other: AdvantageResult, counted: np.ndarray) -> float | None:
    from scipy.stats import spearmanr

    pair = [result.advantages[counted] for result in (one, other)]
    if any(len(values) < 2 or np.ptp(values) == 0 for values in pair):
        return None
    return float(spearmanr(*pair).statistic)


def best_changed(first: np.ndarray, other: np.ndarray, scored: Scored) -> int:
    """In how many groups no row that is best by `first` is best by `other`: a tie that only widens or narrows is no change."""
    changed = 0
    for group in np.unique(scored.groups[scored.counted]):
        rows = np.flatnonzero((scored.groups == group) & scored.counted)
        best = [values[rows] >= values[rows].max() - EQUAL for values in (first, other)]
        changed += not (best[0] & best[1]).any()
    return changed
