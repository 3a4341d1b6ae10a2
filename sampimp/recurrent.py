"""Rules of recurrent layers: `nn.RNN`, `nn.LSTM`, `nn.GRU` as they come, and their cells.

PyTorch carries out all steps of all layers in one operation, which shows neither the states of
the lower layers nor the gradients inside. So the recurrence is carried out again, and then
backwards: what the factors need are delta of each gate at each step, beside the inputs and the
states before. Only what hangs on the step before is in the loops; the rest is of whole sequences.

    gates_t = own_t + back_t with own_t = W_ih x_t + b_ih and back_t = W_hh h_{t-1} + b_hh
    RNN     h_t = tanh(gates_t), or relu
    LSTM    i, f, g, o = gates_t;  c_t = s(f) c_{t-1} + s(i) tanh(g);  h_t = s(o) tanh(c_t)
    GRU     r, z, n = gates_t with n = own_n + s(r) back_n;  h_t = (1 - s(z)) tanh(n) + s(z) h_{t-1}

Shape suffixes: N samples, T steps, I inputs, H units, G gates times units.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from sampimp.errors import UnsupportedError
from sampimp.factors import Explicit, Outer
from sampimp.rules import Batch, Factors, layer_rule

State = tuple[Tensor, ...]
"""Of a layer: its output h, and an LSTM's cell c."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None


class Cell(Protocol):
    """The arithmetic of one kind of layer."""

    def step(self, own: Tensor, back: Tensor, state: State) -> State:
        """Return the state after a step."""

    def slopes(self, own: Tensor, back: Tensor, before: State, after: State) -> State:
        """Return what `retreat` needs, of any number of steps at once."""

    def retreat(self, slopes: State, delta: State) -> tuple[Tensor, Tensor, State]:
        """Return delta of own and back, and of the state before as far as not through back."""


class SimpleCell:
    """h = squash(own + back)."""

    def __init__(self, squash: str) -> None:
        self._squash = squash

    def step(self, own: Tensor, back: Tensor, state: State) -> State:
        """Return the state after a step."""
        gates = own + back
        return (gates.tanh() if self._squash == "tanh" else gates.relu(),)

    def slopes(self, own: Tensor, back: Tensor, before: State, after: State) -> State:
        """Return dh/dgates."""
        (h,) = after
        return (1 - h.square() if self._squash == "tanh" else h.sign(),)

    def retreat(self, slopes: State, delta: State) -> tuple[Tensor, Tensor, State]:
        """Return the deltas of a step before."""
        gates = delta[0] * slopes[0]
        return gates, gates, (torch.zeros_like(gates),)


class LstmCell:
    """Of h and c, as above."""

    def step(self, own: Tensor, back: Tensor, state: State) -> State:
        """Return the state after a step."""
        admit, forget, content, show = (own + back).chunk(4, -1)
        cell = (forget.sigmoid() * state[1]).addcmul_(admit.sigmoid(), content.tanh())
        return show.sigmoid() * cell.tanh(), cell

    def slopes(self, own: Tensor, back: Tensor, before: State, after: State) -> State:
        """Return dc/d(i, f, g), dh/do, dh/dc and dc/dc_before."""
        gates = own + back
        admit, forget, content, show = gates.chunk(4, -1)
        content = content.tanh()
        admit, forget, show = admit.sigmoid(), forget.sigmoid(), show.sigmoid()
        shown = after[1].tanh()
        gates = torch.stack(
            [
                content * admit * (1 - admit),
                before[1] * forget * (1 - forget),
                admit * (1 - content.square()),
            ],
            -2,
        )
        return gates, shown * show * (1 - show), show * (1 - shown.square()), forget

    def retreat(self, slopes: State, delta: State) -> tuple[Tensor, Tensor, State]:
        """Return the deltas of a step before."""
        h, cell = delta
        cell = torch.addcmul(cell, h, slopes[2])
        gates = torch.cat([(cell.unsqueeze(1) * slopes[0]).flatten(1), h * slopes[1]], 1)
        return gates, gates, (torch.zeros_like(h), cell * slopes[3])


class GruCell:
    """Of h, as above."""

    def step(self, own: Tensor, back: Tensor, state: State) -> State:
        """Return the state after a step."""
        _, keep, content, _ = self._gates(own, back)
        return (torch.lerp(content, state[0], keep),)

    def slopes(self, own: Tensor, back: Tensor, before: State, after: State) -> State:
        """Return dh/down, dh/dback and dh/dh_before, this but for back."""
        reset, keep, content, back_content = self._gates(own, back)
        slope = (1 - keep) * (1 - content.square())
        by_reset = slope * back_content * reset * (1 - reset)
        by_keep = (before[0] - content) * keep * (1 - keep)
        by_own = torch.stack([by_reset, by_keep, slope], -2)
        return by_own, torch.stack([by_reset, by_keep, slope * reset], -2), keep

    def retreat(self, slopes: State, delta: State) -> tuple[Tensor, Tensor, State]:
        """Return the deltas of a step before."""
        (h,) = delta
        own, back = ((h.unsqueeze(1) * slope).flatten(1) for slope in slopes[:2])
        return own, back, (h * slopes[2],)

    @staticmethod
    def _gates(own: Tensor, back: Tensor) -> State:
        own_reset, own_keep, own_content = own.chunk(3, -1)
        back_reset, back_keep, back_content = back.chunk(3, -1)
        reset, keep = (own_reset + back_reset).sigmoid(), (own_keep + back_keep).sigmoid()
        return reset, keep, torch.addcmul(own_content, reset, back_content).tanh(), back_content


CELLS: dict[str, Cell] = {
    "rnn_tanh": SimpleCell("tanh"),
    "rnn_relu": SimpleCell("relu"),
    "lstm": LstmCell(),
    "gru": GruCell(),
}


class _Direction:
    """One layer run in one direction."""

    def __init__(
        self,
        cell: Cell,
        weights: Weights,
        inputs_TNI: Tensor,
        active: Sequence[int],
        state: State,
        reverse: bool,
    ) -> None:
        self._cell, self.weights, self._inputs_TNI = cell, weights, inputs_TNI
        steps = [(t, slice(count)) for t, count in enumerate(active)]  # the longest are first
        self._steps = steps[::-1] if reverse else steps
        own_TNG = linear(inputs_TNI, weights.input, weights.input_bias)
        back_TNG = torch.zeros_like(own_TNG)
        self._befores = tuple(part.new_zeros(len(active), *part.shape) for part in state)
        afters = tuple(map(torch.zeros_like, self._befores))
        state = tuple(part.clone() for part in state)
        for t, some in self._steps:
            before = tuple(part[some] for part in state)
            back = linear(before[0], weights.hidden, weights.hidden_bias)
            after = cell.step(own_TNG[t, some], back, before)
            back_TNG[t, some] = back
            for k, part in enumerate(state):
                self._befores[k][t, some], afters[k][t, some] = before[k], after[k]
                part[some] = after[k]
        self._slopes = cell.slopes(own_TNG, back_TNG, self._befores, afters)
        self.outputs_TNH = afters[0]

    def deltas(self, delta_TNH: Tensor, delta_ends: State) -> tuple[Tensor, Tensor]:
        """Return delta of own and back (T, N, G), by delta of the outputs and the last states."""
        shape = *delta_TNH.shape[:2], len(self.weights.input)
        own_TNG, back_TNG = delta_TNH.new_zeros(shape), delta_TNH.new_zeros(shape)
        deltas = tuple(part.clone() for part in delta_ends)
        for t, some in reversed(self._steps):
            after = deltas[0][some] + delta_TNH[t, some], *(part[some] for part in deltas[1:])
            own, back, before = self._cell.retreat(
                tuple(slope[t, some] for slope in self._slopes), after
            )
            own_TNG[t, some], back_TNG[t, some] = own, back
            deltas[0][some] = torch.addmm(before[0], back, self.weights.hidden)
            for part, value in zip(deltas[1:], before[1:], strict=True):
                part[some] = value
        return own_TNG, back_TNG

    def factors(self, delta_own_TNG: Tensor, delta_back_TNG: Tensor) -> Factors:
        """Yield those of the parameters."""
        own, back = delta_own_TNG.transpose(0, 1), delta_back_TNG.transpose(0, 1)
        inputs, befores = self._inputs_TNI.transpose(0, 1), self._befores[0].transpose(0, 1)
        weights = self.weights
        yield weights.input, Outer(own.unsqueeze(2), inputs.unsqueeze(2), weights.input.shape)
        yield weights.hidden, Outer(back.unsqueeze(2), befores.unsqueeze(2), weights.hidden.shape)
        yield weights.input_bias, Explicit(own.sum(1))
        yield weights.hidden_bias, Explicit(back.sum(1))


def _factors(
    cell: Cell,
    weights: Sequence[Weights],
    inputs_TNI: Tensor,
    active: Sequence[int],
    states: State,
    both: bool,
    delta_TNK: Tensor,
    delta_ends: State,
) -> Factors:
    """Run layers on one another, go back, and yield the factors of all parameters.

    The states before and delta of the last ones are (layers * directions, N, H) each.
    """
    layers: list[list[_Direction]] = []
    for first in range(0, len(weights), 1 + both):
        layer = [
            _Direction(
                cell,
                weights[first + reverse],
                inputs_TNI,
                active,
                tuple(part[first + reverse] for part in states),
                bool(reverse),
            )
            for reverse in range(1 + both)
        ]
        inputs_TNI = torch.cat([direction.outputs_TNH for direction in layer], 2)
        layers.append(layer)
    for number in reversed(range(len(layers))):
        parts, delta_TNK = delta_TNK.chunk(1 + both, 2), torch.zeros(())
        for reverse, direction in enumerate(layers[number]):
            ends = tuple(part[number * (1 + both) + reverse] for part in delta_ends)
            own_TNG, back_TNG = direction.deltas(parts[reverse], ends)
            yield from direction.factors(own_TNG, back_TNG)
            if number:
                delta_TNK = delta_TNK + own_TNG @ direction.weights.input


def _rule(cell: Cell, batch: Batch, delta: Sequence[Tensor], *args: Any) -> Factors:
    """Yield the factors of torch.lstm, torch.gru, ..., in both of their forms.

    (input, states, parameters, ...); of packed sequences (data, sizes, states, parameters, ...).
    """
    is_packed = isinstance(args[3], list | tuple)
    states, parameters, biases, layers, dropout, train, both, *rest = args[2 if is_packed else 1 :]
    states = tuple(states) if isinstance(states, list | tuple) else (states,)
    each = 4 if biases else 2
    if len(parameters) != each * layers * (1 + both) or (dropout and train and layers > 1):
        raise UnsupportedError(
            expected="recurrent layers without projections, and without dropout between them",
            got="dropout, whose masks are not known" if dropout else "projections",
            where="a recurrent layer",
            todo="use one layer after another with a Dropout between them, and no proj_size",
        )
    inputs_TNI, delta_TNK = args[0], delta[0]
    if is_packed:
        active = args[1].tolist()
        inputs_TNI, delta_TNK = _padded(inputs_TNI, active), _padded(delta_TNK, active)
    elif rest and rest[0]:  # batch_first
        inputs_TNI, delta_TNK = inputs_TNI.transpose(0, 1), delta_TNK.transpose(0, 1)
    if inputs_TNI.shape[1] != batch.size:
        raise UnsupportedError(
            expected=f"{batch.size} sequences, one for each index of the step",
            got=f"{inputs_TNI.shape[1]}",
            where="a recurrent layer",
            todo="name as many samples as the batch has; mind batch_first",
        )
    if not is_packed:
        active = [batch.size] * len(inputs_TNI)
    weights = [Weights(*parameters[i : i + each]) for i in range(0, len(parameters), each)]
    return _factors(cell, weights, inputs_TNI, active, states, both, delta_TNK, tuple(delta[1:]))


def _padded(data: Tensor, active: Sequence[int]) -> Tensor:
    """Return a packed sequence's data as (T, N, ...), zero where a sequence has ended."""
    padded = data.new_zeros(len(active), active[0], *data.shape[1:])
    for row, part in zip(padded, data.split(list(active)), strict=True):
        row[: len(part)] = part
    return padded


def _cell_rule(
    cell: Cell, batch: Batch, delta: Any, input: Tensor, states: Any, *parameters: Tensor
) -> Factors:
    """Yield the factors of torch.lstm_cell, torch.gru_cell, ...: one step of one layer."""
    states = states if isinstance(states, list | tuple) else (states,)
    delta = (delta,) if isinstance(delta, Tensor) else delta
    batch.first(input)  # says what is wrong
    before, ends = (tuple(part[None] for part in parts) for parts in (states, delta))
    nothing = torch.zeros_like(ends[0])  # what leaves a step is its state alone
    weights = [Weights(*parameters)]
    return _factors(cell, weights, input[None], [len(input)], before, False, nothing, ends)


for _name, _cell in CELLS.items():
    layer_rule(getattr(torch, _name))(partial(_rule, _cell))
    layer_rule(getattr(torch, f"{_name}_cell"))(partial(_cell_rule, _cell))
