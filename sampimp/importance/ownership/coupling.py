"""Whether a loss is a sum over samples, or couples them.

Signs at the cut give the gradient of the weighted loss only if the part above the cut is a sum over
samples, sum_i v_i l_i(z_i), where z_i are the values of sample i at the cut. A loss that couples
samples, such as a contrastive one, has no parts that belong to one sample each. Three tests decide,
the cheapest first:

1. By name: PyTorch's losses by row, of which a sum or mean is taken (`Tape.is_sum`).
2. By the second derivative: that of a sum has no entry that joins two samples (`couples`).
3. By changes: where the loss is known as a function of the model's outputs, the outputs of some
   samples are changed, and the first derivatives at all others must not change (`Tape.couples`).
   This finds couplings that are piecewise linear, whose second derivative is zero.

Map: `loss_kind` (the three tests), `couples` (the second derivative), `SUM`, `COUPLED`, `UNCHECKED`
(the results), `CoupledLossError`.

Shape suffix: N samples.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership.cut import Cut
from sampimp.importance.ownership.layout import AxisLayout, values_of_rows
from sampimp.importance.ownership.passes import side_effects_undone
from sampimp.importance.ownership.signs import sign_patterns
from sampimp.importance.ownership.tape import Tape

SUM, COUPLED, UNCHECKED = (
    "sum over samples",
    "coupled: its derivative at each sample's outputs is taken as a constant",
    "not checked: it has no second derivative",
)
"""The three results of the tests; stored in the attribute `loss` of a result."""

PASS_THROUGH = {"_JointOutputsBackward"}
"""Nodes of this library's own functions that pass gradients on unchanged."""


class CoupledLossError(UnsupportedError):
    """A loss that is not a sum over samples."""


def loss_kind(
    cut: Cut,
    roots: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    size: int,
    tape: Tape,
    model: nn.Module,
    coupled_loss: str,
) -> str:
    """Return `SUM`, `COUPLED` or `UNCHECKED` for the part of the graph above a cut.

    Parameters
    ----------
    cut
        Its edges carry the values of the samples.
    roots, gradients
        The tensors on which `backward` is called, with the gradients passed to it.
    size
        Number of samples, N.
    tape
        The operations of the loss.
    model
        Its buffers and the random states are restored after the tests.
    coupled_loss
        "constant" to accept a coupled loss, as `COUPLED`.

    Raises
    ------
    CoupledLossError
        The loss couples samples, and `coupled_loss` is not "constant".
    """
    # Where the cut is the model's outputs, the loss may be known as a function of them.
    at_outputs = all(tape.is_output(edge.node, edge.number) for edge in cut.edges)
    if at_outputs and tape.is_sum(roots):
        return SUM
    with side_effects_undone(model):
        is_coupled = couples(cut, roots, gradients, size)
        if at_outputs and is_coupled is not True:
            by_change = tape.couples(roots, gradients, size)
            is_coupled = is_coupled if by_change is None else by_change
    if is_coupled and coupled_loss == "constant":
        return COUPLED
    if is_coupled:
        raise CoupledLossError(
            expected="a loss that is a sum over samples, each term made of one sample's outputs",
            got="a loss that mixes the outputs of several samples, so that no part of it belongs "
            "to one sample",
            where="the loss",
            todo="train on a sum or mean of the samples' losses; or take the loss's derivative at "
            'the outputs as a constant: coupled_loss="constant"',
        )
    if is_coupled is None:
        warnings.warn(
            "this loss has no second derivative, so it was not checked that it is a sum over "
            "samples",
            stacklevel=2,
        )
        return UNCHECKED
    return SUM


def couples(
    cut: Cut, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], size: int
) -> bool | None:
    """Return whether the second derivative above a cut joins samples; None if there is none.

    For each bit of i + 1, take a random direction that is zero except on the samples with that bit.
    The second derivative times this direction is zero on all other samples if the loss is a sum
    over samples. Any two samples differ in some bit, so every pair is tested. A loss that is
    piecewise linear (a hinge on differences of samples' scores, a median) passes.
    """
    # The second derivative of a user's autograd.Function need not be that of its first derivative.
    has_custom_function = any(
        isinstance(node, torch.autograd.function.BackwardCFunction)
        and node.name() not in PASS_THROUGH
        for node in cut.above
    )
    edges = list(dict.fromkeys((edge.node, edge.number, edge.layout) for edge in cut.edges))
    ends = [GradientEdge(node, number) for node, number, _ in edges]
    layouts = [layout for _, _, layout in edges]
    try:
        firsts = torch.autograd.grad(
            list(roots), ends, list(gradients), create_graph=True, allow_unused=True
        )
        known = [
            (first, layout)
            for first, layout in zip(firsts, layouts, strict=True)
            if first is not None and first.requires_grad
        ]
        is_coupled = _joins_samples(known, ends, layouts, size) if known else False
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return None if has_custom_function and is_coupled is False else is_coupled


def _joins_samples(
    firsts: Sequence[tuple[Tensor, AxisLayout]],
    ends: Sequence[GradientEdge],
    layouts: Sequence[AxisLayout],
    size: int,
) -> bool | None:
    """Return whether a change of some samples changes the first derivatives at others.

    None if the second derivative is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    for sign_N in sign_patterns(size)[1:]:
        chosen_N = (1 - sign_N) / 2
        directions = [
            torch.randn(first.shape, generator=generator, dtype=_real_dtype(first)).to(first)
            * values_of_rows(chosen_N, layout, first)
            for first, layout in firsts
        ]
        seconds = torch.autograd.grad(
            [first for first, _ in firsts],
            ends,
            directions,
            retain_graph=True,
            allow_unused=True,
        )
        for second, layout in zip(seconds, layouts, strict=True):
            if second is None:
                continue
            is_other = values_of_rows(chosen_N, layout, second) == 0
            others = second[is_other.expand(second.shape)]
            if not bool(others.isfinite().all()):
                return None
            if bool(others.any()):  # exactly zero for a sum: a product with zeros
                return True
    return False


def _real_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32
