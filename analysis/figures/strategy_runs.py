"""Figures 7 to 9: training under the batch strategies.

Map: `draw_curves` (Fig. 7), `draw_paths` (8), `draw_class_nll` (9).
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sampimp.analysis.figures.axes import (
    color_norm,
    draw_message,
    format_epoch_axis,
    has_finite,
    names_of_labels,
    plot_class_lines,
    plot_line,
    plot_mesh,
    scale_by_decades,
)
from sampimp.analysis.figures.style import (
    BLUE,
    DASHED,
    MOST_CLASSES,
    RC_PARAMS,
    VERMILLION,
    WIDTH,
    Style,
    strategy_name,
    strategy_style,
)


@matplotlib.rc_context(RC_PARAMS)
def draw_curves(curves: xr.Dataset) -> Figure:
    """Draw Fig. 7: train and test error of the strategies, mean and standard error over seeds.

    Parameters
    ----------
    curves
        `train_error` and `test_error(strategy, epoch)` as fractions, `*_se`, `runs` and
        `diverged(strategy)`: the result `strategy_curves`.

    Returns
    -------
    Figure
        Two panels; bands are one standard error; a red cross marks the epochs at which a run of
        the strategy diverged and leaves the mean.
    """
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, name in zip(axes, ("train_error", "test_error"), strict=True):
        for strategy in curves["strategy"].values:
            _draw_curve(ax, curves.sel(strategy=strategy), name)
        scale_by_decades(ax.yaxis, curves[name].values * 100)
        ax.set_title(f"{name.replace('_', ' ')} by strategy")
        ax.set_ylabel(f"{name.replace('_', ' ')} (% of samples)")
        format_epoch_axis(ax, curves["epoch"].values)
    handles, labels = axes[1].get_legend_handles_labels()
    if "diverged" in curves and (curves["diverged"] > 0).any():
        handles.append(Line2D([], [], color="#cc0000", marker="x", linestyle="", markersize=8))
        labels.append("a run diverged")
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, title="strategy (± standard error)"
    )
    return figure


def _draw_curve(ax: Axes, curve: xr.Dataset, name: str) -> None:
    """Draw one strategy's mean and standard error, and mark the epochs in which runs diverged."""
    strategy = str(curve["strategy"].item())
    values = curve[name].values * 100
    if not np.isfinite(values).any():
        return
    style, epochs = strategy_style(strategy), curve["epoch"].values
    diverged = int(curve["diverged"].item()) if "diverged" in curve else 0
    label = strategy_name(strategy) + (f" ({diverged} diverged)" if diverged else "")
    plot_line(ax, epochs, values, style, label)
    if f"{name}_se" in curve:
        error = curve[f"{name}_se"].values * 100
        ax.fill_between(
            epochs, values - error, values + error, color=style.color, alpha=0.18, linewidth=0
        )
    if diverged and "runs" in curve:
        runs = curve["runs"].values
        # The cross is at the last epoch with the run: a strategy may have no run after it.
        last = np.flatnonzero(np.diff(runs, append=runs[-1:]) < 0)
        last = last[np.isfinite(values[last])]
        ax.plot(epochs[last], values[last], "x", color="#cc0000", markersize=9, mew=2, zorder=5)


@matplotlib.rc_context(RC_PARAMS)
def draw_paths(paths: xr.Dataset) -> Figure:
    """Draw Fig. 8: the paths of all parameters by strategy, in their principal components.

    Parameters
    ----------
    paths
        `path(strategy, state, component)`, `explained_variance_ratio(component)`, and optionally
        `fitted(strategy)`, false for a diverged run: the result `parameter_paths`.

    Returns
    -------
    Figure
        The second component against the first and, if there is one, the third against the first.
        A ring marks the start and a large marker the end. The axes are limited to the runs that did
        not diverge.
    """
    components = paths.sizes["component"]
    pairs = [(0, 1), (0, 2)] if components > 2 else [(0, min(1, components - 1))]
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    names = [str(name) for name in paths["component"].values]
    ratios = paths["explained_variance_ratio"].values * 100
    fitted = paths["fitted"].values if "fitted" in paths else np.ones(len(paths["strategy"]), bool)
    for ax, (horizontal, vertical) in zip(axes, pairs, strict=True):
        converged = []
        for strategy, whole in zip(paths["strategy"].values, fitted, strict=True):
            path = paths["path"].sel(strategy=strategy).transpose("component", "state")
            xy = path.values[[horizontal, vertical]]
            xy = xy[:, np.isfinite(xy).all(axis=0)]
            if xy.size:
                _draw_path(ax, xy, str(strategy), diverged=not whole)
                if whole:
                    converged.append(xy)
        if converged and not fitted.all():
            # The last steps of a diverged run can be larger than all others: the axes omit them.
            points = np.hstack(converged)
            low, high = points.min(axis=1), points.max(axis=1)
            margin = 0.15 * (high - low)
            ax.set_xlim(low[0] - margin[0], high[0] + margin[0])
            ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
        for axis, component in ((ax.xaxis, horizontal), (ax.yaxis, vertical)):
            number = names[component] if names[component].isdigit() else str(component + 1)
            axis.set_label_text(
                f"principal component {number} (parameter; {ratios[component]:.1f} % of variance)"
            )
        if not converged or fitted.all():
            ax.margins(0.08)
    handles, labels = _first_of_each_label(axes[0].get_legend_handles_labels())
    handles.append(Line2D([], [], color="white", mec="#333333", marker="o", linestyle="", ms=9))
    labels.append("start")
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, title="strategy (large: end)"
    )
    return figure


def _draw_path(ax: Axes, xy: np.ndarray, strategy: str, *, diverged: bool) -> None:
    """Draw one path [2, state] with a ring at its start and a large marker at its end."""
    style = strategy_style(strategy)
    name = strategy_name(strategy) + (" (diverged)" if diverged else "")
    plot_line(ax, xy[0], xy[1], style, name, size=4)
    ax.plot(*xy[:, 0], "o", color="white", mec="#333333", markersize=9, zorder=4)
    edge = {"mew": 2.0} if diverged else {"mec": "white"}
    ax.plot(
        *xy[:, -1],
        "x" if diverged else style.marker,
        color="#cc0000" if diverged else style.color,
        markersize=10,
        zorder=5,
        **edge,
    )


@matplotlib.rc_context(RC_PARAMS)
def draw_class_nll(curves: xr.Dataset, class_names: Sequence[str] = ()) -> Figure:
    """Draw Fig. 9: error curves and the NLL of each class, strategy by strategy.

    Parameters
    ----------
    curves
        `train_error` and `test_error(strategy, epoch)` as fractions and
        `class_nll(strategy, epoch, label)` in nats: the result `strategy_curves`.
    class_names
        Names of the labels 0, 1, 2 ...; without them the labels are shown.

    Returns
    -------
    Figure
        One block per strategy, all on the same scales: errors above, classes below.
    """
    strategies = [
        strategy
        for strategy in curves["strategy"].values
        if has_finite(curves["test_error"].sel(strategy=strategy))
        or has_finite(curves["class_nll"].sel(strategy=strategy))
    ]
    if not strategies:
        return draw_message("No run has finished an epoch yet.")
    columns = min(3, len(strategies))
    lines = -(-len(strategies) // columns)
    many = curves.sizes["label"] > MOST_CLASSES
    figure = Figure(figsize=(WIDTH, 3.9 * lines + 0.9), layout="constrained")
    axes = figure.subplots(
        2 * lines, columns, squeeze=False, sharex=True, height_ratios=(0.75, 1) * lines
    )
    for above, below in zip(axes[::2].flat, axes[1::2].flat, strict=True):
        if above is not axes[0, 0]:
            above.sharey(axes[0, 0])
            below.sharey(axes[1, 0])
    names = names_of_labels(curves["label"].values, class_names)
    errors = np.stack([curves["train_error"].values, curves["test_error"].values]) * 100
    norm = color_norm(curves["class_nll"].values)
    for index, strategy in enumerate(strategies):
        curve = curves.sel(strategy=strategy)
        upper, lower = (axes[2 * (index // columns) + k, index % columns] for k in (0, 1))
        _draw_errors(upper, curve, errors)
        panel = curve["class_nll"].transpose("label", "epoch")
        if many:
            mesh = plot_mesh(lower, panel["epoch"].values, names, panel.values, norm)
            lower.set_ylabel("class")
        else:
            plot_class_lines(lower, panel, names)
            scale_by_decades(lower.yaxis, curves["class_nll"].values)
            lower.set_ylabel("NLL (nat)")
        format_epoch_axis(lower, panel["epoch"].values)
        lower.tick_params(labelbottom=True)
    for index in range(len(strategies), lines * columns):
        for k in (0, 1):
            axes[2 * (index // columns) + k, index % columns].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if many:
        figure.colorbar(
            mesh, ax=axes.ravel().tolist(), label="mean NLL of a class (nat)", shrink=0.5
        )
    else:
        more = axes[1, 0].get_legend_handles_labels()
        handles, labels = handles + more[0], labels + [_class_label(name) for name in more[1]]
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def _draw_errors(ax: Axes, curve: xr.Dataset, all_errors: np.ndarray) -> None:
    """Draw one strategy's train and test error in per cent, on the scale of all strategies."""
    diverged = int(curve["diverged"].item()) if "diverged" in curve else 0
    mark = f" ({diverged} diverged)" if diverged else ""
    ax.set_title(strategy_name(str(curve["strategy"].item())) + mark)
    for name, style in (
        ("train_error", Style(BLUE, DASHED, "o")),
        ("test_error", Style(VERMILLION, "-", "s")),
    ):
        label = name.replace("_", " ")
        plot_line(ax, curve["epoch"].values, curve[name].values * 100, style, label)
    scale_by_decades(ax.yaxis, all_errors)
    ax.set_ylabel("error (%)")
    ax.set_xlabel("")


def _class_label(name: str) -> str:
    """Return a class's name for a legend with other entries: 'class 3' for a number."""
    return f"class {name}" if name.isdigit() else name


def _first_of_each_label(legend: tuple[list[Any], list[str]]) -> tuple[list[Any], list[str]]:
    """Return a legend's handles and labels without repeated labels."""
    kept: dict[str, Line2D | Patch] = {}
    for handle, label in zip(*legend, strict=True):
        kept.setdefault(label, handle)
    return list(kept.values()), list(kept)
