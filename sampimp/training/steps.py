"""One training step by autograd, recorded, and the optimizers of a study.

Map: `TrainingStep` (the interface of a step), `AutogradStep` (any network), `make_optimizer`.
`sampimp.training.fused` has the step that is written out for stacks of linear layers.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sampimp.config import TrainingConfig
from sampimp.importance.recorder import ImportanceRecorder


class TrainingStep(Protocol):
    """One training step, with or without its samples' importance."""

    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: float,
        weights: Tensor | None = None,
    ) -> None:
        """Train on one batch, or on this worker's share of a batch of `batch_size` samples.

        With `weights` (N,), the loss is the weighted sum of the samples' losses divided by
        `batch_size`, which remains the denominator. Only a step that does not record takes them.
        """

    def take(self) -> Tensor | None:
        """Return beta (layer, samples) of the steps since the last call; None if not recorded."""


class AutogradStep:
    """Train any network by an optimizer on the mean cross-entropy, and record importance.

    The softmax is in float64; `sampimp.training.fused.loss_gradient` has the reason.

    Parameters
    ----------
    model
        Any network that `sampimp.ImportanceRecorder` supports.
    optimizer
        An optimizer over the parameters of the model.
    record
        False trains the same parameters without measuring importance.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, record: bool) -> None:
        self._model, self._optimizer = model, optimizer
        self._recorder = ImportanceRecorder(model, optimizer) if record else None
        self._count = 0  # samples since the last take

    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: float,
        weights: Tensor | None = None,
    ) -> None:
        """Train on one batch: inputs [N, ...], labels [N]; for weights [N] see `TrainingStep`."""
        index = np.arange(self._count, self._count + len(labels))
        self._count += len(labels)
        recording = self._recorder.step(index, epoch=0) if self._recorder else nullcontext()
        with recording:
            self._optimizer.zero_grad()
            logits = self._model(inputs).double()
            if weights is None:
                loss = functional.cross_entropy(logits, labels)
            else:
                losses = functional.cross_entropy(logits, labels, reduction="none")
                loss = losses @ weights.double() / batch_size
            loss.backward()
            self._optimizer.step()

    def take(self) -> Tensor | None:
        """Return beta (layer, samples) of the steps since the last call; None if not recorded."""
        count, self._count = self._count, 0
        return self._recorder.pop_epoch(0, count) if self._recorder else None


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration over all parameters of a model.

    It is PyTorch's fused form, a single pass over the memory: for the paper's network under AdamW
    it took 0.5 ms, the for-loop 2.2 ms.
    """
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "momentum": partial(torch.optim.SGD, momentum=0.9),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return makers[training.optimizer](
        model.parameters(),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True,
    )
