"""How the samples of a batch lie along one axis of a tensor.

A layer's output has its samples on one axis of R rows, and each row belongs to one sample, its
*owner*. Usually R is the number of samples N, and row n belongs to sample n. Models also join
samples and positions on one axis (`x.flatten(0, 1)`, R = N T), select some positions by a mask, or
repeat the batch. An `AxisLayout` states the axis and the owner of each of its rows.

The proof finds owners as a tensor of integers: the number of the sample, or one of the negative
codes `NO_GRADIENT`, `SEVERAL_SAMPLES`, `OUTSIDE_CUT`, `NOT_FINITE`.

Map: `AxisLayout`; from owners to layouts: `layouts_of`, `owners_on_axis`, `sequence_owners` (of
recurrent layers); from layouts to rows: `values_of_rows`, `joined_rows`, `rows_of_samples`.

Shape suffixes: N samples, R rows of an axis, T rows of one sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_GRADIENT, SEVERAL_SAMPLES, OUTSIDE_CUT, NOT_FINITE = -1, -2, -3, -4
"""Codes in place of an owner.

In order: the gradient is zero; it depends on several samples; it does not change with the signs at
the cut, so part of the loss reaches the row by another way; it is infinite or NaN.
"""


@dataclass(frozen=True, eq=False)
class AxisLayout:
    """How N samples lie along an axis of R rows."""

    axis: int
    kind: str
    """How row r gets its owner.

    "plain": R = N, and the owner is r. "outer": samples, then positions, owner r // (R / N).
    "inner": positions, then samples, owner r % N. "listed": by the list `owners`.
    """
    owners: Tensor | None = None
    """Sample of each row, (R,), of a "listed" layout, which holds for one step only."""

    def fits(self, shape: Sequence[int], size: int) -> bool:
        """Return whether an output of this shape can have N = size samples in this layout."""
        if self.axis >= len(shape):
            return False
        rows = shape[self.axis]
        if self.kind == "plain":
            return rows == size
        return self.kind == "listed" or (size > 0 and rows % size == 0)

    def samples(self, rows: int, size: int) -> Tensor:
        """Return the sample of each row, (R,)."""
        if self.owners is not None:
            return self.owners
        index = torch.arange(rows)
        return index // max(1, rows // size) if self.kind == "outer" else index % size


def layouts_of(owners: Tensor, axes: Sequence[int], size: int) -> Iterator[AxisLayout]:
    """Yield the layouts that agree with the owners of rows, the simplest first.

    Parameters
    ----------
    owners
        Owners of the rows, in the shape of the axes that may hold samples; each is a sample or
        `NO_GRADIENT`, which agrees with every layout.
    axes
        Axes of `owners` to look at, the expected one first.
    size
        Number of samples, N.
    """
    by_axis = {axis: owners_on_axis(owners, axis) for axis in axes}
    for kind in ("plain", "outer", "inner"):
        for axis, owner_R in by_axis.items():
            layout = AxisLayout(axis, kind)
            is_joined = kind != "plain" and owner_R is not None and len(owner_R) > size
            if owner_R is None or not (kind == "plain" or is_joined):
                continue
            if not layout.fits(owners.shape, size):
                continue
            expected_R = layout.samples(len(owner_R), size)
            if bool(((owner_R == expected_R) | (owner_R == NO_GRADIENT)).all()):
                yield layout
    for axis, owner_R in by_axis.items():
        if owner_R is not None:
            yield AxisLayout(axis, "listed", owner_R.clamp_min(0))


def owners_on_axis(owners: Tensor, axis: int) -> Tensor | None:
    """Return the owner of each row of one axis, (R,); None if a row has several owners."""
    entries = owners.movedim(axis, 0).flatten(1) if owners.dim() > 1 else owners.unsqueeze(1)
    if not entries.numel():
        return torch.full((len(entries),), NO_GRADIENT)
    largest_R = entries.amax(1)
    agrees = (entries == largest_R.unsqueeze(1)) | (entries == NO_GRADIENT)
    return largest_R if bool(agrees.all()) else None


def sequence_owners(
    owners: Sequence[Tensor], count: int, packed: Tensor | None, batch_first: bool
) -> Tensor | None:
    """Return the owner of each sequence of a recurrent layer, (R,); None if one has several.

    Parameters
    ----------
    owners
        Owners of the rows of each output: first of the sequence of outputs, in the shape (T, R),
        (R, T) or packed; then of the states.
    count
        Number of sequences, R.
    packed
        The sequence of each row of the first output, where that is packed.
    batch_first
        Whether the first output is (R, T).
    """
    result_R = torch.full((count,), NO_GRADIENT)
    for number, output_owners in enumerate(owners):
        owner_R: Tensor | None
        if packed is not None and number == 0:
            largest_R = torch.full((count,), NO_GRADIENT)
            largest_R = largest_R.scatter_reduce(0, packed, output_owners, "amax")
            agrees = (output_owners == largest_R[packed]) | (output_owners == NO_GRADIENT)
            owner_R = largest_R if bool(agrees.all()) else None
        else:
            sequences_first = output_owners.dim() == 1 or (batch_first and not number)
            owner_R = owners_on_axis(output_owners, 0 if sequences_first else 1)
        if owner_R is None:
            return None
        differs = (owner_R != result_R) & (owner_R != NO_GRADIENT) & (result_R != NO_GRADIENT)
        if bool(differs.any()):
            return None
        result_R = torch.maximum(result_R, owner_R)
    return result_R


def on_axis(values_R: Tensor, axis: int, ndim: int) -> Tensor:
    """Return values with R on one of `ndim` axes, and 1 on the others, to be broadcast."""
    return values_R.reshape([-1 if place == axis else 1 for place in range(ndim)])


def values_of_rows(values_N: Tensor, layout: AxisLayout, like: Tensor) -> Tensor:
    """Return the value of each row's owner, in a shape that broadcasts to `like`."""
    values_R = values_N[layout.samples(like.shape[layout.axis], len(values_N))]
    return on_axis(values_R, layout.axis, like.dim()).to(like)


def joined_rows(
    layout: AxisLayout, rows: int, size: int, order: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return the rows of each sample, (N, T) on a device; None where row n is that of sample n.

    Parameters
    ----------
    layout
        Layout of the axis.
    rows, size
        Numbers of rows, R, and of samples, N.
    order
        Sample of each row of the loss, (N,), where that is not the batch's order.
    device
        Device of the result.
    """
    if layout.owners is None and order is None:  # made on the device: no wait for a copy
        if rows == size:
            return None
        index = torch.arange(rows, device=device)
        return index.view(size, -1) if layout.kind == "outer" else index.view(-1, size).t()
    samples = layout.samples(rows, size)
    samples = samples if order is None else order[samples]
    return rows_of_samples(samples, size).to(device)


def rows_of_samples(samples_R: Tensor, size: int) -> Tensor:
    """Return the rows of each sample, (N, T), padded by -1.

    Examples
    --------
    >>> rows_of_samples(torch.tensor([1, 0, 1]), 2)
    tensor([[ 1, -1],
            [ 0,  2]])
    """
    counts = samples_R.bincount(minlength=size)
    rows = samples_R.argsort(stable=True)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[samples_R[rows]]
    padded = torch.full((size, int(counts.max())), -1)
    padded[samples_R[rows], places] = rows
    return padded
