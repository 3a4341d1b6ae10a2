"""Influence functions of other packages on the same run, each with its defaults and other dampings.

    dattri    influence function by conjugate gradients and Arnoldi, DVEmb (of the run's steps)
    captum    Arnoldi influence function, TracInCP (on the parameters after each epoch)
    pyDVL     conjugate gradients on the Gauss-Newton matrix, EK-FAC

A package that is not installed leaves its rows out. pyDVL 0.10 asks for numpy below 2 and works
with a newer one, so that the extra `bench` cannot name it. Scores are turned into this project's
sign: dT/dv_i, so that the effect of a removal is minus the score.

Map: `other_methods`; the jobs are in `METHODS`.
"""

import contextlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from influence_jobs import RATES, Setting, StoredRun, load_data, load_run, write_arrays
from influence_scores import Sizes
from influence_table import Bench, NotStoredError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sampimp.training.models import load_parameters

Values = dict[str, np.ndarray]
"""From a damping, in words, to the influence (target, N)."""

CP_BATCH = 200
"""Samples whose gradients a package holds at once (arbitrary)."""


def tensors(run: StoredRun, targets: int) -> tuple[TensorDataset, TensorDataset]:
    """Return the training samples, and the first test samples."""
    data = run.data
    train, test, labels = map(torch.from_numpy, (data.train_inputs, data.test_inputs, data[3]))
    train_labels = torch.from_numpy(data.train_labels)
    return TensorDataset(train, train_labels), TensorDataset(test[:targets], labels[:targets])


def loss_of(model: nn.Module) -> Callable[[Any, Any], Tensor]:
    """Return dattri's loss function of a model."""

    def loss(parameters: Any, batch: Any) -> Tensor:
        inputs, labels = batch
        logits = torch.func.functional_call(model, parameters, (inputs,))
        return functional.cross_entropy(logits, labels)

    return loss


def dattri_cg(run: StoredRun, targets: int, dampings: Mapping[str, float]) -> Values:
    """`IFAttributorCG`: 10 iterations, damping 0 by default."""
    from dattri.algorithm import IFAttributorCG

    options = {name: {"regularization": damping} for name, damping in dampings.items()}
    return _dattri(IFAttributorCG, run, targets, {"default": {}, **options})


def dattri_arnoldi(run: StoredRun, targets: int, dampings: Mapping[str, float]) -> Values:
    """`IFAttributorArnoldi`: 100 iterations and dimensions, damping 0."""
    from dattri.algorithm import IFAttributorArnoldi

    return _dattri(IFAttributorArnoldi, run, targets, {"default": {}})


def _dattri(
    kind: Callable[..., Any], run: StoredRun, targets: int, options: Mapping[str, Mapping[str, Any]]
) -> Values:
    from dattri.task import AttributionTask

    train, test = tensors(run, targets)
    model = run.model().eval()
    task = AttributionTask(loss_of(model), model, model.state_dict())
    whole = DataLoader(train, batch_size=len(train))
    values = {}
    for name, settings in options.items():
        attributor = kind(task=task, **settings)
        attributor.cache(whole)
        scores = attributor.attribute(whole, DataLoader(test, batch_size=targets))
        values[name] = -scores.T.detach().numpy()
    return values


def dattri_dvemb(run: StoredRun, targets: int, dampings: Mapping[str, float]) -> Values:
    """`DVEmbAttributor` along the run's steps, gradients projected by layer to 4,096 numbers."""
    from dattri.algorithm import DVEmbAttributor
    from dattri.task import AttributionTask

    setting = run.setting
    train, test = tensors(run, targets)
    trial = run.replay()

    def loss(model: nn.Module, batch: Any, device: Any) -> Tensor:
        inputs, labels = batch
        return functional.cross_entropy(model(inputs.to(device)), labels.to(device))

    task = AttributionTask(loss, trial.model, trial.model.state_dict())
    attributor = DVEmbAttributor(task=task, proj_dim=4096, factorization_type="kronecker")
    for epoch in range(1, setting.epochs + 1):
        trial.load_start(epoch)
        for step in trial.begin(epoch):
            index = torch.from_numpy(step)
            batch = tuple(values[index] for values in train.tensors)
            attributor.cache_gradients(epoch - 1, batch, index, RATES[setting.optimizer])
            trial.model.zero_grad()
            trial.train(step)
    trial.load_start(setting.epochs + 1)
    attributor.cache()
    scores = attributor.attribute(DataLoader(test, batch_size=targets))
    return {"default": -scores.reshape(len(train), targets).T.detach().numpy()}


class EpochParameters:
    """captum's loader of checkpoints: the parameters after an epoch."""

    def __init__(self, run: StoredRun) -> None:
        self._parameters = run.parameters

    def __call__(self, model: nn.Module, epoch: Any) -> float:
        """Load the parameters after an epoch; return the learning rate, by which captum weighs."""
        load_parameters(model, torch.from_numpy(self._parameters[int(epoch)]))
        return 1.0


def captum_tracin(run: StoredRun, targets: int, dampings: Mapping[str, float]) -> Values:
    """`TracInCP` on the parameters after each epoch."""
    from captum.influence import TracInCP

    train, test = tensors(run, targets)
    model = run.model().eval()
    epochs = [str(epoch) for epoch in range(1, run.setting.epochs + 1)]
    tracin = TracInCP(
        model,
        train,
        epochs,
        checkpoints_load_func=EpochParameters(run),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=CP_BATCH,
        sample_wise_grads_per_batch=True,
    )
    return {"default": -tracin.influence(tuple(test.tensors)).numpy()}


def captum_arnoldi(run: StoredRun, targets: int, dampings: Mapping[str, float]) -> Values:
    """`ArnoldiInfluenceFunction`: rank 50 of 200 dimensions, damping 1e-3."""
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    train, test = tensors(run, targets)
    influence = ArnoldiInfluenceFunction(
        run.model().eval(),
        train,
        "unused",
        checkpoints_load_func=lambda network, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=CP_BATCH,
        seed=0,
    )
    return {"default": -influence.influence(tuple(test.tensors)).numpy()}


def pydvl_cg(run: StoredRun, targets: int, dampings: Mapping[str, float]) -> Values:
    """`CgInfluence` on the Gauss-Newton matrix; it has no default damping."""
    from pydvl.influence.torch import CgInfluence
    from pydvl.influence.torch.util import SecondOrderMode

    make = partial(CgInfluence, maxiter=50, warn_on_max_iteration=False)
    mode = SecondOrderMode.GAUSS_NEWTON
    return {
        name: _pydvl(
            make(run.model().eval(), functional.cross_entropy, damping, second_order_mode=mode),
            run,
            targets,
        )
        for name, damping in dampings.items()
    }


def pydvl_ekfac(run: StoredRun, targets: int, dampings: Mapping[str, float]) -> Values:
    """`EkfacInfluence`; damping 0 by default."""
    from pydvl.influence.torch import EkfacInfluence

    options: dict[str, float] = {"default": 0.0, **dampings}
    return {
        name: _pydvl(
            EkfacInfluence(
                run.model().eval(), update_diagonal=True, hessian_regularization=damping
            ),
            run,
            targets,
        )
        for name, damping in options.items()
    }


def _pydvl(model: Any, run: StoredRun, targets: int) -> np.ndarray:
    train, test = tensors(run, targets)
    model = model.fit(DataLoader(train, batch_size=CP_BATCH))
    parts: Dataset[Any] = train
    scores = [
        model.influences(*test.tensors, *batch) for batch in DataLoader(parts, batch_size=CP_BATCH)
    ]
    return -torch.cat(scores, 1).detach().numpy()


Method = Callable[[StoredRun, int, Mapping[str, float]], Values]

METHODS: dict[str, tuple[str, Method]] = {
    "dattri IF, CG": ("dattri", dattri_cg),
    "dattri IF, Arnoldi": ("dattri", dattri_arnoldi),
    "dattri DVEmb": ("dattri", dattri_dvemb),
    "captum IF, Arnoldi": ("captum", captum_arnoldi),
    "captum TracInCP": ("captum", captum_tracin),
    "pyDVL IF, CG": ("pydvl", pydvl_cg),
    "pyDVL IF, EK-FAC": ("pydvl", pydvl_ekfac),
}


def other_job(
    path: Path,
    scratch: Path,
    setting: Setting,
    method: str,
    targets: int,
    dampings: Mapping[str, float],
) -> None:
    """Write the values of one method, and the package's version."""
    torch.set_num_threads(1)
    package, function = METHODS[method]
    run = load_run(scratch, setting)
    load_data(setting)
    start = time.process_time()
    try:
        values: dict[str, Any] = function(run, targets, dampings)
    except Exception as error:  # of any kind: another package's; the page names it
        values = {"error": f"{type(error).__name__}: {error}"}
    write_arrays(path, start, version=importlib.metadata.version(package), **values)


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def other_methods(
    bench: Bench, sizes: Sizes, setting: Setting, dampings: Mapping[str, float]
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return the candidates of the installed packages, and lines about the others."""
    folder = bench.scratch / setting.key
    paths = {name: folder / f"other-{name.replace(' ', '-')}.npz" for name in METHODS}
    with contextlib.suppress(NotStoredError):
        bench.run_jobs(
            (other_job, paths[name], (setting, name, sizes.targets, dict(dampings)))
            for name, (package, _) in METHODS.items()
            if is_installed(package)
        )
    candidates: dict[str, dict[str, np.ndarray]] = {}
    lines = []
    for name, (package, _) in METHODS.items():
        if not paths[name].exists():
            lines.append(f"{name}: not measured (is {package} installed?).")
            continue
        values = bench.read(paths[name])
        version = str(values.pop("version"))
        if "error" in values:
            lines.append(f"{name}, {package} {version}: {values['error']}")
            continue
        default = values.pop("default", None)
        if default is not None:
            candidates[f"{name}, defaults ({version})"] = {"": default}
        if values:
            candidates[f"{name}, best damping ({version})"] = values
    return candidates, lines
