"""What a study is, and how it runs: check, plan, train what is missing, score, say what came of it.

    configuration -> data sets (read and checked) -> plan, joined with the one in the store
    -> trials that the store lacks -> Ray Tune -> the store again -> exit code

Every start goes this way, the first as the tenth: it is the store that says what is left to do.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import ray
import torch
import tyro
from ray import tune
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.markup import escape

from sampimp.config import TrainingConfig, TrialConfig, check_choice
from sampimp.data import Source, dataset_key, scale_inputs
from sampimp.errors import ConfigError, ResourceError, StoreError, UnsupportedError
from sampimp.importance.recorder import forward_layers
from sampimp.schema import (
    REFERENCE_SEED,
    REFERENCE_STRATEGY,
    REFERENCES,
    SORTED_STRATEGIES,
    STRATEGIES,
    digest_json,
)
from sampimp.store.datasets import chunk_table, read_source, write_source
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, Plan, PlannedTrial, read_commits, read_plan
from sampimp.sweeps.cluster import Cluster, check_shared, connect
from sampimp.sweeps.ingest import ingest
from sampimp.sweeps.progress import Progress
from sampimp.sweeps.scoring import score_snapshots
from sampimp.sweeps.searcher import PlanSearcher
from sampimp.sweeps.trial import Trial
from sampimp.training.identity import identify_network
from sampimp.training.loop import TrainingRun
from sampimp.training.models import build_model, parameter_layers
from sampimp.training.strategies import make_schedule

LONG = 3600.0
"""Seconds from which a study on one machine is told of the cluster (arbitrary)."""

_Derived = Annotated[Any, tyro.conf.Suppress]


@dataclass(frozen=True, kw_only=True)
class StudyConfig(TrainingConfig):
    """Train the paper's study, or one's own, and report what came of it.

    The same command again continues what is missing; more seeds, strategies or data sets are added.
    """

    preset: Literal["paper", "digits"] = "paper"
    """Defaults of all other options: the paper's study, or the same on scikit-learn's digits."""
    datasets: tuple[str, ...] = ("mnist", "cifar10")
    """mnist, cifar10, digits, folder:PATH (train/ and test/ of class folders) or npz:PATH."""
    strategies: tuple[str, ...] = (*REFERENCES, *STRATEGIES)
    """The reference runs shuffle and shuffle_by_seed, and the paper's seven."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Initialisations of each of the seven strategies."""
    reference_seeds: tuple[int, ...] = (1, 2, 3)
    """Initialisations of each set of reference runs; the strategies sort by seed 1 of shuffle."""
    order_seed: int = 0
    """Seed of the order of the batches."""
    rand_batches: Literal["shared", "by_seed"] = "shared"
    """One draw of rand's batches for all its runs, or one each."""
    out: str = "results/paper"
    """Folder or s3:// URL of the study."""
    data_dir: str | None = None
    """Where MNIST and CIFAR-10 lie; else SAMPIMP_DATA, else they are fetched."""
    address: str | None = None
    """Ray cluster; else RAY_ADDRESS, else that of `ray start` here, else one is started."""
    cluster: str | None = None
    """Run as a job on the cluster that `ray up` made of this YAML file, or attach to that job."""
    cpus_per_trial: int = 1
    """CPU threads of a trial; of each of its workers, where it has several."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial, or of each of its workers; a fraction puts several trials on one."""
    workers_per_trial: int = 1
    """Workers that share each batch of a trial; each takes the CPUs and GPUs given above."""
    max_concurrent: int | None = None
    """Most trials at a time; by default as many as the cluster has CPUs and GPUs for."""
    snapshot_every: int = 0
    """Also score every sample at the fixed parameters of every so many epochs; 0 for never."""
    dry_run: bool = False
    """Print the plan with the time and storage it takes, and train nothing."""
    threads: _Derived = 1
    device: _Derived = "cpu"
    workers: _Derived = 1

    def __post_init__(self) -> None:
        """Raise ConfigError for a contradiction, before anything is read."""
        super().__post_init__()
        for name in ("datasets", "strategies", "seeds", "reference_seeds"):
            values = getattr(self, name)
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice or not values:
                raise ConfigError(
                    expected=f"one or more {name.replace('_', ' ')}, each once",
                    got=f"{', '.join(twice)} given twice" if twice else "none",
                    where=f"option --{name.replace('_', '-')}",
                    todo="name each of them once",
                )
        for dataset in self.datasets:
            dataset_key(dataset)
        for strategy in self.strategies:
            check_choice(strategy, (*REFERENCES, *STRATEGIES), "strategy")
        if self.cpus_per_trial < 1 or self.gpus_per_trial < 0:
            raise ConfigError(
                expected="at least 1 CPU and 0 GPUs a trial",
                got=f"{self.cpus_per_trial} and {self.gpus_per_trial}",
                where="options --cpus-per-trial and --gpus-per-trial",
                todo="change the value",
            )
        if self.workers_per_trial < 1 or (self.workers_per_trial > 1 and self.gpus_per_trial % 1):
            raise ConfigError(
                expected="at least 1 worker a trial, and whole GPUs for each of several",
                got=f"{self.workers_per_trial} workers with {self.gpus_per_trial:g} GPUs each",
                where="options --workers-per-trial and --gpus-per-trial",
                todo="NCCL puts no two workers on one GPU: give each one of its own, or train with "
                "one worker",
            )
        if self.snapshot_every and self.optimizer in ("adam", "adamw"):
            raise ConfigError(
                expected="SGD, whose rate alone makes a gradient an update",
                got=f"--optimizer {self.optimizer}",
                where="option --snapshot-every",
                todo="leave it out: in-step importance, which knows the optimizer's state, is "
                "recorded in any case",
            )
        if self.snapshot_every and (
            not self.parameters_every
            or self.snapshot_every % self.parameters_every
            or not 0 < self.snapshot_every <= self.epochs
        ):
            raise ConfigError(
                expected="--snapshot-every to be a multiple of --parameters-every up to --epochs",
                got=f"{self.snapshot_every}, {self.parameters_every} and {self.epochs}",
                where="options --snapshot-every, --parameters-every and --epochs",
                todo="snapshots are scored at stored parameters: store those epochs",
            )

    def training(self) -> TrainingConfig:
        """Return the part that decides each trial's numbers."""
        values = {field.name: getattr(self, field.name) for field in fields(TrainingConfig)}
        values |= {
            "threads": self.cpus_per_trial,
            "workers": self.workers_per_trial,
            "device": "cuda" if self.gpus_per_trial else "cpu",
        }
        return TrainingConfig(**values)

    def grid(self) -> dict[str, tuple[int, ...]]:
        """Return the seeds of each strategy; the run that others sort by is always there."""
        grid = {
            strategy: self.reference_seeds if strategy in REFERENCES else self.seeds
            for strategy in (*REFERENCES, *STRATEGIES)
            if strategy in self.strategies
        }
        if set(grid) & set(SORTED_STRATEGIES):
            seeds = {REFERENCE_SEED, *grid.get(REFERENCE_STRATEGY, ())}
            grid = {REFERENCE_STRATEGY: tuple(sorted(seeds)), **grid}
            grid[REFERENCE_STRATEGY] = tuple(sorted(seeds))
        return grid


PRESETS = {
    "paper": StudyConfig(),
    "digits": StudyConfig(
        preset="digits",
        datasets=("digits",),
        hidden=(128, 128, 128),
        batch_size=50,
        out="results/digits",
    ),
}


class _Options(StudyConfig):
    # tyro catches the ValueError of a class that it makes, prints what was expected and drops the
    # rest; so it makes this one, and `parse` the one that checks.
    __doc__ = StudyConfig.__doc__

    def __post_init__(self) -> None:
        pass


def parse(arguments: list[str]) -> StudyConfig:
    """Return the configuration of a command line, on top of the preset it names."""
    preset = "paper"
    for position, argument in enumerate(arguments):
        if argument == "--preset":
            preset = (arguments[position + 1 :] or [""])[0]
        elif argument.startswith("--preset="):
            preset = argument.partition("=")[2]
    default = PRESETS[check_choice(preset, tuple(PRESETS), "preset")]
    options = tyro.cli(
        tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(_Options),
        args=arguments,
        default=_Options(**vars(default)),
        prog="full_study.py",
    )
    return StudyConfig(**vars(options))


def run(config: StudyConfig, console: Console) -> int:
    """Run a study to its end, or print its plan. Return the exit code."""
    folder = Folder.of(config.out)
    existing = check_out(folder)
    with console.status("Looking for a Ray cluster"):
        cluster = connect(config.address)
    console.print(f"{cluster}.")
    check_cluster(config, cluster)
    sources = read_sources(config, folder, console)
    plan = make_plan(config, sources)
    if existing is not None:
        plan = existing.joined(plan, str(folder))
    for key in sources.keys() - (existing.datasets.keys() if existing else set()):
        say_batches(plan, key, console)
    if config.dry_run:
        describe_plan(config, plan, folder, sources, cluster, console)
        return 0
    folder.check_writable()
    missing = [trial for trial in plan.resolve(read_commits(folder)) if trial.commit is None]
    check_disk(folder, sum(trial_bytes(plan, trial.config) for trial in missing))
    folder.write_json("study.json", plan.to_json())
    for key, source in sources.items():
        if read_source(folder / "datasets" / f"{key}.zarr") is None:
            write_source(folder / "datasets" / f"{key}.zarr", source)
    if missing:
        say_cluster(config, plan, missing, sources, cluster, console)
        train(config, plan, folder, sources, cluster, console)
    if config.snapshot_every:
        score_snapshots(
            str(folder),
            config.snapshot_every,
            console,
            model=config.model,
            cpus=config.cpus_per_trial,
            gpus=config.gpus_per_trial,
        )
    trials = plan.resolve(read_commits(folder))
    return conclude(trials, console)


def check_out(folder: Folder) -> Plan | None:
    """Return the plan that is already there; raise StoreError where none can be put."""
    if folder.is_local and Path(str(folder)).exists() and not Path(str(folder)).is_dir():
        raise StoreError(
            expected="a folder",
            got="a file",
            where=str(folder),
            todo="choose another --out",
        )
    folder.check_reachable()
    plan = read_plan(folder) if not folder.is_empty() else None
    if plan is None and not folder.is_empty():
        raise StoreError(
            expected="an empty folder, or a study with its study.json",
            got="a folder that holds something else",
            where=str(folder),
            todo="choose another --out; nothing there was touched",
        )
    return plan


def check_cluster(config: StudyConfig, cluster: Cluster) -> None:
    """Raise ResourceError if the cluster, now or to come, has no room for a trial."""
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
    workers = config.workers_per_trial
    grows = not cluster.started_here and config.max_concurrent
    if cluster.room(cpus, gpus) < workers and not grows:
        raise ResourceError(
            expected=f"a node with {cpus} CPUs"
            + (f" and {gpus:g} GPU" if gpus else "")
            + (f", {workers} times a trial" if workers > 1 else " a trial"),
            got=f"{cluster.room(cpus, gpus)} times" if workers > 1 else "none",
            where=str(cluster),
            todo="lower --cpus-per-trial, leave --gpus-per-trial out to train on CPUs, or give a "
            "cluster that has them; if this one grows when trials wait, say how far: "
            "--max-concurrent",
        )


def check_workers(folder: Folder) -> None:
    """Raise StoreError unless every node of the cluster can use the bucket, as this process can.

    A worker has the environment that its node's Ray was started with, and the node's ~/.aws.
    """
    check = ray.remote(num_cpus=0)(Folder.check_writable)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    try:
        ray.get(
            [
                check.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ).remote(folder)
                for node in nodes
            ]
        )
    except RayTaskError as error:
        if not isinstance(error.cause, StoreError):
            raise
        raise StoreError(
            expected=f"{error.cause.expected}, on every node of the cluster",
            got=error.cause.got,
            where=f"{error.cause.where}, asked from a worker",
            todo=f"{error.cause.todo}; on each node, before its Ray is started",
        ) from None


def read_sources(config: StudyConfig, folder: Folder, console: Console) -> dict[str, Source]:
    """Return the data sets by key: from the store if it has them, else from where they lie."""
    sources: dict[str, Source] = {}
    for name in config.datasets:
        key = dataset_key(name)
        if key in sources:
            raise ConfigError(
                expected="data sets with names of their own",
                got=f"two called {key}",
                where="option --datasets",
                todo="rename one of the folders or files",
            )
        with console.status(f"Reading {escape(name)}"):
            source = read_source(folder / "datasets" / f"{key}.zarr")
            sources[key] = source or ingest(name, config.data_dir)
    return sources


def make_plan(config: StudyConfig, sources: Mapping[str, Source]) -> Plan:
    """Return the plan of a configuration."""
    infos = {}
    for key, source in sources.items():
        shape = source.train_values.shape[1:]
        classes = len(source.class_names)
        network = build_model(config.model, shape, config.hidden, classes, seed=0)
        samples = torch.from_numpy(source.train_values[:4] / np.float32(source.full_scale))
        identity = identify_network(config.model, network, samples) if ":" in config.model else None
        try:
            order = forward_layers(network, torch.zeros(2, *shape))
        except UnsupportedError as error:
            if "BatchNorm" not in error.got:
                raise
            raise UnsupportedError(
                expected=error.expected,
                got=error.got,
                where=f"option --model {config.model}, {error.where}",
                todo="replace it (GroupNorm, LayerNorm), or freeze it with the statistics that it "
                "has: call its .eval() in the function that makes the model",
            ) from None
        infos[key] = DatasetInfo(
            name=source.name,
            digest=source.digest,
            sample_count=len(source.train_labels),
            test_count=len(source.test_labels),
            input_shape=shape,
            class_names=source.class_names,
            layers=tuple(parameter_layers(network)),
            forward_order=order,
            chunks=digest_json(chunk_table(source)),
            network=identity,
        )
    return Plan(
        datasets=infos,
        training=config.training(),
        grid=config.grid(),
        order_seed=config.order_seed,
        rand_batches=config.rand_batches,
    )


def say_batches(plan: Plan, key: str, console: Console) -> None:
    """Say what becomes of the remainder where the batch size does not divide the samples."""
    count, size = plan.datasets[key].sample_count, plan.training.batch_size
    if count % size:
        batches = -(-count // size)
        console.print(
            f"{key}: {count:,} samples are no multiple of {size}, so there are {batches} batches "
            f"of {count // batches} or {-(-count // batches)} samples, each sample in one of them."
        )


def train(
    config: StudyConfig,
    plan: Plan,
    folder: Folder,
    sources: Mapping[str, Source],
    cluster: Cluster,
    console: Console,
) -> None:
    """Train the trials that the store lacks, in one `fit`."""
    if folder.is_local:
        check_shared(Path(str(folder)) / "study.json")
    else:
        check_workers(folder)
    trials = plan.resolve(read_commits(folder))
    missing = sum(trial.commit is None for trial in trials)
    slots = concurrent_trials(config, cluster)
    searcher = PlanSearcher(plan, folder, trials)
    trainable = tune.with_parameters(
        Trial,
        out=str(folder),
        plan=plan.to_json(),
        sources={key: ray.put(source) for key, source in sources.items()},
    )
    worker = {"CPU": float(config.cpus_per_trial), "GPU": config.gpus_per_trial}
    resources = tune.PlacementGroupFactory([worker] * config.workers_per_trial)
    with (
        tempfile.TemporaryDirectory(prefix="sampimp-tune-") as scratch,
        Progress(trials, plan.training.epochs, slots, searcher.failed, console) as progress,
    ):
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # until the searcher says that it is done
                # All that wait, not those that have room: it is what the autoscaler sees, and what
                # a machine that joins later takes over.
                max_concurrent_trials=config.max_concurrent or missing,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                callbacks=[progress],
                # Tune does not start a trial again whose machine goes before it reports, and
                # counts machines that go as failures of the trial: the searcher does it instead.
                failure_config=tune.FailureConfig(max_failures=0),
                # A trial checkpoints into the study's store; Tune is to keep nothing.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except RuntimeError as error:  # Tune takes every death but this one for a death
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            raise ResourceError(
                expected=f"memory for as many trials as run at a time, {slots}",
                got=str(error.__cause__).split("\n")[0],
                where=str(cluster),
                todo="run fewer at a time (--max-concurrent), or on machines with more memory; "
                "nothing is lost, the same command goes on",
            ) from None
    if searcher.superseded_by:
        console.print(
            f"[bold]{searcher.superseded_by} was begun by another run of this study[/], which has "
            "all that is left; this one stops."
        )


def concurrent_trials(config: StudyConfig, cluster: Cluster) -> int:
    """Return how many trials run at a time once all machines have come."""
    room = cluster.room(config.cpus_per_trial, config.gpus_per_trial)
    slots = room // config.workers_per_trial
    return min(slots, config.max_concurrent or slots) or config.max_concurrent or 1


def conclude(trials: list[PlannedTrial], console: Console) -> int:
    """Say what the store holds now, and return 0 if nothing is missing."""
    committed = [trial for trial in trials if trial.commit is not None]
    diverged = [
        f"{trial.label} (epoch {trial.commit['diverged_epoch']})"
        for trial in committed
        if trial.commit and trial.commit["diverged_epoch"] is not None
    ]
    missing = [trial for trial in trials if trial.commit is None]
    blocked = [trial.label for trial in missing if trial.trial_id is None]
    failed = [trial.label for trial in missing if trial.trial_id is not None]
    console.print(f"{len(committed)} of {len(trials)} trials are committed.")
    if diverged:
        console.print(f"{len(diverged)} diverged: {', '.join(diverged)}.")
    if failed:
        console.print(f"[bold]{len(failed)} are missing[/]: {', '.join(failed)}.")
        console.print("status.py says why; the same command again retries them.")
    if blocked:
        console.print(f"[bold]{len(blocked)} are blocked[/]: {', '.join(blocked)}.")
        console.print(
            f"They sort by {REFERENCE_STRATEGY}, seed {REFERENCE_SEED}, which did not finish, or "
            "diverged: then a lower --learning-rate into another --out is the way on."
        )
    return 1 if missing else 0


def trial_bytes(plan: Plan, trial: TrialConfig) -> int:
    """Return the most that a trial's record and checkpoints take in the store."""
    info, training = plan.datasets[trial.dataset], plan.training
    per_epoch = 4 * info.sample_count * (len(info.layer_names) + 2)
    parameters = 4 * info.parameter_count
    return training.epochs * per_epoch + (len(training.stored_states()) + 3) * parameters


def check_disk(folder: Folder, needed: int) -> None:
    """Raise ResourceError if a local disk has not the room for the plan."""
    if not folder.is_local:
        return
    free = shutil.disk_usage(str(folder)).free
    if free < needed:
        raise ResourceError(
            expected=f"{needed / 1e9:.1f} GB free for the trials that are missing",
            got=f"{free / 1e9:.1f} GB",
            where=str(folder),
            todo="free some, choose another --out, or store fewer --parameters-every",
        )


def describe_plan(
    config: StudyConfig,
    plan: Plan,
    folder: Folder,
    sources: Mapping[str, Source],
    cluster: Cluster,
    console: Console,
) -> None:
    """Print what would be trained, how long it would take and what it would store."""
    trials = plan.resolve(read_commits(folder))
    missing = [trial for trial in trials if trial.commit is None]
    console.print(f"Store     {folder}", markup=False)
    for key, info in plan.datasets.items():
        console.print(
            f"Data set  {key}: {info.sample_count:,} + {info.test_count:,} samples, "
            f"{len(info.class_names)} classes, network of {info.parameter_count:,} parameters"
        )
    for strategy, seeds in plan.grid.items():
        console.print(f"Trials    {strategy:<16} seeds {', '.join(map(str, seeds))}")
    console.print(f"          {len(trials)} in all, {len(missing)} of them missing")
    with console.status("Measuring an epoch"):
        epochs = measure_epochs(plan, missing, sources)
    alone = " on one worker" if config.workers_per_trial > 1 else ""
    for key, seconds in epochs.items():
        console.print(f"Epoch     {key}: about {seconds:.2g} s{alone}")
    slots = concurrent_trials(config, cluster)
    seconds = total_seconds(plan, missing, epochs) / slots
    storage = sum(trial_bytes(plan, trial.config) for trial in missing)
    console.print(f"Time      about {format_duration(seconds)}, {slots} trials at a time")
    console.print(f"Storage   at most {storage / 1e9:.2f} GB")


def say_cluster(
    config: StudyConfig,
    plan: Plan,
    missing: Sequence[PlannedTrial],
    sources: Mapping[str, Source],
    cluster: Cluster,
    console: Console,
) -> None:
    """Say, where a long study would train on this machine alone, how a cluster takes it."""
    if not cluster.started_here:
        return
    seconds = total_seconds(plan, missing, measure_epochs(plan, missing, sources))
    seconds /= concurrent_trials(config, cluster)
    if seconds > LONG:
        console.print(
            f"This trains on this machine, for about {format_duration(seconds)}. To send it to a "
            "cluster: ray up cluster.yaml, then this command with --cluster cluster.yaml and "
            "--out s3://BUCKET/NAME (docs/clusters.md)."
        )


def measure_epochs(
    plan: Plan, missing: Sequence[PlannedTrial], sources: Mapping[str, Source]
) -> dict[str, float]:
    """Return the seconds of one epoch on each data set that trials are missing for."""
    keys = {trial.config.dataset for trial in missing}
    return {key: measure_epoch(plan, key, sources[key]) for key in sources if key in keys}


def total_seconds(
    plan: Plan, missing: Sequence[PlannedTrial], epochs: Mapping[str, float]
) -> float:
    """Return the time of all missing trials, one after the other."""
    return plan.training.epochs * sum(epochs.get(trial.config.dataset, 0) for trial in missing)


def measure_epoch(plan: Plan, key: str, source: Source, steps: int = 30) -> float:
    """Return the seconds of one epoch, by a short run on the first samples of a data set."""
    info, training = plan.datasets[key], replace(plan.training, epochs=2, parameters_every=0)
    count = min(info.sample_count, steps * training.batch_size)
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


def format_duration(seconds: float) -> str:
    """Return a duration as a person says it.

    Examples
    --------
    >>> format_duration(42), format_duration(3723)
    ('42 s', '1 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
