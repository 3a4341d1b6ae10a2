"""Read the nodes inside one operation from the graph that autograd has made of it.

PyTorch carries out some operations, recurrent layers above all, as many small operations that
`TorchFunctionMode` does not see. Autograd's graph contains a node for each of them. A node holds
the tensors that it saved for the backward pass, and a hook on it receives its output gradient. Both
are read from the graph, so nothing is computed again.

Map: `nodes_between` (find nodes by name), `leaf_input` (the parameter that is a node's input),
`InnerNodes` (hooks on the nodes of one call), `NodeReader` (the interface of their reader),
`may_read_saved_tensors` (whether autograd permits it).
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sampimp.importance.gradients import Factor

Gradients = Sequence[Tensor | None]


class NodeReader(Protocol):
    """Collects from nodes what a rule needs for importance.

    The hooks on the nodes hold the reader, and the saved tensors that the reader takes hold the
    nodes: a reference cycle through C++, which Python's garbage collector does not see.
    `InnerNodes.close` breaks it.
    """

    def open(self, nodes: Sequence[Node]) -> None:
        """Take the saved tensors of the nodes, before their backward passes release these."""

    def take(self, position: int, gradients: Gradients) -> None:
        """Take the output gradients of the node at a position.

        The method is not called for a node that no gradient reaches.
        """

    def factors(self) -> Iterable[tuple[Tensor | None, Factor]]:
        """Return pairs of a parameter and a factor of its per-sample gradients.

        To be called when all output gradients have arrived.
        """


class InnerNodes:
    """Nodes inside one operation, with hooks that pass their output gradients to a reader.

    Parameters
    ----------
    nodes
        In the order of the forward pass.
    reader
        Receives saved tensors and output gradients.
    """

    def __init__(self, nodes: Sequence[Node], reader: NodeReader) -> None:
        self._nodes = nodes
        self._receiver = _Receiver(reader, len(nodes))
        for position, node in enumerate(nodes):
            node.register_prehook(partial(self._receiver.take, position))

    def open(self) -> None:
        """Pass the saved tensors to the reader, and output gradients from now on."""
        assert self._receiver.reader is not None  # close() comes later
        self._receiver.reader.open(self._nodes)
        self._receiver.is_open = True
        self._nodes = ()

    @property
    def is_complete(self) -> bool:
        """Whether an output gradient has arrived at every node."""
        return not self._receiver.missing

    def close(self) -> NodeReader:
        """Return the reader and drop all references to it; to be called once."""
        reader, self._receiver.reader = self._receiver.reader, None
        assert reader is not None  # close() is called once
        return reader


class _Receiver:
    """The object that the hooks hold: it refers to no node, and `close` removes its reader."""

    def __init__(self, reader: NodeReader, count: int) -> None:
        self.reader: NodeReader | None = reader
        self.missing = count
        self.is_open = False  # before that, gradients are those of a proof, not of the user's pass

    def take(self, position: int, gradients: Gradients) -> None:
        """Pass the output gradients of a node to the reader."""
        if self.reader is not None and self.is_open:
            self.reader.take(position, gradients)
            self.missing -= 1


def may_read_saved_tensors() -> bool:
    """Return whether the saved tensors of nodes can be read.

    Under `saved_tensors_hooks` (checkpointing, save_on_cpu) they can be unpacked only once, and
    autograd itself needs that.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def nodes_between(
    outputs: Iterable[Tensor], inputs: Iterable[Tensor], names: Collection[str]
) -> list[Node]:
    """Return the nodes with these names between inputs and outputs, in order of creation."""
    visited = {tensor.grad_fn for tensor in inputs}
    waiting = [tensor.grad_fn for tensor in outputs]
    named: list[Node] = []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in visited:
            visited.add(node)
            waiting += [child for child, _ in node.next_functions]
            if node.name() in names:
                named.append(node)
    return sorted(named, key=lambda node: node._sequence_nr())


def leaf_input(node: Node, number: int) -> Tensor | None:
    """Return the leaf that is a node's input, as it is or transposed; None if it is no leaf."""
    child = node.next_functions[number][0]
    if child is not None and child.name() == "TBackward0":
        child = child.next_functions[0][0]
    return getattr(child, "variable", None)
