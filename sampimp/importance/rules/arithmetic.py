"""Rules of arithmetic with parameters: sums, differences, elementwise products, expansion.

The gradient of a tensor that was broadcast to the output is the output gradient (times the other
factor of a product), summed over the axes along which the tensor was broadcast, except the batch
axis (`Batch.reduced`).
"""

from typing import Any

from torch import Tensor

from sampimp.importance.gradients import Explicit
from sampimp.importance.rules.batch import Batch, Factors


def add_factors(
    batch: Batch, delta: Tensor, input: Any, other: Any, *, alpha: float = 1
) -> Factors:
    """Yield the factors of `input + alpha * other`."""
    for tensor, factor in ((input, 1), (other, alpha)):
        if isinstance(tensor, Tensor) and not batch.varies(tensor):
            values = batch.reduced(_like(delta, tensor), tensor.shape, not _is_parameter(tensor))
            yield tensor, Explicit(values if factor == 1 else factor * values)


def sub_factors(
    batch: Batch, delta: Tensor, input: Any, other: Any, *, alpha: float = 1
) -> Factors:
    """Yield the factors of `input - alpha * other`."""
    return add_factors(batch, delta, input, other, alpha=-alpha)


def mul_factors(batch: Batch, delta: Tensor, input: Any, other: Any) -> Factors:
    """Yield the factors of `input * other`."""
    for tensor, factor in ((input, other), (other, input)):
        if isinstance(tensor, Tensor) and not batch.varies(tensor):
            values = delta * (factor.conj() if isinstance(factor, Tensor) else factor)
            values = batch.reduced(_like(values, tensor), tensor.shape, not _is_parameter(tensor))
            yield tensor, Explicit(values)


def expand_factors(batch: Batch, delta: Tensor, input: Tensor, *_: Any, **__: Any) -> Factors:
    """Yield the factor of a tensor that is copied for every sample, such as a class token.

    The recorder calls the rule only if the expansion makes one copy for each sample.
    """
    yield input, Explicit(batch.reduced(delta, input.shape))


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """Return gradients of a tensor, which may be real although the output is complex."""
    return values.real if values.is_complex() and not tensor.is_complex() else values


def _is_parameter(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter or a view of one, whose rows are not samples."""
    return (tensor if tensor._base is None else tensor._base).is_leaf
