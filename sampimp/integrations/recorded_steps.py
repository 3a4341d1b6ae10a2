"""Recorded steps of a trainer, shared by the callbacks.

A trainer's hooks enter `ImportanceRecorder.step` before the forward pass of a batch, and leave it
after the optimizer's update. The recorder decides which steps it refuses. A batch has to
contain the permanent index of its samples. The trainer's checkpoints contain the state of the
recorder, with the number of the trainer's step up to which it has recorded.

Map: `RecordedSteps`, the base class of `LightningImportance` and `HuggingFaceImportance`.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.epoch_parts import describe_epochs
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.importance.recorder_state import describe_state
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
        self._position = 0  # the trainer's steps at the end of the last recorded one
        self._sample_count: int | None = None  # of the training set, where it has a length

    def _start_training(
        self,
        model: nn.Module,
        called: Any,
        optimizer: torch.optim.Optimizer,
        processes: int,
        position: int,
        dataset: Any,
    ) -> None:
        """Make the recorder.

        Parameters
        ----------
        called
            The object that the trainer calls as its model.
        position
            The trainer's steps so far; more than none after a resume.
        dataset
            The training set.
        """
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
        self._position = position
        try:
            self._sample_count = len(dataset)
        except (TypeError, NotImplementedError):  # an iterable data set
            self._sample_count = None

    def _saved(self) -> dict[str, Any]:
        """Return what a checkpoint contains."""
        return {
            "global_step": self._position,
            "recorder": self.recorder.state_dict(self._sample_count),
        }

    def _go_on(self, saved: Mapping[str, Any], where: str) -> None:
        """Go on from what a checkpoint contains; the trainer is at `self._position`."""
        if saved["global_step"] != self._position:
            raise ConfigError(
                expected=f"a recording up to step {self._position}, where the trainer goes on",
                got=f"one up to step {saved['global_step']}: {describe_state(saved['recorder'])}",
                where=where,
                todo="resume from another checkpoint, of which all files are of one time",
            )
        self.recorder.load_state_dict(saved["recorder"], self._sample_count)

    def _warn_of_missing_epochs(self, where: str, epoch: int) -> None:
        """Warn that a checkpoint contains no recording; training goes on in `epoch`."""
        missing = f"; {describe_epochs(range(1, epoch))} will be missing" if epoch > 1 else ""
        warnings.warn(
            f"{where} contains no recording by {type(self).__name__}: the new one begins "
            f"after step {self._position}, in epoch {epoch}{missing}",
            stacklevel=3,
        )

    def _begin_pass(self, index: Index, epoch: int) -> None:
        """Begin a step with a batch, or add the batch to a step that accumulates gradients."""
        if self._step is None:
            step = self.recorder.step(index, epoch=epoch)
            self._add_pass = step.__enter__()
            self._step = step
        else:
            self._add_pass(index)

    def _finish_step(self, position: int) -> None:
        """Complete a step whose update was made; the trainer counts `position` steps with it."""
        if self._step is not None:
            step, self._step = self._step, None
            step.__exit__(None, None, None)
            self._position = position

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
