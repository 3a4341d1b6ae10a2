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

from collections.abc import Mapping, Sequence
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

    def step(self, own: Tensor, back: Tensor, state: State) -> tuple[State, State]:
        """Return the state after a step, and what else `retreat` needs."""

    def retreat(
        self, kept: State, before: State, after: State, delta: State
    ) -> tuple[Tensor, Tensor, Tensor | None, State]:
        """Return delta of own, of back, of h before (but for back), and of c before."""


class SimpleCell:
    """h = squash(own + back)."""

    def __init__(self, squash: str) -> None:
        self._squash = squash

    def step(self, own: Tensor, back: Tensor, state: State) -> tuple[State, State]:
        """Return the state after a step."""
        gates = own + back
        return (gates.tanh_() if self._squash == "tanh" else gates.relu_(),), ()

    def retreat(
        self, kept: State, before: State, after: State, delta: State
    ) -> tuple[Tensor, Tensor, Tensor | None, State]:
        """Return the deltas a step before."""
        (h,) = after
        gates = delta[0] * (1 - h.square() if self._squash == "tanh" else h.sign())
        return gates, gates, None, ()


class LstmCell:
    """Of h and c, as above."""

    def step(self, own: Tensor, back: Tensor, state: State) -> tuple[State, State]:
        """Return the state after a step, the gates and tanh(c)."""
        gates = own + back
        content = gates.chunk(4, 1)[2].tanh()
        admit, forget, place, show = gates.sigmoid_().chunk(4, 1)
        place.copy_(content)
        cell = (forget * state[1]).addcmul_(admit, content)
        shown = cell.tanh()
        return (show * shown, cell), (gates, shown)

    def retreat(
        self, kept: State, before: State, after: State, delta: State
    ) -> tuple[Tensor, Tensor, Tensor | None, State]:
        """Return the deltas a step before."""
        gates, shown = kept
        admit, forget, content, show = gates.chunk(4, 1)
        # dh/dc = s(o) (1 - tanh(c)^2) with h = s(o) tanh(c)
        cell = delta[1].addcmul(delta[0], torch.addcmul(show, after[0], shown, value=-1))
        slopes = torch.addcmul(gates, gates, gates, value=-1)  # of the sigmoid, s (1 - s)
        by_admit, by_forget, by_content, by_show = slopes.chunk(4, 1)
        by_admit.mul_(content).mul_(cell)
        by_forget.mul_(before[1]).mul_(cell)
        torch.mul(admit - admit * content.square(), cell, out=by_content)
        by_show.mul_(shown).mul_(delta[0])
        return slopes, slopes, None, (cell.mul_(forget),)


class GruCell:
    """Of h, as above."""

    def step(self, own: Tensor, back: Tensor, state: State) -> tuple[State, State]:
        """Return the state after a step, s(r), s(z), tanh(n) and the part of back in n."""
        units = state[0].shape[1]
        both = (own[:, : 2 * units] + back[:, : 2 * units]).sigmoid_()
        reset, keep = both.chunk(2, 1)
        back_content = back[:, 2 * units :]
        content = torch.addcmul(own[:, 2 * units :], reset, back_content).tanh_()
        return (torch.lerp(content, state[0], keep),), (reset, keep, content, back_content)

    def retreat(
        self, kept: State, before: State, after: State, delta: State
    ) -> tuple[Tensor, Tensor, Tensor | None, State]:
        """Return the deltas a step before."""
        (h,), (reset, keep, content, back_content) = delta, kept
        through = h * keep
        by_content = (h - through).mul_(1 - content.square())
        by_reset = (by_content * back_content).mul_(reset - reset.square())
        by_keep = (before[0] - content).mul_(through).mul_(1 - keep)
        own = torch.cat([by_reset, by_keep, by_content], 1)
        return own, torch.cat([by_reset, by_keep, by_content * reset], 1), through, ()


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
        inputs_NTI: Tensor,
        active: Sequence[int],
        state: State,
        reverse: bool,
    ) -> None:
        self._cell, self.weights, self._inputs_NTI = cell, weights, inputs_NTI
        self._active = active  # how many sequences go on, the longest are first
        self._order = range(len(active))[:: -1 if reverse else 1]
        self._steps: dict[int, tuple[State, State, State]] = {}  # what is kept, before and after
        own_NTG = linear(inputs_NTI, weights.input, weights.input_bias)
        for t in self._order:
            before, rest = _split(state, active[t])
            back = linear(before[0], weights.hidden, weights.hidden_bias)
            after, kept = cell.step(own_NTG[: active[t], t], back, before)
            self._steps[t] = kept, before, after
            state = _joined(after, rest)
        self.outputs_NTH = self._sequence({t: step[2][0] for t, step in self._steps.items()})

    def deltas(self, delta_NTH: Tensor, delta: State) -> tuple[Tensor, Tensor]:
        """Return delta of own and back (N, T, G), by delta of the outputs and the last state."""
        own, back = {}, {}
        for t in reversed(self._order):
            (h, *others), rest = _split(delta, self._active[t])
            own[t], back[t], through, cells = self._cell.retreat(
                *self._steps[t], (h + delta_NTH[: len(h), t], *others)
            )
            h = back[t] @ self.weights.hidden
            delta = _joined((h if through is None else h.add_(through), *cells), rest)
        own_NTG = self._sequence(own)
        return own_NTG, own_NTG if own[0] is back[0] else self._sequence(back)

    def _sequence(self, parts: Mapping[int, Tensor]) -> Tensor:
        """Return what there is of each step as (N, T, ...), zero where a sequence has ended."""
        ordered = [parts[t] for t in range(len(parts))]
        if self._active[0] == self._active[-1]:
            return torch.stack(ordered, 1)
        return _padded(torch.cat(ordered), self._active)

    def factors(self, delta_own_NTG: Tensor, delta_back_NTG: Tensor) -> Factors:
        """Yield those of the parameters."""
        before_NTH = self._sequence({t: step[1][0] for t, step in self._steps.items()})
        for weight, bias, delta_NTG, values_NTK in (
            (self.weights.input, self.weights.input_bias, delta_own_NTG, self._inputs_NTI),
            (self.weights.hidden, self.weights.hidden_bias, delta_back_NTG, before_NTH),
        ):
            yield weight, Outer(delta_NTG.unsqueeze(2), values_NTK.unsqueeze(2), weight.shape)
            yield bias, Explicit(delta_NTG.sum(1))


def _split(state: State, count: int) -> tuple[State, State]:
    """Return the state of the sequences that go on, and of those that have ended."""
    if count == len(state[0]):
        return state, ()
    return tuple(part[:count] for part in state), tuple(part[count:] for part in state)


def _joined(state: State, rest: State) -> State:
    return tuple(map(torch.cat, zip(state, rest, strict=True))) if rest else state


def _factors(
    cell: Cell,
    weights: Sequence[Weights],
    inputs_NTI: Tensor,
    active: Sequence[int],
    states: State,
    both: bool,
    delta_NTK: Tensor,
    delta_ends: State,
) -> Factors:
    """Run layers on one another, go back, and yield the factors of all parameters.

    The states before and delta of the last ones are (layers * directions, N, H) each.
    """
    dtype = weights[0].input.dtype  # under autocast, what comes and goes has another one
    inputs_NTI, delta_NTK = inputs_NTI.to(dtype), delta_NTK.to(dtype)
    states = tuple(part.to(dtype) for part in states)
    delta_ends = tuple(part.to(dtype) for part in delta_ends)
    layers: list[list[_Direction]] = []
    for first in range(0, len(weights), 1 + both):
        layer = [
            _Direction(
                cell,
                weights[first + reverse],
                inputs_NTI,
                active,
                tuple(part[first + reverse] for part in states),
                bool(reverse),
            )
            for reverse in range(1 + both)
        ]
        inputs_NTI = torch.cat([direction.outputs_NTH for direction in layer], 2)
        layers.append(layer)
    for number in reversed(range(len(layers))):
        parts, delta_NTK = delta_NTK.chunk(1 + both, 2), torch.zeros(())
        for reverse, direction in enumerate(layers[number]):
            ends = tuple(part[number * (1 + both) + reverse] for part in delta_ends)
            own_NTG, back_NTG = direction.deltas(parts[reverse], ends)
            yield from direction.factors(own_NTG, back_NTG)
            if number:
                delta_NTK = delta_NTK + own_NTG @ direction.weights.input


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
    inputs_NTI, delta_NTK = args[0], delta[0]
    if is_packed:
        active = args[1].tolist()
        inputs_NTI, delta_NTK = _padded(inputs_NTI, active), _padded(delta_NTK, active)
    elif not (rest and rest[0]):  # batch_first
        inputs_NTI, delta_NTK = inputs_NTI.transpose(0, 1), delta_NTK.transpose(0, 1)
    if len(inputs_NTI) != batch.size:
        raise UnsupportedError(
            expected=f"{batch.size} sequences, one for each index of the step",
            got=f"{len(inputs_NTI)}",
            where="a recurrent layer",
            todo="name as many samples as the batch has; mind batch_first",
        )
    if not is_packed:
        active = [batch.size] * inputs_NTI.shape[1]
    weights = [Weights(*parameters[i : i + each]) for i in range(0, len(parameters), each)]
    return _factors(cell, weights, inputs_NTI, active, states, both, delta_NTK, tuple(delta[1:]))


def _padded(data: Tensor, active: Sequence[int]) -> Tensor:
    """Return a packed sequence's data as (N, T, ...), zero where a sequence has ended."""
    padded = data.new_zeros(active[0], len(active), *data.shape[1:])
    for t, part in enumerate(data.split(list(active))):
        padded[: len(part), t] = part
    return padded


def _cell_rule(
    cell: Cell, batch: Batch, delta: Any, input: Tensor, states: Any, *parameters: Tensor
) -> Factors:
    """Yield the factors of torch.lstm_cell, torch.gru_cell, ...: one step of one layer."""
    states = states if isinstance(states, list | tuple) else (states,)
    delta = (delta,) if isinstance(delta, Tensor) else delta
    batch.first(input)  # says what is wrong
    before, ends = (tuple(part[None] for part in parts) for parts in (states, delta))
    nothing = torch.zeros_like(ends[0]).transpose(0, 1)  # what leaves a step is its state alone
    weights = [Weights(*parameters)]
    return _factors(cell, weights, input[:, None], [len(input)], before, False, nothing, ends)


for _name, _cell in CELLS.items():
    layer_rule(getattr(torch, _name))(partial(_rule, _cell))
    layer_rule(getattr(torch, f"{_name}_cell"))(partial(_cell_rule, _cell))
