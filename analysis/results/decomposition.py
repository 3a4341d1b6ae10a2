"""Decomposition: the classes, layers and samples that shape the network, by epoch.

Importance is a sum over samples, layers and epochs. `decomposition` groups it by epoch, layer and
class; `importance_groups` groups it by the samples' rank in overall importance tau;
`importance_histogram` describes the distribution of tau (section 3.3).

Map: `decomposition` (Fig. 2), `importance_groups` (Fig. 3), `importance_histogram` (Fig. 10);
`folds_of` divides samples into folds for intervals.
"""

import dask.array as da
import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.analysis.runs import (
    codes_of_labels,
    label_result,
    lazy,
    overall_importance,
    place_of,
    reference_run,
    require,
    seeds_of,
    sum_samples,
    whole_samples,
)
from sampimp.errors import MissingDataError
from sampimp.schema import REFERENCE_STRATEGY

FOLDS = 100
"""Folds of samples for the intervals of totals (arbitrary; N folds if there are fewer samples)."""

GROUPS = {"top 10 %": 0.1, "next 10 %": 0.1, "other 80 %": 0.8}
"""The paper's groups of samples by overall importance, with their fractions (section 3.3)."""

BINS = 60
"""Bins of the histogram (arbitrary)."""

HISTOGRAM_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Quantiles of overall importance that are stored with the histogram (arbitrary)."""


def folds_of(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the folds, and each sample's fold: its position modulo their count.

    Examples
    --------
    >>> folds, codes = folds_of(250)
    >>> len(folds), codes[[0, 99, 100]].tolist()
    (100, [0, 99, 0])
    """
    count = min(FOLDS, samples)
    return np.arange(count), np.arange(samples) % count


def decomposition(cube: xr.Dataset) -> xr.Dataset:
    """Return the importance of all samples by epoch, layer and class.

    Parameters
    ----------
    cube
        One node of the cube. The mean is over the complete seeds of `shuffle`.

    Returns
    -------
    Dataset, lazy
        importance_by_class(epoch, layer, label), importance_by_layer(epoch, layer),
        class_size(label), importance_by_fold(fold, epoch, layer) for intervals, and
        parameter_count(layer) if parameters are stored.

    Raises
    ------
    MissingDataError
        No seed of `shuffle` is complete.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> result = decomposition(example_cube())
    >>> dict(result["importance_by_class"].sizes)
    {'epoch': 6, 'layer': 4, 'label': 3}

    References
    ----------
    Gao & Jojic (2017), section 3.3 and Fig. 2.
    """
    require(cube, "importance")
    seeds = seeds_of(cube, REFERENCE_STRATEGY)
    if not seeds:
        raise MissingDataError(
            f"a complete run of {REFERENCE_STRATEGY}",
            "none",
            place_of(cube),
            "let the study run on",
        )
    beta = cube["importance"].sel(strategy=REFERENCE_STRATEGY, seed=seeds, drop=True)
    labels, codes = codes_of_labels(cube)
    folds, fold_of_sample = folds_of(cube.sizes["sample"])
    by_class = sum_samples(beta, codes, "label", labels).mean("seed")
    by_fold = sum_samples(beta, fold_of_sample, "fold", folds).mean("seed")
    result = xr.Dataset(
        {
            "importance_by_class": by_class,
            "importance_by_layer": by_class.sum("label"),
            "class_size": ("label", np.bincount(codes, minlength=len(labels))),
            "importance_by_fold": by_fold.transpose("fold", "epoch", "layer"),
        }
    )
    if "layer_of_parameter" in cube.coords:
        names, counts = np.unique(cube["layer_of_parameter"].values, return_counts=True)
        count = dict(zip(names.tolist(), counts.tolist(), strict=True))
        result["parameter_count"] = (
            "layer",
            np.array([count.get(name, 0) for name in cube["layer"].values.tolist()]),
        )
    result = result.drop_vars([name for name in ("order_seed",) if name in result.coords])
    return label_result(
        result,
        cube,
        method="sum over samples of in-step importance beta, "
        f"mean over {len(seeds)} initialisations",
        figure="2",
        section="3.3",
        variables={
            "importance_by_class": ("parameter^2", "importance of all samples of a class"),
            "importance_by_layer": ("parameter^2", "importance of all samples"),
            "class_size": ("1", "samples of the class"),
            "importance_by_fold": ("parameter^2", "importance of the samples of a fold"),
            "parameter_count": ("1", "parameters of the layer"),
        },
    )


def importance_groups(cube: xr.Dataset, overall: xr.DataArray | None = None) -> xr.Dataset:
    """Return how much of the importance the most important samples hold.

    The groups are known only after a pass over the whole run, and a second pass sums them. Without
    `overall`, dask keeps the run's chunks (40 MB for the paper's network) between the two passes;
    `analyse` passes `overall`, and reads the run twice. (`dask.graph_manipulation.clone`, made for
    this purpose, does not survive the fusing of tasks in dask 2026.8.)

    Parameters
    ----------
    cube
        One node of the cube.
    overall
        tau(sample) if it is already known, which saves the first pass.

    Returns
    -------
    Dataset, lazy
        importance_by_group(group, epoch, layer), share(group), share_by_layer(group, layer), and
        group_size(group).

    Raises
    ------
    MissingDataError
        The reference run is not complete.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> importance_groups(example_cube())["share"].round(2).values
    array([0.4 , 0.28, 0.32])

    References
    ----------
    Gao & Jojic (2017), section 3.3 and Fig. 3.
    """
    beta = lazy(reference_run(cube, "importance")["importance"])
    tau = overall_importance(beta) if overall is None else overall
    names = list(GROUPS)
    ends = np.rint(np.cumsum(list(GROUPS.values())) * cube.sizes["sample"]).astype(int)
    codes = da.asarray(lazy(tau).data).rechunk(-1).map_blocks(_groups_of, ends, dtype=np.int64)
    by_group = sum_samples(beta, codes, "group", names).transpose("group", "epoch", "layer")
    by_layer = by_group.sum("epoch")
    result = xr.Dataset(
        {
            "importance_by_group": by_group,
            "share": by_layer.sum("layer") / by_layer.sum(),
            "share_by_layer": by_layer / by_layer.sum("group"),
            "group_size": ("group", np.diff(ends, prepend=0)),
        }
    )
    return label_result(
        result,
        cube,
        method="samples ranked by overall importance tau of the reference run (shuffle, seed 1), "
        "in-step importance beta summed over each group",
        figure="3",
        section="3.3",
        variables={
            "importance_by_group": ("parameter^2", "importance of the samples of a group"),
            "share": ("1", "share of all importance"),
            "share_by_layer": ("1", "share of the layer's importance"),
            "group_size": ("1", "samples of the group"),
        },
    )


def _groups_of(overall: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return each sample's group by its rank from the top; ties in the order of the samples."""
    place = np.empty(len(overall), np.int64)
    place[np.argsort(-overall, kind="stable")] = np.arange(len(overall))
    return np.searchsorted(ends, place, side="right")


def importance_histogram(cube: xr.Dataset, bins: int = BINS) -> xr.Dataset:
    """Return the distribution of overall importance tau over the samples.

    Parameters
    ----------
    cube
        One node of the cube.
    bins
        Number of bins of equal width in log10 tau, from the smallest to the largest positive tau.

    Returns
    -------
    Dataset, lazy
        count(bin), bin_edge(edge) in log10 of tau, zeros(): the samples with tau = 0, which are in
        no bin, quantile(q) of tau, gini(), mean().

    Raises
    ------
    MissingDataError
        The reference run is not complete.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> result = importance_histogram(example_cube())
    >>> int(result["count"].sum()), round(float(result["gini"]), 2)
    (120, 0.65)

    References
    ----------
    Gao & Jojic (2017), appendix, Fig. 10.
    """
    tau = whole_samples(overall_importance(reference_run(cube, "importance")["importance"]))
    count, edges, zeros = xr.apply_ufunc(
        kernels.histogram,
        tau,
        input_core_dims=[["sample"]],
        output_core_dims=[["bin"], ["edge"], []],
        kwargs={"bins": bins},
        output_dtypes=[np.int64, np.float64, np.int64],
        dask_gufunc_kwargs={"output_sizes": {"bin": bins, "edge": bins + 1}},
        dask="parallelized",
        keep_attrs=False,
    )
    gini = xr.apply_ufunc(
        kernels.gini,
        tau,
        input_core_dims=[["sample"]],
        output_dtypes=[np.float64],
        dask="parallelized",
        keep_attrs=False,
    )
    result = xr.Dataset(
        {
            "count": count,
            "bin_edge": edges,
            "zeros": zeros,
            "quantile": tau.quantile(list(HISTOGRAM_QUANTILES), dim="sample").rename(quantile="q"),
            "gini": gini,
            "mean": tau.mean("sample"),
        }
    )
    return label_result(
        result,
        cube,
        method=f"{bins} bins of equal width over log10 of overall importance tau "
        "of the reference run (shuffle, seed 1)",
        figure="10",
        section="3.3 and appendix",
        variables={
            "count": ("1", "samples"),
            "bin_edge": ("log10(parameter^2)", "log10 of overall importance"),
            "zeros": ("1", "samples without any importance"),
            "quantile": ("parameter^2", "quantile of overall importance"),
            "gini": ("1", "Gini coefficient of overall importance"),
            "mean": ("parameter^2", "mean overall importance"),
        },
    )
