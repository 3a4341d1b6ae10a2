"""Which sample each row of a product of data is of, found by carrying the product out again.

A product is linear in each factor. Let the entries of one factor be random weights w, and in a
second product w c, where c is a number of the entry's sample. An entry of the second result divided
by that of the first one is c where a single sample contributes to it, and a weighted mean of such
numbers where several do. A permutation matrix thus moves rows; a mixture is told from both.

Map: `combined_samples`, of one factor; `agreed_rows`, of all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sampimp.importance.ownership.call import Call
from sampimp.importance.ownership.row_notes import (
    NO_SAMPLE,
    UNKNOWN_ROWS,
    UNKNOWN_SAMPLE,
    SampleRows,
)

_TOLERANCE = 1e-6
"""Difference from a whole number below which one sample contributes (rounding: about 1e-12)."""


@torch.no_grad()
def combined_samples(call: Call, factor: Tensor, samples: Tensor) -> Tensor | None:
    """Return which sample of a factor each entry of a product is of.

    Parameters
    ----------
    call
        A product, linear in each of its tensors.
    factor
        One of them.
    samples
        Number of the sample of each of its entries, in its shape or one that expands to it.

    Returns
    -------
    Tensor or None
        Whole numbers in the shape of the product, on the CPU: a sample, `NO_SAMPLE` where the
        factor does not contribute, `UNKNOWN_SAMPLE` where several samples do. None if the product
        cannot be carried out.
    """
    leaves, form = tree_flatten((call.args, dict(call.kwargs)))
    place = next(place for place, leaf in enumerate(leaves) if leaf is factor)
    is_complex = any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves)
    dtype = torch.complex128 if is_complex else torch.float64
    leaves = [leaf.detach().to(dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    codes = samples - UNKNOWN_SAMPLE  # at least 1

    def product(values: Tensor) -> Tensor:
        leaves[place] = values.to(factor.device, dtype)
        args, kwargs = tree_unflatten(leaves, form)
        result = call.function(*args, **kwargs)
        return (result.to_dense() if result.is_sparse else result).to("cpu")

    try:
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(factor.shape, generator=generator, dtype=torch.float64) + 0.5
        constant = product(torch.zeros_like(weights))  # a summand, as of addmm
        plain, coded = product(weights) - constant, product(weights * codes) - constant
    except (RuntimeError, TypeError, ValueError):  # inside vmap, or without float64
        return None
    code = (coded / plain).real
    nearest = code.round()
    found = torch.where(
        (code - nearest).abs() < _TOLERANCE, nearest + UNKNOWN_SAMPLE, UNKNOWN_SAMPLE
    )
    return torch.where(plain == 0, NO_SAMPLE, found).long()


def agreed_rows(found: Sequence[SampleRows], axis: int) -> SampleRows:
    """Return the rows that all factors agree on which do not mix samples.

    Parameters
    ----------
    found
        Rows of a product by each factor; unknown where it mixes samples.
    axis
        Of the samples: a Gram matrix has them on both axes.
    """
    known = [rows for rows in found if rows.samples is not None]
    known = [rows for rows in known if rows.axis == axis] or known
    return known[0] if known and all(map(known[0].equals, known)) else UNKNOWN_ROWS
