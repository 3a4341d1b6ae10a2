"""Rules of recurrent layers: `nn.RNN`, `nn.LSTM`, `nn.GRU` as they come, and their cells.

PyTorch carries out all steps of all layers in one operation, which shows the outputs of the last
layer and no gradient inside. The layers below are carried out again, each as an operation of its
own. From a layer's outputs follow its gates of all steps at once, and the slopes by which they pass
delta on. Only that is done step by step, going back: a matrix product, and products with slopes.

    gates_t = own_t + back_t with own_t = W_ih x_t + b_ih and back_t = W_hh h_{t-1} + b_hh
    RNN     h_t = tanh(gates_t), or relu
    LSTM    i, f, g, o = gates_t;  c_t = s(f) c_{t-1} + s(i) tanh(g);  h_t = s(o) tanh(c_t)
    GRU     r, z, n = gates_t with n = own_n + s(r) back_n;  h_t = (1 - s(z)) tanh(n) + s(z) h_{t-1}

Shape suffixes: T steps, N samples, I inputs, H units, G gates times units; where a sequence has
ended, there are zeros.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.factors import Explicit, Outer, gram
from sampimp.rules import Batch, Factors, layer_rule

State = Sequence[Tensor]
"""Of a layer: its output h, and an LSTM's cell c."""
Slopes = Sequence[Tensor]
"""How a step passes on delta of its state."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None


class Run(NamedTuple):
    """One layer in one direction, over the whole sequences."""

    weights: Weights
    steps: Sequence[tuple[int, int]]
    """In their order: t, and how many sequences go on there, the longest of which are first."""
    first: State
    inputs: Tensor
    """(T, N, I)"""
    before: Tensor
    """h before each step, (T, N, H)."""
    after: Tensor
    """h after each step, (T, N, H)."""


class Cell(Protocol):
    """The arithmetic of one kind of layer."""

    def slopes(self, run: Run) -> Slopes:
        """Return what `retreat` needs, of all steps: each (T, N, ...)."""

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """Make of delta after a step that before it, and of its slopes delta of its gates."""

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor, int]:
        """Return delta of own and of back (T, N, G), and how much of G is the same in both.

        After `retreat` of all steps.
        """


class SimpleCell:
    """h = squash(own + back)."""

    def __init__(self, squash: str) -> None:
        self._squash = squash

    def slopes(self, run: Run) -> Slopes:
        """Return the slope of h by the gates."""
        return (1 - run.after.square() if self._squash == "tanh" else run.after.sign(),)

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """Go a step back."""
        (gates,), (h,) = slopes, delta
        torch.mm(gates.mul_(h), weight, out=h)

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor, int]:
        """Return delta of own and back."""
        return slopes[0], slopes[0], slopes[0].shape[2]


class LstmCell:
    """Of h and c, as above."""

    def slopes(self, run: Run) -> Slopes:
        """Return the slopes of c by i, f and g and of h by o; of h by c; of c by c before."""
        gates = run.before.new_empty(*run.before.shape[:2], 4, run.before.shape[2])
        weights, bias = run.weights, run.weights.input_bias
        if bias is not None and weights.hidden_bias is not None:
            bias = bias + weights.hidden_bias
        _multiply(run.inputs, weights.input, bias, gates)
        gates.flatten(2).flatten(0, 1).addmm_(run.before.flatten(0, 1), weights.hidden.t())
        admit, forget, content, show = gates.unbind(2)
        content *= 2
        gates.sigmoid_()
        admitted = admit * content.mul_(2).sub_(1)  # as in _tanh_
        before = run.first[1].repeat(len(admitted), 1, 1)
        for (t, count), (later, _) in pairwise(run.steps):
            now = (part[t, :count] for part in (admitted, forget, before))
            torch.addcmul(*now, out=before[later, :count])
        shown = _tanh_(torch.addcmul(admitted, forget, before))
        by_h = torch.addcmul(show, show * shown, shown, value=-1)  # s(o) (1 - tanh(c)^2)
        by_cell = forget.clone()
        # In place, since fresh memory takes more time than the arithmetic.
        torch.addcmul(admit, admitted, content, value=-1, out=content)
        torch.addcmul(admitted, admitted, admit, value=-1, out=admit)
        forget.addcmul_(forget, forget, value=-1).mul_(before)
        show.addcmul_(show, show, value=-1).mul_(shown)
        return gates, by_h, by_cell

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """Go a step back."""
        (gates, by_h, by_cell), (h, cell) = slopes, delta
        cell.addcmul_(h, by_h)
        gates[:, :3] *= cell[:, None]
        gates[:, 3] *= h
        torch.mm(gates.flatten(1), weight, out=h)
        cell.mul_(by_cell)

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor, int]:
        """Return delta of own and back."""
        gates = slopes[0].flatten(2)
        return gates, gates, gates.shape[2]


class GruCell:
    """Of h, as above."""

    def slopes(self, run: Run) -> Slopes:
        """Return the slopes of h by back; and by (nothing, h before but for back, own n)."""
        # One piece: of two, glibc gave one back after each step, and page faults took 5 ms of 41.
        own, back = run.before.new_empty(2, *run.before.shape[:2], 3, run.before.shape[2])
        _multiply(run.inputs, run.weights.input, run.weights.input_bias, own)
        _multiply(run.before, run.weights.hidden, run.weights.hidden_bias, back)
        own[:, :, :2].add_(back[:, :, :2]).sigmoid_()
        (reset, keep, content), (by_reset, by_keep, back_content) = own.unbind(2), back.unbind(2)
        _tanh_(content.addcmul_(reset, back_content))
        # In place, since fresh memory takes more time than the arithmetic.
        torch.addcmul(keep, keep, keep, value=-1, out=by_keep).mul_(run.before - content)
        content.square_().sub_(1).mul_(keep - 1)
        torch.addcmul(reset, reset, reset, value=-1, out=by_reset).mul_(back_content).mul_(content)
        torch.mul(content, reset, out=back_content)
        return back, own

    def retreat(self, slopes: Slopes, weight: Tensor, delta: State) -> None:
        """Go a step back."""
        (back, own), (h,) = slopes, delta
        back *= h[:, None]
        own[:, 2] *= h
        h.mul_(own[:, 1]).addmm_(back.flatten(1), weight)

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor, int]:
        """Return delta of own and back."""
        back, own = slopes
        own[:, :, :2] = back[:, :, :2]
        return own.flatten(2), back.flatten(2), 2 * back.shape[3]


def _multiply(values: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write values (T, N, K) weight^T + bias to out (T, N, gates, H)."""
    bias = weight.new_zeros(()) if bias is None else bias
    torch.addmm(bias, values.flatten(0, 1), weight.t(), out=out.flatten(2).flatten(0, 1))


def _tanh_(values: Tensor) -> Tensor:
    """Return tanh, in place: by the sigmoid, in a quarter of the time of MKL's tanh on an AMD."""
    return values.mul_(2).sigmoid_().mul_(2).sub_(1)


CELLS: dict[str, Cell] = {
    "rnn_tanh": SimpleCell("tanh"),
    "rnn_relu": SimpleCell("relu"),
    "lstm": LstmCell(),
    "gru": GruCell(),
}


def _run(
    weights: Weights,
    active: Sequence[int],
    reverse: bool,
    first: State,
    inputs_TNI: Tensor,
    after_TNH: Tensor,
) -> Run:
    """Return a layer's run in one direction, by its outputs."""
    steps = list(enumerate(active))[:: -1 if reverse else 1]
    before_TNH = first[0].repeat(len(steps), 1, 1)
    for (t, count), (later, _) in pairwise(steps):
        before_TNH[later, :count] = after_TNH[t, :count]
    return Run(weights, steps, first, inputs_TNI, before_TNH, after_TNH)


def _go_back(cell: Cell, run: Run, delta_TNH: Tensor, delta: State) -> tuple[Tensor, Tensor, int]:
    """Return `Cell.gates`, and make delta of the first state of the last one's, in place."""
    slopes = cell.slopes(run)
    of_step = [part.unbind() for part in (delta_TNH, *slopes)]
    for t, count in reversed(run.steps):
        state = [part[:count] for part in delta]
        delta_NH, *parts = (part[t][:count] for part in of_step)
        state[0] += delta_NH
        cell.retreat(parts, run.weights.hidden, state)
        if count < len(delta[0]):
            for part in slopes:
                part[t, count:] = 0
    return cell.gates(slopes)


def _factors(run: Run, own_TNG: Tensor, back_TNG: Tensor, same: int) -> Factors:
    """Yield those of the parameters, by delta of the gates: what both have in common, once."""
    common = cache(lambda: gram(_by_sample(own_TNG[:, :, :same])))
    bias = Explicit(own_TNG.sum(0))
    for weight, bias_of, delta_TNG, values_TNK in (
        (run.weights.input, run.weights.input_bias, own_TNG, run.inputs),
        (run.weights.hidden, run.weights.hidden_bias, back_TNG, run.before),
    ):
        left, right = _by_sample(delta_TNG), _by_sample(values_TNK)
        left_gram = partial(_gram_of, common, left[..., same:])
        yield weight, Outer(left, right, weight.shape, left_gram)
        yield bias_of, bias if delta_TNG is own_TNG else Explicit(delta_TNG.sum(0))


def _gram_of(common: Callable[[], Tensor], rest: Tensor) -> Tensor:
    return common() + gram(rest) if rest.shape[3] else common()


def _by_sample(values_TNK: Tensor) -> Tensor:
    return values_TNK.transpose(0, 1).unsqueeze(2)


def _rule(
    name: str, batch: Batch, delta: Sequence[Tensor], output: Tensor | None, *args: Any
) -> Factors:
    """Yield the factors of torch.lstm, torch.gru, ..., in both of their forms.

    (input, states, parameters, ...); of packed sequences (data, sizes, states, parameters, ...).
    """
    sizes = () if isinstance(args[3], bool) else args[1:2]
    states, parameters, biases, layers, dropout, train, both, *rest = args[1 + len(sizes) :]
    ways, each = 1 + both, 4 if biases else 2
    if len(parameters) != each * layers * ways or (dropout and train and layers > 1):
        raise UnsupportedError(
            expected="recurrent layers without projections, and without dropout between them",
            got="dropout, whose masks are not known" if dropout else "projections",
            where="a recurrent layer",
            todo="use one layer after another with a Dropout between them, and no proj_size",
        )
    if sizes:
        active = sizes[0].tolist()
    else:
        steps, count = args[0].shape[1::-1] if any(rest) else args[0].shape[:2]  # batch_first
        active = [count] * steps
    if active[0] != batch.size:
        raise UnsupportedError(
            expected=f"{batch.size} sequences, one for each index of the step",
            got=f"{active[0]}",
            where="a recurrent layer",
            todo="name as many samples as the batch has; mind batch_first",
        )
    dtype = parameters[0].dtype  # under autocast, what comes and goes has another one
    states = states if isinstance(states, list | tuple) else (states,)
    first, ends = (
        [part.reshape(-1, batch.size, part.shape[-1]).to(dtype, copy=True) for part in parts]
        for parts in (states, delta[1:])
    )
    weights = [Weights(*parameters[i : i + each]) for i in range(0, len(parameters), each)]

    def arranged(values: Tensor) -> Tensor:
        """Return inputs, outputs or their delta as (T, N, ...)."""
        values = values.to(dtype)
        if sizes:
            return _padded(values, active)
        return values.transpose(0, 1).contiguous() if any(rest) else values  # batch_first

    values = [args[0].to(dtype)]  # the inputs of each layer, and then the outputs of the last
    for number in range(layers if output is None else layers - 1):
        some = slice(number * ways, (number + 1) * ways)
        own = [part[some] for part in first]
        flat = parameters[some.start * each : some.stop * each]
        whole = values[-1], *sizes, own if len(own) > 1 else own[0], flat
        values.append(getattr(torch, name)(*whole, biases, 1, 0.0, False, both, *rest)[0])
    values = [arranged(one) for one in (*values, *(() if output is None else (output,)))]
    delta_TNK = arranged(delta[0])
    for number in reversed(range(layers)):
        outputs, deltas = values.pop().chunk(ways, 2), delta_TNK.chunk(ways, 2)
        delta_TNK = torch.zeros(())
        for way in range(ways):
            i = number * ways + way
            run = _run(
                weights[i], active, bool(way), [p[i] for p in first], values[-1], outputs[way]
            )
            own_TNG, back_TNG, same = _go_back(CELLS[name], run, deltas[way], [p[i] for p in ends])
            yield from _factors(run, own_TNG, back_TNG, same)
            if number:
                delta_TNK = own_TNG @ run.weights.input + delta_TNK
    for state, delta_LNH in zip(states, ends, strict=True):  # what came to the first is left
        if state.requires_grad and not batch.varies(state):
            by_sample = torch.diag_embed(delta_LNH.transpose(1, 2)).permute(2, 0, 3, 1)
            yield state, Explicit(by_sample.reshape(-1, *state.shape))


def _padded(data: Tensor, active: Sequence[int]) -> Tensor:
    """Return a packed sequence's data as (T, N, ...), zero where a sequence has ended."""
    padded = data.new_zeros(len(active), active[0], *data.shape[1:])
    for t, part in enumerate(data.split(list(active))):
        padded[t, : len(part)] = part
    return padded


def _cell_rule(
    name: str,
    batch: Batch,
    delta: Any,
    output: Tensor | None,
    input: Tensor,
    states: Any,
    *parameters: Tensor | None,
) -> Factors:
    """Yield the factors of torch.lstm_cell, torch.gru_cell, ...: one step of one layer."""
    ends = (delta,) if isinstance(delta, Tensor) else delta
    nothing = torch.zeros_like(ends[0])[None]  # what leaves a step is its state alone
    output = None if output is None else output[None]
    flat = [parameter for parameter in parameters if parameter is not None]
    options = len(flat) == 4, 1, 0.0, False, False, False
    yield from _rule(name, batch, (nothing, *ends), output, input[None], states, flat, *options)


for _name in CELLS:
    layer_rule(getattr(torch, _name), with_output=True)(partial(_rule, _name))
    layer_rule(getattr(torch, f"{_name}_cell"), with_output=True)(partial(_cell_rule, _name))
