"""Figures 13, 14 and 16: predicted and actual effects of removals, and the scores of all methods.

Every score stands beside its ceiling, the same score of one retraining against another.

Map: `draw_removal_effects` (Fig. 13), `draw_method_scores` (14), `draw_removal_sizes` (16).
"""

from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sampimp.analysis.figures.axes import draw_message, scale_by_decades, shorten_name, split_halves
from sampimp.analysis.figures.style import BLUE, DASHED, RC_PARAMS, VERMILLION, WIDTH

TRUTH = "#808080"
"""Colour of the truth against its own repeat."""


def name_kind(name: str, share_kept: float, count: int) -> str:
    """Return the title of a kind of removals.

    Examples
    --------
    >>> name_kind("random", 0.999, 30), name_kind("subset-0.95", 0.95, 100)
    ('one sample, random (30)', '95 % kept (100)')
    """
    if name.startswith("subset"):
        return f"{100 * share_kept:.3g} % kept ({count})"
    kinds = {
        "random": "one sample, random",
        "top": "one sample, most important",
        "sample": "one sample, chosen",
        "class": "one class",
    }
    return f"{kinds.get(name, name)} ({count})"


def _titles(result: xr.Dataset) -> list[str]:
    shares = result["share_kept"].values if "share_kept" in result else np.ones(len(result["kind"]))
    return [
        name_kind(str(name), float(share), int(count))
        for name, share, count in zip(
            result["kind"].values, shares, result["count"].values, strict=True
        )
    ]


@matplotlib.rc_context(RC_PARAMS)
def draw_removal_effects(result: xr.Dataset) -> Figure:
    """Draw Fig. 13: predicted against actual effects, with the truth against its own repeat.

    Parameters
    ----------
    result
        `predicted(removal, target)`, `actual(removal, target, repeat)`, `kind_of(removal)`,
        `agreement(kind, target)`, `agreement_of_repeats(kind, target)`, and the attribute
        `shown_target`: the result `removal_effects`.

    Returns
    -------
    Figure
        One panel per kind of removals; a point is one removal.
    """
    target = str(result.attrs["shown_target"])
    here = result.sel(target=target)
    actual = here["actual"].transpose("removal", "repeat").values
    shown = [k for k in range(result.sizes["kind"]) if _rows(result, k, actual).any()]
    if not shown:
        return draw_message(f"No removal has its effect on {target}.")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 3.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    titles = _titles(result)
    for ax, kind in zip(axes, shown, strict=False):
        mine = _rows(result, kind, actual)
        x, predicted = actual[mine, 0], here["predicted"].values[mine]
        ax.axline((0, 0), slope=1, color="#999999", linewidth=0.9)
        if actual.shape[1] > 1:
            repeat = actual[mine, 1]
            ax.scatter(
                x,
                repeat,
                s=26,
                marker="s",
                facecolors="none",
                edgecolors=TRUTH,
                linewidths=0.9,
                label="another retraining (the ceiling)",
            )
        ax.scatter(
            x, predicted, s=18, color=BLUE, alpha=0.75, linewidths=0, label="predicted: -influence"
        )
        ax.set_title(titles[kind], fontsize=9.5)
        ax.text(0.03, 0.97, _agreement(here, kind), transform=ax.transAxes, va="top", fontsize=8.5)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=4))
        ax.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
        ax.margins(0.12)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    unit = str(here["target_units"].item())
    figure.supxlabel(f"effect on target {target} by one retraining ({unit})", fontsize=10)
    figure.supylabel(f"the same effect, predicted or repeated ({unit})", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def _rows(result: xr.Dataset, kind: int, actual: np.ndarray) -> np.ndarray:
    """Return which removals are of a kind and have an effect."""
    rows: np.ndarray = (result["kind_of"].values == kind) & np.isfinite(actual[:, 0])
    return rows


def _agreement(here: xr.Dataset, kind: int) -> str:
    predicted = float(here["agreement"].isel(kind=kind))
    ceiling = float(here["agreement_of_repeats"].isel(kind=kind))
    words = f"rank correlation {predicted:.2f}"
    return words if np.isnan(ceiling) else f"{words}\nof repeats {ceiling:.2f}"


@matplotlib.rc_context(RC_PARAMS)
def draw_method_scores(result: xr.Dataset) -> Figure:
    """Draw Fig. 14: the scores of all methods, with their ceilings.

    Parameters
    ----------
    result
        `score(predictor, kind)`, `ceiling(kind)` and their `*_interval(..., bound)`: the result
        `method_scores`.

    Returns
    -------
    Figure
        One panel per kind of removals, one row per method; shaded, the interval of the ceiling.
    """
    predictors = [str(name) for name in result["predictor"].values]
    figure = Figure(figsize=(WIDTH, 1.9 + 0.3 * len(predictors)), layout="constrained")
    axes = figure.subplots(1, result.sizes["kind"], squeeze=False, sharey=True, sharex=True)[0]
    _draw_scores(figure, axes, result, "score", predictors)
    figure.supxlabel(
        "rank correlation with the actual effects: TSLOO (one sample), LDS (subsets)", fontsize=10
    )
    return figure


def _draw_scores(
    figure: Any, axes: np.ndarray, result: xr.Dataset, name: str, rows: list[str]
) -> None:
    """Draw scores (rows, kind) with intervals, one panel per kind, the ceiling as a line."""
    places = np.arange(len(rows))
    for kind, (ax, title) in enumerate(zip(axes, _titles(result), strict=True)):
        here = result.isel(kind=kind)
        low, high = here["ceiling_interval"].values
        if np.isfinite(here["ceiling"]):
            ax.axvspan(low, high, color=TRUTH, alpha=0.22, linewidth=0)
            ax.axvline(
                float(here["ceiling"]),
                color=TRUTH,
                linestyle=DASHED,
                label="ceiling: one retraining against another (shaded: 95 %)",
            )
        values = here[name].values
        bounds = here[f"{name}_interval"].transpose(..., "bound").values
        ax.hlines(places, bounds[:, 0], bounds[:, 1], color=BLUE, linewidth=1.4)
        ax.plot(values, places, "o", color=BLUE, label="score (line: 95 %)")
        for place, value in zip(places, values, strict=True):
            if np.isnan(value):
                ax.text(0.02, place, "not computed", fontsize=7.5, va="center", color="#777777")
        ax.axvline(0, color="#999999", linewidth=0.8)
        words = title.replace(", ", "\n").replace(" (", "\n(") if len(axes) > 2 else title
        ax.set_title(words, fontsize=9.5)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_yticks(places, [shorten_name(row.replace("^-1", "⁻¹"), 42) for row in rows])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    least = np.nanmin(result[f"{name}_interval"].values, initial=0.0)
    axes[0].set_xlim(max(-1.0, least - 0.04), 1.04)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)


@matplotlib.rc_context(RC_PARAMS)
def draw_removal_sizes(result: xr.Dataset) -> Figure:
    """Draw Fig. 16: whether importance predicts the size of the effect of a removal.

    Parameters
    ----------
    result
        `size(score, removal)`, `actual_size(removal, repeat)`, `kind_of(removal)`,
        `rank_correlation(score, kind)`, `ceiling(kind)`, with intervals: the result
        `removal_sizes`.

    Returns
    -------
    Figure
        Above, overall importance against the mean absolute effect, one panel per kind; below, the
        rank correlations of all scores, with their ceilings.
    """
    scores = [str(name) for name in result["score"].values]
    kinds = result.sizes["kind"]
    figure = Figure(figsize=(WIDTH, 5.3 + 0.25 * len(scores)), layout="constrained")
    upper, lower = split_halves(figure, (3.2, 1.6 + 0.25 * len(scores)))
    axes = upper.subplots(1, kinds, squeeze=False)[0]
    unit = result.attrs["target_units"]
    for kind, (ax, title) in enumerate(zip(axes, _titles(result), strict=True)):
        mine = result["kind_of"].values == kind
        size = result["size"].isel(score=0).values[mine]
        actual = result["actual_size"].transpose("removal", "repeat").values[mine]
        if actual.shape[1] > 1:
            ax.vlines(
                size,
                actual[:, 0],
                actual[:, 1],
                color=TRUTH,
                linewidth=0.9,
                label="to another retraining",
            )
        ax.scatter(size, actual[:, 0], s=20, color=VERMILLION, linewidths=0, label="one retraining")
        ax.set_title(title)
        for axis, values in ((ax.xaxis, size), (ax.yaxis, actual)):
            if scale_by_decades(axis, values) is None:
                axis.set_major_locator(MaxNLocator(nbins=5))
                axis.get_major_formatter().set_powerlimits((-2, 3))
                axis.get_major_formatter().set_useMathText(True)
        ax.set_xlabel(f"{scores[0]} (parameter²)")
    axes[0].set_ylabel(f"mean |effect| of the removal\n({unit})")
    axes[0].legend(loc="upper left")
    panels = lower.subplots(1, kinds, squeeze=False, sharey=True, sharex=True)[0]
    _draw_scores(lower, panels, result, "rank_correlation", scores)
    lower.supxlabel("rank correlation with the mean |effect|", fontsize=10)
    return figure
