"""The loss as a function of the model's outputs, from the operations that made it.

What couples samples piecewise linearly (a hinge on differences of their scores, the mean of the
largest losses, a median) has no second derivative that would show it. Where the loss was computed
outside the model, its operations are carried out again at outputs that are changed for some
samples: the first derivatives at all others must stay as they are.

Map: `Tape` (operations), `Tape.is_sum` (by their names), `Tape.couples` (by carrying them out).
"""

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

from sampimp.importance.ownership.layout import AxisLayout, sign_patterns, values_of_rows

CHANGES = (0.5, 2.0, 8.0)
"""By how much outputs are changed, in their standard deviations, one after the other.

Arbitrary; so that other samples become the largest, or the next, and that bounds are passed.
"""


BY_ROW = {
    functional.cross_entropy,
    functional.nll_loss,
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.kl_div,
}
"""Losses that are a sum or mean over the rows of their input."""
CASTS = {Tensor.float, Tensor.double, Tensor.to, Tensor.contiguous}
JOINS = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}
LINEAR = CASTS | {
    *(torch.sum, torch.mean, Tensor.sum, Tensor.mean, Tensor.neg, Tensor.__neg__),
    *(Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__),
    *(Tensor.div, torch.div, Tensor.__truediv__, Tensor.view, Tensor.reshape, Tensor.__getitem__),
}
"""Operations that are linear in their first argument."""


class Tape:
    """Operations since the model returned its outputs."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[Tensor, AxisLayout]] = {}
        """By id: of the model, with the samples' axis."""
        self._operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def add(self, function: Callable[..., Any], args: Any, kwargs: Any, outputs: Any) -> None:
        """Keep an operation, if the model has returned."""
        if self.outputs:
            self._operations.append((function, args, kwargs, outputs))

    def holds(self, node: Node, number: int) -> bool:
        """Return whether a node's output is one from which the operations begin."""
        return any(
            one.grad_fn is node and one.output_nr == number for one, _ in self.outputs.values()
        )

    def clear(self) -> None:
        """Forget all operations, and their tensors."""
        self.outputs.clear()
        self._operations.clear()

    def couples(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], size: int
    ) -> bool | None:
        """Return whether the loss couples samples; None if it is not known as a function.

        Parameters
        ----------
        roots, gradients
            The tensors on which `backward` is called, with the gradients that it is given.
        size
            Number of samples, N.
        """
        base = self._derivatives(roots, gradients, {})
        if base is None or not self._agree(roots, gradients, base):
            return None
        generator = torch.Generator().manual_seed(0)
        signs = [sign for pattern in sign_patterns(size)[1:] for sign in (pattern, -pattern)]
        for size_of_change, sign_N in product(CHANGES, signs):
            changed_N = (1 - sign_N) / 2
            changes = {}
            for key, (output, layout) in self.outputs.items():
                noise = torch.randn(output.shape, generator=generator)
                spread = size_of_change * (output.detach().std(correction=0) + 1e-3)
                changes[key] = noise.to(output) * spread * values_of_rows(changed_N, layout, output)
            found = self._derivatives(roots, gradients, changes)
            if found is None:
                return None
            for key, (output, layout) in self.outputs.items():
                kept = values_of_rows(1 - changed_N, layout, output)
                difference = ((found[key] - base[key]) * kept).abs().max()
                if bool(difference > 64 * torch.finfo(output.dtype).eps * base[key].abs().max()):
                    return True
        return False

    def is_sum(self, roots: Sequence[Tensor]) -> bool:
        """Return whether tensors are losses of PyTorch's, by row, of which a sum or mean is taken.

        As most are, which need no test.
        """
        made = {key: output.shape[-1] for key, (output, layout) in self.outputs.items()}
        # What a loss by row may be given: outputs with samples first, or rows of them joined.
        rows = {key for key, (output, layout) in self.outputs.items() if layout.axis == 0}
        rows = {key for key in rows if self.outputs[key][0].dim() > 1}
        losses: set[int] = set()
        for function, args, kwargs, outputs in self._operations:
            given = [one for one in (*args, *kwargs.values()) if _has(made, one)]
            if not given:
                continue
            if len(given) > 1 or not args or given[0] is not args[0]:
                return False
            if not isinstance(outputs, Tensor):
                return False
            source = id(args[0])
            if source in losses:
                if function not in LINEAR:
                    return False
                losses.add(id(outputs))
            elif function in BY_ROW and source in rows:
                losses.add(id(outputs))
            elif function in CASTS:
                rows |= {id(outputs)} if source in rows else set()
            elif function in JOINS and outputs.dim() == 2 and outputs.shape[1] == made[source]:
                rows.add(id(outputs))
            else:
                return False
            made[id(outputs)] = outputs.shape[-1] if outputs.dim() else 0
        return bool(losses) and all(id(root) in losses for root in roots)

    def _agree(
        self,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        base: Mapping[int, Tensor],
    ) -> bool:
        """Return whether derivatives are those of the loss itself: no operation was missed."""
        outputs = [output for output, _ in self.outputs.values()]
        real = torch.autograd.grad(
            list(roots), outputs, list(gradients), retain_graph=True, materialize_grads=True
        )
        return all(map(torch.equal, real, base.values()))

    def _derivatives(
        self,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        changes: Mapping[int, Tensor],
    ) -> dict[int, Tensor] | None:
        """Return the derivatives at the changed outputs; None if it cannot be carried out."""
        leaves = {
            key: (output.detach() + changes[key] if key in changes else output.detach())
            .clone()
            .requires_grad_()
            for key, (output, _) in self.outputs.items()
        }
        # As copies, which an operation in place may change.
        now: dict[int, Any] = {key: leaf.clone() for key, leaf in leaves.items()}
        try:
            with torch.enable_grad():
                for function, args, kwargs, outputs in self._operations:
                    if not (_has(now, args) or _has(now, kwargs)):
                        continue
                    writes = outputs is args[0] if args else False
                    if writes and id(outputs) not in now:
                        if function is not Tensor.__setitem__:
                            return None  # its first value is not known any more
                        now[id(outputs)] = outputs.detach().clone()
                    result = function(*_replaced(now, args), **_replaced(now, kwargs))
                    _note(now, outputs, now[id(outputs)] if writes else result)
                starts = [now[id(root)] for root in roots]
                found = torch.autograd.grad(
                    starts, list(leaves.values()), list(gradients), materialize_grads=True
                )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, KeyError, TypeError):
            return None
        return dict(zip(leaves, found, strict=True))


def _has(now: Container[int], value: Any) -> bool:
    if isinstance(value, Mapping):
        return _has(now, list(value.values()))
    if isinstance(value, list | tuple):
        return any(_has(now, one) for one in value)
    return id(value) in now


def _replaced(now: Mapping[int, Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(now, one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(now, one) for one in value)
    return now.get(id(value), value)


def _note(now: dict[int, Any], outputs: Any, results: Any) -> None:
    """Note results in place of outputs; what has no gradient is a constant of the step."""
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            now[id(outputs)] = results
    elif isinstance(outputs, list | tuple):
        for output, result in zip(outputs, results, strict=True):
            _note(now, output, result)
