"""The plan of a study: data sets, grid of strategies and seeds, and the identity of each trial.

The plan is stored before training begins (`sampimp.store.plan_files`) and lists all trials of the
study. Only the commits in the store tell which of them are complete: `Plan.resolve` matches the
plan with the commits, and both the sweep and the cube use its result.

Map: `Plan`, `DatasetInfo` (a data set in a plan), `PlannedTrial` (a trial and its commit);
`read_commits` (reading the commits from the store).
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from sampimp.config import NetworkIdentity, TrainingConfig, TrialConfig
from sampimp.errors import ConfigError, RecordError
from sampimp.schema import (
    REFERENCE_SEED,
    REFERENCE_STRATEGY,
    SCHEMA_VERSION,
    SORTED_STRATEGIES,
    Layout,
    __version__,
)
from sampimp.store.commits import find_commit, read_commit, read_outcome
from sampimp.store.file_types import KEY, Count, check_plan_sizes
from sampimp.store.integrity import record_digest
from sampimp.store.json_types import require_type
from sampimp.store.location import Folder
from sampimp.store.variables import check_history


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the collection of cycles, which parsed JSON does not have.

    With 10,000 commits it is a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A data set in a plan."""

    LATER_ENTRIES: ClassVar = frozenset({"forward_order", "chunks", "network"})
    """Entries that plans of earlier versions lack."""

    name: str
    digest: str
    sample_count: Count
    test_count: Count
    input_shape: tuple[Count, ...]
    class_names: tuple[str, ...]
    layers: tuple[tuple[str, Count], ...]
    """Layer and size of every parameter tensor of the network, in the model's order."""
    forward_order: tuple[str, ...] = ()
    """Names of the layers in the order of their calls; empty: the order of registration."""
    chunks: str = ""
    """Digest of the digests of its chunks in the store; empty if it was stored without digests."""
    network: NetworkIdentity | None = None
    """Identity of a user's own network; None for other networks and in older studies."""

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, in forward order."""
        return self.forward_order or tuple(dict.fromkeys(name for name, _ in self.layers))

    @property
    def parameter_count(self) -> int:
        """Number of the network's parameters."""
        return sum(size for _, size in self.layers)


class PlannedTrial(NamedTuple):
    """A trial of the plan, with its commit."""

    config: TrialConfig
    trial_id: str | None
    """Name of its folder; None while the reference run that it sorts by is not committed."""
    fingerprint: str | None
    reference_id: str | None
    """Folder of the reference run whose record it sorts by; None if it sorts by none."""
    commit: Mapping[str, Any] | None

    @property
    def label(self) -> str:
        """Data set, strategy and seed; the folder's name without the fingerprint."""
        return f"{self.config.dataset}-{self.config.strategy}-seed{self.config.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The data sets, configuration and grid of a study."""

    datasets: Mapping[Annotated[str, KEY], DatasetInfo]
    """The data sets, by key."""
    training: TrainingConfig
    grid: Mapping[str, tuple[int, ...]]
    """The seeds of every strategy."""
    order_seed: int = 0
    """Seed of `shuffle`'s sequence of batches and of the batches of `rand`."""
    rand_batches: Literal["shared", "by_seed"] = "shared"
    """Whether the runs of `rand` share one draw of the batches."""
    code: str = __version__
    """Version of the package that trains the study."""

    def trials(self) -> list[TrialConfig]:
        """Return every trial; the reference runs that other trials wait for come first."""
        trials = [
            TrialConfig(
                dataset=key,
                strategy=strategy,
                seed=seed,
                order_seed=self.order_seed_of(strategy, seed),
                training=self.training,
            )
            for strategy, seeds in self.grid.items()
            for seed in seeds
            for key in self.datasets
        ]
        return sorted(trials, key=lambda trial: not self.is_reference(trial))

    def order_seed_of(self, strategy: str, seed: int) -> int:
        """Return the seed of a trial's batch order: the study's, or one for each seed.

        Examples
        --------
        >>> plan = Plan(datasets={}, training=TrainingConfig(), grid={})
        >>> plan.order_seed_of("shuffle", 3), plan.order_seed_of("shuffle_by_seed", 3)
        (0, 3)
        """
        by_seed = strategy == "shuffle_by_seed" or (
            strategy == "rand" and self.rand_batches == "by_seed"
        )
        return self.order_seed + seed if by_seed else self.order_seed

    def node(self, key: str) -> str:
        """Return the cube's node of a data set: mnist, or mnist/cnn for other networks.

        Examples
        --------
        >>> small = TrainingConfig(model="my.models:small")
        >>> configs = TrainingConfig(), small
        >>> [Plan(datasets={}, training=config, grid={}).node("mnist") for config in configs]
        ['mnist', 'mnist/small']
        """
        model = self.training.model.rpartition(":")[2]
        return key if model == TrainingConfig.model else f"{key}/{model}"

    def layout(self, key: str) -> Layout:
        """Return the shape of the records of a data set's trials."""
        info = self.datasets[key]
        return Layout(
            epoch=self.training.epochs,
            layer=len(info.layer_names),
            sample=info.sample_count,
            parameter=info.parameter_count,
            states=tuple(self.training.stored_states()),
        )

    @staticmethod
    def is_reference(trial: TrialConfig) -> bool:
        """Return whether the sorted strategies of the trial's data set sort by its results."""
        return (trial.strategy, trial.seed) == (REFERENCE_STRATEGY, REFERENCE_SEED)

    @_no_collection()
    def resolve(
        self, commits: Mapping[str, Mapping[str, Any]], refuse: "Refuse | None" = None
    ) -> list[PlannedTrial]:
        """Match the plan with the committed trials.

        Parameters
        ----------
        commits
            As `read_commits` returns them: COMMIT.json by trial_id.
        refuse
            As for `read_commits`.

        Raises
        ------
        RecordError
            A commit has another fingerprint than the plan, or does not fit the record's shape.
        """
        references: dict[str, tuple[str, str]] = {}  # data set: trial_id, digest of the record
        resolved = []
        for trial in self.trials():  # references come first
            info = self.datasets[trial.dataset]
            reference_id = reference_digest = None
            if trial.strategy in SORTED_STRATEGIES:
                if trial.dataset not in references:
                    resolved.append(PlannedTrial(trial, None, None, None, None))
                    continue
                reference_id, reference_digest = references[trial.dataset]
            fingerprint = trial.fingerprint(self.code, info.digest, reference_digest, info.network)
            trial_id = trial.trial_id(fingerprint)
            commit = commits.get(trial_id)
            try:
                self._check_commit(trial.dataset, trial_id, fingerprint, commit)
            except RecordError as error:
                if refuse is None:
                    raise
                refuse(trial_id, error)
                commit = None
            if commit and self.is_reference(trial) and commit["diverged_epoch"] is None:
                references[trial.dataset] = trial_id, record_digest(commit)
            resolved.append(PlannedTrial(trial, trial_id, fingerprint, reference_id, commit))
        return resolved

    def _check_commit(
        self, key: str, trial_id: str, fingerprint: str, commit: Mapping[str, Any] | None
    ) -> None:
        """Raise RecordError unless a trial's COMMIT.json is one of the planned trial."""
        if commit is None:
            return
        if commit["fingerprint"] != fingerprint:
            raise RecordError(
                expected=f"fingerprint {fingerprint}",
                got=str(commit["fingerprint"]),
                where=f"COMMIT.json of {trial_id}",
                todo="delete this trial's folder and run the study again",
            )
        check_history(commit, self.layout(key), f"COMMIT.json of {trial_id}")
        if (commit["diverged_epoch"] or 0) > self.training.epochs:
            raise RecordError(
                expected=f"a divergence in one of {self.training.epochs} epochs",
                got=f"in epoch {commit['diverged_epoch']}",
                where=f"COMMIT.json of {trial_id}",
                todo="delete this trial's folder and run the study again",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "study.json") -> "Plan":
        """Return the plan that `to_json` wrote.

        Raises
        ------
        RecordError
            The value is no such plan, or claims sizes that no study has.
        """
        entries = {name: entry for name, entry in value.items() if name != "schema_version"}
        require_type(entries, cls, where)
        check_plan_sizes(value, where)
        training = {**value["training"], "hidden": tuple(value["training"]["hidden"])}
        return cls(
            datasets={
                key: DatasetInfo(
                    **{
                        **info,
                        "input_shape": tuple(info["input_shape"]),
                        "class_names": tuple(info["class_names"]),
                        "layers": tuple((name, size) for name, size in info["layers"]),
                        "forward_order": tuple(info.get("forward_order", ())),
                        "network": NetworkIdentity.from_json(info["network"])
                        if info.get("network")
                        else None,
                    }
                )
                for key, info in value["datasets"].items()
            },
            training=TrainingConfig(**training),
            grid={strategy: tuple(seeds) for strategy, seeds in value["grid"].items()},
            order_seed=value["order_seed"],
            rand_batches=value["rand_batches"],
            code=value["code"],
        )

    def joined(self, other: "Plan", where: str) -> "Plan":
        """Return this plan with the data sets, strategies and seeds of the other added.

        Raises
        ------
        ConfigError
            The plans differ in anything else, so that one cube cannot hold both.
        """
        self._require_same_network(other, where)
        stored, requested = (_fixed_settings(plan) for plan in (self, other))
        differing = [
            f"{name} {stored[name]!r} (requested: {requested[name]!r})"
            for name in stored
            if name in requested and stored[name] != requested[name]
        ]
        if differing:
            raise ConfigError(
                expected="the configuration of the existing study",
                got="; ".join(differing),
                where=where,
                todo="run with the same options, or choose another --out",
            )
        grid = {
            strategy: tuple(sorted({*self.grid.get(strategy, ()), *other.grid.get(strategy, ())}))
            for strategy in dict.fromkeys((*self.grid, *other.grid))
        }
        datasets = {**self.datasets, **other.datasets}
        for key, info in self.datasets.items():
            # As first recorded: initial values and outputs are compared with a tolerance, and must
            # not drift; a data set that was stored without digests keeps having none.
            datasets[key] = replace(datasets[key], network=info.network, chunks=info.chunks)
        return replace(self, datasets=datasets, grid=grid)

    def _require_same_network(self, other: "Plan", where: str) -> None:
        """Raise ConfigError if the plans name a user's own network that has changed."""
        name = self.training.model
        if ":" not in name or name != other.training.model:
            return
        if any(info.network is None for info in self.datasets.values()):
            raise ConfigError(
                expected=f"a study that records the identity of its network {name}",
                got="a study of an earlier version, which recorded the name only",
                where=where,
                todo="choose another --out; this study can still be read, but not continued, since "
                "it is unknown whether the network is the same",
            )
        differences: dict[str, None] = {}
        for key, info in other.datasets.items():
            requested = info.network
            assert requested is not None
            if key in self.datasets:
                stored = self.datasets[key].network
            else:  # an added data set has parameters of its own, but the same source code
                source = next(iter(self.datasets.values())).network.source  # type: ignore[union-attr]
                stored = replace(requested, source=source)
            assert stored is not None
            differences |= dict.fromkeys(stored.differences(requested))
        if differences:
            raise ConfigError(
                expected=f"the network that {name} returned when the study began",
                got=f"another network; different: {', '.join(differences)}",
                where=where,
                todo="restore the function, or choose another --out",
            )


def _fixed_settings(plan: Plan) -> dict[str, Any]:
    """Return the settings that two joined plans must share, by the name of their option."""
    values = asdict(plan.training) | {
        name: getattr(plan, name) for name in ("order_seed", "rand_batches", "code")
    }
    return values | {f"data set {key}": info.digest[:12] for key, info in plan.datasets.items()}


Refuse = Callable[[str, RecordError], None]
"""Takes the name of a record whose commit cannot be used, and why; the record then counts as not
committed."""


def read_commits(
    folder: Folder,
    records: str = "trials",
    refuse: Refuse | None = None,
    *,
    outcomes: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the COMMIT.json of every committed trial of a study, by trial_id.

    A damaged one counts as absent, with a `sampimp.errors.DamageWarning`. The digests of files,
    half of a commit, are left out.

    Parameters
    ----------
    folder
        The store of the study.
    records
        Its folder of records: "trials", or `sampimp.store.influence_layouts.INFLUENCE_FOLDER`.
    refuse
        Called for each COMMIT.json that cannot be read, instead of the warning.
    outcomes
        Read the outcomes of trials alone (`sampimp.store.commits.read_outcome`), and whole only the
        commits that `Plan.resolve` needs.
    """
    trials = folder / records
    names = trials.folders()

    def read(name: str) -> Any:
        try:
            commit = read_outcome(trials / name) if outcomes else None
            if commit is None or _is_reference(commit):
                commit = (
                    find_commit(trials / name) if refuse is None else read_commit(trials / name)
                )
        except RecordError as error:
            if refuse is None:
                raise
            refuse(name, error)
            return None
        return commit and {key: entry for key, entry in commit.items() if key != "files"}

    # An object store answers in tens of milliseconds, a disk at once: more threads than these wait
    # for each other.
    with _no_collection(), ThreadPoolExecutor(4 if folder.is_local else 64) as pool:
        commits = dict(zip(names, pool.map(read, names), strict=True))
    return {name: commit for name, commit in commits.items() if commit}


def _is_reference(identity: Mapping[str, Any]) -> bool:
    reference = REFERENCE_STRATEGY, REFERENCE_SEED
    return (identity.get("strategy"), identity.get("seed")) == reference
