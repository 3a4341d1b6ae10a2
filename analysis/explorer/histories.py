"""Importance and NLL of each sample by epoch, in 16 bits a value.

0 is NaN, 1 exact zero, 65535 infinity. A code c of 2 to 65534 is exp(low + (c - 2) / 65532 (high -
low)), with the natural logarithms of the row's smallest and largest positive finite value. A row
that spans s natural logarithms has an error of at most s / 131,000: 0.1 % up to 57 decades.

Map: `encode_row`, `LogRange`, `read_history`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.analysis.explorer.epoch_blocks import read_epochs
from sampimp.analysis.explorer.explored_study import ExploredNode, ExploredRun

PAGE = 4096
"""Samples in one file of a history, or of rows (arbitrary: 2 MB for 50 epochs and 5 rows)."""
_NAN, _ZERO, _FIRST, _LAST, _INFINITY = 0, 1, 2, 65534, 65535


@dataclass
class LogRange:
    """Natural logarithms of the smallest and largest positive finite value seen."""

    low: float = np.inf
    high: float = -np.inf

    def include(self, values: np.ndarray) -> None:
        """Widen the range by values."""
        positive = values[(values > 0) & np.isfinite(values)].astype(np.float64)
        if positive.size:
            self.low = min(self.low, float(np.log(positive.min())))
            self.high = max(self.high, float(np.log(positive.max())))

    def bounds(self) -> tuple[float, float]:
        """Return a range of positive width, (0, 1) if nothing was seen."""
        if self.low > self.high:
            return 0.0, 1.0
        return self.low, self.high if self.high > self.low else self.low + 1


def encode_row(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the codes of values; negative ones, which have no code, as NaN.

    Examples
    --------
    >>> encode_row(np.array([np.nan, 0, 1, np.e, np.inf], np.float32), 0.0, 1.0)
    array([    0,     1,     2, 65534, 65535], dtype=uint16)
    """
    codes = np.zeros(values.shape, np.uint16)
    codes[values == 0] = _ZERO
    codes[values == np.inf] = _INFINITY
    coded = (values > 0) & np.isfinite(values)
    place = (np.log(values[coded].astype(np.float64)) - low) / (high - low)
    codes[coded] = np.clip(np.rint(_FIRST + (_LAST - _FIRST) * place), _FIRST, _LAST)
    return codes


def read_history(
    node: ExploredNode, run: ExploredRun, epochs: Sequence[int], step: int, damage: list[str]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the rows of a run's history, and the codes.

    The values are read twice, for the ranges and for the codes, so that only the codes of all
    epochs are in memory.

    Parameters
    ----------
    node, run
        The run.
    epochs
        The epochs to read.
    step
        Every how many samples one is shown.
    damage
        Gets a line for each chunk that cannot be read; its values are NaN.

    Returns
    -------
    list of dict
        Variable, layer, low and high of each row.
    array [R, T, N] of uint16
    """
    layers = [str(layer) for layer in node.cube["layer"].values]
    rows: list[tuple[str, str | None]] = [*(("importance", layer) for layer in layers)]
    rows.append(("nll", None))
    ranges = [LogRange() for _ in rows]
    for place, _, values in _row_values(node, run, epochs, step, []):
        ranges[place].include(values)
    bounds = [each.bounds() for each in ranges]
    samples = -(-node.cube.sizes["sample"] // step)
    codes = np.empty((len(rows), len(epochs), samples), np.uint16)
    for place, time, values in _row_values(node, run, epochs, step, damage):
        codes[place, time] = encode_row(values, *bounds[place])
    described = [
        {"variable": variable, "layer": layer, "low": low, "high": high}
        for (variable, layer), (low, high) in zip(rows, bounds, strict=True)
    ]
    return described, codes


def _row_values(
    node: ExploredNode, run: ExploredRun, epochs: Sequence[int], step: int, damage: list[str]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield row, position of the epoch, and values of the samples."""
    places = {epoch: place for place, epoch in enumerate(epochs)}
    layers = node.cube.sizes["layer"]
    for name, first in (("importance", 0), ("nll", layers)):
        array = run.of(node.cube[name]).data
        for epoch, values in read_epochs(array, epochs, f"{name} of {run.name}", damage):
            for place, row in enumerate(np.atleast_2d(values)):
                yield first + place, places[epoch], row[::step]
