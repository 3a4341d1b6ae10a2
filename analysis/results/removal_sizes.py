"""Whether importance predicts the size of the effect of removing a sample.

Importance has no sign and knows no target: it can predict how much a removal changes, not in which
direction. So it is compared with the mean absolute effect over targets, beside final NLL, final
importance and the mean absolute influence, over removals of single samples.

Map: `removal_sizes`.
"""

from itertools import combinations

import numpy as np
import xarray as xr

from sampimp.analysis.influence_runs import (
    RemovalKind,
    conventions,
    influence_of,
    influence_run,
    is_renormalised,
    removal_kinds,
    single_test_samples,
    smoothings_of,
    targets_of,
)
from sampimp.analysis.prediction import (
    PERCENTILE_RESAMPLES,
    percentile_intervals,
    resample_counts,
    resampled_spearman,
)
from sampimp.analysis.runs import label_result, lazy, overall_importance, place_of, require
from sampimp.errors import MissingDataError

SHARE_OF_CEILING = 0.9
"""A score counts as good if it is above this share of what one retraining reaches (as the 0.9 of
section 3.2)."""


def removal_sizes(cube: xr.Dataset, *, resamples: int = PERCENTILE_RESAMPLES) -> xr.Dataset:
    """Return how sizes that are known without retraining agree with sizes of actual effects.

    Parameters
    ----------
    cube
        One node of the cube.
    resamples
        Bootstrap resamples for each interval.

    Returns
    -------
    Dataset, in memory
        Of each removal of a single sample: size(score, removal), the scores being overall
        importance tau, final NLL, final importance and mean absolute influence, as far as they
        were computed; actual_size(removal, repeat), the mean over targets of the absolute effect;
        kind_of(removal), a position on `kind`. rank_correlation(score, kind) of a size with the
        actual one of repeat 0, ceiling(kind) of the actual ones of two repeats, and
        above_ceiling_share(score, kind), the correlation minus 0.9 times the ceiling; each with
        `*_interval(..., bound)`.

    Raises
    ------
    MissingDataError
        No run has retrainings without single samples.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_influence
    >>> result = removal_sizes(with_influence(example_cube()))
    >>> bool(result["rank_correlation"].sel(score="overall importance", kind="random") > 0.9)
    True

    References
    ----------
    Gao & Jojic (2017), section 4.
    """
    require(cube, "importance")
    run = influence_run(cube, "effect", "removed")
    kinds = [kind for kind in removal_kinds(run) if kind.is_single]
    if not kinds:
        raise MissingDataError(
            "retrainings without single samples",
            "none",
            place_of(cube),
            "compute them: sampimp retrain OUT",
        )
    targets = single_test_samples(kinds[0].targets)
    sizes = _sizes(run, targets)
    parts = [_of_kind(kind, targets, sizes, resamples) for kind in kinds]
    result = xr.concat(parts, "kind", join="outer").assign_coords(
        kind=[kind.name for kind in kinds], bound=["low", "high"], score=list(sizes)
    )
    actual = [_actual_size(kind, targets) for kind in kinds]
    repeats = max(values.shape[1] for values in actual)
    samples = np.concatenate([kind.removed.argmax(1) for kind in kinds])
    counts = [len(kind.removals) for kind in kinds]
    result["size"] = (
        ("score", "removal"),
        np.stack([values[samples] for values in sizes.values()]),
    )
    result["actual_size"] = (
        ("removal", "repeat"),
        np.concatenate(
            [
                np.pad(values, ((0, 0), (0, repeats - values.shape[1])), constant_values=np.nan)
                for values in actual
            ]
        ),
    )
    result["kind_of"] = ("removal", np.repeat(np.arange(len(kinds)), counts))
    result["count"] = ("kind", counts)
    result = result.assign_coords(
        removal=[name for kind in kinds for name in kind.removals], repeat=np.arange(repeats)
    )
    label_result(
        result,
        cube,
        method=f"run {run.attrs['run']}; mean over {len(targets)} targets of the absolute effect "
        "of removing one sample, by retraining; Spearman's correlation over the removals of a "
        f"kind; 95 % interval: {resamples} bootstrap resamples of the removals",
        figure="16",
        section="4",
        variables={
            "rank_correlation": ("1", "rank correlation with the size of the effect"),
            "rank_correlation_interval": ("1", "95 % interval of the correlation"),
            "ceiling": ("1", "rank correlation of the sizes of two retrainings"),
            "ceiling_interval": ("1", "95 % interval of the ceiling"),
            "above_ceiling_share": ("1", "correlation minus 0.9 times the ceiling"),
            "above_ceiling_share_interval": ("1", "95 % interval of the difference"),
            "size": ("parameter^2, nat, or unit of the target", "size known without retraining"),
            "actual_size": ("unit of the target", "mean absolute effect of the removal"),
            "kind_of": ("1", "position of the removal's kind"),
            "count": ("1", "removals"),
        },
    )
    result.attrs |= {
        **conventions(renormalised=is_renormalised(run)),
        "target_units": str(run["target_units"].sel(target=targets[0]).item()),
        "ceiling": "the same size by one retraining against that by another from a jittered start",
    }
    return result


def _sizes(run: xr.Dataset, targets: list[str]) -> dict[str, np.ndarray]:
    """Return the size of each sample (N), by the name of the score."""
    sizes = {"overall importance": overall_importance(lazy(run["importance"])).values}
    if "nll" in run:
        sizes["final NLL"] = run["nll"].isel(epoch=-1).values
    if "final_importance_total" in run:
        sizes["final importance"] = run["final_importance_total"].values
    for smoothing in smoothings_of(run)[:1]:
        if set(targets) <= set(targets_of(run, smoothing)):
            sizes["mean |influence|"] = np.abs(influence_of(run, targets, smoothing)).mean(0)
    return {name: values for name, values in sizes.items() if np.isfinite(values).any()}


def _actual_size(kind: RemovalKind, targets: list[str]) -> np.ndarray:
    """Return the mean absolute effect over targets (R, K)."""
    chosen = [kind.targets.index(target) for target in targets if target in kind.targets]
    size: np.ndarray = np.abs(kind.effect[:, chosen]).mean(1)
    return size


def _of_kind(
    kind: RemovalKind, targets: list[str], sizes: dict[str, np.ndarray], resamples: int
) -> xr.Dataset:
    """Return the correlations of one kind, with their intervals."""
    actual = _actual_size(kind, targets).T
    predicted = np.stack([values[kind.removed.argmax(1)] for values in sizes.values()])
    counts = resample_counts(len(kind.removals), resamples=resamples)
    correlation = resampled_spearman(predicted, actual[0], counts)
    pairs = list(combinations(range(len(actual)), 2))
    ceiling = np.full((len(counts), 1), np.nan)
    if pairs:
        first, second = np.array(pairs).T
        ceiling[:, 0] = resampled_spearman(actual[first], actual[second], counts).mean(1)
    part = xr.Dataset()
    for name, replicates, dims in (
        ("rank_correlation", correlation, ("score",)),
        ("ceiling", ceiling[:, 0], ()),
        ("above_ceiling_share", correlation - SHARE_OF_CEILING * ceiling, ("score",)),
    ):
        part[name] = (dims, replicates[0])
        interval = percentile_intervals(replicates, len(kind.removals))
        part[f"{name}_interval"] = ((*dims, "bound"), interval)
    return part
