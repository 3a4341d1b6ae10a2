"""Which runs of a cube have influence on the final model, and which removals have their truth.

Influence, probes and retrainings exist for the runs for which they were asked; the results of
section 4 are of one run, the reference run if it has what they need. Removals are of kinds, by
their names (`random:3`, `top:0`, `subset-0.95:17`), and each kind is judged by itself.

Map: `has_influence`, `influence_run`; `split_smoothing`, `targets_of`, `single_test_samples`
(targets); `influence_of` (the numbers of a run, in the convention of its effects); `RemovalKind`
and `removal_kinds` (the truth); `natural_damping`; `conventions` (attributes of the results),
`RETRAIN` and `INFLUENCE` (the commands).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from sampimp.analysis.removal_prediction import summed_influence
from sampimp.analysis.runs import place_of, require
from sampimp.errors import MissingDataError
from sampimp.schema import INFLUENCE_VARIABLES, REFERENCE_SEED, REFERENCE_STRATEGY

INFLUENCE, RETRAIN = "sampimp influence OUT", "sampimp retrain OUT"
"""The commands that compute influence, and the truth about removals."""

DENOMINATORS = {
    False: "that of a batch's mean loss stays when a sample is removed",
    True: "the mean of a batch's loss is one over the samples that remain",
}
"""In words, by whether effects are renormalised."""

SINGLES = "sample:0..11"
"""The fewest single test samples over which a score is averaged."""


def has_influence(cube: xr.Dataset) -> bool:
    """Return whether influence, probes or retrainings were computed for any run.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> has_influence(example_cube())
    False
    """
    return any(name in cube for name in INFLUENCE_VARIABLES if name not in _OF_SUBSETS)


_OF_SUBSETS = ("subset_error", "subset_nll", "selected")
"""Variables of section 5, which exist without influence."""


def influence_run(
    cube: xr.Dataset, *names: str, command: str = f"{INFLUENCE} and {RETRAIN}"
) -> xr.Dataset:
    """Return a run for which all of some variables were computed; the reference run first.

    Parameters
    ----------
    cube
        One node of the cube.
    names
        Variables of `sampimp.schema.INFLUENCE_VARIABLES`.
    command
        What computes them, for the error.

    Returns
    -------
    Dataset
        All variables of the run; the attribute `run` names it.

    Raises
    ------
    MissingDataError
        No run has them.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_influence
    >>> influence_run(with_influence(example_cube()), "effect").attrs["run"]
    'shuffle, seed 1'
    """
    require(cube, *names)
    found = np.all([_measured(cube, name) for name in names], axis=0)
    runs = [
        (str(cube["strategy"].values[i]), int(cube["seed"].values[j]))
        for i, j in np.argwhere(found)
    ]
    if not runs:
        raise MissingDataError(
            f"a run with {', '.join(names)}",
            "none that has all of them",
            place_of(cube),
            f"compute them with {command}",
        )
    reference = (REFERENCE_STRATEGY, REFERENCE_SEED)
    strategy, seed = reference if reference in runs else runs[0]
    run = cube.sel(strategy=strategy, seed=seed, drop=True)
    run.attrs["run"] = f"{strategy}, seed {seed}"
    return run


def _measured(cube: xr.Dataset, name: str) -> np.ndarray:
    """Return whether each run (strategy, seed) has the variable."""
    if name in ("influence", "influence_total"):
        name = "adjoint_norm"  # in memory, and there where they are
    array = cube[name]
    if name == "removed":
        array = cube["effect"]
    if name in ("selected", "subset_variant"):
        array = cube["subset_error"]
    if "epoch" in array.dims:
        array = array.isel(epoch=-1)
    others = [dim for dim in array.dims if dim not in ("strategy", "seed")]
    return array.notnull().any(others).transpose("strategy", "seed").values


def is_renormalised(run: xr.Dataset) -> bool:
    """Return whether the effects of removals are those of means over the samples that remain.

    Raises
    ------
    MissingDataError
        Retrainings of both conventions are stored.
    """
    words = str(run["effect"].attrs.get("denominator", "")) if "effect" in run else ""
    if "remain" in words and "," in words:
        raise MissingDataError(
            "retrainings with one convention of the mean",
            words,
            place_of(run),
            f"retrain with either convention in a store of its own: {RETRAIN} --renormalised",
        )
    return "remain" in words


def conventions(*, renormalised: bool = False) -> dict[str, str]:
    """Return the conventions of the numbers of section 4, for attributes and captions."""
    return {
        "sign": "effect of a removal = -influence, to first order; of an NLL, influence below 0 "
        "helps",
        "denominator": DENOMINATORS[renormalised],
    }


# Targets.


def split_smoothing(target: str) -> tuple[str, str]:
    """Return a target's name, and the smoothing of its derivative; "" for the exact one.

    Examples
    --------
    >>> split_smoothing("sample:3 (eps=0.0001)"), split_smoothing("mean")
    (('sample:3', 'eps=0.0001'), ('mean', ''))
    """
    name, _, smoothing = target.partition(" (")
    return name, smoothing.removesuffix(")")


def targets_of(run: xr.Dataset, smoothing: str = "") -> list[str]:
    """Return the targets whose influence the run has, with one smoothing, without its name."""
    if "adjoint_norm" not in run:
        return []
    measured = run["adjoint_norm"].notnull().any("epoch").values
    split = map(split_smoothing, map(str, run["target"].values[measured]))
    return [name for name, label in split if label == smoothing]


def smoothings_of(run: xr.Dataset) -> list[str]:
    """Return the smoothings with which the run has influence; "", the exact one, first."""
    if "adjoint_norm" not in run:
        return []
    measured = run["adjoint_norm"].notnull().any("epoch").values
    return sorted({split_smoothing(str(name))[1] for name in run["target"].values[measured]})


def labelled(target: str, smoothing: str) -> str:
    """Return a target's name in the cube."""
    return f"{target} ({smoothing})" if smoothing else target


def single_test_samples(targets: Iterable[str]) -> list[str]:
    """Return the targets that are single test samples; all of them if there are none."""
    targets = list(targets)
    return [name for name in targets if name.startswith("sample:")] or targets


def influence_of(
    run: xr.Dataset, targets: Sequence[str], smoothing: str, epoch: int | None = None
) -> np.ndarray:
    """Return influence [T, N] in the convention of the run's effects.

    Parameters
    ----------
    run
        A run of `influence_run`.
    targets, smoothing
        Names of the targets, and the smoothing of their derivatives.
    epoch
        Position of an epoch; None for the sum over all.
    """
    names = [labelled(target, smoothing) for target in targets]
    renormalised = is_renormalised(run)
    if epoch is None and not renormalised:
        array = run["influence_total"].sel(target=names).astype(np.float64)
    else:
        chosen = slice(None) if epoch is None else [epoch]
        array = summed_influence(
            run["influence"].sel(target=names).isel(epoch=chosen),
            run["batch"].isel(epoch=chosen) if renormalised else None,
        )
    if epoch is not None:
        array = array.fillna(0)  # a sample that this epoch did not use
    values: np.ndarray = array.transpose("target", "sample").values
    return values


# Removals.


@dataclass(frozen=True, kw_only=True)
class RemovalKind:
    """The removals of one kind, with their truth: R removals, T targets, K repeats, N samples."""

    name: str
    removals: Sequence[str]
    removed: np.ndarray
    """(R, N), bool."""
    targets: Sequence[str]
    effect: np.ndarray
    """(R, T, K); finite."""
    left_out: int
    """Removals without all repeats: a retraining diverged, or was not made."""

    @property
    def is_single(self) -> bool:
        """Whether each removal leaves out one sample."""
        return bool((self.removed.sum(1) == 1).all())

    @property
    def share_kept(self) -> float:
        """Mean share of the samples that stay."""
        return float(1 - self.removed.mean())


def removal_kinds(run: xr.Dataset) -> list[RemovalKind]:
    """Return the removals of a run by their kind, single samples first, then large shares first.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_influence
    >>> run = influence_run(with_influence(example_cube()), "effect")
    >>> [(kind.name, kind.effect.shape) for kind in removal_kinds(run)]
    [('random', (20, 16, 3)), ('top', (20, 16, 3)), ('subset-0.95', (20, 16, 3))]
    """
    effect = run["effect"].transpose("removal", "target", "repeat").values
    names = np.array([str(name) for name in run["removal"].values])
    targets = np.array([str(name) for name in run["target"].values])
    removed = run["removed"].transpose("removal", "sample").values
    kinds = []
    for kind in dict.fromkeys(name.partition(":")[0] for name in names):
        rows = np.array([name.partition(":")[0] == kind for name in names])
        finite = np.isfinite(effect[rows])
        chosen = finite.any((0, 2))
        repeats = finite.any((0, 1))
        if not chosen.any():
            continue
        whole = finite[:, chosen][:, :, repeats].all((1, 2))
        kept = np.flatnonzero(rows)[whole]
        kinds.append(
            RemovalKind(
                name=kind,
                removals=names[kept].tolist(),
                removed=removed[kept],
                targets=targets[chosen].tolist(),
                effect=effect[kept][:, chosen][:, :, repeats],
                left_out=int((~whole).sum()),
            )
        )
    return sorted(kinds, key=lambda kind: (not kind.is_single, -kind.share_kept, kind.name))


def natural_damping(run: xr.Dataset) -> float:
    """Return 1 / (eta T), the damping that suits gradient descent of T steps at rate eta."""
    stored = run["fixed_point_influence"].attrs if "fixed_point_influence" in run else {}
    if "default_damping" in stored:
        return float(stored["default_damping"])
    attrs = run["importance"].attrs
    steps = run.sizes["epoch"] * -(-run.sizes["sample"] // int(attrs["batch_size"]))
    return 1 / (float(attrs["learning_rate"]) * steps)
