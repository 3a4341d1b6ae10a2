"""The record of one forward pass, for the proof and for the backward hooks.

Map: `ForwardPass`, and `tensors_among` (tensors in the arguments of a call).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from sampimp.importance.ownership.data_rows import DataRows
from sampimp.importance.ownership.layout import AxisLayout
from sampimp.importance.ownership.tape import Tape
from sampimp.importance.ownership.use import Use
from sampimp.importance.rules.batch import Batch
from sampimp.importance.signature import OperationSignature


@dataclass(eq=False, slots=True)
class ForwardPass:
    """The forward calls between two backward passes of a step.

    The nodes of autograd's graph have hooks that lead here, and this record holds nodes: a
    reference cycle through C++, which Python's garbage collector does not see. `clear` breaks it.
    """

    number: int
    """Number of the pass in its step, from 0."""
    samples: slice
    """Positions of its samples among those of the step."""
    batch: Batch
    data: DataRows
    """Samples of the rows of tensors that have no gradient."""
    signature: OperationSignature
    tape: Tape = field(default_factory=Tape)
    """Operations from the model's outputs to the loss."""
    uses: list[Use] = field(default_factory=list)
    """Forward calls with parameters, in the order of the calls."""
    edges: list[list[tuple[Node, int]]] = field(default_factory=list)
    """For each use, the nodes of its watched outputs, and the outputs' numbers at these nodes."""
    outputs: dict[tuple[Node, int], AxisLayout] = field(default_factory=dict)
    """Outputs of the model that have an axis of samples."""
    retained: list[Tensor] = field(default_factory=list)
    """Tensors whose gradient the user keeps (`retain_grad`)."""
    open_uses: dict[int, int] = field(default_factory=dict)
    """Uses whose output gradient has not arrived yet, by row of the parameter."""
    moves: bool = False
    """Whether samples may be on other rows in each step."""
    moves_above: bool = False
    """Whether an operation after the last use so far may put samples on other rows."""

    def clear(self) -> None:
        """Drop all references to autograd's graph."""
        for container in (self.edges, self.outputs, self.uses, self.tape, self.retained):
            container.clear()


def tensors_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and those in lists and tuples among them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


def argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any
) -> Any:
    """Return an argument that is passed by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)
