"""The loss as a function of the model's outputs: the operations that made it, to be run again.

A coupling that is piecewise linear (a hinge on differences of scores, the mean of the largest
losses, a median) has a second derivative of zero. It is found by changes instead. Where the loss is
computed outside the model, the tape holds its operations; they are run again at outputs that are
changed for some samples, and the first derivatives at all other samples must stay as they are.

Map: `Tape.add` (note operations), `Tape.is_sum` (judge the loss by the names of its operations),
`Tape.couples` (judge it by changes of the outputs).
"""

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sampimp.importance.ownership.layout import AxisLayout, values_of_rows
from sampimp.importance.ownership.operations import (
    CASTS,
    JOINS_AXES,
    LINEAR_IN_FIRST,
    LOSSES_BY_ROW,
)
from sampimp.importance.ownership.signs import sign_patterns

CHANGES = (0.5, 2.0, 8.0)
"""Sizes of the changes of the outputs, in their standard deviations, tried one after the other.

Arbitrary: large enough that another sample becomes the largest, or the next, and that bounds are
passed.
"""


class Tape:
    """The operations since the model returned its outputs."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[Tensor, AxisLayout]] = {}
        """By id: the model's outputs, with the layout of their samples."""
        self._operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def add(self, function: Callable[..., Any], args: Any, kwargs: Any, outputs: Any) -> None:
        """Note an operation if the model has returned."""
        if self.outputs:
            self._operations.append((function, args, kwargs, outputs))

    def is_output(self, node: Node, number: int) -> bool:
        """Return whether an output of a node is one of the model's."""
        return any(
            output.grad_fn is node and output.output_nr == number
            for output, _ in self.outputs.values()
        )

    def clear(self) -> None:
        """Drop all operations and their tensors."""
        self.outputs.clear()
        self._operations.clear()

    def couples(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], size: int
    ) -> bool | None:
        """Return whether the loss couples samples; None if the tape does not hold all of it.

        Parameters
        ----------
        roots, gradients
            The tensors on which `backward` is called, with the gradients passed to it.
        size
            Number of samples, N.
        """
        base = self._derivatives(roots, gradients, {})
        if base is None or not self._is_whole_loss(roots, gradients, base):
            return None
        generator = torch.Generator().manual_seed(0)
        signs = [sign for pattern in sign_patterns(size)[1:] for sign in (pattern, -pattern)]
        for change_size, sign_N in product(CHANGES, signs):
            changed_N = (1 - sign_N) / 2
            changes = {}
            for key, (output, layout) in self.outputs.items():
                noise = torch.randn(output.shape, generator=generator)
                spread = change_size * (output.detach().std(correction=0) + 1e-3)
                changes[key] = noise.to(output) * spread * values_of_rows(changed_N, layout, output)
            derivatives = self._derivatives(roots, gradients, changes)
            if derivatives is None:
                return None
            for key, (output, layout) in self.outputs.items():
                kept = values_of_rows(1 - changed_N, layout, output)
                difference = ((derivatives[key] - base[key]) * kept).abs().max()
                if bool(difference > 64 * torch.finfo(output.dtype).eps * base[key].abs().max()):
                    return True
        return False

    def is_sum(self, roots: Sequence[Tensor]) -> bool:
        """Return whether roots are a sum or mean of PyTorch's losses by row.

        Most losses are, and need no other test. Every operation that depends on the model's
        outputs must take them as its first argument only, and be a cast, a join of axes, a loss by
        row of rows that belong to samples, or linear in such losses.
        """
        last_lengths = {key: output.shape[-1] for key, (output, _) in self.outputs.items()}
        # Tensors whose first axis holds rows of samples: a loss by row may take them.
        rows = {
            key
            for key, (output, layout) in self.outputs.items()
            if layout.axis == 0 and output.dim() > 1
        }
        losses: set[int] = set()
        for function, args, kwargs, outputs in self._operations:
            inputs = [
                value for value in (*args, *kwargs.values()) if _contains(last_lengths, value)
            ]
            if not inputs:
                continue
            if len(inputs) > 1 or not args or inputs[0] is not args[0]:
                return False
            if not (isinstance(inputs[0], Tensor) and isinstance(outputs, Tensor)):
                return False
            source, result = id(args[0]), id(outputs)
            if source in losses:
                if function not in LINEAR_IN_FIRST:
                    return False
                losses.add(result)
            elif function in LOSSES_BY_ROW and source in rows:
                losses.add(result)
            elif function in CASTS:
                rows |= {result} if source in rows else set()
            elif _keeps_last_axis(function, outputs, last_lengths[source]):
                rows.add(result)
            else:
                return False
            last_lengths[result] = outputs.shape[-1] if outputs.dim() else 0
        return bool(losses) and all(id(root) in losses for root in roots)

    def _is_whole_loss(
        self,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        base: Mapping[int, Tensor],
    ) -> bool:
        """Return whether the tape's derivatives are the loss's: it misses no operation."""
        outputs = [output for output, _ in self.outputs.values()]
        derivatives = torch.autograd.grad(
            list(roots), outputs, list(gradients), retain_graph=True, materialize_grads=True
        )
        return all(map(torch.equal, derivatives, base.values()))

    def _derivatives(
        self,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        changes: Mapping[int, Tensor],
    ) -> dict[int, Tensor] | None:
        """Return the derivatives at the changed outputs; None if the operations do not run."""
        leaves = {
            key: (output.detach() + changes[key] if key in changes else output.detach())
            .clone()
            .requires_grad_()
            for key, (output, _) in self.outputs.items()
        }
        # Copies, because operations in place may write into them.
        values: dict[int, Any] = {key: leaf.clone() for key, leaf in leaves.items()}
        try:
            with torch.enable_grad():
                for function, args, kwargs, outputs in self._operations:
                    if not (_contains(values, args) or _contains(values, kwargs)):
                        continue
                    in_place = outputs is args[0] if args else False
                    if in_place and id(outputs) not in values:
                        if function is not Tensor.__setitem__:
                            return None  # the value before the write is lost
                        values[id(outputs)] = outputs.detach().clone()
                    result = function(*_replaced(values, args), **_replaced(values, kwargs))
                    _store(values, outputs, values[id(outputs)] if in_place else result)
                starts = [values[id(root)] for root in roots]
                derivatives = torch.autograd.grad(
                    starts, list(leaves.values()), list(gradients), materialize_grads=True
                )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, KeyError, TypeError):
            return None
        return dict(zip(leaves, derivatives, strict=True))


def _keeps_last_axis(function: Callable[..., Any], output: Tensor, last_length: int) -> bool:
    """Return whether an operation joins all axes but the last: (N, T, C) to (N T, C)."""
    return function in JOINS_AXES and output.dim() == 2 and output.shape[1] == last_length


def _contains(ids: Container[int], value: Any) -> bool:
    """Return whether a value, or a part of it, has one of these ids."""
    if isinstance(value, Mapping):
        return _contains(ids, list(value.values()))
    if isinstance(value, list | tuple):
        return any(_contains(ids, item) for item in value)
    return id(value) in ids


def _replaced(values: Mapping[int, Any], argument: Any) -> Any:
    """Return an argument with its tensors replaced by their values of this run."""
    if isinstance(argument, Mapping):
        return {key: _replaced(values, item) for key, item in argument.items()}
    if isinstance(argument, list | tuple):
        return type(argument)(_replaced(values, item) for item in argument)
    return values.get(id(argument), argument)


def _store(values: dict[int, Any], outputs: Any, results: Any) -> None:
    """Store results under the ids of outputs; outputs without gradient stay constants."""
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            values[id(outputs)] = results
    elif isinstance(outputs, list | tuple):
        for output, result in zip(outputs, results, strict=True):
            _store(values, output, result)
