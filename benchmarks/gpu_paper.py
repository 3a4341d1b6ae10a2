"""One reference run of the paper on MNIST, on a device and on a CPU.

The run is strategy shuffle, seed 1, with the paper's settings (`sampimp.config`): 50 epochs over
the first 50,000 training images. `gpu-reference.npz` contains the CPU's run: errors by epoch, the
overall importance tau by sample, and the digest of the data; `gpu.py --reference` makes it again in
four minutes. Two devices round differently, so their runs diverge: errors and the ranking of the
samples by tau are compared, not bytes. `EXPECTED` states the effect of rounding alone.
"""

import platform
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gpu_report import Report

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import Dataset, Source, load_source, scale_inputs
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import make_schedule

REFERENCE = Path(__file__).with_name("gpu-reference.npz")
ERRORS = ("train_error", "test_error")
EXPECTED = (
    "On the CPU, two threads instead of one change the errors of an epoch by at most 0.04 % "
    "(training) and 0.11 % (test); the Spearman correlation of tau is 0.9996."
)


def reference_run(
    data: Dataset, training: TrainingConfig, report: Report | None = None
) -> dict[str, np.ndarray]:
    """Return the errors by epoch, and tau by sample, of the reference run."""
    trial = TrialConfig(
        dataset="mnist",
        strategy=REFERENCE_STRATEGY,
        seed=REFERENCE_SEED,
        order_seed=0,
        training=training,
    )
    count = len(data.train_labels)
    schedule = make_schedule(trial.strategy, count, training.batch_size, trial.order_seed)
    curves: dict[str, list[float]] = {name: [] for name in ERRORS}
    tau, total_seconds = np.zeros(count), 0.0
    for record in TrainingRun(trial, data, schedule).records():
        if record.epoch:
            tau += record.arrays["importance"].sum(0, dtype=np.float64)
            total_seconds += record.seconds
            for name in ERRORS:
                curves[name].append(float(record.arrays[name]))
        if report and record.epoch and record.epoch % 10 in (0, 1):
            errors = (f"{curves[name][-1]:.2%}" for name in ERRORS)
            report.row(str(record.epoch), *errors, f"{total_seconds:.1f}")
    return {**{name: np.array(curves[name]) for name in ERRORS}, "tau": tau.astype(np.float32)}


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Return the rank correlation of values without ties."""
    left_ranks, right_ranks = (values.argsort().argsort() for values in (left, right))
    return float(np.corrcoef(left_ranks, right_ranks)[0, 1])


def write_reference() -> None:
    """Compute the reference run on the CPU and write it."""
    source = load_source("mnist")
    run = reference_run(scale_inputs(source, "unit"), TrainingConfig(parameters_every=0))
    made_by = f"torch {torch.__version__}, Python {platform.python_version()}, one CPU thread"
    arrays: dict[str, Any] = {**run, "data": source.digest, "made_by": made_by}
    np.savez_compressed(REFERENCE, **arrays)


def synthetic_images(samples: int, tests: int) -> Source:
    """Return images of ten classes: a pattern for each class, plus noise."""
    chance = np.random.default_rng(1)
    patterns = chance.integers(0, 128, (10, 1, 28, 28))

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 10
        noise = chance.integers(0, 128, (count, 1, 28, 28))
        return (patterns[labels] + noise).astype(np.uint8), labels.astype(np.int64)

    (train_values, train_labels), (test_values, test_labels) = part(samples), part(tests)
    return Source(
        name="made",
        train_values=train_values,
        train_labels=train_labels,
        test_values=test_values,
        test_labels=test_labels,
        full_scale=255.0,
        class_names=tuple(map(str, range(10))),
    )


def run(device: Literal["cpu", "cuda"], quick: bool, directory: Path) -> bool:
    """Train on the device and compare; with `quick`, on synthetic images and also on the CPU."""
    report = Report(
        directory / "paper.md",
        "One reference run of the paper on MNIST"
        if not quick
        else "A reference run on synthetic images instead of MNIST",
        ("epoch", "training error", "test error", "seconds so far"),
        device,
    )
    settings: dict[str, Any] = {"parameters_every": 0}
    if quick:
        settings |= {"epochs": 2, "hidden": (32, 32, 32)}
        source = synthetic_images(1000, 200)
        reference = reference_run(scale_inputs(source, "unit"), TrainingConfig(**settings))
        made_by = "this machine's CPU"
    else:
        source = load_source("mnist")
        with np.load(REFERENCE) as stored:
            reference = {name: stored[name] for name in (*ERRORS, "tau")}
            made_by = str(stored["made_by"])
            if str(stored["data"]) != source.digest:
                raise ValueError(f"MNIST has digest {source.digest}, expected {stored['data']}")
    training = TrainingConfig(device=device, **settings)
    result = reference_run(scale_inputs(source, "unit"), training, report)
    report.note(f"Compared with the run by {made_by}; data of digest {source.digest[:16]}.")
    if not quick:
        report.note(EXPECTED)
    last = ", ".join(
        f"{name.replace('_', ' ')} {result[name][-1]:.2%} (CPU {reference[name][-1]:.2%})"
        for name in ERRORS
    )
    apart = ", ".join(f"{abs(result[name] - reference[name]).max():.2%}" for name in ERRORS)
    correlation = spearman(result["tau"], reference["tau"])
    report.summarise(
        f"reference run: after {len(result['test_error'])} epochs {last}; largest difference in "
        f"an epoch {apart}; Spearman correlation of tau {correlation:.4f}"
    )
    return True
