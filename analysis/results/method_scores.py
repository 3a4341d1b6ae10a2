"""All methods of predicting removals on one run: scores, their ceilings and intervals.

Each method gives every sample a number for each target, and predicts the effect of a removal by
minus the sum over its samples. The methods are unrolled influence (with each smoothing for which it
was computed), its last and its first epoch alone, and influence at a fixed point, -C^-1 g with
C the Gauss-Newton matrix or the Hessian (eq. 4 of the paper).

The damping of -C^-1 g is chosen on other removals than those that it is judged by: a kind's
removals are halved by their position; on each half the damping is used that was best on the other,
and the score is the mean of the two. Of smoothings none is chosen: each is a method.

Map: `method_scores`.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import xarray as xr

from sampimp.analysis.influence_runs import (
    RemovalKind,
    conventions,
    influence_of,
    influence_run,
    is_renormalised,
    labelled,
    natural_damping,
    removal_kinds,
    single_test_samples,
    smoothings_of,
    targets_of,
)
from sampimp.analysis.prediction import (
    PERCENTILE_RESAMPLES,
    ceiling_against_mean,
    percentile_intervals,
    resample_counts,
    resampled_spearman,
)
from sampimp.analysis.runs import label_result, place_of
from sampimp.errors import MissingDataError

UNROLLED = "unrolled influence"
"""Name of the exact method; a smoothing is added in brackets."""

FIXED_POINT_BEST = "-C^-1 g, best curvature and damping"
"""The fixed point at its best: curvature, too, is chosen on the other half of the removals."""

CURVATURES = {"gauss-newton": "-GGN^-1 g", "hessian": "-Hessian^-1 g"}
"""Names of the methods by curvature."""


def method_scores(cube: xr.Dataset, *, resamples: int = PERCENTILE_RESAMPLES) -> xr.Dataset:
    """Return how well each method predicts the effects of removals, kind by kind.

    Parameters
    ----------
    cube
        One node of the cube.
    resamples
        Bootstrap resamples for each interval.

    Returns
    -------
    Dataset, in memory
        score(predictor, kind), Spearman's correlation over the kind's removals of predicted effects
        with those of one retraining, mean over targets, with its score_interval(..., bound);
        ceiling(kind), the same of one retraining with another, and ceiling_interval(kind, bound).
        With three repeats or more: score_against_mean(predictor, kind), with the mean effect of all
        retrainings, and ceiling_against_mean(kind), of one retraining with the mean of the others.
        score_by_damping(curvature, damping, kind); unrolled_minus_fixed_point(kind) with
        `*_interval(kind, bound)`, of the exact influence minus -C^-1 g at its best, paired;
        share_kept(kind), count(kind), left_out(kind), target_count(kind). A method that was not
        computed for a kind's targets is NaN.

    Raises
    ------
    MissingDataError
        No run has influence and retrainings of the same target.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_influence
    >>> scores = method_scores(with_influence(example_cube()))
    >>> random = scores["score"].sel(kind="random")
    >>> bool(random.sel(predictor="unrolled influence") > random.sel(predictor="first epoch alone"))
    True

    References
    ----------
    Gao & Jojic (2017), section 4; Park et al. (2023), TRAK, section 2, for LDS.
    """
    run = influence_run(cube, "influence_total", "effect", "removed")
    kinds = removal_kinds(run)
    parts = [_score_kind(run, kind, resamples) for kind in kinds]
    scored = [(kind, part) for kind, part in zip(kinds, parts, strict=True) if part is not None]
    if not scored:
        raise MissingDataError(
            "influence and retrainings of the same target",
            "none in common",
            place_of(cube),
            "compute the influence of the retrained targets: sampimp influence OUT --targets",
        )
    # Methods in the order of their first mention; a kind without one of them is NaN there.
    methods = list(dict.fromkeys(str(m) for _, part in scored for m in part["predictor"].values))
    result = xr.concat(
        [part.reindex({"predictor": methods}) for _, part in scored], "kind", join="outer"
    )
    result = result.assign_coords(kind=[kind.name for kind, _ in scored], bound=["low", "high"])
    result["share_kept"] = ("kind", [kind.share_kept for kind, _ in scored])
    result["count"] = ("kind", [len(kind.removals) for kind, _ in scored])
    result["left_out"] = ("kind", [kind.left_out for kind, _ in scored])
    result = result.transpose(
        "predictor", "curvature", "damping", "kind", "bound", missing_dims="ignore"
    )
    label_result(
        result,
        cube,
        method=_METHOD.format(run.attrs["run"], resamples),
        figure="14",
        section="4",
        variables=_VARIABLES,
    )
    result.attrs |= {
        **conventions(renormalised=is_renormalised(run)),
        "smoothing": "named with the method; none is chosen",
        "damping": "best damping: chosen on the other half of the removals; without choice: "
        f"1/(eta T) = {natural_damping(run):.3g}",
        "ceiling": "the same score of one retraining with another from a jittered start",
    }
    return result


_METHOD = (
    "run {}; TSLOO: Spearman's correlation over removals of single samples, LDS: over random "
    "subsets of a share, of predicted with actual effects (repeat 0), averaged over single test "
    "samples (all targets if there are none); 95 % interval: "
    "{} bootstrap resamples of the removals, the same ones for every method"
)

_VARIABLES = {
    "score": ("1", "score against one retraining"),
    "score_interval": ("1", "95 % interval of the score"),
    "ceiling": ("1", "score of one retraining against another"),
    "ceiling_interval": ("1", "95 % interval of the ceiling"),
    "score_against_mean": ("1", "score against the mean of all retrainings"),
    "ceiling_against_mean": ("1", "score of one retraining against the mean of the others"),
    "score_by_damping": ("1", "score of -C^-1 g at each damping"),
    "unrolled_minus_fixed_point": ("1", "score of unrolled influence minus that of -C^-1 g"),
    "unrolled_minus_fixed_point_interval": ("1", "95 % interval of the difference"),
    "share_kept": ("1", "mean share of the samples that stay"),
    "count": ("1", "removals"),
    "left_out": ("1", "removals without all retrainings (diverged, or not made)"),
    "target_count": ("1", "targets over which the scores are averaged"),
}


def _score_kind(run: xr.Dataset, kind: RemovalKind, resamples: int) -> xr.Dataset | None:
    """Return the scores of a kind; None if no influence of its targets was computed."""
    available = {
        smoothing: [t for t in kind.targets if t in targets_of(run, smoothing)]
        for smoothing in smoothings_of(run)
    }
    targets = single_test_samples(next((t for t in available.values() if t), []))
    if not targets:
        return None
    methods = {
        labelled(UNROLLED, smoothing): influence_of(run, targets, smoothing)
        for smoothing, known in available.items()
        if set(targets) <= set(known)
    }
    smoothing = next(name for name, known in available.items() if set(targets) <= set(known))
    methods |= {
        f"{name} epoch alone": influence_of(run, targets, smoothing, place)
        for name, place in (("last", -1), ("first", 0))
    }
    fixed, dampings = _fixed_point(run, targets)
    effect = kind.effect[:, [kind.targets.index(target) for target in targets]]
    scorer = _Scorer(methods, fixed, dampings, natural_damping(run))
    part = scorer.score(kind.removed, effect, resample_counts(len(effect), resamples=resamples))
    part["target_count"] = len(targets)
    return part


def _fixed_point(
    run: xr.Dataset, targets: list[str]
) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """Return influence at the fixed point by curvature, (D, T, N), and the dampings (D)."""
    if "fixed_point_influence" not in run:
        return {}, np.empty(0)
    array = run["fixed_point_influence"].sel(target=targets)
    values = array.transpose("curvature", "damping", "target", "sample").values
    if is_renormalised(run):  # the mean over all training samples
        values = values - values.mean(-1, keepdims=True)
    by_curvature = dict(zip(map(str, array["curvature"].values), values, strict=True))
    return (
        {name: value for name, value in by_curvature.items() if np.isfinite(value).all()},
        array["damping"].values.astype(float),
    )


class _Scorer:
    """Scores of methods on removals; M methods, C curvatures, D dampings, R, T, K, N as elsewhere.

    Parameters
    ----------
    methods
        Influence of each method, (T, N).
    fixed
        Influence at the fixed point by curvature, (D, T, N).
    dampings
        (D).
    natural
        The damping that needs no choice.
    """

    def __init__(
        self,
        methods: Mapping[str, np.ndarray],
        fixed: Mapping[str, np.ndarray],
        dampings: np.ndarray,
        natural: float,
    ) -> None:
        self._methods, self._fixed, self._dampings = methods, fixed, dampings
        self._natural = int(np.abs(np.log(dampings / natural)).argmin()) if fixed else 0
        self._names = list(methods)
        for curvature in fixed:
            name = CURVATURES.get(curvature, curvature)
            near = f"{dampings[self._natural]:.3g}"
            self._names += [f"{name}, best damping", f"{name}, damping {near}"]
        if fixed:
            self._names.append(FIXED_POINT_BEST)

    def score(self, removed: np.ndarray, effect: np.ndarray, counts: np.ndarray) -> xr.Dataset:
        """Return all scores of removals (R, N) with effects (R, T, K), in resamples (B, R)."""
        predicted = _predict(removed, self._methods)
        by_mean = _scores(predicted, effect.mean(-1), counts[:1])[0]
        parts = [_scores(predicted, effect[..., 0], counts)]
        fixed: np.ndarray = np.empty(0)
        overall = np.full((len(counts), 1), np.nan)
        if self._fixed:
            fixed, best, overall = self._score_fixed(removed, effect[..., 0], counts)
            parts += [best, overall]
        replicates = np.concatenate(
            [*parts, _ceilings(effect, counts), parts[0][:, :1] - overall], axis=1
        )
        values, interval = replicates[0], percentile_intervals(replicates, len(effect))
        count, has_many = len(self._names), effect.shape[-1] >= 3
        against_mean = np.full(count, np.nan)
        if has_many:
            against_mean[: len(by_mean)] = by_mean
        part = xr.Dataset(
            {
                "score": ("predictor", values[:count]),
                "score_interval": (("predictor", "bound"), interval[:count]),
                "ceiling": values[count],
                "ceiling_interval": ("bound", interval[count]),
                "unrolled_minus_fixed_point": values[count + 1],
                "unrolled_minus_fixed_point_interval": ("bound", interval[count + 1]),
                "score_against_mean": ("predictor", against_mean),
                "ceiling_against_mean": ceiling_against_mean(effect) if has_many else np.nan,
            },
            {"predictor": self._names},
        )
        if self._fixed:
            part["score_by_damping"] = (("curvature", "damping"), fixed)
            part = part.assign_coords(curvature=list(self._fixed), damping=self._dampings)
        return part

    def _score_fixed(
        self, removed: np.ndarray, actual: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scores by damping (C, D), of best and natural ones (B, 2 C), of the best (B, 1).

        The best of one half of the removals is judged by the other.
        """
        predicted = _predict(removed, self._fixed)
        removals, curvatures, dampings, targets = predicted.shape
        candidates = predicted.reshape(removals, -1, targets)
        shape = (len(counts), curvatures, dampings)
        whole = _scores(candidates, actual, counts).reshape(shape)
        half = np.arange(removals) % 2
        by_half = np.stack(
            [
                _scores(candidates, actual, counts * (half == number)).reshape(shape)
                for number in range(2)
            ]
        )
        best = np.stack([_best_of_other_half(by_half), whole[..., self._natural]], -1)
        overall = _best_of_other_half(by_half.reshape(2, len(counts), 1, -1))
        return whole[0], best.reshape(len(counts), -1), overall


def _predict(removed: np.ndarray, influence: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return predicted effects (R, M, ..., T) of removals (R, N); influence is (..., T, N)."""
    stacked = np.stack(list(influence.values())).astype(np.float64)
    return -np.tensordot(removed.astype(np.float64), stacked, axes=(1, stacked.ndim - 1))


def _scores(predicted: np.ndarray, actual: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return scores (B, M) in resamples of predictions (R, M, T) against effects (R, T)."""
    return resampled_spearman(predicted.transpose(1, 2, 0), actual.T, counts).mean(-1)


def _ceilings(effect: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the ceiling in resamples, (B, 1); NaN with one repeat."""
    pairs = list(combinations(range(effect.shape[-1]), 2))
    if not pairs:
        return np.full((len(counts), 1), np.nan)
    scores = [_scores(effect[:, None, :, a], effect[..., b], counts) for a, b in pairs]
    return np.mean(scores, axis=0)


def _best_of_other_half(by_half: np.ndarray) -> np.ndarray:
    """Return, from scores (2, ..., D) on each half, those of the damping that the other chose."""
    chosen = np.where(np.isnan(by_half), -np.inf, by_half).argmax(-1)[::-1]
    return np.take_along_axis(by_half, chosen[..., None], -1)[..., 0].mean(0)
