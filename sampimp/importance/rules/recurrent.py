"""Rules of recurrent layers: `nn.RNN`, `nn.LSTM`, `nn.GRU` as they come, and their cells.

PyTorch carries out all steps of all layers in one operation, which shows the outputs of the last
layer and no gradient inside. On a CPU autograd's graph (`sampimp.importance.rules.inner_nodes`)
tells more: of RNN and GRU
all matrix products, and so all there is to know, and of an LSTM in float32 its layers.

Where it does not, the layers below are carried out again, each as an operation of its own. From a
layer's outputs follow its gates of all steps at once, and the slopes by which they pass delta on.
Only that is done step by step, going back: a matrix product, and products with slopes.

    gates_t = own_t + back_t with own_t = W_ih x_t + b_ih and back_t = W_hh h_{t-1} + b_hh
    RNN     h_t = tanh(gates_t), or relu
    LSTM    i, f, g, o = gates_t;  c_t = s(f) c_{t-1} + s(i) tanh(g);  h_t = s(o) tanh(c_t)
    GRU     r, z, n = gates_t with n = own_n + s(r) back_n;  h_t = (1 - s(z)) tanh(n) + s(z) h_{t-1}

Shape suffixes: T steps, N samples, I inputs, H units, G gates times units; where a sequence has
ended, there are zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.utils.rnn import pad_sequence

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Explicit, Outer, gram
from sampimp.importance.rules.arithmetic import Batch, Factors, layer_rule
from sampimp.importance.rules.inner_nodes import (
    Gradients,
    InnerNodes,
    NodeReader,
    leaf_input,
    may_read_saved_tensors,
    nodes_between,
)

State = Sequence[Tensor]
"""Of a layer: its output h, and an LSTM's cell c."""
Slopes = Sequence[Tensor]
"""How a step passes on delta of its state."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    projection: Tensor | None = None
    """Of an LSTM: from its units to fewer outputs."""
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

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """Return delta of own and of back (T, N, G), after `retreat` of all steps."""

    def shared(self, gates: int) -> int:
        """Return of how many of all gates delta is the same in own and back."""


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

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """Return delta of own and back."""
        return slopes[0], slopes[0]

    def shared(self, gates: int) -> int:
        """Return all."""
        return gates


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

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """Return delta of own and back."""
        gates = slopes[0].flatten(2)
        return gates, gates

    def shared(self, gates: int) -> int:
        """Return all."""
        return gates


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

    def gates(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """Return delta of own and back."""
        back, own = slopes
        own[:, :, :2] = back[:, :, :2]
        return own.flatten(2), back.flatten(2)

    def shared(self, gates: int) -> int:
        """Return those of r and z."""
        return gates // 3 * 2


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
    """Return `Cell.gates` and `Cell.shared`, and make delta of the last state that of the first."""
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
    own_TNG, back_TNG = cell.gates(slopes)
    return own_TNG, back_TNG, cell.shared(own_TNG.shape[2])


def _factors(
    weights: Weights,
    inputs_TNI: Tensor,
    before_TNH: Tensor,
    own_TNG: Tensor,
    back_TNG: Tensor,
    same: int,
) -> Factors:
    """Yield those of the parameters, by delta of the gates: what both have in common, once."""
    common = cache(lambda: gram(_by_sample(own_TNG[:, :, :same])))
    bias = Explicit(own_TNG.sum(0))
    for weight, bias_of, delta_TNG, values_TNK in (
        (weights.input, weights.input_bias, own_TNG, inputs_TNI),
        (weights.hidden, weights.hidden_bias, back_TNG, before_TNH),
    ):
        left, right = _by_sample(delta_TNG), _by_sample(values_TNK)
        left_gram = partial(_gram_of, common, left[..., same:])
        yield weight, Outer(left, right, weight.shape, left_gram)
        yield bias_of, bias if delta_TNG is own_TNG else Explicit(delta_TNG.sum(0))


def _gram_of(common: Callable[[], Tensor], rest: Tensor) -> Tensor:
    return common() + gram(rest) if rest.shape[3] else common()


def _by_sample(values_TNK: Tensor) -> Tensor:
    return values_TNK.transpose(0, 1).unsqueeze(2)


class Call(NamedTuple):
    """What torch.lstm, torch.gru, ... are given, in either form."""

    data: Tensor
    sizes: Tensor | None
    """Of a packed sequence: how many sequences go on at each step."""
    active: list[int]
    """How many sequences go on at each step, the longest of which are first."""
    states: Sequence[Tensor]
    parameters: Sequence[Tensor]
    weights: Sequence[Weights]
    """The parameters of each layer in each direction: of each run."""
    biases: bool
    layers: int
    ways: int
    """1, or 2 of a bidirectional layer."""
    dropout: bool
    """Whether there is dropout between layers."""
    batch_first: bool

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> "Call":
        """Take (input, hx, params, ...), or of packed sequences (data, batch_sizes, hx, ...)."""
        names: tuple[str, ...]
        names = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
        if "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool)):
            names = ("data", "batch_sizes", *names)
        else:
            names = ("input", *names, "batch_first")
        given = dict(zip(names, args, strict=False)) | kwargs
        data: Tensor = given["data"] if "data" in given else given["input"]
        sizes = given.get("batch_sizes")
        batch_first = given.get("batch_first", False)
        steps, count = data.shape[1::-1] if batch_first else data.shape[:2]
        states, parameters = given["hx"], given["params"]
        runs = given["num_layers"] * (1 + given["bidirectional"])
        each, weights = len(parameters) // runs, []
        for start in range(0, len(parameters), each):
            input, hidden, *rest = parameters[start : start + each]
            own, rest = (rest[:2], rest[2:]) if given["has_biases"] else ([None, None], rest)
            weights.append(Weights(input, hidden, rest[0] if rest else None, *own))
        return cls(
            data=data,
            sizes=sizes,
            active=[count] * steps if sizes is None else sizes.tolist(),
            states=states if isinstance(states, list | tuple) else (states,),
            parameters=parameters,
            weights=weights,
            biases=given["has_biases"],
            layers=given["num_layers"],
            ways=1 + given["bidirectional"],
            dropout=bool(given["dropout"]) and given["train"] and given["num_layers"] > 1,
            batch_first=batch_first,
        )

    def order(self, run: int) -> int:
        """Return how a run of a layer in a direction goes in time: on, 1, or back, -1."""
        return -1 if run % self.ways else 1

    def arranged(self, rows: Tensor) -> Tensor:
        """Return the rows of all steps as (T, N, ...), zero where a sequence has ended."""
        if self.sizes is not None:
            return pad_sequence(rows.split(self.active), batch_first=True)
        return rows.unflatten(0, (-1, self.active[0]))


def packed_sequences(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return which sequence each row of a packed sequence is of, from the arguments of torch.lstm.

    None where they are not packed.
    """
    sizes = kwargs.get("batch_sizes", args[1] if len(args) > 1 else None)
    is_packed = isinstance(sizes, Tensor) and sizes.dim() == 1 and not sizes.is_floating_point()
    return torch.cat([torch.arange(size) for size in sizes.tolist()]) if is_packed else None


def is_batch_first(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the outputs of torch.lstm, ... are (N, T, H), from its arguments."""
    is_cell = getattr(function, "__name__", "").endswith("_cell")
    return not is_cell and Call.of(*args, **kwargs).batch_first


_LAYER = "MkldnnRnnLayerBackward0"
_VALUES = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
"""Nodes of values @ weight^T, and where they keep the values."""


def _look(
    name: str, batch: Batch, outputs: Sequence[Tensor], *args: Any, **kwargs: Any
) -> InnerNodes | None:
    """Return what is seen of all layers in autograd's graph; None where something is missing.

    On a CPU an LSTM in float32 is one node a layer and direction, and the others are products of
    matrices and what is between them. On a GPU each is one node that shows nothing.
    """
    call = Call.of(*args, **kwargs)
    return _look_between(name, batch, outputs, (call.data, *call.states), call)


def _look_between(
    name: str, batch: Batch, outputs: Sequence[Tensor], inputs: Sequence[Tensor], call: Call
) -> InnerNodes | None:
    """Return what is seen between the inputs, as the caller has them, and the outputs."""
    learned = any(one.requires_grad and not batch.varies(one) for one in call.states)
    leaves = all(one.is_leaf and one.requires_grad for one in call.parameters)
    if learned or not leaves or not may_read_saved_tensors():
        return None
    nodes = nodes_between(outputs, inputs, {*_VALUES, _LAYER})
    layers = [node for node in nodes if node.name() == _LAYER]
    if layers:
        found = [leaf_input(node, 1) for node in layers]
        complete = list(map(id, found)) == [id(own.input) for own in call.weights]
        return InnerNodes(layers, _Layers(call)) if complete else None
    return _see_products(name, nodes, call)


def _see_products(name: str, nodes: Sequence[Node], call: Call) -> InnerNodes | None:
    """Return the products of all runs and steps among nodes; None where one is missing."""
    of_weight: dict[int, list[Node]] = {}
    for node in nodes:
        of_weight.setdefault(id(leaf_input(node, -1)), []).append(node)
    slots, products = [], []
    for run, own in enumerate(call.weights):
        steps = range(len(call.active))[:: call.order(run)]
        for part, weight in ((INPUT, own.input), (HIDDEN, own.hidden), (UNITS, own.projection)):
            if weight is not None:
                times = steps[:1] if part == INPUT else steps
                found = of_weight.get(id(weight), [])
                if len(found) != len(times):
                    return None
                slots += [(run, part, t) for t in times]
                products += found
    return InnerNodes(products, _Products(name, call, slots))


INPUT, HIDDEN, UNITS = range(3)
"""What is multiplied by a weight: the inputs, h, and an LSTM's units where there are projections.
"""


class _Products:
    """Reads the matrix products that a layer is made of: one of all inputs, the others by step."""

    def __init__(self, name: str, call: Call, slots: Sequence[tuple[int, int, int]]) -> None:
        self._name, self._call = name, call
        self._slots = slots
        """Of each product: run, what is multiplied, step."""
        self._values: dict[int, Tensor] = {}
        """What is multiplied in each product, (n, K)."""
        self._deltas: dict[int, Tensor] = {}
        """What comes back to some, (n, O)."""

    def open(self, nodes: Sequence[Node]) -> None:
        """Take what is multiplied."""
        saved = (getattr(node, _VALUES[node.name()]) for node in nodes)
        self._values = dict(enumerate(saved))

    def take(self, position: int, gradients: Gradients) -> None:
        """Take what comes to a product, but for h where it is what comes to the inputs."""
        delta = gradients[0]
        if delta is not None and (self._slots[position][1] != HIDDEN or self._name == "gru"):
            self._deltas[position] = delta

    def factors(self) -> Factors:
        """Yield those of all layers."""
        came = {self._slots[position][:2] for position in self._deltas}
        positions: dict[tuple[int, int], list[int]] = {}
        for position, (run, part, _) in enumerate(self._slots):
            positions.setdefault((run, part), []).append(position)

        def over_time(run: int, part: int, of: Callable[[int], Tensor]) -> Tensor:
            """Return something of all products of a kind as (T, N, ...)."""
            here = positions[run, part][:: self._call.order(run)]
            if part == INPUT:
                return self._call.arranged(of(here[0]))
            return pad_sequence([of(position) for position in here], batch_first=True)

        values = self._values.pop  # what is put together is let go
        for run, weights in enumerate(self._call.weights):
            if (run, INPUT) not in came:
                continue
            own_TNG = over_time(run, INPUT, self._delta)
            back_TNG = over_time(run, HIDDEN, self._delta) if self._name == "gru" else own_TNG
            inputs_TNI, before_TNH = (over_time(run, part, values) for part in (INPUT, HIDDEN))
            same = CELLS[self._name].shared(own_TNG.shape[2])
            yield from _factors(weights, inputs_TNI, before_TNH, own_TNG, back_TNG, same)
            if weights.projection is not None:
                left, right = (over_time(run, UNITS, of) for of in (self._delta, values))
                shape = weights.projection.shape
                yield weights.projection, Outer(_by_sample(left), _by_sample(right), shape)

    def _delta(self, position: int) -> Tensor:
        """Return what came back to a product, zero where nothing did."""
        delta, (run, part, _) = self._deltas.pop(position, None), self._slots[position]
        if delta is None:
            weight, values = self._call.weights[run][part], self._values[position]
            assert weight is not None
            delta = values.new_zeros(len(values), len(weight))
        return delta


class _Layers:
    """Reads an LSTM whose layers and directions are one node each."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._saved: list[list[Any]] = []
        self._gradients: dict[int, Gradients] = {}

    def open(self, nodes: Sequence[Node]) -> None:
        """Take inputs and outputs (T, N, ...), the first states, and whether it runs backwards."""
        names = ("input", "result0", "hx_", "cx_", "reverse")
        self._saved = [[getattr(node, f"_saved_{name}") for name in names] for node in nodes]

    def take(self, position: int, gradients: Gradients) -> None:
        """Take those of the outputs and of the last states."""
        self._gradients[position] = gradients[:3]

    def factors(self) -> Factors:
        """Yield those of all layers, each gone back through."""
        for position, gradients in self._gradients.items():
            inputs_TNI, after_TNH, *first, backwards = self._saved[position]
            first = [one.reshape(after_TNH.shape[1:]) for one in first]
            delta_TNH, *ends = (
                torch.zeros_like(like) if one is None else one.reshape(like.shape).clone()
                for one, like in zip(gradients, (after_TNH, *first), strict=True)
            )
            weights, active = self._call.weights[position], self._call.active
            run = _run(weights, active, backwards, first, inputs_TNI, after_TNH)
            gates = _go_back(CELLS["lstm"], run, delta_TNH, ends)
            yield from _factors(weights, run.inputs, run.before, *gates)


def _rule(
    name: str,
    batch: Batch,
    delta: Sequence[Tensor],
    seen: Tensor | NodeReader | None,
    *args: Any,
    **kwargs: Any,
) -> Factors:
    """Yield the factors of torch.lstm, torch.gru, ...: by what was seen, or by going back again."""
    call = Call.of(*args, **kwargs)
    if isinstance(seen, Tensor | None):
        yield from _by_going_back(name, batch, delta, seen, call)
    else:
        yield from seen.factors()


def _by_going_back(
    name: str, batch: Batch, delta: Sequence[Tensor], output: Tensor | None, call: Call
) -> Factors:
    """Yield the factors by carrying the layers out again, but for the last where it is known."""
    if call.dropout or any(own.projection is not None for own in call.weights):
        raise UnsupportedError(
            expected="recurrent layers without projections, and without dropout between them",
            got="dropout, whose masks are not known" if call.dropout else "projections",
            where="a recurrent layer of which autograd's graph does not show the inside",
            todo="use one layer after another with a Dropout between them, and no proj_size",
        )
    ways, dtype = call.ways, call.parameters[0].dtype  # under autocast, what comes has another one
    first, ends = (
        [part.reshape(-1, batch.size, part.shape[-1]).to(dtype, copy=True) for part in parts]
        for parts in (call.states, delta[1:])
    )
    each = len(call.parameters) // len(call.weights)

    def arranged(values: Tensor) -> Tensor:
        """Return inputs, outputs or their delta as (T, N, ...)."""
        values = values.to(dtype)
        if call.sizes is not None:
            return call.arranged(values)
        return values.transpose(0, 1).contiguous() if call.batch_first else values

    values = [call.data.to(dtype)]  # the inputs of each layer, and then the outputs of the last
    for number in range(call.layers if output is None else call.layers - 1):
        some = slice(number * ways, (number + 1) * ways)
        own = [part[some] for part in first]
        flat = call.parameters[some.start * each : some.stop * each]
        given = [values[-1], *(() if call.sizes is None else (call.sizes,))]
        given += [own if len(own) > 1 else own[0], flat, call.biases, 1, 0.0, False, ways == 2]
        given += [] if call.sizes is not None else [call.batch_first]
        values.append(getattr(torch, name)(*given)[0])
    values = [arranged(one) for one in (*values, *(() if output is None else (output,)))]
    delta_TNK = arranged(delta[0])
    for number in reversed(range(call.layers)):
        outputs, deltas = values.pop().chunk(ways, 2), delta_TNK.chunk(ways, 2)
        delta_TNK = torch.zeros(())
        for way in range(ways):
            i = number * ways + way
            run = _run(
                call.weights[i],
                call.active,
                bool(way),
                [part[i] for part in first],
                values[-1],
                outputs[way],
            )
            gates = _go_back(CELLS[name], run, deltas[way], [part[i] for part in ends])
            yield from _factors(run.weights, run.inputs, run.before, *gates)
            if number:
                delta_TNK = gates[0] @ run.weights.input + delta_TNK
    for state, delta_LNH in zip(call.states, ends, strict=True):  # what came to the first is left
        if state.requires_grad and not batch.varies(state):
            by_sample = torch.diag_embed(delta_LNH.transpose(1, 2)).permute(2, 0, 3, 1)
            yield state, Explicit(by_sample.reshape(-1, *state.shape))


def _as_call(
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Any, ...]:
    """Return the arguments of a cell as those of one step of one layer."""
    flat = [one for one in (w_ih, w_hh, b_ih, b_hh) if one is not None]
    return input[None], hx, flat, len(flat) == 4, 1, 0.0, False, False, False


def _look_into_cell(
    name: str, batch: Batch, outputs: Sequence[Tensor], input: Tensor, *args: Any, **kwargs: Any
) -> InnerNodes | None:
    """Return what is seen of a cell."""
    call = Call.of(*_as_call(input, *args, **kwargs))
    return _look_between(name, batch, outputs, (input, *call.states), call)


def _cell_rule(
    name: str, batch: Batch, delta: Any, seen: Tensor | NodeReader | None, *args: Any, **kwargs: Any
) -> Factors:
    """Yield the factors of torch.lstm_cell, torch.gru_cell, ...: one step of one layer."""
    if isinstance(delta, Tensor):
        delta = (delta,)
    if delta is not None:  # what leaves a step is its state alone
        delta = (torch.zeros_like(delta[0])[None], *delta)
    seen = seen[None] if isinstance(seen, Tensor) else seen
    yield from _rule(name, batch, delta, seen, *_as_call(*args, **kwargs))


for _name in CELLS:
    for _function, _own_rule, _own_look in (
        (getattr(torch, _name), _rule, _look),
        (getattr(torch, f"{_name}_cell"), _cell_rule, _look_into_cell),
    ):
        register = layer_rule(_function, look=partial(_own_look, _name), features=1)
        register(partial(_own_rule, _name))
