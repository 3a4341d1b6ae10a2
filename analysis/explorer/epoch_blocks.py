"""Reading of a cube's arrays block by block, with NaN in place of what is damaged.

A chunk whose digest differs raises an error when it is read. Here its values become NaN and it is
named, so that the rest of a study can be seen. The names hold no path.

Map: `read_block`, `read_epochs`.
"""

from collections.abc import Iterator, Sequence

import dask
import dask.array as da
import numpy as np

from sampimp.errors import RecordError

READ_VALUES = 2**20
"""Largest number of values that are read at a time, unless one epoch has more (arbitrary)."""


def read_block(array: da.Array, words: str, damage: list[str]) -> np.ndarray:
    """Return the values of an array whose last dimension is that of the samples.

    Parameters
    ----------
    array
        Of floating point, or of bool, which becomes floating point where it is damaged.
    words
        What the array is, for the names of damage.
    damage
        Gets a line for each chunk that cannot be read.

    Examples
    --------
    >>> read_block(da.arange(3, chunks=2), "places", [])
    array([0, 1, 2])
    """
    try:
        return np.asarray(array.compute(scheduler="synchronous"))
    except RecordError:
        return _read_chunks(array, words, damage)


def _read_chunks(array: da.Array, words: str, damage: list[str]) -> np.ndarray:
    values = np.full(array.shape, np.nan, np.result_type(array.dtype, np.float32))
    ends = [np.cumsum((0, *sizes)) for sizes in array.chunks]
    for index in np.ndindex(array.numblocks):
        region = tuple(slice(e[i], e[i + 1]) for e, i in zip(ends, index, strict=True))
        try:
            values[region] = array.blocks[index].compute(scheduler="synchronous")
        except RecordError:
            last = region[-1]
            damage.append(f"{words}, samples {last.start} to {last.stop - 1}: the digest differs")
    return values


def read_epochs(
    array: da.Array, epochs: Sequence[int], words: str, damage: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield some epochs, from 1, with their values, a few of them in memory at a time.

    Parameters
    ----------
    array
        (epoch, ..., sample), of one run.
    epochs
        The epochs to read.
    words, damage
        As for `read_block`.
    """
    count = max(1, READ_VALUES // max(1, array[0].size))
    for start in range(0, len(epochs), count):
        part = epochs[start : start + count]
        blocks = [array[epoch - 1] for epoch in part]
        try:
            values = dask.compute(*blocks, scheduler="synchronous")
        except RecordError:
            values = tuple(
                read_block(block, f"{words}, epoch {epoch}", damage)
                for epoch, block in zip(part, blocks, strict=True)
            )
        yield from zip(part, values, strict=True)
