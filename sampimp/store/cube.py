"""Read a whole study lazily as one labelled cube.

`open_cube` matches the plan with the commits and lays a dask array over the records, one block for
each chunk that a trial wrote. No array is opened before a block is computed: 300 trials open as
fast as their COMMIT.json files can be read. A chunk that is read is compared with its digest, so
that a damaged one is an error and never a number; of a data set, the labels when the cube is
opened, and images when they are read. A trial that is not committed is NaN and is not
looked at. What is open does not change: trials committed later are there when it is opened again.

Opened while the study grows, a trial is NaN or whole: it is there from its COMMIT.json on, which is
put whole and names the records that its epochs are in, and no other attempt writes into these. A
data set that is planned and not stored yet has its trials, all NaN, and no `label`.

Map: `open_cube`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from sampimp.config import OPTIMIZERS
from sampimp.errors import RecordError
from sampimp.schema import CURVES, REFERENCES, STRATEGIES, VARIABLES, Layout, digest_json
from sampimp.store.datasets import StoredSource, open_source
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits, require_plan
from sampimp.store.snapshots import SNAPSHOTS, stored_snapshots
from sampimp.store.variables import StoredVariable


def open_cube(out: str | os.PathLike[str] | Folder) -> xr.DataTree:
    """Open a study, finished or still running.

    Parameters
    ----------
    out
        The study's folder, or its s3:// URL.

    Returns
    -------
    xarray.DataTree
        A node for each data set (`mnist`; `mnist/cnn` for other networks than the paper's) with
        the variables of `sampimp.schema.VARIABLES`, dims (strategy, seed, ...) before their own,
        nothing computed. Missing and unfinished trials are NaN.
        `diverged_epoch` (strategy, seed) is NaN where a run did not diverge; `trial` names the
        folder of each committed trial; `image` (sample, row, column, channel) shows the training
        samples where they are images. Its attrs hold the study's configuration.

    Raises
    ------
    StoreError
        There is no study.
    RecordError
        A data set is not the one that was stored.
    """
    folder = Folder.of(out)
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    snapshots = folder.read_json(SNAPSHOTS) or {}
    nodes = {
        plan.node(key): _open_node(
            folder, plan, key, [t for t in trials if t.config.dataset == key], snapshots
        )
        for key in plan.datasets
    }
    tree = xr.DataTree.from_dict(nodes)
    tree.attrs = {
        "study": str(folder),
        "sampimp_version": plan.code,
        "order_seed": plan.order_seed,
        "rand_batches": plan.rand_batches,
        **_training_attrs(plan),
    }
    return tree


def _open_node(
    folder: Folder,
    plan: Plan,
    key: str,
    trials: Sequence[PlannedTrial],
    snapshots: Mapping[str, Mapping[str, list[str]]],
) -> xr.Dataset:
    info = plan.datasets[key]
    strategies = [s for s in (*REFERENCES, *STRATEGIES) if s in plan.grid]
    seeds = sorted({seed for strategy in strategies for seed in plan.grid[strategy]})
    found = {(t.config.strategy, t.config.seed): t for t in trials}
    layout = plan.layout(key)
    rows = [[found.get((s, seed)) for seed in seeds] for s in strategies]
    scored = any(trial.commit and trial.trial_id in snapshots for trial in trials)
    variables: dict[str, Any] = {}
    for name in (*layout.variables, *(["snapshot_importance"] if scored else [])):
        variable = VARIABLES[name]
        variables[name] = (
            ("strategy", "seed", *variable.dims),
            _curves(rows, name, layout)
            if name in CURVES
            else _lazy(
                [[_stored(folder, name, layout, cell, snapshots) for cell in row] for row in rows],
                name,
                layout,
            ),
            {"units": variable.units, "long_name": variable.long_name},
        )
        if name.endswith("importance"):
            variables[name][2].update(_training_attrs(plan))
    variables["diverged_epoch"] = (
        ("strategy", "seed"),
        np.array([[_diverged(trial) for trial in row] for row in rows]),
        {"long_name": "epoch in which the run diverged; NaN if it did not"},
    )
    names = [[_committed(trial) for trial in row] for row in rows]
    variables["trial"] = (("strategy", "seed"), np.array(names, dtype=str))
    coords: dict[str, Any] = {
        "strategy": strategies,
        "seed": ("seed", seeds, {"long_name": "seed of the initialisation"}),
        "epoch": np.arange(1, layout.epoch + 1),
        "layer": list(info.layer_names),
        "sample": np.arange(info.sample_count),
        "order_seed": (
            ("strategy", "seed"),
            [[plan.order_seed_of(s, seed) for seed in seeds] for s in strategies],
            {"long_name": "seed of the order of the batches"},
        ),
    }
    stored = folder / "datasets" / f"{key}.zarr"
    source = open_source(stored, info.digest, info.chunks)
    if source is not None:
        labels = source.read("train_labels")
        coords["label"] = ("sample", labels, {"long_name": "class of the sample"})
        values = _StoredValues(source)
        if values.ndim == 4 and values.dtype == np.uint8:
            variables["image"] = (("sample", "row", "column", "channel"), _images(values))
    elif any(trial.commit for trial in trials):
        raise RecordError(
            expected="the data set that the committed trials were trained on",
            got="none, or one that is not complete",
            where=str(stored),
            todo="run the study's own command again: the data set is stored again",
        )
    if layout.states:
        coords["state"] = (
            "state",
            list(layout.states),
            {"long_name": "0: the start; t: after epoch t"},
        )
        layers, counts = zip(*info.layers, strict=True)
        coords["layer_of_parameter"] = ("parameter", np.repeat(layers, counts))
    attrs = {"dataset": info.name, "class_names": list(info.class_names), "digest": info.digest}
    return xr.Dataset(variables, coords, {**attrs, "test_samples": info.test_count})


def _training_attrs(plan: Plan) -> dict[str, Any]:
    """Return the configuration in types that every file format can hold."""
    training = plan.training
    return {
        "learning_rate": training.learning_rate,
        "batch_size": training.batch_size,
        "loss_reduction": "mean",
        "weight_decay": training.weight_decay,
        "schedule": training.schedule,
        "optimizer": OPTIMIZERS[training.optimizer],
        "model": training.model,
        "input_scaling": training.input_scaling,
        "hidden": list(training.hidden),
        "epochs": training.epochs,
        "threads": training.threads,
        "device": training.device,
    }


def _committed(trial: PlannedTrial | None) -> str:
    return (trial.trial_id or "") if trial is not None and trial.commit is not None else ""


def _diverged(trial: PlannedTrial | None) -> float:
    epoch = trial.commit["diverged_epoch"] if trial is not None and trial.commit else None
    return np.nan if epoch is None else float(epoch)


def _stored(
    folder: Folder,
    name: str,
    layout: Layout,
    trial: PlannedTrial | None,
    snapshots: Mapping[str, Mapping[str, list[str]]],
) -> StoredVariable | None:
    if trial is None or trial.commit is None or trial.trial_id is None:
        return None
    where = folder / "trials" / trial.trial_id
    if name != "snapshot_importance":
        return StoredVariable.of(where, name, layout, trial.commit)
    scored = snapshots.get(trial.trial_id)
    return stored_snapshots(where, layout, scored) if scored else None


def _curves(rows: Sequence[Sequence[PlannedTrial | None]], name: str, layout: Layout) -> da.Array:
    """Return a curve of all trials, which the commits have already."""
    values = np.full((len(rows), len(rows[0]), layout.epoch), np.nan)
    for cells, row in zip(values, rows, strict=True):
        for cell, trial in zip(cells, row, strict=True):
            if trial is not None and trial.commit is not None:
                curve = trial.commit["curves"].get(name, ())
                cell[: len(curve)] = curve
    return da.from_array(values, chunks=(1, 1, -1))


class _Records:
    """A variable of all trials as dask sees an array: read where it is sliced, and not before.

    Parameters
    ----------
    stored
        The variable of each trial, by strategy and seed; None where there is none.
    name
        The variable.
    layout
        The shape of a record.
    """

    def __init__(
        self, stored: Sequence[Sequence[StoredVariable | None]], name: str, layout: Layout
    ) -> None:
        self.stored, self.name, self.chunk = stored, name, layout.chunk(name)
        self.dtype = np.dtype(VARIABLES[name].dtype)
        self.shape = (len(stored), len(stored[0]), *layout.shape(name))
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Read a region; `index` has slices and integers, one for each dimension."""
        strategies, seeds, *region = (
            slice(i, i + 1) if isinstance(i, int | np.integer) else i for i in index
        )
        values = np.array(
            [
                [self._read(stored, region) for stored in row[seeds]]
                for row in self.stored[strategies]
            ]
        )
        return values[tuple(slice(None) if isinstance(i, slice) else 0 for i in index)]

    def _read(self, stored: StoredVariable | None, region: Sequence[slice]) -> np.ndarray:
        positions, *middle, columns = region
        chosen = [range(size)[part] for size, part in zip(self.shape[2:], region, strict=True)]
        if stored is None or not all(chosen):
            return np.full(tuple(map(len, chosen)), np.nan, self.dtype)
        low, high = min(chosen[-1]), max(chosen[-1]) + 1  # a slice may have a step
        steps = slice(None, None, columns.step)
        return np.stack(
            [
                stored.read(position, slice(low, high))[(*middle, steps)]
                for position in range(self.shape[2])[positions]
            ]
        )


def _lazy(stored: Sequence[Sequence[StoredVariable | None]], name: str, layout: Layout) -> da.Array:
    """Return a variable of all trials as a dask array, one block for each chunk that was written.

    Its name is made from the places and the digests alone: dask's own `tokenize` goes through every
    object and took half of the time of opening 300 trials.
    """
    records = _Records(stored, name, layout)
    what = [[one and [str(one.trial), one.parts, one.digests] for one in row] for row in stored]
    return da.from_array(
        records,
        chunks=(1, 1, *records.chunk),
        name=f"{name}-{digest_json(what)}",
        asarray=False,
        fancy=False,
        meta=np.empty((0,) * records.ndim, records.dtype),
    )


class _StoredValues:
    """A data set's training values as dask sees an array; workers open it by its place.

    A Zarr array would take its store along, and that the credentials of a bucket.
    """

    def __init__(self, source: StoredSource) -> None:
        stored = source.table["arrays"]["train_values"]
        self.source, self.rows = source, stored["rows"]
        self.shape, self.dtype = tuple(stored["shape"]), np.dtype(stored["dtype"])
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Read a region; `index` has slices and integers, one for each dimension."""
        rows, *others = index
        region = rows if isinstance(rows, slice) else slice(rows, rows + 1)
        chosen = range(self.shape[0])[region]
        if not chosen:
            return np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *others)]
        values = self.source.read("train_values", min(chosen), max(chosen) + 1)
        inner = slice(None, None, rows.step) if isinstance(rows, slice) else 0
        return values[(inner, *others)]


def _images(values: _StoredValues) -> da.Array:
    """Return stored images [N, C, H, W] lazily as [N, H, W, C], 0 to 255."""
    stored = da.from_array(
        values,
        chunks=(values.rows, *values.shape[1:]),
        name=f"image-{digest_json([str(values.source.folder), values.source.table])}",
        asarray=False,
        fancy=False,
        meta=np.empty((0,) * values.ndim, values.dtype),
    )
    images = da.moveaxis(stored, 1, 3)
    full_scale = values.source.table["full_scale"]
    return images if full_scale == 255 else (images * (255 / full_scale)).astype(np.uint8)
