"""One training run as Ray Tune sees it: thin, and resumed from the store alone.

Tune starts, stops and retries it; it never holds its state. Wherever a trial starts, it looks for
its own newest checkpoint in the study's store and goes on from there; where it fails, it says so
in the store; and it stops where a newer attempt at the same trial has begun.
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
        """Get ready for the trial whose position in the plan is config["position"]."""
        self._folder = Folder.of(out)
        self._plan = Plan.from_json(plan)
        self._team = Team(out, self._plan, sources)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial in the same process, and do not begin it.

        Tune makes a process for a trial, gives the trial to one that has become free meanwhile, and
        never asks the first for a step: an attempt begun here would end the one that counts.
        """
        self._next = new_config
        self._record: TrialRecord | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch and return what the progress display shows."""
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
            # A diverged state is no state to go on from: after a crash here the epoch before is.
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
        """Begin an attempt: from here on an older one stops."""
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
        self._record = stored  # a failure has a place to be told now
        folder.write_json(
            "trial.json",
            {**identity, "plan": self._plan.to_json()["training"], **describe_machine()},
        )
        self._run = self._team.start(config, stored.newest_checkpoint())
        self._records = self._team.records(self._run)
        return stored

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Leave a word in the store of what goes wrong, and let Tune hear of it as well."""
        try:
            yield
        except WorkerDiedError:
            raise  # no failure of the trial's own, as little as the death of this process
        except Exception as error:
            if self._record is not None:
                with suppress(Exception):  # the store may be what went wrong
                    self._record.fail(error)
            raise
