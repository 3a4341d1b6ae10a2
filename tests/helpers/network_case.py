"""`Case`, a tiny model with a batch for the tests of rules, and parts that the models share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sampimp.importance.recorder import ImportanceRecorder

N, T = 3, 4
"""Number of samples of a batch, and of positions."""


class Calls(nn.Module):
    """A model that calls `function(model, *inputs)`; its parts are attributes of the model."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Case:
    """A model and a batch. The samples are on the first axis of inputs and outputs.

    Parameters
    ----------
    one_sample
        Function that returns the inputs of one sample; by default a slice of each input.
    random
        Whether a pass of a single sample has other dropout masks than the pass of the batch.
    options
        Options of the recorder.
    """

    def __init__(
        self,
        model: nn.Module,
        *inputs: Tensor,
        one_sample: Callable[[int], tuple[Tensor, ...]] | None = None,
        random: bool = False,
        **options: Any,
    ) -> None:
        self.model, self.inputs, self.random, self.options = model, inputs, random, options
        self.one_sample = one_sample or (lambda i: tuple(x[i : i + 1] for x in inputs))

    def losses(self, sample: int | None = None) -> Tensor:
        """Return the loss of every sample, or of one sample in a pass of its own."""
        torch.manual_seed(0)  # for dropout
        outputs = self.model(*(self.inputs if sample is None else self.one_sample(sample)))
        return sum(map(losses, (outputs,) if isinstance(outputs, Tensor) else outputs))


def recorded(case: Case, optimizer: torch.optim.Optimizer, scale: Tensor) -> dict[str, Tensor]:
    """Return {layer: beta (sample,)} of a step on the weighted sum of a case's losses."""
    recorder = ImportanceRecorder(case.model, optimizer, **case.options)
    with recorder.step(range(len(scale)), epoch=1):
        optimizer.zero_grad()
        (scale * case.losses()).sum().backward()
        optimizer.step()
    return dict(zip(recorder.layers, recorder.pop_epoch(1, len(scale)), strict=True))


def losses(output: Tensor) -> Tensor:
    """Return losses (sample,) that depend on every entry of an output in a different way."""
    output = output.flatten(1)
    places = torch.linspace(0, 2, output.shape[1], dtype=output.dtype, device=output.device)
    weights = places.cos()
    return (weights * output + 0.3 * output.square()).sum(1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 6, shape)


def stack(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Tanh(), nn.Linear(6, 3))


def convolutions(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 2), *between, nn.Tanh(), nn.Conv2d(4, 3, 2))


def positions_first(module: nn.Module, *inputs: Tensor) -> Any:
    """Call a module that has positions before samples, with samples first outside of it."""
    return module(*(x.transpose(0, 1) for x in inputs)).transpose(0, 1)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model
