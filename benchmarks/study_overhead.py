"""Overhead of a study: wall-clock time x cores over the summed time of bare loops.

    python benchmarks/study_overhead.py --dataset mnist --epochs 25

A bare loop is the plain PyTorch loop of the same runs (autograd and torch.optim.SGD), one process
per core: the steps without recording, and the evaluation at the end of each epoch, which the
definition of NLL requires. The study's wall-clock time includes everything else: the start of Ray,
the data set, recording, storing, checkpoints, scheduling. Bare loops run before and after the
study, so that a drift of the machine's speed shows.
"""

import multiprocessing
import os
import tempfile
import time

import tyro
from rich.console import Console

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import load_dataset
from sampimp.sweeps.options import StudyConfig
from sampimp.sweeps.run import run_study
from sampimp.training import AutogradStep, TrainingRun, make_optimizer
from sampimp.training.strategies import make_schedule


def train_bare(dataset: str, seed: int, epochs: int) -> float:
    """Return the summed seconds of the epochs of a plain run, without its preparation."""
    training = TrainingConfig(epochs=epochs, parameters_every=0)
    trial = TrialConfig(
        dataset=dataset, strategy="shuffle", seed=seed, order_seed=seed, training=training
    )
    data = load_dataset(dataset)
    schedule = make_schedule("shuffle", len(data.train_labels), training.batch_size, seed)
    run = TrainingRun(trial, data, schedule, record=False)
    run.step = AutogradStep(run.model, make_optimizer(run.model, training), record=False)
    return sum(record.seconds for record in run.records())


def measure_bare(dataset: str, epochs: int, cores: int) -> float:
    """Return the mean seconds of an epoch with a bare loop on every core."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        seconds = pool.starmap(train_bare, [(dataset, seed, epochs) for seed in range(cores)])
    return sum(seconds) / (cores * epochs)


def main(dataset: str = "mnist", epochs: int = 25, trials_per_core: int = 2) -> None:
    """Measure and print the overhead.

    Parameters
    ----------
    dataset
        Data set, from SAMPIMP_DATA or downloaded.
    epochs
        Epochs of a trial; the paper has 50.
    trials_per_core
        Trials of the study over cores; the paper's study on 2 cores has 20.
    """
    cores = os.cpu_count() or 1
    trials = trials_per_core * cores
    before = measure_bare(dataset, max(3, epochs // 5), cores)
    with tempfile.TemporaryDirectory() as out:
        config = StudyConfig(
            datasets=(dataset,),
            strategies=("shuffle_by_seed",),
            reference_seeds=tuple(range(1, trials + 1)),
            epochs=epochs,
            out=out,
            address="local",
        )
        start = time.perf_counter()
        code = run_study(config, Console())
        wall = time.perf_counter() - start
    after = measure_bare(dataset, max(3, epochs // 5), cores)
    bare = (before + after) / 2 * epochs * trials
    console = Console()
    console.print(
        f"{dataset}: {trials} trials of {epochs} epochs on {cores} cores, exit code {code}\n"
        f"bare epoch      {before:.2f} s before, {after:.2f} s after\n"
        f"bare loops      {bare:.0f} s in all\n"
        f"study           {wall:.0f} s x {cores} cores = {wall * cores:.0f} s\n"
        f"[bold]overhead        {wall * cores / bare:.3f}[/]",
        highlight=False,
    )


if __name__ == "__main__":
    tyro.cli(main)
