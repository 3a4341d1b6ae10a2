"""Stored variables of many runs as one lazy array, (strategy, seed, ...).

A dask array is laid over the records, one block for each chunk that was written. No file is opened
before a block is computed, and each chunk is compared with its digest when it is read.

Map: `Readable` (what a cell of strategy and seed has to offer), `lazy_array`; `missing_table` (for
values that the commits hold).
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import dask.array as da
import numpy as np

from sampimp.errors import RecordError
from sampimp.schema import digest_json

LARGEST_TABLE = 2**26
"""Largest number of values in a table of numbers from commits (arbitrary): 512 MiB. A study of 45
runs, 1,000 targets and 50 epochs has 2^21."""


class Readable(Protocol):
    """A variable of one run, read by position along its first dimension."""

    def read(self, position: int, columns: slice = slice(None)) -> np.ndarray:
        """Return the values at a position, in a range of columns of the last dimension."""

    @property
    def content(self) -> Any:
        """What the values depend on, as JSON: paths and digests."""


Table = Sequence[Sequence[Readable | None]]
"""The variable of each strategy (rows) and seed (columns); None where there is none."""


class _Cells:
    """A variable of all runs, in the interface that dask expects of an array; read when sliced."""

    def __init__(self, table: Table, shape: tuple[int, ...], dtype: str) -> None:
        self.table, self.dtype = table, np.dtype(dtype)
        self.shape = (len(table), len(table[0]), *shape)
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Read a region; `index` has slices and integers, one for each dimension."""
        strategies, seeds, *region = (
            slice(i, i + 1) if isinstance(i, int | np.integer) else i for i in index
        )
        values = np.array(
            [[self._read(cell, region) for cell in row[seeds]] for row in self.table[strategies]]
        )
        return values[tuple(slice(None) if isinstance(i, slice) else 0 for i in index)]

    def _read(self, cell: Readable | None, region: Sequence[slice]) -> np.ndarray:
        positions, *middle, columns = region
        indices = [range(size)[part] for size, part in zip(self.shape[2:], region, strict=True)]
        if cell is None or not all(indices):
            missing = False if self.dtype.kind == "b" else np.nan
            return np.full(tuple(map(len, indices)), missing, self.dtype)
        ends = indices[-1][0], indices[-1][-1]  # a slice may have a step, also backwards
        low, high = min(ends), max(ends) + 1
        steps = slice(None, None, columns.step)
        return np.stack(
            [
                cell.read(position, slice(low, high))[(*middle, steps)]
                for position in range(self.shape[2])[positions]
            ]
        )


def lazy_array(
    table: Table, name: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str
) -> da.Array:
    """Return a variable of all runs as a dask array, ``(strategy, seed, *shape)``.

    The array's name is made from paths and digests: dask's own `tokenize` visits every object and
    took half of the time of opening 300 trials.

    Parameters
    ----------
    table
        The variable of each run.
    name
        Name of the variable.
    shape, chunk, dtype
        Of one run; a missing run is NaN, or False.
    """
    cells = _Cells(table, shape, dtype)
    content = [[cell and cell.content for cell in row] for row in table]
    return da.from_array(
        cells,
        chunks=(1, 1, *chunk),
        name=f"{name}-{digest_json(content)}",
        asarray=False,
        fancy=False,
        meta=np.empty((0,) * cells.ndim, cells.dtype),
    )


def missing_table(shape: tuple[int, ...]) -> np.ndarray:
    """Return a table of NaN, float64, for numbers of many commits.

    Raises
    ------
    RecordError
        Names in the commits span a table that no study has: few of each other's rows and columns
        would be filled.
    """
    if math.prod(shape) > LARGEST_TABLE:
        raise RecordError(
            expected=f"commits that fill a table of at most {LARGEST_TABLE:,} numbers",
            got=f"names and seeds that span {math.prod(shape):,}",
            where="the records of influence, retraining and subsets",
            todo="delete the records in OUT/influence that are not yours",
        )
    return np.full(shape, np.nan)
