"""Hooks on the outputs of a forward call, which receive the output gradients.

Map: `hook_output` (a call with one output), `hook_outputs` (a call with several),
`_JointOutputs` (an autograd function that collects several gradients).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

OutputEdge = tuple[Node, int]
"""The node of an output, and the output's number at this node."""


def hook_output(
    output: Tensor, receive: Callable[[int, Sequence[Tensor | None]], None]
) -> OutputEdge:
    """Register a hook for the gradient of a call's only output.

    The hook is on the output's node, where it runs after all hooks that the user has on the tensor.
    It calls `receive` with the output's number and the gradients of the node's outputs.
    """
    whole = _whole_of(output)
    node, number = whole.grad_fn, whole.output_nr
    assert node is not None  # it is computed from parameters, and is none itself
    node.register_prehook(partial(receive, number))
    return node, number


def hook_outputs(
    outputs: Sequence[Any], hooked: Sequence[Tensor], receive: Callable[..., None]
) -> tuple[list[OutputEdge], Any]:
    """Register one hook for the gradients of several outputs.

    The hook is on copies of the outputs, because an output may be computed from another one (an
    LSTM cell's h from its c), whose gradient would then contain both parts.

    Parameters
    ----------
    outputs
        All outputs of the call.
    hooked
        The outputs that have a gradient.
    receive
        To be called with a function for each output that makes a zero gradient, the places of the
        hooked outputs, and their gradients.

    Returns
    -------
    edges
        Edges of the copies.
    outputs
        The outputs, with copies in place of the hooked ones.
    """
    # A hook that refers to its own outputs would prevent their release: 1.5 MB a step.
    zeros = [
        partial(torch.zeros, output.shape, dtype=output.dtype, device=output.device)
        if isinstance(output, Tensor)
        else lambda: None
        for output in outputs
    ]
    hooked_ids = set(map(id, hooked))
    places = [i for i, output in enumerate(outputs) if id(output) in hooked_ids]
    copies = _JointOutputs.apply(partial(receive, zeros, places), *hooked)
    replaced = list(outputs)
    for i, copy in zip(places, copies, strict=True):
        replaced[i] = copy
    kind: Any = type(outputs)  # a named tuple, for instance
    return [(copy.grad_fn, copy.output_nr) for copy in copies], kind(replaced)


class _JointOutputs(torch.autograd.Function):
    """Copy outputs so that one callback gets all their gradients."""

    @staticmethod
    def forward(
        ctx: Any, receive: Callable[[Sequence[Tensor | None]], None], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Copy the outputs."""
        ctx.receive = receive
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Call the callback, with None for outputs without a gradient; pass the gradients on."""
        ctx.receive(gradients)
        return None, *gradients


def _whole_of(output: Tensor) -> Tensor:
    """Return the tensor of which an output is a view, if it has the same entries in another shape.

    A linear layer with a bias on three axes returns such a view. A later in-place operation on the
    view would leave the view's own node out of the graph.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
