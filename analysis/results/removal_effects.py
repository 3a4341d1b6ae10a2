"""Predicted against actual effects of removals, with the truth against its own repeat beside them.

A removal's predicted effect is minus the sum of its samples' influence; its actual effect is the
difference of two trainings. A second pair of trainings, from a jittered start, gives the same
effect once more: how well the two actual effects agree is the ceiling of what a prediction can
reach.

Map: `removal_effects`.
"""

import numpy as np
import xarray as xr

from sampimp.analysis.influence_runs import (
    RemovalKind,
    conventions,
    influence_of,
    influence_run,
    is_renormalised,
    labelled,
    removal_kinds,
    smoothings_of,
    targets_of,
)
from sampimp.analysis.prediction import ceiling, predicted_effects, rank_agreement
from sampimp.analysis.runs import label_result, place_of
from sampimp.errors import MissingDataError


def removal_effects(cube: xr.Dataset) -> xr.Dataset:
    """Return predicted and actual effects of removals, and their agreement by kind and target.

    Parameters
    ----------
    cube
        One node of the cube.

    Returns
    -------
    Dataset, in memory
        predicted(removal, target) and actual(removal, target, repeat), in the target's unit;
        kind_of(removal), a position on `kind`; agreement(kind, target), the rank correlation over
        the kind's removals of predicted with actual effects of repeat 0, and
        agreement_of_repeats(kind, target), that of two repeats, mean over their pairs;
        share_kept(kind), count(kind), left_out(kind). NaN where a kind lacks a target. The
        attribute `shown_target` is the target of the figure.

    Raises
    ------
    MissingDataError
        No run has influence and retrainings of the same target.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_influence
    >>> result = removal_effects(with_influence(example_cube()))
    >>> bool((result["agreement"].sel(kind="random") > 0.9).all())
    True

    References
    ----------
    Gao & Jojic (2017), section 4; Koh & Liang (2017), section 4.1.
    """
    run = influence_run(cube, "influence_total", "effect", "removed")
    smoothing = smoothings_of(run)[0]
    measured = targets_of(run, smoothing)
    kinds = removal_kinds(run)
    targets = [t for t in measured if any(t in kind.targets for kind in kinds)]
    if not targets:
        raise MissingDataError(
            "influence and retrainings of the same target",
            f"influence of {', '.join(measured)}; retrainings of "
            f"{', '.join(sorted({t for kind in kinds for t in kind.targets})) or 'none'}",
            place_of(cube),
            "compute the influence of these targets: sampimp influence OUT --targets",
        )
    names = [labelled(target, smoothing) for target in targets]
    total = influence_of(run, targets, smoothing)
    repeats = max(kind.effect.shape[-1] for kind in kinds)
    parts = [_of_kind(kind, targets, repeats) for kind in kinds]
    predicted = np.concatenate([predicted_effects(total, kind.removed) for kind in kinds])
    result = xr.Dataset(
        {
            "predicted": (("removal", "target"), predicted),
            "actual": (("removal", "target", "repeat"), np.concatenate(parts)),
            "kind_of": (
                "removal",
                np.repeat(np.arange(len(kinds)), [len(kind.removals) for kind in kinds]),
            ),
            "share_kept": ("kind", [kind.share_kept for kind in kinds]),
            "count": ("kind", [len(kind.removals) for kind in kinds]),
            "left_out": ("kind", [kind.left_out for kind in kinds]),
        },
        coords={
            "removal": [name for kind in kinds for name in kind.removals],
            "target": targets,
            "repeat": np.arange(repeats),
            "kind": [kind.name for kind in kinds],
            "target_units": ("target", run["target_units"].sel(target=names).values),
        },
    )
    rows = [result["kind_of"].values == number for number in range(len(kinds))]
    with np.errstate(invalid="ignore"):
        agreement = [
            rank_agreement(predicted[mine], part[..., 0])
            for mine, part in zip(rows, parts, strict=True)
        ]
    result["agreement"] = (("kind", "target"), np.stack(agreement))
    result["agreement_of_repeats"] = (
        ("kind", "target"),
        np.array([[ceiling(_repeats(part[:, t])) for t in range(len(targets))] for part in parts]),
    )
    label_result(
        result,
        cube,
        method=f"run {run.attrs['run']}; predicted: minus the sum of the removed samples' "
        "influence; actual: value after training without them minus value after training with "
        "all, from the same start in the same order; Spearman's correlation over the removals of "
        "a kind",
        figure="13",
        section="4",
        variables={
            "predicted": ("unit of the target", "predicted effect of the removal"),
            "actual": ("unit of the target", "effect of the removal by retraining"),
            "kind_of": ("1", "position of the removal's kind"),
            "share_kept": ("1", "mean share of the samples that stay"),
            "count": ("1", "removals"),
            "left_out": ("1", "removals without all retrainings (diverged, or not made)"),
            "agreement": ("1", "rank correlation of predicted with actual effects"),
            "agreement_of_repeats": ("1", "rank correlation of actual effects of two repeats"),
        },
    )
    result.attrs |= {
        **conventions(renormalised=is_renormalised(run)),
        "shown_target": "mean" if "mean" in targets else targets[0],
        "smoothing": smoothing or "none",
        "ceiling": _describe_ceiling(run),
    }
    return result


def _of_kind(kind: RemovalKind, targets: list[str], repeats: int) -> np.ndarray:
    """Return a kind's effects (R, T, K); NaN for targets and repeats that it lacks."""
    effect = np.full((len(kind.removals), len(targets), repeats), np.nan)
    for place, target in enumerate(targets):
        if target in kind.targets:
            values = kind.effect[:, kind.targets.index(target)]
            effect[:, place, : values.shape[-1]] = values
    return effect


def _repeats(effect: np.ndarray) -> np.ndarray:
    """Return the measured repeats of one target's effects (R, K), as (R, 1, K)."""
    return effect[:, None, np.isfinite(effect).all(0)]


def _describe_ceiling(run: xr.Dataset) -> str:
    """Return what repeats are, with the size of the jitter where it is known."""
    jitter = run["effect"].attrs.get("jitter", "")
    deviation = f" (standard deviation {jitter})" if jitter else ""
    return f"one retraining against another whose start is jittered{deviation}"
