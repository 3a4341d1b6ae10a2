"""Which of the paper's findings hold in our numbers? (sections 3.2 to 3.6).

Each claim is a sentence of the paper, turned into one number and one threshold. The verdict is
decided by the number's 95 % interval alone: *holds* if all of it is on the claimed side of the
threshold, *does not hold* if all of it is on the other side, *not enough data* if it contains the
threshold or cannot be made. Sentences and thresholds are from the paper where it gives them and
were fixed before the runs they are applied to; where the paper gives none ("early", "majority",
"very similar"), the rule says what was taken.

Intervals: over samples, a bootstrap (of rank correlations by `kernels.bootstrap_spearman`, of
totals by `kernels.bootstrap_sums`); over seeds, Student's t of differences paired by seed. Where a
claim speaks of every epoch, pair or strategy, value and bounds are the smallest of all, so that
*holds* means that every one of them does. Nothing is corrected for the number of claims.

A run that diverged has no test error at the end. In differences of test error it counts with the
error of guessing, 1 - 1/C for C classes; a run that collapsed without diverging counts with the
error it has; a missing run is left out, and so is its seed on the other side of the difference.

Map: `CLAIMS` (the table), `claims` (the verdicts), `judge` (the rule).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.analysis.runs import PAPER, codes_of_labels, short_name

Estimate = tuple[float, float, float]
"""A number and the two ends of its interval; NaN ends where there is none."""

MIXED = ("rand", "nlm", "sim")
SORTED = ("nlo", "rnlo", "sio", "rsio")
"""Batches of mixed, and of comparable difficulty (section 3.6)."""

MARGIN = 0.1
"""Test errors within a tenth of Rand's count as equal, beyond it as drastically different
(arbitrary)."""

VERDICTS = ("holds", "does not hold", "not enough data")

UNKNOWN: Estimate = (np.nan, np.nan, np.nan)


class Evidence:
    """The computed results, and what several claims read from them."""

    def __init__(self, results: Mapping[str, xr.Dataset], classes: int) -> None:
        self.results = results
        self.chance = 1 - 1 / max(classes, 1)

    def folds(self) -> np.ndarray:
        """Return importance by fold, epoch and layer."""
        return self.results["decomposition"]["importance_by_fold"].values

    def folds_of_difficulty(self, name: str) -> np.ndarray:
        """Return the importance of the easy, medium or hard samples by fold, epoch and layer."""
        against = self.results["importance_against_nll"]
        return against["importance_by_difficulty_and_fold"].sel(difficulty=name).values

    def final_error(self, strategy: str) -> xr.DataArray:
        """Return the test error at the end by seed; guessing for a diverged run."""
        curves = self.results["strategy_curves"]
        if strategy not in curves["strategy"].values:
            return xr.full_like(curves["final_test_error"].isel(strategy=0, drop=True), np.nan)
        own = curves.sel(strategy=strategy, drop=True)
        gone = np.isfinite(own["diverged_epoch"])
        return own["final_test_error"].where(~gone, self.chance)

    def mean_error(self, strategies: Sequence[str]) -> xr.DataArray:
        """Return the mean over strategies by seed; NaN for a seed that one of them lacks."""
        errors = [self.final_error(name) for name in strategies]
        return sum(errors[1:], errors[0]) / len(errors)

    def difference(self, more: Sequence[str], less: Sequence[str]) -> Estimate:
        """Return the paired difference of test error with its interval over seeds."""
        return kernels.t_interval((self.mean_error(more) - self.mean_error(less)).values)

    def distance(self, one: str, other: str) -> float:
        """Return how far apart two strategies end: NaN without one, infinity if one diverged."""
        distance = self.results["parameter_paths"]["distance"]
        if not {one, other} <= set(distance["strategy"].values.tolist()):
            return np.nan
        apart = float(distance.sel(strategy=one, other_strategy=other))
        return np.inf if np.isnan(apart) else apart

    def least(self, pairs: Iterable[tuple[str, str]]) -> float:
        """Return the smallest distance between the end points of pairs."""
        return float(np.min([self.distance(one, other) for one, other in pairs]))

    def most(self, pairs: Iterable[tuple[str, str]]) -> float:
        """Return the largest distance between the end points of pairs."""
        return float(np.max([self.distance(one, other) for one, other in pairs]))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a number and a threshold.

    Attributes
    ----------
    section, sentence
        Where and what, in short words that keep the paper's meaning.
    rule
        How the number is made.
    side, threshold
        `above` or `below` the threshold, or `within`: closer to 0 than it.
    needs
        The results it reads.
    estimate
        Makes the number.
    only, never
        Data sets that the sentence is about, or is not.
    point
        True where one run per strategy allows no interval: decided by the number itself.
    """

    section: str
    sentence: str
    rule: str
    side: Literal["above", "below", "within"]
    threshold: float
    needs: tuple[str, ...]
    estimate: Callable[[Evidence], Estimate]
    only: str = ""
    never: str = ""
    point: bool = False


def judge(
    estimate: Estimate,
    side: Literal["above", "below", "within"],
    threshold: float,
    *,
    point: bool = False,
) -> str:
    """Return the verdict on a number with its interval.

    Parameters
    ----------
    estimate
        Value, low, high.
    side, threshold
        `above` or `below` the threshold, or `within`: both bounds closer to 0 than it.
    point
        Decide by the value where there is no interval.

    Examples
    --------
    >>> judge((0.95, 0.94, 0.96), "above", 0.9), judge((0.95, 0.89, 0.97), "above", 0.9)
    ('holds', 'not enough data')
    >>> judge((0.02, 0.01, 0.03), "within", 0.1), judge((0.3, 0.2, 0.4), "within", 0.1)
    ('holds', 'does not hold')
    """
    value, low, high = estimate
    if point and np.isnan(low) and np.isnan(high):
        low = high = value
    if np.isnan([value, low, high]).any():
        return "not enough data"
    if side == "below":
        low, high, threshold = -high, -low, -threshold
    if side == "within":
        inside = -threshold < low and high < threshold
        outside = low > threshold or high < -threshold
    else:
        inside, outside = low > threshold, high < threshold
    return "holds" if inside else "does not hold" if outside else "not enough data"


def third(epochs: int) -> int:
    """Return how many epochs are early, and how many late: a third each, at least one."""
    return max(1, epochs // 3)


def _smallest(estimates: Sequence[Estimate]) -> Estimate:
    """Return the smallest value and bounds: above a threshold only if every estimate is."""
    value, low, high = np.min(np.array(estimates), axis=0)  # NaN if any is
    return float(value), float(low), float(high)


def _least_stable(reference: str) -> Callable[[Evidence], Estimate]:
    def estimate(evidence: Evidence) -> Estimate:
        result = evidence.results["stability"]
        if reference not in result["reference"].values:
            return UNKNOWN
        own = result.sel(reference=reference)
        bounds = own["rank_correlation_interval"]
        return (
            float(own["rank_correlation"].min()),
            float(bounds.sel(bound="low").min()),
            float(bounds.sel(bound="high").min()),
        )

    return estimate


def _change(value: xr.DataArray, bounds: xr.DataArray, *, late_first: bool) -> Estimate:
    """Return the change of a curve between the early and the late third.

    The bounds are differences of bounds, the widest possible: epochs are not independent.
    """
    epochs = value.sizes["epoch"]
    if epochs < 3:
        return UNKNOWN
    k = third(epochs)
    other = [dim for dim in value.dims if dim != "epoch"]
    curves = [x.mean(other) for x in (value, bounds.sel(bound="low"), bounds.sel(bound="high"))]
    start = [float(x.isel(epoch=slice(0, k)).mean("epoch", skipna=False)) for x in curves]
    end = [float(x.isel(epoch=slice(-k, None)).mean("epoch", skipna=False)) for x in curves]
    one, two = (end, start) if late_first else (start, end)
    return one[0] - two[0], one[1] - two[2], one[2] - two[1]


def _early_more_consistent(evidence: Evidence) -> Estimate:
    result = evidence.results["stability"]
    if "shuffle" not in result["reference"].values:
        return UNKNOWN
    own = result.sel(reference="shuffle")
    return _change(own["rank_correlation"], own["rank_correlation_interval"], late_first=False)


def _output_per_parameter(evidence: Evidence) -> Estimate:
    result = evidence.results["decomposition"]
    if "parameter_count" not in result or result.sizes["layer"] < 2:
        return UNKNOWN
    count = result["parameter_count"].values

    def least_ratio(total: np.ndarray) -> np.ndarray:
        density = total / count
        return (density[..., -1] / density[..., :-1].max(-1)).min(-1)

    return kernels.bootstrap_sums(evidence.folds(), least_ratio)


def _output_peak(evidence: Evidence) -> Estimate:
    folds = evidence.folds()
    epochs = folds.shape[1]
    if epochs < 3:
        return UNKNOWN
    return kernels.bootstrap_sums(folds, lambda t: (t[..., -1].argmax(-1) + 1) / epochs)


def _late_over_early(folds: np.ndarray, layers: slice) -> Estimate:
    epochs = folds.shape[1]
    if epochs < 3 or folds.shape[2] < 2:
        return UNKNOWN
    k = third(epochs)

    def ratio(total: np.ndarray) -> np.ndarray:
        curve = total[..., layers].sum(-1)
        return curve[:, -k:].sum(-1) / curve[:, :k].sum(-1)

    return kernels.bootstrap_sums(folds, ratio)


def _lower_layers_later(evidence: Evidence) -> Estimate:
    folds = evidence.folds()
    epochs = folds.shape[1]
    if epochs < 3 or folds.shape[2] < 2:
        return UNKNOWN
    k = third(epochs)

    def share(total: np.ndarray) -> np.ndarray:
        curve = total[..., :-1].sum(-1)
        # Over the share that these epochs have of all: 1 if importance did not change.
        return curve[:, k:].sum(-1) / curve.sum(-1) / (1 - k / epochs)

    return kernels.bootstrap_sums(folds, share)


def _layer_ratio(one: int, others: Sequence[int] | None) -> Callable[[Evidence], Estimate]:
    """Return the ratio of a layer's importance to the largest of others' (all others if None)."""

    def estimate(evidence: Evidence) -> Estimate:
        folds = evidence.folds()
        layers = folds.shape[2]
        rest = [d for d in range(layers) if d != one] if others is None else list(others)
        if not rest or max(one, *rest) >= layers - (others is not None):
            return UNKNOWN

        def ratio(total: np.ndarray) -> np.ndarray:
            by_layer = total.sum(1)
            return by_layer[:, one] / by_layer[:, rest].max(-1)

        return kernels.bootstrap_sums(folds, ratio)

    return estimate


def _classes_differ(evidence: Evidence) -> Estimate:
    """Return the ratio of the classes that were most and least important in the other half."""
    against = evidence.results["importance_against_nll"]
    tau = against["overall_importance"].values
    labels, codes = np.unique(against["label"].values, return_inverse=True)
    half = np.arange(len(tau)) % 2 == 0
    if len(labels) < 2:
        return UNKNOWN
    chosen = []
    for part in (half, ~half):
        size = np.bincount(codes[part], minlength=len(labels))
        if (size < 2).any():
            return UNKNOWN
        chosen.append(kernels.sum_by_group(tau[part], codes[part], len(labels)) / size)
    most, least = int(chosen[0].argmax()), int(chosen[0].argmin())
    other_tau, other_code = tau[~half], codes[~half]

    def ratio(columns: np.ndarray, weight: np.ndarray) -> float:
        total = np.bincount(other_code, weight * columns, len(labels))
        size = np.bincount(other_code, weight, len(labels))
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / size
            return float(mean[most] / mean[least])

    return kernels.bootstrap_samples(other_tau, ratio)


def _small_importance(evidence: Evidence) -> Estimate:
    tau = evidence.results["importance_against_nll"]["overall_importance"].values

    def below(values: np.ndarray, weight: np.ndarray) -> float:
        half_mean = np.average(values, weights=weight) / 2
        return float(weight[values < half_mean].sum() / weight.sum())

    return kernels.bootstrap_samples(tau, below)


def _top(fraction: float) -> Callable[[Evidence], Estimate]:
    def estimate(evidence: Evidence) -> Estimate:
        tau = evidence.results["importance_against_nll"]["overall_importance"].values
        return kernels.bootstrap_samples(
            tau, lambda values, weight: kernels.top_share(values, fraction, weight)
        )

    return estimate


def _top_in_lower_layers(evidence: Evidence) -> Estimate:
    against = evidence.results["importance_against_nll"]
    tau = against["overall_importance"].values
    share = against["layer_share"].transpose("layer", "sample").values
    if len(share) < 2:
        return UNKNOWN
    order = np.argsort(-tau, kind="stable")
    columns = (np.stack([share[0] * tau, share[-1] * tau]))[:, order]

    def difference(columns: np.ndarray, weight: np.ndarray) -> float:
        sorted_weight = weight[order]
        before = np.cumsum(sorted_weight) - sorted_weight
        taken = np.clip(0.2 * sorted_weight.sum() - before, 0, sorted_weight)
        first, last = (columns * taken).sum(-1) / (columns * sorted_weight).sum(-1)
        return float(first - last)

    return kernels.bootstrap_samples(columns, difference)


def _stored(name: str, *, layer: int | None = None) -> Callable[[Evidence], Estimate]:
    """Return a rank correlation of `importance_against_nll` with its interval."""

    def estimate(evidence: Evidence) -> Estimate:
        against = evidence.results["importance_against_nll"]
        value, bounds = against[name], against[f"{name}_interval"]
        if layer is not None:
            if against.sizes["layer"] < 2:
                return UNKNOWN
            value, bounds = value.isel(layer=layer), bounds.isel(layer=layer)
        return float(value), float(bounds.sel(bound="low")), float(bounds.sel(bound="high"))

    return estimate


def _explained_by_nll(evidence: Evidence) -> Estimate:
    value, low, high = _stored("overall_rank_correlation")(evidence)
    ends = sorted((low**2, high**2))
    return value**2, 0.0 if low < 0 < high else ends[0], ends[1]


def _nll_more_correlated(evidence: Evidence) -> Estimate:
    against = evidence.results["importance_against_nll"]
    return _change(
        against["model_rank_correlation"],
        against["model_rank_correlation_interval"],
        late_first=True,
    )


def _easy_are_early(evidence: Evidence) -> Estimate:
    folds = evidence.folds_of_difficulty("easy")
    epochs = folds.shape[1]
    if epochs < 3:
        return UNKNOWN
    k = third(epochs)

    def share(total: np.ndarray) -> np.ndarray:
        curve = total.sum(-1)
        return curve[:, :k].sum(-1) / curve.sum(-1)

    return kernels.bootstrap_sums(folds, share)


def _hard_go_down(evidence: Evidence) -> Estimate:
    return _late_over_early(evidence.folds_of_difficulty("hard"), slice(0, -1))


def _clusters_against_nll(name: str) -> Callable[[Evidence], Estimate]:
    """Return the rank correlation, over clusters, of median final NLL with when or where."""

    def estimate(evidence: Evidence) -> Estimate:
        result = evidence.results["clusters"]
        if result.sizes["cluster"] < 5 or result.sizes["layer"] < 2:
            return UNKNOWN
        nll = result["nll_quantile"].sel(quantile=0.5).values
        other = result["mean_epoch"] if name == "mean_epoch" else result[name].isel(layer=-1)
        rows = np.stack([nll, other.values])
        low, high = kernels.bootstrap_spearman(rows, [(0, 1)], resamples=1000)[0]
        return float(kernels.spearman(*rows)), float(low), float(high)

    return estimate


def _every_mixed_below_every_sorted(evidence: Evidence) -> Estimate:
    return _smallest([evidence.difference([s], [m]) for s in SORTED for m in MIXED])


def _easy_first_worst(evidence: Evidence) -> Estimate:
    rest = ("rnlo", "rsio", *MIXED)
    return _smallest([evidence.difference([s], [o]) for s in ("nlo", "sio") for o in rest])


def _of_rand(evidence: Evidence, estimate: Estimate) -> Estimate:
    """Return a difference in units of Rand's mean test error, taken as known."""
    error = evidence.final_error("rand").values
    error = error[np.isfinite(error)]
    if not len(error) or error.mean() == 0:
        return UNKNOWN
    value, low, high = (x / float(error.mean()) for x in estimate)
    return value, low, high


def _mixed_equal(name: str) -> Callable[[Evidence], Estimate]:
    return lambda evidence: _of_rand(evidence, evidence.difference([name], ["rand"]))


def _order_matters(easy: str, hard: str) -> Callable[[Evidence], Estimate]:
    """Return the difference with the sign that makes it positive."""

    def estimate(evidence: Evidence) -> Estimate:
        value, low, high = _of_rand(evidence, evidence.difference([easy], [hard]))
        if value < 0:
            value, low, high = -value, -high, -low
        return value, low, high

    return estimate


def _training_error_rises(evidence: Evidence) -> Estimate:
    curves = evidence.results["strategy_curves"]
    k = third(curves.sizes["epoch"])
    estimates = []
    for name in ("nlo", "sio"):
        if name not in curves["strategy"].values or curves.sizes["epoch"] < 3:
            return UNKNOWN
        error = curves["train_error_by_seed"].sel(strategy=name).transpose("seed", "epoch").values
        gone = np.isfinite(curves["diverged_epoch"].sel(strategy=name).values)
        error = np.where(np.isnan(error) & gone[:, None], evidence.chance, error)
        estimates.append(kernels.t_interval(error[:, -k:].mean(1) - error[:, :k].mean(1)))
    return _smallest(estimates)


def _ratio(one: float, other: float) -> Estimate:
    """Return a ratio without an interval; NaN if it is not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.divide(one, other)), np.nan, np.nan


def _paths_of_mixed(evidence: Evidence) -> Estimate:
    return _ratio(evidence.least(product(MIXED, SORTED)), evidence.most(combinations(MIXED, 2)))


def _paths_of_reversed(evidence: Evidence) -> Estimate:
    apart = evidence.least([("nlo", "rnlo"), ("sio", "rsio")])
    return _ratio(apart, evidence.most(combinations(MIXED, 2)))


def _paths_alike(evidence: Evidence) -> Estimate:
    names = (*MIXED, *SORTED)
    way = evidence.results["parameter_paths"]["travelled"]
    if not set(names) <= set(way["strategy"].values.tolist()):
        return UNKNOWN
    mean = float(way.sel(strategy=list(names)).mean(skipna=True))
    return _ratio(evidence.most(combinations(names, 2)), mean)


_EARLY = "Early is the first third of the epochs, late the last (the paper gives no bounds)."
_OVER_SAMPLES = "Interval: bootstrap over samples."
_OVER_SEEDS = (
    "Interval: t over seeds, paired. A diverged run counts with the error of guessing, a collapsed "
    "one with its own."
)
_ONE_RUN = (
    "One run per strategy (seed 1): no interval, decided by the number itself. A run that diverged "
    "counts as infinitely far."
)
_STABILITY = ("stability",)
_TOTALS = ("decomposition",)
_SAMPLES = ("importance_against_nll",)
_CURVES = ("strategy_curves",)
_PATHS = ("parameter_paths",)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        section="3.2",
        sentence="Sample importance is stable under initialisation: rank correlation above 0.9 in "
        "all epochs.",
        rule="Smallest rank correlation of model importance over all epochs and pairs of "
        f"initialisations (shuffle: one sequence of batches for all). {_OVER_SAMPLES}",
        side="above",
        threshold=0.9,
        needs=_STABILITY,
        estimate=_least_stable("shuffle"),
    ),
    Claim(
        section="3.2",
        sentence="The same when each initialisation has its own sequence of batches (the paper "
        "does "
        "not say which it used).",
        rule="Smallest rank correlation of model importance over all epochs and pairs "
        f"(shuffle_by_seed). {_OVER_SAMPLES}",
        side="above",
        threshold=0.9,
        needs=_STABILITY,
        estimate=_least_stable("shuffle_by_seed"),
    ),
    Claim(
        section="3.2",
        sentence="Early epochs show higher consistency between initialisations.",
        rule=f"Mean rank correlation of the early epochs minus that of the late ones. {_EARLY} "
        "Interval: differences of the mean bounds.",
        side="above",
        threshold=0.0,
        needs=_STABILITY,
        estimate=_early_more_consistent,
    ),
    Claim(
        section="3.3",
        sentence="The output layer always has the largest importance per parameter.",
        rule="Importance per parameter of the output layer over the largest of the other "
        "layers, the "
        f"smallest such ratio of all epochs. {_OVER_SAMPLES}",
        side="above",
        threshold=1.0,
        needs=_TOTALS,
        estimate=_output_per_parameter,
    ),
    Claim(
        section="3.3",
        sentence="The output layer's contribution reaches its maximum in the early training stage.",
        rule="Epoch of the output layer's largest importance, as a fraction of all epochs: below "
        f"0.34, so in the first third. {_OVER_SAMPLES}",
        side="below",
        threshold=0.34,
        needs=_TOTALS,
        estimate=_output_peak,
    ),
    Claim(
        section="3.3",
        sentence="... and then drops.",
        rule=f"Importance of the output layer, late over early. {_EARLY} {_OVER_SAMPLES}",
        side="below",
        threshold=1.0,
        needs=_TOTALS,
        estimate=lambda evidence: _late_over_early(evidence.folds(), slice(-1, None)),
    ),
    Claim(
        section="3.3",
        sentence="In the lower layers, parameters are learned predominantly during the middle and "
        "late stage.",
        rule="Share of the importance of all layers below the output that falls after the early "
        "third, over the share that constant importance would have there. "
        f"{_EARLY} {_OVER_SAMPLES}",
        side="above",
        threshold=1.0,
        needs=_TOTALS,
        estimate=_lower_layers_later,
    ),
    Claim(
        section="3.3",
        sentence="The 2nd layer contributes more than the 3rd.",
        rule="Importance of hidden layer 2 over that of hidden layer 3, all epochs. "
        f"{_OVER_SAMPLES}",
        side="above",
        threshold=1.0,
        needs=_TOTALS,
        estimate=_layer_ratio(1, (2,)),
    ),
    Claim(
        section="3.3",
        sentence="The 1st layer provides the largest contribution (CIFAR-10).",
        rule=f"Importance of layer 1 over the largest of the others, all epochs. {_OVER_SAMPLES}",
        side="above",
        threshold=1.0,
        needs=_TOTALS,
        estimate=_layer_ratio(0, None),
        only="cifar10",
    ),
    Claim(
        section="3.3",
        sentence="All classes do not provide the same amount of importance.",
        rule="The most and the least important class per sample are found on every other "
        "sample; mean "
        f"overall importance of the one over the other, on the remaining samples. {_OVER_SAMPLES}",
        side="above",
        threshold=1.0,
        needs=_SAMPLES,
        estimate=_classes_differ,
    ),
    Claim(
        section="3.3",
        sentence="Most samples have small importance.",
        rule="Fraction of the samples with less than half of the mean overall importance (39 % "
        "if it "
        f"were spread exponentially). {_OVER_SAMPLES}",
        side="above",
        threshold=0.5,
        needs=_SAMPLES,
        estimate=_small_importance,
    ),
    Claim(
        section="3.3",
        sentence="The top 10 % of the samples contribute almost all the importance (MNIST).",
        rule="Share of overall importance held by the top 10 %; almost all is 90 %. "
        f"{_OVER_SAMPLES}",
        side="above",
        threshold=0.9,
        needs=_SAMPLES,
        estimate=_top(0.1),
        only="mnist",
    ),
    Claim(
        section="3.3",
        sentence="The top 20 % of the samples contribute the majority of the importance.",
        rule=f"Share of overall importance held by the top 20 %. {_OVER_SAMPLES}",
        side="above",
        threshold=0.5,
        needs=_SAMPLES,
        estimate=_top(0.2),
    ),
    Claim(
        section="3.3",
        sentence="... especially in the lower layers.",
        rule="Share of the top 20 % in the first layer's importance minus that in the output "
        "layer's. "
        f"{_OVER_SAMPLES}",
        side="above",
        threshold=0.0,
        needs=_SAMPLES,
        estimate=_top_in_lower_layers,
    ),
    Claim(
        section="3.4",
        sentence="Sample importance is positively correlated with negative log-likelihood.",
        rule=f"Rank correlation of overall importance with final NLL. {_OVER_SAMPLES}",
        side="above",
        threshold=0.0,
        needs=_SAMPLES,
        estimate=_stored("overall_rank_correlation"),
    ),
    Claim(
        section="3.4",
        sentence="NLL and importance become more correlated as training goes on.",
        rule="Rank correlation of an epoch's model importance with the NLL at its end, late minus "
        f"early. {_EARLY} Interval: differences of the mean bounds.",
        side="above",
        threshold=0.0,
        needs=_SAMPLES,
        estimate=_nll_more_correlated,
    ),
    Claim(
        section="3.4",
        sentence="NLL is not predictive of importance: many samples are high in one and low in the "
        "other.",
        rule="Square of the rank correlation of overall importance with final NLL: below half, so "
        f"that the ranks of one leave most of the other's unexplained. {_OVER_SAMPLES}",
        side="below",
        threshold=0.5,
        needs=_SAMPLES,
        estimate=_explained_by_nll,
    ),
    Claim(
        section="3.5",
        sentence="Easy samples act early, hard samples late.",
        rule="Rank correlation, over all samples, of final NLL with the sample's "
        "importance-weighted "
        f"mean epoch. {_OVER_SAMPLES}",
        side="above",
        threshold=0.0,
        needs=_SAMPLES,
        estimate=_stored("when_rank_correlation"),
    ),
    Claim(
        section="3.5",
        sentence="Easy samples shape the parameters near the output.",
        rule="Rank correlation of final NLL with the output layer's share of the sample's "
        "importance. "
        f"{_OVER_SAMPLES}",
        side="below",
        threshold=0.0,
        needs=_SAMPLES,
        estimate=_stored("where_rank_correlation", layer=-1),
    ),
    Claim(
        section="3.5",
        sentence="Hard samples shape the parameters near the input.",
        rule="Rank correlation of final NLL with the first layer's share of the sample's "
        "importance. "
        f"{_OVER_SAMPLES}",
        side="above",
        threshold=0.0,
        needs=_SAMPLES,
        estimate=_stored("where_rank_correlation", layer=0),
    ),
    Claim(
        section="3.5",
        sentence="Most of the importance of easy samples is concentrated in the first epochs.",
        rule="Share of the importance of the easy half of the samples (by final NLL) in the early "
        f"third. {_EARLY} {_OVER_SAMPLES}",
        side="above",
        threshold=0.5,
        needs=_SAMPLES,
        estimate=_easy_are_early,
    ),
    Claim(
        section="3.5",
        sentence="As training goes on, the importance of hard samples for the lower layers becomes "
        "larger.",
        rule="Importance of the hardest tenth (by final NLL) in all layers below the output, late "
        f"over early. {_EARLY} {_OVER_SAMPLES}",
        side="above",
        threshold=1.0,
        needs=_SAMPLES,
        estimate=_hard_go_down,
    ),
    Claim(
        section="3.5",
        sentence="The harder a cluster of one class, the later it acts.",
        rule="Rank correlation, over at least 5 clusters, of median final NLL with mean epoch. "
        "Interval: bootstrap over clusters.",
        side="above",
        threshold=0.0,
        needs=("clusters",),
        estimate=_clusters_against_nll("mean_epoch"),
    ),
    Claim(
        section="3.5",
        sentence="The harder a cluster of one class, the farther from the output it acts.",
        rule="Rank correlation, over at least 5 clusters, of median final NLL with the output "
        "layer's "
        "share. Interval: bootstrap over clusters.",
        side="below",
        threshold=0.0,
        needs=("clusters",),
        estimate=_clusters_against_nll("layer_share"),
    ),
    Claim(
        section="3.6",
        sentence="Batches of comparable difficulty are worse than mixed ones.",
        rule="Final test error, mean of NLO, RNLO, SIO and RSIO minus mean of Rand, NLM and SIM. "
        f"{_OVER_SEEDS}",
        side="above",
        threshold=0.0,
        needs=_CURVES,
        estimate=lambda evidence: evidence.difference(SORTED, MIXED),
    ),
    Claim(
        section="3.6",
        sentence="Rand, NLM and SIM have the lowest test error of all.",
        rule="Final test error of NLO, RNLO, SIO, RSIO minus that of Rand, NLM, SIM: the "
        "smallest of "
        f"the 12 differences. {_OVER_SEEDS}",
        side="above",
        threshold=0.0,
        needs=_CURVES,
        estimate=_every_mixed_below_every_sorted,
    ),
    Claim(
        section="3.6",
        sentence="NLM is about as good as Rand (Fig. 7).",
        rule="Final test error of NLM minus Rand's, over Rand's mean; equal is within 10 % "
        f"(arbitrary). {_OVER_SEEDS}",
        side="within",
        threshold=MARGIN,
        needs=_CURVES,
        estimate=_mixed_equal("nlm"),
    ),
    Claim(
        section="3.6",
        sentence="SIM is about as good as Rand (Fig. 7).",
        rule="Final test error of SIM minus Rand's, over Rand's mean; equal is within 10 % "
        f"(arbitrary). {_OVER_SEEDS}",
        side="within",
        threshold=MARGIN,
        needs=_CURVES,
        estimate=_mixed_equal("sim"),
    ),
    Claim(
        section="3.6",
        sentence="Training on easy samples first and hard ones later is counter-productive.",
        rule="Final test error, mean of NLO and SIO (easy first) minus mean of RNLO and RSIO (hard "
        f"first). {_OVER_SEEDS}",
        side="above",
        threshold=0.0,
        needs=_CURVES,
        estimate=lambda evidence: evidence.difference(("nlo", "sio"), ("rnlo", "rsio")),
    ),
    Claim(
        section="3.6",
        sentence="NLO and SIO, easy first, are the worst (CIFAR-10).",
        rule="Final test error of NLO and SIO minus that of each other strategy: the smallest "
        "of the "
        f"10 differences. {_OVER_SEEDS}",
        side="above",
        threshold=0.0,
        needs=_CURVES,
        estimate=_easy_first_worst,
        only="cifar10",
    ),
    Claim(
        section="3.6",
        sentence="The training error of NLO and SIO goes up after the early stage (CIFAR-10).",
        rule=f"Training error late minus early, the smaller of the two strategies. {_EARLY} "
        f"{_OVER_SEEDS}",
        side="above",
        threshold=0.0,
        needs=_CURVES,
        estimate=_training_error_rises,
        only="cifar10",
    ),
    Claim(
        section="3.6",
        sentence="The order of the same batches matters: NLO and RNLO are drastically different.",
        rule="Difference of final test error between NLO and RNLO, whichever sign, over Rand's "
        "mean; "
        f"drastic is beyond 10 % (arbitrary). {_OVER_SEEDS}",
        side="above",
        threshold=MARGIN,
        needs=_CURVES,
        estimate=_order_matters("nlo", "rnlo"),
    ),
    Claim(
        section="3.6",
        sentence="The order of the same batches matters: SIO and RSIO are drastically different.",
        rule="Difference of final test error between SIO and RSIO, whichever sign, over Rand's "
        "mean; "
        f"drastic is beyond 10 % (arbitrary). {_OVER_SEEDS}",
        side="above",
        threshold=MARGIN,
        needs=_CURVES,
        estimate=_order_matters("sio", "rsio"),
    ),
    Claim(
        section="3.6",
        sentence="Mixed batches take the parameters another way than batches of comparable "
        "difficulty.",
        rule="Distance between end points in parameter space: the smallest from a mixed "
        "strategy to "
        f"one of comparable difficulty, over the largest among the mixed. {_ONE_RUN}",
        side="above",
        threshold=1.0,
        needs=_PATHS,
        estimate=_paths_of_mixed,
        never="mnist",
        point=True,
    ),
    Claim(
        section="3.6",
        sentence="The same batches in reversed order converge to different points.",
        rule="Distance between end points in parameter space: the smaller of NLO to RNLO and "
        "SIO to "
        f"RSIO, over the largest among the mixed. {_ONE_RUN}",
        side="above",
        threshold=1.0,
        needs=_PATHS,
        estimate=_paths_of_reversed,
        never="mnist",
        point=True,
    ),
    Claim(
        section="3.6",
        sentence="The converging path is very similar for all batch constructions (MNIST).",
        rule="Largest distance between end points of the seven strategies, over their mean "
        "distance "
        f"from start to end; very similar is below a half (arbitrary). {_ONE_RUN}",
        side="below",
        threshold=0.5,
        needs=_PATHS,
        estimate=_paths_alike,
        only="mnist",
        point=True,
    ),
)
"""The paper's claims. A sentence about one data set is judged on that one alone."""


def claims(cube: xr.Dataset, results: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Return the paper's claims, our numbers for them, and the verdicts.

    Parameters
    ----------
    cube
        One node of the cube.
    results
        Computed results by their key in `sampimp.analysis.analyse.RESULTS`; those that are missing
        leave
        their claims at "not enough data". `sampimp.analysis.analyse.analyse` makes them, and this
        table.

    Returns
    -------
    Dataset, in memory, on dim claim
        section, sentence, scope (data set, or "all"), number (value and interval as text), value,
        low, high, rule, side, threshold, verdict.

    Examples
    --------
    >>> from sampimp.analysis.runs import small_cube
    >>> from sampimp.analysis.analyse import analyse
    >>> table = analyse(small_cube())["claims"].set_index(claim="sentence")
    >>> table["verdict"].sel(claim="Easy samples act early, hard samples late.").item()
    'holds'

    References
    ----------
    Gao & Jojic (2017), sections 3.2 to 3.6.
    """
    evidence = Evidence(results, len(codes_of_labels(cube)[0]))
    name = short_name(cube)
    asked = [
        claim
        for claim in CLAIMS
        if (not claim.only or name.startswith(claim.only))
        and (not claim.never or not name.startswith(claim.never))
    ]
    estimates = [
        claim.estimate(evidence) if all(key in results for key in claim.needs) else UNKNOWN
        for claim in asked
    ]
    columns = {
        "section": [claim.section for claim in asked],
        "sentence": [claim.sentence for claim in asked],
        "scope": [claim.only or "all" for claim in asked],
        "number": [_say(estimate) for estimate in estimates],
        "rule": [_state(claim) for claim in asked],
        "side": [claim.side for claim in asked],
        "verdict": [
            judge(estimate, claim.side, claim.threshold, point=claim.point)
            for claim, estimate in zip(asked, estimates, strict=True)
        ],
    }
    numbers = np.array(estimates, dtype=np.float64).reshape(len(asked), 3)
    result = xr.Dataset(
        {
            **{key: ("claim", np.array(value, dtype=str)) for key, value in columns.items()},
            "value": ("claim", numbers[:, 0]),
            "low": ("claim", numbers[:, 1]),
            "high": ("claim", numbers[:, 2]),
            "threshold": ("claim", np.array([claim.threshold for claim in asked])),
        },
        coords={"claim": np.arange(1, len(asked) + 1)},
        attrs={
            "method": "one number and one threshold per claim; holds if its 95 % interval is "
            "wholly "
            "on the claimed side, does not hold if wholly on the other, not enough data otherwise",
            "figure": "none",
            "source": f"{PAPER}, sections 3.2 to 3.6",
            "dataset": str(cube.attrs.get("dataset", "")),
        },
    )
    long_names = {
        "section": "section of the paper",
        "sentence": "claim",
        "scope": "data set that the claim is about",
        "number": "our number, with its 95 % interval",
        "rule": "how the number is made and judged",
        "side": "side of the threshold that is claimed",
        "verdict": "verdict",
        "value": "our number",
        "low": "lower end of its 95 % interval",
        "high": "upper end of its 95 % interval",
        "threshold": "threshold",
    }
    for key, long_name in long_names.items():
        result[key].attrs = {"units": "1", "long_name": long_name}
    return result


def _say(estimate: Estimate) -> str:
    """Return a number with its interval as text."""
    value, low, high = estimate
    if np.isnan(value):
        return "none"
    if np.isnan([low, high]).any():
        return f"{value:.3g}"
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def _state(claim: Claim) -> str:
    """Return the rule with its threshold."""
    sides = {
        "above": f"Holds above {claim.threshold:g}.",
        "below": f"Holds below {claim.threshold:g}.",
        "within": f"Holds within {claim.threshold:g} of 0.",
    }
    return f"{claim.rule} {sides[claim.side]}"
