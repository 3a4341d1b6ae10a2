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

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from sampimp.importance.ownership.assumed_rows import AssumedRows
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
    is_transformed,
)
from sampimp.importance.ownership.row_numbers import RowNumbers
from sampimp.importance.ownership.row_values import RowValues
from sampimp.importance.ownership.shared_storage import RewrittenStorages, numbers_after_write
from sampimp.importance.rules.batch import Batch

_NOTES: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Step and `SampleRows` of tensors, kept beside them: they may be saved or copied."""


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
    samples
        Positions of the pass's samples among those of the step, which notes contain.
    total
        Number of the step's samples, as far as its passes are known.
    compares
        Whether values are compared, which waits for the device.
    """

    def __init__(
        self,
        batch: Batch,
        index: Tensor | None,
        step: object,
        keeping: RowKeeping,
        samples: slice,
        total: int,
        *,
        compares: bool,
    ) -> None:
        self._batch, self._index, self._step = batch, index, step
        self._keeping = keeping
        self._origins = Origins()
        self._numbers = RowNumbers(batch, index, samples.start, self.of)
        self._assumed = AssumedRows(batch, samples, total)
        self._rewritten = RewrittenStorages()
        self._values = RowValues(compares, index)

    def of(self, data: Tensor) -> SampleRows | None:
        """Return the samples of a tensor's rows; None if it has no axis of samples."""
        noted = self._noted(data)
        if noted is not None:
            return noted
        if data.is_nested:
            return UNKNOWN_ROWS
        return self._assumed.of(data)

    def of_pass(self, data: Tensor) -> SampleRows | None:
        """Return the samples of a tensor's rows as positions in the pass, as `of` does."""
        rows = self.of(data)
        return rows and self._assumed.in_pass(rows)

    def note_made(self, data: Tensor) -> None:
        """Note that a tensor was created in the block, and contains no sample."""
        rows = self.of(data)
        if rows is not None and rows.is_plain and not rows.is_assumed:
            _NOTES[data] = self._step, replace(rows, is_created=True)

    def follow(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note the rows of an operation's outputs, which are data."""
        if is_transformed():
            self._note_unknown(outputs)
            return
        tensors = [output for output in outputs if _is_tensor(output)]
        written, made = _written_and_made(call, tensors)
        before = list(map(self.of, written))
        self._rewritten.know(*made)
        self._follow(call, outputs)
        self.compare(made)
        for output, rows in zip(written, before, strict=True):
            self._values.forget(output)
            self.compare([output])
            if not _are_equal(rows, self.of(output)):
                self._note_sharing(output)

    def _follow(self, call: Call, outputs: Sequence[Any]) -> None:
        inputs, function = call.tensors(), call.function
        if function in CREATES:
            for output in outputs:
                self.note_made(output)
            return
        self._origins.join(inputs, filter(_is_tensor, outputs))
        if any(tensor.is_nested for tensor in inputs):
            self._note_unknown(outputs)
            return
        call = call.by_place()
        if _is_fetch(call, self._index) and self._noted(call.args[0]) is None:
            self._values.trust(outputs[0])
            return
        self.compare(inputs)
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

    def compare(self, data: Iterable[Tensor]) -> None:
        """Note that rows are unknown where values say that they are not as assumed."""
        for tensor in filter(self._batch.varies, data if self._values.are_compared else ()):
            if self._values.contradict(tensor, self.of(tensor)):
                self._note(tensor, UNKNOWN_ROWS)

    def of_inputs(self, inputs: Sequence[Tensor], *, has_rule: bool) -> SampleRows | None:
        """Return the samples of the rows of a layer's inputs, if these are data.

        A rule knows the axis of the samples in its first input. Without a rule, rows count if they
        are not in the batch's order; unknown rows if the inputs differ. None in all other cases.
        """
        if not inputs or not all(map(is_data, inputs)):
            return None
        self.compare(inputs)
        if has_rule:
            rows = self.of_pass(inputs[0])
            is_none = rows is None or rows.is_assumed or rows.is_created or rows.is_of_no_sample
            return None if is_none else rows
        notes = [note for tensor in inputs if (note := self._noted(tensor)) is not None]
        moved = [rows for rows in notes if not (rows.is_created or rows.is_of_no_sample)]
        if not moved:
            return None
        has_plain = any(self._noted(tensor) is None and self.of(tensor) for tensor in inputs)
        is_known = not has_plain and all(map(moved[0].equals, moved))
        return self._assumed.in_pass(moved[0]) if is_known else UNKNOWN_ROWS

    def note_same(self, data: Tensor, source: Tensor) -> None:
        """Note that a tensor has the rows of another one now."""
        self._note(data, self._noted(source))

    def _sample_axis(self, data: Tensor) -> int | None:
        """Return the axis on which a tensor has a row for each sample; None if there is none."""
        rows = self.of(data) if data.dim() and self._batch.varies(data) else None
        if rows is None or rows.is_assumed or data.dim() <= rows.axis:
            return None
        return rows.axis if data.shape[rows.axis] == self._batch.size else None

    def _noted(self, data: Tensor) -> SampleRows | None:
        """Return the note of this step on a tensor."""
        if self._rewritten.hold(data):
            return UNKNOWN_ROWS
        step, rows = _NOTES.get(data, (None, None))
        return rows if step is self._step else None

    def _note(self, data: Tensor, rows: SampleRows | None) -> None:
        _NOTES.pop(data, None)
        if rows is not None and not _are_equal(rows, self.of(data)):
            _NOTES[data] = self._step, rows

    def _note_unknown(self, outputs: Iterable[Any]) -> None:
        for output in filter(_is_tensor, outputs):
            self._note(output, UNKNOWN_ROWS)

    def _note_sharing(self, written: Tensor) -> None:
        """Note the rows of the tensor that a view was written into; all other views are unknown."""
        base = written._base
        if base is None:
            self._rewritten.add(written)
            return
        before = self._numbers.numbered(base)
        numbers = numbers_after_write(base, before, written, self._numbers.numbered(written))
        if numbers is None or not torch.equal(numbers, before):
            self._rewritten.add(written, base)
            rows = UNKNOWN_ROWS if numbers is None else self._numbers.rows_of(numbers, base)
            self._note(base, rows)

    def _follow_sort(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note where the samples are sorted: a vector as a whole, or each feature by itself."""
        data = call.args[0]
        rows = self.of(data)
        place, default = SORTS_FEATURES[call.function]
        if rows is None or call.argument(place, "dim", default) % data.dim() != rows.axis:
            self._follow_values(call, outputs)
        elif data.dim() > 1 or len(outputs) < 2 or rows.samples is None:
            self._note_unknown(outputs)
        else:  # `outputs[1]`, positions to index with, is no data
            self._note(outputs[0], SampleRows(0, rows.samples[outputs[1].cpu()]))

    def _follow_move(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note the outputs' rows, by carrying out the operation on row numbers."""
        moved, others = call.split(MOVES_ENTRIES[call.function])
        index_rows = self._index_rows(others)
        all_rows = [
            rows for tensor in moved if self._batch.varies(tensor) and (rows := self.of(tensor))
        ]
        is_guess = all(rows.is_guess for rows in all_rows)
        if not all_rows or (is_guess and index_rows):
            if index_rows is not None:
                for output in outputs:
                    self._note(output, _rows_of_lookup(call, index_rows))
            elif any(rows.is_created for tensor in others if (rows := self._noted(tensor))):
                for output in filter(_is_tensor, outputs):
                    self.note_made(output)
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
                rows = self._numbers.rows_of(number, output)
                self._note(output, self._guessed(rows, output) if is_guess and rows else rows)

    def _guessed(self, rows: SampleRows, output: Tensor) -> SampleRows | None:
        """Return rows that were moved on an axis that was a guess; None if they need not be."""
        known = self.of(output)
        if self._assumed.in_pass(rows).is_ordered(self._batch.size):
            return None
        if known is None or known.is_guess:
            return replace(rows, is_guess=True)
        return rows if known.axis == rows.axis else None

    def _index_rows(self, tensors: Iterable[Tensor]) -> SampleRows | None:
        """Return the rows of an index, mask or condition that is not in the batch's order."""
        for tensor in filter(self._batch.varies, tensors):
            rows = self._noted(tensor)
            if rows is not None and not rows.is_created:
                return rows
        return None

    def _follow_values(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note that rows stay in place.

        Data combined with the same data in another order, as by mixup, are in the batch's order.
        Other data in the batch's order may be meant for either: the rows are unknown.
        """
        inputs = [
            tensor for tensor in call.tensors() if tensor.dim() and self._batch.varies(tensor)
        ]
        known = [
            (tensor, rows) for tensor in inputs if (rows := self.of(tensor)) and not rows.is_assumed
        ]
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
            if (rows := self.of(tensor))
            and not (rows.is_assumed or rows.is_created or rows.is_of_no_sample)
        ]
        if not factors or _is_left_alone(call, factors):
            self._follow_values(call, outputs)
            return
        (output,) = outputs
        axis = self._batch.axis(output.dim(), int(output.is_floating_point()))
        plain = SampleRows(axis, self._assumed.samples)
        found = []
        for factor, _ in factors:
            samples = self._numbers.numbered(factor)
            numbers = combined_samples(call, factor, samples)
            found.append(self._numbers.rows_of(numbers, output) or plain)
        self._note(output, agreed_rows(found, axis))


def _written_and_made(call: Call, outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs that are arguments, written into, and all others."""
    targets = {id(value) for value in (*call.args[:1], call.kwargs.get("out"))}
    return (
        [output for output in outputs if id(output) in targets],
        [output for output in outputs if id(output) not in targets],
    )


def _is_fetch(call: Call, index: Tensor | None) -> bool:
    """Return whether an operation fetches the step's samples from a data set by their index."""
    given = None
    if call.function is Tensor.__getitem__:
        given = call.args[1]
    elif call.function in (torch.index_select, Tensor.index_select):
        given = call.argument(2, "index")
    if index is None or not isinstance(given, list | np.ndarray | Tensor):
        return False
    given = torch.as_tensor(given)
    is_index = given.dtype in (torch.int32, torch.int64) and given.shape == index.shape
    return is_index and torch.equal(given.cpu().long(), index)


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


def _are_equal(first: SampleRows | None, second: SampleRows | None) -> bool:
    """Return whether two notes, or no notes, say the same."""
    if first is None or second is None:
        return first is second
    return first.is_created == second.is_created and first.equals(second)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
