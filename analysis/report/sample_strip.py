"""The most and the least important samples of a run, with class, share and picture.

The samples are ranked by overall importance of the reference run, or of the first complete run if
there is no complete reference run. A sample without a measured importance is in no rank.

Map: `SampleStrip`, `RankedSample`; `rank_samples`, `write_share`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from sampimp.analysis.figures import encode_pictures
from sampimp.analysis.report.sample_images import read_images
from sampimp.analysis.runs import class_name, complete, overall_importance
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY

COUNT = 24
"""Samples at each end of the ranking."""

MOST_VALUES, MOST_LETTERS = 12, 90
"""Values, or letters, of a sample without an image that are shown (arbitrary)."""

ReadRow = Callable[[int], np.ndarray | str]
"""The values, or the text, of the training sample at a position."""


@dataclass(frozen=True, kw_only=True)
class RankedSample:
    """A sample: its position in the training set, class, share of the importance, and values.

    Attributes
    ----------
    share
        Fraction of the overall importance of all samples; NaN if all of it is 0.
    row
        Values or text of a sample without an image; else empty.
    file
        Path of the sample's file in the data set's folder; empty if it is no file.
    """

    position: int
    label: str
    share: float
    row: str = ""
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleStrip:
    """The two ends of the ranking by overall importance.

    Attributes
    ----------
    run
        The run that is ranked, such as "shuffle, seed 1".
    most, least
        The samples at the ends, the extreme first.
    sprite
        PNG with the images of `most` above those of `least`; empty if the samples are no images.
    width, height
        Of one image in pixels, before it is reduced.
    """

    run: str
    most: Sequence[RankedSample]
    least: Sequence[RankedSample]
    sprite: bytes = b""
    width: int = 0
    height: int = 0


def rank_samples(cube: xr.Dataset, read_row: ReadRow | None = None) -> SampleStrip | None:
    """Return the ends of the ranking of the samples; None without a complete run.

    Parameters
    ----------
    cube
        One node of the cube.
    read_row
        Reads a sample that is no image. Default: samples without images have no values.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> strip = rank_samples(example_cube())
    >>> strip.run, len(strip.most), bool(strip.most[0].share > strip.least[0].share)
    ('shuffle, seed 1', 24, True)
    """
    run = _chosen_run(cube)
    if run is None:
        return None
    strategy, seed = run
    importance = cube["importance"].sel(strategy=strategy, seed=seed, drop=True)
    tau = overall_importance(importance).compute().values
    measured = np.flatnonzero(np.isfinite(tau))
    order = measured[np.argsort(-tau[measured], kind="stable")]
    count = min(COUNT, len(order) // 2)
    ends = order[:count], order[::-1][:count]
    total = tau[measured].sum()
    positions = cube["sample"].values if "sample" in cube.coords else np.arange(len(tau))
    images = read_images(cube, xr.DataArray(positions[np.stack(ends)], dims=("end", "rank")))

    def describe(place: int) -> RankedSample:
        position = int(positions[place])
        return RankedSample(
            position=position,
            label=class_name(cube, int(cube["label"].values[place])),
            share=tau[place] / total if total > 0 else np.nan,
            file=str(cube["file"].values[place]) if "file" in cube.coords else "",
            row="" if read_row is None or images is not None else _write_row(read_row(position)),
        )

    most, least = ([describe(place) for place in end] for end in ends)
    return SampleStrip(
        run=f"{strategy.replace('_', ' ')}, seed {seed}",
        most=most,
        least=least,
        sprite=b"" if images is None else encode_pictures(images.values),
        width=0 if images is None else images.sizes["column"],
        height=0 if images is None else images.sizes["row"],
    )


def _chosen_run(cube: xr.Dataset) -> tuple[str, int] | None:
    """Return strategy and seed of the reference run, or else of the first complete run."""
    if "train_nll" not in cube:
        return None
    whole = complete(cube).transpose("strategy", "seed")
    runs = [
        (str(whole["strategy"].values[row]), int(whole["seed"].values[column]))
        for row, column in np.argwhere(whole.values)
    ]
    reference = (REFERENCE_STRATEGY, REFERENCE_SEED)
    return reference if reference in runs else next(iter(runs), None)


def _write_row(values: np.ndarray | str) -> str:
    """Return a sample's first values, or the start of its text."""
    if isinstance(values, str):
        return values if len(values) <= MOST_LETTERS else f"{values[:MOST_LETTERS]}…"
    flat = np.ravel(values)
    words = ", ".join(f"{value:.4g}" for value in flat[:MOST_VALUES])
    return words + (" …" if flat.size > MOST_VALUES else "")


def write_share(share: float) -> str:
    """Return a share in per cent with at most two digits; a dash if there is none.

    Examples
    --------
    >>> [write_share(value) for value in (0.0131, 4.2e-4, 3.1e-11, 0.0, float("nan"))]
    ['1.3', '0.042', '3e-9', '0', '—']
    >>> write_share(0.32), write_share(0.0096)
    ('32', '0.96')
    """
    if not np.isfinite(share):
        return "—"
    per_cent = 100 * share
    if per_cent == 0:
        return "0"
    if per_cent >= 0.001:
        return f"{per_cent:#.2g}".rstrip(".") if per_cent < 99.5 else "100"
    mantissa, _, power = f"{per_cent:.0e}".partition("e")
    return f"{mantissa}e{int(power)}"
