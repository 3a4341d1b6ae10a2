"""Rules of recurrent layers (`nn.RNN`, `nn.LSTM`, `nn.GRU`) and of their cells.

PyTorch carries out all steps of all layers in one operation, which returns the outputs of the last
layer and gives no access to inner gradients. On a CPU the gradients are read from autograd's graph
(`sampimp.importance.rules.recurrent_graph`), and these rules are not called. They serve the other
cases: a GPU, checkpointing, autocast, frozen parameters, learned first states. They carry out the
lower layers again, each as an operation of its own, and backpropagate through every layer
(`sampimp.importance.rules.recurrent_backward`).

Map: `recurrent_factors` (layers), `recurrent_cell_factors` (cells).

Shape suffixes: T steps, N samples, L layers times directions, H units, K features.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Explicit
from sampimp.importance.rules.batch import Batch, Factors
from sampimp.importance.rules.recurrent_backward import (
    CELLS,
    LayerRun,
    backpropagate,
    layer_factors,
)
from sampimp.importance.rules.recurrent_call import RecurrentCall, cell_arguments


def recurrent_factors(
    name: str, batch: Batch, delta: Sequence[Tensor], *args: Any, **kwargs: Any
) -> Factors:
    """Yield the factors of `torch.lstm`, `torch.gru`, ...

    Parameters
    ----------
    name
        Name of the operation; the other parameters are those of a rule.

    Raises
    ------
    UnsupportedError
        The layers have projections, or dropout between them: its masks are not known.
    """
    call = RecurrentCall.of(*args, **kwargs)
    if call.dropout or any(weights.projection is not None for weights in call.weights):
        raise UnsupportedError(
            expected="recurrent layers without projections, and without dropout between them",
            got="dropout, whose masks are not known" if call.dropout else "projections",
            where="a recurrent layer whose inner operations are not in autograd's graph",
            todo="use one layer after another with a Dropout between them, and no proj_size",
        )
    dtype = call.parameters[0].dtype  # under autocast, gradients have another dtype
    first, last = (
        [part.reshape(-1, batch.size, part.shape[-1]).to(dtype, copy=True) for part in parts]
        for parts in (call.states, delta[1:])
    )
    values = _layer_values(name, call, batch.output, first)
    delta_TNK = _steps_first(call, delta[0])
    for layer in reversed(range(call.layers)):
        outputs = values.pop().chunk(call.directions, 2)
        output_deltas = delta_TNK.chunk(call.directions, 2)
        delta_TNK = torch.zeros(())
        for direction in range(call.directions):
            number = layer * call.directions + direction
            run = LayerRun.of(
                call.weights[number],
                call.active,
                bool(direction),
                [part[number] for part in first],
                values[-1],
                outputs[direction],
            )
            last_of_run = [part[number] for part in last]
            deltas = backpropagate(CELLS[name], run, output_deltas[direction], last_of_run)
            yield from layer_factors(run.weights, run.inputs, run.before, deltas)
            if layer:
                delta_TNK = deltas.x_part @ run.weights.input + delta_TNK
    # `backpropagate` has replaced the output gradients of the last states by those of the first.
    for state, delta_LNH in zip(call.states, last, strict=True):
        if state.requires_grad and not batch.varies(state):
            by_sample = torch.diag_embed(delta_LNH.transpose(1, 2)).permute(2, 0, 3, 1)
            yield state, Explicit(by_sample.reshape(-1, *state.shape))


def _layer_values(
    name: str, call: RecurrentCall, output: Tensor | None, first: Sequence[Tensor]
) -> list[Tensor]:
    """Return the inputs of each layer and the outputs of the last, as (T, N, ...).

    The layers are carried out again, except the last if its output is known.
    """
    dtype = call.parameters[0].dtype
    per_run = len(call.parameters) // len(call.weights)
    values: list[Tensor] = [call.data.to(dtype)]
    for layer in range(call.layers if output is None else call.layers - 1):
        runs = slice(layer * call.directions, (layer + 1) * call.directions)
        states = [part[runs] for part in first]
        parameters = call.parameters[runs.start * per_run : runs.stop * per_run]
        arguments: list[Any] = [values[-1], *(() if call.sizes is None else (call.sizes,))]
        arguments += [states if len(states) > 1 else states[0], parameters, call.biases]
        arguments += [1, 0.0, False, call.directions == 2]  # one layer, without dropout
        arguments += [] if call.sizes is not None else [call.batch_first]
        values.append(getattr(torch, name)(*arguments)[0])
    if output is not None:
        values.append(output)
    return [_steps_first(call, tensor) for tensor in values]


def _steps_first(call: RecurrentCall, values: Tensor) -> Tensor:
    """Return inputs, outputs or output gradients as (T, N, ...), in the parameters' precision."""
    values = values.to(call.parameters[0].dtype)
    if call.sizes is not None:
        return call.arranged(values)
    return values.transpose(0, 1).contiguous() if call.batch_first else values


def recurrent_cell_factors(
    name: str, batch: Batch, delta: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any
) -> Factors:
    """Yield the factors of `torch.lstm_cell`, `torch.gru_cell`, ...: one step of one layer.

    Parameters
    ----------
    name
        Name of the operation without `_cell`; the other parameters are those of a rule.
    """
    states = (delta,) if isinstance(delta, Tensor) else delta
    outputs = torch.zeros_like(states[0])[None]  # the output of a cell is its state alone
    if batch.output is not None:
        batch = replace(batch, output=batch.output[None])
    yield from recurrent_factors(name, batch, (outputs, *states), *cell_arguments(*args, **kwargs))
