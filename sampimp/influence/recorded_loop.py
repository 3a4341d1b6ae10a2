"""A loop of your own, recorded by `ImportanceRecorder(..., keep_steps=True)`, to be replayed.

Each replayed step is compared with the recorded one by the norm of each parameter's gradient, and
each epoch's end with the stored state. What the optimizer does not change has to be constant.

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
from sampimp.importance.recorded_step import RecordedStep, gradient_norms
from sampimp.influence.any_network import NetworkDerivatives
from sampimp.influence.derivative_checks import find_other_gradient, require_losses
from sampimp.influence.loop_checks import largest_sample, require_complete, require_states
from sampimp.influence.replay import Smoothing, StepDerivatives, gates_cannot_be_smoothed

Losses = Callable[[nn.Module, np.ndarray], Tensor]
"""From the model and the index of samples (N,) to each sample's loss (N,)."""

TOLERANCES = {torch.float64: 1e-8}
"""Largest relative difference of a replay by precision, where it is not 1e-3 (both arbitrary).

Rounding errors grow with the steps of an epoch: by a factor of 10,000 in single precision."""

_CAUSES = (
    "check that every step of the epoch was recorded, and that nothing else changes parameters; "
    "that `losses` returns the losses of the loop (same inputs, label smoothing, penalties, "
    "settings of the modules), with random numbers of PyTorch's default generator; that "
    "`reduction` and `clip_norm` (norm_type=2, all parameters together) are those of the loop; and "
    "that the states are copies (copy.deepcopy)"
)


class RecordedLoop:
    """The steps of a recorded loop, with the model's states between its epochs.

    Parameters
    ----------
    model, optimizer
        The objects of the loop. Their state changes during the replay, whose end is the final one.
    steps
        `ImportanceRecorder.steps`, or that of an integration.
    losses
        Function from the model and the index of N samples to each sample's loss, (N,), in their
        order and before the mean: `cross_entropy(model(inputs[index]), labels[index],
        reduction="none")`. The inputs of a sample must be those of the recorded step (no random
        augmentation, except by PyTorch's random numbers inside the function).
    starts
        State dicts before each epoch: ``{epoch: {"model": model.state_dict(), "optimizer":
        optimizer.state_dict()}}``, and the final one under the last epoch plus one.
    sample_count
        Size of the training set. Default: the largest index recorded, plus one.
    reduction
        How the loop reduced the losses of a backward pass: "mean" or "sum". Under "mean", several
        passes of one step are averaged. With other denominators (weights of classes, tokens),
        `losses` divides by them, and the reduction is "sum".
    clip_norm
        The loop's `max_norm` of `clip_grad_norm_`, over the optimizer's parameters.
    tolerance
        Largest difference of a replay: of a gradient's norm, relative to the recorded one, and of
        an epoch's end from the stored state, relative to the change of the parameters in that
        epoch. Default: 1e-8 for a model in float64, else 1e-3.
    batch_dim
        As for `ImportanceRecorder`.

    Raises
    ------
    ConfigError
        A state is missing or of another model; gradients were scaled and no `clip_norm` is given;
        the optimizer has parameters that the model does not have, or that are frozen by now.
    UnsupportedError
        The states differ in something that the optimizer does not change.
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
        tolerance: float | None = None,
        batch_dim: int = 0,
    ) -> None:
        check_choice(reduction, ("mean", "sum"), "reduction")
        require_complete(model, optimizer, steps, starts, clip_norm, sample_count)
        self.model, self.optimizer, self.clip_norm = model, optimizer, clip_norm
        self._losses, self._starts, self._reduction = losses, starts, reduction
        self.epoch_labels = sorted({step.epoch for step in steps})
        """The recorded epochs, in order."""
        self.epochs = len(self.epoch_labels)
        self._steps = [
            [step for step in steps if step.epoch == label] for label in self.epoch_labels
        ]
        used = largest_sample(steps) + 1
        self.sample_count = used if sample_count is None else sample_count
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._rows = [
            row
            for row, parameter in enumerate(model.parameters())
            if parameter.requires_grad and id(parameter) in updated
        ]
        parameters = list(model.parameters())
        self.parameters = [parameters[row] for row in self._rows]
        coarsest = max((p.dtype for p in self.parameters), key=lambda dtype: torch.finfo(dtype).eps)
        self._tolerance = TOLERANCES.get(coarsest, 1e-3) if tolerance is None else tolerance
        self._network = NetworkDerivatives(
            model, lambda index: losses(model, index), self.parameters, batch_dim=batch_dim
        )
        require_states(model, self.parameters, [self._state(e + 1) for e in range(self.epochs + 1)])
        self._is_first_of_epoch = True

    @property
    def layers(self) -> Sequence[str]:
        """Names of the layers, in forward order once a step was differentiated."""
        return self._network.layers

    @property
    def _final(self) -> int:
        return self.epoch_labels[-1] + 1

    def _state(self, epoch: int) -> Mapping[str, Any]:
        return self._starts[(*self.epoch_labels, self._final)[epoch - 1]]

    def load_start(self, epoch: int) -> None:
        """See `ReplayableRun`."""
        state = self._state(epoch)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # else steps change it
        except (KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(
                expected="states of this model and optimizer",
                got=str(error).splitlines()[-1].strip(),
                where="RecordedLoop, starts",
                todo="keep the states when model and optimizer have all their parameters",
            ) from error

    def begin(self, epoch: int) -> Sequence[RecordedStep]:
        """See `ReplayableRun`."""
        self._is_first_of_epoch = True
        return self._steps[epoch - 1]

    def _prepare(self, step: RecordedStep) -> None:
        """Set modes, rates and the random state to those of a recorded step."""
        for name, module in self.model.named_modules():
            module.training = name in step.training
        for group, settings in zip(self.optimizer.param_groups, step.groups, strict=True):
            group.update(settings)
        if step.random_state is not None:
            step.random_state.restore()

    def train(self, step: RecordedStep) -> None:
        """See `ReplayableRun`."""
        self._prepare(step)
        self.model.zero_grad()
        for index in step.passes:
            losses = self._losses(self.model, index)
            require_losses(losses, len(index))
            (losses.sum() * self._scale(step, index)).backward()
        norms = step.gradient_norms[self._rows].tolist()
        for parameter, norm in zip(self.parameters, norms, strict=True):
            if np.isnan(norm):
                parameter.grad = None  # frozen in that step: the optimizer left it out
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # zero_grad(set_to_none=False)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self._compare_gradients(step, norms)
        self.optimizer.step()

    def _compare_gradients(self, step: RecordedStep, expected: Sequence[float]) -> None:
        """Raise RecordError if a gradient is not that of the recorded step."""
        norms = gradient_norms([parameter.grad for parameter in self.parameters]).tolist()
        other = find_other_gradient(norms, expected, self._tolerance)
        if other is not None:
            names = [name for name, _ in self.model.named_parameters()]
            of_epoch = self._steps[self.epoch_labels.index(step.epoch)]
            number = next(n for n, candidate in enumerate(of_epoch) if candidate is step)
            raise RecordError(
                expected="a replay with the gradients of the recorded step",
                got=f"a gradient of norm {norms[other]:.6g} instead of {expected[other]:.6g}",
                where=f"epoch {step.epoch}, step {number}, parameter {names[self._rows[other]]}",
                todo=_CAUSES,
            )

    def _scale(self, step: RecordedStep, index: np.ndarray) -> float:
        if self._reduction == "sum" or not len(index):
            return 1.0
        return 1 / (len(index) * len(step.passes))

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
                todo=_CAUSES,
            )

    def derivatives(self, step: RecordedStep, smoothing: Smoothing) -> StepDerivatives:
        """See `ReplayableRun`."""
        if smoothing.gate_width:
            raise gates_cannot_be_smoothed(smoothing.gate_width)
        self._prepare(step)
        is_first, self._is_first_of_epoch = self._is_first_of_epoch, False
        weights = [
            torch.full((len(index),), self._scale(step, index), dtype=torch.float64)
            for index in step.passes
        ]
        indices = [torch.from_numpy(index) for index in step.passes]
        return self._network.at(step.passes, weights, indices=indices, first_of_epoch=is_first)

    def samples(self, step: RecordedStep) -> np.ndarray:
        """See `ReplayableRun`."""
        return step.index
