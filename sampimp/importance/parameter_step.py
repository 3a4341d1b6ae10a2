"""One parameter at one step of an optimizer: the argument of an optimizer's rule.

A rule computes the derivative D of the update from the parameter's gradient, the optimizer's state
and its settings. A large parameter is processed by blocks of rows, so that the temporaries of a
block stay in the cache of the CPU.

Map: `DerivativeRule` (base class of all rules), `ParameterStep` (the argument of a rule),
`Workspace` (temporaries that all parameters share).
"""

import math
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

BLOCK_ON_CPU, BLOCK_ELSEWHERE = 2**18, 2**24
"""Elements of a parameter that are processed at once.

On the CPU, 2^18 was the fastest for the paper's network under AdamW (2^16: 7 % of the step more,
2^14: 30 % more, through the number of calls). On other devices kernel launches dominate, and the
number is an arbitrary bound (64 MB).
"""

Part = slice | EllipsisType
"""Index of a block of rows of a parameter; `...` for a parameter without axes."""


class ParameterStep:
    """One parameter at one step of an optimizer.

    Attributes
    ----------
    parameter
        The parameter. Its value is the one before the step in `DerivativeRule.before`, and the one
        after the step in `DerivativeRule.after`.
    group
        The settings of the parameter's group in the optimizer.
    state
        The optimizer's state of the parameter, before or after the step as above; read-only.
    gradient
        The batch's gradient. `DerivativeRule.before` may replace it by a value that the optimizer
        derives from it, for example the gradient with weight decay added.
    noted
        Anything that a rule keeps from `before` for `after`; None at the start of each step. A
        tensor of the parameter's shape is split into blocks of rows like the parameter; anything
        else is passed whole.
    """

    def __init__(self, parameter: Tensor, workspace: "Workspace") -> None:
        self.parameter = parameter
        self.group: dict[str, Any] = {}
        self.state: Mapping[str, Any] = {}
        self.gradient = parameter
        self.noted: Any = None
        self._buffer: Tensor | None = None
        self._workspace = workspace

    @property
    def sign(self) -> int:
        """-1 if the optimizer maximizes, else 1."""
        return -1 if self.group["maximize"] else 1

    @property
    def buffer(self) -> Tensor:
        """A working tensor of the parameter's shape, kept from step to step."""
        like, buffer = self.parameter, self._buffer
        if buffer is None or buffer.device != like.device or buffer.shape != like.shape:
            buffer = torch.empty_like(like, dtype=at_least_single(like), requires_grad=False)
            self._buffer = buffer
        return buffer

    def temporary(self, number: int) -> Tensor:
        """Return a working tensor of the parameter's shape, valid until the next block begins."""
        return self._workspace.like(self.parameter, number)

    def parts(self) -> Iterator[tuple[Part, "ParameterStep"]]:
        """Yield (index of the rows, step of these rows) for each block of the parameter."""
        whole = self.parameter
        limit = BLOCK_ON_CPU if whole.device.type == "cpu" else BLOCK_ELSEWHERE
        if whole.numel() <= limit:
            yield all_rows(whole), self
            return
        count = math.ceil(limit * len(whole) / whole.numel())
        for start in range(0, len(whole), count):
            rows = slice(start, start + count)
            part = ParameterStep(whole[rows], self._workspace)
            part.group = self.group
            part.state = {name: self._rows_of(value, rows) for name, value in self.state.items()}
            part.gradient, part.noted = self.gradient[rows], self._rows_of(self.noted, rows)
            yield rows, part

    def _rows_of(self, value: Any, rows: slice) -> Any:
        """Return rows of a tensor of the parameter's shape, and any other value whole."""
        has_rows = isinstance(value, Tensor) and value.shape == self.parameter.shape
        return value[rows] if has_rows else value


class Workspace:
    """Temporaries of blocks, reused from block to block: fresh memory would cost page faults."""

    def __init__(self) -> None:
        self._flat: dict[int, Tensor] = {}

    def like(self, values: Tensor, number: int) -> Tensor:
        """Return temporary `number` in the shape of `values`; the next call overwrites it."""
        dtype, flat = at_least_single(values), self._flat.get(number)
        if (
            flat is None
            or len(flat) < values.numel()
            or (flat.dtype, flat.device) != (dtype, values.device)
        ):
            flat = self._flat[number] = values.new_empty(values.numel(), dtype=dtype)
        return flat[: values.numel()].view(values.shape)


class DerivativeRule:
    """Derivative of the update of one class of optimizers by the gradient; to be subclassed.

    Attributes
    ----------
    elementwise
        Whether D differs between the elements of a parameter. False: D is one number per parameter.
    """

    elementwise: bool = True

    def before(self, step: ParameterStep) -> None:
        """Save values that the step will overwrite in `step.noted` or `step.gradient`.

        The default keeps nothing.
        """

    def after(self, step: ParameterStep) -> float | Tensor:
        """Return D, from the optimizer's state after the step.

        Returns
        -------
        float or Tensor
            A number, or a tensor of the shape of `step.parameter`, in units of parameter per unit
            of gradient. For a large parameter the method is called once for each block of rows.
        """
        raise NotImplementedError


def at_least_single(values: Tensor) -> torch.dtype:
    """Return float32 for half precision, in which the smallest positive numbers exceed D."""
    return torch.promote_types(values.dtype, torch.float32)


def all_rows(values: Tensor) -> Part:
    """Return the index of the whole tensor."""
    return slice(None) if values.dim() else ...
