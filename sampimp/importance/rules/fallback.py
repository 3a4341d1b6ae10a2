"""Per-sample gradients of an operation without a rule, by `torch.func.vmap`.

The operation is carried out again for every sample, as a batch of one sample, and differentiated.
That is exact for every operation that treats each sample on its own, and slower than a rule.

Map: `vmap_factors`. Where several axes of an argument have N entries, trial calls tell which of
them is the batch axis (`_split_inputs`).
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Explicit
from sampimp.importance.rules.batch import Batch, Factors

_BATCH_AXES: dict[Any, tuple[int, ...]] = {}
"""Batch axes of an operation's arguments, by function and shapes, as found by trial calls."""

_SEE_LAYER_RULE = "register a rule for it, see help(sampimp.layer_rule)"


class _Call:
    """An operation as a function of its tensors that depend on samples, and of its parameters."""

    def __init__(self, batch: Batch, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        self.function = function
        self.values = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._varying = [i for i, leaf in tensors if batch.varies(leaf)]
        self._trained = [i for i, leaf in tensors if not batch.varies(leaf) and leaf.requires_grad]
        self.inputs = [self.values[i] for i in self._varying]
        self.trained = [leaves[i] for i in self._trained]
        self.parameters = [self.values[i] for i in self._trained]

    def output(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Carry out the operation."""
        values = list(self.values)
        for i, value in zip(self._varying, inputs, strict=True):
            values[i] = value
        for i, value in zip(self._trained, parameters, strict=True):
            values[i] = value
        args, kwargs = tree_unflatten(values, self._structure)
        return self.function(*args, **kwargs)

    def gradients(self, inputs: Sequence[Tensor], delta: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the parameters."""

        def output(*parameters: Tensor) -> Tensor:
            return self.output(inputs, parameters)

        return torch.func.vjp(output, *self.parameters)[1](delta)


def vmap_factors(
    function: Callable[..., Any], batch: Batch, delta: Tensor, *args: Any, **kwargs: Any
) -> Factors:
    """Yield the factors of any operation that treats each sample on its own.

    Parameters
    ----------
    function
        The operation; the other parameters are those of a rule.

    Raises
    ------
    UnsupportedError
        The operation has several outputs, changes its arguments, is random, or cannot be
        differentiated by `torch.func.vmap`.
    """
    name = getattr(function, "__name__", str(function))
    if not isinstance(delta, Tensor):
        raise UnsupportedError(
            expected="an operation with a rule, or with one output",
            got=f"{name}, which has {len(delta)} outputs",
            where="an operation with parameters",
            todo=_SEE_LAYER_RULE,
        )
    call = _Call(batch, function, args, kwargs)
    if name.endswith("_") and not name.endswith("__"):
        raise UnsupportedError(
            expected="operations with parameters that leave their arguments as they are",
            got=f"{name}, which changes its first argument",
            where="an operation with parameters",
            todo="use h = h * gamma, which makes a new tensor, not h *= gamma or h.mul_(gamma)",
        )
    try:
        with torch.enable_grad():
            if batch.size == 1:  # on whichever axis the sample is
                gradients = tuple(
                    gradient.unsqueeze(0) for gradient in call.gradients(call.inputs, delta)
                )
            else:
                inputs = _split_inputs(batch, call, delta)
                gradients = torch.func.vmap(call.gradients)(inputs, _split(delta, batch.dim))
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(
            expected="an operation with a rule, or one that torch.func.vmap can differentiate",
            got=f"{name}: {str(error).strip().splitlines()[0]}",
            where="an operation with parameters",
            todo=_SEE_LAYER_RULE,
        ) from error
    for parameter, gradient in zip(call.trained, gradients, strict=True):
        yield parameter, Explicit(gradient)


def _split_inputs(batch: Batch, call: _Call, delta: Tensor) -> list[Tensor]:
    """Return each input as N batches of one sample, (N, ...).

    Where several axes of an input have N entries, the batch axis is the one for which the samples'
    outputs are the rows of the operation's output.
    """
    choices = [
        [
            axis
            for axis in dict.fromkeys([batch.dim, *range(values.dim())])
            if values.shape[axis : axis + 1] == (batch.size,)
        ]
        for values in call.inputs
    ]
    for values, axes in zip(call.inputs, choices, strict=True):
        if not axes:
            batch.first(values, values.dim())  # raises the error that says what is missing
    candidates = list(product(*choices))
    if len(candidates) == 1:
        batch_axes = candidates[0]
    else:
        key = call.function, batch.dim, delta.shape, *map(_described, call.values)
        if key not in _BATCH_AXES:
            _BATCH_AXES[key] = _find_batch_axes(batch, call, candidates)
        batch_axes = _BATCH_AXES[key]
    return [_split(values, axis) for values, axis in zip(call.inputs, batch_axes, strict=True)]


def _described(value: Any) -> Any:
    """Return a tensor's shape, a string or an integer unchanged, and None for other values."""
    if isinstance(value, Tensor):
        return value.shape
    return value if isinstance(value, str | int) else None


def _find_batch_axes(
    batch: Batch, call: _Call, candidates: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    """Return the first candidate for which the samples' outputs are rows of the output.

    Raises
    ------
    RuntimeError
        There is none.
    """
    reason = "the batch axis of its arguments cannot be determined"
    for candidate in candidates:
        inputs = [_split(values, axis) for values, axis in zip(call.inputs, candidate, strict=True)]
        try:
            with torch.no_grad():
                by_sample = torch.func.vmap(lambda *parts: call.output(parts, call.parameters))(
                    *inputs
                )
                whole = _split(call.output(call.inputs, call.parameters), batch.dim)
        except (RuntimeError, ValueError) as error:
            reason = str(error)
            continue
        close = 4 * torch.finfo(by_sample.dtype).eps ** 0.5
        if by_sample.shape == whole.shape and torch.allclose(
            by_sample, whole, close, close, equal_nan=True
        ):
            return candidate
    raise RuntimeError(reason)


def _split(values: Tensor, axis: int) -> Tensor:
    """Return each sample as a batch of one: (N, ..., 1, ...)."""
    return values.unsqueeze(axis).movedim(axis + 1, 0)
