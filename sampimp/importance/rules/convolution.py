"""Rules of convolutions and of their transposes.

The gradient of a kernel is a sum over positions t of products delta_t patch_t^T, where a patch is
what the kernel meets: the pixels at K offsets from t. Its squared norm takes one of three ways, the
cheapest by count:

    the gradient itself                              T O K I multiplications
    Gram matrices of deltas and of patches           T^2 (O + K I)
    Gram matrices of deltas and of pixels            T^2 O + P^2 I, and T^2 K additions

of T positions, P pixels, O and I channels. The last needs no patches, which are K times as large
as the image: patch_s . patch_t is the sum over offsets o of pixel_{s+o} . pixel_{t+o}, so that the
products of pixels, shifted, serve all offsets.

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

from sampimp.importance.gradients import Explicit, Outer, chunk, gram, taken
from sampimp.importance.optimizers import Diagonal
from sampimp.importance.rules.arithmetic import (
    Batch,
    Factors,
    all_but_samples,
    layer_rule,
    require_samples,
)

ADDITION = 12
"""Multiplications of a matrix product in the time of one of those additions, on a CPU.

Where two ways took equally long (3 x 3 and 5 x 5, 16 to 128 channels, 4 x 4 to 24 x 24 positions),
the counts were equal at 9 to 14.
"""


@dataclass(frozen=True)
class Window:
    """Where a kernel meets an image: at `step * t + spacing * offset - before`, on each axis."""

    kernel: Sequence[int]
    step: Sequence[int]
    spacing: Sequence[int]
    before: Sequence[int]
    """Padding, of zeros."""
    positions: Sequence[int]
    """How many there are of t."""

    def offsets(self, sizes: Sequence[int]) -> Iterator[tuple[list[slice], list[slice]]]:
        """Yield, of each offset that meets an image of these sizes, from where: t, and pixels."""
        for offset in product(*map(range, self.kernel)):
            met: list[slice] = []
            pixels: list[slice] = []
            for axis, place in enumerate(offset):
                step, start = self.step[axis], self.spacing[axis] * place - self.before[axis]
                first = max(0, math.ceil(-start / step))
                last = min(self.positions[axis] - 1, (sizes[axis] - 1 - start) // step)
                met.append(slice(first, last + 1))
                pixels.append(slice(start + step * first, start + step * last + 1, step))
            if all(one.start < one.stop for one in met):
                yield met, pixels

    def unfold(self, images_NGIS: Tensor) -> Tensor:
        """Return the patches, (N, T, G, K)."""
        padding: list[int] = []
        for axis in reversed(range(len(self.kernel))):
            last = self.step[axis] * (self.positions[axis] - 1) - self.before[axis]
            last += self.spacing[axis] * (self.kernel[axis] - 1)
            padding += [self.before[axis], max(0, last + 1 - images_NGIS.shape[3 + axis])]
        padded = functional.pad(images_NGIS, padding) if any(padding) else images_NGIS.contiguous()
        outer, inner = padded.stride()[:3], padded.stride()[3:]
        by_offset = (one * size for one, size in zip(self.spacing, inner, strict=True))
        by_position = (one * size for one, size in zip(self.step, inner, strict=True))
        view = padded.as_strided(
            (*padded.shape[:3], *self.kernel, *self.positions), (*outer, *by_offset, *by_position)
        )
        met = padded.shape[2] * math.prod(self.kernel)
        folded = view.reshape(*padded.shape[:2], met, math.prod(self.positions))
        return folded.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Convolution:
    """Gradients sum_t left_t patch_t^T: left (N, T, G, O), images (N, G, I, S...)."""

    left: Tensor
    images: Tensor
    window: Window
    shape: Sequence[int]
    """Of the kernel: (G O, K) reshaped."""

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,)."""
        groups, inputs = self.images.shape[1:3]
        pixels, (positions, _, outputs) = math.prod(self.images.shape[3:]), self.left.shape[1:]
        offsets = math.prod(self.window.kernel)
        by_pixels = pixels**2 * inputs + positions**2 * (outputs + ADDITION * offsets)
        by_patches = positions**2 * (outputs + offsets * inputs)
        if by_pixels < min(by_patches, positions * outputs * offsets * inputs):
            few = chunk(groups * (pixels**2 + positions**2), self.left)
            return torch.cat([piece._square_by_pixels() for piece in self._pieces(few)])
        return torch.cat([piece._outer().square() for piece in self._pieces(self._few)])

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,)."""
        pieces = self._pieces(self._few)
        return torch.cat([piece._outer().weighted(derivative) for piece in pieces])

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""
        return self._some(samples)._outer().gradient(slice(None))

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""
        first, *others = (piece._outer().summed() for piece in self._pieces(self._few))
        return sum(others, first)

    def joined(self, rows_NT: Tensor) -> "Convolution | Outer":
        """Return the gradients of samples, each the sum of those of some rows, -1 for none."""
        if rows_NT.shape[1] > 1:
            return self._outer().joined(rows_NT)
        images = self.images[rows_NT[:, 0].clamp_min(0)]
        return replace(self, left=taken(self.left, rows_NT).squeeze(1), images=images)

    @property
    def _few(self) -> int:
        """How many samples to form patches of at once."""
        values = self.left.shape[1] * math.prod(self.window.kernel)
        return chunk(values * math.prod(self.images.shape[1:3]), self.left)

    def _some(self, samples: slice | Tensor) -> "Convolution":
        return replace(self, left=self.left[samples], images=self.images[samples])

    def _pieces(self, few: int) -> Iterator["Convolution"]:
        starts = range(0, len(self.left) or 1, few)  # one empty piece of no samples
        return (self._some(slice(start, start + few)) for start in starts)

    def _outer(self) -> Outer:
        return Outer(self.left, self.window.unfold(self.images), self.shape)

    def _square_by_pixels(self) -> Tensor:
        positions, sizes = self.window.positions, self.images.shape[3:]
        pixels = gram(self.images.flatten(3).permute(0, 3, 1, 2))  # (N, G, P, P)
        pixels = pixels.reshape(*pixels.shape[:2], *sizes, *sizes)
        patches = pixels.new_zeros(*pixels.shape[:2], *positions, *positions)
        for met, at in self.window.offsets(sizes):
            to: Any = (..., *met, *met)
            of: Any = (..., *at, *at)
            patches[to] += pixels[of]
        products = gram(self.left).flatten(1).mul_(patches.flatten(1))
        return products.sum(1).clamp_min_(0)


@layer_rule(functional.conv1d, functional.conv2d, functional.conv3d, features=all_but_samples)
def _conv(
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
    kernel = weight.shape[2:]
    require_samples(batch, input, "a convolution", len(kernel) + 2)
    stride, dilation = _each(stride, len(kernel)), _each(dilation, len(kernel))
    if padding == "same":  # the odd one comes after
        whole = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        before = [size // 2 for size in whole]
    else:
        before = _each(0 if padding == "valid" else padding, len(kernel))
    window = Window(kernel, stride, dilation, before, delta.shape[2:])
    yield weight, _convolution(delta, input, window, groups, weight)
    if bias is not None:
        yield bias, Explicit(delta.flatten(2).sum(2))


@layer_rule(
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
    features=all_but_samples,
)
def _conv_transpose(
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
    # The convolution the other way: what it scattered of the input is gathered from delta.
    kernel = weight.shape[2:]
    require_samples(batch, input, "a convolution", len(kernel) + 2)
    stride, dilation, before = (_each(one, len(kernel)) for one in (stride, dilation, padding))
    window = Window(kernel, stride, dilation, before, input.shape[2:])
    yield weight, _convolution(input, delta, window, groups, weight)
    if bias is not None:
        yield bias, Explicit(delta.flatten(2).sum(2))


def _convolution(
    left: Tensor, images: Tensor, window: Window, groups: int, weight: Tensor
) -> Convolution:
    left_NTGO = left.flatten(2).unflatten(1, (groups, -1)).permute(0, 3, 1, 2)
    return Convolution(left_NTGO, images.unflatten(1, (groups, -1)), window, weight.shape)


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count // len(value))
