"""Which runs of a cube have trainings on subsets, and by which rules: what section 5 shares.

Map: `has_subsets`, `subset_run`; `IMPORTANCE_RULES`, `RANDOM_RULES`, `is_by_importance` (rules),
`FEWEST_SEEDS`, `SUBSET` (the command).
"""

import xarray as xr

from sampimp.analysis.influence_runs import influence_run

SUBSET = "sampimp subset OUT"
"""The command that trains on subsets."""

RANDOM_RULES = ("random", "balanced")
"""The rules that know nothing of the samples but their class."""

IMPORTANCE_RULES = (
    *("tau-high", "tau-low", "strata", "power"),
    *("final-importance", "metagradient"),
)
"""The rules that select by importance, or by what a sample does to training."""

FEWEST_SEEDS = 3
"""With fewer training seeds there is no interval (arbitrary; t of two numbers is 4 times wider)."""


def has_subsets(cube: xr.Dataset) -> bool:
    """Return whether any run was followed by trainings on subsets.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_subsets
    >>> has_subsets(example_cube()), has_subsets(with_subsets(example_cube()))
    (False, True)
    """
    return "subset_error" in cube


def subset_run(cube: xr.Dataset) -> xr.Dataset:
    """Return a run that was followed by trainings on subsets; the reference run first.

    Returns
    -------
    Dataset
        All variables of the run; the attribute `run` names it.

    Raises
    ------
    MissingDataError
        There is none.
    """
    names = ("subset_error", "subset_variant", "selected")
    return influence_run(cube, *names, command=SUBSET)


def is_by_importance(rule: str) -> bool:
    """Return whether a rule, with or without a parameter, selects by importance.

    Examples
    --------
    >>> [is_by_importance(rule) for rule in ("power:0.25", "tau-high", "nll-high", "chosen")]
    [True, True, False, False]
    """
    return rule.partition(":")[0] in IMPORTANCE_RULES
