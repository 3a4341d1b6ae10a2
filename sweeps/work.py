"""Units of work: one record each, written step by step, by one process at a time.

    kind         one unit                                        one step
    train        a training run                                  an epoch
    states       the forward replay of a run                     an epoch
    influence    the reverse pass of a run, a block of targets   an epoch, the last one first
    fixed-point  -H^-1 g of a run                                a target and a curvature
    probes       the same for random probes                      an epoch, the last one first
    retrain      retrainings of a run, a block of removals       a retraining
    search       a search for a subset by exchange               a round
    subset       trainings on subsets, of a rule and size        a training

A unit is a folder in the store, a fingerprint, and a number of steps. What its steps compute is a
`Work`; how they are stored, continued and committed is the same for all (`Attempt`). Ray is not
imported here: `sampimp.sweeps.trial` performs units as trials of Ray Tune, and `perform` in this
process.

Map: `Unit`, `training_units`; `Work` (the computation), `Attempt` (its record), `perform`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from sampimp.errors import ResourceError
from sampimp.schema import EpochRecord, RecordLayout, StepRecord
from sampimp.store.attempts import SupersededError, Trace
from sampimp.store.location import Folder
from sampimp.store.plan import Plan, PlannedTrial
from sampimp.store.record import TrialRecord
from sampimp.sweeps.provenance import describe_machine
from sampimp.training.checkpoint_states import UnusableCheckpointError


class WorkerDiedError(ResourceError):
    """Another process that shares the work died, so that this attempt ends."""


class Unit(NamedTuple):
    """A unit of work of a study."""

    label: str
    """Names it among the units of one command."""
    folder: str | None
    """Its folder in the study's, such as trials/ID; None as long as it waits for another record."""
    steps: int
    commit: Mapping[str, Any] | None
    """Its COMMIT.json; None while it is missing."""
    config: Mapping[str, Any]
    """What a worker needs to perform it; with "kind", "label" and "folder"."""
    unblocks: bool = False
    """Whether other units wait for it."""
    awaits: str | None = None
    """A run that it waits for and that this command does not train; None if there is none."""

    @property
    def state(self) -> str:
        """Whether it is done, diverged, waiting, or blocked by another record."""
        if self.commit is not None:
            return "done" if self.commit["diverged_epoch"] is None else "diverged"
        return "waiting" if self.folder is not None else "blocked"


def training_units(plan: Plan, trials: Sequence[PlannedTrial]) -> list[Unit]:
    """Return the trials of a plan as units of work, in the plan's order."""
    return [
        Unit(
            label=trial.label,
            folder=None if trial.trial_id is None else f"trials/{trial.trial_id}",
            steps=plan.training.epochs,
            commit=trial.commit,
            config={
                "kind": "train",
                "position": position,
                "label": trial.label,
                "folder": None if trial.trial_id is None else f"trials/{trial.trial_id}",
                "trial_id": trial.trial_id,
                "fingerprint": trial.fingerprint,
                "reference_id": trial.reference_id,
            },
            unblocks=plan.is_reference(trial.config),
        )
        for position, trial in enumerate(trials)
    ]


class Work(ABC):
    """What the steps of a unit compute; they continue from any of its states."""

    identity: Mapping[str, Any]
    """Identity of the record, with its "fingerprint"; it opens the commit."""
    layout: RecordLayout
    description: Mapping[str, Any]
    """What trial.json states besides the identity and the machine."""

    @abstractmethod
    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Prepare the first step, or the step after a checkpoint (step and state)."""

    @abstractmethod
    def advance(self) -> EpochRecord | StepRecord | None:
        """Return the result of the next step; None after the last. Step 0 may come first."""

    @abstractmethod
    def state(self) -> bytes:
        """Return the state after this step, from which `start` continues."""

    def outcome(self, diverged: bool) -> tuple[int | None, Mapping[str, Any]]:
        """Return `diverged_epoch` and further entries of the commit."""
        return None, {}

    def release(self) -> None:
        """Free the memory once the unit is committed; the process stays for the next one."""
        return


class Attempt:
    """One attempt at a unit, which writes the record step by step.

    Parameters
    ----------
    folder
        The unit's folder.
    work
        Its computation.
    seen
        What the driver has seen of other attempts; None to supersede whatever there is.

    Raises
    ------
    SupersededError
        Another attempt has gone on since `seen`.
    """

    def __init__(self, folder: Folder, work: Work, seen: Trace | None = None) -> None:
        self._work = work
        self.record = TrialRecord(folder, work.identity, work.layout, seen)
        self.step = 0
        """The last step that is done."""

    def begin(self) -> None:
        """Prepare the step after the newest checkpoint that can be loaded, or the first step."""
        work = self._work
        self.record.describe({**work.description, **describe_machine()})
        while True:
            checkpoint = self.record.newest_checkpoint()
            try:
                work.start(checkpoint)
                break
            except UnusableCheckpointError:
                if checkpoint is None:  # another stored state is the cause
                    raise
                self.record.discard_checkpoint()
        self.step = checkpoint[0] if checkpoint else 0

    def advance(self) -> dict[str, Any]:
        """Perform one step; return its number and outcome, for the progress display."""
        try:
            return self._advance()
        except SupersededError:
            return {"epoch": self.step, "superseded": True, "done": True}

    def _advance(self) -> dict[str, Any]:
        record = self._work.advance()
        if record is not None and record.step == 0:
            self.record.write(record)
            record = self._work.advance()
        diverged = record is not None and record.diverged
        if record is not None:
            self.step = record.step
            self.record.write(record)
            # Nothing can continue from a diverged state; after a crash here, the unit continues
            # from the step before.
            if not diverged:
                self.record.checkpoint(self.step, self._work.state())
        done = diverged or self.step == self._work.layout.steps
        if done:
            self.record.commit(*self._work.outcome(diverged))
            self._work.release()
        return {"epoch": self.step, "diverged": diverged, "done": done}

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Write an error into the store, and re-raise it."""
        try:
            yield
        except WorkerDiedError:
            raise  # like the death of this process, not a failure of the unit
        except Exception as error:
            with suppress(Exception):  # the store may be the cause
                self.record.fail(error)
            raise


def perform(folder: Folder, work: Work, progress: Callable[[int, int], None]) -> None:
    """Perform a unit in this process.

    Parameters
    ----------
    folder
        The unit's folder.
    work
        Its computation.
    progress
        Called after each step with the number of steps done and of all.

    Raises
    ------
    SupersededError
        Another process performs the same unit.
    """
    attempt = Attempt(folder, work)
    with attempt.reporting():
        attempt.begin()
        done = False
        while not done:
            result = attempt.advance()
            if result.get("superseded"):
                raise SupersededError(
                    expected="to be the only process that computes this record",
                    got="a newer attempt, or a commit, by another one",
                    where=str(folder),
                    todo="let it finish, then run this again: what is committed is kept",
                )
            progress(attempt.step, work.layout.steps)
            done = result["done"]
