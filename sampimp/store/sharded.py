"""Write a finished study as one sharded Zarr store per data set, to publish and to read by sample.

    DEST/mnist.zarr    the content of `open_cube(OUT)["mnist"]`, for `xarray.open_zarr`

Influence and retrainings, which are added to a finished study, are left out.

A trial writes one epoch at a time, so the epochs of one sample are spread over as many objects as
there are epochs. Here a chunk holds all epochs of a few samples, and a shard (one object) holds
many chunks.

The store's zarr.json is written after every value was read back and compared, and last the list of
its files: an incomplete store cannot be opened, and the same call begins it again.

Map: `consolidate`; `chunk_and_shard` (the layout).
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from sampimp.errors import RecordError, StoreError
from sampimp.schema import INFLUENCE_VARIABLES, VARIABLES, digest_json
from sampimp.store.cube import configuration_attrs, open_cube
from sampimp.store.location import Folder
from sampimp.store.manifests import has_manifest, remove_manifest, write_manifest
from sampimp.store.plan import PlannedTrial, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.snapshots import SNAPSHOTS
from sampimp.store.zarr_arrays import open_for_writing, zarr_store

CHUNK_BYTES = 2**20
"""Size of one chunk, the smallest unit that is read. On 8 trials of 20,000 samples, with 64 KiB,
256 KiB and 1 MiB: one sample of all trials 0.04, 0.02, 0.04 s; one epoch of one trial 1.5, 0.3,
0.1 s; all 11, 3.5, 1.0 s (from the records 2.9 s)."""
SHARD_BYTES = 2**25
"""Largest shard: an object that a link of 0.6 MB/s uploads within
`sampimp.store.buckets.REQUEST_TIMEOUT`."""
WRITE_BLOCK_BYTES = 2**27
"""Bytes of values in memory at a time; encoding takes three times as much (arbitrary)."""

UNFINISHED = "sampimp_unfinished"
"""Attribute of a store whose arrays are being made; only this module opens such a store."""


@dataclass(frozen=True)
class Consolidated:
    """One data set's store."""

    path: str
    bytes: int
    """Size of its values, uncompressed."""
    written: bool
    """False if the store already existed, made of the same records."""
    left_out: tuple[str, ...] = ()
    """Variables of the cube that it does not have: those of influence, retraining and subsets."""


def consolidate(
    out: str | os.PathLike[str] | Folder,
    to: str | os.PathLike[str] | Folder | None = None,
    progress: Callable[[str], None] = lambda words: None,
) -> list[Consolidated]:
    """Write each data set of a finished study as one store, and compare it with the trials.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    to
        Folder or s3:// URL to write the stores to; default OUT/consolidated.
    progress
        Called with a short message before each variable.

    Returns
    -------
    list of Consolidated
        One for each data set. An existing store of the same records is left as it is.

    Raises
    ------
    StoreError
        There is no study, or something else is in the place of a store.
    RecordError
        Trials are missing, a chunk is damaged, or values read back differ from those written.
    """
    folder = Folder.of(out)
    target = folder / "consolidated" if to is None else Folder.of(to)
    plan, commits = require_plan(folder), read_commits(folder)
    trials = plan.resolve(commits)
    _require_finished(trials, folder)
    snapshots = folder.read_json(SNAPSHOTS) or {}
    tree = open_cube(folder)
    configuration = configuration_attrs(plan)
    done = []
    for key in plan.datasets:
        committed = {t.trial_id: t.commit for t in trials if t.config.dataset == key and t.commit}
        records = digest_json(
            [[n, c["digests"], c["curves"], snapshots.get(n)] for n, c in committed.items()]
        )
        node = tree[plan.node(key)]
        cube = node.to_dataset().assign_attrs({**configuration, **node.attrs, "records": records})
        for coordinate in cube.coords.values():
            coordinate.load()
        whole = cube.data_vars
        cube = cube.drop_vars(INFLUENCE_VARIABLES, errors="ignore")
        cube = cube.drop_dims(_DERIVED_DIMS, errors="ignore")
        left_out = tuple(str(name) for name in whole if name not in cube)
        store = target / f"{key}.zarr"
        written = _begin(store, cube, has_manifest(target, f"{key}.zarr"))
        if written:
            remove_manifest(target, f"{key}.zarr")
            _write(store, cube, lambda words, key=key: progress(f"{key}: {words}"))  # type: ignore[misc]
            write_manifest(target, f"{key}.zarr")
        done.append(Consolidated(str(store), cube.nbytes, written, left_out))
    return done


_DERIVED_DIMS = (
    *("target", "removal", "repeat", "curvature", "damping", "test_sample"),
    *("rule", "size", "budget", "training_seed", "variant"),
)


def _require_finished(trials: list[PlannedTrial], folder: Folder) -> None:
    missing = [trial.label for trial in trials if trial.commit is None]
    if missing:
        labels = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise RecordError(
            expected="a finished study, with every planned trial committed",
            got=f"{len(missing)} of {len(trials)} trials missing: {labels}",
            where=str(folder),
            todo="run the study's command again to train the missing trials, then this command",
        )


def _begin(store: Folder, cube: xr.Dataset, is_listed: bool) -> bool:
    """Clear the folder of a store; return False if a store of the same records exists.

    One without the list of its files, which is written last, is not finished.
    """
    root = store.read_json("zarr.json")
    if root is not None:
        attrs = root.get("attributes", {})
        if is_listed and attrs.get("records") == cube.attrs["records"]:
            return False
        replaceable = "records" in attrs or UNFINISHED in attrs
    else:  # an interrupted store has arrays only
        replaceable = not store.files() and set(store.folders()) <= set(map(str, cube.variables))
    if not replaceable:
        raise StoreError(
            expected="an empty folder, or a store that this command wrote",
            got=", ".join((store.folders() + store.files())[:8]),
            where=str(store),
            todo="choose another --to, or remove it; nothing there was touched",
        )
    store.remove()
    return True


def _write(store: Folder, cube: xr.Dataset, progress: Callable[[str], None]) -> None:
    """Write the arrays, compare them, and write zarr.json last."""
    texts = {n: v.astype(object) for n, v in cube.variables.items() if v.dtype.kind == "U"}
    template = cube.assign({n: v for n, v in texts.items() if n not in cube.dims})
    template = template.assign_coords(
        {n: (n, v.values, v.attrs) for n, v in texts.items() if n in cube.dims}
    )
    template.attrs = {UNFINISHED: True}  # zarr.json exists while the arrays are made
    # Not left to xarray, which makes a group first and gives it attributes then: interrupted in
    # between, it could be anybody's.
    store.write_json(
        "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": template.attrs}
    )
    lazy = [str(name) for name in cube.data_vars if cube[name].chunks is not None]
    with warnings.catch_warnings():
        # Zarr 3.1 warns that text and consolidated metadata are not in the specification of
        # version 3 yet.
        warnings.filterwarnings("ignore", ".*specification.*")
        template.to_zarr(
            zarr_store(store),
            mode="a",
            zarr_format=3,
            consolidated=True,
            compute=False,  # writes all but the lazy variables
            safe_chunks=False,
            encoding={name: _encoding(name, cube[name]) for name in lazy},
        )
    root = store.read_json("zarr.json")
    root["attributes"] = cube.attrs
    store.delete("zarr.json")
    for name in lazy:
        progress(f"writing {name}")
        array = open_for_writing(store, name)
        for region in blocks(cube, name):
            array[region] = cube[name][region].values
    for name in map(str, cube.variables):
        progress(f"comparing {name}")
        array = open_for_writing(store, name)
        for region in blocks(cube, name):
            _compare(
                np.asarray(array[region]), cube[name][region].values, f"{store}/{name}", region
            )
    store.write_json("zarr.json", root)


def _compare(stored: np.ndarray, expected: np.ndarray, where: str, region: Any) -> None:
    floats = expected.dtype.kind == "f"
    if stored.shape == expected.shape and np.array_equal(stored, expected, equal_nan=floats):
        return
    raise RecordError(
        expected="the values of the trials' records",
        got="other values",
        where=f"{where}, {region}",
        todo="run the same command again, which rewrites this store",
    )


def _encoding(name: str, array: xr.DataArray) -> dict[str, Any]:
    chunk, shard = chunk_and_shard(array.dims, array.shape, array.dtype.itemsize)
    encoding: dict[str, Any] = {"chunks": chunk}
    if shard != chunk:
        encoding["shards"] = shard
    if array.dtype.kind == "f":
        encoding["fill_value"] = np.nan  # trials outside the grid are not written
    if name == "parameters":
        encoding["compressors"] = None  # as in the records
    return encoding


def chunk_and_shard(
    dims: tuple[Any, ...], shape: tuple[int, ...], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the chunk and the shard of a variable.

    Both hold one trial. A chunk holds all epochs of a few samples; of parameters, which are read
    by state, it holds many parameters of one state. Images are chunked by sample; a curve is one
    chunk.

    Examples
    --------
    >>> dims = ("strategy", "seed", "epoch", "layer", "sample")
    >>> chunk_and_shard(dims, (9, 5, 50, 4, 50_000), 4)
    ((1, 1, 50, 4, 1310), (1, 1, 50, 4, 41920))
    >>> chunk_and_shard(("strategy", "seed", "epoch"), (9, 5, 50), 8)
    ((9, 5, 50), (9, 5, 50))
    """
    along = _long_dim(dims)
    if along is None:
        return shape, shape
    axis = dims.index(along)
    shard = [
        1 if dim in ("strategy", "seed") else size for dim, size in zip(dims, shape, strict=True)
    ]
    chunk = [1 if dim == "state" else size for dim, size in zip(dims, shard, strict=True)]
    row = itemsize * int(np.prod(chunk)) // max(1, shape[axis])  # bytes of one sample
    chunk[axis] = max(1, min(shape[axis], CHUNK_BYTES // max(1, row)))
    row = itemsize * int(np.prod(shard)) // max(1, shape[axis])
    count = max(1, min(-(-shape[axis] // chunk[axis]), SHARD_BYTES // max(1, row * chunk[axis])))
    shard[axis] = count * chunk[axis]
    return tuple(chunk), tuple(shard)


def _long_dim(dims: tuple[Any, ...]) -> str | None:
    """Return the dimension that is split into chunks, if there is one."""
    return next((dim for dim in ("sample", "parameter") if dim in dims), None)


def blocks(cube: xr.Dataset, name: str) -> Iterator[tuple[slice, ...]]:
    """Yield regions of whole shards of the committed trials, each to be written at a time."""
    array = cube[name]
    along = _long_dim(array.dims)
    if along is None:
        yield tuple(map(slice, array.shape))
        return
    axis = array.dims.index(along)
    _, shard = chunk_and_shard(array.dims, array.shape, array.dtype.itemsize)
    width = shard[axis] * max(1, WRITE_BLOCK_BYTES // (int(np.prod(shard)) * array.dtype.itemsize))
    is_record = name in VARIABLES  # with dimensions strategy and seed in front
    sizes = array.shape[2:] if is_record else array.shape
    cells = np.argwhere(cube["trial"].values != "") if is_record else np.empty((1, 0), int)
    for cell in cells.tolist():
        for start in range(0, array.shape[axis], width):
            region = [slice(i, i + 1) for i in cell] + [slice(0, size) for size in sizes]
            region[axis] = slice(start, min(start + width, array.shape[axis]))
            yield tuple(region)
