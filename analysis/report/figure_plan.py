"""How one figure of the report is made from one result.

Map: `FigurePlan`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr
from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class FigurePlan:
    """How one figure is made from one result.

    Attributes
    ----------
    number
        The figure's number in the paper; from 12, of sections 4 and 5, whose figures the paper
        lacks.
    name
        Stem of its files.
    title
        The question that it answers.
    result
        Key of the result in `sampimp.analysis.results.analyse.RESULTS`.
    needs
        Variables without which there is nothing to draw.
    draw
        Function of the result and the cube that returns the figure.
    caption
        What is shown; method and source are added from the result's attributes.
    missing
        What the study lacks if there is nothing to draw.
    optional
        True for a figure that is left out without a message if there is nothing to draw.
    """

    number: str
    name: str
    title: str
    result: str
    needs: tuple[str, ...]
    draw: Callable[[xr.Dataset, xr.Dataset], Figure]
    caption: str
    missing: str
    optional: bool = False
