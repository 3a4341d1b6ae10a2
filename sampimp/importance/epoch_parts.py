"""Recorded importance by epoch, until it is read.

Map: `EpochParts`; `importance_dataset` (its values with labels), `describe_epochs`.
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
        self._complete: frozenset[int] = frozenset()  # epochs that were restored as complete

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

    def state(
        self, recent: Mapping[int, tuple[Tensor, Tensor]] | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """Return `index` (N,) and `importance` (layer, N) of each epoch, in the order of its steps.

        `recent` has what would be added next, by epoch.
        """
        epochs = dict(self._parts)
        for epoch, part in (recent or {}).items():
            epochs[epoch] = [*epochs.get(epoch, []), part]
        return {
            int(epoch): {
                "index": torch.cat([index_N for index_N, _ in parts]),
                "importance": torch.cat([beta_LN for _, beta_LN in parts], dim=1),
            }
            for epoch, parts in epochs.items()
        }

    def restore(self, state: Mapping[int, Mapping[str, Tensor]], open_epoch: int | None) -> None:
        """Take the epochs of a state; all but `open_epoch` are complete."""
        for epoch, part in state.items():
            self.add(epoch, part["index"].cpu(), part["importance"].cpu())
        self._complete = frozenset(state) - {open_epoch}

    def require_open(self, epoch: int) -> None:
        """Raise ConfigError if the epoch was restored as complete: it would count twice."""
        if epoch in self._complete:
            raise ConfigError(
                expected="a step of an epoch that follows those of the restored state",
                got=f"epoch {epoch}, which the state holds as complete; it holds "
                f"{describe_epochs(self._complete)}",
                where="ImportanceRecorder.step",
                todo="load the model, the optimizer and the recorder from one checkpoint, and go "
                "on with the epoch that follows it",
            )

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


def describe_epochs(epochs: Collection[int]) -> str:
    """Return the numbers of epochs for messages.

    Examples
    --------
    >>> describe_epochs([1, 2, 3]), describe_epochs([4]), describe_epochs([1, 3])
    ('epochs 1 to 3', 'epoch 4', 'epochs 1, 3')
    """
    numbers = sorted(epochs)
    if len(numbers) < 2:
        return f"epoch {numbers[0]}" if numbers else "no epoch"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"epochs {numbers[0]} to {numbers[-1]}"
    return f"epochs {', '.join(map(str, numbers))}"


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
