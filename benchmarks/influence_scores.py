"""Predicted against actual effects of removals: the sections of `influence.py` that retrain.

Scores are Spearman correlations over removals, by target, averaged (`sampimp.analysis.prediction`);
samples that were drawn at random and the most important ones are judged apart. Each score has its
interval by bootstrap over removals, and the score of one retraining against another from a jittered
start as its ceiling. Widths of smoothing are chosen on removals that no score uses.

Map: `Sizes`; `removals` (TSLOO under SGD), `smoothed` (AdamW), `finite` (why a score is below 1),
`paper_network` (LDS), `repeated` (the mean of many retrainings). `influence_importance` has the
scores of importance.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from influence_jobs import Removals, Setting
from influence_table import EXACT, Bench, Effects, NotStoredError, Row

from sampimp.analysis.kernels import spearman
from sampimp.analysis.prediction import (
    ceiling,
    ceiling_against_mean,
    predicted_effects,
    score_interval,
    tsloo,
)
from sampimp.influence.replay import Smoothing

EPS = (1e-6, 1e-5, 1e-4, 1e-3)
"""Least eps of AdamW in the pullback, from which the selection removals choose."""

WIDTHS = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Half-widths of a ReLU's bump, from which the selection removals choose."""

RETRAININGS = 12
"""Starts of the retrainings whose mean is a less noisy truth."""


PAPER = Setting(activation="relu", width=512)
METHODS_RUN = Setting(samples=2000, epochs=10)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of removals, subsets and targets; the smoke test has fewer."""

    removals: int = 30
    subsets: int = 100
    targets: int = 20
    many_targets: int = 96
    probes: int = 64
    retrainings: int = RETRAININGS
    method_subsets: int = 32
    shares: tuple[float, ...] = (0.99, 0.95, 0.5)
    epochs: tuple[int, int] = (5, 30)
    smooth_runs: tuple[Setting, ...] = tuple(
        Setting(dataset=dataset, samples=samples, activation=activation)
        for activation in ("gelu", "softplus")
        for dataset, samples in (("digits", 1500), ("mnist", 10_000))
    )
    wide_runs: tuple[Setting, ...] = (replace(PAPER, activation="gelu"),)
    paper: Setting = PAPER
    methods: Setting = METHODS_RUN

    exact_samples: int = 12
    resamples: int = 1000
    rounds: int = 3
    networks: tuple[str, ...] = ("cnn", "gru", "lstm", "transformer")
    network_steps: int = 10
    memory_samples: int | None = 50_000

    def runs(self) -> list[Setting]:
        """Return the float32 runs of all sections."""
        smooth = [
            replace(setting, epochs=epochs, optimizer=optimizer)
            for setting in self.smooth_runs
            for epochs in self.epochs
            for optimizer in ("sgd", "adamw")
        ]
        methods = [replace(self.methods, activation=name) for name in ("gelu", "relu")]
        return [*smooth, *methods, self.paper]

    @property
    def relu(self) -> Setting:
        """The run of all methods, with ReLUs."""
        return replace(self.methods, activation="relu")

    @property
    def gelu_runs(self) -> list[Setting]:
        """The smooth runs with GELU."""
        return [setting for setting in self.smooth_runs if setting.activation == "gelu"]

    def interval(
        self, score: Callable[..., float], *arrays: np.ndarray
    ) -> tuple[float, float, float]:
        """Return a score and its interval."""
        return score_interval(score, *arrays, resamples=self.resamples)

    @property
    def specs(self) -> tuple[str, ...]:
        """The test samples that scores average over."""
        return (f"sample:0..{self.targets - 1}",)

    def single(self, part: int = 0, weight: float = 0.0) -> dict[str, Removals]:
        """Return removals of single samples, by their name in the table."""
        make = partial(Removals, count=self.removals, part=part, weight=weight)
        return {"random": make(kind="random"), "most important": make(kind="top")}


def score_row(
    sizes: Sizes,
    check: str,
    predicted: np.ndarray,
    actual: np.ndarray,
    *,
    asked: float = np.nan,
    setting: str,
    note: str = "",
    seconds: float = np.nan,
    pairs: np.ndarray | None = None,
) -> Row:
    """Return the row of a score: predicted (R, T) against the first repeat of actual (R, T, K).

    The ceiling is that of `pairs`, by default of `actual`.
    """
    value, low, high = sizes.interval(tsloo, predicted, actual[..., 0])
    return Row(
        check=check,
        setting=setting,
        asked=asked,
        value=value,
        low=low,
        high=high,
        ceiling=ceiling(actual if pairs is None else pairs),
        note=note,
        seconds=seconds,
    )


def each_setting(settings: Iterable[Setting], rows_of: Callable[[Setting], list[Row]]) -> list[Row]:
    """Return the rows of several settings; one that is not stored yet has a row that says so."""
    rows = []
    for setting in settings:
        try:
            rows += rows_of(setting)
        except NotStoredError:
            rows.append(Row(check="not measured", setting=setting.words, value=np.nan))
    return rows


def removals(bench: Bench, sizes: Sizes, *, is_long: bool = False) -> list[Row]:
    """TSLOO under SGD on smooth activations."""
    settings = [replace(setting, epochs=sizes.epochs[is_long]) for setting in sizes.smooth_runs]
    settings += [] if is_long else sizes.wide_runs
    asked = 0.90 if is_long else 0.99
    return each_setting(settings, partial(_removal_rows, bench, sizes, asked))


def _removal_rows(bench: Bench, sizes: Sizes, asked: float, setting: Setting) -> list[Row]:
    repeats = bench.repeats(setting, sizes.single().values(), 2)
    bench.retrain([(setting, kind, repeats) for kind in sizes.single().values()])
    bench.reverse([(setting, specs, EXACT) for specs in (sizes.specs, ("mean",))])
    rows = []
    for name, kind in sizes.single().items():
        bench.seconds = 0.0
        effects = bench.effects(setting, kind, repeats)
        influence = bench.influence(setting, sizes.specs)
        row = partial(score_row, sizes, setting=f"{setting.words}; {name}")
        rows.append(
            row(
                f"TSLOO, {setting.epochs} epochs",
                predicted_effects(influence["total"], effects.removed),
                effects.nll[:, : sizes.targets],
                asked=asked,
                note=f"adjoint grew {growth_words(influence['growth'])}",
                seconds=bench.seconds,
            )
        )
        mean = bench.influence(setting, ("mean",))
        predicted = predicted_effects(mean["total"], effects.removed)
        rows.append(row("the same, mean NLL as target", predicted, effects.mean))
    return rows


def growth_words(growth: np.ndarray) -> str:
    """Return the median and the largest growth of the adjoints over the run."""
    return f"{np.median(growth):.1f} times (median; at most {growth.max():.1f})"


def smoothed(bench: Bench, sizes: Sizes, *, is_long: bool = False) -> list[Row]:
    """TSLOO under AdamW: the exact derivative, and with a larger eps in the pullback alone."""
    settings = [
        replace(setting, optimizer="adamw", epochs=sizes.epochs[is_long])
        for setting in sizes.gelu_runs
    ]
    return each_setting(settings, partial(_smoothed_rows, bench, sizes))


def _smoothed_rows(bench: Bench, sizes: Sizes, setting: Setting) -> list[Row]:
    judged, others = sizes.single().items(), sizes.single(part=1).values()
    bench.retrain([(setting, kind, 2) for _, kind in judged])
    bench.retrain([(setting, kind, 1) for kind in others])
    smoothings = [Smoothing(eps=eps) for eps in EPS]
    bench.reverse([(setting, sizes.specs, s) for s in (EXACT, *smoothings)])
    best = choose(bench, sizes, setting, smoothings)
    rows = []
    for name, kind in judged:
        bench.seconds = 0.0
        effects = bench.effects(setting, kind, 2)
        for smoothing, asked in ((EXACT, np.nan), (best, 0.95)):
            influence = bench.influence(setting, sizes.specs, smoothing)
            word = f"eps {smoothing.eps:g} in the pullback" if smoothing.eps else "exact"
            rows.append(
                score_row(
                    sizes,
                    f"TSLOO, {setting.epochs} epochs, {word}",
                    predicted_effects(influence["total"], effects.removed),
                    effects.nll[:, : sizes.targets],
                    asked=asked,
                    setting=f"{setting.words}; {name}",
                    note=f"adjoint grew {growth_words(influence['growth'])}",
                    seconds=bench.seconds,
                )
            )
    return rows


def choose(
    bench: Bench, sizes: Sizes, setting: Setting, smoothings: Sequence[Smoothing]
) -> Smoothing:
    """Return the smoothing with the best mean TSLOO over removals that are not judged."""
    others = [bench.effects(setting, kind, 1) for kind in sizes.single(part=1).values()]

    def score(smoothing: Smoothing) -> float:
        total = bench.influence(setting, sizes.specs, smoothing)["total"]
        scores = [
            tsloo(predicted_effects(total, o.removed), o.nll[:, : sizes.targets, 0]) for o in others
        ]
        return float(np.nan_to_num(np.mean(scores), nan=-1.0))

    return max(smoothings, key=score)


def paper_network(bench: Bench, sizes: Sizes) -> list[Row]:
    """LDS of the paper's network: the exact derivative, and its last epoch alone."""
    setting = sizes.paper
    asked = dict(zip((0.99, 0.95, 0.5), (0.75, 0.85, 0.78), strict=True))
    rows = []
    for share in sizes.shares:
        kind = Removals(kind="subset", count=sizes.subsets, share=share)
        bench.seconds = 0.0
        effects, pairs = (
            bench.effects(setting, kind, repeats, bench.count(setting, kind, repeats))
            for repeats in (1, 2)
        )
        influence = bench.influence(setting, sizes.specs)
        actual = effects.nll[:, : sizes.targets]
        row = partial(
            score_row,
            sizes,
            setting=f"{setting.words}; {len(actual)} subsets, {len(pairs.nll)} for the ceiling",
        )
        nll = partial(row, pairs=pairs.nll[:, : sizes.targets])
        predicted = predicted_effects(influence["total"], effects.removed)
        check = f"LDS, share {share:g} kept"
        rows.append(nll(check, predicted, actual, asked=asked[share], seconds=bench.seconds))
        predicted = predicted_effects(influence["last"], effects.removed)
        rows.append(nll(f"{check}, last epoch alone", predicted, actual))
        mean = bench.influence(setting, ("mean",))["total"]
        predicted = predicted_effects(mean, effects.removed)
        rows.append(row(f"{check}, mean NLL as target", predicted, effects.mean, pairs=pairs.mean))
    return rows


def repeated(bench: Bench, sizes: Sizes) -> list[Row]:
    """One derivative, and one retraining, against the mean of many retrainings, with ReLUs."""
    setting, kinds = sizes.relu, sizes.single()
    count = bench.repeats(setting, kinds.values(), sizes.retrainings)
    bench.retrain([(setting, kind, count) for kind in kinds.values()])
    smoothings = [Smoothing(gate_width=width) for width in WIDTHS]
    bench.retrain([(setting, kind, 1) for kind in sizes.single(part=1).values()])
    bench.reverse([(setting, sizes.specs, smoothing) for smoothing in (EXACT, *smoothings)])
    best = choose(bench, sizes, setting, smoothings)
    every = [bench.effects(setting, kind, count) for kind in kinds.values()]
    groups: dict[str, Effects] = {"both": every[0].join(every[1])}
    groups |= dict(zip(kinds, every, strict=True))
    rows = []
    for name, effects in groups.items():
        bench.seconds = 0.0
        actual = effects.nll[:, : sizes.targets]
        mean = actual.mean(-1, keepdims=True)
        where = f"{setting.words}; {name}"
        one, low, high = sizes.interval(ceiling_against_mean, actual)
        rows.append(
            Row(
                check=f"one retraining against the mean of the other {count - 1}",
                setting=where,
                value=one,
                low=low,
                high=high,
                note=f"against one other: {ceiling(actual):.3f}",
            )
        )
        for smoothing in (EXACT, best):
            total = bench.influence(setting, sizes.specs, smoothing)["total"]
            predicted = predicted_effects(total, effects.removed)
            width = f", gates of half-width {smoothing.gate_width:g}"
            word = width if smoothing.gate_width else ""
            value, low, high = sizes.interval(tsloo, predicted, mean[..., 0])
            rows.append(
                Row(
                    check=f"one derivative against the mean of {count} retrainings{word}",
                    setting=where,
                    value=value,
                    low=low,
                    high=high,
                    note=f"against one retraining: {tsloo(predicted, actual[..., 0]):.3f}",
                )
            )
            ratio, low, high = sizes.interval(over_one_retraining, predicted, actual)
            rows.append(
                Row(
                    check=f"the ratio of the two{word}",
                    setting=where,
                    value=ratio,
                    low=low,
                    high=high,
                    asked=1.5 if name == "both" and smoothing == EXACT else np.nan,
                )
            )
    return rows


def over_one_retraining(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Return a prediction's score against the mean of retrainings over one retraining's."""
    return tsloo(predicted, actual.mean(-1)) / ceiling_against_mean(actual)


def finite(bench: Bench, sizes: Sizes) -> list[Row]:
    """Why TSLOO is below 1: the finite size of a removal, and float32; also after long training."""
    doubles = [replace(s, precision="float64") for s in sizes.gelu_runs if s.dataset == "digits"]
    long = [replace(sizes.gelu_runs[-1], epochs=sizes.epochs[1])]
    return each_setting([*sizes.gelu_runs, *doubles, *long], partial(_finite_rows, bench, sizes))


def _finite_rows(bench: Bench, sizes: Sizes, setting: Setting) -> list[Row]:
    bench.reverse([(setting, sizes.specs, EXACT)])
    rows = []
    for weight in (0.0, 0.9):
        kinds = sizes.single(weight=weight)
        bench.retrain([(setting, kind, 1) for kind in kinds.values()])
        for name, kind in kinds.items():
            bench.seconds = 0.0
            effects = bench.effects(setting, kind, 1)
            total = bench.influence(setting, sizes.specs)["total"]
            actual = effects.nll[:, : sizes.targets, 0]
            predicted = (1 - weight) * predicted_effects(total, effects.removed)
            value, low, high = sizes.interval(tsloo, predicted, actual)
            error = np.linalg.norm(actual - predicted) / np.linalg.norm(actual)
            by_target = spearman(predicted.T, actual.T)
            rows.append(
                Row(
                    check=f"TSLOO, weight 1 to {weight:g}",
                    setting=f"{setting.words}; {name}",
                    value=value,
                    low=low,
                    high=high,
                    note=f"relative error {error:.3f}; median target "
                    f"{np.median(by_target):.4f}, least {by_target.min():.3f}",
                    seconds=bench.seconds,
                )
            )
    return rows
