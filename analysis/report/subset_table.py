"""Section 5 in words: findings on subsets, and tables of their errors.

Map: `subset_tables` (all of it), `subset_findings`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from sampimp.analysis.figures import BUDGET_NAMES
from sampimp.analysis.report.contents import join_values
from sampimp.analysis.subset_runs import RANDOM_RULES
from sampimp.store.subset_choice import CHOSEN, FALLBACK

MOST_SIZES = 8
"""Columns of a table; more sizes, of bisections, are in the stored result (arbitrary)."""


def subset_tables(results: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Return section 5 as text.

    Parameters
    ----------
    results
        Results of `analyse`; only `subset_errors` is read.

    Returns
    -------
    dict
        `findings`: sentences, unfavourable ones first; `sizes`: the columns; `budgets`: of each
        budget its name, its rows of a rule's name and cells (error, details, CSS class), and the
        errors of all samples; `smallest`: rows of a rule's name and of the smallest size, with its
        interval, at each budget; `within`: in points. Empty without the result.
    """
    result = results.get("subset_errors")
    if result is None:
        return {}
    result = result.transpose("rule", "size", "budget", "bound")
    shown = result.isel(size=_columns(result))
    rules = [str(rule) for rule in result["rule"].values]
    return {
        "findings": subset_findings(result),
        "sizes": [_per_cent(size) for size in shown["size"].values],
        "budgets": [_budget_table(shown.sel(budget=budget)) for budget in result["budget"].values],
        "smallest": [
            (_rule_name(rule), [_smallest(result.sel(rule=rule, budget=b)) for b in result.budget])
            for rule in rules
        ],
        "within": f"{100 * result.attrs['within']:.2g}",
    }


def subset_findings(result: xr.Dataset) -> list[str]:
    """Return what the comparison with balanced random subsets shows, unfavourable sentences first.

    Parameters
    ----------
    result
        The result `subset_errors`.
    """
    low, high = (result["difference_from_balanced_interval"].sel(bound=b) for b in ("low", "high"))
    if not np.isfinite(low.where(low["rule"] != FALLBACK)).any():
        return [
            "No rule can be compared with balanced random subsets: that takes trainings with at "
            "least 3 seeds in common."
        ]
    rules = [str(rule) for rule in result["rule"].values]
    others = [rule for rule in rules if rule not in (*RANDOM_RULES, CHOSEN)]
    findings = []
    if CHOSEN in rules and (worse := _places(low.sel(rule=CHOSEN) > 0)):
        findings.append(
            "The rule that the validation split chose is worse than balanced random subsets at "
            f"{worse}."
        )
    compared = low.sel(rule=others).notnull().any("rule")
    better = (high.sel(rule=others) < 0).any("rule")
    beaten, unbeaten = _places(compared & better), _places(compared & ~better)
    if not beaten:
        findings.append("No rule is better than balanced random subsets at any size.")
    elif unbeaten:
        findings.append(f"No rule is better than balanced random subsets at {unbeaten}.")
    if beaten:
        findings.append(f"At least one rule is better than balanced random subsets at {beaten}.")
    if CHOSEN not in rules:
        findings.append("No rule was chosen: not all of them were judged on the validation split.")
    return findings


def _places(is_there: xr.DataArray) -> str:
    """Return the sizes at which something is so, by budget; empty if there is none."""
    sizes = {}
    for budget in is_there["budget"].values:
        here = is_there["size"].values[is_there.sel(budget=budget).values]
        sizes[str(budget)] = join_values(map(_per_cent, here))
    (first, *others) = sizes.values()
    if first and others == [first]:
        return f"{first} (either budget)"
    return " and ".join(f"{words} ({BUDGET_NAMES[name]})" for name, words in sizes.items() if words)


def _columns(result: xr.Dataset) -> np.ndarray:
    """Return the positions of the sizes at which most rules were trained, in order."""
    trained = (result["count"] + result["diverged"] > 0).any("budget").sum("rule").values
    most = np.argsort(-trained, kind="stable")[:MOST_SIZES]
    return np.sort(most[trained[most] > 0])


def _budget_table(here: xr.Dataset) -> dict[str, Any]:
    """Return the errors of one budget."""
    return {
        "name": BUDGET_NAMES[str(here["budget"].item())],
        "rows": [
            (_rule_name(rule), [_cell(here.sel(rule=rule, size=size)) for size in here["size"]])
            for rule in map(str, here["rule"].values)
        ],
        "full": _error(here["full_error"], here["full_error_se"]),
        "converged": _error(here["converged_error"], here["converged_error_se"]),
    }


def _cell(cell: xr.Dataset) -> tuple[str, str, str]:
    """Return a rule's error, what there is to know of it, and its CSS class."""
    empty, diverged = float(cell["missing_classes"]), int(cell["diverged"])
    trained = diverged + int(cell["count"])
    if not trained:
        return "—", "", ""
    variant = str(cell["variant"].item())
    low, high = cell["difference_from_balanced_interval"].values
    comparison, style = "", ""
    if high < 0:
        comparison, style = "better", "holds"
    elif low > 0:
        comparison, style = "worse", "fails"
    details: Iterable[str] = (
        comparison,
        variant if variant != str(cell["rule"].item()) else "",
        f"{diverged} of {trained} diverged" if diverged else "",
        f"{empty:.0f} class{'es' if empty > 1 else ''} missing" if empty else "",
    )
    return _error(cell["error"], cell["error_se"]), ", ".join(filter(None, details)), style


def _error(mean: xr.DataArray, error: xr.DataArray) -> str:
    """Return an error with its standard error, in per cent."""
    if not np.isfinite(mean):
        return "—"
    spread = f" ± {100 * float(error):.2f}" if np.isfinite(error) else ""
    return f"{100 * float(mean):.2f}{spread}"


def _smallest(here: xr.Dataset) -> tuple[str, str]:
    """Return the smallest size that suffices, and its interval."""
    size = float(here["smallest_size"])
    if np.isnan(size):
        return "—", ""
    low, high = here["smallest_size_interval"].values
    interval = "" if np.isnan(low) or low == 1 else f"{_per_cent(low)} to {_per_cent(high)}"
    return "none measured" if size == 1 else _per_cent(size), interval


def _per_cent(share: float) -> str:
    """Return a share in per cent.

    Examples
    --------
    >>> _per_cent(0.05), _per_cent(0.29963)
    ('5 %', '30 %')
    """
    return f"{100 * share:.3g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _rule_name(rule: str) -> str:
    """Return a rule's name as it is shown."""
    return "chosen by validation" if rule == CHOSEN else rule
