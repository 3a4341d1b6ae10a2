"""Rules of convolutions and transposed convolutions.

The gradient of a kernel is a sum over positions t of products delta_t patch_t^T, where a patch is
the part of the image under the kernel: the pixels at K offsets from t. Its squared norm, weighted
by D^2, is the kernel's term of beta (`sampimp.importance.buffer` sums the terms of a layer). It can
be computed in three ways; `Convolution` counts operations and takes the cheapest:

    the gradient itself                              T O K I multiplications
    Gram matrices of deltas and of patches           T^2 (O + K I)
    Gram matrices of deltas and of pixels            T^2 O + P^2 I, and T^2 K additions

for T positions, P pixels, O and I channels. The last way needs no patches, which are K times as
large as the image: patch_s . patch_t is the sum over offsets o of pixel_{s+o} . pixel_{t+o}, so one
matrix of the products of pixels, shifted, serves all offsets.

Map: `Window` (positions of the kernel on an image), `Convolution` (the factor), `conv_factors` and
`conv_transpose_factors` (the rules).

Shape suffixes: N samples, G groups, T positions, P pixels, S... the axes of an image, O outputs and
I inputs of a group, K offsets times inputs. In a transposed convolution the image is delta.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sampimp.importance.gradients import Explicit, Outer, forms_gradients
from sampimp.importance.per_sample import (
    at_least_float32,
    gather_rows,
    gram_of_positions,
    samples_at_once,
)
from sampimp.importance.rules.batch import Batch, Factors, require_samples
from sampimp.importance.update import Diagonal

ADDITION = 12
"""Multiplications of a matrix product that take as long as one of those additions, on a CPU.

Measured with kernels of 3 x 3 and 5 x 5, 16 to 128 channels, 4 x 4 to 24 x 24 positions: two ways
that took equally long had equal counts with a value of 9 to 14.
"""


@dataclass(frozen=True)
class Window:
    """The positions of a kernel on an image.

    On each axis, position t and a kernel's offset meet the pixel `step * t + spacing * offset -
    before`.
    """

    kernel: Sequence[int]
    step: Sequence[int]
    spacing: Sequence[int]
    before: Sequence[int]
    """Padding with zeros before the image."""
    positions: Sequence[int]
    """Number of positions t."""

    def offsets(self, sizes: Sequence[int]) -> Iterator[tuple[list[slice], list[slice]]]:
        """Yield (positions, pixels) for each offset that meets an image of these sizes.

        Both have one slice per axis: the positions t at which the offset is inside the image, and
        the pixels that it meets there.
        """
        for offset in product(*map(range, self.kernel)):
            position_slices: list[slice] = []
            pixels: list[slice] = []
            for axis, place in enumerate(offset):
                step, start = self.step[axis], self.spacing[axis] * place - self.before[axis]
                first = max(0, math.ceil(-start / step))
                last = min(self.positions[axis] - 1, (sizes[axis] - 1 - start) // step)
                position_slices.append(slice(first, last + 1))
                pixels.append(slice(start + step * first, start + step * last + 1, step))
            if all(positions.start < positions.stop for positions in position_slices):
                yield position_slices, pixels

    def pad(self, images_NGIS: Tensor) -> Tensor:
        """Return the images with zeros wherever the kernel meets no pixel."""
        padding: list[int] = []
        for axis in reversed(range(len(self.kernel))):
            last = self.step[axis] * (self.positions[axis] - 1) - self.before[axis]
            last += self.spacing[axis] * (self.kernel[axis] - 1)
            padding += [self.before[axis], max(0, last + 1 - images_NGIS.shape[3 + axis])]
        return functional.pad(images_NGIS, padding) if any(padding) else images_NGIS

    def unfold(self, images_NGIS: Tensor) -> Tensor:
        """Return the patches, (N, T, G, K)."""
        padded = self.pad(images_NGIS).contiguous()
        outer, inner = padded.stride()[:3], padded.stride()[3:]
        by_offset = (pixels * size for pixels, size in zip(self.spacing, inner, strict=True))
        by_position = (pixels * size for pixels, size in zip(self.step, inner, strict=True))
        view = padded.as_strided(
            (*padded.shape[:3], *self.kernel, *self.positions), (*outer, *by_offset, *by_position)
        )
        patch_size = padded.shape[2] * math.prod(self.kernel)
        patches = view.reshape(*padded.shape[:2], patch_size, math.prod(self.positions))
        return patches.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Convolution:
    """Gradients sum_t left_t patch_t^T: left (N, T, G, O), images (N, G, I, S...)."""

    left: Tensor
    images: Tensor
    window: Window
    shape: Sequence[int]
    """Shape of the kernel: (G O, K) reshaped."""

    def square(self) -> Tensor:
        """See `Factor`."""
        groups, inputs = self.images.shape[1:3]
        pixels, (positions, _, outputs) = math.prod(self.images.shape[3:]), self.left.shape[1:]
        offsets = math.prod(self.window.kernel)
        by_pixels = pixels**2 * inputs + positions**2 * (outputs + ADDITION * offsets)
        by_patches = positions**2 * (outputs + offsets * inputs)
        if by_pixels < min(by_patches, positions * outputs * offsets * inputs):
            size = samples_at_once(groups * (pixels**2 + positions**2), self.left)
            return torch.cat([chunk._square_by_pixels() for chunk in self._chunks(size)])
        return torch.cat([chunk._outer().square() for chunk in self._chunks(self._chunk_size)])

    def weighted(self, derivative: Diagonal) -> Tensor:
        """See `Factor`."""
        chunks = self._chunks(self._chunk_size)
        return torch.cat([chunk._outer().weighted(derivative) for chunk in chunks])

    def inner(self, directions: Tensor) -> Tensor:
        """See `Factor`; delta . convolution(images; direction), or from the gradients."""
        if forms_gradients(len(directions), self.left.shape[1]):
            chunks = self._chunks(self._chunk_size)
            return torch.cat([chunk._outer().inner(directions) for chunk in chunks], 1)
        chunks = self._chunks(samples_at_once(len(directions) * self.left[0:1].numel(), self.left))
        return torch.cat([chunk._inner_by_convolution(directions) for chunk in chunks], 1)

    def gradient(self, samples: slice) -> Tensor:
        """See `Factor`."""
        return self._samples(samples)._outer().gradient(slice(None))

    def summed(self) -> Tensor:
        """See `Factor`."""
        first, *others = (chunk._outer().summed() for chunk in self._chunks(self._chunk_size))
        return sum(others, first)

    def joined(self, rows_NT: Tensor) -> "Convolution | Outer":
        """See `Factor`."""
        if rows_NT.shape[1] > 1:
            return self._outer().joined(rows_NT)
        images = self.images[rows_NT[:, 0].clamp_min(0)]
        return replace(self, left=gather_rows(self.left, rows_NT).squeeze(1), images=images)

    @property
    def _chunk_size(self) -> int:
        """Number of samples whose patches are formed at once."""
        values = self.left.shape[1] * math.prod(self.window.kernel)
        return samples_at_once(values * math.prod(self.images.shape[1:3]), self.left)

    def _samples(self, samples: slice) -> "Convolution":
        return replace(self, left=self.left[samples], images=self.images[samples])

    def _chunks(self, size: int) -> Iterator["Convolution"]:
        starts = range(0, len(self.left) or 1, size)  # without samples, one empty chunk
        return (self._samples(slice(start, start + size)) for start in starts)

    def _outer(self) -> Outer:
        """Return the same gradients by patches."""
        return Outer(self.left, self.window.unfold(self.images), self.shape)

    def _inner_by_convolution(self, directions: Tensor) -> Tensor:
        """Return the inner products, from one convolution with all directions as its kernels."""
        left, images = at_least_float32(self.left), at_least_float32(self.images)
        window, (groups, outputs) = self.window, left.shape[2:]
        kernels = at_least_float32(directions).unflatten(1, (groups, outputs)).transpose(0, 1)
        maps = torch.convolution(
            window.pad(images).flatten(1, 2),
            kernels.flatten(0, 2),
            None,
            list(window.step),
            [0] * len(window.kernel),
            list(window.spacing),
            False,
            [0] * len(window.kernel),
            groups,
        )
        inside: Any = (..., *map(slice, window.positions))
        by_direction = maps[inside].unflatten(1, (groups, -1, outputs)).flatten(3)
        deltas = left.permute(0, 2, 3, 1).flatten(2)  # (N, G, O T)
        return torch.einsum("ngdt,ngt->dn", by_direction, deltas)

    def _square_by_pixels(self) -> Tensor:
        """Return the squared norms, from the products of pixels."""
        positions, sizes = self.window.positions, self.images.shape[3:]
        pixels = gram_of_positions(self.images.flatten(3).permute(0, 3, 1, 2))  # (N, G, P, P)
        pixels = pixels.reshape(*pixels.shape[:2], *sizes, *sizes)
        patches = pixels.new_zeros(*pixels.shape[:2], *positions, *positions)
        for position_slices, places in self.window.offsets(sizes):
            pairs_of_positions: Any = (..., *position_slices, *position_slices)
            pairs_of_pixels: Any = (..., *places, *places)
            patches[pairs_of_positions] += pixels[pairs_of_pixels]
        products = gram_of_positions(self.left).flatten(1).mul_(patches.flatten(1))
        return products.sum(1).clamp_min_(0)


def conv_factors(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Factors:
    """Yield the factors of `functional.conv1d`, `conv2d`, `conv3d`."""
    kernel = weight.shape[2:]
    require_samples(batch, input, "a convolution", len(kernel) + 2)
    stride, dilation = _each(stride, len(kernel)), _each(dilation, len(kernel))
    if padding == "same":  # if the padding is odd, one pixel more comes after the image
        whole = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        before = [size // 2 for size in whole]
    else:
        before = _each(0 if padding == "valid" else padding, len(kernel))
    window = Window(kernel, stride, dilation, before, delta.shape[2:])
    yield weight, _convolution(delta, input, window, groups, weight)
    if bias is not None:
        yield bias, Explicit(delta.flatten(2).sum(2))


def conv_transpose_factors(
    batch: Batch,
    delta: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Factors:
    """Yield the factors of `functional.conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`.

    It is the adjoint of a convolution: the patches are those of delta, and the input is what a
    convolution has as delta.
    """
    kernel = weight.shape[2:]
    require_samples(batch, input, "a convolution", len(kernel) + 2)
    stride, dilation, before = (
        _each(setting, len(kernel)) for setting in (stride, dilation, padding)
    )
    window = Window(kernel, stride, dilation, before, input.shape[2:])
    yield weight, _convolution(input, delta, window, groups, weight)
    if bias is not None:
        yield bias, Explicit(delta.flatten(2).sum(2))


def _convolution(
    left: Tensor, images: Tensor, window: Window, groups: int, weight: Tensor
) -> Convolution:
    left_NTGO = left.flatten(2).unflatten(1, (groups, -1)).permute(0, 3, 1, 2)
    return Convolution(left_NTGO, images.unflatten(1, (groups, -1)), window, weight.shape)


def conv_features(
    batch: Batch, ndim: int, input: Tensor, weight: Tensor, *_: object, **__: object
) -> int:
    """Return the number of all axes but the first; of all axes, for an image without a batch."""
    return ndim - (weight.dim() == ndim)


def _each(value: Any, count: int) -> list[int]:
    """Return a setting of a convolution as one number for each of `count` axes."""
    return [value] * count if isinstance(value, int) else list(value) * (count // len(value))
