"""Axes that several figures share: lines, heat maps, panels, scales, ticks and legends.

Up to `MOST_LINES` layers, or `MOST_CLASSES` classes, are lines; more are a heat map. An axis is
logarithmic where its values span more than one decade, as importance does.

Map: `plot_line`, `plot_layer_lines`, `plot_class_lines`, `plot_mesh`, `plot_layer_mesh` (into one
axes); `plot_layers`, `plot_panel`, `label_panels` (lines or a heat map, with legend or colour bar);
`format_epoch_axis`, `scale_by_decades`, `color_norm`, `name_ticks`, `ticks_between` (scales and
ticks);
`add_legend_beside`, `add_legend_below`; `split_halves`, `draw_message` (whole figures).
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sampimp.analysis.figures.style import CATEGORIES, MOST_LINES, WIDTH, Style, ordered_styles


def draw_message(text: str) -> Figure:
    """Return a figure with a message, for a result without values to draw."""
    figure = Figure(figsize=(WIDTH, 1.2))
    figure.text(0.5, 0.5, text, ha="center", va="center", color="#555555")
    return figure


def split_halves(figure: Figure, ratios: tuple[float, float]) -> tuple[Any, Any]:
    """Divide a figure into an upper and a lower part, each with its own layout and legend."""
    parts: Any = figure.subfigures(2, 1, height_ratios=ratios)
    return parts[0], parts[1]


def has_finite(values: xr.DataArray) -> bool:
    """Return whether any value is finite."""
    return bool(np.isfinite(values.values).any())


def plot_line(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    style: Style,
    label: str | None,
    *,
    linewidth: float | None = None,
    size: float | None = None,
) -> None:
    """Plot one line, with about eight markers along it."""
    ax.plot(
        x,
        y,
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        markevery=max(1, len(x) // 8),
        markersize=size,
        linewidth=linewidth,
        label=label,
    )


def split_layers(array: xr.DataArray) -> list[tuple[str, xr.DataArray]]:
    """Return each layer's name and values, the layer axis removed."""
    return [
        (str(array["layer"].values[index]), array.isel(layer=index))
        for index in range(array.sizes["layer"])
    ]


def plot_layer_lines(ax: Axes, values: xr.DataArray) -> None:
    """Plot `(epoch, layer)` as one line per layer."""
    for style, (name, layer) in zip(
        ordered_styles(values.sizes["layer"]), split_layers(values), strict=True
    ):
        plot_line(ax, layer["epoch"].values, layer.values, style, name)


def plot_layers(figure: Any, ax: Axes, values: xr.DataArray, label: str) -> None:
    """Draw `(epoch, layer)` as lines with a legend, or as a heat map with its colour bar."""
    if values.sizes["layer"] > MOST_LINES:
        mesh = plot_layer_mesh(ax, values.transpose("layer", "epoch"), color_norm(values.values))
        ax.set_ylabel("layer")
        figure.colorbar(mesh, ax=ax, label=label)
    else:
        plot_layer_lines(ax, values)
        scale_by_decades(ax.yaxis, values.values)
        ax.set_ylabel(label)
        add_legend_beside(ax, "layer")
    format_epoch_axis(ax, values["epoch"].values)


def plot_panel(ax: Axes, panel: xr.DataArray, all_values: np.ndarray) -> None:
    """Draw `(epoch, layer)` on the scale of `all_values`, those of all panels in its row."""
    if panel.sizes["layer"] > MOST_LINES:
        plot_layer_mesh(ax, panel.transpose("layer", "epoch"), color_norm(all_values))
    else:
        plot_layer_lines(ax, panel)
        scale_by_decades(ax.yaxis, all_values)
    format_epoch_axis(ax, panel["epoch"].values)


def label_panels(figure: Any, axes: np.ndarray, values: xr.DataArray, label: str) -> None:
    """Add the common y label and the legend or colour bar to panels of `plot_panel`."""
    if values.sizes["layer"] > MOST_LINES:
        figure.colorbar(axes[0].collections[0], ax=list(axes), label=label)
        axes[0].set_ylabel("layer")
    else:
        axes[0].set_ylabel(label)
        add_legend_below(figure, axes[0], "layer")


def plot_class_lines(ax: Axes, values: xr.DataArray, names: Sequence[str]) -> None:
    """Plot `(label, epoch)` as one line per class."""
    for index, name in enumerate(names):
        plot_line(ax, values["epoch"].values, values.values[index], CATEGORIES[index], name)


def plot_layer_mesh(ax: Axes, values: xr.DataArray, norm: Normalize | None) -> QuadMesh:
    """Draw `(layer, epoch)` as a heat map, the first layer on top."""
    names = [str(name) for name in values["layer"].values]
    return plot_mesh(ax, values["epoch"].values, names, values.values, norm)


def plot_mesh(
    ax: Axes, epochs: np.ndarray, names: Sequence[str], values: np.ndarray, norm: Normalize | None
) -> QuadMesh:
    """Draw values [name, epoch] as a heat map, the first name on top."""
    ax.grid(visible=False)
    rows = np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(
        cell_edges(epochs.astype(float)), rows, values, norm=norm, cmap="viridis", rasterized=True
    )
    ax.set_ylim(len(names) - 0.5, -0.5)
    name_ticks(ax.yaxis, names)
    return mesh


def cell_edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders of cells with these centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def name_ticks(axis: Any, names: Sequence[str], most: int = 15) -> None:
    """Label positions 0, 1, ... of an axis by name; at most `most` of them, evenly spaced."""
    step = -(-len(names) // most)
    axis.set_ticks(range(0, len(names), step), [shorten_name(name) for name in names[::step]])


def shorten_name(name: str, most: int = 14) -> str:
    """Return a name cut to `most` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def format_epoch_axis(ax: Axes, epochs: np.ndarray, most: int = 6) -> None:
    """Label the x axis and put its ticks on whole epochs, at most `most` intervals."""
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        ax.set_xlim(epochs[0] - 0.6, epochs[0] + 0.6)


def scale_by_decades(axis: Any, values: np.ndarray) -> float | None:
    """Make an axis logarithmic if its values span more than a decade.

    If a value is exactly 0 (an error of zero), the axis is linear below the smallest positive
    value.

    Returns
    -------
    float or None
        The smallest value that the axis can show; None if it stays linear.
    """
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size or positive.max() < 10 * positive.min():
        return None
    least = float(positive.min())
    scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    if (values[np.isfinite(values)] <= 0).any():
        least = max(least, float(positive.max()) * 1e-12)
        scale("symlog", linthresh=least, linscale=0.4)
        limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
        limits(0, float(positive.max()) * 1.6)
        return 0.0
    scale("log")
    if positive.max() < 300 * least:  # few decades: label minor ticks as well
        axis.set_minor_formatter(FuncFormatter(_minor_tick))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if not 1e-3 < least < 1e4:
            axis.set_major_formatter(matplotlib.ticker.LogFormatterSciNotation())
            axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", labelsize=8)
    return least


def _minor_tick(value: float, _: int) -> str:
    """Return the label of a minor tick: 2 and 5 of each decade have one."""
    return f"{value:g}" if f"{value:e}"[0] in "25" and f"{value:.1e}"[2] == "0" else ""


def color_norm(values: np.ndarray) -> Normalize | None:
    """Return a colour scale, logarithmic if the values span more than a decade.

    None if no value is positive.
    """
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return None
    least, most = float(positive.min()), float(positive.max())
    if most < 10 * least or (values[np.isfinite(values)] < 0).any():
        return Normalize(float(np.nanmin(values)), most)
    return LogNorm(max(least, most * 1e-12), most)


def ticks_between(low: float, high: float, *, logarithmic: bool = False) -> list[float]:
    """Return round numbers from `low` to `high`, at most six.

    Examples
    --------
    >>> ticks_between(1.62, 2.07), ticks_between(1.5, 60, logarithmic=True)
    ([1.7, 1.8, 1.9, 2.0], [2.0, 5.0, 10.0, 20.0, 50.0])
    """
    locator = LogLocator(subs=(1, 2, 5)) if logarithmic else MaxNLocator(5, steps=[1, 2, 5, 10])
    ticks = [float(f"{tick:.10g}") for tick in locator.tick_values(low, high)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside[:: -(-len(inside) // 6) or 1]


def names_of_labels(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return the data set's class names of the labels, or the labels if it has none."""
    if names and np.issubdtype(labels.dtype, np.integer) and labels.max() < len(names):
        return [shorten_name(str(names[label])) for label in labels]
    return [shorten_name(str(label)) for label in labels]


def add_legend_beside(ax: Axes, title: str) -> None:
    """Put the legend to the right of the axes."""
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title=title)


def add_legend_below(figure: Any, ax: Axes, title: str) -> None:
    """Put the legend of the axes below the whole figure."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, title=title)
