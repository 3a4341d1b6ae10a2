"""The contract between training and analysis: dimensions, variables, units and chunks.

A trial writes one record, a Zarr group with the variables below; `sampimp.open_cube` stacks the
records of a study along `strategy` and `seed`. Each write covers one whole chunk, one epoch of one
trial, so that two writers never share a chunk. Values that were not measured are NaN, never 0.

Map: `Variable` and `VARIABLES` (the arrays of a record), `REFERENCES` and `STRATEGIES` (the names
of the runs), `chunk_shape` and `Layout` (shapes and chunks), `EpochRecord` (the result of one epoch
of training), `digest` and `digest_json` (checksums).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__version__ = "0.1.0"

SCHEMA_VERSION = 2
"""Version 2: every attempt at a trial writes its own record, and every chunk has a digest."""

REFERENCES = ("shuffle", "shuffle_by_seed")
"""Batches reshuffled every epoch: `shuffle` by one sequence for all seeds, `shuffle_by_seed` by one
sequence per seed."""

STRATEGIES = ("rand", "nlo", "rnlo", "nlm", "sio", "rsio", "sim")
"""The paper's seven strategies, whose batches are fixed for a whole run (section 3.6)."""

SORTED_STRATEGIES = STRATEGIES[1:]
"""The strategies that sort by the final NLL or the overall importance of the reference run."""

REFERENCE_STRATEGY, REFERENCE_SEED = "shuffle", 1
"""The run whose final NLL and overall importance the sorted strategies sort by."""


@dataclass(frozen=True)
class Variable:
    """One array of a record: its dimensions within a trial, type, units and meaning."""

    dims: tuple[str, ...]
    dtype: str
    units: str
    long_name: str


VARIABLES: Mapping[str, Variable] = {
    "importance": Variable(
        ("epoch", "layer", "sample"),
        "float32",
        "parameter^2",
        "in-step sample importance beta: squared norm of the parameter affectibility",
    ),
    "snapshot_importance": Variable(
        ("epoch", "layer", "sample"),
        "float32",
        "parameter^2",
        "sample importance at the fixed parameters of the end of the epoch",
    ),
    "nll": Variable(
        ("epoch", "sample"), "float32", "nat", "negative log-likelihood at the end of the epoch"
    ),
    "batch": Variable(
        ("epoch", "sample"),
        "float32",  # exact up to 2^24 batches; NaN where a trial is missing
        "1",
        "position (0-based, in the order visited) of the batch that used the sample",
    ),
    "train_error": Variable(
        ("epoch",), "float64", "1", "fraction of training samples misclassified"
    ),
    "test_error": Variable(("epoch",), "float64", "1", "fraction of test samples misclassified"),
    "train_nll": Variable(
        ("epoch",), "float64", "nat", "mean negative log-likelihood of the training samples"
    ),
    "test_nll": Variable(
        ("epoch",), "float64", "nat", "mean negative log-likelihood of the test samples"
    ),
    "parameters": Variable(
        ("state", "parameter"),
        "float32",
        "parameter",
        "all parameters flattened in the model's order; state 0 is the start, t after epoch t",
    ),
}

CURVES = ("train_error", "test_error", "train_nll", "test_nll")
"""The variables with one value per epoch."""

CHUNK_VALUES = 2**20
"""Largest number of values in a chunk; larger chunks are split along their last dimension (4 MiB of
float32)."""


def chunk_shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the chunk of a variable: one epoch (or state), split along its last dimension.

    A curve is a single chunk, written once, instead of 50 files of 8 bytes.

    Parameters
    ----------
    name
        A key of `VARIABLES`.
    sizes
        Size of each of the variable's dimensions.

    Examples
    --------
    >>> chunk_shape("importance", {"epoch": 50, "layer": 4, "sample": 50_000})
    (1, 4, 50000)
    >>> chunk_shape("importance", {"epoch": 90, "layer": 60, "sample": 1_281_167})
    (1, 60, 17476)
    """
    dims = VARIABLES[name].dims
    if len(dims) == 1:
        return (sizes[dims[0]],)
    middle = tuple(sizes[dim] for dim in dims[1:-1])
    last = max(1, CHUNK_VALUES // max(1, int(np.prod(middle))))
    return (1, *middle, min(sizes[dims[-1]], last))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of a trial's record.

    Examples
    --------
    >>> layout = Layout(epoch=3, layer=2, sample=10, parameter=7, states=(0, 2, 3))
    >>> layout.shape("parameters"), list(layout.positions("parameters"))
    ((3, 7), [0, 2, 3])
    >>> layout.shape("nll"), list(layout.positions("nll"))
    ((3, 10), [1, 2, 3])
    """

    epoch: int
    layer: int
    sample: int
    parameter: int
    states: tuple[int, ...]
    """The states whose parameters are stored: 0 is the start, t after epoch t."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""
        return {
            "epoch": self.epoch,
            "layer": self.layer,
            "sample": self.sample,
            "parameter": self.parameter,
            "state": len(self.states),
        }

    @property
    def variables(self) -> list[str]:
        """Names of a record's variables."""
        return [
            name
            for name in VARIABLES
            if name != "snapshot_importance" and (self.states or name != "parameters")
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a variable."""
        return tuple(self.sizes[dim] for dim in VARIABLES[name].dims)

    def chunk(self, name: str) -> tuple[int, ...]:
        """Return the shape of a variable's chunks."""
        return chunk_shape(name, self.sizes)

    def positions(self, name: str) -> Sequence[int]:
        """Return the epoch, or state, at each position of a variable's first dimension."""
        return self.states if name == "parameters" else range(1, self.epoch + 1)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The result of one epoch of training.

    Attributes
    ----------
    epoch
        1-based; 0 for the state before training, which has only `parameters`.
    arrays
        Values of each variable at this epoch, without the `epoch` (or `state`) dimension.
    diverged
        True if the loss or the importance became infinite or NaN in this epoch.
    seconds
        Wall-clock time of the epoch's training steps and evaluation.
    """

    epoch: int
    arrays: Mapping[str, np.ndarray]
    diverged: bool = False
    seconds: float = 0.0


def digest(*arrays: np.ndarray) -> str:
    """Return the SHA-256 of arrays: their types, shapes and bytes, in order.

    Examples
    --------
    >>> digest(np.zeros(3)) == digest(np.zeros(3)), digest(np.zeros(3)) == digest(np.zeros((3, 1)))
    (True, False)
    """
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
