"""Estimates for the claims of section 3.6: batch strategies, test errors and parameter paths.

Thresholds and sentences are in `table`; `judge` makes the verdicts.

Map: `error_difference`, `mixed_against_sorted`, `easy_first_against_rest`, `relative_difference`,
`absolute_relative_difference`, `training_error_rise` (errors); `mixed_to_sorted_distance`,
`distance_of_reversed_orders`, `distance_over_travelled` (parameters).
"""

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np

from sampimp.analysis import kernels
from sampimp.analysis.claims.evidence import NO_ESTIMATE, Estimate, Evidence, smallest, third

MIXED = ("rand", "nlm", "sim")
SORTED = ("nlo", "rnlo", "sio", "rsio")
"""Strategies with batches of mixed difficulty, and with batches of comparable difficulty."""


def error_difference(evidence: Evidence, *, more: Sequence[str], less: Sequence[str]) -> Estimate:
    """Return the mean final test error of some strategies minus that of others."""
    return evidence.error_difference(more, less)


def mixed_against_sorted(evidence: Evidence) -> Estimate:
    """Return the smallest difference of test error, a sorted strategy minus a mixed one."""
    return smallest([evidence.error_difference([s], [m]) for s in SORTED for m in MIXED])


def easy_first_against_rest(evidence: Evidence) -> Estimate:
    """Return the smallest difference of test error, NLO or SIO minus another strategy."""
    rest = ("rnlo", "rsio", *MIXED)
    return smallest([evidence.error_difference([s], [o]) for s in ("nlo", "sio") for o in rest])


def relative_difference(evidence: Evidence, *, first: str, second: str) -> Estimate:
    """Return the difference of test error of two strategies, over Rand's mean test error.

    Rand's mean is taken as exact.
    """
    error = evidence.final_error("rand").values
    error = error[np.isfinite(error)]
    if not len(error) or error.mean() == 0:
        return NO_ESTIMATE
    difference = evidence.error_difference([first], [second])
    value, low, high = (x / float(error.mean()) for x in difference)
    return value, low, high


def absolute_relative_difference(evidence: Evidence, *, first: str, second: str) -> Estimate:
    """Return `relative_difference`; if it is negative, reverse the signs of value and interval."""
    value, low, high = relative_difference(evidence, first=first, second=second)
    if value < 0:
        value, low, high = -value, -high, -low
    return value, low, high


def training_error_rise(evidence: Evidence) -> Estimate:
    """Return training error late minus early, the smaller of NLO and SIO."""
    curves = evidence.results["strategy_curves"]
    k = third(curves.sizes["epoch"])
    estimates = []
    for name in ("nlo", "sio"):
        if name not in curves["strategy"].values or curves.sizes["epoch"] < 3:
            return NO_ESTIMATE
        error = curves["train_error_by_seed"].sel(strategy=name).transpose("seed", "epoch").values
        diverged = np.isfinite(curves["diverged_epoch"].sel(strategy=name).values)
        error = np.where(np.isnan(error) & diverged[:, None], evidence.chance, error)
        estimates.append(kernels.t_interval(error[:, -k:].mean(1) - error[:, :k].mean(1)))
    return smallest(estimates)


def mixed_to_sorted_distance(evidence: Evidence) -> Estimate:
    """Return the smallest distance of mixed to sorted end points over the largest among mixed."""
    return _ratio(
        evidence.smallest_distance(product(MIXED, SORTED)),
        evidence.largest_distance(combinations(MIXED, 2)),
    )


def distance_of_reversed_orders(evidence: Evidence) -> Estimate:
    """Return the smaller distance of an order to its reverse over the largest among mixed."""
    return _ratio(
        evidence.smallest_distance([("nlo", "rnlo"), ("sio", "rsio")]),
        evidence.largest_distance(combinations(MIXED, 2)),
    )


def distance_over_travelled(evidence: Evidence) -> Estimate:
    """Return the largest distance of end points over the mean distance from start to end."""
    names = (*MIXED, *SORTED)
    travelled = evidence.results["parameter_paths"]["travelled"]
    if not set(names) <= set(travelled["strategy"].values.tolist()):
        return NO_ESTIMATE
    mean = float(travelled.sel(strategy=list(names)).mean(skipna=True))
    return _ratio(evidence.largest_distance(combinations(names, 2)), mean)


def _ratio(numerator: float, denominator: float) -> Estimate:
    """Return a ratio without an interval; NaN if it is not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.divide(numerator, denominator)), np.nan, np.nan
