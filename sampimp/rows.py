"""Which sample is on each row of a tensor, followed through a pass.

A rule takes the axis that has as many rows as there are samples for that of the samples, in the
batch's order. What puts them elsewhere is followed: to another axis, or onto one with positions
(their place), or by an index that has each sample once (their order). What does anything else to
them, as taking some out or turning them round, leaves rows of which it is not known whose they are
(`Lost`); they may go into a loss, and are an error where they meet a parameter.

Map: `Follower` (of a pass), `Lost`, `common_order` and `place_of` (what it has noted of tensors),
`ON_ROWS` (the operations that it has to see).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import sampimp.recurrent  # noqa: F401  (its operations have states)
from sampimp.errors import UnsupportedError
from sampimp.rules import LOOKS, Batch


@dataclass(frozen=True)
class Lost:
    """Why it is not known any more whose the rows of a tensor are."""

    what: str
    mixes: bool
    """Whether each of them is made of several samples."""

    def error(self, where: str) -> UnsupportedError:
        """Return what to raise if such a tensor meets a parameter."""
        if self.mixes:
            return mixes(self.what, where)
        return UnsupportedError(
            expected="samples that stay on their rows, or on an axis of their own",
            got=f"{self.what}, before an operation with parameters",
            where=where,
            todo="put samples into another order outside the block, or by an index that has each "
            "once; mask instead of taking some out; name as many samples as there are rows",
        )


def mixes(what: str, where: str) -> UnsupportedError:
    """Return what to raise where samples are not treated each on its own."""
    return UnsupportedError(
        expected="operations that treat each sample of a batch on its own",
        got=f"{what}, which mixes them: no single sample has a gradient below it",
        where=where,
        todo="replace it (GroupNorm, LayerNorm), put it into eval mode, or record what is above "
        'it: batch_norm="undefined"'
        if "BatchNorm" in what
        else "train on a loss that is a sum over samples",
    )


def order_of(tensor: Tensor) -> Tensor | Lost | None:
    """Return which sample is on each row: None where they are as in the batch."""
    return getattr(tensor, "_sampimp_order", None)


def set_order(tensor: Tensor, order: Tensor | Lost | None) -> None:
    """Note which sample is on each row."""
    tensor._sampimp_order = order  # type: ignore[attr-defined]


def common_order(tensors: Sequence[Tensor]) -> Tensor | Lost | None:
    """Return the order that some tensors have, or that one of them is lost."""
    orders = [order for order in map(order_of, tensors) if order is not None]
    return next((one for one in orders if isinstance(one, Lost)), orders[0] if orders else None)


def set_place(tensor: Tensor, place: tuple[int, int] | None) -> None:
    """Note where the samples are."""
    tensor._sampimp_place = place  # type: ignore[attr-defined]


def place_of(tensor: Tensor) -> tuple[int, int] | None:
    """Return the axis of the samples and its size, where they are not where a rule expects them.

    A size that is not their number is that of an axis of samples and positions, joined.
    """
    return getattr(tensor, "_sampimp_place", None)


class Follower:
    """Notes of the tensors of a pass where their samples are.

    Attributes
    ----------
    batch
        As for rules.
    active
        Whether there is a tensor whose samples are elsewhere than in the batch. If not, only the
        operations in `ON_ROWS` need to be followed.
    """

    def __init__(self, batch: Batch, index: Tensor | None) -> None:
        self.batch, self._index = batch, index
        self.active = False

    def follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[Any],
    ) -> UnsupportedError | None:
        """Note where the samples are in outputs; return an error if the operation mixes them."""
        args = args or (kwargs.get("input", kwargs.get("tensors")),)
        kwargs = {name: one for name, one in kwargs.items() if name not in ("input", "tensors")}
        if function in _MOVES and isinstance(args[0], Tensor):  # an index has no rows
            given = [args[0], *(args[2:] if function is Tensor.__setitem__ else args[3:])]
        else:
            given = [*listed(args[0]), *args[1:], *kwargs.values()]
        varying = [one for one in given if isinstance(one, Tensor) and self.batch.varies(one)]
        results = [one for one in outputs if isinstance(one, Tensor)]
        self._follow_places(function, args, kwargs, varying, results)
        # One whole number is a length, as of packed sequences, and nobody's row.
        has_rows = any(one.dim() or one.is_floating_point() for one in results)
        moved = self._moved(function, args, kwargs) if varying and has_rows else None
        order = common_order(varying)
        error = None
        if isinstance(order, Lost) or isinstance(moved, Lost):
            error = self._mixed(function, varying, moved, results)
            order = order if isinstance(order, Lost) else moved
        elif moved is not None:
            order = moved if order is None else order[moved]
            if _is_arange(order):
                order = None
        elif order is not None:
            floating = [order_of(one) for one in varying if one.is_floating_point()]
            if not all(isinstance(one, Tensor) and torch.equal(one, order) for one in floating):
                error = mixes(f"{function.__name__} with samples in another order", "the step")
        if order is not None and (moved is None or function in _WRITES):
            order = None if self._keeps_rows(varying) else order
        if order is not None or self.active:
            self.active = True
            for one in results:
                constant = isinstance(order, Lost) and order.mixes and not one.requires_grad
                if one is not order:
                    set_order(one, None if constant else order)
        return error

    def expected(self, tensor: Tensor) -> int:
        """Return the axis on which a rule expects the samples."""
        return self.batch.axis(tensor.dim(), int(tensor.is_floating_point()))

    def _place(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return the axis that has the samples, if there is one, and its size."""
        axis = self.expected(tensor)
        there = tensor.dim() > axis and tensor.shape[axis] == self.batch.size
        if there and axis and not tensor.requires_grad and len(tensor) == tensor.shape[axis]:
            there = False  # data with as many positions, perhaps to be transposed
        return place_of(tensor) or ((axis, self.batch.size) if there else None)

    def _axis(self, tensor: Tensor) -> int | None:
        place = self._place(tensor)
        return None if place is None else place[0]

    def _follow_places(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        varying: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        """Note on which axis the samples are, where it is another than a rule expects."""
        placed = [one for one in varying if place_of(one)]
        placed += [one for one in varying if self._place(one)]
        if not placed or not self.batch.size:
            return
        place = self._place(placed[0])
        assert place is not None
        for number, result in enumerate(results):
            if function in LOOKS and number and result.dim() == 3:
                axis: int | None = 1  # states of layers and directions
            else:
                axis = self._new_axis(function, args, kwargs, placed[0], place, result)
            if axis is not None and (axis, result.shape[axis]) != (
                self.expected(result),
                self.batch.size,
            ):
                set_place(result, (axis, result.shape[axis]))
                self.active = True

    def _new_axis(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        source: Tensor,
        place: tuple[int, int],
        result: Tensor,
    ) -> int | None:
        """Return where the axis of the samples is in a result; None if it is gone."""
        (axis, rows), size, count = place, self.batch.size, result.dim() - source.dim()
        if function in _RESHAPES:
            if self.batch.dim == 1:  # positions first: joined, and told apart again
                if axis == 1 and len(result) == len(source) * size:
                    return 0
                if axis == 0 and rows != size and tuple(result.shape[:2]) == (rows // size, size):
                    return 1
            before, fits = source.shape[:axis], result.dim() > axis
            if not fits or result.shape[:axis] != before or result.shape[axis] % size:
                return None
            # Of rows on the first axis, a rule takes positions for the first where it expects them.
            as_expected = axis > 0 or self.batch.dim == 0 or source.dim() < 3
            return axis if as_expected or len(result) == size else None
        if function in _AXES:
            return _AXES[function](axis, source.dim(), *args[1:], **kwargs)
        if function is Tensor.__getitem__ and not isinstance(args[1], Tensor):
            return _after_index(axis, source.dim(), args[1])
        if count < 0 and function in ON_ROWS:
            gone = self._along(function, args, kwargs, source)
            axis = axis if len(gone) > -count else axis - sum(one < axis for one in gone)
        elif count > 0:  # broadcast
            axis += count
        return axis if result.dim() > axis and result.shape[axis] == rows else None

    @staticmethod
    def _along(
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Tensor,
    ) -> set[int]:
        """Return the axes that an operation works along."""
        position, name, default = ON_ROWS[function]
        given = args[position] if len(args) > position else kwargs.get(name, default)
        given = kwargs.get("axis", given)
        along = range(values.dim()) if given is None else listed(given)
        return {axis % values.dim() for axis in along if isinstance(axis, int) and values.dim()}

    def _mixed(
        self,
        function: Callable[..., Any],
        varying: Sequence[Tensor],
        moved: Tensor | Lost | None,
        results: Sequence[Tensor],
    ) -> UnsupportedError | None:
        """Return an error if what is lost comes together with what is not, or stays by row."""
        learned = [one for one in varying if one.requires_grad]
        lost = [isinstance(order_of(one), Lost) for one in learned]
        known = any(
            not is_lost and self._axis(one) is not None
            for is_lost, one in zip(lost, learned, strict=True)
        )
        stays = isinstance(moved, Lost) and moved.mixes
        if (any(lost) and known) or (stays and any(self._axis(one) is not None for one in results)):
            return mixes(f"{function.__name__} of samples with others", "the step")
        return None

    def _keeps_rows(self, varying: Sequence[Tensor]) -> bool:
        """Return whether all are constants, and some keep their rows: theirs is what is made of it.

        As by mixup, or by turning some of the images round.
        """
        floating = [one for one in varying if one.is_floating_point() and one.dim()]
        return not any(one.requires_grad for one in floating) and any(
            order_of(one) is None and self._axis(one) is not None for one in floating
        )

    def _moved(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | Lost | None:
        """Return the index by which an operation puts the samples into another order.

        None if it leaves them where they are, and that they are lost if it does anything else.
        """
        values = next((one for one in listed(args[0]) if isinstance(one, Tensor)), None)
        along_samples = function in _REDUCTIONS or function in _MOVES
        if values is None or self.batch.size < 2 or not along_samples:
            return None
        if function not in _WRITES and not self.batch.varies(values):
            return None
        axis = self._axis(values)
        axes = set() if axis is None else {axis}
        if isinstance(order_of(values), Tensor):  # as of states (layers, N, H)
            axes |= {axis for axis in range(values.dim()) if values.shape[axis] == self.batch.size}
        lost = Lost(f"{function.__name__} along the samples", function in _REDUCTIONS)
        if (lost.mixes or function in _SORTS) and not values.requires_grad:
            return None
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            taken = _by_axis(values, args[1])
        else:
            index = args[2] if len(args) > 2 else kwargs.get("index")
            is_index = function in (torch.index_select, Tensor.index_select)
            along = self._along(function, args, kwargs, values)
            taken = dict.fromkeys(along, index if is_index else None)
        for axis in sorted(axes & taken.keys()):
            index = taken[axis]
            if isinstance(index, slice):
                if index.indices(values.shape[axis]) != (0, values.shape[axis], 1):
                    return lost
                continue
            chosen = _as_index(index, values)
            if chosen is None or function is Tensor.__setitem__ or len(chosen) != self.batch.size:
                return lost
            named = None if values.requires_grad else self._index
            if named is not None and torch.equal(chosen.cpu(), named):
                continue  # it fetches the samples of the step
            return chosen if _is_arange(chosen.sort()[0]) else lost
        return None


def listed(value: Any) -> Sequence[Any]:
    """Return a list or tuple as it is, and anything else as the only one."""
    return value if isinstance(value, list | tuple) else [value]


def _is_arange(index: Tensor) -> bool:
    return torch.equal(index, torch.arange(len(index), device=index.device))


def _as_index(index: Any, values: Tensor) -> Tensor | None:
    """Return a list or tensor of positions as int64; None if it is anything else."""
    if not isinstance(index, list | range | Tensor | np.ndarray):
        return None
    index = torch.as_tensor(index, device=values.device)
    if index.numel() == max(index.shape, default=1):  # to be broadcast against others
        index = index.flatten()
    whole = index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
    return index.long() if whole else None


def _by_axis(values: Tensor, index: Any) -> dict[int, Any]:
    """Return by axis what an index takes of it, but for axes that it takes whole.

    Examples
    --------
    >>> _by_axis(torch.zeros(2, 3, 4), (..., 1))
    {2: 1}
    """
    entries = index if isinstance(index, tuple) else (index,)

    def width(entry: Any) -> int:
        if isinstance(entry, Tensor | np.ndarray) and entry.dtype in (torch.bool, np.bool_):
            return entry.ndim
        return 0 if entry is None else 1

    named = sum(width(entry) for entry in entries if entry is not ...)
    taken: dict[int, Any] = {}
    axis = 0
    for entry in entries:
        if entry is ...:
            axis += values.dim() - named
        else:
            taken |= dict.fromkeys(range(axis, axis + width(entry)), entry)
            axis += width(entry)
    return taken


def _after_index(axis: int, dim: int, index: Any) -> int | None:
    """Return where an axis is after an index; None if it is taken, or nobody could tell.

    Examples
    --------
    >>> _after_index(1, 3, (-1,)), _after_index(1, 3, (slice(None), None)), _after_index(0, 2, 3)
    (0, 2, None)
    """
    given = index if isinstance(index, tuple) else (index,)
    rest = dim - sum(entry is not None and entry is not ... for entry in given)
    entries: list[Any] = []
    for entry in given:
        entries += [slice(None)] * rest if entry is ... else [entry]
    at = new = 0
    for entry in entries:
        if entry is not None and at == axis:
            return new if isinstance(entry, slice) else None
        if not (entry is None or isinstance(entry, slice | int)):
            return None
        at += entry is not None
        new += not isinstance(entry, int)
    return new + axis - at


def _permuted(axis: int, ndim: int, /, *dims: Any, **named: Any) -> int:
    order = named.get("dims", dims[0] if dims and not isinstance(dims[0], int) else dims)
    return [one % ndim for one in order].index(axis)


def _swapped(axis: int, ndim: int, /, *dims: Any, **named: Any) -> int:
    pair = [one % ndim for one in (*dims, *named.values())] or [0, ndim - 1]
    return pair[1 - pair.index(axis)] if axis in pair else axis


def _moved_axis(axis: int, ndim: int, /, source: Any, destination: Any) -> int:
    marked = torch.empty([2 + (one == axis) for one in range(ndim)], device="meta")
    return marked.movedim(source, destination).shape.index(3)


def _inserted(axis: int, ndim: int, /, dim: int = 0, **_: Any) -> int:
    return axis + (dim % (ndim + 1) <= axis)


def _removed(axis: int, ndim: int, /, dim: int = 0, *_: Any, **__: Any) -> int | None:
    return None if dim % ndim == axis else axis - (dim % ndim < axis)


_Where = tuple[int, str, int | tuple[()] | None]
"""The argument that names an axis or more: its position, its name, its default; None means all."""


def _both(where: Mapping[str, _Where]) -> dict[Any, _Where]:
    """Return the functions of these names, as methods too."""
    kinds = (torch, Tensor)
    return {
        getattr(kind, name): one
        for name, one in where.items()
        for kind in kinds
        if hasattr(kind, name)
    }


_RESHAPES = _both(
    dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "repeat_interleave"),
        (9, "", ()),
    )
)
"""What may put samples and positions on one axis, each sample's in a row."""

_REDUCTIONS = _both(
    {
        **dict.fromkeys(("mean", "sum", "prod", "var", "std", "amax", "amin"), (1, "dim", None)),
        **dict.fromkeys(("max", "min", "logsumexp", "cumsum", "cumprod"), (1, "dim", None)),
        **dict.fromkeys(("softmax", "log_softmax"), (1, "dim", None)),
        "norm": (2, "dim", None),
    }
) | {
    functional.softmax: (1, "dim", ()),
    functional.log_softmax: (1, "dim", ()),
    functional.normalize: (2, "dim", 1),
    torch.linalg.norm: (2, "dim", None),
    torch.linalg.vector_norm: (2, "dim", None),
}
"""What mixes the samples, if it is along them."""

_SORTS = _both({"sort": (1, "dim", -1), "topk": (2, "dim", -1)})
"""What takes samples from their rows, unless it is of constants, as lengths are."""

_WRITES = _both(
    {
        **dict.fromkeys(("index_copy", "index_add", "index_fill"), (1, "dim", 0)),
        **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), (1, "dim", 0)),
        **dict.fromkeys(("index_copy_", "index_add_", "index_fill_"), (1, "dim", 0)),
        **dict.fromkeys(("scatter_", "scatter_add_", "scatter_reduce_"), (1, "dim", 0)),
        **dict.fromkeys(("index_put", "index_put_"), (9, "", None)),
        **dict.fromkeys(("masked_scatter", "masked_scatter_"), (9, "", None)),
        "__setitem__": (9, "", 0),
    }
)
"""What may put samples on other rows."""

_MOVES = (
    _SORTS
    | _WRITES
    | _both(
        {
            **dict.fromkeys(("flip", "rot90"), (1, "dims", None)),
            "flipud": (9, "", 0),
            **dict.fromkeys(("roll",), (2, "dims", None)),
            "take_along_dim": (2, "dim", None),
            **dict.fromkeys(("take", "masked_select"), (9, "", None)),
            **dict.fromkeys(("narrow", "select", "unbind", "cat", "concat"), (1, "dim", 0)),
            "concatenate": (1, "dim", 0),
            **dict.fromkeys(("split", "chunk", "tensor_split"), (2, "dim", 0)),
            **dict.fromkeys(("gather", "index_select"), (1, "dim", 0)),
            "__getitem__": (9, "", 0),
        }
    )
)
"""What may take samples from their rows, or put them on others."""

_MAPS: dict[Callable[..., int | None], tuple[str, ...]] = {
    _permuted: ("permute",),
    _swapped: ("transpose", "swapaxes", "swapdims", "t"),
    _moved_axis: ("movedim", "moveaxis"),
    _inserted: ("unsqueeze", "stack"),
    _removed: ("select", "unbind"),
}
_AXES: dict[Any, Callable[..., int | None]] = {
    getattr(kind, name): function
    for function, names in _MAPS.items()
    for name in names
    for kind in (torch, Tensor)
    if hasattr(kind, name)
}
"""What puts axes elsewhere, and where."""
for _name in ("T", "H"):
    _AXES[getattr(Tensor, _name).__get__] = _swapped

ON_ROWS: dict[Any, _Where] = {
    **dict.fromkeys((*_AXES, *LOOKS), (9, "", ())),
    **_RESHAPES,
    **_REDUCTIONS,
    **_MOVES,
}
"""What has to be followed always: the argument with the axes that it works along."""
