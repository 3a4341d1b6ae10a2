"""Retrainings without samples, the truth about influence: from the request to the units of work.

    random:30          30 single samples, drawn at random
    top:30             the 30 most important samples, one by one
    subset-0.95:100    100 random subsets that keep 95 % of the samples
    sample:17          one sample; sample:0..3 for several, one by one
    class:3            all samples of a class

Every removal is retrained from several starts: the run's own, then jittered ones. So is the run
itself, with all samples. A run's importance is known once it is committed, and so is which samples
are the most important.

Map: `RetrainRequest`; `prepare_retrain`; `RetrainUnits`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sampimp.data import scale_inputs
from sampimp.errors import ConfigError
from sampimp.influence.retraining import JITTER, random_subsets, single_removals
from sampimp.store.influence_layouts import UNTOUCHED, probe_layer
from sampimp.store.influence_records import derived_commits
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.variables import read_difficulty
from sampimp.sweeps.derived_study import DerivedStudy
from sampimp.sweeps.derived_units import DerivedUnits, numbered
from sampimp.sweeps.influence_study import measure_reverse_epoch
from sampimp.sweeps.influence_units import TargetList, list_targets
from sampimp.sweeps.retrain_work import SUBSET_SEED
from sampimp.sweeps.run_choice import check_replayable, choose_runs
from sampimp.sweeps.work import Unit

REMOVALS_PER_UNIT = 8
"""Removals of a unit (arbitrary: more units than machines, and fewer records than retrainings)."""

REMOVAL_SPECS = "random:30, top:30, subset-0.95:100, sample:17, sample:0..3, class:3"


@dataclass(frozen=True, kw_only=True)
class RetrainRequest:
    """What to retrain."""

    removals: tuple[str, ...]
    """As in the head of this module."""
    targets: tuple[str, ...]
    """As for `sampimp.influence.targets.make_targets`; no probes."""
    runs: tuple[str, ...]
    """As for `sampimp.sweeps.run_choice.choose_runs`."""
    repeats: int = 2
    jitter: float = JITTER
    renormalised: bool = False
    """Divide each batch's loss by the number of samples that remain in it."""
    model: str | None = None
    """The study's network, if it is a user's own."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a number out of range."""
        if self.repeats < 1 or not 0 < self.jitter < 1:
            raise ConfigError(
                expected="at least 1 repeat, and a jitter between 0 and 1",
                got=f"{self.repeats} and {self.jitter:g}",
                where="options --repeats and --jitter",
                todo="change the value",
            )


def prepare_retrain(folder: Folder, request: RetrainRequest) -> DerivedStudy:
    """Check a request against its study; return the units of work.

    Raises
    ------
    UserError
        There is no study, a run, target or removal is unknown, a run has diverged, or it cannot
        be trained again.
    """
    plan = require_plan(folder)
    positions = choose_runs(plan, plan.resolve(read_commits(folder)), request.runs)
    keys = list(dict.fromkeys(plan.trials()[position].dataset for position in positions))
    sources = check_replayable(folder, plan, keys, request.model)
    data = {key: scale_inputs(sources[key], plan.training.input_scaling) for key in keys}
    removals = {}
    targets = {}
    for key in keys:
        removals[key] = _check_removals(request.removals, data[key].train_labels)
        layers = plan.datasets[key].layer_names
        targets[key] = _without_probes(list_targets(request.targets, data[key], layers))
    units = RetrainUnits(folder, plan, positions, request, removals, targets)
    seconds: dict[str, float] = {}

    def step_seconds(unit: Unit) -> float:
        key = plan.trials()[unit.config["position"]].dataset
        if key not in seconds:
            seconds[key] = measure_reverse_epoch(plan, key, data[key], ())
        return plan.training.epochs * seconds[key]

    return DerivedStudy(
        folder=folder,
        plan=plan,
        sources=sources,
        units=units,
        words=("units", "retrainings"),
        step_seconds=step_seconds,
    )


def _without_probes(targets: TargetList) -> TargetList:
    probes = [name for name in targets.units if probe_layer(name) is not None]
    if probes:
        raise ConfigError(
            expected="targets that are functions of the network's outputs, or your own",
            got=f"{', '.join(probes[:3])}{', ...' if probes[3:] else ''}",
            where="option --targets",
            todo="leave probes out: they estimate how far parameters move, by sampimp influence",
        )
    return targets


@dataclass(frozen=True)
class _Removals:
    """The removals of a data set: names that are known, and how many are found by importance."""

    named: tuple[str, ...]
    top: int

    @property
    def count(self) -> int:
        """Number of all removals, the untouched run included."""
        return 1 + len(self.named) + self.top

    def names(self, tau_N: np.ndarray) -> list[str]:
        """Return the names of all, the untouched run first."""
        _, top = single_removals(tau_N, 0, self.top, SUBSET_SEED)
        return [UNTOUCHED, *self.named, *(f"top:{row.argmax()}" for row in top)]


def _check_removals(specs: Sequence[str], labels: np.ndarray) -> _Removals:
    """Return the removals that specs stand for, or raise ConfigError for a wrong one."""
    named: list[str] = []
    top = 0
    for spec in specs:
        kind, _, rest = spec.partition(":")
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", rest)
        known = re.fullmatch(r"random|top|sample|class|subset-0?\.\d+", kind)
        if match is None or not known or (match[2] is not None and kind != "sample"):
            raise _unknown_removal(spec, f"one of {REMOVAL_SPECS}")
        number = int(match[1])
        numbers = range(number, int(match[2] or number) + 1)
        valid: Sequence[int] = range(len(labels))
        if kind == "class":
            valid = np.unique(labels).tolist()
        if kind in ("sample", "class"):
            if not numbers or numbers[0] not in valid or numbers[-1] not in valid:
                raise _unknown_removal(spec, f"numbers from {valid[0]} to {valid[-1]}")
            named += [f"{kind}:{number}" for number in numbers]
        elif kind == "top":
            single_removals(np.zeros(len(labels)), 0, number, SUBSET_SEED)
            top += number
        elif kind == "random":
            drawn, _ = single_removals(np.zeros(len(labels)), number, 0, SUBSET_SEED)
            named += [f"random:{row.argmax()}" for row in drawn]
        else:
            share = float(kind.partition("-")[2])
            random_subsets(len(labels), share, 1, SUBSET_SEED)
            named += [f"subset-{share:g}:{number}" for number in range(number)]
    repeated = sorted({name for name in named if named.count(name) > 1})
    if repeated or not (named or top):
        raise _unknown_removal(", ".join(repeated) or "none", "one or more removals, each once")
    return _Removals(tuple(named), top)


def _unknown_removal(got: str, expected: str) -> ConfigError:
    return ConfigError(
        expected=expected, got=repr(got), where="option --removals", todo="change it"
    )


class RetrainUnits(DerivedUnits):
    """The units of work of one command: blocks of removals of each run.

    Parameters
    ----------
    folder, plan, positions
        As for `DerivedUnits`.
    request
        What is retrained.
    removals, targets
        Those of each data set, by key.
    """

    def __init__(
        self,
        folder: Folder,
        plan: Plan,
        positions: Sequence[int],
        request: RetrainRequest,
        removals: Mapping[str, _Removals],
        targets: Mapping[str, TargetList],
    ) -> None:
        super().__init__(folder, plan, positions)
        self._request, self._removals, self._targets = request, removals, targets
        self._names: dict[int, list[str]] = {}
        trials = plan.resolve(read_commits(folder))
        commits = derived_commits(folder, plan, trials)
        self._done = {
            position: self._done_before(trials[position], commits) for position in positions
        }

    def _done_before(self, run: PlannedTrial, commits: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Return the removals whose retrainings are stored already, for all of the targets."""
        wanted = set(self._targets[run.config.dataset].units)
        request = self._request
        return {
            name
            for commit in commits.values()
            if run.commit is not None
            and commit["kind"] == "retrain"
            and commit["trial"] == run.trial_id
            and commit["record"] == record_digest(run.commit)
            and wanted <= set(commit["targets"])
            and commit["repeats"] >= request.repeats
            and commit["jitter"] == request.jitter
            and commit["renormalised"] == request.renormalised
            and commit.get("functions", {}) == self._parts(run).get("functions", {})
            for name in commit["removals"]
        }

    def _parts(self, run: PlannedTrial) -> dict[str, Any]:
        targets = self._targets[run.config.dataset]
        renormalised = self._request.renormalised
        return {
            **targets.parts(list(targets.units)),
            "repeats": self._request.repeats,
            "jitter": self._request.jitter,
            "renormalised": renormalised,
            "denominator": "number of samples that remain in the batch"
            if renormalised
            else "batch size kept",
        }

    def _missing(self, position: int, run: PlannedTrial) -> list[str]:
        """Return the removals of a run that are not stored; of an uncommitted run, all."""
        removals = self._removals[run.config.dataset]
        if run.commit is None or run.commit["diverged_epoch"] is not None:
            tops = [f"top {number + 1}" for number in range(removals.top)]
            return [UNTOUCHED, *removals.named, *tops]
        if position not in self._names:
            tau_N = np.zeros(0)
            if removals.top:
                trial = self.folder / "trials" / str(run.trial_id)
                layout = self.plan.layout(run.config.dataset)
                tau_N = read_difficulty(trial, "overall_importance", layout)
            names = removals.names(tau_N)
            self._names[position] = [name for name in names if name not in self._done[position]]
        return self._names[position]

    def units_of(
        self, position: int, run: PlannedTrial, commits: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Unit]:
        """Yield a unit for each block of removals."""
        missing = self._missing(position, run)
        for number, first in enumerate(range(0, len(missing), REMOVALS_PER_UNIT), start=1):
            block = missing[first : first + REMOVALS_PER_UNIT]
            yield self.unit(
                run,
                position,
                "retrain",
                numbered(number),
                {**self._parts(run), "removals": block},
                commits,
                steps=len(block) * self._request.repeats,
                config={},
            )

    def checkpoint_bytes(self, unit: Unit) -> int:
        """Return 0: a checkpoint is the number of a retraining."""
        return 0
