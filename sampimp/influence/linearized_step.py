"""One training step, taken and then linearized: its gradient, its update, and clipping in between.

    pull    adjoints of parameters and optimizer state go from after the step to before it
    push    tangents go from before the step to after it

Map: `TakenStep` (what is kept of a step), `LinearizedStep`, `group_settings`.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampimp.importance.recorded_step import RandomState
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


@dataclass(frozen=True, kw_only=True)
class TakenStep:
    """One step of a run, and what its derivatives need."""

    step: Any
    """The step, as the run names it."""
    parameters: Sequence[Tensor]
    """Before the step."""
    random_state: RandomState
    """Before the step."""
    is_first: Sequence[bool]
    """Whether a parameter had no momentum buffer before the step."""
    states: Sequence[Mapping[str, Any]]
    """Of the optimizer after the step, for each parameter."""
    groups: Sequence[Mapping[str, Any]]
    """Settings of each parameter's group."""

    @classmethod
    def take(cls, run: ReplayableRun, step: Any) -> "TakenStep":
        """Train one step of a run."""
        optimizer, rule = run.optimizer, linearized_update(run.optimizer)
        parameters = [parameter.detach().clone() for parameter in run.parameters]
        random_state = RandomState.now(parameters[0].device)
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
            parameters=parameters,
            random_state=random_state,
            is_first=is_first,
            states=states,
            groups=groups,
        )

    def linearized(self, run: ReplayableRun, smoothing: Smoothing) -> "LinearizedStep":
        """Return the step's derivative; the run's parameters are those before the step then."""
        with torch.no_grad():
            for parameter, values in zip(run.parameters, self.parameters, strict=True):
                parameter.copy_(values)
        self.random_state.restore()
        derivatives = run.derivatives(self.step, smoothing)
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
        self._gradients = [
            (place, gradient)
            for place, gradient in enumerate(derivatives.gradients())
            if gradient is not None  # the optimizer leaves such a parameter out
        ]
        self._clipping = 1.0
        if run.clip_norm is not None:
            norms = torch.stack([gradient.norm() for _, gradient in self._gradients])
            self._norm = float(torch.linalg.vector_norm(norms))
            self._clipping = min(1.0, run.clip_norm / (self._norm + CLIP_EPS))
        self._points = [
            UpdatePoint(
                taken.parameters[place],
                gradient * self._clipping if self._clipping < 1 else gradient,
                taken.states[place],
                taken.groups[place],
                is_first=taken.is_first[place],
                least_eps=smoothing.eps,
            )
            for place, gradient in self._gradients
        ]

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
            self._rule.push(point, tangents[place], gradients[place])

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
