"""Indices that name the samples of a batch: their positions in the training set.

Map: `check_index`, `split_passes` (indices of each backward pass of a step), `sum_by_sample`
(importance by index, summed over an epoch).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sampimp.errors import ConfigError

Index = Tensor | np.ndarray | Sequence[int]
"""Positions in the training set of the samples of a batch, shape (N,)."""


def check_index(index: Index) -> Tensor:
    """Return sample indices as an int64 tensor on the CPU.

    Raises
    ------
    ConfigError
        The indices are not whole numbers, are negative, or repeat a sample.
    """
    try:
        values = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            expected="whole numbers, the positions of the batch's samples in the training set",
            got=str(error).splitlines()[0],
            where="ImportanceRecorder.step",
            todo="number the samples, as by enumerate(names), and keep the names beside the result",
        ) from error
    whole = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.numel() and not whole:
        raise ConfigError(
            expected="whole numbers, the positions of the batch's samples in the training set",
            got=f"{values.dtype}",
            where="ImportanceRecorder.step",
            todo="pass the samples' positions, not their values",
        )
    index_N = values.to("cpu", torch.int64)
    numbers = index_N.flatten().tolist()  # a set of ints takes a quarter of the time of a sort
    if index_N.dim() != 1 or len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
        raise ConfigError(
            expected="one non-negative index for each sample of the batch, all different",
            got=f"shape {tuple(index_N.shape)}, smallest {min(numbers, default=0)}, "
            f"{len(numbers) - len(set(numbers))} repeated",
            where="ImportanceRecorder.step",
            todo="pass the samples' positions in the training set",
        )
    return index_N


def split_passes(index: Index | Sequence[Index]) -> list[Index]:
    """Return the indices of each backward pass of a step.

    Examples
    --------
    >>> split_passes([4, 5]), split_passes([[4], [5]])
    ([[4, 5]], [[4], [5]])
    """
    several = isinstance(index, list | tuple) and len(index) and not isinstance(index[0], int)
    several = several and np.ndim(index[0]) > 0
    return list(index) if several else [index]  # type: ignore[arg-type, list-item]


def sum_by_sample(index_N: Tensor, beta_LN: Tensor, sample_count: int) -> Tensor:
    """Sum importance by sample, shape (layer, sample); NaN for samples that were not used.

    Parameters
    ----------
    index_N
        Sample of each column of `beta_LN`, (N,); a sample may occur several times.
    beta_LN
        Importance, (layer, N).
    sample_count
        Size of the training set.
    """
    total = torch.zeros(len(beta_LN), sample_count, dtype=beta_LN.dtype)
    total.index_add_(1, index_N, beta_LN)
    unused = torch.ones(sample_count, dtype=torch.bool)
    unused[index_N] = False
    total[:, unused] = torch.nan
    return total
