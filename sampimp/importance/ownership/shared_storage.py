"""Tensors that share memory: a write into one of them changes the others.

Map: `RewrittenStorages`, `numbers_after_write`.
"""

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakIdKeyDictionary

from sampimp.importance.ownership.row_notes import UNKNOWN_SAMPLE, is_transformed


class RewrittenStorages:
    """The storages in which a pass has put samples on other rows."""

    def __init__(self) -> None:
        # The storage is kept, so that no other one gets its address.
        self._storages: dict[int, tuple[UntypedStorage, WeakIdKeyDictionary]] = {}

    def add(self, *known: Tensor) -> None:
        """Note that tensors, which share a storage, have rows that are known; all others not."""
        storage = known[0].untyped_storage()
        self._storages[storage._cdata] = storage, WeakIdKeyDictionary()
        self.know(*known)

    def know(self, *tensors: Tensor) -> None:
        """Note that the rows of tensors are known, as of an operation's outputs."""
        for tensor in filter(_has_storage, tensors if self._storages else ()):
            found = self._storages.get(tensor.untyped_storage()._cdata)
            if found is not None:
                found[1][tensor] = True

    def hold(self, tensor: Tensor) -> bool:
        """Return whether a tensor's rows are unknown since a write through another tensor."""
        if not self._storages or not _has_storage(tensor):
            return False
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return found is not None and tensor not in found[1]


def numbers_after_write(
    base: Tensor, base_numbers: Tensor, view: Tensor, view_numbers: Tensor
) -> Tensor | None:
    """Return the sample numbers of a tensor's entries after a write into a view of it.

    Parameters
    ----------
    base, view
        A tensor, and the view of it that was written into.
    base_numbers, view_numbers
        Number of the sample of each of their entries, in their shapes: of `base` before the write.

    Returns
    -------
    Tensor or None
        In the shape of `base`; None if the view has entries of another size (`view_as_real`).
    """
    if base.element_size() != view.element_size() or not _has_storage(base):
        return None
    entries = base.untyped_storage().nbytes() // base.element_size()
    numbers = torch.full((entries,), UNKNOWN_SAMPLE)
    for tensor, values in ((base, base_numbers), (view, view_numbers)):
        place = numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        place.copy_(values)
    return numbers.as_strided(base.shape, base.stride(), base.storage_offset())


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_nested or is_transformed())
