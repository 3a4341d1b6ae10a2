"""Tiny recurrent networks. States are (layers, samples, units)."""

from collections.abc import Callable
from typing import Any

import torch
from network_case import Calls, Case, N, T, frozen, parameter, positions_first
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn


def samples_first(output: Any) -> tuple[Tensor, ...]:
    """Return all states of a recurrent network with the samples first."""
    _, states = output
    return tuple(s.transpose(0, 1) for s in (states if isinstance(states, tuple) else (states,)))


def outputs_and_states(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    result = model.rnn(x)
    return model.out(result[0]), *samples_first(result)


def from_states(model: nn.Module, x: Tensor, *states: Tensor) -> Tensor:
    first = tuple(s.transpose(0, 1).contiguous() for s in states)
    return model.out(model.rnn(x, first if len(first) > 1 else first[0])[0])


def changed_in_place(model: nn.Module, x: Tensor) -> Tensor:
    changed = model.rnn(x)[0].mul_(2)
    return model.out(changed + model.rnn(x.flip(1))[0])  # the rule must use both outputs


def from_learned_states(model: nn.Module, x: Tensor, lengths: Tensor | None = None) -> Any:
    states = tuple(s.expand(-1, len(x), -1).contiguous() for s in model.states)
    first = states if len(states) > 1 else states[0]
    if lengths is None:
        return model.out(model.rnn(x, first)[0])
    return samples_first(model.rnn(rnn.pack_padded_sequence(x, lengths.cpu(), True), first))


def cell_from_learned_states(model: nn.Module, x: Tensor) -> Tensor:
    first = tuple(torch.cat([s] * len(x)) for s in model.states)
    state = model.cell(x[:, 0], first if len(first) > 1 else first[0])
    return state[0] * state[1] if isinstance(state, tuple) else state


def packed(model: nn.Module, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    result = model.rnn(rnn.pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False))
    output, _ = rnn.pad_packed_sequence(result[0], batch_first=True, total_length=T)
    return model.out(output), *samples_first(result)


def unrolled(model: nn.Module, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[1]):
        state = model.cell(x[:, t], state)
    return model.out(state[0] + state[1] if isinstance(state, tuple) else state)


def sharing(model: nn.Module, name: str, other: str) -> nn.Module:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, model.get_parameter(other))
    return model


def tied_gates(model: nn.Module, x: Tensor) -> Any:
    cell = model.cell  # each parameter is passed to the operation twice
    parameters = cell.weight_ih, cell.weight_ih, cell.bias_ih, cell.bias_ih
    return torch.gru_cell(x, torch.tanh(x), *parameters)


def of_low_rank(model: nn.Module, x: Tensor) -> Tensor:
    return torch.gru_cell(x, x.new_zeros(len(x), 3), model.a @ model.b, w_hh=model.w)


def recurrent_cases(kind: type[nn.Module], cell: type[nn.Module], **common: Any) -> dict[str, Any]:
    """Return the cases of one kind of recurrent network; `common` are options of all of them."""

    def model(function: Callable[..., Any], *, width: int = 3, **options: Any) -> nn.Module:
        return Calls(function, rnn=kind(4, 3, **common, **options), out=nn.Linear(width, 2))

    deep = {"num_layers": 2, "bidirectional": True, "batch_first": True, "width": 6}
    states = 2 if kind is nn.LSTM else 1

    def learned(model: nn.Module, *shape: int) -> nn.Module:
        model.states = nn.ParameterList(parameter(*shape) for _ in range(states))
        return model

    lengths = torch.tensor([4, 3, 1])
    unsorted = torch.tensor([3, 1, 4])
    return {
        "positions first": lambda: Case(
            model(lambda s, x: positions_first(lambda x: s.out(s.rnn(x)[0]), x)),
            torch.randn(N, T, 4),
            batch_dim=1,
        ),
        "last state": lambda: Case(
            model(lambda s, x: s.out(samples_first(s.rnn(x))[0]), batch_first=True),
            torch.randn(N, T, 4),
        ),
        "deep, outputs and states": lambda: Case(
            model(outputs_and_states, **deep), torch.randn(N, T, 4)
        ),
        "wide": lambda: Case(  # Gram matrices take fewer operations than the gradients
            Calls(
                outputs_and_states, rnn=kind(4, 8, batch_first=True, **common), out=nn.Linear(8, 2)
            ),
            torch.randn(N, T, 4),
        ),
        "without bias": lambda: Case(
            model(outputs_and_states, bias=False, num_layers=2, batch_first=True),
            torch.randn(N, T, 4),
        ),
        "from given states": lambda: Case(
            model(from_states, **deep),
            torch.randn(N, T, 4),
            *(torch.randn(N, 4, 3) for _ in range(states)),
        ),
        "from learned states": lambda: Case(
            learned(model(from_learned_states, **deep), 4, 1, 3), torch.randn(N, T, 4)
        ),
        "packed, from learned states": lambda: Case(
            learned(model(from_learned_states, **deep), 4, 1, 3), torch.randn(N, T, 4), lengths
        ),
        "changed in place": lambda: Case(
            model(changed_in_place, num_layers=2, batch_first=True), torch.randn(N, T, 4)
        ),
        "packed": lambda: Case(
            model(packed, num_layers=2, batch_first=True), torch.randn(N, T, 4), lengths
        ),
        "packed, in another order": lambda: Case(
            model(packed, **deep), torch.randn(N, T, 4), unsorted
        ),
        "weight_norm": lambda: Case(
            Calls(
                outputs_and_states,
                rnn=parametrizations.weight_norm(
                    kind(4, 3, batch_first=True, **common), "weight_hh_l0"
                ),
                out=nn.Linear(3, 2),
            ),
            torch.randn(N, T, 4),
        ),
        "tied layers": lambda: Case(
            sharing(
                model(outputs_and_states, num_layers=2, batch_first=True),
                "rnn.weight_hh_l1",
                "rnn.weight_hh_l0",
            ),
            torch.randn(N, T, 4),
        ),
        "with dropout between layers": lambda: Case(
            model(outputs_and_states, dropout=0.3, **deep), torch.randn(N, T, 4), random=True
        ),
        "frozen in part": lambda: Case(
            frozen(model(outputs_and_states, **deep), "rnn.weight_hh_l0", "rnn.bias_ih_l1"),
            torch.randn(N, T, 4),
        ),
        "cell": lambda: Case(
            Calls(unrolled, cell=cell(4, 3, **common), out=nn.Linear(3, 2)), torch.randn(N, T, 4)
        ),
        "cell, from learned states": lambda: Case(
            learned(Calls(cell_from_learned_states, cell=cell(4, 3, **common)), 1, 3),
            torch.randn(N, T, 4),
        ),
    }


RECURRENT: dict[str, Callable[[], Case]] = {
    **{
        f"{label}, {name}": build
        for label, cases in {
            "rnn": recurrent_cases(nn.RNN, nn.RNNCell),
            "lstm": recurrent_cases(nn.LSTM, nn.LSTMCell),
            "gru": recurrent_cases(nn.GRU, nn.GRUCell),
        }.items()
        for name, build in cases.items()
    },
    **{
        f"rnn with relu, {name}": build
        for name, build in recurrent_cases(nn.RNN, nn.RNNCell, nonlinearity="relu").items()
        if name in ("cell", "deep, outputs and states")
    },
    "a cell whose parameters are tied": lambda: Case(
        Calls(tied_gates, cell=nn.GRUCell(4, 4)), torch.randn(N, 4)
    ),
    "a cell of low rank": lambda: Case(
        Calls(of_low_rank, a=parameter(9, 2), b=parameter(2, 4), w=parameter(9, 3)),
        torch.randn(N, 4),
    ),
    "lstm with projections": lambda: Case(
        Calls(
            outputs_and_states,
            rnn=nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, proj_size=2),
            out=nn.Linear(4, 2),
        ),
        torch.randn(N, T, 4),
    ),
    "lstm with projections, without bias, packed": lambda: Case(
        Calls(packed, rnn=nn.LSTM(4, 3, bias=False, proj_size=2), out=nn.Linear(2, 2)),
        torch.randn(N, T, 4),
        torch.tensor([3, 1, 4]),
    ),
    "a layer whose outputs are used in part": lambda: Case(
        Calls(
            lambda s, x: s.out(s.rnn(x)[0][:, :2, 3:]),
            rnn=nn.GRU(4, 3, batch_first=True, bidirectional=True),
            out=nn.Linear(3, 2),
        ),
        torch.randn(N, T, 4),
    ),
}
