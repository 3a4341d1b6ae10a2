"""Figure 17: the most helpful and the most harmful training images, by target.

Map: `draw_influential_samples`.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sampimp.analysis.figures.axes import draw_message, names_of_labels
from sampimp.analysis.figures.style import BLUE, RC_PARAMS, VERMILLION, WIDTH

MOST_CLASSES_SHOWN, MOST_SAMPLES_SHOWN = 10, 6
"""Targets that are drawn at most (arbitrary); the result has all."""


@matplotlib.rc_context(RC_PARAMS)
def draw_influential_samples(
    result: xr.Dataset,
    images: xr.DataArray | None = None,
    names: Mapping[str, str] | None = None,
    class_names: Sequence[str] = (),
    target_images: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Draw Fig. 17: the training images with the lowest and the highest influence.

    Parameters
    ----------
    result
        `value(target, end, rank)` and `training_label(target, end, rank)`: the result
        `influential_samples`.
    images
        uint8, `(target, end, rank, row, column, channel)`: the samples of `position`. Without
        images (the data is a table) a message is drawn.
    names
        How targets are written; by default by their own names.
    target_images
        uint8, (row, column, channel): of targets that are single test samples, their image.
    class_names
        Names of the labels 0, 1, 2 ...; without them the labels are shown.

    Returns
    -------
    Figure
        One row per target, with its own image, if it has one: left, helpful samples; right, harmful
        ones; below each image its class, and its influence over the largest of the row, in per
        cent.
    """
    if images is None:
        return draw_message("The samples are no images; their positions are in the stored result.")
    chosen = shown_targets([str(name) for name in result["target"].values])
    ranks = result.sizes["rank"]
    left, right, top, bottom, gap, middle = 1.25, 0.1, 0.45, 0.05, 0.24, 0.35
    has_targets = bool(target_images)
    left += 0.55 if has_targets else 0.0
    width = (WIDTH - left - right - middle) / (2 * ranks)
    height = width * images.sizes["row"] / images.sizes["column"]
    total = top + bottom + len(chosen) * (height + gap)
    figure = Figure(figsize=(WIDTH, total))
    for row, target in enumerate(chosen):
        here = result.sel(target=target)
        values = here["value"].transpose("end", "rank").values
        labels = [
            names_of_labels(row_labels, class_names)
            for row_labels in here["training_label"].transpose("end", "rank").values
        ]
        largest = np.nanmax(np.abs(values), initial=0)
        place = list(result["target"].values).index(target)
        pictures = images.isel(target=place).transpose("end", "rank", "row", "column", "channel")
        y = total - top - (row + 1) * (height + gap) + gap
        if target_images and target in target_images:
            shown = (left - width - 0.12) / WIDTH, y / total
            frame = figure.add_axes((*shown, 0.9 * width / WIDTH, 0.9 * height / total))
            _draw_image(frame, target_images[target], "black")
        figure.text(
            (left - 0.12 - (width + 0.08 if has_targets else 0)) / WIDTH,
            (y + height / 2) / total,
            (names or {}).get(target, target),
            ha="right",
            va="center",
            fontsize=9,
        )
        for end, color in enumerate((BLUE, VERMILLION)):
            for rank in range(ranks):
                if np.isnan(values[end, rank]):
                    continue
                x = left + end * (middle + ranks * width) + rank * width
                box = (x / WIDTH, y / total, 0.9 * width / WIDTH, 0.9 * height / total)
                ax = figure.add_axes(box)
                _draw_image(ax, pictures.values[end, rank], color)
                words = f"{labels[end][rank]}: {100 * abs(values[end, rank]) / largest:.0f} %"
                ax.set_xlabel(words, fontsize=7.5, labelpad=1.5)
    for end, words in enumerate(("most helpful: influence < 0", "most harmful: influence > 0")):
        figure.text(
            (left + end * (middle + ranks * width)) / WIDTH,
            (total - 0.25) / total,
            words,
            fontsize=10.5,
            fontweight="bold",
            color=(BLUE, VERMILLION)[end],
        )
    return figure


def _draw_image(ax: Axes, picture: np.ndarray, color: str) -> None:
    """Draw a picture (row, column, channel) in a coloured frame."""
    ax.imshow(
        picture[..., 0] if picture.shape[-1] == 1 else picture[..., :3],
        cmap="gray",
        vmin=0,
        vmax=255,
        aspect="auto",
        interpolation="nearest",
    )
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=color, linewidth=1.6)


def shown_targets(targets: list[str]) -> list[str]:
    """Return the targets that are drawn: at most ten classes and six test samples.

    Examples
    --------
    >>> len(shown_targets([f"class:{i}" for i in range(20)] + ["sample:1"]))
    11
    """
    classes = [name for name in targets if name.startswith("class:")]
    samples = [name for name in targets if not name.startswith("class:")]
    return classes[:MOST_CLASSES_SHOWN] + samples[:MOST_SAMPLES_SHOWN]
