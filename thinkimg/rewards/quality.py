"""How well a judge tells right processing from wrong."""

import numpy as np

RESAMPLES = 2000


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """P(right > wrong) + P(right = wrong) / 2 over all (n, m) combinations: the area under the ROC curve (Mann-Whitney)."""
    from scipy.stats import rankdata

    n, m = len(right), len(wrong)
    ranks = rankdata(np.concatenate([right, wrong]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(right: np.ndarray, wrong: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(AUC, lower, upper): 95 % percentile bootstrap over the pairs, (n,) each, whose entries belong together."""
    rng = np.random.default_rng(seed)
    found = [auc(right[i], wrong[i]) for i in rng.integers(0, len(right), (RESAMPLES, len(right)))]
    low, high = np.quantile(found, (0.025, 0.975))
    return auc(right, wrong), float(low), float(high)
