"""Notes on data tensors: the sample of each row, and marks.

Map: `SampleRows`, `UNKNOWN_ROWS`, `NO_SAMPLE`, `UNKNOWN_SAMPLE`; `Origins`; `mark_as_range`,
`is_marked_range`, `mark_as_data`, `is_data`; `is_transformed`; `as_sequence`.

Shape suffix: R rows of an axis.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Kept beside the tensors, which may be saved or copied.
_RANGES: WeakIdKeyDictionary = WeakIdKeyDictionary()
_DATA: WeakIdKeyDictionary = WeakIdKeyDictionary()

NO_SAMPLE, UNKNOWN_SAMPLE = -1, -2
"""Numbers of entries that belong to no sample, or to an unknown sample."""


@dataclass(frozen=True)
class SampleRows:
    """The sample of each row of a tensor."""

    axis: int
    samples: Tensor | None
    """(R,), positions in the batch, -1 for no sample; None where that is not known any more."""

    is_plain: bool = False
    """Whether row n is known to be that of sample n."""

    is_guess: bool = False
    """Whether the samples are taken to be on the only axis of N, which is not the expected one."""

    is_created: bool = False
    """Whether the rows were created in the block (noise). Combined with data, they take the data's
    samples."""

    @property
    def is_assumed(self) -> bool:
        """Whether nothing but a length says that the axis holds samples."""
        return self.is_guess and self.is_plain

    @property
    def is_of_no_sample(self) -> bool:
        """Whether no row belongs to a sample, as of noise."""
        if self.is_plain or self.samples is None:
            return False
        return bool((self.samples < 0).all())

    def is_ordered(self, size: int) -> bool:
        """Return whether the samples are in the batch's order, perhaps joined with positions."""
        if self.is_plain:
            return True
        if self.samples is None or not size or len(self.samples) % size:
            return False
        rows = torch.arange(len(self.samples))
        orders = (rows // (len(rows) // size or 1), rows % size)
        return any(torch.equal(self.samples, order) for order in orders)

    def equals(self, other: "SampleRows") -> bool:
        """Return whether the axis and the samples are the same, or both unknown."""
        if self.samples is None or other.samples is None:
            return self.samples is other.samples
        return self.axis == other.axis and torch.equal(self.samples, other.samples)


UNKNOWN_ROWS = SampleRows(0, None)
"""The note on data whose rows cannot be followed."""


class Origins:
    """The data from outside the block that the tensors of a pass were made of."""

    def __init__(self) -> None:
        self._marks: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def _of(self, tensors: Iterable[Tensor]) -> frozenset[object]:
        """Return a mark for each tensor from outside that these were made of."""
        marks: frozenset[object] = frozenset()
        for tensor in tensors:
            own = self._marks.get(tensor)
            if own is None:
                own = self._marks[tensor] = frozenset((object(),))
            marks = marks | own if marks else own
        return marks

    def join(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Note that outputs were made of inputs."""
        marks = self._of(inputs)
        for output in outputs:
            self._marks[output] = marks

    def shared(self, tensor: Tensor, others: Iterable[Tensor]) -> bool:
        """Return whether a tensor and any of others were made of the same data."""
        return bool(self._of([tensor]) & self._of(others))


def mark_as_range(tensor: Tensor) -> None:
    """Mark a tensor as 0, 1, 2, ..., so that it need not be read from its device."""
    _RANGES[tensor] = True


def is_marked_range(tensor: Any) -> bool:
    """Return whether `mark_as_range` was called on a tensor."""
    return isinstance(tensor, Tensor) and tensor in _RANGES


def is_data(value: Any) -> bool:
    """Return whether a value depends on no parameter: data, or not a tensor."""
    return (
        not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf or value in _DATA
    )


def mark_as_data(tensor: Tensor) -> None:
    """Mark a tensor that has a gradient, but depends on no parameter."""
    _DATA[tensor] = True


def is_transformed() -> bool:
    """Return whether a transform of torch.func runs, inside which tensors stand for several."""
    return torch._C._functorch.maybe_current_level() is not None


def as_sequence(value: Any) -> Sequence[Any]:
    """Return value if it is a list or tuple, else [value]."""
    return value if isinstance(value, list | tuple) else [value]
