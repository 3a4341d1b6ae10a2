"""One training step, taken and then linearized: its gradient, its update, and clipping in between.

    pull    adjoints of parameters and optimizer state go from after the step to before it
    push    tangents go from before the step to after it

The derivatives of a step come from another computation than its training, with other kernels and
without hooks on gradients. So the two gradients are compared: by the norm of each parameter's, and
in one step of an epoch entry by entry.

Map: `ModelState` (what a step begins with), `TakenStep` (what is kept of a step), `LinearizedStep`,
`group_settings`.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.per_sample import at_least_float32
from sampimp.importance.recorded_step import RandomState, gradient_norms
from sampimp.influence.derivative_checks import bound, find_other_gradient
from sampimp.influence.replay import ReplayableRun, Smoothing, StepDerivatives
from sampimp.influence.updates import (
    PARAMETER,
    Block,
    LinearizedUpdate,
    UpdatePoint,
    clip_adjoint,
    linearized_update,
)

CLIP_EPS = 1e-6
"""PyTorch's `clip_grad_norm_` divides by the norm plus this number."""


@dataclass(frozen=True)
class ModelState:
    """What a step of a run begins with, besides the optimizer's state."""

    parameters: Sequence[Tensor]
    counts: Sequence[Tensor]
    """Buffers of whole numbers; all others are constant (`hidden_paths`)."""
    random_state: RandomState

    @classmethod
    def now(cls, run: ReplayableRun) -> "ModelState":
        """Return copies of the present values."""
        parameters = [parameter.detach().clone() for parameter in run.parameters]
        counts = [buffer.clone() for buffer in _counts(run)]
        return cls(parameters, counts, RandomState.now(parameters[0].device))

    @torch.no_grad()
    def restore(self, run: ReplayableRun) -> None:
        """Set a run to these values."""
        for tensors, stored in ((run.parameters, self.parameters), (_counts(run), self.counts)):
            for tensor, values in zip(tensors, stored, strict=True):
                tensor.copy_(values)
        self.random_state.restore()


def _counts(run: ReplayableRun) -> list[Tensor]:
    buffers = run.model.buffers()
    return [b for b in buffers if not (b.is_floating_point() or b.is_complex())]


@dataclass(frozen=True, kw_only=True)
class TakenStep:
    """One step of a run, and what its derivatives need."""

    step: Any
    """The step, as the run names it."""
    start: ModelState
    """Before the step."""
    gradient_norms: Sequence[float]
    """Norm of each parameter's gradient at the update."""
    has_gradient: Sequence[bool]
    """The optimizer leaves a parameter out that has none."""
    gradients: Sequence[Tensor | None] | None
    """At the update; None for a step that is compared by the norms alone."""
    is_first: Sequence[bool]
    """Whether a parameter had no momentum buffer before the step."""
    states: Sequence[Mapping[str, Any]]
    """Of the optimizer after the step, for each parameter."""
    groups: Sequence[Mapping[str, Any]]
    """Settings of each parameter's group."""

    @classmethod
    def take(cls, run: ReplayableRun, step: Any, *, keeps_gradients: bool = False) -> "TakenStep":
        """Train one step of a run."""
        optimizer, rule = run.optimizer, linearized_update(run.optimizer)
        start = ModelState.now(run)
        is_first = [
            optimizer.state.get(parameter, {}).get("momentum_buffer") is None
            for parameter in run.parameters
        ]
        run.train(step)
        groups = group_settings(run)
        states = []
        for parameter, group in zip(run.parameters, groups, strict=True):
            state = optimizer.state.get(parameter, {})
            states.append(
                {name: deepcopy(state[name]) for name in rule.reads(group) if name in state}
            )
        return cls(
            step=step,
            start=start,
            gradient_norms=gradient_norms([p.grad for p in run.parameters]).tolist(),
            has_gradient=[parameter.grad is not None for parameter in run.parameters],
            gradients=[
                None if p.grad is None else p.grad.to_dense().clone() for p in run.parameters
            ]
            if keeps_gradients
            else None,
            is_first=is_first,
            states=states,
            groups=groups,
        )

    def linearized(self, run: ReplayableRun, smoothing: Smoothing) -> "LinearizedStep":
        """Return the step's derivative; the run's parameters are those before the step then.

        Raises
        ------
        UnsupportedError
            The step cannot be differentiated, its forward pass changes a parameter, or its gradient
            is another one than in training.
        """
        self.start.restore(run)
        versions = [(parameter._version, parameter.data_ptr()) for parameter in run.parameters]
        derivatives = run.derivatives(self.step, smoothing)
        for parameter, version, values in zip(
            run.parameters, versions, self.start.parameters, strict=True
        ):
            is_same = version == (parameter._version, parameter.data_ptr())
            if not (is_same or torch.equal(parameter, values)):
                raise UnsupportedError(
                    expected="parameters that the optimizer alone changes",
                    got="a change in the forward pass",
                    where=_name(run, parameter),
                    todo="leave out max_norm of an embedding, or normalise by a parametrization",
                )
        return LinearizedStep(self, run, derivatives, smoothing)


class LinearizedStep:
    """The derivative of one step; see the head of this module."""

    @torch.no_grad()
    def __init__(
        self,
        taken: TakenStep,
        run: ReplayableRun,
        derivatives: StepDerivatives,
        smoothing: Smoothing,
    ) -> None:
        self._derivatives = derivatives
        self._rule: LinearizedUpdate = linearized_update(run.optimizer)
        gradients = [
            # zero_grad(set_to_none=False) leaves zeros where a step does not use a parameter.
            (torch.zeros_like(parameter) if gradient is None else at_least_float32(gradient))
            if has_gradient
            else None
            for gradient, parameter, has_gradient in zip(
                derivatives.gradients(), run.parameters, taken.has_gradient, strict=True
            )
        ]
        self._gradients = [(place, g) for place, g in enumerate(gradients) if g is not None]
        norms_P = gradient_norms(gradients)
        self._clipping = 1.0
        if run.clip_norm is not None:
            self._norm = float(norms_P[taken.has_gradient].norm())
            self._clipping = min(1.0, run.clip_norm / (self._norm + CLIP_EPS))
        self._points = [
            UpdatePoint(
                at_least_float32(taken.start.parameters[place]),
                gradient * self._clipping if self._clipping < 1 else gradient,
                {
                    name: at_least_float32(value) if isinstance(value, Tensor) else value
                    for name, value in taken.states[place].items()
                },
                taken.groups[place],
                is_first=taken.is_first[place],
                least_eps=smoothing.eps,
            )
            for place, gradient in self._gradients
        ]
        self._require_same_gradients(taken, run, (norms_P * self._clipping).tolist())

    def _require_same_gradients(
        self, taken: TakenStep, run: ReplayableRun, norms: Sequence[float]
    ) -> None:
        """Raise UnsupportedError unless the gradients are those with which the step was trained."""
        expected, relative = taken.gradient_norms, bound(self._derivatives.precision)
        place = find_other_gradient(norms, expected, relative)
        if place is None and taken.gradients is not None:
            differences: list[Tensor | None] = [None] * len(expected)
            for (used, _), point in zip(self._gradients, self._points, strict=True):
                trained = taken.gradients[used]
                differences[used] = point.gradient if trained is None else point.gradient - trained
            pairs = zip(gradient_norms(differences).tolist(), expected, strict=True)
            place = find_other_gradient([sum(pair) for pair in pairs], expected, relative)
        if place is not None:
            raise UnsupportedError(
                expected="the gradient with which the step was trained",
                got=f"another one, of norm {norms[place]:.6g} instead of {expected[place]:.6g}",
                where=f"the reverse pass, parameter {_name(run, run.parameters[place])}",
                todo="look for what a second forward pass on the same batch does otherwise: values "
                "that the model keeps from one batch to the next in attributes, random numbers "
                "that are not PyTorch's, dropout inside of attention or recurrent layers on a GPU, "
                "hooks on gradients",
            )

    @torch.no_grad()
    def pull(self, adjoints: Sequence[Block]) -> Tensor:
        """Take adjoints to before the step, in place.

        Returns
        -------
        Tensor of shape (K, L, N)
            Derivative of each target by the weight of each sample in the step, by layer.
        """
        directions = [torch.zeros(()) for _ in adjoints]
        used = [place for place, _ in self._gradients]
        for place, block in enumerate(adjoints):
            if place not in used:
                directions[place] = torch.zeros_like(block[PARAMETER])
        for point, place in zip(self._points, used, strict=True):
            self._add_states(adjoints[place], point)
            directions[place] = self._rule.pull(point, adjoints[place])
        self._clip([directions[place] for place in used])
        return self._derivatives.products(directions, [block[PARAMETER] for block in adjoints])

    @torch.no_grad()
    def push(self, tangents: Sequence[Block], samples: Mapping[int, Sequence[int]]) -> None:
        """Take tangents to after the step, in place.

        Parameters
        ----------
        tangents
            Of each parameter and its state.
        samples
            By the tangent's number: positions in the step of the sample whose weight changes.
        """
        directions = [block[PARAMETER] for block in tangents]
        gradients = [torch.zeros_like(direction) for direction in directions]
        self._derivatives.products(directions, gradients)
        for number, positions in samples.items():
            own = self._derivatives.sample_gradients(positions)
            for gradient, values in zip(gradients, own, strict=True):
                gradient[number] += values.sum(0)
        used = [place for place, _ in self._gradients]
        self._clip([gradients[place] for place in used])
        for point, place in zip(self._points, used, strict=True):
            self._add_states(tangents[place], point)
            self._rule.push(point, tangents[place], gradients[place])

    def _add_states(self, block: Block, point: UpdatePoint) -> None:
        """Begin with zeros for a state that the optimizer did not have so far."""
        for name in self._rule.states(point.group):
            if name not in block:
                block[name] = torch.zeros_like(block[PARAMETER])

    def _clip(self, vectors: Sequence[Tensor]) -> None:
        """Apply the derivative of clipping, a symmetric map, in place."""
        if self._clipping < 1:
            gradients = [gradient for _, gradient in self._gradients]
            clip_adjoint(vectors, gradients, self._clipping, self._norm, CLIP_EPS)


def group_settings(run: ReplayableRun) -> list[dict[str, Any]]:
    """Return the present settings of each parameter's group, as copies."""
    groups = {
        id(parameter): {name: value for name, value in group.items() if name != "params"}
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    return [groups[id(parameter)] for parameter in run.parameters]


def _name(run: ReplayableRun, parameter: Tensor) -> str:
    return next(name for name, other in run.model.named_parameters() if other is parameter)
