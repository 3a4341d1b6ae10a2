"""Choices among selection rules by their errors on the validation split, without test labels.

Map: `best_variant` (a rule's parameter), `best_rule` (the rule that a person gets by default);
`crossing` (the smallest size that is good enough, and the sizes around it).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

CHOSEN = "chosen"
"""Name of what `best_rule` returns, as a rule."""

FALLBACK = "balanced"
"""What is chosen where no rule is clearly better."""


def best_variant(errors: Mapping[str, np.ndarray]) -> str:
    """Return the variant with the lowest mean error over seeds; the first one of equals.

    Parameters
    ----------
    errors
        Validation error of each variant by seed, (seed,); NaN, a diverged training, counts as 1.
    """
    return min(errors, key=lambda variant: float(_filled(errors[variant]).mean()))


def best_rule(errors: Mapping[str, np.ndarray], judges: int) -> str:
    """Return the rule with the lowest mean error, or `balanced` if none is clearly better.

    A rule is clearly better if its mean difference from `balanced` is more than the standard error
    that so many samples give a difference of two error rates. Seeds share these samples: averaging
    over more seeds does not make the error smaller.

    Parameters
    ----------
    errors
        As for `best_variant`, by rule.
    judges
        Number of validation samples.

    Examples
    --------
    >>> errors = {"balanced": np.array([0.10, 0.12]), "tau-high": np.array([0.08, 0.10])}
    >>> best_rule(errors, judges=1000), best_rule(errors, judges=100)
    ('tau-high', 'balanced')
    """
    best = best_variant(errors)
    means = np.array([_filled(errors[rule]).mean() for rule in (FALLBACK, best)])
    standard_error = np.sqrt((means * (1 - means)).sum() / judges)
    return best if means[0] - means[1] > standard_error else FALLBACK


def _filled(errors: np.ndarray) -> np.ndarray:
    return np.nan_to_num(errors, nan=1.0)


class Crossing(NamedTuple):
    """Where the error of a rule, by size, comes below a limit for good."""

    size: float
    """By interpolation in log size; 1 if no smaller size is measured to be below."""
    below: float
    """The smallest size from which on all are below the limit; 1, all samples, if there is none."""
    above: float | None
    """The next smaller size, which is not below; None if the smallest one is."""


def crossing(sizes: np.ndarray, errors: np.ndarray, limit: float) -> Crossing:
    """Return the smallest size of which, and of all larger ones, the error is within a limit.

    Parameters
    ----------
    sizes
        Shares of the samples, increasing, (size,).
    errors
        Mean error of each, (size,); NaN counts as beyond the limit.
    limit
        Largest error that is good enough.

    Examples
    --------
    >>> crossing(np.array([0.1, 0.4]), np.array([0.10, 0.04]), limit=0.07)
    Crossing(size=0.2, below=0.4, above=0.1)
    >>> crossing(np.array([0.1, 0.4]), np.array([0.10, 0.09]), limit=0.07).below
    1.0
    """
    beyond = np.flatnonzero(~(errors <= limit))
    if not len(beyond):
        return Crossing(float(sizes[0]), float(sizes[0]), None)
    last = beyond[-1]
    if last == len(sizes) - 1:
        return Crossing(1.0, 1.0, float(sizes[last]))
    (low, high), (worse, better) = sizes[last : last + 2], errors[last : last + 2]
    share = (worse - limit) / (worse - better) if np.isfinite(worse) else 1.0
    size = float(np.exp(np.log(low) + share * np.log(high / low)))
    return Crossing(round(size, 6), float(high), float(low))
