"""Influence of the samples of a committed run, as units of work.

    states      the run trained once more, its state kept after every epoch (momentum, Adam)
    influence   the reverse pass for a block of targets, one epoch a step, the last epoch first
    probes      the same for random probes, of which only squares are kept

Map: `ReplayedRun` (what a worker needs of the run); `RunWork` (base class), `StatesWork`,
`InfluenceWork`; `named_targets`.
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sampimp.data import Dataset
from sampimp.errors import RecordError
from sampimp.influence.replay import Smoothing
from sampimp.influence.reverse_pass import LARGEST_GROWTH, EpochInfluence, ReversePass
from sampimp.influence.targets import Target, make_targets
from sampimp.influence.trial_run import TrialRun, forward_states
from sampimp.schema import StepRecord
from sampimp.store.commits import read_commit
from sampimp.store.influence_layouts import (
    OVERALL,
    InfluenceLayout,
    layout_of,
    probe_layer,
)
from sampimp.store.influence_records import require_record
from sampimp.store.integrity import record_digest
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.variables import StoredFiles, StoredVariable
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.sweeps.work import Work
from sampimp.training.checkpoint_states import load_arrays, restoring, unusable
from sampimp.training.identity import require_network


class ReplayedRun:
    """A committed run of a study, as its units of work need it.

    Parameters
    ----------
    folder, plan, inputs
        The study's store, its plan, and what its trials train on.
    config
        The configuration of the unit: "position" of the run in the plan, "trial_id",
        "reference_id", and "identity" of the record.

    Raises
    ------
    RecordError
        The run's record is no longer the one that the unit was planned for.
    """

    def __init__(
        self, folder: Folder, plan: Plan, inputs: TrialInputs, config: Mapping[str, Any]
    ) -> None:
        self.folder, self.plan = folder, plan
        self.trial = plan.trials()[config["position"]]
        self._inputs, self._reference_id = inputs, config["reference_id"]
        self.layout = plan.layout(self.trial.dataset)
        place = folder / "trials" / config["trial_id"]
        commit = read_commit(place)
        expected = config["identity"]["record"]
        if commit is None or record_digest(commit) != expected:
            raise RecordError(
                expected=f"the record with digest {expected[:16]}",
                got="a trial that is not committed" if commit is None else "another record",
                where=str(place),
                todo="run the same command again: it starts from the record as it is now",
            )
        self._stored = StoredVariable.of(place, "parameters", self.layout, commit)

    def open(self) -> tuple[Any, Dataset, Any]:
        """Return configuration, data and schedule of the run, and set the number of threads."""
        torch.set_num_threads(self.plan.training.threads)
        schedule = self._inputs.schedule(self.trial, self._reference_id)
        return self.trial, self._inputs.data(self.trial), schedule

    def parameters(self, state: int) -> np.ndarray | None:
        """Return the parameters of a state, 0 for the start; None if they are not stored."""
        if state not in self.layout.states:
            return None
        return self._stored.read(self.layout.states.index(state))

    def check_network(self, model: torch.nn.Module) -> None:
        """Raise ConfigError unless a user's own network is that of the study."""
        info = self.plan.datasets[self.trial.dataset]
        require_network(self.plan.training.model, model, info.network)


class RunWork(Work):
    """A unit of work on a committed run."""

    def __init__(
        self, folder: Folder, plan: Plan, inputs: TrialInputs, config: Mapping[str, Any]
    ) -> None:
        self.run = ReplayedRun(folder, plan, inputs, config)
        self.identity, self.config = config["identity"], config
        self.layout = layout_of(self.identity, self.run.layout)
        self.description = {"plan": plan.to_json()["training"]}


class StatesWork(RunWork):
    """The forward replay of a run: step t yields the state after epoch t."""

    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Begin at the start of the run, or after the epoch of a checkpoint."""
        self._states = forward_states(
            *self.run.open(), parameters=self.run.parameters, start=checkpoint
        )

    def advance(self) -> StepRecord | None:
        """Train one epoch; return the state after it."""
        begun = time.perf_counter()
        epoch, self._state = next(self._states, (0, b""))
        if not self._state:
            return None
        seconds = time.perf_counter() - begun
        return StepRecord(step=epoch, arrays={"training_state": self._state}, seconds=seconds)

    def state(self) -> bytes:
        """Return the run's state."""
        return self._state

    def release(self) -> None:
        """Drop the run."""
        del self._states, self._state


class InfluenceWork(RunWork):
    """The reverse pass of a run for a block of targets, all probes or none."""

    layout: InfluenceLayout

    def start(self, checkpoint: tuple[int, bytes] | None) -> None:
        """Begin at the end of the run, or before the epoch of a checkpoint."""
        config, data, schedule = self.run.open()
        run = TrialRun(
            config, data, schedule, parameters=self.run.parameters, states=self._stored_states()
        )
        self.run.check_network(run.model)
        targets = named_targets(self.identity["targets"], data, run.layers)
        self._pass = ReversePass(
            run,
            targets,
            smoothing=Smoothing(**self.identity["smoothing"]),
            memory=self.config["memory"],
        )
        self._values = _require_finite(targets, [target.value(run.model) for target in targets])
        self._totals = np.zeros((len(targets), self.layout.sample))
        self._growth: dict[str, int] = {}
        if checkpoint is not None:
            self._restore(checkpoint[1])
        self._epochs = self._pass.epochs()

    def _stored_states(self) -> Callable[[int], bytes] | None:
        """Return the reader of the run's states; None if its parameters suffice."""
        name = self.config["states"]
        if name is None:
            return None
        record = require_record(self.run.folder, name, "states", self.run.layout)
        stored = record.variable("training_state")
        assert isinstance(stored, StoredFiles)
        return stored.read

    def advance(self) -> StepRecord | None:
        """Go through one epoch; the last step adds what is summed over all epochs."""
        begun = time.perf_counter()
        epoch = next(self._epochs, None)
        if epoch is None:
            return None
        self._totals += epoch.influence.astype(np.float64).sum(1)
        growth = epoch.adjoint_norm / self._pass.initial_norm
        for target, factor in zip(self.layout.targets, growth, strict=True):
            if factor > LARGEST_GROWTH:
                self._growth.setdefault(target, epoch.epoch)
        return StepRecord(
            step=self.layout.epoch + 1 - epoch.epoch,
            arrays=self._arrays(epoch, is_last=epoch.epoch == 1),
            seconds=time.perf_counter() - begun,
        )

    def _arrays(self, epoch: EpochInfluence, is_last: bool) -> dict[str, np.ndarray]:
        arrays = {"adjoint_norm": epoch.adjoint_norm}
        names = self.layout.variables
        if "influence" in names:
            arrays["influence"] = epoch.influence.astype(np.float32)
            if is_last:
                arrays["influence_total"] = self._totals.astype(np.float32)
            return arrays
        layers = np.array([probe_layer(target) for target in self.layout.targets])
        if "arriving_importance" in names:
            arrays["arriving_importance"] = _mean_square(epoch.influence[layers == OVERALL])
            if is_last:
                arrays["final_importance_total"] = _mean_square(self._totals[layers == OVERALL])
        if is_last and "final_importance" in names:
            names_of_layers = self._pass.run.layers
            arrays["final_importance"] = np.stack(
                [_mean_square(self._totals[layers == layer]) for layer in names_of_layers]
            )
        return arrays

    def state(self) -> bytes:
        """Return the adjoints, and the sums over the epochs so far."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            reverse=np.frombuffer(self._pass.state(), np.uint8),
            totals=self._totals,
            growth=np.array([self._growth.get(target, 0) for target in self.layout.targets]),
        )
        return buffer.getvalue()

    def _restore(self, state: bytes) -> None:
        what = f"the influence on {len(self.layout.targets)} targets"
        with restoring(what):
            stored = load_arrays(state)
            self._pass.restore(stored["reverse"].tobytes())
            totals, growth = stored["totals"], stored["growth"]
            if totals.shape != self._totals.shape or totals.dtype != np.float64:
                raise unusable(what, f"sums {totals.dtype} {list(totals.shape)}")
            epochs = zip(self.layout.targets, growth.tolist(), strict=True)
            self._growth = {target: epoch for target, epoch in epochs if epoch}
        self._totals = totals

    def outcome(self, diverged: bool) -> tuple[int | None, Mapping[str, Any]]:
        """Return where the derivative grew too much, and the targets themselves."""
        return None, {"growth_epochs": self._growth, "target_values": self._values}

    def release(self) -> None:
        """Drop the run and the adjoints."""
        del self._pass, self._epochs, self._totals


def named_targets(names: Sequence[str], data: Dataset, layers: Sequence[str]) -> list[Target]:
    """Return targets by their names, in which a probe has a number and not a count.

    Parameters
    ----------
    names
        As `Target.name`.
    data, layers
        As for `sampimp.influence.targets.make_targets`.
    """
    targets: dict[str, Target] = {}
    for name in names:
        layer, spec = probe_layer(name), name
        if name in targets:
            continue
        if layer is not None:
            count = 1 + max(_number(other) for other in names if probe_layer(other) == layer)
            spec = f"probe:{count}@{layer}" if layer else f"probe:{count}"
        targets |= {target.name: target for target in make_targets([spec], data, layers)}
    return [targets[name] for name in names]


def _number(probe: str) -> int:
    return int(probe.partition(":")[2].partition("@")[0])


def _require_finite(targets: Sequence[Target], values: list[float]) -> list[float]:
    for target, value in zip(targets, values, strict=True):
        if not np.isfinite(value):
            raise RecordError(
                expected="a target with a finite value at the final parameters",
                got=str(value),
                where=f"target {target.name}",
                todo="leave the target out, or choose a bounded one such as mean-error",
            )
    return values


def _mean_square(values: np.ndarray) -> np.ndarray:
    """Return the mean square over the first dimension, float32; NaN where there are no values."""
    if not len(values):
        return np.full(values.shape[1:], np.nan, np.float32)
    return np.square(values, dtype=np.float64).mean(0).astype(np.float32)
