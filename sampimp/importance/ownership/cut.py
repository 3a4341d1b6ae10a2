"""The cut: edges of autograd's graph at which the samples' signs are applied.

The graph leads from the tensors on which `backward` is called down to the outputs of layers. Near
the loss, tensors have no axis of samples any more. A cut is a set of edges below that part that
separates the loss from the layers: preferably the edges of the model's outputs, else the first
edges on the way down whose tensor has an axis of N samples.

Multiplying the gradient on each edge of the cut by the weights v of the rows' samples gives, at
every node below, the gradient of the weighted loss, provided that the part above the cut is a sum
over samples (`sampimp.importance.ownership.coupling`).

Map: `BackwardGraph` (nodes between the loss and the watched outputs, and cuts through them), `Cut`
(applies signs), `CutEdge`, `nodes_below`.

Shape suffix: N samples.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from sampimp.importance.ownership.layout import AxisLayout, on_axis


class CutEdge(NamedTuple):
    """An edge of autograd's graph on which signs are applied."""

    consumer: Node | None
    """The node above the edge; None for an edge of a tensor on which `backward` is called."""
    position: int
    """Index of the edge among the consumer's, or of the tensor among those of `backward`."""
    node: Node
    """The node below the edge."""
    number: int
    """Number of the output of `node` whose gradient the edge carries."""
    layout: AxisLayout
    """How the samples lie in that output."""


class BackwardGraph:
    """The part of autograd's graph from tensors on which `backward` is called to watched outputs.

    Parameters
    ----------
    roots
        The nodes of those tensors, each with the number of its output; None for a tensor that needs
        no gradient.
    watched
        The nodes of the watched outputs.

    Attributes
    ----------
    leads_to_watched
        Whether a node of the graph, or a node below it, is watched.
    lowest
        The watched nodes that have no other watched node below them.
    """

    def __init__(self, roots: Sequence[tuple[Node, int] | None], watched: Collection[Node]) -> None:
        self.roots = roots
        self.leads_to_watched: dict[Node, bool] = {}
        self.lowest = set(watched)
        # Depth first; a node comes off the stack a second time when all below it is done.
        stack = [(root[0], False) for root in roots if root is not None]
        while stack:
            node, done = stack.pop()
            children = [child for child, _ in node.next_functions if child is not None]
            if done:
                is_above_watched = any(self.leads_to_watched[child] for child in children)
                if is_above_watched:
                    self.lowest.discard(node)
                self.leads_to_watched[node] = is_above_watched or node in watched
            elif node not in self.leads_to_watched:
                self.leads_to_watched[node] = False
                stack.append((node, True))
                stack += [
                    (child, False) for child in children if child not in self.leads_to_watched
                ]
        self.lowest &= self.leads_to_watched.keys()

    def cut(self, layout_at: Callable[[Node, int], AxisLayout | None]) -> "Cut":
        """Return the first edges on the way down for which `layout_at` names a layout."""
        edges: list[CutEdge] = []
        above: set[Node] = set()
        waiting: list[Node] = []

        def descend(consumer: Node | None, position: int, node: Node, number: int) -> None:
            if not self.leads_to_watched[node]:
                return
            layout = layout_at(node, number)
            if layout is not None:
                edges.append(CutEdge(consumer, position, node, number, layout))
            elif node not in above:
                above.add(node)
                waiting.append(node)

        for position, root in enumerate(self.roots):
            if root is not None:
                descend(None, position, *root)
        while waiting:
            consumer = waiting.pop()
            for position, (node, number) in enumerate(consumer.next_functions):
                if node is not None:
                    descend(consumer, position, node, number)
        return Cut(edges, above)


def nodes_below(edges: Sequence[CutEdge]) -> set[Node]:
    """Return all nodes below edges."""
    visited: set[Node] = set()
    waiting = [edge.node for edge in edges]
    while waiting:
        node = waiting.pop()
        if node not in visited:
            visited.add(node)
            waiting += [child for child, _ in node.next_functions if child is not None]
    return visited


@dataclass
class Cut:
    """Edges that separate the loss from watched outputs."""

    edges: list[CutEdge]
    above: set[Node]
    """Nodes between the loss and the edges."""

    @contextmanager
    def signs(self, sign_N: Tensor) -> Iterator[None]:
        """Multiply the gradient on each edge below a node by the signs of its rows' samples.

        The edges of the tensors on which `backward` is called have no node above: see
        `root_gradients`.
        """
        with ExitStack() as stack:
            by_consumer: dict[Node, list[CutEdge]] = {}
            for edge in self.edges:
                if edge.consumer is not None:
                    by_consumer.setdefault(edge.consumer, []).append(edge)
            for consumer, edges in by_consumer.items():
                handle = consumer.register_hook(partial(_apply_signs, edges, sign_N))
                stack.callback(handle.remove)
            yield

    def root_gradients(
        self, gradients: Sequence[Tensor | None], sign_N: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the gradients that `backward` starts from, times the signs of their samples."""
        signed = list(gradients)
        for edge in self.edges:
            gradient = gradients[edge.position] if edge.consumer is None else None
            if gradient is not None:
                signed[edge.position] = _signed(gradient, edge.layout, sign_N)
        return signed


def _apply_signs(
    edges: Sequence[CutEdge],
    sign_N: Tensor,
    inputs: Sequence[Tensor | None],
    _outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients that a node passes on, with signs: a hook on the consumer of edges."""
    gradients = list(inputs)
    for edge in edges:
        gradient = gradients[edge.position]
        if gradient is not None:
            gradients[edge.position] = _signed(gradient, edge.layout, sign_N)
    return tuple(gradients)


def _signed(gradient: Tensor, layout: AxisLayout, sign_N: Tensor) -> Tensor:
    rows = gradient.shape[layout.axis]
    sign_R = sign_N[layout.samples(rows, len(sign_N))].to(gradient)
    return gradient * on_axis(sign_R, layout.axis, gradient.dim())
