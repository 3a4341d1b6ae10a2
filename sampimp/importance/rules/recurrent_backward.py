"""Backpropagation through time of one recurrent layer, and the factors of its parameters.

The gates of all steps follow from a layer's inputs and outputs in a few large operations, and so do
the slopes by which each step passes delta (the output gradient) on. Only the recurrence itself is
computed step by step, from the last step to the first: one matrix product, and elementwise products
with slopes.

    gates_t = x_part_t + h_part_t with x_part_t = W_ih x_t + b_ih and h_part_t = W_hh h_{t-1} + b_hh
    RNN     h_t = tanh(gates_t), or relu
    LSTM    i, f, g, o = gates_t;  c_t = s(f) c_{t-1} + s(i) tanh(g);  h_t = s(o) tanh(c_t)
    GRU     r, z = gates_t;  n = x_part_n + s(r) h_part_n;  h_t = (1 - s(z)) tanh(n) + s(z) h_{t-1}

Map: `LayerRun` (one layer in one direction, with its inputs and outputs), `CELLS` (the arithmetic
of each kind of layer, a `Cell`), `backpropagate` (delta of the gates of all steps), `layer_factors`
(from these to factors of the parameters).

Shape suffixes: T steps, N samples, I inputs, H units, K inputs or units, G gates times units; where
a sequence has ended, there are zeros.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sampimp.importance.gradients import Explicit, Outer
from sampimp.importance.per_sample import gram_of_positions
from sampimp.importance.rules.batch import Factors
from sampimp.importance.rules.recurrent_call import LayerWeights

State = Sequence[Tensor]
"""The state of a layer: its output h, and the cell c of an LSTM."""
Slopes = Sequence[Tensor]
"""Derivatives by which a step passes on delta of its state."""


class LayerRun(NamedTuple):
    """One layer in one direction, over the whole sequences."""

    weights: LayerWeights
    steps: Sequence[tuple[int, int]]
    """In the order of the run: (t, number of sequences that have a value at t)."""
    first: State
    inputs: Tensor
    """(T, N, I)"""
    before: Tensor
    """h before each step, (T, N, H)."""
    after: Tensor
    """h after each step, (T, N, H)."""

    @classmethod
    def of(
        cls,
        weights: LayerWeights,
        active: Sequence[int],
        reverse: bool,
        first: State,
        inputs_TNI: Tensor,
        after_TNH: Tensor,
    ) -> "LayerRun":
        """Return a layer's run from its inputs and outputs."""
        steps = list(enumerate(active))[:: -1 if reverse else 1]
        before_TNH = first[0].repeat(len(steps), 1, 1)
        for (t, count), (later, _) in pairwise(steps):
            before_TNH[later, :count] = after_TNH[t, :count]
        return cls(weights, steps, first, inputs_TNI, before_TNH, after_TNH)


class Cell(Protocol):
    """The arithmetic of one kind of layer."""

    def slopes(self, run: LayerRun) -> Slopes:
        """Return the slopes of all steps, each (T, N, ...)."""

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """Backpropagate one time step in place.

        Delta of the state after the step becomes delta of the state before it, and the slopes of
        the step become delta of its gates.
        """

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """Return delta of x_part and of h_part (T, N, G), after `retreat` of all steps."""

    def shared(self, gates: int) -> int:
        """Return the number of leading gates whose delta is the same in x_part and h_part."""


class SimpleCell:
    """h = squash(x_part + h_part)."""

    def __init__(self, squash: str) -> None:
        self._squash = squash

    def slopes(self, run: LayerRun) -> Slopes:
        """Return the slope of h by the gates."""
        return (1 - run.after.square() if self._squash == "tanh" else run.after.sign(),)

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """See `Cell`."""
        (gates,), (h,) = slopes, delta
        torch.mm(gates.mul_(h), weight, out=h)

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """See `Cell`."""
        return slopes[0], slopes[0]

    def shared(self, gates: int) -> int:
        """Return the number of all gates."""
        return gates


class LstmCell:
    """The cell of an LSTM, whose state is h and c."""

    def slopes(self, run: LayerRun) -> Slopes:
        """Return the slopes of (c by i, f, g; h by o), of h by c, and of c by the previous c."""
        gates = run.before.new_empty(*run.before.shape[:2], 4, run.before.shape[2])
        weights, bias = run.weights, run.weights.input_bias
        if bias is not None and weights.hidden_bias is not None:
            bias = bias + weights.hidden_bias
        _multiply(run.inputs, weights.input, bias, gates)
        gates.flatten(2).flatten(0, 1).addmm_(run.before.flatten(0, 1), weights.hidden.t())
        input_gate, forget, content, out_gate = gates.unbind(2)
        content *= 2
        gates.sigmoid_()
        admitted = input_gate * content.mul_(2).sub_(1)  # as in _tanh_
        before = run.first[1].repeat(len(admitted), 1, 1)
        for (t, count), (later, _) in pairwise(run.steps):
            step = (part[t, :count] for part in (admitted, forget, before))
            torch.addcmul(*step, out=before[later, :count])
        tanh_c = _tanh_(torch.addcmul(admitted, forget, before))
        by_h = torch.addcmul(out_gate, out_gate * tanh_c, tanh_c, value=-1)  # s(o) (1 - tanh(c)^2)
        by_cell = forget.clone()
        # In place, since fresh memory takes more time than the arithmetic.
        torch.addcmul(input_gate, admitted, content, value=-1, out=content)
        torch.addcmul(admitted, admitted, input_gate, value=-1, out=input_gate)
        forget.addcmul_(forget, forget, value=-1).mul_(before)
        out_gate.addcmul_(out_gate, out_gate, value=-1).mul_(tanh_c)
        return gates, by_h, by_cell

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """See `Cell`."""
        (gates, by_h, by_cell), (h, cell) = slopes, delta
        cell.addcmul_(h, by_h)
        gates[:, :3] *= cell[:, None]
        gates[:, 3] *= h
        torch.mm(gates.flatten(1), weight, out=h)
        cell.mul_(by_cell)

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """See `Cell`."""
        gates = slopes[0].flatten(2)
        return gates, gates

    def shared(self, gates: int) -> int:
        """Return the number of all gates."""
        return gates


class GruCell:
    """The cell of a GRU, whose state is h."""

    def slopes(self, run: LayerRun) -> Slopes:
        """Return the slopes of h by h_part, and by (unused, h before without h_part, x_part n)."""
        # One allocation: of two, glibc returned one to the system after each step, and page faults
        # took 5 ms of 41.
        x_part, h_part = run.before.new_empty(2, *run.before.shape[:2], 3, run.before.shape[2])
        _multiply(run.inputs, run.weights.input, run.weights.input_bias, x_part)
        _multiply(run.before, run.weights.hidden, run.weights.hidden_bias, h_part)
        x_part[:, :, :2].add_(h_part[:, :, :2]).sigmoid_()
        reset, keep, content = x_part.unbind(2)
        by_reset, by_keep, back_content = h_part.unbind(2)
        _tanh_(content.addcmul_(reset, back_content))
        # In place, since fresh memory takes more time than the arithmetic.
        torch.addcmul(keep, keep, keep, value=-1, out=by_keep).mul_(run.before - content)
        content.square_().sub_(1).mul_(keep - 1)
        torch.addcmul(reset, reset, reset, value=-1, out=by_reset).mul_(back_content).mul_(content)
        torch.mul(content, reset, out=back_content)
        return h_part, x_part

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """See `Cell`."""
        (h_part, x_part), (h,) = slopes, delta
        h_part *= h[:, None]
        x_part[:, 2] *= h
        h.mul_(x_part[:, 1]).addmm_(h_part.flatten(1), weight)

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """See `Cell`."""
        h_part, x_part = slopes
        x_part[:, :, :2] = h_part[:, :, :2]
        return x_part.flatten(2), h_part.flatten(2)

    def shared(self, gates: int) -> int:
        """Return the number of the gates r and z."""
        return gates // 3 * 2


def _multiply(values: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write values (T, N, K) weight^T + bias to out (T, N, gates, H)."""
    bias = weight.new_zeros(()) if bias is None else bias
    torch.addmm(bias, values.flatten(0, 1), weight.t(), out=out.flatten(2).flatten(0, 1))


def _tanh_(values: Tensor) -> Tensor:
    """Compute tanh in place by the sigmoid, in a quarter of the time of MKL's tanh on an AMD."""
    return values.mul_(2).sigmoid_().mul_(2).sub_(1)


CELLS: dict[str, Cell] = {
    "rnn_tanh": SimpleCell("tanh"),
    "rnn_relu": SimpleCell("relu"),
    "lstm": LstmCell(),
    "gru": GruCell(),
}
"""The cell of each operation, by its name in `torch`."""


class GateDeltas(NamedTuple):
    """Output gradients of the gates of all steps of a layer."""

    x_part: Tensor
    """Of W_ih x_t + b_ih, (T, N, G)."""
    h_part: Tensor
    """Of W_hh h_{t-1} + b_hh, (T, N, G)."""
    shared: int
    """Number of leading entries of G in which both are the same."""


def backpropagate(cell: Cell, run: LayerRun, delta_TNH: Tensor, delta: State) -> GateDeltas:
    """Return delta of the gates of all steps.

    Parameters
    ----------
    delta_TNH
        Output gradients of h at every step.
    delta
        Output gradients of the last state. They are replaced by those of the first state.
    """
    slopes = cell.slopes(run)
    by_step = [part.unbind() for part in (delta_TNH, *slopes)]
    for t, count in reversed(run.steps):
        state = [part[:count] for part in delta]
        delta_NH, *slopes_of_step = (part[t][:count] for part in by_step)
        state[0] += delta_NH
        cell.retreat(slopes_of_step, run.weights.hidden, state)
        if count < len(delta[0]):
            for part in slopes:
                part[t, count:] = 0
    x_delta_TNG, h_delta_TNG = cell.gates(slopes)
    return GateDeltas(x_delta_TNG, h_delta_TNG, cell.shared(x_delta_TNG.shape[2]))


def layer_factors(
    weights: LayerWeights, inputs_TNI: Tensor, before_TNH: Tensor, deltas: GateDeltas
) -> Factors:
    """Yield the factors of a layer's parameters, without the projection.

    The Gram matrix of the gates that x_part and h_part share is computed once for both weights.
    """
    x_delta_TNG, h_delta_TNG, shared = deltas
    shared_gram = cache(lambda: gram_of_positions(by_sample(x_delta_TNG[:, :, :shared])))
    bias = Explicit(x_delta_TNG.sum(0))
    for weight, bias_of_weight, delta_TNG, values_TNK in (
        (weights.input, weights.input_bias, x_delta_TNG, inputs_TNI),
        (weights.hidden, weights.hidden_bias, h_delta_TNG, before_TNH),
    ):
        left, right = by_sample(delta_TNG), by_sample(values_TNK)
        left_gram = partial(_gram_of_gates, shared_gram, left[..., shared:])
        yield weight, Outer(left, right, weight.shape, left_gram)
        yield bias_of_weight, bias if delta_TNG is x_delta_TNG else Explicit(delta_TNG.sum(0))


def _gram_of_gates(shared_gram: Callable[[], Tensor], rest: Tensor) -> Tensor:
    """Return the Gram matrix of all gates: of those that are shared, and of the rest."""
    return shared_gram() + gram_of_positions(rest) if rest.shape[3] else shared_gram()


def by_sample(values_TNK: Tensor) -> Tensor:
    """Return values as `Outer` has them, (N, T, 1, K)."""
    return values_TNK.transpose(0, 1).unsqueeze(2)
