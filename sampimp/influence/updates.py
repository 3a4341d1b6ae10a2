"""An optimizer's update, linearized: adjoints go backward through it, tangents forward.

One update maps (theta, s, G), the parameters, the optimizer's state and the batch's gradient, to
(theta', s'). Its derivative is applied to whole blocks of K vectors:

    pull    (lambda', sigma')  ->  gamma = dT/dG, sigma = dT/ds, lambda = dT/dtheta at fixed G
    push    (dtheta, ds, dG)   ->  dtheta', ds'

for a target T and its adjoints lambda' = dT/dtheta', sigma' = dT/ds'. The gradient depends on theta
as well: the caller adds the Hessian's product H gamma to lambda, and sets dG = H dtheta + dG/dv.
`pull` is the transpose of `push`; a test compares both with differences of PyTorch's optimizers.

G' = sign G + weight decay theta is the gradient as the optimizer uses it; theta is added only where
the decay is coupled. t counts steps from 1; c1 = 1 - beta1^t, c2 = 1 - beta2^t.

Map: `UpdatePoint` (where an update is linearized), `LinearizedUpdate` (base class of the rules),
`SGDUpdate`, `AdamUpdate`, `RMSpropUpdate`, `AdagradUpdate`, `LINEARIZED_UPDATES` (the rule of each
class), `linearized_update` (the rule of an optimizer), `clip_adjoint` (clipping by norm).

Shape suffixes: K directions (targets or samples), P... the shape of the parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.per_sample import as_matrix

PARAMETER = "parameter"
"""Key of the parameter's own adjoint or tangent, beside those of the optimizer's state."""

Block = dict[str, Tensor]
"""K adjoints or tangents of one parameter, (K, P...) each, and of its state, by name."""


@dataclass(frozen=True)
class UpdatePoint:
    """One parameter at one update."""

    parameter: Tensor
    """Its values before the update, (P...)."""
    gradient: Tensor
    """The batch's gradient G, (P...)."""
    state: Mapping[str, Any]
    """The optimizer's state after the update."""
    group: Mapping[str, Any]
    """Settings of the parameter's group."""
    is_first: bool
    """Whether this is the parameter's first update."""
    least_eps: float = 0.0
    """Adam, RMSprop and Adagrad are linearized with eps of at least this value (smoothing)."""

    @property
    def sign(self) -> int:
        """-1 if the optimizer maximizes, else 1."""
        return -1 if self.group["maximize"] else 1

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.group["lr"])

    @property
    def decay(self) -> float:
        """Weight decay that is added to the gradient."""
        is_decoupled = self.group.get("decoupled_weight_decay", False)
        return 0.0 if is_decoupled else float(self.group["weight_decay"])

    @property
    def used_gradient(self) -> Tensor:
        """G', the gradient as the optimizer uses it."""
        return torch.add(self.sign * self.gradient, self.parameter, alpha=self.decay)

    def inverse_root(self, square: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return q = 1 / (sqrt(w / scale) + eps) and dq/dw for w = `square`.

        Where w = 0, dq/dw is set to 0: there the gradient has always been 0 (pixels that are never
        on), so that the value has no effect, but NaN would.
        """
        root = (square / scale).clamp_min(0).sqrt()
        inverse = 1 / (root + max(self.least_eps, float(self.group["eps"])))
        slope = torch.where(root > 0, -inverse.square() / (2 * scale * root), 0.0)
        return inverse, slope


class LinearizedUpdate:
    """The derivative of one class of optimizers' update; to be subclassed."""

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors that the update reads, under these settings."""
        raise NotImplementedError

    def reads(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names in the optimizer's state whose values `pull` and `push` read."""
        return ("step", *self.states(group))

    def pull(self, point: UpdatePoint, adjoints: Block) -> Tensor:
        """Take adjoints after the update to those before it, in place; return gamma (K, P...).

        `adjoints["parameter"]` lacks H gamma afterwards.
        """
        raise NotImplementedError

    def push(self, point: UpdatePoint, tangents: Block, gradient: Tensor) -> None:
        """Take tangents before the update to those after it, in place.

        Parameters
        ----------
        point
            Where the update is linearized.
        tangents
            Of the parameter and its state.
        gradient
            Tangents of the batch's gradient, (K, P...); overwritten.
        """
        raise NotImplementedError


class SGDUpdate(LinearizedUpdate):
    """theta' = theta - lr d, d = b' = momentum b + (1 - dampening) G'; nesterov: G' + momentum b'.

    The first update has no buffer b and takes b' = G', without dampening.
    """

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """See `LinearizedUpdate`."""
        return ("momentum_buffer",) if group["momentum"] else ()

    def reads(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """See `LinearizedUpdate`; the update is linear."""
        return ()

    def _factors(self, point: UpdatePoint) -> tuple[float, float, float]:
        """Return the factor of b and of G' in b', and the factor of b' in d."""
        momentum, nesterov = float(point.group["momentum"]), point.group["nesterov"]
        kept, added = (0.0, 1.0) if point.is_first else (momentum, 1 - point.group["dampening"])
        return kept, float(added), momentum if nesterov else 1.0

    def pull(self, point: UpdatePoint, adjoints: Block) -> Tensor:
        """See `LinearizedUpdate`."""
        adjoint = adjoints[PARAMETER]
        if not point.group["momentum"]:
            gradient = adjoint * -point.rate
        else:
            kept, added, used = self._factors(point)
            buffer = adjoints["momentum_buffer"].add_(adjoint, alpha=-point.rate * used)
            gradient = buffer * added
            if point.group["nesterov"]:
                gradient.add_(adjoint, alpha=-point.rate)
            buffer.mul_(kept)
        if point.decay:
            adjoint.add_(gradient, alpha=point.decay)
        return gradient.mul_(point.sign)

    def push(self, point: UpdatePoint, tangents: Block, gradient: Tensor) -> None:
        """See `LinearizedUpdate`."""
        tangent = tangents[PARAMETER]
        used_gradient = gradient.mul_(point.sign).add_(tangent, alpha=point.decay)
        if not point.group["momentum"]:
            tangent.add_(used_gradient, alpha=-point.rate)
            return
        kept, added, used = self._factors(point)
        buffer = tangents["momentum_buffer"].mul_(kept).add_(used_gradient, alpha=added)
        if point.group["nesterov"]:
            tangent.add_(used_gradient, alpha=-point.rate)
        tangent.add_(buffer, alpha=-point.rate * used)


class AdamUpdate(LinearizedUpdate):
    """theta' = (1 - lr decay) theta - lr/c1 m' / (sqrt(v'/c2) + eps), decay only if decoupled.

    m' = beta1 m + (1 - beta1) G', v' = beta2 v + (1 - beta2) G'^2. Under amsgrad x' = max(x, v')
    replaces v' in the denominator.
    """

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """See `LinearizedUpdate`."""
        largest = ("max_exp_avg_sq",) if group["amsgrad"] else ()
        return ("exp_avg", "exp_avg_sq", *largest)

    def _slopes(self, point: UpdatePoint) -> tuple[Tensor, Tensor]:
        """Return d theta'/dm' and d theta'/dw, with w the square in the denominator, (P...)."""
        beta1, beta2 = map(float, point.group["betas"])
        count = float(point.state["step"])
        square = point.state["max_exp_avg_sq" if point.group["amsgrad"] else "exp_avg_sq"]
        inverse, slope = point.inverse_root(square, 1 - beta2**count)
        rate = -point.rate / (1 - beta1**count)
        return rate * inverse, rate * point.state["exp_avg"] * slope

    def _kept(self, point: UpdatePoint) -> float:
        """Return the factor of theta in theta'."""
        is_decoupled = point.group["decoupled_weight_decay"]
        return 1 - point.rate * float(point.group["weight_decay"]) if is_decoupled else 1.0

    def _is_new_largest(self, point: UpdatePoint) -> Tensor:
        return point.state["exp_avg_sq"] == point.state["max_exp_avg_sq"]

    def pull(self, point: UpdatePoint, adjoints: Block) -> Tensor:
        """See `LinearizedUpdate`."""
        beta1, beta2 = map(float, point.group["betas"])
        adjoint, mean, square = (adjoints[name] for name in (PARAMETER, "exp_avg", "exp_avg_sq"))
        mean_slope, square_slope = self._slopes(point)
        mean.addcmul_(adjoint, mean_slope)
        if point.group["amsgrad"]:
            largest = adjoints["max_exp_avg_sq"].addcmul_(adjoint, square_slope)
            is_new = self._is_new_largest(point)
            square.add_(largest.where(is_new, 0.0))
            largest.masked_fill_(is_new, 0.0)
        else:
            square.addcmul_(adjoint, square_slope)
        gradient = mean * (1 - beta1)
        gradient.addcmul_(square, 2 * (1 - beta2) * point.used_gradient)
        mean.mul_(beta1)
        square.mul_(beta2)
        adjoint.mul_(self._kept(point))
        if point.decay:
            adjoint.add_(gradient, alpha=point.decay)
        return gradient.mul_(point.sign)

    def push(self, point: UpdatePoint, tangents: Block, gradient: Tensor) -> None:
        """See `LinearizedUpdate`."""
        beta1, beta2 = map(float, point.group["betas"])
        tangent, mean, square = (tangents[name] for name in (PARAMETER, "exp_avg", "exp_avg_sq"))
        mean_slope, square_slope = self._slopes(point)
        used_gradient = gradient.mul_(point.sign).add_(tangent, alpha=point.decay)
        mean.mul_(beta1).add_(used_gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(used_gradient, 2 * (1 - beta2) * point.used_gradient)
        if point.group["amsgrad"]:
            largest = tangents["max_exp_avg_sq"]
            square = largest.copy_(torch.where(self._is_new_largest(point), square, largest))
        tangent.mul_(self._kept(point))
        tangent.addcmul_(mean, mean_slope).addcmul_(square, square_slope)


class RMSpropUpdate(LinearizedUpdate):
    """theta' = theta - lr q, with momentum - lr (momentum b + q): q = G' / (sqrt(w) + eps).

    w = v' = alpha v + (1 - alpha) G'^2; centered: w = v' - a'^2, a' = alpha a + (1 - alpha) G'.
    """

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """See `LinearizedUpdate`."""
        momentum = ("momentum_buffer",) if group["momentum"] else ()
        mean = ("grad_avg",) if group["centered"] else ()
        return ("square_avg", *mean, *momentum)

    def _slopes(self, point: UpdatePoint) -> tuple[Tensor, Tensor]:
        """Return dq/dG' at fixed w, and dq/dw."""
        square = point.state["square_avg"]
        if point.group["centered"]:
            square = square.addcmul(point.state["grad_avg"], point.state["grad_avg"], value=-1)
        inverse, slope = point.inverse_root(square)
        return inverse, slope * point.used_gradient

    def pull(self, point: UpdatePoint, adjoints: Block) -> Tensor:
        """See `LinearizedUpdate`."""
        alpha, momentum = float(point.group["alpha"]), float(point.group["momentum"])
        adjoint, square = adjoints[PARAMETER], adjoints["square_avg"]
        quotient = adjoint * -point.rate
        if momentum:
            buffer = adjoints["momentum_buffer"]
            quotient.add_(buffer)
            buffer.copy_(quotient).mul_(momentum)
        slope, square_slope = self._slopes(point)
        square.addcmul_(quotient, square_slope)
        gradient = quotient * slope
        gradient.addcmul_(square, 2 * (1 - alpha) * point.used_gradient)
        if point.group["centered"]:
            mean = adjoints["grad_avg"]
            mean.addcmul_(quotient, -2 * square_slope * point.state["grad_avg"])
            gradient.add_(mean, alpha=1 - alpha)
            mean.mul_(alpha)
        square.mul_(alpha)
        if point.decay:
            adjoint.add_(gradient, alpha=point.decay)
        return gradient.mul_(point.sign)

    def push(self, point: UpdatePoint, tangents: Block, gradient: Tensor) -> None:
        """See `LinearizedUpdate`."""
        alpha, momentum = float(point.group["alpha"]), float(point.group["momentum"])
        tangent, square = tangents[PARAMETER], tangents["square_avg"]
        used_gradient = gradient.mul_(point.sign).add_(tangent, alpha=point.decay)
        slope, square_slope = self._slopes(point)
        square.mul_(alpha).addcmul_(used_gradient, 2 * (1 - alpha) * point.used_gradient)
        quotient = (used_gradient * slope).addcmul_(square, square_slope)
        if point.group["centered"]:
            mean = tangents["grad_avg"].mul_(alpha).add_(used_gradient, alpha=1 - alpha)
            quotient.addcmul_(mean, -2 * square_slope * point.state["grad_avg"])
        if momentum:
            quotient = tangents["momentum_buffer"].mul_(momentum).add_(quotient)
        tangent.add_(quotient, alpha=-point.rate)


class AdagradUpdate(LinearizedUpdate):
    """theta' = theta - lr / (1 + (t - 1) lr_decay) G' / (sqrt(u') + eps) with u' = u + G'^2."""

    def states(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """See `LinearizedUpdate`."""
        return ("sum",)

    def _slopes(self, point: UpdatePoint) -> tuple[Tensor, Tensor]:
        """Return d theta'/dG' at fixed u', and d theta'/du'."""
        inverse, slope = point.inverse_root(point.state["sum"])
        rate = -point.rate / (1 + (float(point.state["step"]) - 1) * point.group["lr_decay"])
        return rate * inverse, rate * slope * point.used_gradient

    def pull(self, point: UpdatePoint, adjoints: Block) -> Tensor:
        """See `LinearizedUpdate`."""
        slope, square_slope = self._slopes(point)
        adjoint = adjoints[PARAMETER]
        square = adjoints["sum"].addcmul_(adjoint, square_slope)
        gradient = (adjoint * slope).addcmul_(square, 2 * point.used_gradient)
        if point.decay:
            adjoint.add_(gradient, alpha=point.decay)
        return gradient.mul_(point.sign)

    def push(self, point: UpdatePoint, tangents: Block, gradient: Tensor) -> None:
        """See `LinearizedUpdate`."""
        slope, square_slope = self._slopes(point)
        tangent = tangents[PARAMETER]
        used_gradient = gradient.mul_(point.sign).add_(tangent, alpha=point.decay)
        square = tangents["sum"].addcmul_(used_gradient, 2 * point.used_gradient)
        tangent.addcmul_(used_gradient, slope).addcmul_(square, square_slope)


LINEARIZED_UPDATES: dict[type[torch.optim.Optimizer], LinearizedUpdate] = {
    torch.optim.SGD: SGDUpdate(),
    torch.optim.Adam: AdamUpdate(),
    torch.optim.AdamW: AdamUpdate(),
    torch.optim.RMSprop: RMSpropUpdate(),
    torch.optim.Adagrad: AdagradUpdate(),
}
"""The rule of each class. A subclass needs its own entry, since its update may differ."""


def linearized_update(optimizer: torch.optim.Optimizer) -> LinearizedUpdate:
    """Return the rule of an optimizer.

    Raises
    ------
    UnsupportedError
        Its class has none.
    """
    rule = LINEARIZED_UPDATES.get(type(optimizer))
    if rule is None:
        known = ", ".join(sorted(kind.__name__ for kind in LINEARIZED_UPDATES))
        raise UnsupportedError(
            expected=f"an optimizer of exactly one of the classes {known}",
            got=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            where="the optimizer of the reverse pass",
            todo="add a LinearizedUpdate to sampimp.influence.updates.LINEARIZED_UPDATES, or use "
            "the in-step importance, for which sampimp.derivative_rule is enough",
        )
    return rule


def clip_adjoint(
    adjoints: Sequence[Tensor], gradients: Sequence[Tensor], factor: float, norm: float, eps: float
) -> None:
    """Take adjoints of a clipped gradient to those of the gradient, in place.

    `torch.nn.utils.clip_grad_norm_` multiplies all gradients by c = max_norm / (n + eps) if that is
    below 1, with n the norm of G: gamma = c gamma' - c / (n + eps) <gamma', G> G / n. The map is
    symmetric, so it takes tangents of the gradient to those of the clipped one as well.

    Parameters
    ----------
    adjoints
        gamma' of each parameter, (K, P...).
    gradients
        Gradient of each parameter before clipping, (P...).
    factor
        c.
    norm
        n, over all parameters.
    eps
        1e-6 in PyTorch.
    """
    products_K = sum(
        as_matrix(adjoint) @ gradient.flatten()
        for adjoint, gradient in zip(adjoints, gradients, strict=True)
    )
    assert isinstance(products_K, Tensor)
    scale_K = products_K * (-factor / ((norm + eps) * norm))
    for adjoint, gradient in zip(adjoints, gradients, strict=True):
        shape = (-1, *[1] * gradient.dim())
        adjoint.mul_(factor).addcmul_(gradient.expand_as(adjoint), scale_K.view(shape))
