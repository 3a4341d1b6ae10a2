"""Figures 12 and 15: importance and influence by epoch and layer, and what is left at the end.

Map: `draw_influence_by_layer` (Fig. 12), `draw_share_left` (15).
"""

from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sampimp.analysis.figures.axes import (
    add_legend_below,
    color_norm,
    format_epoch_axis,
    plot_layer_lines,
    plot_layer_mesh,
    scale_by_decades,
)
from sampimp.analysis.figures.style import IMPORTANCE_UNIT, MOST_LINES, RC_PARAMS, WIDTH


@matplotlib.rc_context(RC_PARAMS)
def draw_influence_by_layer(result: xr.Dataset) -> Figure:
    """Draw Fig. 12: importance beside influence, by epoch and layer.

    Parameters
    ----------
    result
        `mean_importance(epoch, layer)` in parameter² and `mean_influence(epoch, layer)`, with the
        attributes `target` and `target_units`: the result `influence_by_layer`.

    Returns
    -------
    Figure
        Left, mean importance of a sample; right, its mean absolute influence on the target. One
        line per layer, or a heat map.
    """
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title("importance: what a sample did in its step")
    _draw_layers(figure, left, result["mean_importance"], f"mean importance ({IMPORTANCE_UNIT})")
    right.set_title("influence: what that changed at the end")
    unit = f"{result.attrs['target_units']} per unit of weight"
    label = f"mean |influence| on target {result.attrs['target']}\n({unit})"
    _draw_layers(figure, right, result["mean_influence"], label)
    if result.sizes["layer"] <= MOST_LINES:
        add_legend_below(figure, left, "layer")
    return figure


@matplotlib.rc_context(RC_PARAMS)
def draw_share_left(result: xr.Dataset) -> Figure:
    """Draw Fig. 15: how much of each epoch's importance is left in the final parameters.

    Parameters
    ----------
    result
        `mean_arriving(epoch, layer)` in parameter² and `share_left(epoch, layer)`: the result
        `influence_by_layer`.

    Returns
    -------
    Figure
        Left, mean arriving importance of a sample; right, its ratio to importance, with a line at
        1, where training neither forgot nor amplified it.
    """
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title("what is left in the final parameters")
    _draw_layers(
        figure, left, result["mean_arriving"], f"mean arriving importance\n({IMPORTANCE_UNIT})"
    )
    right.set_title("left at the end, over exerted in the step")
    share = result["share_left"]
    _draw_layers(figure, right, share, "arriving importance / importance")
    if share.sizes["layer"] <= MOST_LINES:
        right.axhline(1, color="#555555", linewidth=0.9)
        add_legend_below(figure, left, "layer")
    return figure


def _draw_layers(figure: Any, ax: Axes, values: xr.DataArray, label: str) -> None:
    """Draw `(epoch, layer)` as lines without legend, or as a heat map with its colour bar."""
    values = values.transpose("epoch", "layer")
    if values.sizes["layer"] > MOST_LINES:
        mesh = plot_layer_mesh(ax, values.transpose("layer", "epoch"), color_norm(values.values))
        figure.colorbar(mesh, ax=ax, label=label)
    else:
        plot_layer_lines(ax, values)
        scale_by_decades(ax.yaxis, np.asarray(values.values))
        ax.set_ylabel(label)
    format_epoch_axis(ax, values["epoch"].values)
