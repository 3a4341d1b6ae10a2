"""The arguments of PyTorch's recurrent operations, in one form.

`torch.rnn_tanh`, `torch.rnn_relu`, `torch.lstm` and `torch.gru` take either a tensor of sequences
or packed sequences, with other positions of the arguments; their cells take one step. Parameters
come as one flat list for all layers and directions.

Map: `RecurrentCall` (the arguments), `LayerWeights` (parameters of one layer in one direction),
`cell_arguments` (the arguments of a cell as those of a layer), `packed_sequences` and
`is_batch_first` (used by the proof of the row-to-sample mapping).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class LayerWeights(NamedTuple):
    """The parameters of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    projection: Tensor | None = None
    """Projection of an LSTM's units to fewer outputs."""
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None


class RecurrentCall(NamedTuple):
    """The arguments of a recurrent operation.

    A *run* is one layer in one direction; runs are numbered layer by layer, forward before
    backward.
    """

    data: Tensor
    sizes: Tensor | None
    """For packed sequences: how many sequences have a value at each step; else None."""
    active: list[int]
    """How many sequences have a value at each step; the longest sequences are first."""
    states: Sequence[Tensor]
    parameters: Sequence[Tensor]
    weights: Sequence[LayerWeights]
    """The parameters of each run."""
    biases: bool
    layers: int
    directions: int
    """1, or 2 for bidirectional layers."""
    dropout: bool
    """Whether there is dropout between layers."""
    batch_first: bool

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> "RecurrentCall":
        """Read (input, hx, params, ...), or for packed sequences (data, batch_sizes, hx, ...)."""
        names: tuple[str, ...]
        names = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
        if "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool)):
            names = ("data", "batch_sizes", *names)
        else:
            names = ("input", *names, "batch_first")
        named = dict(zip(names, args, strict=False)) | kwargs
        data: Tensor = named["data"] if "data" in named else named["input"]
        sizes = named.get("batch_sizes")
        batch_first = named.get("batch_first", False)
        steps, count = data.shape[1::-1] if batch_first else data.shape[:2]
        states, parameters = named["hx"], named["params"]
        runs = named["num_layers"] * (1 + named["bidirectional"])
        return cls(
            data=data,
            sizes=sizes,
            active=[count] * steps if sizes is None else sizes.tolist(),
            states=states if isinstance(states, list | tuple) else (states,),
            parameters=parameters,
            weights=_weights_by_run(parameters, runs, named["has_biases"]),
            biases=named["has_biases"],
            layers=named["num_layers"],
            directions=1 + named["bidirectional"],
            dropout=bool(named["dropout"]) and named["train"] and named["num_layers"] > 1,
            batch_first=batch_first,
        )

    def order(self, run: int) -> int:
        """Return the order of a run's steps in time: 1 for forward, -1 for backward."""
        return -1 if run % self.directions else 1

    def arranged(self, rows: Tensor) -> Tensor:
        """Return the rows of all steps as (T, N, ...), zero where a sequence has ended."""
        if self.sizes is not None:
            return pad_sequence(rows.split(self.active), batch_first=True)
        return rows.unflatten(0, (-1, self.active[0]))


def _weights_by_run(
    parameters: Sequence[Tensor], runs: int, has_biases: bool
) -> list[LayerWeights]:
    """Split the flat list of parameters by layer and direction."""
    count, weights = len(parameters) // runs, []
    for start in range(0, len(parameters), count):
        input, hidden, *rest = parameters[start : start + count]
        biases, rest = (rest[:2], rest[2:]) if has_biases else ([None, None], rest)
        weights.append(LayerWeights(input, hidden, rest[0] if rest else None, *biases))
    return weights


def cell_arguments(
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Any, ...]:
    """Return the arguments of a cell as those of one step of one layer."""
    parameters = [tensor for tensor in (w_ih, w_hh, b_ih, b_hh) if tensor is not None]
    return input[None], hx, parameters, len(parameters) == 4, 1, 0.0, False, False, False


def packed_sequences(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the number of the sequence of each row of packed sequences, shape (rows,).

    Parameters
    ----------
    args, kwargs
        Arguments of a recurrent operation.

    Returns
    -------
    Tensor or None
        None if the sequences are not packed.
    """
    sizes = kwargs.get("batch_sizes", args[1] if len(args) > 1 else None)
    is_packed = isinstance(sizes, Tensor) and sizes.dim() == 1 and not sizes.is_floating_point()
    return torch.cat([torch.arange(size) for size in sizes.tolist()]) if is_packed else None


def is_batch_first(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the outputs of a recurrent operation are (N, T, H)."""
    is_cell = getattr(function, "__name__", "").endswith("_cell")
    return not is_cell and RecurrentCall.of(*args, **kwargs).batch_first
