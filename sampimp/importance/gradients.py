"""Per-sample gradients of one parameter, as factors that are smaller than the gradients.

The importance of sample i in a layer is beta_i = sum_j phi_ij^2 over the layer's parameters (Gao &
Jojic 2017, section 2), where phi_i = D * g_i: g_i is the sample's part of the gradient of the
batch's loss, and D is the derivative of the update (`sampimp.importance.update`). Under plain SGD D
is minus the learning rate; the factor 1/B of a mean loss is inside g_i.

The gradient of one sample is as large as the parameter, but importance needs only the sum of its
squares, which often follows from the two factors of which the gradient is made. Four forms serve
every layer except convolutions, which have a form of their own (`Convolution`, in their rules):

    Explicit       the gradients themselves (biases, normalisations, all without a smaller form)
    Product        one outer product (linear layers)
    Outer          a sum of outer products over positions (linear layers on sequences, recurrent)
    EmbeddingRows  vectors that are added to rows of a table (embeddings)

Each form is a `Factor` with the methods `square` (squared norm of each sample's gradient),
`weighted` (the same with each entry scaled by D), `inner` (inner products with directions, for
influence), `gradient` (the gradients themselves, of a few samples at a time), `summed` (the batch's
gradient, for comparison with autograd's) and `joined` (samples that occupy several rows of the
batch axis). `total` adds the uses of a parameter that is used more than once; `squares` chooses
between `square` and `weighted`.

Shape suffixes: N samples, T positions (of a sequence, an image), G groups, O outputs, I inputs, E
entries of a table's row, S and T positions of two factors, K directions, P... the shape of the
parameter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from sampimp.importance.per_sample import (
    as_matrix,
    at_least_float32,
    gather_rows,
    gram_of_positions,
    samples_at_once,
    square_sum,
)
from sampimp.importance.update import Derivative, Diagonal

GRAM_POSITIONS = 64
"""Rows of a Gram matrix that are formed at a time.

For 256 positions this took 0.7 to 0.8 times as long as the whole matrix at once.
"""


class Factor(Protocol):
    """The per-sample gradients of one parameter."""

    def square(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape (N,); read-only."""

    def weighted(self, derivative: Diagonal) -> Tensor:
        """Return sum_j D_j^2 gradient_j^2 of each sample, shape (N,)."""

    def inner(self, directions: Tensor) -> Tensor:
        """Return <direction_k, gradient_n> for directions (K, P...), shape (K, N)."""

    def gradient(self, samples: slice) -> Tensor:
        """Return the gradients of some samples, shape (n, P...)."""

    def summed(self) -> Tensor:
        """Return the sum of all samples' gradients, shape (P...)."""

    def joined(self, rows_NT: Tensor) -> "Factor":
        """Return a factor in which sample n is the sum of the rows `rows_NT[n]`; -1 for no row."""


@dataclass(frozen=True)
class Explicit:
    """The gradients themselves: values (N, P...)."""

    values: Tensor

    def square(self) -> Tensor:
        """See `Factor`; computed once."""
        return self._square

    @cached_property
    def _square(self) -> Tensor:
        return square_sum(self.values)

    def weighted(self, derivative: Diagonal) -> Tensor:
        """See `Factor`."""
        return _weighted(derivative, at_least_float32(self.values))

    def inner(self, directions: Tensor) -> Tensor:
        """See `Factor`."""
        values = as_matrix(at_least_float32(self.values))
        return as_matrix(at_least_float32(directions)) @ values.t()

    def gradient(self, samples: slice) -> Tensor:
        """See `Factor`."""
        return at_least_float32(self.values[samples])

    def summed(self) -> Tensor:
        """See `Factor`."""
        return at_least_float32(self.values).sum(0)

    def joined(self, rows_NT: Tensor) -> "Explicit":
        """See `Factor`."""
        return Explicit(gather_rows(at_least_float32(self.values), rows_NT).sum(1))


@dataclass(frozen=True)
class Product:
    """Gradients left right^T: left (N, O), right (N, I).

    Both are `Explicit`, since the left one is also the gradient of the bias: its squared norms are
    computed once for both.
    """

    left: Explicit
    right: Explicit

    def square(self) -> Tensor:
        """See `Factor`; the norm of an outer product is the product of the norms."""
        return self.left.square() * self.right.square()

    def weighted(self, derivative: Diagonal) -> Tensor:
        """See `Factor`.

        A matrix product of the squared factors instead of every sample's gradient, computed by
        blocks of rows of the parameter while their D^2 is in the cache.
        """
        left_NO, right_NI = (
            at_least_float32(factor.values).square() for factor in (self.left, self.right)
        )
        inputs_NI = torch.zeros_like(right_NI)
        for rows, square in derivative.squares():
            inputs_NI.addmm_(left_NO[:, rows], square)
        return inputs_NI.mul_(right_NI).sum(1)

    def inner(self, directions: Tensor) -> Tensor:
        """See `Factor`; left^T direction right."""
        left, right = (at_least_float32(factor.values) for factor in (self.left, self.right))
        return by_direction(directions, lambda matrix: (left @ matrix).mul_(right).sum(1))

    def gradient(self, samples: slice) -> Tensor:
        """See `Factor`."""
        return self.left.gradient(samples).unsqueeze(2) * self.right.gradient(samples).unsqueeze(1)

    def summed(self) -> Tensor:
        """See `Factor`."""
        return at_least_float32(self.left.values).t() @ at_least_float32(self.right.values)

    def joined(self, rows_NT: Tensor) -> "Product | Outer":
        """See `Factor`."""
        left_NTO, right_NTI = (
            gather_rows(factor.values, rows_NT) for factor in (self.left, self.right)
        )
        if rows_NT.shape[1] == 1:
            return Product(Explicit(left_NTO.squeeze(1)), Explicit(right_NTI.squeeze(1)))
        shape = (left_NTO.shape[2], right_NTI.shape[2])
        return Outer(left_NTO.unsqueeze(2), right_NTI.unsqueeze(2), shape)

    def transposed(self) -> "Product":
        """Return the gradients of the transposed parameter."""
        return Product(self.right, self.left)


@dataclass(frozen=True)
class Outer:
    """Gradients sum_t left_t right_t^T, by groups: left (N, T, G, O), right (N, T, G, I).

    Examples
    --------
    >>> left, right = torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 5)
    >>> Outer(left, right, (4, 5)).square()  # each of 20 entries is 3
    tensor([180., 180.])
    """

    left: Tensor
    right: Tensor
    shape: Sequence[int]
    """Shape of the parameter: (G O, I) reshaped."""
    left_gram: Callable[[], Tensor] | None = None
    """Returns `gram_of_positions(left)`, if a second factor needs it as well."""

    def square(self) -> Tensor:
        """See `Factor`.

        Two Gram matrices take T^2 (O + I) multiplications a sample, and the gradient itself T O I;
        the method takes the smaller. Gram matrices are symmetric, so their rows are formed only
        from the diagonal on, and entries right of it count twice.
        """
        left, right = at_least_float32(self.left), at_least_float32(self.right)
        positions, outputs, inputs = left.shape[1], left.shape[3], right.shape[3]
        if self.left_gram is not None:
            if positions * (outputs / 2 + inputs) < outputs * inputs:
                return (
                    gram_of_positions(right).mul_(self.left_gram()).flatten(1).sum(1).clamp_min_(0)
                )
        elif positions * (outputs + inputs) < outputs * inputs:
            left, right = left.transpose(1, 2), right.transpose(1, 2)  # (N, G, T, K)
            square = left.new_zeros(len(left))
            for start in range(0, positions, GRAM_POSITIONS):
                rows, columns = slice(start, start + GRAM_POSITIONS), slice(start, None)
                part = left[:, :, rows] @ left[:, :, columns].transpose(2, 3)
                part *= right[:, :, rows] @ right[:, :, columns].transpose(2, 3)
                diagonal = part[..., :GRAM_POSITIONS].flatten(1).sum(1)
                square += part.flatten(1).sum(1).mul_(2).sub_(diagonal)
            return square.clamp_min_(0)
        return in_chunks(self, len(left), left, square_sum)

    def weighted(self, derivative: Diagonal) -> Tensor:
        """See `Factor`."""
        return in_chunks(self, len(self.left), self.left, partial(_weighted, derivative))

    def inner(self, directions: Tensor) -> Tensor:
        """See `Factor`; sum_t left_t^T direction right_t, or from the gradients."""
        if forms_gradients(len(directions), self.left.shape[1]):
            rows = at_least_float32(directions).flatten(1)
            products_NK = in_chunks(
                self, len(self.left), self.left, lambda g: g.flatten(1) @ rows.t()
            )
            return products_NK.t()
        left, right = at_least_float32(self.left), at_least_float32(self.right)
        matrices = directions.reshape(-1, *left.shape[2:], right.shape[3])
        if left.shape[3] < right.shape[3]:  # the smaller product is formed
            left, right, matrices = right, left, matrices.transpose(2, 3)

        def product(matrix: Tensor) -> Tensor:
            return torch.einsum("ntgo,goi->ntgi", left, matrix).mul_(right).sum((1, 2, 3))

        return by_direction(matrices, product)

    def gradient(self, samples: slice) -> Tensor:
        """See `Factor`."""
        left = at_least_float32(self.left[samples]).permute(0, 2, 3, 1)  # (N, G, O, T)
        right = at_least_float32(self.right[samples]).transpose(1, 2)  # (N, G, T, I)
        return (left @ right).reshape(len(left), *self.shape)

    def summed(self) -> Tensor:
        """See `Factor`."""
        left = at_least_float32(self.left).flatten(0, 1).permute(1, 2, 0)  # (G, O, N T)
        right = at_least_float32(self.right).flatten(0, 1).transpose(0, 1)  # (G, N T, I)
        return (left @ right).reshape(*self.shape)

    def joined(self, rows_NT: Tensor) -> "Outer":
        """See `Factor`; the rows of one sample are further positions."""
        left, right = (
            gather_rows(factor, rows_NT).flatten(1, 2) for factor in (self.left, self.right)
        )
        return Outer(left, right, self.shape)

    def transposed(self) -> "Outer":
        """Return the gradients of the transposed parameter; for one group only."""
        return Outer(self.right, self.left, self.shape[::-1])


@dataclass(frozen=True)
class EmbeddingRows:
    """Gradients that add vectors (N, T, E) to the rows index (N, T) of a table."""

    vectors: Tensor
    index: Tensor
    shape: Sequence[int]
    """Shape of the table: (rows, E)."""

    def square(self) -> Tensor:
        """See `Factor`."""
        return square_sum(self._merged())

    def weighted(self, derivative: Diagonal) -> Tensor:
        """See `Factor`."""
        return self._merged().square().mul_(derivative.square()[self.index]).flatten(1).sum(1)

    def inner(self, directions: Tensor) -> Tensor:
        """See `Factor`; sum_t vector_t . direction[index_t]."""
        vectors = at_least_float32(self.vectors)
        return by_direction(
            directions, lambda table: table[self.index].mul_(vectors).flatten(1).sum(1)
        )

    def gradient(self, samples: slice) -> Tensor:
        """See `Factor`."""
        vectors, index = at_least_float32(self.vectors[samples]), self.index[samples]
        table = vectors.new_zeros(len(vectors), *self.shape)
        return table.scatter_add_(1, index[:, :, None].expand_as(vectors), vectors)

    def summed(self) -> Tensor:
        """See `Factor`."""
        vectors = at_least_float32(self.vectors).flatten(0, 1)
        return vectors.new_zeros(*self.shape).index_add_(0, self.index.flatten(), vectors)

    def joined(self, rows_NT: Tensor) -> "EmbeddingRows":
        """See `Factor`; the rows of one sample are further positions."""
        index = self.index[rows_NT.clamp_min(0)].flatten(1)
        return EmbeddingRows(gather_rows(self.vectors, rows_NT).flatten(1, 2), index, self.shape)

    def _merged(self) -> Tensor:
        """Return the vectors (N, T, E), those of one row summed at the row's first position."""
        vectors = at_least_float32(self.vectors)
        first = (self.index[:, :, None] == self.index[:, None, :]).int().argmax(2)
        merged = torch.zeros_like(vectors)
        return merged.scatter_add_(1, first[:, :, None].expand_as(vectors), vectors)


@dataclass(frozen=True)
class Total:
    """The sum of the gradients of several uses of one parameter, in any forms."""

    parts: Sequence[Factor]
    count: int
    """Number of samples, N."""
    like: Tensor
    """The parameter."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the parameter."""
        return self.like.shape

    def square(self) -> Tensor:
        """See `Factor`.

        For a table that is also the last layer's weight (as in language models) no gradient is
        formed: |a + b|^2 = |a|^2 + |b|^2 + 2 a.b.
        """
        match self.parts:
            case [Outer() as outer, EmbeddingRows() as rows]:
                return (outer.square() + rows.square() + 2 * _inner(outer, rows)).clamp_min_(0)
        return in_chunks(self, self.count, self.like, square_sum)

    def weighted(self, derivative: Diagonal) -> Tensor:
        """See `Factor`."""
        return in_chunks(self, self.count, self.like, partial(_weighted, derivative))

    def inner(self, directions: Tensor) -> Tensor:
        """See `Factor`."""
        first, *others = (part.inner(directions) for part in self.parts)
        return sum(others, first)

    def gradient(self, samples: slice) -> Tensor:
        """See `Factor`."""
        first, *others = (part.gradient(samples) for part in self.parts)
        return sum(others, first)

    def summed(self) -> Tensor:
        """See `Factor`."""
        first, *others = (part.summed() for part in self.parts)
        return sum(others, first)

    def joined(self, rows_NT: Tensor) -> "Total":
        """See `Factor`."""
        parts = [part.joined(rows_NT) for part in self.parts]
        return Total(parts, len(rows_NT), self.like)


def total(parts: Sequence[Factor], count: int, like: Tensor) -> Factor:
    """Return the sum of the gradients of several uses of one parameter.

    The squared norm of the sum is not the sum of the squared norms. Uses of one form are merged
    into one factor, as further positions.

    Parameters
    ----------
    parts
        One factor for each use.
    count
        Number of samples.
    like
        The parameter.
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
    rows = [part for part in parts if isinstance(part, EmbeddingRows)]
    others = [part for part in parts if not isinstance(part, Product | Outer | EmbeddingRows)]
    if len({part.left.shape[2] for part in outer}) > 1:
        return Total(parts, count, like)
    merged: list[Factor] = []
    if outer:
        left, right = [part.left for part in outer], [part.right for part in outer]
        merged.append(Outer(_concatenated(left), _concatenated(right), like.shape))
    if rows:
        vectors, index = [part.vectors for part in rows], [part.index for part in rows]
        merged.append(EmbeddingRows(_concatenated(vectors), _concatenated(index), like.shape))
    merged += others
    return merged[0] if len(merged) == 1 else Total(merged, count, like)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate positions; a single part is returned without a copy."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def _inner(outer: Outer, rows: EmbeddingRows) -> Tensor:
    """Return the inner product of each sample's two gradients of a table, shape (N,).

    sum_st left_s[index_t] right_s.vector_t
    """
    left = at_least_float32(outer.left.squeeze(2))
    right = at_least_float32(outer.right.squeeze(2))
    index_NST = rows.index[:, None, :].expand(-1, left.shape[1], -1)
    products_NST = right @ at_least_float32(rows.vectors).transpose(1, 2)
    return products_NST.mul_(left.gather(2, index_NST)).flatten(1).sum(1)


def squares(factor: Factor, derivative: Derivative) -> Tensor:
    """Return sum_j gradient_j^2 of each sample, shape (N,), weighted by D_j^2 if D is a diagonal.

    If D is one number, it is the same for all samples of a step, and the caller applies it later.
    """
    return factor.weighted(derivative) if isinstance(derivative, Diagonal) else factor.square()


def by_direction(directions: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `product` (N,) of each direction, (K, N); one at a time, which limits memory."""
    return torch.stack([product(direction) for direction in at_least_float32(directions)])


def forms_gradients(directions: int, positions: int) -> bool:
    """Return whether inner products are cheaper from gradients that are sums over positions.

    Without the gradients, each entry of a parameter takes K T multiplications a sample. With them,
    it takes T, which take twice as long each in the small matrices of single samples, and as long
    as 4 for each time that it is written or read. (Measured for 1 to 16 directions, 2 to 1,024
    positions, 288 to 2 million entries: the way taken is at most 1.5 times the faster one.)
    """
    return directions * positions > 2 * positions + 4 * (directions + 1)


def in_chunks(
    factor: Outer | Total, count: int, like: Tensor, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `reduce` of each sample's gradient, shape (N,), for a few samples at a time."""
    size = samples_at_once(math.prod(factor.shape), like)
    starts = range(0, count or 1, size)  # without samples, one empty chunk
    return torch.cat([reduce(factor.gradient(slice(start, start + size))) for start in starts])


def _weighted(derivative: Diagonal, values: Tensor) -> Tensor:
    """Return sum_j D_j^2 values_j^2 of each sample, shape (N,)."""
    return as_matrix(values).square() @ derivative.square().flatten()
