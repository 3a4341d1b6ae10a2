"""The signature of a forward pass: a hash of its operations and of their settings.

A proof of the row-to-sample mapping (`sampimp.importance.ownership.proof`) holds for later steps
that carry out the same operations. The operations are compared by a hash of the functions,
of the places in autograd's graph from which their tensors come, and of axes and other choices.
Lengths are left out, since batches differ in size.

Map: `OperationSignature`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from sampimp.importance.ownership.operations import SELECT_BY_NUMBER, TAKE_LENGTHS

_AXIS_LIMIT = 9
"""Whole numbers with an absolute value from here on are lengths, not axes; arbitrary."""


class OperationSignature:
    """Hash of the operations of one forward pass so far.

    Parameters
    ----------
    rows
        Row of each parameter, by its id.
    """

    __slots__ = ("_first_node", "_rows", "value")

    def __init__(self, rows: Mapping[int, int]) -> None:
        self._rows = rows
        self._first_node: int | None = None  # sequence number of the pass's first node
        self.value = 0

    def add(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        leading_axes: int,
    ) -> None:
        """Include an operation; `leading_axes` of an output may hold samples."""
        exact = function in SELECT_BY_NUMBER
        settings: tuple[Any, ...] = ()
        if function in TAKE_LENGTHS:
            args, kwargs = args[:1], {}
        elif function is Tensor.__getitem__ or function is Tensor.__setitem__:
            entries = args[1] if isinstance(args[1], tuple) else (args[1],)
            takes_rows = any(map(_takes_rows, entries[:leading_axes]))
            for place, entry in enumerate(entries):
                # Of whole rows, only the length is cut: it is that of the longest sample.
                is_exact = takes_rows or place < leading_axes or isinstance(entry, int)
                settings += self.settings((entry,), is_exact)
            args = (args[0], *args[2:])
        settings += self.settings(args, exact)
        if kwargs:
            settings += self.settings(kwargs.values(), exact)
        self.value = hash((self.value, function, settings))

    def add_axis(self, axis: int) -> None:
        """Include the axis on which data have their samples."""
        self.value = hash((self.value, axis))

    def settings(self, values: Iterable[Any], exact: bool) -> tuple[Any, ...]:
        """Return the origins of tensors, axes and choices among arguments, to be hashed.

        Lengths are included only if whole numbers have to be exact.
        """
        settings: list[Any] = []
        for value in values:
            if isinstance(value, Tensor):
                node = value.grad_fn
                if node is not None:  # sequence numbers go on from pass to pass
                    number = node._sequence_nr()
                    if self._first_node is None:
                        self._first_node = number
                    settings.append((number - self._first_node, value.output_nr))
                elif value.ndim or value.device.type != "cpu":
                    settings.append(self._rows.get(id(value), ("data", value.ndim)))
                else:
                    settings.append(_zero_or_one(value.item()))
            elif isinstance(value, int):
                # Sign and size apart, because hash(-1) == hash(-2).
                is_included = exact or -_AXIS_LIMIT < value < _AXIS_LIMIT
                settings.append((value < 0, abs(value)) if is_included else None)
            elif isinstance(value, float):
                settings.append(_zero_or_one(value))
            elif isinstance(value, str):
                settings.append(value)
            elif isinstance(value, list | tuple):
                settings.append(self.settings(value, exact))
            elif isinstance(value, slice):
                settings.append(self.settings((value.start, value.stop, value.step), exact))
        return tuple(settings)


def _takes_rows(entry: Any) -> bool:
    """Return whether an entry of an index takes anything but the whole axis."""
    is_whole = isinstance(entry, slice) and (entry.start, entry.stop, entry.step) == (None,) * 3
    return not (is_whole or entry is None or entry is ...)


def _zero_or_one(value: float) -> float | None:
    """Return 0 or 1, factors that may hide or show a tensor; None for any other number."""
    return value if value in (0.0, 1.0) else None
