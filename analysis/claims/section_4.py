"""Estimates for the claims of section 4: influence on the final model.

Thresholds and sentences are in `table`; `judge` makes the verdicts. Removals are those of single
samples drawn at random: among the most important samples effects are larger, and a score over them
says less about samples in general.

Map: `size_of_effect`, `size_of_effect_below_ceiling`, `unrolled_minus_fixed_point`,
`arriving_when_correlation`.
"""

import xarray as xr

from sampimp.analysis.claims.evidence import NO_ESTIMATE, Estimate, Evidence

TAU, RANDOM = "overall importance", "random"
"""The score and the kind of removals that are judged."""


def size_of_effect(evidence: Evidence) -> Estimate:
    """Return the rank correlation of overall importance with the size of the effect of removal."""
    return _of_tau(evidence.results["removal_sizes"], "rank_correlation")


def size_of_effect_below_ceiling(evidence: Evidence) -> Estimate:
    """Return the same minus 0.9 times the correlation of one retraining with another."""
    return _of_tau(evidence.results["removal_sizes"], "above_ceiling_share")


def _of_tau(result: xr.Dataset, name: str) -> Estimate:
    if TAU not in result["score"].values:
        return NO_ESTIMATE
    return _of_random_removals(result.sel(score=TAU), name)


def unrolled_minus_fixed_point(evidence: Evidence) -> Estimate:
    """Return the score of unrolled influence minus that of -C^-1 g at its best."""
    return _of_random_removals(evidence.results["method_scores"], "unrolled_minus_fixed_point")


def _of_random_removals(result: xr.Dataset, name: str) -> Estimate:
    if RANDOM not in result["kind"].values:
        return NO_ESTIMATE
    return _with_interval(result.sel(kind=RANDOM), name)


def arriving_when_correlation(evidence: Evidence) -> Estimate:
    """Return the rank correlation of final NLL with the mean epoch of what is left at the end."""
    result = evidence.results["influence_by_layer"]
    if "left_when_rank_correlation" not in result:
        return NO_ESTIMATE
    return _with_interval(result, "left_when_rank_correlation")


def _with_interval(result: xr.Dataset, name: str) -> Estimate:
    low, high = result[f"{name}_interval"].values
    return float(result[name]), float(low), float(high)
