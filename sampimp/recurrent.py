"""Rules of recurrent layers: `nn.RNN`, `nn.LSTM`, `nn.GRU` as they come, and their cells.

PyTorch carries out all steps of all layers in one operation, which shows neither the states of
the lower layers nor the gradients inside. So the recurrence is written out here and carried out
again, with a zero added to the sums that enter the gates: the gradients of these zeros are what the
factors need, delta of each gate at each step, beside the inputs and the states before.

    gates_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    RNN     h_t = tanh(gates_t), or relu
    LSTM    i, f, g, o = gates_t;  c_t = s(f) c_{t-1} + s(i) tanh(g);  h_t = s(o) tanh(c_t)
    GRU     r, z, n = gates_t with n = n_ih + s(r) n_hh;  h_t = (1 - s(z)) tanh(n) + s(z) h_{t-1}

Shape suffixes: N samples, T steps, I inputs, H units, G gates times units.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.factors import Explicit, Outer
from sampimp.rules import Batch, Factors, layer_rule

State = tuple[Tensor, ...]
"""Of a layer: its output h, and an LSTM's cell c."""

Cell = Callable[[Tensor, Tensor, State], State]
"""From W_ih x + b_ih, W_hh h + b_hh and the state before to the state after."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None


def _simple_cell(squash: Callable[[Tensor], Tensor], own: Tensor, back: Tensor, _: State) -> State:
    return (squash(own + back),)


def _lstm_cell(own: Tensor, back: Tensor, state: State) -> State:
    admit, forget, content, show = (own + back).chunk(4, 1)
    cell = forget.sigmoid() * state[1] + admit.sigmoid() * content.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _gru_cell(own: Tensor, back: Tensor, state: State) -> State:
    own_reset, own_keep, own_content = own.chunk(3, 1)
    back_reset, back_keep, back_content = back.chunk(3, 1)
    content = (own_content + (own_reset + back_reset).sigmoid() * back_content).tanh()
    keep = (own_keep + back_keep).sigmoid()
    return ((1 - keep) * content + keep * state[0],)


CELLS: dict[str, Cell] = {
    "rnn_tanh": partial(_simple_cell, torch.tanh),
    "rnn_relu": partial(_simple_cell, torch.relu),
    "lstm": _lstm_cell,
    "gru": _gru_cell,
}


class _Direction:
    """One layer run in one direction, with what its factors need."""

    def __init__(
        self,
        cell: Cell,
        weights: Weights,
        inputs_TNI: Tensor,
        active: Sequence[int],
        state: State,
        reverse: bool,
    ) -> None:
        self._weights, self._inputs_TNI = weights, inputs_TNI.detach()
        shape = (*inputs_TNI.shape[:2], len(weights.input))
        self.zeros = [inputs_TNI.new_zeros(shape, requires_grad=True) for _ in range(2)]
        weights = Weights(*(None if w is None else w.detach() for w in weights))  # type: ignore[arg-type]
        own_TNG = torch.nn.functional.linear(inputs_TNI, weights.input, weights.input_bias)
        own_TNG = own_TNG + self.zeros[0]
        befores: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        for t in reversed(range(len(active))) if reverse else range(len(active)):
            count = active[t]  # sequences are sorted: the longest first
            befores[t] = state[0].detach()
            now = tuple(part[:count] for part in state)
            back = torch.nn.functional.linear(now[0], weights.hidden, weights.hidden_bias)
            now = cell(own_TNG[t, :count], back + self.zeros[1][t, :count], now)
            state = tuple(
                torch.cat([new, old[count:]]) if count < len(old) else new
                for new, old in zip(now, state, strict=True)
            )
            outputs[t] = torch.cat([now[0], torch.zeros_like(state[0][count:])])
        self._befores_TNH = torch.stack([befores[t] for t in range(len(active))])
        self.outputs_TNH = torch.stack([outputs[t] for t in range(len(active))])
        self.state = state

    def factors(self, delta_own_TNG: Tensor, delta_back_TNG: Tensor) -> Factors:
        own, back = delta_own_TNG.transpose(0, 1), delta_back_TNG.transpose(0, 1)
        inputs, befores = self._inputs_TNI.transpose(0, 1), self._befores_TNH.transpose(0, 1)
        weights = self._weights
        yield weights.input, Outer(own.unsqueeze(2), inputs.unsqueeze(2), weights.input.shape)
        yield weights.hidden, Outer(back.unsqueeze(2), befores.unsqueeze(2), weights.hidden.shape)
        yield weights.input_bias, Explicit(own.sum(1))
        yield weights.hidden_bias, Explicit(back.sum(1))


def _factors(
    delta: Sequence[Tensor],
    results: Callable[[list[_Direction]], Sequence[Tensor]],
    directions: list[_Direction],
) -> Factors:
    """Differentiate the results and yield the factors of every direction of every layer."""
    zeros = [zero for direction in directions for zero in direction.zeros]
    deltas = iter(torch.autograd.grad(results(directions), zeros, delta))
    for direction in directions:
        yield from direction.factors(next(deltas), next(deltas))


def _layers(
    cell: Cell,
    inputs_TNI: Tensor,
    active: Sequence[int],
    states: State,
    weights: Iterator[Weights],
    layer_count: int,
    direction_count: int,
) -> list[_Direction]:
    """Run layers on one another; `states` are those before, each (layers * directions, N, H)."""
    directions: list[_Direction] = []
    for _ in range(layer_count):
        for reverse in range(direction_count):
            state = tuple(part[len(directions)].detach() for part in states)
            directions.append(
                _Direction(cell, next(weights), inputs_TNI, active, state, bool(reverse))
            )
        own = directions[-direction_count:]
        inputs_TNI = torch.cat([direction.outputs_TNH for direction in own], 2)
    return directions


def _rule(cell: Cell, batch: Batch, delta: Sequence[Tensor], *args: Any) -> Factors:
    """Yield the factors of torch.lstm, torch.gru, ..., in both of their forms.

    (input, states, parameters, ...); of packed sequences (data, sizes, states, parameters, ...).
    """
    is_packed = isinstance(args[3], list | tuple)
    sizes = args[1].tolist() if is_packed else None
    states, parameters, biases, layers, dropout, train, both, *rest = args[2 if is_packed else 1 :]
    states = tuple(states) if isinstance(states, list | tuple) else (states,)
    batch_first = bool(rest and rest[0])
    each = 4 if biases else 2
    if len(parameters) != each * layers * (1 + both) or (dropout and train and layers > 1):
        raise UnsupportedError(
            expected="recurrent layers without projections, and without dropout between them",
            got="dropout, whose masks are not known" if dropout else "projections",
            where="a recurrent layer",
            todo="use one layer after another with a Dropout between them, and no proj_size",
        )
    weights = (Weights(*parameters[i : i + each]) for i in range(0, len(parameters), each))
    if sizes is None:
        inputs_TNI = args[0].transpose(0, 1) if batch_first else args[0]
        active = [inputs_TNI.shape[1]] * len(inputs_TNI)
    else:
        active = sizes
        inputs_TNI = args[0].new_zeros(len(sizes), sizes[0], args[0].shape[1])
        for t, part in enumerate(args[0].detach().split(sizes)):
            inputs_TNI[t, : len(part)] = part
    if inputs_TNI.shape[1] != batch.size:
        raise UnsupportedError(
            expected=f"{batch.size} sequences, one for each index of the step",
            got=f"{inputs_TNI.shape[1]}",
            where="a recurrent layer",
            todo="name as many samples as the batch has; mind batch_first",
        )

    def results(directions: list[_Direction]) -> list[Tensor]:
        top = directions[-(1 + both) :]
        output = torch.cat([direction.outputs_TNH for direction in top], 2)
        if sizes is not None:
            output = torch.cat([output[t, :count] for t, count in enumerate(sizes)])
        elif batch_first:
            output = output.transpose(0, 1)
        ends = zip(*(direction.state for direction in directions), strict=True)
        return [output, *(torch.stack(end) for end in ends)]

    with torch.enable_grad():
        directions = _layers(cell, inputs_TNI.detach(), active, states, weights, layers, 1 + both)
        yield from _factors(delta, results, directions)


def _cell_rule(
    cell: Cell, batch: Batch, delta: Any, input: Tensor, states: Any, *parameters: Tensor
) -> Factors:
    """Yield the factors of torch.lstm_cell, torch.gru_cell, ...: one step of one layer."""
    states = states if isinstance(states, list | tuple) else (states,)
    states = tuple(state[None] for state in states)
    batch.first(input)  # says what is wrong
    with torch.enable_grad():
        directions = _layers(
            cell, input.detach()[None], [len(input)], states, iter([Weights(*parameters)]), 1, 1
        )
        delta = (delta,) if isinstance(delta, Tensor) else delta
        yield from _factors(delta, lambda own: own[0].state, directions)


for _name, _cell in CELLS.items():
    layer_rule(getattr(torch, _name))(partial(_rule, _cell))
    layer_rule(getattr(torch, f"{_name}_cell"))(partial(_cell_rule, _cell))
