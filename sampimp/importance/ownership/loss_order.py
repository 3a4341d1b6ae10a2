"""Which sample each row of the loss belongs to, from the data of the uses.

The proof relates the rows of a use to the N rows of the loss; `data_rows` relates the rows of a use
whose input is data to samples. Together they give the sample of each row of the loss. All uses
must agree on it. Labels that the block reorders are a second witness: data that are assumed to be
in the batch's order, because no operation on them was seen, may not contradict them.

Map: `LossOrder`, `LabelOrders`.

Shape suffixes: N samples, R rows of a use.
"""

import torch
from torch import Tensor

from sampimp.importance.ownership.layout import NO_GRADIENT
from sampimp.importance.ownership.row_notes import SampleRows


class LossOrder:
    """The sample of each row of the loss, collected from one use after the other.

    Parameters
    ----------
    size
        Number of samples, N.

    Attributes
    ----------
    samples
        Sample of each row of the loss, (N,); `NO_GRADIENT` where no use has named it.
    """

    def __init__(self, size: int) -> None:
        self.samples = torch.full((size,), NO_GRADIENT)

    def add(self, owner_R: Tensor, sample_R: Tensor) -> bool:
        """Take the rows of a use, by the row of the loss and by the sample that each belongs to.

        Returns
        -------
        bool
            Whether they agree with each other and with all uses before.
        """
        has_gradient = owner_R >= 0
        owners, samples = owner_R[has_gradient], sample_R[has_gradient]
        if bool((samples < 0).any()):
            return False  # the loss depends on rows that belong to no sample
        before = self.samples[owners]
        if bool(((before != NO_GRADIENT) & (before != samples)).any()):
            return False
        self.samples[owners] = samples
        # Not equal where two rows with different samples belong to one row of the loss.
        return not bool((self.samples[owners] != samples).any())

    @property
    def is_plain(self) -> bool:
        """Whether all known rows of the loss are in the batch's order."""
        plain = torch.arange(len(self.samples))
        return bool(((self.samples == plain) | (self.samples == NO_GRADIENT)).all())

    @property
    def is_complete(self) -> bool:
        """Whether each sample has one row of the loss."""
        return len(self.samples.unique()) == len(self.samples) and int(self.samples.min()) >= 0


class LabelOrders:
    """The orders of the data that activations are combined with after the last use."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all of them: another use follows, so that they were no labels."""
        self._reordered: list[list[int]] = []
        self._is_settled = False

    def settle(self) -> None:
        """Note that activations were put on other rows: labels need not be in the data's order."""
        self._is_settled = True

    def add(self, rows: SampleRows) -> None:
        """Take the samples of data; those in the batch's order settle the matter, as in mixup."""
        if rows.is_plain:
            self.settle()
        elif rows.samples is not None:
            # A sample may have several rows: what counts is where it occurs first.
            samples = [sample for sample in dict.fromkeys(rows.samples.tolist()) if sample >= 0]
            if samples != sorted(samples):
                self._reordered.append(samples)
            elif samples:
                self.settle()

    @property
    def are_reordered(self) -> bool:
        """Whether labels are in other orders than the batch's, and in no other."""
        return bool(self._reordered) and not self._is_settled

    def agree_with(self, order: Tensor | None) -> bool:
        """Return whether reordered labels are in the order of the loss's rows.

        Parameters
        ----------
        order
            Sample of each row of the loss, (N,); None for the batch's order.
        """
        if not self.are_reordered:
            return True
        if order is None:
            return False
        place = {sample: row for row, sample in enumerate(order.tolist())}
        return all(
            samples == sorted(samples, key=lambda sample: place.get(sample, -1))
            for samples in self._reordered
        )
