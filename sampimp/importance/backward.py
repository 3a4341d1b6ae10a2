"""Backward hooks: output gradients arrive, and rules turn them into per-sample gradients.

The output gradient of a forward call with parameters, together with the call's arguments, gives
factors of the parameters' per-sample gradients (`sampimp.importance.rules`). Factors of
a parameter are added up over its calls in a pass, and dropped with the last of them: kept until the
end of the step, they raised its peak memory up to 1.6 times.

Map: `BackwardHooks`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.forward_pass import ForwardPass
from sampimp.importance.gradient_checks import GradientChecks
from sampimp.importance.gradients import Explicit, Factor, Outer, Product, total
from sampimp.importance.known_layouts import KnownLayouts, Layouts
from sampimp.importance.model_tensors import ModelTensors
from sampimp.importance.ownership.call import argument, tensors_among
from sampimp.importance.ownership.layout import AxisLayout, joined_rows
from sampimp.importance.ownership.row_notes import as_sequence
from sampimp.importance.ownership.use import Use
from sampimp.importance.rules.batch import Batch
from sampimp.importance.rules.inner_nodes import InnerNodes
from sampimp.importance.rules.registry import factors_of


class BackwardHooks:
    """Receives the output gradients of a step's backward passes, and forms factors of them.

    Parameters
    ----------
    tensors
        The model's parameters.
    checks
        Receives the parameters that were used, and the sums of their per-sample gradients.
    layouts
        Finds on which axis and rows of an output the samples lie.
    begin
        To be called when the first output gradient of a pass arrives.
    keep_sources
        To be called with the tensors that factors use, where these are kept until the update.
    """

    def __init__(
        self,
        tensors: ModelTensors,
        checks: GradientChecks,
        layouts: KnownLayouts,
        begin: Callable[[], None],
        keep_sources: Callable[[list[Tensor]], None],
    ) -> None:
        self._tensors, self._checks, self._known_layouts = tensors, checks, layouts
        self._begin, self._keep_sources = begin, keep_sources

    def begin_step(self, elementwise: bool) -> None:
        """Begin a step; under an `elementwise` derivative, factors are kept until the update."""
        self._elementwise = elementwise
        self._is_recording = True

    def begin_pass(self, calls: ForwardPass) -> None:
        """Begin a pass, whose forward calls are in `calls`."""
        self._calls = calls
        self._layouts: Layouts | None = None
        self._order: Tensor | None = None  # sample of each row of the loss
        self._joined_rows: dict[Any, Tensor | None] = {}
        self._factors: dict[int, list[Factor]] = {}  # by row
        self._values: dict[int, Tensor] = {}  # by row: squared norms of complete parameters
        self._waiting: list[tuple[Use, InnerNodes]] = []  # uses with incomplete inner nodes
        self._has_begun = False

    def end_pass(self) -> tuple[dict[int, Factor], dict[int, Tensor]]:
        """Return factors, and the squared norms that are computed already, by row of parameter."""
        self._apply_waiting(ended=True)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return {row: self._summed(row) for row in list(self._factors)}, self._values

    def end_step(self) -> None:
        """End a step, and drop the references to the graph of a pass that was not completed."""
        self._is_recording = False
        for _, nodes in self._waiting:
            nodes.close()

    def before_backward(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Prove the row-to-sample mapping before the first backward call of a pass."""
        is_grad = function is torch.autograd.grad
        name = "grad_outputs" if is_grad else "grad_tensors"
        if function is Tensor.backward:
            name = "gradient"
        starts = argument(args, kwargs, 0, "outputs" if is_grad else "tensors", ())
        start_gradients = argument(args, kwargs, 2 if is_grad else 1, name, None)
        with torch._C.DisableTorchFunction():
            roots = list(as_sequence(starts))
            gradients: list[Tensor | None] = [None] * len(roots)
            if start_gradients is not None:
                gradients = list(as_sequence(start_gradients))
            pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if r.grad_fn is not None]
            if self._calls.uses and pairs and self._layouts is None:
                # It remains None if no gradient reaches a use, as in a discriminator's loss.
                self._layouts, self._order = self._known_layouts.find(
                    self._calls, [r for r, _ in pairs], [g for _, g in pairs]
                )

    def on_node(self, use: Use, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Receive the gradient of a use's only output, a pre-hook on the output's node."""
        gradient = gradients[number]
        if self._known_layouts.take_proof_gradients(self._calls, use, [gradient]):
            return
        if gradient is not None:
            shape = use.shapes[0]
            self._on_gradient(use, gradient if gradient.shape == shape else gradient.reshape(shape))

    def on_gradients(
        self,
        use: Use,
        zeros: Sequence[Callable[[], Tensor | None]],
        places: Sequence[int],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Receive the gradients of those outputs of a use that are at `places`.

        A missing gradient is zero; `zeros` makes it, for each of the outputs.
        """
        if self._known_layouts.take_proof_gradients(self._calls, use, gradients):
            return
        by_place = dict(zip(places, gradients, strict=True))
        deltas = [by_place.get(place) for place in range(len(zeros))]
        self._on_gradient(
            use,
            tuple(
                make_zero() if delta is None else delta
                for make_zero, delta in zip(zeros, deltas, strict=True)
            ),
        )

    def _on_gradient(self, use: Use, delta: Any) -> None:
        if use.done and not self._is_recording:
            return  # of a second derivative, whose graph contains the use's node
        if use.done:
            raise UnsupportedError(
                expected="one backward pass for each forward pass",
                got="a second gradient",
                where=f"an operation {use.function.__name__}",
                todo="add the losses up before backward()",
            )
        use.done = True
        if not self._has_begun:
            self._has_begun = True
            self._begin()
        self._apply_waiting()
        if use.number != self._calls.number:
            raise UnsupportedError(
                expected="one batch's backward pass before the next one's forward pass",
                got="another order",
                where="the step",
                todo="call the model and backward() for one batch after the other",
            )
        if isinstance(use.inner, InnerNodes):
            use.inner.open()
            self._waiting.append((use, use.inner))
        else:
            self._apply(use, delta)

    def _apply_waiting(self, ended: bool = False) -> None:
        """Apply the rules of waiting uses whose inner nodes have all gradients; if `ended`, of all.

        This runs after the last gradient of a use has arrived, because its node holds its saved
        tensors until then.
        """
        for use, nodes in list(self._waiting):
            if ended or nodes.is_complete:
                self._waiting.remove((use, nodes))
                self._apply(use, None)

    def _apply(self, use: Use, delta: Any) -> None:
        """Form the factors of a use from its output gradient."""
        if self._layouts is None:
            raise UnsupportedError(
                expected="a backward pass that is started by a call inside the block",
                got="a backward pass without a recorded start",
                where="the step",
                todo="call loss.backward() or torch.autograd.backward() in the thread of the block",
            )
        layout = self._layouts[use.position]
        if layout is None:  # its gradient was zero in the proof, or the loss does not depend on it
            self._skip(use)
            return
        rows = use.rows_shape[layout.axis]
        joined = self._rows_of_samples(
            layout, rows, self._tensors.parameters[min(use.roots)].device
        )
        with torch._C.DisableTorchFunction(), torch.set_grad_enabled(False):
            try:
                factors = self._factors_of(use, delta, rows, layout.axis, joined)
                for row in list(factors):
                    self._add(row, factors.pop(row))
            except UnsupportedError as error:
                roots = [
                    self._tensors.roots(tensor) or ()
                    for tensor in tensors_among(use.args, use.kwargs)
                ]
                error.where = self._tensors.place(min(row for rows in roots for row in rows))
                raise
        if self._elementwise:
            fixed = self._tensors.fixed
            self._keep_sources(
                [
                    tensor
                    for tensor in tensors_among(use.args, use.kwargs)
                    # not an expanded parameter, which the update changes
                    if self._tensors.varies(tensor) and id(tensor._base) not in fixed
                ]
            )
        # Drop references: a live `loss` would keep these activations.
        use.args, use.kwargs, use.inner = (), {}, None

    def _factors_of(
        self, use: Use, delta: Any, rows: int, axis: int, joined: Tensor | None
    ) -> dict[int, list[Factor]]:
        """Return the factors of a use by row of the parameter, which may have several.

        `rows` is the length of the samples' axis, before rows of one sample are `joined`.
        """
        if isinstance(use.inner, InnerNodes):
            pairs, use.inner = use.inner.close().factors(), None
        else:
            output, version = use.inner or (None, 0)
            output = output if output is not None and output._version == version else None
            batch = Batch(rows, axis, self._tensors.varies, output)
            pairs = factors_of(use.function, batch, delta, use.args, use.kwargs)
        factors: dict[int, list[Factor]] = {}
        for tensor, factor in pairs:
            if tensor is None:
                continue
            if joined is not None:
                factor = factor.joined(joined)
            row = self._tensors.rows.get(id(tensor))
            if row is None:
                for root, root_factor in self._factors_of_roots(tensor, factor):
                    factors.setdefault(root, []).append(root_factor)
            elif tensor.requires_grad:
                factors.setdefault(row, []).append(factor)
        return factors

    def _rows_of_samples(
        self, layout: AxisLayout, rows: int, device: torch.device
    ) -> Tensor | None:
        """Return the rows of each sample, (N, T); None where row n is that of sample n."""
        key = (layout.kind if layout.owners is None else id(layout)), rows, device
        if key not in self._joined_rows:
            self._joined_rows[key] = joined_rows(
                layout, rows, self._calls.batch.size, self._order, device
            )
        return self._joined_rows[key]

    def _skip(self, use: Use) -> None:
        """Mark a use without a gradient in this step as done."""
        if isinstance(use.inner, InnerNodes):
            use.inner.close()
        for row in use.roots:
            self._checks.used.add(row)
            self._settle(row)
        use.args, use.kwargs, use.inner = (), {}, None

    def _factors_of_roots(self, tensor: Tensor, factor: Factor) -> Iterator[tuple[int, Factor]]:
        """Yield factors of the parameters from which a tensor is derived, by row."""
        rows = sorted(self._tensors.roots(tensor) or ())
        parameters = [self._tensors.parameters[row] for row in rows]
        is_transpose = len(rows) == 1 and _is_transposed(tensor, parameters[0])
        if isinstance(factor, Product | Outer) and is_transpose:
            yield rows[0], factor.transposed()
        elif rows:
            gradients = torch.autograd.grad(
                tensor,
                parameters,
                factor.gradient(slice(None)).to(tensor.dtype),
                is_grads_batched=True,
                retain_graph=True,
            )
            for row, gradient in zip(rows, gradients, strict=True):
                yield row, Explicit(gradient)

    def _add(self, row: int, factors: Sequence[Factor]) -> None:
        """Add a use's factors of a parameter."""
        self._checks.used.add(row)
        self._factors.setdefault(row, []).extend(factors)
        self._settle(row)

    def _settle(self, row: int) -> None:
        """Count a use of a parameter as done; after the last one, reduce factors to norms."""
        self._calls.open_uses[row] -= 1
        is_last = not self._calls.open_uses[row]
        if is_last and not self._elementwise and row in self._factors:
            self._values[row] = self._summed(row).square()

    def _summed(self, row: int) -> Factor:
        """Return the sum of a parameter's factors in this pass, and drop them."""
        factor = total(
            self._factors.pop(row), self._calls.batch.size, self._tensors.parameters[row]
        )
        if self._checks.compares:
            self._checks.add_sum(row, factor)
        return factor


def _is_transposed(tensor: Tensor, parameter: Tensor) -> bool:
    """Return whether a tensor is the transpose of a matrix, as in the head of language models."""
    return (
        tensor._base is parameter
        and tensor.data_ptr() == parameter.data_ptr()
        and tensor.dim() == parameter.dim() == 2
        and tensor.stride() == parameter.stride()[::-1]
        and tensor.shape == parameter.shape[::-1]
    )
