"""What is inside one operation, found in the graph that autograd has made of it.

PyTorch carries out some operations, recurrent layers above all, as many small ones that no caller
sees. Their graph tells them apart: what each saved for its backward pass, and, by a hook, the
gradient that comes to it. Both are taken from where they are, and nothing is computed again.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sampimp.factors import Factor

Gradients = Sequence[Tensor | None]


class Reader(Protocol):
    """What is to be known of some nodes; it must not hold them, who hold it."""

    def open(self, nodes: Sequence[Node]) -> None:
        """Take what the nodes have saved, before their backward passes let it go."""

    def take(self, position: int, gradients: Gradients) -> None:
        """Take what came to the outputs of a node; not called where nothing comes."""

    def factors(self) -> Iterable[tuple[Tensor | None, Factor]]:
        """Return parameters with factors of their gradients, when the backward pass is over."""


class Inside:
    """Some nodes of an operation, watched during the backward pass."""

    def __init__(self, nodes: Sequence[Node], reader: Reader) -> None:
        self._nodes = nodes
        self._reader = [reader]
        for position, node in enumerate(nodes):
            node.register_prehook(partial(_take, self._reader, position))

    def open(self) -> None:
        """Take what the nodes have saved."""
        self._reader[0].open(self._nodes)
        self._nodes = ()

    def close(self) -> Reader:
        """Return the reader, and let it go: graph and hooks may wait long for the collector."""
        return self._reader.pop()


def _take(readers: Sequence[Reader], position: int, gradients: Gradients) -> None:
    for reader in readers:
        reader.take(position, gradients)


def is_shown() -> bool:
    """Return whether what nodes save may be read: under checkpointing, autograd alone may, once."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def between(
    outputs: Iterable[Tensor], inputs: Iterable[Tensor], names: Collection[str]
) -> list[Node]:
    """Return the nodes of these names by which outputs were made of inputs, in their order."""
    seen = {one.grad_fn for one in inputs}
    waiting = [one.grad_fn for one in outputs]
    found: list[Node] = []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [function for function, _ in node.next_functions]
            if node.name() in names:
                found.append(node)
    return sorted(found, key=lambda node: node._sequence_nr())


def source(node: Node | None, number: int) -> tuple[int, int]:
    """Return a key of what a node's input came from, as `key` gives it for a tensor."""
    variable = getattr(node, "variable", None)
    return (id(node), number) if variable is None else (id(variable), 0)


def key(tensor: Tensor) -> tuple[int, int]:
    """Return a key of a tensor in the graph."""
    return (id(tensor), 0) if tensor.is_leaf else (id(tensor.grad_fn), tensor.output_nr)
