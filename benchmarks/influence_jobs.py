"""The long jobs behind `influence.py`: recorded runs, retrainings, and reverse passes, as files.

Each job writes one file of arrays into the scratch folder and is never repeated: a benchmark that
was stopped continues with the jobs that are missing. The files of other settings have other names;
after a change in the code, choose another scratch folder.

    SETTING/run.npz                      parameters by epoch, tau, final NLL of each sample
    SETTING/random-30-part0-r1-00.npz    one block of retrainings: values after, per removal
    SETTING/influence-sample-0..19-....npz   total influence and that of the last epoch

Map: `Setting` (a run), `Removals` (what is left out), `StoredRun`; the jobs `record_run`,
`retrain_block` and `reverse_block`.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import Dataset, load_dataset
from sampimp.importance.snapshot import forward_layers
from sampimp.influence.replay import Smoothing
from sampimp.influence.retraining import (
    random_subsets,
    retrained_model,
    single_removals,
)
from sampimp.influence.reverse_pass import ReversePass
from sampimp.influence.targets import Target, make_targets
from sampimp.influence.trial_run import TrialRun, forward_states, needs_states
from sampimp.training.loop import TrainingRun, evaluate
from sampimp.training.models import flatten_parameters, parameter_layers
from sampimp.training.strategies import Schedule, make_schedule

BLOCK = 16
"""Removals of one retraining job, and targets of one reverse pass, at most."""

TEST_SAMPLES = 2000
"""Test samples whose NLL is kept of every retraining, at most."""

RATES = {"sgd": 0.1, "momentum": 0.01, "adam": 1e-3, "adamw": 1e-3}
"""The paper's rate; with momentum 0.9 its tenth, so that steps are as large; Adam's usual one."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One recorded run: initialisation 1, random batches of 100, weight decay 1e-5."""

    dataset: str = "mnist"
    samples: int = 10_000
    """The first training samples, at most."""
    activation: str = "gelu"
    width: int = 128
    """Units of each of the three hidden layers."""
    epochs: int = 5
    optimizer: str = "sgd"
    precision: Literal["float32", "float64"] = "float32"

    @property
    def key(self) -> str:
        """Name of the folder of its files."""
        words = [self.dataset, str(self.samples), self.activation, str(self.width)]
        words += [f"{self.epochs}-epochs", self.optimizer]
        return "-".join(words + ["float64"] * (self.precision == "float64"))

    @property
    def words(self) -> str:
        """The setting as the cell of a table."""
        hidden = "-".join([str(self.width)] * 3)
        return (
            f"{self.dataset}, {self.samples:,} images, {self.activation}, {hidden}, "
            f"{self.epochs} epochs, {self.optimizer} {RATES[self.optimizer]:g}"
            + (", float64" if self.precision == "float64" else "")
        )

    @property
    def config(self) -> TrialConfig:
        """Its configuration, as that of a trial of a study."""
        training = TrainingConfig(
            hidden=(self.width,) * 3,
            activation=self.activation,  # type: ignore[arg-type]
            epochs=self.epochs,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            learning_rate=RATES[self.optimizer],
        )
        return TrialConfig(
            dataset=self.dataset, strategy="shuffle", seed=1, order_seed=0, training=training
        )


@dataclass(frozen=True, kw_only=True)
class Removals:
    """What is left out: single samples or groups; parts 0, 1, ... have other samples."""

    kind: Literal["random", "top", "subset"]
    """Samples drawn at random, the most important ones, or random subsets."""
    count: int
    part: int = 0
    share: float = 1.0
    """Share of the samples that a subset keeps."""
    weight: float = 0.0
    """Weight that the samples keep, instead of 1: 0 leaves them out."""

    @property
    def key(self) -> str:
        """Start of the names of its files."""
        words = [self.kind, str(self.count), f"part{self.part}"]
        words += [f"{self.share:g}"] if self.kind == "subset" else []
        return "-".join(words + [f"weight{self.weight:g}"] * (self.weight != 0))

    def rows(self, tau_N: np.ndarray) -> np.ndarray:
        """Return the removals (R, N), True for a removed sample."""
        if self.kind == "subset":
            return random_subsets(len(tau_N), self.share, self.count, seed=self.part)
        end = self.count * (self.part + 1)
        random, top = single_removals(tau_N, 3 * self.count, end, seed=0)
        return (random if self.kind == "random" else top)[end - self.count : end]


@functools.lru_cache(2)
def load_data(setting: Setting) -> tuple[Dataset, Schedule]:
    """Return a setting's data and its batches."""
    data = load_dataset(setting.dataset)
    inputs = (data.train_inputs[: setting.samples], data.test_inputs)
    train, test = (values.astype(setting.precision) for values in inputs)
    data = Dataset(train, data.train_labels[: setting.samples], test, data.test_labels)
    return data, make_schedule("shuffle", len(data.train_labels), 100, 0)


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A recorded run, from its file."""

    setting: Setting
    parameters: np.ndarray
    """(epoch + 1, P): the start, and after each epoch."""
    tau: np.ndarray
    """Overall importance, (N,)."""
    nll: np.ndarray
    """Final NLL of the training samples, (N,)."""
    test_error: float

    @property
    def data(self) -> Dataset:
        """The data that it was trained on."""
        return load_data(self.setting)[0]

    @property
    def final_parameters(self) -> np.ndarray:
        """(P,), after the last epoch."""
        return self.parameters[-1]

    def replay(self, kind: type[TrialRun] = TrialRun) -> TrialRun:
        """Return the run for a reverse pass; it is trained once more where states are needed."""
        data, schedule = load_data(self.setting)
        stored = self.parameters.__getitem__
        states: Callable[[int], bytes] | None = None
        if needs_states(self.setting.config) or self.setting.precision == "float64":
            states = optimizer_states(self)
        return kind(self.setting.config, data, schedule, parameters=stored, states=states)

    def model(self) -> nn.Sequential:
        """Return the network at its final parameters."""
        trial = self.replay()
        trial.load_start(self.setting.epochs + 1)
        assert isinstance(trial.model, nn.Sequential)
        return trial.model


def optimizer_states(run: StoredRun) -> Callable[[int], bytes]:
    """Return a run's state after each epoch, by training it once more."""
    data, schedule = load_data(run.setting)
    stored = run.parameters.__getitem__
    return dict(forward_states(run.setting.config, data, schedule, parameters=stored)).__getitem__


def load_run(scratch: Path, setting: Setting) -> StoredRun:
    """Return a recorded run."""
    with np.load(scratch / setting.key / "run.npz") as file:
        return StoredRun(
            setting=setting,
            parameters=file["parameters"],
            tau=file["tau"],
            nll=file["nll"],
            test_error=float(file["test_error"]),
        )


def write_arrays(path: Path, start: float, **arrays: Any) -> None:
    """Write a job's result, and its seconds since `start`; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, seconds=time.process_time() - start, **arrays)
    part.replace(path)


def record_run(path: Path, scratch: Path, setting: Setting) -> None:
    """Train a run, and record importance and parameters."""
    torch.set_num_threads(1)
    data, schedule = load_data(setting)
    start = time.process_time()
    records = list(TrainingRun(setting.config, data, schedule).records())
    importance = [record.arrays["importance"].astype(np.float64) for record in records[1:]]
    write_arrays(
        path,
        start,
        parameters=np.stack([record.arrays["parameters"] for record in records]),
        tau=np.sum(importance, (0, 1)),
        nll=records[-1].arrays["nll"],
        test_error=records[-1].arrays["test_error"],
    )


def trained(
    setting: Setting, removed_N: np.ndarray | None, weight: float, repeat: int
) -> nn.Module:
    """Return the network after training with other weights of some samples."""
    data, schedule = load_data(setting)
    if removed_N is None or weight == 0:
        return retrained_model(setting.config, data, schedule, removed_N, repeat)
    assert repeat == 0
    weights = np.where(removed_N, weight, 1.0)
    run = TrainingRun(setting.config, data, schedule, record=False, weights=weights)
    for epoch in range(1, setting.epochs + 1):
        for batch in run.begin_epoch(epoch):
            run.train_batch(batch)
    return run.model


def outcome(setting: Setting, model: nn.Module) -> tuple[np.ndarray, float]:
    """Return the NLL of the first test samples, and the mean over all."""
    data = load_data(setting)[0]
    test = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_labels)
    nll = evaluate(model, *test)[0]
    return nll[:TEST_SAMPLES], float(nll.mean())


@functools.lru_cache(2)
def reference(setting: Setting, repeat: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Return the outcome without a removal, and the final parameters (P,)."""
    model = trained(setting, None, 0.0, repeat)
    return *outcome(setting, model), flatten_parameters(model).numpy()


def retrain_block(
    path: Path, scratch: Path, setting: Setting, removals: Removals, repeat: int, first: int
) -> None:
    """Train without the samples of up to `BLOCK` removals, from one start."""
    torch.set_num_threads(1)
    start = time.process_time()
    rows = removals.rows(load_run(scratch, setting).tau)[first : first + BLOCK]
    nll_T, mean, parameters_P = reference(setting, repeat)
    effects, means, changes = [], [], []
    for removed_N in rows:
        model = trained(setting, removed_N, removals.weight, repeat)
        values_T, value = outcome(setting, model)
        effects.append(values_T - nll_T)
        means.append(value - mean)
        difference_P = flatten_parameters(model).numpy() - parameters_P
        changes.append(layer_squares(model, difference_P))
    write_arrays(path, start, effect=effects, mean_effect=means, change=changes)


def layer_squares(model: nn.Module, vector_P: np.ndarray) -> list[float]:
    """Return the sum of squares of a vector of parameters in each layer."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = np.split(vector_P.astype(np.float64), np.cumsum(sizes)[:-1])
    names = [name for name, _ in parameter_layers(model)]
    squares = dict.fromkeys(names, 0.0)
    for name, part in zip(names, parts, strict=True):
        squares[name] += float(part @ part)
    return list(squares.values())


def reverse_block(
    path: Path,
    scratch: Path,
    setting: Setting,
    specs: tuple[str, ...],
    first: int,
    smoothing: Smoothing,
) -> None:
    """Go backward through a run for up to `BLOCK` of the targets that are named."""
    torch.set_num_threads(1)
    run = load_run(scratch, setting)
    targets = named_targets(run, specs)[first : first + BLOCK]
    start = time.process_time()
    reverse = ReversePass(run.replay(), targets, smoothing=smoothing)
    total: Any = 0.0
    last = None
    for epoch in reverse.epochs():
        influence_TN = np.nan_to_num(epoch.influence).astype(np.float64).sum(1)
        last = influence_TN if last is None else last
        total = total + influence_TN
    write_arrays(path, start, total=total, last=last, growth=reverse.growth)


def named_targets(run: StoredRun, specs: tuple[str, ...]) -> list[Target]:
    """Return targets by their names."""
    layers = forward_layers(run.model(), torch.from_numpy(run.data.train_inputs[:2]))
    return make_targets(specs, run.data, layers)
