"""Sample importance as pure functions of tensors.

The objective carries a weight v_i = 1 on every sample's loss. The parameter affectibility of sample
i is phi_i = d(theta' - theta)/d v_i, the derivative of the update that is made; its importance in a
layer is beta_i = sum over the layer's parameters of phi_ij^2 (Gao & Jojic 2017, section 2).

Plain SGD with rate eta gives phi_i = -eta d(batch loss)/d theta, restricted to sample i. With
delta_i the gradient of the *batch* loss at a linear layer's output and x_i the layer's input, the
weight's part of it is the outer product eta delta_i x_i^T and the bias' part is eta delta_i: their
squared norms need the norms of delta_i and x_i only, and no per-sample gradient. The factor 1/B of
a mean loss is inside delta. Weight decay depends on no sample and is not in it.

Shape suffixes: L layers, N samples of a batch, K the inputs or outputs of a layer.
"""

import torch
from torch import Tensor


def row_norm(rows_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the Euclidean norm of each row, shape (N,), into `out` if it is given.

    One pass without a temporary: squaring into a new tensor and summing it cost 1 % of a training
    step of the paper's network more.

    Examples
    --------
    >>> row_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([5., 1.])
    """
    return torch.linalg.vector_norm(rows_NK, dim=1, out=out)


def linear_importance(
    delta_norm_LN: Tensor, activation_norm_LN: Tensor, weight_rate_L1: Tensor, bias_rate_L1: Tensor
) -> Tensor:
    """Return beta of each sample in each linear layer under plain SGD.

    Parameters
    ----------
    delta_norm_LN
        Norm of the gradient of the batch's loss at the layer's output.
    activation_norm_LN
        Norm of the layer's input.
    weight_rate_L1, bias_rate_L1
        Learning rate of the weight and of the bias; 0 for a parameter that is frozen or absent.

    Returns
    -------
    Tensor of shape (L, N)
        |delta|^2 (weight_rate^2 |x|^2 + bias_rate^2), in units of parameter squared.

    References
    ----------
    Gao & Jojic (2017), section 2; the norm of an outer product as in Goodfellow (2015),
    "Efficient per-example gradient computations".

    Examples
    --------
    >>> rate = torch.tensor([[0.1]])
    >>> linear_importance(torch.tensor([[2.0]]), torch.tensor([[3.0]]), rate, rate)
    tensor([[0.4000]])

    since 4 (0.01 * 9 + 0.01) = 0.4.
    """
    factor_LN = (weight_rate_L1 * activation_norm_LN).square_().add_(bias_rate_L1.square())
    return delta_norm_LN.square().mul_(factor_LN)
