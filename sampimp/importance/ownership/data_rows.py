"""Which sample of the step each row of its data belongs to.

The proof relates the rows of each layer's output to rows of the loss. The data tell which samples
these are: a batch is in the order of the step's index. Where the block reorders data (`x[order]`,
`flip`, `cat`), the same operation is carried out on the numbers of their rows, and the result is
noted on the output tensor. Only data, which depend on no parameter, are followed; the proof finds
the samples of activations.

Operations that `operations` lists are followed by what they are known to do, products by what their
factors contribute (`product_rows`). Any other operation must keep each sample on its row, which is
tested (`row_keeping`); otherwise the rows of its result are unknown, and a layer refuses them.

Map: `DataRows` (follows the data of one pass).

Shape suffix: R rows of an axis.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from sampimp.importance.ownership.call import Call
from sampimp.importance.ownership.operations import (
    CREATES,
    MOVES_ENTRIES,
    PRODUCTS,
    ROW_PRODUCTS,
    SORTS_FEATURES,
    WRITES,
)
from sampimp.importance.ownership.product_rows import agreed_rows, combined_samples
from sampimp.importance.ownership.row_keeping import RowKeeping
from sampimp.importance.ownership.row_notes import (
    UNKNOWN_ROWS,
    Origins,
    SampleRows,
    is_data,
)
from sampimp.importance.ownership.row_numbers import RowNumbers
from sampimp.importance.rules.batch import Batch

_NOTES: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Step, pass and `SampleRows` of tensors, kept beside them: they may be saved or copied."""


class DataRows:
    """The samples of the rows of all data in one pass.

    Parameters
    ----------
    batch
        The samples of the pass: their number, their axis, and which tensors depend on them.
    index
        The step's index of the pass's samples, by which they may be fetched inside the block; None
        if it is not known.
    step
        The same object in all passes of a step.
    keeping
        What is known of functions that are in no table of `operations`.
    """

    def __init__(
        self, batch: Batch, index: Tensor | None, step: object, keeping: RowKeeping
    ) -> None:
        self._batch, self._index, self._step = batch, index, step
        self._keeping = keeping
        self._origins = Origins()
        self._numbers = RowNumbers(batch, index, self.of)
        self._pass = object()  # another pass of the step may meet the same data
        self._plain: dict[int, SampleRows] = {}  # by axis

    def of(self, data: Tensor) -> SampleRows | None:
        """Return the samples of a tensor's rows; None if it has no axis of samples."""
        noted = self._noted(data)
        if noted is not None:
            return noted
        if data.is_nested:
            return UNKNOWN_ROWS
        axis = self._batch.axis(data.dim(), int(data.is_floating_point()))
        if data.dim() <= axis or data.shape[axis] != self._batch.size:
            return None
        if axis and len(data) == data.shape[axis]:
            return None  # as many positions as samples; it may be transposed later
        if axis not in self._plain:
            self._plain[axis] = SampleRows(axis, torch.arange(self._batch.size), is_plain=True)
        return self._plain[axis]

    def note_made(self, data: Tensor) -> None:
        """Note that a tensor was created in the block, and contains no sample."""
        rows = self.of(data)
        if rows is not None and rows.is_plain:
            created = replace(rows, is_created=True)
            _NOTES[data] = self._step, self._pass, created

    def follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[Any],
    ) -> None:
        """Note the rows of an operation's outputs, which are data."""
        if function in CREATES:
            for output in outputs:
                self.note_made(output)
            return
        tensors = Call(function, args, kwargs).tensors()
        self._origins.join(tensors, filter(_is_tensor, outputs))
        if any(tensor.is_nested for tensor in tensors):
            self._note_unknown(outputs)
            return
        args = args or (kwargs.get("input", kwargs.get("tensors")),)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input", "tensors")}
        call = Call(function, args, kwargs)
        if function in SORTS_FEATURES:
            self._follow_sort(call, outputs)
        elif function in MOVES_ENTRIES:
            self._follow_move(call, outputs)
        elif function in PRODUCTS:
            self._follow_product(call, outputs)
        else:
            kept = self._keeping.kept(call, self._sample_axis, self._batch.size)
            if len(kept) != len(outputs):
                kept = [all(kept)] * len(outputs)
            self._follow_values(call, list(compress(outputs, kept)))
            self._note_unknown(compress(outputs, (not is_kept for is_kept in kept)))

    def of_inputs(self, inputs: Sequence[Tensor], *, has_rule: bool) -> SampleRows | None:
        """Return the samples of the rows of a layer's inputs, if these are data.

        A rule knows the axis of the samples in its first input. Without a rule, rows count if they
        are not in the batch's order; unknown rows if the inputs differ. None in all other cases.
        """
        if not inputs or not all(map(is_data, inputs)):
            return None
        if has_rule:
            rows = self.of(inputs[0])
            return None if rows is None or rows.is_of_no_sample else rows
        notes = [note for tensor in inputs if (note := self._noted(tensor)) is not None]
        moved = [rows for rows in notes if not (rows.is_created or rows.is_of_no_sample)]
        if not moved:
            return None
        has_plain = any(self._noted(tensor) is None and self.of(tensor) for tensor in inputs)
        return UNKNOWN_ROWS if has_plain or not all(map(moved[0].equals, moved)) else moved[0]

    def note_same(self, data: Tensor, source: Tensor) -> None:
        """Note that a tensor has the rows of another one now."""
        self._note(data, self._noted(source))

    def _sample_axis(self, data: Tensor) -> int | None:
        """Return the axis on which a tensor has a row for each sample; None if there is none."""
        rows = self.of(data) if data.dim() and self._batch.varies(data) else None
        fits = rows is not None and data.dim() > rows.axis
        return rows.axis if rows and fits and data.shape[rows.axis] == self._batch.size else None

    def _noted(self, data: Tensor) -> SampleRows | None:
        """Return the note of this step on a tensor."""
        step, number, rows = _NOTES.get(data, (None, None, None))
        if step is not self._step:
            return None
        return rows if number is self._pass else UNKNOWN_ROWS  # moved before its own pass began

    def _note(self, data: Tensor, rows: SampleRows | None) -> None:
        _NOTES.pop(data, None)
        known = self.of(data)
        if rows is None or (known is not None and rows.equals(known)):
            return
        _NOTES[data] = self._step, self._pass, rows

    def _note_unknown(self, outputs: Iterable[Any]) -> None:
        for output in filter(_is_tensor, outputs):
            self._note(output, UNKNOWN_ROWS)

    def _follow_sort(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note where the samples are sorted: a vector as a whole, or each feature by itself."""
        data = call.args[0]
        rows = self.of(data)
        place, default = SORTS_FEATURES[call.function]
        if rows is None or call.argument(place, "dim", default) % data.dim() != rows.axis:
            return
        if data.dim() > 1 or len(outputs) < 2 or rows.samples is None:
            self._note_unknown(outputs)
        else:  # `outputs[1]`, positions to index with, is no data
            self._note(outputs[0], SampleRows(0, rows.samples[outputs[1].cpu()]))

    # Operations that move entries.

    def _follow_move(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note the outputs' rows, by carrying out the operation on row numbers."""
        moved, others = call.split(MOVES_ENTRIES[call.function])
        index_rows = self._index_rows(others)
        if not any(self.of(tensor) for tensor in moved if self._batch.varies(tensor)):
            if index_rows is not None:
                for output in outputs:
                    self._note(output, _rows_of_lookup(call, index_rows))
            return
        if self._is_fetched(call):
            return
        if index_rows and call.function in WRITES:
            self._note_unknown(outputs)
            return
        has_named_tensor = any(
            _is_tensor(value) and name != "index" for name, value in call.kwargs.items()
        )
        numbers = None if has_named_tensor else self._numbers.moved(call)
        for output, number in zip(outputs, numbers or [None] * len(outputs), strict=False):
            if _is_tensor(output):
                self._note(output, self._numbers.rows_of(number, output))

    def _index_rows(self, tensors: Iterable[Tensor]) -> SampleRows | None:
        """Return the rows of an index, mask or condition that is not in the batch's order."""
        for tensor in filter(self._batch.varies, tensors):
            rows = self._noted(tensor)
            if rows is not None and not rows.is_created:
                return rows
        return None

    def _is_fetched(self, call: Call) -> bool:
        """Return whether an operation fetches the step's samples from a data set by their index."""
        index = None
        if call.function is Tensor.__getitem__:
            index = call.args[1]
        elif call.function in (torch.index_select, Tensor.index_select):
            index = call.argument(2, "index")
        if self._index is None or not isinstance(index, list | np.ndarray | Tensor):
            return False
        if self._noted(call.args[0]) is not None:  # a batch, not a data set
            return False
        index = torch.as_tensor(index)
        if index.dtype not in (torch.int32, torch.int64) or index.shape != self._index.shape:
            return False
        return torch.equal(index.cpu().long(), self._index)

    # Operations that compute values.

    def _follow_values(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note that rows stay in place.

        Data combined with the same data in another order, as by mixup, are in the batch's order.
        Other data in the batch's order may be meant for either: the rows are unknown.
        """
        inputs = [
            tensor for tensor in call.tensors() if tensor.dim() and self._batch.varies(tensor)
        ]
        known = [(tensor, rows) for tensor in inputs if (rows := self.of(tensor)) is not None]
        moved = [(tensor, rows) for tensor, rows in known if self._noted(tensor)]
        if not moved:
            return
        of_samples = [
            (tensor, rows)
            for tensor, rows in moved
            if not (rows.is_created or rows.is_of_no_sample)
        ]
        in_order = [
            tensor
            for tensor, rows in known
            if not self._noted(tensor) and _are_aligned(tensor, rows, *moved[0])
        ]
        if in_order:
            if not all(self._origins.shared(tensor, in_order) for tensor, _ in of_samples):
                self._note_unknown(outputs)
            return
        of_samples.sort(key=lambda pair: pair[1].samples is None)
        source, rows = (of_samples or moved)[0]
        for tensor, others in of_samples:
            has_rows = tensor.shape[others.axis] == source.shape[rows.axis]
            if not rows.equals(others) and has_rows and _are_aligned(tensor, others, source, rows):
                self._note_unknown(outputs)
                return
        for output in outputs:
            if not _is_tensor(output) or not output.dim():
                continue
            same_axes = rows.samples is not None and output.dim() == source.dim()
            fits = same_axes and output.shape[rows.axis] == source.shape[rows.axis]
            if not rows.is_created:
                self._note(output, rows if fits else UNKNOWN_ROWS)
            elif fits:
                self.note_made(output)

    def _follow_product(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note the samples of a product's rows, if the factors that have any agree on them.

        A permutation matrix from outside the block does not: it has N rows as data have.
        """
        factors = [
            (tensor, rows)
            for tensor in call.tensors()
            if tensor.dim() and self._batch.varies(tensor)
            if (rows := self.of(tensor)) and not (rows.is_created or rows.is_of_no_sample)
        ]
        if not factors or _is_left_alone(call, factors):
            self._follow_values(call, outputs)
            return
        (output,) = outputs
        axis = self._batch.axis(output.dim(), int(output.is_floating_point()))
        plain = SampleRows(axis, torch.arange(self._batch.size))
        found = []
        for factor, _ in factors:
            samples = self._numbers.numbered(factor)
            numbers = combined_samples(call, factor, samples)
            found.append(self._numbers.rows_of(numbers, output) or plain)
        self._note(output, agreed_rows(found, axis))


def _rows_of_lookup(call: Call, index_rows: SampleRows) -> SampleRows:
    """Return the rows of what an index takes from a table that has no samples."""
    index = call.args[1] if call.function is Tensor.__getitem__ else call.args[0]
    is_entries = _is_tensor(index) and index.dtype != torch.bool
    if call.function in (Tensor.__getitem__, functional.embedding) and is_entries:
        return index_rows  # the index's axes come first
    return UNKNOWN_ROWS


def _is_left_alone(call: Call, factors: Sequence[tuple[Tensor, SampleRows]]) -> bool:
    """Return whether the samples are rows of the left factor alone, and so of the product."""
    left, rows = factors[0]
    is_left = len(factors) == 1 and left is call.args[0] and rows.axis < left.dim() - 1
    return is_left and call.function in ROW_PRODUCTS


def _are_aligned(first: Tensor, rows: SampleRows, second: Tensor, others: SampleRows) -> bool:
    """Return whether the samples of two tensors are on one axis where they are broadcast.

    Those of a vector of as many features as there are samples are not.
    """
    return first.dim() - rows.axis == second.dim() - others.axis


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
