"""Read a whole study lazily as one labelled cube.

`open_cube` matches the plan with the commits and lays a dask array over the records, one block for
each chunk that a trial wrote. No array is opened before a block is computed: 300 trials open as
fast as their COMMIT.json files can be read. A chunk is compared with its digest when it is read, so
a damaged chunk raises an error and never yields a number. Labels are read when the cube is
opened, images when they are computed. A trial that is not committed is NaN, and
its files are not read. An open cube does not change: trials committed later appear when the study
is opened again.

While a study grows, a trial is NaN or complete: readers see it from its COMMIT.json on, which is
stored whole and names the records that hold its epochs, and no other attempt writes into these. A
planned data set that is not stored yet has NaN in all its trials, and no `label`.

Map: `open_cube`; `configuration_attrs` (the study's configuration, in attrs); `COORDINATE_ATTRS`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from sampimp.config import OPTIMIZERS, RELU_MODELS
from sampimp.errors import RecordError
from sampimp.schema import (
    CHUNK_VALUES,
    CURVES,
    REFERENCES,
    STRATEGIES,
    VARIABLES,
    Layout,
    digest_json,
)
from sampimp.store.cube_tree import DataTree
from sampimp.store.datasets import StoredSource, open_source, require_planned_shape
from sampimp.store.influence_cube import influence_variables
from sampimp.store.influence_records import CommittedRecord, read_records
from sampimp.store.lazy_arrays import lazy_array
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.snapshots import SNAPSHOTS, stored_snapshots
from sampimp.store.variables import StoredVariable

Cells = Sequence[Sequence[PlannedTrial | None]]
"""The trial of each strategy (rows) and seed (columns); None where none is planned."""

COORDINATE_ATTRS: Mapping[str, Mapping[str, str]] = {
    "strategy": {"long_name": "batch strategy; shuffle and shuffle_by_seed are reference runs"},
    "seed": {"units": "1", "long_name": "seed of the initialisation"},
    "epoch": {"units": "epoch", "long_name": "training epoch, from 1"},
    "layer": {"long_name": "layer of the network (a module's weight and bias), in forward order"},
    "sample": {"units": "1", "long_name": "position in the training set, from 0"},
    "state": {"units": "epoch", "long_name": "0: the start; t: after epoch t"},
    "order_seed": {"units": "1", "long_name": "seed of the order of the batches"},
    "label": {"units": "1", "long_name": "class of the sample"},
    "test_label": {"units": "1", "long_name": "class of the test sample"},
    "file": {"long_name": "path of the sample's file in the data set's folder"},
    "test_file": {"long_name": "path of the test sample's file in the data set's folder"},
    "layer_of_parameter": {"long_name": "layer that the parameter belongs to"},
    "target": {"long_name": "function of the final parameters whose influence is computed"},
    "target_units": {"long_name": "unit of the target"},
    "curvature": {"long_name": "matrix C in (C + damping)^-1"},
    "damping": {"units": "nat / parameter^2", "long_name": "damping in (C + damping)^-1"},
    "removal": {"long_name": "samples that a retraining leaves out"},
    "rule": {"long_name": "how a subset was selected; full: all samples; chosen: by validation"},
    "size": {"units": "1", "long_name": "share of the training samples that were selected"},
    "budget": {
        "long_name": "updates (steps) or passes (epochs) as of all samples in the study's epochs"
    },
    "training_seed": {"units": "1", "long_name": "seed of a training on a subset"},
    "variant": {"long_name": "rule with its parameter"},
    "repeat": {
        "units": "1",
        "long_name": "0: from the run's own start; 1, ..: from a jittered one",
    },
}
"""Units and meaning of each coordinate."""


def open_cube(out: str | os.PathLike[str] | Folder) -> xr.DataTree:
    """Open a study, finished or still running.

    Parameters
    ----------
    out
        The study's folder, or its s3:// URL.

    Returns
    -------
    xarray.DataTree
        One node for each data set (`mnist`; `mnist/cnn` for networks other than the paper's) with
        the variables of `sampimp.schema.VARIABLES`, with strategy and seed as first dims,
        lazily. Missing and unfinished trials are NaN.
        `diverged_epoch` (strategy, seed) is NaN if a run did not diverge; `trial` names the
        folder of each committed trial; `image` (sample, row, column, channel) shows the training
        samples if they are images, and the coordinate `file` (sample) names the files that
        they were read from. The variables of `sampimp.schema.INFLUENCE_VARIABLES` are there
        where influence or retrainings were computed for any run, with `test_image`, `test_label`
        and `test_file` (test_sample), since targets can be test samples. The attrs `flag_values`
        and `flag_meanings` of `label` name the classes. The tree's attrs hold the study's
        configuration.

    Raises
    ------
    StoreError
        There is no study.
    RecordError
        A data set differs from the one that was stored.
    """
    folder = Folder.of(out)
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    snapshots = folder.read_json(SNAPSHOTS) or {}
    records = read_records(folder, plan, trials)
    nodes = {
        plan.node(key): _open_node(
            folder, plan, key, [t for t in trials if t.config.dataset == key], snapshots, records
        )
        for key in plan.datasets
    }
    tree = DataTree.from_dict(nodes)
    committed = sum(trial.commit is not None for trial in trials)
    tree.attrs = {
        "title": "sample importance in every layer and epoch of the training runs of a study",
        "trials": f"{committed} of {len(trials)} committed",
        "data_sets": list(nodes),
        "study": str(folder),
        **configuration_attrs(plan),
    }
    return tree


def configuration_attrs(plan: Plan) -> dict[str, Any]:
    """Return the configuration of a study in types that every file format can hold."""
    return {
        "sampimp_version": plan.code,
        "order_seed": plan.order_seed,
        "rand_batches": plan.rand_batches,
        **_training_attrs(plan),
    }


def _open_node(
    folder: Folder,
    plan: Plan,
    key: str,
    trials: Sequence[PlannedTrial],
    snapshots: Mapping[str, Mapping[str, list[str]]],
    records: Mapping[str, Sequence[CommittedRecord]],
) -> xr.Dataset:
    """Return the cube of one data set."""
    info = plan.datasets[key]
    strategies = [s for s in (*REFERENCES, *STRATEGIES) if s in plan.grid]
    seeds = sorted({seed for strategy in strategies for seed in plan.grid[strategy]})
    by_run = {(t.config.strategy, t.config.seed): t for t in trials}
    cells = [[by_run.get((s, seed)) for seed in seeds] for s in strategies]
    source = _require_source(folder, plan, key, trials)
    variables = _record_variables(folder, plan, key, cells, snapshots)
    influence, influence_coords = influence_variables(
        [[records.get(_committed(trial), []) for trial in row] for row in cells], info.layer_names
    )
    variables |= influence
    coords = {
        "strategy": ("strategy", strategies),
        "seed": ("seed", seeds),
        **_coordinates(plan, key),
        "order_seed": (
            ("strategy", "seed"),
            [[plan.order_seed_of(s, seed) for seed in seeds] for s in strategies],
        ),
        **influence_coords,
    }
    if source is not None:
        coords["label"] = ("sample", _read_labels(source, "train", info.class_names))
        if source.has_files:
            coords["file"] = ("sample", source.read("train_files"))
        if _is_image(values := _StoredValues(source, "train_values")):
            variables["image"] = _images(values, "sample", "training sample")
            if "target" in influence_coords:  # some targets are test samples
                test_values = _StoredValues(source, "test_values")
                variables["test_image"] = _images(test_values, "test_sample", "test sample")
                test_labels = _read_labels(source, "test", info.class_names)
                coords["test_label"] = ("test_sample", test_labels)
                if source.has_files:
                    coords["test_file"] = ("test_sample", source.read("test_files"))
    if layout_states := plan.layout(key).states:
        coords["state"] = ("state", list(layout_states))
        coords["layer_of_parameter"] = ("parameter", _LayersOfParameters(info.layers).lazy())
    described = {name: (*coord, dict(COORDINATE_ATTRS[name])) for name, coord in coords.items()}
    if "label" in described:
        described["label"][2].update(_class_flags(info.class_names))
    attrs = {"dataset": info.name, "class_names": list(info.class_names), "digest": info.digest}
    return xr.Dataset(variables, described, {**attrs, "test_samples": info.test_count})


def _record_variables(
    folder: Folder,
    plan: Plan,
    key: str,
    cells: Cells,
    snapshots: Mapping[str, Mapping[str, list[str]]],
) -> dict[str, Any]:
    """Return the variables that the trials wrote, `diverged_epoch` and `trial`."""
    layout = plan.layout(key)
    variables: dict[str, Any] = {}
    scored = any(
        trial.trial_id in snapshots for row in cells for trial in row if trial and trial.commit
    )
    for name in (*layout.variables, *(["snapshot_importance"] if scored else [])):
        variable = VARIABLES[name]
        attrs: dict[str, Any] = {"units": variable.units, "long_name": variable.long_name}
        if name.endswith("importance"):
            attrs.update(_training_attrs(plan))
        if name in CURVES:
            array = _curves(cells, name, layout)
        else:
            stored = [
                [_stored_variable(folder, name, layout, trial, snapshots) for trial in row]
                for row in cells
            ]
            shape, chunk = layout.shape(name), layout.chunk(name)
            array = lazy_array(stored, name, shape, chunk, variable.dtype)
        variables[name] = (("strategy", "seed", *variable.dims), array, attrs)
    variables["diverged_epoch"] = (
        ("strategy", "seed"),
        np.array([[_diverged(trial) for trial in row] for row in cells]),
        {"long_name": "epoch in which the run diverged; NaN if it did not"},
    )
    variables["trial"] = (
        ("strategy", "seed"),
        np.array([[_committed(trial) for trial in row] for row in cells], dtype=str),
        {"long_name": "folder of the committed trial; empty if it is not committed"},
    )
    return variables


def _coordinates(plan: Plan, key: str) -> dict[str, Any]:
    """Return the coordinates that follow from the plan alone."""
    info = plan.datasets[key]
    return {
        "epoch": ("epoch", np.arange(1, plan.training.epochs + 1)),
        "layer": ("layer", list(info.layer_names)),
        "sample": ("sample", np.arange(info.sample_count)),
    }


def _read_labels(source: StoredSource, part: str, class_names: Sequence[str]) -> np.ndarray:
    """Return the labels of one part of a data set, each with a name."""
    labels = source.read(f"{part}_labels")
    if not 0 <= labels.min() <= labels.max() < len(class_names):
        raise RecordError(
            expected=f"{part} labels in 0..{len(class_names) - 1}, of the classes in the plan",
            got=f"labels from {labels.min()} to {labels.max()}",
            where=str(source.folder),
            todo="restore the data set, or the plan, from a copy",
        )
    return labels


def _class_flags(class_names: Sequence[str]) -> dict[str, Any]:
    """Return the class names as CF attributes of `label`, blanks within a name as underscores.

    A coordinate `class_name` on `sample` would show names in place of numbers, but it would be
    carried to every result and store along `sample`: 0.5 GB for the names of ImageNet.
    """
    return {
        "flag_values": list(range(len(class_names))),
        "flag_meanings": " ".join("_".join(name.split()) for name in class_names),
    }


def _require_source(
    folder: Folder, plan: Plan, key: str, trials: Sequence[PlannedTrial]
) -> StoredSource | None:
    """Open the stored data set; it may be absent only as long as no trial is committed."""
    info = plan.datasets[key]
    place = folder / "datasets" / f"{key}.zarr"
    source = open_source(place, info.digest, info.chunks)
    if source is None and any(trial.commit for trial in trials):
        raise RecordError(
            expected="the data set that the committed trials were trained on",
            got="none, or one that is not complete",
            where=str(place),
            todo="run the study's own command again: the data set is stored again",
        )
    if source is not None:
        require_planned_shape(source, info.sample_count, info.test_count, info.input_shape)
    return source


def _training_attrs(plan: Plan) -> dict[str, Any]:
    """Return the configuration of the training runs."""
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
        **({"activation": training.activation} if training.model in RELU_MODELS else {}),
        "epochs": training.epochs,
        "threads": training.threads,
        "device": training.device,
    }


def _committed(trial: PlannedTrial | None) -> str:
    return (trial.trial_id or "") if trial is not None and trial.commit is not None else ""


def _diverged(trial: PlannedTrial | None) -> float:
    epoch = trial.commit["diverged_epoch"] if trial is not None and trial.commit else None
    return np.nan if epoch is None else float(epoch)


def _stored_variable(
    folder: Folder,
    name: str,
    layout: Layout,
    trial: PlannedTrial | None,
    snapshots: Mapping[str, Mapping[str, list[str]]],
) -> StoredVariable | None:
    """Return a variable of a trial, or None if the trial has none."""
    if trial is None or trial.commit is None or trial.trial_id is None:
        return None
    place = folder / "trials" / trial.trial_id
    if name != "snapshot_importance":
        return StoredVariable.of(place, name, layout, trial.commit)
    digests = snapshots.get(trial.trial_id)
    return stored_snapshots(place, layout, digests) if digests else None


def _curves(cells: Cells, name: str, layout: Layout) -> da.Array:
    """Return a curve of all trials; the commits hold its values."""
    values = np.full((len(cells), len(cells[0]), layout.epoch), np.nan)
    for curves, row in zip(values, cells, strict=True):
        for curve, trial in zip(curves, row, strict=True):
            if trial is not None and trial.commit is not None:
                measured = trial.commit["curves"].get(name, ())
                curve[: len(measured)] = measured
    return da.from_array(values, chunks=(1, 1, -1))


class _StoredValues:
    """Values of a data set's samples, in the interface that dask expects of an array.

    It holds the path, and workers open the array there; a pickled Zarr array would contain its
    store, and the store a bucket's credentials.
    """

    def __init__(self, source: StoredSource, name: str) -> None:
        stored = source.table["arrays"][name]
        self.source, self.name, self.rows = source, name, stored["rows"]
        self.shape, self.dtype = tuple(stored["shape"]), np.dtype(stored["dtype"])
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Read a region; `index` has slices and integers, one for each dimension."""
        rows, *others = index
        region = rows if isinstance(rows, slice) else slice(rows, rows + 1)
        positions = range(self.shape[0])[region]
        if not positions:
            return np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *others)]
        values = self.source.read(self.name, min(positions), max(positions) + 1)
        inner = slice(None, None, rows.step) if isinstance(rows, slice) else 0
        return values[(inner, *others)]


class _LayersOfParameters:
    """The layer's name of each parameter, in the interface that dask expects of an array.

    A name takes ten times as much memory as the parameter.
    """

    ndim = 1

    def __init__(self, layers: Sequence[tuple[str, int]]) -> None:
        self.names = np.array([name for name, _ in layers])
        self.ends = np.cumsum([count for _, count in layers])
        self.shape, self.dtype = (int(self.ends[-1]),), self.names.dtype

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Return a region; `index` has one slice."""
        (region,) = index
        assert isinstance(region, slice)
        positions = np.arange(*region.indices(self.shape[0]))
        return self.names[np.searchsorted(self.ends, positions, side="right")]

    def lazy(self) -> da.Array:
        """Return the names as a dask array."""
        name = f"layers-{digest_json([self.names.tolist(), self.ends.tolist()])}"
        meta = np.empty(0, self.dtype)
        chunks = (CHUNK_VALUES,)
        return da.from_array(self, chunks, name=name, asarray=False, fancy=False, meta=meta)


def _is_image(values: _StoredValues) -> bool:
    return values.ndim == 4 and values.dtype == np.uint8


def _images(values: _StoredValues, dim: str, words: str) -> tuple[Any, da.Array, dict[str, str]]:
    """Return stored images [N, C, H, W] lazily as a variable [N, H, W, C], 0 to 255."""
    stored = da.from_array(
        values,
        chunks=(values.rows, *values.shape[1:]),
        name=f"{dim}-{digest_json([str(values.source.folder), values.source.table])}",
        asarray=False,
        fancy=False,
        meta=np.empty((0,) * values.ndim, values.dtype),
    )
    images = da.moveaxis(stored, 1, 3)
    full_scale = values.source.table["full_scale"]
    if full_scale != 255:
        images = (images * (255 / full_scale)).astype(np.uint8)
    attrs = {"units": "1", "long_name": f"{words} as an image, 0 to 255"}
    return (dim, "row", "column", "channel"), images, attrs
