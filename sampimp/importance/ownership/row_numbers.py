"""The order of rows after an operation that moves entries, by carrying it out on row numbers.

Map: `RowNumbers`.

Shape suffix: R rows of an axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampimp.importance.ownership.call import Call
from sampimp.importance.ownership.operations import IN_PLACE, MOVES_ENTRIES, WHERE, WRITES
from sampimp.importance.ownership.row_notes import (
    NO_SAMPLE,
    UNKNOWN_ROWS,
    UNKNOWN_SAMPLE,
    SampleRows,
    as_sequence,
)
from sampimp.importance.rules.batch import Batch

_CREATED = UNKNOWN_SAMPLE - 1
"""Number of an entry of row 0 that was created in the block; of row n, n less. Next to an entry of
a sample it belongs to that sample, and alone, as in another half of the batch, to row n's."""


class RowNumbers:
    """The samples' numbers in the place of the entries of data.

    Parameters
    ----------
    batch
        The samples of the pass.
    index
        The step's index of the pass's samples; None if it is not known.
    start
        Position of the pass's first sample in the step.
    of
        Returns the samples of a tensor's rows; None if it has no axis of samples.
    """

    def __init__(
        self,
        batch: Batch,
        index: Tensor | None,
        start: int,
        of: Callable[[Tensor], SampleRows | None],
    ) -> None:
        self._batch, self._index, self._start, self._of = batch, index, start, of

    def moved(self, call: Call) -> Sequence[Any] | None:
        """Return the result of `MOVES_ENTRIES`'s call on row numbers of its inputs, on the CPU."""
        function, args, kwargs = call.function, call.args, call.kwargs
        places = MOVES_ENTRIES[function]
        named = {name: _on_cpu(value) for name, value in kwargs.items()}
        if function in WHERE:
            args = self._without_constants(places, args)
        elif function in WRITES and not any(map(self._has_samples, args[places[-1] :])):
            return [self.numbered(args[0], as_copy=True)]
        if function is torch._C._nn.pad_sequence:
            args, named = args[:2], {**named, "padding_value": NO_SAMPLE}
        for as_copies in (False, True):  # expanded views of one number a row, else whole copies
            numbered = [
                self._numbered_all(value, as_copies or function in IN_PLACE)
                if place in places
                else _on_cpu(value)
                for place, value in enumerate(args)
            ]
            try:
                moved = function(*numbered, **named)
            except (RuntimeError, TypeError, IndexError):
                continue
            return as_sequence(numbered[0] if function is Tensor.__setitem__ else moved)
        return None

    def _numbered_all(self, value: Any, as_copies: bool) -> Any:
        if isinstance(value, list | tuple):
            return [self._numbered_all(item, as_copies) for item in value]
        return self.numbered(value, as_copies) if isinstance(value, Tensor) else value

    def _without_constants(self, places: Sequence[int], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments with the other operand's values in the place of those of no sample.

        A row into which constants are written, all of it perhaps, stays its sample's.
        """
        of_samples = [place for place in places[: len(args)] if self._has_samples(args[place])]
        if len(of_samples) != 1:
            return args
        (kept,) = of_samples
        return tuple(args[kept] if place in places else value for place, value in enumerate(args))

    def _has_samples(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or not self._batch.varies(value):
            return False
        rows = self._of(value)
        return rows is not None and not (rows.is_created or rows.is_of_no_sample)

    def numbered(self, data: Tensor, as_copy: bool = False) -> Tensor:
        """Return the number of each entry's sample, in the shape of the data."""
        rows = self._of(data) if self._batch.varies(data) else None
        if rows is None or rows.samples is None:
            numbers = torch.tensor(NO_SAMPLE if rows is None else UNKNOWN_SAMPLE)
        else:
            shape = [-1 if axis == rows.axis else 1 for axis in range(data.dim())]
            samples = _CREATED - rows.samples if rows.is_created else rows.samples
            numbers = samples.reshape(shape)
        numbers = numbers.expand(data.shape)
        return numbers.clone(memory_format=torch.contiguous_format) if as_copy else numbers

    def rows_of(self, numbers: Any, output: Tensor) -> SampleRows | None:
        """Return the axis of the samples and the sample of each row, from all entries' numbers."""
        if (
            not isinstance(numbers, Tensor)
            or numbers.shape != output.shape
            or numbers.is_floating_point()
        ):
            return UNKNOWN_ROWS
        expected = self._batch.axis(output.dim(), int(output.is_floating_point()))
        strides = zip(numbers.stride(), numbers.shape, strict=True)
        varying = {axis for axis, (stride, size) in enumerate(strides) if stride and size > 1}
        axes = sorted(range(numbers.dim()), key=lambda axis: (axis != expected, axis))
        mixed_rows = None
        if not numbers.numel():
            return None
        for axis in axes:
            rows = numbers.movedim(axis, 0)
            rows = rows.flatten(1) if numbers.dim() > 1 else rows[:, None]
            if not varying - {axis}:  # views of one number a row
                rows = rows[:, :1]
            if bool((rows == UNKNOWN_SAMPLE).any()):
                return UNKNOWN_ROWS
            largest_R = rows.amax(1)
            if bool((largest_R <= _CREATED).all()):  # noise alone
                is_one = bool((largest_R == rows.amin(1)).all())
                return SampleRows(axis, _CREATED - largest_R, is_created=True) if is_one else None
            largest_R = largest_R.where(largest_R > _CREATED, _CREATED - largest_R)
            smallest_R = rows.where(rows > NO_SAMPLE, len(rows) + rows.max()).amin(1)
            has_sample = smallest_R < len(rows) + rows.max()
            if bool(((largest_R == smallest_R) | ~has_sample).all()):
                is_index = self._index is not None and torch.equal(
                    largest_R - self._start, self._index
                )
                if is_index and axis == expected:
                    return None  # of a data set, in the step's order: fetched by its index
                return SampleRows(axis, largest_R)
            plain_R = torch.arange(len(rows)) + self._start
            is_expected = axis == expected and len(rows) == self._batch.size
            if is_expected and bool((rows == plain_R[:, None]).any(1).all()):
                # Each row keeps a part of its own sample, and has parts of others, as by cutmix.
                mixed_rows = SampleRows(axis, plain_R)
        return mixed_rows or UNKNOWN_ROWS


def _on_cpu(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_on_cpu(item) for item in value])
    return value.cpu() if isinstance(value, Tensor) else value
