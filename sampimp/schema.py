"""The contract between training and analysis: dimensions, variables, units and chunks.

A trial writes one record, a Zarr group with the variables below; `sampimp.open_cube` stacks the
records of a study along `strategy` and `seed`. Each write covers one whole chunk, one epoch of one
trial, so that two writers never share a chunk. Values that were not measured are NaN, never 0.

The influence of a run's samples on its final model is in records of its own. Every record is
written in steps: epochs, from the last to the first for influence, or retrainings. What has no
dimension of steps is written with the last step.

Map: `Variable`, `VARIABLES` (the arrays of a trial's record), `INFLUENCE_VARIABLES` and `variable`;
`REFERENCES` and `STRATEGIES` (the names of the runs); `chunk_shape`, `RecordLayout` and `Layout`
(shapes and chunks; `sampimp.store.influence_layouts` has those of influence); `EpochRecord` (the
result of one epoch of training) and `StepRecord` (that of any step); `digest` and `digest_json`
(checksums).
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
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

INFLUENCE_VARIABLES: Mapping[str, Variable] = {
    "influence": Variable(
        ("epoch", "target", "layer", "sample"),
        "float32",
        "unit of the target per unit of sample weight",
        "derivative of the target at the end of training by the weight of the sample's loss in "
        "this epoch, through this layer",
    ),
    "influence_total": Variable(
        ("target", "sample"),
        "float32",
        "unit of the target per unit of sample weight",
        "influence, summed over epochs and layers",
    ),
    "adjoint_norm": Variable(
        ("epoch", "target"),
        "float64",
        "unit of the target / parameter",
        "norm of the derivative of the target by the parameters at the start of the epoch",
    ),
    "arriving_importance": Variable(
        ("epoch", "layer", "sample"),
        "float32",
        "parameter^2",
        "what is left in the final parameters of the sample's importance in this epoch and layer: "
        "mean over the probes of influence^2",
    ),
    "final_importance": Variable(
        ("layer", "sample"),
        "float32",
        "parameter^2",
        "squared norm of the derivative of the layer's final parameters by the sample's weight in "
        "all epochs: mean over the layer's probes of (total influence)^2",
    ),
    "final_importance_total": Variable(
        ("sample",),
        "float32",
        "parameter^2",
        "the same of all final parameters: mean over the probes of (total influence)^2",
    ),
    "fixed_point_influence": Variable(
        ("solution", "damping", "sample"),
        "float32",
        "unit of the target per unit of sample weight",
        "-<(C + damping)^-1 dT/dtheta, g_i> at the final parameters (eq. 4), with C the Hessian of "
        "the training objective or its Gauss-Newton matrix",
    ),
    "final_value": Variable(
        ("retraining", "target"),
        "float64",
        "unit of the target",
        "the target after retraining",
    ),
    "removed": Variable(
        ("removal", "sample"), "bool", "1", "whether the removal removes the sample"
    ),
    "training_state": Variable(
        ("state",), "bytes", "1", "parameters and optimizer state, by torch.save"
    ),
    "subset_error": Variable(
        ("training",),
        "float64",
        "1",
        "fraction of samples misclassified after training on the subset alone; NaN if it diverged",
    ),
    "subset_nll": Variable(
        ("training",),
        "float64",
        "nat",
        "mean negative log-likelihood after training on the subset alone; NaN if it diverged",
    ),
    "selected": Variable(
        ("training", "sample"), "bool", "1", "whether the training used the sample"
    ),
    "search_error": Variable(
        ("round",),
        "float64",
        "1",
        "mean of 1 - p(class) over the pool after training a surrogate on the round's subset",
    ),
    "found": Variable(("sample",), "bool", "1", "whether the search selected the sample"),
    # Made by the cube from `final_value`:
    "effect": Variable(
        ("removal", "target", "repeat"),
        "float64",
        "unit of the target",
        "change of the target by retraining without the removed samples",
    ),
    "baseline": Variable(
        ("target", "repeat"),
        "float64",
        "unit of the target",
        "the target after retraining with all samples",
    ),
}
"""The arrays of influence records, as they are stored: a dimension of steps is the first.

The cube has them after strategy and seed, and `target` before `epoch`."""


def variable(name: str) -> Variable:
    """Return a variable of `VARIABLES` or `INFLUENCE_VARIABLES`."""
    return VARIABLES[name] if name in VARIABLES else INFLUENCE_VARIABLES[name]


ALL_SAMPLES = "full"
"""The selection rule that keeps every sample."""

SUBSET_BUDGETS = ("steps", "epochs", "convergence")
"""Budgets of a training on a subset; the last one is for all samples."""

STEP_DIMS = ("epoch", "state", "solution", "retraining", "training", "round")
"""Dimensions along which a record is written, step by step."""

CURVES = ("train_error", "test_error", "train_nll", "test_nll")
"""The variables with one value per epoch."""

COMMITTED = (*CURVES, "adjoint_norm", "final_value", "subset_error", "subset_nll", "search_error")
"""The variables with a few values per step; the commit contains them."""

CHUNK_VALUES = 2**20
"""Largest number of values in a chunk; larger chunks are split along their last dimension (4 MiB of
float32)."""


def chunk_shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the chunk of a variable: one epoch (or state), split along its last dimension.

    A curve is a single chunk, written once, instead of 50 files of 8 bytes.

    Parameters
    ----------
    name
        Name of the variable.
    sizes
        Size of each of the variable's dimensions.

    Examples
    --------
    >>> chunk_shape("importance", {"epoch": 50, "layer": 4, "sample": 50_000})
    (1, 4, 50000)
    >>> chunk_shape("importance", {"epoch": 90, "layer": 60, "sample": 1_281_167})
    (1, 60, 17476)
    """
    dims = variable(name).dims
    shape = tuple(sizes[dim] for dim in dims)
    if name in COMMITTED:
        return shape
    leading = (1, *shape[1:-1]) if dims[0] in STEP_DIMS else shape[:-1]
    last = max(1, CHUNK_VALUES // max(1, math.prod(leading)))
    return (*leading, min(shape[-1], last))


class RecordLayout(ABC):
    """The shape of a record, and the steps in which it is written.

    A *position* is an index along a variable's first dimension. A variable that is written as a
    whole, with the last step, has one position.
    """

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The size of each dimension."""

    @property
    @abstractmethod
    def variables(self) -> list[str]:
        """Names of the record's variables."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of steps in which the record is written, without step 0, its initial state."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a variable."""
        return tuple(self.sizes[dim] for dim in variable(name).dims)

    def chunk(self, name: str) -> tuple[int, ...]:
        """Return the shape of a variable's chunks."""
        return chunk_shape(name, self.sizes)

    def positions(self, name: str) -> Sequence[int]:
        """Return the step that writes each position of a variable."""
        return range(1, self.steps + 1) if self.is_stepwise(name) else (self.steps,)

    def order(self, name: str) -> list[int]:
        """Return the positions of a variable in the order in which they are written."""
        steps = self.positions(name)
        return sorted(range(len(steps)), key=steps.__getitem__)

    def describe(self, name: str, position: int) -> str:
        """Return a position in words."""
        dim = variable(name).dims[0]
        return f"{name}, {dim} {position + 1}" if self.is_stepwise(name) else name

    @staticmethod
    def is_stepwise(name: str) -> bool:
        """Return whether each step writes one position of the variable."""
        return variable(name).dims[0] in STEP_DIMS


@dataclass(frozen=True, kw_only=True)
class Layout(RecordLayout):
    """The shape of a trial's record; its steps are the epochs.

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

    @property
    def steps(self) -> int:
        """The number of epochs."""
        return self.epoch

    def positions(self, name: str) -> Sequence[int]:
        """Return the epoch, or state, at each position of a variable's first dimension."""
        return self.states if name == "parameters" else range(1, self.epoch + 1)

    def describe(self, name: str, position: int) -> str:
        """Return a position in words."""
        return f"{name}, {variable(name).dims[0]} {self.positions(name)[position]}"


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

    @property
    def step(self) -> int:
        """The number of the record's step, which is the epoch."""
        return self.epoch


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The result of one step of a record.

    Attributes
    ----------
    step
        1-based, in the order of writing.
    arrays
        Values of each variable that the step writes: of one position, or the whole variable. The
        value of a variable of type "bytes" is a `bytes`.
    diverged
        True if the values became infinite or NaN, so that no further step follows.
    seconds
        Wall-clock time of the step.
    """

    step: int
    arrays: Mapping[str, Any]
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
