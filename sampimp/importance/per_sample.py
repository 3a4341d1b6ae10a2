"""Arithmetic on values of each sample (N, ...), of which per-sample gradients are made.

Map: `samples_at_once` (how many samples to process at once), `gather_rows` (rows of the batch axis
by sample), `gram_of_positions`, `at_least_float32`, `finest_dtype`, `square_sum`, `as_matrix`.

Shape suffixes: N samples, T positions, G groups, K features.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK_ON_CPU, CHUNK_ELSEWHERE = 2**19, 2**26
"""Largest number of values of per-sample gradients that are held at once.

On the CPU they stay in its cache (a GRU under AdamW: 6.6 ms; with 2^22, 10.0 ms; convolutions do
not depend on it). On other devices kernel launches dominate, and the number is an arbitrary bound
(256 MB).
"""


def samples_at_once(values: int, like: Tensor) -> int:
    """Return how many samples to process at once if each has this many values.

    Parameters
    ----------
    values
        Number of values of one sample.
    like
        A tensor on the device in question.
    """
    limit = CHUNK_ON_CPU if like.device.type == "cpu" else CHUNK_ELSEWHERE
    return limit // max(1, values) or 1


def gather_rows(values: Tensor, rows_NT: Tensor) -> Tensor:
    """Return the rows of values (R, ...) that belong to each sample, (N, T, ...); zero for -1.

    Examples
    --------
    >>> gather_rows(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0, 2], [1, -1]]))
    tensor([[1., 3.],
            [2., 0.]])
    """
    # index_select copies whole rows: half the time of values[rows] for rows of 64 entries.
    gathered = values.index_select(0, rows_NT.clamp_min(0).flatten()).unflatten(0, rows_NT.shape)
    missing = rows_NT < 0
    return gathered.masked_fill_(missing.reshape(*missing.shape, *[1] * (values.dim() - 1)), 0)


def gram_of_positions(values: Tensor) -> Tensor:
    """Return the inner products of all positions of values (N, T, G, K), shape (N, G, T, T)."""
    rows = at_least_float32(values).transpose(1, 2)
    return rows @ rows.transpose(2, 3)


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32, whose range contains the squares; the rest unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def finest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return float64 if one of the tensors has it, else float32."""
    has_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if has_double else torch.float32


def square_sum(values: Tensor) -> Tensor:
    """Return the sum of squares of each sample's values (N, ...), shape (N,).

    Examples
    --------
    >>> square_sum(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([25.,  1.])
    """
    norm = torch.linalg.vector_norm(as_matrix(at_least_float32(values)), dim=1)  # no temporary
    return norm.mul_(norm)


def as_matrix(values: Tensor) -> Tensor:
    """Return values as (N, K), with K = 1 for a parameter without axes."""
    if values.dim() == 2:
        return values
    return values.flatten(1) if values.dim() > 2 else values.unsqueeze(1)
