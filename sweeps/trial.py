"""A unit of work as Ray Tune sees it, resumed from the store alone.

Tune starts and stops a trial, and holds none of its state. A trial that starts on any machine reads
its newest checkpoint from the study's store and continues from there. If it fails, it writes the
error into the store. It stops if a newer attempt at the same unit has begun, and does not begin if
another driver performs the unit.

Map: `Trial`; `TrainingWork`, a training run as a unit of work.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from sampimp.schema import EpochRecord
from sampimp.store.attempts import SupersededError, Trace
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.sweeps.derived_units import make_work
from sampimp.sweeps.team import Sources, Team
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.sweeps.work import Attempt, Work


class TrainingWork(Work):
    """A planned training run: each step is one epoch.

    Parameters
    ----------
    team
        The workers of the run.
    plan
        The plan of the study.
    config
        As `sampimp.sweeps.work.training_units` makes it.
    """

    def __init__(self, team: Team, plan: Plan, config: Mapping[str, Any]) -> None:
        trial = plan.trials()[config["position"]]
        self.identity = {
            "dataset": trial.dataset,
            "strategy": trial.strategy,
            "seed": trial.seed,
            "order_seed": trial.order_seed,
            "fingerprint": config["fingerprint"],
            "reference": config["reference_id"],
        }
        self.layout = plan.layout(trial.dataset)
        self.description = {"plan": plan.to_json()["training"]}
        self._team, self._config = team, config

    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Make the run in every worker."""
        self._run = self._team.start(self._config, checkpoint)
        self._records = self._team.records(self._run)

    def advance(self) -> EpochRecord | None:
        """Train one epoch."""
        return next(self._records, None)

    def state(self) -> bytes:
        """Return the state of the run."""
        return self._run.state()

    def outcome(self, diverged: bool) -> tuple[int | None, Mapping[str, Any]]:
        """Return the epoch in which the run diverged."""
        return (self._run.epoch if diverged else None), {}

    def release(self) -> None:
        """Drop the run in every worker."""
        del self._run, self._records
        self._team.release()


class Trial(tune.Trainable):
    """A unit of work: each `step` is one of its steps, computed, written and checkpointed.

    Ray keeps the process for the next unit (`reset_config`): starting Python and PyTorch takes as
    long as training the digits.
    """

    def setup(  # type: ignore[override]  # tune.with_parameters adds the keywords
        self,
        config: dict[str, Any],
        *,
        out: str,
        plan: Mapping[str, Any],
        sources: Sources,
    ) -> None:
        """Prepare the process; `sampimp.sweeps.work.Unit.config` says what the unit is."""
        self._folder, self._plan = Folder.of(out), Plan.from_json(plan)
        self._team = Team(out, self._plan, sources) if config["kind"] == "train" else None
        self._inputs = TrialInputs(self._folder, self._plan, lambda key: ray.get(sources[key]))
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Accept another unit in the same process, without beginning an attempt.

        Tune starts a process for a trial, then gives the trial to a process that has become free
        meanwhile, and never asks the first for a step. An attempt begun here would end the other
        process's attempt.
        """
        self._next = new_config
        self._attempt: Attempt | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Perform one step; return its number and outcome for the progress display."""
        attempt, begins = self._attempt, self._attempt is None
        if attempt is None:
            # An older attempt at the same unit stops; a failure can be written from here on.
            folder, seen = self._folder / self._next["folder"], Trace(*self._next["seen"])
            try:
                attempt = Attempt(folder, self._make_work(self._next), seen)
            except SupersededError:  # another driver performs it
                return {"epoch": 0, "superseded": True, "done": True}
            self._attempt = attempt
        with attempt.reporting():
            if begins:
                attempt.begin()
            return attempt.advance()

    def _make_work(self, config: Mapping[str, Any]) -> Work:
        if self._team is not None:
            return TrainingWork(self._team, self._plan, config)
        return make_work(self._folder, self._plan, self._inputs, config)
