"""Which sample of the step each row of its data is.

The proof (`sampimp.importance.ownership.layout`) joins the rows of the network's operations to
those of the loss.
Which sample these are, the data say: a batch comes in the order of its index. Data that the block
puts into another order, as by `x[order]`, `flip` or `cat`, are followed by doing the same to the
numbers of their rows. What depends on parameters is not followed.

Map: `DataRows` (of one pass), `SampleRows` (a note on a tensor), `moves_samples` (operations on
activations that may put samples on other rows by value, from step to step).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sampimp.importance.rules.arithmetic import Batch


@dataclass(frozen=True)
class SampleRows:
    """The sample of each row of a tensor."""

    axis: int
    samples: Tensor | None
    """(R,), positions in the batch, -1 for no sample; None where that is not known any more."""

    is_plain: bool = False
    """Whether it is known that row n is that of sample n."""

    is_made: bool = False
    """Whether they were created in the block (noise): with data, they take the data's samples."""

    @property
    def is_of_no_sample(self) -> bool:
        """Whether no row is a sample's, as of noise."""
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


UNKNOWN_ROWS = SampleRows(0, None)


class DataRows:
    """Notes on the data of a pass which sample each of their rows is.

    Parameters
    ----------
    batch
        As for rules.
    index
        By which the samples of the pass may be fetched inside; None if it is not known.
    step
        The same object in all passes of a step.

    Attributes
    ----------
    active
        Whether there are data whose rows are not those of the batch. If not, only the operations in
        `FOLLOWED` need to be followed.
    """

    def __init__(self, batch: Batch, index: Tensor | None, step: object) -> None:
        self._batch, self._index, self._step = batch, index, step
        self._pass = object()  # data may be met again in another pass
        self.active = False
        self._plain: dict[int, SampleRows] = {}  # by axis

    def of(self, data: Tensor) -> SampleRows | None:
        """Return what is known of a tensor's rows; None if it has no axis of samples."""
        noted = self._noted(data)
        if noted is not None:
            return noted
        axis = self._batch.axis(data.dim(), int(data.is_floating_point()))
        if data.dim() <= axis or data.shape[axis] != self._batch.size:
            return None
        if axis and len(data) == data.shape[axis]:
            return None  # as many positions as samples, perhaps to be transposed
        if axis not in self._plain:
            self._plain[axis] = SampleRows(axis, torch.arange(self._batch.size), is_plain=True)
        return self._plain[axis]

    def must_follow(self, function: Callable[..., Any]) -> bool:
        """Return whether an operation on data has to be followed."""
        return self.active or function in FOLLOWED

    def note_made(self, data: Tensor) -> None:
        """Note that a tensor was created in the block from no sample."""
        rows = self.of(data)
        if rows is not None and rows.is_plain:
            made = replace(rows, is_made=True)
            data._sampimp_rows = self._step, self._pass, made  # type: ignore[attr-defined]
            self.active = True

    def _noted(self, data: Tensor) -> SampleRows | None:
        """Return a note of this pass."""
        step, number, rows = getattr(data, "_sampimp_rows", (None, None, None))
        if step is not self._step:
            return None
        return rows if number is self._pass else UNKNOWN_ROWS  # moved before its own pass had begun

    def follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[Any],
    ) -> None:
        """Note the rows of an operation's outputs, which are data."""
        if function in MAKES:
            for output in outputs:
                self.note_made(output)
            return
        args = args or (kwargs.get("input", kwargs.get("tensors")),)
        kwargs = {name: one for name, one in kwargs.items() if name not in ("input", "tensors")}
        if function in SORTS:
            self._follow_sort(function, args, kwargs, outputs)
            return
        if function not in MOVES:
            self._follow_values(function, args, kwargs, outputs)
            return
        places = MOVES[function]
        values = [one for place in places for one in as_sequence(args[place : place + 1])]
        tensors = [one for value in values for one in as_sequence(value) if _is_tensor(one)]
        if not any(self.of(one) for one in tensors if self._batch.varies(one)):
            return
        if self._is_fetched(function, args, kwargs):
            return
        named = [one for name, one in kwargs.items() if _is_tensor(one) and name != "index"]
        moved = None if named else self._moved(function, places, args, kwargs)
        for output, numbers in zip(outputs, moved or [None] * len(outputs), strict=False):
            if _is_tensor(output):
                self._note(output, self._compressed(numbers, output))

    def _follow_sort(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[Any],
    ) -> None:
        """Note that rows are no sample's, of which each feature was sorted along the samples."""
        rows = self.of(args[0])
        place, default = SORTS[function]
        axis = args[place] if len(args) > place else kwargs.get("dim", default)
        if rows is not None and args[0].dim() > 1 and axis % args[0].dim() == rows.axis:
            for output in outputs:
                self._note(output, UNKNOWN_ROWS)

    def _moved(
        self,
        function: Callable[..., Any],
        places: Sequence[int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Sequence[Any] | None:
        """Return what an operation makes of the numbers of the rows, on the CPU."""
        named = {name: _on_cpu(value) for name, value in kwargs.items()}
        if function is torch._C._nn.pad_sequence:
            args, named = args[:2], {**named, "padding_value": -1}
        for whole in (False, True):  # as views of a row's number, or where that fails as copies
            numbered = [
                self._numbered_all(value, whole or function in IN_PLACE)
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

    def _is_fetched(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Return whether the samples of the step are fetched by their index."""
        index = None
        if function is Tensor.__getitem__:
            index = args[1]
        elif function in (torch.index_select, Tensor.index_select):
            index = args[2] if len(args) > 2 else kwargs.get("index")
        if self._index is None or not isinstance(index, list | np.ndarray | Tensor):
            return False
        if self._noted(args[0]) is not None:  # no data set, but a batch
            return False
        index = torch.as_tensor(index)
        if index.dtype not in (torch.int32, torch.int64) or index.shape != self._index.shape:
            return False
        return torch.equal(index.cpu().long(), self._index)

    def _numbered_all(self, value: Any, whole: bool) -> Any:
        if isinstance(value, list | tuple):
            return [self._numbered_all(one, whole) for one in value]
        return self._numbered(value, whole) if _is_tensor(value) else value

    def _numbered(self, data: Tensor, whole: bool) -> Tensor:
        """Return the sample of each entry, of the shape of the data; -1 where there is none."""
        rows = self.of(data) if self._batch.varies(data) else None
        if rows is None or rows.samples is None:
            numbers = torch.tensor(-1 if rows is None else -2)
        else:
            shape = [-1 if axis == rows.axis else 1 for axis in range(data.dim())]
            numbers = rows.samples.reshape(shape)
        numbers = numbers.expand(data.shape)
        return numbers.clone(memory_format=torch.contiguous_format) if whole else numbers

    def _compressed(self, numbers: Any, output: Tensor) -> SampleRows | None:
        """Return the rows that numbers of all entries amount to."""
        if not _is_tensor(numbers) or numbers.shape != output.shape or numbers.is_floating_point():
            return UNKNOWN_ROWS
        expected = self._batch.axis(output.dim(), int(output.is_floating_point()))
        strides = zip(numbers.stride(), numbers.shape, strict=True)
        varying = {axis for axis, (stride, size) in enumerate(strides) if stride and size > 1}
        axes = sorted(range(numbers.dim()), key=lambda axis: (axis != expected, axis))
        mixed = None
        if not numbers.numel():
            return None
        for axis in axes:
            rows = numbers.movedim(axis, 0)
            rows = rows.flatten(1) if numbers.dim() > 1 else rows[:, None]
            if not varying - {axis}:  # views of one number a row
                rows = rows[:, :1]
            if bool((rows < -1).any()):
                return UNKNOWN_ROWS
            most, least = rows.amax(1), rows.where(rows != -1, len(rows) + rows.max()).amin(1)
            if bool(((most == least) | (most == -1)).all()):
                return SampleRows(axis, most)
            own = torch.arange(len(rows))
            is_expected = axis == expected and len(rows) == self._batch.size
            if is_expected and bool((rows == own[:, None]).any(1).all()):
                mixed = SampleRows(axis, own)  # with parts of others, as by cutmix
        return mixed or UNKNOWN_ROWS

    def _note(self, data: Tensor, rows: SampleRows | None) -> None:
        if hasattr(data, "_sampimp_rows"):
            del data._sampimp_rows
        known = self.of(data)
        if rows is None or (known is not None and _are_same(rows, known)):
            return
        data._sampimp_rows = self._step, self._pass, rows  # type: ignore[attr-defined]
        self.active = True

    def _follow_values(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[Any],
    ) -> None:
        """Note rows that stay where they are: those of the batch, if any input has them so.

        As by mixup, or by turning some of the images round.
        """
        given = [*as_sequence(args[0]), *args[1:], *kwargs.values()]
        given = [one for value in given for one in as_sequence(value)]
        inputs = [one for one in given if _is_tensor(one) and one.dim() and self._batch.varies(one)]
        if function in PRODUCTS and len(args) > 1 and all(map(_is_tensor, args[:2])):
            left = self.of(args[0]) if self._batch.varies(args[0]) else None
            right = self.of(args[1]) if self._batch.varies(args[1]) else None
            if left is None and right is not None and right.axis == max(0, args[1].dim() - 2):
                for output in outputs:  # perhaps with a permutation
                    self._note(output, UNKNOWN_ROWS)
                return
        known = [(one, self.of(one)) for one in inputs]
        told = [(one, rows) for one, rows in known if rows is not None]
        if any(not self._noted(one) for one, _ in told):
            return
        moved = [(one, rows) for one, rows in told if not (rows.is_made or rows.is_of_no_sample)]
        if not told:
            return
        moved.sort(key=lambda pair: pair[1].samples is None)
        source, rows = (moved or told)[0]
        for output in outputs:
            if not _is_tensor(output) or not output.dim():
                continue
            kept = rows.samples is not None and output.dim() == source.dim()
            fits = kept and output.shape[rows.axis] == source.shape[rows.axis]
            if not rows.is_made:
                self._note(output, rows if fits else UNKNOWN_ROWS)
            elif fits:
                self.note_made(output)


def moves_samples(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch: Batch,
    is_fixed: Callable[[Tensor], bool],
) -> bool:
    """Return whether an operation may put samples on other rows, by values that may change.

    Such a step is proved each time. Lengths decide only whether an axis can have samples; what
    is a buffer or a parameter (`is_fixed`) does not change from step to step.
    """
    if batch.size < 2 or not (function in BY_VALUE or function in PRODUCTS):
        return False
    given = (*args, *kwargs.values())
    if function in PRODUCTS:  # of activations with a matrix that is made of data
        factors = [one for value in given for one in as_sequence(value) if _is_tensor(one)]
        matrices = (
            one
            for one in factors
            if not one.requires_grad and one.ndim > 1 and batch.size in one.shape[-2:]
        )
        return any(not is_fixed(one) for one in matrices) and any(
            one.requires_grad and batch.varies(one) for one in factors
        )
    values = args[0] if args else kwargs.get("input")
    if function in TABLES:
        table = args[1] if len(args) > 1 else kwargs.get("weight")
        return isinstance(table, Tensor) and table.requires_grad and batch.varies(table)
    if not isinstance(values, Tensor) or not values.dim():
        return False
    if function in (Tensor.__getitem__, Tensor.__setitem__):
        return _index_moves(values, args[1], batch)
    place, default = BY_VALUE[function]
    axis = args[place] if len(args) > place >= 0 else kwargs.get("dim", kwargs.get("dims", default))
    if function in PIECES:
        pieces = _pieces(function, values, axis, args, kwargs) if axis in (0, batch.dim) else 0
        return pieces >= batch.size
    axes = range(values.dim()) if axis is None else as_sequence(axis)
    return any(_may_have_samples(values, one, batch) for one in axes)


def _pieces(function: Callable[..., Any], values: Tensor, axis: int, args: Any, kwargs: Any) -> int:
    """Return into how many pieces of one row an axis is cut; 0 if they are larger."""
    size = values.shape[axis] if values.dim() > axis else 0
    number = args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
    if function in (torch.split, Tensor.split):
        return size if number == 1 else 0
    by_value = isinstance(number, Tensor)
    return size if function in WHOLE or by_value or number == size else 0


def _may_have_samples(values: Tensor, axis: int, batch: Batch) -> bool:
    """Return whether samples may be on an axis: the first, the batch's, or one as long."""
    return axis % values.dim() in (0, batch.dim) or values.shape[axis] == batch.size


def _index_moves(values: Tensor, index: Any, batch: Batch) -> bool:
    axis = 0
    entries = index if isinstance(index, tuple) else (index,)
    width = sum(one is not None and one is not ... for one in entries)
    for entry in entries:
        if entry is ...:
            axis += values.dim() - width
        elif entry is not None:
            has_samples = axis < values.dim() and _may_have_samples(values, axis, batch)
            if isinstance(entry, Tensor | np.ndarray | list) and has_samples:
                chosen = torch.as_tensor(entry)
                if getattr(entry, "_sampimp_range", False) and len(entry) == values.shape[axis]:
                    axis += 1
                    continue
                flat = chosen.flatten()
                if chosen.dtype == torch.bool or chosen.numel() != max(chosen.shape, default=0):
                    return True
                if not torch.equal(flat.cpu(), torch.arange(len(flat))):
                    return True
            axis += 1
    return False


def _are_same(rows: SampleRows, others: SampleRows) -> bool:
    if rows.samples is None or others.samples is None:
        return rows.samples is others.samples
    return rows.axis == others.axis and torch.equal(rows.samples, others.samples)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_on_cpu(one) for one in value])
    return value.cpu() if _is_tensor(value) else value


def mark_as_range(tensor: Tensor) -> None:
    """Note that a tensor is 0, 1, 2, ..., so that nobody has to read it from its device."""
    tensor._sampimp_range = True  # type: ignore[attr-defined]


def is_data(value: Any) -> bool:
    """Return whether a value is not made of parameters: data, or no tensor."""
    return not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def as_sequence(value: Any) -> Sequence[Any]:
    """Return value if it is a list or tuple, else [value]."""
    return value if isinstance(value, list | tuple) else [value]


def _both(names: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the functions of these names, as methods too."""
    return {
        getattr(kind, name): value
        for name, value in names.items()
        for kind in (torch, Tensor)
        if hasattr(kind, name)
    }


def _names(*groups: str) -> Iterator[str]:
    for group in groups:
        yield from group.split()


MOVES: dict[Any, tuple[int, ...]] = _both(
    {
        **dict.fromkeys(
            _names(
                "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel",
                "permute transpose swapaxes swapdims t movedim moveaxis adjoint",
                "expand expand_as broadcast_to repeat repeat_interleave tile unfold",
                "cat concat concatenate stack hstack vstack dstack column_stack row_stack",
                "split chunk tensor_split unbind hsplit vsplit dsplit select narrow diagonal",
                "__getitem__ index_select gather take take_along_dim masked_select",
                "flip fliplr flipud roll rot90",
            ),
            (0,),
        ),
        "where": (1, 2),
        "copy_": (0, 1),
        "__setitem__": (0, 2),
        **dict.fromkeys(_names("masked_scatter masked_scatter_ index_put index_put_"), (0, 2)),
        **dict.fromkeys(_names("scatter scatter_ index_copy index_copy_"), (0, 3)),
    }
)
"""Operations that move entries and compute none, with the positions of the values among their
arguments."""
for _name in ("T", "mT", "H", "mH"):
    MOVES[getattr(Tensor, _name).__get__] = (0,)

MOVES[torch._VF._pack_padded_sequence] = (0,)
MAKES = set(
    _both(
        dict.fromkeys(
            _names(
                "rand_like randn_like randint_like zeros_like ones_like empty_like full_like",
                "new_zeros new_ones new_full new_empty bernoulli",
            ),
            0,
        )
    )
)
"""Operations whose results have nothing of their arguments' rows."""
SORTS: dict[Any, tuple[int, int]] = _both({"sort": (1, -1), "topk": (2, -1), "msort": (9, 0)})
"""Operations that may take every feature of a row from another one: the position of the axis among
their arguments, and its default."""
MOVES[torch._C._nn.pad_sequence] = (0,)
MOVES[functional.embedding] = (1,)
IN_PLACE = {Tensor.__setitem__} | set(
    _both(dict.fromkeys(_names("masked_scatter_ index_put_ scatter_ index_copy_ copy_"), 0))
)
"""Those of them that write into their first argument."""

BY_VALUE: dict[Any, tuple[int, int | None]] = _both(
    {
        **dict.fromkeys(_names("gather index_select scatter scatter_"), (1, None)),
        **dict.fromkeys(_names("scatter_add scatter_add_"), (1, None)),
        **dict.fromkeys(_names("scatter_reduce scatter_reduce_"), (1, None)),
        **dict.fromkeys(_names("index_add index_add_ index_copy index_copy_"), (1, None)),
        **dict.fromkeys(_names("index_fill index_fill_ index_reduce index_reduce_"), (1, None)),
        **dict.fromkeys(_names("sort argsort"), (1, -1)),
        **dict.fromkeys(_names("topk kthvalue"), (2, -1)),
        **dict.fromkeys(_names("split chunk tensor_split"), (2, 0)),
        "unbind": (1, 0),
        "__iter__": (-1, 0),
        **dict.fromkeys(_names("roll take_along_dim"), (2, None)),
        **dict.fromkeys(_names("take masked_select masked_scatter masked_scatter_"), (-1, None)),
        **dict.fromkeys(_names("index_put index_put_ repeat_interleave"), (-1, None)),
        **dict.fromkeys(_names("__getitem__ __setitem__ segment_reduce"), (-1, None)),
    }
) | dict.fromkeys((functional.embedding, functional.embedding_bag), (-1, None))
"""Operations that move entries by values, which the signature of a step does not have.

The position of the axis among their arguments (-1: none), and its default (None: any axis)."""
TABLES = {functional.embedding, functional.embedding_bag}
PRODUCTS = set(
    _both(dict.fromkeys(_names("matmul mm bmm einsum tensordot addmm baddbmm __matmul__"), 0))
) | {torch.sparse.mm, functional.linear}
"""Products, which move rows where a factor is a permutation."""
SELECT_BY_NUMBER = set(
    _both(dict.fromkeys(_names("select narrow split tensor_split chunk unfold"), 0))
)
"""Operations of which whole numbers say which rows are taken."""
TAKE_LENGTHS = set(_both(dict.fromkeys(_names("view reshape expand broadcast_to repeat tile"), 0)))
"""Operations of which whole numbers are lengths alone."""
WHOLE = set(_both({"unbind": 0, "__iter__": 0}))
PIECES = WHOLE | set(_both(dict.fromkeys(_names("split chunk tensor_split"), 0)))
"""Operations whose pieces somebody may put together in another order."""
FOLLOWED = {*MOVES, *SORTS, *MAKES, *PRODUCTS}
"""Operations on data that have to be followed always."""
