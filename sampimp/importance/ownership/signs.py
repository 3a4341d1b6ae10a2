"""Patterns of signs on the samples, and the owner of a row as read from its gradients.

Pass 0 leaves the samples' weights at v_i = 1. Pass b + 1 sets v_i = -1 for each sample i with bit b
set in i + 1. A row of an output gradient that depends on sample i alone is linear in v_i, so it is
unchanged in some passes and negated in the others; the passes in which it is negated are the bits
of i + 1. Counting from 1 gives every sample at least one negated pass, which tells a row of sample
0 from a row that depends on no sample at the cut. A change of sign is exact in every floating-point
format, so rows are compared bit for bit. A row that is neither unchanged nor negated depends on
several samples, and so does one whose code is above N. The argument that no such row is missed is
in `sampimp.importance.ownership`.

A last pass with v_i = 2 for every other sample finds gradients that are divided by a norm over the
batch, as by a hook: such a norm does not change with signs, but it does with weights.

Map: `sign_patterns`, `weight_pattern` (the v of each pass), `OwnerDecoder` (from the gradients of
one output to the owners of its rows).

Shape suffix: N samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sampimp.importance.ownership.layout import (
    NO_GRADIENT,
    NOT_FINITE,
    OUTSIDE_CUT,
    SEVERAL_SAMPLES,
)

TOLERANCE = 64
"""Largest difference between rows that count as equal, in multiples of the rounding error eps.

Arbitrary. It is used only on devices whose sums are not deterministic; elsewhere rows have to be
equal bit for bit.
"""

BLOCK = 2**19
"""Values of an output gradient that are projected at once, in float64; arbitrary."""


def sign_patterns(size: int) -> list[Tensor]:
    """Return the samples' signs in each pass, (N,): all 1 first, then by one bit after another.

    Examples
    --------
    >>> sign_patterns(3)
    [tensor([1, 1, 1]), tensor([-1,  1, -1]), tensor([ 1, -1, -1])]
    """
    codes = torch.arange(1, size + 1)
    bits = (1 - 2 * (codes >> bit & 1) for bit in range(size.bit_length()))
    return [torch.ones_like(codes), *bits]


def weight_pattern(size: int) -> Tensor:
    """Return the samples' weights in the last pass, (N,): 2 for every other sample, else 1."""
    return 1 + torch.arange(1, size + 1) % 2


class OwnerDecoder:
    """Owners of the rows of one output, read from its gradients in the passes of a proof.

    Parameters
    ----------
    shape
        Shape of the output.
    row_axes
        Number of leading axes that may hold samples; the axes after them are the features of a row.
    """

    def __init__(self, shape: Sequence[int], row_axes: int) -> None:
        self.shape, self.row_axes = tuple(shape), row_axes
        self._base: Tensor | None = None  # projections of the rows in pass 0
        self._code: Tensor | None = None  # i + 1 so far
        self._mixed: Tensor | None = None  # whether a row depends on several samples
        self._scale: Tensor | float = 0.0  # largest difference between equal rows

    def add_sign_pass(self, gradient: Tensor | None, number: int) -> None:
        """Take the gradient of pass `number` of `sign_patterns`; None is zero."""
        if gradient is None:
            if self._base is not None:
                self._compare(torch.zeros_like(self._base), number)
            return
        values = self._projected(gradient.detach())
        if number:
            self._compare(values, number)
            return
        self._begin(values)
        exact = gradient.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if not exact:
            eps = torch.finfo(gradient.dtype).eps
            self._scale = TOLERANCE * eps * values.abs().amax(-1, keepdim=True)

    def add_weight_pass(self, gradient: Tensor | None) -> None:
        """Take the gradient of the pass with `weight_pattern`; None is zero.

        Rows of samples whose weight is still 1, those with an even code, have to stay as they were.
        """
        if self._base is None or self._code is None or self._mixed is None:
            return
        has_weight_1 = self._code % 2 == 0
        values = 0 * self._base if gradient is None else self._projected(gradient.detach())
        same = ((values - self._base).abs() <= self._scale).all(-1)
        self._mixed |= has_weight_1 & ~same & self._base.isfinite().all(-1)

    def owners(self, size: int) -> Tensor:
        """Return the owner of each row, or a negative code, in the shape of the row axes."""
        if self._base is None:
            return torch.full(self.shape[: self.row_axes], NO_GRADIENT)
        assert self._code is not None
        assert self._mixed is not None
        owners = self._code - 1
        owners[self._code == 0] = OUTSIDE_CUT
        owners[self._mixed | (self._code > size)] = SEVERAL_SAMPLES
        owners[(self._base == 0).all(-1) & ~self._mixed] = NO_GRADIENT
        owners[~self._base.isfinite().all(-1)] = NOT_FINITE
        return owners.cpu()

    def _begin(self, base: Tensor) -> None:
        self._base = base
        self._code = torch.zeros(base.shape[:-1], dtype=torch.int64, device=base.device)
        self._mixed = torch.zeros_like(self._code, dtype=torch.bool)

    def _compare(self, values: Tensor, number: int) -> None:
        """Note the rows that are negated in pass `number`, and those neither same nor negated."""
        if self._base is None:  # zero in pass 0 and not now: contributions that cancelled
            self._begin(torch.zeros_like(values))
        assert self._base is not None
        assert self._code is not None
        assert self._mixed is not None
        same = ((values - self._base).abs() <= self._scale).all(-1)
        opposite = ((values + self._base).abs() <= self._scale).all(-1)
        self._code |= (opposite & ~same).long() << (number - 1)
        self._mixed |= ~(same | opposite)

    def _projected(self, gradient: Tensor) -> Tensor:
        """Return two random projections of each row, (..., 2), or its one entry, (..., 1).

        They stand for the row: rows that differ have different projections (with probability 1),
        and a negated row has negated projections.
        """
        values = gradient.to_dense() if gradient.layout != torch.strided else gradient
        values = values.reshape(self.shape)
        if values.is_complex():
            values = torch.view_as_real(values).flatten(-2)
        # In float64, so that the sum loses no entry; MPS has no float64.
        dtype = values.dtype if values.device.type == "mps" else torch.float64
        if self.row_axes == values.dim():
            return values.to(dtype).unsqueeze(-1)
        rows = values.flatten()[None]
        if self.row_axes:
            rows = values.flatten(self.row_axes).flatten(0, -2)
        features = rows.shape[-1]
        generator = torch.Generator().manual_seed(features)
        directions = torch.randn(features, 2, generator=generator, dtype=torch.float64)
        directions = directions.to(values.device, dtype)
        rows_at_once = max(1, BLOCK // max(1, features))
        parts = [part.to(dtype) @ directions for part in rows.split(rows_at_once)]
        if not self.row_axes:
            return parts[0][0]
        return torch.cat(parts).unflatten(0, self.shape[: self.row_axes])
