"""Read the nodes inside recurrent operations from autograd's graph, on a CPU.

PyTorch carries out all steps of all layers in one operation, whose output shows neither the gates
nor their gradients. On a CPU the graph behind that output has nodes for what is inside:

    RNN, GRU        every matrix product, of the inputs (all steps at once) and of each step
    LSTM            the same in float64; in float32 one oneDNN node for each layer and direction

All factors follow from the products alone (`_MatrixProducts`). A layer's node gives inputs, outputs
and their gradients, from which the layer is backpropagated again (`_FusedLayers`). On a GPU there
is one node without inner values, and the rule recomputes (`sampimp.importance.rules.recurrent`).

Map: `look_into_layer` and `look_into_cell`, which return the nodes with a reader, or None if a part
is missing.

Shape suffixes: T steps, N samples, I inputs, H units, G gates times units.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.utils.rnn import pad_sequence

from sampimp.importance.gradients import Outer
from sampimp.importance.rules.batch import Batch, Factors
from sampimp.importance.rules.inner_nodes import (
    Gradients,
    InnerNodes,
    leaf_input,
    may_read_saved_tensors,
    nodes_between,
)
from sampimp.importance.rules.recurrent_backward import (
    CELLS,
    GateDeltas,
    LayerRun,
    backpropagate,
    by_sample,
    layer_factors,
)
from sampimp.importance.rules.recurrent_call import RecurrentCall, cell_arguments

_LAYER = "MkldnnRnnLayerBackward0"
_SAVED_VALUES = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
"""Nodes of values @ weight^T, and the attribute that holds the values."""

INPUT, HIDDEN, UNITS = range(3)
"""What a weight multiplies: the inputs, h, and for projections the units of an LSTM.

The numbers are the places of the weights in `LayerWeights`.
"""


def look_into_layer(
    name: str, batch: Batch, outputs: Sequence[Tensor], *args: Any, **kwargs: Any
) -> InnerNodes | None:
    """Return the nodes inside `torch.lstm`, `torch.gru`, ...; None if some are missing.

    Parameters
    ----------
    name
        Name of the operation; the other parameters are those of a look.
    """
    call = RecurrentCall.of(*args, **kwargs)
    return _look_between(name, batch, outputs, (call.data, *call.states), call)


def look_into_cell(
    name: str, batch: Batch, outputs: Sequence[Tensor], input: Tensor, *args: Any, **kwargs: Any
) -> InnerNodes | None:
    """Return the nodes inside `torch.lstm_cell`, `torch.gru_cell`, ...; None if some are missing.

    Parameters
    ----------
    name
        Name of the operation without `_cell`; the other parameters are those of a look.
    """
    call = RecurrentCall.of(*cell_arguments(input, *args, **kwargs))
    return _look_between(name, batch, outputs, (input, *call.states), call)


def _look_between(
    name: str,
    batch: Batch,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    call: RecurrentCall,
) -> InnerNodes | None:
    """Return the nodes between the caller's inputs and the outputs; None if some are missing."""
    is_learned = any(state.requires_grad and not batch.varies(state) for state in call.states)
    are_leaves = all(weight.is_leaf and weight.requires_grad for weight in call.parameters)
    if is_learned or not are_leaves or not may_read_saved_tensors():
        return None
    nodes = nodes_between(outputs, inputs, {*_SAVED_VALUES, _LAYER})
    layers = [node for node in nodes if node.name() == _LAYER]
    if layers:
        weights = [leaf_input(node, 1) for node in layers]
        is_complete = list(map(id, weights)) == [id(layer.input) for layer in call.weights]
        return InnerNodes(layers, _FusedLayers(call)) if is_complete else None
    return _find_products(name, nodes, call)


def _find_products(name: str, nodes: Sequence[Node], call: RecurrentCall) -> InnerNodes | None:
    """Return the products of all runs and steps among nodes; None if one is missing."""
    by_weight: dict[int, list[Node]] = {}
    for node in nodes:
        by_weight.setdefault(id(leaf_input(node, -1)), []).append(node)
    slots, products = [], []
    for run, weights in enumerate(call.weights):
        steps = range(len(call.active))[:: call.order(run)]
        for part in (INPUT, HIDDEN, UNITS):
            weight = weights[part]
            if weight is not None:
                times = steps[:1] if part == INPUT else steps
                nodes_of_weight = by_weight.get(id(weight), [])
                if len(nodes_of_weight) != len(times):
                    return None
                slots += [(run, part, t) for t in times]
                products += nodes_of_weight
    return InnerNodes(products, _MatrixProducts(name, call, slots))


class _MatrixProducts:
    """Reads the matrix products that make up a layer: one of all inputs, the others by step."""

    def __init__(
        self, name: str, call: RecurrentCall, slots: Sequence[tuple[int, int, int]]
    ) -> None:
        self._name, self._call = name, call
        self._slots = slots
        """For each product: run, operand (`INPUT`, `HIDDEN` or `UNITS`), step."""
        self._values: dict[int, Tensor] = {}
        """For each product: the values that the weight multiplies, (n, K)."""
        self._deltas: dict[int, Tensor] = {}
        """Output gradients received so far, (n, O), by product."""

    def open(self, nodes: Sequence[Node]) -> None:
        """See `NodeReader`: take the multiplied values."""
        saved = (getattr(node, _SAVED_VALUES[node.name()]) for node in nodes)
        self._values = dict(enumerate(saved))

    def take(self, position: int, gradients: Gradients) -> None:
        """Store a product's output gradient, unless the input product has the same."""
        delta = gradients[0]
        if delta is not None and (self._slots[position][1] != HIDDEN or self._name == "gru"):
            self._deltas[position] = delta

    def factors(self) -> Factors:
        """See `NodeReader`: yield the factors of all layers that a gradient has reached."""
        reached = {self._slots[position][:2] for position in self._deltas}
        positions: dict[tuple[int, int], list[int]] = {}
        for position, (run, part, _) in enumerate(self._slots):
            positions.setdefault((run, part), []).append(position)

        def over_time(run: int, part: int, tensor_of: Callable[[int], Tensor]) -> Tensor:
            """Return a tensor of each product of a run and part, as (T, N, ...)."""
            products = positions[run, part][:: self._call.order(run)]
            if part == INPUT:
                return self._call.arranged(tensor_of(products[0]))
            return pad_sequence([tensor_of(position) for position in products], batch_first=True)

        values = self._values.pop  # drops the reference to a tensor that is copied
        for run, weights in enumerate(self._call.weights):
            if (run, INPUT) not in reached:
                continue
            x_delta_TNG = over_time(run, INPUT, self._delta)
            h_delta_TNG = x_delta_TNG
            if self._name == "gru":
                h_delta_TNG = over_time(run, HIDDEN, self._delta)
            inputs_TNI, before_TNH = (over_time(run, part, values) for part in (INPUT, HIDDEN))
            shared = CELLS[self._name].shared(x_delta_TNG.shape[2])
            deltas = GateDeltas(x_delta_TNG, h_delta_TNG, shared)
            yield from layer_factors(weights, inputs_TNI, before_TNH, deltas)
            if weights.projection is not None:
                left, right = (over_time(run, UNITS, read) for read in (self._delta, values))
                shape = weights.projection.shape
                yield weights.projection, Outer(by_sample(left), by_sample(right), shape)

    def _delta(self, position: int) -> Tensor:
        """Return the output gradient of a product, zero if none arrived."""
        delta, (run, part, _) = self._deltas.pop(position, None), self._slots[position]
        if delta is None:
            weight, values = self._call.weights[run][part], self._values[position]
            assert weight is not None
            delta = values.new_zeros(len(values), len(weight))
        return delta


class _FusedLayers:
    """Reads an LSTM in which each layer and direction is one node."""

    def __init__(self, call: RecurrentCall) -> None:
        self._call = call
        self._saved: list[list[Any]] = []
        self._gradients: dict[int, Gradients] = {}

    def open(self, nodes: Sequence[Node]) -> None:
        """See `NodeReader`: take inputs, outputs (T, N, ...), first states and direction."""
        names = ("input", "result0", "hx_", "cx_", "reverse")
        self._saved = [[getattr(node, f"_saved_{name}") for name in names] for node in nodes]

    def take(self, position: int, gradients: Gradients) -> None:
        """Store the output gradients of the outputs and of the last states."""
        self._gradients[position] = gradients[:3]

    def factors(self) -> Factors:
        """See `NodeReader`: backpropagate each layer, and yield its factors."""
        for position, gradients in self._gradients.items():
            inputs_TNI, after_TNH, *first, reverse = self._saved[position]
            first = [state.reshape(after_TNH.shape[1:]) for state in first]
            delta_TNH, *last = (
                torch.zeros_like(like) if gradient is None else gradient.reshape(like.shape).clone()
                for gradient, like in zip(gradients, (after_TNH, *first), strict=True)
            )
            weights, active = self._call.weights[position], self._call.active
            run = LayerRun.of(weights, active, reverse, first, inputs_TNI, after_TNH)
            deltas = backpropagate(CELLS["lstm"], run, delta_TNH, last)
            yield from layer_factors(weights, run.inputs, run.before, deltas)
