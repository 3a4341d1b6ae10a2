"""A committed trial of a study as a run that can be replayed, from its stored parameters.

Plain SGD has no state but the parameters. Under momentum and Adam, the optimizer's state before
each epoch is found by one forward replay (`forward_states`), as it is where parameters were not
stored after every epoch. Every replayed epoch is compared with the stored parameters, bit for bit.

Map: `TrialRun`; `needs_states`, `forward_states`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sampimp.config import TrialConfig
from sampimp.data import Dataset
from sampimp.errors import ConfigError, RecordError
from sampimp.importance.evaluation import evaluation_mode
from sampimp.importance.snapshot import forward_layers
from sampimp.influence.any_network import NetworkDerivatives
from sampimp.influence.fixed_point import LossPart
from sampimp.influence.gauss_newton import gauss_newton_products
from sampimp.influence.linear_stack import Curvature, LinearStackStep
from sampimp.influence.replay import Smoothing, StepDerivatives, gates_cannot_be_smoothed
from sampimp.influence.twice_differentiable import twice_differentiable
from sampimp.training.fused import FusedStep
from sampimp.training.loop import TrainingRun
from sampimp.training.models import flatten_parameters, load_parameters
from sampimp.training.strategies import Schedule

StoredParameters = Callable[[int], np.ndarray | None]
"""From a state (0: the start, t: after epoch t) to its parameters (P,); None if not stored."""


PART_SIZE = 1000
"""Samples of a part of the mean training loss (arbitrary; it bounds the memory)."""


class TrialRun:
    """A trial of a study, replayed; see `sampimp.influence.replay.ReplayableRun`.

    Parameters
    ----------
    config, data, schedule
        As for the training of the trial.
    parameters
        The trial's stored parameters.
    states
        From an epoch to the bytes of `TrainingRun.state` after it, from 0; None where `parameters`
        suffice (`needs_states`).

    Raises
    ------
    ConfigError
        Several workers shared the run.
    """

    clip_norm: float | None = None

    def __init__(
        self,
        config: TrialConfig,
        data: Dataset,
        schedule: Schedule,
        *,
        parameters: StoredParameters,
        states: Callable[[int], bytes] | None = None,
    ) -> None:
        self._run = _replayable(config, data, schedule)
        self._stored_parameters, self._states = parameters, states
        self.model, self.optimizer = self._run.model, self._run.optimizer
        self.parameters = list(self.model.parameters())
        self.epochs, self.sample_count = config.training.epochs, len(data.train_labels)
        self.epoch_labels = range(1, self.epochs + 1)
        self.layers = forward_layers(self.model, self._run.batch_data(np.arange(2))[0])
        step = self._run.step
        self._stack = step if isinstance(step, FusedStep) else None
        self.network = NetworkDerivatives(
            self.model, lambda batch: self.losses(batch)[1], self.parameters
        )
        self._is_first_of_epoch = True

    def losses(self, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the logits (N, classes) and the NLL (N,) of a batch, with their graph."""
        inputs, labels = self._run.batch_data(batch)
        logits = self.model(inputs).double()
        return logits, functional.cross_entropy(logits, labels, reduction="none")

    def load_start(self, epoch: int) -> None:
        """See `ReplayableRun`."""
        if self._states is not None:
            self._run.restore(self._states(epoch - 1), epoch - 1)
            return
        stored = self._stored_parameters(epoch - 1)
        assert stored is not None
        load_parameters(self.model, torch.from_numpy(stored))
        self.optimizer.state.clear()

    def begin(self, epoch: int) -> Sequence[np.ndarray]:
        """See `ReplayableRun`."""
        self._is_first_of_epoch = True
        return self._run.begin_epoch(epoch)

    def train(self, step: np.ndarray) -> None:
        """See `ReplayableRun`."""
        self._run.train_batch(step)

    def check_end(self, epoch: int) -> None:
        """See `ReplayableRun`."""
        _require_same(self._run, self._stored_parameters(epoch), epoch)

    def derivatives(self, step: np.ndarray, smoothing: Smoothing) -> StepDerivatives:
        """See `ReplayableRun`."""
        if self._stack is not None:
            return LinearStackStep(
                self._stack.layers,
                self._stack.activations,
                *self._run.batch_data(step),
                len(step),
                smoothing.gate_width,
            )
        if smoothing.gate_width:
            raise gates_cannot_be_smoothed(smoothing.gate_width)
        is_first, self._is_first_of_epoch = self._is_first_of_epoch, False
        weights = torch.full((len(step),), 1 / len(step), dtype=torch.float64)
        indices = [torch.from_numpy(step)]
        return self.network.at([step], [weights], indices=indices, first_of_epoch=is_first)

    def samples(self, step: np.ndarray) -> np.ndarray:
        """See `ReplayableRun`."""
        return step

    def loss_parts(self) -> Iterator[LossPart]:
        """Yield derivatives of parts of the mean training loss, for `fixed_point_influence`.

        They are at the model's present parameters, in evaluation mode, in the order of the samples.
        """
        with evaluation_mode(self.model):
            for start in range(0, self.sample_count, PART_SIZE):
                index = np.arange(start, min(start + PART_SIZE, self.sample_count))
                yield self.part_of_loss(index, self.sample_count)

    def part_of_loss(self, index: np.ndarray, denominator: int) -> LossPart:
        """Return the derivatives of some samples' losses, summed and divided by a number."""
        if self._stack is not None:
            return LinearStackStep(
                self._stack.layers,
                self._stack.activations,
                *self._run.batch_data(index),
                denominator,
            )
        return _NetworkPart(self, index, denominator)


class _NetworkPart:
    """A part of the mean training loss of a network of any kind; see `LossPart`."""

    def __init__(self, run: TrialRun, index: np.ndarray, denominator: int) -> None:
        self._run, self._index = run, index
        self._weights = torch.full((len(index),), 1 / denominator, dtype=torch.float64)
        self._step = run.network.at([index], [self._weights], indices=[torch.from_numpy(index)])

    def inner(self, directions: Sequence[Tensor]) -> Tensor:
        """See `LossPart`."""
        return self._step.inner(directions)

    def products(
        self, directions: Sequence[Tensor], out: Sequence[Tensor], *, curvature: Curvature
    ) -> Tensor:
        """See `LossPart`."""
        if curvature == "hessian":
            return self._step.products(directions, out)
        run = self._run
        with torch.enable_grad(), twice_differentiable(run.model):
            logits, losses = run.losses(self._index)
        weights = self._weights.to(losses)
        products = gauss_newton_products(logits, losses, weights, run.parameters, directions)
        for total, values in zip(out, products, strict=True):
            total += values
        return self._step.inner(directions)


def needs_states(config: TrialConfig) -> bool:
    """Return whether an epoch's replay needs more than the trial's stored parameters."""
    training = config.training
    return training.optimizer != "sgd" or training.parameters_every != 1


def forward_states(
    config: TrialConfig,
    data: Dataset,
    schedule: Schedule,
    *,
    parameters: StoredParameters,
    start: tuple[int, bytes] | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Train a trial once more, and yield its state after each epoch.

    Parameters
    ----------
    config, data, schedule, parameters
        As for `TrialRun`.
    start
        Epoch and state from which to continue. Default: the initial state, epoch 0, which is
        yielded as well.

    Returns
    -------
    iterator of int and bytes
        Epoch, from 0, and `TrainingRun.state` after it.

    Raises
    ------
    UnusableCheckpointError
        The state to start from is not one of the trial.
    RecordError
        An epoch ends at other parameters than those stored; raised by the iterator.
    """
    run = _replayable(config, data, schedule)
    if start is not None:
        run.restore(start[1], start[0])
    return _trained_states(run, parameters, yields_first=start is None)


def _trained_states(
    run: TrainingRun, parameters: StoredParameters, *, yields_first: bool
) -> Iterator[tuple[int, bytes]]:
    config = run.config
    if yields_first:
        _require_same(run, parameters(0), 0)
        yield 0, run.state()
    while run.epoch < config.training.epochs:
        for batch in run.begin_epoch(run.epoch + 1):
            run.train_batch(batch)
        run.epoch += 1
        _require_same(run, parameters(run.epoch), run.epoch)
        yield run.epoch, run.state()


def _replayable(config: TrialConfig, data: Dataset, schedule: Schedule) -> TrainingRun:
    if config.training.workers > 1:
        raise ConfigError(
            expected="a run that one worker trained",
            got=f"{config.training.workers} workers that shared each batch",
            where=f"{config.dataset}, {config.strategy}, seed {config.seed}",
            todo="train the study with --workers-per-trial 1: the order of sums over workers is "
            "not replayed",
        )
    return TrainingRun(config, data, schedule, record=False)


def _require_same(run: TrainingRun, stored: np.ndarray | None, epoch: int) -> None:
    """Raise RecordError unless the run's parameters are those stored after an epoch."""
    if stored is None:
        return
    replayed = flatten_parameters(run.model).float().cpu().numpy()
    if not np.array_equal(replayed, stored):
        raise RecordError(
            expected="a replay that ends at the stored parameters, bit for bit",
            got=f"a largest difference of {np.abs(replayed - stored).max():.1e}",
            where=f"{run.config.dataset}, {run.config.strategy}, seed {run.config.seed}, "
            f"epoch {epoch}",
            todo="replay on the kind of processor, and with the version of PyTorch, that trained "
            "it: trial.json names both",
        )
