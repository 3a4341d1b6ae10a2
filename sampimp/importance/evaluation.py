"""Evaluation mode for a block, with every module's own mode restored afterwards.

Per-sample quantities of fixed parameters (the NLL, snapshot importance) are those of the network in
use: without dropout, and with the stored statistics of a BatchNorm.

Map: `evaluation_mode`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set every module to evaluation mode for a block, then restore each module's `training` flag.

    The flags are restored module by module: `model.train()` would also switch on a BatchNorm that
    the user has frozen by `.eval()`. PyTorch's fused encoder layer, which evaluation mode enables,
    is kept off: its rounding differs from that of the layer that is trained.

    Examples
    --------
    >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    >>> with evaluation_mode(model):
    ...     [module.training for module in model.modules()]
    [False, False, False]
    >>> [module.training for module in model.modules()]
    [True, False, True]
    """
    flags = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in flags:
            module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in flags:
            module.training = training
