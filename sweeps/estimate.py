"""Estimate of a study: the measured time of an epoch, the total time, and the storage.

`--dry-run` prints it and ends, without Ray: it counts this machine, and asks no cluster. A study
that trains on this machine alone prints the time of the same measurement before it starts Ray.

Map: `describe_study` (`--dry-run`), `announce_time`, `measure_epoch`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from rich.console import Console

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import Source, load_source, scale_inputs
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY
from sampimp.store.plan import Plan
from sampimp.sweeps.machines import Cluster, find_address, this_machine
from sampimp.sweeps.options import StudyConfig
from sampimp.sweeps.preflight import check_cluster
from sampimp.sweeps.quantities import format_bytes, format_count, format_duration
from sampimp.sweeps.study import Study, prepare_study
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import make_schedule

LONG_STUDY = 3600.0
"""Seconds of training on one machine above which a cluster is suggested (arbitrary)."""

TRIAL_SECONDS = 2.5
"""Seconds of a trial beside its training: its worker starts, and its record is written. Of the
digits study on 2 cores, 41 trials of 50 epochs at 2 a time, 86 s in all, 33 s are training."""

MEASURED_STEPS = 30
"""Steps whose time stands for an epoch: a fraction of a second for the networks of the paper."""


def describe_study(config: StudyConfig, console: Console) -> int:
    """Print the planned trials, and their estimated time and storage; return 0.

    A Ray cluster that the options name, or that runs here, is neither asked nor started: the time
    is that of this machine.
    """
    address = find_address(config.address)

    def count_this_machine() -> Cluster:
        machine = this_machine("This machine")
        console.print(f"{machine}.", highlight=False)
        if address in (None, "local"):
            check_cluster(config, machine)
        else:
            console.print(
                f"The Ray cluster at {address} was not asked: the time is that of this machine.",
                markup=False,
                highlight=False,
            )
        return machine

    _print_plan(prepare_study(config, count_this_machine, load_source, console), console)
    return 0


def _print_plan(study: Study, console: Console) -> None:
    plan = study.plan
    activation = plan.training.activation
    other_activation = "" if activation == TrainingConfig.activation else f", {activation}"
    console.print(f"Store     {study.folder}", markup=False, highlight=False)
    for key, info in plan.datasets.items():
        console.print(
            f"Data set  {key}: {info.sample_count:,} + {info.test_count:,} samples, "
            f"{len(info.class_names)} classes, network of {info.parameter_count:,} parameters"
            f"{other_activation}",
            highlight=False,
        )
    for strategy, seeds in plan.grid.items():
        words = ", ".join(map(str, seeds))
        console.print(f"Trials    {strategy:<16} seeds {words}", highlight=False)
    console.print(
        f"          {len(study.trials)} in all, {len(study.missing)} of them missing",
        highlight=False,
    )
    with console.status("Measuring an epoch"):
        epochs = measure_epochs(study)
    alone = " on one worker" if study.config.workers_per_trial > 1 else ""
    for key, seconds in epochs.items():
        console.print(f"Epoch     {key}: about {seconds:.2g} s{alone}", highlight=False)
    duration = format_duration(total_seconds(study, epochs) / study.slots)
    console.print(
        f"Time      about {duration}, {format_count(study.slots, 'trials')} at a time",
        highlight=False,
    )
    if study.config.influence:
        targets = ", ".join(study.config.influence)
        console.print(
            f"Influence {targets} of {REFERENCE_STRATEGY}, seed {REFERENCE_SEED}, in addition "
            "(its time: sampimp influence OUT --dry-run, after the study)",
            markup=False,
            highlight=False,
        )
    if study.config.subsets:
        sizes = ", ".join(f"{size:g}" for size in study.config.subsets)
        console.print(
            f"Subsets   of {sizes} of the samples, in addition (their time: sampimp subset OUT "
            "--dry-run, after the study)",
            markup=False,
            highlight=False,
        )
    console.print(f"Storage   at most {format_bytes(study.bytes_needed)}", highlight=False)


def announce_time(study: Study, console: Console) -> float:
    """Print how long the study trains on this machine alone; return the seconds.

    If it is long, the line says how to send the study to a cluster.
    """
    with console.status("Measuring an epoch"):
        seconds = total_seconds(study, measure_epochs(study)) / study.slots
    at_once = min(study.slots, len(study.missing))
    about = f"about {format_duration(seconds)}" if seconds > 30 else "less than a minute"
    missing, planned = len(study.missing), len(study.trials)
    trials = ("" if missing == planned else f"{missing} of ") + format_count(planned, "trials")
    text = f"This trains on this machine, for {about}: {trials}, {at_once} at a time."
    if seconds > LONG_STUDY:
        text += (
            " To send it to a cluster: ray up cluster.yaml, then this command with "
            "--cluster cluster.yaml and --out s3://BUCKET/NAME (docs/clusters.md)."
        )
    console.print(text, highlight=False)
    return seconds


def measure_epochs(study: Study) -> dict[str, float]:
    """Return the seconds of one epoch on each data set that trials are missing for."""
    keys = {trial.config.dataset for trial in study.missing}
    return {
        key: measure_epoch(study.plan, key, source)
        for key, source in study.sources.items()
        if key in keys
    }


def total_seconds(study: Study, epochs: Mapping[str, float]) -> float:
    """Return the time of all missing trials, one after the other, by the seconds of an epoch."""
    seconds = sum(epochs.get(trial.config.dataset, 0) for trial in study.missing)
    return study.plan.training.epochs * seconds + TRIAL_SECONDS * len(study.missing)


def measure_epoch(plan: Plan, key: str, source: Source) -> float:
    """Return the seconds of one epoch, from a short run on the first samples of a data set."""
    info, training = plan.datasets[key], replace(plan.training, epochs=2, parameters_every=0)
    count = min(info.sample_count, MEASURED_STEPS * training.batch_size)
    part = replace(
        source,
        train_values=source.train_values[:count],
        train_labels=source.train_labels[:count],
        test_values=source.train_values[:count],
        test_labels=source.train_labels[:count],
    )
    trial = TrialConfig(dataset=key, strategy="shuffle", seed=0, order_seed=0, training=training)
    schedule = make_schedule("shuffle", count, training.batch_size, 0)
    threads = torch.get_num_threads()
    records = list(TrainingRun(trial, scale_inputs(part, "unit"), schedule).records())
    torch.set_num_threads(threads)
    return records[-1].seconds * info.sample_count / count
