"""Per-sample gradients of one parameter in a form that is smaller than they are.

The importance of sample i in a layer is beta_i = sum_j phi_ij^2 over the layer's parameters (Gao &
Jojic 2017, section 2). phi_i = D * g_i: of the sample's part g_i of the gradient of the batch's
loss, and the derivative D of the update (`sampimp.importance.optimizers`); under plain SGD D is
minus the
rate, and the factor 1/B of a mean loss is inside g_i.

A layer seldom needs the gradient of each sample, which is as large as the parameter; it needs the
sum of its squares, and the two factors of which the gradient is made give that directly. Four
forms are enough for every layer here but convolutions, which have their own:

    Explicit   the gradients themselves (biases, normalisations, what has no better form)
    Product    an outer product (linear layers)
    Outer      a sum of them over positions (of sequences, recurrent layers)
    Rows       vectors that are added to rows of a table (embeddings)

`square` is the squared norm of each sample's gradient; `weighted` the same with each entry scaled
by the optimizer's derivative D, squared (`sampimp.importance.optimizers.Diagonal`); `gradient` the
thing
itself, for a few samples at a time; `summed` the batch's, which autograd has found as well.

Shape suffixes: N samples, T positions (of a sequence, an image), G groups, O outputs, I inputs, E
entries of a row, P... the shape of the parameter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from sampimp.importance.optimizers import Derivative, Diagonal

CHUNK_ON_CPU, CHUNK_ELSEWHERE = 2**19, 2**26
"""Most values of per-sample gradients that are held at once.

On the CPU they stay in its cache (a GRU under AdamW: 6.6 ms, at 2^22 10.0 ms; convolutions do not
mind); elsewhere launches count, and the number is an arbitrary bound (256 MB).
"""

GRAM_POSITIONS = 64
"""Rows of a Gram matrix at a time: of 256 positions this took 0.7 to 0.8 times the whole."""


class Factor(Protocol):
    """The gradients of a parameter by sample."""

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,)."""

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,)."""

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""

    def joined(self, rows_NT: Tensor) -> "Factor":
        """Return the gradients of samples, each the sum of those of some rows, -1 for none."""


@dataclass(frozen=True)
class Explicit:
    """Gradients that are there: values (N, P...)."""

    values: Tensor

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,); not to be changed."""
        return self._square

    @cached_property
    def _square(self) -> Tensor:
        return square_sum(self.values)

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,)."""
        return _weighted(derivative, precise(self.values))

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""
        return precise(self.values[samples])

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""
        return precise(self.values).sum(0)

    def joined(self, rows_NT: Tensor) -> "Explicit":
        """Return the gradients of samples, each the sum of those of some rows, -1 for none."""
        return Explicit(taken(precise(self.values), rows_NT).sum(1))


@dataclass(frozen=True)
class Product:
    """Gradients left right^T of one position: left (N, O), right (N, I).

    Both as `Explicit`: the left one is the bias's gradient too, and what it knows serves both.
    """

    left: Explicit
    right: Explicit

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,): a product of theirs."""
        return self.left.square() * self.right.square()

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,).

        A matrix product of the factors' squares, instead of every sample's gradient; by some rows
        of the parameter after others, while their D^2 is in the cache.
        """
        left_NO, right_NI = (precise(one.values).square() for one in (self.left, self.right))
        inputs_NI = torch.zeros_like(right_NI)
        for rows, square in derivative.squares():
            inputs_NI.addmm_(left_NO[:, rows], square)
        return inputs_NI.mul_(right_NI).sum(1)

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""
        return self.left.gradient(samples).unsqueeze(2) * self.right.gradient(samples).unsqueeze(1)

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""
        return precise(self.left.values).t() @ precise(self.right.values)

    def joined(self, rows_NT: Tensor) -> "Product | Outer":
        """Return the gradients of samples, each the sum of those of some rows, -1 for none."""
        left_NTO, right_NTI = (taken(one.values, rows_NT) for one in (self.left, self.right))
        if rows_NT.shape[1] == 1:
            return Product(Explicit(left_NTO.squeeze(1)), Explicit(right_NTI.squeeze(1)))
        shape = (left_NTO.shape[2], right_NTI.shape[2])
        return Outer(left_NTO.unsqueeze(2), right_NTI.unsqueeze(2), shape)

    def transposed(self) -> "Product":
        """Return the gradients of the parameter whose transpose this one is."""
        return Product(self.right, self.left)


@dataclass(frozen=True)
class Outer:
    """Gradients sum_t left_t right_t^T, perhaps in groups: left (N, T, G, O), right (N, T, G, I).

    Examples
    --------
    >>> left, right = torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 5)
    >>> Outer(left, right, (4, 5)).square()  # each of 20 entries is 3
    tensor([180., 180.])
    """

    left: Tensor
    right: Tensor
    shape: Sequence[int]
    """Of the parameter: (G O, I) reshaped."""
    left_gram: Callable[[], Tensor] | None = None
    """Returns `gram` of left, where a second factor has use for it as well."""

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,).

        The two Gram matrices take T^2 (O + I) multiplications a sample, and the gradient itself
        T O I: whichever is less. They are symmetric, so that rows need to be formed from their
        diagonal on only, and what is right of it counts twice.
        """
        left, right = precise(self.left), precise(self.right)
        positions, outputs, inputs = left.shape[1], left.shape[3], right.shape[3]
        if self.left_gram is not None:
            if positions * (outputs / 2 + inputs) < outputs * inputs:
                return gram(right).mul_(self.left_gram()).flatten(1).sum(1).clamp_min_(0)
        elif positions * (outputs + inputs) < outputs * inputs:
            left, right = left.transpose(1, 2), right.transpose(1, 2)  # (N, G, T, K)
            square = left.new_zeros(len(left))
            for start in range(0, positions, GRAM_POSITIONS):
                some, later = slice(start, start + GRAM_POSITIONS), slice(start, None)
                part = left[:, :, some] @ left[:, :, later].transpose(2, 3)
                part *= right[:, :, some] @ right[:, :, later].transpose(2, 3)
                diagonal = part[..., :GRAM_POSITIONS].flatten(1).sum(1)
                square += part.flatten(1).sum(1).mul_(2).sub_(diagonal)
            return square.clamp_min_(0)
        return in_chunks(self, len(left), left, square_sum)

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,)."""
        return in_chunks(self, len(self.left), self.left, partial(_weighted, derivative))

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""
        left = precise(self.left[samples]).permute(0, 2, 3, 1)  # (N, G, O, T)
        right = precise(self.right[samples]).transpose(1, 2)  # (N, G, T, I)
        return (left @ right).reshape(len(left), *self.shape)

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""
        left = precise(self.left).flatten(0, 1).permute(1, 2, 0)  # (G, O, N T)
        right = precise(self.right).flatten(0, 1).transpose(0, 1)  # (G, N T, I)
        return (left @ right).reshape(*self.shape)

    def joined(self, rows_NT: Tensor) -> "Outer":
        """Return the gradients of samples, each the sum of those of some rows, -1 for none."""
        left, right = (taken(one, rows_NT).flatten(1, 2) for one in (self.left, self.right))
        return Outer(left, right, self.shape)

    def transposed(self) -> "Outer":
        """Return the gradients of the parameter whose transpose this one, without groups, is."""
        return Outer(self.right, self.left, self.shape[::-1])


@dataclass(frozen=True)
class Rows:
    """Gradients that add vectors (N, T, E) to the rows index (N, T) of a table."""

    vectors: Tensor
    index: Tensor
    shape: Sequence[int]
    """Of the table: (rows, E)."""

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,)."""
        return square_sum(self._merged()[0])

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,)."""
        merged, index = self._merged()
        return merged.square().mul_(derivative.square()[index]).flatten(1).sum(1)

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""
        vectors, index = precise(self.vectors[samples]), self.index[samples]
        table = vectors.new_zeros(len(vectors), *self.shape)
        return table.scatter_add_(1, index[:, :, None].expand_as(vectors), vectors)

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""
        vectors = precise(self.vectors).flatten(0, 1)
        return vectors.new_zeros(*self.shape).index_add_(0, self.index.flatten(), vectors)

    def joined(self, rows_NT: Tensor) -> "Rows":
        """Return the gradients of samples, each the sum of those of some rows, -1 for none."""
        index = self.index[rows_NT.clamp_min(0)].flatten(1)
        return Rows(taken(self.vectors, rows_NT).flatten(1, 2), index, self.shape)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Return the vectors with those of one row added up at its first position, and the rows."""
        vectors = precise(self.vectors)
        first = (self.index[:, :, None] == self.index[:, None, :]).int().argmax(2)
        merged = torch.zeros_like(vectors)
        return merged.scatter_add_(1, first[:, :, None].expand_as(vectors), vectors), self.index


@dataclass(frozen=True)
class Total:
    """The sum of gradients of several uses of one parameter, whatever their forms."""

    parts: Sequence[Factor]
    count: int
    """Number of samples, N."""
    like: Tensor
    """The parameter."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape of the parameter."""
        return self.like.shape

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,).

        A table that is the last layer's weight as well, of a language model, is not formed:
        |a + b|^2 = |a|^2 + |b|^2 + 2 a.b.
        """
        match self.parts:
            case [Outer() as outer, Rows() as rows]:
                return (outer.square() + rows.square() + 2 * _inner(outer, rows)).clamp_min_(0)
        return in_chunks(self, self.count, self.like, square_sum)

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,)."""
        return in_chunks(self, self.count, self.like, partial(_weighted, derivative))

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""
        first, *others = (part.gradient(samples) for part in self.parts)
        return sum(others, first)

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""
        first, *others = (part.summed() for part in self.parts)
        return sum(others, first)

    def joined(self, rows_NT: Tensor) -> "Total":
        """Return the gradients of samples, each the sum of those of some rows, -1 for none."""
        parts = [part.joined(rows_NT) for part in self.parts]
        return Total(parts, len(rows_NT), self.like)


def taken(values: Tensor, rows_NT: Tensor) -> Tensor:
    """Return rows of values (R, ...) by sample, (N, T, ...); zero where there is none.

    Examples
    --------
    >>> taken(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0, 2], [1, -1]]))
    tensor([[1., 3.],
            [2., 0.]])
    """
    found = values[rows_NT.clamp_min(0)]
    missing = rows_NT < 0
    return found.masked_fill(missing.reshape(*missing.shape, *[1] * (values.dim() - 1)), 0)


def _inner(outer: Outer, rows: Rows) -> Tensor:
    """Return the inner product of each sample's two gradients of a table, shape (N,).

    sum_st left_s[index_t] right_s.vector_t
    """
    left, right = precise(outer.left.squeeze(2)), precise(outer.right.squeeze(2))
    index_NST = rows.index[:, None, :].expand(-1, left.shape[1], -1)
    products_NST = right @ precise(rows.vectors).transpose(1, 2)
    return products_NST.mul_(left.gather(2, index_NST)).flatten(1).sum(1)


def total(parts: Sequence[Factor], count: int, like: Tensor) -> Factor:
    """Return the sum of the gradients of several uses of a parameter, `like`, by `count` samples.

    Its squared norm is not the sum of theirs. Of one form, they are more positions of one use.
    """
    if len(parts) == 1:
        return parts[0]
    outer = [
        Outer(part.left.values[:, None, None], part.right.values[:, None, None], like.shape)
        if isinstance(part, Product)
        else part
        for part in parts
        if isinstance(part, Product | Outer)
    ]
    rows = [part for part in parts if isinstance(part, Rows)]
    others = [part for part in parts if not isinstance(part, Product | Outer | Rows)]
    if len({part.left.shape[2] for part in outer}) > 1:
        return Total(parts, count, like)
    merged: list[Factor] = []
    if outer:
        left, right = [part.left for part in outer], [part.right for part in outer]
        merged.append(Outer(_joined(left), _joined(right), like.shape))
    if rows:
        vectors, index = [part.vectors for part in rows], [part.index for part in rows]
        merged.append(Rows(_joined(vectors), _joined(index), like.shape))
    merged += others
    return merged[0] if len(merged) == 1 else Total(merged, count, like)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return positions one after the other; of one part, without a copy."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def squares(factor: Factor, derivative: Derivative) -> Tensor:
    """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,); where D is a number, without it.

    That is the same for all samples of a step, and comes in later.
    """
    return factor.weighted(derivative) if isinstance(derivative, Diagonal) else factor.square()


def chunk(values: int, like: Tensor) -> int:
    """Return how many samples to work on at once that have so many values each."""
    most = CHUNK_ON_CPU if like.device.type == "cpu" else CHUNK_ELSEWHERE
    return most // max(1, values) or 1


def in_chunks(
    factor: Outer | Total, count: int, like: Tensor, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return a function of each sample's gradient, shape (N,), of a few samples at a time."""
    few = chunk(math.prod(factor.shape), like)
    starts = range(0, count or 1, few)  # one empty chunk of no samples
    return torch.cat([reduce(factor.gradient(slice(start, start + few))) for start in starts])


def gram(values: Tensor) -> Tensor:
    """Return the products of all positions of values (N, T, G, K), shape (N, G, T, T)."""
    rows = precise(values).transpose(1, 2)
    return rows @ rows.transpose(2, 3)


def precise(values: Tensor) -> Tensor:
    """Return half precision as float32, in whose range the squares are, and all else as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def square_sum(values: Tensor) -> Tensor:
    """Return the sum of squares of each sample's values (N, ...), shape (N,).

    Examples
    --------
    >>> square_sum(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([25.,  1.])
    """
    norm = torch.linalg.vector_norm(_flat(precise(values)), dim=1)  # one pass, no temporary
    return norm.mul_(norm)


def _flat(values: Tensor) -> Tensor:
    """Return what there is of each sample in a row, also one number of a parameter without axes."""
    if values.dim() == 2:
        return values
    return values.flatten(1) if values.dim() > 2 else values.unsqueeze(1)


def _weighted(derivative: Diagonal, values: Tensor) -> Tensor:
    return _flat(values).square() @ derivative.square().flatten()
