"""Products with the Gauss-Newton matrix of any network, by autograd.

Map: `gauss_newton_products`.

References
----------
Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sampimp.influence.twice_differentiable import second_derivatives


def gauss_newton_products(
    outputs: Tensor,
    losses: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> list[Tensor]:
    """Return products with the Gauss-Newton matrix J^T (d² loss / d outputs²) J of a batch.

    It is the Hessian without the curvature of the network, and positive semidefinite for a loss
    that is convex in the outputs. J is the derivative of the outputs by the parameters.

    Parameters
    ----------
    outputs
        Of the network, with their graph.
    losses
        (N,), which depend on the parameters through `outputs` alone.
    weights
        Factors (N,) of the samples in the loss.
    parameters
        The parameters, which require gradients.
    directions
        (K, P...) for each parameter.

    Returns
    -------
    list of Tensor
        (K, P...) for each parameter.

    Raises
    ------
    UnsupportedError
        An operation has no second derivative.

    Examples
    --------
    >>> weight = torch.tensor([3.0], requires_grad=True)
    >>> outputs = weight.square()  # J = 2 w = 6
    >>> direction = torch.ones(1, 1)
    >>> gauss_newton_products(outputs, outputs.square(), torch.ones(1), [weight], [direction])
    [tensor([[72.]])]
    """
    with torch.enable_grad(), second_derivatives():
        # J gamma = d <gamma, J^T u> / d u, for any u: J^T u is linear in u.
        dual = torch.zeros_like(outputs, requires_grad=True)
        transposed = torch.autograd.grad(
            outputs, parameters, dual, create_graph=True, materialize_grads=True
        )
        slope = torch.autograd.grad(losses, outputs, weights, create_graph=True)[0]
        products = []
        for k in range(len(directions[0])):
            terms = [
                (values, part[k])
                for values, part in zip(transposed, directions, strict=True)
                if values.requires_grad  # not zeros of an unused parameter
            ]
            along = torch.autograd.grad(
                [values for values, _ in terms],
                dual,
                [part for _, part in terms],
                retain_graph=True,
            )[0]
            curved = torch.autograd.grad(
                slope, outputs, along, retain_graph=True, materialize_grads=True
            )[0]
            products.append(
                torch.autograd.grad(
                    outputs, parameters, curved, retain_graph=True, materialize_grads=True
                )
            )
    return [torch.stack(of_parameter) for of_parameter in zip(*products, strict=True)]
