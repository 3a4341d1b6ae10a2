"""The derivative of each optimizer's update by the gradient: one rule for each class.

All rules have one shape (`DerivativeRule`): `before(step)` saves values that the step overwrites;
`after(step)` returns D = d(update)/d(gradient) from the optimizer's state after the step. G stands
for the gradient with coupled weight decay, negative under `maximize`; t counts steps from 1.

At its very first step Adam's update is nearly -lr sign(G), which hardly changes with G: D is
-lr eps / (|G| + eps)^2. That is almost 0 except where the samples' gradients cancel to the size of
eps; there it is up to lr / eps. So the first batch of a run under Adam (and under Adagrad started
from 0) has almost no importance in most entries, and in a few of them more than all later batches
together. In float32 the value computed there is the rounding error of two equal terms, about 1e-6
of D at later steps.

Map: the rules `SGDRule`, `AdamRule`, `RMSpropRule`, `AdagradRule`; `DERIVATIVE_RULES` (which rule
belongs to which class); `derivative_rule` (register a rule for an optimizer of your own).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sampimp.importance.parameter_step import DerivativeRule, ParameterStep


class SGDRule(DerivativeRule):
    """update = -lr b with b = momentum b' + (1 - dampening) G; Nesterov: -lr (G + momentum b).

    b' is the momentum buffer before the step. The first step has none and takes b = G, without
    dampening. So D = -lr (1 - dampening), and under Nesterov -lr (1 + momentum (1 - dampening)).
    """

    elementwise = False

    def before(self, step: ParameterStep) -> None:
        """Note whether there is a momentum buffer."""
        step.noted = step.state.get("momentum_buffer") is not None

    def after(self, step: ParameterStep) -> float:
        """Return D, a number."""
        momentum = step.group["momentum"]
        factor = 1 - step.group["dampening"] if momentum and step.noted else 1
        if step.group["nesterov"] and momentum:
            factor = 1 + momentum * factor
        return -step.sign * float(step.group["lr"]) * factor


class AdamRule(DerivativeRule):
    """update = -lr/c1 m / (sqrt(v/c2) + eps), c1 = 1 - beta1^t and c2 = 1 - beta2^t.

    Written as the quotient -(lr sqrt(c2)/c1) m / (sqrt(v) + sqrt(c2) eps), with dm/dG = 1 - beta1
    and dv/dG = 2 (1 - beta2) G. Under amsgrad the largest v so far replaces v, and changes with the
    gradient only where it is v itself.
    """

    def before(self, step: ParameterStep) -> None:
        """Compute G if the weight decay is coupled."""
        if not step.group["decoupled_weight_decay"]:
            _add_weight_decay(step)

    def after(self, step: ParameterStep) -> Tensor:
        """Return D of the quotient."""
        group, state = step.group, step.state
        beta1, beta2 = map(_number, group["betas"])
        count = _number(state["step"])
        root_c2 = (1 - beta2**count) ** 0.5
        half_slope, square = step.gradient, state["exp_avg_sq"]
        if group["amsgrad"]:
            largest = state["max_exp_avg_sq"]
            half_slope, square = torch.where(square == largest, half_slope, 0.0), largest
        return _derive_quotient(
            step,
            state["exp_avg"],
            half_slope,
            square,
            scale=step.sign * _number(group["lr"]) * root_c2 / (1 - beta1**count),
            eps=root_c2 * group["eps"],
            slope=1 - beta1,
            square_slope=step.sign * (1 - beta2),
        )


class RMSpropRule(DerivativeRule):
    """update = -lr (momentum b' + G / (sqrt(w) + eps)), with w = v, or centered w = v - a^2.

    dv/dG = 2 (1 - alpha) G; of the mean gradient a it is 1 - alpha, so that centered
    dw/dG = 2 (1 - alpha) (G - a). Where w = 0 and G is not 0, sqrt(w) has a corner at G = a; the
    rule takes the middle of its two slopes, 0.
    """

    def before(self, step: ParameterStep) -> None:
        """Compute G."""
        _add_weight_decay(step)

    def after(self, step: ParameterStep) -> Tensor:
        """Return D of the quotient."""
        group, state = step.group, step.state
        half_slope, square = step.gradient, state["square_avg"]
        if group["centered"]:
            mean = state["grad_avg"]
            square = square.addcmul(mean, mean, value=-1)
            half_slope = torch.where(square == 0, 0.0, half_slope - step.sign * mean)
        return _derive_quotient(
            step,
            step.gradient,
            half_slope,
            square,
            scale=step.sign * _number(group["lr"]),
            eps=group["eps"],
            slope=1.0,
            square_slope=1 - group["alpha"],
        )


class AdagradRule(DerivativeRule):
    """update = -lr / (1 + (t - 1) lr_decay) G / (sqrt(v) + eps), with dv/dG = 2 G."""

    def before(self, step: ParameterStep) -> None:
        """Compute G."""
        _add_weight_decay(step)

    def after(self, step: ParameterStep) -> Tensor:
        """Return D of the quotient."""
        group, state = step.group, step.state
        decayed = 1 + (_number(state["step"]) - 1) * group["lr_decay"]
        return _derive_quotient(
            step,
            step.gradient,
            step.gradient,
            state["sum"],
            scale=step.sign * _number(group["lr"]) / decayed,
            eps=group["eps"],
            slope=1.0,
            square_slope=1.0,
        )


DERIVATIVE_RULES: dict[type[torch.optim.Optimizer], DerivativeRule] = {
    torch.optim.SGD: SGDRule(),
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamRule(),
    torch.optim.RMSprop: RMSpropRule(),
    torch.optim.Adagrad: AdagradRule(),
}
"""The rule of each class. A subclass needs its own entry, since its update may differ."""

_RuleClass = TypeVar("_RuleClass", bound=DerivativeRule)


def derivative_rule(
    optimizer_class: type[torch.optim.Optimizer],
) -> Callable[[type[_RuleClass]], type[_RuleClass]]:
    """Register a rule for optimizers of exactly this class; it replaces an earlier one.

    The optimizer must update every element from its own gradient alone, and the update must have a
    derivative: the derivative of a sign (Lion) is 0 wherever it exists. The rule implements
    `after`; it overrides `before` if the step overwrites a value that D depends on, and sets
    `elementwise = False` if D is one number per parameter.

    Parameters
    ----------
    optimizer_class
        The class; subclasses are not included.

    Returns
    -------
    callable
        Decorator for a subclass of `DerivativeRule`, which is constructed without arguments.

    Examples
    --------
    An optimizer that bounds each element of the gradient, and its rule:

    >>> from sampimp import derivative_rule
    >>> from sampimp.importance.parameter_step import DerivativeRule
    >>> class Softsign(torch.optim.SGD):
    ...     @torch.no_grad()
    ...     def step(self, closure=None):
    ...         for group in self.param_groups:
    ...             for parameter in group["params"]:
    ...                 gradient = parameter.grad
    ...                 parameter -= group["lr"] * gradient / (1 + gradient.abs())
    >>> @derivative_rule(Softsign)
    ... class SoftsignRule(DerivativeRule):
    ...     def after(self, step):
    ...         return -step.group["lr"] / (1 + step.gradient.abs()) ** 2

    The derivative at one step:

    >>> from sampimp.importance.update import UpdateDerivative
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([0.0, 1.0])
    >>> optimizer = Softsign([weight], lr=0.1)
    >>> derivative = UpdateDerivative(optimizer)
    >>> derivative.before()
    >>> optimizer.step()
    >>> derivative.after()[id(weight)].tensor()
    tensor([-0.1000, -0.0250])
    """

    def register(rule_class: type[_RuleClass]) -> type[_RuleClass]:
        DERIVATIVE_RULES[optimizer_class] = rule_class()
        return rule_class

    return register


def _derive_quotient(
    step: ParameterStep,
    numerator: Tensor,
    half_slope: Tensor,
    square: Tensor,
    *,
    scale: float | Tensor,
    eps: float | Tensor,
    slope: float,
    square_slope: float,
) -> Tensor:
    """Return the derivative of -scale n / (sqrt(w) + eps) by G, in a temporary.

    n, h and w are the tensors `numerator`, `half_slope` and `square`: dn/dG is `slope`, and dw/dG
    is 2 `square_slope` h. With r = sqrt(w) and q = r + eps the derivative is
    -scale/q (slope - square_slope n h / (r q)). Where w = 0 the second term is 0, its limit: n and
    h are 0 there, or too small for w to represent their square.

    Six operations; the square root takes a third of their time.
    """
    result, root, divisor = map(step.temporary, range(3))
    # A number on an accelerator stays there: reading it would stall the stream.
    factor = 1.0 if isinstance(scale, Tensor) else scale
    torch.sqrt(square.to(root.dtype), out=root)
    torch.add(root, eps, out=divisor)
    torch.mul(numerator.to(result.dtype), half_slope, out=result)
    # Added to r q, it prevents 0 / 0 and leaves all larger numbers as they are.
    tiny = root.new_full((), torch.finfo(root.dtype).tiny)
    torch.addcmul(tiny, root, divisor, out=root)
    first = root.new_full((), -factor * slope)
    torch.addcdiv(first, result, root, value=factor * square_slope, out=result)
    result.div_(divisor)
    return result.mul_(scale) if isinstance(scale, Tensor) else result


def _add_weight_decay(step: ParameterStep) -> None:
    """Replace the gradient by the gradient with coupled weight decay.

    The optimizer negates the gradient under `maximize` before it adds the decay; here the sign is
    applied later, so the decay has the opposite sign.
    """
    decay = step.group["weight_decay"]
    if decay:
        step.gradient = torch.add(
            step.gradient, step.parameter, alpha=step.sign * decay, out=step.buffer
        )


def _number(setting: float | Tensor) -> Any:
    """Return a setting or a step count as a number; on an accelerator, as a tensor."""
    if not isinstance(setting, Tensor):
        return setting
    return setting.item() if setting.device.type == "cpu" else _on_device(setting)


def _on_device(setting: Tensor) -> Tensor:
    """Return a scalar tensor on its device, in float64 where the device has it.

    Optimizers keep their counts there in float32, in which 1 - 0.999^t has only four digits during
    the first steps.
    """
    number = setting.squeeze()
    return number if number.device.type == "mps" else number.double()
