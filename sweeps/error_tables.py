"""Test errors after training on subsets, as tables for a terminal of 80 columns.

Map: `error_table` (rules by sizes, for one run and budget), `smallest_sizes_table` (`--within`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sampimp.schema import ALL_SAMPLES, SUBSET_BUDGETS
from sampimp.store.subset_choice import CHOSEN
from sampimp.subsets.training import CONVERGENCE
from sampimp.sweeps.quantities import format_count


def error_table(
    cube: xr.Dataset, budget: str, sizes: Sequence[float], seeds: Sequence[int], run: str
) -> Group:
    """Return the test errors in per cent, mean and standard error over seeds, by rule and size.

    A mean over fewer seeds, since trainings diverged, says so.

    Parameters
    ----------
    cube
        `subset_error` and `subset_variant` of one run.
    budget
        steps or epochs.
    sizes, seeds
        Which ones; each is in the cube.
    run
        Label of the run.
    """
    here = cube.sel(budget=budget)
    error = cube["subset_error"].sel(training_seed=list(seeds))
    table = _table("kept", [f"{100 * size:.3g} %" for size in sizes])
    variant = here["subset_variant"].sel(size=list(sizes))
    trained = [str(rule) for rule in variant["rule"].values if variant.sel(rule=rule).any()]
    rules = [rule for rule in trained if rule not in (ALL_SAMPLES, CHOSEN)]
    rules += [CHOSEN] * (CHOSEN in trained)
    for rule in rules:
        means = (_mean(error.sel(rule=rule, size=size, budget=budget)) for size in sizes)
        table.add_row(Text(rule), *means)
    if CHOSEN in rules:
        names = map(str, variant.sel(rule=CHOSEN).values)
        table.add_row(Text("  which is", "dim"), *(Text(name, "dim") for name in names))
    full = error.sel(rule=ALL_SAMPLES, size=1.0)
    same, converged = (_mean(full.sel(budget=name)) for name in (budget, "convergence"))
    words = f"Mean ± s.e. of {format_count(len(seeds), 'seeds')}; all samples {same}"
    return Group(
        Text(f"{run}: test error in %, equal {budget}", "bold"),
        Text(f"{words}, in {CONVERGENCE} times the epochs {converged}"),
        table,
    )


def smallest_sizes_table(sizes: Mapping[tuple[str, str], float], within: float, run: str) -> Group:
    """Return the smallest size that suffices, in per cent, by rule and budget.

    Parameters
    ----------
    sizes
        By rule and budget, as a share; 1 where no smaller size suffices, NaN where a training on
        all samples diverged.
    within
        Percentage points of the test error.
    run
        Label of the run.
    """
    budgets = SUBSET_BUDGETS[:2]
    table = _table("rule", [f"equal {budget}" for budget in budgets])
    for rule in dict.fromkeys(rule for rule, _ in sizes):
        shares = [sizes[rule, budget] for budget in budgets]
        table.add_row(Text(rule), *map(_share, shares))
    title = f"{run}: smallest size within {within:g} points of the error of all samples"
    lines: list[Text | Table] = [Text(title, "bold"), table]
    if any(np.isnan(size) for size in sizes.values()):
        lines.append(Text("unknown: a training on all samples diverged", "dim"))
    return Group(*lines)


def _share(size: float) -> str:
    """Return a smallest size in per cent.

    Examples
    --------
    >>> [_share(size) for size in (0.111, 1.0, float("nan"))]
    ['11.1 %', 'none', 'unknown']
    """
    if np.isnan(size):
        return "unknown"
    return "none" if size == 1 else f"{100 * size:.3g} %"


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _mean(error: xr.DataArray) -> str:
    """Return mean and standard error in per cent.

    Examples
    --------
    >>> _mean(xr.DataArray([0.184, 0.186])), _mean(xr.DataArray([0.0444, np.nan]))
    ('18.5±0.1', '4.44 (1 of 2)')
    """
    known = 100 * error.values[np.isfinite(error.values)]
    if not len(known):
        return "—"
    part = f" ({len(known)} of {error.size})" if len(known) < error.size else ""
    if len(known) == 1:
        return f"{known[0]:.2f}{part}"
    spread = known.std(ddof=1) / np.sqrt(len(known))
    digits = 1 if known.mean() >= 10 and spread >= 0.05 else 2
    return f"{known.mean():.{digits}f}±{spread:.{digits}f}{part}"
