"""What a recorded step was made of: enough to take it again.

Map: `RecordedStep` (one training step), `RandomState` (PyTorch's generators).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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

    @property
    def index(self) -> np.ndarray:
        """Index of all samples, (N,)."""
        return np.concatenate(self.passes)
