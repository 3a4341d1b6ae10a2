"""A loop of your own, recorded by `ImportanceRecorder(..., keep_steps=True)`, to be replayed.

Map: `RecordedLoop`.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sampimp.config import check_choice
from sampimp.errors import ConfigError, RecordError
from sampimp.importance.recorded_step import RecordedStep
from sampimp.influence.any_network import NetworkDerivatives
from sampimp.influence.replay import Smoothing, StepDerivatives, gates_cannot_be_smoothed

Losses = Callable[[nn.Module, np.ndarray], Tensor]
"""From the model and the index of samples (N,) to each sample's loss (N,)."""


class RecordedLoop:
    """The steps of a recorded loop, with the model's states between its epochs.

    Parameters
    ----------
    model, optimizer
        The objects of the loop. Their state changes during the replay.
    steps
        `ImportanceRecorder.steps`, or that of an integration.
    losses
        Function from the model and the index of N samples to each sample's loss, (N,), before the
        mean: `cross_entropy(model(inputs[index]), labels[index], reduction="none")`. The inputs of
        a sample must be those of the recorded step (no random augmentation).
    starts
        State dicts before each epoch: ``{epoch: {"model": model.state_dict(), "optimizer":
        optimizer.state_dict()}}``, and the final one under the last epoch plus one.
    sample_count
        Size of the training set. Default: the largest index recorded, plus one.
    reduction
        How the loop reduced the losses of a backward pass: "mean" or "sum". Under "mean", several
        passes of one step are averaged.
    clip_norm
        The loop's `max_norm` of `clip_grad_norm_`.
    tolerance
        Largest difference of a replayed epoch's end from the stored state, relative to the change
        of the parameters in that epoch.

    Raises
    ------
    ConfigError
        A state is missing, or gradients were scaled and no `clip_norm` is given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: Sequence[RecordedStep],
        losses: Losses,
        starts: Mapping[int, Mapping[str, Any]],
        *,
        sample_count: int | None = None,
        reduction: str = "mean",
        clip_norm: float | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        check_choice(reduction, ("mean", "sum"), "reduction")
        self.model, self.optimizer, self.clip_norm = model, optimizer, clip_norm
        self._losses, self._starts = losses, starts
        self._reduction, self._tolerance = reduction, tolerance
        self.epoch_labels = sorted({step.epoch for step in steps})
        """The recorded epochs, in order."""
        self.epochs = len(self.epoch_labels)
        self._steps = [
            [step for step in steps if step.epoch == label] for label in self.epoch_labels
        ]
        self._check(steps)
        largest = max(int(step.index.max()) for step in steps)
        self.sample_count = largest + 1 if sample_count is None else sample_count
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.parameters = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and id(parameter) in updated
        ]
        self._network = NetworkDerivatives(
            model, lambda index: losses(model, index), self.parameters
        )
        self._is_first_of_epoch = True

    @property
    def layers(self) -> Sequence[str]:
        """Names of the layers, in forward order once a step was differentiated."""
        return self._network.layers

    def _check(self, steps: Sequence[RecordedStep]) -> None:
        if not steps:
            raise ConfigError(
                expected="the steps of a recorded loop",
                got="none",
                where="RecordedLoop, steps",
                todo="record with ImportanceRecorder(..., keep_steps=True), and pass its `steps`",
            )
        missing = [
            label for label in (*self.epoch_labels, self._final) if label not in self._starts
        ]
        if missing:
            raise ConfigError(
                expected="the state before each recorded epoch, and the final one under "
                f"{self._final}",
                got=f"none under {', '.join(map(str, missing))}",
                where="RecordedLoop, starts",
                todo="keep copies of the state dicts of model and optimizer before each epoch, and "
                "after the last",
            )
        if self.clip_norm is None and any(step.is_scaled for step in steps):
            raise ConfigError(
                expected="the largest norm to which gradients were clipped",
                got="none, but gradients were multiplied by a factor",
                where="RecordedLoop, clip_norm",
                todo="pass the loop's max_norm as clip_norm; a GradScaler is not supported",
            )

    @property
    def _final(self) -> int:
        return self.epoch_labels[-1] + 1

    def _state(self, epoch: int) -> Mapping[str, Any]:
        return self._starts[(*self.epoch_labels, self._final)[epoch - 1]]

    def load_start(self, epoch: int) -> None:
        """See `ReplayableRun`."""
        state = self._state(epoch)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # else steps change the copy

    def begin(self, epoch: int) -> Sequence[RecordedStep]:
        """See `ReplayableRun`."""
        self._is_first_of_epoch = True
        return self._steps[epoch - 1]

    def train(self, step: RecordedStep) -> None:
        """See `ReplayableRun`."""
        for group, settings in zip(self.optimizer.param_groups, step.groups, strict=True):
            group.update(settings)
        if step.random_state is not None:
            step.random_state.restore()
        self.optimizer.zero_grad()
        for index in step.passes:
            (self._losses(self.model, index).sum() * self._scale(step, index)).backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()

    def _scale(self, step: RecordedStep, index: np.ndarray) -> float:
        return 1.0 if self._reduction == "sum" else 1 / (len(index) * len(step.passes))

    def check_end(self, epoch: int) -> None:
        """See `ReplayableRun`."""
        before, after = self._state(epoch)["model"], self._state(epoch + 1)["model"]
        change = difference = 0.0
        for name, values in self.model.state_dict().items():
            if values.is_floating_point():
                stored = after[name].to(values)
                change += float((before[name].to(values) - stored).square().sum())
                difference += float((values - stored).square().sum())
        relative = (difference / change) ** 0.5 if change else float(difference > 0)
        if not relative <= self._tolerance:
            raise RecordError(
                expected="a replay that ends at the stored state",
                got=f"a difference of {relative:.1e} of the epoch's change",
                where=f"epoch {self.epoch_labels[epoch - 1]}",
                todo="check that `losses` returns the losses of the loop (same inputs, label "
                "smoothing, train mode), that `reduction` and `clip_norm` are those of the loop, "
                "and that the states are copies (copy.deepcopy)",
            )

    def derivatives(self, step: RecordedStep, smoothing: Smoothing) -> StepDerivatives:
        """See `ReplayableRun`."""
        if smoothing.gate_width:
            raise gates_cannot_be_smoothed(smoothing.gate_width)
        if step.random_state is not None:
            step.random_state.restore()
        is_first, self._is_first_of_epoch = self._is_first_of_epoch, False
        weights = [
            torch.full((len(index),), self._scale(step, index), dtype=torch.float64)
            for index in step.passes
        ]
        return self._network.at(step.passes, weights, first_of_epoch=is_first)

    def samples(self, step: RecordedStep) -> np.ndarray:
        """See `ReplayableRun`."""
        return step.index
