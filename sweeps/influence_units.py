"""The units of work of influence: blocks of targets of each run, and states that they wait for.

One pass goes backward for at most 16 targets at once, of which 8 to 16 are the cheapest per target.
Targets that are stored already, with the same smoothing, are left out before blocks are made.
Blocks of probes begin at multiples of their size, so that more probes find the first ones done.

Map: `InfluenceUnits`; `TargetList`, `list_targets`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sampimp.data import Dataset
from sampimp.influence.replay import Smoothing
from sampimp.influence.targets import FunctionTarget, make_targets
from sampimp.influence.trial_run import needs_states
from sampimp.store.influence_layouts import probe_layer
from sampimp.store.influence_records import derived_commits
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits
from sampimp.sweeps.derived_units import DerivedUnits, numbered
from sampimp.sweeps.fixed_point_work import SOLVED_CURVATURES, fixed_point_parts
from sampimp.sweeps.work import Unit
from sampimp.training.identity import source_digest

LARGEST_BLOCK = 16
"""Targets that go backward together: 32 took a seventh more time per target than 16."""

STATES_OF = {"sgd": 1, "momentum": 2, "adam": 3, "adamw": 3}
"""Tensors of a parameter's size in the state of each optimizer, the parameter included."""


@dataclass(frozen=True)
class TargetList:
    """Names and units of the targets of a data set."""

    units: Mapping[str, str]
    """Unit of each target, by name, in the order of the request."""
    functions: Mapping[str, str]
    """Digest of the source of each target that is a user's own function."""

    def parts(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the entries of a record's identity that say which targets it is of."""
        functions = {name: self.functions[name] for name in names if name in self.functions}
        targets: dict[str, Any] = {
            "targets": list(names),
            "units": [self.units[name] for name in names],
        }
        return targets | ({"functions": functions} if functions else {})


def list_targets(specs: Sequence[str], data: Dataset, layers: Sequence[str]) -> TargetList:
    """Return the targets that are named; see `sampimp.influence.targets.make_targets`."""
    targets = make_targets(specs, data, layers)
    functions = [target.name for target in targets if isinstance(target, FunctionTarget)]
    return TargetList(
        {target.name: target.units for target in targets},
        {name: source_digest(name) for name in functions},
    )


class InfluenceUnits(DerivedUnits):
    """The units of work of one command: blocks of targets of each run, after its states.

    Parameters
    ----------
    folder, plan, positions
        As for `DerivedUnits`.
    targets
        The targets of each data set, by key.
    smoothing
        Smoothing of the derivative.
    memory
        Bytes that a unit may take for adjoints and for the steps that it keeps; the fewer, the
        smaller are the blocks.
    fixed_point
        Whether -H^-1 g is computed as well, for all targets but probes.
    """

    def __init__(
        self,
        folder: Folder,
        plan: Plan,
        positions: Sequence[int],
        *,
        targets: Mapping[str, TargetList],
        smoothing: Smoothing,
        memory: int,
        fixed_point: bool = False,
    ) -> None:
        super().__init__(folder, plan, positions)
        self._fixed_point = fixed_point
        self._targets, self._smoothing, self._memory = targets, asdict(smoothing), memory
        trials = plan.resolve(read_commits(folder))
        commits = derived_commits(folder, plan, trials)
        self._blocks = {
            position: self._blocks_of(trials[position], commits) for position in positions
        }

    def _blocks_of(
        self, run: PlannedTrial, commits: Mapping[str, Mapping[str, Any]]
    ) -> list[tuple[str, list[str]]]:
        """Return kind and targets of each block that a run lacks, or has in part."""
        wanted = self._targets[run.config.dataset]
        size = self.block_size(run.config.dataset)
        blocks = _blocks(list(wanted.units), size)
        done: set[str] = set()
        for commit in commits.values():
            if run.commit is not None and self._is_part(commit, run, wanted):
                done |= set(commit["targets"])
        if not done:
            return blocks
        left = [name for name in wanted.units if name not in done and probe_layer(name) is None]
        named = [block for block in _blocks(left, size) if block[0] == "influence"]
        probes = [
            block for block in blocks if block[0] == "probes" and not done.issuperset(block[1])
        ]
        return named + probes

    def _is_part(self, commit: Mapping[str, Any], run: PlannedTrial, wanted: TargetList) -> bool:
        """Return whether a committed record has targets of this command."""
        assert run.commit is not None
        functions = commit.get("functions", {})
        return (
            commit["kind"] in ("influence", "probes")
            and commit["trial"] == run.trial_id
            and commit["record"] == record_digest(run.commit)
            and commit["smoothing"] == self._smoothing
            and all(
                wanted.functions.get(name, digest) == digest for name, digest in functions.items()
            )
        )

    def block_size(self, key: str) -> int:
        """Return how many targets go backward at once: the largest power of two that fits."""
        info = self.plan.datasets[key]
        tensors = STATES_OF[self.plan.training.optimizer]
        adjoint = 4 * info.parameter_count * tensors
        values = 8 * info.sample_count * (len(info.layer_names) + 1)
        size = LARGEST_BLOCK
        while size > 1 and size * (adjoint + values) > self._memory // 2:
            size //= 2
        return size

    def units_of(
        self, position: int, run: PlannedTrial, commits: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Unit]:
        """Yield the states, if the optimizer has any, then a unit for each block."""
        states, wanted = None, self._targets[run.config.dataset]
        blocks = self._blocks[position]
        if needs_states(run.config) and blocks:
            states = self.unit(
                run,
                position,
                "states",
                "",
                {},
                commits,
                steps=self.plan.training.epochs,
                config={},
                unblocks=True,
            )
            yield states
        name = states.folder.rpartition("/")[2] if states and states.folder else None
        numbers = {"influence": 0, "probes": 0}
        for kind, targets in blocks:
            numbers[kind] += 1
            yield self.unit(
                run,
                position,
                kind,
                numbered(numbers[kind]),
                {**wanted.parts(targets), "smoothing": self._smoothing},
                commits,
                steps=self.plan.training.epochs,
                config={"states": name, "memory": self._memory // 2},
                ready=states is None or states.commit is not None,
            )

        named = [name for name in wanted.units if probe_layer(name) is None]
        if self._fixed_point and named:
            how = fixed_point_parts(
                self.plan.training, self.plan.datasets[run.config.dataset].sample_count
            )
            yield self.unit(
                run,
                position,
                "fixed-point",
                "",
                wanted.parts(named) | how,
                commits,
                steps=len(named) * len(SOLVED_CURVATURES),
                config={},
            )

    def checkpoint_bytes(self, unit: Unit) -> int:
        """Return the size of the adjoints and sums, or of a state."""
        info = self.plan.datasets[self.plan.trials()[unit.config["position"]].dataset]
        state = 4 * info.parameter_count * STATES_OF[self.plan.training.optimizer]
        if unit.config["kind"] == "states":
            return state
        if unit.config["kind"] == "fixed-point":
            return 0
        return len(unit.config["identity"]["targets"]) * (state + 8 * info.sample_count)


def _blocks(names: Sequence[str], size: int) -> list[tuple[str, list[str]]]:
    """Divide targets into blocks: named ones, probes over all layers, probes of single layers.

    Examples
    --------
    >>> _blocks(["probe:0", "mean", "probe:1", "class:0", "class:1"], 2)
    [('influence', ['mean', 'class:0']),
     ('influence', ['class:1']),
     ('probes', ['probe:0', 'probe:1'])]
    """
    by_layer: dict[str | None, list[str]] = {None: []}
    for name in names:
        by_layer.setdefault(probe_layer(name), []).append(name)
    named = by_layer.pop(None)
    groups = [("influence", named), *(("probes", probes) for probes in by_layer.values())]
    return [
        (kind, group[start : start + size])
        for kind, group in groups
        for start in range(0, len(group), size)
    ]
