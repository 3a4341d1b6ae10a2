"""Exactness of the reverse pass, and replays of stored runs: a section of `influence.py`.

In float64, 200 digits and a network of 32-32-32 units: against the forward recursion (eq. 5 of the
paper) and against differences of whole trainings by the samples' weights. The optimizers and
options that a study does not have (RMSprop, Adagrad, amsgrad, clipping) are in
`tests/influence/test_reverse_pass.py`. In float32, in the first step of every epoch of the runs of
this benchmark: the inner products with a layer's direction, summed over layers, against the
derivative of the samples' losses along it by torch's forward mode.

Map: `exactness` (the section); `ComparedRun` (a replay that compares), `layer_sum_job`,
`exact_job`, `replay_job`.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from influence_jobs import Setting, load_data, load_run, named_targets, write_arrays
from influence_scores import Sizes
from influence_table import EXACT, Bench, Row
from torch import Tensor
from torch.nn import functional

from sampimp.influence.recursion import final_tangents
from sampimp.influence.replay import Smoothing, StepDerivatives
from sampimp.influence.reverse_pass import ReversePass
from sampimp.influence.targets import Target
from sampimp.influence.trial_run import TrialRun
from sampimp.training.loop import TrainingRun

SPECS = ("mean", "sample:0", "margin:1", "probe:1")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
DIFFERENCES = (1e-4, 3e-5, 1e-5, 3e-6)
"""Changes of a weight for the differences, which are of fourth order. Large ones flip gates of
ReLUs, and reach into the bend of Adam's root where a gradient is as small as eps; small ones are
rounding. The error of a target and sample is the least of the four."""


def exact_job(path: Path, scratch: Path, setting: Setting, count: int) -> None:
    """Write the largest errors against recursion and differences, relative to the largest value."""
    torch.set_num_threads(1)
    run = load_run(scratch, setting)
    targets = named_targets(run, SPECS)
    start = time.process_time()
    total_TN: Any = 0.0
    for result in ReversePass(run.replay(), targets).epochs():
        total_TN = total_TN + np.nan_to_num(result.influence).sum(1)
    samples = np.random.default_rng(0).choice(len(run.tau), count, replace=False)
    trial = run.replay()
    tangents = final_tangents(trial, samples.tolist())
    trial.load_start(setting.epochs + 1)
    recursion = np.stack(
        [
            sum(
                tangent.flatten(1) @ gradient.flatten()
                for tangent, gradient in zip(tangents, target.gradient(trial.model), strict=True)
            ).numpy()  # type: ignore[union-attr]
            for target in targets
        ]
    )
    differences = np.stack([differences_of(setting, targets, samples, h) for h in DIFFERENCES])
    largest = np.abs(recursion).max(1, keepdims=True)
    errors = {
        "recursion": np.max(np.abs(total_TN[:, samples] - recursion) / largest),
        "differences": np.max(np.abs(total_TN[:, samples] - differences).min(0) / largest, 1),
    }
    write_arrays(path, start, **errors)


def differences_of(
    setting: Setting, targets: Sequence[Target], samples: np.ndarray, size: float
) -> np.ndarray:
    """Return dT/dv by training with each sample's weight changed, (target, sample)."""
    data, schedule = load_data(setting)
    result = np.zeros((len(targets), len(samples)))
    for place, sample in enumerate(samples):
        for steps, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            weights = np.ones(len(data.train_labels))
            weights[sample] += steps * size
            weighted = TrainingRun(setting.config, data, schedule, record=False, weights=weights)
            for epoch in range(1, setting.epochs + 1):
                for batch in weighted.begin_epoch(epoch):
                    weighted.train_batch(batch)
            values = np.array([target.value(weighted.model) for target in targets])
            result[:, place] += factor * values / (12 * size)
    return result


class ComparedStep:
    """Derivatives of a step that compare each product's sum over layers with forward mode."""

    def __init__(self, run: "ComparedRun", step: np.ndarray, derivatives: StepDerivatives) -> None:
        self._run, self._step, self._derivatives = run, step, derivatives
        self.gradients = derivatives.gradients
        self.sample_gradients = derivatives.sample_gradients
        self.precision = derivatives.precision

    def products(self, directions: Sequence[Tensor], out: Sequence[Tensor]) -> Tensor:
        """See `StepDerivatives`."""
        inner_KLN = self._derivatives.products(directions, out)
        model, (inputs, labels) = self._run.model, self._run.batch(self._step)
        names = [name for name, _ in model.named_parameters()]
        values = tuple(parameter.detach() for parameter in model.parameters())

        def losses(*parameters: Tensor) -> Tensor:
            logits = torch.func.functional_call(
                model, dict(zip(names, parameters, strict=True)), (inputs,)
            )
            return functional.cross_entropy(logits.double(), labels, reduction="none")

        for number, inner_LN in enumerate(inner_KLN):
            along = tuple(direction[number] for direction in directions)
            expected_N = torch.func.jvp(losses, values, along)[1] / len(self._step)
            difference = (inner_LN.double().sum(0) - expected_N).abs().max()
            self._run.mismatches.append(float(difference / expected_N.abs().max()))
        return inner_KLN


class ComparedRun(TrialRun):
    """A replay that compares the first step of each epoch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mismatches: list[float] = []
        self._first: np.ndarray = np.zeros(0)

    def begin(self, epoch: int) -> Sequence[np.ndarray]:
        """See `ReplayableRun`."""
        steps = super().begin(epoch)
        self._first = steps[0]
        return steps

    def batch(self, step: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return a step's inputs and labels."""
        return self._run.batch_data(step)

    def derivatives(self, step: np.ndarray, smoothing: Smoothing) -> StepDerivatives:
        """See `ReplayableRun`."""
        derivatives = super().derivatives(step, smoothing)
        return ComparedStep(self, step, derivatives) if step is self._first else derivatives


def layer_sum_job(path: Path, scratch: Path, setting: Setting) -> None:
    """Write the relative mismatches in the first step of each epoch, (epoch * target,)."""
    torch.set_num_threads(1)
    run = load_run(scratch, setting)
    targets = named_targets(run, ("mean", "sample:0..2"))
    start = time.process_time()
    trial = run.replay(ComparedRun)
    assert isinstance(trial, ComparedRun)
    for _ in ReversePass(trial, targets, smoothing=EXACT).epochs():
        pass
    write_arrays(path, start, mismatches=trial.mismatches)


def replay_job(path: Path, scratch: Path, setting: Setting) -> None:
    """Replay each epoch from its stored start in this process; write how many end as stored."""
    torch.set_num_threads(1)
    trial = load_run(scratch, setting).replay()
    start = time.process_time()
    for epoch in range(1, setting.epochs + 1):
        trial.load_start(epoch)
        for step in trial.begin(epoch):
            trial.train(step)
        trial.check_end(epoch)  # raises RecordError for a difference
    write_arrays(path, start, epochs=setting.epochs)


def exactness(bench: Bench, sizes: Sizes) -> list[Row]:
    """Exactness in float64 and float32, and replays."""
    tiny = [
        Setting(
            dataset="digits",
            samples=200,
            activation=activation,
            width=32,
            epochs=3,
            optimizer=optimizer,
            precision="float64",
        )
        for optimizer in OPTIMIZERS
        for activation in ("gelu", "relu")
    ]
    bench.runs(tiny)
    paths = {setting: bench.scratch / setting.key / "exact.npz" for setting in tiny}
    count = sizes.exact_samples
    bench.run_jobs((exact_job, path, (setting, count)) for setting, path in paths.items())
    errors = {setting: bench.read(path) for setting, path in paths.items()}
    make = partial(Row, at_most=True)
    rows = [
        make(
            check="reverse pass against the recursion, float64",
            setting=f"digits, 200 images, 32-32-32, 3 epochs, {count} samples, four targets; "
            f"{', '.join(OPTIMIZERS)}; GELU, ReLU",
            value=max(float(e["recursion"]) for e in errors.values()),
            asked=1e-12,
            note="largest error, of each target's largest value",
        )
    ]
    for optimizer in OPTIMIZERS:
        chosen = {s.activation: e for s, e in errors.items() if s.optimizer == optimizer}
        rows.append(
            make(
                check=f"reverse pass against differences of v, {optimizer}",
                setting="the same; GELU",
                value=float(chosen["gelu"]["differences"].max()),
                asked=1e-7,
                note=f"largest of the targets but the mean, whose differences are the least: "
                f"{chosen['gelu']['differences'][1:].max():.1e}; "
                f"ReLU {chosen['relu']['differences'].max():.1e}",
            )
        )
    real = [*sizes.gelu_runs, sizes.relu, sizes.paper]
    bench.runs(real)
    files = {setting: bench.scratch / setting.key / "layer-sum.npz" for setting in real}
    bench.run_jobs((layer_sum_job, path, (setting,)) for setting, path in files.items())
    for setting, path in files.items():
        rows.append(
            make(
                check="sum over layers against the JVP, first step of each epoch, float32",
                setting=setting.words,
                value=float(bench.read(path)["mismatches"].max()),
                asked=1e-3,
                note="largest of 4 targets and all epochs, of a batch's largest value",
            )
        )
    return [*rows, replays(bench, sizes)]


def replays(bench: Bench, sizes: Sizes) -> Row:
    """Return the row of the stored runs that are replayed bit for bit."""
    settings = [s for s in sizes.runs() if (bench.scratch / s.key / "run.npz").exists()]
    paths = [bench.scratch / setting.key / "replay.npz" for setting in settings]
    bench.run_jobs(
        (replay_job, path, (setting,)) for setting, path in zip(settings, paths, strict=True)
    )
    epochs = sum(int(bench.read(path)["epochs"]) for path in paths)
    return Row(
        check="stored runs replayed: share of epochs equal bit for bit",
        setting=f"all {len(settings)} float32 runs of this page, in other processes",
        value=1.0,
        asked=1.0,
        note=f"{epochs} of {epochs} epochs; any other would be an error",
    )
