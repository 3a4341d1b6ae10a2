"""One training run as Ray Tune sees it, resumed from the store alone.

Tune starts and stops a trial, and holds none of its state. A trial that starts on any machine reads
its newest checkpoint from the study's store and continues from there. If it fails, it writes the
error into the store. It stops if a newer attempt at the same trial has begun.

Map: `Trial`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray import tune

from sampimp.store.attempts import SupersededError
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.record import TrialRecord
from sampimp.sweeps.provenance import describe_machine
from sampimp.sweeps.team import Sources, Team, WorkerDiedError


class Trial(tune.Trainable):
    """A planned trial: each `step` is one epoch, trained, written and checkpointed.

    Ray keeps the process for the next trial (`reset_config`): starting Python and PyTorch takes as
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
        """Prepare the process; config["position"] is the trial's position in the plan."""
        self._folder = Folder.of(out)
        self._plan = Plan.from_json(plan)
        self._team = Team(out, self._plan, sources)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Accept another trial in the same process, without beginning an attempt.

        Tune starts a process for a trial, then gives the trial to a process that has become free
        meanwhile, and never asks the first for a step. An attempt begun here would end the other
        process's attempt.
        """
        self._next = new_config
        self._record: TrialRecord | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; return its number and outcome for the progress display."""
        with self._reporting():
            stored = self._record or self._begin(self._next)
            try:
                return self._train_epoch(stored)
            except SupersededError:
                return {"epoch": self._run.epoch, "superseded": True, "done": True}

    def _train_epoch(self, stored: TrialRecord) -> dict[str, Any]:
        record = next(self._records, None)
        if record is not None and record.epoch == 0:
            stored.write(record)
            record = next(self._records, None)
        diverged = record is not None and record.diverged
        if record is not None:
            stored.write(record)
            # Training cannot continue from a diverged state; after a crash here, the run
            # continues from the epoch before.
            if not diverged:
                stored.checkpoint(self._run.epoch, self._run.state())
        epoch = self._run.epoch
        done = diverged or epoch == self._plan.training.epochs
        if done:
            stored.commit(epoch if diverged else None)
            del self._run, self._records
            self._team.release()
        return {"epoch": epoch, "diverged": diverged, "done": done}

    def _begin(self, config: Mapping[str, Any]) -> TrialRecord:
        """Begin an attempt; an older attempt at the same trial stops."""
        trial = self._plan.trials()[config["position"]]
        identity = {
            "dataset": trial.dataset,
            "strategy": trial.strategy,
            "seed": trial.seed,
            "order_seed": trial.order_seed,
            "fingerprint": config["fingerprint"],
            "reference": config["reference_id"],
        }
        folder = self._folder / "trials" / config["trial_id"]
        stored = TrialRecord(folder, identity, self._plan.layout(trial.dataset))
        self._record = stored  # a failure can be written from here on
        folder.write_json(
            "trial.json",
            {**identity, "plan": self._plan.to_json()["training"], **describe_machine()},
        )
        self._run = self._team.start(config, stored.newest_checkpoint())
        self._records = self._team.records(self._run)
        return stored

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Write an error into the store, and raise it for Tune."""
        try:
            yield
        except WorkerDiedError:
            raise  # like the death of this process, not a failure of the trial
        except Exception as error:
            if self._record is not None:
                with suppress(Exception):  # the store may be the cause
                    self._record.fail(error)
            raise
