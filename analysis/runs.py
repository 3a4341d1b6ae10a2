"""Trials and sums of a cube: which trials exist, and sums over samples chunk by chunk.

Whether a trial exists is read from the curve `train_nll`, a few kilobytes; an analysis computes
nothing else when it is called. A trial is *complete* if its curve is finite in every epoch, and has
*started* if it is finite in any. A diverged run has started, and its epochs before the divergence
count wherever epochs are analysed one by one.

Map: `started`, `complete`, `seeds_of`, `reference_run` (trials); `codes_of_labels`, `class_name`,
`short_name` (labels and names); `sum_samples`, `model_importance`, `overall_importance`,
`whole_samples`, `lazy` (sums and chunks); `require` and `place_of` (errors); `label_result`
(attributes of a result).
"""

from collections.abc import Sequence

import dask.array as da
import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.errors import MissingDataError
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY

PAPER = 'Gao & Jojic, "Sample Importance in Training Deep Neural Networks" (2017)'

BLOCK_VALUES = 2**23
"""Largest number of values in a block with all samples (32 MiB of float32), if the block has more
than one layer."""


def started(cube: xr.Dataset) -> xr.DataArray:
    """Return whether each trial has at least one epoch.

    Returns
    -------
    DataArray of bool (strategy, seed)

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> bool(started(example_cube()).sel(strategy="shuffle", seed=1))
    True
    """
    return finite_epochs(cube).any("epoch")


def complete(cube: xr.Dataset) -> xr.DataArray:
    """Return whether each trial has every epoch.

    A missing, unfinished or diverged trial lacks at least one epoch.

    Returns
    -------
    DataArray of bool (strategy, seed)
    """
    return finite_epochs(cube).all("epoch")


def finite_epochs(cube: xr.Dataset) -> xr.DataArray:
    """Return whether each trial has an epoch, with a finite training NLL.

    The errors are finite in the epoch in which a run diverges as well: its outputs are NaN, and
    all but one class are wrong.

    Returns
    -------
    DataArray of bool (strategy, seed, epoch)
    """
    curve = require(cube, "train_nll")["train_nll"].compute()
    return curve.copy(data=np.isfinite(curve.values))


def require(cube: xr.Dataset, *names: str) -> xr.Dataset:
    """Return the cube, after checking that it has these variables.

    Raises
    ------
    MissingDataError
        A variable is missing.
    """
    missing = [name for name in names if name not in cube]
    if missing:
        raise MissingDataError(
            f"a cube with the variables {', '.join(names)}",
            f"none named {', '.join(missing)}; it has {', '.join(map(str, cube.data_vars))}",
            place_of(cube),
            "run the study with these variables switched on, or leave this analysis out",
        )
    return cube


def place_of(cube: xr.Dataset) -> str:
    """Return the name of a cube for an error message."""
    return f"the cube of data set {cube.attrs.get('dataset', '(unnamed)')}"


def seeds_of(cube: xr.Dataset, strategy: str, *, whole: bool = True) -> list[int]:
    """Return the seeds whose trial of a strategy is complete, or (`whole=False`) has started.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> seeds_of(example_cube(), "shuffle")
    [1, 2, 3]
    >>> seeds_of(example_cube(), "rsio"), seeds_of(example_cube(), "rsio", whole=False)
    ([1, 3], [1, 2, 3])
    """
    if strategy not in cube["strategy"].values:
        return []
    there = (complete if whole else started)(cube).sel(strategy=strategy)
    return [int(seed) for seed in there["seed"].values[there.values]]


def reference_run(cube: xr.Dataset, *names: str) -> xr.Dataset:
    """Return the run that sections 3.3 to 3.5 are about: `shuffle`, initialisation 1.

    Parameters
    ----------
    cube
        One node of the cube.
    names
        The variables to return.

    Raises
    ------
    MissingDataError
        The run is not complete, or a variable is missing.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> dict(reference_run(example_cube(), "nll").sizes)
    {'epoch': 6, 'sample': 120}
    """
    require(cube, *names)
    if REFERENCE_SEED not in seeds_of(cube, REFERENCE_STRATEGY):
        partly = REFERENCE_SEED in seeds_of(cube, REFERENCE_STRATEGY, whole=False)
        raise MissingDataError(
            f"a complete run of {REFERENCE_STRATEGY}, seed {REFERENCE_SEED}",
            "one that diverged before its last epoch" if partly else "none",
            place_of(cube),
            "choose a learning rate at which it converges" if partly else "run the study further",
        )
    return cube[list(names)].sel(strategy=REFERENCE_STRATEGY, seed=REFERENCE_SEED, drop=True)


def codes_of_labels(cube: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct labels [C], sorted, and each sample's position among them [N].

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> labels, codes = codes_of_labels(example_cube())
    >>> labels.tolist(), codes[:4].tolist()
    ([0, 1, 2], [0, 1, 2, 0])
    """
    labels, codes = np.unique(cube["label"].values, return_inverse=True)
    return labels, codes


def class_name(cube: xr.Dataset, label: int) -> str:
    """Return the name of a label, or its number if the cube has no class names.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> class_name(example_cube(), 1)
    'horse'
    """
    names = list(cube.attrs.get("class_names", ()))
    return str(names[label]) if 0 <= label < len(names) else str(label)


def lazy(array: xr.DataArray) -> xr.DataArray:
    """Return the array backed by dask."""
    return array if isinstance(array.data, da.Array) else array.chunk()


def sum_samples(
    array: xr.DataArray,
    codes: np.ndarray | da.Array,
    dim: str,
    names: Sequence | np.ndarray,
) -> xr.DataArray:
    """Return the sums over groups of samples, in float64, one chunk at a time.

    Parameters
    ----------
    array
        (..., sample)
    codes : array [N] of int
        Group of each sample, 0 to len(names) - 1; NumPy or dask.
    dim, names
        The new dimension and its coordinate.

    Returns
    -------
    DataArray (..., dim), lazy

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> ones = xr.ones_like(example_cube()["nll"].isel(strategy=0, seed=0, drop=True))
    >>> sum_samples(ones, np.arange(120) % 2, "half", ["even", "odd"]).isel(epoch=0).values
    array([60., 60.])
    """
    array = lazy(array.transpose(..., "sample"))
    count = len(names)
    data = array.data
    groups = da.asarray(codes).rechunk((data.chunks[-1],))
    axes = tuple(range(data.ndim))
    blocks = da.blockwise(
        _sum_block,
        (*axes[:-1], data.ndim, axes[-1]),
        data,
        axes,
        groups,
        axes[-1:],
        count=count,
        new_axes={data.ndim: count},
        adjust_chunks={axes[-1]: 1},
        concatenate=True,
        dtype=np.float64,
        meta=np.empty((0,) * (data.ndim + 1)),
    )
    kept = {k: v for k, v in array.coords.items() if "sample" not in v.dims}
    return xr.DataArray(
        blocks.sum(-1), dims=(*array.dims[:-1], dim), coords={**kept, dim: np.asarray(names)}
    )


def _sum_block(values: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Return one chunk's sums by group, with an axis of length 1 for the chunk."""
    return kernels.sum_by_group(values, codes, count)[..., np.newaxis]


def model_importance(importance: xr.DataArray) -> xr.DataArray:
    """Return alpha, the sum over the layers, in float64 (section 2.2)."""
    return importance.sum("layer", skipna=False, dtype=np.float64)


def overall_importance(importance: xr.DataArray) -> xr.DataArray:
    """Return tau, the sum over layers and epochs, in float64 (section 2.2)."""
    return model_importance(importance).sum("epoch", skipna=False)


def whole_samples(array: xr.DataArray, *dims: str) -> xr.DataArray:
    """Return the array in blocks that hold all samples (and all of `dims`), for ranking.

    A block with more than `BLOCK_VALUES` values is split along `layer`, if it has that dimension.
    """
    array = lazy(array)
    chunks: dict[str, int] = dict.fromkeys(("sample", *dims), -1)
    if "layer" in array.dims and "layer" not in dims:
        row = int(np.prod([array.sizes[dim] for dim in chunks]))
        chunks["layer"] = max(1, min(array.sizes["layer"], BLOCK_VALUES // max(1, row)))
    return array.chunk(chunks)


def label_result(
    result: xr.Dataset,
    cube: xr.Dataset,
    *,
    method: str,
    figure: str,
    section: str,
    variables: dict[str, tuple[str, str]],
    importance: str | None = "importance",
) -> xr.Dataset:
    """Write a result's attributes: method and source, and the units and names of its variables.

    Parameters
    ----------
    result
        Changed in place and returned.
    cube
        Source of the data set's name and of the scale of `importance`.
    method, figure, section
        How the result was computed, the paper's figures, and the paper's section.
    variables
        Units and long name of every variable, by its name.
    importance
        The variable whose attributes (learning rate, loss reduction, ...) set the scale of the
        numbers; None if they are not importance.
    """
    scale = cube[importance].attrs if importance and importance in cube else {}
    result.attrs = {
        "method": method,
        "figure": figure,
        "source": f"{PAPER}, section {section}",
        "dataset": str(cube.attrs.get("dataset", "")),
        **{key: value for key, value in scale.items() if key not in ("units", "long_name")},
    }
    for name, variable in result.data_vars.items():
        units, long_name = variables[str(name)]
        variable.attrs = {"units": units, "long_name": long_name}
    return result


def short_name(cube: xr.Dataset) -> str:
    """Return the data set's name in lower case, without its path and punctuation.

    Examples
    --------
    >>> short_name(xr.Dataset(attrs={"dataset": "folder:/data/cifar-10"}))
    'cifar10'
    """
    name = str(cube.attrs.get("dataset", "")).rstrip("/").rpartition("/")[2]
    return name.lower().replace("-", "").replace("_", "")
