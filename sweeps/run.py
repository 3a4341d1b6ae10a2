"""The run of a study: train the missing trials, score snapshots, print the committed trials.

One call of Ray Tune's `fit` trains everything; `sampimp.sweeps.searcher` decides which trial is
next, and `sampimp.sweeps.trial` is a trial as Tune sees it. Tune's own state is discarded: the
store alone determines which trials are committed.

Map: `run_study`, `train`, `conclude`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError
from rich.console import Console

from sampimp.errors import ResourceError
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY
from sampimp.store.datasets import read_source, write_source
from sampimp.store.plan import PlannedTrial, read_commits
from sampimp.sweeps.cluster import check_shared, check_workers, connect
from sampimp.sweeps.estimate import suggest_cluster
from sampimp.sweeps.ingest import ingest
from sampimp.sweeps.machines import Cluster
from sampimp.sweeps.options import StudyConfig
from sampimp.sweeps.preflight import check_cluster, check_disk
from sampimp.sweeps.progress import Progress
from sampimp.sweeps.scoring import score_snapshots
from sampimp.sweeps.searcher import PlanSearcher
from sampimp.sweeps.study import Study, prepare_study
from sampimp.sweeps.trial import Trial


def run_study(config: StudyConfig, console: Console) -> int:
    """Train the trials of a study that its store lacks; return 0 if all are then committed, else 1.

    Raises
    ------
    UserError
        Something is wrong with the store, the machines, the data or the disk.
    """

    def connect_to_cluster() -> Cluster:
        with console.status("Looking for a Ray cluster"):
            cluster = connect(config.address)
        console.print(f"{cluster}.", markup=False, highlight=False)
        check_cluster(config, cluster)
        return cluster

    study = prepare_study(config, connect_to_cluster, ingest, console)
    _write_plan(study)
    trials = study.trials
    if study.missing:
        suggest_cluster(study, console)
        train(study, console)
        trials = study.plan.resolve(read_commits(study.folder))
    if config.snapshot_every:
        score_snapshots(
            str(study.folder),
            config.snapshot_every,
            console,
            model=config.model,
            cpus=config.cpus_per_trial,
            gpus=config.gpus_per_trial,
        )
    return conclude(trials, console)


def _write_plan(study: Study) -> None:
    """Write the plan and the data sets, once the folder and the disk are checked."""
    study.folder.check_writable()
    check_disk(study.folder, study.bytes_needed)
    study.folder.write_json("study.json", study.plan.to_json())
    for key, source in study.sources.items():
        dataset = study.folder / "datasets" / f"{key}.zarr"
        if read_source(dataset) is None:
            write_source(dataset, source)


def train(study: Study, console: Console) -> None:
    """Train the trials that the store lacks, in one `fit`.

    Raises
    ------
    StoreError
        A node of the cluster cannot use the store.
    ResourceError
        Trials that ran at the same time needed more memory than the machine has.
    """
    if study.folder.is_local:
        check_shared(Path(str(study.folder)) / "study.json")
    else:
        check_workers(study.folder)
    searcher = PlanSearcher(study.plan, study.folder, study.trials)
    epochs = study.plan.training.epochs
    with (
        tempfile.TemporaryDirectory(prefix="sampimp-tune-") as scratch,
        Progress(study.trials, epochs, study.slots, searcher.failed, console) as progress,
    ):
        tuner = _make_tuner(study, searcher, progress, scratch)
        try:
            tuner.fit()
        except RuntimeError as error:  # Tune counts every other death as a trial's failure
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            raise ResourceError(
                expected=f"memory for the trials that run at a time, {study.slots}",
                got=str(error.__cause__).split("\n")[0],
                where=str(study.cluster),
                todo="run fewer at a time (--max-concurrent), or on machines with more memory; "
                "nothing is lost, the same command continues",
            ) from None
    if searcher.superseded_by:
        console.print(
            f"[bold]{searcher.superseded_by} was begun by another run of this study[/], which "
            "trains all remaining trials; this run stops."
        )


def _make_tuner(
    study: Study, searcher: PlanSearcher, progress: Progress, scratch: str
) -> tune.Tuner:
    """Return a tuner whose state lies in a folder that is deleted afterwards."""
    config = study.config
    trainable = tune.with_parameters(
        Trial,
        out=str(study.folder),
        plan=study.plan.to_json(),
        sources={key: ray.put(source) for key, source in study.sources.items()},
    )
    worker = {"CPU": float(config.cpus_per_trial), "GPU": config.gpus_per_trial}
    resources = tune.PlacementGroupFactory([worker] * config.workers_per_trial)
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,  # until the searcher returns FINISHED
            # All trials that wait, not only those that have room: the autoscaler starts machines
            # for trials that wait, and a machine that joins later takes some of them.
            max_concurrent_trials=config.max_concurrent or len(study.missing),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="study",
            storage_path=scratch,
            callbacks=[progress],
            # Tune does not restart a trial whose machine fails before the trial's first report,
            # and counts a machine's failure as the trial's own: the searcher restarts trials.
            failure_config=tune.FailureConfig(max_failures=0),
            # A trial writes its checkpoints into the study's store; Tune keeps none.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
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
