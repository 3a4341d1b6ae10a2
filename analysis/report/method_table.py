"""The table of all methods of predicting removals, with their ceilings, as text.

Map: `method_table`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from sampimp.analysis.figures import name_kind

_SINGLE = dict.fromkeys(("random", "top", "sample"), "TSLOO")
"""Scores of removals of single samples."""


def method_table(results: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Return the scores of all methods as a table of text.

    Parameters
    ----------
    results
        Results of `analyse`; only `method_scores` is read.

    Returns
    -------
    dict
        `columns`: the kinds of removals, with the name of their score; `rows`: of each method its
        name and its cells, each a score and its interval; `ceiling`: the same of the ceiling;
        `against_mean`: as `rows`, against the mean of all retrainings, the ceiling last, empty with
        fewer than three; `targets`: over how many targets the scores are averaged. Empty without
        the result.
    """
    scores = results.get("method_scores")
    if scores is None:
        return {}
    kinds = [scores.isel(kind=place) for place in range(scores.sizes["kind"])]
    predictors = [str(name) for name in scores["predictor"].values]
    rows = [
        (_written(name), [_cell(k, "score", place) for k in kinds])
        for place, name in enumerate(predictors)
    ]
    return {
        "columns": [_column(kind) for kind in kinds],
        "rows": rows,
        "ceiling": [_cell(kind, "ceiling") for kind in kinds],
        "against_mean": _against_mean(kinds, predictors),
        "targets": ", ".join(sorted({str(int(kind["target_count"])) for kind in kinds})),
    }


def _column(kind: xr.Dataset) -> tuple[str, str]:
    """Return the name of a kind's score, and the kind."""
    name = str(kind["kind"].item())
    words = name_kind(name, float(kind["share_kept"]), int(kind["count"]))
    left_out = int(kind["left_out"])
    score = "LDS" if name.startswith("subset") else _SINGLE.get(name, "rank correlation")
    return (
        score,
        words + (f", {left_out} left out" if left_out else ""),
    )


def _cell(kind: xr.Dataset, name: str, place: int | None = None) -> tuple[str, str]:
    """Return a score and its interval, as text."""
    value, interval = kind[name], kind[f"{name}_interval"]
    if place is not None:
        value, interval = value.isel(predictor=place), interval.isel(predictor=place)
    low, high = interval.transpose(..., "bound").values
    ends = [f"{round(bound, 2) + 0.0:.2f}" for bound in (low, high)]  # no -0.00
    words = "" if np.isnan([low, high]).any() else " to ".join(ends)
    return _number(float(value)), words


def _against_mean(kinds: list[xr.Dataset], predictors: list[str]) -> list[tuple[str, list[str]]]:
    """Return the scores against the mean of all retrainings, and their ceiling."""
    ceilings = [float(kind["ceiling_against_mean"]) for kind in kinds]
    if np.isnan(ceilings).all():
        return []
    rows = []
    for place, name in enumerate(predictors):
        values = [float(kind["score_against_mean"].isel(predictor=place)) for kind in kinds]
        if not np.isnan(values).all():
            rows.append((_written(name), [_number(value) for value in values]))
    return [*rows, ("one retraining (ceiling)", [_number(value) for value in ceilings])]


def _number(value: float) -> str:
    return "—" if np.isnan(value) else f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _written(predictor: str) -> str:
    """Return a method's name as it is shown."""
    return predictor.replace("^-1", "⁻¹")
