"""A study, and the units of work of one command on its committed runs.

Map: `DerivedStudy`; `run_here`, which performs them in this process, without Ray.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sampimp.data import Source
from sampimp.errors import RecordError
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.sweeps.derived_units import DerivedUnits, make_work
from sampimp.sweeps.inspection import inspect
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.sweeps.work import Unit, perform


@dataclass(frozen=True, kw_only=True)
class DerivedStudy:
    """A study, and the units of work of one command on it."""

    folder: Folder
    plan: Plan
    sources: Mapping[str, Source]
    """The data sets of the runs, by key."""
    units: DerivedUnits
    words: tuple[str, str]
    """What the units and their steps are called, in the plural."""
    step_seconds: Callable[[Unit], float]
    """Measures the duration of a unit's step on this machine."""

    def waiting_words(self, units: Sequence[Unit]) -> list[str]:
        """Return a line for each run that units wait for, with its progress."""
        awaited = {unit.awaits for unit in units if unit.awaits}
        return [
            f"Waiting for {status.trial.label}: {status.state}"
            + (f", {status.detail}" if status.detail else "")
            + (". `sampimp study` trains it" if status.state in ("waiting", "stopped") else "")
            for status in (inspect(self.folder, self.plan) if awaited else ())
            if status.trial.label in awaited
        ]


def run_here(
    study: DerivedStudy, progress: Callable[[str, int, int], None] = lambda label, step, steps: None
) -> None:
    """Perform the units that the store lacks in this process, one after the other, without Ray.

    Parameters
    ----------
    study
        The units.
    progress
        Called after each step with the unit's label, the number of steps done, and of all.

    Raises
    ------
    RecordError
        A run is not committed.
    """
    inputs = TrialInputs(study.folder, study.plan, study.sources.__getitem__)
    while missing := [unit for unit in study.units.resolve() if unit.commit is None]:
        unit = next((unit for unit in missing if unit.folder is not None), None)
        if unit is None:
            raise RecordError(
                expected="a run that trained to its end",
                got="; ".join(study.waiting_words(missing)) or "one that diverged",
                where=str(study.folder),
                todo="let `sampimp study` finish it first; the command `sampimp influence` waits",
            )
        label = unit.label
        work = make_work(study.folder, study.plan, inputs, unit.config)
        perform(
            study.folder / str(unit.folder),
            work,
            lambda step, steps, label=label: progress(label, step, steps),  # type: ignore[misc]
        )
