"""One number of each sample: the columns of a run, and those over several runs.

Sums over epochs and layers are in float64, and stored as float32. Of a run that diverged, the
epochs before the divergence count.

Map: `Column`; `trained_columns` (importance and NLL), `derived_columns` (influence and subsets) and
`count_derived` (how many); `seed_spread` (over the seeds of a strategy).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sampimp.analysis.explorer.epoch_blocks import read_block, read_epochs
from sampimp.analysis.explorer.explored_study import ExploredNode, ExploredRun
from sampimp.analysis.explorer.thinning import MOST_TARGETS
from sampimp.analysis.kernels import rank
from sampimp.schema import ALL_SAMPLES


class Column(NamedTuple):
    """What a column is, as the page needs it."""

    name: str
    label: str
    unit: str
    group: str
    scale: str = "linear"


Columns = dict[Column, np.ndarray]


def trained_columns(
    node: ExploredNode, run: ExploredRun, step: int, *, by_layer: bool, damage: list[str]
) -> Columns:
    """Return what a run's importance and NLL say of each sample.

    Parameters
    ----------
    node, run
        The run.
    step
        Every how many samples one is shown.
    by_layer
        Whether the layers have columns of their own.
    damage
        Gets a line for each chunk that cannot be read; its values are NaN.

    Returns
    -------
    dict of Column to array [N] of float32
    """
    cube = node.cube
    epochs = run.epochs(cube.sizes["epoch"])
    samples = -(-cube.sizes["sample"] // step)
    sums = np.full((cube.sizes["layer"], samples), 0.0 if epochs else np.nan)
    weighted = np.zeros(samples)
    array = run.of(cube["importance"]).data
    for epoch, values in read_epochs(array, epochs, f"importance of {run.name}", damage):
        beta = values[:, ::step].astype(np.float64)
        sums += beta
        weighted += epoch * beta.sum(axis=0)
    tau = sums.sum(axis=0)
    unit = str(cube["importance"].attrs.get("units", ""))
    words = "" if run.diverged_epoch is None else f", epochs before {run.diverged_epoch}"
    columns = {
        Column("importance", f"importance, all layers{words}", unit, "importance", "log"): tau,
        Column("mean_epoch", "mean epoch of the importance", "epoch", "importance"): _ratio(
            weighted, tau
        ),
    }
    if by_layer:
        for layer, values in zip(map(str, cube["layer"].values), sums, strict=True):
            name = Column(f"importance:{layer}", f"importance, {layer}", unit, "layers", "log")
            columns[name] = values
            share = Column(f"share:{layer}", f"share of {layer} in the importance", "1", "layers")
            columns[share] = _ratio(values, tau)
    columns |= _difficulty(node, run, step, epochs, damage)
    return {column: values.astype(np.float32) for column, values in columns.items()}


def _difficulty(
    node: ExploredNode, run: ExploredRun, step: int, epochs: range, damage: list[str]
) -> Columns:
    """Return the last NLL, and mean and standard deviation over epochs of p = exp(-NLL)."""
    samples = -(-node.cube.sizes["sample"] // step)
    last = np.full(samples, np.nan)
    total, squares = np.zeros(samples), np.zeros(samples)
    array = run.of(node.cube["nll"]).data
    for epoch, values in read_epochs(array, epochs, f"nll of {run.name}", damage):
        last = values[::step].astype(np.float64)
        probability = np.exp(-last)
        # Welford's update: the difference of two sums would lose the digits of a small variance.
        distance = probability - total
        total = total + distance / epoch
        squares += distance * (probability - total)
    count = len(epochs)
    unit = str(node.cube["nll"].attrs.get("units", ""))
    return {
        Column("nll", "NLL, last epoch", unit, "difficulty", "log"): last,
        Column("confidence", "mean probability of the class", "1", "difficulty"): (
            total if count else last
        ),
        Column("variability", "standard deviation of that probability", "1", "difficulty"): (
            np.sqrt(squares / count) if count else last
        ),
    }


def _ratio(values: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return a share of the importance: NaN where there is none."""
    return np.divide(values, total, out=np.full_like(total, np.nan), where=total > 0)


_Reader = Callable[[list[str]], np.ndarray]


def derived_columns(node: ExploredNode, run: ExploredRun, step: int, damage: list[str]) -> Columns:
    """Return what influence and subsets of a run say of each sample; parameters as above."""
    columns = {}
    for column, read in _derived(node, run):
        values = read(damage)[::step].astype(np.float32)
        if not np.isnan(values).all():
            columns[column] = values
    return columns


def count_derived(node: ExploredNode, run: ExploredRun) -> int:
    """Return how many columns `derived_columns` has, without reading them."""
    return sum(1 for _ in _derived(node, run))


def targets_of_run(node: ExploredNode, run: ExploredRun) -> list[int]:
    """Return the positions of the targets whose influence a run has."""
    if not run.influence or "influence_total" not in node.cube:
        return []
    measured = run.of(node.cube["adjoint_norm"]).notnull().any("epoch")
    return [int(place) for place in np.flatnonzero(measured.values)]


def _derived(node: ExploredNode, run: ExploredRun) -> Iterator[tuple[Column, _Reader]]:
    """Yield each column, and the function that reads it."""
    cube = node.cube
    for place in targets_of_run(node, run)[:MOST_TARGETS]:
        target = str(cube["target"].values[place])
        column = Column(
            f"influence:{target}",
            f"influence on {target}",
            str(cube["target_units"].values[place]),
            "influence",
        )
        array = run.of(cube["influence_total"]).isel(target=place).data
        yield column, partial(read_block, array, f"influence of {run.name} on {target}")
    if run.derived and "final_importance_total" in cube:
        unit = str(cube["final_importance_total"].attrs.get("units", ""))
        column = Column(
            "final_importance", "importance in the final parameters", unit, "influence", "log"
        )
        array = run.of(cube["final_importance_total"]).data
        yield column, partial(read_block, array, f"final importance of {run.name}")
    if run.derived and "selected" in cube:
        yield from _subset_columns(node, run)


def _subset_columns(node: ExploredNode, run: ExploredRun) -> Iterator[tuple[Column, _Reader]]:
    variants = run.of(node.cube["subset_variant"]).transpose("rule", "size", "budget").values
    selected = run.of(node.cube["selected"]).transpose(
        "rule", "size", "budget", "training_seed", "sample"
    )
    for i, rule in enumerate(map(str, node.cube["rule"].values)):
        for j, size in enumerate(map(float, node.cube["size"].values)):
            if rule == ALL_SAMPLES or not (variants[i, j] != "").any():
                continue
            column = Column(
                f"subset:{rule}@{size:g}", f"selected by {rule}, {100 * size:g} %", "1", "subsets"
            )
            words = f"subsets of {run.name} by {rule}, {100 * size:g} %"
            yield column, partial(_read_share, selected[i, j].data, words)


def _read_share(array: Any, words: str, damage: list[str]) -> np.ndarray:
    """Return the share of the trainings that selected each sample; the array has them first."""
    masks = read_block(array, words, damage).reshape(-1, array.shape[-1])
    trained = np.nan_to_num(masks, nan=1.0).any(axis=1)  # every training selects some samples
    return masks[trained].mean(axis=0, dtype=np.float64)


def seed_spread(strategy: str, importance: Sequence[np.ndarray]) -> Columns:
    """Return how much the rank of each sample's importance differs between seeds.

    Parameters
    ----------
    strategy
        The strategy.
    importance
        Overall importance [N] in each complete run of the strategy, two or more.

    Returns
    -------
    dict of Column to array [N] of float32
        Standard deviation over seeds (divided by one less than their number) of the percentile
        rank, 0 to 100.

    Examples
    --------
    >>> spread = seed_spread("rand", [np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])])
    >>> [values.astype(int).tolist() for values in spread.values()]
    [[0, 35, 35]]
    """
    ranks = np.stack([rank(values.astype(np.float64)) for values in importance])
    percentiles = 100 * (ranks - 1) / max(1, ranks.shape[-1] - 1)
    column = Column(
        f"seed_spread:{strategy}",
        f"spread of the importance's rank over {len(importance)} seeds of {strategy}",
        "percentile",
        "stability",
    )
    return {column: percentiles.std(axis=0, ddof=1).astype(np.float32)}


def as_json(columns: Mapping[Column, Any]) -> list[dict[str, str]]:
    """Return the descriptions of columns as JSON."""
    return [column._asdict() for column in columns]
