"""Recorded importance by epoch, until it is read.

Map: `EpochParts`; `importance_dataset` (its values with labels).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sampimp.errors import ConfigError
from sampimp.importance.sample_index import sum_by_sample
from sampimp.schema import SCHEMA_VERSION, VARIABLES, __version__

if TYPE_CHECKING:
    import xarray as xr


class EpochParts:
    """Importance of the steps of each epoch, in the order in which it was recorded."""

    def __init__(self) -> None:
        # By epoch: sample indices (N,) and importance (layer, N).
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def epochs(self) -> list[int]:
        """The epochs that have importance, sorted."""
        return sorted(self._parts)

    def add(self, epoch: int, index_N: Tensor, beta_LN: Tensor) -> None:
        """Add importance (layer, N) of the samples at `index_N`, which may repeat a sample."""
        self._parts.setdefault(epoch, []).append((index_N, beta_LN))

    def summed(self, epoch: int, sample_count: int) -> Tensor:
        """Return an epoch's importance, shape (layer, sample); NaN for samples that it did not use.

        Raises
        ------
        KeyError
            The epoch has no importance.
        ConfigError
            An index is not below `sample_count`.
        """
        indices, betas = zip(*self._parts[epoch], strict=True)
        index_N = torch.cat(indices)
        if index_N.numel() and int(index_N.max()) >= sample_count:
            raise ConfigError(
                expected=f"indices below {sample_count}, the number of samples",
                got=f"{int(index_N.max())}",
                where="ImportanceRecorder",
                todo="pass the size of the whole training set, and in each step the samples' "
                "positions in it",
            )
        return sum_by_sample(index_N, torch.cat(betas, dim=1), sample_count)

    def forget(self, epoch: int) -> None:
        """Drop an epoch."""
        del self._parts[epoch]

    def count_samples(self) -> int:
        """Return the largest index plus one.

        Raises
        ------
        ConfigError
            The indices are so sparse that they cannot be positions in a data set.
        """
        parts = [index_N for epoch in self.epochs for index_N, _ in self._parts[epoch]]
        largest = max((int(index_N.max()) for index_N in parts if len(index_N)), default=-1)
        # Sorting all indices after each epoch would take time: only where they could be sparse.
        used = len(torch.cat(parts).unique()) if largest > 10**6 else 0
        if largest > 10**6 + 1000 * used:  # arbitrary: sparser than any data set
            raise ConfigError(
                expected="positions in the training set, so that the largest is about their number",
                got=f"{used} samples, with indices up to {largest}",
                where="ImportanceRecorder.to_dataset",
                todo="number the samples from 0, as by numpy.unique(names, return_inverse=True), "
                "or pass sample_count",
            )
        return largest + 1

    def not_finite(self, layer_count: int, undefined_layers: Collection[int]) -> list[int]:
        """Return the epochs with infinite or NaN importance outside the undefined layers."""
        defined = [layer for layer in range(layer_count) if layer not in undefined_layers]
        return [
            epoch
            for epoch in self.epochs
            if not all(bool(beta[defined].isfinite().all()) for _, beta in self._parts[epoch])
        ]


def importance_dataset(
    values: Sequence[np.ndarray],
    epochs: Sequence[int],
    layers: Sequence[str],
    sample_count: int,
    attrs: Mapping[str, object],
) -> "xr.Dataset":
    """Return the importance of epochs, each of shape (layer, sample), as a labelled Dataset."""
    import xarray as xr  # here, so that recording alone does not import it

    empty = np.empty((0, len(layers), sample_count))
    variable = VARIABLES["importance"]
    described = {"units": variable.units, "long_name": variable.long_name, **attrs}
    return xr.Dataset(
        {"importance": (variable.dims, np.stack(values) if values else empty, described)},
        coords={
            "epoch": list(epochs),
            # As objects: Zarr 3 has no specification of strings of a fixed length, and warns.
            "layer": np.array(layers, dtype=object),
            "sample": np.arange(sample_count),
        },
        attrs={"schema_version": SCHEMA_VERSION, "sampimp_version": __version__},
    )
