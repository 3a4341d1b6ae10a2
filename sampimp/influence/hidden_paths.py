"""Refuses paths from the parameters to a loss that autograd does not follow.

A derivative of training needs every path by which a parameter changes a later gradient. Three kinds
are in no graph of autograd, whose second derivative would leave them out without a word:

    values cut from the graph   detach(), .data, operations under torch.no_grad()
    values that leave PyTorch   item(), tolist(), numpy()
    state of the model          a buffer that the forward pass changes (running statistics)

Losses with straight-through estimators, or with targets made of the network's own outputs, have
such paths. Their gradient is as the author wants it, so training and in-step importance are right;
its derivative is not that of autograd. Values that jump (labels, masks, signs, counts) have the
derivative 0, and may be used in any way.

Map: `CutValues` (follows values through a forward pass), `constant_buffers`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership.call import argument, tensors_among
from sampimp.importance.ownership.row_notes import as_sequence
from sampimp.importance.watch import is_inside_function


class CutValues(TorchFunctionMode):
    """Follows values that depend on the parameters, but are cut from autograd's graph.

    Parameters
    ----------
    where
        What is computed inside the block, for messages.

    Raises
    ------
    UnsupportedError
        Inside the block: a value that depends on the parameters becomes a Python number.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> with CutValues("the loss") as cuts:
    ...     shown = weight.detach().sum()
    ...     loss = (weight * weight.detach()).sum()
    >>> cuts.require_none_in(weight.sum())
    >>> cuts.require_none_in(loss)
    Traceback (most recent call last):
    sampimp.errors.UnsupportedError: Expected values that autograd follows back to the parameters
         Got a value that is cut from autograd's graph, by detach
       ...
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        self._cut: dict[int, tuple[Tensor, str]] = {}  # by id: the tensor, and what has cut it

    def __torch_function__(
        self,
        function: Callable[..., Any],
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry out a call, and follow its values."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if self._cut or function in _WATCHED or not torch.is_grad_enabled():
            with torch._C.DisableTorchFunction():
                self._follow(function, args, kwargs, output)
        return output

    def _follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Note the outputs of a call that cuts them from the graph, or whose arguments are cut."""
        if function in _JUMPS_OR_CONSTANTS:
            return
        arguments = tensors_among(args[:1] if function in _FORMS else args, kwargs)
        sources = [tensor for tensor in arguments if _is_continuous(tensor)]
        cause = next(filter(None, map(self._cause, sources)), None)
        if cause is None and any(tensor.requires_grad for tensor in sources):
            cause = _what_cuts(function, args, kwargs)
        if cause is None:
            return
        if function in _LEAVES:
            raise self._error(f"a value that becomes a number outside of PyTorch, by {cause}")
        for tensor in as_sequence(args[0] if function in _ASSIGNMENTS else output):
            if isinstance(tensor, Tensor) and _is_continuous(tensor):
                for changed in (tensor, tensor._base):
                    if changed is not None:
                        self._cut[id(changed)] = changed, cause

    def _cause(self, tensor: Tensor) -> str | None:
        """Return what has cut a tensor, or the one that it is a view of, from the graph."""
        for candidate in (tensor, tensor._base):
            if id(candidate) in self._cut:
                return self._cut[id(candidate)][1]
        return None

    def require_none_in(self, value: Tensor) -> None:
        """Raise UnsupportedError if a value depends on one that was cut from the graph."""
        cause = self._cause(value)
        if cause is not None:
            raise self._error(f"a value that is cut from autograd's graph, by {cause}")

    def _error(self, got: str) -> UnsupportedError:
        return UnsupportedError(
            expected="values that autograd follows back to the parameters",
            got=got,
            where=self._where,
            todo="compute it without the cut, and log values elsewhere: the influence by way of "
            "it would be missing",
        )


@contextmanager
def constant_buffers(model: nn.Module, where: str) -> Iterator[None]:
    """Raise UnsupportedError if a buffer of a model changes inside a block, but for whole numbers.

    Whole numbers, such as a count of batches, do not depend on the parameters.
    """
    # Values, since batch_norm changes its statistics without counting a new version.
    before = {
        name: (buffer, buffer.clone())
        for name, buffer in model.named_buffers()
        if _is_continuous(buffer)
    }
    yield
    after = {name: buffer for name, buffer in model.named_buffers() if _is_continuous(buffer)}
    changed = sorted(before.keys() ^ after.keys()) + [
        name
        for name, (buffer, values) in before.items()
        if name in after and not (buffer is after[name] and torch.equal(buffer, values))
    ]
    if changed:
        raise UnsupportedError(
            expected="a forward pass that leaves the buffers of the model as they are",
            got=f"a change of {', '.join(changed)}",
            where=where,
            todo="train with the module in evaluation mode, or without running statistics "
            "(track_running_stats=False); hold a count as whole numbers: the influence by way of "
            "the buffer would be missing",
        )


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _what_cuts(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Return what cuts the outputs of a call on differentiable tensors from the graph, if so."""
    if is_inside_function():
        return None  # its backward pass is the derivative of its forward pass
    # A getter's own name is "__get__".
    name = getattr(getattr(function, "__self__", None), "__name__", None) or function.__name__
    if function in _CUTS or function in _LEAVES:
        return str(name)
    if function is functional.gumbel_softmax:  # its inner calls are not seen
        return "gumbel_softmax(hard=True)" if argument(args, kwargs, 2, "hard", False) else None
    return None if torch.is_grad_enabled() else f"{name} under torch.no_grad()"


def _methods(*names: str) -> set[Callable[..., Any]]:
    """Return the functions of PyTorch, and the methods of its tensors, that have these names."""
    return {
        getattr(owner, name) for name in names for owner in (torch, Tensor) if hasattr(owner, name)
    }


_CUTS = {
    Tensor.data.__get__,  # type: ignore[attr-defined]
    *_methods("detach", "detach_", "tensor", "new_tensor", "normal"),
}
"""Functions whose outputs have the values of their arguments, and no gradient."""

_LEAVES = _methods("item", "tolist", "numpy", "__array__", "__float__", "__complex__")
"""Functions that return numbers outside of PyTorch."""

_WATCHED = {*_CUTS, *_LEAVES, functional.gumbel_softmax}

_ASSIGNMENTS = {
    Tensor.__setitem__,
    Tensor.data.__set__,  # type: ignore[attr-defined]
}
"""Functions that change their first argument, and return nothing."""

_FORMS = _methods("type_as", "to", "expand_as", "view_as", "reshape_as")
"""Functions that take nothing but shape, type and device from their second argument."""

_JUMPS_OR_CONSTANTS = {
    *_methods("sign", "round", "floor", "ceil", "trunc", "bernoulli"),
    *_methods("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *_methods("randint_like", "new_zeros", "new_ones", "new_empty", "new_full"),
}
"""Functions whose outputs have the derivative 0."""
