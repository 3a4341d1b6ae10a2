"""The position of the samples in the tensors of an operation, as a rule sees it.

To a rule, every row of one axis is a sample. If several rows belong to one sample (flattened
positions, repeated copies), the recorder adds them afterwards (`Factor.joined`); if the samples are
on another axis than the first, `Batch.dim` says so.

Map: `Batch`, `require_samples` (a check), `Factors` and `Features` (types of rules).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Factor

Factors = Iterable[tuple[Tensor | None, Factor]]
"""What a rule yields: pairs of a parameter and a factor of its per-sample gradients."""

Features = int | Callable[..., int]
"""Number of last axes of an output that belong to one row, or a function that returns it."""


@dataclass(frozen=True)
class Batch:
    """The position of the samples of a batch in the tensors of one operation."""

    size: int
    """Number of samples, N."""
    dim: int
    """The batch axis. Before the operation is known: the batch axis of a tensor that has an axis of
    positions as well, 0 or 1."""
    varies: Callable[[Tensor], bool]
    """Whether a tensor depends on the samples. Parameters, buffers and tensors derived only from
    them do not."""
    output: Tensor | None = None
    """The operation's first output, detached, for rules with a `look`; None for all others, and if
    the output has been changed in place since."""

    def axis(self, ndim: int, features: int) -> int:
        """Return the expected batch axis of a tensor whose last `features` axes are features."""
        return self.dim if ndim - features >= 2 else 0

    def first(self, values: Tensor, features: int = 1) -> Tensor:
        """Return values with the batch axis first: (N, ..., features).

        Raises
        ------
        UnsupportedError
            There is no axis of N samples.
        """
        if values.dim() > max(self.dim, features) and values.shape[self.dim] == self.size:
            return values.movedim(self.dim, 0)
        raise UnsupportedError(
            expected=f"{self.size} samples on axis {self.dim}, one for each index of the step",
            got=f"a tensor of shape {tuple(values.shape)}",
            where="an operation with parameters",
            todo="pass as many sample indices as the batch has samples, and batch_dim=1 if "
            "positions come before samples; keep the samples on an axis of their own, and "
            "register a tensor that depends on no sample as a buffer",
        )

    def rows(self, values: Tensor) -> Tensor:
        """Return values of the last axis by sample and position, (N, T, K)."""
        values = self.first(values)
        return values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2)

    def reduced(self, values: Tensor, shape: Sequence[int], rows: bool = True) -> Tensor:
        """Return values summed over broadcast axes except the batch axis: (N, P...).

        Parameters
        ----------
        values
            Gradients of an output to which a tensor was broadcast.
        shape
            P..., the shape of that tensor.
        rows
            Whether a tensor with N rows has one row for each sample.

        Raises
        ------
        UnsupportedError
            The tensor has rows that do not belong to samples.

        Examples
        --------
        >>> import torch
        >>> batch = Batch(2, 0, lambda _: True)
        >>> batch.reduced(torch.ones(2, 3, 4), (4,))
        tensor([[3., 3., 3., 3.],
                [3., 3., 3., 3.]])
        """
        axis = self.dim
        if values.dim() <= axis or values.shape[axis] != self.size:
            values, axis = self.first(values), 0
        padded = [1] * (values.dim() - len(shape)) + list(shape)
        fits = all(
            size in (1, value_size) for size, value_size in zip(padded, values.shape, strict=True)
        )
        summed = [
            d for d, size in enumerate(padded) if d != axis and size == 1 and values.shape[d] > 1
        ]
        values = values.sum(summed, keepdim=True) if summed else values
        if fits and padded[axis] == 1:
            values = values.movedim(axis, 0)
        elif fits and rows and padded[axis] == self.size:  # row n is a gradient of sample n alone
            values = _diagonal_rows(values, axis)
        else:
            raise UnsupportedError(
                expected="a parameter that is combined with all samples in the same way",
                got=f"a tensor of shape {tuple(shape)} on {self.size} rows",
                where="arithmetic with a parameter",
                todo="take a sample's rows by its index (parameter[index]), and register a tensor "
                "that depends on no sample as a buffer",
            )
        return values.reshape(self.size, *shape)


def _diagonal_rows(values: Tensor, axis: int) -> Tensor:
    """Return (N, ...): of sample n, values with all rows of the axis zero except row n."""
    return values.movedim(axis, -1).diag_embed().movedim(-2, axis).movedim(-1, 0)


def require_samples(batch: Batch, values: Tensor, where: str, least: int = 2) -> None:
    """Raise UnsupportedError unless values are (N, ...) with at least `least` axes."""
    if values.dim() < least or len(values) != batch.size:
        raise UnsupportedError(
            expected=f"{batch.size} samples on the first axis, one for each index of the step",
            got=f"a tensor of shape {tuple(values.shape)}",
            where=where,
            todo="pass as many sample indices as the batch has samples",
        )
