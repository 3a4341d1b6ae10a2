"""The record of one forward pass, for the proof and for the backward hooks.

Map: `ForwardPass`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from sampimp.importance.ownership.call import tensors_among
from sampimp.importance.ownership.data_rows import DataRows
from sampimp.importance.ownership.layout import AxisLayout
from sampimp.importance.ownership.loss_order import LabelOrders
from sampimp.importance.ownership.operations import REVERSES
from sampimp.importance.ownership.row_notes import is_data
from sampimp.importance.ownership.tape import Tape
from sampimp.importance.ownership.use import Use
from sampimp.importance.ownership.value_moves import moves_samples, pools_by_value
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
    labels: LabelOrders = field(default_factory=LabelOrders)
    """The orders of data, such as labels, that are combined with activations."""

    def note_order(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        is_fixed: Callable[[Tensor], bool],
    ) -> None:
        """Add a call on activations to the signature; set `moves` if it may reorder samples."""
        moves = moves_samples(function, args, kwargs, self.batch, is_fixed)
        if moves or function in REVERSES:
            self.labels.settle()
        if moves or pools_by_value(function, tensors_among(args, kwargs), self.batch):
            # After the model's outputs, no parameter meets the samples that are moved.
            self.moves_above = True
            self.moves |= not self.outputs
        self.signature.add(function, args, kwargs, self.batch.dim + 1)

    def note_labels(self, varying: Sequence[Tensor]) -> None:
        """Note the order of the data among the tensors of an operation on activations."""
        data = [tensor for tensor in varying if is_data(tensor)]
        for tensor in data if len(data) < len(varying) else ():
            rows = self.data.of_pass(tensor)
            if rows is not None and not (rows.is_assumed or rows.is_created):
                self.labels.add(rows)

    def clear(self) -> None:
        """Drop all references to autograd's graph."""
        for container in (self.edges, self.outputs, self.uses, self.tape, self.retained):
            container.clear()
