"""The extra backward passes of a proof, which have no side effects.

Each pass goes from the loss, with one pattern of signs at the cut, down to the outputs of the uses
(`torch.autograd.grad` with these as inputs), so no gradient of a parameter is computed. The user's
hooks run in each pass, and so does Python code in checkpointed blocks; buffers and random states
that they change are restored. The hooks of other recorders call `is_proved_now`, and ignore the
pass.

Map: `SignPasses` (runs the passes, and decodes owners), `side_effects_undone`, `announced`,
`is_proved_now`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership import refusals
from sampimp.importance.ownership.cut import BackwardGraph, Cut
from sampimp.importance.ownership.signs import OwnerDecoder, sign_patterns, weight_pattern
from sampimp.importance.ownership.use import Use

_proved_graphs: list[Mapping[Node, bool]] = []
"""The nodes of graphs over which proofs are running now."""

_WEIGHT_PASS = -1
"""Number of the pass with weights instead of signs."""


class SignPasses:
    """The passes of one proof, and the owners of the uses' rows that they show.

    Parameters
    ----------
    uses
        Uses of the user's pass, in the order of their calls.
    edges
        For each use, the nodes of its watched outputs, each with the number of the node's output.
    model
        The model, whose buffers are restored after each pass.
    size
        Number of samples, N.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        edges: Sequence[Sequence[tuple[Node, int]]],
        model: nn.Module,
        size: int,
    ) -> None:
        self._model, self._edges, self._size = model, edges, size
        self._decoders = [
            [OwnerDecoder(shape, len(shape) - use.features) for shape in use.shapes] for use in uses
        ]
        self._pass: int | None = None  # number of the pass that runs now

    def owners(self, use: Use) -> list[Tensor]:
        """Return the owners of the rows of each output of a use."""
        return [decoder.owners(self._size) for decoder in self._decoders[use.position]]

    def take(self, use: Use, gradients: Sequence[Tensor | None]) -> None:
        """Take the output gradients of a use in the pass that runs now."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for decoder, gradient in zip(self._decoders[use.position], gradients, strict=True):
                self._decode(decoder, gradient)

    def _decode(self, decoder: OwnerDecoder, gradient: Tensor | None) -> None:
        if self._pass == _WEIGHT_PASS:
            decoder.add_weight_pass(gradient)
        elif self._pass is not None:
            decoder.add_sign_pass(gradient, self._pass)

    def run(
        self,
        graph: BackwardGraph,
        cut: Cut,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Run one pass for each pattern of signs, and one with weights.

        Raises
        ------
        UnsupportedError
            The graph does not allow several backward passes.
        """
        # Autograd ends a pass at its inputs, and calls no hook for them; so the gradients of the
        # lowest uses are results of the pass, and those of all others arrive by hooks.
        lowest = [
            (decoder, GradientEdge(node, number))
            for decoders, edges in zip(self._decoders, self._edges, strict=True)
            for decoder, (node, number) in zip(decoders, edges, strict=True)
            if node in graph.lowest
        ]
        starts = [
            torch.ones_like(root) if gradient is None else gradient
            for root, gradient in zip(roots, gradients, strict=True)
        ]
        patterns = enumerate(sign_patterns(self._size))
        passes = [*patterns, (_WEIGHT_PASS, weight_pattern(self._size))]
        with side_effects_undone(self._model) as undo:
            for self._pass, sign_N in passes:
                with cut.signs(sign_N):
                    try:
                        results = torch.autograd.grad(
                            list(roots),
                            [edge for _, edge in lowest],
                            list(cut.root_gradients(starts, sign_N)),
                            retain_graph=True,
                            allow_unused=True,
                        )
                    except UnsupportedError:
                        raise
                    except Exception as error:  # any class: the graph may hold the user's code
                        raise refusals.backward_not_repeatable(error) from error
                for (decoder, _), gradient in zip(lowest, results, strict=True):
                    self._decode(decoder, gradient)
                undo()
        self._pass = None


@contextmanager
def side_effects_undone(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore buffers and random states, which checkpoints and hooks change in backward passes.

    Yields
    ------
    Callable
        Restores them between two passes.
    """
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    state = torch.get_rng_state()
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda_states: Any = torch.cuda.get_rng_state_all() if on_cuda else []

    def restore() -> None:
        torch.set_rng_state(state)
        if on_cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        for buffer, version, values in buffers:
            if buffer._version != version:
                # By .data, whose changes autograd does not count: the graph may have saved the
                # buffer, and would refuse another version of it.
                buffer.data.copy_(values)

    try:
        yield restore
    finally:
        restore()


def is_proved_now(node: Node) -> bool:
    """Return whether a proof runs over a node, so that its gradients are not the user's."""
    return any(node in graph for graph in _proved_graphs)


@contextmanager
def announced(graph: BackwardGraph) -> Iterator[None]:
    """Register a graph, so that all recorders ignore backward passes over it as a proof's."""
    _proved_graphs.append(graph.leads_to_watched)
    try:
        yield
    finally:
        _proved_graphs.remove(graph.leads_to_watched)
