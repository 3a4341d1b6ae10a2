"""Options of a study: one dataclass, its presets, and its command line.

`StudyConfig` joins the options of training (`sampimp.config.TrainingConfig`) with three groups of
its own: which runs, which store, which machines. Its defaults are the paper's study (Gao & Jojic
2017, section 3.1). tyro makes the command line from the same groups, so that `--help` shows them.

Map: `StudyConfig`; `RunOptions`, `StorageOptions` and `MachineOptions`, its groups; `PRESETS`;
`parse`, from command-line arguments to a `StudyConfig`.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from sampimp.config import TrainingConfig, check_choice
from sampimp.data import dataset_key
from sampimp.errors import ConfigError
from sampimp.schema import (
    REFERENCE_SEED,
    REFERENCE_STRATEGY,
    REFERENCES,
    SORTED_STRATEGIES,
    STRATEGIES,
)


def unset_option(metavar: str) -> Any:
    """Show an option that has no value by default as `--option METAVAR`."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Which runs the study has: data sets x strategies x seeds."""

    preset: Literal["paper", "digits"] = "paper"
    """Defaults of all other options: the paper's study, or a small one on scikit-learn's digits."""
    datasets: tuple[str, ...] = ("mnist", "cifar10")
    """mnist, cifar10, digits, npz:PATH or folder:PATH (train/ and test/, a folder per class)."""
    strategies: tuple[str, ...] = (*REFERENCES, *STRATEGIES)
    """Batch strategies: the reference runs shuffle and shuffle_by_seed, and the paper's seven."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the initialisation of each of the seven strategies."""
    reference_seeds: tuple[int, ...] = (1, 2, 3)
    """The same for each kind of reference run; strategies sort by the record of shuffle, seed 1."""
    order_seed: int = 0
    """Seed of the order of the batches."""
    rand_batches: Literal["shared", "by_seed"] = "shared"
    """Whether all runs of rand share one random draw of the batches, or each has its own."""
    dry_run: bool = False
    """Print the plan with its time and storage, and train nothing."""


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """Where data come from and where results go."""

    out: str = "results/paper"
    """Folder or s3:// URL of the study."""
    data_dir: Annotated[str | None, unset_option("PATH")] = None
    """Folder with MNIST and CIFAR-10. Default: $SAMPIMP_DATA, else they are downloaded."""
    image_size: Annotated[int | None, unset_option("N")] = None
    """Resize the images of folder:PATH to N x N pixels. Default: they have one size already."""
    snapshot_every: int = 0
    """Also compute importance at the fixed parameters of every N-th epoch; 0 for never."""
    influence: tuple[str, ...] = ()
    """Also compute the influence on these targets of shuffle, seed 1 (sampimp influence)."""
    subsets: tuple[float, ...] = ()
    """Also train on subsets of these sizes, the most important samples (sampimp subset)."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Which machines train, and what a trial takes of them."""

    address: Annotated[str | None, unset_option("ADDRESS")] = None
    """Ray cluster, or local. Default: $RAY_ADDRESS, else one running here, else one is started."""
    cluster: Annotated[str | None, unset_option("YAML")] = None
    """Run as a job on the cluster that `ray up YAML` started, or attach to that job."""
    cpus_per_trial: int = 1
    """CPU threads of a trial, or of each of its workers."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial, or of each of its workers. With a fraction, several trials share a GPU."""
    workers_per_trial: int = 1
    """Processes that share each batch of a trial; each takes the CPUs and GPUs given above."""
    max_concurrent: Annotated[int | None, unset_option("INT")] = None
    """Largest number of trials at a time. Default: as many as the cluster has room for."""

    def check_resources(self) -> None:
        """Raise ConfigError for numbers of machines that cannot be."""
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ConfigError(
                expected="at least 1 at a time",
                got=str(self.max_concurrent),
                where="option --max-concurrent",
                todo="change the value, or leave it out: as many as there is room for",
            )
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
                todo="NCCL cannot put two workers on one GPU: give each worker its own GPU, or "
                "train with one worker",
            )


@dataclass(frozen=True, kw_only=True)
class StudyConfig(MachineOptions, StorageOptions, RunOptions, TrainingConfig):
    """All options of a study, checked against each other."""

    may_thin_states: bool = False
    """Whether a study may store fewer states than `parameters_every`, which is then the default and
    not the user's choice (`sampimp.sweeps.study.thin_states`)."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a contradiction, before anything is read."""
        super().__post_init__()
        self._check_runs()
        self.check_resources()
        if self.snapshot_every:
            self._check_snapshots()

    def _check_runs(self) -> None:
        for name in ("datasets", "strategies", "seeds", "reference_seeds"):
            values = getattr(self, name)
            repeated = sorted({str(value) for value in values if values.count(value) > 1})
            if repeated or not values:
                raise ConfigError(
                    expected=f"one or more {name.replace('_', ' ')}, each once",
                    got=f"{', '.join(repeated)} given twice" if repeated else "none",
                    where=f"option --{name.replace('_', '-')}",
                    todo="name each of them once",
                )
        for dataset in self.datasets:
            dataset_key(dataset)
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(
                expected="at least 1 pixel",
                got=str(self.image_size),
                where="option --image-size",
                todo="change the value",
            )
        for strategy in self.strategies:
            check_choice(strategy, (*REFERENCES, *STRATEGIES), "strategy")

    def _check_snapshots(self) -> None:
        if self.optimizer in ("adam", "adamw"):
            raise ConfigError(
                expected="SGD, where the learning rate alone turns a gradient into an update",
                got=f"--optimizer {self.optimizer}",
                where="option --snapshot-every",
                todo="leave it out: in-step importance, which includes the optimizer's state, is "
                "recorded in any case",
            )
        if (
            not self.parameters_every
            or self.snapshot_every % self.parameters_every
            or not 0 < self.snapshot_every <= self.epochs
        ):
            raise ConfigError(
                expected="--snapshot-every to be a multiple of --parameters-every up to --epochs",
                got=f"{self.snapshot_every}, {self.parameters_every} and {self.epochs}",
                where="options --snapshot-every, --parameters-every and --epochs",
                todo="snapshots are computed from stored parameters: store those of these epochs",
            )

    def training(self) -> TrainingConfig:
        """Return the part that decides the numbers of each trial."""
        values = _values(self, TrainingConfig) | {
            "threads": self.cpus_per_trial,
            "workers": self.workers_per_trial,
            "device": "cuda" if self.gpus_per_trial else "cpu",
        }
        return TrainingConfig(**values)

    def grid(self) -> dict[str, tuple[int, ...]]:
        """Return the seeds of each strategy.

        The reference run is added if the study has a strategy that sorts by its record.
        """
        grid = {
            strategy: self.reference_seeds if strategy in REFERENCES else self.seeds
            for strategy in (*REFERENCES, *STRATEGIES)
            if strategy in self.strategies
        }
        if set(grid) & set(SORTED_STRATEGIES):
            seeds = {REFERENCE_SEED, *grid.pop(REFERENCE_STRATEGY, ())}
            grid = {REFERENCE_STRATEGY: tuple(sorted(seeds)), **grid}
        return grid


PRESETS = {
    "paper": StudyConfig(),
    "digits": StudyConfig(
        preset="digits",
        datasets=("digits",),
        hidden=(128, 128, 128),
        batch_size=50,
        out="results/digits",
        influence=("mean", "probe:16"),
        subsets=(0.1, 0.2, 0.3),
    ),
}


@dataclass(frozen=True, kw_only=True)
class _TrainingOptions(TrainingConfig):
    # tyro catches the ValueError of a class that it constructs and prints only its first line. So
    # it constructs this class, and `parse` constructs the one that checks. The three fields follow
    # from the options of the machines.
    __doc__ = "How every network is trained."

    threads: tyro.conf.Suppress[int] = 1
    device: tyro.conf.Suppress[Literal["cpu", "cuda"]] = "cpu"
    workers: tyro.conf.Suppress[int] = 1

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _CommandLine:
    """The groups of `--help`; the names of the fields are their titles."""

    run: RunOptions
    training: _TrainingOptions
    storage: StorageOptions
    machine: MachineOptions


_HELP = """Train the paper's study, or one of your own, and write its report.

Run it again to train missing trials, or to add seeds and strategies.

Examples:
  {prog}                                  the paper's study
  {prog} --preset digits                  on 1,797 digits, in minutes
  {prog} --datasets mnist --dry-run       its plan, time and storage
  {prog} --datasets npz:data.npz --strategies rand nlo --out mine

Exit code:
  0  every trial is done or diverged     1  a trial is missing
  2  a mistake that you can correct      130  interrupted by Ctrl-C
                                         143  ended by SIGTERM"""


def parse(arguments: list[str], prog: str = "full_study.py") -> StudyConfig:
    """Return the configuration of a command line, on top of the preset that it names.

    Parameters
    ----------
    arguments
        The command line without the name of the program.
    prog
        The name of the program, for `--help`.

    Raises
    ------
    ConfigError
        An option's value is out of range, or contradicts another one.
    SystemExit
        With code 2 for an unknown or malformed option, and with code 0 after `--help`.
    """
    preset = "paper"
    for position, argument in enumerate(arguments):
        if argument == "--preset":
            preset = (arguments[position + 1 :] or [""])[0]
        elif argument.startswith("--preset="):
            preset = argument.partition("=")[2]
    default = PRESETS[check_choice(preset, tuple(PRESETS), "preset")]
    groups = tyro.cli(
        _CommandLine,
        args=arguments,
        default=_CommandLine(
            run=RunOptions(**_values(default, RunOptions)),
            training=_TrainingOptions(**_values(default, TrainingConfig)),
            storage=StorageOptions(**_values(default, StorageOptions)),
            machine=MachineOptions(**_values(default, MachineOptions)),
        ),
        prog=prog,
        description=_HELP.format(prog=prog),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    values: dict[str, Any] = {}
    for group in vars(groups).values():
        values |= vars(group)
    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    return StudyConfig(**values, may_thin_states="--parameters-every" not in names)


def _values(config: StudyConfig, group: type) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(group)}
