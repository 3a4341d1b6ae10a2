"""Figures 5 and 6: the clusters of the samples of one class.

Map: `draw_clusters`.
"""

import textwrap

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from sampimp.analysis.figures.axes import (
    cell_edges,
    color_norm,
    format_epoch_axis,
    scale_by_decades,
)
from sampimp.analysis.figures.style import BLUE, RC_PARAMS, VERMILLION, WIDTH


@matplotlib.rc_context(RC_PARAMS)
def draw_clusters(clusters: xr.Dataset, images: xr.DataArray | None = None) -> Figure:
    """Draw Figs. 5 and 6: the clusters of one class, one per row.

    Parameters
    ----------
    clusters
        `profile(cluster, epoch, layer)`, `size(cluster)` and `nll_quantile(cluster, quantile)` in
        nats: the result `clusters`.
    images
        uint8, `(cluster, rank, row, column, channel)`: the representatives of each cluster;
        without images (the data is a table) that column is left out.

    Returns
    -------
    Figure
        From left to right: the images of the representatives, the importance of the layers over
        the epochs, and the final NLL as boxes (quartiles; whiskers are the outermost quantiles).
    """
    count, layers = clusters.sizes["cluster"], clusters.sizes["layer"]
    # Axes are placed in inches, not by constrained layout: rows align and pixels stay square.
    row, left, gap, right, top, bottom = 0.5, 1.15, 0.22, 0.2, 0.5, 1.1
    pictures = 0.0
    if images is not None:
        aspect = images.sizes["column"] / images.sizes["row"]
        pictures = min(row * aspect * images.sizes["rank"], 4.3)
        row = pictures / aspect / images.sizes["rank"]
    boxes = 1.95
    strips = WIDTH - left - right - pictures - (gap if pictures else 0) - gap - boxes
    if images is None:
        strips, boxes = strips * 0.8, boxes + strips * 0.2
    rows = max(row, 0.3) * count
    height = rows + top + bottom
    figure = Figure(figsize=(WIDTH, height))

    def place(x: float, width: float) -> Axes:
        ax = figure.add_axes((x / WIDTH, bottom / height, width / WIDTH, rows / height))
        ax.set_ylim(count - 0.5, -0.5)
        ax.set_yticks([])
        ax.grid(visible=False)
        return ax

    x = left
    first = None
    if images is not None:
        first = ax = place(x, pictures)
        _draw_mosaic(ax, images)
        ax.set_title("samples nearest the centre", fontsize=9)
        x += pictures + gap
    ax = place(x, strips)
    first = first or ax
    mesh = _draw_strips(ax, clusters["profile"].transpose("cluster", "layer", "epoch"))
    names = [str(name) for name in clusters["layer"].values]
    listed = ", ".join(names)
    listed = listed if len(listed) <= 24 else f"{layers} layers, the first above"
    ax.set_title(f"importance by epoch\n({listed})", fontsize=9)
    bar = figure.add_axes((x / WIDTH, 0.57 / height, strips / WIDTH, 0.1 / height))
    unit = clusters["profile"].attrs.get("units", "parameter^2").replace("^2", "²")
    name = clusters["profile"].attrs.get("long_name", "mean importance of a sample")
    figure.colorbar(mesh, cax=bar, orientation="horizontal")
    bar.set_xlabel(textwrap.fill(f"{name} ({unit})", 34), fontsize=8.5)
    bar.tick_params(labelsize=8)
    x += strips + gap
    ax = place(x, boxes)
    _draw_boxes(ax, clusters["nll_quantile"])
    ax.set_title("NLL after\nthe last epoch", fontsize=9)
    ax.grid(axis="x", visible=True)
    sizes = clusters["size"].values
    first.set_yticks(range(count))
    labels = [
        f"{name}  (n = {int(size):,})"
        for name, size in zip(clusters["cluster"].values, sizes, strict=True)
    ]
    first.set_yticklabels(labels, fontsize=8)
    first.tick_params(axis="y", length=0)
    first.set_ylabel("cluster (number of samples)" if count > 5 else "cluster")
    return figure


def _draw_mosaic(ax: Axes, images: xr.DataArray) -> None:
    """Draw the images of all clusters as one picture whose rows are the clusters."""
    values = images.transpose("cluster", "rank", "row", "column", "channel").values
    clusters, ranks, height, width, channels = values.shape
    padded = np.pad(
        values, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255
    )  # a white line between neighbours
    tiled = padded.transpose(0, 2, 1, 3, 4).reshape(
        clusters * (height + 2), ranks * (width + 2), channels
    )
    picture = tiled[..., 0] if channels == 1 else tiled[..., :3]
    ax.imshow(
        picture,
        cmap="gray",
        vmin=0,
        vmax=255,
        extent=(-0.5, ranks - 0.5, clusters - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_xticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _draw_strips(ax: Axes, profile: xr.DataArray) -> QuadMesh:
    """Draw each cluster's layers over the epochs as a strip of colours, on one scale."""
    norm = color_norm(profile.values)
    epochs = cell_edges(profile["epoch"].values.astype(float))
    mesh = None
    for index, strip in enumerate(profile.values):
        rows = index + np.linspace(-0.44, 0.44, strip.shape[0] + 1)
        mesh = ax.pcolormesh(epochs, rows, strip, norm=norm, cmap="viridis", rasterized=True)
    assert mesh is not None
    format_epoch_axis(ax, profile["epoch"].values, most=4)
    return mesh


def _draw_boxes(ax: Axes, quantiles: xr.DataArray) -> None:
    """Draw boxes whose quartiles and ends are the stored quantiles."""
    levels = quantiles["quantile"].values.astype(float)
    values = quantiles.transpose("cluster", "quantile").values
    quarter, half, three = (int(np.abs(levels - level).argmin()) for level in (0.25, 0.5, 0.75))
    low, high = int(levels.argmin()), int(levels.argmax())
    floor = scale_by_decades(ax.xaxis, values)
    filled = np.where(values > floor, values, floor) if floor is not None else values
    stats = [
        {
            "q1": row[quarter],
            "med": row[half],
            "q3": row[three],
            "whislo": row[low],
            "whishi": row[high],
        }
        for row in filled
    ]
    ax.bxp(
        stats,
        positions=np.arange(len(stats)),
        widths=0.55,
        orientation="horizontal",
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": "#cfe3f1", "edgecolor": BLUE, "linewidth": 0.9},
        medianprops={"color": VERMILLION, "linewidth": 1.8},
        whiskerprops={"color": BLUE, "linewidth": 0.9},
        capprops={"color": BLUE, "linewidth": 0.9},
    )
    ax.set_xlabel(
        f"negative log-likelihood (nat)\nbox: quartiles;\n"
        f"ends: {levels[low] * 100:g} and {levels[high] * 100:g} %",
        fontsize=8.5,
    )
    ax.tick_params(axis="x", labelsize=8)
