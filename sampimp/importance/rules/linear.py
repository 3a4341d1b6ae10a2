"""Rules of matrix products: `functional.linear`, `matmul`, `mm`, `addmm`.

The gradient of the weight is delta x^T for one position, and a sum of such products over positions;
the gradient of the bias is delta.
"""

import torch
from torch import Tensor

from sampimp.importance.gradients import Explicit, Outer, Product
from sampimp.importance.rules.arithmetic import add_factors
from sampimp.importance.rules.batch import Batch, Factors
from sampimp.importance.rules.fallback import vmap_factors


def linear_factors(
    batch: Batch, delta: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Factors:
    """Yield the factors of `functional.linear`."""
    product = _product(batch, delta, input, weight)
    yield weight, product
    if isinstance(product, Product):
        yield bias, product.left
    else:
        yield bias, Explicit(product.left.sum((1, 2)))


def matmul_factors(batch: Batch, delta: Tensor, input: Tensor, other: Tensor) -> Factors:
    """Yield the factors of `input @ other`."""
    if batch.varies(other) or other.dim() != 2 or input.dim() < 2:
        yield from vmap_factors(torch.matmul, batch, delta, input, other)
        return
    yield other, _product(batch, input, delta, other)


def addmm_factors(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Factors:
    """Yield the factors of `beta * input + alpha * mat1 @ mat2`."""
    yield from matmul_factors(batch, delta if alpha == 1 else alpha * delta, mat1, mat2)
    yield from add_factors(batch, delta, None, input, alpha=beta)


def _product(batch: Batch, left: Tensor, right: Tensor, weight: Tensor) -> Product | Outer:
    """Return the gradients left right^T of a weight, summed over positions."""
    if left.dim() == 2 and not batch.dim:
        return Product(Explicit(left), Explicit(right))
    return Outer(batch.rows(left).unsqueeze(2), batch.rows(right).unsqueeze(2), weight.shape)


def matmul_features(batch: Batch, ndim: int, input: Tensor, other: Tensor) -> int:
    """Return 1 if only the first matrix depends on the samples, else 0."""
    return int(batch.varies(input) and not batch.varies(other))


def addmm_features(
    batch: Batch, ndim: int, input: Tensor, mat1: Tensor, mat2: Tensor, **_: float
) -> int:
    """Return the features of the product."""
    return matmul_features(batch, ndim, mat1, mat2)
