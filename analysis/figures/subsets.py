"""Figures 18 and 19: errors after training on subsets, and which samples a rule selects.

Map: `draw_subset_errors` (Fig. 18), `draw_selected_samples` (19).
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sampimp.analysis.figures.axes import (
    name_ticks,
    names_of_labels,
    scale_by_decades,
    split_halves,
)
from sampimp.analysis.figures.style import (
    BLUE,
    DASHED,
    IMPORTANCE_UNIT,
    RC_PARAMS,
    VERMILLION,
    WIDTH,
    rule_style,
)

BUDGET_NAMES = {"steps": "equal steps", "epochs": "equal epochs"}
"""How budgets are written."""

MOST_DOTS = 4_000
"""More samples than this are thinned at random (arbitrary)."""

LEFT_OUT = "#a3abb3"


@matplotlib.rc_context(RC_PARAMS)
def draw_subset_errors(result: xr.Dataset) -> Figure:
    """Draw Fig. 18: test error against the size of the subset, one line per rule.

    Parameters
    ----------
    result
        `error(rule, size, budget)`, `error_se`, `full_error(budget)` and `converged_error()`: the
        result `subset_errors`.

    Returns
    -------
    Figure
        Left, equal steps; right, equal epochs. Bars are standard errors; the horizontal lines are
        the errors of all samples.
    """
    rules = [str(name) for name in result["rule"].values]
    rows = -(-(len(rules) + 2) // 4)
    figure = Figure(figsize=(WIDTH, 4.2 + 0.25 * rows), layout="constrained")
    axes = figure.subplots(1, result.sizes["budget"], squeeze=False, sharey=True)[0]
    for ax, budget in zip(axes, result["budget"].values, strict=True):
        here = result.sel(budget=budget)
        ax.set_title(BUDGET_NAMES.get(str(budget), str(budget)))
        for rule in rules:
            _draw_rule(ax, here.sel(rule=rule), rule)
        for name, color, linestyle, words in (
            ("full_error", VERMILLION, "-", "all samples, the study's epochs"),
            ("converged_error", VERMILLION, DASHED, "all samples, at convergence"),
        ):
            if np.isfinite(here[name]):
                level = 100 * float(here[name])
                ax.axhline(
                    level, color=color, linestyle=linestyle, linewidth=1.2, label=words, zorder=1
                )
        _format_size_axis(ax, result["size"].values.astype(float))
    shown = [result[name].values.ravel() for name in ("error", "full_error", "converged_error")]
    errors = 100 * np.concatenate(shown)
    if scale_by_decades(axes[0].yaxis, errors) is not None:
        _name_decades(axes[0], errors)
    axes[0].set_ylabel("test error (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _draw_rule(ax: Axes, here: xr.Dataset, rule: str) -> None:
    """Draw the errors of a rule with their standard errors, at the sizes that were trained."""
    known = np.isfinite(here["error"].values)
    spread = np.nan_to_num(here["error_se"].values[known])
    style, is_chosen = rule_style(rule), rule == "chosen"
    ax.errorbar(
        here["size"].values[known],
        100 * here["error"].values[known],
        100 * spread,
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        # Hollow and wide: the rule that was chosen has the same errors, and stays visible below.
        markersize=9 if is_chosen else 4.5,
        markerfacecolor="none" if is_chosen else style.color,
        linewidth=3.4 if is_chosen else 1.5,
        alpha=0.55 if is_chosen else 1.0,
        elinewidth=1.1,
        capsize=2,
        label="chosen by validation" if is_chosen else rule,
        zorder=2 if is_chosen else 3,
    )


def _format_size_axis(ax: Axes, sizes: np.ndarray) -> None:
    """Make the x axis logarithmic, with ticks in per cent that do not touch."""
    ax.set_xscale("log")
    ticks: list[float] = []
    for size in sizes:
        if not ticks or size > 1.35 * ticks[-1]:
            ticks.append(float(size))
    ax.set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(0.85 * sizes.min(), 1.18 * sizes.max())
    ax.set_xlabel("samples kept (%)")


def _name_decades(ax: Axes, values: np.ndarray) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    finite = values[np.isfinite(values) & (values > 0)]
    powers = range(int(np.floor(np.log10(finite.min()))) - 1, 3)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if finite.min() / 2 <= tick <= finite.max() * 2]
    ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
    ax.yaxis.set_minor_locator(NullLocator())


@matplotlib.rc_context(RC_PARAMS)
def draw_selected_samples(
    result: xr.Dataset,
    images: xr.DataArray | None = None,
    class_names: Sequence[str] = (),
) -> Figure:
    """Draw Fig. 19: which samples a rule selects.

    Parameters
    ----------
    result
        `kept(sample)`, `final_nll(sample)` in nats, `overall_importance(sample)` in parameter²,
        `kept_count(label)`, `class_size(label)`, `training_label(group, rank)`: the result
        `selected_samples`.
    images
        uint8, `(group, rank, row, column, channel)`: the samples of `position`; None if the data
        are no images.
    class_names
        Names of the labels 0, 1, 2 ...; without them the labels are shown.

    Returns
    -------
    Figure
        Left, the samples in the plane of NLL and importance; right, the classes among the kept
        samples and among all; below, examples of both groups.
    """
    strip = 0.0 if images is None else _strip_height(images)
    figure = Figure(figsize=(WIDTH, 4.4 + strip), layout="constrained")
    upper: Any = figure
    if images is not None:
        upper, lower = split_halves(figure, (4.4, strip))
        _draw_examples(lower, result, images, class_names)
    left, right = upper.subplots(1, 2, width_ratios=(1.25, 1))
    share = float(result["kept"].mean())
    name = result.attrs["variant"]
    if result.attrs["rule"] == "chosen":
        name += " (chosen by validation)"
    upper.suptitle(
        f"{name}: {100 * share:.3g} % of the samples",
        x=0.01,
        ha="left",
        fontsize=10.5,
    )
    _draw_plane(left, result)
    _draw_classes(right, result, class_names)
    return figure


def _draw_plane(ax: Axes, result: xr.Dataset) -> None:
    """Draw the samples by NLL and importance, at most `MOST_DOTS`, in random order."""
    nll, tau = result["final_nll"].values, result["overall_importance"].values
    kept = result["kept"].values
    drawn = np.flatnonzero(np.isfinite(nll) & np.isfinite(tau) & (nll > 0) & (tau > 0))
    drawn = np.random.default_rng(0).permutation(drawn)[:MOST_DOTS]
    colors = np.where(kept, BLUE, LEFT_OUT)
    ax.scatter(nll[drawn], tau[drawn], s=7, c=colors[drawn], linewidths=0, rasterized=True)
    for color, words in ((BLUE, "kept"), (LEFT_OUT, "left out")):
        ax.scatter([], [], s=24, color=color, label=words)
    ax.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", handlelength=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    thinned = f", {MOST_DOTS:,} drawn at random" if len(drawn) < len(kept) else ""
    ax.set_title(f"samples kept and left out{thinned}")
    ax.set_xlabel("negative log-likelihood after the last epoch (nat)")
    ax.set_ylabel(f"overall importance ({IMPORTANCE_UNIT})")


def _draw_classes(ax: Axes, result: xr.Dataset, class_names: Sequence[str]) -> None:
    """Draw the share of each class among the kept samples, beside that among all."""
    names = names_of_labels(result["label"].values, class_names)
    places = np.arange(len(names))
    for shift, name, color, words in (
        (-0.2, "class_size", LEFT_OUT, "all samples"),
        (0.2, "kept_count", BLUE, "kept"),
    ):
        count = result[name].values
        ax.barh(places + shift, 100 * count / count.sum(), 0.4, color=color, label=words)
    name_ticks(ax.yaxis, names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set_title("classes")
    ax.set_xlabel("share of the samples (%)")
    ax.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", handlelength=1)


def _strip_height(images: xr.DataArray) -> float:
    """Return the height in inches of two rows of images with their labels."""
    width = (WIDTH - 1.0) / images.sizes["rank"]
    return 2 * (width * images.sizes["row"] / images.sizes["column"] + 0.25) + 0.1


def _draw_examples(
    figure: Any, result: xr.Dataset, images: xr.DataArray, class_names: Sequence[str]
) -> None:
    """Draw a row of images of each group, with their classes."""
    pictures = images.transpose("group", "rank", "row", "column", "channel").values
    position = result["position"].transpose("group", "rank").values
    labels = result["training_label"].transpose("group", "rank").values
    axes = figure.subplots(2, position.shape[1], squeeze=False)
    for row, words in enumerate(("kept", "left out")):
        names = names_of_labels(labels[row], class_names)
        for ax, picture, place, name in zip(
            axes[row], pictures[row], position[row], names, strict=True
        ):
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            for spine in ax.spines.values():
                spine.set_visible(False)
            if place < 0:
                continue
            shown = picture[..., 0] if picture.shape[-1] == 1 else picture[..., :3]
            ax.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_xlabel(name, fontsize=7.5, labelpad=1.5)
        axes[row, 0].set_ylabel(words, fontsize=9.5, fontweight="bold")
