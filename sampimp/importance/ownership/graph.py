"""What is inside one operation, found in the graph that autograd has made of it.

PyTorch carries out some operations, recurrent layers above all, as many small ones that no caller
sees. Their graph tells them apart: what each saved for its backward pass, and, by a hook, the
gradient that comes to it. Both are taken from where they are, and nothing is computed again.

Map: `between` (finds nodes), `source` (what a node was given), `Inside` (watches nodes) for a
`Reader` (takes what it needs of them).
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sampimp.importance.gradients import Factor

Gradients = Sequence[Tensor | None]


class Reader(Protocol):
    """Takes from nodes what importance needs.

    The nodes hold the reader by their hooks, and what they saved, which it takes, holds them: a
    cycle that no collector sees. `Inside.close` ends it.
    """

    def open(self, nodes: Sequence[Node]) -> None:
        """Take what the nodes have saved, before their backward passes let it go."""

    def take(self, position: int, gradients: Gradients) -> None:
        """Take what came to the outputs of a node; not called where nothing comes."""

    def factors(self) -> Iterable[tuple[Tensor | None, Factor]]:
        """Return parameters with factors of their gradients, when all has come."""


class Inside:
    """Some nodes of an operation, watched during the backward pass."""

    def __init__(self, nodes: Sequence[Node], reader: Reader) -> None:
        self._nodes = nodes
        self._watch = _Watch(reader, len(nodes))
        for position, node in enumerate(nodes):
            node.register_prehook(partial(self._watch.take, position))

    def open(self) -> None:
        """Take what the nodes have saved."""
        assert self._watch.reader is not None  # it is closed later
        self._watch.reader.open(self._nodes)
        self._watch.is_open = True
        self._nodes = ()

    @property
    def is_complete(self) -> bool:
        """Whether a gradient has come to all nodes."""
        return not self._watch.missing

    def close(self) -> Reader:
        """Return the reader, and let it go; once."""
        reader, self._watch.reader = self._watch.reader, None
        assert reader is not None  # it is closed once
        return reader


class _Watch:
    """What the hooks hold: it knows no node, and can be emptied for them all."""

    def __init__(self, reader: Reader, count: int) -> None:
        self.reader: Reader | None = reader
        self.missing = count
        self.is_open = False  # only then gradients are those of the user's pass

    def take(self, position: int, gradients: Gradients) -> None:
        """Give the reader what came to a node."""
        if self.reader is not None and self.is_open:
            self.reader.take(position, gradients)
            self.missing -= 1


def may_read_saved() -> bool:
    """Return whether anybody may read what nodes save.

    Under `saved_tensors_hooks` (checkpointing, save_on_cpu) autograd alone may, once.
    """
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


def source(node: Node, number: int) -> Tensor | None:
    """Return the leaf that was a node's input, itself or transposed; None if it was no leaf."""
    before = node.next_functions[number][0]
    if before is not None and before.name() == "TBackward0":
        before = before.next_functions[0][0]
    return getattr(before, "variable", None)
