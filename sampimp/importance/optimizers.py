"""The derivative of the update that an optimizer makes, with respect to the gradient.

The affectibility of a sample is phi_i = d(theta' - theta)/d v_i, the derivative of the update that
is actually made with respect to the sample's weight v_i (Gao & Jojic 2017, section 2). An optimizer
that acts on each element of the gradient by itself makes it phi_i = D * g_i, elementwise: g_i is
the sample's part of the gradient of the batch's loss, and D = d(update_j)/d(gradient_j) is one
diagonal per step, common to all samples, in units of parameter per unit of gradient. Under plain
SGD D is minus the learning rate.

D is the *immediate* effect of the step: the moments that an optimizer carries are taken as they are
before it, and what the sample leaves in them for later steps is not in D (that belongs to
influence). Within the step everything counts: second moments move with the gradient too, so that
Adam's D is not its learning rate over its denominator. Weight decay depends on no sample and has
no part of its own in D; where it is coupled, it moves the point at which D is taken.

At its very first step Adam's update is nearly -lr sign(g), which hardly moves with g: D is
-lr eps / (|g| + eps)^2, almost 0, but where the samples' gradients cancel to the size of eps: there
it is up to lr / eps. So the first batch of a run under Adam (and under Adagrad that starts from 0)
has almost no importance in most entries, and in a few of them more than all later ones together.
In float32 what is computed there is the rounding of two equal terms, about 1e-6 of D at later
steps.

Map: `UpdateDerivative` (D of each parameter at each step), `Diagonal` (one of them, some rows at a
time), `derivative_rule` and `DerivativeRule` (how one kind of optimizer gets its D, and how to add
one), `ParameterStep` (what a rule sees), then the rules, on `_derive_quotient`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError

BLOCK_ON_CPU, BLOCK_ELSEWHERE = 2**18, 2**24
"""Elements of a parameter that are worked on at once.

On the CPU 2^18 was the fastest for the paper's network under AdamW (2^16: 7 % of the step more,
2^14: 30 %, in calls); elsewhere launches count, and the number is an arbitrary bound (64 MB).
"""

Part = slice | EllipsisType
"""Some rows of a parameter, or all of one that has no axis."""


class ParameterStep:
    """What a rule sees of one parameter at one step.

    Attributes
    ----------
    parameter
        The parameter; its value is the one before the step, then the one after it.
    group
        The optimizer's settings for it.
    state
        The optimizer's state of it, before the step, then after it; to be read only.
    gradient
        The batch's gradient. A rule may put in its place, before the step, what the optimizer
        makes of it.
    noted
        Whatever the rule wants to know after the step; None at the start of each. One tensor of the
        parameter's shape is given by rows, as the parameter is; anything else whole.
    """

    def __init__(self, parameter: Tensor, room: "Room") -> None:
        self.parameter = parameter
        self.group: dict[str, Any] = {}
        self.state: Mapping[str, Any] = {}
        self.gradient = parameter
        self.noted: Any = None
        self._buffer: Tensor | None = None
        self._room = room

    @property
    def sign(self) -> int:
        """-1 where the optimizer ascends, else 1."""
        return -1 if self.group["maximize"] else 1

    @property
    def buffer(self) -> Tensor:
        """A tensor of the parameter's shape to work in, kept from step to step."""
        like, kept = self.parameter, self._buffer
        if kept is None or kept.device != like.device or kept.shape != like.shape:
            kept = torch.empty_like(like, dtype=_wide(like), requires_grad=False)
            self._buffer = kept
        return kept

    def temporary(self, number: int) -> Tensor:
        """Return a tensor of the parameter's shape to work in, until the next part asks for it."""
        return self._room.like(self.parameter, number)

    def parts(self) -> Iterator[tuple[Part, "ParameterStep"]]:
        """Yield the step of a few rows of the parameter at a time, with which rows they are."""
        whole = self.parameter
        limit = BLOCK_ON_CPU if whole.device.type == "cpu" else BLOCK_ELSEWHERE
        if whole.numel() <= limit:
            yield _all_rows(whole), self
            return
        count = math.ceil(limit * len(whole) / whole.numel())
        for start in range(0, len(whole), count):
            rows = slice(start, start + count)
            part = ParameterStep(whole[rows], self._room)
            part.group = self.group
            part.state = {name: self._some(value, rows) for name, value in self.state.items()}
            part.gradient, part.noted = self.gradient[rows], self._some(self.noted, rows)
            yield rows, part

    def _some(self, value: Any, rows: slice) -> Any:
        own = isinstance(value, Tensor) and value.shape == self.parameter.shape
        return value[rows] if own else value


class Room:
    """Memory for what is worked out of one part after the other, which takes fresh pages else."""

    def __init__(self) -> None:
        self._flat: dict[int, Tensor] = {}

    def like(self, values: Tensor, number: int) -> Tensor:
        """Return room of the shape of values; what is in it is lost with the next call."""
        dtype, flat = _wide(values), self._flat.get(number)
        if (
            flat is None
            or len(flat) < values.numel()
            or (flat.dtype, flat.device) != (dtype, values.device)
        ):
            flat = self._flat[number] = values.new_empty(values.numel(), dtype=dtype)
        return flat[: values.numel()].view(values.shape)


class DerivativeRule:
    """How the update of one kind of optimizer moves with the gradient; to be subclassed."""

    elementwise: bool = True
    """Whether D differs between the elements of a parameter."""

    def before(self, step: ParameterStep) -> None:
        """Note what will be gone after the step; by default nothing."""

    def after(self, step: ParameterStep) -> float | Tensor:
        """Return D from the optimizer's state after the step.

        A number, or a tensor of the parameter's shape. Of a large parameter it is asked for some
        rows at a time.
        """
        raise NotImplementedError


class Diagonal:
    """D of a parameter at a step, worked out when it is asked for; valid until the next step.

    What comes by parts is valid until the next part of any `Diagonal` of the optimizer.
    """

    def __init__(self, rule: DerivativeRule, step: ParameterStep) -> None:
        self._rule, self._step = rule, step
        self._square: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return D, of the parameter's shape."""
        found = ((rows, part) for rows, _, part in self._parts())
        return self._collect(found, torch.empty_like(self._step.buffer))

    def square(self) -> Tensor:
        """Return D^2, of the parameter's shape; not to be changed."""
        if self._square is None:
            step = self._step
            is_free = step.gradient is not step.buffer  # where weight decay is in the gradient
            out = step.buffer if is_free else torch.empty_like(step.buffer)
            self._square = self._collect(self.squares(), out)
        return self._square

    def squares(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield D^2 of some rows at a time, with which rows they are."""
        if self._square is not None:
            yield _all_rows(self._square), self._square
        else:
            for rows, step, part in self._parts():
                yield rows, torch.mul(part, part, out=step.temporary(1))

    def _parts(self) -> Iterator[tuple[Part, ParameterStep, Tensor]]:
        like = self._step.parameter
        for rows, step in self._step.parts():
            part = torch.as_tensor(self._rule.after(step), dtype=_wide(like), device=like.device)
            yield rows, step, part.expand(step.parameter.shape)

    @staticmethod
    def _collect(parts: Iterable[tuple[Part, Tensor]], out: Tensor) -> Tensor:
        for rows, part in parts:
            out[rows] = part
        return out


Derivative = float | Diagonal
"""One number for the SGD family; else one for each element of the parameter."""

_RULES: dict[type[torch.optim.Optimizer], DerivativeRule] = {}

Rule = TypeVar("Rule", bound=DerivativeRule)


def derivative_rule(
    optimizer_class: type[torch.optim.Optimizer],
) -> Callable[[type[Rule]], type[Rule]]:
    """Register a rule for optimizers of exactly this class, in place of an earlier one.

    The optimizer must act on every element of the gradient by itself, and its update must have a
    derivative: that of a sign (Lion) is 0 wherever it exists.

    Examples
    --------
    An optimizer that bounds each element of the gradient, and its rule:

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

    What `UpdateDerivative` makes of it:

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([0.0, 1.0])
    >>> optimizer = Softsign([weight], lr=0.1)
    >>> derivative = UpdateDerivative(optimizer)
    >>> derivative.before()
    >>> optimizer.step()
    >>> derivative.after()[id(weight)].tensor()
    tensor([-0.1000, -0.0250])
    """

    def register(rule_class: type[Rule]) -> type[Rule]:
        _RULES[optimizer_class] = rule_class()
        return rule_class

    return register


class UpdateDerivative:
    """D of each parameter at each step of an optimizer.

    Parameters
    ----------
    optimizer
        Of a class that has a rule; in its for-loop, foreach or fused form. It is only read.

    Attributes
    ----------
    elementwise : bool
        Whether D differs between the elements of a parameter.

    Raises
    ------
    UnsupportedError
        On construction and in `before`: the class has no rule, `differentiable` is set, a parameter
        is complex, its gradient sparse where D differs between elements, or a GradScaler works
        inside a fused step. In `after`:
        the gradients are not those of `before`.

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
        self._room = Room()
        self._steps: dict[Tensor, ParameterStep] = {}
        self._current: list[tuple[ParameterStep, Tensor]] = []  # with its gradient
        self._check_settings()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._add(parameter)

    @torch.no_grad()
    def before(self) -> None:
        """Note what is gone after the step; for the optimizer's step pre-hook."""
        self._check_settings()
        self.forget()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                self._check_gradient(gradient)
                step = self._steps.get(parameter) or self._add(parameter)
                # By get: reading the state of a parameter that has none would make it one.
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
        """
        derivatives: dict[int, Derivative] = {}
        for step, gradient in self._current:
            if step.parameter.grad is not gradient:
                raise UnsupportedError(
                    expected="the gradients from before the step",
                    got="others",
                    where=f"{type(self.optimizer).__name__}.step",
                    todo="let nothing put other gradients in their place during optimizer.step()",
                )
            step.state = self.optimizer.state.get(step.parameter, {})
            derivatives[id(step.parameter)] = (
                Diagonal(self._rule, step) if self.elementwise else float(self._rule.after(step))
            )
        return derivatives

    def forget(self) -> None:
        """Let go of the step, whose gradients would outlive the next `zero_grad` else."""
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
                where="the optimizer given to the recorder",
                todo="give the recorder the one inside: optimizer.optimizer",
            )
        rule = _RULES.get(kind)  # of exactly this class: a subclass may make another update
        if rule is None:
            raise UnsupportedError(
                expected="an optimizer of exactly one of the classes "
                + ", ".join(sorted(known.__name__ for known in _RULES)),
                got=f"{kind.__module__}.{kind.__qualname__}",
                where="the optimizer given to the recorder",
                todo="register the derivative of its update by its gradient, as the example in "
                "help(sampimp.importance.optimizers.derivative_rule) does, or train "
                "with one of these",
            )
        return rule

    def _add(self, parameter: Tensor) -> ParameterStep:
        if parameter.is_complex():
            raise UnsupportedError(
                expected="real parameters",
                got=f"a complex one of shape {tuple(parameter.shape)}",
                where=type(self.optimizer).__name__,
                todo="hold its real and imaginary parts as two parameters",
            )
        step = self._steps[parameter] = ParameterStep(parameter, self._room)
        return step

    def _check_settings(self) -> None:
        """Raise UnsupportedError for a setting under which the rules do not hold."""
        for number, group in enumerate(self.optimizer.param_groups):
            if group.get("differentiable"):
                raise UnsupportedError(
                    expected="an optimizer with differentiable=False",
                    got="differentiable=True",
                    where=f"{type(self.optimizer).__name__}, parameter group {number}",
                    todo="leave it out: there an update is a function of earlier steps",
                )
        if any(getattr(self.optimizer, at, None) is not None for at in ("grad_scale", "found_inf")):
            raise UnsupportedError(
                expected="gradients that are unscaled before the step",
                got="a GradScaler that works inside a fused step",
                where=f"{type(self.optimizer).__name__}.step",
                todo="make the optimizer with fused=False",
            )

    def _check_gradient(self, gradient: Tensor) -> None:
        if gradient.layout != torch.strided and self.elementwise:
            raise UnsupportedError(
                expected="dense gradients, where each entry's update has a derivative of its own",
                got=f"one of shape {tuple(gradient.shape)} in layout {gradient.layout}",
                where=type(self.optimizer).__name__,
                todo="make the embedding with sparse=False",
            )


@derivative_rule(torch.optim.SGD)
class SGDRule(DerivativeRule):
    """update = -lr b with b = momentum b' + (1 - dampening) G; Nesterov: -lr (G + momentum b).

    G is the gradient with weight decay, negative under `maximize`. The first step has no b' and
    takes b = G, without dampening.
    """

    elementwise = False

    def before(self, step: ParameterStep) -> None:
        """Note whether there is a b'."""
        step.noted = step.state.get("momentum_buffer") is not None

    def after(self, step: ParameterStep) -> float:
        """Return -lr (1 - dampening), under Nesterov -lr (1 + momentum (1 - dampening))."""
        momentum = step.group["momentum"]
        factor = 1 - step.group["dampening"] if momentum and step.noted else 1
        if step.group["nesterov"] and momentum:
            factor = 1 + momentum * factor
        return -step.sign * float(step.group["lr"]) * factor


@derivative_rule(torch.optim.Adam)
@derivative_rule(torch.optim.AdamW)
class AdamRule(DerivativeRule):
    """update = -lr/c1 m / (sqrt(v/c2) + eps), c1 = 1 - beta1^t and c2 = 1 - beta2^t.

    As the quotient -(lr sqrt(c2)/c1) m / (sqrt(v) + sqrt(c2) eps), with dm/dG = 1 - beta1 and
    dv/dG = 2 (1 - beta2) G. Under amsgrad the largest v so far takes the place of v, and moves with
    the gradient only where it is v itself.
    """

    def before(self, step: ParameterStep) -> None:
        """Note G where it contains the weight."""
        if not step.group["decoupled_weight_decay"]:
            _add_weight_decay(step)

    def after(self, step: ParameterStep) -> Tensor:
        """Return D of the quotient."""
        group, state = step.group, step.state
        beta1, beta2 = map(_number, group["betas"])
        count = _number(state["step"])
        root_c2 = (1 - beta2**count) ** 0.5
        moving, square = step.gradient, state["exp_avg_sq"]
        if group["amsgrad"]:
            largest = state["max_exp_avg_sq"]
            moving, square = torch.where(square == largest, moving, 0.0), largest
        return _derive_quotient(
            step,
            state["exp_avg"],
            moving,
            square,
            scale=step.sign * _number(group["lr"]) * root_c2 / (1 - beta1**count),
            eps=root_c2 * group["eps"],
            slope=1 - beta1,
            square_slope=step.sign * (1 - beta2),
        )


@derivative_rule(torch.optim.RMSprop)
class RMSpropRule(DerivativeRule):
    """update = -lr (momentum b' + G / (sqrt(w) + eps)), with w = v, or centered w = v - a^2.

    dv/dG = 2 (1 - alpha) G; of the mean gradient a it is 1 - alpha, so that centered
    dw/dG = 2 (1 - alpha) (G - a). Where w = 0 though G is not, sqrt(w) has a corner at G = a; its
    middle is taken, 0.
    """

    def before(self, step: ParameterStep) -> None:
        """Note G where it contains the weight."""
        _add_weight_decay(step)

    def after(self, step: ParameterStep) -> Tensor:
        """Return D of the quotient."""
        group, state = step.group, step.state
        moving, square = step.gradient, state["square_avg"]
        if group["centered"]:
            mean = state["grad_avg"]
            square = square.addcmul(mean, mean, value=-1)
            moving = torch.where(square == 0, 0.0, moving - step.sign * mean)
        return _derive_quotient(
            step,
            step.gradient,
            moving,
            square,
            scale=step.sign * _number(group["lr"]),
            eps=group["eps"],
            slope=1.0,
            square_slope=1 - group["alpha"],
        )


@derivative_rule(torch.optim.Adagrad)
class AdagradRule(DerivativeRule):
    """update = -lr / (1 + (t - 1) lr_decay) G / (sqrt(v) + eps), with dv/dG = 2 G."""

    def before(self, step: ParameterStep) -> None:
        """Note G where it contains the weight."""
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
    """Return the derivative of -scale n / (sqrt(w) + eps), in a temporary.

    n, h and w are the three tensors: dn/dG is `slope`, dw/dG is 2 `square_slope` h. With
    r = sqrt(w) and q = r + eps the derivative is -scale/q (slope - square_slope n h / (r q)). Where
    w = 0 the second part is 0, its limit: n and h are 0 there, or too small for w to hold their
    square.

    Six operations, of which the root takes a third of the time.
    """
    result, root, divisor = map(step.temporary, range(3))
    # A number on an accelerator stays there: to read it would stall the stream.
    factor = 1.0 if isinstance(scale, Tensor) else scale
    torch.sqrt(square.to(root.dtype), out=root)
    torch.add(root, eps, out=divisor)
    torch.mul(numerator.to(result.dtype), half_slope, out=result)
    # Added to r q: it keeps 0 from being divided by 0 and leaves all larger numbers as they are.
    tiny = root.new_full((), torch.finfo(root.dtype).tiny)
    torch.addcmul(tiny, root, divisor, out=root)
    first = root.new_full((), -factor * slope)
    torch.addcdiv(first, result, root, value=factor * square_slope, out=result)
    result.div_(divisor)
    return result.mul_(scale) if isinstance(scale, Tensor) else result


def _wide(values: Tensor) -> torch.dtype:
    """Return float32 for half precision, whose smallest numbers are too large for D."""
    return torch.promote_types(values.dtype, torch.float32)


def _all_rows(values: Tensor) -> Part:
    return slice(None) if values.dim() else ...


def _add_weight_decay(step: ParameterStep) -> None:
    """Put the gradient with coupled weight decay in the place of the gradient.

    It is taken before the sign of `maximize`, where the decay has the other sign then.
    """
    decay = step.group["weight_decay"]
    if decay:
        step.gradient = torch.add(
            step.gradient, step.parameter, alpha=step.sign * decay, out=step.buffer
        )


def _number(setting: float | Tensor) -> Any:
    """Return a setting or a count as a number, or as the tensor it is on an accelerator."""
    if not isinstance(setting, Tensor):
        return setting
    return setting.item() if setting.device.type == "cpu" else _on_device(setting)


def _on_device(setting: Tensor) -> Tensor:
    """Return a number that stays where it is.

    In float64, where there is such: in float32, in which optimizers hold their counts there,
    1 - 0.999^t has four digits at first.
    """
    number = setting.squeeze()
    return number if number.device.type == "mps" else number.double()
