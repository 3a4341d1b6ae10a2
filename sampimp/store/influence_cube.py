"""Influence, the squares of random probes, and the effects of removals in the cube of a study.

A target has its place on the dimension `target` by its name. Where a derivative was smoothed, the
name says so ("mean (eps=0.0001)"), so that exact and smoothed ones stand side by side. The squares
of probes have no names: they are means over the probes of all blocks of a run, the exact ones
wherever a run of the data set has any.

Map: `influence_variables` (all of them, with their coordinates).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import dask.array as da
import numpy as np

from sampimp.schema import INFLUENCE_VARIABLES
from sampimp.store.effect_cube import effect_variables
from sampimp.store.fixed_point_cube import fixed_point_variables
from sampimp.store.influence_layouts import (
    OVERALL,
    InfluenceLayout,
    labelled_target,
    smoothing_label,
)
from sampimp.store.influence_records import CommittedRecord
from sampimp.store.lazy_arrays import lazy_array, missing_table
from sampimp.store.subset_cube import subset_variables
from sampimp.store.variables import StoredVariable

RecordTable = Sequence[Sequence[Sequence[CommittedRecord]]]
"""The records of each strategy (rows) and seed (columns)."""

SIGN = "effect of removing a sample = -influence, to first order"
DENOMINATOR = "batch size kept: the mean over a batch divides by its size with the removed sample"


def influence_variables(
    table: RecordTable, layers: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the variables of `INFLUENCE_VARIABLES` that any run has, and their coordinates.

    Parameters
    ----------
    table
        The records of each run.
    layers
        Names of the layers.
    """
    named, probes, fixed, retrainings, subsets = (
        _of_kind(table, kind)
        for kind in ("influence", "probes", "fixed-point", "retrain", "subset")
    )
    units = {
        labelled_target(target, record.commit["smoothing"]): unit
        for record in _all(named)
        for target, unit in zip(record.commit["targets"], record.commit["units"], strict=True)
    }
    for record in (*_all(fixed), *_all(retrainings)):
        units |= dict(zip(record.commit["targets"], record.commit["units"], strict=True))
    targets = sorted(units, key=_place)
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    if targets:
        coords["target"] = ("target", targets)
        coords["target_units"] = ("target", [units[target] for target in targets])
    if any(_all(named)):
        variables |= _target_variables(named, targets)
    if any(_all(probes)):
        variables |= _probe_variables(probes, layers)
    if any(_all(fixed)):
        solutions, curvatures = fixed_point_variables(fixed, targets)
        variables |= solutions
        coords |= curvatures
    if any(_all(retrainings)):
        effects, removals = effect_variables(retrainings, targets)
        variables |= effects
        coords |= removals
    if any(_all(subsets)):
        trainings, places = subset_variables(subsets)
        variables |= trainings
        coords |= places
    return variables, coords


def _of_kind(table: RecordTable, kind: str) -> RecordTable:
    return [[[record for record in cell if record.kind == kind] for cell in row] for row in table]


def _all(table: RecordTable) -> Iterator[CommittedRecord]:
    return (record for row in table for cell in row for record in cell)


def _place(target: str) -> tuple[int, list[float], str]:
    """Order targets by kind, then by their numbers, which may have thousands of digits."""
    kinds = ("mean", "mean-error", "class", "sample", "margin", "train")
    kind = re.split("[: ]", target)[0]
    rank = kinds.index(kind) if kind in kinds else len(kinds)
    return rank, [float(number) for number in re.findall(r"\d+", target.partition(" ")[0])], target


# Named targets.


@dataclass(frozen=True)
class _ChosenTargets:
    """Some targets of a record, in the order of `rows`."""

    stored: StoredVariable
    rows: tuple[int, ...]

    def read(self, position: int, columns: slice = slice(None)) -> np.ndarray:
        return self.stored.read(position, columns)[list(self.rows)]

    @property
    def content(self) -> Any:
        return [self.stored.content, self.rows]


def _target_variables(table: RecordTable, targets: Sequence[str]) -> dict[str, Any]:
    """Return `influence`, `influence_total` and `adjoint_norm`."""
    homes = [[_homes(cell) for cell in row] for row in table]
    layout = next(_all(table)).layout
    assert isinstance(layout, InfluenceLayout)
    sizes = layout.epoch, layout.layer, layout.sample
    attrs = {"sign": SIGN, "denominator": DENOMINATOR, **_common_attrs(_all(table))}
    growth = [
        f"{record.commit['strategy']}, seed {record.commit['seed']}, {target}: epoch {epoch}"
        for record in _all(table)
        for target, epoch in record.commit["growth_epochs"].items()
    ]
    if growth:
        attrs["growth"] = growth
    widths = {
        name: min(record.layout.chunk(name)[-1] for record in _all(table))
        for name in ("influence", "influence_total")
    }
    arrays: dict[str, list[da.Array]] = {name: [] for name in widths}
    for _, group in groupby(targets, key=lambda target: _signature(homes, target)):
        together = list(group)
        for name, parts in arrays.items():
            parts.append(_lazy_targets(homes, name, together, sizes, widths[name]))
    variables = {
        name: (
            ("strategy", "seed", *dims),
            da.moveaxis(da.concatenate(arrays[name], axis=3), 3, 2)
            if name == "influence"
            else da.concatenate(arrays[name], axis=3)[:, :, 0],
            _described(name, attrs),
        )
        for name, dims in (
            ("influence", ("target", "epoch", "layer", "sample")),
            ("influence_total", ("target", "sample")),
        )
    }
    norms = missing_table((len(table), len(table[0]), len(targets), layout.epoch))
    for i, row in enumerate(homes):
        for j, cell in enumerate(row):
            for k, target in enumerate(targets):
                if target in cell:
                    record, place = cell[target]
                    by_step = np.array(record.commit["curves"]["adjoint_norm"])[:, place]
                    norms[i, j, k, record.layout.order("adjoint_norm")[: len(by_step)]] = by_step
    dims = ("strategy", "seed", "target", "epoch")
    variables["adjoint_norm"] = (dims, norms, _described("adjoint_norm", attrs))
    return variables


def _homes(records: Sequence[CommittedRecord]) -> dict[str, tuple[CommittedRecord, int]]:
    """Return the record of each target, and the target's place there; the larger record wins."""
    homes: dict[str, tuple[CommittedRecord, int]] = {}
    for record in sorted(records, key=lambda record: len(record.commit["targets"])):
        for place, target in enumerate(record.commit["targets"]):
            homes[labelled_target(target, record.commit["smoothing"])] = record, place
    return homes


def _signature(homes: Sequence[Sequence[Mapping[str, Any]]], target: str) -> list[str]:
    """Return the record that has the target in each run: equal for targets of one block."""
    return [cell[target][0].name if target in cell else "" for row in homes for cell in row]


def _lazy_targets(
    homes: Sequence[Sequence[Mapping[str, tuple[CommittedRecord, int]]]],
    name: str,
    targets: Sequence[str],
    sizes: tuple[int, int, int],
    width: int,
) -> da.Array:
    """Return targets that share their record in each run, as (strategy, seed, epoch or 1, ...)."""
    epochs, layers, samples = sizes
    cells = [
        [
            _ChosenTargets(
                cell[targets[0]][0].array(name), tuple(cell[target][1] for target in targets)
            )
            if targets[0] in cell
            else None
            for cell in row
        ]
        for row in homes
    ]
    middle = (len(targets), layers) if name == "influence" else (len(targets),)
    steps = epochs if name == "influence" else 1
    return lazy_array(cells, name, (steps, *middle, samples), (1, *middle, width), "float32")


# Squares of probes.


@dataclass(frozen=True)
class _MeanOverProbes:
    """The mean over the probes of several blocks, each weighted by its number of probes."""

    blocks: tuple[tuple[StoredVariable, tuple[int, ...]], ...]
    """Of each block its mean, and its number of probes: one, or one for each layer (row)."""

    def read(self, position: int, columns: slice = slice(None)) -> np.ndarray:
        total: Any = 0.0
        count: Any = 0
        for stored, counts in self.blocks:
            values = stored.read(position, columns).astype(np.float64)
            weights = np.array(counts).reshape((-1,) + (1,) * (values.ndim - 1))
            total = total + np.where(weights > 0, values * weights, 0.0)
            count = count + weights
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN for a layer without probes
            return (total / count).astype(np.float32)

    @property
    def content(self) -> Any:
        return [[stored.content, counts] for stored, counts in self.blocks]


def _probe_variables(table: RecordTable, layers: Sequence[str]) -> dict[str, Any]:
    """Return `final_importance`, `final_importance_total` and `arriving_importance`."""
    labels = {smoothing_label(record.commit["smoothing"]) for record in _all(table)}
    label = min(labels)  # "", the exact derivative, wherever there is one
    table = [
        [[r for r in cell if smoothing_label(r.commit["smoothing"]) == label] for cell in row]
        for row in table
    ]
    blocks = [[_disjoint(cell) for cell in row] for row in table]
    common = _common_attrs(_all(blocks))
    variables: dict[str, Any] = {}
    for name in ("final_importance", "final_importance_total", "arriving_importance"):
        places = list(layers) if name == "final_importance" else [OVERALL]
        cells = [[_mean_of(cell, name, places) for cell in row] for row in blocks]
        holders = [
            record
            for record in _all(blocks)
            if name in record.layout.variables and any(_probes(record)[place] for place in places)
        ]
        if not holders:
            continue
        layout = holders[0].layout
        shape, chunk = layout.shape(name), layout.chunk(name)
        if not layout.is_stepwise(name):
            shape, chunk = (1, *shape), (1, *chunk)
        array = lazy_array(cells, name, shape, chunk, "float32")
        count = min(
            sum(_probes(record)[place] for record in cell)
            for row in blocks
            for cell in row
            for place in places
            if any(_probes(record)[place] for record in cell)
        )
        attrs = {"probes": count, "relative_error": float(np.sqrt(2 / count)), **common}
        if label:
            attrs["smoothing"] = label
        dims = ("strategy", "seed", *INFLUENCE_VARIABLES[name].dims)
        whole = array if layout.is_stepwise(name) else array[:, :, 0]
        variables[name] = (dims, whole, _described(name, attrs))
    return variables


def _disjoint(records: Sequence[CommittedRecord]) -> list[CommittedRecord]:
    """Return blocks without a common probe; larger ones first, since blocks may be nested."""
    chosen: list[CommittedRecord] = []
    seen: set[str] = set()
    for record in sorted(records, key=lambda record: -len(record.commit["targets"])):
        if seen.isdisjoint(record.commit["targets"]):
            seen |= set(record.commit["targets"])
            chosen.append(record)
    return chosen


def _mean_of(
    records: Sequence[CommittedRecord], name: str, places: Sequence[str]
) -> _MeanOverProbes | None:
    blocks = tuple(
        (record.array(name), tuple(_probes(record)[place] for place in places))
        for record in records
        if name in record.layout.variables
    )
    return _MeanOverProbes(blocks) if blocks else None


def _probes(record: CommittedRecord) -> Mapping[str, int]:
    assert isinstance(record.layout, InfluenceLayout)
    return record.layout.probes


def _described(name: str, attrs: Mapping[str, Any]) -> dict[str, Any]:
    described = INFLUENCE_VARIABLES[name]
    return {"units": described.units, "long_name": described.long_name, **attrs}


def _common_attrs(records: Iterator[CommittedRecord]) -> dict[str, Any]:
    return {"code": ", ".join(sorted({str(record.commit["code"]) for record in records}))}
