"""Units of work on committed runs: the base of influence, retraining and subsets.

The units of a command are listed anew whenever the store has changed, always in the same order. A
unit of a run that is not committed waits for it; the run may be trained by another command.

Map: `DerivedUnits` (base class), `numbered`, `make_work` (the computation of a unit).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sampimp.schema import __version__, digest_json, variable
from sampimp.store.influence_layouts import INFLUENCE_FOLDER, layout_of, record_id
from sampimp.store.influence_records import derived_commits
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial, read_commits
from sampimp.store.record import KEPT_CHECKPOINTS
from sampimp.sweeps.fixed_point_work import FixedPointWork
from sampimp.sweeps.influence_work import InfluenceWork, RunWork, StatesWork
from sampimp.sweeps.retrain_work import RetrainWork
from sampimp.sweeps.subset_work import SearchWork, SubsetWork
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.sweeps.work import Unit, Work

WORKS: Mapping[str, type[RunWork]] = {
    "states": StatesWork,
    "influence": InfluenceWork,
    "probes": InfluenceWork,
    "retrain": RetrainWork,
    "fixed-point": FixedPointWork,
    "search": SearchWork,
    "subset": SubsetWork,
}
"""The computation of each kind of unit."""


def make_work(folder: Folder, plan: Plan, inputs: TrialInputs, config: Mapping[str, Any]) -> Work:
    """Return the computation of a unit.

    Parameters
    ----------
    folder, plan, inputs
        The study's store, its plan, and what its trials train on.
    config
        `Unit.config`.
    """
    return WORKS[config["kind"]](folder, plan, inputs, config)


def numbered(number: int) -> str:
    """Return what names a unit by its number among those of its kind, from 1."""
    return str(number) if number > 1 else ""


class DerivedUnits(ABC):
    """The units of work of one command on runs of a study.

    Parameters
    ----------
    folder, plan
        The study.
    positions
        Positions of the runs in the plan.
    """

    def __init__(self, folder: Folder, plan: Plan, positions: Sequence[int]) -> None:
        self.folder, self.plan, self.positions = folder, plan, tuple(positions)

    def resolve(self) -> list[Unit]:
        """Return all units as the store has them now."""
        trials = self.plan.resolve(read_commits(self.folder))
        commits = derived_commits(self.folder, self.plan, trials)
        return [
            unit
            for position in self.positions
            for unit in self.units_of(position, trials[position], commits)
        ]

    @abstractmethod
    def units_of(
        self, position: int, run: PlannedTrial, commits: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Unit]:
        """Yield the units of one run; as many whether it is committed or not."""

    def unit(
        self,
        run: PlannedTrial,
        position: int,
        kind: str,
        part: str,
        parts: Mapping[str, Any],
        commits: Mapping[str, Mapping[str, Any]],
        *,
        steps: int,
        config: Mapping[str, Any],
        ready: bool = True,
        unblocks: bool = False,
    ) -> Unit:
        """Return a unit of work on a run.

        Parameters
        ----------
        run, position
            The run, and its position in the plan.
        kind, part
            Kind of the unit, and what names it among those of the kind; empty for the first.
        parts
            What the record is of, as entries of its identity: targets, smoothing, removals.
        commits
            As `sampimp.store.influence_records.derived_commits` returns them.
        steps
            Number of its steps.
        config
            What the worker needs besides.
        ready
            False while another unit of this command has to be done before.
        unblocks
            Whether other units wait for this one.
        """
        label = "-".join(filter(None, (run.label, kind, part)))
        if run.commit is None or run.commit["diverged_epoch"] is not None:
            # A run that was committed while this command waited may have diverged: nothing follows.
            awaits = run.label if run.commit is None else None
            waiting = {"kind": kind, "label": label, "position": position}
            identity = {"kind": kind, **parts}
            return Unit(
                label, None, steps, None, {**waiting, "identity": identity}, unblocks, awaits
            )
        identity = {
            "kind": kind,
            "dataset": run.config.dataset,
            "strategy": run.config.strategy,
            "seed": run.config.seed,
            "trial": run.trial_id,
            "record": record_digest(run.commit),
            "code": __version__,
            **parts,
        }
        fingerprint = digest_json([run.fingerprint, identity])
        identity["fingerprint"] = fingerprint
        name = record_id(run.label, kind, fingerprint)
        folder = f"{INFLUENCE_FOLDER}/{name}"
        return Unit(
            label=label,
            folder=folder if ready else None,
            steps=steps,
            commit=commits.get(name),
            config={
                "kind": kind,
                "label": label,
                "folder": folder,
                "position": position,
                "trial_id": run.trial_id,
                "reference_id": run.reference_id,
                "identity": identity,
                **config,
            },
            unblocks=unblocks,
        )

    @abstractmethod
    def checkpoint_bytes(self, unit: Unit) -> int:
        """Return the size of a unit's checkpoint, or 0 if it is negligible."""

    def bytes_of(self, unit: Unit) -> int:
        """Return the most that a unit's record and checkpoints take in the store."""
        key = self.plan.trials()[unit.config["position"]].dataset
        layout = layout_of(unit.config["identity"], self.plan.layout(key))
        arrays = sum(
            math.prod(layout.shape(name)) * np.dtype(variable(name).dtype).itemsize
            for name in layout.variables
            if variable(name).dtype != "bytes"
        )
        kept = KEPT_CHECKPOINTS + 1
        if "training_state" in layout.variables:
            kept += layout.shape("training_state")[0]
        return arrays + kept * self.checkpoint_bytes(unit)
