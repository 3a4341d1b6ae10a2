"""The plan of a study: its data sets, its grid of strategies and seeds, and what each trial is.

The plan is written to OUT/study.json before anything is trained, and it is all that a reader needs
to know which trials there should be. Which of them there are, only the store says: `Plan.resolve`
matches the plan with the commits, and both the sweep and the cube go by its answer.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from sampimp.config import NetworkIdentity, TrainingConfig, TrialConfig
from sampimp.errors import ConfigError, RecordError, StoreError
from sampimp.schema import (
    REFERENCE_SEED,
    REFERENCE_STRATEGY,
    SCHEMA_VERSION,
    SORTED_STRATEGIES,
    Layout,
    __version__,
)
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a plan says of a data set."""

    name: str
    digest: str
    sample_count: int
    test_count: int
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    layers: tuple[tuple[str, int], ...]
    """Layer and size of every tensor of the network's parameters, in order."""
    forward_order: tuple[str, ...] = ()
    """Names of the layers in the order in which they are called; by default as registered."""
    chunks: str = ""
    """Digest of the digests of its chunks in the store; empty where it was stored without."""
    network: NetworkIdentity | None = None
    """What a network of one's own is; None for the others, and in studies that did not note it."""

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, in forward order."""
        return self.forward_order or tuple(dict.fromkeys(name for name, _ in self.layers))

    @property
    def parameter_count(self) -> int:
        """Number of the network's parameters."""
        return sum(size for _, size in self.layers)


class PlannedTrial(NamedTuple):
    """A trial of the plan, and what the store has of it."""

    config: TrialConfig
    trial_id: str | None
    """Name of its folder; None while the reference that it sorts by is not committed."""
    fingerprint: str | None
    reference_id: str | None
    """Folder of the reference run whose record it sorts by; None if it sorts by none."""
    commit: Mapping[str, Any] | None

    @property
    def label(self) -> str:
        """Its name without the fingerprint: data set, strategy and seed."""
        return f"{self.config.dataset}-{self.config.strategy}-seed{self.config.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study."""

    datasets: Mapping[str, DatasetInfo]
    """By key."""
    training: TrainingConfig
    grid: Mapping[str, tuple[int, ...]]
    """The seeds of every strategy."""
    order_seed: int = 0
    """Seed of `shuffle`'s sequence of batches and of the batches of `rand`."""
    rand_batches: Literal["shared", "by_seed"] = "shared"
    """Whether the runs of `rand` share one draw of the batches."""
    code: str = __version__
    """Version of the package that trains it."""

    def trials(self) -> list[TrialConfig]:
        """Return every trial, the reference runs that others wait for first."""
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
        """Return the seed of a trial's batches: the study's, or one of the trial's own.

        Examples
        --------
        >>> plan = Plan(datasets={}, training=TrainingConfig(), grid={})
        >>> plan.order_seed_of("shuffle", 3), plan.order_seed_of("shuffle_by_seed", 3)
        (0, 3)
        """
        own = strategy == "shuffle_by_seed" or (
            strategy == "rand" and self.rand_batches == "by_seed"
        )
        return self.order_seed + seed if own else self.order_seed

    def node(self, key: str) -> str:
        """Return where the cube has a data set's trials: mnist, or mnist/cnn for other networks.

        Examples
        --------
        >>> own = TrainingConfig(model="my.models:small")
        >>> [Plan(datasets={}, training=t, grid={}).node("mnist") for t in (TrainingConfig(), own)]
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
        """Return whether the sorted strategies of its data set wait for this trial."""
        return (trial.strategy, trial.seed) == (REFERENCE_STRATEGY, REFERENCE_SEED)

    def resolve(self, commits: Mapping[str, Mapping[str, Any]]) -> list[PlannedTrial]:
        """Match the plan with the committed trials, as `read_commits` gives them."""
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
            if commit is not None and commit["fingerprint"] != fingerprint:
                raise RecordError(
                    expected=f"fingerprint {fingerprint}",
                    got=str(commit["fingerprint"]),
                    where=f"COMMIT.json of {trial_id}",
                    todo="delete this trial's folder and run the study again",
                )
            if commit and self.is_reference(trial) and commit["diverged_epoch"] is None:
                references[trial.dataset] = trial_id, record_digest(commit)
            resolved.append(PlannedTrial(trial, trial_id, fingerprint, reference_id, commit))
        return resolved

    def to_json(self) -> dict[str, Any]:
        """Return it as written to study.json."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_json` wrote."""
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
            The two differ in anything else, so that one cube cannot hold both.
        """
        self._require_same_network(other, where)
        mine, theirs = (_flat(plan) for plan in (self, other))
        differing = [
            f"{name} {mine[name]!r} (asked for: {theirs[name]!r})"
            for name in mine
            if name in theirs and mine[name] != theirs[name]
        ]
        if differing:
            raise ConfigError(
                expected="the configuration of the study that is already there",
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
            # As they were noted first: what is nearly equal does not drift, and a data set that
            # was stored without digests has none.
            datasets[key] = replace(datasets[key], network=info.network, chunks=info.chunks)
        return replace(self, datasets=datasets, grid=grid)

    def _require_same_network(self, other: "Plan", where: str) -> None:
        """Raise ConfigError unless a network of one's own is the same in both plans."""
        name = self.training.model
        if ":" not in name or name != other.training.model:
            return
        if any(info.network is None for info in self.datasets.values()):
            raise ConfigError(
                expected=f"a study that notes what its network {name} is",
                got="one of an earlier version, which noted its name alone",
                where=where,
                todo="choose another --out; this one can still be read, but not continued, since "
                "nobody can tell whether the network is the same",
            )
        differences: dict[str, None] = {}
        for key, there in other.datasets.items():
            assert there.network is not None
            if key in self.datasets:
                here = self.datasets[key].network
            else:  # a data set that is added has parameters of its own, and the same source
                source = next(iter(self.datasets.values())).network.source  # type: ignore[union-attr]
                here = replace(there.network, source=source)
            assert here is not None
            differences |= dict.fromkeys(here.differences(there.network))
        if differences:
            raise ConfigError(
                expected=f"the network that {name} was when the study began",
                got=f"another one; different: {', '.join(differences)}",
                where=where,
                todo="put the function back to what it was, or choose another --out",
            )


def _flat(plan: Plan) -> dict[str, Any]:
    """Return what two plans must agree on, by the name a person knows it by."""
    values = asdict(plan.training) | {
        name: getattr(plan, name) for name in ("order_seed", "rand_batches", "code")
    }
    return values | {f"data set {key}": info.digest[:12] for key, info in plan.datasets.items()}


def read_plan(folder: Folder) -> Plan | None:
    """Return the plan of a study, or None if there is no study.

    Raises
    ------
    StoreError
        It was written in another schema.
    """
    value = folder.read_json("study.json")
    if value is None:
        return None
    if value.get("schema_version") != SCHEMA_VERSION:
        raise StoreError(
            expected=f"a study in schema version {SCHEMA_VERSION}",
            got=f"version {value.get('schema_version')}",
            where=f"{folder}/study.json",
            todo=f"read it with the release that wrote it ({value.get('code', 'unknown')})",
        )
    return Plan.from_json(value)


def require_plan(folder: Folder) -> Plan:
    """Return the plan of a study, or raise StoreError if there is no study."""
    folder.check_reachable()
    plan = read_plan(folder)
    if plan is None:
        raise StoreError(
            expected="a study, with a study.json",
            got="no such file",
            where=str(folder),
            todo="pass the folder or URL that was given to full_study.py as --out",
        )
    return plan


def read_commits(folder: Folder) -> dict[str, dict[str, Any]]:
    """Return what every committed trial of a study says of itself, by trial_id."""
    trials = folder / "trials"
    names = trials.folders()
    with ThreadPoolExecutor(16) as pool:  # an object store answers in tens of milliseconds
        commits = pool.map(lambda name: trials.read_json(f"{name}/COMMIT.json"), names)
    return {name: commit for name, commit in zip(names, commits, strict=True) if commit}
