"""The ten figures of the paper, drawn from result datasets: they draw and compute nothing.

Each function takes what the function of the same subject in `analysis` returned and gives back a
`matplotlib.figure.Figure`; no global state (`pyplot`) is touched. Any number of layers, classes,
epochs, strategies and seeds can be drawn: up to `MOST_LINES` layers (or `MOST_CLASSES` classes)
are lines, more are a heat map. A strategy has one colour, line style and marker in every figure
(`strategy_style`), so that none needs colour to be told apart. Importance spans decades and is in
parameter²; axes turn logarithmic where their values span more than one decade.

Figures 1 to 4 and 10 describe the reference runs, 5 and 6 the clusters of one class, 7 to 9 the
strategies (Gao & Jojic, "Sample Importance in Training Deep Neural Networks", 2017).

Map: `draw_stability` (Fig. 1), `draw_decomposition` (2), `draw_groups` (3),
`draw_importance_against_nll` (4), `draw_clusters` (5 and 6), `draw_curves` (7), `draw_paths` (8),
`draw_class_nll` (9), `draw_histogram` (10); `encode` gives the bytes of a PNG or a PDF.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

__all__ = [
    "draw_class_nll",
    "draw_clusters",
    "draw_curves",
    "draw_decomposition",
    "draw_groups",
    "draw_histogram",
    "draw_importance_against_nll",
    "draw_paths",
    "draw_stability",
    "encode",
    "strategy_name",
    "strategy_style",
]

MOST_LINES = 8
"""More layers than this become a heat map: a ninth colour can no longer be told from the rest."""

MOST_CLASSES = 10
"""More classes than this become a heat map (colour and line style carry ten)."""

MOST_POINTS = 5_000
"""A scatter of more samples than this is drawn as the density of hexagonal bins."""

WIDTH = 10.0
"""Width of every figure in inches: at 1,000 CSS pixels a 10-point font reads as 14 pixels."""

IMPORTANCE = "parameter²"

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "pdf.fonttype": 42,  # letters stay letters in the PDF
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


class Style(NamedTuple):
    """How one line looks: three ways to tell it apart."""

    color: str
    linestyle: Any
    marker: str


# Okabe & Ito's palette, without its yellow (too light on white), with a grey and a wine (P. Tol).
_BLACK, _GREY, _BLUE, _SKY = "#000000", "#808080", "#0072B2", "#56B4E9"
_GREEN, _ORANGE, _VERMILLION, _PURPLE, _WINE = "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#882255"
_DASHED, _DOTDASH = (0, (5, 2)), (0, (6, 2, 1, 2))

# What sorts by NLL is blue to green, by overall importance red to orange; low first is solid,
# reversed is dashed, spread over the batches ("mixed") is dash-dotted.
_STRATEGIES = {
    "shuffle": Style(_BLACK, "-", "o"),
    "shuffle_by_seed": Style(_GREY, _DASHED, "s"),
    "rand": Style(_PURPLE, "-", "D"),
    "nlo": Style(_BLUE, "-", "^"),
    "rnlo": Style(_SKY, _DASHED, "v"),
    "nlm": Style(_GREEN, _DOTDASH, ">"),
    "sio": Style(_VERMILLION, "-", "P"),
    "rsio": Style(_ORANGE, _DASHED, "X"),
    "sim": Style(_WINE, _DOTDASH, "<"),
}
_CATEGORIES = tuple(
    Style(color, linestyle, marker)
    for color, linestyle, marker in zip(
        (_BLACK, _VERMILLION, _BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _WINE, _GREY, _BLUE),
        ("-", "-", "-", "-", "-", _DASHED, _DASHED, _DASHED, _DASHED, _DOTDASH),
        "os^DvP<X>p",
        strict=True,
    )
)


def strategy_style(name: str) -> Style:
    """Return the one style of a strategy in all figures; a name of one's own gets a fixed one.

    Examples
    --------
    >>> strategy_style("nlo")
    Style(color='#0072B2', linestyle='-', marker='^')
    >>> strategy_style("mine") == strategy_style("mine")
    True
    """
    return _STRATEGIES.get(name) or _CATEGORIES[sum(name.encode()) % len(_CATEGORIES)]


def strategy_name(name: str) -> str:
    """Return a strategy's name as the paper writes it.

    Examples
    --------
    >>> [strategy_name(name) for name in ("rand", "rnlo", "shuffle_by_seed")]
    ['Rand', 'RNLO', 'shuffle by seed']
    """
    if name == "rand":
        return "Rand"
    if name in _STRATEGIES and not name.startswith("shuffle"):
        return name.upper()
    return name.replace("_", " ")


def encode(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """Return a figure as the bytes of a file.

    Parameters
    ----------
    figure
        Any of this module's.
    kind
        `png`, `pdf` or what else matplotlib can write.
    dpi
        Dots per inch of what is raster; 150 gives 1,500 pixels of width.

    Examples
    --------
    >>> encode(Figure())[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    # No date in a PDF: the same results give the same bytes.
    metadata = {"CreationDate": None} if kind == "pdf" else None
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


@matplotlib.rc_context(STYLE)
def draw_stability(stability: xr.Dataset) -> Figure:
    """Draw Fig. 1: how alike two initialisations rank the samples, by epoch.

    Parameters
    ----------
    stability
        `rank_correlation(reference, epoch, pair)`, its `rank_correlation_interval` (with `bound`)
        and `layer_rank_correlation(reference, epoch, layer, pair)`; of
        `sampimp.analysis.stability`.

    Returns
    -------
    Figure
        A column for each reference that was run; above, model importance with its interval, one
        line a pair of seeds; below, the layers.
    """
    shown = [
        reference
        for reference in stability["reference"].values
        if _any_finite(stability["rank_correlation"].sel(reference=reference))
    ]
    if not shown:
        return _message("No two reference runs of the same kind have been recorded yet.")
    layered = "layer_rank_correlation" in stability
    figure = Figure(figsize=(WIDTH, 6.6 if layered else 3.6), layout="constrained")
    axes = figure.subplots(1 + layered, len(shown), squeeze=False, sharey="row")
    pairs = [str(pair) for pair in stability["pair"].values]
    for column, reference in enumerate(shown):
        here = stability.sel(reference=reference)
        ax = axes[0, column]
        ax.set_title(_reference_title(str(reference)))
        for index, pair in enumerate(pairs):
            style = _CATEGORIES[index % len(_CATEGORIES)]
            curve = here["rank_correlation"].isel(pair=index)
            if not _any_finite(curve):
                continue
            _line(ax, curve["epoch"].values, curve.values, style, pair)
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
            _epoch_axis(ax, here["epoch"].values)
    axes[0, 0].set_ylabel("Spearman correlation of\nmodel importance (-1 to 1)")
    if len(pairs) <= len(_CATEGORIES):
        _legend_beside(axes[0, -1], "pair of seeds\n(shaded: 95 %)")
    if layered and mesh is not None:
        figure.colorbar(mesh, ax=list(axes[1]), label="Spearman correlation (-1 to 1)")
        axes[1, 0].set_ylabel("layer")
    elif layered:
        axes[1, 0].set_ylabel("Spearman correlation of\na layer's importance (-1 to 1)")
        _legend_beside(axes[1, -1], "layer (one line\na pair of seeds)")
    return figure


def _draw_layer_stability(ax: Axes, correlation: xr.DataArray) -> QuadMesh | None:
    """Draw the layers of one reference: every pair a line, or the first pair as a heat map."""
    if correlation.sizes["layer"] > MOST_LINES:
        first = correlation.isel(pair=0)
        ax.set_title(f"each layer, seeds {first['pair'].item()}")
        # One scale for both references: below 0 nothing is alike.
        return _layer_mesh(ax, first.transpose("layer", "epoch"), Normalize(0, 1))
    for style, (name, layer) in zip(
        _ordered_styles(correlation.sizes["layer"]), _layers(correlation), strict=True
    ):
        for index in range(layer.sizes["pair"]):
            values = layer.isel(pair=index).values
            _line(ax, layer["epoch"].values, values, style, name if index == 0 else None)
    return None


@matplotlib.rc_context(STYLE)
def draw_decomposition(decomposition: xr.Dataset, class_names: Sequence[str] = ()) -> Figure:
    """Draw Fig. 2: the importance of all samples by epoch, layer and class.

    Parameters
    ----------
    decomposition
        `importance_by_layer(epoch, layer)`, `importance_by_class(epoch, layer, label)` and
        `class_size(label)`, in parameter²; of `sampimp.analysis.decomposition`.
    class_names
        Names of the labels 0, 1, 2 ...; without them the labels are shown.

    Returns
    -------
    Figure
        Above, the layers; below, one panel a layer with a line a class (at most four layers are
        shown by class: the first, the last and two between).
    """
    by_layer, by_class = decomposition["importance_by_layer"], decomposition["importance_by_class"]
    layers = by_layer.sizes["layer"]
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, 4)).round().astype(int))
    many = by_class.sizes["label"] > MOST_CLASSES
    figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
    upper, lower = _halves(figure, (1, 1.15))
    ax = upper.subplots()
    ax.set_title("all samples, by layer")
    _draw_layers(upper, ax, by_layer, f"importance of all samples\n({IMPORTANCE})")
    axes = lower.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    names = _class_names(decomposition["label"].values, class_names)
    values = by_class.isel(layer=chosen).values
    norm = _color_norm(values)
    for ax, index in zip(axes, chosen, strict=True):
        panel = by_class.isel(layer=index).transpose("label", "epoch")
        ax.set_title(f"{_shorten(str(panel['layer'].item()))}, by class")
        if many:
            mesh = _mesh(ax, panel["epoch"].values, names, panel.values, norm)
        else:
            _draw_classes(ax, panel, names)
            _decades(ax.yaxis, values)
        _epoch_axis(ax, panel["epoch"].values)
    if many:
        lower.colorbar(mesh, ax=list(axes), label=f"importance of a class ({IMPORTANCE})")
        axes[0].set_ylabel("class")
    else:
        axes[0].set_ylabel(f"importance of a class\n({IMPORTANCE})")
        _legend_below(lower, axes[0], "class")
    return figure


@matplotlib.rc_context(STYLE)
def draw_groups(groups: xr.Dataset) -> Figure:
    """Draw Fig. 3: who holds the importance: the top 10 %, the next 10 %, the other 80 %.

    Parameters
    ----------
    groups
        `importance_by_group(group, epoch, layer)` in parameter², `share(group)` and
        `share_by_layer(group, layer)`; of `analysis.importance_groups`.

    Returns
    -------
    Figure
        Above, one panel a group with its layers; below, the groups' shares, of each layer and of
        the whole.
    """
    importance = groups["importance_by_group"]
    names = [str(name) for name in groups["group"].values]
    figure = Figure(figsize=(WIDTH, 7.0), layout="constrained")
    upper, lower = _halves(figure, (1.2, 1))
    axes = upper.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for index, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.set_title(f"{name} of the samples")
        _draw_panel(ax, importance.isel(group=index), importance.values)
    _finish_panels(upper, axes, importance, f"importance of the group\n({IMPORTANCE})")
    _draw_shares(lower.subplots(), groups, names)
    return figure


def _draw_shares(ax: Axes, groups: xr.Dataset, names: Sequence[str]) -> None:
    """Draw the groups' shares as bars: of the whole, then of each layer."""
    by_layer = groups["share_by_layer"].transpose("group", "layer")
    where = ["all layers", *(str(layer) for layer in by_layer["layer"].values)]
    shares = np.concatenate([groups["share"].values[:, None], by_layer.values], axis=1) * 100
    styles = _ordered_styles(len(names), light=True)
    places = np.arange(len(where))
    hatches = ("", "//", "..", "xx", "--", "++")
    width = 0.8 / max(1, len(names))
    for index, (name, style) in enumerate(zip(names, styles, strict=True)):
        if len(where) > MOST_LINES + 1:  # bars would be hairs
            _line(ax, places, shares[index], style, name)
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
    _name_ticks(ax.xaxis, where, most=8)
    ax.axvline(0.5, color="#999999", linewidth=0.8)
    ax.grid(axis="x", visible=False)
    ax.set_title("share of the importance held by each group")
    ax.set_ylabel("share of the importance (%)")
    ax.set_ylim(0, max(100, np.nanmax(shares, initial=0) * 1.05))
    _legend_beside(ax, "group of samples")


@matplotlib.rc_context(STYLE)
def draw_importance_against_nll(against: xr.Dataset) -> Figure:
    """Draw Fig. 4: sample importance against negative log-likelihood.

    Parameters
    ----------
    against
        `rank_correlation(epoch, layer)`, `model_rank_correlation(epoch)`,
        `overall_importance(sample)` in parameter², `final_nll(sample)` in nats,
        `overall_rank_correlation`, and where there is one
        `importance_by_difficulty(difficulty, epoch, layer)`; of `analysis.importance_against_nll`.

    Returns
    -------
    Figure
        Left, the rank correlation of an epoch's importance with its NLL; right, the samples, as
        points or (more than `MOST_POINTS`) as a density; below, the layers at which easy and hard
        samples act.
    """
    grouped = "importance_by_difficulty" in against
    figure = Figure(figsize=(WIDTH, 7.8 if grouped else 4.6), layout="constrained")
    upper: Any = figure
    if grouped:
        upper, lower = _halves(figure, (4.4, 3.4))
        _draw_difficulty(lower, against["importance_by_difficulty"])
    left, right = upper.subplots(1, 2, width_ratios=(1.15, 1))
    correlation, model = against["rank_correlation"], against["model_rank_correlation"]
    left.set_title("rank correlation with NLL, by epoch")
    if correlation.sizes["layer"] > MOST_LINES:
        mesh = _layer_mesh(left, correlation.transpose("layer", "epoch"), None)
        left.set_ylabel("layer")
        upper.colorbar(mesh, ax=left, label="Spearman correlation (-1 to 1)")
    else:
        _draw_layer_lines(left, correlation)
        style = Style(_VERMILLION, "-", "")
        _line(left, model["epoch"].values, model.values, style, "all layers", linewidth=2.6)
        left.set_ylabel("Spearman correlation (-1 to 1)")
        left.legend(loc="best", ncols=2)
    _epoch_axis(left, correlation["epoch"].values)
    _draw_scatter(upper, right, against)
    return figure


def _draw_difficulty(figure: Any, importance: xr.DataArray) -> None:
    """Draw one panel a group of samples of like difficulty, with its layers."""
    names = [str(name) for name in importance["difficulty"].values]
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for index, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.set_title(f"{_shorten(name, 20)} samples (by NLL)")
        _draw_panel(ax, importance.isel(difficulty=index), importance.values)
    _finish_panels(figure, axes, importance, f"mean importance of a sample\n({IMPORTANCE})")


def _draw_panel(ax: Axes, panel: xr.DataArray, every: np.ndarray) -> None:
    """Draw `(epoch, layer)` on the scale that it shares with its neighbours."""
    if panel.sizes["layer"] > MOST_LINES:
        _layer_mesh(ax, panel.transpose("layer", "epoch"), _color_norm(every))
    else:
        _draw_layer_lines(ax, panel)
        _decades(ax.yaxis, every)
    _epoch_axis(ax, panel["epoch"].values)


def _finish_panels(figure: Any, axes: np.ndarray, values: xr.DataArray, label: str) -> None:
    """Give panels on one scale their common label, and legend or colour bar."""
    if values.sizes["layer"] > MOST_LINES:
        figure.colorbar(axes[0].collections[0], ax=list(axes), label=label)
        axes[0].set_ylabel("layer")
    else:
        axes[0].set_ylabel(label)
        _legend_below(figure, axes[0], "layer")


def _draw_scatter(figure: Any, ax: Axes, against: xr.Dataset) -> None:
    """Draw final NLL against overall importance, one point a sample or their density."""
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
        ax.scatter(nll[drawn], overall[drawn], s=9, color=_BLUE, alpha=0.35, linewidths=0)
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set_xlabel("negative log-likelihood after the last epoch (nat)")
    ax.set_ylabel(f"overall importance ({IMPORTANCE})")
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


@matplotlib.rc_context(STYLE)
def draw_clusters(clusters: xr.Dataset, images: xr.DataArray | None = None) -> Figure:
    """Draw Figs. 5 and 6: the clusters of one class, a row a cluster.

    Parameters
    ----------
    clusters
        `profile(cluster, epoch, layer)`, `size(cluster)` and `nll_quantile(cluster, quantile)` in
        nats; of `sampimp.analysis.clusters`.
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
    # Placed in inches and not by constrained layout: rows align and pixels stay square.
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
    norm = _color_norm(profile.values)
    epochs = _edges(profile["epoch"].values.astype(float))
    mesh = None
    for index, strip in enumerate(profile.values):
        rows = index + np.linspace(-0.44, 0.44, strip.shape[0] + 1)
        mesh = ax.pcolormesh(epochs, rows, strip, norm=norm, cmap="viridis", rasterized=True)
    assert mesh is not None
    _epoch_axis(ax, profile["epoch"].values, most=4)
    return mesh


def _draw_boxes(ax: Axes, quantiles: xr.DataArray) -> None:
    """Draw boxes whose quartiles and ends are the stored quantiles."""
    levels = quantiles["quantile"].values.astype(float)
    values = quantiles.transpose("cluster", "quantile").values
    quarter, half, three = (int(np.abs(levels - level).argmin()) for level in (0.25, 0.5, 0.75))
    low, high = int(levels.argmin()), int(levels.argmax())
    floor = _decades(ax.xaxis, values)
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
        boxprops={"facecolor": "#cfe3f1", "edgecolor": _BLUE, "linewidth": 0.9},
        medianprops={"color": _VERMILLION, "linewidth": 1.8},
        whiskerprops={"color": _BLUE, "linewidth": 0.9},
        capprops={"color": _BLUE, "linewidth": 0.9},
    )
    ax.set_xlabel(
        f"negative log-likelihood (nat)\nbox: quartiles;\n"
        f"ends: {levels[low] * 100:g} and {levels[high] * 100:g} %",
        fontsize=8.5,
    )
    ax.tick_params(axis="x", labelsize=8)


@matplotlib.rc_context(STYLE)
def draw_curves(curves: xr.Dataset) -> Figure:
    """Draw Fig. 7: train and test error of the strategies, mean and standard error over seeds.

    Parameters
    ----------
    curves
        `train_error` and `test_error(strategy, epoch)` as fractions, `*_se`, `runs` and
        `diverged(strategy)`; of `analysis.strategy_curves`.

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
        _decades(ax.yaxis, curves[name].values * 100)
        ax.set_title(f"{name.replace('_', ' ')} by strategy")
        ax.set_ylabel(f"{name.replace('_', ' ')} (% of samples)")
        _epoch_axis(ax, curves["epoch"].values)
    handles, labels = axes[1].get_legend_handles_labels()
    if "diverged" in curves and (curves["diverged"] > 0).any():
        handles.append(Line2D([], [], color="#cc0000", marker="x", linestyle="", markersize=8))
        labels.append("a run diverged")
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, title="strategy (± standard error)"
    )
    return figure


def _draw_curve(ax: Axes, curve: xr.Dataset, name: str) -> None:
    """Draw one strategy's mean, its standard error and where its runs diverged."""
    strategy = str(curve["strategy"].item())
    values = curve[name].values * 100
    if not np.isfinite(values).any():
        return
    style, epochs = strategy_style(strategy), curve["epoch"].values
    diverged = int(curve["diverged"].item()) if "diverged" in curve else 0
    label = strategy_name(strategy) + (f" ({diverged} diverged)" if diverged else "")
    _line(ax, epochs, values, style, label)
    if f"{name}_se" in curve:
        error = curve[f"{name}_se"].values * 100
        ax.fill_between(
            epochs, values - error, values + error, color=style.color, alpha=0.18, linewidth=0
        )
    if diverged and "runs" in curve:
        runs = curve["runs"].values
        # The last epoch that counts the run; a strategy whose runs all end there ends in a cross.
        last = np.flatnonzero(np.diff(runs, append=runs[-1:]) < 0)
        last = last[np.isfinite(values[last])]
        ax.plot(epochs[last], values[last], "x", color="#cc0000", markersize=9, mew=2, zorder=5)


@matplotlib.rc_context(STYLE)
def draw_paths(paths: xr.Dataset) -> Figure:
    """Draw Fig. 8: the paths of all parameters by strategy, in their principal components.

    Parameters
    ----------
    paths
        `path(strategy, state, component)`, `explained_variance_ratio(component)` and where there
        is one `fitted(strategy)`, false for a diverged run; of `analysis.parameter_paths`.

    Returns
    -------
    Figure
        The second component against the first and, if there is one, the third against the first;
        a ring marks the start and a large marker the end; the picture is cut to the runs that did
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
        seen = []
        for strategy, whole in zip(paths["strategy"].values, fitted, strict=True):
            name = strategy_name(str(strategy)) + ("" if whole else " (diverged)")
            style = strategy_style(str(strategy))
            path = paths["path"].sel(strategy=strategy).transpose("component", "state")
            xy = path.values[[horizontal, vertical]]
            xy = xy[:, np.isfinite(xy).all(axis=0)]
            if not xy.size:
                continue
            _line(ax, xy[0], xy[1], style, name, size=4)
            ax.plot(*xy[:, 0], "o", color="white", mec="#333333", markersize=9, zorder=4)
            end = {"mec": "white"} if whole else {"mew": 2.0}
            ax.plot(
                *xy[:, -1],
                style.marker if whole else "x",
                color=style.color if whole else "#cc0000",
                markersize=10,
                zorder=5,
                **end,
            )
            if whole:
                seen.append(xy)
        if seen and not fitted.all():
            # The last steps of a diverged run can be larger than all else: it leaves the picture.
            low, high = np.hstack(seen).min(axis=1), np.hstack(seen).max(axis=1)
            room = 0.15 * (high - low)
            ax.set_xlim(low[0] - room[0], high[0] + room[0])
            ax.set_ylim(low[1] - room[1], high[1] + room[1])
        for axis, component in ((ax.xaxis, horizontal), (ax.yaxis, vertical)):
            number = names[component] if names[component].isdigit() else str(component + 1)
            axis.set_label_text(
                f"principal component {number} (parameter; {ratios[component]:.1f} % of variance)"
            )
        if not seen or fitted.all():
            ax.margins(0.08)
    handles, labels = _unique(axes[0].get_legend_handles_labels())
    handles.append(Line2D([], [], color="white", mec="#333333", marker="o", linestyle="", ms=9))
    labels.append("start")
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, title="strategy (large: end)"
    )
    return figure


@matplotlib.rc_context(STYLE)
def draw_class_nll(curves: xr.Dataset, class_names: Sequence[str] = ()) -> Figure:
    """Draw Fig. 9: error curves and the NLL of each class, strategy by strategy.

    Parameters
    ----------
    curves
        `train_error` and `test_error(strategy, epoch)` as fractions and
        `class_nll(strategy, epoch, label)` in nats; of `analysis.strategy_curves`.
    class_names
        Names of the labels 0, 1, 2 ...; without them the labels are shown.

    Returns
    -------
    Figure
        A block a strategy, all on the same axes: errors above, classes below.
    """
    strategies = [
        strategy
        for strategy in curves["strategy"].values
        if _any_finite(curves["test_error"].sel(strategy=strategy))
        or _any_finite(curves["class_nll"].sel(strategy=strategy))
    ]
    if not strategies:
        return _message("No run has finished an epoch yet.")
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
    names = _class_names(curves["label"].values, class_names)
    errors = np.stack([curves["train_error"].values, curves["test_error"].values]) * 100
    norm = _color_norm(curves["class_nll"].values)
    for index, strategy in enumerate(strategies):
        here = curves.sel(strategy=strategy)
        upper, lower = (axes[2 * (index // columns) + k, index % columns] for k in (0, 1))
        diverged = int(here["diverged"].item()) if "diverged" in here else 0
        mark = f" ({diverged} diverged)" if diverged else ""
        upper.set_title(strategy_name(str(strategy)) + mark)
        for name, style in (
            ("train_error", Style(_BLUE, _DASHED, "o")),
            ("test_error", Style(_VERMILLION, "-", "s")),
        ):
            label = name.replace("_", " ")
            _line(upper, here["epoch"].values, here[name].values * 100, style, label)
        _decades(upper.yaxis, errors)
        upper.set_ylabel("error (%)")
        panel = here["class_nll"].transpose("label", "epoch")
        if many:
            mesh = _mesh(lower, panel["epoch"].values, names, panel.values, norm)
            lower.set_ylabel("class")
        else:
            _draw_classes(lower, panel, names)
            _decades(lower.yaxis, curves["class_nll"].values)
            lower.set_ylabel("NLL (nat)")
        _epoch_axis(lower, panel["epoch"].values)
        lower.tick_params(labelbottom=True)
        upper.set_xlabel("")
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
        handles, labels = handles + more[0], labels + [_class(name) for name in more[1]]
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


@matplotlib.rc_context(STYLE)
def draw_histogram(histogram: xr.Dataset) -> Figure:
    """Draw Fig. 10: how many samples have how much overall importance.

    Parameters
    ----------
    histogram
        `count(bin)`, `bin_edge(edge)` as log10 of parameter², `quantile(q)` in parameter², `gini`
        and `zeros` (samples in no bin); of `analysis.importance_histogram`.

    Returns
    -------
    Figure
        One panel with the stored quantiles as labelled lines.
    """
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    ax = figure.subplots()
    edges, counts = histogram["bin_edge"].values, histogram["count"].values
    ax.stairs(counts, edges, fill=True, color="#9cc6e0", edgecolor=_BLUE, linewidth=0.8)
    _decades(ax.yaxis, counts)
    ax.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.set_xlabel(
        f"overall importance of a sample, all layers and epochs ({IMPORTANCE}, log scale)"
    )
    ax.set_ylabel("number of samples")
    ax.set_title("distribution of the overall importance", pad=44)
    if "quantile" in histogram:
        quantiles = histogram["quantile"]
        levels = quantiles[quantiles.dims[0]].values.astype(float)
        for index, (level, value) in enumerate(zip(levels, quantiles.values, strict=True)):
            if not np.isfinite(value) or value <= 0 or level in (0.0, 1.0):
                continue
            ax.axvline(np.log10(value), color=_VERMILLION, linestyle=_DASHED, linewidth=1.1)
            ax.annotate(
                f"{level * 100:g} %",
                (np.log10(value), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3 + 11 * (index % 3)),  # neighbours alternate, so as not to overlap
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=_VERMILLION,
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


def _reference_title(reference: str) -> str:
    """Name a reference by what it does with the batches."""
    return {
        "shuffle": "shuffle: one order for all seeds",
        "shuffle_by_seed": "shuffle by seed: an order for each",
    }.get(reference, reference)


def _message(text: str) -> Figure:
    """Return a figure that says why there is nothing to see."""
    figure = Figure(figsize=(WIDTH, 1.2))
    figure.text(0.5, 0.5, text, ha="center", va="center", color="#555555")
    return figure


def _halves(figure: Figure, ratios: tuple[float, float]) -> tuple[Any, Any]:
    """Divide a figure into an upper and a lower part with layouts and legends of their own."""
    parts: Any = figure.subfigures(2, 1, height_ratios=ratios)
    return parts[0], parts[1]


def _any_finite(values: xr.DataArray) -> bool:
    return bool(np.isfinite(values.values).any())


def _line(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    style: Style,
    label: str | None,
    *,
    linewidth: float | None = None,
    every: int | None = None,
    size: float | None = None,
) -> None:
    """Plot one line, with about eight markers along it."""
    ax.plot(
        x,
        y,
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        markevery=every or max(1, len(x) // 8),
        markersize=size,
        linewidth=linewidth,
        label=label,
    )


def _layers(array: xr.DataArray) -> list[tuple[str, xr.DataArray]]:
    return [
        (str(array["layer"].values[index]), array.isel(layer=index))
        for index in range(array.sizes["layer"])
    ]


def _ordered_styles(count: int, *, light: bool = False) -> list[Style]:
    """Return styles for things with an order (layers, groups): dark to light."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0.25 if light else 0.0, 0.82, count))
    linestyles = ("-", _DASHED, _DOTDASH, (0, (1, 1.2)))
    return [
        Style(matplotlib.colors.to_hex(color), linestyles[index % 4], "os^DvP<X"[index % 8])
        for index, color in enumerate(colors)
    ]


def _draw_layer_lines(ax: Axes, values: xr.DataArray) -> None:
    for style, (name, layer) in zip(
        _ordered_styles(values.sizes["layer"]), _layers(values), strict=True
    ):
        _line(ax, layer["epoch"].values, layer.values, style, name)


def _draw_layers(figure: Any, ax: Axes, values: xr.DataArray, label: str) -> None:
    """Draw `(epoch, layer)` as lines with a legend, or as a heat map with its colour bar."""
    if values.sizes["layer"] > MOST_LINES:
        mesh = _layer_mesh(ax, values.transpose("layer", "epoch"), _color_norm(values.values))
        ax.set_ylabel("layer")
        figure.colorbar(mesh, ax=ax, label=label)
    else:
        _draw_layer_lines(ax, values)
        _decades(ax.yaxis, values.values)
        ax.set_ylabel(label)
        _legend_beside(ax, "layer")
    _epoch_axis(ax, values["epoch"].values)


def _draw_classes(ax: Axes, values: xr.DataArray, names: Sequence[str]) -> None:
    """Draw `(label, epoch)` as a line a class."""
    for index, name in enumerate(names):
        _line(ax, values["epoch"].values, values.values[index], _CATEGORIES[index], name)


def _layer_mesh(ax: Axes, values: xr.DataArray, norm: Normalize | None) -> QuadMesh:
    """Draw `(layer, epoch)` as a heat map, the first layer on top."""
    names = [str(name) for name in values["layer"].values]
    return _mesh(ax, values["epoch"].values, names, values.values, norm)


def _mesh(
    ax: Axes, epochs: np.ndarray, names: Sequence[str], values: np.ndarray, norm: Normalize | None
) -> QuadMesh:
    ax.grid(visible=False)
    rows = np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(
        _edges(epochs.astype(float)), rows, values, norm=norm, cmap="viridis", rasterized=True
    )
    ax.set_ylim(len(names) - 0.5, -0.5)
    _name_ticks(ax.yaxis, names)
    return mesh


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders of cells round these centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _name_ticks(axis: Any, names: Sequence[str], most: int = 15) -> None:
    """Label places of an axis by name, evenly if there are too many."""
    step = -(-len(names) // most)
    axis.set_ticks(range(0, len(names), step), [_shorten(name) for name in names[::step]])


def _shorten(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _epoch_axis(ax: Axes, epochs: np.ndarray, most: int = 6) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        ax.set_xlim(epochs[0] - 0.6, epochs[0] + 0.6)


def _decades(axis: Any, values: np.ndarray) -> float | None:
    """Make an axis logarithmic if its values span more than a decade.

    Values of exactly 0 (an error that vanished) have a linear piece below the smallest other one.

    Returns
    -------
    float or None
        The least value that the axis can show, None if it stays linear.
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
    if positive.max() < 300 * least:  # few decades: name the steps between as well
        axis.set_minor_formatter(FuncFormatter(_minor_tick))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if not 1e-3 < least < 1e4:
            axis.set_major_formatter(matplotlib.ticker.LogFormatterSciNotation())
            axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", labelsize=8)
    return least


def _minor_tick(value: float, _: int) -> str:
    """Name 2 and 5 of each decade and leave the others out."""
    return f"{value:g}" if f"{value:e}"[0] in "25" and f"{value:.1e}"[2] == "0" else ""


def _color_norm(values: np.ndarray) -> Normalize | None:
    """Return a logarithmic colour scale if the values span more than a decade."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return None
    least, most = float(positive.min()), float(positive.max())
    if most < 10 * least or (values[np.isfinite(values)] < 0).any():
        return Normalize(float(np.nanmin(values)), most)
    return LogNorm(max(least, most * 1e-12), most)


def _class_names(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return the names of the labels: the data set's, else the labels."""
    if names and np.issubdtype(labels.dtype, np.integer) and labels.max() < len(names):
        return [_shorten(str(names[label])) for label in labels]
    return [_shorten(str(label)) for label in labels]


def _class(name: str) -> str:
    """Return a class's name in a legend that holds other things too: a number alone says little."""
    return f"class {name}" if name.isdigit() else name


def _legend_beside(ax: Axes, title: str) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title=title)


def _legend_below(figure: Any, ax: Axes, title: str) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, title=title)


def _unique(legend: tuple[list[Any], list[str]]) -> tuple[list[Any], list[str]]:
    """Keep the first of each label."""
    kept: dict[str, Line2D | Patch] = {}
    for handle, label in zip(*legend, strict=True):
        kept.setdefault(label, handle)
    return list(kept.values()), list(kept)
