"""Capture importance inside a training step of any network, and leave the training as it is.

Every operation of a pass is seen as it is called (`torch.overrides.TorchFunctionMode`): where a
parameter is among its arguments, a hook on its output receives the gradient there, and a rule
(`sampimp.importance.rules`) makes factors of the parameter's per-sample gradients of
the two. Tensors that
depend on no sample are followed from the parameters and buffers on, so that a parameter may be
reshaped, tied, normalised or added before it meets the samples. What is watched is read and never
written, and nothing is left behind: trained parameters are bit-identical.

Map: `NormBuffer` (what steps leave behind), `Capture` (one step: uses, factors, squares),
`ImportanceRecorder` (in-step, for anybody's loop), `snapshot_importance` (every sample at fixed
parameters).
"""

import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sampimp.config import check_choice
from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.evaluation import evaluation_mode
from sampimp.importance.gradients import Explicit, Factor, Outer, Product, squares, total
from sampimp.importance.ownership.coupling import COUPLED, SUM, UNCHECKED
from sampimp.importance.ownership.data_rows import (
    DataRows,
    as_sequence,
    is_data,
    mark_as_range,
)
from sampimp.importance.ownership.layout import AxisLayout, joined_rows
from sampimp.importance.ownership.operations import SELECT_BY_NUMBER, TAKE_LENGTHS
from sampimp.importance.ownership.passes import is_proved_now
from sampimp.importance.ownership.proof import Proof, ProofResult
from sampimp.importance.ownership.tape import Tape
from sampimp.importance.ownership.use import Use
from sampimp.importance.ownership.value_moves import moves_samples
from sampimp.importance.rules.batch import Batch
from sampimp.importance.rules.inner_nodes import InnerNodes
from sampimp.importance.rules.registry import (
    RULES,
    factors_of,
    feature_axes,
    is_sum,
    look_inside,
    looks_inside,
)
from sampimp.importance.update import Derivative, Diagonal, UpdateDerivative
from sampimp.schema import SCHEMA_VERSION, VARIABLES, __version__

if TYPE_CHECKING:
    import xarray as xr

Index = Tensor | np.ndarray | Sequence[int]
"""Positions in the training set of the samples of a batch, shape (N,)."""


class NormBuffer:
    """What steps leave until importance is formed: a few numbers of each sample.

    One buffer is kept and grows: thousands of small tensors between the large ones of autograd
    scattered its memory, and page faults then took up to 10 % of a step.

    Parameters
    ----------
    row_count
        How many numbers there are of each sample, R.
    """

    def __init__(self, row_count: int) -> None:
        self._buffer = torch.empty(row_count, 0)
        self._filled = 0
        self._rates: list[tuple[int, list[float]]] = []  # batch size; rates

    def rows(self, size: int, like: Tensor) -> Tensor:
        """Return where a step over `size` samples writes: shape (R, size)."""
        end, room = self._filled + size, self._buffer.shape[1]
        if end > room or like.dtype != self._buffer.dtype or like.device != self._buffer.device:
            larger = like.new_empty(len(self._buffer), room if end <= room else max(2 * room, end))
            larger[:, :room] = self._buffer
            self._buffer = larger
        return self._buffer[:, self._filled : end]

    def accept(self, size: int, rates: list[float]) -> None:
        """Keep the step that was written, with any numbers that it had in common."""
        self._rates.append((size, rates))
        self._filled += size

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the rows (R, samples) of all steps since the last call, and forget them.

        Returns
        -------
        rows, rates
            On the CPU; the rates of each sample's step, of shape (rates, samples).
        """
        rows = self._buffer[:, : self._filled].cpu()
        sizes = torch.tensor([size for size, _ in self._rates])
        rates = torch.tensor([rates for _, rates in self._rates], dtype=rows.dtype)
        self._filled = 0
        self._rates = []
        return rows, rates.repeat_interleave(sizes, 0).T


class _Pause(threading.local):
    """Which captures have paused in this thread, and what they have switched off together."""

    def __init__(self) -> None:
        self.holders: set[int] = set()
        self.guard: Any = None


_PAUSE = _Pause()


class _JointOutputs(torch.autograd.Function):
    """Copy outputs so that one callback gets all their gradients."""

    @staticmethod
    def forward(
        ctx: Any, receive: Callable[[Sequence[Tensor | None]], None], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Copy the outputs."""
        ctx.receive = receive
        ctx.set_materialize_grads(False)
        return tuple(one.clone() for one in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pass the gradients on, None where nothing depends on an output."""
        ctx.receive(gradients)
        return None, *gradients


class Capture(TorchFunctionMode):
    """The squared norms of per-sample gradients, of every parameter in one step.

    Parameters
    ----------
    model
        Any network that treats each sample of a batch on its own.
    batch_dim
        Axis of the samples in tensors that have positions too: 0, or 1 where positions come first.
    batch_norm
        What a BatchNorm in training mode means, which mixes the samples: an error ("refuse"), or
        that it and what is called before it have no importance (NaN, "undefined").
    coupled_loss
        What a loss means that is no sum over samples: an error ("refuse"), or that its derivative
        with respect to each sample's outputs is taken as a constant of the step ("constant").

    Attributes
    ----------
    loss
        One of `SUM`, `UNCHECKED` and `COUPLED` (`sampimp.importance.ownership.coupling`): the
        weakest of all proofs so far.

    Raises
    ------
    UnsupportedError
        The model is compiled, or is to refuse a BatchNorm that it has.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_dim: int = 0,
        batch_norm: str = "refuse",
        coupled_loss: str = "refuse",
    ) -> None:
        super().__init__()
        self._batch_dim, self._batch_norm = batch_dim, batch_norm
        self._coupled_loss = coupled_loss
        check_choice(batch_norm, ("refuse", "undefined"), "batch_norm")
        check_choice(coupled_loss, ("refuse", "constant"), "coupled_loss")
        _require_watchable(model, batch_norm)
        self._model = model
        named = list(model.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        self._rows = {id(parameter): row for row, parameter in enumerate(self.parameters)}
        self._find_buffers()
        owners = [name.rpartition(".")[0] or "model" for name, _ in named]
        self.layers = tuple(dict.fromkeys(owners))
        """Names of the layers, in the order in which they were registered."""
        self._layer_of_row = torch.tensor([self.layers.index(owner) for owner in owners])
        self._called: dict[str, None] = {}
        self._owners = owners
        self._norms = NormBuffer(len(named))
        self._undefined: set[int] = set()  # rows without importance, in this step
        # Where a tensor says which parameters it is made of; two recorders do not mix.
        self._tag = f"_sampimp_roots_{id(self)}"
        self.undefined_layers: set[int] = set()
        """Positions of the layers that had no importance in some step."""
        self.loss = SUM
        self._proved: dict[Any, ProofResult] = {}  # by the operations of a pass
        self._fresh: set[Any] = set()  # those that were proved in this epoch
        self._proof: Proof | None = None  # while it is run

    def _find_buffers(self) -> None:
        """Note what depends on no sample: parameters and buffers, which may be others later."""
        self._buffers = list(self._model.buffers())
        self._free = {id(buffer): _NOTHING for buffer in self._buffers}
        self._free |= {key: frozenset((row,)) for key, row in self._rows.items()}

    def _require_same_parameters(self) -> None:
        if list(map(id, self._model.parameters())) != list(map(id, self.parameters)):
            raise UnsupportedError(
                expected=f"the {len(self.parameters)} parameters that the recorder was made with",
                got=f"{len(list(self._model.parameters()))}, or others in their place",
                where="the model",
                todo="make the recorder when the model has all its layers",
            )

    # A step.

    @contextmanager
    def step(
        self,
        sizes: Sequence[int],
        *,
        elementwise: bool = False,
        accumulates: bool = True,
        compares: bool = False,
        indices: Sequence[Tensor] = (),
    ) -> Iterator[None]:
        """Watch the passes that are run inside, over so many samples each.

        Parameters
        ----------
        sizes
            Samples of each backward pass.
        elementwise
            Keep what was seen until `finish`, since how much each entry of a gradient counts is
            known only then.
        accumulates
            Whether the passes put their gradients where the optimizer takes them.
        compares
            Whether to compare what is seen with what there is: the model's parameters, and the sum
            of the samples' gradients with the batch's; and to prove the row-to-sample mapping anew.
        indices
            By which the samples may be fetched inside.
        """
        self._sizes = list(sizes)
        self._elementwise, self._accumulates = elementwise, accumulates
        self._compares, self._indices = compares, list(indices)
        if compares:
            self._require_same_parameters()
            self._find_buffers()
            self._proved = {key: self._proved[key] for key in self._fresh}
            self._fresh.clear()
        self._sums: dict[int, Tensor] = {}  # by row: of the samples' gradients, to be compared
        self._most: dict[int, Tensor] = {}  # by row: what they would be if none were opposed
        self._precision = 0.0  # of the coarsest output
        self._penalised: set[int] = set()  # rows with gradients that are no sample's
        self._squares: Tensor | None = None
        self._done = 0  # passes
        self._kept: list[tuple[slice, dict[int, Factor]]] = []  # by pass
        self._read: list[tuple[Tensor, int]] = []  # what the kept factors are made of; its version
        self._used: set[int] = set()
        self._hidden: set[int] = set()  # rows that an autograd.Function was given
        self._undefined = set()
        # By id: row, version; and the gradient, so that no other one gets its id.
        self._gradients: dict[int, tuple[int, int, Tensor]] = {}
        self._scales: list[tuple[int, int, Tensor | float]] = []  # row; samples so far; factor
        self._notes = object()  # by which tensors are known to be noted in this step
        self._begin_pass()
        handle = self._model.register_forward_hook(self._note_outputs)
        with self:
            try:
                yield
            finally:
                handle.remove()
                self._gradients = {}
                for kept in (self._edges, self._outputs, self._uses, self._tape, self._retained):
                    kept.clear()  # what keeps the graph
                for _, inside in self._waiting:  # of a pass that came to no end
                    inside.close()
                self.resume()

    def add_pass(self, index: Tensor) -> None:
        """Expect one more pass, over these samples, which begins now."""
        if self._done != len(self._sizes):
            raise UnsupportedError(
                expected=f"{len(self._sizes)} backward passes before one more batch",
                got=f"{self._done}",
                where="the step",
                todo="call the model once for each batch, then backward()",
            )
        self._sizes.append(len(index))
        self._indices.append(index)
        if self._squares is not None:
            known = self._squares.shape[1]
            self._squares = self._norms.rows(sum(self._sizes), self._squares)
            self._squares[:, known:] = 0
        self._begin_pass()

    def pause(self) -> None:
        """Suspend recording in this thread: arithmetic in `optimizer.step()` is not the model's.

        Modes are a stack; popping could remove another recorder's.
        """
        if not _PAUSE.holders:
            _PAUSE.guard = torch._C.DisableTorchFunction()
            _PAUSE.guard.__enter__()
        _PAUSE.holders.add(id(self))

    def resume(self) -> None:
        """Watch again what is called from here on, once nobody else has paused."""
        if id(self) in _PAUSE.holders:
            _PAUSE.holders.remove(id(self))
            if not _PAUSE.holders:
                _PAUSE.guard.__exit__(None, None, None)

    def _begin_pass(self) -> None:
        start = sum(self._sizes[: self._done])
        size = self._sizes[self._done] if self._done < len(self._sizes) else 0
        self._batch = Batch(size, self._batch_dim, self._varies)
        named = self._indices[self._done] if self._done < len(self._indices) else None
        self._data = DataRows(self._batch, named, self._notes)
        self._uses: list[Use] = []
        self._edges: list[list[tuple[Node, int]]] = []  # of the watched outputs of each use
        self._outputs: dict[tuple[Node, int], AxisLayout] = {}  # of the model, on the samples' axis
        self._tape = Tape()
        self._signature = 0  # of the operations so far
        self._first_node: int | None = None  # its number in the thread
        self._retained: list[Tensor] = []  # whose gradients somebody keeps
        self._moves = self._moves_above = False  # whether samples may have other rows each time
        self._layouts: list[AxisLayout | None] | None = None  # of the uses
        self._joins: dict[Any, Tensor | None] = {}
        self._order: Tensor | None = None  # sample of each row of the loss
        self._samples = slice(start, start + size)
        self._counts: dict[int, int] = {}  # by row: uses in this pass that are to come back
        self._factors: dict[int, list[Factor]] = {}  # by row
        self._values: dict[int, Tensor] = {}  # by row: squared norms
        self._waiting: list[tuple[Use, InnerNodes]] = []  # with gradients to come inside
        self._announced = False

    def check(self) -> None:
        """Raise UnsupportedError unless this step's gradients are what its passes have made.

        To be called before the update.
        """
        if self._done != len(self._sizes):
            raise UnsupportedError(
                expected=f"{len(self._sizes)} backward passes before the update",
                got=f"{self._done}",
                where="the step",
                todo="put forward, backward and update into the block, and name the samples of "
                "each backward pass: step([index_1, index_2], ...)",
            )
        for row, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None or not parameter.requires_grad:
                continue
            if not self._is_known(row, gradient):
                raise UnsupportedError(
                    expected="the gradients of this step's backward passes",
                    got="a gradient that was changed otherwise than by a factor",
                    where=self._place(row),
                    todo="clip by norm, not by value, and change no gradient between backward() "
                    "and optimizer.step()",
                )
            if (row not in self._used or row in self._hidden) and bool(_dense(gradient).any()):
                raise UnsupportedError(
                    expected="operations that PyTorch calls by name",
                    got="a gradient, and an operation that made it and cannot be seen",
                    where=self._place(row),
                    todo=_SEEN,
                )
            if row in self._sums and row not in self._penalised | self._undefined:
                self._compare(row, gradient)

    @torch.no_grad()
    def _compare(self, row: int, gradient: Tensor) -> None:
        """Raise UnsupportedError unless the samples' gradients add up to the batch's."""
        bound = next(bound for least, bound in _BOUNDS if self._precision >= least)
        # Some gradients are nothing but rounding, as of a key's bias in attention.
        most = torch.stack([one.to(gradient.device) for one in self._most.values()]).max()
        rounding = 100 * self._precision * most
        difference = (self._sums[row] - _some_of(gradient)).norm()
        if bool(difference > bound * self._most[row] + rounding):
            raise UnsupportedError(
                expected="a gradient that is the sum of the samples'",
                got=f"another one, by {float(difference / self._most[row]):.1%} of what they come "
                "to",
                where=self._place(row),
                todo="clip by norm, and change no gradient by hooks or by .data; " + _SEEN,
            )

    def overflowed(self) -> bool:
        """Return whether a gradient of this step is not finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return not all(bool(torch.isfinite(_dense(gradient)).all()) for gradient in gradients)

    @torch.no_grad()
    def finish(self, derivatives: Mapping[int, Derivative]) -> None:
        """Take the step in, whose update had these derivatives; without any, there was none.

        Parameters
        ----------
        derivatives
            By id of the parameter: d(update)/d(gradient).
        """
        if any(one._version != version for one, version in self._read):
            raise UnsupportedError(
                expected="batches and activations that stay as they are until the update",
                got="one that was changed in place after its backward pass",
                where="the step",
                todo="make a new tensor for each batch that is accumulated",
            )
        count = sum(self._sizes)
        rates = [0.0] * len(self.parameters)
        for row, parameter in enumerate(self.parameters):
            derivative = derivatives.get(id(parameter), 0.0)
            rates[row] = 1.0 if isinstance(derivative, Diagonal) else float(derivative)
            if isinstance(derivative, Diagonal) and len(self._kept) > 1:
                derivative.square()  # once, for all passes
        for samples, factors in self._kept:
            values = {
                row: squares(factor, derivatives.get(id(self.parameters[row]), 0.0))
                for row, factor in factors.items()
            }
            self._write(samples, values)
        table = self._squares_like(self.parameters[0])
        for row, end, scale in self._scales:
            table[row, :end] *= scale**2
        for row in self._used:
            if id(self.parameters[row]) not in derivatives:
                table[row] = 0  # also where it was NaN
        for row in self._undefined:
            rates[row] = torch.nan
            self.undefined_layers.add(int(self._layer_of_row[row]))
        self._kept, self._read = [], []
        self._finished = count, rates

    def leave_out(self, moved: Sequence[Tensor]) -> set[int]:
        """Take it that parameters have no importance in the step; return their layers."""
        _, rates = self._finished
        rows = {self._rows[id(parameter)] for parameter in moved if id(parameter) in self._rows}
        layers = {int(self._layer_of_row[row]) for row in rows}
        for row in rows:
            rates[row] = torch.nan
        self.undefined_layers |= layers
        return layers

    def accept(self) -> None:
        """Keep what `finish` took in."""
        self._norms.accept(*self._finished)

    def take(self) -> Tensor:
        """Return beta (layer, samples) of the steps since the last call; forget them.

        On the CPU; the layers as in `layers`.
        """
        rows, rates = self._norms.take()
        beta = rows.new_zeros(len(self.layers), rows.shape[1])
        return beta.index_add_(0, self._layer_of_row, rows * rates.square())

    @property
    def forward_order(self) -> list[int]:
        """Positions of the layers in the order of their first call; those never called last."""
        called = list(self._called)
        rank = {name: number for number, name in enumerate(called)}
        positions = range(len(self.layers))
        return sorted(positions, key=lambda i: rank.get(self.layers[i], len(called)))

    # Forward: every torch function passes here.

    def __torch_function__(
        self,
        function: Callable[..., Any],
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry an operation out and note it if it has to do with parameters."""
        kwargs = kwargs or {}
        if function in _IDLE:
            return function(*args, **kwargs)
        if function in _BACKWARDS:
            self._before_backward(function, args, kwargs)
            return function(*args, **kwargs)
        if function is Tensor.retain_grad:
            self._retained.append(args[0])
        if function in _SCALINGS and self._known(args[0]):
            return self._scale(function, args, kwargs)
        if not torch.is_grad_enabled():  # an evaluation, or inside an autograd.Function
            rows = [self._rows[id(one)] for one in _tensors(args, kwargs) if id(one) in self._rows]
            if rows and _is_inside_function():
                self._hidden.update(rows)
            output = function(*args, **kwargs)
            if self._data.must_follow(function):
                self._data.follow(function, args, kwargs, as_sequence(output))
            return output
        if function is functional.multi_head_attention_forward:
            return self._open(function, args, kwargs)
        output = function(*args, **kwargs)
        if not isinstance(output, Tensor | tuple | list):
            if function is Tensor.__setitem__ and self._varies(args[2]):
                setattr(args[0], self._tag, None)
                self._notice(function, args, kwargs, args[:1], args[0].requires_grad)
                self._tape.add(function, args, kwargs, args[0])
            return output
        roots, varying = _NOTHING, []
        for tensor in _tensors(args, kwargs):
            own = self._roots(tensor)
            if own is None:
                varying.append(tensor)
            elif own:
                roots |= own
            if id(tensor) in self._rows:
                self._called.setdefault(self._owners[self._rows[id(tensor)]])
        if varying or (function in _EXPANSIONS and roots and self._expands(args, output)):
            output = self._meet(function, args, kwargs, output, roots, varying)
            self._tape.add(function, args, kwargs, output)
        elif function not in _MAKES_DATA or (
            self._batch.size and np.shape(output)[:1] != (self._batch.size,)
        ):
            for tensor in (output,) if isinstance(output, Tensor) else output:
                if isinstance(tensor, Tensor) and id(tensor) not in self._free:
                    setattr(tensor, self._tag, roots)
            if function is torch.arange and len(args) == 1 and isinstance(output, Tensor):
                mark_as_range(output)
        elif isinstance(output, Tensor) and function in _MAKES_NOISE:
            self._data.note_made(output)
        return output

    def _roots(self, tensor: Tensor) -> frozenset[int] | None:
        """Return the rows of the trained parameters that a tensor is made of; None if it varies."""
        own = self._free.get(id(tensor))
        if own is None:
            own = getattr(tensor, self._tag, None)
            if own is None:
                return None
        return own if tensor.requires_grad else _NOTHING

    def _is_fixed(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter or a buffer, or a view of one."""
        return id(tensor) in self._free or id(tensor._base) in self._free

    def _varies(self, value: Any) -> bool:
        """Return whether a tensor depends on the samples."""
        return isinstance(value, Tensor) and self._roots(value) is None

    def _meet(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        roots: frozenset[int],
        varying: Sequence[Tensor],
    ) -> Any:
        """Note an operation on samples, which may have parameters, and return its output."""
        if getattr(output, self._tag, None) is not None:  # changed in place
            setattr(output, self._tag, None)
        outputs = (output,) if isinstance(output, Tensor) else output
        hooked = [one for one in outputs if isinstance(one, Tensor) and one.requires_grad]
        self._notice(function, args, kwargs, outputs, bool(hooked))
        if function is functional.batch_norm and _argument(args, kwargs, 5, "training", False):
            self._meet_batch_norm(roots)
            return output
        if not roots or not hooked:
            return output
        if output is hooked[0] and output.dim() == 0 and is_sum(function):
            self._penalised |= roots
            return output  # a penalty on parameters beside the loss: no sample is in it
        for row in roots:
            self._counts[row] = self._counts.get(row, 0) + 1
        if self._compares and hooked[0].is_floating_point():
            self._precision = max(self._precision, torch.finfo(hooked[0].dtype).eps)
        self._moves |= self._moves_above
        self._tape.clear()  # these outputs are no loss's alone
        use = self._use(function, args, kwargs, roots, varying, hooked)
        self._uses.append(use)
        if is_sum(function):  # of which autograd keeps no values either
            use.args = tuple(None if self._varies(one) else one for one in args)
        if looks_inside(function):
            seen = look_inside(function, self._batch, hooked, args, kwargs)
            use.inner = seen or (outputs[0].detach(), outputs[0]._version)
        if isinstance(output, Tensor):
            # On the node, where it is called after every hook that somebody has on the tensor.
            whole = _whole_of(output)
            node, number = whole.grad_fn, whole.output_nr
            assert node is not None  # of parameters, and no parameter itself
            self._edges.append([(node, number)])
            node.register_prehook(partial(self._on_node, use, number))
            return output
        # A hook that knew the outputs it is on would keep them for good: 1.5 MB a step.
        empty = [
            partial(torch.zeros, one.shape, dtype=one.dtype, device=one.device)
            if isinstance(one, Tensor)
            else lambda: None
            for one in outputs
        ]
        places = [i for i, one in enumerate(outputs) if any(one is other for other in hooked)]
        # As copies: where one output was made of another (an LSTM cell's of its c), the gradient of
        # that one would have both parts in it.
        copies = _JointOutputs.apply(partial(self._on_gradients, use, empty, places), *hooked)
        self._edges.append([(copy.grad_fn, copy.output_nr) for copy in copies])
        output = list(outputs)
        for i, copy in zip(places, copies, strict=True):
            output[i] = copy
        kind: Any = type(outputs)  # perhaps one with names
        return kind(output)

    def _open(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Carry attention out as the operations of which PyTorch has composed it.

        Their tensors have positions first. The function would ask again whether a mode is active
        and come back here: its copy is told that none is.
        """
        names = {**function.__globals__, "has_torch_function": lambda _: False}
        copy = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        batch = self._batch
        self._batch = replace(batch, dim=1)
        try:
            with self:
                return copy(*args, **kwargs)
        finally:
            self._batch = batch

    def _expands(self, args: tuple[Any, ...], output: Any) -> bool:
        """Return whether an expansion makes a copy of a parameter for every sample."""
        axis = self._batch.axis(output.dim(), 1)
        missing = output.dim() - args[0].dim()
        before = 1 if axis < missing else args[0].shape[axis - missing]
        return before == 1 and output.shape[axis] == self._batch.size

    def _meet_batch_norm(self, roots: frozenset[int]) -> None:
        rows = set(self._counts) | roots
        for use in self._uses:
            use.exempt = True
        if self._batch_norm == "refuse":
            raise _mixing(
                "BatchNorm in training mode", self._place(min(roots)) if roots else "the step"
            )
        self._undefined |= rows
        self._used |= roots

    def _notice(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[Any],
        has_gradient: bool,
    ) -> None:
        """Note what an operation on samples may do to their rows."""
        if has_gradient:
            if moves_samples(function, args, kwargs, self._batch, self._is_fixed):
                # What comes after the model's outputs moves no sample that a parameter meets.
                self._moves_above = True
                self._moves |= not self._outputs
            exact = function in SELECT_BY_NUMBER
            settings: tuple[Any, ...] = ()
            if function in TAKE_LENGTHS:
                args, kwargs = args[:1], {}
            elif function is Tensor.__getitem__ or function is Tensor.__setitem__:
                entries = args[1] if isinstance(args[1], tuple) else (args[1],)
                lead = self._batch.dim + 1  # axes on which samples may be: exact there
                settings = self._settings(entries[:lead], True)
                args = (args[0], *entries[lead:], *args[2:])
            settings += self._settings(args, exact)
            if kwargs:
                settings += self._settings(kwargs.values(), exact)
            self._signature = hash((self._signature, function, settings))
        elif self._data.must_follow(function):
            self._data.follow(function, args, kwargs, outputs)

    def _settings(self, values: Iterable[Any], exact: bool) -> tuple[Any, ...]:
        """Return what arguments say of an operation: where they come from, axes and choices.

        Lengths only where whole numbers are to be exact.
        """
        found: list[Any] = []
        for value in values:
            if isinstance(value, Tensor):
                node = value.grad_fn
                if node is not None:  # numbers of nodes count on from operation to operation
                    number = node._sequence_nr()
                    if self._first_node is None:
                        self._first_node = number
                    found.append((number - self._first_node, value.output_nr))
                elif value.ndim or value.device.type != "cpu":
                    found.append(self._rows.get(id(value), ("data", value.ndim)))
                else:
                    found.append(_kind_of_number(value.item()))
            elif isinstance(value, int):
                # Not as a number below 0: hash(-1) is hash(-2).
                is_told = exact or -_AXIS < value < _AXIS
                found.append((value < 0, abs(value)) if is_told else None)
            elif isinstance(value, float):
                found.append(_kind_of_number(value))
            elif isinstance(value, str):
                found.append(value)
            elif isinstance(value, list | tuple):
                found.append(self._settings(value, exact))
            elif isinstance(value, slice):
                found.append(self._settings((value.start, value.stop, value.step), exact))
        return tuple(found)

    def _note_outputs(self, _model: nn.Module, _args: Any, outputs: Any) -> None:
        """Note which outputs of the model have the samples' axis."""
        with torch._C.DisableTorchFunction():
            for output in [outputs] if isinstance(outputs, Tensor) else tree_leaves(outputs):
                if isinstance(output, Tensor) and output.grad_fn is not None:
                    layout = AxisLayout(self._batch.axis(output.dim(), 1), "plain")
                    if layout.fits(output.shape, self._batch.size) and self._varies(output):
                        self._outputs[output.grad_fn, output.output_nr] = layout
                        if self._compares:
                            self._tape.outputs[id(output)] = output, layout

    def _use(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roots: frozenset[int],
        varying: Sequence[Tensor],
        hooked: Sequence[Tensor],
    ) -> Use:
        """Return a use of parameters, with what its data say of the samples' order."""
        data = None
        if function in RULES and varying and all(map(is_data, varying)):
            data = self._data.of(varying[0])
            if data is not None and data.is_of_no_sample:
                data = None
            if data is not None:
                self._moves |= not data.is_ordered(self._batch.size)
                self._signature = hash((self._signature, data.axis))
        return Use(
            function=function,
            args=args,
            kwargs=kwargs,
            roots=roots,
            shapes=[tuple(one.shape) for one in hooked],
            features=feature_axes(self._batch, function, hooked[0].dim(), args, kwargs),
            data=data,
            number=self._done,
            position=len(self._uses),
        )

    def _known(self, value: Any) -> list[Tensor]:
        """Return the gradients of this step among tensors."""
        return [one for one in as_sequence(value) if id(one) in self._gradients]

    def _is_known(self, row: int, gradient: Tensor) -> bool:
        """Return whether a gradient is what the passes so far have made."""
        return self._gradients.get(id(gradient), ())[:2] == (row, gradient._version)

    def _scale(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Let gradients be scaled, as clipping and a GradScaler do, and note by how much."""
        given, gradients = as_sequence(args[0]), self._known(args[0])
        before = [self._gradients[id(g)][1] == g._version for g in gradients]
        output = function(*args, **kwargs)
        inverse, position = _SCALINGS[function]
        factor = _argument(args, kwargs, position, "other", 1.0)
        for gradient, known in zip(gradients, before, strict=True):
            row = self._gradients[id(gradient)][0]
            own = factor
            if isinstance(own, list | tuple):
                own = own[[g is gradient for g in given].index(True)]
            own = 1 / own if inverse else own
            is_number = not isinstance(own, Tensor) or own.numel() == 1
            if known and is_number and "rounding_mode" not in kwargs:
                self._scales.append((row, sum(self._sizes[: self._done]), own))
                self._gradients[id(gradient)] = row, gradient._version, gradient
                if row in self._sums:
                    self._sums[row] = self._sums[row] * own
                    self._most[row] = self._most[row] * abs(own)
        return output

    # Which sample each row belongs to.

    def _before_backward(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Prove the row-to-sample mapping before the first backward call of a pass."""
        name = "grad_outputs" if function is torch.autograd.grad else "grad_tensors"
        place = 2 if function is torch.autograd.grad else 1
        if function is Tensor.backward:
            name = "gradient"
        starts = _argument(args, kwargs, 0, "outputs" if place == 2 else "tensors", ())
        gradients = _argument(args, kwargs, place, name, None)
        with torch._C.DisableTorchFunction():
            roots = list(as_sequence(starts))
            given = [None] * len(roots) if gradients is None else list(as_sequence(gradients))
            pairs = [(r, g) for r, g in zip(roots, given, strict=True) if r.grad_fn is not None]
            if self._uses and pairs and self._layouts is None:
                # None where no gradient comes to any use, as from a discriminator's own loss.
                self._layouts = self._find_layouts([r for r, _ in pairs], [g for _, g in pairs])

    def _find_layouts(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[AxisLayout | None] | None:
        """Return how samples lie in each use: as was proved of such a pass, or as a proof finds."""
        size = self._batch.size
        key = self._signature, self._settings(roots, False)
        known = self._proved.get(key)
        if known is not None and self._fits(known):
            holds = known.complete and key in self._fresh and not self._moves
            if holds:
                return known.layouts
        if size < 2:
            return self._find_layouts_of_one()
        self._proof = Proof(
            self._uses,
            self._edges,
            self._outputs,
            self._batch,
            self._model,
            lambda use: self._place(min(use.roots)),
            self._tape,
            self._coupled_loss,
        )
        kept = [tensor.grad for tensor in self._retained]
        try:
            proved = self._proof.run(roots, gradients)
        finally:
            self._proof = None
            for tensor, gradient in zip(self._retained, kept, strict=True):
                tensor.grad = gradient
        if proved is None:
            return None
        self._complete(proved, known)
        self._proved[key] = proved
        self._fresh.add(key)
        self._order = proved.order
        self.loss = max(self.loss, proved.loss, key=(SUM, UNCHECKED, COUPLED).index)
        return proved.layouts

    def _find_layouts_of_one(self) -> list[AxisLayout | None]:
        """Return how one sample, or none, lies in each use: as in a pass of several, if any."""
        alike = (one for one in self._proved.values() if self._fits(one) and not one.varies)
        known = next(alike, None)
        layouts = known.layouts if known is not None else [None] * len(self._uses)
        return [layout or self._alone(use) for use, layout in zip(self._uses, layouts, strict=True)]

    def _fits(self, proved: ProofResult) -> bool:
        """Return whether this pass can have the layouts of another one."""
        return len(proved.layouts) == len(self._uses) and all(
            layout is None or layout.fits(use.rows_shape, self._batch.size)
            for use, layout in zip(self._uses, proved.layouts, strict=True)
        )

    def _complete(self, proved: ProofResult, known: ProofResult | None) -> None:
        """Say whether a proof holds for later steps, after earlier ones of the same operations."""
        if known is not None:
            proved.count += known.count
            # Once rows lay otherwise, nothing but a proof tells how they lie.
            proved.varies = known.varies or any(
                layout is not None
                and before is not None
                and (layout.axis, layout.kind) != (before.axis, before.kind)
                for layout, before in zip(proved.layouts, known.layouts, strict=False)
            )
        proved.varies |= any(one is not None and one.kind == "listed" for one in proved.layouts)
        # A parameter that is zero hides mixing below it until it moves: gates, heads, biases.
        used = {row for use in self._uses for row in use.roots}
        zero = any(not bool(self.parameters[row].detach().any()) for row in used)
        proved.complete &= not proved.varies and (not zero or proved.count >= _ZEROS)

    def _alone(self, use: Use) -> AxisLayout:
        """Return the layout of a use where there is one sample, or none, and no proof."""
        shape = use.rows_shape
        if not shape:
            raise UnsupportedError(
                expected=f"{self._batch.size} samples on axis 0 of a layer's input",
                got=f"an output of shape {use.shapes[0]}",
                where=self._place(min(use.roots)),
                todo="give the samples an axis, also where there is one",
            )
        axes = use.axes(self._batch)
        axis = next((axis for axis in axes if shape[axis] == self._batch.size), axes[0])
        return AxisLayout(axis, "outer" if self._batch.size else "plain")

    # Backward: output gradients arrive.

    def _on_gradients(
        self,
        use: Use,
        empty: Sequence[Callable[[], Tensor | None]],
        places: Sequence[int],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Take the gradients of several outputs, those at `places`; zero where there is none."""
        if self._is_proved(use, gradients):
            return
        given = dict(zip(places, gradients, strict=True))
        deltas = [given.get(i) for i in range(len(empty))]
        self._on_gradient(
            use,
            tuple(
                make() if delta is None else delta
                for make, delta in zip(empty, deltas, strict=True)
            ),
        )

    def _on_node(self, use: Use, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradient of the one output."""
        gradient = gradients[number]
        if not self._is_proved(use, [gradient]) and gradient is not None:
            shape = use.shapes[0]
            self._on_gradient(use, gradient if gradient.shape == shape else gradient.reshape(shape))

    def _is_proved(self, use: Use, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether gradients come of a proof, this recorder's or another's."""
        if self._proof is not None:
            self._proof.take_gradients(use, gradients)
            return True
        edges = self._edges[use.position] if use.position < len(self._edges) else []
        return bool(edges) and is_proved_now(edges[0][0])

    def _on_gradient(self, use: Use, delta: Any) -> None:
        if use.done:
            raise UnsupportedError(
                expected="one backward pass for each forward pass",
                got="a second gradient",
                where=f"an operation {use.function.__name__}",
                todo="add the losses up before backward()",
            )
        use.done = True
        if not self._announced:
            self._announce()
        self._apply_waiting()
        if use.number != self._done:
            raise UnsupportedError(
                expected="one batch's backward pass before the next one's forward pass",
                got="another order",
                where="the step",
                todo="call the model and backward() for one batch after the other",
            )
        if isinstance(use.inner, InnerNodes):
            use.inner.open()
            self._waiting.append((use, use.inner))
        else:
            self._apply(use, delta)

    def _apply_waiting(self, ended: bool = False) -> None:
        """Make factors of what has all its gradients, or will get no more.

        Not as soon as the last has come, when its node has not let go yet of what it saved.
        """
        for use, inside in list(self._waiting):
            if ended or inside.is_complete:
                self._waiting.remove((use, inside))
                self._apply(use, None)

    def _apply(self, use: Use, delta: Any) -> None:
        """Make factors of the gradient of an operation."""
        if self._layouts is None:
            raise UnsupportedError(
                expected="backward() as PyTorch calls it, in the block",
                got="a backward pass that was not seen to begin",
                where="the step",
                todo="call loss.backward() or torch.autograd.backward() in the thread of the block",
            )
        layout = self._layouts[use.position]
        if layout is None:  # its gradient was zero in the proof, or the loss does not depend on it
            self._leave(use)
            return
        rows = use.rows_shape[layout.axis]
        joined = self._joined(layout, rows, self.parameters[min(use.roots)].device)
        with torch._C.DisableTorchFunction(), torch.set_grad_enabled(False):
            try:
                if isinstance(use.inner, InnerNodes):
                    pairs, use.inner = use.inner.close().factors(), None
                else:
                    output, version = use.inner or (None, 0)
                    output = output if output is not None and output._version == version else None
                    batch = Batch(rows, layout.axis, self._varies, output)
                    pairs = factors_of(use.function, batch, delta, use.args, use.kwargs)
                found: dict[int, list[Factor]] = {}  # by row: one may be given more than once
                for tensor, factor in pairs:
                    if tensor is None:
                        continue
                    if joined is not None:
                        factor = factor.joined(joined)
                    row = self._rows.get(id(tensor))
                    if row is None:
                        for root, own in self._go_back(tensor, factor):
                            found.setdefault(root, []).append(own)
                    elif tensor.requires_grad:
                        found.setdefault(row, []).append(factor)
                for row in list(found):
                    self._add(row, found.pop(row))
            except UnsupportedError as error:
                roots = [self._roots(one) or () for one in _tensors(use.args, use.kwargs)]
                error.where = self._place(min(row for rows in roots for row in rows))
                raise
        if self._elementwise:
            self._read += [
                (one, one._version)
                for one in _tensors(use.args, use.kwargs)
                if self._varies(one) and id(one._base) not in self._free  # an expanded parameter
            ]
        # Drop references: a live `loss` would keep these activations.
        use.args, use.kwargs, use.inner = (), {}, None

    def _joined(self, layout: AxisLayout, rows: int, device: torch.device) -> Tensor | None:
        """Return the rows of each sample, (N, T); None where row n is that of sample n."""
        key = (layout.kind if layout.owners is None else id(layout)), rows, device
        if key not in self._joins:
            self._joins[key] = joined_rows(layout, rows, self._batch.size, self._order, device)
        return self._joins[key]

    def _leave(self, use: Use) -> None:
        """Take an operation as done that has no importance in this step."""
        if isinstance(use.inner, InnerNodes):
            use.inner.close()
        for row in use.roots:
            self._used.add(row)
            self._settle(row)
        use.args, use.kwargs, use.inner = (), {}, None

    def _go_back(self, tensor: Tensor, factor: Factor) -> Iterator[tuple[int, Factor]]:
        """Yield factors of the parameters that a tensor is made of, by row."""
        rows = sorted(self._roots(tensor) or ())
        own = self.parameters[rows[0]] if len(rows) == 1 else None
        if isinstance(factor, Product | Outer) and own is not None and _is_transposed(tensor, own):
            yield rows[0], factor.transposed()
        elif rows:
            gradients = torch.autograd.grad(
                tensor,
                [self.parameters[row] for row in rows],
                factor.gradient(slice(None)).to(tensor.dtype),
                is_grads_batched=True,
                retain_graph=True,
            )
            for row, gradient in zip(rows, gradients, strict=True):
                yield row, Explicit(gradient)

    def _add(self, row: int, factors: Sequence[Factor]) -> None:
        """Add those of an operation."""
        self._used.add(row)
        self._factors.setdefault(row, []).extend(factors)
        self._settle(row)

    def _settle(self, row: int) -> None:
        """Count a use as done; with the last, let go of what a parameter's factors hold."""
        self._counts[row] -= 1
        if not self._counts[row] and not self._elementwise and row in self._factors:
            self._values[row] = self._summed(row).square()

    def _summed(self, row: int) -> Factor:
        """Return the sum of a parameter's gradients of this pass, and forget them."""
        factor = total(self._factors.pop(row), self._batch.size, self.parameters[row])
        if self._compares:
            most = factor.square().sqrt().sum()
            self._sums[row] = self._sums.get(row, 0) + _some_of(factor.summed())
            self._most[row] = self._most.get(row, 0) + most
        return factor

    def _write(self, samples: slice, values: Mapping[int, Tensor]) -> None:
        """Write the squared norms of a pass, by row; 0 where there are none."""
        if values:
            first = next(iter(values.values()))
            rows = self._squares_like(first)[:, samples]
            zero = rows.new_zeros(rows.shape[1])
            for row, one in values.items():
                if one.shape != zero.shape:
                    raise UnsupportedError(
                        expected=f"{len(zero)} samples, one for each index of the step",
                        got=f"norms of shape {tuple(one.shape)}",
                        where=self._place(row),
                        todo="name as many samples as the batch has",
                    )
            of_row = [values.get(row, zero) for row in range(len(rows))]
            torch.stack([one.to(rows) for one in of_row], out=rows)

    def _squares_like(self, like: Tensor) -> Tensor:
        """Return this step's rows of the buffer, zero where nothing was written yet."""
        if self._squares is None:
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self._squares = self._norms.rows(sum(self._sizes), like.new_empty(0, dtype=dtype))
            self._squares.zero_()
        return self._squares

    def _announce(self) -> None:
        """Note that a backward pass has begun, and see to its end."""
        self._announced = True
        if self._done == len(self._sizes):
            raise UnsupportedError(
                expected=f"{self._done} backward passes in the step",
                got="one more",
                where="the step",
                todo="add the losses up before backward(), or name the samples of each backward "
                "pass: step([index_1, index_2], ...)",
            )
        for row, parameter in enumerate(self.parameters if self._accumulates else ()):
            gradient = parameter.grad
            if gradient is None:
                stale, got = bool(self._done) and row in self._used, "none"
            elif id(gradient) in self._gradients:
                stale, got = not self._is_known(row, gradient), "one that was changed in between"
            else:
                stale, got = bool(_dense(gradient).any()), "a gradient from elsewhere"
            if stale:
                raise UnsupportedError(
                    expected="gradients that are empty before the step's first backward pass, and "
                    "kept until its last, but for a factor",
                    got=got,
                    where=self._place(row),
                    todo="call optimizer.zero_grad() once in the block, before its backward "
                    "passes; to accumulate, name each pass: step([index_1, index_2], ...); "
                    + _SEEN,
                )
        # As data-parallel training does: one call instead of a hook on each parameter.
        Variable._execution_engine.queue_callback(self._end_pass)

    def _end_pass(self) -> None:
        self._apply_waiting(ended=True)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            summed = {row: self._summed(row) for row in list(self._factors)}
            if self._elementwise:
                self._kept.append((self._samples, summed))
            else:
                values = {row: factor.square() for row, factor in summed.items()}
                self._write(self._samples, self._values | values)
        self._gradients = {
            id(parameter.grad): (row, parameter.grad._version, parameter.grad)
            for row, parameter in enumerate(self.parameters)
            if parameter.grad is not None
        }
        self._done += 1
        self._begin_pass()

    def _place(self, row: int) -> str:
        return f"layer {self._owners[row]}, parameter of shape {tuple(self.parameters[row].shape)}"


_NOTHING: frozenset[int] = frozenset()

_COMPARED = 2**16
"""Entries of a gradient that are compared; arbitrary, so that no second gradient is kept."""

_BOUNDS = ((1e-4, 0.1), (1e-8, 1e-2), (0.0, 1e-6))
"""How far two ways to a sum may be apart, by the precision of the outputs: half, single, double.

Single precision may be TF32 on a GPU, with 10 bits.
"""

_BACKWARDS = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}

_IDLE = {
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "grad", "grad_fn", "is_leaf", "is_nested", "layout")
    ),
    *(getattr(Tensor, name).__get__ for name in ("ndim", "requires_grad", "shape")),
    Tensor.grad.__set__,  # type: ignore[union-attr]
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous),
}
"""What is called often and concerns no importance."""
_MAKES_NOISE = {
    *(torch.rand, torch.randn, torch.randint, torch.normal),
    *(torch.randperm, torch.multinomial),
}
_MAKES_DATA = {torch.tensor, torch.as_tensor, torch.from_numpy, *_MAKES_NOISE}
"""What makes data of the samples inside a step, where there is as much as there are samples."""
_EXPANSIONS = {
    *(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat)
}
_SCALINGS: dict[Callable[..., Any], tuple[bool, int]] = {
    Tensor.mul_: (False, 1),
    Tensor.__imul__: (False, 1),
    Tensor.div_: (True, 1),
    Tensor.__itruediv__: (True, 1),
    torch._foreach_mul_: (False, 1),
    torch._foreach_div_: (True, 1),
    torch._amp_foreach_non_finite_check_and_unscale_: (False, 2),
}
"""What scales gradients in place: whether it divides, and which argument is the factor."""


_SEEN = (
    "leave out what hides operations or changes gradients: compiled or scripted modules, "
    "autograd.Functions, checkpoint(use_reentrant=True), DistributedDataParallel"
)


def _some_of(gradient: Tensor) -> Tensor:
    """Return some entries of a gradient, to be compared; all of a small one."""
    step = gradient.numel() // _COMPARED | 1  # odd, so that it goes through all columns
    return _dense(gradient).flatten()[::step].clone()


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient


_AXIS = 9
"""Whole numbers beyond it are lengths, and no axes; arbitrary."""

_ZEROS = 8
"""Most steps that are proved because a parameter is zero; arbitrary. Some stay zero for ever."""


def _kind_of_number(value: float) -> float | None:
    """Return 0 or 1, by which a factor may hide what it multiplies; None for other numbers."""
    return value if value in (0.0, 1.0) else None


def _whole_of(output: Tensor) -> Tensor:
    """Return what an output is a view of, if that is all of it, in another shape.

    As of a linear layer with a bias on three axes: a later operation in place on the view would
    leave the view's own node out of the graph.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _is_transposed(tensor: Tensor, parameter: Tensor) -> bool:
    """Return whether a tensor is the transpose of a matrix, which language models end with."""
    return (
        tensor._base is parameter
        and tensor.data_ptr() == parameter.data_ptr()
        and tensor.dim() == parameter.dim() == 2
        and tensor.stride() == parameter.stride()[::-1]
        and tensor.shape == parameter.shape[::-1]
    )


def _is_inside_function() -> bool:
    """Return whether an autograd.Function is calling, whose gradients are its own affair."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame is not None


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any
) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, also those in a list."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}


def _mixing(what: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        expected="operations that treat each sample of a batch on its own",
        got=f"{what}, which mixes them: no single sample has a gradient below it",
        where=where,
        todo="replace it (GroupNorm, LayerNorm), put it into eval mode, or record what is above "
        'it: batch_norm="undefined"',
    )


def _require_watchable(model: nn.Module, batch_norm: str) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            raise UnsupportedError(
                expected="a model that is trained by one process on one device",
                got=type(module).__name__,
                where=f"module {name}" if name else "the model itself",
                todo="train without it; a study of the paper's network has --workers-per-trial",
            )
        where = f"module {name}" if name else "the model itself"
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl:
            raise UnsupportedError(
                expected="a model whose operations are called one by one",
                got="a compiled one",
                where=where,
                todo="record the model that was given to torch.compile",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                expected="a model whose operations are called one by one",
                got="a scripted one",
                where=where,
                todo="record the model that was scripted",
            )
        mixing = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or not module.track_running_stats
        )
        if mixing and batch_norm == "refuse":
            raise _mixing(type(module).__name__, where)


class ImportanceRecorder:
    """Record in-step importance around anybody's training step.

    Parameters
    ----------
    model
        A network that treats each sample of a batch on its own.
    optimizer
        One whose update acts on each entry of the gradient by itself, see
        `sampimp.importance.optimizers`,
        over any groups of the model's parameters.
    loss_reduction
        How the loss is taken over a batch, "mean" or "sum". The gradients already contain it; it is
        written beside the result, because importance differs by B^2 between the two.
    batch_dim
        Axis of the samples in tensors that have positions too: 0, or 1 where positions come first
        (`batch_first=False`).
    batch_norm
        A BatchNorm in training mode mixes the samples. "refuse" raises an error; "undefined"
        records NaN for it and for all that is called before it, and importance above it.
    coupled_loss
        A loss that is no sum over samples, as the root of a mean, has no part of each sample.
        "refuse" raises an error; "constant" takes its derivative at each sample's outputs as a
        constant of the step, and says so in the result's attrs (`loss`).

    Raises
    ------
    UnsupportedError
        On construction for a model or an optimizer without an exact rule; in a step for gradients
        that were changed otherwise than by a factor, for an operation that mixes samples, or for
        parameters whose use cannot be seen.

    References
    ----------
    Gao & Jojic (2017), section 2. See Also: GraNd = sqrt(sum over layers of importance) B / rate,
    under plain SGD.

    Examples
    --------
    Three lines are added to a loop, here marked with their number:

    >>> inputs, labels = torch.randn(6, 4), torch.randint(0, 3, (6,))
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> recorder = ImportanceRecorder(model, optimizer)                        # 1
    >>> for epoch in (1, 2):
    ...     for index in torch.randperm(6).split(3):
    ...         with recorder.step(index, epoch=epoch):                        # 2
    ...             optimizer.zero_grad()
    ...             loss = functional.cross_entropy(model(inputs[index]), labels[index])
    ...             loss.backward()
    ...             optimizer.step()
    >>> dict(recorder.to_dataset().sizes)                                      # 3
    {'epoch': 2, 'layer': 2, 'sample': 6}
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss_reduction: str = "mean",
        batch_dim: int = 0,
        batch_norm: str = "refuse",
        coupled_loss: str = "refuse",
    ) -> None:
        check_choice(loss_reduction, ("mean", "sum"), "loss_reduction")
        self._derivative = UpdateDerivative(optimizer)
        self._capture = Capture(
            model, batch_dim=batch_dim, batch_norm=batch_norm, coupled_loss=coupled_loss
        )
        self.optimizer = optimizer
        self.loss_reduction = loss_reduction
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in known for p in model.parameters()):
            raise UnsupportedError(
                expected="an optimizer over parameters of the model",
                got="none that it trains",
                where="ImportanceRecorder",
                todo="make the optimizer from this model's parameters",
            )
        self._epoch: int | None = None
        self._checked: int | None = None  # the epoch of which a step was compared
        self._indices: list[Tensor] = []  # of the steps of this epoch since the last flush
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by epoch: indices and beta
        self._largest_batch = 0
        self._left_out: set[int] = set()  # layers that another optimizer moves

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in forward order once a step was recorded."""
        return tuple(self._capture.layers[i] for i in self._capture.forward_order)

    @contextmanager
    def step(
        self, index: Index | Sequence[Index], *, epoch: int
    ) -> Iterator[Callable[[Index], None]]:
        """Record the training step run inside the block.

        The block may give forward and backward to the optimizer as a closure that it calls once.

        Parameters
        ----------
        index
            Permanent index of each sample of the batch, shape (N,), in the order of its rows. Where
            gradients of several backward passes are accumulated, a list with the index of each.
        epoch
            The epoch that the step belongs to. A sample used twice in it has its importance summed.

        Yields
        ------
        Callable
            To be called with the index of one more backward pass before its forward pass, where
            that is not known when the step begins.

        Raises
        ------
        ConfigError
            An index appears twice or is negative.
        UnsupportedError
            As for the class, or the block makes no update or more than one.
        """
        passes = [check_index(one) for one in split_passes(index)]
        index_N = passes[0] if len(passes) == 1 else check_index(torch.cat(passes))
        updates = 0

        def add_pass(index: Index) -> None:
            nonlocal index_N
            with torch._C.DisableTorchFunction():
                added = check_index(index)
                whole_N = check_index(torch.cat([index_N, added]))
                self._capture.add_pass(added)
                index_N = whole_N

        def before_update() -> None:
            self._capture.pause()
            self._capture.check()
            self._derivative.before()

        def before_step(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = _argument(args, kwargs, 1, "closure", None)  # 0 is the optimizer
            if closure is None:
                return before_update()

            def watched() -> Any:
                self._capture.resume()  # so that a second call is seen, and refused
                loss = closure()
                before_update()
                return loss

            if len(args) > 1:
                return (args[0], watched, *args[2:]), kwargs
            return args, {**kwargs, "closure": watched}

        def after_update(*_: Any) -> None:
            nonlocal updates
            updates += 1
            if updates == 1:
                self._capture.finish(self._derivative.after())
            self._capture.resume()

        if epoch != self._epoch:
            self._flush()
            self._epoch = epoch
        is_first = epoch != self._checked
        moved_by: dict[str, list[Tensor]] = {}  # another optimizer, by its class

        def after_any_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if optimizer is not self.optimizer:
                moved = [p for group in optimizer.param_groups for p in group["params"]]
                moved = [p for p in moved if p.grad is not None]
                moved_by.setdefault(type(optimizer).__name__, []).extend(moved)

        handles = (
            self.optimizer.register_step_pre_hook(before_step),
            self.optimizer.register_step_post_hook(after_update),
            register_optimizer_step_post_hook(after_any_update),
        )
        sizes = [len(one) for one in passes]
        try:
            with self._capture.step(
                sizes,
                elementwise=self._derivative.elementwise,
                compares=is_first,
                indices=passes,
            ):
                yield add_pass
        finally:
            self._derivative.forget()
            for handle in handles:
                handle.remove()
        if updates == 0 and self._capture.overflowed():
            self._capture.finish({})  # a GradScaler leaves such a step out: nothing was updated
        elif updates != 1:
            raise UnsupportedError(
                expected="one optimizer.step() in the block",
                got=f"{updates}",
                where=f"epoch {epoch}",
                todo="put exactly one update into the block",
            )
        if updates == 1:
            self._checked = epoch
        for kind, moved in moved_by.items():
            self._leave_out(kind, moved)
        self._capture.accept()
        self._indices.append(index_N)
        self._largest_batch = max(self._largest_batch, len(index_N))

    def _leave_out(self, kind: str, moved: Sequence[Tensor]) -> None:
        """Record NaN for layers that another optimizer moved in a step, and warn of it once."""
        layers = sorted(self._capture.leave_out(moved) - self._left_out)
        self._left_out.update(layers)
        if layers:
            names = ", ".join(self._capture.layers[layer] for layer in layers)
            warnings.warn(
                f"{kind} moves {names} as well, which the recorder of "
                f"{type(self.optimizer).__name__} does not see: their importance is NaN; make a "
                "recorder for each optimizer, or take its step outside the block",
                stacklevel=4,
            )

    def pop_epoch(self, epoch: int, sample_count: int) -> Tensor:
        """Return an epoch's importance on the CPU and forget it.

        Returns
        -------
        Tensor of shape (layer, sample)
            NaN for a sample that no step of the epoch used.

        Raises
        ------
        KeyError
            No step of the epoch was recorded, or it was taken already.
        ConfigError
            A step named a sample beyond `sample_count`.
        """
        self._flush()
        summed = self._summed(self._parts[epoch], sample_count)
        del self._parts[epoch]
        if epoch == self._epoch:
            self._epoch = self._checked = None  # what comes is checked as an epoch's first step
        return summed[self._capture.forward_order]

    def _flush(self) -> None:
        """Turn the norms of the steps so far into importance."""
        if self._indices and self._epoch is not None:
            part = torch.cat(self._indices), self._capture.take()
            self._parts.setdefault(self._epoch, []).append(part)
            self._indices = []

    def to_dataset(self, sample_count: int | None = None) -> "xr.Dataset":
        """Return what was recorded, labelled.

        Parameters
        ----------
        sample_count
            Size of the training set; by default the largest index seen, plus one.

        Returns
        -------
        xarray.Dataset
            `importance` (epoch, layer, sample), float32, in parameter squared; NaN where an epoch
            did not use a sample, or where its gradient was not finite (`not_finite_epochs` in the
            attrs). `to_zarr` of the Dataset writes it to disk.

        Raises
        ------
        ConfigError
            A step named a sample beyond `sample_count`.
        """
        import xarray as xr  # here: recording alone should not cost the import

        self._flush()
        epochs = sorted(self._parts)
        if sample_count is None:
            sample_count = self._count_samples(epochs)
        order = self._capture.forward_order
        values = [
            self._summed(self._parts[epoch], sample_count)[order].float().numpy()
            for epoch in epochs
        ]
        variable = VARIABLES["importance"]
        rates = sorted({float(group["lr"]) for group in self.optimizer.param_groups})
        return xr.Dataset(
            {
                "importance": (
                    variable.dims,
                    np.stack(values) if values else np.empty((0, len(self.layers), sample_count)),
                    {
                        "units": variable.units,
                        "long_name": variable.long_name,
                        "learning_rate": rates[0] if len(rates) == 1 else rates,
                        "batch_size": self._largest_batch,
                        "loss_reduction": self.loss_reduction,
                        "weight_decay": float(self.optimizer.param_groups[0]["weight_decay"]),
                        "optimizer": type(self.optimizer).__name__,
                        "loss": self._capture.loss,
                        "not_finite_epochs": self._not_finite(epochs),
                    },
                )
            },
            coords={
                "epoch": epochs,
                # As objects: Zarr 3 has no specification of strings of a fixed length, and warns.
                "layer": np.array(self.layers, dtype=object),
                "sample": np.arange(sample_count),
            },
            attrs={"schema_version": SCHEMA_VERSION, "sampimp_version": __version__},
        )

    def _count_samples(self, epochs: Sequence[int]) -> int:
        """Return the largest index plus one; raise ConfigError where that is no index at all."""
        parts = [index for epoch in epochs for index, _ in self._parts[epoch]]
        largest = max((int(index.max()) for index in parts if len(index)), default=-1)
        used = len(torch.cat(parts).unique()) if parts else 0
        if largest > 10**6 + 1000 * used:  # arbitrary: sparser than any data set
            raise ConfigError(
                expected="positions in the training set, so that the largest is about their number",
                got=f"{used} samples, with indices up to {largest}",
                where="ImportanceRecorder.to_dataset",
                todo="number the samples from 0, as by numpy.unique(names, return_inverse=True), "
                "or pass sample_count",
            )
        return largest + 1

    def _not_finite(self, epochs: Sequence[int]) -> list[int]:
        """Return the epochs in which a loss or a gradient was infinite or NaN."""
        defined = [
            i for i in range(len(self._capture.layers)) if i not in self._capture.undefined_layers
        ]
        return [
            epoch
            for epoch in epochs
            if not all(bool(beta[defined].isfinite().all()) for _, beta in self._parts[epoch])
        ]

    @staticmethod
    def _summed(parts: Sequence[tuple[Tensor, Tensor]], sample_count: int) -> Tensor:
        indices, betas = zip(*parts, strict=True)
        index_N = torch.cat(indices)
        if index_N.numel() and int(index_N.max()) >= sample_count:
            raise ConfigError(
                expected=f"indices below {sample_count}, the number of samples",
                got=f"{int(index_N.max())}",
                where="ImportanceRecorder",
                todo="pass the size of the whole training set, and in each step the samples' "
                "positions in it",
            )
        return sum_by_sample(index_N, torch.cat(betas, dim=1), sample_count)


def check_index(index: Index) -> Tensor:
    """Return sample indices as an int64 tensor on the CPU, or raise ConfigError."""
    try:
        given = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            expected="whole numbers, the positions of the batch's samples in the training set",
            got=str(error).splitlines()[0],
            where="ImportanceRecorder.step",
            todo="number the samples, as by enumerate(names), and keep the names beside the result",
        ) from error
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given.numel() and not whole:
        raise ConfigError(
            expected="whole numbers, the positions of the batch's samples in the training set",
            got=f"{given.dtype}",
            where="ImportanceRecorder.step",
            todo="pass the samples' positions, not their values",
        )
    index_N = given.to("cpu", torch.int64)
    listed = index_N.flatten().tolist()  # a set of ints takes a quarter of the time of a sort
    if index_N.dim() != 1 or len(set(listed)) != len(listed) or min(listed, default=0) < 0:
        raise ConfigError(
            expected="one non-negative index for each sample of the batch, none twice",
            got=f"shape {tuple(index_N.shape)}, smallest {min(listed, default=0)}, "
            f"{len(listed) - len(set(listed))} repeated",
            where="ImportanceRecorder.step",
            todo="pass the samples' positions in the training set",
        )
    return index_N


def split_passes(index: Index | Sequence[Index]) -> list[Index]:
    """Return the indices of each backward pass of a step.

    Examples
    --------
    >>> split_passes([4, 5]), split_passes([[4], [5]])
    ([[4, 5]], [[4], [5]])
    """
    several = isinstance(index, list | tuple) and len(index) and not isinstance(index[0], int)
    several = several and np.ndim(index[0]) > 0
    return list(index) if several else [index]  # type: ignore[arg-type, list-item]


def forward_layers(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Return the names of a model's layers in the order in which a pass over inputs calls them.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> forward_layers(model, torch.zeros(1, 2))
    ('0', '2')
    """
    capture = Capture(model)
    with capture.step([len(inputs)]):
        model(inputs)
    return tuple(capture.layers[i] for i in capture.forward_order)


def snapshot_importance(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, rate: float, chunk: int = 1000
) -> Tensor:
    """Return the importance that every sample would have at the model's present parameters.

    The model is in evaluation mode meanwhile. So it is defined for networks with dropout, none of
    which acts, and with BatchNorm, which then uses its running statistics and mixes no samples; of
    a BatchNorm that keeps none it is not.

    Parameters
    ----------
    model
        As for `Capture`; left as it is, gradients and the modules' `training` too.
    inputs, labels
        Shapes (N, ...) and (N,).
    rate
        The factor from a sample's own gradient to its part of the update, learning rate / batch
        size under a mean loss.
    chunk
        Samples in one pass; a matter of memory (arbitrary), each sample's gradient being its own.

    Returns
    -------
    Tensor of shape (layer, N)
        On the CPU, in the model's precision.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    # cuDNN goes back through a recurrent layer in training mode alone.
    kernels = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with evaluation_mode(model), kernels:
        capture = Capture(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rates = {id(parameter): float(rate) for parameter in trained}
        for inputs_N, labels_N in zip(inputs.split(chunk), labels.split(chunk), strict=True):
            with capture.step([len(labels_N)], accumulates=False):
                loss = functional.cross_entropy(model(inputs_N), labels_N, reduction="sum")
                torch.autograd.grad(loss, trained)
            capture.finish(rates)
            capture.accept()
    return capture.take()[capture.forward_order]


def sum_by_sample(index_N: Tensor, beta_LN: Tensor, sample_count: int) -> Tensor:
    """Sum each sample's importance over an epoch, shape (layer, sample); NaN where unused."""
    total = torch.zeros(len(beta_LN), sample_count, dtype=beta_LN.dtype)
    total.index_add_(1, index_N, beta_LN)
    unused = torch.ones(sample_count, dtype=torch.bool)
    unused[index_N] = False
    total[:, unused] = torch.nan
    return total
