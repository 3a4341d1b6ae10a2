"""A study that is run by its own code in this process, without Ray.

Map: `begin`, `command` (what `sampimp study` does between its start and its end), `values_of` (what
must be the same after any fault).
"""

from collections.abc import Callable
from typing import Any

from oracles import make_source
from rich.console import Console

from sampimp.data import Source
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.sweeps.machines import Cluster
from sampimp.sweeps.options import StudyConfig
from sampimp.sweeps.run import write_plan
from sampimp.sweeps.study import Study, prepare_study
from sampimp.sweeps.trial import TrainingWork
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.sweeps.work import perform, training_units
from sampimp.training.loop import TrainingRun

QUIET = Console(quiet=True)


def make_config(out: Any, **changes: Any) -> StudyConfig:
    """Return the options of a study of three runs of three epochs; nlo sorts by shuffle."""
    settings = {
        "datasets": ("digits",),
        "strategies": ("shuffle", "nlo"),
        "reference_seeds": (1, 2),
        "seeds": (1,),
        "hidden": (5, 4),
        "epochs": 3,
        "batch_size": 5,
        "parameters_every": 2,
        "out": str(out),
    }
    return StudyConfig(**(settings | changes))


class TeamHere:
    """The workers of a trial: this process."""

    def __init__(self, inputs: TrialInputs, plan: Any) -> None:
        self._inputs, self._plan = inputs, plan

    def start(self, config: Any, checkpoint: tuple[int, bytes] | None) -> TrainingRun:
        trial = self._plan.trials()[config["position"]]
        schedule = self._inputs.schedule(trial, config["reference_id"])
        run = TrainingRun(trial, self._inputs.data(trial), schedule)
        if checkpoint is not None:
            run.restore(checkpoint[1], checkpoint[0])
        return run

    def records(self, run: TrainingRun) -> Any:
        return run.records()

    def release(self) -> None:
        pass


def begin(config: StudyConfig, source: Source | None = None) -> Study:
    """Store the plan and the data set of a study, by default 24 random images."""
    source = source or make_source(name="digits")
    study = prepare_study(config, lambda: Cluster("here", ()), lambda *_: source, QUIET)
    return write_plan(study, QUIET)


def command(
    config: StudyConfig,
    step_done: Callable[[str, int], None] = lambda label, step: None,
    committed: Callable[[str], None] = lambda label: None,
    source: Source | None = None,
) -> None:
    """Train what the store lacks.

    Parameters
    ----------
    config
        The options of the study.
    step_done, committed
        Called after each epoch, and after each commit, with the label of the run.
    source
        The data set; by default 24 random images.
    """
    study = begin(config, source)
    folder, plan = study.folder, study.plan
    inputs = TrialInputs(folder, plan, study.sources.__getitem__)
    for _ in range(2):  # the references first
        for unit in training_units(plan, plan.resolve(read_commits(folder))):
            if unit.folder is not None and unit.commit is None:
                work = TrainingWork(TeamHere(inputs, plan), plan, unit.config)  # type: ignore[arg-type]
                report = lambda step, of, label=unit.label: step_done(label, step)  # noqa: E731
                perform(folder / unit.folder, work, report)
                committed(unit.label)


def values_of(out: Any) -> dict[str, Any]:
    """Return value digests and curves of every run, by label; None of a run that is missing."""
    folder = Folder.of(out)
    trials = require_plan(folder).resolve(read_commits(folder))
    return {
        trial.label: trial.commit
        and {name: trial.commit[name] for name in ("digests", "curves", "diverged_epoch")}
        for trial in trials
    }
