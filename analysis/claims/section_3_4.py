"""Estimates for the claims of section 3.4: importance and negative log-likelihood.

Thresholds and sentences are in `table`; `judge` makes the verdicts.

Map: `nll_correlation_change`, `explained_by_nll`.
"""

from sampimp.analysis.claims.evidence import (
    Estimate,
    Evidence,
    early_and_late_means,
    stored_correlation,
    subtract,
)


def nll_correlation_change(evidence: Evidence) -> Estimate:
    """Return the rank correlation of importance with NLL in the late epochs minus the early."""
    against = evidence.results["importance_against_nll"]
    early, late = early_and_late_means(
        against["model_rank_correlation"], against["model_rank_correlation_interval"]
    )
    return subtract(late, early)


def explained_by_nll(evidence: Evidence) -> Estimate:
    """Return the square of the rank correlation of overall importance with final NLL."""
    value, low, high = stored_correlation(evidence, name="overall_rank_correlation")
    ends = sorted((low**2, high**2))
    return value**2, 0.0 if low < 0 < high else ends[0], ends[1]
