"""What the explorer shows of a study: its nodes, their committed runs, and what parts depend on.

The commits are read before the cube: a part that contains a newer record than its name says is
written again next time, while an older one would be kept.

Map: `open_study`, `ExploredStudy`, `ExploredNode`, `ExploredRun`, `choose_histories`.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import xarray as xr

from sampimp.errors import ConfigError
from sampimp.schema import REFERENCE_SEED, REFERENCE_STRATEGY, digest_json
from sampimp.store.attempts import read_claim
from sampimp.store.cube import open_cube
from sampimp.store.influence_layouts import labelled_target
from sampimp.store.influence_records import CommittedRecord, read_records
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, PlannedTrial, read_commits
from sampimp.store.plan_files import require_plan


@dataclass(frozen=True)
class ExploredRun:
    """A committed run.

    Parameters
    ----------
    name
        Strategy and seed, such as "shuffle-seed1".
    strategy, seed
        Its place in the cube.
    diverged_epoch
        The epoch in which it diverged, or None.
    record
        What identifies its importance and NLL.
    derived
        What identifies its influence and subsets.
    influence
        What identifies its influence on each target.
    """

    name: str
    strategy: str
    seed: int
    diverged_epoch: int | None
    record: Any
    derived: Any
    influence: Mapping[str, Any] = field(default_factory=dict)

    def of(self, array: xr.DataArray) -> xr.DataArray:
        """Return the run's values of a variable of the cube."""
        return array.sel(strategy=self.strategy, seed=self.seed, drop=True)

    def epochs(self, count: int) -> range:
        """Return the epochs that count, of `count` of the study: those before the divergence."""
        return range(1, count + 1 if self.diverged_epoch is None else self.diverged_epoch)


@dataclass(frozen=True)
class ExploredNode:
    """A data set, and the runs on it.

    Parameters
    ----------
    name
        Path of its node in the cube.
    source
        OUT/datasets/KEY.zarr.
    info, cube
        The data set in the plan, and the node.
    planned
        Names of the planned runs.
    runs
        The committed ones; first the default one.
    """

    name: str
    source: Folder
    info: DatasetInfo
    cube: xr.Dataset
    planned: tuple[str, ...]
    runs: tuple[ExploredRun, ...]

    @property
    def folder(self) -> str:
        """The node's path as the name of a folder."""
        return f"data/{safe_name(self.name.replace('/', '--'))}"


@dataclass(frozen=True)
class ExploredStudy:
    """A study as the explorer shows it."""

    nodes: tuple[ExploredNode, ...]
    root: str
    """Digest of the plan, and of what is committed."""
    time: str | None
    """When the newest committed attempt began; None without one."""


def safe_name(text: str) -> str:
    """Return a text as part of a file's name, with a digest if characters were replaced.

    Examples
    --------
    >>> safe_name("mnist--cnn"), safe_name("a:b")
    ('mnist--cnn', 'a_b-8cc857')
    """
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", text)[:100]
    return plain if plain == text else f"{plain}-{digest_json(text)[:6]}"


def open_study(out: str, nodes: Sequence[str] = ()) -> ExploredStudy:
    """Open a study for the explorer.

    Parameters
    ----------
    out
        The study's folder or `s3://` URL.
    nodes
        Nodes of the cube; empty: all.

    Raises
    ------
    ConfigError
        There is no such node.
    StoreError
        There is no study.
    """
    folder = Folder.of(out)
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    records = read_records(folder, plan, trials)
    tree = open_cube(folder)
    keys = {plan.node(key): key for key in plan.datasets}
    if unknown := sorted(set(nodes) - set(keys)):
        raise ConfigError(
            expected=f"a data set of the study: {', '.join(keys)}",
            got=", ".join(map(repr, unknown)),
            where="option --node",
            todo="name one of them, or leave the option out",
        )
    explored = []
    for name, key in keys.items():
        if nodes and name not in nodes:
            continue
        cube = tree[name].to_dataset()
        own = [trial for trial in trials if trial.config.dataset == key]
        explored.append(
            ExploredNode(
                name=name,
                source=folder / "datasets" / f"{key}.zarr",
                info=plan.datasets[key],
                cube=cube,
                planned=tuple(_name(trial) for trial in own),
                runs=tuple(
                    _explored_run(trial, records.get(str(trial.trial_id), ()))
                    for trial in sorted(own, key=_rank)
                    if trial.commit is not None and _is_in(cube, trial)
                ),
            )
        )
    committed = [[run.record, run.derived] for node in explored for run in node.runs]
    time = _newest(folder, trials, [record for each in records.values() for record in each])
    return ExploredStudy(tuple(explored), digest_json([plan.to_json(), committed]), time)


def _name(trial: PlannedTrial) -> str:
    return f"{trial.config.strategy}-seed{trial.config.seed}"


def _rank(trial: PlannedTrial) -> bool:
    """Put the reference run first, and leave the others in the order of the plan."""
    return (trial.config.strategy, trial.config.seed) != (REFERENCE_STRATEGY, REFERENCE_SEED)


def _is_in(cube: xr.Dataset, trial: PlannedTrial) -> bool:
    """Return whether the cube has the trial: it may have been withdrawn meanwhile."""
    config = trial.config
    place = {"strategy": config.strategy, "seed": config.seed}
    return str(cube["trial"].sel(place).values) == trial.trial_id


def _explored_run(trial: PlannedTrial, records: Sequence[CommittedRecord]) -> ExploredRun:
    assert trial.commit is not None
    influence: dict[str, list[Any]] = {}
    for record in records:
        if record.kind == "influence":
            for target in record.commit["targets"]:
                name = labelled_target(target, record.commit["smoothing"])
                influence.setdefault(name, []).append(_identity(record))
    return ExploredRun(
        name=_name(trial),
        strategy=trial.config.strategy,
        seed=trial.config.seed,
        diverged_epoch=trial.commit["diverged_epoch"],
        record=[trial.trial_id, record_digest(trial.commit)],
        derived=[_identity(record) for record in records],
        influence=influence,
    )


def _identity(record: CommittedRecord) -> list[str]:
    return [record.name, digest_json(record.commit["digests"])]


def _newest(
    folder: Folder, trials: Sequence[PlannedTrial], records: Sequence[CommittedRecord]
) -> str | None:
    """Return when the newest committed attempt began: the same bytes of the same store."""
    places = [
        (folder / "trials" / trial.trial_id, trial.commit["attempt"])
        for trial in trials
        if trial.commit is not None and trial.trial_id is not None
    ]
    places += [(record.folder, record.commit["attempt"]) for record in records]
    with ThreadPoolExecutor(16) as pool:  # an object store answers in tens of milliseconds
        times = pool.map(lambda place: read_claim(*place).get("time"), places)
    known = [time for time in times if time is not None]
    return datetime.fromtimestamp(max(known), UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if known else None


def choose_histories(node: ExploredNode, names: Sequence[str]) -> list[ExploredRun]:
    """Return the runs of a node whose histories are written.

    Parameters
    ----------
    node
        The node.
    names
        Names of runs, or "all"; empty: the first run.

    Examples
    --------
    >>> run = ExploredRun("rand-seed1", "rand", 1, None, None, None)
    >>> node = ExploredNode("made", Folder("/x"), None, xr.Dataset(), ("rand-seed1",), (run,))
    >>> [run.name for run in choose_histories(node, ["all"])], choose_histories(node, ["nlo-seed1"])
    (['rand-seed1'], [])
    """
    if not names:
        return list(node.runs[:1])
    return [run for run in node.runs if "all" in names or run.name in names]


def check_runs(study: ExploredStudy, names: Sequence[str]) -> None:
    """Raise ConfigError for the name of a run that the study does not plan."""
    planned = list(dict.fromkeys(name for node in study.nodes for name in node.planned))
    if unknown := [name for name in names if name not in ("all", *planned)]:
        raise ConfigError(
            expected=f"a run of the study, such as {', '.join(planned[:6])}, or all",
            got=", ".join(map(repr, unknown)),
            where="option --runs",
            todo="name a run as STRATEGY-seedN",
        )
