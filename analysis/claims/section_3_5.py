"""Estimates for the claims of section 3.5: when and where easy and hard samples act.

Thresholds and sentences are in `table`; `judge` makes the verdicts.

Map: `easy_samples_early_share`, `hard_samples_late_over_early`, `clusters_against_nll`.
"""

import numpy as np

from sampimp.analysis import kernels
from sampimp.analysis.claims.evidence import (
    NO_ESTIMATE,
    Estimate,
    Evidence,
    late_over_early,
    third,
)


def easy_samples_early_share(evidence: Evidence) -> Estimate:
    """Return the share of the easy samples' importance that falls in the early third."""
    folds = evidence.folds_of_difficulty("easy")
    epochs = folds.shape[1]
    if epochs < 3:
        return NO_ESTIMATE
    k = third(epochs)

    def share(total: np.ndarray) -> np.ndarray:
        curve = total.sum(-1)
        return curve[:, :k].sum(-1) / curve.sum(-1)

    return kernels.bootstrap_sums(folds, share)


def hard_samples_late_over_early(evidence: Evidence) -> Estimate:
    """Return the hard samples' importance below the output layer, late third over early third."""
    return late_over_early(evidence.folds_of_difficulty("hard"), slice(0, -1))


def clusters_against_nll(evidence: Evidence, *, name: str) -> Estimate:
    """Return the rank correlation over clusters of median final NLL with `name`.

    Parameters
    ----------
    evidence
        The computed results.
    name
        `mean_epoch`, or `layer_share` (of the output layer).
    """
    result = evidence.results["clusters"]
    if result.sizes["cluster"] < 5 or result.sizes["layer"] < 2:
        return NO_ESTIMATE
    nll = result["nll_quantile"].sel(quantile=0.5).values
    other = result["mean_epoch"] if name == "mean_epoch" else result[name].isel(layer=-1)
    rows = np.stack([nll, other.values])
    low, high = kernels.bootstrap_spearman(rows, [(0, 1)], resamples=1000)[0]
    return float(kernels.spearman(*rows)), float(low), float(high)
