"""Forward calls: record every torch function of a pass that involves parameters.

`torch.overrides.TorchFunctionMode` shows each call of a torch function. If parameters and samples
are both among its arguments, the call is a *use*: a hook on its output receives the output gradient
(`sampimp.importance.backward`). Tensors are read and never written, so trained parameters are
bit-identical with and without recording.

Map: `ForwardWatch`, `_Suspension` (threads in which recording is suspended), `is_inside_function`;
at the end, tables of functions that are treated specially.
"""

import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sampimp.importance.backward import BackwardHooks
from sampimp.importance.forward_pass import ForwardPass
from sampimp.importance.gradient_checks import SCALINGS, GradientChecks
from sampimp.importance.model_tensors import (
    NO_ROOTS,
    ModelTensors,
    nested_samples,
    samples_mixed_by,
)
from sampimp.importance.output_hooks import hook_output, hook_outputs
from sampimp.importance.ownership.call import Call, argument, tensors_among
from sampimp.importance.ownership.layout import AxisLayout
from sampimp.importance.ownership.row_notes import (
    as_sequence,
    is_data,
    mark_as_data,
    mark_as_range,
)
from sampimp.importance.ownership.use import Use
from sampimp.importance.rules.batch import Batch
from sampimp.importance.rules.registry import (
    RULES,
    feature_axes,
    is_sum,
    look_inside,
    looks_inside,
)


class _Suspension(threading.local):
    """The watches suspended in this thread, and the guard that disables torch functions."""

    def __init__(self) -> None:
        self.holders: set[int] = set()
        self.guard: Any = None


_SUSPENSION = _Suspension()


class ForwardWatch(TorchFunctionMode):
    """Records the forward calls of a pass that involve parameters.

    Parameters
    ----------
    tensors
        The model's parameters.
    checks
        Receives scaled gradients, and parameters whose use is hidden or undefined.
    backward
        Receives the output gradients.
    batch_norm
        "refuse" or "undefined", see `ImportanceRecorder`.
    """

    def __init__(
        self,
        tensors: ModelTensors,
        checks: GradientChecks,
        backward: BackwardHooks,
        batch_norm: str,
    ) -> None:
        super().__init__()
        self._tensors, self._checks, self._backward = tensors, checks, backward
        self._batch_norm = batch_norm

    def begin_pass(self, calls: ForwardPass) -> None:
        """Record the forward calls from here on in `calls`."""
        self.calls = calls

    def suspend(self) -> None:
        """Suspend recording in this thread: arithmetic in `optimizer.step()` is not the model's.

        Modes are a stack; popping could remove another recorder's.
        """
        if not _SUSPENSION.holders:
            _SUSPENSION.guard = torch._C.DisableTorchFunction()
            _SUSPENSION.guard.__enter__()
        _SUSPENSION.holders.add(id(self))

    def resume(self) -> None:
        """End the suspension, once no other watch in this thread needs it."""
        if id(self) in _SUSPENSION.holders:
            _SUSPENSION.holders.remove(id(self))
            if not _SUSPENSION.holders:
                _SUSPENSION.guard.__exit__(None, None, None)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry out a call, and record it if it involves parameters."""
        kwargs = kwargs or {}
        if function in _IGNORED:
            return function(*args, **kwargs)
        special = _SPECIAL.get(function)
        if special is not None:
            output = special(self, function, args, kwargs)
            if output is not NotImplemented:
                return output
        if not torch.is_grad_enabled():
            return self._call_without_gradient(function, args, kwargs)
        output = function(*args, **kwargs)
        if not isinstance(output, Tensor | tuple | list):
            if function is Tensor.__setitem__:
                self._record_assignment(function, args, kwargs)
            elif function == _SET_DATA:  # made anew by each access
                self.calls.data.note_same(*args)
            elif torch.is_grad_enabled():  # perhaps read, as by NumPy
                self.calls.data.compare(filter(is_data, tensors_among(args, kwargs)))
            return output
        roots, varying = self._origins(args, kwargs)
        if varying or (
            function in _EXPANSIONS and roots and _expands(self.calls.batch, args, output)
        ):
            output = self._record(function, args, kwargs, output, roots, varying)
            self.calls.tape.add(function, args, kwargs, output)
        elif function not in _MAKES_DATA or (
            self.calls.batch.size and np.shape(output)[:1] != (self.calls.batch.size,)
        ):
            self._tag(function, args, output, roots)
        elif isinstance(output, Tensor) and function in _MAKES_NOISE:
            self.calls.data.note_made(output)
        return output

    def _origins(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[frozenset[int], list[Tensor]]:
        """Return the roots of a call's arguments, and those arguments that vary."""
        tensors = self._tensors
        roots, varying = NO_ROOTS, []
        for tensor in tensors_among(args, kwargs):
            tensor_roots = tensors.roots(tensor)
            if tensor_roots is None:
                varying.append(tensor)
            elif tensor_roots:
                roots |= tensor_roots
            if id(tensor) in tensors.owner_of:
                tensors.called.setdefault(tensors.owner_of[id(tensor)])
        return roots, varying

    def _tag(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        output: Any,
        roots: frozenset[int],
    ) -> None:
        """Tag outputs that are derived only from parameters and buffers."""
        for tensor in (output,) if isinstance(output, Tensor) else output:
            if isinstance(tensor, Tensor) and id(tensor) not in self._tensors.fixed:
                self._tensors.derived[tensor] = roots
        if function is torch.arange and len(args) == 1 and isinstance(output, Tensor):
            mark_as_range(output)

    # Handlers of functions that are treated specially. A handler returns NotImplemented if the call
    # is to be treated as any other.

    def _call_backward(self, function: Any, args: Any, kwargs: Any) -> Any:
        self._backward.before_backward(function, args, kwargs)
        return function(*args, **kwargs)

    def _note_retained(self, function: Any, args: Any, kwargs: Any) -> Any:
        self.calls.retained.append(args[0])
        return NotImplemented

    def _scale_gradients(self, function: Any, args: Any, kwargs: Any) -> Any:
        if self._checks.known(args[0]):
            return self._checks.scale(function, args, kwargs)
        return NotImplemented

    def _call_attention(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Carry attention out as the operations of which PyTorch composes it.

        Their tensors have positions first. The function checks whether a mode is active and
        would call this handler again; in the copy that check returns False.
        """
        if not torch.is_grad_enabled():
            return NotImplemented
        names = {**function.__globals__, "has_torch_function": lambda _: False}
        copy = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        batch = self.calls.batch
        self.calls.batch = replace(batch, dim=1)
        try:
            with self:
                return copy(*args, **kwargs)
        finally:
            self.calls.batch = batch

    def _call_without_gradient(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Carry out a call in an evaluation, or inside an autograd.Function."""
        rows = self._tensors.rows
        ids = map(id, tensors_among(args, kwargs))
        hidden = [rows[key] for key in ids if key in rows]
        if hidden and is_inside_function():
            self._checks.hidden.update(hidden)
        output = function(*args, **kwargs)
        self.calls.data.follow(Call(function, args, kwargs), as_sequence(output))
        return output

    def _record_assignment(self, function: Any, args: Any, kwargs: Any) -> None:
        """Record `tensor[index] = value` if the value or the index varies."""
        if any(map(self._tensors.varies, (*as_sequence(args[1]), args[2]))):
            self._mark_varying(args[0])
            if args[0].requires_grad:
                self.calls.note_order(function, args, kwargs, self._tensors.is_fixed)
            else:
                self.calls.data.follow(Call(function, args, kwargs), args[:1])
            self.calls.tape.add(function, args, kwargs, args[0])

    # Calls on samples.

    def _record(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        roots: frozenset[int],
        varying: Sequence[Tensor],
    ) -> Any:
        """Record a call on samples, with or without parameters, and return its output."""
        self._mark_varying(output)
        outputs = (output,) if isinstance(output, Tensor) else output
        hooked = [
            tensor for tensor in outputs if isinstance(tensor, Tensor) and tensor.requires_grad
        ]
        if hooked and any(tensor.is_nested for tensor in (*varying, *hooked)):
            raise nested_samples(self._tensors.place(min(roots)) if roots else "the step")
        if hooked and not roots and all(map(is_data, varying)):  # of inputs with a gradient
            for tensor in hooked:
                mark_as_data(tensor)
            self.calls.data.follow(Call(function, args, kwargs), outputs)
        if hooked:
            self.calls.note_order(function, args, kwargs, self._tensors.is_fixed)
            self.calls.note_labels(varying)
        else:
            self.calls.data.follow(Call(function, args, kwargs), outputs)
        if function is functional.batch_norm and argument(args, kwargs, 5, "training", False):
            self._record_batch_norm(roots)
            return output
        if not roots or not hooked:
            return output
        if output is hooked[0] and output.dim() == 0 and is_sum(function):
            self._checks.penalised |= roots
            return output  # a penalty on parameters beside the loss: it belongs to no sample
        use = self._record_use(function, args, kwargs, roots, varying, outputs, hooked)
        if isinstance(output, Tensor):
            self.calls.edges.append([hook_output(output, partial(self._backward.on_node, use))])
            return output
        edges, output = hook_outputs(outputs, hooked, partial(self._backward.on_gradients, use))
        self.calls.edges.append(edges)
        return output

    def _mark_varying(self, tensor: Any) -> None:
        """Note that a tensor without samples, if it was one, is changed in place by samples."""
        base = tensor._base if isinstance(tensor, Tensor) else None
        for changed in (base, tensor):  # a view may be written into
            if changed is not None and self._tensors.forget(changed) and is_data(changed):
                self.calls.data.note_made(changed)

    def _record_batch_norm(self, roots: frozenset[int]) -> None:
        """Exempt a BatchNorm in training mode, and all uses before it; or refuse it."""
        rows = set(self.calls.open_uses) | roots
        for use in self.calls.uses:
            use.exempt = True
        if self._batch_norm == "refuse":
            raise samples_mixed_by(
                "BatchNorm in training mode",
                self._tensors.place(min(roots)) if roots else "the step",
            )
        self._checks.undefined |= rows
        self._checks.used |= roots

    def _record_use(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        roots: frozenset[int],
        varying: Sequence[Tensor],
        outputs: Sequence[Any],
        hooked: Sequence[Tensor],
    ) -> Use:
        """Record a call with parameters and samples; `hooked` are its outputs with a gradient."""
        calls = self.calls
        for row in roots:
            calls.open_uses[row] = calls.open_uses.get(row, 0) + 1
        if self._checks.compares:
            self._checks.note_precision(hooked[0])
        calls.moves |= calls.moves_above
        calls.tape.clear()  # the tensors so far are inputs of this use, not only of the loss
        calls.labels.clear()
        data = calls.data.of_inputs(varying, has_rule=function in RULES)
        if data is not None:
            calls.moves |= not data.is_ordered(calls.batch.size)
            calls.signature.add_axis(data.axis)
        use = Use(
            function=function,
            args=args,
            kwargs=kwargs,
            roots=roots,
            shapes=[tuple(output.shape) for output in hooked],
            features=feature_axes(calls.batch, function, hooked[0].dim(), args, kwargs),
            data=data,
            number=calls.number,
            position=len(calls.uses),
        )
        calls.uses.append(use)
        if is_sum(function):  # autograd does not save the values of a sum either
            use.args = tuple(None if self._tensors.varies(value) else value for value in args)
        if looks_inside(function):
            inner = look_inside(function, calls.batch, hooked, args, kwargs)
            use.inner = inner or (outputs[0].detach(), outputs[0]._version)
        return use

    def record_outputs(self, _model: nn.Module, _args: Any, outputs: Any) -> None:
        """Record the model's outputs that have an axis of samples; a forward hook of the model."""
        calls = self.calls
        with torch._C.DisableTorchFunction():
            for output in [outputs] if isinstance(outputs, Tensor) else tree_leaves(outputs):
                if isinstance(output, Tensor) and output.grad_fn is not None:
                    layout = AxisLayout(calls.batch.axis(output.dim(), 1), "plain")
                    fits = layout.fits(output.shape, calls.batch.size)
                    if fits and self._tensors.varies(output):
                        calls.outputs[output.grad_fn, output.output_nr] = layout
                        if self._checks.compares:
                            calls.tape.outputs[id(output)] = output, layout


def _expands(batch: Batch, args: tuple[Any, ...], output: Any) -> bool:
    """Return whether an expansion makes a copy of a parameter for every sample."""
    axis = batch.axis(output.dim(), 1)
    missing = output.dim() - args[0].dim()
    before = 1 if axis < missing else args[0].shape[axis - missing]
    return before == 1 and output.shape[axis] == batch.size


def is_inside_function() -> bool:
    """Return whether the forward of an autograd.Function is on the call stack.

    Its backward computes the gradients, so that operations in its forward are not watched. From
    PyTorch 2.14 on `Function.apply` is no Python function and leaves no frame.
    """
    forwards = {
        getattr(kind.forward, "__code__", None) for kind in _subclasses(torch.autograd.Function)
    }
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in forwards:
        frame = frame.f_back
    return frame is not None


def _subclasses(kind: Any) -> Iterator[Any]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


_IGNORED = {
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "grad", "grad_fn", "is_leaf", "is_nested", "layout")
    ),
    *(getattr(Tensor, name).__get__ for name in ("ndim", "requires_grad", "shape")),
    Tensor.grad.__set__,  # type: ignore[union-attr]
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous),
}
"""Functions that are called often and have no effect on importance."""

_MAKES_NOISE = {
    *(torch.rand, torch.randn, torch.randint, torch.normal),
    *(torch.randperm, torch.multinomial),
}
_MAKES_DATA = {torch.tensor, torch.as_tensor, torch.from_numpy, *_MAKES_NOISE}
"""Functions whose results are data of the samples if they have as many rows as the batch."""

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

_EXPANSIONS = {
    *(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat)
}

_SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.backward: ForwardWatch._call_backward,
    torch.autograd.backward: ForwardWatch._call_backward,
    torch.autograd.grad: ForwardWatch._call_backward,
    Tensor.retain_grad: ForwardWatch._note_retained,
    functional.multi_head_attention_forward: ForwardWatch._call_attention,
    **dict.fromkeys(SCALINGS, ForwardWatch._scale_gradients),
}
"""Handlers of functions that are treated specially."""
