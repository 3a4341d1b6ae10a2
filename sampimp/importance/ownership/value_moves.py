"""Operations on activations that may put samples on other rows from step to step.

A proof holds for later steps with the same sequence of operations (their *signature*). The
signature contains the operations, their settings and the flow of tensors, but not the values of
tensors. An operation that moves rows by values, as an index, a mask or a product with a permutation
matrix does, may therefore move other samples in the next step; such a step is proved each time.

Map: `moves_samples`, `pools_by_value`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampimp.importance.ownership.operations import (
    MOVES_BY_VALUE,
    PIECES,
    PRODUCTS,
    TABLE_LOOKUPS,
    WHOLE_PIECES,
)
from sampimp.importance.ownership.row_notes import as_sequence, is_marked_range
from sampimp.importance.rules.batch import Batch


def moves_samples(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch: Batch,
    is_fixed: Callable[[Tensor], bool],
) -> bool:
    """Return whether an operation may put samples on other rows, by values that may change.

    Parameters
    ----------
    function, args, kwargs
        The operation, on activations.
    batch
        The samples of the pass: their number and axis decide which axes may hold them.
    is_fixed
        Whether a tensor is a buffer or parameter, whose values stay the same from step to step.
    """
    if batch.size < 2 or not (function in MOVES_BY_VALUE or function in PRODUCTS):
        return False
    if function in PRODUCTS:
        return _multiplies_by_data((*args, *kwargs.values()), batch, is_fixed)
    values = args[0] if args else kwargs.get("input")
    if function in TABLE_LOOKUPS:
        table = args[1] if len(args) > 1 else kwargs.get("weight")
        return isinstance(table, Tensor) and table.requires_grad and batch.varies(table)
    if not isinstance(values, Tensor) or not values.dim():
        return False
    if function in (Tensor.__getitem__, Tensor.__setitem__):
        return _index_moves(values, args[1], batch)
    place, default = MOVES_BY_VALUE[function]
    axis = args[place] if len(args) > place >= 0 else kwargs.get("dim", kwargs.get("dims", default))
    if function in PIECES:
        pieces = _row_pieces(function, values, axis, args, kwargs) if axis in (0, batch.dim) else 0
        return pieces >= batch.size
    axes = range(values.dim()) if axis is None else as_sequence(axis)
    return any(_may_hold_samples(values, axis, batch) for axis in axes)


def pools_by_value(function: Callable[..., Any], tensors: Iterable[Tensor], batch: Batch) -> bool:
    """Return whether activations without an axis of samples are combined with data.

    Which rows belong to a sample may then depend on the data, as where a mask selects its rows
    among those of all samples, or where weights behind a mask multiply them.

    Parameters
    ----------
    function, tensors
        The operation, and the tensors among its arguments.
    batch
        The samples of the pass.
    """
    varying = [tensor for tensor in tensors if batch.varies(tensor) and tensor.numel() > 1]
    has_joined_rows = any(
        tensor.requires_grad and batch.size not in tensor.shape for tensor in varying
    )
    return has_joined_rows and any(
        not tensor.requires_grad or (function in PRODUCTS and batch.size in tensor.shape)
        for tensor in varying
    )


def _multiplies_by_data(
    values: Iterable[Any], batch: Batch, is_fixed: Callable[[Tensor], bool]
) -> bool:
    """Return whether activations are multiplied by a matrix of data with an axis of N."""
    factors = [item for value in values for item in as_sequence(value) if isinstance(item, Tensor)]
    matrices = (
        factor
        for factor in factors
        if not factor.requires_grad and factor.ndim > 1 and batch.size in factor.shape[-2:]
    )
    return any(not is_fixed(matrix) for matrix in matrices) and any(
        factor.requires_grad and batch.varies(factor) for factor in factors
    )


def _row_pieces(
    function: Callable[..., Any], values: Tensor, axis: int, args: Any, kwargs: Any
) -> int:
    """Return the number of pieces of one row that an axis is cut into; 0 if they are larger."""
    rows = values.shape[axis] if values.dim() > axis else 0
    number = args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
    if function in (torch.split, Tensor.split):
        return rows if number == 1 else 0
    by_value = isinstance(number, Tensor)
    return rows if function in WHOLE_PIECES or by_value or number == rows else 0


def _may_hold_samples(values: Tensor, axis: int, batch: Batch) -> bool:
    """Return whether an axis may hold samples: the first, the batch's, or one of length N."""
    return axis % values.dim() in (0, batch.dim) or values.shape[axis] == batch.size


def _index_moves(values: Tensor, index: Any, batch: Batch) -> bool:
    """Return whether an index may reorder the rows of an axis that may hold samples."""
    axis = 0
    entries = index if isinstance(index, tuple) else (index,)
    width = sum(entry is not None and entry is not ... for entry in entries)
    for entry in entries:
        if entry is ...:
            axis += values.dim() - width
        elif entry is not None:
            has_samples = axis < values.dim() and _may_hold_samples(values, axis, batch)
            if has_samples and _reorders(entry, values.shape[axis]):
                return True
            axis += 1
    return False


def _reorders(entry: Any, rows: int) -> bool:
    """Return whether an entry of an index is anything but 0, 1, 2, ... or a slice."""
    if not isinstance(entry, Tensor | np.ndarray | list):
        return False
    chosen = torch.as_tensor(entry)
    if is_marked_range(entry) and len(entry) == rows:
        return False
    flat = chosen.flatten()
    if chosen.dtype == torch.bool or chosen.numel() != max(chosen.shape, default=0):
        return True
    return not torch.equal(flat.cpu(), torch.arange(len(flat)))
