"""Figures 1 to 4 and 10: importance in the reference runs.

Map: `draw_stability` (Fig. 1), `draw_decomposition` (2), `draw_groups` (3),
`draw_importance_against_nll` (4), `draw_histogram` (10).
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sampimp.analysis.figures.axes import (
    add_legend_below,
    add_legend_beside,
    color_norm,
    draw_message,
    format_epoch_axis,
    has_finite,
    label_panels,
    name_ticks,
    names_of_labels,
    plot_class_lines,
    plot_layer_lines,
    plot_layer_mesh,
    plot_layers,
    plot_line,
    plot_mesh,
    plot_panel,
    scale_by_decades,
    shorten_name,
    split_halves,
    split_layers,
)
from sampimp.analysis.figures.style import (
    BLUE,
    CATEGORIES,
    DASHED,
    IMPORTANCE_UNIT,
    MOST_CLASSES,
    MOST_LINES,
    RC_PARAMS,
    VERMILLION,
    WIDTH,
    Style,
    ordered_styles,
)

MOST_POINTS = 5_000
"""A scatter of more samples than this is drawn as the density of hexagonal bins."""

MOST_VECTORS = 300
"""More points than this are pixels in SVG and PDF: each would be a shape of 100 bytes."""


@matplotlib.rc_context(RC_PARAMS)
def draw_stability(stability: xr.Dataset) -> Figure:
    """Draw Fig. 1: the rank correlation of importance between initialisations, by epoch.

    Parameters
    ----------
    stability
        `rank_correlation(reference, epoch, pair)`, its `rank_correlation_interval` (with `bound`)
        and `layer_rank_correlation(reference, epoch, layer, pair)`: the result `stability`.

    Returns
    -------
    Figure
        One column per reference strategy that was run. Above, model importance with its interval,
        one line per pair of seeds. Below, the layers.
    """
    shown = [
        reference
        for reference in stability["reference"].values
        if has_finite(stability["rank_correlation"].sel(reference=reference))
    ]
    if not shown:
        return draw_message("No two reference runs of the same kind have been recorded yet.")
    layered = "layer_rank_correlation" in stability
    figure = Figure(figsize=(WIDTH, 6.6 if layered else 3.6), layout="constrained")
    axes = figure.subplots(1 + layered, len(shown), squeeze=False, sharey="row")
    pairs = [str(pair) for pair in stability["pair"].values]
    for column, reference in enumerate(shown):
        here = stability.sel(reference=reference)
        ax = axes[0, column]
        ax.set_title(_reference_title(str(reference)))
        for index, pair in enumerate(pairs):
            style = CATEGORIES[index % len(CATEGORIES)]
            curve = here["rank_correlation"].isel(pair=index)
            if not has_finite(curve):
                continue
            plot_line(ax, curve["epoch"].values, curve.values, style, pair)
            if "rank_correlation_interval" in here:
                bounds = here["rank_correlation_interval"].isel(pair=index)
                ax.fill_between(
                    curve["epoch"].values,
                    bounds.isel(bound=0).values,
                    bounds.isel(bound=-1).values,
                    color=style.color,
                    alpha=0.2,
                    linewidth=0,
                )
        if layered:
            mesh = _draw_layer_stability(axes[1, column], here["layer_rank_correlation"])
        for ax in axes[:, column]:
            format_epoch_axis(ax, here["epoch"].values)
    axes[0, 0].set_ylabel("Spearman correlation of\nmodel importance (-1 to 1)")
    if len(pairs) <= len(CATEGORIES):
        add_legend_beside(axes[0, -1], "pair of seeds\n(shaded: 95 %)")
    if layered and mesh is not None:
        figure.colorbar(mesh, ax=list(axes[1]), label="Spearman correlation (-1 to 1)")
        axes[1, 0].set_ylabel("layer")
    elif layered:
        axes[1, 0].set_ylabel("Spearman correlation of\na layer's importance (-1 to 1)")
        add_legend_beside(axes[1, -1], "layer (one line\na pair of seeds)")
    return figure


def _reference_title(reference: str) -> str:
    """Return a reference strategy's title, with its order of batches."""
    return {
        "shuffle": "shuffle: one order for all seeds",
        "shuffle_by_seed": "shuffle by seed: an order for each",
    }.get(reference, reference)


def _draw_layer_stability(ax: Axes, correlation: xr.DataArray) -> QuadMesh | None:
    """Draw the layers of one reference: one line per pair, or the first pair as a heat map."""
    if correlation.sizes["layer"] > MOST_LINES:
        first = correlation.isel(pair=0)
        ax.set_title(f"each layer, seeds {first['pair'].item()}")
        # One scale for both references; a correlation below 0 is shown as 0.
        return plot_layer_mesh(ax, first.transpose("layer", "epoch"), Normalize(0, 1))
    for style, (name, layer) in zip(
        ordered_styles(correlation.sizes["layer"]), split_layers(correlation), strict=True
    ):
        for index in range(layer.sizes["pair"]):
            values = layer.isel(pair=index).values
            plot_line(ax, layer["epoch"].values, values, style, name if index == 0 else None)
    return None


@matplotlib.rc_context(RC_PARAMS)
def draw_decomposition(decomposition: xr.Dataset, class_names: Sequence[str] = ()) -> Figure:
    """Draw Fig. 2: the importance of all samples by epoch, layer and class.

    Parameters
    ----------
    decomposition
        `importance_by_layer(epoch, layer)`, `importance_by_class(epoch, layer, label)` and
        `class_size(label)`, in parameter²: the result `decomposition`.
    class_names
        Names of the labels 0, 1, 2 ...; without them the labels are shown.

    Returns
    -------
    Figure
        Above, one line per layer. Below, one panel per layer with one line per class, for at most
        four layers: the first, the last and two between.
    """
    by_layer, by_class = decomposition["importance_by_layer"], decomposition["importance_by_class"]
    layers = by_layer.sizes["layer"]
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, 4)).round().astype(int))
    many = by_class.sizes["label"] > MOST_CLASSES
    figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
    upper, lower = split_halves(figure, (1, 1.15))
    ax = upper.subplots()
    ax.set_title("all samples, by layer")
    plot_layers(upper, ax, by_layer, f"importance of all samples\n({IMPORTANCE_UNIT})")
    axes = lower.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    names = names_of_labels(decomposition["label"].values, class_names)
    values = by_class.isel(layer=chosen).values
    norm = color_norm(values)
    for ax, index in zip(axes, chosen, strict=True):
        panel = by_class.isel(layer=index).transpose("label", "epoch")
        ax.set_title(f"{shorten_name(str(panel['layer'].item()))}, by class")
        if many:
            mesh = plot_mesh(ax, panel["epoch"].values, names, panel.values, norm)
        else:
            plot_class_lines(ax, panel, names)
            scale_by_decades(ax.yaxis, values)
        format_epoch_axis(ax, panel["epoch"].values)
    if many:
        lower.colorbar(mesh, ax=list(axes), label=f"importance of a class ({IMPORTANCE_UNIT})")
        axes[0].set_ylabel("class")
    else:
        axes[0].set_ylabel(f"importance of a class\n({IMPORTANCE_UNIT})")
        add_legend_below(lower, axes[0], "class")
    return figure


@matplotlib.rc_context(RC_PARAMS)
def draw_groups(groups: xr.Dataset) -> Figure:
    """Draw Fig. 3: the importance of the top 10 %, the next 10 % and the other 80 %.

    Parameters
    ----------
    groups
        `importance_by_group(group, epoch, layer)` in parameter², `share(group)` and
        `share_by_layer(group, layer)`: the result `importance_groups`.

    Returns
    -------
    Figure
        Above, one panel per group with its layers. Below, the groups' shares, of all layers
        together and of each layer.
    """
    importance = groups["importance_by_group"]
    names = [str(name) for name in groups["group"].values]
    figure = Figure(figsize=(WIDTH, 7.0), layout="constrained")
    upper, lower = split_halves(figure, (1.2, 1))
    axes = upper.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for index, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.set_title(f"{name} of the samples")
        plot_panel(ax, importance.isel(group=index), importance.values)
    label_panels(upper, axes, importance, f"importance of the group\n({IMPORTANCE_UNIT})")
    _draw_shares(lower.subplots(), groups, names)
    return figure


def _draw_shares(ax: Axes, groups: xr.Dataset, names: Sequence[str]) -> None:
    """Draw the groups' shares as bars: of all layers together, then of each layer."""
    by_layer = groups["share_by_layer"].transpose("group", "layer")
    where = ["all layers", *(str(layer) for layer in by_layer["layer"].values)]
    shares = np.concatenate([groups["share"].values[:, None], by_layer.values], axis=1) * 100
    styles = ordered_styles(len(names), light=True)
    places = np.arange(len(where))
    hatches = ("", "//", "..", "xx", "--", "++")
    width = 0.8 / max(1, len(names))
    for index, (name, style) in enumerate(zip(names, styles, strict=True)):
        if len(where) > MOST_LINES + 1:  # too many for bars
            plot_line(ax, places, shares[index], style, name)
            continue
        bars = ax.bar(
            places + (index - (len(names) - 1) / 2) * width,
            shares[index],
            width,
            color=style.color,
            edgecolor="white",
            hatch=hatches[index % len(hatches)],
            linewidth=0,
            label=name,
        )
        if len(where) * len(names) <= 24:
            ax.bar_label(bars, fmt="%.0f %%", fontsize=8.5, padding=1)
    name_ticks(ax.xaxis, where, most=8)
    ax.axvline(0.5, color="#999999", linewidth=0.8)
    ax.grid(axis="x", visible=False)
    ax.set_title("share of the importance held by each group")
    ax.set_ylabel("share of the importance (%)")
    ax.set_ylim(0, max(100, np.nanmax(shares, initial=0) * 1.05))
    add_legend_beside(ax, "group of samples")


@matplotlib.rc_context(RC_PARAMS)
def draw_importance_against_nll(against: xr.Dataset) -> Figure:
    """Draw Fig. 4: sample importance against negative log-likelihood.

    Parameters
    ----------
    against
        `rank_correlation(epoch, layer)`, `model_rank_correlation(epoch)`,
        `overall_importance(sample)` in parameter², `final_nll(sample)` in nats,
        `overall_rank_correlation`, and optionally
        `importance_by_difficulty(difficulty, epoch, layer)`: the result `importance_against_nll`.

    Returns
    -------
    Figure
        Left, the rank correlation of an epoch's importance with its NLL. Right, the samples, as
        points or (more than `MOST_POINTS`) as a density. Below, importance by layer of easy and
        hard samples.
    """
    grouped = "importance_by_difficulty" in against
    figure = Figure(figsize=(WIDTH, 7.8 if grouped else 4.6), layout="constrained")
    upper: Any = figure
    if grouped:
        upper, lower = split_halves(figure, (4.4, 3.4))
        _draw_difficulty(lower, against["importance_by_difficulty"])
    left, right = upper.subplots(1, 2, width_ratios=(1.15, 1))
    correlation, model = against["rank_correlation"], against["model_rank_correlation"]
    left.set_title("rank correlation with NLL, by epoch")
    if correlation.sizes["layer"] > MOST_LINES:
        mesh = plot_layer_mesh(left, correlation.transpose("layer", "epoch"), None)
        left.set_ylabel("layer")
        upper.colorbar(mesh, ax=left, label="Spearman correlation (-1 to 1)")
    else:
        plot_layer_lines(left, correlation)
        style = Style(VERMILLION, "-", "")
        plot_line(left, model["epoch"].values, model.values, style, "all layers", linewidth=2.6)
        left.set_ylabel("Spearman correlation (-1 to 1)")
        left.legend(loc="best", ncols=2)
    format_epoch_axis(left, correlation["epoch"].values)
    _draw_scatter(upper, right, against)
    return figure


def _draw_difficulty(figure: Any, importance: xr.DataArray) -> None:
    """Draw one panel for each group of samples of similar difficulty, with its layers."""
    names = [str(name) for name in importance["difficulty"].values]
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for index, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.set_title(f"{shorten_name(name, 20)} samples (by NLL)")
        plot_panel(ax, importance.isel(difficulty=index), importance.values)
    label_panels(figure, axes, importance, f"mean importance of a sample\n({IMPORTANCE_UNIT})")


def _draw_scatter(figure: Any, ax: Axes, against: xr.Dataset) -> None:
    """Draw final NLL against overall importance: one point per sample, or their density."""
    nll, overall = against["final_nll"].values, against["overall_importance"].values
    drawn = np.isfinite(nll) & np.isfinite(overall) & (nll > 0) & (overall > 0)
    ax.set_title("the samples after the last epoch")
    if drawn.sum() > MOST_POINTS:
        hexagons = ax.hexbin(
            nll[drawn],
            overall[drawn],
            xscale="log",
            yscale="log",
            bins="log",
            gridsize=60,
            mincnt=1,
            cmap="cividis_r",
            linewidths=0.1,
            rasterized=True,
        )
        figure.colorbar(hexagons, ax=ax, label="samples in a bin")
    else:
        rasterized = bool(drawn.sum() > MOST_VECTORS)
        ax.scatter(
            nll[drawn],
            overall[drawn],
            s=9,
            color="#3590c9",  # seen on white and on the page's dark background
            alpha=0.45,
            linewidths=0,
            rasterized=rasterized,
        )
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set_xlabel("negative log-likelihood after the last epoch (nat)")
    ax.set_ylabel(f"overall importance ({IMPORTANCE_UNIT})")
    notes = []
    if "overall_rank_correlation" in against:
        note = f"Spearman correlation {against['overall_rank_correlation'].item():.3f}"
        if "overall_rank_correlation_interval" in against:
            bounds = against["overall_rank_correlation_interval"].values.ravel()
            note += f"\n95 % interval {bounds[0]:.3f} to {bounds[-1]:.3f}"
        notes.append(note)
    if not drawn.all():
        notes.append(f"not drawn: {int((~drawn).sum()):,} samples\nat exactly 0 or unmeasured")
    ax.text(0.03, 0.97, "\n".join(notes), transform=ax.transAxes, va="top", fontsize=9)


@matplotlib.rc_context(RC_PARAMS)
def draw_histogram(histogram: xr.Dataset) -> Figure:
    """Draw Fig. 10: the distribution of overall importance over the samples.

    Parameters
    ----------
    histogram
        `count(bin)`, `bin_edge(edge)` as log10 of parameter², `quantile(q)` in parameter², `gini`
        and `zeros` (samples in no bin): the result `importance_histogram`.

    Returns
    -------
    Figure
        One panel with the stored quantiles as labelled lines.
    """
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    ax = figure.subplots()
    edges, counts = histogram["bin_edge"].values, histogram["count"].values
    ax.stairs(counts, edges, fill=True, color="#9cc6e0", edgecolor=BLUE, linewidth=0.8)
    scale_by_decades(ax.yaxis, counts)
    ax.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.set_xlabel(
        f"overall importance of a sample, all layers and epochs ({IMPORTANCE_UNIT}, log scale)"
    )
    ax.set_ylabel("number of samples")
    ax.set_title("distribution of the overall importance", pad=44)
    if "quantile" in histogram:
        quantiles = histogram["quantile"]
        levels = quantiles[quantiles.dims[0]].values.astype(float)
        for index, (level, value) in enumerate(zip(levels, quantiles.values, strict=True)):
            if not np.isfinite(value) or value <= 0 or level in (0.0, 1.0):
                continue
            ax.axvline(np.log10(value), color=VERMILLION, linestyle=DASHED, linewidth=1.1)
            ax.annotate(
                f"{level * 100:g} %",
                (np.log10(value), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(
                    0,
                    3 + 11 * (index % 3),
                ),  # heights alternate, so that neighbours do not overlap
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=VERMILLION,
            )
    notes = []
    if "gini" in histogram:
        notes.append(f"Gini coefficient {histogram['gini'].item():.3f}")
    if "zeros" in histogram and histogram["zeros"].item():
        notes.append(f"not drawn: {int(histogram['zeros'].item()):,} samples at exactly 0")
    ax.set_title("\n".join(notes), loc="right", pad=44, fontweight="normal", fontsize=9.5)
    return figure


def _power_of_ten(value: float, _: int) -> str:
    return f"$10^{{{value:g}}}$"
