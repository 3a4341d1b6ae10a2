"""Importance, NLL and influence of each sample by epoch, in 16 bits a value.

Importance and NLL: 0 is NaN, 1 exact zero, 65535 infinity. A code c of 2 to 65534 is exp(low +
(c - 2) / 65532 (high - low)), with the natural logarithms of the row's smallest and largest
positive finite value. A row that spans s natural logarithms has an error of at most s / 131,000:
0.1 % up to 57 decades.

Influence has a sign: 65534 is minus infinity, the codes c of 2 to 32767 are -exp(low + (c - 2) /
32765 (high - low)), with the logarithms of the smallest and largest magnitude, and those of 32768
to 65533 are the same without the minus, with c - 32768. The error is at most s / 65,500: 0.1 % up
to 28 decades.

Map: `encode_row`, `encode_signed_row`, `LogRange`, `read_history`, `read_influence`.
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
_POSITIVE, _MINUS_INFINITY = 32768, 65534
"""Of a row with a sign: the first code of the positive values, and minus infinity."""


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


def encode_signed_row(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the codes of values of both signs; `low` and `high` are logarithms of magnitudes.

    Examples
    --------
    >>> row = np.array([np.nan, 0, -1, -np.e, 1, np.e, np.inf, -np.inf], np.float32)
    >>> encode_signed_row(row, 0.0, 1.0)
    array([    0,     1,     2, 32767, 32768, 65533, 65535, 65534],
          dtype=uint16)
    """
    codes = np.zeros(values.shape, np.uint16)
    codes[values == 0] = _ZERO
    codes[values == np.inf] = _INFINITY
    codes[values == -np.inf] = _MINUS_INFINITY
    coded = (values != 0) & np.isfinite(values)
    steps = _POSITIVE - 1 - _FIRST
    place = (np.log(np.abs(values[coded].astype(np.float64))) - low) / (high - low)
    first = np.where(values[coded] > 0, _POSITIVE, _FIRST)
    codes[coded] = first + np.clip(np.rint(steps * place), 0, steps)
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


def read_influence(
    node: ExploredNode,
    run: ExploredRun,
    target: int,
    epochs: Sequence[int],
    step: int,
    damage: list[str],
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the rows of a run's influence on a target, one a layer, and the codes.

    Parameters
    ----------
    node, run
        The run.
    target
        Position of the target in the cube.
    epochs, step, damage
        As for `read_history`.

    Returns
    -------
    list of dict
        Layer, low and high of each row.
    array [L, T, N] of uint16
    """
    layers = [str(layer) for layer in node.cube["layer"].values]
    samples = -(-node.cube.sizes["sample"] // step)
    array = run.of(node.cube["influence"]).isel(target=target).data
    words = f"influence of {run.name} on {node.cube['target'].values[target]}"
    values = np.empty((len(layers), len(epochs), samples), np.float32)
    # Read once: a chunk holds up to 16 targets, and takes more time than these values memory.
    for place, (_, by_layer) in enumerate(read_epochs(array, epochs, words, damage)):
        values[:, place] = by_layer[:, ::step]
    rows: list[dict[str, Any]] = []
    codes = np.empty(values.shape, np.uint16)
    for place, layer in enumerate(layers):
        span = LogRange()
        span.include(np.abs(values[place]))
        low, high = span.bounds()
        codes[place] = encode_signed_row(values[place], low, high)
        rows.append({"layer": layer, "low": low, "high": high})
    return rows, codes
