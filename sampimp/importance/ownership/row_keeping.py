"""Whether an operation on data keeps each sample on its row, found by carrying it out again.

    f keeps rows:  f(P x) = P f(x)  for an output with a row for each sample,
                   f(P x) = f(x)    for any other output,

with P a permutation of the samples. A sort, a shift or a piece of the rows fails; arithmetic, a
cast, or a mean over the batch passes. With one sample's row replaced by another's, the output's row
of that sample changes most: this finds a swap of two samples, with which P commutes.

Inputs are copied, and random states restored: neither the data nor the training changes. The result
holds for the function and its settings, so that each is tested once.

Map: `RowKeeping`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sampimp.importance.ownership.call import Call

AxisOf = Callable[[Tensor], int | None]
"""Returns the axis of the samples of an input; None if it has none."""

Axes = Mapping[int, int | None]
"""Axis of the samples of each input, by its id."""

_TOLERANCE = 1e-3
"""Relative difference that is no change of rows: sums over samples depend on their order."""

_MOST_RESULTS = 1000
"""Results that are kept; settings that differ in every step would fill the memory (arbitrary)."""

_EXACT_BELOW = 9
"""Whole numbers below are axes or choices; larger ones are lengths."""

_COMMUNICATION = ("c10d", "_c10d_functional", "_dtensor")
"""Namespaces of operations that other processes would have to repeat."""


class RowKeeping:
    """Which functions keep the rows of the samples, as far as they have been tested."""

    def __init__(self) -> None:
        self._results: dict[Any, list[bool]] = {}

    def kept(self, call: Call, axis_of: AxisOf, size: int) -> list[bool]:
        """Return for each tensor of an operation's result whether it keeps rows.

        The list is empty if that cannot be tested.

        Parameters
        ----------
        call
            The operation, which has been carried out.
        axis_of
            The axis of each input's samples.
        size
            Number of samples.
        """
        if size < 2 or all(axis_of(tensor) is None for tensor in _inputs(call)):
            return []
        names = _settings(tuple(sorted(call.kwargs.items())))
        key = call.function, _settings(call.args), names
        if key in self._results:
            return self._results[key]
        result, holds = _test(call, axis_of, size) if _can_be_repeated(call) else ([], False)
        if not holds:
            return result
        if len(self._results) >= _MOST_RESULTS:
            self._results.clear()
        self._results[key] = result
        return result


def _settings(value: Any) -> Any:
    """Return what identifies an argument: numbers that are choices, and types."""
    if isinstance(value, list | tuple):
        return tuple(map(_settings, value)) if len(value) < _EXACT_BELOW else len(value)
    if isinstance(value, Tensor):
        return value.dim()
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < _EXACT_BELOW):
        return type(value).__name__, value
    return type(value).__name__


def _inputs(call: Call) -> list[Tensor]:
    """Return the tensors among the arguments, at any depth."""
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def _can_be_repeated(call: Call) -> bool:
    """Return whether carrying an operation out again, on copies, has no effect on anything else."""
    function = call.function
    namespace = getattr(function, "_qualified_op_name", getattr(function, "namespace", ""))
    leaves = tree_leaves((call.args, call.kwargs))
    return (
        call.kwargs.get("out") is None
        and not str(namespace).startswith(_COMMUNICATION)
        and not any(isinstance(leaf, torch.Generator) or callable(leaf) for leaf in leaves)
        and all(tensor.device.type in ("cpu", "cuda") for tensor in _inputs(call))
    )


def _devices(call: Call) -> list[int]:
    """Return the GPUs of the inputs, whose random states an operation may change."""
    return sorted({tensor.get_device() for tensor in _inputs(call) if tensor.is_cuda})


@torch.no_grad()
def _outputs(
    call: Call, rows: Tensor | None = None, axes: Axes | None = None, seed: int = 0
) -> list[Tensor]:
    """Return the outputs for these rows of the inputs with an axis of samples."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        axis = (axes or {}).get(id(value))
        if rows is None or axis is None:
            return value.detach().clone()
        return _selected(value.detach(), axis, rows)

    args, kwargs = tree_map(copied, call.args), tree_map(copied, dict(call.kwargs))
    torch.default_generator.manual_seed(seed)
    for device in _devices(call):
        torch.cuda.default_generators[device].manual_seed(seed)
    leaves = tree_leaves(call.function(*args, **kwargs))
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def _test(call: Call, axis_of: AxisOf, size: int) -> tuple[list[bool], bool]:
    """Return for each output whether it keeps rows, and whether that holds for other values.

    There is nothing for each output if this call does not tell. The result may depend on an input
    that does not move with the samples, such as the positions of `index_add`.
    """
    inputs = _inputs(call)
    axes = {id(tensor): axis_of(tensor) for tensor in inputs}
    most_axes = max(tensor.dim() for tensor in inputs if axes[id(tensor)] is not None)
    # A vector of as many features as there are samples does not move with them.
    wide = {
        id(tensor): axes[id(tensor)] if tensor.dim() == most_axes else None for tensor in inputs
    }
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    if torch.equal(order, torch.arange(size)):
        order = order.roll(1)

    def output_axis(output: Tensor) -> int | None:
        for tensor in inputs:
            axis = axes[id(tensor)]
            if axis is not None and output.dim() == tensor.dim() and output.shape[axis] == size:
                return axis
        return axis_of(output)

    with torch.random.fork_rng(devices=_devices(call)):
        try:
            plain = _outputs(call)
            is_random = not all(map(_equal, plain, _outputs(call, seed=1)))
        except Exception:  # of whichever operation: it cannot be repeated
            return [], False
        if is_random or _rows_are_equal(inputs, axes, order):
            return [], False
        both = [_kept(call, plain, order, moved, output_axis) for moved in (axes, wide)]
        kept = [any(each) for each in zip(*both, strict=True)]
        return kept, kept == both[0]


def _kept(
    call: Call, plain: list[Tensor], order: Tensor, axes: Axes, output_axis: AxisOf
) -> list[bool]:
    """Return whether each output moves with the samples, if these are on the given axes."""
    replaced = torch.arange(len(order))
    replaced[order[0]] = order[1]
    try:
        permuted, changed = _outputs(call, order, axes), _outputs(call, replaced, axes)
    except Exception:  # of whichever operation: it depends on the order
        return [False] * len(plain)
    return [
        _is_kept(*each, order, output_axis) for each in zip(plain, permuted, changed, strict=True)
    ]


def _rows_are_equal(inputs: list[Tensor], axes: Mapping[int, int | None], order: Tensor) -> bool:
    """Return whether a permutation of the samples changes no input."""
    return all(
        torch.equal(_dense(tensor), _dense(_selected(tensor, axis, order)))
        for tensor in inputs
        if (axis := axes[id(tensor)]) is not None
    )


def _is_kept(
    plain: Tensor, permuted: Tensor, changed: Tensor, order: Tensor, axis_of: AxisOf
) -> bool:
    """Return whether an output moves with the samples, or does not depend on their order."""
    axis = axis_of(plain)
    if axis is None:
        return _equal(plain, permuted)
    if not _equal(_selected(plain, axis, order), permuted):
        return False
    change = (_real(changed) - _real(plain)).nan_to_num().abs().movedim(axis, 0)
    by_row = change.flatten(1).sum(1) if change.dim() > 1 else change
    return bool(by_row[order[0]] >= (1 - _TOLERANCE) * by_row.max())


def _selected(tensor: Tensor, axis: int, rows: Tensor) -> Tensor:
    """Return rows of a tensor, in its layout."""
    selected = _dense(tensor).index_select(axis, rows.to(tensor.device))
    is_dense = tensor.layout == torch.strided
    return selected if is_dense else selected.to_sparse(layout=tensor.layout)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _real(tensor: Tensor) -> Tensor:
    """Return values in double precision, of complex ones both parts on a last axis."""
    values = _dense(tensor)
    return (torch.view_as_real(values) if values.is_complex() else values).double()


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two outputs are equal within the tolerance."""
    if first.shape != second.shape:
        return False
    if not first.numel():
        return True
    first, second = _real(first), _real(second)
    largest = float(first.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    return torch.allclose(first, second, _TOLERANCE, _TOLERANCE * largest, equal_nan=True)
