"""Recorded steps of a trainer, shared by the callbacks.

A trainer's hooks enter `ImportanceRecorder.step` before the forward pass of a batch, and leave it
after the optimizer's update. The recorder decides which steps it refuses. A batch has to
contain the permanent index of its samples.

Map: `RecordedSteps`, the base class of `LightningImportance` and `HuggingFaceImportance`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.importance.sample_index import Index


class RecordedSteps:
    """At most one recorded step at a time, from its first batch to its update.

    Parameters
    ----------
    options
        Keyword arguments of `ImportanceRecorder`.
    """

    recorder: ImportanceRecorder
    """Recorder of the last training, created at its start."""

    _index: Any
    """Key, position or function by which a batch yields the index of its samples."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._step: AbstractContextManager[Callable[[Index], None]] | None = None
        self._add_pass: Callable[[Index], None]

    def _start_training(
        self, model: nn.Module, called: Any, optimizer: torch.optim.Optimizer, processes: int
    ) -> None:
        """Make the recorder; `called` is the object that the trainer calls as its model."""
        self._abandon_step()
        if called is not model or processes > 1:
            raise UnsupportedError(
                expected="one process that trains on one device, and calls the model itself",
                got=f"{processes} processes or devices, and {type(called).__name__} "
                f"{'' if called is model else 'around '}{type(model).__name__}",
                where=type(self).__name__,
                todo="train on one device, without compilation, FSDP or DeepSpeed",
            )
        self.recorder = ImportanceRecorder(model, optimizer, **self._options)

    def _begin_pass(self, index: Index, epoch: int) -> None:
        """Begin a step with a batch, or add the batch to a step that accumulates gradients."""
        if self._step is None:
            step = self.recorder.step(index, epoch=epoch)
            self._add_pass = step.__enter__()
            self._step = step
        else:
            self._add_pass(index)

    def _finish_step(self) -> None:
        """Complete a step whose update was made."""
        if self._step is not None:
            step, self._step = self._step, None
            step.__exit__(None, None, None)

    def _abandon_step(self) -> None:
        """Stop recording a step that has made no update."""
        if self._step is not None:
            step, self._step = self._step, None
            stop = GeneratorExit()
            step.__exit__(type(stop), stop, None)

    def _missing_index(self, got: str, todo: str) -> ConfigError:
        return ConfigError(
            expected=f"batches with the index of their samples, in batch[{self._index!r}]",
            got=got,
            where=type(self).__name__,
            todo=todo,
        )
