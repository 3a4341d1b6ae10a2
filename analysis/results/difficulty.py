"""Difficulty: how importance is related to the negative log-likelihood of the samples.

The paper correlates in-step importance with the NLL of the same samples, epoch by epoch, and
overall importance tau with the final NLL (section 3.4, Fig. 4). The correlation is positive, grows,
and stays far from one. Section 3.5 says that easy samples (low final NLL) act early and near the
output, hard samples late and near the input. That is measured here for every sample, by its
importance-weighted mean epoch and by each layer's share of its importance, and for three groups of
samples.

Map: `importance_against_nll`, `correlate_samples`.
"""

import dask.array as da
import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.analysis.results.decomposition import folds_of
from sampimp.analysis.runs import (
    label_result,
    lazy,
    model_importance,
    overall_importance,
    reference_run,
    sum_samples,
    whole_samples,
)

DIFFICULTIES = {"easy": 0.5, "medium": 0.4, "hard": 0.1}
"""Groups by final NLL, low first, with their fractions. The paper names the groups without bounds;
a tenth is its unit in section 3.3, and half stands for "most samples" (arbitrary otherwise)."""


def importance_against_nll(cube: xr.Dataset, *, resamples: int = kernels.RESAMPLES) -> xr.Dataset:
    """Return the relation of sample importance to negative log-likelihood, in time and in depth.

    The importance of epoch t is in-step; the NLL of epoch t is measured at its end.

    Parameters
    ----------
    cube
        One node of the cube.
    resamples
        Bootstrap resamples for each interval.

    Returns
    -------
    Dataset, lazy
        Rank correlations over the samples: rank_correlation(epoch, layer) of beta with NLL;
        model_rank_correlation(epoch) of alpha with NLL; overall_rank_correlation() of tau with
        final NLL; when_rank_correlation() of final NLL with mean_epoch(sample);
        where_rank_correlation(layer) of final NLL with layer_share(layer, sample). All but the
        first have an interval `*_interval(bound)`. Values of the samples:
        overall_importance(sample), final_nll(sample). Sums by difficulty:
        importance_by_difficulty(difficulty, epoch, layer), mean per sample, and
        importance_by_difficulty_and_fold(difficulty, fold, epoch, layer).

    Raises
    ------
    MissingDataError
        The reference run is not complete.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> result = importance_against_nll(example_cube())
    >>> bool(result["when_rank_correlation"] > 0.9)
    True
    >>> result["where_rank_correlation"].sel(layer=["L1", "Out"]).round(1).values
    array([ 1., -1.])

    References
    ----------
    Gao & Jojic (2017), sections 3.4 and 3.5, Fig. 4.
    """
    run = reference_run(cube, "importance", "nll")
    beta, nll = lazy(run["importance"]), lazy(run["nll"])
    alpha, tau = model_importance(beta), overall_importance(beta)
    final = nll.isel(epoch=-1, drop=True)
    positive = tau.where(tau > 0)  # a sample with tau = 0 has no mean epoch and no shares
    mean_epoch = (alpha * alpha["epoch"]).sum("epoch", skipna=False) / positive
    share = beta.sum("epoch", skipna=False, dtype=np.float64) / positive
    result = xr.Dataset(
        {
            "rank_correlation": xr.apply_ufunc(
                kernels.spearman,
                whole_samples(beta),
                whole_samples(nll),
                input_core_dims=[["sample"], ["sample"]],
                dask="parallelized",
                output_dtypes=[np.float64],
                keep_attrs=False,
            ),
            "overall_importance": tau,
            "final_nll": final,
            "mean_epoch": mean_epoch,
            "layer_share": share,
        }
    )
    for name, first, second in (
        ("model", alpha, nll),
        ("overall", tau, final),
        ("when", final, mean_epoch),
        ("where", final, share),
    ):
        correlation, interval = correlate_samples(first, second, resamples)
        result[f"{name}_rank_correlation"] = correlation
        result[f"{name}_rank_correlation_interval"] = interval
    result = result.assign_coords(bound=["low", "high"])
    by_fold, size = _by_difficulty(beta, final)
    result["importance_by_difficulty_and_fold"] = by_fold
    result["importance_by_difficulty"] = by_fold.sum("fold") / size
    result["difficulty_size"] = size
    return label_result(
        result,
        cube,
        method=(
            "Spearman's rank correlation over the samples of the reference run (shuffle, seed 1); "
            "in-step importance of an epoch against the NLL at its end; 95 % interval from the "
            f"standard error, on Fisher's scale, of {resamples} bootstrap resamples of the samples"
        ),
        figure="4",
        section="3.4 and 3.5",
        variables={
            "rank_correlation": ("1", "rank correlation of a layer's importance with NLL"),
            "model_rank_correlation": ("1", "rank correlation of model importance with NLL"),
            "model_rank_correlation_interval": ("1", "95 % interval of the correlation"),
            "overall_importance": ("parameter^2", "overall importance"),
            "final_nll": ("nat", "NLL at the end of the last epoch"),
            "overall_rank_correlation": (
                "1",
                "rank correlation of overall importance with final NLL",
            ),
            "overall_rank_correlation_interval": ("1", "95 % interval of the correlation"),
            "mean_epoch": ("epoch", "importance-weighted mean epoch of the sample"),
            "layer_share": ("1", "share of the sample's importance in the layer"),
            "when_rank_correlation": ("1", "rank correlation of final NLL with mean epoch"),
            "when_rank_correlation_interval": ("1", "95 % interval of the correlation"),
            "where_rank_correlation": ("1", "rank correlation of final NLL with a layer's share"),
            "where_rank_correlation_interval": ("1", "95 % interval of the correlation"),
            "importance_by_difficulty": ("parameter^2", "mean importance of a sample of the group"),
            "importance_by_difficulty_and_fold": (
                "parameter^2",
                "importance of the group's samples in a fold",
            ),
            "difficulty_size": ("1", "samples of the group"),
        },
    )


def correlate_samples(
    first: xr.DataArray, second: xr.DataArray, resamples: int
) -> tuple[xr.DataArray, xr.DataArray]:
    """Return the rank correlation over samples and its interval, for every index of the others.

    Parameters
    ----------
    first, second : DataArray (..., sample)
    resamples
        Bootstrap resamples for each interval.

    Returns
    -------
    DataArray (...) and DataArray (..., bound), lazy
    """
    correlation, interval = xr.apply_ufunc(
        _correlate_rows,
        whole_samples(first),
        whole_samples(second),
        input_core_dims=[["sample"], ["sample"]],
        output_core_dims=[[], ["bound"]],
        kwargs={"resamples": resamples},
        dask="parallelized",
        dask_gufunc_kwargs={"output_sizes": {"bound": 2}},
        output_dtypes=[np.float64, np.float64],
        keep_attrs=False,
    )
    return correlation, interval


def _correlate_rows(
    first: np.ndarray, second: np.ndarray, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `correlate_samples` of the arrays of a block."""
    first, second = np.broadcast_arrays(first, second)
    interval = np.empty((*first.shape[:-1], 2))
    for index in np.ndindex(first.shape[:-1]):
        rows = np.stack([first[index], second[index]])
        interval[index] = kernels.bootstrap_spearman(rows, [(0, 1)], resamples=resamples)[0]
    return kernels.spearman(first, second), interval


def _by_difficulty(beta: xr.DataArray, final: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Return importance summed by difficulty and fold, and the groups' sizes."""
    names = list(DIFFICULTIES)
    samples = beta.sizes["sample"]
    ends = np.rint(np.cumsum(list(DIFFICULTIES.values())) * samples).astype(int)
    folds, fold_of_sample = folds_of(samples)
    codes = (
        da.asarray(final.data)
        .rechunk(-1)
        .map_blocks(_codes_of_difficulty, ends, fold_of_sample, len(folds), dtype=np.int64)
    )
    cells = sum_samples(beta, codes, "cell", np.arange(len(names) * len(folds)))
    by_fold = xr.DataArray(
        cells.data.reshape(*cells.shape[:-1], len(names), len(folds)),
        dims=(*cells.dims[:-1], "difficulty", "fold"),
        coords={
            **{k: v for k, v in cells.coords.items() if k != "cell"},
            "difficulty": names,
            "fold": folds,
        },
    ).transpose("difficulty", "fold", "epoch", "layer")
    size = xr.DataArray(np.diff(ends, prepend=0), dims="difficulty", coords={"difficulty": names})
    return by_fold, size


def _codes_of_difficulty(
    final: np.ndarray, ends: np.ndarray, fold: np.ndarray, folds: int
) -> np.ndarray:
    """Return each sample's cell; equal NLL (0 in float32 is frequent) in the order of samples."""
    place = np.empty(len(final), np.int64)
    place[np.argsort(final, kind="stable")] = np.arange(len(final))
    return np.searchsorted(ends, place, side="right") * folds + fold
