"""Subsets found by exchange: the derivative of a training says which samples to swap.

    S = a subset with equally many samples of each class
    for round r = 1 .. R:
        train a smooth surrogate on S, from the initialisation of seed r
        T = mean of 1 - p(class) over the pool, a bounded target without test labels
        reverse pass: dT/dv of the samples of S, and of others that ride along with weight 0
        swap the samples of S that raise T most for the others that would lower it most

A sample that rides along enters no gradient; its influence is what its weight would do if it were
in the batch. Samples are compared by their influence per visit. The number of swaps falls linearly
to 0. The result is the subset of the round with the lowest T.

Map: `MetagradientSearch`; `RidingRun` (a run with samples that ride along).

References
----------
Engstrom et al. (2025), Optimizing ML training with metagradient descent.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampimp.config import RELU_MODELS, TrialConfig
from sampimp.data import Dataset
from sampimp.influence.replay import Smoothing, StepDerivatives
from sampimp.influence.reverse_pass import InfiniteDerivativeError, ReversePass
from sampimp.influence.targets import MeanTarget, error_probability
from sampimp.influence.trial_run import TrialRun, forward_states
from sampimp.subsets.rules import Pool, select
from sampimp.subsets.training import subset_schedule
from sampimp.training.checkpoint_states import load_arrays, restoring, unusable
from sampimp.training.strategies import Schedule

ROUNDS = 20
"""Rounds of training and exchange (16 to 24 were tried on MNIST's first 10,000 images)."""

SURROGATE_STEPS = 1000
"""Steps of a surrogate's training, at most (arbitrary; it bounds the time of a round)."""

SURROGATE_EPOCHS = 10
"""Parts into which a surrogate's training is divided; the reverse pass replays one at a time."""

FIRST_SWAPS = 0.1
"""Share of the subset that the first round may swap: with 0.3 the search diverged on the digits."""


@dataclass(frozen=True)
class RidingStep:
    """A batch that is trained, and samples that ride along."""

    batch: np.ndarray
    riders: np.ndarray


class RidingDerivatives:
    """Derivatives of a step's loss, and the inner products of samples that ride along."""

    def __init__(self, own: StepDerivatives, riders: Any) -> None:
        self._own, self._riders = own, riders
        self.precision = own.precision

    def gradients(self) -> Sequence[Tensor | None]:
        """See `StepDerivatives`."""
        return self._own.gradients()

    def sample_gradients(self, positions: Sequence[int]) -> Sequence[Tensor]:
        """See `StepDerivatives`."""
        return self._own.sample_gradients(positions)

    def products(self, directions: Sequence[Tensor], out: Sequence[Tensor]) -> Tensor:
        """See `StepDerivatives`; the samples of the batch come first."""
        riders_KLR = self._riders.inner(directions)
        return torch.cat([self._own.products(directions, out), riders_KLR], 2)


class RidingRun(TrialRun):
    """A run of a subset, in each of whose steps other samples ride along with weight 0.

    Parameters
    ----------
    config, data, schedule
        The training; the schedule's batches have samples of the subset alone.
    states
        From an epoch to the bytes of `TrainingRun.state` after it.
    riders
        From an epoch to the samples that ride along in each of its steps.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: Dataset,
        schedule: Schedule,
        *,
        states: dict[int, bytes],
        riders: Schedule,
    ) -> None:
        super().__init__(
            config, data, schedule, parameters=lambda state: None, states=states.__getitem__
        )
        self._riders = riders

    def begin(self, epoch: int) -> Sequence[Any]:
        """See `ReplayableRun`."""
        batches = super().begin(epoch)
        return [RidingStep(*pair) for pair in zip(batches, self._riders(epoch), strict=True)]

    def train(self, step: Any) -> None:
        """See `ReplayableRun`."""
        super().train(step.batch)

    def derivatives(self, step: Any, smoothing: Smoothing) -> StepDerivatives:
        """See `ReplayableRun`; the samples that ride along come after the batch."""
        riders = self.part_of_loss(step.riders, len(step.batch))
        return RidingDerivatives(super().derivatives(step.batch, smoothing), riders)

    def samples(self, step: Any) -> np.ndarray:
        """See `ReplayableRun`."""
        return np.concatenate([step.batch, step.riders])


class MetagradientSearch:
    """The search for a subset; see the head of this module.

    Parameters
    ----------
    config
        The study's training. Its seed is added to the number of the round.
    data
        The data set, whose training part is the pool.
    count
        Size of the subset.
    """

    def __init__(self, config: TrialConfig, data: Dataset, count: int) -> None:
        self._config, self._data, self._count = config, data, count
        self.round = 0
        """Rounds that are done."""
        pool = Pool(labels=data.train_labels, scores={})
        self._selected = select("balanced", pool, count, config.seed)
        self.best, self.best_value = self._selected, np.inf
        """The subset with the lowest target so far, sorted positions, and its target."""

    def advance(self) -> float:
        """Perform a round; return the target of the subset that it began with.

        After a surrogate that diverged (NaN), or whose derivative did, the search goes on from the
        best subset so far.
        """
        self.round += 1
        run, visits = self._surrogate()
        target = MeanTarget(
            "pool-error",
            "1",
            error_probability,
            *(torch.from_numpy(values) for values in self._data[:2]),
        )
        run.load_start(run.epochs + 1)
        value = target.value(run.model)
        if value < self.best_value:
            self.best, self.best_value = self._selected, value
        if self.round == ROUNDS or self._count == len(visits):
            return value
        influence_N = _influence(run, target) if np.isfinite(value) else None
        if influence_N is None:
            self._selected = self.best
        else:
            self._swap(influence_N, visits)
        return value

    def _surrogate(self) -> tuple[RidingRun, np.ndarray]:
        """Train the surrogate on the subset; return the run, and how often each sample is seen."""
        training, seed = self._config.training, self._config.seed + self.round
        size, count = training.batch_size, len(self._data.train_labels)
        steps = min(SURROGATE_STEPS, training.epochs * -(-count // size))
        epochs = min(SURROGATE_EPOCHS, steps)
        training = replace(training, epochs=epochs)
        if training.model in RELU_MODELS and training.activation == "relu":
            training = replace(training, activation="gelu")
        config = replace(self._config, seed=seed, order_seed=seed, training=training)
        chosen = subset_schedule(self._count, size, seed, steps // epochs)
        others = np.setdiff1d(np.arange(count), self._selected)
        riding = subset_schedule(len(others), size, seed, steps // epochs)

        def batches(epoch: int) -> list[np.ndarray]:
            return [self._selected[batch] for batch in chosen(epoch)]

        def riders(epoch: int) -> list[np.ndarray]:
            return [others[batch] for batch in riding(epoch)] if len(others) else []

        states = dict(forward_states(config, self._data, batches, parameters=lambda state: None))
        run = RidingRun(config, self._data, batches, states=states, riders=riders)
        seen = np.concatenate(
            [batch for epoch in range(1, epochs + 1) for batch in batches(epoch) + riders(epoch)]
        )
        return run, np.bincount(seen, minlength=count)

    def _swap(self, influence_N: np.ndarray, visits_N: np.ndarray) -> None:
        """Exchange the worst samples of the subset for the best of the others, where those win."""
        with np.errstate(invalid="ignore"):  # NaN for a sample that was never seen
            by_visit_N = influence_N / visits_N
        inside = np.zeros(len(by_visit_N), bool)
        inside[self._selected] = True
        seen = visits_N > 0
        worst = _ordered(-by_visit_N, inside & seen)
        best = _ordered(by_visit_N, ~inside & seen)
        limit = int(FIRST_SWAPS * self._count * (1 - self.round / ROUNDS)) or 1
        pairs = min(limit, len(worst), len(best))
        wins = by_visit_N[best[:pairs]] < by_visit_N[worst[:pairs]]
        inside[worst[:pairs][wins]] = False
        inside[best[:pairs][wins]] = True
        self._selected = np.flatnonzero(inside)

    def state(self) -> bytes:
        """Return the state after this round, from which `restore` continues."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            round=self.round,
            selected=self._selected,
            best=self.best,
            best_value=self.best_value,
        )
        return buffer.getvalue()

    def restore(self, state: bytes) -> None:
        """Continue from the state of the same search.

        Raises
        ------
        UnusableCheckpointError
            The state is that of another search, or none.
        """
        what = f"a search for {self._count} samples"
        with restoring(what):
            stored = load_arrays(state)
            done, value = int(stored["round"]), float(stored["best_value"])
            for name in ("selected", "best"):
                positions = stored[name]
                if positions.dtype != np.int64 or positions.shape != (self._count,):
                    raise unusable(what, f"{name} {positions.dtype} {list(positions.shape)}")
                if not 0 <= positions.min() <= positions.max() < len(self._data.train_labels):
                    raise unusable(what, f"positions outside of the samples in {name}")
            if not 0 <= done <= ROUNDS:
                raise unusable(what, f"round {done}")
        self.round, self.best_value = done, value
        self._selected, self.best = stored["selected"], stored["best"]


def _influence(run: RidingRun, target: MeanTarget) -> np.ndarray | None:
    """Return the total influence of each sample (N,), 0 if unused; None if it is not finite."""
    total = np.zeros(run.sample_count)
    try:
        for epoch in ReversePass(run, [target]).epochs():
            total += np.nan_to_num(epoch.influence[0].sum(0, dtype=np.float64))
    except InfiniteDerivativeError:
        return None
    return total


def _ordered(values: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return the usable positions, the lowest value first."""
    positions = np.flatnonzero(usable)
    return positions[np.argsort(values[positions], kind="stable")]
