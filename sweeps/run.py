"""The run of a study: train the missing trials, score snapshots, add what is derived, conclude.

One call of Ray Tune's `fit` trains everything (`sampimp.sweeps.tuning`). A study that starts a Ray
of its own reads its data sets, and prints how long it trains, before it imports and starts Ray.

Map: `run_study`, `join_cluster`, `train`, `add_influence`, `add_subsets`, `conclude`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console

from sampimp.data import Source, load_source, scale_inputs
from sampimp.errors import UserError
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY
from sampimp.store.datasets import store_source
from sampimp.store.plan import PlannedTrial, read_commits
from sampimp.store.plan_files import store_plan
from sampimp.sweeps.derived_run import run_on_cluster
from sampimp.sweeps.derived_study import DerivedStudy
from sampimp.sweeps.estimate import announce_time
from sampimp.sweeps.first_report import FirstReport
from sampimp.sweeps.influence_study import InfluenceRequest, prepare_influence
from sampimp.sweeps.influence_units import list_targets
from sampimp.sweeps.machines import Cluster, find_address, this_machine
from sampimp.sweeps.options import StudyConfig
from sampimp.sweeps.preflight import check_cluster, check_disk
from sampimp.sweeps.study import Study, prepare_study
from sampimp.sweeps.subset_study import (
    SubsetRequest,
    check_shares,
    check_sizes,
    prepare_subsets,
)
from sampimp.sweeps.work import Unit, training_units


def run_study(config: StudyConfig, console: Console) -> int:
    """Train the trials of a study that its store lacks; return 0 if all are then committed, else 1.

    Raises
    ------
    UserError
        Something is wrong with the store, the machines, the data or the disk.
    """

    def connect_to_cluster() -> Cluster:
        with console.status("Looking for a Ray cluster"):
            cluster = join_cluster(config.address)
        console.print(f"{cluster}.", markup=False, highlight=False)
        check_cluster(config, cluster)
        return cluster

    starts_ray = find_address(config.address) == "local"
    if starts_ray:
        study = prepare_study(config, lambda: this_machine("This machine"), load_source, console)
    else:
        study = prepare_study(config, connect_to_cluster, _ingest, console)
    check_influence(study)
    check_subsets(study)
    # Without room for a trial here, what cannot be measured is an error of the cluster below.
    has_room = study.cluster.room(config.cpus_per_trial, config.gpus_per_trial) > 0
    is_measured = starts_ray and has_room and bool(study.missing)
    seconds = announce_time(study, console) if is_measured else None
    if starts_ray and (study.missing or config.snapshot_every):
        study = replace(study, cluster=connect_to_cluster())
    study = write_plan(study, console)
    trials = study.trials
    if study.missing:
        train(study, console, seconds)
        trials = study.plan.resolve(read_commits(study.folder))
    if config.snapshot_every:
        from sampimp.sweeps.scoring import score_snapshots  # as in `join_cluster`

        score_snapshots(
            str(study.folder),
            config.snapshot_every,
            console,
            model=config.model,
            cpus=config.cpus_per_trial,
            gpus=config.gpus_per_trial,
        )
    runs = reference_runs(study, trials)
    if config.influence and runs:
        add_influence(study, runs, console)
    if config.subsets and runs:
        add_subsets(study, runs, console)
    return conclude(trials, console)


def join_cluster(address: str | None) -> Cluster:
    """Connect to a cluster, as `sampimp.sweeps.cluster.connect`; Ray is imported then."""
    from sampimp.sweeps import cluster

    return cluster.connect(address)


def _ingest(name: str, data_dir: str | None, image_size: int | None) -> Source:
    """Read a data set on all machines of the cluster that this process is connected to."""
    from sampimp.sweeps.ingest import ingest  # as in `join_cluster`

    return ingest(name, data_dir, image_size)


def add_influence(study: Study, runs: tuple[str, ...], console: Console) -> None:
    """Compute influence on the targets of `--influence`."""
    request = InfluenceRequest(targets=study.config.influence, runs=runs, model=study.config.model)
    _add(study, "Influence is", lambda: prepare_influence(study.folder, request), console)


def add_subsets(study: Study, runs: tuple[str, ...], console: Console) -> None:
    """Train on subsets of the sizes of `--subsets`: the most important samples, and the baselines.

    Seeds 1 to 3; `sampimp subset` compares other rules.
    """
    request = SubsetRequest(
        rules=("tau-high",),
        sizes=study.config.subsets,
        seeds=(1, 2, 3),
        runs=runs,
        model=study.config.model,
        option="--subsets",
    )
    _add(study, "Subsets are", lambda: prepare_subsets(study.folder, request), console)


def reference_runs(study: Study, trials: Sequence[PlannedTrial]) -> tuple[str, ...]:
    """Return the runs that strategies sort by, of data sets that are at hand; not diverged ones."""
    return tuple(
        f"{trial.config.dataset}:{REFERENCE_STRATEGY}:{REFERENCE_SEED}"
        for trial in trials
        if study.plan.is_reference(trial.config)
        and trial.config.dataset in study.sources
        and trial.commit is not None
        and trial.commit["diverged_epoch"] is None
    )


def _add(study: Study, words: str, prepare: Callable[[], DerivedStudy], console: Console) -> None:
    """Perform units on runs of the study.

    A run that cannot be replayed, such as one of several workers, is no error of the study.
    """
    try:
        derived = prepare()
    except UserError as error:
        console.print(
            f"{words} left out: {error.summary} ({error.where}).", markup=False, highlight=False
        )
        return
    if any(unit.commit is None for unit in derived.units.resolve()):
        run_on_cluster(derived, study.config, console)


def check_influence(study: Study) -> None:
    """Raise ConfigError if a target of `--influence` does not exist, before anything is trained."""
    for key, source in study.sources.items() if study.config.influence else ():
        data = scale_inputs(source, study.plan.training.input_scaling)
        list_targets(study.config.influence, data, study.plan.datasets[key].layer_names)


def check_subsets(study: Study) -> None:
    """Raise ConfigError for a size of `--subsets` that cannot be, before anything is trained."""
    sizes = study.config.subsets
    for key, source in study.sources.items() if sizes else ():
        check_shares(sizes, "--subsets")
        check_sizes(sizes, study.plan.datasets[key].name, source.train_labels, "--subsets")


def write_plan(study: Study, console: Console) -> Study:
    """Store the plan and the data sets, once the folder and the disk are checked.

    Returns
    -------
    Study
        With the plan as it is stored: other drivers may have added to it since it was read.
    """
    study.folder.check_writable()
    check_disk(study.folder, study.bytes_needed)
    plan, set_aside = store_plan(study.folder, study.plan)
    for file in set_aside:
        console.print(
            f"{file} was damaged, and is in {study.folder}/withdrawn now.",
            markup=False,
            highlight=False,
        )
    for key, source in study.sources.items():
        store_source(study.folder, key, source)
    return replace(study, plan=plan, trials=plan.resolve(read_commits(study.folder)))


def train(study: Study, console: Console, seconds: float | None = None) -> None:
    """Train the trials that the store lacks, in one `fit`.

    Parameters
    ----------
    study, console
        The study, and where its progress is shown.
    seconds
        How long it takes by `announce_time`, if that was measured.

    Raises
    ------
    StoreError
        A node of the cluster cannot use the store.
    ResourceError
        Trials that ran at the same time needed more memory than the machine has.
    """
    from sampimp.sweeps.progress import Progress  # as in `join_cluster`
    from sampimp.sweeps.searcher import UnitSearcher
    from sampimp.sweeps.tuning import tune_units

    plan, folder, config = study.plan, study.folder, study.config

    def resolve() -> list[Unit]:
        return training_units(plan, plan.resolve(read_commits(folder)))

    searcher = UnitSearcher(folder, resolve)
    units = training_units(plan, study.trials)
    references = [trial.label for trial in study.trials if plan.is_reference(trial.config)]
    with FirstReport(folder, references, console) as first:
        tune_units(
            searcher,
            Progress(
                units,
                searcher.failed,
                searcher.committed,
                console,
                seconds=seconds,
                watch=first.look,
            ),
            folder=folder,
            plan=plan,
            sources=study.sources,
            worker={"CPU": float(config.cpus_per_trial), "GPU": config.gpus_per_trial},
            workers=config.workers_per_trial,
            cluster=study.cluster,
            slots=study.slots,
            at_once=config.max_concurrent or len(study.missing),
        )


def conclude(trials: Sequence[PlannedTrial], console: Console) -> int:
    """Print the state of the trials, and return 0 if no trial is missing, else 1."""
    committed = [trial for trial in trials if trial.commit is not None]
    diverged = [
        f"{trial.label} (epoch {trial.commit['diverged_epoch']})"
        for trial in committed
        if trial.commit and trial.commit["diverged_epoch"] is not None
    ]
    missing = [trial for trial in trials if trial.commit is None]
    blocked = [trial.label for trial in missing if trial.trial_id is None]
    untrained = [trial.label for trial in missing if trial.trial_id is not None]
    console.print(f"{len(committed)} of {len(trials)} trials are committed.", highlight=False)
    if diverged:
        console.print(f"{len(diverged)} diverged: {', '.join(diverged)}.", highlight=False)
    if untrained:
        console.print(
            f"[bold]{len(untrained)} are missing[/]: {', '.join(untrained)}.", highlight=False
        )
        console.print(
            "`sampimp status OUT` says why; the same command again retries them.", highlight=False
        )
    if blocked:
        console.print(
            f"[bold]{len(blocked)} are blocked[/]: {', '.join(blocked)}.", highlight=False
        )
        console.print(
            f"They sort by {REFERENCE_STRATEGY}, seed {REFERENCE_SEED}, which did not finish, or "
            "diverged: then use a lower --learning-rate and another --out.",
            highlight=False,
        )
    return 1 if missing else 0
