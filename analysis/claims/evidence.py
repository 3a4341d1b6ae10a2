"""The numbers behind the claims: the computed results, and estimates that several claims use.

Intervals over samples are bootstrap intervals (of rank correlations by
`kernels.bootstrap_spearman`, of totals by `kernels.bootstrap_sums`). Intervals over seeds are
Student's t of differences paired by seed. A claim about every epoch, pair or strategy uses the
smallest value and the smallest bounds, so that it holds only if it holds for each of them.

A run that diverged has no test error at the end. In differences of test error it counts with the
error of guessing, 1 - 1/C for C classes. A run that collapsed without diverging counts with its
measured error. A missing run is left out, and with it the other run of its seed.

Map: `Estimate` and `NO_ESTIMATE`; `NumberForm`; `Claim` (an entry of the table); `Evidence`
(results, test errors and distances); `third`, `smallest`, `early_and_late_means`, `subtract`,
`late_over_early`, `stored_correlation` (estimates for several sections of the paper).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from sampimp.analysis import kernels

Estimate = tuple[float, float, float]
"""A number and the ends of its 95 % interval; NaN ends if it has none."""

NO_ESTIMATE: Estimate = (np.nan, np.nan, np.nan)

Side = Literal["above", "below", "within"]
"""Side of the threshold that is claimed; `within` means closer to 0 than the threshold."""

NumberForm = Literal["correlation", "ratio", "share", "points", "relative"]
"""How a number is written: with three decimals, as a factor, in per cent, as a difference in
percentage points, or as a difference in per cent of a mean."""


class Evidence:
    """The computed results of one data set.

    Parameters
    ----------
    results
        Computed results by their key in `sampimp.analysis.results.analyse.RESULTS`.
    classes
        Number of classes, for the error of guessing.
    """

    def __init__(self, results: Mapping[str, xr.Dataset], classes: int) -> None:
        self.results = results
        self.chance = 1 - 1 / max(classes, 1)

    def folds(self) -> np.ndarray:
        """Return importance summed by fold, epoch and layer."""
        return self.results["decomposition"]["importance_by_fold"].values

    def folds_of_difficulty(self, name: str) -> np.ndarray:
        """Return the same for the easy, medium or hard samples alone."""
        against = self.results["importance_against_nll"]
        return against["importance_by_difficulty_and_fold"].sel(difficulty=name).values

    def final_error(self, strategy: str) -> xr.DataArray:
        """Return the test error at the end by seed; that of guessing for a diverged run."""
        curves = self.results["strategy_curves"]
        if strategy not in curves["strategy"].values:
            return xr.full_like(curves["final_test_error"].isel(strategy=0, drop=True), np.nan)
        curve = curves.sel(strategy=strategy, drop=True)
        diverged = np.isfinite(curve["diverged_epoch"])
        return curve["final_test_error"].where(~diverged, self.chance)

    def mean_error(self, strategies: Sequence[str]) -> xr.DataArray:
        """Return the mean over strategies by seed; NaN for a seed that one of them lacks."""
        errors = [self.final_error(name) for name in strategies]
        return sum(errors[1:], errors[0]) / len(errors)

    def error_difference(self, more: Sequence[str], less: Sequence[str]) -> Estimate:
        """Return mean test error of `more` minus that of `less`, paired, with t over seeds."""
        return kernels.t_interval((self.mean_error(more) - self.mean_error(less)).values)

    def distance(self, first: str, second: str) -> float:
        """Return the distance of two strategies' last states.

        NaN if one was not run, infinity if one diverged.
        """
        distance = self.results["parameter_paths"]["distance"]
        if not {first, second} <= set(distance["strategy"].values.tolist()):
            return np.nan
        value = float(distance.sel(strategy=first, other_strategy=second))
        return np.inf if np.isnan(value) else value

    def smallest_distance(self, pairs: Iterable[tuple[str, str]]) -> float:
        """Return the smallest distance among pairs of strategies."""
        return float(np.min([self.distance(first, second) for first, second in pairs]))

    def largest_distance(self, pairs: Iterable[tuple[str, str]]) -> float:
        """Return the largest distance among pairs of strategies."""
        return float(np.max([self.distance(first, second) for first, second in pairs]))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a number and a threshold.

    Attributes
    ----------
    section, sentence
        The paper's section, and its sentence in short words that keep the meaning.
    short
        The sentence in a few words.
    unit, words
        How the number is written, and the words around it.
    rule
        How the number is computed.
    side, threshold
        `above` or `below` the threshold, or `within`: closer to 0 than the threshold.
    needs
        Keys of the results that `estimate` reads.
    estimate
        Function of the evidence that returns the number and its interval.
    only, never
        Data sets to which the sentence applies, or does not apply.
    point
        True if the number itself decides: there is one run per strategy, or the number contains
        an interval already.
    activation
        `relu`, or `smooth` for any other, if the sentence is about such networks.
    finding
        What was measured, as a clause around the number that is true whatever the verdict; empty
        for a claim that no summary names.
    command
        The command that computes what `estimate` reads, where that is no part of a study.
    """

    section: str
    sentence: str
    short: str
    unit: NumberForm
    words: str
    rule: str
    side: Side
    threshold: float
    needs: tuple[str, ...]
    estimate: Callable[[Evidence], Estimate]
    only: str = ""
    never: str = ""
    point: bool = False
    activation: Literal["", "relu", "smooth"] = ""
    finding: str = ""
    command: str = ""


def third(epochs: int) -> int:
    """Return the number of early epochs, and of late ones: a third each, at least one."""
    return max(1, epochs // 3)


def smallest(estimates: Sequence[Estimate]) -> Estimate:
    """Return the smallest value and bounds: above a threshold only if every estimate is."""
    value, low, high = np.min(np.array(estimates), axis=0)  # NaN if any is NaN
    return float(value), float(low), float(high)


def early_and_late_means(value: xr.DataArray, bounds: xr.DataArray) -> tuple[Estimate, Estimate]:
    """Return the means of a curve and its bounds over the early and over the late third."""
    epochs = value.sizes["epoch"]
    if epochs < 3:
        return NO_ESTIMATE, NO_ESTIMATE
    k = third(epochs)
    other = [dim for dim in value.dims if dim != "epoch"]
    curves = [x.mean(other) for x in (value, bounds.sel(bound="low"), bounds.sel(bound="high"))]

    def means(epochs: slice) -> Estimate:
        values = [float(x.isel(epoch=epochs).mean("epoch", skipna=False)) for x in curves]
        return values[0], values[1], values[2]

    return means(slice(0, k)), means(slice(-k, None))


def subtract(first: Estimate, second: Estimate) -> Estimate:
    """Return a difference whose bounds are the widest possible.

    The bounds are differences of bounds: the two estimates are not independent.
    """
    return first[0] - second[0], first[1] - second[2], first[2] - second[1]


def late_over_early(folds: np.ndarray, layers: slice) -> Estimate:
    """Return the importance of some layers in the late third of the epochs over the early third.

    Parameters
    ----------
    folds : array [fold, epoch, layer]
    layers
        The layers that are summed.
    """
    epochs = folds.shape[1]
    if epochs < 3 or folds.shape[2] < 2:
        return NO_ESTIMATE
    k = third(epochs)

    def ratio(total: np.ndarray) -> np.ndarray:
        curve = total[..., layers].sum(-1)
        return curve[:, -k:].sum(-1) / curve[:, :k].sum(-1)

    return kernels.bootstrap_sums(folds, ratio)


def stored_correlation(evidence: Evidence, *, name: str, layer: int | None = None) -> Estimate:
    """Return a rank correlation of `importance_against_nll` with its interval.

    Parameters
    ----------
    evidence
        The computed results.
    name
        Variable of the result.
    layer
        Position of the layer, for a correlation by layer.
    """
    against = evidence.results["importance_against_nll"]
    value, bounds = against[name], against[f"{name}_interval"]
    if layer is not None:
        if against.sizes["layer"] < 2:
            return NO_ESTIMATE
        value, bounds = value.isel(layer=layer), bounds.isel(layer=layer)
    return float(value), float(bounds.sel(bound="low")), float(bounds.sel(bound="high"))
