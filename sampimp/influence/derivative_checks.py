"""Checks of the first and second derivatives of one step, by identities that they fulfil.

Map: `find_mismatch` (inner products by layer against those of all layers), `require_symmetric`
(products with the Hessian), `find_other_gradient` (gradients that should be the same),
`require_losses` (of a batch).

Shape suffixes: K directions, L layers, N samples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.per_sample import as_matrix

_BOUNDS = ((1e-4, 0.1), (1e-8, 1e-3), (0.0, 1e-8))
"""Largest difference of two sums that are equal but for rounding, relative to their terms' sizes.

By the least rounding unit of the coarsest values in the step: half, single and double precision.

The terms are sums of their own, of products of either sign over all entries of a layer, so that
their rounding errors may be 1,000 times the rounding unit, 1.2e-7 in float32. Measured, for the
networks of a study in training: at most 5e-7 in float32 and 1e-14 in float64. A factor that is
wrong, or a use of a parameter that was not recorded, makes a difference of the size of a term;
PyTorch's `weight_norm`, whose second derivative is wrong, one of 5e-4 to 0.3.
"""


def bound(precision: float) -> float:
    """Return the largest relative difference that rounding to a precision explains."""
    return next(bound for least, bound in _BOUNDS if precision >= least)


def find_mismatch(
    inner_KLN: Tensor,
    total_KN: Tensor,
    directions: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    precision: float,
) -> tuple[int, int] | None:
    """Return a direction and sample whose inner products by layer do not add up to the total.

    Parameters
    ----------
    inner_KLN
        Inner products of each sample's gradient with each direction, by layer.
    total_KN
        Those of all layers, computed otherwise.
    directions
        (K, P...) for each parameter.
    gradients
        The batch's gradient by each parameter; None for an unused one.
    precision
        Rounding unit of the coarsest values in the step.

    Returns
    -------
    tuple of int, or None
        None if all add up, within the bound for the precision.
    """
    size_KN = inner_KLN.abs().sum(1)
    difference_KN = (inner_KLN.sum(1) - total_KN).abs()
    # Some gradients are nothing but rounding errors, as that of the bias of attention's keys.
    norms_K = torch.stack([as_matrix(part).norm(dim=1) for part in directions]).norm(dim=0)
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    rounding = 10 * precision * torch.stack(norms).norm()
    terms_KN = size_KN + size_KN.mean(1, keepdim=True)  # a sample's own terms may all be tiny
    wrong_KN = difference_KN > bound(precision) * terms_KN + rounding * norms_K[:, None]
    wrong_KN |= size_KN.isfinite() != total_KN.isfinite()
    if not bool(wrong_KN.any()):
        return None
    return divmod(int(wrong_KN.flatten().int().argmax()), wrong_KN.shape[1])


def require_symmetric(
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    direction: Sequence[Tensor],
    precision: float,
) -> None:
    """Raise UnsupportedError unless <r, H gamma> = <gamma, H r> for a random r.

    It tells an operation of PyTorch whose second derivative is wrong.

    Parameters
    ----------
    product
        Returns H times a vector, by parameter.
    direction
        gamma, by parameter.
    precision
        As for `find_mismatch`.
    """
    generator = torch.Generator(direction[0].device).manual_seed(0)
    probe = [torch.empty_like(part).normal_(generator=generator) for part in direction]
    sides = (probe, product(direction)), (direction, product(probe))
    terms = torch.stack(
        [
            torch.stack(
                [(part * values).sum() for part, values in zip(vector, products, strict=True)]
            )
            for vector, products in sides
        ]
    )
    difference, size = (terms[0].sum() - terms[1].sum()).abs(), terms.abs().sum()
    if bool(difference > bound(precision) * size):
        raise UnsupportedError(
            expected="second derivatives that are symmetric",
            got=f"two that differ by {float(difference / size):.2g} of their size",
            where="the reverse pass, in the product with the Hessian of a step's loss",
            todo="replace the operation whose second derivative is wrong, a custom or a rare one, "
            "by others, and report it to PyTorch",
        )


def find_other_gradient(
    norms: Sequence[float], expected: Sequence[float], relative: float
) -> int | None:
    """Return the first parameter whose gradient differs in its norm.

    Two gradients of the same norm are taken to be the same. A norm notices what changes all
    samples alike (a loss, a rate, a state), and random numbers in a batch of ordinary size.

    Parameters
    ----------
    norms, expected
        Norm of each parameter's gradient, (P,); NaN for a parameter without one.
    relative
        Largest relative difference.

    Examples
    --------
    >>> find_other_gradient([1.0, 0.5], [1.0, 0.4], 1e-3)
    1
    >>> find_other_gradient([1.0, 1e-8], [1.0, 2e-8], 1e-3)
    """
    finite = [norm for norm in expected if math.isfinite(norm)]
    # Some gradients are nothing but rounding errors, as that of the bias of attention's keys.
    rounding = relative / 10 * math.hypot(*finite)
    for place, (norm, other) in enumerate(zip(norms, expected, strict=True)):
        same = abs(norm - other) <= relative * other + rounding
        if not (same or (math.isnan(norm) and math.isnan(other)) or norm == other):
            return place
    return None


def require_losses(losses: Any, count: int) -> None:
    """Raise UnsupportedError unless there is one loss, with a gradient, for each sample."""
    if not isinstance(losses, Tensor):
        got = type(losses).__name__
    elif losses.shape != (count,):
        got = f"a tensor of shape {tuple(losses.shape)}"
    elif not losses.requires_grad:
        got = "a tensor without a gradient"
    else:
        return
    raise UnsupportedError(
        expected=f"the losses of {count} samples as a tensor of shape ({count},)",
        got=got,
        where="the function that returns the losses of a batch",
        todo='return the loss of each sample: reduction="none"',
    )
