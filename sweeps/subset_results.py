"""What follows from trainings on subsets: the next sizes of a bisection, and the indices as files.

Map: `trained_runs`, with their parts of the cube; `next_sizes`, `smallest_sizes` of the bisection;
`diverged_trainings`, `export_subsets`.
"""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xarray as xr

from sampimp.errors import RecordError
from sampimp.schema import ALL_SAMPLES, SUBSET_BUDGETS, digest
from sampimp.store.cube import open_cube
from sampimp.store.influence_layouts import INFLUENCE_FOLDER
from sampimp.store.influence_records import derived_commits
from sampimp.store.location import Folder
from sampimp.store.manifests import write_manifest
from sampimp.store.plan import PlannedTrial, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.subset_choice import crossing
from sampimp.sweeps.run_choice import choose_runs
from sampimp.sweeps.subset_scores import own_scores, selectable_count
from sampimp.sweeps.subset_study import SubsetRequest
from sampimp.sweeps.subset_units import Comparison, trained_before
from sampimp.sweeps.subset_work import pool_of

PRECISION = 1.1
"""Ratio of two sizes at which a bisection ends (arbitrary)."""


class _ErrorCurve(NamedTuple):
    """Mean test errors of a rule by size, with a budget."""

    run: str
    rule: str
    budget: str
    sizes: np.ndarray
    errors: np.ndarray
    limit: float
    """Largest error that suffices; NaN if that of all samples is unknown."""
    least: float
    most: float
    """Bounds of the sizes that can be trained."""


def next_sizes(folder: Folder, request: SubsetRequest, within: float) -> list[Comparison]:
    """Return the sizes that a bisection trains next, by run, rule and budget; none at its end.

    The smallest size is searched whose mean error, and that of all larger ones, is at most that of
    all samples at the same budget plus `within`. A size with a training that diverged is beyond.

    Parameters
    ----------
    folder, request
        The study, and what was compared so far.
    within
        As a fraction of the test samples.
    """
    budgets: dict[tuple[str, str, float], list[str]] = {}
    for curve in _error_curves(folder, request, within):
        size = middle_size(curve.sizes, curve.errors, curve.limit, curve.least, curve.most)
        if size is not None:
            wanted = budgets.setdefault((curve.run, curve.rule, size), [])
            wanted += [curve.budget] * (curve.budget not in wanted)
    return [
        Comparison(rule=rule, size=size, budgets=tuple(wanted), is_validated=False, run=run)
        for (run, rule, size), wanted in budgets.items()
    ]


def smallest_sizes(
    folder: Folder, request: SubsetRequest, within: float
) -> dict[str, dict[tuple[str, str], float]]:
    """Return the smallest size that suffices, by run, then by rule and budget.

    Parameters
    ----------
    folder, request, within
        As for `next_sizes`.

    Returns
    -------
    dict
        Shares of the samples; 1 where no smaller size suffices, NaN where a training on all
        samples diverged.
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    for curve in _error_curves(folder, request, within):
        is_known = np.isfinite(curve.limit)
        size = crossing(curve.sizes, curve.errors, curve.limit).size if is_known else np.nan
        found.setdefault(curve.run, {})[curve.rule, curve.budget] = size
    return found


def _error_curves(folder: Folder, request: SubsetRequest, within: float) -> Iterator[_ErrorCurve]:
    """Yield the errors of each run, rule and budget at the sizes with all seeds of a request."""
    plan = require_plan(folder)
    commits = derived_commits(folder, plan, plan.resolve(read_commits(folder)))
    for run, cube in trained_runs(folder, request):
        done, _ = trained_before(commits, run)
        error = _part(cube.subset_error, training_seed=list(request.seeds))
        error = error.mean("training_seed", skipna=False)
        labels = cube.label.values
        selectable = pool_of("validation", labels)
        least = len(np.unique(labels)) / len(labels)
        for rule in request.parsed:
            scores = own_scores(folder, plan, run, rule, request.files) if rule.reads_own else None
            name = None if scores is None else digest(scores)
            most = (selectable_count(rule, selectable, scores) - 1) / len(labels)
            for budget in SUBSET_BUDGETS[:2]:
                limit = float(_part(error, rule=ALL_SAMPLES, size=1.0, budget=budget)) + within
                sizes = [
                    size
                    for size in cube["size"].values
                    if all(
                        ("test", rule.spec, name, size, budget, seed) in done
                        for seed in request.seeds
                    )
                ]
                errors = _part(error, rule=rule.spec, budget=budget, size=sizes).values
                yield _ErrorCurve(
                    run.label, rule.spec, budget, np.array(sizes), errors, limit, least, most
                )


def middle_size(
    sizes: np.ndarray, errors: np.ndarray, limit: float, least: float, most: float
) -> float | None:
    """Return the size in the middle of those around the crossing; None if they are close.

    Parameters
    ----------
    sizes, errors, limit
        As for `crossing`; a limit that is NaN is never reached.
    least, most
        Bounds of the sizes that can be trained.

    Examples
    --------
    >>> middle_size(np.array([0.1, 0.4]), np.array([0.10, 0.04]), 0.07, 0.01, 0.9)
    0.2
    >>> middle_size(np.array([0.19, 0.2]), np.array([0.10, 0.04]), 0.07, 0.01, 0.9) is None
    True
    """
    if not np.isfinite(limit):
        return None
    place = crossing(sizes, errors, limit)
    low = least if place.above is None else place.above
    high = min(place.below, most)
    if high / low < PRECISION:
        return None
    middle = float(f"{np.sqrt(low * high):.2g}")
    return middle if low < middle < high else None


def diverged_trainings(folder: Folder) -> list[str]:
    """Return a name for each stored training on a subset that diverged."""
    datasets = (node.to_dataset() for node in open_cube(folder).leaves)
    return [
        label
        for cube in datasets
        if "subset_error" in cube
        for label in cube.subset_error.attrs.get("diverged", ())
    ]


def export_subsets(folder: Folder, request: SubsetRequest) -> dict[str, list[str]]:
    """Write the indices of the selected samples of each rule and size.

    Each is written as OUT/influence/selected/RUN-RULE-SIZE.npy and .csv, of the first seed and the
    budget of equal steps.

    Returns
    -------
    dict of str to list of str
        From the path of each .npy file to the classes of which the subset has no sample.
    """
    classes_without: dict[str, list[str]] = {}
    for run, cube in trained_runs(folder, request):
        cube = _part(cube, budget="steps", training_seed=request.seeds[0])
        labels, names = cube.label.values, cube.attrs["class_names"]
        present = np.unique(labels)
        for rule in (rule for rule in cube["rule"].values if rule != ALL_SAMPLES):
            for size in (size for size in cube["size"].values if size < 1):
                indices = np.flatnonzero(cube.selected.sel(rule=rule, size=size).values)
                if not len(indices):
                    continue
                word = re.sub(r"[^A-Za-z0-9.-]+", "_", str(rule))
                name = f"{INFLUENCE_FOLDER}/selected/{run.label}-{word}-{size:g}"
                buffer = io.BytesIO()
                np.save(buffer, indices)
                folder.write_bytes(f"{name}.npy", buffer.getvalue())
                folder.write_bytes(f"{name}.csv", _as_csv(cube, indices))
                absent = np.setdiff1d(present, labels[indices])
                classes_without[f"{folder}/{name}.npy"] = [names[label] for label in absent]
    if classes_without:
        write_manifest(folder, f"{INFLUENCE_FOLDER}/selected")
    return classes_without


def _as_csv(cube: xr.Dataset, indices: np.ndarray) -> bytes:
    """Return a table of samples: position, label, and file if the samples are files."""
    columns = [indices, *(cube[name].values[indices] for name in ("label", "file") if name in cube)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sample", "label", "file"][: len(columns)])
    table.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return text.getvalue().encode()


def trained_runs(
    folder: Folder, request: SubsetRequest
) -> Iterator[tuple[PlannedTrial, xr.Dataset]]:
    """Yield the runs of a request, each with its part of the cube."""
    plan, tree = require_plan(folder), open_cube(folder)
    trials = plan.resolve(read_commits(folder))
    for position in choose_runs(plan, trials, request.runs):
        config = trials[position].config
        cube = tree[plan.node(config.dataset)].to_dataset()
        if "subset_error" not in cube:
            raise _missing("none")
        yield trials[position], cube.sel(strategy=config.strategy, seed=config.seed)


_Cube = TypeVar("_Cube", xr.Dataset, xr.DataArray)


def _part(cube: _Cube, **places: Any) -> _Cube:
    """Return a part of the cube, or raise RecordError if other trainings are stored.

    A commit names its rule, size, budgets and seeds; it counts by the name of its folder.
    """
    try:
        part = cube.sel(places)
    except KeyError:
        raise _missing(f"none of {places}") from None
    if not all(part.sizes.values()):
        raise _missing(f"none of {places}")
    return part


def _missing(got: str) -> RecordError:
    return RecordError(
        expected="the trainings on subsets that this command asks for",
        got=got[:200],
        where="the cube",
        todo="run the same command again; if this message remains, delete the folders of subsets "
        f"in OUT/{INFLUENCE_FOLDER} before",
    )
