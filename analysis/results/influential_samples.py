"""The most helpful and the most harmful training samples for a class, or for one test sample.

Influence on a negative log-likelihood below 0 is helpful: the more weight the sample's loss has in
training, the lower the NLL of the target at the end, and without the sample it would be higher.

Map: `influential_samples`.
"""

import math
import re

import numpy as np
import xarray as xr

from sampimp.analysis.influence_runs import (
    conventions,
    influence_run,
    labelled,
    smoothings_of,
    targets_of,
)
from sampimp.analysis.runs import label_result, place_of
from sampimp.errors import MissingDataError

SHOWN = 8
"""Number of samples listed at each end (arbitrary)."""

LISTED = re.compile(r"(class|sample):(\d{1,9})")
"""Targets: negative log-likelihoods of a class, and of one test sample, by their numbers."""


def influential_samples(cube: xr.Dataset, count: int = SHOWN) -> xr.Dataset:
    """Return the samples with the lowest and the highest influence on each target.

    Parameters
    ----------
    cube
        One node of the cube.
    count
        Number of samples at each end.

    Returns
    -------
    Dataset, in memory
        position(target, end, rank), places in the training set, for `end` helpful (influence
        below 0, lowest first) and harmful (above 0, highest first), -1 where there are fewer;
        value(target, end, rank), their influence in nat per unit of weight; and
        training_label(target, end, rank), their labels.

    Raises
    ------
    MissingDataError
        No run has the influence on a class or on a single test sample.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_influence
    >>> result = influential_samples(with_influence(example_cube()))
    >>> bool((result["value"].sel(end="helpful") < 0).all())
    True

    References
    ----------
    Koh & Liang (2017), section 5, for such lists; Gao & Jojic (2017), section 4.
    """
    run = influence_run(cube, "influence_total")
    smoothing = smoothings_of(run)[0]
    targets = [t for t in targets_of(run, smoothing) if _is_listed(t, cube)]
    if not targets:
        raise MissingDataError(
            "the influence on a class or on a single test sample",
            f"that on {', '.join(targets_of(run, smoothing))}",
            place_of(cube),
            "compute it: sampimp influence OUT --targets class sample:0..31",
        )
    names = [labelled(target, smoothing) for target in targets]
    total = run["influence_total"].sel(target=names).transpose("target", "sample").values
    count = min(count, total.shape[1])
    order = np.argsort(np.where(np.isnan(total), 0, total), axis=1, kind="stable")
    ends = np.stack([order[:, :count], order[:, ::-1][:, :count]], 1)
    value = np.take_along_axis(total[:, None], ends, -1)
    is_right = np.stack([value[:, 0] < 0, value[:, 1] > 0], 1)
    result = xr.Dataset(
        {
            "position": (("target", "end", "rank"), np.where(is_right, ends, -1)),
            "value": (("target", "end", "rank"), np.where(is_right, value, np.nan)),
            "training_label": (("target", "end", "rank"), run["label"].values[ends]),
        },
        {"target": targets, "end": ["helpful", "harmful"], "rank": np.arange(count)},
    )
    label_result(
        result,
        cube,
        method=f"training samples of the run {run.attrs['run']} with the lowest and the highest "
        "influence, summed over epochs and layers",
        figure="17",
        section="4",
        variables={
            "position": ("1", "place in the training set; -1 for none"),
            "training_label": ("1", "label of the training sample"),
            "value": ("nat per unit of weight", "influence of the sample on the target"),
        },
    )
    result.attrs |= {**conventions(), "smoothing": smoothing or "none"}
    return result


def _is_listed(target: str, cube: xr.Dataset) -> bool:
    """Return whether a target is that of a class, or of a test sample that the cube has."""
    match = LISTED.fullmatch(target)
    if match is None:
        return False
    return match[1] == "class" or int(match[2]) < cube.sizes.get("test_sample", math.inf)
