"""Importance and influence by epoch and layer, and how much of the importance is left at the end.

Importance says what samples did in their step. Influence says what that changed in the end: the
derivative of a target by the weight of a sample's loss, split by the epoch and the layer in which
the sample acted. *Arriving importance* is what an epoch's importance has become in the final
parameters; its ratio to the importance itself is the share that is left, above 1 where training
amplified it.

Map: `influence_by_layer`.
"""

import numpy as np
import xarray as xr

from sampimp.analysis import kernels
from sampimp.analysis.influence_runs import (
    conventions,
    influence_run,
    labelled,
    smoothings_of,
    targets_of,
)
from sampimp.analysis.results.difficulty import correlate_samples
from sampimp.analysis.runs import label_result, lazy, model_importance, place_of, require
from sampimp.errors import MissingDataError


def influence_by_layer(cube: xr.Dataset, *, resamples: int = kernels.RESAMPLES) -> xr.Dataset:
    """Return means over the samples of importance, influence and arriving importance.

    Parameters
    ----------
    cube
        One node of the cube.
    resamples
        Bootstrap resamples for the interval.

    Returns
    -------
    Dataset, lazy
        mean_importance(epoch, layer). Where influence was computed: mean_influence(epoch, layer),
        of its absolute value, and adjoint_norm(epoch), of the target `mean` (else the first); the
        attribute `target` names it. Where probes were computed: mean_arriving(epoch, layer) and
        share_left(epoch, layer), sums over samples of arriving importance over importance; with
        NLL also left_mean_epoch(sample), the mean epoch weighted by arriving importance, and its
        rank correlation with final NLL, left_when_rank_correlation() with `*_interval(bound)`.

    Raises
    ------
    MissingDataError
        No run has influence or arriving importance.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube, with_influence
    >>> result = influence_by_layer(with_influence(example_cube()))
    >>> result["share_left"].isel(layer=0).round(2).values  # 0.3² to 1
    array([0.09, 0.19, 0.34, 0.52, 0.74, 1.  ])

    References
    ----------
    Gao & Jojic (2017), section 4.
    """
    require(cube, "importance")
    names = [name for name in ("influence", "arriving_importance") if name in cube]
    if not names:
        raise MissingDataError(
            "a cube with influence or arriving_importance",
            "neither",
            place_of(cube),
            "compute them: sampimp influence OUT",
        )
    run, names = _run_with(cube, names)
    beta = lazy(run["importance"])
    result = xr.Dataset({"mean_importance": beta.mean("sample", dtype=np.float64)})
    target = units = smoothing = ""
    if "influence" in names:
        smoothing = smoothings_of(run)[0]
        targets = targets_of(run, smoothing)
        name = "mean" if "mean" in targets else targets[0]
        target = labelled(name, smoothing)
        chosen = run.sel(target=target, drop=True)
        units = str(run["target_units"].sel(target=target).item())
        size: xr.DataArray = abs(lazy(chosen["influence"]))
        result["mean_influence"] = size.mean("sample", dtype=np.float64)
        result["adjoint_norm"] = chosen["adjoint_norm"]
    if "arriving_importance" in names:
        _add_arriving(result, run, beta, resamples)
    probes = run["arriving_importance"].attrs if "arriving_importance" in names else {}
    labelled_result = label_result(
        result.drop_vars([c for c in result.coords if c not in ("epoch", "layer", "sample")]),
        cube,
        method=f"means over the samples of the run {run.attrs['run']}; share left: sum over the "
        "samples of arriving importance, over that of importance"
        + (f"; arriving importance from {probes['probes']} probes" if "probes" in probes else ""),
        figure="12 and 15",
        section="4",
        variables={
            "mean_importance": ("parameter^2", "mean importance of a sample"),
            "mean_influence": (f"{units} per unit of weight", "mean absolute influence"),
            "adjoint_norm": (f"{units} / parameter", "norm of the target's derivative"),
            "mean_arriving": ("parameter^2", "mean arriving importance of a sample"),
            "share_left": ("1", "arriving importance over importance"),
            "left_mean_epoch": ("epoch", "mean epoch weighted by arriving importance"),
            "left_when_rank_correlation": ("1", "rank correlation of final NLL with mean epoch"),
            "left_when_rank_correlation_interval": ("1", "95 % interval of the correlation"),
        },
    )
    labelled_result.attrs |= {**conventions(), "smoothing": smoothing or "none"}
    if target:
        labelled_result.attrs |= {"target": target, "target_units": units}
    return labelled_result


def _run_with(cube: xr.Dataset, names: list[str]) -> tuple[xr.Dataset, list[str]]:
    """Return a run with all of some variables, else with the first that any run has."""
    for wanted in (names, *([name] for name in names)):
        try:
            return influence_run(cube, *wanted), wanted
        except MissingDataError as error:
            missing = error
    raise missing


def _add_arriving(result: xr.Dataset, run: xr.Dataset, beta: xr.DataArray, resamples: int) -> None:
    """Add what follows from arriving importance."""
    arriving = lazy(run["arriving_importance"])
    result["mean_arriving"] = arriving.mean("sample", dtype=np.float64)
    result["share_left"] = arriving.sum("sample", dtype=np.float64) / beta.sum(
        "sample", dtype=np.float64
    )
    if "nll" not in run:
        return
    left = model_importance(arriving)
    total = left.sum("epoch", skipna=False)
    mean_epoch = (left * left["epoch"]).sum("epoch", skipna=False) / total.where(total > 0)
    final = lazy(run["nll"]).isel(epoch=-1, drop=True)
    correlation, interval = correlate_samples(final, mean_epoch, resamples)
    result["left_mean_epoch"] = mean_epoch
    result["left_when_rank_correlation"] = correlation
    result["left_when_rank_correlation_interval"] = interval
