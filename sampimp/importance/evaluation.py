"""Evaluation mode for a block, with every module's own mode restored afterwards.

Per-sample quantities at fixed parameters (the NLL, snapshot importance) are measured as in
inference: without dropout, and with the stored statistics of a BatchNorm.

Map: `evaluation_mode`, `restored_modes` (the second half of it), `_FastPath` (PyTorch's fused
encoder layer, off while any thread evaluates).
"""

import threading
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
    with restored_modes(model), _FAST_PATH.off():
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restore each module's `training` flag after a block."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


class _FastPath:
    """The process-wide switch of PyTorch's fused encoder layer, shared by threads that evaluate.

    The first block to begin saves the switch and the last one to end restores it. If every block
    saved and restored it, a block that began inside another and ended after it would restore "off".
    """

    def __init__(self) -> None:
        self._lock, self._blocks, self._saved = threading.Lock(), 0, True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Keep the fused encoder layer off in a block."""
        with self._lock:
            if self._blocks == 0:
                self._saved = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    torch.backends.mha.set_fastpath_enabled(self._saved)


_FAST_PATH = _FastPath()
