"""Paths of the parameters under the batch strategies (section 3.6, Fig. 8).

All stored states of all strategies, from one initialisation, on their first principal components:
that of the first seed with which the most strategies were trained.
There are a few hundred states of a million parameters, so that the exact computation is also the
cheap one: the S x S Gram matrix, summed in float64 over blocks of parameters, and its eigenvectors.
(A randomised SVD was 3 % off.) Distances between the last states come from the same matrix.

Map: `parameter_paths`.
"""

from collections.abc import Iterator

import dask.array as da
import numpy as np
import xarray as xr

from sampimp.analysis.pca import gram_matrix, principal_components
from sampimp.analysis.runs import label_result, lazy, place_of, require, started
from sampimp.errors import ConfigError, MissingDataError

STATE_BLOCK_BYTES = 2**28
"""Largest number of bytes of states in memory (256 MiB). A stored chunk is one whole state, so that
with smaller blocks each chunk is read more often: 5 times for the 459 states of 670,000 parameters
of the MNIST study."""


def parameter_paths(
    cube: xr.Dataset, components: int = 3, *, block_bytes: int = STATE_BLOCK_BYTES
) -> xr.Dataset:
    """Return the paths of the parameters on the principal components of all their states.

    `parameters` is read when this function is called, block by block. The components are computed
    without the runs that diverged, whose last states can be larger than all others; these runs are
    projected onto the components.

    Parameters
    ----------
    cube
        One node of the cube. The states that are stored are used.
    components
        Number of principal components.
    block_bytes
        Largest number of bytes of states in memory.

    Returns
    -------
    Dataset, in memory
        path(strategy, state, component), explained_variance_ratio(component),
        distance(strategy, other_strategy) between the last stored states, travelled(strategy) from
        the first to the last stored state, fitted(strategy): whether the components are computed
        from the run.

    Raises
    ------
    MissingDataError
        Parameters were not stored, or at fewer than two states.
    ConfigError
        `components` or `block_bytes` is not positive.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> result = parameter_paths(example_cube())
    >>> dict(result["path"].sizes)
    {'strategy': 9, 'state': 7, 'component': 3}

    References
    ----------
    Gao & Jojic (2017), section 3.6 and Fig. 8.
    """
    require(cube, "parameters")
    if components < 1 or block_bytes < 1:
        raise ConfigError(
            "a positive number of components and of bytes",
            f"components={components}, block_bytes={block_bytes}",
            "parameter_paths",
            "choose larger ones",
        )
    has_started = started(cube).transpose("seed", "strategy")
    most = int(has_started.sum("strategy").argmax("seed"))  # the first of several
    seed = int(has_started["seed"][most])
    names = has_started["strategy"].values[has_started.values[most]].tolist()
    states = cube["state"].values
    if not names or len(names) * len(states) < 2:
        raise MissingDataError(
            "the parameters of a run at two states or more",
            f"runs {names or 'none'}, states {states.tolist()}",
            place_of(cube),
            "let the study run on, or store parameters at more epochs",
        )
    run = cube[["parameters"]].sel(strategy=names, seed=seed, drop=True)
    values = lazy(run["parameters"].transpose("strategy", "state", "parameter")).data
    rows = values.reshape(-1, values.shape[-1])
    products = gram_matrix(_blocks(rows, block_bytes))
    shape = (len(names), len(states))
    finite = np.asarray(np.isfinite(np.diag(products))).reshape(shape)
    if not finite[0, 0]:
        raise MissingDataError(
            f"finite parameters at state {states[0]} of {names[0]}, seed {seed}",
            "NaN or infinity",
            place_of(cube),
            "delete this trial and run the study again",
        )
    whole = np.asarray(finite.all(1))
    fit: np.ndarray = whole if whole.any() else np.ones(len(names), bool)
    scores, ratio = principal_components(products, components, (finite & fit[:, None]).ravel())
    distance, travelled = _distances(products, shape)
    result = xr.Dataset(
        {
            "path": (("strategy", "state", "component"), scores.reshape(*shape, components)),
            "explained_variance_ratio": ("component", ratio),
            "distance": (("strategy", "other_strategy"), distance),
            "travelled": ("strategy", travelled),
            "fitted": ("strategy", fit),
        },
        coords={
            "strategy": names,
            "other_strategy": names,
            "state": states,
            "component": np.arange(1, components + 1),
        },
    )
    return label_result(
        result,
        cube,
        method=(
            f"exact principal components of {int((finite & fit[:, None]).sum())} states of seed "
            f"{seed} (Gram matrix in float64); diverged runs projected only"
        ),
        figure="8",
        section="3.6",
        variables={
            "path": ("parameter", "score on the principal component"),
            "explained_variance_ratio": ("1", "share of the variance"),
            "distance": ("parameter", "distance between the last states"),
            "travelled": ("parameter", "distance from the first to the last state"),
            "fitted": ("1", "whether the run shaped the components"),
        },
        importance=None,
    )


def _distances(products: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of the strategies' last states, and of each last from its first state.

    Parameters
    ----------
    products : array [S, S]
        Gram matrix of the states, strategy by strategy.
    shape
        Numbers of strategies and of states of each.
    """
    square = np.diag(products).reshape(shape)
    position = np.arange(len(products)).reshape(shape)
    last, first = position[:, -1], position[:, 0]
    with np.errstate(invalid="ignore"):
        between = square[:, -1, None] + square[None, :, -1] - 2 * products[np.ix_(last, last)]
        along = square[:, -1] + square[:, 0] - 2 * products[last, first]
        return np.sqrt(np.maximum(between, 0)), np.sqrt(np.maximum(along, 0))


def _blocks(rows: da.Array, block_bytes: int) -> Iterator[np.ndarray]:
    """Yield the columns of the matrix in blocks, each copied out of its chunks."""
    width = max(1, block_bytes // (rows.shape[0] * rows.dtype.itemsize))
    for start in range(0, rows.shape[1], width):
        # Copied: a slice of a chunk is a view, which would keep the whole chunk in memory.
        part = rows[:, start : start + width].map_blocks(np.array, copy=True, dtype=rows.dtype)
        yield part.compute()
