"""Estimates for the claims of section 5: a small subset suffices.

Thresholds and sentences are in `table`; `judge` makes the verdicts. Candidates are the rules that
select by importance, at every size of at most half of the samples, at equal steps. `chosen` is one
of them wherever the validation split chose importance, and adds none.

Map: `excess_of_best_subset`, `gain_over_balanced`.
"""

import numpy as np
import xarray as xr

from sampimp.analysis.claims.evidence import NO_ESTIMATE, Estimate, Evidence, smallest
from sampimp.analysis.subset_runs import FEWEST_SEEDS, is_by_importance

LARGEST_SIZE = 0.5
"""Share of the samples up to which a subset is small (arbitrary)."""


def excess_of_best_subset(evidence: Evidence) -> Estimate:
    """Return the lowest error of the candidates minus the upper end of that at convergence."""
    result = evidence.results["subset_errors"]
    best = _best(result)
    limit = float(result["converged_error_interval"].sel(bound="high"))
    if best is None or np.isnan(limit):
        return NO_ESTIMATE
    return float(best["penalised_error"]) - limit, np.nan, np.nan


def gain_over_balanced(evidence: Evidence) -> Estimate:
    """Return the error of balanced subsets minus that of the same rule: the least of all sizes."""
    result = evidence.results["subset_errors"]
    best = _best(result)
    if best is None:
        return NO_ESTIMATE
    mine = result.sel(rule=best["rule"].item(), budget="steps")
    mine = mine.isel(size=mine["difference_from_balanced"].notnull().values)
    if not mine.sizes["size"]:
        return NO_ESTIMATE
    bounds = mine["difference_from_balanced_interval"].transpose("size", "bound").values
    return smallest(
        [
            (-value, -high, -low)
            for value, (low, high) in zip(
                mine["difference_from_balanced"].values.tolist(), bounds.tolist(), strict=True
            )
        ]
    )


def _best(result: xr.Dataset) -> xr.Dataset | None:
    """Return the candidate with the lowest mean error; None if none has enough seeds."""
    rules = [rule for rule in result["rule"].values if is_by_importance(str(rule))]
    candidates = result.sel(rule=rules, size=result["size"] <= LARGEST_SIZE, budget="steps")
    enough = candidates["count"] + candidates["diverged"] >= FEWEST_SEEDS
    error = candidates["penalised_error"].where(enough)
    if not error.notnull().any():
        return None
    return candidates.isel(error.argmin(["rule", "size"]))
