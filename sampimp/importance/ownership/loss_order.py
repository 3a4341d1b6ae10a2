"""Which sample each row of the loss belongs to, from the data of the uses.

The proof relates the rows of a use to the N rows of the loss; `data_rows` relates the rows of a use
whose input is data to samples. Together they give the sample of each row of the loss. All uses
must agree on it.

Map: `LossOrder`.

Shape suffixes: N samples, R rows of a use.
"""

import torch
from torch import Tensor

from sampimp.importance.ownership.layout import NO_GRADIENT


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
