"""A use: one recorded call of a torch function with parameters.

The recorder notes a `Use` for every forward call on both parameters and samples. The proof
finds out how samples lie in its outputs, and a rule turns its output gradients into per-sample
gradients of its parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sampimp.importance.ownership.row_notes import SampleRows
from sampimp.importance.rules.batch import Batch
from sampimp.importance.rules.inner_nodes import InnerNodes
from sampimp.importance.rules.registry import looks_inside


@dataclass(eq=False)
class Use:
    """A forward call with a parameter, or a tensor derived only from parameters, as argument."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    roots: frozenset[int]
    """Positions of the parameters among those of the model."""
    shapes: Sequence[tuple[int, ...]]
    """Shapes of the watched outputs."""
    features: int
    """Number of an output's last axes that belong to one row."""
    data: SampleRows | None
    """Samples of the rows of its input, if that is data; None for activations or where unknown."""
    number: int
    """Number of the backward pass in the step."""
    position: int
    """Position among the uses of the pass."""
    exempt: bool = False
    """Whether it has no importance because it is called before a BatchNorm in training mode."""
    inner: InnerNodes | tuple[Tensor, int] | None = None
    """For rules that need it: the nodes inside the operation, or its detached output and version.

    The output is detached because, with its hook, it would be part of a reference cycle.
    """
    done: bool = False
    """Whether its output gradient has arrived."""

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Shape of the axes that may hold samples; of a recurrent layer, the axis of sequences."""
        if looks_inside(self.function):
            return self.shapes[-1][-2:-1]
        return self.shapes[0][: len(self.shapes[0]) - self.features]

    def axes(self, batch: Batch) -> list[int]:
        """Return the axes that may hold samples, the expected one first."""
        axes = range(len(self.rows_shape))
        expected = batch.axis(len(self.shapes[0]), 1)
        return sorted(axes, key=lambda axis: (axis != expected, axis))

    @property
    def name(self) -> str:
        """Name of the function, for messages."""
        return getattr(self.function, "__name__", str(self.function))
