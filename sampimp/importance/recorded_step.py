"""What a recorded step was made of: enough to take it again, and to tell whether it is the same.

Map: `RecordedStep` (one training step), `RandomState` (PyTorch's generators), `gradient_norms`
(what tells two gradients apart), `steps_state` and `restored_steps` (steps in a checkpoint).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampimp.importance.per_sample import at_least_float32


@dataclass(frozen=True)
class RandomState:
    """The state of PyTorch's generator on the CPU, and of that on a model's GPU."""

    cpu: Tensor
    gpu: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Return the present state."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), gpu, device)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)

    def equals(self, other: "RandomState") -> bool:
        """Return whether both states are the same."""
        pairs = [(self.cpu, other.cpu)]
        if self.gpu is not None and other.gpu is not None:
            pairs.append((self.gpu, other.gpu))
        return all(torch.equal(*pair) for pair in pairs)


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """One training step, as `ImportanceRecorder(..., keep_steps=True)` keeps it."""

    epoch: int
    passes: Sequence[np.ndarray]
    """Index of the samples of each backward pass."""
    groups: Sequence[Mapping[str, Any]]
    """Settings of the optimizer's groups at the update, without the parameters."""
    random_state: RandomState | None
    """Before the step; None if the step drew no random number."""
    is_scaled: bool
    """Whether gradients were multiplied by a factor, as clipping does."""
    training: frozenset[str]
    """Names of the modules in training mode."""
    gradient_norms: Tensor
    """Norm of each parameter's gradient at the update, (P,); NaN for a parameter without one."""

    @property
    def index(self) -> np.ndarray:
        """Index of all samples, (N,)."""
        return np.concatenate(self.passes)


@torch.no_grad()
def gradient_norms(gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of each parameter's gradient, (P,), in float32 or float64; NaN for None.

    Examples
    --------
    >>> gradient_norms([torch.tensor([3.0, 4.0]), None])
    tensor([5., nan])
    """
    used = {row: gradient for row, gradient in enumerate(gradients) if gradient is not None}
    if not used:
        return torch.full((len(gradients),), torch.nan)
    values = [at_least_float32(_entries(gradient)) for gradient in used.values()]
    found = torch.stack([norm.to(values[0].device) for norm in torch._foreach_norm(values)])
    norms = found.new_full((len(gradients),), torch.nan)
    norms[list(used)] = found
    return norms


def _entries(gradient: Tensor) -> Tensor:
    is_sparse = gradient.layout == torch.sparse_coo
    return gradient.coalesce().values() if is_sparse else gradient


def steps_state(steps: Sequence[RecordedStep]) -> list[dict[str, Any]]:
    """Return steps as tensors, numbers and texts, which `torch.load(weights_only=True)` reads."""
    names: dict[int, list[str]] = {}  # by id: steps share a set, and pickle a list, only once
    return [
        {
            "epoch": int(step.epoch),
            "passes": [torch.from_numpy(index) for index in step.passes],
            "groups": [
                {
                    name: value.item() if isinstance(value, np.generic) else value
                    for name, value in group.items()
                }
                for group in step.groups
            ],
            "random_state": None
            if step.random_state is None
            else {
                "cpu": step.random_state.cpu,
                "gpu": step.random_state.gpu,
                "device": str(step.random_state.device),
            },
            "is_scaled": step.is_scaled,
            "training": names.setdefault(id(step.training), sorted(step.training)),
            "gradient_norms": step.gradient_norms,
        }
        for step in steps
    ]


def restored_steps(state: Sequence[Mapping[str, Any]]) -> list[RecordedStep]:
    """Return the steps of `steps_state`."""
    steps: list[RecordedStep] = []
    for values in state:
        training, random = frozenset(values["training"]), values["random_state"]
        if steps and steps[-1].training == training:
            training = steps[-1].training  # one set for all steps
        if random is not None:
            gpu = None if random["gpu"] is None else random["gpu"].cpu()
            random = RandomState(random["cpu"].cpu(), gpu, torch.device(random["device"]))
        passes = [index.cpu().numpy() for index in values["passes"]]
        restored = {"passes": passes, "random_state": random, "training": training}
        steps.append(RecordedStep(**{**values, **restored}))
    return steps
