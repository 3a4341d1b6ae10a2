"""Stability: whether two initialisations find the same samples important.

The paper (section 3.2, Fig. 1) trains from three initialisations, correlates by rank the model
importance of the samples for each pair of them, and finds more than 0.9 at every epoch. With one
sequence of batches for all initialisations (`shuffle`), in-step importance of a sample is measured
at the same step of every run. With a sequence for each seed (`shuffle_by_seed`) it is not, and the
correlation is lower in early epochs.

Map: `stability`.
"""

from itertools import combinations

import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.analysis.runs import (
    label_result,
    model_importance,
    place_of,
    require,
    seeds_of,
    whole_samples,
)
from sampimp.errors import MissingDataError
from sampimp.schema import REFERENCES


def stability(
    cube: xr.Dataset, variable: str = "importance", *, resamples: int = kernels.RESAMPLES
) -> xr.Dataset:
    """Return the rank correlation of sample importance between initialisations, per epoch.

    One epoch of the reference runs is in memory at a time, since ranking needs all samples.

    Parameters
    ----------
    cube
        One node of the cube. The result is NaN from the epoch in which a run diverged, and for
        epochs in which `variable` was not measured.
    variable
        `importance` (in-step) or `snapshot_importance` (all samples at the end of the epoch).
    resamples
        Bootstrap resamples for each interval.

    Returns
    -------
    Dataset, lazy
        rank_correlation(reference, epoch, pair), its 95 % interval
        rank_correlation_interval(reference, epoch, pair, bound) over samples, and
        layer_rank_correlation(reference, epoch, layer, pair).

    Raises
    ------
    MissingDataError
        No reference has two seeds.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> result = stability(example_cube())
    >>> result["pair"].values.tolist()
    ['1-2', '1-3', '2-3']
    >>> bool((result["rank_correlation"] > 0.9).all())
    True

    References
    ----------
    Gao & Jojic (2017), section 3.2 and Fig. 1.
    """
    require(cube, variable)
    seeds = {name: seeds_of(cube, name, whole=False) for name in REFERENCES}
    references = [name for name, numbers in seeds.items() if len(numbers) >= 2]
    if not references:
        raise MissingDataError(
            "at least two seeds of a reference (shuffle or shuffle_by_seed)",
            ", ".join(f"{name}: seeds {numbers or 'none'}" for name, numbers in seeds.items()),
            place_of(cube),
            "run the study with more seeds, or let it finish",
        )
    union = sorted({seed for name in references for seed in seeds[name]})
    rows = list(combinations(range(len(union)), 2))
    beta = cube[variable].sel(strategy=references, seed=union).rename(strategy="reference")
    size = {"pair": len(rows)}
    model, interval = xr.apply_ufunc(
        _correlate_runs,
        whole_samples(model_importance(beta), "seed"),
        input_core_dims=[["seed", "sample"]],
        output_core_dims=[["pair"], ["pair", "bound"]],
        kwargs={"rows": rows, "resamples": resamples},
        output_dtypes=[np.float64, np.float64],
        dask_gufunc_kwargs={"output_sizes": {**size, "bound": 2}},
        dask="parallelized",
        keep_attrs=False,
    )
    by_layer = xr.apply_ufunc(
        _correlate_pairs,
        whole_samples(beta, "seed"),
        input_core_dims=[["seed", "sample"]],
        output_core_dims=[["pair"]],
        kwargs={"rows": rows},
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"output_sizes": size},
        dask="parallelized",
        keep_attrs=False,
    )
    result = xr.Dataset(
        {
            "rank_correlation": model,
            "rank_correlation_interval": interval,
            "layer_rank_correlation": by_layer,
        }
    ).assign_coords(
        pair=[f"{union[a]}-{union[b]}" for a, b in rows],
        bound=["low", "high"],
    )
    result = result.drop_vars([name for name in ("seed", "order_seed") if name in result.coords])
    kind = "snapshot" if variable == "snapshot_importance" else "in-step"
    return label_result(
        result,
        cube,
        importance=variable,
        method=(
            f"Spearman's rank correlation of {kind} model importance alpha over the samples, "
            "for each pair of initialisations; 95 % interval from the standard error, "
            f"on Fisher's scale, of {resamples} bootstrap resamples of the samples"
        ),
        figure="1",
        section="3.2",
        variables={
            "rank_correlation": ("1", "rank correlation of model importance between two seeds"),
            "rank_correlation_interval": ("1", "95 % interval of the rank correlation"),
            "layer_rank_correlation": ("1", "rank correlation of a layer's importance"),
        },
    )


def _correlate_pairs(values: np.ndarray, rows: list[tuple[int, int]]) -> np.ndarray:
    """Return the rank correlation of pairs of rows of values [..., seed, N]."""
    ranks = kernels.standardised_ranks(values)
    first, second = np.array(rows).T
    products = np.einsum("...qn,...qn->...q", ranks[..., first, :], ranks[..., second, :])
    return np.clip(products / values.shape[-1], -1.0, 1.0)


def _correlate_runs(
    values: np.ndarray, rows: list[tuple[int, int]], resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank correlations of pairs of rows and their bootstrap intervals."""
    intervals = np.empty((*values.shape[:-2], len(rows), 2))
    for index in np.ndindex(values.shape[:-2]):
        intervals[index] = kernels.bootstrap_spearman(values[index], rows, resamples=resamples)
    return _correlate_pairs(values, rows), intervals
