"""What a cube has to offer: which trials are there, and how its samples are summed chunk by chunk.

Whether a trial is there is read from the curve `train_nll`, a few kilobytes; nothing else is
computed when an analysis is called. A trial is *complete* if its curve is finite in every epoch,
and has *started* if it is in any: a diverged run is started, and its epochs before the divergence
count where an epoch stands for itself.

Map: `started`, `complete`, `seeds_of`, `reference_run` (which trials); `codes_of_labels`,
`sum_samples`, `overall_importance`, `whole_samples` (sums and chunks); `label_result` (attributes);
`small_cube` (one to try things on).
"""

from collections.abc import Sequence

import dask.array as da
import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.errors import RecordError
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY

PAPER = 'Gao & Jojic, "Sample Importance in Training Deep Neural Networks" (2017)'

BLOCK_VALUES = 2**23
"""Most values in a block that holds all samples (32 MiB of float32), if layers can be split."""


def started(cube: xr.Dataset) -> xr.DataArray:
    """Return which trials have at least one epoch.

    Returns
    -------
    DataArray of bool (strategy, seed)

    Examples
    --------
    >>> bool(started(small_cube()).sel(strategy="shuffle", seed=1))
    True
    """
    return _finite(cube).any("epoch")


def complete(cube: xr.Dataset) -> xr.DataArray:
    """Return which trials have every epoch: a diverged, a missing and an unfinished one have not.

    Returns
    -------
    DataArray of bool (strategy, seed)
    """
    return _finite(cube).all("epoch")


def _finite(cube: xr.Dataset) -> xr.DataArray:
    curve = require(cube, "train_nll")["train_nll"].compute()
    return curve.copy(data=np.isfinite(curve.values))


def require(cube: xr.Dataset, *names: str) -> xr.Dataset:
    """Return the cube if it has these variables.

    Raises
    ------
    RecordError
        If one is missing.
    """
    missing = [name for name in names if name not in cube]
    if missing:
        raise RecordError(
            f"a cube with the variables {', '.join(names)}",
            f"none named {', '.join(missing)}; it has {', '.join(map(str, cube.data_vars))}",
            place_of(cube),
            "run the study with what is missing switched on, or leave this analysis out",
        )
    return cube


def place_of(cube: xr.Dataset) -> str:
    """Return the words that name a cube in an error."""
    return f"the cube of data set {cube.attrs.get('dataset', '(unnamed)')}"


def seeds_of(cube: xr.Dataset, strategy: str, *, whole: bool = True) -> list[int]:
    """Return the seeds whose trial of a strategy is complete, or has started.

    Examples
    --------
    >>> seeds_of(small_cube(), "shuffle")
    [1, 2, 3]
    >>> seeds_of(small_cube(), "rsio"), seeds_of(small_cube(), "rsio", whole=False)
    ([1, 3], [1, 2, 3])
    """
    if strategy not in cube["strategy"].values:
        return []
    there = (complete if whole else started)(cube).sel(strategy=strategy)
    return [int(seed) for seed in there["seed"].values[there.values]]


def reference_run(cube: xr.Dataset, *names: str) -> xr.Dataset:
    """Return the run from which sections 3.3 to 3.5 are made: `shuffle`, initialisation 1.

    Parameters
    ----------
    cube
        One node of the cube.
    names
        The variables to take.

    Raises
    ------
    RecordError
        If the run, or one of the variables, is not there in full.

    Examples
    --------
    >>> dict(reference_run(small_cube(), "nll").sizes)
    {'epoch': 6, 'sample': 120}
    """
    require(cube, *names)
    if REFERENCE_SEED not in seeds_of(cube, REFERENCE_STRATEGY):
        partly = REFERENCE_SEED in seeds_of(cube, REFERENCE_STRATEGY, whole=False)
        raise RecordError(
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
    >>> labels, codes = codes_of_labels(small_cube())
    >>> labels.tolist(), codes[:4].tolist()
    ([0, 1, 2], [0, 1, 2, 0])
    """
    labels, codes = np.unique(cube["label"].values, return_inverse=True)
    return labels, codes


def class_name(cube: xr.Dataset, label: int) -> str:
    """Return a label's name, or its number where the cube has no names.

    Examples
    --------
    >>> class_name(small_cube(), 1)
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
        Each sample's group, 0 to len(names) - 1. May be lazy.
    dim, names
        The new dimension and its coordinate.

    Returns
    -------
    DataArray (..., dim), lazy

    Examples
    --------
    >>> ones = xr.ones_like(small_cube()["nll"].isel(strategy=0, seed=0, drop=True))
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
    return kernels.sum_by_group(values, codes, count)[..., np.newaxis]


def model_importance(importance: xr.DataArray) -> xr.DataArray:
    """Return alpha, the sum over the layers, in float64 (section 2.2)."""
    return importance.sum("layer", skipna=False, dtype=np.float64)


def overall_importance(importance: xr.DataArray) -> xr.DataArray:
    """Return tau, the sum over layers and epochs, in float64 (section 2.2)."""
    return model_importance(importance).sum("epoch", skipna=False)


def whole_samples(array: xr.DataArray, *dims: str) -> xr.DataArray:
    """Return the array in blocks that hold all samples (and all of `dims`), for ranking.

    Layers are split instead, so that a block stays below `BLOCK_VALUES` where it can.
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
    """Write into a result how it was made, and its variables' units and names.

    Parameters
    ----------
    result
        Changed in place and returned.
    cube
        Where the data set's name, and the scale of `importance`, come from.
    method, figure, section
        How it was made; which figures of the paper it is; where the paper says so.
    variables
        Name to units and long name, of every variable.
    importance
        The variable whose learning rate and reduction fix the scale of the numbers, if any.
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


def small_cube() -> xr.Dataset:
    """Return a made-up cube, for examples: every strategy, 3 seeds, 6 epochs, 120 samples.

    The harder a sample, the higher its NLL and the later its importance. `rsio` seed 2 diverged in
    epoch 3, and `sim` seed 3 is missing.

    Examples
    --------
    >>> dict(small_cube()["importance"].sizes)
    {'strategy': 9, 'seed': 3, 'epoch': 6, 'layer': 4, 'sample': 120}
    """
    from sampimp.analysis._example import build

    return build()


def short_name(cube: xr.Dataset) -> str:
    """Return the data set's name without its path: a folder of CIFAR-10's images is CIFAR-10 too.

    Examples
    --------
    >>> short_name(xr.Dataset(attrs={"dataset": "folder:/data/cifar-10"}))
    'cifar10'
    """
    name = str(cube.attrs.get("dataset", "")).rstrip("/").rpartition("/")[2]
    return name.lower().replace("-", "").replace("_", "")
