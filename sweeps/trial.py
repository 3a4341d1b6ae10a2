"""One training run as Ray Tune sees it: thin, and resumed from the store alone.

Tune starts, stops and retries it; it never holds its state. Wherever a trial starts, it looks for
its own newest checkpoint in the study's store and goes on from there; where it fails, it says so
in the store; and it stops where a newer attempt at the same trial has begun.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import tune

from sampimp.config import TrialConfig
from sampimp.data import Dataset, Source, scale_inputs
from sampimp.folder import Folder
from sampimp.plan import Plan
from sampimp.schema import Layout
from sampimp.store import SupersededError, TrialRecord, read_difficulty
from sampimp.strategies import SORT_KEY, Schedule, make_schedule
from sampimp.training import TrainingRun
from sweeps.provenance import describe_machine


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
        sources: Mapping[str, "ray.ObjectRef[Source]"],
    ) -> None:
        """Get ready for the trial whose position in the plan is config["position"]."""
        self._folder = Folder.of(out)
        self._plan = Plan.from_json(plan)
        self._sources = sources
        self._data: tuple[str, Dataset] | None = None
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Get ready for another trial in the same process."""
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch and return what the progress display shows."""
        with self._reporting():
            try:
                return self._train_epoch()
            except SupersededError:
                return {"epoch": self._run.epoch, "superseded": True, "done": True}

    def _train_epoch(self) -> dict[str, Any]:
        record = next(self._records, None)
        if record is not None and record.epoch == 0:
            self._record.write(record)
            record = next(self._records, None)
        diverged = record is not None and record.diverged
        if record is not None:
            self._record.write(record)
            # A diverged state is no state to go on from: after a crash here the epoch before is.
            if not diverged:
                self._record.checkpoint(self._run.epoch, self._run.state())
        done = diverged or self._run.epoch == self._plan.training.epochs
        if done:
            self._record.commit(self._run.epoch if diverged else None)
        return {"epoch": self._run.epoch, "diverged": diverged, "done": done}

    def _start(self, config: Mapping[str, Any]) -> None:
        trial = self._plan.trials()[config["position"]]
        layout = self._plan.layout(trial.dataset)
        identity = {
            "dataset": trial.dataset,
            "strategy": trial.strategy,
            "seed": trial.seed,
            "order_seed": trial.order_seed,
            "fingerprint": config["fingerprint"],
            "reference": config["reference_id"],
        }
        folder = self._folder / "trials" / config["trial_id"]
        # First of all: from here on an older attempt stops, and a failure has a place to be told.
        self._record = TrialRecord(folder, identity, layout)
        with self._reporting():
            folder.write_json(
                "trial.json",
                {**identity, "plan": self._plan.to_json()["training"], **describe_machine()},
            )
            self._run = TrainingRun(trial, self._read_data(trial), self._schedule(config, layout))
            checkpoint = self._record.newest_checkpoint()
            if checkpoint is not None:
                epoch, state = checkpoint
                self._run.restore(state, epoch)
            self._records = self._run.records()

    def _read_data(self, trial: TrialConfig) -> Dataset:
        if self._data is None or self._data[0] != trial.dataset:
            self._data = None  # before the next one is made: two may not fit
            source = ray.get(self._sources[trial.dataset])
            scaling = self._plan.training.input_scaling
            self._data = trial.dataset, scale_inputs(source, scaling)
        return self._data[1]

    def _schedule(self, config: Mapping[str, Any], layout: Layout) -> Schedule:
        trial = self._plan.trials()[config["position"]]
        difficulty = None
        if config["reference_id"]:
            reference = self._folder / "trials" / config["reference_id"]
            difficulty = read_difficulty(reference, SORT_KEY[trial.strategy], layout)
        batch_size = self._plan.training.batch_size
        return make_schedule(
            trial.strategy, layout.sample, batch_size, trial.order_seed, difficulty
        )

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Leave a word in the store of what goes wrong, and let Tune hear of it as well."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # the store may be what went wrong
                self._record.fail(error)
            raise
