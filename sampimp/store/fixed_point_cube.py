"""Influence at the fixed point (eq. 4 of the paper) in the cube.

Map: `fixed_point_variables`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.errors import RecordError
from sampimp.schema import INFLUENCE_VARIABLES
from sampimp.store.influence_records import CommittedRecord
from sampimp.store.lazy_arrays import lazy_array
from sampimp.store.variables import StoredVariable


def fixed_point_variables(
    table: Sequence[Sequence[Sequence[CommittedRecord]]], targets: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `fixed_point_influence`, and the coordinates `curvature` and `damping`.

    Parameters
    ----------
    table
        The records of each strategy (rows) and seed (columns). Curvatures and dampings are the same
        in all records of a study, since they follow from its configuration.
    targets
        The coordinate `target`.

    Raises
    ------
    RecordError
        They differ.
    """
    records = [record for row in table for cell in row for record in cell]
    curvatures, dampings = records[0].commit["curvatures"], records[0].commit["dampings"]
    for record in records:
        if (record.commit["curvatures"], record.commit["dampings"]) != (curvatures, dampings):
            raise RecordError(
                expected=f"curvatures and dampings of {records[0].name}",
                got="others",
                where=str(record.folder),
                todo="delete this record's folder and run the command that wrote it again",
            )
    samples = records[0].layout.sizes["sample"]
    cells = [[_solutions(cell, targets, len(curvatures)) for cell in row] for row in table]
    shape = len(targets) * len(curvatures), len(dampings), samples
    array = lazy_array(
        cells,
        "fixed_point_influence",
        shape,
        records[0].layout.chunk("fixed_point_influence"),
        "float32",
    )
    by_target = array.reshape(
        (*array.shape[:2], len(targets), len(curvatures), len(dampings), samples)
    )
    described = INFLUENCE_VARIABLES["fixed_point_influence"]
    attrs = {
        "units": described.units,
        "long_name": described.long_name,
        "sign": "effect of removing a sample = -influence, to first order",
        "default_damping": records[0].commit["default_damping"],
        "krylov_steps": records[0].commit["krylov_steps"],
    }
    dims = ("strategy", "seed", "target", "curvature", "damping", "sample")
    coords = {"curvature": ("curvature", curvatures), "damping": ("damping", dampings)}
    return {"fixed_point_influence": (dims, by_target, attrs)}, coords


@dataclass(frozen=True)
class _Solutions:
    """The solutions of a run, by target and curvature, from the records that have them."""

    homes: tuple[tuple[StoredVariable, int] | None, ...]
    """Of each solution its record's array, and its position there."""
    dampings: int
    samples: int

    def read(self, position: int, columns: slice = slice(None)) -> np.ndarray:
        home = self.homes[position]
        if home is None:
            width = len(range(self.samples)[columns])
            return np.full((self.dampings, width), np.nan, np.float32)
        return home[0].read(home[1], columns)

    @property
    def content(self) -> Any:
        return [home and [home[0].content, home[1]] for home in self.homes]


def _solutions(
    records: Sequence[CommittedRecord], targets: Sequence[str], curvatures: int
) -> _Solutions | None:
    if not records:
        return None
    homes: dict[int, tuple[StoredVariable, int]] = {}
    for record in records:
        stored = record.array("fixed_point_influence")
        for place, target in enumerate(record.commit["targets"]):
            for curvature in range(curvatures):
                position = targets.index(target) * curvatures + curvature
                homes[position] = stored, place * curvatures + curvature
    sizes = records[0].layout.sizes
    every = range(len(targets) * curvatures)
    return _Solutions(tuple(map(homes.get, every)), sizes["damping"], sizes["sample"])
