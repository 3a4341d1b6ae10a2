"""Which samples the rows of data are of, by their values: a second witness.

Data may be copied, or reordered, in a way that PyTorch does not show: `Variable(x)`, NumPy, a list,
a compiled function, another thread. If all rows of such a tensor have the values of rows of data
that were seen before in the block, they are of the same samples.

Map: `RowValues`.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sampimp.importance.ownership.row_notes import SampleRows, is_transformed


class RowValues:
    """The values of the rows of the data that were seen in a pass.

    Parameters
    ----------
    are_compared
        Whether they are: reading them waits for the device.
    index
        The step's index of the samples. Where it is an order of 0 to N - 1, a tensor of N rows may
        be the batch, or the data set that it is taken from; then values say nothing.
    """

    def __init__(self, are_compared: bool, index: Tensor | None) -> None:
        self.are_compared = are_compared and not (index is not None and _is_reordered_range(index))
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._samples: list[tuple[torch.Size, dict[float, set[int]]]] = []

    def forget(self, data: Tensor) -> None:
        """Look at a tensor again: it was written into."""
        self._seen.pop(data, None)

    def trust(self, data: Tensor) -> None:
        """Forget the data so far: a batch was fetched from them, in another order than theirs."""
        self._samples.clear()
        self._seen[data] = True

    def contradict(self, data: Tensor, rows: SampleRows | None) -> bool:
        """Return whether rows that were seen before say that a tensor's rows are of other samples.

        Parameters
        ----------
        data
            A tensor of the pass.
        rows
            The samples of its rows, as far as they are known.
        """
        if data in self._seen:
            return False
        self._seen[data] = True
        if rows is None or rows.samples is None or not _can_be_compared(data, rows):
            return False
        samples = rows.samples.tolist()
        if min(samples) < 0:
            return False
        digests = _digests(data, rows.axis)
        shape = data.movedim(rows.axis, 0).shape[1:]
        by_digest = defaultdict(set)
        for sample, digest in zip(samples, digests, strict=True):
            by_digest[digest].add(sample)
        if 2 * len(by_digest) < len(digests):
            return False  # rows are equal by chance, as one-hot labels are
        is_contradiction = any(
            not all(sample in seen[digest] for sample, digest in zip(samples, digests, strict=True))
            for seen_shape, seen in self._samples
            if seen_shape == shape and seen.keys() >= set(digests)
        )
        self._samples.append((shape, by_digest))
        return is_contradiction


def _is_reordered_range(index: Tensor) -> bool:
    """Return whether an index is an order of 0, 1, 2, ..., but for that one."""
    plain = torch.arange(len(index))
    return torch.equal(index.sort().values, plain) and not torch.equal(index, plain)


def _can_be_compared(data: Tensor, rows: SampleRows) -> bool:
    is_known = not (rows.is_created or rows.is_assumed or is_transformed())
    is_array = data.layout == torch.strided and not data.is_meta and data.is_floating_point()
    return is_known and is_array and data.dim() > 1 and data.shape[rows.axis] > 1


@torch.no_grad()
def _digests(data: Tensor, axis: int) -> list[float]:
    """Return a number for each row, which is equal for rows with equal values."""
    rows = data.detach().movedim(axis, 0).flatten(1).double().contiguous()
    weights = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    return (rows * weights).sum(1).tolist()
