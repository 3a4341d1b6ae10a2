"""Influence of the samples of a study's runs: from the request to the units of work.

Map: `InfluenceRequest`; `prepare_influence`; `compute_influence` and `final_importance`, which
compute in this process, without Ray.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
import xarray as xr

from sampimp.config import TrialConfig
from sampimp.data import Dataset, scale_inputs
from sampimp.errors import ConfigError
from sampimp.influence.fixed_point import KRYLOV_STEPS
from sampimp.influence.replay import Smoothing
from sampimp.influence.reverse_pass import ReversePass
from sampimp.influence.trial_run import TrialRun, forward_states
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY
from sampimp.store.cube import open_cube
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.sweeps.derived_study import DerivedStudy, run_here
from sampimp.sweeps.influence_units import InfluenceUnits, list_targets
from sampimp.sweeps.influence_work import named_targets
from sampimp.sweeps.run_choice import check_replayable, choose_runs, require_parameters
from sampimp.sweeps.work import Unit
from sampimp.training.strategies import make_schedule

MEMORY = 2**30
"""Default bytes of a unit for adjoints and kept steps: 16 targets of the paper's network take 60 MB
of it, and 140 steps 500 MB."""


PRODUCT_EPOCHS = 1.7
"""Time of a product with the Hessian of all samples, in epochs of training (counted)."""


@dataclass(frozen=True, kw_only=True)
class InfluenceRequest:
    """What to compute."""

    targets: tuple[str, ...]
    """As for `sampimp.influence.targets.make_targets`."""
    runs: tuple[str, ...]
    """As for `sampimp.sweeps.run_choice.choose_runs`."""
    smoothing: Smoothing = field(default_factory=Smoothing)
    model: str | None = None
    """The study's network, if it is a user's own."""
    memory: int = MEMORY
    fixed_point: bool = False
    """Also compute -H^-1 g (eq. 4), for all targets but probes."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a memory that is not positive."""
        if self.memory <= 0:
            raise ConfigError(
                expected="a positive number of GB",
                got=f"{self.memory / 2**30:g}",
                where="option --memory",
                todo="leave it out, or name what a unit may take",
            )


def prepare_influence(folder: Folder, request: InfluenceRequest) -> DerivedStudy:
    """Check a request against its study; return the units of work.

    Raises
    ------
    UserError
        There is no study, a run or a target is unknown, a run has diverged, or it cannot be
        replayed.
    """
    plan = require_plan(folder)
    positions = choose_runs(plan, plan.resolve(read_commits(folder)), request.runs)
    keys = list(dict.fromkeys(plan.trials()[position].dataset for position in positions))
    require_parameters(folder, plan)
    sources = check_replayable(folder, plan, keys, request.model)
    data = {key: scale_inputs(sources[key], plan.training.input_scaling) for key in keys}
    targets = {
        key: list_targets(request.targets, data[key], plan.datasets[key].layer_names)
        for key in keys
    }
    units = InfluenceUnits(
        folder,
        plan,
        positions,
        targets=targets,
        smoothing=request.smoothing,
        memory=request.memory,
        fixed_point=request.fixed_point,
    )

    @cache
    def measure(key: str, names: tuple[str, ...]) -> float:
        return measure_reverse_epoch(plan, key, data[key], names)

    def step_seconds(unit: Unit) -> float:
        key = plan.trials()[unit.config["position"]].dataset
        if unit.config["kind"] == "fixed-point":
            return KRYLOV_STEPS * PRODUCT_EPOCHS * measure(key, ())
        return measure(key, tuple(unit.config["identity"].get("targets", ())))

    return DerivedStudy(
        folder=folder,
        plan=plan,
        sources=sources,
        units=units,
        words=("units", "epochs"),
        step_seconds=step_seconds,
    )


def measure_reverse_epoch(plan: Plan, key: str, data: Dataset, names: Sequence[str]) -> float:
    """Return the seconds of one epoch of the reverse pass, or of the forward replay for no target.

    A short run on the first samples stands for the epoch, as in `measure_epoch`: its second epoch,
    since libraries load in the first.
    """
    from sampimp.sweeps.estimate import MEASURED_STEPS  # here, since it needs rich

    training = replace(plan.training, epochs=2, parameters_every=1)
    count = min(len(data.train_labels), MEASURED_STEPS * training.batch_size)
    part = data._replace(
        train_inputs=data.train_inputs[:count], train_labels=data.train_labels[:count]
    )
    trial = TrialConfig(dataset=key, strategy="shuffle", seed=0, order_seed=0, training=training)
    schedule = make_schedule("shuffle", count, training.batch_size, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    states, times = {}, []
    for epoch, state in forward_states(trial, part, schedule, parameters=lambda state: None):
        states[epoch] = state
        times.append(time.perf_counter())
    if names:
        run = TrialRun(
            trial, part, schedule, parameters=lambda state: None, states=states.__getitem__
        )
        times = [time.perf_counter()]
        for _ in ReversePass(run, named_targets(names, data, run.layers)).epochs():
            times.append(time.perf_counter())
    torch.set_num_threads(threads)
    return (times[-1] - times[-2]) * len(data.train_labels) / count


def compute_influence(
    out: str | os.PathLike[str] | Folder,
    targets: Sequence[str] = ("mean",),
    *,
    dataset: str | None = None,
    strategy: str = REFERENCE_STRATEGY,
    seed: int = REFERENCE_SEED,
    smoothing: Smoothing | None = None,
    model: str | None = None,
    memory: int = MEMORY,
    fixed_point: bool = False,
) -> xr.Dataset:
    """Compute, in this process, what each training sample did to targets of a run's final model.

    The results are stored with the study, as those of `sampimp influence` are; what is stored is
    not computed again. After an interruption, the same call continues.

    Parameters
    ----------
    out
        The study's folder or s3:// URL.
    targets
        mean, class, class:3, sample:0..31, margin:17, train:5, mean-error, probe:64,
        probe:64@LAYER, package.module:function.
    dataset
        Key of the data set; None if the study has one.
    strategy, seed
        The run.
    smoothing
        Smoothing of the derivative. Default: none, the exact derivative.
    model
        The study's network, if it is package.module:function, which is code to run.
    memory
        Bytes for adjoints and the steps that are kept.
    fixed_point
        Also compute -H^-1 g (the paper's eq. 4) for the named targets, at several dampings.

    Returns
    -------
    xarray.Dataset
        The run's `influence` (target, epoch, layer, sample), `influence_total` and `adjoint_norm`
        for named targets, `fixed_point_influence` (target, curvature, damping, sample), and the
        squares of probes, as far as the store has them, lazily.

    Raises
    ------
    UserError
        The study, the run or a target does not exist, or the run cannot be replayed.

    References
    ----------
    Gao & Jojic (2017), section 4.
    """
    folder = Folder.of(out)
    plan = require_plan(folder)
    key = dataset or _only_dataset(plan, folder)
    request = InfluenceRequest(
        targets=tuple(targets),
        runs=(f"{key}:{strategy}:{seed}",),
        smoothing=smoothing or Smoothing(),
        model=model,
        memory=memory,
        fixed_point=fixed_point,
    )
    run_here(prepare_influence(folder, request))
    names = (
        *("influence", "influence_total", "adjoint_norm", "fixed_point_influence"),
        *("final_importance", "final_importance_total", "arriving_importance"),
    )
    cube = open_cube(folder)[plan.node(key)].to_dataset()
    run = cube[[name for name in names if name in cube]].sel(strategy=strategy, seed=seed)
    if "target" not in run.dims:
        return run
    asked = run["influence_total"].notnull().any("sample").compute()
    return run.isel(target=np.flatnonzero(asked))


def final_importance(
    out: str | os.PathLike[str] | Folder,
    probes: int = 64,
    *,
    dataset: str | None = None,
    strategy: str = REFERENCE_STRATEGY,
    seed: int = REFERENCE_SEED,
    model: str | None = None,
    memory: int = MEMORY,
) -> xr.Dataset:
    """Estimate how far each training sample moved the final parameters of a run, in each layer.

    It is section 4's counterpart of importance: |d theta_end / d v_i|^2 with v_i the weight of the
    sample in all epochs. Random probes estimate it without bias.

    Parameters
    ----------
    out, dataset, strategy, seed, model, memory
        As for `compute_influence`.
    probes
        Number of probes on each layer, and of those over all layers, K; the relative error is
        sqrt(2/K).

    Returns
    -------
    xarray.Dataset
        `final_importance` (layer, sample), `final_importance_total` (sample) and
        `arriving_importance` (epoch, layer, sample), in parameter squared.

    Raises
    ------
    UserError
        As for `compute_influence`.
    """
    folder = Folder.of(out)
    plan = require_plan(folder)
    key = dataset or _only_dataset(plan, folder)
    layers = plan.datasets[key].layer_names
    targets = [f"probe:{probes}", *(f"probe:{probes}@{layer}" for layer in layers)]
    run = compute_influence(
        folder, targets, dataset=key, strategy=strategy, seed=seed, model=model, memory=memory
    )
    return run[["final_importance", "final_importance_total", "arriving_importance"]]


def _only_dataset(plan: Plan, folder: Folder) -> str:
    if len(plan.datasets) != 1:
        raise ConfigError(
            expected=f"one of the study's data sets, {', '.join(plan.datasets)}",
            got="none",
            where=f"{folder}, argument dataset",
            todo="name it",
        )
    return next(iter(plan.datasets))
