"""The strategies' test errors as dots on one scale, with standard errors, against Rand.

The scale is logarithmic where the errors span more than a decade, as in the figures.

Map: `DotPlot`, `Dot`, `place_dots`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sampimp.analysis.figures import ticks_between
from sampimp.analysis.report.contents import StrategyRow

REFERENCE = "rand"
"""The strategy with which the paper compares all others."""

EDGE = 0.05
"""Empty part of the scale at each end (arbitrary)."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A strategy's mean and the ends of one standard error, as per cent of the scale's width.

    NaN where there is no mean, or (low and high) no standard error.
    """

    row: StrategyRow
    mean: float
    low: float
    high: float

    @property
    def is_drawn(self) -> bool:
        """Whether there is a mean to draw."""
        return bool(np.isfinite(self.mean))

    @property
    def has_error(self) -> bool:
        """Whether there is a standard error to draw."""
        return bool(np.isfinite([self.low, self.high]).all())


@dataclass(frozen=True, kw_only=True)
class DotPlot:
    """Dots in the order of their means, those without a mean last.

    Attributes
    ----------
    reference
        Place of Rand's mean on the scale; None if Rand has none.
    ticks
        Places on the scale, with the test error there in per cent.
    """

    dots: Sequence[Dot]
    reference: float | None
    ticks: Sequence[tuple[float, str]]
    is_logarithmic: bool


def place_dots(rows: Sequence[StrategyRow]) -> DotPlot:
    """Return where each strategy's test error is on a common scale.

    Examples
    --------
    >>> def row(name, mean):
    ...     return StrategyRow(
    ...         strategy=name, mean=mean, error=0.01, runs=5, started=5, diverged=0
    ...     )
    >>> plot = place_dots([row("rand", 0.2), row("nlo", 0.1)])
    >>> [dot.row.strategy for dot in plot.dots], [label for _, label in plot.ticks]
    (['nlo', 'rand'], ['10', '15', '20'])
    """
    error = np.nan_to_num([row.error for row in rows])
    mean = np.array([row.mean for row in rows], dtype=float)
    ends = np.stack([mean - error, mean + error])
    known = ends[np.isfinite(ends)]
    if not known.size:
        dots = [Dot(row=row, mean=np.nan, low=np.nan, high=np.nan) for row in rows]
        return DotPlot(dots=dots, reference=None, ticks=(), is_logarithmic=False)
    low, high = known.min(), known.max()
    is_logarithmic = bool(low > 0 and high > 10 * low)
    if is_logarithmic:
        low, high = np.log([low, high])
    if low == high:  # one mean without a standard error is drawn in the middle
        low, high = low - 0.5, high + 0.5
    width = high - low

    def place(value: float) -> float:
        position = (np.log(value) if is_logarithmic else value) - low
        return float(100 * (EDGE + (1 - 2 * EDGE) * position / width))

    dots = [
        Dot(
            row=row,
            mean=place(row.mean),
            low=place(row.mean - row.error),
            high=place(row.mean + row.error),
        )
        for row in rows
    ]
    dots.sort(key=lambda dot: (not dot.is_drawn, dot.mean if dot.is_drawn else 0.0))
    reference = [dot.mean for dot in dots if dot.row.strategy == REFERENCE and dot.is_drawn]
    limits = known.min(), known.max()
    ticks = ticks_between(100 * limits[0], 100 * limits[1], logarithmic=is_logarithmic)
    return DotPlot(
        dots=dots,
        reference=reference[0] if reference else None,
        ticks=[(place(tick / 100), f"{tick:g}") for tick in ticks],
        is_logarithmic=is_logarithmic,
    )
