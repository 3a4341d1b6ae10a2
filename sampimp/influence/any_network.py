"""First and second derivatives of one step's loss, for any network that the recorder takes.

The reverse pass needs, for K directions gamma at a step's parameters, the products H gamma with the
Hessian of the step's loss, and in every layer the inner product of gamma with each sample's own
part of the gradient. Let w_i be sample i's factor in the step's loss (1/B under a mean):

    loss = sum_i w_i loss_i        G = d loss / d theta, with a graph of its own
    H gamma = d <gamma, G> / d theta                           one more backward pass a direction
    <gamma, g_i> = w_i d <gamma, G> / d w_i                    the same pass; all layers together
    <gamma_d, g_{i,d}>                                         the recorder's factors; each layer d

A backward pass for each layer would give the last line as well, at 0.7 times the cost of all the
rest for a GRU and 2.5 times for a transformer. The recorder's factors have it from the first
backward pass (`Factor.inner`). Its sum over the layers is the line before, which comes from
autograd alone; the two are compared in every step.

Map: `NetworkDerivatives` (of a model and a loss), `NetworkStep` (of one step).

References
----------
Pearlmutter (1994), "Fast exact multiplication by the Hessian".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sampimp.errors import UnsupportedError
from sampimp.importance.gradient_checks import HIDDEN_CAUSES
from sampimp.importance.gradients import Factor
from sampimp.importance.per_sample import at_least_float32, finest_dtype
from sampimp.importance.step import Capture
from sampimp.influence.derivative_checks import find_mismatch, require_losses, require_symmetric
from sampimp.influence.gauss_newton import gauss_newton_products
from sampimp.influence.hidden_paths import CutValues, constant_buffers
from sampimp.influence.linear_stack import Curvature
from sampimp.influence.twice_differentiable import (
    require_no_functions,
    require_no_hooks,
    second_derivatives,
    twice_differentiable,
)

_LOSSES = "the losses of a step"


class NetworkDerivatives:
    """Derivatives of a network's loss, one step after another.

    Parameters
    ----------
    model
        Any network that the recorder takes: each sample of a batch is treated on its own.
    losses
        Returns the loss of each sample of a batch, (N,), from a call of the model.
    parameters
        The parameters to differentiate by, in the model's order. Default: all.
    batch_dim
        As for `ImportanceRecorder`.

    Raises
    ------
    UnsupportedError
        The model is wrapped or compiled, has a BatchNorm in training mode, or hooks on gradients.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> nn.init.constant_(model.weight, 3.0)
    Parameter containing:
    tensor([[3.]], requires_grad=True)
    >>> derivatives = NetworkDerivatives(model, lambda x: model(x).square().sum(1))
    >>> step = derivatives.at([torch.tensor([[1.0], [2.0]])], [torch.tensor([0.5, 0.5])])
    >>> step.gradients()  # of (w² + (2 w)²) / 2
    [tensor([[15.]])]
    >>> products = [torch.zeros(1, 1, 1)]
    >>> step.products([torch.ones(1, 1, 1)], products)  # of sample 1: w, of sample 2: 4 w
    tensor([[[ 3., 12.]]])
    >>> products
    [tensor([[[5.]]])]
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[Any], Tensor],
        parameters: Sequence[Tensor] | None = None,
        *,
        batch_dim: int = 0,
    ) -> None:
        require_no_hooks(model)
        self._capture = Capture(model, batch_dim=batch_dim)
        self._losses = losses
        self._parameters = list(model.parameters() if parameters is None else parameters)
        self._has_begun = False
        self._precision = max(torch.finfo(p.dtype).eps for p in self._parameters)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in forward order, after the first step."""
        tensors = self._capture.tensors
        return tuple(tensors.layers[place] for place in tensors.forward_order)

    def at(
        self,
        batches: Sequence[Any],
        weights: Sequence[Tensor],
        *,
        indices: Sequence[Tensor] = (),
        first_of_epoch: bool = False,
    ) -> "NetworkStep":
        """Return the derivatives of a step's loss at the model's present parameters.

        Random numbers of the forward pass (dropout) are PyTorch's next ones: the caller has set the
        random state that they had in training.

        Parameters
        ----------
        batches
            The batches whose gradients add up in the step; usually one.
        weights
            Of each batch, the samples' factors (N,) in the step's loss; 1/B for a mean.
        indices
            As for `ImportanceRecorder.step`, of each batch.
        first_of_epoch
            Prove the row-to-sample mapping again, as the recorder does once an epoch, and check
            that the products are symmetric. Both are done in the first step in any case.

        Raises
        ------
        UnsupportedError
            The step cannot be recorded, an operation has no second derivative, or the losses depend
            on the parameters by paths that autograd does not follow.
        """
        model = self._capture.tensors.model
        checks, self._has_begun = first_of_epoch or not self._has_begun, True
        with torch.enable_grad(), twice_differentiable(model), second_derivatives():
            with self._capture.step(
                [len(weights_N) for weights_N in weights],
                elementwise=True,  # keeps the factors
                accumulates=False,
                first_of_epoch=checks,
                indices=indices,
            ):
                pairs = zip(batches, weights, strict=True)
                graphs = [self._differentiate(*pair, checks=checks) for pair in pairs]
            factors = self._capture.take_factors()
        if checks:
            _require_single_precision(self._capture.checks.precision)
            of_losses = (torch.finfo(graph.losses.dtype).eps for graph in graphs)
            self._precision = max(self._precision, self._capture.checks.precision, *of_losses)
        return NetworkStep(
            self._capture, self._parameters, graphs, factors, self._precision, checks=checks
        )

    def _differentiate(self, batch: Any, weights_N: Tensor, *, checks: bool) -> "_BatchGraph":
        """Run one forward and one backward pass, which is recorded."""
        model, outputs, cuts = self._capture.tensors.model, [], CutValues(_LOSSES)
        handle = model.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output)
        )
        try:
            with constant_buffers(model, _LOSSES), cuts:
                losses_N = self._losses(batch)
        finally:
            handle.remove()
        require_losses(losses_N, len(weights_N))
        if checks:
            require_no_functions(losses_N)
        cuts.require_none_in(losses_N)
        weights_N = weights_N.detach().to(losses_N, copy=True).requires_grad_()
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        gradients = iter(
            torch.autograd.grad(losses_N, trained, weights_N, create_graph=True, allow_unused=True)
        )
        return _BatchGraph(
            weights_N,
            losses_N,
            outputs,
            [next(gradients) if p.requires_grad else None for p in self._parameters],
        )


@dataclass(frozen=True)
class _BatchGraph:
    """The graphs of one batch."""

    weights: Tensor
    """The samples' factors in the step's loss, (N,)."""
    losses: Tensor
    """(N,)"""
    outputs: Sequence[Any]
    """What the calls of the model have returned."""
    gradients: Sequence[Tensor | None]
    """By each parameter, with the graph of the backward pass; None for an unused one."""


class NetworkStep:
    """Derivatives of one step's loss; `NetworkDerivatives.at` makes it.

    Parameters
    ----------
    capture
        That has recorded the step.
    parameters
        The parameters to differentiate by.
    graphs
        Of each batch.
    factors
        Of each batch, by row of the parameter.
    precision
        Rounding unit of the coarsest values in the step.
    checks
        Whether to check that the products are those of a symmetric matrix, as a Hessian is.
    """

    def __init__(
        self,
        capture: Capture,
        parameters: Sequence[Tensor],
        graphs: Sequence[_BatchGraph],
        factors: Sequence[Mapping[int, Factor]],
        precision: float,
        *,
        checks: bool,
    ) -> None:
        self.precision = precision
        self._tensors, self._parameters, self._graphs = capture.tensors, parameters, graphs
        self._trained = [place for place, p in enumerate(parameters) if p.requires_grad]
        rows = [self._tensors.rows[id(parameter)] for parameter in parameters]
        self._factors = [[of_batch.get(row) for row in rows] for of_batch in factors]
        order = self._tensors.forward_order
        self._layers = [order.index(int(self._tensors.layer_of_row[row])) for row in rows]
        """Of each parameter, the position of its layer in forward order."""
        self._checks = checks

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient of the step's loss by each parameter; None for an unused one."""
        sums: list[Tensor | None] = []
        for of_batches in zip(*(graph.gradients for graph in self._graphs), strict=True):
            used = [gradient.detach() for gradient in of_batches if gradient is not None]
            sums.append(sum(used[1:], used[0]) if used else None)
        return sums

    @torch.no_grad()
    def sample_gradients(self, positions: Sequence[int]) -> list[Tensor]:
        """Return the parts (n, P...) of the gradient that belong to n samples of the step."""
        gradients = [
            at_least_float32(p).new_zeros(len(positions), *p.shape) for p in self._parameters
        ]
        places = [
            (factors, row)
            for factors, graph in zip(self._factors, self._graphs, strict=True)
            for row in range(len(graph.weights))
        ]
        for number, position in enumerate(positions):
            factors, row = places[position]
            for gradient, factor in zip(gradients, factors, strict=True):
                if factor is not None:
                    gradient[number] = factor.gradient(slice(row, row + 1))[0]
        return gradients

    @torch.no_grad()
    def inner(self, directions: Sequence[Tensor]) -> Tensor:
        """Return the inner products of directions with each sample's part of the gradient.

        Parameters
        ----------
        directions
            (K, P...) for each parameter.

        Returns
        -------
        Tensor of shape (K, L, N)
            By layer, in forward order; the samples in the order of the batches.
        """
        by_batch = []
        for graph, factors in zip(self._graphs, self._factors, strict=True):
            shape = len(directions[0]), len(self._tensors.layers), len(graph.weights)
            inner_KLN = torch.zeros(
                shape, dtype=finest_dtype(directions), device=graph.weights.device
            )
            for layer, direction, factor in zip(self._layers, directions, factors, strict=True):
                if factor is not None:
                    inner_KLN[:, layer] += factor.inner(direction)
            by_batch.append(inner_KLN)
        return torch.cat(by_batch, 2)

    @torch.no_grad()
    def products(
        self,
        directions: Sequence[Tensor],
        out: Sequence[Tensor],
        *,
        curvature: Curvature = "hessian",
    ) -> Tensor:
        """Add the Hessian's product with each direction to `out`; return `inner`.

        Parameters
        ----------
        directions, out
            (K, P...) for each parameter.
        curvature
            The Hessian of the step's loss, or its Gauss-Newton matrix.

        Returns
        -------
        Tensor of shape (K, L, N)
            As `inner`.

        Raises
        ------
        UnsupportedError
            An operation has no second derivative or a wrong one, or the inner products do not add
            up to those that autograd computes. For the Gauss-Newton matrix: the model has another
            output than one tensor.
        """
        if curvature == "gauss-newton":
            self._add_gauss_newton(directions, out)
            return self.inner(directions)
        if self._checks:
            self._require_symmetric(directions)
        inner_KLN = self.inner(directions)
        totals = [self._differentiate(k, directions, out) for k in range(len(directions[0]))]
        self._compare(inner_KLN, torch.stack(totals), directions)
        return inner_KLN

    def _differentiate(
        self, number: int, directions: Sequence[Tensor], out: Sequence[Tensor]
    ) -> Tensor:
        """Add H gamma of one direction to `out`; return <gamma, g_i> of each sample, (N,)."""
        weights = [graph.weights for graph in self._graphs]
        inputs = [*(self._parameters[place] for place in self._trained), *weights]
        products = self._along([direction[number] for direction in directions], inputs)
        for place, product in zip(self._trained, products, strict=False):
            if product is not None:
                out[place][number] += product
        return self._parts(products[len(self._trained) :])

    def _along(
        self, direction: Sequence[Tensor | None], inputs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the derivatives of <direction, G> by inputs; None where it depends on none."""
        terms = [
            (gradient, part.to(gradient.dtype))
            for graph in self._graphs
            for gradient, part in zip(graph.gradients, direction, strict=True)
            if gradient is not None and gradient.requires_grad and part is not None
        ]
        if not terms:
            return [None] * len(inputs)
        with second_derivatives():
            return torch.autograd.grad(
                [gradient for gradient, _ in terms],
                inputs,
                [part for _, part in terms],
                retain_graph=True,
                allow_unused=True,
            )

    def _parts(self, slopes: Sequence[Tensor | None]) -> Tensor:
        """Return w_i d/dw_i of all samples, (N,), from the derivatives by each batch's weights."""
        return torch.cat(
            [
                torch.zeros_like(graph.weights) if slope_N is None else graph.weights * slope_N
                for graph, slope_N in zip(self._graphs, slopes, strict=True)
            ]
        )

    def _require_symmetric(self, directions: Sequence[Tensor]) -> None:
        inputs = [self._parameters[place] for place in self._trained]

        def product(direction: Sequence[Tensor]) -> list[Tensor]:
            everywhere: list[Tensor | None] = [None] * len(self._parameters)
            for place, part in zip(self._trained, direction, strict=True):
                everywhere[place] = part
            products = self._along(everywhere, inputs)
            pairs = zip(inputs, products, strict=True)
            return [torch.zeros_like(p) if values is None else values for p, values in pairs]

        require_symmetric(
            product, [directions[place][0] for place in self._trained], self.precision
        )

    def _compare(self, inner_KLN: Tensor, total_KN: Tensor, directions: Sequence[Tensor]) -> None:
        """Raise UnsupportedError unless the inner products add up to those of autograd."""
        mismatch = find_mismatch(inner_KLN, total_KN, directions, self.gradients(), self.precision)
        if mismatch is not None:
            k, sample = mismatch
            inner_L = inner_KLN[k, :, sample]
            raise UnsupportedError(
                expected="inner products by layer that add up to the derivative of a sample's loss",
                got=f"{float(inner_L.sum()):.6g} instead of {float(total_KN[k, sample]):.6g} for "
                f"sample {sample} of the step",
                where=self._wrong_layers(inner_L, [part[k] for part in directions], sample),
                todo=HIDDEN_CAUSES,
            )

    def _wrong_layers(self, inner_L: Tensor, direction: Sequence[Tensor], sample: int) -> str:
        """Return the names of the layers whose inner product differs most from autograd's."""
        weights = [graph.weights for graph in self._graphs]
        differences = {}
        for layer, place in enumerate(self._tensors.forward_order):
            of_layer = [
                part if position == layer else None
                for position, part in zip(self._layers, direction, strict=True)
            ]
            exact = self._parts(self._along(of_layer, weights))[sample]
            differences[self._tensors.layers[place]] = float((exact - inner_L[layer]).abs())
        largest = max(differences.values())
        wrong = [name for name, difference in differences.items() if difference >= largest / 10]
        return f"layer {', '.join(wrong)}"

    def _add_gauss_newton(self, directions: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Add products with the Gauss-Newton matrix to `out`."""
        for graph in self._graphs:
            if len(graph.outputs) != 1 or not isinstance(graph.outputs[0], Tensor):
                raise UnsupportedError(
                    expected="a model that is called once for a batch, and returns one tensor",
                    got=f"{len(graph.outputs)} calls, the first of which returned "
                    f"{type(graph.outputs[0]).__name__}",
                    where="the Gauss-Newton matrix of a step's loss",
                    todo='use the Hessian: curvature="hessian"',
                )
            products = gauss_newton_products(
                graph.outputs[0],
                graph.losses,
                graph.weights.detach(),
                [self._parameters[place] for place in self._trained],
                [directions[place] for place in self._trained],
            )
            for place, values in zip(self._trained, products, strict=True):
                out[place].add_(values)


def _require_single_precision(rounding: float) -> None:
    """Raise UnsupportedError if the rounding unit of an operation's output is that of a half."""
    if rounding > torch.finfo(torch.float32).eps:
        raise UnsupportedError(
            expected="a step in float32 or float64",
            got="an operation with outputs in half precision",
            where="the reverse pass, whose checks need more digits",
            todo="train in float32; a run in half precision cannot be gone through",
        )
