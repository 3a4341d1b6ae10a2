"""What the reverse pass and the recursion ask of a recorded run: train it again, differentiate it.

Map: `ReplayableRun`, `StepDerivatives` (of one step's loss), `Smoothing` (of the derivative),
`gates_cannot_be_smoothed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sampimp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Smoothing of the derivative; the run itself, and its replay, remain as they were.

    The derivative of a run is exact without it. It then describes infinitesimal weights, while a
    removal is finite: gates of ReLUs flip, and Adam divides by roots that are nearly 0.
    """

    eps: float = 0.0
    """Least eps of Adam, RMSprop and Adagrad in the linearized update."""
    gate_width: float = 0.0
    """Half-width of the bump that replaces the second derivative of a ReLU, in its input's unit."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a negative value."""
        for name, value in vars(self).items():
            if not value >= 0:
                raise ConfigError(
                    expected="a width of at least 0",
                    got=repr(value),
                    where=f"smoothing, {name}",
                    todo="use 0 for the exact derivative",
                )


class StepDerivatives(Protocol):
    """Derivatives of one step's loss, for the run's `parameters` in their order."""

    precision: float
    """Rounding unit of the coarsest values in the step."""

    def gradients(self) -> Sequence[Tensor | None]:
        """Return the step's gradient of each parameter; None for one that the step did not use."""

    def sample_gradients(self, positions: Sequence[int]) -> Sequence[Tensor]:
        """Return the parts (n, P...) of the gradient that belong to n samples of the step."""

    def products(self, directions: Sequence[Tensor], out: Sequence[Tensor]) -> Tensor:
        """Add the Hessian's product with each direction (K, P...) to `out`.

        Returns
        -------
        Tensor of shape (K, L, N)
            The inner product of each direction's part in a layer with each sample's gradient.
        """


class ReplayableRun(Protocol):
    """A recorded run that can be trained again, one step after another."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epochs: int
    sample_count: int
    clip_norm: float | None
    """Largest norm of a step's gradient, to which it is clipped; None for no clipping."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The model's parameters that the optimizer updates, in the model's order."""

    @property
    def layers(self) -> Sequence[str]:
        """Names of the layers, in forward order."""

    @property
    def epoch_labels(self) -> Sequence[int]:
        """Number of each epoch in the recording; everything else counts epochs from 1."""

    def load_start(self, epoch: int) -> None:
        """Set model and optimizer to their state before `epoch`; `epochs + 1` is the final one."""

    def begin(self, epoch: int) -> Sequence[Any]:
        """Prepare an epoch's settings (rate, random state); return its steps."""

    def train(self, step: Any) -> None:
        """Train one step, as in the recorded run."""

    def check_end(self, epoch: int) -> None:
        """Raise RecordError if the model is not that of the recorded run after `epoch`."""

    def derivatives(self, step: Any, smoothing: Smoothing) -> StepDerivatives:
        """Return the derivatives of a step's loss at the model's present parameters."""

    def samples(self, step: Any) -> np.ndarray:
        """Return the index of each sample of a step, (N,)."""


def gates_cannot_be_smoothed(gate_width: float) -> ConfigError:
    """Return the error for a smoothing that a network of another kind does not have."""
    return ConfigError(
        expected="gate_width = 0 for a network that is no stack of linear layers",
        got=f"{gate_width}",
        where="smoothing",
        todo="leave it out, or train with a smooth activation (--activation gelu)",
    )
