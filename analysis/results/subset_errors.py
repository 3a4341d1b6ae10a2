"""Trainings on subsets of the samples: error by rule and size, and the smallest size that suffices.

Every subset is compared with `balanced`, a random one of the same size with equally many samples of
each class, by the same training seed, and with all samples at the same budget and at convergence.
In a comparison, a training that diverged counts with the error of guessing; the mean error leaves
it out, beside its number.

Map: `subset_errors`.
"""

import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.analysis.prediction import PERCENTILE_RESAMPLES, resample_counts
from sampimp.analysis.runs import codes_of_labels, label_result, sum_samples
from sampimp.analysis.subset_runs import FEWEST_SEEDS, subset_run
from sampimp.schema import ALL_SAMPLES, SUBSET_BUDGETS
from sampimp.store.subset_choice import FALLBACK, crossing

WITHIN = 0.003
"""Largest difference from the error of all samples that counts as none: 0.3 points (arbitrary)."""


def subset_errors(
    cube: xr.Dataset, *, within: float = WITHIN, resamples: int = PERCENTILE_RESAMPLES
) -> xr.Dataset:
    """Return test errors after training on subsets, and comparisons with all and random samples.

    Parameters
    ----------
    cube
        One node of the cube.
    within
        A size suffices if its error is at most that of all samples, at the same budget, plus this
        fraction of the test samples.
    resamples
        Bootstrap resamples of the training seeds for the interval of the smallest size.

    Returns
    -------
    Dataset, in memory
        By rule, size and budget (steps, epochs): error and error_se, mean over the training seeds
        that did not diverge and its standard error; count and diverged, the numbers of these seeds
        and of the others; penalised_error, mean over both; difference_from_balanced (balanced
        itself: 0), mean of paired differences, with `*_interval(..., bound)` by t over seeds;
        variant, the rule with its parameter, or the rule, that the validation split chose (empty:
        not trained); missing_classes, the largest number of classes without a sample.

        By budget: full_error and full_error_se; converged_error and converged_error_se (without
        dimensions), with converged_error_interval(bound).

        smallest_size(rule, budget), 1 if no measured size suffices, with its interval.

        Intervals are NaN with fewer than 3 seeds.

    Raises
    ------
    MissingDataError
        No run was followed by trainings on subsets.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_subsets
    >>> result = subset_errors(with_subsets(example_cube()))
    >>> result["smallest_size"].sel(rule=["tau-high", "balanced"], budget="steps").values.round(2)
    array([0.3, 1. ])

    References
    ----------
    Gao & Jojic (2017), section 5.
    """
    run = subset_run(cube)
    labels, codes = codes_of_labels(cube)
    budgets = [budget for budget in SUBSET_BUDGETS if budget != "convergence"]
    full = _full_errors(run)
    run = run.sel(rule=run["rule"] != ALL_SAMPLES, size=run["size"] < 1, budget=budgets).transpose(
        "rule", "size", "budget", "training_seed", ...
    )
    by_class = sum_samples(run["selected"], codes, "label", labels).compute()
    trained = (by_class > 0).any("label")
    error = run["subset_error"]
    penalised = error.where(error.notnull() | ~trained, 1 - 1 / len(labels))
    result = xr.Dataset()
    result["error"], result["error_se"], result["count"] = _over_seeds(error)
    result["diverged"] = trained.sum("training_seed") - result["count"]
    result["penalised_error"], *_ = _over_seeds(penalised)
    difference, interval = _differences(penalised)
    result["difference_from_balanced"] = result["error"].copy(data=difference)
    result["difference_from_balanced_interval"] = (
        (*result["error"].dims, "bound"),
        interval,
    )
    result["variant"] = run["subset_variant"]
    empty = (by_class == 0).sum("label").where(trained, -1).max("training_seed")
    result["missing_classes"] = empty.where(empty >= 0)
    result["full_error"], result["full_error_se"], _ = _over_seeds(full.sel(budget=budgets))
    converged = full.sel(budget="convergence", drop=True)
    result["converged_error"], result["converged_error_se"], _ = _over_seeds(converged)
    result["converged_error_interval"] = ("bound", _interval(converged.values))
    size, interval = _smallest_sizes(penalised, full.sel(budget=budgets), within, resamples)
    result["smallest_size"] = (("rule", "budget"), size)
    result["smallest_size_interval"] = (("rule", "budget", "bound"), interval)
    result = result.drop_vars(set(result.coords) - {"rule", "size", "budget"})
    result = result.assign_coords(bound=["low", "high"])
    label_result(
        result,
        cube,
        method=_METHOD.format(run.attrs["run"], 100 * within, resamples),
        figure="18",
        section="5",
        variables=_VARIABLES,
    )
    result.attrs["within"] = within
    return result


_METHOD = (
    "samples selected by the scores of the run {}; mean over training seeds, standard error with "
    "n - 1; differences paired by seed, 95 % interval by t over at least 3 seeds, not corrected "
    "for the number of comparisons; in them a diverged training counts with the error of guessing; "
    "smallest size: from which on the mean error is within {:.2g} points of that of all samples at "
    "the same budget, interpolated in log size, 95 % interval: percentiles of {} bootstrap "
    "resamples of the seeds"
)

_VARIABLES = {
    "error": ("1", "test error after training on the subset, mean over seeds"),
    "error_se": ("1", "standard error of the test error"),
    "count": ("1", "training seeds that did not diverge"),
    "diverged": ("1", "training seeds that diverged"),
    "penalised_error": ("1", "test error, where a diverged training counts as guessing"),
    "difference_from_balanced": ("1", "test error minus that of balanced random subsets"),
    "difference_from_balanced_interval": ("1", "95 % interval of the difference"),
    "variant": ("1", "rule with the parameter, or the rule, that the validation split chose"),
    "missing_classes": ("1", "classes without a selected sample, the most of all seeds"),
    "full_error": ("1", "test error after training on all samples"),
    "full_error_se": ("1", "standard error of the test error of all samples"),
    "converged_error": ("1", "test error of all samples at convergence"),
    "converged_error_se": ("1", "standard error of the test error at convergence"),
    "converged_error_interval": ("1", "95 % interval of the test error at convergence"),
    "smallest_size": ("1", "smallest share of the samples that suffices; 1 if none was measured"),
    "smallest_size_interval": ("1", "95 % interval of the smallest share"),
}


def _full_errors(run: xr.Dataset) -> xr.DataArray:
    """Return the errors of all samples (budget, training_seed); NaN where they are missing."""
    error = run["subset_error"].reindex(rule=[ALL_SAMPLES], size=[1.0])
    return error.isel(rule=0, size=0, drop=True).transpose("budget", "training_seed")


def _over_seeds(error: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Return mean, standard error (NaN with one seed) and number of seeds that are not NaN."""
    count = error.notnull().sum("training_seed")
    mean = error.sum("training_seed") / count.where(count > 0)
    squares = ((error - mean) ** 2).sum("training_seed")
    return mean, (squares / (count - 1).where(count > 1) / count) ** 0.5, count


def _differences(error: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean differences from `balanced` (rule, size, budget), and their intervals."""
    base = error.reindex(rule=[FALLBACK]).isel(rule=0, drop=True)
    paired = (error - base).transpose("rule", "size", "budget", "training_seed").values
    mean = np.full(paired.shape[:-1], np.nan)
    interval = np.full((*mean.shape, 2), np.nan)
    for place in np.ndindex(mean.shape):
        known = paired[place][np.isfinite(paired[place])]
        if len(known):
            mean[place], interval[place] = known.mean(), _interval(known)
    return mean, interval


def _interval(values: np.ndarray) -> np.ndarray:
    """Return the interval of a mean by t; NaN with fewer than 3 seeds."""
    _, *bounds = kernels.t_interval(values)
    enough = np.isfinite(values).sum() >= FEWEST_SEEDS
    return np.array(bounds if enough else [np.nan, np.nan])


def _smallest_sizes(
    error: xr.DataArray, full: xr.DataArray, within: float, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest sizes that suffice (rule, budget), and their intervals.

    A resample draws training seeds: those of the rule and of all samples are the same.
    """
    error = error.transpose("rule", "budget", "size", "training_seed")
    full = full.transpose("budget", "training_seed")
    sizes, shape = error["size"].values.astype(float), error.shape[:2]
    size, interval = np.full(shape, np.nan), np.full((*shape, 2), np.nan)
    for place in np.ndindex(shape):
        by_size, whole = error.values[place], full.values[place[1]]
        measured = np.isfinite(by_size).any(1)
        seeds = np.isfinite(whole) & np.isfinite(by_size[measured]).all(0)
        if not measured.any() or not seeds.any():
            continue
        by_size, whole = by_size[measured][:, seeds], whole[seeds]
        draws = resample_counts(int(seeds.sum()), resamples=resamples) / seeds.sum()
        found = [
            crossing(sizes[measured], by_size @ share, float(whole @ share) + within).size
            for share in draws
        ]
        size[place] = found[0]
        if seeds.sum() >= FEWEST_SEEDS:
            interval[place] = np.quantile(found[1:], [0.025, 0.975])
    return size, interval
