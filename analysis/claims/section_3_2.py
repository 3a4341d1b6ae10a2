"""Estimates for the claims of section 3.2: stability of importance under initialisation.

Thresholds and sentences are in `table`; `judge` makes the verdicts.

Map: `smallest_correlation`, `early_minus_late_correlation`.
"""

from sampimp.analysis.claims.evidence import (
    NO_ESTIMATE,
    Estimate,
    Evidence,
    early_and_late_means,
    subtract,
)


def smallest_correlation(evidence: Evidence, *, reference: str) -> Estimate:
    """Return the smallest rank correlation of a reference strategy over epochs and pairs."""
    result = evidence.results["stability"]
    if reference not in result["reference"].values:
        return NO_ESTIMATE
    result = result.sel(reference=reference)
    bounds = result["rank_correlation_interval"]
    return (
        float(result["rank_correlation"].min()),
        float(bounds.sel(bound="low").min()),
        float(bounds.sel(bound="high").min()),
    )


def early_minus_late_correlation(evidence: Evidence) -> Estimate:
    """Return the mean rank correlation of the early epochs minus that of the late ones."""
    result = evidence.results["stability"]
    if "shuffle" not in result["reference"].values:
        return NO_ESTIMATE
    result = result.sel(reference="shuffle")
    early, late = early_and_late_means(
        result["rank_correlation"], result["rank_correlation_interval"]
    )
    return subtract(early, late)
