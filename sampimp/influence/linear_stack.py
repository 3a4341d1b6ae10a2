"""First and second derivatives of one step of a stack of linear layers, written out.

For layers d = 1 .. D with inputs x_d, pre-activations z_d = x_d W_d^T + b_d, activation f and
output gradients delta_d of the step's loss (`sampimp.training.fused`), and a direction (V_d, u_d)
in the parameters, R denotes the derivative along it:

    forward    R z_d = x_d V_d^T + u_d + (R x_d) W_d^T,   R x_{d+1} = f'(z_d) R z_d
    loss       R delta_D = p (R z_D - <p, R z_D>) / B,    p: softmax
    backward   s_d = delta_{d+1} W_{d+1},   delta_d = f'(z_d) s_d
               R s_d = (R delta_{d+1}) W_{d+1} + delta_{d+1} V_{d+1}
               R delta_d = f'(z_d) R s_d + f''(z_d) s_d R z_d
    Hessian's product   W_d: (R delta_d)^T x_d + delta_d^T R x_d,   b_d: sum of R delta_d
    inner products      <direction of layer d, g_{i,d}> = delta_{i,d} . (V_d x_{i,d} + u_d)

The last line is the derivative of sample i's loss along the direction's part in layer d, and takes
no product of its own. Their sum over d equals delta_{i,D} . R z_{i,D}, which is computed by another
path and compared in every step. K directions go through one pass. (Pearlmutter 1994, "Fast exact
multiplication by the Hessian", for the R-operator.)

The Gauss-Newton matrix is the Hessian without the terms of f'' and of delta V, delta^T R x.

Shape suffixes: N samples, K directions, I inputs and O outputs of a layer, C classes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sampimp.errors import UnsupportedError
from sampimp.training.activations import ACTIVATIONS, Activation
from sampimp.training.fused import loss_gradient

Curvature = Literal["hessian", "gauss-newton"]

LARGEST_MISMATCH = 1e-3
"""Largest difference of the two sums over layers, relative to the largest of a batch, in
float32. Measured: 1e-6 to 1e-5."""


class LinearStackStep:
    """Derivatives of the mean cross-entropy of one batch, at the layers' present parameters.

    Parameters
    ----------
    layers
        The linear layers, in order.
    activations
        The activations between them.
    inputs, labels
        The batch: (N, ...) and (N,).
    batch_size
        Denominator of the mean.
    gate_width
        Half-width h of the bump that replaces the second derivative of a ReLU, which is 0
        elsewhere: ``max(0, 1 - |z|/h) / h``. 0 for none. It smooths the derivative of the
        run, and leaves the training as it is.
    """

    @torch.no_grad()
    def __init__(
        self,
        layers: Sequence[nn.Linear],
        activations: Sequence[Activation],
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        gate_width: float = 0.0,
    ) -> None:
        self._weights = [layer.weight.detach() for layer in layers]
        self._inputs = [inputs.flatten(1)]
        self._slopes: list[Tensor] = []
        curvatures: list[Tensor | None] = []
        for layer, activation in zip(layers, activations, strict=False):
            z_NO = torch.addmm(layer.bias, self._inputs[-1], layer.weight.t())
            self._inputs.append(activation.forward(z_NO, out=torch.empty_like(z_NO)))
            self._slopes.append(activation.slope(z_NO))
            curvatures.append(_curvature(activation, z_NO, gate_width))
        logits_NC = torch.addmm(layers[-1].bias, self._inputs[-1], layers[-1].weight.t())
        self._probabilities = torch.softmax(logits_NC.double(), 1).to(logits_NC.dtype)
        self._scale = 1 / batch_size
        self.precision = torch.finfo(logits_NC.dtype).eps
        """Rounding unit of the parameters."""
        self._deltas = [loss_gradient(logits_NC, labels, batch_size)]
        self._bent: list[Tensor | None] = []  # f''(z_d) s_d; None where f'' = 0
        for weight, slope, curvature in zip(
            reversed(self._weights[1:]), reversed(self._slopes), reversed(curvatures), strict=True
        ):
            sums_NO = self._deltas[0] @ weight
            self._bent.insert(0, None if curvature is None else curvature.mul_(sums_NO))
            self._deltas.insert(0, sums_NO.mul_(slope))

    def gradients(self) -> list[Tensor]:
        """Return the batch's gradient of each parameter: weight and bias of each layer."""
        return [
            gradient
            for delta_NO, inputs_NI in zip(self._deltas, self._inputs, strict=True)
            for gradient in (delta_NO.t() @ inputs_NI, delta_NO.sum(0))
        ]

    def sample_gradients(self, positions: Sequence[int]) -> list[Tensor]:
        """Return the gradients (n, P...) of some samples' own parts of the loss."""
        rows = list(positions)
        return [
            gradient
            for delta_NO, inputs_NI in zip(self._deltas, self._inputs, strict=True)
            for gradient in (
                delta_NO[rows].unsqueeze(2) * inputs_NI[rows].unsqueeze(1),
                delta_NO[rows],
            )
        ]

    @torch.no_grad()
    def products(
        self,
        directions: Sequence[Tensor],
        out: Sequence[Tensor],
        *,
        curvature: Curvature = "hessian",
    ) -> Tensor:
        """Add the Hessian's products to `out`; return the inner products, (K, L, N).

        Parameters
        ----------
        directions
            (K, P...) for each parameter: weight and bias of each layer.
        out
            Tensors like the directions, none of them the same.
        curvature
            The Hessian of the batch's mean loss, or its Gauss-Newton matrix.

        Raises
        ------
        UnsupportedError
            The sum of the inner products over layers differs from the derivative of the samples'
            losses along the direction.
        """
        inner_KLN, tangents, input_tangents = self._forward(directions)
        directions_W = directions[::2]
        p = self._probabilities
        delta_tangent = tangents[-1] - (tangents[-1] * p).sum(2, keepdim=True)
        delta_tangent *= p * self._scale
        is_hessian = curvature == "hessian"
        for place in reversed(range(len(self._weights))):
            inputs_NI, delta_NO = self._inputs[place], self._deltas[place]
            weight_out, bias_out = out[2 * place], out[2 * place + 1]
            weight_out += torch.matmul(delta_tangent.transpose(1, 2), inputs_NI)
            bias_out += delta_tangent.sum(1)
            previous = input_tangents[place]
            if previous is None:
                break
            sums_tangent = delta_tangent @ self._weights[place]
            if is_hessian:
                weight_out += torch.matmul(delta_NO.t(), previous)
                sums_tangent += torch.matmul(delta_NO, directions_W[place])
            delta_tangent = sums_tangent.mul_(self._slopes[place - 1])
            bent = self._bent[place - 1]
            if is_hessian and bent is not None:
                delta_tangent.addcmul_(tangents[place - 1], bent.expand_as(delta_tangent))
        return inner_KLN

    @torch.no_grad()
    def inner(self, directions: Sequence[Tensor]) -> Tensor:
        """Return the inner products of `products` alone, (K, L, N)."""
        return self._forward(directions)[0]

    def _forward(
        self, directions: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Return the inner products (K, L, N), R z_d and R x_d of each layer."""
        tangents: list[Tensor] = []
        input_tangents: list[Tensor | None] = [None]
        inner: list[Tensor] = []
        sizes: Tensor | float = 0.0
        for place, weight in enumerate(self._weights):
            direction_W, direction_b = directions[2 * place : 2 * place + 2]
            tangent = torch.matmul(self._inputs[place], direction_W.transpose(1, 2))
            tangent = tangent + direction_b.unsqueeze(1)
            inner.append((tangent * self._deltas[place]).sum(2))
            sizes = sizes + tangent.norm(dim=2) * self._deltas[place].norm(dim=1)
            previous = input_tangents[place]
            if previous is not None:
                tangent += previous @ weight.t()
            tangents.append(tangent)
            if place < len(self._slopes):
                input_tangents.append(tangent * self._slopes[place])
        inner_KLN = torch.stack(inner, 1)
        self._compare(inner_KLN, sizes, tangents[-1])
        return inner_KLN, tangents, input_tangents

    def _compare(
        self, inner_KLN: Tensor, sizes_KN: Tensor | float, logits_tangent_KNC: Tensor
    ) -> None:
        """Raise UnsupportedError unless the inner products add up to the losses' derivative.

        `sizes_KN` are sums over layers of products of norms, which bound the rounding errors.
        """
        along_KN = (logits_tangent_KNC * self._deltas[-1]).sum(2)
        difference_KN = (inner_KLN.sum(1) - along_KN).abs()
        largest_K = inner_KLN.abs().sum(1).amax(1, keepdim=True)
        rounding_KN = 100 * torch.finfo(inner_KLN.dtype).eps * sizes_KN
        is_wrong = difference_KN > LARGEST_MISMATCH * largest_K + rounding_KN
        if bool(is_wrong.any()):
            relative = (difference_KN / largest_K)[is_wrong].amax()
            raise UnsupportedError(
                expected="inner products that add up to the derivative of the samples' losses",
                got=f"a difference of {float(relative):.1e} of the largest one",
                where="the reverse pass of a stack of linear layers",
                todo="report it with the run's configuration: no result is written",
            )


def _curvature(activation: Activation, z: Tensor, gate_width: float) -> Tensor | None:
    """Return f''(z), with a bump for that of a ReLU; None where it is 0 everywhere."""
    if activation is not ACTIVATIONS["relu"]:
        return activation.curvature(z)
    if not gate_width:
        return None
    return z.abs().div_(-gate_width).add_(1).clamp_min_(0).div_(gate_width)
