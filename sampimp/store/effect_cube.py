"""The effects of removals in the cube: targets after retraining, minus those of the baseline.

A record of retrainings holds the targets after each retraining. Effects are differences to the
retraining of the same repeat (the same start) in which no sample was removed.

Map: `effect_variables`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.schema import INFLUENCE_VARIABLES
from sampimp.store.influence_layouts import UNTOUCHED
from sampimp.store.influence_records import CommittedRecord
from sampimp.store.lazy_arrays import lazy_array, missing_table
from sampimp.store.variables import StoredVariable


def effect_variables(
    table: Sequence[Sequence[Sequence[CommittedRecord]]], targets: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `effect`, `baseline` and `removed`, and the coordinates `removal` and `repeat`.

    Parameters
    ----------
    table
        The records of retrainings of each strategy (rows) and seed (columns).
    targets
        The coordinate `target`.
    """
    records = [record for row in table for cell in row for record in cell]
    names = {name for record in records for name in record.commit["removals"]} - {UNTOUCHED}
    removals = sorted(names, key=_order)
    repeats = max(record.commit["repeats"] for record in records)
    size = len(table), len(table[0])
    effect = missing_table((*size, len(removals), len(targets), repeats))
    baseline = missing_table((*size, len(targets), repeats))
    masks: list[list[_RemovedSamples | None]] = []
    for i, row in enumerate(table):
        masks.append([])
        for j, cell in enumerate(row):
            values = _values(cell, targets, repeats)
            if UNTOUCHED in values:
                baseline[i, j] = values[UNTOUCHED]
                for k, removal in enumerate(removals):
                    if removal in values:
                        effect[i, j, k] = values[removal] - baseline[i, j]
            rows = _rows(cell)
            masks[-1].append(_RemovedSamples(tuple(map(rows.get, removals))) if cell else None)
    attrs = {
        name: ", ".join(sorted({str(record.commit[name]) for record in records}))
        for name in ("code", "jitter", "denominator")
    }
    variables: dict[str, Any] = {
        "effect": (
            ("strategy", "seed", "removal", "target", "repeat"),
            effect,
            _attrs("effect", {**attrs, "sign": "retrained without the samples, minus with all"}),
        ),
        "baseline": (
            ("strategy", "seed", "target", "repeat"),
            baseline,
            _attrs("baseline", attrs),
        ),
    }
    if removals:
        samples = records[0].layout.sizes["sample"]
        shape = (1, len(removals), samples)
        array = lazy_array(masks, "removed", shape, shape, "bool")[:, :, 0]
        dims = ("strategy", "seed", "removal", "sample")
        variables["removed"] = (dims, array, _attrs("removed", {}))
    coords = {"removal": ("removal", removals), "repeat": ("repeat", np.arange(repeats))}
    return variables, coords


def _values(
    records: Sequence[CommittedRecord], targets: Sequence[str], repeats: int
) -> dict[str, np.ndarray]:
    """Return the targets (target, repeat) after each removal of a run; NaN where not computed."""
    values: dict[str, np.ndarray] = {}
    for record in records:
        removals, count = record.commit["removals"], record.commit["repeats"]
        final = np.array(record.commit["curves"]["final_value"])
        by_removal = final.reshape(len(removals), count, len(record.commit["targets"]))
        for place, target in enumerate(record.commit["targets"]):
            for removal, retrained in zip(removals, by_removal[:, :, place], strict=True):
                table = values.setdefault(removal, missing_table((len(targets), repeats)))
                table[targets.index(target), :count] = retrained
    return values


@dataclass(frozen=True)
class _RemovedSamples:
    """`removed` of all removals of a run, (removal, sample), from the records that have them."""

    rows: tuple[tuple[StoredVariable, int] | None, ...]
    """Of each removal the array of its record, and its row there."""

    def read(self, position: int, columns: slice = slice(None)) -> np.ndarray:
        assert position == 0
        arrays: dict[int, np.ndarray] = {}
        values = []
        for home in self.rows:
            if home is not None and id(home[0]) not in arrays:
                arrays[id(home[0])] = home[0].read(0, columns)
            values.append(None if home is None else arrays[id(home[0])][home[1]])
        width = next(len(row) for row in values if row is not None)
        return np.stack([np.zeros(width, bool) if row is None else row for row in values])

    @property
    def content(self) -> Any:
        return [home and [home[0].content, home[1]] for home in self.rows]


def _rows(records: Sequence[CommittedRecord]) -> Mapping[str, tuple[StoredVariable, int]]:
    rows: dict[str, tuple[StoredVariable, int]] = {}
    for record in records:
        stored = record.array("removed")
        rows |= {name: (stored, row) for row, name in enumerate(record.commit["removals"])}
    return rows


def _order(removal: str) -> tuple[str, list[float], str]:
    """Order removals by kind, then by their numbers."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", removal)]
    return removal.partition(":")[0], numbers, removal


def _attrs(name: str, attrs: Mapping[str, Any]) -> dict[str, Any]:
    described = INFLUENCE_VARIABLES[name]
    return {"units": described.units, "long_name": described.long_name, **attrs}
