"""The samples of data on which no operation was seen: those of a batch, in the step's order.

Map: `AssumedRows`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sampimp.importance.ownership.row_notes import UNKNOWN_ROWS, SampleRows
from sampimp.importance.rules.batch import Batch


class AssumedRows:
    """The samples of the rows of data in the batch's order.

    Parameters
    ----------
    batch
        The samples of the pass.
    samples
        Their positions among those of the step, which `SampleRows` contain.
    total
        Number of the step's samples, as far as its passes are known.
    """

    def __init__(self, batch: Batch, samples: slice, total: int) -> None:
        self._batch, self._total = batch, total
        self.samples = torch.arange(samples.start, samples.stop)
        self._rows: dict[tuple[int, int, bool], SampleRows] = {}

    def of(self, data: Tensor) -> SampleRows | None:
        """Return the samples of a tensor's rows; None if it has no axis of samples."""
        size = self._batch.size
        axis = self._batch.axis(data.dim(), int(data.is_floating_point()))
        length = data.shape[axis] if data.dim() > axis else None
        if length == self._total != size:  # of all passes
            return self._plain(axis, torch.arange(self._total), is_guess=False)
        if length != size:
            axes = [axis for axis, length in enumerate(data.shape) if length == size]
            return self._plain(axes[0], self.samples, is_guess=True) if len(axes) == 1 else None
        if axis and len(data) == length:
            return None  # as many positions as samples; it may be transposed later
        return self._plain(axis, self.samples, is_guess=False)

    def _plain(self, axis: int, samples: Tensor, *, is_guess: bool) -> SampleRows:
        key = axis, len(samples), is_guess
        if key not in self._rows:
            self._rows[key] = SampleRows(axis, samples, is_plain=True, is_guess=is_guess)
        return self._rows[key]

    def in_pass(self, rows: SampleRows) -> SampleRows:
        """Return rows with positions in the pass; unknown if other passes' samples are there."""
        if rows.samples is None:
            return rows
        positions = rows.samples - (self.samples[0] if len(self.samples) else 0)
        is_other = (positions < 0) | (positions >= self._batch.size)
        if bool((is_other & (rows.samples >= 0)).any()):
            return UNKNOWN_ROWS
        return replace(rows, samples=positions.where(rows.samples >= 0, rows.samples))
