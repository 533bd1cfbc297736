"""Quality of a judge: how well its values tell right processing from wrong."""

import numpy as np


def auc(right: np.ndarray, wrong: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the area under the ROC curve along an axis: P(right > wrong) + P(right = wrong) / 2.

    It is the Mann-Whitney U statistic, divided by the number of pairs.
    """
    from scipy.stats import mannwhitneyu

    return mannwhitneyu(right, wrong, axis=axis, method="asymptotic").statistic / (
        right.shape[axis] * wrong.shape[axis]
    )


def auc_interval(right: np.ndarray, wrong: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Return (AUC, lower, upper): 95 % percentile bootstrap over pairs, (n,) each; three times the AUC for one pair."""
    from scipy.stats import bootstrap

    if len(right) < 2:
        return (float(auc(right, wrong)),) * 3
    samples = bootstrap((right, wrong), auc, n_resamples=2000, paired=True, method="percentile", rng=seed)
    low, high = samples.confidence_interval
    return float(auc(right, wrong)), float(low), float(high)
