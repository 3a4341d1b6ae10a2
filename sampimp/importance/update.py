"""The derivative D of an optimizer's update by the gradient, at each step.

The affectibility of a sample is phi_i = d(theta' - theta)/d v_i: the derivative, with respect to
the sample's weight v_i, of the update that is actually made (Gao & Jojic 2017, section 2). If an
optimizer updates each element from its own gradient alone, phi_i = D * g_i, elementwise: g_i is the
sample's part of the gradient of the batch's loss, and D = d(update_j)/d(gradient_j) is one diagonal
per step, common to all samples, in units of parameter per unit of gradient. Under plain SGD, D is
minus the learning rate.

D is the *immediate* effect of the step: the optimizer's moments before the step are constants, and
a sample's effect on later steps through the moments is not in D (it is part of influence). All
effects within the step are in D: second moments change with the gradient too, so that
Adam's D is not its learning rate over its denominator. Weight decay depends on no sample and has no
term of its own in D; coupled weight decay changes the point at which D is taken.

Map: `UpdateDerivative` (D of each parameter at each step), `Diagonal` (D of one parameter, computed
by blocks of rows). The rules of the optimizers are in `sampimp.importance.optimizers`.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.optimizers import DERIVATIVE_RULES
from sampimp.importance.parameter_step import (
    DerivativeRule,
    ParameterStep,
    Part,
    Workspace,
    all_rows,
    at_least_single,
)


class Diagonal:
    """D of one parameter at one step, computed on request; valid until the next step.

    A block of rows is valid until the next block of any `Diagonal` of the same optimizer.
    """

    def __init__(self, rule: DerivativeRule, step: ParameterStep) -> None:
        self._rule, self._step = rule, step
        self._square: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return D, of the parameter's shape."""
        blocks = ((rows, values) for rows, _, values in self._blocks())
        return self._collect(blocks, torch.empty_like(self._step.buffer))

    def square(self) -> Tensor:
        """Return D^2, of the parameter's shape; read-only."""
        if self._square is None:
            step = self._step
            is_free = step.gradient is not step.buffer  # else it holds G with weight decay
            out = step.buffer if is_free else torch.empty_like(step.buffer)
            self._square = self._collect(self.squares(), out)
        return self._square

    def squares(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield (index of the rows, D^2 of these rows) for each block of the parameter."""
        if self._square is not None:
            yield all_rows(self._square), self._square
        else:
            for rows, step, values in self._blocks():
                yield rows, torch.mul(values, values, out=step.temporary(1))

    def _blocks(self) -> Iterator[tuple[Part, ParameterStep, Tensor]]:
        like = self._step.parameter
        for rows, step in self._step.parts():
            values = torch.as_tensor(
                self._rule.after(step), dtype=at_least_single(like), device=like.device
            )
            yield rows, step, values.expand(step.parameter.shape)

    @staticmethod
    def _collect(blocks: Iterable[tuple[Part, Tensor]], out: Tensor) -> Tensor:
        for rows, values in blocks:
            out[rows] = values
        return out


Derivative = float | Diagonal
"""D of a parameter: one number for the SGD family, else one for each element."""


class UpdateDerivative:
    """D of each parameter at each step of an optimizer.

    Parameters
    ----------
    optimizer
        An instance of a class that has a rule, in its for-loop, foreach or fused implementation.
        It is only read.

    Attributes
    ----------
    elementwise : bool
        Whether D differs between the elements of a parameter.

    Raises
    ------
    UnsupportedError
        On construction and in `before`: the class has no rule, `differentiable` is set, a parameter
        is complex, its gradient is sparse although D differs between elements, or a GradScaler
        works inside a fused step. In `after`: the gradients are not those of `before`.

    References
    ----------
    Gao & Jojic (2017), section 2: the parameter affectibility, there under SGD.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, dampening=0.5)
    >>> derivative = UpdateDerivative(optimizer)
    >>> for _ in range(2):
    ...     weight.grad = torch.ones(2)
    ...     derivative.before()
    ...     optimizer.step()
    ...     derivative.after()[id(weight)]
    -0.1
    -0.05
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._rule = self._find_rule()
        self.elementwise = self._rule.elementwise
        self._workspace = Workspace()
        self._steps: dict[Tensor, ParameterStep] = {}
        self._current: list[tuple[ParameterStep, Tensor]] = []  # with the parameter's gradient
        self._check_settings()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._add(parameter)

    @torch.no_grad()
    def before(self) -> None:
        """Save values that the step overwrites; to be called in the optimizer's step pre-hook."""
        self._check_settings()
        self.forget()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                self._check_gradient(gradient)
                step = self._steps.get(parameter) or self._add(parameter)
                # `get`, since indexing would create the state of a parameter that has none.
                step.group, step.state = group, self.optimizer.state.get(parameter, {})
                step.gradient, step.noted = gradient, None
                self._rule.before(step)
                self._current.append((step, gradient))

    @torch.no_grad()
    def after(self) -> dict[int, Derivative]:
        """Return D of every parameter that has a gradient; for the optimizer's step post-hook.

        Returns
        -------
        dict
            By the parameter's `id`: d(update)/d(gradient), in units of parameter per unit of
            gradient; a number, or a `Diagonal` that is valid until a gradient or the optimizer
            changes, or until `forget`.

        Raises
        ------
        UnsupportedError
            A gradient is another tensor than in `before`.
        """
        derivatives: dict[int, Derivative] = {}
        for step, gradient in self._current:
            if step.parameter.grad is not gradient:
                raise UnsupportedError(
                    expected="the gradients from before the step",
                    got="other gradients",
                    where=f"{type(self.optimizer).__name__}.step",
                    todo="replace no parameter.grad during optimizer.step()",
                )
            step.state = self.optimizer.state.get(step.parameter, {})
            derivatives[id(step.parameter)] = (
                Diagonal(self._rule, step) if self.elementwise else float(self._rule.after(step))
            )
        return derivatives

    def forget(self) -> None:
        """Drop references to the step, whose gradients would otherwise outlive `zero_grad`."""
        for step, _ in self._current:
            step.gradient, step.state, step.noted = step.parameter, {}, None
        self._current = []

    def _find_rule(self) -> DerivativeRule:
        kind = type(self.optimizer)
        inner = getattr(self.optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            raise UnsupportedError(
                expected="the optimizer that makes the update",
                got=f"{kind.__module__}.{kind.__qualname__}, around {type(inner).__name__}",
                where="the optimizer passed to the recorder",
                todo="pass the inner optimizer to the recorder: optimizer.optimizer",
            )
        rule = DERIVATIVE_RULES.get(kind)  # of exactly this class: a subclass may differ
        if rule is None:
            known = ", ".join(sorted(known_class.__name__ for known_class in DERIVATIVE_RULES))
            raise UnsupportedError(
                expected=f"an optimizer of exactly one of the classes {known}",
                got=f"{kind.__module__}.{kind.__qualname__}",
                where="the optimizer passed to the recorder",
                todo="register the derivative of its update by its gradient, as the example in "
                "help(sampimp.derivative_rule) shows, or train with one of these classes",
            )
        return rule

    def _add(self, parameter: Tensor) -> ParameterStep:
        if parameter.is_complex():
            raise UnsupportedError(
                expected="real parameters",
                got=f"a complex parameter of shape {tuple(parameter.shape)}",
                where=type(self.optimizer).__name__,
                todo="hold its real and imaginary parts as two parameters",
            )
        step = self._steps[parameter] = ParameterStep(parameter, self._workspace)
        return step

    def _check_settings(self) -> None:
        """Raise UnsupportedError for a setting under which the rules do not hold."""
        for number, group in enumerate(self.optimizer.param_groups):
            if group.get("differentiable"):
                raise UnsupportedError(
                    expected="an optimizer with differentiable=False",
                    got="differentiable=True",
                    where=f"{type(self.optimizer).__name__}, parameter group {number}",
                    todo="leave the option out: with it, an update is a function of earlier steps",
                )
        scaler = ("grad_scale", "found_inf")
        if any(getattr(self.optimizer, name, None) is not None for name in scaler):
            raise UnsupportedError(
                expected="gradients that are unscaled before the step",
                got="a GradScaler that works inside a fused step",
                where=f"{type(self.optimizer).__name__}.step",
                todo="construct the optimizer with fused=False",
            )

    def _check_gradient(self, gradient: Tensor) -> None:
        if gradient.layout != torch.strided and self.elementwise:
            raise UnsupportedError(
                expected="dense gradients, since D differs between the elements of a parameter",
                got=f"a gradient of shape {tuple(gradient.shape)} in layout {gradient.layout}",
                where=type(self.optimizer).__name__,
                todo="construct the embedding with sparse=False",
            )
