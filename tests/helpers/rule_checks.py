"""Checks that the tests of rules share: recorded importance against an oracle."""

import copy

import networks
import oracles
import torch
from torch import Tensor

SCALE = torch.tensor([0.4, 1.3, -0.7], dtype=torch.float64)
"""Weights of the samples' losses; a mean or a sum is a special case."""


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Assert equality to 1e-9 of each layer's largest value."""
    assert got.keys() == want.keys()
    errors = {
        layer: float((got[layer] - beta).abs().max() / beta.max())
        for layer, beta in want.items()
        if beta.any()
    }
    assert all(error < 1e-9 for error in errors.values()), errors
    assert not any(got[layer].any() for layer in want.keys() - errors.keys())


def check_step(
    case: networks.Case, optimizer: str, scale: Tensor, gradients: dict[str, Tensor]
) -> None:
    """Assert that the recorded importance of a step is that of `oracles.importance_by_update`.

    Parameters
    ----------
    optimizer
        A key of `oracles.OPTIMIZERS`.
    scale
        The weight of each sample's loss.
    gradients
        By parameter (sample, ...): gradients of the weighted losses.
    """
    before = copy.deepcopy(case.model.state_dict())
    moved = oracles.moved_optimizer(optimizer, case.model, gradients)
    want = oracles.importance_by_update(case.model, moved, gradients)
    assert_equal(networks.recorded(case, moved, scale), want)
    case.model.load_state_dict(before)
