"""The effect of a removal as influence predicts it, on named dimensions.

To first order, training without some samples changes a target by minus their influence. Influence
in the cube keeps the denominator of a batch's mean loss: a batch of B samples of which one is
removed still divides by B. Training on the other samples alone would divide by the number that
remains; that convention follows from the same influence and the recorded batches.

Map: `predicted_removal`, `summed_influence`.
"""

import numpy as np
import xarray as xr

from sampimp.analysis.prediction import renormalised_influence
from sampimp.analysis.runs import lazy, whole_samples
from sampimp.errors import ConfigError


def predicted_removal(
    influence: xr.DataArray, removed: xr.DataArray, batch: xr.DataArray | None = None
) -> xr.DataArray:
    """Return the predicted effect of removing samples: minus the sum of their influence.

    Parameters
    ----------
    influence : DataArray (..., sample)
        `influence` of the cube, or `influence_total`, in the target's unit per unit of weight.
        Dimensions `epoch` and `layer` are summed. An epoch in which a sample was not used counts
        as 0.
    removed : DataArray of bool (..., sample)
        True for a removed sample, such as `removed` of the cube, with a dimension for the removals.
    batch : DataArray (..., epoch, sample), optional
        `batch` of the cube: the mean of a batch's loss is then one over the samples that remain
        (renormalised), otherwise its denominator stays. `influence` needs the dimension `epoch`.

    Returns
    -------
    DataArray (...), lazy
        Value of the target without the samples minus its value with them, to first order, in the
        target's unit: the dimensions of both arguments without `epoch`, `layer` and `sample`. NaN
        where the influence of a removed sample is not known.

    Raises
    ------
    ConfigError
        `removed` is not of type bool, the samples are not the same, or `batch` is given and
        `influence` has no dimension `epoch`.

    Examples
    --------
    >>> influence = xr.DataArray([[[0.5], [0.1], [0.2]]], dims=("epoch", "sample", "layer"))
    >>> rows = [[True, False, True], [False, True, False]]
    >>> removed = xr.DataArray(rows, dims=("removal", "sample"))
    >>> predicted_removal(influence, removed).values
    array([-0.7, -0.1])
    >>> batch = xr.DataArray([[0, 0, 1]], dims=("epoch", "sample"))
    >>> predicted_removal(influence, removed, batch).round(3).values
    array([-0.2,  0.2])

    References
    ----------
    Gao & Jojic (2017), section 4; Koh & Liang (2017), section 2.1, for the sign.
    """
    if removed.dtype != np.bool_:
        raise _misuse("`removed` of type bool, True for a removed sample", f"{removed.dtype}")
    if batch is not None and "epoch" not in influence.dims:
        raise _misuse(
            "`influence` by epoch, together with `batch`",
            f"dimensions {', '.join(map(str, influence.dims))}",
        )
    arrays = (influence, removed) if batch is None else (influence, removed, batch)
    try:
        influence, removed, *rest = xr.align(*arrays, join="exact")
    except ValueError as error:
        raise _misuse("the same samples in all arguments", str(error)) from None
    total = summed_influence(influence, *rest)
    weights = lazy(removed).astype(np.float64)
    unknown = xr.dot(weights, total.isnull().astype(np.float64), dim="sample")
    effect = -xr.dot(weights, total.fillna(0).astype(np.float64), dim="sample")
    return effect.where((unknown == 0) & total.notnull().any("sample"))


def summed_influence(influence: xr.DataArray, batch: xr.DataArray | None = None) -> xr.DataArray:
    """Return influence summed over epochs and layers, in either convention of the mean.

    Parameters
    ----------
    influence : DataArray (..., sample)
        By epoch and layer, or already summed.
    batch : DataArray (..., epoch, sample), optional
        As for `predicted_removal`.

    Returns
    -------
    DataArray (..., sample) of float64, lazy
        NaN for a sample that no epoch used.
    """
    influence = lazy(influence)
    if batch is not None:
        influence = xr.apply_ufunc(
            _renormalised,
            whole_samples(influence),
            whole_samples(batch),
            input_core_dims=[["sample"], ["sample"]],
            output_core_dims=[["sample"]],
            dask="parallelized",
            output_dtypes=[np.float64],
        )
    if "epoch" in influence.dims:
        influence = influence.sum("epoch", min_count=1, dtype=np.float64)
    if "layer" in influence.dims:
        influence = influence.sum("layer", skipna=False, dtype=np.float64)
    return influence.astype(np.float64)


def _renormalised(influence: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Return `renormalised_influence` for each epoch (and run) of blocks with common axes."""
    influence, batch = np.broadcast_arrays(influence, batch)
    result = np.empty(influence.shape)
    for index in np.ndindex(influence.shape[:-1]):
        result[index] = renormalised_influence(influence[index], batch[index])
    return result


def _misuse(expected: str, got: str) -> ConfigError:
    return ConfigError(
        expected=expected,
        got=got,
        where="predicted_removal",
        todo="pass variables of one node of the cube, such as cube.influence and cube.removed",
    )
