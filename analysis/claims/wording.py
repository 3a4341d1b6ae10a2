"""Numbers of claims in words: with their unit, their interval, and no more digits than can be read.

A difference of test errors is "lower by 0.10 points", not -0.001; a ratio "4.3 times the next". The
interval has the same unit, sign and decimals as its number.

Map: `write_number` (an estimate), `write_claim` (in the words of a claim), `write_finding`.
"""

import numpy as np

from sampimp.analysis.claims.evidence import Claim, Estimate, NumberForm

_PER_CENT = {"share": 100, "points": 100, "relative": 100}
_SUFFIX = {"share": " %", "points": " points", "relative": " %"}
_SIGNED = ("points", "relative")
"""Units of differences, which are written as "higher by" or "lower by"."""


def write_number(unit: NumberForm, estimate: Estimate) -> str:
    """Return a number with its unit and, in brackets, its interval, if it has one.

    Examples
    --------
    >>> write_number("ratio", (4.31, 3.92, 4.36)), write_number("share", (0.9137, 0.91, 0.917))
    ('4.3 (3.9 to 4.4)', '91.4 % (91.0 to 91.7)')
    >>> write_number("points", (-0.001, -0.0019, -0.0002))
    'lower by 0.10 points (0.02 to 0.19)'
    >>> write_number("correlation", (0.9287, float("nan"), float("nan")))
    '0.929'
    """
    value, low, high = (number * _PER_CENT.get(unit, 1) for number in estimate)
    sign = ""
    if unit in _SIGNED:
        sign = "lower by " if value < 0 else "higher by "
        value, low, high = (-value, -high, -low) if value < 0 else (value, low, high)
    decimals = _decimals(unit, value)
    words = f"{sign}{_rounded(value, decimals)}{_SUFFIX.get(unit, '')}"
    if np.isnan([low, high]).any():
        return words
    return f"{words} ({_rounded(low, decimals)} to {_rounded(high, decimals)})"


def write_claim(claim: Claim, estimate: Estimate) -> str:
    """Return a claim's number in its words, or how to compute it; "none" without a number."""
    if np.isnan(estimate[0]):
        return f"not computed: {claim.command}" if claim.command else "none"
    return claim.words.format(write_number(claim.unit, estimate))


def write_finding(claim: Claim, estimate: Estimate) -> str:
    """Return what was measured as a clause without its interval; empty if there is none."""
    if np.isnan(estimate[0]):
        return ""
    return claim.finding.format(write_number(claim.unit, (estimate[0], np.nan, np.nan)))


def _decimals(unit: NumberForm, value: float) -> int:
    """Return how many decimals of a number are written."""
    if unit == "correlation":
        return 3
    if unit == "points":
        return 2
    if unit == "ratio":
        return 1 if abs(value) >= 2 else 2
    return 1


def _rounded(value: float, decimals: int) -> str:
    """Return a rounded number, without -0.00."""
    if np.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"
