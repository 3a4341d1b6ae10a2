"""Tables of torch functions, by what they do to the samples' rows and to a loss.

The names in a table stand for the function of `torch` and for the method of `Tensor`, whichever
exist. The proof that no samples are mixed does not use them. A function that they lack may not
reorder data (`row_keeping`), and causes no new proof where it moves activations by value.

Map: of losses, `LOSSES_BY_ROW`, `CASTS`, `JOINS_AXES`, `LINEAR_IN_FIRST` (for
`sampimp.importance.ownership.tape`); of data, `MOVES_ENTRIES`, `IN_PLACE`, `SORTS_FEATURES`,
`WRITES`, `CREATES` (for `data_rows`); of activations, `MOVES_BY_VALUE`, `TABLE_LOOKUPS`,
`PRODUCTS`, `WHOLE_PIECES`, `PIECES` (for `value_moves`), `REVERSES`; of the signature of a step,
`SELECT_BY_NUMBER`, `TAKE_LENGTHS` (for the recorder).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _table(*rows: tuple[str, Any]) -> dict[Any, Any]:
    """Return {function: value} for rows of names and their value, functions and methods."""
    return {
        getattr(owner, name): value
        for names, value in rows
        for name in names.split()
        for owner in (torch, Tensor)
        if hasattr(owner, name)
    }


def _functions(*names: str) -> set[Any]:
    return set(_table(*((group, None) for group in names)))


# The loss.

LOSSES_BY_ROW = {
    functional.cross_entropy,
    functional.nll_loss,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.kl_div,
}
"""Losses that are a sum or mean of terms that each depend on one row of the input."""

CASTS = {Tensor.float, Tensor.double, Tensor.to, Tensor.contiguous}
"""Operations that keep shape and values, except for the format."""

JOINS_AXES = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}
"""Operations that may join the axes of samples and positions before a loss by row."""

LINEAR_IN_FIRST = {
    # casts
    *CASTS,
    # sums
    *(torch.sum, torch.mean, Tensor.sum, Tensor.mean),
    # factors
    *(Tensor.neg, Tensor.__neg__),
    *(Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__),
    *(Tensor.div, torch.div, Tensor.__truediv__),
    # entries
    *(Tensor.view, Tensor.reshape, Tensor.__getitem__),
}
"""Operations that are linear in their first argument."""


# The order of data.

MOVES_ENTRIES: dict[Any, tuple[int, ...]] = _table(
    # another shape
    ("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel", (0,)),
    # another order of axes
    ("permute transpose swapaxes swapdims t movedim moveaxis adjoint", (0,)),
    # copies
    ("expand expand_as broadcast_to repeat repeat_interleave tile unfold", (0,)),
    # several tensors joined
    ("cat concat concatenate stack hstack vstack dstack column_stack row_stack", (0,)),
    # pieces
    ("split chunk tensor_split unbind hsplit vsplit dsplit select narrow diagonal", (0,)),
    # entries chosen by an index or a mask
    ("__getitem__ index_select gather take take_along_dim masked_select", (0,)),
    # another order of rows
    ("flip fliplr flipud roll rot90", (0,)),
    # entries of two tensors, chosen by a condition (argument 0)
    ("where", (1, 2)),
    # values written into the first argument; the arguments between are indices
    ("copy_", (0, 1)),
    ("__setitem__ masked_scatter masked_scatter_ index_put index_put_", (0, 2)),
    ("scatter scatter_ index_copy index_copy_", (0, 3)),
) | {
    # properties
    **{getattr(Tensor, name).__get__: (0,) for name in ("T", "mT", "H", "mH")},
    # sequences packed and padded
    torch._VF._pack_padded_sequence: (0,),
    torch._C._nn.pad_sequence: (0,),
    # rows of a table (argument 1)
    functional.embedding: (1,),
}
"""Operations that move entries and compute none.

Each value has the positions of the moved tensors among the arguments.
"""

IN_PLACE = _functions("__setitem__ masked_scatter_ index_put_ scatter_ index_copy_ copy_")
"""Operations of `MOVES_ENTRIES` that write into their first argument."""

WRITES = IN_PLACE | _functions("masked_scatter index_put scatter index_copy")
"""Operations of `MOVES_ENTRIES` that write values where an index says."""

WHERE = _functions("where")
"""Operations of `MOVES_ENTRIES` that choose between two tensors by a condition."""

SORTS_FEATURES: dict[Any, tuple[int, int]] = _table(
    ("sort", (1, -1)),
    ("topk", (2, -1)),
    ("msort", (9, 0)),  # has no argument for the axis
)
"""Operations that sort along an axis, each feature by itself.

Each value is the position of the axis among the arguments, and its default.
"""

CREATES = _functions(
    "rand_like randn_like randint_like zeros_like ones_like empty_like full_like",
    "new_zeros new_ones new_full new_empty bernoulli",
)
"""Operations whose result has its argument's shape or device, and no sample's values."""


# Activations that are moved by values, which may differ from step to step.

MOVES_BY_VALUE: dict[Any, tuple[int, int | None]] = _table(
    # by a tensor of indices on an axis that is an argument
    ("gather index_select", (1, None)),
    ("scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_", (1, None)),
    ("index_add index_add_ index_copy index_copy_", (1, None)),
    ("index_fill index_fill_ index_reduce index_reduce_", (1, None)),
    ("roll take_along_dim", (2, None)),
    # by a tensor of indices, or a mask, on any axis
    ("take masked_select masked_scatter masked_scatter_", (-1, None)),
    ("index_put index_put_ repeat_interleave", (-1, None)),
    ("__getitem__ __setitem__ segment_reduce", (-1, None)),
    # by their own values
    ("sort argsort", (1, -1)),
    ("topk kthvalue", (2, -1)),
    # in pieces, which Python code may join in another order
    ("split chunk tensor_split", (2, 0)),
    ("unbind", (1, 0)),
    ("__iter__", (-1, 0)),
) | {
    # as rows of a table
    functional.embedding: (-1, None),
    functional.embedding_bag: (-1, None),
}
"""Operations that move entries by values, which the signature of a step does not contain.

Each value is the position of the axis among the arguments (-1: there is none), and the axis by
default (None: any).
"""

REVERSES = _functions("flip fliplr flipud rot90")
"""Operations that move rows by their settings, which the signature of a step contains."""

TABLE_LOOKUPS = {functional.embedding, functional.embedding_bag}
"""Operations of `MOVES_BY_VALUE` whose moved values are the second argument, `weight`."""

ROW_PRODUCTS = _functions("matmul mm __matmul__") | {functional.linear}
"""Products of which each row is made of one row of the left factor, and all of the right one."""

PRODUCTS = ROW_PRODUCTS | {torch.sparse.mm}
PRODUCTS |= _functions("bmm einsum tensordot addmm baddbmm addmv mv inner dot vdot __rmatmul__")
"""Products, which move rows where one factor is a permutation matrix."""

WHOLE_PIECES = _functions("unbind __iter__")
"""Operations whose pieces are single rows."""

PIECES = WHOLE_PIECES | _functions("split chunk tensor_split")
"""Operations that return pieces, which Python code may join in another order."""

# The signature of a step.

SELECT_BY_NUMBER = _functions("select narrow split tensor_split chunk unfold as_strided")
"""Operations whose whole-number arguments say which rows are taken."""

TAKE_LENGTHS = _functions("view reshape expand broadcast_to repeat tile")
"""Operations whose whole-number arguments are lengths only."""
