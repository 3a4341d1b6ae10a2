"""Training curves of the batch strategies (section 3.6, Figs. 7 and 9).

Training and test curves of each strategy, as mean and standard error over the seeds. A run that
diverged has no values from that epoch on. The mean is over the runs that have the epoch; `runs` is
their number and `diverged` the number of diverged runs, so that a mean over fewer runs can be
recognised.

Map: `strategy_curves`.
"""

import numpy as np
import xarray as xr

from sampimp.analysis.runs import (
    codes_of_labels,
    finite_epochs,
    label_result,
    require,
    sum_samples,
)
from sampimp.schema import CURVES, VARIABLES


def strategy_curves(cube: xr.Dataset) -> xr.Dataset:
    """Return error and NLL curves of each strategy, and the NLL of each class.

    Parameters
    ----------
    cube
        One node of the cube.

    Returns
    -------
    Dataset, lazy
        train_error, test_error, train_nll, test_nll (strategy, epoch), each with its standard error
        `*_se` (NaN with one run); runs(strategy, epoch), diverged(strategy);
        final_test_error(strategy, seed); diverged_epoch(strategy, seed), NaN for a run that did not
        diverge; train_error_by_seed(strategy, seed, epoch); and class_nll(strategy, epoch, label)
        if `nll` is stored.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> result = strategy_curves(example_cube())
    >>> result["runs"].sel(strategy="rsio").values.tolist()
    [3, 3, 2, 2, 2, 2]
    >>> result["test_error"].sel(strategy=["rand", "nlo"]).isel(epoch=-1).round(1).values
    array([0.2, 0.3])

    References
    ----------
    Gao & Jojic (2017), section 3.6 and Fig. 7; appendix, Fig. 9.
    """
    require(cube, *CURVES)
    has_epoch = finite_epochs(cube)
    curves = cube[list(CURVES)].where(has_epoch)
    runs = has_epoch.sum("seed")
    result = xr.Dataset()
    for name in CURVES:
        result[name], result[f"{name}_se"] = _mean_and_error(curves[name])
    result["runs"] = runs
    final = curves["test_error"].isel(epoch=-1, drop=True)
    result["final_test_error"] = final
    result["diverged_epoch"] = (
        cube["diverged_epoch"] if "diverged_epoch" in cube else xr.full_like(final, np.nan)
    )
    result["diverged"] = result["diverged_epoch"].notnull().sum("seed")
    result["train_error_by_seed"] = curves["train_error"]
    if "nll" in cube:
        labels, codes = codes_of_labels(cube)
        size = xr.DataArray(np.bincount(codes), dims="label", coords={"label": labels})
        by_class = sum_samples(cube["nll"], codes, "label", labels) / size
        result["class_nll"] = _mean_and_error(by_class)[0]
    result = result.drop_vars([name for name in ("order_seed",) if name in result.coords])
    named = {name: (VARIABLES[name].units, VARIABLES[name].long_name) for name in CURVES}
    return label_result(
        result,
        cube,
        method="mean over the seeds that have the epoch; standard error with n - 1",
        figure="7 and 9",
        section="3.6",
        variables={
            **named,
            **{f"{k}_se": (v[0], f"standard error of {v[1]}") for k, v in named.items()},
            "runs": ("1", "runs that have the epoch"),
            "diverged": ("1", "runs that diverged"),
            "final_test_error": (
                "1",
                "fraction of test samples misclassified after the last epoch",
            ),
            "diverged_epoch": ("epoch", "first epoch that was not finite"),
            "train_error_by_seed": named["train_error"],
            "class_nll": ("nat", "mean NLL of the training samples of a class"),
        },
    )


def _mean_and_error(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Return the mean over the seeds that are not NaN, and its standard error.

    Both are computed from sums and counts, with NaN for a count that is too small: `mean` and `std`
    of an empty row warn inside dask.
    """
    count = values.notnull().sum("seed")
    mean = values.sum("seed") / count.where(count > 0)
    squares = ((values - mean) ** 2).sum("seed")
    return mean, (squares / (count - 1).where(count > 1) / count) ** 0.5
