"""Stored snapshot importance: snapshots.zarr beside a trial's record, listed in snapshots.json.

Map: `SNAPSHOTS` (the list), `write_snapshot` (one epoch of one trial), `stored_snapshots` (the
reader). `sampimp.sweeps.scoring` computes the values.
"""

from collections.abc import Mapping

import numpy as np

from sampimp.schema import Layout
from sampimp.store.integrity import chunk_digests
from sampimp.store.location import Folder
from sampimp.store.variables import StoredVariable
from sampimp.store.zarr_arrays import require_array, require_group

SNAPSHOTS = "snapshots.json"
"""File in OUT: which epochs of which trials have `snapshot_importance`, with digests."""


def write_snapshot(trial: Folder, layout: Layout, epoch: int, values: np.ndarray) -> list[str]:
    """Write `snapshot_importance` of one epoch beside a record; return its chunks' digests.

    Several workers may score epochs of one trial at the same time, and may each find the group or
    the array missing.

    Parameters
    ----------
    trial
        OUT/trials/ID.
    layout
        The shape of its record.
    epoch
        1-based.
    values
        Shape (layer, sample).
    """
    name = "snapshot_importance"
    array = require_array(require_group(trial / "snapshots.zarr"), name, layout)
    array[layout.positions(name).index(epoch)] = values
    return chunk_digests(values, array.chunks[-1])


def stored_snapshots(
    trial: Folder, layout: Layout, digests: Mapping[str, list[str]]
) -> StoredVariable:
    """Return a trial's `snapshot_importance`.

    Parameters
    ----------
    trial
        OUT/trials/ID.
    layout
        The shape of its record.
    digests
        The trial's entry in `SNAPSHOTS`: epoch to digests of its chunks.
    """
    by_epoch = [digests.get(str(epoch), []) for epoch in range(1, layout.epoch + 1)]
    history = {"parts": [(0, "snapshots.zarr")], "digests": {"snapshot_importance": by_epoch}}
    return StoredVariable.of(trial, "snapshot_importance", layout, history)
